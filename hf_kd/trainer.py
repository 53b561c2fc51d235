"""The trainer: transformers' loop with a teacher in it. The formulas are in hf_kd.losses."""

from __future__ import annotations

import contextlib
import functools
import json
import math
import operator
import os
import platform
import random
from bisect import bisect_right
from collections.abc import Callable, Collection, Iterator, Mapping
from fnmatch import fnmatch
from functools import partial
from pathlib import Path
from typing import Any, cast

import accelerate
import numpy as np
import timm
import torch
import transformers
from accelerate.logging import get_logger
from accelerate.utils import broadcast_object_list, gather_object
from accelerate.utils.operations import recursively_apply
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader, Dataset
from transformers import EvalPrediction, TrainingArguments
from transformers.trainer import TRAINING_ARGS_NAME
from transformers.trainer_utils import EvalLoopOutput, PredictionOutput, has_length

from . import metrics, term_gradients
from .config import DistillationConfig
from .data.bad_samples import SkippingDataset
from .data.mixing import BatchMixer
from .data.normalise import PIXEL_VALUES, PixelNormaliser
from .data.padding import SAMPLE_MASK, mark_padding
from .data_wait import DATA_WAIT
from .ema import RAW_WEIGHTS, WeightAverage, load_raw_weights
from .feature_term import FeatureTerm
from .files import atomic_write, write_text
from .fused_term import FusedTerms
from .labels import is_soft, normalise_labels
from .lean_steps import step_directly
from .losses import Outputs
from .losses.feature import build_feature_loss
from .losses.logit import LOSSES, CallableLoss, LogitLoss, build_loss, cross_entropy
from .memory_format import channels_last_is_faster, in_channels_last, weights_in_channels_last
from .meters import Meters
from .model_card import PROVENANCE, StudentCard
from .networks import Preprocessing, Signature, logits_of, timm_network, unwrap
from .objective import Counts, LogitTerms, feature_term
from .preflight import mean_power_sum, report_top1, teacher_top1
from .publishing_trainer import PublishingTrainer
from .reliable_trainer import changed
from .repository import TRAINING_ARGS, public_arguments
from .samples import count_samples, sample_mask, without_repeats
from .side_stream import SideStream
from .student import WEIGHTS, adopt_label_names, load_student_weights, save_student
from .teacher import Teacher
from .teacher_cache.deferred import recognised_teacher
from .teacher_cache.replay import KeepingIndex, Replay
from .teacher_speed import Speed
from .version import __version__


logger = get_logger(__name__)


class DistillationTrainer(PublishingTrainer):
    """A transformers Trainer whose loss also listens to a teacher.

    ``ce_weight · CE + beta · loss``, averaged over the samples of a whole optimiser step: over accumulated batches and
    over processes, however uneven they are.

    Args:
        model: the student: from :func:`hf_kd.create_student`, a timm module, a transformers model, or any module that
            returns logits.
        teacher_model: a timm name, ``hf-hub:`` id, local folder, module, transformers model, :class:`hf_kd.Teacher`, a
            callable ``f(**inputs) -> logits``, or a list of these (an ensemble). It is frozen, and never saved.
        args: the configuration.
        distillation_loss: a function or module ``f(student_logits, teacher_logits[, labels])`` in place of the loss
            that ``args.loss`` names, returning one value per sample or their mean.
        trainer_kwargs: everything that Trainer takes, as Trainer takes it. Without ``compute_metrics`` evaluation
            reports top1, top5, nll, ece and entropy.

    Subclasses override :meth:`compute_distillation_loss` or :meth:`compute_teacher_logits`.

    Raises:
        ValueError: for a missing teacher, class counts that differ, an unknown preprocessing, and settings that
            contradict each other.
    """

    # compute_loss divides by the sample count of the whole optimiser step, so the loop must not divide again.
    loss_is_scaled_for_ga = True

    _tag_names = ["knowledge-distillation", "timm", "hf_kd"]

    def __init__(
        self,
        model: nn.Module | None = None,
        teacher_model: Any = None,
        args: DistillationConfig | None = None,
        *,
        distillation_loss: Callable[..., Any] | None = None,
        **trainer_kwargs: Any,
    ) -> None:
        args = DistillationConfig() if args is None else args
        if not isinstance(args, DistillationConfig):
            raise TypeError(f"`args` must be a DistillationConfig, got {type(args).__name__}.")
        if model is not None and not isinstance(model, nn.Module):
            raise TypeError(
                f"`model` must be a torch module, got {type(model).__name__}: build the student with "
                "hf_kd.create_student(name, num_classes=...)."
            )
        if model is not None and getattr(unwrap(model), "num_classes", None) == 0:
            raise ValueError(
                f"The student {type(unwrap(model)).__name__} has no classifier, only features (num_classes=0): build "
                "it with the data's class count."
            )
        self.check_place(args)
        self._cached_teacher: dict[str, Any] = {}
        self.replay: Replay | None = None
        self.teacher = self._build_teacher(teacher_model, args, model)
        self.distillation_loss = self._build_loss(args, distillation_loss)
        self.features = self._build_features(args, model)
        self.beta: float | None = None if args.beta == "auto" else float(args.beta)
        self.teacher_top1: float | None = None
        self._default_metrics = (
            trainer_kwargs.get("compute_metrics") is None
            and trainer_kwargs.get("preprocess_logits_for_metrics") is None
        )
        if self._default_metrics:
            trainer_kwargs["compute_metrics"] = _summarise
            trainer_kwargs["preprocess_logits_for_metrics"] = _reduce_logits
        self.average = self._build_average(args)
        if self.average is not None:
            trainer_kwargs["callbacks"] = [self.average, *(trainer_kwargs.get("callbacks") or [])]
        super().__init__(model, args, **trainer_kwargs)
        if self.average is not None and self._engine:
            raise ValueError(
                f"`ema_decay` does not go with {self._engine}, which spreads what is averaged over the processes: use "
                "a launch configuration without it (DDP)."
            )
        if self.compute_loss_func is not None:
            raise ValueError(
                "`compute_loss_func` would replace the distillation objective: pass `distillation_loss`, or override "
                "compute_distillation_loss."
            )
        self.model_accepts_loss_kwargs = False
        student = unwrap(self.model)
        adopt_label_names(student, _class_names(self.train_dataset, self._label_name))
        self._student_signature = Signature.of(student)
        self._logit_terms = LogitTerms(
            self.args,
            self._label_name,
            FusedTerms.of(self.args, self.distillation_loss),
            lambda: self.compute_distillation_loss,
            DistillationTrainer.compute_distillation_loss,
        )
        self._meters = Meters(drop_nonfinite=self.args.on_nonfinite == "skip")
        self._logged_components: dict[str, float] = {}
        self._steps_per_epoch: int | None = None
        self._mixer: BatchMixer | None = None
        if self.args.channels_last and self._engine:
            raise ValueError(
                f"`channels_last` does not go with {self._engine}, which lays the student's weights out itself: leave "
                "it out, or use a launch configuration without it (DDP)."
            )
        # None until it is measured.
        self._channels_last = None if self.args.channels_last == "auto" else bool(self.args.channels_last)
        self._teacher_stream = self._build_teacher_stream()
        self._normaliser: PixelNormaliser | None = None
        if self.teacher is not None:
            preprocessing = Preprocessing.of(student)
            if preprocessing is None and self.teacher.declares_preprocessing:
                # transformers keeps what its networks want in an object beside them.
                preprocessing = Preprocessing.from_image_processor(self.processing_class)
            self.teacher.match(self._student_classes, preprocessing)
            self.teacher.place(
                self.args.device,
                dtype=self.args.teacher_torch_dtype,
                compile=self.args.teacher_compile,
                sharded=self.args.teacher_fsdp,
                fold_batchnorm=self.args.teacher_fold_batchnorm,
                channels_last=self._channels_last,
                auto=self.args.teacher_speed == "auto",
            )
            self._student_preprocessing = preprocessing
            if self.train_dataset is not None:
                self._open_cache()
        self.check_license()

    # ---- Set-up ----------------------------------------------------------------------------------------------------

    def _build_teacher(self, teacher: Any, args: DistillationConfig, student: nn.Module | None) -> Teacher | None:
        supplied = type(self).compute_teacher_logits is not DistillationTrainer.compute_teacher_logits
        caches = args.teacher_cache_dir is not None and args.uses_teacher
        if supplied and caches:
            raise ValueError(
                f"`teacher_cache_dir` does not go with {type(self).__name__}, which computes the teacher's logits "
                "itself, from what a cache cannot know: leave out one of them."
            )
        if teacher is None:
            if args.uses_teacher and not supplied:
                raise ValueError(
                    f'loss="{args.loss}" needs a teacher: pass `teacher_model` (a timm name, a folder, a module, '
                    '...), or train on the labels alone with loss="ce".'
                )
            return None
        if isinstance(teacher, nn.Module) and student is not None and unwrap(teacher) is unwrap(student):
            raise ValueError(
                "Teacher and student are the same module, and a teacher is frozen: pass copy.deepcopy(model) as the "
                "teacher."
            )
        options = {
            "checkpoint": args.teacher_checkpoint,
            "num_classes": args.teacher_num_classes,
            "class_map": args.teacher_class_map,
            "input_size": args.teacher_input_size,
            "weights_only": None if args.teacher_weights_only else False,
            "revision": args.teacher_revision,
        }
        build = partial(Teacher.wrap, teacher, **options)
        if not caches:
            return build()
        built, self._cached_teacher = recognised_teacher(teacher, build, str(args.teacher_cache_dir), options)
        return built

    def _open_cache(self) -> None:
        """The cache of the teacher's outputs on the training data, if there is to be one."""
        if not self._cached_teacher or (self.replay is not None and self.replay.views.dataset is self.train_dataset):
            return
        self.replay = Replay.for_run(
            self.args,
            self.train_dataset,
            self._cached_teacher,
            num_classes=self._student_classes,
            images=self._student_preprocessing,
            mixed_precision=self.accelerator.mixed_precision,
            collate=self.data_collator,
        )

    @staticmethod
    def _build_loss(args: DistillationConfig, own: Callable[..., Any] | None) -> LogitLoss | None:
        if own is None:
            if args.loss == "ce":
                return None
            return build_loss(args.loss, gamma=args.gamma, loss_kwargs=args.loss_arguments)
        if args.loss == "ce":
            raise ValueError('`distillation_loss` is given, and loss="ce" leaves it out: leave `loss` at its default.')
        if not callable(own):
            raise TypeError(f"`distillation_loss` must be a function or a module, got {type(own).__name__}.")
        if isinstance(own, nn.Module) and any(p.requires_grad for p in own.parameters()):
            raise ValueError(
                "`distillation_loss` has parameters of its own, which this trainer would neither train nor save: make "
                "them part of the student, or fix them with requires_grad_(False)."
            )
        return own if isinstance(own, LogitLoss) else CallableLoss(own)

    def _build_features(self, args: DistillationConfig, student: nn.Module | None) -> FeatureTerm | None:
        if args.feature_loss is None:
            return None
        if student is None:
            raise ValueError("`feature_loss` needs the student, not a `model_init` that makes one: pass `model`.")
        loss = build_feature_loss(args.feature_loss, **args.feature_loss_arguments)
        if loss.needs_index and args.mixes:
            raise ValueError(
                f"The feature loss {args.feature_loss!r} remembers each sample, and mixed images are none of them: "
                "leave out mixup_alpha and cutmix_alpha, or take another feature loss."
            )
        return FeatureTerm(loss, unwrap(student), self.teacher)

    def _build_average(self, args: DistillationConfig) -> WeightAverage | None:
        if args.ema_decay is None:
            return None
        return WeightAverage(args.ema_decay, warmup=args.ema_warmup, step_was_taken=self._step_was_taken)

    def _build_teacher_stream(self) -> SideStream:
        # The default stream of the CPU is all there is.
        wanted = self.args.teacher_stream
        if wanted and self.args.device.type != "cuda":
            logger.warning("`teacher_stream` needs CUDA: on this %s the teacher runs in turn.", self.args.device.type)
        return SideStream(self.args.device if wanted else torch.device("cpu"))

    # ---- What subclasses override ----------------------------------------------------------------------------------

    def compute_teacher_logits(self, inputs: Mapping[str, Any]) -> Tensor:
        """The teacher's logits for a batch, (B, K), fp32 or fp64, without a graph.

        Args:
            inputs: the batch as the student sees it (mixed if mixing is on), labels included.
        """
        assert self.teacher is not None
        # The whole batch: a network takes its own of it, and a callable may know its samples by their index.
        with self._teacher_autocast():
            return self.teacher(**self._with_usual_label_name(inputs))

    def _teacher_autocast(self) -> contextlib.AbstractContextManager[Any]:
        # In a dtype of its own, the teacher runs in that alone.
        own_dtype = self.args.teacher_torch_dtype is not None
        return contextlib.nullcontext() if own_dtype else self.accelerator.autocast()

    def _training_teacher_logits(self, inputs: Mapping[str, Any]) -> Tensor:
        """:meth:`compute_teacher_logits` of a training batch, or what is stored of it."""
        if self.replay is None:
            return self.compute_teacher_logits(inputs)
        return self.replay.logits(inputs, self.compute_teacher_logits)

    def compute_distillation_loss(
        self, student_outputs: Outputs, teacher_outputs: Outputs, inputs: Mapping[str, Any]
    ) -> Tensor | dict[str, Tensor]:
        """The distillation loss of a batch, before its weight beta.

        Args:
            student_outputs, teacher_outputs: ``.logits`` (B, K), and ``.log_probs``, computed once. The student's
                ``.raw`` is what its forward returned, its ``.mask`` (B,) is False for repeats that fill up a batch
                (their values are left out of the mean), or None.
            inputs: the batch, labels included (under ``args.label_names``).

        Returns:
            A tensor of one value per sample, (B,), or their mean; or a dict with that as "distill" and further tensors
            to log. A mean over something other than samples is taken as it is.
        """
        assert self.distillation_loss is not None
        return self.distillation_loss(student_outputs, teacher_outputs, inputs.get(self._label_name))

    # ---- The loss --------------------------------------------------------------------------------------------------

    # Trainer's type for num_items_in_batch has an int as well; _get_num_items_in_batch makes the one passed here.
    def compute_loss(  # type: ignore[override]
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, Any]:
        """The objective on one batch, as its share of the whole optimiser step.

        ``num_items_in_batch`` holds how many samples, and how many labels, the step has over all its batches and
        processes; without it the batch is taken to be the whole step.
        """
        inputs = self._with_checked_labels(inputs)
        if model.training:
            inputs = self._mixed(inputs)
            if self.distillation_loss is not None:
                self.distillation_loss.set_epoch(self.state.epoch or 0.0)
        labels = inputs.get(self._label_name)
        # Teacher first: its activations are gone before the student's, which wait for the backward pass, are made.
        with self._teacher_stream.beside(), self.features.of_teacher if self.features else contextlib.nullcontext():
            # The cache has rows for training data alone.
            teacher_logits = self._training_teacher_logits if model.training else self.compute_teacher_logits
            teacher = Outputs(teacher_logits(inputs)) if self.args.uses_teacher else None
        with self.features.of_student if self.features else contextlib.nullcontext():
            student = self._student_outputs(model, inputs)
        self._teacher_stream.join()
        if self.args.log_analysis:
            student.logits = term_gradients.watched(student.logits)
        if teacher is not None and teacher.logits.shape != student.logits.shape:
            raise ValueError(
                f"The teacher gave logits of shape {tuple(teacher.logits.shape)} and the student "
                f"{tuple(student.logits.shape)} for the same batch: give `class_map` (config: teacher_class_map) if "
                "they have different classes."
            )
        student.mask = sample_mask(inputs, student.logits.shape[:-1])
        own = count_samples(inputs, self._label_name, self._student_classes)
        counts = Counts.of(own, num_items_in_batch, self._loss_scale)
        if self.beta is None and self.args.uses_logits:
            self.beta = self._measure_beta()
        terms, logged = self._logit_terms(student, teacher, inputs, counts, self.beta)
        if self.features is not None:
            term, of_features = feature_term(self.features(labels, inputs.get("index")), student.mask, counts)
            terms["feature"] = self.args.feature_weight * term
            logged.update(of_features)
        if self.args.log_analysis:
            # What the loss logs already stays as it is.
            logged = {**self._logit_terms.analysis(student, teacher, inputs, counts, self.beta, terms), **logged}
        for name, (total, count) in logged.items():
            self._meters.add(name, total, count)
        loss = functools.reduce(operator.add, terms.values())
        components: dict[str, Tensor] = {key: logged[key][0] for key in ("ce", "distill", "feature") if key in logged}
        self._guard.watch_loss(loss, components, student, teacher, inputs, self.state.global_step + 1)
        return (loss, student.raw) if return_outputs else loss

    def _student_outputs(self, model: nn.Module, inputs: Mapping[str, Any]) -> Outputs:
        args, kwargs = self._student_signature.select(self._with_usual_label_name(inputs))
        if self.is_deepspeed_enabled:
            dtype = self.accelerator.state.deepspeed_plugin.hf_ds_config.dtype()
            args, kwargs = recursively_apply(lambda value: value.to(dtype), (args, kwargs), test_type=_is_float)
        # Under DDP Accelerate has put it around the forward pass; under FSDP2, and before training, it has not.
        with self.accelerator.autocast():
            raw = model(*args, **kwargs)
        return Outputs(logits_of(raw), raw)

    def _student_logits(self, model: nn.Module, inputs: Mapping[str, Any]) -> Tensor:
        return self._student_outputs(model, inputs).logits

    def _with_usual_label_name(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """The batch with its labels under "labels", by which networks are known not to want them."""
        return {
            "labels" if key == self._label_name else key: value
            for key, value in inputs.items()
            if key != SAMPLE_MASK  # ours: it is in the last batch alone, which no function of a user's expects
        }

    @property
    def _loss_scale(self) -> int:
        return self.accelerator.num_processes if self.args.average_tokens_across_devices else 1

    def _with_checked_labels(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """The batch with labels that are class indices (int64) or probabilities (float), or a ValueError."""
        labels = inputs.get(self._label_name)
        if labels is None:
            return inputs
        return {**inputs, self._label_name: normalise_labels(labels, self._student_classes)}

    def _mixed(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """The batch after mixup or CutMix: mixed here, once, for student and teacher alike."""
        if not self.args.mixes:
            return inputs
        if "pixel_values" not in inputs:
            raise ValueError(
                f"Mixup and CutMix mix images: the batch must have 'pixel_values', it has {', '.join(inputs)}."
            )
        if self._mixer is None:
            self._mixer = BatchMixer(
                mixup_alpha=self.args.mixup_alpha,
                cutmix_alpha=self.args.cutmix_alpha,
                prob=self.args.mixup_prob,
                switch_prob=self.args.mixup_switch_prob,
                num_classes=self._student_classes or 1,
            )
        wanted = self.args.ce_weight or (self.distillation_loss is not None and self.distillation_loss.needs_labels)
        labels = inputs.get(self._label_name) if wanted else None
        images, targets = self._mixer(inputs["pixel_values"], labels)
        mixed = {**inputs, "pixel_values": images}
        return mixed if targets is None else {**mixed, self._label_name: targets}

    # ---- Before training -------------------------------------------------------------------------------------------

    def _before_training(self, checkpoint: str | None) -> None:
        """The teacher's preflight and the choice of beta; a resumed run has both in its checkpoint."""
        if self.average is not None:
            self.average.go_on_from(checkpoint)
        if self.args.uses_teacher:
            self._open_cache()
        if checkpoint is not None:
            self._restore_provenance(checkpoint)
        self._choose_speed()
        if self.args.uses_teacher:
            if self.args.teacher_preflight and self.teacher_top1 is None:
                self._preflight()
            if self.beta is None and self.args.uses_logits:
                self.beta = self._measure_beta()
        if self.features is not None:
            self._prepare_features(self.features, checkpoint)

    def _get_dataloader(  # type: ignore[override]
        self, dataset: Any, *, is_training: bool = False, **kwargs: Any
    ) -> DataLoader:
        collate = self.data_collator
        # A dispatching loader joins batches, and can do so with tensors alone.
        if is_training and self.replay is not None and not self.accelerator.dispatch_batches:
            self.data_collator = KeepingIndex(collate)
        try:
            return super()._get_dataloader(dataset, is_training=is_training, **kwargs)
        finally:
            self.data_collator = collate

    def cache_teacher(self) -> int:
        """Compute and store what ``teacher_cache_dir`` lacks of the training data's views, on all processes together.

        Views that repeat (``teacher_cache_views``) are that many passes over the data, others one for each of
        ``num_train_epochs``, data without augmentation one.

        Returns:
            How many rows the processes had to compute.

        Raises:
            ValueError: without ``teacher_cache_dir``, training data or a number of views.
            RuntimeError: if the disk is full.
        """
        if self.train_dataset is not None:
            self._open_cache()
        if self.replay is None:
            raise ValueError(
                "There is nothing to cache: give `teacher_cache_dir`, a teacher, a loss that uses it and "
                "`train_dataset`."
            )
        views = self.replay.views.period
        if views is None and self.args.max_steps > 0:
            raise ValueError(
                "How many views to compute follows from num_train_epochs, and `max_steps` is given: give "
                "`teacher_cache_views`, or the epochs."
            )

        def batches(dataset: Dataset) -> Iterator[dict[str, Any]]:
            loader = DataLoader(
                SkippingDataset(dataset) if self.args.on_bad_sample == "skip" else dataset,
                # What training would run it with fits.
                batch_size=max(self.args.train_batch_size, self.args.eval_batch_size),
                collate_fn=self.data_collator,
                num_workers=self.args.dataloader_num_workers,
            )
            return map(self._prepare_inputs, loader)

        done = self.replay.fill(
            math.ceil(self.args.num_train_epochs) if views is None else views,
            batches,
            self.compute_teacher_logits,
            process=self.args.process_index,
            processes=self.args.world_size,
        )
        return sum(gather_object([done]))

    def _choose_speed(self) -> None:
        """Measure, in the first process, what the configuration leaves open; a checkpoint has had it restored."""
        parts = [part for part in self._teacher_parts if part.speed_is_open]
        if self._channels_last is not None and not parts:
            return
        with _keeping_random_state():
            batch = self._with_usual_label_name(next(self._batches(self.get_train_dataloader())))
            chosen: list[Any] = [self._channels_last, None]
            if self.is_world_process_zero():
                with self._teacher_autocast():
                    chosen[1] = [part.choose_speed(batch) for part in parts]
                if self._channels_last is None:
                    student = unwrap(self.model)
                    chosen[0] = channels_last_is_faster(student, batch, self._student_logits, self.args.device)
        broadcast_object_list(chosen)
        self._channels_last, speeds = chosen
        for part, speed in zip(parts, speeds, strict=True):
            part.run_as(speed)

    @property
    def _teacher_parts(self) -> list[Teacher]:
        """The teacher's networks, if it is used."""
        parts = self.teacher.parts if self.teacher is not None and self.args.uses_teacher else []
        return [part for part in parts if part.is_module]

    def _prepare_for_training(self, *args: Any, **kwargs: Any) -> Any:
        if self._channels_last:
            weights_in_channels_last(unwrap(self.model))
        return super()._prepare_for_training(*args, **kwargs)

    def _prepare_input(self, data: Any) -> Any:
        data = super()._prepare_input(data)
        # Once, for both networks.
        return in_channels_last(data) if self._channels_last else data

    def _prepare_features(self, features: FeatureTerm, checkpoint: str | None) -> None:
        """Size the feature loss by the first batch; its parameters are then there for the optimiser."""
        if self._engine and not features.loss.built:
            raise ValueError(
                f"`feature_loss` does not go with {self._engine}, which takes the student's modules and parameters "
                "apart: use a launch configuration without it (DDP)."
            )
        with _keeping_random_state():
            batch = next(self._batches(self.get_train_dataloader()))
        features.build(
            lambda: self._student_outputs(self.model, batch),
            lambda: self.compute_teacher_logits(batch),
            self.accelerator,
            checkpoint=checkpoint,
            num_samples=len(self.train_dataset) if has_length(self.train_dataset) else None,
            sample_labels=getattr(self.train_dataset, "labels", None) if features.loss.needs_sample_labels else None,
            seed=self.args.seed,
        )

    def _restore_provenance(self, checkpoint: str) -> None:
        path = Path(checkpoint) / PROVENANCE
        if not path.is_file():
            return
        saved = json.loads(path.read_text(encoding="utf-8"))
        self.teacher_top1 = (saved.get("teacher") or {}).get("top1")
        if self.args.beta == "auto":
            self.beta = saved.get("beta")
        if self._channels_last is None:
            self._channels_last = saved.get("channels_last")
        speeds, parts = saved.get("teacher_speed") or [], self._teacher_parts
        if len(speeds) == len(parts):
            for part, values in zip(parts, speeds, strict=True):
                if part.speed_is_open:
                    part.run_as(Speed.from_json(values))
        now = self.provenance()
        compared = (
            *("loss", "gamma", "loss_kwargs", "beta_setting", "ce_weight", "seed", "processes"),
            *("label_smoothing_factor", "feature_loss", "feature_weight", "feature_loss_kwargs"),
            *("ema_decay", "ema_warmup", "teacher_cache"),
        )
        differences = [
            f"{key} was {saved[key]} and is {now[key]}" for key in compared if key in saved and saved[key] != now[key]
        ]
        was, is_now = ((values.get("teacher") or {}).get("id") for values in (saved, now))
        if was != is_now:
            differences.append(f"the teacher was {was} and is {is_now}")
        if differences:
            logger.warning(
                "Going on from %s with other settings, which is not the run that it began: %s.",
                checkpoint,
                "; ".join(differences),
            )

    @torch.no_grad()
    def _preflight(self) -> None:
        """The teacher's top-1 on the (first) evaluation data set, once."""
        dataset = next(iter(self.eval_dataset.values())) if isinstance(self.eval_dataset, dict) else self.eval_dataset
        if dataset is None or self.teacher is None:
            return
        known = [None if self.replay is None else self.replay.measured_top1(dataset)]
        # All processes or none run the teacher.
        measured = cast("tuple[float, int] | None", broadcast_object_list(known)[0])
        if measured is not None:
            report_top1(*measured, self.teacher.name, self.teacher.num_classes)
        else:
            measured = teacher_top1(
                self._batches(self.get_eval_dataloader(dataset)),
                self.compute_teacher_logits,
                self._label_name,
                self.accelerator,
                self.teacher.name,
            )
            if self.replay is not None and measured is not None and self.is_world_process_zero():
                self.replay.keep_top1(dataset, measured)
        self.teacher_top1 = measured[0] if measured else None

    def _measure_beta(self) -> float:
        """beta="auto": the loss's balance with the labels, from the mean power sum over the first samples."""
        assert self.distillation_loss is not None
        if self.args.ce_weight == 0:
            logger.info('beta="auto" without labels: there is nothing to balance with, so beta is 1.')
            return 1.0
        gamma = self.args.gamma or 1.0
        with _keeping_random_state(), torch.no_grad():
            batches = (self._mixed(batch) for batch in self._batches(self.get_train_dataloader()))
            mean, samples = mean_power_sum(
                batches, self._training_teacher_logits, gamma, self.args.auto_beta_samples, self.accelerator
            )
        beta = self.args.ce_weight * self.distillation_loss.balanced_beta(self.args.balance_lambda, mean)
        logger.warning(
            'beta="auto": mean power sum %.4f over %d training samples at gamma=%g; beta=%.4f keeps the balance of KD '
            "at lambda=%g.",
            mean,
            samples,
            gamma,
            beta,
            self.args.balance_lambda,
        )
        return beta

    def _batches(self, dataloader: DataLoader) -> Iterator[dict[str, Any]]:
        return map(self._prepared, dataloader)

    def _prepare_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """A batch on the device: here every batch passes, in training as before and beside it.

        Images that come as bytes are normalised once, as the student wants them, before they are mixed and before
        either network sees them.
        """
        inputs = super()._prepare_inputs(inputs)
        images = inputs.get(PIXEL_VALUES)
        if not isinstance(images, Tensor) or images.dtype != torch.uint8:
            return inputs
        if self._normaliser is None:
            self._normaliser = self._build_normaliser()
        return {**inputs, PIXEL_VALUES: self._normaliser(images)}

    def _build_normaliser(self) -> PixelNormaliser:
        student = unwrap(self.model)
        preprocessing = Preprocessing.of(student) or Preprocessing.from_image_processor(self.processing_class)
        if preprocessing is None:
            raise ValueError(
                f"The data's `{PIXEL_VALUES}` are bytes (uint8), to be normalised on the device, and the student "
                f"{type(student).__name__} does not say by which mean and deviation: build it with "
                "hf_kd.create_student(..., mean=..., std=...), or give normalised floats."
            )
        # An fp64 student trains in fp64 throughout.
        double = next(student.parameters()).dtype == torch.float64
        return PixelNormaliser(preprocessing.mean, preprocessing.std, torch.float64 if double else torch.float32)

    def _prepared(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """A batch as a loader gave it, on the device, with checked labels and a mask where samples are repeats."""
        return self._with_checked_labels(self._prepare_inputs(mark_padding(inputs, self.accelerator)))

    # ---- Evaluation ------------------------------------------------------------------------------------------------

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[Tensor | None, Any, Tensor | None]:
        """Plain cross-entropy, logits and labels of the student; the teacher runs only for ``teacher_metrics``.

        With ``teacher_metrics`` and a ``compute_metrics`` of your own, the predictions are (student, teacher) logits.
        """
        inputs = self._prepared(inputs)
        labels = inputs.get(self._label_name)
        if labels is not None and not is_soft(labels, self._student_classes):
            labels = without_repeats(labels, inputs.get(SAMPLE_MASK))
        with torch.no_grad():
            student = self._student_outputs(model, inputs)
            loss = None
            if labels is not None:
                total, count = cross_entropy(student, labels)
                loss = total / count.clamp_min(1)
            if prediction_loss_only:
                return loss, None, None
            if self.args.teacher_metrics and self.teacher is not None:
                return loss, (student.logits, self.compute_teacher_logits(inputs)), labels
        return loss, student.logits, labels

    def evaluation_loop(
        self,
        dataloader: DataLoader,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        with self._averaged():
            output = super().evaluation_loop(
                dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix
            )
        # Trainer averages over batches, whatever their size and number of labels; this is the mean over samples.
        values, nll = output.metrics or {}, f"{metric_key_prefix}_nll"
        if self._default_metrics and nll in values:
            values[f"{metric_key_prefix}_loss"] = values[nll]
        return output

    def predict(self, *args: Any, **kwargs: Any) -> PredictionOutput:
        """Trainer's predict: ``predictions`` are the logits (with ``teacher_metrics``: student's and teacher's)."""
        if not self._default_metrics:
            return super().predict(*args, **kwargs)
        # Evaluation keeps six numbers a sample; a prediction is wanted whole.
        reduce_logits, summarise = self.preprocess_logits_for_metrics, self.compute_metrics
        self.preprocess_logits_for_metrics, self.compute_metrics = None, _summarise_logits
        try:
            return super().predict(*args, **kwargs)
        finally:
            self.preprocess_logits_for_metrics, self.compute_metrics = reduce_logits, summarise

    # ---- Logging ---------------------------------------------------------------------------------------------------

    def _before_logging(self) -> None:
        self._data_wait.report(self._meters)
        self._logged_components = term_gradients.norms_and_cosine(self._meters.means(self.accelerator))
        self._data_wait.judge(self._logged_components.get(DATA_WAIT, 0.0))
        if self.args.uses_logits and self.beta is not None:
            self._logged_components["beta"] = self.beta
        if self._guard.skipped:
            self._logged_components["skipped_steps"] = self._guard.skipped

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        if "loss" in logs:
            logs.update(self._logged_components)
            self._logged_components = {}
        super().log(logs, *args, **kwargs)

    # ---- Optimiser and schedule ------------------------------------------------------------------------------------

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        if self.args.decay_all_parameters:
            return [name for name, _ in model.named_parameters()]
        # A timm network may say that more is exempt, such as position embeddings. By identity: wrappers change names.
        network = timm_network(unwrap(model))
        patterns: Collection[str] = getattr(network, "no_weight_decay", tuple)()
        exempt = {id(p) for name, p in network.named_parameters() if any(fnmatch(name, part) for part in patterns)}
        decayed = set(super().get_decay_parameter_names(model))
        return [name for name, p in model.named_parameters() if name in decayed and id(p) not in exempt]

    def set_initial_training_values(self, args: TrainingArguments, dataloader: DataLoader) -> tuple[Any, ...]:
        values = super().set_initial_training_values(args, dataloader)
        self._steps_per_epoch = values[1] if has_length(dataloader) else None
        return values

    def create_optimizer(self, model: nn.Module | None = None) -> Optimizer:
        optimizer = super().create_optimizer(model)
        if self.features is not None:
            self.features.join(optimizer, self.args.weight_decay)
        return optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: Optimizer | None = None) -> Any:
        # Trainer makes the optimiser first.
        optimizer = cast(Optimizer, self.optimizer if optimizer is None else optimizer)
        # Before there is a scheduler, which counts the steps in the function that it finds.
        step_directly(optimizer)
        if not self.args.lr_milestones or self.lr_scheduler is not None:
            return super().create_scheduler(num_training_steps, optimizer)
        if self._steps_per_epoch is None:
            raise ValueError(
                "`lr_milestones` are epochs, and this data set has no length: give it one (__len__), or use "
                "lr_scheduler_type."
            )
        milestones = [round(epoch * self._steps_per_epoch) for epoch in self.args.lr_milestones]
        warmup = self.args.get_warmup_steps(num_training_steps)

        def factor(step: int) -> float:
            return min(1.0, (step + 1) / (warmup + 1)) * self.args.lr_decay ** bisect_right(milestones, step)

        self.lr_scheduler = LambdaLR(optimizer, factor)
        self._created_lr_scheduler = True
        return self.lr_scheduler

    # ---- The average of the weights --------------------------------------------------------------------------------

    def _averaged(self) -> contextlib.AbstractContextManager[None]:
        """The student with the average of its weights, if there is one: what is evaluated and saved."""
        return contextlib.nullcontext() if self.average is None else self.average.applied(self.model)

    def _finalize_training(self, *args: Any, **kwargs: Any) -> Any:
        if self.average is not None:
            self.average.end(self.model)
            # Each process has averaged its own BatchNorm statistics; the first one's are saved.
            self._share(unwrap(self.model).buffers())
        return super()._finalize_training(*args, **kwargs)

    # ---- Saving and loading ----------------------------------------------------------------------------------------

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        """The student alone, in a form that timm and transformers open, and how it came about."""
        if not self.args.should_save:
            return
        folder = Path(self.args.output_dir if output_dir is None else output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        with self._averaged():
            save_student(self.model, folder, state_dict=state_dict)
        if self.processing_class is not None:
            self.processing_class.save_pretrained(folder)
        # As the user gave them, but for what is secret.
        given = changed(self.args, hub_token=None, save_total_limit=self._save_total_limit)
        with given, atomic_write(folder / TRAINING_ARGS_NAME) as draft:
            torch.save(self.args, draft)
            write_text(folder / TRAINING_ARGS, json.dumps(public_arguments(self.args), indent=2) + "\n")
        write_text(folder / PROVENANCE, json.dumps(self.provenance(), indent=2) + "\n")

    def _other_parameters(self) -> list[nn.Parameter]:
        return [] if self.features is None else self.features.parameters()

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        if self.features is not None and self.args.should_save:
            self.features.save(output_dir)
        if self.average is not None and self.args.should_save:
            self.average.save_raw_weights(self.model, output_dir)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        if self.is_fsdp_enabled or not (Path(resume_from_checkpoint) / WEIGHTS).is_file():
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        else:
            load_student_weights(self.model if model is None else model, resume_from_checkpoint)
        if self.average is None and (Path(resume_from_checkpoint) / RAW_WEIGHTS).is_file():
            # The student there is an average. With `ema_decay` it is needed, until training begins.
            load_raw_weights(self.model if model is None else model, resume_from_checkpoint)

    def _load_best_model(self) -> None:
        best = self.state.best_model_checkpoint
        if best is None or self._engine or not os.path.isfile(os.path.join(best, WEIGHTS)):
            super()._load_best_model()
        else:
            load_student_weights(self.model, best)

    def create_model_card(
        self,
        language: str | None = None,
        license: str | None = None,
        tags: str | list[str] | None = None,
        model_name: str | None = None,
        finetuned_from: str | None = None,
        tasks: str | list[str] | None = None,
        dataset_tags: str | list[str] | None = None,
        dataset: str | list[str] | None = None,
        dataset_args: str | list[str] | None = None,
        **card: Any,
    ) -> None:
        """Write the model card, README.md in the output folder, from the run, with a picture of its curves.

        The named arguments are Trainer's: ``dataset_tags`` are Hub ids, ``dataset`` names for readers;
        ``finetuned_from`` is the Hub id of published weights that the student started from. ``card`` are further
        fields of :class:`hf_kd.model_card.StudentCard`. Nothing of them is guessed.
        """
        if self.is_world_process_zero():
            fields = {
                "language": language,
                "license": license,
                "tags": tags,
                "model_name": model_name,
                "base_model": finetuned_from,
                "pipeline_tag": tasks,
                "dataset": dataset_tags,
                "dataset_name": dataset,
                "dataset_config": dataset_args,
            }
            self.write_card(Path(self.args.output_dir), **{**fields, **card})

    def student_card(self, **given: Any) -> StudentCard:
        given = {key: value for key, value in given.items() if value is not None}
        defaults = {"license": self.args.hub_license, "dataset": self.args.hub_datasets}
        return StudentCard.from_trainer(self, **{**defaults, **given})

    def _loss_name(self) -> str:
        """The loss as it is registered, or the name of what replaces it."""
        if not self.args.uses_logits:
            return "ce"
        overriding = next(cls for cls in type(self).__mro__ if "compute_distillation_loss" in vars(cls))
        if overriding is not DistillationTrainer:
            return overriding.__name__
        return "custom" if isinstance(self.distillation_loss, CallableLoss) else self.args.loss

    def provenance(self) -> dict[str, Any]:
        """How this student came about, in JSON values: teacher, objective, seed, versions (distillation.json)."""
        args = self.args
        teacher = None
        if args.uses_teacher:
            name = self.teacher.name if self.teacher is not None else type(self).__name__
            teacher = {"id": name, "top1": self.teacher_top1}
            if self.teacher is not None and self.teacher.hub_id:
                teacher.update(hub_id=self.teacher.hub_id, revision=self.teacher.revision)
        loss = self._loss_name()
        # A loss of the user's own need not listen to the configuration's gamma.
        named = loss in LOSSES
        student = unwrap(self.model)
        cfg = getattr(student, "pretrained_cfg", None) or {}
        architecture = getattr(getattr(student, "config", None), "architecture", None) or cfg.get("architecture")
        return {
            "teacher": teacher,
            "student": {
                "architecture": architecture or type(student).__name__,
                "num_classes": self._student_classes,
                "parameters": sum(p.numel() for p in student.parameters()),
                **({"base_model": student.started_from} if getattr(student, "started_from", None) else {}),
            },
            "teacher_speed": [part.speed.to_json() for part in self._teacher_parts],
            "channels_last": self._channels_last,
            "data": self._data_facts(),
            "loss": loss,
            "gamma": args.gamma if named else None,
            "temperature": args.temperature if named else None,
            "loss_kwargs": args.loss_kwargs if named else None,
            "beta": self.beta if args.uses_logits else None,
            "beta_setting": args.beta if args.uses_logits else None,
            "balance_lambda": args.balance_lambda if args.beta == "auto" else None,
            "ce_weight": args.ce_weight,
            "label_smoothing_factor": args.label_smoothing_factor,
            "feature_loss": args.feature_loss,
            "feature_weight": args.feature_weight if args.feature_loss else None,
            "feature_loss_kwargs": args.feature_loss_kwargs,
            "averaged_weights": args.ema_decay is not None,
            "ema_decay": args.ema_decay,
            "ema_warmup": args.ema_warmup if args.ema_decay is not None else None,
            "teacher_cache": None if self.replay is None else self.replay.provenance(),
            "seed": args.seed,
            "data_seed": args.data_seed,
            "processes": args.world_size,
            "global_step": self.state.global_step,
            "versions": {
                "hf_kd": __version__,
                "python": platform.python_version(),
                "torch": torch.__version__,
                "timm": timm.__version__,
                "transformers": transformers.__version__,
                "accelerate": accelerate.__version__,
            },
        }

    def _data_facts(self) -> dict[str, Any]:
        """The training data, as far as they say what they are: their size, and a Hub data set's name and revision."""
        data = self.train_dataset
        # Ours keep the data set that they read from.
        source = data if hasattr(data, "info") else getattr(data, "dataset", None)
        info = getattr(source, "info", None)
        facts = {
            "hub_ids": self.args.hub_datasets,
            "name": getattr(info, "dataset_name", None),
            "config": getattr(info, "config_name", None),
            "split": str(split) if (split := getattr(source, "split", None)) is not None else None,
            "fingerprint": getattr(source, "_fingerprint", None),
            "train_samples": len(data) if has_length(data) else None,
        }
        return {key: value for key, value in facts.items() if value is not None}


# ---- Helpers -------------------------------------------------------------------------------------------------------


def _class_names(data: Any, label_name: str) -> list[str] | None:
    """The classes' names, if a data set says them: as ``class_names``, or in the features of its labels."""
    features = getattr(data, "features", None)
    label = features.get(label_name) if isinstance(features, Mapping) else None
    return getattr(data, "class_names", None) or getattr(label, "names", None)


def _is_float(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def _reduce_logits(logits: Any, labels: Tensor | None) -> Tensor:
    """What the metrics need of a batch's logits: a handful of numbers a sample, (B, columns)."""
    student, teacher = logits if isinstance(logits, (tuple, list)) else (logits, None)
    if labels is None:
        return student
    if labels.is_floating_point():
        labels = labels.argmax(dim=-1)
    classes = student.shape[-1]
    return metrics.per_sample_statistics(
        student.reshape(-1, classes),
        labels.reshape(-1),
        None if teacher is None else teacher.reshape(-1, classes),
    )


def _summarise(prediction: EvalPrediction) -> dict[str, float]:
    return metrics.summarise(np.asarray(prediction.predictions))


def _summarise_logits(prediction: EvalPrediction) -> dict[str, float]:
    logits = prediction.predictions
    parts = tuple(torch.from_numpy(part) for part in (logits if isinstance(logits, tuple) else (logits,)))
    rows = _reduce_logits(parts if len(parts) > 1 else parts[0], torch.from_numpy(np.asarray(prediction.label_ids)))
    return metrics.summarise(rows)


@contextlib.contextmanager
def _keeping_random_state() -> Iterator[None]:
    """Leave every random generator as it was found: looking at data must not change the run that follows."""
    python, numpy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng():
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)
