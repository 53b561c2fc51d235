"""Pictures decoded once: the same samples and errors, from memory."""

import multiprocessing.reduction
import pickle
import shutil

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from hf_kd.data import (
    HubImageDataset,
    ImageFolderDataset,
    SkippingDataset,
    collate,
    load_image_dataset,
    train_transform,
)


TRAIN = train_transform(16, normalize=False)


@pytest.fixture
def folder(tmp_path):
    """Pictures of several sizes and formats; number 3 is broken."""
    for number in range(8):
        target = tmp_path / "pictures" / "ab"[number // 4]
        target.mkdir(parents=True, exist_ok=True)
        noise = np.random.default_rng(number).integers(0, 256, (6, 8, 3), dtype=np.uint8)
        image = Image.fromarray(noise).resize((40 + number, 30), Image.Resampling.BICUBIC)
        image.save(target / f"{number}.{'jpg' if number % 2 else 'png'}")
    path = tmp_path / "pictures" / "a" / "3.jpg"
    path.write_bytes(path.read_bytes()[:400])
    return tmp_path / "pictures"


def table(folder):
    paths = sorted(folder.glob("*/*"))
    cells = [{"bytes": path.read_bytes(), "path": path.name} for path in paths]
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")})
    return datasets.Dataset.from_dict({"image": cells, "label": [0] * len(paths)}, features=features)


MADE = {
    "folder": lambda folder, **options: ImageFolderDataset(folder, TRAIN, seed=2, **options),
    "table": lambda folder, **options: HubImageDataset(table(folder), TRAIN, seed=2, **options),
    "one door": lambda folder, **options: load_image_dataset(folder, transform=TRAIN, seed=2, **options),
}


@pytest.mark.parametrize("kind", MADE)
@pytest.mark.parametrize("decoder", ["pil", "torchvision"])
def test_the_samples_are_the_same(kind, decoder, folder):
    read, kept = (MADE[kind](folder, decoder=decoder, in_memory=in_memory) for in_memory in (False, True))
    read.set_epoch(1), kept.set_epoch(1)
    rows = [7, 0, 5, 7]
    for one, other in zip(read.__getitems__(rows), kept.__getitems__(rows), strict=True):
        assert torch.equal(one["pixel_values"], other["pixel_values"])
        assert (one["labels"], one["index"]) == (other["labels"], other["index"])
    for row in (0, 6):
        # A JPEG's pixels are of whichever decoder was used once.
        assert np.array_equal(np.asarray(read.image(row)), np.asarray(kept.image(row)))


def test_nothing_is_read_any_more(folder):
    kept = MADE["folder"](folder, in_memory=True)
    first = kept[0]["pixel_values"]
    shutil.rmtree(folder)
    assert torch.equal(kept[0]["pixel_values"], first)
    workers = DataLoader(kept, 2, sampler=[0, 1, 5, 6], collate_fn=collate, num_workers=1)
    assert torch.cat([batch["index"] for batch in workers]).tolist() == [0, 1, 5, 6]


def test_three_bytes_a_pixel(folder):
    kept = MADE["folder"](folder, in_memory=True)
    widths = [40 + number for number in range(8) if number != 3]
    assert kept._decoded.nbytes == 3 * 30 * sum(widths)


@pytest.mark.parametrize("kind", ["folder", "table"])
def test_a_broken_picture_is_told_when_it_is_asked_for(kind, folder):
    read, kept = (MADE[kind](folder, in_memory=in_memory) for in_memory in (False, True))
    messages = []
    for data in (read, kept):
        with pytest.raises(ValueError, match=r"(?i)cannot read image .*3\.jpg.*truncated") as error:
            data[3]
        messages.append(str(error.value))
    assert messages[0] == messages[1]
    skipping = SkippingDataset(kept)
    assert len(skipping.__getitems__(range(8))) == 8 and skipping.bad_indices == [3]


def plain(image):
    return image


def test_what_a_transform_does_to_a_picture_stays_its_own(folder):
    kept = ImageFolderDataset(folder, plain, decoder="torchvision", in_memory=True)
    before = kept[0]["pixel_values"].clone()
    kept[0]["pixel_values"].zero_()
    assert torch.equal(kept[0]["pixel_values"], before) and before.float().std() > 10


def test_spawned_workers_get_them_too(folder):
    kept = MADE["folder"](folder, in_memory=True)
    copy = pickle.loads(multiprocessing.reduction.ForkingPickler.dumps(kept))
    assert torch.equal(copy[5]["pixel_values"], kept[5]["pixel_values"])
    # One memory for both.
    kept._decoded._pixels.zero_()
    assert copy.image(5).getextrema() == ((0, 0),) * 3


def test_a_stream_is_not_kept(folder):
    with pytest.raises(ValueError, match="`in_memory` keeps every picture, and a stream is read as it comes"):
        load_image_dataset(dataset_name="parquet", transform=TRAIN, streaming=True, in_memory=True)


def test_decoding_costs_once(folder, monkeypatch):
    opened, read = [], Image.open
    monkeypatch.setattr(Image, "open", lambda *args, **kwargs: opened.append(1) or read(*args, **kwargs))
    kept = MADE["folder"](folder, in_memory=True)
    assert len(opened) == 8
    for _ in range(3):
        kept.__getitems__([0, 1, 2, 4])
    assert len(opened) == 8
