"""docs/reliability.md lists the faults that the tests cause, all of them and no others.

`python tests/test_reliability_page.py` writes its list of bad input anew.
"""

import ast
import re
from pathlib import Path

from test_bad_input import BAD_INPUTS


TESTS = Path(__file__).parent
PAGE = TESTS.parent / "docs" / "reliability.md"
BEGIN, END = "<!-- bad input: begin -->\n", "<!-- bad input: end -->\n"


def table():
    rows = [
        f"| {bad.given} | {bad.error.__name__}: {' … '.join(bad.says)} | `{bad.id}` |".replace("\n", " ")
        for bad in BAD_INPUTS
    ]
    return "\n".join(["| what was given | what is said | name |", "| --- | --- | --- |", *rows]) + "\n"


def test_the_list_of_bad_input_is_that_of_the_tests():
    assert len(BAD_INPUTS) >= 40
    page = PAGE.read_text(encoding="utf-8")
    assert page.partition(BEGIN)[2].partition(END)[0] == table()


def test_every_test_that_is_named_is_there():
    files = {path.name: path for path in TESTS.rglob("test_*.py")}
    named = re.findall(r"`(test_\w+\.py)::(\w+)`", PAGE.read_text(encoding="utf-8"))
    assert len(named) > 30
    for file, test in named:
        functions = [node.name for node in ast.parse(files[file].read_text(encoding="utf-8")).body
                     if isinstance(node, ast.FunctionDef)]  # fmt: skip
        assert test in functions, f"{file}::{test}"


if __name__ == "__main__":
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
    PAGE.write_text(before + BEGIN + table() + END + rest.partition(END)[2], encoding="utf-8")
