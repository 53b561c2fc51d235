"""What teacher and student have in common: calling a network with a batch, its class count, its preprocessing."""

from __future__ import annotations

import difflib
import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import timm
import torch
from accelerate.utils import extract_model_from_parallel
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import TimmWrapperPreTrainedModel


HOST_INDEX = "host_index"
"""Batch entry, (B,) int64 of numpy: the samples' numbers where looking at them stalls no device."""

BOOKKEEPING = frozenset({"labels", "index", HOST_INDEX})
"""Batch entries that are about the samples and never an input of a network."""


def unwrap(model: nn.Module) -> nn.Module:
    """The network itself, without DistributedDataParallel, FSDP or torch.compile around it."""
    return extract_model_from_parallel(model, keep_torch_compile=False)


def timm_network(network: Any) -> Any:
    """timm's network in transformers' wrapper of it; any other as it is."""
    return getattr(network, "timm_model", network)


def uncompiled(name: str) -> str:
    """The name of a tensor or module without what torch.compile puts into it."""
    return name.replace("_orig_mod.", "")


# ---- Calling -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Signature:
    """Which entries of a batch a network's forward takes.

    Attributes:
        names: its named parameters.
        takes_any: whether it has ``**kwargs``.
    """

    names: frozenset[str]
    takes_any: bool

    @classmethod
    def of(cls, network: Callable[..., Any]) -> Signature:
        """Read from ``forward`` of a module, or from any other callable."""
        network = unwrap(network) if isinstance(network, nn.Module) else network
        forward = network.forward if isinstance(network, nn.Module) else network
        parameters = inspect.signature(forward).parameters.values()
        return cls(
            names=frozenset(p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)),
            # What TimmWrapper does not name it hands to timm's forward, which takes the image and nothing else.
            takes_any=any(p.kind is p.VAR_KEYWORD for p in parameters)
            and not isinstance(network, TimmWrapperPreTrainedModel),
        )

    def select(self, inputs: Mapping[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Positional and named arguments for a batch: by name where names agree, else the batch's single input.

        Raises:
            ValueError: if no entry of the batch fits.
        """
        candidates = {key: value for key, value in inputs.items() if key not in BOOKKEEPING}
        if candidates.keys() & self.names or (self.takes_any and not self.names):
            return (), {key: value for key, value in candidates.items() if self.takes_any or key in self.names}
        # timm's forward calls its input `x`: no name in common, but there is only one thing it can be.
        if "pixel_values" in candidates:
            return (candidates["pixel_values"],), {}
        if len(candidates) == 1:
            return (next(iter(candidates.values())),), {}
        raise ValueError(
            f"The batch has {', '.join(sorted(inputs)) or 'no entries'}, of which the network takes none: its forward "
            f"has the parameters {', '.join(sorted(self.names)) or '(none)'}. Rename the columns of the data set."
        )


def logits_of(output: Any) -> Tensor:
    """The logits in what a network returned: a tensor, something with ``logits``, or a tuple that begins with them."""
    if isinstance(output, Tensor):
        return output
    if isinstance(output, Mapping) and "logits" in output:
        return output["logits"]
    if isinstance(getattr(output, "logits", None), Tensor):
        return output.logits
    if isinstance(output, (tuple, list)) and output and isinstance(output[0], Tensor):
        return output[0]
    raise TypeError(
        f"The network returned {type(output).__name__}, which has no logits: return a tensor (batch, classes), a "
        "ModelOutput or dict with `logits`, or a tuple that begins with them."
    )


def num_classes_of(network: Any) -> int | None:
    """The class count a network declares (``config.num_labels``, ``num_classes``), or None if it declares none."""
    network = unwrap(network) if isinstance(network, nn.Module) else network
    for holder, name in ((getattr(network, "config", None), "num_labels"), (network, "num_classes")):
        value = getattr(holder, name, None)
        if isinstance(value, int) and value > 0:
            return value
    return None


def hub_id_of(network: nn.Module) -> str | None:
    """The repository on the Hub that a timm network's published weights are from, or None."""
    cfg: Mapping[str, Any] = getattr(network, "pretrained_cfg", None) or {}
    hub_id, tag = cfg.get("hf_hub_id"), cfg.get("tag")
    if not hub_id:
        return None
    return f"{hub_id}{cfg.get('architecture')}{f'.{tag}' if tag else ''}" if hub_id.endswith("/") else hub_id


# ---- Preprocessing -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Preprocessing:
    """How a network wants its images: what timm keeps in ``pretrained_cfg``.

    Attributes:
        mean, std: of pixel values in [0, 1], one per channel.
        input_size: (channels, height, width).
        interpolation: "bilinear", "bicubic", ...
        crop_pct: the share of the resized image that the centre crop keeps at evaluation.
        crop_mode: timm's name for how that crop is taken.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]
    input_size: tuple[int, int, int]
    interpolation: str = "bicubic"
    crop_pct: float = 1.0
    crop_mode: str = "center"

    @classmethod
    def from_pretrained_cfg(cls, cfg: Mapping[str, Any]) -> Preprocessing:
        """From timm's ``pretrained_cfg``; defaults for what it lacks are timm's."""
        config = timm.data.resolve_data_config(pretrained_cfg=dict(cfg))
        return cls(
            mean=tuple(config["mean"]),
            std=tuple(config["std"]),
            input_size=tuple(config["input_size"]),
            interpolation=config["interpolation"],
            crop_pct=config["crop_pct"],
            crop_mode=config["crop_mode"],
        )

    @classmethod
    def from_image_processor(cls, processor: Any) -> Preprocessing | None:
        """From a transformers image processor, or None if it does not normalise by a mean and a deviation."""
        mean, std = getattr(processor, "image_mean", None), getattr(processor, "image_std", None)
        cropped = getattr(processor, "do_center_crop", None) is not False and getattr(processor, "crop_size", None)
        size = cropped or getattr(processor, "size", None)
        if not mean or not std or not size:
            return None
        # The statistics are there even when they are not used, and mean nothing for pixels that are not in [0, 1].
        factor = getattr(processor, "rescale_factor", 1 / 255)
        in_unit_range = getattr(processor, "do_rescale", True) and math.isclose(factor, 1 / 255, rel_tol=1e-3)
        if not getattr(processor, "do_normalize", True) or not in_unit_range:
            return None
        size = dict(size)
        edge = size.get("shortest_edge")
        height, width = size.get("height", edge), size.get("width", edge)
        if not height or not width:
            return None
        resample = getattr(processor, "resample", None)
        interpolation = {0: "nearest", 2: "bilinear", 3: "bicubic"}.get(int(resample) if resample is not None else 3)
        return cls(tuple(mean), tuple(std), (len(mean), height, width), interpolation or "bicubic")

    @classmethod
    def of(cls, network: Any) -> Preprocessing | None:
        """What a network declares (timm's ``pretrained_cfg``, its own or its config's), or None: never a guess."""
        network = unwrap(network) if isinstance(network, nn.Module) else network
        for holder in (network, getattr(network, "config", None), getattr(network, "timm_model", None)):
            cfg = getattr(holder, "pretrained_cfg", None)
            if cfg:
                return cls.from_pretrained_cfg(fit_channels(cfg, _channels_of(network, cfg)))
        return None


def _channels_of(network: Any, cfg: Mapping[str, Any]) -> int | None:
    """The channels of a network built for other than colour images; None for colour, or if it cannot be told."""
    names = cfg.get("first_conv")
    name = names if isinstance(names, str) else next(iter(names or ()), "")
    module = timm_network(network)
    for part in filter(None, name.split(".")):
        module = getattr(module, part, None)
    channels = getattr(module, "in_channels", None)
    # A stem that folds neighbouring pixels into channels shows 12 or more.
    return channels if channels in (1, 2, 4) else None


def fit_channels(cfg: Mapping[str, Any], channels: int | None) -> dict[str, Any]:
    """timm's ``pretrained_cfg`` for another number of channels: each statistic becomes its mean over the channels.

    timm leaves the published (colour) statistics in place whatever ``in_chans`` is.
    """
    fitted = dict(cfg)
    if channels is None:
        return fitted
    for key in ("mean", "std"):
        values = fitted.get(key)
        if values is not None and len(values) != channels:
            fitted[key] = (sum(values) / len(values),) * channels
    if fitted.get("input_size"):
        fitted["input_size"] = (channels, *fitted["input_size"][1:])
    return fitted


class InputConverter(nn.Module):
    """Turns images prepared for one network into images prepared for another, on the device.

    Undoing one normalisation and applying the other is a single affine map per channel. A size that differs is
    resized with antialiasing, in the target's interpolation: (B, C, H, W) in, (B, C', H', W') out.

    Raises:
        ValueError: if the number of channels cannot be reconciled.
    """

    scale: Tensor
    shift: Tensor

    def __init__(self, source: Preprocessing, target: Preprocessing) -> None:
        super().__init__()
        if len(source.mean) != len(target.mean) and len(source.mean) != 1:
            raise ValueError(
                f"The student's images have {len(source.mean)} channels and the teacher's {len(target.mean)}: only "
                "one channel can be repeated. Give both networks images of the same channels."
            )
        source_mean, source_std = torch.tensor(source.mean).double(), torch.tensor(source.std).double()
        target_mean, target_std = torch.tensor(target.mean).double(), torch.tensor(target.std).double()
        scale, shift = source_std / target_std, (source_mean - target_mean) / target_std
        # Greyscale images meet a colour teacher by broadcasting over the channels.
        self.register_buffer("scale", scale.view(-1, 1, 1).float(), persistent=False)
        self.register_buffer("shift", shift.view(-1, 1, 1).float(), persistent=False)
        self.identity = len(source.mean) == len(target.mean) and bool((scale == 1).all() and (shift == 0).all())
        self.size = tuple(target.input_size[-2:])
        self.interpolation = target.interpolation if target.interpolation in ("bilinear", "bicubic") else "bicubic"

    def forward(self, pixel_values: Tensor) -> Tensor:
        if not self.identity:
            pixel_values = pixel_values * self.scale.to(pixel_values) + self.shift.to(pixel_values)
        if tuple(pixel_values.shape[-2:]) != self.size:
            pixel_values = F.interpolate(
                pixel_values, self.size, mode=self.interpolation, align_corners=False, antialias=True
            )
        return pixel_values


# ---- Weights -------------------------------------------------------------------------------------------------------


def misfits(expected: Mapping[str, Tensor], given: Mapping[str, Tensor]) -> tuple[list[str], list[str], list[str]]:
    """Keys of ``expected`` that ``given`` lacks, keys that it has beside them, and keys of another shape; sorted."""
    shapes = (key for key in expected.keys() & given.keys() if given[key].shape != expected[key].shape)
    return sorted(expected.keys() - given.keys()), sorted(given.keys() - expected.keys()), sorted(shapes)


# ---- Names ---------------------------------------------------------------------------------------------------------


def unknown_timm_name(name: str) -> ValueError:
    """The error for a name timm does not know, with the names nearest to it."""
    architecture = name.split(".")[0]
    near = difflib.get_close_matches(architecture, timm.list_models(), n=3)
    hint = f" Did you mean {', '.join(near)}?" if near else ""
    return ValueError(
        f"timm {timm.__version__} knows no model {name!r}.{hint} timm.list_models('*part*') lists the names; a Hub "
        "repository is written hf-hub:owner/name."
    )


def check_sequence(name: str, values: Sequence[Any], length: int) -> None:
    """ValueError unless a sequence has the length that the number of classes or channels asks for."""
    if len(values) != length:
        raise ValueError(f"`{name}` has {len(values)} entries, {length} are needed: {list(values)!r}.")
