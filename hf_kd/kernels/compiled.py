"""The fused objective through torch.compile, for the CPU: most of it in one pass over each row."""

from __future__ import annotations

import functools

import torch
from torch import Tensor
from transformers.utils.logging import get_logger

from ..losses.functional import IGNORE_INDEX
from .eager import eager_kernel
from .interface import LogitBatch, Weights, own_counts, working_dtype


logger = get_logger(__name__)

# Logits at a time, for each thread: what is made on the way stays in its cache, and its memory is used again.
_CHUNK = 2**18


class CompiledKernel:
    """A :class:`hf_kd.kernels.Kernel` for the CPU.

    The first call with a number of classes or a dtype compiles, for some seconds. The number of samples may vary: that
    neither compiles again nor changes how a row is computed. Where compiling fails, for want of a compiler say, this
    says so once and is the eager kernel from then on.

    Args:
        smallest: how many logits a batch must have; smaller ones go to the eager kernel.
    """

    def __init__(self, smallest: int = 0) -> None:
        self.smallest = smallest
        self.failed = False
        # The marks below, and not the shapes that happen to come first, say what varies.
        self._compiled = torch.compile(_objective, fullgraph=True, dynamic=False)
        self._seen: set[tuple[object, ...]] = set()

    def __call__(self, batch: LogitBatch, weights: Weights) -> tuple[Tensor, Tensor, Tensor]:
        # To the compiler a single row is a case of its own.
        if not self.failed and len(batch.student) > 1 and batch.student.numel() >= self.smallest:
            try:
                return self._run(batch, weights)
            except _CompilationError as error:
                self.failed = True
                logger.warning("The fused loss could not be compiled and runs uncompiled: %s", error)
        return eager_kernel(batch, weights)

    def _run(self, batch: LogitBatch, weights: Weights) -> tuple[Tensor, Tensor, Tensor]:
        student, teacher, labels, mask, counts = batch
        dtype = working_dtype(student, teacher)
        settings = _settings(weights, dtype)
        # At least 4, and chunks that differ by one: none has a single row.
        rows = max(4, _CHUNK * torch.get_num_threads() // student.shape[1])
        chunks = -(-len(student) // rows)
        if chunks == 1:
            return self._chunk(batch, None, settings)
        counts = own_counts(labels, mask) if counts is None else counts
        gradient = torch.empty(student.shape, dtype=dtype)
        parts = zip(batch._replace(counts=counts).split(chunks), gradient.tensor_split(chunks), strict=True)
        found = [self._chunk(part, piece, settings)[:2] for part, piece in parts]
        objective, totals = (torch.stack(values).sum(dim=0) for values in zip(*found, strict=True))
        return objective, totals, gradient

    def _chunk(self, batch: LogitBatch, gradient: Tensor | None, settings: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        student, teacher, labels, mask, counts = batch
        case = (student.shape[1], student.dtype, teacher.dtype, gradient is None, mask is None, counts is None)
        if case in self._seen:
            return self._compiled(student, teacher, labels, gradient, mask, counts, settings)
        for tensor in (student, teacher, labels, gradient, mask):
            if tensor is not None:
                torch._dynamo.maybe_mark_dynamic(tensor, 0)
        try:
            result = self._compiled(student, teacher, labels, gradient, mask, counts, settings)
        except Exception as error:
            # Whatever may be wrong with the values is wrong for the eager kernel too, which then says so.
            raise _CompilationError(f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}") from error
        self._seen.add(case)
        return result


class _CompilationError(Exception):
    """The first call for a case failed."""


@functools.lru_cache(maxsize=64)
def _settings(weights: Weights, dtype: torch.dtype) -> Tensor:
    # As a tensor: numbers would become part of the code, and others compile again.
    return torch.tensor([float(weight) for weight in weights], dtype=dtype)


def _objective(
    student: Tensor,
    teacher: Tensor,
    labels: Tensor,
    gradient: Tensor | None,
    mask: Tensor | None,
    counts: Tensor | None,
    settings: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Objective (), totals (5,) and gradient (B, K), which is written to the place for it if one is given."""
    dtype = settings.dtype
    gamma, ce_weight, beta, by_power_sum = settings.unbind()
    has_label = (labels != IGNORE_INDEX)[:, None]
    if counts is not None:
        samples, labelled = counts.clamp_min(1).to(dtype).unbind()
        a, b = ce_weight / labelled, beta / samples
    else:
        a = ce_weight / has_label.to(dtype).sum().clamp_min(1.0)
        b = beta / (student.shape[0] if mask is None else mask.to(dtype).sum().clamp_min(1.0))
    student, teacher = student.to(dtype), teacher.to(dtype)
    # With the largest logit moved to 0 all sums lie in [1, K].
    student = student - student.amax(dim=-1, keepdim=True)
    teacher = teacher - teacher.amax(dim=-1, keepdim=True)
    scaled = gamma * teacher
    q, p = student.exp(), scaled.exp()
    q_sum, p_sum = q.sum(dim=-1, keepdim=True), p.sum(dim=-1, keepdim=True)
    q, p = q * q_sum.reciprocal(), p * p_sum.reciprocal()
    log_q, log_p = student - q_sum.log(), scaled - p_sum.log()
    power = (p_sum.log() - gamma * teacher.exp().sum(dim=-1, keepdim=True).log()).exp()
    # Classes of probability 0 contribute 0, whatever the logarithm beside them.
    divergence = torch.where(p == 0, 0.0, p * (log_p - log_q)).sum(dim=-1, keepdim=True)
    entropy = -(q * log_q.clamp_min(torch.finfo(dtype).min)).sum(dim=-1, keepdim=True)
    target = torch.where(has_label, labels[:, None], 0)
    ce = torch.where(has_label, -log_q.gather(-1, target), 0.0)
    weight = torch.where(by_power_sum > 0, power, 1.0)
    pull, push = torch.where(has_label, a, 0.0), weight * b
    columns = torch.cat([ce, has_label.to(dtype), weight * divergence, power, entropy], dim=1)
    if mask is not None:
        push = torch.where(mask[:, None], push, 0.0)
        columns = torch.where(mask[:, None], columns, 0.0)
    is_target = torch.arange(student.shape[1], dtype=torch.int32) == target.to(torch.int32)
    slopes = (pull + push) * q - push * p - torch.where(is_target, pull, 0.0)
    totals = columns.sum(dim=0)
    return a * totals[0] + b * totals[2], totals, slopes if gradient is None else gradient.copy_(slopes)
