"""Features of a network by name: what its modules give, or get, during an ordinary forward pass."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from .networks import num_classes_of, timm_network, unwrap


PRE_LOGITS = "pre_logits"
"""The name of what the classifier gets, in every network."""

_PARTS = ("output", "input", "patches")

# Names that wrappers inside of a network put between those of its modules.
_WRAPPERS = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")

# Parameters (1, tokens, D) that stand before the patches, as transformers' networks call them.
_PREFIX_TOKENS = frozenset({"cls_token", "class_token", "distillation_token", "register_tokens"})


class FeatureTaker:
    """Takes features out of a network while it runs, by the dotted names of its modules.

    A name is one of

    - ``"layer3"``, ``"blocks.0"``: the output of that module (its first tensor, if it gives several);
    - ``"fc@input"``: its first input;
    - ``"blocks.0@patches"``: its output (B, N, D) without the tokens that stand before the patches (class,
      distillation and register tokens), as timm's ``forward_intermediates`` gives it. Where they come after the module
      (CaiT, XCiT) the output is patches already: leave out ``@patches``;
    - ``"pre_logits"``: what the classifier gets, as timm's ``forward_head(..., pre_logits=True)`` gives it. Maps
      (B, C, H, W) are averaged over their positions; of a network with two classifiers it is the mean of what they
      get.

    The prefix of a wrapper is implied: ``layer3`` is ``timm_model.layer3`` in transformers' TimmWrapper, and
    ``layers.0`` is ``vit.layers.0`` in a ViT of transformers. DistributedDataParallel and torch.compile around the
    network make no difference, but the taker must be there before a compiled network first runs.

    ::

        taker = FeatureTaker(network, ["pre_logits", "layer3"])
        with taker:
            logits = network(images)
        features = taker.take()  # {"pre_logits": (B, D), "layer3": (B, C, H, W)}

    Features are copies, in the dtype in which the network computes (half precision under autocast), and the student's
    are part of its graph. Outside of ``with`` the network runs as if the taker were not there, and nothing is kept.

    Args:
        network: the module whose forward is called, or the one inside of its wrappers.
        names: which features.
        detach: give them without a graph, as of a teacher, which may run in inference mode.

    Raises:
        ValueError: for a name that the network does not have (with near names), a name given twice, or none at all.
    """

    def __init__(self, network: nn.Module, names: Sequence[str], *, detach: bool = False) -> None:
        if isinstance(names, str) or not names or len(set(names)) != len(names):
            raise ValueError(f"The features must be a list of names, at least one and each once, got {names!r}.")
        self.names = tuple(names)
        self.detach = detach
        self._network = unwrap(network)
        self._prefix_tokens = _prefix_tokens(self._network)
        self._active = self._with_grad = False
        self._kept: dict[str, list[tuple[Tensor, bool]]] = {}
        self._handles: list[RemovableHandle] = []
        self._calls: dict[str, int] = {}
        found = {name: _find(self._network, name) for name in self.names}
        for name, modules in found.items():
            hook = _Hook(self, name)
            self._calls[name] = len(modules)
            for module in modules:
                # For good, and idle outside of `with`: a compiled network would not notice a hook that comes later.
                self._handles.append(
                    module.register_forward_pre_hook(hook, with_kwargs=True)
                    if _part(name) == "input"
                    else module.register_forward_hook(hook)
                )

    def __enter__(self) -> FeatureTaker:
        self._kept = {}
        self._with_grad = torch.is_grad_enabled() and not self.detach
        self._active = True
        return self

    def __exit__(self, kind: object, error: object, traceback: object) -> None:
        self._active = False
        if error is not None:
            self._kept = {}

    def take(self) -> dict[str, Tensor]:
        """The features of the forward pass that was made in ``with``, by name. They are handed over: once.

        Raises:
            RuntimeError: if a module was not called, or more than once; if it was called without the graph that
                training needs; or if its output holds no tensor, or no tokens where patches are asked for.
        """
        kept, self._kept = self._kept, {}
        return {name: self._feature(name, kept.get(name, [])) for name in self.names}

    def shapes(self, forward: Callable[[], Any]) -> dict[str, torch.Size]:
        """Shapes of the features by name, from a forward pass that leaves the network as it was.

        The pass is made in eval mode, without gradients and without compiling anything.

        Args:
            forward: calls the network with a batch, such as ``lambda: teacher(**batch)``.
        """
        with _evaluation(self._network), torch.no_grad(), torch.compiler.set_stance("force_eager"):
            with self:
                forward()
            return {name: feature.shape for name, feature in self.take().items()}

    def remove(self) -> None:
        """Leave the network without hooks; the taker is of no further use."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def __getstate__(self) -> dict[str, Any]:
        # Whoever copies or pickles a network (an EMA of it, say) gets its hooks too, and tensors with a graph cannot
        # be copied.
        return {**self.__dict__, "_kept": {}, "_active": False}

    # ---- Inside ----------------------------------------------------------------------------------------------------

    def _keep(self, name: str, value: Any) -> None:
        if not self._active:
            return
        tensor = _first_tensor(value)
        if tensor is None:
            raise RuntimeError(
                f"The module of the feature {name!r} gives {type(value).__name__}, in which there is no tensor: name "
                "another module."
            )
        # A copy: an activation that works in place would change the module's output after it was taken.
        copy = tensor.detach().clone() if self.detach else tensor.clone()
        self._kept.setdefault(name, []).append((copy, torch.is_grad_enabled()))

    def _feature(self, name: str, kept: list[tuple[Tensor, bool]]) -> Tensor:
        if not kept:
            raise RuntimeError(
                f"The module of the feature {name!r} was not called: run the network inside of `with taker:`, and "
                "make the taker before a compiled network runs for the first time."
            )
        if len(kept) != self._calls[name]:
            raise RuntimeError(
                f"The module of the feature {name!r} was called {len(kept)} times in one forward pass, so that it is "
                "not clear which is meant: name a module that is called once, and take after each pass."
            )
        if self._with_grad and not all(grad for _, grad in kept):
            raise RuntimeError(
                f"The feature {name!r} was computed without a graph, as gradient checkpointing of the reentrant kind "
                'does: choose the other kind (gradient_checkpointing_kwargs={"use_reentrant": False}).'
            )
        # A tensor born in inference mode cannot be saved for a backward pass; its copy can.
        tensors = [tensor.clone() if tensor.is_inference() else tensor for tensor, _ in kept]
        if name == PRE_LOGITS:
            tensors = [tensor.mean(dim=(-2, -1)) if tensor.dim() == 4 else tensor for tensor in tensors]
            return tensors[0] if len(tensors) == 1 else torch.stack(tensors).mean(dim=0)
        if _part(name) == "patches":
            if tensors[0].dim() != 3:
                raise RuntimeError(
                    f"The feature {name!r} has the shape {tuple(tensors[0].shape)}, and patches are tokens (batch, "
                    f"tokens, width): take {name.partition('@')[0]!r} as it is."
                )
            return tensors[0][:, self._prefix_tokens :]
        return tensors[0]


class _Hook:
    """The hook of one feature; an object rather than a closure, so that a network can be copied with it."""

    def __init__(self, taker: FeatureTaker, name: str) -> None:
        self.taker = taker
        self.name = name
        self.is_input = _part(name) == "input"

    def __call__(self, module: nn.Module, args: tuple[Any, ...], other: Any) -> None:
        # `other` is the output, and before the call the named inputs.
        self.taker._keep(self.name, (*args, *other.values()) if self.is_input else other)


def _part(name: str) -> str:
    """Which part of a module's call a feature is."""
    return "input" if name == PRE_LOGITS else name.partition("@")[2] or "output"


def _first_tensor(value: Any) -> Tensor | None:
    if isinstance(value, Tensor):
        return value
    values = value.values() if isinstance(value, Mapping) else value if isinstance(value, (tuple, list)) else ()
    return next((item for item in values if isinstance(item, Tensor)), None)


def _find(network: nn.Module, name: str) -> list[nn.Module]:
    """The module that a feature's name means; several only for classifiers."""
    if name == PRE_LOGITS:
        return _classifiers(network)
    path, _, part = name.partition("@")
    if part and part not in _PARTS:
        raise ValueError(f"The feature {name!r} asks for {part!r} of a module; it can be {', '.join(_PARTS)}.")
    modules: dict[str, nn.Module] = {}
    for key, module in network.named_modules(remove_duplicate=False):
        # The outermost of a module and its wrappers, which have one name.
        modules.setdefault(".".join(step for step in key.split(".") if step not in _WRAPPERS), module)
    prefix = _implied_prefix(network)
    for candidate in (path, prefix + path):
        if path and candidate in modules:
            return [modules[candidate]]
    known = [PRE_LOGITS, *(key.removeprefix(prefix) for key in modules if key)]
    near = difflib.get_close_matches(path, known, n=3)
    hint = f" Did you mean {', '.join(near)}?" if near else ""
    raise ValueError(
        f"The network {type(network).__name__} has no module {path!r} for the feature {name!r}.{hint} It can be "
        f"{PRE_LOGITS!r} or a name in its named_modules()."
    )


def _implied_prefix(network: nn.Module) -> str:
    if isinstance(getattr(network, "timm_model", None), nn.Module):
        return "timm_model."
    base = network.base_model_prefix if isinstance(network, PreTrainedModel) else ""
    return f"{base}." if base else ""


def _classifiers(network: nn.Module) -> list[nn.Module]:
    """The last layer of a network: timm's ``get_classifier``, elsewhere the last linear layer that gives the classes.

    Two layers for a network that was distilled with a token of its own.
    """
    get_classifier = getattr(timm_network(network), "get_classifier", None)
    if callable(get_classifier):
        given = get_classifier()
        modules = list(given) if isinstance(given, (tuple, list, nn.ModuleList)) else [given]
    else:
        classes = num_classes_of(network)
        linear = [module for module in network.modules() if isinstance(module, nn.Linear)]
        modules = [module for module in linear if classes in (None, module.out_features)][-1:]
    if not modules or not all(isinstance(module, nn.Module) for module in modules):
        raise ValueError(
            f"It cannot be told which layer of the network {type(network).__name__} is its classifier, which "
            f"{PRE_LOGITS!r} is the input of: name the layer, such as 'head@input'."
        )
    return modules


def _prefix_tokens(network: nn.Module) -> int:
    """How many tokens stand before those of the patches."""
    inner = timm_network(network)
    declared = getattr(inner, "num_prefix_tokens", None)
    if isinstance(declared, int):
        return declared
    if hasattr(inner, "pretrained_cfg"):
        # timm's networks that do not say have none, or add it after their blocks (VOLO).
        return 0
    named = ((name.rpartition(".")[2], parameter) for name, parameter in inner.named_parameters())
    return sum(parameter.shape[-2] for name, parameter in named if name in _PREFIX_TOKENS and parameter.dim() > 1)


@contextmanager
def _evaluation(network: nn.Module) -> Iterator[None]:
    """A network in eval mode; afterwards each of its modules is as it was."""
    before = [(module, module.training) for module in network.modules()]
    network.eval()
    try:
        yield
    finally:
        for module, training in before:
            module.training = training
