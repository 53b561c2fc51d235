"""Losses as modules: equal to the functions, one softmax shared with cross-entropy, built and registered by name."""

import functools
from collections import Counter

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from hf_kd.losses import LogitLoss, Outputs, build_loss, kd_loss, power_sum, register_loss, ttm_loss, wttm_loss
from hf_kd.losses.logit import LOSSES, CallableLoss, TransformedTeacherLoss, check_loss_name, cross_entropy


FUNCTIONS = {
    "kd": lambda student, teacher, gamma: kd_loss(student, teacher, temperature=1 / gamma, reduction="none"),
    "ttm": lambda student, teacher, gamma: ttm_loss(student, teacher, gamma=gamma, reduction="none"),
    "wttm": lambda student, teacher, gamma: wttm_loss(student, teacher, gamma=gamma, reduction="none"),
}


def random_logits(*shape, seed=0, scale=2.0, dtype=torch.float64):
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


@pytest.fixture
def registry():
    """The registry, put back as it was."""
    before = dict(LOSSES)
    yield LOSSES
    LOSSES.clear()
    LOSSES.update(before)


# ---- Modules -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "rtol", "atol"), [(torch.float64, 1e-12, 1e-12), (torch.float32, 1e-5, 1e-5)])
@pytest.mark.parametrize("shape", [(6, 9), (2, 3, 5)])
@pytest.mark.parametrize("gamma", [0.1, 0.3, 1.0])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_modules_equal_the_functions(name, gamma, shape, dtype, rtol, atol):
    student = random_logits(*shape, dtype=dtype).requires_grad_()
    teacher = random_logits(*shape, seed=1, dtype=dtype).requires_grad_()
    result = build_loss(name, gamma=gamma)(Outputs(student), Outputs(teacher))
    assert set(result) == {"distill", "power_sum"} and result["distill"].shape == shape[:-1]
    expected = FUNCTIONS[name](student, teacher, gamma)
    torch.testing.assert_close(result["distill"], expected, rtol=rtol, atol=atol)
    torch.testing.assert_close(result["power_sum"], power_sum(teacher, gamma), rtol=rtol, atol=atol)
    gradients = [torch.autograd.grad(value.sum(), student)[0] for value in (result["distill"], expected)]
    torch.testing.assert_close(*gradients, rtol=rtol, atol=atol)
    assert not result["power_sum"].requires_grad  # the teacher's alone, and it gets no gradient


@pytest.mark.parametrize("name", FUNCTIONS)
def test_modules_are_as_stable_as_the_functions(name):
    student = torch.tensor([[1e4, -1e4, 0.0], [9999.0, 9998.5, -1e4], [1.0, -torch.inf, 0.5]])
    teacher = torch.tensor([[-1e4, 1e4, 0.0], [0.3, -torch.inf, 0.1], [2.0, -torch.inf, 2.5]])
    student.requires_grad_()
    value = build_loss(name, gamma=0.3)(Outputs(student), Outputs(teacher))["distill"]
    torch.testing.assert_close(value, FUNCTIONS[name](student, teacher, 0.3), rtol=1e-5, atol=1e-5)
    gradient = torch.autograd.grad(value.sum(), student)[0]
    assert value.isfinite().all() and gradient.isfinite().all() and gradient[2, 1] == 0


@pytest.mark.parametrize("name", FUNCTIONS)
def test_modules_check_their_inputs(name):
    loss = build_loss(name, gamma=0.5)
    with pytest.raises(ValueError, match=r"Student logits of shape \(2, 3\) and teacher logits of shape \(2, 4\)"):
        loss(Outputs(torch.ones(2, 3)), Outputs(torch.ones(2, 4)))
    with pytest.raises(TypeError, match="`teacher_logits` must be floating point"):
        loss(Outputs(torch.ones(2, 3)), Outputs(torch.ones(2, 3, dtype=torch.long)))


@pytest.mark.parametrize("name", FUNCTIONS)
def test_modules_show_their_gamma_and_hold_no_state(name):
    loss = build_loss(name, gamma=0.3)
    assert "gamma=0.3" in repr(loss)
    assert not list(loss.parameters()) and not loss.state_dict() and not loss.needs_labels
    assert LOSSES[name].default_gamma == {"kd": 0.25, "ttm": 0.8, "wttm": 0.8}[name]


def test_balanced_beta_of_each_module():
    # At λ = 0.9, T = 4 and a mean power sum of 12; KD has its T² inside.
    expected = {"kd": 9.0, "ttm": 36.0, "wttm": 3.0}
    for name, beta in expected.items():
        assert build_loss(name, gamma=0.25).balanced_beta(0.9, 12.0) == pytest.approx(beta, rel=1e-12)
    with pytest.raises(ValueError, match='beta="auto" is defined for .* not for CallableLoss: give `beta`'):
        CallableLoss(lambda student, teacher: student).balanced_beta(0.9, 12.0)


# ---- Shared work ---------------------------------------------------------------------------------------------------


def test_log_probs_are_computed_once():
    outputs = Outputs(random_logits(4, 6))
    assert outputs.log_probs is outputs.log_probs
    torch.testing.assert_close(outputs.log_probs, outputs.logits.log_softmax(-1))
    assert Outputs(random_logits(4, 6).half()).log_probs.dtype == torch.float32


class SoftmaxCounter(TorchDispatchMode):
    """Counts passes of the softmax family over tensors of one shape, forward and backward."""

    def __init__(self, shape):
        super().__init__()
        self.shape, self.counts = shape, Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if ("softmax" in name or "logsumexp" in name) and args[0].shape == self.shape:
            self.counts[name] += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("name", "gamma", "student_passes"), [("wttm", 0.3, 1), ("ttm", 0.3, 1), ("kd", 0.3, 2), ("kd", 1.0, 1)]
)
def test_cross_entropy_and_distillation_share_the_softmax(name, gamma, student_passes):
    logits, teacher_logits = random_logits(8, 11).requires_grad_(), random_logits(8, 11, seed=1)
    loss, labels = build_loss(name, gamma=gamma), torch.arange(8)
    with SoftmaxCounter((8, 11)) as counter:
        student, teacher = Outputs(logits), Outputs(teacher_logits)
        ce, count = cross_entropy(student, labels, label_smoothing=0.1)
        total = ce / count + 2.0 * loss(student, teacher, labels)["distill"].mean()
        total.backward()
    # The teacher needs one log-softmax and, for its power sum, one logsumexp; only the student has a backward pass.
    assert counter.counts == {
        "_log_softmax": student_passes + 1,
        "logsumexp": 1,
        "_log_softmax_backward_data": student_passes,
    }
    reference = logits.detach().clone().requires_grad_()
    expected = F.cross_entropy(reference, labels, label_smoothing=0.1)
    expected = expected + 2.0 * FUNCTIONS[name](reference, teacher_logits, gamma).mean()
    expected.backward()
    torch.testing.assert_close(total, expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(logits.grad, reference.grad, rtol=1e-12, atol=1e-14)


# ---- The registry --------------------------------------------------------------------------------------------------


def test_unknown_names_are_told_with_the_nearest():
    with pytest.raises(ValueError, match=r"Unknown `loss` 'wtm'; .* ce, kd, ttm, wttm.*Did you mean 'wttm'\?"):
        build_loss("wtm", gamma=0.5)
    with pytest.raises(ValueError, match=r"Unknown `loss` 'zzz'; it must be one of [\w, ]+\.$"):
        build_loss("zzz", gamma=0.5)
    with pytest.raises(ValueError, match="Unknown `loss` None; it must be one of"):
        check_loss_name(None)
    assert [check_loss_name(name) for name in ("ce", "kd", "ttm", "wttm")] == ["ce", "kd", "ttm", "wttm"]


def test_cross_entropy_is_not_a_distillation_term():
    with pytest.raises(ValueError, match='"ce" is cross-entropy on the labels alone'):
        build_loss("ce")


@pytest.mark.parametrize("name", FUNCTIONS)
def test_arguments_of_a_loss(name):
    assert build_loss(name, **{"gamma": 0.5}).gamma == 0.5
    with pytest.raises(ValueError, match=f"The loss '{name}' takes gamma, not alpha, beta: correct `loss_kwargs`"):
        build_loss(name, gamma=0.5, beta=1.0, alpha=2.0)
    with pytest.raises(ValueError, match=f"The loss '{name}' needs a value for gamma, and none was given"):
        build_loss(name)
    for gamma in (0.0, -1.0, 1.5, float("nan")):
        with pytest.raises(ValueError, match=rf"`gamma` must be in \(0, 1\] .*, got {gamma}"):
            build_loss(name, gamma=gamma)


def test_a_loss_of_ones_own(registry):
    @register_loss("mse")
    class MSE(LogitLoss):
        def forward(self, student, teacher, labels=None):
            return {"distill": (student.logits - teacher.logits).square().mean(-1)}

    # It has no gamma: the configuration's is not forced on it.
    loss = build_loss("mse", gamma=0.5)
    assert isinstance(loss, MSE)
    assert loss(Outputs(torch.ones(2, 3)), Outputs(torch.zeros(2, 3)))["distill"].tolist() == [1.0, 1.0]
    with pytest.raises(ValueError, match="The loss 'mse' takes no arguments, not power"):
        build_loss("mse", power=3)
    with pytest.raises(ValueError, match="not for MSE"):
        loss.balanced_beta(0.9, 1.0)


def test_a_loss_of_ones_own_with_gamma(registry):
    @register_loss("scaled")
    class Scaled(TransformedTeacherLoss):
        def __init__(self, gamma, factor=2.0):
            super().__init__(gamma)
            self.factor = factor

        def per_sample(self, student, log_p, power_sum):
            return self.factor * power_sum

    loss = build_loss("scaled", gamma=0.5, factor=3.0)
    result = loss(Outputs(torch.zeros(1, 4)), Outputs(torch.zeros(1, 4)))
    assert result["power_sum"].tolist() == pytest.approx([2.0]) and result["distill"].tolist() == pytest.approx([6.0])
    with pytest.raises(ValueError, match="The loss 'scaled' takes gamma, factor, not power"):
        build_loss("scaled", gamma=0.5, power=3)


@pytest.mark.parametrize("name", ["wttm", "ce"])
def test_a_taken_name(registry, name):
    with pytest.raises(ValueError, match=f"A loss named '{name}' is registered already; choose another name for Mine"):

        @register_loss(name)
        class Mine(LogitLoss):
            pass

    assert LOSSES["wttm"].__name__ == "WTTM" and "ce" not in LOSSES


def test_a_loss_without_its_method():
    class Empty(LogitLoss):
        pass

    class Half(TransformedTeacherLoss):
        pass

    outputs = Outputs(torch.zeros(1, 4))
    with pytest.raises(TypeError, match=r"Empty must define forward\(student, teacher, labels\)"):
        Empty()(outputs, outputs)
    with pytest.raises(TypeError, match=r"Half must define per_sample\(student, log_p, power_sum\)"):
        Half(0.5)(outputs, outputs)


# ---- A user's function ---------------------------------------------------------------------------------------------


def per_sample_mse(student_logits, teacher_logits):
    return (student_logits - teacher_logits).square().mean(-1)


def labelled_mse(student_logits, teacher_logits, labels):
    return {"distill": per_sample_mse(student_logits, teacher_logits) * labels, "labels": labels.float().mean()}


class Scaled(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(2.0))

    def forward(self, student_logits, teacher_logits):
        return self.scale * per_sample_mse(student_logits, teacher_logits)


class Labelled(nn.Module):
    def forward(self, student_logits, teacher_logits, labels):
        return labelled_mse(student_logits, teacher_logits, labels)


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        pytest.param(per_sample_mse, [4.0, 4.0], id="two arguments"),
        pytest.param(labelled_mse, [0.0, 4.0], id="three arguments"),
        pytest.param(lambda *args: labelled_mse(*args), [0.0, 4.0], id="variadic"),
        pytest.param(Scaled(), [8.0, 8.0], id="module of two"),
        pytest.param(Labelled(), [0.0, 4.0], id="module of three"),
        pytest.param(functools.partial(labelled_mse, labels=torch.tensor([3, 0])), [12.0, 0.0], id="bound labels"),
        pytest.param(lambda student, teacher: per_sample_mse(student, teacher).mean(), 4.0, id="scalar"),
    ],
)
def test_callable_loss(function, expected):
    student, teacher = Outputs(torch.full((2, 3), 2.0)), Outputs(torch.zeros(2, 3))
    result = CallableLoss(function)(student, teacher, torch.tensor([0, 1]))
    assert result["distill"].tolist() == expected
    if expected == [0.0, 4.0]:
        assert result["labels"].item() == 0.5


def test_callable_loss_takes_our_own_functions():
    student, teacher = random_logits(4, 6), random_logits(4, 6, seed=1)
    loss = CallableLoss(functools.partial(wttm_loss, gamma=0.5))
    result = loss(Outputs(student), Outputs(teacher), torch.arange(4))
    torch.testing.assert_close(result["distill"], wttm_loss(student, teacher, gamma=0.5))


def test_callable_loss_keeps_the_parameters_of_a_module():
    assert [name for name, _ in CallableLoss(Scaled()).named_parameters()] == ["function.scale"]


# ---- Cross-entropy -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(8, 5), (2, 4, 5), (2, 3, 2, 5)])
@pytest.mark.parametrize("label_smoothing", [0.0, 0.1, 0.9])
@pytest.mark.parametrize("ignore_index", [-100, 2])
def test_cross_entropy_equals_torch(shape, label_smoothing, ignore_index):
    logits = random_logits(*shape).requires_grad_()
    labels = torch.randint(5, shape[:-1], generator=torch.Generator().manual_seed(2))
    labels.view(-1)[:4] = torch.tensor([ignore_index, 0, ignore_index, 4])
    options = {"ignore_index": ignore_index, "label_smoothing": label_smoothing}
    total, count = cross_entropy(Outputs(logits), labels, **options)
    assert total.shape == count.shape == () and count.item() == (labels != ignore_index).sum().item()
    expected = F.cross_entropy(logits.flatten(0, -2), labels.flatten(), **options)
    torch.testing.assert_close(total / count, expected, rtol=1e-12, atol=0)
    gradients = [torch.autograd.grad(value, logits, retain_graph=True)[0] for value in (total / count, expected)]
    torch.testing.assert_close(*gradients, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("shape", [(8, 5), (2, 4, 5)])
@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
def test_cross_entropy_of_soft_targets_equals_torch(shape, label_smoothing, dtype):
    logits, targets = random_logits(*shape).requires_grad_(), random_logits(*shape, seed=1).softmax(-1).to(dtype)
    total, count = cross_entropy(Outputs(logits), targets, label_smoothing=label_smoothing)
    assert count.item() == 8 and total.dtype == torch.float64
    expected = F.cross_entropy(
        logits.flatten(0, -2), targets.flatten(0, -2).double(), label_smoothing=label_smoothing, reduction="sum"
    )
    torch.testing.assert_close(total, expected, rtol=1e-12, atol=0)
    gradients = [torch.autograd.grad(value, logits)[0] for value in (total, expected)]
    torch.testing.assert_close(*gradients, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
def test_cross_entropy_without_any_label(label_smoothing):
    logits = random_logits(4, 5).requires_grad_()
    total, count = cross_entropy(Outputs(logits), torch.full((4,), -100), label_smoothing=label_smoothing)
    assert (total.item(), count.item()) == (0.0, 0)
    total.backward()
    assert logits.grad.equal(torch.zeros(4, 5, dtype=torch.float64))


@pytest.mark.parametrize(
    ("logits", "labels"),
    [
        pytest.param((3, 3), torch.zeros(3), id="classes as floats"),  # would broadcast in silence
        pytest.param((3, 5), torch.zeros(3, 1, dtype=torch.long), id="a column"),
        pytest.param((3, 5), torch.zeros(2, dtype=torch.long), id="too few"),
        pytest.param((3, 5), torch.zeros(3, 5, dtype=torch.long), id="one-hot integers"),
        pytest.param((3, 5), torch.zeros(3, 4), id="probabilities of fewer classes"),
    ],
)
def test_cross_entropy_of_labels_that_do_not_fit(logits, labels):
    with pytest.raises(ValueError, match=r"Labels of shape \(.*\) and type torch.\w+ do not go with .* \(3, "):
        cross_entropy(Outputs(torch.zeros(logits)), labels)
