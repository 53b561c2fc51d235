"""Every figure that a set of runs has the data for, as files, and what could not be drawn and why."""

from __future__ import annotations

import dataclasses
import functools
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from ..text import some
from . import plots
from .logits import LOGITS
from .runs import STATE, Run


if TYPE_CHECKING:
    from matplotlib.figure import Figure


FORMATS = ("png", "pdf", "svg")

CURVES = {
    "entropy": plots.ENTROPY,
    "divergence": plots.DIVERGENCE,
    "teacher": plots.TEACHER,
    "gradients": plots.GRADIENTS,
    "accuracy": plots.ACCURACY,
}
"""Figures of the training log, by file name."""

_OF_A_TEACHER = (
    *("divergence", "eval_teacher_divergence", "power_sum", "teacher_entropy"),
    *("grad_norm_ce", "grad_norm_distill", "grad_cosine"),
)
# What puts a key into the log.
_REMEDIES = {
    "student_entropy": "DistillationTrainer logs it",
    "grad_norm": "DistillationTrainer logs it",
    "power_sum": "WTTM logs it",
    "eval_teacher_divergence": "evaluate with teacher_metrics=True",
    **dict.fromkeys(
        ("divergence", "teacher_entropy", "grad_norm_ce", "grad_norm_distill", "grad_cosine"),
        "train with log_analysis=True",
    ),
    **dict.fromkeys(("eval_entropy", "eval_top1", "eval_nll"), 'evaluate over training: eval_strategy="epoch"'),
}


@dataclass
class Drawn:
    """What :func:`draw` did.

    Attributes:
        files: written, in order.
        notes: sentences on what was left out.
    """

    files: list[Path] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def draw(
    runs: Sequence[Run], folder: str | os.PathLike[str], *, baseline: str | None = None, format: str = "png"
) -> Drawn:
    """Draw what the runs hold into a folder, a file a figure; files of the same names are replaced.

    Args:
        runs: from :func:`hf_kd.analysis.load_runs`; their order is that of the colours.
        folder: made if it is not there.
        baseline: name of the run that ``class_gains`` compares the others with.
        format: "png", "pdf" or "svg".

    Raises:
        ValueError: for no runs, two of one name, an unknown format, or a baseline that is none of the runs.
        ImportError: if matplotlib is missing.
        OSError: if the folder cannot be written to.
    """
    if not runs:
        raise ValueError("There are no runs to draw.")
    if format not in FORMATS:
        raise ValueError(f"`format` must be one of {', '.join(FORMATS)}, got {format!r}.")
    names = [run.name for run in runs]
    if len(set(names)) < len(names):
        raise ValueError(f"Two runs have the same name: {', '.join(names)}.")
    if baseline is not None and baseline not in names:
        raise ValueError(f"The baseline {baseline!r} is none of the runs: they are {', '.join(names)}.")
    plots.check_matplotlib()
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    drawn = Drawn()

    def add(name: str, draw_figure: Callable[[], Figure]) -> None:
        path = folder / f"{name}.{format}"
        plots.save(draw_figure(), path)
        drawn.files.append(path)

    logged = [run for run in runs if run.history]
    if len(logged) < len(runs):
        folders = some((run.folder for run in runs if not run.history), 4)
        drawn.notes.append(f"No {STATE} in {folders}: without it there are no curves.")
    for name, panels in CURVES.items():
        drawn.notes += _missing_curves(name, logged, panels)
        if any(run.has(panel.key) for run in runs for panel in panels):
            add(name, functools.partial(plots.training_curves, runs, panels))

    _draw_logits(runs, baseline, add, drawn.notes)
    return drawn


def _draw_logits(
    runs: Sequence[Run], baseline: str | None, add: Callable[[str, Callable[[], Figure]], None], notes: list[str]
) -> None:
    without = [run.folder for run in runs if run.logits is None]
    if without:
        notes.append(
            f"No {LOGITS} in {some(without, 4)}: histograms of H(q), reliability, class gains and agreement need it; "
            "hf_kd.analysis.save_run(trainer, test_set) makes it."
        )
    saved = {run.name: run.logits for run in runs if run.logits is not None}
    unlabelled = [name for name, logits in saved.items() if not logits.has_labels]
    labelled = {name: logits for name, logits in saved.items() if logits.has_labels}
    untaught = [name for name, logits in labelled.items() if logits.teacher is None]
    if unlabelled:
        notes.append(f"reliability, class_gains, agreement: the logits of {some(unlabelled, 4)} have no labels.")
    if untaught:
        notes.append(f"agreement: the logits of {some(untaught, 4)} have none of a teacher beside them.")
    if saved:
        add("entropy_histograms", lambda: plots.entropy_histograms(runs))
    if labelled:
        add("reliability", lambda: plots.reliability_diagrams(runs))
    if len(untaught) < len(labelled):
        add("agreement", lambda: plots.agreement(runs))
    if baseline is None:
        if len(labelled) > 1:
            notes.append("class_gains: name the run to compare the others with, --baseline NAME.")
    elif baseline not in labelled or len(labelled) < 2:
        notes.append(f"class_gains: this needs logits with labels of the baseline {baseline} and of another run.")
    else:
        reference = next(run for run in runs if run.name == baseline)
        compared = [_comparable(run, reference, notes) for run in runs]
        if any(run.logits is not None and run is not reference for run in compared):
            add("class_gains", lambda: plots.class_gains(compared, reference))


def _comparable(run: Run, baseline: Run, notes: list[str]) -> Run:
    """The run, or without its logits where they are not of the baseline's samples."""
    if run is baseline or run.logits is None:
        return run
    if run.logits.has_labels:
        try:
            plots.check_comparable(run, baseline)
            return run
        except ValueError as error:
            notes.append(f"class_gains: {error}")
    return dataclasses.replace(run, logits=None)


def _missing_curves(name: str, runs: Sequence[Run], panels: Sequence[plots.Panel]) -> Iterator[str]:
    """What of a figure's panels no run logs, or some that should do not."""
    nowhere: dict[str, list[str]] = {}
    for panel in panels:
        lacking = [run for run in runs if not run.has(panel.key)]
        if lacking and len(lacking) == len(runs):
            nowhere.setdefault(_REMEDIES[panel.key], []).append(panel.key)
        else:
            lacking = [run for run in lacking if _could_log(run, panel.key)]
            if lacking:
                names = some((run.name for run in lacking), 4)
                yield f"{name}: {panel.key} is not in the log of {names} ({_REMEDIES[panel.key]})."
    for remedy, keys in nowhere.items():
        yield f"{name}: {', '.join(keys)} {'is' if len(keys) == 1 else 'are'} in no run's log ({remedy})."


def _could_log(run: Run, key: str) -> bool:
    loss = run.provenance.get("loss")
    if key == "power_sum":
        return loss in (None, "wttm")
    return loss != "ce" or key not in _OF_A_TEACHER
