"""What the launcher asked for, compared with what is running: some launches go wrong without a word."""

from __future__ import annotations

import os

import torch
from accelerate import PartialState
from accelerate.utils import DistributedType, get_int_from_env, parse_flag_from_env
from transformers import TrainingArguments


# torchrun and `accelerate launch` set the first, MPI the others.
_COUNTS = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")


def launched_processes() -> int:
    """How many processes the launcher says there are, on all machines."""
    return get_int_from_env(_COUNTS, 1)


def runs_on_cpus() -> bool:
    """Whether several processes were launched where there are none of the accelerators that Accelerate joins.

    Accelerate lets each of them train alone unless ``use_cpu`` is set.
    """
    if launched_processes() == 1:
        return False
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return accelerator is None or accelerator.type == "mps"


def check_launch(args: TrainingArguments) -> None:
    """Compare what the launcher asked for, processes and engine, with what is running.

    Args:
        args: the configuration, whose ``distributed_state`` is what runs; before or after the trainer has made its
            accelerator.

    Raises:
        RuntimeError: if FSDP or DeepSpeed was asked for and another engine runs; if `accelerate launch` was asked for
            several processes and started one; if processes were started that have not found together and would each
            train alone, into the same folder.
    """
    launched, running = launched_processes(), args.world_size
    on_cpus = f"`accelerate launch --multi_gpu --num_processes {max(2, launched)} SCRIPT.py`"
    engine = PartialState().distributed_type
    # Accelerate turns the type of a group of GPUs into FSDP's when the accelerator is made; these it never does.
    if _asks_for_fsdp(args) and engine in (DistributedType.NO, DistributedType.MULTI_CPU):
        raise RuntimeError(
            f"FSDP was asked for and is not running ({_described(engine, running)} is), since Accelerate shards on "
            "GPUs alone: there, start the script with `accelerate launch --config_file FSDP2.yaml SCRIPT.py` and "
            f"without use_cpu; on CPUs train with DDP, by {on_cpus}."
        )
    # Without a launcher, DeepSpeed's type is set no sooner than the accelerator is made, unless the CPU was asked for.
    on_cpu = args.use_cpu or parse_flag_from_env("ACCELERATE_USE_CPU")
    if _asks_for_deepspeed(args) and engine != DistributedType.DEEPSPEED and on_cpu:
        raise RuntimeError(
            f"DeepSpeed was asked for and is not running ({_described(engine, running)} is), since Accelerate leaves "
            "it out on CPUs: on GPUs, start the script with `accelerate launch --config_file DEEPSPEED.yaml "
            f"SCRIPT.py` and without use_cpu; on CPUs train with DDP, by {on_cpus}."
        )
    if _started_one_of_several():
        raise RuntimeError(
            "`accelerate launch` was asked for several processes and has started one, as it does for CPUs without "
            f"MPI: start two, on CPUs too, by {on_cpus}; or, if one process is what you want, ask for "
            "--num_processes 1 and --num_machines 1, without MASTER_ADDR and MASTER_PORT in the environment."
        )
    if running != launched:
        given = next((name for name in _COUNTS if name in os.environ), _COUNTS[0])
        raise RuntimeError(
            f"The launcher started {launched} processes ({given}) and {running} found together, so that each would "
            f"train alone, into the same folder: start them by {on_cpus}, on CPUs too (--num_machines as well, if "
            f"there are several); or, if one process is what you want, start it without {given} in the environment."
        )


def _asks_for_fsdp(args: TrainingArguments) -> bool:
    return args.fsdp_plugin_args is not None or parse_flag_from_env("ACCELERATE_USE_FSDP")


def _asks_for_deepspeed(args: TrainingArguments) -> bool:
    return args.deepspeed_plugin is not None or parse_flag_from_env("ACCELERATE_USE_DEEPSPEED")


def _started_one_of_several() -> bool:
    """The traces of `accelerate launch` starting one process, asked for more: a meeting point, and no count."""
    from_this_launcher = "ACCELERATE_USE_CPU" in os.environ and "ACCELERATE_MIXED_PRECISION" in os.environ
    has_meeting_point = "MASTER_ADDR" in os.environ and "MASTER_PORT" in os.environ
    return from_this_launcher and has_meeting_point and not any(name in os.environ for name in _COUNTS)


def _described(engine: DistributedType, processes: int) -> str:
    if engine == DistributedType.NO:
        return "training in one process"
    return f"DDP in {processes} processes" if engine == DistributedType.MULTI_CPU else str(engine.value)
