"""BatchNorm folded into the layer before it, for a network that only evaluates: the same logits by fewer passes."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from timm.layers import BatchNormAct2d, Conv2dSame
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd
from torch.nn.utils.fusion import fuse_conv_bn_weights, fuse_linear_bn_weights
from torch.nn.utils.parametrize import is_parametrized
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers.utils import logging

from .networks import unwrap
from .text import first_line


logger = logging.get_logger(__name__)

TOLERANCE = 1e-5
"""How far the logits may move, relative to the largest of them. Rounding moves them by about 1e-6."""

# Layers whose output is linear in their weight as it stands there. Others may change the weight first.
_LINEAR_FORWARDS = {layer.forward for layer in (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear, Conv2dSame)}
_NORM_FORWARDS = {_BatchNorm.forward, nn.SyncBatchNorm.forward, BatchNormAct2d.forward}


def has_batchnorm(network: nn.Module) -> bool:
    """Whether there may be something to fold."""
    return any(_is_norm(module) for module in network.modules())


def fold_batchnorm(network: nn.Module, run: Callable[[nn.Module], Tensor]) -> nn.Module:
    """A copy of a network in which every BatchNorm that can be is folded into the convolution or linear layer before.

    Which layers belong together is seen in one forward pass, not told by names: the layer and the BatchNorm run once,
    the BatchNorm's input is the layer's very output, and nothing else uses that. An activation inside of the
    BatchNorm (timm's ``BatchNormAct2d``) stays. The pass, the folding and its check are made on the CPU, in fp32 or
    better, where no TF32 or autocast rounds.

    Args:
        network: in eval mode; it is left as it is. A torch.compile around it is taken off.
        run: gives a network's logits for a few samples on the CPU, in fp32.

    Returns:
        The copy, in the network's type and on its device; or the network itself, after a warning, if nothing can be
        folded, or if the copy's logits differ by more than :data:`TOLERANCE`.
    """
    if not has_batchnorm(network):
        return _refused(network, "it has none")
    first = next(tensor for tensor in (*network.parameters(), *network.buffers()) if tensor.is_floating_point())
    try:
        folded = copy.deepcopy(unwrap(network)).cpu()
        if first.element_size() < 4:
            folded.float()
        with torch.no_grad(), torch.autocast("cpu", enabled=False), torch.compiler.set_stance("force_eager"):
            with _Watch(folded) as watch:
                before = run(folded)
            pairs = watch.pairs()
            for layer, norm in pairs:
                _fold(layer, norm)
                _replace(folded, norm, _rest(norm))
            after = run(folded)
    except Exception as error:  # whatever a network of the user's raises: it can be run as it is
        reason = f"{type(error).__name__}: {first_line(error)}"
        return _refused(network, f"a copy of it cannot be run on the CPU ({reason})")
    if not pairs:
        return _refused(network, "none follows a convolution or linear layer whose output it alone uses")
    difference = float((after - before).abs().max() / before.abs().max().clamp_min(1e-30))
    # Not the other way round: a difference that is not a number is none that is small.
    if not difference <= TOLERANCE:
        return _refused(network, f"that would change its logits by {difference:.1e} of the largest")
    logger.info(
        "%s: %d of its %d BatchNorm layers are folded; the logits move by %.1e of the largest.",
        type(folded).__name__,
        len(pairs),
        sum(map(_is_norm, network.modules())),
        difference,
    )
    return folded.requires_grad_(False).to(first.device, first.dtype if first.element_size() < 4 else None)


def _refused(network: nn.Module, reason: str) -> nn.Module:
    logger.warning("The BatchNorm of %s is not folded: %s. It runs as it is.", type(unwrap(network)).__name__, reason)
    return network


# ---- Finding -------------------------------------------------------------------------------------------------------


class _Watch(TorchDispatchMode):
    """Sees in a forward pass which BatchNorm gets which layer's output, and whether something else gets it too."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        # A hook on a layer may change what it gives, or take it elsewhere; old-style weight norm is one.
        plain = [m for m in network.modules() if not (m._forward_hooks or m._forward_pre_hooks)]
        self._layers = [m for m in plain if type(m).forward in _LINEAR_FORWARDS and not is_parametrized(m)]
        self._norms = [m for m in plain if _is_norm(m)]
        self._calls: Counter[nn.Module] = Counter()
        # Kept alive, so that an id means one tensor.
        self._outputs: dict[int, tuple[nn.Module, Tensor]] = {}
        self._inputs: dict[nn.Module, int] = {}
        self._uses: Counter[int] = Counter()
        self._in_norm = False

    def __enter__(self) -> _Watch:
        self._handles = [layer.register_forward_hook(self._layer_ran) for layer in self._layers]
        for norm in self._norms:
            self._handles.append(norm.register_forward_pre_hook(self._norm_begins))
            self._handles.append(norm.register_forward_hook(self._norm_ends))
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        for handle in self._handles:
            handle.remove()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not self._in_norm:
            self._uses.update({id(value) for value in tree_leaves((args, kwargs)) if id(value) in self._outputs})
        return function(*args, **(kwargs or {}))

    def _layer_ran(self, layer: nn.Module, args: Any, output: Tensor) -> None:
        self._calls[layer] += 1
        self._outputs[id(output)] = (layer, output)

    def _norm_begins(self, norm: nn.Module, args: Any) -> None:
        self._calls[norm] += 1
        self._in_norm = True
        if args and id(args[0]) in self._outputs:
            self._inputs[norm] = id(args[0])
            self._uses[id(args[0])] += 1

    def _norm_ends(self, norm: nn.Module, args: Any, output: Any) -> None:
        self._in_norm = False

    def pairs(self) -> list[tuple[nn.Module, nn.Module]]:
        """Layers and the BatchNorms that can be folded into them."""
        found = []
        for norm, key in self._inputs.items():
            layer, output = self._outputs[key]
            once = self._uses[key] == self._calls[layer] == self._calls[norm] == 1
            # BatchNorm's channels are the second dimension, a linear layer's features the last.
            if once and (isinstance(layer, _ConvNd) or output.dim() == 2):
                found.append((layer, norm))
        return found


def _is_norm(module: nn.Module) -> bool:
    # One without statistics of its own takes each batch's.
    known = isinstance(module, _BatchNorm) and type(module).forward in _NORM_FORWARDS
    return known and module.running_mean is not None


# ---- Folding -------------------------------------------------------------------------------------------------------


def _fold(layer: Any, norm: Any) -> None:
    """Give a layer the weight and bias with which it does the BatchNorm's work as well."""
    mean, variance = norm.running_mean, norm.running_var
    scale = torch.ones_like(mean) if norm.weight is None else norm.weight
    shift = torch.zeros_like(mean) if norm.bias is None else norm.bias
    fuse = fuse_conv_bn_weights if isinstance(layer, _ConvNd) else fuse_linear_bn_weights
    layer.weight, layer.bias = fuse(layer.weight, layer.bias, mean, variance, norm.eps, scale, shift)


def _rest(norm: nn.Module) -> nn.Module:
    """What a BatchNorm layer does beside normalising."""
    if not isinstance(norm, BatchNormAct2d):
        return nn.Identity()
    return nn.Sequential(*(part for part in (norm.drop, norm.act) if not isinstance(part, nn.Identity)))


def _replace(network: nn.Module, old: nn.Module, new: nn.Module) -> None:
    """Wherever it is registered."""
    for module in network.modules():
        for name, child in module.named_children():
            if child is old:
                setattr(module, name, new)
