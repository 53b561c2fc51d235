"""Images per second of loading alone: small images in memory, and photographs as JPEG files.

    python tests/benchmarks/data_loading.py [--output results.json] [--passes 3] [--workers 0 2]

Small: 32 × 32, random crops and flips, normalised: CifarDataset, a batch at a time; torchvision's transforms on one
PIL image at a time; the same on rows of a `datasets` table of PNG files. Photographs: smooth noise of 500 × 375 as
JPEGs in a folder, 224-pixel views by train_transform, decoded by PIL or torchvision, handed on as floats or bytes.
Bytes are normalised afterwards, on the CPU, which counts.

Rows of a table take turns, pass by pass; the fastest pass of each counts. CPU time is of this process alone: with
workers it says what is left to it. Under 2 minutes on two cores.
"""

from __future__ import annotations

import argparse
import io
import tempfile
import time
import warnings
from pathlib import Path

import datasets
import numpy as np
import torch
import torchvision
from PIL import Image
from side_by_side import add_output, table, write
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

from hf_kd.data import (
    CIFAR100_MEAN,
    CIFAR100_STD,
    CifarDataset,
    CifarImages,
    ImageFolderDataset,
    collate,
    train_transform,
)
from hf_kd.data.normalise import PixelNormaliser


# What a hand-written CIFAR loader has.
ONE_BY_ONE = transforms.Compose(
    [
        transforms.RandomCrop(32, padding=4),
        transforms.RandomHorizontalFlip(),
        transforms.ToTensor(),
        transforms.Normalize(CIFAR100_MEAN, CIFAR100_STD),
    ]
)


class OneByOne(Dataset):
    """Images in memory, as torchvision's own CIFAR classes give them."""

    def __init__(self, data):
        self.images, self.labels = data.images.permute(0, 2, 3, 1).contiguous().numpy(), data.labels

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, index):
        return {"pixel_values": ONE_BY_ONE(Image.fromarray(self.images[index])), "labels": self.labels[index]}


class Rows(Dataset):
    """Rows of a table whose images `datasets` decodes, as its guides have it."""

    def __init__(self, data):
        arrays = data.images.permute(0, 2, 3, 1).contiguous().numpy()
        cells = [{"bytes": encoded(Image.fromarray(array), "PNG"), "path": None} for array in arrays]
        self.rows = datasets.Dataset.from_dict(
            {"image": cells, "label": data.labels.tolist()},
            features=datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")}),
        )

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        row = self.rows[index]
        return {"pixel_values": ONE_BY_ONE(row["image"].convert("RGB")), "labels": row["label"]}


def encoded(image, format, **options):
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def small_images(count):
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (count, 3, 32, 32), dtype=torch.uint8, generator=generator)
    labels = torch.randint(0, 100, (count,), generator=generator)
    return CifarImages(images, labels, [str(number) for number in range(100)])


def write_photographs(folder, count):
    """JPEGs of about 90 KB, as ImageNet's are: large smooth shapes with some grain."""
    rng = np.random.default_rng(0)
    (folder / "a").mkdir(parents=True)
    for number in range(count):
        shapes = rng.integers(0, 256, (12, 16, 3), dtype=np.uint8)
        smooth = np.asarray(Image.fromarray(shapes).resize((500, 375), Image.Resampling.BICUBIC))
        grain = rng.normal(0, 12, (375, 500, 1))
        image = Image.fromarray((smooth + grain).clip(0, 255).astype(np.uint8))
        (folder / "a" / f"{number:04}.jpg").write_bytes(encoded(image, "JPEG", quality=92))


def measure(cases, batch_size, workers, passes, normalise):
    """For each name its data set's images per second (wall) and CPU microseconds an image, of its fastest pass."""
    options = {"num_workers": workers, "persistent_workers": workers > 0, "prefetch_factor": 4 if workers else None}
    loaders = {
        name: DataLoader(dataset, batch_size, shuffle=True, collate_fn=collate, **options)
        for name, dataset in cases.items()
    }
    # In a pass before the others workers start.
    warm = int(workers > 0)
    times = {name: [] for name in cases}
    for _ in range(warm + passes):
        for name, loader in loaders.items():
            wall, cpu, count = time.perf_counter(), time.process_time(), 0
            for batch in loader:
                images = batch["pixel_values"]
                images = normalise(images) if images.dtype == torch.uint8 else images
                count += len(images)
            times[name].append(((time.perf_counter() - wall) / count, (time.process_time() - cpu) / count))
    results = {}
    for name, pairs in times.items():
        walls, cpus = zip(*pairs[warm:], strict=True)
        results[name] = {"images_per_second": 1 / min(walls), "cpu_us_per_image": 1e6 * min(cpus)}
    return results


def show(title, results, reference):
    slowest = results[reference]["images_per_second"]
    rows = [
        (name, f"{values['images_per_second']:,.0f}", f"{values['cpu_us_per_image']:,.0f}",
         f"{values['images_per_second'] / slowest:.2f}")
        for name, values in results.items()
    ]  # fmt: skip
    print(f"\n{table(rows, (title, 'images/s', 'CPU µs an image', 'ratio'))}", flush=True)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_output(parser)
    parser.add_argument("--passes", type=int, default=3)
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 2])
    parser.add_argument("--small-images", type=int, default=4096)
    parser.add_argument("--photographs", type=int, default=256)
    args = parser.parse_args(argv)
    # Torchvision announces that its decoders will go.
    warnings.filterwarnings("ignore", "The image decoding and encoding capabilities", DeprecationWarning)

    results = {"torchvision": torchvision.__version__, "small": {}, "photographs": {}}

    data = small_images(args.small_images)
    small = {
        "CifarDataset": CifarDataset(data, augment=True),
        "PIL and torchvision, one by one": OneByOne(data),
        "datasets, PIL and torchvision, one by one": Rows(data),
    }
    normalise = PixelNormaliser(CIFAR100_MEAN, CIFAR100_STD)
    for workers in args.workers:
        found = measure(small, 64, workers, args.passes, normalise)
        show(f"32 × 32, batches of 64, {workers} workers", found, "datasets, PIL and torchvision, one by one")
        results["small"][f"{workers} workers"] = found

    normalise = PixelNormaliser(IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD)
    with tempfile.TemporaryDirectory() as folder:
        write_photographs(Path(folder), args.photographs)
        photographs = {
            f"{decoder}, {kind}": ImageFolderDataset(folder, train_transform(normalize=normalize), decoder=decoder)
            for decoder in ("pil", "torchvision")
            for kind, normalize in (("floats", True), ("bytes", False))
        }
        for workers in args.workers:
            found = measure(photographs, 32, workers, args.passes, normalise)
            show(f"JPEGs of 500 × 375 to 224 × 224, batches of 32, {workers} workers", found, "pil, floats")
            results["photographs"][f"{workers} workers"] = found
    write(args.output, results)


if __name__ == "__main__":
    main()
