"""The average of the weights in two processes: that of one, and the same in both."""

from functools import partial

import torch
from processes import run_processes
from safetensors.torch import load_file
from tiny import ConvNet, Images, config, networks
from transformers import TrainerCallback

from hf_kd import DistillationTrainer
from hf_kd.ema import RAW_WEIGHTS


class StopAfter(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = control.should_training_stop or state.global_step == self.step


def train(rank, folder, dtype=torch.float64, norm=False, batch=4, resume=False, stop_after=None):
    """The number of processes, the student after training, the metrics, and the last checkpoint's two files."""
    _, teacher = networks(dtype=dtype)
    # Before training begins the processes need not agree.
    torch.manual_seed(1 + rank)
    student = ConvNet(norm=norm).to(dtype)
    args = config(folder, num_train_epochs=2, gamma=0.4, ema_decay=0.8, ema_warmup=True, momentum=0.9,
                  per_device_train_batch_size=batch, save_strategy="steps", save_steps=2,
                  eval_strategy="epoch")  # fmt: skip
    data = Images(count=24, dtype=dtype)
    trainer = DistillationTrainer(
        student,
        teacher,
        args,
        train_dataset=data,
        eval_dataset=Images(count=13, seed=5, dtype=dtype),
        callbacks=[StopAfter(stop_after)],
    )
    trainer.train(resume_from_checkpoint=resume)
    last = folder / f"checkpoint-{trainer.state.global_step}"
    return (
        args.world_size,
        {key: value.detach().clone() for key, value in student.state_dict().items()},
        [entry["eval_nll"] for entry in trainer.state.log_history if "eval_nll" in entry],
        load_file(last / "model.safetensors"),
        load_file(last / RAW_WEIGHTS),
    )


def assert_equal(states, expected, tolerance=0.0):
    for state, other in zip(states, expected, strict=True):
        assert state.keys() == other.keys()
        for key, value in other.items():
            torch.testing.assert_close(state[key], value, rtol=0, atol=tolerance, msg=key)


def test_two_processes_average_as_one_does(tmp_path):
    one, *reference = train(0, tmp_path / "1", batch=8)
    runs = run_processes(train, 2, tmp_path / "2")
    assert one == 1
    for processes, student, measured, average, raw in runs:
        assert processes == 2
        torch.testing.assert_close(measured, reference[1], rtol=0, atol=1e-9)
        assert_equal((student, average, raw), (reference[0], *reference[2:]), 1e-11)
        assert_equal((student,), (average,))
        assert not torch.equal(raw["head.weight"], average["head.weight"])


def stop_and_go_on(rank, folder):
    run = partial(train, rank, dtype=torch.float32, norm=True)
    whole = run(folder / "whole")
    run(folder / "stopped", stop_after=4)
    return whole, run(folder / "stopped", resume=True)


def test_going_on_is_bit_identical_and_the_same_in_both(tmp_path):
    """With BatchNorm, whose statistics each process has of its own batches."""
    runs = run_processes(stop_and_go_on, 2, tmp_path)
    for whole, (processes, student, measured, average, raw) in runs:
        assert processes == 2
        assert measured == whole[2]
        assert_equal((student, average, raw), (whole[1], *whole[3:]))
        assert_equal((student, average), (runs[0][0][1],) * 2)
