"""What ``log_analysis`` logs, against formulas written out by hand, and that it changes nothing else."""

import copy
import json
import math

import pytest
import torch
from test_trainer import assert_same, history, make, probabilities_by_hand, weights
from tiny import CLASSES, ConvNet, Images, Tagger, networks, vit, without_times
from torch import nn
from torch.utils.checkpoint import checkpoint

from hf_kd import term_gradients
from hf_kd.losses import functional


GAMMA = 0.4
TEACHER = {"divergence", "teacher_entropy", "power_sum"}
GRADIENTS = {"grad_norm_ce", "grad_norm_distill", "grad_cosine"}


def entry_of(trainer):
    (entry,) = [entry for entry in trainer.state.log_history if "loss" in entry]
    return entry


def quantities_by_hand(z, v, gamma):
    """q, p_T, U, D(p_T || q), H(p_T) and H(q), from their definitions."""
    q, power = probabilities_by_hand(z), probabilities_by_hand(v) ** gamma
    u = power.sum(dim=1)
    p_t = power / u[:, None]
    return q, p_t, u, (p_t * (p_t / q).log()).sum(1), -(p_t * p_t.log()).sum(1), -(q * q.log()).sum(1)


def pulls_by_hand(loss, z, v, labels, ce_weight, beta):
    """The gradient of each sample's terms with respect to its logits, for the samples of one optimiser step."""
    q, p_t, u, *_ = quantities_by_hand(z, v, GAMMA)
    labelled = labels >= 0
    one_hot = torch.eye(CLASSES, dtype=z.dtype)[labels.clamp_min(0)]
    ce = ce_weight * (q - one_hot) * labelled[:, None] * len(labels) / max(int(labelled.sum()), 1)
    if loss == "kd":
        distill = (probabilities_by_hand(GAMMA * z) - p_t) / GAMMA  # T² γ = T
    else:
        distill = (u[:, None] if loss == "wttm" else 1.0) * (q - p_t)
    return ce, beta * distill


def reference(loss, student, teacher, data, step_size, ce_weight, beta):
    """What is logged over an epoch in which the student does not change."""
    with torch.no_grad():
        z, v = copy.deepcopy(student).eval()(data.pixel_values), copy.deepcopy(teacher).eval()(data.pixel_values)
    _, _, u, divergence, teacher_entropy, student_entropy = quantities_by_hand(z, v, GAMMA)
    steps = zip(z.split(step_size), v.split(step_size), data.labels.split(step_size), strict=True)
    pairs = [pulls_by_hand(loss, *step, ce_weight, beta) for step in steps]
    ce, distill = (torch.cat(parts) for parts in zip(*pairs, strict=True))
    expected = {
        "divergence": divergence.mean(),
        "teacher_entropy": teacher_entropy.mean(),
        "student_entropy": student_entropy.mean(),
        "power_sum": u.mean(),
        "grad_norm_distill": (distill**2).sum(1).mean().sqrt(),
    }
    if ce_weight:
        expected["grad_norm_ce"] = (ce**2).sum(1).mean().sqrt()
        expected["grad_cosine"] = (ce * distill).sum() / (ce.norm() * distill.norm())
    return {key: value.item() for key, value in expected.items()}


def case(count=20):
    student, teacher = networks(norm=False, dtype=torch.float64)
    unlabelled = [number for number in (0, 3, 4, 17) if number < count]
    return student, teacher, Images(count=count, unlabelled=unlabelled, dtype=torch.float64)


STILL = {"learning_rate": 0.0, "train_sampling_strategy": "sequential", "log_analysis": True,
         "logging_strategy": "epoch"}  # fmt: skip


@pytest.mark.parametrize(
    ("loss", "options"),
    [
        ("kd", {"beta": 0.9, "ce_weight": 0.1}),
        ("ttm", {"beta": 3.0}),
        ("wttm", {"beta": 1.7, "ce_weight": 0.5}),
        ("wttm", {"beta": "auto", "balance_lambda": 0.8}),
        ("wttm", {"beta": 2.0, "ce_weight": 0.0}),
    ],
)
def test_values_are_those_of_the_formulas(tmp_path, loss, options):
    # Steps of 6, 6, 6 and 2 samples, of which 3, 0, 1 (and no more) have no label.
    student, teacher, data = case()
    before = copy.deepcopy(student)
    trainer = make(
        tmp_path, student, teacher, data, loss=loss, gamma=GAMMA, per_device_train_batch_size=2,
        gradient_accumulation_steps=3, **STILL, **options,
    )  # fmt: skip
    trainer.train()
    entry = entry_of(trainer)
    expected = reference(loss, before, teacher, data, 6, options.get("ce_weight", 1.0), trainer.beta)
    assert {key: entry[key] for key in expected} == pytest.approx(expected, rel=1e-6)
    assert entry.keys() & (TEACHER | GRADIENTS) == expected.keys() - {"student_entropy"}


@pytest.mark.parametrize(("batch", "steps"), [(8, 1), (4, 2), (1, 8), (3, 3)])
def test_however_a_step_is_split_the_values_are_the_same(tmp_path, batch, steps):
    student, teacher, data = case(count=8)
    before = copy.deepcopy(student)
    trainer = make(
        tmp_path, student, teacher, data, loss="ttm", gamma=GAMMA, beta=3.0, per_device_train_batch_size=batch,
        gradient_accumulation_steps=steps, **STILL,
    )  # fmt: skip
    trainer.train()
    expected = reference("ttm", before, teacher, data, 8, 1.0, 3.0)
    entry = entry_of(trainer)
    assert {key: entry[key] for key in expected} == pytest.approx(expected, rel=1e-6)
    assert entry["divergence"] == pytest.approx(entry["distill"], rel=1e-6)


@pytest.mark.parametrize("options", [{}, {"bf16": True}, {"mixup_alpha": 0.5, "loss": "kd", "max_grad_norm": 0.1}])
def test_training_is_the_same_to_the_last_bit(tmp_path, options):
    runs = []
    for log_analysis in (False, True):
        student, teacher = networks(dropout=0.2)
        trainer = make(tmp_path, student, teacher, gamma=GAMMA, num_train_epochs=2, log_analysis=log_analysis,
                       gradient_accumulation_steps=2, per_device_train_batch_size=4, **options)  # fmt: skip
        trainer.train()
        runs.append((weights(student), [without_times(entry) for entry in trainer.state.log_history]))
    (plain, log), (analysed, more) = runs
    assert_same(plain, analysed)
    for entry, other in zip(log[:-1], more[:-1], strict=True):
        assert entry.items() <= other.items()
        assert other.keys() - entry.keys() == (TEACHER | GRADIENTS) - {"power_sum"}


def test_without_it_nothing_is_computed(tmp_path, monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("This was not asked for.")

    monkeypatch.setattr(torch.autograd, "grad", refuse)
    monkeypatch.setattr(functional, "matching_statistics", refuse)
    monkeypatch.setattr(term_gradients, "watched", refuse)
    monkeypatch.setattr(term_gradients, "products", refuse)
    student, teacher = networks()
    trainer = make(tmp_path, student, teacher)
    trainer.train()
    logged = trainer.state.log_history[0].keys()
    assert not logged & {"divergence", "teacher_entropy", *GRADIENTS}
    assert {"ce", "distill", "power_sum", "student_entropy", "beta"} <= logged


def test_labels_alone_have_one_gradient_and_no_teacher(tmp_path):
    student, _, data = case()
    before = copy.deepcopy(student).eval()
    trainer = make(tmp_path, student, None, data, loss="ce", label_smoothing_factor=0.2, **STILL,
                   per_device_train_batch_size=20)  # fmt: skip
    trainer.train()
    entry = entry_of(trainer)
    with torch.no_grad():
        z = before(data.pixel_values)
    labelled = data.labels >= 0
    target = 0.8 * torch.eye(CLASSES, dtype=z.dtype)[data.labels.clamp_min(0)] + 0.2 / CLASSES
    q = probabilities_by_hand(z)
    pull = (q - target) * labelled[:, None] * 20 / labelled.sum()
    assert entry["grad_norm_ce"] == pytest.approx((pull**2).sum(1).mean().sqrt().item(), rel=1e-6)
    assert entry["student_entropy"] == pytest.approx(-(q * q.log()).sum(1).mean().item(), rel=1e-6)
    assert entry.keys() & (TEACHER | GRADIENTS) == {"grad_norm_ce"}


def squared_error(z, v):
    return (z - v).square().mean()


def test_a_loss_of_ones_own_that_is_a_mean_and_knows_no_gamma(tmp_path):
    student, teacher, data = case(count=8)
    before = copy.deepcopy(student).eval()
    trainer = make(tmp_path, student, teacher, data, distillation_loss=squared_error, beta=3.0, gamma=GAMMA,
                   **STILL)  # fmt: skip
    trainer.train()
    entry = entry_of(trainer)
    with torch.no_grad():
        z, v = before(data.pixel_values), teacher.eval()(data.pixel_values)
    _, _, u, divergence, entropy, _ = quantities_by_hand(z, v, GAMMA)
    expected = {"divergence": divergence, "power_sum": u, "teacher_entropy": entropy}
    assert {key: entry[key] for key in expected} == pytest.approx(
        {key: value.mean().item() for key, value in expected.items()}, rel=1e-6
    )
    pull = 3.0 * 2.0 * (z - v) / CLASSES
    assert entry["grad_norm_distill"] == pytest.approx((pull**2).sum(1).mean().sqrt().item(), rel=1e-6)


def test_what_a_loss_logs_itself_is_left_alone(tmp_path):
    student, teacher, data = case(count=8)
    trainer = make(
        tmp_path, student, teacher, data, **STILL,
        distillation_loss=lambda z, v: {"distill": squared_error(z, v), "divergence": z.new_tensor(5.0)},
    )  # fmt: skip
    trainer.train()
    assert entry_of(trainer)["divergence"] == 5.0


@pytest.mark.parametrize("loss", ["dkd", "dist", "nkd"])
def test_every_named_loss_has_them(tmp_path, loss):
    student, teacher = networks()
    trainer = make(tmp_path, student, teacher, loss=loss, temperature=2.0, log_analysis=True)
    trainer.train()
    for entry in trainer.state.log_history[:-1]:
        assert entry.keys() >= TEACHER | GRADIENTS
        assert entry["power_sum"] > 1.0 and entry["grad_norm_distill"] > 0.0 and -1.0 <= entry["grad_cosine"] <= 1.0


class Embedding(ConvNet):
    """Says its features by a module's name."""

    def __init__(self):
        super().__init__(norm=False)
        self.features = nn.Identity()

    def forward(self, x):
        return self.head(self.features(torch.relu(self.conv(x)).flatten(1)))


def test_a_loss_on_features_has_the_teachers_statistics_and_no_gradient(tmp_path):
    torch.manual_seed(0)
    student, teacher = Embedding(), Embedding()
    features = {"student_features": "features", "teacher_features": "features"}
    trainer = make(
        tmp_path, student, teacher, Images(count=8), loss="ce", feature_loss="itrd", feature_loss_kwargs=features,
        **STILL,
    )  # fmt: skip
    z = copy.deepcopy(student).eval()(Images(count=8).pixel_values).detach().double()
    v = teacher.eval()(Images(count=8).pixel_values).detach().double()
    trainer.train()
    entry = entry_of(trainer)
    assert entry.keys() & (TEACHER | GRADIENTS) == TEACHER | {"grad_norm_ce"}
    _, _, _, divergence, _, _ = quantities_by_hand(z, v, 1.0)
    assert entry["divergence"] == pytest.approx(divergence.mean().item(), rel=1e-5)


def test_tokens_that_are_padding_do_not_count(tmp_path):
    torch.manual_seed(0)
    student, teacher = Tagger(4).double(), Tagger(6).double()
    ids = torch.randint(0, 11, (6, 5))
    mask = torch.ones_like(ids)
    mask[1, 3:] = mask[4, 1:] = 0
    labels = torch.randint(0, 3, (6, 5)).masked_fill(mask == 0, -100)
    data = [dict(zip(("input_ids", "attention_mask", "labels"), row, strict=True)) for row in zip(ids, mask, labels,
                                                                                           strict=True)]  # fmt: skip
    real = mask.bool()
    with torch.no_grad():
        z, v = (network(ids)["logits"][real] for network in (student, teacher))
    trainer = make(tmp_path, student, teacher, data, loss="ttm", gamma=GAMMA, per_device_train_batch_size=2,
                   gradient_accumulation_steps=3, **STILL)  # fmt: skip
    trainer.train()
    entry = entry_of(trainer)
    q, p_t, _, divergence, _, _ = quantities_by_hand(z, v, GAMMA)
    assert entry["divergence"] == pytest.approx(divergence.mean().item(), rel=1e-6)
    assert entry["grad_norm_distill"] == pytest.approx(((q - p_t) ** 2).sum(1).mean().sqrt().item(), rel=1e-6)
    ce = q - torch.eye(3, dtype=q.dtype)[labels[real]]
    assert entry["grad_norm_ce"] == pytest.approx((ce**2).sum(1).mean().sqrt().item(), rel=1e-6)


class Particular(ConvNet):
    """Has a hook on what it returns, as FSDP's students have, and a checkpoint that refuses to be looked into."""

    def forward(self, x):
        features = checkpoint(
            lambda images: torch.relu(self.conv(images)), x.clone().requires_grad_(), use_reentrant=True
        )
        logits = self.head(features.flatten(1))
        logits.register_hook(lambda gradient: self.seen.append("backward"))
        return {"logits": logits}


def test_the_look_at_gradients_is_noticed_by_no_part_of_the_network(tmp_path):
    _, teacher = networks()
    student = Particular(norm=False)
    student.seen = []
    trainer = make(tmp_path, student, teacher, Images(count=16), log_analysis=True)
    trainer.train()
    assert history(trainer, "grad_cosine") and student.seen == ["backward"] * 2


def test_outputs_of_transformers(tmp_path):
    torch.manual_seed(0)
    student, teacher = vit(), vit()
    trainer = make(tmp_path, student, teacher, Images(count=8, size=32), log_analysis=True)
    trainer.train()
    assert entry_of(trainer).keys() >= TEACHER | GRADIENTS


@pytest.mark.slow
def test_a_compiled_student(tmp_path):
    student, teacher, data = case(count=8)
    runs = []
    for options in ({}, {"torch_compile": True}):
        trainer = make(tmp_path, copy.deepcopy(student), teacher, data, gamma=GAMMA, **STILL, **options)  # fmt: skip
        trainer.train()
        runs.append({key: entry_of(trainer)[key] for key in TEACHER | GRADIENTS})
    assert runs[1] == pytest.approx(runs[0], rel=1e-6)


# ---- A step that is not finite -------------------------------------------------------------------------------------


def test_a_step_that_is_skipped_is_in_none_of_the_values(tmp_path):
    student, teacher, data = case(count=16)

    def spoilt(z, v, labels):
        # The second step's distillation term is not a number; its cross-entropy is one.
        return (z - v).square().mean(-1) * (math.nan if labels.equal(data.labels[8:]) else 1.0)

    trainer = make(tmp_path, copy.deepcopy(student), teacher, data, distillation_loss=spoilt, on_nonfinite="skip",
                   **STILL)  # fmt: skip
    trainer.train()
    assert trainer._guard.skipped == 1
    _, _, first = case(count=16)
    first.pixel_values, first.labels = first.pixel_values[:8], first.labels[:8]
    alone = make(tmp_path, copy.deepcopy(student), teacher, first, distillation_loss=squared_error, **STILL)
    alone.train()
    skipping, expected = ({key: entry_of(run)[key] for key in GRADIENTS} for run in (trainer, alone))
    assert skipping == pytest.approx(expected, rel=1e-6)


# ---- The pieces ----------------------------------------------------------------------------------------------------


def test_norms_and_cosine_of_known_gradients():
    logits = term_gradients.watched(torch.zeros(3, 2, dtype=torch.float64, requires_grad=True))
    a = torch.tensor([[3.0, 4.0], [0.0, 0.0], [1.0, 0.0]], dtype=torch.float64)
    other = torch.zeros((), requires_grad=True)
    terms = {"ce": (a * logits).sum() / 3, "distill": (-2 * a * logits).sum() / 3, "feature": other * 1.0}
    count = torch.tensor(3)
    found = term_gradients.products(terms, logits, count)
    means = {name: (total / count).item() for name, total in found.items()}
    values = term_gradients.norms_and_cosine({"loss of another": 7.0, **means})
    root = math.sqrt((25 + 1) / 3)
    assert values == pytest.approx(
        {"loss of another": 7.0, "grad_norm_ce": root, "grad_norm_distill": 2 * root, "grad_cosine": -1.0}
    )
    # A term from elsewhere has no gradient here, and one of 0 has no direction.
    assert term_gradients.products({"ce": other * 1.0, "distill": torch.zeros(())}, logits, count) == {}
    still = term_gradients.products({"ce": terms["ce"], "distill": (0.0 * logits).sum()}, logits, count)
    values = term_gradients.norms_and_cosine({name: total.item() for name, total in still.items()})
    assert values.keys() == {"grad_norm_ce", "grad_norm_distill"} and values["grad_norm_distill"] == 0.0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_halves_are_squared_in_fp32(dtype):
    logits = term_gradients.watched(torch.zeros(1, 2, dtype=dtype, requires_grad=True))
    found = term_gradients.products({"ce": (300.0 * logits).float().sum()}, logits, torch.tensor(1))
    assert [total.item() for total in found.values()] == [2 * 90000.0]


def test_matching_statistics_are_the_formulas_and_finite_for_a_teacher_that_is_sure():
    torch.manual_seed(0)
    z, v = torch.randn(6, CLASSES, dtype=torch.float64), 3 * torch.randn(6, CLASSES, dtype=torch.float64)
    found = functional.matching_statistics(z.log_softmax(-1), v, GAMMA)
    _, _, u, divergence, entropy, _ = quantities_by_hand(z, v, GAMMA)
    for key, value in {"divergence": divergence, "teacher_entropy": entropy, "power_sum": u}.items():
        torch.testing.assert_close(found[key], value, rtol=1e-12, atol=1e-12)
    sure = torch.full((1, CLASSES), -torch.inf)
    sure[0, 2] = 1e4
    log_q = torch.randn(1, CLASSES).log_softmax(-1)
    found = functional.matching_statistics(log_q, sure, GAMMA)
    assert found["divergence"].item() == pytest.approx(-log_q[0, 2].item())
    assert (found["teacher_entropy"].item(), found["power_sum"].item()) == (0.0, 1.0)
    with pytest.raises(ValueError, match="`gamma` must be in"):
        functional.matching_statistics(log_q, sure, 0.0)


# ---- What tells such runs apart ------------------------------------------------------------------------------------


def test_provenance_has_the_label_smoothing_and_a_resumed_run_is_told_of_another(tmp_path, caplog):
    student, teacher = networks()
    make(tmp_path, student, teacher, label_smoothing_factor=0.5, save_strategy="epoch").train()
    saved = json.loads((tmp_path / "checkpoint-3" / "distillation.json").read_text())
    assert saved["label_smoothing_factor"] == 0.5
    other = make(tmp_path, student, teacher, num_train_epochs=2)
    with caplog.at_level("WARNING"):
        other.train(resume_from_checkpoint=True)
    assert "label_smoothing_factor was 0.5 and is 0.0" in caplog.text
