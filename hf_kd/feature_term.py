"""A feature loss at work: features of both networks, parameters beside the student's, its state in checkpoints."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, cast

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from .features import FeatureTaker
from .files import atomic_write
from .losses.feature import FeatureLoss
from .teacher import Ensemble, Teacher
from .text import one_line


STATE = "feature_loss.pt"
"""The loss's parameters and memories in a checkpoint. They are no part of the student."""


class FeatureTerm:
    """Takes the features of two networks as they run, and gives the loss between them.

    Each network runs inside of its taker, ``with term.of_student:`` and ``with term.of_teacher:``; calling the term
    then gives the loss.

    Args:
        loss: not built yet.
        student: the student's network, without wrappers.
        teacher: with a network of its own.

    Raises:
        ValueError: for a teacher that has no features (a function, stored outputs) or several networks, and for names
            that a network does not have.
    """

    def __init__(self, loss: FeatureLoss, student: nn.Module, teacher: Teacher | None) -> None:
        name = type(loss).__name__
        if teacher is None or isinstance(teacher, Ensemble) or not teacher.is_module:
            given = "none" if teacher is None else teacher.name
            raise ValueError(
                f"The feature loss {name} compares features of the student with those of a live teacher, one network "
                f"that runs with every batch, got {given}: give `teacher_model` a network or its name."
            )
        self.loss = loss
        self._module: nn.Module = loss
        self._student = student
        self.of_student = FeatureTaker(student, loss.student_features)
        self.of_teacher = FeatureTaker(cast(nn.Module, teacher.model), loss.teacher_features, detach=True)

    # ---- Before training -------------------------------------------------------------------------------------------

    def build(
        self,
        run_student: Callable[[], Any],
        run_teacher: Callable[[], Any],
        accelerator: Accelerator,
        *,
        checkpoint: str | None = None,
        **options: Any,
    ) -> None:
        """Size the loss from a batch, which is run through both networks, and go on with a checkpoint's state.

        Args:
            run_student, run_teacher: run the networks on one batch.
            options: of :meth:`hf_kd.losses.feature.FeatureLoss.build`.

        Raises:
            ValueError: if the checkpoint has no state of such a loss.
        """
        if not self.loss.built:
            self.loss.build(self.of_student.shapes(run_student), self.of_teacher.shapes(run_teacher), **options)
        # An fp64 student trains in fp64 throughout.
        double = next(self._student.parameters()).dtype == torch.float64
        self.loss.to(accelerator.device, torch.float64 if double else None)
        if checkpoint is not None:
            self._load(Path(checkpoint) / STATE, accelerator.device)
        if accelerator.num_processes > 1:
            self.loss.synchronise(accelerator.gather, accelerator.process_index)
            if self.parameters():
                # The memories are the same everywhere already: each process sees the batches of all.
                self._module = DistributedDataParallel(self.loss, broadcast_buffers=False)

    def parameters(self) -> list[nn.Parameter]:
        return [parameter for parameter in self.loss.parameters() if parameter.requires_grad]

    def join(self, optimizer: Optimizer, weight_decay: float) -> None:
        """Have an optimiser train the loss's parameters as well, once."""
        known = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        new = [parameter for parameter in self.parameters() if id(parameter) not in known]
        if new:
            optimizer.add_param_group({"params": new, "weight_decay": weight_decay})

    # ---- In a step -------------------------------------------------------------------------------------------------

    def __call__(self, labels: Tensor | None, index: Tensor | None) -> dict[str, Tensor]:
        """The loss between the features of the last runs: "feature" (per sample, or a mean), and statistics."""
        return self._module(self.of_student.take(), self.of_teacher.take(), labels, index)

    # ---- Checkpoints -----------------------------------------------------------------------------------------------

    def save(self, folder: str | Path) -> None:
        with atomic_write(Path(folder) / STATE) as draft:
            torch.save(self.loss.state_dict(), draft)

    def _load(self, path: Path, device: torch.device) -> None:
        name = type(self.loss).__name__
        if not path.is_file():
            raise ValueError(
                f"The checkpoint {path.parent} has no {STATE}, so its run had no feature loss: go on without "
                f"`feature_loss`, or begin anew with {name}."
            )
        state: Mapping[str, Any] = torch.load(path, map_location=device, weights_only=True)
        try:
            self.loss.load_state_dict(state)
        except RuntimeError as error:
            raise ValueError(
                f"{path} is not the state of this {name} ({one_line(error)}): go on with the feature "
                "loss, the networks and the data that the run began with."
            ) from error
