"""Putting samples together into a batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from transformers import default_data_collator


def collate(samples: Sequence[Mapping[str, Any]] | Mapping[str, Any]) -> dict[str, Any]:
    """A batch from a list of samples; a batch that the data set has put together already passes through.

    A map-style data set may define ``__getitems__(indices)`` and return a batch at once (as DigitsDataset does), which
    saves the work per sample. Lists go through transformers' default collator: ``label`` becomes ``labels``.
    """
    return dict(samples) if isinstance(samples, Mapping) else default_data_collator(list(samples))
