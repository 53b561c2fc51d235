"""Runs that are killed, at random and at bad moments, and go on: they end as runs that were not, to the last bit."""

import os
import random
import signal
import time
from functools import partial

import pytest
import torch
from processes import end, launch, run_processes, wait_for
from safetensors.torch import load_file
from tiny import ConvNet, Images, config, networks
from transformers import TrainerCallback

from hf_kd import DistillationTrainer
from hf_kd.checkpoints import MANIFEST, checkpoints, last_complete


SAMPLES, BATCH, EPOCHS, SAVE_STEPS = 26, 4, 3, 2
STEPS = EPOCHS * 7


class SlowImages(Images):
    """Images that take a moment each, so that there is time to be killed in."""

    def __getitem__(self, index):
        time.sleep(0.004)
        return super().__getitem__(index)


class Steps(TrainerCallback):
    """Shows how far training is, by empty files."""

    def __init__(self, folder):
        self.folder = folder

    def on_step_end(self, args, state, control, **kwargs):
        (self.folder / f"step{state.global_step}").touch()


def train(rank, folder, **options):
    """Train to the end, from wherever an earlier launch left off; the student is in folder/student."""
    _, teacher = networks()
    torch.manual_seed(1)
    student = ConvNet(dropout=0.3)
    args = config(
        folder,
        **{
            "per_device_train_batch_size": BATCH // int(os.environ["WORLD_SIZE"]),
            "num_train_epochs": EPOCHS,
            "save_strategy": "steps",
            "save_steps": SAVE_STEPS,
            "save_total_limit": 2,
            "beta": "auto",
            "lr_scheduler_type": "cosine",
            **options,
        },
    )
    data = SlowImages(count=SAMPLES)
    trainer = DistillationTrainer(student, teacher, args, train_dataset=data, callbacks=[Steps(folder)])
    (folder / "started").touch()
    trainer.train(resume_from_checkpoint=True)
    trainer.save_model(str(folder / "student"))


def final_weights(folder):
    return load_file(folder / "student" / "model.safetensors")


def assert_identical(folder, reference):
    weights = final_weights(folder)
    assert weights.keys() == reference.keys()
    for key, value in reference.items():
        assert torch.equal(weights[key], value), key


def step_of(checkpoint):
    return 0 if checkpoint is None else int(checkpoint.name.rpartition("-")[2])


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """Final weights and the seconds that training took, by number of processes."""
    made = {}

    def run(processes=1):
        if processes not in made:
            folder = tmp_path_factory.mktemp(f"uninterrupted{processes}")
            run_processes(train, processes, folder)
            began, ended = ((folder / name).stat().st_mtime for name in ("started", f"step{STEPS}"))
            made[processes] = final_weights(folder), ended - began
        return made[processes]

    return run


def kill_when(moment, folder, number=signal.SIGKILL, processes=1, **options):
    """Start a run, send it a signal at a moment (a function that returns then), and wait for its end."""
    (folder / "started").unlink(missing_ok=True)
    running = launch(partial(train, **options), processes, folder)
    try:
        wait_for((folder / "started").exists)
        moment(running[0])
        end(running[0], number)
    finally:
        for process in running[1:]:
            end(process)
    return running[0].exitcode


def after(seconds):
    return lambda process: process.join(seconds)


def after_step(folder, step):
    return lambda process: wait_for(lambda: (folder / f"step{step}").exists() or not process.is_alive())


def when_written(folder, name, count):
    """As soon as the file is there in a checkpoint for the count-th time."""

    def moment(process):
        seen = set()

        def found():
            seen.update(path.parent.name for path in folder.glob(f"checkpoint-*/{name}"))
            return len(seen) >= count or not process.is_alive()

        wait_for(found, every=0.0002)

    return moment


@pytest.mark.parametrize("seed", range(5))
def test_sigkill_at_four_random_moments(seed, uninterrupted, tmp_path):
    reference, seconds = uninterrupted()
    moments = random.Random(seed)
    reached = 0
    for _ in range(4):
        kill_when(after(moments.uniform(0.0, 0.5) * seconds), tmp_path)
        assert not (tmp_path / "student").exists()
        complete = last_complete(tmp_path)
        # What was complete once stays: older checkpoints go only when a newer one is there.
        assert step_of(complete) >= reached
        reached = step_of(complete)
    run_processes(train, 1, tmp_path)
    assert_identical(tmp_path, reference)


FILES = [
    ".model.safetensors.part",
    "model.safetensors",
    "optimizer.pt",
    "scheduler.pt",
    "rng_state.pth",
    "trainer_state.json",
    f".{MANIFEST}.part",
    MANIFEST,
]


@pytest.mark.parametrize("name", FILES)
def test_sigkill_in_the_middle_of_a_checkpoint(name, uninterrupted, tmp_path):
    kill_when(when_written(tmp_path, name, count=3), tmp_path)
    assert 0 < len(checkpoints(tmp_path)) <= 3
    assert step_of(last_complete(tmp_path)) >= 2 * SAVE_STEPS  # the second was complete
    run_processes(train, 1, tmp_path)
    assert_identical(tmp_path, uninterrupted()[0])


@pytest.mark.parametrize("step", [1, STEPS // 2])
def test_ctrl_c(step, uninterrupted, tmp_path):
    reference, _ = uninterrupted()
    # In a step: while Python collects garbage before the first one, an interrupt can be lost in a __del__.
    assert kill_when(after_step(tmp_path, step), tmp_path, signal.SIGINT) != 0
    run_processes(train, 1, tmp_path)
    assert_identical(tmp_path, reference)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("step", [1, 7, 12, 17])
def test_sigterm_writes_a_checkpoint_first(step, workers, uninterrupted, tmp_path):
    # No checkpoint but the one that the signal asks for; it goes to the loader's workers as well.
    reference, _ = uninterrupted()
    options = {"save_steps": 1000, "dataloader_num_workers": workers}
    status = kill_when(after_step(tmp_path, step), tmp_path, signal.SIGTERM, **options)
    assert status == 128 + signal.SIGTERM
    (checkpoint,) = checkpoints(tmp_path)
    assert last_complete(tmp_path) == checkpoint
    assert step <= step_of(checkpoint) <= step + 2 < STEPS
    assert not (tmp_path / "student").exists()
    run_processes(partial(train, **options), 1, tmp_path)
    assert_identical(tmp_path, reference)


@pytest.mark.parametrize("persistent", [False, True])
def test_a_program_with_workers_ends_when_it_is_done(persistent, tmp_path):
    # Python ends the workers that are left by SIGTERM, which they must not wait out.
    options = {"dataloader_num_workers": 2, "dataloader_persistent_workers": persistent}
    (process,) = launch(partial(train, **options), 1, tmp_path)
    wait_for((tmp_path / "student" / "model.safetensors").exists)
    process.join(5)
    assert process.exitcode == 0


def test_sigterm_ends_a_run_without_checkpoints_as_it_always_did(tmp_path):
    status = kill_when(after_step(tmp_path, 2), tmp_path, signal.SIGTERM, save_strategy="no")
    assert status == -signal.SIGTERM
    assert checkpoints(tmp_path) == []


@pytest.mark.parametrize("victim", [0, 1])
def test_sigterm_to_one_of_two_processes_stops_both_at_the_same_step(victim, uninterrupted, tmp_path):
    running = launch(partial(train, save_steps=1000), 2, tmp_path)
    after_step(tmp_path, 4)(running[0])
    os.kill(running[victim].pid, signal.SIGTERM)
    for process in running:
        process.join(60)
    assert [process.exitcode for process in running] == [143, 143]
    (checkpoint,) = checkpoints(tmp_path)
    assert {"rng_state_0.pth", "rng_state_1.pth"} <= {path.name for path in checkpoint.iterdir()}
    run_processes(partial(train, save_steps=1000), 2, tmp_path)
    assert_identical(tmp_path, uninterrupted(2)[0])


@pytest.mark.parametrize("share", [0.3, 0.5])
def test_sigkill_of_one_of_two_processes(share, uninterrupted, tmp_path):
    reference, seconds = uninterrupted(2)
    kill_when(after(share * seconds), tmp_path, processes=2)
    run_processes(train, 2, tmp_path)
    assert_identical(tmp_path, reference)
