"""ImageNet: the paper's ResNet-34 → ResNet-18 by WTTM, its other four pairs, or any pair on any folder of images.

    accelerate launch recipes/imagenet_wttm.py --train_dir imagenet/train --val_dir imagenet/val
    accelerate launch recipes/imagenet_wttm.py --dataset_name ILSVRC/imagenet-1k [--streaming]
    accelerate launch recipes/imagenet_wttm.py --config recipes/configs/imagenet/resnet50_mobilenet.yaml

Every field below can be given on the command line or in the YAML file of --config; the command line wins. A folder
holds one sub-folder a class. With no data given, imagenet/ and data/imagenet/ here are looked at (each with train/ and
val/), and nothing else. Everything lands in --output_dir: checkpoints, results.json, and the student with its card.
--resume_from_checkpoint last goes on where an earlier launch stopped. For many GPUs and machines give accelerate a
--config_file of recipes/configs/accelerate/: everything here stays as it is, the total batch included.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from common import folder_name
from rows import Recipe, RowArguments, build_pair, check_classes, run_recipe
from table import CONFIGS
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

from hf_kd import DistillationConfig, DistillationTrainer
from hf_kd.data import eval_transform, load_image_dataset, train_transform


# Where ImageNet is looked for if no data are named, below the working directory.
USUAL_PLACES = ("imagenet", "data/imagenet")

# The faster one for the transform. Validation stays with PIL's, as does whoever uses the student.
TRAIN_DECODER = "auto"

# The paper's protocol, which is that of torchvision's reference: the same in all rows.
PROTOCOL = {
    "num_train_epochs": 100.0,
    "optim": "sgd",
    "learning_rate": 0.1,
    "momentum": 0.9,
    "weight_decay": 1e-4,
    "decay_all_parameters": True,
    "max_grad_norm": 0.0,
    "lr_milestones": [30.0, 60.0, 90.0],
    "lr_decay": 0.1,
}
# The row that runs when none is named, and how it goes.
DEFAULTS = {
    "config": str(CONFIGS / "imagenet" / "resnet34_resnet18.yaml"),
    "teacher": "resnet34.tv_in1k",
    "student": "resnet18",
    "eval_strategy": "epoch",
    "save_strategy": "epoch",
    "save_total_limit": 2,
    "logging_steps": 100,
    "per_device_eval_batch_size": 256,
    "dataloader_persistent_workers": True,
    "dataloader_prefetch_factor": 4,
}


@dataclass
class ImageNetArguments(RowArguments):
    """What this recipe needs beyond DistillationConfig."""

    interpolation: ClassVar[str] = "bilinear"

    num_classes: int | None = field(
        default=None, metadata={"help": "Class count; found from the data, and checked against it."}
    )
    train_dir: str | None = field(default=None, metadata={"help": "Training images, one sub-folder a class."})
    val_dir: str | None = field(default=None, metadata={"help": "Validation images, the same sub-folders."})
    dataset_name: str | None = field(
        default=None, metadata={"help": "In place of folders: a Hub data set, or a local folder of Parquet files."}
    )
    dataset_config: str | None = field(default=None, metadata={"help": "Its configuration, if it has several."})
    train_split: str = field(default="train", metadata={"help": "Its split for training."})
    validation_split: str = field(default="validation", metadata={"help": "Its split for evaluation."})
    image_column: str = field(default="image", metadata={"help": "Its column of images."})
    label_column: str = field(default="label", metadata={"help": "Its column of class numbers."})
    streaming: bool = field(default=False, metadata={"help": "Read it as it comes, with no download beforehand."})
    shuffle_buffer: int = field(
        default=2000, metadata={"help": "Samples that each worker holds to shuffle a stream; 0 keeps its order."}
    )
    train_samples: int | None = field(
        default=None, metadata={"help": "Length of a training stream that does not say it."}
    )
    in_memory: bool = field(
        default=False,
        metadata={"help": "Decode all pictures once and keep them, at 3 bytes a pixel, where they fit."},
    )
    img_size: int = field(
        default=224, metadata={"help": "Side of the training crop; evaluation resizes to 256/224 of it, then crops."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.train_samples is not None and self.train_samples < 1:
            raise ValueError(f"`train_samples` must be at least 1, got {self.train_samples}.")
        self._find_data()

    def _find_data(self) -> None:
        folders = {"--train_dir": self.train_dir, "--val_dir": self.val_dir}
        given = [name for name, value in folders.items() if value]
        if self.dataset_name and given:
            raise ValueError(f"Give either folders or --dataset_name, got --dataset_name and {' and '.join(given)}.")
        if len(given) == 1:
            raise ValueError(f"Give --train_dir and --val_dir together, got only {given[0]}.")
        if self.streaming and not self.dataset_name:
            raise ValueError("--streaming is for --dataset_name; folders are read file by file as it is.")
        if self.dataset_name or given:
            return
        for place in map(Path, USUAL_PLACES):
            if (place / "train").is_dir() and (place / "val").is_dir():
                self.train_dir, self.val_dir = str(place / "train"), str(place / "val")
                return
        raise ValueError(
            "There are no images to train on: give --train_dir and --val_dir (folders with one sub-folder a class), "
            "or --dataset_name ILSVRC/imagenet-1k (from the Hub: ask for access there, then `hf auth login`)."
        )

    @property
    def transforms(self) -> dict[str, Any]:
        """The protocol's transforms of pictures, for "train" and "validation"; the trainer normalises the views."""
        return {
            "train": train_transform(self.img_size, interpolation=self.interpolation, normalize=False),
            "validation": eval_transform(self.img_size, interpolation=self.interpolation, normalize=False),
        }

    @property
    def preprocessing(self) -> dict[str, Any]:
        """What the saved student says of its images, as validation has them: arguments of create_student."""
        return {
            "img_size": self.img_size,
            "mean": IMAGENET_DEFAULT_MEAN,
            "std": IMAGENET_DEFAULT_STD,
            "interpolation": self.interpolation,
            "crop_pct": 224 / 256,
        }

    @property
    def folder(self) -> str:
        return f"outputs/imagenet_{folder_name(self.teacher, self.student)}"

    @property
    def source(self) -> str | list[str]:
        return self.dataset_name or [str(self.train_dir), str(self.val_dir)]

    @property
    def card(self) -> dict[str, Any]:
        images = Path(self.train_dir).resolve() if self.train_dir else None
        if images is not None and images.name.startswith("train"):
            images = images.parent
        return {
            "dataset_tags": self.dataset_name,
            "dataset": images.name if images else None,
            "dataset_args": self.dataset_config,
        }


# ---- Data ----------------------------------------------------------------------------------------------------------


def build_data(recipe: ImageNetArguments, config: DistillationConfig) -> tuple[Any, Any]:
    """Training and validation data with the protocol's transforms, and the same classes in both."""
    transforms = recipe.transforms
    # On one machine the first process fetches and converts; the others find it done.
    with config.main_process_first(desc="loading the data"):
        options: dict[str, Any]
        if recipe.dataset_name:
            options = {
                "config_name": recipe.dataset_config,
                "image_column": recipe.image_column,
                "label_column": recipe.label_column,
                "streaming": recipe.streaming,
                "in_memory": recipe.in_memory,
                "seed": recipe.seed_of_views(config),
            }
            train = load_image_dataset(
                dataset_name=recipe.dataset_name,
                transform=transforms["train"],
                split=recipe.train_split,
                shuffle_buffer=recipe.shuffle_buffer if recipe.streaming else 0,
                num_classes=recipe.num_classes,
                decoder=TRAIN_DECODER,
                **options,
            )
            validation = load_image_dataset(
                dataset_name=recipe.dataset_name,
                transform=transforms["validation"],
                split=recipe.validation_split,
                num_classes=train.num_classes,
                **options,
            )
            places = [f"split {split!r}" for split in (recipe.train_split, recipe.validation_split)]
        else:
            options = {"seed": recipe.seed_of_views(config), "in_memory": recipe.in_memory}
            train = load_image_dataset(
                recipe.train_dir, transform=transforms["train"], decoder=TRAIN_DECODER, **options
            )
            validation = load_image_dataset(recipe.val_dir, transform=transforms["validation"], **options)
            places = [str(recipe.train_dir), str(recipe.val_dir)]
    check_classes(train, validation, places, recipe.num_classes)
    if recipe.streaming:
        train.num_examples = recipe.train_samples or train.num_examples
        if train.num_examples is None:
            raise ValueError(
                f"The stream {recipe.dataset_name} does not say how many samples it has, by which epochs are counted: "
                "give --train_samples."
            )
    return train, validation


# ---- Building ------------------------------------------------------------------------------------------------------


def build_trainer(recipe: ImageNetArguments, config: DistillationConfig) -> DistillationTrainer:
    return build_pair(recipe, config, *build_data(recipe, config), recipe.preprocessing)


RECIPE = Recipe(
    description=__doc__,
    arguments=ImageNetArguments,
    protocol=PROTOCOL,
    defaults=DEFAULTS,
    settings=("img_size",),
    full_data={"classes": 1000, "train_samples": 1_281_167, "validation_samples": 50_000},
    build=build_trainer,
)


def main(argv: Sequence[str] | None = None) -> None:
    run_recipe(RECIPE, argv)


if __name__ == "__main__":
    main()
