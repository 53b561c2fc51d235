"""ShuffleNet V1 (Zhang et al. 2018, arXiv:1707.01083) and V2 (Ma et al. 2018, arXiv:1807.11164) for 32 × 32 images.

Both have a 1×1 stem without stride. Weights start as torch's defaults, as in the CRD protocol.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .blocks import CifarNet, Concat, Residual, Stage, Steps, conv


_STEM = 24


class ShuffleNetV1(CifarNet):
    """Stages ``layer1`` to ``layer3`` of grouped 1×1 convolutions around one filter for each channel.

    The first block of a stage halves the image and puts its pooled input beside its result. Features: ``act1`` and
    the stages; before activation ``layerN.<last block>.join``.

    Args:
        layers: blocks in each stage.
        widths: channels of each stage.
        groups: of the 1×1 convolutions.
    """

    classifier_name = "linear"
    pool_size = (4, 4)

    def __init__(
        self,
        layers: Sequence[int] = (4, 8, 4),
        widths: Sequence[int] = (240, 480, 960),
        groups: int = 3,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        channels = _STEM
        self.add_stem(channels, kernel=1)
        for number, (blocks, width) in enumerate(zip(layers, widths, strict=True), start=1):
            units = []
            for position in range(blocks):
                # The stem's channels are too few to be grouped.
                first = 1 if channels == _STEM else groups
                made = width - channels if position == 0 else width
                units.append(_grouped(channels, made, first, groups, halve=position == 0))
                channels = width
            self.add_step(f"layer{number}", Stage(*units))
            self.add_feature(channels, reduction=2**number, preact=f"layer{number}.{blocks - 1}.join")
        self.add_head(channels)


def _grouped(in_chans: int, out_chans: int, first: int, groups: int, *, halve: bool) -> Residual:
    inner = out_chans // 4
    return Residual(
        [
            conv(in_chans, inner, 1, groups=first),
            conv(inner, inner, groups=inner, stride=2 if halve else 1),
            conv(inner, out_chans, 1, groups=groups),
        ],
        shortcut=nn.AvgPool2d(3, stride=2, padding=1) if halve else None,
        join=Concat() if halve else None,
        shuffle=first,
    )


class SplitBlock(Steps):
    """Two paths put beside one another and shuffled; either of half the channels, or of all and then half the size.

    ``join`` gives the feature before its activation. The path that only passes what it gets is activated there as the
    other is: it is never negative, since the first block of a stage ends activated.
    """

    def __init__(self, in_chans: int, out_chans: int, *, halve: bool) -> None:
        super().__init__()
        self.halve = halve
        inner = out_chans // 2
        self.first: list[str] = []
        if halve:
            self.first += self.put_conv(1, conv(in_chans, in_chans, groups=in_chans, stride=2), activated=False)
            self.first += self.put_conv(2, conv(in_chans, inner, 1), activated=False)
        number = 3 if halve else 1
        self.second = [
            *self.put_conv(number, conv(in_chans if halve else inner, inner, 1), activated=True),
            *self.put_conv(number + 1, conv(inner, inner, groups=inner, stride=2 if halve else 1), activated=False),
            *self.put_conv(number + 2, conv(inner, inner, 1), activated=False),
        ]
        self.join = Concat()
        self.act = nn.ReLU()
        self.shuffle = nn.ChannelShuffle(2)

    def forward(self, x: Tensor) -> Tensor:
        first, second = (x, x) if self.halve else torch.chunk(x, 2, dim=1)
        return self.shuffle(self.act(self.join(self.run(first, self.first), self.run(second, self.second))))


class ShuffleNetV2(CifarNet):
    """Stages ``layer1`` to ``layer3`` of :class:`SplitBlock`, and ``conv2`` before the pooling.

    Features: ``act1`` and the stages; before activation (and before the channels are shuffled, as in the protocol)
    ``layerN.<last block>.join``.

    Args:
        layers: blocks in each stage.
        widths: channels of each stage and of ``conv2``.
    """

    classifier_name = "linear"
    pool_size = (4, 4)

    def __init__(
        self, layers: Sequence[int] = (4, 8, 4), widths: Sequence[int] = (116, 232, 464, 1024), **options: Any
    ) -> None:
        super().__init__(**options)
        channels = _STEM
        self.add_stem(channels, kernel=1)
        for number, (blocks, width) in enumerate(zip(layers, widths[:-1], strict=True), start=1):
            units = [SplitBlock(channels, width, halve=True)]
            units += [SplitBlock(width, width, halve=False) for _ in range(blocks - 1)]
            channels = width
            self.add_step(f"layer{number}", Stage(*units))
            self.add_feature(channels, reduction=2**number, preact=f"layer{number}.{blocks - 1}.join")
        self.steps += self.put_conv(2, conv(channels, widths[-1], 1), activated=True)
        self.add_head(widths[-1])
