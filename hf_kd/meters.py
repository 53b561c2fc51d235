"""Running averages of a training loop, kept on the device and reduced once per log."""

from __future__ import annotations

import torch
from accelerate import Accelerator
from torch import Tensor


class Meters:
    """Weighted means by name, accumulated without ever waiting for the device.

    Args:
        drop_nonfinite: leave out sums that are not finite.
    """

    def __init__(self, *, drop_nonfinite: bool = False) -> None:
        self.drop_nonfinite = drop_nonfinite
        self._sums: dict[str, tuple[Tensor, int | Tensor]] = {}

    def add(self, name: str, total: Tensor, count: int | Tensor) -> None:
        """Add a sum over ``count`` samples, a scalar."""
        total = total.detach()
        if self.drop_nonfinite:
            finite = torch.isfinite(total)
            total, count = torch.where(finite, total, 0.0), finite * count
        if name in self._sums:
            # Never in place: what was given may be part of a graph that is still needed.
            total, count = self._sums[name][0] + total, self._sums[name][1] + count
        self._sums[name] = total, count

    def means(self, accelerator: Accelerator) -> dict[str, float]:
        """Mean of everything added since the last call, over all processes; every process must call it."""
        if not self._sums:
            return {}
        names = sorted(self._sums)
        pairs = [(total.float(), torch.as_tensor(count, dtype=torch.float32, device=total.device))
                 for total, count in map(self._sums.__getitem__, names)]  # fmt: skip
        sums = accelerator.reduce(torch.stack([torch.stack(pair) for pair in pairs]), reduction="sum")
        self._sums = {}
        return {name: total / count for name, (total, count) in zip(names, sums.tolist(), strict=True) if count}
