"""What is left out of a step changes nothing of it: the same updates, modes and norms."""

import warnings

import pytest
import torch
from accelerate import Accelerator
from tiny import ConvNet, Images, config, networks
from torch import nn
from torch.optim import SGD
from torch.optim.lr_scheduler import LambdaLR
from transformers import TrainerCallback

from hf_kd import DistillationTrainer
from hf_kd.lean_steps import clip_gradients, staying_in_train_mode, step_directly


# ---- Clipping ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("max_norm", [0.01, 1e6, None])
@pytest.mark.parametrize("width", [6, 30_000])
def test_clips_as_torch_does(width, max_norm):
    ours, theirs = ConvNet(width=width), ConvNet(width=width)
    for number, (own, other) in enumerate(zip(ours.parameters(), theirs.parameters(), strict=True)):
        own.grad = None if number == 1 else torch.randn_like(own)
        other.grad = None if number == 1 else own.grad.clone()
    norm = clip_gradients(list(ours.parameters()), max_norm)
    expected = torch.nn.utils.clip_grad_norm_(theirs.parameters(), float("inf") if max_norm is None else max_norm)
    torch.testing.assert_close(norm, expected)
    assert norm > 1
    for own, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert (own.grad is None) == (other.grad is None)
        if own.grad is not None:
            torch.testing.assert_close(own.grad, other.grad)


def test_no_gradient_has_the_norm_zero():
    assert clip_gradients(list(ConvNet().parameters()), 1.0) == 0


def test_a_norm_that_is_no_number_spoils_all_gradients_as_torchs_does():
    network = ConvNet()
    for parameter in network.parameters():
        parameter.grad = torch.full_like(parameter, float("nan"))
    assert clip_gradients(list(network.parameters()), 1.0).isnan()
    assert all(parameter.grad.isnan().all() for parameter in network.parameters())


# ---- Modes ---------------------------------------------------------------------------------------------------------


class Counting(nn.Module):
    """Counts how often its mode is set."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def train(self, mode=True):
        self.count += 1
        return super().train(mode)

    def forward(self, x):
        return x


class Modes(TrainerCallback):
    """The modes of all modules at the end of each step."""

    def __init__(self):
        self.seen = []

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self.seen.append({module.training for module in model.modules()})


def test_modules_are_asked_to_train_again_only_after_an_evaluation(tmp_path):
    student, teacher = networks()
    student.dropout = Counting()
    modes = Modes()
    args = config(tmp_path, max_steps=6, eval_strategy="steps", eval_steps=3)
    DistillationTrainer(
        student, teacher, args, train_dataset=Images(), eval_dataset=Images(8), callbacks=[modes]
    ).train()
    assert modes.seen == [{True}] * 6
    # Before the first step, and at each of two evaluations: eval and, but for the last, train again.
    assert student.dropout.count <= 5


def test_the_model_is_left_as_it_was_found():
    network = ConvNet()
    with staying_in_train_mode(network, network):
        assert network.train() is network and network.training
        network.eval()
        assert not network.norm.training
    assert "train" not in vars(network)
    with staying_in_train_mode(network, network):
        assert network.train().norm.training
    wrapper = nn.Sequential(network.eval()).train(False)
    wrapper.training = True  # as DistributedDataParallel's, when its network is evaluated
    with staying_in_train_mode(wrapper, network):
        assert wrapper.train()[0].norm.training
    with pytest.raises(RuntimeError, match="on the way"), staying_in_train_mode(network, network):
        raise RuntimeError("on the way")
    assert "train" not in vars(network)


# ---- Updates -------------------------------------------------------------------------------------------------------


def test_the_optimisers_step_is_its_own():
    accelerator = Accelerator(cpu=True)
    network = ConvNet()
    start = [parameter.detach().clone() for parameter in network.parameters()]
    optimizer = accelerator.prepare(SGD(network.parameters(), lr=1.0))
    step_directly(optimizer)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        scheduler = LambdaLR(optimizer, lambda step: 1.0)
        for parameter in network.parameters():
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()
        scheduler.step()
    assert all(torch.equal(p, s - 1) for p, s in zip(network.parameters(), start, strict=True))
    # While gradients are accumulated a step is none.
    accelerator.gradient_state._set_sync_gradients(False)
    try:
        optimizer.step()
    finally:
        accelerator.gradient_state._set_sync_gradients(True)
    assert all(torch.equal(p, s - 1) for p, s in zip(network.parameters(), start, strict=True))


@pytest.mark.parametrize("nesterov", [False, True])
def test_sgd_is_fused_and_the_same_but_for_rounding(tmp_path, nesterov):
    found = []
    for fused in (True, False):
        student, teacher = networks()
        args = config(tmp_path / str(fused), optim="sgd", nesterov=nesterov, weight_decay=0.01, max_steps=5)
        trainer = DistillationTrainer(student, teacher, args, train_dataset=Images())
        if not fused:
            trainer.create_optimizer()
            for group in trainer.optimizer.param_groups:
                group["fused"] = False
        trainer.train()
        optimizer = trainer.optimizer.optimizer
        assert type(optimizer) is SGD and all(bool(group["fused"]) is fused for group in optimizer.param_groups)
        found.append(list(student.parameters()))
    torch.testing.assert_close(*found, rtol=1e-5, atol=1e-6)
