"""The comparison of all losses, shrunk to a few steps; what the repository shows of it."""

import json
import math
import shutil
from pathlib import Path

import pytest
import timm
import torch
import yaml

from hf_kd.data import DigitsDataset, load_digits


ROOT = Path(__file__).parents[2]
CONFIGS = ROOT / "recipes" / "configs" / "comparison"
# What the paper's tables compare, and what is built on them.
METHODS = ["ce", "kd", "dist", "dkd", "nkd", "ttm", "wttm", "crd", "itrd", "wttm_crd", "wttm_itrd"]


def shrunk(folder, name="digits", **changes):
    """The YAML with a small teacher and a few steps, in a file of the folder."""
    settings = yaml.safe_load((CONFIGS / f"{name}.yaml").read_text())
    settings["teacher"]["name"] = "cifar_resnet8"
    settings["teacher"]["training"].update(num_train_epochs=1, warmup_steps=0)
    settings["training"].update(max_steps=4, eval_steps=2, warmup_steps=0, per_device_train_batch_size=16)
    for method in settings["methods"].values():
        if method.get("feature_loss") == "crd":
            method["feature_loss_kwargs"] = {"nce_k": 8}
    settings.update(changes)
    path = folder / "small.yaml"
    path.write_text(yaml.safe_dump(settings, sort_keys=False))
    return path


DIGITS = {"kind": "digits", "split_seed": 0, "sizes": [200, 50, 50], "student_images_per_class": 4, "shift": 2}


@pytest.fixture(scope="module")
def compared(tmp_path_factory):
    """Every method with one seed: the folder."""
    import compare_losses

    folder = tmp_path_factory.mktemp("losses")
    config = shrunk(folder, data=DIGITS, seeds=[0])
    compare_losses.main(["--config", str(config), "--output_dir", str(folder / "out")])
    return folder / "out"


def test_every_method_is_trained_and_reported(compared):
    import comparison_report

    results = json.loads((compared / "results.json").read_text())
    assert list(results["runs"]) == METHODS
    table = (compared / "table.md").read_text()
    width = len("teacher (cifar_resnet8)")
    test = DigitsDataset(*load_digits(0, DIGITS["sizes"]).test)
    for name, runs in results["runs"].items():
        assert [run["seed"] for run in runs] == [0]
        assert [point["step"] for point in runs[0]["curve"]] == [2, 4]
        row = f"| {comparison_report.TITLES[name]:<{width}} | {100 * runs[0]['test']['top1']:.1f} "
        assert row in table, table
        # What is reported is what the saved student does.
        student = timm.create_model(f"local-dir:{compared / runs[0]['folder']}", pretrained=True).eval()
        with torch.no_grad():
            batch = test.__getitems__(range(50))
            nll = torch.nn.functional.cross_entropy(student(batch["pixel_values"]), batch["labels"]).item()
        assert runs[0]["test"]["nll"] == pytest.approx(nll, rel=1e-4), name
    # All began with the same weights and saw the same images: what differs is the objective.
    assert len({round(runs[0]["test"]["nll"], 6) for runs in results["runs"].values()}) == len(METHODS)
    for picture in ("methods.png", "curves.png"):
        assert (compared / picture).read_bytes().startswith(b"\x89PNG")


def test_each_run_trains_with_what_its_name_says(compared):
    results = json.loads((compared / "results.json").read_text())
    for name, runs in results["runs"].items():
        provenance = json.loads((compared / runs[0]["folder"] / "distillation.json").read_text())
        loss, _, feature = name.partition("_")
        loss, feature = ("ce", loss) if loss in ("crd", "itrd") else (loss, feature or None)
        assert (provenance["loss"], provenance["feature_loss"]) == (loss, feature)
        assert provenance["data"]["train_samples"] == 40


def test_a_second_launch_takes_what_is_done_and_trains_the_rest(compared, tmp_path, capsys):
    import compare_losses

    folder = shutil.copytree(compared.parent, tmp_path / "copy")
    before = json.loads((folder / "out" / "results.json").read_text())["runs"]
    (folder / "out" / before["kd"][0]["folder"] / "result.json").unlink()
    arguments = ["--config", str(folder / "small.yaml"), "--output_dir", str(folder / "out"), "--methods", "ce", "kd"]
    compare_losses.main(arguments)
    printed = capsys.readouterr().out
    assert printed.count("from an earlier launch") == 1 and "Training the teacher" not in printed
    after = json.loads((folder / "out" / "results.json").read_text())["runs"]
    assert [after[name][0]["test"] for name in ("ce", "kd")] == [before[name][0]["test"] for name in ("ce", "kd")]


def test_methods_are_drawn_where_they_landed(compared, tmp_path, monkeypatch):
    import comparison_report

    shown = []
    monkeypatch.setattr(comparison_report.plt, "close", shown.append)
    results = json.loads((compared / "results.json").read_text())
    comparison_report.draw_methods(results, tmp_path / "methods.png")
    (axis,) = shown[0].axes
    dots = [line.get_xdata() for line in axis.lines if line.get_marker() == "o"]
    expected = [[100 * run["test"]["top1"] for run in runs] for runs in results["runs"].values()]
    assert [list(values) for values in dots] == expected
    assert [label.get_text() for label in axis.get_yticklabels()][-1] == "WTTM + ITRD"


def test_on_cifar(tmp_path):
    import cifar_files
    import compare_losses

    names = ["cat", "dog"]
    train, test = (cifar_files.random_split(count, 2, seed=count) for count in (12, 6))
    cifar_files.write_image_folder(tmp_path / "data", train, test, names)
    data = {"kind": "cifar", "split_seed": 0, "source": "nowhere", "validation_images_per_class": 2}
    training = {"max_steps": 2, "eval_steps": 2, "per_device_train_batch_size": 4, "lr_milestones": [1]}
    config = shrunk(tmp_path, "cifar100", data=data, seeds=[0], training=training)
    methods = ["--methods", "ce", "dkd", "wttm_crd"]
    compare_losses.main(
        ["--config", str(config), "--output_dir", str(tmp_path / "out"), "--data", str(tmp_path / "data"), *methods]
    )
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert list(results["runs"]) == methods[1:]
    folder = tmp_path / "out" / results["runs"]["dkd"][0]["folder"]
    # Of the 12 training images, 2 of each class are for validation.
    assert json.loads((folder / "distillation.json").read_text())["data"]["train_samples"] == 8
    assert json.loads((folder / "config.json").read_text())["label_names"] == names
    assert all(math.isfinite(run["test"]["nll"]) for (run,) in results["runs"].values())


def test_the_search_tries_each_method_equally_often_and_once(tmp_path, capsys):
    import compare_losses

    config = shrunk(tmp_path, data=DIGITS)
    settings = yaml.safe_load(config.read_text())
    settings["training"].update(max_steps=1, eval_steps=1)
    settings["search"].update(trials=2)
    settings["search"]["methods"] = {name: settings["search"]["methods"][name] for name in ("ce", "wttm")}
    config.write_text(yaml.safe_dump(settings, sort_keys=False))
    arguments = ["--config", str(config), "--output_dir", str(tmp_path / "out"), "--search"]
    compare_losses.main(arguments)
    printed = capsys.readouterr().out
    lines = [json.loads(line) for line in (tmp_path / "out" / "search.jsonl").read_text().splitlines()]
    assert [line["method"] for line in lines] == ["ce", "ce", "wttm", "wttm"]
    best = max(lines[2:], key=lambda line: (line["top1"], -line["nll"]))["fields"]
    assert "wttm           best: " in printed and f"'temperature': {best['temperature']}" in printed
    # What has been tried is not tried again.
    compare_losses.main(arguments)
    assert len((tmp_path / "out" / "search.jsonl").read_text().splitlines()) == 4


def settings_of(name):
    return yaml.safe_load((CONFIGS / f"{name}.yaml").read_text())


@pytest.mark.parametrize("name", ["digits", "cifar100"])
def test_the_files_have_every_method(name):
    import comparison

    settings = settings_of(name)
    assert list(settings["methods"]) == METHODS
    comparison.check(settings, CONFIGS / f"{name}.yaml", Path("unused"))


def test_every_searched_setting_of_the_digits_is_one_that_the_search_could_find():
    settings = settings_of("digits")
    plan = settings["search"]
    assert list(plan["methods"]) == METHODS
    for name, method in settings["methods"].items():
        searched = dict(plan["methods"][name])
        for field, values in searched.pop("grid").items():
            assert method[field] in values, (name, field)
        assert method.items() >= searched.items()


def test_the_shown_result_is_of_these_settings():
    import comparison_report

    results = json.loads((ROOT / "docs" / "losses_results.json").read_text())
    settings = settings_of("digits")
    for section in ("data", "teacher", "student", "training", "seeds", "methods"):
        assert results["settings"][section] == settings[section], section
    assert comparison_report.table_of(results) in (ROOT / "docs" / "losses.md").read_text()


def test_the_shown_figures_are_of_these_settings():
    import comparison_report

    results = json.loads((ROOT / "docs" / "figures_results.json").read_text())
    settings = yaml.safe_load((ROOT / "recipes" / "configs" / "digits" / "figures.yaml").read_text())
    assert results["settings"] == settings
    quickstart = yaml.safe_load((ROOT / "recipes" / "configs" / "digits" / "wttm.yaml").read_text())
    assert all(settings[section] == quickstart[section] for section in ("data", "teacher", "student"))
    page = (ROOT / "docs" / "figures.md").read_text()
    for name in ("ttm", "wttm"):
        entropies = [run["test"]["entropy"] for run in results["runs"][name]]
        assert comparison_report.spread(entropies, digits=3) in page


@pytest.mark.parametrize(
    ("arguments", "change", "message"),
    [
        (["--data", "x"], {}, "--data is for CIFAR, and"),
        ([], {"data": {"kind": "svhn"}}, "data: kind must be one of digits, cifar, got 'svhn'"),
        ([], {"data": {"kind": "digits"}}, "must have kind, split_seed, sizes, student_images_per_class, shift"),
        (
            [],
            {"search": {"methods": {"ce": {"los": "ce"}}}},
            "unknown key 'los' under search: ce (did you mean loss?)",
        ),
        (["--methods", "wtmm"], {}, "--methods wtmm: "),
    ],
)
def test_mistakes_end_with_one_sentence(arguments, change, message, tmp_path, capsys):
    import compare_losses

    config = shrunk(tmp_path, **change)
    with pytest.raises(SystemExit) as stopped:
        compare_losses.main(["--config", str(config), "--output_dir", str(tmp_path / "out"), *arguments])
    assert stopped.value.code == 2
    assert message in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "out").exists()
