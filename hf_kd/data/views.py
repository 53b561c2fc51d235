"""What makes the augmented view of a sample a function of (seed, epoch, sample) alone.

Transforms of torchvision and timm draw from the process's global generators (torch, `random`, numpy). Left alone, a
view then depends on the number of workers, on the rank and on everything drawn before it. Here each sample is
transformed under generators seeded from a hash of its own coordinates, and the global ones are put back afterwards.
"""

import hashlib
import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from transformers import TrainerCallback


def view_seed(seed: int, epoch: int, key: int) -> int:
    """A 63-bit seed for one view of one sample; `key` is the sample's position (or a hash of its content)."""
    digest = hashlib.blake2b(f"{seed}:{epoch}:{key}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


@contextmanager
def view_rng(seed: int, epoch: int, key: int) -> Iterator[int]:
    """Run the body under torch (CPU), `random` and numpy generators seeded for one view; restore all three after it.

    Yields the seed in use (see [`view_seed`]). Generators of accelerators are not touched: transforms run on the CPU.
    """
    with keeping_rng():
        yield seed_view(seed, epoch, key)


@contextmanager
def keeping_rng() -> Iterator[None]:
    """Restore torch's (CPU), `random`'s and numpy's generators after the body, for any number of [`seed_view`].

    It takes 90 microseconds, nearly all of it numpy's; to seed for a view takes 8.
    """
    # `torch.manual_seed` and `fork_rng` also visit every accelerator's generator: 100 microseconds against 2.
    generator = torch.default_generator
    saved = generator.get_state(), random.getstate(), np.random.get_state(legacy=False)
    try:
        yield
    finally:
        generator.set_state(saved[0])
        random.setstate(saved[1])
        np.random.set_state(saved[2])


def seed_view(seed: int, epoch: int, key: int) -> int:
    """Seed the three generators for one view, and return the seed (see [`view_seed`])."""
    value = view_seed(seed, epoch, key)
    torch.default_generator.manual_seed(value)
    random.seed(value)
    np.random.seed(value & 0xFFFFFFFF)
    return value


class EpochMixin:
    """An epoch that worker processes see as well, persistent ones included: it lives in shared memory.

    A subclass calls `_init_epoch` and makes each view a function of (seed, `epoch`, index), see [`view_rng`].
    """

    _period: int | None = None

    def _init_epoch(self) -> None:
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()

    @property
    def epoch(self) -> int:
        """The epoch whose views are served; 0 until [`set_epoch`] is called."""
        return int(self._epoch)

    @property
    def period(self) -> int | None:
        """After how many epochs the views repeat (see [`cycle_views`]); None if they do not."""
        return self._period

    @property
    def fixed_views(self) -> bool:
        """Whether a sample is the same in every epoch. False unless the data set knows that it is."""
        return False

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch (0, 1, ...) whose views are served from now on, in this process and in its workers."""
        self._epoch.fill_(int(epoch) % self._period if self._period else int(epoch))

    def cycle_views(self, period: int | None) -> None:
        """Have the views repeat: epoch e serves those of epoch e % `period`; None for new ones in every epoch.

        The order of the samples, which is a sampler's, is as new in every epoch as before. Raises ValueError for a
        period below 1.
        """
        if period is not None and period < 1:
            raise ValueError(f"`period` must be a number of epochs, at least 1, or None, got {period!r}.")
        self._period = period
        self.set_epoch(self.epoch)


def set_dataset_epoch(dataset: Any, epoch: int) -> None:
    """Call `set_epoch` on `dataset`, or on the data sets inside it (torch's `Subset`, `ConcatDataset`)."""
    if hasattr(dataset, "set_epoch"):
        dataset.set_epoch(epoch)
        return
    inner = list(getattr(dataset, "datasets", None) or [])
    if getattr(dataset, "dataset", None) is not None:
        inner.append(dataset.dataset)
    for part in inner:
        set_dataset_epoch(part, epoch)


class EpochCallback(TrainerCallback):
    """Tells the training data set which epoch begins, in any Trainer.

    Accelerate's loaders do so themselves only where the sampler has no `set_epoch` of its own one level down: with
    several processes, and in the epoch in which training resumes, they set the sampler's epoch and not the data set's,
    and every epoch would then see the views of epoch 0.
    """

    def on_epoch_begin(self, args: Any, state: Any, control: Any, train_dataloader: Any = None, **kwargs: Any) -> None:
        # An iterable data set may be left before `state.epoch` is whole; accelerate does reach those.
        if train_dataloader is not None and not isinstance(train_dataloader.dataset, torch.utils.data.IterableDataset):
            # The epoch is a sum of fractions (step / steps per epoch): 2.9999999 is the start of epoch 3.
            set_dataset_epoch(train_dataloader.dataset, int((state.epoch or 0) + 1e-6))
