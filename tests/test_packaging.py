"""What an installed package holds, and the rules of the house that a reader cannot see being broken."""

import ast
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest


ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """The wheel, unpacked away from the repository."""
    folder = tmp_path_factory.mktemp("wheel")
    subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)],
        cwd=ROOT, check=True, capture_output=True,
    )  # fmt: skip
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder / "site")
    return folder / "site"


def test_the_wheel_holds_the_package_its_types_and_the_card_template(installed):
    names = {str(path.relative_to(installed)) for path in installed.rglob("*") if path.is_file()}
    assert {"hf_kd/py.typed", "hf_kd/student.md.jinja", "hf_kd/losses/functional.py"} <= names
    assert not [name for name in names if name.startswith(("tests", "recipes", "model_cards"))]
    template = (ROOT / "model_cards" / "student.md.jinja").read_bytes()
    assert (installed / "hf_kd" / "student.md.jinja").read_bytes() == template


def test_a_card_can_be_written_from_the_wheel(installed, tmp_path):
    code = (
        "import hf_kd, hf_kd.model_card as m; print(hf_kd.__file__); print(m.StudentCard(model_name='mine').render())"
    )
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(installed)},
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert run.stdout.startswith(str(installed))
    assert "# mine" in run.stdout


def imports_of(path):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield "." * node.level + (node.module or "")


def test_the_formulas_import_torch_alone():
    modules = set(imports_of(ROOT / "hf_kd" / "losses" / "functional.py"))
    assert modules <= {"math", "numbers", "typing", "torch", "torch.nn"}


def test_dependencies_point_one_way():
    above = {
        "losses": (
            "trainer",
            "config",
            "teacher",
            "student",
            "metrics",
            "model_card",
            "data",
            "networks",
            "preflight",
        ),
        "networks.py": ("trainer", "config", "teacher", "student", "losses", "metrics", "model_card", "data"),
        "teacher.py": ("trainer", "config", "student", "losses", "metrics", "model_card", "data"),
        "student.py": ("trainer", "config", "teacher", "losses", "metrics", "model_card", "data"),
        "metrics.py": ("trainer", "config", "teacher", "student", "model_card", "data"),
        "data": ("trainer", "config", "teacher", "student", "losses", "metrics", "model_card"),
    }
    for part, forbidden in above.items():
        place = ROOT / "hf_kd" / part
        for path in [place] if place.is_file() else place.rglob("*.py"):
            for module in imports_of(path):
                name = module.removeprefix("hf_kd.").lstrip(".").split(".")[0]
                if module.startswith((".", "hf_kd")):
                    assert name not in forbidden, f"{path} imports {module}"

    for path in (ROOT / "hf_kd").rglob("*.py"):
        if "analysis" not in path.parts:
            assert not [module for module in imports_of(path) if "analysis" in module.split(".")], path


def test_the_trainer_names_no_loss_and_the_library_prints_nothing():
    trainer = (ROOT / "hf_kd" / "trainer.py").read_text(encoding="utf-8").lower()
    for name in ("wttm", "ttm_loss", "kd_loss"):
        assert name not in trainer.replace('loss="{args.loss}"', "")
    commands = {ROOT / "hf_kd" / "cli.py", ROOT / "hf_kd" / "analysis" / "__main__.py"}
    for path in {*(ROOT / "hf_kd").rglob("*.py")} - commands:
        calls = [node for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(node, ast.Call)]
        assert not [node for node in calls if getattr(node.func, "id", None) == "print"], path


def test_remote_code_is_never_trusted_for_the_user():
    sources = [*(ROOT / "hf_kd").rglob("*.py"), *(ROOT / "recipes").rglob("*.py")]
    assert [path.name for path in sources if "trust_remote_code" in path.read_text(encoding="utf-8")] == []
