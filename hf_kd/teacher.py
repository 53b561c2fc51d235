"""The teacher: a frozen network that gives logits for the student's batches, whatever its own preprocessing is."""

from __future__ import annotations

import json
import math
import pickle
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from numbers import Integral
from pathlib import Path
from typing import Any, cast

import timm
import torch
from huggingface_hub import try_to_load_from_cache
from timm.models import load_state_dict
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoImageProcessor, AutoModelForImageClassification
from transformers.utils import logging

from .networks import (
    InputConverter,
    Preprocessing,
    Signature,
    hub_id_of,
    logits_of,
    misfits,
    num_classes_of,
    unknown_timm_name,
    unwrap,
)
from .sharding import shard_teacher
from .teacher_speed import Batch, Speed, SpeedOptions, fastest, speed_up
from .text import first_line


logger = logging.get_logger(__name__)

ClassMap = Sequence["int | Sequence[int]"] | Mapping[int, "int | Sequence[int]"]


class Teacher(nn.Module):
    """A frozen teacher: always in eval mode, without gradients, its logits in fp32 (fp64 stays fp64).

    ``teacher(pixel_values)`` or ``teacher(**inputs)`` returns logits (B, K). ``teacher.model`` is the network itself;
    with BatchNorm folded (:meth:`place`) a copy of it runs.

    Args:
        model: a module (timm, transformers or any other whose output holds logits), or a callable
            ``f(**inputs) -> logits``. A module is frozen in place. A callable gets the batch as it is, and is on its
            own as to preprocessing.
        name: how the teacher is called in logs and cards; by default its class, or its timm architecture.
        class_map: for a teacher with other classes than the student: for each student class the teacher's class, or
            classes, whose probability it takes. Logits of several classes are merged by logsumexp.
        preprocessing: mean, std, size and interpolation that the network was trained with; by default what it
            declares.
        input_size: height and width (or one number for both) to resize its images to, in place of ``preprocessing``'s.
        hub_id, revision: the repository on the Hub that it is from, and the commit.

    Raises:
        TypeError: if model is neither a module nor a callable.
        ValueError: for a class_map that names classes the teacher does not have.
    """

    def __init__(
        self,
        model: nn.Module | Callable[..., Any],
        *,
        name: str | None = None,
        class_map: ClassMap | None = None,
        preprocessing: Preprocessing | None = None,
        input_size: int | tuple[int, int] | None = None,
        hub_id: str | None = None,
        revision: str | None = None,
    ) -> None:
        super().__init__()
        if not callable(model):
            raise TypeError(
                f"A teacher must be a torch module or a callable that returns logits, got {type(model).__name__}. "
                "Names and paths go through Teacher.from_pretrained."
            )
        self.model = model
        self.name = name or _default_name(model)
        self.hub_id, self.revision = hub_id, revision
        self.preprocessing = preprocessing or Preprocessing.of(model)
        if input_size is not None:
            self.preprocessing = _resized(self.preprocessing, input_size, self.name)
        self.class_groups = _class_groups(class_map)
        network = unwrap(model) if isinstance(model, nn.Module) else model
        if getattr(network, "num_classes", None) == 0:
            raise ValueError(
                f"The teacher {self.name} has no classifier, only features: give a network trained to classify."
            )
        self.own_num_classes = num_classes_of(model)
        if self.class_groups and self.own_num_classes:
            largest = max(max(group) for group in self.class_groups)
            if largest >= self.own_num_classes:
                raise ValueError(
                    f"`class_map` names the teacher's class {largest}, but {self.name} has the classes 0 to "
                    f"{self.own_num_classes - 1}."
                )
        self.converter: InputConverter | None = None
        self._signature = Signature.of(model)
        self.speed = Speed()
        """How its network runs."""
        self._options = SpeedOptions()
        # What runs: the network, or its folded copy once that is made, which a tuple keeps from being part of this.
        self._runs: tuple[Callable[..., Any], ...] = (model,)
        if isinstance(model, nn.Module):
            model.requires_grad_(False)
        self.train(False)

    # ---- Making one ------------------------------------------------------------------------------------------------

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str | Path,
        *,
        num_classes: int | None = None,
        checkpoint: str | Path | None = None,
        class_map: ClassMap | None = None,
        preprocessing: Preprocessing | None = None,
        input_size: int | tuple[int, int] | None = None,
        weights_only: bool = True,
        revision: str | None = None,
        **options: Any,
    ) -> Teacher:
        """Load a teacher by name.

        Args:
            name_or_path: a timm name (``"resnet34.tv_in1k"``); ``"hf-hub:owner/name[@revision]"`` for a timm
                repository on the Hub; ``"owner/name"`` for a transformers one; a local folder saved by timm,
                transformers or hf_kd; or a weights file in such a folder.
            num_classes: the class count of the weights in ``checkpoint``; otherwise a check on what was loaded. A
                teacher never gets a new, untrained head.
            checkpoint: a weights file for the named timm architecture: safetensors, or ``.pth`` with the weights at
                the top or under ``model`` or ``state_dict``, read without unpickling code.
            class_map, preprocessing, input_size: see :class:`Teacher`.
            weights_only: whether ``checkpoint`` may hold nothing but tensors. ``False`` unpickles a ``.pth``, which
                runs whatever code is in it: for files that you wrote yourself.
            revision: branch, tag or commit of a repository on the Hub. Which commit was loaded is kept as
                ``teacher.revision``, and its repository as ``teacher.hub_id``.
            options: for ``timm.create_model``, such as ``in_chans``.

        Raises:
            ValueError: for an unknown name (with near names), a path that does not exist, a class count that does not
                agree, or a checkpoint of another architecture.
            RuntimeError: if weights could not be fetched or read.
        """
        name = str(name_or_path)
        path = Path(name).expanduser()
        hub_id: str | None = None
        if revision is not None:
            if path.exists() or checkpoint is not None or "/" not in name:
                raise ValueError(
                    f"`revision` is for a teacher that is named by its repository on the Hub, not {name}."
                )
            name = f"{name.partition('@')[0]}@{revision}"
        if checkpoint is not None:
            source = f"local-dir:{path}" if path.is_dir() else name
            model = _fetch(name, lambda: _timm_model(source, num_classes=num_classes, **options))
            _load_weights(model, Path(checkpoint).expanduser(), name, weights_only)
        elif path.is_file():
            if not _is_timm_folder(path.parent):
                raise ValueError(
                    f"The weights file {name} has no config.json beside it in which timm finds which network it "
                    "belongs to: give the architecture as the name and the file as `checkpoint`."
                )
            model = timm.create_model(f"local-dir:{path.parent}", **options)
            _load_weights(model, path, name, weights_only)
        elif path.is_dir():
            model, preprocessing = _from_folder(path, preprocessing, options)
        elif name.startswith(("hf-hub:", "hf_hub:", "local-dir:")):
            model = _fetch(name, lambda: timm.create_model(name, pretrained=True, **options))
            hub_id = None if name.startswith("local-dir:") else name.partition(":")[2]
        elif "/" in name or name.startswith("."):
            if name.startswith((".", "/", "~")) or name.count("/") > 1:
                raise ValueError(
                    f"The teacher {name} does not exist: give a folder, a weights file or a model's name."
                )
            model, preprocessing = _from_transformers(name, preprocessing, options)
            hub_id = name
        else:
            model = _fetch(name, lambda: _timm_model(name, pretrained=True, **options))
            hub_id = hub_id_of(model)
        found = num_classes_of(model)
        # timm drops a head of another size and goes on with a random one.
        trained = (getattr(model, "pretrained_cfg", None) or {}).get("num_classes")
        if checkpoint is None and trained and found is not None and trained != found:
            raise ValueError(
                f"The weights of {name} are for {trained} classes and the network has {found}, so its head would be "
                "untrained: leave the class count to the weights, and give `class_map` to use some of their classes."
            )
        if num_classes is not None and found is not None and found != num_classes:
            raise ValueError(
                f"The teacher {name} has {found} classes, not the {num_classes} asked for: give `class_map` to use "
                "some of them, or a `checkpoint` that was trained on yours."
            )
        repository, _, asked = (hub_id or "").partition("@")
        return cls(
            model, name=name, class_map=class_map, preprocessing=preprocessing, input_size=input_size,
            hub_id=repository or None, revision=cached_commit(repository, asked or "main") if repository else None,
        )  # fmt: skip

    @classmethod
    def wrap(cls, teacher: Any, **options: Any) -> Teacher:
        """A teacher from whatever a trainer accepts: a name, path, module, callable, Teacher, or a list of these.

        A list becomes an :class:`Ensemble`. The options are those of :meth:`from_pretrained`; only names take
        ``num_classes``, ``checkpoint``, ``revision`` and ``weights_only``, and a Teacher is built already and takes
        none.
        """
        options = {key: value for key, value in options.items() if value is not None}
        if isinstance(teacher, Teacher):
            if options:
                raise ValueError(
                    f"The teacher {teacher.name} is built already, so {', '.join(sorted(options))} cannot be applied "
                    "to it: give them where it is built."
                )
            return teacher
        if isinstance(teacher, (str, Path)):
            return cls.from_pretrained(teacher, **options)
        if isinstance(teacher, (list, tuple)):
            return Ensemble([cls.wrap(member, **options) for member in teacher])
        for_names = sorted(options.keys() & {"num_classes", "checkpoint", "weights_only", "revision"})
        if for_names:
            raise ValueError(
                f"{', '.join(for_names)} belong to a teacher given by name, not to a {type(teacher).__name__}: leave "
                "them out, or give a name."
            )
        return cls(teacher, **options)

    # ---- Using it --------------------------------------------------------------------------------------------------

    @property
    def num_classes(self) -> int | None:
        """How many logits it gives, after the class map; None if the network does not say."""
        return len(self.class_groups) if self.class_groups else self.own_num_classes

    @property
    def is_module(self) -> bool:
        """Whether it is a network, rather than a callable about which nothing is known."""
        return isinstance(self.model, nn.Module)

    @property
    def declares_preprocessing(self) -> bool:
        """Whether it says how its images are normalised."""
        return self.preprocessing is not None

    @property
    def num_parameters(self) -> int:
        """How many numbers it has learnt."""
        return sum(parameter.numel() for parameter in self.parameters())

    def match(self, num_classes: int | None, preprocessing: Preprocessing | None) -> None:
        """Prepare for a student's batches: check the class count and convert images from the student's preprocessing.

        Args:
            num_classes: of the student, None if unknown.
            preprocessing: of the student's images, None if unknown or if its inputs are no images.

        Raises:
            ValueError: if the class counts differ, or the preprocessing of one of two image networks is unknown.
        """
        if num_classes is not None and self.num_classes is not None and num_classes != self.num_classes:
            raise ValueError(
                f"The student has {num_classes} classes and the teacher {self.name} has {self.num_classes}: give "
                "`class_map` (config: teacher_class_map), with the teacher's class for each of the student's."
            )
        self.converter = None
        if not self.is_module or (self.preprocessing is None and preprocessing is None):
            return
        if self.preprocessing is None:
            raise ValueError(
                f"The teacher {self.name} does not say how its images are normalised, while the student's are: give "
                "Teacher(model, preprocessing=Preprocessing(mean, std, input_size)), with the student's own values if "
                "they are the same."
            )
        if preprocessing is None:
            raise ValueError(
                f"The teacher {self.name} wants images normalised by mean {self.preprocessing.mean} and std "
                f"{self.preprocessing.std}, and the student does not say how its images are: build it with "
                "create_student, or set its `pretrained_cfg` (mean, std, input_size), or give the trainer its image "
                "processor as `processing_class`."
            )
        self.converter = InputConverter(preprocessing, self.preprocessing)
        if preprocessing.input_size[1:] != self.preprocessing.input_size[1:]:
            logger.warning(
                "The student's images of %d x %d are resized to %d x %d for the teacher %s, as it declares: if it was "
                "trained at another size, give `input_size` (config: teacher_input_size).",
                *preprocessing.input_size[1:],
                *self.preprocessing.input_size[1:],
                self.name,
            )

    def place(
        self,
        device: torch.device,
        *,
        dtype: torch.dtype | None = None,
        compile: bool = False,
        sharded: bool = False,
        fold_batchnorm: bool = False,
        channels_last: bool | None = False,
        auto: bool = False,
    ) -> None:
        """Bring the network to where it will run, and say how.

        Args:
            device: of this process.
            dtype: of its weights; by default they are left as they are. Images are still converted in fp32.
            compile: run it through torch.compile, with the default backend.
            sharded: spread its weights over all processes (:func:`hf_kd.sharding.shard_teacher`) instead of having
                them whole on each.
            fold_batchnorm: run a copy with BatchNorm folded into the layers before (:mod:`hf_kd.folding`), made when
                the first batch comes. ``model`` keeps its own, and later changes to it are not seen.
            channels_last: give it images, and lay out its convolutions, as channels last; None leaves that to
                :meth:`choose_speed`.
            auto: leave it to :meth:`choose_speed` whether to fold and to take channels last, and whether to take
                ``dtype`` and ``compile``, the latter on an accelerator even if it is not given. Until then it runs
                with none of them.

        Raises:
            ValueError: if the teacher is a callable and anything but a device is asked for (or channels last, which
                are the same values), or if its weights are spread and are to be changed as well.
            RuntimeError: for ``sharded`` where torch.distributed is not running.
        """
        if not isinstance(self.model, nn.Module):
            if dtype is not None or compile or sharded or fold_batchnorm or auto:
                raise ValueError(
                    f"The teacher {self.name} is a function, of which neither type nor place can be changed "
                    "(teacher_dtype, teacher_compile, teacher_fsdp, teacher_fold_batchnorm, teacher_speed): do it "
                    "inside the function."
                )
            return
        if sharded:
            if fold_batchnorm or auto or channels_last is not False:
                raise ValueError(
                    f"The weights of the teacher {self.name} are spread over the processes (teacher_fsdp), which "
                    "takes them apart: leave out teacher_fold_batchnorm, teacher_speed and channels_last."
                )
            if dtype is not None:
                self.model.to(dtype)
            # Puts each process's share there; the whole would not fit.
            shard_teacher(self.model, device)
        else:
            self.to(device)
        layouts = (False, True) if channels_last is None or (auto and not channels_last) else (channels_last,)
        if auto:
            options = SpeedOptions(
                (True,) if fold_batchnorm else (False, True),
                layouts,
                (None,) if dtype is None else (None, dtype),
                (False, True) if compile or device.type != "cpu" else (False,),
            )
        else:
            options = SpeedOptions((fold_batchnorm,), layouts, (dtype,), (compile,))
        self.run_as(options.first)
        self._options = options

    def run_as(self, speed: Speed) -> None:
        """Run the network so from now on, whatever was left open; with BatchNorm folded from the next batch on."""
        assert isinstance(self.model, nn.Module)
        self.speed, self._options = speed, SpeedOptions()
        self._runs = () if speed.fold_batchnorm else (speed_up(self.model, speed),)

    @property
    def parts(self) -> list[Teacher]:
        """The single teachers that it consists of: itself, or an ensemble's members."""
        return [self]

    @property
    def speed_is_open(self) -> bool:
        """Whether :meth:`place` left open how the network runs, and nothing has been chosen yet."""
        return self._options.are_open

    def choose_speed(self, inputs: Mapping[str, Any]) -> Speed:
        """What runs the network fastest on a batch, of what :meth:`place` leaves open: measured, and not yet applied.

        Args:
            inputs: a batch as it will come, on the device. Run this under the autocast that will be used.
        """
        assert isinstance(self.model, nn.Module)
        with torch.no_grad():
            batch = self._batch((), dict(inputs))
        device = next((parameter.device for parameter in self.model.parameters()), torch.device("cpu"))
        return fastest(self.model, self._options, batch, device, self.name)

    def _apply(self, *args: Any, **kwargs: Any) -> Teacher:
        # Moved or turned into another type: so must be the folded copy, which is made anew.
        if self.speed.fold_batchnorm:
            self._runs = ()
        return super()._apply(*args, **kwargs)

    def train(self, mode: bool = True) -> Teacher:
        """Stays in eval mode, whatever is asked: a teacher's batch statistics and dropout are fixed."""
        return super().train(False)

    def forward(self, *args: Any, **inputs: Any) -> Tensor:
        """Logits (B, K) in at least fp32, with no graph behind them."""
        network = self._network(args, inputs)
        with torch.inference_mode():
            if not isinstance(network, nn.Module):
                logits = logits_of(network(*args, **inputs))
            else:
                logits = self._batch(args, inputs).logits(network, channels_last=self.speed.channels_last)
            if logits.dtype in (torch.float16, torch.bfloat16):
                logits = logits.float()
            if self.class_groups:
                logits = self._merge_classes(logits)
        # A tensor born in inference mode cannot be saved for a backward pass; its copy can.
        return logits.clone()

    def _network(self, args: tuple[Any, ...], inputs: dict[str, Any]) -> Callable[..., Any]:
        """What runs, made ready with the first batch where that needs one."""
        if not self._runs:
            assert isinstance(self.model, nn.Module)
            with torch.no_grad():
                batch = self._batch(args, inputs)
            self._runs = (speed_up(self.model, self.speed, batch),)
        return self._runs[0]

    def _batch(self, args: tuple[Any, ...], inputs: dict[str, Any]) -> Batch:
        """What the network takes of a batch, its images turned into what it wants."""
        if not args:
            args, inputs = self._signature.select(inputs)
        return Batch(args, inputs).map(self._converted)

    def _converted(self, value: Any) -> Any:
        if self.converter is None or not (
            isinstance(value, Tensor) and value.is_floating_point() and value.dim() == 4
        ):
            return value
        # In fp32 or better: half precision would round the images before they are renormalised and resized.
        return self.converter(value.to(torch.promote_types(value.dtype, torch.float32)))

    def _merge_classes(self, logits: Tensor) -> Tensor:
        assert self.class_groups is not None
        if all(len(group) == 1 for group in self.class_groups):
            return logits[..., [group[0] for group in self.class_groups]]
        merged = [torch.logsumexp(logits[..., group], dim=-1) for group in self.class_groups]
        return torch.stack(merged, dim=-1)


class Ensemble(Teacher):
    """Several teachers as one: the logarithm of the mean of their probabilities.

    Each member keeps its own preprocessing and class map.

    Raises:
        ValueError: for an empty list, or members of different class counts.
    """

    def __init__(self, members: Sequence[Teacher]) -> None:
        if not members:
            raise ValueError("An ensemble of teachers needs at least one teacher, got an empty list.")
        counts = {member.num_classes for member in members if member.num_classes is not None}
        if len(counts) > 1:
            raise ValueError(
                "The teachers of an ensemble must give the same classes, got "
                + ", ".join(f"{member.name}: {member.num_classes}" for member in members)
                + "."
            )
        super().__init__(
            nn.ModuleList(members),
            name=" + ".join(member.name for member in members),
            hub_id=_of_all([member.hub_id for member in members]),
            revision=_of_all([member.revision for member in members]),
        )
        self.own_num_classes = next(iter(counts), None)

    @property
    def members(self) -> list[Teacher]:
        """The teachers, in order."""
        return list(cast("Iterable[Teacher]", self.model))

    @property
    def declares_preprocessing(self) -> bool:
        return any(member.declares_preprocessing for member in self.members)

    def match(self, num_classes: int | None, preprocessing: Preprocessing | None) -> None:
        for member in self.members:
            member.match(num_classes, preprocessing)

    def place(self, device: torch.device, **options: Any) -> None:
        for member in self.members:
            member.place(device, **options)

    @property
    def parts(self) -> list[Teacher]:
        return [part for member in self.members for part in member.parts]

    def forward(self, *args: Any, **inputs: Any) -> Tensor:
        log_probs = torch.stack([F.log_softmax(member(*args, **inputs), dim=-1) for member in self.members])
        return torch.logsumexp(log_probs, dim=0) - math.log(len(self.members))


def _of_all(values: Sequence[str | None]) -> str | None:
    """What an ensemble's members have, joined as their names are; None if none has it."""
    return " + ".join(value or "" for value in values) if any(values) else None


def _default_name(model: Any) -> str:
    cfg = getattr(model, "pretrained_cfg", None) or {}
    if cfg.get("architecture"):
        # Not with its tag: timm sets the default one whether or not those weights were loaded.
        return cfg["architecture"]
    config_name: str = getattr(getattr(model, "config", None), "_name_or_path", "")
    return config_name or getattr(model, "__name__", type(model).__name__)


def _resized(preprocessing: Preprocessing | None, size: int | tuple[int, int], name: str) -> Preprocessing:
    if preprocessing is None:
        raise ValueError(
            f"`input_size` needs to know how the teacher {name} wants its images: give `preprocessing` too, with mean "
            "and std."
        )
    height, width = (size, size) if isinstance(size, int) else size
    return replace(preprocessing, input_size=(preprocessing.input_size[0], height, width))


def _class_groups(class_map: ClassMap | None) -> list[list[int]] | None:
    """One list of teacher classes for each student class, in order."""
    if class_map is None:
        return None
    if len(class_map) == 0:
        raise ValueError("`class_map` is empty: give the teacher's class, or classes, for each class of the student.")
    if isinstance(class_map, Mapping):
        # JSON and YAML turn number keys into strings.
        keys = {int(key) if str(key).isdecimal() else key: value for key, value in class_map.items()}
        if keys.keys() != set(range(len(class_map))):
            raise ValueError(
                f"`class_map` must have the student's classes 0 to {len(class_map) - 1} as its keys, got "
                f"{list(class_map)}."
            )
        class_map = [keys[key] for key in range(len(keys))]
    groups = []
    for number, entry in enumerate(class_map):
        group = [entry] if isinstance(entry, Integral) or not isinstance(entry, Iterable) else list(entry)
        if not group or not all(isinstance(member, Integral) and int(member) >= 0 for member in group):
            raise ValueError(
                f"`class_map` must give each student class one or more of the teacher's class numbers, got {entry!r} "
                f"for class {number}."
            )
        groups.append([int(member) for member in group])
    return groups


def cached_commit(repository: str, revision: str) -> str | None:
    """The commit of a repository that has been loaded, as the Hub's cache has it; None if it has none."""
    for file in ("config.json", "model.safetensors", "pytorch_model.bin"):
        path = try_to_load_from_cache(repository, file, revision=revision)
        if isinstance(path, str):
            # .../snapshots/COMMIT/file
            return Path(path).parent.name
    return None


def _timm_model(name: str, *, pretrained: bool = False, **options: Any) -> nn.Module:
    options = {key: value for key, value in options.items() if value is not None}
    if not name.startswith(("local-dir:", "hf-hub:", "hf_hub:")):
        architecture, _, tag = name.partition(".")
        if not timm.is_model(architecture):
            raise unknown_timm_name(name)
        tags = timm.list_pretrained(f"{architecture}.*")
        if tag and name not in tags:
            raise ValueError(
                f"timm has no weights {name!r}; for {architecture} there are {', '.join(tags) or 'none'}."
            )
        if pretrained and not tags:
            raise ValueError(
                f"timm has no weights for {architecture!r}, and an untrained network is no teacher: give `checkpoint`."
            )
    return timm.create_model(name, pretrained=pretrained, **options)


def _fetch(name: str, load: Callable[[], Any]) -> Any:
    try:
        return load()
    except ValueError as error:
        # Ours are sentences already; huggingface_hub's "not cached and offline" is a ValueError too.
        # A library's report of several lines is none of ours.
        if not isinstance(error, OSError) and "\n" not in str(error):
            raise
        raise _not_fetched(name, error) from error
    except Exception as error:
        raise _not_fetched(name, error) from error


def _not_fetched(name: str, error: Exception) -> RuntimeError:
    reason = first_line(error)
    module = _registered_by(name)
    if module is not None:
        return RuntimeError(
            f"timm does not know the network of {name} ({reason}): `import {module}` registers it: do that first."
        )
    hint = "Without a network, give a local folder, or a weights file as `checkpoint` (config: teacher_checkpoint)."
    if Path(name).expanduser().exists():
        hint = "The folder must be as timm, transformers or hf_kd saved it."
    return RuntimeError(f"The weights of {name} could not be loaded ({type(error).__name__}: {reason}). {hint}")


def _registered_by(name: str) -> str | None:
    """The module that registers the network of a folder or repository with timm, if it is missing."""
    repository, _, revision = name.partition(":")[2].partition("@")
    config: Any = Path(name.removeprefix("local-dir:")).expanduser() / "config.json"
    if name.startswith(("hf-hub:", "hf_hub:")):
        config = try_to_load_from_cache(repository, "config.json", revision=revision or None)
    if not isinstance(config, (str, Path)) or not Path(config).is_file():
        return None
    values = json.loads(Path(config).read_text(encoding="utf-8"))
    return None if timm.is_model(values.get("architecture", "")) else values.get("registered_by")


def _from_folder(
    path: Path, preprocessing: Preprocessing | None, options: dict[str, Any]
) -> tuple[nn.Module, Preprocessing | None]:
    config = path / "config.json"
    if not config.is_file():
        raise ValueError(
            f"The teacher folder {path} holds no config.json: give a folder saved by timm, transformers or hf_kd, or "
            "an architecture with `checkpoint`."
        )
    if _is_timm_folder(path):
        return _fetch(
            str(path), lambda: timm.create_model(f"local-dir:{path}", pretrained=True, **options)
        ), preprocessing
    return _from_transformers(str(path), preprocessing, options)


def _is_timm_folder(path: Path) -> bool:
    config = path / "config.json"
    if not config.is_file():
        return False
    try:
        values = json.loads(config.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"The teacher's {config} is no JSON ({error}): the folder is damaged.") from error
    if "architecture" not in values:
        return False
    # A wrapped timm network as transformers itself saves it opens in transformers alone.
    by_transformers = values.get("model_type") == "timm_wrapper"
    return not by_transformers or (bool(values.get("pretrained_cfg")) and values.get("model_args", {}) is not None)


def _from_transformers(
    name: str, preprocessing: Preprocessing | None, options: dict[str, Any]
) -> tuple[nn.Module, Preprocessing | None]:
    name, _, revision = name.partition("@") if not Path(name).exists() else (name, "", "")
    if options:
        raise ValueError(
            f"{', '.join(sorted(options))} are arguments of timm.create_model, and {name} is opened by transformers: "
            "leave them out."
        )
    model, loaded = _fetch(
        name,
        lambda: AutoModelForImageClassification.from_pretrained(
            name, revision=revision or "main", output_loading_info=True
        ),
    )
    if loaded["missing_keys"]:
        raise ValueError(
            f"The weights of {name} lack {len(loaded['missing_keys'])} tensors of its {type(model).__name__} (such as "
            f"{min(loaded['missing_keys'])}), which would be untrained: give a network trained to classify."
        )
    preprocessing = preprocessing or Preprocessing.of(model)
    if preprocessing is None:
        try:
            preprocessing = Preprocessing.from_image_processor(
                AutoImageProcessor.from_pretrained(name, revision=revision or "main")
            )
        except (OSError, ValueError) as error:
            logger.info("No image processor beside the teacher %s: %s", name, error)
    return model, preprocessing


def _load_weights(model: nn.Module, path: Path, name: str, weights_only: bool) -> None:
    """Strictly, from safetensors or a ``.pth`` that holds nothing but tensors."""
    if not path.is_file():
        raise ValueError(f"The teacher's checkpoint {path} does not exist or is no file.")
    try:
        if path.stat().st_size == 0:
            raise ValueError("the file is empty")
        state_dict = load_state_dict(str(path), weights_only=weights_only)
    except Exception as error:
        reason = first_line(error)
        # A damaged file is not one that needs code: running it would mend nothing.
        opt_in = (
            " If you wrote the file yourself, weights_only=False (config: teacher_weights_only) runs the code in it."
            if isinstance(error, pickle.UnpicklingError)
            else ""
        )
        raise RuntimeError(
            f"The teacher's checkpoint {path} could not be read as plain weights ({reason}): give a safetensors file, "
            f"or a .pth with a state dict and nothing that needs code to run.{opt_in}"
        ) from error
    expected = model.state_dict()
    missing, unexpected, differing = misfits(expected, state_dict)
    shapes = [f"{key} {tuple(state_dict[key].shape)} for {tuple(expected[key].shape)}" for key in differing]
    if missing or unexpected or shapes:
        found = [
            f"{len(keys)} {what} (such as {min(keys)})"
            for what, keys in (("missing", missing), ("unexpected", unexpected), ("of another shape", shapes))
            if keys
        ]
        raise ValueError(
            f"The checkpoint {path} does not fit {name}: of its tensors {', '.join(found)}. It belongs to another "
            "architecture, or `num_classes` is wrong."
        )
    model.load_state_dict(state_dict)
