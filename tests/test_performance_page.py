"""The tables of docs/performance.md are those of the figures that the benchmarks left."""

import re
import runpy
from pathlib import Path


BENCHMARKS = Path(__file__).parent / "benchmarks"


def test_the_page_shows_the_figures(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    made = runpy.run_path(str(BENCHMARKS / "page.py"))
    page = made["PAGE"].read_text()
    assert made["written"](page) == page
    shown = set(re.findall(r"<!-- (\w+): ", page))
    assert shown == set(made["TABLES"]) == {path.stem for path in made["FIGURES"].glob("*.json")}
    # Each with the command that finds it.
    assert all(f"python tests/benchmarks/{name}.py" in page for name in shown)
