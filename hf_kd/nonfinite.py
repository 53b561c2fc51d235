"""A loss or a gradient that is not a number: found, told with step, samples and component, and stopped or skipped."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.logging import get_logger
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from .losses import Outputs
from .text import some


logger = get_logger(__name__)

_GRADIENT = "gradient"
# A message names this many samples and parameters at most.
_MOST_NAMED = 8


class FiniteGuard:
    """Watches losses and gradients over a run.

    On the CPU, and with ``policy="skip"``, each value is looked at when it is made. On an accelerator looking would
    stall every step: there the watching is deferred. The first finding is kept on the device, and :meth:`check` reads
    it, before every log, evaluation and checkpoint: nothing that a NaN has been through is ever saved.

    Args:
        policy: "raise", or "skip": a step that is not finite changes nothing, and is counted.
        patience: how many steps in a row may be skipped; the next one raises.
        deferred: whether findings wait for :meth:`check`; with policy "skip" they never do.
    """

    def __init__(self, policy: str, patience: int, *, deferred: bool) -> None:
        self.policy = policy
        self.patience = patience
        self.deferred = deferred and policy == "raise"
        self.skipped = 0
        """Steps skipped so far."""
        self.in_a_row = 0
        """Steps skipped up to the last one; 0 if that was taken."""
        self._findings: dict[tuple[tuple[str, ...], int], Tensor] = {}
        self._loss_of_step: str | None = None

    # ---- The loss --------------------------------------------------------------------------------------------------

    def watch_loss(
        self,
        loss: Tensor,
        terms: Mapping[str, Tensor],
        student: Outputs,
        teacher: Outputs | None,
        inputs: Mapping[str, Any],
        step: int,
    ) -> None:
        """Look at a batch's loss, the sum of its terms, before the backward pass.

        Raises:
            RuntimeError: by policy "raise", where it looks at once.
        """
        if not self.deferred and math.isfinite(loss.item()):
            return
        names = list(terms)
        bad = ~torch.isfinite(torch.stack([term.detach() for term in terms.values()]))
        if self.deferred:
            self._remember(names, bad, inputs.get("index"), step)
            return
        component = ", ".join(name for name, flag in zip(names, bad.tolist(), strict=True) if flag) or "sum"
        message = _describe("loss", component, step, _bad_samples(student, teacher, inputs))
        nan = [who for who, outputs in (("student", student), ("teacher", teacher))
               if outputs is not None and bool(outputs.logits.isnan().any())]  # fmt: skip
        if nan:
            message += f" The {' and '.join(nan)} logits hold NaN."
        if self.policy == "raise":
            raise RuntimeError(f"{message} {_ADVICE}")
        self._loss_of_step = message

    # ---- The gradient ----------------------------------------------------------------------------------------------

    def watch_gradient(
        self,
        norm: Tensor | float | None,
        model: nn.Module,
        batches: Sequence[Mapping[str, Any]],
        step: int,
        accelerator: Accelerator,
        others: Iterable[nn.Parameter] = (),
    ) -> None:
        """Look at the norm of a step's gradient, before the update; by policy "skip" take a bad gradient away.

        Args:
            norm: over all parameters; None if the engine (DeepSpeed) does not tell.
            model: whose gradients are taken away.
            batches: of the step, for the samples in the message.
            step: number of the step, from 1.
            others: parameters outside of the model that the step updates as well.
            accelerator: its gradient scaler (fp16) skips bad steps itself, which :meth:`count_skipped` counts.
        """
        if accelerator.scaler is not None or norm is None:
            self._loss_of_step = None
            return
        if self.policy == "raise" and not self.deferred and math.isfinite(norm):
            return
        norm = torch.as_tensor(norm, device=accelerator.device)
        bad = ~torch.isfinite(norm.detach())
        if self.deferred:
            self._remember([_GRADIENT], bad[None], _index(batches), step)
            return
        if self.policy == "raise":
            if bool(bad):
                raise RuntimeError(f"{_describe_gradient(model, step, _index(batches))} {_ADVICE}")
            return
        found = self._loss_of_step is not None or bool(bad)
        if accelerator.num_processes > 1:
            # One process that skips alone would leave the others with other weights.
            flag = torch.tensor(float(found), device=accelerator.device)
            found = bool(accelerator.reduce(flag, reduction="sum") > 0)
        if not found:
            self.count_taken()
            return
        message = self._loss_of_step or _describe_gradient(model, step, None)
        self._loss_of_step = None
        # Optimisers pass over parameters without a gradient: no update, no weight decay, no momentum.
        for parameter in (*model.parameters(), *others):
            parameter.grad = None
        self.count_skipped(message)

    def count_skipped(self, message: str) -> None:
        """Count a step that changed nothing, and say so.

        Raises:
            RuntimeError: if more than ``patience`` steps were skipped in a row.
        """
        self.skipped += 1
        self.in_a_row += 1
        if self.in_a_row > self.patience:
            raise RuntimeError(
                f"{message} Now {self.in_a_row} steps in a row had to be skipped, and `max_nonfinite_steps` is "
                f"{self.patience}: the weights are as they were before these steps, and the "
                "last checkpoint is untouched. Lower the learning rate or beta, or look at the data."
            )
        logger.warning("%s This step is skipped (%d so far).", message, self.skipped)

    def count_taken(self) -> None:
        """Say that a step was taken: those skipped before it were not in a row with later ones."""
        self.in_a_row = 0

    # ---- Findings that are read later ------------------------------------------------------------------------------

    def _remember(self, names: list[str], bad: Tensor, index: Tensor | None, step: int) -> None:
        """Keep the first finding on the device: flags by component, the step, the samples' indices."""
        index = bad.new_empty(0, dtype=torch.long) if index is None else index.to(bad.device).long()
        record = torch.cat([bad.long(), torch.tensor([step], device=bad.device), index])
        # By length too: the last batch of an epoch may be shorter.
        key = (tuple(names), len(record))
        nothing = torch.full_like(record, -1)
        known = self._findings.get(key, nothing)
        self._findings[key] = torch.where((known[0] < 0) & bad.any(), record, known)

    def check(self) -> None:
        """Raise the RuntimeError of a finding that was kept on the device."""
        findings = [(names, record.tolist()) for (names, _), record in self._findings.items()]
        self._findings = {}
        found = [(names, values) for names, values in findings if values[0] >= 0]
        if not found:
            return
        # A loss comes before the gradient that it spoils.
        names, values = min(found, key=lambda entry: (entry[1][len(entry[0])], entry[0] == (_GRADIENT,)))
        component = ", ".join(name for name, flag in zip(names, values, strict=False) if flag)
        what = _GRADIENT if names == (_GRADIENT,) else "loss"
        message = _describe(what, component, values[len(names)], values[len(names) + 1 :])
        raise RuntimeError(f"{message} {_ADVICE}")


_ADVICE = (
    "Training stopped; the last checkpoint is untouched. Lower the learning rate or beta, look at the data of this "
    'step, or pass such steps over with on_nonfinite="skip".'
)


def _describe(what: str, component: str, step: int, samples: list[int]) -> str:
    of = f"; samples with index {some(samples, _MOST_NAMED)}" if samples else ""
    return f"The {what} is not finite at step {step} (component: {component}{of})."


def _describe_gradient(model: nn.Module, step: int, index: Tensor | None) -> str:
    names = [
        name
        for name, parameter in model.named_parameters()
        if parameter.grad is not None and not bool(torch.isfinite(_own(parameter.grad)).all())
    ]
    component = f"{_GRADIENT} of {some(names, _MOST_NAMED)}" if names else _GRADIENT
    return _describe("gradient", component, step, [] if index is None else index.tolist())


def _index(batches: Sequence[Mapping[str, Any]]) -> Tensor | None:
    """The indices of a step's samples, as far as its batches hold them."""
    indices = [batch["index"] for batch in batches if isinstance(batch.get("index"), Tensor)]
    return torch.cat(indices) if indices else None


def _own(tensor: Tensor) -> Tensor:
    """This process's part of a tensor that FSDP has spread; to ask for the whole all processes would have to ask."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _bad_samples(student: Outputs, teacher: Outputs | None, inputs: Mapping[str, Any]) -> list[int]:
    """The indices of the samples at fault, or of the whole batch if no sample's logits are."""
    index = inputs.get("index")
    if not isinstance(index, Tensor):
        return []
    bad = torch.zeros(len(index), dtype=torch.bool, device=student.logits.device)
    if len(student.logits) == len(index):
        bad |= ~torch.isfinite(student.logits.detach()).flatten(1).all(dim=1)
    if teacher is not None and len(teacher.logits) == len(index):
        # A teacher may be sure of a class: infinities are none of its faults.
        bad |= teacher.logits.isnan().flatten(1).any(dim=1)
    return (index.to(bad.device)[bad] if bool(bad.any()) else index).tolist()
