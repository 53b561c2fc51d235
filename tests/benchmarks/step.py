"""What a training step costs: this trainer beside a loop written by hand, and beside other libraries.

    OMP_NUM_THREADS=1 python tests/benchmarks/step.py [--workload cifar|small] [--table peers|cache] [--output FILE]

Everything takes turns in one process (side_by_side.py), on the same networks and the same batches.

* "peers": KD's objective, 0.1 CE + 0.9 T² D(p_T || q_T) with T = 4, with a live teacher. The baseline is the loop by
  hand that runs the teacher first; the second such loop shows the noise. timm and, if it is installed
  (pip install torchdistill), torchdistill have their own order of things.
* "cache": WTTM, CE + U D(p_T || q) with gamma = 0.5, the teacher's logits from a teacher cache that is full, beside
  the student trained by hand on the labels alone.

The fast options are those that `teacher_speed="auto"` would choose from. What they change: bf16 moves the teacher's
logits by some thousandths of the largest.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import importlib.util
import logging
import tempfile
from collections.abc import Callable, Iterator
from typing import Any

import timm
import torch
from side_by_side import Loop, Turn, Turns, add_output, ratios, table, write
from timm.optim import create_optimizer_v2
from timm.task import LogitDistillationTask
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader
from transformers import TrainerCallback

import hf_kd.models.cifar  # noqa: F401
from hf_kd import DistillationConfig, DistillationTrainer
from hf_kd.data import CIFAR100_MEAN, CIFAR100_STD, CifarDataset, CifarImages, collate


# The second student is the quickstart's, of 86,000 parameters with 100 classes.
QUICKSTART = {"channels": [8, 16, 32, 64], "stem_type": "deep", "stem_width": 8}
WORKLOADS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "cifar": ("cifar_resnet32x4", "cifar_resnet8x4", {}),
    "small": ("resnet18", "resnet10t", QUICKSTART),
}
# Rounds, and steps that are counted in each: a step takes two seconds or some milliseconds.
TURNS = {"cifar": (4, 2), "small": (9, 4)}
BATCH, CLASSES, IMAGES = 64, 100, 1024
TEMPERATURE, CE_WEIGHT, GAMMA = 4.0, 0.1, 0.5
KD = {"loss": "kd", "temperature": TEMPERATURE, "beta": 1 - CE_WEIGHT, "ce_weight": CE_WEIGHT}
WTTM = {"loss": "wttm", "gamma": GAMMA}
FAST_TEACHER = {"teacher_fold_batchnorm": True, "teacher_dtype": "bf16", "channels_last": True}
SGD = {"lr": 0.01, "momentum": 0.9, "weight_decay": 5e-4}


class Workload:
    """Two networks and their data; each loop gets a student of its own with the same weights."""

    def __init__(self, name: str, folder: str) -> None:
        torch.manual_seed(0)
        self.cache = folder
        images = {"mean": CIFAR100_MEAN, "std": CIFAR100_STD, "input_size": (3, 32, 32)}
        teacher, student, options = WORKLOADS[name]
        self.teacher = timm.create_model(teacher, num_classes=CLASSES, pretrained_cfg_overlay=images)
        self._student = timm.create_model(student, num_classes=CLASSES, pretrained_cfg_overlay=images, **options)
        self.teacher.eval().requires_grad_(False)
        generator = torch.Generator().manual_seed(0)
        images = torch.randint(0, 256, (IMAGES, 3, 32, 32), dtype=torch.uint8, generator=generator)
        labels = torch.randint(0, CLASSES, (IMAGES,), generator=generator)
        names = [str(number) for number in range(CLASSES)]
        self.data = CifarDataset(CifarImages(images, labels, names), augment=True)
        self.logits = 3 * torch.randn(IMAGES, CLASSES, generator=generator)

    def student(self) -> nn.Module:
        return copy.deepcopy(self._student)

    def batches(self, count: int) -> Iterator[dict[str, Tensor]]:
        while True:
            for batch in DataLoader(self.data, BATCH, shuffle=True, collate_fn=collate):
                if not count:
                    return
                count -= 1
                yield batch


# ---- By hand -------------------------------------------------------------------------------------------------------


def kd(student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
    """As it is written everywhere."""
    soft = F.kl_div(
        F.log_softmax(student / TEMPERATURE, dim=1), F.softmax(teacher / TEMPERATURE, dim=1), reduction="batchmean"
    )
    return CE_WEIGHT * F.cross_entropy(student, labels) + (1 - CE_WEIGHT) * TEMPERATURE**2 * soft


def wttm(student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
    """Likewise."""
    powers = F.softmax(teacher, dim=1) ** GAMMA
    power_sum = powers.sum(dim=1, keepdim=True)
    divergence = F.kl_div(F.log_softmax(student, dim=1), powers / power_sum, reduction="none").sum(dim=1)
    return F.cross_entropy(student, labels) + (power_sum[:, 0] * divergence).mean()


def by_hand(work: Workload, steps: int, order: str, objective: Callable[..., Tensor]) -> Loop:
    """A loop of torch alone; `order` is "teacher first", "student first", "stored" logits or "labels" alone."""

    def loop(turn: Turn) -> None:
        student = work.student().train()
        optimizer = torch.optim.SGD(student.parameters(), **SGD)
        for batch in work.batches(steps):
            images, labels = batch["pixel_values"], batch["labels"]
            teacher = work.logits[batch["index"]] if order == "stored" else None
            if order == "teacher first":
                with torch.no_grad():
                    teacher = work.teacher(images)
            logits = student(images)
            if order == "student first":
                with torch.no_grad():
                    teacher = work.teacher(images)
            loss = F.cross_entropy(logits, labels) if teacher is None else objective(logits, teacher, labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            turn()

    return loop


# ---- This trainer --------------------------------------------------------------------------------------------------


class EndOfStep(TrainerCallback):
    def __init__(self, turn: Turn) -> None:
        self._turn = turn

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self._turn()


def make_trainer(
    work: Workload, folder: str, callbacks: list[TrainerCallback], **settings: Any
) -> DistillationTrainer:
    args = DistillationConfig(
        folder,
        optim="sgd",
        learning_rate=SGD["lr"],
        momentum=SGD["momentum"],
        weight_decay=SGD["weight_decay"],
        lr_scheduler_type="constant",
        decay_all_parameters=True,
        max_grad_norm=0.0,
        per_device_train_batch_size=BATCH,
        logging_steps=50,
        log_level="error",
        save_strategy="no",
        teacher_preflight=False,
        disable_tqdm=True,
        report_to="none",
        **settings,
    )
    return DistillationTrainer(work.student(), work.teacher, args, train_dataset=work.data, callbacks=callbacks)


def trainer(work: Workload, steps: int, **settings: Any) -> Loop:
    def loop(turn: Turn) -> None:
        with tempfile.TemporaryDirectory() as folder:
            make_trainer(work, folder, [EndOfStep(turn)], max_steps=steps, **settings).train()

    return loop


# ---- Others --------------------------------------------------------------------------------------------------------


def timm_task(work: Workload, steps: int) -> Loop:
    """timm's train.py without its logging: its task, its optimiser."""

    def loop(turn: Turn) -> None:
        student = work.student().train()
        task = LogitDistillationTask(
            student, work.teacher, criterion=nn.CrossEntropyLoss(), distill_loss_weight=1 - CE_WEIGHT,
            task_loss_weight=CE_WEIGHT, temperature=TEMPERATURE, verbose=False,
        )  # fmt: skip
        optimizer = create_optimizer_v2(student, opt="momentum", **SGD)
        for batch in work.batches(steps):
            loss = task(batch["pixel_values"], batch["labels"])["loss"]
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            loss.item()  # train.py updates its average of the loss
            turn()

    return loop


def torchdistill_box(work: Workload, steps: int) -> Loop:
    """torchdistill's DistillationBox by a configuration such as its YAML files hold, on this benchmark's batches."""

    def loop(turn: Turn) -> None:
        from torchdistill.core.distillation import get_distillation_box

        student = work.student().train()
        term = {
            "key": "KDLoss",
            "kwargs": {
                "student_module_path": ".", "student_module_io": "output", "teacher_module_path": ".",
                "teacher_module_io": "output", "temperature": TEMPERATURE, "alpha": CE_WEIGHT,
            },
        }  # fmt: skip
        config = {
            "num_epochs": 1,
            "teacher": {"forward_proc": "forward_batch_only", "requires_grad": False, "forward_hook": {}},
            "student": {"forward_proc": "forward_batch_only", "forward_hook": {}},
            "criterion": {
                "key": "WeightedSumLoss",
                "kwargs": {"sub_terms": {"kd": {"criterion": term, "weight": 1.0}}},
            },
            "optimizer": {"key": "SGD", "kwargs": dict(SGD)},
        }
        box = get_distillation_box(
            work.teacher,
            student,
            {},
            config,
            device=torch.device("cpu"),
            device_ids=[],
            distributed=False,
            lr_factor=1,
        )
        for batch in work.batches(steps):
            loss = box.forward_process(batch["pixel_values"], batch["labels"], None)
            box.post_forward_process(loss)
            loss.item()  # its examples update their average of the loss
            turn()

    return loop


# ---- The tables ----------------------------------------------------------------------------------------------------

BARE = "by hand, teacher first"
STUDENT = "by hand, student alone (CE)"
OURS = "DistillationTrainer"


def peers(work: Workload, steps: int, compile: bool) -> dict[str, Loop]:
    loops = {
        BARE: by_hand(work, steps, "teacher first", kd),
        f"{BARE} (again)": by_hand(work, steps, "teacher first", kd),
        "by hand, student first": by_hand(work, steps, "student first", kd),
        "timm LogitDistillationTask": timm_task(work, steps),
    }
    if importlib.util.find_spec("torchdistill"):
        loops["torchdistill"] = torchdistill_box(work, steps)
    loops[OURS] = trainer(work, steps, **KD)
    loops[f"{OURS}, channels last"] = trainer(work, steps, channels_last=True, **KD)
    fast = f"{OURS}, channels last, teacher folded in bf16"
    loops[fast] = trainer(work, steps, **FAST_TEACHER, **KD)
    if compile:
        loops[f"{fast}, student compiled"] = trainer(work, steps, torch_compile=True, **FAST_TEACHER, **KD)
    return loops


def cache(work: Workload, steps: int, compile: bool) -> dict[str, Loop]:
    stored = {"teacher_cache_dir": work.cache, "teacher_cache_views": 1, **WTTM}
    with tempfile.TemporaryDirectory() as folder:
        make_trainer(work, folder, [], **stored).cache_teacher()
    loops = {
        STUDENT: by_hand(work, steps, "labels", wttm),
        f"{STUDENT} (again)": by_hand(work, steps, "labels", wttm),
        "by hand, stored logits": by_hand(work, steps, "stored", wttm),
        f"{OURS}, cache": trainer(work, steps, **stored),
        f"{OURS}, cache, channels last": trainer(work, steps, channels_last=True, **stored),
        BARE: by_hand(work, steps, "teacher first", wttm),
        f"{OURS}, live": trainer(work, steps, **WTTM),
    }
    if compile:
        options = {"channels_last": True, "torch_compile": True}
        loops[f"{OURS}, cache, channels last, compiled"] = trainer(work, steps, **options, **stored)
    return loops


TABLES = {
    "peers": ("KD with a live teacher", peers, BARE),
    "cache": ("WTTM from a teacher cache", cache, STUDENT),
}


def report(title: str, times: dict[str, list[dict[str, float]]], baseline: str) -> dict[str, Any]:
    found = {kind: ratios(times, baseline, kind) for kind in ("cpu", "wall")}
    rows = []
    for name, turns in times.items():
        cpu, wall = found["cpu"][name], found["wall"][name]
        milliseconds = sorted(turn["cpu"] for turn in turns)[len(turns) // 2]
        rows.append((name, f"{milliseconds:.1f}", f"{cpu['median']:.3f}", f"{cpu['low']:.2f} to {cpu['high']:.2f}",
                     f"{wall['median']:.3f}"))  # fmt: skip
    print(f"\n{title}\n")
    print(
        table(rows, ("", "ms a step (CPU)", "share of the first row (CPU)", "over the rounds", "share (wall)")),
        flush=True,
    )
    return {"baseline": baseline, "shares": found, "milliseconds": times}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workload", choices=list(WORKLOADS), action="append", help="by default all of them")
    parser.add_argument("--table", choices=list(TABLES), action="append", help="by default both")
    parser.add_argument("--no-compile", action="store_true", help="leave out the compiled students")
    add_output(parser)
    args = parser.parse_args()
    logging.disable(logging.WARNING)
    figures: dict[str, Any] = {}
    for name in args.workload or WORKLOADS:
        turns = Turns(*TURNS[name])
        teacher, student, _ = WORKLOADS[name]
        for key in args.table or TABLES:
            title, loops, baseline = TABLES[key]
            with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(None):  # Trainer prints its logs
                work = Workload(name, folder)
                times = turns.run(loops(work, turns.steps, not args.no_compile))
            title = f"{teacher} → {student}, batch {BATCH}, 32 x 32: {title}"
            figures[f"{name} {key}"] = report(title, times, baseline)
            write(args.output, figures)


if __name__ == "__main__":
    main()
