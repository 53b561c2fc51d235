"""SIGTERM, by which schedulers announce that they take the machine away: a checkpoint is written first."""

from __future__ import annotations

import functools
import os
import signal
import threading
import time
from collections.abc import Callable
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import TrainerCallback


EXIT_STATUS = 128 + signal.SIGTERM
"""Of a process that SIGTERM ended, as shells write it."""

# How long the workers of a loader outlive a signal that was sent to the whole process group, at most.
_GRACE_SECONDS = 20.0


class PreemptionCallback(TrainerCallback):
    """Ends training with a checkpoint at the end of the step in which SIGTERM came.

    Transformers' own (``enable_jit_checkpoint``) saves between a backward pass and its update, where a resumed run
    cannot continue exactly, and each process by itself, so that several do not stop at the same step. Here the
    processes agree: each says at the start of a step whether it was told to stop, and all stop at the step's end.
    """

    def __init__(self) -> None:
        self.requested = False
        """Whether this process got the signal."""
        self.stopped_at: int | None = None
        """The step after which training ended for it."""
        self._previous: Any = None
        # In shared memory, where workers see whether the signal is being answered.
        self._guarded = torch.zeros((), dtype=torch.uint8).share_memory_()
        self._agreed: Tensor | None = None
        self._copied: torch.Event | None = None

    def share(self, counts: Tensor, accelerator: Accelerator) -> Tensor:
        """Counts of this process's step, (n,) int64, summed over all processes; the signal travels with them."""
        if accelerator.num_processes == 1:
            return counts
        summed: Tensor = accelerator.reduce(torch.cat([counts, counts.new_tensor([self.requested])]), reduction="sum")
        on_device = summed.device.type != "cpu"
        # Copied aside, to be read at the step's end without waiting for the step's own work.
        self._agreed = torch.empty(1, dtype=summed.dtype, pin_memory=on_device)
        self._agreed.copy_(summed[-1:], non_blocking=True)
        if on_device:
            self._copied = torch.Event(summed.device)
            self._copied.record()
        return summed[:-1]

    def _is_agreed(self) -> bool:
        if self._agreed is None:
            return self.requested
        if self._copied is not None:
            self._copied.synchronize()
        return bool(self._agreed)

    def _on_signal(self, *_: Any) -> None:
        self.requested = True

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.requested, self.stopped_at, self._agreed = False, None, None
        # Python takes signals in its main thread alone.
        if args.enable_jit_checkpoint and threading.current_thread() is threading.main_thread():
            self._previous = signal.signal(signal.SIGTERM, self._on_signal)
            self._guarded.fill_(1)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._is_agreed():
            self.stopped_at = state.global_step
            control.should_save = True
            control.should_training_stop = True

    def restore(self) -> None:
        """Give the signal back to whoever had it before training."""
        self._guarded.fill_(0)
        if self._previous is not None:
            signal.signal(signal.SIGTERM, self._previous)
            self._previous = None

    def let_workers_finish(self, loader: DataLoader) -> None:
        """Have a loader's workers outlive a SIGTERM sent to them too: the step under way needs their batches."""
        # Accelerate's loaders have torch's inside, which starts the workers.
        loader = getattr(loader, "base_dataloader", loader)
        if loader.num_workers > 0:
            loader.worker_init_fn = functools.partial(_init_worker, loader.worker_init_fn, self._guarded)


# ---- In a loader's worker ------------------------------------------------------------------------------------------


def _init_worker(own: Callable[[int], None] | None, guarded: Tensor, worker: int) -> None:
    signal.signal(signal.SIGTERM, functools.partial(_end_after_training, guarded))
    if own is not None:
        own(worker)


def _end_after_training(guarded: Tensor, *_: Any) -> None:
    if not guarded:
        # Python ends workers by this signal too, when the program is done.
        os._exit(0)
    threading.Thread(target=_wait_and_end, args=(guarded,), daemon=True).start()


def _wait_and_end(guarded: Tensor) -> None:
    deadline = time.monotonic() + _GRACE_SECONDS
    while guarded and time.monotonic() < deadline:
        time.sleep(0.02)
    os._exit(0)
