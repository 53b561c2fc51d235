"""The quickstart: distil a small student of real handwritten digits with CE, KD, TTM and WTTM, and compare honestly.

    accelerate launch recipes/digits_wttm.py              # the comparison: about 3 minutes on 2 CPU cores
    accelerate launch recipes/digits_wttm.py --search     # how the settings in the YAML were found

Everything lands in --output_dir: results.json, table.md, curves.png, digits.png, and the WTTM student in student/,
which timm and transformers both open. Runs that are done are kept: a second launch goes on where the first stopped.
"""

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
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import digits_report as report
import torch
import yaml
from common import did_you_mean, mistakes_end_the_run
from torch.utils.data import Subset
from transformers import PrinterCallback
from transformers.utils import logging

from hf_kd import DistillationConfig, DistillationTrainer, Teacher, create_student
from hf_kd.data import DIGITS_CLASS_NAMES, DIGITS_MEAN, DIGITS_SIZE, DIGITS_STD, DigitsDataset, load_digits
from hf_kd.metrics import per_sample_statistics, summarise
from hf_kd.model_card import describe_training
from hf_kd.networks import logits_of
from hf_kd.text import one_line


DEFAULT_CONFIG = Path(__file__).parent / "configs" / "digits" / "wttm.yaml"
SECTIONS = ("data", "teacher", "student", "training", "seeds", "methods")


@dataclass
class Data:
    """The digits as each party sees them."""

    for_teacher: DigitsDataset
    for_student: DigitsDataset
    labelled: Subset
    validation: DigitsDataset
    test: DigitsDataset


class StoredLogits:
    """A teacher that has been asked everything already: its logits by the index of the sample.

    Exact here because students see each image in one fixed view; under augmentation an index would not be enough.
    """

    def __init__(self, teacher: Teacher, data: Data) -> None:
        self.name = teacher.name
        self.logits = all_logits(teacher, data.for_student)
        validation = per_sample_statistics(all_logits(teacher, data.validation), data.validation.true_labels)
        self.top1 = summarise(validation)["top1"]

    def __call__(self, index: torch.Tensor, **inputs: Any) -> torch.Tensor:
        return self.logits.to(index.device)[index]


def build_data(settings: dict[str, Any]) -> Data:
    data = settings["data"]
    splits = load_digits(data["split_seed"], data["sizes"])
    student = DigitsDataset(*splits.train, labelled=data["labelled_per_class"], seed=data["split_seed"])
    return Data(
        for_teacher=DigitsDataset(*splits.train, shift=settings["teacher"]["shift"]),
        for_student=student,
        labelled=Subset(student, torch.nonzero(student.labels >= 0).flatten().tolist()),
        validation=DigitsDataset(*splits.validation),
        test=DigitsDataset(*splits.test),
    )


def build_network(description: dict[str, Any], seed: int) -> torch.nn.Module:
    torch.manual_seed(seed)
    return create_student(
        description["name"],
        num_classes=len(DIGITS_CLASS_NAMES),
        label_names=DIGITS_CLASS_NAMES,
        img_size=DIGITS_SIZE,
        mean=DIGITS_MEAN,
        std=DIGITS_STD,
        interpolation="bilinear",
        crop_pct=1.0,
        **description["kwargs"],
    )


def arguments(folder: Path, fields: dict[str, Any], seed: int) -> DistillationConfig:
    return DistillationConfig(
        str(folder),
        seed=seed,
        per_device_eval_batch_size=500,
        eval_strategy="steps" if "eval_steps" in fields else "epoch",
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
        log_level="error",
        teacher_preflight=False,
        **fields,
    )


def get_teacher(settings: dict[str, Any], data: Data, folder: Path) -> Teacher:
    """The teacher of these settings: from the folder if it is there, trained and put there otherwise."""
    key = fingerprint({"teacher": settings["teacher"], "data": settings["data"]})
    folder = folder / f"teacher-{key}"
    if not (folder / "config.json").is_file():
        print("Training the teacher on all labels ...", flush=True)
        network = build_network(settings["teacher"], seed=0)
        trainer = DistillationTrainer(
            network,
            args=arguments(folder, {"loss": "ce", **settings["teacher"]["training"]}, seed=0),
            train_dataset=data.for_teacher,
            eval_dataset=data.validation,
            callbacks=[report.EpochLines()],
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
        trainer.save_model()
    network = Teacher.from_pretrained(folder).model
    return Teacher(network, name=settings["teacher"]["name"])


@torch.no_grad()
def all_logits(network: torch.nn.Module, dataset: DigitsDataset) -> torch.Tensor:
    """Logits on a whole data set, (N, 10), on the CPU, without augmentation."""
    device = next(network.parameters()).device
    batches = torch.arange(len(dataset)).split(500)
    outputs = [network(dataset.__getitems__(batch)["pixel_values"].to(device)) for batch in batches]
    return torch.cat([logits_of(output).cpu() for output in outputs])


def train_student(
    settings: dict[str, Any], fields: dict[str, Any], seed: int, data: Data, teacher: StoredLogits, folder: Path
) -> tuple[DistillationTrainer, float]:
    """One student, and the seconds its training took. The same seed gives every method the same initial weights."""
    labels_only = fields["loss"] == "ce"
    trainer = DistillationTrainer(
        build_network(settings["student"], seed),
        None if labels_only else Teacher(teacher, name=teacher.name),
        arguments(folder, {**settings["training"], **fields}, seed),
        train_dataset=data.labelled if labels_only else data.for_student,
        eval_dataset=data.validation,
    )
    trainer.remove_callback(PrinterCallback)
    trainer.teacher_top1 = None if labels_only else teacher.top1
    start = time.perf_counter()
    trainer.train()
    return trainer, time.perf_counter() - start


def measure(trainer: DistillationTrainer, seconds: float, data: Data, teacher_test: torch.Tensor) -> dict[str, Any]:
    """Everything that is reported of one finished student."""
    student = trainer.model.eval()
    rows = per_sample_statistics(all_logits(student, data.test), data.test.true_labels, teacher_test)
    curve = [
        {key.removeprefix("eval_"): entry[key] for key in ("step", "eval_top1", "eval_nll", "eval_entropy")}
        for entry in trainer.state.log_history
        if "eval_top1" in entry
    ]
    return {"test": summarise(rows), "curve": curve, "beta": trainer.beta, "seconds": seconds}


def compare(settings: dict[str, Any], data: Data, teacher: Teacher, folder: Path) -> dict[str, Any]:
    """Train every method with every seed, or take what an earlier launch has finished: all that is reported."""
    stored, test_logits = StoredLogits(teacher, data), all_logits(teacher, data.test)
    common = {key: settings[key] for key in ("data", "teacher", "student", "training")}
    jobs = list(itertools.product(settings["methods"], settings["seeds"]))
    results: dict[str, list[dict[str, Any]]] = {name: [] for name in settings["methods"]}
    for number, (name, seed) in enumerate(jobs, start=1):
        fields = settings["methods"][name]
        run = folder / "runs" / f"{name}-seed{seed}-{fingerprint([common, fields])}"
        finished = run / "result.json"
        if finished.is_file():
            result, note = json.loads(finished.read_text(encoding="utf-8")), "from an earlier launch"
        else:
            trainer, seconds = train_student(settings, fields, seed, data, stored, run)
            trainer.save_model()
            result, note = measure(trainer, seconds, data, test_logits), f"{seconds:.1f} s"
            # Whole or not at all: its presence is what says that the run is done.
            unfinished = finished.with_suffix(".part")
            unfinished.write_text(json.dumps(result) + "\n", encoding="utf-8")
            unfinished.replace(finished)
        results[name].append({"seed": seed, "folder": str(run.relative_to(folder)), **result})
        last = result["curve"][-1]
        print(
            f"[{number:2d}/{len(jobs)}] {name:<14} seed {seed}: validation top-1 {100 * last['top1']:.1f} %  ({note})",
            flush=True,
        )
    labels = data.test.true_labels
    return {
        "settings": settings,
        "teacher": {**summarise(per_sample_statistics(test_logits, labels)), "name": settings["teacher"]["name"]},
        "runs": results,
    }


def search(settings: dict[str, Any], data: Data, teacher: Teacher, folder: Path) -> None:
    """An equal number of trials for every searched method; validation decides, the test images are not looked at."""
    plan = settings["search"]
    grid = plan["grid"]
    draw = random.Random(plan["draw_seed"])
    full = [dict(zip(grid, values, strict=True)) for values in itertools.product(*grid.values())]
    distilled = draw.sample(full, min(plan["trials"], len(full)))
    own = [dict(zip(("learning_rate", "weight_decay"), values, strict=True))
           for values in itertools.product(grid["learning_rate"], grid["weight_decay"])]  # fmt: skip
    labels_only = draw.sample(own, min(plan["trials"], len(own)))
    stored = StoredLogits(teacher, data)
    path = folder / "search.jsonl"
    key = fingerprint({name: settings[name] for name in ("data", "teacher", "student", "training", "search")})
    lines = [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []
    done = {(line["method"], json.dumps(line["trial"])): line for line in lines if line["key"] == key}
    for loss in ("ce", "kd", "ttm", "wttm"):
        ranking = []
        for number, trial in enumerate(labels_only if loss == "ce" else distilled, start=1):
            line = done.get((loss, json.dumps(trial)))
            if line is None:
                fields = {"loss": loss, **trial} if loss == "ce" else {"loss": loss, "beta": "auto", **trial}
                finals = []
                for seed in plan["seeds"]:
                    trainer, _ = train_student(settings, fields, seed, data, stored, folder / "search")
                    finals.append([entry for entry in trainer.state.log_history if "eval_top1" in entry][-1])
                line = {
                    "key": key,
                    "method": loss,
                    "trial": trial,
                    "top1": statistics.mean(final["eval_top1"] for final in finals),
                    "nll": statistics.mean(final["eval_nll"] for final in finals),
                }
                with path.open("a") as file:
                    file.write(json.dumps(line) + "\n")
            ranking.append(line)
            print(f"{loss:<5} {number:2d}: {100 * line['top1']:.2f} %  nll {line['nll']:.3f}  {trial}", flush=True)
        # Between equals the likelihood decides.
        best = max(ranking, key=lambda line: (line["top1"], -line["nll"]))
        print(f"{loss:<5} best: {100 * best['top1']:.2f} %  {best['trial']}\n", flush=True)


def fingerprint(value: Any) -> str:
    """A short name for settings, to tell whether a stored result belongs to them."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:10]


def leave_extra_processes() -> None:
    """These students are too small to share: of several launched processes, and several GPUs, one does the work."""
    if int(os.environ.get("RANK", "0")) > 0:
        sys.exit(0)
    of_the_group = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    for name in (*of_the_group, "ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED"):
        os.environ.pop(name, None)
    os.environ.setdefault("CUDA_VISIBLE_DEVICES", "0")


def parse(argv: Sequence[str] | None) -> tuple[argparse.Namespace, dict[str, Any]]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=DEFAULT_CONFIG, help="YAML with data, networks and methods.")
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/digits"), help="Where everything lands.")
    parser.add_argument("--seeds", type=int, nargs="+", help="Seeds of the comparison, in place of the YAML's.")
    parser.add_argument("--methods", nargs="+", help="Only these of the YAML's methods.")
    parser.add_argument("--search", action="store_true", help="Search the settings on the validation images instead.")
    args = parser.parse_args(argv)
    if not args.config.is_file():
        parser.error(f"--config {args.config} does not exist.")
    try:
        settings = yaml.safe_load(args.config.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        parser.error(f"--config {args.config} is not a YAML file: {one_line(error)}")
    sections = settings if isinstance(settings, dict) else {}
    if not all(isinstance(sections.get(name), dict) for name in ("training", "methods")):
        parser.error(
            f"--config {args.config} must have the sections {', '.join(SECTIONS)}; see {DEFAULT_CONFIG.name}."
        )
    if args.seeds:
        settings["seeds"] = args.seeds
    if args.methods:
        unknown = sorted(set(args.methods) - set(settings["methods"]))
        if unknown:
            parser.error(f"--methods {', '.join(unknown)}: {args.config} has {', '.join(settings['methods'])}.")
        settings["methods"] = {name: settings["methods"][name] for name in args.methods}
    return args, settings


def check(settings: dict[str, Any], path: Path, folder: Path) -> None:
    """ValueError for sections and fields that the YAML file should not have, or lacks, and for values out of range."""
    missing = [name for name in SECTIONS if name not in settings]
    if missing:
        raise ValueError(f"{path} lacks {', '.join(missing)}: {DEFAULT_CONFIG.name} has every section.")
    fields = [field.name for field in dataclasses.fields(DistillationConfig) if field.init]
    places = {"": (settings, (*SECTIONS, "search")), "training": (settings["training"], fields)}
    places |= {f"methods: {name}": (method, fields) for name, method in settings["methods"].items()}
    for place, (given, allowed) in places.items():
        for key in given:
            if key not in allowed:
                where = f" under {place}" if place else ""
                raise ValueError(f"{path} has the unknown key {key!r}{where}{did_you_mean(str(key), allowed)}.")
    for method in settings["methods"].values():
        arguments(folder, {**settings["training"], **method}, seed=0)


def main(argv: Sequence[str] | None = None) -> None:
    args, settings = parse(argv)
    leave_extra_processes()
    folder: Path = args.output_dir
    with mistakes_end_the_run():
        check(settings, args.config, folder)
        folder.mkdir(parents=True, exist_ok=True)
        data = build_data(settings)
    # One line a run below says what matters; the trainers' own tables would bury it.
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    start = time.perf_counter()
    teacher = get_teacher(settings, data, folder)
    if args.search:
        search(settings, data, teacher, folder)
        return
    results = compare(settings, data, teacher, folder)
    name = "wttm" if "wttm" in settings["methods"] else next(iter(settings["methods"]))
    training = arguments(folder, {**settings["training"], **settings["methods"][name]}, settings["seeds"][0])
    report.write(
        results, name, describe_training(training), teacher, data.test, folder, seconds=time.perf_counter() - start
    )


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        print("\nStopped. What is finished is kept: the same command goes on from there.", file=sys.stderr)
        sys.exit(130)
