"""Pieces of sentences that messages are made of."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any


def some(values: Iterable[Any], most: int) -> str:
    """The first ``most`` values with commas between them, and how many more there are."""
    values = list(values)
    rest = f" and {len(values) - most} more" if len(values) > most else ""
    return ", ".join(map(str, values[:most])) + rest


def one_line(error: Exception) -> str:
    """What an error says, on one line, or its type if it says nothing."""
    return " ".join(str(error).split()) or type(error).__name__


def first_line(error: Exception) -> str:
    """The first line of what an error says, or its type if it says nothing."""
    return next(iter(str(error).strip().splitlines()), "") or type(error).__name__
