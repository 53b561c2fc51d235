"""The ImageNet recipe on real digits written as picture files and Parquet, launched as a user launches it."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import datasets
import numpy as np
import pytest
import timm
import torch
import yaml
from PIL import Image
from transformers import AutoModelForImageClassification

from hf_kd import create_student, save_student
from hf_kd.data import ImageFolderDataset, eval_transform, load_digits, load_image, load_image_tensor


ROOT = Path(__file__).parents[2]
RECIPE = ROOT / "recipes" / "imagenet_wttm.py"
ROWS = ROOT / "recipes" / "configs" / "imagenet"
CLASSES = {"nought": 0, "one": 1, "seven": 7}
SIZE = 32
TINY = {"channels": [8, 16, 16, 32], "stem_width": 8}
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}


@pytest.fixture
def recipe():
    import imagenet_wttm

    return imagenet_wttm


def parse(recipe, options):
    """The runs that a command line asks for."""
    from rows import parse

    return parse(recipe.RECIPE, [f"--{key}={value}" for key, value in options.items()])


def pictures(split, count):
    """`count` digits of each class as 64 x 48 pictures in colour: (class name, number, picture)."""
    for name, digit in CLASSES.items():
        for number, image in enumerate(split.images[split.labels == digit][:count]):
            canvas = Image.new("RGB", (64, 48))
            canvas.paste(Image.fromarray(image).convert("RGB").resize((48, 48)), (8, 0))
            yield name, number, canvas


def write_folder(folder, split, count):
    for name, number, picture in pictures(split, count):
        (folder / name).mkdir(parents=True, exist_ok=True)
        picture.save(folder / name / f"{number}.{'png' if number % 2 else 'jpg'}")


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """An image folder: train/ with 10 pictures of each of three classes, val/ with 5."""
    folder = tmp_path_factory.mktemp("images")
    splits = load_digits(0, (500, 100, 0))
    write_folder(folder / "train", splits.train, 10)
    write_folder(folder / "val", splits.validation, 5)
    return folder


@pytest.fixture(scope="module")
def teacher(images, tmp_path_factory):
    """A teacher's folder: trained on the very pictures, so that a wrong preprocessing shows in its top-1."""
    torch.manual_seed(0)
    network = create_student(
        "resnet10t", num_classes=3, img_size=SIZE, interpolation="bilinear", mean=[0.5] * 3, std=[0.25] * 3, **TINY
    )
    transform = eval_transform(SIZE, mean=[0.5] * 3, std=[0.25] * 3)
    samples = [s for part in ("train", "val") for s in ImageFolderDataset(images / part, transform)]
    batch = torch.stack([s["pixel_values"] for s in samples])
    labels = torch.tensor([s["labels"] for s in samples])
    optimiser = torch.optim.AdamW(network.parameters(), lr=0.01)
    for _ in range(40):
        loss = torch.nn.functional.cross_entropy(network(batch).logits, labels)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    with torch.no_grad():
        assert (network.eval()(batch).logits.argmax(-1) == labels)[30:].double().mean() >= 0.9
    folder = tmp_path_factory.mktemp("teacher")
    save_student(network, folder)
    return folder


@pytest.fixture(scope="module")
def parquet(tmp_path_factory):
    """A local copy of what a Hub data set looks like, with column names of its own."""
    folder = tmp_path_factory.mktemp("parquet")
    splits = load_digits(0, (500, 100, 0))
    features = datasets.Features({"img": datasets.Image(), "digit": datasets.ClassLabel(names=list(CLASSES))})
    for name, split, count in (("train", splits.train, 10), ("validation", splits.validation, 5)):
        rows = [{"img": picture, "digit": class_name} for class_name, _, picture in pictures(split, count)]
        datasets.Dataset.from_list(rows, features=features).to_parquet(folder / f"{name}-00000-of-00001.parquet")
    return folder


def arguments(folder, teacher, **options):
    """Options of a small run on the CPU, as the command line has them."""
    options = {
        "output_dir": folder,
        "teacher": teacher,
        "student": "resnet10t",
        "student_kwargs": json.dumps(TINY),
        "img_size": SIZE,
        "total_batch_size": 10,
        "num_train_epochs": 1,
        "dataloader_num_workers": 0,
        "logging_steps": 1,
        "use_cpu": True,
        "disable_tqdm": True,
        **options,
    }
    return [f"--{name}={value}" for name, value in options.items()]


def folders(images):
    return {"train_dir": images / "train", "val_dir": images / "val"}


def log_of(folder):
    state = json.loads((folder / "trainer_state.json").read_text())
    return [entry for entry in state["log_history"] if "distill" in entry]


@pytest.fixture(scope="module")
def launched(images, teacher, tmp_path_factory):
    """One run through `accelerate launch`, its settings from YAML and command line: its folder and its process."""
    folder = tmp_path_factory.mktemp("launched")
    (folder / "own.yaml").write_text(
        yaml.safe_dump({
            "gamma": 0.5, "beta": 2.0, "num_train_epochs": 2, "learning_rate": "1e-2", "lr_milestones": [1],
            "student": "resnet10t", "student_kwargs": TINY, "paper_top1": 72.0, "dataloader_num_workers": 0,
        })
    )  # fmt: skip
    command = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "1", str(RECIPE),
               "--config", str(folder / "own.yaml"), "--train_dir", str(images / "train"), "--val_dir",
               str(images / "val"), "--teacher", str(teacher), "--beta", "3", "--img_size", str(SIZE),
               "--per_device_train_batch_size", "5", "--total_batch_size", "10", "--logging_steps", "1",
               "--dataloader_num_workers", "1", "--teacher_metrics", "--hub_license", "cc0-1.0", "--output_dir",
               str(folder / "out"), "--use_cpu"]  # fmt: skip
    run = subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT, check=False, cwd=folder)
    return folder / "out", run


def test_a_launch_trains_and_reports(launched):
    folder, run = launched
    assert run.returncode == 0, run.stderr
    results = json.loads((folder / "results.json").read_text())
    assert results["teacher"]["top1"] >= 0.9
    student = results["student"]
    assert 0 <= student["top1"] <= student["top5"] == 1
    assert student["nll"] > 0 and 0 <= student["teacher_agreement"] <= 1
    assert (results["data"]["classes"], results["data"]["train_samples"]) == (3, 30)
    # The command line over the YAML over the recipe.
    objective = results["objective"]
    assert (
        objective.items() >= {"loss": "wttm", "gamma": 0.5, "temperature": 2.0, "beta": 3.0, "ce_weight": 1.0}.items()
    )
    settings, training = results["settings"], results["training"]
    assert (settings["learning_rate"], settings["weight_decay"], settings["momentum"]) == (0.01, 1e-4, 0.9)
    assert (training["total_batch_size"], training["per_device_train_batch_size"]) == (10, 5)
    assert (training["gradient_accumulation_steps"], training["steps_done"]) == (2, 6)
    assert results["paper"]["top1"] == 0.72 and "not measured" in results["paper"]["note"]
    assert {"data", "beta", "img_size", "total_batch_size"} <= set(results["this_run_differs_in"])
    assert "gamma" not in results["this_run_differs_in"]
    assert f"top-1 {100 * student['top1']:.2f} %" in run.stdout
    assert "the paper reports 72.00 %" in run.stdout

    log = log_of(folder)
    assert [entry["step"] for entry in log] == [1, 2, 3, 4, 5, 6]
    # The objective: CE and three times the distillation loss.
    for entry in log:
        assert entry["loss"] == pytest.approx(entry["ce"] + 3 * entry["distill"], rel=1e-4)
        assert entry["beta"] == 3
    # The step schedule: a tenth from the second epoch on.
    assert [entry["learning_rate"] for entry in log[-2:]] == pytest.approx([0.001, 0.001])
    assert sorted(path.name for path in folder.glob("checkpoint-*")) == ["checkpoint-3", "checkpoint-6"]


def test_the_saved_student_is_the_measured_one(launched, images):
    folder, _ = launched
    student = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    data = ImageFolderDataset(
        images / "val", timm.data.create_transform(**timm.data.resolve_data_config(model=student))
    )
    batch = torch.stack([sample["pixel_values"] for sample in data])
    again = AutoModelForImageClassification.from_pretrained(folder).eval()
    with torch.no_grad():
        logits = student(batch)
        # transformers leaves the weights where the file has them in memory, which changes the last bit.
        torch.testing.assert_close(again(batch).logits, logits, rtol=0, atol=1e-6)
    top1 = (logits.argmax(-1) == torch.tensor(data.labels)).double().mean().item()
    assert json.loads((folder / "results.json").read_text())["student"]["top1"] == pytest.approx(top1)
    assert [again.config.id2label[number] for number in range(3)] == sorted(CLASSES)
    # Inference prepares images as the evaluation did, whatever timm says of this architecture.
    assert student.pretrained_cfg["mean"] == pytest.approx((0.485, 0.456, 0.406))
    assert student.pretrained_cfg["interpolation"] == "bilinear"
    assert student.pretrained_cfg["crop_pct"] == pytest.approx(224 / 256, abs=0.02)
    card = (folder / "README.md").read_text()
    assert "license: cc0-1.0" in card and "WTTM" in card and "resnet10t" in card


def test_resuming_and_the_refusal_to_overwrite(recipe, images, teacher, tmp_path, capsys):
    folder = tmp_path / "out"
    settings = {**folders(images), "seed": 1}
    # Nothing to go on from yet: it begins.
    recipe.main(arguments(folder, teacher, resume_from_checkpoint="last", num_train_epochs=2, **settings))
    assert "the beginning" in capsys.readouterr().out
    whole = (folder / "model.safetensors").read_bytes()
    with pytest.raises(SystemExit) as stopped:
        recipe.main(arguments(folder, teacher, num_train_epochs=2, **settings))
    assert stopped.value.code == 2
    assert "checkpoint-6 of an earlier run" in capsys.readouterr().err

    for path in (folder / "checkpoint-6").iterdir():
        path.unlink()
    (folder / "checkpoint-6").rmdir()
    (folder / "model.safetensors").unlink()
    recipe.main(arguments(folder, teacher, resume_from_checkpoint="True", num_train_epochs=2, **settings))
    assert "Going on from" in (out := capsys.readouterr().out) and "checkpoint-3" in out
    assert (folder / "model.safetensors").read_bytes() == whole


def test_several_seeds_are_reported_as_mean_and_spread(recipe, images, teacher, tmp_path, capsys):
    folder = tmp_path / "out"
    options = {**folders(images), "seed": 3, "max_steps": 2, "paper_top1": 72, "paper_top1_std": 0.25}
    recipe.main(arguments(folder, teacher, seeds=2, **options))
    summary = json.loads((folder / "results.json").read_text())
    single = [json.loads((folder / f"seed{seed}" / "results.json").read_text()) for seed in (3, 4)]
    assert summary["seeds"] == [3, 4] and summary["runs"] == single
    one, other = (result["student"]["nll"] for result in single)
    assert one != other
    assert summary["mean"]["nll"] == pytest.approx((one + other) / 2)
    assert summary["std"]["nll"] == pytest.approx(abs(one - other) / 2**0.5)
    assert summary["paper"]["top1"] == 0.72 and summary["paper"]["top1_std"] == 0.0025
    assert "over 2 seeds; the paper reports 72.00 %" in capsys.readouterr().out
    # Each is what a run of that seed alone gives.
    recipe.main(arguments(tmp_path / "alone", teacher, **{**options, "seed": 4}))
    assert (tmp_path / "alone" / "model.safetensors").read_bytes() == (
        folder / "seed4" / "model.safetensors"
    ).read_bytes()

    # What is finished is taken as it is; the others go on.
    (folder / "seed4" / "results.json").unlink()
    first = (folder / "seed3" / "results.json").stat().st_mtime_ns
    capsys.readouterr()
    recipe.main(arguments(folder, teacher, seeds=2, resume_from_checkpoint="last", **options))
    assert (folder / "seed3" / "results.json").stat().st_mtime_ns == first
    assert json.loads((folder / "results.json").read_text())["mean"] == pytest.approx(summary["mean"])
    changed = {**options, "learning_rate": 0.5}
    with pytest.raises(SystemExit) as stopped:
        recipe.main(arguments(folder, teacher, seeds=2, resume_from_checkpoint="last", **changed))
    assert stopped.value.code == 2
    assert "is of a run with another learning_rate (0.1, now 0.5)" in capsys.readouterr().err


def test_parquet_by_data_set_name(recipe, parquet, teacher, tmp_path):
    columns = {"image_column": "img", "label_column": "digit"}
    recipe.main(arguments(tmp_path / "out", teacher, dataset_name=parquet, max_steps=2, **columns))
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert (results["data"]["classes"], results["training"]["steps_done"]) == (3, 2)
    assert results["data"]["train_samples"] == 30
    assert results["teacher"]["top1"] >= 0.9
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["label_names"] == list(CLASSES)


@pytest.mark.slow
def test_a_stream_by_plain_python(parquet, teacher, tmp_path):
    columns = {"image_column": "img", "label_column": "digit"}
    # Unshuffled: `datasets` sleeps for 5 seconds at each end of a shuffled stream.
    stream = {"dataset_name": parquet, "streaming": True, "shuffle_buffer": 0, "train_samples": 30, **columns}
    options = arguments(tmp_path / "out", teacher, max_steps=4, **stream)
    run = subprocess.run(
        [sys.executable, str(RECIPE), *options], capture_output=True, text=True, env=ENVIRONMENT, check=False
    )
    assert run.returncode == 0, run.stderr
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert results["training"]["steps_done"] == 4
    assert results["data"]["train_samples"] == 30
    assert len(log_of(tmp_path / "out")) == 4


def test_the_default_is_the_papers_first_row(recipe, images, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    # The one place where data are found without being named.
    (tmp_path / "imagenet").symlink_to(images)
    (run,) = parse(recipe, {})
    config = run.config
    assert (run.arguments.teacher, run.arguments.student) == ("resnet34.tv_in1k", "resnet18")
    assert (run.arguments.train_dir, run.arguments.val_dir) == ("imagenet/train", "imagenet/val")
    assert (config.loss, config.gamma, config.beta, config.ce_weight) == ("wttm", 0.8, 1.6, 1.0)
    assert (config.learning_rate, config.weight_decay, config.max_grad_norm) == (0.1, 1e-4, 0.0)
    assert config.optim == "sgd" and config.optim_args == "momentum=0.9,nesterov=False"
    assert config.decay_all_parameters is True
    assert (config.num_train_epochs, config.lr_milestones, config.lr_decay) == (100, [30, 60, 90], 0.1)
    assert (config.per_device_train_batch_size, config.gradient_accumulation_steps) == (256, 1)
    assert config.output_dir == "outputs/imagenet_resnet34_resnet18"
    assert config.dataloader_num_workers >= 1 and config.dataloader_persistent_workers
    assert run.changed == [] and run.arguments.paper_top1 == 72.19
    train, val = recipe.build_data(run.arguments, config)
    assert train[0]["pixel_values"].shape == val[0]["pixel_values"].shape == (3, 224, 224)
    # Evaluation: the 64 x 48 picture with its shorter side at 256, the centre 224.
    resized = val.image(0).resize((341, 256), Image.Resampling.BILINEAR).crop((58, 16, 58 + 224, 16 + 224))
    assert (train._load, val._load) == (load_image_tensor, load_image)
    # Bytes, which the trainer normalises by what the student says of itself.
    view = val[0]["pixel_values"]
    assert train[0]["pixel_values"].dtype == view.dtype == torch.uint8
    assert np.abs(view.permute(1, 2, 0).numpy() - np.asarray(resized).astype(float)).max() <= 1
    assert (run.arguments.preprocessing["mean"], run.arguments.preprocessing["std"]) == (
        (0.485, 0.456, 0.406),
        (0.229, 0.224, 0.225),
    )


def test_data_may_be_kept_in_memory(recipe, images, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "imagenet").symlink_to(images)
    (read,), (kept,) = parse(recipe, {}), parse(recipe, {"in_memory": True})
    assert kept.changed == []
    for one, other in zip(*(recipe.build_data(run.arguments, run.config) for run in (read, kept)), strict=True):
        assert torch.equal(one[0]["pixel_values"], other[0]["pixel_values"])
        assert one._decoded is None and other._decoded.nbytes > 0


# The paper's §5 and appendix: teacher, student, gamma, beta, top-1 of WTTM.
PAPER = {
    "resnet34_resnet18": ("resnet34.tv_in1k", "resnet18", 0.8, 1.6, 72.19),
    "resnet50_mobilenet": ("resnet50.tv_in1k", "mobilenetv1_100", 0.7, 3.5, 73.09),
    "resnet50_resnet18": ("resnet50.tv_in1k", "resnet18", 0.8, 1.6, 72.26),
    "resnet101_resnet18": ("resnet101.tv_in1k", "resnet18", 0.8, 1.6, 72.34),
    "resnet152_resnet18": ("resnet152.tv_in1k", "resnet18", 0.8, 1.6, 72.39),
}


def test_every_row_has_a_file():
    assert {path.stem for path in ROWS.glob("*.yaml")} == PAPER.keys()


@pytest.mark.parametrize("name", PAPER)
def test_row(recipe, name, images, tmp_path):
    teacher, student, gamma, beta, top1 = PAPER[name]
    path = ROWS / f"{name}.yaml"
    options = {**folders(images), "config": path, "output_dir": tmp_path, "use_cpu": True}
    (run,) = parse(recipe, options)
    assert (run.arguments.teacher, run.arguments.student) == (teacher, student)
    assert (run.config.loss, run.config.gamma, run.config.beta) == ("wttm", gamma, beta)
    assert run.arguments.paper_top1 == top1 and "paper" in path.read_text().partition("teacher:")[0]
    assert timm.is_model(student) and teacher in timm.list_pretrained()
    assert timm.get_pretrained_cfg(teacher).interpolation == "bilinear"


def test_the_command_line_replaces_the_other_way_to_say_it(recipe, images, tmp_path):
    options = {**folders(images), "output_dir": tmp_path, "temperature": 4, "lr_scheduler_type": "cosine"}
    (run,) = parse(recipe, options)
    assert run.config.gamma == 0.25
    assert run.config.lr_milestones is None
    assert run.changed == ["temperature", "lr_scheduler_type"]
    (run,) = parse(recipe, {**folders(images), "output_dir": tmp_path, "beta": "auto"})
    assert run.config.beta == "auto"


@pytest.mark.parametrize(
    ("given", "shared"),
    [
        ((256, 1, None, None, False), (256, 256, 1)),
        ((256, 8, None, None, False), (256, 32, 1)),
        ((256, 2, 32, None, False), (256, 32, 4)),
        ((256, 4, None, 2, False), (256, 32, 2)),
        ((256, 2, 16, 2, False), (64, 16, 2)),
        ((64, 2, 16, 2, True), (64, 16, 2)),
    ],
)
def test_shared_batch(given, shared):
    from common import share_batch

    total, processes, per_device, accumulation, total_given = given
    assert share_batch(total, processes, per_device, accumulation, total_given=total_given) == shared


def test_yaml_values_are_checked_and_converted(recipe, tmp_path):
    (tmp_path / "own.yaml").write_text(
        "learning_rate: 1e-3\nbeta: auto\nbf16: true\nlr_milestones: null\nteacher_class_map: [0, [1, 2]]\n"
        "student_kwargs: {drop_rate: 0.1}\nmax_steps: -1\n"
    )
    assert recipe.RECIPE.parser().read_yaml(tmp_path / "own.yaml") == {
        "learning_rate": 0.001, "beta": "auto", "bf16": True, "lr_milestones": None, "teacher_class_map": [0, [1, 2]],
        "student_kwargs": {"drop_rate": 0.1}, "max_steps": -1,
    }  # fmt: skip


MISTAKES = {
    "no data": ({"train_dir": None, "val_dir": None}, "no images to train on: give --train_dir and --val_dir"),
    "one folder": ({"val_dir": None}, "together, got only --train_dir"),
    "both sources": ({"dataset_name": "x/y"}, "either folders or --dataset_name"),
    "stream in memory": (
        {"dataset_name": "{parquet}", "train_dir": None, "val_dir": None, "streaming": True, "in_memory": True},
        "`in_memory` keeps every picture, and a stream is read as it comes",
    ),
    "missing folder": ({"train_dir": "nowhere/train"}, "nowhere/train does not exist"),
    "other classes": ({"val_dir": "other"}, "only {images}/train has 'seven'; only other has 'eight'"),
    "class count": ({"num_classes": 7}, "have 3 classes, not the 7 of --num_classes"),
    "argument": ({"gama": 1}, "no argument --gama (did you mean --gamma?)"),
    "value": ({"gamma": "high"}, "--gamma: invalid float value: 'high'"),
    "range": ({"gamma": 0}, "`gamma` must be in (0, 1]"),
    "loss": ({"loss": "wtm"}, "Did you mean 'wttm'?"),
    "yaml key": ({"config": "typo.yaml"}, "typo.yaml has the unknown key 'studnet' (did you mean student?)"),
    "yaml value": ({"config": "value.yaml"}, "value.yaml: argument --learning_rate"),
    "no yaml": ({"config": "none.yaml"}, "--config none.yaml does not exist; beside it are typo.yaml, value.yaml"),
    "batch": ({"total_batch_size": 256, "per_device_train_batch_size": 48}, "per_device_train_batch_size 48"),
    "batch product": ({"per_device_train_batch_size": 4, "gradient_accumulation_steps": 4}, "are 16: leave one of"),
    "teacher name": ({"teacher": "resnet43"}, "knows no model 'resnet43'. Did you mean resnet"),
    "teacher folder": ({"teacher": "./nowhere"}, "./nowhere does not exist"),
    "teacher's classes": ({"teacher": "{four}"}, "The student has 3 classes and the teacher"),
    "student name": ({"student": "resnet81"}, "knows no model 'resnet81'. Did you mean resnet18"),
    "student kwargs": ({"student_kwargs": '{"chanels": 3}'}, "do not fit resnet10t"),
    "student json": ({"student_kwargs": "channels=3"}, "`student_kwargs` must be a JSON object"),
    "checkpoint": ({"resume_from_checkpoint": "nowhere"}, "nowhere is not a checkpoint"),
    "seeds": ({"seeds": 0}, "`seeds` must be at least 1, got 0"),
    "stream of files": ({"streaming": True}, "--streaming is for --dataset_name"),
    "length of stream": (
        {"train_dir": None, "val_dir": None, "dataset_name": "{parquet}", "streaming": True, "image_column": "img",
         "label_column": "digit"}, "give --train_samples",
    ),
    "column": (
        {"train_dir": None, "val_dir": None, "dataset_name": "{parquet}", "image_column": "imgs"}, "no column 'imgs'"
    ),
    "data set": ({"train_dir": None, "val_dir": None, "dataset_name": "./nowhere"}, "Cannot load split 'train'"),
}  # fmt: skip


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_end_with_one_sentence(recipe, name, images, teacher, parquet, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    Path("typo.yaml").write_text("studnet: resnet18\n")
    Path("value.yaml").write_text("learning_rate: [0.1, 0.2]\n")
    for class_name in ("eight", "nought", "one"):
        (tmp_path / "other" / class_name).mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(tmp_path / "other" / class_name / "1.png")
    options, message = MISTAKES[name]
    options = {**folders(images), **options}
    if options.get("teacher") == "{four}":
        save_student(create_student("resnet10t", num_classes=4, img_size=SIZE, **TINY), tmp_path / "four")
        options["teacher"] = tmp_path / "four"
    if options.get("dataset_name") == "{parquet}":
        # A copy that nothing has counted the rows of: what `datasets` has once converted it remembers.
        options["dataset_name"] = shutil.copytree(parquet, tmp_path / "parquet")
    options = {key: value for key, value in options.items() if value is not None}
    with pytest.raises(SystemExit) as stopped:
        recipe.main(arguments(tmp_path / "out", options.pop("teacher", teacher), **options))
    assert stopped.value.code == 2
    error = capfd.readouterr().err
    assert message.format(images=images) in error
    assert "Traceback" not in error
    sentences = [line for line in error.splitlines() if "error:" in line]
    assert len(sentences) == 1
    assert not (tmp_path / "out" / "results.json").exists()


def test_processes_that_do_not_divide_the_batch(recipe, images, monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "3")
    options = [f"--{key}={value}" for key, value in folders(images).items()]
    with pytest.raises(SystemExit) as stopped:
        recipe.main(options)
    assert stopped.value.code == 2
    assert "`total_batch_size` 256 cannot be shared equally by 3 processes: make it a multiple of 3" in (
        capsys.readouterr().err
    )


def test_no_data_ends_a_plain_run_at_once(tmp_path):
    run = subprocess.run(
        [sys.executable, str(RECIPE)], capture_output=True, text=True, env=ENVIRONMENT, check=False, cwd=tmp_path
    )
    assert run.returncode == 2
    assert run.stderr.count("\n") == 1 and "ILSVRC/imagenet-1k" in run.stderr
    assert list(tmp_path.iterdir()) == []
