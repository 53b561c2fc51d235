"""The ImageNet protocol's transforms, thin over torchvision: a PIL image in, a normalised float tensor (3, H, W) out.

Or bytes (3, H, W), which are a quarter of that, and which the trainer normalises on the device (`normalize=False`).

Source: the training protocol of arXiv 2402.11148 for ImageNet, which is torchvision's reference: training on
RandomResizedCrop(224) and a horizontal flip, evaluation on the shorter side resized to 256 and the centre 224. What
vision transformers are trained with beyond that (RandAugment, colour jitter, random erasing) is timm's.
"""

from collections.abc import Callable, Sequence

import torch
from PIL import Image
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, create_transform
from timm.data import transforms as timm_transforms
from torchvision import transforms as v1
from torchvision.transforms import InterpolationMode, v2
from torchvision.transforms.v2 import functional


def _interpolation(name: str) -> InterpolationMode:
    try:
        return InterpolationMode(name)
    except ValueError:
        allowed = ", ".join(repr(mode.value) for mode in InterpolationMode)
        raise ValueError(f"`interpolation` must be one of {allowed}, got {name!r}.") from None


def _to_tensor(mean: Sequence[float], std: Sequence[float], normalize: bool) -> list[v2.Transform]:
    for name, values in (("mean", mean), ("std", std)):
        if len(values) != 3:
            raise ValueError(f"`{name}` must hold 3 numbers (R, G, B), got {list(values)}.")
    if min(std) <= 0:
        raise ValueError(f"`std` must be positive, got {list(std)}.")
    if not normalize:
        return [v2.PILToTensor()]
    return [v2.PILToTensor(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(list(mean), list(std))]


_ERASING_MODES = ("pixel", "rand", "const")


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
    auto_augment: str | None = None,
    color_jitter: float = 0.0,
    random_erasing: float = 0.0,
    random_erasing_mode: str = "pixel",
    normalize: bool = True,
) -> Callable[[Image.Image], torch.Tensor]:
    """The protocol's training transform: a random resized crop and a horizontal flip, then normalisation.

    `size`: side of the square view in pixels. `mean`, `std`: of the RGB channels, on a scale of 0 to 1.
    `interpolation`: "bilinear", "bicubic", "nearest", ... (always antialiased, as PIL does). `scale`: range of the
    crop's share of the area. `ratio`: range of width / height. `hflip`: probability of the flip.

    With any of the following it is timm's `create_transform`, as DeiT uses it (arXiv 2012.12877). `auto_augment`: a
    policy in timm's notation, such as "rand-m9-mstd0.5-inc1" for RandAugment. `color_jitter`: strength for brightness,
    contrast and saturation; with `auto_augment` there is none, as in timm. `random_erasing`: probability that a
    rectangle of the normalised view is erased; `random_erasing_mode`: by noise for each pixel ("pixel"), one random
    colour ("rand"), or the mean colour ("const").

    `normalize`: False leaves the pixels as bytes, uint8, for the trainer to normalise on the device by the student's
    own mean and deviation; `mean` and `std` are then for the grey that some policies fill borders with.

    They draw from torch, `random` and numpy; under [`~hf_kd.data.view_rng`], as in the data sets here, a view depends
    on its seed alone.

    Raises ValueError for an unknown interpolation, policy or mode, a size below 1, a strength below 0, a probability
    outside [0, 1], statistics that are not three numbers, or `random_erasing` without normalisation.
    """
    _check_sizes(size=size)
    mode = _interpolation(interpolation)
    to_tensor = _to_tensor(mean, std, normalize)
    for name, value in (("hflip", hflip), ("random_erasing", random_erasing)):
        if not 0 <= value <= 1:
            raise ValueError(f"`{name}` must be a probability, in [0, 1], got {value!r}.")
    if not color_jitter >= 0:
        raise ValueError(f"`color_jitter` must be a number of at least 0, got {color_jitter!r}.")
    if random_erasing_mode not in _ERASING_MODES:
        allowed = ", ".join(map(repr, _ERASING_MODES))
        raise ValueError(f"`random_erasing_mode` must be one of {allowed}, got {random_erasing_mode!r}.")
    if random_erasing and not normalize:
        raise ValueError(
            f"`random_erasing` ({random_erasing}) puts noise into normalised views, which bytes cannot hold: leave "
            "`normalize` at True, or set `random_erasing` to 0."
        )
    if not (auto_augment or color_jitter or random_erasing):
        crop = v2.RandomResizedCrop(size, scale=scale, ratio=ratio, interpolation=mode)
        return v2.Compose([crop, v2.RandomHorizontalFlip(hflip), *to_tensor])
    try:
        return create_transform(
            size,
            is_training=True,
            scale=scale,
            ratio=ratio,
            hflip=hflip,
            color_jitter=color_jitter or None,  # type: ignore[arg-type]  # its hint leaves None out
            auto_augment=auto_augment or None,
            interpolation=interpolation,
            mean=tuple(mean),
            std=tuple(std),
            re_prob=random_erasing,
            re_mode=random_erasing_mode,
            normalize=normalize,
        )
    except (AssertionError, LookupError, ValueError) as error:
        raise ValueError(
            f"`auto_augment` must be a policy that timm knows, such as 'rand-m9-mstd0.5-inc1' or 'original', got "
            f"{auto_augment!r}{f' ({error})' if str(error) else ''}."
        ) from error


def eval_transform(
    size: int = 224,
    *,
    resize: int | None = None,
    mean: Sequence[float] = IMAGENET_DEFAULT_MEAN,
    std: Sequence[float] = IMAGENET_DEFAULT_STD,
    interpolation: str = "bilinear",
    normalize: bool = True,
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
    return v2.Compose([shrink, v2.CenterCrop(size), *_to_tensor(mean, std, normalize)])


# What gives the same view of a picture each time; what is not listed may be random.
_DETERMINISTIC = frozenset(
    {
        *(v1.CenterCrop, v1.ConvertImageDtype, v1.Grayscale, v1.Normalize, v1.PILToTensor, v1.Pad, v1.Resize),
        *(v1.ToTensor, v2.CenterCrop, v2.Grayscale, v2.Identity, v2.Normalize, v2.Pad, v2.PILToTensor, v2.Resize),
        *(v2.RGB, v2.ToDtype, v2.ToImage, v2.ToPureTensor, timm_transforms.ToNumpy, timm_transforms.ToTensor),
        *(timm_transforms.CenterCropOrPad, timm_transforms.MaybePILToTensor, timm_transforms.MaybeToTensor),
    }
)
_DETERMINISTIC_FUNCTIONS = (functional.pil_to_tensor, functional.to_image, v1.functional.to_tensor)


def is_deterministic(transform: Callable[..., object]) -> bool:
    """Whether a transform is known to give the same view of a picture each time.

    It is if torchvision's or timm's resizing, cropping at the centre, conversion and normalisation are all that it
    consists of, or if it says so itself by an attribute `deterministic`. Anything else counts as random.
    """
    if isinstance(transform, (v1.Compose, v2.Compose)):
        return all(is_deterministic(part) for part in transform.transforms)
    return (
        type(transform) in _DETERMINISTIC
        or transform in _DETERMINISTIC_FUNCTIONS
        or getattr(transform, "deterministic", False) is True
    )
