"""Work on a CUDA stream of its own, beside what follows on the current one."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch


class SideStream:
    """Queues work beside the current stream's::

        with side.beside():
            a = f(x)  # begins when what the current stream has queued is done
        b = g(x)  # runs at the same time
        side.join()
        c = a + b

    What ``f`` reads must live until the join. What it makes may be used, and let go of, at any time after: its memory
    is only given out again to later work beside, which begins after all that used it.

    Args:
        device: on which; on anything but CUDA all runs in one row, as without this.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    @contextlib.contextmanager
    def beside(self) -> Iterator[None]:
        """Queue the body's work on the side."""
        if self._stream is None:
            yield
            return
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            yield

    def join(self) -> None:
        """Have the current stream's later work wait for what is on the side."""
        if self._stream is not None:
            torch.cuda.current_stream(self._device).wait_stream(self._stream)
