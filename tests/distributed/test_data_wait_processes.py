"""The waiting for data of several processes, as one percentage."""

import time

import pytest
from processes import run_processes
from tiny import ConvNet, Images, config

from hf_kd import DistillationTrainer


class UnevenImages(Images):
    """10 ms for a sample that the second process gets, the half of each batch of both."""

    def __getitem__(self, index):
        time.sleep(0.01 if index % 8 >= 4 else 0.0)
        return super().__getitem__(index)


def waits(rank, folder):
    args = config(
        folder, loss="ce", per_device_train_batch_size=4, logging_steps=4, train_sampling_strategy="sequential"
    )
    trainer = DistillationTrainer(ConvNet(norm=False), None, args, train_dataset=UnevenImages(count=64))
    trainer.train()
    return args.world_size, [entry["data_wait"] for entry in trainer.state.log_history if "loss" in entry]


def test_the_mean_over_processes_is_logged(tmp_path):
    (size, first), (_, second) = run_processes(waits, 2, tmp_path)
    assert size == 2
    assert first == pytest.approx(second, rel=1e-6) and len(first) == 2
    # The second waits for its samples nearly all the time, the first never for samples, only for the second.
    assert 25 < first[1] < 55
