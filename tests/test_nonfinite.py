"""Losses and gradients that are not finite: told with step, samples and component; stopped, or skipped and counted."""

import math
import re
from functools import partial

import pytest
import torch
from accelerate import Accelerator
from tiny import ConvNet, Images, config, networks
from torch import nn

from hf_kd import DistillationTrainer
from hf_kd.losses import Outputs
from hf_kd.nonfinite import FiniteGuard


class Poisoned(Images):
    """Images of which some are NaN."""

    def __init__(self, bad, **options):
        super().__init__(**options)
        self.pixel_values[list(bad)] = float("nan")


def trainer(folder, bad=(9,), teacher=None, **options):
    student, default_teacher = networks(norm=False)
    args = config(folder, **{"train_sampling_strategy": "sequential", "per_device_train_batch_size": 4, **options})
    return DistillationTrainer(
        student,
        teacher or default_teacher,
        args,
        train_dataset=Poisoned(bad, count=24),
        eval_dataset=Images(count=4),
    )


def test_a_loss_is_told_with_step_sample_and_component(tmp_path):
    with pytest.raises(RuntimeError) as caught:
        trainer(tmp_path).train()
    message = str(caught.value)
    assert "The loss is not finite at step 3 (component: ce, distill; samples with index 9)." in message
    assert "student and teacher logits hold NaN" in message
    assert 'on_nonfinite="skip"' in message


def test_only_the_component_at_fault_is_named(tmp_path):
    class NaNTeacher(nn.Module):
        def forward(self, x):
            return torch.full((len(x), 5), float("nan"))

    with pytest.raises(RuntimeError, match=r"at step 1 \(component: distill; samples with index 0, 1, 2, 3\)"):
        trainer(tmp_path, bad=(), teacher=NaNTeacher()).train()


class Spike(torch.autograd.Function):
    """The identity, whose gradient is infinite."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient * float("inf")


class Spiking(ConvNet):
    """A network whose gradient is infinite in some of its forward passes."""

    def __init__(self, passes):
        super().__init__(norm=False)
        self.passes, self.number = passes, 0

    def forward(self, x):
        self.number += self.training
        logits = super().forward(x)
        return Spike.apply(logits) if self.training and self.number in self.passes else logits


def spiking(folder, passes, **options):
    torch.manual_seed(0)
    student = Spiking(passes)
    args = config(folder, **{"train_sampling_strategy": "sequential", "per_device_train_batch_size": 4, **options})
    return student, DistillationTrainer(student, networks()[1], args, train_dataset=Images(count=24))


def test_a_gradient_is_told_with_its_parameters_and_leaves_the_weights(tmp_path):
    student, run = spiking(tmp_path, {1})
    before = {key: value.clone() for key, value in student.state_dict().items()}
    with pytest.raises(RuntimeError, match=r"gradient is not finite at step 1 \(component: gradient of conv.weight"):
        run.train()
    assert all(torch.equal(value, before[key]) for key, value in student.state_dict().items())


def test_the_samples_of_a_bad_gradient_are_those_of_the_whole_step(tmp_path):
    _, run = spiking(tmp_path, {4}, gradient_accumulation_steps=2)
    with pytest.raises(RuntimeError, match="at step 2 .* samples with index 8, 9, 10, 11, 12, 13, 14, 15"):
        run.train()


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_a_skipped_step_changes_nothing(momentum, tmp_path):
    """Weight decay and momentum included: the run is that of the other batches."""
    options = {"momentum": momentum, "weight_decay": 0.1}
    student, run = spiking(tmp_path, {2}, on_nonfinite="skip", **options)
    run.train()
    torch.manual_seed(0)
    expected = Spiking(set())
    without = Images(count=24)
    keep = [i for i in range(24) if i not in range(4, 8)]
    without.pixel_values, without.labels = without.pixel_values[keep], without.labels[keep]
    args = config(tmp_path, train_sampling_strategy="sequential", per_device_train_batch_size=4, **options)
    DistillationTrainer(expected, networks()[1], args, train_dataset=without).train()
    for key, value in expected.state_dict().items():
        torch.testing.assert_close(student.state_dict()[key], value, rtol=0, atol=0)
    logged = [entry for entry in run.state.log_history if "loss" in entry]
    assert [entry.get("skipped_steps") for entry in logged] == [None, 1, 1, 1, 1, 1]
    assert all(math.isfinite(value) for entry in logged for key, value in entry.items() if key != "grad_norm")


def test_a_loss_is_skipped_and_left_out_of_the_averages(tmp_path):
    run = trainer(tmp_path, on_nonfinite="skip")
    run.train()
    logged = [entry for entry in run.state.log_history if "loss" in entry]
    assert logged[2]["loss"] == 0.0
    assert "ce" not in logged[2] and logged[3]["ce"] > 0
    assert all(torch.isfinite(value).all() for value in run.model.state_dict().values())


def test_too_many_in_a_row_are_an_error(tmp_path):
    with pytest.raises(RuntimeError, match=r"3 steps in a row had to be skipped, and `max_nonfinite_steps` is 2"):
        trainer(tmp_path, bad=range(24), on_nonfinite="skip", max_nonfinite_steps=2).train()
    # Not in a row: the count begins again with each good step.
    _, run = spiking(tmp_path, {1, 2, 4, 5}, on_nonfinite="skip", max_nonfinite_steps=2)
    run.train()
    assert run.state.log_history[-2]["skipped_steps"] == 4


# ---- Deferred, as on an accelerator --------------------------------------------------------------------------------


def terms(**values):
    return {name: torch.tensor(value) for name, value in values.items()}


def outputs(rows=3):
    return Outputs(torch.zeros(rows, 5))


def test_deferred_findings_wait_for_the_check_and_the_first_is_told():
    guard = FiniteGuard("raise", 3, deferred=True)
    watch = partial(guard.watch_loss, torch.zeros(()), student=outputs(), teacher=None)
    nan = float("nan")
    watch(terms(ce=1.0, distill=2.0), inputs={"index": torch.tensor([0, 1, 2])}, step=1)
    guard.check()
    watch(terms(ce=1.0, distill=nan), inputs={"index": torch.tensor([3, 4, 5])}, step=2)
    watch(terms(ce=nan, distill=nan), inputs={"index": torch.tensor([6, 7, 8])}, step=3)
    watch(terms(ce=nan, distill=nan), inputs={"index": torch.tensor([9])}, step=4)
    with pytest.raises(RuntimeError, match=re.escape("at step 2 (component: distill; samples with index 3, 4, 5).")):
        guard.check()
    guard.check()  # told once


def test_a_deferred_loss_is_told_before_the_gradient_that_it_spoils():
    guard = FiniteGuard("raise", 3, deferred=True)
    accelerator = Accelerator(cpu=True)
    batches = [{"index": torch.tensor([3, 4])}, {"index": torch.tensor([5])}]
    guard.watch_gradient(torch.tensor(float("inf")), nn.Linear(1, 1), batches, 7, accelerator)
    guard.watch_loss(torch.zeros(()), terms(ce=float("inf")), outputs(), None, {}, 7)
    with pytest.raises(RuntimeError, match=re.escape("The loss is not finite at step 7 (component: ce).")):
        guard.check()
    guard.watch_gradient(torch.tensor(float("inf")), nn.Linear(1, 1), batches, 8, accelerator)
    expected = "The gradient is not finite at step 8 (component: gradient; samples with index 3, 4, 5)."
    with pytest.raises(RuntimeError, match=re.escape(expected)):
        guard.check()


@pytest.mark.parametrize("when", ["logging", "evaluation", "saving"])
def test_nothing_is_logged_evaluated_or_saved_after_a_bad_step(when, tmp_path):
    options = {
        "logging": {"logging_steps": 2},
        "evaluation": {"logging_steps": 100, "eval_strategy": "steps", "eval_steps": 4},
        "saving": {"logging_steps": 100, "save_strategy": "steps", "save_steps": 4},
    }[when]
    run = trainer(tmp_path, **options)
    run._guard.deferred = True
    with pytest.raises(RuntimeError, match="The loss is not finite at step 3 .*index 8, 9, 10, 11"):
        run.train()
    assert run.state.global_step == 4
    assert not list(tmp_path.glob("checkpoint-*"))
    assert not [entry for entry in run.state.log_history if entry["step"] > 2]
