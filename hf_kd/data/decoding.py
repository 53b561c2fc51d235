"""From a file, its bytes or a PIL image to a picture: by PIL, or JPEGs by torchvision in less time."""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torchvision import io as torchvision_io
from torchvision.transforms import v2
from torchvision.transforms.v2.functional import pil_to_tensor


Source: TypeAlias = "str | os.PathLike | bytes | Image.Image"
Loader = Callable[..., "Image.Image | Tensor"]
"""Of a source and what errors call it."""

# Torchvision means to give its decoders up (to torchcodec): where they are gone, PIL decodes.
_decode_jpeg = getattr(torchvision_io, "decode_jpeg", None)

DECODERS = ("pil", "torchvision", "auto")


def loader(decoder: str, transform: Callable[..., Any]) -> Loader:
    """How a data set is to decode its pictures for its transform.

    `decoder`: "pil", with a PIL image for the transform; "torchvision", with a uint8 tensor (3, H, W); "auto",
    torchvision's for a transform that takes tensors as well (a `Compose` of torchvision's v2), and PIL's for others.

    Raises ValueError for another decoder.
    """
    if decoder not in DECODERS:
        raise ValueError(f"`decoder` must be one of {', '.join(map(repr, DECODERS))}, got {decoder!r}.")
    if decoder == "auto":
        steps = transform.transforms if isinstance(transform, v2.Compose) else [None]
        decoder = "torchvision" if all(isinstance(step, v2.Transform) for step in steps) else "pil"
    return load_image_tensor if decoder == "torchvision" else load_image


def to_rgb(image: Image.Image) -> Image.Image:
    """An 8-bit RGB picture of the same size, from a PIL image of any mode.

    16-bit grey is scaled (65535 becomes 255; PIL's own `convert` clips at 255). Transparency is dropped and the
    colours beneath it are kept, as `convert("RGB")` in timm's and transformers' pipelines does, so that training and
    inference see the same pixels. CMYK, palettes, grey and bilevel pictures go through PIL.

    Raises ValueError for 32-bit and float pixels, which have no agreed range.
    """
    mode = image.mode
    if mode == "RGB":
        return image
    if mode.startswith("I") or mode == "F":
        values = np.asarray(image)
        # Some readers hand 16-bit grey out as 32-bit integers.
        if mode == "F" or values.min() < 0 or values.max() > 65535:
            raise ValueError(f"its pixels (PIL mode {mode}) have no agreed range; convert it to 8 or 16 bits")
        # 65535 = 255 * 257; the 128 rounds to the nearest.
        image = Image.fromarray(((values.astype(np.uint32) + 128) // 257).astype(np.uint8))
    elif mode in ("La", "RGBa"):
        image = image.convert({"La": "LA", "RGBa": "RGBA"}[mode])
    elif mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")  # straight to RGB gives the same colours and a warning
    return image.convert("RGB")


def _is_rotated(image: Image.Image) -> bool:
    try:
        return image.getexif().get(0x0112, 1) != 1
    except Exception:  # broken metadata raises nearly anything, and the pixels may be good
        return False


def load_image(source: Source, name: str | None = None) -> Image.Image:
    """Decode a file, its bytes or an opened PIL image to an upright RGB picture.

    `name` is what error messages call the picture; a path by default. The EXIF orientation is applied, as `datasets`
    and the transformers pipelines do. See [`to_rgb`] for the modes.

    Raises ValueError with the name and the reason where the picture cannot be read.
    """
    with _naming(source, name):
        return _upright(_opened(source)[0])


def load_image_tensor(source: Source, name: str | None = None) -> Tensor:
    """The same picture as uint8 (3, H, W), in any order in memory; plain JPEGs are decoded by torchvision, faster.

    What torchvision does not read as PIL does (other formats, CMYK, a picture that EXIF turns) or refuses (a truncated
    file) goes through PIL, so that pixels and errors are those of [`load_image`]. The decoders of both are libjpeg's.
    """
    with _naming(source, name):
        image, data = _opened(source)
        plain = image.format == "JPEG" and image.mode in ("RGB", "L") and not _is_rotated(image)
        if plain and data is not None and _decode_jpeg is not None:
            try:
                encoded = torch.frombuffer(bytearray(data), dtype=torch.uint8)
                return _decode_jpeg(encoded, mode=torchvision_io.ImageReadMode.RGB)
            except RuntimeError:  # PIL has the better words for it
                pass
        return pil_to_tensor(_upright(image))


def _opened(source: Source) -> tuple[Image.Image, bytes | None]:
    """A picture of which PIL has read no more than the head, and the bytes it is in."""
    if isinstance(source, Image.Image):
        return source, None
    data = source if isinstance(source, bytes) else Path(source).read_bytes()
    if not data:
        raise ValueError("the file is empty")
    return Image.open(io.BytesIO(data)), data


def _upright(image: Image.Image) -> Image.Image:
    image.load()
    return to_rgb(ImageOps.exif_transpose(image) if _is_rotated(image) else image)


@contextmanager
def _naming(source: Source, name: str | None) -> Iterator[None]:
    """Whatever goes wrong in the body is a ValueError that names the picture."""
    try:
        yield
    except MemoryError:
        raise
    except Exception as error:  # PIL's decoders raise OSError, SyntaxError, struct.error and others
        if name is None:
            name = str(source) if isinstance(source, (str, os.PathLike)) else "an image"
        raise unreadable(name, error) from error


def unreadable(name: str, error: Exception | str) -> ValueError:
    """The error for a picture that cannot be read."""
    if isinstance(error, Image.UnidentifiedImageError):
        reason = "it is not an image in a format that PIL knows"
    elif isinstance(error, OSError) and error.strerror:
        reason = error.strerror
    else:
        reason = str(error) or type(error).__name__
    return ValueError(f"Cannot read image {name}: {reason}. Remove it from the data set or replace it.")
