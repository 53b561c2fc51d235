"""The CIFAR networks of the CRD protocol (Tian et al. 2020, arXiv:1910.10699), as timm models ``cifar_*``.

Importing this package registers them: ``timm.create_model("cifar_resnet8", num_classes=100)``. Their tensors have the
names and shapes of the protocol's published CIFAR-100 teachers, which therefore load as they are::

    Teacher.from_pretrained("cifar_resnet32x4", num_classes=100, checkpoint=".../ckpt_epoch_240.pth")

The features that the protocol's losses take are outputs of these submodules (``network.feature_names()`` lists them,
``feature_info`` says their shapes, and ``forward_intermediates`` returns the maps after activation):

==============================  ======================================================  ===============================
network                         features                                                before activation, the same but
==============================  ======================================================  ===============================
cifar_resnet8, ..., 110, NxM    act1, layer1, layer2, layer3, global_pool               layerN.<last block>.join
cifar_resnet50                  act1, layer1, layer2, layer3, layer4, global_pool       layerN.<last block>.join
cifar_wrn_*                     conv1, block1, block2, block3, global_pool              block2.layer.0.bn1,
                                                                                        block3.layer.0.bn1, bn1
cifar_vgg*                      act0, act1, act2, act3, act4, global_pool               act0, block1, ..., block4
cifar_mobilenetv2               conv1, blocks.1, blocks.2, blocks.4, blocks.6,          (the same)
                                global_pool
cifar_shufflenetv1, v2          act1, layer1, layer2, layer3, global_pool               layerN.<last block>.join
==============================  ======================================================  ===============================
"""

from __future__ import annotations

from typing import Any

from timm.models import build_model_with_cfg, generate_default_cfgs, register_model

from .blocks import CifarNet
from .mobilenet import MobileNetV2
from .resnet import BottleneckResNet, ResNet, WideResNet
from .shufflenet import ShuffleNetV1, ShuffleNetV2
from .vgg import VGG


__all__ = ["CIFAR100_MEAN", "CIFAR100_STD", "CifarNet"]

CIFAR100_MEAN = (0.5071, 0.4867, 0.4408)
CIFAR100_STD = (0.2675, 0.2565, 0.2761)

_X4 = (32, 64, 128, 256)
_NETWORKS: dict[str, tuple[type[CifarNet], dict[str, Any]]] = {
    # Depth 6 n + 2: three stages of n blocks of two convolutions, the stem, the classifier.
    **{f"cifar_resnet{n}": (ResNet, {"layers": ((n - 2) // 6,) * 3}) for n in (8, 14, 20, 32, 44, 56, 110)},
    **{f"cifar_resnet{n}x4": (ResNet, {"layers": ((n - 2) // 6,) * 3, "widths": _X4}) for n in (8, 32)},
    "cifar_resnet50": (BottleneckResNet, {"layers": (3, 4, 6, 3), "widths": (64, 64, 128, 256, 512)}),
    **{f"cifar_wrn_{n}_{k}": (WideResNet, {"depth": n, "width": k}) for n in (16, 40) for k in (1, 2)},
    "cifar_vgg8": (VGG, {"layers": (1, 1, 1, 1, 1)}),
    "cifar_vgg11": (VGG, {"layers": (1, 1, 2, 2, 2)}),
    "cifar_vgg13": (VGG, {"layers": (2, 2, 2, 2, 2)}),
    "cifar_vgg16": (VGG, {"layers": (2, 2, 3, 3, 3)}),
    "cifar_vgg19": (VGG, {"layers": (2, 2, 4, 4, 4)}),
    "cifar_mobilenetv2": (MobileNetV2, {"width": 0.5}),
    "cifar_shufflenetv1": (ShuffleNetV1, {}),
    "cifar_shufflenetv2": (ShuffleNetV2, {}),
}

# Under this name timm looks for them. No weights: those that are published are files, not repositories of the Hub.
default_cfgs = generate_default_cfgs(
    {
        name: {
            "num_classes": 100,
            "input_size": (3, 32, 32),
            "pool_size": family.pool_size,
            "crop_pct": 1.0,
            "interpolation": "bilinear",
            "mean": CIFAR100_MEAN,
            "std": CIFAR100_STD,
            "first_conv": family.first_conv,
            "classifier": family.classifier_name,
        }
        for name, (family, _) in _NETWORKS.items()
    }
)


def _register(name: str, family: type[CifarNet], arguments: dict[str, Any]) -> None:
    def entry_point(pretrained: bool = False, **kwargs: Any) -> CifarNet:
        features = {"out_indices": tuple(range(family.num_stages + 1)), "feature_cls": "getter"}
        return build_model_with_cfg(family, name, pretrained, feature_cfg=features, **{**arguments, **kwargs})

    entry_point.__name__ = entry_point.__qualname__ = name
    entry_point.__doc__ = f"{name}, a :class:`{family.__name__}`; further arguments are those of :class:`CifarNet`."
    globals()[name] = register_model(entry_point)


for _name, _built_of in _NETWORKS.items():
    _register(_name, *_built_of)
