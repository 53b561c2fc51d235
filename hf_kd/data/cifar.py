"""CIFAR-10 and CIFAR-100 in memory, from any form they come in, with the protocol's augmentation a batch at a time.

Crop and flip work on a whole batch of bytes, so that a loader keeps up with networks that take a few milliseconds a
step; see tests/benchmarks/data_loading.py.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import pad
from torchvision.transforms.v2.functional import pil_to_tensor

from ..labels import IGNORE_INDEX
from ..models.cifar import CIFAR100_MEAN, CIFAR100_STD
from ..text import some
from .images import HubImageDataset, ImageFolderDataset, load_split
from .in_memory import InMemoryDataset, channel_statistics, crop, crop_places
from .plain_pickle import read_plain_pickle
from .views import view_seed


CIFAR_SIZE = 32
_BYTES = 3 * CIFAR_SIZE * CIFAR_SIZE  # of one picture: red, green, blue, each row by row


class CifarImages(NamedTuple):
    """One split. `images`: uint8 (N, 3, 32, 32), RGB. `labels`: int64 (N,). `class_names`: in the labels' order."""

    images: Tensor
    labels: Tensor
    class_names: list[str]


# The forms that CIFAR comes in ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Original:
    """One of the four archives of the data's authors: the folder that it unpacks to and the files in there."""

    folder: str
    splits: dict[str, tuple[str, ...]]
    names: str
    read: Callable[[Path], tuple[np.ndarray, np.ndarray]]
    read_names: Callable[[Path], list[str]]

    @property
    def files(self) -> set[str]:
        return {*self.splits["train"], *self.splits["test"], self.names}


def load_cifar(
    source: str | os.PathLike = "uoft-cs/cifar100",
    *,
    split: str = "train",
    image_column: str = "img",
    label_column: str | None = None,
    class_names: Sequence[str] | None = None,
) -> CifarImages:
    """One split of CIFAR-10, CIFAR-100 (with its fine labels) or a data set in one of their forms.

    `source`: a data set's id on the Hub, or a local folder, which may be

    - what an archive of the data's authors unpacks to, the "python" or the "binary" version, or the folder around it;
    - a folder with `train` and `test` (or `val`), each with a folder of pictures per class;
    - a folder of Parquet files, such as a copy of a Hub repository.

    `split`: "train" or "test". `image_column`, `label_column`: of Parquet and the Hub; with `label_column=None`
    `fine_label` if there is such a column, else `label`. `class_names`: the classes in the labels' order, in place of
    those that the source tells; where it tells none they are called by their numbers.

    The pickles of the "python" version are read as plain data: nothing in them is run. Subsets of one's own are fine,
    pictures of other sizes are not.

    Raises ValueError for any other `split` and for files that are missing, damaged or of another form,
    FileNotFoundError for a folder that does not exist, and NotADirectoryError for a file, an archive for instance.
    """
    if split not in ("train", "test"):
        raise ValueError(f'`split` must be "train" or "test", got {split!r}.')
    names = None if class_names is None else list(class_names)
    path = Path(source).expanduser()
    if not path.exists():
        # A Hub id is a name, or an owner and a name.
        if not isinstance(source, str) or not re.fullmatch(r"\w[\w.-]*(/[\w.-]+)?", source):
            raise FileNotFoundError(
                f"The CIFAR folder {path} does not exist; give a folder that holds the data, or a data set's id on "
                'the Hub such as "uoft-cs/cifar100".'
            )
        return _read_table(source, split, image_column, label_column, names)
    if not path.is_dir():
        raise NotADirectoryError(
            _unpack(path) if _is_archive(path) else f"{path} is a file; give the folder that holds the CIFAR data."
        )
    originals = _originals(path)
    if len(originals) > 1:
        raise ValueError(
            f"{path} holds CIFAR in several forms ({', '.join(str(form.folder) for _, form in originals)}): give the "
            "folder of one of them."
        )
    if originals:
        return _read_original(*originals[0], split, names)
    folders = {name for name in ("train", "test", "val") if _class_folders(path / name)}
    if folders:
        return _read_folders(path, folders, split, names)
    if next(path.rglob("*.parquet"), None) is not None:
        return _read_table(str(path), split, image_column, label_column, names)
    raise ValueError(_unknown(path))


def _originals(path: Path) -> list[tuple[Path, _Original]]:
    """The authors' forms that are in a folder, or failing that in folders of their names within it."""

    def holds(folder: Path, form: _Original) -> bool:
        return any((folder / name).is_file() for name in form.files)

    here = [(path, form) for form in _ORIGINALS if holds(path, form)]
    return here or [(path / form.folder, form) for form in _ORIGINALS if holds(path / form.folder, form)]


def _class_folders(folder: Path) -> list[str]:
    return sorted(entry.name for entry in os.scandir(folder) if entry.is_dir()) if folder.is_dir() else []


def _is_archive(path: Path) -> bool:
    return path.is_file() and path.name.lower().endswith((".tar.gz", ".tgz", ".tar", ".zip", ".gz", ".bz2", ".xz"))


def _unpack(path: Path) -> str:
    command = f"unzip {path.name}" if path.suffix == ".zip" else f"tar -xf {path.name}"
    return f"{path} is an archive: unpack it ({command}) and give the folder that comes out of it."


def _unknown(path: Path) -> str:
    inside = sorted(path.iterdir())
    archive = next(filter(_is_archive, inside), None)
    if archive is not None:
        return _unpack(archive)
    forms = ", ".join(form.folder for form in _ORIGINALS)
    return (
        f"{path} holds no CIFAR data: expected {forms}, folders train and test with one folder of pictures per class, "
        f"or Parquet files; it has {some((entry.name for entry in inside), 10) or 'nothing in it'}."
    )


def _check_labels(labels: np.ndarray, classes: int, where: object) -> None:
    if not len(labels):
        raise ValueError(f"The data set is empty: {where} holds no image.")
    bad = np.flatnonzero(((labels < 0) & (labels != IGNORE_INDEX)) | (labels >= classes))
    if len(bad):
        raise ValueError(
            f"Label {labels[bad[0]]} of image {bad[0]} in {where} is out of range: there are {classes} classes, so "
            f"labels must be in 0..{classes - 1}, or {IGNORE_INDEX} where there is none."
        )


# The authors' own files -------------------------------------------------------------------------------------------


def _read_original(folder: Path, form: _Original, split: str, names: list[str] | None) -> CifarImages:
    needed = [*form.splits[split], *([form.names] if names is None else [])]
    missing = [name for name in needed if not (folder / name).is_file()]
    if missing:
        there = some(sorted(entry.name for entry in folder.iterdir()), 10)
        raise ValueError(
            f"{folder} lacks {', '.join(missing)} (it has {there}): the {split} split of {form.folder} needs "
            f"{', '.join(needed)}."
        )
    names = form.read_names(folder / form.names) if names is None else names
    parts = []
    for name in form.splits[split]:
        images, labels = form.read(folder / name)
        _check_labels(labels, len(names), folder / name)
        parts.append((images, labels))
    images, labels = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
    return CifarImages(torch.from_numpy(images).view(-1, 3, CIFAR_SIZE, CIFAR_SIZE), torch.from_numpy(labels), names)


# torchvision's CIFAR100 reads these with plain `pickle.load`, which runs what a file says, and refuses every file
# whose checksum is not the original's, subsets of one's own among them.


def _pickled(label_key: str) -> Callable[[Path], tuple[np.ndarray, np.ndarray]]:
    def read(path: Path) -> tuple[np.ndarray, np.ndarray]:
        content = read_plain_pickle(path)
        missing = [key for key in ("data", label_key) if key not in content]
        if missing:
            raise ValueError(f"{path} has no entry {missing[0]!r}: it has {some(content, 10) or 'none'}.")
        images = content["data"]
        if not isinstance(images, np.ndarray) or images.dtype != np.uint8 or images.shape[1:] != (_BYTES,):
            given = f"{images.dtype} {images.shape}" if isinstance(images, np.ndarray) else f"a {_kind(images)}"
            raise ValueError(
                f"'data' in {path} must be an array of uint8 (N, {_BYTES}), one 32 × 32 RGB image a row, got {given}."
            )
        given = content[label_key]
        if isinstance(given, list) and not all(type(label) is int for label in given):
            odd = next(_kind(label) for label in given if type(label) is not int)
            raise ValueError(f"{label_key!r} in {path} must hold one whole number for each image, it holds a {odd}.")
        labels = np.asarray(given)
        if labels.shape != images.shape[:1] or (len(labels) and labels.dtype.kind not in "iu"):
            count = f"{len(labels)} of them" if labels.ndim == 1 else f"a {_kind(given)}"
            raise ValueError(
                f"{label_key!r} in {path} must hold one whole number for each of the {len(images)} images, "
                f"got {count}."
            )
        return images, labels.astype(np.int64)

    return read


def _pickled_names(key: str) -> Callable[[Path], list[str]]:
    def read(path: Path) -> list[str]:
        names = read_plain_pickle(path).get(key)
        names = [name.decode("latin1") if isinstance(name, bytes) else name for name in names or []]
        if not names or not all(isinstance(name, str) for name in names):
            raise ValueError(f"{path} has no list of names {key!r}: get the file again, or give `class_names`.")
        return names

    return read


def _kind(value: object) -> str:
    return type(value).__name__


def _records(label_bytes: int) -> Callable[[Path], tuple[np.ndarray, np.ndarray]]:
    size = label_bytes + _BYTES

    def read(path: Path) -> tuple[np.ndarray, np.ndarray]:
        content = np.fromfile(path, dtype=np.uint8)
        if len(content) % size:
            raise ValueError(
                f"{path} is damaged: its {len(content)} bytes are not a whole number of records of {size} "
                f"({label_bytes} of labels and {_BYTES} of pixels). Get the file again."
            )
        records = content.reshape(-1, size)
        # CIFAR-100 has the coarse label before the fine one.
        return records[:, label_bytes:], records[:, label_bytes - 1].astype(np.int64)

    return read


def _lines(path: Path) -> list[str]:
    try:
        names = [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except UnicodeDecodeError:
        names = []
    if not names:
        raise ValueError(
            f"{path} must be a text file with one class name a line: get it again, or give `class_names`."
        )
    return names


_BATCHES = tuple(f"data_batch_{number}" for number in range(1, 6))
_ORIGINALS = (
    _Original(
        "cifar-100-python",
        {"train": ("train",), "test": ("test",)},
        "meta",
        _pickled("fine_labels"),
        _pickled_names("fine_label_names"),
    ),
    _Original(
        "cifar-10-batches-py",
        {"train": _BATCHES, "test": ("test_batch",)},
        "batches.meta",
        _pickled("labels"),
        _pickled_names("label_names"),
    ),
    _Original(
        "cifar-100-binary",
        {"train": ("train.bin",), "test": ("test.bin",)},
        "fine_label_names.txt",
        _records(2),
        _lines,
    ),
    _Original(
        "cifar-10-batches-bin",
        {"train": tuple(f"{name}.bin" for name in _BATCHES), "test": ("test_batch.bin",)},
        "batches.meta.txt",
        _records(1),
        _lines,
    ),
)


# Folders of pictures, and tables ----------------------------------------------------------------------------------


def _read_folders(path: Path, folders: set[str], split: str, names: list[str] | None) -> CifarImages:
    name = next((name for name in ([split] if split == "train" else ["test", "val"]) if name in folders), None)
    if name is None:
        wanted = "train" if split == "train" else "test or val"
        raise ValueError(
            f"{path} has no folder {wanted} with one folder of pictures per class, which the {split} split is read "
            f"from; it has {some(sorted(entry.name for entry in path.iterdir()), 10)}."
        )
    # Where the test folder lacks a class, the numbers are still those of the training folder.
    data = ImageFolderDataset(path / name, pil_to_tensor, class_names=names or _class_folders(path / "train") or None)
    return _decoded(data, data.paths, data.class_names)


def _read_table(
    source: str, split: str, image_column: str, label_column: str | None, names: list[str] | None
) -> CifarImages:
    table = load_split(source, split=split)
    if label_column is None:
        label_column = "fine_label" if "fine_label" in table.features else "label"
    data = HubImageDataset(
        table,
        pil_to_tensor,
        image_column=image_column,
        label_column=label_column,
        num_classes=None if names is None else len(names),
    )
    return _decoded(data, [f"row {row}" for row in range(len(data))], names or data.class_names)


def _decoded(data: ImageFolderDataset | HubImageDataset, where: Sequence[str], names: list[str] | None) -> CifarImages:
    images = np.empty((len(data), 3, CIFAR_SIZE, CIFAR_SIZE), dtype=np.uint8)
    for number, place in enumerate(where):
        # Not a sample of `data`: to set random generators for each would take thrice as long as to read it.
        image = data.image(number)
        if image.size != (CIFAR_SIZE, CIFAR_SIZE):
            raise ValueError(
                f"The image {place} is {image.width} × {image.height} pixels, and CIFAR's are {CIFAR_SIZE} × "
                f"{CIFAR_SIZE}: resize the images beforehand, by a method of your choice, or leave this one out."
            )
        images[number] = np.asarray(image).transpose(2, 0, 1)
    labels = np.array(data.labels, dtype=np.int64)
    names = list(map(str, range(data.num_classes))) if names is None else names
    return CifarImages(torch.from_numpy(images), torch.from_numpy(labels), names)


# As a data set ----------------------------------------------------------------------------------------------------

_MARGIN = 4
_OFFSETS = 2 * _MARGIN + 1


class CifarDataset(InMemoryDataset):
    """CIFAR in memory, ready for a network: {"pixel_values": float32 (3, 32, 32), "labels": int64, "index": int64}.

    `data`: of [`load_cifar`]; a label of -100 means that there is none. `augment`: the usual training views of CIFAR,
    a 32 × 32 crop of the picture within 4 pixels of black on each side, mirrored in half of the cases. Which of these
    162 views a sample gets depends on (`seed`, epoch, index) alone. `mean`, `std`: of the channels of pixels / 255.

    A `DataLoader` fetches whole batches through `__getitems__`; give it [`collate`] as `collate_fn`.

    Attributes: `class_names`, `num_classes`, `labels` (int64 tensor (N,)), `images` (uint8 tensor (N, 3, 32, 32)).

    Raises ValueError where shapes or types are wrong, the data set is empty or labels are out of range.
    """

    def __init__(
        self,
        data: CifarImages,
        *,
        augment: bool = False,
        seed: int = 0,
        mean: Sequence[float] = CIFAR100_MEAN,
        std: Sequence[float] = CIFAR100_STD,
    ) -> None:
        images, labels, class_names = data
        if images.dtype != torch.uint8 or images.shape[1:] != (3, CIFAR_SIZE, CIFAR_SIZE):
            raise ValueError(f"`images` must be uint8 (N, 3, 32, 32), got {images.dtype} {tuple(images.shape)}.")
        if labels.dtype != torch.int64 or labels.shape != images.shape[:1]:
            raise ValueError(
                f"`labels` must be int64 ({len(images)},), one for each image, got {labels.dtype} "
                f"{tuple(labels.shape)}."
            )
        _check_labels(labels.numpy(), len(class_names), "`data`")
        self._mean, self._std = channel_statistics(mean, std)

        self._init_epoch()
        self.images, self.labels = images, labels
        self.class_names = list(class_names)
        self.num_classes = len(self.class_names)
        self.augment, self.seed = augment, seed
        self._places = _places_of_views()
        self._drawn: tuple[int, Tensor] | None = None

    @property
    def fixed_views(self) -> bool:
        return not self.augment

    def __getitems__(self, indices: Sequence[int]) -> dict[str, Tensor]:
        rows = torch.as_tensor(indices, dtype=torch.int64)
        pixels = self.images.index_select(0, rows)
        if self.augment:
            pixels = crop(pad(pixels, (_MARGIN,) * 4), self._places[self._views()[rows]])
        # The operations of torchvision's ToTensor and Normalize, in their order: the same floats.
        pixel_values = pixels.to(torch.float32).div_(255).sub_(self._mean).div_(self._std)
        return {"pixel_values": pixel_values, "labels": self.labels[rows], "index": rows}

    def _views(self) -> Tensor:
        """Which of the 162 views each sample has in this epoch, (N,)."""
        epoch = self.epoch
        # Drawn for all samples at once, and once an epoch: each is a function of (seed, epoch, index), and cheap.
        if self._drawn is None or self._drawn[0] != epoch:
            generator = torch.Generator().manual_seed(view_seed(self.seed, epoch, 0))
            self._drawn = epoch, torch.randint(0, 2 * _OFFSETS**2, (len(self),), generator=generator)
        return self._drawn[1]

    def image(self, index: int) -> Image.Image:
        """The picture of a sample as 32 × 32 RGB, before augmentation."""
        return Image.fromarray(self.images[index].permute(1, 2, 0).numpy())


def _places_of_views() -> Tensor:
    """Where the pixels of each view lie in the padded picture, (162, 1024).

    View (row * 9 + column) * 2 + mirrored has its upper left corner at that row and column of the padded picture.
    """
    view = torch.arange(2 * _OFFSETS**2)
    top, left, mirrored = view // (2 * _OFFSETS), view // 2 % _OFFSETS, view % 2 == 1
    return crop_places(top, left, mirrored, size=CIFAR_SIZE, padded=CIFAR_SIZE + 2 * _MARGIN)
