"""Fetch a file over http, whole or not at all."""

from __future__ import annotations

import hashlib
import http.client
import re
import urllib.request
from pathlib import Path

from hf_kd.files import atomic_write
from hf_kd.text import one_line


_TIMEOUT = 60  # seconds without a byte
_CHUNK = 2**20


def fetch(url: str, path: Path, sha256: str | None = None) -> bool:
    """Have the file of a URL at ``path``, unless there is one already, with the digest asked for.

    Returns:
        Whether it was fetched now.

    Raises:
        ValueError: for a ``sha256`` that is none, and a file that has another.
        RuntimeError: if the file could not be fetched, or only a part of it came; ``path`` is then as it was.
    """
    if sha256 is not None and not re.fullmatch(r"[0-9a-fA-F]{64}", sha256):
        raise ValueError(f"A SHA-256 has 64 hexadecimal digits, got {sha256!r}.")
    if path.is_file():
        if sha256 is not None:
            check_sha256(path, sha256)
        return False
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as draft:
        try:
            _download(url, draft)
        except (OSError, http.client.HTTPException, ValueError) as error:
            raise RuntimeError(
                f"{url} could not be fetched ({one_line(error)}): try again, or fetch it where there is a connection "
                "and give the file's path."
            ) from error
        if sha256 is not None:
            check_sha256(draft, sha256, name=f"What came from {url}", hint="it was not kept")
    return True


def check_sha256(
    path: Path, sha256: str, name: str | None = None, hint: str = "it is another file, or damaged"
) -> None:
    """Raises ValueError if a file has another digest; ``name`` and ``hint`` are the sentence's beginning and end."""
    if not path.is_file():
        raise ValueError(f"{path} does not exist or is no file.")
    if (found := sha256_of(path)) != sha256.lower():
        raise ValueError(f"{name or path} has the SHA-256 {found}, not the {sha256.lower()} asked for: {hint}.")


def _download(url: str, path: Path) -> None:
    with urllib.request.urlopen(url, timeout=_TIMEOUT) as answer, path.open("wb") as file:
        length = answer.headers.get("Content-Length")
        while block := answer.read(_CHUNK):
            file.write(block)
        # Read in pieces, an answer that breaks off just ends.
        if length is not None and file.tell() != int(length):
            raise OSError(f"only {file.tell()} of {length} bytes came")


def sha256_of(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_CHUNK):
            digest.update(block)
    return digest.hexdigest()
