"""Which of several ways to do a thing is fastest here and now."""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable, Mapping
from typing import Any, TypeVar

import torch


WORTH_IT = 0.97
"""What takes at most this share of the time is faster; closer than this is noise."""

Name = TypeVar("Name", bound=Hashable)

_ROUNDS = 7
# Two rounds are made in any case; after that none begins when so many seconds are gone.
_BUDGET = 10.0
# After a round: what took this many times as long as the first way will not turn out to be the fastest.
_HOPELESS = 1.5


def ratios(ways: Mapping[Name, Callable[[], Any]], device: torch.device) -> dict[Name, float]:
    """How long each way takes, relative to the first, by the clock and with the device waited for.

    They take turns, so that what else the machine does hits all of them, and the least time of each counts, which is
    the one that was disturbed least. Each should have run before, since a first run prepares much. It takes about ten
    seconds at most, unless a single round takes longer.
    """
    least: dict[Name, float] = {}
    first = next(iter(ways))
    begin = _now(device)
    for number in range(_ROUNDS):
        if number >= 2 and _now(device) - begin > _BUDGET:
            break
        for name, way in ways.items():
            if name in least and least[name] > _HOPELESS * least[first]:
                continue
            start = _now(device)
            way()
            least[name] = min(_now(device) - start, least.get(name, float("inf")))
    return {name: value / least[first] for name, value in least.items()}


def _now(device: torch.device) -> float:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
    return time.perf_counter()
