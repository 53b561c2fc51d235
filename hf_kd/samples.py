"""What counts as a sample: one row of a batch, or every unpadded position where labels are sequences."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers.trainer_pt_utils import find_batch_size

from .data.padding import SAMPLE_MASK
from .labels import IGNORE_INDEX, is_soft


def sample_mask(inputs: Mapping[str, Any], shape: torch.Size) -> Tensor | None:
    """Which of the positions of ``shape``, (B,) or (B, L), are samples: not padding; None if all are."""
    mask: Tensor | None = inputs.get("attention_mask")
    mask = mask.bool() if mask is not None and mask.shape == shape else None
    real: Tensor | None = inputs.get(SAMPLE_MASK)
    if real is None:
        return mask
    real = real.view(-1, *(1,) * (len(shape) - 1)).expand(shape)
    return real if mask is None else mask & real


def count_samples(inputs: Mapping[str, Any], label_name: str, classes: int | None) -> int | Tensor:
    """How many samples a batch has: a number, or a scalar tensor where that depends on values on a device."""
    labels = inputs.get(label_name)
    rows = labels is None or is_soft(labels, classes)
    shape: torch.Size = torch.Size([find_batch_size(inputs) or 0]) if rows else inputs[label_name].shape
    mask = sample_mask(inputs, shape)
    return shape.numel() if mask is None else mask.sum()


def count_labels(inputs: Mapping[str, Any], label_name: str, classes: int | None) -> int | Tensor:
    """How many samples of a batch have a label, likewise."""
    labels = inputs.get(label_name)
    if labels is None:
        return 0
    if is_soft(labels, classes):
        return count_samples(inputs, label_name, classes)
    return without_repeats(labels, inputs.get(SAMPLE_MASK)).ne(IGNORE_INDEX).sum()


def sum_and_count(values: Tensor, mask: Tensor | None) -> tuple[Tensor, int | Tensor]:
    """The sum of one value per sample, and of how many; where ``mask`` is False there is none."""
    if mask is None:
        return values.sum(), values.numel()
    return torch.where(mask, values, 0.0).sum(), mask.sum()


def without_repeats(labels: Tensor, real: Tensor | None) -> Tensor:
    """Class indices (B, ...) with "no label" for the samples that only fill the batch up."""
    if real is None:
        return labels
    return labels.masked_fill(~real.to(labels.device).view(-1, *(1,) * (labels.dim() - 1)), IGNORE_INDEX)
