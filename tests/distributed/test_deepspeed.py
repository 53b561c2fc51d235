"""ZeRO-2 in two processes on the CPU, against DDP. Collected where DeepSpeed is installed (see conftest.py).

DeepSpeed knows the CPU (DS_ACCELERATOR), and trains on it if the backend of the group is named and the CPU is not
asked for, in which case Accelerate leaves DeepSpeed out.
"""

import os

import pytest
import torch
from accelerate.utils import DistributedType
from accelerate.utils.launch import prepare_deepspeed_cmd_env
from launch_files import read
from processes import run_processes
from safetensors.torch import load_file
from tiny import ConvNet, Images, config, networks

from hf_kd import DistillationTrainer


def launch_variables(*options):
    """What `accelerate launch` tells the processes of the launch file."""
    args, defaults, _ = read("deepspeed_zero2", *options)
    args.deepspeed_fields_from_accelerate_config = ",".join(defaults.deepspeed_config)
    _, variables = prepare_deepspeed_cmd_env(args)
    return {name: value for name, value in variables.items() if name.startswith("ACCELERATE_")}


class Recording(DistillationTrainer):
    """Keeps the types of the images that the teacher and the student see."""

    def compute_teacher_logits(self, inputs):
        self.teacher_saw = inputs["pixel_values"].dtype
        return super().compute_teacher_logits(inputs)

    def _student_outputs(self, model, inputs):
        hook = model.register_forward_pre_hook(lambda module, args: setattr(self, "student_saw", args[0].dtype))
        with hook:
            return super()._student_outputs(model, inputs)


def run(rank, folder, variables, resume=None, **options):
    torch.manual_seed(1)
    student, (_, teacher) = ConvNet(norm=False), networks()
    defaults = {"per_device_train_batch_size": 4, "max_grad_norm": 1.0, "num_train_epochs": 2, **options}
    if variables:
        os.environ.update(variables, DS_ACCELERATOR="cpu")
        defaults.update(use_cpu=False, ddp_backend="gloo")
    trainer = Recording(student, teacher, config(folder, **defaults), train_dataset=Images(count=21),
                        eval_dataset=Images(count=11, seed=3))  # fmt: skip
    assert trainer.accelerator.num_processes == 2
    expected = DistributedType.DEEPSPEED if variables else DistributedType.MULTI_CPU
    assert trainer.accelerator.distributed_type == expected
    early = [trainer.evaluate()["eval_loss"] for _ in range(2)]
    trainer.train(resume_from_checkpoint=resume)
    late = trainer.evaluate()["eval_loss"]
    trainer.save_model(str(folder / "final"))
    trainer.accelerator.wait_for_everyone()
    return {
        "weights": load_file(folder / "final" / "model.safetensors"),
        "evaluations": [*early, late],
        "losses": [entry["loss"] for entry in trainer.state.log_history if "loss" in entry],
        "optimiser": type(getattr(trainer.optimizer, "optimizer", trainer.optimizer)).__name__,
        "saw": (trainer.student_saw, trainer.teacher_saw),
    }


def both(rank, folder, variables, options):
    ddp = run(rank, folder / "ddp", None, **options)
    return ddp, run(rank, folder / "zero", variables, **options)


@pytest.mark.parametrize(
    "options",
    [
        {"momentum": 0.9},
        {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2},
        {"optim": "adamw_torch", "learning_rate": 1e-3},
    ],
    ids=["uneven last batch", "accumulation", "AdamW"],
)
def test_the_student_is_that_of_ddp(options, tmp_path):
    for ddp, zero in run_processes(both, 2, tmp_path, launch_variables(), options):
        assert zero["optimiser"] == "DeepSpeedZeroOptimizer"
        assert zero["losses"] == pytest.approx(ddp["losses"], rel=1e-5)
        assert zero["evaluations"] == pytest.approx(ddp["evaluations"], rel=1e-5)
        assert zero["weights"].keys() == ddp["weights"].keys()
        for key, value in ddp["weights"].items():
            torch.testing.assert_close(zero["weights"][key], value, rtol=0, atol=1e-6)
    assert abs(ddp["evaluations"][0] - ddp["evaluations"][2]) > 0.001


def stopped_and_resumed(rank, folder, variables):
    saving = {"save_strategy": "steps", "save_steps": 2, "momentum": 0.9}
    whole = run(rank, folder, variables, **saving)
    return whole, run(rank, folder, variables, resume=str(folder / "checkpoint-2"), **saving)


def test_resuming(tmp_path):
    for whole, resumed in run_processes(stopped_and_resumed, 2, tmp_path, launch_variables()):
        assert resumed["losses"] == whole["losses"] and len(whole["losses"]) == 6
        for key, value in whole["weights"].items():
            assert torch.equal(resumed["weights"][key], value)


def with_another_engine(rank, folder, variables):
    run(rank, folder, None, save_strategy="epoch")
    with pytest.raises(ValueError, match="was written") as raised:
        run(rank, folder, variables, resume=True)
    return str(raised.value)


def test_a_checkpoint_of_another_engine(tmp_path):
    messages = run_processes(with_another_engine, 2, tmp_path, launch_variables())
    assert messages[0] == messages[1]
    assert "was written without FSDP or DeepSpeed and this run trains with DeepSpeed" in messages[0]


def in_bf16(rank, folder, variables):
    import transformers.training_args

    # Asked of GPUs, of which there are none; bf16 is there on the CPU.
    transformers.training_args.is_torch_bf16_gpu_available = lambda: True
    result = run(rank, folder, variables, bf16=True)
    return result["saw"], result["losses"]


def test_the_teacher_sees_images_as_they_are(tmp_path):
    """DeepSpeed's bf16 is that of the student's weights; the teacher's images are not rounded to it."""
    for saw, losses in run_processes(in_bf16, 2, tmp_path, launch_variables()):
        assert saw == (torch.bfloat16, torch.float32)
        assert all(0 < loss < 10 for loss in losses)
