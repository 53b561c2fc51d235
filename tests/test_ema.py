"""The average of the student's weights: its values, what is evaluated and saved of it, and going on with it."""

import contextlib
import json
import logging

import pytest
import timm
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from tiny import ConvNet, Images, config, networks, vit
from torch import nn
from transformers import TrainerCallback

import hf_kd.publishing_trainer
from hf_kd import DistillationTrainer, create_student
from hf_kd.ema import RAW_WEIGHTS, WeightAverage, load_raw_weights
from hf_kd.hub import Publication


DECAY = 0.9
ITRD = {"feature_loss": "itrd", "feature_weight": 0.2}


def state_of(model):
    return {key: value.detach().clone() for key, value in model.state_dict().items()}


class Raw(TrainerCallback):
    """The weights that are trained, after each step; and the end of the run after one of them."""

    def __init__(self, stop_after=None):
        self.of_step, self.stop_after = {}, stop_after

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self.of_step[state.global_step] = state_of(model)
        control.should_training_stop = control.should_training_stop or state.global_step == self.stop_after


def make(folder, student=None, teacher=None, data=None, raw=None, trainer_class=DistillationTrainer, **options):
    own, other = networks()
    data = data or Images(count=24)
    return trainer_class(
        own if student is None else student,
        other if teacher is None else teacher,
        config(folder, **{"ema_decay": DECAY, "gamma": 0.5, "learning_rate": 0.2, **options}),
        train_dataset=data,
        eval_dataset=Images(count=19, seed=7, size=data.pixel_values.shape[-1], dtype=data.pixel_values.dtype),
        callbacks=[raw] if raw else None,
    )


def averages(of_step, decays=None):
    """The average after each step, written out: the first weights, then decay · average + (1 - decay) · weights."""
    found = {}
    for number, step in enumerate(sorted(of_step)):
        weights = of_step[step]
        if number == 0:
            average = {key: value.clone() for key, value in weights.items()}
        decay = DECAY if decays is None else decays(number)
        for key, value in weights.items():
            floats = number and value.is_floating_point()
            average[key] = decay * average[key] + (1 - decay) * value if floats else value.clone()
        found[step] = dict(average)
    return found


def assert_equal(state, expected, tolerance=0.0):
    assert state.keys() == expected.keys()
    for key, value in expected.items():
        torch.testing.assert_close(state[key], value, rtol=0, atol=tolerance, msg=key)


def differs(state, other):
    return any(not torch.equal(value, other[key]) for key, value in state.items())


# ---- Values --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("warmup", [False, True])
def test_it_is_that_of_a_plain_loop_over_the_steps(tmp_path, warmup):
    """Over steps, not over accumulated batches; with BatchNorm's statistics, its counter being copied."""
    student, teacher = networks(dtype=torch.float64)
    raw = Raw()
    trainer = make(tmp_path, student, teacher, Images(count=24, dtype=torch.float64), raw, num_train_epochs=4,
                   per_device_train_batch_size=4, gradient_accumulation_steps=2, ema_warmup=warmup)  # fmt: skip
    trainer.train()
    assert sorted(raw.of_step) == list(range(1, 13)) and trainer.average.updates == 12
    expected = averages(raw.of_step, (lambda n: min(DECAY, 1 - (1 + n) ** (-2 / 3))) if warmup else None)[12]
    assert expected["norm.num_batches_tracked"] == 24
    # The student has it when training is over.
    assert_equal(state_of(student), expected, 1e-12)
    assert differs(expected, raw.of_step[12])


class Spoiled(DistillationTrainer):
    """With losses that are not finite in its first and its fourth step."""

    def compute_loss(self, *args, **kwargs):
        loss = super().compute_loss(*args, **kwargs)
        return loss * float("nan") if self.state.global_step in (0, 3) else loss


def test_a_step_that_changed_nothing_does_not_count(tmp_path):
    student, teacher = networks(dtype=torch.float64)
    raw = Raw()
    trainer = make(tmp_path, student, teacher, Images(count=24, dtype=torch.float64), raw, Spoiled,
                   on_nonfinite="skip", num_train_epochs=2)  # fmt: skip
    trainer.train()
    assert trainer.average.updates == 4
    taken = {step: weights for step, weights in raw.of_step.items() if step not in (1, 4)}
    assert_equal(state_of(student), averages(taken)[6], 1e-12)


@pytest.mark.parametrize("skipped", [True, False])
def test_what_the_gradient_scaler_skips_does_not_count(tmp_path, monkeypatch, skipped):
    trainer = make(tmp_path)
    monkeypatch.setattr(type(trainer.accelerator), "optimizer_step_was_skipped", skipped)
    trainer.accelerator.scaler = object()
    # Steps skipped before this one are those of other steps.
    trainer._guard.in_a_row = 2
    trainer.average.on_train_begin(None, None, None, model=trainer.model)
    trainer.average.on_optimizer_step(None, None, None, model=trainer.model)
    assert trainer.average.updates == (0 if skipped else 1)


def test_tied_weights_have_one_average(tmp_path):
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.other = nn.Linear(3, 3), nn.Linear(3, 3)
            self.other.weight = self.one.weight

    student = Tied().double()
    average = WeightAverage(DECAY, warmup=False, step_was_taken=lambda: True)
    average.on_train_begin(None, None, None, model=student)
    of_step = {}
    for step in range(4):
        with torch.no_grad():
            for parameter in student.parameters():
                parameter.normal_(generator=torch.Generator().manual_seed(step))
        average.on_optimizer_step(None, None, None, model=student)
        of_step[step] = state_of(student)
    average.save_raw_weights(student, tmp_path)
    average.end(student)
    assert_equal(state_of(student), averages(of_step)[3], 1e-12)
    assert load_raw_weights(student, tmp_path) == 4
    assert_equal(state_of(student), of_step[3])


# ---- Evaluated, saved, published -----------------------------------------------------------------------------------


def test_it_is_evaluated_and_training_goes_on_without_it(tmp_path):
    runs = {}
    for decay in (DECAY, None):
        raw = Raw()
        trainer = make(tmp_path / str(decay), raw=raw, ema_decay=decay, num_train_epochs=2, momentum=0.9,
                       eval_strategy="steps", eval_steps=2, save_strategy="steps", save_steps=2)  # fmt: skip
        trainer.train()
        runs[decay] = trainer, raw.of_step
    trainer, of_step = runs[DECAY]
    # The weights that are trained are the ones of a run without an average, in each step.
    for step, weights in runs[None][1].items():
        assert_equal(of_step[step], weights)
    expected = averages(of_step)
    measured = make(tmp_path / "measured", ema_decay=None)
    logged = [entry for entry in trainer.state.log_history if "eval_loss" in entry]
    assert [entry["step"] for entry in logged] == [2, 4, 6]
    for entry in logged:
        measured.model.load_state_dict(expected[entry["step"]])
        metrics = measured.evaluate()
        for name in ("eval_loss", "eval_nll", "eval_top1", "eval_ece"):
            assert entry[name] == pytest.approx(metrics[name], rel=1e-4), name
        measured.model.load_state_dict(of_step[entry["step"]])
        assert entry["eval_nll"] != pytest.approx(measured.evaluate()["eval_nll"], rel=1e-2)
    assert trainer.evaluate()["eval_nll"] == logged[-1]["eval_nll"]


def test_the_best_is_chosen_by_it_and_is_one(tmp_path):
    raw = Raw()
    # The worst of them: the first.
    trainer = make(tmp_path, raw=raw, num_train_epochs=3, eval_strategy="epoch", save_strategy="epoch",
                   load_best_model_at_end=True, metric_for_best_model="nll", greater_is_better=True)  # fmt: skip
    trainer.train()
    evaluated = {entry["step"]: entry["eval_nll"] for entry in trainer.state.log_history if "eval_nll" in entry}
    best = max(evaluated, key=evaluated.get)
    assert best != 9 and trainer.state.best_metric == evaluated[best]
    assert_equal(state_of(trainer.model), averages(raw.of_step)[best], 1e-6)
    assert_equal(state_of(trainer.model), load_file(tmp_path / f"checkpoint-{best}" / "model.safetensors"))
    trainer.save_model()
    assert_equal(load_file(tmp_path / "model.safetensors"), state_of(trainer.model))


def test_a_checkpoint_holds_it_as_the_student_and_the_raw_weights_beside(tmp_path):
    """Of a compiled timm network: names are those of timm; no teacher and no parameters of a feature loss."""

    class SaveInBetween(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 2:
                trainer.save_model(tmp_path / "between")

    torch.manual_seed(0)
    student, twin = (create_student("test_resnet", num_classes=5, img_size=32) for _ in range(2))
    raw = Raw()
    trainer = make(tmp_path, torch.compile(student, backend="eager"), twin, Images(count=24, size=32), raw,
                   save_strategy="epoch", **ITRD)  # fmt: skip
    trainer.add_callback(SaveInBetween())
    # The wrapper is what matters here: nothing need be traced.
    with torch.compiler.set_stance("force_eager"):
        trainer.train()
    of_step = {step: {key.replace("_orig_mod.", ""): value for key, value in weights.items()}
               for step, weights in raw.of_step.items()}  # fmt: skip
    expected = averages(of_step)
    bare = {key.replace("timm_model.", ""): value for key, value in twin.state_dict().items()}
    for folder, step in (("between", 2), ("checkpoint-3", 3)):
        network = timm.create_model(f"local-dir:{tmp_path / folder}", pretrained=True)
        assert network.state_dict().keys() == bare.keys()
        for key, value in expected[step].items():
            saved = network.state_dict()[key.replace("timm_model.", "")]
            torch.testing.assert_close(saved, value, rtol=0, atol=1e-5, msg=key)
    with safe_open(tmp_path / "checkpoint-3" / RAW_WEIGHTS, framework="pt") as file:
        assert_equal({key: file.get_tensor(key) for key in file.keys()}, of_step[3])  # noqa: SIM118
        assert file.metadata()["updates"] == "3"
    assert not (tmp_path / "between" / RAW_WEIGHTS).exists()


def test_provenance_and_card_say_it(tmp_path):
    trainer = make(tmp_path, save_strategy="epoch", ema_warmup=True, eval_strategy="epoch", hub_license="mit",
                   load_best_model_at_end=True)  # fmt: skip
    trainer.train()
    provenance = json.loads((tmp_path / "checkpoint-3" / "distillation.json").read_text())
    assert [provenance[key] for key in ("averaged_weights", "ema_decay", "ema_warmup")] == [True, DECAY, True]
    trainer.create_model_card()
    line = next(line for line in (tmp_path / "README.md").read_text().splitlines() if "ema_decay" in line)
    assert (
        "exponential moving average over the steps (ema_decay 0.9, with warm-up), of step 3, the best by loss" in line
    )
    plain = make(tmp_path / "plain", ema_decay=None, hub_license="mit")
    plain.train()
    assert [plain.provenance()[key] for key in ("averaged_weights", "ema_decay", "ema_warmup")] == [False, None, None]
    plain.create_model_card()
    assert "moving average" not in (tmp_path / "plain" / "README.md").read_text()


def test_pushes_during_training_are_of_it(tmp_path, monkeypatch):
    pushed = []

    def publish(folder, repo_id, **options):
        pushed.append(load_file(folder / "model.safetensors"))
        assert not (folder / RAW_WEIGHTS).exists()
        return Publication(repo_id, "", {}, "")

    monkeypatch.setattr(hf_kd.publishing_trainer, "publish_student", publish)
    monkeypatch.setattr(hf_kd.publishing_trainer, "draw_curves", lambda *args: None)
    monkeypatch.setattr(hf_kd.publishing_trainer, "make_repository", lambda repo_id, **options: repo_id)
    raw = Raw()
    trainer = make(tmp_path, raw=raw, num_train_epochs=2, save_strategy="epoch", push_to_hub=True,
                   hub_model_id="ada/owl", hub_license="mit", hub_always_push=True)  # fmt: skip
    trainer.train()
    trainer.push_to_hub()
    assert trainer.pushes.failures == [] and len(pushed) == 3
    expected = averages(raw.of_step)
    for weights, step in zip(pushed, (3, 6, 6), strict=True):
        assert_equal(weights, expected[step], 1e-6)


# ---- Going on ------------------------------------------------------------------------------------------------------


def student_of(kind):
    torch.manual_seed(3)
    return ConvNet(dropout=0.2) if kind == "ConvNet" else vit()


@pytest.mark.parametrize("kind", ["ConvNet", "vit"])
def test_going_on_in_the_middle_of_an_epoch_is_bit_identical(tmp_path, kind):
    data = Images(count=24, size=8 if kind == "ConvNet" else 32)
    teacher = networks()[1] if kind == "ConvNet" else vit()
    options = {"save_strategy": "steps", "save_steps": 1, "num_train_epochs": 2, "momentum": 0.9, "ema_warmup": True,
               "on_nonfinite": "skip", "trainer_class": Spoiled}  # fmt: skip
    results = []
    for stop in (None, 4):
        raw, folder = Raw(stop), tmp_path / str(stop)
        trainer = make(folder, student_of(kind), teacher, data, raw, **options)
        trainer.train()
        if stop:
            raw = Raw()
            trainer = make(folder, student_of(kind), teacher, data, raw, **options)
            trainer.train(resume_from_checkpoint=True)
            assert sorted(raw.of_step) == [5, 6]
        assert trainer.average.updates == 4
        saved = [load_file(folder / "checkpoint-6" / name) for name in ("model.safetensors", RAW_WEIGHTS)]
        results.append([state_of(trainer.model), raw.of_step[5], raw.of_step[6], *saved])
    for whole, resumed in zip(*results, strict=True):
        assert_equal(resumed, whole)


def test_without_the_raw_weights_a_checkpoint_is_refused_or_passed_over(tmp_path):
    options = {"save_strategy": "steps", "save_steps": 1}
    make(tmp_path / "plain", ema_decay=None, **options).train()
    with pytest.raises(
        ValueError, match=r"checkpoint-3 has no raw_weights.safetensors, .* resume without `ema_decay`"
    ):
        make(tmp_path / "plain", num_train_epochs=2, **options).train(resume_from_checkpoint=True)
    raw, last = Raw(), tmp_path / "average" / "checkpoint-3"
    make(tmp_path / "average", **options).train()
    (last / RAW_WEIGHTS).unlink()
    with pytest.raises(ValueError, match=r"checkpoint-3 is damaged: its raw_weights.safetensors is missing"):
        make(tmp_path / "average", **options).train(resume_from_checkpoint=str(last))
    make(tmp_path / "average", raw=raw, **options).train(resume_from_checkpoint=True)
    assert list(raw.of_step) == [3]


def test_going_on_without_it_takes_the_raw_weights(tmp_path, caplog):
    options = {"save_strategy": "steps", "save_steps": 1, "momentum": 0.9}
    raw, plain, whole = Raw(2), Raw(), Raw()
    make(tmp_path, raw=raw, **options).train()
    with caplog.at_level(logging.WARNING):
        make(tmp_path, raw=plain, ema_decay=None, **options).train(resume_from_checkpoint=True)
    assert "ema_decay was 0.9 and is None" in caplog.text
    make(tmp_path / "whole", raw=whole, ema_decay=None, **options).train()
    assert_equal(plain.of_step[3], whole.of_step[3])


def test_raw_weights_of_another_network_are_an_error(tmp_path):
    student, average = ConvNet(), WeightAverage(DECAY, warmup=False, step_was_taken=lambda: True)
    average.save_raw_weights(ConvNet(width=7), tmp_path)
    average.go_on_from(tmp_path)
    with pytest.raises(ValueError, match=r"raw_weights.safetensors holds the weights of another network .* 7 tensors"):
        average.on_train_begin(None, None, None, model=student)


def test_raw_weights_have_the_names_of_a_network_of_which_nothing_is_compiled(tmp_path):
    student, twin = ConvNet(), ConvNet()
    saved = state_of(student)
    student.conv = torch.compile(student.conv, backend="eager")
    WeightAverage(DECAY, warmup=False, step_was_taken=lambda: True).save_raw_weights(student, tmp_path)
    assert load_raw_weights(twin, tmp_path) == 0
    assert_equal(state_of(twin), saved)


def test_the_raw_weights_come_back_whatever_happens():
    student, average = ConvNet(), WeightAverage(DECAY, warmup=False, step_was_taken=lambda: True)
    average.on_train_begin(None, None, None, model=student)
    begun = state_of(student)
    nn.init.ones_(student.head.weight)
    trained = state_of(student)
    with contextlib.suppress(KeyboardInterrupt), average.applied(student):
        assert_equal(state_of(student), begun)
        raise KeyboardInterrupt
    assert_equal(state_of(student), trained)


# ---- Refusals ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("engine", ["FSDP", "DeepSpeed"])
def test_it_does_not_go_with_engines_that_take_weights_apart(tmp_path, engine):
    class Spread(DistillationTrainer):
        def create_accelerator_and_postprocess(self):
            super().create_accelerator_and_postprocess()
            setattr(self, f"is_{engine.lower()}_enabled", True)

    with pytest.raises(ValueError, match=f"`ema_decay` does not go with {engine}, .* use a launch configuration"):
        make(tmp_path, trainer_class=Spread)
