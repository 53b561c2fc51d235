"""What the figures show of logits: numbers of a run, of its classes, of student and teacher.

The formulas are those of hf_kd.losses and hf_kd.metrics.

Logits have shape (N, K), floating point, one row per sample; entropies and divergences are in nats.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..labels import IGNORE_INDEX
from ..losses.functional import check_logits, power_sum, shannon_entropy, tempered, ttm_loss
from ..losses.functional import entropy as entropy_of
from ..metrics import Column, per_sample_statistics, summarise


if TYPE_CHECKING:
    from .logits import SavedLogits


# ---- A run ---------------------------------------------------------------------------------------------------------


def summary(logits: SavedLogits) -> dict[str, float]:
    """Means over the samples of a run.

    Returns:
        What :func:`hf_kd.metrics.summarise` gives (top1, top5, nll, ece, entropy = mean H(q), teacher_agreement,
        teacher_divergence = mean D(p‖q)), and with a teacher and its gamma divergence (mean D(p_T‖q), unweighted),
        power_sum (mean U_gamma(p)) and teacher_entropy (mean H(p_T)). gamma = 1 stands for a gamma that is not saved.
    """
    student, teacher = logits.student.double(), None if logits.teacher is None else logits.teacher.double()
    values = summarise(per_sample_statistics(student, logits.labels, teacher))
    if teacher is not None:
        gamma = 1.0 if logits.gamma is None else logits.gamma
        values["divergence"] = ttm_loss(student, teacher, gamma=gamma).item()
        values["power_sum"] = power_sum(teacher, gamma).mean().item()
        values["teacher_entropy"] = entropy_of(tempered(teacher, gamma)).mean().item()
    return values


@dataclass(frozen=True)
class Histogram:
    """Samples in bins of equal width.

    Attributes:
        edges: (B + 1,) fp64. Bin b holds [edges[b], edges[b + 1]), the last one its upper edge too.
        fractions: (B,) fp64, of all samples; they add up to 1.
        mean: of the values themselves.
    """

    edges: Tensor
    fractions: Tensor
    mean: float


def entropy_histogram(logits: Tensor, upper: float, bins: int = 40) -> Histogram:
    """Histogram of H(q) over [0, upper] nats (the paper's Fig. 3).

    Values above ``upper`` count in the last bin (none is above log K). Raises ValueError for an upper limit
    that is not positive, fewer than 1 bin, or no samples.
    """
    if not upper > 0.0 or bins < 1 or len(logits) == 0:
        raise ValueError(
            f"A histogram needs samples, an upper limit above 0, at least 1 bin, got {len(logits)}, {upper}, {bins}."
        )
    values = shannon_entropy(logits.double())
    edges = torch.linspace(0.0, upper, bins + 1, dtype=torch.float64)
    # Rounding can leave an entropy of 0, or of log K, just outside.
    index = (torch.bucketize(values, edges, right=True) - 1).clamp(0, bins - 1)
    return Histogram(edges, torch.bincount(index, minlength=bins).double() / len(values), values.mean().item())


# ---- Classes -------------------------------------------------------------------------------------------------------


def class_accuracy(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Accuracy of each class and its number of labelled samples, both (K,) fp64; NaN for a class without samples."""
    right, labels = _right(logits, labels)
    counts = torch.bincount(labels, minlength=logits.size(-1)).double()
    return torch.bincount(labels, weights=right, minlength=logits.size(-1)) / counts, counts


@dataclass(frozen=True)
class ClassGains:
    """What one network is right on, class by class, beyond another.

    Attributes:
        gains: (K,) fp64, difference of the accuracies in [-1, 1]; NaN for a class without samples.
        errors: (K,) fp64, standard error of each gain over the class's samples, from the samples on which the two
            differ: it says how much of a gain the choice of samples could be.
        counts: (K,) fp64, labelled samples.
        mean: difference of the accuracies over all labelled samples.
    """

    gains: Tensor
    errors: Tensor
    counts: Tensor
    mean: float


def class_gains(logits: Tensor, baseline: Tensor, labels: Tensor) -> ClassGains:
    """Accuracy of each class less a baseline's, on the same samples.

    Args:
        logits, baseline: (N, K).
        labels: (N,) integers; samples labelled -100 are left out.

    Raises:
        ValueError: on unequal shapes, labels out of range, or no label at all.
    """
    check_logits(logits, baseline)
    right, known = _right(logits, labels)
    difference = right - _right(baseline, labels)[0]
    classes = logits.size(-1)
    counts = torch.bincount(known, minlength=classes).double()
    gains = torch.bincount(known, weights=difference, minlength=classes) / counts
    squares = torch.bincount(known, weights=difference.square(), minlength=classes) / counts
    errors = ((squares - gains.square()).clamp_min(0.0) / counts).sqrt()
    return ClassGains(gains, errors, counts, difference.mean().item())


def _right(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """1 or 0 for each labelled sample, fp64, and their labels."""
    rows = per_sample_statistics(logits, labels)
    labelled = labels != IGNORE_INDEX
    if not labelled.any():
        raise ValueError(f"None of the {len(labels)} samples has a label: a class's accuracy needs some.")
    return (rows[labelled, Column.RANK] == 0).double(), labels[labelled].long()


# ---- Student and teacher -------------------------------------------------------------------------------------------


AGREEMENT = ("same_right", "same_wrong", "student_right", "teacher_right", "both_wrong")
"""The cases of :func:`agreement`, in order."""


def agreement(student: Tensor, teacher: Tensor, labels: Tensor) -> dict[str, float]:
    """How student and teacher agree on the labelled samples: the fractions of five cases, which add up to 1.

    Args:
        student, teacher: logits (N, K).
        labels: (N,) integers; samples labelled -100 are left out.

    Returns:
        same_right and same_wrong: both say the same class; student_right and teacher_right: that one alone is right;
        both_wrong: two different wrong classes.

    Raises:
        ValueError: on unequal shapes, labels out of range, or no label at all.
    """
    check_logits(student, teacher)
    student_right, teacher_right = (_right(logits, labels)[0].bool() for logits in (student, teacher))
    labelled = labels != IGNORE_INDEX
    same = student[labelled].argmax(dim=-1) == teacher[labelled].argmax(dim=-1)
    cases = (
        same & student_right,
        same & ~student_right,
        student_right & ~teacher_right,
        teacher_right & ~student_right,
        ~same & ~student_right & ~teacher_right,
    )
    return {name: case.double().mean().item() for name, case in zip(AGREEMENT, cases, strict=True)}
