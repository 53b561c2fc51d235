"""The logit terms of the trainer's objective in one piece, where a kernel knows them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from .config import DistillationConfig
from .kernels import Kernel, Totals, choose_kernel, matching_objective
from .losses.logit import LogitLoss, Outputs


@dataclass
class FusedTerms:
    """Cross-entropy and a matching loss, by one kernel.

    Attributes:
        kernel: what computes them.
        loss: the loss, with its gamma.
        weighted: whether it is weighted by the power sum.
        ce_weight: weight of cross-entropy; 0 needs no labels.
    """

    kernel: Kernel
    loss: LogitLoss
    weighted: bool
    ce_weight: float

    @classmethod
    def of(cls, args: DistillationConfig, loss: LogitLoss | None) -> FusedTerms | None:
        """For a configuration and its loss; None if they are to be composed."""
        # A subclass computes something else, whatever its parent says of itself.
        weighted = vars(type(loss)).get("weighted_matching")
        composed = args.fused_loss == "off" or args.label_smoothing_factor
        if not isinstance(loss, LogitLoss) or weighted is None or not args.uses_logits or composed:
            return None
        kernel = choose_kernel(args.fused_loss, args.device)
        return cls(kernel, loss, weighted, args.ce_weight)

    def fit(self, student: Outputs, labels: Tensor | None, labels_are_masked: bool) -> bool:
        """Whether a batch is one that kernels know: a class for each sample, and a gradient wanted.

        Args:
            labels_are_masked: whether ``student.mask`` goes for the labels too.
        """
        if not (student.logits.requires_grad and torch.is_grad_enabled()):
            return False
        if student.mask is not None and self.ce_weight and not labels_are_masked:
            return False
        hard = labels is not None and not labels.is_floating_point() and labels.shape == student.logits.shape[:-1]
        return hard or (not self.ce_weight and student.logits.dim() == 2)

    def __call__(
        self, student: Outputs, teacher: Outputs, labels: Tensor | None, counts: Tensor | None, beta: float, scale: int
    ) -> tuple[Tensor, Totals]:
        """The terms' share of a step, (), and their sums over the batch.

        Args:
            counts: (2,), samples and labels of the whole step; None if this batch is all of it.
            beta: weight of the loss.
            scale: what both terms are multiplied by.
        """
        objective, totals = matching_objective(
            student.logits,
            teacher.logits,
            labels if self.ce_weight else None,
            gamma=cast(float, self.loss.gamma),
            ce_weight=self.ce_weight * scale,
            beta=beta * scale,
            weighted=self.weighted,
            mask=student.mask,
            counts=counts,
            kernel=self.kernel,
        )
        return objective, Totals(*totals.unbind())
