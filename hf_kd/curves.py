"""The curves of a run as a picture, for its card."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from transformers.utils import logging

from .files import atomic_write


logger = logging.get_logger(__name__)

CURVES = "figures/curves.png"
"""The picture's path, in the student's folder and in its repository."""

# What each panel shows: log entries, their names, and the axis.
_PANELS = (
    ({"loss": "objective", "ce": "cross-entropy", "distill": "distillation"}, "training loss (nats)", 1.0),
    ({"eval_top1": "top-1", "eval_accuracy": "accuracy"}, "evaluation (%)", 100.0),
    ({"student_entropy": "training", "eval_entropy": "evaluation"}, "entropy of q (nats)", 1.0),
)


def draw_curves(log_history: Sequence[Mapping[str, Any]], path: Path) -> bool:
    """Draw losses, accuracy and entropy over the epochs of a Trainer's log; whether there was anything to draw.

    Needs matplotlib, without which nothing is drawn.
    """
    panels = []
    for series, label, factor in _PANELS:
        curves = {name: points(log_history, key, factor) for key, name in series.items()}
        curves = {name: curve for name, curve in curves.items() if len(curve) > 1}
        if curves:
            panels.append((label, curves))
    if not panels:
        return False
    if find_spec("matplotlib") is None:
        logger.warning("The card gets no curves, as matplotlib is not installed: pip install matplotlib.")
        return False
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    # Without pyplot, whose state and choice of backend are the user's.
    figure = Figure(figsize=(4.2 * len(panels), 3.4), layout="constrained")
    canvas = FigureCanvasAgg(figure)
    for axes, (label, curves) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        for name, curve in curves.items():
            axes.plot(*zip(*curve, strict=True), label=name, marker="." if len(curve) < 30 else "")
        axes.set_xlabel("epoch")
        axes.set_ylabel(label)
        axes.grid(alpha=0.3)
        axes.legend(frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as draft:
        # Without the version of matplotlib: the same curves are the same file.
        canvas.print_png(str(draft), metadata={"Software": None})
    return True


def points(log_history: Sequence[Mapping[str, Any]], key: str, factor: float = 1.0) -> list[tuple[float, float]]:
    """Epoch and value of each entry that has them; a later one of the same epoch replaces it."""
    return list(
        {
            entry["epoch"]: (entry["epoch"], factor * entry[key])
            for entry in log_history
            if key in entry and entry.get("epoch") is not None
        }.values()
    )
