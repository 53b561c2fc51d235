"""What is measured on a teacher before the first step: whether it fits the data, and how soft it is."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.logging import get_logger
from torch import Tensor

from .labels import IGNORE_INDEX
from .losses import functional
from .samples import sample_mask


logger = get_logger(__name__)

TeacherLogits = Callable[[Mapping[str, Any]], Tensor]

# Fewer samples than this say nothing about a teacher.
_ENOUGH = 16


def teacher_top1(
    batches: Iterable[Mapping[str, Any]],
    teacher_logits: TeacherLogits,
    label_name: str,
    accelerator: Accelerator,
    name: str,
) -> tuple[float, int] | None:
    """Top-1 of a teacher over labelled batches, and on how many samples; None without class labels.

    A teacher that does no better than guessing is a mistake in the set-up: that is said as soon as it shows.
    """
    correct, seen, warned = 0, 0, False
    for inputs in batches:
        labels = inputs.get(label_name)
        if labels is None or labels.is_floating_point():
            logger.info("No class labels in the evaluation data: the teacher's top-1 is not measured.")
            return None
        logits = teacher_logits(inputs)
        hits, labels = accelerator.gather_for_metrics((logits.argmax(dim=-1) == labels, labels))
        known = labels != IGNORE_INDEX
        correct, seen = correct + int(hits[known].sum()), seen + int(known.sum())
        if not warned and seen >= _ENOUGH:
            warned = _warn_if_chance(correct, seen, logits.shape[-1])
    if not seen:
        return None
    _say(correct / seen, seen, name)
    return correct / seen, seen


def report_top1(top1: float, seen: int, name: str, classes: int | None) -> None:
    """Say what an earlier run measured, as :func:`teacher_top1` does when it measures."""
    if seen >= _ENOUGH and classes is not None:
        _warn_if_chance(round(top1 * seen), seen, classes)
    _say(top1, seen, name)


def _say(top1: float, seen: int, name: str) -> None:
    logger.warning("Teacher %s: top-1 %.2f %% on %d labelled evaluation samples.", name, 100 * top1, seen)


def _warn_if_chance(correct: int, seen: int, classes: int) -> bool:
    chance = 1.0 / classes
    # Two standard deviations of guessing: what a teacher that knows nothing would still reach now and then.
    if correct / seen > chance + 2.0 * math.sqrt(chance * (1.0 - chance) / seen):
        return False
    logger.warning(
        "THE TEACHER LOOKS WRONG FOR THIS DATA: its top-1 is %.1f %% on %d samples, and guessing gives %.1f %%. Check "
        "the order of the classes (teacher_class_map), the normalisation and the image size before training on it.",
        100 * correct / seen,
        seen,
        100 * chance,
    )
    return True


def mean_power_sum(
    batches: Iterable[Mapping[str, Any]],
    teacher_logits: TeacherLogits,
    gamma: float,
    samples: int,
    accelerator: Accelerator,
) -> tuple[float, int]:
    """Mean U_gamma of the teacher over the first batches that hold at least ``samples``, and how many they were.

    Sums over processes, so that several find what one would. Raises ValueError if there is no batch.
    """
    total, seen = 0.0, 0
    for inputs in batches:
        power_sums = functional.power_sum(teacher_logits(inputs), gamma)
        mask = sample_mask(inputs, power_sums.shape)
        power_sums = power_sums if mask is None else power_sums[mask]
        pair = torch.stack([power_sums.sum(), power_sums.new_tensor(power_sums.numel())])
        batch_total, batch_samples = accelerator.reduce(pair, reduction="sum").tolist()
        total, seen = total + batch_total, seen + int(batch_samples)
        if seen >= samples:
            break
    if not seen:
        raise ValueError(
            'beta="auto" needs training data to measure the teacher on, and the data set gave no batch: give data, or '
            "`beta` as a number."
        )
    return total / seen, seen
