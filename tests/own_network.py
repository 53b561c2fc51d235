"""A network that timm knows once this module is imported."""

from timm.models import register_model
from timm.models.byobnet import test_byobnet


@register_model
def owl_net(pretrained=False, **kwargs):
    network = test_byobnet(pretrained=False, **kwargs)
    network.pretrained_cfg = {**network.pretrained_cfg, "architecture": "owl_net"}
    return network
