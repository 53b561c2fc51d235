"""How a row of teacher logits is stored: logits to bytes and back.

Softmax, the power transform and every loss here depend on how far each logit lies below the largest one, so that is
what is kept: the largest logit in fp32, and the others as distances below it. The far tail matters (at a small gamma
the power transform lives in it), so no class is left out, and the precision is relative, as it is for

* ``"fp16"``: distances in half precision, 2K + 8 bytes a row with its checksum;
* ``"int8"``: 255 even steps of the *root* of the distance, whose size is kept for each row, K + 12 bytes;
* ``"fp32"``: the logits as they are, 4K + 4 bytes.

Nothing but the logits is needed: log U_gamma follows from them at any gamma. The largest errors that
``tests/teacher_cache/test_codec.py`` allows, for rows of 10 to 1000 classes and gamma from 0.1 to 1: of log U of a
sample 5e-4 (fp16) and 1e-2 (int8), and of the mean WTTM loss of a batch, relative to it, 2e-4 and 3e-3.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


DTYPES = ("fp16", "int8", "fp32")

_LARGEST_FP16 = 65504.0
_STEPS = 254
_IMPOSSIBLE = 255
_FP32 = np.dtype("<f4")


class RowCodec:
    """Rows of logits of ``num_classes`` as records of :attr:`record`, a numpy dtype, whose last field is ``crc``.

    Args:
        dtype: "fp16", "int8" or "fp32".
        num_classes: K.

    Raises:
        ValueError: for another dtype or a class count below 1.
    """

    def __init__(self, dtype: str, num_classes: int) -> None:
        if dtype not in DTYPES:
            raise ValueError(f"`dtype` of a teacher cache must be one of {', '.join(DTYPES)}, got {dtype!r}.")
        if num_classes < 1:
            raise ValueError(f"`num_classes` of a teacher cache must be at least 1, got {num_classes}.")
        self.dtype, self.num_classes = dtype, num_classes
        fields: list[tuple[str, str, int]] = {
            "fp16": [("top", "<f4", 1), ("distance", "<f2", num_classes)],
            "int8": [("top", "<f4", 1), ("step", "<f4", 1), ("distance", "u1", num_classes)],
            "fp32": [("logits", "<f4", num_classes)],
        }[dtype]
        size = sum(np.dtype(kind).itemsize * count for _, kind, count in fields)
        if size % 4:
            # torch wants rows aligned; and numpy would not copy bytes that belong to no field.
            fields.append(("unused", "u1", 4 - size % 4))
        # The checksum comes last, so that it is written after what it is of.
        formats = [(name, kind, (count,)) if count > 1 else (name, kind) for name, kind, count in fields]
        self.record = np.dtype([*formats, ("crc", "<u4")])

    def encode(self, logits: Tensor) -> tuple[np.ndarray, np.ndarray]:
        """Records (B,) of logits (B, K), without their checksums, and which of them can be stored, (B,) bool.

        -inf (a class that cannot be) is kept. A row with NaN or +inf, or of -inf alone, cannot be.
        """
        values = logits.detach().to("cpu", torch.float32).numpy()
        records = np.zeros(len(values), self.record)
        top = values.max(axis=1)
        # The largest is NaN where there is one.
        storable = np.isfinite(top)
        if self.dtype == "fp32":
            records["logits"] = values.reshape(records["logits"].shape)
            return records, storable
        top = np.where(storable, top, np.float32(0))
        with np.errstate(over="ignore", invalid="ignore"):
            distance = np.maximum(top[:, None] - values, 0)
        # Finite ones stay finite: only -inf is impossible.
        impossible = np.isneginf(values)
        largest = _LARGEST_FP16 if self.dtype == "fp16" else np.finfo(np.float32).max
        distance = np.where(np.isnan(distance), np.float32(0), np.minimum(distance, largest, dtype=np.float32))
        records["top"] = top
        if self.dtype == "fp16":
            stored: np.ndarray = np.where(impossible, np.inf, distance).astype(np.float16)
        else:
            root = np.sqrt(np.where(impossible, np.float32(0), distance))
            step = root.max(axis=1) / np.float32(_STEPS)
            records["step"] = step
            steps = np.rint(root / np.where(step > 0, step, np.float32(1))[:, None])
            stored = np.where(impossible, _IMPOSSIBLE, np.minimum(steps, _STEPS)).astype(np.uint8)
        records["distance"] = stored.reshape(records["distance"].shape)
        return records, storable

    def decode(self, records: np.ndarray) -> Tensor:
        """The logits (B, K) of records (B,), in fp32."""
        shape = (len(records), self.num_classes)
        if self.dtype == "fp32":
            return torch.from_numpy(records["logits"].reshape(shape).astype(_FP32))
        top = torch.from_numpy(records["top"].astype(_FP32))[:, None]
        stored = torch.from_numpy(records["distance"].reshape(shape))
        if self.dtype == "fp16":
            return top - stored.float()
        distance = (stored.float() * torch.from_numpy(records["step"].astype(_FP32))[:, None]).square_()
        return (top - distance).masked_fill_(stored == _IMPOSSIBLE, -torch.inf)
