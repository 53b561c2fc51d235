"""Telling, after each epoch, which samples could not be read."""

from __future__ import annotations

from typing import Any

from accelerate.logging import get_logger
from accelerate.utils import gather_object
from transformers import TrainerCallback

from .bad_samples import SkippingDataset


logger = get_logger(__name__)

_MOST_NAMED = 20


class BadSampleReport(TrainerCallback):
    """Says how many training samples have been replaced by others, and which, over all workers and processes."""

    def __init__(self) -> None:
        self.reported = 0

    def on_epoch_end(self, args: Any, state: Any, control: Any, train_dataloader: Any = None, **kwargs: Any) -> None:
        dataset = getattr(train_dataloader, "dataset", None)
        if isinstance(dataset, SkippingDataset):
            bad = sorted(set(gather_object(dataset.bad_indices)))
            if len(bad) > self.reported:
                rest = f" and {len(bad) - _MOST_NAMED} more" if len(bad) > _MOST_NAMED else ""
                logger.warning(
                    "%d of %d training samples could not be read and were replaced by others: those with index %s%s.",
                    len(bad),
                    len(dataset),
                    ", ".join(map(str, bad[:_MOST_NAMED])),
                    rest,
                )
            self.reported = len(bad)
