"""Runs that nobody trained: logs and logits with the numbers a test wants."""

import json

import torch

from hf_kd.analysis import Run, SavedLogits


def logits(samples=40, classes=4, seed=0, scale=2.0, labels=True, teacher=True, gamma=0.5, **given):
    """Saved logits in fp64; the last two samples have no label."""
    generator = torch.Generator().manual_seed(seed)
    student, other = (scale * torch.randn(samples, classes, generator=generator, dtype=torch.float64) for _ in "ab")
    # The same samples whatever the seed.
    known = torch.randint(classes, (samples,), generator=torch.Generator().manual_seed(99))
    known[-2:] = -100
    if not labels:
        known.fill_(-100)
    return SavedLogits(student, known, other if teacher else None, gamma, **given)


def run(name="run", log=(), saved=None, **provenance):
    return Run(name, folder=None, history=tuple(log), provenance=provenance, logits=saved)


def write_run(folder, log=None, provenance=None, arguments=None):
    """A run's folder as a trainer leaves it."""
    folder.mkdir(parents=True, exist_ok=True)
    if log is not None:
        (folder / "trainer_state.json").write_text(json.dumps({"global_step": 3, "log_history": log}))
    if provenance is not None:
        (folder / "distillation.json").write_text(json.dumps(provenance))
    if arguments is not None:
        (folder / "training_args.json").write_text(json.dumps(arguments))
    return folder
