import io
import multiprocessing.reduction
import pickle
import random
import time
import warnings

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import ConcatDataset, DataLoader, Subset
from torchvision.transforms import v2
from transformers import Trainer, TrainingArguments

from hf_kd.data import (
    EpochCallback,
    HubImageDataset,
    HubImageStream,
    ImageFolderDataset,
    collate,
    eval_transform,
    load_digits,
    load_image,
    load_image_dataset,
    set_dataset_epoch,
    to_rgb,
    train_transform,
    view_rng,
    view_seed,
)


TRAIN = train_transform(16)
EVAL = eval_transform(16)


def encode(image, format="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


@pytest.fixture(autouse=True)
def quick_and_quiet(monkeypatch):
    # `datasets` waits this long after each pass over a shuffled stream, 5 seconds by default, and counts each loading
    # by a request to a server.
    monkeypatch.setattr(datasets.config, "SLEEP_TIME_ON_THREADS_SHUTDOWN", 0.1)
    monkeypatch.setattr(datasets.config, "HF_UPDATE_DOWNLOAD_COUNTS", False)


@pytest.fixture(scope="module")
def pictures():
    """20 real digits, two of each."""
    images, labels = load_digits(sizes=(20, 0, 0)).train
    return [Image.fromarray(image) for image in images], labels.tolist()


@pytest.fixture
def folder(pictures, tmp_path):
    for number, (image, label) in enumerate(zip(*pictures, strict=True)):
        target = tmp_path / "train" / f"digit {label}"
        target.mkdir(parents=True, exist_ok=True)
        image.save(target / f"{number:02}.{'jpg' if number % 2 else 'png'}")
    return tmp_path / "train"


FEATURES = datasets.Features(
    {
        "img": datasets.Image(),
        "fine_label": datasets.ClassLabel(names=list("0123456789")),
        "coarse_label": datasets.Value("int64"),
    }
)


def table(pictures, **replaced):
    images, labels = pictures
    columns = {
        "img": [{"bytes": encode(image), "path": f"{i}.png"} for i, image in enumerate(images)],
        "fine_label": labels,
        "coarse_label": [label // 5 for label in labels],
    }
    features = FEATURES.copy()
    for name, (values, feature) in replaced.items():
        columns[name], features[name] = values, feature
    return datasets.Dataset.from_dict(columns, features=features)


@pytest.fixture
def parquet(pictures, tmp_path):
    """The same pictures as two Parquet files, the form in which they come from the Hub."""
    whole = table(pictures)
    for shard in range(2):
        whole.shard(2, shard).to_parquet(tmp_path / f"train-{shard}.parquet")
    return {"data_files": str(tmp_path / "train-*.parquet"), "cache_dir": str(tmp_path / "cache")}


def by_hub(data, transform=TRAIN, **options):
    return HubImageDataset(data, transform, **{"image_column": "img", "label_column": "fine_label", **options})


def views(dataset, workers=0, **options):
    return torch.cat(
        [b["pixel_values"] for b in DataLoader(dataset, 7, collate_fn=collate, num_workers=workers, **options)]
    )


# Modes --------------------------------------------------------------------------------------------


def test_16_bit_grey_is_scaled_not_clipped():
    grey = np.array([[0, 128, 129, 257], [255 * 128, 32896, 65534, 65535]], dtype=np.uint16)
    # 257 steps of 16 bits are one of 8 bits; between two, the nearer.
    expected = np.rint(grey / 257).astype(np.uint8)
    assert expected.tolist() == [[0, 0, 1, 1], [127, 128, 255, 255]]
    for image in (
        Image.fromarray(grey),
        Image.open(io.BytesIO(encode(Image.fromarray(grey)))),
        Image.fromarray(grey.astype(np.int32)),
    ):
        assert image.mode in ("I;16", "I")
        rgb = to_rgb(image)
        assert rgb.mode == "RGB"
        for channel in range(3):
            assert np.array_equal(np.asarray(rgb)[..., channel], expected)


def test_transparency_is_dropped_and_colours_are_kept():
    rgba = np.random.default_rng(0).integers(0, 256, (5, 4, 4), dtype=np.uint8)
    assert np.array_equal(np.asarray(to_rgb(Image.fromarray(rgba))), rgba[..., :3])
    grey_alpha = np.asarray(to_rgb(Image.fromarray(rgba[..., :2])))
    assert all(np.array_equal(grey_alpha[..., channel], rgba[..., 0]) for channel in range(3))


def test_palette():
    image = Image.new("P", (2, 1))
    image.putpalette([10, 20, 30, 200, 100, 50])
    image.putpixel((1, 0), 1)
    assert np.asarray(to_rgb(image)).tolist() == [[[10, 20, 30], [200, 100, 50]]]
    image.info["transparency"] = b"\x00\xff"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert np.asarray(to_rgb(image)).tolist() == [[[10, 20, 30], [200, 100, 50]]]


def test_cmyk():
    image = Image.fromarray(np.array([[[0, 0, 0, 0], [0, 255, 255, 0], [0, 0, 0, 255]]], dtype=np.uint8), "CMYK")
    assert np.asarray(to_rgb(image)).tolist() == [[[255, 255, 255], [255, 0, 0], [0, 0, 0]]]
    jpeg = np.asarray(load_image(encode(image.resize((24, 8), Image.Resampling.NEAREST), "JPEG", quality=100))).astype(
        int
    )
    assert abs(jpeg[4, 4] - 255).max() < 12
    assert abs(jpeg[4, 12] - [255, 0, 0]).max() < 12
    assert jpeg[4, 20].max() < 12


@pytest.mark.parametrize(
    "mode",
    ["1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr", "HSV", "I", "I;16", "I;16B"],
)
@pytest.mark.parametrize("transform", [TRAIN, EVAL, train_transform(), eval_transform()])
def test_one_pixel_of_any_mode_becomes_a_view(mode, transform):
    rgb = to_rgb(Image.new(mode, (1, 1)))
    assert rgb.mode == "RGB"
    assert rgb.size == (1, 1)
    view = transform(rgb)
    assert view.shape in ((3, 16, 16), (3, 224, 224))
    assert view.isfinite().all()
    assert view.flatten(1).std(dim=1).max() < 1e-5


@pytest.mark.parametrize(("mode", "value"), [("F", 0.5), ("I", 70000), ("I", -1)])
def test_pixels_without_a_range_are_refused(mode, value):
    with pytest.raises(
        ValueError, match=rf"Cannot read image scan 3: its pixels \(PIL mode {mode}\) have no agreed range"
    ):
        load_image(Image.new(mode, (2, 2), value), "scan 3")


def test_exif_orientation_is_applied_in_folders_and_tables(tmp_path):
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (4, 6), dtype=np.uint8))
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees clockwise
    (tmp_path / "a").mkdir()
    image.save(tmp_path / "a" / "0.png", exif=exif)
    data = datasets.Dataset.from_dict({"image": [str(tmp_path / "a" / "0.png")], "label": [0]}).cast_column(
        "image", datasets.Image()
    )
    expected = np.rot90(np.asarray(image), -1)
    for dataset in (ImageFolderDataset(tmp_path, EVAL), HubImageDataset(data, EVAL)):
        assert np.array_equal(np.asarray(dataset.image(0))[..., 0], expected)
    assert np.array_equal(np.asarray(data[0]["image"]), expected)


# Unreadable files ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "the file is empty"),
        (b"<html>not found</html>", "it is not an image in a format that PIL knows"),
        (encode(Image.effect_noise((64, 64), 50))[:900], "image file is truncated"),
        (
            encode(Image.effect_noise((64, 64), 50), "JPEG")[:900],
            r"image file is truncated \(\d+ bytes not processed\)",
        ),
    ],
    ids=["empty", "html", "png", "jpeg"],
)
def test_unreadable_images_are_named(folder, pictures, content, reason):
    (folder / "digit 0" / "broken.png").write_bytes(content)
    dataset = ImageFolderDataset(folder, TRAIN)
    row = next(i for i, path in enumerate(dataset.paths) if "broken" in path)
    message = rf"Cannot read image \S*/digit 0/broken\.png: {reason}.*\. Remove it from the data set or replace it\."
    with pytest.raises(ValueError, match=message):
        dataset[row]

    cells = [{"bytes": encode(image), "path": None} for image in pictures[0]]
    cells[4] = {"bytes": content, "path": "n01.png"}
    dataset = by_hub(table(pictures, img=(cells, datasets.Image())))
    assert dataset[3]["index"] == 3
    with pytest.raises(ValueError, match=rf"Cannot read image n01\.png \(row 4\): {reason}"):
        dataset[4]


def test_unreadable_images_are_named_by_workers_too(folder):
    (folder / "digit 0" / "broken.png").write_bytes(b"GIF?")
    loader = iter(DataLoader(ImageFolderDataset(folder, TRAIN), batch_size=21, collate_fn=collate, num_workers=1))
    with pytest.raises(ValueError, match=r"Cannot read image \S*/digit 0/broken\.png: it is not an image"):
        next(loader)
    loader._shutdown_workers()  # left to the garbage collector, this iterator waits 5 seconds for its worker


def test_a_file_that_went_away_and_an_empty_cell(folder, pictures):
    dataset = ImageFolderDataset(folder, TRAIN)
    (folder / "digit 0").rename(folder / "gone")
    with pytest.raises(ValueError, match=r"Cannot read image .*digit 0.*: No such file or directory\."):
        dataset[0]
    cells = [{"bytes": encode(image), "path": None} for image in pictures[0][:-1]] + [None]
    with pytest.raises(ValueError, match=r"Cannot read image row 19: the row holds none"):
        by_hub(table(pictures, img=(cells, datasets.Image())))[19]


# Folders ------------------------------------------------------------------------------------------


def test_folder(folder, pictures):
    dataset = ImageFolderDataset(folder, EVAL)
    assert len(dataset) == 20
    assert dataset.num_classes == 10
    assert dataset.class_names == [f"digit {i}" for i in range(10)]
    assert np.bincount(dataset.labels).tolist() == [2] * 10
    for index in (0, 13, 19):
        number = int(dataset.paths[index][-6:-4])
        sample = dataset[index]
        assert sample["labels"] == dataset.labels[index] == pictures[1][number]
        assert sample["index"] == index
        if dataset.paths[index].endswith("png"):
            assert torch.equal(sample["pixel_values"], EVAL(pictures[0][number].convert("RGB")))
    assert dataset[-1]["index"] == 19
    with pytest.raises(IndexError):
        dataset[20]
    batch = collate([dataset[3], dataset[4]])
    assert batch["pixel_values"].shape == (2, 3, 16, 16)
    assert batch["labels"].dtype == batch["index"].dtype == torch.int64


def test_an_evaluation_folder_that_lacks_classes_keeps_their_numbers(folder, tmp_path):
    names = ImageFolderDataset(folder, EVAL).class_names
    (tmp_path / "val").mkdir()
    (folder / "digit 7").rename(tmp_path / "val" / "digit 7")
    assert ImageFolderDataset(tmp_path / "val", EVAL).labels == [0, 0]
    dataset = ImageFolderDataset(tmp_path / "val", EVAL, class_names=names)
    assert dataset.labels == [7, 7]
    assert dataset.num_classes == 10


# Hub data sets ------------------------------------------------------------------------------------


def test_hub_data_set(pictures):
    dataset = by_hub(table(pictures), EVAL)
    assert len(dataset) == 20
    assert dataset.num_classes == 10
    assert dataset.class_names == list("0123456789")
    assert dataset.labels.tolist() == pictures[1]
    sample = dataset[11]
    assert sample.keys() == {"pixel_values", "labels", "index"}
    assert (sample["labels"], sample["index"]) == (pictures[1][11], 11)
    assert torch.equal(sample["pixel_values"], EVAL(pictures[0][11].convert("RGB")))


def test_hub_data_set_other_columns_and_reordered_rows(pictures):
    data = table(pictures).select([5, 3]).with_format("torch")
    dataset = by_hub(data, EVAL, label_column="coarse_label")
    assert dataset.labels.tolist() == [pictures[1][5] // 5, pictures[1][3] // 5]
    assert dataset.class_names is None
    assert torch.equal(dataset[1]["pixel_values"], EVAL(pictures[0][3].convert("RGB")))
    assert by_hub(table(pictures), EVAL, label_column="coarse_label").num_classes == 2
    assert by_hub(data, label_column="coarse_label", num_classes=7).num_classes == 7


def test_samples_without_label(pictures):
    some = [None if i % 2 else label for i, label in enumerate(pictures[1])]
    dataset = by_hub(table(pictures, fine_label=(some, FEATURES["fine_label"])))
    assert dataset.labels.tolist() == [-100 if i % 2 else label for i, label in enumerate(pictures[1])]
    assert dataset[1]["labels"] == -100
    assert dataset.num_classes == 10
    dataset = by_hub(table(pictures), label_column=None)
    assert dataset[0]["labels"] == -100
    assert set(dataset.labels) == {-100}
    assert dataset.class_names is None


def test_boolean_labels(pictures):
    dataset = by_hub(table(pictures, fine_label=([i < 5 for i in range(20)], datasets.Value("bool"))))
    assert dataset.labels.tolist() == [1] * 5 + [0] * 15
    assert dataset[0]["labels"] == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"image_column": "image"},
            r"no column 'image' \(did you mean 'img'\?\): it has 'img', 'fine_label', 'coarse_label'; set",
        ),
        (
            {"label_column": "Fine_Label"},
            r"no column 'Fine_Label' \(did you mean 'fine_label'.*; set `label_column` .* or None",
        ),
        ({"label_column": "zzz"}, r"no column 'zzz': it has 'img', 'fine_label', 'coarse_label'"),
        ({"image_column": "fine_label"}, r"Column 'fine_label' holds ClassLabel.*, not images: .*cast_column"),
        ({"label_column": "img"}, r"Column 'img' holds Image.*, not integer class labels"),
        (
            {"num_classes": 5},
            r"Label [5-9] in row \d+ is out of range: labels must be in 0\.\.4, or -100 where there is none\.",
        ),
    ],
)
def test_bad_columns(pictures, options, message):
    with pytest.raises(ValueError, match=message):
        by_hub(table(pictures), **options)
    if "num_classes" not in options:
        with pytest.raises(ValueError, match=message):
            HubImageStream(
                table(pictures).to_iterable_dataset(),
                TRAIN,
                **{"image_column": "img", "label_column": "fine_label", **options},
            )


def test_bad_labels_and_data_sets(pictures):
    negative = [-1, -1, *pictures[1][2:]]
    with pytest.raises(ValueError, match=r"Label -1 in row 0 is out of range: .* 2 rows are like it\."):
        by_hub(table(pictures, fine_label=(negative, datasets.Value("int64"))))
    words = [str(label) for label in pictures[1]]
    with pytest.raises(
        ValueError, match=r"'fine_label' holds Value\('string'\), not integer class labels: .*`class_encode_column`"
    ):
        by_hub(table(pictures, fine_label=(words, datasets.Value("string"))))
    with pytest.raises(ValueError, match="data set is empty"):
        by_hub(table(pictures).select([]))
    with pytest.raises(TypeError, match="dict of splits: choose one of 'train', 'test'"):
        by_hub(datasets.DatasetDict({"train": table(pictures), "test": table(pictures)}))
    with pytest.raises(TypeError, match=r"must be a datasets\.Dataset, got list"):
        by_hub([1, 2])


# Views --------------------------------------------------------------------------------------------


def test_view_seed_tells_all_coordinates_apart():
    seeds = {view_seed(s, e, i) for s in range(8) for e in range(8) for i in range(64)}
    assert len(seeds) == 8 * 8 * 64
    assert view_seed(1, 23, 4) != view_seed(12, 3, 4)
    assert all(0 <= seed < 2**63 for seed in seeds)


def draws():
    return torch.rand(2).tolist(), random.random(), np.random.rand(), np.random.randn(), torch.randn(3).tolist()


def test_view_rng_fixes_and_restores_all_generators():
    torch.manual_seed(5), random.seed(5), np.random.seed(5)
    np.random.randn()  # leaves the second number of its pair behind, which is a part of the state too
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()
    with view_rng(1, 2, 3):
        inside = draws()
    draws()
    again = []

    def fail():
        with view_rng(1, 2, 3):
            again.append(draws())
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert again == [inside]
    with view_rng(1, 2, 4):
        assert not any(a == b for a, b in zip(draws(), inside, strict=True))

    torch.manual_seed(5), random.seed(5), np.random.seed(5)
    np.random.randn()
    with view_rng(1, 2, 3):
        draws()
    assert torch.equal(torch.get_rng_state(), before[0])
    assert random.getstate() == before[1]
    after = np.random.get_state()
    assert np.array_equal(after[1], before[2][1])
    assert after[2:] == before[2][2:]


def test_view_rng_is_cheap():
    times = []
    for number in range(300):
        start = time.perf_counter()
        with view_rng(0, 0, number):
            pass
        times.append(time.perf_counter() - start)
    # About 0.1 ms; decoding a photograph takes 2 ms and its transform 1 ms.
    assert min(times) < 5e-4


def timm_style(image):
    """Draws as timm's transforms do: from `random` and numpy beside torch."""
    image = image.rotate(random.uniform(-30, 30))
    view = TRAIN(image) * np.random.rand()
    return view + 0.1 * torch.randn(view.shape)


@pytest.mark.parametrize("transform", [TRAIN, timm_style])
def test_views_do_not_depend_on_workers_order_or_process(folder, pictures, transform):
    for make in (
        lambda: ImageFolderDataset(folder, transform, seed=3),
        lambda: by_hub(table(pictures), transform, seed=3),
    ):
        dataset = make()
        first = views(dataset)
        assert torch.equal(views(dataset), first)
        assert torch.equal(views(dataset, workers=2), first)
        torch.manual_seed(1), random.seed(1), np.random.seed(1)
        again = make()  # as a new process would
        for index in (13, 2, 13):
            assert torch.equal(again[index]["pixel_values"], first[index])


def test_views_differ_by_epoch_seed_and_sample(folder):
    dataset = ImageFolderDataset(folder, TRAIN, seed=3)
    assert dataset.epoch == 0
    first = views(dataset)
    dataset.set_epoch(1)
    assert dataset.epoch == 1
    second = views(dataset)
    other = views(ImageFolderDataset(folder, TRAIN, seed=4))
    for changed in (second, other):
        assert ((changed - first).abs().amax(dim=(1, 2, 3)) > 0.1).sum() >= 18
    dataset.set_epoch(0)
    assert torch.equal(views(dataset), first)

    same = Image.effect_noise((32, 32), 80)
    data = datasets.Dataset.from_dict({"image": [encode(same)] * 5, "label": [0] * 5}).cast_column(
        "image", datasets.Image()
    )
    assert len({view.numpy().tobytes() for view in views(HubImageDataset(data, TRAIN))}) == 5


def test_reading_leaves_the_global_generators_alone(folder):
    dataset = ImageFolderDataset(folder, timm_style)
    torch.manual_seed(7), random.seed(7), np.random.seed(7)
    expected = draws()
    torch.manual_seed(7), random.seed(7), np.random.seed(7)
    for index in range(len(dataset)):
        dataset[index]
    assert draws() == expected


def test_persistent_workers_see_the_epoch(folder):
    dataset = ImageFolderDataset(folder, TRAIN)
    expected = []
    for epoch in range(3):
        dataset.set_epoch(epoch)
        expected.append(views(dataset))
    dataset.set_epoch(0)
    loader = DataLoader(dataset, 7, collate_fn=collate, num_workers=1, persistent_workers=True)
    for epoch in (0, 1, 2, 1):
        dataset.set_epoch(epoch)
        assert torch.equal(torch.cat([batch["pixel_values"] for batch in loader]), expected[epoch])


def test_spawned_workers_share_the_epoch(folder, pictures):
    for dataset in (ImageFolderDataset(folder, TRAIN), by_hub(table(pictures))):
        # How a data set travels to a process that was spawned and not forked.
        copy = pickle.loads(multiprocessing.reduction.ForkingPickler.dumps(dataset))
        dataset.set_epoch(5)
        assert copy.epoch == 5
        assert torch.equal(copy[3]["pixel_values"], dataset[3]["pixel_values"])


def test_epoch_reaches_data_sets_inside_others(folder):
    dataset = ImageFolderDataset(folder, TRAIN)
    set_dataset_epoch(ConcatDataset([Subset(Subset(dataset, [1, 2]), [0]), [0]]), 4)
    assert dataset.epoch == 4


class Probe(torch.nn.Module):
    """Logits from mean pixels; remembers which view each step saw."""

    def __init__(self):
        super().__init__()
        self.head = torch.nn.Linear(3, 10)
        self.seen = []

    def forward(self, pixel_values, labels):
        self.seen.append(pixel_values.double().sum().item())
        logits = self.head(pixel_values.mean(dim=(2, 3)))
        return {"loss": torch.nn.functional.cross_entropy(logits, labels), "logits": logits}


def fit(folder, output, workers=0, callbacks=(EpochCallback,), resume=None, transform=TRAIN):
    arguments = TrainingArguments(
        output_dir=str(output),
        num_train_epochs=3,
        per_device_train_batch_size=5,
        save_strategy="steps",
        save_steps=6,
        dataloader_num_workers=workers,
        dataloader_persistent_workers=workers > 0,
        disable_tqdm=True,
        report_to="none",
        use_cpu=True,
    )
    model = Probe()
    dataset = ImageFolderDataset(folder, transform)
    Trainer(
        model=model, args=arguments, train_dataset=dataset, data_collator=collate, callbacks=[c() for c in callbacks]
    ).train(resume_from_checkpoint=resume)
    return model.seen, dataset


def test_trainer_gives_each_epoch_its_views_and_resumes_with_them(folder, tmp_path):
    seen, dataset = fit(folder, tmp_path / "run")
    assert len(seen) == 12
    assert dataset.epoch == 2
    totals = [sum(seen[i : i + 4]) for i in (0, 4, 8)]
    for epoch, total in enumerate(totals):  # the order within an epoch is the sampler's; the sum has none
        dataset.set_epoch(epoch)
        assert total == pytest.approx(views(dataset).double().sum().item(), rel=1e-9)
    # Step 6 lies in the middle of the second epoch.
    resumed, dataset = fit(folder, tmp_path / "run", resume=str(tmp_path / "run" / "checkpoint-6"))
    assert resumed == seen[6:]
    assert dataset.epoch == 2
    with_workers, _ = fit(folder, tmp_path / "workers", workers=2)
    assert with_workers == seen


def test_epoch_is_set_where_the_loader_of_several_processes_does_not(folder):
    """accelerate's loader sets the epoch of a sampler one level down, or else that of the data set."""
    from accelerate.data_loader import prepare_data_loader

    dataset = ImageFolderDataset(folder, TRAIN)
    loader = prepare_data_loader(
        DataLoader(dataset, 5, shuffle=True, collate_fn=collate),
        num_processes=2,
        process_index=1,
        use_seedable_sampler=True,
    )
    state = type("State", (), {"epoch": 1.9999999})
    EpochCallback().on_epoch_begin(None, state, None, train_dataloader=loader)
    loader.set_epoch(2)
    rows = torch.cat([batch["index"] for batch in loader])
    assert dataset.epoch == 2
    assert len(rows) == 10


# Streams ------------------------------------------------------------------------------------------


def stream(parquet, transform=TRAIN, **options):
    return load_image_dataset(
        dataset_name="parquet",
        transform=transform,
        streaming=True,
        image_column="img",
        label_column="fine_label",
        **options,
        **parquet,
    )


def contents(samples):
    return sorted((sample["labels"], sample["pixel_values"].numpy().tobytes()) for sample in samples)


def each(batches):
    return [
        {"labels": int(label), "pixel_values": view}
        for batch in batches
        for label, view in zip(batch["labels"], batch["pixel_values"], strict=True)
    ]


def test_stream_reads_what_the_table_holds(parquet, pictures):
    data = stream(parquet, EVAL)
    assert isinstance(data, HubImageStream)
    assert data.num_classes == 10
    assert data.class_names == list("0123456789")
    samples = list(data)
    assert [sample["labels"] for sample in samples] == [*pictures[1][:10], *pictures[1][10:]]
    for sample, image in zip(samples, pictures[0], strict=True):
        assert sample.keys() == {"pixel_values", "labels"}
        assert torch.equal(sample["pixel_values"], EVAL(image.convert("RGB")))


def test_stream_views_do_not_depend_on_workers_or_order(parquet):
    data = stream(parquet, timm_style)
    first = contents(data)
    assert len(first) == 20
    torch.manual_seed(1)
    assert contents(data) == first
    loader = DataLoader(data, 4, collate_fn=collate, num_workers=2, persistent_workers=True)
    assert contents(each(loader)) == first
    assert contents(stream(parquet, timm_style, shuffle_buffer=20)) == first
    data.set_epoch(1)
    second = contents(data)
    assert not {view for _, view in second} & {view for _, view in first}
    assert contents(each(loader)) == second
    assert contents(stream(parquet, timm_style, seed=1)) != first


def test_stream_order_is_shuffled_anew_each_epoch(parquet, pictures):
    data = stream(parquet, EVAL, shuffle_buffer=20)

    def order():
        return [sample["pixel_values"].sum().item() for sample in data]

    first = order()
    assert order() == first
    assert first != [sample["pixel_values"].sum().item() for sample in stream(parquet, EVAL)]
    data.set_epoch(1)
    assert order() != first
    assert sorted(order()) == sorted(first)


def test_stream_is_shared_out_among_processes(parquet):
    from accelerate.data_loader import prepare_data_loader

    data = stream(parquet)
    parts = []
    for rank in range(2):
        loader = prepare_data_loader(
            DataLoader(data, 5, collate_fn=collate), num_processes=2, process_index=rank, dispatch_batches=False
        )
        loader.set_epoch(3)
        assert data.epoch == 3
        parts.append(contents(each(loader)))
    assert [len(part) for part in parts] == [10, 10]
    assert sorted(parts[0] + parts[1]) == contents(data)


def test_length_of_a_stream(parquet):
    with pytest.raises(
        TypeError, match="length of this stream is not known: give `num_examples`, or train by `max_steps`"
    ):
        len(stream(parquet))
    known = HubImageStream(
        datasets.Dataset.from_dict({"image": [encode(Image.new("L", (4, 4)))]})
        .cast_column("image", datasets.Image())
        .to_iterable_dataset(),
        EVAL,
        label_column=None,
        num_examples=1,
    )
    assert len(known) == 1
    assert [sample["labels"] for sample in known] == [-100]


def test_bad_streams(pictures):
    def make(data, **options):
        return HubImageStream(
            data.to_iterable_dataset(), TRAIN, image_column="img", label_column="fine_label", **options
        )

    with pytest.raises(ValueError, match="data set is empty: the stream has no row"):
        HubImageStream(datasets.IterableDataset.from_generator(lambda: iter(())), TRAIN)
    with pytest.raises(TypeError, match=r"must be a datasets\.IterableDataset, got Dataset"):
        HubImageStream(table(pictures), TRAIN)
    with pytest.raises(ValueError, match="`shuffle_buffer` must be a number of samples, at least 0, got -1"):
        make(table(pictures), shuffle_buffer=-1)
    labels = [*pictures[1][:3], 12, *pictures[1][4:]]
    with pytest.raises(
        ValueError, match=r"Label 12 at number 3 of the stream is out of range: labels must be in 0\.\.9"
    ):
        list(make(table(pictures, fine_label=(labels, datasets.Value("int64"))), num_classes=10))
    cells = [{"bytes": encode(image), "path": None} for image in pictures[0]]
    cells[2] = {"bytes": b"GIF?", "path": "n02.gif"}
    with pytest.raises(ValueError, match=r"Cannot read image n02\.gif \(number 2 of the stream\): it is not an image"):
        list(make(table(pictures, img=(cells, datasets.Image()))))


# One door -----------------------------------------------------------------------------------------


def test_load_image_dataset(folder, parquet):
    assert len(load_image_dataset(folder, transform=EVAL)) == 20
    dataset = load_image_dataset(
        dataset_name="parquet", transform=EVAL, image_column="img", label_column="fine_label", **parquet
    )
    assert isinstance(dataset, HubImageDataset)
    assert len(dataset) == 20
    assert contents(dataset[i] for i in range(20)) == contents(stream(parquet, EVAL))


def test_load_image_dataset_says_what_is_wrong(folder, tmp_path, parquet):
    with pytest.raises(ValueError, match=r"Give either a folder .* got neither of `split_dir` and `dataset_name`"):
        load_image_dataset(transform=EVAL)
    with pytest.raises(ValueError, match=r"got both of"):
        load_image_dataset(folder, "cifar100", transform=EVAL)
    with pytest.raises(ValueError, match="`streaming` is for `dataset_name`"):
        load_image_dataset(folder, transform=EVAL, streaming=True)
    with pytest.raises(ValueError, match="`shuffle_buffer` needs `streaming=True`"):
        load_image_dataset(dataset_name="parquet", transform=EVAL, shuffle_buffer=5, **parquet)
    with pytest.raises(
        ValueError, match=r"Cannot load split 'val' of data set 'parquet': Unknown split .*train.* Check the name"
    ):
        load_image_dataset(dataset_name="parquet", transform=EVAL, split="val", **parquet)
    with pytest.raises(ValueError, match=r"Cannot load split 'train' of data set '\S*nothing': .*give a local folder"):
        load_image_dataset(dataset_name=str(tmp_path / "nothing"), transform=EVAL)


# Transforms ---------------------------------------------------------------------------------------


def test_eval_transform_is_the_protocol():
    image = Image.effect_noise((500, 375), 80).convert("RGB")
    view = eval_transform()(image)
    small = image.resize((341, 256), Image.Resampling.BILINEAR)
    left, top = round((341 - 224) / 2), 16
    crop = np.asarray(small)[top : top + 224, left : left + 224].transpose(2, 0, 1) / 255
    mean, std = (np.array(v)[:, None, None] for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    np.testing.assert_allclose(view.numpy(), (crop - mean) / std, atol=1e-5)
    assert view.dtype == torch.float32
    assert view.shape == (3, 224, 224)


def test_eval_transform_options():
    image = Image.effect_noise((96, 96), 80).convert("RGB")
    plain = eval_transform(32, resize=48, mean=(0, 0, 0), std=(1, 1, 1), interpolation="bicubic")(image)
    expected = np.asarray(image.resize((48, 48), Image.Resampling.BICUBIC))[8:40, 8:40].transpose(2, 0, 1) / 255
    np.testing.assert_allclose(plain.numpy(), expected, atol=1e-6)
    assert eval_transform(112)(image).shape == (3, 112, 112)


def test_train_transform_is_the_protocol():
    steps = train_transform().transforms
    crop, flip = steps[0], steps[1]
    assert isinstance(crop, v2.RandomResizedCrop)
    assert isinstance(flip, v2.RandomHorizontalFlip)
    assert tuple(crop.size) == (224, 224)
    assert tuple(crop.scale) == (0.08, 1.0)
    assert tuple(crop.ratio) == (3 / 4, 4 / 3)
    assert crop.interpolation.value == "bilinear"
    assert crop.antialias
    assert flip.p == 0.5
    reference = v2.Compose(
        [
            v2.RandomResizedCrop(224),
            v2.RandomHorizontalFlip(),
            v2.ToImage(),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
        ]
    )
    image = Image.effect_noise((300, 260), 80).convert("RGB")
    for seed in range(3):
        with view_rng(0, 0, seed):
            view = train_transform()(image)
        with view_rng(0, 0, seed):
            assert torch.equal(view, reference(image))


@pytest.mark.parametrize("make", [train_transform, eval_transform])
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"interpolation": "cubic"}, r"must be one of 'nearest'.*'bicubic'.*, got 'cubic'"),
        ({"mean": (0.5,)}, r"`mean` must hold 3 numbers \(R, G, B\), got \[0\.5\]"),
        ({"std": (0.2, 0.0, 0.2)}, r"`std` must be positive"),
        ({"size": 0}, r"`size` must be a positive number of pixels, got 0"),
    ],
)
def test_bad_transform_options(make, options, message):
    with pytest.raises(ValueError, match=message):
        make(**options)


def test_a_crop_larger_than_the_picture_is_refused():
    with pytest.raises(ValueError, match=r"`resize` must be at least `size` \(224\), got 200"):
        eval_transform(resize=200)
