"""Distillation losses: pure functions of logits; modules of logits, and of features, that a configuration can name."""

from .crd import CRD
from .feature import FeatureLoss, build_feature_loss, register_feature_loss
from .functional import (
    balanced_beta,
    dist_loss,
    dkd_loss,
    kd_loss,
    log_power_sum,
    nkd_loss,
    power_sum,
    power_transform,
    renyi_entropy,
    shannon_entropy,
    ttm_loss,
    wttm_loss,
)
from .itrd import ITRD
from .logit import LogitLoss, Outputs, build_loss, register_loss
from .vitkd import ViTKD


__all__ = [
    "CRD",
    "ITRD",
    "FeatureLoss",
    "LogitLoss",
    "Outputs",
    "ViTKD",
    "balanced_beta",
    "build_feature_loss",
    "build_loss",
    "dist_loss",
    "dkd_loss",
    "kd_loss",
    "log_power_sum",
    "nkd_loss",
    "power_sum",
    "power_transform",
    "register_feature_loss",
    "register_loss",
    "renyi_entropy",
    "shannon_entropy",
    "ttm_loss",
    "wttm_loss",
]
