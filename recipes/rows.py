"""What the recipes of the paper's tables share: a row is a YAML file, which is read, trained and reported."""

from __future__ import annotations

import argparse
import json
import statistics
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from accelerate.utils import broadcast_object_list
from common import (
    RecipeParser,
    default_workers,
    find_checkpoint,
    interruption_says_how_to_go_on,
    leave_process_group,
    merge,
    mistakes_end_the_run,
    share_batch,
)
from fetch import sha256_of
from table import CONFIGS, RESULTS, SOURCE
from transformers import set_seed

from hf_kd import DistillationConfig, DistillationTrainer, create_student
from hf_kd.files import write_text
from hf_kd.launch import check_launch, launched_processes
from hf_kd.text import some


METRICS = ("top1", "top5", "nll", "ece", "entropy", "teacher_agreement", "teacher_divergence")

# What changes what is learnt, beside a recipe's protocol: a result is the row's only if none of it was changed.
_SETTINGS = (
    *("teacher", "student", "student_kwargs", "loss", "gamma", "temperature", "beta", "ce_weight", "loss_kwargs"),
    *("balance_lambda", "feature_loss", "feature_weight", "feature_loss_kwargs", "max_steps", "nesterov"),
    *("lr_scheduler_type", "warmup_steps", "optim_args", "label_smoothing_factor", "mixup_alpha", "cutmix_alpha"),
    *("teacher_checkpoint", "teacher_class_map", "teacher_input_size", "load_best_model_at_end"),
    *("ema_decay", "ema_warmup", "teacher_cache_views"),
)


@dataclass
class RowArguments(ABC):
    """What every recipe needs beyond DistillationConfig. A recipe adds where its data are."""

    config: str = field(default="", metadata={"help": "YAML file with any of these fields; one for each paper row."})
    teacher: str = field(
        default="",
        metadata={"help": "timm name, hf-hub:owner/name, local folder or weights file; see also teacher_checkpoint."},
    )
    student: str = field(default="", metadata={"help": "timm name; trained from scratch."})
    student_kwargs: dict | str | None = field(
        default=None, metadata={"help": "Further arguments for timm.create_model, as JSON."}
    )
    total_batch_size: int = field(
        default=256,
        metadata={
            "help": "Samples of one optimiser step, over all processes and accumulated batches. "
            "per_device_train_batch_size and gradient_accumulation_steps follow from it; give one to set the other."
        },
    )
    seeds: int = field(
        default=1,
        metadata={
            "help": "How many runs, with the seeds seed, seed + 1, ...: each lands in a folder of its own below "
            "output_dir, whose results.json then has mean and standard deviation."
        },
    )
    view_seed: int | None = field(
        default=None,
        metadata={
            "help": "Seed of the augmented views; by default seed, and with teacher_cache_dir the first seed of the "
            "launch: one cache then serves all of them."
        },
    )
    cache_teacher: bool = field(
        default=False, metadata={"help": "Compute what teacher_cache_dir lacks, on all processes, and train nothing."}
    )
    paper_top1: float | None = field(
        default=None, metadata={"help": "The paper's top-1 for this row in %%, quoted in results.json as the paper's."}
    )
    paper_top1_std: float | None = field(
        default=None, metadata={"help": "The paper's standard deviation of it over runs, in points, if printed."}
    )

    def __post_init__(self) -> None:
        if isinstance(self.student_kwargs, str):
            try:
                self.student_kwargs = json.loads(self.student_kwargs)
            except ValueError:
                raise ValueError(f"`student_kwargs` must be a JSON object, got {self.student_kwargs!r}.") from None
        if self.student_kwargs is not None and not isinstance(self.student_kwargs, dict):
            raise ValueError(f"`student_kwargs` must be a JSON object, got {self.student_kwargs!r}.")
        if self.seeds < 1:
            raise ValueError(f"`seeds` must be at least 1, got {self.seeds}.")

    def seed_of_views(self, config: DistillationConfig) -> int:
        """Of which, with the epoch and the index, a training image's view is a function."""
        return config.seed if self.view_seed is None else self.view_seed

    @property
    @abstractmethod
    def folder(self) -> str:
        """Where a run lands that is not told where to."""

    @property
    @abstractmethod
    def source(self) -> str | list[str]:
        """Where the images come from: a data set's name, or folders."""

    @property
    @abstractmethod
    def card(self) -> dict[str, Any]:
        """What the student's card says of the data: arguments of create_model_card."""


@dataclass(frozen=True)
class Recipe:
    """One script: the arguments it takes, and what all of its rows have in common.

    Args:
        description: for --help.
        arguments: the class of its arguments.
        protocol: fields of DistillationConfig with the values of all rows (a row may have its own).
        defaults: the row that runs when none is named, and how a run goes, rather than what it computes.
        settings: further arguments that change what is learnt.
        full_data: the numbers of "data" in results.json on the whole of the row's data set.
        build: from its arguments and configuration, makes the trainer of a run.
        places: settings that say where something lies and not what it is: another one makes no other row.
    """

    description: str
    arguments: type[RowArguments]
    protocol: Mapping[str, Any]
    defaults: Mapping[str, Any]
    settings: tuple[str, ...]
    full_data: Mapping[str, int]
    build: Callable[[Any, DistillationConfig], DistillationTrainer]
    places: tuple[str, ...] = ()

    @property
    def all_settings(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys((*self.protocol, *_SETTINGS, *self.settings)))

    def parser(self) -> RecipeParser:
        # The number of workers follows the machine, unless the recipe has its own.
        defaults = {**self.protocol, "dataloader_num_workers": default_workers(), **self.defaults}
        return RecipeParser(
            [self.arguments, DistillationConfig],
            defaults,
            usage="%(prog)s [--config FILE] [--FIELD VALUE ...]",
            description=self.description,
            formatter_class=_HelpFormatter,
        )


class _HelpFormatter(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
    """The text above as it is, and each option with its default."""


@dataclass
class Run:
    """The arguments of one run, and which of the row's settings were changed on the command line."""

    arguments: Any
    config: DistillationConfig
    checkpoint: str | None
    changed: list[str]
    settings: dict[str, Any]

    @property
    def row(self) -> str:
        return row_name(self.arguments.config)

    @property
    def finished(self) -> Path:
        return Path(self.config.output_dir) / RESULTS


# ---- Arguments -----------------------------------------------------------------------------------------------------


def row_name(config: str) -> str:
    """What the row of a YAML file is called: the file's name, below recipes/configs/ with its folders."""
    path = Path(config).resolve()
    inside = path.is_relative_to(CONFIGS.resolve())
    return (path.relative_to(CONFIGS.resolve()) if inside else Path(path.name)).with_suffix("").as_posix()


def parse(recipe: Recipe, argv: Sequence[str] | None = None) -> list[Run]:
    """A run for each seed, from the command line and the YAML file.

    Raises:
        ValueError: for mistakes, before any data or network is looked at.
    """
    parser = recipe.parser()
    given = parser.read_command_line(argv)
    row = parser.read_yaml(Path(given.get("config", parser.get_default("config"))))
    values = merge(parser.own_defaults, row, given)
    arguments = parser.build(recipe.arguments, values)

    arguments.total_batch_size, per_device, accumulation = share_batch(
        arguments.total_batch_size,
        launched_processes(),
        values.get("per_device_train_batch_size"),
        values.get("gradient_accumulation_steps"),
        total_given="total_batch_size" in values,
    )
    values.update(per_device_train_batch_size=per_device, gradient_accumulation_steps=accumulation)
    if values.get("dataloader_num_workers") == 0:
        # Without workers there is nothing to keep or to fetch ahead; torch refuses both.
        values.update(dataloader_persistent_workers=False, dataloader_prefetch_factor=None)
    folder = values.get("output_dir") or arguments.folder
    of_row = merge(parser.own_defaults, row)
    changed = [
        name
        for name in recipe.all_settings
        if name in given
        and name not in recipe.places
        and not _equal(given[name], of_row.get(name, parser.get_default(name)))
    ]
    if arguments.total_batch_size != row.get("total_batch_size", parser.get_default("total_batch_size")):
        changed.append("total_batch_size")

    first = values.get("seed", parser.get_default("seed"))
    if arguments.view_seed is None and values.get("teacher_cache_dir"):
        arguments.view_seed = first
    runs = []
    for seed in range(first, first + arguments.seeds):
        output_dir = folder if arguments.seeds == 1 else f"{folder}/seed{seed}"
        checkpoint = find_checkpoint(output_dir, values.get("resume_from_checkpoint"))
        config = parser.build(DistillationConfig, {**values, "seed": seed, "output_dir": output_dir})
        settings = {name: _setting(name, arguments, config) for name in (*recipe.all_settings, "total_batch_size")}
        runs.append(Run(arguments, config, checkpoint, changed, settings))
    # Before data and networks are looked at; the trainer would find out after.
    check_launch(runs[0].config)
    return runs


def _equal(one: Any, other: Any) -> bool:
    try:
        return float(one) == float(other)
    except (TypeError, ValueError):
        return one == other


def _setting(name: str, *sources: Any) -> Any:
    value = next(getattr(source, name) for source in sources if hasattr(source, name))
    return getattr(value, "value", value)


# ---- Building ------------------------------------------------------------------------------------------------------


def check_classes(train: Any, validation: Any, places: Sequence[str], num_classes: int | None = None) -> None:
    """Raises ValueError if two data sets have other classes, or others than the ``num_classes`` asked for."""
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


def build_pair(
    arguments: RowArguments, config: DistillationConfig, train: Any, validation: Any, settings: Mapping[str, Any]
) -> DistillationTrainer:
    """The trainer of the row's teacher and a new student.

    Args:
        train, validation: data sets with ``num_classes`` and ``class_names``.
        settings: of the student's images (img_size, mean, std, ...), for create_student.
    """
    # Before the student draws its initial weights; Trainer would do it after.
    set_seed(config.seed)
    settings = {"num_classes": train.num_classes, "label_names": train.class_names, **settings}
    further: dict[str, Any] = arguments.student_kwargs or {}  # type: ignore[assignment]
    for name in further:
        if name in (*settings, "name", "in_chans"):
            raise ValueError(f"`student_kwargs` cannot set {name!r}, which the recipe sets itself.")
    try:
        student = create_student(arguments.student, **settings, **further)
    except TypeError as error:
        raise ValueError(f"`student_kwargs` {further} do not fit {arguments.student}: {error}") from error
    with_teacher = config.uses_teacher or config.teacher_metrics
    return DistillationTrainer(
        student,
        arguments.teacher if with_teacher else None,
        config,
        train_dataset=train,
        eval_dataset=validation,
    )


# ---- Results -------------------------------------------------------------------------------------------------------


def final_metrics(trainer: DistillationTrainer) -> dict[str, float]:
    """Metrics of the weights that are saved: the last epoch's if it was evaluated, and measured now otherwise."""
    log = trainer.state.log_history
    last = next((entry for entry in reversed(log) if "eval_top1" in entry), None)
    if last is None or last["step"] != trainer.state.global_step or trainer.args.load_best_model_at_end:
        last = trainer.evaluate()
    return {name: last[f"eval_{name}"] for name in METRICS if f"eval_{name}" in last}


def collect_results(recipe: Recipe, run: Run, trainer: DistillationTrainer, seconds: float) -> dict[str, Any]:
    """What results.json holds. Top-1 and the like are fractions; what is the paper's stands under "paper" alone."""
    arguments, config = run.arguments, run.config
    provenance = trainer.provenance()
    teacher = provenance["teacher"]
    if teacher and config.teacher_checkpoint:
        teacher = {**teacher, "checkpoint_sha256": sha256_of(Path(config.teacher_checkpoint).expanduser())}
    data = {
        "source": arguments.source,
        "classes": trainer.train_dataset.num_classes,
        "train_samples": _length(trainer.train_dataset),
        "validation_samples": _length(trainer.eval_dataset),
    }
    differs = [*run.changed, *(["data"] if any(data[key] != size for key, size in recipe.full_data.items()) else [])]
    results = {
        "row": run.row,
        "this_run_differs_in": differs,
        "teacher": teacher,
        "student": {**provenance["student"], **final_metrics(trainer)},
        "objective": {
            key: provenance[key]
            for key in ("loss", "gamma", "temperature", "beta", "ce_weight", "feature_loss", "feature_weight")
        },
        "data": data,
        "settings": run.settings,
        "training": {
            "total_batch_size": arguments.total_batch_size,
            "per_device_train_batch_size": config.per_device_train_batch_size,
            "gradient_accumulation_steps": config.gradient_accumulation_steps,
            "processes": config.world_size,
            "mixed_precision": config.mixed_precision,
            "seed": config.seed,
            "epochs_done": trainer.state.epoch,
            "steps_done": trainer.state.global_step,
            "seconds": round(seconds, 1),
        },
        "versions": provenance["versions"],
    }
    if arguments.paper_top1 is not None:
        results["paper"] = {
            "note": "The paper's figure, not measured with this code.",
            "source": SOURCE,
            "top1": round(arguments.paper_top1 / 100, 6),
        }
        if arguments.paper_top1_std is not None:
            results["paper"]["top1_std"] = round(arguments.paper_top1_std / 100, 6)
    return results


def save(run: Run, trainer: DistillationTrainer, results: dict[str, Any]) -> None:
    """The student with its card, on the Hub too if that was asked for, and last results.json."""
    trainer.save_state()
    if run.config.push_to_hub:
        trainer.push_to_hub(**run.arguments.card)
    else:
        trainer.save_model()
        trainer.create_model_card(**run.arguments.card)
    if trainer.is_world_process_zero():
        write_text(run.finished, json.dumps(results, indent=2) + "\n")


def describe(run: Run, results: Mapping[str, Any]) -> str:
    """One line: what was reached, and beside it what the teacher and the paper reach."""
    student, teacher, paper = results["student"], results["teacher"], results.get("paper")
    line = f"{run.arguments.student}: top-1 {100 * student['top1']:.2f} %, top-5 {100 * student['top5']:.2f} %"
    if teacher and teacher["top1"] is not None:
        line += f"; teacher {teacher['id']}: top-1 {100 * teacher['top1']:.2f} %"
    return line + (_beside_the_paper(run, results) if paper else "")


def _beside_the_paper(run: Run, results: Mapping[str, Any]) -> str:
    differs = results["this_run_differs_in"]
    return f"; the paper reports {run.arguments.paper_top1:.2f} % for {run.row}" + (
        f" (this run differs in {', '.join(differs)})" if differs else ""
    )


def aggregate(results: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The results of several seeds as one: mean and standard deviation (of the sample, n - 1) of each metric."""
    first = results[0]
    metrics = {name: [result["student"][name] for result in results] for name in METRICS if name in first["student"]}
    return {
        "row": first["row"],
        "this_run_differs_in": first["this_run_differs_in"],
        "seeds": [result["training"]["seed"] for result in results],
        "mean": {name: statistics.mean(values) for name, values in metrics.items()},
        "std": {name: statistics.stdev(values) for name, values in metrics.items()},
        **({"paper": first["paper"]} if "paper" in first else {}),
        "runs": list(results),
    }


def describe_summary(run: Run, summary: Mapping[str, Any]) -> str:
    mean, std = 100 * summary["mean"]["top1"], 100 * summary["std"]["top1"]
    line = f"{run.arguments.student}: top-1 {mean:.2f} ± {std:.2f} % over {len(summary['seeds'])} seeds"
    return line + (_beside_the_paper(run, summary) if "paper" in summary else "")


def _finished_before(runs: Sequence[Run]) -> dict[int, dict[str, Any]]:
    """Results of the seeds that an earlier launch has finished, the same on all processes; ValueError if of others."""
    found: dict[int, dict[str, Any]] = {}
    for run in runs:
        if run.config.process_index == 0 and run.checkpoint and run.finished.is_file():
            found[run.config.seed] = json.loads(run.finished.read_text(encoding="utf-8"))
    # The first process wrote them; another machine need not see them.
    (found,) = broadcast_object_list([found])
    for run in runs:
        before = found.get(run.config.seed, {}).get("settings", run.settings)
        differs = [name for name in run.settings if before.get(name) != run.settings[name]]
        if differs:
            raise ValueError(
                f"{run.finished} is of a run with another {differs[0]} ({before.get(differs[0])!r}, now "
                f"{run.settings[differs[0]]!r}), and one mean cannot be taken over both: choose another --output_dir."
            )
    return found


def _length(dataset: Any) -> int | None:
    try:
        return len(dataset)
    except TypeError:
        return None


# ---- Running -------------------------------------------------------------------------------------------------------


def say_what_will_run(run: Run, trainer: DistillationTrainer) -> None:
    arguments, config = run.arguments, run.config
    source = arguments.source if isinstance(arguments.source, str) else " and ".join(arguments.source)
    losses = " and ".join(part for part in (config.loss if config.uses_logits else "ce", config.feature_loss) if part)
    print(
        f"{f'{arguments.teacher} → ' if config.uses_teacher else ''}{arguments.student} by {losses} on {source}: "
        f"{_length(trainer.train_dataset)} training "
        f"images, {trainer.train_dataset.num_classes} classes; batch {arguments.total_batch_size} "
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


def train_row(recipe: Recipe, argv: Sequence[str] | None = None) -> None:
    """Train the row that the arguments name, once for each seed, and write and print its results."""
    with mistakes_end_the_run():
        runs = parse(recipe, argv)
        done = _finished_before(runs) if len(runs) > 1 else {}
    results = []
    for run in runs:
        if run.config.seed in done:
            results.append(done[run.config.seed])
            continue
        with mistakes_end_the_run():
            trainer = recipe.build(run.arguments, run.config)
        if run.arguments.cache_teacher:
            with mistakes_end_the_run():
                rows = trainer.cache_teacher()
            if trainer.is_world_process_zero():
                print(f"{run.config.teacher_cache_dir}: {rows:,} rows of teacher logits computed.", flush=True)
            return
        if trainer.is_world_process_zero():
            say_what_will_run(run, trainer)
        start = time.perf_counter()
        with interruption_says_how_to_go_on(run.config.output_dir):
            trainer.train(resume_from_checkpoint=run.checkpoint)
        result = collect_results(recipe, run, trainer, seconds=time.perf_counter() - start)
        save(run, trainer, result)
        if trainer.is_world_process_zero():
            print(f"{describe(run, result)}. {run.finished}", flush=True)
        results.append(result)
        trainer.accelerator.free_memory()
        del trainer
    if len(runs) > 1 and runs[0].config.process_index == 0:
        folder = run.finished.parent.parent
        summary = aggregate(results)
        write_text(folder / RESULTS, json.dumps(summary, indent=2) + "\n")
        print(f"{describe_summary(runs[0], summary)}. {folder / RESULTS}", flush=True)


def run_recipe(recipe: Recipe, argv: Sequence[str] | None = None) -> None:
    """A recipe's main: train, report, and let go of the other processes."""
    train_row(recipe, argv)
    leave_process_group()
