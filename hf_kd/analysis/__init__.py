"""Figures of finished runs: what the paper looks at besides accuracy, and what else tells students apart.

``python -m hf_kd.analysis RUN... -o figures/`` draws them from the runs' folders; docs/figures.md shows how. From
Python::

    save_run(trainer, test_set)  # after trainer.train(): leaves log, provenance and logits in the output folder
    draw(load_runs(["out/kd", "out/wttm"]), "figures")

Matplotlib is imported when something is drawn, not before.
"""

from . import plots, quantities
from .figures import Drawn, draw
from .logits import SavedLogits, load_logits, save_logits, save_predictions, save_run
from .runs import Run, describe, load_runs


__all__ = [
    "Drawn",
    "Run",
    "SavedLogits",
    "describe",
    "draw",
    "load_logits",
    "load_runs",
    "plots",
    "quantities",
    "save_logits",
    "save_predictions",
    "save_run",
]
