"""What the quickstart shows at the end: a table, two pictures, and the student opened by timm and by transformers."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import comparison_report
import timm
import torch
from comparison import Comparison, arguments
from comparison_report import TITLES, plt
from transformers import AutoImageProcessor, AutoModelForImageClassification

from hf_kd.curves import CURVES
from hf_kd.data import DigitsDataset
from hf_kd.model_card import StudentCard, describe_training


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


def write_card(outcome: Comparison, name: str, training: dict[str, str], folder: Path) -> None:
    """The card of the student: its own numbers, and those of all methods over the seeds."""
    results = outcome.results
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
        dataset_name=outcome.data.name,
        train_samples=data["sizes"][0],
        data_description=outcome.data.description,
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


def write(outcome: Comparison) -> None:
    """Table, pictures, results.json and the folder of a method's first student; then say where they are."""
    settings, results, folder, test = outcome.settings, outcome.results, outcome.folder, outcome.data.test
    name = "wttm" if "wttm" in settings["methods"] else next(iter(settings["methods"]))
    chosen = results["runs"][name]
    student_folder = folder / "student"
    shutil.rmtree(student_folder, ignore_errors=True)
    shutil.copytree(folder / chosen[0]["folder"], student_folder)
    table = comparison_report.write(outcome, comparison_report.open_student(student_folder))
    (student_folder / CURVES).parent.mkdir(exist_ok=True)
    shutil.copy(folder / "curves.png", student_folder / CURVES)
    probabilities, labels, difference = reopen(student_folder, test)
    draw_digits(test, probabilities, labels, folder / "digits.png")
    training = arguments(folder, {**settings["training"], **settings["methods"][name]}, settings["seeds"][0])
    write_card(outcome, name, describe_training(training), student_folder)

    data = settings["data"]
    right = int((probabilities.argmax(dim=-1) == test.true_labels[: len(probabilities)]).sum())
    print(
        f"\nTop-1 and the rest on {len(test):,} test digits, mean ± standard deviation over "
        f"{len(chosen)} seeds. The students saw {10 * data['labelled_per_class']} labels, and (but for CE) the "
        f"teacher's outputs on {data['sizes'][0]:,} images.\n\n{table}\n\n"
        f"The student in {student_folder} opens in timm and in transformers: their logits differ by at most "
        f"{difference:.1e}, and {right} of the first {len(probabilities)} test digits are right.\n"
        f"Pictures: {folder / 'curves.png'}, {folder / 'digits.png'}. Numbers: {folder / 'results.json'}. "
        f"This took {outcome.seconds / 60:.1f} minutes.",
        flush=True,
    )
