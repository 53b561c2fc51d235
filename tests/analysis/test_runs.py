"""A run's folder, read: which log, under which name, and what is wrong with it."""

import json
import math

import pytest
import torch
from invented import logits, write_run
from tiny import Images, config, networks

from hf_kd import DistillationTrainer
from hf_kd.analysis import Run, describe, load_runs, save_logits


LOG = [
    {"epoch": 1.0, "loss": 2.0, "student_entropy": 1.5, "step": 1},
    {"epoch": 1.0, "eval_top1": 0.5},
    {"epoch": 2.0, "loss": 1.0, "student_entropy": 0.5, "step": 2},
    {"epoch": 2.0, "eval_top1": 0.75},
]


def test_the_folders_own_log_comes_before_its_checkpoints(tmp_path):
    write_run(tmp_path, LOG, {"loss": "ttm", "gamma": 0.25, "beta_setting": 36.0})
    write_run(tmp_path / "checkpoint-9", LOG[:1], {"loss": "kd"})
    run = Run.load(tmp_path)
    assert (run.name, run.folder, run.logits) == ("ttm γ=0.25 β=36", tmp_path, None)
    assert run.history == LOG
    assert run.curve("student_entropy") == [(1.0, 1.5), (2.0, 0.5)]
    assert run.curve("eval_top1", 100.0) == [(1.0, 50.0), (2.0, 75.0)]
    assert run.curve("divergence") == [] and run.has("loss") and not run.has("divergence")


def test_a_real_run_is_read_from_its_last_complete_checkpoint(tmp_path):
    student, teacher = networks()
    args = config(tmp_path, loss="kd", temperature=4.0, beta=9, save_strategy="epoch", num_train_epochs=3)
    trainer = DistillationTrainer(student, teacher, args, train_dataset=Images())
    trainer.train()
    run = Run.load(tmp_path)
    assert run.name == "kd γ=0.25 β=9"
    logged = [entry["distill"] for entry in trainer.state.log_history if "distill" in entry]
    assert [value for _, value in run.curve("distill")] == logged and len(logged) == 9
    # Without its manifest the last one was not finished.
    (tmp_path / "checkpoint-9" / "complete.json").unlink()
    assert [value for _, value in Run.load(tmp_path).curve("distill")] == logged[:6]
    # A checkpoint is a run as well, and those of another trainer have no manifest at all.
    assert len(Run.load(tmp_path / "checkpoint-3").curve("distill")) == 3
    for manifest in tmp_path.glob("*/complete.json"):
        manifest.unlink()
    assert len(Run.load(tmp_path).curve("distill")) == 9


def test_logits_alone_are_a_run(tmp_path):
    save_logits(tmp_path / "teacher", torch.ones(2, 2))
    run = Run.load(tmp_path / "teacher")
    assert (run.name, run.history) == ("teacher", ()) and run.logits.student.tolist() == [[1, 1], [1, 1]]


def test_values_that_cannot_be_drawn(tmp_path):
    text = '{"log_history": [{"epoch": 1, "loss": NaN}, {"epoch": 2, "loss": Infinity}, {"epoch": 3, "loss": "nan"},'
    text += ' {"epoch": 4, "loss": null}, {"epoch": 5, "loss": true}, {"loss": 1.0}, {"epoch": 6, "loss": 2}]}'
    (tmp_path / "trainer_state.json").write_text(text)
    points = Run.load(tmp_path).curve("loss")
    assert [epoch for epoch, _ in points] == [1, 2, 6]
    assert math.isnan(points[0][1]) and math.isnan(points[1][1]) and points[2][1] == 2


@pytest.mark.parametrize(
    ("file", "content", "says"),
    [
        ("trainer_state.json", '{"log_history": [{"epo', "trainer_state.json is damaged, or no JSON file: "),
        ("trainer_state.json", "", "trainer_state.json is damaged"),
        ("trainer_state.json", b"\xff\xfe\x00", "trainer_state.json is damaged"),
        ("trainer_state.json", "[1]", "must hold a JSON object, got a list"),
        ("trainer_state.json", "{}", "has no list `log_history`"),
        ("trainer_state.json", '{"log_history": [1]}', "has no list `log_history`"),
        ("distillation.json", "{", "distillation.json is damaged"),
        ("training_args.json", "{", "training_args.json is damaged"),
        ("logits.safetensors", "{", "logits.safetensors cannot be used"),
    ],
)
def test_a_damaged_file_is_told_in_a_sentence(tmp_path, file, content, says):
    write_run(tmp_path, LOG)
    (tmp_path / file).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=says) as error:
        Run.load(tmp_path)
    assert "\n" not in str(error.value)


def test_folders_that_are_no_runs(tmp_path):
    with pytest.raises(ValueError, match="There is no folder .*gone: give the output folder of a run"):
        Run.load(tmp_path / "gone")
    with pytest.raises(ValueError, match=r"has no trainer_state.json.*no logits.safetensors: .*save_run"):
        Run.load(tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="There is no folder"):
        Run.load(tmp_path / "file")


@pytest.mark.parametrize(
    ("provenance", "arguments", "name"),
    [
        ({"loss": "wttm", "gamma": 0.25, "beta_setting": "auto", "beta": 7.3}, {}, "wttm γ=0.25 β=auto"),
        ({"loss": "ce", "gamma": None, "beta_setting": None, "ce_weight": 1.0}, {}, "ce"),
        ({"loss": "ce"}, {"label_smoothing_factor": 0.5}, "ce ε=0.5"),
        ({"loss": "ce"}, {"label_smoothing_factor": 0.0}, "ce"),
        ({"loss": "wttm", "gamma": 1 / 3, "beta_setting": 1.0, "ce_weight": 0}, None, "wttm γ=0.3333 β=1 no labels"),
        (
            {"loss": "ttm", "gamma": 0.1, "beta_setting": 4.0, "feature_loss": "crd", "feature_weight": 0.8},
            {},
            "ttm γ=0.1 β=4 + crd μ=0.8",
        ),
        ({}, {"label_smoothing_factor": 0.5}, ""),
    ],
)
def test_a_run_is_called_by_its_objective(provenance, arguments, name):
    assert describe(provenance, arguments) == name


def test_several_runs_have_different_names(tmp_path):
    kd = {"loss": "kd", "gamma": 0.5, "beta_setting": 1.0}
    folders = [
        write_run(tmp_path / "a" / "seed0", LOG, kd),
        write_run(tmp_path / "b" / "seed0", LOG, kd),
        write_run(tmp_path / "b" / "seed1", LOG, kd),
        write_run(tmp_path / "smooth", LOG, {"loss": "ce"}, {"label_smoothing_factor": 0.5}),
    ]
    assert [run.name for run in load_runs(folders)] == [
        *(f"kd γ=0.5 β=1 ({place})" for place in ("a/seed0", "b/seed0", "seed1")),
        "ce ε=0.5",
    ]
    assert [run.name for run in load_runs(folders[:2], ["A", "B"])] == ["A", "B"]
    assert [run.name for run in load_runs(folders[:1])] == ["kd γ=0.5 β=1"]


def test_names_that_do_not_fit(tmp_path):
    folder = write_run(tmp_path, LOG)
    with pytest.raises(ValueError, match="2 runs and 1 names"):
        load_runs([folder, folder], ["a"])
    with pytest.raises(ValueError, match="got 'a' twice"):
        load_runs([folder, folder], ["a", "a"])


def test_logits_are_read_with_the_log(tmp_path):
    saved = logits()
    write_run(tmp_path, LOG)
    save_logits(tmp_path, saved.student, saved.labels, saved.teacher, gamma=0.5)
    run = Run.load(tmp_path, "mine")
    assert run.name == "mine" and len(run.history) == 4
    assert torch.equal(run.logits.teacher, saved.teacher)
    assert json.loads((tmp_path / "trainer_state.json").read_text())["log_history"] == LOG
