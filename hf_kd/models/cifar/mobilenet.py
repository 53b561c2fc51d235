"""MobileNetV2 of half width (Sandler et al. 2018, arXiv:1801.04381), as the CRD protocol has it for 32 × 32 images."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from .blocks import Add, CifarNet, Stage, conv


# Expansion, channels at full width, blocks, stride of the first block; one line a stage.
_STAGES = (
    (1, 16, 1, 1),
    (6, 24, 2, 1),
    (6, 32, 3, 2),
    (6, 64, 4, 2),
    (6, 96, 3, 1),
    (6, 160, 3, 2),
    (6, 320, 1, 1),
)
_FEATURES = (1, 2, 4, 6)


def _conv_norm(in_chans: int, out_chans: int, kernel: int = 1, *, stride: int = 1, groups: int = 1) -> list[nn.Module]:
    return [conv(in_chans, out_chans, kernel, stride=stride, groups=groups), nn.BatchNorm2d(out_chans), nn.ReLU()]


class InvertedResidual(nn.Module):
    """Wider, one filter for each channel, narrower again without activation; added to its input where shapes agree."""

    def __init__(self, in_chans: int, out_chans: int, stride: int, expansion: int) -> None:
        super().__init__()
        wide = in_chans * expansion
        self.conv = nn.Sequential(
            *_conv_norm(in_chans, wide),
            *_conv_norm(wide, wide, 3, stride=stride, groups=wide),
            *_conv_norm(wide, out_chans)[:-1],
        )
        self.join = Add() if stride == 1 and in_chans == out_chans else None

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x) if self.join is None else self.join(self.conv(x), x)


class MobileNetV2(CifarNet):
    """A stem of stride 2, seven stages ``blocks.0`` to ``blocks.6``, and 1280 channels from ``conv2``.

    Features: ``conv1``, ``blocks.1``, ``blocks.2``, ``blocks.4``, ``blocks.6``, all of them also those before
    activation: the blocks end without one.

    Args:
        width: by which the channels of all but ``conv2`` are multiplied.
    """

    first_conv = "conv1.0"
    classifier_name = "classifier.0"
    num_stages = 4
    pool_size = (2, 2)

    def __init__(self, width: float, **options: Any) -> None:
        super().__init__(**options)
        channels, reduction, last = int(32 * width), 2, 1280
        self.add_step("conv1", nn.Sequential(*_conv_norm(self.in_chans, channels, 3, stride=2)))
        self.add_feature(channels, reduction)
        self.blocks = nn.ModuleList()
        for number, (expansion, full, blocks, stride) in enumerate(_STAGES):
            units = []
            for position in range(blocks):
                out_chans = int(full * width)
                units.append(InvertedResidual(channels, out_chans, stride if position == 0 else 1, expansion))
                channels = out_chans
            reduction *= stride
            self.add_step(f"blocks.{number}", Stage(*units))
            if number in _FEATURES:
                self.add_feature(channels, reduction)
        self.add_step("conv2", nn.Sequential(*_conv_norm(channels, last)))
        self.classifier = nn.Sequential()
        self.add_head(last)
        self.init_weights(linear_std=0.01, zero_bias=True)
