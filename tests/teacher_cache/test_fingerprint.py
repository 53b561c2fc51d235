"""What a cache was made for: what must be the same, what need not be, and what is said when it is not."""

import copy
import random

import datasets
import numpy as np
import pytest
import torch
from cached_runs import Counting, Fixed, Views, make_trainer, run
from PIL import Image
from tiny import ConvNet, networks
from torchvision.transforms import v2

from hf_kd import Preprocessing, Teacher
from hf_kd.data import (
    CifarDataset,
    CifarImages,
    DigitsDataset,
    HubImageDataset,
    ImageFolderDataset,
    eval_transform,
    is_deterministic,
    train_transform,
)
from hf_kd.teacher_cache.stored_views import StoredViews


def teacher():
    return networks()[1]


@pytest.fixture
def cache(tmp_path):
    run(tmp_path / "first", tmp_path / "cache", teacher=teacher(), num_train_epochs=1)
    return tmp_path / "cache"


def opens(cache, **options):
    """Nothing is computed when a run begins: what differs is told at once."""
    trainer = make_trainer(cache.parent / "out", cache, **{"teacher": teacher(), **options})
    return trainer.replay.cache.written(0)


# ---- What may differ -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"train_sampling_strategy": "sequential"},
        {"per_device_train_batch_size": 7, "gradient_accumulation_steps": 2},
        {"loss": "kd", "gamma": 0.25, "beta": 3.0, "ce_weight": 0.5},
        {"seed": 5, "data_seed": 6, "learning_rate": 1.0},
        {"student": ConvNet(width=3)},
        {"num_train_epochs": 9, "teacher_cache_views": 4},
        {"teacher": Teacher(copy.deepcopy(networks()[1]), name="another name")},
    ],
)
def test_it_is_the_same_cache(options, cache):
    assert opens(cache, **options) == 27


def test_a_teacher_is_the_same_wherever_its_weights_lie(cache):
    network = teacher()
    for parameter in network.parameters():
        parameter.data = parameter.data.clone().contiguous()
    assert opens(cache, teacher=network.train()) == 27


# ---- What may not --------------------------------------------------------------------------------------------------


def changed_weight():
    network = teacher()
    with torch.no_grad():
        network.head.bias[0] += 1e-6
    return network


def changed_statistic():
    network = teacher()
    network.norm.running_var[0] *= 1.001
    return network


def changed_architecture():
    network = teacher()
    network.norm.eps = 1e-3
    return network


class OneChanged(Views):
    """One pixel of the last sample."""

    def __init__(self, **options):
        super().__init__(**options)
        self.pixel_values[-1, 0, 0, 0] += 1e-3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            lambda: {"teacher": changed_weight()},
            r"another teacher: ConvNet \(weights \w{16}, architecture \w{16}\) there",
        ),
        (lambda: {"teacher": changed_statistic()}, r"another teacher: ConvNet \(weights"),
        (lambda: {"teacher": changed_architecture()}, r"another teacher: ConvNet \(weights"),
        (
            lambda: {"teacher": Teacher(teacher(), class_map=[1, 0, 2, 3, 4])},
            r"class map of the teacher: \[None\] there",
        ),
        (lambda: {"data": Views(count=26)}, "another number of samples: 27 there, 26 in this run"),
        (lambda: {"data": Views(count=27, seed=1)}, "another view of the samples .their data or transform"),
        (lambda: {"data": OneChanged(count=27)}, "another view of the samples .their data or transform"),
        (lambda: {"data": Views(count=27, noise=0.5)}, "another view of the samples .their data or transform"),
        (lambda: {"data": Views(count=27, view_seed=1)}, "another seed of the views: 0 there, 1 in this run"),
        (lambda: {"data": Fixed(count=27)}, "another kind of views: new in every epoch there, the same in"),
        (lambda: {"teacher_dtype": "bf16"}, "another precision of the teacher: as loaded there, bf16 in this run"),
        (lambda: {"teacher_cache_dtype": "int8"}, "has dtype 'fp16', and 'int8' is asked for"),
    ],
)
def test_the_part_that_differs_is_named_with_both_values(options, message, cache):
    with pytest.raises(ValueError, match=message):
        opens(cache, **options())


def test_the_message_says_what_to_do(cache):
    with pytest.raises(ValueError, match="number of samples") as error:
        opens(cache, data=Views(count=26))
    assert str(error.value) == (
        f"The teacher cache {cache} was made for another number of samples: 27 there, 26 in this run. Give this run "
        "the same, or another `teacher_cache_dir`, or delete that folder to have the cache made anew."
    )


def test_class_count_and_preprocessing(cache, tmp_path):
    networks_of = [ConvNet(classes=4), ConvNet(classes=4)]
    with pytest.raises(ValueError, match="another class count: 5 there, 4 in this run"):
        opens(cache, student=networks_of[0], teacher=networks_of[1], data=Views(count=27, classes=4))

    def with_images(mean, teachers_mean=0.5, size=8):
        student, network = ConvNet(), teacher()
        student.pretrained_cfg = {"mean": (mean,) * 3, "std": (0.2,) * 3, "input_size": (3, 8, 8)}
        preprocessing = Preprocessing((teachers_mean,) * 3, (0.2,) * 3, (3, size, size))
        return {"student": student, "teacher": Teacher(network, preprocessing=preprocessing)}

    other = tmp_path / "images"
    run(tmp_path / "out2", other, num_train_epochs=1, **with_images(0.4))
    assert opens(other, **with_images(0.4)) == 27
    with pytest.raises(
        ValueError, match="preprocessing of the student's images: {'mean': .0.4, .* there, {'mean': .0.3"
    ):
        opens(other, **with_images(0.3))
    with pytest.raises(ValueError, match="another preprocessing of the teacher's images: .*'mean': .0.5"):
        opens(other, **with_images(0.4, teachers_mean=0.6))
    with pytest.raises(ValueError, match="another preprocessing of the teacher's images"):
        opens(other, **with_images(0.4, size=16))


# ---- Data sets that show their data ---------------------------------------------------------------------------------


def cifar(augment=True, seed=0, change=None, **options):
    images = torch.randint(0, 256, (30, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    if change is not None:
        images[change, 0, 0, 0] ^= 1
    labels = torch.arange(30) % 3
    return CifarDataset(CifarImages(images, labels, ["a", "b", "c"]), augment=augment, seed=seed, **options)


def described(dataset, period=None):
    views = StoredViews(dataset, period)
    return views.content(), views.views(4)


def test_any_changed_pixel_of_images_in_memory_is_seen():
    whole = described(cifar())
    assert described(cifar()) == whole
    # Sample 17 is not among those that are looked at.
    assert described(cifar(change=17))[0] != whole[0]
    assert (
        described(cifar(mean=(0.5, 0.5, 0.5)))[0] == whole[0] and described(cifar(mean=(0.5, 0.5, 0.5)))[1] != whole[1]
    )
    digits = np.zeros((10, 28, 28), np.uint8)
    assert described(DigitsDataset(digits, np.arange(10))) != described(DigitsDataset(digits + 1, np.arange(10)))


def test_labels_are_not_what_a_teacher_sees():
    digits = np.random.default_rng(0).integers(0, 256, (20, 28, 28), dtype=np.uint8)
    few = DigitsDataset(digits, np.arange(20) % 10, labelled=1)
    assert described(few) == described(DigitsDataset(digits, np.arange(20) % 10))


def test_repeating_views_do_not_change_what_the_views_are():
    assert described(cifar()) == described(cifar(), period=1) == described(cifar(), period=3)


@pytest.fixture
def pictures(tmp_path):
    generator = np.random.default_rng(0)
    for name in ("ant", "bee"):
        (tmp_path / "data" / name).mkdir(parents=True)
        for number in range(4):
            pixels = generator.integers(0, 256, (40, 40, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "data" / name / f"{number}.png")
    return tmp_path / "data"


def test_folders_are_known_by_names_and_pictures_wherever_they_lie(pictures):
    def folder(place, transform=None):
        return described(ImageFolderDataset(place, transform or train_transform(16)))

    whole = folder(pictures)
    moved = pictures.rename(pictures.parent / "moved")
    assert folder(moved) == whole
    other = folder(moved, train_transform(16, scale=(0.5, 1.0)))
    assert other[0] == whole[0] and other[1] != whole[1]
    (moved / "ant" / "0.png").rename(moved / "ant" / "00.png")
    assert folder(moved)[0] != whole[0]


def test_a_transform_is_named(pictures, tmp_path):
    class Pictured(ConvNet):
        def __init__(self):
            super().__init__(classes=2)

    def options(transform):
        data = ImageFolderDataset(pictures, transform)
        return {"data": data, "student": Pictured(), "teacher": network}

    network = Pictured()
    run(tmp_path / "1", tmp_path / "cache", **options(train_transform(8)))
    with pytest.raises(ValueError, match="another transform: Compose.*RandomResizedCrop.*0.08.* there, Compose.*0.5"):
        make_trainer(tmp_path / "2", tmp_path / "cache", **options(train_transform(8, scale=(0.5, 1.0))))


def test_tables_are_known_again_and_a_changed_row_is_not(pictures, tmp_path):
    def table(change=False):
        images = [{"bytes": path.read_bytes(), "path": None} for path in sorted(pictures.rglob("*.png"))]
        if change:
            images[3] = images[2]
        features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["ant", "bee"])})
        path = tmp_path / f"table{change}.parquet"
        if not path.exists():
            columns = {"image": images, "label": [0, 0, 0, 0, 1, 1, 1, 1]}
            datasets.Dataset.from_dict(columns, features=features).to_parquet(path)
        loaded = datasets.Dataset.from_parquet(str(path), cache_dir=str(tmp_path / "datasets"))
        return HubImageDataset(loaded, eval_transform(16))

    assert table().table_fingerprint == table().table_fingerprint != table(change=True).table_fingerprint


def test_which_data_have_fixed_views(pictures):
    assert not cifar().fixed_views and cifar(augment=False).fixed_views
    digits = np.zeros((10, 28, 28), np.uint8)
    assert DigitsDataset(digits, np.arange(10)).fixed_views
    assert not DigitsDataset(digits, np.arange(10), shift=1).fixed_views
    assert ImageFolderDataset(pictures, eval_transform(16)).fixed_views
    assert not ImageFolderDataset(pictures, train_transform(16)).fixed_views


def test_a_transform_is_random_unless_it_is_known_not_to_be():
    assert is_deterministic(eval_transform()) and not is_deterministic(train_transform())
    assert not is_deterministic(train_transform(auto_augment="rand-m9-mstd0.5-inc1"))
    assert not is_deterministic(v2.Compose([v2.Resize(8), v2.RandomHorizontalFlip(0.0)]))
    assert not is_deterministic(lambda image: image)

    class Own:
        deterministic = True

        def __call__(self, image):
            return image

    assert is_deterministic(v2.Compose([Own(), v2.ToImage()]))


def test_a_global_generator_in_a_transform_is_found_out():
    class Careless(Views):
        def __getitem__(self, index):
            sample = super().__getitem__(index)
            return {**sample, "pixel_values": sample["pixel_values"] * (1 + random.random())}

    with pytest.raises(
        ValueError, match="of the Careless is another one each time, since its transform or the collator"
    ):
        StoredViews(Careless(count=5), None)


def test_counting_and_hashing_leave_the_teacher_alone(tmp_path):
    network = Counting(teacher())
    before = copy.deepcopy(network.state_dict())
    make_trainer(tmp_path / "out", tmp_path / "cache", teacher=network)
    assert network.seen == 0
    assert all(torch.equal(value, before[key]) for key, value in network.state_dict().items())


class Flipping(Fixed):
    """Mirrored in half of the cases, by the process's generator."""

    def __getitem__(self, index):
        sample = super().__getitem__(index)
        images = sample["pixel_values"]
        return {**sample, "pixel_values": v2.RandomHorizontalFlip()(images)}


def test_a_flip_alone_is_found_out():
    with pytest.raises(ValueError, match="of the Flipping is another one each time"):
        StoredViews(Flipping(count=5), None)
