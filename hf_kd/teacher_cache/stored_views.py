"""The training data as a cache sees them: samples with numbers, and which view of them is being served."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import ConcatDataset, IterableDataset, Subset

from ..data.bad_samples import SkippingDataset
from ..data.views import view_rng
from ..networks import BOOKKEEPING


# How many samples are looked at to tell data sets and transforms apart.
_PROBES = 16
UNREADABLE = "unreadable"


class StoredViews:
    """What is needed to know a row's place: (view, index).

    Args:
        dataset: a map-style data set of dicts with "index", each sample's number in it; or part of one (torch's
            Subset). Its views follow from its ``epoch`` (:class:`hf_kd.data.EpochMixin`), or it says
            ``fixed_views = True``.
        period: after how many epochs the views repeat; None for new ones in every epoch.
        collate: makes batches of samples, and may change them.

    Attributes:
        samples: how many rows a view has.
        fixed: whether there is one view.

    Raises:
        TypeError: for a stream.
        ValueError: for data whose samples or views cannot be told apart.
    """

    def __init__(self, dataset: Any, period: int | None, collate: Callable[[list[Any]], Any] | None = None) -> None:
        self.dataset, self._collate = dataset, collate
        self.base, self._rows = _base_of(dataset)
        if isinstance(self.base, IterableDataset) or not hasattr(self.base, "__getitem__"):
            raise TypeError(
                f"A teacher cache finds a sample's row by its number, and a {type(self.base).__name__} is a stream, "
                "whose samples have none: use a data set with a length and an index, or leave out teacher_cache_dir."
            )
        if isinstance(self.base, ConcatDataset):
            raise ValueError(
                "A teacher cache finds a sample's row by its 'index', and the parts of a ConcatDataset have the same "
                "ones: make one data set of them that numbers its samples, or leave out teacher_cache_dir."
            )
        self.samples = len(self.base)
        self.fixed: bool = getattr(self.base, "fixed_views", False) is True
        if not self.fixed and not (hasattr(self.base, "set_epoch") and hasattr(self.base, "epoch")):
            raise ValueError(
                f"A teacher cache must know which view of a sample the student sees, and a {type(self.base).__name__} "
                "does not say: rows found by the index alone would be wrong targets under random crops. Subclass "
                "hf_kd.data.EpochMixin and draw each view under hf_kd.data.view_rng, or set `fixed_views = True` on "
                "the data set if its samples are the same in every epoch."
            )
        if period is not None and not self.fixed:
            if not hasattr(self.base, "cycle_views"):
                raise ValueError(
                    f"`teacher_cache_views` has the views repeat by the data set's cycle_views(), which a "
                    f"{type(self.base).__name__} does not have: subclass hf_kd.data.EpochMixin, or leave it out."
                )
            self.base.cycle_views(period)
        self.period: int | None = 1 if self.fixed else period or getattr(self.base, "period", None)
        self._check_samples()

    @property
    def view(self) -> int:
        """The view that is being served."""
        return 0 if self.fixed else int(self.base.epoch)

    def rows(self, positions: np.ndarray) -> np.ndarray:
        """The indices of the samples at some positions of the data set."""
        return positions if self._rows is None else self._rows[positions]

    # ---- Telling data apart -----------------------------------------------------------------------------------------

    def content(self) -> str | None:
        """A hash of the samples before their transform, as far as the data set shows them; None if it does not.

        Of images in memory that is all of them, of files all names; and of both kinds, and of tables, some pictures.
        """
        digest, known = hashlib.sha256(), False
        images = getattr(self.base, "images", None)
        if isinstance(images, (Tensor, np.ndarray)):
            digest.update(np.ascontiguousarray(images).data)
            return digest.hexdigest()
        paths = getattr(self.base, "paths", None)
        if isinstance(paths, list):
            # Where the folder lies does not matter.
            digest.update("\n".join("/".join(str(path).split("/")[-2:]) for path in paths).encode())
            known = True
        if callable(getattr(self.base, "image", None)):
            for index in self._probes(_PROBES):
                try:
                    digest.update(self.base.image(index).tobytes())
                except Exception:  # as in _sample
                    digest.update(b"unreadable")
            known = True
        return digest.hexdigest() if known else None

    def views(self, count: int) -> str:
        """A hash of some samples as the networks see them, in the first two epochs."""
        digest = hashlib.sha256()
        for epoch in (0,) if self.fixed else (0, 1):
            for index in self._probes(count):
                digest.update(self._view(index, epoch))
        return digest.hexdigest()

    def _probes(self, count: int) -> list[int]:
        return sorted({int(place) for place in np.linspace(0, self.samples - 1, count)})

    def _view(self, index: int, epoch: int, ambient: int = 0) -> bytes:
        sample = self._sample(index, epoch, ambient)
        if self._collate is None or UNREADABLE in sample:
            return _digest(sample)
        with view_rng(ambient, 1, 0):
            return _digest(self._collate([sample]))

    def _sample(self, index: int, epoch: int, ambient: int) -> Any:
        """A sample in an epoch, whatever the process's random generators hold; they stay as they are."""
        with _at_epoch(self.base, epoch), view_rng(ambient, 0, 0):
            try:
                return self.base[index]
            except Exception:  # an unreadable one; whether that ends the run is for the loader to say
                return {"index": index, UNREADABLE: True}

    def _check_samples(self) -> None:
        for number, index in enumerate(self._probes(3)):
            sample = self._sample(index, 0, ambient=0)
            place = sample.get("index") if isinstance(sample, Mapping) else None
            if place is None or int(place) != index:
                raise ValueError(
                    f"A teacher cache finds a sample's row by its 'index', and sample {index} of the "
                    f"{type(self.base).__name__} has {'none' if place is None else f'the index {int(place)}'}: have "
                    "the data set return dicts with each sample's own number as 'index'."
                )
            # Several draws, since a coin may fall on one side twice.
            if len({self._view(index, 0, ambient) for ambient in range(4 * number, 4 * number + 4)}) > 1:
                raise ValueError(
                    f"Sample {index} of the {type(self.base).__name__} is another one each time, since its transform "
                    "or the collator draws from the process's random generators: stored teacher outputs would be "
                    "wrong targets for it. Draw each view under hf_kd.data.view_rng(seed, epoch, index)."
                )
            if self.fixed and hasattr(self.base, "set_epoch") and self._view(index, 0) != self._view(index, 1):
                raise ValueError(
                    f"The {type(self.base).__name__} says fixed_views, and its sample {index} is another one in the "
                    "second epoch: set `fixed_views` to False."
                )


@contextmanager
def _at_epoch(dataset: Any, epoch: int) -> Iterator[None]:
    """Have a data set serve an epoch's own views, whether or not they repeat."""
    now, period = getattr(dataset, "epoch", 0), getattr(dataset, "period", None)
    try:
        if period is not None:
            dataset.cycle_views(None)
        if hasattr(dataset, "set_epoch"):
            dataset.set_epoch(epoch)
        yield
    finally:
        if hasattr(dataset, "set_epoch"):
            dataset.set_epoch(now)
        if period is not None:
            dataset.cycle_views(period)


def evaluation_fingerprint(dataset: Any) -> str | None:
    """A hash by which data on which a teacher was measured are known again: their size and samples of them.

    None for data that cannot be asked for samples by number.
    """
    if not (hasattr(dataset, "__getitem__") and hasattr(dataset, "__len__")):
        return None
    digest = hashlib.sha256(f"{type(dataset).__name__} {len(dataset)}".encode())
    for index in sorted({int(place) for place in np.linspace(0, len(dataset) - 1, _PROBES)}):
        try:
            with view_rng(0, 0, 0):
                sample = dataset[index]
            digest.update(_digest(sample) + str(sample.get("labels", sample.get("label"))).encode())
        except Exception:  # as in StoredViews._sample
            digest.update(b"unreadable")
    return digest.hexdigest()[:16]


def _base_of(dataset: Any) -> tuple[Any, np.ndarray | None]:
    """The data set that numbers the samples, and which of them a part of it has (None for all)."""
    rows: np.ndarray | None = None
    while isinstance(dataset, (Subset, SkippingDataset)):
        if isinstance(dataset, Subset):
            indices = np.asarray(dataset.indices, dtype=np.int64)
            rows = indices if rows is None else indices[rows]
        dataset = dataset.dataset
    return dataset, rows


def _digest(sample: Mapping[str, Any]) -> bytes:
    """A hash of what of a sample, or a batch, goes into networks."""
    digest = hashlib.sha256()
    for key in sorted(sample.keys() - BOOKKEEPING - {"label"}):
        value = sample[key]
        if isinstance(value, Tensor):
            # numpy has no bfloat16.
            value = (value.float() if value.dtype == torch.bfloat16 else value).detach().cpu().numpy()
        shape = getattr(value, "shape", getattr(value, "size", None))
        digest.update(f"{key} {getattr(value, 'dtype', '')} {shape}".encode())
        # A picture has it as well as an array.
        digest.update(value.tobytes() if hasattr(value, "tobytes") else repr(value).encode())
    return digest.digest()
