"""The figures: one small function each, runs in, a matplotlib Figure out.

No function touches pyplot, whose state and choice of window are the user's. Every function raises ValueError where its
runs hold nothing to draw, and ImportError with the command to install it where matplotlib is missing.
"""

from __future__ import annotations

import functools
import math
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

import torch

from ..files import atomic_write
from ..metrics import per_sample_statistics, reliability
from . import quantities
from .logits import SavedLogits
from .runs import Run


if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


# A palette that stays apart for colour-blind readers (Okabe and Ito 2008), grey in
# place of black, which lines of explanation have, and without its yellow, which white swallows.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#666666")
"""Of the runs, in order; where they begin again, the lines are dashed, then dotted."""

_LINES = ("-", "--", ":", "-.")
_GREY = "#999999"
# Matplotlib's own settings may be anyone's.
_STYLE: Any = {
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 10.0,
    "axes.titlesize": 10.0,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "grid.alpha": 0.3,
    "legend.frameon": False,
    "text.usetex": False,
    "svg.hashsalt": "hf_kd",
    "savefig.dpi": 150.0,
}
_WIDTH, _HEIGHT = 4.6, 3.3  # of a panel, in inches
_LINE, _LETTER = 0.2, 0.085  # of a legend: height and width, in inches
_FEW = 0.01  # of the samples: a bin with fewer says little
_MOST_CLASSES = 24

P = ParamSpec("P")
R = TypeVar("R")


def check_matplotlib() -> None:
    """ImportError with one sentence if matplotlib is missing."""
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise ImportError('The figures need matplotlib: pip install "hf-kd[quickstart]".') from error


def styled(function: Callable[P, R]) -> Callable[P, R]:
    """The function under the figures' own settings of matplotlib, in place of the user's."""

    @functools.wraps(function)
    def inner(*args: P.args, **kwargs: P.kwargs) -> R:
        check_matplotlib()
        from matplotlib import rc_context

        with rc_context(_STYLE):
            return function(*args, **kwargs)

    return inner


# ---- Over training -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Panel:
    """One quantity over training.

    Attributes:
        key: in the Trainer's log.
        title: of the panel.
        label: of its axis, with the unit.
        factor: from the log's unit to the axis's.
        log: whether the axis is logarithmic; values that are not positive are then left out.
    """

    key: str
    title: str
    label: str
    factor: float = 1.0
    log: bool = False


_NORM = "gradient norm, log scale"

ENTROPY = (
    Panel("student_entropy", "training", "mean $H(q)$ (nats)"),
    Panel("eval_entropy", "evaluation", "mean $H(q)$ (nats)"),
)
"""Mean Shannon entropy of the student's output: the paper's Fig. 1."""

DIVERGENCE = (
    Panel("divergence", "training, transformed teacher", r"mean $D(p_T \| q)$ (nats)"),
    Panel("eval_teacher_divergence", "evaluation, plain teacher (T = 1)", r"mean $D(p \| q)$ (nats)"),
)
"""Mean divergence from the teacher, unweighted: the paper's Fig. 2."""

TEACHER = (
    Panel("power_sum", "power sum of the teacher", r"mean $U_\gamma(p)$"),
    Panel("teacher_entropy", "entropy of the transformed teacher", "mean $H(p_T)$ (nats)"),
)
"""How soft the teacher is on the samples of training."""

GRADIENTS = (
    Panel("grad_norm_ce", "cross-entropy part, with respect to the logits", _NORM, log=True),
    Panel("grad_norm_distill", "distillation part, with respect to the logits", _NORM, log=True),
    Panel("grad_cosine", "angle between the two parts", "cosine"),
    Panel("grad_norm", "whole objective, with respect to the weights", _NORM, log=True),
)
"""Norms of the gradients of ``ce_weight · CE`` and ``beta · loss``, and whether they pull the same way."""

ACCURACY = (
    Panel("eval_top1", "accuracy on the evaluation data", "top-1 (%)", 100.0),
    Panel("eval_nll", "likelihood on the evaluation data", "mean NLL (nats)"),
)
"""What the student is worth."""


@styled
def training_curves(runs: Sequence[Run], panels: Sequence[Panel]) -> Figure:
    """Quantities over the epochs, a panel each, a line per run that logs it; gaps where a value is not finite.

    Args:
        runs: those that log none of the panels' keys take no part; the others keep the colour of their place.
        panels: those that no run logs are left out.
    """
    from matplotlib.ticker import MaxNLocator

    curves = {
        panel: {place: _points(run, panel) for place, run in enumerate(runs) if run.has(panel.key)} for panel in panels
    }
    curves = {panel: lines for panel, lines in curves.items() if lines}
    if not curves:
        raise ValueError(f"No run logs any of {', '.join(panel.key for panel in panels)}.")
    shown = sorted({place for lines in curves.values() for place in lines})
    figure, axes = _figure(len(curves), legend=[runs[place].name for place in shown])
    handles: dict[int, Any] = {}
    for ax, (panel, lines) in zip(axes, curves.items(), strict=True):
        for place, points in lines.items():
            (handles[place],) = ax.plot(
                *zip(*points, strict=True),
                color=_colour(place),
                linestyle=_LINES[place // len(COLOURS) % len(_LINES)],
                linewidth=1.5,
                marker="o",
                markersize=3,
                markevery=_marked(points),
            )
        if panel.log:
            ax.set_yscale("log")
        if panel.key == "grad_cosine":
            ax.set_ylim(-1.05, 1.05)
            ax.axhline(0.0, color=_GREY, linewidth=0.8, zorder=0)
        ax.set(title=panel.title, xlabel="epoch", ylabel=panel.label)
        if max(epoch for points in lines.values() for epoch, _ in points) >= 3:
            ax.xaxis.set_major_locator(MaxNLocator(nbins=8, integer=True, steps=[1, 2, 5, 10]))
    parts = [ax for ax, panel in zip(axes, curves, strict=True) if panel.key in ("grad_norm_ce", "grad_norm_distill")]
    for ax in parts[1:]:
        # They are to be compared.
        ax.sharey(parts[0])
        ax.autoscale(axis="y")
    _legend(figure, [handles[place] for place in shown], [runs[place].name for place in shown])
    return figure


def _points(run: Run, panel: Panel) -> list[tuple[float, float]]:
    return [
        (epoch, math.nan if panel.log and value <= 0.0 else value)
        for epoch, value in run.curve(panel.key, panel.factor)
        if math.isfinite(epoch)
    ]


def _marked(points: Sequence[tuple[float, float]]) -> list[int]:
    """Which points get a marker: all where there are few, and those between two gaps, which no line would show."""
    if len(points) < 30:
        return list(range(len(points)))
    finite = [False, *(math.isfinite(value) for _, value in points), False]
    return [n for n in range(len(points)) if finite[n + 1] and not finite[n] and not finite[n + 2]]


# ---- Of logits -----------------------------------------------------------------------------------------------------


@styled
def entropy_histograms(runs: Sequence[Run], bins: int = 40) -> Figure:
    """A histogram of H(q) per run over one common axis, the mean marked: the paper's Fig. 3."""
    found = _with_logits(runs)
    classes = max(logits.student.size(1) for _, logits in found.values())
    # Up to the largest entropy that there is, never beyond what K classes can have.
    largest = max(quantities.shannon_entropy(logits.student.double()).max().item() for _, logits in found.values())
    upper = min(math.log(classes), 1.02 * largest) or 1.0
    figure, axes = _figure(len(found), share="both")
    for ax, (place, (run, logits)) in zip(axes, found.items(), strict=True):
        histogram = quantities.entropy_histogram(logits.student, upper, bins)
        edges, percent = histogram.edges.tolist(), (100.0 * histogram.fractions).tolist()
        ax.bar(edges[:-1], percent, width=upper / bins, align="edge", color=_colour(place), linewidth=0)
        ax.axvline(histogram.mean, color="black", linestyle="--", linewidth=1)
        title = f"{_wrapped(run.name)}\nmean {histogram.mean:.3g} nats (dashed)"
        ax.set(title=title, ylabel="samples (%)", xlim=(0.0, upper))
        ax.set_xlabel(f"$H(q)$ (nats; at most log {logits.student.size(1)} = {math.log(logits.student.size(1)):.2f})")
    return figure


_RELIABILITY = ("perfectly calibrated", "means of a bin; hollow: under 1 % of the samples")


@styled
def reliability_diagrams(runs: Sequence[Run], bins: int = 15) -> Figure:
    """Accuracy against confidence in bins, a panel per run; bars off the diagonal are miscalibrated.

    Bins with less than 1 % of the samples are hollow.
    """
    found = _with_logits(runs, labels=True)
    figure, axes = _figure(len(found), share="both", height=4.1, legend=_RELIABILITY)
    handles: list[Any] = []
    for ax, (place, (run, logits)) in zip(axes, found.items(), strict=True):
        result = reliability(per_sample_statistics(logits.student.double(), logits.labels), bins)
        few = result.counts < _FEW * result.counts.sum()
        colour = _colour(place)
        bars = ax.bar(100 * result.edges[:-1], 100 * result.accuracy, width=100 / bins, align="edge", linewidth=1)
        for bar, hollow in zip(bars, few, strict=True):
            bar.set(facecolor="none" if hollow else colour, edgecolor=colour if hollow else "white")
        (diagonal,) = ax.plot([0, 100], [0, 100], color="black", linestyle="--", linewidth=1)
        (dots,) = ax.plot(100 * result.confidence, 100 * result.accuracy, "ko", markersize=3, clip_on=False)
        title = f"{_wrapped(run.name)}\ncalibration error (ECE) {100 * result.error:.1f} %"
        ax.set(title=title, xlabel="confidence (%)", ylabel="accuracy (%)", xlim=(0, 100), ylim=(0, 103))
        handles = [diagonal, dots]
    _legend(figure, handles, _RELIABILITY)
    return figure


@styled
def class_gains(runs: Sequence[Run], baseline: Run) -> Figure:
    """What each run is right on more often than a baseline, class by class, in points, with one standard error.

    With more than 24 classes the 12 with the smallest and the 12 with the largest gains are shown.

    Raises:
        ValueError: also if a run's samples or classes are not the baseline's.
    """
    reference = _with_logits([baseline], labels=True)[0][1]
    found = {
        place: (run, logits) for place, (run, logits) in _with_logits(runs, labels=True).items() if run is not baseline
    }
    if not found:
        raise ValueError(f"No run but the baseline {baseline.name} has saved logits with labels.")
    for run, _ in found.values():
        check_comparable(run, baseline)
    gains = {
        place: quantities.class_gains(logits.student, reference.student, logits.labels)
        for place, (_, logits) in found.items()
    }
    rows = min(_MOST_CLASSES, max(gain.gains.numel() for gain in gains.values()))
    figure, axes = _figure(len(found), share="x", height=max(_HEIGHT, 0.9 + 0.2 * rows))
    figure.suptitle(_wrapped(f"Gains over {baseline.name}", 42 * min(len(found), 2)), fontsize=11)
    for ax, (place, (run, logits)) in zip(axes, found.items(), strict=True):
        gain = gains[place]
        classes = _shown_classes(gain.gains)
        values, errors = 100 * gain.gains[classes], 100 * gain.errors[classes]
        names = logits.class_names or reference.class_names or tuple(map(str, range(logits.student.size(1))))
        ax.barh(range(len(classes)), values.tolist(), xerr=errors.tolist(), color=_colour(place),
                error_kw={"elinewidth": 0.8, "ecolor": "#555555"})  # fmt: skip
        ax.set_yticks(range(len(classes)), [_text(_shortened(names[n], 24)) for n in classes])
        ax.invert_yaxis()
        ax.axvline(0.0, color="black", linewidth=0.8)
        ax.axvline(100 * gain.mean, color="black", linestyle="--", linewidth=1)
        ax.grid(axis="y", visible=False)
        if len(classes) < gain.gains.numel():
            ax.axhline(len(classes) / 2 - 0.5, color=_GREY, linestyle=":", linewidth=1)
        title = f"{_wrapped(run.name)}\nall samples: {100 * gain.mean:+.2f} points (dashed)"
        ax.set(title=title, xlabel="gain in accuracy (points)")
    return figure


def check_comparable(run: Run, baseline: Run) -> None:
    """ValueError unless the logits of both are of the same samples and classes."""
    logits, reference = run.logits, baseline.logits
    if logits is None or reference is None:
        raise ValueError(f"Only one of {run.name} and {baseline.name} has saved logits: gains need both.")
    if logits.student.size(1) != reference.student.size(1):
        raise ValueError(
            f"{run.name} has {logits.student.size(1)} classes and {baseline.name} has {reference.student.size(1)}: "
            "gains need the same classes."
        )
    if not torch.equal(logits.labels, reference.labels):
        raise ValueError(
            f"The labels of {run.name} ({len(logits.labels)} samples) are not those of {baseline.name} "
            f"({len(reference.labels)} samples): gains need the same samples in the same order."
        )


def _shown_classes(gains: torch.Tensor) -> list[int]:
    """All classes that have samples, in order, or those of the smallest and largest gains, by gain."""
    known = [number for number, gain in enumerate(gains.tolist()) if not math.isnan(gain)]
    if len(known) <= _MOST_CLASSES:
        return known
    ordered = sorted(known, key=lambda number: -gains[number].item())
    return ordered[: _MOST_CLASSES // 2] + ordered[-_MOST_CLASSES // 2 :]


_CASES = {
    "same_right": ("same class, right", "#0072B2"),
    "same_wrong": ("same class, wrong", "#56B4E9"),
    "student_right": ("only the student right", "#009E73"),
    "teacher_right": ("only the teacher right", "#E69F00"),
    "both_wrong": ("both wrong, differently", "#999999"),
}


@styled
def agreement(runs: Sequence[Run]) -> Figure:
    """How often student and teacher say the same class, and who is right where they do not: a bar per run."""
    found = _with_logits(runs, labels=True, teacher=True)
    figure, (ax,) = _figure(1, width=8.0, height=1.3 + 0.45 * len(found), legend=[name for name, _ in _CASES.values()])
    left = [0.0] * len(found)
    shares = [quantities.agreement(logits.student, _teacher(logits), logits.labels) for _, logits in found.values()]
    handles = []
    for key, (_, colour) in _CASES.items():
        values = [100 * share[key] for share in shares]
        bars = ax.barh(range(len(found)), values, left=left, color=colour, edgecolor="white", linewidth=0.5)
        for bar, value in zip(bars, values, strict=True):
            if value >= 4.0:
                white = colour in ("#0072B2", "#009E73")
                ax.text(bar.get_x() + value / 2, bar.get_y() + bar.get_height() / 2, f"{value:.1f}",
                        ha="center", va="center", fontsize=8, color="white" if white else "black")  # fmt: skip
        left = [start + value for start, value in zip(left, values, strict=True)]
        handles.append(bars)
    ax.set_yticks(range(len(found)), [_wrapped(run.name, 32) for run, _ in found.values()])
    ax.grid(axis="y", visible=False)
    ax.set(xlabel="samples (%)", xlim=(0, 100), ylim=(len(found) - 0.5, -0.5))
    _legend(figure, handles, [name for name, _ in _CASES.values()])
    return figure


def _with_logits(
    runs: Sequence[Run], *, labels: bool = False, teacher: bool = False
) -> dict[int, tuple[Run, SavedLogits]]:
    """The runs with saved logits (with labels, with a teacher's), by their place."""
    found = {
        place: (run, run.logits)
        for place, run in enumerate(runs)
        if run.logits is not None
        and (run.logits.has_labels or not labels)
        and (run.logits.teacher is not None or not teacher)
    }
    if not found:
        wanted = "logits" + " of the teacher" * teacher + " with labels" * labels
        raise ValueError(f"No run has saved {wanted}.")
    return found


def _teacher(logits: SavedLogits) -> torch.Tensor:
    assert logits.teacher is not None
    return logits.teacher


# ---- Matplotlib ----------------------------------------------------------------------------------------------------


def _figure(
    panels: int,
    *,
    width: float = _WIDTH,
    height: float = _HEIGHT,
    share: str = "",
    legend: Sequence[str] = (),
) -> tuple[Figure, list[Axes]]:
    """A figure of panels, at most two a row, with room below for a legend of these names."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    columns = min(panels, 2)
    rows = math.ceil(panels / columns)
    size = (width * columns, height * rows)
    lines = 0
    if legend:
        across, names = _legend_shape(legend, size[0])
        lines = math.ceil(sum(name.count("\n") + 1 for name in names) / across)
    figure = Figure(figsize=(size[0], size[1] + _LINE * lines), layout=ConstrainedLayoutEngine(w_pad=0.1, h_pad=0.08))
    FigureCanvasAgg(figure)
    grid = figure.subplots(rows, columns, squeeze=False, sharex=share in ("x", "both"), sharey=share in ("y", "both"))
    axes = list(grid.flat)
    for unused in axes[panels:]:
        unused.remove()
    for ax in axes[:panels]:
        # Shared axes hide the numbers of all but the outer panels, and the one below may not be there.
        ax.tick_params(labelbottom=True, labelleft=True)
    return figure, axes[:panels]


def _legend_shape(names: Sequence[str], width: float) -> tuple[int, list[str]]:
    """Columns of a legend that fits the width, in inches, and its names, broken into lines where they must be."""
    names = [_wrapped(name, max(10, int((width - 0.6) / _LETTER))) for name in names]
    widest = max(len(line) for name in names for line in name.splitlines())
    return max(1, min(len(names), 4, int(width / (_LETTER * widest + 0.6)))), names


def _legend(figure: Figure, handles: Sequence[Any], names: Sequence[str]) -> None:
    columns, labels = _legend_shape(names, figure.get_figwidth())
    figure.legend(handles, labels, loc="outside lower center", ncols=columns, frameon=False, fontsize=9)


def _colour(place: int) -> str:
    return COLOURS[place % len(COLOURS)]


def _shortened(name: str, most: int = 80) -> str:
    return name if len(name) <= most else f"{name[: most // 2 - 1]}…{name[-most // 2 :]}"


def _wrapped(name: str, width: int = 44) -> str:
    return _text("\n".join(textwrap.wrap(_shortened(name), width)))


def _text(name: str) -> str:
    """A name as it is: a $ begins no formula, and a leading _ does not hide it from a legend."""
    name = name.replace("$", r"\$")
    return f" {name}" if name.startswith("_") else name


@styled
def save(figure: Figure, path: Path) -> None:
    """Write a figure whole or not at all, in the format of the path's ending; the same figure is the same file."""
    metadata = {"png": {"Software": None}, "pdf": {"CreationDate": None}, "svg": {"Date": None}}
    kind = path.suffix[1:]
    with atomic_write(path) as draft:
        figure.savefig(draft, format=kind, metadata=metadata.get(kind))
