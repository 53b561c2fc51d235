"""The fused objective as a Triton kernel, for GPUs: a program a row, which reads both logits twice."""

from __future__ import annotations

import functools
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..losses.functional import IGNORE_INDEX
from .interface import LogitBatch, Weights, own_counts, working_dtype


# Logits that a program holds at a time; longer rows are gone through in blocks of this size.
_LARGEST_BLOCK = 8192


def triton_kernel(batch: LogitBatch, weights: Weights) -> tuple[Tensor, Tensor, Tensor]:
    """A :class:`hf_kd.kernels.Kernel`; nothing of it waits for the device.

    A label that is out of range gives NaN, since a kernel cannot raise.
    """
    student, teacher, labels, mask, counts = batch
    dtype = working_dtype(student, teacher)
    rows, classes = student.shape
    student, teacher = (logits if logits.stride(1) == 1 else logits.contiguous() for logits in (student, teacher))
    counts = own_counts(labels, mask) if counts is None else counts.to(student.device)
    gradient = torch.empty((rows, classes), dtype=dtype, device=student.device)
    statistics = torch.empty((rows, 6), dtype=dtype, device=student.device)
    block = min(_LARGEST_BLOCK, triton.next_power_of_2(classes))
    if rows:
        _rows[(rows,)](
            student,
            teacher,
            labels.contiguous(),
            labels if mask is None else mask.contiguous(),
            counts,
            _settings(weights, dtype, student.device),
            gradient,
            statistics,
            student.stride(0),
            teacher.stride(0),
            classes,
            ignored=IGNORE_INDEX,
            weighted=weights.weighted,
            masked=mask is not None,
            dtype=tl.float64 if dtype == torch.float64 else tl.float32,
            block=block,
            num_warps=8 if block >= 2048 else 4,
        )
    sums = statistics.sum(dim=0)
    return sums[0].clone(), sums[1:], gradient


@functools.lru_cache(maxsize=64)
def _settings(weights: Weights, dtype: torch.dtype, device: torch.device) -> Tensor:
    # As a tensor: Triton would round numbers to fp32.
    return torch.tensor(weights[:3], dtype=dtype, device=device)


@triton.jit
def _rows(
    student: Any,
    teacher: Any,
    labels: Any,
    mask: Any,
    counts: Any,
    settings: Any,
    gradient: Any,
    statistics: Any,
    student_stride: Any,
    teacher_stride: Any,
    classes: Any,
    ignored: tl.constexpr,
    weighted: tl.constexpr,
    masked: tl.constexpr,
    dtype: tl.constexpr,
    block: tl.constexpr,
) -> None:
    """Objective and totals of a row, (6,), and its gradient, (K,)."""
    # 64 bits: 512 rows of 128k classes are within 32, those of a language model's batch are not.
    row = tl.program_id(0).to(tl.int64)
    student += row * student_stride
    teacher += row * teacher_stride
    gradient += row * classes
    gamma = tl.load(settings)
    a = tl.load(settings + 1) / tl.maximum(tl.load(counts + 1), 1).to(dtype)
    b = tl.load(settings + 2) / tl.maximum(tl.load(counts), 1).to(dtype)
    columns = tl.arange(0, block)

    # First pass: the largest logits, and sums of exponentials of the distances from them, corrected when they grow.
    # A finite start: the distance between two infinities is not a number.
    z_top = tl.full((), -3.0e38, dtype)
    v_top = tl.full((), -3.0e38, dtype)
    q_sum = tl.zeros((), dtype)
    v_sum = tl.zeros((), dtype)
    p_sum = tl.zeros((), dtype)
    for start in range(0, classes, block):
        inside = start + columns < classes
        z = tl.load(student + start + columns, mask=inside, other=-float("inf")).to(dtype)
        v = tl.load(teacher + start + columns, mask=inside, other=-float("inf")).to(dtype)
        z_new = tl.maximum(z_top, tl.max(z, axis=0))
        v_new = tl.maximum(v_top, tl.max(v, axis=0))
        q_sum = q_sum * tl.exp(z_top - z_new) + tl.sum(tl.exp(z - z_new), axis=0)
        v_sum = v_sum * tl.exp(v_top - v_new) + tl.sum(tl.exp(v - v_new), axis=0)
        p_sum = p_sum * tl.exp(gamma * (v_top - v_new)) + tl.sum(tl.exp(gamma * (v - v_new)), axis=0)
        z_top = z_new
        v_top = v_new
    log_q_sum = tl.log(q_sum)
    log_p_sum = tl.log(p_sum)
    power = tl.exp(log_p_sum - gamma * tl.log(v_sum))

    label = tl.load(labels + row)
    labelled = label != ignored
    known = (label >= 0) & (label < classes)
    z_label = tl.load(student + tl.where(known, label, 0)).to(dtype)
    ce = tl.where(known, log_q_sum - (z_label - z_top), float("nan"))
    ce = tl.where(labelled, ce, 0.0)
    pull = tl.where(labelled, a, 0.0)
    weight = tl.full((), 1.0, dtype)
    if weighted:
        weight = power
    push = b * weight
    if masked:
        push = tl.where(tl.load(mask + row), push, 0.0)

    # Second pass: the gradient, and what is summed over both distributions.
    divergence = tl.zeros((), dtype)
    entropy = tl.zeros((), dtype)
    for start in range(0, classes, block):
        inside = start + columns < classes
        z = tl.load(student + start + columns, mask=inside, other=-float("inf")).to(dtype)
        v = tl.load(teacher + start + columns, mask=inside, other=-float("inf")).to(dtype)
        log_q = z - z_top - log_q_sum
        log_p = gamma * (v - v_top) - log_p_sum
        q = tl.exp(log_q)
        p = tl.exp(log_p)
        # Classes of probability 0 contribute 0, whatever the logarithm beside them.
        divergence += tl.sum(tl.where(p == 0.0, 0.0, p * (log_p - log_q)), axis=0)
        entropy -= tl.sum(tl.where(q == 0.0, 0.0, q * log_q), axis=0)
        slope = (pull + push) * q - push * p - tl.where(start + columns == label, pull, 0.0)
        tl.store(gradient + start + columns, slope, mask=inside)

    divergence = weight * divergence
    if masked:
        real = tl.load(mask + row)
        divergence = tl.where(real, divergence, 0.0)
        power = tl.where(real, power, 0.0)
        entropy = tl.where(real, entropy, 0.0)
    statistics += row * 6
    tl.store(statistics, a * ce + b * divergence)
    tl.store(statistics + 1, ce)
    tl.store(statistics + 2, labelled.to(dtype))
    tl.store(statistics + 3, divergence)
    tl.store(statistics + 4, power)
    tl.store(statistics + 5, entropy)
