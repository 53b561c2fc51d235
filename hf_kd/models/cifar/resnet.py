"""ResNets (He et al. 2016, arXiv:1512.03385) and wide ResNets (Zagoruyko and Komodakis 2016, arXiv:1605.07146)."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from .blocks import Add, CifarNet, Residual, Stage, conv


class ResNet(CifarNet):
    """Stages ``layer1``, ``layer2``, ... of blocks of two convolutions.

    Features: ``act1`` and the stages; before activation ``layerN.<last block>.join``.

    Args:
        layers: blocks in each stage.
        widths: channels of the stem, and of each stage; each stage but the first halves the image.
    """

    shortcut_name = "downsample"
    expansion = 1

    def __init__(self, layers: Sequence[int], widths: Sequence[int] = (16, 16, 32, 64), **options: Any) -> None:
        super().__init__(**options)
        channels = widths[0]
        self.add_stem(channels)
        for number, (blocks, width) in enumerate(zip(layers, widths[1:], strict=True), start=1):
            units = []
            for position in range(blocks):
                stride = 2 if number > 1 and position == 0 else 1
                units.append(self._block(channels, width, stride))
                channels = width * self.expansion
            self.add_step(f"layer{number}", Stage(*units))
            self.add_feature(channels, reduction=2 ** (number - 1), preact=f"layer{number}.{blocks - 1}.join")
        self.add_head(channels)
        self.init_weights()

    def _block(self, in_chans: int, width: int, stride: int) -> Residual:
        out_chans = width * self.expansion
        shortcut = None
        if stride > 1 or in_chans != out_chans:
            shortcut = nn.Sequential(conv(in_chans, out_chans, 1, stride=stride), nn.BatchNorm2d(out_chans))
        return Residual(
            self._convolutions(in_chans, width, stride), shortcut=shortcut, shortcut_name=self.shortcut_name
        )

    def _convolutions(self, in_chans: int, width: int, stride: int) -> list[nn.Conv2d]:
        return [conv(in_chans, width, stride=stride), conv(width, width)]


class BottleneckResNet(ResNet):
    """The same of bottleneck blocks: 1×1, 3×3, and 1×1 to four times the width.

    The checkpoints of the CRD protocol call its shortcut and classifier otherwise.
    """

    classifier_name = "linear"
    num_stages = 4
    pool_size = (4, 4)
    shortcut_name = "shortcut"
    expansion = 4

    def _convolutions(self, in_chans: int, width: int, stride: int) -> list[nn.Conv2d]:
        return [conv(in_chans, width, 1), conv(width, width, stride=stride), conv(width, width * self.expansion, 1)]


class PreActBlock(nn.Module):
    """Normalised and activated before each of two convolutions; the sum is neither.

    Where the channels change, the shortcut starts after the first activation.
    """

    def __init__(self, in_chans: int, out_chans: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_chans)
        self.act1 = nn.ReLU()
        self.conv1 = conv(in_chans, out_chans, stride=stride)
        self.bn2 = nn.BatchNorm2d(out_chans)
        self.act2 = nn.ReLU()
        self.conv2 = conv(out_chans, out_chans)
        self.convShortcut = None if in_chans == out_chans else conv(in_chans, out_chans, 1, stride=stride)
        self.join = Add()

    def forward(self, x: Tensor) -> Tensor:
        activated = self.act1(self.bn1(x))
        branch = self.conv2(self.act2(self.bn2(self.conv1(activated))))
        return self.join(branch, x if self.convShortcut is None else self.convShortcut(activated))


class WideResNet(CifarNet):
    """Three stages ``block1`` to ``block3`` of :class:`PreActBlock`.

    Features: ``conv1`` and the stages, which end in a sum; with their normalisation, before activation, they are
    ``block2.layer.0.bn1``, ``block3.layer.0.bn1`` and ``bn1``.

    Args:
        depth: convolutions from the stem to the last block, and the classifier: 6 n + 4.
        width: by which the channels of the stages are multiplied.
    """

    def __init__(self, depth: int, width: int, **options: Any) -> None:
        super().__init__(**options)
        blocks, channels = (depth - 4) // 6, 16
        self.add_step("conv1", conv(self.in_chans, channels))
        self.add_feature(channels, reduction=1)
        for number, out_chans in enumerate((16 * width, 32 * width, 64 * width), start=1):
            units = []
            for position in range(blocks):
                units.append(PreActBlock(channels, out_chans, stride=2 if number > 1 and position == 0 else 1))
                channels = out_chans
            self.add_step(f"block{number}", nn.Sequential(OrderedDict(layer=Stage(*units))))
            following = f"block{number + 1}.layer.0.bn1" if number < 3 else "bn1"
            self.add_feature(channels, reduction=2 ** (number - 1), preact=following)
        self.add_step("bn1", nn.BatchNorm2d(channels))
        self.add_step("act1", nn.ReLU())
        self.add_head(channels)
        self.init_weights(zero_bias=True)
