"""``python -m hf_kd.analysis``: the figures of the runs whose folders are given."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from ..text import one_line
from .figures import FORMATS, draw
from .runs import load_runs


PROGRAM = "python -m hf_kd.analysis"


def main(argv: Sequence[str] | None = None) -> int:
    """Draw; the exit status is 0, 2 for a mistake or if there was nothing to draw, 130 for Ctrl-C."""
    parser = argparse.ArgumentParser(
        PROGRAM,
        description="Draw the figures of finished runs: entropy, divergence and gradients over training, histograms "
        "of H(q), reliability, gains by class, agreement with the teacher.",
        epilog="A run's folder is its output_dir. Curves come from its trainer_state.json (or its last checkpoint's), "
        "the rest from logits.safetensors, which hf_kd.analysis.save_run(trainer, test_set) writes.",
    )
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="folder of a run")
    parser.add_argument("-o", "--output", type=Path, default=Path("figures"), help="folder (default: %(default)s)")
    parser.add_argument("--names", nargs="+", metavar="NAME", help="of the runs, in their order")
    parser.add_argument(
        "--baseline", metavar="NAME", help="run that gains by class are counted from: its name or folder"
    )
    parser.add_argument("--format", choices=FORMATS, default="png", help="of the files (default: %(default)s)")
    args = parser.parse_args(argv)
    try:
        runs = load_runs(args.runs, args.names)
        # A run may be called by its folder where its name is long.
        by_folder = {str(folder): run.name for folder, run in zip(args.runs, runs, strict=True)}
        baseline = by_folder.get(str(Path(args.baseline)), args.baseline) if args.baseline else None
        drawn = draw(runs, args.output, baseline=baseline, format=args.format)
    except (ValueError, TypeError, OSError, ImportError) as error:
        print(f"{PROGRAM}: error: {one_line(error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"{PROGRAM}: interrupted; the same command draws everything again.", file=sys.stderr)
        return 130
    for file in drawn.files:
        print(file)
    for note in drawn.notes:
        print(note, file=sys.stderr)
    if not drawn.files:
        print(f"{PROGRAM}: error: The runs hold nothing that can be drawn.", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
