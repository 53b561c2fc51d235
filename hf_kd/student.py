"""The student: built by a timm name, saved so that timm and transformers both open it."""

from __future__ import annotations

import copy
import json
import os
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import timm
import torch
from safetensors.torch import load_file, save_file
from timm.layers import DropPath
from timm.models import PretrainedCfg, get_pretrained_cfg
from torch import Tensor, nn
from transformers import PreTrainedModel, TimmWrapperConfig, TimmWrapperForImageClassification
from transformers.initialization import no_init_weights
from transformers.utils import logging

from .files import atomic_write, write_text
from .networks import (
    check_sequence,
    fit_channels,
    hub_id_of,
    misfits,
    num_classes_of,
    uncompiled,
    unknown_timm_name,
    unwrap,
)


logger = logging.get_logger(__name__)

WEIGHTS = "model.safetensors"
CONFIG = "config.json"

# What of timm's pretrained_cfg describes the network or its preprocessing, rather than where some weights came from.
_KEPT_CFG = (
    "input_size",
    "min_input_size",
    "fixed_input_size",
    "interpolation",
    "crop_pct",
    "crop_mode",
    "mean",
    "std",
    "num_classes",
    "pool_size",
    "first_conv",
    "classifier",
)


class Student(TimmWrapperForImageClassification):
    """A timm network in transformers' clothes, made by :func:`create_student`.

    ``student(pixel_values).logits`` is (B, num_classes); ``student.timm_model`` is timm's module. Its own
    ``save_pretrained`` writes a folder that timm and transformers both open.

    Attributes:
        started_from: "id" on the Hub and "license" of the published weights it started from, or None.
    """

    started_from: dict[str, str | None] | None = None

    def save_pretrained(
        self,
        save_directory: str | os.PathLike[str],
        is_main_process: bool = True,
        state_dict: Mapping[str, Tensor] | None = None,
        push_to_hub: bool = False,
        *args: Any,
        **kwargs: Any,
    ) -> None:
        """Write ``model.safetensors`` (timm's own keys) and ``config.json``; see :func:`save_student`."""
        if push_to_hub:
            raise ValueError(
                "save_pretrained writes a folder: publish it with hf_kd.publish_student(folder, repo_id)."
            )
        if is_main_process:
            save_student(self, save_directory, state_dict=state_dict)


def create_student(
    name: str,
    *,
    num_classes: int | None = None,
    label_names: Sequence[str] | None = None,
    pretrained: bool = False,
    in_chans: int = 3,
    img_size: int | tuple[int, int] | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    interpolation: str | None = None,
    crop_pct: float | None = None,
    **timm_kwargs: Any,
) -> Student:
    """A student network by its timm name.

    Args:
        name: a timm model, such as ``"resnet18"``; with a tag it says which weights ``pretrained`` means.
        num_classes: how many classes; by default the number of label names, or timm's own count.
        label_names: the classes' names, in order, saved with the model.
        pretrained: start from published weights (fetched by timm) instead of timm's initialisation.
        in_chans: channels of the images.
        img_size: height and width, or one number for both, of the images it is trained on.
        mean, std: normalisation of its images, per channel, for pixel values in [0, 1]; timm's for this model by
            default (with one channel: their mean).
        interpolation, crop_pct: how images are resized and cropped at evaluation; timm's for this model by default.
        timm_kwargs: further arguments of ``timm.create_model`` (JSON values, since they are saved in config.json).

    Raises:
        ValueError: for an unknown name (with near names), label names that do not fit, statistics of a wrong length,
            or arguments that are no JSON values.
    """
    architecture = name.split(".")[0]
    if not timm.is_model(architecture):
        raise unknown_timm_name(name)
    tags = timm.list_pretrained(f"{architecture}.*")
    if "." in name and name not in tags:
        raise ValueError(f"timm has no weights {name!r}; for {architecture} there are {', '.join(tags) or 'none'}.")
    try:
        json.dumps(timm_kwargs)
    except TypeError as error:
        raise ValueError(
            f"The arguments for timm are saved in config.json and must be JSON values ({error}): give names and "
            "numbers, not objects."
        ) from error
    if label_names is not None:
        label_names = [str(label) for label in label_names]
        num_classes = len(label_names) if num_classes is None else num_classes
        check_sequence("label_names", label_names, num_classes)
        if len(set(label_names)) != len(label_names):
            raise ValueError(f"`label_names` must be different from one another, got {label_names}.")
    if num_classes is not None and num_classes < 1:
        raise ValueError(f"`num_classes` must be at least 1, got {num_classes}.")

    # A model that was registered without one has timm's defaults, as in timm.create_model.
    cfg = (get_pretrained_cfg(name) or PretrainedCfg()).to_dict()
    size = (img_size, img_size) if isinstance(img_size, int) else img_size
    cfg["input_size"] = (in_chans, *(size or cfg["input_size"][1:]))
    cfg = fit_channels(cfg, in_chans)
    if in_chans != 3:
        timm_kwargs["in_chans"] = in_chans
    # Only networks whose weights depend on the size (position embeddings) take it as an argument.
    if size is not None and cfg.get("fixed_input_size"):
        timm_kwargs["img_size"] = size[0] if size[0] == size[1] else list(size)
    for key, values in (("mean", mean), ("std", std)):
        if values is not None:
            check_sequence(key, values, in_chans)
            cfg[key] = tuple(float(value) for value in values)
    cfg.update({key: value for key, value in (("interpolation", interpolation), ("crop_pct", crop_pct)) if value})

    network: Any = timm.create_model(name, pretrained=pretrained, num_classes=num_classes, **timm_kwargs)
    cfg["num_classes"] = network.num_classes
    kept_cfg = {key: cfg[key] for key in _KEPT_CFG if key in cfg}
    # As a dict, since the class declares only some of what it takes.
    settings: dict[str, Any] = {
        "architecture": architecture,
        "num_labels": network.num_classes,
        "pretrained_cfg": kept_cfg,
        "model_args": timm_kwargs,
    }
    config = TimmWrapperConfig(**settings)
    if label_names is not None:
        config.id2label = dict(enumerate(label_names))
        config.label2id = {label: number for number, label in enumerate(label_names)}
    # On the meta device: transformers builds the network again and would draw its own initial weights over timm's.
    with torch.device("meta"), no_init_weights():
        student = Student(config)
    student.timm_model = network
    student.timm_model.pretrained_cfg = {**network.pretrained_cfg, **kept_cfg}
    if pretrained:
        student.started_from = {"id": hub_id_of(network), "license": network.pretrained_cfg.get("license")}
    return student.train()


def own_label_names(names: Sequence[str]) -> list[str] | None:
    """The names of the classes, in order, or None if they are only numbered, as transformers does by itself."""
    return None if all(name == f"LABEL_{number}" for number, name in enumerate(names)) else list(names)


def adopt_label_names(model: nn.Module, label_names: Sequence[str] | None) -> None:
    """Give a network the names of its classes if it has none of its own, so that they are saved with it."""
    network: Any = unwrap(model)
    if not label_names or len(label_names) != num_classes_of(network) or len(set(label_names)) != len(label_names):
        return
    if isinstance(network, PreTrainedModel):
        labels = cast("dict[int, str]", network.config.id2label or {})
        if own_label_names([labels[number] for number in sorted(labels)]) is None:
            network.config.id2label = dict(enumerate(map(str, label_names)))
            network.config.label2id = {str(name): number for number, name in enumerate(label_names)}
    elif getattr(network, "pretrained_cfg", None):
        cfg = network.pretrained_cfg if isinstance(network.pretrained_cfg, dict) else network.pretrained_cfg.to_dict()
        if len(cfg.get("label_names") or ()) != len(label_names):
            network.pretrained_cfg = {**cfg, "label_names": list(map(str, label_names))}


# ---- Saving and loading --------------------------------------------------------------------------------------------


def save_student(
    model: nn.Module,
    folder: str | os.PathLike[str],
    *,
    state_dict: Mapping[str, Tensor] | None = None,
    label_names: Sequence[str] | None = None,
) -> None:
    """Save a student into a folder.

    A timm network (bare, or in transformers' wrapper) becomes ``model.safetensors`` with timm's own keys and a
    ``config.json`` that ``timm.create_model("local-dir:…")`` and ``AutoModelForImageClassification`` both read, with
    the labels and the preprocessing. Any other transformers model is saved by its own ``save_pretrained``, and any
    other module as ``model.safetensors`` alone.

    Args:
        model: the student; wrappers of torch.compile and DistributedDataParallel are taken off.
        folder: made if missing.
        state_dict: weights to save in place of the model's own (as gathered by FSDP or DeepSpeed).
        label_names: for a bare timm network, the names of its classes.
    """
    model = unwrap(model)
    os.makedirs(folder, exist_ok=True)
    config = export_config(model, label_names)
    if config is None and isinstance(model, PreTrainedModel):
        if state_dict is not None:
            clean = _key_cleaner(model)
            state_dict = {clean(key): value for key, value in state_dict.items()}
        model.save_pretrained(folder, state_dict=state_dict)
        return
    state_dict = model.state_dict() if state_dict is None else state_dict
    with atomic_write(Path(folder) / WEIGHTS) as draft:
        save_file(_clean(state_dict, _key_cleaner(model)), draft, metadata={"format": "pt"})
    if config is not None:
        write_text(Path(folder) / CONFIG, json.dumps(config, indent=2) + "\n")


def load_student_weights(model: nn.Module, folder: str | os.PathLike[str]) -> None:
    """Load what :func:`save_student` wrote into a network of the same shape, every tensor of it.

    Raises:
        ValueError: if keys are missing or left over, or shapes differ: the folder holds another network.
    """
    model = unwrap(model)
    own = model.state_dict(keep_vars=True)
    if isinstance(model, PreTrainedModel) and not isinstance(model, TimmWrapperForImageClassification):
        weights = _read_transformers_weights(model, folder)
    else:
        clean = _key_cleaner(model)
        names = {clean(key): key for key in own}
        weights = {names.get(clean(key), key): value for key, value in load_file(Path(folder) / WEIGHTS).items()}
    # Tied weights are saved once: whatever shares its storage with a saved tensor is there too.
    saved = {own[key].data_ptr() for key in weights.keys() & own.keys()}
    absent, unexpected, shapes = misfits(own, weights)
    missing = [key for key in absent if own[key].data_ptr() not in saved]
    if missing or unexpected or shapes:
        raise ValueError(
            f"The checkpoint {folder} holds another network than this student ({type(model).__name__}): "
            f"{len(missing)} tensors missing, {len(unexpected)} unexpected, {len(shapes)} of another shape"
            f" (such as {next(iter(missing + unexpected + shapes))})."
        )
    model.load_state_dict(weights, strict=False)


def _read_transformers_weights(model: PreTrainedModel, folder: str | os.PathLike[str]) -> dict[str, Tensor]:
    """The state dict in a folder of transformers, which names (and splits) tensors otherwise than in memory."""
    # A pair, whatever its signature says: output_loading_info adds the report.
    loaded, report = cast(
        "tuple[PreTrainedModel, dict[str, Any]]",
        type(model).from_pretrained(
            folder, config=copy.deepcopy(model.config), ignore_mismatched_sizes=True, output_loading_info=True
        ),
    )
    weights = {key: value for key, value in loaded.state_dict().items() if key not in report["missing_keys"]}
    weights.update({key: torch.empty(0) for key in report["unexpected_keys"]})
    weights.update({key: torch.empty(shape) for key, shape, _ in report["mismatched_keys"]})
    return weights


def _key_cleaner(model: nn.Module) -> Callable[[str], str]:
    """From a key of a state dict to the bare one, without the prefixes of wrappers (and none of the user's own)."""
    named = (*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False))
    own = {uncompiled(name) for name, _ in named}
    in_wrapper = isinstance(model, TimmWrapperForImageClassification)

    def clean(key: str) -> str:
        key = uncompiled(key)
        if key not in own:
            key = key.removeprefix("module.")
        return key.removeprefix("timm_model.") if in_wrapper else key

    return clean


def _clean(state_dict: Mapping[str, Tensor], clean_key: Callable[[str], str]) -> dict[str, Tensor]:
    """Bare keys; tensors contiguous and each storage once, as safetensors wants them."""
    cleaned: dict[str, Tensor] = {}
    seen: set[tuple[int, torch.Size]] = set()
    for key, value in state_dict.items():
        identity = (value.data_ptr(), value.shape)
        if value.numel() and identity in seen:
            continue
        seen.add(identity)
        cleaned[clean_key(key)] = value.detach().contiguous().cpu()
    return cleaned


def export_config(model: nn.Module, label_names: Sequence[str] | None) -> dict[str, Any] | None:
    """config.json of a timm network for timm and transformers, or None for any other model."""
    architecture: str | None
    arguments: dict[str, Any] | None
    if isinstance(model, TimmWrapperForImageClassification):
        source, network = model.config, model.timm_model
        architecture, arguments = source.architecture, dict(source.model_args or {})
        cfg = dict(getattr(source, "pretrained_cfg", None) or network.pretrained_cfg)
        labels = cast("dict[int, str]", source.id2label)
        label_names = label_names or own_label_names([labels[number] for number in range(len(labels))])
    else:
        cfg = dict(getattr(model, "pretrained_cfg", None) or {})
        network, architecture = model, cfg.get("architecture")
        if not architecture or not timm.is_model(architecture):
            return None
        arguments = _arguments_of_bare(network, architecture)
        if arguments is None:
            return None
    num_classes = num_classes_of(network)
    if num_classes is None:
        return None
    own_names = cfg.get("label_names") or ()
    if label_names is None and len(own_names) == num_classes:
        # Names of another length are those of the published weights that it was built from.
        label_names = own_names
    if label_names is not None:
        check_sequence("label_names", label_names, num_classes)
    cfg = {key: cfg[key] for key in _KEPT_CFG if cfg.get(key) is not None}
    arguments.pop("num_classes", None)
    cfg = fit_channels(cfg, arguments.get("in_chans", 3))
    module = timm.model_entrypoint(architecture).__module__
    registered_by = {} if module.split(".")[0] == "timm" else {"registered_by": module}
    return {
        **registered_by,
        "architecture": architecture,
        "architectures": ["TimmWrapperForImageClassification"],
        "model_type": "timm_wrapper",
        "num_classes": num_classes,
        # Without names of its own, a network of 1000 classes would be given ImageNet's by transformers.
        "label_names": list(label_names) if label_names else [f"LABEL_{number}" for number in range(num_classes)],
        "model_args": arguments,
        "pretrained_cfg": {**cfg, "num_classes": num_classes},
    }


def _structure(network: nn.Module) -> tuple[dict[str, torch.Size], list[str]]:
    """Shapes of a network's tensors, and the modules that do its work at evaluation: activations, pooling, strides."""
    inactive = (nn.Identity, nn.Dropout, DropPath)
    leaves = [m for m in network.modules() if not any(m.children()) and not isinstance(m, inactive)]
    return (
        {key: value.shape for key, value in network.state_dict().items()},
        # SyncBatchNorm is what BatchNorm2d becomes for several GPUs, and the same at evaluation.
        [re.sub(r"SyncBatchNorm|BatchNorm2d", "BatchNorm", f"{type(m).__name__}({m.extra_repr()})") for m in leaves],
    )


def _arguments_of_bare(network: nn.Module, architecture: str) -> dict[str, Any] | None:
    """timm.create_model arguments that give such a network again, or None: timm does not record them itself."""
    structure = _structure(network)
    channels = next((shape[1] for shape in structure[0].values() if len(shape) == 4), 3)
    candidates: list[dict[str, Any]] = [{}, {"in_chans": int(channels)}]
    for arguments in candidates:
        with torch.device("meta"):
            rebuilt = timm.create_model(architecture, num_classes=network.num_classes, **arguments)
        if _structure(rebuilt) == structure:
            return arguments
    logger.warning(
        "This %s was built with arguments that timm does not record, so the folder will hold its weights alone and no "
        "name to open it by. Build the student with hf_kd.create_student to have a folder that timm and transformers "
        "open.",
        architecture,
    )
    return None
