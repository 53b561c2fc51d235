"""What the CIFAR networks share: how they run and are asked for features, and the blocks of which they are made."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from timm.layers import create_classifier, get_device_dtype
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint


# ---- Layers --------------------------------------------------------------------------------------------------------


def conv(
    in_chans: int, out_chans: int, kernel: int = 3, *, stride: int = 1, groups: int = 1, bias: bool = False
) -> nn.Conv2d:
    """A convolution that keeps the size of its input, but for the stride."""
    return nn.Conv2d(in_chans, out_chans, kernel, stride, padding=kernel // 2, groups=groups, bias=bias)


class Add(nn.Module):
    """The sum of a block's two paths: a module, so that a hook can take what comes before the activation."""

    def forward(self, branch: Tensor, shortcut: Tensor) -> Tensor:
        return branch + shortcut


class Concat(nn.Module):
    """The channels of a block's first path and then of its second: a module for the same reason as :class:`Add`."""

    def forward(self, first: Tensor, second: Tensor) -> Tensor:
        return torch.cat((first, second), dim=1)


class Steps(nn.Module):
    """Children that run one after another, each under the name that published checkpoints give it.

    No activation works in place: a feature that a hook has taken stays what it was.
    """

    def put(self, name: str, module: nn.Module) -> str:
        """Make a module the child of this name, which may be dotted (``"blocks.0"``); returns the name."""
        parent, _, leaf = name.rpartition(".")
        self.get_submodule(parent).add_module(leaf, module)
        return name

    def put_conv(self, number: int, convolution: nn.Conv2d, *, activated: bool) -> list[str]:
        """``conv1``, ``bn1`` and, if activated, ``act1``, for number 1; returns their names."""
        names = [
            self.put(f"conv{number}", convolution),
            self.put(f"bn{number}", nn.BatchNorm2d(convolution.out_channels)),
        ]
        return [*names, self.put(f"act{number}", nn.ReLU())] if activated else names

    def run(self, x: Tensor, names: Sequence[str]) -> Tensor:
        """The input through the children of these names, in order."""
        for name in names:
            # Most names have no dots, and looking those up costs more than launching a small layer does.
            x = (self._modules.get(name) or self.get_submodule(name))(x)
        return x


class Residual(Steps):
    """Convolutions with a shortcut around them, activated after the two have met.

    The children are ``conv1``, ``bn1``, ``act1``, ``conv2``, ...; the shortcut, under the name of the checkpoints;
    ``join``, whose output is the feature before its activation; and ``act``.

    Args:
        convolutions: each followed by BatchNorm, and by ReLU where ``activated`` says so.
        activated: for each convolution; by default all but the last.
        shortcut: what the input passes on the other path; the input itself by default.
        shortcut_name: the shortcut's name.
        join: how the paths meet; by default they are added.
        shuffle: shuffle the channels of this many groups after the first convolution.
    """

    def __init__(
        self,
        convolutions: Sequence[nn.Conv2d],
        *,
        shortcut: nn.Module | None = None,
        shortcut_name: str = "shortcut",
        join: nn.Module | None = None,
        shuffle: int = 1,
    ) -> None:
        super().__init__()
        self.branch: list[str] = []
        for number, convolution in enumerate(convolutions, start=1):
            self.branch += self.put_conv(number, convolution, activated=number < len(convolutions))
            if number == 1 and shuffle > 1:
                self.branch.append(self.put("shuffle", nn.ChannelShuffle(shuffle)))
        self.shortcut_name = self.put(shortcut_name, shortcut or nn.Identity())
        self.join = join or Add()
        self.act = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.join(self.run(x, self.branch), self.run(x, [self.shortcut_name])))


# ---- Gradient checkpointing ----------------------------------------------------------------------------------------


class Stage(nn.Sequential):
    """Blocks in a row, which can be computed again in the backward pass instead of keeping what they computed.

    Args:
        blocks: in order.
        as_one: checkpoint all of it at once, where each child is a single layer; by default block by block.
    """

    def __init__(self, *blocks: nn.Module, as_one: bool = False) -> None:
        super().__init__(*blocks)
        self.as_one = as_one
        self.grad_checkpointing = False

    def forward(self, x: Tensor) -> Tensor:
        if not self.grad_checkpointing:
            return super().forward(x)
        if self.as_one:
            return _checkpoint(super().forward, x, self)
        for block in self:
            x = _checkpoint(block, x, block)
        return x


def _checkpoint(function: Callable[[Tensor], Tensor], x: Tensor, module: nn.Module) -> Tensor:
    if torch.compiler.is_compiling():
        # The compiler recomputes values alone, and takes no contexts.
        return checkpoint(function, x, use_reentrant=False)
    return checkpoint(
        function,
        x,
        use_reentrant=False,
        # Nothing in a block is random, and asking a GPU for its state waits for it.
        preserve_rng_state=False,
        context_fn=lambda: (nullcontext(), _frozen_statistics(module)),
    )


@contextmanager
def _frozen_statistics(module: nn.Module) -> Iterator[None]:
    """Leaves BatchNorm's running statistics alone: a batch that is computed twice counts once."""
    norms: list[Any] = [norm for norm in module.modules() if isinstance(norm, _BatchNorm)]
    before = [(norm.momentum, norm.num_batches_tracked) for norm in norms]
    try:
        for norm in norms:
            norm.momentum, norm.num_batches_tracked = 0.0, None
        yield
    finally:
        for norm, (momentum, count) in zip(norms, before, strict=True):
            norm.momentum, norm.num_batches_tracked = momentum, count


# ---- Networks ------------------------------------------------------------------------------------------------------


class CifarNet(Steps):
    """A network in timm's manner; its families say in ``__init__`` of which steps and which head it is made.

    Images (B, in_chans, H, W) to logits (B, num_classes); meant for H = W = 32, and taking other sizes.

    Args:
        num_classes: 0 for pooled features instead of logits.
        in_chans: channels of the images.
        drop_rate: dropout before the classifier.
        global_pool: timm's name of the pooling, ``""`` for none.

    Attributes:
        feature_info: for each feature map that the CRD protocol's ``forward(is_feat=True)`` returns, a dict:
            ``num_chs``; ``reduction`` of the image's height; ``module``, the submodule whose output it is; and
            ``preact``, the submodule whose output is the map of ``forward(is_feat=True, preact=True)``. The last
            feature there, (B, num_features), is the output of ``global_pool``.
        num_features: channels of :meth:`forward_features`.
        head_hidden_size: length of ``forward_head(..., pre_logits=True)``.
    """

    first_conv = "conv1"
    classifier_name = "fc"
    num_stages = 3
    pool_size = (8, 8)

    def __init__(
        self, *, num_classes: int = 100, in_chans: int = 3, drop_rate: float = 0.0, global_pool: str = "avg"
    ) -> None:
        super().__init__()
        self.num_classes, self.in_chans, self.drop_rate = num_classes, in_chans, drop_rate
        self.grad_checkpointing = False
        self.steps: list[str] = []
        self.feature_info: list[dict[str, Any]] = []
        self._pool_type = global_pool

    # ---- Building ----

    def add_step(self, name: str, module: nn.Module) -> None:
        """One more child that :meth:`forward_features` runs."""
        self.steps.append(self.put(name, module))

    def add_feature(self, channels: int, reduction: int, *, preact: str | None = None) -> None:
        """The output of the last step is a feature; ``preact`` is as in ``feature_info``, by default the same."""
        module = self.steps[-1]
        self.feature_info.append(
            {"num_chs": channels, "reduction": reduction, "module": module, "preact": preact or module}
        )

    def add_stem(self, channels: int, kernel: int = 3) -> None:
        """``conv1``, ``bn1``, ``act1`` of stride 1, whose output is the first feature."""
        self.steps += self.put_conv(1, conv(self.in_chans, channels, kernel), activated=True)
        self.add_feature(channels, reduction=1)

    def add_head(self, num_features: int) -> None:
        """Pooling and classifier, after the last step."""
        self.num_features = num_features
        self._make_head(self._pool_type)

    def _make_head(self, global_pool: str) -> None:
        self.global_pool, classifier = create_classifier(
            self.num_features, self.num_classes, pool_type=global_pool, **get_device_dtype(self)
        )
        self.head_hidden_size = self.num_features * self.global_pool.feat_mult()
        self.put(self.classifier_name, classifier)

    def init_weights(self, *, linear_std: float | None = None, zero_bias: bool = False) -> None:
        """Convolutions normal with variance 2 / (kernel area × output channels); He et al. 2015 (fan out).

        Args:
            linear_std: of the classifier's weights; torch's default if None.
            zero_bias: start biases at zero rather than as torch does.
        """
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            elif isinstance(module, nn.Linear) and linear_std is not None:
                nn.init.normal_(module.weight, std=linear_std)
            if zero_bias and isinstance(module, (nn.Conv2d, nn.Linear)) and module.bias is not None:
                nn.init.zeros_(module.bias)

    # ---- As timm asks ----

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Keep what enters each block and compute the rest again in the backward pass: less memory, more time.

        Gradients and running statistics are those without it.
        """
        self.grad_checkpointing = enable
        for module in self.modules():
            if isinstance(module, Stage):
                module.grad_checkpointing = enable

    def get_classifier(self, name_only: bool = False) -> nn.Module | str:
        """The last layer, or its name."""
        return self.classifier_name if name_only else self.get_submodule(self.classifier_name)

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """A new, untrained classifier; 0 classes for none. ``global_pool`` stays as it is if None."""
        self.num_classes = num_classes
        self._make_head(self.global_pool.pool_type if global_pool is None else global_pool)
        for name in ("global_pool", self.classifier_name):
            self.get_submodule(name).train(self.training)

    def feature_names(self, preact: bool = False) -> list[str]:
        """The submodules whose outputs are the features that the CRD protocol takes, in its order.

        Args:
            preact: the maps before their activation, as far as the protocol has them.
        """
        return [*(info["preact" if preact else "module"] for info in self.feature_info), "global_pool"]

    def forward_features(self, x: Tensor) -> Tensor:
        """Images to the map (B, num_features, h, w) that is pooled."""
        return self.run(x, self.steps)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """That map to logits (B, num_classes), or to (B, head_hidden_size) with ``pre_logits``."""
        x = self.global_pool(x)
        if self.drop_rate:
            x = F.dropout(x, p=self.drop_rate, training=self.training)
        return x if pre_logits else self.run(x, [self.classifier_name])

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | Sequence[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """The features of ``feature_info`` on the way, and what :meth:`forward_features` gives before them.

        Args:
            x: images.
            indices: which features, counted from the end where negative; the last n for a number n; all by default.
            norm: has no effect; these networks normalise inside their blocks.
            stop_early: go no further than the last feature asked for.
            output_fmt: only ``"NCHW"``.
            intermediates_only: the features alone.

        Raises:
            ValueError: for another ``output_fmt``, or a feature that there is not.
        """
        if output_fmt != "NCHW":
            raise ValueError(f"`output_fmt` must be 'NCHW', got {output_fmt!r}: convert what is returned.")
        taken = self._take(indices)
        modules = {self.feature_info[index]["module"] for index in taken}
        intermediates: list[Tensor] = []
        for name in self._up_to(max(taken)) if stop_early else self.steps:
            x = self.run(x, [name])
            if name in modules:
                intermediates.append(x)
        return intermediates if intermediates_only else (x, intermediates)

    def prune_intermediate_layers(
        self, indices: int | Sequence[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Drop the steps after the last of these features; with them, or if asked for, the classifier goes too.

        Args:
            indices: as in :meth:`forward_intermediates`.
            prune_norm: drop what follows the last feature of all as well.
            prune_head: drop the classifier in any case.

        Returns:
            The indices, counted from the start.
        """
        taken = self._take(indices)
        last, kept = max(taken), self._up_to(max(taken))
        if last < len(self.feature_info) - 1 or prune_norm:
            for name in self.steps[len(kept) :]:
                parent, _, leaf = name.rpartition(".")
                delattr(self.get_submodule(parent), leaf)
            self.steps = kept
            self.num_features = self.feature_info[last]["num_chs"]
            prune_head = True
        if prune_head:
            self.reset_classifier(0, "")
        return taken

    def _take(self, indices: int | Sequence[int] | None) -> list[int]:
        features = range(len(self.feature_info))
        indices = len(features) if indices is None else indices
        wanted = range(-indices, 0) if isinstance(indices, int) else indices
        try:
            taken = [features[index] for index in wanted]
        except IndexError:
            taken = []
        if not taken:
            raise ValueError(
                f"`indices` must name features 0 to {len(features) - 1}, or say how many of the last, got {indices!r}."
            )
        return taken

    def _up_to(self, index: int) -> list[str]:
        return self.steps[: self.steps.index(self.feature_info[index]["module"]) + 1]
