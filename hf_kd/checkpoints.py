"""Checkpoints that are whole or not there: a manifest is written last, and what lacks it is passed over."""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path

from accelerate.utils.constants import FSDP_MODEL_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.utils import logging

from .files import to_disk, write_text


logger = logging.get_logger(__name__)

MANIFEST = "complete.json"
"""Written into a checkpoint when everything else of it is on the disk: its files and their sizes."""

_NAME = re.compile(rf"{PREFIX_CHECKPOINT_DIR}-(\d+)")


# ---- Writing -------------------------------------------------------------------------------------------------------


def discard(folder: Path) -> None:
    """Remove a checkpoint, its manifest first: one that is half removed is not taken for a whole one."""
    (folder / MANIFEST).unlink(missing_ok=True)
    shutil.rmtree(folder, ignore_errors=True)


def seal(folder: Path) -> None:
    """Declare a checkpoint complete: bring its files to the disk, then write their names and sizes."""
    sizes = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.name != MANIFEST:
            to_disk(path)
            sizes[path.relative_to(folder).as_posix()] = path.stat().st_size
    write_text(folder / MANIFEST, json.dumps({"files": sizes}, indent=2) + "\n")


# ---- Reading -------------------------------------------------------------------------------------------------------


def defect(folder: Path) -> str | None:
    """Why a checkpoint cannot be used, or None if it is complete."""
    try:
        sizes = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["files"]
        expected = {str(name): int(size) for name, size in sizes.items()}
    except FileNotFoundError:
        return f"it has no {MANIFEST}, so writing it was not finished"
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        return f"its {MANIFEST} cannot be read ({type(error).__name__})"
    for name, size in expected.items():
        path = folder / name
        if not path.is_file():
            return f"its {name} is missing"
        if path.stat().st_size != size:
            return f"its {name} has {path.stat().st_size} bytes, not {size}"
    return None


def engine(folder: Path) -> str | None:
    """What wrote a checkpoint's optimiser state: "FSDP", "DeepSpeed" or None."""
    if any(folder.glob(f"{FSDP_MODEL_NAME}*")):
        return "FSDP"
    # DeepSpeed notes here the folder that holds its own files.
    return "DeepSpeed" if (folder / "latest").is_file() else None


def checkpoints(output_dir: str | os.PathLike[str]) -> list[Path]:
    """The checkpoint folders in an output folder, complete or not, the latest step first."""
    try:
        entries = [path for path in Path(output_dir).iterdir() if _NAME.fullmatch(path.name) and path.is_dir()]
    except (FileNotFoundError, NotADirectoryError):
        return []
    return sorted(entries, key=lambda path: int(path.name.rpartition("-")[2]), reverse=True)


def last_complete(output_dir: str | os.PathLike[str]) -> Path | None:
    """The complete checkpoint of the latest step, or None; later ones that are incomplete are named in a warning."""
    for folder in checkpoints(output_dir):
        reason = defect(folder)
        if reason is None:
            return folder
        logger.warning("The checkpoint %s is passed over: %s.", folder, reason)
    return None
