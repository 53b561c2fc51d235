"""A teacher that does not fit on one device, spread over all processes by torch's fully_shard (FSDP2)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

import torch
from torch import distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard


# A part below this share of the whole is gathered at once; gathering it piece by piece would only take longer.
_SMALL = 1 / 8


def shard_teacher(model: nn.Module, device: torch.device) -> None:
    """Spread a network's parameters over all processes, in place, frozen.

    Each process keeps its share, on ``device``. In a forward pass the blocks are gathered one after another and let
    go of again; what is outside all blocks (stem, head) is gathered for the whole pass. All processes must make the
    same number of passes, through ``model`` itself, under ``torch.inference_mode`` or ``torch.no_grad``.

    Args:
        model: with all its parameters, the same in every process; on the CPU if it does not fit on the device.
        device: of this process.

    Raises:
        RuntimeError: if torch.distributed is not running.
    """
    if not (distributed.is_available() and distributed.is_initialized()):
        raise RuntimeError(
            "A teacher is spread over the processes of a launch (teacher_fsdp), and torch.distributed is not running: "
            "start the script with `accelerate launch` or torchrun, or leave teacher_fsdp out."
        )
    model.requires_grad_(False)
    mesh = init_device_mesh(device.type, (distributed.get_world_size(),))
    for part in (*_blocks(model, _size(model) * _SMALL), model):
        # Also the outermost, which fully_shard would by default keep whole for a backward pass.
        fully_shard(part, mesh=mesh, reshard_after_forward=True)
        assert isinstance(part, FSDPModule)
        # The memory for gathered parameters is made at the first gathering. Made in inference mode, it could be used
        # in that mode alone, and in a group of one process not even there.
        part.unshard()
        part.reshard()


def _size(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _blocks(module: nn.Module, small: float) -> Iterator[nn.Module]:
    """The blocks that networks are built of by repetition, none of which is inside another."""
    row = _row(module)
    for child in module.children():
        if _size(child) > small and any(2 * _size(m) > _size(child) and len(_row(m)) > 1 for m in child.modules()):
            yield from _blocks(child, small)
        # A list has no forward of its own, at which it could be gathered.
        elif child in row and type(child).forward is not nn.Module.forward:
            yield child


def _row(module: nn.Module) -> list[nn.Module]:
    """The children that follow one another: those of a container, or several of one class that are most of it."""
    children = [child for child in module.children() if _size(child)]
    if isinstance(module, (nn.Sequential, nn.ModuleList, nn.ModuleDict)):
        return children
    classes = Counter(type(child) for child in children if any(True for _ in child.children()))
    row = [child for child in children if classes[type(child)] > 1]
    return row if 2 * sum(map(_size, row)) > _size(module) else []
