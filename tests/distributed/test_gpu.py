"""What only a GPU shows: fp16 with its scaler, findings that wait on the device, engines that are for GPUs alone.

    pytest -m gpu

One GPU is enough; FSDP2 and ZeRO-2 then run in a group of one process.
"""

import importlib.util
import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from accelerate.utils import DistributedType
from launch_files import CONFIGS
from tiny import ConvNet, Images, config, networks

from hf_kd import DistillationTrainer
from hf_kd.checkpoints import last_complete


pytestmark = pytest.mark.gpu

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module", autouse=True)
def gpu():
    assert torch.cuda.is_available(), "pytest -m gpu needs a CUDA device, and torch sees none."


def train(folder, data=None, student=None, **options):
    own, teacher = networks(norm=False)
    student = own if student is None else student
    args = config(folder, use_cpu=False, train_sampling_strategy="sequential", **options)
    data = Images(count=32) if data is None else data
    trainer = DistillationTrainer(student, teacher, args, train_dataset=data, eval_dataset=Images(count=16, seed=1))
    assert trainer.args.device.type == "cuda"
    trainer.train()
    return trainer


def weights(trainer):
    return torch.cat([p.detach().float().cpu().flatten() for p in trainer.model.parameters()])


def test_the_gpu_trains_as_the_cpu(tmp_path):
    on_gpu = weights(train(tmp_path / "gpu", num_train_epochs=2))
    student, teacher = networks(norm=False)
    args = config(tmp_path / "cpu", num_train_epochs=2, train_sampling_strategy="sequential")
    DistillationTrainer(student, teacher, args, train_dataset=Images(count=32)).train()
    expected = torch.cat([p.detach().flatten() for p in student.parameters()])
    torch.testing.assert_close(on_gpu, expected, rtol=0, atol=1e-3)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_follows_full_precision(precision, tmp_path):
    exact, half = train(tmp_path / "fp32"), train(tmp_path / precision, **{precision: True})
    assert (half.accelerator.scaler is not None) is (precision == "fp16")
    losses = [[entry["loss"] for entry in run.state.log_history if "loss" in entry] for run in (exact, half)]
    assert losses[1] == pytest.approx(losses[0], rel=0.05)
    assert half.evaluate()["eval_nll"] == pytest.approx(exact.evaluate()["eval_nll"], rel=0.05)


class Steep(ConvNet):
    """A network whose gradient overflows fp16 for as long as the scale is large."""

    def forward(self, x):
        return super().forward(x * 64.0) / 64.0


def test_steps_that_the_scaler_skips_are_counted(tmp_path):
    trainer = train(tmp_path, student=Steep(norm=False), fp16=True, per_device_train_batch_size=4)
    skipped = [entry.get("skipped_steps", 0) for entry in trainer.state.log_history if "loss" in entry]
    assert skipped == sorted(skipped)
    assert torch.isfinite(weights(trainer)).all()


class Spoilt(Images):
    def __init__(self, index):
        super().__init__(count=32)
        self.pixel_values[index] = float("nan")


def test_a_finding_waits_on_the_device_and_nothing_is_saved_after_it(tmp_path):
    options = {"logging_steps": 100, "save_strategy": "steps", "save_steps": 2}
    with pytest.raises(RuntimeError, match=r"The loss is not finite at step 3 .*samples with index 16, 17"):
        train(tmp_path, Spoilt(17), **options)
    assert last_complete(tmp_path) == tmp_path / "checkpoint-2"


def test_a_step_is_skipped_at_once(tmp_path):
    trainer = train(tmp_path, Spoilt(17), on_nonfinite="skip")
    assert torch.isfinite(weights(trainer)).all()
    assert trainer.state.log_history[-2]["skipped_steps"] == 1


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_a_compiled_teacher_in_half_precision(dtype, tmp_path):
    plain = weights(train(tmp_path / "plain"))
    fast = weights(train(tmp_path / "fast", teacher_dtype=dtype, teacher_compile=True))
    torch.testing.assert_close(fast, plain, rtol=0, atol=0.02)


def test_sigterm_and_going_on(tmp_path):
    reference = weights(train(tmp_path / "whole", num_train_epochs=3))
    options = {"num_train_epochs": 3, "save_strategy": "steps", "save_steps": 1000}

    class Slow(Images):
        def __getitem__(self, index):
            if index == 12:
                threading.Timer(0, os.kill, (os.getpid(), signal.SIGTERM)).start()
            return super().__getitem__(index)

    with pytest.raises(SystemExit):
        train(tmp_path / "stopped", Slow(count=32), **options)
    student, teacher = networks(norm=False)
    args = config(tmp_path / "stopped", use_cpu=False, train_sampling_strategy="sequential", **options)
    trainer = DistillationTrainer(student, teacher, args, train_dataset=Images(count=32))
    trainer.train(resume_from_checkpoint=True)
    torch.testing.assert_close(weights(trainer), reference, rtol=0, atol=1e-5)


ENGINES = {
    "one_machine": DistributedType.MULTI_GPU,
    "fsdp2": DistributedType.FSDP,
    **({"deepspeed_zero2": DistributedType.DEEPSPEED} if importlib.util.find_spec("deepspeed") else {}),
}


@pytest.mark.parametrize("name", ENGINES)
def test_the_recipe_runs_under_every_engine(name, bright_and_dark, small_teacher, tmp_path):
    arguments = {
        "output_dir": tmp_path / "out", "train_dir": bright_and_dark / "train",
        "val_dir": bright_and_dark / "val", "teacher": small_teacher, "student": "test_resnet", "img_size": 32,
        "total_batch_size": 4, "num_train_epochs": 2, "lr_milestones": 1, "dataloader_num_workers": 0,
        "save_strategy": "epoch", "disable_tqdm": True,
    }  # fmt: skip
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(CONFIGS / f"{name}.yaml")]
    command += ["--num_processes", "1", str(ROOT / "recipes" / "imagenet_wttm.py")]
    command += [f"--{key}={value}" for key, value in arguments.items()]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert results["training"]["steps_done"] == 8
    assert last_complete(tmp_path / "out") == tmp_path / "out" / "checkpoint-8"


@pytest.mark.parametrize(
    "options",
    [
        {"teacher_stream": True},
        {"teacher_fold_batchnorm": True, "channels_last": True},
        {"teacher_speed": "auto", "channels_last": "auto", "teacher_stream": True},
    ],
    ids=str,
)
def test_a_faster_teacher_teaches_the_same(options, tmp_path):
    plain, fast = weights(train(tmp_path / "plain")), weights(train(tmp_path / "fast", **options))
    torch.testing.assert_close(fast, plain, rtol=0, atol=1e-3)
