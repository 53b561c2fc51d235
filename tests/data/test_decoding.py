"""Pictures decoded by torchvision where it reads them as PIL does, and batches of them read at once."""

import io
import random

import datasets
import numpy as np
import pytest
import timm.data
import torch
from PIL import Image
from torch.utils.data import DataLoader
from torchvision.transforms import v2

from hf_kd.data import (
    HubImageDataset,
    HubImageStream,
    ImageFolderDataset,
    SkippingDataset,
    collate,
    decoding,
    load_image,
    load_image_dataset,
    load_image_tensor,
    train_transform,
)


BYTES = train_transform(24, normalize=False)


def picture(seed=0, mode="RGB", size=(96, 72)):
    """Smooth blotches."""
    noise = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize(size, Image.Resampling.BICUBIC).convert(mode)


def encode(image, format="JPEG", **options):
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def turned():
    exif = Image.Exif()
    exif[0x0112] = 6
    return encode(picture(), exif=exif)


# What torchvision decodes, and what is PIL's to read.
PLAIN = {
    "jpeg": encode(picture()),
    "progressive": encode(picture(1), progressive=True, quality=60),
    "grey jpeg": encode(picture(2, "L")),
    "unsampled": encode(picture(3), subsampling=0),
}
OTHERS = {
    "cmyk": encode(picture(mode="CMYK")),
    "turned by exif": turned(),
    "png": encode(picture(), "PNG"),
    "palette": encode(picture(mode="P"), "PNG"),
    "transparent": encode(picture(mode="RGBA"), "PNG"),
    "16 bits": encode(Image.fromarray(np.arange(0, 60000, 1000, dtype=np.uint16).reshape(6, 10)), "PNG"),
    "gif": encode(picture(mode="P"), "GIF"),
}


@pytest.fixture
def decoded(monkeypatch):
    """How many pictures torchvision has decoded."""
    calls, decode = [], decoding._decode_jpeg

    def counting(*args, **kwargs):
        calls.append(1)
        return decode(*args, **kwargs)

    monkeypatch.setattr(decoding, "_decode_jpeg", counting)
    return calls


@pytest.mark.parametrize("name", [*PLAIN, *OTHERS])
def test_the_pixels_are_pils(name, decoded):
    data = {**PLAIN, **OTHERS}[name]
    tensor = load_image_tensor(data)
    expected = np.asarray(load_image(data)).transpose(2, 0, 1)
    assert tensor.dtype == torch.uint8 and tensor.shape == expected.shape
    # Two builds of libjpeg may round a value otherwise; most often they are one.
    assert np.abs(tensor.numpy().astype(int) - expected).max() <= (1 if name in PLAIN else 0)
    assert len(decoded) == (name in PLAIN)


def test_without_torchvisions_decoder_it_is_pils(monkeypatch):
    monkeypatch.setattr(decoding, "_decode_jpeg", None)
    expected = np.asarray(load_image(PLAIN["jpeg"])).transpose(2, 0, 1)
    assert np.array_equal(load_image_tensor(PLAIN["jpeg"]).numpy(), expected)


def test_an_opened_image_and_a_path(tmp_path):
    path = tmp_path / "a.jpg"
    path.write_bytes(PLAIN["jpeg"])
    expected = load_image_tensor(PLAIN["jpeg"])
    assert torch.equal(load_image_tensor(path), expected)
    assert (load_image_tensor(Image.open(path)).int() - expected.int()).abs().max() <= 1


@pytest.mark.parametrize("content", [b"", b"GIF?", PLAIN["jpeg"][:700], encode(picture(), "PNG")[:700]])
def test_what_cannot_be_read_is_told_as_by_pil(content):
    messages = []
    for load in (load_image, load_image_tensor):
        with pytest.raises(ValueError, match=r"Cannot read image scan 3: .*\. Remove it from the data set") as error:
            load(content, "scan 3")
        messages.append(str(error.value))
    assert messages[0] == messages[1]


# ---- In data sets --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("pictures")
    for number in range(12):
        (root / "ab"[number % 2]).mkdir(exist_ok=True)
        (root / "ab"[number % 2] / f"{number:02}.jpg").write_bytes(encode(picture(number, size=(64 + number, 48))))
    return root


@pytest.fixture(scope="module")
def table(folder):
    paths = sorted(folder.glob("*/*.jpg"))
    columns = {"image": [{"bytes": path.read_bytes(), "path": None} for path in paths], "label": [0] * len(paths)}
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")})
    return datasets.Dataset.from_dict(columns, features=features)


KINDS = {
    "folder": lambda folder, table, *args, **options: ImageFolderDataset(folder, *args, **options),
    "table": lambda folder, table, *args, **options: HubImageDataset(table, *args, **options),
    "stream": lambda folder, table, *args, **options: HubImageStream(table.to_iterable_dataset(), *args, **options),
}


def views(dataset, **options):
    return torch.cat([batch["pixel_values"] for batch in DataLoader(dataset, 5, collate_fn=collate, **options)])


@pytest.mark.parametrize("kind", KINDS)
def test_views_differ_by_rounding_alone(kind, folder, table, decoded):
    make = KINDS[kind]
    by_pil = views(make(folder, table, BYTES, seed=3))
    assert not decoded
    by_torchvision = views(make(folder, table, BYTES, seed=3, decoder="torchvision"))
    assert len(decoded) == len(by_pil) == 12
    difference = (by_pil.int() - by_torchvision.int()).abs()
    # The same crops and flips: another view of such a picture is far away.
    assert difference.max() <= 2 and difference.float().mean() < 0.1
    other = views(make(folder, table, BYTES, seed=4))
    assert (by_pil.int() - other.int()).abs().float().mean() > 10


def test_a_stream_without_bytes_has_the_same_views(folder):
    paths = [str(path) for path in sorted(folder.glob("*/*.jpg"))]
    data = datasets.Dataset.from_dict({"image": paths, "label": [0] * 12}).cast_column("image", datasets.Image())
    made = [HubImageStream(data.to_iterable_dataset(), BYTES, decoder=name) for name in ("pil", "torchvision")]
    one, other = (views(stream) for stream in made)
    assert (one.int() - other.int()).abs().max() <= 2


@pytest.mark.parametrize(
    ("transform", "decoder", "kind"),
    [
        (BYTES, "pil", Image.Image),
        (BYTES, "torchvision", torch.Tensor),
        (BYTES, "auto", torch.Tensor),
        (train_transform(24), "auto", torch.Tensor),
        (train_transform(24, auto_augment="rand-m9"), "auto", Image.Image),
        (timm.data.create_transform(24), "auto", Image.Image),
        (lambda image: torch.zeros(3, 2, 2), "auto", Image.Image),
        (v2.Compose([v2.Resize(9), lambda image: image]), "auto", Image.Image),
    ],
)
def test_which_transforms_get_tensors(transform, decoder, kind, folder):
    dataset = ImageFolderDataset(folder, transform, decoder=decoder)
    seen = []
    dataset.transform = lambda image: seen.append(image) or transform(image)
    dataset[0]
    assert isinstance(seen[0], kind)
    # A picture is a picture, whichever way samples are decoded.
    assert isinstance(dataset.image(0), Image.Image)


@pytest.mark.parametrize("kind", KINDS)
def test_another_decoder_is_refused(kind, folder, table):
    with pytest.raises(ValueError, match=r"`decoder` must be one of 'pil', 'torchvision', 'auto', got 'cv2'"):
        KINDS[kind](folder, table, BYTES, decoder="cv2")
    with pytest.raises(ValueError, match=r"`decoder` must be one of"):
        load_image_dataset(folder, transform=BYTES, decoder="cv2")


def test_a_bad_file_among_others_is_skipped(folder, tmp_path):
    for path in folder.glob("*/*.jpg"):
        target = tmp_path / path.relative_to(folder)
        target.parent.mkdir(exist_ok=True)
        target.write_bytes(path.read_bytes()[: 500 if path.name == "04.jpg" else None])
    data = SkippingDataset(ImageFolderDataset(tmp_path, BYTES, decoder="torchvision"))
    assert views(data).shape == (12, 3, 24, 24)
    (bad,) = data.bad_indices
    assert data.paths[bad].endswith("04.jpg")


# ---- Batches -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["folder", "table"])
@pytest.mark.parametrize("decoder", ["pil", "torchvision"])
def test_a_batch_has_the_samples(kind, decoder, folder, table):
    data = KINDS[kind](folder, table, train_transform(16), seed=1, decoder=decoder)
    data.set_epoch(2)
    rows = [7, 0, -1, 7]
    batch = data.__getitems__(rows)
    for row, sample in zip(rows, batch, strict=True):
        alone = data[row]
        assert torch.equal(sample["pixel_values"], alone["pixel_values"])
        assert (sample["index"], sample["labels"]) == (alone["index"], alone["labels"]) == (row % 12, data.labels[row])
    with pytest.raises(IndexError):
        data.__getitems__([0, 12])


def test_rows_of_a_batch_are_fetched_at_once(table, monkeypatch):
    data = HubImageDataset(table, BYTES)
    asked, fetch = [], datasets.Dataset.__getitem__
    monkeypatch.setattr(datasets.Dataset, "__getitem__", lambda rows, key: asked.append(key) or fetch(rows, key))
    assert views(data).shape[0] == 12
    assert asked == [[0, 1, 2, 3, 4], [5, 6, 7, 8, 9], [10, 11]]


def random_state():
    return torch.get_rng_state().tolist(), random.getstate(), np.random.get_state()[1].tolist(), np.random.normal()


def test_a_batch_leaves_the_generators_as_they_were(folder):
    def fails(image):
        random.random()
        raise RuntimeError("no view")

    np.random.normal()
    numpy = np.random.get_state()
    before = random_state()
    np.random.set_state(numpy)
    ImageFolderDataset(folder, train_transform(16, auto_augment="rand-m9-mstd0.5")).__getitems__(range(4))
    with pytest.raises(RuntimeError, match="no view"):
        ImageFolderDataset(folder, fails).__getitems__([0])
    assert random_state() == before


class WithNumber(ImageFolderDataset):
    def __getitem__(self, index):
        return {**super().__getitem__(index), "number": 10 * index}


def test_samples_of_a_subclass_are_its_own(folder):
    batch = next(iter(DataLoader(WithNumber(folder, BYTES), 4, collate_fn=collate)))
    assert batch["number"].tolist() == [0, 10, 20, 30]
