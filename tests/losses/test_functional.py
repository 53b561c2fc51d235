"""The losses against recorded numbers, the paper's identities, and a reference of many digits."""

import functools
import json
import math
from pathlib import Path

import mpmath
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from hf_kd.losses import (
    balanced_beta,
    kd_loss,
    log_power_sum,
    power_sum,
    power_transform,
    renyi_entropy,
    shannon_entropy,
    ttm_loss,
    wttm_loss,
)


RECORDED = json.loads((Path(__file__).parents[1] / "data_files" / "logit_losses.json").read_text())
CASES = [case for case in RECORDED["cases"] if case["name"] in ("kd", "ttm", "wttm")]
LOSSES = {"kd": kd_loss, "ttm": ttm_loss, "wttm": wttm_loss}
NAMES = list(LOSSES)
INF = math.inf


def loss_of(name, student, teacher, gamma, **kwargs):
    """Any of the three by its gamma = 1/T."""
    strength = {"temperature": 1.0 / gamma} if name == "kd" else {"gamma": gamma}
    return LOSSES[name](student, teacher, **strength, **kwargs)


def value_and_gradient(name, student, teacher, gamma, **kwargs):
    student = student.detach().clone().requires_grad_()
    loss = loss_of(name, student, teacher, gamma, **kwargs)
    return loss.detach(), torch.autograd.grad(loss.sum(), student)[0]


def random_logits(*shape, seed=0, scale=2.0, dtype=torch.float64):
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def double(rows):
    return torch.tensor(rows, dtype=torch.float64)


def exact(student, teacher, gamma):
    """One sample's losses and their gradients with 40 digits, from the definitions: no logarithmic tricks."""
    with mpmath.workdps(40):
        mpf, exp, log = mpmath.mpf, mpmath.exp, mpmath.log
        gamma = mpf(gamma)

        def softmax(logits, scale=1):
            top = max(logits)
            powers = [exp(scale * (mpf(x) - top)) if x != -INF else mpf(0) for x in logits]
            total = mpmath.fsum(powers)
            return [x / total for x in powers]

        def divergence(a, b):
            return mpmath.fsum(x * log(x / y) for x, y in zip(a, b, strict=True) if x)

        def difference(a, b, scale=1):
            return [float(scale * (x - y)) for x, y in zip(a, b, strict=True)]

        student, teacher = student.tolist(), teacher.tolist()
        p, p_t = softmax(teacher), softmax(teacher, gamma)
        q, q_t = softmax(student), softmax(student, gamma)
        u = mpmath.fsum(x**gamma for x in p if x)
        ttm = divergence(p_t, q)
        return {
            "power_sum": float(u),
            "p_t": [float(x) for x in p_t],
            "kd": (float(divergence(p_t, q_t) / gamma**2), difference(q_t, p_t, 1 / gamma)),
            "ttm": (float(ttm), difference(q, p_t)),
            "wttm": (float(u * ttm), difference(q, p_t, u)),
        }


# ---- Recorded numbers ----------------------------------------------------------------------------------------------


def test_the_record_is_whole():
    assert {name: sum(case["name"] == name for case in CASES) for name in NAMES} == {"kd": 40, "ttm": 50, "wttm": 50}


@pytest.mark.parametrize(("dtype", "rtol", "atol"), [(torch.float64, 1e-8, 1e-9), (torch.float32, 1e-5, 1e-5)])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case["id"])
def test_recorded_value_and_gradient(case, dtype, rtol, atol):
    inputs = RECORDED["inputs"][case["input"]]
    student = torch.tensor(inputs["student_logits"], dtype=dtype, requires_grad=True)
    teacher = torch.tensor(inputs["teacher_logits"], dtype=dtype)
    loss = LOSSES[case["name"]](student, teacher, **case["hyperparameters"])
    loss.backward()
    assert loss.dtype == dtype
    assert loss.item() == pytest.approx(case["expected_loss"], rel=rtol, abs=atol)
    torch.testing.assert_close(student.grad.double(), double(case["expected_grad_student"]), rtol=rtol, atol=atol)

    if case["name"] == "kd":
        return
    gamma = case["hyperparameters"]["gamma"]
    expected_u, expected_kl = double(case["power_sum_U"]), double(case["per_sample_kl"])
    torch.testing.assert_close(power_sum(teacher, gamma).double(), expected_u, rtol=rtol, atol=atol)
    per_sample = ttm_loss(student, teacher, gamma=gamma, reduction="none").double()
    torch.testing.assert_close(per_sample, expected_kl, rtol=rtol, atol=atol)
    weighted = wttm_loss(student, teacher, gamma=gamma, reduction="none").double()
    torch.testing.assert_close(weighted, expected_u * expected_kl, rtol=rtol, atol=atol)


# ---- The paper's identities ----------------------------------------------------------------------------------------


@st.composite
def problems(draw):
    """Student and teacher logits (4, K), labels and gamma."""
    classes, seed = draw(st.integers(2, 50)), draw(st.integers(0, 2**31))
    scale = draw(st.floats(0.01, 30.0))
    gamma = draw(st.one_of(st.floats(0.05, 1.0), st.sampled_from([0.1, 0.25, 0.8, 0.995, 1.0])))
    labels = torch.randint(classes, (4,), generator=torch.Generator().manual_seed(seed))
    student = random_logits(4, classes, seed=seed, scale=scale)
    return student, random_logits(4, classes, seed=seed + 1, scale=scale), labels, gamma


identity = settings(deadline=None, max_examples=60, derandomize=True)


def close(actual, expected, rtol=1e-9, atol=1e-9):
    torch.testing.assert_close(actual, expected, rtol=rtol, atol=atol)


@identity
@given(problems())
def test_ttm_is_kd_plus_a_renyi_regulariser(problem):
    student, teacher, _, gamma = problem
    temperature = 1.0 / gamma
    kd = kd_loss(student, teacher, temperature=temperature, reduction="none")
    expected = (
        kd / temperature
        - (temperature - 1) * renyi_entropy(student, gamma)
        + (temperature - 1) * shannon_entropy(gamma * teacher)
    )
    close(ttm_loss(student, teacher, gamma=gamma, reduction="none"), expected)


@identity
@given(problems())
def test_values_are_the_definitions(problem):
    student, teacher, _, gamma = problem
    p_t, q, q_t = (gamma * teacher).softmax(-1), student.softmax(-1), (gamma * student).softmax(-1)
    u = (teacher.softmax(-1) ** gamma).sum(-1)
    ttm = F.kl_div(q.log(), p_t, reduction="none").sum(-1)
    close(power_transform(teacher, gamma), p_t)
    close(power_sum(teacher, gamma), u)
    close(ttm_loss(student, teacher, gamma=gamma, reduction="none"), ttm)
    close(wttm_loss(student, teacher, gamma=gamma, reduction="none"), u * ttm)
    kd = F.kl_div(q_t.log(), p_t, reduction="none").sum(-1) / gamma**2
    close(kd_loss(student, teacher, temperature=1 / gamma, reduction="none"), kd)


@identity
@given(problems(), st.floats(0.0, 100.0))
def test_gradients_are_the_papers(problem, beta):
    student, teacher, labels, gamma = problem
    p_t, q, q_t = (gamma * teacher).softmax(-1), student.softmax(-1), (gamma * student).softmax(-1)
    u = (teacher.softmax(-1) ** gamma).sum(-1, keepdim=True)
    expected = {"ttm": q - p_t, "wttm": u * (q - p_t), "kd": (q_t - p_t) / gamma}
    for name in NAMES:
        close(value_and_gradient(name, student, teacher, gamma, reduction="sum")[1], expected[name])
    student.requires_grad_()
    per_sample = wttm_loss(student, teacher, gamma=gamma, reduction="none")
    total = F.cross_entropy(student, labels, reduction="sum") + beta * per_sample.sum()
    y = F.one_hot(labels, student.size(-1))
    close(torch.autograd.grad(total, student)[0], (q - y) + beta * u * (q - p_t))


@identity
@given(problems())
def test_without_temperature_the_three_are_one(problem):
    student, teacher, *_ = problem
    close(power_sum(teacher, 1.0), torch.ones(4, dtype=torch.float64), atol=1e-13)
    close(power_transform(teacher, 1.0), teacher.softmax(-1), atol=1e-14)
    ttm = ttm_loss(student, teacher, gamma=1.0, reduction="none")
    close(ttm, F.kl_div(student.log_softmax(-1), teacher.softmax(-1), reduction="none").sum(-1))
    close(wttm_loss(student, teacher, gamma=1.0, reduction="none"), ttm, atol=1e-12)
    close(kd_loss(student, teacher, temperature=1.0, reduction="none"), ttm, atol=1e-12)


@identity
@given(problems())
def test_log_power_sum_and_its_bounds(problem):
    _, teacher, _, gamma = problem
    log_u = log_power_sum(teacher, gamma)
    close(log_u, torch.logsumexp(gamma * teacher, -1) - gamma * torch.logsumexp(teacher, -1), atol=1e-12)
    close(log_u.exp(), power_sum(teacher, gamma), atol=0)
    assert (log_u >= -1e-13).all()
    assert (log_u <= (1 - gamma) * math.log(teacher.size(-1)) + 1e-12).all()


@pytest.mark.parametrize("classes", [2, 10, 1000, 21841])
@pytest.mark.parametrize("gamma", [0.1, 0.5, 0.8])
def test_power_sum_is_extreme_at_one_hot_and_uniform(classes, gamma):
    one_hot = torch.full((classes,), -INF, dtype=torch.float64)
    one_hot[classes // 2] = 3.0
    assert power_sum(one_hot, gamma).item() == 1.0
    uniform = torch.full((classes,), 5.0, dtype=torch.float64)
    assert power_sum(uniform, gamma).item() == pytest.approx(classes ** (1 - gamma), rel=1e-12)


def test_power_sum_of_a_uniform_teacher_on_imagenet():
    assert power_sum(torch.zeros(1000, dtype=torch.float64), 0.1).item() == pytest.approx(501.187233627272, rel=1e-13)


@identity
@given(problems(), st.floats(-1000.0, 1000.0), st.floats(-1000.0, 1000.0))
def test_a_constant_on_all_logits_of_a_sample_changes_nothing(problem, first, second):
    student, teacher, _, gamma = problem
    shifts = torch.linspace(-1.0, 1.0, 4, dtype=torch.float64).unsqueeze(-1)
    for name in NAMES:
        expected = value_and_gradient(name, student, teacher, gamma, reduction="none")
        moved = value_and_gradient(name, student + first * shifts, teacher + second * shifts, gamma, reduction="none")
        for a, b in zip(moved, expected, strict=True):
            close(a, b, atol=1e-8)
    close(power_sum(teacher + first * shifts, gamma), power_sum(teacher, gamma))
    close(shannon_entropy(teacher + first * shifts), shannon_entropy(teacher))
    close(renyi_entropy(teacher + first * shifts, gamma), renyi_entropy(teacher, gamma))


@identity
@given(problems(), st.randoms(use_true_random=False))
def test_the_order_of_classes_does_not_matter(problem, random):
    student, teacher, _, gamma = problem
    order = list(range(student.size(-1)))
    random.shuffle(order)
    for name in NAMES:
        value, gradient = value_and_gradient(name, student, teacher, gamma, reduction="none")
        permuted = value_and_gradient(name, student[:, order], teacher[:, order], gamma, reduction="none")
        close(permuted[0], value)
        close(permuted[1], gradient[:, order])
    close(power_transform(teacher[:, order], gamma), power_transform(teacher, gamma)[:, order], atol=1e-14)
    close(power_sum(teacher[:, order], gamma), power_sum(teacher, gamma))


@identity
@given(problems())
def test_losses_are_never_negative_and_zero_only_at_the_target(problem):
    student, teacher, _, gamma = problem
    for name in NAMES:
        assert (loss_of(name, student, teacher, gamma, reduction="none") >= -1e-11).all()
    # D(p_T || q) vanishes where the student has the *transformed* teacher's probabilities, KD where it has the plain.
    at_target = {"kd": teacher, "ttm": gamma * teacher, "wttm": gamma * teacher}
    for name in NAMES:
        value, gradient = value_and_gradient(name, at_target[name] + 3.0, teacher, gamma, reduction="none")
        close(value, torch.zeros_like(value), atol=1e-10)
        close(gradient, torch.zeros_like(gradient), atol=1e-11)
        assert loss_of(name, -at_target[name], teacher, gamma) > 1e-12
    close(power_transform(teacher, gamma), (gamma * teacher + 3.0).softmax(-1), atol=1e-12)


# ---- Balance with KD -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("lam", "temperature", "mean_power_sum", "beta"),
    [(0.9, 4, 1.0, 36.0), (0.9, 4, 12.0, 3.0), (0.5, 1, 1.0, 1.0), (0.75, 10, 2.5, 12.0), (0.0, 4, 1.0, 0.0)],
)
def test_balanced_beta(lam, temperature, mean_power_sum, beta):
    assert balanced_beta(lam, temperature, mean_power_sum) == pytest.approx(beta, rel=1e-14)


def test_balanced_beta_is_not_the_misprint():
    assert balanced_beta(0.9, 4) == pytest.approx(36.0)
    assert abs(balanced_beta(0.9, 4) - 0.9 / (1 - 0.9 * 4)) > 36


@identity
@given(problems(), st.floats(0.0, 0.98))
def test_at_the_balanced_beta_ttm_differs_from_kd_by_the_regulariser_alone(problem, lam):
    """KD's objective over 1 - λ is TTM's, labels and soft term alike, once the Rényi regulariser is taken out."""
    student, teacher, labels, gamma = problem
    temperature = 1.0 / gamma
    student.requires_grad_()
    ce = F.cross_entropy(student, labels)
    kd = (1 - lam) * ce + lam * kd_loss(student, teacher, temperature=temperature)
    regulariser = (temperature - 1) * (renyi_entropy(student, gamma) - shannon_entropy(gamma * teacher)).mean()

    def ttm(beta):
        return ce + beta * (ttm_loss(student, teacher, gamma=gamma) + regulariser)

    beta = balanced_beta(lam, temperature)
    close(ttm(beta), kd / (1 - lam), atol=1e-7)
    gradients = [torch.autograd.grad(loss, student, retain_graph=True)[0] for loss in (ttm(beta), kd / (1 - lam))]
    close(*gradients, atol=1e-7)
    # WTTM has that weight on average over the data whose mean power sum it was given.
    powers = power_sum(teacher, gamma)
    weights = balanced_beta(lam, temperature, powers.mean().item()) * powers
    assert weights.mean().item() == pytest.approx(beta, rel=1e-12)


def test_the_misprint_does_not_balance():
    student, teacher = random_logits(4, 10), random_logits(4, 10, seed=1)
    soft = (
        ttm_loss(student, teacher, gamma=0.25)
        + 3 * (renyi_entropy(student, 0.25) - shannon_entropy(0.25 * teacher)).mean()
    )
    wanted = 0.9 * kd_loss(student, teacher, temperature=4) / 0.1
    assert (balanced_beta(0.9, 4) * soft).item() == pytest.approx(wanted.item(), rel=1e-12)
    assert abs(0.9 / (1 - 0.9 * 4) * soft.item() - wanted.item()) > 0.9 * wanted.item()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((1.0, 4), r"`lam` must be in \[0, 1\), got 1.0"),
        ((-0.1, 4), r"`lam` must be in \[0, 1\), got -0.1"),
        ((math.nan, 4), r"`lam` must be in \[0, 1\), got nan"),
        ((0.9, 0.5), "`temperature` must be a number of at least 1 .* got 0.5"),
        ((0.9, INF), "`temperature` must be a number of at least 1 .* got inf"),
        ((0.9, 4, 0.5), "`mean_power_sum` must be a number of at least 1 .* got 0.5"),
        ((0.9, 4, math.nan), "`mean_power_sum` must be a number of at least 1 .* got nan"),
    ],
)
def test_balanced_beta_refuses(arguments, message):
    with pytest.raises(ValueError, match=message):
        balanced_beta(*arguments)


# ---- Extremes ------------------------------------------------------------------------------------------------------


def check_exact(student, teacher, gamma, rtol, atol):
    """Values, gradients, U and p_T of rows of logits against 40 digits on the very numbers given."""
    rows = [exact(s, t, gamma) for s, t in zip(student.double(), teacher.double(), strict=True)]
    for name in NAMES:
        value, gradient = value_and_gradient(name, student, teacher, gamma, reduction="none")
        assert value.isfinite().all() and gradient.isfinite().all()
        # KD multiplies the divergence by T², and the rounding in it.
        scale = gamma**-2 if name == "kd" else 1.0
        close(value.double(), double([row[name][0] for row in rows]), rtol, atol * scale)
        close(gradient.double(), double([row[name][1] for row in rows]), rtol, atol)
    close(power_sum(teacher, gamma).double(), double([row["power_sum"] for row in rows]), rtol, atol)
    close(power_transform(teacher, gamma).double(), double([row["p_t"] for row in rows]), rtol, atol)


def extreme_logits(dtype):
    """Student and teacher rows with entries up to ±1e4: far apart, and close together far from zero."""
    g = torch.Generator().manual_seed(3)
    spread = (torch.rand(2, 12, generator=g, dtype=torch.float64) * 2 - 1) * 1e4
    near = torch.randn(4, 12, generator=g, dtype=torch.float64)
    student = torch.stack([spread[0], 1e4 + near[0] - 5, -1e4 + near[1] + 5, spread[1], 1e4 + near[0] - 5])
    teacher = torch.stack([spread[1], -1e4 + near[2] + 5, 1e4 + near[3] - 5, near[2], spread[0]])
    student[0, :2], teacher[0, :2] = double([1e4, -1e4]), double([-1e4, 1e4])
    return student.to(dtype), teacher.to(dtype)


@pytest.mark.parametrize("gamma", [0.1, 1 / 3, 0.8, 1.0])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-8), (torch.float32, 1e-5)])
def test_logits_up_to_ten_thousand(dtype, tolerance, gamma):
    student, teacher = extreme_logits(dtype)
    assert student.abs().max() == teacher.abs().max() == 1e4
    check_exact(student, teacher, gamma, tolerance, tolerance)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-8), (torch.float32, 1e-5)])
@pytest.mark.parametrize("scale", [1e-3, 3.0, 1e4])
def test_two_classes(dtype, tolerance, scale):
    student = double([[1.0, -1.0], [0.3, 0.2], [-1.0, 0.9]]) * scale
    teacher = double([[-1.0, 1.0], [0.1, 0.4], [0.5, 0.5]]) * scale
    check_exact(student.to(dtype), teacher.to(dtype), 0.3, tolerance, tolerance)


def test_twenty_thousand_classes():
    gamma = 0.1
    student = random_logits(1, 21841, seed=1, scale=4.0, dtype=torch.float32)
    teacher = random_logits(1, 21841, seed=2, scale=6.0, dtype=torch.float32)
    rows = exact(student[0].double(), teacher[0].double(), gamma)
    for dtype, tolerance in ((torch.float64, 1e-10), (torch.float32, 1e-5)):
        for name in NAMES:
            value, gradient = value_and_gradient(name, student.to(dtype), teacher.to(dtype), gamma)
            assert value.item() == pytest.approx(rows[name][0], rel=tolerance)
            close(gradient[0].double(), double(rows[name][1]), rtol=tolerance, atol=tolerance)
        assert power_sum(teacher.to(dtype), gamma).item() == pytest.approx(rows["power_sum"], rel=tolerance)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
@pytest.mark.parametrize("gamma", [0.1, 0.5, 1.0])
def test_an_impossible_class_of_the_teacher(dtype, tolerance, gamma):
    student, teacher = random_logits(3, 6, dtype=dtype), random_logits(3, 6, seed=1, dtype=dtype)
    teacher[0, 2] = teacher[1, :3] = teacher[2, 5] = -INF
    check_exact(student, teacher, gamma, tolerance, tolerance)
    for row in teacher:
        possible = row[row > -INF]
        close(power_sum(row, gamma), power_sum(possible, gamma), rtol=tolerance, atol=0)
        close(power_transform(row, gamma)[row > -INF], power_transform(possible, gamma), rtol=tolerance, atol=0)
        assert (power_transform(row, gamma)[row == -INF] == 0).all()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("gamma", [0.25, 1.0])
def test_a_class_impossible_to_both_is_as_if_removed(name, gamma):
    student, teacher = random_logits(3, 6), random_logits(3, 6, seed=1)
    expected = value_and_gradient(name, student[:, [0, 1, 3, 4, 5]], teacher[:, [0, 1, 3, 4, 5]], gamma)
    student[:, 2] = teacher[:, 2] = -INF
    value, gradient = value_and_gradient(name, student, teacher, gamma)
    close(value, expected[0], rtol=1e-13)
    close(gradient[:, [0, 1, 3, 4, 5]], expected[1], rtol=1e-13)
    assert (gradient[:, 2] == 0).all()


@pytest.mark.parametrize("gamma", [0.1, 0.5, 1.0])
def test_a_certain_teacher_is_a_label(gamma):
    student, labels = random_logits(4, 7), torch.tensor([0, 6, 3, 3])
    teacher = torch.full((4, 7), -INF, dtype=torch.float64)
    teacher[torch.arange(4), labels] = torch.tensor([0.0, -50.0, 1e4, 2.0], dtype=torch.float64)
    for name, scale in (("ttm", 1.0), ("wttm", 1.0), ("kd", gamma)):
        value, gradient = value_and_gradient(name, student, teacher, gamma, reduction="sum")
        hard = F.cross_entropy(scale * student, labels, reduction="sum") / scale**2
        assert value.item() == pytest.approx(hard.item(), rel=1e-12)
        close(gradient, ((scale * student).softmax(-1) - F.one_hot(labels, 7)) / scale, rtol=1e-12)


@pytest.mark.parametrize("name", NAMES)
def test_a_student_that_rules_out_a_possible_class_is_infinitely_wrong(name):
    student, teacher = random_logits(3, 6), random_logits(3, 6, seed=1)
    student[1, 2] = -INF
    assert loss_of(name, student, teacher, 0.5, reduction="none").isinf().tolist() == [False, True, False]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("network", ["student", "teacher"])
def test_nan_stays_visible(name, network):
    logits = {"student": random_logits(3, 6), "teacher": random_logits(3, 6, seed=1)}
    logits[network][1, 2] = math.nan
    value = loss_of(name, logits["student"], logits["teacher"], 0.5, reduction="none")
    assert value.isnan().tolist() == [False, True, False]


# ---- Number formats ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", NAMES)
def test_halves_are_computed_in_float32(name, dtype):
    student, teacher = random_logits(5, 100, scale=6.0).to(dtype), random_logits(5, 100, seed=1, scale=6.0).to(dtype)
    value, gradient = value_and_gradient(name, student, teacher, 0.3, reduction="none")
    expected = value_and_gradient(name, student.float(), teacher.float(), 0.3, reduction="none")
    assert value.dtype == torch.float32 and gradient.dtype == dtype
    assert value.equal(expected[0]) and gradient.equal(expected[1].to(dtype))
    rows = [exact(s, t, 0.3)[name][0] for s, t in zip(student.double(), teacher.double(), strict=True)]
    close(value.double(), double(rows), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_quantities_of_halves_are_computed_in_float32(dtype):
    logits = random_logits(5, 100, scale=6.0).to(dtype)
    for function in (
        lambda x: power_sum(x, 0.3),
        lambda x: log_power_sum(x, 0.3),
        lambda x: power_transform(x, 0.3),
        lambda x: renyi_entropy(x, 0.3),
        shannon_entropy,
    ):
        assert function(logits).dtype == torch.float32 and function(logits).equal(function(logits.float()))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("name", NAMES)
def test_autocast_changes_nothing(name, dtype):
    student, teacher = random_logits(5, 20).to(dtype), random_logits(5, 20, seed=1).to(dtype)
    expected = value_and_gradient(name, student, teacher, 0.3)
    entropies = shannon_entropy(student), renyi_entropy(student, 0.3), power_sum(student, 0.3)
    with torch.autocast("cpu", torch.bfloat16):
        value, gradient = value_and_gradient(name, student, teacher, 0.3)
        again = shannon_entropy(student), renyi_entropy(student, 0.3), power_sum(student, 0.3)
    assert value.dtype == expected[0].dtype and value.equal(expected[0]) and gradient.equal(expected[1])
    assert all(a.dtype == b.dtype and a.equal(b) for a, b in zip(again, entropies, strict=True))


def test_powers_of_half_precision_probabilities_would_be_wrong():
    """1,000 classes, gamma = 0.1: most probabilities underflow, and U comes out at a fifth of what it is."""
    torch.manual_seed(0)
    teacher = (8 * torch.randn(2, 1000))[0].half()
    student = (3 * torch.randn(1000)).half()
    truth = exact(student.double(), teacher.double(), 0.1)
    assert truth["power_sum"] == pytest.approx(54.3, abs=0.1)
    assert power_sum(teacher, 0.1).item() == pytest.approx(truth["power_sum"], rel=1e-5)
    assert wttm_loss(student, teacher, gamma=0.1).item() == pytest.approx(truth["wttm"][0], rel=1e-5)
    naive = (teacher.softmax(-1) ** 0.1).sum().item()
    assert naive == pytest.approx(10.4, abs=0.3)


def test_powers_of_single_precision_probabilities_would_be_wrong():
    """Even in float32 a class at -120 is lost before the power is taken, and with it its share of U."""
    teacher = torch.tensor([0.0, -120.0, -120.0])
    truth = 1 + 2 * math.exp(-120 * 0.05)
    assert power_sum(teacher, 0.05).item() == pytest.approx(truth, rel=1e-6)
    assert (teacher.softmax(-1) ** 0.05).sum().item() == 1.0
    assert power_transform(teacher, 0.05)[1].item() == pytest.approx(math.exp(-6.0) / truth, rel=1e-5)


# ---- Gradients and graphs ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("gamma", [0.1, 0.5, 1.0])
@pytest.mark.parametrize("name", NAMES)
def test_gradcheck_of_the_losses(name, gamma):
    teacher = random_logits(3, 5, seed=1)
    teacher[0, 1] = -INF
    student = random_logits(3, 5).requires_grad_()
    for reduction in ("mean", "none"):
        function = functools.partial(lambda z, how: loss_of(name, z, teacher, gamma, reduction=how), how=reduction)
        assert torch.autograd.gradcheck(function, student)
    assert torch.autograd.gradgradcheck(lambda z: loss_of(name, z, teacher, gamma), student)


@pytest.mark.parametrize(
    "function",
    [
        pytest.param(lambda x: power_transform(x, 0.3), id="power_transform"),
        pytest.param(lambda x: power_sum(x, 0.3), id="power_sum"),
        pytest.param(lambda x: log_power_sum(x, 0.3), id="log_power_sum"),
        pytest.param(lambda x: log_power_sum(x, 1.0), id="log_power_sum-1"),
        pytest.param(shannon_entropy, id="shannon"),
        *(
            pytest.param(lambda x, alpha=alpha: renyi_entropy(x, alpha), id=f"renyi-{alpha}")
            for alpha in (0.3, 0.995, 1.0, 1.005, 2.0)
        ),
    ],
)
def test_gradcheck_of_the_quantities(function):
    logits = random_logits(3, 5)
    logits[1] = double([2.0, 2.0, -1.0, 2.0, 0.0])  # several classes share the first place
    logits.requires_grad_()
    assert torch.autograd.gradcheck(function, logits)
    assert torch.autograd.gradgradcheck(function, logits)


def test_gradient_of_the_log_power_sum():
    logits = random_logits(4, 6).requires_grad_()
    gradient = torch.autograd.grad(log_power_sum(logits, 0.3).sum(), logits)[0]
    close(gradient, 0.3 * ((0.3 * logits).softmax(-1) - logits.softmax(-1)), atol=1e-14)


@pytest.mark.parametrize("name", NAMES)
def test_the_teacher_gets_no_gradient(name):
    student, teacher = random_logits(3, 5).requires_grad_(), random_logits(3, 5, seed=1).requires_grad_()
    loss_of(name, student, teacher, 0.5).backward()
    assert teacher.grad is None and student.grad.abs().min() > 0
    assert not loss_of(name, student.detach(), teacher, 0.5).requires_grad


@pytest.mark.parametrize("name", NAMES)
def test_inputs_are_left_as_they_were(name):
    student, teacher = random_logits(3, 5).requires_grad_(), random_logits(3, 5, seed=1)
    before = student.detach().clone(), teacher.clone()
    loss_of(name, student, teacher, 0.5).backward()
    assert student.equal(before[0]) and teacher.equal(before[1])


@pytest.mark.parametrize("name", NAMES)
def test_compiled_in_one_graph(name):
    student, teacher = random_logits(4, 9, dtype=torch.float32), random_logits(4, 9, seed=1, dtype=torch.float32)
    compiled = torch.compile(LOSSES[name], fullgraph=True, backend="aot_eager")
    strength = {"temperature": 2.0} if name == "kd" else {"gamma": 0.5}
    expected, gradient = value_and_gradient(name, student, teacher, 0.5)
    student.requires_grad_()
    loss = compiled(student, teacher, **strength)
    loss.backward()
    torch.testing.assert_close(loss.detach(), expected, rtol=1e-6, atol=0)
    torch.testing.assert_close(student.grad, gradient, rtol=1e-5, atol=1e-7)


# ---- Shapes and reductions -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_every_leading_dimension_is_a_sample(name):
    student, teacher = random_logits(2, 3, 4, 5), random_logits(2, 3, 4, 5, seed=1)
    value, gradient = value_and_gradient(name, student, teacher, 0.3, reduction="none")
    flat_value, flat_gradient = value_and_gradient(
        name, student.flatten(0, 2), teacher.flatten(0, 2), 0.3, reduction="none"
    )
    assert value.shape == (2, 3, 4) and gradient.shape == student.shape
    close(value.flatten(), flat_value, rtol=1e-14)
    close(gradient.flatten(0, 2), flat_gradient, rtol=1e-14)
    mean = loss_of(name, student, teacher, 0.3)
    assert mean.shape == () and mean.item() == pytest.approx(flat_value.sum().item() / 24, rel=1e-13)
    single = loss_of(name, student[1, 2, 3], teacher[1, 2, 3], 0.3)
    assert single.shape == () and single.item() == pytest.approx(value[1, 2, 3].item(), rel=1e-13)
    strided = student.movedim(-1, 0).contiguous().movedim(0, -1)
    assert not strided.is_contiguous()
    close(loss_of(name, strided, teacher, 0.3, reduction="none"), value, rtol=1e-13)


def test_quantities_keep_the_leading_dimensions():
    logits = random_logits(2, 3, 5)
    for function in (
        lambda x: power_sum(x, 0.3),
        lambda x: log_power_sum(x, 0.3),
        lambda x: renyi_entropy(x, 0.3),
        shannon_entropy,
    ):
        assert function(logits).shape == (2, 3)
        close(function(logits).flatten(), function(logits.flatten(0, 1)), rtol=1e-14)
        assert function(logits[1, 2]).item() == pytest.approx(function(logits)[1, 2].item(), rel=1e-13)
    close(power_transform(logits, 0.3).flatten(0, 1), power_transform(logits.flatten(0, 1), 0.3), rtol=1e-14)


@pytest.mark.parametrize("name", NAMES)
def test_reductions(name):
    student, teacher = random_logits(5, 4), random_logits(5, 4, seed=1)
    rows = [exact(s, t, 0.3)[name][0] for s, t in zip(student, teacher, strict=True)]
    close(loss_of(name, student, teacher, 0.3, reduction="none"), double(rows), rtol=1e-12)
    assert loss_of(name, student, teacher, 0.3, reduction="sum").item() == pytest.approx(sum(rows), rel=1e-12)
    assert loss_of(name, student, teacher, 0.3, reduction="mean").item() == pytest.approx(sum(rows) / 5, rel=1e-12)
    assert loss_of(name, student, teacher, 0.3).item() == pytest.approx(sum(rows) / 5, rel=1e-12)


def test_kd_has_temperature_four_unless_told():
    student, teacher = random_logits(5, 4), random_logits(5, 4, seed=1)
    assert kd_loss(student, teacher).equal(kd_loss(student, teacher, temperature=4.0))


# ---- Entropies -----------------------------------------------------------------------------------------------------

ENTROPY_ROWS = [
    [0.5, -1.0, 2.0, 0.0, 1.5],
    [3.0, -INF, 2.9, -INF, -4.0],
    [0.0, -400.0, -20.0, -1000.0, -INF],
    [-INF, -INF, 7.0, -INF, -INF],
    [1.0, 1.0, 1.0, 1.0, 1.0],
    [9990.0, 1e4, 9999.5, -1e4, 9999.0],
]


def exact_entropy(logits, alpha):
    """One sample's Rényi entropy and its gradient with 60 digits (near order 1 half of them cancel)."""
    with mpmath.workdps(60):
        alpha, top = mpmath.mpf(alpha), max(logits)
        q = [mpmath.exp(mpmath.mpf(x) - top) if x != -INF else mpmath.mpf(0) for x in logits]
        total = mpmath.fsum(q)
        q = [x / total for x in q]
        if alpha == 1:
            value = -mpmath.fsum(x * mpmath.log(x) for x in q if x)
            return float(value), [float(-x * (mpmath.log(x) + value)) if x else 0.0 for x in q]
        powers = [x**alpha if x else mpmath.mpf(0) for x in q]
        total = mpmath.fsum(powers)
        gradient = [float(alpha * (r / total - x) / (1 - alpha)) for r, x in zip(powers, q, strict=True)]
        return float(mpmath.log(total) / (1 - alpha)), gradient


ORDERS = [0.1, 0.5, 1.0, 2.0, 10.0] + [1 + sign * step for step in (1e-9, 1e-6, 5e-3, 0.01, 0.02) for sign in (1, -1)]


@pytest.mark.parametrize(("dtype", "rtol", "atol"), [(torch.float64, 1e-11, 1e-12), (torch.float32, 1e-5, 1e-5)])
@pytest.mark.parametrize("alpha", ORDERS)
def test_renyi_entropy_and_its_gradient(alpha, dtype, rtol, atol):
    logits = torch.tensor(ENTROPY_ROWS, dtype=dtype, requires_grad=True)
    value = renyi_entropy(logits, alpha)
    gradient = torch.autograd.grad(value.sum(), logits)[0]
    expected = [exact_entropy(row, alpha) for row in logits.detach().double().tolist()]
    close(value.detach().double(), double([row[0] for row in expected]), rtol, atol)
    close(gradient.double(), double([row[1] for row in expected]), rtol, atol)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_shannon_entropy_and_its_gradient(dtype, tolerance):
    logits = torch.tensor(ENTROPY_ROWS, dtype=dtype, requires_grad=True)
    value = shannon_entropy(logits)
    gradient = torch.autograd.grad(value.sum(), logits)[0]
    expected = [exact_entropy(row, 1.0) for row in logits.detach().double().tolist()]
    close(value.detach().double(), double([row[0] for row in expected]), tolerance, tolerance)
    close(gradient.double(), double([row[1] for row in expected]), tolerance, tolerance)
    assert value[3].item() == 0.0 and value[4].item() == pytest.approx(math.log(5), rel=1e-6)
    assert renyi_entropy(logits, 1.0).equal(value) and renyi_entropy(logits, 1).equal(value)


@identity
@given(problems(), st.floats(0.05, 5.0), st.floats(0.01, 1.0))
def test_renyi_entropy_falls_with_its_order(problem, alpha, step):
    logits = problem[0]
    entropy = renyi_entropy(logits, alpha)
    assert (entropy >= renyi_entropy(logits, alpha + step) - 1e-11).all()
    assert (entropy >= -1e-11).all() and (entropy <= math.log(logits.size(-1)) + 1e-11).all()


# ---- Refusals ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("gamma", [0, -1, 1.5, math.nan, INF, -INF])
@pytest.mark.parametrize(
    "function",
    [
        pytest.param(lambda gamma: ttm_loss(torch.ones(2, 3), torch.ones(2, 3), gamma=gamma), id="ttm_loss"),
        pytest.param(lambda gamma: wttm_loss(torch.ones(2, 3), torch.ones(2, 3), gamma=gamma), id="wttm_loss"),
        pytest.param(lambda gamma: power_transform(torch.ones(2, 3), gamma), id="power_transform"),
        pytest.param(lambda gamma: power_sum(torch.ones(2, 3), gamma), id="power_sum"),
        pytest.param(lambda gamma: log_power_sum(torch.ones(2, 3), gamma), id="log_power_sum"),
    ],
)
def test_gamma_out_of_range(function, gamma):
    with pytest.raises(ValueError, match=rf"`gamma` must be in \(0, 1\] .*, got {gamma}\."):
        function(gamma)


@pytest.mark.parametrize("value", [0, -4.0, math.nan, INF])
def test_temperature_and_order_out_of_range(value):
    with pytest.raises(ValueError, match=f"`temperature` must be a positive number, got {value}"):
        kd_loss(torch.ones(2, 3), torch.ones(2, 3), temperature=value)
    with pytest.raises(ValueError, match=f"`alpha` must be a positive number, got {value}"):
        renyi_entropy(torch.ones(2, 3), value)


@pytest.mark.parametrize("name", NAMES)
def test_logits_that_do_not_fit(name):
    with pytest.raises(ValueError, match=r"Student logits of shape \(2, 3\) and .* of shape \(2, 4\) do not match"):
        loss_of(name, torch.ones(2, 3), torch.ones(2, 4), 0.5)
    # These would broadcast in silence.
    with pytest.raises(ValueError, match=r"shape \(2, 3\) and teacher logits of shape \(3,\)"):
        loss_of(name, torch.ones(2, 3), torch.ones(3), 0.5)
    with pytest.raises(ValueError, match=r"shape \(2, 3\) and teacher logits of shape \(1, 3\)"):
        loss_of(name, torch.ones(2, 3), torch.ones(1, 3), 0.5)
    with pytest.raises(ValueError, match=r"`student_logits` must have shape \(\.\.\., classes\), got \(\)"):
        loss_of(name, torch.tensor(1.0), torch.tensor(1.0), 0.5)
    with pytest.raises(ValueError, match=r"`student_logits` must have shape \(\.\.\., classes\), got \(2, 0\)"):
        loss_of(name, torch.ones(2, 0), torch.ones(2, 0), 0.5)


@pytest.mark.parametrize("name", NAMES)
def test_logits_that_are_not_floats(name):
    with pytest.raises(TypeError, match=r"`student_logits` must be floating point logits, got torch\.int64"):
        loss_of(name, torch.ones(2, 3, dtype=torch.long), torch.ones(2, 3), 0.5)
    with pytest.raises(TypeError, match=r"`teacher_logits` must be floating point logits, got torch\.bool"):
        loss_of(name, torch.ones(2, 3), torch.ones(2, 3, dtype=torch.bool), 0.5)


def test_quantities_of_what_is_not_logits():
    for function in (
        lambda x: power_sum(x, 0.5),
        lambda x: log_power_sum(x, 0.5),
        lambda x: power_transform(x, 0.5),
        lambda x: renyi_entropy(x, 0.5),
        shannon_entropy,
    ):
        with pytest.raises(TypeError, match=r"`logits` must be floating point logits, got torch\.int32"):
            function(torch.ones(2, 3, dtype=torch.int32))
        with pytest.raises(ValueError, match=r"`logits` must have shape \(\.\.\., classes\), got \(\)"):
            function(torch.tensor(1.0))


@pytest.mark.parametrize("name", NAMES)
def test_unknown_reduction(name):
    with pytest.raises(ValueError, match='`reduction` must be "mean", "sum" or "none", got \'batchmean\''):
        loss_of(name, torch.ones(2, 3), torch.ones(2, 3), 0.5, reduction="batchmean")
