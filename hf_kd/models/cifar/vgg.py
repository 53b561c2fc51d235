"""VGG with BatchNorm and one linear layer (Simonyan and Zisserman 2015, arXiv:1409.1556)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from .blocks import CifarNet, Stage, conv


class PoolOfLarge(nn.MaxPool2d):
    """Pools the maps of 64 × 64 images, which are 8 high after three poolings, and leaves those of 32 × 32 alone."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) if x.shape[-2] == 8 else x


class VGG(CifarNet):
    """Stages ``block0`` to ``block4`` of 3×3 convolutions (with biases, as published), pooled in between.

    Features: ``act0`` to ``act4``; before activation ``block1`` to ``block4``.

    Args:
        layers: convolutions in each of the five stages.
    """

    first_conv = "block0.0"
    classifier_name = "classifier"
    num_stages = 4
    pool_size = (4, 4)

    def __init__(self, layers: Sequence[int], **options: Any) -> None:
        super().__init__(**options)
        channels = self.in_chans
        for number, (convolutions, width) in enumerate(zip(layers, (64, 128, 256, 512, 512), strict=True)):
            units: list[nn.Module] = []
            for _ in range(convolutions):
                units += [conv(channels, width, bias=True), nn.BatchNorm2d(width), nn.ReLU()]
                channels = width
            self.add_step(f"block{number}", Stage(*units[:-1], as_one=True))
            self.add_step(f"act{number}", units[-1])
            # The protocol has no pre-activation of the first.
            self.add_feature(channels, reduction=2 ** min(number, 3), preact=f"block{number}" if number else None)
            if number < 4:
                self.add_step(f"pool{number}", nn.MaxPool2d(2) if number < 3 else PoolOfLarge(2))
        self.add_head(channels)
        self.init_weights(linear_std=0.01, zero_bias=True)
