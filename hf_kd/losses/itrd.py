"""Information theoretic representation distillation (ITRD)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .feature import FeatureLoss, check_choice, check_not_negative, register_feature_loss, width
from .functional import check_positive


@register_feature_loss("itrd")
class ITRD(FeatureLoss):
    """Information theoretic representation distillation: ``beta_corr · correlation + beta_mi · mutual information``.

    Miles, Lopez-Rodriguez and Mikolajczyk, "Information Theoretic Representation Distillation", BMVC 2022 (arXiv
    2112.00459), as in the authors' code. With S (B, D) the student's features after a linear layer, and T (B, D) the
    teacher's::

        correlation: c_d = (1/B) sum_b S_bd T_bd, columns standardised with the unbiased deviation
                     log2 sum_d |c_d - 1|^(2 alpha_it)
        mutual:      G = inner products of the normalised rows of S, H likewise of T
                     sum (G / tr G)² - sum (G∘H / tr G∘H)²

    The correlation term always has the linear layer, the mutual term only if the widths differ, as in the code. The
    code's mutual term has no logarithms; with ``form="paper"`` it is in Rényi entropies of order 2, as the paper has
    it: ``log2 sum (...)² - log2 sum (...)²``. A column that is constant over the batch, for which the code divides 0
    by 0, has no correlation here (c_d = 0); nor has a batch of one sample.

    All of it is about a batch: the statistics are those of each process's own.

    Args:
        alpha_it: order of the correlation term; 1.01 for networks of one architecture, 1.5 for different ones.
        beta_corr, beta_mi: the weights.
        form: "code" or "paper".
        student_features, teacher_features: one name each; features (B, ...) are flattened.

    :meth:`forward` returns scalars: ``"feature"``, and its unweighted parts as ``"itrd_correlation"`` and
    ``"itrd_mutual"``, the latter only if ``beta_mi`` is not 0.

    Raises:
        ValueError: for a value out of range.
    """

    def __init__(
        self,
        alpha_it: float = 1.01,
        beta_corr: float = 2.0,
        beta_mi: float = 1.0,
        form: str = "code",
        student_features: Any = None,
        teacher_features: Any = None,
    ) -> None:
        super().__init__(student_features=student_features, teacher_features=teacher_features)
        self.alpha_it = check_positive("alpha_it", alpha_it)
        self.beta_corr = check_not_negative("beta_corr", beta_corr)
        self.beta_mi = check_not_negative("beta_mi", beta_mi)
        self.form = check_choice("form", form, ("code", "paper"))

    def extra_repr(self) -> str:
        return f"alpha_it={self.alpha_it}, beta_corr={self.beta_corr}, beta_mi={self.beta_mi}, form={self.form}"

    def create(
        self,
        student_shapes: list[torch.Size],
        teacher_shapes: list[torch.Size],
        *,
        num_samples: int | None,
        sample_labels: Tensor | None,
    ) -> None:
        self.embedding = nn.Linear(width(student_shapes[0]), width(teacher_shapes[0]))

    def compute(
        self, student: list[Tensor], teacher: list[Tensor], labels: Tensor | None, index: Tensor | None, **given: Any
    ) -> dict[str, Tensor]:
        own, theirs = student[0].flatten(1), teacher[0].flatten(1)
        embedded = self.embedding(own)
        correlation = self.correlation(embedded, theirs)
        parts = {"feature": self.beta_corr * correlation, "itrd_correlation": correlation.detach()}
        if self.beta_mi:
            mutual = self.mutual(own if own.shape == theirs.shape else embedded, theirs)
            parts["feature"] = parts["feature"] + self.beta_mi * mutual
            parts["itrd_mutual"] = mutual.detach()
        return parts

    def correlation(self, student: Tensor, teacher: Tensor) -> Tensor:
        """The correlation term of features (B, D) and (B, D), a scalar."""
        products = _standardised(student) * _standardised(teacher)
        distances = (products.mean(dim=0) - 1.0).square()
        return torch.log2(distances.pow(self.alpha_it).sum())

    def mutual(self, student: Tensor, teacher: Tensor) -> Tensor:
        """The mutual term of features (B, D) and (B, D'), a scalar."""
        own, theirs = _gram(student), _gram(teacher)
        alone, joint = _purity(own), _purity(own * theirs)
        return alone - joint if self.form == "code" else torch.log2(alone) - torch.log2(joint)


def _standardised(features: Tensor) -> Tensor:
    centred = features - features.mean(dim=0)
    if len(features) < 2:
        return centred
    deviation = features.std(dim=0)
    return centred / torch.where(deviation == 0, 1.0, deviation)


def _gram(features: Tensor) -> Tensor:
    rows = F.normalize(features)
    return rows @ rows.T


def _purity(gram: Tensor) -> Tensor:
    """The sum of squares of a Gram matrix of trace 1: 2 to the minus Rényi entropy of order 2."""
    return (gram / gram.trace()).square().sum()
