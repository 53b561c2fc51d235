"""What Trainer and Accelerate do in every step although nobody asked for it, done once or not at all.

A small student's step takes some milliseconds, and each of these took some tenths of one.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from types import MethodType
from typing import Any

import torch
from accelerate.optimizer import AcceleratedOptimizer
from torch import Tensor, nn
from torch.nn.utils import clip_grads_with_norm_, get_total_norm
from torch.optim import Optimizer


# Numbers that are put together in less time than their tensors are gone through one by one.
_SMALL = 2**18


@contextlib.contextmanager
def staying_in_train_mode(model: nn.Module, network: nn.Module) -> Iterator[None]:
    """While the body runs, ``model.train()`` does not walk over the modules of a model that is in train mode already.

    A part that was put into eval mode since (to freeze its BatchNorm, say) stays in it.

    Args:
        model: the network in its wrappers.
        network: without them: evaluation puts it into eval mode and not the wrappers.
    """
    if not (model.training and network.training) or "train" in vars(model):
        yield
        return

    def train(mode: bool = True) -> nn.Module:
        return model if mode else type(model).train(model, mode)

    vars(model)["train"] = train
    try:
        yield
    finally:
        del vars(model)["train"]


def clip_gradients(parameters: Sequence[nn.Parameter], max_norm: float | None) -> Tensor:
    """Scale gradients down to a norm of ``max_norm`` if theirs, over all of them, is above it.

    Args:
        parameters: those without a gradient do not count.
        max_norm: None leaves the gradients as they are.

    Returns:
        The norm before, a scalar.
    """
    gradients = [p.grad for p in parameters if p.grad is not None]
    if sum(gradient.numel() for gradient in gradients) <= _SMALL and gradients:
        norm = torch.linalg.vector_norm(torch.cat([gradient.reshape(-1) for gradient in gradients]))
    else:
        norm = get_total_norm(gradients, foreach=True)
    # Looking costs nothing on the CPU and would stall every step elsewhere.
    if max_norm is not None and not (norm.device.type == "cpu" and norm <= max_norm):
        clip_grads_with_norm_(parameters, max_norm, norm)
    return norm


def step_directly(optimizer: Optimizer) -> None:
    """Have Accelerate's optimiser take its steps without looking each time which packages are installed.

    One with a gradient scaler, or of an engine, is left as it is.
    """
    if type(optimizer) is AcceleratedOptimizer and getattr(optimizer, "scaler", None) is None:
        # A scheduler takes a method, which it wraps.
        vars(optimizer)["step"] = MethodType(_step, optimizer)


def _step(optimizer: AcceleratedOptimizer, closure: Any = None) -> None:
    if optimizer.gradient_state.sync_gradients:
        optimizer.optimizer.step(closure)
