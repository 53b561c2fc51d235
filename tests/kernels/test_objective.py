"""The fused objective against the composed functions: values, gradients, what is kept and what is refused."""

import os
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from hf_kd.kernels import CompiledKernel, Totals, eager, matching_objective
from hf_kd.kernels import compiled as compiled_module
from hf_kd.kernels.eager import eager_kernel
from hf_kd.losses import functional
from hf_kd.losses.logit import Outputs, cross_entropy


@pytest.fixture(scope="module")
def compiled():
    return CompiledKernel()


@pytest.fixture(params=["eager", "compiled"])
def kernel(request):
    return eager_kernel if request.param == "eager" else request.getfixturevalue("compiled")


@pytest.fixture(params=["eager", pytest.param("compiled", marks=pytest.mark.slow)])
def any_kernel(request):
    """For tests that would compile a case of their own, some seconds each."""
    if request.param == "eager":
        return eager_kernel
    torch._dynamo.reset()  # which gives up on a function after eight cases
    return CompiledKernel()


def batch(rows=6, classes=7, scale=3.0, dtype=torch.float64, seed=0, unlabelled=()):
    generator = torch.Generator().manual_seed(seed)
    student, teacher = (scale * torch.randn(rows, classes, generator=generator, dtype=dtype) for _ in range(2))
    labels = torch.randint(classes, (rows,), generator=generator)
    labels[list(unlabelled)] = -100
    return student.requires_grad_(), teacher, labels


def composed(student, teacher, labels, *, gamma, ce_weight=1.0, beta=1.0, weighted=True, mask=None, counts=None):
    """The objective and its totals from the functions of hf_kd.losses."""
    rows = torch.ones_like(labels, dtype=torch.bool) if mask is None else mask
    outputs = Outputs(student)
    ce, labelled = cross_entropy(outputs, labels, mask=mask)
    loss = functional.wttm_loss if weighted else functional.ttm_loss
    distill = torch.where(rows, loss(student, teacher, gamma=gamma, reduction="none"), 0.0).sum()
    samples, labels_of_step = (rows.sum(), labelled) if counts is None else counts
    objective = ce_weight * ce / labels_of_step.clamp_min(1) + beta * distill / samples
    power = torch.where(rows, functional.power_sum(teacher, gamma), 0.0).sum()
    entropy = torch.where(rows, functional.entropy(outputs.log_probs), 0.0).sum()
    return objective, Totals(ce, labelled, distill, power, entropy)


def assert_equal(kernel, student, teacher, labels, tolerance=1e-12, **options):
    results = []
    for function, extra in ((composed, {}), (matching_objective, {"kernel": kernel})):
        leaf = student.detach().clone().requires_grad_()
        objective, totals = function(leaf, teacher, labels, **options, **extra)
        (gradient,) = torch.autograd.grad(objective, leaf)
        results.append((objective, gradient, *totals))
    for expected, found in zip(*results, strict=True):
        torch.testing.assert_close(found, expected.to(found.dtype), rtol=tolerance, atol=tolerance)
    return results[1]


@pytest.mark.parametrize("weighted", [True, False])
@pytest.mark.parametrize("gamma", [0.1, 0.8, 1.0])
def test_equals_the_composed_losses(kernel, weighted, gamma):
    arguments = batch(unlabelled=[2])
    assert_equal(kernel, *arguments, gamma=gamma, ce_weight=0.7, beta=1.6, weighted=weighted)


@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(1, 9),
    classes=st.integers(1, 12),
    gamma=st.floats(0.01, 1.0),
    beta=st.floats(0.0, 50.0),
    ce_weight=st.floats(0.0, 2.0),
    scale=st.sampled_from([0.0, 1.0, 30.0]),
    chunk=st.sampled_from([1, 20, 2**18]),
    weighted=st.booleans(),
    data=st.data(),
)
def test_any_batch_equals_the_composed_losses(rows, classes, gamma, beta, ce_weight, scale, chunk, weighted, data):
    bits = st.lists(st.booleans(), min_size=rows, max_size=rows)
    unlabelled = [row for row, without in enumerate(data.draw(bits)) if without]
    mask = torch.tensor(data.draw(bits)) if data.draw(st.booleans()) else None
    if mask is not None and not mask.any():
        mask[0] = True
    arguments = batch(rows, classes, scale, seed=data.draw(st.integers(0, 99)), unlabelled=unlabelled)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(eager, "_CHUNK", chunk)
        assert_equal(
            eager_kernel, *arguments, 1e-10, gamma=gamma, beta=beta, ce_weight=ce_weight, mask=mask, weighted=weighted
        )


def test_masked_rows_and_a_step_of_several_batches(any_kernel):
    student, teacher, labels = batch(unlabelled=[1])
    mask = torch.tensor([True, True, False, True, False, True])
    with torch.no_grad():
        student[2] = torch.inf  # what is no sample may hold anything
    counts = torch.tensor([20, 17])
    results = []
    for function, extra in ((composed, {}), (matching_objective, {"kernel": any_kernel})):
        leaf = student.detach().clone().requires_grad_()
        objective, totals = function(leaf, teacher, labels, gamma=0.5, beta=2.0, mask=mask, counts=counts, **extra)
        (gradient,) = torch.autograd.grad(objective, leaf)
        results.append((objective, gradient[mask], *totals))
    for expected, found in zip(*results, strict=True):
        torch.testing.assert_close(found, expected.to(found.dtype), rtol=1e-12, atol=1e-12)


def test_batches_of_a_step_add_up_to_it(any_kernel):
    student, teacher, labels = batch(unlabelled=[0, 5])
    whole, _ = matching_objective(student, teacher, labels, gamma=0.4, kernel=any_kernel)
    counts = torch.tensor([6, 4])
    parts = [
        matching_objective(student[rows], teacher[rows], labels[rows], gamma=0.4, counts=counts, kernel=any_kernel)[0]
        for rows in (slice(0, 2), slice(2, 6))
    ]
    torch.testing.assert_close(sum(parts), whole, rtol=1e-13, atol=0)


@pytest.mark.parametrize("rows", [2, 5, 64])
def test_rows_do_not_depend_on_the_batch(any_kernel, rows):
    """A shorter last batch, or another number of processes, computes each row alike."""
    student, teacher, labels = batch(64, 10, dtype=torch.float32)
    counts = torch.tensor([64, 64])
    gradients = []
    for part in (slice(0, rows), slice(0, 64)):
        leaf = student[part].detach().requires_grad_()
        objective, _ = matching_objective(
            leaf, teacher[part], labels[part], gamma=0.8, counts=counts, kernel=any_kernel
        )
        gradients.append(torch.autograd.grad(objective, leaf)[0][:rows])
    assert torch.equal(*gradients)


@pytest.mark.slow
def test_chunks_equal_the_whole(compiled, monkeypatch):
    arguments = batch(23)
    whole = assert_equal(compiled, *arguments, gamma=0.3)
    monkeypatch.setattr("hf_kd.kernels.compiled._CHUNK", 50)
    chunked = assert_equal(compiled, *arguments, gamma=0.3)
    torch.testing.assert_close(chunked, whole, rtol=1e-13, atol=1e-13)


def test_leading_dimensions_are_samples(any_kernel):
    student, teacher, labels = batch(12, 5)
    flat, _ = matching_objective(student, teacher, labels, gamma=0.5, kernel=any_kernel)
    deep, _ = matching_objective(
        student.view(3, 4, 5), teacher.view(3, 4, 5), labels.view(3, 4), gamma=0.5, kernel=any_kernel
    )
    assert torch.equal(flat, deep)
    single, totals = matching_objective(student[0], teacher[0], labels[0], gamma=0.5, kernel=any_kernel)
    expected, _ = composed(student[:1], teacher[:1], labels[:1], gamma=0.5)
    torch.testing.assert_close(single, expected, rtol=1e-12, atol=0)
    assert totals[1] == 1


def test_without_labels_only_the_teacher_teaches(any_kernel):
    student, teacher, _ = batch()
    objective, totals = matching_objective(student, teacher, gamma=0.5, beta=3.0, kernel=any_kernel)
    expected = 3.0 * functional.wttm_loss(student, teacher, gamma=0.5)
    torch.testing.assert_close(objective, expected, rtol=1e-12, atol=0)
    assert Totals(*totals).labelled == 0 == Totals(*totals).ce


@pytest.mark.parametrize("weighted", [True, False])
def test_gradient_by_finite_differences(kernel, weighted):
    student, teacher, labels = batch(4, scale=1.0, unlabelled=[3])

    def objective(logits):
        return matching_objective(logits, teacher, labels, gamma=0.6, beta=2.0, weighted=weighted, kernel=kernel)[0]

    assert torch.autograd.gradcheck(objective, (student,))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("gamma", [0.05, 1.0])
def test_logits_of_any_size(any_kernel, dtype, gamma):
    student, teacher, labels = batch(8, 6, scale=1.0, dtype=dtype)
    with torch.no_grad():
        student[0, 0], student[1], student[2, 3] = 1e4, -1e4, -1e4
        teacher[2, 0], teacher[3], teacher[4, 1] = 1e4, 1e4, -1e4
    tolerance = 1e-5 if dtype == torch.float32 else 1e-12
    for found in assert_equal(any_kernel, student, teacher, labels, tolerance, gamma=gamma):
        assert torch.isfinite(found).all()


def test_a_teacher_with_impossible_classes(kernel):
    student, teacher, labels = batch(5)
    teacher[0, 2] = teacher[1, :6] = -torch.inf
    for found in assert_equal(kernel, student, teacher, labels, gamma=0.3):
        assert torch.isfinite(found).all()
    with torch.no_grad():
        student[0, 2] = -torch.inf  # possible for neither
        labels[0] = 1
    for found in assert_equal(kernel, student, teacher, labels, gamma=0.3)[:1]:
        assert torch.isfinite(found)


def test_what_is_not_finite_stays_so(kernel):
    student, teacher, labels = batch()
    with torch.no_grad():
        student[3, 0] = torch.nan
    assert matching_objective(student, teacher, labels, gamma=0.3, kernel=kernel)[0].isnan()
    student, teacher, labels = batch()
    with torch.no_grad():
        student[3, 0] = -torch.inf  # and the teacher thinks it possible
    assert matching_objective(student, teacher, labels, gamma=0.3, kernel=kernel)[0] == torch.inf


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_fp32(any_kernel, dtype):
    student, teacher, labels = batch(dtype=dtype)
    student = student.detach().requires_grad_()
    objective, totals = matching_objective(student, teacher, labels, gamma=0.2, kernel=any_kernel)
    assert objective.dtype == totals.dtype == torch.float32
    expected, _ = composed(student.detach().double(), teacher.double(), labels, gamma=0.2)
    torch.testing.assert_close(objective.double(), expected, rtol=1e-5, atol=1e-6)
    # The factor of a gradient scaler comes before the rounding to half precision, which 1e-9 would not survive.
    (tiny,) = torch.autograd.grad(objective, student, torch.tensor(1e-9), retain_graph=True)
    (scaled,) = torch.autograd.grad(objective * 1e-9 * 2.0**30, student)
    assert tiny.dtype == scaled.dtype == dtype
    assert scaled.abs().max() > 1e-3


def test_one_tensor_is_kept(kernel):
    student, teacher, labels = batch()
    kept = []

    def keep(tensor):
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        objective, _ = matching_objective(student, teacher, labels, gamma=0.5, kernel=kernel)
    assert [tensor.shape for tensor in kept] == [student.shape]
    objective.backward()
    torch.testing.assert_close(student.grad, kept[0], rtol=0, atol=0)


def test_upstream_gradients_and_several_passes(kernel):
    student, teacher, labels = batch()
    objective, totals = matching_objective(student, teacher, labels, gamma=0.5, kernel=kernel)
    (once,) = torch.autograd.grad(objective, student, retain_graph=True)
    once = once.clone()
    (thrice,) = torch.autograd.grad(3.0 * objective, student, retain_graph=True)
    torch.testing.assert_close(thrice, 3.0 * once, rtol=1e-14, atol=0)
    objective.backward(retain_graph=True)
    objective.backward()
    torch.testing.assert_close(student.grad, 2.0 * once, rtol=1e-14, atol=0)
    assert not totals.requires_grad


def test_second_derivatives_raise(kernel):
    student, teacher, labels = batch()
    objective, _ = matching_objective(student, teacher, labels, gamma=0.5, kernel=kernel)
    with pytest.raises(RuntimeError, match="no second derivative.*fused_loss"):
        torch.autograd.grad(objective, student, create_graph=True)


def test_forward_mode_raises(kernel):
    student, teacher, labels = batch()
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(student.detach(), torch.ones_like(student))
        with pytest.raises(RuntimeError, match="no forward-mode derivative.*fused_loss"):
            matching_objective(dual, teacher, labels, gamma=0.5, kernel=kernel)


def test_teacher_gets_no_gradient(kernel):
    student, teacher, labels = batch()
    teacher.requires_grad_()
    matching_objective(student, teacher, labels, gamma=0.5, kernel=kernel)[0].backward()
    assert teacher.grad is None and student.grad is not None


@pytest.mark.parametrize("label", [7, -1])
def test_labels_out_of_range_raise(kernel, label):
    student, teacher, labels = batch()
    labels[3] = label
    with pytest.raises((IndexError, RuntimeError), match="out of (bounds|range)"):
        matching_objective(student, teacher, labels, gamma=0.5, kernel=kernel)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"gamma": 0.0}, ValueError, "`gamma` must be in"),
        ({"labels": torch.zeros(6)}, TypeError, "integers, got torch.float32"),
        ({"labels": torch.zeros(5, dtype=torch.long)}, ValueError, r"shape \(5,\) do not go with .* \(6, 7\)"),
        ({"mask": torch.ones(5, dtype=torch.bool)}, ValueError, r"`mask` of shape \(5,\)"),
        ({"teacher_logits": torch.zeros(6, 8)}, ValueError, "do not match"),
    ],
)
def test_what_does_not_go_together(changes, error, message):
    student, teacher, labels = batch()
    arguments = {"student_logits": student, "teacher_logits": teacher, "labels": labels, "gamma": 0.5, **changes}
    with pytest.raises(error, match=message):
        matching_objective(**arguments)


def test_where_compiling_fails_it_runs_uncompiled(monkeypatch):
    kernel, warnings = CompiledKernel(), []

    def fail(*arguments):
        raise RuntimeError("No working C++ compiler found.\nMore of it.")

    monkeypatch.setattr(kernel, "_compiled", fail)
    monkeypatch.setattr(compiled_module.logger, "warning", lambda message, *values: warnings.append(message % values))
    for gamma in (0.5, 0.6):
        assert_equal(kernel, *batch(), gamma=gamma)
    (message,) = warnings
    assert message.endswith("runs uncompiled: RuntimeError: No working C++ compiler found.")


@pytest.mark.slow
def test_without_a_compiler(tmp_path):
    program = """
import torch
from hf_kd.kernels import CompiledKernel, matching_objective
kernel = CompiledKernel()
student = torch.randn(4, 5, requires_grad=True)
objective, _ = matching_objective(student, torch.randn(4, 5), torch.arange(4), gamma=0.5, kernel=kernel)
objective.backward()
assert student.grad.abs().sum() > 0 and kernel.failed
"""
    environment = {**os.environ, "CXX": "/no/such/compiler", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "runs uncompiled" in done.stderr


@pytest.mark.slow
def test_one_compilation_serves_all_batches_and_settings():
    torch._dynamo.reset()
    kernel = CompiledKernel()
    torch._dynamo.utils.counters.clear()
    for rows, gamma, beta, weighted in ((8, 0.5, 1, False), (5, 0.5, 1, True), (3, 0.9, 36, False)):
        student, teacher, labels = batch(rows, 9, dtype=torch.float32)
        options = {"gamma": gamma, "beta": float(beta), "weighted": weighted}
        assert_equal(kernel, student, teacher, labels, 1e-5, **options)
    assert not kernel.failed
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


def test_it_learns_as_the_composed_loss_does(kernel):
    torch.manual_seed(0)
    inputs, labels = torch.randn(16, 4, dtype=torch.float64), torch.randint(7, (16,))
    teacher = 4.0 * torch.randn(16, 7, dtype=torch.float64)
    weights = []
    for function, extra in ((composed, {}), (matching_objective, {"kernel": kernel})):
        torch.manual_seed(1)
        network = nn.Linear(4, 7).double()
        optimiser = torch.optim.SGD(network.parameters(), lr=0.3, momentum=0.9)
        for _ in range(5):
            optimiser.zero_grad()
            function(network(inputs), teacher, labels, gamma=0.5, beta=2.0, **extra)[0].backward()
            optimiser.step()
        weights.append(network.weight.detach())
    torch.testing.assert_close(*weights, rtol=1e-12, atol=1e-12)
