"""Write the tables of docs/performance.md from what the benchmarks left in docs/performance/.

python tests/benchmarks/page.py
"""

from __future__ import annotations

import json
import re
import statistics
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from side_by_side import table


DOCS = Path(__file__).parents[2] / "docs"
PAGE, FIGURES = DOCS / "performance.md", DOCS / "performance"
MIB = 2**20


def spread(values: dict[str, float]) -> str:
    return f"{values['low']:.2f} to {values['high']:.2f}"


def step(figures: dict[str, Any], key: str) -> Iterator[str]:
    found = figures[key]
    cpu, wall = found["shares"]["cpu"], found["shares"]["wall"]
    rows = []
    for name, turns in found["milliseconds"].items():
        milliseconds = statistics.median(turn["cpu"] for turn in turns)
        rows.append((name, f"{milliseconds:.1f}", f"{cpu[name]['median']:.2f}", spread(cpu[name]),
                     f"{wall[name]['median']:.2f}"))  # fmt: skip
    yield table(rows, ("", "ms a step", "share", "over the rounds", "share by the clock"))


def memory(figures: dict[str, Any], key: str) -> Iterator[str]:
    found = {name: [value / MIB for value in values] for name, values in figures[key].items()}
    first = statistics.median(next(iter(found.values())))
    rows = [(name, f"{statistics.median(values):.0f}", f"{statistics.median(values) / first:.2f}",
             f"{min(values):.0f} to {max(values):.0f}") for name, values in found.items()]  # fmt: skip
    yield table(rows, ("", "MiB at the peak", "share", "over the runs"))


def loss(figures: dict[str, Any], key: str) -> Iterator[str]:
    sizes = figures["sizes"]
    rows = []
    for name in next(iter(sizes.values())):
        found = [size[name] for size in sizes.values()]
        times = [f"{row['ratio']:.2f} ({row['quartiles'][0]:.2f} to {row['quartiles'][1]:.2f})" for row in found]
        rows.append((name, *times, f"{found[-1]['kept']:.2f}", f"{found[-1]['peak']:.2f}"))
    yield table(rows, ("", *(f"({size.replace('x', ', ')})" for size in sizes), "kept", "peak"))


def teacher_speed(figures: dict[str, Any], key: str) -> Iterator[str]:
    cases = {name: case for name, case in figures["cases"].items() if name.startswith(key)}
    ways = list(dict.fromkeys(way for case in cases.values() for way in case["cpu"] if not way.startswith("images")))
    rows = []
    for way in ways:
        found = [case["cpu"].get(way) for case in cases.values()]
        rows.append((way, *("" if one is None else f"{one['median']:.2f} ({spread(one)})" for one in found)))
    yield table(rows, ("", *(name.removeprefix(f"{key} ") for name in cases)))


def teacher_cache(figures: dict[str, Any], key: str) -> Iterator[str]:
    rows = []
    for kind in ("live", "cached", "new views"):
        top1 = [100 * run["top1"][kind] for run in figures["runs"]]
        rows.append((kind, f"{statistics.mean(top1):.2f} ± {statistics.stdev(top1):.2f}"))
    yield table(rows, ("", "test top-1 (%)"))
    times = [(name, f"{ratio:.3f}") for run in figures["runs"] for name, ratio in run["ratio"].items()]
    sweep = figures["sweep"]
    yield table(
        [*times, ("sweep of 8, with filling", f"{sweep['ratio']:.3f}"),
         ("sweep of 8, once filled", f"{sweep['ratio_without_the_first']:.3f}")],
        ("processor time", "ratio"),
    )  # fmt: skip
    differences = [(name, f"{value:.0e}") for name, value in figures["loss_differences"].items()]
    yield table(differences, ("largest difference of a step's loss", "relative"))
    reads = []
    for row in figures["reading"]:
        beside = f"{row['ms_of_datasets']:.2f}" if "ms_of_datasets" in row else ""
        reads.append((f"{row['batch']} rows of {row['classes']}, {row['dtype']}", f"{row['ms']:.3f}", beside))
    yield table(reads, ("reading a batch", "ms", "by `datasets`"))


def data_loading(figures: dict[str, Any], key: str) -> Iterator[str]:
    found = figures[key]
    rows = [(name, *(f"{results[name]['images_per_second']:,.0f}" for results in found.values()),
             f"{found['0 workers'][name]['cpu_us_per_image']:,.0f}") for name in found["0 workers"]]  # fmt: skip
    yield table(rows, ("", *(f"images/s, {workers}" for workers in found), "CPU µs an image"))


TABLES: dict[str, Callable[[dict[str, Any], str], Iterator[str]]] = {
    function.__name__: function for function in (step, memory, loss, teacher_speed, teacher_cache, data_loading)
}


def written(page: str) -> str:
    """The page with every block between `<!-- NAME: KEY -->` and `<!-- end -->` made anew."""

    def block(match: re.Match[str]) -> str:
        name, key = match["name"], match["key"]
        figures = json.loads((FIGURES / f"{name}.json").read_text())
        machine = figures["machine"]
        threads = f"{machine['threads']} thread{'s' if machine['threads'] > 1 else ''}"
        where = f"({machine['date']}, {machine['cores']} cores of {machine['processor']}, {threads})"
        tables = "\n\n".join(TABLES[name](figures, key))
        return f"<!-- {name}: {key} -->\n\n{tables}\n\n{where}\n\n<!-- end -->"

    return re.sub(r"<!-- (?P<name>\w+): (?P<key>.*?) -->.*?<!-- end -->", block, page, flags=re.DOTALL)


if __name__ == "__main__":
    PAGE.write_text(written(PAGE.read_text()))
