"""`hf-kd cache-teacher CONFIG` computes the rows that a training run then reads."""

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from processes import run_processes
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from tiny import config

from hf_kd import DistillationTrainer, create_student, save_student
from hf_kd.cli import main
from hf_kd.data import load_image_dataset, train_transform


SIZE = 32


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A teacher, eleven pictures and a configuration."""
    torch.manual_seed(0)
    place = tmp_path_factory.mktemp("command")
    save_student(create_student("test_resnet", num_classes=2, img_size=SIZE), place / "teacher")
    generator = np.random.default_rng(0)
    for name, count in (("ant", 6), ("bee", 5)):
        (place / "train" / name).mkdir(parents=True)
        for number in range(count):
            pixels = generator.integers(0, 256, (40, 48, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(place / "train" / name / f"{number}.png")
    values = {
        "teacher": str(place / "teacher"),
        "train_dir": str(place / "train"),
        "img_size": SIZE,
        "teacher_cache_views": 2,
        "per_device_eval_batch_size": 4,
        "use_cpu": True,
        # What a recipe's row has beside.
        "student": "resnet18",
        "loss": "wttm",
        "beta": "auto",
        "paper_top1": 70.0,
    }
    (place / "cache.yaml").write_text(yaml.safe_dump(values))
    return place


def train_from(place, cache, **of_transform):
    """A training run as a script of one's own sets it up."""
    images = {"img_size": SIZE, "mean": IMAGENET_DEFAULT_MEAN, "std": IMAGENET_DEFAULT_STD}
    student = create_student("test_resnet", num_classes=2, **images)
    data = load_image_dataset(place / "train", transform=train_transform(SIZE, **of_transform), seed=42)
    args = config(cache.parent / "out", teacher_cache_dir=str(cache), teacher_cache_views=2, num_train_epochs=3)
    trainer = DistillationTrainer(student, str(place / "teacher"), args, train_dataset=data)
    trainer.train()
    return trainer


def test_a_run_reads_what_the_command_computed(place, tmp_path, capsys):
    cache = tmp_path / "cache"
    arguments = ["cache-teacher", str(place / "cache.yaml"), "--teacher_cache_dir", str(cache)]
    assert main(arguments) == 0
    said = f"{cache}: 22 rows computed; it has 2 view(s) of 11 samples, 2 classes, fp16.\n"
    assert capsys.readouterr().out == said
    assert main(arguments) == 0
    assert capsys.readouterr().out == said.replace("22 rows", "0 rows")
    assert not train_from(place, cache).teacher.is_built
    # Nothing but the cache is there.
    assert sorted(path.name for path in cache.iterdir()) == [
        ".lock",
        "manifest.json",
        "rows-00000.bin",
        "rows-00001.bin",
    ]


def test_images_may_come_as_bytes(place, tmp_path):
    arguments = ["cache-teacher", str(place / "cache.yaml"), "--teacher_cache_dir", str(tmp_path / "cache")]
    assert main([*arguments, "--normalize", "False"]) == 0
    with pytest.raises(ValueError, match="was made for another transform"):
        train_from(place, tmp_path / "cache")
    trainer = train_from(place, tmp_path / "cache", normalize=False)
    assert not trainer.teacher.is_built
    # The teacher saw normalised floats.
    cache, data = trainer.replay.cache, trainer.train_dataset
    data.set_epoch(1)
    images = trainer._prepare_inputs({"pixel_values": data[4]["pixel_values"][None]})
    torch.testing.assert_close(trainer.teacher(**images), cache.read(1, torch.tensor([4]))[0], rtol=1e-3, atol=1e-3)


def call(rank, arguments):
    return main(arguments)


@pytest.mark.slow
def test_processes_share_it(place, tmp_path):
    cache = tmp_path / "cache"
    arguments = [
        "cache-teacher",
        str(place / "cache.yaml"),
        f"--teacher_cache_dir={cache}",
        "--teacher_cache_dtype=int8",
    ]
    assert run_processes(call, 2, arguments) == [0, 0]
    trainer = train_from(place, cache)
    assert not trainer.teacher.is_built and trainer.replay.cache.dtype == "int8"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["--teacher_cache_dir"], "'--teacher_cache_dir' has no value: fields are given as --FIELD VALUE."),
        (["dir", "x"], "Fields are given as --FIELD VALUE, got 'dir'."),
        ([], "`teacher_cache_dir` is missing, the folder of the cache: give it in"),
        (["--teacher_cache_dir", "X", "--teacher", ""], "`teacher` is missing, the teacher's name or folder"),
        (
            ["--teacher_cache_dir", "X", "--train_dirr", "y"],
            "There is no field 'train_dirr' (did you mean 'train_dir'?).",
        ),
        (["--teacher_cache_dir", "X", "--train_dir", "none"], "The image folder none does not exist"),
        (["--teacher_cache_dir", "X", "--mixup_alpha", "0.2"], "does not go with mixup_alpha or cutmix_alpha"),
    ],
)
def test_mistakes_are_a_sentence_and_status_2(changes, message, place, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    changes = [str(tmp_path / "cache") if word == "X" else word for word in changes]
    assert main(["cache-teacher", str(place / "cache.yaml"), *changes]) in (1, 2)
    error = capsys.readouterr().err
    assert error.startswith("hf-kd cache-teacher: error: ") and message in error and error.count("\n") == 1


def test_a_configuration_that_is_none(tmp_path, capsys):
    for name, text, message in (
        ("none.yaml", None, "does not exist: give a YAML file"),
        ("list.yaml", "[1]", "must hold fields and their values, it holds a list"),
        ("odd.yaml", "a: [", "is not a YAML file"),
    ):
        if text is not None:
            (tmp_path / name).write_text(text)
        assert main(["cache-teacher", str(tmp_path / name)]) == 2
        assert message in capsys.readouterr().err
