"""Logits of a finished run in one file of its folder, for the figures that need every sample."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers.trainer import TRAINER_STATE_NAME

from ..files import atomic_write, write_text
from ..labels import IGNORE_INDEX
from ..losses.functional import check_floating, check_gamma, log_probabilities
from ..model_card import PROVENANCE
from ..networks import unwrap
from ..reliable_trainer import changed
from ..repository import TRAINING_ARGS, public_arguments
from ..student import own_label_names
from ..text import one_line


if TYPE_CHECKING:
    from torch.utils.data import Dataset
    from transformers.trainer_utils import PredictionOutput

    from ..trainer import DistillationTrainer


LOGITS = "logits.safetensors"
"""The file's name in a run's folder."""

_FORMAT = "hf_kd logits 1"


@dataclass(frozen=True)
class SavedLogits:
    """What a network, and perhaps its teacher, says of N samples of K classes.

    Attributes:
        student: logits (N, K), floating point.
        labels: (N,) int64, -100 for a sample without a label; all -100 if there are none.
        teacher: logits (N, K) of the teacher on the same samples, or None.
        gamma: the exponent 1/T with which the run transformed the teacher, or None.
        class_names: K names, or None.

    Raises:
        ValueError: on shapes that do not go together, labels out of range, logits without a softmax (NaN, +inf, all
            -inf), gamma outside (0, 1], or another number of names than classes.
        TypeError: if logits are not floating point or labels are not integers.
    """

    student: Tensor
    labels: Tensor
    teacher: Tensor | None = None
    gamma: float | None = None
    class_names: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        _check_logits("student_logits", self.student)
        if self.labels.is_floating_point() or self.labels.is_complex() or self.labels.dtype == torch.bool:
            raise TypeError(f"`labels` must be integer class indices, got {self.labels.dtype}.")
        if self.labels.shape != self.student.shape[:1]:
            raise ValueError(
                f"`labels` of shape {tuple(self.labels.shape)} do not go with student_logits of shape "
                f"{tuple(self.student.shape)}: give one class index per sample."
            )
        classes = self.student.size(1)
        wrong = self.labels[((self.labels < 0) | (self.labels >= classes)) & (self.labels != IGNORE_INDEX)]
        if len(wrong):
            raise ValueError(
                f"`labels` holds {wrong[0].item()}, and there are {classes} classes: labels must be 0 to "
                f"{classes - 1}, or {IGNORE_INDEX} for a sample without a label."
            )
        if self.teacher is not None:
            _check_logits("teacher_logits", self.teacher)
            if self.teacher.shape != self.student.shape:
                raise ValueError(
                    f"`teacher_logits` of shape {tuple(self.teacher.shape)} do not go with student_logits of shape "
                    f"{tuple(self.student.shape)}: both must be of the same samples and classes."
                )
        if self.gamma is not None:
            check_gamma(self.gamma)
        if self.class_names is not None and len(self.class_names) != classes:
            raise ValueError(f"`class_names` has {len(self.class_names)} names for {classes} classes.")

    @property
    def has_labels(self) -> bool:
        """Whether any sample has a label."""
        return bool((self.labels != IGNORE_INDEX).any())


# ---- Saving --------------------------------------------------------------------------------------------------------


def save_logits(
    path: str | os.PathLike[str],
    student_logits: Any,
    labels: Any = None,
    teacher_logits: Any = None,
    *,
    gamma: float | None = None,
    class_names: Sequence[str] | None = None,
) -> Path:
    """Write logits of a run for ``python -m hf_kd.analysis``; the file is whole or not there.

    :func:`save_run` does it for a trainer, and :func:`save_predictions` for what ``trainer.predict`` returns.

    Args:
        path: the run's folder, made if it is not there, or a file whose name ends in ``.safetensors``.
        student_logits: (N, K), a tensor or array of floats.
        labels: (N,) class indices, -100 for a sample without one; None if there are none.
        teacher_logits: (N, K), or None.
        gamma: the exponent 1/T of the run's transformed teacher.
        class_names: K names.

    Returns:
        The file's path.

    Raises:
        ValueError, TypeError: as :class:`SavedLogits` does.
    """
    student = _tensor("student_logits", student_logits)
    if labels is None:
        labels = torch.full(student.shape[:1], IGNORE_INDEX)
    saved = SavedLogits(
        student,
        _tensor("labels", labels),
        None if teacher_logits is None else _tensor("teacher_logits", teacher_logits),
        gamma,
        None if class_names is None else tuple(map(str, class_names)),
    )
    tensors = {"student_logits": saved.student, "labels": saved.labels.long()}
    if saved.teacher is not None:
        tensors["teacher_logits"] = saved.teacher
    notes = {"gamma": saved.gamma, "class_names": saved.class_names}
    metadata = {"format": _FORMAT, **{key: json.dumps(value) for key, value in notes.items() if value is not None}}
    path = _file(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as draft:
        save_file({name: tensor.contiguous().clone() for name, tensor in tensors.items()}, draft, metadata)
    return path


def save_predictions(
    path: str | os.PathLike[str],
    output: PredictionOutput,
    *,
    gamma: float | None = None,
    class_names: Sequence[str] | None = None,
) -> Path:
    """:func:`save_logits` of what ``trainer.predict`` returns: logits, or the pair (student's, teacher's).

    The pair comes with ``teacher_metrics=True`` in the configuration::

        save_predictions("out", trainer.predict(test), gamma=0.25)

    On several processes ``predict`` is called on all of them, and this on the first alone
    (``trainer.is_world_process_zero()``).
    """
    student, teacher = _pair(output.predictions)
    return save_logits(path, student, output.label_ids, teacher, gamma=gamma, class_names=class_names)


def save_run(
    trainer: DistillationTrainer,
    dataset: Dataset,
    *,
    teacher_logits: Any = None,
    path: str | os.PathLike[str] | None = None,
) -> Path:
    """Leave in a folder what the figures are drawn from: the log of the training, how it came about, and logits.

    To be called after ``trainer.train()``, on every process. Without a call the figures of the logits cannot be drawn,
    and with ``save_strategy="no"`` none at all.

    Args:
        trainer: its student predicts ``dataset``, and so does its teacher if it has one.
        dataset: the samples, usually the test set, in the order in which all runs to be compared see them.
        teacher_logits: (N, K), where the teacher's are there already (or it could not answer for these samples).
        path: the folder; by default the run's ``output_dir``.

    Returns:
        The path of the file of logits.
    """
    folder = Path(trainer.args.output_dir if path is None else path)
    own = trainer.compute_metrics, trainer.preprocess_logits_for_metrics
    # A user's own would be given pairs of logits, and may cut them down.
    trainer.compute_metrics = trainer.preprocess_logits_for_metrics = None
    try:
        with changed(trainer.args, teacher_metrics=teacher_logits is None):
            output = trainer.predict(dataset)
    finally:
        trainer.compute_metrics, trainer.preprocess_logits_for_metrics = own
    if trainer.is_world_process_zero():
        _write_records(trainer, folder)
        student, of_teacher = _pair(output.predictions)
        teacher_logits = of_teacher if teacher_logits is None else teacher_logits
        names = _class_names(trainer.model, student.shape[-1])
        save_logits(folder, student, output.label_ids, teacher_logits, gamma=trainer.args.gamma, class_names=names)
    return folder / LOGITS


def _write_records(trainer: DistillationTrainer, folder: Path) -> None:
    """The log, and what the run is called by: an older run's in the same folder would be taken for this one's."""
    folder.mkdir(parents=True, exist_ok=True)
    with atomic_write(folder / TRAINER_STATE_NAME) as draft:
        trainer.state.save_to_json(str(draft))
    write_text(folder / TRAINING_ARGS, json.dumps(public_arguments(trainer.args), indent=2) + "\n")
    provenance, saved = trainer.provenance(), {}
    with suppress(OSError, ValueError):
        saved = json.loads((folder / PROVENANCE).read_text(encoding="utf-8"))
    # A card may have left more in it.
    if any(saved.get(key) != value for key, value in provenance.items()):
        write_text(folder / PROVENANCE, json.dumps(provenance, indent=2) + "\n")


def _pair(predictions: Any) -> tuple[Any, Any]:
    """The student's logits and the teacher's, or None, of what ``predict`` gives."""
    if not isinstance(predictions, (tuple, list)):
        return predictions, None
    if len(predictions) != 2:
        raise ValueError(
            f"The predictions are {len(predictions)} arrays, not logits or the pair (student's, teacher's): pass what "
            "DistillationTrainer.predict returns, or the logits to save_logits."
        )
    return predictions[0], predictions[1]


def _class_names(model: Any, classes: int) -> list[str] | None:
    """The names of a network's classes, if it has as many."""
    network = unwrap(model)
    names = getattr(getattr(network, "config", None), "id2label", None)
    if names is None:
        names = (getattr(network, "pretrained_cfg", None) or {}).get("label_names") or {}
    # transformers keeps them by number.
    names = own_label_names([names[number] for number in range(classes)] if len(names) == classes else [])
    return names or None


# ---- Loading -------------------------------------------------------------------------------------------------------


def load_logits(path: str | os.PathLike[str]) -> SavedLogits:
    """What :func:`save_logits` wrote into a folder or file.

    Raises:
        ValueError: if there is no such file, or it is damaged or something else, in one sentence.
    """
    path = _file(path)
    if not path.is_file():
        raise ValueError(
            f"There is no {path}: make it with hf_kd.analysis.save_run(trainer, test_set), or with save_logits."
        )
    try:
        with safe_open(path, framework="pt") as file:
            metadata, names = file.metadata() or {}, file.keys()
            tensors = {name: file.get_tensor(name) for name in names}
        if metadata.get("format") != _FORMAT:
            raise ValueError("it was not written by hf_kd.analysis.save_logits")
        gamma, class_names = (json.loads(metadata.get(key, "null")) for key in ("gamma", "class_names"))
        return SavedLogits(
            tensors["student_logits"],
            tensors["labels"],
            tensors.get("teacher_logits"),
            gamma,
            None if class_names is None else tuple(class_names),
        )
    except KeyError as error:
        raise ValueError(f"{path} cannot be used: it lacks {error}; save the logits again.") from error
    except (SafetensorError, ValueError, TypeError, OSError) as error:
        raise ValueError(f"{path} cannot be used: {one_line(error).rstrip('.')}; save the logits again.") from error


def _file(path: str | os.PathLike[str]) -> Path:
    path = Path(path)
    return path if path.suffix == ".safetensors" else path / LOGITS


def _tensor(name: str, values: Any) -> Tensor:
    if isinstance(values, Tensor):
        return values.detach().cpu()
    try:
        return torch.from_numpy(np.array(values))
    except (TypeError, ValueError) as error:
        raise TypeError(f"`{name}` must be a tensor or an array of numbers, got {type(values).__name__}.") from error


def _check_logits(name: str, logits: Tensor) -> None:
    check_floating(name, logits)
    if logits.dim() != 2 or len(logits) == 0:
        raise ValueError(f"`{name}` must have shape (samples, classes) with at least one sample, got "
                         f"{tuple(logits.shape)}.")  # fmt: skip
    broken = log_probabilities(logits).amax(dim=-1).isnan()
    if broken.any():
        raise ValueError(
            f"`{name}` holds logits that have no softmax (NaN, +inf, or -inf for every class), first in sample "
            f"{int(broken.int().argmax())}."
        )
