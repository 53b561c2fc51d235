"""Labels as a loss wants them: class indices (int64) or probabilities (float), checked where looking costs nothing."""

from __future__ import annotations

import torch
from torch import Tensor

from .losses.functional import IGNORE_INDEX


def is_soft(labels: Tensor, classes: int | None) -> bool:
    """Whether labels are probabilities, (..., K), rather than class indices."""
    return labels.is_floating_point() and labels.dim() >= 2 and (classes is None or labels.shape[-1] == classes)


def normalise_labels(labels: Tensor, classes: int | None) -> Tensor:
    """Class indices as int64, probabilities as they are.

    Args:
        labels: class indices (...) of any dtype, whole floats included, or probabilities (..., K).
        classes: K, or None if unknown.

    Raises:
        ValueError: for floats that are neither whole nor probabilities over K, and, on the CPU, for an index out of
            range. (On an accelerator looking at the values would stall every step.)
    """
    if is_soft(labels, classes):
        return labels
    if labels.is_floating_point() and not bool((labels == labels.round()).all()):
        raise ValueError(
            f"Labels are floats of shape {tuple(labels.shape)} and not whole numbers: give class indices (B,), or "
            f"probabilities (B, {classes or 'classes'})."
        )
    labels = labels.long()
    if classes is not None and labels.device.type == "cpu" and labels.numel():
        lowest, highest = torch.aminmax(labels)
        if lowest >= 0 and highest < classes:
            return labels
        wrong = labels[((labels < 0) & (labels != IGNORE_INDEX)) | (labels >= classes)]
        if len(wrong):
            raise ValueError(
                f"The batch has the label {wrong[0].item()}, and the student has {classes} classes: labels must be 0 "
                f"to {classes - 1}, or {IGNORE_INDEX} for a sample without a label."
            )
    return labels
