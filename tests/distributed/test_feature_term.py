"""Feature losses in the trainer: the total, their parameters, checkpoints, several processes, refusals."""

import copy
import json
from functools import partial

import pytest
import torch
from processes import run_processes
from safetensors.torch import load_file
from tiny import ConvNet, Images, config, networks, vit
from transformers import TrainerCallback

from hf_kd import DistillationTrainer, Teacher
from hf_kd.losses import wttm_loss


CRD = {"feature_loss": "crd", "feature_loss_kwargs": {"nce_k": 8, "feat_dim": 4}, "feature_weight": 0.3}
ITRD = {"feature_loss": "itrd", "feature_weight": 0.2, "feature_loss_kwargs": {"alpha_it": 1.5}}
VITKD = {
    "feature_loss": "vitkd",
    "feature_loss_kwargs": {
        "alpha": 0.01, "beta": 0.01,
        "student_features": ["layers.0.mlp@patches", "layers.0@patches", "layernorm@patches"],
        "teacher_features": ["layers.0.mlp@patches", "layers.0@patches", "layernorm@patches"],
    },
}  # fmt: skip


def make(folder, student=None, teacher=None, data=None, trainer_class=DistillationTrainer, **options):
    first, second = networks()
    data = data or Images(count=24)
    return trainer_class(
        student or first, teacher or second, config(folder, gamma=0.5, beta=2.0, **options), train_dataset=data
    )


def test_the_total_is_the_sum_of_the_weighted_terms(tmp_path):
    data = Images(count=8)
    trainer = make(tmp_path, data=data, **CRD)
    trainer._before_training(None)
    batch = {"pixel_values": data.pixel_values, "labels": data.labels, "index": torch.arange(8)}
    twin = copy.deepcopy(trainer.features.loss)
    student, teacher = trainer.model.train(), trainer.teacher.model
    hidden = []
    handles = [
        network.head.register_forward_pre_hook(lambda m, args: hidden.append(args[0].clone()))
        for network in (student, teacher)
    ]
    with torch.no_grad():
        logits, teacher_logits = copy.deepcopy(student)(data.pixel_values), teacher(data.pixel_values)
    hidden.clear()
    total = trainer.compute_loss(student, batch)
    of_teacher, of_student = hidden
    of_teacher = of_teacher.clone()
    for handle in handles:
        handle.remove()
    part = twin({"pre_logits": of_student}, {"pre_logits": of_teacher}, data.labels, torch.arange(8))["feature"].mean()
    expected = torch.nn.functional.cross_entropy(logits, data.labels)
    expected = expected + 2.0 * wttm_loss(logits, teacher_logits, gamma=0.5) + 0.3 * part
    torch.testing.assert_close(total, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("settings", [CRD, ITRD])
def test_its_parameters_are_trained_and_no_part_of_the_student(tmp_path, settings):
    trainer = make(tmp_path, save_strategy="epoch", **settings)
    started = {}

    class Start(TrainerCallback):
        def on_train_begin(self, args, state, control, **kwargs):
            started.update(copy.deepcopy(dict(trainer.features.loss.named_parameters())))

    trainer.add_callback(Start())
    trainer.train()
    assert started
    for name, parameter in trainer.features.loss.named_parameters():
        assert not torch.equal(parameter, started[name]), name
    assert [entry["feature"] for entry in trainer.state.log_history if "loss" in entry]
    keys = set(load_file(tmp_path / "checkpoint-3" / "model.safetensors"))
    assert keys == set(ConvNet().state_dict())
    provenance = json.loads((tmp_path / "checkpoint-3" / "distillation.json").read_text())
    assert provenance["feature_loss"] == settings["feature_loss"]
    assert provenance["feature_weight"] == settings["feature_weight"]


def test_the_weight_matters_and_labels_alone_can_go_with_it(tmp_path):
    weights = {}
    for weight in (0.1, 5.0):
        trainer = make(tmp_path, loss="ce", **{**ITRD, "feature_weight": weight})
        trainer.train()
        assert "distill" not in trainer.state.log_history[0]
        assert "beta" not in trainer.state.log_history[0]
        assert trainer.provenance()["teacher"]["id"] == "ConvNet"
        weights[weight] = trainer.model.conv.weight.detach().clone()
    plain = make(tmp_path, loss="ce")
    plain.train()
    assert not torch.equal(weights[0.1], weights[5.0])
    assert not torch.equal(weights[0.1], plain.model.conv.weight)


class StopAfter(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step >= self.step


def student_of(settings):
    torch.manual_seed(3)
    if settings is VITKD:
        return vit(), vit()
    return ConvNet(dropout=0.2), networks()[1]


@pytest.mark.parametrize("settings", [CRD, ITRD, VITKD], ids=["crd", "itrd", "vitkd"])
def test_going_on_is_bit_identical(tmp_path, settings):
    size = 32 if settings is VITKD else 8
    options = {"save_strategy": "steps", "save_steps": 1, "num_train_epochs": 2, "momentum": 0.9, **settings}
    results = []
    for stop in (None, 4):
        student, teacher = student_of(settings)
        folder = tmp_path / str(stop)
        trainer = make(folder, student, teacher, Images(count=24, size=size), **options)
        if stop:
            trainer.add_callback(StopAfter(stop))
            trainer.train()
            student, teacher = student_of(settings)
            trainer = make(folder, student, teacher, Images(count=24, size=size), **options)
        trainer.train(resume_from_checkpoint=bool(stop))
        results.append({**trainer.model.state_dict(), **trainer.features.loss.state_dict(prefix="feature.")})
    for key, value in results[0].items():
        assert torch.equal(value, results[1][key]), key


def train(rank, folder, **options):
    _, teacher = networks(dtype=torch.float64)
    torch.manual_seed(1)
    student = ConvNet(norm=False).double()
    args = config(folder, num_train_epochs=2, gamma=0.4, beta=1.0, **options)
    trainer = DistillationTrainer(student, teacher, args, train_dataset=Images(count=24, dtype=torch.float64))
    trainer.train()
    state = {**student.state_dict(), **trainer.features.loss.state_dict(prefix="feature.")}
    return args.world_size, {key: value.detach().clone() for key, value in state.items()}


def test_two_processes_train_crd_as_one_does(tmp_path):
    ((one, reference),) = run_processes(partial(train, per_device_train_batch_size=8, **CRD), 1, tmp_path / "1")
    runs = run_processes(partial(train, per_device_train_batch_size=4, **CRD), 2, tmp_path / "2")
    assert one == 1
    for processes, state in runs:
        assert processes == 2
        for key, value in reference.items():
            torch.testing.assert_close(state[key], value, rtol=0, atol=1e-11, msg=key)


def test_two_processes_keep_itrd_equal(tmp_path):
    """Its correlations are those of a process's own batch, so that only the two can be compared."""
    runs = run_processes(partial(train, per_device_train_batch_size=4, **ITRD), 2, tmp_path)
    for key, value in runs[0][1].items():
        assert torch.equal(value, runs[1][1][key]), key


def test_a_skipped_step_leaves_its_parameters_alone(tmp_path):
    class Spoiled(DistillationTrainer):
        def compute_loss(self, *args, **kwargs):
            loss = super().compute_loss(*args, **kwargs)
            return loss * float("nan") if self.state.global_step == 2 else loss

    kept = {}

    class Look(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            kept[state.global_step] = [p.detach().clone() for p in trainer.features.parameters()]

    trainer = make(tmp_path, trainer_class=Spoiled, on_nonfinite="skip", **CRD)
    trainer.add_callback(Look())
    trainer.train()
    assert all(map(torch.equal, kept[2], kept[3]))
    assert not any(map(torch.equal, kept[1], kept[2]))


def test_refusals(tmp_path):
    student, teacher = networks()
    for wrong in (lambda **batch: batch["labels"], [teacher, networks(seed=1)[1]]):
        with pytest.raises(ValueError, match="features of the student with those of a live teacher"):
            make(tmp_path, student, wrong, **CRD)
    with pytest.raises(ValueError, match="has no module 'layer9'"):
        make(tmp_path, student, teacher, feature_loss="itrd", feature_loss_kwargs={"student_features": "layer9"})
    with pytest.raises(ValueError, match="mixed images are none of them"):
        make(tmp_path, student, teacher, mixup_alpha=0.2, **CRD)
    with pytest.raises(ValueError, match="Unknown `feature_loss` 'crdd'.*Did you mean 'crd'"):
        config(tmp_path, feature_loss="crdd")
    with pytest.raises(ValueError, match="takes .* not nce: correct `feature_loss_kwargs`"):
        config(tmp_path, feature_loss="crd", feature_loss_kwargs='{"nce": 3}')
    with pytest.raises(ValueError, match="`feature_weight` must be a number above 0"):
        config(tmp_path, feature_weight=0)
    make(tmp_path, student, Teacher(teacher), **CRD)


def test_a_checkpoint_without_its_state_is_refused(tmp_path):
    make(tmp_path, save_strategy="epoch").train()
    with pytest.raises(ValueError, match="has no feature_loss.pt"):
        make(tmp_path, save_strategy="epoch", num_train_epochs=2, **CRD).train(resume_from_checkpoint=True)
    other = tmp_path / "other"
    make(other, save_strategy="epoch", **ITRD).train()
    with pytest.raises(ValueError, match="is not the state of this CRD"):
        make(other, save_strategy="epoch", num_train_epochs=2, **CRD).train(resume_from_checkpoint=True)
