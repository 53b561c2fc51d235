"""Distillation losses: pure functions of logits, and the same as modules that a configuration can name."""

from .functional import (
    balanced_beta,
    kd_loss,
    log_power_sum,
    power_sum,
    power_transform,
    renyi_entropy,
    shannon_entropy,
    ttm_loss,
    wttm_loss,
)
from .logit import LogitLoss, Outputs, build_loss, register_loss


__all__ = [
    "LogitLoss",
    "Outputs",
    "balanced_beta",
    "build_loss",
    "kd_loss",
    "log_power_sum",
    "power_sum",
    "power_transform",
    "register_loss",
    "renyi_entropy",
    "shannon_entropy",
    "ttm_loss",
    "wttm_loss",
]
