"""What the figures show, against loops over samples with scipy, in fp64."""

import math

import numpy as np
import pytest
import torch
from invented import logits
from scipy.special import softmax
from scipy.stats import entropy

from hf_kd.analysis import quantities
from hf_kd.analysis.quantities import AGREEMENT, agreement, class_accuracy, class_gains, entropy_histogram, summary


def test_the_means_of_a_run():
    saved = logits(gamma=0.25)
    z, v = saved.student.numpy(), saved.teacher.numpy()
    q, p, p_t = softmax(z, axis=1), softmax(v, axis=1), softmax(0.25 * v, axis=1)
    found = summary(saved)
    assert found["entropy"] == pytest.approx(np.mean([entropy(row) for row in q]), rel=1e-12)
    assert found["divergence"] == pytest.approx(
        np.mean([entropy(a, b) for a, b in zip(p_t, q, strict=True)]), rel=1e-12
    )
    assert found["teacher_divergence"] == pytest.approx(np.mean([entropy(a, b) for a, b in zip(p, q, strict=True)]))
    assert found["power_sum"] == pytest.approx(np.mean([sum(row**0.25) for row in p]), rel=1e-12)
    assert found["teacher_entropy"] == pytest.approx(np.mean([entropy(row) for row in p_t]), rel=1e-12)
    labels = saved.labels.numpy()
    right = z.argmax(axis=1)[:-2] == labels[:-2]
    assert found["top1"] == pytest.approx(right.mean())
    assert found["teacher_agreement"] == pytest.approx((z.argmax(axis=1) == v.argmax(axis=1)).mean())


def test_means_without_a_teacher_and_without_its_gamma():
    assert summary(logits(teacher=False)).keys() & {"divergence", "power_sum", "teacher_agreement"} == set()
    plain = summary(logits(gamma=None))
    assert plain["divergence"] == pytest.approx(plain["teacher_divergence"])
    assert plain["power_sum"] == pytest.approx(1.0)


def test_half_precision_is_taken_to_fp64():
    saved = logits()
    half = type(saved)(saved.student.half(), saved.labels, saved.teacher.half(), saved.gamma)
    exact = type(saved)(saved.student.half().double(), saved.labels, saved.teacher.half().double(), saved.gamma)
    assert summary(half) == summary(exact)


def test_a_histogram_is_a_count_of_samples():
    saved = logits(samples=200)
    upper = math.log(4)
    histogram = entropy_histogram(saved.student, upper, bins=7)
    values = [entropy(row) for row in softmax(saved.student.numpy(), axis=1)]
    counts, edges = np.histogram(values, bins=7, range=(0, upper))
    np.testing.assert_allclose(histogram.edges.numpy(), edges, rtol=1e-12)
    np.testing.assert_allclose(histogram.fractions.numpy(), counts / 200, rtol=1e-12)
    assert histogram.mean == pytest.approx(np.mean(values), rel=1e-12)


def test_the_ends_of_a_histogram():
    # H(q) is 0, or log K, to within rounding; and one that is above the limit.
    extremes = torch.tensor([[0.0, -math.inf], [1e4, 0.0], [0.3, 0.3], [0.0, 0.0]], dtype=torch.float64)
    assert entropy_histogram(extremes, math.log(2), bins=4).fractions.tolist() == [0.5, 0, 0, 0.5]
    assert entropy_histogram(extremes, 0.5, bins=4).fractions.tolist() == [0.5, 0, 0, 0.5]
    # A value on an edge is in the bin above it.
    assert entropy_histogram(extremes[2:], 2 * math.log(2), bins=2).fractions.tolist() == [0, 1]
    for upper, bins, samples in ((0.0, 4, 4), (1.0, 0, 4), (1.0, 4, 0)):
        with pytest.raises(ValueError, match="needs samples"):
            entropy_histogram(extremes[:samples], upper, bins)


def test_accuracy_of_classes_of_unequal_size():
    z = torch.eye(4, dtype=torch.float64)[[0, 0, 1, 1, 0, 2]]
    labels = torch.tensor([0, 0, 0, 1, -100, 2])
    accuracy, counts = class_accuracy(z, labels)
    assert accuracy[:3].tolist() == pytest.approx([2 / 3, 1, 1])
    assert accuracy[3].isnan()
    assert counts.tolist() == [3, 1, 1, 0]


def test_gains_are_means_over_a_classs_samples():
    one, two = logits(samples=120, seed=1), logits(samples=120, seed=2)
    labels = one.labels
    found = class_gains(one.student, two.student, labels)
    differences = {k: [] for k in range(4)}
    for a, b, label in zip(one.student.tolist(), two.student.tolist(), labels.tolist(), strict=True):
        if label != -100:
            differences[label].append(int(np.argmax(a) == label) - int(np.argmax(b) == label))
    for k, values in differences.items():
        assert found.gains[k].item() == pytest.approx(np.mean(values), abs=1e-12)
        assert found.errors[k].item() == pytest.approx(np.std(values) / math.sqrt(len(values)), rel=1e-9)
        assert found.counts[k].item() == len(values)
    assert found.mean == pytest.approx(
        np.mean([value for values in differences.values() for value in values]), abs=1e-12
    )
    assert class_gains(one.student, one.student, labels).gains.tolist() == [0, 0, 0, 0]


def test_a_class_without_samples_has_no_gain():
    found = class_gains(torch.eye(3), torch.eye(3).flip(0), torch.tensor([0, -100, 0]))
    assert found.gains[0] == 0 and found.errors[0] == pytest.approx(math.sqrt(1 / 2))
    assert found.gains[1:].isnan().all() and found.errors[1:].isnan().all()


def test_the_cases_of_agreement():
    student = torch.eye(4)[[0, 1, 2, 0, 1, 3, 0]]
    teacher = torch.eye(4)[[0, 1, 0, 2, 2, 3, 0]]
    labels = torch.tensor([0, 3, 2, 2, 0, 3, -100])
    found = agreement(student, teacher, labels)
    assert list(found) == list(AGREEMENT)
    assert found == {key: pytest.approx(value / 6) for key, value in zip(AGREEMENT, (2, 1, 1, 1, 1), strict=True)}


def test_the_cases_add_up_to_the_agreement_and_both_accuracies():
    saved = logits(samples=300)
    found = agreement(saved.student, saved.teacher, saved.labels)
    z, v, y = (part[:-2] for part in (saved.student.argmax(1), saved.teacher.argmax(1), saved.labels))
    assert sum(found.values()) == pytest.approx(1)
    assert found["same_right"] + found["same_wrong"] == pytest.approx((z == v).double().mean().item())
    assert found["same_right"] + found["student_right"] == pytest.approx((z == y).double().mean().item())
    assert found["same_right"] + found["teacher_right"] == pytest.approx((v == y).double().mean().item())


def test_what_does_not_go_together_is_refused():
    z, none = torch.zeros(3, 2), torch.full((3,), -100)
    for function in (lambda y: class_gains(z, z, y), lambda y: agreement(z, z, y), lambda y: class_accuracy(z, y)):
        with pytest.raises(ValueError, match="None of the 3 samples has a label"):
            function(none)
        with pytest.raises(ValueError, match="got 2"):
            function(torch.tensor([0, 1, 2]))
    for function in (quantities.class_gains, quantities.agreement):
        with pytest.raises(ValueError, match=r"\(3, 2\).*\(3, 3\)"):
            function(z, torch.zeros(3, 3), torch.zeros(3, dtype=torch.long))
