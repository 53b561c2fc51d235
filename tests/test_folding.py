"""BatchNorm folded: the same logits, the network itself untouched, and no layer that must stay is folded."""

import copy
import logging

import pytest
import timm
import torch
from timm.layers import BatchNormAct2d
from tiny import ConvNet
from torch import nn
from torch.nn.utils.parametrizations import weight_norm

import hf_kd.models.cifar  # noqa: F401 - registers its networks with timm
from hf_kd.folding import fold_batchnorm


@pytest.fixture(autouse=True)
def log(caplog):
    caplog.set_level(logging.INFO, "hf_kd")
    return caplog


def trained(network):
    """In eval mode, with statistics and weights of BatchNorm that make a difference."""
    for module in network.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is not None:
            module.running_mean.normal_(0, 0.3)
            module.running_var.uniform_(0.3, 3.0)
            if module.affine:
                nn.init.uniform_(module.weight, 0.5, 1.5)
                nn.init.normal_(module.bias)
    return network.eval()


def norms(network):
    return [module for module in network.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]


def fold(network, *shape):
    """The folded copy, after a comparison of its logits with the network's on other inputs than it was folded by."""
    before = copy.deepcopy(network.state_dict())
    example, inputs = torch.randn(2, *shape), torch.randn(6, *shape)
    folded = fold_batchnorm(network, lambda model: model(example.to(next(model.parameters()))))
    for name, value in network.state_dict().items():
        assert torch.equal(value, before[name]), name
    with torch.no_grad():
        expected, actual = network(inputs), folded(inputs)
    assert expected.std() > 1e-3
    torch.testing.assert_close(actual, expected, rtol=0, atol=float(1e-5 * expected.abs().max()))
    return folded


@pytest.mark.parametrize(
    ("name", "left"),
    [
        ("cifar_resnet8x4", 0),
        # timm's BatchNormAct2d, inverted residuals, TensorFlow's padding.
        ("test_efficientnet", 0),
        ("tf_mobilenetv3_small_minimal_100", 0),
        # Activations before convolutions: what a sum is normalised by stays.
        ("cifar_wrn_16_2", 6),
        ("test_resnet", 0),
    ],
)
def test_networks_of_every_make(name, left):
    folded = fold(trained(timm.create_model(name, num_classes=10)), 3, 32, 32)
    assert len(norms(folded)) == left
    assert not any(parameter.requires_grad for parameter in folded.parameters())
    assert not folded.training


class Layers(nn.Module):
    """A stem, and whatever `forward` does with its layers."""

    def __init__(self, forward, **layers):
        super().__init__()
        self.layers = nn.ModuleDict({"stem": nn.Conv2d(3, 6, 3), **layers})
        self.run = forward

    def forward(self, x):
        return self.run(self.layers, self.layers["stem"](x)).flatten(1)


def conv(**options):
    return nn.Conv2d(6, 6, 3, padding=1, **options)


def straight(m, x):
    return m["norm"](m["conv"](x))


def output_twice(m, x):
    y = m["conv"](x)
    return m["norm"](y) + y


def output_changed_later(m, x):
    y = m["conv"](x)
    z = m["norm"](y)
    return z + y.mul_(2.0)


def conv_twice(m, x):
    return m["norm"](m["conv"](x)) + m["conv"](x + 1)


def norm_twice(m, x):
    return m["norm"](m["conv"](x)) + m["norm"](x)


def between(m, x):
    return m["norm"](torch.relu(m["conv"](x)))


@pytest.mark.parametrize(
    "forward", [output_twice, output_changed_later, conv_twice, norm_twice, between], ids=lambda f: f.__name__
)
def test_what_something_else_depends_on_is_not_folded(forward, log):
    network = trained(Layers(forward, conv=conv(), norm=nn.BatchNorm2d(6)))
    assert fold(network, 3, 8, 8) is network
    assert "The BatchNorm of Layers is not folded: none follows a convolution" in log.text


@pytest.mark.parametrize(
    "layers",
    [
        {"conv": conv(), "norm": nn.BatchNorm2d(6)},
        {"conv": conv(bias=False, groups=3), "norm": nn.BatchNorm2d(6, affine=False)},
        {"conv": conv(padding_mode="reflect"), "norm": nn.BatchNorm2d(6, eps=0.1)},
        {"conv": conv(), "norm": nn.SyncBatchNorm(6)},
        {"conv": conv(), "norm": BatchNormAct2d(6, act_layer=nn.SiLU)},
    ],
    ids=["plain", "without affine", "reflect", "synchronised", "activation"],
)
def test_the_layers_options_are_kept(layers):
    network = trained(Layers(straight, **layers))
    folded = fold(network, 3, 8, 8)
    assert folded is not network and not norms(folded)
    assert folded.layers["conv"].bias is not None


@pytest.mark.parametrize(
    ("norm", "dimensions", "folds"),
    [
        (nn.BatchNorm1d(5), (4,), True),
        (nn.BatchNorm1d(5, affine=False), (4,), True),
        (nn.BatchNorm1d(5), (5, 4), False),
    ],
    ids=["linear", "without affine", "channels that are no features"],
)
def test_linear_layers(norm, dimensions, folds):
    network = trained(nn.Sequential(nn.Linear(4, 5), norm, nn.ReLU(), nn.Linear(5, 3)))
    assert (fold(network, *dimensions) is not network) == folds


def test_layers_that_make_their_weight_or_are_watched_stay(log):
    for layer in (weight_norm(conv()), nn.utils.spectral_norm(conv())):
        network = trained(Layers(straight, conv=layer, norm=nn.BatchNorm2d(6)))
        # torch's older spectral norm cannot be copied, which is a reason as well.
        assert fold_batchnorm(network, lambda model: model(torch.ones(2, 3, 8, 8))) is network
    network = trained(Layers(straight, conv=conv(), norm=nn.BatchNorm2d(6)))
    network.layers["conv"].register_forward_hook(lambda module, args, output: output + 1)
    assert fold(network, 3, 8, 8) is network


def test_batch_statistics_are_not_folded():
    network = Layers(straight, conv=conv(), norm=nn.BatchNorm2d(6, track_running_stats=False)).eval()
    assert fold(network, 3, 8, 8) is network


def test_a_network_without_batchnorm_or_that_cannot_be_copied_says_so(log):
    network = ConvNet(norm=False).eval()
    assert fold(network, 3, 8, 8) is network
    assert "The BatchNorm of ConvNet is not folded: it has none. It runs as it is." in log.text
    network = trained(ConvNet())
    network.lock = (item for item in ())
    assert fold(network, 3, 8, 8) is network
    assert "a copy of it cannot be run on the CPU (TypeError: cannot pickle 'generator' object)" in log.text


def test_logits_that_would_move_are_refused(log):
    class Rereads(ConvNet):
        """Uses its convolution's weight once more."""

        def forward(self, x):
            return super().forward(x) * self.conv.weight.sum()

    network = trained(Rereads())
    assert fold(network, 3, 8, 8) is network
    assert "is not folded: that would change its logits by" in log.text


def test_half_precision_is_folded_in_fp32_and_fp64_stays():
    network = trained(ConvNet())
    example = torch.randn(2, 3, 8, 8)

    def run(model):
        return model(example.to(next(model.parameters())))

    exact, half = fold_batchnorm(network, run), copy.deepcopy(network).bfloat16()
    folded = fold_batchnorm(half, run)
    assert {parameter.dtype for parameter in folded.parameters()} == {torch.bfloat16} and not norms(folded)
    torch.testing.assert_close(folded.conv.weight.float(), exact.conv.weight, rtol=0.02, atol=0.01)
    double = copy.deepcopy(network).double()
    with torch.no_grad():
        torch.testing.assert_close(run(fold_batchnorm(double, run)), run(double), rtol=0, atol=1e-12)
