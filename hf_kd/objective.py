"""The objective of a batch: its terms, each as its share of an optimiser step, and what is logged of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import term_gradients
from .config import DistillationConfig
from .data.padding import SAMPLE_MASK
from .fused_term import FusedTerms
from .losses import Outputs, functional
from .losses.logit import cross_entropy
from .samples import sum_and_count


Terms = dict[str, Tensor]
"""Scalars whose sum is the loss, by name."""

Sums = dict[str, tuple[Tensor, "int | Tensor"]]
"""What is to be logged: sums over samples, and how many those are."""


class Counts(NamedTuple):
    """How many samples and labels there are: numbers, or scalars where they are known on the device alone."""

    samples: int | Tensor
    """Of the batch."""
    step_samples: int | Tensor
    """Of the optimiser step, over all its batches and processes."""
    step_labels: int | Tensor | None
    """Likewise; None if the batch is the whole step."""
    processes: int
    """What each process multiplies its share of the step by."""
    of_step: Tensor | None
    """The step's two counts, (2,)."""

    @classmethod
    def of(cls, samples: int | Tensor, of_step: Tensor | None, processes: int) -> Counts:
        """For a batch of so many samples; without the step's counts, (2,), it is taken to be the whole step."""
        if of_step is None:
            return cls(samples, samples, None, 1, None)
        # As numbers where reading them costs nothing.
        step_samples, step_labels = of_step.tolist() if of_step.device.type == "cpu" else of_step.unbind()
        # Under DDP gradients are averaged over processes, and each has divided by the count of all of them.
        return cls(samples, step_samples, step_labels, processes, of_step)


class LogitTerms:
    """The terms on logits: cross-entropy and the distillation loss, composed or by one kernel.

    Args:
        args: the configuration.
        label_name: the batch's entry of labels.
        fused: what computes both at once where a batch allows it, or None.
        distillation: gives the function of the distillation loss, ``f(student, teacher, inputs)``: a trainer's, which
            a subclass may override.
        own: that function where nobody has overridden it. Only it may be replaced by a kernel.
    """

    def __init__(
        self,
        args: DistillationConfig,
        label_name: str,
        fused: FusedTerms | None,
        distillation: Callable[[], Callable[..., Tensor | dict[str, Tensor]]],
        own: Callable[..., Any],
    ) -> None:
        self._args, self._label_name = args, label_name
        self.fused = fused
        self._distillation, self._own = distillation, own

    def __call__(
        self,
        student: Outputs,
        teacher: Outputs | None,
        inputs: Mapping[str, Any],
        counts: Counts,
        beta: float | None,
    ) -> tuple[Terms, Sums]:
        """The terms of a batch, and what is logged of them.

        Args:
            inputs: the batch, labels included.
            beta: weight of the distillation loss, if there is one.

        Raises:
            ValueError: without labels where cross-entropy has a weight.
        """
        if teacher is not None and self._may_be_fused(student, inputs):
            return self._by_kernel(student, teacher, inputs, counts, beta)
        return self._composed(student, teacher, inputs, counts, beta)

    @torch.no_grad()
    def analysis(
        self,
        student: Outputs,
        teacher: Outputs | None,
        inputs: Mapping[str, Any],
        counts: Counts,
        beta: float | None,
        terms: Terms,
    ) -> Sums:
        """What ``log_analysis`` adds to the log of a batch with these terms."""
        found: Sums = {}
        if teacher is not None:
            statistics = functional.matching_statistics(student.log_probs, teacher.logits, self._args.gamma or 1.0)
            found.update(_sums(statistics, student.mask, counts))
        if "fused" in terms:
            # One gradient for both is no help here; and a softmax from before may have no graph.
            with torch.enable_grad():
                again = Outputs(student.logits, mask=student.mask)
                terms, _ = self._composed(again, teacher, inputs, counts, beta)
        products = term_gradients.products(terms, student.logits, counts.step_samples / counts.processes)
        found.update({name: (total, counts.samples) for name, total in products.items()})
        return found

    def _composed(
        self,
        student: Outputs,
        teacher: Outputs | None,
        inputs: Mapping[str, Any],
        counts: Counts,
        beta: float | None,
    ) -> tuple[Terms, Sums]:
        labels = inputs.get(self._label_name)
        terms: Terms = {}
        logged: Sums = {}
        if self._args.ce_weight:
            if labels is None:
                raise ValueError(
                    f"The batch has no {self._label_name!r} (it has {', '.join(inputs)}), and `ce_weight` is "
                    f"{self._args.ce_weight}: add the labels, or set ce_weight=0 to learn from the teacher alone."
                )
            ce, labelled = cross_entropy(
                student,
                labels,
                label_smoothing=self._args.label_smoothing_factor,
                mask=student.mask if SAMPLE_MASK in inputs else None,
            )
            step_labels = labelled if counts.step_labels is None else counts.step_labels
            terms["ce"] = self._args.ce_weight * counts.processes * ce / _at_least_one(step_labels)
            logged["ce"] = ce, labelled
        if teacher is not None and self._args.uses_logits:
            assert beta is not None
            parts = self._distillation()(student, teacher, inputs)
            logged.update(_sums(parts if isinstance(parts, dict) else {"distill": parts}, student.mask, counts))
            terms["distill"] = beta * counts.processes * logged["distill"][0] / counts.step_samples
        with torch.no_grad():
            logged["student_entropy"] = sum_and_count(functional.entropy(student.log_probs), student.mask)
        return terms, logged

    def _may_be_fused(self, student: Outputs, inputs: Mapping[str, Any]) -> bool:
        if self.fused is None or getattr(self._distillation(), "__func__", None) is not self._own:
            return False
        return self.fused.fit(student, inputs.get(self._label_name), SAMPLE_MASK in inputs)

    def _by_kernel(
        self, student: Outputs, teacher: Outputs, inputs: Mapping[str, Any], counts: Counts, beta: float | None
    ) -> tuple[Terms, Sums]:
        assert self.fused is not None and beta is not None
        labels = inputs.get(self._label_name)
        objective, totals = self.fused(student, teacher, labels, counts.of_step, beta, counts.processes)
        logged: Sums = {
            "distill": (totals.distill, counts.samples),
            "power_sum": (totals.power_sum, counts.samples),
            "student_entropy": (totals.entropy, counts.samples),
        }
        if self._args.ce_weight:
            logged["ce"] = totals.ce, totals.labelled
        return {"fused": objective}, logged


def feature_term(parts: Mapping[str, Tensor], mask: Tensor | None, counts: Counts) -> tuple[Tensor, Sums]:
    """A feature loss's share of the step, before its weight, and what is logged of it.

    Args:
        parts: what the loss gave: "feature", per sample or as a mean, and statistics.
    """
    logged = _sums(parts, mask, counts)
    return counts.processes * logged["feature"][0] / counts.step_samples, logged


def _sums(parts: Mapping[str, Tensor], mask: Tensor | None, counts: Counts) -> Sums:
    """What a loss gives as sums over the samples: its means times their number."""
    found: Sums = {}
    for name, value in parts.items():
        if mask is not None and value.shape == mask.shape:
            total = torch.where(mask, value, 0.0).sum() / mask.sum().clamp_min(1) * counts.samples
        elif isinstance(counts.samples, int) and value.numel() == counts.samples:
            total = value.sum()
        else:
            total = value.mean() * counts.samples
        found[name] = total, counts.samples
    return found


def _at_least_one(count: int | Tensor) -> int | Tensor:
    return count.clamp_min(1) if isinstance(count, Tensor) else max(count, 1)
