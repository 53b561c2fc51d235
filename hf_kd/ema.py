"""An exponential moving average of the student's weights, timm's: it is what is evaluated, saved and published."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import save_file
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from transformers import TrainerCallback

from .files import atomic_write
from .networks import misfits, uncompiled, unwrap


RAW_WEIGHTS = "raw_weights.safetensors"
"""The weights that training goes on with, in a checkpoint whose student (model.safetensors) is their average."""

_UPDATES = "updates"


class WeightAverage(TrainerCallback):
    """Averages a student's weights over the steps of a training (timm's ``ModelEmaV3``).

    After the first step the average is the weights, and after each later one
    ``average + (1 - decay) · (weights - average)``. Buffers are treated as timm treats them: those of floating point,
    such as BatchNorm's statistics, are averaged too, and the others (its counters) copied. A step that changed nothing
    does not count. It lives from a training's beginning to its end, with which the student takes it over.

    Args:
        decay: in (0, 1); DeiT's code has 0.99996.
        warmup: timm's: in step n + 1 the decay is at most ``1 - (1 + n)^(-2/3)``, so that a short run forgets its
            beginning as well.
        step_was_taken: whether the optimiser's last step changed the weights.
    """

    def __init__(self, decay: float, *, warmup: bool, step_was_taken: Callable[[], bool]) -> None:
        self.decay = decay
        self.warmup = warmup
        self.updates = 0
        """How many steps the average has seen."""
        self._step_was_taken = step_was_taken
        self._checkpoint: Path | None = None
        self._ema: ModelEmaV3 | None = None

    # ---- Over a training -------------------------------------------------------------------------------------------

    def go_on_from(self, checkpoint: str | Path | None) -> None:
        """Say which checkpoint the training that begins goes on from, if any.

        Raises:
            ValueError: if it holds no average.
        """
        self._checkpoint = None if checkpoint is None else Path(checkpoint)
        if self._checkpoint is not None and not (self._checkpoint / RAW_WEIGHTS).is_file():
            raise ValueError(
                f"The checkpoint {checkpoint} has no {RAW_WEIGHTS}, so that its student is no average which could be "
                "gone on with: resume without `ema_decay`, or from a checkpoint that was written with it (and without "
                "save_only_model)."
            )

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        low = sorted({str(value.dtype).removeprefix("torch.") for value in _tensors(model).values()
                      if value.is_floating_point() and value.element_size() < 4})  # fmt: skip
        if low:
            raise ValueError(
                f"`ema_decay` does not go with weights in {' and '.join(low)}, which are too coarse for the small "
                "steps of an average: keep the student in fp32, and train in half precision by bf16=True or fp16=True."
            )
        # From a checkpoint the trainer has loaded the student, which is the average.
        self._ema = ModelEmaV3(_as_module(model), decay=self.decay, use_warmup=self.warmup)
        self.updates = 0
        if self._checkpoint is not None:
            self.updates = load_raw_weights(model, self._checkpoint)

    def on_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if self._ema is not None and self._step_was_taken():
            self.updates += 1
            self._ema.update(_as_module(model), step=self.updates)

    def end(self, model: nn.Module) -> None:
        """Have the student take the average over, for good."""
        for weights, average in self._pairs(model):
            weights.copy_(average)
        self._ema = None

    # ---- In a student's place --------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def applied(self, model: nn.Module) -> Iterator[None]:
        """Have the student hold the average while the body runs, if a training is under way."""
        pairs = self._pairs(model)
        kept = [weights.clone() for weights, _ in pairs]
        try:
            for weights, average in pairs:
                weights.copy_(average)
            yield
        finally:
            for (weights, _), raw in zip(pairs, kept, strict=True):
                weights.copy_(raw)

    def _pairs(self, model: nn.Module) -> list[tuple[Tensor, Tensor]]:
        if self._ema is None:
            return []
        averages = self._ema.module.state_dict().values()
        return list(zip(_tensors(model).values(), averages, strict=True))

    # ---- Checkpoints -----------------------------------------------------------------------------------------------

    def save_raw_weights(self, model: nn.Module, folder: str | Path) -> None:
        """Write the weights that training goes on with beside the average, which is saved as the student."""
        tensors = {key: value.contiguous().cpu() for key, value in _tensors(model).items()}
        with atomic_write(Path(folder) / RAW_WEIGHTS) as draft:
            save_file(tensors, draft, metadata={"format": "pt", _UPDATES: str(self.updates)})


def load_raw_weights(model: nn.Module, folder: str | Path) -> int:
    """Load what :meth:`WeightAverage.save_raw_weights` wrote; how many steps the average beside it has seen.

    Raises:
        ValueError: if it is of another network.
    """
    own, path = _tensors(model), Path(folder) / RAW_WEIGHTS
    with safe_open(path, framework="pt") as file:
        saved = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - it is no mapping
        updates = int(file.metadata()[_UPDATES])
    wrong = [key for keys in misfits(own, saved) for key in keys]
    if wrong:
        raise ValueError(
            f"{path} holds the weights of another network than this student ({type(unwrap(model)).__name__}): "
            f"{len(wrong)} tensors differ in name or shape (such as {wrong[0]})."
        )
    for key, value in own.items():
        value.copy_(saved[key])
    return updates


# ---- Helpers -------------------------------------------------------------------------------------------------------


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    """The tensors of a student's state dict by their names without wrappers; one that has several names, once."""
    tensors: dict[int, tuple[str, Tensor]] = {}
    for key, value in unwrap(model).state_dict(keep_vars=True).items():
        if isinstance(value, Tensor):
            tensors.setdefault(id(value), (uncompiled(key), value.detach()))
    return dict(tensors.values())


def _as_module(model: nn.Module) -> nn.Module:
    """A student's tensors alone as the module that timm copies and averages.

    A copy of the whole student would have its hooks and compiled code too, and tied weights would be averaged once for
    each of their names.
    """
    module = nn.Module()
    for number, value in enumerate(_tensors(model).values()):
        # It shares the student's memory.
        module.register_parameter(str(number), nn.Parameter(value, requires_grad=False))
    return module
