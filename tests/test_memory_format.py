"""Channels last: a layout in memory for both networks, and nothing else."""

import copy
import json

import pytest
import timm
import torch
from safetensors.torch import load_file
from tiny import CLASSES, ConvNet, Images, Tagger, config, networks
from torch import nn
from transformers import ResNetConfig, ResNetForImageClassification

from hf_kd import DistillationTrainer, create_student, memory_format
from hf_kd.memory_format import channels_last_is_faster, has_convolutions, in_channels_last, weights_in_channels_last


class Watched(ConvNet):
    """Remembers the images it got, and whether they were channels last."""

    def __init__(self, **options):
        super().__init__(**options)
        self.seen = []

    def forward(self, x):
        self.seen.append((is_channels_last(x), x.data_ptr()))
        return super().forward(x)


def is_channels_last(tensor):
    return tensor.is_contiguous(memory_format=torch.channels_last) and not tensor.is_contiguous()


def make(folder, student=None, teacher=None, trainer_class=DistillationTrainer, size=8, **options):
    own, own_teacher = networks(dropout=0.3)
    return trainer_class(
        own if student is None else student,
        own_teacher if teacher is None else teacher,
        config(folder, **options),
        train_dataset=Images(count=24, size=size),
        eval_dataset=Images(count=12, seed=1, size=size),
    )


def state_of(trainer):
    return {key: value.clone() for key, value in trainer.model.state_dict().items()}


def assert_equal(state, expected, tolerance=0.0):
    assert state.keys() == expected.keys()
    for key, value in expected.items():
        torch.testing.assert_close(state[key], value, rtol=0, atol=tolerance, msg=key)


# ---- Tensors -------------------------------------------------------------------------------------------------------


def test_weights_change_their_layout_alone():
    network = timm.create_model("test_resnet", num_classes=CLASSES)
    before, parameters = copy.deepcopy(network.state_dict()), dict(network.named_parameters())
    weights_in_channels_last(network)
    assert_equal(network.state_dict(), before)
    assert all(parameters[name] is parameter for name, parameter in network.named_parameters())
    kernels = [m.weight for m in network.modules() if isinstance(m, nn.Conv2d) and m.kernel_size != (1, 1)]
    assert kernels and all(map(is_channels_last, kernels))


def test_only_images_are_turned():
    images, tokens, mask = torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4), "text"
    turned = in_channels_last(images)
    assert is_channels_last(turned) and torch.equal(turned, images)
    assert in_channels_last(turned) is turned
    assert in_channels_last(tokens) is tokens and in_channels_last(mask) is mask
    assert has_convolutions(ConvNet()) and not has_convolutions(Tagger(4))


# ---- Training ------------------------------------------------------------------------------------------------------


def test_a_batch_is_turned_once_for_both_networks(tmp_path):
    student, teacher = Watched(), Watched(width=8)
    trainer = make(tmp_path, student, teacher, channels_last=True)
    trainer.train()
    assert len(student.seen) == 3 and student.seen == teacher.seen
    assert all(turned for turned, _ in student.seen)
    assert is_channels_last(student.conv.weight) and is_channels_last(teacher.conv.weight)
    trainer.evaluate()
    assert all(turned for turned, _ in student.seen)


def test_mixed_images_stay_turned(tmp_path):
    student, teacher = Watched(), Watched(width=8)
    make(tmp_path, student, teacher, channels_last=True, mixup_alpha=0.8, cutmix_alpha=1.0).train()
    assert len(student.seen) == 3 and student.seen == teacher.seen
    assert all(turned for turned, _ in student.seen)


@pytest.mark.parametrize("kind", ["own", "create_student", "bare timm", "transformers"])
def test_the_same_training_and_the_same_files(kind, tmp_path):
    build = {
        "own": lambda: ConvNet(),
        "create_student": lambda: create_student("test_resnet", num_classes=CLASSES, img_size=32),
        "bare timm": lambda: timm.create_model("test_resnet", num_classes=CLASSES),
        "transformers": lambda: ResNetForImageClassification(
            ResNetConfig(embedding_size=8, hidden_sizes=[8], depths=[1], num_labels=CLASSES)
        ),
    }[kind]
    states, files = [], []
    for channels_last in (False, True):
        torch.manual_seed(1)
        trainer = make(
            tmp_path / str(channels_last), build(), lambda **inputs: torch.zeros(len(inputs["labels"]), CLASSES),
            size=8 if kind == "own" else 32, channels_last=channels_last, save_strategy="epoch",
        )  # fmt: skip
        trainer.train()
        states.append(state_of(trainer))
        files.append(load_file(tmp_path / str(channels_last) / "checkpoint-3" / "model.safetensors"))
    assert_equal(states[1], states[0], tolerance=1e-5)
    assert_equal(files[1], files[0], tolerance=1e-5)
    assert all(value.is_contiguous() for value in files[1].values())


@pytest.mark.parametrize("ema", [None, 0.8])
def test_going_on_is_bit_identical(ema, tmp_path):
    options = {"channels_last": True, "ema_decay": ema, "num_train_epochs": 2, "save_strategy": "steps",
               "save_steps": 2, "teacher_fold_batchnorm": True}  # fmt: skip
    whole = make(tmp_path / "whole", **options)
    whole.train()
    again = make(tmp_path / "again", **options)
    again.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    assert again.state.global_step == 6 and again._initial_global_step == 2
    assert_equal(state_of(again), state_of(whole))
    assert is_channels_last(again.model.conv.weight)


def test_it_goes_with_a_compiled_student(tmp_path):
    """Training, evaluation, a checkpoint with clean keys, and going on from it."""
    options = {"save_strategy": "epoch", "eval_strategy": "epoch", "num_train_epochs": 2}
    plain = make(tmp_path / "plain", **options)
    plain.train()
    options |= {"channels_last": True, "torch_compile": True, "torch_compile_backend": "aot_eager"}
    compiled = make(tmp_path / "compiled", **options)
    compiled.train()
    assert_equal(state_of(compiled), state_of(plain), tolerance=1e-5)
    assert compiled.evaluate()["eval_nll"] == pytest.approx(plain.evaluate()["eval_nll"], abs=1e-5)
    first = tmp_path / "compiled" / "checkpoint-3"
    assert load_file(first / "model.safetensors").keys() == ConvNet().state_dict().keys()
    again = make(tmp_path / "again", **options)
    again.train(resume_from_checkpoint=str(first))
    assert again.state.global_step == 6
    assert_equal(state_of(again), state_of(compiled))


# ---- Measured ------------------------------------------------------------------------------------------------------


@pytest.fixture
def measured(monkeypatch):
    """Have channels last take a given share of the time; None says that it must not be measured."""

    def as_if(ratio):
        def ratios(ways, device):
            assert ratio is not None
            assert [way() for way in ways.values()] == [None, None]
            return dict(zip(ways, (1.0, ratio), strict=True))

        monkeypatch.setattr(memory_format, "ratios", ratios)

    return as_if


@pytest.mark.parametrize(("ratio", "taken"), [(0.8, True), (0.99, False), (1.3, False)])
def test_auto_takes_what_is_faster_says_so_and_keeps_it(ratio, taken, measured, tmp_path, caplog):
    measured(ratio)
    options = {"save_strategy": "steps", "save_steps": 1}
    plain = make(tmp_path / "plain", channels_last=taken, **options)
    plain.train()
    trainer = make(tmp_path / "auto", channels_last="auto", **options)
    trainer.train()
    # Measuring has left weights, statistics and the random state as they were.
    assert_equal(state_of(trainer), state_of(plain))
    chosen = "taken" if taken else "left out"
    assert f"A step of the student takes {ratio:.2f} of the time in channels last, which is {chosen}." in caplog.text
    assert is_channels_last(trainer.model.conv.weight) is taken
    checkpoint = tmp_path / "auto" / "checkpoint-1"
    assert json.loads((checkpoint / "distillation.json").read_text())["channels_last"] is taken
    measured(None)
    again = make(tmp_path / "again", channels_last="auto", **options)
    again.train(resume_from_checkpoint=str(checkpoint))
    assert_equal(state_of(again), state_of(plain))


def test_it_is_measured_without_the_other_processes(measured, caplog):
    """SyncBatchNorm in training would wait for them; on the CPU it refuses to run, which would be said."""
    measured(0.8)
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.SyncBatchNorm(4), nn.Flatten(), nn.Linear(144, CLASSES))
    batch = {"x": torch.randn(2, 3, 8, 8)}
    assert channels_last_is_faster(network, batch, lambda model, inputs: model(inputs["x"]), torch.device("cpu"))
    assert "cannot be run" not in caplog.text


def test_what_cannot_be_copied_stays_and_says_so(caplog):
    network = ConvNet()
    network.lock = (item for item in ())
    assert not channels_last_is_faster(network, {}, None, torch.device("cpu"))
    assert "Channels last is left out: a copy of the student cannot be run (cannot pickle" in caplog.text
    assert not channels_last_is_faster(Tagger(4), {}, None, torch.device("cpu"))


# ---- Configuration -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "value"), [(True, True), (False, False), ("true", True), ("False", False), ("auto", "auto")]
)
def test_it_can_be_given_on_a_command_line(given, value, tmp_path):
    assert config(tmp_path, channels_last=given).channels_last == value


def test_refusals(tmp_path):
    with pytest.raises(ValueError, match="`channels_last` must be true, false or \"auto\", got 'last'"):
        config(tmp_path, channels_last="last")

    class Spread(DistillationTrainer):
        def create_accelerator_and_postprocess(self):
            super().create_accelerator_and_postprocess()
            self.is_fsdp_enabled = True

    with pytest.raises(ValueError, match="`channels_last` does not go with FSDP, .* use a launch configuration"):
        make(tmp_path, trainer_class=Spread, channels_last="auto")
