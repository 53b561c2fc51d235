"""Every knob of a distillation run: transformers' TrainingArguments and what distillation adds."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from numbers import Real
from typing import TYPE_CHECKING, Any, cast

import torch
from transformers import TrainingArguments
from transformers.trainer_pt_utils import AcceleratorConfig
from transformers.trainer_utils import SaveStrategy
from transformers.training_args import OptimizerNames

from .kernels import KERNELS
from .launch import runs_on_cpus
from .losses import functional
from .losses.feature import FEATURE_LOSSES, build_feature_loss
from .losses.logit import LOSSES, check_loss_name
from .teacher_cache.codec import DTYPES as CACHE_DTYPES


if TYPE_CHECKING:
    NumberOrAuto = float | str
    BoolOrAuto = bool | str
else:
    # HfArgumentParser reads `float | str` as float alone and would refuse `--beta auto`; __post_init__ converts.
    NumberOrAuto = BoolOrAuto = str


_NUMBERS = (
    *("ce_weight", "balance_lambda", "auto_beta_samples", "label_smoothing_factor", "lr_decay", "momentum"),
    *("mixup_alpha", "cutmix_alpha", "mixup_prob", "mixup_switch_prob", "max_nonfinite_steps"),
    *("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps", "num_train_epochs"),
)
_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


@dataclass
class DistillationConfig(TrainingArguments):
    r"""
    Arguments of a distillation run. The objective is, averaged over the samples of a batch,

        ce_weight · CE(labels, student) + beta · loss(student, teacher)

    Args:
        > Parameters that define the objective

        loss (`str`, *optional*, defaults to `"wttm"`):
            The distillation loss: `"wttm"`, `"ttm"`, `"kd"`, `"dkd"`, `"dist"`, `"nkd"`, or `"ce"` for training on
            the labels alone. DKD and NKD need labels, whatever `ce_weight` is.
        gamma (`float`, *optional*):
            Exponent of the power transform of the teacher, in (0, 1]. By default 0.8 for TTM and WTTM (the paper's
            value on ImageNet), 0.25 for KD and DKD, 1 for DIST and NKD.
        temperature (`float`, *optional*):
            1/gamma: the other way to say it.
        beta (`float` or `"auto"`, *optional*, defaults to `1.0`):
            Weight of the distillation loss. `"auto"` measures the teacher's mean power sum before the first step and
            takes the weight that balances labels and teacher as KD does at `balance_lambda` (the paper, Eq. 19).
        balance_lambda (`float`, *optional*, defaults to `0.9`):
            λ for `beta="auto"`, in [0, 1).
        auto_beta_samples (`int`, *optional*, defaults to `1024`):
            Over how many of the first training samples `beta="auto"` measures the power sum.
        ce_weight (`float`, *optional*, defaults to `1.0`):
            Weight of cross-entropy. 0 trains without labels. KD's λ form is `ce_weight=1-λ, beta=λ`.
        loss_kwargs (`dict`, *optional*):
            Further arguments of the loss. DKD: `alpha`, `beta`, `warmup_epochs`. DIST: `beta`, `gamma`, `eps`. NKD:
            `gamma`. What these losses call `beta` and `gamma` are weights inside the loss: neither the `beta` nor the
            `gamma` above, which are the weight of the whole and 1/temperature. Their `temperature` may stand here too.
        fused_loss (`str`, *optional*, defaults to `"auto"`):
            What computes WTTM or TTM and the cross-entropy with it, at once and with their gradient: `"eager"`
            (torch's own operations), `"compiled"` (torch.compile, on a CPU; some seconds at the first step),
            `"triton"` (on a GPU), or `"off"` for the formulas composed. `"auto"` is eager, but compiled on a CPU for
            batches of 4,000,000 logits or more. Other losses, soft labels and label smoothing are always composed.
            Results agree to rounding, not to the last bit.

        > Parameters that control the teacher

        teacher_checkpoint (`str`, *optional*):
            Weights file for a teacher given as a timm architecture.
        teacher_num_classes (`int`, *optional*):
            Class count of that file.
        teacher_class_map (`dict` or `list`, *optional*):
            For each student class, the teacher's class or classes.
        teacher_input_size (`int`, *optional*):
            Size that the teacher's images are resized to, in place of the size it was trained with.
        teacher_preflight (`bool`, *optional*, defaults to `True`):
            Whether to measure the teacher's top-1 on the evaluation data once, before training.
        teacher_metrics (`bool`, *optional*, defaults to `False`):
            Whether evaluation also runs the teacher and reports the agreement with it.
        teacher_dtype (`str`, *optional*):
            `"bf16"`, `"fp16"` or `"fp32"`: the teacher's weights and its forward pass in this type, whatever
            `mixed_precision` is. By default its weights are left as they are and it runs under the student's autocast.
        teacher_compile (`bool`, *optional*, defaults to `False`):
            Whether to run the teacher through torch.compile.
        teacher_fold_batchnorm (`bool`, *optional*, defaults to `False`):
            Whether to run the teacher with its BatchNorm folded into the layers before, in a copy (see
            :mod:`hf_kd.folding`). Its logits move by about 1e-6 of the largest.
        teacher_speed (`str`, *optional*, defaults to `"off"`):
            `"auto"` measures before training, on a batch of the training data, what runs the teacher fastest on this
            device, and takes it: folding and channels last, `teacher_dtype` and `teacher_compile` where they are given
            (on an accelerator torch.compile in any case). What was taken is logged and kept in checkpoints, so that a
            resumed run takes it too; two runs may differ. Never taken is a type that `teacher_dtype` does not name,
            nor anything that moves a logit by more than 5 % of the largest.
        teacher_stream (`bool`, *optional*, defaults to `False`):
            Whether the teacher runs on a CUDA stream of its own, beside the student's forward pass.
        teacher_fsdp (`bool`, *optional*, defaults to `False`):
            Whether to spread the teacher's weights over the processes (torch's fully_shard), for a teacher that does
            not fit on one device. By default every process has the whole teacher.
        teacher_revision (`str`, *optional*):
            Branch, tag or commit of a teacher from the Hub.
        teacher_weights_only (`bool`, *optional*, defaults to `True`):
            Whether `teacher_checkpoint` may hold nothing but tensors. `False` unpickles it, which runs whatever
            code is in it: for files that you wrote yourself.

        > Parameters that control the cache of the teacher's outputs

        teacher_cache_dir (`str`, *optional*):
            Folder that the teacher's logits on the training data are kept in. The first run fills it as it trains;
            later ones, of any student, loss, gamma, beta and seed, read it, and a teacher given by name is not even
            built. A cache that was made for another teacher, data set, transform or seed of the views is refused.
            Mixing, losses on features, `teacher_metrics` and `teacher_fsdp` need a live teacher.
        teacher_cache_views (`int`, *optional*):
            After how many epochs the augmented views of the training data repeat (its `cycle_views`, which stays
            set), so that so many passes of the teacher are enough; 1 keeps the views of the first epoch. By default
            every epoch has its own. Data without augmentation have one view.
        teacher_cache_dtype (`str`, *optional*):
            `"fp16"` (what a new cache has by default), `"int8"` or `"fp32"`: how its logits are stored.

        > Parameters that control the layout of images

        channels_last (`bool` or `"auto"`, *optional*, defaults to `False`):
            Whether images, and the weights of convolutions, of both networks are laid out in memory as channels last,
            which is often faster. What is saved is as without it. `"auto"` measures it before training, for each
            network, and keeps the answer in checkpoints.

        > Parameters that control the optimisation

        lr_milestones (`list[float]`, *optional*):
            Epochs at which the learning rate is multiplied by `lr_decay`; in place of `lr_scheduler_type`.
        lr_decay (`float`, *optional*, defaults to `0.1`):
            Factor at each milestone.
        momentum (`float`, *optional*, defaults to `0.9`):
            Momentum of `optim="sgd"`.
        nesterov (`bool`, *optional*, defaults to `False`):
            Nesterov momentum of `optim="sgd"`.
        decay_all_parameters (`bool`, *optional*, defaults to `False`):
            Whether weight decay also applies to biases and normalisation layers, as in the paper's protocols, and to
            what the timm network exempts by its `no_weight_decay()`, such as a ViT's position embeddings.

        > Parameters that control the average of the weights

        ema_decay (`float`, *optional*):
            Decay of an exponential moving average of the student's weights and BatchNorm statistics over the steps
            (timm's ModelEmaV3), in (0, 1); 0.99996 in DeiT's code. With it the average is the student: it is what
            evaluation measures, `load_best_model_at_end` chooses, and checkpoints, `save_model` and the Hub hold. The
            weights that are trained are in a checkpoint's `raw_weights.safetensors`, from which training goes on;
            when it ends, the student takes the average over.
        ema_warmup (`bool`, *optional*, defaults to `False`):
            Whether the decay begins lower, at most 1 - (1 + n)^(-2/3) after n steps, as timm's warmup does it.

        > Parameters that say what to do with what is bad

        on_nonfinite (`str`, *optional*, defaults to `"raise"`):
            What to do with a loss or gradient that is not finite: `"raise"`, or `"skip"` the step: nothing is updated,
            and `skipped_steps` is logged. Under fp16 the gradient scaler skips steps by itself.
        max_nonfinite_steps (`int`, *optional*, defaults to `20`):
            How many steps in a row may be skipped, by `"skip"` or by fp16's scaler; one more is an error.
        on_bad_sample (`str`, *optional*, defaults to `"raise"`):
            What to do with a sample that cannot be read: `"raise"`, or `"skip"`: another one takes its place (in
            evaluation without a label, so that it does not count), and which were bad is reported after each epoch.

        > Parameters that mix images

        mixup_alpha (`float`, *optional*, defaults to `0.0`):
            Mixup strength; 0 is off. Student and teacher see the same mixed images; evaluation is never mixed.
        cutmix_alpha (`float`, *optional*, defaults to `0.0`):
            CutMix strength; 0 is off.
        mixup_prob (`float`, *optional*, defaults to `1.0`):
            Probability that a batch is mixed.
        mixup_switch_prob (`float`, *optional*, defaults to `0.5`):
            Probability of CutMix rather than mixup when both are on.

        > Parameters that control the loss on features

        feature_loss (`str`, *optional*):
            `"crd"`, `"itrd"` or `"vitkd"`: a loss between features of student and teacher, added to the others. With
            `loss="ce"` it is the only one that the teacher is used for. It may have parameters, which are trained
            with the student's, kept in checkpoints, and no part of the student.
        feature_weight (`float`, *optional*, defaults to `1.0`):
            Its weight, μ in the paper.
        feature_loss_kwargs (`dict`, *optional*):
            Its arguments, such as `student_features` and `teacher_features`, the names of the features.

        > Parameters that control what is logged

        log_analysis (`bool`, *optional*, defaults to `False`):
            Whether training also logs what the paper's figures show of a run, as means over the samples since the
            last log. With a teacher, at `gamma` (1 if there is none): `divergence`, D(p_T‖q), `teacher_entropy`,
            H(p_T), and `power_sum`, U, whatever the loss. And how hard the terms pull at the student's logits:
            `grad_norm_ce`, `grad_norm_distill`, the norms of the gradients of `ce_weight · CE` and `beta · loss` with
            respect to a sample's logits (root of the mean square over samples, so that the batch size does not
            matter), and `grad_cosine`, the cosine between the two; see :mod:`hf_kd.term_gradients`. A feature loss
            has no such norm: its gradient does not go through the logits. The weights stay the same to the last bit.
            It costs some passes over tensors of a batch's logits in every step, and nothing of the networks.

        > Parameters that control publishing

        hub_license (`str`, *optional*):
            Identifier of the student's licence, such as `"apache-2.0"`. Needed with `push_to_hub`, unless the training
            data or the weights that the student started from have one.
        hub_datasets (`list[str]`, *optional*):
            Hub ids of the training data, for the student's card.

    NOTE: these defaults differ from TrainingArguments': `label_names` is `["labels"]` (was: found out from the model),
    `remove_unused_columns` is `False` (was `True`, which drops what the teacher needs), `logging_nan_inf_filter` is
    `False` (was `True`: a non-finite loss is an error here), `enable_jit_checkpoint` is `True` (was `False`): SIGTERM
    ends training with a checkpoint at the end of the step, on all processes alike, unless `save_strategy` is `"no"`;
    `ddp_find_unused_parameters` is `False` (was: `True` for most models, which costs time in every step): set it for a
    student with parameters that do not take part in every step. `dataloader_drop_last` is for training alone:
    evaluation is always over all samples. In `accelerator_config`, `non_blocking` is `True` on an accelerator whose
    batches are pinned (was `False`: every batch's copy then waits until the device has done all it was given).
    """

    # --- The objective ---
    loss: str = field(
        default="wttm",
        metadata={"help": "Distillation loss: wttm, ttm, kd, dkd, dist, nkd, or ce for the labels alone."},
    )
    gamma: float | None = field(
        default=None,
        metadata={"help": "Exponent of the power transform of the teacher, in (0, 1]: 1/temperature."},
    )
    temperature: float | None = field(default=None, metadata={"help": "1/gamma: the other way to give it."})
    beta: NumberOrAuto = field(
        default="1.0",
        metadata={"help": 'Weight of the distillation loss, or "auto" for KD\'s balance with the labels (Eq. 19).'},
    )
    balance_lambda: float = field(
        default=0.9, metadata={"help": 'The λ whose balance beta="auto" reproduces, in [0, 1).'}
    )
    auto_beta_samples: int = field(
        default=1024, metadata={"help": 'How many training samples beta="auto" measures the power sum over.'}
    )
    ce_weight: float = field(default=1.0, metadata={"help": "Weight of cross-entropy; 0 trains without labels."})
    loss_kwargs: dict | str | None = field(default=None, metadata={"help": "Further arguments of the loss, as JSON."})
    fused_loss: str = field(
        default="auto",
        metadata={"help": "What computes WTTM or TTM with the cross-entropy: auto, eager, compiled, triton, or off."},
    )

    # --- The teacher ---
    teacher_checkpoint: str | None = field(
        default=None, metadata={"help": "Weights file for a teacher given as a timm architecture."}
    )
    teacher_num_classes: int | None = field(default=None, metadata={"help": "Class count of teacher_checkpoint."})
    teacher_class_map: dict | str | list | None = field(
        default=None, metadata={"help": "For each student class, the teacher's class or classes, as JSON."}
    )
    teacher_input_size: int | None = field(
        default=None, metadata={"help": "Size that the teacher's images are resized to, in place of its own."}
    )
    teacher_preflight: bool = field(
        default=True, metadata={"help": "Measure the teacher's top-1 on the evaluation data once, before training."}
    )
    teacher_metrics: bool = field(
        default=False, metadata={"help": "Run the teacher in evaluation too and report the agreement with it."}
    )

    teacher_dtype: str | None = field(
        default=None, metadata={"help": "Run the teacher in bf16, fp16 or fp32, whatever the student's precision is."}
    )
    teacher_compile: bool = field(default=False, metadata={"help": "Run the teacher through torch.compile."})
    teacher_fold_batchnorm: bool = field(
        default=False, metadata={"help": "Run the teacher with BatchNorm folded into the layers before it."}
    )
    teacher_speed: str = field(
        default="off",
        metadata={"help": "auto: measure before training what runs the teacher fastest, and take it; or off."},
    )
    teacher_stream: bool = field(
        default=False, metadata={"help": "Run the teacher on a CUDA stream of its own, beside the student's forward."}
    )
    teacher_fsdp: bool = field(
        default=False, metadata={"help": "Spread the teacher's weights over the processes, if it does not fit on one."}
    )
    teacher_revision: str | None = field(
        default=None, metadata={"help": "Branch, tag or commit of a teacher from the Hub."}
    )
    teacher_weights_only: bool = field(
        default=True,
        metadata={"help": "False unpickles teacher_checkpoint, which runs the code in it: for your own files only."},
    )

    # --- The cache of the teacher's outputs ---
    teacher_cache_dir: str | None = field(
        default=None,
        metadata={"help": "Folder that the teacher's training logits are kept in, for this run and all later ones."},
    )
    teacher_cache_views: int | None = field(
        default=None, metadata={"help": "After how many epochs the augmented views repeat; by default never."}
    )
    teacher_cache_dtype: str | None = field(
        default=None, metadata={"help": "How a new cache stores logits: fp16 (the default), int8 or fp32."}
    )

    # --- What is bad ---
    on_nonfinite: str = field(
        default="raise", metadata={"help": "On a loss or gradient that is not finite: raise, or skip the step."}
    )
    max_nonfinite_steps: int = field(
        default=20, metadata={"help": "How many steps in a row may be skipped for it; one more is an error."}
    )
    on_bad_sample: str = field(
        default="raise",
        metadata={"help": "On a sample that cannot be read: raise, or skip it (another one takes its place)."},
    )

    # --- The layout of images ---
    channels_last: BoolOrAuto = field(
        default="false",
        metadata={
            "help": "Images and convolutions of both networks as channels last: true, false, or auto (measured)."
        },
    )

    # --- The optimisation ---
    lr_milestones: list[float] | None = field(
        default=None, metadata={"help": "Epochs at which the learning rate is multiplied by lr_decay."}
    )
    lr_decay: float = field(default=0.1, metadata={"help": "Factor of the learning rate at each milestone."})
    momentum: float = field(default=0.9, metadata={"help": "Momentum of optim=sgd."})
    nesterov: bool = field(default=False, metadata={"help": "Nesterov momentum of optim=sgd."})
    decay_all_parameters: bool = field(
        default=False, metadata={"help": "Decay biases and normalisation layers too, as the paper's protocols do."}
    )

    # --- The average of the weights ---
    ema_decay: float | None = field(
        default=None,
        metadata={
            "help": "Decay of a moving average of the weights, in (0, 1): the average is what is evaluated, saved and "
            "published, and the raw weights are trained on."
        },
    )
    ema_warmup: bool = field(default=False, metadata={"help": "Begin with a lower decay, as timm's warmup does."})

    # --- Mixing ---
    mixup_alpha: float = field(default=0.0, metadata={"help": "Mixup strength; 0 is off."})
    cutmix_alpha: float = field(default=0.0, metadata={"help": "CutMix strength; 0 is off."})
    mixup_prob: float = field(default=1.0, metadata={"help": "Probability that a batch is mixed."})
    mixup_switch_prob: float = field(
        default=0.5, metadata={"help": "Probability of CutMix rather than mixup when both are on."}
    )

    # --- Features ---
    feature_loss: str | None = field(
        default=None, metadata={"help": f"Loss on features, beside the one on logits: {', '.join(FEATURE_LOSSES)}."}
    )
    feature_weight: float = field(default=1.0, metadata={"help": "Weight of the feature loss (mu in the paper)."})
    feature_loss_kwargs: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "Further arguments of the feature loss, as JSON."}
    )

    # --- What is logged ---
    log_analysis: bool = field(
        default=False,
        metadata={"help": "Log divergence, teacher entropy and the gradient norms of the objective's terms as well."},
    )

    # --- Publishing ---
    hub_license: str | None = field(
        default=None,
        metadata={
            "help": "Identifier of the student's licence, such as apache-2.0: needed to publish it, unless its "
            "training data or starting weights have one."
        },
    )
    hub_datasets: list[str] | None = field(
        default=None, metadata={"help": "Hub ids of the training data, for the student's card."}
    )

    # --- TrainingArguments' own, without its None: it takes this name when none is given ---
    output_dir: str = field(
        default="trainer_output", metadata={"help": "Where checkpoints, the student and its card are written."}
    )

    # --- Changed defaults ---
    label_names: list[str] = field(
        default_factory=lambda: ["labels"], metadata={"help": "The batch entry that holds the labels."}
    )
    remove_unused_columns: bool = field(
        default=False, metadata={"help": "Drop the columns that the student's forward does not take."}
    )
    logging_nan_inf_filter: bool = field(
        default=False, metadata={"help": "Leave non-finite losses out of the logged average."}
    )
    ddp_find_unused_parameters: bool | None = field(
        default=False, metadata={"help": "Look for parameters without a gradient in every step (DDP)."}
    )
    enable_jit_checkpoint: bool = field(
        default=True, metadata={"help": "End training with a checkpoint when SIGTERM comes."}
    )

    def __post_init__(self) -> None:
        check_loss_name(self.loss)
        self.loss_kwargs = self._from_json("loss_kwargs", "an object", (dict,))
        self._resolve_gamma()
        self._resolve_channels_last()
        self._check_ranges()
        self._check_speed()
        self.teacher_class_map = self._from_json("teacher_class_map", "a list or an object", (list, tuple, dict))
        self.feature_loss_kwargs = self._from_json("feature_loss_kwargs", "an object", (dict,))
        self._check_cache()
        if self.feature_loss is not None:
            # Now, and not when the trainer is made: it costs nothing.
            build_feature_loss(self.feature_loss, **self.feature_loss_arguments)
        if self.optim == OptimizerNames.SGD and not self.optim_args:
            self.optim_args = f"momentum={self.momentum},nesterov={self.nesterov}"
        if runs_on_cpus() and not self.ddp_backend:
            # Accelerate joins them only if told so.
            self.use_cpu = True
        loading = self.accelerator_config or {}
        super().__post_init__()
        if self.save_strategy == SaveStrategy.NO:
            self.enable_jit_checkpoint = False
        if self.device.type == "cpu":
            # Nothing to pin for; torch would warn about it in every epoch.
            self.dataloader_pin_memory = False
        elif self.dataloader_pin_memory and isinstance(loading, dict) and "non_blocking" not in loading:
            # From pinned memory a copy needs no waiting for it, nor for the work before it.
            cast(AcceleratorConfig, self.accelerator_config).non_blocking = True

    @property
    def uses_teacher(self) -> bool:
        """Whether the objective needs a teacher: for its logits, its features, or both."""
        return self.uses_logits or self.feature_loss is not None

    @property
    def uses_logits(self) -> bool:
        """Whether the objective has a distillation term on logits."""
        return self.loss != "ce" and self.beta != 0

    @property
    def feature_loss_arguments(self) -> dict[str, Any]:
        """``feature_loss_kwargs``, read from JSON if it was text."""
        return cast("dict[str, Any]", self.feature_loss_kwargs or {})

    @property
    def loss_arguments(self) -> dict[str, Any]:
        """``loss_kwargs``, read from JSON if it was text."""
        return cast("dict[str, Any]", self.loss_kwargs or {})

    @property
    def teacher_torch_dtype(self) -> torch.dtype | None:
        """``teacher_dtype`` as torch's."""
        return None if self.teacher_dtype is None else _DTYPES[self.teacher_dtype]

    @property
    def mixes(self) -> bool:
        """Whether training images are mixed."""
        return self.mixup_alpha > 0 or self.cutmix_alpha > 0

    def _from_json(self, name: str, allowed: str, kinds: tuple[type, ...]) -> Any:
        given = value = getattr(self, name)
        if isinstance(value, str):
            try:
                value = json.loads(value)
            except ValueError:
                raise ValueError(f"`{name}` must be JSON, {allowed}, got {given!r}.") from None
        if value is not None and not isinstance(value, kinds):
            raise ValueError(f"`{name}` must be {allowed}, got {given!r}.")
        return value

    def _resolve_gamma(self) -> None:
        argument, given = getattr(LOSSES.get(self.loss), "gamma_argument", "gamma"), self.loss_arguments
        if argument == "gamma" and "gamma" in given:
            raise ValueError("`loss_kwargs` cannot hold gamma: give it as `gamma`, or as `temperature`.")
        if argument == "temperature" and "temperature" in given:
            # A loss has one temperature, wherever it is given: provenance and card show the configuration's.
            if self.temperature not in (None, given["temperature"]):
                raise ValueError(
                    f"`temperature`={self.temperature} and the temperature {given['temperature']} in `loss_kwargs` "
                    "contradict each other: give one of them."
                )
            self.temperature = given["temperature"]
        if self.gamma is not None:
            functional.check_gamma(self.gamma)
        if self.temperature is not None:
            functional.check_positive("temperature", self.temperature)
            gamma = 1.0 / self.temperature
            if self.gamma is not None and not math.isclose(self.gamma, gamma, rel_tol=1e-6):
                raise ValueError(
                    f"`gamma`={self.gamma} and `temperature`={self.temperature} contradict each other (gamma = "
                    "1/temperature): give one of them."
                )
            self.gamma = gamma if self.gamma is None else self.gamma
        if self.gamma is None and self.loss in LOSSES:
            self.gamma = getattr(LOSSES[self.loss], "default_gamma", None)
        if self.gamma is not None:
            functional.check_gamma(self.gamma)
            self.temperature = 1.0 / self.gamma

    def _resolve_channels_last(self) -> None:
        given = str(self.channels_last).lower()
        self._check("channels_last", 'true, false or "auto"', given in ("true", "false", "auto"))
        self.channels_last = given if given == "auto" else given == "true"

    def _check_speed(self) -> None:
        measured = [name for name in ("teacher_speed", "channels_last") if getattr(self, name) == "auto"]
        if measured and self.full_determinism:
            raise ValueError(
                f'`{measured[0]}`="auto" takes what measures faster, and `full_determinism` asks for a run that '
                "repeats exactly: leave out one of them."
            )
        changes = ("teacher_fold_batchnorm", "teacher_speed", "channels_last")
        given = [name for name in changes if getattr(self, name) not in (False, "off")]
        if given and self.teacher_fsdp:
            raise ValueError(
                f"`{given[0]}` needs the whole of the teacher, and `teacher_fsdp` spreads its weights over the "
                "processes: leave out one of them."
            )
        folds = [name for name in given if name != "channels_last"]
        if folds and self.feature_loss is not None:
            raise ValueError(
                f"`{folds[0]}` changes the teacher's modules, and `feature_loss` looks at what they give: leave out "
                "one of them."
            )

    def _check_ranges(self) -> None:
        if self.beta != "auto":
            try:
                self.beta = float(self.beta)
            except (TypeError, ValueError):
                raise ValueError(f'`beta` must be a number or "auto", got {self.beta!r}.') from None
            self._check("beta", "a number of at least 0", self.beta >= 0)
        for name in _NUMBERS:
            self._check(name, "a number", isinstance(getattr(self, name), Real))
        self._check("ce_weight", "a number of at least 0", self.ce_weight >= 0)
        if self.ce_weight == 0 and not self.uses_teacher:
            raise ValueError(
                f"There is nothing to train on: `ce_weight` is 0 and so is the distillation term (loss={self.loss!r}, "
                f"beta={self.beta}). Give one of them a positive weight."
            )
        self._check("feature_weight", "a number above 0", self.feature_weight > 0)
        self._check("balance_lambda", "in [0, 1)", 0 <= self.balance_lambda < 1)
        self._check("auto_beta_samples", "at least 1", self.auto_beta_samples >= 1)
        self._check("label_smoothing_factor", "in [0, 1)", 0 <= self.label_smoothing_factor < 1)
        self._check("lr_decay", "in (0, 1]", 0 < self.lr_decay <= 1)
        self._check("momentum", "in [0, 1)", 0 <= self.momentum < 1)
        self._check("max_nonfinite_steps", "at least 0", self.max_nonfinite_steps >= 0)
        if self.ema_decay is not None:
            number = isinstance(self.ema_decay, Real) and 0 < self.ema_decay < 1
            self._check("ema_decay", "in (0, 1), such as 0.9999, or None", number)
        elif self.ema_warmup:
            raise ValueError("`ema_warmup` is for the decay of an average, and there is none: give `ema_decay`.")
        for name, allowed in (
            ("fused_loss", ("auto", "off", *KERNELS)),
            ("on_nonfinite", ("raise", "skip")),
            ("on_bad_sample", ("raise", "skip")),
            ("teacher_dtype", (None, *_DTYPES)),
            ("teacher_cache_dtype", (None, *CACHE_DTYPES)),
            ("teacher_speed", ("off", "auto")),
        ):
            listed = ", ".join(repr(value) for value in allowed)
            self._check(name, f"one of {listed}", getattr(self, name) in allowed)
        for name in ("mixup_alpha", "cutmix_alpha"):
            self._check(name, "a number of at least 0", getattr(self, name) >= 0)
        for name in ("mixup_prob", "mixup_switch_prob"):
            self._check(name, "in [0, 1]", 0 <= getattr(self, name) <= 1)
        for name in ("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps"):
            self._check(name, "at least 1", getattr(self, name) >= 1)
        if self.max_steps <= 0:
            self._check("num_train_epochs", "above 0, unless `max_steps` is given", self.num_train_epochs > 0)
        milestones = self.lr_milestones or []
        numbers = isinstance(milestones, list) and all(isinstance(m, Real) for m in milestones)
        self._check("lr_milestones", "a list of epochs", numbers)
        self._check(
            "lr_milestones", "increasing epochs above 0", milestones == sorted({m for m in milestones if m > 0})
        )
        if not self.label_names or len(self.label_names) != 1:
            raise ValueError(
                f'`label_names` must name the one batch entry that holds the labels (such as ["labels"]), got '
                f"{self.label_names}."
            )

    def _check_cache(self) -> None:
        if self.teacher_cache_dir is None:
            for name in ("teacher_cache_views", "teacher_cache_dtype"):
                if getattr(self, name) is not None:
                    raise ValueError(
                        f"`{name}` is for a cache of the teacher's outputs: give `teacher_cache_dir` too."
                    )
            return
        views = self.teacher_cache_views
        self._check(
            "teacher_cache_views",
            "a whole number of at least 1",
            views is None or (isinstance(views, int) and views >= 1),
        )
        for name, given, reason in (
            ("mixup_alpha or cutmix_alpha", self.mixes, "a mixed image is no sample that it has a row for"),
            (
                "feature_loss",
                self.feature_loss is not None,
                "features are not stored, so that loss needs a live teacher",
            ),
            ("teacher_metrics", self.teacher_metrics, "it has no rows for the evaluation data"),
            (
                "teacher_fsdp",
                self.teacher_fsdp,
                "such a teacher runs on all processes at once, which lack different rows",
            ),
            (
                'teacher_speed="auto"',
                self.teacher_speed == "auto",
                "it measures a live teacher, and later runs have none (teacher_fold_batchnorm and channels_last do)",
            ),
        ):
            if given:
                raise ValueError(f"`teacher_cache_dir` does not go with {name}: {reason}. Leave out one of them.")

    def _check(self, name: str, allowed: str, valid: bool) -> None:
        value = getattr(self, name)
        if not valid or (isinstance(value, float) and not math.isfinite(value)):
            raise ValueError(f"`{name}` must be {allowed}, got {value!r}.")
