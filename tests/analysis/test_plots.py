"""What the figures show is read off their lines, bars and words."""

import ast
import math
import sys
from pathlib import Path

import matplotlib
import numpy as np
import pytest
import torch
from invented import logits, run
from matplotlib.container import BarContainer
from scipy.special import softmax
from scipy.stats import entropy

from hf_kd.analysis import SavedLogits, plots, quantities
from hf_kd.metrics import per_sample_statistics, reliability


NAN = math.nan


def log(key, *values, start=1):
    return [{"epoch": float(n), key: value} for n, value in enumerate(values, start=start)]


def words(figure):
    return [text.get_text() for text in figure.findobj(matplotlib.text.Text) if text.get_text()]


def legend(figure):
    return [text.get_text() for text in figure.legends[0].get_texts()] if figure.legends else []


def heights(ax):
    return [bar.get_height() for bar in ax.patches]


# ---- Over training -------------------------------------------------------------------------------------------------


def test_a_line_is_the_log_of_its_run():
    runs = [
        run("kd", [*log("student_entropy", 1.5, 1.0, 0.5), *log("eval_entropy", 0.25)]),
        run("nothing", log("loss", 1.0)),
        run("wttm", log("student_entropy", 2.0, 1.75, NAN, 1.5, 1.25)),
    ]
    figure = plots.training_curves(runs, plots.ENTROPY)
    training, evaluation = figure.axes
    assert training.lines[0].get_xydata().tolist() == [[1, 1.5], [2, 1.0], [3, 0.5]]
    np.testing.assert_array_equal(training.lines[1].get_ydata(), [2.0, 1.75, NAN, 1.5, 1.25])
    assert evaluation.lines[0].get_xydata().tolist() == [[1, 0.25]]
    assert [ax.get_ylabel() for ax in figure.axes] == ["mean $H(q)$ (nats)"] * 2
    assert [ax.get_xlabel() for ax in figure.axes] == ["epoch"] * 2
    assert legend(figure) == ["kd", "wttm"]
    # A run keeps its colour in every figure, whoever is missing from it.
    assert [line.get_color() for line in training.lines] == [plots.COLOURS[0], plots.COLOURS[2]]


def test_panels_without_data_are_left_out_and_units_are_percent():
    figure = plots.training_curves([run("a", log("eval_top1", 0.5, 0.75))], plots.ACCURACY)
    (ax,) = figure.axes
    assert ax.get_ylabel() == "top-1 (%)" and ax.lines[0].get_ydata().tolist() == [50, 75]
    with pytest.raises(ValueError, match="No run logs any of eval_top1, eval_nll"):
        plots.training_curves([run("a", log("eval_top1", NAN, NAN))], plots.ACCURACY)


def test_every_key_has_its_panel():
    keys = {
        plots.DIVERGENCE: ["divergence", "eval_teacher_divergence"],
        plots.TEACHER: ["power_sum", "teacher_entropy"],
        plots.GRADIENTS: ["grad_norm_ce", "grad_norm_distill", "grad_cosine", "grad_norm"],
    }
    for panels, names in keys.items():
        entries = [entry for n, key in enumerate(names) for entry in log(key, 0.25 + n / 8, 0.5)]
        figure = plots.training_curves([run("a", entries)], panels)
        assert [ax.lines[0].get_ydata().tolist() for ax in figure.axes] == [
            [0.25 + n / 8, 0.5] for n in range(len(names))
        ]


def test_gradients_are_comparable():
    entries = [*log("grad_norm_ce", 1e-3, 0.0, 1e-2), *log("grad_norm_distill", 10.0, 5.0), *log("grad_cosine", -0.5)]
    ce, distill, cosine = plots.training_curves([run("a", entries)], plots.GRADIENTS).axes
    assert ce.get_yscale() == distill.get_yscale() == "log" and cosine.get_yscale() == "linear"
    assert ce.get_ylim() == distill.get_ylim() and ce.get_ylim()[0] < 1e-3 and ce.get_ylim()[1] > 10
    # A norm of 0 has no place on a logarithmic axis.
    np.testing.assert_array_equal(ce.lines[0].get_ydata(), [1e-3, NAN, 1e-2])
    assert cosine.get_ylim() == pytest.approx((-1.05, 1.05))


def test_a_value_between_two_gaps_is_seen():
    values = [1.0] * 40
    values[10] = values[12] = values[38] = NAN
    figure = plots.training_curves([run("long", log("student_entropy", *values))], plots.ENTROPY)
    assert figure.axes[0].lines[0].get_markevery() == [11, 39]
    figure = plots.training_curves([run("short", log("student_entropy", *values[:20]))], plots.ENTROPY)
    assert figure.axes[0].lines[0].get_markevery() == list(range(20))


def test_many_runs_stay_apart():
    runs = [run(f"run {n}", log("student_entropy", n + 1.0, 1.0)) for n in range(12)]
    lines = plots.training_curves(runs, plots.ENTROPY).axes[0].lines
    assert len({(line.get_color(), line.get_linestyle()) for line in lines}) == 12


def test_names_are_shown_as_they_are():
    runs = [run(name, log("student_entropy", 1.0)) for name in ("_hidden", "a $x$ b", "long " * 40)]
    figure = plots.training_curves(runs, plots.ENTROPY)
    hidden, dollars, long = legend(figure)
    assert hidden == " _hidden" and dollars == r"a \$x\$ b"
    assert long.startswith("long long") and "…" in long and len(long) < 90
    figure.canvas.draw()
    box = figure.legends[0].get_window_extent()
    assert box.x0 >= 0 and box.x1 <= figure.bbox.width and box.y1 < figure.axes[0].get_window_extent().y0


# ---- Of logits -----------------------------------------------------------------------------------------------------


def test_histograms_are_percentages_on_one_axis():
    soft, sharp = logits(samples=150, scale=0.5), logits(samples=150, seed=1, scale=4.0)
    figure = plots.entropy_histograms([run("soft", saved=soft), run("none"), run("sharp", saved=sharp)], bins=9)
    assert len(figure.axes) == 2
    upper = figure.axes[0].get_xlim()[1]
    for ax, saved, name, place in zip(figure.axes, (soft, sharp), ("soft", "sharp"), (0, 2), strict=True):
        values = [entropy(row) for row in softmax(saved.student.numpy(), axis=1)]
        counts, edges = np.histogram(values, bins=9, range=(0, upper))
        assert heights(ax) == pytest.approx((100 * counts / 150).tolist())
        assert [bar.get_x() for bar in ax.patches] == pytest.approx(edges[:-1].tolist())
        assert ax.lines[0].get_xdata()[0] == pytest.approx(np.mean(values))
        assert ax.get_title() == f"{name}\nmean {np.mean(values):.3g} nats (dashed)"
        assert ax.patches[0].get_facecolor() == matplotlib.colors.to_rgba(plots.COLOURS[place])
        assert "log 4 = 1.39" in ax.get_xlabel() and ax.get_ylabel() == "samples (%)"
    assert upper == pytest.approx(min(math.log(4), 1.02 * max(entropy(softmax(soft.student.numpy(), axis=1).T))))
    assert figure.axes[0].get_ylim() == figure.axes[1].get_ylim()


def test_a_network_that_is_certain_has_a_histogram():
    certain = SavedLogits(torch.tensor([[0.0, -math.inf]] * 3), torch.tensor([0, 0, 1]))
    (ax,) = plots.entropy_histograms([run(saved=certain)]).axes
    assert heights(ax)[0] == 100 and sum(heights(ax)) == 100 and ax.get_xlim() == (0, 1)


def test_reliability_shows_bins_and_their_error():
    saved = logits(samples=300)
    (ax,) = plots.reliability_diagrams([run("wttm", saved=saved)], bins=5).axes
    q, labels = softmax(saved.student.numpy(), axis=1), saved.labels.numpy()
    confidence, right = q.max(axis=1)[:-2], (q.argmax(axis=1) == labels)[:-2]
    error = 0.0
    for b in range(5):
        members = (confidence > b / 5) & (confidence <= (b + 1) / 5)
        accuracy = 100 * right[members].mean() if members.any() else NAN
        np.testing.assert_allclose(heights(ax)[b], accuracy)
        mean = 100 * confidence[members].mean() if members.any() else NAN
        np.testing.assert_allclose(ax.lines[1].get_xydata()[b], [mean, accuracy])
        error += abs(right[members].sum() - confidence[members].sum()) / 298
    assert ax.get_title() == f"wttm\ncalibration error (ECE) {100 * error:.1f} %"
    assert ax.get_xlim() == (0, 100)


def test_bins_of_few_samples_are_hollow():
    confident = torch.tensor([[0.9, 0.1]] * 199 + [[0.55, 0.45]]).log()
    (ax,) = plots.reliability_diagrams([run(saved=SavedLogits(confident, torch.zeros(200, dtype=torch.long)))]).axes
    filled = [bar.get_facecolor()[3] > 0 for bar in ax.patches]
    assert [n for n, bar in enumerate(ax.patches) if bar.get_height() > 0] == [8, 13]
    assert (filled[8], filled[13]) == (False, True)


def test_gains_over_a_baseline():
    names = ("cat", "dog", "a bird of a very long name indeed", "fish")
    base, other = logits(seed=1), logits(seed=2, class_names=names)
    runs = [run("other", saved=other), run("ce", saved=base), run("without")]
    figure = plots.class_gains(runs, runs[1])
    (ax,) = figure.axes
    expected = quantities.class_gains(other.student, base.student, base.labels)
    assert [bar.get_width() for bar in ax.patches] == pytest.approx((100 * expected.gains).tolist())
    (bars,) = [group for group in ax.containers if isinstance(group, BarContainer)]
    (whiskers,) = bars.errorbar[2]
    spans = [segment[1][0] - segment[0][0] for segment in whiskers.get_segments()]
    assert spans == pytest.approx((200 * expected.errors).tolist())
    ticks = [label.get_text() for label in ax.get_yticklabels()]
    assert ticks[:2] == ["cat", "dog"] and ticks[2].startswith("a bird") and len(ticks[2]) <= 24
    assert ax.get_title() == f"other\nall samples: {100 * expected.mean:+.2f} points (dashed)"
    assert "Gains over ce" in words(figure) and ax.get_xlabel() == "gain in accuracy (points)"


def test_of_many_classes_the_extremes_are_shown():
    base, other = logits(1000, 60, seed=1), logits(1000, 60, seed=2)
    (ax,) = plots.class_gains([run("a", saved=other), base_run := run("b", saved=base)], base_run).axes
    gains = 100 * quantities.class_gains(other.student, base.student, base.labels).gains
    ordered = sorted(gains.tolist(), reverse=True)
    assert [bar.get_width() for bar in ax.patches] == pytest.approx(ordered[:12] + ordered[-12:])
    for label, bar in zip(ax.get_yticklabels(), ax.patches, strict=True):
        assert gains[int(label.get_text())].item() == pytest.approx(bar.get_width())


def test_classes_without_samples_are_left_out():
    saved = SavedLogits(torch.eye(3), torch.tensor([0, 2, 2]))
    (ax,) = plots.class_gains([run("a", saved=saved), base := run("b", saved=saved)], base).axes
    assert [label.get_text() for label in ax.get_yticklabels()] == ["0", "2"]


def test_gains_need_the_same_samples_and_classes():
    base = run("ce", saved=logits())
    with pytest.raises(ValueError, match="wide has 7 classes and ce has 4"):
        plots.class_gains([run("wide", saved=logits(classes=7)), base], base)
    with pytest.raises(ValueError, match=r"labels of more \(50 samples\) are not those of ce \(40 samples\)"):
        plots.class_gains([run("more", saved=logits(50)), base], base)
    for runs in ([base], [base, run("none")], [base, run("unlabelled", saved=logits(labels=False))]):
        with pytest.raises(ValueError, match="No run but the baseline ce"):
            plots.class_gains(runs, base)


def test_agreement_is_a_bar_of_five_parts():
    one, two = logits(seed=1), logits(seed=2)
    runs = [run("one", saved=one), run("no teacher", saved=logits(teacher=False)), run("two", saved=two)]
    (ax,) = (figure := plots.agreement(runs)).axes
    for n, saved in enumerate((one, two)):
        expected = quantities.agreement(saved.student, saved.teacher, saved.labels)
        found = [bars[n].get_width() for bars in ax.containers]
        assert found == pytest.approx([100 * value for value in expected.values()])
        lefts = [bars[n].get_x() for bars in ax.containers]
        assert lefts == pytest.approx([0, *np.cumsum(found)[:-1]])
    assert [label.get_text() for label in ax.get_yticklabels()] == ["one", "two"]
    assert len(legend(figure)) == 5 and legend(figure)[0] == "same class, right"


def test_without_logits_there_is_nothing_to_draw():
    for function, says in (
        (plots.entropy_histograms, "No run has saved logits."),
        (plots.reliability_diagrams, "saved logits with labels"),
        (plots.agreement, "saved logits of the teacher with labels"),
    ):
        with pytest.raises(ValueError, match=says):
            function([run("a"), run("b")])
    with pytest.raises(ValueError, match="saved logits with labels"):
        plots.reliability_diagrams([run(saved=logits(labels=False))])


def test_unequal_classes_share_the_figures():
    few, many = logits(classes=3, scale=0.1), logits(classes=8, scale=0.1)
    axes = plots.entropy_histograms([run("few", saved=few), run("many", saved=many)]).axes
    assert "log 3 = 1.10" in axes[0].get_xlabel() and "log 8 = 2.08" in axes[1].get_xlabel()
    assert axes[0].get_xlim() == axes[1].get_xlim() and [sum(heights(ax)) for ax in axes] == pytest.approx([100, 100])


# ---- Matplotlib ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("panels", [1, 2, 3, 5])
def test_at_most_two_panels_a_row(panels):
    runs = [run(f"r{n}", saved=logits(seed=n)) for n in range(panels)]
    figure = plots.reliability_diagrams(runs)
    assert len(figure.axes) == panels
    assert {ax.get_subplotspec().get_gridspec().ncols for ax in figure.axes} == {min(panels, 2)}


@pytest.mark.parametrize("kind", ["png", "svg", "pdf"])
def test_the_same_figure_is_the_same_file(tmp_path, kind):
    for name in "ab":
        figure = plots.training_curves([run("γ=0.25", log("student_entropy", 1.0, 2.0))], plots.ENTROPY)
        plots.save(figure, tmp_path / f"{name}.{kind}")
    one, two = (tmp_path / f"{name}.{kind}" for name in "ab")
    assert one.read_bytes() == two.read_bytes()
    assert one.read_bytes().startswith({"png": b"\x89PNG", "svg": b"<?xml", "pdf": b"%PDF"}[kind])
    assert len(list(tmp_path.iterdir())) == 2


def test_the_users_settings_neither_show_nor_change():
    entries = [run("a", log("student_entropy", 1.0, 2.0))]
    with matplotlib.rc_context({"font.size": 31.0, "axes.grid": False, "lines.linewidth": 9}):
        before = dict(matplotlib.rcParams)
        ax = plots.training_curves(entries, plots.ENTROPY).axes[0]
        assert ax.title.get_fontsize() == 10 and ax.lines[0].get_linewidth() == 1.5
        assert dict(matplotlib.rcParams) == before


def test_matplotlib_is_imported_when_something_is_drawn():
    for path in (Path(plots.__file__).parent).glob("*.py"):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, (ast.Import, ast.ImportFrom)):
                assert "matplotlib" not in ast.unparse(node), path


def test_without_matplotlib_one_sentence_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match=r'The figures need matplotlib: pip install "hf-kd\[quickstart\]"\.'):
        plots.entropy_histograms([run(saved=logits())])


def test_the_diagram_and_the_metric_have_one_binning():
    rows = per_sample_statistics(logits(500).student, logits(500).labels)
    result = reliability(rows, 11)
    inside = result.counts > 0
    share = result.counts[inside] / result.counts.sum()
    assert result.error == pytest.approx((share * abs(result.accuracy - result.confidence)[inside]).sum())
    assert result.counts.sum() == 498 and np.isnan(result.accuracy[~inside]).all()
