"""transformers' loop on any number of processes, and through any ending. It knows nothing of teachers."""

from __future__ import annotations

import contextlib
import itertools
import logging
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate.logging import get_logger
from accelerate.utils import broadcast, broadcast_object_list
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader, IterableDataset
from transformers import Trainer, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import (
    PREFIX_CHECKPOINT_DIR,
    EvalLoopOutput,
    SaveStrategy,
    has_length,
    rotate_checkpoints,
)

from . import checkpoints
from .config import DistillationConfig
from .data.bad_samples import BadSampleReport, SkippingDataset
from .data.collate import collate
from .data.padding import Numbered, mark_padding
from .data.views import EpochCallback
from .data_wait import DataWait
from .launch import check_launch
from .lean_steps import clip_gradients, staying_in_train_mode
from .networks import num_classes_of, unwrap
from .nonfinite import FiniteGuard
from .preemption import EXIT_STATUS, PreemptionCallback
from .samples import count_labels, count_samples
from .text import first_line


logger = get_logger(__name__)


class ReliableTrainer(Trainer):
    """A Trainer that trains the same on several processes and loses nothing when it is stopped.

    Samples that Accelerate repeats do not count, checkpoints are complete or passed over, SIGTERM ends a run with one,
    values that are not finite stop it or are skipped, and launches that are not what they look like are refused.

    Args:
        model: the student.
        args: the configuration.
        trainer_kwargs: of Trainer.
    """

    # Narrower than Trainer declares them: a trainer that is built has both.
    args: DistillationConfig
    model: nn.Module

    def __init__(self, model: nn.Module | None, args: DistillationConfig, **trainer_kwargs: Any) -> None:
        if trainer_kwargs.get("data_collator") is None and trainer_kwargs.get("processing_class") is None:
            trainer_kwargs["data_collator"] = collate
        self._preemption = PreemptionCallback()
        own = [EpochCallback(), BadSampleReport(), self._preemption]
        trainer_kwargs["callbacks"] = [*own, *(trainer_kwargs.get("callbacks") or [])]
        # Trainer sets transformers' verbosity by the same argument.
        logging.getLogger(__package__).setLevel(args.get_process_log_level())
        # Trainer's constructor asks for model.config when labels are smoothed, which the loss does here; and it would
        # install a SIGTERM handler of its own.
        with changed(args, label_smoothing_factor=0.0, enable_jit_checkpoint=False):
            super().__init__(model, args, **trainer_kwargs)
        check_launch(self.args)
        if self.accelerator.num_processes > 1 and not self.accelerator.even_batches:
            raise ValueError(
                "accelerator_config has even_batches=False: with several processes some would have no last batch, and "
                "the others would wait for them for ever. Leave it True: repeats that fill batches up do not count."
            )
        if self.is_deepspeed_enabled and self.args.on_nonfinite == "skip":
            raise ValueError(
                'on_nonfinite="skip" cannot take back a step of DeepSpeed, which updates the weights itself: use '
                '"raise", or fp16, whose loss scaler skips such steps.'
            )
        if self.is_fsdp_enabled and self.args.save_on_each_node:
            raise ValueError(
                "save_on_each_node=True does not go with FSDP, which gathers the student on the first machine alone: "
                "put `output_dir` where all machines share it."
            )
        self._student_classes = num_classes_of(self.model)
        self._guard = FiniteGuard(
            self.args.on_nonfinite, self.args.max_nonfinite_steps, deferred=self.args.device.type != "cpu"
        )
        self._data_wait = DataWait(self.args.device, self.args.dataloader_num_workers)
        self._step_batches: list[dict[str, Any]] = []
        # Of the epoch under way: asking a network for them in every step takes longer than some of its layers.
        self._network: nn.Module = unwrap(self.model)
        self._parameters: list[nn.Parameter] = []
        self._counted_step = 0
        self._save_total_limit = self.args.save_total_limit
        self._skipping: dict[tuple[int, bool], SkippingDataset] = {}

    @staticmethod
    def check_place(args: DistillationConfig) -> None:
        """Find out now, not at the first step or checkpoint, whether this process and its folder will do."""
        if args.n_gpu > 1:
            raise ValueError(
                f"{args.n_gpu} GPUs are visible and no launcher is running, which would mean torch's DataParallel: "
                f"start the script with `accelerate launch --multi_gpu --num_processes {args.n_gpu} SCRIPT.py`, or "
                "choose one GPU with CUDA_VISIBLE_DEVICES."
            )
        if not args.should_save:
            return
        folder = Path(args.output_dir)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            if args.save_strategy != SaveStrategy.NO:
                with tempfile.TemporaryFile(dir=folder):
                    pass
        except OSError as error:
            raise ValueError(
                f"`output_dir` {folder} cannot be written to ({error.strerror}): give a folder that can."
            ) from error

    # ---- What subclasses see and override ---------------------------------------------------------------------------

    @property
    def _label_name(self) -> str:
        return self.args.label_names[0]

    @property
    def _engine(self) -> str | None:
        """What takes the student apart, "FSDP" or "DeepSpeed", or None."""
        return "FSDP" if self.is_fsdp_enabled else "DeepSpeed" if self.is_deepspeed_enabled else None

    def _before_training(self, checkpoint: str | None) -> None:
        """What is to be done when the checkpoint to go on from, if any, is known."""

    def _other_parameters(self) -> list[nn.Parameter]:
        """Parameters that are trained and are no part of the student."""
        return []

    def _before_logging(self) -> None:
        """What all processes have to do together for a log."""

    # ---- Engines ----------------------------------------------------------------------------------------------------

    def create_accelerator_and_postprocess(self) -> None:
        super().create_accelerator_and_postprocess()
        if self.accelerator.is_fsdp2:
            # Accelerate's would turn the weights into bf16, with which BatchNorm's statistics do not go, and add
            # gradients up in it. Autocast around the forward pass does neither: it is then the same as under DDP.
            self.accelerator.state.fsdp_plugin.mixed_precision_policy = MixedPrecisionPolicy()

    def _prepare_for_training(self, *args: Any, **kwargs: Any) -> Any:
        if self.accelerator.is_fsdp2 and not isinstance(unwrap(self.model), FSDPModule):
            # As DDP and DeepSpeed do by themselves; FSDP takes each process's part from that process's own weights.
            self._share([*self.model.parameters(), *self.model.buffers()])
        return super()._prepare_for_training(*args, **kwargs)

    def get_optimizer_cls_and_kwargs(  # type: ignore[override]
        self, args: TrainingArguments, model: Any = None
    ) -> tuple[Any, Any]:
        optimizer, options = super().get_optimizer_cls_and_kwargs(args, model)
        if optimizer is torch.optim.SGD and not self._engine:
            # In one call for all parameters: the same update but for rounding, in a fourth of the time.
            options = {"fused": True, **options}
        return optimizer, options

    @torch.no_grad()
    def _share(self, tensors: Iterable[Tensor]) -> None:
        """Give all processes the first one's values."""
        if self.accelerator.num_processes > 1:
            for tensor in tensors:
                # On the device: not every backend reaches tensors elsewhere.
                tensor.copy_(broadcast(tensor.detach().to(self.args.device)))

    def _prepare_input(self, data: Any) -> Any:
        # Trainer casts to DeepSpeed's type here; the teacher would get rounded images. The student's are cast later.
        return data.to(self.args.device) if isinstance(data, Tensor) else super()._prepare_input(data)

    # ---- Data -------------------------------------------------------------------------------------------------------

    def _get_dataloader(  # type: ignore[override]
        self, dataset: Any, *, is_training: bool = False, **kwargs: Any
    ) -> DataLoader:
        if self.args.on_bad_sample == "skip":
            dataset = self._passing_over_bad_samples(dataset, is_training)
        streams = isinstance(dataset, IterableDataset)
        if streams and self.accelerator.num_processes > 1 and self.accelerator.dispatch_batches is False:
            dataset = Numbered(dataset)
        # Trainer would leave samples out of the evaluation too.
        with changed(self.args, dataloader_drop_last=self.args.dataloader_drop_last and is_training):
            loader = super()._get_dataloader(dataset, is_training=is_training, **kwargs)
        self._preemption.let_workers_finish(loader)
        return loader

    def _passing_over_bad_samples(self, dataset: Any, is_training: bool) -> Any:
        if not isinstance(dataset, IterableDataset):
            # One for all loaders of a data set: it knows what was bad.
            key = (id(dataset), is_training)
            return self._skipping.setdefault(key, SkippingDataset(dataset, evaluation=not is_training))
        if not hasattr(dataset, "on_bad_sample"):
            raise ValueError(
                f'on_bad_sample="skip" cannot go on with a {type(dataset).__name__}, which ends with its first error: '
                "catch the errors in its __iter__, or use hf_kd.data.HubImageStream."
            )
        dataset.on_bad_sample = "skip"
        return dataset

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], Tensor | None]:
        """The batches of an optimiser step, and how many samples and labels, (2,), they have over all processes."""
        self._data_wait.begin()
        batches = [mark_padding(batch, self.accelerator) for batch in itertools.islice(epoch_iterator, num_batches)]
        self._data_wait.arrived()
        self._step_batches = batches
        # Trainer empties the student's gradients alone.
        for parameter in self._other_parameters():
            parameter.grad = None
        if not batches:
            return batches, None
        kind = (self._label_name, self._student_classes)
        counts = (sum(count(batch, *kind) for batch in batches) for count in (count_samples, count_labels))
        own = torch.stack([torch.as_tensor(count, device=self.args.device) for count in counts])
        summed = self._preemption.share(own, self.accelerator)
        return batches, summed if self.args.average_tokens_across_devices else own

    # ---- Beginning and ending ---------------------------------------------------------------------------------------

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """Train, from the beginning or from a checkpoint.

        Args:
            resume_from_checkpoint: a checkpoint's folder; or True for the last complete one in ``output_dir``, and
                for the beginning if there is none yet, so that one command starts a run and goes on with it.

        Raises:
            SystemExit: with status 143, after a checkpoint, if SIGTERM came (see ``enable_jit_checkpoint``).
        """
        if self.train_dataset is not None and has_length(self.train_dataset) and len(self.train_dataset) == 0:
            raise ValueError("`train_dataset` is empty (its length is 0): give data to train on.")
        batch = self.args.train_batch_size * (1 if self.accelerator.split_batches else self.args.world_size)
        if self.args.dataloader_drop_last and has_length(self.train_dataset) and len(self.train_dataset) < batch:
            raise ValueError(
                f"`train_dataset` has {len(self.train_dataset)} samples, fewer than one batch of {batch} over all "
                "processes, and dataloader_drop_last leaves out what is no whole batch: make the batch smaller, or "
                "set it to False."
            )
        if resume_from_checkpoint is True:
            resume_from_checkpoint = self._last_checkpoint()
        elif resume_from_checkpoint:
            resume_from_checkpoint = self._checked_checkpoint(str(resume_from_checkpoint))
        else:
            resume_from_checkpoint = None
        if resume_from_checkpoint is not None:
            self._check_engine(Path(resume_from_checkpoint))
        self._before_training(resume_from_checkpoint)
        try:
            output = super().train(resume_from_checkpoint, *args, **kwargs)
            self._guard.check()
        finally:
            self._preemption.restore()
        if self._preemption.stopped_at is not None:
            if self.is_world_process_zero():
                logger.warning(
                    "SIGTERM: training stopped after step %d with a checkpoint in %s; go on with "
                    "train(resume_from_checkpoint=True).",
                    self._preemption.stopped_at,
                    self.args.output_dir,
                )
            raise SystemExit(EXIT_STATUS)
        return output

    def _last_checkpoint(self) -> str | None:
        """The last complete checkpoint, the same for all processes, or None."""
        found: list[str | None] = [None]
        if self.is_world_process_zero():
            last = checkpoints.last_complete(self.args.output_dir)
            found = [None if last is None else str(last)]
        broadcast_object_list(found)
        if found[0] is None:
            logger.warning(
                "There is no complete checkpoint in %s to resume from: training starts at the beginning.",
                self.args.output_dir,
            )
        elif not Path(found[0]).is_dir():
            raise RuntimeError(
                f"Process {self.args.process_index} does not see the checkpoint {found[0]}, which the first process "
                "found: put `output_dir` where all machines share it, or copy the checkpoint to each of them."
            )
        return found[0]

    def _checked_checkpoint(self, checkpoint: str) -> str:
        folder = Path(checkpoint)
        if not (folder / TRAINER_STATE_NAME).is_file():
            raise ValueError(
                f"`resume_from_checkpoint` {checkpoint} is no checkpoint (a folder with {TRAINER_STATE_NAME}): give "
                "one, or True for the last complete one in `output_dir`."
            )
        reason = checkpoints.defect(folder)
        if reason is not None and (folder / checkpoints.MANIFEST).is_file():
            raise ValueError(
                f"The checkpoint {checkpoint} is damaged: {reason}. Resume from another one, or with "
                "resume_from_checkpoint=True from the last complete one."
            )
        if reason is not None:
            logger.warning("The checkpoint %s may be incomplete: %s.", checkpoint, reason)
        return checkpoint

    def _check_engine(self, checkpoint: Path) -> None:
        own = self._engine
        writer = checkpoints.engine(checkpoint)
        if writer != own:
            written, trains = (f"with {name}" if name else "without FSDP or DeepSpeed" for name in (writer, own))
            raise ValueError(
                f"The checkpoint {checkpoint} was written {written} and this run trains {trains}, which keep the "
                "optimiser's state in different forms: go on with the launch configuration that it was begun with, or "
                "begin a new run from its weights (hf_kd.student.load_student_weights)."
            )

    # ---- Evaluation -------------------------------------------------------------------------------------------------

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> EvalLoopOutput:
        # BatchNorm's statistics are each process's own, and the first one's are saved: those are evaluated.
        self._share(unwrap(self.model).buffers())
        with self._unprepared() if not self.accelerator._models else contextlib.nullcontext():
            return super().evaluation_loop(*args, **kwargs)

    @contextlib.contextmanager
    def _unprepared(self) -> Iterator[None]:
        """Have a student that is not in training yet evaluated as it is, whole.

        Accelerate would prepare it for evaluation alone and later take it for prepared: training would then go on in
        each process by itself. FSDP and ZeRO-2 prepare a student only together with its optimiser.
        """
        deepspeed = self.is_deepspeed_enabled
        if deepspeed or self.is_fsdp_enabled:
            self.model.to(self.args.device)
        self.accelerator._models.append(self.model)
        self.is_deepspeed_enabled = False
        try:
            yield
        finally:
            self.accelerator._models.clear()
            self.is_deepspeed_enabled = deepspeed

    # ---- Steps that are not finite ----------------------------------------------------------------------------------

    def _run_epoch(self, model: nn.Module, *args: Any, **kwargs: Any) -> None:
        self._network, self._parameters = unwrap(model), list(model.parameters())
        # Trainer asks after a step whether it was the last, so a finished run that is resumed would take one more.
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
        else:
            super()._run_epoch(model, *args, **kwargs)

    def training_step(self, model: nn.Module, *args: Any, **kwargs: Any) -> Tensor:
        with staying_in_train_mode(model, self._network):
            loss = super().training_step(model, *args, **kwargs)
        # A step that is skipped is left out of the average that is logged.
        return torch.where(torch.isfinite(loss), loss, 0.0) if self.args.on_nonfinite == "skip" else loss

    def _clip_grad_norm(self, model: nn.Module) -> Any:
        if self._engine:
            return super()._clip_grad_norm(model)
        self.accelerator.unscale_gradients()
        return clip_gradients(self._parameters, self.args.max_grad_norm)

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        if grad_norm is None and not self._engine:
            self.accelerator.unscale_gradients()
            grad_norm = clip_gradients(self._parameters, None)
        norm = super()._get_grad_norm(model, grad_norm)
        norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
        step = self.state.global_step + 1
        others = self._other_parameters()
        self._guard.watch_gradient(norm, model, self._step_batches, step, self.accelerator, others)
        return norm

    def _step_was_taken(self) -> bool:
        """Whether the update that was just made changed the weights."""
        # What the gradient scaler skips is counted only later.
        scaled = self.accelerator.scaler is not None
        return not (self.accelerator.optimizer_step_was_skipped if scaled else self._guard.in_a_row)

    def _maybe_log_save_evaluate(self, *args: Any, **kwargs: Any) -> None:
        self._count_scaler_steps()
        if self.control.should_log or self.control.should_evaluate or self.control.should_save:
            self._guard.check()
        self._data_wait.end_step()
        if self.control.should_log and self.state.global_step > self._globalstep_last_logged:
            # Here, where every process passes, and not in log(), which a user may call on one process alone.
            self._before_logging()
        super()._maybe_log_save_evaluate(*args, **kwargs)

    def _count_scaler_steps(self) -> None:
        """Count the updates that fp16's gradient scaler skipped, as it does to find its scale."""
        if self.accelerator.scaler is None or self._counted_step == self.state.global_step:
            return
        self._counted_step = self.state.global_step
        if self.accelerator.optimizer_step_was_skipped:
            self._guard.count_skipped(f"The scaled fp16 gradient is not finite at step {self.state.global_step}.")
        else:
            self._guard.count_taken()

    # ---- Checkpoints ------------------------------------------------------------------------------------------------

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Trainer's checkpoint, sealed when it is complete; only then may older ones go."""
        run_dir = Path(self._get_output_dir(trial))
        folder = run_dir / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        if self.args.should_save:
            checkpoints.discard(folder)
        self.accelerator.wait_for_everyone()
        limit = self._save_total_limit = self.args.save_total_limit
        try:
            with changed(self.args, save_total_limit=None):
                super()._save_checkpoint(model, trial)
            self.accelerator.wait_for_everyone()
            if self.args.should_save:
                checkpoints.seal(folder)
        except (OSError, RuntimeError, SafetensorError) as error:
            raise self._not_saved(folder, error) from error
        if self.args.should_save:
            rotate_checkpoints(
                str(run_dir),
                save_total_limit=limit,
                best_model_checkpoint=self.state.best_model_checkpoint,
                use_mtime=True,
            )

    def _not_saved(self, folder: Path, error: Exception) -> RuntimeError:
        if self.args.should_save:
            # What was written of it takes up the space that may have been missing.
            checkpoints.discard(folder)
        last = checkpoints.last_complete(folder.parent)
        kept = f"the last complete checkpoint is {last}" if last else "there is no earlier checkpoint"
        return RuntimeError(
            f"The checkpoint {folder} could not be written ({first_line(error)}), and training stopped: {kept}. Make "
            "room on the disk (save_total_limit keeps fewer checkpoints) and go on with "
            "train(resume_from_checkpoint=True)."
        )


@contextlib.contextmanager
def changed(args: DistillationConfig, **values: Any) -> Iterator[None]:
    """Other values of some arguments while the body runs."""
    saved = {name: getattr(args, name) for name in values}
    try:
        vars(args).update(values)
        yield
    finally:
        vars(args).update(saved)
