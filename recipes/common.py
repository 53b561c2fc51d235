"""What recipes share: arguments from a YAML file and the command line, their mistakes, batches, checkpoints."""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import gc
import os
import re
import signal
import sys
import time
import typing
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import yaml
from accelerate.utils import get_int_from_env
from transformers import HfArgumentParser

from hf_kd.checkpoints import checkpoints, last_complete
from hf_kd.text import one_line


# Settings that exclude each other: one that is given takes the place of the other from a weaker source.
ALTERNATIVES = (
    ("gamma", "temperature"),
    ("lr_milestones", "lr_scheduler_type"),
    ("dataset_name", "train_dir"),
    ("dataset_name", "val_dir"),
)

_MOST_WORKERS = 16


# ---- Mistakes ------------------------------------------------------------------------------------------------------


@contextmanager
def mistakes_end_the_run() -> Iterator[None]:
    """Errors of the body, which reads arguments and builds what they name, end the program: a sentence and status 2.

    Only one process of each machine says the sentence; the others would repeat it.
    """
    try:
        yield
    except (ValueError, OSError, RuntimeError, ImportError) as error:
        # A device's own errors are no mistake in the arguments, and want their traceback.
        if isinstance(error, (torch.OutOfMemoryError, getattr(torch, "AcceleratorError", torch.OutOfMemoryError))):
            raise
        if get_int_from_env(["LOCAL_RANK"], 0) == 0:
            print(f"{Path(sys.argv[0]).name}: error: {one_line(error)}", file=sys.stderr, flush=True)
        else:
            # A launcher stops all processes when the first one ends: that should not be one that says nothing.
            time.sleep(3)
        sys.exit(2)


@contextmanager
def interruption_says_how_to_go_on(folder: str) -> Iterator[None]:
    """Ctrl-C in the body, which trains, ends the program with a sentence and status 130."""
    try:
        yield
    except KeyboardInterrupt:
        if get_int_from_env(["LOCAL_RANK"], 0) == 0:
            last = last_complete(folder)
            how = (
                f"{last} is the last complete checkpoint: the same command with --resume_from_checkpoint last goes on "
                "from it"
                if last
                else f"{folder} holds no complete checkpoint yet"
            )
            print(f"{Path(sys.argv[0]).name}: interrupted; {how}.", file=sys.stderr, flush=True)
        sys.exit(128 + signal.SIGINT)


def leave_process_group() -> None:
    """End the processes' connection, once whatever used it is out of scope.

    The group's threads are joined when nothing refers to it any more. One of gloo's that still lets go of a tensor
    while Python ends would abort the process, and a run that had done all its work would count as failed.
    """
    gc.collect()
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def did_you_mean(wanted: str, names: Sequence[str], prefix: str = "") -> str:
    """ " (did you mean …?)" with the nearest of the names, or nothing if none is near."""
    near = difflib.get_close_matches(wanted, names, n=1)
    return f" (did you mean {prefix}{near[0]}?)" if near else ""


# ---- Arguments -----------------------------------------------------------------------------------------------------


class RecipeParser(HfArgumentParser):
    """HfArgumentParser for fields that come from a YAML file, the command line and the recipe's own defaults.

    Args:
        dataclass_types: their fields are the options; one must be ``config``, the YAML file.
        defaults: the recipe's own, in place of the classes'.
        kwargs: of argparse.
    """

    def __init__(self, dataclass_types: Sequence[type], defaults: Mapping[str, Any], **kwargs: Any) -> None:
        super().__init__(dataclass_types, allow_abbrev=False, **kwargs)
        self.set_defaults(**defaults)
        self.own_defaults = dict(defaults)
        self.hints = {key: hint for cls in self.dataclass_types for key, hint in typing.get_type_hints(cls).items()}

    def error(self, message: str) -> typing.NoReturn:
        raise ValueError(message)

    @property
    def options(self) -> dict[str, argparse.Action]:
        """Every field's option, by the field's name."""
        return {action.dest: action for action in reversed(self._actions) if action.dest != "help"}

    def read_command_line(self, argv: Sequence[str] | None = None) -> dict[str, Any]:
        """The values that are given there, and no others; ValueError with the nearest option for an unknown one."""
        unset = object()
        # With every field set beforehand argparse fills in no default.
        namespace = argparse.Namespace(**dict.fromkeys(self.options, unset))
        namespace, unknown = self.parse_known_args(argv, namespace)
        if unknown:
            name = unknown[0].partition("=")[0]
            near = did_you_mean(name.removeprefix("--"), list(self.options), "--") if name.startswith("--") else ""
            raise ValueError(f"There is no argument {name}{near}; --help lists them.")
        return {key: value for key, value in vars(namespace).items() if value is not unset}

    def read_yaml(self, path: Path) -> dict[str, Any]:
        """The values in a YAML file of field names, checked and converted as those of the command line are.

        Raises:
            ValueError: for a file that is missing or no mapping, a key that is no field (with the nearest one that
                is), and a value of the wrong type.
        """
        if not path.is_file():
            beside = ", ".join(sorted(file.name for file in path.parent.glob("*.yaml")))
            raise ValueError(f"--config {path} does not exist" + (f"; beside it are {beside}." if beside else "."))
        try:
            content = yaml.safe_load(path.read_text(encoding="utf-8"))
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise ValueError(f"{path} is not a YAML file: {one_line(error)}") from error
        content = {} if content is None else content
        if not isinstance(content, dict):
            raise ValueError(f"{path} must hold `key: value` lines, got a {type(content).__name__}.")
        allowed = [name for name in self.options if name != "config"]
        values, tokens = {}, []
        for key, value in content.items():
            if key not in allowed:
                raise ValueError(f"{path} has the unknown key {str(key)!r}{did_you_mean(str(key), allowed)}.")
            if value is None and type(None) not in typing.get_args(self.hints[key]):
                raise ValueError(f"{path} gives {key!r} no value: give one, or leave the line out.")
            several = self.options[key].nargs == "+"
            if value is None or (isinstance(value, (dict, list)) and not several and self._takes(key, type(value))):
                values[key] = value
            elif several:
                tokens += [f"--{key}", *map(str, value if isinstance(value, list) else [value])]
            else:
                tokens.append(f"--{key}={value}")
        try:
            return {**values, **self.read_command_line(tokens)}
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error

    def _takes(self, key: str, kind: type) -> bool:
        return any(typing.get_origin(hint) is kind or hint is kind for hint in typing.get_args(self.hints[key]))

    def build(self, cls: type, values: Mapping[str, Any]) -> Any:
        """An instance of one of the classes from those of the values that are its fields."""
        names = {field.name for field in dataclasses.fields(cls) if field.init}
        return cls(**{key: value for key, value in values.items() if key in names})


def merge(*layers: Mapping[str, Any]) -> dict[str, Any]:
    """Values from several sources, later ones stronger, minding ALTERNATIVES."""
    merged: dict[str, Any] = {}
    for layer in layers:
        for pair in ALTERNATIVES:
            for given, other in (pair, pair[::-1]):
                if given in layer and other not in layer:
                    merged.pop(other, None)
        merged.update(layer)
    return merged


# ---- Processes, batches, workers -----------------------------------------------------------------------------------


def share_batch(
    total: int, processes: int, per_device: int | None, accumulation: int | None, *, total_given: bool
) -> tuple[int, int, int]:
    """How the samples of an optimiser step are spread: in all, per device at once, and batches accumulated.

    Args:
        total: samples of a step over all processes.
        per_device, accumulation: the user's wish, or None; what is left open follows from the total.
        total_given: whether the total is the user's wish too, rather than the recipe's default.

    Raises:
        ValueError: if it does not come out even, or the three contradict each other.
    """
    for name, value in (
        ("total_batch_size", total),
        ("per_device_train_batch_size", per_device),
        ("gradient_accumulation_steps", accumulation),
    ):
        if value is not None and value < 1:
            raise ValueError(f"`{name}` must be at least 1, got {value}.")
    several = f"{processes} process" + ("es" if processes > 1 else "")
    if per_device is not None and accumulation is not None:
        product = processes * per_device * accumulation
        if total_given and product != total:
            raise ValueError(
                f"`total_batch_size` is {total}, but {several} × per_device_train_batch_size {per_device} "
                f"× gradient_accumulation_steps {accumulation} are {product}: leave one of the three out."
            )
        return product, per_device, accumulation
    if per_device is None and accumulation is None:
        accumulation = 1
    known = processes * (per_device or accumulation or 1)
    if total % known:
        each = "per_device_train_batch_size" if per_device else "gradient_accumulation_steps"
        detail = f" × {each} {known // processes}" if known > processes else ""
        raise ValueError(
            f"`total_batch_size` {total} cannot be shared equally by {several}{detail}: make it a multiple "
            f"of {known} (such as {max(1, total // known) * known}), or change their number."
        )
    return total, per_device or total // known, accumulation or total // known


def default_workers() -> int:
    """Loader workers for each process: the cores that it may use, shared with the others on its machine."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(_MOST_WORKERS, cores // max(1, get_int_from_env(["LOCAL_WORLD_SIZE"], 1))))


# ---- Checkpoints ---------------------------------------------------------------------------------------------------


def find_checkpoint(folder: str, resume: str | None) -> str | None:
    """The checkpoint to go on from: "True" or "last" is the last complete one in the output folder, if there is one.

    Raises:
        ValueError: for a path that is no checkpoint, and if the folder holds checkpoints that nobody asked to go on
            from: Trainer keeps those with the highest step numbers, and would throw away the new run's instead.
    """
    wish = (resume or "").strip()
    if wish.lower() in ("", "false", "no"):
        found = checkpoints(folder)
        if found:
            raise ValueError(
                f"{folder} holds {found[0].name} of an earlier run: go on from it with --resume_from_checkpoint "
                "last, or choose another --output_dir."
            )
        return None
    if wish.lower() in ("true", "last", "yes"):
        last = last_complete(folder)
        return None if last is None else str(last)
    if not (Path(wish).expanduser() / "trainer_state.json").is_file():
        raise ValueError(
            f"--resume_from_checkpoint {wish} is not a checkpoint (a folder with trainer_state.json): give one, or "
            f'"last" for the last one in {folder}.'
        )
    return str(Path(wish).expanduser())


def folder_name(*parts: str) -> str:
    """One name for a folder out of model names and paths: "hf-hub:owner/resnet34.tv" gives "resnet34"."""
    names = [re.split(r"[/\\:]", part.rstrip("/\\"))[-1].partition(".")[0] or "model" for part in parts]
    return re.sub(r"[^\w.-]+", "-", "_".join(names))
