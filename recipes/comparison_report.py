"""What a comparison shows at the end: a table, and pictures of what was reached and of how."""

from __future__ import annotations

import json
import math
import statistics
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib
import timm
import torch
from comparison import Comparison

from hf_kd.files import write_text
from hf_kd.model_card import describe_machine


matplotlib.use("Agg")
from matplotlib import pyplot as plt


TITLES = {
    "ce": "CE",
    "kd": "KD",
    "dist": "DIST",
    "dkd": "DKD",
    "nkd": "NKD",
    "ttm": "TTM",
    "wttm": "WTTM",
    "wttm_no_labels": "WTTM, no labels",
    "crd": "CRD",
    "itrd": "ITRD",
    "wttm_crd": "WTTM + CRD",
    "wttm_itrd": "WTTM + ITRD",
}
# A palette that stays apart in grey and for colour-blind readers (Okabe and Ito); methods that share a colour have
# another line.
COLOURS = {
    "ce": "#777777",
    "kd": "#E69F00",
    "dist": "#CC79A7",
    "dkd": "#D55E00",
    "nkd": "#F0E442",
    "ttm": "#009E73",
    "wttm": "#0072B2",
    "wttm_no_labels": "#56B4E9",
    "crd": "#000000",
    "itrd": "#994F00",
    "wttm_crd": "#0072B2",
    "wttm_itrd": "#0072B2",
}
LINES = {"wttm_crd": "--", "wttm_itrd": ":"}


# ---- Numbers -------------------------------------------------------------------------------------------------------


def latency_ms(network: torch.nn.Module, example: torch.Tensor, repeats: int = 100) -> float:
    """Median milliseconds of one image on the CPU."""
    network, example = network.to("cpu").eval(), example.to("cpu")
    times = []
    with torch.inference_mode():
        for _ in range(repeats + 10):
            start = time.perf_counter()
            network(example)
            times.append(1000 * (time.perf_counter() - start))
    return statistics.median(times[10:])


def size_of(network: torch.nn.Module) -> tuple[int, float]:
    """Parameters, and megabytes of the weights on disk."""
    megabytes = sum(tensor.numel() * tensor.element_size() for tensor in network.state_dict().values()) / 1e6
    return sum(p.numel() for p in network.parameters()), megabytes


def spread(values: list[float], scale: float = 1.0, digits: int = 1) -> str:
    """Mean ± standard deviation over seeds (the mean alone if there is one seed)."""
    mean = f"{scale * statistics.mean(values):.{digits}f}"
    return f"{mean} ± {scale * statistics.stdev(values):.{digits}f}" if len(values) > 1 else mean


def table_of(results: Mapping[str, Any]) -> str:
    """The comparison as a Markdown table."""
    header = ["", "top-1 (%)", "NLL", "calibration error", "entropy of q", "agrees with teacher (%)",
              "parameters", "MB", "ms/image"]  # fmt: skip
    teacher = results["teacher"]
    rows = [[
        f"teacher ({teacher['name']})", f"{100 * teacher['top1']:.1f}", f"{teacher['nll']:.3f}",
        f"{teacher['ece']:.3f}", f"{teacher['entropy']:.3f}", "", f"{teacher['parameters']:,}",
        f"{teacher['megabytes']:.2f}", f"{teacher['latency_ms']:.2f}",
    ]]  # fmt: skip
    student = results["student"]
    for name, runs in results["runs"].items():
        values = {key: [run["test"][key] for run in runs] for key in runs[0]["test"]}
        rows.append([
            TITLES.get(name, name), spread(values["top1"], 100), spread(values["nll"], digits=3),
            spread(values["ece"], digits=3), spread(values["entropy"], digits=3),
            spread(values["teacher_agreement"], 100), f"{student['parameters']:,}", f"{student['megabytes']:.2f}",
            f"{student['latency_ms']:.2f}",
        ])  # fmt: skip
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
    lines = [[cell.ljust(width) for cell, width in zip(row, widths, strict=True)] for row in [header, *rows]]
    lines.insert(1, ["-" * width for width in widths])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


# ---- Pictures ------------------------------------------------------------------------------------------------------


def draw_curves(results: Mapping[str, Any], path: Path) -> None:
    """Validation top-1 and the mean entropy of q over training (the paper's Fig. 1), mean and spread over seeds."""
    figure, axes = plt.subplots(1, 2, figsize=(10, 3.8), constrained_layout=True)
    for axis, key, title, scale in (
        (axes[0], "top1", "Top-1 on the validation images (%)", 100.0),
        (axes[1], "entropy", "Mean entropy H(q) on the validation images (nats)", 1.0),
    ):
        for name, runs in results["runs"].items():
            epochs = [point["step"] / results["steps_per_epoch"] for point in runs[0]["curve"]]
            values = torch.tensor([[scale * point[key] for point in run["curve"]] for run in runs])
            mean, colour = values.mean(dim=0), COLOURS.get(name)
            axis.plot(epochs, mean, color=colour, label=TITLES.get(name, name), linestyle=LINES.get(name, "-"),
                      marker="o", markersize=3)  # fmt: skip
            if len(runs) > 1:
                deviation = values.std(dim=0)
                axis.fill_between(epochs, mean - deviation, mean + deviation, color=colour, alpha=0.15, linewidth=0)
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("Epoch (passes over all training images)")
        axis.grid(alpha=0.3)
    axes[0].legend(fontsize=8, loc="lower right")
    figure.savefig(path, dpi=150)
    plt.close(figure)


def draw_methods(results: Mapping[str, Any], path: Path) -> None:
    """Test top-1 of each method: every seed a dot, the mean a line."""
    runs = results["runs"]
    figure, axis = plt.subplots(figsize=(8, 1.2 + 0.32 * len(runs)), constrained_layout=True)
    for row, (name, finished) in enumerate(runs.items()):
        values = [100 * run["test"]["top1"] for run in finished]
        axis.plot(values, [row] * len(values), "o", color=COLOURS.get(name), alpha=0.7, markeredgecolor="black",
                  markeredgewidth=0.4)  # fmt: skip
        axis.vlines(statistics.mean(values), row - 0.3, row + 0.3, color="black", linewidth=1.5)
    top1 = 100 * results["teacher"]["top1"]
    axis.axvline(top1, color="black", linestyle="--", linewidth=1, label=f"teacher ({top1:.1f} %)")
    axis.set_yticks(range(len(runs)), [TITLES.get(name, name) for name in runs])
    axis.invert_yaxis()
    axis.set_xlabel("Top-1 on the test images (%); a dot is a seed, a line the mean")
    axis.grid(axis="x", alpha=0.3)
    axis.legend(fontsize=8, loc="lower left")
    figure.savefig(path, dpi=150)
    plt.close(figure)


# ---- Everything ----------------------------------------------------------------------------------------------------


def write(outcome: Comparison, student: torch.nn.Module) -> str:
    """Write results.json, table.md and curves.png; the table.

    Args:
        student: one of the students, for its size and latency.
    """
    results, folder = outcome.results, outcome.folder
    example = outcome.data.test.__getitems__([0])["pixel_values"]  # type: ignore[attr-defined]
    for party, network in (("teacher", outcome.teacher.network), ("student", student)):
        parameters, megabytes = size_of(network)
        results.setdefault(party, {}).update(
            parameters=parameters, megabytes=megabytes, latency_ms=latency_ms(network, example)
        )
    results["seconds"] = outcome.seconds
    batch = outcome.settings["training"]["per_device_train_batch_size"]
    results["steps_per_epoch"] = math.ceil(len(outcome.data.for_student) / batch)  # type: ignore[arg-type]
    threads = torch.get_num_threads()
    results["machine"] = f"{describe_machine()}, {threads} thread{'s' if threads > 1 else ''}"
    write_text(folder / "results.json", json.dumps(results, indent=1) + "\n")
    table = table_of(results)
    write_text(folder / "table.md", table + "\n")
    draw_curves(results, folder / "curves.png")
    return table


def open_student(folder: Path) -> torch.nn.Module:
    """A saved student, as timm opens it."""
    return timm.create_model(f"local-dir:{folder}", pretrained=True)
