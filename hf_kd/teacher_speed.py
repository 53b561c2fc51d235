"""How a teacher's network is run: BatchNorm folded, channels last, in another type, compiled; and what is fastest."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers.utils import logging

from .folding import fold_batchnorm, has_batchnorm
from .memory_format import has_convolutions, in_channels_last, weights_in_channels_last
from .networks import logits_of
from .text import first_line
from .timing import WORTH_IT, ratios


logger = logging.get_logger(__name__)

MAX_ERROR = 0.05
"""How far a faster way may move a logit, relative to the largest, to be chosen."""

_FOLDING_SAMPLES = 8


@dataclass(frozen=True)
class Speed:
    """How a network is run.

    Attributes:
        fold_batchnorm: with BatchNorm folded (:func:`hf_kd.folding.fold_batchnorm`), in a copy.
        channels_last: with images and convolutions' weights as channels last.
        dtype: with its weights in this type; None leaves them as they are.
        compile: through torch.compile, with the default backend.
    """

    fold_batchnorm: bool = False
    channels_last: bool = False
    dtype: torch.dtype | None = None
    compile: bool = False

    def __str__(self) -> str:
        parts = (
            "BatchNorm folded" if self.fold_batchnorm else "",
            "channels last" if self.channels_last else "",
            str(self.dtype or "").removeprefix("torch."),
            "compiled" if self.compile else "",
        )
        return ", ".join(filter(None, parts)) or "as it is"

    def to_json(self) -> dict[str, Any]:
        """As JSON values."""
        return {**vars(self), "dtype": str(self.dtype).removeprefix("torch.") if self.dtype else None}

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Speed:
        """From what :meth:`to_json` gave."""
        return cls(**{**values, "dtype": getattr(torch, values["dtype"]) if values["dtype"] else None})


@dataclass(frozen=True)
class SpeedOptions:
    """What may be chosen for each field of a :class:`Speed`; the first of each is what is taken without measuring."""

    fold_batchnorm: tuple[bool, ...] = (False,)
    channels_last: tuple[bool, ...] = (False,)
    dtype: tuple[torch.dtype | None, ...] = (None,)
    compile: tuple[bool, ...] = (False,)

    @property
    def are_open(self) -> bool:
        """Whether there is something to choose."""
        return any(len(options) > 1 for options in vars(self).values())

    @property
    def first(self) -> Speed:
        """What is run as long as nothing was measured."""
        return Speed(*(options[0] for options in vars(self).values()))

    def candidates(self, network: nn.Module) -> list[Speed]:
        """What is measured at first, :attr:`first` before all; folding costs no accuracy and is in all others."""
        folds = self.fold_batchnorm[-1] and (len(self.fold_batchnorm) == 1 or has_batchnorm(network))
        layouts = self.channels_last if has_convolutions(network) else self.channels_last[:1]
        rest = itertools.product((folds,), layouts, self.dtype, self.compile[:1])
        return list(dict.fromkeys([self.first, *(Speed(*values) for values in rest)]))


@dataclass(frozen=True)
class Batch:
    """A batch as a network takes it, positional and named inputs, images already as it wants them."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def map(self, function: Callable[[Any], Any]) -> Batch:
        """Another one, of each input's value."""
        return Batch(tuple(map(function, self.args)), {key: function(value) for key, value in self.kwargs.items()})

    def logits(self, network: nn.Module, *, channels_last: bool = False) -> Tensor:
        """Of a network, whose type the floating inputs are given in."""
        dtype = next((p.dtype for p in network.parameters() if p.is_floating_point()), None)

        def fitted(value: Any) -> Any:
            if isinstance(value, Tensor) and value.is_floating_point():
                value = value.to(dtype or value.dtype)
                return in_channels_last(value) if channels_last else value
            return value

        batch = self.map(fitted)
        return logits_of(network(*batch.args, **batch.kwargs))

    def few(self) -> Batch:
        """Some of its samples, on the CPU."""

        def taken(value: Any) -> Any:
            if isinstance(value, Tensor):
                return (value[:_FOLDING_SAMPLES] if value.dim() else value).cpu()
            return value

        return self.map(taken)


def speed_up(network: nn.Module, speed: Speed, batch: Batch | None = None) -> nn.Module:
    """Make a network run so: folded in fp32, then its type, then its layout, then compiled.

    Args:
        network: in eval mode. It is changed in place, but for folding, which is done in a copy.
        batch: what folding watches the network run on.

    Returns:
        The network to run: the folded copy if there is one.
    """
    if speed.fold_batchnorm:
        if batch is None:
            raise ValueError("Folding watches a network run: give it a batch.")
        network = fold_batchnorm(network, batch.few().logits)
    if speed.dtype is not None:
        network.to(speed.dtype)
    if speed.channels_last:
        weights_in_channels_last(network)
    if speed.compile:
        network.compile()
    return network


# ---- Choosing ------------------------------------------------------------------------------------------------------


def fastest(network: nn.Module, options: SpeedOptions, batch: Batch, device: torch.device, name: str) -> Speed:
    """What runs a network fastest on a batch, measured on copies of it, and logged.

    Something else than :attr:`SpeedOptions.first` is chosen if it takes at least 3 % less time and moves no logit by
    more than :data:`MAX_ERROR` of the largest. Torch.compile is tried last, on what is fastest without it.

    Args:
        network: in eval mode; it is left as it is.
        name: of the network, for the log.
    """
    try:
        contest = _Contest(network, options.first, batch)
    except Exception as error:  # a user's network that cannot be copied, or whatever its copy raises
        reason = f"{type(error).__name__}: {first_line(error)}"
        logger.warning("The teacher %s runs %s: a copy to measure cannot be run (%s).", name, options.first, reason)
        return options.first
    for speed in options.candidates(network):
        contest.enter(speed)
    found = ratios(contest.ways, device)
    best = _best(found, options.first)
    compiled = replace(best, compile=options.compile[-1])
    if contest.enter(compiled):
        pair = {speed: contest.ways[speed] for speed in (best, compiled)}
        found[compiled] = found[best] * ratios(pair, device)[compiled]
        best = _best(found, best)
    measured = "; ".join(f"{speed}: {ratio:.2f}" for speed, ratio in found.items())
    logger.warning(
        "The teacher %s runs %s, measured in %.2f of the time (%s); its logits move by at most %.1e of the largest.",
        name,
        best,
        found[best],
        measured,
        contest.errors[best],
    )
    return best


def _best(found: dict[Speed, float], known: Speed) -> Speed:
    least = min(found, key=lambda speed: found[speed])
    return least if found[least] < WORTH_IT * found[known] else known


class _Contest:
    """Copies of a network that run a batch in several ways, and how much their logits differ from the first one's."""

    def __init__(self, network: nn.Module, first: Speed, batch: Batch) -> None:
        self.ways: dict[Speed, Callable[[], Tensor]] = {}
        self.errors: dict[Speed, float] = {first: 0.0}
        self._network, self._batch = network, batch
        self._folded: nn.Module | None = None
        self.ways[first] = self._way(first)
        self._expected = self.ways[first]()

    def enter(self, speed: Speed) -> bool:
        """Add a way, unless it is there or does not work; whether it is a new one."""
        if speed in self.ways:
            return False
        try:
            way = self._way(speed)
            if speed.fold_batchnorm and self._folded is self._network:
                return False
            logits = way()
        except Exception as error:  # no compiler, an operation that a type does not have on this device
            reason = f"{type(error).__name__}: {first_line(error)}"
            logger.warning("Running the teacher %s is not measured, since it cannot be done here (%s).", speed, reason)
            return False
        moved = float((logits - self._expected).abs().max() / self._expected.abs().max().clamp_min(1e-30))
        # Not the other way round: an error that is not a number is none that is small.
        if not moved <= MAX_ERROR:
            logger.warning("Running the teacher %s is passed over: its logits move by %.1e.", speed, moved)
            return False
        self.ways[speed], self.errors[speed] = way, moved
        return True

    def _way(self, speed: Speed) -> Callable[[], Tensor]:
        source = self._network
        if speed.fold_batchnorm:
            if self._folded is None:
                self._folded = fold_batchnorm(self._network, self._batch.few().logits)
            source = self._folded
        runner = speed_up(copy.deepcopy(source), replace(speed, fold_batchnorm=False))

        @torch.inference_mode()
        def way() -> Tensor:
            return self._batch.logits(runner, channels_last=speed.channels_last).float()

        return way
