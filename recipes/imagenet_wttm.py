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

import argparse
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from common import (
    RecipeParser,
    default_workers,
    find_checkpoint,
    folder_name,
    interruption_says_how_to_go_on,
    leave_process_group,
    merge,
    mistakes_end_the_run,
    share_batch,
)
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from transformers import set_seed

from hf_kd import DistillationConfig, DistillationTrainer, create_student
from hf_kd.data import eval_transform, load_image_dataset, train_transform
from hf_kd.launch import check_launch, launched_processes
from hf_kd.text import some


CONFIGS = Path(__file__).parent / "configs" / "imagenet"
DEFAULT_CONFIG = CONFIGS / "resnet34_resnet18.yaml"

# Where ImageNet is looked for if no data are named, below the working directory.
USUAL_PLACES = ("imagenet", "data/imagenet")

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
# What else changes what is learnt: a result is the row's only if none of these was changed.
_SETTINGS = (
    *PROTOCOL,
    *("teacher", "student", "student_kwargs", "img_size", "loss", "gamma", "temperature", "beta", "ce_weight"),
    *("loss_kwargs", "balance_lambda", "max_steps", "nesterov", "lr_scheduler_type", "warmup_steps", "optim_args"),
    *("label_smoothing_factor", "mixup_alpha", "cutmix_alpha", "teacher_checkpoint", "teacher_class_map"),
    *("teacher_input_size", "load_best_model_at_end"),
)
_IMAGENET = {"classes": 1000, "train_samples": 1_281_167, "validation_samples": 50_000}

# How the run goes, rather than what it computes.
RUNNING = {
    "eval_strategy": "epoch",
    "save_strategy": "epoch",
    "save_total_limit": 2,
    "logging_steps": 100,
    "per_device_eval_batch_size": 256,
    "dataloader_persistent_workers": True,
    "dataloader_prefetch_factor": 4,
}


@dataclass
class RecipeArguments:
    """What this recipe needs beyond DistillationConfig."""

    config: str = field(
        default=str(DEFAULT_CONFIG), metadata={"help": "YAML file with any of these fields; one for each paper row."}
    )
    teacher: str = field(
        default="resnet34.tv_in1k",
        metadata={"help": "timm name, hf-hub:owner/name, local folder or weights file; see also teacher_checkpoint."},
    )
    student: str = field(default="resnet18", metadata={"help": "timm name; trained from scratch."})
    student_kwargs: dict | str | None = field(
        default=None, metadata={"help": "Further arguments for timm.create_model, as JSON."}
    )
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
    img_size: int = field(
        default=224, metadata={"help": "Side of the training crop; evaluation resizes to 256/224 of it, then crops."}
    )
    total_batch_size: int = field(
        default=256,
        metadata={
            "help": "Samples of one optimiser step, over all processes and accumulated batches. "
            "per_device_train_batch_size and gradient_accumulation_steps follow from it; give one to set the other."
        },
    )
    paper_top1: float | None = field(
        default=None, metadata={"help": "The paper's top-1 for this row in %%, quoted in results.json as the paper's."}
    )

    def __post_init__(self) -> None:
        if isinstance(self.student_kwargs, str):
            try:
                self.student_kwargs = json.loads(self.student_kwargs)
            except ValueError:
                raise ValueError(f"`student_kwargs` must be a JSON object, got {self.student_kwargs!r}.") from None
        if self.student_kwargs is not None and not isinstance(self.student_kwargs, dict):
            raise ValueError(f"`student_kwargs` must be a JSON object, got {self.student_kwargs!r}.")
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


@dataclass
class Run:
    """The arguments of a run, and which of the row's settings were changed on the command line."""

    recipe: RecipeArguments
    config: DistillationConfig
    checkpoint: str | None
    changed: list[str]


# ---- Arguments -----------------------------------------------------------------------------------------------------


def make_parser() -> RecipeParser:
    defaults = {**PROTOCOL, **RUNNING, "dataloader_num_workers": default_workers()}
    return RecipeParser(
        [RecipeArguments, DistillationConfig],
        defaults,
        usage="%(prog)s [--config FILE] [--FIELD VALUE ...]",
        description=__doc__,
        formatter_class=_HelpFormatter,
    )


class _HelpFormatter(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
    """The text above as it is, and each option with its default."""


def parse(argv: Sequence[str] | None = None) -> Run:
    """Read the command line and the YAML file. ValueError for mistakes, before any data or network is looked at."""
    parser = make_parser()
    given = parser.read_command_line(argv)
    row = parser.read_yaml(Path(given.get("config", DEFAULT_CONFIG)))
    values = merge(parser.own_defaults, row, given)
    recipe = parser.build(RecipeArguments, values)

    processes = launched_processes()
    recipe.total_batch_size, per_device, accumulation = share_batch(
        recipe.total_batch_size,
        processes,
        values.get("per_device_train_batch_size"),
        values.get("gradient_accumulation_steps"),
        total_given="total_batch_size" in values,
    )
    values.update(per_device_train_batch_size=per_device, gradient_accumulation_steps=accumulation)
    values["output_dir"] = (
        values.get("output_dir") or f"outputs/imagenet_{folder_name(recipe.teacher, recipe.student)}"
    )
    if values.get("dataloader_num_workers") == 0:
        # Without workers there is nothing to keep or to fetch ahead; torch refuses both.
        values.update(dataloader_persistent_workers=False, dataloader_prefetch_factor=None)
    checkpoint = find_checkpoint(values["output_dir"], values.get("resume_from_checkpoint"))
    config = parser.build(DistillationConfig, values)
    # Before data and networks are looked at; the trainer would find out after.
    check_launch(config)

    of_row = merge(parser.own_defaults, row)
    changed = [
        name
        for name in _SETTINGS
        if name in given and not _equal(given[name], of_row.get(name, parser.get_default(name)))
    ]
    if recipe.total_batch_size != row.get("total_batch_size", 256):
        changed.append("total_batch_size")
    return Run(recipe, config, checkpoint, changed)


def _equal(one: Any, other: Any) -> bool:
    try:
        return float(one) == float(other)
    except (TypeError, ValueError):
        return one == other


# ---- Data ----------------------------------------------------------------------------------------------------------


def build_data(recipe: RecipeArguments, config: DistillationConfig) -> tuple[Any, Any]:
    """Training and validation data with the protocol's transforms, and the same classes in both."""
    transforms = {
        "train": train_transform(recipe.img_size, interpolation="bilinear"),
        "validation": eval_transform(recipe.img_size, interpolation="bilinear"),
    }
    # On one machine the first process fetches and converts; the others find it done.
    with config.main_process_first(desc="loading the data"):
        if recipe.dataset_name:
            options: dict[str, Any] = {
                "config_name": recipe.dataset_config,
                "image_column": recipe.image_column,
                "label_column": recipe.label_column,
                "streaming": recipe.streaming,
                "seed": config.seed,
            }
            train = load_image_dataset(
                dataset_name=recipe.dataset_name,
                transform=transforms["train"],
                split=recipe.train_split,
                shuffle_buffer=recipe.shuffle_buffer if recipe.streaming else 0,
                num_classes=recipe.num_classes,
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
            train = load_image_dataset(recipe.train_dir, transform=transforms["train"], seed=config.seed)
            validation = load_image_dataset(recipe.val_dir, transform=transforms["validation"], seed=config.seed)
            places = [str(recipe.train_dir), str(recipe.val_dir)]
    _check_classes(train, validation, places, recipe.num_classes)
    if recipe.streaming:
        train.num_examples = recipe.train_samples or train.num_examples
        if train.num_examples is None:
            raise ValueError(
                f"The stream {recipe.dataset_name} does not say how many samples it has, by which epochs are counted: "
                "give --train_samples."
            )
    return train, validation


def _check_classes(train: Any, validation: Any, places: Sequence[str], num_classes: int | None) -> None:
    names, others = train.class_names, validation.class_names
    if names is not None and others is not None and list(names) != list(others):
        only = [
            f"only {place} has {some(map(repr, sorted(set(one) - set(two))), 5)}"
            for place, one, two in ((places[0], names, others), (places[1], others, names))
            if set(one) - set(two)
        ]
        raise ValueError(
            f"The classes of {places[0]} and {places[1]} differ: {'; '.join(only) or 'their order'}. Training and "
            "validation need the same classes."
        )
    found = len(names) if names is not None else train.num_classes
    if found is None:
        raise ValueError("The data set does not say how many classes it has: give --num_classes.")
    if num_classes is not None and num_classes != found:
        raise ValueError(f"The training data have {found} classes, not the {num_classes} of --num_classes.")


# ---- Building ------------------------------------------------------------------------------------------------------


def build_trainer(recipe: RecipeArguments, config: DistillationConfig) -> DistillationTrainer:
    train, validation = build_data(recipe, config)
    # Before the student draws its initial weights; Trainer would do it after.
    set_seed(config.seed)
    settings = {
        "num_classes": train.num_classes,
        "label_names": train.class_names,
        "img_size": recipe.img_size,
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
        "interpolation": "bilinear",
        "crop_pct": 224 / 256,
    }
    further = recipe.student_kwargs or {}
    for name in further:
        if name in (*settings, "name", "in_chans"):
            raise ValueError(f"`student_kwargs` cannot set {name!r}, which the recipe sets itself.")
    try:
        student = create_student(recipe.student, **settings, **further)
    except TypeError as error:
        raise ValueError(f"`student_kwargs` {further} do not fit {recipe.student}: {error}") from error
    with_teacher = config.uses_teacher or config.teacher_metrics
    return DistillationTrainer(
        student,
        recipe.teacher if with_teacher else None,
        config,
        train_dataset=train,
        eval_dataset=validation,
    )


def say_what_will_run(run: Run, trainer: DistillationTrainer) -> None:
    recipe, config = run.recipe, run.config
    source = recipe.dataset_name or f"{recipe.train_dir} and {recipe.val_dir}"
    print(
        f"{recipe.teacher} → {recipe.student} by {config.loss} on {source}: {_length(trainer.train_dataset)} training "
        f"images, {trainer.train_dataset.num_classes} classes; batch {recipe.total_batch_size} "
        f"({config.world_size} × {config.per_device_train_batch_size} × {config.gradient_accumulation_steps}: "
        f"processes, per device, accumulated); loader workers per process: {config.dataloader_num_workers}; into "
        f"{config.output_dir}",
        flush=True,
    )
    late = [f"{epoch:g}" for epoch in config.lr_milestones or [] if epoch >= config.num_train_epochs]
    if late and config.max_steps <= 0:
        print(
            f"Note: the run ends after {config.num_train_epochs:g} epochs, before the learning rate falls at "
            f"{', '.join(late)}; --lr_milestones sets other epochs.",
            flush=True,
        )
    if config.resume_from_checkpoint:
        where = run.checkpoint or f"the beginning: {config.output_dir} holds no checkpoint yet"
        print(f"Going on from {where}.", flush=True)


# ---- Results -------------------------------------------------------------------------------------------------------


def final_metrics(trainer: DistillationTrainer) -> dict[str, float]:
    """Metrics of the weights that are saved: the last epoch's if it was evaluated, and measured now otherwise."""
    log = trainer.state.log_history
    last = next((entry for entry in reversed(log) if "eval_top1" in entry), None)
    if last is None or last["step"] != trainer.state.global_step or trainer.args.load_best_model_at_end:
        last = trainer.evaluate()
    names = ("top1", "top5", "nll", "ece", "entropy", "teacher_agreement", "teacher_divergence")
    return {name: last[f"eval_{name}"] for name in names if f"eval_{name}" in last}


def collect_results(run: Run, trainer: DistillationTrainer, seconds: float) -> dict[str, Any]:
    """What results.json holds. Top-1 and the like are fractions; what is the paper's stands under "paper" alone."""
    recipe, config = run.recipe, run.config
    provenance = trainer.provenance()
    data = {
        "source": recipe.dataset_name or [recipe.train_dir, recipe.val_dir],
        "classes": trainer.train_dataset.num_classes,
        "train_samples": _length(trainer.train_dataset),
        "validation_samples": _length(trainer.eval_dataset),
    }
    results = {
        "teacher": provenance["teacher"],
        "student": {**provenance["student"], **final_metrics(trainer)},
        "objective": {key: provenance[key] for key in ("loss", "gamma", "temperature", "beta", "ce_weight")},
        "data": data,
        "training": {
            **{name: getattr(config, name) for name in PROTOCOL},
            "optim": str(config.optim.value),
            "total_batch_size": recipe.total_batch_size,
            "per_device_train_batch_size": config.per_device_train_batch_size,
            "gradient_accumulation_steps": config.gradient_accumulation_steps,
            "processes": config.world_size,
            "mixed_precision": config.mixed_precision,
            "img_size": recipe.img_size,
            "max_steps": config.max_steps,
            "seed": config.seed,
            "epochs_done": trainer.state.epoch,
            "steps_done": trainer.state.global_step,
            "seconds": round(seconds, 1),
        },
        "versions": provenance["versions"],
    }
    if recipe.paper_top1 is not None:
        differs = [*run.changed, *(["data"] if any(data[key] != size for key, size in _IMAGENET.items()) else [])]
        results["paper"] = {
            "note": "The paper's figure, not measured with this code.",
            "source": "arXiv 2402.11148",
            "row": Path(recipe.config).stem,
            "top1": round(recipe.paper_top1 / 100, 6),
            "this_run_differs_in": differs,
        }
    return results


def report(run: Run, trainer: DistillationTrainer, seconds: float) -> None:
    recipe = run.recipe
    results = collect_results(run, trainer, seconds)
    trainer.save_state()
    folder_of_images = Path(recipe.train_dir).resolve() if recipe.train_dir else None
    if folder_of_images is not None and folder_of_images.name.startswith("train"):
        folder_of_images = folder_of_images.parent
    card = {
        "dataset_tags": recipe.dataset_name,
        "dataset": folder_of_images.name if folder_of_images else None,
        "dataset_args": recipe.dataset_config,
    }
    if run.config.push_to_hub:
        trainer.push_to_hub(**card)
    else:
        trainer.save_model()
        trainer.create_model_card(**card)
    if not trainer.is_world_process_zero():
        return
    path = Path(run.config.output_dir) / "results.json"
    path.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    student, teacher, paper = results["student"], results["teacher"], results.get("paper")
    line = f"{recipe.student}: top-1 {100 * student['top1']:.2f} %, top-5 {100 * student['top5']:.2f} %"
    if teacher and teacher["top1"] is not None:
        line += f"; teacher {teacher['id']}: top-1 {100 * teacher['top1']:.2f} %"
    if paper:
        line += f"; the paper reports {recipe.paper_top1:.2f} % for {paper['row']}"
        line += f" (this run differs in {', '.join(differs)})" if (differs := paper["this_run_differs_in"]) else ""
    print(f"{line}. {path}", flush=True)


def _length(dataset: Any) -> int | None:
    try:
        return len(dataset)
    except TypeError:
        return None


def train_and_report(argv: Sequence[str] | None) -> None:
    with mistakes_end_the_run():
        run = parse(argv)
        trainer = build_trainer(run.recipe, run.config)
    if trainer.is_world_process_zero():
        say_what_will_run(run, trainer)
    start = time.perf_counter()
    with interruption_says_how_to_go_on(run.config.output_dir):
        trainer.train(resume_from_checkpoint=run.checkpoint)
    report(run, trainer, seconds=time.perf_counter() - start)
    trainer.accelerator.free_memory()


def main(argv: Sequence[str] | None = None) -> None:
    train_and_report(argv)
    leave_process_group()


if __name__ == "__main__":
    main()
