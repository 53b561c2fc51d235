"""CIFAR-100: each row of the paper's tables, 13 pairs of networks by WTTM and what it is compared with.

    accelerate launch recipes/cifar100_wttm.py --fetch_teacher
    accelerate launch recipes/cifar100_wttm.py --config recipes/configs/cifar100/vgg13_vgg8/wttm_crd.yaml \\
        --data cifar-100-python --teacher_checkpoint vgg13_vanilla/ckpt_epoch_240.pth --seeds 5
    accelerate launch recipes/cifar100_wttm.py --config recipes/configs/cifar100/vgg13_vgg8/ce.yaml \\
        --student cifar_vgg13 --output_dir outputs/cifar100/teachers/vgg13

The first is WRN-40-2 → WRN-16-2 by WTTM; recipes/README.md lists all rows. The third trains a teacher of your own,
whose folder --teacher then takes. Every field below can be given on the command line or in the YAML file of --config;
the command line wins. Everything lands in --output_dir: checkpoints, results.json, and the student with its card.
--resume_from_checkpoint last goes on where an earlier launch stopped. For many GPUs give accelerate a --config_file of
recipes/configs/accelerate/: everything here stays as it is, the total batch included.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from accelerate.utils import get_int_from_env
from common import folder_name
from fetch import check_sha256, fetch, sha256_of
from rows import Recipe, RowArguments, build_pair, check_classes, row_name, run_recipe
from table import CONFIGS

import hf_kd.models.cifar  # noqa: F401 - registers the networks with timm
from hf_kd import DistillationConfig, DistillationTrainer
from hf_kd.data import CIFAR100_MEAN, CIFAR100_STD, CifarDataset, load_cifar
from hf_kd.data.cifar import CIFAR_SIZE


# The CRD protocol's published teachers: each is NAME/ckpt_epoch_240.pth.
PUBLISHED = {
    **{f"cifar_{name}": f"{name}_vanilla" for name in ("wrn_40_2", "resnet56", "resnet110", "resnet32x4", "vgg13")},
    "cifar_resnet50": "ResNet50_vanilla",
}
CHECKPOINT = "ckpt_epoch_240.pth"

# The CRD protocol: the same in all rows, but for the learning rate of MobileNetV2 and the ShuffleNets.
PROTOCOL = {
    "num_train_epochs": 240.0,
    "optim": "sgd",
    "learning_rate": 0.05,
    "momentum": 0.9,
    "weight_decay": 5e-4,
    "decay_all_parameters": True,
    "max_grad_norm": 0.0,
    "lr_milestones": [150.0, 180.0, 210.0],
    "lr_decay": 0.1,
}
# The row that runs when none is named, and how it goes.
DEFAULTS = {
    "config": str(CONFIGS / "cifar100" / "wrn_40_2_wrn_16_2" / "wttm.yaml"),
    "eval_strategy": "epoch",
    "save_strategy": "epoch",
    "save_total_limit": 2,
    "logging_steps": 100,
    "per_device_eval_batch_size": 256,
    # The images are in memory, and augmented a batch at a time: workers would only pass them on.
    "dataloader_num_workers": 0,
}

# How the images are prepared: arguments of create_student.
IMAGES = {
    "img_size": CIFAR_SIZE,
    "mean": CIFAR100_MEAN,
    "std": CIFAR100_STD,
    "interpolation": "bilinear",
    "crop_pct": 1.0,
}


@dataclass
class CifarArguments(RowArguments):
    """What this recipe needs beyond DistillationConfig."""

    data: str = field(
        default="uoft-cs/cifar100",
        metadata={
            "help": "CIFAR-100: a data set's id on the Hub, or a folder: what an archive of the data's authors "
            "unpacks to (python or binary version), train/ and test/ with a folder a class, or Parquet files."
        },
    )
    total_batch_size: int = field(
        default=64, metadata={"help": "Samples of one optimiser step, over all processes and accumulated batches."}
    )
    image_column: str = field(default="img", metadata={"help": "Column of the images, on the Hub and in Parquet."})
    label_column: str | None = field(
        default=None, metadata={"help": "Column of the labels there; by default fine_label, or else label."}
    )
    fetch_teacher: bool = field(
        default=False,
        metadata={"help": "Fetch the published teacher, over plain http, unless teacher_cache has it already."},
    )
    teacher_url: str = field(
        default="http://shape2prog.csail.mit.edu/repo",
        metadata={"help": f"Where the published teachers are, as NAME/{CHECKPOINT}."},
    )
    teacher_cache: str = field(
        default="~/.cache/hf_kd/teachers", metadata={"help": "Folder that they are kept in, by the same names."}
    )
    teacher_sha256: str | None = field(
        default=None, metadata={"help": "What the SHA-256 of the teacher's file must be; any by default."}
    )

    @property
    def folder(self) -> str:
        row = row_name(self.config)
        return f"outputs/{row if '/' in row else f'cifar100_{folder_name(row)}'}"

    @property
    def source(self) -> str:
        return self.data

    @property
    def card(self) -> dict[str, Any]:
        local = Path(self.data).expanduser().exists()
        name = Path(self.data).expanduser().resolve().name
        return {"dataset_tags": None if local else self.data, "dataset": name if local else None}


# ---- The teacher ---------------------------------------------------------------------------------------------------


def find_teacher(recipe: CifarArguments, config: DistillationConfig) -> None:
    """Set ``config.teacher_checkpoint`` where the row's teacher is an architecture whose weights are a file.

    Raises:
        ValueError: if there is no teacher, or no weights for it.
    """
    if not (config.uses_teacher or config.teacher_metrics):
        return
    if not recipe.teacher:
        raise ValueError("This run needs a teacher, and its row names none: give --teacher.")
    is_network = recipe.teacher.startswith("cifar_") and not Path(recipe.teacher).exists()
    if config.teacher_checkpoint is None and is_network:
        config.teacher_checkpoint = str(_published(recipe, config))
    elif recipe.teacher_sha256 and config.teacher_checkpoint:
        check_sha256(Path(config.teacher_checkpoint).expanduser(), recipe.teacher_sha256)


def _published(recipe: CifarArguments, config: DistillationConfig) -> Path:
    name = PUBLISHED.get(recipe.teacher)
    how = "give its weights as --teacher_checkpoint FILE, or the folder of a network you trained as --teacher"
    if name is None:
        raise ValueError(f"The teacher {recipe.teacher} has no published weights: {how}.")
    url = f"{recipe.teacher_url.rstrip('/')}/{name}/{CHECKPOINT}"
    if not recipe.fetch_teacher:
        raise ValueError(f"The teacher {recipe.teacher} needs weights: --fetch_teacher fetches {url}; or {how}.")
    path = Path(recipe.teacher_cache).expanduser() / name / CHECKPOINT
    # On one machine the first process fetches it; the others find it.
    with config.main_process_first(desc="fetching the teacher"):
        fetched = fetch(url, path, recipe.teacher_sha256)
    if get_int_from_env(["LOCAL_RANK"], 0) == 0:
        plain = ", over plain http" if url.startswith("http:") else ""
        origin = f"fetched from {url}{plain}" if fetched else "fetched before"
        asked = "as asked for" if recipe.teacher_sha256 else "not compared with any: --teacher_sha256 would"
        print(f"Teacher: {path}, {origin}; SHA-256 {sha256_of(path)}, {asked}.", flush=True)
    return path


# ---- Building ------------------------------------------------------------------------------------------------------


def build_data(recipe: CifarArguments, config: DistillationConfig) -> tuple[CifarDataset, CifarDataset]:
    """The training split with the protocol's augmentation, and the test split without."""
    columns = {"image_column": recipe.image_column, "label_column": recipe.label_column}
    # On one machine the first process fetches and converts; the others find it done.
    with config.main_process_first(desc="loading the data"):
        images = load_cifar(recipe.data, split="train", **columns)
        train = CifarDataset(images, augment=True, seed=recipe.seed_of_views(config))
        test = CifarDataset(load_cifar(recipe.data, split="test", **columns))
    check_classes(train, test, ["the training split", "the test split"])
    return train, test


def build_trainer(recipe: CifarArguments, config: DistillationConfig) -> DistillationTrainer:
    # First: it is soon done, and what is missing is soon told.
    find_teacher(recipe, config)
    return build_pair(recipe, config, *build_data(recipe, config), IMAGES)


RECIPE = Recipe(
    description=__doc__,
    arguments=CifarArguments,
    protocol=PROTOCOL,
    defaults=DEFAULTS,
    settings=(),
    full_data={"classes": 100, "train_samples": 50_000, "validation_samples": 10_000},
    build=build_trainer,
    # The published teachers have no one place.
    places=("teacher_checkpoint",),
)


def main(argv: Sequence[str] | None = None) -> None:
    run_recipe(RECIPE, argv)


if __name__ == "__main__":
    main()
