"""What must hold of a training run, in numbers."""

import copy
import json
import math

import pytest
import timm
import torch
from safetensors.torch import load_file
from tiny import CLASSES, ConvNet, Images, Tagger, config, networks, vit
from torch import nn
from torch.nn import functional as F
from torch.utils.data import IterableDataset
from transformers import TrainerCallback, ViTForImageClassification, ViTImageProcessor

import hf_kd
from hf_kd import DistillationConfig, DistillationTrainer, Preprocessing, Teacher, create_student
from hf_kd.losses import kd_loss, power_sum, shannon_entropy, ttm_loss, wttm_loss
from hf_kd.networks import logits_of


def make(folder, student, teacher, train=None, evaluation=None, trainer_class=DistillationTrainer, **options):
    trainer_options = {key: options.pop(key) for key in ("distillation_loss", "callbacks") if key in options}
    return trainer_class(
        student,
        teacher,
        config(folder, **options),
        train_dataset=train if train is not None else Images(),
        eval_dataset=evaluation,
        **trainer_options,
    )


def history(trainer, key):
    return [entry[key] for entry in trainer.state.log_history if key in entry and "loss" in entry]


def weights(model):
    return {key: value.clone() for key, value in model.state_dict().items()}


def assert_same(left, right, **tolerance):
    assert left.keys() == right.keys()
    for key in left:
        torch.testing.assert_close(
            left[key], right[key], **(tolerance or {"rtol": 0, "atol": 0}), msg=f"{key} differs"
        )


def probabilities_by_hand(logits):
    """Softmax from its definition, sharing nothing with the library."""
    powers = torch.exp(logits - logits.max(dim=1, keepdim=True).values)
    return powers / powers.sum(dim=1, keepdim=True)


# ---- The objective -------------------------------------------------------------------------------------------------


def plain_loop(student, teacher, data, *, gamma, beta, ce_weight, lr, momentum, weight_decay, batch, epochs):
    """WTTM as a reader of the paper would write it: no library of ours, no Trainer."""
    optimizer = torch.optim.SGD(student.parameters(), lr=lr, momentum=momentum, weight_decay=weight_decay)
    teacher.eval()
    losses = []
    for _ in range(epochs):
        for start in range(0, len(data), batch):
            images, labels = data.pixel_values[start : start + batch], data.labels[start : start + batch]
            student.train()
            with torch.no_grad():
                p = probabilities_by_hand(teacher(images))
            q = probabilities_by_hand(student(images))
            power = p**gamma
            u = power.sum(dim=1)
            p_t = power / u[:, None]
            divergence = (p_t * (p_t / q).log()).sum(dim=1)
            ce = -q[torch.arange(len(labels)), labels].log()
            loss = (ce_weight * ce + beta * u * divergence).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    return losses


@pytest.mark.parametrize("ce_weight", [1.0, 0.3])
def test_wttm_follows_a_plain_loop_for_60_steps(tmp_path, ce_weight):
    student, teacher = networks()
    reference = copy.deepcopy(student)
    data = Images(count=23)
    trainer = make(
        tmp_path, student, teacher, data,
        loss="wttm", gamma=0.4, beta=1.7, ce_weight=ce_weight, momentum=0.9, weight_decay=5e-3,
        decay_all_parameters=True, num_train_epochs=20, train_sampling_strategy="sequential",
    )  # fmt: skip
    trainer.train()
    expected = plain_loop(
        reference, copy.deepcopy(teacher), data, gamma=0.4, beta=1.7, ce_weight=ce_weight, lr=0.05, momentum=0.9,
        weight_decay=5e-3, batch=8, epochs=20,
    )  # fmt: skip
    assert len(expected) == 60
    torch.testing.assert_close(history(trainer, "loss"), expected, rtol=1e-5, atol=1e-6)
    assert expected[-1] < 0.7 * expected[0]
    assert_same(weights(student), weights(reference), rtol=1e-4, atol=1e-5)


FUNCTIONS = {
    "kd": lambda z, v: kd_loss(z, v, temperature=2.5),
    "ttm": lambda z, v: ttm_loss(z, v, gamma=0.4),
    "wttm": lambda z, v: wttm_loss(z, v, gamma=0.4),
}


@pytest.mark.parametrize("loss", ["kd", "ttm", "wttm"])
def test_named_losses_are_the_functions(tmp_path, loss):
    student, teacher = networks()
    data = Images(count=8)
    trainer = make(tmp_path, student, teacher, data, loss=loss, gamma=0.4, beta=3.0, ce_weight=0.25)
    value = trainer.compute_loss(student.train(), {"pixel_values": data.pixel_values, "labels": data.labels})
    logits, teacher_logits = student(data.pixel_values), teacher.eval()(data.pixel_values)
    expected = 0.25 * F.cross_entropy(logits, data.labels) + 3.0 * FUNCTIONS[loss](logits, teacher_logits)
    torch.testing.assert_close(value, expected, rtol=1e-6, atol=1e-6)


def test_ce_alone_needs_no_teacher(tmp_path):
    student, _ = networks()
    reference = copy.deepcopy(student)
    trainer = make(tmp_path, student, None, loss="ce", num_train_epochs=1, train_sampling_strategy="sequential")
    trainer.train()
    data = Images()
    first = F.cross_entropy(reference.train()(data.pixel_values[:8]), data.labels[:8])
    assert history(trainer, "loss")[0] == pytest.approx(first.item(), rel=1e-6)
    assert "distill" not in trainer.state.log_history[0]


def test_label_free_training_uses_no_label(tmp_path):
    student, teacher = networks()
    reference = copy.deepcopy(student)
    data = Images(labels=False)
    trainer = make(tmp_path, student, teacher, data, gamma=0.5, ce_weight=0, train_sampling_strategy="sequential")
    trainer.train()
    first = copy.deepcopy(reference).train()(data.pixel_values[:8])
    expected = wttm_loss(first, teacher.eval()(data.pixel_values[:8]), gamma=0.5)
    assert history(trainer, "loss")[0] == pytest.approx(expected.item(), rel=1e-5)
    assert "ce" not in trainer.state.log_history[0]
    # Labels that are there are not looked at.
    again = copy.deepcopy(reference)
    labelled = Images(labels=False)
    labelled.labels = torch.full((24,), 3)
    make(tmp_path, again, teacher, labelled, gamma=0.5, ce_weight=0, train_sampling_strategy="sequential").train()
    assert_same(weights(student), weights(again))


def test_float64_networks_train_in_float64(tmp_path):
    student, teacher = networks(dtype=torch.float64)
    data = Images(dtype=torch.float64)
    trainer = make(tmp_path, student, teacher, data, gamma=0.5, beta=2.0)
    batch = {"pixel_values": data.pixel_values[:8], "labels": data.labels[:8]}
    loss = trainer.compute_loss(student.train(), batch)
    assert loss.dtype == torch.float64
    assert trainer.teacher(data.pixel_values[:8]).dtype == torch.float64
    logits = student(batch["pixel_values"])
    expected = F.cross_entropy(logits, batch["labels"]) + 2.0 * wttm_loss(
        logits, teacher(batch["pixel_values"]), gamma=0.5
    )
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=1e-12)


def test_teacher_runs_under_the_students_autocast(tmp_path):
    student, teacher = networks()
    seen = []
    teacher.head.register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
    trainer = make(tmp_path, student, teacher, bf16=True)
    trainer.train()
    assert set(seen) == {torch.bfloat16}
    assert trainer.teacher.model.head.weight.dtype == torch.float32
    with trainer.accelerator.autocast():
        assert trainer.compute_teacher_logits({"pixel_values": Images().pixel_values[:2]}).dtype == torch.float32


# ---- Gradient accumulation -----------------------------------------------------------------------------------------


class TakesAnything(ConvNet):
    """A forward with **kwargs, which Trainer takes for one that normalises its own loss."""

    def forward(self, pixel_values, **kwargs):
        return super().forward(pixel_values)


@pytest.mark.parametrize("loss", ["ce", "kd", "ttm", "wttm"])
@pytest.mark.parametrize(("batch", "steps"), [(1, 8), (2, 4), (3, 3)])
@pytest.mark.parametrize("student_class", [ConvNet, TakesAnything])
def test_accumulation_gives_the_gradient_of_the_whole_batch(tmp_path, loss, batch, steps, student_class):
    # 8 samples of which 3 have no label; 3 x 3 leaves an uneven last batch.
    data = Images(count=8, unlabelled=(0, 3, 4), dtype=torch.float64)
    _, teacher = networks(dtype=torch.float64)
    torch.manual_seed(1)
    student = student_class(norm=False).double()
    whole = copy.deepcopy(student)
    options = {"loss": loss, "gamma": 0.4, "beta": 3.0, "momentum": 0.0, "learning_rate": 0.1}
    for model, size, accumulation in ((student, batch, steps), (whole, 8, 1)):
        trainer = make(
            tmp_path, model, teacher, data, train_sampling_strategy="sequential",
            per_device_train_batch_size=size, gradient_accumulation_steps=accumulation, **options,
        )  # fmt: skip
        trainer.train()
        assert trainer.state.global_step == 1
    assert_same(weights(student), weights(whole), rtol=1e-10, atol=1e-12)


def test_logged_components_are_averages_over_steps_and_accumulation(tmp_path):
    student, teacher = networks(norm=False)
    data = Images(count=16, unlabelled=(1, 2, 9))
    reference = copy.deepcopy(student).eval()
    trainer = make(
        tmp_path, student, teacher, data, gamma=0.4, beta=2.0, ce_weight=0.5, learning_rate=0.0, logging_steps=2,
        per_device_train_batch_size=3, gradient_accumulation_steps=3,
    )  # fmt: skip
    trainer.train()
    (entry,) = [e for e in trainer.state.log_history if "loss" in e]
    with torch.no_grad():
        logits, teacher_logits = reference(data.pixel_values), teacher(data.pixel_values)
    assert entry["ce"] == pytest.approx(F.cross_entropy(logits, data.labels).item(), rel=1e-5)
    assert entry["distill"] == pytest.approx(wttm_loss(logits, teacher_logits, gamma=0.4).item(), rel=1e-5)
    assert entry["power_sum"] == pytest.approx(power_sum(teacher_logits, 0.4).mean().item(), rel=1e-5)
    assert entry["student_entropy"] == pytest.approx(shannon_entropy(logits).mean().item(), rel=1e-5)
    assert entry["beta"] == 2.0


def test_logs_reach_callbacks_and_a_users_log_is_left_alone(tmp_path):
    seen = []

    class Tracker(TrainerCallback):
        def on_log(self, args, state, control, logs=None, **kwargs):
            seen.append(dict(logs))

    student, teacher = networks()
    trainer = make(tmp_path, student, teacher, callbacks=[Tracker()])
    trainer.train()
    assert {"ce", "distill", "power_sum", "student_entropy", "beta", "loss", "grad_norm"} <= seen[0].keys()
    trainer.log({"mine": 1.0})
    assert seen[-1].keys() - {"epoch"} == {"mine"}


# ---- The teacher ---------------------------------------------------------------------------------------------------


def test_teacher_is_untouched_and_absent_from_checkpoints(tmp_path):
    student, teacher = networks()
    before = weights(teacher)
    trainer = make(tmp_path, student, teacher, evaluation=Images(seed=1), save_strategy="epoch", num_train_epochs=2,
                   teacher_metrics=True, eval_strategy="epoch")  # fmt: skip
    trainer.train()
    assert_same(before, weights(teacher))
    assert not teacher.training and not trainer.teacher.training
    assert all(p.grad is None and not p.requires_grad for p in teacher.parameters())
    trained = {id(p) for group in trainer.optimizer.param_groups for p in group["params"]}
    assert trained == {id(p) for p in student.parameters()}
    saved = load_file(tmp_path / "checkpoint-6" / "model.safetensors")
    assert saved.keys() == student.state_dict().keys()
    arguments = torch.load(tmp_path / "checkpoint-6" / "training_args.bin", weights_only=False)
    assert isinstance(arguments, DistillationConfig)
    assert not any(isinstance(value, (nn.Module, torch.Tensor)) for value in vars(arguments).values())


def test_teacher_dropout_stays_off(tmp_path):
    student, teacher = networks()
    teacher.train()
    trainer = make(tmp_path, student, teacher)
    images = Images().pixel_values[:4]
    first = trainer.compute_teacher_logits({"pixel_values": images})
    trainer.teacher.train()
    torch.testing.assert_close(first, trainer.compute_teacher_logits({"pixel_values": images}), rtol=0, atol=0)


class CountingTeacher:
    """A callable that knows its samples by index and counts how often it is asked."""

    def __init__(self, logits):
        self.logits, self.calls = logits, 0

    def __call__(self, index, **inputs):
        self.calls += 1
        return self.logits[index]


def test_callable_teacher_gets_the_whole_batch_and_evaluation_leaves_it_alone(tmp_path):
    student, teacher = networks()
    data = Images()
    with torch.no_grad():
        logits = teacher.eval()(data.pixel_values)
    counting = CountingTeacher(logits)
    by_index, live = copy.deepcopy(student), copy.deepcopy(student)
    trainer = make(tmp_path, by_index, counting, data, evaluation=Images(seed=1), num_train_epochs=2,
                   eval_strategy="epoch")  # fmt: skip
    trainer.train()
    assert counting.calls == 6
    make(tmp_path, live, teacher, data, num_train_epochs=2).train()
    assert_same(weights(by_index), weights(live), rtol=1e-5, atol=1e-6)


def test_ensemble_teacher_is_the_mean_of_probabilities(tmp_path):
    student, first = networks(seed=0)
    _, second = networks(seed=1)
    trainer = make(tmp_path, student, [first, second])
    images = Images().pixel_values
    expected = (first(images).softmax(-1) + second(images).softmax(-1)) / 2
    torch.testing.assert_close(trainer.compute_teacher_logits({"pixel_values": images}).exp(), expected)


def test_a_callable_in_an_ensemble_gets_the_whole_batch_too(tmp_path):
    student, teacher = networks()
    data = Images(count=8)
    stored = torch.randn(8, CLASSES)
    trainer = make(tmp_path, student, [teacher, CountingTeacher(stored)], data)
    batch = {"pixel_values": data.pixel_values, "labels": data.labels, "index": torch.arange(8)}
    expected = (teacher(data.pixel_values).softmax(-1) + stored.softmax(-1)) / 2
    torch.testing.assert_close(trainer.compute_teacher_logits(batch).exp(), expected)


def test_labels_under_another_name_stay_out_of_the_networks(tmp_path):
    seen = []

    class Anything(ConvNet):
        def forward(self, **inputs):
            seen.append(set(inputs))
            return super().forward(inputs["pixel_values"])

    torch.manual_seed(0)
    data = Images(count=8)
    trainer = make(tmp_path, Anything(), Anything(), data, label_names=["target"])
    trainer.compute_loss(trainer.model.train(), {"pixel_values": data.pixel_values, "target": data.labels})
    assert seen == [{"pixel_values"}] * 2


def test_preflight_reports_top1_once_and_warns_at_chance(tmp_path, caplog):
    student, teacher = networks()
    data = Images(count=40, seed=1)
    with torch.no_grad():
        predictions = teacher.eval()(data.pixel_values).argmax(-1)
    good, bad = copy.deepcopy(data), copy.deepcopy(data)
    good.labels = torch.where(torch.arange(40) < 30, predictions, (predictions + 1) % CLASSES)
    bad.labels = torch.where(torch.arange(40) < 8, predictions, (predictions + 1) % CLASSES)
    for evaluation, top1, loud in ((good, 0.75, False), (bad, 0.2, True)):
        caplog.clear()
        trainer = make(tmp_path, student, teacher, evaluation=evaluation, teacher_preflight=True)
        with caplog.at_level("WARNING"):
            trainer.train()
            trainer.train()
        assert trainer.teacher_top1 == pytest.approx(top1)
        assert caplog.text.count(f"top-1 {100 * top1:.2f} %") == 1
        assert ("LOOKS WRONG" in caplog.text) is loud


# ---- beta="auto" ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("loss", ["kd", "ttm", "wttm"])
@pytest.mark.parametrize("ce_weight", [1.0, 0.5])
def test_auto_beta_is_the_papers_balance(tmp_path, loss, ce_weight):
    student, teacher = networks()
    data = Images(count=24)
    trainer = make(tmp_path, student, teacher, data, loss=loss, gamma=0.25, beta="auto", balance_lambda=0.8,
                   ce_weight=ce_weight, save_strategy="epoch")  # fmt: skip
    trainer.train()
    with torch.no_grad():
        p = probabilities_by_hand(teacher(data.pixel_values))
    mean_u = (p**0.25).sum(dim=1).mean().item()
    expected = {"kd": 0.8 / 0.2, "ttm": 0.8 * 4 / 0.2, "wttm": 0.8 * 4 / (0.2 * mean_u)}[loss] * ce_weight
    assert trainer.beta == pytest.approx(expected, rel=1e-5)
    assert history(trainer, "beta")[0] == trainer.beta
    saved = json.loads((tmp_path / "checkpoint-3" / "distillation.json").read_text())
    assert saved["beta"] == trainer.beta and saved["beta_setting"] == "auto"


def test_auto_beta_looks_at_the_first_samples_and_changes_nothing_else(tmp_path):
    data = Images(count=24)
    student, teacher = networks(dropout=0.3)
    automatic, fixed = copy.deepcopy(student), copy.deepcopy(student)
    trainer = make(tmp_path, automatic, teacher, data, gamma=0.3, beta="auto", auto_beta_samples=9,
                   per_device_train_batch_size=4, train_sampling_strategy="sequential")  # fmt: skip
    trainer.train()
    with torch.no_grad():
        mean_u = power_sum(teacher(data.pixel_values[:12]), 0.3).mean().item()
    assert trainer.beta == pytest.approx(0.9 / 0.3 / 0.1 / mean_u, rel=1e-5)
    again = make(tmp_path, fixed, teacher, data, gamma=0.3, beta=trainer.beta, per_device_train_batch_size=4,
                 train_sampling_strategy="sequential")  # fmt: skip
    again.train()
    assert_same(weights(automatic), weights(fixed))


def test_auto_beta_survives_resuming(tmp_path):
    student, teacher = networks()
    first = make(tmp_path, copy.deepcopy(student), teacher, beta="auto", save_strategy="epoch")
    first.train()
    # Other data would give another beta: the run goes on with the one it began with.
    resumed = make(tmp_path, copy.deepcopy(student), teacher, Images(seed=9), beta="auto", num_train_epochs=2)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.beta == first.beta


def test_auto_beta_of_a_loss_without_a_balance_is_refused(tmp_path):
    student, teacher = networks()
    trainer = make(tmp_path, student, teacher, beta="auto", distillation_loss=lambda z, v: F.mse_loss(z, v))
    with pytest.raises(ValueError, match='beta="auto" is defined for .* give `beta` as a number'):
        trainer.train()


# ---- Labels --------------------------------------------------------------------------------------------------------


def loss_on(trainer, data, labels):
    return trainer.compute_loss(trainer.model.train(), {"pixel_values": data.pixel_values, "labels": labels})


def test_labels_as_whole_floats_and_as_probabilities(tmp_path):
    student, teacher = networks()
    data = Images(count=8)
    trainer = make(tmp_path, student, teacher, data)
    expected = loss_on(trainer, data, data.labels)
    torch.testing.assert_close(loss_on(trainer, data, data.labels.float()), expected)
    torch.testing.assert_close(loss_on(trainer, data, F.one_hot(data.labels, CLASSES).float()), expected)
    torch.testing.assert_close(loss_on(trainer, data, data.labels.int()), expected)
    soft = torch.rand(8, CLASSES).softmax(-1)
    logits = student(data.pixel_values)
    expected = F.cross_entropy(logits, soft) + wttm_loss(logits, teacher.eval()(data.pixel_values), gamma=0.8)
    torch.testing.assert_close(loss_on(trainer, data, soft), expected)
    with pytest.raises(ValueError, match="not whole numbers"):
        loss_on(trainer, data, data.labels + 0.5)


def test_soft_labels_never_set_the_problem_type(tmp_path):
    torch.manual_seed(0)
    student = vit(image_size=8)
    _, teacher = networks()
    data = Images(count=8)
    trainer = make(tmp_path, student, teacher, data)
    soft = F.one_hot(data.labels, CLASSES).float()
    torch.testing.assert_close(loss_on(trainer, data, soft), loss_on(trainer, data, data.labels))
    assert student.config.problem_type is None


def test_unlabelled_samples_count_for_the_teacher_alone(tmp_path):
    student, teacher = networks(norm=False)
    data = Images(count=8, unlabelled=(1, 5))
    trainer = make(tmp_path, student, teacher, data, beta=2.0, gamma=0.5)
    logits, teacher_logits = student(data.pixel_values), teacher.eval()(data.pixel_values)
    known = data.labels >= 0
    expected = F.cross_entropy(logits[known], data.labels[known]) + 2 * wttm_loss(logits, teacher_logits, gamma=0.5)
    torch.testing.assert_close(loss_on(trainer, data, data.labels), expected)
    nothing = loss_on(trainer, data, torch.full((8,), -100))
    torch.testing.assert_close(nothing, 2 * wttm_loss(logits, teacher_logits, gamma=0.5))


@pytest.mark.parametrize("wrong", [CLASSES, -1, -7])
def test_label_out_of_range_is_named(tmp_path, wrong):
    student, teacher = networks()
    data = Images(count=8)
    data.labels[3] = wrong
    with pytest.raises(ValueError, match=f"label {wrong}, and the student has 5 classes.*0 to 4"):
        make(tmp_path, student, teacher, data).train()


def test_label_smoothing_is_in_the_training_loss_and_not_in_eval_loss(tmp_path):
    student, teacher = networks()
    data = Images(count=8)
    trainer = make(tmp_path, student, teacher, data, evaluation=data, label_smoothing_factor=0.2)
    logits = student.train()(data.pixel_values)
    expected = F.cross_entropy(logits, data.labels, label_smoothing=0.2) + wttm_loss(
        logits, teacher.eval()(data.pixel_values), gamma=0.8
    )
    torch.testing.assert_close(loss_on(trainer, data, data.labels), expected)
    plain = F.cross_entropy(student.eval()(data.pixel_values), data.labels).item()
    assert trainer.evaluate()["eval_loss"] == pytest.approx(plain, rel=1e-6)
    # Also where the user's own metrics leave the loss to the trainer's average over batches.
    trainer.compute_metrics, trainer.preprocess_logits_for_metrics = (lambda prediction: {}), None
    assert trainer.evaluate()["eval_loss"] == pytest.approx(plain, rel=1e-6)


# ---- Mixing --------------------------------------------------------------------------------------------------------


class Watching(ConvNet):
    """Keeps what it is shown."""

    def __init__(self, **options):
        super().__init__(**options)
        self.shown = []

    def forward(self, x):
        self.shown.append(x.detach().clone())
        return super().forward(x)


@pytest.mark.parametrize("kind", ["mixup_alpha", "cutmix_alpha"])
@pytest.mark.parametrize("count", [8, 7])
def test_both_networks_see_the_same_mixed_batch_and_evaluation_none(tmp_path, kind, count):
    torch.manual_seed(0)
    student, teacher = Watching(), Watching()
    data = Images(count=count)
    original = data.pixel_values.clone()
    trainer = make(tmp_path, student, teacher, data, evaluation=data, train_sampling_strategy="sequential",
                   **{kind: 1.0})  # fmt: skip
    trainer.train()
    assert len(student.shown) == len(teacher.shown) == 1
    torch.testing.assert_close(student.shown[0], teacher.shown[0], rtol=0, atol=0)
    assert not torch.equal(student.shown[0], original)
    assert torch.equal(data.pixel_values, original)
    student.shown.clear()
    trainer.evaluate()
    torch.testing.assert_close(student.shown[0], original, rtol=0, atol=0)


def test_mixed_targets_follow_the_mixed_images(tmp_path):
    student, teacher = networks()
    data = Images(count=6)
    trainer = make(tmp_path, student, teacher, data, mixup_alpha=1.0, label_smoothing_factor=0.1, beta=0.0)
    mixed = trainer._mixed({"pixel_values": data.pixel_values, "labels": data.labels})
    # Each image is lam · itself + (1 - lam) · its partner: find lam from the pixels, check the targets with it.
    own, partner = data.pixel_values, data.pixel_values.flip(0)
    lam = ((mixed["pixel_values"] - partner) * (own - partner)).sum() / ((own - partner) ** 2).sum()
    assert 0.0 < lam < 1.0
    hot = F.one_hot(data.labels, CLASSES).float()
    targets = lam * hot + (1 - lam) * hot.flip(0)
    torch.testing.assert_close(mixed["labels"], targets)
    # Smoothed once, whether labels are mixed or not.
    loss = trainer.compute_loss(student.eval(), mixed)
    expected = F.cross_entropy(student(mixed["pixel_values"]), targets, label_smoothing=0.1)
    torch.testing.assert_close(loss, expected)


def test_mixing_half_labelled_data_is_refused(tmp_path):
    student, teacher = networks()
    with pytest.raises(ValueError, match="one class index for every sample"):
        make(tmp_path, student, teacher, Images(unlabelled=(0,)), mixup_alpha=1.0).train()
    trainer = make(tmp_path, student, teacher, Images(unlabelled=(0,)), mixup_alpha=1.0, ce_weight=0)
    assert trainer.train().global_step == 3


# ---- Evaluation ----------------------------------------------------------------------------------------------------


def test_evaluation_metrics_are_exact_over_uneven_batches(tmp_path):
    student, teacher = networks()
    data = Images(count=21, seed=1, unlabelled=(2, 3, 20))
    trainer = make(tmp_path, student, teacher, evaluation=data, per_device_eval_batch_size=8, teacher_metrics=True)
    result = trainer.evaluate()
    with torch.no_grad():
        logits, teacher_logits = student.eval()(data.pixel_values), teacher.eval()(data.pixel_values)
    known = data.labels >= 0
    assert result["eval_loss"] == pytest.approx(F.cross_entropy(logits, data.labels).item(), rel=1e-5)
    assert result["eval_nll"] == pytest.approx(result["eval_loss"], rel=1e-5)
    assert result["eval_top1"] == pytest.approx((logits.argmax(-1) == data.labels)[known].float().mean().item())
    assert result["eval_top5"] == 1.0
    assert result["eval_entropy"] == pytest.approx(shannon_entropy(logits).mean().item(), rel=1e-5)
    same = (logits.argmax(-1) == teacher_logits.argmax(-1)).float().mean().item()
    assert result["eval_teacher_agreement"] == pytest.approx(same)
    divergence = kd_loss(logits, teacher_logits, temperature=1.0).item()
    assert result["eval_teacher_divergence"] == pytest.approx(divergence, rel=1e-5)


def test_evaluation_keeps_a_few_numbers_a_sample_and_prediction_the_logits(tmp_path):
    student, teacher = networks()
    data = Images(count=11, seed=1)
    trainer = make(tmp_path, student, teacher, evaluation=data)
    kept = []
    summarise = trainer.compute_metrics
    trainer.compute_metrics = lambda prediction: kept.append(prediction.predictions.shape) or summarise(prediction)
    top1 = trainer.evaluate()["eval_top1"]
    assert kept == [(11, 4)]
    prediction = trainer.predict(data)
    torch.testing.assert_close(torch.from_numpy(prediction.predictions), student.eval()(data.pixel_values).detach())
    assert prediction.metrics["test_top1"] == top1


def test_a_users_metrics_get_the_logits(tmp_path):
    student, teacher = networks()
    data = Images(count=11)
    trainer = DistillationTrainer(
        student, teacher, config(tmp_path), eval_dataset=data,
        compute_metrics=lambda prediction: {"shape": prediction.predictions.shape[1]},
    )  # fmt: skip
    assert trainer.evaluate()["eval_shape"] == CLASSES


def test_evaluation_without_labels(tmp_path):
    student, teacher = networks()
    data = Images(count=5, labels=False)
    trainer = make(tmp_path, student, teacher, evaluation=data, teacher_preflight=True, ce_weight=0, train=data)
    trainer.train()
    assert "eval_top1" not in trainer.evaluate()
    assert trainer.predict(data).predictions.shape == (5, CLASSES)


# ---- Extending -----------------------------------------------------------------------------------------------------


def test_a_subclass_in_ten_lines(tmp_path):
    class LogitMatching(DistillationTrainer):
        """Squared error between logits (Ba and Caruana, 2014)."""

        def compute_distillation_loss(self, student_outputs, teacher_outputs, inputs):
            return (student_outputs.logits - teacher_outputs.logits).pow(2).mean(dim=-1)

    student, teacher = networks(norm=False)
    data = Images(count=8)
    trainer = make(tmp_path, student, teacher, data, trainer_class=LogitMatching, beta=0.3)
    logits, teacher_logits = student(data.pixel_values), teacher.eval()(data.pixel_values)
    expected = F.cross_entropy(logits, data.labels) + 0.3 * F.mse_loss(logits, teacher_logits)
    torch.testing.assert_close(loss_on(trainer, data, data.labels), expected)
    trainer.train()
    assert history(trainer, "distill")[0] == pytest.approx(F.mse_loss(logits, teacher_logits).item(), rel=1e-5)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_a_users_function_as_the_loss(tmp_path, reduction):
    student, teacher = networks(norm=False)
    data = Images(count=8)

    def mse(student_logits, teacher_logits):
        return F.mse_loss(student_logits, teacher_logits, reduction=reduction).flatten(1 if reduction == "none" else 0)

    def mse_per_sample(student_logits, teacher_logits, labels):
        assert labels.shape == (8,)
        return (
            mse(student_logits, teacher_logits).mean(dim=-1)
            if reduction == "none"
            else mse(student_logits, teacher_logits)
        )

    trainer = make(tmp_path, student, teacher, data, distillation_loss=mse_per_sample, beta=2.0, ce_weight=0)
    expected = 2.0 * F.mse_loss(student(data.pixel_values), teacher.eval()(data.pixel_values))
    torch.testing.assert_close(loss_on(trainer, data, data.labels), expected)


def test_a_subclass_may_bring_its_own_teacher_logits(tmp_path):
    class Stored(DistillationTrainer):
        def compute_teacher_logits(self, inputs):
            return torch.zeros(len(inputs["index"]), CLASSES)

    student, _ = networks()
    data = Images(count=8)
    trainer = make(tmp_path, student, None, data, trainer_class=Stored, gamma=0.5, ce_weight=0, beta=1.0)
    trainer.train()
    assert history(trainer, "power_sum")[0] == pytest.approx(math.sqrt(CLASSES), rel=1e-6)


class Stream(IterableDataset):
    def __iter__(self):
        data = Images()
        yield from (data[i] for i in range(len(data)))


def test_iterable_data(tmp_path):
    student, teacher = networks()
    streamed = copy.deepcopy(student)
    make(tmp_path, student, teacher, train_sampling_strategy="sequential").train()
    make(tmp_path, streamed, teacher, Stream(), max_steps=3).train()
    assert_same(weights(student), weights(streamed))


def test_token_classification_with_padding(tmp_path):
    """Every unpadded token is a sample, for the labels and for the teacher; accumulation stays exact."""

    torch.manual_seed(0)
    student, teacher = Tagger(4).double(), Tagger(6).double()
    whole = copy.deepcopy(student)
    lengths = torch.tensor([5, 2, 4, 1])
    mask = (torch.arange(5) < lengths[:, None]).long()
    tokens, labels = torch.randint(0, 11, (4, 5)), torch.randint(0, 3, (4, 5)).masked_fill(mask == 0, -100)
    labels[0, 1] = -100
    rows = [{"input_ids": tokens[i], "attention_mask": mask[i], "labels": labels[i]} for i in range(4)]
    with torch.no_grad():
        logits, teacher_logits = student(tokens)["logits"], teacher(tokens)["logits"]
    ce = F.cross_entropy(logits[labels >= 0], labels[labels >= 0]).item()
    distill = wttm_loss(logits[mask == 1], teacher_logits[mask == 1], gamma=0.5).item()
    for model, batch, steps in ((student, 1, 4), (whole, 4, 1)):
        trainer = make(
            tmp_path, model, teacher, rows, gamma=0.5, beta=2.0, momentum=0.0, per_device_train_batch_size=batch,
            gradient_accumulation_steps=steps, train_sampling_strategy="sequential",
        )  # fmt: skip
        trainer.train()
        assert history(trainer, "loss")[0] == pytest.approx(ce + 2.0 * distill, rel=1e-6)
    assert_same(weights(student), weights(whole), rtol=1e-10, atol=1e-12)


# ---- Optimiser and schedule ----------------------------------------------------------------------------------------


def test_step_schedule_in_epochs(tmp_path):
    student, teacher = networks()
    trainer = make(tmp_path, student, teacher, num_train_epochs=4, lr_milestones=[1, 2.34], lr_decay=0.1)
    trainer.train()
    expected = [0.05] * 3 + [0.005] * 4 + [0.0005] * 5
    assert history(trainer, "learning_rate") == pytest.approx(expected)


def test_step_schedule_needs_a_length(tmp_path):
    student, teacher = networks()
    with pytest.raises(ValueError, match="`lr_milestones` are epochs.*no length"):
        make(tmp_path, student, teacher, Stream(), max_steps=3, lr_milestones=[1]).train()


@pytest.mark.parametrize("everything", [True, False])
def test_sgd_has_momentum_and_decays_what_is_asked(tmp_path, everything):
    student, teacher = networks()
    trainer = make(tmp_path, student, teacher, momentum=0.8, nesterov=True, weight_decay=0.1,
                   decay_all_parameters=everything)  # fmt: skip
    optimizer = trainer.create_optimizer()
    assert {(g["momentum"], g["nesterov"]) for g in optimizer.param_groups} == {(0.8, True)}
    decayed = {id(p) for g in optimizer.param_groups if g["weight_decay"] == 0.1 for p in g["params"]}
    biases = {id(p) for name, p in student.named_parameters() if name.endswith("bias")}
    assert (biases <= decayed) is everything
    assert {id(student.conv.weight), id(student.head.weight)} <= decayed


@pytest.mark.parametrize("make_student", [timm.create_model, create_student])
def test_weight_decay_leaves_alone_what_the_timm_network_exempts(tmp_path, make_student):
    student, teacher = (make_student("test_vit", num_classes=CLASSES, img_size=32) for _ in range(2))
    names = {id(p): name.removeprefix("timm_model.") for name, p in student.named_parameters()}

    def groups(**options):
        optimizer = make(tmp_path, student, teacher, weight_decay=0.1, **options).create_optimizer()
        decayed, exempt = ({names[id(p)] for group in optimizer.param_groups for p in group["params"]
                            if bool(group["weight_decay"]) is decays} for decays in (True, False))  # fmt: skip
        assert decayed | exempt == set(names.values())
        return decayed, exempt

    decayed, exempt = groups()
    assert {"pos_embed", "cls_token", "head.bias", "norm.weight"} <= exempt
    assert {"head.weight", "patch_embed.proj.weight", "blocks.0.attn.qkv.weight"} <= decayed
    assert groups(decay_all_parameters=True)[1] == set()


def test_evaluation_drops_no_samples(tmp_path):
    """Training does: 24 samples in batches of 10 are two batches."""
    student, teacher = networks()
    data = Images(count=11, seed=3)
    trainer = make(tmp_path, student, teacher, evaluation=data, dataloader_drop_last=True,
                   per_device_train_batch_size=10, per_device_eval_batch_size=4)  # fmt: skip
    assert len(trainer.get_train_dataloader()) == 2
    assert trainer.predict(data).predictions.shape == (11, CLASSES)
    with torch.no_grad():
        expected = F.cross_entropy(student.eval()(data.pixel_values), data.labels)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(expected.item(), rel=1e-5)
    trainer.train()
    assert trainer.state.global_step == 2


# ---- Saving, resuming ----------------------------------------------------------------------------------------------


class Noisy(Images):
    """Augmentation that is a function of (epoch, index), as hf_kd.data's is."""

    epoch = 0

    def set_epoch(self, epoch):
        self.epoch = epoch

    def __getitem__(self, index):
        sample = super().__getitem__(index)
        generator = torch.Generator().manual_seed(1000 * self.epoch + int(index))
        return {**sample, "pixel_values": sample["pixel_values"] + torch.randn(3, 8, 8, generator=generator)}


def run_for_resume(folder, resume=None, stop_after=None, **options):
    """Three epochs of five steps with everything random that there is; optionally stopped after some steps."""

    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_training_stop = state.global_step == stop_after
            control.should_save = control.should_training_stop

    student, teacher = networks(dropout=0.4)
    trainer = make(
        folder, student, teacher, Noisy(count=37), callbacks=[Stop()], beta="auto", gamma=0.4, num_train_epochs=3,
        per_device_train_batch_size=4, gradient_accumulation_steps=2, optim="adamw_torch", learning_rate=1e-2,
        lr_scheduler_type="cosine", mixup_alpha=0.5, **options,
    )  # fmt: skip
    trainer.train(resume_from_checkpoint=resume)
    return trainer


@pytest.mark.parametrize("stop_after", [2, 5, 8, 14])
def test_resuming_in_the_middle_of_an_epoch_is_bit_identical(tmp_path, stop_after):
    whole = run_for_resume(tmp_path / "whole")
    assert whole.state.global_step == 15
    run_for_resume(tmp_path / "cut", stop_after=stop_after)
    resumed = run_for_resume(tmp_path / "cut", resume=True)
    assert_same(weights(whole.model), weights(resumed.model))
    assert resumed.beta == whole.beta
    tail = [(e["step"], e["loss"], e["ce"], e["distill"]) for e in whole.state.log_history if "ce" in e][stop_after:]
    assert (
        tail
        == [(e["step"], e["loss"], e["ce"], e["distill"]) for e in resumed.state.log_history if "ce" in e][stop_after:]
    )


def test_two_runs_of_one_seed_are_bit_identical(tmp_path):
    first, second = run_for_resume(tmp_path / "a"), run_for_resume(tmp_path / "b")
    assert_same(weights(first.model), weights(second.model))
    other = run_for_resume(tmp_path / "c", seed=7)
    assert not torch.equal(other.model.head.weight, first.model.head.weight)


@pytest.mark.parametrize("how", ["torch_compile", "compiled model"])
def test_compiled_students_save_clean_keys(tmp_path, how):
    student, teacher = networks()
    plain = copy.deepcopy(student)
    if how == "torch_compile":
        options = {"torch_compile": True, "torch_compile_backend": "eager"}
        model = student
    else:
        options, model = {}, torch.compile(student, backend="eager")
    trainer = make(tmp_path, model, teacher, evaluation=Images(seed=1), save_strategy="epoch", num_train_epochs=2,
                   **options)  # fmt: skip
    trainer.train()
    saved = load_file(tmp_path / "checkpoint-6" / "model.safetensors")
    assert saved.keys() == plain.state_dict().keys()
    resumed = make(tmp_path, plain, teacher, num_train_epochs=3, save_strategy="epoch")
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-6"))
    assert resumed.state.global_step == 9


@pytest.mark.parametrize("kind", ["create_student", "bare timm", "transformers"])
def test_every_kind_of_student_trains_resumes_and_reopens(tmp_path, kind):
    build = {
        "create_student": lambda: create_student("test_resnet", num_classes=CLASSES, img_size=32),
        "bare timm": lambda: timm.create_model("test_resnet", num_classes=CLASSES),
        "transformers": vit,
    }[kind]
    reopen = {
        "create_student": lambda folder: timm.create_model(f"local-dir:{folder}", pretrained=True),
        "bare timm": lambda folder: timm.create_model(f"local-dir:{folder}", pretrained=True),
        "transformers": ViTForImageClassification.from_pretrained,
    }[kind]
    torch.manual_seed(0)
    student = build()
    # A ViT says nothing of its preprocessing, nor does a teacher that is a plain module.
    teacher = ConvNetFor32() if kind == "transformers" else create_student("test_resnet", num_classes=CLASSES)
    data = Images(count=12, size=32)
    options = {"per_device_train_batch_size": 4, "save_strategy": "steps", "save_steps": 2}
    before = weights(student)
    trainer = make(tmp_path / "whole", student, teacher, data, num_train_epochs=2, **options)
    trainer.train()
    trained = {name for name, parameter in student.named_parameters() if not torch.equal(parameter, before[name])}
    assert trained == {name for name, _ in student.named_parameters()}
    trainer.save_model()
    reopened = reopen(tmp_path / "whole").eval()
    with torch.no_grad():
        logits, again = (logits_of(network.eval()(data.pixel_values)) for network in (student, reopened))
    torch.testing.assert_close(logits, again, rtol=0, atol=1e-6)
    torch.manual_seed(5)
    resumed = make(tmp_path / "resumed", build(), teacher, data, num_train_epochs=2, **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-4"))
    assert_same(weights(resumed.model), weights(student))


class ConvNetFor32(nn.Sequential):
    def __init__(self):
        super().__init__(nn.AvgPool2d(4), ConvNet())


def test_best_model_is_loaded_whole_or_not_at_all(tmp_path):
    student, teacher = networks()
    trainer = make(
        tmp_path, student, teacher, evaluation=Images(seed=1), eval_strategy="epoch", save_strategy="epoch",
        num_train_epochs=3, load_best_model_at_end=True, metric_for_best_model="top1", learning_rate=0.3,
    )  # fmt: skip
    trainer.train()
    best = load_file(trainer.state.best_model_checkpoint + "/model.safetensors")
    assert_same(weights(student), best)
    accuracies = [e["eval_top1"] for e in trainer.state.log_history if "eval_top1" in e]
    assert trainer.evaluate()["eval_top1"] == max(accuracies)
    other = make(tmp_path, ConvNet(width=7), teacher)
    other.state.best_model_checkpoint = trainer.state.best_model_checkpoint
    with pytest.raises(ValueError, match="holds another network than this student"):
        other._load_best_model()
    with pytest.raises(ValueError, match="holds another network than this student"):
        make(tmp_path, nn.Sequential(nn.Flatten(), nn.Linear(192, CLASSES)), teacher).train(
            resume_from_checkpoint=True
        )


# ---- Refusals ------------------------------------------------------------------------------------------------------


def test_class_counts_that_differ_name_both(tmp_path):
    with pytest.raises(ValueError, match="student has 5 classes and the teacher .* has 7.*class_map"):
        DistillationTrainer(ConvNet(), ConvNet(classes=7), config(tmp_path))
    mapped = DistillationTrainer(
        ConvNet(), ConvNet(classes=7), config(tmp_path, teacher_class_map=[6, 0, 2, 3, 4]), train_dataset=Images()
    )
    images = Images().pixel_values
    torch.testing.assert_close(
        mapped.compute_teacher_logits({"pixel_values": images}), mapped.teacher.model(images)[:, [6, 0, 2, 3, 4]]
    )


def test_a_students_image_processor_says_how_its_images_are(tmp_path):
    processor = ViTImageProcessor(size={"height": 32, "width": 32}, image_mean=[0.2] * 3, image_std=[0.1] * 3)
    teacher = create_student("test_resnet", num_classes=5, img_size=32, mean=(0.5,) * 3, std=(0.25,) * 3)
    trainer = DistillationTrainer(
        vit(), teacher, config(tmp_path), train_dataset=Images(size=32), processing_class=processor
    )
    images = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        expected = teacher.eval()((images * 0.1 + 0.2 - 0.5) / 0.25).logits
        torch.testing.assert_close(trainer.teacher(pixel_values=images), expected, rtol=0, atol=1e-5)


def test_a_teacher_of_unknown_normalisation_is_refused(tmp_path):
    student = ConvNet()
    student.pretrained_cfg = {"mean": (0.5,) * 3, "std": (0.2,) * 3, "input_size": (3, 8, 8)}
    with pytest.raises(ValueError, match="does not say how its images are normalised"):
        DistillationTrainer(student, ConvNet(), config(tmp_path))
    known = Teacher(ConvNet(), preprocessing=Preprocessing((0.5,) * 3, (0.2,) * 3, (3, 8, 8)))
    DistillationTrainer(student, known, config(tmp_path))
    with pytest.raises(ValueError, match="student does not say how its images are"):
        DistillationTrainer(ConvNet(), known, config(tmp_path))


@pytest.mark.parametrize("who", ["teacher", "student"])
def test_nan_logits_stop_the_run_and_leave_the_checkpoint(tmp_path, who):
    student, teacher = networks()

    class Poison(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == 2:
                with torch.no_grad():
                    {"teacher": teacher, "student": student}[who].head.bias[0] = float("nan")

    trainer = make(tmp_path, student, teacher, callbacks=[Poison()], save_strategy="steps", save_steps=2)
    with pytest.raises(RuntimeError, match=f"not finite at step 3 .*{who} logits hold NaN.*checkpoint is untouched"):
        trainer.train()
    assert all(
        torch.isfinite(value).all() for value in load_file(tmp_path / "checkpoint-2/model.safetensors").values()
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"compute_loss_func": lambda *a, **k: 0}, "pass `distillation_loss`"),
        ({"distillation_loss": nn.Bilinear(5, 5, 1)}, "parameters of its own"),
        ({"distillation_loss": 3}, "must be a function or a module"),
        ({"distillation_loss": kd_loss, "args": {"loss": "ce"}}, 'loss="ce" leaves it out'),
    ],
)
def test_contradictions_are_refused(tmp_path, options, message):
    student, teacher = networks()
    options = dict(options)
    with pytest.raises((ValueError, TypeError), match=message):
        DistillationTrainer(student, teacher, config(tmp_path, **options.pop("args", {})), **options)


def test_several_gpus_without_a_launcher_are_refused(tmp_path):
    arguments = config(tmp_path)
    arguments._n_gpu = 4
    with pytest.raises(ValueError, match="accelerate launch --multi_gpu --num_processes 4"):
        DistillationTrainer(ConvNet(), ConvNet(), arguments)


# ---- Provenance ----------------------------------------------------------------------------------------------------


def test_provenance_says_what_was_done(tmp_path):
    student, teacher = networks()

    class Own(DistillationTrainer):
        def compute_distillation_loss(self, student_outputs, teacher_outputs, inputs):
            return student_outputs.logits.mean(dim=-1)

    named = make(tmp_path, student, teacher, loss="kd", temperature=2.0, beta=0.5, ce_weight=0.25).provenance()
    assert (named["loss"], named["gamma"], named["temperature"], named["beta"]) == ("kd", 0.5, 2.0, 0.5)
    assert named["ce_weight"] == 0.25
    assert named["teacher"] == {"id": "ConvNet", "top1": None}
    assert named["student"]["parameters"] == sum(p.numel() for p in student.parameters())
    assert named["versions"]["hf_kd"] == hf_kd.__version__
    own = make(tmp_path, student, teacher, trainer_class=Own, gamma=0.5).provenance()
    assert (own["loss"], own["gamma"]) == ("Own", None)
    function = make(tmp_path, student, teacher, distillation_loss=kd_loss).provenance()
    assert (function["loss"], function["gamma"]) == ("custom", None)
    alone = make(tmp_path, student, None, loss="ce").provenance()
    assert (alone["loss"], alone["teacher"], alone["beta"]) == ("ce", None, None)


def test_a_float64_teacher_of_a_float32_student(tmp_path):
    student, _ = networks()
    _, teacher = networks(dtype=torch.float64)
    data = Images(count=8)
    trainer = make(tmp_path, student, teacher, data, gamma=0.5)
    with torch.no_grad():
        logits, teacher_logits = student.train()(data.pixel_values), teacher(data.pixel_values.double())
    expected = F.cross_entropy(logits, data.labels) + wttm_loss(logits, teacher_logits, gamma=0.5)
    assert trainer.teacher(data.pixel_values).dtype == torch.float64
    trainer.train()
    assert history(trainer, "loss")[0] == pytest.approx(expected.item(), rel=1e-5)
