"""Write the YAML file of each row of the paper's tables, and recipes/README.md, from recipes/configs/table.yaml.

python recipes/make_configs.py             # writes what differs
python recipes/make_configs.py --check     # only lists it, and ends with status 1 if there is anything
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml
from table import CONFIGS, SOURCE, Row, measured, read_table, rows


HERE = Path(__file__).parent
README = HERE / "README.md"


# ---- YAML files ----------------------------------------------------------------------------------------------------


def yaml_of(row: Row, section: dict[str, Any]) -> str:
    """The text of a row's file."""
    pair = row.pair
    runs = f", the mean of {pair.runs} runs" if pair.runs and row.std is not None else ""
    method = "CE alone" if row.method == "ce" else row.method_title
    lines = [
        f"# {section['title']}: {pair.title} by {method}. The protocol ({section['protocol']}) is the recipe's own.",
        f"# The paper's figures ({SOURCE}), not measured with this code: {figure(row.top1, row.std)} % top-1{runs}; "
        f"teacher {pair.teacher_top1:.2f} %, student alone {pair.student_top1:.2f} %.",
        *(f"# Settings: {note}." for note in row.notes[:1]),
        *(f"# Note: {note}." for note in row.notes[1:]),
        "# Written by `python recipes/make_configs.py` from recipes/configs/table.yaml.",
        *(f"{key}: {_value(value)}" for key, value in row.settings.items()),
        f"paper_top1: {_value(row.top1)} # the paper's",
    ]
    if row.std is not None:
        lines.append(f"paper_top1_std: {_value(row.std)} # the paper's")
    return "\n".join(lines) + "\n"


def _value(value: Any) -> str:
    return yaml.safe_dump(value, default_flow_style=True, sort_keys=False, width=1000).removesuffix("...\n").strip()


def figure(top1: float, std: float | None = None) -> str:
    return f"{top1:.2f}" if std is None else f"{top1:.2f} ± {std:.2f}"


# ---- The page ------------------------------------------------------------------------------------------------------

INTRODUCTION = """\
# The paper's tables, row by row

Each row of the tables is a YAML file, and a run of it one command. "Paper" is top-1 in % as *Knowledge Distillation
Based on Transformed Teacher Matching* (ICLR 2024, arXiv 2402.11148) prints it, with its standard deviation over runs
where it prints one. "Measured here" stays empty until somebody has run the row with this code.

This page and the rows' YAML files are written by `python recipes/make_configs.py` from
[configs/table.yaml](configs/table.yaml), which says where each setting is from; `--check` says whether they are as it
has them. Change the table, not these.

## How to run a row

```bash
accelerate launch recipes/cifar100_wttm.py --fetch_teacher \\
    --config recipes/configs/cifar100/wrn_40_2_wrn_16_2/wttm.yaml
```

- **Data.** CIFAR-100 comes from the Hub (`uoft-cs/cifar100`), or from a folder: `--data cifar-100-python` (what the
  archive of its authors unpacks to, the python or the binary version), `train` and `test` with one folder of pictures
  per class, or Parquet files. ImageNet: `--train_dir` and `--val_dir`, or `--dataset_name ILSVRC/imagenet-1k`.
- **Teachers of CIFAR-100** are the published checkpoints of the CRD protocol. `--fetch_teacher` fetches the row's from
  `http://shape2prog.csail.mit.edu/repo/NAME/ckpt_epoch_240.pth` once (plain http: its SHA-256 is printed, and checked
  against `--teacher_sha256` if you give one; nothing in it is run). `--teacher_checkpoint FILE` takes a copy that you
  have. Or train one, as the protocol does, and name its folder:

  ```bash
  accelerate launch recipes/cifar100_wttm.py --config recipes/configs/cifar100/resnet32x4_resnet8x4/ce.yaml \\
      --student cifar_resnet32x4 --output_dir outputs/cifar100/teachers/resnet32x4
  accelerate launch recipes/cifar100_wttm.py --config recipes/configs/cifar100/resnet32x4_resnet8x4/wttm.yaml \\
      --teacher outputs/cifar100/teachers/resnet32x4
  ```

  ImageNet's teachers are timm's, fetched by name.
- **Several seeds.** `--seeds 5` runs the row with seeds 42 to 46 and writes mean and standard deviation; stopped, the
  same command with `--resume_from_checkpoint last` goes on. The paper has 5 runs where teacher and student are of one
  architecture (the first seven pairs of CIFAR-100), 3 otherwise.
- **Many GPUs.** `accelerate launch --config_file recipes/configs/accelerate/one_machine.yaml --num_processes 4 ...`:
  the total batch stays the row's. CIFAR-100's 64 images a step leave little to share; run several rows side by side
  instead.
- **Results.** Each run writes `results.json` into its folder below `outputs/`. `python recipes/reproduce.py outputs`
  prints the table of all that it finds beside the paper's figures, with runs that differ from their row listed
  apart; `--update` keeps them in `configs/measured.yaml` and fills the last column here. A
  CIFAR-100 run counts as the row's with whichever weights `--teacher_checkpoint` has, whose SHA-256 `results.json`
  keeps; one with another `--teacher` is listed apart.

`python recipes/compare_losses.py` runs all of these losses side by side on a small task, digits or your CIFAR-100:
[docs/losses.md](../docs/losses.md) has what came out on the digits.

The figure of a run is the last epoch's, of the weights that are saved. The authors' code logs each epoch and names the
best one on the test split too; which of the two the paper prints it does not say.
"""


def page(table: dict[str, Any]) -> str:
    """The text of recipes/README.md."""
    found = measured()
    parts = [INTRODUCTION]
    listed = rows(table)
    for name, section in table.items():
        own = [row for row in listed if row.section == name]
        parts.append(f"## {section['title']}\n")
        if len(section["methods"]) == 1:
            parts.append(_pattern(section, name, "ROW"))
            parts.append(markdown_table(("row", "γ", "β", "paper", "measured here"), _pairs(own, found)))
            continue
        several = len(section["pairs"]) > 1
        parts.append(_pattern(section, name, "PAIR/METHOD" if several else "METHOD"))
        methods = [(method["title"], method["source"]) for method in section["methods"].values()]
        parts.append(markdown_table(("method", "where its settings are from"), methods))
        for pair in dict.fromkeys(row.pair for row in own):
            runs = f"; TTM and WTTM are means of {pair.runs} runs" if pair.runs else ""
            parts.append(
                f"### {pair.title}\n\nIn the paper: teacher {pair.teacher_top1:.2f} %, student alone "
                f"{pair.student_top1:.2f} %{runs}.\n"
            )
            cells = _methods([row for row in own if row.pair == pair], found)
            parts.append(markdown_table(("row", "settings", "paper", "measured here"), cells))
    return "\n".join(parts)


def _pattern(section: dict[str, Any], name: str, row: str) -> str:
    return f"```bash\naccelerate launch {section['recipe']} --config recipes/configs/{name}/{row}.yaml\n```\n"


def _pairs(own: Sequence[Row], found: dict[str, Any]) -> Iterator[list[str]]:
    for row in own:
        yield [
            _link(row.name, f"{row.pair.title} ({row.pair.teacher_top1:.2f} → {row.pair.student_top1:.2f})"),
            f"{row.settings['gamma']:g}", f"{row.settings['beta']:g}", figure(row.top1, row.std),
            _measured(found, row.name),
        ]  # fmt: skip


def _methods(own: Sequence[Row], found: dict[str, Any]) -> Iterator[list[str]]:
    for row in own:
        link = _link(row.name, row.method_title)
        yield [link, _in_words(row.settings), figure(row.top1, row.std), _measured(found, row.name)]


# What tells a method's rows from one another, in the letters of its paper: fields of the settings and of their kwargs.
_TOLD = {
    "ce": "",
    "kd": "T = {temperature:g}, λ = {beta:g}",
    "dist": "T = {temperature:g}, β = {loss_kwargs[beta]:g}, γ = {loss_kwargs[gamma]:g}",
    "dkd": "T = {temperature:g}, α = {loss_kwargs[alpha]:g}, β = {loss_kwargs[beta]:g}",
    "nkd": "T = {temperature:g}, γ = {loss_kwargs[gamma]:g}, weight {beta:g}",
    "ttm": "γ = {gamma:g}, β = {beta:g}",
    "wttm": "γ = {gamma:g}, β = {beta:g}",
    "crd": "μ = {feature_weight:g}",
    "itrd": "μ = {feature_weight:g}, α_it = {feature_loss_kwargs[alpha_it]:g}, "
    "β_corr = {feature_loss_kwargs[beta_corr]:g}, β_mi = {feature_loss_kwargs[beta_mi]:g}",
    "vitkd": "α = {feature_loss_kwargs[alpha]:g}, β = {feature_loss_kwargs[beta]:g}, "
    "λ = {feature_loss_kwargs[mask_ratio]:g}",
}


def _in_words(settings: dict[str, Any]) -> str:
    parts = [_TOLD[settings[key]].format(**settings) for key in ("loss", "feature_loss") if key in settings]
    return ", ".join(filter(None, parts))


def _link(name: str, text: str) -> str:
    return f"[{text}](configs/{name}.yaml)"


def _measured(found: dict[str, Any], name: str) -> str:
    entry = found.get(name)
    return "" if entry is None else f"{figure(entry['top1'], entry.get('std'))} (n = {entry['runs']})"


def markdown_table(head: Sequence[str], cells: Iterable[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(line)} |" for line in (head, ["---"] * len(head), *cells)) + "\n"


# ---- Writing -------------------------------------------------------------------------------------------------------


def texts() -> dict[Path, str]:
    """What every written file should hold."""
    table = read_table()
    return {**{row.path: yaml_of(row, table[row.section]) for row in rows(table)}, README: page(table)}


def differing(wanted: dict[Path, str]) -> dict[Path, str]:
    """The files that are not as they should be, each with what is wrong: "missing", "differs", or "no row"."""
    problems = {}
    for path, text in wanted.items():
        if not path.is_file():
            problems[path] = "missing"
        elif path.read_text(encoding="utf-8") != text:
            problems[path] = "differs"
    for folder in {path.parent for path in wanted if path != README}:
        problems.update({path: "no row" for path in folder.glob("*.yaml") if path not in wanted})
    return problems


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="Write nothing; list what differs.")
    arguments = parser.parse_args(argv)
    wanted = texts()
    problems = differing(wanted)
    for path, problem in sorted(problems.items()):
        print(f"{path.relative_to(HERE.parent)}: {problem}")
        if not arguments.check:
            if problem == "no row":
                print(f"  is not in {CONFIGS.name}/table.yaml: add it there, or remove the file.")
                continue
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(wanted[path], encoding="utf-8")
    if arguments.check and problems:
        sys.exit(1)


if __name__ == "__main__":
    main()
