"""Distillation losses and the quantities around them, as pure functions of logits.

Source of the formulas: K. Zheng and E.-H. Yang, "Knowledge Distillation Based on Transformed Teacher Matching",
ICLR 2024 (arXiv 2402.11148), called "the paper" below. With teacher logits ``v`` and student logits ``z``::

    p = softmax(v)         q = softmax(z)         gamma = 1 / temperature
    p_T = softmax(gamma v) q_T = softmax(gamma z) U_gamma(p) = sum_k p_k ** gamma

DKD, DIST and NKD are other papers' (named at each function), as their authors' code computes them.

Conventions of every function here:

- Logits have shape (..., K); each leading index is one sample, and K classes lie on the last dimension.
- fp16 and bf16 are computed in fp32; fp32 and fp64 keep their precision. Everything happens in log space, so that
  logits up to 1e4 in size, and teacher logits of ``-inf`` (a class of probability zero), give finite, exact results.
- Entropies and divergences are in nats.
- The losses send no gradient to the teacher.
- Where a loss needs labels, they are class indices of shape (...), and a sample labelled ``IGNORE_INDEX`` (-100) has
  the value 0. It still counts as a sample in a mean, as it does in the trainer's.
"""

import math
from numbers import Real
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F


Reduction = Literal["mean", "sum", "none"]

IGNORE_INDEX = -100
"""The label of a sample without a label."""

__all__ = [
    "IGNORE_INDEX",
    "balanced_beta",
    "dist_loss",
    "dkd_loss",
    "kd_loss",
    "log_power_sum",
    "matching_statistics",
    "nkd_loss",
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
    log_q = tempered(promote(student_logits), gamma)
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


def dkd_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor,
    *,
    alpha: float = 1.0,
    beta: float = 8.0,
    temperature: float = 4.0,
    reduction: Reduction = "mean",
) -> Tensor:
    """Decoupled distillation: ``T² (alpha TCKD + beta NCKD)`` (Zhao et al., CVPR 2022, arXiv 2203.08679).

    At temperature T on both sides, TCKD is the divergence between the two networks' (target class, all others), and
    NCKD the one between their distributions over the other classes. With ``alpha = 1`` and each sample's
    ``1 - p_T[target]`` in the place of beta it would be KD.

    It equals the authors' code (megvii-research/mdistiller) but for two cases. The code removes the target by taking
    1000 off its scaled logit, which is too little for one that is further above the others: here it is removed whole.
    And a teacher that gives all others the probability 0 (logits of -inf) says nothing of them: NCKD is 0.

    The code's training loop multiplies the loss by ``min(epoch / 20, 1)``, which is not in the paper's loss: see the
    argument ``warmup_epochs`` of the loss named "dkd".

    Args:
        student_logits: (..., K), floating point, K at least 2.
        teacher_logits: same shape.
        labels: the target classes, (...), integers; where they are -100 the value is 0.
        alpha, beta: weights of the two parts, at least 0.
        temperature: ``T > 0``.
        reduction: "mean" or "sum" over the samples, or "none" for one value per sample, of shape (...).

    Raises:
        ValueError: on unequal shapes, a single class, labels that are not one class per sample, weights or a
            temperature out of range, or an unknown reduction.
        TypeError: if the logits are not floating point.
    """
    check_weight("alpha", alpha)
    check_weight("beta", beta)
    tckd, nckd = decoupled(student_logits, teacher_logits, labels, temperature)
    return reduce(alpha * tckd + beta * nckd, reduction)


def dist_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    beta: float = 1.0,
    gamma: float = 1.0,
    temperature: float = 1.0,
    eps: float = 1e-8,
    mask: Tensor | None = None,
) -> Tensor:
    """DIST: ``T² (beta inter + gamma intra)``, a scalar (Huang et al., NeurIPS 2022, arXiv 2205.10536).

    With both networks' probabilities at temperature T, ``inter`` is 1 minus their Pearson correlation over the classes
    of a sample, in the mean over samples; ``intra`` is 1 minus their correlation over the samples of the batch for one
    class, in the mean over classes. So its value belongs to the batch, not to its samples: that of a batch is not the
    mean of its parts', and a single sample has an intra of 1 and no gradient from it. ``gamma`` is a weight here.

    The authors' code (hunto/DIST_KD) adds 1e-8 to the product of the two norms, and so does the default here: it pulls
    the correlation towards 0 where probabilities vary little, as those of one class among many do. ``eps=0`` is the
    paper's correlation, with 0 where a vector is constant.

    Args:
        student_logits: (..., K), floating point; all leading dimensions together are the batch.
        teacher_logits: same shape.
        beta, gamma: weights of inter and intra, at least 0.
        temperature: ``T > 0``.
        eps: added to the product of norms, at least 0.
        mask: (...) bool, False for what is no sample (padding): it takes part in nothing.

    Raises:
        ValueError: on unequal shapes, or a weight, temperature or eps out of range.
        TypeError: if the logits are not floating point, or the mask is not bool.
    """
    check_weight("beta", beta)
    check_weight("gamma", gamma)
    inter, intra = relations(student_logits, teacher_logits, temperature, eps, mask)
    return beta * inter + gamma * intra


def nkd_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor,
    *,
    gamma: float = 1.0,
    temperature: float = 1.0,
    reduction: Reduction = "mean",
) -> Tensor:
    """Normalised distillation: ``-p_y log q_y + gamma T² H(p'_T, q'_T)`` (Yang et al., ICCV 2023, arXiv 2303.13005).

    y is the target class; p' and q' are the distributions over the other classes, at temperature T. H is their
    cross-entropy, not their divergence, so the loss of equal logits is not 0, and its gradient is that of the
    divergence. The first part has no temperature. ``gamma`` is a weight here. A teacher that gives all others the
    probability 0 says nothing of them: H is 0. The usual cross-entropy on the labels comes on top (the trainer's
    ``ce_weight``), as in the authors' code (yzd-v/cls_KD).

    Args:
        student_logits: (..., K), floating point, K at least 2.
        teacher_logits: same shape.
        labels: the target classes, (...), integers; where they are -100 the value is 0. Or probabilities (..., K), as
            mixup makes them, whose most probable class is the target, as in the authors' code.
        gamma: weight of the other classes, at least 0.
        temperature: ``T > 0``, of the other classes.
        reduction: "mean" or "sum" over the samples, or "none" for one value per sample, of shape (...).

    Raises:
        ValueError: on unequal shapes, a single class, labels of neither form, a weight or temperature out of range, or
            an unknown reduction.
        TypeError: if the logits are not floating point.
    """
    check_weight("gamma", gamma)
    target, others = normalised(student_logits, teacher_logits, labels, temperature)
    return reduce(target + gamma * others, reduction)


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


def matching_statistics(log_q: Tensor, teacher_logits: Tensor, gamma: float) -> dict[str, Tensor]:
    """How far a student is from the transformed teacher, and how soft that is: each (...), one value per sample.

    ``"divergence"`` is ``D(p_T || q)`` in nats, without a weight (the paper's Fig. 2); ``"teacher_entropy"`` is the
    Shannon entropy ``H(p_T)`` in nats; ``"power_sum"`` is ``U_gamma(p)``.

    Args:
        log_q: the student's log-probabilities, (..., K).
        teacher_logits: same shape.
        gamma: exponent of the power transform, in (0, 1].

    Raises:
        ValueError: for gamma outside (0, 1].
    """
    log_p, log_u = transformed_teacher(teacher_logits, check_gamma(gamma))
    return {"divergence": divergence(log_p, log_q), "teacher_entropy": entropy(log_p), "power_sum": log_u.exp()}


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


def tempered(logits: Tensor, gamma: float) -> Tensor:
    """``log softmax(gamma · logits)``, shape (..., K), in the precision of the logits."""
    # Moved to 0 before scaling: gamma times a large logit would round away the differences between classes.
    return F.log_softmax(gamma * (logits - logits.detach().amax(dim=-1, keepdim=True)), dim=-1)


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
    return weighted(log_p.exp(), log_p - log_q).sum(dim=-1)


def decoupled(
    student_logits: Tensor, teacher_logits: Tensor, labels: Tensor | None, temperature: float
) -> tuple[Tensor, Tensor]:
    """DKD's two parts per sample, ``T² TCKD`` and ``T² NCKD``, (...)."""
    gamma = 1.0 / check_positive("temperature", temperature)
    student_logits, teacher_logits = check_logits(student_logits, teacher_logits)
    target, labelled = check_targets("dkd", labels, student_logits)
    # Where the teacher is silent on the others, both are uniform there: NCKD is 0.
    log_q, log_q_others, log_p, log_p_others, _ = split(student_logits, teacher_logits, target, gamma)
    tckd = divergence(log_p, log_q).masked_fill(~labelled, 0.0)
    nckd = divergence(log_p_others, log_q_others).masked_fill(~labelled, 0.0)
    return tckd / gamma**2, nckd / gamma**2


def normalised(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor | None,
    temperature: float,
    log_q: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """NKD's two parts per sample, (...): ``-p_y log q_y`` and ``T² H(p'_T, q'_T)``.

    ``log_q`` is ``log softmax(student_logits)`` where that is there already.
    """
    gamma = 1.0 / check_positive("temperature", temperature)
    student_logits, teacher_logits = check_logits(student_logits, teacher_logits)
    target, labelled = check_targets("nkd", labels, student_logits, soft=True)
    _, log_q_others, _, log_p_others, silent = split(student_logits, teacher_logits, target, gamma)
    p_y = log_probabilities(teacher_logits).gather(-1, target).exp().squeeze(-1)
    log_q = log_probabilities(student_logits) if log_q is None else log_q
    own = -weighted(p_y, log_q.gather(-1, target).squeeze(-1))
    others = -weighted(log_p_others.exp(), log_q_others).sum(dim=-1) / gamma**2
    return own.masked_fill(~labelled, 0.0), others.masked_fill(silent | ~labelled, 0.0)


def split(
    student_logits: Tensor, teacher_logits: Tensor, target: Tensor, gamma: float
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Both networks' distributions at temperature 1/gamma, split at the target class, as log-probabilities.

    Args:
        target: class indices, (..., 1).

    Returns:
        ``(log_q, log_q_others, log_p, log_p_others, silent)``: over (target, all others), (..., 2), and over the other
        classes alone, (..., K) with -inf at the target. ``silent`` (...) tells where the teacher gives all others the
        probability 0; there the last of each pair are uniform, in place of 0/0.
    """
    if student_logits.size(-1) < 2:
        raise ValueError(
            f"Logits of shape {tuple(student_logits.shape)} have one class, and this loss splits the target from the "
            "other classes: give at least two classes."
        )
    is_target = torch.zeros_like(student_logits, dtype=torch.bool).scatter(-1, target, True)
    silent = teacher_logits.masked_fill(is_target, -torch.inf).amax(dim=-1, keepdim=True) == -torch.inf
    parts = []
    for logits in (student_logits, teacher_logits):
        logits = promote(logits)
        others = torch.where(silent, torch.zeros_like(logits), logits).masked_fill(is_target, -torch.inf)
        log_all = tempered(logits, gamma)
        # The others are moved by their own largest: next to a target that is far above them their differences would
        # be rounded away.
        top, index = others.detach().max(dim=-1, keepdim=True)
        log_others = F.log_softmax(gamma * (others - top), dim=-1)
        # log(1 - p_target) is the log-probability of any other class among all, less that among the others.
        rest = log_all.gather(-1, index) - log_others.gather(-1, index)
        parts += [torch.cat([log_all.gather(-1, target), rest], dim=-1), log_others]
    log_q, log_q_others, log_p, log_p_others = parts
    return log_q, log_q_others, log_p, log_p_others, silent.squeeze(-1)


def relations(
    student_logits: Tensor, teacher_logits: Tensor, temperature: float, eps: float = 1e-8, mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """DIST's two parts, ``T² inter`` and ``T² intra``, scalars; see :func:`dist_loss`."""
    gamma = 1.0 / check_positive("temperature", temperature)
    check_weight("eps", eps)
    student_logits, teacher_logits = check_logits(student_logits, teacher_logits)
    if mask is not None and mask.dtype != torch.bool:
        raise TypeError(f"`mask` must be bool, True for what is a sample, got {mask.dtype}.")
    if mask is not None and mask.shape != student_logits.shape[:-1]:
        raise ValueError(
            f"`mask` of shape {tuple(mask.shape)} does not go with logits of shape {tuple(student_logits.shape)}: "
            "give one value per sample."
        )
    mask = None if mask is None else mask.reshape(-1)
    log_probs = []
    for logits in (student_logits, teacher_logits):
        logits = promote(logits).reshape(-1, logits.size(-1))
        if mask is not None:
            # What is no sample may hold anything.
            logits = logits.masked_fill(~mask[:, None], 0.0)
        log_probs.append(tempered(logits, gamma))
    log_q, log_p = log_probs
    by_sample = correlation(log_q, log_p, eps)
    by_sample = by_sample.mean() if mask is None else (by_sample * mask).sum() / mask.sum().clamp_min(1)
    by_class = correlation(log_q.T, log_p.T, eps, mask).mean()
    return (1.0 - by_sample) / gamma**2, (1.0 - by_class) / gamma**2


def correlation(log_a: Tensor, log_b: Tensor, eps: float, mask: Tensor | None = None) -> Tensor:
    """Pearson correlation of ``exp(log_a)`` and ``exp(log_b)`` along the last dimension, over what the mask marks.

    eps is added to the product of norms. Without it the correlation of a constant vector is 0.
    """
    centred = []
    for log_x in (log_a, log_b):
        if mask is not None:
            log_x = log_x.masked_fill(~mask, -torch.inf)
        if not eps:
            # The scale does not matter then, and at this one squares do not underflow.
            top = log_x.detach().amax(dim=-1, keepdim=True)
            log_x = log_x - top.masked_fill(top == -torch.inf, 0.0)
        x = log_x.exp()
        if mask is None:
            centred.append(x - x.mean(dim=-1, keepdim=True))
        else:
            centred.append((x - x.sum(dim=-1, keepdim=True) / mask.sum().clamp_min(1)) * mask)
    product = (centred[0] * centred[1]).sum(dim=-1)
    norms = [torch.linalg.vector_norm(x, dim=-1) for x in centred]
    if eps:
        return product / (norms[0] * norms[1] + eps)
    # Next to a largest entry of 1, this is what rounding leaves of a constant vector.
    rounding = [8 * torch.finfo(x.dtype).eps * x.size(-1) ** 0.5 for x in centred]
    constant = (norms[0] <= rounding[0]) | (norms[1] <= rounding[1])
    scale = torch.where(constant, torch.ones_like(product), norms[0] * norms[1])
    return (product / scale).masked_fill(constant, 0.0)


def weighted(p: Tensor, log_q: Tensor) -> Tensor:
    """``p log q``, elementwise; 0 where p is 0, whatever log q."""
    # "p == 0", not "p > 0": a NaN must stay one rather than count as an impossible class.
    return torch.where(p == 0, torch.zeros_like(p), p * log_q)


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


def check_weight(name: str, value: float) -> float:
    """value itself, or ValueError unless it is a finite number of at least 0."""
    if not (isinstance(value, Real) and math.isfinite(value) and value >= 0.0):
        raise ValueError(f"`{name}` must be a number of at least 0, got {value!r}.")
    return value


def check_targets(loss: str, labels: Tensor | None, logits: Tensor, *, soft: bool = False) -> tuple[Tensor, Tensor]:
    """Target classes (..., 1), 0 where there is none, and where there is one, (...) bool; or ValueError.

    With ``soft``, probabilities (..., K) stand for their most probable class.
    """
    if labels is None:
        raise ValueError(
            f"{loss} needs the class of each sample, and the batch has no labels: add them, or take a loss without "
            "labels (kd, ttm, wttm, dist)."
        )
    if labels.is_floating_point() and labels.shape == logits.shape:
        if not soft:
            raise ValueError(
                f"{loss} takes one class per sample, and the labels are probabilities of shape {tuple(labels.shape)}: "
                "train without mixup and CutMix, or take a loss that goes with them (kd, ttm, wttm, dist, nkd)."
            )
        labels = labels.argmax(dim=-1)
    if labels.is_floating_point() or labels.dtype == torch.bool or labels.shape != logits.shape[:-1]:
        raise ValueError(
            f"Labels of shape {tuple(labels.shape)} and type {labels.dtype} do not go with logits of shape "
            f"{tuple(logits.shape)}: give {loss} one integer class per sample, of shape {tuple(logits.shape[:-1])}."
        )
    labelled = labels != IGNORE_INDEX
    labels = labels.long().masked_fill(~labelled, 0)
    # Looking at the values would stall an accelerator, whose gather refuses them itself, and break a compiled graph.
    if labels.device.type == "cpu" and not torch.compiler.is_compiling():
        wrong = labels[(labels < 0) | (labels >= logits.size(-1))]
        if len(wrong):
            raise ValueError(
                f"The label {wrong[0].item()} is out of range for {logits.size(-1)} classes: labels must be 0 to "
                f"{logits.size(-1) - 1}, or {IGNORE_INDEX} for a sample without a label."
            )
    return labels.unsqueeze(-1), labelled


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
