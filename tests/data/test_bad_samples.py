"""Samples that cannot be read: what takes their place, who hears of it, and when it is too many."""

import copy
import io
import logging
import multiprocessing.reduction
import pickle
import re

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from tiny import config, networks
from torch.utils.data import ConcatDataset, DataLoader, Dataset, Subset

from hf_kd import DistillationTrainer
from hf_kd.data import (
    DigitsDataset,
    HubImageDataset,
    HubImageStream,
    ImageFolderDataset,
    SkippingDataset,
    collate,
    eval_transform,
    load_digits,
    set_dataset_epoch,
)


EVAL = eval_transform(8)


class Numbers(Dataset):
    """Samples that say which they are; reading one of `bad` raises, and `later` ones from the second epoch on."""

    class_names = ("even", "odd")

    def __init__(self, count, bad=(), later=(), error=ValueError):
        self.count, self.bad, self.later, self.error = count, set(bad), set(later), error
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()

    def set_epoch(self, epoch):
        self._epoch.fill_(epoch)

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        if index in self.bad or (index in self.later and self._epoch > 0):
            raise self.error(f"number {index} is bad")
        return {"pixel_values": torch.full((2,), float(index)), "labels": index % 2, "index": index}


class Batches(Numbers):
    """The same, as batches put together at once."""

    def __getitems__(self, indices):
        if not set(indices) <= set(range(self.count)) - self.bad:
            raise RuntimeError("a batch with a bad sample in it")
        rows = torch.tensor(indices)
        return {"pixel_values": rows[:, None].expand(-1, 2).float(), "labels": rows % 2, "index": rows}


def indices_of(dataset, workers=0, **options):
    loader = DataLoader(dataset, 4, collate_fn=collate, num_workers=workers, **options)
    return [index for batch in loader for index in batch["index"].tolist()]


def warnings_of(caplog):
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


# What takes the place ---------------------------------------------------------------------------------------------


def test_good_data_pass_as_they_are(caplog):
    base = Numbers(10)
    dataset = SkippingDataset(base)
    assert len(dataset) == 10
    assert [dataset[i]["index"] for i in (0, 9, -1)] == [0, 9, 9]
    assert indices_of(dataset) == list(range(10))
    assert dataset.bad_indices == []
    assert warnings_of(caplog) == []


def test_another_sample_takes_the_place_and_keeps_its_number(caplog):
    dataset = SkippingDataset(Numbers(20, bad={3, 11}))
    # Hashes of the index: these numbers are the same everywhere and for ever.
    assert indices_of(dataset) == [0, 1, 2, 14, 4, 5, 6, 7, 8, 9, 10, 0, *range(12, 20)]
    assert dataset[3]["labels"] == 0
    assert dataset[3]["pixel_values"].tolist() == [14.0, 14.0]
    assert dataset.bad_indices == [3, 11]
    assert warnings_of(caplog) == [
        "Sample 3 cannot be read, sample 14 takes its place: number 3 is bad",
        "Sample 11 cannot be read, sample 0 takes its place: number 11 is bad",
    ]


def test_workers_and_epochs_choose_the_same_and_report():
    bad = {0, 3, 4, 11, 17}
    expected = indices_of(SkippingDataset(Numbers(20, bad)))
    dataset = SkippingDataset(Numbers(20, bad))
    assert indices_of(dataset, workers=2) == expected
    assert dataset.bad_indices == sorted(bad)
    dataset.set_epoch(1)
    assert indices_of(dataset) == expected


def test_persistent_workers_report_what_becomes_bad_later():
    dataset = SkippingDataset(Numbers(12, bad={5}, later={8}))
    loader = DataLoader(dataset, 4, collate_fn=collate, num_workers=2, persistent_workers=True)
    first = torch.cat([batch["index"] for batch in loader]).tolist()
    assert dataset.bad_indices == [5]
    set_dataset_epoch(dataset, 1)
    second = torch.cat([batch["index"] for batch in loader]).tolist()
    assert dataset.bad_indices == [5, 8]
    assert [i for i in range(12) if first[i] != i] == [5]
    assert [i for i in range(12) if second[i] != i] == [5, 8]
    assert first[5] == second[5]


def test_a_bad_replacement_is_passed_over_and_named_once(caplog):
    # 14 would take the place of 3, and 1 comes after it.
    dataset = SkippingDataset(Numbers(20, bad={3, 14}, error=OSError))
    assert [dataset[index]["index"] for index in (3, 14, 3)][::2] == [1, 1]
    assert dataset.bad_indices == [3, 14]
    assert warnings_of(caplog) == [
        "Sample 3 cannot be read, sample 1 takes its place: OSError: number 3 is bad",
        "Sample 14 cannot be read, sample 1 takes its place: OSError: number 14 is bad",
    ]


@pytest.mark.parametrize("count", [2, 3, 9])
def test_the_one_good_sample_among_nine_is_found(count):
    dataset = SkippingDataset(Numbers(count, bad=set(range(count)) - {1}))
    assert [dataset[i]["index"] for i in range(count)] == [1] * count
    assert dataset.bad_indices == [i for i in range(count) if i != 1]


# When it is too many ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("count", "message", "found"),
    [
        (30, "Sample 4 and its 8 replacements could not be read, so the data set or its transform is at fault", 9),
        (6, "Sample 4 and its 5 replacements could not be read, so", 6),
    ],
)
def test_when_all_are_bad_the_data_set_is_at_fault(count, message, found):
    dataset = SkippingDataset(Numbers(count, bad=range(count), error=OSError))
    with pytest.raises(ValueError, match=message) as caught:
        dataset[4]
    assert re.search(r'on_bad_sample="raise".* The last error: OSError: number \d+ is bad$', str(caught.value))
    assert isinstance(caught.value.__cause__, OSError)
    assert len(dataset.bad_indices) == found


def test_one_or_two_samples():
    with pytest.raises(ValueError, match="Sample 0, the only one, could not be read"):
        SkippingDataset(Numbers(1, bad={0}))[0]
    with pytest.raises(ValueError, match="Sample 1 and its 1 replacement could not be read"):
        SkippingDataset(Numbers(2, bad={0, 1}))[1]
    assert len(SkippingDataset(Numbers(0))) == 0


def test_an_index_outside_is_no_bad_sample():
    dataset = SkippingDataset(Batches(10, bad={1}))
    for read in (dataset.__getitem__, lambda index: dataset.__getitems__([0, index])):
        for index in (10, -11):
            with pytest.raises(IndexError, match=f"Index {index} is outside this data set of 10 samples"):
                read(index)
    assert dataset.bad_indices == []
    # Python's way of going through what has no iterator ends by it.
    assert len(list(dataset)) == 10
    # One that a transform raises is a bad sample like any other.
    assert SkippingDataset(Numbers(10, bad={1}, error=IndexError))[1]["index"] != 1


@pytest.mark.parametrize("error", [MemoryError, KeyboardInterrupt, SystemExit])
def test_what_no_other_sample_can_help(error):
    dataset = SkippingDataset(Numbers(10, bad={1}, error=error))
    with pytest.raises(error):
        dataset[1]

    class Worse(Numbers):
        def __getitem__(self, index):
            raise (ValueError if index == 1 else error)

    # Nor one that stands in for another.
    dataset = SkippingDataset(Worse(10))
    with pytest.raises(error):
        dataset[1]
    assert dataset.bad_indices == []


# Batches ----------------------------------------------------------------------------------------------------------


def test_batches_pass_whole_and_are_read_one_by_one_where_they_fail():
    dataset = SkippingDataset(Batches(20, bad={3}))
    whole = dataset.__getitems__([4, 5])
    assert isinstance(whole, dict) and whole["index"].tolist() == [4, 5]
    parts = dataset.__getitems__([2, 3, 4])
    assert [sample["index"] for sample in parts] == [2, 14, 4]
    assert dataset.bad_indices == [3]
    for workers in (0, 2):
        assert indices_of(dataset, workers) == [0, 1, 2, 14, *range(4, 20)]


def test_a_batch_without_memory_is_not_tried_again():
    class Full(Numbers):
        def __getitems__(self, indices):
            raise MemoryError

    with pytest.raises(MemoryError):
        SkippingDataset(Full(3)).__getitems__([0])


def test_digits_as_batches():
    digits = DigitsDataset(*load_digits(sizes=(20, 0, 0)).train)
    dataset = SkippingDataset(digits)
    batch = dataset.__getitems__([3, 1])
    assert batch.keys() == {"pixel_values", "labels", "index"}
    assert torch.equal(batch["labels"], digits.labels[[3, 1]])


# Evaluation -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [0, 2])
def test_in_evaluation_a_replacement_has_no_label(workers):
    dataset = SkippingDataset(Numbers(20, bad={3, 4}), evaluation=True)
    loader = DataLoader(dataset, 5, collate_fn=collate, num_workers=workers)
    labels = torch.cat([batch["labels"] for batch in loader])
    assert labels.tolist() == [0, 1, 0, -100, -100, *(i % 2 for i in range(5, 20))]
    assert SkippingDataset(Numbers(20, bad={3}))[3]["labels"] == 0  # number 14's


@pytest.mark.parametrize("key", ["labels", "label"])
@pytest.mark.parametrize(
    "label", [2, 2.0, True, np.int64(2), torch.tensor(2), torch.tensor(2, dtype=torch.uint8), torch.tensor(2.0)]
)
@pytest.mark.parametrize("bad", [0, 1])
def test_labels_of_any_type_become_none_and_make_a_batch(key, label, bad):
    class Labelled(Numbers):
        def __getitem__(self, index):
            sample = super().__getitem__(index)
            del sample["labels"]
            return {**sample, key: label}

    dataset = SkippingDataset(Labelled(4, bad={bad}), evaluation=True)
    batch = collate([dataset[0], dataset[1]])
    value = float(label)
    assert batch["labels"].tolist() == ([-100.0, value] if bad == 0 else [value, -100.0])


def test_labels_that_cannot_be_taken_away():
    class Soft(Numbers):
        def __getitem__(self, index):
            return {**super().__getitem__(index), "labels": torch.tensor([0.5, 0.5])}

    class Pairs(Numbers):
        def __getitem__(self, index):
            return super().__getitem__(index)["index"], 0

    class Unlabelled(Numbers):
        def __getitem__(self, index):
            return {"index": super().__getitem__(index)["index"]}

    with pytest.raises(ValueError, match=r"replacement of sample 0 has a label of shape \(2,\), .*on_bad_sample"):
        SkippingDataset(Soft(4, bad={0}), evaluation=True)[0]
    with pytest.raises(TypeError, match="replacement of sample 0 is a tuple: samples must be dicts.*on_bad_sample"):
        SkippingDataset(Pairs(4, bad={0}), evaluation=True)[0]
    assert SkippingDataset(Unlabelled(4, bad={0}), evaluation=True)[0].keys() == {"index"}
    # Training takes them as they are.
    assert SkippingDataset(Soft(4, bad={0}))[0]["labels"].tolist() == [0.5, 0.5]
    assert SkippingDataset(Pairs(4, bad={0}))[0][1] == 0


# The rest of the data set -----------------------------------------------------------------------------------------


def test_the_rest_of_the_data_set_is_reachable():
    base = Numbers(10)
    dataset = SkippingDataset(base)
    assert dataset.class_names == ("even", "odd")
    assert dataset.count == 10
    assert not hasattr(dataset, "num_classes")
    with pytest.raises(AttributeError, match="num_classes"):
        _ = dataset.num_classes
    for wrapped in (dataset, SkippingDataset(Subset(base, [1, 2])), SkippingDataset(ConcatDataset([base, base]))):
        base.set_epoch(0)
        set_dataset_epoch(wrapped, 3)
        assert base._epoch == 3


@pytest.mark.parametrize("how", ["copy", "deepcopy", "pickle", "worker"])
def test_copies(how):
    dataset = SkippingDataset(Numbers(20, bad={3, 5}), evaluation=True)
    dataset[3]
    make = {
        "copy": copy.copy,
        "deepcopy": copy.deepcopy,
        "pickle": lambda original: pickle.loads(pickle.dumps(original)),
        # How a data set travels to a process that was spawned and not forked.
        "worker": lambda original: pickle.loads(multiprocessing.reduction.ForkingPickler.dumps(original)),
    }[how]
    other = make(dataset)
    assert other.bad_indices == [3]
    assert other.evaluation is True
    other[5]
    assert other.bad_indices == [3, 5]
    assert dataset.bad_indices == ([3, 5] if how in ("copy", "worker") else [3])
    # A copy's workers report to it as well.
    fresh = make(SkippingDataset(Numbers(20, bad={3, 5})))
    indices_of(fresh, workers=1)
    assert fresh.bad_indices == [3, 5]


def test_one_that_is_not_built_yet_has_nothing_to_forward_to():
    bare = SkippingDataset.__new__(SkippingDataset)
    for name in ("dataset", "class_names", "_bad"):
        with pytest.raises(AttributeError, match=f"SkippingDataset has no attribute '{name}'"):
            getattr(bare, name)


def test_streams_are_not_for_it():
    for rows in (datasets.IterableDataset.from_generator(lambda: iter([{"a": 1}])), stream(num_examples=12)):
        name = type(rows).__name__
        with pytest.raises(TypeError, match=f'a length and an index, got {name}; .* itself with on_bad_sample="skip"'):
            SkippingDataset(rows)


# Image files ------------------------------------------------------------------------------------------------------


def encode(image, format="PNG"):
    buffer = io.BytesIO()
    image.save(buffer, format)
    return buffer.getvalue()


NOISE = Image.effect_noise((64, 64), 50)
FAULTS = {
    "cut.jpg": (encode(NOISE, "JPEG")[:900], r"image file is truncated \(\d+ bytes not processed\)"),
    "text.png": (b"this is no picture", "it is not an image in a format that PIL knows"),
    "empty.jpg": (b"", "the file is empty"),
}


def colour(number):
    """A picture whose view tells which it is."""
    return Image.new("RGB", (8, 8), (number, 0, 0))


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("fault", FAULTS)
def test_folders(tmp_path, fault, workers, caplog):
    for number in range(12):
        (tmp_path / "ab"[number % 2]).mkdir(exist_ok=True)
        colour(number).save(tmp_path / "ab"[number % 2] / f"{number:02}.png")
    content, reason = FAULTS[fault]
    (tmp_path / "b" / fault).write_bytes(content)
    base = ImageFolderDataset(tmp_path, EVAL)
    bad = next(i for i, path in enumerate(base.paths) if path.endswith(fault))
    with pytest.raises(ValueError, match=rf"Cannot read image \S*/b/{fault}: {reason}\. Remove it"):
        base[bad]
    dataset = SkippingDataset(base)
    assert dataset.class_names == ["a", "b"] and dataset.num_classes == 2 and dataset.paths == base.paths
    batches = list(DataLoader(dataset, 4, collate_fn=collate, num_workers=workers))
    indices = torch.cat([batch["index"] for batch in batches]).tolist()
    assert [place for place, index in enumerate(indices) if place != index] == [bad]
    # Picture, label and number of the replacement belong together.
    pixels, labels = (torch.cat([batch[key] for batch in batches]) for key in ("pixel_values", "labels"))
    assert torch.equal(pixels[bad], base[indices[bad]]["pixel_values"])
    assert labels[bad] == base.labels[indices[bad]]
    assert dataset.bad_indices == [bad]
    if workers == 0:
        (warning,) = warnings_of(caplog)
        place = indices[bad]
        assert re.fullmatch(
            rf"Sample {bad} cannot be read, sample {place} takes its place: Cannot read image \S*/b/{fault}: {reason}"
            r"\. Remove it from the data set or replace it\.",
            warning,
        )


FEATURES = datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")})


def table(broken=None, count=12):
    """Rows of which those in `broken` (number: content) hold no picture."""
    cells = [{"bytes": encode(colour(i)), "path": f"{i:02}.png"} for i in range(count)]
    for number, content in (broken or {}).items():
        cells[number] = {"bytes": content, "path": f"{number:02}.png"}
    return datasets.Dataset.from_dict({"image": cells, "label": [i % 3 for i in range(count)]}, features=FEATURES)


@pytest.mark.parametrize("workers", [0, 2])
def test_tables(workers):
    base = HubImageDataset(table({2: b"", 7: b"GIF?"}), EVAL)
    dataset = SkippingDataset(base, evaluation=True)
    batches = list(DataLoader(dataset, 4, collate_fn=collate, num_workers=workers))
    labels = torch.cat([batch["labels"] for batch in batches])
    assert labels.tolist() == [-100 if i in (2, 7) else i % 3 for i in range(12)]
    assert dataset.bad_indices == [2, 7]
    assert dataset.labels.tolist() == [i % 3 for i in range(12)]


# Training ---------------------------------------------------------------------------------------------------------


def trainer(tmp_path, train=None, evaluation=None, **options):
    student, teacher = networks()
    return DistillationTrainer(
        student, teacher, config(tmp_path, **options), train_dataset=train, eval_dataset=evaluation
    )


@pytest.mark.parametrize("workers", [0, 2])
def test_training_goes_on_and_reports(tmp_path, workers, caplog):
    broken = HubImageDataset(table({2: b"", 7: b"GIF?"}, count=24), EVAL)
    if not workers:
        with pytest.raises(ValueError, match=r"Cannot read image 0[27]\.png \(row [27]\)"):
            trainer(tmp_path, broken).train()
    run = trainer(tmp_path, broken, dataloader_num_workers=workers, on_bad_sample="skip", num_train_epochs=2)
    assert run.train().global_step == 6
    # As if the replacements had been there from the beginning.
    rows = table(count=24).select([dict(zip((2, 7), (1, 0), strict=True)).get(i, i) for i in range(24)])
    other = trainer(tmp_path, HubImageDataset(rows, EVAL), num_train_epochs=2)
    other.train()
    weights, expected = run.model.state_dict(), other.model.state_dict()
    assert all(torch.equal(weights[key], expected[key]) for key in expected)
    reports = [text for text in warnings_of(caplog) if "could not be read" in text]
    assert len(reports) == 1 and "2 of 24" in reports[0] and "2, 7" in reports[0]


def test_evaluation_leaves_replacements_out(tmp_path):
    broken = HubImageDataset(table({2: b"", 7: b"GIF?"}, count=24), EVAL)
    whole = HubImageDataset(table(count=24).select([i for i in range(24) if i not in (2, 7)]), EVAL)
    measured = trainer(tmp_path, evaluation=broken, on_bad_sample="skip").evaluate()
    expected = trainer(tmp_path, evaluation=whole).evaluate()
    for name in ("eval_top1", "eval_top5", "eval_nll", "eval_ece", "eval_loss"):
        assert measured[name] == pytest.approx(expected[name], rel=1e-6)


# Streams ----------------------------------------------------------------------------------------------------------


def stream(broken=None, shards=1, **options):
    return HubImageStream(table(broken).to_iterable_dataset(num_shards=shards), EVAL, **options)


def labels_of(dataset, workers=0):
    loader = DataLoader(dataset, 4, collate_fn=collate, num_workers=workers)
    return sorted(torch.cat([batch["labels"] for batch in loader]).tolist())


def test_a_stream_raises_by_default():
    dataset = stream({2: b"GIF?"})
    assert dataset.on_bad_sample == "raise"
    with pytest.raises(ValueError, match=r"Cannot read image 02\.png \(number 2 of the stream\): it is not an image"):
        list(dataset)
    assert dataset.bad_count == 0


def test_a_stream_leaves_out_what_it_cannot_read(caplog):
    dataset = stream({2: b"GIF?", 7: b""}, on_bad_sample="skip")
    assert [sample["labels"] for sample in dataset] == [i % 3 for i in range(12) if i not in (2, 7)]
    assert dataset.bad_count == 2
    assert warnings_of(caplog) == [
        "An image is left out: Cannot read image 02.png (number 2 of the stream): it is not an image in a format that "
        "PIL knows. Remove it from the data set or replace it.",
        "An image is left out: Cannot read image 07.png (number 7 of the stream): the file is empty. Remove it from "
        "the data set or replace it.",
    ]
    list(dataset)
    assert dataset.bad_count == 4


def test_the_workers_of_a_stream_report():
    dataset = stream({2: b"GIF?", 7: b"", 8: b""}, shards=2)
    dataset.on_bad_sample = "skip"
    assert labels_of(dataset, workers=2) == sorted(i % 3 for i in range(12) if i not in (2, 7, 8))
    assert dataset.bad_count == 3


def test_a_stream_without_a_readable_image():
    dataset = stream(dict.fromkeys(range(12), b"GIF?"), on_bad_sample="skip")
    with pytest.raises(ValueError, match=r"Not one of the stream's 12 images could be read\. .*11\.png .*PIL knows"):
        list(dataset)
    assert dataset.bad_count == 12


def test_labels_are_not_skipped():
    dataset = stream(num_classes=2, on_bad_sample="skip")
    with pytest.raises(ValueError, match="Label 2 at number 2 of the stream is out of range"):
        list(dataset)


def test_what_a_stream_can_do_with_bad_samples():
    message = '`on_bad_sample` must be "raise" or "skip", got \'ignore\''
    with pytest.raises(ValueError, match=message):
        stream(on_bad_sample="ignore")
    dataset = stream()
    with pytest.raises(ValueError, match=message):
        dataset.on_bad_sample = "ignore"
    assert dataset.on_bad_sample == "raise"
