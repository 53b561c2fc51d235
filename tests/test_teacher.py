"""Loading teachers from everywhere, and what holds of every one of them."""

import json
import os
import time
from dataclasses import replace

import huggingface_hub.constants
import numpy as np
import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from timm.models import save_for_hf
from tiny import vit
from torch import nn
from torch.nn import functional as F
from transformers import (
    TimmWrapperConfig,
    TimmWrapperForImageClassification,
    ViTImageProcessor,
    ViTModel,
)

from hf_kd import Teacher, create_student
from hf_kd.networks import Preprocessing
from hf_kd.student import save_student
from hf_kd.teacher import Ensemble


CLASSES = 4
IMAGES = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
SMALL = Preprocessing((0.5, 0.5, 0.5), (0.5, 0.5, 0.5), (3, 32, 32), "bilinear")


def resnet(classes=CLASSES, **options):
    """A timm network whose BatchNorm statistics are not those of its initialisation."""
    network = timm.create_model("test_resnet", num_classes=classes, **options)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 2.0)
    return network.eval()


@torch.no_grad()
def answer(network, images=IMAGES):
    output = network(images)
    return output if isinstance(output, torch.Tensor) else output.logits


def assert_is(teacher, network):
    """The teacher gives the network's own logits, and not the same for every image."""
    logits = teacher(IMAGES)
    torch.testing.assert_close(logits, answer(network), rtol=0, atol=1e-6)
    assert (logits[0] - logits[1]).abs().max() > 1e-4


class Constant(nn.Module):
    """Gives the logits it was made with."""

    def __init__(self, logits, classes=None):
        super().__init__()
        self.logits = nn.Parameter(torch.as_tensor(logits), requires_grad=True)
        self.num_classes = classes

    def forward(self, x):
        return self.logits.expand(len(x), -1)


class Gauge(nn.Module):
    """Gives the mean of each channel of the images it gets, and keeps them."""

    num_classes = 3

    def forward(self, x):
        self.seen = x
        return x.mean((2, 3))


# ---- From a name with a checkpoint ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "wrap",
    [
        lambda weights: weights,
        lambda weights: {"model": weights, "epoch": 3},
        lambda weights: {"state_dict": weights, "best": 0.5},
        lambda weights: {"state_dict": {f"module.{key}": value for key, value in weights.items()}},
        lambda weights: {f"module.{key}": value for key, value in weights.items()},
    ],
    ids=["top", "model", "state_dict", "state_dict-module", "module"],
)
def test_pth_checkpoints(tmp_path, wrap):
    network = resnet()
    torch.save(wrap(network.state_dict()), tmp_path / "weights.pth")
    teacher = Teacher.from_pretrained("test_resnet", checkpoint=tmp_path / "weights.pth", num_classes=CLASSES)
    assert teacher.num_classes == CLASSES
    assert teacher.name == "test_resnet"
    assert_is(teacher, network)


def test_safetensors_checkpoint_with_a_tagged_name_and_options(tmp_path):
    network = resnet(in_chans=1)
    save_file(network.state_dict(), tmp_path / "weights.safetensors")
    teacher = Teacher.from_pretrained(
        "test_resnet.r160_in1k", checkpoint=str(tmp_path / "weights.safetensors"), num_classes=CLASSES, in_chans=1
    )
    images = IMAGES[:, :1]
    torch.testing.assert_close(teacher(images), answer(network, images), rtol=0, atol=1e-6)
    assert len(teacher.preprocessing.mean) == 1


def test_checkpoint_for_the_architecture_of_a_folder(tmp_path):
    save_student(resnet(), tmp_path / "folder")
    other = resnet()
    torch.save(other.state_dict(), tmp_path / "other.pth")
    assert_is(Teacher.from_pretrained(tmp_path / "folder", checkpoint=tmp_path / "other.pth"), other)


class Harmful:
    """A pickle that leaves a mark if its code runs."""

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return os.mkdir, (self.mark,)


@pytest.mark.parametrize("kind", ["object", "module"])
def test_a_checkpoint_that_needs_code_is_refused(tmp_path, kind):
    mark = tmp_path / "code_ran"
    content = resnet() if kind == "module" else {"state_dict": resnet().state_dict(), "extra": Harmful(str(mark))}
    torch.save(content, tmp_path / "bad.pth")
    with pytest.raises(RuntimeError, match=r"bad.pth could not be read as plain weights .*safetensors") as caught:
        Teacher.from_pretrained("test_resnet", checkpoint=tmp_path / "bad.pth", num_classes=CLASSES)
    assert "\n" not in str(caught.value)
    assert not mark.exists()
    if kind == "object":
        # The file is what it is meant to be: read carelessly, it would have run.
        torch.load(tmp_path / "bad.pth", weights_only=False)
        assert mark.exists()


@pytest.mark.parametrize("style", ["timm", "transformers"])
def test_a_folder_whose_weights_need_code_is_refused(tmp_path, style):
    mark = tmp_path / "code_ran"
    folder = tmp_path / "folder"
    if style == "timm":
        save_student(resnet(), folder)
    else:
        vit(CLASSES).save_pretrained(folder)
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save({**weights, "extra": Harmful(str(mark))}, folder / "pytorch_model.bin")
    with pytest.raises(RuntimeError, match="could not be loaded"):
        Teacher.from_pretrained(folder)
    assert not mark.exists()


def test_a_file_that_is_no_checkpoint(tmp_path):
    for name in ("text.pth", "text.safetensors"):
        (tmp_path / name).write_text("not weights")
        with pytest.raises(RuntimeError, match=f"{name} could not be read as plain weights"):
            Teacher.from_pretrained("test_resnet", checkpoint=tmp_path / name)


# ---- From a folder or a file ---------------------------------------------------------------------------------------


def test_folder_saved_by_timm(tmp_path):
    network = resnet()
    save_for_hf(network, tmp_path, model_args={"num_classes": CLASSES})
    teacher = Teacher.from_pretrained(tmp_path, num_classes=CLASSES)
    assert_is(teacher, network)
    assert_is(Teacher.from_pretrained(f"local-dir:{tmp_path}"), network)
    assert teacher.preprocessing == Preprocessing.of(network)


def test_folder_saved_as_a_student(tmp_path):
    student = create_student("test_vit", num_classes=CLASSES, img_size=32, mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6))
    student.save_pretrained(tmp_path)
    teacher = Teacher.from_pretrained(str(tmp_path))
    assert_is(teacher, student.eval())
    assert teacher.preprocessing == Preprocessing.of(student)
    assert teacher.preprocessing.mean == (0.1, 0.2, 0.3)


@pytest.mark.parametrize("loaded_first", [False, True])
def test_folder_of_a_timm_network_as_transformers_saves_it(tmp_path, loaded_first):
    # Prefixed keys and no pretrained_cfg, or `model_args: null`: timm opens neither.
    wrapper = TimmWrapperForImageClassification(TimmWrapperConfig(architecture="test_resnet", num_labels=CLASSES))
    wrapper.timm_model = resnet()
    if loaded_first:
        save_student(resnet(), tmp_path / "first")
        wrapper = TimmWrapperForImageClassification.from_pretrained(tmp_path / "first")
    wrapper.save_pretrained(tmp_path / "folder")
    assert_is(Teacher.from_pretrained(tmp_path / "folder"), wrapper.eval())


@pytest.mark.parametrize("processor", [True, False])
def test_folder_saved_by_transformers(tmp_path, processor):
    network = vit(CLASSES)
    network.save_pretrained(tmp_path)
    if processor:
        size = {"height": 32, "width": 32}
        ViTImageProcessor(size=size, image_mean=[0.1, 0.2, 0.3], image_std=[0.4, 0.5, 0.6]).save_pretrained(tmp_path)
    teacher = Teacher.from_pretrained(tmp_path)
    assert teacher.num_classes == CLASSES
    assert_is(teacher, network)
    expected = Preprocessing((0.1, 0.2, 0.3), (0.4, 0.5, 0.6), (3, 32, 32), "bilinear")
    assert teacher.preprocessing == (expected if processor else None)
    # What the caller says goes before what the folder says.
    assert Teacher.from_pretrained(tmp_path, preprocessing=SMALL).preprocessing == SMALL


def test_weights_file_in_a_folder(tmp_path):
    network, other = resnet(), resnet()
    save_student(network, tmp_path)
    assert_is(Teacher.from_pretrained(tmp_path / "model.safetensors"), network)
    torch.save(other.state_dict(), tmp_path / "epoch-3.pth")
    assert_is(Teacher.from_pretrained(tmp_path / "epoch-3.pth"), other)


def test_weights_file_without_a_network(tmp_path):
    save_file(resnet().state_dict(), tmp_path / "weights.safetensors")
    with pytest.raises(ValueError, match=r"no config.json beside it .*architecture as the name"):
        Teacher.from_pretrained(tmp_path / "weights.safetensors")
    vit(CLASSES).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"no config.json beside it in which timm finds"):
        Teacher.from_pretrained(tmp_path / "weights.safetensors")


def test_folder_without_weights(tmp_path):
    save_student(resnet(), tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(RuntimeError, match=r"could not be loaded .*The folder must be as") as caught:
        Teacher.from_pretrained(tmp_path)
    assert "network" not in str(caught.value)


@pytest.mark.parametrize("name", ["./gone", "/gone/teacher", "~/gone", "runs/gone/checkpoint-5"])
def test_a_path_that_does_not_exist(name):
    with pytest.raises(ValueError, match=f"The teacher {name} does not exist"):
        Teacher.from_pretrained(name)


def test_class_count_of_what_was_loaded(tmp_path):
    save_student(resnet(), tmp_path)
    with pytest.raises(ValueError, match=r"has 4 classes, not the 10 asked for.*class_map"):
        Teacher.from_pretrained(tmp_path, num_classes=10)


def test_a_teacher_never_gets_an_untrained_head(tmp_path):
    save_student(resnet(), tmp_path / "timm")
    config = json.loads((tmp_path / "timm" / "config.json").read_text())
    config["model_args"] = {"num_classes": 10}
    (tmp_path / "timm" / "config.json").write_text(json.dumps(config))
    # timm itself drops the head without a word.
    assert timm.create_model(f"local-dir:{tmp_path / 'timm'}", pretrained=True).num_classes == 10
    with pytest.raises(ValueError, match=r"for 4 classes and the network has 10, so its head would be untrained"):
        Teacher.from_pretrained(tmp_path / "timm")

    ViTModel(vit(CLASSES).config).save_pretrained(tmp_path / "backbone")
    with pytest.raises(ValueError, match=r"lack 2 tensors of its ViTFor.*classifier.bias"):
        Teacher.from_pretrained(tmp_path / "backbone")


def test_timm_options_for_a_transformers_folder(tmp_path):
    vit(CLASSES).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"in_chans are arguments of timm.create_model.*transformers"):
        Teacher.from_pretrained(tmp_path, in_chans=1)


# ---- Names ---------------------------------------------------------------------------------------------------------


def test_architecture_without_weights():
    architecture = "resnet14t"
    without = next(name for name in timm.list_models("vit_*") if not timm.list_pretrained(f"{name}.*"))
    assert timm.list_pretrained(f"{architecture}.*")
    with pytest.raises(ValueError, match=f"no weights for '{without}', and an untrained network is no teacher"):
        Teacher.from_pretrained(without)


@pytest.fixture
def sleepless(monkeypatch):
    """Sleeps are counted instead of slept."""
    slept = []
    monkeypatch.setattr(time, "sleep", slept.append)
    return slept


@pytest.mark.parametrize("name", ["resnet18.a1_in1k", "hf-hub:owner/name", "owner/name"])
def test_without_a_network_a_name_gives_one_sentence(name, block_network, sleepless):
    # Not offline by choice: huggingface_hub retries first (five times a file, 1 to 8 s apart).
    with pytest.raises(RuntimeError, match=f"The weights of {name} could not be loaded") as caught:
        Teacher.from_pretrained(name)
    assert block_network
    block_network.clear()
    assert sum(sleepless) < 60
    message = str(caught.value)
    assert "\n" not in message
    assert message.endswith("or a weights file as `checkpoint` (config: teacher_checkpoint).")


@pytest.mark.parametrize("name", ["resnet18.a1_in1k", "hf-hub:owner/name", "owner/name"])
def test_offline_mode_fails_at_once(name, block_network, sleepless, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    started = time.monotonic()
    with pytest.raises(RuntimeError, match=f"The weights of {name} could not be loaded"):
        Teacher.from_pretrained(name)
    assert not sleepless
    assert not block_network
    assert time.monotonic() - started < 10


# ---- Whatever a trainer accepts ------------------------------------------------------------------------------------


def test_wrap_networks_and_names(tmp_path):
    network = resnet()
    assert Teacher.wrap(network).model is network
    assert Teacher.wrap(network).name == "test_resnet"
    assert_is(Teacher.wrap(network), network)
    native = vit(CLASSES)
    teacher = Teacher.wrap(native)
    assert torch.equal(teacher(pixel_values=IMAGES, labels=torch.tensor([0, 1])), answer(native))
    save_student(network, tmp_path)
    assert_is(Teacher.wrap(str(tmp_path), num_classes=CLASSES, class_map=None), network)
    assert_is(Teacher.wrap(tmp_path), network)


def test_wrap_keeps_a_teacher():
    teacher = Teacher(resnet())
    assert Teacher.wrap(teacher, class_map=None) is teacher
    with pytest.raises(ValueError, match=r"built already, so class_map cannot be applied"):
        Teacher.wrap(teacher, class_map=[0, 1])


def test_wrap_refuses_options_of_names_for_modules():
    with pytest.raises(
        ValueError, match=r"checkpoint, num_classes belong to a teacher given by name, not to a ResNet"
    ):
        Teacher.wrap(resnet(), num_classes=4, checkpoint="a.pth")


@pytest.mark.parametrize("thing", [3, None, {"logits": 1}])
def test_something_else_is_no_teacher(thing):
    with pytest.raises(TypeError, match=f"a torch module or a callable .* got {type(thing).__name__}"):
        Teacher(thing)


def test_a_callable_gets_everything():
    seen = {}

    def precomputed(**inputs):
        seen.update(inputs)
        return torch.ones(2, 3, dtype=torch.float16)

    teacher = Teacher.wrap(precomputed)
    teacher.match(3, SMALL)
    assert teacher.name == "precomputed"
    assert teacher.num_classes is None
    inputs = {"pixel_values": IMAGES, "labels": torch.tensor([0, 1]), "index": torch.tensor([5, 6])}
    logits = teacher(**inputs)
    assert seen.keys() == inputs.keys()
    assert all(seen[key] is inputs[key] for key in inputs)
    assert logits.dtype == torch.float32


def test_an_ensemble_is_the_mean_of_probabilities():
    first, second = torch.tensor([9.0, 0.0, -1.0]), torch.tensor([0.0, 3.0, float("-inf")])
    teacher = Teacher.wrap([Constant(first, 3), lambda x: second.expand(len(x), -1)])
    assert isinstance(teacher, Ensemble)
    assert teacher.num_classes == 3
    expected = (first.softmax(-1) + second.softmax(-1)) / 2
    torch.testing.assert_close(teacher(IMAGES).exp(), expected.expand(2, -1))
    # Never the mean of the logits.
    assert (((first + second) / 2).softmax(-1) - expected).abs().max() > 0.1


def test_an_ensemble_of_named_options_and_preprocessing():
    grey = Preprocessing((0.0, 0.0, 0.0), (0.5, 0.5, 0.5), (3, 32, 32))
    members = [Teacher(Gauge(), preprocessing=SMALL), Teacher(Gauge(), preprocessing=grey)]
    teacher = Teacher.wrap(members)
    teacher.match(3, SMALL)
    teacher(IMAGES)
    torch.testing.assert_close(members[0].model.seen, IMAGES)
    torch.testing.assert_close(members[1].model.seen, IMAGES + 1.0)


def test_an_ensemble_shares_one_class_map():
    teacher = Teacher.wrap([Constant([2.0, 0.0, -1.0], 3), Constant([0.0, 3.0, 1.0], 3)], class_map=[2, 0])
    assert teacher.num_classes == 2
    expected = (torch.tensor([-1.0, 2.0]).softmax(-1) + torch.tensor([1.0, 0.0]).softmax(-1)) / 2
    torch.testing.assert_close(teacher(IMAGES).exp(), expected.expand(2, -1))


def test_ensembles_that_do_not_fit_together():
    with pytest.raises(ValueError, match=r"must give the same classes, got .*: 4, .*: 5"):
        Teacher.wrap([resnet(4), resnet(5)])
    with pytest.raises(ValueError, match="at least one teacher, got an empty list"):
        Teacher.wrap([])


# ---- Frozen --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ensemble", [False, True])
def test_always_in_eval_mode_and_frozen(ensemble):
    networks = [resnet(drop_rate=0.5).train() for _ in range(1 + ensemble)]
    teacher = Teacher.wrap(networks if ensemble else networks[0])
    parent = nn.Sequential(teacher)
    before = {key: value.clone() for key, value in teacher.state_dict().items()}
    parent.train()
    teacher.train(True)
    assert not any(module.training for module in teacher.modules())
    assert not any(parameter.requires_grad for parameter in teacher.parameters())
    with torch.enable_grad():
        answers = [teacher(IMAGES * 3 + shift) for shift in range(10)]
    assert torch.equal(answers[0], teacher(IMAGES * 3))
    for key, value in teacher.state_dict().items():
        assert torch.equal(value, before[key]), key
    assert all(parameter.grad is None for parameter in teacher.parameters())


def test_logits_fit_into_a_graph():
    network = resnet()
    logits = Teacher(network)(IMAGES)
    assert not logits.requires_grad
    assert not logits.is_inference()
    student = torch.zeros(2, CLASSES, requires_grad=True)
    # The product saves the teacher's logits for the backward pass.
    (student * logits).sum().backward()
    torch.testing.assert_close(student.grad, answer(network), rtol=0, atol=1e-6)
    logits.mul_(2.0)


def test_the_logits_of_an_ensemble_fit_into_a_graph():
    student = torch.zeros(2, 3, requires_grad=True)
    (student * Teacher.wrap([Constant([1.0, 2.0, 3.0]), Constant([3.0, 2.0, 1.0])])(IMAGES)).sum().backward()
    assert student.grad.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_logits_are_fp32_at_least(dtype):
    network = resnet().to(dtype)
    logits = Teacher(network)(IMAGES)
    assert logits.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    torch.testing.assert_close(logits.to(dtype), answer(network, IMAGES.to(dtype)), rtol=0, atol=0)


@pytest.mark.parametrize("images", [torch.float32, torch.float64])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_under_autocast(dtype, images):
    teacher = Teacher(resnet().to(dtype))
    plain = teacher(IMAGES.to(images))
    with torch.autocast("cpu", torch.bfloat16):
        logits = teacher(IMAGES.to(images))
    assert logits.dtype == plain.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    torch.testing.assert_close(logits, plain, rtol=0.05, atol=0.05)
    # It ran as the student does; autocast leaves fp64 alone.
    assert torch.equal(logits, plain) == (dtype != torch.float32)


def test_a_teacher_may_be_cast_after_it_was_built():
    teacher = Teacher(resnet())
    expected = teacher(IMAGES)
    torch.testing.assert_close(teacher.to(torch.float64)(IMAGES), expected.double(), rtol=1e-4, atol=1e-5)


def test_infinite_logits_pass():
    logits = torch.tensor([1.0, float("-inf"), 2.0])
    assert torch.equal(Teacher(Constant(logits))(IMAGES), logits.expand(2, -1))
    merged = Teacher(Constant(logits, 3), class_map=[[1], [0, 1], [1, 1]])(IMAGES)
    assert torch.equal(merged, torch.tensor([float("-inf"), 1.0, float("-inf")]).expand(2, -1))


# ---- Other classes -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("class_map", [[2, 0], (2, 0), np.array([2, 0]), {1: 0, 0: 2}, {"1": 0, "0": [2]}, [[2], [0]]])
def test_class_maps_pick_classes(class_map):
    teacher = Teacher(Constant([5.0, 6.0, 7.0], 3), class_map=class_map)
    assert teacher.num_classes == 2
    assert torch.equal(teacher(IMAGES), torch.tensor([7.0, 5.0]).expand(2, -1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_class_maps_add_the_probabilities_of_groups(dtype):
    logits = torch.tensor([1.0, -2.0, 0.5, 3.0, 0.0], dtype=dtype)
    probabilities = logits.softmax(-1)
    merged = Teacher(Constant(logits, 5), class_map=[[0, 3], 1, {2, 4}])(IMAGES)
    expected = torch.stack([probabilities[[0, 3]].sum(), probabilities[1], probabilities[[2, 4]].sum()])
    assert merged.dtype == dtype
    torch.testing.assert_close(merged.softmax(-1), expected.expand(2, -1))


@pytest.mark.parametrize(
    ("class_map", "message"),
    [
        ([0, 9], r"names the teacher's class 9, but .* has the classes 0 to 2"),
        ([0, [1, 3]], r"names the teacher's class 3"),
        ([0, -1], r"one or more of the teacher's class numbers, got -1 for class 1"),
        ([0, []], r"got \[\] for class 1"),
        ([0, 1.5], r"got 1.5 for class 1"),
        ([0, "cat"], r"got 'cat' for class 1"),
        ([], "is empty"),
        ({}, "is empty"),
        ({0: 1, 2: 0}, r"classes 0 to 1 as its keys, got \[0, 2\]"),
        ({1: 1, 2: 0}, r"classes 0 to 1 as its keys"),
        ({"cat": 0}, r"classes 0 to 0 as its keys, got \['cat'\]"),
    ],
)
def test_wrong_class_maps(class_map, message):
    with pytest.raises(ValueError, match=message):
        Teacher(Constant([1.0, 2.0, 3.0], 3), class_map=class_map)


# ---- Matching ------------------------------------------------------------------------------------------------------


def test_other_class_counts_name_both():
    with pytest.raises(
        ValueError, match=r"student has 10 classes and the teacher test_resnet\S* has 4: give `class_map`"
    ):
        Teacher(resnet()).match(10, SMALL)
    Teacher(resnet(), class_map=[0, 1]).match(2, SMALL)
    with pytest.raises(ValueError, match=r"student has 3 classes and the teacher .* has 4"):
        Teacher.wrap([resnet(), resnet()]).match(3, SMALL)
    # What one side does not say cannot differ.
    Teacher(Constant([1.0, 2.0])).match(10, None)
    Teacher(resnet()).match(None, SMALL)


def test_statistics_known_of_one_side_only():
    with pytest.raises(ValueError, match=r"teacher Gauge does not say how its images are normalised.*Preprocessing\("):
        Teacher(Gauge()).match(3, SMALL)
    with pytest.raises(ValueError, match=r"wants images normalised by mean \(0.5.*student does not say"):
        Teacher(Gauge(), preprocessing=SMALL).match(3, None)


def test_statistics_known_of_no_side_pass_inputs_through():
    teacher = Teacher(Gauge())
    teacher.match(3, None)
    teacher(pixel_values=IMAGES)
    assert torch.equal(teacher.model.seen, IMAGES)


def test_equal_statistics_pass_inputs_through():
    teacher = Teacher(Gauge(), preprocessing=SMALL)
    teacher.match(3, SMALL)
    teacher(IMAGES)
    assert torch.equal(teacher.model.seen, IMAGES)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("by_name", [False, True])
def test_images_are_renormalised_and_resized(dtype, by_name):
    own = Preprocessing((0.485, 0.456, 0.406), (0.229, 0.224, 0.225), (3, 48, 40), "bicubic")
    teacher = Teacher(Gauge(), preprocessing=own)
    if dtype == torch.bfloat16:
        # The network's dtype is that of its parameters.
        teacher.model.register_parameter("unused", nn.Parameter(torch.zeros(1, dtype=dtype), requires_grad=False))
    teacher.match(3, SMALL)
    logits = teacher(pixel_values=IMAGES) if by_name else teacher(IMAGES)
    mean, std = torch.tensor(own.mean)[:, None, None], torch.tensor(own.std)[:, None, None]
    expected = F.interpolate((IMAGES * 0.5 + 0.5 - mean) / std, (48, 40), mode="bicubic", antialias=True)
    # In half precision, rounded once and not before the arithmetic.
    rounding = 0 if dtype == torch.float32 else 2**-8
    torch.testing.assert_close(teacher.model.seen, expected.to(dtype), rtol=rounding, atol=1e-4)
    assert logits.dtype == torch.float32


def test_only_images_are_converted():
    class Two(nn.Module):
        def forward(self, pixel_values, mask):
            self.seen = pixel_values, mask
            return pixel_values.mean((2, 3))

    teacher = Teacher(Two(), preprocessing=Preprocessing((0.0,) * 3, (0.5,) * 3, (3, 32, 32)))
    teacher.match(None, SMALL)
    mask, number = torch.rand(2, 7), torch.tensor([[1], [2]])
    teacher(pixel_values=IMAGES, mask=mask)
    torch.testing.assert_close(teacher.model.seen[0], IMAGES + 1.0)
    assert torch.equal(teacher.model.seen[1], mask)
    teacher(pixel_values=IMAGES, mask=number)
    assert teacher.model.seen[1].dtype == torch.int64


def test_input_size_replaces_the_networks_own():
    teacher = Teacher(Gauge(), preprocessing=SMALL, input_size=(24, 20))
    teacher.match(3, SMALL)
    teacher(IMAGES)
    assert teacher.model.seen.shape == (2, 3, 24, 20)
    assert Teacher(resnet(), input_size=32).preprocessing.input_size == (3, 32, 32)
    with pytest.raises(ValueError, match=r"`input_size` needs to know how the teacher Gauge wants its images"):
        Teacher(Gauge(), input_size=32)


def test_a_greyscale_student_and_a_colour_teacher():
    teacher = Teacher(Gauge(), preprocessing=SMALL)
    teacher.match(3, Preprocessing((0.1307,), (0.3081,), (1, 32, 32)))
    grey = torch.rand(2, 1, 32, 32)
    teacher((grey - 0.1307) / 0.3081)
    torch.testing.assert_close(teacher.model.seen, ((grey - 0.5) / 0.5).expand(-1, 3, -1, -1))


def test_a_colour_student_and_a_greyscale_teacher():
    with pytest.raises(ValueError, match=r"3 channels and the teacher's 1"):
        Teacher(resnet(in_chans=1)).match(CLASSES, SMALL)


def test_a_greyscale_timm_teacher_and_a_greyscale_student():
    network = resnet(in_chans=1)
    teacher = Teacher(network, input_size=32)
    teacher.match(
        CLASSES, Preprocessing.of(create_student("test_resnet", num_classes=CLASSES, in_chans=1, img_size=32))
    )
    torch.testing.assert_close(teacher(IMAGES[:, :1]), answer(network, IMAGES[:, :1]))


def test_moving_a_teacher_moves_its_conversion():
    # Nothing of it is saved, and nothing of it is left behind.
    own = Preprocessing((0.0,) * 3, (0.5,) * 3, (3, 32, 32))
    teacher = Teacher(resnet(), preprocessing=own)
    teacher.match(CLASSES, SMALL)
    assert not [key for key in teacher.state_dict() if "converter" in key]
    assert {buffer.device.type for buffer in teacher.to("meta").converter.buffers()} == {"meta"}


def test_a_resize_is_announced(caplog):
    teacher = Teacher(timm.create_model("test_resnet", num_classes=4))
    declared = teacher.preprocessing
    with caplog.at_level("WARNING"):
        teacher.match(4, declared)
        assert "resized" not in caplog.text
        teacher.match(4, replace(declared, input_size=(3, 32, 48)))
    assert "images of 32 x 48 are resized to 160 x 160 for the teacher test_resnet" in caplog.text
