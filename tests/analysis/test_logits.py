"""The file of logits: written whole, read back exactly, and refused in a sentence when it is something else."""

import json

import numpy as np
import pytest
import torch
from invented import logits
from safetensors import safe_open
from safetensors.torch import save_file
from tiny import Images, config, networks
from transformers.trainer_utils import PredictionOutput

import hf_kd.analysis.logits
from hf_kd import DistillationTrainer, create_student
from hf_kd.analysis import Run, load_logits, save_logits, save_predictions, save_run


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_what_is_saved_is_read_back(tmp_path, dtype):
    saved = logits()
    student, teacher = saved.student.to(dtype), saved.teacher.to(dtype)
    student[0, 0] = -torch.inf
    names = ["a", "ß", "c c", "d"]
    path = save_logits(tmp_path / "new" / "run", student, saved.labels.int(), teacher, gamma=0.25, class_names=names)
    assert path == tmp_path / "new" / "run" / "logits.safetensors"
    assert [file.name for file in path.parent.iterdir()] == ["logits.safetensors"]
    for place in (path, path.parent):
        found = load_logits(place)
        assert found.student.dtype == found.teacher.dtype == dtype
        assert torch.equal(found.student, student) and torch.equal(found.teacher, teacher)
        assert torch.equal(found.labels, saved.labels)
        assert (found.gamma, found.class_names) == (0.25, tuple(names))


def test_arrays_views_and_what_is_left_out(tmp_path):
    array = np.arange(12, dtype=np.float32).reshape(4, 3)
    save_logits(tmp_path / "only.safetensors", array[::2])
    found = load_logits(tmp_path / "only.safetensors")
    assert found.student.tolist() == array[::2].tolist()
    assert found.labels.tolist() == [-100, -100] and not found.has_labels
    assert (found.teacher, found.gamma, found.class_names) == (None, None, None)
    # The same tensor twice, transposed.
    square = torch.randn(3, 3).T
    save_logits(tmp_path, square, [0, 1, 2], square)
    assert torch.equal(load_logits(tmp_path).student, square) and torch.equal(load_logits(tmp_path).teacher, square)


def test_a_write_that_breaks_off_leaves_the_older_file(tmp_path, monkeypatch):
    save_logits(tmp_path, torch.ones(2, 2))

    def break_off(tensors, path, metadata):
        path.write_bytes(b"half of")
        raise OSError("disk full")

    monkeypatch.setattr(hf_kd.analysis.logits, "save_file", break_off)
    with pytest.raises(OSError, match="disk full"):
        save_logits(tmp_path, torch.zeros(2, 2))
    assert [file.name for file in tmp_path.iterdir()] == ["logits.safetensors"]
    assert load_logits(tmp_path).student.tolist() == [[1, 1], [1, 1]]


@pytest.mark.parametrize(
    ("arguments", "error", "says"),
    [
        (([[1, 2]],), TypeError, "`student_logits` must be floating point"),
        (("abc",), TypeError, "`student_logits` must be"),
        ((torch.ones(2),), ValueError, r"shape \(samples, classes\).*got \(2,\)"),
        ((torch.ones(0, 2),), ValueError, r"at least one sample, got \(0, 2\)"),
        ((torch.ones(2, 2), [0]), ValueError, r"`labels` of shape \(1,\)"),
        ((torch.ones(2, 2), [0, 2]), ValueError, "`labels` holds 2.*0 to 1, or -100"),
        ((torch.ones(2, 2), [0, -1]), ValueError, "`labels` holds -1"),
        ((torch.ones(2, 2), [0.0, 1.0]), TypeError, "integer class indices"),
        ((torch.ones(2, 2), [0, 1], torch.ones(2, 3)), ValueError, r"`teacher_logits` of shape \(2, 3\)"),
        ((torch.tensor([[0.0, 1.0], [torch.nan, 1.0]]),), ValueError, "no softmax.*first in sample 1"),
        ((torch.tensor([[0.0, torch.inf]]),), ValueError, "no softmax"),
        ((torch.ones(1, 2), None, torch.full((1, 2), -torch.inf)), ValueError, "`teacher_logits` holds.*no softmax"),
    ],
)
def test_wrong_logits_are_refused_and_nothing_is_written(tmp_path, arguments, error, says):
    with pytest.raises(error, match=says):
        save_logits(tmp_path / "run", *arguments)
    assert not (tmp_path / "run").exists()


def test_wrong_notes_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"`gamma` must be in \(0, 1\]"):
        save_logits(tmp_path, torch.ones(2, 2), gamma=4)
    with pytest.raises(ValueError, match="3 names for 2 classes"):
        save_logits(tmp_path, torch.ones(2, 2), class_names=["a", "b", "c"])


def test_a_damaged_file_is_told_in_a_sentence(tmp_path):
    path = save_logits(tmp_path, torch.ones(50, 2))
    whole = path.read_bytes()
    for content in (b"", whole[:5], whole[:40], whole[:-1], whole[:-300], b"\xff" * 8 + whole[8:], b"not this"):
        path.write_bytes(content)
        with pytest.raises(
            ValueError, match=r"^\S+logits.safetensors cannot be used: [^\n]+; save the logits again\.$"
        ):
            load_logits(tmp_path)
    with pytest.raises(ValueError, match=r"There is no .*gone.logits\.safetensors: make it with .*save_run"):
        load_logits(tmp_path / "gone")


@pytest.mark.parametrize(
    ("tensors", "metadata", "says"),
    [
        ({"weight": torch.ones(2, 2)}, None, "not written by hf_kd.analysis.save_logits"),
        ({"student_logits": torch.ones(2, 2)}, {}, "lacks 'labels'"),
        ({"student_logits": torch.ones(2, 2), "labels": torch.tensor([0, 5])}, {}, "`labels` holds 5"),
        ({"student_logits": torch.ones(2, 2), "labels": torch.tensor([0, 1])}, {"gamma": "7"}, "`gamma` must be"),
        ({"student_logits": torch.ones(2, 2), "labels": torch.tensor([0, 1])}, {"gamma": "{"}, "cannot be used"),
    ],
)
def test_another_safetensors_file_is_refused(tmp_path, tensors, metadata, says):
    with safe_open(save_logits(tmp_path, torch.ones(1, 2)), "pt") as file:
        format = file.metadata()
    save_file(tensors, tmp_path / "logits.safetensors", None if metadata is None else {**format, **metadata})
    with pytest.raises(ValueError, match=says):
        load_logits(tmp_path)


def test_predictions_of_a_trainer(tmp_path):
    array, labels = np.ones((2, 3), np.float32), np.array([0, 2])
    save_predictions(tmp_path, PredictionOutput(array, labels, {}), gamma=0.5)
    assert load_logits(tmp_path).teacher is None and load_logits(tmp_path).labels.tolist() == [0, 2]
    save_predictions(tmp_path, PredictionOutput((array, 2 * array), labels, {}))
    assert load_logits(tmp_path).teacher.tolist() == [[2, 2, 2], [2, 2, 2]]
    with pytest.raises(ValueError, match="3 arrays"):
        save_predictions(tmp_path, PredictionOutput((array, array, array), labels, {}))


# ---- A real run ----------------------------------------------------------------------------------------------------


def trained(folder, loss="wttm", own_metrics=False, **options):
    student, teacher = networks()
    trainer = DistillationTrainer(
        student, teacher, config(folder, loss=loss, eval_strategy="epoch", num_train_epochs=2, **options),
        train_dataset=Images(), eval_dataset=Images(seed=1),
        compute_metrics=(lambda prediction: pytest.fail("asked")) if own_metrics else None,
    )  # fmt: skip
    if not own_metrics:
        trainer.train()
    return trainer


def test_a_run_is_left_behind_and_read_back(tmp_path):
    trainer = trained(tmp_path, gamma=0.25, beta=3)
    test = Images(count=21, seed=2, unlabelled=[4])
    path = save_run(trainer, test)
    found = Run.load(tmp_path)
    assert found.name == "wttm γ=0.25 β=3"
    assert path == tmp_path / "logits.safetensors"
    student, teacher = trainer.model.eval(), trainer.teacher.eval()
    with torch.no_grad():
        torch.testing.assert_close(found.logits.student, student(test.pixel_values))
        torch.testing.assert_close(found.logits.teacher, teacher(test.pixel_values))
    assert torch.equal(found.logits.labels, test.labels)
    assert found.logits.gamma == 0.25
    logged = [entry for entry in trainer.state.log_history if "student_entropy" in entry]
    assert [entropy for _, entropy in found.curve("student_entropy")] == [e["student_entropy"] for e in logged]
    assert len(found.curve("power_sum")) == 6 and len(found.curve("eval_top1")) == 2
    assert json.loads((tmp_path / "distillation.json").read_text()) == trainer.provenance()
    assert not trainer.args.teacher_metrics


def test_a_run_on_labels_alone_and_logits_that_are_there_already(tmp_path):
    trainer = trained(tmp_path / "in", loss="ce")
    stored = torch.randn(24, 5)
    save_run(trainer, Images(seed=2), teacher_logits=stored, path=tmp_path / "out")
    found = Run.load(tmp_path / "out")
    assert found.name == "ce" and torch.equal(found.logits.teacher, stored) and found.logits.gamma is None
    assert not (tmp_path / "in").exists() or not list((tmp_path / "in").glob("*.safetensors"))


def test_an_older_runs_records_in_the_folder_are_replaced_and_a_card_kept(tmp_path):
    trainer = trained(tmp_path, loss="ce", label_smoothing_factor=0.5)
    (tmp_path / "distillation.json").write_text('{"loss": "wttm", "card": 1}')
    save_run(trainer, Images(seed=2, count=5))
    assert Run.load(tmp_path).name == "ce ε=0.5"
    assert json.loads((tmp_path / "distillation.json").read_text()) == trainer.provenance()
    own = json.dumps({**trainer.provenance(), "card": 1})
    (tmp_path / "distillation.json").write_text(own)
    save_run(trainer, Images(seed=2, count=5))
    assert (tmp_path / "distillation.json").read_text() == own


def test_a_users_own_metrics_are_not_asked_and_stay(tmp_path):
    trainer = trained(tmp_path, own_metrics=True, gamma=0.5)
    trainer.preprocess_logits_for_metrics = cut = lambda logits, labels: logits[..., :1]
    own = trainer.compute_metrics
    save_run(trainer, Images(seed=2))
    assert load_logits(tmp_path).student.shape == load_logits(tmp_path).teacher.shape == (24, 5)
    assert trainer.compute_metrics is own and trainer.preprocess_logits_for_metrics is cut


def test_the_names_of_the_classes_come_along(tmp_path):
    names = ["zero", "one", "two", "three", "four"]
    student = create_student("test_resnet", num_classes=5, img_size=32, label_names=names)
    trainer = DistillationTrainer(student, args=config(tmp_path, loss="ce"))
    save_run(trainer, Images(size=32, count=4), teacher_logits=torch.zeros(4, 5))
    assert load_logits(tmp_path).class_names == tuple(names)
