"""Distillation losses and the quantities around them, as pure functions of logits.

Source of the formulas: K. Zheng and E.-H. Yang, "Knowledge Distillation Based on Transformed Teacher Matching",
ICLR 2024 (arXiv 2402.11148), called "the paper" below. With teacher logits ``v`` and student logits ``z``::

    p = softmax(v)         q = softmax(z)         gamma = 1 / temperature
    p_T = softmax(gamma v) q_T = softmax(gamma z) U_gamma(p) = sum_k p_k ** gamma

Conventions of every function here:

- Logits have shape (..., K); each leading index is one sample, and K classes lie on the last dimension.
- fp16 and bf16 are computed in fp32; fp32 and fp64 keep their precision. Everything happens in log space, so that
  logits up to 1e4 in size, and teacher logits of ``-inf`` (a class of probability zero), give finite, exact results.
- Entropies and divergences are in nats.
- The losses send no gradient to the teacher.
"""

import math
from numbers import Real
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F


Reduction = Literal["mean", "sum", "none"]

__all__ = [
    "balanced_beta",
    "kd_loss",
    "log_power_sum",
    "power_sum",
    "power_transform",
    "renyi_entropy",
    "shannon_entropy",
    "ttm_loss",
    "wttm_loss",
]


# ---- Losses --------------------------------------------------------------------------------------------------------


def kd_loss(
    student_logits: Tensor, teacher_logits: Tensor, *, temperature: float = 4.0, reduction: Reduction = "mean"
) -> Tensor:
    """Classic distillation: ``T² D(p_T || q_T)``, temperature on both sides (Hinton et al. 2015).

    Args:
        student_logits: (..., K), floating point.
        teacher_logits: same shape.
        temperature: ``T > 0``.
        reduction: "mean" or "sum" over the samples, or "none" for one value per sample, of shape (...).

    Raises:
        ValueError: on unequal shapes, a temperature that is not a positive number, or an unknown reduction.
        TypeError: if the logits are not floating point.
    """
    gamma = 1.0 / check_positive("temperature", temperature)
    student_logits, teacher_logits = check_logits(student_logits, teacher_logits)
    log_p, _ = transformed_teacher(teacher_logits, gamma)
    student_logits = promote(student_logits)
    # Moved to 0 before scaling: gamma times a large logit would round away the differences between classes.
    student_logits = student_logits - student_logits.detach().amax(dim=-1, keepdim=True)
    log_q = F.log_softmax(gamma * student_logits, dim=-1)
    return reduce(divergence(log_p, log_q) / gamma**2, reduction)


def ttm_loss(student_logits: Tensor, teacher_logits: Tensor, *, gamma: float, reduction: Reduction = "mean") -> Tensor:
    """Transformed teacher matching: ``D(p_T || q)``, temperature on the teacher alone and no ``T²`` (the paper).

    Args:
        student_logits: (..., K), floating point.
        teacher_logits: same shape.
        gamma: exponent of the power transform, ``1/T``, in (0, 1].
        reduction: "mean" or "sum" over the samples, or "none" for one value per sample, of shape (...).

    Raises:
        ValueError: on unequal shapes, gamma outside (0, 1], or an unknown reduction.
        TypeError: if the logits are not floating point.
    """
    check_gamma(gamma)
    student_logits, teacher_logits = check_logits(student_logits, teacher_logits)
    log_p, _ = transformed_teacher(teacher_logits, gamma)
    return reduce(divergence(log_p, log_probabilities(student_logits)), reduction)


def wttm_loss(
    student_logits: Tensor, teacher_logits: Tensor, *, gamma: float, reduction: Reduction = "mean"
) -> Tensor:
    """Weighted transformed teacher matching: ``U_gamma(p) D(p_T || q)`` (the paper).

    The weight is the power sum of the *untransformed* teacher, so samples on which the teacher is soft weigh more:
    1 for a one-hot teacher, ``K ** (1 - gamma)`` for a uniform one.

    Args:
        student_logits: (..., K), floating point.
        teacher_logits: same shape.
        gamma: exponent of the power transform, ``1/T``, in (0, 1].
        reduction: "mean" or "sum" over the samples, or "none" for one value per sample, of shape (...).

    Raises:
        ValueError: on unequal shapes, gamma outside (0, 1], or an unknown reduction.
        TypeError: if the logits are not floating point.
    """
    check_gamma(gamma)
    student_logits, teacher_logits = check_logits(student_logits, teacher_logits)
    log_p, log_u = transformed_teacher(teacher_logits, gamma)
    return reduce(log_u.exp() * divergence(log_p, log_probabilities(student_logits)), reduction)


# ---- The paper's quantities ----------------------------------------------------------------------------------------


def power_transform(logits: Tensor, gamma: float) -> Tensor:
    """Power-transformed probabilities ``p_k^gamma / sum_j p_j^gamma`` = ``softmax(gamma · logits)``, shape (..., K).

    Temperature scaling with ``T = 1/gamma`` is the same thing (the paper). Raises ValueError for gamma
    outside (0, 1].
    """
    check_gamma(gamma)
    return transformed_teacher(check_floating("logits", logits), gamma)[0].exp()


def log_power_sum(logits: Tensor, gamma: float) -> Tensor:
    """Logarithm of the power sum, ``log U_gamma(softmax(logits))``, shape (...): in [0, (1 - gamma) log K].

    Computed as ``logsumexp(gamma v) - gamma logsumexp(v)``: no probability is ever raised to a power. Raises
    ValueError for gamma outside (0, 1].
    """
    check_gamma(gamma)
    return transformed_teacher(check_floating("logits", logits), gamma)[1]


def power_sum(logits: Tensor, gamma: float) -> Tensor:
    """Power sum ``U_gamma(p) = sum_k p_k^gamma`` of ``p = softmax(logits)``, shape (...) (the paper).

    1 for a one-hot p and ``K^(1-gamma)`` for a uniform one. Raises ValueError for gamma outside (0, 1].
    """
    return log_power_sum(logits, gamma).exp()


def shannon_entropy(logits: Tensor) -> Tensor:
    """Shannon entropy ``-sum_k q_k log q_k`` of ``q = softmax(logits)`` in nats, shape (...)."""
    return entropy(log_probabilities(check_floating("logits", logits)))


def renyi_entropy(logits: Tensor, alpha: float) -> Tensor:
    """Rényi entropy ``log(sum_k q_k^alpha) / (1 - alpha)`` of ``q = softmax(logits)`` in nats, shape (...).

    ``alpha = 1`` is its limit, the Shannon entropy. TTM equals KD plus a regulariser of order ``alpha = 1/T`` (the
    paper, Eq. 15). Raises ValueError unless alpha is a positive number.
    """
    check_positive("alpha", alpha)
    log_q = log_probabilities(check_floating("logits", logits))
    order = alpha - 1.0
    if order == 0.0:
        return entropy(log_q)
    if abs(order) > 1e-2:
        return torch.logsumexp(alpha * log_q, dim=-1) / -order
    # Near alpha = 1 both numerator and denominator vanish. log(sum q^alpha) = log1p(sum q (q^(alpha-1) - 1)) keeps its
    # digits. For a class so improbable that the exponent is large, q^alpha - q is exact enough and cannot overflow.
    exponent = order * log_q
    small = exponent.abs() < 1.0
    near = log_q.exp() * torch.expm1(torch.where(small, exponent, torch.zeros_like(exponent)))
    finite = torch.where(small, torch.zeros_like(log_q), log_q)
    far = torch.exp(alpha * finite) - torch.exp(finite)
    return torch.log1p(torch.where(small, near, far).sum(dim=-1)) / -order


def balanced_beta(lam: float, temperature: float, mean_power_sum: float = 1.0) -> float:
    """The beta at which (W)TTM weighs labels against the teacher as KD does at ``lam``: ``λT / ((1-λ) Ū)``.

    The paper's Eq. 19 for TTM (``mean_power_sum = 1``); for WTTM divide by the mean power sum Ū of the teacher over
    the training data. λ is KD's weight of the soft term, in ``(1-λ) CE + λ T² D``.

    Example: ``balanced_beta(0.9, 4)`` is 36.

    Raises:
        ValueError: for lam outside [0, 1), a temperature below 1, or a mean power sum below 1.
    """
    if not 0.0 <= lam < 1.0:
        raise ValueError(
            f"`lam` must be in [0, 1), got {lam}: it is the weight of KD's soft term, and 1 leaves no labels."
        )
    if not (math.isfinite(temperature) and temperature >= 1.0):
        raise ValueError(f"`temperature` must be a number of at least 1 (gamma = 1/temperature), got {temperature}.")
    # One-hot teachers give exactly 1; allow for its rounding.
    if not (math.isfinite(mean_power_sum) and mean_power_sum >= 1.0 - 1e-6):
        raise ValueError(f"`mean_power_sum` must be a number of at least 1 (a one-hot teacher), got {mean_power_sum}.")
    return lam * temperature / ((1.0 - lam) * mean_power_sum)


# ---- Pieces shared with the loss modules, on log-probabilities -----------------------------------------------------


def promote(tensor: Tensor) -> Tensor:
    """Half-precision floats as fp32, all else as it is: a half has too few digits for a softmax over classes."""
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor


def log_probabilities(logits: Tensor) -> Tensor:
    """``log softmax(logits)``, shape (..., K), in at least fp32."""
    return F.log_softmax(promote(logits), dim=-1)


def transformed_teacher(logits: Tensor, gamma: float) -> tuple[Tensor, Tensor]:
    """``(log p_T, log U_gamma(p))`` of shapes (..., K) and (...), from one softmax and one logsumexp."""
    logits = promote(logits)
    # With the largest logit moved to 0 both logsumexps lie in [0, log K]: their difference keeps its digits.
    top, index = logits.max(dim=-1, keepdim=True)
    shifted = logits - top
    log_p = F.log_softmax(gamma * shifted, dim=-1)
    # log_p is gamma * shifted - logsumexp(gamma * shifted); at the largest logit the first part is 0, and so is its
    # gradient, since the shift is part of the graph.
    return log_p, -log_p.gather(-1, index).squeeze(-1) - gamma * torch.logsumexp(shifted, dim=-1)


def divergence(log_p: Tensor, log_q: Tensor) -> Tensor:
    """Kullback-Leibler divergence ``D(p || q)`` per sample, shape (...); classes with p = 0 contribute 0."""
    p = log_p.exp()
    # "p == 0", not "p > 0": a NaN must stay one rather than count as an impossible class.
    return torch.where(p == 0, torch.zeros_like(p), p * (log_p - log_q)).sum(dim=-1)


def entropy(log_q: Tensor) -> Tensor:
    """Shannon entropy per sample, shape (...), from log-probabilities; classes with q = 0 contribute 0."""
    # 0 · log 0 is 0 here, and clamping keeps its gradient from being 0 · inf.
    return -(log_q.exp() * log_q.clamp_min(torch.finfo(log_q.dtype).min)).sum(dim=-1)


def reduce(per_sample: Tensor, reduction: Reduction) -> Tensor:
    """Mean or sum over the samples, or the samples themselves."""
    if reduction == "mean":
        return per_sample.mean()
    if reduction == "sum":
        return per_sample.sum()
    if reduction == "none":
        return per_sample
    raise ValueError(f'`reduction` must be "mean", "sum" or "none", got {reduction!r}.')


def check_gamma(gamma: float) -> float:
    """gamma itself, or ValueError unless it lies in (0, 1]."""
    if not (isinstance(gamma, Real) and 0.0 < gamma <= 1.0):
        raise ValueError(
            f"`gamma` must be in (0, 1] (gamma = 1/temperature, 1 leaves the teacher as it is), got {gamma!r}."
        )
    return gamma


def check_positive(name: str, value: float) -> float:
    """value itself, or ValueError unless it is a positive, finite number."""
    if not (isinstance(value, Real) and math.isfinite(value) and value > 0.0):
        raise ValueError(f"`{name}` must be a positive number, got {value!r}.")
    return value


def check_floating(name: str, logits: Tensor) -> Tensor:
    """The logits themselves, or TypeError/ValueError unless they are floats of shape (..., K)."""
    if not torch.is_floating_point(logits):
        raise TypeError(f"`{name}` must be floating point logits, got {logits.dtype}.")
    if logits.dim() == 0 or logits.size(-1) == 0:
        raise ValueError(f"`{name}` must have shape (..., classes), got {tuple(logits.shape)}.")
    return logits


def check_logits(student_logits: Tensor, teacher_logits: Tensor) -> tuple[Tensor, Tensor]:
    """Both logits, the teacher's cut off from its graph, after checking that they are of one shape."""
    check_floating("student_logits", student_logits)
    check_floating("teacher_logits", teacher_logits)
    if student_logits.shape != teacher_logits.shape:
        raise ValueError(
            f"Student logits of shape {tuple(student_logits.shape)} and teacher logits of shape "
            f"{tuple(teacher_logits.shape)} do not match: both must be (..., classes), samples and classes the same."
        )
    return student_logits, teacher_logits.detach()
