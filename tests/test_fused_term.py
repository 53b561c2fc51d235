"""The trainer with the fused loss: the same weights and logs as with the composed one, and when it is taken."""

import pytest
import torch
from tiny import ConvNet, Images, Tagger, config, networks
from torch.utils.data import Dataset

from hf_kd import DistillationTrainer, fused_term
from hf_kd.kernels import LogitBatch, Weights, eager_kernel
from hf_kd.losses.logit import LOSSES, WTTM, register_loss


LOGGED = {"loss", "ce", "distill", "feature", "power_sum", "student_entropy", "beta", "grad_norm"}
LOGGED |= {"divergence", "teacher_entropy", "grad_norm_ce", "grad_norm_distill", "grad_cosine"}


@pytest.fixture
def calls(monkeypatch):
    """The batches that the kernels computed, by their numbers of samples."""
    seen = []
    original = fused_term.matching_objective

    def counting(student, *arguments, **options):
        seen.append(student.shape[:-1].numel())
        return original(student, *arguments, **options)

    monkeypatch.setattr(fused_term, "matching_objective", counting)
    return seen


def train(folder, fused_loss="auto", trainer_class=DistillationTrainer, data=None, resume=None, **options):
    _, teacher = networks(dtype=torch.float64)
    torch.manual_seed(1)
    student = ConvNet(norm=False).double()
    data = Images(count=22, unlabelled=(0, 3), dtype=torch.float64) if data is None else data
    arguments = config(folder, **{"gamma": 0.4, "beta": 2.0, "fused_loss": fused_loss, **options})
    trainer = trainer_class(student, teacher, arguments, train_dataset=data)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def assert_same(one, other):
    for key, value in other.model.state_dict().items():
        torch.testing.assert_close(one.model.state_dict()[key], value, rtol=1e-12, atol=1e-12)
    for ours, theirs in zip(one.state.log_history, other.state.log_history, strict=True):
        assert ours.keys() == theirs.keys()
        for key in LOGGED & theirs.keys():
            # What is logged is rounded to fp32 on its way.
            assert ours[key] == pytest.approx(theirs[key], rel=1e-6), key


CASES = {
    "wttm": {},
    "ttm": {"loss": "ttm"},
    "gamma 1": {"gamma": 1.0},
    "measured beta": {"beta": "auto"},
    "no labels": {"ce_weight": 0.0},
    "analysis": {"log_analysis": True, "ce_weight": 0.4, "gradient_accumulation_steps": 2},
    "weights": {"ce_weight": 0.3, "beta": 7.0},
    "accumulation": {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2},
    "features": {
        "feature_loss": "itrd",
        "feature_loss_kwargs": {"student_features": "norm", "teacher_features": "norm"},
    },
}


@pytest.mark.parametrize("case", CASES)
def test_trains_as_the_composed_loss(case, calls, tmp_path):
    fused = train(tmp_path / "fused", **CASES[case])
    assert sum(calls) == 22
    composed = train(tmp_path / "composed", "off", **CASES[case])
    assert sum(calls) == 22
    assert_same(fused, composed)
    assert fused.state.log_history[0].keys() >= {"loss", "distill", "power_sum", "student_entropy"}


@pytest.mark.parametrize(
    "options",
    [
        {"loss": "kd"},
        {"loss": "ce"},
        {"beta": 0.0},
        {"label_smoothing_factor": 0.1},
        {"mixup_alpha": 0.4},
        {"fused_loss": "off"},
    ],
)
def test_other_objectives_are_composed(options, calls, tmp_path):
    train(tmp_path, data=Images(count=22, dtype=torch.float64), **options)
    assert not calls


def test_soft_labels_do_not_matter_without_cross_entropy(calls, tmp_path):
    train(tmp_path, mixup_alpha=0.4, ce_weight=0.0)
    assert sum(calls) == 22


class Doubled(WTTM):
    def per_sample(self, student, log_p, power_sum):
        return 2.0 * super().per_sample(student, log_p, power_sum)


def test_a_subclass_of_a_known_loss_is_computed_by_itself(calls, tmp_path):
    register_loss("doubled")(Doubled)
    try:
        doubled = train(tmp_path / "a", loss="doubled", beta=1.0)
    finally:
        del LOSSES["doubled"]
    assert not calls
    assert_weights(doubled, train(tmp_path / "b", beta=2.0))


def assert_weights(one, other):
    torch.testing.assert_close(dict(one.model.state_dict()), dict(other.model.state_dict()), rtol=1e-12, atol=1e-12)


def test_an_overridden_method_is_listened_to(calls, tmp_path):
    class Trainer(DistillationTrainer):
        def compute_distillation_loss(self, student_outputs, teacher_outputs, inputs):
            return 0.0 * student_outputs.logits.sum(dim=-1)

    train(tmp_path, trainer_class=Trainer)
    assert not calls


def test_a_loss_that_is_passed_is_computed_with_its_own_gamma(calls, tmp_path):
    _, teacher = networks(dtype=torch.float64)
    weights = []
    for name in ("auto", "off"):
        torch.manual_seed(1)
        student = ConvNet(norm=False).double()
        data = Images(dtype=torch.float64)
        arguments = config(tmp_path / name, gamma=0.9, fused_loss=name)
        trainer = DistillationTrainer(student, teacher, arguments, distillation_loss=WTTM(0.2), train_dataset=data)
        trainer.train()
        weights.append(dict(student.state_dict()))
    assert sum(calls) == 24
    torch.testing.assert_close(*weights, rtol=1e-12, atol=1e-12)


class Sentences(Dataset):
    """Sequences of 6 tokens, padded; labels are -100 where the mask is 0, or not."""

    def __init__(self, marked):
        generator = torch.Generator().manual_seed(0)
        self.tokens = torch.randint(11, (12, 6), generator=generator)
        self.mask = (torch.arange(6) < torch.randint(2, 7, (12, 1), generator=generator)).long()
        labels = torch.randint(3, (12, 6), generator=generator)
        self.labels = torch.where(self.mask.bool(), labels, -100) if marked else labels

    def __len__(self):
        return 12

    def __getitem__(self, index):
        return {
            "input_ids": self.tokens[index],
            "attention_mask": self.mask[index],
            "labels": self.labels[index],
        }


@pytest.mark.parametrize(("ce_weight", "fused"), [(0.0, True), (1.0, False)])
def test_tokens(ce_weight, fused, calls, tmp_path):
    """Padding is no sample; with labels a mask of the sequence's alone leaves them to cross-entropy."""
    trainers = []
    for name in ("auto", "off"):
        torch.manual_seed(0)
        student, teacher = Tagger(4).double(), Tagger(5).double()
        arguments = config(tmp_path / name, gamma=0.5, ce_weight=ce_weight, fused_loss=name)
        trainer = DistillationTrainer(student, teacher, arguments, train_dataset=Sentences(marked=False))
        trainer.train()
        trainers.append(trainer)
    assert bool(calls) == fused
    assert_same(*trainers)


def test_resumed_in_mid_epoch_it_is_the_same_to_the_last_bit(calls, tmp_path):
    options = {"num_train_epochs": 2, "save_strategy": "steps", "save_steps": 2}
    whole = train(tmp_path / "whole", **options)
    resumed = train(tmp_path / "resumed", resume=str(tmp_path / "whole" / "checkpoint-2"), **options)
    for key, value in whole.model.state_dict().items():
        assert torch.equal(value, resumed.model.state_dict()[key])


@pytest.mark.slow
def test_compiled_in_the_trainer(calls, tmp_path):
    fused = train(tmp_path / "fused", "compiled")
    assert not fused._logit_terms.fused.kernel.failed and sum(calls) == 22
    assert_same(fused, train(tmp_path / "composed", "off"))


def test_no_gradient_wanted_is_composed(calls, tmp_path):
    trainer = train(tmp_path)
    before = len(calls)
    batch = next(iter(trainer.get_train_dataloader()))
    with torch.no_grad():
        value = trainer.compute_loss(trainer.model, batch)
    assert len(calls) == before
    torch.testing.assert_close(value, trainer.compute_loss(trainer.model, batch), rtol=1e-12, atol=0)


def test_unknown_names_and_wrong_places(tmp_path):
    with pytest.raises(ValueError, match="`fused_loss` must be one of 'auto', 'off', 'eager', 'compiled', 'triton'"):
        config(tmp_path, fused_loss="fast")
    with pytest.raises(ValueError, match='"triton" is for GPUs, and this run is on cpu: take "auto"'):
        train(tmp_path, "triton")


def test_the_rule_of_auto():
    """By size alone: a continued run, on the same machine, computes as the one it continues."""
    kernel = fused_term.choose_kernel("auto", torch.device("cpu"))
    compiled = []
    kernel._chunk = lambda *tensors: compiled.append(tensors) or (torch.zeros(()), torch.zeros(5))
    for rows, expected in ((39, 0), (40, 1)):
        student = torch.zeros(rows, 100_000)
        labels = torch.zeros(rows, dtype=torch.long)
        kernel(LogitBatch(student, student, labels, None, None), Weights(0.5, 1.0, 1.0, True))
        assert bool(compiled) == bool(expected)
    assert fused_term.choose_kernel("auto", torch.device("cuda")) is fused_term.choose_kernel(
        "eager", torch.device("cpu")
    )
    on_gpu = fused_term.choose_kernel("auto", torch.device("cuda"))
    assert on_gpu is eager_kernel
