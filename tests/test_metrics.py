"""hf_kd.metrics against references that share no code with it: scikit-learn, scipy, a sort, and a loop over bins."""

import math
import socket

import evaluate
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import softmax
from scipy.stats import entropy as scipy_entropy
from sklearn.metrics import log_loss, top_k_accuracy_score

from hf_kd import metrics
from hf_kd.metrics import (
    Column,
    ExpectedCalibrationError,
    NegativeLogLikelihood,
    TeacherAgreement,
    Top1,
    Top5,
    TopK,
    column_mean,
    expected_calibration_error,
    per_sample_statistics,
    summarise,
    top_k_accuracy,
)


INF = math.inf
NAN = math.nan


def batch(samples=60, classes=9, seed=0, dtype=torch.float64):
    """Student logits, labels and teacher logits."""
    generator = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(samples, classes, generator=generator, dtype=torch.float64)
    teacher = 2 * torch.randn(samples, classes, generator=generator, dtype=torch.float64)
    labels = torch.randint(classes, (samples,), generator=generator)
    return logits.to(dtype), labels, teacher.to(dtype)


def naive_ece(logits, labels, num_bins):
    probabilities = softmax(logits, axis=1)
    confidence, predicted = probabilities.max(axis=1), probabilities.argmax(axis=1)
    error = 0.0
    for low in range(num_bins):
        members = [i for i, c in enumerate(confidence) if low / num_bins < c <= (low + 1) / num_bins]
        if members:
            accuracy = sum(predicted[i] == labels[i] for i in members) / len(members)
            error += len(members) / len(labels) * abs(accuracy - sum(confidence[members]) / len(members))
    return error


def rows_of(*confidence_and_correct, dtype=np.float64):
    return np.array([[0.0 if correct else 1.0, c, 0.0, 0.0] for c, correct in confidence_and_correct], dtype=dtype)


# ---- Per-sample statistics -----------------------------------------------------------------------------------------


def test_columns_match_references():
    logits, labels, teacher = batch()
    rows = per_sample_statistics(logits, labels, teacher).numpy()
    p, q = softmax(teacher.numpy(), axis=1), softmax(logits.numpy(), axis=1)
    assert (rows.shape, rows.dtype) == ((60, 6), np.float64)
    np.testing.assert_allclose(rows[:, Column.CONFIDENCE], q.max(axis=1), rtol=1e-12)
    np.testing.assert_allclose(rows[:, Column.NLL], -np.log(q[np.arange(60), labels]), rtol=1e-12)
    np.testing.assert_allclose(rows[:, Column.ENTROPY], scipy_entropy(q, axis=1), rtol=1e-12)
    np.testing.assert_allclose(rows[:, Column.DIVERGENCE], scipy_entropy(p, q, axis=1), rtol=1e-12)
    np.testing.assert_array_equal(rows[:, Column.AGREE], p.argmax(axis=1) == q.argmax(axis=1))
    without_teacher = per_sample_statistics(logits, labels)
    assert without_teacher.shape == (60, 4)
    np.testing.assert_array_equal(without_teacher, rows[:, :4])


@settings(deadline=None, max_examples=60)
@given(data=st.data(), classes=st.integers(1, 7))
def test_rank_is_the_place_in_a_stable_sort(data, classes):
    # Few distinct values, -inf among them: most rows have ties.
    value = st.sampled_from([-INF, -1.0, 0.0, 1.0])
    row = st.lists(value, min_size=classes, max_size=classes).filter(lambda r: max(r) > -INF)
    logits = data.draw(st.lists(row, min_size=1, max_size=5))
    labels = data.draw(st.lists(st.integers(0, classes - 1), min_size=len(logits), max_size=len(logits)))
    rank = per_sample_statistics(torch.tensor(logits), torch.tensor(labels))[:, Column.RANK].tolist()
    order = [sorted(range(classes), key=lambda k, r=row: -r[k]) for row in logits]
    assert rank == [classes_of.index(label) for classes_of, label in zip(order, labels, strict=True)]
    assert [r == 0 for r in rank] == (np.argmax(logits, axis=1) == labels).tolist()


def test_unlabelled_samples_have_nan_where_a_label_is_needed_and_nowhere_else():
    logits, labels, teacher = batch(samples=4)
    labels[1] = -100
    rows = per_sample_statistics(logits, labels, teacher)
    assert rows.isnan().nonzero().tolist() == [[1, Column.RANK], [1, Column.NLL]]
    expected = rows[1].clone()
    unlabelled = per_sample_statistics(logits, None, teacher)
    assert unlabelled[:, [Column.RANK, Column.NLL]].isnan().all()
    torch.testing.assert_close(unlabelled[1], expected, equal_nan=True, rtol=0, atol=0)


def test_minus_infinity_is_a_class_of_probability_zero():
    logits = torch.tensor([[0.0, 0.0, -INF], [0.0, -INF, -INF], [0.0, 0.0, -INF]])
    teacher = torch.tensor([[0.0, 0.0, -INF], [0.0, 0.0, -INF], [-INF, 0.0, -INF]])
    rows = per_sample_statistics(logits, torch.tensor([2, 0, 1]), teacher).double()
    log2 = math.log(2)
    expected = [
        [2, 0.5, INF, log2, 1, 0.0],
        [0, 1.0, 0.0, 0.0, 1, INF],  # the student rules out a class that the teacher does not
        [1, 0.5, log2, log2, 0, log2],
    ]
    torch.testing.assert_close(rows, torch.tensor(expected, dtype=torch.float64), rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_large_logits(dtype):
    logits = torch.tensor([[1e4, -1e4, 0.0], [-1e4, 1e4, 0.0]], dtype=dtype)
    big = logits[0, 0].item()  # 1e4 is not exact in bf16
    rows = per_sample_statistics(logits, torch.tensor([0, 0]), logits.flip(0)).double()
    expected = torch.tensor([[0, 1, 0, 0, 0, 2 * big], [2, 1, 2 * big, 0, 0, 2 * big]], dtype=torch.float64)
    torch.testing.assert_close(rows, expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_fp32(dtype):
    logits, labels, teacher = batch(classes=300, dtype=dtype)
    rows = per_sample_statistics(logits, labels, teacher)
    assert rows.dtype == torch.float32
    torch.testing.assert_close(rows, per_sample_statistics(logits.float(), labels, teacher.float()), rtol=0, atol=0)
    exact = per_sample_statistics(logits.double(), labels, teacher.double())
    assert exact.dtype == torch.float64
    torch.testing.assert_close(rows.double(), exact, rtol=1e-5, atol=1e-6)
    assert per_sample_statistics(logits, labels, teacher.double()).dtype == torch.float64


def test_divergence_from_itself_is_zero_and_no_graph_is_kept():
    logits, labels, _ = batch(dtype=torch.float32)
    logits.requires_grad_()
    rows = per_sample_statistics(logits, labels, logits)
    assert not rows.requires_grad
    assert rows[:, Column.DIVERGENCE].eq(0).all()
    assert rows[:, Column.AGREE].eq(1).all()


def test_rounding_does_not_make_a_divergence_negative():
    logits, labels, _ = batch(samples=500, dtype=torch.float32)
    rows = per_sample_statistics(logits, labels, logits * (1 + 1e-6))
    assert rows[:, Column.DIVERGENCE].min() >= 0


def test_logits_without_a_softmax_are_wrong_and_make_the_means_nan():
    logits = torch.tensor([[NAN, NAN, NAN], [INF, 0.0, 0.0], [-INF, -INF, -INF], [3.0, 0.0, 0.0]])
    teacher = torch.tensor([[NAN, NAN, NAN], [1.0, 0.0, 0.0], [1.0, 0.0, 0.0], [NAN, 0.0, 0.0]])
    rows = per_sample_statistics(logits, torch.zeros(4, dtype=torch.int64), teacher)
    assert rows[:, Column.RANK].tolist() == [INF, INF, INF, 0]
    assert rows[:, Column.AGREE].tolist() == [0, 0, 0, 0]
    assert rows[:, Column.DIVERGENCE].isnan().all()
    summary = summarise(rows)
    assert summary["top1"] == summary["top5"] == 0.25
    assert all(math.isnan(summary[key]) for key in ("nll", "ece", "entropy", "teacher_divergence"))


@pytest.mark.parametrize(
    ("logits", "labels", "teacher", "error", "message"),
    [
        (torch.zeros(3), torch.zeros(3).long(), None, ValueError, r"\(samples, classes\), got \(3,\)"),
        (torch.zeros(2, 3, 4), torch.zeros(2).long(), None, ValueError, r"got \(2, 3, 4\)"),
        (torch.zeros(2, 3).long(), torch.zeros(2).long(), None, TypeError, "floating point"),
        (torch.zeros(2, 3), torch.zeros(3).long(), None, ValueError, r"shape \(2,\).*got \(3,\)"),
        (torch.zeros(2, 3), torch.zeros(2, 3).long(), None, ValueError, r"got \(2, 3\)"),
        (torch.zeros(2, 3), torch.zeros(2), None, TypeError, "integer class indices, got torch.float32"),
        (torch.zeros(2, 3), torch.tensor([0, 3]), None, ValueError, r"\[0, 2\] for 3 classes.*got 3"),
        (torch.zeros(2, 3), torch.tensor([0, -1]), None, ValueError, "got -1"),
        # As uint8, -100 wraps around to 156.
        (torch.zeros(1, 3), torch.tensor([156], dtype=torch.uint8), None, ValueError, "got 156"),
        (torch.zeros(2, 3), torch.tensor([0, 1]), torch.zeros(2, 4), ValueError, r"\(2, 3\).*\(2, 4\)"),
        (torch.zeros(2, 3), torch.tensor([0, 1]), torch.zeros(1, 3), ValueError, r"\(2, 3\).*\(1, 3\)"),
    ],
)
def test_wrong_input_is_refused(logits, labels, teacher, error, message):
    with pytest.raises(error, match=message):
        per_sample_statistics(logits, labels, teacher)


# ---- Summaries -----------------------------------------------------------------------------------------------------


def test_summary_matches_references():
    logits, labels, teacher = batch(samples=200)
    summary = summarise(per_sample_statistics(logits, labels, teacher))
    p, q = softmax(teacher.numpy(), axis=1), softmax(logits.numpy(), axis=1)
    classes = range(9)
    assert summary == pytest.approx(
        {
            "top1": top_k_accuracy_score(labels, q, k=1, labels=classes),
            "top5": top_k_accuracy_score(labels, q, k=5, labels=classes),
            "nll": log_loss(labels, q, labels=classes),
            "ece": naive_ece(logits.numpy(), labels.tolist(), 15),
            "entropy": scipy_entropy(q, axis=1).mean(),
            "teacher_agreement": (p.argmax(1) == q.argmax(1)).mean(),
            "teacher_divergence": scipy_entropy(p, q, axis=1).mean(),
        },
        rel=1e-10,
    )
    assert all(type(value) is float for value in summary.values())


def test_summary_does_not_depend_on_array_type_or_teacher():
    rows = per_sample_statistics(*batch(dtype=torch.float32))
    assert summarise(rows) == summarise(rows.numpy())
    student = summarise(rows[:, :4])
    assert list(student) == ["top1", "top5", "nll", "ece", "entropy"]
    assert student.items() <= summarise(rows).items()


def test_ignored_labels_leave_every_label_metric_and_only_those():
    logits, labels, teacher = batch()
    holes = labels.clone()
    holes[::3] = -100
    kept = holes != -100
    summary = summarise(per_sample_statistics(logits, holes, teacher))
    of_kept = summarise(per_sample_statistics(logits[kept], labels[kept], teacher[kept]))
    of_all = summarise(per_sample_statistics(logits, labels, teacher))
    for key in ("top1", "top5", "nll", "ece"):
        assert summary[key] == pytest.approx(of_kept[key], rel=1e-12)
    for key in ("entropy", "teacher_agreement", "teacher_divergence"):
        assert summary[key] == of_all[key]


def test_without_any_label_only_label_free_metrics_remain():
    logits, labels, teacher = batch()
    rows = per_sample_statistics(logits, torch.full_like(labels, -100), teacher)
    assert list(summarise(rows)) == ["entropy", "teacher_agreement", "teacher_divergence"]
    for function in (top_k_accuracy, expected_calibration_error, column_mean):
        with pytest.raises(ValueError, match="None of the 60 samples has a label"):
            function(rows, Column.NLL)


@pytest.mark.parametrize("classes", [1, 2, 4])
def test_top5_of_few_classes_is_one(classes):
    logits, labels, _ = batch(classes=classes)
    summary = summarise(per_sample_statistics(logits, labels))
    assert summary["top5"] == 1.0
    assert summary["top1"] == (logits.argmax(1) == labels).double().mean().item()


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 20), st.integers(2, 6), st.integers(1, 40), st.integers(0, 2**31), st.floats(0.01, 30))
def test_calibration_error_is_the_loop_over_bins(num_bins, classes, samples, seed, scale):
    logits, labels, _ = batch(samples, classes, seed)
    rows = per_sample_statistics(scale * logits, labels)
    expected = naive_ece((scale * logits).numpy(), labels.tolist(), num_bins)
    assert expected_calibration_error(rows, num_bins) == pytest.approx(expected, abs=1e-9)


def test_a_bin_holds_its_upper_edge_and_not_its_lower_one():
    # Two samples in one bin may cancel, in two they do not: (|1 - .5 + 0 - .3|)/2 against (|1 - .5| + |0 - .3|)/2.
    assert expected_calibration_error(rows_of((0.5, True), (0.3, False)), 2) == pytest.approx(0.1)
    assert expected_calibration_error(rows_of((0.5, True), (0.7, False)), 2) == pytest.approx(0.6)
    assert expected_calibration_error(rows_of((1.0, True), (0.9, False)), 10) == pytest.approx(0.45)
    # In fp32 1/5 is above 1/5 in fp64; it must stay on the edge.
    assert expected_calibration_error(rows_of((0.2, True), (0.1, False), dtype=np.float32), 5) == pytest.approx(0.35)


@pytest.mark.parametrize("rows", [np.zeros((0, 4)), np.zeros((3, 5)), np.zeros(4)])
def test_rows_of_another_shape_are_refused(rows):
    with pytest.raises(ValueError, match=r"shape \(samples, 4\) or \(samples, 6\)"):
        summarise(rows)


@pytest.mark.parametrize("value", [0, -1, 2.0, True])
def test_bins_and_k_are_positive_integers(value):
    rows = per_sample_statistics(*batch())
    for call in (
        lambda: summarise(rows, num_bins=value),
        lambda: top_k_accuracy(rows, value),
        lambda: TopK(value),
        lambda: ExpectedCalibrationError(value),
    ):
        with pytest.raises(ValueError, match="must be an integer of at least 1"):
            call()


def test_a_teacher_column_needs_a_teacher():
    with pytest.raises(ValueError, match=r"no AGREE.*teacher_logits"):
        column_mean(per_sample_statistics(*batch()[:2]), Column.AGREE)


# ---- evaluate.Metric -----------------------------------------------------------------------------------------------

ALL_METRICS = [Top1, Top5, ExpectedCalibrationError, NegativeLogLikelihood, TeacherAgreement]


def without_entropy(rows, **kwargs):
    return {key: value for key, value in summarise(rows, **kwargs).items() if key != "entropy"}


@pytest.mark.parametrize("convert", [lambda t: t, lambda t: t.numpy(), lambda t: t.tolist(), list])
def test_combined_metrics_equal_the_summary_and_the_single_metrics(convert):
    logits, labels, teacher = batch()
    labels[5] = -100
    expected = without_entropy(per_sample_statistics(logits, labels, teacher))
    inputs = {"predictions": convert(logits), "references": convert(labels), "teacher_predictions": convert(teacher)}
    assert evaluate.combine([metric() for metric in ALL_METRICS]).compute(**inputs) == expected
    singles = {}
    for metric in ALL_METRICS:
        singles |= metric().compute(**inputs)
    assert singles == expected


def test_combination_without_a_teacher():
    logits, labels, _ = batch()
    combined = evaluate.combine([TopK(3), Top1(), ExpectedCalibrationError(num_bins=4)])
    result = combined.compute(predictions=logits, references=labels)
    rows = per_sample_statistics(logits, labels)
    assert result == {
        "top3": top_k_accuracy_score(labels, logits, k=3, labels=range(9)),
        "top1": summarise(rows)["top1"],
        "ece": expected_calibration_error(rows, 4),
    }


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_metrics_are_computed_in_fp64(dtype):
    logits, labels, teacher = batch(dtype=dtype)
    expected = without_entropy(per_sample_statistics(logits.double(), labels, teacher.double()))
    combined = evaluate.combine([metric() for metric in ALL_METRICS])
    for convert in (lambda t: t, list):
        inputs = {"predictions": convert(logits), "references": labels, "teacher_predictions": convert(teacher)}
        assert combined.compute(**inputs) == expected


def test_uneven_batches_and_single_samples_equal_one_computation(monkeypatch):
    logits, labels, teacher = batch()
    labels[5] = -100
    expected = without_entropy(per_sample_statistics(logits, labels, teacher))
    combined = evaluate.combine([metric() for metric in ALL_METRICS])
    for part in (slice(0, 1), slice(1, 38), slice(38, 60)):
        combined.add_batch(predictions=logits[part], references=labels[part], teacher_predictions=teacher[part])
    assert [len(module) for module in combined.evaluation_modules] == [60] * 5
    assert combined.compute() == expected
    for sample in range(60):
        combined.add(logits[sample], labels[sample], teacher_predictions=teacher[sample])
    assert combined.compute() == expected
    metric = Top1()
    for prediction, reference in zip(logits.tolist(), labels.tolist(), strict=True):
        metric.add(prediction=prediction, reference=reference)
    assert metric.compute() == {"top1": expected["top1"]}
    # More logits than are taken at once: 7 samples a piece.
    monkeypatch.setattr(metrics, "_ELEMENTS_AT_ONCE", 70)
    assert combined.compute(predictions=logits, references=labels, teacher_predictions=teacher) == expected


def test_a_metric_starts_afresh_after_a_result_and_after_an_error():
    logits, labels, _ = batch()
    metric = NegativeLogLikelihood()
    first = metric.compute(predictions=logits, references=labels)
    with pytest.raises(ValueError, match="got 9"):
        metric.compute(predictions=logits, references=torch.full_like(labels, 9))
    with pytest.raises(ValueError, match="None of the 60 samples has a label"):
        metric.compute(predictions=logits, references=torch.full_like(labels, -100))
    assert metric.compute(predictions=logits, references=labels) == first


def test_nothing_is_written_and_no_socket_is_opened(tmp_path, monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("a metric opened a socket")

    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setattr(socket, "socket", refuse)
    monkeypatch.setattr(evaluate.config, "HF_METRICS_CACHE", tmp_path / "cache")
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    logits, labels, teacher = batch()
    combined = evaluate.combine([metric() for metric in ALL_METRICS])
    combined.add_batch(predictions=logits, references=labels, teacher_predictions=teacher)
    assert combined.compute()["top5"] > 0
    assert list(tmp_path.iterdir()) == []


def test_files_are_used_when_asked_for(tmp_path):
    logits, labels, _ = batch()
    metric = Top1(keep_in_memory=False, cache_dir=str(tmp_path))
    metric.add_batch(predictions=logits, references=labels)
    assert list(tmp_path.rglob("*.arrow"))
    assert metric.compute() == Top1().compute(predictions=logits, references=labels)
    assert not list(tmp_path.rglob("*.arrow"))


@pytest.mark.parametrize("metric_class", ALL_METRICS)
def test_metrics_describe_themselves(metric_class):
    metric = metric_class()
    logits, labels, teacher = batch()
    assert metric.module_type == "metric"
    assert len(metric.description) > 40
    assert metric.citation.startswith("@")
    assert metric.citation.count("{") == metric.citation.count("}")
    assert metric.reference_urls[0].startswith("https://arxiv.org/abs/")
    result = metric.compute(predictions=logits, references=labels, teacher_predictions=teacher)
    for name in (*metric.features, *result):
        assert name in metric.inputs_description
    assert "(N, K)" in metric.compute.__doc__


@pytest.mark.parametrize(
    ("inputs", "error", "message"),
    [
        ({"predictions": [0, 1], "references": [0, 1]}, ValueError, r"\(samples, classes\), got \(2,\)"),
        ({"predictions": [[0.0, 1.0]], "references": [0, 1]}, ValueError, r"shape \(1,\).*got \(2,\)"),
        ({"predictions": [[0.0, 1.0]], "references": [2]}, ValueError, r"\[0, 1\] for 2 classes.*got 2"),
        ({"predictions": [[0.0, 1.0]], "references": [-1]}, ValueError, "got -1"),
        ({"predictions": [[0.0, 1.0]], "references": [0.5]}, TypeError, "integer class indices"),
        ({"predictions": [[0.0, 1.0], [0.0]], "references": [0, 1]}, ValueError, "rectangular array of numbers"),
        ({"predictions": [["a", "b"]], "references": [0]}, ValueError, "rectangular array of numbers"),
        ({"predictions": np.zeros((0, 3)), "references": np.zeros(0, int)}, ValueError, "empty batch"),
        ({"predictions": [[0.0, 1.0], [NAN, 1.0]], "references": [0, 1]}, ValueError, "no softmax.*sample 1"),
        ({"predictions": [[0.0, 1.0]]}, ValueError, r"\['references'\] is missing"),
        ({}, ValueError, "top1 has no samples"),
        ({"references": [0]}, ValueError, r"\['predictions'\] is missing"),
    ],
)
def test_metrics_refuse_wrong_input_in_one_sentence(inputs, error, message):
    with pytest.raises(error, match=message):
        Top1().compute(**inputs)


@pytest.mark.parametrize(
    ("teacher", "message"),
    [
        ([[0.0, 1.0, 2.0]], r"\(1, 2\).*\(1, 3\)"),
        ([[0.0, 1.0], [0.0, 1.0]], r"\(1, 2\).*\(2, 2\)"),
        ([[NAN, 1.0]], "no softmax.*sample 0"),
        (None, "missing"),
    ],
)
def test_teacher_agreement_refuses_wrong_teachers(teacher, message, monkeypatch):
    # A sample at a time, surplus teacher samples would go unseen if only the pieces were compared.
    monkeypatch.setattr(metrics, "_ELEMENTS_AT_ONCE", 2)
    with pytest.raises(ValueError, match=message):
        TeacherAgreement().compute(predictions=[[0.0, 1.0]], teacher_predictions=teacher)
    with pytest.raises(ValueError, match=r"inputs are missing.*teacher_predictions"):
        TeacherAgreement().compute(predictions=[[0.0, 1.0]], references=[0])


def test_unknown_inputs_are_refused():
    with pytest.raises(ValueError, match=r"top1 takes \['predictions', 'references'\], got \['scores'\]"):
        Top1().add_batch(predictions=[[0.0, 1.0]], references=[0], scores=[1])
