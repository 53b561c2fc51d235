"""What a cache of teacher logits saves and what it changes: accuracy, losses and time on digits, and reading alone.

    python tests/benchmarks/teacher_cache.py [--output teacher_cache.json] [--epochs 6] [--seeds 0 1 2] [--images 3500]

A timm resnet18 is trained on the digits first, then students of 80,000 parameters are distilled from it:

1. with a live teacher, with a cache that the first run fills, and with a live teacher on views that never repeat;
2. rows are read alone, beside indexing `datasets` for the same;
3. steps are taken from the cache, and the live teacher's loss at the same weights is computed beside it;
4. eight settings are tried with a live teacher and with a cache that is empty at first.

Times are CPU times of building the trainer and training, one thread; the ratio of two live runs of one setting (A/A)
shows how far the machine's noise goes. About seven minutes on one core.
"""

import argparse
import itertools
import json
import statistics
import tempfile
import time
from pathlib import Path

import datasets
import numpy as np
import torch
from side_by_side import add_output, write
from transformers import PrinterCallback
from transformers.utils import logging

from hf_kd import DistillationConfig, DistillationTrainer, TeacherCache, create_student
from hf_kd.data import DIGITS_MEAN, DIGITS_SIZE, DIGITS_STD, DigitsDataset, load_digits


IMAGES = {"num_classes": 10, "img_size": DIGITS_SIZE, "mean": DIGITS_MEAN, "std": DIGITS_STD}
STUDENT = {"channels": [8, 16, 32, 64], "stem_type": "deep", "stem_width": 8}
SETTINGS = [
    {"loss": loss, "temperature": temperature, "learning_rate": rate}
    for loss, temperature, rate in itertools.product(("wttm", "kd"), (1.25, 4.0), (0.005, 0.01))
]


class Recording(DistillationTrainer):
    """Keeps the loss of every step."""

    def compute_loss(self, *args, **kwargs):
        loss = super().compute_loss(*args, **kwargs)
        self.losses.append(loss.detach())
        return loss


class Comparing(Recording):
    """Takes every step from the cache, and notes the loss that the live teacher gives at the same weights."""

    live = ()

    def compute_loss(self, *args, **kwargs):
        loss = super().compute_loss(*args, **kwargs)
        replay, self.replay = self.replay, None
        with torch.no_grad():
            self.live = (*self.live, DistillationTrainer.compute_loss(self, *args, **kwargs))
        self.replay = replay
        return loss


def run(folder, teacher, data, evaluation, seed=0, trainer_class=Recording, **options):
    """A finished student: top-1, losses by step, CPU seconds and seconds."""
    cpu, wall = time.process_time(), time.perf_counter()
    torch.manual_seed(seed)
    student = create_student("resnet10t", **IMAGES, **STUDENT)
    settings = {
        "loss": "wttm", "temperature": 2.0, "beta": 1.0, "learning_rate": 0.01, "weight_decay": 1.0,
        "optim": "adamw_torch", "lr_scheduler_type": "cosine", "warmup_steps": 27, "max_grad_norm": 0.0,
        "per_device_train_batch_size": 64, "per_device_eval_batch_size": 500, "logging_strategy": "no",
        "save_strategy": "no", "disable_tqdm": True, "log_level": "error", "teacher_preflight": False, "use_cpu": True,
    }  # fmt: skip
    args = DistillationConfig(str(folder), seed=seed, **{**settings, **options})
    trainer = trainer_class(student, teacher, args, train_dataset=data, eval_dataset=evaluation)
    trainer.remove_callback(PrinterCallback)
    trainer.losses = []
    trainer.train()
    spent = time.process_time() - cpu, time.perf_counter() - wall
    losses = torch.stack(trainer.losses)
    found = {"top1": trainer.evaluate()["eval_top1"], "losses": losses, "cpu": spent[0], "wall": spent[1]}
    return {**found, "live": torch.stack(trainer.live)} if trainer_class is Comparing else found


def train_teacher(folder, splits, epochs):
    torch.manual_seed(0)
    args = DistillationConfig(
        str(folder), loss="ce", seed=0, num_train_epochs=epochs, per_device_train_batch_size=64, optim="sgd",
        nesterov=True, learning_rate=0.05, weight_decay=5e-4, lr_scheduler_type="cosine", warmup_steps=55,
        per_device_eval_batch_size=500, logging_strategy="no", save_strategy="no", disable_tqdm=True,
        log_level="error", use_cpu=True,
    )  # fmt: skip
    network = create_student("resnet18", **IMAGES)
    data, evaluation = DigitsDataset(*splits.train, shift=2), DigitsDataset(*splits.validation)
    trainer = DistillationTrainer(network, args=args, train_dataset=data, eval_dataset=evaluation)
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    trainer.save_model()
    return trainer.evaluate()["eval_top1"]


def compare(folder, teacher, splits, seeds, epochs, views):
    """Live, cached, and live on views that never repeat, interleaved, for each seed."""
    evaluation = DigitsDataset(*splits.test)
    rows = []
    for seed in seeds:
        live_data, cached_data, new_data = (DigitsDataset(*splits.train, shift=2) for _ in range(3))
        live_data.cycle_views(views)
        common = {"seed": seed, "num_train_epochs": epochs}
        options = {"teacher_cache_dir": str(folder / "cache"), "teacher_cache_views": views}
        live = run(folder / "run", teacher, live_data, evaluation, **common)
        cached = run(folder / "run", teacher, cached_data, evaluation, **common, **options)
        again = run(folder / "run", teacher, cached_data, evaluation, **common, **options)
        other = run(folder / "run", teacher, new_data, evaluation, **common)
        rows.append(
            {
                "seed": seed,
                "top1": {"live": live["top1"], "cached": cached["top1"], "new views": other["top1"]},
                "first_and_later_run_equal": torch.equal(cached["losses"], again["losses"]),
                "ratio": {
                    "first cached run / live" if seed == seeds[0] else "cached / live": cached["cpu"] / live["cpu"],
                    "cached again / live": again["cpu"] / live["cpu"],
                    "live / live (A/A)": other["cpu"] / live["cpu"],
                },
                "live_seconds": live["wall"],
            }
        )
        print(f"  seed {seed}: {json.dumps({key: rows[-1][key] for key in ('top1', 'ratio')})}", flush=True)
    return rows


def loss_differences(folder, teacher, splits, steps=30):
    """The largest relative difference of a step's loss between stored and live logits, at the same weights."""
    evaluation = DigitsDataset(*splits.validation)
    found = {}
    for dtype, gamma in itertools.product(("fp16", "int8", "fp32"), (0.1, 0.5, 1.0)):
        data = DigitsDataset(*splits.train, shift=2)
        options = {"teacher_cache_dir": str(folder / f"cache_{dtype}"), "teacher_cache_dtype": dtype}
        settings = {"max_steps": steps, "temperature": 1 / gamma, "trainer_class": Comparing, **options}
        result = run(folder / "run", teacher, data, evaluation, **settings)
        relative = (result["losses"] - result["live"]).abs() / result["live"]
        found[f"{dtype}, gamma {gamma:g}"] = float(relative.max())
    return found


def sweep(folder, teacher, splits, epochs):
    """CPU seconds of the eight settings, each live and cached in turn."""
    evaluation = DigitsDataset(*splits.validation)
    seconds = {"live": [], "cached": []}
    for setting in SETTINGS:
        for kind, options in (("live", {}), ("cached", {"teacher_cache_dir": str(folder / "sweep")})):
            data = DigitsDataset(*splits.train)
            result = run(folder / "run", teacher, data, evaluation, num_train_epochs=epochs, **setting, **options)
            seconds[kind].append(result["cpu"])
    return {
        "cpu_seconds": seconds,
        "ratio": sum(seconds["cached"]) / sum(seconds["live"]),
        "ratio_without_the_first": sum(seconds["cached"][1:]) / sum(seconds["live"][1:]),
    }


def read_times(folder, repeats=200):
    """Milliseconds for a batch, medians."""
    found = []
    generator = np.random.default_rng(0)
    for (batch, classes), dtype in itertools.product(((64, 100), (256, 1000)), ("fp16", "int8", "fp32")):
        samples = 10_000
        logits = torch.randn(samples, classes)
        cache = TeacherCache(folder / f"{classes}{dtype}", num_classes=classes, samples=samples, dtype=dtype)
        cache.write(0, np.arange(samples), logits)
        times = []
        for _ in range(repeats):
            indices = generator.permutation(samples)[:batch]
            start = time.perf_counter()
            cache.read(0, indices)
            times.append(time.perf_counter() - start)
        entry = {"batch": batch, "classes": classes, "dtype": dtype, "ms": 1e3 * statistics.median(times)}
        if dtype == "fp32":
            table = datasets.Dataset.from_dict({"logits": logits.numpy()}).with_format("torch")
            times = []
            for _ in range(20):
                indices = generator.permutation(samples)[:batch]
                start = time.perf_counter()
                table[indices]["logits"]
                times.append(time.perf_counter() - start)
            entry["ms_of_datasets"] = 1e3 * statistics.median(times)
        found.append(entry)
    return found


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_output(parser)
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--sweep_epochs", type=int, default=2)
    parser.add_argument("--teacher_epochs", type=int, default=4)
    parser.add_argument("--views", type=int, default=3, help="After how many epochs the views repeat.")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--images", type=int, default=3500, help="Training images.")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    logging.set_verbosity_error()
    datasets.disable_progress_bars()
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        reads = read_times(folder)
        print("Reading, ms a batch (with checksums):")
        for entry in reads:
            beside = f"   datasets: {entry['ms_of_datasets']:.2f}" if "ms_of_datasets" in entry else ""
            print(f"  {entry['batch']:>4} x {entry['classes']:<5} {entry['dtype']}  {entry['ms']:.3f}{beside}")
        splits = load_digits(0, (args.images, 500, 1000))
        top1 = train_teacher(folder / "teacher", splits, args.teacher_epochs)
        print(
            f"Teacher: resnet18, validation top-1 {100 * top1:.1f} % ({time.perf_counter() - start:.0f} s)", flush=True
        )
        teacher = str(folder / "teacher")
        rows = compare(folder, teacher, splits, args.seeds, args.epochs, args.views)
        differences = loss_differences(folder, teacher, splits)
        swept = sweep(folder, teacher, splits, args.sweep_epochs)
    for kind in ("live", "cached", "new views"):
        values = [100 * row["top1"][kind] for row in rows]
        spread = statistics.stdev(values) if len(values) > 1 else 0.0
        print(f"{kind:<10} test top-1 {statistics.mean(values):.2f} ± {spread:.2f} %")
    print("largest relative difference of a step's loss from the live teacher's, at the same weights:")
    print("  " + "; ".join(f"{name}: {value:.1e}" for name, value in differences.items()))
    filled = swept["ratio_without_the_first"]
    print(f"sweep of {len(SETTINGS)}: {swept['ratio']:.3f} of the time ({filled:.3f} once filled)")
    settings = {key: value for key, value in vars(args).items() if key != "output"}
    write(
        args.output,
        {
            "settings": settings,
            "teacher_top1": top1,
            "runs": rows,
            "loss_differences": differences,
            "reading": reads,
            "sweep": swept,
            "seconds": time.perf_counter() - start,
        },
    )


if __name__ == "__main__":
    main()
