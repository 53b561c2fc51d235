"""Which samples of a batch are there only to fill it up.

With several processes accelerate completes the last batches of an epoch with samples from its beginning, so that every
process has equally many. A repeated sample must not count twice; which ones are repeats follows from how accelerate
shares batches out, and accelerate itself undoes it for metrics alone (``gather_for_metrics``).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.data_loader import BatchSamplerShard, DataLoaderDispatcher
from torch import Tensor
from torch.utils.data import IterableDataset
from transformers.trainer_pt_utils import find_batch_size


SAMPLE_MASK = "sample_mask"
"""Batch entry, (B,) bool: False for a sample that only fills the batch up. Batches without it are all real."""

_SERIAL = "serial"


class Numbered(IterableDataset):
    """A stream whose samples carry their number in it, by which repeats are told where every process reads for itself.

    With workers each counts its own samples, which is what accelerate batches.
    """

    def __init__(self, dataset: IterableDataset) -> None:
        super().__init__()
        self.dataset = dataset

    def __iter__(self) -> Iterator[Any]:
        for number, sample in enumerate(self.dataset):
            yield {**sample, _SERIAL: number} if isinstance(sample, Mapping) else sample

    def __len__(self) -> int:
        return len(self.dataset)  # type: ignore[arg-type]

    def set_epoch(self, epoch: int) -> None:
        if hasattr(self.dataset, "set_epoch"):
            self.dataset.set_epoch(epoch)


def mark_padding(batch: dict[str, Any], accelerator: Accelerator) -> dict[str, Any]:
    """The batch, with a SAMPLE_MASK if samples of it are repeats (or may be, where looking would stall a device).

    Args:
        batch: what accelerate's loader gave last, this process's part of it.
        accelerator: that prepared the loader.
    """
    if accelerator.num_processes == 1:
        return batch
    batch = dict(batch)
    serial = batch.pop(_SERIAL, None)
    size = find_batch_size(batch)
    if size is None:
        return batch
    device = next((value.device for value in batch.values() if isinstance(value, Tensor)), accelerator.device)
    place = accelerator.process_index * size + torch.arange(size, device=device)
    if serial is not None:
        # A sample that comes for the second time is not where its number belongs.
        real = serial.to(device) % (accelerator.num_processes * size) == place
    else:
        samples = _samples_of_last_batch(accelerator)
        if samples is None or samples >= accelerator.num_processes * size:
            return batch
        real = place < samples
    return {**batch, SAMPLE_MASK: real}


def _samples_of_last_batch(accelerator: Accelerator) -> int | None:
    """How many samples the epoch's last batch really has, over all processes; None before it, or if it is whole."""
    loader = accelerator.gradient_state.active_dataloader
    if loader is None or not loader.end_of_dataloader:
        return None
    if isinstance(loader, DataLoaderDispatcher):
        return loader.remainder
    sampler = getattr(loader, "batch_sampler", None)
    # After a resumption accelerate's sampler is inside one that skips batches.
    while sampler is not None and not isinstance(sampler, BatchSamplerShard):
        sampler = getattr(sampler, "batch_sampler", None)
    if sampler is None or sampler.drop_last or sampler.batch_size is None:
        return None
    whole = sampler.batch_size * (1 if sampler.split_batches else sampler.num_processes)
    return len(sampler.batch_sampler.sampler) % whole or None
