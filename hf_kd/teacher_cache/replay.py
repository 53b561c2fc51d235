"""Teacher logits computed once and read from then on."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from accelerate.logging import get_logger
from torch import Tensor
from torch.utils.data import Dataset, Subset

from ..data.views import set_dataset_epoch
from ..networks import HOST_INDEX, Preprocessing
from .fingerprint import check_fingerprint, fingerprint
from .sharing import fetch_from_hub, push_to_hub
from .storage import SHARD_BYTES, RowStorage, read_manifest
from .stored_views import StoredViews, evaluation_fingerprint


if TYPE_CHECKING:
    # It takes the names of the stored types from here.
    from ..config import DistillationConfig

logger = get_logger(__name__)

Batch = Mapping[str, Any]


class TeacherCache:
    """A teacher's logits by (view, index): the view of a sample that an epoch serves, and the sample's number.

    Each row holds all K logits. A few of the largest would not do: the power transform at a small gamma lives in the
    tail, and losses from 32 of 1000 logits were off by 3 to 45 %. What the stored precision costs is said in
    :mod:`hf_kd.teacher_cache.codec`.

    Args:
        folder: of the cache; made if it is not there.
        num_classes: K; samples: rows of a view. Needed for a new cache.
        dtype: "fp16", "int8" or "fp32"; by default an existing cache's own, and fp16 for a new one.
        fingerprint: what the rows were computed with, and for; a cache that is there must have the same.
        shard_bytes: the largest size of a file of a new cache.

    Attributes:
        storage: the files.

    Raises:
        ValueError: for a cache that was made for something else (with the part that differs), is damaged, or is not
            there while it is not said what to make.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        *,
        num_classes: int | None = None,
        samples: int | None = None,
        dtype: str | None = None,
        fingerprint: Mapping[str, Any] | None = None,
        shard_bytes: int = SHARD_BYTES,
    ) -> None:
        folder = Path(folder).expanduser()
        manifest = read_manifest(folder)
        if manifest is None and (num_classes is None or samples is None):
            raise ValueError(
                f"There is no teacher cache in {folder}: give a folder that has one, or `num_classes` and `samples` "
                "to make one."
            )
        made = {
            "dtype": dtype or "fp16",
            "num_classes": num_classes,
            "samples": samples,
            "fingerprint": dict(fingerprint or {}),
        }
        self.storage = RowStorage(folder, lambda: made, shard_bytes=shard_bytes)
        for name, asked in (("dtype", dtype), ("num_classes", num_classes), ("samples", samples)):
            # The fingerprint says the same of classes and samples in words.
            if asked not in (None, self.storage.manifest[name]) and (fingerprint is None or name == "dtype"):
                raise ValueError(
                    f"The teacher cache {folder} has {name} {self.storage.manifest[name]!r}, and {asked!r} is asked "
                    "for: leave that out, or give another folder."
                )
        if fingerprint is not None:
            check_fingerprint(self.fingerprint, fingerprint, folder)

    @property
    def folder(self) -> Path:
        return self.storage.folder

    @property
    def dtype(self) -> str:
        return self.storage.codec.dtype

    @property
    def num_classes(self) -> int:
        return self.storage.codec.num_classes

    @property
    def samples(self) -> int:
        return self.storage.samples

    @property
    def fingerprint(self) -> dict[str, Any]:
        return self.storage.manifest["fingerprint"]

    def read(self, view: int, indices: Tensor | np.ndarray) -> tuple[Tensor, Tensor]:
        """The logits (B, K) of some samples' view, fp32, and which of them are there, (B,) bool; others are NaN."""
        records, found = self.storage.read(view, np.asarray(indices))
        logits, present = self.storage.codec.decode(records), torch.from_numpy(found)
        if not found.all():
            logits[~present] = torch.nan
        return logits, present

    def write(self, view: int, indices: Tensor | np.ndarray, logits: Tensor) -> Tensor:
        """Store the logits (B, K) of some samples' view; returns them as they will be read.

        A row that is not finite (but for -inf in some of its classes) is not stored, and returned as it is.
        """
        if logits.dim() != 2 or logits.shape[1] != self.num_classes:
            raise ValueError(
                f"A teacher cache keeps one row of {self.num_classes} logits for each sample, and the teacher gave "
                f"logits of shape {tuple(logits.shape)}: leave out teacher_cache_dir for such a teacher."
            )
        codec = self.storage.codec
        records, storable = codec.encode(logits)
        self.storage.write(view, np.asarray(indices)[storable], records[storable])
        read_back = codec.decode(records)
        if not storable.all():
            read_back[torch.from_numpy(~storable)] = logits.detach().to("cpu", torch.float32)[~storable]
        return read_back

    def written(self, view: int) -> int:
        """How many samples have a row of a view."""
        return int(self.storage.written(view).sum())

    @property
    def views(self) -> list[int]:
        """The views that have rows, in order."""
        rows = self.storage.manifest["shard_rows"]
        shards = (read_manifest(self.folder) or self.storage.manifest)["shards"]
        touched = {
            view for s in shards for view in range(s * rows // self.samples, ((s + 1) * rows - 1) // self.samples + 1)
        }
        return [view for view in sorted(touched) if self.written(view)]

    def push_to_hub(
        self, repo_id: str, *, private: bool | None = None, revision: str | None = None, token: str | None = None
    ) -> str:
        """Publish the cache as a data set on the Hugging Face Hub, in one commit; the commit's URL.

        Raises:
            ValueError: for a name that the Hub does not allow, and a cache without rows.
            PublishingError: if the Hub could not be reached or refused.
        """
        return push_to_hub(self.storage, repo_id, self.views, private=private, revision=revision, token=token)

    @classmethod
    def from_hub(
        cls, repo_id: str, folder: str | os.PathLike[str], *, revision: str | None = None, token: str | None = None
    ) -> TeacherCache:
        """Make a cache in ``folder`` of one that was published; the data must be the same, wherever they lie.

        Raises:
            ValueError: if the folder has a cache already, or the repository none.
            RuntimeError: if it could not be fetched.
        """
        fetch_from_hub(repo_id, folder, revision=revision, token=token)
        return cls(folder)


class Replay:
    """A cache at work in a training run: it gives a batch's teacher logits, and has what it lacks computed.

    The logits of the first run are those that a later one reads, rounded as they are stored.

    Args:
        cache: opened for this run's teacher and data.
        views: of the training data.
    """

    def __init__(self, cache: TeacherCache, views: StoredViews) -> None:
        self.cache, self.views = cache, views

    @classmethod
    def for_run(
        cls,
        args: DistillationConfig,
        dataset: Any,
        teacher: Mapping[str, Any],
        *,
        num_classes: int | None,
        images: Preprocessing | None,
        mixed_precision: str,
        collate: Callable[[list[Any]], Any] | None = None,
    ) -> Replay:
        """The cache of ``args.teacher_cache_dir``, made if it is not there.

        Args:
            dataset: the training data.
            teacher: its description (:func:`.deferred.recognised_teacher`).
            num_classes: of the student.
            images: how the student's images are normalised.
            mixed_precision: of the run.
            collate: makes its batches.

        Raises:
            TypeError, ValueError: for data that no cache can be made of, and a cache that was made for something else.
        """
        num_classes = num_classes or teacher["num_classes"]
        if num_classes is None:
            raise ValueError(
                "A teacher cache needs the class count, and neither student nor teacher says it: give one of them an "
                "attribute `num_classes`."
            )
        views = StoredViews(dataset, args.teacher_cache_views, collate)
        autocast = "" if mixed_precision == "no" else f" under {mixed_precision} autocast"
        found = fingerprint(
            teacher,
            views,
            num_classes=num_classes,
            images=images,
            precision=args.teacher_dtype or f"as loaded{autocast}",
        )
        assert args.teacher_cache_dir is not None
        cache = TeacherCache(
            args.teacher_cache_dir,
            num_classes=num_classes,
            samples=views.samples,
            dtype=args.teacher_cache_dtype,
            fingerprint=found,
        )
        if teacher["source"] and cache.fingerprint["teacher"]["source"] is None:
            # Next time it is known by its name.
            known = {**cache.fingerprint["teacher"], "source": teacher["source"]}
            cache.storage.update(fingerprint={**cache.fingerprint, "teacher": known})
        return cls(cache, views)

    def logits(self, inputs: Batch, compute: Callable[[Batch], Tensor]) -> Tensor:
        """Teacher logits (B, K), fp32, of a training batch.

        Args:
            inputs: the batch, with "index".
            compute: gives the teacher's logits for a batch; called for the samples that have no row.

        Raises:
            ValueError: for a batch without "index", or an index that is no training sample's.
        """
        index = inputs.get("index")
        if not isinstance(index, Tensor):
            raise ValueError(
                f"A teacher cache finds rows by the batch's 'index', and the batch has {', '.join(inputs)}: have the "
                "data set return each sample's number (and the collator and remove_unused_columns leave it in)."
            )
        indices, view = inputs.get(HOST_INDEX), self.views.view
        if indices is None:
            indices = index.cpu().numpy()
        logits, present = self.cache.read(view, indices)
        if not present.all():
            missing = (~present).nonzero().flatten()
            live = compute(_rows_of(inputs, missing, len(indices)))
            logits[missing] = self.cache.write(view, indices[missing.numpy()], live)
        if index.device.type == "cuda":
            # From pinned memory, so that nothing waits for what the device was given before.
            logits = logits.pin_memory()
        return logits.to(index.device, non_blocking=True)

    def measured_top1(self, dataset: Any) -> tuple[float, int] | None:
        """The teacher's top-1 on an evaluation data set and its number of samples, if an earlier run measured it."""
        measured = (read_manifest(self.cache.folder) or {}).get("top1", {})
        known = measured.get(evaluation_fingerprint(dataset))
        return None if known is None else (known["top1"], known["samples"])

    def keep_top1(self, dataset: Any, measured: tuple[float, int]) -> None:
        """Keep it for later runs."""
        key = evaluation_fingerprint(dataset)
        if key is not None:
            known = self.cache.storage.manifest.get("top1", {})
            self.cache.storage.update(top1={**known, key: {"top1": measured[0], "samples": measured[1]}})

    def provenance(self) -> dict[str, Any]:
        """What a student's record says of it, in JSON values; "views" is None where every epoch has its own."""
        return {"dtype": self.cache.dtype, "views": self.views.period}

    def fill(
        self,
        views: int,
        batches: Callable[[Dataset], Iterable[Batch]],
        compute: Callable[[Batch], Tensor],
        *,
        process: int = 0,
        processes: int = 1,
    ) -> int:
        """Compute what the first ``views`` views lack; how many rows this process had computed.

        Args:
            batches: gives the batches of a data set, on the device.
            compute: as in :meth:`logits`.
            process, processes: each computes its share.

        Raises:
            RuntimeError: if the disk is full.
        """
        done, dataset = 0, self.views.dataset
        share = np.arange(process, len(dataset), processes)
        for view in range(views):
            set_dataset_epoch(dataset, view)
            lacking = share[~self.cache.storage.written(self.views.view)[self.views.rows(share)]]
            for batch in batches(Subset(dataset, lacking.tolist())) if len(lacking) else ():
                self.logits(batch, compute)
                if not self.cache.storage.writable:
                    raise RuntimeError(
                        f"The teacher cache {self.cache.folder} takes no more rows: make room on the disk, and the "
                        "same command goes on from there."
                    )
            done += len(lacking)
            logger.info("Teacher cache: view %d of %d is complete.", view + 1, views)
        set_dataset_epoch(dataset, 0)
        self.cache.storage.flush()
        return done


class KeepingIndex:
    """A collator whose batches also say their samples' numbers on the host, where rows are looked up.

    Args:
        collate: makes the batches.
    """

    def __init__(self, collate: Callable[[list[Any]], Any]) -> None:
        self.collate = collate

    def __call__(self, samples: list[Any]) -> Any:
        batch = self.collate(samples)
        index = batch.get("index") if isinstance(batch, Mapping) else None
        # A copy: a worker moves a batch's tensors to shared memory, from under arrays that look into them.
        return {**batch, HOST_INDEX: index.numpy().copy()} if isinstance(index, Tensor) else batch


def _rows_of(inputs: Batch, rows: Tensor, batch_size: int) -> dict[str, Any]:
    """The batch with some of its samples alone."""
    if len(rows) == batch_size:
        return dict(inputs)
    return {
        key: value[rows.to(value.device)]
        if isinstance(value, Tensor) and value.dim() and len(value) == batch_size
        else [value[row] for row in rows.tolist()]
        if isinstance(value, list) and len(value) == batch_size
        else value
        for key, value in inputs.items()
    }
