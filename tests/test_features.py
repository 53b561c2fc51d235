"""Features by name: timm's own values, whatever is around the network, and nothing kept when nobody asks."""

import copy
import pickle
import re

import pytest
import timm
import torch
from tiny import ConvNet, vit
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint

from hf_kd import Teacher, create_student
from hf_kd.features import FeatureTaker


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def images(count=2, size=32):
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(1))


def resnet(**options):
    return timm.create_model("test_resnet", num_classes=5, **options)


def timm_vit(**options):
    return timm.create_model("test_vit", num_classes=5, img_size=32, **options)


def student(architecture="test_vit"):
    return create_student(architecture, num_classes=5, img_size=32)


def taken(network, names, *args, **options):
    taker = FeatureTaker(network, names, **options)
    with taker:
        network(*args)
    return taker.take()


# ---- What is taken -------------------------------------------------------------------------------------------------


def test_a_resnet_of_timm():
    network, x = resnet().eval(), images()
    features = taken(network, ["pre_logits", "layer1", "layer3", "layer4.0", "fc@input", "fc"], x)
    _, (layer1, layer3) = network.forward_intermediates(x, indices=[1, 3])
    torch.testing.assert_close(features["layer1"], layer1)
    torch.testing.assert_close(features["layer3"], layer3)
    pre_logits = network.forward_head(network.forward_features(x), pre_logits=True)
    torch.testing.assert_close(features["pre_logits"], pre_logits)
    assert torch.equal(features["fc@input"], features["pre_logits"])
    assert torch.equal(features["fc"], network(x))
    torch.testing.assert_close(features["layer4.0"], network.layer4[0](layer3))
    assert list(features) == ["pre_logits", "layer1", "layer3", "layer4.0", "fc@input", "fc"]


def test_a_vit_of_timm():
    network, x = timm_vit().eval(), images()
    features = taken(network, ["blocks.0@patches", "blocks.1@output", "norm@patches", "pre_logits"], x)
    first, last = network.forward_intermediates(x, indices=[0, 5], output_fmt="NLC", intermediates_only=True)
    torch.testing.assert_close(features["blocks.0@patches"], first)
    whole = network.forward_features(x)
    torch.testing.assert_close(features["norm@patches"], network.norm(last))
    torch.testing.assert_close(features["norm@patches"], whole[:, 1:])
    assert features["blocks.1@output"].shape == (2, whole.shape[1], whole.shape[2])
    torch.testing.assert_close(features["pre_logits"], network.forward_head(whole, pre_logits=True))


@pytest.mark.parametrize("name", ["test_convnext", "test_efficientnet", "test_mambaout", "test_nfnet"])
def test_pre_logits_are_those_of_timm(name):
    network, x = timm.create_model(name, num_classes=5).eval(), images()
    expected = network.forward_head(network.forward_features(x), pre_logits=True)
    assert expected.dim() == 2
    torch.testing.assert_close(taken(network, ["pre_logits"], x)["pre_logits"], expected)


def test_a_distilled_vit_has_two_classifiers_and_two_tokens_before_the_patches():
    tiny = {"embed_dim": 8, "depth": 2, "num_heads": 2, "img_size": 32}
    network = timm.create_model("deit_tiny_distilled_patch16_224", num_classes=5, **tiny).eval()
    features, x = taken(network, ["pre_logits", "norm@patches"], images()), images()
    whole = network.forward_features(x)
    torch.testing.assert_close(features["pre_logits"], network.forward_head(whole, pre_logits=True))
    torch.testing.assert_close(features["norm@patches"], whole[:, 2:])


def test_a_network_of_timm_that_declares_no_tokens_has_none_before_the_patches():
    with torch.device("meta"):
        network = timm.create_model("volo_d1_224", num_classes=5)
    assert hasattr(network, "cls_token")  # which comes after the blocks
    assert FeatureTaker(network, ["norm@patches"])._prefix_tokens == 0


@pytest.mark.parametrize("make", [resnet, timm_vit])
def test_timm_in_transformers(make):
    bare = make().eval()
    architecture = {resnet: "test_resnet", timm_vit: "test_vit"}[make]
    wrapped = student(architecture).eval()
    wrapped.timm_model.load_state_dict(bare.state_dict())
    names = ["pre_logits", "layer2"] if make is resnet else ["pre_logits", "blocks.0@patches", "norm@input"]
    expected, x = taken(bare, names, images()), images()
    features = taken(wrapped, names, x)
    for name in names:
        torch.testing.assert_close(features[name], expected[name])
    full = taken(wrapped, [f"timm_model.{names[1]}"], x)
    assert torch.equal(full[f"timm_model.{names[1]}"], features[names[1]])


def test_a_vit_of_transformers():
    network, x = vit().eval(), images()
    names = ["pre_logits", "layers.0", "vit.layers.0@patches", "layernorm@patches"]
    features = taken(network, names, x)
    outputs = network(x, output_hidden_states=True)
    torch.testing.assert_close(features["layers.0"], outputs.hidden_states[1])
    torch.testing.assert_close(features["vit.layers.0@patches"], outputs.hidden_states[1][:, 1:])
    torch.testing.assert_close(features["layernorm@patches"], network.vit(x).last_hidden_state[:, 1:])
    torch.testing.assert_close(network.classifier(features["pre_logits"]), outputs.logits)


def test_a_module_of_ones_own():
    network, x = ConvNet().eval(), images(size=8)
    features = taken(network, ["pre_logits", "conv", "conv@input"], x)
    assert torch.equal(features["conv@input"], x)
    torch.testing.assert_close(network.head(features["pre_logits"]), network(x))
    # The last layer that gives the classes, not the last layer.
    network.extra = nn.Linear(3, 7)
    torch.testing.assert_close(taken(network, ["pre_logits"], x)["pre_logits"], features["pre_logits"])


class Odd(nn.Module):
    """Calls in unusual ways: named inputs, tuples, a module twice, activations in place, a classifier of maps."""

    num_classes = 5

    def __init__(self):
        super().__init__()
        self.pair = Pair()
        self.norm = nn.BatchNorm2d(3)
        self.twice = nn.Identity()
        self.empty = Empty()
        self.last = nn.Conv2d(3, 5, 1)

    def get_classifier(self):
        return self.last

    def forward(self, x):
        x, _ = self.pair(mask=None, values=x)
        x = torch.relu_(self.norm(x))
        self.empty(x)
        return self.last(self.twice(self.twice(x))).mean((2, 3))


class Pair(nn.Module):
    def forward(self, mask, values):
        return 2 * values, {"mask": mask}


class Empty(nn.Module):
    def forward(self, x):
        return None


def test_inputs_by_name_outputs_in_tuples_and_work_in_place():
    network, x = Odd().eval(), images()
    features = taken(network, ["pair@input", "pair", "norm", "pre_logits"], x)
    assert torch.equal(features["pair@input"], x) and torch.equal(features["pair"], 2 * x)
    torch.testing.assert_close(features["norm"], network.norm(2 * x))  # negative ones too
    torch.testing.assert_close(features["pre_logits"], network.norm(2 * x).relu().mean((2, 3)))


def test_in_autocast_features_are_what_the_network_computes():
    network = resnet().eval()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        features = taken(network, ["layer1", "layer3.0.conv1"], images())
    assert features["layer3.0.conv1"].dtype == torch.bfloat16


# ---- Gradients -----------------------------------------------------------------------------------------------------


def test_gradients_reach_the_network_through_its_features():
    network, x = resnet(), images()
    feature = taken(network, ["layer2"], x)["layer2"]
    feature.square().sum().backward()
    ours = [p.grad for p in network.layer1.parameters()]
    network.zero_grad()
    network.layer2(
        network.layer1(network.maxpool(network.act1(network.bn1(network.conv1(x)))))
    ).square().sum().backward()
    for grad, parameter in zip(ours, network.layer1.parameters(), strict=True):
        torch.testing.assert_close(grad, parameter.grad)
    assert all(p.grad is None for p in network.layer3.parameters())


def test_a_teacher_gives_features_for_a_backward_pass():
    teacher = Teacher(resnet())
    taker = FeatureTaker(teacher.model, ["pre_logits"], detach=True)
    with taker:
        teacher(images())
    feature = taker.take()["pre_logits"]
    assert not feature.requires_grad and not feature.is_inference()
    weight = torch.ones_like(feature, requires_grad=True)
    (weight * feature).sum().backward()
    assert torch.equal(weight.grad, feature)
    with taker:
        teacher.model(images())  # without inference mode as well
    assert not taker.take()["pre_logits"].requires_grad


class Checkpointed(ConvNet):
    reentrant = True

    def forward(self, x):
        x = checkpoint(self.conv, x, use_reentrant=self.reentrant)
        return self.head(torch.relu(self.norm(x)).flatten(1))


def test_gradient_checkpointing():
    network, x = Checkpointed(), images(size=8).requires_grad_()
    with pytest.raises(
        RuntimeError, match="'conv' was computed without a graph, as gradient checkpointing of the reen"
    ):
        taken(network, ["conv"], x)
    network.reentrant = False
    taker = FeatureTaker(network, ["conv"])
    with taker:
        logits = network(x)
    feature = taker.take()["conv"]
    (logits.sum() + feature.square().sum()).backward()  # which runs the module once more
    grad, network.conv.weight.grad = network.conv.weight.grad, None
    (ConvNet.forward(network, x).sum() + network.conv(x).square().sum()).backward()
    torch.testing.assert_close(grad, network.conv.weight.grad)
    with torch.no_grad(), taker:
        network(x)
    assert not taker.take()["conv"].requires_grad


# ---- Around the network --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "in_place", "backend"),
    [
        ("timm", False, "eager"),
        ("timm in transformers", True, "eager"),
        ("transformers", False, "eager"),
        ("timm", True, "aot_eager"),
    ],
)
def test_compiled(kind, in_place, backend):
    make = {"timm": timm_vit, "transformers": vit, "timm in transformers": student}[kind]
    torch.manual_seed(0)
    network, x = make(), images()
    names = ["pre_logits", "layers.0@patches" if kind == "transformers" else "blocks.1@patches"]
    expected = taken(copy.deepcopy(network), names, x)
    counter = CompileCounterWithBackend(backend)
    if in_place:
        network.compile(backend=counter)
        compiled = network
    else:
        compiled = torch.compile(network, backend=counter)
    taker = FeatureTaker(compiled, names)
    frames = []
    for _ in range(2):
        compiled(x)
        assert not taker._kept
        with taker:
            compiled(x)
        features = taker.take()
        for name in names:
            torch.testing.assert_close(features[name], expected[name], rtol=1e-4, atol=1e-5)
        frames.append(counter.frame_count)
    assert frames[0] == frames[1] > 0  # with and without features: each compiled once
    sum(feature.square().sum() for feature in features.values()).backward()
    assert next(network.parameters()).grad.abs().sum() > 0


def test_a_compiled_teacher():
    teacher, x = Teacher(resnet()), images()
    expected = taken(copy.deepcopy(teacher.model), ["pre_logits", "layer1"], x, detach=True)
    teacher.model.compile(backend="eager")
    taker = FeatureTaker(teacher.model, ["pre_logits", "layer1"], detach=True)
    with taker:
        teacher(x)
    for name, feature in taker.take().items():
        torch.testing.assert_close(feature, expected[name])
        assert not feature.is_inference() and not feature.requires_grad


def test_a_compiled_part():
    network, x = resnet().eval(), images()
    expected = taken(network, ["layer2", "layer1.0"], x)
    network.layer1, network.layer2 = (torch.compile(m, backend="eager") for m in (network.layer1, network.layer2))
    features = taken(network, ["layer2", "layer1.0"], x)
    for name in expected:
        torch.testing.assert_close(features[name], expected[name])
    torch._dynamo.reset()
    network = resnet().eval()
    network.layer2 = torch.compile(network.layer2, backend="eager")
    network(x)  # the part as a whole is seen from outside of what has been compiled
    assert taken(network, ["layer2"], x)["layer2"].shape == expected["layer2"].shape


def test_nothing_is_kept_outside():
    network = resnet()
    taker = FeatureTaker(network, ["layer1"])
    network(images())
    with pytest.raises(RuntimeError, match="'layer1' was not called: run the network inside of `with taker:`"):
        taker.take()
    with taker:
        network(images())
    network(images(4))
    assert taker.take()["layer1"].shape[0] == 2
    with pytest.raises(RuntimeError, match="not called"):
        taker.take()  # given once
    with pytest.raises(RuntimeError, match="expected input"), taker:
        network.layer2(network.layer1(torch.ones(1, 32, 8, 8)).mean(1, keepdim=True))
    assert not taker._kept
    with taker:
        network(images())
    with taker:
        network(images(3))  # and a pass that was not taken is forgotten
    assert taker.take()["layer1"].shape[0] == 3


def test_the_hooks_can_be_removed_and_travel_with_copies():
    network = resnet()
    taker = FeatureTaker(network, ["layer1", "pre_logits"])
    with taker:
        network(images())
        average, unpickled = copy.deepcopy(network), pickle.loads(pickle.dumps(network))
        average(images())  # does not add to what is taken here
        unpickled(images())
    assert taker.take()["layer1"].shape[0] == 2
    assert network.state_dict().keys() == resnet().state_dict().keys()
    taker.remove()
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in network.modules())
    with taker:
        network(images())
    with pytest.raises(RuntimeError, match="not called"):
        taker.take()


@pytest.mark.parametrize("compiled", [True, False])
def test_shapes_leave_the_network_as_it_was(compiled):
    network = resnet(drop_rate=0.5)
    network.layer2.eval()
    counter = CompileCounterWithBackend("eager")
    if compiled:
        network.compile(backend=counter)
    state, random_state = copy.deepcopy(network.state_dict()), torch.get_rng_state()
    modes = [module.training for module in network.modules()]
    taker = FeatureTaker(network, ["layer1", "pre_logits"])
    shapes = taker.shapes(lambda: network(images(2)))
    assert shapes == {"layer1": (2, 32, 8, 8), "pre_logits": (2, 96)}
    assert modes == [module.training for module in network.modules()] and counter.frame_count == 0
    assert all(torch.equal(value, state[key]) for key, value in network.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random_state)
    with taker:
        network(images(3))  # and the taker is as good as before
    assert taker.take()["layer1"].requires_grad


# ---- Refusals ------------------------------------------------------------------------------------------------------


REFUSED = {
    "The network ResNet has no module 'layer33' for the feature 'layer33'. Did you mean layer3, layer3.0, layer4? It "
    "can be 'pre_logits' or a name in its named_modules().": ["layer33"],
    "The network ResNet has no module 'prelogits' for the feature 'prelogits@input'. Did you mean pre_logits? It can "
    "be 'pre_logits' or a name in its named_modules().": ["prelogits@input"],
    "The network ResNet has no module 'zzz' for the feature 'zzz'. It can be 'pre_logits' or a name in its "
    "named_modules().": ["zzz"],
    "The network ResNet has no module '' for the feature ''. It can be 'pre_logits' or a name in its "
    "named_modules().": [""],
    "The feature 'fc@inputs' asks for 'inputs' of a module; it can be output, input, patches.": ["fc@inputs"],
    "The features must be a list of names, at least one and each once, got [].": [],
    "The features must be a list of names, at least one and each once, got 'fc'.": "fc",
    "The features must be a list of names, at least one and each once, got ['fc', 'fc'].": ["fc", "fc"],
}


@pytest.mark.parametrize("sentence", REFUSED)
def test_unknown_names_are_refused(sentence):
    network = resnet()
    with pytest.raises(ValueError, match=f"^{re.escape(sentence)}$"):
        FeatureTaker(network, REFUSED[sentence])
    assert not any(module._forward_hooks for module in network.modules())


def test_near_names_are_without_the_implied_prefix():
    with pytest.raises(ValueError, match="Student has no module 'block.0' .* Did you mean blocks.0, "):
        FeatureTaker(student(), ["block.0"])
    with pytest.raises(ValueError, match="Did you mean layers.0, "):
        FeatureTaker(vit(), ["layer.0"])


def test_a_network_without_a_classifier_is_refused():
    with pytest.raises(ValueError, match="which layer of the network Sequential is its classifier, .* 'head@input'"):
        FeatureTaker(nn.Sequential(nn.Conv2d(3, 4, 3)), ["pre_logits"])


def test_what_cannot_be_taken_is_refused():
    network, x = Odd(), images()
    with pytest.raises(RuntimeError, match="'twice' was called 2 times in one forward pass, so that it is not clear"):
        taken(network, ["twice"], x)
    with pytest.raises(RuntimeError, match="'empty' gives NoneType, in which there is no tensor: name another module"):
        taken(network, ["empty"], x)
    with pytest.raises(RuntimeError, match=r"'norm@patches' has the shape \(2, 3, 32, 32\), .* take 'norm' as it is"):
        taken(network, ["norm@patches"], x)
