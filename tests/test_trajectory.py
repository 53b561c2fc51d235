"""DistillationTrainer follows recorded training runs of the official code, step by step."""

import json
import math
from pathlib import Path

import pytest
import timm
import torch
from tiny import config
from torch.utils.data import Dataset

import hf_kd  # noqa: F401
from hf_kd import DistillationTrainer
from hf_kd.losses import dist_loss, wttm_loss


DATA = json.loads((Path(__file__).parent / "data_files" / "trajectory_wttm.json").read_text(encoding="utf-8"))
RUNS = {run["id"]: run for run in DATA["runs"]}
BATCH, STEPS = DATA["batch_size"], DATA["steps"]


def weight(key, rank, value, gains):
    """An initial weight by the file's formula, in float64."""
    i = torch.arange(value.numel(), dtype=torch.int64)
    q = (31 * i * i + 7919 * i + 104729 * rank + 1009) % 10007
    r = (2 * q.to(torch.float64) / 10007 - 1).view(value.shape)
    if key.endswith("running_mean") or key.endswith("bias"):
        return 0.1 * r
    if key.endswith("running_var"):
        return 1 + 0.5 * r * r
    if key.endswith("num_batches_tracked"):
        return torch.zeros_like(value)
    if value.ndim == 1:
        return gains["bn_weight_base"] + 0.1 * r
    gain = gains["linear_gain"] if value.ndim == 2 else gains["conv_gain"]
    return r * math.sqrt(3 * gain / value[0].numel())


def network(name, gains, dtype):
    model = timm.create_model(f"cifar_{name}", num_classes=DATA["num_classes"]).double()
    state = model.state_dict()
    model.load_state_dict({key: weight(key, rank, state[key], gains) for rank, key in enumerate(sorted(state))})
    return model.to(dtype)


def images(numbers, dtype):
    m = torch.tensor(list(numbers), dtype=torch.float64)[:, None]
    j = torch.arange(3 * 32 * 32, dtype=torch.float64)
    return torch.sin(0.01 * (1 + 0.05 * m) * j + 0.1 * m + 0.3).view(-1, 3, 32, 32).to(dtype)


class Batches(Dataset):
    def __init__(self, dtype):
        self.pixel_values = images(range(STEPS * BATCH), dtype)

    def __len__(self):
        return STEPS * BATCH

    def __getitem__(self, m):
        return {"pixel_values": self.pixel_values[m], "labels": (7 * m + m // BATCH) % 10}


class Recording(DistillationTrainer):
    def compute_loss(self, *args, **kwargs):
        loss = super().compute_loss(*args, **kwargs)
        self.losses.append(float(loss.detach()))
        return loss


def follow(run, folder, dtype):
    """The losses of the steps, and the logits of the student at the end."""
    settings = RUNS[run]["settings"]
    options, own = {"loss": settings["distill"]}, None
    if settings["distill"] == "kd":
        options.update(temperature=settings["kd_T"], ce_weight=settings["weight_cls_gamma"])
        options.update(beta=settings["weight_div_alpha"])
    elif settings["distill"] == "dist":
        beta, gamma, tau = settings["dist_beta_gamma_tau"]

        def own(student_logits, teacher_logits):
            additional = wttm_loss(student_logits, teacher_logits, gamma=settings["ttm_l"])
            dist = dist_loss(student_logits, teacher_logits, beta=beta, gamma=gamma, temperature=tau)
            return settings["weight_div_alpha"] * additional + settings["weight_kd_beta"] * dist

        options = {"loss": "wttm", "beta": 1.0}
    else:
        options.update(gamma=settings["ttm_l"], beta=settings["weight_kd_beta"])
    trainer = Recording(
        network(DATA["student"], DATA["student_gains"], dtype),
        network(DATA["teacher"], DATA["teacher_gains"], dtype),
        config(
            folder,
            learning_rate=settings["learning_rate"],
            weight_decay=DATA["optimizer"]["weight_decay"],
            momentum=DATA["optimizer"]["momentum"],
            decay_all_parameters=True,
            per_device_train_batch_size=BATCH,
            train_sampling_strategy="sequential",
            **options,
        ),
        distillation_loss=own,
        train_dataset=Batches(dtype),
    )
    trainer.losses = []
    trainer.train()
    with torch.no_grad():
        logits = trainer.model.eval()(images(range(25 * BATCH, 25 * BATCH + 4), dtype))
    return torch.tensor(trainer.losses, dtype=torch.float64), logits, trainer


def recorded(run, key):
    return torch.tensor(RUNS[run][key], dtype=torch.float64)


def test_the_teacher_is_the_recorded_one():
    teacher = network(DATA["teacher"], DATA["teacher_gains"], torch.float64).eval()
    with torch.no_grad():
        logits = teacher(images(range(BATCH), torch.float64))
    torch.testing.assert_close(
        logits, torch.tensor(DATA["teacher_logits_step0"], dtype=torch.float64), rtol=1e-9, atol=1e-9
    )


@pytest.mark.parametrize("run", RUNS)
def test_every_step_of_a_recorded_run_in_fp64(run, tmp_path):
    losses, logits, trainer = follow(run, tmp_path, torch.float64)
    # Rounding at 1e-15 grows by the recorded factors; a wrong factor would show in the second step.
    growth = max(RUNS[run]["conditioning"][key] for key in RUNS[run]["conditioning"] if key.endswith("init_change"))
    tolerance = max(1e-9, 1e-13 * growth)
    assert len(losses) == STEPS
    torch.testing.assert_close(losses, recorded(run, "total_loss"), rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(logits, recorded(run, "final_logits_eval"), rtol=tolerance, atol=10 * tolerance)
    state = trainer.model.state_dict()
    for key, total in RUNS[run]["final_state_sums"].items():
        assert float(state[key].sum()) == pytest.approx(total, rel=max(1e-8, tolerance), abs=1e-8), key
    assert int(state["bn1.num_batches_tracked"]) == RUNS[run]["final_num_batches_tracked"]


@pytest.mark.parametrize("run", [name for name in RUNS if name.endswith("low_lr")])
def test_every_step_of_a_recorded_run_in_fp32(run, tmp_path):
    losses, logits, _ = follow(run, tmp_path, torch.float32)
    drift = torch.tensor(RUNS[run]["conditioning"]["float32_relative_loss_difference_per_step"], dtype=torch.float64)
    allowed = 5 * drift.cummax(dim=0).values + 2e-6
    relative = (losses - recorded(run, "total_loss")).abs() / recorded(run, "total_loss").abs()
    assert (relative <= allowed).all(), (relative, allowed)
    drift = RUNS[run]["conditioning"]["float32_final_logit_max_abs_difference"]
    assert (logits - recorded(run, "final_logits_eval")).abs().max() <= 5 * drift + 1e-5
