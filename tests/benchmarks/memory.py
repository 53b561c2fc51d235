"""How much memory training takes at its peak, beyond what libraries, networks and data take before it.

    OMP_NUM_THREADS=1 python tests/benchmarks/memory.py [--workload cifar|small] [--output FILE]

The loops of step.py, each in a process of its own, for some steps. On the CPU it is the process's resident memory
(Linux keeps the peak), three times each; on a GPU what torch allocates there.
"""

from __future__ import annotations

import argparse
import itertools
import logging
import multiprocessing
import os
import statistics
import tempfile
from pathlib import Path
from typing import Any

import torch
from side_by_side import add_output, table, write
from step import BARE, TABLES, WORKLOADS, Workload


STEPS, REPEATS = 3, 3
MIB = 2**20


def _from_status(field: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return 1024 * int(line.split()[1])


def names(workload: str, key: str, folder: str) -> list[str]:
    """Of the loops of a table. A teacher cache is filled on the way, and is there for the others."""
    _be_quiet()
    return list(TABLES[key][1](Workload(workload, folder), STEPS, compile=False))


def peak(workload: str, key: str, folder: str, name: str) -> int:
    """Bytes that one of them takes."""
    _be_quiet()
    loop = TABLES[key][1](Workload(workload, folder), STEPS, compile=False)[name]
    if torch.cuda.is_available():
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
        before = _from_status("VmRSS")
    loop(lambda: None)
    after = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else _from_status("VmHWM")
    return after - before


def _be_quiet() -> None:
    logging.disable(logging.WARNING)
    # The descriptor itself, past Trainer's prints and the libraries'.
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)


def in_a_process(function: Any, *args: Any) -> Any:
    # Forked: the libraries are imported once.
    with multiprocessing.get_context("fork").Pool(1) as pool:
        return pool.apply(function, args)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workload", choices=list(WORKLOADS), action="append", help="by default all of them")
    parser.add_argument("--table", choices=list(TABLES), action="append", help="of step.py; by default peers")
    add_output(parser)
    args = parser.parse_args()
    logging.disable(logging.WARNING)
    figures: dict[str, Any] = {}
    for workload, key in itertools.product(args.workload or WORKLOADS, args.table or ["peers"]):
        title = TABLES[key][0]
        found: dict[str, list[int]] = {}
        with tempfile.TemporaryDirectory() as folder:
            for name in in_a_process(names, workload, key, folder):
                if not name.endswith("(again)"):
                    found[name] = [in_a_process(peak, workload, key, folder, name) for _ in range(REPEATS)]
        middle = {name: statistics.median(values) for name, values in found.items()}
        rows = [(name, f"{value / MIB:.0f}", f"{value / middle[BARE]:.2f}",
                 f"{min(found[name]) / MIB:.0f} to {max(found[name]) / MIB:.0f}")
                for name, value in middle.items()]  # fmt: skip
        print(f"\n{' → '.join(WORKLOADS[workload][:2])}, batch 64, 32 x 32: {title}\n")
        print(table(rows, ("", "MiB at the peak", f"share of {BARE}", "over the runs")), flush=True)
        figures[f"{workload} {key}"] = found
    write(args.output, figures)


if __name__ == "__main__":
    main()
