"""Image folders, Hub data sets and Hub streams as torch data sets whose views do not depend on who computes them.

A sample is {"pixel_values": what the transform returns, "labels": int, "index": int}. The transform gets an RGB PIL
image and runs under generators seeded from (seed, epoch, index), see [`~hf_kd.data.views.view_rng`].

With `decoder="torchvision"` JPEGs are decoded by torchvision, and the transform gets a uint8 tensor (3, H, W). A
224-pixel view of a 500 × 375 photograph, as bytes, then takes 1.6 ms instead of 2.3 (as floats by PIL 2.9; see
tests/benchmarks/data_loading.py). The pixels before the transform are the same; resizing tensors rounds some of them,
one in thirty, to the next value. `decoder="auto"` does so where the transform can take tensors, as
[`~hf_kd.data.train_transform`] without timm's policies can.
"""

import difflib
import operator
import os
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset, IterableDataset, get_worker_info
from torchvision.datasets import ImageFolder
from torchvision.datasets.folder import IMG_EXTENSIONS
from transformers.utils import logging

from ..labels import IGNORE_INDEX
from ..text import first_line, some
from .decoded import DecodedPictures
from .decoding import Loader, load_image, loader, unreadable
from .transforms import is_deterministic
from .views import EpochMixin, keeping_rng, seed_view, view_rng


logger = logging.get_logger(__name__)


# Data sets held as files or tables --------------------------------------------------------------------------------


class _ImageDataset(EpochMixin, Dataset):
    """What both map-style data sets share; a subclass has the labels and says how to read pictures."""

    labels: Any

    def __init__(self, transform: Callable[..., torch.Tensor], seed: int, decoder: str) -> None:
        if not callable(transform):
            raise TypeError(f"`transform` must be callable (a PIL image in, a tensor out), got {transform!r}.")
        self.transform = transform
        self.seed = seed
        self._load = loader(decoder, transform)
        self._decoded: DecodedPictures | None = None
        self._init_epoch()

    def _keep_in_memory(self) -> None:
        self._decoded = DecodedPictures(map(self._read_or_error, range(len(self))))
        size = self._decoded.nbytes / 2**20
        logger.info("%d pictures are decoded and take %.0f MiB of memory in each process.", len(self), size)

    def _read_or_error(self, index: int) -> Any:
        try:
            return next(self._read([index], self._load))
        except ValueError as error:
            return error

    @property
    def fixed_views(self) -> bool:
        return is_deterministic(self.transform)

    def __len__(self) -> int:
        return len(self.labels)

    def _read(self, indices: Sequence[int], load: Loader) -> Iterator[Any]:
        """The pictures of some samples, one after the other, from where they are."""
        raise NotImplementedError

    def _pictures(self, indices: Sequence[int], load: Loader) -> Iterator[Any]:
        if self._decoded is None:
            return self._read(indices, load)
        return map(self._decoded.image if load is load_image else self._decoded.tensor, indices)

    def image(self, index: int) -> Image.Image:
        """The RGB picture of a sample before the transform."""
        return next(self._pictures([range(len(self))[index]], load_image))

    def __getitem__(self, index: int) -> dict[str, Any]:
        (sample,) = self._samples([index])
        return sample

    def __getitems__(self, indices: Sequence[int]) -> list[dict[str, Any]]:
        """The samples of a batch: what they have in common is done once."""
        if type(self).__getitem__ is not _ImageDataset.__getitem__:
            # A subclass makes samples of its own.
            return [self[index] for index in indices]
        return self._samples(indices)

    def _samples(self, indices: Sequence[int]) -> list[dict[str, Any]]:
        numbers = [range(len(self))[operator.index(index)] for index in indices]
        samples, epoch = [], self.epoch
        with keeping_rng():
            for index, image in zip(numbers, self._pictures(numbers, self._load), strict=True):
                seed_view(self.seed, epoch, index)
                pixel_values = self.transform(image)
                samples.append({"pixel_values": pixel_values, "labels": int(self.labels[index]), "index": index})
        return samples


class ImageFolderDataset(_ImageDataset):
    """Pictures in one folder per class (`root/class/picture.jpg`), read by torchvision's ImageFolder.

    `transform`: RGB PIL image to tensor. `seed`: with the epoch and the index it fixes each view. `class_names`: the
    classes and their order, from the training folder, so that an evaluation folder that lacks some keeps the
    numbering; by default the folders' names in alphabetical order. `decoder`: "pil", "torchvision" or "auto", see
    above. `in_memory`: decode all pictures now and keep them, at 3 bytes a pixel.

    Attributes: `class_names`, `num_classes`, `labels` (list of int), `paths` (list of str).

    Raises FileNotFoundError for a missing folder, NotADirectoryError for a file, ValueError for a folder without
    class folders, a class folder without images and class folders that `class_names` does not hold. Reading a sample
    raises ValueError with the file's name where the picture is unreadable.
    """

    def __init__(
        self,
        root: str | os.PathLike,
        transform: Callable[..., torch.Tensor],
        *,
        seed: int = 0,
        class_names: Sequence[str] | None = None,
        decoder: str = "pil",
        in_memory: bool = False,
    ) -> None:
        super().__init__(transform, seed, decoder)
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
        if in_memory:
            self._keep_in_memory()

    def _read(self, indices: Sequence[int], load: Loader) -> Iterator[Any]:
        return (load(self.paths[index]) for index in indices)


class HubImageDataset(_ImageDataset):
    """A `datasets.Dataset` with a column of images and one of integer labels (Parquet from the Hub, local files, ...).

    `transform`, `seed`, `decoder`, `in_memory`: as in [`ImageFolderDataset`]. `image_column`, `label_column`: the
    columns' names; with `label_column=None` every label is -100 (no label), as are missing values in the column.
    `num_classes`: where the column's feature does not say; by default the largest label + 1.

    Attributes: `class_names` (None where the data set has none), `num_classes`, `labels` (int64 array (N,)).

    Raises TypeError for another kind of data set; ValueError for a missing column (with the columns there are), an
    empty data set, a column of another type and labels out of range. Reading a sample raises ValueError with the
    file's name or row where the picture is unreadable.
    """

    def __init__(
        self,
        hf_dataset: datasets.Dataset,
        transform: Callable[..., torch.Tensor],
        *,
        image_column: str = "image",
        label_column: str | None = "label",
        seed: int = 0,
        num_classes: int | None = None,
        decoder: str = "pil",
        in_memory: bool = False,
    ) -> None:
        super().__init__(transform, seed, decoder)
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
        if in_memory:
            self._keep_in_memory()

    @property
    def table_fingerprint(self) -> str:
        """What `datasets` calls this table: another one for other rows, columns or files."""
        return self._rows._fingerprint

    def _read(self, indices: Sequence[int], load: Loader) -> Iterator[Any]:
        # All rows at once: one by one they take four times as long.
        values = self._rows[list(indices)][self.image_column]
        return (_decode(value, f"row {index}", load) for index, value in zip(indices, values, strict=True))


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
        transform: Callable[..., torch.Tensor],
        *,
        image_column: str = "image",
        label_column: str | None = "label",
        seed: int = 0,
        num_classes: int | None = None,
        shuffle_buffer: int = 0,
        num_examples: int | None = None,
        on_bad_sample: str = "raise",
        decoder: str = "pil",
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
        self._load = loader(decoder, transform)
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
                image = _decode(value, f"number {number} of the stream", self._load)
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


def _content_key(value: Any, image: Image.Image | torch.Tensor) -> int:
    data = value.get("bytes") if isinstance(value, dict) else value
    if not isinstance(data, bytes):
        # The same for either decoder.
        data = np.asarray(image if isinstance(image, Image.Image) else image.permute(1, 2, 0)).tobytes()
    return zlib.crc32(data)


# Shared by both ---------------------------------------------------------------------------------------------------


def _decode(value: Any, where: str, load: Loader) -> Image.Image | torch.Tensor:
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
                raise unreadable(name, error) from error
        value = path if data is None else data
    else:
        name = where
    if value is None:
        raise unreadable(name, "the row holds none")
    return load(value, name)


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
    transform: Callable[..., torch.Tensor],
    split: str = "train",
    config_name: str | None = None,
    image_column: str = "image",
    label_column: str | None = "label",
    streaming: bool = False,
    shuffle_buffer: int = 0,
    class_names: Sequence[str] | None = None,
    num_classes: int | None = None,
    seed: int = 0,
    decoder: str = "pil",
    in_memory: bool = False,
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
    if in_memory and streaming:
        raise ValueError(
            "`in_memory` keeps every picture, and a stream is read as it comes: leave out one of the two."
        )
    if split_dir is not None:
        if streaming:
            raise ValueError("`streaming` is for `dataset_name`; a folder is read file by file as it is.")
        return ImageFolderDataset(
            split_dir, transform, seed=seed, class_names=class_names, decoder=decoder, in_memory=in_memory
        )
    data = load_split(dataset_name, config_name, split=split, streaming=streaming, **load_kwargs)
    options: dict[str, Any] = {
        "image_column": image_column,
        "label_column": label_column,
        "seed": seed,
        "num_classes": num_classes,
        "decoder": decoder,
    }
    if not streaming:
        if shuffle_buffer:
            raise ValueError("`shuffle_buffer` needs `streaming=True`; otherwise the sampler shuffles.")
        return HubImageDataset(data, transform, **options, in_memory=in_memory)
    info = (data.info.splits or {}).get(split)
    length = getattr(info, "num_examples", None) or None
    return HubImageStream(data, transform, **options, shuffle_buffer=shuffle_buffer, num_examples=length)
