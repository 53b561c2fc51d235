"""Results of runs, collected into the paper's tables."""

import json
import shutil
import statistics
from pathlib import Path

import pytest
import yaml


ROOT = Path(__file__).parents[2]
ROW = "cifar100/vgg13_vgg8/wttm"  # 74.44 ± 0.19 in the paper


def run(top1, seed=42, row=ROW, differs=(), **more):
    """What the recipes write of one run, as far as it matters here."""
    return {
        "row": row,
        "this_run_differs_in": list(differs),
        "student": {"top1": top1, "nll": 1.0},
        "training": {"seed": seed},
        **more,
    }


def write(folder, content):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "results.json").write_text(content if isinstance(content, str) else json.dumps(content))


def write_seeds(folder, runs):
    """What --seeds leaves: a file for each, and one for all."""
    for result in runs:
        write(folder / f"seed{result['training']['seed']}", result)
    write(folder, {"row": runs[0]["row"], "seeds": [], "mean": {}, "std": {}, "runs": runs})


def lines(text):
    """The cells of each line of the tables, without heads."""
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line[:1] == "|"]
    return [row for row in rows if row[0] not in ("row", "---")]


def test_runs_of_a_row_are_averaged_each_once(tmp_path):
    from reproduce import collect, report

    write_seeds(tmp_path / "a", [run(0.7410, 1), run(0.7450, 2), run(0.7490, 3)])
    write(tmp_path / "b", run(0.7430, 4))
    write(tmp_path / "c", run(0.7725, row="imagenet/resnet34_resnet18"))
    results, problems = collect([str(tmp_path), str(tmp_path / "b"), str(tmp_path / "a" / "results.json")])
    assert len(results) == 5 and problems == []
    values = [74.10, 74.50, 74.90, 74.30]
    assert lines(report(results, problems)) == [
        ["imagenet/resnet34_resnet18", "72.19", "77.25 (n = 1)", "+5.06"],
        [ROW, "74.44 ± 0.19", f"74.45 ± {statistics.stdev(values):.2f} (n = 4)", "+0.01"],
    ]


def test_runs_that_differ_are_listed_apart(tmp_path):
    from reproduce import collect, report

    write(tmp_path / "a", run(0.74))
    write(tmp_path / "b", run(0.01, differs=["data", "num_train_epochs"]))
    write(tmp_path / "c", run(0.5, row="own", paper={"top1": 0.6}))
    results, problems = collect([str(tmp_path)])
    assert lines(report(results, problems)) == [
        [ROW, "74.44 ± 0.19", "74.00 (n = 1)", "-0.44"],
        [ROW, "42", "1.00", "74.44", "data, num_train_epochs"],
        ["own", "42", "50.00", "60.00", "no row of this name"],
    ]
    results, _ = collect([str(tmp_path / "b")])
    assert "No run of a row as it is." in report(results, [])


def test_one_seed_counts_once(tmp_path):
    from reproduce import collect

    write(tmp_path / "a", run(0.74))
    write(tmp_path / "b", run(0.75))
    results, (problem,) = collect([str(tmp_path)])
    assert [result.top1 for result in results] == [74.0]
    assert (
        f"b/results.json is of {ROW} with seed 42 as {tmp_path.resolve()}/a/results.json is, and has another"
        in problem
    )


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ('{"row": "x", "stu', "is no JSON (Unterminated string"),
        ("[1, 2]", "is not of a run of a row (AttributeError"),
        ({"teacher": {"top1": 0.9}, "methods": {}}, "is not of a run of a row (KeyError: 'student')"),
        (run("high"), "is not of a run of a row (TypeError"),
        (run(74.4), "is not of a run of a row (ValueError: a top-1 of 74.4)"),
        ({"runs": [{}]}, "KeyError: 'student'"),
    ],
)
def test_what_is_no_result_is_left_out_and_said(tmp_path, capsys, content, says):
    from reproduce import main

    write(tmp_path / "a", content)
    write(tmp_path / "b", run(0.74))
    main([str(tmp_path)])
    said = capsys.readouterr()
    assert says in said.err and said.err.count("\n") == 1 and "a/results.json" in said.err
    assert lines(said.out)[0][2] == "74.00 (n = 1)" and says in said.out.partition("## Left out")[2]


def test_nothing_to_collect(tmp_path, capsys):
    from reproduce import main

    for places, says in (([tmp_path / "none"], "none does not exist"), ([tmp_path], "There is no result in")):
        with pytest.raises(SystemExit) as stopped:
            main([str(place) for place in places])
        assert stopped.value.code == 2 and says in capsys.readouterr().err


def test_figures_go_into_the_page_and_stay_there(tmp_path, monkeypatch, capsys):
    import make_configs
    import reproduce
    import table

    shutil.copy(ROOT / "recipes" / "README.md", tmp_path / "README.md")
    for module in (table, reproduce):
        monkeypatch.setattr(module, "MEASURED", tmp_path / "measured.yaml")
    monkeypatch.setattr(reproduce, "README", tmp_path / "README.md")
    write_seeds(tmp_path / "a", [run(0.7410, 1), run(0.7450, 2)])
    write(tmp_path / "b", run(0.1, row="cifar100/vgg13_vgg8/kd", differs=["data"]))
    reproduce.main([str(tmp_path / "a"), str(tmp_path / "b"), "--update", "--output", str(tmp_path / "table.md")])
    assert capsys.readouterr().out == "" and "74.30 ± 0.28 (n = 2)" in (tmp_path / "table.md").read_text()
    write(tmp_path / "c", run(0.7212, row="imagenet/resnet34_resnet18"))
    reproduce.main([str(tmp_path / "c"), "--update"])
    page = (tmp_path / "README.md").read_text()
    changed = [line for line in page.splitlines() if "(n = " in line]
    assert [line.split("|")[-2].strip() for line in changed] == ["72.12 (n = 1)", "74.30 ± 0.28 (n = 2)"]
    assert "[WTTM](configs/cifar100/vgg13_vgg8/wttm.yaml)" in changed[1]
    assert page == make_configs.page(table.read_table())
    assert yaml.safe_load((tmp_path / "measured.yaml").read_text())[ROW] == {"top1": 74.3, "std": 0.2828, "runs": 2}
