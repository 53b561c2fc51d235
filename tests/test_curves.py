"""The picture of a run's curves."""

import builtins

import numpy as np
import pytest
from PIL import Image

import hf_kd.curves
from hf_kd.curves import draw_curves


LOG = [
    {"epoch": 1.0, "loss": 2.0, "ce": 1.5, "distill": 0.5, "student_entropy": 1.0},
    {"epoch": 1.0, "eval_top1": 0.5, "eval_entropy": 1.1},
    {"epoch": 2.0, "loss": 1.0, "ce": 0.8, "distill": 0.2, "student_entropy": 0.6},
    {"epoch": 2.0, "eval_top1": 0.75, "eval_entropy": 0.7},
    {"train_runtime": 1.0},
]


def colours(path):
    return len(np.unique(np.asarray(Image.open(path).convert("RGB")).reshape(-1, 3), axis=0))


def test_a_panel_for_each_kind_of_curve(tmp_path):
    assert draw_curves(LOG, tmp_path / "a" / "curves.png")
    assert draw_curves([{"epoch": e["epoch"], "loss": e["loss"]} for e in LOG if "loss" in e], tmp_path / "one.png")
    whole, one = Image.open(tmp_path / "a" / "curves.png"), Image.open(tmp_path / "one.png")
    assert whole.width == pytest.approx(3 * one.width, rel=0.01)
    assert colours(tmp_path / "a" / "curves.png") > colours(tmp_path / "one.png") > 10
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["curves.png"]


def test_the_same_log_gives_the_same_file(tmp_path):
    draw_curves(LOG, tmp_path / "a.png")
    draw_curves(LOG, tmp_path / "b.png")
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    draw_curves([*LOG, {"epoch": 3.0, "loss": 0.5}], tmp_path / "b.png")
    assert (tmp_path / "a.png").read_bytes() != (tmp_path / "b.png").read_bytes()


def test_a_later_value_of_an_epoch_counts():
    assert hf_kd.curves.points([*LOG, {"epoch": 2.0, "eval_top1": 0.8}], "eval_top1", 100.0) == [
        (1.0, 50.0),
        (2.0, 80.0),
    ]


@pytest.mark.parametrize("log", [[], LOG[:2], [{"train_runtime": 1.0}]])
def test_nothing_to_draw(log, tmp_path):
    assert not draw_curves(log, tmp_path / "curves.png")
    assert not (tmp_path / "curves.png").exists()


def test_without_matplotlib_training_goes_on(tmp_path, monkeypatch, caplog):
    real = builtins.__import__

    def without(name, *args, **kwargs):
        assert not name.startswith("matplotlib")
        return real(name, *args, **kwargs)

    monkeypatch.setattr(hf_kd.curves, "find_spec", lambda name: None)
    monkeypatch.setattr(builtins, "__import__", without)
    assert not draw_curves(LOG, tmp_path / "curves.png")
    assert "pip install matplotlib" in caplog.text
