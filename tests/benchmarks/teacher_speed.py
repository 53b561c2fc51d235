"""What a teacher's forward pass costs, run in each way that the trainer knows, and a student's step in channels last.

    OMP_NUM_THREADS=1 python tests/benchmarks/teacher_speed.py [--case NAME ...] [--rounds 5] [--no-compile]
        [--output FILE]

The ways take turns in one process. Ratios are to the first way, which comes twice: the second shows the noise. `moved`
is the largest difference of a logit, relative to the largest logit. The lines about images are what the teacher's
preprocessing takes beside its forward pass.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import timm
import torch
from side_by_side import add_output, ratios, table, write
from torch import Tensor, nn
from torch.nn import functional as F

import hf_kd.models.cifar  # noqa: F401 - registers its networks with timm
from hf_kd.memory_format import in_channels_last, weights_in_channels_last
from hf_kd.networks import InputConverter, Preprocessing
from hf_kd.teacher_speed import Batch, Speed, speed_up


PLAIN, AGAIN = "as it is", "as it is, again"
Way = Callable[[], Any]


@dataclass(frozen=True)
class Case:
    """A network and its batches."""

    network: str
    batch: int
    size: int
    options: Mapping[str, Any] = field(default_factory=dict)
    smaller: int = 0
    """For a teacher: the size that its images are resized from."""


TEACHERS = {
    "resnet32x4": Case("cifar_resnet32x4", 64, 32, smaller=28),
    "resnet18": Case("resnet18", 64, 32, smaller=28),
    "resnet50": Case("resnet50", 8, 224, smaller=160),
}
# The second is the quickstart's student, of 86,000 parameters with 100 classes.
STUDENTS = {
    "resnet8x4": Case("cifar_resnet8x4", 64, 32),
    "small": Case("resnet10t", 64, 32, {"channels": [8, 16, 32, 64], "stem_type": "deep", "stem_width": 8}),
}


def build(case: Case) -> tuple[nn.Module, Tensor]:
    """A network whose BatchNorm has something to do, and a batch of images."""
    torch.manual_seed(0)
    network = timm.create_model(case.network, num_classes=100, **case.options)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_var, 0.5, 2.0)
            nn.init.normal_(module.running_mean, std=0.1)
    return network, torch.randn(case.batch, 3, case.size, case.size)


# ---- Teachers ------------------------------------------------------------------------------------------------------


def teacher_ways(case: Case, compile: bool) -> dict[str, Way]:
    """The ways of a teacher's forward pass, which give its logits."""
    network, images = build(case)
    network.eval().requires_grad_(False)
    batch = Batch((images,), {})
    folded, channels_last, bf16 = {"fold_batchnorm": True}, {"channels_last": True}, {"dtype": torch.bfloat16}
    speeds = {
        PLAIN: Speed(),
        AGAIN: Speed(),
        "folded": Speed(**folded),
        "channels last": Speed(**channels_last),
        "folded, channels last": Speed(**folded, **channels_last),
        "bf16": Speed(**bf16),
        "folded, bf16": Speed(**folded, **bf16),
        "folded, channels last, bf16": Speed(**folded, **channels_last, **bf16),
    }
    if compile:
        speeds["folded, channels last, compiled"] = Speed(**folded, **channels_last, compile=True)

    def way(speed: Speed, mode: Callable[[], Any] = torch.inference_mode) -> Way:
        runs = speed_up(copy.deepcopy(network), speed, batch)

        def forward() -> Tensor:
            with mode():
                return batch.logits(runs, channels_last=speed.channels_last).float()

        return forward

    ways = {name: way(speed) for name, speed in speeds.items()}
    ways["no_grad in place of inference mode"] = way(Speed(), torch.no_grad)
    ours = Preprocessing((0.5,) * 3, (0.25,) * 3, (3, case.size, case.size))
    theirs = Preprocessing((0.485, 0.456, 0.406), (0.229, 0.224, 0.225), (3, case.size, case.size))
    smaller = torch.randn(case.batch, 3, case.smaller, case.smaller)
    converter = torch.inference_mode()(InputConverter(ours, theirs))
    ways["images renormalised"] = lambda: converter(images)
    ways[f"images renormalised and resized from {case.smaller} pixels"] = lambda: converter(smaller)
    return ways


# ---- Students ------------------------------------------------------------------------------------------------------


def student_ways(case: Case, compile: bool) -> dict[str, Way]:
    """The ways of a student's forward and backward pass."""
    network, images = build(case)
    labels = torch.randint(0, 100, (case.batch,))

    def way(channels_last: bool, compiled: bool) -> Way:
        trained = copy.deepcopy(network).train()
        if channels_last:
            weights_in_channels_last(trained)
        runs = torch.compile(trained) if compiled else trained

        def step() -> None:
            F.cross_entropy(runs(in_channels_last(images) if channels_last else images), labels).backward()
            trained.zero_grad()

        return step

    ways = {PLAIN: way(False, False), AGAIN: way(False, False), "channels last": way(True, False)}
    if compile:
        ways.update({"compiled": way(False, True), "channels last, compiled": way(True, True)})
    return ways


# ---- Measuring -----------------------------------------------------------------------------------------------------


def measure(ways: Mapping[str, Way], rounds: int) -> dict[str, Any]:
    """Milliseconds of the first way, all ways' shares of its time, and how far they move what it gives.

    A turn takes a quarter of a second, or a single step if that takes longer.
    """
    # What a first call prepares or compiles is no part of a step.
    given = {name: way() for name, way in ways.items()}
    times: dict[str, list[dict[str, float]]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, way in ways.items():
            steps, begin, cpu = 0, time.perf_counter(), time.process_time()
            while (wall := time.perf_counter() - begin) < 0.25:
                way()
                steps += 1
            times[name].append({"wall": 1000 * wall / steps, "cpu": 1000 * (time.process_time() - cpu) / steps})
    expected = given[PLAIN]
    return {
        "milliseconds": {kind: statistics.median(turn[kind] for turn in times[PLAIN]) for kind in ("wall", "cpu")},
        **{kind: ratios(times, PLAIN, kind) for kind in ("wall", "cpu")},
        "moved": {
            name: float((logits - expected).abs().max() / expected.abs().max())
            for name, logits in given.items()
            if logits is not None and logits.shape == expected.shape
        },
    }


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    cases = {**{f"teacher {name}": case for name, case in TEACHERS.items()},
             **{f"student {name}": case for name, case in STUDENTS.items()}}  # fmt: skip
    parser.add_argument("--case", nargs="+", choices=list(cases), default=list(cases))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    add_output(parser)
    args = parser.parse_args(argv)
    found = {}
    for name in args.case:
        case, of_teacher = cases[name], name.startswith("teacher")
        # A large network takes minutes to compile and says nothing new.
        compile = not args.no_compile and case.size < 100
        ways = (teacher_ways if of_teacher else student_ways)(case, compile)
        found[name] = result = measure(ways, args.rounds)
        moved = result["moved"]
        what = "a forward pass" if of_teacher else "a forward and backward pass"
        print(f"\n{name} ({case.network}, {case.batch} images of {case.size} x {case.size}): {what} takes "
              "{wall:.0f} ms, {cpu:.0f} of the processor\n".format(**result["milliseconds"]))  # fmt: skip
        rows = [
            [
                way,
                *(
                    f"{share['median']:.3f} ({share['low']:.2f} to {share['high']:.2f})"
                    for share in (result["wall"][way], result["cpu"][way])
                ),
                f"{moved[way]:.0e}" if way in moved else "",
            ]
            for way in ways
        ]
        print(table(rows, ("way", "wall", "CPU time", "moved")))
    write(args.output, {"cases": found})


if __name__ == "__main__":
    main()
