"""Collect results.json files of runs of the paper's rows into one table beside the paper's figures.

    python recipes/reproduce.py outputs                        # all results.json files below outputs/
    python recipes/reproduce.py outputs --output table.md      # into a file
    python recipes/reproduce.py outputs --update               # and into the last column of recipes/README.md

Single runs and those of --seeds N count alike, and a run that lies there twice counts once. A run that differs from
its row in a setting or in its data is listed apart, and counts in no mean. Figures are top-1 in %; the paper's are
quoted, not measured.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from make_configs import README, figure, markdown_table, page
from table import MEASURED, RESULTS, measured, read_table, rows


@dataclass(frozen=True)
class Result:
    """One run: where it lies, what row it is of, its seed and top-1 (%), and in what it differs from the row."""

    path: Path
    row: str
    seed: int
    top1: float
    differs: tuple[str, ...]
    paper: float | None


# ---- Collecting ----------------------------------------------------------------------------------------------------


def find(places: Iterable[str]) -> list[Path]:
    """The results.json files in and below folders, and files as they are named; ValueError for a missing one."""
    found: list[Path] = []
    for place in map(Path, places):
        if not place.exists():
            raise ValueError(f"{place} does not exist: give folders of runs, or results.json files.")
        found += sorted(place.rglob(RESULTS)) if place.is_dir() else [place]
    return list(dict.fromkeys(path.resolve() for path in found))


def read(path: Path) -> list[Result]:
    """The runs of one file; ValueError if it is damaged or nothing of a recipe of rows."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} is no JSON ({' '.join(str(error).split())}): it was left out.") from error
    try:
        return [_result(path, run) for run in content.get("runs", [content])]
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{path} is not of a run of a row ({type(error).__name__}: {error}): it was left out."
        ) from error


def _result(path: Path, run: dict[str, Any]) -> Result:
    top1, paper = run["student"]["top1"], run.get("paper", {}).get("top1")
    if not 0.0 <= top1 <= 1.0:
        raise ValueError(f"a top-1 of {top1}")
    differs = tuple(str(name) for name in run["this_run_differs_in"])
    seed = int(run["training"]["seed"])
    return Result(path, str(run["row"]), seed, 100 * top1, differs, None if paper is None else 100 * paper)


def collect(places: Iterable[str]) -> tuple[list[Result], list[str]]:
    """All runs, each once, and a sentence for each file or run that was left out.

    The runs of --seeds are in the summary's file and in one each: the same row, seed and figure are one run.
    """
    results: dict[tuple[str, int, tuple[str, ...]], Result] = {}
    problems: list[str] = []
    for path in find(places):
        try:
            found = read(path)
        except ValueError as error:
            problems.append(str(error))
            continue
        for result in found:
            first = results.setdefault((result.row, result.seed, result.differs), result)
            if first.top1 != result.top1:
                problems.append(
                    f"{result.path} is of {result.row} with seed {result.seed} as {first.path} is, and has another "
                    "figure: one seed counts once, so it was left out."
                )
    return list(results.values()), problems


# ---- The table -----------------------------------------------------------------------------------------------------


def papers() -> dict[str, tuple[float, float | None]]:
    """The paper's top-1 and its standard deviation for each row, in the order of recipes/README.md."""
    return {row.name: (row.top1, row.std) for row in rows(read_table())}


def summarise(results: Sequence[Result], known: Iterable[str]) -> dict[str, dict[str, float]]:
    """Mean, standard deviation (of the sample; None of one run) and number of the runs of each row as it is."""
    summary = {}
    for name in known:
        values = [result.top1 for result in results if result.row == name and not result.differs]
        if values:
            std = {"std": statistics.stdev(values)} if len(values) > 1 else {}
            summary[name] = {"top1": statistics.mean(values), **std, "runs": len(values)}
    return summary


def report(results: Sequence[Result], problems: Sequence[str]) -> str:
    """The table in Markdown, then the runs that count in no row, then what was left out."""
    figures = papers()
    summary = summarise(results, figures)
    parts = ["# Measured with this code, beside the paper's figures\n"]
    if summary:
        cells = [
            [name, figure(*figures[name]), f"{figure(found['top1'], found.get('std'))} (n = {found['runs']})",
             f"{found['top1'] - figures[name][0]:+.2f}"]
            for name, found in summary.items()
        ]  # fmt: skip
        parts.append(markdown_table(("row", "paper", "measured here", "difference"), cells))
    else:
        parts.append("No run of a row as it is.\n")
    others = [result for result in results if result.differs or result.row not in figures]
    if others:
        parts.append("## Other runs\n\nThey differ from their row, or are of none, and count in no figure above.\n")
        cells = []
        for result in others:
            paper = figures[result.row][0] if result.row in figures else result.paper
            cells.append(
                [result.row, str(result.seed), f"{result.top1:.2f}", "" if paper is None else f"{paper:.2f}",
                 ", ".join(result.differs) or "no row of this name"]
            )  # fmt: skip
        parts.append(markdown_table(("row", "seed", "measured here", "the row's in the paper", "differs in"), cells))
    if problems:
        parts.append("## Left out\n\n" + "\n".join(f"- {problem}" for problem in problems) + "\n")
    return "\n".join(parts)


def update(results: Sequence[Result]) -> None:
    """Keep the rows' figures, over those that are kept already, and write recipes/README.md anew."""
    kept = measured() | summarise(results, papers())
    rounded = {name: {key: round(value, 4) for key, value in entry.items()} for name, entry in sorted(kept.items())}
    head = "# Measured with this code, in %. Written by `python recipes/reproduce.py ... --update`.\n"
    MEASURED.write_text(head + yaml.safe_dump(rounded, sort_keys=False), encoding="utf-8")
    README.write_text(page(read_table()), encoding="utf-8")


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("places", nargs="+", metavar="FOLDER", help="Folders of runs, or results.json files.")
    parser.add_argument("--output", metavar="FILE", help="Where the table goes; the standard output by default.")
    parser.add_argument("--update", action="store_true", help="Keep the figures, and show them in recipes/README.md.")
    arguments = parser.parse_args(argv)
    try:
        results, problems = collect(arguments.places)
        if not results:
            raise ValueError(" ".join([f"There is no result in {', '.join(arguments.places)}.", *problems]))
        text = report(results, problems)
        if arguments.output:
            Path(arguments.output).write_text(text, encoding="utf-8")
        if arguments.update:
            update(results)
    except (OSError, ValueError) as error:
        print(f"{Path(sys.argv[0]).name}: error: {error}", file=sys.stderr)
        sys.exit(2)
    if not arguments.output:
        print(text, end="")
    for problem in problems:
        print(problem, file=sys.stderr)


if __name__ == "__main__":
    main()
