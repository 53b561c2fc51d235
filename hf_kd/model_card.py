"""The model card of a student, written from the run: its metadata for the Hub and its text for a reader."""

from __future__ import annotations

import dataclasses
import difflib
import importlib.resources
import inspect
import json
import math
import numbers
import os
import platform
import re
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import jinja2
import torch
import transformers
import yaml
from huggingface_hub import EvalResult, EvalResultEntry, ModelCardData, eval_result_entries_to_yaml
from torch import nn
from transformers import PreTrainedModel, TimmWrapperForImageClassification
from transformers.utils import logging

from .card_edits import BEGIN, END, parse, refresh, with_edits_of, written_by_hand
from .curves import CURVES
from .files import atomic_write, write_text
from .losses.feature import FEATURE_LOSSES
from .losses.logit import LOSSES
from .networks import unwrap
from .student import CONFIG, export_config, own_label_names


if TYPE_CHECKING:
    from transformers import TrainerState

    from .config import DistillationConfig
    from .trainer import DistillationTrainer


logger = logging.get_logger(__name__)

README = "README.md"
PROVENANCE = "distillation.json"
"""How a student came about, as the trainer writes it beside the weights."""
TEMPLATE = "student.md.jinja"

Number = float | Sequence[float]
"""One value, or one per run: shown as mean ± sample standard deviation."""

# Column title, factor, format.
_COLUMNS = {
    "top1": ("Top-1 (%)", 100.0, ".2f"),
    "top5": ("Top-5 (%)", 100.0, ".2f"),
    "nll": ("NLL (nats)", 1.0, ".4f"),
    "ece": ("Calibration error", 1.0, ".4f"),
    "entropy": ("Entropy of q (nats)", 1.0, ".4f"),
    "teacher_agreement": ("Agrees with teacher (%)", 100.0, ".2f"),
    "teacher_divergence": ("Divergence from teacher (nats)", 1.0, ".4f"),
    "parameters": ("Parameters", 1.0, ",.0f"),
    "megabytes": ("MB", 1.0, ".2f"),
    "latency_ms": ("ms per image", 1.0, ".2f"),
}
_FRACTIONS = ("top1", "top5", "ece", "teacher_agreement")
# Evaluation metrics with a place in the card's metadata: identifier, name.
_INDEXED = {
    "top1": ("accuracy", "Top-1"),
    "accuracy": ("accuracy", "Accuracy"),
    "top5": ("top_5_accuracy", "Top-5"),
    "nll": ("nll", "Negative log-likelihood"),
    "ece": ("ece", "Expected calibration error"),
}
_NOT_METRICS = ("runtime", "samples_per_second", "steps_per_second", "model_preparation_time", "jit_compilation_time")

# Formula, and what its symbols mean.
_OBJECTIVES = {
    "kd": ("T² · D(p_T ‖ q_T)", "p_T and q_T the same at temperature T = 1/γ, and D the Kullback-Leibler divergence"),
    "ttm": ("D(p_T ‖ q)", "p_T is p^γ normalised (temperature T = 1/γ), and D the Kullback-Leibler divergence"),
    "wttm": (
        "U · D(p_T ‖ q)",
        "p_T is p^γ normalised (temperature T = 1/γ), U = Σ p^γ, and D the Kullback-Leibler divergence",
    ),
    "dkd": (
        "T² · (a · D(b ‖ b') + c · D(p' ‖ q'))",
        "at temperature T: b and b' are the teacher's and the student's (labelled class, all others), p' and q' their "
        "distributions over the others, D the Kullback-Leibler divergence, and a and c the loss's own alpha and beta",
    ),
    "dist": (
        "T² · (b · (1 - r) + c · (1 - s))",
        "at temperature T: r is their Pearson correlation over the classes of a sample, averaged over the samples, s "
        "the one over the samples for a class, averaged over the classes, and b and c the loss's own beta and gamma",
    ),
    "nkd": (
        "(c · T² · H(p', q') - p_y · log q_y)",
        "y is the labelled class, p' and q' are their distributions over the other classes at temperature T, H the "
        "cross-entropy, and c the loss's own gamma",
    ),
}
_PER_BATCH = ("dist",)
"""Losses that have no value per sample."""


def _bibtex(key: str, title: str, authors: str, year: int, arxiv: str, booktitle: str | None = None) -> str:
    fields = {
        "title": title,
        "author": authors,
        **({"booktitle": booktitle} if booktitle else {}),
        "year": year,
        "eprint": arxiv,
        "archivePrefix": "arXiv",
        "url": f"https://arxiv.org/abs/{arxiv}",
    }
    lines = [f"  {name:<13} = {{{value}}}" for name, value in fields.items()]
    return "\n".join([f"@{'inproceedings' if booktitle else 'misc'}{{{key},", ",\n".join(lines), "}"])


_ZHENG_YANG = _bibtex(
    "zheng2024knowledge",
    "Knowledge Distillation Based on Transformed Teacher Matching",
    "Zheng, Kaixiang and Yang, En-Hui",
    2024,
    "2402.11148",
    "International Conference on Learning Representations (ICLR)",
)
_HINTON = _bibtex(
    "hinton2015distilling",
    "Distilling the Knowledge in a Neural Network",
    "Hinton, Geoffrey and Vinyals, Oriol and Dean, Jeff",
    2015,
    "1503.02531",
)
_ZHAO = _bibtex(
    "zhao2022decoupled",
    "Decoupled Knowledge Distillation",
    "Zhao, Borui and Cui, Quan and Song, Renjie and Qiu, Yiyu and Liang, Jiajun",
    2022,
    "2203.08679",
    "IEEE/CVF Conference on Computer Vision and Pattern Recognition (CVPR)",
)
_HUANG = _bibtex(
    "huang2022knowledge",
    "Knowledge Distillation from A Stronger Teacher",
    "Huang, Tao and You, Shan and Wang, Fei and Qian, Chen and Xu, Chang",
    2022,
    "2205.10536",
    "Advances in Neural Information Processing Systems (NeurIPS)",
)
_YANG = _bibtex(
    "yang2023knowledge",
    "From Knowledge Distillation to Self-Knowledge Distillation: A Unified Approach with Normalized Loss\n"
    "                   and Customized Soft Labels",
    "Yang, Zhendong and Zeng, Ailing and Li, Zhe and Zhang, Tianke and Yuan, Chun and Li, Yu",
    2023,
    "2303.13005",
    "IEEE/CVF International Conference on Computer Vision (ICCV)",
)
_CITATIONS = {
    "kd": _HINTON,
    "ttm": _ZHENG_YANG,
    "wttm": _ZHENG_YANG,
    "dkd": _ZHAO,
    "dist": _HUANG,
    "nkd": _YANG,
}

_CARD = "card"
"""Where distillation.json keeps what the card was made of."""
_FROM_CONFIG = ("library", "model_class", "takes_images", "label_names", "in_chans", "has_processor", "registered_by")

_IMAGE_CLASS = "AutoModelForImageClassification"
_TAGS = ("knowledge-distillation", "timm", "hf_kd")
_MOST_LABELS = 30


@dataclass
class StudentCard:
    """What is known of a student and how it came about; :meth:`render` makes the card of it.

    Only what is known is printed: a field left at None or empty leaves out its line or section.

    Args:
        model_name: the card's title, and the model's name in the metadata of its results.
        license: licence identifier of the weights, as the Hub spells it (``"apache-2.0"``).
        dataset_license: the licence identifier of the training data, which the weights inherit if ``license`` is not
            given; failing that, they inherit the one of the weights that the student started from. Without any the
            card says that there is none.
        dataset: Hub ids of the training data. Of a local path only the last part is used, as a name.
        dataset_name: how the data are called in the text.
        dataset_split: the split that ``metrics`` are from, for the metadata.
        dataset_config: the data set's configuration on the Hub, for the metadata.
        data_description: sentences on the data, such as how many samples have labels.
        evaluated_on: what ``metrics`` and ``results`` were measured on, such as "1,000 test digits".
        metrics: of these weights, by the names of the trainer's evaluation (fractions in [0, 1]).
        results: further rows of the table, by name (teacher, baselines, other losses): metrics as above and
            "parameters", "megabytes", "latency_ms", each a number, one number per run, or text.
        limits: what a user of the student must know, a sentence each.
        language, tags: for the metadata.
        base_model: Hub id of the published weights that the student started from, if it did.
        benchmark_task: the task's name where the data set is a benchmark of the Hub, for the evaluation results.
        pipeline_tag: the Hub's task; image-classification by default for students that take images.
        repo_id: where the student is published; the code examples then load it from there.
        folder: name of the folder it is saved in, for the code examples; by default that which the card is saved to.
        provenance: what the trainer writes to distillation.json.
        settings, training: further lines on the objective, and on the schedule (:func:`describe_training`).
        train_samples: number of training samples.
        seeds: of all the runs in ``results``; by default the run's own seed.
        machine: :func:`describe_machine`.
        library: how the student is opened: "timm" (transformers can, too), "transformers", or None (weights alone).
        model_class: name of its class in transformers, for "transformers".
        takes_images: whether its input is images.
        label_names: of the classes.
        in_chans: channels of the images.
        has_processor: whether the folder says how its images are prepared.
        registered_by: the module whose import registers the network with timm, if timm does not have it.
        curves: path of the picture of the training's curves, beside the card.

    Raises:
        ValueError: for fractions outside [0, 1] (percentages).
    """

    model_name: str = "student"

    # What the user gives
    license: str | None = None
    dataset_license: str | None = None
    dataset: str | Sequence[str] | None = None
    dataset_name: str | Sequence[str] | None = None
    dataset_split: str | None = None
    dataset_config: str | Sequence[str] | None = None
    data_description: str | None = None
    evaluated_on: str | None = None
    metrics: Mapping[str, Number] = field(default_factory=dict)
    results: Mapping[str, Mapping[str, Number | str]] = field(default_factory=dict)
    limits: str | Sequence[str] = ()
    language: str | Sequence[str] | None = None
    tags: str | Sequence[str] | None = None
    base_model: str | None = None
    benchmark_task: str = "default"
    pipeline_tag: str | Sequence[str] | None = None
    repo_id: str | None = None

    # What the run gives
    folder: str | None = None
    provenance: Mapping[str, Any] = field(default_factory=dict)
    settings: Mapping[str, str] = field(default_factory=dict)
    training: Mapping[str, str] = field(default_factory=dict)
    train_samples: int | None = None
    seeds: Sequence[int] | None = None
    machine: str | None = None
    library: str | None = "timm"
    model_class: str | None = None
    takes_images: bool = True
    label_names: Sequence[str] | None = None
    in_chans: int = 3
    has_processor: bool = True
    registered_by: str | None = None
    curves: str | None = None

    def __post_init__(self) -> None:
        self.model_name = _public_name(self.model_name)
        for name, row in {"metrics": self.metrics, **self.results}.items():
            for key in _FRACTIONS:
                if any(not 0 <= value <= 1 for value in _numbers(row.get(key))):
                    raise ValueError(f"`{key}` of {name!r} must be a fraction in [0, 1], got {row[key]}.")

    # ---- Where it comes from ---------------------------------------------------------------------------------------

    @classmethod
    def from_trainer(
        cls, trainer: DistillationTrainer, *, teacher: Mapping[str, Any] | None = None, **given: Any
    ) -> StudentCard:
        """The card of a trainer's student.

        The metrics are those of the last evaluation, or of the best one if its weights were loaded at the end.

        Args:
            teacher: "id", "top1" (on the evaluation data) and "parameters" in place of what the trainer knows: for a
                teacher whose outputs were stored, say.
            given: the fields of the class that only the user knows, or that are to be other than the run's. Results,
                limits and tags are added to the run's. Metrics may have a prefix:
                ``metrics=trainer.evaluate(test, metric_key_prefix="test")``.
        """
        _check_fields(given)
        args, state, student = trainer.args, trainer.state, unwrap(trainer.model)
        provenance = trainer.provenance()
        settings = _loss_settings(provenance["loss"], args.loss_arguments)
        if provenance["teacher"] and trainer.teacher is not None and trainer.teacher.is_module:
            provenance["teacher"]["parameters"] = trainer.teacher.num_parameters
        if teacher is not None:
            provenance["teacher"] = {**(provenance["teacher"] or {}), **teacher}

        facts: dict[str, Any] = {
            **_facts_of_model(student, trainer.processing_class is not None),
            "folder": Path(args.output_dir).resolve().name,
            "provenance": provenance,
            "settings": settings,
            "training": describe_training(args, state, trainer.optimizer, _own_scheduler(trainer)),
            "train_samples": _length(trainer.train_dataset),
            "machine": describe_machine(args.device, args.world_size),
        }
        repo_id = getattr(trainer, "hub_model_id", None) or args.hub_model_id
        if repo_id and "/" in repo_id:
            facts["repo_id"] = repo_id
        # A data set from the Hub knows its licence: an identifier, or prose that is none.
        licence = getattr(getattr(trainer.train_dataset, "info", None), "license", None)
        if isinstance(licence, str) and re.fullmatch(r"[a-z0-9][a-z0-9.-]*", licence):
            facts["dataset_license"] = licence
        if given.get("metrics") is None:
            facts.update(_evaluation(trainer))
        else:
            given["metrics"] = _metrics_in(given["metrics"])
        if (provenance["student"]["num_classes"] or 6) <= 5:
            # Right by construction.
            facts["metrics"] = {key: value for key, value in facts.get("metrics", {}).items() if key != "top5"}
        results = {**facts.pop("results", {}), **(given.pop("results", None) or {})}
        limits = [*_lines(given.pop("limits", None)), *_lines(facts.pop("limits", None))]
        own_tags = [tag for tag in type(trainer)._tag_names if tag not in _TAGS]
        facts["tags"] = [*_lines(given.pop("tags", None)), *own_tags]
        facts["model_name"] = (facts.get("repo_id") or facts["folder"]).rpartition("/")[2]
        given = {key: value for key, value in given.items() if value is not None}
        return cls(**{**facts, "results": results, "limits": limits, **given})

    @classmethod
    def from_folder(
        cls, folder: str | os.PathLike[str], *, config_file: Path | None = None, **given: Any
    ) -> StudentCard:
        """The card of a student saved earlier: its config.json, and what distillation.json holds of its last card.

        Args:
            config_file: a configuration in place of the folder's.
            given: fields of the class that only the user knows, or that are to be other than the last card's.
        """
        _check_fields(given)
        folder = Path(folder)
        read = {CONFIG: config_file or folder / CONFIG, PROVENANCE: folder / PROVENANCE}
        content = {name: json.loads(path.read_text(encoding="utf-8")) for name, path in read.items() if path.is_file()}
        config, provenance = content.get(CONFIG), content.get(PROVENANCE, {})
        facts: dict[str, Any] = {"folder": folder.resolve().name}
        facts.update(provenance.pop(_CARD, {}), provenance=provenance)
        facts["curves"] = CURVES if (folder / CURVES).is_file() else None
        if config is None:
            facts.update(library=None)
        elif "architecture" in config:
            facts.update(_facts_of_timm(config))
        else:
            (model_class,) = (config.get("architectures") or [None])[:1]
            labels = config.get("id2label")
            facts.update(
                library="transformers",
                model_class=model_class,
                takes_images=str(model_class).endswith("ForImageClassification"),
                label_names=own_label_names([labels[key] for key in sorted(labels, key=int)] if labels else []),
                in_chans=config.get("num_channels", 3),
                has_processor=(folder / "preprocessor_config.json").is_file(),
            )
        return cls(**{"model_name": facts["folder"], **facts, **given})

    # ---- What comes of it ------------------------------------------------------------------------------------------

    @property
    def metadata(self) -> ModelCardData:
        """The card's YAML: what the Hub shows, filters and links by."""
        teacher, loss = self.provenance.get("teacher"), self.provenance.get("loss")
        tags = [tag for tag in _TAGS if (tag != "knowledge-distillation" or teacher)]
        tags = [tag for tag in tags if tag != "timm" or self.library == "timm"]
        if teacher and loss in LOSSES:
            tags.insert(1, loss)
        if self.provenance.get("feature_loss"):
            tags.insert(1, self.provenance["feature_loss"])
        results, base_model = self.eval_results, self.base_model or self._started_from.get("id")
        return ModelCardData(
            language=_one_or_list(self.language),
            license=self._license,
            library_name=self.library,
            pipeline_tag=self._task if self.pipeline_tag or (self.library and self.takes_images) else None,
            tags=[*tags, *_lines(self.tags)],
            datasets=[name for name in _lines(self.dataset) if _is_hub_id(name)] or None,
            metrics=["accuracy"] if {"top1", "accuracy"} & self.metrics.keys() else None,
            base_model=base_model if base_model and _is_hub_id(base_model) else None,
            teacher_model=[name for name in self._teachers_on_hub() if name] or None,
            eval_results=results or None,
            model_name=self.model_name if results else None,
        )

    @property
    def eval_results(self) -> list[EvalResult]:
        """The metrics as the Hub's model-index wants them: none without the data set's id or name."""
        names = [_public_name(name) for name in (*_lines(self.dataset_name), *_lines(self.dataset))]
        ids = [_public_name(name) for name in (*_lines(self.dataset), *_lines(self.dataset_name))]
        if not names:
            return []
        found = []
        for key, (metric_type, metric_name) in _INDEXED.items():
            values = _numbers(self.metrics.get(key))
            if values and all(map(math.isfinite, values)):
                found.append(
                    EvalResult(
                        task_type=self._task,
                        dataset_type=ids[0],
                        dataset_name=names[0],
                        dataset_config=next(iter(_lines(self.dataset_config)), None),
                        dataset_split=self.dataset_split,
                        metric_type=metric_type,
                        metric_name=metric_name + (f" (mean of {len(values)} runs)" if len(values) > 1 else ""),
                        metric_value=round(statistics.fmean(values), 6),
                    )
                )
        return found

    def eval_result_files(self) -> dict[str, str]:
        """The first metric in the Hub's newer form, a YAML file for each benchmark: its path, and its text.

        It refers to a data set on the Hub, so there is none for other data.
        """
        key = next((key for key in _INDEXED if _numbers(self.metrics.get(key))), None)
        files = {}
        for name in _lines(self.dataset):
            if key is None or "/" not in name or not _is_hub_id(name):
                continue
            _, factor, _ = _COLUMNS.get(key, ("", 1.0, ""))
            notes = [_INDEXED[key][1] + (" in %" if factor == 100 else "")]
            notes += [f"split {self.dataset_split}"] if self.dataset_split else []
            dataset, _, revision = name.partition("@")
            entry = EvalResultEntry(
                dataset_id=dataset,
                dataset_revision=revision or None,
                task_id=self.benchmark_task,
                value=round(factor * statistics.fmean(_numbers(self.metrics[key])), 4),
                notes=", ".join(notes),
            )
            text = yaml.safe_dump(eval_result_entries_to_yaml([entry]), sort_keys=False, allow_unicode=True)
            files[f".eval_results/{dataset.replace('/', '__')}.yaml"] = text
        return files

    def known_license(self, existing: str | None = None) -> str | None:
        """The licence that was given or is inherited, or else the one in an existing card."""
        card = None if existing is None else parse(existing)
        return self._license or (card.data.get("license") if card is not None else None)

    @property
    def _license(self) -> str | None:
        return self.license or self.dataset_license or self._started_from.get("license")

    @property
    def _license_source(self) -> str | None:
        """What the licence is inherited from, if it is."""
        if self.license or not self._license:
            return None
        return "the data set" if self.dataset_license else "the weights that the student started from"

    @property
    def _started_from(self) -> Mapping[str, Any]:
        """The published weights that the student started from, as its provenance tells."""
        return (self.provenance.get("student") or {}).get("base_model") or {}

    @property
    def _task(self) -> str:
        default = "image-classification" if self.takes_images else "text-classification"
        return next(iter(_lines(self.pipeline_tag)), default)

    def render(self) -> str:
        """The whole card: metadata and text."""
        return f"---\n{self.metadata.to_yaml()}\n---\n\n{self._body()}"

    def save(self, folder: str | os.PathLike[str]) -> Path:
        """Write README.md into a folder; its path.

        In a card that is there already, what stands between the two hf_kd marks is replaced, and in the metadata the
        keys that this card has (a model-index it does not have goes, as one of an earlier run); all else is kept. A
        README.md without the marks is somebody's own: it is left alone, and a warning says what to do. Where the
        folder has a distillation.json, that remembers what the card was made of, for :meth:`from_folder`.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / README
        card = self if self.folder else dataclasses.replace(self, folder=folder.resolve().name)
        existing = None
        if path.exists():
            with path.open(encoding="utf-8-sig", newline="") as file:
                existing = file.read()
        text = card.merged(existing, where=str(folder))
        if text != existing:
            with atomic_write(path) as draft, draft.open("w", encoding="utf-8", newline="") as file:
                file.write(text)
        if (folder / PROVENANCE).is_file():
            write_text(folder / PROVENANCE, json.dumps({**self.provenance, _CARD: self._facts()}, indent=2) + "\n")
        return path

    def merged(self, local: str | None, remote: str | None = None, *, where: str = "the folder") -> str:
        """The card's text, with what was written by hand into an earlier one.

        Args:
            local: the card in the student's folder, if there is one.
            remote: the one on the Hub. What is written by hand in both is taken from the folder.
            where: how messages call the place of a card that cannot be renewed.
        """
        base, generated = local, self.metadata.to_dict().keys()
        if remote is not None:
            base, where = remote, "the repository"
            by_hand = written_by_hand(local) if local else ""
            if by_hand and written_by_hand(remote) not in ("", by_hand):
                logger.warning(
                    "The card was edited by hand on the Hub and in the folder: the folder's text is taken. The Hub's "
                    "is in the repository's last commit before this one."
                )
            if local is not None:
                base = with_edits_of(remote, local, {*generated, "license", "model-index"})
        if base is None:
            return self.render()
        refreshed = self._refreshed(base)
        if refreshed is None:
            logger.warning(
                "The README.md in %s is left as it is: it has no pair of marks %s and %s (or its metadata is no "
                "YAML), so it was not written by hf_kd. Move it away to have a card written, or put the marks where "
                "the card's text shall go.",
                where,
                BEGIN,
                END,
            )
            return base
        return refreshed

    def _refreshed(self, existing: str) -> str | None:
        """An existing card with the generated parts renewed, or None if it has no place for them."""
        # A licence that someone wrote in by hand is one that was given.
        card = self if self._license else dataclasses.replace(self, license=self.known_license(existing))
        return refresh(existing, card.metadata, card._body(), {*_TAGS, *LOSSES, *FEATURE_LOSSES})

    def _facts(self) -> dict[str, Any]:
        """What distillation.json does not hold otherwise, and neither the folder nor the repository's name says."""
        elsewhere = ("provenance", "folder", "repo_id", "curves", *_FROM_CONFIG)
        return {
            key: value
            for key, value in dataclasses.asdict(self).items()
            if key not in elsewhere and value not in (None, (), {}, [])
        }

    # ---- The text --------------------------------------------------------------------------------------------------

    def _body(self) -> str:
        provenance = self.provenance
        student, loss = provenance.get("student") or {}, provenance.get("loss")
        teacher = self._teacher()
        formula, symbols = _OBJECTIVES.get(str(loss), (None, None)) if teacher else (None, None)
        labels = self.label_names or ()
        environment = jinja2.Environment(
            undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True
        )
        return environment.from_string(template_path().read_text(encoding="utf-8")).render(
            title=self.model_name,
            architecture=student.get("architecture"),
            parameters=student.get("parameters"),
            num_classes=student.get("num_classes"),
            takes_images=self.takes_images,
            trained=bool(provenance),
            labels=[_cell(name) for name in labels] if len(labels) <= _MOST_LABELS else [],
            teacher=teacher,
            loss_title=_loss_title(loss, provenance.get("feature_loss")),
            objective=self._objective(formula) if formula else None,
            loss_symbols=symbols,
            objective_of="batch" if loss in _PER_BATCH else "sample",
            settings=list(self._settings().items()) if teacher else [],
            table=self._table(),
            evaluated_on=self.evaluated_on,
            spread_note=self._spread_note(),
            library=self.library,
            model_class=_auto_class(self.model_class) if self.library == "transformers" else _IMAGE_CLASS,
            picture_mode={1: "L", 3: "RGB"}.get(self.in_chans),
            has_processor=self.has_processor,
            repo_id=self.repo_id,
            folder=self.folder or self.model_name,
            data=self._data(),
            training=[(name, _cell(value)) for name, value in self._training().items()],
            environment=self._environment(),
            limits=self._limits(),
            license=self._license,
            license_inherited=self._license_source,
            registered_by=self.registered_by,
            curves=self.curves,
            base_model=self._base_model_link(),
            citation=_CITATIONS.get(str(loss)) if teacher else None,
        )

    def _teacher(self) -> dict[str, Any] | None:
        teacher = self.provenance.get("teacher")
        if not teacher:
            return None
        names = [_public_name(name) for name in str(teacher["id"]).split(" + ")]
        links = [
            f"[{name}](https://huggingface.co/{on_hub.replace('@', '/tree/')})" if on_hub else f"`{name}`"
            for name, on_hub in zip(names, self._teachers_on_hub(), strict=True)
        ]
        top1, revision = teacher.get("top1"), teacher.get("revision")
        return {
            "text": " + ".join(links),
            "parameters": teacher.get("parameters"),
            "top1": None if top1 is None else f"{100 * top1:.2f}",
            "revision": revision,
        }

    def _teachers_on_hub(self) -> list[str | None]:
        """The Hub ids of the teacher, or of an ensemble's members; None for one that is not there."""
        teacher = self.provenance.get("teacher")
        if not teacher:
            return []
        names = [_public_name(name) for name in str(teacher["id"]).split(" + ")]
        known = str(teacher.get("hub_id") or " + " * (len(names) - 1)).split(" + ")
        named = [name if _is_hub_id(name) and "/" in name else None for name in names]
        return [on_hub or name for on_hub, name in zip(known, named, strict=True)]

    def _base_model_link(self) -> str | None:
        name = self.metadata.base_model
        return f"[{name}](https://huggingface.co/{name})" if isinstance(name, str) else None

    def _objective(self, formula: str) -> str:
        terms = []
        for key, symbol, term in (("ce_weight", "w", "CE"), ("beta", "β", formula)):
            weight = self.provenance.get(key)
            if weight != 0:
                terms.append(
                    term if weight == 1 else f"{symbol if weight is None else format(weight, '.4g')} · {term}"
                )
        if self.provenance.get("feature_loss"):
            weight = self.provenance["feature_weight"]
            feature = self.provenance["feature_loss"].upper()
            terms.append(feature if weight == 1 else f"{weight:.4g} · {feature}")
        return " + ".join(terms)

    def _settings(self) -> dict[str, str]:
        """The objective's numbers. A loss of the user's own need not listen to gamma, so it is not shown."""
        run = self.provenance
        lines = {}
        named = LOSSES.get(str(run.get("loss")))
        if named is not None and run.get("gamma") is not None:
            if named.gamma_argument == "gamma":
                lines["γ (gamma)"] = f"{run['gamma']:.4g}, which is temperature T = {run['temperature']:.4g}"
            else:
                lines["T (temperature)"] = f"{run['temperature']:.4g}"
        if run.get("beta_setting") == "auto":
            measured = "not measured yet" if run.get("beta") is None else f"{run['beta']:.4g}, measured"
            lines["β (beta)"] = f'{measured} (`beta="auto"`: KD\'s balance at λ = {run["balance_lambda"]:g})'
        elif run.get("beta") is not None:
            lines["β (beta)"] = f"{run['beta']:.4g}"
        if run.get("ce_weight") is not None:
            weight = run["ce_weight"]
            lines["weight of the labels (ce_weight)"] = f"{weight:.4g}" if weight else "0: labels were not used"
        if run.get("feature_loss"):
            given = ", ".join(f"{key}={value}" for key, value in (run.get("feature_loss_kwargs") or {}).items())
            lines[f"μ (feature_weight), of {run['feature_loss'].upper()} on features"] = (
                f"{run['feature_weight']:.4g}" + (f" ({given})" if given else "")
            )
        return {**lines, **self.settings}

    def _training(self) -> dict[str, str]:
        lines = dict(self.training)
        if self.provenance.get("averaged_weights"):
            warmup = ", with warm-up" if self.provenance.get("ema_warmup") else ""
            average = f"exponential moving average over the steps (ema_decay {self.provenance['ema_decay']}{warmup})"
            lines["Weights"] = f"{average}, {lines['Weights']}" if "Weights" in lines else average
        seeds = self.seeds if self.seeds is not None else _lines_of_seed(self.provenance.get("seed"))
        if lines and seeds:
            lines["Seeds" if len(seeds) > 1 else "Seed"] = ", ".join(map(str, seeds))
        return lines

    def _data(self) -> list[str]:
        ids = [_public_name(name) for name in _lines(self.dataset)]
        linked = [f"[{name}](https://huggingface.co/datasets/{name})" if _is_hub_id(given) else name
                  for name, given in zip(ids, _lines(self.dataset), strict=True)]  # fmt: skip
        names = [_public_name(name) for name in _lines(self.dataset_name)]
        called = " and ".join(names) + (f" ({', '.join(linked)})" if names and linked else ", ".join(linked))
        size = f"{self.train_samples:,} training samples" if self.train_samples is not None else ""
        first = ": ".join(filter(None, [called, size]))
        return [f"{sentence.rstrip('.')}." for sentence in (first, self.data_description) if sentence]

    def _environment(self) -> list[str]:
        versions = [f"{name} {version}" for name, version in (self.provenance.get("versions") or {}).items()]
        return [part for part in (", ".join(versions), self.machine) if part]

    def _limits(self) -> list[str]:
        """What was given, and what holds for every classifier."""
        limits = [limit.strip() for limit in _lines(self.limits)]
        classes = (self.provenance.get("student") or {}).get("num_classes")
        if classes:
            what = "picture" if self.takes_images else "input"
            limits.append(f"Whatever {what} it is given, it names one of its {classes:,} classes.")
        if self.metrics:
            limits.append("Nothing was measured on data of another kind than the results are from.")
        return limits

    def _table(self) -> list[list[str]]:
        """Header and rows: these weights, then what was given, with the columns that anything has a value for."""
        rows: dict[str, Mapping[str, Any]] = {}
        if self.metrics:
            rows["these weights"] = self.metrics
        rows.update(self.results)
        columns = list(dict.fromkeys(key for row in rows.values() for key in row))
        # The order in which they are known here; what is not, as it came.
        columns.sort(key=lambda key: list(_COLUMNS).index(key) if key in _COLUMNS else len(_COLUMNS))
        if not columns:
            return []
        header = ["", *(_COLUMNS[key][0] if key in _COLUMNS else _cell(key) for key in columns)]
        cells = [[_cell(name), *(_shown(key, row.get(key)) for key in columns)] for name, row in rows.items()]
        return [header, *cells]

    def _spread_note(self) -> str | None:
        rows = [self.metrics, *self.results.values()]
        counts = {len(_numbers(value)) for row in rows for value in row.values()} - {0, 1}
        if not counts:
            return "one run" if self.metrics else None
        runs = f"{counts.pop()} runs" if len(counts) == 1 else "the runs"
        if self.seeds:
            runs += f" (seeds {', '.join(map(str, self.seeds))})"
        return f"mean ± sample standard deviation over {runs} where a spread is given"


def _check_fields(given: Mapping[str, Any]) -> None:
    """Refuse what a card has no place for, with the name that was probably meant."""
    known = [field.name for field in dataclasses.fields(StudentCard)]
    for name in given.keys() - set(known):
        near = difflib.get_close_matches(name, known, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"it has {', '.join(known)}."
        raise TypeError(f"A student's card has no field {name!r}: {hint}")


# ---- Facts of a run ------------------------------------------------------------------------------------------------


def describe_training(
    args: DistillationConfig,
    state: TrainerState | None = None,
    optimizer: torch.optim.Optimizer | None = None,
    scheduler: str | None = None,
) -> dict[str, str]:
    """The schedule in words, a line per subject.

    Args:
        state: of a trainer that has trained, for what it did beside what it was to do.
        optimizer: the one it used, which need not be the one that ``args`` names.
        scheduler: name of a learning rate schedule that was given in place of the one in ``args``.
    """
    lines = {}
    planned = _count(args.max_steps, "step") if args.max_steps > 0 else _count(args.num_train_epochs, "epoch")
    if state is not None:
        steps = _count(state.global_step, "step")
        if not state.global_step:
            planned += " planned, none done yet"
        elif state.global_step < state.max_steps:
            planned += f" planned; stopped after {steps}, in epoch {state.epoch or 0:.4g}"
        elif planned != steps:
            planned += f" ({steps})"
    lines["Length"] = planned
    if state is not None and args.load_best_model_at_end and state.best_global_step:
        metric = str(args.metric_for_best_model or "loss").removeprefix("eval_")
        lines["Weights"] = f"of step {state.best_global_step:,}, the best by {metric} on the evaluation data"
    factors = [f"{args.per_device_train_batch_size} on each of {args.world_size} processes"] * (args.world_size > 1)
    factors += [f"{args.gradient_accumulation_steps} accumulated"] * (args.gradient_accumulation_steps > 1)
    batch = args.per_device_train_batch_size * args.world_size * args.gradient_accumulation_steps
    lines["Batch size"] = f"{batch}" + (f" ({', '.join(factors)})" if factors else "")

    name, options = _value_of(args.optim), args.optim_args or ""
    rates, decay, decayed = [args.learning_rate], args.weight_decay, ""
    if optimizer is not None:
        groups = optimizer.param_groups
        name = type(getattr(optimizer, "optimizer", optimizer)).__name__
        known = ("momentum", "nesterov", "betas")
        options = ", ".join(f"{key}={groups[0][key]}" for key in known if groups[0].get(key))
        rates = sorted({group.get("initial_lr", group["lr"]) for group in groups})
        decay = max(group.get("weight_decay", 0.0) for group in groups)
    if optimizer is None or decay == args.weight_decay:
        decayed = " on all parameters" if args.decay_all_parameters else ", not on biases and normalisation layers"
    lines["Optimiser"] = f"{name} ({options})" if options else name
    if scheduler is not None:
        schedule = scheduler
    elif args.lr_milestones:
        schedule = f"× {args.lr_decay:g} at epochs {', '.join(f'{epoch:g}' for epoch in args.lr_milestones)}"
    else:
        schedule = f"{_value_of(args.lr_scheduler_type)} schedule"
    warmup = args.get_warmup_steps(state.max_steps if state is not None and state.max_steps else args.max_steps)
    if warmup > 0 and scheduler is None:
        schedule += f", warm-up of {_count(warmup, 'step')}"
    lines["Learning rate"] = f"{', '.join(f'{rate:g}' for rate in rates)}; {schedule}"
    lines["Weight decay"] = f"{decay:g}{decayed}" if decay else "none"
    if args.max_grad_norm:
        lines["Gradient clipping"] = f"norm {args.max_grad_norm:g}"
    if args.mixes:
        alphas = {"mixup": args.mixup_alpha, "CutMix": args.cutmix_alpha}
        mixing = ", ".join(f"{name} α = {alpha:g}" for name, alpha in alphas.items() if alpha)
        lines["Mixing"] = f"{mixing}, on {100 * args.mixup_prob:g} % of the batches"
    if args.label_smoothing_factor:
        lines["Label smoothing"] = f"{args.label_smoothing_factor:g}"
    lines["Precision"] = "bf16 mixed" if args.bf16 else "fp16 mixed" if args.fp16 else "fp32"
    return lines


def describe_machine(device: torch.device | str = "cpu", processes: int = 1) -> str:
    """The processor that training ran on, without the machine's name: "2 × NVIDIA H100" or "AMD EPYC, 8 cores"."""
    device = torch.device(device)
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        return name if processes == 1 else f"{processes} × {name}"
    if device.type != "cpu":
        return device.type.upper() if processes == 1 else f"{processes} × {device.type.upper()}"
    name = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.is_file():
        found = re.search(r"^model name\s*:\s*(.+)$", info.read_text(encoding="utf-8", errors="replace"), re.MULTILINE)
        name = found.group(1).strip() if found else name
    cores = os.cpu_count() or 1
    text = f"{name}, {_count(cores, 'core')}"
    return text if processes == 1 else f"{text}, {processes} processes"


def _own_scheduler(trainer: DistillationTrainer) -> str | None:
    """The name of a schedule that the user built, if the trainer did not build one by its arguments."""
    scheduler = trainer.lr_scheduler
    if scheduler is None or trainer._created_lr_scheduler:
        return None
    return type(getattr(scheduler, "scheduler", scheduler)).__name__


def _facts_of_model(student: nn.Module, has_processor: bool) -> dict[str, Any]:
    """How a student can be opened once it is saved."""
    if isinstance(student, PreTrainedModel) and not isinstance(student, TimmWrapperForImageClassification):
        labels = cast("dict[int, str]", student.config.id2label or {})
        return {
            "library": "transformers",
            "model_class": type(student).__name__ if type(student).__module__.startswith("transformers.") else None,
            "takes_images": student.main_input_name == "pixel_values",
            "label_names": own_label_names([labels[number] for number in sorted(labels)]),
            "in_chans": getattr(student.config, "num_channels", 3),
            "has_processor": has_processor,
        }
    config = export_config(student, None)
    return {"library": None} if config is None else _facts_of_timm(config)


def _facts_of_timm(config: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "library": "timm",
        "label_names": own_label_names(config.get("label_names") or []),
        "in_chans": (config.get("pretrained_cfg") or {}).get("input_size", [3])[0],
        "registered_by": config.get("registered_by"),
    }


def _evaluation(trainer: DistillationTrainer) -> dict[str, Any]:
    """The evaluation of the weights that the trainer holds, from its log: metrics, further rows, and caveats."""
    state, log = trainer.state, trainer.state.log_history
    ended = max((number for number, entry in enumerate(log) if "train_runtime" in entry), default=len(log))
    evaluations = [(number, entry) for number, entry in enumerate(log) if any(k.startswith("eval_") for k in entry)]
    during = [entry for number, entry in evaluations if number < ended]
    after = [entry for number, entry in evaluations if number > ended]
    best = state.best_global_step if trainer.args.load_best_model_at_end else None
    # Evaluations during training are on the trainer's own data for certain, so they come first.
    chosen = [entry for entry in during if entry["step"] == (best or state.global_step)] or after
    limits = []
    if not chosen and during:
        chosen = [entry for entry in during if entry["step"] == during[-1]["step"]]
        step, last = during[-1]["step"], state.global_step
        limits.append(f"The results were measured at step {step:,}, and training went on to step {last:,}.")
    if not chosen:
        return {}
    if best:
        limits.append("The best weights were chosen on the data that the results are from, which flatters them.")
    values = {key: value for entry in chosen for key, value in entry.items()}
    data = trainer.eval_dataset
    named = list(data) if isinstance(data, dict) else []
    of_set = {name: _metrics_in(values, f"eval_{name}_") for name in named}
    of_set = {name: metrics for name, metrics in of_set.items() if metrics}
    metrics = of_set.pop(next(iter(of_set))) if of_set else _metrics_in(values, "eval_")
    if not trainer._default_metrics:
        # A compute_metrics of the user's may mean something else by a name that is known here.
        metrics = {
            key if key not in _FRACTIONS or 0 <= value <= 1 else f"eval_{key}": value for key, value in metrics.items()
        }
    rows: dict[str, Mapping[str, Any]] = {f"these weights, on {name}": row for name, row in of_set.items()}
    if trainer.teacher_top1 is not None and "top1" in metrics:
        rows["teacher"] = {"top1": trainer.teacher_top1}
    size = _length(next(iter(data.values())) if isinstance(data, dict) and data else data)
    return {
        "metrics": metrics,
        "results": rows,
        "evaluated_on": "the evaluation data" + (f" ({size:,} samples)" if size is not None else ""),
        "limits": limits,
    }


def _metrics_in(values: Mapping[str, Any], prefix: str | None = None) -> dict[str, Any]:
    """The metrics among logged values, without their prefix ("eval_", "test_": by default whichever it is)."""
    found = {}
    for key, value in values.items():
        if prefix is None:
            name = re.sub(r"^(eval|test|predict)_", "", key)
        elif key.startswith(prefix):
            name = key.removeprefix(prefix)
        else:
            continue
        if name not in (*_NOT_METRICS, "epoch", "step") and _numbers(value):
            found[name] = value
    if "nll" in found:
        # The trainer's evaluation loss is the same number.
        found.pop("loss", None)
    return found


# ---- Words ---------------------------------------------------------------------------------------------------------


def template_path() -> Any:
    """The card's template: inside an installed package, or in model_cards/ of a checkout."""
    installed = importlib.resources.files(__package__) / TEMPLATE
    return installed if installed.is_file() else Path(__file__).parents[1] / "model_cards" / TEMPLATE


def _public_name(name: str) -> str:
    """A name that says nothing of the machine: the last part of a path, and Hub ids as they are."""
    name = re.sub(r"^(local-dir|hf[-_]hub):", "", str(name).strip())
    is_path = (
        re.match(r"[/~.]|[A-Za-z]:[/\\]", name) is not None
        or "\\" in name
        or name.count("/") > 1
        or ("/" in name and os.path.exists(name))
    )
    parts = [part for part in re.split(r"[\\/]", name) if part]
    return parts[-1] if is_path and parts else name


def _is_hub_id(name: str) -> bool:
    """Whether a name can be one of the Hub's, "name" or "owner/name" (with "@revision"), and is no path here."""
    fits = re.fullmatch(r"(?:[\w.-]+/)?[\w-][\w.-]*(?:@[\w./-]+)?", name)
    return fits is not None and _public_name(name) == name and not os.path.exists(name)


def _loss_settings(loss: str, arguments: Mapping[str, Any]) -> dict[str, str]:
    """A named loss's own arguments with their values, defaults included; without what the card says otherwise."""
    named = LOSSES.get(loss)
    if named is None:
        return {key: str(value) for key, value in arguments.items()}
    return {
        f"{key} of the loss": str(arguments.get(key, parameter.default))
        for key, parameter in inspect.signature(named).parameters.items()
        if key != named.gamma_argument and (key in arguments or parameter.default is not parameter.empty)
    }


def _loss_title(loss: str | None, feature_loss: str | None = None) -> str:
    if feature_loss:
        return f"{'CE' if loss == 'ce' else _loss_title(loss)} and {feature_loss.upper()}"
    if loss in LOSSES:
        return loss.upper()
    return "a loss of its own" if loss in (None, "custom") else f"the loss of `{loss}`"


def _auto_class(model_class: str | None) -> str | None:
    """The class of transformers by which the code example opens the student; None for one that it does not have."""
    if not hasattr(transformers, str(model_class)):
        return None
    return _IMAGE_CLASS if str(model_class).endswith("ForImageClassification") else model_class


def _shown(key: str, value: Any) -> str:
    numbers = _numbers(value)
    if not numbers:
        return "" if value is None else _cell(str(value))
    _, factor, style = _COLUMNS.get(key, ("", 1.0, ".4g"))
    numbers = [factor * number for number in numbers]
    mean = format(statistics.fmean(numbers), style)
    return mean if len(numbers) == 1 else f"{mean} ± {format(statistics.stdev(numbers), style)}"


def _numbers(value: Any) -> list[float]:
    """A number or several as a list; nothing for anything else."""
    values = list(value) if isinstance(value, (list, tuple)) else [value]
    numeric = all(isinstance(number, numbers.Real) and not isinstance(number, bool) for number in values)
    return [float(number) for number in values] if numeric else []


def _cell(text: str) -> str:
    return " ".join(str(text).split()).replace("|", "\\|")


def _count(number: float, unit: str) -> str:
    return f"{number:,g} {unit}{'' if number == 1 else 's'}" if number < 1000 else f"{number:,.0f} {unit}s"


def _lines(value: str | Sequence[str] | None) -> list[str]:
    return [] if value is None else [value] if isinstance(value, str) else list(value)


def _lines_of_seed(seed: int | None) -> list[int]:
    return [] if seed is None else [seed]


def _one_or_list(value: str | Sequence[str] | None) -> str | list[str] | None:
    return value if value is None or isinstance(value, str) else list(value)


def _length(dataset: Any) -> int | None:
    try:
        return len(dataset)
    except TypeError:
        return None


def _value_of(member: Any) -> str:
    """The text of an enumeration's member, or of a plain string."""
    return str(getattr(member, "value", member))
