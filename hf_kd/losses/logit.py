"""Losses on logits as modules that a configuration can name.

A loss module sees the outputs of both networks and returns its value per sample, with whatever statistics are worth
logging. It knows nothing of models, trainers or the weight it will get.

Adding one: subclass :class:`LogitLoss` (or :class:`TransformedTeacherLoss` if it has a gamma) and decorate it with
``@register_loss("name")``; ``DistillationConfig(loss="name")`` then finds it.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from . import functional
from .registry import check_name, construct, parameters_of


@dataclass
class Outputs:
    """What a network gave for a batch, with the softmax that several terms need computed once.

    Attributes:
        logits: (..., K) as the network gave them (fp32 or fp64).
        raw: the network's own return value, for hidden states and the like; None for a teacher.
        mask: (...) bool, False for what is no sample: padding, and the repeats that fill up the last batch of several
            processes. None if all are. A value per sample is masked by the trainer; only a loss that compares samples
            with one another needs to look.
    """

    logits: Tensor
    raw: Any = None
    mask: Tensor | None = None

    @cached_property
    def log_probs(self) -> Tensor:
        """``log softmax(logits)``, (..., K): computed on first use, for cross-entropy and the distillation term."""
        return functional.log_probabilities(self.logits)


class LogitLoss(nn.Module):
    """Base of the named losses.

    ``forward(student, teacher, labels)`` returns a dict of tensors: ``"distill"``, the value per sample of shape (...)
    or as a scalar mean, and any statistics to log, per sample or as a scalar.
    """

    needs_labels: bool = False
    """Whether ``labels`` must be given."""

    gamma_argument: Literal["gamma", "temperature"] = "gamma"
    """The argument by which the loss takes the configuration's gamma, if it has that argument: ``gamma``, or
    ``temperature`` as 1/gamma. The latter is for a loss that calls something else ``gamma`` (a weight, say), which is
    then given in ``loss_kwargs``."""

    weighted_matching: bool | None = None
    """True if the loss is ``U D(p_T || q)`` with its ``gamma``, False if it is ``D(p_T || q)``: the kernels that know
    these may then compute it. It speaks for the class that says it alone, since a subclass computes something else."""

    def forward(self, student: Outputs, teacher: Outputs, labels: Tensor | None = None) -> dict[str, Tensor]:
        raise TypeError(f"{type(self).__name__} must define forward(student, teacher, labels).")

    def set_epoch(self, epoch: float) -> None:
        """Hear how many epochs of training are done, 0 at first: the trainer says so before each batch.

        Does nothing here; it is for a loss that changes over training.
        """

    def balanced_beta(self, lam: float, mean_power_sum: float) -> float:
        """The weight at which this loss keeps KD's balance with the labels at λ; the meaning of ``beta="auto"``."""
        raise ValueError(
            f'beta="auto" is defined for the losses that the paper balances with KD (Eq. 19), not for '
            f"{type(self).__name__}: give `beta` as a number."
        )


LOSSES: dict[str, type[LogitLoss]] = {}


def register_loss(name: str) -> Callable[[type[LogitLoss]], type[LogitLoss]]:
    """Class decorator that makes a loss available to configurations as ``name``. Raises ValueError on a taken name."""

    def register(cls: type[LogitLoss]) -> type[LogitLoss]:
        if name in LOSSES or name == "ce":
            raise ValueError(f"A loss named {name!r} is registered already; choose another name for {cls.__name__}.")
        LOSSES[name] = cls
        return cls

    return register


def check_loss_name(name: str) -> str:
    """The name itself, or ValueError with the nearest one if no such loss exists ("ce" means no distillation term)."""
    return check_name("loss", name, ["ce", *LOSSES])


def build_loss(
    name: str, *, gamma: float | None = None, loss_kwargs: Mapping[str, Any] | None = None, **kwargs: Any
) -> LogitLoss:
    """The loss registered as ``name``.

    Args:
        gamma: the configuration's 1/temperature; it reaches the losses that have one, as their
            :attr:`LogitLoss.gamma_argument`, unless they are given that argument themselves.
        loss_kwargs: the loss's own arguments; ``gamma`` here is whatever the loss calls so.
        kwargs: the same, written out.

    Raises:
        ValueError: for an unknown name, an argument the loss does not take or lacks, or a value out of range.
    """
    if check_loss_name(name) == "ce":
        raise ValueError('"ce" is cross-entropy on the labels alone: it has no distillation term to build.')
    cls = LOSSES[name]
    kwargs = {**(loss_kwargs or {}), **kwargs}
    if gamma is not None and cls.gamma_argument in parameters_of(cls):
        kwargs.setdefault(cls.gamma_argument, gamma if cls.gamma_argument == "gamma" else 1.0 / gamma)
    return construct(cls, f"loss {name!r}", "loss_kwargs", kwargs)


class TransformedTeacherLoss(LogitLoss):
    """A loss with the exponent gamma = 1/T of the paper's power transform; logs the teacher's power sum U.

    Args:
        gamma: in (0, 1]. Raises ValueError outside.
    """

    default_gamma: float = 0.8
    """What a configuration takes when it gives neither gamma nor temperature: the paper's value on ImageNet."""

    def __init__(self, gamma: float) -> None:
        super().__init__()
        self.gamma = functional.check_gamma(gamma)

    def extra_repr(self) -> str:
        return f"gamma={self.gamma}"

    def forward(self, student: Outputs, teacher: Outputs, labels: Tensor | None = None) -> dict[str, Tensor]:
        _, teacher_logits = functional.check_logits(student.logits, teacher.logits)
        log_p, log_u = functional.transformed_teacher(teacher_logits, self.gamma)
        power_sum = log_u.exp()
        return {"distill": self.per_sample(student, log_p, power_sum), "power_sum": power_sum}

    def per_sample(self, student: Outputs, log_p: Tensor, power_sum: Tensor) -> Tensor:
        """The loss of each sample, (...), from the transformed teacher log p_T (..., K) and its power sum U (...)."""
        raise TypeError(f"{type(self).__name__} must define per_sample(student, log_p, power_sum).")


@register_loss("kd")
class KD(TransformedTeacherLoss):
    """``T² D(p_T || q_T)``; see :func:`hf_kd.losses.kd_loss`. The λ form is ``ce_weight=1-λ, beta=λ``."""

    default_gamma = 0.25

    def per_sample(self, student: Outputs, log_p: Tensor, power_sum: Tensor) -> Tensor:
        # log softmax(gamma z) from log q: adding a constant to a row does not change its softmax.
        log_q = (
            student.log_probs if self.gamma == 1.0 else functional.log_probabilities(self.gamma * student.log_probs)
        )
        return functional.divergence(log_p, log_q) / self.gamma**2

    def balanced_beta(self, lam: float, mean_power_sum: float) -> float:
        # T² is inside the loss already: what is left of KD's balance is λ/(1-λ).
        return functional.balanced_beta(lam, temperature=1.0)


@register_loss("ttm")
class TTM(TransformedTeacherLoss):
    """``D(p_T || q)``; see :func:`hf_kd.losses.ttm_loss`."""

    weighted_matching = False

    def per_sample(self, student: Outputs, log_p: Tensor, power_sum: Tensor) -> Tensor:
        return functional.divergence(log_p, student.log_probs)

    def balanced_beta(self, lam: float, mean_power_sum: float) -> float:
        return functional.balanced_beta(lam, 1.0 / self.gamma)


@register_loss("wttm")
class WTTM(TransformedTeacherLoss):
    """``U_gamma(p) D(p_T || q)``; see :func:`hf_kd.losses.wttm_loss`."""

    weighted_matching = True

    def per_sample(self, student: Outputs, log_p: Tensor, power_sum: Tensor) -> Tensor:
        return power_sum * functional.divergence(log_p, student.log_probs)

    def balanced_beta(self, lam: float, mean_power_sum: float) -> float:
        return functional.balanced_beta(lam, 1.0 / self.gamma, mean_power_sum)


@register_loss("dkd")
class DKD(LogitLoss):
    """``T² (alpha TCKD + beta NCKD)``; see :func:`hf_kd.losses.dkd_loss`.

    Logs both parts, with their T² and without weights and warm-up.

    Args:
        alpha, beta: weights of the two parts, at least 0; the configuration's ``beta`` comes on top.
        temperature: ``T > 0``; the configuration's, if it gives one.
        warmup_epochs: over how many epochs the loss grows to its full size: in epoch e, counted from 1, it is
            multiplied by ``min(e / warmup_epochs, 1)``. The authors' CIFAR-100 recipes have 20, their loss in the
            paper has none (0). Without a trainer, say the epoch with :meth:`set_epoch`.

    Raises:
        ValueError: for a value out of range.
    """

    needs_labels = True
    gamma_argument = "temperature"
    default_gamma = 0.25

    def __init__(
        self, alpha: float = 1.0, beta: float = 8.0, temperature: float = 4.0, warmup_epochs: float = 0.0
    ) -> None:
        super().__init__()
        self.alpha = functional.check_weight("alpha", alpha)
        self.beta = functional.check_weight("beta", beta)
        self.temperature = functional.check_positive("temperature", temperature)
        self.warmup_epochs = functional.check_weight("warmup_epochs", warmup_epochs)
        self.warmup = 1.0
        self.set_epoch(0.0)

    def set_epoch(self, epoch: float) -> None:
        """Set ``warmup``, the factor for the epoch that is under way after ``epoch`` epochs (3.5 is the fourth)."""
        # The trainer's epoch is a sum of fractions: 2.9999999 is the start of the fourth.
        current = math.floor(epoch + 1e-6) + 1
        self.warmup = min(current / self.warmup_epochs, 1.0) if self.warmup_epochs else 1.0

    def extra_repr(self) -> str:
        return (
            f"alpha={self.alpha}, beta={self.beta}, temperature={self.temperature}, warmup_epochs={self.warmup_epochs}"
        )

    def forward(self, student: Outputs, teacher: Outputs, labels: Tensor | None = None) -> dict[str, Tensor]:
        tckd, nckd = functional.decoupled(student.logits, teacher.logits, labels, self.temperature)
        return {"distill": self.warmup * (self.alpha * tckd + self.beta * nckd), "tckd": tckd, "nckd": nckd}


@register_loss("dist")
class DIST(LogitLoss):
    """``T² (beta inter + gamma intra)``; see :func:`hf_kd.losses.dist_loss`.

    Logs both parts, with their T² and without weights.

    The value is one number for a batch, over the samples that the student's ``mask`` marks (no padding, no repeats).
    It is what this process has of one batch: correlations do not reach over accumulated batches or over processes,
    whose values are averaged, weighted by their numbers of samples. So 8 x 1 and 2 x 4 (batch x steps) differ here, as
    in the authors' code, and batches of one sample leave nothing of ``intra``.

    Args:
        beta, gamma: weights of inter and intra, at least 0; the configuration's ``beta`` comes on top, its gamma is
            1/temperature and not this one.
        temperature: ``T > 0``; the configuration's, if it gives one.
        eps: 1e-8 as in the authors' code, or 0 for the paper's correlation.

    Raises:
        ValueError: for a value out of range.
    """

    gamma_argument = "temperature"
    default_gamma = 1.0

    def __init__(self, beta: float = 1.0, gamma: float = 1.0, temperature: float = 1.0, eps: float = 1e-8) -> None:
        super().__init__()
        self.beta = functional.check_weight("beta", beta)
        self.gamma = functional.check_weight("gamma", gamma)
        self.temperature = functional.check_positive("temperature", temperature)
        self.eps = functional.check_weight("eps", eps)

    def extra_repr(self) -> str:
        return f"beta={self.beta}, gamma={self.gamma}, temperature={self.temperature}, eps={self.eps}"

    def forward(self, student: Outputs, teacher: Outputs, labels: Tensor | None = None) -> dict[str, Tensor]:
        inter, intra = functional.relations(
            student.logits, teacher.logits, self.temperature, self.eps, mask=student.mask
        )
        return {"distill": self.beta * inter + self.gamma * intra, "inter": inter, "intra": intra}


@register_loss("nkd")
class NKD(LogitLoss):
    """``-p_y log q_y + gamma T² H(p'_T, q'_T)``; see :func:`hf_kd.losses.nkd_loss`.

    Logs both parts, the second with its T² and without gamma.

    Args:
        gamma: weight of the other classes, at least 0; the configuration's gamma is 1/temperature and not this one.
        temperature: ``T > 0``, of the other classes; the configuration's, if it gives one.

    Raises:
        ValueError: for a value out of range.
    """

    needs_labels = True
    gamma_argument = "temperature"
    default_gamma = 1.0

    def __init__(self, gamma: float = 1.0, temperature: float = 1.0) -> None:
        super().__init__()
        self.gamma = functional.check_weight("gamma", gamma)
        self.temperature = functional.check_positive("temperature", temperature)

    def extra_repr(self) -> str:
        return f"gamma={self.gamma}, temperature={self.temperature}"

    def forward(self, student: Outputs, teacher: Outputs, labels: Tensor | None = None) -> dict[str, Tensor]:
        target, others = functional.normalised(
            student.logits, teacher.logits, labels, self.temperature, student.log_probs
        )
        return {"distill": target + self.gamma * others, "target": target, "non_target": others}


class CallableLoss(LogitLoss):
    """A user's own function or module ``f(student_logits, teacher_logits, labels)`` in the place of a named loss.

    It may return a tensor (one value per sample, or a scalar mean over the batch) or a dict with at least "distill".
    A function of two arguments is called without labels.
    """

    def __init__(self, function: Callable[..., Tensor | dict[str, Tensor]]) -> None:
        super().__init__()
        self.function = function
        parameters = inspect.signature(function.forward if isinstance(function, nn.Module) else function).parameters
        # A third parameter with a default of its own (a temperature, say) is not a place for labels.
        wanted = [p for p in parameters.values() if p.name == "labels" or p.default is p.empty]
        positional = [p for p in wanted if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
        variadic = any(p.kind is p.VAR_POSITIONAL for p in wanted)
        self.takes_labels = variadic or len(positional) > 2

    def forward(self, student: Outputs, teacher: Outputs, labels: Tensor | None = None) -> dict[str, Tensor]:
        arguments = (student.logits, teacher.logits) + ((labels,) if self.takes_labels else ())
        value = self.function(*arguments)
        parts = value if isinstance(value, dict) else {"distill": value}
        if "distill" not in parts or not all(isinstance(part, Tensor) for part in parts.values()):
            kinds = ", ".join(f"{key!r}: {type(part).__name__}" for key, part in parts.items())
            given = f"the dict {{{kinds}}}" if isinstance(value, dict) else type(value).__name__
            raise TypeError(
                f"`distillation_loss` returned {given}: return a tensor, one value per sample or their mean, or a "
                "dict of tensors with that under 'distill'."
            )
        return parts


def cross_entropy(
    student: Outputs,
    labels: Tensor,
    *,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Summed cross-entropy on the labels, and over how many samples it was summed.

    Args:
        student: outputs whose ``log_probs`` are (..., K).
        labels: class indices (...), where ``ignore_index`` marks samples without a label; or probabilities (..., K).
        ignore_index: the label that means "no label".
        label_smoothing: in [0, 1); mixes the target with the uniform distribution.
        mask: (...) bool, False for samples that do not count, whatever their label.

    Returns:
        ``(sum, count)``, both scalars; an all-unlabelled batch gives (0, 0).

    Raises:
        ValueError: if the labels have neither of the two shapes.
    """
    log_probs = student.log_probs
    wanted = log_probs.shape if labels.dtype.is_floating_point else log_probs.shape[:-1]
    if labels.shape != wanted:
        raise ValueError(
            f"Labels of shape {tuple(labels.shape)} and type {labels.dtype} do not go with logits of shape "
            f"{tuple(log_probs.shape)}: give integer classes of shape (...) or probabilities of shape (..., classes)."
        )
    if labels.dtype.is_floating_point:
        products = labels.to(log_probs.dtype) * log_probs
        total = -(products if mask is None else torch.where(mask[..., None], products, 0.0)).sum()
        mask = torch.ones_like(log_probs[..., 0], dtype=torch.bool) if mask is None else mask
    else:
        labels = labels if mask is None else labels.masked_fill(~mask, ignore_index)
        mask = labels != ignore_index
        total = F.nll_loss(log_probs.flatten(0, -2), labels.flatten(), ignore_index=ignore_index, reduction="sum")
    if label_smoothing:
        uniform = torch.where(mask, -log_probs.mean(dim=-1), 0.0).sum()
        total = (1.0 - label_smoothing) * total + label_smoothing * uniform
    return total, mask.sum()
