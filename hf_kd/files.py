"""Files that are written whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def atomic_write(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A path to write to; when the body is done it takes the place of ``path``, at once and whole, or not at all."""
    path = Path(path)
    draft = path.with_name(f".{path.name}.part")
    try:
        yield draft
        to_disk(draft)
        os.replace(draft, path)
    finally:
        draft.unlink(missing_ok=True)


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write a text file by :func:`atomic_write`."""
    with atomic_write(path) as draft:
        draft.write_text(text, encoding="utf-8")


def to_disk(path: str | os.PathLike[str]) -> None:
    """Wait until a file's content is on the disk, where a crash of the machine leaves it."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
