"""Putting samples together into a batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from transformers import default_data_collator


def collate(samples: Sequence[Mapping[str, Any]] | Mapping[str, Any]) -> dict[str, Any]:
    """A batch from a list of samples; a batch that the data set has put together already passes through.

    A map-style data set may define ``__getitems__(indices)`` and return a batch at once (as DigitsDataset does), which
    saves the work per sample. Lists go through transformers' default collator: ``label`` becomes ``labels``.

    Raises:
        TypeError: for samples that are not dicts, and for labels that are texts.
        ValueError: for samples that do not make a batch: entries that one has and another lacks, of several shapes, or
            that are no numbers.
    """
    if isinstance(samples, Mapping):
        return dict(samples)
    samples = list(samples)
    for sample in samples:
        if not isinstance(sample, Mapping):
            raise TypeError(
                f"A sample must be a dict with 'pixel_values' and 'labels', got a {type(sample).__name__}: have the "
                "data set return one, or give a `data_collator` that makes batches of such samples."
            )
        # transformers' collator leaves texts out, and the batch would seem to have no labels.
        for key in {"label", "labels"} & sample.keys():
            if isinstance(sample[key], str):
                raise TypeError(f"{key!r} is the text {sample[key]!r}: labels must be class numbers, from 0.")
    try:
        return default_data_collator(samples)
    except Exception as error:  # what is wrong with a sample shows in a KeyError, TypeError, RuntimeError, ...
        raise ValueError(f"The samples do not make a batch: {_why(samples) or error}.") from error


def _why(samples: Sequence[Mapping[str, Any]]) -> str | None:
    for key in dict.fromkeys(key for sample in samples for key in sample):
        values: list[Any] = [sample.get(key) for sample in samples]
        given = [value is not None for value in values]
        if not all(given):
            if any(given):
                return (
                    f"{key!r} is in sample {given.index(True)} of the batch and not in sample {given.index(False)}; "
                    "give it to all (-100 is the label of a sample without a label) or to none"
                )
            continue
        shapes = list(dict.fromkeys(tuple(value.shape) for value in values if hasattr(value, "shape")))
        if len(shapes) > 1:
            return (
                f"{key!r} has the shape {shapes[0]} in one and {shapes[1]} in another; have the transform bring them "
                "to one size"
            )
        kinds = dict.fromkeys("tensor" if hasattr(v, "shape") else type(v).__name__ for v in values)
        if not kinds.keys() <= {"tensor", "bool", "int", "float", "str"}:
            odd = next(iter(kinds.keys() - {"tensor", "bool", "int", "float", "str"}))
            return f"{key!r} is of type {odd}; give a tensor or a number, such as the transform makes of it"
        if "tensor" in kinds and len(kinds) > 1:
            return f"{key!r} is of several types ({', '.join(kinds)}); give the same for all"
    return None
