"""How many training images a second CifarDataset gives, beside torchvision's transforms on one PIL image at a time.

    python tests/benchmarks/cifar_data.py [--images 10000] [--batch-size 64] [--workers 0] [--passes 3]

Both give random crops and flips, normalised, in batches of a shuffled DataLoader; the images are noise.
"""

import argparse
import platform
import time

import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

from hf_kd.data import CIFAR100_MEAN, CIFAR100_STD, CifarDataset, CifarImages, collate


class OneByOne(Dataset):
    """The same images as torchvision's own CIFAR classes give them."""

    def __init__(self, data):
        self.images, self.labels = data.images.permute(0, 2, 3, 1).contiguous().numpy(), data.labels
        self.transform = transforms.Compose(
            [
                transforms.RandomCrop(32, padding=4),
                transforms.RandomHorizontalFlip(),
                transforms.ToTensor(),
                transforms.Normalize(CIFAR100_MEAN, CIFAR100_STD),
            ]
        )

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, index):
        image = self.transform(Image.fromarray(self.images[index]))
        return {"pixel_values": image, "labels": self.labels[index], "index": index}


def images_per_second(dataset, args):
    """Of the fastest pass."""
    loader = DataLoader(
        dataset,
        args.batch_size,
        shuffle=True,
        collate_fn=collate,
        num_workers=args.workers,
        persistent_workers=args.workers > 0,
    )
    times = []
    for _ in range(args.passes):
        start = time.perf_counter()
        count = sum(len(batch["labels"]) for batch in loader)
        times.append(time.perf_counter() - start)
    return count / min(times)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=10000)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--passes", type=int, default=3)
    args = parser.parse_args(argv)
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (args.images, 3, 32, 32), dtype=torch.uint8, generator=generator)
    labels = torch.randint(0, 100, (args.images,), generator=generator)
    data = CifarImages(images, labels, [str(number) for number in range(100)])
    batched = images_per_second(CifarDataset(data, augment=True), args)
    one_by_one = images_per_second(OneByOne(data), args)
    print(
        f"{args.images} images in batches of {args.batch_size}, {args.workers} workers, torch {torch.__version__}, "
        f"{torch.get_num_threads()} threads, {platform.machine()}"
    )
    print(f"{'CifarDataset':<36}{batched:>10,.0f} images/s")
    print(f"{'PIL and torchvision, one by one':<36}{one_by_one:>10,.0f} images/s")
    print(f"{'':<36}{batched / one_by_one:>10.1f} times as fast")


if __name__ == "__main__":
    main()
