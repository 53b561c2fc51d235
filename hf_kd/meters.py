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
        self._sums: dict[str, Tensor] = {}

    def add(self, name: str, total: Tensor, count: Tensor) -> None:
        """Add a sum over ``count`` samples, both scalars."""
        pair = torch.stack([total.detach(), count.detach().to(total.dtype)])
        if self.drop_nonfinite:
            pair = torch.where(torch.isfinite(pair[0]), pair, 0.0)
        self._sums[name] = self._sums[name] + pair if name in self._sums else pair

    def add_values(self, name: str, values: Tensor, mask: Tensor | None = None) -> None:
        """Add one value per sample; where ``mask`` is False there is none."""
        if mask is None:
            self.add(name, values.sum(), torch.tensor(values.numel(), device=values.device))
        else:
            self.add(name, torch.where(mask, values, 0.0).sum(), mask.sum())

    def means(self, accelerator: Accelerator) -> dict[str, float]:
        """Mean of everything added since the last call, over all processes; every process must call it."""
        if not self._sums:
            return {}
        names = sorted(self._sums)
        stacked = torch.stack([self._sums[name].float() for name in names])
        sums = accelerator.reduce(stacked, reduction="sum")
        self._sums = {}
        return {name: total / count for name, (total, count) in zip(names, sums.tolist(), strict=True) if count}
