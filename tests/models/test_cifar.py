"""The CIFAR networks: the recorded numbers of the CRD protocol's, and what timm and hf_kd ask of a network."""

import copy
import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
from torch import nn
from transformers import AutoModelForImageClassification

from hf_kd import Preprocessing, Teacher, create_student, save_student
from hf_kd.models.cifar import CIFAR100_MEAN, CIFAR100_STD


RECORDED = json.loads((Path(__file__).parents[1] / "data_files" / "cifar_models.json").read_text())
NAMES = {
    "ResNet50": "cifar_resnet50",
    "MobileNetV2": "cifar_mobilenetv2",
    "ShuffleV1": "cifar_shufflenetv1",
    "ShuffleV2": "cifar_shufflenetv2",
}
CASES = {NAMES.get(name, f"cifar_{name}"): case for name, case in RECORDED["models"].items()}
# One of each family, the smallest.
FAMILIES = (
    "cifar_resnet8",
    "cifar_wrn_16_1",
    "cifar_vgg8",
    "cifar_mobilenetv2",
    "cifar_shufflenetv1",
    "cifar_shufflenetv2",
)


# ---- What was recorded ---------------------------------------------------------------------------------------------


def fill(network, conv_gain, linear_gain, bn_weight_base):
    """The weights of the json's `weights_formula`."""
    constants = RECORDED["formula_constants"]
    tensors = network.state_dict()
    for number, key in enumerate(sorted(tensors)):
        tensor = tensors[key]
        i = torch.arange(tensor.numel())
        q = constants["A"] * i * i + constants["linear_coefficient"] * i + constants["P"]
        q = (q + constants["key_coefficient"] * number) % constants["modulus"]
        r = (2 * q.double() / constants["modulus"] - 1).view(tensor.shape)
        if key.endswith("num_batches_tracked"):
            r = torch.zeros_like(tensor)
        elif key.endswith("running_var"):
            r = 1 + 0.5 * r * r
        elif key.endswith(("running_mean", "bias")):
            r = 0.1 * r
        elif tensor.dim() == 1:
            r = bn_weight_base + 0.1 * r
        else:
            gain = linear_gain if tensor.dim() == 2 else conv_gain
            r = r * math.sqrt(3 * gain / tensor[0].numel())
        tensor.copy_(r)


def images():
    j = torch.arange(3 * 32 * 32).double()
    rows = [torch.sin(0.01 * (1 + 0.5 * n) * j + RECORDED["input_constants"]["phase"]) for n in range(2)]
    return torch.stack(rows).view(2, 3, 32, 32)


def hooked(network, names):
    """A dict that each forward pass fills with the outputs of these submodules."""
    outputs = {}
    for name in set(names):
        network.get_submodule(name).register_forward_hook(
            lambda module, args, output, name=name: outputs.__setitem__(name, output)
        )
    return outputs


def assert_logits(found, expected):
    expected = torch.tensor(expected, dtype=torch.float64)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-8 * expected.abs().max().item())


def test_every_network_is_registered():
    assert set(timm.list_models("cifar_*")) == CASES.keys()
    assert len(CASES) == 22
    assert set(timm.list_models(module="cifar")) == CASES.keys()


@pytest.mark.parametrize("name", CASES)
def test_tensors_have_the_recorded_names_shapes_and_order(name):
    with torch.device("meta"):
        network = timm.create_model(name)
    assert [[key, list(value.shape)] for key, value in network.state_dict().items()] == [
        [key, shape] for key, shape, _ in CASES[name]["state_dict"]
    ]
    assert sum(parameter.numel() for parameter in network.parameters()) == CASES[name]["parameters"]


@pytest.mark.parametrize("name", CASES)
@torch.no_grad()
def test_recorded_features_and_logits(name):
    case, x = CASES[name], images()
    network = timm.create_model(name).double().eval()
    fill(network, **case["gains"])
    plain, preact = network.feature_names(), network.feature_names(preact=True)
    # All at once: an activation in place would change what was taken before it.
    outputs = hooked(network, plain + preact)
    assert_logits(network(x), case["logits_eval"])
    for names, prefix in ((plain, ""), (preact, "preact_")):
        features = [outputs[feature] for feature in names]
        assert [list(feature.shape) for feature in features] == case[f"{prefix}feature_shapes"]
        for feature, recorded in zip(features, case[f"{prefix}feature_stats_eval"], strict=True):
            found = {"mean": feature.mean(), "abs_mean": feature.abs().mean(), "std": feature.std()}
            scale = recorded["abs_mean"]
            assert {key: value.item() for key, value in found.items()} == pytest.approx(recorded, 1e-8, 1e-8 * scale)
    assert [one == other for one, other in zip(plain, preact, strict=True)] == case["preact_equals_plain"]

    assert_logits(network.train()(x), case["logits_train_mode"])
    for norm, sums in case["bn_after_one_train_forward"].items():
        found = network.get_submodule(norm)
        assert found.running_mean.sum().item() == pytest.approx(sums["running_mean_sum"], 1e-8, 1e-8)
        assert found.running_var.sum().item() == pytest.approx(sums["running_var_sum"], 1e-8)
        assert found.num_batches_tracked.item() == sums["num_batches_tracked"]


@torch.no_grad()
def test_vgg_pools_once_more_for_images_of_64():
    network = timm.create_model("cifar_vgg8").eval()
    assert network.forward_intermediates(torch.randn(1, 3, 64, 64), indices=1)[1][0].shape == (1, 512, 4, 4)
    assert network.forward_intermediates(torch.randn(1, 3, 32, 32), indices=1)[1][0].shape == (1, 512, 4, 4)


@pytest.mark.parametrize("name", FAMILIES)
def test_weights_start_as_in_the_protocol(name):
    network = timm.create_model(name)
    for module in network.modules():
        if isinstance(module, nn.Conv2d) and module.weight.numel() > 5000:
            drawn = module.weight.numel()
            fan_out = module.out_channels * module.kernel_size[0] ** 2
            # torch's own is uniform with variance 1 / (3 fan_in).
            variance = 1 / (3 * module.weight[0].numel()) if "shufflenet" in name else 2 / fan_out
            assert module.weight.std().item() == pytest.approx(math.sqrt(variance), rel=4 / math.sqrt(drawn))
    small = ("cifar_vgg8", "cifar_mobilenetv2")
    weight, bias = network.get_classifier().weight, network.get_classifier().bias
    std = 0.01 if name in small else 1 / math.sqrt(3 * weight.shape[1])
    assert weight.std().item() == pytest.approx(std, rel=0.1)
    assert (bias.abs().max().item() == 0) == (name in (*small, "cifar_wrn_16_1"))


# ---- As timm asks --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CASES)
def test_pretrained_cfg(name):
    with torch.device("meta"):
        network = timm.create_model(name)
    cfg = network.pretrained_cfg
    assert (cfg["mean"], cfg["std"]) == ((0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761))
    assert (cfg["input_size"], cfg["num_classes"]) == ((3, 32, 32), 100)
    assert (cfg["crop_pct"], cfg["interpolation"], cfg["architecture"]) == (1.0, "bilinear", name)
    assert network.get_submodule(cfg["first_conv"]).in_channels == 3
    assert network.get_submodule(cfg["classifier"]) is network.get_classifier()
    assert network.get_classifier(name_only=True) == cfg["classifier"]
    last = network.forward_features(torch.zeros(1, 3, 32, 32, device="meta"))
    assert tuple(last.shape[1:]) == (network.num_features, *cfg["pool_size"])


@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_head(name):
    network, x = timm.create_model(name, num_classes=7).eval(), torch.randn(2, 3, 32, 32)
    features = network.forward_features(x)
    pooled = network.forward_head(features, pre_logits=True)
    torch.testing.assert_close(pooled, features.mean(dim=(2, 3)))
    logits = network(x)
    assert logits.shape == (2, 7)
    assert torch.equal(network.forward_head(features), logits)
    assert torch.equal(network.get_classifier()(pooled), logits)
    assert pooled.shape[1] == network.head_hidden_size == network.num_features

    network.reset_classifier(11)
    assert network.num_classes == network.get_classifier().out_features == 11
    assert network(x).shape == (2, 11)
    network.reset_classifier(0)
    assert torch.equal(network(x), pooled)
    network.reset_classifier(0, "")
    assert torch.equal(network(x), features)
    bare = timm.create_model(name, num_classes=0).eval()
    bare.load_state_dict(network.state_dict())
    assert torch.equal(bare(x), pooled)


def test_a_new_classifier_is_what_the_old_one_was():
    network = timm.create_model("cifar_mobilenetv2").double().eval()
    network.reset_classifier(5)
    assert network.get_classifier().weight.dtype == torch.float64
    assert not network.get_classifier().training
    # The rest is left as it is: frozen statistics stay frozen.
    network.train()
    network.conv2.eval()
    network.reset_classifier(6)
    assert network.get_classifier().training
    assert not network.conv2[1].training


@torch.no_grad()
def test_dropout_before_the_classifier():
    network, x = timm.create_model("cifar_resnet8", drop_rate=0.5), torch.randn(8, 3, 32, 32)
    features = network.forward_features(x)
    dropped = network.forward_head(features, pre_logits=True)
    whole = network.eval().forward_head(features, pre_logits=True)
    assert 0.35 < (dropped == 0).float().mean().item() < 0.65
    kept = dropped != 0
    torch.testing.assert_close(dropped[kept], 2 * whole[kept])


@pytest.mark.parametrize("name", [*FAMILIES, "cifar_resnet50"])
@torch.no_grad()
def test_intermediates(name):
    network, x = timm.create_model(name).eval(), torch.randn(1, 3, 32, 32)
    maps = network.feature_names()[:-1]
    outputs = hooked(network, maps)
    final, features = network.forward_intermediates(x)
    assert torch.equal(final, network.forward_features(x))
    assert len(features) == len(maps)
    for feature, info in zip(features, network.feature_info, strict=True):
        assert torch.equal(feature, outputs[info["module"]])
        assert feature.shape == (1, info["num_chs"], 32 // info["reduction"], 32 // info["reduction"])
    picked = network.forward_intermediates(x, indices=[0, -2], intermediates_only=True)
    assert [torch.equal(one, other) for one, other in zip(picked, (features[0], features[-2]), strict=True)] == [
        True
    ] * 2
    assert torch.equal(network.forward_intermediates(x, indices=1, intermediates_only=True)[0], features[-1])
    reached, [first] = network.forward_intermediates(x, indices=[0], stop_early=True)
    assert reached is first

    pyramid = timm.create_model(name, features_only=True, out_indices=(1, 2)).eval()
    pyramid.model.load_state_dict(network.state_dict(), strict=False)
    assert [torch.equal(one, other) for one, other in zip(pyramid(x), features[1:3], strict=True)] == [True] * 2
    assert pyramid.feature_info.channels() == [info["num_chs"] for info in network.feature_info[1:3]]
    # Of what comes after there is nothing left.
    after = (maps[3], network.get_classifier(name_only=True))
    assert not [key for key in pyramid.model.state_dict() if key.startswith(after)]
    assert len(timm.create_model(name, features_only=True).eval()(x)) == len(maps)


@pytest.mark.parametrize("indices", [[4], [-5], [], 0])
def test_features_that_there_are_not(indices):
    network = timm.create_model("cifar_resnet8")
    with pytest.raises(ValueError, match=r"`indices` must name features 0 to 3, or say how many of the last, got"):
        network.forward_intermediates(torch.randn(1, 3, 32, 32), indices=indices)
    with pytest.raises(ValueError, match="`output_fmt` must be 'NCHW', got 'NLC'"):
        network.forward_intermediates(torch.randn(1, 3, 32, 32), output_fmt="NLC")


@pytest.mark.parametrize("name", FAMILIES)
def test_gradient_checkpointing_changes_no_number(name):
    plain, x = timm.create_model(name).double(), torch.randn(4, 3, 32, 32, dtype=torch.float64)
    frugal = copy.deepcopy(plain)
    frugal.set_grad_checkpointing()
    inner, stage = _inner_convolution(frugal)
    counts = {inner: 0, stage: 0}
    for module in counts:
        module.register_forward_hook(lambda module, args, output: counts.__setitem__(module, counts[module] + 1))
    for network in (plain, frugal):
        network(x).square().sum().backward()
    # The block is computed again, its stage is seen once; the batch counts once.
    assert counts == {inner: 2, stage: 1}
    for one, other in zip(plain.parameters(), frugal.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-10, atol=1e-12)
    for key, value in plain.state_dict().items():
        assert torch.equal(value, frugal.state_dict()[key]), key
    norm = next(module for module in frugal.modules() if isinstance(module, nn.BatchNorm2d))
    assert (norm.momentum, norm.num_batches_tracked.item()) == (0.1, 1)
    frugal.set_grad_checkpointing(False)
    frugal(x).square().sum().backward()
    assert counts == {inner: 3, stage: 2}


def _inner_convolution(network):
    """The first convolution of the last stage, and the stage."""
    stage = network.get_submodule(network.feature_names(preact=False)[-2].replace("act4", "block4"))
    return next(module for module in stage.modules() if isinstance(module, nn.Conv2d)), stage


def test_compiled_whole_and_with_checkpointing():
    torch._dynamo.reset()
    plain, x = timm.create_model("cifar_resnet8").double(), torch.randn(4, 3, 32, 32, dtype=torch.float64)
    compiled = copy.deepcopy(plain)
    compiled.set_grad_checkpointing()
    for network in (plain, torch.compile(compiled, backend="aot_eager", fullgraph=True)):
        network(x).square().sum().backward()
    for one, other in zip(plain.parameters(), compiled.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-10, atol=1e-12)
    for key, value in plain.state_dict().items():
        torch.testing.assert_close(value, compiled.state_dict()[key], rtol=1e-12, atol=1e-12)


# ---- In hf_kd ------------------------------------------------------------------------------------------------------


def published(path, name, num_classes=100, legacy=False):
    """A file as the CRD protocol's training writes it: weights under "model", among other things."""
    network = timm.create_model(name, num_classes=num_classes)
    for key, value in network.state_dict().items():
        if key.endswith("running_mean"):
            value.normal_()
    optimizer = torch.optim.SGD(network.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4)
    torch.save(
        {
            "epoch": 240,
            "model": network.state_dict(),
            "best_acc": torch.tensor(79.42),
            "optimizer": optimizer.state_dict(),
        },
        path,
        # What torch wrote when the protocol's teachers were trained.
        _use_new_zipfile_serialization=not legacy,
    )
    return network.eval()


@pytest.mark.parametrize(
    ("name", "legacy"), [("cifar_resnet32x4", True), *((name, False) for name in FAMILIES), ("cifar_resnet8", True)]
)
@torch.no_grad()
def test_a_published_teacher_loads(name, legacy, tmp_path):
    network, x = published(tmp_path / "ckpt_epoch_240.pth", name, legacy=legacy), torch.randn(2, 3, 32, 32)
    teacher = Teacher.from_pretrained(name, num_classes=100, checkpoint=tmp_path / "ckpt_epoch_240.pth")
    assert torch.equal(teacher(x), network(x))
    assert teacher.preprocessing == Preprocessing(CIFAR100_MEAN, CIFAR100_STD, (3, 32, 32), "bilinear", 1.0)
    assert teacher.num_classes == 100


@pytest.mark.parametrize(
    ("name", "written", "num_classes", "what"),
    [
        ("cifar_resnet14", "cifar_resnet8", 100, r"36 missing \(such as layer1.1.bn1.bias\)"),
        ("cifar_resnet8", "cifar_resnet14", 100, r"36 unexpected \(such as layer1.1.bn1.bias\)"),
        ("cifar_resnet8x4", "cifar_resnet8", 100, r"\d+ of another shape \(such as bn1.bias \(16,\) for \(32,\)\)"),
        ("cifar_resnet8", "cifar_resnet8", 10, r"2 of another shape \(such as fc.bias \(10,\) for \(100,\)\)"),
    ],
)
def test_a_wrong_checkpoint_is_refused(name, written, num_classes, what, tmp_path):
    published(tmp_path / "teacher.pth", written, num_classes)
    sentence = rf"The checkpoint .*teacher.pth does not fit {name}: of its tensors .*{what}.*another architecture"
    with pytest.raises(ValueError, match=sentence):
        Teacher.from_pretrained(name, num_classes=100, checkpoint=tmp_path / "teacher.pth")


def test_an_untrained_network_is_no_teacher():
    with pytest.raises(ValueError, match="timm has no weights for 'cifar_resnet20'.*give `checkpoint`"):
        Teacher.from_pretrained("cifar_resnet20")


@pytest.mark.parametrize(("name", "in_chans"), [*((name, 3) for name in FAMILIES), ("cifar_vgg8", 1)])
@torch.no_grad()
def test_a_saved_student_opens_everywhere(name, in_chans, tmp_path):
    student, x = create_student(name, num_classes=10, in_chans=in_chans).eval(), torch.randn(2, in_chans, 32, 32)
    for key, value in student.state_dict().items():
        if key.endswith("running_mean"):
            value.normal_()
    logits = student(x).logits
    assert logits.shape == (2, 10)
    save_student(student, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert (config["architecture"], config["registered_by"]) == (name, "hf_kd.models.cifar")
    mean = CIFAR100_MEAN if in_chans == 3 else pytest.approx((sum(CIFAR100_MEAN) / 3,))
    for network in (
        Teacher.from_pretrained(tmp_path),
        timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval(),
        AutoModelForImageClassification.from_pretrained(tmp_path).eval(),
    ):
        output = network(x)
        assert torch.equal(getattr(output, "logits", output), logits)
        preprocessing = network.preprocessing if isinstance(network, Teacher) else Preprocessing.of(network)
        assert preprocessing.mean == mean
        assert preprocessing.input_size == (in_chans, 32, 32)


@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_a_bare_network_of_one_channel_is_saved_with_its_channels(name, tmp_path):
    network, x = timm.create_model(name, num_classes=3, in_chans=1).eval(), torch.randn(2, 1, 32, 32)
    assert network.in_chans == 1
    save_student(network, tmp_path)
    again = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    assert torch.equal(again(x), network(x))
    assert Preprocessing.of(again).mean == pytest.approx((sum(CIFAR100_MEAN) / 3,))


def test_importing_what_the_folder_names_registers_its_network(tmp_path):
    save_student(create_student("cifar_resnet8", num_classes=10), tmp_path)
    program = """
import importlib, json, sys, timm
folder = sys.argv[1]
config = json.load(open(folder + "/config.json"))
assert not timm.is_model(config["architecture"])
importlib.import_module(config["registered_by"])
network = timm.create_model("local-dir:" + folder, pretrained=True)
print(type(network).__name__, network.num_classes)
"""
    command = [sys.executable, "-c", program, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert done.stdout.split() == ["ResNet", "10"], done.stderr


def test_the_student_in_transformers_clothes_has_features_and_checkpointing():
    student, x = create_student("cifar_resnet8", num_classes=10).eval(), torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        output = student(x, output_hidden_states=True)
        assert [tuple(state.shape[1:]) for state in output.hidden_states] == [
            (16, 32, 32), (16, 32, 32), (32, 16, 16), (64, 8, 8),
        ]  # fmt: skip
        assert torch.equal(output.logits, student(x).logits)
    student.activation_checkpointing_enable()
    assert student.timm_model.layer1.grad_checkpointing
