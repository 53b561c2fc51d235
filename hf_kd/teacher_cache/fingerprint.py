"""What a cache was made for, so that it is never read for anything else.

The order of the samples, the batch size, the number of processes, the student, the loss and its seed are no part of
it. How the student's images are normalised is: from them the teacher's are made.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import timm
import torch
from timm.models import get_pretrained_cfg
from torch import nn

from ..networks import Preprocessing, hub_id_of, unwrap
from ..teacher import Ensemble, Teacher, cached_commit
from .stored_views import StoredViews


# Which files of a folder say what its network computes.
_FILES = ("config.json", "preprocessor_config.json", "*.safetensors", "pytorch_model*.bin")

_OF_IMAGES = ("mean", "std", "input_size")

_PARTS = {
    "classes": "class count",
    "samples": "number of samples",
    "data": "data set",
    "table": "table of data (as `datasets` names it)",
    "augmented": "kind of views",
    "view_seed": "seed of the views",
    "transform": "transform",
    "views": "view of the samples (their data or transform)",
    "images": "preprocessing of the student's images",
    "precision": "precision of the teacher",
    "preprocessing": "preprocessing of the teacher's images",
    "class_map": "class map of the teacher",
    "teacher": "teacher",
}


def fingerprint(
    teacher: Mapping[str, Any],
    views: StoredViews,
    *,
    num_classes: int,
    images: Preprocessing | None,
    precision: str,
) -> dict[str, Any]:
    """What decides about the values of the rows, in JSON values, by part.

    Args:
        teacher: of :func:`describe_teacher`, or as it is in a cache's manifest.
        views: of the training data.
        num_classes: K.
        images: how the student's images are normalised.
        precision: in which the teacher runs.
    """
    base = views.base
    content = views.content()
    return {
        "classes": num_classes,
        "samples": views.samples,
        "data": None if content is None else f"{type(base).__name__} {content[:16]}",
        "table": getattr(base, "table_fingerprint", None),
        "augmented": "the same in every epoch" if views.fixed else "new in every epoch",
        "view_seed": None if views.fixed else getattr(base, "seed", None),
        "transform": _without_addresses(repr(base.transform)) if hasattr(base, "transform") else None,
        # Where the data themselves cannot be seen, more samples stand in for them.
        "views": views.views(16 if content is None else 4)[:16],
        # From the images as they are normalised the teacher's are made; how they were cropped is the transform's.
        "images": None if images is None else _plain({key: getattr(images, key) for key in _OF_IMAGES}),
        "precision": precision,
        "preprocessing": teacher["preprocessing"],
        "class_map": teacher["class_map"],
        "teacher": {key: value for key, value in teacher.items() if key not in ("preprocessing", "class_map")},
    }


def check_fingerprint(stored: Mapping[str, Any], found: Mapping[str, Any], folder: Path) -> None:
    """Raises ValueError, with the part and both values, if a cache was made for something else."""
    for part, name in _PARTS.items():
        was, now = stored.get(part), found.get(part)
        if part == "teacher":
            same = same_teacher(was or {}, now or {})
            was, now = (_teacher_in_words(value or {}) for value in (was, now))
        elif part == "table":
            # A cache that came from elsewhere has none.
            same = was is None or was == now
        else:
            same = was == now
        if not same:
            raise ValueError(
                f"The teacher cache {folder} was made for another {name}: {was} there, {now} in this run. Give this "
                "run the same, or another `teacher_cache_dir`, or delete that folder to have the cache made anew."
            )


# ---- The teacher ---------------------------------------------------------------------------------------------------


def describe_teacher(teacher: Teacher, source: Mapping[str, Any] | None) -> dict[str, Any]:
    """What a teacher is, before it is placed on a device: hashes of weights and architecture, and what surrounds them.

    Args:
        source: of :func:`source_of`, by which it is known again without being built.

    Raises:
        ValueError: for a function, which cannot be known again.
    """
    if not teacher.is_module:
        raise ValueError(
            f"The teacher {teacher.name} is a function, which a teacher cache cannot tell from another one in a later "
            "run: make it a torch module with its weights in it, or leave out teacher_cache_dir."
        )
    members = teacher.members if isinstance(teacher, Ensemble) else [teacher]
    networks: list[nn.Module] = [unwrap(cast("nn.Module", member.model)) for member in members]
    return {
        "name": teacher.name,
        "hub_id": teacher.hub_id,
        "revision": teacher.revision,
        "num_classes": teacher.num_classes,
        "parameters": teacher.num_parameters,
        "declares_preprocessing": teacher.declares_preprocessing,
        "source": None if source is None else dict(source),
        "architecture": _hash_text("\n".join(_without_addresses(repr(network)) for network in networks)),
        "weights": _hash_weights(networks),
        "preprocessing": [_plain(asdict(m.preprocessing)) if m.preprocessing else None for m in members],
        "class_map": [member.class_groups for member in members],
    }


def same_teacher(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Whether two descriptions are of one teacher: by where it is from, or by what it is."""
    if one.get("source") is not None and one.get("source") == other.get("source"):
        return True
    return all(one.get(key) == other.get(key) for key in ("architecture", "weights"))


def source_of(teacher: Any, **options: Any) -> dict[str, Any] | None:
    """Where a teacher given by name, or several, are from: hashes of files or a commit on the Hub.

    None if it is not given by name, or if that does not show (its files are not here yet, it is from a plain URL).

    Args:
        teacher: what a trainer was given.
        options: with which it is loaded (checkpoint, revision, class_map, ...).
    """
    if isinstance(teacher, (list, tuple)):
        members = [source_of(member, **options) for member in teacher]
        return None if None in members or not members else {"members": members}
    if not isinstance(teacher, (str, Path)):
        return None
    found = _origin(str(teacher), options.get("checkpoint"), options.get("revision"))
    if found is None:
        return None
    # What is loaded follows from these and the files.
    given = {key: options[key] for key in ("num_classes", "class_map", "input_size") if options.get(key) is not None}
    return _plain({**found, "options": given})


def _origin(name: str, checkpoint: Any, revision: str | None) -> dict[str, Any] | None:
    path = Path(name.removeprefix("local-dir:")).expanduser()
    if checkpoint is not None or path.exists():
        files = [Path(checkpoint).expanduser()] if checkpoint is not None else [path] if path.is_file() else []
        folder = path.parent if path.is_file() else path
        if path.exists():
            # Of a folder whose weights are not used, what says which network it is.
            patterns = _FILES if not files else _FILES[:2]
            files += [file for pattern in patterns for file in sorted(folder.glob(pattern))]
        if not all(file.is_file() for file in files):
            return None
        architecture = {} if path.exists() else {"architecture": name}
        return {**architecture, "files": {file.name: _hash_file(file) for file in files}}
    if name.startswith(("hf-hub:", "hf_hub:")) or "/" in name:
        repository, _, asked = name.removeprefix("hf-hub:").removeprefix("hf_hub:").partition("@")
    else:
        if not timm.is_model(name.partition(".")[0]):
            return None
        cfg = get_pretrained_cfg(name)
        repository = hub_id_of(SimpleNamespace(pretrained_cfg=cfg.to_dict() if cfg else {})) or ""  # type: ignore[arg-type]
        asked = ""
    commit = cached_commit(repository, revision or asked or "main") if repository else None
    return None if commit is None else {"hub_id": repository, "commit": commit}


def _teacher_in_words(teacher: Mapping[str, Any]) -> str:
    weights = str(teacher.get("weights", "unknown"))[:16]
    return f"{teacher.get('name')} (weights {weights}, architecture {str(teacher.get('architecture'))[:16]})"


# ---- Hashes --------------------------------------------------------------------------------------------------------


@torch.no_grad()
def _hash_weights(networks: list[nn.Module]) -> str:
    digest = hashlib.sha256()
    for network in networks:
        for key, value in network.state_dict().items():
            if isinstance(value, torch.Tensor):
                value = value.detach().cpu().contiguous()
                digest.update(f"{key} {value.dtype} {tuple(value.shape)}\n".encode())
                digest.update(value.flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _hash_file(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(2**20):
            digest.update(chunk)
    return digest.hexdigest()


def _hash_text(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _without_addresses(text: str) -> str:
    """An object's description, on one line, without where in memory it lies."""
    return " ".join(re.sub(r" at 0x[0-9a-fA-F]+", "", text).split())


def _plain(value: Any) -> Any:
    """As JSON gives it back."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, np.ndarray)):
        return [_plain(item) for item in value]
    return value
