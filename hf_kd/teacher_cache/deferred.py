"""A teacher that is not built until a row of it is missing."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers.utils import logging

from ..data.views import view_rng
from ..networks import Preprocessing
from ..teacher import Teacher
from .fingerprint import describe_teacher, same_teacher, source_of
from .storage import read_manifest


logger = logging.get_logger(__name__)


def recognised_teacher(
    given: Any, build: Callable[[], Teacher], folder: str, options: Mapping[str, Any]
) -> tuple[Teacher, dict[str, Any]]:
    """A teacher for a run with a cache, and its description.

    Args:
        given: what the trainer was given. By a name whose files are those that the cache was made from, it is not
            built now.
        build: makes it.
        folder: of the cache, whether it is there or not.
        options: with which ``build`` loads it.
    """
    manifest = read_manifest(Path(folder).expanduser())
    stored: dict[str, Any] = (manifest or {}).get("fingerprint", {})
    source = source_of(given, **options)
    if source is not None and source == (stored.get("teacher") or {}).get("source"):
        described = {**stored["teacher"], **{key: stored[key] for key in ("preprocessing", "class_map")}}
        return DeferredTeacher(build, described), described
    teacher = build()
    # What was fetched just now is known only now.
    return teacher, describe_teacher(teacher, source_of(given, **options))


class DeferredTeacher(Teacher):
    """Stands for a teacher that a cache has the outputs of, and builds it when it has to run after all.

    Args:
        build: makes it.
        described: what the cache's manifest says of it.

    Raises:
        ValueError: when it is built, if it is not the one that was described.
    """

    def __init__(self, build: Callable[[], Teacher], described: Mapping[str, Any]) -> None:
        # Not a module yet, and nothing in `super` may look into it.
        super().__init__(build, name=described["name"], hub_id=described["hub_id"], revision=described["revision"])
        self.own_num_classes = described["num_classes"]
        self._described = described
        self._built_teacher: Teacher | None = None
        self._preparations: list[Callable[[Teacher], None]] = []

    @property
    def is_built(self) -> bool:
        """Whether it had to run."""
        return self._built_teacher is not None

    @property
    def is_module(self) -> bool:
        return True

    @property
    def declares_preprocessing(self) -> bool:
        return self._described["declares_preprocessing"]

    @property
    def num_parameters(self) -> int:
        return self._described["parameters"]

    @property
    def parts(self) -> list[Teacher]:
        """None: what is not built is not measured."""
        return []

    def match(self, num_classes: int | None, preprocessing: Preprocessing | None) -> None:
        # The class count is checked now, the rest when it is built.
        super().match(num_classes, None)
        self._prepare(lambda network: network.match(num_classes, preprocessing))

    def place(self, device: torch.device, **options: Any) -> None:
        self._prepare(lambda network: network.place(device, **options))

    def forward(self, *args: Any, **inputs: Any) -> Tensor:
        if self._built_teacher is None:
            self._built_teacher = self._build()
        return self._built_teacher(*args, **inputs)

    def _prepare(self, step: Callable[[Teacher], None]) -> None:
        if self._built_teacher is None:
            self._preparations.append(step)
        else:
            step(self._built_teacher)

    def _build(self) -> Teacher:
        logger.info("The teacher %s is built, since its cache lacks rows.", self.name)
        # Networks draw their initial weights; the run must not notice.
        with view_rng(0, 0, 0):
            network = self.model()
        if not same_teacher({**describe_teacher(network, None)}, {**self._described, "source": None}):
            raise ValueError(
                f"The teacher {self.name} that was loaded is not the one of the cache: its weights are others, "
                "although its files are the same. Give another `teacher_cache_dir`."
            )
        for step in self._preparations:
            step(network)
        return network
