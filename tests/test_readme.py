"""What the README shows runs as it stands there (names of downloads are replaced by local ones)."""

import re
from pathlib import Path

import pytest
import timm
import torch
from tiny import Images, config

from hf_kd import create_student, save_student


README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")


def block_with(text):
    (block,) = [block for block in re.findall(r"```python\n(.*?)```", README, flags=re.S) if text in block]
    return block


@pytest.fixture
def teacher_folder(tmp_path):
    save_student(create_student("test_resnet", num_classes=5, img_size=32), tmp_path / "teacher")
    return str(tmp_path / "teacher")


def test_the_api_example(tmp_path, monkeypatch, teacher_folder):
    monkeypatch.chdir(tmp_path)
    code = block_with("create_student(")
    for old, new in (
        ('"resnet34.tv_in1k"', repr(teacher_folder)),
        ('"resnet18", num_classes=1000', '"test_resnet", num_classes=5, img_size=32'),
        ('DistillationConfig("out"', 'DistillationConfig("out", num_train_epochs=1, report_to="none", use_cpu=True'),
    ):
        assert old in code
        code = code.replace(old, new)
    assert len(block_with("create_student(").strip().splitlines()) <= 10
    space = {"train": Images(size=32), "val": Images(size=32, seed=1)}
    exec(code, space)
    reopened = timm.create_model("local-dir:out/final", pretrained=True).eval()
    images = space["val"].pixel_values
    with torch.no_grad():
        torch.testing.assert_close(reopened(images), space["student"].eval()(images).logits, rtol=0, atol=1e-6)


def test_the_subclass_example(tmp_path, teacher_folder):
    code = block_with("class LogitMatching")
    assert len(code.strip().splitlines()) <= 10
    space = {}
    exec("from hf_kd import DistillationTrainer\n" + code, space)
    student = create_student("test_resnet", num_classes=5, img_size=32)
    data = Images(size=32, count=8)
    trainer = space["LogitMatching"](student, teacher_folder, config(tmp_path), train_dataset=data)
    batch = {"pixel_values": data.pixel_values, "labels": data.labels}
    with torch.no_grad():
        logits = student.train()(data.pixel_values).logits
        teacher_logits = trainer.teacher(data.pixel_values)
        expected = torch.nn.functional.cross_entropy(logits, data.labels) + (logits - teacher_logits).pow(2).mean()
        torch.testing.assert_close(trainer.compute_loss(student, batch), expected)


def test_the_function_example():
    space = {"student_logits": torch.randn(4, 3, dtype=torch.float16), "teacher_logits": torch.randn(4, 3)}
    exec(block_with("wttm_loss"), space)
    assert space["loss"].dtype == torch.float32


def test_the_commands_are_one_line_each_and_install_what_they_need():
    commands = re.findall(r"```bash\n(.*?)\n```", README, flags=re.S)
    assert commands[0] == 'pip install -e ".[quickstart]" && accelerate launch recipes/digits_wttm.py'
    assert commands[1] == 'pip install -e ".[test]" && pytest -n 2'
    for script in re.findall(r"recipes/\S+\.(?:py|yaml)", README):
        assert (Path(__file__).parents[1] / script).is_file(), script
