"""The kernels as a differentiable function of the student's logits."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..losses.functional import IGNORE_INDEX, check_gamma, check_logits
from .eager import eager_kernel
from .interface import Kernel, LogitBatch, Weights


class _Objective(torch.autograd.Function):
    """Keeps one tensor for the backward pass: the gradient, made with the value."""

    @staticmethod
    def forward(
        ctx: Any, student: Tensor, teacher: Tensor, batch: LogitBatch, weights: Weights, kernel: Kernel
    ) -> tuple[Tensor, Tensor]:
        objective, totals, gradient = kernel(batch._replace(student=student.detach()), weights)
        ctx.save_for_backward(gradient)
        ctx.dtype = student.dtype
        ctx.mark_non_differentiable(totals)
        ctx.set_materialize_grads(False)
        return objective, totals

    @staticmethod
    def backward(ctx: Any, upstream: Tensor | None, _: None) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        # Grad mode is on here only if this pass is to be differentiated itself. torch's once_differentiable would let
        # zeros through where the gradient does not depend on anything that requires one.
        if torch.is_grad_enabled():
            raise RuntimeError(
                "The fused loss has no second derivative, and create_graph=True asks for one: take the composed loss "
                '(fused_loss="off", or hf_kd.losses.wttm_loss).'
            )
        nothing = (None,) * 4
        if upstream is None:
            return None, *nothing
        (gradient,) = ctx.saved_tensors
        # It is 1 in a training step. On an accelerator looking would stall it, and multiplying costs little.
        if upstream.device.type != "cpu" or upstream.item() != 1.0:
            gradient = gradient * upstream
        # A gradient of a half-precision student's has waited in fp32, for the factor of a gradient scaler.
        return gradient.to(ctx.dtype), *nothing

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        raise RuntimeError(
            "The fused loss has no forward-mode derivative: take the composed loss "
            '(fused_loss="off", or hf_kd.losses.wttm_loss).'
        )


def matching_objective(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor | None = None,
    *,
    gamma: float,
    ce_weight: float = 1.0,
    beta: float = 1.0,
    weighted: bool = True,
    mask: Tensor | None = None,
    counts: Tensor | None = None,
    kernel: Kernel = eager_kernel,
) -> tuple[Tensor, Tensor]:
    """``ce_weight · CE + beta · U D(p_T || q)``, each a mean over a step, with a gradient that is made at once.

    It equals :func:`hf_kd.losses.wttm_loss` (or ttm_loss) and cross-entropy put together, and takes less time and
    memory: for the backward pass nothing of size (..., K) is kept but the gradient. First derivatives only; second and
    forward-mode ones raise.

    Args:
        student_logits: (..., K), floating point.
        teacher_logits: same shape; it gets no gradient.
        labels: class indices (...), integers, where ``IGNORE_INDEX`` (-100) marks samples without one; None if all
            are without.
        gamma: exponent of the power transform, in (0, 1].
        ce_weight, beta: weights of the two terms.
        weighted: whether the divergence is weighted by the power sum, as in WTTM; if not, it is TTM's.
        mask: (...) bool, False for what is no sample (padding); None if all are.
        counts: (2,): how many samples and labels the terms are divided by, if not this batch's own: those of a whole
            optimiser step, over accumulated batches and processes.
        kernel: what computes it.

    Returns:
        The objective, (), and sums over the samples, (5,) without a graph: :class:`Totals` names them.

    Raises:
        ValueError: on shapes that do not go together, or gamma outside (0, 1].
        TypeError: if the logits are not floating point, or the labels not integers.
        RuntimeError: for a label out of range, on the CPU.
    """
    check_gamma(gamma)
    student_logits, teacher_logits = check_logits(student_logits, teacher_logits)
    samples = student_logits.shape[:-1]
    if labels is None:
        labels = torch.full(samples, IGNORE_INDEX, device=student_logits.device)
    elif labels.is_floating_point() or labels.dtype == torch.bool:
        raise TypeError(f"`labels` must be class indices, integers, got {labels.dtype}.")
    if labels.shape != samples:
        raise ValueError(
            f"Labels of shape {tuple(labels.shape)} do not go with logits of shape {tuple(student_logits.shape)}: "
            "give one class per sample."
        )
    if mask is not None and mask.shape != samples:
        raise ValueError(
            f"`mask` of shape {tuple(mask.shape)} does not go with logits of shape {tuple(student_logits.shape)}: "
            "give one value per sample."
        )
    if student_logits.dim() != 2:
        rows = (-1, student_logits.size(-1))
        student_logits, teacher_logits = student_logits.reshape(rows), teacher_logits.reshape(rows)
        labels = labels.flatten()
        mask = None if mask is None else mask.flatten()
    labels = labels.long()
    if mask is not None:
        labels = labels.masked_fill(~mask, IGNORE_INDEX)
    batch = LogitBatch(student_logits, teacher_logits, labels, mask, counts)
    # Both logits by themselves as well: torch looks into no tuple for what is differentiated.
    objective, totals = _Objective.apply(
        student_logits, teacher_logits, batch, Weights(gamma, ce_weight, beta, weighted), kernel
    )
    return objective, totals
