"""Which kernel computes an objective: by a rule, so that a run and its continuation use the same."""

from __future__ import annotations

import torch

from .compiled import CompiledKernel
from .eager import eager_kernel
from .interface import Kernel


KERNELS = ("eager", "compiled", "triton")

# Logits in a batch. Compiling takes some 5 seconds, and from here on saves 10 ms a step (tests/benchmarks/loss.py).
_WORTH_COMPILING = 4_000_000


def choose_kernel(name: str, device: torch.device) -> Kernel:
    """The kernel called ``name``, one of ``KERNELS`` or "auto", for tensors on a device.

    Raises:
        ValueError: if it does not run there.
    """
    if name == "triton":
        if device.type != "cuda":
            raise ValueError(f'`fused_loss`="triton" is for GPUs, and this run is on {device}: take "auto".')
        try:
            from .triton_kernel import triton_kernel
        except ImportError as error:
            raise ValueError(f'`fused_loss`="triton" needs Triton (pip install triton): {error}') from None
        return triton_kernel
    if name == "compiled" and device.type != "cpu":
        raise ValueError(f'`fused_loss`="compiled" is for CPUs, and this run is on {device}: take "auto" or "triton".')
    if name == "eager" or device.type != "cpu":
        return eager_kernel
    return CompiledKernel(smallest=_WORTH_COMPILING if name == "auto" else 0)
