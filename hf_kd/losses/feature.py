"""Losses on features as modules that a configuration can name.

A feature loss says which features of student and teacher it compares (names for :class:`hf_kd.features.FeatureTaker`),
is sized once from their shapes, and returns its value with statistics worth logging. It may have parameters, which are
trained together with the student's, and a state. It knows nothing of networks, trainers or the weight it will get.

Adding one: subclass :class:`FeatureLoss` and decorate it with ``@register_feature_loss("name")``;
``build_feature_loss("name")`` then finds it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn

from . import functional
from .registry import check_name, construct


class FeatureLoss(nn.Module):
    """Base of the named feature losses.

    It is made with its settings; then :meth:`build` gives it its parameters, before the optimiser is made and before a
    state is loaded; then it is called once a batch. It computes in the type of its parameters, whatever autocast
    surrounds it and whatever type the features have, and sends no gradient to the teacher.

    Everything that a resumed run needs is in ``state_dict()``: a loss built of the same shapes and seed that loads it
    goes on exactly. Random draws are made by a generator that is seeded anew for each sample from the seed, the number
    of calls in training so far, and the sample's place in the batch of all processes. So nothing of it differs between
    processes or devices of a kind, and several processes draw what one with their joined batch would.

    Its buffers are the same on every process: DistributedDataParallel around it needs no ``broadcast_buffers``.

    Args:
        student_features, teacher_features: names of the features to compare, in pairs; by default the method's own.

    Raises:
        ValueError: if the names do not come in pairs, or are not as many as the method needs.
    """

    default_features: ClassVar[tuple[str, ...]] = ("pre_logits",)
    """What the method takes of both networks unless it is told otherwise."""

    fewest_features: ClassVar[int] = 1
    most_features: ClassVar[int | None] = 1
    """How many features it can take of each network; None if there is no limit."""

    needs_labels: bool = False
    """Whether the labels of each batch must be given."""

    needs_index: bool = False
    """Whether the number of each sample in the data set must be given with each batch."""

    needs_sample_labels: bool = False
    """Whether :meth:`build` must be given the labels of the whole data set."""

    def __init__(
        self, *, student_features: Sequence[str] | None = None, teacher_features: Sequence[str] | None = None
    ) -> None:
        super().__init__()
        self.student_features = _names(student_features, self.default_features)
        self.teacher_features = _names(teacher_features, self.default_features)
        own, others = len(self.student_features), len(self.teacher_features)
        if own != others or own < self.fewest_features or (self.most_features or own) < own:
            wanted = "one feature" if self.most_features == 1 else f"features in pairs, {self.fewest_features} or more"
            raise ValueError(
                f"{type(self).__name__} compares {wanted} of each network, got the student's "
                f"{', '.join(self.student_features) or '(none)'} and the teacher's "
                f"{', '.join(self.teacher_features) or '(none)'}."
            )
        self.built = False
        self.seed = 0
        self.calls = 0
        self.gather: Callable[[Tensor], Tensor] = _alone
        self.rank = 0

    # ---- What subclasses define ------------------------------------------------------------------------------------

    def create(
        self,
        student_shapes: list[torch.Size],
        teacher_shapes: list[torch.Size],
        *,
        num_samples: int | None,
        sample_labels: Tensor | None,
    ) -> None:
        """Make parameters and buffers, in torch's random state of the seed; arguments as in :meth:`build`.

        Shapes are in the order of the names. Raises ValueError for shapes that the method cannot use.
        """
        raise TypeError(f"{type(self).__name__} must define create(student_shapes, teacher_shapes, ...).")

    def compute(
        self, student: list[Tensor], teacher: list[Tensor], labels: Tensor | None, index: Tensor | None, **given: Any
    ) -> dict[str, Tensor]:
        """The loss as :meth:`forward` returns it, from features in the order of the names."""
        raise TypeError(f"{type(self).__name__} must define compute(student, teacher, labels, index).")

    # ---- Use -------------------------------------------------------------------------------------------------------

    def build(
        self,
        student_shapes: Mapping[str, Sequence[int]],
        teacher_shapes: Mapping[str, Sequence[int]],
        *,
        num_samples: int | None = None,
        sample_labels: Sequence[int] | Tensor | None = None,
        seed: int = 0,
    ) -> None:
        """Make the parameters and the state, on the CPU.

        Args:
            student_shapes, teacher_shapes: the shape of each feature by its name, with the dimension of the batch, as
                :meth:`hf_kd.features.FeatureTaker.shapes` finds them.
            num_samples: how many samples the training set has, for a loss that ``needs_index``.
            sample_labels: the class of each of them, for a loss that ``needs_sample_labels``; a negative one means
                that it has none.
            seed: of the first values and of all random draws; the same on all processes.

        Raises:
            RuntimeError: if it is built already.
            ValueError: for missing values, and shapes that the method cannot use.
        """
        name = type(self).__name__
        if self.built:
            raise RuntimeError(f"{name} is built already, and its parameters may be in an optimiser: make a new one.")
        if self.needs_index and not num_samples:
            raise ValueError(
                f"{name} remembers every training sample and needs their number, `num_samples`, got {num_samples}: "
                "train on a data set that has a length."
            )
        if sample_labels is not None:
            sample_labels = torch.as_tensor(sample_labels).long().cpu()
            if sample_labels.shape != (num_samples,):
                raise ValueError(
                    f"`sample_labels` must be one class for each of the {num_samples} training samples, got the shape "
                    f"{tuple(sample_labels.shape)}."
                )
        student = [torch.Size(shape) for shape in _in_order("student", self.student_features, student_shapes)]
        teacher = [torch.Size(shape) for shape in _in_order("teacher", self.teacher_features, teacher_shapes)]
        self.seed = seed
        with _random_state_of(_mixed(seed, "parameters")):
            self.create(student, teacher, num_samples=num_samples, sample_labels=sample_labels)
        self.built = True

    def synchronise(self, gather: Callable[[Tensor], Tensor], rank: int) -> None:
        """Make the loss one of several processes, whose states stay equal.

        Args:
            gather: from a tensor (B, ...) of this process to that of all, (processes · B, ...), ordered by rank;
                ``accelerator.gather`` does it. It gets detached tensors, and every process calls it as often. The
                processes' batches must be equally large.
            rank: of this process.
        """
        self.gather = gather
        self.rank = rank

    def forward(
        self,
        student_features: Mapping[str, Tensor],
        teacher_features: Mapping[str, Tensor],
        labels: Tensor | None = None,
        index: Tensor | None = None,
        **given: Any,
    ) -> dict[str, Tensor]:
        """The loss of a batch.

        Args:
            student_features, teacher_features: by name, of shape (B, ...).
            labels: of the batch, for a loss that ``needs_labels``.
            index: (B,), each sample's number in the training set, for a loss that ``needs_index``.
            given: values to use in place of those that the loss would draw; see the loss.

        Returns:
            ``"feature"``, per sample (B,) or as a scalar mean, and statistics to log of the same two kinds.

        Raises:
            RuntimeError: if it is not built.
            ValueError: if a feature, or the labels or index that it needs, are missing.
        """
        name = type(self).__name__
        if not self.built:
            raise RuntimeError(f"{name} has no parameters yet: call build(student_shapes, teacher_shapes, ...) first.")
        if self.needs_labels and labels is None:
            raise ValueError(f"{name} needs the labels of each batch, and this one has none.")
        if self.needs_index and index is None:
            raise ValueError(
                f"{name} needs the `index` of each sample, its number in the training set, and this batch has none: "
                "use a data set whose samples have one, as those of hf_kd.data do."
            )
        dtype = next((parameter.dtype for parameter in self.parameters()), None)
        student = [
            functional.promote(feature) if dtype is None else feature.to(dtype)
            for feature in _in_order("student", self.student_features, student_features)
        ]
        teacher = [
            feature.detach().to(student[0].dtype)
            for feature in _in_order("teacher", self.teacher_features, teacher_features)
        ]
        with torch.autocast(student[0].device.type, enabled=False):
            parts = self.compute(student, teacher, labels, index, **given)
        if self.training:
            self.calls += 1
        return parts

    def generators(self, rows: int, device: torch.device) -> Iterator[torch.Generator]:
        """The generator for each of the ``rows`` samples of this process in the present call, one after the other."""
        generator = torch.Generator(device)
        for row in range(rows):
            # A generator's state is that of its device: seeds can be saved on one and used on another.
            yield generator.manual_seed(_mixed(self.seed, self.calls, self.rank * rows + row))

    def get_extra_state(self) -> Tensor:
        # As a tensor, which every file format holds.
        return torch.tensor([self.calls])

    def set_extra_state(self, state: Tensor) -> None:
        self.calls = int(state[0])


FEATURE_LOSSES: dict[str, type[FeatureLoss]] = {}


def register_feature_loss(name: str) -> Callable[[type[FeatureLoss]], type[FeatureLoss]]:
    """Class decorator that makes a feature loss available as ``name``. Raises ValueError on a taken name."""

    def register(cls: type[FeatureLoss]) -> type[FeatureLoss]:
        if name in FEATURE_LOSSES:
            raise ValueError(
                f"A feature loss named {name!r} is registered already; choose another name for {cls.__name__}."
            )
        FEATURE_LOSSES[name] = cls
        return cls

    return register


def check_feature_loss_name(name: str) -> str:
    """The name itself, or ValueError with the nearest one if no such feature loss exists."""
    return check_name("feature_loss", name, FEATURE_LOSSES)


def build_feature_loss(name: str, **kwargs: Any) -> FeatureLoss:
    """The feature loss registered as ``name``, not yet sized (:meth:`FeatureLoss.build`).

    Raises:
        ValueError: for an unknown name, an argument the loss does not take or lacks, or a value out of range.
    """
    cls = FEATURE_LOSSES[check_feature_loss_name(name)]
    return construct(cls, f"feature loss {name!r}", "feature_loss_kwargs", kwargs)


# ---- Pieces for the losses -----------------------------------------------------------------------------------------


def check_choice(name: str, value: str, choices: Sequence[str]) -> str:
    """value itself, or ValueError unless it is one of the choices."""
    if value not in choices:
        raise ValueError(f"`{name}` must be one of {', '.join(map(repr, choices))}, got {value!r}.")
    return value


def check_not_negative(name: str, value: float) -> float:
    """value itself, or ValueError unless it is zero or a positive, finite number."""
    return value if value == 0 else functional.check_positive(name, value)


def width(shape: torch.Size) -> int:
    """How many numbers a feature of shape (B, ...) has per sample."""
    return torch.Size(shape[1:]).numel()


def _names(given: Sequence[str] | None, default: tuple[str, ...]) -> tuple[str, ...]:
    return default if given is None else (given,) if isinstance(given, str) else tuple(given)


T = TypeVar("T")


def _in_order(network: str, names: Sequence[str], values: Mapping[str, T]) -> list[T]:
    missing = [name for name in names if name not in values]
    if missing:
        raise ValueError(
            f"The {network}'s features must include {', '.join(missing)}, got {', '.join(values) or 'none'}."
        )
    return [values[name] for name in names]


def _alone(tensor: Tensor) -> Tensor:
    return tensor


def _mixed(*parts: int | str) -> int:
    """A seed in which every part changes every bit: generators on the CPU use the lower half alone."""
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=7).digest(), "little")


@contextmanager
def _random_state_of(seed: int) -> Iterator[None]:
    """torch's random state on the CPU as after seeding; afterwards as before."""
    before = torch.get_rng_state()
    torch.default_generator.manual_seed(seed)
    try:
        yield
    finally:
        torch.set_rng_state(before)
