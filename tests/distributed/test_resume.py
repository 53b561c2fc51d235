"""Runs that go on from a checkpoint, in one and in two processes, against runs that were never stopped."""

from functools import partial

import pytest
import torch
from processes import run_processes
from tiny import ConvNet, Images, config, networks, without_times

from hf_kd import DistillationTrainer
from hf_kd.data import view_rng
from hf_kd.data.views import EpochMixin


class Views(EpochMixin, Images):
    """Images with noise that depends on (seed, epoch, index), and a record of what was asked for."""

    def __init__(self, **options):
        super().__init__(**options)
        self._init_epoch()
        self.asked = []

    def __getitem__(self, index):
        self.asked.append((self.epoch, int(index)))
        with view_rng(0, self.epoch, int(index)):
            noise = torch.randn(3, 8, 8)
        sample = super().__getitem__(index)
        return {**sample, "pixel_values": sample["pixel_values"] + noise}


class Stop(Exception):
    pass


class StoppingTrainer(DistillationTrainer):
    stop_after = None

    def _maybe_log_save_evaluate(self, *args, **kwargs):
        super()._maybe_log_save_evaluate(*args, **kwargs)
        if self.state.global_step == self.stop_after:
            raise Stop


def train(rank, folder, stop_after=None, resume=None, **options):
    """Weights, log and the views that were asked for; until stop_after, where the run breaks off."""
    _, teacher = networks()
    torch.manual_seed(1)
    student = ConvNet(dropout=0.3)
    defaults = {
        "per_device_train_batch_size": 4,
        "num_train_epochs": 3,
        "save_strategy": "steps",
        "save_steps": 1,
        "beta": "auto",
        "gamma": 0.5,
        "mixup_alpha": 0.2,
        "lr_scheduler_type": "cosine",
    }
    data = Views(count=27)
    trainer = StoppingTrainer(student, teacher, config(folder, **{**defaults, **options}), train_dataset=data)
    trainer.stop_after = stop_after
    if stop_after is None:
        trainer.train(resume_from_checkpoint=resume)
    else:
        with pytest.raises(Stop):
            trainer.train(resume_from_checkpoint=resume)
    return {
        "weights": {key: value.clone() for key, value in student.state_dict().items()},
        "beta": trainer.beta,
        "log": [without_times(entry) for entry in trainer.state.log_history if "loss" in entry],
        "asked": data.asked,
    }  # fmt: skip


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return {n: run_processes(train, n, tmp_path_factory.mktemp(f"whole{n}")) for n in (1, 2)}


@pytest.mark.parametrize("stop_after", [1, 4, 6, 8, 11])
@pytest.mark.parametrize("processes", [1, 2])
def test_going_on_is_bit_identical(processes, stop_after, whole, tmp_path):
    run_processes(partial(train, stop_after=stop_after), processes, tmp_path)
    resumed = run_processes(partial(train, resume=True), processes, tmp_path)
    for ours, theirs in zip(resumed, whole[processes], strict=True):
        assert ours["beta"] == theirs["beta"]
        assert ours["log"] == theirs["log"]
        for key, value in theirs["weights"].items():
            assert torch.equal(ours["weights"][key], value), key


@pytest.mark.parametrize("workers", [0, 2])
def test_views_depend_on_seed_epoch_and_index_alone(workers, whole, tmp_path):
    """The same losses to the last bit whatever the number of loader workers."""
    run = run_processes(partial(train, dataloader_num_workers=workers), 2, tmp_path)
    for ours, theirs in zip(run, whole[2], strict=True):
        assert ours["log"] == theirs["log"]


def test_full_determinism_gives_the_same_run_twice(tmp_path):
    def log(folder):
        return run_processes(partial(train, full_determinism=True, seed=5), 1, tmp_path / folder)[0]

    one, other = log("one"), log("other")
    assert one["log"] == other["log"]
    assert all(torch.equal(value, other["weights"][key]) for key, value in one["weights"].items())


def test_two_processes_share_the_order_of_one(whole):
    def epochs(asked):
        # beta="auto" looks at the first batches before training: those are asked for twice.
        return {epoch: {index for e, index in asked if e == epoch} for epoch in range(3)}

    both = [entry for run in whole[2] for entry in run["asked"]]
    assert epochs(both) == epochs(whole[1][0]["asked"]) == {epoch: set(range(27)) for epoch in range(3)}
