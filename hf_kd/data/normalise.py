"""Normalising images where they are used: a loader then hands on bytes, a quarter of what floats take."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


PIXEL_VALUES = "pixel_values"


class PixelNormaliser:
    """Turns images of bytes, uint8 (B, C, H, W), into (pixels / 255 - mean) / std, on the device where they are.

    The operations are those of torchvision's ToDtype and Normalize, in their order: on the CPU the same floats.

    Args:
        mean, std: of pixel values in [0, 1], one per channel.
        dtype: of the result.
    """

    def __init__(self, mean: Sequence[float], std: Sequence[float], dtype: torch.dtype = torch.float32) -> None:
        self._mean, self._std = (torch.tensor(values, dtype=dtype).view(-1, 1, 1) for values in (mean, std))

    def __call__(self, images: Tensor) -> Tensor:
        """Raises ValueError for images with another number of channels than the statistics have."""
        channels = len(self._mean)
        if images.dim() != 4 or images.shape[1] != channels:
            raise ValueError(
                f"`{PIXEL_VALUES}` of bytes must have the shape (batch, {channels}, height, width) of what the "
                f"student's mean and std are for, got {tuple(images.shape)}: have the transform give such images, or "
                "normalised floats."
            )
        if self._mean.device != images.device:
            self._mean, self._std = self._mean.to(images.device), self._std.to(images.device)
        return images.to(self._mean.dtype).div_(255).sub_(self._mean).div_(self._std)
