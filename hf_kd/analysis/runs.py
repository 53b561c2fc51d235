"""What a finished run has left in its folder: its log, how it came about, its logits."""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers.trainer import TRAINER_STATE_NAME

from ..checkpoints import checkpoints, defect
from ..curves import points
from ..model_card import PROVENANCE
from ..repository import TRAINING_ARGS
from ..text import one_line
from .logits import LOGITS, SavedLogits, load_logits


STATE = TRAINER_STATE_NAME
"""Where transformers' Trainer keeps its log."""


@dataclass(frozen=True)
class Run:
    """A run as the figures see it.

    Attributes:
        name: what it is called in the figures.
        folder: where it comes from.
        history: the Trainer's log, one dict of numbers an entry; empty if the folder has none.
        provenance: distillation.json, or {}.
        logits: or None if the folder has none.
    """

    name: str
    folder: Path
    history: Sequence[Mapping[str, float]] = field(default=(), repr=False)
    provenance: Mapping[str, Any] = field(default_factory=dict, repr=False)
    logits: SavedLogits | None = field(default=None, repr=False)

    @classmethod
    def load(cls, folder: str | os.PathLike[str], name: str | None = None) -> Run:
        """Read a run's folder: the ``output_dir`` of a trainer, or one of its checkpoints.

        The log and ``distillation.json`` are those of the folder itself, or failing that of its last complete
        checkpoint.

        Args:
            folder: with ``trainer_state.json``, ``logits.safetensors``, or both.
            name: by default :func:`describe` of the run, or the folder's name.

        Raises:
            ValueError: for a folder that is missing or has neither file, and for a damaged file, in one sentence.
        """
        folder = Path(folder)
        if not folder.is_dir():
            raise ValueError(f"There is no folder {folder}: give the output folder of a run.")
        log = _folder_of_log(folder)
        has_logits = (folder / LOGITS).is_file()
        if log is None and not has_logits:
            raise ValueError(
                f"{folder} has no {STATE}, nor has a checkpoint in it, and no {LOGITS}: give the output folder of a "
                f'run. A run with save_strategy="no" leaves both with hf_kd.analysis.save_run(trainer, test_set).'
            )
        provenance = _read(folder / PROVENANCE) or (_read(log / PROVENANCE) if log else {})
        arguments = _read(folder / TRAINING_ARGS) or (_read(log / TRAINING_ARGS) if log else {})
        return cls(
            name or describe(provenance, arguments) or folder.resolve().name,
            folder,
            () if log is None else _history(log / STATE),
            provenance,
            load_logits(folder) if has_logits else None,
        )

    def curve(self, key: str, factor: float = 1.0) -> list[tuple[float, float]]:
        """(epoch, factor · value) of each log entry that has the key; the last one of an epoch counts."""
        return points(self.history, key, factor)

    def has(self, key: str) -> bool:
        """Whether the log holds a number under this key that can be drawn."""
        return any(math.isfinite(epoch) and math.isfinite(value) for epoch, value in self.curve(key))


def load_runs(folders: Sequence[str | os.PathLike[str]], names: Sequence[str] | None = None) -> list[Run]:
    """Several runs with names that tell them apart: those given, or their own, with the folder where two are equal.

    Raises:
        ValueError: as :meth:`Run.load`, and for names that are too few, too many, or not different.
    """
    if names is not None and len(names) != len(folders):
        raise ValueError(f"There are {len(folders)} runs and {len(names)} names: give one name for each run.")
    if names is not None and len(set(names)) < len(names):
        twice = next(name for name in names if list(names).count(name) > 1)
        raise ValueError(f"Two runs cannot have the same name, got {twice!r} twice.")
    runs = [Run.load(folder, name) for folder, name in zip(folders, names or [""] * len(folders), strict=True)]
    own = [run.name for run in runs]
    if len(set(own)) == len(own):
        return runs
    places = [_short(run.folder, [other.folder for other in runs]) for run in runs]
    return [
        dataclasses.replace(run, name=f"{run.name} ({place})") if own.count(run.name) > 1 else run
        for run, place in zip(runs, places, strict=True)
    ]


def describe(provenance: Mapping[str, Any], arguments: Mapping[str, Any] | None = None) -> str:
    """A run's objective in a few words: "wttm γ=0.25 β=auto", "ce ε=0.5", "kd γ=0.25 β=9 no labels".

    Args:
        provenance: distillation.json; "" is returned if it names no loss.
        arguments: training_args.json, which knows ε, the label smoothing.
    """
    loss = provenance.get("loss")
    if not loss:
        return ""
    words = [str(loss)]
    for symbol, key in (("γ", "gamma"), ("β", "beta_setting")):
        value = provenance.get(key)
        if value is not None:
            words.append(f"{symbol}={_short_number(value)}")
    if provenance.get("ce_weight") == 0:
        words.append("no labels")
    smoothing = (arguments or {}).get("label_smoothing_factor")
    if smoothing:
        words.append(f"ε={_short_number(smoothing)}")
    if provenance.get("feature_loss"):
        words.append(f"+ {provenance['feature_loss']} μ={_short_number(provenance.get('feature_weight'))}")
    return " ".join(words)


def _short_number(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, (int, float)) else str(value)


def _short(folder: Path, others: Sequence[Path]) -> str:
    """The last parts of a folder's path: as many as tell it from the others."""
    parts = folder.resolve().parts
    for length in range(1, len(parts)):
        if [other.resolve().parts[-length:] for other in others].count(parts[-length:]) == 1:
            return "/".join(parts[-length:])
    return str(folder)


def _folder_of_log(folder: Path) -> Path | None:
    if (folder / STATE).is_file():
        return folder
    found = [checkpoint for checkpoint in checkpoints(folder) if (checkpoint / STATE).is_file()]
    # Another trainer's checkpoints have no manifest: then the last one will do.
    return next((checkpoint for checkpoint in found if defect(checkpoint) is None), found[0] if found else None)


def _history(path: Path) -> list[dict[str, float]]:
    """The log's numbers; infinite ones, which cannot be drawn, as NaN."""
    entries = _read(path).get("log_history")
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise ValueError(f"{path} has no list `log_history`: it is not the state of a Trainer.")
    return [
        {
            key: float(value) if math.isfinite(value) else math.nan
            for key, value in entry.items()
            if isinstance(value, (int, float)) and not isinstance(value, bool)
        }
        for entry in entries
    ]


def _read(path: Path) -> dict[str, Any]:
    """A JSON file's object; {} if there is no such file."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} is damaged, or no JSON file: {one_line(error)}.") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold a JSON object, got a {type(content).__name__}.")
    return content
