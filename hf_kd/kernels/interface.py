"""What every kernel takes and gives."""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from ..losses.functional import IGNORE_INDEX


class Totals(NamedTuple):
    """Sums over the samples of a batch, scalars without a graph."""

    ce: Tensor
    """Cross-entropy in nats, over the samples that have a label."""
    labelled: Tensor
    """How many have one."""
    distill: Tensor
    """The divergence in nats, times the power sum where it is weighted."""
    power_sum: Tensor
    """The teacher's power sum U."""
    entropy: Tensor
    """The student's Shannon entropy in nats."""


class LogitBatch(NamedTuple):
    """What a kernel computes on; the arguments are checked before it."""

    student: Tensor
    """Logits (B, K), floating point."""
    teacher: Tensor
    """Likewise."""
    labels: Tensor
    """(B,) int64, ``IGNORE_INDEX`` where there is none."""
    mask: Tensor | None
    """(B,) bool, False for what is no sample (it has no label either); None if all are."""
    counts: Tensor | None
    """(2,): how many samples and labels the whole step has, which the terms are divided by; None if they are this
    batch's."""

    def split(self, chunks: int) -> list[LogitBatch]:
        """Its rows in so many parts, whose sizes differ by one at most; the counts go for all of them."""
        student, teacher, labels = (tensor.tensor_split(chunks) for tensor in self[:3])
        mask = [None] * chunks if self.mask is None else self.mask.tensor_split(chunks)
        return [LogitBatch(*part, self.counts) for part in zip(student, teacher, labels, mask, strict=True)]


class Weights(NamedTuple):
    """Of which terms an objective consists."""

    gamma: float
    """In (0, 1]."""
    ce_weight: float
    beta: float
    weighted: bool
    """Whether by the power sum, as in WTTM; if not, it is TTM's."""


class Kernel(Protocol):
    """A function that computes objective, statistics and gradient at once.

    With q the student's probabilities, p_T the transformed teacher's, y the label and u the sample's weight (U or 1),
    the objective is the sum over samples of ``-a log q_y + b u D(p_T || q)``, and its gradient with respect to the
    student's logits is ``a (q - onehot(y)) + b u (q - p_T)``, where a and b are the terms' weights divided by their
    counts.
    """

    def __call__(self, batch: LogitBatch, weights: Weights) -> tuple[Tensor, Tensor, Tensor]:
        """Compute it.

        Returns:
            ``(objective, totals, gradient)`` of shapes (), (5,) in the order of :class:`Totals`, and (B, K), in
            :func:`working_dtype`.
        """


def working_dtype(student: Tensor, teacher: Tensor) -> torch.dtype:
    """What a kernel computes in: fp64 if either of the logits is, else fp32."""
    # The gradient stays in it until the backward pass: fp16 would lose it before the scaler's factor has come.
    return torch.promote_types(torch.promote_types(student.dtype, teacher.dtype), torch.float32)


def own_counts(labels: Tensor, mask: Tensor | None) -> Tensor:
    """How many samples and labels a batch has, (2,)."""
    labelled = (labels != IGNORE_INDEX).sum()
    samples = torch.full_like(labelled, len(labels)) if mask is None else mask.sum()
    return torch.stack([samples, labelled])
