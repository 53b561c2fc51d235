"""Reading pickles of plain data without running anything that is in them.

A pickle is a program: whoever wrote it chooses which functions of this process are called. Files that are pickles for
historical reasons, such as CIFAR's, need a handful of numpy's. Here each of those is replaced by a function of this
module that understands integers alone, and any other name ends the reading.
"""

from __future__ import annotations

import io
import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from ..text import one_line


class _Dtype:
    """What a pickle says of a numpy dtype: its kind and size first, the byte order in a second step."""

    def __init__(self, code: Any, *_: Any) -> None:
        self.code, self.order = _text(code), "|"

    def __setstate__(self, state: Any) -> None:
        self.order = _text(state[1])

    def numpy(self) -> np.dtype:
        # Integers alone: of objects numpy would make pointers.
        if not re.fullmatch("[biu][1248]", self.code) or self.order not in ("|", "<", ">", "="):
            raise pickle.UnpicklingError(f"it holds an array of type {self.order}{self.code}, not of integers")
        return np.dtype(self.order + self.code)


class _Array:
    """An array that is made empty first and given its content in a second step."""

    array: np.ndarray | None = None

    def __setstate__(self, state: Any) -> None:
        _, shape, dtype, columns_first, content = state
        self.array = _shaped(content, dtype, shape, "F" if columns_first else "C")


def _shaped(content: Any, dtype: _Dtype, shape: Any, order: Any) -> np.ndarray:
    # Python 2's strings arrive as text.
    content = content.encode("latin1") if isinstance(content, str) else content
    return np.frombuffer(content, dtype.numpy()).reshape(shape, order=order)


def _empty(*_: Any) -> _Array:
    return _Array()


def _from_buffer(content: Any, dtype: _Dtype, shape: Any, order: Any = "C") -> _Array:
    array = _Array()
    array.array = _shaped(content, dtype, shape, order)
    return array


def _scalar(dtype: _Dtype, content: Any) -> int:
    return int(_shaped(content, dtype, (), "C"))


def _encode(text: str, encoding: str = "latin1") -> bytes:
    if encoding != "latin1":
        raise pickle.UnpicklingError(f"it encodes text as {encoding}")
    return text.encode("latin1")


def _never(*_: Any) -> None:
    raise pickle.UnpicklingError("it makes an array in a way that numpy's pickles do not")


_STAND_INS: dict[str, Callable[..., Any]] = {
    "numpy.ndarray": _never,  # which kind of array to make: said to `_reconstruct`, never called
    "numpy.dtype": _Dtype,
    "numpy.core.multiarray._reconstruct": _empty,
    "numpy.core.multiarray.scalar": _scalar,
    "numpy.core.numeric._frombuffer": _from_buffer,  # protocol 5
    "_codecs.encode": _encode,  # how Python 3 writes bytes in protocol 2
}


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        wanted = f"{module}.{name}"
        # numpy 2 has renamed a package.
        stand_in = _STAND_INS.get(wanted.replace("numpy._core.", "numpy.core.", 1))
        if stand_in is None:
            raise pickle.UnpicklingError(f"it asks for {wanted}, which data has no use for")
        # A new function each time: a pickle may set attributes of what it is given.
        return lambda *arguments: stand_in(*arguments)


def read_plain_pickle(path: Path) -> dict[str, Any]:
    """The dict in a pickle file of any protocol and Python version: of texts, bytes, numbers, lists, integer arrays.

    Keys are given as texts, and so are Python 2's strings (as Latin-1). Nothing that the file names is imported or
    called. Tuples become lists.

    Raises OSError where the file cannot be opened, and ValueError where it is damaged, no pickle, needs anything but
    plain data or holds something else than a dict.
    """
    content = path.read_bytes()
    try:
        value = _Unpickler(io.BytesIO(content), encoding="latin1").load()
        if not isinstance(value, dict):
            raise pickle.UnpicklingError(f"it holds a {type(value).__name__} where a dict belongs")
        return {_text(key): _plain(entry) for key, entry in value.items()}
    except Exception as error:  # a damaged pickle raises nearly anything
        raise ValueError(
            f"Cannot read {path}: {one_line(error)}. It must be a whole pickle of plain data (a dict of lists, texts "
            "and integer arrays); nothing in it was run. Get the file again from where you trust it."
        ) from error


def _plain(entry: Any) -> Any:
    if isinstance(entry, (list, tuple)):
        return [_plain(each) for each in entry]
    if isinstance(entry, _Array) and entry.array is not None:
        return entry.array
    if entry is None or isinstance(entry, (str, bytes, int, float)):
        return entry
    raise pickle.UnpicklingError(f"it holds a {type(entry).__name__}, which is no plain data")


def _text(value: Any) -> str:
    return value.decode("latin1") if isinstance(value, bytes) else str(value)
