"""Contrastive representation distillation (CRD)."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .feature import FeatureLoss, check_choice, register_feature_loss, width
from .functional import check_positive


# Numbers drawn at a time when negatives are chosen; 4 bytes each.
_CHUNK = 2**26


@register_feature_loss("crd")
class CRD(FeatureLoss):
    """Contrastive representation distillation: tell a sample's own teacher feature from those of other samples.

    Tian, Krishnan and Isola, "Contrastive Representation Distillation", ICLR 2020 (arXiv 1910.10699), as in the
    authors' code (RepDistiller). Each network's features go through a linear layer of its own (both are trained) onto
    the unit sphere of ``feat_dim`` dimensions, and a memory for each keeps an embedding of every training sample. By
    noise-contrastive estimation a student's embedding v is compared with a positive entry of the *teacher's* memory
    and ``nce_k`` others, and a teacher's with entries of the student's memory; the two losses are added::

        P = exp(<v, entry> / nce_t) / Z          c = nce_k / num_samples
        loss = -log(P_0 / (P_0 + c + eps)) - sum_{i>0} log(c / (P_i + c + eps))

    where 0 is the positive and eps = 1e-7. Afterwards the entry of each sample of the batch becomes
    ``normalise(nce_m · old + (1 - nce_m) · v)``. Memories start uniform in ±1/sqrt(feat_dim / 3), not normalised. In
    eval mode neither memories nor Z change.

    Where the code departs from the paper it is followed, unless ``form="paper"``. Its Z, one for each direction, is
    the mean of exp(...) over the very first batch times ``num_samples``, for ever; the paper has none (Z = 1), nor
    eps. The temperature is rounded to float32, in which the code keeps it.

    Args:
        feat_dim: dimensions of the embeddings.
        nce_k: how many negatives each sample is compared with.
        nce_t: temperature.
        nce_m: share of the old entry in an update of the memory, in [0, 1).
        mode: the positive is the sample itself ("exact") or a random one of its class ("relax").
        negatives: "other_classes" as the code's data loader draws them, uniformly and each at most once (but with
            repetitions if a class leaves fewer than ``nce_k``); "all" as its memory does when it is left to draw,
            uniformly of all samples with repetitions, which needs no labels.
        form: "code" or "paper".
        student_features, teacher_features: one name each; features (B, ...) are flattened.

    :meth:`forward` takes ``contrast_index`` (B, nce_k + 1), the positive first, in place of what it would draw. It
    returns ``"feature"`` (B,), and its two parts as ``"crd_student"`` and ``"crd_teacher"`` (B,).

    Raises:
        ValueError: for a value out of range.
    """

    needs_index = True

    student_memory: Tensor
    teacher_memory: Tensor
    normalisers: Tensor
    classes: Tensor
    by_class: Tensor
    first_of_class: Tensor
    class_sizes: Tensor

    def __init__(
        self,
        feat_dim: int = 128,
        nce_k: int = 16384,
        nce_t: float = 0.07,
        nce_m: float = 0.5,
        mode: str = "exact",
        negatives: str = "other_classes",
        form: str = "code",
        student_features: Any = None,
        teacher_features: Any = None,
    ) -> None:
        super().__init__(student_features=student_features, teacher_features=teacher_features)
        for name, value in (("feat_dim", feat_dim), ("nce_k", nce_k)):
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"`{name}` must be a whole number of at least 1, got {value!r}.")
        if not 0.0 <= nce_m < 1.0:
            raise ValueError(f"`nce_m` must be in [0, 1), got {nce_m!r}: at 1 the memory would never change.")
        self.feat_dim = feat_dim
        self.nce_k = nce_k
        self.nce_t = torch.tensor(check_positive("nce_t", nce_t), dtype=torch.float32).item()
        self.nce_m = nce_m
        self.mode = check_choice("mode", mode, ("exact", "relax"))
        self.negatives = check_choice("negatives", negatives, ("other_classes", "all"))
        self.form = check_choice("form", form, ("code", "paper"))
        self.needs_sample_labels = mode == "relax" or negatives == "other_classes"
        self.eps = 1e-7 if form == "code" else 0.0

    def extra_repr(self) -> str:
        return f"nce_k={self.nce_k}, nce_t={self.nce_t:g}, nce_m={self.nce_m}, mode={self.mode}, form={self.form}"

    def create(
        self,
        student_shapes: list[torch.Size],
        teacher_shapes: list[torch.Size],
        *,
        num_samples: int | None,
        sample_labels: Tensor | None,
    ) -> None:
        assert num_samples is not None  # for the type checker: build() has refused it
        self.num_samples = num_samples
        self.student_embedding = nn.Linear(width(student_shapes[0]), self.feat_dim)
        self.teacher_embedding = nn.Linear(width(teacher_shapes[0]), self.feat_dim)
        bound = (self.feat_dim / 3) ** -0.5
        for name in ("student_memory", "teacher_memory"):
            self.register_buffer(name, torch.empty(num_samples, self.feat_dim).uniform_(-bound, bound))
        # Of the student's direction and the teacher's; 0 until they are known.
        self.register_buffer("normalisers", torch.zeros(2))
        if self.needs_sample_labels:
            self._learn_classes(num_samples, sample_labels)

    def _learn_classes(self, num_samples: int, labels: Tensor | None) -> None:
        if labels is None:
            raise ValueError(
                "CRD draws by class and needs the class of every training sample (`sample_labels`): train on a data "
                'set that gives its labels without loading its images, or set mode="exact" and negatives="all".'
            )
        # A sample without a label is a class of its own.
        labels = torch.where(labels < 0, int(labels.max()) + 1 + torch.arange(num_samples), labels)
        _, classes, sizes = labels.unique(return_inverse=True, return_counts=True)
        fewest = num_samples - int(sizes.max())
        if self.negatives == "other_classes" and fewest == 0:
            raise ValueError(
                f"CRD takes negatives of other classes, and all {num_samples} training samples are of one class: set "
                'negatives="all".'
            )
        self.repeats = fewest < self.nce_k
        # Known from the data set: not part of what is saved.
        for name, tensor in (
            ("classes", classes),
            ("by_class", classes.argsort(stable=True)),
            ("first_of_class", sizes.cumsum(0) - sizes),
            ("class_sizes", sizes),
        ):
            self.register_buffer(name, tensor, persistent=False)

    def compute(
        self,
        student: list[Tensor],
        teacher: list[Tensor],
        labels: Tensor | None,
        index: Tensor | None,
        contrast_index: Tensor | None = None,
        **given: Any,
    ) -> dict[str, Tensor]:
        assert index is not None  # for the type checker: forward() has refused it
        index = self._checked(index, len(student[0]))
        student_v = F.normalize(self.student_embedding(student[0].flatten(1)))
        teacher_v = F.normalize(self.teacher_embedding(teacher[0].flatten(1)))
        contrast_index = self.draw(index) if contrast_index is None else contrast_index
        # Each network's embedding against the memory of the other.
        logits = torch.stack(
            [
                _scores(student_v, self.teacher_memory, contrast_index),
                _scores(teacher_v, self.student_memory, contrast_index),
            ]
        ).div(self.nce_t)
        log_z = self._update(index, student_v.detach(), teacher_v.detach(), logits.detach())
        log_p = logits - log_z.view(2, 1, 1)
        noise = (contrast_index.shape[1] - 1) / self.num_samples
        log_all = torch.log(log_p.exp() + (noise + self.eps))
        positive = log_p[..., 0] - log_all[..., 0]
        negative = (math.log(noise) - log_all[..., 1:]).sum(dim=-1)
        student_part, teacher_part = -(positive + negative)
        return {
            "feature": student_part + teacher_part,
            "crd_student": student_part.detach(),
            "crd_teacher": teacher_part.detach(),
        }

    def _checked(self, index: Tensor, rows: int) -> Tensor:
        if index.shape != (rows,) or index.is_floating_point():
            raise ValueError(
                f"`index` must be one whole number for each of the {rows} samples, got {index.dtype} of shape "
                f"{tuple(index.shape)}."
            )
        # On an accelerator looking at it would stall the step, and it raises by itself.
        if index.device.type == "cpu" and rows and not 0 <= int(index.min()) <= int(index.max()) < self.num_samples:
            raise ValueError(
                f"`index` must be from 0 to {self.num_samples - 1}, the last of the training samples that CRD was "
                f"built for, got {int(index.min())} to {int(index.max())}."
            )
        return index.to(self.student_memory.device).long()

    # ---- Drawing ---------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def draw(self, index: Tensor) -> Tensor:
        """What each sample is compared with in the present call: (B, nce_k + 1) sample numbers, the positive first."""
        generators = self.generators(len(index), index.device)
        chunk = max(1, _CHUNK // self.num_samples)
        drawn = [self._draw(rows, generators) for rows in index.split(chunk)]
        return torch.cat(drawn) if drawn else index.new_empty(0, self.nce_k + 1)

    def _draw(self, index: Tensor, generators: Any) -> Tensor:
        rows, device = len(index), index.device
        luck = torch.empty(rows, 1, dtype=torch.long, device=device)
        by_key = self.negatives == "other_classes" and not self.repeats
        keys = torch.empty(rows, self.num_samples if by_key else 0, device=device)
        negatives = torch.empty(rows, self.nce_k, dtype=torch.long, device=device)
        # zip asks its first iterable first, and so takes no generator beyond the rows of this chunk.
        for row, generator in zip(range(rows), generators, strict=False):
            luck[row].random_(2**53, generator=generator)
            if by_key:
                keys[row].uniform_(generator=generator)
            elif self.negatives == "all":
                negatives[row].random_(self.num_samples, generator=generator)
            else:
                others = (self.classes != self.classes[index[row]]).float()
                torch.multinomial(others, self.nce_k, replacement=True, generator=generator, out=negatives[row])
        if by_key:
            keys.masked_fill_(self.classes == self.classes[index, None], -1.0)
            negatives = keys.topk(self.nce_k, sorted=False).indices
        positive = index[:, None]
        if self.mode == "relax":
            group = self.classes[positive]
            positive = self.by_class[self.first_of_class[group] + luck % self.class_sizes[group]]
        return torch.cat([positive, negatives], dim=1)

    # ---- State -----------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def _update(self, index: Tensor, student: Tensor, teacher: Tensor, logits: Tensor) -> Tensor:
        """Move the memories on, in training, and give log Z of both directions, (2,)."""
        means = logits.exp().mean(dim=2).T
        if self.training:
            # In one exchange; in a process of its own it is just this batch.
            student, teacher, means = self.gather(torch.cat([student, teacher, means], dim=1)).split(
                [self.feat_dim, self.feat_dim, 2], dim=1
            )
            index = self.gather(index)
            self._remember(self.student_memory, index, student)
            self._remember(self.teacher_memory, index, teacher)
        if self.form == "paper":
            return torch.zeros_like(self.normalisers)
        fresh = means.mean(dim=0) * self.num_samples
        normalisers = torch.where(self.normalisers > 0, self.normalisers, fresh)
        if self.training:
            # A first batch of features that are not finite is not to stay for ever.
            self.normalisers.copy_(torch.where(normalisers.isfinite(), normalisers, 0.0))
        return normalisers.log()

    def _remember(self, memory: Tensor, index: Tensor, new: Tensor) -> None:
        old = memory[index]
        # Rows of one sample write the same, in whatever order a device writes them: memories stay equal on all.
        updated = F.normalize(self.nce_m * old + (1.0 - self.nce_m) * new[_last_rows(index)])
        memory[index] = torch.where(updated.isfinite().all(dim=1, keepdim=True), updated, old)


def _last_rows(index: Tensor) -> Tensor:
    """For each row of ``index`` (B,) the last row with the same value, (B,)."""
    ordered, order = index.sort(stable=True)
    return order[torch.searchsorted(ordered, index, right=True) - 1]


def _scores(v: Tensor, memory: Tensor, contrast_index: Tensor) -> Tensor:
    """Inner products of v (B, D) and the entries of the memory (N, D) in ``contrast_index`` (B, K), (B, K)."""
    rows, entries = contrast_index.shape
    dimensions = memory.shape[1]
    # The memory changes before the backward pass, which needs what it was: either the chosen entries are copied, many
    # of them several times, or all of it once, with products that are not needed.
    if len(memory) * (dimensions + rows) < rows * entries * dimensions:
        return (v @ memory.clone().T).gather(1, contrast_index)
    return torch.bmm(memory[contrast_index], v.unsqueeze(2)).squeeze(2)
