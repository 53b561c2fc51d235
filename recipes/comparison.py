"""Many methods on one small task, compared fairly: one teacher, the same students, steps and number of trials."""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import itertools
import json
import os
import random
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import yaml
from common import did_you_mean, mistakes_end_the_run
from torch.utils.data import Dataset
from transformers import PrinterCallback, TrainerCallback
from transformers.utils import logging

import hf_kd.models.cifar  # noqa: F401  its networks can be named
from hf_kd import DistillationConfig, DistillationTrainer, Teacher, create_student
from hf_kd.analysis import save_logits
from hf_kd.files import write_text
from hf_kd.metrics import per_sample_statistics, summarise
from hf_kd.networks import logits_of
from hf_kd.text import one_line


SECTIONS = ("data", "teacher", "student", "training", "seeds", "methods")
RESULT = "result.json"


@dataclass
class Data:
    """The images as each party sees them. Each gives whole batches (`__getitems__`), "index" among their entries."""

    for_teacher: Dataset
    for_student: Dataset
    # What students without a teacher train on.
    for_labels_alone: Dataset
    validation: Dataset
    test: Dataset
    # How the images are prepared and their classes named: arguments of create_student.
    images: dict[str, Any]
    # Whether a student sees an image in the same view each time, so that the teacher can be asked once.
    fixed_views: bool
    # For the card, the table and the last line.
    name: str
    description: str


class StoredLogits:
    """A teacher that has been asked everything already: its logits by the index of the sample.

    Exact for students that see each image in one fixed view; under augmentation an index is not enough.
    """

    def __init__(self, logits: torch.Tensor) -> None:
        self.logits = logits

    def __call__(self, index: torch.Tensor, **inputs: Any) -> torch.Tensor:
        return self.logits.to(index.device)[index]


class EpochLines(TrainerCallback):
    """One line of progress an epoch, for the teacher."""

    def on_evaluate(self, args, state, control, metrics=None, **kwargs) -> None:
        epoch, top1 = round(state.epoch or 0), 100 * metrics["eval_top1"]
        print(f"  teacher, epoch {epoch:2d}/{round(args.num_train_epochs)}: validation top-1 {top1:.1f} %", flush=True)


# ---- Building ------------------------------------------------------------------------------------------------------


def build_network(description: dict[str, Any], seed: int, data: Data) -> torch.nn.Module:
    torch.manual_seed(seed)
    return create_student(description["name"], **data.images, **description.get("kwargs", {}))


def arguments(folder: Path, fields: dict[str, Any], seed: int) -> DistillationConfig:
    fields = {"eval_strategy": "steps" if "eval_steps" in fields else "epoch", "logging_strategy": "no", **fields}
    return DistillationConfig(
        str(folder),
        seed=seed,
        per_device_eval_batch_size=500,
        save_strategy="no",
        disable_tqdm=True,
        log_level="error",
        teacher_preflight=False,
        **fields,
    )


@torch.no_grad()
def outputs_on(network: torch.nn.Module, dataset: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits (N, K) on a whole data set, on the CPU, and its labels (N,)."""
    network.eval()
    device = next(network.parameters()).device
    logits, labels = [], []
    for rows in torch.arange(len(dataset)).split(500):
        batch = dataset.__getitems__(rows)
        logits.append(logits_of(network(batch["pixel_values"].to(device))).cpu())
        labels.append(batch["labels"])
    return torch.cat(logits), torch.cat(labels)


class TrainedTeacher:
    """The teacher of all students, and what it says of the images, asked once."""

    def __init__(self, network: torch.nn.Module, name: str, data: Data) -> None:
        self.network, self.name, self._data = network, name, data
        self.top1 = summarise(per_sample_statistics(*outputs_on(network, data.validation)))["top1"]
        self._stored = StoredLogits(outputs_on(network, data.for_student)[0]) if data.fixed_views else None

    @cached_property
    def on_test(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Its logits on the test images, and their labels; a search does not ask."""
        return outputs_on(self.network, self._data.test)

    def of(self, fields: dict[str, Any]) -> Teacher:
        """What a method's trainer gets: a loss on features needs the network itself."""
        stored = None if fields.get("feature_loss") else self._stored
        return Teacher(self.network if stored is None else stored, name=self.name)


def get_teacher(settings: dict[str, Any], data: Data, folder: Path) -> TrainedTeacher:
    """The teacher of these settings: from the folder if it is there, trained and put there otherwise."""
    key = fingerprint({"teacher": settings["teacher"], "data": settings["data"]})
    folder = folder / f"teacher-{key}"
    if not (folder / "config.json").is_file():
        print("Training the teacher on all labels ...", flush=True)
        trainer = DistillationTrainer(
            build_network(settings["teacher"], seed=0, data=data),
            args=arguments(folder, {"loss": "ce", **settings["teacher"]["training"]}, seed=0),
            train_dataset=data.for_teacher,
            eval_dataset=data.validation,
            callbacks=[EpochLines()],
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
        trainer.save_model()
    return TrainedTeacher(Teacher.from_pretrained(folder).model, settings["teacher"]["name"], data)


# ---- One student ---------------------------------------------------------------------------------------------------


def train_student(
    settings: dict[str, Any], fields: dict[str, Any], seed: int, data: Data, teacher: TrainedTeacher, folder: Path
) -> tuple[DistillationTrainer, float]:
    """One student, and the seconds its training took. The same seed gives every method the same initial weights."""
    config = arguments(folder, {**settings["training"], **fields}, seed)
    trainer = DistillationTrainer(
        build_network(settings["student"], seed, data),
        teacher.of(fields) if config.uses_teacher else None,
        config,
        train_dataset=data.for_student if config.uses_teacher else data.for_labels_alone,
        eval_dataset=data.validation,
    )
    trainer.remove_callback(PrinterCallback)
    trainer.teacher_top1 = teacher.top1 if config.uses_teacher else None
    start = time.perf_counter()
    trainer.train()
    return trainer, time.perf_counter() - start


def keep(trainer: DistillationTrainer, logits: torch.Tensor, data: Data, teacher: TrainedTeacher) -> None:
    """Leave a finished student in its folder, with what figures are drawn from."""
    trainer.save_model()
    trainer.save_state()
    of_teacher, labels = teacher.on_test
    names = data.images["label_names"]
    save_logits(trainer.args.output_dir, logits, labels, of_teacher, gamma=trainer.args.gamma, class_names=names)


def measure(
    trainer: DistillationTrainer, logits: torch.Tensor, seconds: float, teacher: TrainedTeacher
) -> dict[str, Any]:
    """Everything that is reported of one finished student, whose logits on the test images these are."""
    of_teacher, labels = teacher.on_test
    curve = [
        {key.removeprefix("eval_"): entry[key] for key in ("step", "eval_top1", "eval_nll", "eval_entropy")}
        for entry in trainer.state.log_history
        if "eval_top1" in entry
    ]
    return {
        "test": summarise(per_sample_statistics(logits, labels, of_teacher)),
        "curve": curve,
        "beta": trainer.beta,
        "seconds": seconds,
    }


# ---- All of them ---------------------------------------------------------------------------------------------------


def compare(settings: dict[str, Any], data: Data, teacher: TrainedTeacher, folder: Path) -> dict[str, Any]:
    """Train every method with every seed, or take what an earlier launch has finished: all that is reported."""
    common = {key: settings[key] for key in ("data", "teacher", "student", "training")}
    jobs = list(itertools.product(settings["methods"], settings["seeds"]))
    results: dict[str, list[dict[str, Any]]] = {name: [] for name in settings["methods"]}
    for number, (name, seed) in enumerate(jobs, start=1):
        fields = settings["methods"][name]
        run = folder / "runs" / f"{name}-seed{seed}-{fingerprint([common, fields])}"
        finished = run / RESULT
        if finished.is_file():
            result, note = json.loads(finished.read_text(encoding="utf-8")), "from an earlier launch"
        else:
            trainer, seconds = train_student(settings, fields, seed, data, teacher, run)
            logits, _ = outputs_on(trainer.model, data.test)
            keep(trainer, logits, data, teacher)
            result, note = measure(trainer, logits, seconds, teacher), f"{seconds:.1f} s"
            # Whole or not at all: its presence is what says that the run is done.
            write_text(finished, json.dumps(result) + "\n")
        results[name].append({"seed": seed, "folder": str(run.relative_to(folder)), **result})
        last = result["curve"][-1]
        print(
            f"[{number:2d}/{len(jobs)}] {name:<14} seed {seed}: validation top-1 {100 * last['top1']:.1f} %  ({note})",
            flush=True,
        )
    of_teacher = summarise(per_sample_statistics(*teacher.on_test))
    return {"settings": settings, "teacher": {**of_teacher, "name": teacher.name}, "runs": results}


def search(settings: dict[str, Any], data: Data, teacher: TrainedTeacher, folder: Path) -> None:
    """An equal number of trials for every searched method; validation decides, the test images are not looked at."""
    plan = settings["search"]
    path = folder / "search.jsonl"
    key = fingerprint({name: settings[name] for name in ("data", "teacher", "student", "training")} | {
        name: plan[name] for name in ("trials", "seeds")
    })  # fmt: skip
    lines = [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []
    done = {(line["method"], json.dumps(line["fields"])): line for line in lines if line["key"] == key}
    for name, method in plan["methods"].items():
        if name not in settings["methods"]:
            continue
        fixed = {field: value for field, value in method.items() if field != "grid"}
        grid = method["grid"]
        full = [dict(zip(grid, values, strict=True)) for values in itertools.product(*grid.values())]
        ranking = []
        # Methods with the same grid get the same draws.
        trials = random.Random(plan["draw_seed"]).sample(full, min(plan["trials"], len(full)))
        for number, trial in enumerate(trials, start=1):
            fields = {**fixed, **trial}
            line = done.get((name, json.dumps(fields)))
            if line is None:
                finals = []
                for seed in plan["seeds"]:
                    trainer, _ = train_student(settings, fields, seed, data, teacher, folder / "search")
                    finals.append([entry for entry in trainer.state.log_history if "eval_top1" in entry][-1])
                line = {
                    "key": key,
                    "method": name,
                    "fields": fields,
                    "top1": statistics.mean(final["eval_top1"] for final in finals),
                    "nll": statistics.mean(final["eval_nll"] for final in finals),
                }
                with path.open("a") as file:
                    file.write(json.dumps(line) + "\n")
            ranking.append((line, trial))
            print(f"{name:<14} {number:2d}: {100 * line['top1']:.2f} %  nll {line['nll']:.3f}  {trial}", flush=True)
        # Between equals the likelihood decides.
        best, trial = max(ranking, key=lambda pair: (pair[0]["top1"], -pair[0]["nll"]))
        print(f"{name:<14} best: {100 * best['top1']:.2f} %  {trial}\n", flush=True)


def fingerprint(value: Any) -> str:
    """A short name for settings, to tell whether a stored result belongs to them."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:10]


# ---- The command ---------------------------------------------------------------------------------------------------


def make_parser(description: str | None, default_config: Path, output_dir: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=default_config, help="YAML with data, networks and methods.")
    parser.add_argument("--output_dir", type=Path, default=Path(output_dir), help="Where everything lands.")
    parser.add_argument("--seeds", type=int, nargs="+", help="Seeds of the comparison, in place of the YAML's.")
    parser.add_argument("--methods", nargs="+", help="Only these of the YAML's methods.")
    parser.add_argument("--search", action="store_true", help="Search the settings on the validation images instead.")
    return parser


def read_settings(parser: argparse.ArgumentParser, args: argparse.Namespace) -> dict[str, Any]:
    """The YAML file with what the command line says in its place."""
    path = args.config
    if not path.is_file():
        parser.error(f"--config {path} does not exist.")
    try:
        settings = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        parser.error(f"--config {path} is not a YAML file: {one_line(error)}")
    sections = settings if isinstance(settings, dict) else {}
    if not all(isinstance(sections.get(name), dict) for name in ("training", "methods")):
        default = Path(parser.get_default("config")).name
        parser.error(f"--config {path} must have the sections {', '.join(SECTIONS)}; see {default}.")
    if args.seeds:
        settings["seeds"] = args.seeds
    if args.methods:
        unknown = sorted(set(args.methods) - set(settings["methods"]))
        if unknown:
            parser.error(f"--methods {', '.join(unknown)}: {path} has {', '.join(settings['methods'])}.")
        settings["methods"] = {name: settings["methods"][name] for name in args.methods}
    if args.search and "search" not in settings:
        parser.error(f"--search: {path} has no section search.")
    return settings


def check(settings: dict[str, Any], path: Path, folder: Path) -> None:
    """ValueError for sections and fields that the YAML file should not have, or lacks, and for values out of range."""
    missing = [name for name in SECTIONS if name not in settings]
    if missing:
        raise ValueError(f"{path} lacks {', '.join(missing)}: it must have {', '.join(SECTIONS)}.")
    fields = [field.name for field in dataclasses.fields(DistillationConfig) if field.init]
    places: dict[str, tuple[Mapping[str, Any], Sequence[str]]] = {
        "": (settings, (*SECTIONS, "search")),
        "training": (settings["training"], fields),
    }
    places |= {f"methods: {name}": (method, fields) for name, method in settings["methods"].items()}
    searched = settings.get("search", {}).get("methods", {})
    places |= {f"search: {name}": (method, [*fields, "grid"]) for name, method in searched.items()}
    places |= {f"search: {name}: grid": (method.get("grid", {}), fields) for name, method in searched.items()}
    for place, (given, allowed) in places.items():
        for key in given:
            if key not in allowed:
                where = f" under {place}" if place else ""
                raise ValueError(f"{path} has the unknown key {key!r}{where}{did_you_mean(str(key), allowed)}.")
    for method in settings["methods"].values():
        arguments(folder, {**settings["training"], **method}, seed=0)


def leave_extra_processes() -> None:
    """These students are too small to share: of several launched processes, and several GPUs, one does the work."""
    if int(os.environ.get("RANK", "0")) > 0:
        sys.exit(0)
    of_the_group = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    for name in (*of_the_group, "ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED"):
        os.environ.pop(name, None)
    os.environ.setdefault("CUDA_VISIBLE_DEVICES", "0")


@dataclass
class Comparison:
    """What a finished comparison has to report."""

    settings: dict[str, Any]
    data: Data
    teacher: TrainedTeacher
    results: dict[str, Any]
    folder: Path
    seconds: float


def run(
    settings: dict[str, Any], args: argparse.Namespace, build_data: Callable[[dict[str, Any]], Data]
) -> Comparison | None:
    """Search, or compare; what came out of a comparison."""
    leave_extra_processes()
    folder: Path = args.output_dir
    with mistakes_end_the_run():
        check(settings, args.config, folder)
        data = build_data(settings)
        folder.mkdir(parents=True, exist_ok=True)
    # One line a run says what matters; the trainers' own tables would bury it.
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    start = time.perf_counter()
    teacher = get_teacher(settings, data, folder)
    if args.search:
        search(settings, data, teacher, folder)
        return None
    results = compare(settings, data, teacher, folder)
    return Comparison(settings, data, teacher, results, folder, time.perf_counter() - start)


def stopping_is_no_error(main: Callable[[], None]) -> None:
    """Run a script's main; Ctrl-C ends it with a sentence and status 130."""
    try:
        main()
    except KeyboardInterrupt:
        print("\nStopped. What is finished is kept: the same command goes on from there.", file=sys.stderr)
        sys.exit(130)
