"""The share of training's time that goes by in waiting for data: what counts, and when a hint is given."""

import logging
import time

import pytest
import torch
from accelerate import PartialState
from tiny import ConvNet, Images, config, networks

from hf_kd import DistillationTrainer
from hf_kd.data_wait import DataWait
from hf_kd.meters import Meters


class Clock:
    """Time that goes by when it is told to."""

    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


class OneProcess:
    def reduce(self, value, reduction):
        return value


class Queue:
    """The end of a device's work, which is reached or not."""

    def __init__(self, reached):
        self.reached = reached

    def query(self):
        return self.reached


def step(wait, clock, waiting, working, afterwards=0.0):
    wait.begin()
    clock.now += waiting
    wait.arrived()
    clock.now += working
    wait.end_step()
    clock.now += afterwards


def percent(wait):
    meters = Meters()
    wait.report(meters)
    value = meters.means(OneProcess()).get("data_wait")
    wait.judge(value or 0.0)
    return value


@pytest.fixture(autouse=True)
def hints(caplog):
    PartialState(cpu=True)  # its logger asks which process this is
    caplog.set_level(logging.WARNING)

    def found():
        return [record.getMessage() for record in caplog.records if "waited for its data" in record.getMessage()]

    return found


def test_the_share_is_of_the_steps_alone():
    clock = Clock()
    wait = DataWait(torch.device("cpu"), clock=clock)
    # Evaluation and checkpoints come after a step.
    step(wait, clock, 1.0, 3.0, afterwards=1000.0)
    step(wait, clock, 2.0, 4.0)
    assert percent(wait) == pytest.approx(30.0)
    # From then on anew.
    step(wait, clock, 0.0, 4.0)
    assert percent(wait) == 0.0
    # An epoch's end is looked at once more, with no step since.
    wait.end_step()
    clock.now += 50.0
    wait.end_step()
    assert percent(wait) is None


def test_a_wait_behind_which_the_device_works_costs_nothing():
    clock = Clock()
    wait = DataWait(torch.device("cpu"), clock=clock)
    wait._queued = Queue(reached=False)
    step(wait, clock, 3.0, 1.0)
    assert percent(wait) == 0.0
    wait._queued = Queue(reached=True)
    step(wait, clock, 3.0, 1.0)
    assert percent(wait) == pytest.approx(75.0)


def test_the_hint_comes_once_and_not_in_the_first_interval(hints):
    clock = Clock()
    wait = DataWait(torch.device("cpu"), 3, clock=clock)
    for waiting in (5.0, 0.9):
        step(wait, clock, waiting, 10.0 - waiting)
        percent(wait)
        assert hints() == []
    for _ in range(2):
        step(wait, clock, 1.2, 8.8)
        percent(wait)
        (hint,) = hints()
    assert "during 12 % of the time since the last log: set dataloader_num_workers higher (it is 3)" in hint
    assert "train_transform(..., normalize=False)" in hint and "data_wait" in hint


def test_short_intervals_are_judged_together(hints):
    clock = Clock()
    wait = DataWait(torch.device("cpu"), clock=clock)
    for number in range(5):
        # 0.3 seconds each; after the first, four have more than a second.
        step(wait, clock, 0.15, 0.15)
        percent(wait)
        assert len(hints()) == (number == 4)


class SlowImages(Images):
    """2 ms a sample."""

    def __getitem__(self, index):
        time.sleep(0.002)
        return super().__getitem__(index)


class SlowNet(ConvNet):
    """16 ms a batch in training."""

    def forward(self, x):
        time.sleep(0.016 if self.training else 0.0)
        return super().forward(x)


def test_a_run_logs_it_beside_the_loss(tmp_path):
    student = SlowNet()
    trainer = DistillationTrainer(
        student, networks()[1], config(tmp_path, logging_steps=3, eval_strategy="steps", eval_steps=1),
        train_dataset=SlowImages(count=72), eval_dataset=SlowImages(count=16),
    )  # fmt: skip
    trainer.train()
    logged = [entry["data_wait"] for entry in trainer.state.log_history if "loss" in entry]
    # 16 of 32 ms and what a step takes beside. Evaluation waits twice as long after every step, and does not count.
    assert len(logged) == 3 and 25 < sorted(logged)[1] < 65
    quick = DistillationTrainer(
        SlowNet(), networks()[1], config(tmp_path, logging_steps=3), train_dataset=Images(count=72)
    )
    quick.train()
    assert min(entry["data_wait"] for entry in quick.state.log_history if "loss" in entry) < 10
