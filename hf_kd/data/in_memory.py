"""What data sets share whose images lie in memory and are fetched a whole batch at a time."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from .views import EpochMixin


class InMemoryDataset(EpochMixin, Dataset):
    """A subclass has `labels`, int64 (N,), and defines `__getitems__`, which a `DataLoader` calls for a batch."""

    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, Any]:
        index = range(len(self))[index]
        batch = self.__getitems__([index])
        return {"pixel_values": batch["pixel_values"][0], "labels": batch["labels"][0], "index": index}

    def __getitems__(self, indices: Sequence[int]) -> dict[str, Tensor]:
        """A whole batch at once: {"pixel_values": (B, 3, 32, 32), "labels": (B,), "index": (B,)}."""
        raise TypeError(f"{type(self).__name__} must define __getitems__(indices).")


def crop_places(top: Tensor, left: Tensor, mirrored: Tensor, *, size: int, padded: int) -> Tensor:
    """Where the pixels of square crops lie in square pictures, by number: (N, size²) for N crops.

    `top`, `left`: of each crop, (N,). `mirrored`: whether it is, (N,). `size`, `padded`: sides of crop and picture.
    """
    window = torch.arange(size)
    down = top[:, None] + window
    across = left[:, None] + torch.where(mirrored[:, None], window.flip(0), window)
    return (down[:, :, None] * padded + across[:, None, :]).flatten(1)


def crop(pictures: Tensor, places: Tensor) -> Tensor:
    """Crops (B, C, size, size) of pictures (B, C, H, W), by their [`crop_places`] (B, size²)."""
    pixels = pictures.flatten(2).gather(2, places[:, None].expand(-1, pictures.shape[1], -1))
    return pixels.unflatten(2, 2 * [math.isqrt(places.shape[1])])


def channel_statistics(mean: Sequence[float], std: Sequence[float]) -> tuple[Tensor, Tensor]:
    """`mean` and `std` of the RGB channels as float32 (1, 3, 1, 1); ValueError if they cannot be that."""
    if len(mean) != 3 or len(std) != 3 or min(std) <= 0:
        raise ValueError(f"`mean` and `std` must hold 3 numbers (std positive), got {list(mean)} and {list(std)}.")
    centre, scale = (torch.tensor(values, dtype=torch.float32).view(1, 3, 1, 1) for values in (mean, std))
    return centre, scale
