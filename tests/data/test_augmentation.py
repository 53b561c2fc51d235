"""RandAugment, colour jitter and random erasing: timm's, and a function of (seed, epoch, index) as every view is."""

import numpy as np
import pytest
import timm.data
import torch
from PIL import Image
from timm.data.auto_augment import RandAugment, rand_augment_transform
from timm.data.random_erasing import RandomErasing
from torch.utils.data import DataLoader
from torchvision import transforms

from hf_kd.data import ImageFolderDataset, collate, train_transform, view_rng


POLICY = "rand-m9-mstd0.5-inc1"
# DeiT's (arXiv 2012.12877, Table 9).
DEIT = {"auto_augment": POLICY, "color_jitter": 0.3, "random_erasing": 0.25, "interpolation": "bicubic"}


@pytest.fixture(scope="module")
def picture():
    noise = np.random.default_rng(0).integers(0, 256, (12, 16, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize((96, 72), Image.Resampling.BICUBIC)


def view(transform, picture, seed=0):
    with view_rng(seed, 0, 0):
        return transform(picture)


def test_the_view_is_that_of_timms_own_pipeline(picture):
    ours = train_transform(32, **DEIT)
    theirs = timm.data.create_transform(
        (3, 32, 32),
        is_training=True,
        color_jitter=0.3,
        auto_augment=POLICY,
        interpolation="bicubic",
        re_prob=0.25,
        re_mode="pixel",
        re_count=1,
    )
    views = [view(ours, picture, seed) for seed in range(20)]
    assert all(torch.equal(one, view(theirs, picture, seed)) for seed, one in enumerate(views))
    assert len({one.numpy().tobytes() for one in views}) == 20
    assert views[0].shape == (3, 32, 32) and views[0].dtype == torch.float32


def test_the_numbers():
    crop, flip, augment, _, normalise, erase = train_transform(224, **DEIT).transforms
    assert (crop.size, crop.scale, crop.ratio) == ((224, 224), (0.08, 1.0), (3 / 4, 4 / 3))
    assert crop.interpolation.value == "bicubic" and flip.p == 0.5
    assert isinstance(augment, RandAugment) and augment.num_layers == 2
    assert {(op.magnitude, op.magnitude_std, op.prob) for op in augment.ops} == {(9, 0.5, 0.5)}
    # inc1: operations that grow with the magnitude.
    assert {op.name for op in augment.ops} == {op.name for op in rand_augment_transform("rand-inc1").ops}
    hparams = augment.ops[0].kwargs
    assert hparams["fillcolor"] == (124, 116, 104) and hparams["resample"] == Image.Resampling.BICUBIC
    assert normalise.mean.tolist() == pytest.approx([0.485, 0.456, 0.406])
    assert isinstance(erase, RandomErasing)
    assert (erase.probability, erase.mode, erase.max_count) == (0.25, "pixel", 1)
    assert (erase.min_area, erase.max_area) == (0.02, 1 / 3)


def test_colour_jitter_is_for_views_without_a_policy():
    def jitters(**options):
        return [step for step in train_transform(32, **options).transforms if isinstance(step, transforms.ColorJitter)]

    (jitter,) = jitters(color_jitter=0.3)
    assert jitter.brightness == jitter.contrast == jitter.saturation == (0.7, 1.3) and jitter.hue is None
    assert jitters(color_jitter=0.3, auto_augment=POLICY) == []
    assert jitters(random_erasing=0.5) == []


@pytest.mark.parametrize("mode", ["pixel", "rand", "const"])
def test_erasing(picture, mode):
    shares = []
    for seed in range(30):
        plain = view(train_transform(32, random_erasing=1e-9), picture, seed)
        erased = view(train_transform(32, random_erasing=1.0, random_erasing_mode=mode), picture, seed)
        rows, columns = (plain != erased).any(0).nonzero(as_tuple=True)
        top, bottom, left, right = rows.min(), rows.max() + 1, columns.min(), columns.max() + 1
        patch = erased[:, top:bottom, left:right]
        shares.append(patch[0].numel() / 32**2)
        # Nothing but the rectangle is changed.
        whole = erased.clone()
        whole[:, top:bottom, left:right] = plain[:, top:bottom, left:right]
        assert torch.equal(whole, plain)
        if mode == "pixel":
            assert len(patch.unique()) == patch.numel()
        else:
            assert torch.equal(patch, patch[:, :1, :1].expand_as(patch))
            assert bool((patch == 0).all()) == (mode == "const")
    # Between 2 % and a third of the area, up to the rounding of its sides.
    assert 0.01 < min(shares) < 0.08 and 0.25 < max(shares) < 0.37


def test_a_quarter_of_the_views_is_erased(picture):
    plain, erasing = (train_transform(8, random_erasing=probability) for probability in (1e-9, 0.25))
    changed = [not torch.equal(view(plain, picture, seed), view(erasing, picture, seed)) for seed in range(300)]
    assert np.mean(changed) == pytest.approx(0.25, abs=0.06)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("pictures")
    rng = np.random.default_rng(1)
    for number in range(6):
        (root / "ab"[number % 2]).mkdir(exist_ok=True)
        image = Image.fromarray(rng.integers(0, 256, (6, 6, 3), dtype=np.uint8)).resize((40, 40))
        image.save(root / "ab"[number % 2] / f"{number}.png")
    return root


def views(dataset, **options):
    return torch.cat([batch["pixel_values"] for batch in DataLoader(dataset, 2, collate_fn=collate, **options)])


def test_views_depend_on_seed_epoch_and_index_alone(folder):
    transform = train_transform(16, **{**DEIT, "random_erasing": 0.9})
    data = ImageFolderDataset(folder, transform, seed=3)
    first = views(data)
    # Neither on what was drawn before, nor on the order, nor on the worker.
    torch.manual_seed(5)
    np.random.seed(5)
    again = torch.stack([data[index]["pixel_values"] for index in reversed(range(6))]).flip(0)
    assert torch.equal(again, first)
    assert torch.equal(views(data, num_workers=2), first)
    alone = [view_of(folder, transform, 3, index) for index in range(6)]
    assert torch.equal(torch.stack(alone), first)
    data.set_epoch(1)
    second = views(data, num_workers=1)
    assert torch.equal(views(data), second)
    assert not any(torch.equal(one, other) for one, other in zip(first, second, strict=True))
    other_seed = views(ImageFolderDataset(folder, transform, seed=4))
    assert not any(torch.equal(one, other) for one, other in zip(first, other_seed, strict=True))


def view_of(folder, transform, seed, index):
    picture = ImageFolderDataset(folder, lambda image: image, seed=seed).image(index)
    with view_rng(seed, 0, index):
        return transform(picture)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"auto_augment": "rnd-m9"}, r"`auto_augment` must be a policy that timm knows, .* got 'rnd-m9'"),
        ({"auto_augment": "rand-x9"}, r"`auto_augment` must be a policy that timm knows, .* got 'rand-x9'"),
        ({"color_jitter": -0.1}, r"`color_jitter` must be a number of at least 0, got -0\.1"),
        ({"color_jitter": float("nan")}, r"`color_jitter` must be a number of at least 0, got nan"),
        ({"random_erasing": 1.5}, r"`random_erasing` must be a probability, in \[0, 1\], got 1\.5"),
        (
            {"random_erasing_mode": "noise"},
            r"one of 'pixel', 'rand', 'const', got 'noise'",
        ),
        ({"auto_augment": POLICY, "interpolation": "cubic"}, r"`interpolation` must be one of"),
        ({"auto_augment": POLICY, "std": (1.0,)}, r"`std` must hold 3 numbers"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        train_transform(32, **options)
