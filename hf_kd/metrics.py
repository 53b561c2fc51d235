"""Metrics of classifiers and of students against their teachers, with no network.

Two layers, each formula in one place:

- pure helpers: `per_sample_statistics` turns logits into a few numbers per sample, on the logits' device; `summarise`
  (or one of the functions it consists of) turns the rows of a whole set into exact metrics. An evaluation loop keeps
  6 numbers per sample instead of K logits.
- `evaluate.Metric` subclasses over them, which take logits of shape (N, K):

      metrics = evaluate.combine([Top1(), Top5(), ExpectedCalibrationError(), NegativeLogLikelihood()])
      metrics.compute(predictions=logits, references=labels)   # {"top1": ..., "top5": ..., "ece": ..., "nll": ...}

  With the teacher: `evaluate.combine([Top1(), TeacherAgreement()])` and `teacher_predictions=teacher_logits` in
  `compute`, or in each `add_batch`; metrics that do not look at the teacher ignore it.

Fractions lie in [0, 1]; entropies, likelihoods and divergences are in nats. A label of -100 means "no label".
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from typing import Any

import evaluate
import numpy as np
import torch
from datasets import Features, Sequence, Value
from torch import Tensor

from .labels import IGNORE_INDEX
from .losses.functional import check_floating, divergence, entropy, log_probabilities


__all__ = [
    "Column",
    "ExpectedCalibrationError",
    "NegativeLogLikelihood",
    "Reliability",
    "TeacherAgreement",
    "Top1",
    "Top5",
    "TopK",
    "column_mean",
    "expected_calibration_error",
    "per_sample_statistics",
    "reliability",
    "summarise",
    "top_k_accuracy",
]


# ---- Pure helpers --------------------------------------------------------------------------------------------------


class Column(IntEnum):
    """Columns of the rows that `per_sample_statistics` makes; the last two exist only with teacher logits.

    RANK and NLL are NaN where the label is -100. Logits that hold NaN or +inf, or are all -inf, have no softmax: RANK
    is then inf (wrong for every k), AGREE 0, and the other columns NaN, so that means over them are NaN as well.
    """

    RANK = 0  #: classes before the true one when sorted by falling logit, equal ones by index: 0 iff argmax is right
    CONFIDENCE = 1  #: largest probability
    NLL = 2  #: -log q of the true class, nats
    ENTROPY = 3  #: Shannon entropy of q, nats
    AGREE = 4  #: 1 where student and teacher have the same argmax, else 0
    DIVERGENCE = 5  #: D(p || q), teacher first, both by plain softmax, nats


_STUDENT_COLUMNS = 4


@torch.no_grad()
def per_sample_statistics(logits: Tensor, labels: Tensor | None, teacher_logits: Tensor | None = None) -> Tensor:
    """What the metrics need of each sample, one row each, on the device of the logits.

    Args:
        logits: (N, K), floating point. -inf is a class of probability zero.
        labels: (N,) integers in [0, K), or -100 for a sample without a label; None if there are no labels at all.
        teacher_logits: (N, K), or None.

    Returns:
        (N, 4), or (N, 6) with a teacher; the columns are those of `Column`. fp32, or fp64 if either logits are fp64.

    Raises:
        ValueError: on wrong or unequal shapes, and on labels out of range.
        TypeError: if logits are not floating point or labels are not integers.
    """
    samples, classes = _check_matrix("logits", check_floating("logits", logits))
    log_q = log_probabilities(logits)
    confidence = log_q.amax(dim=-1).exp()
    broken = confidence.isnan()

    if labels is None:
        rank = nll = torch.full_like(confidence, torch.nan)
    else:
        labels = _check_labels(labels, samples, classes).to(logits.device)
        # A label that is out of the way must still be an index; its results are blanked below.
        index = labels.clamp(min=0).unsqueeze(-1)
        true_logit = logits.gather(-1, index)
        earlier = torch.arange(classes, device=logits.device) < index
        ahead = (logits > true_logit) | ((logits == true_logit) & earlier)
        rank = ahead.sum(dim=-1).to(log_q.dtype).masked_fill(broken, torch.inf)
        nll = -log_q.gather(-1, index).squeeze(-1)
        unlabelled = labels == IGNORE_INDEX
        rank, nll = rank.masked_fill(unlabelled, torch.nan), nll.masked_fill(unlabelled, torch.nan)

    columns = [rank, confidence, nll, entropy(log_q)]
    if teacher_logits is not None:
        _check_same_shape(logits, check_floating("teacher_logits", teacher_logits))
        teacher_logits = teacher_logits.to(logits.device)
        log_p = log_probabilities(teacher_logits)
        broken = broken | log_p.amax(dim=-1).isnan()
        agree = (logits.argmax(dim=-1) == teacher_logits.argmax(dim=-1)) & ~broken
        # Rounding can leave a divergence of zero just below it.
        columns += [agree, divergence(log_p, log_q).clamp_min(0.0).masked_fill(broken, torch.nan)]
    dtype = torch.promote_types(log_q.dtype, columns[-1].dtype)
    return torch.stack([column.to(dtype) for column in columns], dim=-1)


def top_k_accuracy(rows: np.ndarray | Tensor, k: int) -> float:
    """Fraction of labelled samples whose true class is among the k largest logits; 1 if there are at most k classes.

    Equal logits are ordered by class index, so that k = 1 is the accuracy of argmax. `rows` are those of
    `per_sample_statistics`, (N, 4) or (N, 6). Raises ValueError without a labelled sample or for k below 1.
    """
    _check_count("k", k)
    return float(np.mean(_labelled(rows)[:, Column.RANK] < k))


@dataclass(frozen=True)
class Reliability:
    """Labelled samples in bins of equal width by their confidence, the largest probability.

    Source: C. Guo et al. 2017 (arXiv 1706.04599). Bin b holds the confidences in (edges[b], edges[b + 1]].

    Attributes:
        edges: (B + 1,), from 0 to 1.
        counts: (B,), samples of each bin.
        accuracy: (B,), fraction of a bin's samples that are right; NaN in an empty bin.
        confidence: (B,), mean confidence of a bin's samples; NaN in an empty bin.
        error: the expected calibration error, in [0, 1].
    """

    edges: np.ndarray
    counts: np.ndarray
    accuracy: np.ndarray
    confidence: np.ndarray
    error: float


def reliability(rows: np.ndarray | Tensor, num_bins: int = 15) -> Reliability:
    """Accuracy against confidence in bins, over the labelled samples, and the calibration error they add up to.

    `rows` are those of `per_sample_statistics`, (N, 4) or (N, 6). Raises ValueError without a labelled sample or for
    fewer than 1 bin.
    """
    _check_count("num_bins", num_bins)
    rows = _labelled(rows)
    confidence = rows[:, Column.CONFIDENCE]
    # Edges in the precision of the confidences: an fp32 1/5 lies on the edge 1/5, not above it.
    edges = np.linspace(0.0, 1.0, num_bins + 1, dtype=rows.dtype)
    # A confidence that rounding has put above 1 belongs to the last bin; one that is NaN makes that bin's values NaN.
    bins = np.searchsorted(edges, confidence, side="left").clip(1, num_bins) - 1
    counts = np.bincount(bins, minlength=num_bins)
    right = np.bincount(bins, weights=rows[:, Column.RANK] == 0, minlength=num_bins)
    confident = np.bincount(bins, weights=confidence, minlength=num_bins)
    members = np.where(counts > 0, counts, np.nan)
    error = float(np.abs(right - confident).sum() / len(rows))
    return Reliability(edges, counts, right / members, confident / members, error)


def expected_calibration_error(rows: np.ndarray | Tensor, num_bins: int = 15) -> float:
    """Expected calibration error ``sum_b n_b/n |accuracy_b - confidence_b|`` over the labelled samples, in [0, 1].

    The bins are `num_bins` intervals (lo, hi] of equal width over [0, 1], by the largest probability. Source: C. Guo
    et al. 2017 (arXiv 1706.04599), Eq. 3. `rows` are those of `per_sample_statistics`, (N, 4) or (N, 6). Raises
    ValueError without a labelled sample or for fewer than 1 bin.
    """
    return reliability(rows, num_bins).error


def column_mean(rows: np.ndarray | Tensor, column: Column) -> float:
    """Mean of one column of `per_sample_statistics` over all samples, or for NLL and RANK over the labelled ones.

    Raises ValueError if there is no such sample, or no such column (AGREE and DIVERGENCE need teacher logits).
    """
    needs_label = column in (Column.RANK, Column.NLL)
    rows = _labelled(rows) if needs_label else _check_rows(rows)
    if column >= rows.shape[1]:
        raise ValueError(f"The rows hold no {Column(column).name}: pass `teacher_logits` to `per_sample_statistics`.")
    return float(np.mean(rows[:, column], dtype=np.float64))


def summarise(rows: np.ndarray | Tensor, num_bins: int = 15) -> dict[str, float]:
    """Exact metrics of a whole set from its rows, in whatever pieces the rows were made.

    Args:
        rows: (N, 4) or (N, 6), from `per_sample_statistics`, as an array or as a tensor on any device.
        num_bins: bins of the calibration error.

    Returns:
        top1, top5, nll and ece over the labelled samples (left out if no sample has a label), entropy over all
        samples, and with a teacher teacher_agreement and teacher_divergence over all samples.

    Raises:
        ValueError: on no rows, rows of another shape, or fewer than 1 bin.
    """
    _check_count("num_bins", num_bins)
    rows = _check_rows(rows)
    summary = {}
    if not np.isnan(rows[:, Column.RANK]).all():
        summary["top1"] = top_k_accuracy(rows, 1)
        summary["top5"] = top_k_accuracy(rows, 5)
        summary["nll"] = column_mean(rows, Column.NLL)
        summary["ece"] = expected_calibration_error(rows, num_bins)
    summary["entropy"] = column_mean(rows, Column.ENTROPY)
    if rows.shape[1] > _STUDENT_COLUMNS:
        summary["teacher_agreement"] = column_mean(rows, Column.AGREE)
        summary["teacher_divergence"] = column_mean(rows, Column.DIVERGENCE)
    return summary


def _check_matrix(name: str, logits: Tensor) -> tuple[int, int]:
    if logits.dim() != 2 or logits.size(1) == 0:
        raise ValueError(f"`{name}` must have shape (samples, classes), got {tuple(logits.shape)}.")
    return logits.size(0), logits.size(1)


def _check_same_shape(logits: Tensor, teacher_logits: Tensor) -> None:
    if teacher_logits.shape != logits.shape:
        raise ValueError(
            f"Logits of shape {tuple(logits.shape)} and teacher logits of shape {tuple(teacher_logits.shape)} do not "
            "match: both must be (samples, classes) for the same samples and classes."
        )


def _check_labels(labels: Tensor, samples: int, classes: int) -> Tensor:
    if labels.is_floating_point() or labels.is_complex():
        raise TypeError(f"Labels must be integer class indices, got {labels.dtype}.")
    if labels.shape != (samples,):
        raise ValueError(
            f"Labels must have shape ({samples},), one class index for each sample of the logits, "
            f"got {tuple(labels.shape)}."
        )
    labels = labels.long()
    # A gather with an index out of range would end the process on a GPU.
    wrong = ((labels < 0) | (labels >= classes)) & (labels != IGNORE_INDEX)
    if wrong.any():
        raise ValueError(
            f"Labels must lie in [0, {classes - 1}] for {classes} classes, or be {IGNORE_INDEX} for a sample without "
            f"a label, got {labels[wrong][0].item()}."
        )
    return labels


def _check_rows(rows: np.ndarray | Tensor) -> np.ndarray:
    rows = rows.detach().cpu().numpy() if isinstance(rows, Tensor) else np.asarray(rows)
    if rows.ndim != 2 or rows.shape[1] not in (_STUDENT_COLUMNS, len(Column)) or len(rows) == 0:
        raise ValueError(
            f"Rows must be a non-empty array of shape (samples, {_STUDENT_COLUMNS}) or (samples, {len(Column)}), as "
            f"`per_sample_statistics` returns them, got {rows.shape}."
        )
    return rows


def _labelled(rows: np.ndarray | Tensor) -> np.ndarray:
    rows = _check_rows(rows)
    labelled = rows[~np.isnan(rows[:, Column.RANK])]
    if len(labelled) == 0:
        raise ValueError(
            f"None of the {len(rows)} samples has a label (all are {IGNORE_INDEX}, or none were given): this metric "
            "needs at least one."
        )
    return labelled


def _check_count(name: str, value: int) -> int:
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < 1:
        raise ValueError(f"`{name}` must be an integer of at least 1, got {value!r}.")
    return value


# ---- evaluate's interface ------------------------------------------------------------------------------------------


_LOGITS_INPUTS = """
Args:
    predictions (array of floats, (N, K)): logits of N samples over K classes: a tensor, an array or nested lists.
    references (array of int, (N,)): class indices in [0, K-1], or -100 for a sample that is left out.
"""

_TEACHER_INPUTS = """
Args:
    predictions (array of floats, (N, K)): the student's logits: a tensor, an array or nested lists.
    teacher_predictions (array of floats, (N, K)): the teacher's logits for the same samples and classes.
"""

_IMAGENET_CITATION = """\
@article{russakovsky2015imagenet,
  title = {{ImageNet} Large Scale Visual Recognition Challenge},
  author = {Russakovsky, Olga and Deng, Jia and Su, Hao and Krause, Jonathan and Satheesh, Sanjeev and Ma, Sean and
            Huang, Zhiheng and Karpathy, Andrej and Khosla, Aditya and Bernstein, Michael and Berg, Alexander C. and
            Fei-Fei, Li},
  journal = {International Journal of Computer Vision},
  year = {2015}
}
"""

_CALIBRATION_CITATION = """\
@inproceedings{guo2017calibration,
  title = {On Calibration of Modern Neural Networks},
  author = {Guo, Chuan and Pleiss, Geoff and Sun, Yu and Weinberger, Kilian Q.},
  booktitle = {International Conference on Machine Learning},
  year = {2017}
}
"""

_AGREEMENT_CITATION = """\
@inproceedings{stanton2021does,
  title = {Does Knowledge Distillation Really Work?},
  author = {Stanton, Samuel and Izmailov, Pavel and Kirichenko, Polina and Alemi, Alexander A. and
            Wilson, Andrew Gordon},
  booktitle = {Advances in Neural Information Processing Systems},
  year = {2021}
}
"""

# Logits of one piece that are in memory in fp64 at a time: 32 MiB.
_ELEMENTS_AT_ONCE = 2**22


class _LogitsMetric(evaluate.Metric):
    """A metric over logits that stores the statistics of each sample, not its logits.

    `add_batch` reduces its input at once: evaluate's buffer then holds a few numbers per sample whatever the number
    of classes, mistakes are reported for the batch that has them, and the result does not depend on how the samples
    were cut into batches. Everything is computed in fp64 on the CPU.

    The buffer is kept in memory, and nothing is written to disk. Give `keep_in_memory=False` (implied by
    `num_process > 1`) and a `cache_dir` for evaluate's usual files, which is how its own multi-process mode gathers.
    """

    def __init__(
        self,
        config_name: str | None = None,
        keep_in_memory: bool | None = None,
        cache_dir: str | None = None,
        num_process: int = 1,
        **kwargs: Any,
    ) -> None:
        if keep_in_memory is None:
            keep_in_memory = num_process == 1
        super().__init__(config_name, keep_in_memory, cache_dir, num_process, **kwargs)

    def _build_data_dir(self) -> str:
        # evaluate makes a folder in the user's cache even for a metric that never writes to it.
        return "" if self.keep_in_memory else super()._build_data_dir()

    def add_batch(self, *, predictions: Any = None, references: Any = None, **kwargs: Any) -> None:
        """Add a batch of samples.

        Raises ValueError on wrong or unequal shapes, labels out of range, an empty batch, or logits with NaN or +inf;
        TypeError on labels that are not integers.
        """
        given = {"predictions": predictions, "references": references, **kwargs}
        names = list(self.features)
        unknown = [name for name in kwargs if name not in names]
        if unknown:
            raise ValueError(f"{self.name} takes {names}, got {unknown} as well.")
        missing = [name for name in names if given.get(name) is None]
        if missing:
            raise ValueError(f"{self.name} needs {names}, each with one entry a sample, but {missing} is missing.")

        logits = _to_tensor("predictions", predictions)
        samples, classes = _check_matrix("predictions", logits)
        if samples == 0:
            raise ValueError(f"{self.name} got an empty batch: predictions have shape {tuple(logits.shape)}.")
        columns: dict[str, Tensor | np.ndarray] = {}
        labels = teacher_logits = None
        if "references" in names:
            labels = columns["references"] = _check_labels(_to_tensor("references", references), samples, classes)
        if "teacher_predictions" in names:
            teacher_logits = _to_tensor("teacher_predictions", given["teacher_predictions"])
            _check_same_shape(logits, teacher_logits)
        rows = _statistics_in_pieces(logits, labels, teacher_logits)

        broken = np.isnan(rows[:, Column.CONFIDENCE if teacher_logits is None else Column.DIVERGENCE])
        if broken.any():
            raise ValueError(
                f"{self.name} got logits that have no softmax (NaN, +inf, or -inf for every class), first in sample "
                f"{int(broken.argmax())} of the batch."
            )
        # The buffer's columns bear the names of the inputs that they stand for: evaluate routes inputs by them.
        columns["predictions"] = rows[:, :_STUDENT_COLUMNS]
        if teacher_logits is not None:
            columns["teacher_predictions"] = rows[:, _STUDENT_COLUMNS:]
        super().add_batch(**{name: np.asarray(column) for name, column in columns.items()})

    def add(self, *, prediction: Any = None, reference: Any = None, **kwargs: Any) -> None:
        """Add one sample: a vector of K logits and a label. Raises as `add_batch` does."""
        # `evaluate.combine` passes the plural names, with one sample's values, to `add`.
        sample = {"predictions": prediction, "references": reference, **kwargs}
        self.add_batch(**{name: None if value is None else [value] for name, value in sample.items()})

    def _finalize(self) -> None:
        if self.num_process == 1 and self.writer is None:
            raise ValueError(f"{self.name} has no samples: pass them to `compute`, or to `add_batch` before it.")
        super()._finalize()

    def _compute(self, *, predictions: Any, references: Any = None, teacher_predictions: Any = None) -> dict:
        # `evaluate.combine` gives every metric all the inputs: one that has no use for the teacher's gets them raw.
        parts = [predictions, teacher_predictions] if "teacher_predictions" in self.features else [predictions]
        return self._from_rows(np.hstack([np.asarray(part, dtype=np.float64) for part in parts]))

    def _from_rows(self, rows: np.ndarray) -> dict[str, float]:
        raise NotImplementedError

    def _metric_info(
        self, description: str, citation: str, url: str, result: str, teacher: bool = False
    ) -> evaluate.MetricInfo:
        floats = Sequence(Value("float64"))
        other = {"teacher_predictions": floats} if teacher else {"references": Value("int64")}
        return evaluate.MetricInfo(
            description=description,
            citation=citation,
            inputs_description=(_TEACHER_INPUTS if teacher else _LOGITS_INPUTS) + f"Returns:\n    {result}\n",
            features=Features({"predictions": floats, **other}),
            reference_urls=[url],
        )


class TopK(_LogitsMetric):
    """Fraction of samples whose label is among the k largest logits, under the key ``top{k}``.

    Equal logits are ordered by class index. With at most k classes the result is 1. Raises ValueError for k below 1.
    """

    def __init__(self, k: int, **kwargs: Any) -> None:
        self.k = _check_count("k", k)
        super().__init__(**kwargs)

    def _info(self) -> evaluate.MetricInfo:
        return self._metric_info(
            description=f"Top-{self.k} accuracy: the fraction of samples whose label is among the {self.k} largest "
            "logits, equal logits being ordered by class index.",
            citation=_IMAGENET_CITATION,
            url="https://arxiv.org/abs/1409.0575",
            result=f"top{self.k} (float): a fraction in [0, 1].",
        )

    def _from_rows(self, rows: np.ndarray) -> dict[str, float]:
        return {f"top{self.k}": top_k_accuracy(rows, self.k)}


class Top1(TopK):
    """Accuracy of the argmax, under the key ``top1``."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(1, **kwargs)


class Top5(TopK):
    """Fraction of samples whose label is among the 5 largest logits, under the key ``top5``."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(5, **kwargs)


class ExpectedCalibrationError(_LogitsMetric):
    """Expected calibration error over bins (lo, hi] of equal width, under the key ``ece``.

    See `expected_calibration_error`. Raises ValueError for fewer than 1 bin.
    """

    def __init__(self, num_bins: int = 15, **kwargs: Any) -> None:
        self.num_bins = _check_count("num_bins", num_bins)
        super().__init__(**kwargs)

    def _info(self) -> evaluate.MetricInfo:
        return self._metric_info(
            description="Expected calibration error: the mean absolute difference between accuracy and confidence "
            f"(the largest probability) over {self.num_bins} bins of equal width, weighted by their samples.",
            citation=_CALIBRATION_CITATION,
            url="https://arxiv.org/abs/1706.04599",
            result="ece (float): a fraction in [0, 1], 0 for perfect calibration.",
        )

    def _from_rows(self, rows: np.ndarray) -> dict[str, float]:
        return {"ece": expected_calibration_error(rows, self.num_bins)}


class NegativeLogLikelihood(_LogitsMetric):
    """Mean of ``-log softmax(logits)[label]`` in nats, under the key ``nll``: the plain cross-entropy."""

    def _info(self) -> evaluate.MetricInfo:
        return self._metric_info(
            description="Negative log-likelihood: the mean of -log q of the true class, q being the softmax of the "
            "logits. It equals the cross-entropy.",
            citation=_CALIBRATION_CITATION,
            url="https://arxiv.org/abs/1706.04599",
            result="nll (float): nats, at least 0; inf if a true class has a logit of -inf.",
        )

    def _from_rows(self, rows: np.ndarray) -> dict[str, float]:
        return {"nll": column_mean(rows, Column.NLL)}


class TeacherAgreement(_LogitsMetric):
    """How closely a student follows its teacher; its inputs are `predictions` and `teacher_predictions`, no labels.

    Gives ``teacher_agreement``, the fraction of samples with equal argmax, and ``teacher_divergence``, the mean
    D(p || q) in nats between the teacher's and the student's plain softmax.
    """

    def _info(self) -> evaluate.MetricInfo:
        return self._metric_info(
            description="Agreement of a student with its teacher: the fraction of samples on which both have the same "
            "argmax, and the mean Kullback-Leibler divergence from the teacher's distribution to the student's.",
            citation=_AGREEMENT_CITATION,
            url="https://arxiv.org/abs/2106.05945",
            result="teacher_agreement (float): a fraction in [0, 1].\n    teacher_divergence (float): nats, at least "
            "0; inf if the student rules out a class that the teacher does not.",
            teacher=True,
        )

    def _from_rows(self, rows: np.ndarray) -> dict[str, float]:
        return {
            "teacher_agreement": column_mean(rows, Column.AGREE),
            "teacher_divergence": column_mean(rows, Column.DIVERGENCE),
        }


def _to_tensor(name: str, value: Any) -> Tensor:
    """A tensor, an array or nested lists as a tensor on the CPU."""
    if isinstance(value, (list, tuple)) and len(value) > 0 and isinstance(value[0], Tensor):
        value = torch.stack(list(value))
    if not isinstance(value, Tensor):
        try:
            value = torch.as_tensor(np.asarray(value))
        except (TypeError, ValueError) as error:
            raise ValueError(f"`{name}` must be a rectangular array of numbers: {error}") from error
    return value.detach().cpu()


def _statistics_in_pieces(logits: Tensor, labels: Tensor | None, teacher_logits: Tensor | None) -> np.ndarray:
    """`per_sample_statistics` in fp64, without an fp64 copy of everything at once."""
    length = max(1, _ELEMENTS_AT_ONCE // logits.size(1))
    pieces = []
    for start in range(0, logits.size(0), length):
        part = slice(start, start + length)
        pieces.append(
            per_sample_statistics(
                logits[part].double(),
                None if labels is None else labels[part],
                None if teacher_logits is None else teacher_logits[part].double(),
            )
        )
    return torch.cat(pieces).numpy()
