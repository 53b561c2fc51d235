"""DKD, DIST and NKD by the configuration's name: in training, in provenance and card, and what is refused."""

import copy
import json

import pytest
import torch
from tiny import CLASSES, ConvNet, Images, Tagger, config, networks
from torch.nn import functional as F
from transformers import TrainerCallback

from hf_kd import DistillationConfig, DistillationTrainer
from hf_kd.data.padding import SAMPLE_MASK
from hf_kd.losses import LogitLoss, dist_loss, dkd_loss, nkd_loss


# By name: the configuration, and the same loss as a function.
NAMED = {
    "dkd": ({"temperature": 2.0, "loss_kwargs": {"alpha": 0.7, "beta": 3.0}},
            lambda z, v, y: dkd_loss(z, v, y, alpha=0.7, beta=3.0, temperature=2.0)),
    "dist": ({"temperature": 2.0, "loss_kwargs": {"beta": 0.6, "gamma": 1.7}},
             lambda z, v, y: dist_loss(z, v, beta=0.6, gamma=1.7, temperature=2.0)),
    "nkd": ({"temperature": 2.0, "loss_kwargs": {"gamma": 1.5}},
            lambda z, v, y: nkd_loss(z, v, y, gamma=1.5, temperature=2.0)),
}  # fmt: skip


def make(folder, student, teacher, train=None, callbacks=None, **options):
    data = Images() if train is None else train
    return DistillationTrainer(
        student, teacher, config(folder, **options), train_dataset=data, eval_dataset=data, callbacks=callbacks
    )


def history(trainer, key):
    return [entry[key] for entry in trainer.state.log_history if key in entry and "loss" in entry]


def values(tensors):
    return torch.cat([value.flatten() for value in tensors.state_dict().values()])


# ---- Training ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("loss", NAMED)
def test_each_trains_by_its_name(tmp_path, loss):
    student, teacher = networks()
    data, reference = Images(count=16), copy.deepcopy(student)
    options, function = NAMED[loss]
    trainer = make(
        tmp_path, student, teacher, data, loss=loss, beta=0.3, ce_weight=0.25, num_train_epochs=10,
        train_sampling_strategy="sequential", **options,
    )  # fmt: skip
    trainer.train()
    images, labels = data.pixel_values[:8], data.labels[:8]
    with torch.no_grad():
        logits, teacher_logits = reference.train()(images), teacher.eval()(images)
    expected = 0.25 * F.cross_entropy(logits, labels) + 0.3 * function(logits, teacher_logits, labels)
    assert history(trainer, "loss")[0] == pytest.approx(expected.item(), rel=1e-5)
    first = history(trainer, "distill")
    assert first[0] == pytest.approx(function(logits, teacher_logits, labels).item(), rel=1e-5)
    # A good part of NKD is the teacher's entropy, which stays.
    assert sum(first[-2:]) < (0.97 if loss == "nkd" else 0.8) * sum(first[:2])
    parts = {"dkd": {"tckd", "nckd"}, "dist": {"inter", "intra"}, "nkd": {"target", "non_target"}}[loss]
    assert parts <= trainer.state.log_history[0].keys() and "power_sum" not in trainer.state.log_history[0]


@pytest.mark.parametrize("loss", ["dkd", "nkd"])
@pytest.mark.parametrize("ce_weight", [1.0, 0.0])
def test_accumulation_gives_the_gradient_of_the_whole_batch(tmp_path, loss, ce_weight):
    """8 x 1, 4 x 2, 2 x 4, 3 x 3 (batch x steps) are one step; samples without a label count with 0."""
    options, function = NAMED[loss]
    data, after = Images(count=8, dtype=torch.float64, unlabelled=(1, 6)), {}
    for batch, steps in ((8, 1), (4, 2), (2, 4), (3, 3)):
        student, teacher = networks(dtype=torch.float64, norm=False)
        before = copy.deepcopy(student)
        trainer = make(
            tmp_path, student, teacher, data, loss=loss, beta=0.3, ce_weight=ce_weight, momentum=0.0,
            per_device_train_batch_size=batch, gradient_accumulation_steps=steps,
            train_sampling_strategy="sequential", **options,
        )  # fmt: skip
        trainer.train()
        assert trainer.state.global_step == 1
        after[batch] = values(student)
    logits, teacher_logits = before(data.pixel_values), teacher.eval()(data.pixel_values)
    total = 0.3 * function(logits, teacher_logits.detach(), data.labels)
    total = total + ce_weight * F.cross_entropy(logits, data.labels)
    total.backward()
    by_hand = torch.cat([(p - 0.05 * p.grad).detach().flatten() for p in before.parameters()])
    for batch in after:
        torch.testing.assert_close(after[batch], by_hand, rtol=1e-11, atol=1e-13)


def test_dist_is_the_mean_over_its_batches_weighted_by_their_samples(tmp_path):
    options, function = NAMED["dist"]
    student, teacher = networks(dtype=torch.float64, norm=False)
    data = Images(count=8, dtype=torch.float64)
    with torch.no_grad():
        logits, teacher_logits = student(data.pixel_values), teacher.eval()(data.pixel_values)
    parts = [function(a, b, None) for a, b in zip(logits.split(3), teacher_logits.split(3), strict=True)]
    expected = (3 * parts[0] + 3 * parts[1] + 2 * parts[2]).item() / 8
    whole = function(logits, teacher_logits, None).item()
    for batch, steps, value in ((3, 3, expected), (8, 1, whole)):
        trainer = make(
            tmp_path, copy.deepcopy(student), teacher, data, loss="dist", ce_weight=0,
            per_device_train_batch_size=batch, gradient_accumulation_steps=steps,
            train_sampling_strategy="sequential", **options,
        )  # fmt: skip
        trainer.train()
        assert history(trainer, "distill") == pytest.approx([value], rel=1e-6)
    assert abs(expected - whole) > 0.1


@pytest.mark.parametrize("loss", NAMED)
def test_repeats_that_fill_up_a_batch_do_not_count(tmp_path, loss):
    options, function = NAMED[loss]
    student, teacher = networks(norm=False)
    data = Images(count=8)
    trainer = make(tmp_path, student, teacher, data, loss=loss, beta=2.0, **options)
    real = torch.tensor([True] * 5 + [False] * 3)
    batch = {"pixel_values": data.pixel_values, "labels": data.labels, SAMPLE_MASK: real}
    value = trainer.compute_loss(student.train(), batch)
    logits, teacher_logits = student(data.pixel_values[:5]), teacher.eval()(data.pixel_values[:5])
    expected = F.cross_entropy(logits, data.labels[:5]) + 2.0 * function(logits, teacher_logits, data.labels[:5])
    torch.testing.assert_close(value, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("loss", NAMED)
def test_every_unpadded_token_is_a_sample(tmp_path, loss):
    options, function = NAMED[loss]
    student, teacher = Tagger(4).double(), Tagger(6).double()
    mask = (torch.arange(5) < torch.tensor([5, 2, 4, 1])[:, None]).long()
    tokens, labels = torch.randint(0, 11, (4, 5)), torch.randint(0, 3, (4, 5)).masked_fill(mask == 0, -100)
    labels[0, 1] = -100
    batch = {"input_ids": tokens, "attention_mask": mask, "labels": labels}
    trainer = make(tmp_path, student, teacher, [{k: v[i] for k, v in batch.items()} for i in range(4)], loss=loss,
                   ce_weight=0, per_device_train_batch_size=4, **options)  # fmt: skip
    trainer.train()
    initial = trainer.state.log_history[0]["distill"]
    torch.manual_seed(0)
    student, teacher = Tagger(4).double(), Tagger(6).double()
    kept = mask == 1
    with torch.no_grad():
        expected = function(student(tokens)["logits"][kept], teacher(tokens)["logits"][kept], labels[kept])
    assert initial == pytest.approx(expected.item(), rel=1e-6)


# ---- DKD's warm-up -------------------------------------------------------------------------------------------------


def warmed_up(folder, resume=None, stop_after=None, warmup=4):
    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_training_stop = control.should_save = state.global_step == stop_after

    student, teacher = networks()
    trainer = make(
        folder, student, teacher, callbacks=[Stop()], loss="dkd", beta=0.1, num_train_epochs=6,
        loss_kwargs={"beta": 2.0, "warmup_epochs": warmup},
    )  # fmt: skip
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def test_warm_up_grows_from_epoch_to_epoch_and_survives_resuming(tmp_path):
    trainer = warmed_up(tmp_path / "whole")
    whole = [history(trainer, key) for key in ("distill", "tckd", "nckd")]
    factors = [distill / (tckd + 2.0 * nckd) for distill, tckd, nckd in zip(*whole, strict=True)]
    assert factors == pytest.approx([f for f in (0.25, 0.5, 0.75, 1.0, 1.0, 1.0) for _ in range(3)], rel=1e-5)
    warmed_up(tmp_path / "cut", stop_after=5)
    resumed = warmed_up(tmp_path / "cut", resume=True)
    assert history(resumed, "distill")[5:] == whole[0][5:]
    assert values(resumed.model).equal(values(trainer.model))
    assert not values(warmed_up(tmp_path / "without", warmup=0).model).equal(values(trainer.model))


def test_every_loss_hears_the_epoch_in_training_alone(tmp_path):
    heard = []

    class Listening(LogitLoss):
        def set_epoch(self, epoch):
            heard.append(epoch)

        def forward(self, student, teacher, labels=None):
            return {"distill": (student.logits - teacher.logits).square().mean(-1)}

    student, teacher = networks()
    data = Images(count=16)
    trainer = DistillationTrainer(
        student, teacher, config(tmp_path, num_train_epochs=2), train_dataset=data, eval_dataset=data,
        distillation_loss=Listening(),
    )  # fmt: skip
    trainer.train()
    assert heard == [0.0, 0.5, 1.0, 1.5]
    trainer.evaluate()
    assert len(heard) == 4


# ---- Labels --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("loss", ["dkd", "nkd"])
def test_labels_are_needed_without_cross_entropy_too(tmp_path, loss):
    student, teacher = networks()
    trainer = make(tmp_path, student, teacher, Images(labels=False), loss=loss, ce_weight=0)
    with pytest.raises(ValueError, match=f"{loss} needs the class of each sample, and the batch has no labels"):
        trainer.train()
    assert make(tmp_path, student, teacher, Images(labels=False), loss="dist", ce_weight=0).train().global_step == 3


@pytest.mark.parametrize("ce_weight", [1.0, 0.0])
def test_mixed_images_keep_their_labels(tmp_path, ce_weight):
    student, teacher = networks()
    data = Images(count=8)
    for loss in ("nkd", "dist"):
        trainer = make(tmp_path, student, teacher, data, loss=loss, mixup_alpha=1.0, ce_weight=ce_weight)
        mixed = trainer._mixed({"pixel_values": data.pixel_values, "labels": data.labels})
        assert mixed["labels"].is_floating_point() == (loss == "nkd" or ce_weight > 0)
        assert trainer.train().global_step == 1
    dkd = make(tmp_path, student, teacher, data, loss="dkd", mixup_alpha=1.0, ce_weight=ce_weight)
    with pytest.raises(ValueError, match="dkd takes one class per sample, and the labels are probabilities"):
        dkd.train()


def test_nkd_of_mixed_images_has_the_larger_share_as_its_target(tmp_path):
    student, teacher = networks(norm=False)
    data = Images(count=8)
    trainer = make(tmp_path, student, teacher, data, loss="nkd", ce_weight=0)
    soft = 0.7 * F.one_hot(data.labels, CLASSES) + 0.3 * F.one_hot(data.labels.flip(0), CLASSES)
    with torch.no_grad():
        value = trainer.compute_loss(student.train(), {"pixel_values": data.pixel_values, "labels": soft})
        expected = nkd_loss(student(data.pixel_values), teacher.eval()(data.pixel_values), data.labels)
    torch.testing.assert_close(value, expected, rtol=1e-6, atol=1e-6)


# ---- Configuration -------------------------------------------------------------------------------------------------


def built(tmp_path, **options):
    return make(tmp_path, ConvNet(), ConvNet(), **options).distillation_loss


def test_the_configurations_temperature_is_the_losss_and_its_gamma_is_not(tmp_path):
    assert built(tmp_path, loss="dkd").temperature == 4.0
    assert built(tmp_path, loss="dist").temperature == built(tmp_path, loss="nkd").temperature == 1.0
    for options in ({"temperature": 4.0}, {"gamma": 0.25}, {"loss_kwargs": {"temperature": 4.0}}):
        for loss in ("dist", "nkd"):
            module = built(tmp_path, loss=loss, **options)
            assert (module.temperature, module.gamma) == (4.0, 1.0)
    module = built(tmp_path, loss="dist", gamma=0.25, loss_kwargs='{"gamma": 2, "beta": 3}')
    assert (module.temperature, module.gamma, module.beta) == (4.0, 2, 3)
    args = DistillationConfig(str(tmp_path), loss="nkd", loss_kwargs={"temperature": 2, "gamma": 1.5}, use_cpu=True)
    assert (args.temperature, args.gamma) == (2.0, 0.5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"loss": "dkd", "temperature": 4.0, "loss_kwargs": {"temperature": 2}},
            "`temperature`=4.0 and .* 2 in `loss_",
        ),
        ({"loss": "nkd", "gamma": 0.5, "loss_kwargs": {"temperature": 4.0}}, "contradict each other"),
        ({"loss": "dist", "loss_kwargs": {"temperature": 0}}, "`temperature` must be a positive number, got 0"),
        (
            {"loss": "dkd", "loss_kwargs": {"gamma": 2.0}},
            "The loss 'dkd' takes alpha, beta, temperature, warmup_epochs",
        ),
        ({"loss": "dist", "loss_kwargs": {"gamma": -1}}, "`gamma` must be a number of at least 0, got -1"),
        ({"loss": "kd", "loss_kwargs": {"gamma": 0.5}}, "`loss_kwargs` cannot hold gamma"),
    ],
)
def test_contradictions_are_refused(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        built(tmp_path, **options)


@pytest.mark.parametrize("loss", NAMED)
def test_auto_beta_is_refused(tmp_path, loss):
    student, teacher = networks()
    with pytest.raises(ValueError, match=f'beta="auto" is defined for .* not for {loss.upper()}: give `beta`'):
        make(tmp_path, student, teacher, loss=loss, beta="auto").train()


# ---- Provenance and card -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("loss", "lines", "cited"),
    [
        ("dkd", ("Per sample `CE + 0.5 · T² · (a · D(b ‖ b') + c · D(p' ‖ q'))`", "- alpha of the loss: 0.7",
                 "- beta of the loss: 3.0", "- warmup_epochs of the loss: 0.0"), "2203.08679"),
        ("dist", ("Per batch `CE + 0.5 · T² · (b · (1 - r) + c · (1 - s))`", "- beta of the loss: 0.6",
                  "- gamma of the loss: 1.7"), "2205.10536"),
        ("nkd", ("Per sample `CE + 0.5 · (c · T² · H(p', q') - p_y · log q_y)`", "- gamma of the loss: 1.5"),
         "2303.13005"),
    ],
)  # fmt: skip
def test_the_card_says_formula_values_and_source(tmp_path, loss, lines, cited):
    student, teacher = networks()
    trainer = make(tmp_path, student, teacher, loss=loss, beta=0.5, save_strategy="epoch", **NAMED[loss][0])
    trainer.train()
    provenance = json.loads((tmp_path / "checkpoint-3" / "distillation.json").read_text())
    assert (provenance["loss"], provenance["temperature"]) == (loss, 2.0)
    assert provenance["loss_kwargs"] == NAMED[loss][0]["loss_kwargs"]
    trainer.create_model_card()
    text = (tmp_path / "README.md").read_text()
    for line in (*lines, "- T (temperature): 2\n", "- β (beta): 0.5", f"eprint        = {{{cited}}}"):
        assert line in text
    assert "γ (gamma)" not in text and "temperature of the loss" not in text
