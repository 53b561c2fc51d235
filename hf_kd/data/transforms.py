"""The ImageNet protocol's transforms, thin over torchvision: a PIL image in, a normalised float tensor (3, H, W) out.

Source: the training protocol of arXiv 2402.11148 for ImageNet, which is torchvision's reference: training on
RandomResizedCrop(224) and a horizontal flip, evaluation on the shorter side resized to 256 and the centre 224.
"""

from collections.abc import Sequence

import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torchvision.transforms import InterpolationMode, v2


def _interpolation(name: str) -> InterpolationMode:
    try:
        return InterpolationMode(name)
    except ValueError:
        allowed = ", ".join(repr(mode.value) for mode in InterpolationMode)
        raise ValueError(f"`interpolation` must be one of {allowed}, got {name!r}.") from None


def _to_normalised(mean: Sequence[float], std: Sequence[float]) -> list[v2.Transform]:
    for name, values in (("mean", mean), ("std", std)):
        if len(values) != 3:
            raise ValueError(f"`{name}` must hold 3 numbers (R, G, B), got {list(values)}.")
    if min(std) <= 0:
        raise ValueError(f"`std` must be positive, got {list(std)}.")
    return [v2.PILToTensor(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(list(mean), list(std))]


def _check_sizes(**sizes: int) -> None:
    for name, value in sizes.items():
        if int(value) != value or value < 1:
            raise ValueError(f"`{name}` must be a positive number of pixels, got {value!r}.")


def train_transform(
    size: int = 224,
    *,
    mean: Sequence[float] = IMAGENET_DEFAULT_MEAN,
    std: Sequence[float] = IMAGENET_DEFAULT_STD,
    interpolation: str = "bilinear",
    scale: tuple[float, float] = (0.08, 1.0),
    ratio: tuple[float, float] = (3 / 4, 4 / 3),
    hflip: float = 0.5,
) -> v2.Compose:
    """The protocol's training transform: a random resized crop and a horizontal flip, then normalisation.

    `size`: side of the square view in pixels. `mean`, `std`: of the RGB channels, on a scale of 0 to 1.
    `interpolation`: "bilinear", "bicubic", "nearest", ... (always antialiased, as PIL does). `scale`: range of the
    crop's share of the area. `ratio`: range of width / height. `hflip`: probability of the flip.

    Raises ValueError for an unknown interpolation, a size below 1 or statistics that are not three numbers.
    """
    _check_sizes(size=size)
    crop = v2.RandomResizedCrop(size, scale=scale, ratio=ratio, interpolation=_interpolation(interpolation))
    return v2.Compose([crop, v2.RandomHorizontalFlip(hflip), *_to_normalised(mean, std)])


def eval_transform(
    size: int = 224,
    *,
    resize: int | None = None,
    mean: Sequence[float] = IMAGENET_DEFAULT_MEAN,
    std: Sequence[float] = IMAGENET_DEFAULT_STD,
    interpolation: str = "bilinear",
) -> v2.Compose:
    """The protocol's evaluation transform: shorter side to `resize`, the centre `size` pixels, normalisation.

    `resize` defaults to `size` * 256 // 224, so 256 for 224 (timm's crop_pct of 0.875). The rest is as in
    [`train_transform`].

    Raises ValueError as [`train_transform`] does, and for a `resize` smaller than `size` (the crop would be padded).
    """
    _check_sizes(size=size)
    if resize is None:
        resize = size * 256 // 224
    _check_sizes(resize=resize)
    if resize < size:
        raise ValueError(
            f"`resize` must be at least `size` ({size}), got {resize}: the crop would be padded in black."
        )
    shrink = v2.Resize(resize, interpolation=_interpolation(interpolation))
    return v2.Compose([shrink, v2.CenterCrop(size), *_to_normalised(mean, std)])
