"""Loops that take turns in one process, so that what slows the machine down slows all of them down alike."""

from __future__ import annotations

import argparse
import datetime
import itertools
import json
import os
import platform
import statistics
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import accelerate
import timm
import torch
import transformers


Turn = Callable[[], None]
Loop = Callable[[Turn], None]
"""A training loop: it calls what it is given at the end of each of its steps, `Turns.steps` times."""


class Turns:
    """Runs loops in threads of which one at a time has its turn: a few steps, then the next.

    Args:
        rounds: how many turns each loop has, after one that is not counted.
        block: how many steps a turn has; the first of them, which finds the caches full of others' data, is not
            counted.
    """

    def __init__(self, rounds: int, block: int) -> None:
        self.rounds, self.block = rounds, block
        self.steps = (rounds + 1) * (block + 1)

    def run(self, loops: Mapping[str, Loop]) -> dict[str, list[dict[str, float]]]:
        """Milliseconds a step, by the clock ("wall") and of the processor ("cpu"): the median of each turn."""
        runners = [_Runner(loop, self) for loop in loops.values()]
        for _ in range(self.rounds + 1):
            for runner in runners:
                runner.have_turn()
        for runner in runners:
            runner.finish()
        return {name: runner.turns[1:] for name, runner in zip(loops, runners, strict=True)}


class _Runner:
    def __init__(self, loop: Loop, turns: Turns) -> None:
        self._loop, self._block = loop, turns.block
        self.turns: list[dict[str, float]] = []
        self._mine, self._done = threading.Semaphore(0), threading.Semaphore(0)
        self._error: BaseException | None = None
        self._steps: list[tuple[float, float]] = []
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def have_turn(self) -> None:
        self._mine.release()
        self._wait()

    def finish(self) -> None:
        """Let the loop end by itself: it may have something to do after its last step."""
        self._mine.release()
        self._thread.join()
        self._raise()

    def _wait(self) -> None:
        self._done.acquire()
        self._raise()

    def _raise(self) -> None:
        if self._error is not None:
            raise self._error

    def _run(self) -> None:
        self._mine.acquire()
        try:
            self._loop(self._end_of_step)
        except BaseException as error:
            self._error = error
        self._done.release()

    def _end_of_step(self) -> None:
        self._steps.append((time.perf_counter(), time.process_time()))
        if len(self._steps) < self._block + 1:
            return
        wall, cpu = ([later - earlier for earlier, later in itertools.pairwise(times)]
                     for times in zip(*self._steps, strict=True))  # fmt: skip
        self.turns.append({"wall": 1000 * statistics.median(wall), "cpu": 1000 * statistics.median(cpu)})
        self._steps = []
        self._done.release()
        self._mine.acquire()


# ---- What is done with the times -----------------------------------------------------------------------------------


def ratios(
    times: Mapping[str, Sequence[Mapping[str, float]]], baseline: str, kind: str
) -> dict[str, dict[str, float]]:
    """Each loop's time as a share of the baseline's in the same round: median, lowest and highest over the rounds."""
    found = {}
    for name, turns in times.items():
        shares = [turn[kind] / other[kind] for turn, other in zip(turns, times[baseline], strict=True)]
        found[name] = {"median": statistics.median(shares), "low": min(shares), "high": max(shares)}
    return found


def machine() -> dict[str, Any]:
    """What the figures were measured on."""
    model = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), model)
    return {
        "date": datetime.date.today().isoformat(),
        "processor": model,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "versions": {
            "python": platform.python_version(),
            **{module.__name__: module.__version__ for module in (torch, timm, transformers, accelerate)},
        },
    }


def table(rows: Sequence[Sequence[Any]], header: Sequence[str]) -> str:
    """A Markdown table, the first column to the left and the others to the right."""
    cells = [[str(cell) for cell in row] for row in (header, *rows)]
    widths = [max(len(row[column]) for row in cells) for column in range(len(header))]

    def line(row: Sequence[str]) -> str:
        padded = [cell.ljust(width) if column == 0 else cell.rjust(width)
                  for column, (cell, width) in enumerate(zip(row, widths, strict=True))]  # fmt: skip
        return f"| {' | '.join(padded)} |"

    rule = [("-" * width) if column == 0 else "-" * (width - 1) + ":" for column, width in enumerate(widths)]
    return "\n".join([line(cells[0]), line(rule), *map(line, cells[1:])])


def add_output(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--output", type=Path, help="a JSON file for the figures")


def write(output: Path | None, figures: Mapping[str, Any]) -> None:
    """Keep the figures, and on which machine they were found, if a file is given."""
    if output is not None:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(json.dumps({"machine": machine(), **figures}, indent=1) + "\n")
