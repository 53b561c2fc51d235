import os
import pickle

import cifar_files
import datasets
import numpy as np
import pytest
import torch
from cifar_files import python2_dumps, random_split, write_image_folder
from PIL import Image
from torch.utils.data import DataLoader, Subset
from torchvision import transforms

from hf_kd.data import (
    CIFAR100_MEAN,
    CIFAR100_STD,
    CifarDataset,
    CifarImages,
    collate,
    load_cifar,
    set_dataset_epoch,
)
from hf_kd.data.cifar import _places_of_views
from hf_kd.data.in_memory import crop
from hf_kd.data.plain_pickle import read_plain_pickle


NAMES = {100: [f"class {number:02}" for number in range(100)], 10: [f"kind {number}" for number in range(10)]}
SPLITS = {
    100: {"train": random_split(110, 100), "test": random_split(30, 100, seed=1)},
    10: {"train": random_split(23, 10), "test": random_split(12, 10, seed=1)},
}


@pytest.fixture(autouse=True)
def no_counting(monkeypatch):
    # `datasets` asks a server about each loading to count it.
    monkeypatch.setattr(datasets.config, "HF_UPDATE_DOWNLOAD_COUNTS", False)


def write(form, folder, classes=100, **options):
    """A data set in one of its forms; the folder to give to load_cifar."""
    splits = SPLITS[classes]["train"], SPLITS[classes]["test"], NAMES[classes]
    if form in ("python", "binary"):
        options["classes"] = classes
    return getattr(cifar_files, f"write_{form}")(folder, *splits, **options)


# Forms ------------------------------------------------------------------------------------------------------------


def by_class(split):
    """Folders of pictures are read class by class; within one the order is kept."""
    order = np.argsort(split[1], kind="stable")
    return split[0][order], split[1][order]


def assert_is(data, expected, names):
    images, labels = expected
    assert data.images.dtype == torch.uint8 and data.labels.dtype == torch.int64
    assert np.array_equal(data.images.numpy(), images)
    assert data.labels.tolist() == labels.tolist()
    assert data.class_names == list(names)


@pytest.mark.parametrize("classes", [100, 10])
@pytest.mark.parametrize("form", ["python", "binary", "image_folder", "parquet"])
def test_each_form_gives_the_same_images(tmp_path, form, classes, recwarn):
    options = {"label_column": "label"} if form == "parquet" and classes == 10 else {}
    folder = write(form, tmp_path, classes, **options)
    # The folder itself, or (which is the same for the others) the one around it.
    for source in {folder, tmp_path}:
        for split, expected in SPLITS[classes].items():
            data = load_cifar(str(source), split=split)
            assert_is(data, by_class(expected) if form == "image_folder" else expected, NAMES[classes])
    assert [str(warning.message) for warning in recwarn if "numpy" in str(warning.message).lower()] == []
    sample = CifarDataset(data)[0]
    assert sample["pixel_values"].shape == (3, 32, 32)
    assert CifarDataset(data).num_classes == classes


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_pickles_of_every_protocol(tmp_path, protocol):
    folder = write("python", tmp_path, dump=lambda entries: pickle.dumps(entries, protocol))
    assert_is(load_cifar(folder), SPLITS[100]["train"], NAMES[100])


@pytest.mark.parametrize("classes", [100, 10])
def test_pickles_as_python_2_wrote_the_originals(tmp_path, classes):
    folder = write("python", tmp_path, classes, dump=python2_dumps)
    assert_is(load_cifar(folder, split="test"), SPLITS[classes]["test"], NAMES[classes])
    # What the helper writes is what it says: Python's own unpickler reads the same, and text is bytes to it.
    content = (folder / ("test_batch" if classes == 10 else "test")).read_bytes()
    own = pickle.loads(content, encoding="bytes")
    assert np.array_equal(own[b"data"], SPLITS[classes]["test"][0].reshape(-1, 3072))
    assert b"numpy.core.multiarray\n_reconstruct" in content


def test_pickles_of_ones_own(tmp_path):
    """Keys of bytes, as of a file read with encoding="bytes"; arrays and numpy numbers as labels; a column order."""
    images, labels = SPLITS[100]["train"]
    for number, own in enumerate(
        [labels, list(labels.astype(np.int32)), labels.astype(">i2"), tuple(labels.tolist())]
    ):
        folder = tmp_path / str(number)
        folder.mkdir()
        entries = {b"data": np.asfortranarray(images.reshape(-1, 3072)), b"fine_labels": own}
        (folder / "train").write_bytes(pickle.dumps(entries, protocol=2 + number))
        (folder / "meta").write_bytes(pickle.dumps({b"fine_label_names": [name.encode() for name in NAMES[100]]}))
        assert_is(load_cifar(folder), (images, labels), NAMES[100])


def test_pictures_of_a_validation_folder(tmp_path):
    """`val` serves as test; its classes are numbered as those of `train`, also where it lacks some."""
    train, names = (SPLITS[10]["train"], NAMES[10])
    few = SPLITS[10]["test"][0][:3], np.array([2, 5, 9])
    write_image_folder(tmp_path, train, few, names, test_name="val")
    assert_is(load_cifar(tmp_path, split="test"), few, names)
    again = load_cifar(tmp_path, split="test", class_names=names[::-1])
    assert again.labels.tolist() == [7, 4, 0]


def test_class_names_in_place_of_the_source_s(tmp_path):
    names = [f"my {number}" for number in range(100)]
    folder = write("python", tmp_path)
    (folder / "meta").unlink()
    assert_is(load_cifar(folder, class_names=names), SPLITS[100]["train"], names)


def test_columns_of_a_table(tmp_path):
    write("parquet", tmp_path, 10, image_column="picture", label_column="kind")
    data = load_cifar(tmp_path, image_column="picture", label_column="kind")
    assert_is(data, SPLITS[10]["train"], NAMES[10])
    # A column of plain numbers, one of them missing: classes have numbers for names, and -100 means no label.
    images, labels = SPLITS[10]["train"]
    (tmp_path / "plain").mkdir()
    column = [None, *labels.tolist()[1:]]
    pictures = [Image.fromarray(image.transpose(1, 2, 0)) for image in images]
    table = datasets.Dataset.from_dict({"img": pictures, "label": column}).cast_column("img", datasets.Image())
    table.to_parquet(tmp_path / "plain" / "train.parquet")
    expected = images, np.concatenate([[-100], labels[1:]])
    assert_is(load_cifar(tmp_path / "plain"), expected, map(str, range(10)))
    assert load_cifar(tmp_path / "plain", class_names=[*NAMES[10], "an 11th"]).class_names[-1] == "an 11th"


def test_a_hub_id_is_loaded_by_datasets(tmp_path, monkeypatch):
    folder = write("parquet", tmp_path)
    asked = []
    load = datasets.load_dataset

    def load_locally(name, config, *, split):
        asked.append((name, config, split))
        return load(str(folder), split=split)

    monkeypatch.setattr(datasets, "load_dataset", load_locally)
    monkeypatch.chdir(tmp_path)
    assert_is(load_cifar(split="test"), SPLITS[100]["test"], NAMES[100])
    assert asked == [("uoft-cs/cifar100", None, "test")]


# Bad files --------------------------------------------------------------------------------------------------------


class Runs:
    """Writes a file where it is unpickled."""

    def __init__(self, function, *arguments):
        self.function, self.arguments = function, arguments

    def __reduce__(self):
        return self.function, self.arguments


def test_code_in_a_pickle_is_refused_and_not_run(tmp_path):
    refused = r"^Cannot read .*: it asks for \S+, which data has no use for.* nothing in it was run"
    for number, bad in enumerate(
        [
            Runs(os.mkdir, str(tmp_path / "made")),
            Runs(eval, f"__import__('os').mkdir({str(tmp_path / 'made')!r})"),
            Runs(getattr, "text", "upper"),
            Runs(np.fromfile, str(tmp_path / "0")),
        ]
    ):
        path = tmp_path / str(number)
        content = pickle.dumps({"data": bad, "fine_labels": [0]})
        path.write_bytes(content)
        with pytest.raises(ValueError, match=refused):
            read_plain_pickle(path)
        if number < 2:
            pickle.loads(content)  # the file does what it should not do here
            (tmp_path / "made").rmdir()
    assert not (tmp_path / "made").exists()


def test_names_that_arrays_need_are_no_way_around(tmp_path):
    """Functions of numpy and codecs are stood in for: pointers, codecs, attributes are out of reach through them."""
    array = b"cnumpy\nndarray\n"
    bad = {
        # An array of objects from bytes would be an array of pointers.
        "objects": (pickle.dumps({"data": np.array([None, 1])}), r"holds an array of type \|O8, not of integers"),
        "floats": (pickle.dumps({"data": np.ones(2)}), r"holds an array of type <f8, not of integers"),
        "called": (b"}(U\x04data" + array + b"(tRu.", "in a way that numpy's pickles do not"),
        "codec": (b"}(U\x04datac_codecs\nencode\n(U\x03gifU\x03hextRu.", "encodes text as hex"),
        "dotted": (pickle.dumps({"data": os.path.join}), r"asks for \w+path.join"),
        "list": (pickle.dumps([1]), "holds a list where a dict belongs"),
        "persistent": (b"}(U\x04dataP1\nu.", "persistent"),
        "unfilled": (b"}(U\x04datacnumpy.core.multiarray\n_reconstruct\n)Ru.", "it holds a _Array"),
        "codeless": (b"}(U\x04datacnumpy\ndtype\n(U\x02u1tRu.", "it holds a _Dtype"),
        "large": (
            pickle.dumps({"data": np.zeros((2, 2), np.uint8)}, 4).replace(b"K\x02K\x02", b"K\x02K\x09"),
            "reshape",
        ),
    }
    for name, (content, reason) in bad.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=f"^Cannot read .*{reason}.*nothing in it was run"):
            read_plain_pickle(tmp_path / name)
    # Setting attributes of what a name stands for changes nothing that outlives the reading.
    (tmp_path / "build").write_bytes(b"}(U\x04data" + b"cnumpy\ndtype\n}U\x04codeU\x02O8sbu.")
    with pytest.raises(ValueError, match="it holds a function, which is no plain data"):
        read_plain_pickle(tmp_path / "build")
    (tmp_path / "good").write_bytes(pickle.dumps({"data": np.arange(3)}))
    assert read_plain_pickle(tmp_path / "good")["data"].tolist() == [0, 1, 2]


def test_a_pickle_cut_anywhere(tmp_path):
    entries = {"data": np.arange(12, dtype=np.uint8).reshape(2, 6), "fine_labels": [1, 2]}
    for dump in (pickle.dumps, python2_dumps):
        content = dump(entries)
        for length in range(len(content)):
            (tmp_path / "cut").write_bytes(content[:length])
            with pytest.raises(ValueError, match="^Cannot read .*cut: .*must be a whole pickle"):
                read_plain_pickle(tmp_path / "cut")


def cut(path, drop=1):
    content = path.read_bytes()
    path.write_bytes(content[:-drop])


def repickle(path, **changed):
    entries = pickle.loads(path.read_bytes())
    entries.update(changed)
    path.write_bytes(pickle.dumps({key: value for key, value in entries.items() if value is not None}))


def resized(path, size=(33, 32)):
    Image.open(path).resize(size).save(path)


FAULTS = {
    "python-no-split": ("python", lambda f: (f / "train").unlink(), r"lacks train \(it has meta, test\)"),
    "python-no-names": (
        "python",
        lambda f: (f / "meta").unlink(),
        r"lacks meta \(it has test, train\).* needs train, meta",
    ),
    "python-cut": ("python", lambda f: cut(f / "train"), "Cannot read .*train: .*whole pickle"),
    "python-empty-file": ("python", lambda f: (f / "train").write_bytes(b""), "Cannot read .*train: "),
    "python-shape": (
        "python",
        lambda f: repickle(f / "train", data=np.zeros((110, 3071), np.uint8)),
        r"'data' in .*train must be an array of uint8 \(N, 3072\).* got uint8 \(110, 3071\)",
    ),
    "python-type": (
        "python",
        lambda f: repickle(f / "train", data=np.zeros((110, 3072), np.int64)),
        r"got int64 \(110, 3072\)",
    ),
    "python-list": ("python", lambda f: repickle(f / "train", data=[1]), "3072.*got a list"),
    "python-no-key": (
        "python",
        lambda f: repickle(f / "train", fine_labels=None),
        r"train has no entry 'fine_labels': it has batch_label, data, coarse_labels",
    ),
    "python-count": (
        "python",
        lambda f: repickle(f / "train", fine_labels=[0] * 9),
        r"'fine_labels' in .*train must hold one whole number for each of the 110 images, got 9 of them",
    ),
    "python-texts": (
        "python",
        lambda f: repickle(f / "train", fine_labels=["0"] * 110),
        r"'fine_labels' in .*train must hold one whole number for each image, it holds a str",
    ),
    "python-label": (
        "python",
        lambda f: repickle(f / "train", fine_labels=[0] * 7 + [100] * 103),
        r"Label 100 of image 7 in .*train is out of range: there are 100 classes, so labels must be in 0\.\.99",
    ),
    "python-negative": (
        "python",
        lambda f: repickle(f / "train", fine_labels=[-1] * 110),
        r"Label -1 of image 0 in .*train is out of range",
    ),
    "python-empty": (
        "python",
        lambda f: repickle(f / "train", data=np.zeros((0, 3072), np.uint8), fine_labels=[]),
        r"The data set is empty: .*train holds no image",
    ),
    "python-names": (
        "python",
        lambda f: repickle(f / "meta", fine_label_names=[3]),
        r"meta has no list of names 'fine_label_names'.* or give `class_names`",
    ),
    "binary-cut": (
        "binary",
        lambda f: cut(f / "train.bin"),
        r"train\.bin is damaged: its 338139 bytes are not a whole number of records of 3074 \(2 of labels and 3072",
    ),
    "binary-label": (
        "binary",
        lambda f: (f / "train.bin").write_bytes(bytes([0, 100]) + bytes(3072)),
        r"Label 100 of image 0 in .*train\.bin is out of range",
    ),
    "binary-empty": ("binary", lambda f: (f / "train.bin").write_bytes(b""), r"train\.bin holds no image"),
    "binary-names": (
        "binary",
        lambda f: (f / "fine_label_names.txt").write_bytes(b"\xff\n"),
        "fine_label_names.txt must be a text file with one class name a line",
    ),
    "folder-size": (
        "image_folder",
        lambda f: resized(next((f / "train").rglob("*.png"))),
        r"The image .*train.*png is 33 × 32 pixels, and CIFAR's are 32 × 32: resize the images beforehand",
    ),
    "folder-no-split": (
        "image_folder",
        lambda f: (f / "train").rename(f / "training"),
        r"has no folder train with one folder of pictures per class.* it has test, training",
    ),
    "folder-unreadable": (
        "image_folder",
        lambda f: next((f / "train").rglob("*.png")).write_bytes(b"?"),
        "Cannot read image .*png: it is not an image",
    ),
    "table-no-split": (
        "parquet",
        lambda f: next(f.glob("train*")).unlink(),
        "Cannot load split 'train' of data set .*: .*'test'",
    ),
    "table-cut": (
        "parquet",
        lambda f: cut(next(f.glob("train*")), drop=300),
        "Cannot load split 'train' of data set ",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_damaged_source_gets_one_clear_sentence(tmp_path, fault):
    form, damage, message = FAULTS[fault]
    folder = write(form, tmp_path)
    damage(folder)
    with pytest.raises(ValueError, match=message) as caught:
        load_cifar(folder)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"img": [Image.new("RGB", (32, 31))] * 2}, "The image row 0 is 32 × 31 pixels, and CIFAR's are 32 × 32"),
        ({"label": [0, -3]}, r"Label -3 in row 1 is out of range: labels must be in 0\.\.0"),
        ({"label": ["a", "b"]}, "Column 'label' holds Value.'string'., not integer class labels"),
        ({"image": [1, 2]}, None),
    ],
)
def test_a_bad_table_gets_one_clear_sentence(tmp_path, changed, message):
    columns = {"img": [Image.new("RGB", (32, 32))] * 2, "label": [0, 1], **changed}
    table = datasets.Dataset.from_dict(columns).cast_column("img", datasets.Image())
    table.to_parquet(tmp_path / "train.parquet")
    if message is None:  # other columns do not matter
        assert len(load_cifar(tmp_path).labels) == 2
        return
    with pytest.raises(ValueError, match=message):
        load_cifar(tmp_path)


def test_labels_beyond_the_names_given(tmp_path):
    folder = write("python", tmp_path)
    with pytest.raises(ValueError, match="there are 5 classes"):
        load_cifar(folder, class_names="abcde")


def test_sources_that_are_none(tmp_path):
    with pytest.raises(FileNotFoundError, match="The CIFAR folder .*nowhere does not exist; give a folder"):
        load_cifar(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=r"The CIFAR folder \.\./nowhere does not exist"):
        load_cifar("../nowhere")
    archive = tmp_path / "cifar-100-python.tar.gz"
    archive.write_bytes(b"\x1f\x8b")
    unpack = (
        r"cifar-100-python.tar.gz is an archive: unpack it \(tar -xf cifar-100-python.tar.gz\) and give the folder"
    )
    with pytest.raises(NotADirectoryError, match=unpack):
        load_cifar(archive)
    with pytest.raises(ValueError, match=unpack):
        load_cifar(tmp_path)
    archive.rename(tmp_path / "notes.txt")
    with pytest.raises(NotADirectoryError, match="notes.txt is a file; give the folder that holds the CIFAR data"):
        load_cifar(tmp_path / "notes.txt")
    with pytest.raises(ValueError, match="holds no CIFAR data: expected cifar-100-python, .*; it has notes.txt"):
        load_cifar(tmp_path)
    with pytest.raises(ValueError, match='`split` must be "train" or "test", got \'validation\''):
        load_cifar(tmp_path, split="validation")


def test_two_forms_in_one_folder(tmp_path):
    write("python", tmp_path)
    write("binary", tmp_path)
    with pytest.raises(ValueError, match=r"in several forms \(cifar-100-python, cifar-100-binary\): give the folder"):
        load_cifar(tmp_path)
    assert_is(load_cifar(tmp_path / "cifar-100-binary"), SPLITS[100]["train"], NAMES[100])


# The data set -----------------------------------------------------------------------------------------------------


def cifar(count=40, classes=10, seed=0):
    images, labels = random_split(count, classes, seed)
    return CifarImages(torch.from_numpy(images), torch.from_numpy(labels), NAMES[classes])


def corners(count=1):
    """Pictures in which every pixel differs from every other, so that a view shows where it was cut from."""
    place = torch.arange(1, 1025).view(32, 32)
    return torch.stack([place % 251, place // 251 + 1, place % 7 + 1]).to(torch.uint8).expand(count, 3, 32, 32)


def views(dataset, indices=None):
    return dataset.__getitems__(list(range(len(dataset))) if indices is None else indices)["pixel_values"]


def test_values_are_normalised():
    data = cifar()
    for mean, std in [(CIFAR100_MEAN, CIFAR100_STD), ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))]:
        dataset = CifarDataset(data) if mean is CIFAR100_MEAN else CifarDataset(data, mean=mean, std=std)
        mean, std = (np.array(values).reshape(3, 1, 1) for values in (mean, std))
        expected = (data.images.numpy() / 255 - mean) / std
        batch = dataset.__getitems__(range(40))
        assert batch["pixel_values"].dtype == torch.float32
        np.testing.assert_allclose(batch["pixel_values"].numpy(), expected, rtol=0, atol=1e-6)
    # The very floats of torchvision's transforms.
    pipeline = transforms.Compose([transforms.ToTensor(), transforms.Normalize(CIFAR100_MEAN, CIFAR100_STD)])
    dataset = CifarDataset(data)
    assert dataset.image(3).mode == "RGB"
    assert torch.equal(pipeline(dataset.image(3)), dataset[3]["pixel_values"])


def test_batched_fetch_equals_single_samples():
    dataset = CifarDataset(cifar(), augment=True, seed=3)
    rows = [7, 0, 39, 7]
    batch, one_by_one = collate(dataset.__getitems__(rows)), collate([dataset[i] for i in (7, 0, -1, 7)])
    assert batch.keys() == one_by_one.keys() == {"pixel_values", "labels", "index"}
    for key, value in batch.items():
        assert torch.equal(value, one_by_one[key]) and value.dtype == one_by_one[key].dtype
    assert batch["index"].tolist() == rows
    assert batch["labels"].tolist() == [int(cifar().labels[row]) for row in rows]
    kept = dataset.images.clone()
    batch["pixel_values"].zero_()
    assert torch.equal(dataset.images, kept)
    with pytest.raises(IndexError):
        dataset[40]


def reference(image, top, left, mirrored):
    """Pad, crop, mirror: one picture, (3, 32, 32) bytes."""
    padded = np.zeros((3, 40, 40), dtype=np.uint8)
    padded[:, 4:36, 4:36] = image
    crop = padded[:, top : top + 32, left : left + 32]
    return crop[:, :, ::-1] if mirrored else crop


def found_view(view, original):
    """(top, left, mirrored) of a view of a picture of `corners`."""
    matches = [
        (top, left, mirrored)
        for top in range(9)
        for left in range(9)
        for mirrored in (False, True)
        if np.array_equal(view, reference(original, top, left, mirrored))
    ]
    assert len(matches) == 1, matches
    return matches[0]


def as_bytes(pixel_values):
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (CIFAR100_MEAN, CIFAR100_STD))
    return ((pixel_values * std + mean) * 255).round().to(torch.uint8).numpy()


def test_views_are_crops_of_the_padded_picture_mirrored_or_not():
    images = cifar(60).images.clone()
    images[:, :, 0, 0] = 255  # noise with no two views alike
    data = CifarImages(images, torch.zeros(60, dtype=torch.int64), ["one"])
    dataset, plain = CifarDataset(data, augment=True, seed=5), CifarDataset(data)
    black = -torch.tensor(CIFAR100_MEAN) / torch.tensor(CIFAR100_STD)
    got = views(dataset)
    for view, image in zip(got, images.numpy(), strict=True):
        top, left, mirrored = found_view(as_bytes(view), image)
        # Exactly: normalised after the crop, so that the margin is black and not zero.
        crop = torch.from_numpy(reference(image, top, left, mirrored).copy())[None]
        assert torch.equal(CifarDataset(data._replace(images=crop, labels=data.labels[:1]))[0]["pixel_values"], view)
        if top == 0:
            torch.testing.assert_close(view[:, 0, 0], black, rtol=0, atol=1e-6)
    assert not torch.equal(got, views(plain))


def test_a_view_s_number_says_which_it_is():
    pictures = corners(162).contiguous()
    by_number = crop(torch.nn.functional.pad(pictures, (4, 4, 4, 4)), _places_of_views()).numpy()
    for number, view in enumerate(by_number):
        assert np.array_equal(view, reference(pictures[0], number // 18, number // 2 % 9, number % 2 == 1))


def test_every_offset_and_both_sides_come_equally_often():
    count = 162 * 100
    data = CifarImages(corners(count), torch.zeros(count, dtype=torch.int64), ["one"])
    dataset = CifarDataset(data, augment=True)
    # The red and green bytes of the middle pixel say which one it is: offsets move it by up to 4, a mirror by 1 more.
    batches = [views(dataset, range(start, start + 1620)) for start in range(0, count, 1620)]
    middle = as_bytes(torch.cat([batch[:, :, 16:17, 15:17] for batch in batches]))
    place = middle[:, 0].astype(int) + 251 * (middle[:, 1].astype(int) - 1) - 1
    row, column = place[:, 0, 0] // 32, place[:, 0, :] % 32
    mirrored = column[:, 0] > column[:, 1]
    top, left = row - 16 + 4, column.min(1) - 15 + 4
    numbers = np.unique(np.stack([top, left, mirrored], axis=1), axis=0, return_counts=True)
    assert numbers[0].tolist() == [[y, x, m] for y in range(9) for x in range(9) for m in (0, 1)]
    # 100 expected of each; the chance of being off by 5 standard deviations anywhere is below 1e-4.
    assert abs(numbers[1] - 100).max() < 50
    assert abs(mirrored.mean() - 0.5) < 0.02


def test_a_view_depends_on_seed_epoch_and_index_alone():
    data = cifar()
    dataset = CifarDataset(data, augment=True, seed=1)
    first = views(dataset)
    torch.manual_seed(99)
    again = CifarDataset(data, augment=True, seed=1)
    assert torch.equal(views(again, [31, 4, 31]), first[[31, 4, 31]])
    assert torch.equal(views(again), first)
    again.set_epoch(2)
    third = views(again)
    again.set_epoch(0)  # as where a run resumes
    assert torch.equal(views(again), first)
    assert not torch.equal(third, first)
    set_dataset_epoch(Subset(dataset, range(3)), 2)
    assert torch.equal(views(dataset), third)
    other = views(CifarDataset(data, augment=True, seed=2))
    # Of 40 samples few have the same one of 162 views twice.
    for one, two in ((first, third), (first, other)):
        assert sum(torch.equal(a, b) for a, b in zip(one, two, strict=True)) < 5
    state = torch.get_rng_state()
    views(CifarDataset(data, augment=True))
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_loader_fetches_whole_batches_of_the_epoch_s_views(monkeypatch, workers):
    data = cifar()
    expected = CifarDataset(data, augment=True)
    dataset = CifarDataset(data, augment=True)
    monkeypatch.setattr(CifarDataset, "__getitem__", None)  # whoever asks for single samples fails
    loader = DataLoader(dataset, 16, collate_fn=collate, num_workers=workers, persistent_workers=workers > 0)
    for epoch in range(2):
        for each in (dataset, expected):
            each.set_epoch(epoch)
        batches = list(loader)
        assert [len(batch["labels"]) for batch in batches] == [16, 16, 8]
        assert torch.equal(torch.cat([batch["pixel_values"] for batch in batches]), views(expected))
        assert torch.cat([batch["index"] for batch in batches]).tolist() == list(range(40))


def test_samples_without_a_label():
    data = cifar()
    data.labels[3] = -100
    assert CifarDataset(data)[3]["labels"] == -100


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"images": torch.zeros(40, 3, 32, 32)},
            r"must be uint8 \(N, 3, 32, 32\), got torch.float32 \(40, 3",
        ),
        ({"images": torch.zeros(40, 32, 32, 3, dtype=torch.uint8)}, r"got torch.uint8 \(40, 32, 32, 3\)"),
        ({"labels": torch.zeros(39, dtype=torch.int64)}, r"`labels` must be int64 \(40,\).* got torch.int64 \(39,\)"),
        ({"labels": torch.zeros(40)}, "got torch.float32"),
        ({"labels": torch.full((40,), 10)}, r"Label 10 of image 0 in `data` is out of range.* 0\.\.9"),
        ({"labels": torch.full((40,), -1)}, "Label -1 of image 0"),
        ({"images": cifar().images[:0], "labels": cifar().labels[:0]}, "The data set is empty"),
    ],
)
def test_bad_data(change, message):
    with pytest.raises(ValueError, match=message):
        CifarDataset(cifar()._replace(**change))


@pytest.mark.parametrize("options", [{"mean": (0.5,)}, {"std": (1.0, 1.0, 0.0)}])
def test_bad_statistics(options):
    with pytest.raises(ValueError, match="`mean` and `std` must hold 3 numbers"):
        CifarDataset(cifar(), **options)
