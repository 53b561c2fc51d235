"""What a student's repository holds: the files of its folder that are published, and those that never are."""

from __future__ import annotations

import fnmatch
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path, PurePath
from typing import Any

from transformers import AutoModelForImageClassification, TrainingArguments

from .model_card import PROVENANCE, README
from .student import CONFIG, WEIGHTS, save_student
from .text import first_line, some


TRAINING_ARGS = "training_args.json"
"""The run's arguments, as they may be published."""

_WEIGHTS = (WEIGHTS, "model-*-of-*.safetensors", f"{WEIGHTS}.index.json")
_SETTINGS = (
    CONFIG,
    *("generation_config.json", "preprocessor_config.json", "processor_config.json", "special_tokens_map.json"),
    *("tokenizer.json", "tokenizer_config.json", "added_tokens.json", "vocab.json", "vocab.txt", "merges.txt"),
    *("spiece.model", "tokenizer.model", "sentencepiece.bpe.model"),
)
_RECORDS = (PROVENANCE, TRAINING_ARGS)
_TEXTS = (README, "LICENSE*", ".eval_results/*.yaml", "figures/*.png")
_PUBLISHED = (*_WEIGHTS, *_SETTINGS, *_RECORDS, *_TEXTS)
# What other ways of saving leave in a repository: pickles, and the state of a training that nobody else can use.
_PICKLES = (
    *("pytorch_model*.bin", "pytorch_model.bin.index.json", "training_args.bin"),
    *("optimizer.*", "scheduler.pt", "scaler.pt", "rng_state*.pth"),
)

_SECRET = re.compile(r"(^|_)(token|key|secret|password)$")


def files_of(folder: str | os.PathLike[str]) -> tuple[dict[str, Path], list[str]]:
    """The files of a student's folder that are published, by their path in the repository, and the rest's names."""
    folder = Path(folder)
    found: dict[str, Path] = {}
    left_out: list[str] = []
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if not path.is_file():
            continue
        if _matches(name, _PUBLISHED):
            found[name] = path
        else:
            # Of a checkpoint's folder, say, its name is enough.
            left_out.append(name if "/" not in name else f"{name.split('/')[0]}/")
    return found, list(dict.fromkeys(left_out))


def replaced_by(files: Mapping[str, Any], present: Mapping[str, Any] | set[str]) -> list[str]:
    """Files of a repository that contradict the ones to be published: other weights, settings, and pickles."""
    return sorted(
        name for name in present if name not in files and _matches(name, (*_WEIGHTS, *_SETTINGS, *_RECORDS, *_PICKLES))
    )


def holds_weights(present: Mapping[str, Any] | set[str]) -> bool:
    return any(_matches(name, (*_WEIGHTS, "*.bin", "*.pt", "*.pth", "*.safetensors")) for name in present)


def check_folder(folder: str | os.PathLike[str]) -> None:
    """Refuse a folder that holds no student that could be published.

    Raises:
        ValueError: if it does not exist, has no safetensors weights, or its config.json cannot be read.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"The student's folder {folder} does not exist: give the folder that save_model() wrote.")
    files, left_out = files_of(folder)
    if not any(_matches(name, _WEIGHTS[:2]) for name in files):
        pickles = [name for name in left_out if _matches(name, _PICKLES)]
        why = f"only {some(pickles, 3)}, and pickles are not published" if pickles else "no weights"
        raise ValueError(
            f"The folder {folder} holds no {WEIGHTS} ({why}): save the student with trainer.save_model() or "
            "hf_kd.save_student(model, folder)."
        )
    if CONFIG in files:
        read_json(files[CONFIG])


def mend_wrapped(folder: str | os.PathLike[str], target: str | os.PathLike[str]) -> bool:
    """Write a timm network that only some libraries would open into ``target``, in the form that all of them open.

    transformers saves a wrapped timm network in a form of its own, and timm's configuration names the class count in a
    place that transformers refuses. Whether there was something to mend.

    Raises:
        ValueError: if no library opens the folder.
    """
    folder = Path(folder)
    if not (folder / CONFIG).is_file():
        return False
    config = read_json(folder / CONFIG)
    if "architecture" not in config:
        return False
    labels, arguments, cfg = (
        config.get("label_names"),
        config.get("model_args", {}),
        config.get("pretrained_cfg") or {},
    )
    if (
        isinstance(config.get("num_classes"), int)
        and isinstance(labels, list)
        and len(labels) == config["num_classes"]
        and arguments is not None
        and "num_classes" not in arguments
        and {"input_size", "mean", "std"} <= cfg.keys()
    ):
        return False
    if config.get("model_type") != "timm_wrapper":
        # timm's own form: all it lacks can be said in the configuration.
        number = config.get("num_classes") or cfg.get("num_classes")
        if isinstance(labels, dict):
            labels = list(labels.values())
        if not isinstance(number, int) or not {"input_size", "mean", "std"} <= cfg.keys():
            raise ValueError(
                f"{folder / CONFIG} does not say how many classes the network has, or how its images are normalised: "
                "save the student with hf_kd.save_student(model, folder)."
            )
        if not isinstance(labels, list) or len(labels) != number:
            labels = [f"LABEL_{label}" for label in range(number)]
        arguments = {key: value for key, value in (arguments or {}).items() if key != "num_classes"}
        mended = {**config, "num_classes": number, "label_names": labels, "model_args": arguments}
        Path(target, CONFIG).write_text(json.dumps(mended, indent=2) + "\n", encoding="utf-8")
        return True
    try:
        model = AutoModelForImageClassification.from_pretrained(folder)
    except Exception as error:
        raise ValueError(
            f"The student in {folder} cannot be opened ({first_line(error)}): save it with hf_kd.save_student(model, "
            "folder)."
        ) from error
    save_student(model, target)
    return True


def read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            raise ValueError(f"it is a {type(content).__name__}")
    except ValueError as error:
        raise ValueError(f"{path} is no JSON object ({first_line(error)}): the folder is damaged.") from error
    return content


# ---- What may be said in public ------------------------------------------------------------------------------------


def public_arguments(args: TrainingArguments) -> dict[str, Any]:
    """A run's arguments without secrets, and without what only its machine knows: paths, its place among processes."""
    values = args.to_dict()
    private = ("output_dir", "local_rank", "run_name", "resume_from_checkpoint", "_n_gpu", "log_level_replica")
    return {
        name: without_paths(value)
        for name, value in values.items()
        if name not in private and not _SECRET.search(name) and value is not None
    }


def without_paths(value: Any) -> Any:
    """JSON values whose absolute paths are cut down to their last part."""
    if isinstance(value, Mapping):
        return {key: without_paths(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [without_paths(item) for item in value]
    if isinstance(value, str):
        return re.sub(r"(?<![\w:/.])(?:local-dir:)?(?:~|/|[A-Za-z]:\\)[^\s\"',;:]+", _last_part, value)
    return value


def _last_part(match: re.Match[str]) -> str:
    return PurePath(match.group(0).removeprefix("local-dir:").replace("\\", "/").rstrip("/")).name


def _matches(name: str, patterns: tuple[str, ...]) -> bool:
    # A star stays within its folder.
    return any(fnmatch.fnmatchcase(name, pattern) and name.count("/") == pattern.count("/") for pattern in patterns)
