"""Rows on disk, each with a checksum: read through memory maps, written by any number of processes at once.

A row belongs to one view of one sample, and its place follows from both. Files ("shards") of a bounded size are made
as they are needed, full of holes, so they take up room on the disk only for what was written. A row is written by one
call that ends with its checksum, which also depends on the cache and the place: a row that was never written, was cut
off by a kill, or was damaged or moved afterwards, is known as such and not read. Of two processes that write one row
either may win. Reading takes no lock; making a shard and changing the manifest does.
"""

from __future__ import annotations

import errno
import json
import os
import uuid
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock
from transformers.utils import logging

from ..files import to_disk, write_text
from .codec import RowCodec


logger = logging.get_logger(__name__)

MANIFEST = "manifest.json"
FORMAT = 1
SHARD_BYTES = 2**30

_LOCK = ".lock"
# What a disk says that takes no more: it is full, a quota is spent, it is read-only or somebody else's.
_TAKES_NO_MORE = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EFBIG)


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """What a cache says of itself, or None if there is none in the folder.

    Raises:
        ValueError: for a manifest that cannot be read, or of another format.
    """
    path = folder / MANIFEST
    if not path.is_file():
        return None
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        found = manifest["format"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path} is no manifest of a teacher cache ({type(error).__name__}: {error}): give another "
            "`teacher_cache_dir`, or delete this one to have it made anew."
        ) from error
    if found != FORMAT:
        raise ValueError(
            f"The teacher cache {folder} has format {found}, and this hf_kd reads format {FORMAT}: read it with the "
            "version that wrote it, or give another `teacher_cache_dir`."
        )
    return manifest


class RowStorage:
    """The rows of one cache.

    Args:
        folder: where it is, or will be.
        make_manifest: gives what a new cache's manifest holds beside what is kept here: "dtype", "num_classes",
            "samples" and anything else. It is called only if there is no manifest.
        shard_bytes: the largest size of a file of a new cache.

    Attributes:
        manifest: what the manifest holds; change it by :meth:`update`.
        damaged: how many rows were found that were damaged.
        writable: False once the disk took no more.

    Raises:
        ValueError: for a shard that is missing or too short, a manifest that cannot be read, and a folder that cannot
            be made.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        make_manifest: Callable[[], dict[str, Any]],
        *,
        shard_bytes: int = SHARD_BYTES,
    ) -> None:
        self.folder = Path(folder).expanduser()
        self.damaged = 0
        self.writable = True
        manifest = read_manifest(self.folder)
        if manifest is None:
            manifest = self._create(make_manifest, shard_bytes)
        self.manifest = manifest
        self.codec = RowCodec(manifest["dtype"], manifest["num_classes"])
        self.samples: int = manifest["samples"]
        self._shard_rows: int = manifest["shard_rows"]
        self._salt = zlib.crc32(manifest["id"].encode())
        self._maps: dict[int, np.ndarray] = {}
        self._files: dict[int, int] = {}
        for shard in manifest["shards"]:
            self._check(self._path(shard))

    def _create(self, make_manifest: Callable[[], dict[str, Any]], shard_bytes: int) -> dict[str, Any]:
        made = make_manifest()
        record = RowCodec(made["dtype"], made["num_classes"]).record
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with FileLock(self.folder / _LOCK):
                # Another process may have been faster.
                manifest = read_manifest(self.folder)
                if manifest is None:
                    manifest = {
                        "format": FORMAT,
                        "id": uuid.uuid4().hex,
                        "shard_rows": max(1, min(shard_bytes // record.itemsize, made["samples"])),
                        "shards": [],
                        **made,
                    }
                    self._write_manifest(manifest)
                return manifest
        except OSError as error:
            raise ValueError(
                f"`teacher_cache_dir` {self.folder} cannot be written to ({error.strerror or error}): give a folder "
                "that can, or leave it out."
            ) from error

    # ---- Reading ----------------------------------------------------------------------------------------------------

    def read(self, view: int, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Records (B,) of one view of some samples, and which of them are there and whole, (B,) bool.

        Raises:
            ValueError: for a sample that the cache has no place for.
        """
        places = self._places(view, indices)
        if len(places) == 0:
            return np.zeros(0, self.codec.record), np.zeros(0, bool)
        records = self._gather(places)
        written = records["crc"] != 0
        intact = written & (self._checksums(records, places) == records["crc"])
        if not intact.all() and (suspects := np.flatnonzero(written & ~intact)).size:
            # Another process may have been writing them just then.
            records[suspects] = self._gather(places[suspects])
            intact[suspects] = self._checksums(records[suspects], places[suspects]) == records["crc"][suspects]
            self._count_damaged(int((~intact[suspects]).sum()))
        return records, intact

    def written(self, view: int) -> np.ndarray:
        """Which samples have a row of this view, (samples,) bool; rows are not checked."""
        places = np.arange(view * self.samples, (view + 1) * self.samples)
        found = np.zeros(self.samples, bool)
        for shard in range(int(places[0]) // self._shard_rows, int(places[-1]) // self._shard_rows + 1):
            rows = self._map(shard)
            if rows is not None:
                here = places // self._shard_rows == shard
                checksums = rows.view(self.codec.record)["crc"][:, 0]
                found[here] = checksums[places[here] % self._shard_rows] != 0
        return found

    def _gather(self, places: np.ndarray) -> np.ndarray:
        size = self.codec.record.itemsize
        shards, offsets = np.divmod(places, self._shard_rows)
        first = int(shards[0])
        if (shards == first).all():
            rows = self._map(first)
            # As bytes: numpy takes records one field at a time.
            data = np.zeros((len(places), size), np.uint8) if rows is None else rows.take(offsets, axis=0)
        else:
            data = np.zeros((len(places), size), np.uint8)
            for shard in np.unique(shards):
                rows = self._map(int(shard))
                if rows is not None:
                    here = shards == shard
                    data[here] = rows.take(offsets[here], axis=0)
        return data.view(self.codec.record)[:, 0]

    def _places(self, view: int, indices: np.ndarray) -> np.ndarray:
        indices = np.asarray(indices, dtype=np.int64)
        # Negative numbers are the largest unsigned ones.
        if (indices.view(np.uint64) >= self.samples).any():
            wrong = next(int(i) for i in indices if not 0 <= i < self.samples)
            raise ValueError(
                f"The teacher cache {self.folder} has rows for the samples 0 to {self.samples - 1}, and the batch has "
                f"the index {wrong}: 'index' must be the sample's number in the training data."
            )
        return view * self.samples + indices

    def _checksums(self, records: np.ndarray, places: np.ndarray) -> np.ndarray:
        size = self.codec.record.itemsize
        payload = size - self.codec.record["crc"].itemsize
        data = np.ascontiguousarray(records).view(np.uint8).data
        # CRC-32 differs for every start value, and thus for every place.
        starts = ((places * 2654435761 + self._salt) & 0xFFFFFFFF).tolist()
        crc32 = zlib.crc32
        sums = [
            crc32(data[at : at + payload], start)
            for at, start in zip(range(0, size * len(records), size), starts, strict=True)
        ]
        # 0 says that a row was never written.
        return np.maximum(np.array(sums, dtype=np.uint32), 1)

    def _count_damaged(self, count: int) -> None:
        if count and not self.damaged:
            logger.warning(
                "The teacher cache %s holds damaged rows (their checksums are wrong): they are not read, and the "
                "teacher computes them again.",
                self.folder,
            )
        self.damaged += count

    # ---- Writing ----------------------------------------------------------------------------------------------------

    def write(self, view: int, indices: np.ndarray, records: np.ndarray) -> None:
        """Store records (B,) as encoded; where the disk takes no more, warn once and store nothing from then on.

        Raises:
            OSError: for what a disk says otherwise.
        """
        if not self.writable or not len(records):
            return
        places = self._places(view, indices)
        records["crc"] = self._checksums(records, places)
        size = self.codec.record.itemsize
        data = np.ascontiguousarray(records).view(np.uint8).data
        try:
            for number, place in enumerate(places.tolist()):
                shard, offset = divmod(place, self._shard_rows)
                row = data[number * size : (number + 1) * size]
                # Not through the memory map: there a full disk is a signal that kills the process.
                written = os.pwrite(self._file(shard), row, offset * size)
                if written < size:
                    os.pwrite(self._file(shard), row[written:], offset * size + written)
        except OSError as error:
            self._give_up(error)

    def update(self, **values: Any) -> None:
        """Change entries of the manifest, in this process and on the disk; as :meth:`write` where that is full."""
        self.manifest.update(values)
        if not self.writable:
            return
        try:
            with FileLock(self.folder / _LOCK):
                self.manifest = {**(read_manifest(self.folder) or self.manifest), **values}
                self._write_manifest(self.manifest)
        except OSError as error:
            self._give_up(error)

    def flush(self) -> None:
        """Wait until what this process wrote is on the disk."""
        for shard in self._files:
            to_disk(self._path(shard))

    def close(self) -> None:
        """Let go of the files."""
        for descriptor in self._files.values():
            os.close(descriptor)
        self._files.clear()
        self._maps.clear()

    def _give_up(self, error: OSError) -> None:
        if error.errno not in _TAKES_NO_MORE:
            raise error
        self.writable = False
        logger.warning(
            "The teacher cache %s takes no more rows (%s): training goes on, and the teacher computes what is not in "
            "it in every epoch.",
            self.folder,
            error.strerror,
        )

    # ---- Files ------------------------------------------------------------------------------------------------------

    def _path(self, shard: int) -> Path:
        return self.folder / f"rows-{shard:05d}.bin"

    def _write_manifest(self, manifest: dict[str, Any]) -> None:
        write_text(self.folder / MANIFEST, json.dumps(manifest, indent=2) + "\n")

    def _check(self, path: Path) -> None:
        size = path.stat().st_size if path.is_file() else None
        expected = self._shard_rows * self.codec.record.itemsize
        if size != expected:
            wrong = "is missing" if size is None else f"has {size} bytes instead of {expected}"
            raise ValueError(
                f"The file {path} of the teacher cache {wrong}, so the cache is damaged: restore the file, or delete "
                f"{path.parent} to have the teacher's outputs computed anew."
            )

    def _map(self, shard: int) -> np.ndarray | None:
        """The rows of a shard as bytes, or None while nobody has made it."""
        if shard not in self._maps:
            path = self._path(shard)
            if not path.is_file():
                return None
            self._check(path)
            size = self.codec.record.itemsize
            # As a plain array: numpy's memmap class takes longer to index.
            self._maps[shard] = np.memmap(path, np.uint8, mode="r", shape=(self._shard_rows, size)).view(np.ndarray)
        return self._maps[shard]

    def _file(self, shard: int) -> int:
        if shard not in self._files:
            path = self._path(shard)
            if not path.is_file():
                self._make(shard)
            self._files[shard] = os.open(path, os.O_RDWR)
        return self._files[shard]

    def _make(self, shard: int) -> None:
        with FileLock(self.folder / _LOCK):
            manifest = read_manifest(self.folder) or self.manifest
            path = self._path(shard)
            if shard not in manifest["shards"]:
                draft = path.with_name(f".{path.name}.part")
                with draft.open("wb") as file:
                    file.truncate(self._shard_rows * self.codec.record.itemsize)
                os.replace(draft, path)
                manifest = {**manifest, "shards": sorted([*manifest["shards"], shard])}
                self._write_manifest(manifest)
            self.manifest = manifest
        self._check(path)
