"""Channels last: the layout in memory that convolutions are often faster in. Values and shapes stay what they are."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import convert_conv2d_weight_memory_format
from transformers.utils import logging

from .text import first_line
from .timing import WORTH_IT, ratios


logger = logging.get_logger(__name__)


def has_convolutions(network: nn.Module) -> bool:
    """Whether the layout of images matters to a network."""
    return any(isinstance(module, (nn.Conv2d, nn.ConvTranspose2d)) for module in network.modules())


def weights_in_channels_last(network: nn.Module) -> None:
    """Lay the weights of a network's 2-d convolutions out as channels last, in place: the same parameters."""
    convert_conv2d_weight_memory_format(network, torch.channels_last)


def in_channels_last(value: Any) -> Any:
    """A batch of images (B, C, H, W) as channels last, itself if it is so already; anything else as it is."""
    if isinstance(value, Tensor) and value.dim() == 4:
        return value.contiguous(memory_format=torch.channels_last)
    return value


def channels_last_is_faster(
    network: nn.Module,
    batch: Mapping[str, Any],
    logits: Callable[[nn.Module, Mapping[str, Any]], Tensor],
    device: torch.device,
) -> bool:
    """Whether a network trains in at least 3 % less time in channels last: measured on copies of it, and logged.

    Args:
        network: is left as it is.
        logits: gives a network's logits for a batch.
    """
    if not has_convolutions(network):
        return False
    ways = {}
    try:
        for channels_last in (False, True):
            copied = copy.deepcopy(network).train()
            for module in copied.modules():
                if isinstance(module, nn.SyncBatchNorm):
                    # It would wait for the other processes, which take no part.
                    module.eval()
            if channels_last:
                weights_in_channels_last(copied)

            def way(copied: nn.Module = copied, channels_last: bool = channels_last) -> None:
                inputs = {key: in_channels_last(value) if channels_last else value for key, value in batch.items()}
                logits(copied, inputs).float().square().mean().backward()
                copied.zero_grad()

            way()
            ways[channels_last] = way
    except (TypeError, RuntimeError) as error:  # what copy.deepcopy raises
        logger.warning("Channels last is left out: a copy of the student cannot be run (%s).", first_line(error))
        return False
    ratio = ratios(ways, device)[True]
    chosen = "taken" if ratio < WORTH_IT else "left out"
    logger.warning("A step of the student takes %.2f of the time in channels last, which is %s.", ratio, chosen)
    return ratio < WORTH_IT
