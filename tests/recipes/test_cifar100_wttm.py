"""The CIFAR-100 recipe on a few random images, with teachers in the files that the CRD protocol publishes."""

import hashlib
import json
import re
import shlex
import shutil
from pathlib import Path

import pytest
import timm
import torch
import yaml
from cifar_files import random_split, write_image_folder, write_python
from file_server import serving
from safetensors.torch import load_file

import hf_kd.models.cifar  # noqa: F401 - registers the networks
from hf_kd.data import CifarDataset, load_cifar


ROOT = Path(__file__).parents[2]
ROWS = ROOT / "recipes" / "configs" / "cifar100"
FIRST = ROWS / "wrn_40_2_wrn_16_2"
CLASSES = [f"class{number:02}" for number in range(100)]
METHODS = sorted(path.stem for path in FIRST.glob("*.yaml"))
# For the rows of one pair, a student of some hundred parameters and few negatives.
SMALL = {"student": "cifar_resnet8", "student_kwargs": '{"widths": [4, 4, 4, 8]}', "teacher": "cifar_resnet8"}


@pytest.fixture
def recipe():
    import cifar100_wttm

    return cifar100_wttm


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A folder as the authors' archive unpacks to, with 20 random images to train on and 10 to test."""
    folder = tmp_path_factory.mktemp("cifar")
    return write_python(folder, random_split(20, 100), random_split(10, 100, seed=1), CLASSES)


def write_checkpoint(path, name):
    """A file like the published ones: the weights under "model", beside other entries."""
    torch.manual_seed(5)
    path.parent.mkdir(parents=True, exist_ok=True)
    network = timm.create_model(name, num_classes=100)
    torch.save({"epoch": 240, "model": network.state_dict(), "accuracy": torch.tensor(75.6)}, path)
    return path


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("teacher") / "ckpt_epoch_240.pth", "cifar_resnet8")


def arguments(data, folder, **options):
    options = {
        "data": data, "output_dir": folder, "total_batch_size": 10, "num_train_epochs": 1, "logging_steps": 1,
        "use_cpu": True, "disable_tqdm": True, **options,
    }  # fmt: skip
    return [f"--{name}={value}" for name, value in options.items() if value is not None]


def parse(recipe, *options):
    from rows import parse

    return parse(recipe.RECIPE, options)


def log_of(folder):
    return [e for e in json.loads((folder / "trainer_state.json").read_text())["log_history"] if "loss" in e]


# ---- Arguments -----------------------------------------------------------------------------------------------------


def test_the_default_is_the_papers_first_row(recipe, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    (run,) = parse(recipe)
    assert run.row == "cifar100/wrn_40_2_wrn_16_2/wttm" and run.changed == []
    assert run.arguments.source == "uoft-cs/cifar100" and run.arguments.card["dataset_tags"] == "uoft-cs/cifar100"
    assert (run.arguments.teacher, run.arguments.student) == ("cifar_wrn_40_2", "cifar_wrn_16_2")
    assert (run.config.loss, run.config.gamma, run.config.beta) == ("wttm", 0.1, 4)
    assert (run.config.per_device_train_batch_size, run.config.gradient_accumulation_steps) == (64, 1)
    assert run.config.output_dir == "outputs/cifar100/wrn_40_2_wrn_16_2/wttm"
    assert run.config.dataloader_num_workers == 0
    assert list(tmp_path.iterdir()) == []


def test_what_makes_another_row(recipe, tmp_path):
    same = ("--teacher_checkpoint=a.pth", "--per_device_train_batch_size=16", "--gradient_accumulation_steps=4")
    (run,) = parse(recipe, *same, "--data=elsewhere", "--bf16=False", f"--output_dir={tmp_path}")
    assert run.changed == []
    (run,) = parse(
        recipe, "--teacher=own", "--learning_rate=0.1", "--total_batch_size=128", f"--output_dir={tmp_path}"
    )
    assert run.changed == ["learning_rate", "teacher", "total_batch_size"]
    assert [run.config.seed for run in parse(recipe, "--seeds=5")] == [42, 43, 44, 45, 46]


def test_the_commands_that_are_shown_are_ones_that_it_takes(recipe, monkeypatch):
    monkeypatch.chdir(ROOT)
    shown = "\n".join(
        [*((ROOT / page).read_text() for page in ("README.md", "recipes/README.md")), recipe.__doc__]
    ).replace("\\\n", " ")
    commands = set(re.findall(r"^ *accelerate launch (recipes/cifar100_wttm.py .*)$", shown, flags=re.MULTILINE))
    assert len(commands) == 8
    for command in commands:
        script, *options = shlex.split(command.replace("PAIR/METHOD", "vgg13_vgg8/wttm"))
        runs = parse(recipe, *options)
        assert (ROOT / script).is_file() and runs[0].row.startswith("cifar100/")


# ---- Rows ----------------------------------------------------------------------------------------------------------


def take_two_steps(recipe, options):
    """Builds a row's networks and loss and trains on two batches: the entries of its log, and the trainer."""
    (run,) = parse(recipe, *options)
    trainer = recipe.build_trainer(run.arguments, run.config)
    before = [parameter.detach().clone() for parameter in trainer.model.parameters()]
    trainer.train()
    log = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert trainer.state.global_step == len(log) == 2
    assert all(torch.isfinite(torch.tensor(entry["loss"])) and entry["grad_norm"] > 0 for entry in log)
    changed = [not torch.equal(old, new) for old, new in zip(before, trainer.model.parameters(), strict=True)]
    assert all(changed)
    return log, trainer


QUICK = {"max_steps": 2, "eval_strategy": "no", "save_strategy": "no", "teacher_preflight": False}


@pytest.mark.parametrize("method", METHODS)
def test_each_method_takes_two_steps(recipe, data, checkpoint, tmp_path, method):
    row = yaml.safe_load((FIRST / f"{method}.yaml").read_text())
    options = {**SMALL, **QUICK, "config": FIRST / f"{method}.yaml"}
    if method == "ce":
        del options["teacher"]
    else:
        options["teacher_checkpoint"] = checkpoint
    if "nce_k" in row.get("feature_loss_kwargs", {}):
        options["feature_loss_kwargs"] = json.dumps({**row["feature_loss_kwargs"], "nce_k": 8})
    log, trainer = take_two_steps(recipe, arguments(data, tmp_path, **options))
    for entry in log:
        total = row.get("ce_weight", 1) * entry.get("ce", 0) + row.get("beta", 0) * entry.get("distill", 0)
        total += row.get("feature_weight", 0) * entry.get("feature", 0)
        assert entry["loss"] == pytest.approx(total, rel=1e-4)
    assert ("ce" in log[0]) == (method != "wttm_no_labels")
    assert ("distill" in log[0]) == (method not in ("ce", "crd", "itrd"))
    assert ("feature" in log[0]) == method.endswith(("crd", "itrd"))
    assert (trainer.teacher is None) == (method == "ce")
    assert trainer.train_dataset.augment and not trainer.eval_dataset.augment


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """A file for each of the rows' teachers."""
    from cifar100_wttm import PUBLISHED

    folder = tmp_path_factory.mktemp("teachers")
    return {name: write_checkpoint(folder / f"{name}.pth", name) for name in PUBLISHED}


@pytest.mark.slow
@pytest.mark.parametrize("row", sorted(ROWS.rglob("*.yaml")), ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_each_row_takes_two_steps(recipe, data, checkpoints, tmp_path, row):
    values = yaml.safe_load(row.read_text())
    checkpoint = checkpoints.get(values.get("teacher"))
    options = {**QUICK, "config": row, "total_batch_size": 8, "teacher_checkpoint": checkpoint}
    _, trainer = take_two_steps(recipe, arguments(data, tmp_path, **options))
    provenance = trainer.provenance()
    assert provenance["student"]["architecture"] == values["student"]
    assert (provenance["teacher"] or {}).get("id") == values.get("teacher")


# ---- Whole runs ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(data, checkpoint, tmp_path_factory):
    """A row with a memory, for two epochs."""
    import cifar100_wttm

    folder = tmp_path_factory.mktemp("finished") / "out"
    cifar100_wttm.main(whole(data, checkpoint, folder))
    return folder


def whole(data, checkpoint, folder, **options):
    row = FIRST / "wttm_crd.yaml"
    own = {"num_train_epochs": 2, "teacher_checkpoint": checkpoint, "feature_loss_kwargs": '{"nce_k": 8}'}
    return arguments(data, folder, **{**SMALL, **own, "config": row, **options})


def test_a_run_and_its_results(finished, data, checkpoint):
    results = json.loads((finished / "results.json").read_text())
    assert results["row"] == "cifar100/wrn_40_2_wrn_16_2/wttm_crd"
    assert set(results["this_run_differs_in"]) == {
        "num_train_epochs", "teacher", "student", "student_kwargs", "feature_loss_kwargs", "total_batch_size", "data"
    }  # fmt: skip
    assert (results["paper"]["top1"], results["paper"]["top1_std"]) == (0.7661, 0.0024)
    assert (results["data"]["classes"], results["data"]["train_samples"]) == (100, 20)
    teacher = timm.create_model("cifar_resnet8", num_classes=100).eval()
    teacher.load_state_dict(torch.load(checkpoint, weights_only=True)["model"])
    test = CifarDataset(load_cifar(data, split="test")).__getitems__(range(10))
    with torch.no_grad():
        right = teacher(test["pixel_values"]).argmax(dim=-1) == test["labels"]
    assert results["teacher"]["id"] == "cifar_resnet8" and results["teacher"]["top1"] is not None
    assert results["teacher"]["top1"] == pytest.approx(right.double().mean().item())
    assert results["teacher"]["checkpoint_sha256"] == hashlib.sha256(checkpoint.read_bytes()).hexdigest()
    assert (results["objective"]["gamma"], results["objective"]["feature_weight"]) == (0.1, 0.8)
    assert results["training"]["steps_done"] == len(log_of(finished)) == 4
    student = timm.create_model(f"local-dir:{finished}", pretrained=True).eval()
    assert student.num_classes == 100
    card = (finished / "README.md").read_text()
    assert "cifar-100-python" in card and "hf_kd.models.cifar" in card


def test_resuming_goes_on_to_the_last_bit(recipe, finished, data, checkpoint, tmp_path, capsys):
    folder = tmp_path / "out"
    shutil.copytree(finished / "checkpoint-2", folder / "checkpoint-2")
    recipe.main(whole(data, checkpoint, folder, resume_from_checkpoint="last"))
    assert "checkpoint-2" in capsys.readouterr().out
    weights, again = (load_file(path / "model.safetensors") for path in (finished, folder))
    assert all(torch.equal(weights[name], again[name]) for name in weights | again)


def test_seeds_and_their_place_in_the_paper_s_table(recipe, data, tmp_path, capsys):
    from reproduce import collect, report

    options = {**SMALL, "config": FIRST / "ce.yaml", "seeds": 2, "max_steps": 1, "teacher": None}
    recipe.main(arguments(data, tmp_path / "out", **options))
    assert "over 2 seeds; the paper reports 73.26 % for cifar100/wrn_40_2_wrn_16_2/ce (this run" in (
        capsys.readouterr().out
    )
    results, problems = collect([str(tmp_path)])
    assert [result.seed for result in results] == [42, 43] and problems == []
    assert "cifar100/wrn_40_2_wrn_16_2/ce | 42 | " in report(results, problems)


def test_the_published_teacher_is_fetched_once(recipe, data, tmp_path, capsys):
    content = write_checkpoint(tmp_path / "teacher.pth", "cifar_resnet56").read_bytes()
    digest = hashlib.sha256(content).hexdigest()
    row = ROWS / "resnet56_resnet20" / "wttm.yaml"
    common = {**QUICK, "config": row, "student": "cifar_resnet8", "student_kwargs": SMALL["student_kwargs"]}
    common |= {"max_steps": 1, "fetch_teacher": True, "teacher_cache": tmp_path / "cache", "total_batch_size": 2}
    with serving({"/repo/resnet56_vanilla/ckpt_epoch_240.pth": content}) as (url, asked):
        for number, options in enumerate(({}, {"teacher_sha256": digest})):
            (run,) = parse(
                recipe, *arguments(data, tmp_path / str(number), teacher_url=f"{url}/repo", **common, **options)
            )
            trainer = recipe.build_trainer(run.arguments, run.config)
            said = capsys.readouterr().out
            assert digest in said and ("over plain http" in said) == (number == 0)
            assert ("not compared" in said) == (number == 0)
    assert asked == ["/repo/resnet56_vanilla/ckpt_epoch_240.pth"]
    weights = torch.load(tmp_path / "teacher.pth", weights_only=True)["model"]
    assert all(torch.equal(weights[name], value) for name, value in trainer.teacher.model.state_dict().items())


def test_a_teacher_of_ones_own(recipe, data, tmp_path):
    folder = tmp_path / "teacher"
    ce = {"config": FIRST / "ce.yaml", "student": "cifar_resnet8", "max_steps": 1, "save_strategy": "no"}
    recipe.main(arguments(data, folder, **ce))
    _, trainer = take_two_steps(
        recipe, arguments(data, tmp_path / "out", **{**SMALL, **QUICK, "teacher": folder, "gamma": 0.5})
    )
    weights = load_file(folder / "model.safetensors")
    assert all(torch.equal(weights[name], value) for name, value in trainer.teacher.model.state_dict().items())


MISTAKES = {
    "no weights": (
        {"teacher_checkpoint": None, "teacher": "cifar_vgg13"},
        "The teacher cifar_vgg13 needs weights: --fetch_teacher fetches "
        "http://shape2prog.csail.mit.edu/repo/vgg13_vanilla/ckpt_epoch_240.pth; or give its weights as",
    ),
    "not published": ({"teacher_checkpoint": None, "fetch_teacher": True}, "cifar_resnet8 has no published weights"),
    "no teacher": ({"config": FIRST / "ce.yaml", "loss": "kd", "teacher": None}, "its row names none: give --teacher"),
    "no such file": ({"teacher_checkpoint": "none.pth"}, "The teacher's checkpoint none.pth does not exist"),
    "other network": ({"teacher": "cifar_resnet14"}, "does not fit cifar_resnet14"),
    "code in the file": ({"teacher_checkpoint": "code.pth"}, "could not be read as plain weights"),
    "digest": ({"teacher_sha256": "0" * 64}, f"not the {'0' * 64} asked for"),
    "no server": (
        {"teacher_checkpoint": None, "teacher": "cifar_vgg13", "fetch_teacher": True,
         "teacher_url": "http://127.0.0.1:9", "teacher_cache": "cache"},
        "http://127.0.0.1:9/vgg13_vanilla/ckpt_epoch_240.pth could not be fetched",
    ),
    "no data": ({"data": "./nowhere"}, "The CIFAR folder nowhere does not exist"),
    "no CIFAR": ({"data": "other"}, "other holds no CIFAR data"),
    "other classes": ({"data": "pictures"}, "The student has 3 classes and the teacher"),
    "column": ({"config": FIRST / "none.yaml"}, "none.yaml does not exist; beside it are ce.yaml, crd.yaml"),
    "argument": ({"dataset": "cifar"}, "There is no argument --dataset"),
}  # fmt: skip


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_end_with_one_sentence(recipe, name, data, checkpoint, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    Path("other").mkdir()
    torch.save({"model": recipe.CifarArguments}, "code.pth")
    write_image_folder("pictures", random_split(6, 3), random_split(3, 3), CLASSES[:3])
    options, message = MISTAKES[name]
    options = {**SMALL, **QUICK, "teacher_checkpoint": checkpoint, **options}
    with pytest.raises(SystemExit) as stopped:
        recipe.main(arguments(options.pop("data", data), tmp_path / "out", **options))
    assert stopped.value.code == 2
    error = capfd.readouterr().err
    assert message in error and "Traceback" not in error
    assert len([line for line in error.splitlines() if "error:" in line]) == 1
    assert not (tmp_path / "out" / "results.json").exists() and not list(tmp_path.glob("cache/*/*"))


def test_one_cache_of_the_teacher_serves_all_seeds(recipe, data, checkpoint, tmp_path, capsys):
    cache = {"teacher_cache_dir": tmp_path / "cache", "teacher_cache_views": 1, "seeds": 2}
    options = {**SMALL, **QUICK, "config": FIRST / "wttm.yaml", "teacher_checkpoint": checkpoint, **cache}
    recipe.main([*arguments(data, tmp_path / "ahead", **options), "--cache_teacher"])
    assert capsys.readouterr().out.endswith(f"{tmp_path / 'cache'}: 20 rows of teacher logits computed.\n")
    runs = parse(recipe, *arguments(data, tmp_path / "runs", **options))
    assert [run.config.seed for run in runs] == [42, 43] and "teacher_cache_views" in runs[0].changed
    for run in runs:
        trainer = recipe.build_trainer(run.arguments, run.config)
        trainer.train()
        assert trainer.train_dataset.seed == 42 and not trainer.teacher.is_built
