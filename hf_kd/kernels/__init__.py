"""The matching losses with cross-entropy in one piece: value, statistics and gradient from one look at the logits."""

from .autograd import matching_objective
from .choice import KERNELS, choose_kernel
from .compiled import CompiledKernel
from .eager import eager_kernel
from .interface import Kernel, LogitBatch, Totals, Weights


__all__ = [
    "KERNELS",
    "CompiledKernel",
    "Kernel",
    "LogitBatch",
    "Totals",
    "Weights",
    "choose_kernel",
    "eager_kernel",
    "matching_objective",
]
