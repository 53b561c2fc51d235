"""What the registries of losses have in common: finding a name, and building a class from a configuration's values."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar


T = TypeVar("T")


def check_name(option: str, name: str, names: Iterable[str]) -> str:
    """The name itself, or ValueError with the nearest of ``names`` if it is none of them; ``option`` is its use."""
    names = list(names)
    if name not in names:
        near = difflib.get_close_matches(str(name).lower(), names, n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"Unknown `{option}` {name!r}; it must be one of {', '.join(names)}.{hint}")
    return name


def parameters_of(cls: type) -> dict[str, inspect.Parameter]:
    """The arguments that a class can be given by name."""
    return {
        key: parameter
        for key, parameter in inspect.signature(cls).parameters.items()
        if parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)
    }


def construct(cls: type[T], label: str, option: str, arguments: Mapping[str, Any]) -> T:
    """``cls(**arguments)``.

    Args:
        label: what the class is called in messages, such as ``"loss 'kd'"``.
        option: where the arguments were given.

    Raises:
        ValueError: for an argument that the class does not take, or lacks.
    """
    parameters = parameters_of(cls)
    unknown = sorted(set(arguments) - set(parameters))
    if unknown:
        raise ValueError(
            f"The {label} takes {', '.join(parameters) or 'no arguments'}, not {', '.join(unknown)}: "
            f"correct `{option}`."
        )
    missing = [
        key for key, parameter in parameters.items() if parameter.default is parameter.empty and key not in arguments
    ]
    if missing:
        raise ValueError(f"The {label} needs a value for {', '.join(missing)}, and none was given.")
    return cls(**arguments)
