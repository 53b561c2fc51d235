"""`hf-kd cache-teacher`: a trainer for a folder or table of images, whose teacher's outputs are computed ahead."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
import yaml
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor, nn
from transformers import HfArgumentParser

from .config import DistillationConfig
from .data import eval_transform, load_image_dataset, train_transform
from .text import one_line
from .trainer import DistillationTrainer


@dataclass
class CacheArguments:
    """What the command needs beyond DistillationConfig: the teacher, and the images as the student will see them."""

    teacher: str = field(default="", metadata={"help": "timm name, hf-hub:owner/name, local folder or weights file."})
    train_dir: str | None = field(default=None, metadata={"help": "Training images, one sub-folder a class."})
    dataset_name: str | None = field(
        default=None, metadata={"help": "In place of a folder: a Hub data set, or a local folder of Parquet files."}
    )
    dataset_config: str | None = field(default=None, metadata={"help": "Its configuration, if it has several."})
    train_split: str = field(default="train", metadata={"help": "Its split for training."})
    image_column: str = field(default="image", metadata={"help": "Its column of images."})
    label_column: str | None = field(default="label", metadata={"help": "Its column of class numbers."})
    num_classes: int | None = field(default=None, metadata={"help": "Class count, where the data do not say it."})
    img_size: int = field(default=224, metadata={"help": "Side of the student's images."})
    interpolation: str = field(default="bilinear", metadata={"help": "How they are resized."})
    augment: bool = field(default=True, metadata={"help": "Random crops and flips; False for the centre crop."})
    auto_augment: str | None = field(default=None, metadata={"help": "timm's policy, such as rand-m9-mstd0.5-inc1."})
    color_jitter: float = field(default=0.0, metadata={"help": "Strength of the colour jitter."})
    random_erasing: float = field(default=0.0, metadata={"help": "Probability that a rectangle is erased."})
    normalize: bool = field(
        default=True, metadata={"help": "False where the script has bytes normalised on the device."}
    )
    decoder: str = field(
        default="pil", metadata={"help": "What the script decodes pictures by: pil, torchvision, auto."}
    )
    student: str | None = field(default=None, metadata={"help": "Of the runs to come; the cache serves any."})


class _StandIn(nn.Module):
    """In the student's place: its class count, and how its images are normalised."""

    def __init__(self, num_classes: int, arguments: CacheArguments) -> None:
        super().__init__()
        self.num_classes = num_classes
        size = (3, arguments.img_size, arguments.img_size)
        self.pretrained_cfg = {"mean": IMAGENET_DEFAULT_MEAN, "std": IMAGENET_DEFAULT_STD, "input_size": size}
        self.weight = nn.Parameter(torch.zeros(()))

    def forward(self, pixel_values: Tensor) -> Tensor:
        return self.weight.expand(len(pixel_values), self.num_classes)


def caching_trainer(config: str | Path, overrides: Sequence[str] = ()) -> DistillationTrainer:
    """A trainer whose ``cache_teacher()`` computes what a YAML file asks for.

    Args:
        config: YAML of the fields of :class:`CacheArguments` and DistillationConfig; a row of the recipes will do.
        overrides: ``--FIELD VALUE ...``, in place of the file's.

    Raises:
        ValueError: for a file that is missing or no mapping, an unknown field, and whatever the trainer refuses.
    """
    values = {**_read(Path(config)), **_parsed(overrides)}
    # What a recipe's row says of the paper's figures.
    values = {key: value for key, value in values.items() if not key.startswith("paper_")}
    known = [f.name for cls in (CacheArguments, DistillationConfig) for f in fields(cls) if f.init]
    for key in values:
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            raise ValueError(f"There is no field {key!r}{f' (did you mean {near[0]!r}?)' if near else ''}.")
    for name, what in (("teacher_cache_dir", "the folder of the cache"), ("teacher", "the teacher's name or folder")):
        if not values.get(name):
            raise ValueError(f"`{name}` is missing, {what}: give it in {config} or as --{name}.")
    # Nothing else is written.
    values = {"output_dir": values["teacher_cache_dir"], "save_strategy": "no", **values}
    parser = HfArgumentParser([CacheArguments, DistillationConfig])  # type: ignore[list-item]
    arguments, args = parser.parse_dict(values)
    train = load_image_dataset(
        arguments.train_dir,
        arguments.dataset_name,
        transform=_transform(arguments),
        seed=args.seed,
        decoder=arguments.decoder,
        **({} if arguments.dataset_name is None else _table_options(arguments)),
    )
    classes = train.num_classes if train.num_classes is not None else arguments.num_classes
    if not classes:
        raise ValueError("The data set does not say how many classes it has: give --num_classes.")
    return DistillationTrainer(_StandIn(classes, arguments), arguments.teacher, args, train_dataset=train)


def _table_options(arguments: CacheArguments) -> dict[str, Any]:
    return {
        "config_name": arguments.dataset_config,
        "split": arguments.train_split,
        "image_column": arguments.image_column,
        "label_column": arguments.label_column,
        "num_classes": arguments.num_classes,
    }


def _transform(arguments: CacheArguments) -> Any:
    if not arguments.augment:
        return eval_transform(arguments.img_size, interpolation=arguments.interpolation, normalize=arguments.normalize)
    return train_transform(
        arguments.img_size,
        interpolation=arguments.interpolation,
        auto_augment=arguments.auto_augment,
        color_jitter=arguments.color_jitter,
        random_erasing=arguments.random_erasing,
        normalize=arguments.normalize,
    )


def _read(path: Path) -> Mapping[str, Any]:
    if not path.is_file():
        raise ValueError(f"The configuration {path} does not exist: give a YAML file.")
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not a YAML file: {one_line(error)}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path} must hold fields and their values, it holds a {type(values).__name__}.")
    return values


def _parsed(overrides: Sequence[str]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    words = [part for word in overrides for part in (word.split("=", 1) if word.startswith("--") else [word])]
    for name, value in zip(words[::2], words[1::2], strict=False):
        if not name.startswith("--"):
            raise ValueError(f"Fields are given as --FIELD VALUE, got {name!r}.")
        values[name[2:]] = yaml.safe_load(value)
    if len(words) % 2:
        raise ValueError(f"{words[-1]!r} has no value: fields are given as --FIELD VALUE.")
    return values
