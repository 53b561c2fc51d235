"""``python -m hf_kd.analysis``: what it draws, what it says of the rest, and how it ends."""

import re
import sys
from pathlib import Path

import pytest
from invented import logits, write_run
from PIL import Image

from hf_kd.analysis import Drawn, Run, draw, figures, plots, save_logits
from hf_kd.analysis.__main__ import main


ALL = ["student_entropy", "divergence", "power_sum", "teacher_entropy", "grad_norm", "grad_norm_ce"]
ALL += ["grad_norm_distill", "grad_cosine", "eval_entropy", "eval_teacher_divergence", "eval_top1", "eval_nll"]


def log(*keys):
    return [{"epoch": float(epoch), **dict.fromkeys(keys, 0.5 + epoch / 8)} for epoch in (1, 2)]


def save(folder, saved):
    save_logits(folder, saved.student, saved.labels, saved.teacher, gamma=saved.gamma)


@pytest.fixture
def runs(tmp_path):
    """A run with everything, and one on labels alone without logits."""
    full = write_run(tmp_path / "full", log(*ALL), {"loss": "wttm", "gamma": 0.25, "beta_setting": "auto"})
    save(full, logits())
    bare = write_run(tmp_path / "bare", log("student_entropy", "grad_norm", "eval_top1"), {"loss": "ce"})
    return str(full), str(bare)


@pytest.fixture
def unsaved(monkeypatch):
    """Figures are made and not painted, which takes most of the time: their names and what was drawn in them."""
    saved = {}
    monkeypatch.setattr(plots, "save", lambda figure, path: saved.update({path.name: figure}))
    return saved


def test_files_are_painted_and_named(tmp_path, capsys):
    folder = write_run(tmp_path / "run", log("student_entropy"))
    save(folder, logits())
    out = tmp_path / "deep" / "figures"
    assert main([str(folder), "-o", str(out)]) == 0
    names = ["entropy", "entropy_histograms", "reliability", "agreement"]
    assert capsys.readouterr().out.splitlines() == [str(out / f"{name}.png") for name in names]
    assert sorted(path.name for path in out.iterdir()) == sorted(f"{name}.png" for name in names)
    for path in out.iterdir():
        colours = Image.open(path).convert("RGB").getcolors(1 << 24)
        # Lines or bars, axes and letters on a ground of white.
        assert len(colours) > 20 and max(colours)[1] in ((255, 255, 255), (0, 114, 178))


def test_everything_that_the_runs_hold_is_drawn(runs, tmp_path, capsys, unsaved):
    assert main([*runs, "-o", str(tmp_path / "out")]) == 0
    said = capsys.readouterr()
    names = ["entropy", "divergence", "teacher", "gradients", "accuracy"]
    names += ["entropy_histograms", "reliability", "agreement"]
    assert list(unsaved) == [f"{name}.png" for name in names]
    assert said.out.splitlines() == [str(tmp_path / "out" / f"{name}.png") for name in names]
    assert [len(figure.axes) for figure in unsaved.values()] == [2, 2, 2, 4, 2, 1, 1, 1]
    notes = said.err.splitlines()
    assert f"No logits.safetensors in {runs[1]}: histograms of H(q), reliability, class gains" in said.err
    assert 'entropy: eval_entropy is not in the log of ce (evaluate over training: eval_strategy="epoch").' in notes
    # What labels alone cannot have is not missed.
    assert not [note for note in notes if note.startswith(("divergence", "teacher", "gradients"))]
    assert len(notes) == 3


def test_names_baseline_and_format(runs, tmp_path, capsys, unsaved):
    save(tmp_path / "bare", logits(seed=3))
    options = ["--names", "WTTM", "labels", "--format", "svg", "-o", str(tmp_path / "out")]
    assert main([*runs, *options, "--baseline", "labels"]) == 0
    assert list(unsaved)[-1] == "class_gains.svg" and len(unsaved) == 9
    assert unsaved["class_gains.svg"].axes[0].get_title().startswith("WTTM\n")
    assert [text.get_text() for text in unsaved["entropy.svg"].legends[0].get_texts()] == ["WTTM", "labels"]
    assert "class_gains" not in capsys.readouterr().err
    # The baseline may be said by its folder.
    unsaved.clear()
    assert main([*runs, *options, "--baseline", runs[0]]) == 0
    assert unsaved["class_gains.svg"].axes[0].get_title().startswith("labels\n")
    assert main([*runs, *options]) == 0
    assert "class_gains: name the run to compare the others with, --baseline NAME." in capsys.readouterr().err


def test_what_is_missing_is_said_with_its_remedy(tmp_path, unsaved):
    wttm, kd = {"loss": "wttm"}, {"loss": "kd"}
    history = log("student_entropy")
    drawn = draw([Run("a", tmp_path / "a", history, wttm), Run("b", tmp_path / "b", history, kd)], tmp_path)
    assert list(unsaved) == ["entropy.png"] and drawn.files == [tmp_path / "entropy.png"]
    assert drawn.notes == [
        'entropy: eval_entropy is in no run\'s log (evaluate over training: eval_strategy="epoch").',
        "divergence: divergence is in no run's log (train with log_analysis=True).",
        "divergence: eval_teacher_divergence is in no run's log (evaluate with teacher_metrics=True).",
        "teacher: power_sum is in no run's log (WTTM logs it).",
        "teacher: teacher_entropy is in no run's log (train with log_analysis=True).",
        "gradients: grad_norm_ce, grad_norm_distill, grad_cosine are in no run's log (train with log_analysis=True).",
        "gradients: grad_norm is in no run's log (DistillationTrainer logs it).",
        'accuracy: eval_top1, eval_nll are in no run\'s log (evaluate over training: eval_strategy="epoch").',
        f"No logits.safetensors in {tmp_path / 'a'}, {tmp_path / 'b'}: histograms of H(q), reliability, class gains "
        "and agreement need it; hf_kd.analysis.save_run(trainer, test_set) makes it.",
    ]


def test_a_run_without_a_log_is_said_once(tmp_path, unsaved):
    teacher = Run("teacher", tmp_path / "t", logits=logits())
    said = [f"No trainer_state.json in {tmp_path / 't'}: without it there are no curves."]
    assert draw([teacher], tmp_path).notes == said
    student = Run("student", tmp_path / "s", log(*ALL), logits=logits(seed=1))
    notes = draw([teacher, student], tmp_path, baseline="teacher").notes
    assert notes == said
    assert unsaved["entropy.png"].axes[0].lines[0].get_color() == plots.COLOURS[1]


def test_some_logs_lack_a_key(tmp_path, unsaved):
    with_it, without = log("divergence", "power_sum"), log("student_entropy")
    runs = [Run("w", tmp_path, with_it, {"loss": "wttm"})]
    runs += [Run(loss, tmp_path, without, {"loss": loss}) for loss in ("ttm", "ce")]
    notes = draw(runs, tmp_path).notes
    assert "divergence: divergence is not in the log of ttm (train with log_analysis=True)." in notes
    # TTM has no weights to log, and labels alone no teacher.
    assert not [note for note in notes if "power_sum" in note]


def test_logits_that_lack_something(tmp_path, unsaved):
    runs = [
        Run("base", tmp_path, logits=logits()),
        Run("pupil", tmp_path, logits=logits(seed=1, teacher=False)),
        Run("unlabelled", tmp_path, logits=logits(labels=False)),
        Run("wide", tmp_path, logits=logits(classes=6)),
        Run("unlabelled too", tmp_path, logits=logits(labels=False)),
    ]
    notes = draw(runs, tmp_path, baseline="base").notes
    drawn = ("entropy_histograms", "reliability", "agreement", "class_gains")
    assert list(unsaved) == [f"{name}.png" for name in drawn]
    assert [len(figure.axes) for figure in unsaved.values()] == [5, 3, 1, 1]
    assert unsaved["class_gains.png"].axes[0].get_title().startswith("pupil\n")
    assert "reliability, class_gains, agreement: the logits of unlabelled, unlabelled too have no labels." in notes
    assert "agreement: the logits of pupil have none of a teacher beside them." in notes
    assert "class_gains: wide has 6 classes and base has 4: gains need the same classes." in notes
    notes = draw(runs, tmp_path, baseline="unlabelled").notes
    assert "class_gains: this needs logits with labels of the baseline unlabelled and of another run." in notes


def test_only_other_samples_than_the_baselines_leave_no_gains(tmp_path, unsaved):
    runs = [Run("base", tmp_path, logits=logits()), Run("other", tmp_path, logits=logits(30))]
    runs += [Run("unlabelled", tmp_path, logits=logits(labels=False))]
    notes = draw(runs, tmp_path, baseline="base").notes
    assert "class_gains.png" not in unsaved and [note for note in notes if "other (30 samples)" in note]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["{tmp}/gone"], "There is no folder {tmp}/gone: give the output folder of a run."),
        (["{tmp}"], "{tmp} has no trainer_state.json"),
        (["{full}", "{bare}", "--names", "one"], "There are 2 runs and 1 names"),
        (["{full}", "{bare}", "--names", "a", "a"], "Two runs cannot have the same name, got 'a' twice."),
        (["{full}", "--baseline", "kd"], "The baseline 'kd' is none of the runs: they are wttm γ=0.25 β=auto."),
        (["{full}", "-o", "{full}/trainer_state.json"], "trainer_state.json"),
        (["{torn}"], "trainer_state.json is damaged, or no JSON file"),
        (["{cut}"], "logits.safetensors cannot be used"),
        (["{empty}"], "The runs hold nothing that can be drawn."),
    ],
)
def test_mistakes_end_with_a_sentence_and_status_2(runs, tmp_path, capsys, unsaved, arguments, says):
    places = {"tmp": tmp_path, "full": runs[0], "bare": runs[1]}
    places |= {name: write_run(tmp_path / name, log()) for name in ("torn", "cut", "empty")}
    (tmp_path / "torn" / "trainer_state.json").write_text('{"log_hist')
    save(tmp_path / "cut", logits())
    with (tmp_path / "cut" / "logits.safetensors").open("r+b") as file:
        file.truncate(300)
    arguments = [argument.format(**places) for argument in arguments]
    output = [] if "-o" in arguments else ["-o", str(tmp_path / "out")]
    assert main([*arguments, *output]) == 2
    said = capsys.readouterr()
    last = said.err.splitlines()[-1]
    assert last.startswith("python -m hf_kd.analysis: error: ") and says.format(**places) in last
    assert said.out == "" and not unsaved and "Traceback" not in said.err


@pytest.mark.parametrize("arguments", [[], ["run", "--format", "gif"], ["run", "--colour"]])
def test_unknown_arguments_end_with_status_2(arguments, capsys):
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 2
    assert "usage: python -m hf_kd.analysis" in capsys.readouterr().err


def test_without_matplotlib(runs, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert main([runs[0], "-o", str(tmp_path / "out")]) == 2
    assert 'pip install "hf-kd[quickstart]"' in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_ctrl_c(runs, tmp_path, capsys, monkeypatch):
    def interrupt(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(plots, "save", interrupt)
    assert main([runs[0], "-o", str(tmp_path / "out")]) == 130
    assert "interrupted; the same command draws everything again." in capsys.readouterr().err


def test_drawing_from_python_refuses_what_makes_no_sense(tmp_path):
    with pytest.raises(ValueError, match="There are no runs"):
        draw([], tmp_path)
    with pytest.raises(ValueError, match="same name: a, a"):
        draw([Run("a", tmp_path), Run("a", tmp_path)], tmp_path)
    with pytest.raises(ValueError, match="`format` must be one of png, pdf, svg, got 'gif'"):
        draw([Run("a", tmp_path)], tmp_path, format="gif")
    assert draw([Run("a", tmp_path)], tmp_path / "none").files == Drawn().files


def test_every_panel_has_a_remedy():
    keys = {panel.key for panels in figures.CURVES.values() for panel in panels}
    assert keys == set(figures._REMEDIES) == set(ALL)


def test_the_page_names_every_figure_and_every_key():
    page = (Path(__file__).parents[2] / "docs" / "figures.md").read_text(encoding="utf-8")
    rows = dict(re.findall(r"^\| `(\w+)` \| (.*)$", page, flags=re.M))
    assert rows.keys() == {*figures.CURVES, "entropy_histograms", "reliability", "class_gains", "agreement"}
    for name, panels in figures.CURVES.items():
        assert [panel.key for panel in panels if f"`{panel.key}`" not in rows[name]] == []
