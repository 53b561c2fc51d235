"""Feature distillation for vision transformers (ViTKD)."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from .feature import FeatureLoss, check_not_negative, register_feature_loss


@register_feature_loss("vitkd")
class ViTKD(FeatureLoss):
    """ViTKD: mimic the first layers of a vision transformer, and generate the last from a masked one.

    Yang et al., "ViTKD: Practical Guidelines for ViT Feature Knowledge Distillation" (arXiv 2209.02432), as in the
    authors' code (cls_KD). Of the patch tokens (N, D) of a sample, the student s and the teacher t, those of all
    features but the last are mimicked, and those of the last are generated::

        mimicking:  alpha · sum over layers, tokens, dimensions (align2_i(s_i) - t_i)²
        generation: beta / mask_ratio · sum over masked tokens, dimensions (conv(relu(conv(masked(align(s))))) - t)²

    Sums over tokens and dimensions, and a mean over the samples alone: alpha and beta are small for that reason. Of
    the N tokens of the last layer ``int(N · (1 - mask_ratio))`` random ones stay and a trained token, at first zero,
    takes the place of the others; the convolutions, 3×3 with padding, see them as a square image. The linear layers
    that align widths are there only where widths differ.

    Args:
        alpha, beta: weights of the two parts.
        mask_ratio: the share of tokens that are masked, in (0, 1).
        student_features, teacher_features: names of features (B, N, D), two or more; by default of timm's vision
            transformers: the first two blocks, and the last after the final norm.

    :meth:`forward` takes ``noise`` (B, N), of whose numbers the smallest stay, in place of what it would draw. It
    returns ``"feature"`` (B,), and its weighted parts as ``"vitkd_mimicking"`` and ``"vitkd_generation"`` (B,).

    Raises:
        ValueError: for a value out of range.
    """

    default_features = ("blocks.0@patches", "blocks.1@patches", "norm@patches")
    fewest_features = 2
    most_features = None

    def __init__(
        self,
        alpha: float = 3e-5,
        beta: float = 3e-6,
        mask_ratio: float = 0.5,
        student_features: Any = None,
        teacher_features: Any = None,
    ) -> None:
        super().__init__(student_features=student_features, teacher_features=teacher_features)
        self.alpha = check_not_negative("alpha", alpha)
        self.beta = check_not_negative("beta", beta)
        if not 0.0 < mask_ratio < 1.0:
            raise ValueError(f"`mask_ratio` must be in (0, 1), got {mask_ratio!r}: some tokens stay, and some do not.")
        self.mask_ratio = mask_ratio

    def extra_repr(self) -> str:
        return f"alpha={self.alpha}, beta={self.beta}, mask_ratio={self.mask_ratio}"

    def create(
        self,
        student_shapes: list[torch.Size],
        teacher_shapes: list[torch.Size],
        *,
        num_samples: int | None,
        sample_labels: Tensor | None,
    ) -> None:
        pairs = list(zip(student_shapes, teacher_shapes, strict=True))
        for (own, theirs), name in zip(pairs, self.student_features, strict=True):
            if len(own) != 3 or len(theirs) != 3 or own[1] != theirs[1]:
                raise ValueError(
                    "ViTKD compares tokens (batch, tokens, width), as many of both networks, got the shapes "
                    f"{tuple(own)} of the student's {name!r} and {tuple(theirs)} of the teacher's: choose features of "
                    "vision transformers with patches of one size, and images of one size."
                )
        tokens, wide = teacher_shapes[-1][1:]
        if math.isqrt(tokens) ** 2 != tokens:
            raise ValueError(
                f"ViTKD sees the tokens of {self.student_features[-1]!r} as a square image, and there are {tokens}: "
                "leave out those that are not patches ('name@patches'), and use square images."
            )
        *low, high = [_aligned(own[2], theirs[2]) for own, theirs in pairs]
        self.align2 = nn.ModuleList(low)
        self.align = high
        self.mask_token = nn.Parameter(torch.zeros(1, 1, wide))
        self.generation = nn.Sequential(
            nn.Conv2d(wide, wide, kernel_size=3, padding=1), nn.ReLU(), nn.Conv2d(wide, wide, kernel_size=3, padding=1)
        )

    def compute(
        self,
        student: list[Tensor],
        teacher: list[Tensor],
        labels: Tensor | None,
        index: Tensor | None,
        noise: Tensor | None = None,
        **given: Any,
    ) -> dict[str, Tensor]:
        layers = zip(self.align2, student[:-1], teacher[:-1], strict=True)
        distances = [(align(own) - theirs).square().sum(dim=(1, 2)) for align, own, theirs in layers]
        mimicking = self.alpha * torch.stack(distances).sum(dim=0)
        tokens = self.align(student[-1])
        mask = self.mask(self.draw_noise(tokens) if noise is None else noise)[..., None]
        generated = self._generate(torch.where(mask, self.mask_token, tokens))
        missed = torch.where(mask, (generated - teacher[-1]).square(), 0.0).sum(dim=(1, 2))
        generation = self.beta / self.mask_ratio * missed
        return {
            "feature": mimicking + generation,
            "vitkd_mimicking": mimicking.detach(),
            "vitkd_generation": generation.detach(),
        }

    def _generate(self, tokens: Tensor) -> Tensor:
        images = tokens.transpose(1, 2).unflatten(2, (math.isqrt(tokens.shape[1]), -1))
        return self.generation(images).flatten(2).transpose(1, 2)

    def draw_noise(self, tokens: Tensor) -> Tensor:
        """Random numbers in [0, 1) for tokens (B, N, D) of the present call, (B, N)."""
        noise = torch.empty(tokens.shape[:2])
        for row, generator in zip(noise, self.generators(len(noise), noise.device), strict=True):
            row.uniform_(generator=generator)
        return noise.to(tokens.device)

    def mask(self, noise: Tensor) -> Tensor:
        """Which tokens are masked, (B, N) bool: all but the smallest numbers of each row of ``noise`` (B, N)."""
        kept = int(noise.shape[1] * (1.0 - self.mask_ratio))
        return noise.argsort(dim=1, stable=True).argsort(dim=1) >= kept


def _aligned(own: int, theirs: int) -> nn.Module:
    return nn.Identity() if own == theirs else nn.Linear(own, theirs)
