"""DKD, DIST and NKD against recorded numbers, definitions with 40 digits, and what must hold of them."""

import functools
import json
import math
from pathlib import Path

import mpmath
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from hf_kd.losses import Outputs, build_loss, dist_loss, dkd_loss, kd_loss, nkd_loss
from hf_kd.losses.logit import LOSSES


RECORDED = json.loads((Path(__file__).parents[1] / "data_files" / "logit_losses.json").read_text())
CASES = [case for case in RECORDED["cases"] if case["name"] in ("dkd", "dist", "nkd")]
FUNCTIONS = {"dkd": dkd_loss, "dist": dist_loss, "nkd": nkd_loss}
NAMES = list(FUNCTIONS)
LABELLED = ["dkd", "nkd"]
INF = math.inf

# Of each loss, weights that differ from one another and from the defaults.
WEIGHTS = {"dkd": {"alpha": 0.7, "beta": 3.0}, "dist": {"beta": 0.6, "gamma": 1.7}, "nkd": {"gamma": 1.5}}


def loss_of(name, student, teacher, labels, temperature=2.0, **kwargs):
    """Any of the three, with the weights above."""
    given_labels = () if name == "dist" else (labels,)
    return FUNCTIONS[name](student, teacher, *given_labels, temperature=temperature, **{**WEIGHTS[name], **kwargs})


def value_and_gradient(name, student, *arguments, **kwargs):
    student = student.detach().clone().requires_grad_()
    loss = loss_of(name, student, *arguments, **kwargs)
    return loss.detach(), torch.autograd.grad(loss.sum(), student)[0]


def per_sample(name):
    return {} if name == "dist" else {"reduction": "none"}


def random_logits(*shape, seed=0, scale=2.0, dtype=torch.float64):
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def random_labels(classes, *shape, seed=2):
    return torch.randint(classes, shape, generator=torch.Generator().manual_seed(seed))


def double(rows):
    return torch.tensor(rows, dtype=torch.float64)


def close(actual, expected, rtol=1e-9, atol=1e-9):
    torch.testing.assert_close(actual, expected, rtol=rtol, atol=atol)


# ---- The definitions, with 40 digits and no logarithmic tricks -----------------------------------------------------


def exact_softmax(logits, scale=1):
    top = max(logits)
    powers = [mpmath.exp(scale * (mpmath.mpf(x) - top)) if x != -INF else mpmath.mpf(0) for x in logits]
    total = mpmath.fsum(powers)
    return [x / total for x in powers]


def without(values, index):
    return [value for k, value in enumerate(values) if k != index]


def exact_sample(name, student, teacher, label, temperature):
    """Value and gradient (from the formulas q - p of the parts) of one sample of DKD or NKD."""
    with mpmath.workdps(40):
        log, t, y, gamma = mpmath.log, mpmath.mpf(temperature), int(label), 1 / mpmath.mpf(temperature)
        student, teacher = student.tolist(), teacher.tolist()
        weights = {key: mpmath.mpf(value) for key, value in WEIGHTS[name].items()}
        possible = any(x != -INF for x in without(teacher, y))
        q_others = exact_softmax(without(student, y), gamma)
        p_others = exact_softmax(without(teacher, y), gamma) if possible else q_others
        apart = [t * (b - a) for a, b in zip(p_others, q_others, strict=True)]
        if name == "dkd":
            p, q = exact_softmax(teacher, gamma), exact_softmax(student, gamma)
            p_rest, q_rest = mpmath.fsum(without(p, y)), mpmath.fsum(without(q, y))
            pairs = ((p[y], q[y]), (p_rest, q_rest))
            tckd = t**2 * mpmath.fsum(a * log(a / b) for a, b in pairs if a)
            nckd = t**2 * mpmath.fsum(a * log(a / b) for a, b in zip(p_others, q_others, strict=True) if a)
            value = weights["alpha"] * tckd + weights["beta"] * nckd
            # (p_y - q_y) as the difference of whichever is small, though 40 digits would bear the other.
            up = t * (p_rest - q_rest)
            gradient = [-weights["alpha"] * up * b + weights["beta"] * a for a, b in zip(apart, q_others, strict=True)]
            own = weights["alpha"] * up
        else:
            p, q = exact_softmax(teacher), exact_softmax(student)
            cross = -(t**2) * mpmath.fsum(a * log(b) for a, b in zip(p_others, q_others, strict=True) if a)
            value = -(p[y] * log(q[y]) if p[y] else 0) + (weights["gamma"] * cross if possible else 0)
            gradient = [p[y] * b + weights["gamma"] * a for a, b in zip(apart, without(q, y), strict=True)]
            own = -p[y] * mpmath.fsum(without(q, y))
        gradient.insert(y, own)
        return float(value), [float(x) for x in gradient]


def exact_rows(name, student, teacher, labels, temperature):
    rows = [
        exact_sample(name, s, t, y, temperature)
        for s, t, y in zip(student.double(), teacher.double(), labels, strict=True)
    ]
    return double([value for value, _ in rows]), double([gradient for _, gradient in rows])


def exact_dist(student, teacher, temperature, *, eps, beta=0.6, gamma=1.7):
    """DIST's value with 40 digits."""
    with mpmath.workdps(40):
        t = mpmath.mpf(temperature)
        p, q = ([exact_softmax(row, 1 / t) for row in logits.tolist()] for logits in (teacher, student))

        def correlation(a, b):
            a, b = ([x - mpmath.fsum(v) / len(v) for x in v] for v in (a, b))
            norms = mpmath.sqrt(mpmath.fsum(x * x for x in a)) * mpmath.sqrt(mpmath.fsum(x * x for x in b)) + eps
            return mpmath.fsum(x * y for x, y in zip(a, b, strict=True)) / norms if norms else mpmath.mpf(0)

        def distance(a, b):
            return 1 - mpmath.fsum(correlation(x, y) for x, y in zip(a, b, strict=True)) / len(a)

        columns = [list(map(list, zip(*rows, strict=True))) for rows in (q, p)]
        return float(t**2 * (mpmath.mpf(beta) * distance(q, p) + mpmath.mpf(gamma) * distance(*columns)))


# ---- Recorded numbers ----------------------------------------------------------------------------------------------


def test_the_record_is_whole():
    assert {name: sum(case["name"] == name for case in CASES) for name in NAMES} == {"dkd": 30, "dist": 30, "nkd": 40}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case["id"])
def test_recorded_value_and_gradient(case, dtype):
    inputs, name = RECORDED["inputs"][case["input"]], case["name"]
    rtol, atol = (1e-8, 1e-9) if dtype == torch.float64 else (1e-5, 1e-5)
    if name == "dist" and case["input"] in ("uniform_teacher", "batch_of_one"):
        atol = max(atol, 1e-7)
    student = torch.tensor(inputs["student_logits"], dtype=dtype, requires_grad=True)
    teacher, labels = torch.tensor(inputs["teacher_logits"], dtype=dtype), torch.tensor(inputs["labels"])
    arguments = (student, teacher) if name == "dist" else (student, teacher, labels)
    loss = FUNCTIONS[name](*arguments, **case["hyperparameters"])
    (gradient,) = torch.autograd.grad(loss, student)
    assert loss.dtype == dtype
    assert loss.item() == pytest.approx(case["expected_loss"], rel=rtol, abs=atol)
    close(gradient.double(), double(case["expected_grad_student"]), rtol, atol)

    module = build_loss(name, loss_kwargs=case["hyperparameters"])
    value = module(Outputs(student), Outputs(teacher), labels)["distill"].mean()
    assert value.item() == pytest.approx(case["expected_loss"], rel=rtol, abs=atol)
    close(torch.autograd.grad(value, student)[0], gradient, rtol, atol)


# ---- Values and gradients ------------------------------------------------------------------------------------------


@st.composite
def problems(draw):
    """Student and teacher logits (5, K), labels and temperature."""
    classes, seed = draw(st.integers(2, 20)), draw(st.integers(0, 2**31))
    scale, temperature = draw(st.floats(0.01, 20.0)), draw(st.sampled_from([0.5, 1.0, 2.0, 4.0]))
    student, teacher = (random_logits(5, classes, seed=seed + i, scale=scale) for i in (0, 1))
    return student, teacher, random_labels(classes, 5, seed=seed + 2), temperature


holds = settings(deadline=None, max_examples=30, derandomize=True)


@holds
@given(problems())
def test_dkd_and_nkd_are_their_definitions(problem):
    for name in LABELLED:
        value, gradient = value_and_gradient(name, *problem, reduction="none")
        expected = exact_rows(name, *problem)
        close(value, expected[0])
        close(gradient, expected[1])


@holds
@given(problems())
def test_dkd_with_kds_own_weight_is_kd(problem):
    student, teacher, labels, temperature = problem
    rest = 1 - (teacher / temperature).softmax(-1).gather(-1, labels[:, None])[:, 0]
    parts = [
        dkd_loss(*problem[:3], alpha=alpha, beta=beta, temperature=temperature, reduction="none")
        for alpha, beta in ((1.0, 0.0), (0.0, 1.0))
    ]
    close(parts[0] + rest * parts[1], kd_loss(student, teacher, temperature=temperature, reduction="none"), atol=1e-8)


@holds
@given(problems())
def test_dist_is_one_minus_numpys_correlations(problem):
    student, teacher, _, temperature = problem
    q, p = ((logits / temperature).softmax(-1) for logits in (student, teacher))
    inter, intra = (
        1 - np.mean([np.corrcoef(a, b)[0, 1] for a, b in zip(x.numpy(), y.numpy(), strict=True)])
        for x, y in ((q, p), (q.T, p.T))
    )
    expected = temperature**2 * (0.6 * inter + 1.7 * intra)
    value = loss_of("dist", student, teacher, None, temperature, eps=0.0)
    assert value.item() == pytest.approx(expected, rel=1e-6, abs=1e-6)


@pytest.mark.parametrize("eps", [0.0, 1e-8, 1e-3])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 2e-5)])
def test_dist_is_its_definition(eps, dtype, tolerance):
    student, teacher = random_logits(6, 7, scale=4.0, dtype=dtype), random_logits(6, 7, seed=1, scale=4.0, dtype=dtype)
    expected = exact_dist(student.double(), teacher.double(), 2.0, eps=mpmath.mpf(eps))
    assert loss_of("dist", student, teacher, None, eps=eps).item() == pytest.approx(expected, rel=tolerance)


def test_eps_pulls_the_correlation_of_rare_classes_towards_zero():
    """A thousand classes: each one's probability varies by so little that the code's eps is felt."""
    teacher = random_logits(16, 1000, seed=1, scale=4.0)
    near = teacher + 1e-3
    assert dist_loss(near, teacher, beta=0.0, eps=0.0).item() == pytest.approx(0.0, abs=1e-12)
    assert 0.05 < dist_loss(near, teacher, beta=0.0).item() < 0.9


# ---- What must hold ------------------------------------------------------------------------------------------------


@holds
@given(problems(), st.floats(-100.0, 100.0), st.floats(-100.0, 100.0))
def test_a_constant_on_all_logits_of_a_sample_changes_nothing(problem, first, second):
    student, teacher, labels, temperature = problem
    shifts = torch.linspace(-1.0, 1.0, 5, dtype=torch.float64).unsqueeze(-1)
    for name in NAMES:
        expected = value_and_gradient(name, student, teacher, labels, temperature)
        moved = value_and_gradient(name, student + first * shifts, teacher + second * shifts, labels, temperature)
        for a, b in zip(moved, expected, strict=True):
            close(a, b, rtol=1e-7, atol=1e-7)


@holds
@given(problems(), st.randoms(use_true_random=False))
def test_the_order_of_classes_and_of_samples_does_not_matter(problem, random):
    student, teacher, labels, temperature = problem
    classes, samples = list(range(student.size(-1))), list(range(5))
    random.shuffle(classes)
    random.shuffle(samples)
    renamed = torch.tensor([classes.index(y) for y in labels.tolist()])
    for name in NAMES:
        value, gradient = value_and_gradient(name, student, teacher, labels, temperature, **per_sample(name))
        permuted = value_and_gradient(
            name, student[:, classes], teacher[:, classes], renamed, temperature, **per_sample(name)
        )
        close(permuted[0], value, rtol=1e-8)
        close(permuted[1], gradient[:, classes], rtol=1e-7, atol=1e-7)
        moved = value_and_gradient(
            name, student[samples], teacher[samples], labels[samples], temperature, **per_sample(name)
        )
        close(moved[0], value if name == "dist" else value[samples], rtol=1e-8)
        close(moved[1], gradient[samples], rtol=1e-7, atol=1e-7)


@holds
@given(problems())
def test_at_the_teachers_logits(problem):
    _, teacher, labels, temperature = problem
    value, gradient = value_and_gradient("dkd", teacher + 3.0, teacher, labels, temperature, reduction="none")
    close(value, torch.zeros_like(value), atol=1e-11)
    close(gradient, torch.zeros_like(gradient), atol=1e-11)
    assert dkd_loss(-teacher, teacher, labels, temperature=temperature) > 1e-9
    # The paper's correlation is 1 there, unless a vector is constant.
    assert loss_of("dist", teacher + 3.0, teacher, None, temperature, eps=0.0).item() == pytest.approx(0.0, abs=1e-7)
    # NKD has cross-entropies: its value is that of the entropies, and only the others' gradient vanishes.
    p = teacher.softmax(-1)
    p_y = p.gather(-1, labels[:, None])
    target = F.one_hot(labels, teacher.size(-1)).bool()
    close(
        value_and_gradient("nkd", teacher, teacher, labels, temperature, reduction="none")[1],
        p_y * (p - target.double()),
        atol=1e-10,
    )
    others = (teacher[~target].view(5, -1) / temperature).softmax(-1)
    entropy = -(others * others.clamp_min(1e-300).log()).sum(-1)
    close(
        loss_of("nkd", teacher, teacher, labels, temperature, reduction="none"),
        -(p_y * p_y.clamp_min(1e-300).log())[:, 0] + 1.5 * temperature**2 * entropy,
        atol=1e-8,
    )


@holds
@given(problems())
def test_dkd_and_dist_are_never_negative(problem):
    student, teacher, labels, temperature = problem
    assert (loss_of("dkd", student, teacher, labels, temperature, reduction="none") >= -1e-11).all()
    assert loss_of("dist", student, teacher, labels, temperature) >= 0
    assert loss_of("dist", student, teacher, labels, temperature) <= 2 * temperature**2 * (0.6 + 1.7)


@pytest.mark.parametrize("name", LABELLED)
def test_reductions(name):
    student, teacher, labels = random_logits(5, 4), random_logits(5, 4, seed=1), random_labels(4, 5)
    rows, _ = exact_rows(name, student, teacher, labels, 2.0)
    close(loss_of(name, student, teacher, labels, reduction="none"), rows, rtol=1e-12)
    total = rows.sum().item()
    assert loss_of(name, student, teacher, labels, reduction="sum").item() == pytest.approx(total, rel=1e-12)
    assert loss_of(name, student, teacher, labels, reduction="mean").item() == pytest.approx(total / 5, rel=1e-12)
    assert loss_of(name, student, teacher, labels).item() == pytest.approx(total / 5, rel=1e-12)


def test_defaults():
    student, teacher, labels = random_logits(5, 4), random_logits(5, 4, seed=1), random_labels(4, 5)
    dkd = dkd_loss(student, teacher, labels, alpha=1.0, beta=8.0, temperature=4.0)
    assert dkd_loss(student, teacher, labels).equal(dkd)
    dist = dist_loss(student, teacher, beta=1.0, gamma=1.0, temperature=1.0, eps=1e-8)
    assert dist_loss(student, teacher).equal(dist)
    assert nkd_loss(student, teacher, labels).equal(nkd_loss(student, teacher, labels, gamma=1.0, temperature=1.0))


@pytest.mark.parametrize("name", NAMES)
def test_every_leading_dimension_is_a_sample(name):
    student, teacher, labels = random_logits(2, 3, 4, 5), random_logits(2, 3, 4, 5, seed=1), random_labels(5, 2, 3, 4)
    value, gradient = value_and_gradient(name, student, teacher, labels, **per_sample(name))
    flat = value_and_gradient(name, student.flatten(0, 2), teacher.flatten(0, 2), labels.flatten(), **per_sample(name))
    assert value.shape == (() if name == "dist" else (2, 3, 4)) and gradient.shape == student.shape
    close(value.flatten(), flat[0].flatten(), rtol=1e-13)
    close(gradient.flatten(0, 2), flat[1], rtol=1e-13)
    single = loss_of(name, student[1, 2, 3], teacher[1, 2, 3], labels[1, 2, 3])
    expected = loss_of(name, student[1, 2, 3:], teacher[1, 2, 3:], labels[1, 2, 3:])
    assert single.shape == () and single.item() == pytest.approx(expected.item(), rel=1e-13)


# ---- Labels --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", LABELLED)
def test_samples_without_a_label_are_left_out(name):
    student, teacher, labels = random_logits(5, 4), random_logits(5, 4, seed=1), random_labels(4, 5)
    labels[[1, 4]] = -100
    student[4, 0] = INF  # whatever the network makes of it
    value = loss_of(name, student, teacher, labels, reduction="none")
    known = [0, 2, 3]
    expected, gradient = exact_rows(name, student[known], teacher[known], labels[known], 2.0)
    close(value[known], expected, rtol=1e-12)
    assert value[[1, 4]].tolist() == [0.0, 0.0]
    mean, gradients = value_and_gradient(name, student[:4], teacher[:4], labels[:4])
    assert mean.item() == pytest.approx(expected.sum().item() / 4, rel=1e-12)
    close(gradients[known], gradient / 4, rtol=1e-12)
    assert gradients[1].eq(0).all()
    nothing, gradients = value_and_gradient(name, student[:4], teacher[:4], torch.full((4,), -100))
    assert nothing.item() == 0.0 and gradients.eq(0).all()


@pytest.mark.parametrize("dtype", [torch.int32, torch.uint8, torch.int64])
@pytest.mark.parametrize("name", LABELLED)
def test_labels_of_every_integer_type(name, dtype):
    student, teacher, labels = random_logits(5, 4), random_logits(5, 4, seed=1), random_labels(4, 5)
    assert loss_of(name, student, teacher, labels.to(dtype)).equal(loss_of(name, student, teacher, labels))


def test_nkd_takes_the_most_probable_class_of_soft_labels():
    student, teacher, soft = random_logits(5, 4), random_logits(5, 4, seed=1), random_logits(5, 4, seed=3).softmax(-1)
    assert loss_of("nkd", student, teacher, soft).equal(loss_of("nkd", student, teacher, soft.argmax(-1)))


@pytest.mark.parametrize("name", LABELLED)
@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (None, "{name} needs the class of each sample, and the batch has no labels"),
        (torch.zeros(3), r"type torch.float32 do not go with logits of shape \(3, 5\): give {name} one integer class"),
        (torch.zeros(3, 4), r"Labels of shape \(3, 4\) and type torch.float32 do not go with logits"),
        (torch.zeros(3, 5, dtype=torch.long), r"Labels of shape \(3, 5\) and type torch.int64 do not go with"),
        (torch.zeros(2, dtype=torch.long), r"Labels of shape \(2,\) .* do not go with .* of shape \(3,\)\."),
        (torch.zeros(3, dtype=torch.bool), "type torch.bool do not go with"),
        (torch.tensor([0, 5, 1]), "The label 5 is out of range for 5 classes: labels must be 0 to 4, or -100"),
        (torch.tensor([0, -1, 1]), "The label -1 is out of range for 5 classes"),
    ],
)
def test_labels_that_do_not_fit(name, labels, message):
    with pytest.raises(ValueError, match=message.format(name=name)):
        loss_of(name, random_logits(3, 5), random_logits(3, 5, seed=1), labels)


def test_dkd_has_no_meaning_for_soft_labels():
    with pytest.raises(ValueError, match="dkd takes one class per sample, and the labels are probabilities .* mixup"):
        loss_of("dkd", random_logits(3, 5), random_logits(3, 5, seed=1), random_logits(3, 5).softmax(-1))


# ---- Refusals ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_arguments_out_of_range(name):
    student, teacher, labels = random_logits(3, 5), random_logits(3, 5, seed=1), random_labels(5, 3)
    for wrong in (0.0, -1.0, INF, math.nan, "4"):
        with pytest.raises(ValueError, match="`temperature` must be a positive number, got"):
            loss_of(name, student, teacher, labels, wrong)
    for weight in WEIGHTS[name]:
        for wrong in (-0.1, INF, math.nan, "1"):
            with pytest.raises(ValueError, match=f"`{weight}` must be a number of at least 0, got"):
                loss_of(name, student, teacher, labels, **{weight: wrong})
            with pytest.raises(ValueError, match=f"`{weight}` must be a number of at least 0, got"):
                build_loss(name, loss_kwargs={weight: wrong})
    with pytest.raises(ValueError, match=r"Student logits of shape \(3, 5\) and teacher logits of shape \(3, 4\)"):
        loss_of(name, student, teacher[:, :4], labels)
    with pytest.raises(TypeError, match="`student_logits` must be floating point"):
        loss_of(name, student.long(), teacher, labels)


def test_more_arguments_out_of_range():
    student, teacher, labels = random_logits(3, 5), random_logits(3, 5, seed=1), random_labels(5, 3)
    for name in LABELLED:
        with pytest.raises(ValueError, match='`reduction` must be "mean", "sum" or "none"'):
            loss_of(name, student, teacher, labels, reduction="batchmean")
        with pytest.raises(ValueError, match=r"Logits of shape \(3, 1\) have one class"):
            loss_of(name, student[:, :1], teacher[:, :1], labels * 0)
    with pytest.raises(ValueError, match="`eps` must be a number of at least 0, got -1"):
        dist_loss(student, teacher, eps=-1)
    with pytest.raises(TypeError, match="`mask` must be bool"):
        dist_loss(student, teacher, mask=torch.ones(3))
    with pytest.raises(ValueError, match=r"`mask` of shape \(2,\) does not go with logits of shape \(3, 5\)"):
        dist_loss(student, teacher, mask=torch.ones(2, dtype=torch.bool))


# ---- Extremes ------------------------------------------------------------------------------------------------------


def extreme_logits(dtype):
    """Rows with entries up to ±1e4: far apart, and close together far from zero; the labels are at both ends."""
    g = torch.Generator().manual_seed(3)
    spread = (torch.rand(2, 8, generator=g, dtype=torch.float64) * 2 - 1) * 1e4
    near = torch.randn(4, 8, generator=g, dtype=torch.float64)
    student = torch.stack([spread[0], 1e4 + near[0] - 5, near[1] + 5 - 1e4, spread[1], near[1] + 5 - 1e4, near[2]])
    teacher = torch.stack([spread[1], near[2] + 5 - 1e4, 1e4 + near[3] - 5, near[2], near[0] + 5 - 1e4, spread[0]])
    student[0, :2], teacher[0, :2] = double([1e4, -1e4]), double([-1e4, 1e4])
    # The target 2e4 above the others, between which a softmax over all of them would see no difference.
    student[4, 3], teacher[4, 3] = 1e4, 1e4
    labels = torch.tensor([0, 1, 2, 3, 3, int(spread[0].argmin())])
    return student.to(dtype), teacher.to(dtype), labels


@pytest.mark.parametrize("temperature", [1.0, 3.0])  # a third of 1e4 is rounded
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-8), (torch.float32, 2e-5)])
@pytest.mark.parametrize("name", LABELLED)
def test_logits_up_to_ten_thousand(name, dtype, tolerance, temperature):
    student, teacher, labels = extreme_logits(dtype)
    value, gradient = value_and_gradient(name, student, teacher, labels, temperature, reduction="none")
    assert value.isfinite().all() and gradient.isfinite().all() and value.max() > 1e3
    expected = exact_rows(name, student, teacher, labels, temperature)
    close(value.double(), expected[0], tolerance, tolerance)
    close(gradient.double(), expected[1], tolerance, tolerance)
    # The others of row 4, far below the target, are told apart.
    assert gradient[4].abs().max() > 1e-3


@pytest.mark.parametrize("eps", [0.0, 1e-8])
@pytest.mark.parametrize("temperature", [1.0, 3.0])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_dist_of_logits_up_to_ten_thousand(dtype, temperature, eps):
    student, teacher, _ = extreme_logits(dtype)
    value, gradient = value_and_gradient("dist", student, teacher, None, temperature, eps=eps)
    assert value.isfinite() and gradient.isfinite().all() and gradient.abs().max() > 1e-6
    if eps:
        expected = exact_dist(student.double(), teacher.double(), temperature, eps=mpmath.mpf(eps))
        assert value.item() == pytest.approx(expected, rel=1e-8 if dtype == torch.float64 else 1e-5)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-11), (torch.float32, 1e-5)])
@pytest.mark.parametrize("name", LABELLED)
def test_impossible_classes_of_the_teacher(name, dtype, tolerance):
    student, teacher = random_logits(5, 6, dtype=dtype), random_logits(5, 6, seed=1, dtype=dtype)
    labels = torch.tensor([0, 1, 2, 3, 4])
    teacher[0, 5] = teacher[1, 2:4] = -INF  # others
    teacher[2, 2] = teacher[3, 3] = teacher[3, 0] = -INF  # the target: probability 0
    teacher[4] = double([-INF, -INF, -INF, -INF, 7.0, -INF])  # the target alone: probability 1
    value, gradient = value_and_gradient(name, student, teacher, labels, reduction="none")
    expected = exact_rows(name, student, teacher, labels, 2.0)
    close(value.double(), expected[0], tolerance, tolerance)
    close(gradient.double(), expected[1], tolerance, tolerance)
    # A certain teacher leaves the label alone.
    scale = {"dkd": 2.0, "nkd": 1.0}[name]
    hard = scale**2 * F.cross_entropy(student[4:] / scale, labels[4:]) * {"dkd": 0.7, "nkd": 1.0}[name]
    assert value[4].item() == pytest.approx(hard.item(), rel=max(tolerance, 1e-6) if dtype == torch.float32 else 1e-11)


@pytest.mark.parametrize("name", NAMES)
def test_impossible_to_both(name):
    """A class impossible to both networks is as if removed (DIST counts it as a class of no correlation)."""
    student, teacher, labels = random_logits(3, 6), random_logits(3, 6, seed=1), torch.tensor([0, 1, 5])
    student[:, 2] = teacher[:, 2] = -INF
    value, gradient = value_and_gradient(name, student, teacher, labels)
    assert value.isfinite() and gradient.isfinite().all() and (gradient[:, 2] == 0).all()
    if name != "dist":
        kept = [0, 1, 3, 4, 5]
        expected = value_and_gradient(name, student[:, kept], teacher[:, kept], torch.tensor([0, 1, 4]))
        close(value, expected[0], rtol=1e-12)
        close(gradient[:, kept], expected[1], rtol=1e-12)
    certain = torch.full((1, 4), -INF, dtype=torch.float64)
    certain[0, 1] = 2.0
    value, gradient = value_and_gradient(name, certain, certain, torch.tensor([1]))
    assert value.isfinite() and gradient.isfinite().all()
    if name != "dist":
        assert value.item() == 0.0 and gradient.eq(0).all()


@pytest.mark.parametrize("eps", [0.0, 1e-8])
def test_dist_of_impossible_classes_and_one_hot_teachers(eps):
    student, teacher = random_logits(4, 5), random_logits(4, 5, seed=1)
    teacher[:, 2] = teacher[1, 0] = -INF
    teacher[3] = double([-INF, 1.0, -INF, -INF, -INF])
    value, gradient = value_and_gradient("dist", student, teacher, None, eps=eps)
    assert value.item() == pytest.approx(exact_dist(student, teacher, 2.0, eps=mpmath.mpf(eps)), rel=1e-9)
    assert gradient.isfinite().all() and gradient.abs().min() > 0


@pytest.mark.parametrize("eps", [0.0, 1e-8])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_dist_of_constant_vectors(eps, dtype):
    """A uniform teacher correlates with nothing, in whatever way it is shifted; nor does a batch of one."""
    student = random_logits(4, 7, dtype=dtype)
    teacher = torch.linspace(-3.0, 3.0, 4, dtype=dtype)[:, None].expand(4, 7) / 0.7
    value, gradient = value_and_gradient("dist", student, teacher, None, eps=eps)
    assert value.item() == pytest.approx(4 * (0.6 + 1.7), rel=1e-6)
    assert gradient.abs().max() < 1e-5
    one, _ = value_and_gradient("dist", student[:1], student[:1] + 2, None, eps=eps)
    assert one.item() == pytest.approx(4 * 1.7, rel=1e-5)
    value, gradient = value_and_gradient("dist", student * 0, student, None, eps=eps)
    assert value.isfinite() and gradient.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_the_papers_correlation_takes_rounding_for_constant(dtype):
    """Of one row, shifted by what rounds its probabilities otherwise, each class is constant over the samples."""
    student = random_logits(4, 7, dtype=dtype)
    teacher = random_logits(1, 7, seed=1, dtype=dtype) + torch.linspace(-4.3, 4.3, 4, dtype=dtype)[:, None]
    assert not teacher.softmax(-1)[0].equal(teacher.softmax(-1)[3])
    value, gradient = value_and_gradient("dist", student, teacher, None, beta=0.0, eps=0.0)
    assert value.item() == pytest.approx(4 * 1.7, rel=1e-6) and gradient.eq(0).all()


@pytest.mark.parametrize("name", LABELLED)
@pytest.mark.parametrize("scale", [1e-3, 3.0, 1e4])
def test_two_classes(name, scale):
    """One other class: nothing to compare among the others."""
    student, teacher = double([[1.0, -1.0], [0.3, 0.2], [-1.0, 0.9]]), double([[-1.0, 1.0], [0.1, 0.4], [0.5, 0.5]])
    labels = torch.tensor([0, 1, 1])
    value, gradient = value_and_gradient(name, student * scale, teacher * scale, labels, reduction="none")
    expected = exact_rows(name, student * scale, teacher * scale, labels, 2.0)
    close(value, expected[0])
    close(gradient, expected[1])
    weight = {"dkd": "beta", "nkd": "gamma"}[name]
    again = value_and_gradient(name, student * scale, teacher * scale, labels, reduction="none", **{weight: 50.0})
    assert again[0].equal(value) and again[1].equal(gradient)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("network", ["student", "teacher"])
def test_nan_stays_visible(name, network):
    logits = {"student": random_logits(3, 6), "teacher": random_logits(3, 6, seed=1)}
    logits[network][1, 2] = math.nan
    value = loss_of(name, logits["student"], logits["teacher"], torch.tensor([2, 0, 1]), **per_sample(name))
    assert value.isnan().tolist() == (True if name == "dist" else [False, True, False])


# ---- Number formats, gradients, graphs -----------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", NAMES)
def test_halves_are_computed_in_float32(name, dtype):
    student, teacher = random_logits(5, 100, scale=6.0).to(dtype), random_logits(5, 100, seed=1, scale=6.0).to(dtype)
    labels = random_labels(100, 5)
    value, gradient = value_and_gradient(name, student, teacher, labels)
    expected = value_and_gradient(name, student.float(), teacher.float(), labels)
    assert value.dtype == torch.float32 and gradient.dtype == dtype
    assert value.equal(expected[0]) and gradient.equal(expected[1].to(dtype))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("name", NAMES)
def test_autocast_changes_nothing(name, dtype):
    student, teacher = random_logits(5, 20).to(dtype), random_logits(5, 20, seed=1).to(dtype)
    labels = random_labels(20, 5)
    expected = value_and_gradient(name, student, teacher, labels)
    with torch.autocast("cpu", torch.bfloat16):
        value, gradient = value_and_gradient(name, student, teacher, labels)
    assert value.dtype == expected[0].dtype and value.equal(expected[0]) and gradient.equal(expected[1])


@pytest.mark.parametrize("name", NAMES)
def test_gradcheck(name):
    teacher, labels = random_logits(4, 5, seed=1), torch.tensor([0, 4, 2, -100])
    teacher[0, 1] = teacher[1, 4] = -INF
    student = random_logits(4, 5).requires_grad_()
    for options in ({"eps": 0.0}, {"eps": 1e-8}) if name == "dist" else ({}, {"reduction": "none"}):
        function = functools.partial(loss_of, name, teacher=teacher, labels=labels, **options)
        assert torch.autograd.gradcheck(lambda z, function=function: function(student=z), student)
        assert torch.autograd.gradgradcheck(lambda z, function=function: function(student=z), student)


@pytest.mark.parametrize("name", NAMES)
def test_the_teacher_gets_no_gradient_and_inputs_are_left_alone(name):
    student, teacher = random_logits(3, 5).requires_grad_(), random_logits(3, 5, seed=1).requires_grad_()
    labels, before = random_labels(5, 3), (student.detach().clone(), teacher.detach().clone())
    loss_of(name, student, teacher, labels).backward()
    assert teacher.grad is None and student.grad.abs().min() > 0
    assert student.equal(before[0]) and teacher.equal(before[1]) and labels.equal(random_labels(5, 3))


@pytest.mark.parametrize("name", NAMES)
def test_compiled_in_one_graph(name):
    student, teacher = random_logits(4, 9, dtype=torch.float32), random_logits(4, 9, seed=1, dtype=torch.float32)
    labels = random_labels(9, 4)
    expected, gradient = value_and_gradient(name, student, teacher, labels)
    student.requires_grad_()
    compiled = torch.compile(FUNCTIONS[name], fullgraph=True, backend="aot_eager")
    arguments = () if name == "dist" else (labels,)
    loss = compiled(student, teacher, *arguments, temperature=2.0, **WEIGHTS[name])
    loss.backward()
    torch.testing.assert_close(loss.detach(), expected, rtol=1e-6, atol=0)
    torch.testing.assert_close(student.grad, gradient, rtol=1e-5, atol=1e-7)


# ---- DIST without what is no sample --------------------------------------------------------------------------------


@pytest.mark.parametrize("eps", [0.0, 1e-8])
def test_dist_leaves_out_what_is_masked(eps):
    student, teacher = random_logits(2, 4, 5), random_logits(2, 4, 5, seed=1)
    mask = torch.tensor([[True, True, False, True], [False, True, True, False]])
    expected = value_and_gradient("dist", student[mask], teacher[mask], None, eps=eps)
    student[0, 2], teacher[1, 0] = math.nan, INF
    value, gradient = value_and_gradient("dist", student, teacher, None, eps=eps, mask=mask)
    close(value, expected[0], rtol=1e-12)
    close(gradient[mask], expected[1], rtol=1e-10, atol=1e-12)
    assert gradient[~mask].eq(0).all()
    whole = torch.ones(2, 4, dtype=torch.bool)
    plain = random_logits(2, 4, 5), random_logits(2, 4, 5, seed=1), None
    close(loss_of("dist", *plain, mask=whole), loss_of("dist", *plain), rtol=1e-13)
    value, gradient = value_and_gradient("dist", student, teacher, None, eps=eps, mask=~whole)
    assert value.isfinite() and gradient.eq(0).all()
    assert not torch.isclose(loss_of("dist", *plain), expected[0])


# ---- Modules -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
@pytest.mark.parametrize("shape", [(6, 9), (2, 3, 5)])
@pytest.mark.parametrize("name", NAMES)
def test_modules_equal_the_functions(name, shape, dtype, tolerance):
    student = random_logits(*shape, dtype=dtype).requires_grad_()
    teacher, labels = random_logits(*shape, seed=1, dtype=dtype), random_labels(shape[-1], *shape[:-1])
    module = build_loss(name, gamma=0.5, loss_kwargs=WEIGHTS[name])
    result = module(Outputs(student), Outputs(teacher), labels)
    expected = loss_of(name, student, teacher, labels, **per_sample(name))
    assert result["distill"].shape == expected.shape
    close(result["distill"], expected, tolerance, tolerance)
    gradients = [torch.autograd.grad(value.sum(), student)[0] for value in (result["distill"], expected)]
    close(*gradients, tolerance, tolerance)
    # What is logged beside it are the two parts, without their weights.
    parts = {"dkd": ("tckd", "nckd"), "dist": ("inter", "intra"), "nkd": ("target", "non_target")}[name]
    assert set(result) == {"distill", *parts}
    weights = list(WEIGHTS[name].values())
    weights = weights if len(weights) == 2 else [1.0, *weights]
    close(weights[0] * result[parts[0]] + weights[1] * result[parts[1]], expected, tolerance, tolerance)


def test_the_dist_module_looks_at_the_mask():
    student, teacher, mask = random_logits(6, 5), random_logits(6, 5, seed=1), torch.tensor([1, 1, 0, 1, 1, 0]).bool()
    value = build_loss("dist", gamma=0.5, eps=1e-4)(Outputs(student, mask=mask), Outputs(teacher))["distill"]
    close(value, dist_loss(student[mask], teacher[mask], temperature=2.0, eps=1e-4), rtol=1e-12)


def test_the_configurations_gamma_is_the_temperature_and_no_weight():
    for name in NAMES:
        loss = build_loss(name, gamma=0.25)
        assert loss.temperature == 4.0 and not list(loss.parameters()) and not loss.state_dict()
        assert build_loss(name, gamma=0.25, loss_kwargs={"temperature": 2.0}).temperature == 2.0
        assert "temperature=4.0" in repr(loss)
        with pytest.raises(ValueError, match=f"The loss '{name}' takes .*temperature.*, not power: correct"):
            build_loss(name, power=2)
        with pytest.raises(ValueError, match='beta="auto" is defined for .* give `beta` as a number'):
            loss.balanced_beta(0.9, 2.0)
    assert build_loss("dist", gamma=0.25).gamma == build_loss("nkd", gamma=0.25).gamma == 1.0
    assert build_loss("dist", gamma=0.25, loss_kwargs={"gamma": 2.0}).gamma == 2.0
    assert build_loss("nkd", gamma=0.25, loss_kwargs={"gamma": 1.5}).gamma == 1.5
    defaults = {name: (LOSSES[name].default_gamma, build_loss(name).temperature) for name in NAMES}
    assert defaults == {"dkd": (0.25, 4.0), "dist": (1.0, 1.0), "nkd": (1.0, 1.0)}
    assert {name: LOSSES[name].needs_labels for name in NAMES} == {"dkd": True, "dist": False, "nkd": True}


def test_warm_up_of_dkd_grows_from_epoch_to_epoch():
    student, teacher, labels = Outputs(random_logits(4, 6)), Outputs(random_logits(4, 6, seed=1)), random_labels(6, 4)
    full = build_loss("dkd")(student, teacher, labels)
    loss = build_loss("dkd", warmup_epochs=20)
    for epoch, factor in ((None, 1 / 20), (0.99, 1 / 20), (1.0, 2 / 20), (2.9999999, 4 / 20), (19, 1.0), (50.5, 1.0)):
        if epoch is not None:
            loss.set_epoch(epoch)
        result = loss(student, teacher, labels)
        close(result["distill"], factor * full["distill"], rtol=1e-12)
        assert result["tckd"].equal(full["tckd"])
    unchanged = build_loss("dkd")
    unchanged.set_epoch(0.0)
    assert unchanged(student, teacher, labels)["distill"].equal(full["distill"])
    with pytest.raises(ValueError, match="`warmup_epochs` must be a number of at least 0, got -1"):
        build_loss("dkd", warmup_epochs=-1)
