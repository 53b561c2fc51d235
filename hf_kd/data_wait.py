"""How much of training's time goes by in waiting for the next batch."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from accelerate.logging import get_logger

from .meters import Meters


logger = get_logger(__name__)

DATA_WAIT = "data_wait"
"""Log entry: percent of the steps' time since the last log, over all processes."""

TOO_MUCH = 10.0
"""Percent above which the hint is given."""

# Shorter intervals are judged together: a log of few short steps says little.
_ENOUGH_SECONDS = 1.0


class DataWait:
    """The share of the steps' wall time in which training waited for batches.

    A step begins with the request for its batches and ends before logging, evaluation and checkpoints, which are
    thus left out. An accelerator works on while the process waits: only where it has run out of work when the batches
    arrive did the wait cost time, and only then it counts. Nothing here waits for the device.

    Args:
        device: that training runs on.
        workers: how many processes load data, for the hint.
        clock: seconds.
    """

    def __init__(
        self, device: torch.device, workers: int = 0, *, clock: Callable[[], float] = time.perf_counter
    ) -> None:
        self._device, self._workers, self._clock = device, workers, clock
        self._begun: float | None = None
        self._queued: torch.Event | None = None
        self._waited = self._elapsed = 0.0
        # What the hint goes by: the first interval, in which workers start and networks warm up, is no part of it.
        self._logs = 0
        self._hinted = False
        self._judged_waited = self._judged_elapsed = 0.0
        self._interval = 0.0

    def begin(self) -> None:
        """A step begins: its batches are asked for."""
        self._begun = self._clock()

    def arrived(self) -> None:
        """The step's batches are there."""
        if self._begun is not None and (self._queued is None or self._queued.query()):
            self._waited += self._clock() - self._begun

    def end_step(self) -> None:
        """The step is over, or at least queued. What comes before the next one is no part of it."""
        if self._begun is None:
            return
        self._elapsed += self._clock() - self._begun
        self._begun = None
        if self._device.type != "cpu":
            self._queued = self._queued or torch.Event(self._device)
            self._queued.record()

    def report(self, meters: Meters) -> None:
        """Add the time since the last report to the meters, whose mean is then the percentage over all processes."""
        values = (100.0 * self._waited, self._elapsed)
        meters.add(DATA_WAIT, *(torch.tensor(value, device=self._device) for value in values))
        self._interval, self._waited, self._elapsed = self._elapsed, 0.0, 0.0

    def judge(self, percent: float) -> None:
        """Say once, if the percentage that was logged last is large, what makes it smaller."""
        self._logs += 1
        if self._hinted or self._logs == 1:
            return
        self._judged_waited += percent / 100.0 * self._interval
        self._judged_elapsed += self._interval
        if self._judged_elapsed < _ENOUGH_SECONDS:
            return
        share = 100.0 * self._judged_waited / self._judged_elapsed
        self._judged_waited = self._judged_elapsed = 0.0
        if share > TOO_MUCH:
            self._hinted = True
            logger.warning(
                "Training waited for its data during %.0f %% of the time since the last log: set "
                "dataloader_num_workers higher (it is %d), or make samples cheaper, by transforms that end in uint8 "
                "(train_transform(..., normalize=False)) or by data in memory. The log has this share as %s.",
                share,
                self._workers,
                DATA_WAIT,
            )
