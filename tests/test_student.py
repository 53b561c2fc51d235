"""Students: built by timm name, saved so that timm and transformers open the same network."""

import json

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from sklearn.datasets import load_sample_images
from timm.data import create_transform, resolve_model_data_config
from tiny import vit
from torch import nn
from transformers import (
    AutoImageProcessor,
    AutoModelForImageClassification,
    ResNetConfig,
    ResNetForImageClassification,
    TimmWrapperConfig,
    TimmWrapperForImageClassification,
    ViTForImageClassification,
    pipeline,
)
from transformers.utils import logging

from hf_kd import create_student
from hf_kd.networks import Preprocessing
from hf_kd.student import Student, adopt_label_names, load_student_weights, save_student


NAMES = ["cat", "dog", "owl"]
TINY_RESNET = {"layers": (1, 1, 1, 1), "channels": (8, 16, 16, 32)}


@torch.no_grad()
def answer(network, images):
    output = network.eval()(images)
    return output if isinstance(output, torch.Tensor) else output.logits


def settled(network):
    """The network with BatchNorm statistics and a head that tell images apart."""
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 2.0)
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=0.3)
    return network


def config_of(folder):
    return json.loads((folder / "config.json").read_text())


def names_in(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture(scope="module")
def photo():
    return Image.fromarray(load_sample_images().images[0])


CASES = {
    "resnet": ("test_resnet", {"label_names": NAMES}),
    "resnet-statistics": (
        "test_resnet",
        {
            "label_names": NAMES,
            "img_size": 40,
            "mean": (0.1, 0.2, 0.3),
            "std": (0.4, 0.5, 0.6),
            "interpolation": "bicubic",
            "crop_pct": 0.8,
        },
    ),
    "vit-size": ("test_vit", {"label_names": NAMES, "img_size": 32}),
    "vit-wide": ("test_vit", {"num_classes": 3, "img_size": (32, 48)}),
    "grey": ("test_efficientnet", {"label_names": NAMES, "in_chans": 1, "img_size": 32}),
    "grey-statistics": ("test_vit", {"num_classes": 3, "in_chans": 1, "img_size": 32, "mean": [0.13], "std": [0.3]}),
    "arguments": ("resnet18", {"num_classes": 3, "img_size": 32, "global_pool": "max", **TINY_RESNET}),
}


@pytest.mark.parametrize("case", CASES)
def test_a_saved_student_opens_everywhere(tmp_path, case, photo):
    name, options = CASES[case]
    student = settled(create_student(name, **options))
    channels, height, width = Preprocessing.of(student).input_size
    labels = options.get("label_names", ["LABEL_0", "LABEL_1", "LABEL_2"])
    student.save_pretrained(tmp_path)
    assert names_in(tmp_path) == ["config.json", "model.safetensors"]

    size = options.get("img_size", 160)
    assert (height, width) == (size if isinstance(size, tuple) else (size, size))
    images = torch.randn(2, channels, height, width)
    expected = answer(student, images)
    assert expected.shape == (2, 3)
    assert (expected[0] - expected[1]).abs().max() > 1e-3

    in_timm = timm.create_model(f"local-dir:{tmp_path}", pretrained=True)
    in_transformers = AutoModelForImageClassification.from_pretrained(tmp_path)
    again = Student.from_pretrained(tmp_path)
    for network in (in_timm, in_transformers, again):
        torch.testing.assert_close(answer(network, images), expected, rtol=0, atol=1e-6)
    assert isinstance(in_transformers, TimmWrapperForImageClassification)
    assert in_timm.pretrained_cfg["label_names"] == labels
    assert in_transformers.config.id2label == dict(enumerate(labels))
    assert in_transformers.config.label2id == {label: number for number, label in enumerate(labels)}

    # Preprocessing: what was asked for, and the same in both.
    found = Preprocessing.of(student)
    for network in (in_timm, in_transformers, again):
        assert Preprocessing.of(network) == found
    for key in ("mean", "std", "interpolation", "crop_pct"):
        if key in options:
            assert getattr(found, key) == (tuple(options[key]) if key in ("mean", "std") else options[key])
    image = photo if channels == 3 else photo.convert("L")
    transformed = create_transform(**resolve_model_data_config(in_timm), is_training=False)(image)[None]
    processor = AutoImageProcessor.from_pretrained(tmp_path)
    torch.testing.assert_close(processor(image, return_tensors="pt")["pixel_values"], transformed, rtol=0, atol=1e-6)

    # The pipeline opens image files as colour.
    if channels == 3:
        classify = pipeline("image-classification", model=str(tmp_path), top_k=3)
        scores = {entry["label"]: entry["score"] for entry in classify(photo)}
        wanted = answer(student, transformed)[0].softmax(-1).tolist()
        assert [scores[label] for label in labels] == pytest.approx(wanted, abs=1e-6)


def test_what_is_in_the_folder(tmp_path):
    student = create_student("resnet18", label_names=NAMES, img_size=32, drop_rate=0.1, **TINY_RESNET)
    student.save_pretrained(tmp_path)
    config = config_of(tmp_path)
    assert config["architecture"] == "resnet18"
    assert config["num_classes"] == config["pretrained_cfg"]["num_classes"] == 3
    assert config["label_names"] == NAMES
    # Never null, and without the class count.
    assert config["model_args"] == {"drop_rate": 0.1, "layers": [1, 1, 1, 1], "channels": [8, 16, 16, 32]}
    assert config["pretrained_cfg"]["input_size"] == [3, 32, 32]
    # It says nothing about weights that were not used.
    assert not config["pretrained_cfg"].keys() & {"url", "hf_hub_id", "license", "tag"}
    weights = load_file(tmp_path / "model.safetensors")
    assert weights.keys() == student.timm_model.state_dict().keys()
    assert {"conv1.weight", "fc.bias", "bn1.running_var"} <= weights.keys()
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}


@pytest.mark.parametrize("name", ["test_resnet", "test_vit"])
def test_initial_weights_are_timms_own(name):
    options = {"img_size": 32} if name == "test_vit" else {}
    torch.manual_seed(3)
    expected = timm.create_model(name, num_classes=5, **options)
    state = torch.get_rng_state()
    torch.manual_seed(3)
    student = create_student(name, num_classes=5, img_size=32)
    assert torch.equal(torch.get_rng_state(), state)
    weights = student.timm_model.state_dict()
    assert weights.keys() == expected.state_dict().keys()
    for key, value in expected.state_dict().items():
        assert torch.equal(weights[key], value), key
    assert not any(tensor.is_meta for tensor in (*student.parameters(), *student.buffers()))
    assert student.training
    assert all(parameter.requires_grad for parameter in student.parameters())


def test_non_persistent_buffers_are_real():
    # Windowed attention keeps its relative positions outside the state dict.
    student = create_student("test_vit_relpos", num_classes=3, img_size=32)
    expected = timm.create_model("test_vit_relpos", num_classes=3, img_size=32)
    hidden = dict(expected.named_buffers()).keys() - expected.state_dict().keys()
    buffers = dict(student.timm_model.named_buffers())
    assert hidden
    assert all(torch.equal(buffers[key], expected.get_buffer(key)) for key in hidden)


def test_a_thousand_classes_do_not_get_imagenets_names(tmp_path):
    create_student("test_resnet").save_pretrained(tmp_path)
    model = AutoModelForImageClassification.from_pretrained(tmp_path)
    assert model.config.num_labels == 1000
    assert model.config.id2label[999] == "LABEL_999"


def test_the_class_count_comes_from_the_names():
    assert create_student("test_resnet", label_names=NAMES).config.num_labels == 3
    student = create_student("test_resnet", label_names=[7, 8])
    assert student.config.id2label == {0: "7", 1: "8"}


def test_a_tag_is_accepted():
    assert create_student("test_resnet.r160_in1k", num_classes=3).config.architecture == "test_resnet"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"label_names": ["a", "b", "a"]}, r"must be different from one another"),
        ({"mean": (0.5,)}, r"`mean` has 1 entries, 3 are needed"),
        ({"std": (0.5, 0.5, 0.5), "in_chans": 1}, r"`std` has 3 entries, 1 are needed"),
        ({"act_layer": nn.SiLU}, r"saved in config.json and must be JSON values"),
    ],
)
def test_wrong_arguments(options, message):
    with pytest.raises(ValueError, match=message):
        create_student(**{"name": "test_resnet", **options})


def test_publishing_is_not_done_on_the_side(tmp_path):
    with pytest.raises(ValueError, match="save_pretrained writes a folder"):
        create_student("test_resnet", num_classes=3).save_pretrained(tmp_path, push_to_hub=True)
    assert names_in(tmp_path) == []


def test_other_processes_write_nothing(tmp_path):
    create_student("test_resnet", num_classes=3).save_pretrained(tmp_path / "folder", is_main_process=False)
    assert names_in(tmp_path) == []


# ---- Other students ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"in_chans": 1}, {"drop_rate": 0.2, "drop_path_rate": 0.1}])
@pytest.mark.parametrize("name", ["test_resnet", "test_vit"])
def test_bare_timm_networks(tmp_path, name, options):
    network = settled(timm.create_model(name, num_classes=3, **options))
    save_student(network, tmp_path, label_names=NAMES)
    channels = options.get("in_chans", 3)
    images = torch.randn(2, channels, 160, 160)
    expected = answer(network, images)
    in_timm = timm.create_model(f"local-dir:{tmp_path}", pretrained=True)
    in_transformers = AutoModelForImageClassification.from_pretrained(tmp_path)
    torch.testing.assert_close(answer(in_timm, images), expected, rtol=0, atol=1e-6)
    torch.testing.assert_close(answer(in_transformers, images), expected, rtol=0, atol=1e-6)
    assert in_transformers.config.id2label == dict(enumerate(NAMES))
    grey = Image.fromarray(np.arange(256, dtype=np.uint8).reshape(16, 16).repeat(12, 0).repeat(12, 1))
    image = grey if channels == 1 else grey.convert("RGB")
    processor = AutoImageProcessor.from_pretrained(tmp_path)
    assert processor(image, return_tensors="pt")["pixel_values"].shape == (1, channels, 160, 160)


@pytest.fixture
def warnings_of_student(monkeypatch):
    messages = []
    logger = logging.get_logger("hf_kd.student")
    monkeypatch.setattr(logger, "warning", lambda message, *args: messages.append(message % args))
    return messages


@pytest.mark.parametrize(
    "options",
    [TINY_RESNET, {"act_layer": "silu"}, {"global_pool": "max"}, {"output_stride": 16}],
    ids=["shapes", "activation", "pooling", "stride"],
)
def test_bare_timm_networks_with_unrecorded_arguments(tmp_path, options, warnings_of_student):
    # Equal shapes are not enough: another activation or pooling would open, and answer otherwise.
    network, other = (timm.create_model("resnet18", num_classes=3, **options) for _ in range(2))
    save_student(network, tmp_path)
    assert names_in(tmp_path) == ["model.safetensors"]
    assert len(warnings_of_student) == 1
    assert "resnet18 was built with arguments that timm does not record" in warnings_of_student[0]
    assert "create_student" in warnings_of_student[0]
    load_student_weights(other, tmp_path)
    assert torch.equal(other.fc.weight, network.fc.weight)


def test_a_bare_network_with_synchronised_batch_norm_is_itself(tmp_path, warnings_of_student):
    save_student(nn.SyncBatchNorm.convert_sync_batchnorm(timm.create_model("test_resnet", num_classes=3)), tmp_path)
    assert not warnings_of_student
    assert config_of(tmp_path)["architecture"] == "test_resnet"


def test_bare_names_of_a_wrong_length(tmp_path):
    with pytest.raises(ValueError, match="`label_names` has 3 entries, 4 are needed"):
        save_student(timm.create_model("test_resnet", num_classes=4), tmp_path, label_names=NAMES)


def test_fine_tuning_a_saved_student_saves_the_new_names(tmp_path):
    create_student("test_resnet", label_names=["a", "b", "c", "d", "e"], img_size=32).save_pretrained(tmp_path / "old")
    model = TimmWrapperForImageClassification.from_pretrained(
        tmp_path / "old",
        num_labels=3,
        id2label=dict(enumerate(NAMES)),
        label2id={name: number for number, name in enumerate(NAMES)},
        ignore_mismatched_sizes=True,
    )
    # transformers keeps the old names on the side, and would write those.
    assert model.config.label_names == ["a", "b", "c", "d", "e"]
    settled(model)
    save_student(model, tmp_path / "new")
    assert config_of(tmp_path / "new")["label_names"] == NAMES
    again = AutoModelForImageClassification.from_pretrained(tmp_path / "new")
    assert again.config.id2label == dict(enumerate(NAMES))
    in_timm = timm.create_model(f"local-dir:{tmp_path / 'new'}", pretrained=True)
    images = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(answer(in_timm, images), answer(model, images), rtol=0, atol=1e-6)
    torch.testing.assert_close(answer(again, images), answer(model, images), rtol=0, atol=1e-6)
    assert Preprocessing.of(again).input_size == (3, 32, 32)


def test_a_wrapper_from_a_config_is_saved_for_timm_too(tmp_path):
    model = TimmWrapperForImageClassification(TimmWrapperConfig(architecture="test_resnet", num_labels=3))
    save_student(settled(model), tmp_path)
    images = torch.randn(2, 3, 32, 32)
    in_timm = timm.create_model(f"local-dir:{tmp_path}", pretrained=True)
    torch.testing.assert_close(answer(in_timm, images), answer(model, images), rtol=0, atol=1e-6)


def tiny_vit():
    return vit(id2label=dict(enumerate(NAMES)), label2id={name: number for number, name in enumerate(NAMES)})


def test_a_transformers_network_is_saved_its_own_way(tmp_path):
    model = settled(tiny_vit())
    save_student(model, tmp_path)
    again = AutoModelForImageClassification.from_pretrained(tmp_path)
    assert isinstance(again, ViTForImageClassification)
    assert again.config.id2label == dict(enumerate(NAMES))
    images = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(answer(again, images), answer(model, images), rtol=0, atol=1e-6)
    other = tiny_vit()
    load_student_weights(other, tmp_path)
    assert torch.equal(answer(other, images), answer(model, images))


def test_any_other_module_is_its_weights(tmp_path):
    network = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3))
    save_student(network, tmp_path / "deep" / "folder")
    assert names_in(tmp_path / "deep" / "folder") == ["model.safetensors"]
    other = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3))
    load_student_weights(other, tmp_path / "deep" / "folder")
    for key, value in network.state_dict().items():
        assert torch.equal(other.state_dict()[key], value)


# ---- Weights -------------------------------------------------------------------------------------------------------


def builders():
    return {
        "student": lambda: create_student("test_resnet", num_classes=3, img_size=32),
        "bare": lambda: timm.create_model("test_resnet", num_classes=3),
        "transformers": tiny_vit,
        "module": lambda: nn.Sequential(nn.Conv2d(3, 2, 3), nn.Flatten(), nn.Linear(1800, 3)),
    }


@pytest.mark.parametrize("kind", builders())
def test_compiled_students_save_clean_keys(tmp_path, kind):
    network = builders()[kind]()
    compiled = torch.compile(network, backend="eager")
    save_student(compiled, tmp_path / "compiled")
    save_student(network, tmp_path / "plain")
    # Also from a state dict taken through the wrapper, as a trainer does.
    save_student(compiled, tmp_path / "given", state_dict=compiled.state_dict())
    plain = load_file(tmp_path / "plain" / "model.safetensors")
    for folder in ("compiled", "given"):
        weights = load_file(tmp_path / folder / "model.safetensors")
        assert weights.keys() == plain.keys()
        assert not [key for key in weights if "_orig_mod" in key]
        assert all(torch.equal(weights[key], plain[key]) for key in plain)
        assert names_in(tmp_path / folder) == names_in(tmp_path / "plain")
        other = builders()[kind]()
        load_student_weights(torch.compile(other, backend="eager"), tmp_path / folder)
        assert all(torch.equal(value, network.state_dict()[key]) for key, value in other.state_dict().items())


def test_a_given_state_dict_is_what_is_saved(tmp_path):
    student = create_student("test_resnet", num_classes=3)
    doubled = {key: value * 2 for key, value in student.state_dict().items()}
    student.save_pretrained(tmp_path, state_dict=doubled)
    weights = load_file(tmp_path / "model.safetensors")
    assert torch.equal(weights["fc.weight"], student.timm_model.fc.weight * 2)


class Tied(nn.Module):
    def __init__(self, tied=True):
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
        if tied:
            self.second.weight = self.first.weight


def test_tied_weights_are_saved_once(tmp_path):
    network = Tied()
    save_student(network, tmp_path)
    assert load_file(tmp_path / "model.safetensors").keys() == {"first.weight", "first.bias", "second.bias"}
    other = Tied()
    load_student_weights(other, tmp_path)
    assert other.second.weight is other.first.weight
    assert torch.equal(other.second.weight, network.second.weight)
    with pytest.raises(ValueError, match=r"1 tensors missing.*such as second.weight"):
        load_student_weights(Tied(tied=False), tmp_path)


def test_weights_in_any_memory_order(tmp_path):
    network = timm.create_model("test_resnet", num_classes=3).to(memory_format=torch.channels_last)
    network.fc.weight = nn.Parameter(torch.randn(network.fc.in_features, 3).t())
    assert sum(not parameter.is_contiguous() for parameter in network.parameters()) > 3
    save_student(network, tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    assert all(torch.equal(weights[key], value) for key, value in network.state_dict().items())


def test_another_network_is_not_loaded(tmp_path):
    save_student(create_student("test_resnet", num_classes=3), tmp_path)
    other = create_student("test_resnet", num_classes=4)
    before = {key: value.clone() for key, value in other.state_dict().items()}
    message = r"another network than this student \(Student\): 0 tensors missing, 0 unexpected, 2 of another shape"
    with pytest.raises(ValueError, match=message):
        load_student_weights(other, tmp_path)
    assert all(torch.equal(before[key], value) for key, value in other.state_dict().items())
    with pytest.raises(ValueError, match=r"\d+ tensors missing, \d+ unexpected"):
        load_student_weights(create_student("test_vit", num_classes=3), tmp_path)


@pytest.mark.parametrize("change", ["missing", "unexpected"])
def test_every_tensor_must_be_there(tmp_path, change):
    network = nn.Linear(4, 3)
    weights = {"weight": torch.zeros(3, 4), "bias": torch.zeros(3), "more": torch.zeros(1)}
    weights.pop("more" if change == "missing" else "none", None)
    if change == "missing":
        weights.pop("bias")
    save_file(weights, tmp_path / "model.safetensors")
    found = "1 tensors missing, 0 unexpected" if change == "missing" else "0 tensors missing, 1 unexpected"
    with pytest.raises(ValueError, match=found):
        load_student_weights(network, tmp_path)
    assert network.weight.abs().max() > 0


def test_transformers_networks_of_another_shape_are_not_loaded(tmp_path):
    save_student(tiny_vit(), tmp_path)
    config = tiny_vit().config
    config.num_labels, config.num_hidden_layers = 5, 2
    other = ViTForImageClassification(config)
    before = other.classifier.weight.clone()
    with pytest.raises(
        ValueError, match=r"16 tensors missing, 0 unexpected, 2 of another shape \(such as vit.layers.1"
    ):
        load_student_weights(other, tmp_path)
    assert torch.equal(other.classifier.weight, before)
    config.num_labels, config.num_hidden_layers = 3, 0
    with pytest.raises(ValueError, match=r"0 tensors missing, 16 unexpected, 0 of another shape"):
        load_student_weights(ViTForImageClassification(config), tmp_path)


@pytest.mark.parametrize("kind", builders())
def test_loading_weights_draws_no_random_numbers(tmp_path, kind):
    save_student(builders()[kind](), tmp_path)
    other = builders()[kind]()
    state = torch.get_rng_state()
    load_student_weights(other, tmp_path)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("kind", builders())
def test_saving_draws_no_random_numbers(tmp_path, kind):
    network = builders()[kind]()
    state = torch.get_rng_state()
    save_student(network, tmp_path)
    assert torch.equal(torch.get_rng_state(), state)


def test_names_of_submodules_are_kept(tmp_path):
    # `module` and `timm_model` are wrappers' names, and may be a user's too.
    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            self.module = nn.Linear(2, 2)
            self.weight = nn.Parameter(torch.randn(5))

    network, other = Outer(), Outer()
    save_student(network, tmp_path)
    load_student_weights(other, tmp_path)
    for key, value in network.state_dict().items():
        assert torch.equal(other.state_dict()[key], value), key


def test_label_names_of_the_data_are_taken_by_networks_that_have_none(tmp_path):
    names = ["a", "b", "c"]
    bare = timm.create_model("test_resnet", num_classes=3)
    # As of weights that were published for other classes.
    bare.pretrained_cfg = {**bare.pretrained_cfg, "label_names": ["one", "two"]}
    native = ResNetForImageClassification(ResNetConfig(embedding_size=4, hidden_sizes=[4], depths=[1], num_labels=3))
    for number, network in enumerate((bare, native, create_student("test_resnet", num_classes=3))):
        adopt_label_names(network, names)
        save_student(network, tmp_path / str(number))
        loaded = AutoModelForImageClassification.from_pretrained(tmp_path / str(number))
        assert loaded.config.id2label == dict(enumerate(names))
        adopt_label_names(network, ["x", "y", "z"])
        adopt_label_names(network, ["a", "b"])
        save_student(network, tmp_path / str(number))
        loaded = AutoModelForImageClassification.from_pretrained(tmp_path / str(number))
        assert loaded.config.id2label == dict(enumerate(names))
    other = create_student("test_resnet", num_classes=3)
    for unfit in (None, [], ["a", "b"], ["a", "a", "b"]):
        adopt_label_names(other, unfit)
        assert other.config.id2label == {number: f"LABEL_{number}" for number in range(3)}
