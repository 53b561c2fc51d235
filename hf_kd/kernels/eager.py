"""The fused objective in torch's own operations, some rows at a time: for any device, and no compiler."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from ..losses.functional import IGNORE_INDEX
from .interface import LogitBatch, Weights, own_counts, working_dtype


# Logits at a time on the CPU, for each thread: what is made on the way stays in its cache.
_CHUNK = 2**18


def eager_kernel(batch: LogitBatch, weights: Weights) -> tuple[Tensor, Tensor, Tensor]:
    """A :class:`hf_kd.kernels.Kernel`."""
    student, teacher, labels, mask, counts = batch
    dtype = working_dtype(student, teacher)
    counts = own_counts(labels, mask) if counts is None else counts
    a: float | Tensor
    b: float | Tensor
    if student.device.type == "cpu":
        # As numbers they cost less, and reading them waits for nothing.
        samples, labelled = counts.tolist()
        a, b = weights.ce_weight / max(labelled, 1), weights.beta / max(samples, 1)
        rows = max(1, _CHUNK * torch.get_num_threads() // student.shape[1])
    else:
        samples, labelled = counts.to(dtype).clamp_min(1.0).unbind()
        a, b = weights.ce_weight / labelled, weights.beta / samples
        rows = len(student)
    gradient = torch.empty(student.shape, dtype=dtype, device=student.device)
    chunks = -(-len(student) // rows)
    if chunks <= 1:
        totals = _rows(batch, gradient, weights, a, b)
    else:
        parts = zip(batch.split(chunks), gradient.tensor_split(chunks), strict=True)
        totals = torch.stack([_rows(part, piece, weights, a, b) for part, piece in parts]).sum(dim=0)
    return totals[0] * a + totals[2] * b, totals, gradient


def _rows(batch: LogitBatch, gradient: Tensor, weights: Weights, a: float | Tensor, b: float | Tensor) -> Tensor:
    """Write the gradient of some rows to its place and give their totals, (5,). Buffers are used more than once."""
    student, teacher, labels, mask, _ = batch
    dtype = gradient.dtype
    log_q = F.log_softmax(student, dim=-1, dtype=dtype)
    scaled = F.log_softmax(teacher, dim=-1, dtype=dtype).mul_(weights.gamma)
    log_p = F.log_softmax(scaled, dim=-1)
    # Both are gamma times the teacher's logits but for a constant, which is the logarithm of the power sum.
    power = scaled.amax(dim=-1, keepdim=True).sub_(log_p.amax(dim=-1, keepdim=True)).exp_()
    p = torch.exp(log_p, out=scaled)
    difference = torch.sub(log_p, log_q, out=log_p).mul_(p)
    divergence = difference.sum(dim=-1, keepdim=True)
    # 0 · inf at classes of probability 0 is not a number and should be 0: seldom, and looked for where that is cheap.
    impossible = student.device.type != "cpu" or not math.isfinite(divergence.sum().item())
    if impossible:
        divergence = difference.masked_fill_(p == 0, 0.0).sum(dim=-1, keepdim=True)
    weight = power if weights.weighted else torch.ones_like(power)
    ce = F.nll_loss(log_q, labels, ignore_index=IGNORE_INDEX, reduction="sum")
    q = torch.exp(log_q, out=difference)
    if impossible:
        log_q.clamp_min_(torch.finfo(dtype).min)
    entropy = log_q.mul_(q).sum(dim=-1, keepdim=True).neg_()
    labelled = (labels != IGNORE_INDEX)[:, None].to(dtype)
    columns = torch.cat([labelled, divergence.mul_(weight), power, entropy], dim=1)
    pull = labelled * a
    push = weight * b
    if mask is not None:
        columns.masked_fill_(~mask[:, None], 0.0)
        push.masked_fill_(~mask[:, None], 0.0)
    torch.addcmul(q.mul_(pull + push), p, push, value=-1.0, out=gradient)
    gradient.scatter_add_(1, labels.clamp_min(0)[:, None], pull.neg_())
    return torch.cat([ce[None], columns.sum(dim=0)])
