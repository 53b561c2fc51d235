"""Students and teachers that are spread over two processes by FSDP2, against whole ones.

Accelerate switches FSDP on for groups of GPUs alone. Here its own code runs on the CPU, with the settings of the
launch file: a group of processes that finds each other over gloo is declared to be one of GPUs.
"""

import copy
import os
from functools import partial
from pathlib import Path

import pytest
import timm
import torch
from accelerate.utils import DistributedType
from accelerate.utils.launch import prepare_multi_gpu_env
from launch_files import read
from processes import run_processes
from safetensors.torch import load_file
from tiny import ConvNet, Images, config, networks, vit
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from transformers import ViTConfig, ViTForImageClassification

from hf_kd import DistillationTrainer, Teacher, create_student
from hf_kd.sharding import shard_teacher
from hf_kd.student import load_student_weights


TINY = {"channels": [8, 16, 16, 32], "stem_width": 8}


def launch_variables(*options):
    """What `accelerate launch` tells the processes of the launch file."""
    args, _, _ = read("fsdp2", *options)
    variables = prepare_multi_gpu_env(args)
    return {name: value for name, value in variables.items() if name.startswith(("FSDP_", "ACCELERATE_USE_FSDP"))}


NETWORKS = {
    "module": lambda: (ConvNet(norm=False), 8),
    "timm": lambda: (timm.create_model("resnet10t", num_classes=5, **TINY), 32),
    "timm in transformers": lambda: (create_student("resnet10t", num_classes=5, img_size=32, **TINY), 32),
    "transformers": lambda: (vit(), 32),
}


def make(network, seed=1):
    torch.manual_seed(seed)
    return NETWORKS[network]()


class Recording(DistillationTrainer):
    """Keeps the gradient norms, and how many of a student's values this process holds in training."""

    def _get_grad_norm(self, *args, **kwargs):
        norm = super()._get_grad_norm(*args, **kwargs)
        assert not isinstance(norm, DTensor)
        self.norms = [*getattr(self, "norms", []), float(norm)]
        self.held = sum(held(p).numel() for p in self.model.parameters())
        return norm


def held(tensor):
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def build(folder, network, variables=None, *, data=None, seed=1, spread_teacher=False, **options):
    """A trainer whose student is spread if there are a launcher's variables for it."""
    student, size = make(network, seed)
    # Of the same family: not all say how their images are to be normalised.
    teacher = networks()[1] if network == "module" else make(network, seed=0)[0]
    defaults = {"per_device_train_batch_size": 4, "max_grad_norm": 1.0, "teacher_fsdp": spread_teacher}
    args = config(folder, **{**defaults, **options})
    for name in [name for name in os.environ if name.startswith(("FSDP_", "ACCELERATE_USE_FSDP"))]:
        del os.environ[name]
    if variables:
        os.environ.update(variables)
        # Of Accelerate's kinds of groups, one that it spreads students over.
        args.distributed_state.distributed_type = DistributedType.MULTI_GPU
    data = Images(count=21, size=size) if data is None else data
    trainer = Recording(student, teacher, args, train_dataset=data, eval_dataset=Images(count=11, size=size, seed=3))
    assert trainer.accelerator.is_fsdp2 is bool(variables)
    return trainer


def run(rank, folder, network, variables=None, *, resume=None, **options):
    """Training, evaluation and saving, and all that came of it."""
    trainer = build(folder, network, variables, **options)
    frozen = copy.deepcopy(trainer.teacher.state_dict()) if not options.get("spread_teacher") else {}
    begin = [p.detach().clone() for p in trainer.model.parameters()]
    trainer.train(resume_from_checkpoint=resume)
    end = [(p.full_tensor() if isinstance(p, DTensor) else p).detach() for p in trainer.model.parameters()]
    metrics = trainer.evaluate()
    trainer.save_model(str(folder / "final"))
    trainer.accelerator.wait_for_everyone()
    for key, value in trainer.teacher.state_dict().items() if frozen else ():
        assert not isinstance(value, DTensor) and torch.equal(value, frozen[key])
    return {
        "weights": load_file(folder / "final" / "model.safetensors"),
        "losses": [entry["loss"] for entry in trainer.state.log_history if "loss" in entry],
        "norms": trainer.norms,
        "metrics": {key: metrics[key] for key in ("eval_loss", "eval_top1", "eval_entropy")},
        "moved": max(float((one - other).abs().max()) for one, other in zip(begin, end, strict=True)),
        "spread": isinstance(trainer.model, FSDPModule),
        "share": trainer.held / sum(p.numel() for p in trainer.model.parameters()),
        "best": trainer.state.best_model_checkpoint,
    }


def spread_and_whole(rank, folder, network, variables, **options):
    """The same run with a spread and with a whole student."""
    return (
        run(rank, folder / "spread", network, variables, **options),
        run(rank, folder / "whole", network, **options),
    )


def assert_equal(weights, expected, atol=1e-6):
    assert weights.keys() == expected.keys()
    for key, value in expected.items():
        torch.testing.assert_close(weights[key], value, rtol=0, atol=atol)


# ---- The student ---------------------------------------------------------------------------------------------------

OPTIONS = {
    "uneven last batch": {"num_train_epochs": 2},
    "accumulation": {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2},
    "AdamW": {"optim": "adamw_torch", "learning_rate": 1e-3, "decay_all_parameters": True, "weight_decay": 0.1},
    # Few steps: two weights that differ by a rounding may be rounded to different neighbours in bf16.
    "bf16": {"bf16": True, "max_steps": 2},
}


@pytest.mark.parametrize(
    ("network", "options"),
    [
        *[(network, "uneven last batch") for network in NETWORKS],
        ("module", "accumulation"),
        ("timm in transformers", "AdamW"),
        ("timm in transformers", "bf16"),
    ],
)
def test_a_spread_student_is_the_whole_one(network, options, tmp_path):
    both = run_processes(partial(spread_and_whole, **OPTIONS[options]), 2, tmp_path, network, launch_variables())
    for spread, whole in both:
        assert spread["spread"] and not whole["spread"]
        assert 0.4 < spread["share"] < 0.6 and whole["share"] == 1
        # Adam divides by the gradient's size, so that the rounding of a small one counts as much as of a large one.
        assert_equal(spread["weights"], whole["weights"], atol=1e-5 if options == "AdamW" else 1e-6)
        assert spread["losses"] == pytest.approx(whole["losses"], rel=1e-6)
        assert spread["norms"] == pytest.approx(whole["norms"], rel=1e-5)
        assert spread["metrics"] == pytest.approx(whole["metrics"], rel=1e-6)
    assert both[0][0]["moved"] > 1e-3
    assert {value.dtype for value in both[0][0]["weights"].values()} <= {torch.float32, torch.int64}


def test_a_spread_student_is_that_of_one_process(tmp_path):
    alone = run(0, tmp_path / "alone", "module", per_device_train_batch_size=8)
    for spread in run_processes(run, 2, tmp_path / "spread", "module", launch_variables()):
        assert_equal(spread["weights"], alone["weights"])
        assert spread["metrics"] == pytest.approx(alone["metrics"], rel=1e-6)


@pytest.mark.parametrize(("network", "block"), [("timm in transformers", "BasicBlock"), ("transformers", "ViTLayer")])
def test_block_by_block(network, block, tmp_path):
    """What the launch file says of students that are to be gathered piece by piece."""
    variables = launch_variables(
        "--fsdp_auto_wrap_policy", "TRANSFORMER_BASED_WRAP", "--fsdp_transformer_layer_cls_to_wrap", block
    )
    for spread, whole in run_processes(spread_and_whole, 2, tmp_path, network, variables):
        assert_equal(spread["weights"], whole["weights"])


def own_beginnings(rank, folder, variables):
    return spread_and_whole(rank, folder, "timm in transformers", variables, seed=rank)


def test_students_that_begin_differently_take_the_first_ones_weights(tmp_path):
    for spread, whole in run_processes(own_beginnings, 2, tmp_path, launch_variables()):
        assert_equal(spread["weights"], whole["weights"])


def stopped_and_resumed(rank, folder, variables):
    saving = {"save_strategy": "steps", "save_steps": 2, "num_train_epochs": 2, "momentum": 0.9}
    whole = run(rank, folder, "timm in transformers", variables, **saving)
    names = sorted(path.name for path in (folder / "checkpoint-2").iterdir())
    resumed = run(rank, folder, "timm in transformers", variables, resume=str(folder / "checkpoint-2"), **saving)
    return whole, resumed, names


def test_resuming(tmp_path):
    for whole, resumed, names in run_processes(stopped_and_resumed, 2, tmp_path, launch_variables()):
        for key, value in whole["weights"].items():
            assert torch.equal(resumed["weights"][key], value)
        assert resumed["losses"] == whole["losses"] and len(whole["losses"]) == 6
        assert {"model.safetensors", "pytorch_model_fsdp.bin", "optimizer.bin", "complete.json"} <= set(names)


def best(rank, folder, variables):
    options = {
        "save_strategy": "steps", "save_steps": 1, "eval_strategy": "steps", "eval_steps": 1,
        "load_best_model_at_end": True, "metric_for_best_model": "eval_loss", "greater_is_better": True,
    }  # fmt: skip
    result = run(rank, folder, "module", variables, **options)
    return result, load_file(Path(result["best"]) / "model.safetensors")


def test_the_best_student_is_loaded(tmp_path):
    """The worst, rather, which is not the last one."""
    for result, expected in run_processes(best, 2, tmp_path, launch_variables()):
        assert Path(result["best"]).name == "checkpoint-1"
        assert_equal(result["weights"], expected, atol=0)


def with_another_engine(rank, folder, variables):
    saving = {"save_strategy": "epoch"}
    messages = []
    for name, engine, other in (("spread", variables, None), ("whole", None, variables)):
        run(rank, folder / name, "module", engine, **saving)
        trainer = build(folder / name, "module", other, **saving)
        with pytest.raises(ValueError, match="was written") as raised:
            trainer.train(resume_from_checkpoint=True)
        messages.append(str(raised.value).replace(str(folder), "."))
    return messages


def test_a_checkpoint_of_another_engine(tmp_path):
    advice = (
        "which keep the optimiser's state in different forms: go on with the launch configuration that it was begun "
        "with, or begin a new run from its weights (hf_kd.student.load_student_weights)."
    )
    expected = [
        "The checkpoint ./spread/checkpoint-3 was written with FSDP and this run trains without FSDP or DeepSpeed, "
        + advice,
        "The checkpoint ./whole/checkpoint-3 was written without FSDP or DeepSpeed and this run trains with FSDP, "
        + advice,
    ]
    assert run_processes(with_another_engine, 2, tmp_path, launch_variables()) == [expected, expected]


def saving_everywhere(rank, folder, variables):
    with pytest.raises(ValueError, match="save_on_each_node=True does not go with FSDP"):
        build(folder, "module", variables, save_on_each_node=True)


def test_a_machine_without_the_student_does_not_save_it(tmp_path):
    run_processes(saving_everywhere, 2, tmp_path, launch_variables())


# ---- Evaluation ----------------------------------------------------------------------------------------------------


def evaluate_all_along(rank, folder, variables):
    """Metrics before training, after it, and of the student that was saved, by itself."""
    trainer = build(folder, "timm in transformers", variables)
    early = [trainer.evaluate() for _ in range(2)]
    trainer.train()
    late = trainer.evaluate()
    trainer.save_model(str(folder / "final"))
    trainer.accelerator.wait_for_everyone()
    weights = load_file(folder / "final" / "model.safetensors")
    names = ("eval_loss", "eval_entropy")
    return [[metrics[name] for name in names] for metrics in (*early, late)], weights


@pytest.mark.parametrize("variables", [None, launch_variables()], ids=["DDP", "FSDP"])
def test_what_is_evaluated_is_what_is_saved(variables, tmp_path):
    """BatchNorm's statistics differ between processes: all evaluate those that are saved."""
    results = run_processes(evaluate_all_along, 2, tmp_path, variables)
    student, _ = make("timm in transformers")
    alone = DistillationTrainer(
        student, None, config(tmp_path, loss="ce"), eval_dataset=Images(count=11, size=32, seed=3)
    )
    untrained = alone.evaluate()
    load_student_weights(student, tmp_path / "final")
    trained = alone.evaluate()
    expected = [
        [metrics[name] for name in ("eval_loss", "eval_entropy")] for metrics in (untrained, untrained, trained)
    ]
    for metrics, weights in results:
        for values, wanted in zip(metrics, expected, strict=True):
            assert values == pytest.approx(wanted, rel=1e-5)
        # Evaluating beforehand changed nothing of the training.
        assert_equal(weights, results[0][1], atol=0)
    assert abs(expected[0][0] - expected[2][0]) > 0.001


# ---- What is not finite --------------------------------------------------------------------------------------------


class Spoilt(Images):
    """One sample is not a number, and comes up in the second step."""

    def __init__(self, index=9):
        super().__init__(count=24)
        self.pixel_values[index] = float("nan")


def skip_a_step(rank, folder, variables):
    trainer = build(folder, "module", variables, data=Spoilt(), on_nonfinite="skip",
                    train_sampling_strategy="sequential")  # fmt: skip
    trainer.train()
    weights = trainer.accelerator.get_state_dict(trainer.model)
    finite = all(bool(torch.isfinite(held(p)).all()) for p in trainer.model.parameters())
    last = next(entry for entry in reversed(trainer.state.log_history) if "loss" in entry)
    return finite, last["skipped_steps"], weights


def test_a_step_that_is_not_finite_is_skipped_by_all(tmp_path):
    spread = run_processes(skip_a_step, 2, tmp_path / "spread", launch_variables())
    whole = run_processes(skip_a_step, 2, tmp_path / "whole", None)
    assert [result[:2] for result in spread] == [(True, 1)] * 2
    assert_equal(spread[0][2], {key: value.detach() for key, value in whole[0][2].items()})


def find_later(rank, folder, variables):
    """As on a GPU, where what is not finite is found at the next log."""
    trainer = build(folder, "module", variables, data=Spoilt(), train_sampling_strategy="sequential")
    trainer._guard.deferred = True
    with pytest.raises(RuntimeError, match="not finite") as raised:
        trainer.train()
    return str(raised.value)


def test_a_gradient_that_is_not_finite_is_found_later_too(tmp_path):
    """Of the second step's samples 8 to 15 the first process has 8 to 11, among them the one at fault."""
    first, second = run_processes(find_later, 2, tmp_path, launch_variables())
    assert "The loss is not finite at step 2" in first and "9" in first
    assert "The gradient is not finite at step 2 (component: gradient" in second


# ---- The teacher ---------------------------------------------------------------------------------------------------


def two_layers():
    settings = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 32}
    return ViTForImageClassification(ViTConfig(image_size=32, patch_size=8, num_labels=5, **settings))


TEACHERS = {
    "module": lambda: networks()[1],
    "resnet": lambda: timm.create_model("resnet10t", num_classes=5, **TINY),
    "vit": lambda: timm.create_model("vit_tiny_patch16_224", num_classes=5, img_size=32, embed_dim=48, depth=4),
    "convnext": lambda: timm.create_model("convnext_atto", num_classes=5, dims=(8, 16, 32, 64)),
    "regnet": lambda: timm.create_model("regnety_002", num_classes=5),
    "timm in transformers": lambda: create_student("resnet10t", num_classes=5, img_size=32, **TINY),
    "transformers": two_layers,
}
BLOCKS = {
    "module": 0,
    "resnet": 5,
    "vit": 4,
    "convnext": 13,
    "regnet": 22,
    "timm in transformers": 5,
    "transformers": 3,
}


def spread_teacher(rank, name):
    """A whole and a spread teacher's logits, and what a process holds of the latter, at rest and at work."""
    config("unused")
    torch.manual_seed(0)
    network = TEACHERS[name]().eval()
    images = torch.randn(
        3, 3, *((8, 8) if name == "module" else (32, 32)), generator=torch.Generator().manual_seed(rank)
    )
    preprocessing = Teacher(copy.deepcopy(network)).preprocessing
    expected = Teacher(copy.deepcopy(network))(images)
    total = sum(p.numel() for p in network.parameters())
    shard_teacher(network, torch.device("cpu"))
    assert all(isinstance(p, DTensor) and not p.requires_grad for p in network.parameters())
    blocks = [module for module in network.modules() if isinstance(module, FSDPModule)]
    most = [0]

    def whole(*_):
        most[0] = max(most[0], sum(p.numel() for p in network.parameters() if not isinstance(p, DTensor)))

    for module in network.modules():
        module.register_forward_pre_hook(whole)
    teacher = Teacher(network, preprocessing=preprocessing)
    differences = [(teacher(images) - expected).abs().max().item() for _ in range(2)]
    with torch.no_grad():
        # A pass outside inference mode, as for features, does not disturb and is not disturbed.
        network(images)
    differences.append((teacher(images) - expected).abs().max().item())
    return {
        "differences": differences,
        "at rest": sum(p.to_local().numel() for p in network.parameters()) / total,
        "at work": most[0] / total,
        "blocks": len(blocks) - 1,
    }


@pytest.mark.parametrize("name", TEACHERS)
def test_a_spread_teacher_gives_the_same_logits(name):
    results = run_processes(spread_teacher, 2, name)
    for result in results:
        assert max(result["differences"]) <= 1e-6
        assert 0.4 < result["at rest"] < 0.6
        assert result["blocks"] == BLOCKS[name]
    if BLOCKS[name]:
        assert max(result["at work"] for result in results) < 0.8
    assert sum(result["at rest"] for result in results) == pytest.approx(1)


def test_a_group_of_one():
    """One process with a launcher has the whole teacher, and the same code."""
    (result,) = run_processes(spread_teacher, 1, "vit")
    assert max(result["differences"]) <= 1e-6 and result["at rest"] == 1


def test_without_a_group():
    with pytest.raises(RuntimeError) as raised:
        shard_teacher(ConvNet(), torch.device("cpu"))
    assert str(raised.value) == (
        "A teacher is spread over the processes of a launch (teacher_fsdp), and torch.distributed is not running: "
        "start the script with `accelerate launch` or torchrun, or leave teacher_fsdp out."
    )


@pytest.mark.parametrize("variables", [None, launch_variables()], ids=["DDP", "FSDP"])
def test_training_with_a_spread_teacher(variables, tmp_path):
    spread = run_processes(
        partial(run, spread_teacher=True), 2, tmp_path / "spread", "timm in transformers", variables
    )
    whole = run_processes(run, 2, tmp_path / "whole", "timm in transformers", variables)
    for one, other in zip(spread, whole, strict=True):
        assert_equal(one["weights"], other["weights"])
        assert one["losses"] == pytest.approx(other["losses"], rel=1e-6)
