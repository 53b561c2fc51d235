"""The rows of the paper's tables, as recipes/configs/table.yaml has them, and the files that are written from it."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import yaml


CONFIGS = Path(__file__).parent / "configs"
TABLE = CONFIGS / "table.yaml"
RESULTS = "results.json"
"""What a run of a row leaves in its folder."""
MEASURED = CONFIGS / "measured.yaml"
SOURCE = "arXiv 2402.11148"

# What a row of the table has beside fields of DistillationConfig.
_NO_SETTINGS = ("top1", "std", "note")


@dataclass(frozen=True)
class Pair:
    """Teacher and student: how they are called, and the paper's top-1 (%) of each without the other."""

    name: str
    teacher: str
    student: str
    teacher_top1: float
    student_top1: float
    runs: int | None

    @property
    def title(self) -> str:
        return f"{self.teacher} → {self.student}"


@dataclass(frozen=True)
class Row:
    """One experiment: its name as results.json has it, and what its YAML file says.

    Args:
        settings: the file's fields.
        top1, std: the paper's, in % and points.
        notes: where the settings are from, and what else is to be known.
    """

    name: str
    section: str
    pair: Pair
    method: str
    method_title: str
    settings: dict[str, Any]
    top1: float
    std: float | None
    notes: tuple[str, ...]

    @property
    def path(self) -> Path:
        return CONFIGS / f"{self.name}.yaml"


@cache
def read_table() -> dict[str, Any]:
    return yaml.safe_load(TABLE.read_text(encoding="utf-8"))


def rows(table: dict[str, Any]) -> list[Row]:
    """All rows, in the table's order."""
    return [row for name, section in table.items() for pair in section["pairs"] for row in _of(name, section, pair)]


def _of(name: str, section: dict[str, Any], entry: dict[str, Any]) -> list[Row]:
    teacher, student = (section["networks"][entry[role]["name"]] for role in ("teacher", "student"))
    pair = Pair(
        f"{entry['teacher']['name']}_{entry['student']['name']}", teacher["title"], student["title"],
        entry["teacher"]["top1"], entry["student"]["top1"], entry.get("runs"),
    )  # fmt: skip
    result = []
    for key, method in section["methods"].items():
        if key not in entry["rows"]:
            continue
        cell = entry["rows"][key]
        settings = {**method["settings"], **{field: cell[field] for field in cell if field not in _NO_SETTINGS}}
        if "pair_settings" in method:
            own = entry[method["pair_settings"]]
            settings["feature_loss_kwargs"] = {**settings["feature_loss_kwargs"], **own}
        networks = {"student": student["timm"]}
        if settings["loss"] != "ce" or "feature_loss" in settings:
            networks = {"teacher": teacher["timm"], **networks}
        if "learning_rate" in student:
            settings["learning_rate"] = student["learning_rate"]
        result.append(
            Row(
                f"{name}/{section['files'].format(pair=pair.name, method=key)}",
                name, pair, key, method["title"], {**networks, **settings}, cell["top1"], cell.get("std"),
                tuple(filter(None, (method["source"], cell.get("note"), entry["teacher"].get("note")))),
            )
        )  # fmt: skip
    return result


def measured() -> dict[str, Any]:
    """What was measured with this code, by row: top1 in %, std in points (None of one run), runs."""
    return yaml.safe_load(MEASURED.read_text(encoding="utf-8")) or {} if MEASURED.is_file() else {}
