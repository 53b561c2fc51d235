"""Pictures that were decoded once and are kept as pixels."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import accumulate

import numpy as np
import torch
from PIL import Image
from torch import Tensor


class DecodedPictures:
    """Pixels of RGB pictures of any sizes, one after the other in memory: 3 bytes a pixel.

    A loader's workers share them; several training processes have theirs each. A picture that could not be read is
    remembered with its error, which is raised whenever it is asked for.

    Args:
        pictures: PIL images, uint8 tensors (3, H, W), or errors in place of pictures.
    """

    def __init__(self, pictures: Iterable[Image.Image | Tensor | ValueError]) -> None:
        self._errors: dict[int, str] = {}
        self._sizes: list[tuple[int, int]] = []
        pixels = bytearray()
        for number, picture in enumerate(pictures):
            if isinstance(picture, ValueError):
                self._errors[number] = str(picture)
                self._sizes.append((0, 0))
                continue
            array = np.asarray(picture if isinstance(picture, Image.Image) else picture.permute(1, 2, 0))
            self._sizes.append(array.shape[:2])
            pixels += array.tobytes()
        self._starts = [0, *accumulate(3 * height * width for height, width in self._sizes)]
        self._pixels = torch.frombuffer(pixels, dtype=torch.uint8) if pixels else torch.empty(0, dtype=torch.uint8)

    @property
    def nbytes(self) -> int:
        """How much memory they take."""
        return self._pixels.numel()

    def image(self, number: int) -> Image.Image:
        """As a PIL image."""
        return Image.fromarray(self._array(number).numpy())

    def tensor(self, number: int) -> Tensor:
        """As uint8 (3, H, W), a copy."""
        return self._array(number).permute(2, 0, 1).clone()

    def _array(self, number: int) -> Tensor:
        if number in self._errors:
            raise ValueError(self._errors[number])
        return self._pixels[self._starts[number] : self._starts[number + 1]].view(*self._sizes[number], 3)
