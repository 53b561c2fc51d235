"""A cache under several processes, in runs that are killed, and in runs that go on from a checkpoint."""

import os
import signal
import time
from functools import partial

import numpy as np
import pytest
import torch
from cached_runs import Counting, Views, make_trainer
from processes import end, launch, run_processes, wait_for
from tiny import ConvNet, networks

from hf_kd import TeacherCache


SAMPLES = 27


class Slow(Views):
    """Images that take a moment each, so that there is time to be killed in."""

    def __getitem__(self, index):
        time.sleep(0.003)
        return super().__getitem__(index)


def train(rank, folder, cache, data=Views, fp64=False, total=4, ahead=False, resume=None, stop_after=None, **options):
    """What a run came to: losses as logged, weights, and how many images the teacher saw."""
    dtype = torch.float64 if fp64 else torch.float32
    teacher = Counting(networks(dtype=dtype)[1])
    torch.manual_seed(1)
    student = ConvNet(norm=not fp64, dropout=0.0 if fp64 else 0.3).to(dtype)
    trainer = make_trainer(
        folder,
        cache,
        data=data(count=SAMPLES, dtype=dtype),
        teacher=teacher,
        student=student,
        per_device_train_batch_size=total // int(os.environ["WORLD_SIZE"]),
        **options,
    )
    if ahead:
        return trainer.cache_teacher()
    if stop_after is not None:
        trainer.args.max_steps = -1
        step = type(trainer).training_step

        def stopping(self, *arguments, **kwargs):
            if self.state.global_step == stop_after:
                raise KeyboardInterrupt
            return step(self, *arguments, **kwargs)

        trainer.__class__ = type("Stopping", (type(trainer),), {"training_step": stopping})
        with pytest.raises(KeyboardInterrupt):
            trainer.train()
    else:
        trainer.train(resume_from_checkpoint=resume)
    return {
        "losses": trainer.losses,
        "logged": [entry["loss"] for entry in trainer.state.log_history if "loss" in entry],
        "weights": {key: value.clone() for key, value in student.state_dict().items()},
        "seen": teacher.seen,
        "damaged": trainer.replay.cache.storage.damaged if trainer.replay else 0,
    }


def assert_same_weights(one, other, tolerance=0.0):
    for key, value in one["weights"].items():
        torch.testing.assert_close(other["weights"][key], value, rtol=tolerance, atol=tolerance)


# ---- Several processes ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_two_processes_fill_and_read_one_cache_and_equal_one(workers, tmp_path):
    # 27 samples in batches of 4: the last is filled up with repeats. Rows in fp32 are the same whoever computed them.
    options = {"fp64": True, "teacher_cache_dtype": "fp32", "dataloader_num_workers": workers}
    options["learning_rate"] = 0.005
    (one,) = run_processes(partial(train, **options), 1, tmp_path / "one", tmp_path / "cache1")
    two = run_processes(partial(train, **options), 2, tmp_path / "two", tmp_path / "cache2")
    # Each reads what the other number of processes stored.
    later = run_processes(partial(train, **options), 2, tmp_path / "later", tmp_path / "cache1")
    later += run_processes(partial(train, **options), 1, tmp_path / "last", tmp_path / "cache2")
    assert one["seen"] == 3 * SAMPLES
    assert sum(run["seen"] for run in two) >= 3 * SAMPLES
    assert [run["seen"] for run in later] == [0, 0, 0]
    for run in (*two, *later):
        assert run["damaged"] == 0
        assert_same_weights(one, run, 1e-12)
        assert run["logged"] == pytest.approx(one["logged"], rel=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("loading", [{"dispatch_batches": True}, {"split_batches": True}])
def test_other_ways_to_share_out_batches(loading, tmp_path):
    options = {"learning_rate": 0.005, "accelerator_config": loading, "fp64": True}
    live = run_processes(partial(train, **options), 2, tmp_path / "live", None)
    cached = partial(train, teacher_cache_dtype="fp32", **options)
    first = run_processes(cached, 2, tmp_path / "first", tmp_path / "cache")
    for run, expected in zip(first, live, strict=True):
        assert run["logged"] == pytest.approx(expected["logged"], rel=1e-6)


def test_processes_share_the_work_of_computing_ahead(tmp_path):
    done = run_processes(partial(train, ahead=True), 2, tmp_path / "ahead", tmp_path / "cache")
    assert done == [3 * SAMPLES, 3 * SAMPLES]
    (one,) = run_processes(train, 1, tmp_path / "one", tmp_path / "cache")
    assert one["seen"] == 0


def test_both_processes_tell_a_cache_that_was_made_for_something_else(tmp_path):
    run_processes(train, 1, tmp_path / "one", tmp_path / "cache")
    with pytest.raises(RuntimeError, match="was made for another precision of the teacher: as loaded there, bf16 in"):
        run_processes(partial(train, teacher_dtype="bf16"), 2, tmp_path / "two", tmp_path / "cache")


# ---- Going on ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("processes", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_going_on_in_the_middle_of_an_epoch_is_bit_identical(processes, tmp_path):
    options = {"save_strategy": "steps", "save_steps": 1, "beta": "auto", "lr_scheduler_type": "cosine"}
    whole = run_processes(partial(train, **options), processes, tmp_path / "whole", tmp_path / "cache1")
    cache = tmp_path / "cache2"
    # The second time all rows are there.
    for folder in (tmp_path / "filled", tmp_path / "read"):
        run_processes(partial(train, stop_after=9, **options), processes, folder, cache)
        resumed = run_processes(partial(train, resume=True, **options), processes, folder, cache)
        for run, expected in zip(resumed, whole, strict=True):
            assert run["logged"] == expected["logged"]
            assert_same_weights(expected, run)
    assert [run["seen"] for run in resumed] == [0] * processes


# ---- Kills ---------------------------------------------------------------------------------------------------------


def rows_there(cache):
    try:
        return sum(TeacherCache(cache).written(view) for view in range(3))
    except (ValueError, OSError):
        return 0


@pytest.mark.parametrize("ahead", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["training", "ahead"])
def test_a_killed_run_goes_on_filling_the_cache(ahead, tmp_path):
    options = {"data": Slow, "teacher_cache_dtype": "fp32", "ahead": ahead}
    cache, seen = tmp_path / "cache", []
    for wanted in (9, 40):
        (process,) = launch(partial(train, **options), 1, tmp_path / "out", cache)
        wait_for(lambda wanted=wanted: rows_there(cache) >= wanted)
        end(process, signal.SIGKILL)
        seen.append(rows_there(cache))
    assert 9 <= seen[0] < seen[1] < 3 * SAMPLES
    (last,) = run_processes(partial(train, **{**options, "ahead": False}), 1, tmp_path / "out", cache)
    assert last["damaged"] == 0 and last["seen"] == 3 * SAMPLES - seen[1]
    (live,) = run_processes(train, 1, tmp_path / "live", None)
    np.testing.assert_allclose(last["losses"], live["losses"], rtol=1e-5, atol=1e-6)
    (later,) = run_processes(train, 1, tmp_path / "later", cache)
    assert later["seen"] == 0 and later["losses"] == last["losses"]
