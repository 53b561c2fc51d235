"""A cache on the Hugging Face Hub, as a data set that `datasets` opens: Parquet, exact to the last bit.

A row is a sample's view: "view", "index", and what the codec keeps of the logits ("top" and the distances below it, or
the logits themselves). The manifest beside it says what the cache was made for.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from huggingface_hub import HfApi, snapshot_download

from ..files import write_text
from ..hub import publishing
from ..text import first_line
from .codec import RowCodec
from .storage import FORMAT, MANIFEST, RowStorage, read_manifest


# Of a Parquet file, before compression.
_FILE_BYTES = 2**28
_DATA = "data"

_CARD = """---
tags:
- hf_kd
- knowledge-distillation
- teacher-logits
configs:
- config_name: default
  data_files: {data}/*.parquet
---

# Teacher logits of {teacher}

The outputs of the teacher {teacher} for {samples:,} training samples and {classes} classes, {views} views of each at
most, {rows:,} rows in all, stored by hf_kd as {dtype}. `{manifest}` says what they
were computed with and for.

```python
from hf_kd import TeacherCache

TeacherCache.from_hub("{repo_id}", "teacher_cache")  # then DistillationConfig(..., teacher_cache_dir="teacher_cache")
```
"""


def push_to_hub(
    storage: RowStorage,
    repo_id: str,
    views: Iterable[int],
    *,
    private: bool | None = None,
    revision: str | None = None,
    token: str | None = None,
) -> str:
    """Publish a cache in one commit, in place of what the repository held; the commit's URL. Damaged rows stay here.

    Raises:
        ValueError: for a name that the Hub does not allow, and a cache without rows.
        PublishingError: if the Hub could not be reached or refused.
    """
    with publishing(repo_id, token), tempfile.TemporaryDirectory() as folder:
        views = list(views)
        rows = sum(_write_parquet(storage, view, Path(folder) / _DATA) for view in views)
        if not rows:
            raise ValueError(f"The teacher cache {storage.folder} has no rows to publish: fill it first.")
        fingerprint = {**storage.manifest["fingerprint"], "table": None}  # of this machine's files
        public = {key: storage.manifest[key] for key in ("format", "dtype", "num_classes", "samples")}
        public.update(fingerprint=fingerprint, top1=storage.manifest.get("top1", {}))
        write_text(Path(folder) / MANIFEST, json.dumps(public, indent=2) + "\n")
        teacher = str((fingerprint.get("teacher") or {}).get("name", "unknown"))
        card = _CARD.format(
            data=_DATA,
            # A path on this machine is nobody else's business.
            teacher=Path(teacher).name if Path(teacher).is_absolute() else teacher,
            samples=storage.samples,
            classes=storage.codec.num_classes,
            views=len(views),
            rows=rows,
            dtype=storage.codec.dtype,
            manifest=MANIFEST,
            repo_id=repo_id,
        )
        write_text(Path(folder) / "README.md", card)
        api = HfApi(token=token, library_name="hf_kd")
        name = api.create_repo(repo_id, repo_type="dataset", private=private, exist_ok=True).repo_id
        if revision is not None:
            api.create_branch(name, branch=revision, repo_type="dataset", exist_ok=True)
        commit = api.upload_folder(
            repo_id=name, repo_type="dataset", folder_path=folder, revision=revision,
            delete_patterns=f"{_DATA}/*", commit_message="Publish teacher logits",
        )  # fmt: skip
        return str(commit.commit_url)


def fetch_from_hub(
    repo_id: str, folder: str | os.PathLike[str], *, revision: str | None = None, token: str | None = None
) -> None:
    """Make a cache in a folder of what :func:`push_to_hub` published.

    Raises:
        ValueError: if the folder has a cache already, or the repository none.
        RuntimeError: if it could not be fetched.
    """
    folder = Path(folder).expanduser()
    if read_manifest(folder) is not None:
        raise ValueError(f"There is a teacher cache in {folder} already: give another folder, or delete that one.")
    try:
        snapshot = snapshot_download(
            repo_id, repo_type="dataset", revision=revision, token=token, allow_patterns=[MANIFEST, f"{_DATA}/*"]
        )
    except Exception as error:  # the network's, the Hub's and the disk's errors have no common class
        raise RuntimeError(
            f"The teacher cache {repo_id} could not be fetched from the Hub ({type(error).__name__}: "
            f"{first_line(error)}): check its name, the network and the token."
        ) from error
    public = read_manifest(Path(snapshot))
    files = sorted((Path(snapshot) / _DATA).glob("*.parquet"))
    if public is None or not files:
        raise ValueError(
            f"The data set {repo_id} on the Hub is no teacher cache (it lacks {MANIFEST} or {_DATA}/*.parquet)."
        )
    assert public["format"] == FORMAT
    draft = folder.with_name(f".{folder.name}.part{os.getpid()}")
    storage = RowStorage(draft, lambda: {key: public[key] for key in public if key != "format"})
    for file in files:
        for batch in _batches(file, storage.codec):
            for view in np.unique(batch["view"]):
                here = batch["view"] == view
                storage.write(int(view), batch["index"][here], batch["records"][here])
    storage.flush()
    storage.close()
    # Whole or not at all.
    folder.mkdir(parents=True, exist_ok=True)
    for file in sorted(draft.iterdir(), key=lambda file: file.name == MANIFEST):
        os.replace(file, folder / file.name)
    draft.rmdir()


def _write_parquet(storage: RowStorage, view: int, folder: Path) -> int:
    indices = np.flatnonzero(storage.written(view))
    size = max(1, _FILE_BYTES // storage.codec.record.itemsize)
    written = 0
    for part, start in enumerate(range(0, len(indices), size)):
        here = indices[start : start + size]
        records, intact = storage.read(view, here)
        records, here = records[intact], here[intact]
        columns = {"view": np.full(len(here), view, np.int32), "index": here}
        columns.update({name: records[name].reshape(len(here), -1) for name in _vectors(storage.codec)})
        columns.update({name: records[name] for name in _scalars(storage.codec)})
        folder.mkdir(exist_ok=True)
        table = datasets.Dataset.from_dict(
            {key: np.ascontiguousarray(value) for key, value in columns.items()}, features=_features(storage.codec)
        )
        table.to_parquet(folder / f"view-{view:05d}-{part:04d}.parquet")
        written += len(here)
    return written


def _batches(file: Path, codec: RowCodec) -> Iterator[dict[str, Any]]:
    table = datasets.Dataset.from_parquet(str(file), keep_in_memory=True).with_format("numpy")
    for batch in table.iter(10_000):
        records = np.zeros(len(batch["index"]), codec.record)
        for name in (*_vectors(codec), *_scalars(codec)):
            records[name] = np.asarray(batch[name]).reshape(records[name].shape)
        yield {"view": batch["view"], "index": batch["index"], "records": records}


def _vectors(codec: RowCodec) -> tuple[str, ...]:
    return ("logits",) if codec.dtype == "fp32" else ("distance",)


def _scalars(codec: RowCodec) -> tuple[str, ...]:
    return {"fp16": ("top",), "int8": ("top", "step"), "fp32": ()}[codec.dtype]


def _features(codec: RowCodec) -> datasets.Features:
    stored = datasets.Value({"fp16": "float16", "int8": "uint8", "fp32": "float32"}[codec.dtype])
    return datasets.Features(
        {
            "view": datasets.Value("int32"),
            "index": datasets.Value("int64"),
            **{name: datasets.List(stored, length=codec.num_classes) for name in _vectors(codec)},
            **{name: datasets.Value("float32") for name in _scalars(codec)},
        }
    )
