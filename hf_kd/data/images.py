"""Image folders, Hub data sets and Hub streams as torch data sets whose views do not depend on who computes them.

A sample is {"pixel_values": what the transform returns, "labels": int, "index": int}. The transform gets an RGB PIL
image and runs under generators seeded from (seed, epoch, index), see [`~hf_kd.data.views.view_rng`].
"""

import difflib
import io
import operator
import os
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from PIL import Image, ImageOps
from torch.utils.data import Dataset, IterableDataset, get_worker_info
from torchvision.datasets import ImageFolder
from torchvision.datasets.folder import IMG_EXTENSIONS
from transformers.utils import logging

from ..labels import IGNORE_INDEX
from ..text import first_line, some
from .views import EpochMixin, view_rng


logger = logging.get_logger(__name__)


# Pictures ---------------------------------------------------------------------------------------------------------


def to_rgb(image: Image.Image) -> Image.Image:
    """An 8-bit RGB picture of the same size, from a PIL image of any mode.

    16-bit grey is scaled (65535 becomes 255; PIL's own `convert` clips at 255). Transparency is dropped and the
    colours beneath it are kept, as `convert("RGB")` in timm's and transformers' pipelines does, so that training and
    inference see the same pixels. CMYK, palettes, grey and bilevel pictures go through PIL.

    Raises ValueError for 32-bit and float pixels, which have no agreed range.
    """
    mode = image.mode
    if mode == "RGB":
        return image
    if mode.startswith("I") or mode == "F":
        values = np.asarray(image)
        # Some readers hand 16-bit grey out as 32-bit integers.
        if mode == "F" or values.min() < 0 or values.max() > 65535:
            raise ValueError(f"its pixels (PIL mode {mode}) have no agreed range; convert it to 8 or 16 bits")
        # 65535 = 255 * 257; the 128 rounds to the nearest.
        image = Image.fromarray(((values.astype(np.uint32) + 128) // 257).astype(np.uint8))
    elif mode in ("La", "RGBa"):
        image = image.convert({"La": "LA", "RGBa": "RGBA"}[mode])
    elif mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")  # straight to RGB gives the same colours and a warning
    return image.convert("RGB")


def _is_rotated(image: Image.Image) -> bool:
    try:
        return image.getexif().get(0x0112, 1) != 1
    except Exception:  # broken metadata raises nearly anything, and the pixels may be good
        return False


def load_image(source: str | os.PathLike | bytes | Image.Image, name: str | None = None) -> Image.Image:
    """Decode a file, its bytes or an opened PIL image to an upright RGB picture.

    `name` is what error messages call the picture; a path by default. The EXIF orientation is applied, as `datasets`
    and the transformers pipelines do. See [`to_rgb`] for the modes.

    Raises ValueError with the name and the reason where the picture cannot be read.
    """
    if name is None:
        name = str(source) if isinstance(source, (str, os.PathLike)) else "an image"
    try:
        if isinstance(source, Image.Image):
            image = source
        else:
            data = source if isinstance(source, bytes) else Path(source).read_bytes()
            if not data:
                raise ValueError("the file is empty")
            image = Image.open(io.BytesIO(data))
        image.load()
        return to_rgb(ImageOps.exif_transpose(image) if _is_rotated(image) else image)
    except MemoryError:
        raise
    except Exception as error:  # PIL's decoders raise OSError, SyntaxError, struct.error and others
        raise _unreadable(name, error) from error


def _unreadable(name: str, error: Exception | str) -> ValueError:
    if isinstance(error, Image.UnidentifiedImageError):
        reason = "it is not an image in a format that PIL knows"
    elif isinstance(error, OSError) and error.strerror:
        reason = error.strerror
    else:
        reason = str(error) or type(error).__name__
    return ValueError(f"Cannot read image {name}: {reason}. Remove it from the data set or replace it.")


# Data sets held as files or tables --------------------------------------------------------------------------------


class _ImageDataset(EpochMixin, Dataset):
    """What both map-style data sets share; a subclass says how to read one picture and one label."""

    def __init__(self, transform: Callable[[Image.Image], torch.Tensor], seed: int) -> None:
        if not callable(transform):
            raise TypeError(f"`transform` must be callable (a PIL image in, a tensor out), got {transform!r}.")
        self.transform = transform
        self.seed = seed
        self._init_epoch()

    def __len__(self) -> int:
        raise NotImplementedError

    def _read(self, index: int) -> tuple[Image.Image, int]:
        raise NotImplementedError

    def image(self, index: int) -> Image.Image:
        """The RGB picture of a sample before the transform."""
        return self._read(range(len(self))[index])[0]

    def __getitem__(self, index: int) -> dict[str, Any]:
        index = range(len(self))[operator.index(index)]
        image, label = self._read(index)
        with view_rng(self.seed, self.epoch, index):
            pixel_values = self.transform(image)
        return {"pixel_values": pixel_values, "labels": label, "index": index}


class ImageFolderDataset(_ImageDataset):
    """Pictures in one folder per class (`root/class/picture.jpg`), read by torchvision's ImageFolder.

    `transform`: RGB PIL image to tensor. `seed`: with the epoch and the index it fixes each view. `class_names`: the
    classes and their order, from the training folder, so that an evaluation folder that lacks some keeps the
    numbering; by default the folders' names in alphabetical order.

    Attributes: `class_names`, `num_classes`, `labels` (list of int), `paths` (list of str).

    Raises FileNotFoundError for a missing folder, NotADirectoryError for a file, ValueError for a folder without
    class folders, a class folder without images and class folders that `class_names` does not hold. Reading a sample
    raises ValueError with the file's name where the picture is unreadable.
    """

    def __init__(
        self,
        root: str | os.PathLike,
        transform: Callable[[Image.Image], torch.Tensor],
        *,
        seed: int = 0,
        class_names: Sequence[str] | None = None,
    ) -> None:
        super().__init__(transform, seed)
        root = Path(root).expanduser()
        layout = "expected one folder per class with images inside"
        if not root.exists():
            raise FileNotFoundError(f"The image folder {root} does not exist; {layout}.")
        if not root.is_dir():
            raise NotADirectoryError(f"{root} is a file, not an image folder; {layout}.")
        found = sorted(entry.name for entry in os.scandir(root) if entry.is_dir())
        if not found:
            raise ValueError(f"The image folder {root} holds no class folder; {layout}.")
        folder = ImageFolder(root, allow_empty=True)
        filled = set(folder.targets)
        empty = [name for name, number in folder.class_to_idx.items() if number not in filled]
        if empty:
            raise ValueError(
                f"Class folders of {root} that hold no image (a file in {', '.join(IMG_EXTENSIONS)}): "
                f"{_quoted(empty)}; add images or remove them."
            )
        self.class_names = list(folder.classes if class_names is None else class_names)
        unknown = sorted(set(folder.classes) - set(self.class_names))
        if unknown:
            raise ValueError(
                f"Class folders of {root} that are not in `class_names`: {_quoted(unknown)}"
                f"{_near(unknown[0], self.class_names)}; `class_names` has {_quoted(self.class_names)}."
            )
        number = {name: i for i, name in enumerate(self.class_names)}
        self.num_classes = len(self.class_names)
        self.paths = [path for path, _ in folder.samples]
        self.labels = [number[folder.classes[label]] for _, label in folder.samples]

    def __len__(self) -> int:
        return len(self.paths)

    def _read(self, index: int) -> tuple[Image.Image, int]:
        return load_image(self.paths[index]), self.labels[index]


class HubImageDataset(_ImageDataset):
    """A `datasets.Dataset` with a column of images and one of integer labels (Parquet from the Hub, local files, ...).

    `transform`, `seed`: as in [`ImageFolderDataset`]. `image_column`, `label_column`: the columns' names; with
    `label_column=None` every label is -100 (no label), as are missing values in the column. `num_classes`: where the
    column's feature does not say; by default the largest label + 1.

    Attributes: `class_names` (None where the data set has none), `num_classes`, `labels` (int64 array (N,)).

    Raises TypeError for another kind of data set; ValueError for a missing column (with the columns there are), an
    empty data set, a column of another type and labels out of range. Reading a sample raises ValueError with the
    file's name or row where the picture is unreadable.
    """

    def __init__(
        self,
        hf_dataset: datasets.Dataset,
        transform: Callable[[Image.Image], torch.Tensor],
        *,
        image_column: str = "image",
        label_column: str | None = "label",
        seed: int = 0,
        num_classes: int | None = None,
    ) -> None:
        super().__init__(transform, seed)
        if isinstance(hf_dataset, dict):
            raise TypeError(f"Got a dict of splits: choose one of {_quoted(hf_dataset)}.")
        if not isinstance(hf_dataset, datasets.Dataset):
            raise TypeError(f"`hf_dataset` must be a datasets.Dataset, got {type(hf_dataset).__name__}.")
        features = hf_dataset.features
        _check_columns(features, image_column, label_column)
        if len(hf_dataset) == 0:
            raise ValueError("The data set is empty: it has no row.")
        self.class_names, classes = _classes(features, label_column, num_classes)
        columns = [image_column] + ([] if label_column is None else [label_column])
        # Undecoded, so that a broken picture can be told by name; without a format, which would decode or convert.
        rows = hf_dataset.with_format(None).select_columns(columns)
        self._rows = rows.cast_column(image_column, datasets.Image(decode=False))
        self.image_column = image_column
        self.labels = np.full(len(rows), IGNORE_INDEX, dtype=np.int64)
        if label_column is not None:
            column = rows.select_columns([label_column]).with_format("arrow")[:][label_column]
            self.labels = column.cast("int64").fill_null(IGNORE_INDEX).to_numpy()
        self.num_classes = max(int(self.labels.max()) + 1, 0) if classes is None else classes
        bad = np.flatnonzero((self.labels != IGNORE_INDEX) & ((self.labels < 0) | (self.labels >= self.num_classes)))
        if len(bad):
            raise ValueError(
                _out_of_range(self.labels[bad[0]], self.num_classes, f"in row {bad[0]}")
                + (f" {len(bad)} rows are like it." if len(bad) > 1 else "")
            )

    def __len__(self) -> int:
        return len(self.labels)

    def _read(self, index: int) -> tuple[Image.Image, int]:
        value = self._rows[index][self.image_column]
        return _decode(value, f"row {index}"), int(self.labels[index])


# Streams ----------------------------------------------------------------------------------------------------------


class HubImageStream(EpochMixin, IterableDataset):
    """A `datasets.IterableDataset` read as it comes: {"pixel_values", "labels"}, with no index, as a stream has none.

    The view of a sample is a function of (seed, epoch, the file's content): the same for any number of workers and
    ranks and any order. The order is that of `datasets`: with workers or shuffling each reads its own shards.
    Shuffle by `shuffle_buffer` (number of samples held; 0 keeps the stream's order); its order changes with the epoch.
    `num_examples`: the length where it is known; without it `len` raises TypeError and a Trainer needs `max_steps`.
    `on_bad_sample`: "raise" ends the run at an unreadable image; "skip" leaves it out with a warning and counts it in
    `bad_count`. The attribute may be set at any time before iteration. The rest is as in [`HubImageDataset`].

    With several processes accelerate reads the stream on the first and sends the pieces round, or
    (`dispatch_batches=False`) reads it on all and leaves out what belongs to others. Either is right.

    Raises what [`HubImageDataset`] raises; the first row is read at once, so that a wrong column ends a run before it
    starts. Labels are checked row by row. ValueError for another `on_bad_sample`, and while iterating where not one
    of the images can be read.
    """

    # A slot for each worker, since additions of several processes to one number can be lost.
    _SLOTS = 256

    def __init__(
        self,
        hf_dataset: datasets.IterableDataset,
        transform: Callable[[Image.Image], torch.Tensor],
        *,
        image_column: str = "image",
        label_column: str | None = "label",
        seed: int = 0,
        num_classes: int | None = None,
        shuffle_buffer: int = 0,
        num_examples: int | None = None,
        on_bad_sample: str = "raise",
    ) -> None:
        super().__init__()
        if not callable(transform):
            raise TypeError(f"`transform` must be callable (a PIL image in, a tensor out), got {transform!r}.")
        if not isinstance(hf_dataset, datasets.IterableDataset):
            raise TypeError(f"`hf_dataset` must be a datasets.IterableDataset, got {type(hf_dataset).__name__}.")
        if shuffle_buffer < 0:
            raise ValueError(f"`shuffle_buffer` must be a number of samples, at least 0, got {shuffle_buffer}.")
        features = hf_dataset.features
        if features is not None and image_column in features and isinstance(features[image_column], datasets.Image):
            hf_dataset = hf_dataset.cast_column(image_column, datasets.Image(decode=False))
        first = next(iter(hf_dataset), None)
        if first is None:
            raise ValueError("The data set is empty: the stream has no row.")
        _check_columns(features or dict.fromkeys(first), image_column, label_column)
        self.class_names, self.num_classes = _classes(features or {}, label_column, num_classes)
        self.transform, self.seed, self.num_examples = transform, seed, num_examples
        self.image_column, self.label_column = image_column, label_column
        self.on_bad_sample = on_bad_sample
        self._bad = torch.zeros(self._SLOTS, dtype=torch.int64).share_memory_()
        self._stream = hf_dataset.shuffle(seed=seed, buffer_size=shuffle_buffer) if shuffle_buffer else hf_dataset
        self._init_epoch()

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch of the views and of the shuffled order, in this process and in its workers."""
        super().set_epoch(epoch)
        self._stream.set_epoch(int(epoch))

    def __len__(self) -> int:
        if self.num_examples is None:
            raise TypeError("The length of this stream is not known: give `num_examples`, or train by `max_steps`.")
        return self.num_examples

    @property
    def on_bad_sample(self) -> str:
        """What an unreadable image does: "raise" or "skip"."""
        return self._on_bad_sample

    @on_bad_sample.setter
    def on_bad_sample(self, value: str) -> None:
        if value not in ("raise", "skip"):
            raise ValueError(f'`on_bad_sample` must be "raise" or "skip", got {value!r}.')
        self._on_bad_sample = value

    @property
    def bad_count(self) -> int:
        """How many images this process and its workers have left out so far, over all epochs."""
        return int(self._bad.sum())

    def __iter__(self) -> Iterator[dict[str, Any]]:
        worker = get_worker_info()
        slot = 0 if worker is None else worker.id % self._SLOTS
        number, read, error = -1, 0, None
        for number, row in enumerate(self._stream):
            value = row[self.image_column]
            try:
                image = _decode(value, f"number {number} of the stream")
            except ValueError as bad:
                if self.on_bad_sample == "raise":
                    raise
                self._bad[slot] += 1
                error = bad
                logger.warning("An image is left out: %s", bad)
                continue
            read += 1
            label = self._label(row, number)
            with view_rng(self.seed, self.epoch, _content_key(value, image)):
                pixel_values = self.transform(image)
            yield {"pixel_values": pixel_values, "labels": label}
        if error is not None and not read:
            raise ValueError(f"Not one of the stream's {number + 1} images could be read. The last error: {error}")

    def _label(self, row: dict[str, Any], number: int) -> int:
        value = None if self.label_column is None else row[self.label_column]
        if value is None:
            return IGNORE_INDEX
        where = f"at number {number} of the stream"
        try:
            label = operator.index(value)
        except TypeError:
            raise ValueError(
                f"Label {value!r} {where} is a {type(value).__name__}: labels must be class numbers, or None where "
                "there is none. Convert the column, or choose another `label_column`."
            ) from None
        too_large = self.num_classes is not None and label >= self.num_classes
        if label != IGNORE_INDEX and (label < 0 or too_large):
            raise ValueError(_out_of_range(label, self.num_classes, where))
        return label


def _content_key(value: Any, image: Image.Image) -> int:
    data = value.get("bytes") if isinstance(value, dict) else value
    return zlib.crc32(data if isinstance(data, bytes) else image.tobytes())


# Shared by both ---------------------------------------------------------------------------------------------------


def _decode(value: Any, where: str) -> Image.Image:
    if isinstance(value, dict):
        path, data = value.get("path"), value.get("bytes")
        name = f"{path} ({where})" if path else where
        if data is None and path and "://" in path:
            try:
                with datasets.utils.file_utils.xopen(path, "rb") as file:
                    data = file.read()
            except MemoryError:
                raise
            except Exception as error:  # each file system and web client has errors of its own
                raise _unreadable(name, error) from error
        value = path if data is None else data
    else:
        name = where
    if value is None:
        raise _unreadable(name, "the row holds none")
    return load_image(value, name)


def _check_columns(features: Iterable[str], image_column: str, label_column: str | None) -> None:
    for option, column in (("image_column", image_column), ("label_column", label_column)):
        if column is not None and column not in features:
            none = ", or None where there are no labels" if option == "label_column" else ""
            raise ValueError(
                f"The data set has no column {column!r}{_near(column, features)}: it has {_quoted(features)}; "
                f"set `{option}` to one of them{none}."
            )
    kind = features[image_column] if isinstance(features, dict) else None
    if kind is not None and not isinstance(kind, datasets.Image):
        raise ValueError(
            f"Column {image_column!r} holds {kind}, not images: choose another `image_column`, "
            f"or cast it first with `cast_column({image_column!r}, datasets.Image())`."
        )


def _classes(features: dict, label_column: str | None, num_classes: int | None) -> tuple[list[str] | None, int | None]:
    kind = None if label_column is None else features.get(label_column)
    if isinstance(kind, datasets.ClassLabel):
        return list(kind.names), num_classes or kind.num_classes
    if kind is not None and not (isinstance(kind, datasets.Value) and kind.dtype.startswith(("int", "uint", "bool"))):
        hint = "class_encode_column" if getattr(kind, "dtype", "") in ("string", "large_string") else "cast_column"
        raise ValueError(
            f"Column {label_column!r} holds {kind}, not integer class labels: choose another `label_column`, "
            f"or convert it first with `{hint}`."
        )
    return None, num_classes


def _out_of_range(label: int, num_classes: int | None, where: str) -> str:
    allowed = "at least 0" if num_classes is None else f"in 0..{num_classes - 1}"
    return f"Label {label} {where} is out of range: labels must be {allowed}, or {IGNORE_INDEX} where there is none."


def _quoted(names: Iterable[str], most: int = 20) -> str:
    return some((repr(str(name)) for name in names), most)


def _near(wanted: str, names: Iterable[str]) -> str:
    lower = {name.lower(): name for name in names}
    close = [lower[name] for name in difflib.get_close_matches(wanted.lower(), lower, n=3, cutoff=0.5)]
    return f" (did you mean {' or '.join(map(repr, close))}?)" if close else ""


def load_split(dataset_name: str | None, config_name: str | None = None, *, split: str, **load_kwargs: Any) -> Any:
    """One split as `datasets.load_dataset` gives it.

    Raises ValueError, in a sentence, where it cannot be loaded.
    """
    try:
        return datasets.load_dataset(dataset_name, config_name, split=split, **load_kwargs)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        reason = first_line(error).rstrip(".")
        raise ValueError(
            f"Cannot load split {split!r} of data set {dataset_name!r}: {reason}. Check the name and the network, "
            "or give a local folder."
        ) from error


# One door ---------------------------------------------------------------------------------------------------------


def load_image_dataset(
    split_dir: str | os.PathLike | None = None,
    dataset_name: str | None = None,
    *,
    transform: Callable[[Image.Image], torch.Tensor],
    split: str = "train",
    config_name: str | None = None,
    image_column: str = "image",
    label_column: str | None = "label",
    streaming: bool = False,
    shuffle_buffer: int = 0,
    class_names: Sequence[str] | None = None,
    num_classes: int | None = None,
    seed: int = 0,
    **load_kwargs: Any,
) -> ImageFolderDataset | HubImageDataset | HubImageStream:
    """A folder of class folders (`split_dir`) or one split of a data set that `datasets.load_dataset` knows.

    `dataset_name`: a Hub id, a local folder of Parquet files, or a builder such as "parquet" with `data_files=...` in
    `load_kwargs`. `streaming` and `shuffle_buffer` (which needs it) are for the second kind, `class_names` for the
    first. The rest is described at [`ImageFolderDataset`], [`HubImageDataset`] and [`HubImageStream`].

    Raises ValueError where neither or both sources are given and where the data set cannot be loaded.
    """
    if (split_dir is None) == (dataset_name is None):
        given = "neither" if split_dir is None else "both"
        raise ValueError(
            f"Give either a folder with one folder per class or the name of a data set, got {given} of `split_dir` "
            "and `dataset_name`."
        )
    if split_dir is not None:
        if streaming:
            raise ValueError("`streaming` is for `dataset_name`; a folder is read file by file as it is.")
        return ImageFolderDataset(split_dir, transform, seed=seed, class_names=class_names)
    data = load_split(dataset_name, config_name, split=split, streaming=streaming, **load_kwargs)
    options: dict[str, Any] = {
        "image_column": image_column,
        "label_column": label_column,
        "seed": seed,
        "num_classes": num_classes,
    }
    if not streaming:
        if shuffle_buffer:
            raise ValueError("`shuffle_buffer` needs `streaming=True`; otherwise the sampler shuffles.")
        return HubImageDataset(data, transform, **options)
    info = (data.info.splits or {}).get(split)
    length = getattr(info, "num_examples", None) or None
    return HubImageStream(data, transform, **options, shuffle_buffer=shuffle_buffer, num_examples=length)
