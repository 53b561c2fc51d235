"""Bad input, one fault after another, and the sentence that each gets: what was given, what is allowed, what to do."""

import io
import os
import pickle
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import datasets
import numpy as np
import pytest
import timm
import torch
from cifar_files import random_split, write_binary, write_image_folder, write_python
from file_server import serving
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny import CLASSES, ConvNet, Images, config, networks
from torch import nn
from torch.utils.data import IterableDataset, TensorDataset
from transformers import TrainingArguments

from hf_kd import DistillationTrainer, Preprocessing, Teacher, create_student, save_student
from hf_kd.checkpoints import last_complete
from hf_kd.data import (
    HubImageDataset,
    HubImageStream,
    ImageFolderDataset,
    SkippingDataset,
    collate,
    eval_transform,
    load_cifar,
    load_image,
    load_image_dataset,
    to_rgb,
)
from hf_kd.losses import build_loss


RECIPES = Path(__file__).parents[1] / "recipes"
EVAL = eval_transform(8)
NAN = float("nan")


@dataclass(frozen=True)
class BadInput:
    """A fault: `given` says in plain words what is wrong, `build` does it, the error's text holds all of `says`."""

    id: str
    given: str
    error: type[Exception]
    says: tuple[str, ...]
    build: Callable[[Path], object]


# How faults are made ----------------------------------------------------------------------------------------------


def encode(image, format="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


JPEG = encode(Image.effect_noise((64, 64), 50), "JPEG")
PNG = encode(Image.effect_noise((64, 64), 50))


def picture_folder(tmp_path, broken=None, classes=("cat", "dog")):
    """Two pictures of each class; `broken` maps names in the first class to contents."""
    for name in classes:
        (tmp_path / "pictures" / name).mkdir(parents=True)
        for number in range(2):
            Image.new("RGB", (8, 8), (number, 0, 0)).save(tmp_path / "pictures" / name / f"{number}.png")
    for name, content in (broken or {}).items():
        (tmp_path / "pictures" / classes[0] / name).write_bytes(content)
    return tmp_path / "pictures"


def read_folder(tmp_path, name, content):
    return list(ImageFolderDataset(picture_folder(tmp_path, {name: content}), EVAL))


def picture_gone(tmp_path):
    data = ImageFolderDataset(picture_folder(tmp_path), EVAL)
    Path(data.paths[0]).unlink()
    return data[0]


def no_picture_readable(tmp_path):
    for path in picture_folder(tmp_path).rglob("*.png"):
        path.write_bytes(b"?")
    return SkippingDataset(ImageFolderDataset(tmp_path / "pictures", EVAL))[0]


def class_without_picture(tmp_path):
    (picture_folder(tmp_path) / "emu").mkdir()
    (tmp_path / "pictures" / "emu" / "notes.txt").write_text("still to be photographed")
    return ImageFolderDataset(tmp_path / "pictures", EVAL)


def table(cells=None, labels=(0, 1, 2), feature=None):
    """Three rows of a picture and a label, as a Hub data set has them."""
    if cells is None:
        cells = [{"bytes": PNG, "path": f"{number}.png"} for number in range(3)]
    features = datasets.Features({"image": datasets.Image(), "label": feature or datasets.Value("int64")})
    return datasets.Dataset.from_dict({"image": cells, "label": list(labels)}, features=features)


def row_with(**cell):
    return table(cells=[{"bytes": PNG, "path": None}, {"bytes": None, "path": None, **cell}, None])


class Changed(Images):
    """Images of which each sample is what `change(sample, index)` makes of it."""

    def __init__(self, change, **options):
        super().__init__(**options)
        self.change = change

    def __getitem__(self, index):
        return self.change(super().__getitem__(index), index)


class Stream(IterableDataset):
    """A stream without a length."""

    def __iter__(self):
        return iter(Images())


def trainer(folder, data=None, student=None, teacher=None, distillation_loss=None, **options):
    own_student, own_teacher = networks()
    return DistillationTrainer(
        own_student if student is None else student,
        own_teacher if teacher is None else teacher,
        config(folder, **options),
        train_dataset=Images() if data is None else data,
        distillation_loss=distillation_loss,
    )


def train(folder, data=None, **options):
    trainer(folder, data, **options).train()


def train_on(change, **options):
    """Training on samples that are not as they should be."""
    return lambda tmp_path: train(tmp_path, Changed(change), **options)


def settings(**options):
    """A configuration with values that it cannot have."""
    return lambda tmp_path: config(tmp_path, **options)


def with_preprocessing(network, size=8):
    network.pretrained_cfg = {"mean": (0.5,) * 3, "std": (0.2,) * 3, "input_size": (3, size, size)}
    return network


def teacher_is_student(tmp_path):
    network = ConvNet()
    return trainer(tmp_path, student=network, teacher=network)


class Scores(ConvNet):
    """A network that calls its logits otherwise."""

    def forward(self, x):
        return {"scores": super().forward(x)}


def mapped(class_map):
    """A teacher of five classes under a class map."""
    return lambda tmp_path: Teacher(ConvNet(), class_map=class_map)


def checkpoint(name, write, classes=CLASSES):
    """A weights file of a teacher, as `write(path)` leaves it."""

    def build(tmp_path):
        write(tmp_path / name)
        Teacher.from_pretrained("test_resnet", checkpoint=tmp_path / name, num_classes=classes)

    return build


def state_dict(architecture="test_resnet", classes=CLASSES):
    return timm.create_model(architecture, num_classes=classes).state_dict()


def half_of(write):
    def cut(path):
        write(path)
        content = path.read_bytes()
        path.write_bytes(content[: len(content) // 2])

    return cut


class NeedsCode:
    """A pickle that would make a folder where it is read."""

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return os.mkdir, (self.mark,)


def teacher_folder(tmp_path, name, content):
    """A saved teacher one of whose files is replaced."""
    save_student(create_student("test_resnet", num_classes=CLASSES), tmp_path / "teacher")
    (tmp_path / "teacher" / name).write_bytes(content)
    return Teacher.from_pretrained(tmp_path / "teacher")


def cifar(write, damage, classes=10):
    """A small CIFAR folder as `damage(folder)` leaves it."""

    def build(tmp_path):
        names = [f"kind {number}" for number in range(classes)]
        options = {} if write is write_image_folder else {"classes": classes}
        folder = write(tmp_path, random_split(classes, classes), random_split(classes, classes), names, **options)
        damage(folder)
        return load_cifar(folder)

    return build


def cifar_archive(tmp_path):
    (tmp_path / "cifar-100-python.tar.gz").write_bytes(b"\x1f\x8b")
    return load_cifar(tmp_path)


def resume_with_another_student(tmp_path):
    train(tmp_path, save_strategy="epoch")
    trainer(tmp_path, student=ConvNet(width=7)).train(resume_from_checkpoint=True)


def under_a_file(tmp_path):
    (tmp_path / "file").write_text("not a folder")
    train(tmp_path / "file" / "output", save_strategy="epoch")


def read_only(tmp_path):
    folder = tmp_path / "output"
    if os.geteuid() == 0:
        # Root may write into every folder, but for those that the kernel makes up.
        folder.symlink_to("/sys/kernel")
    else:
        folder.mkdir(mode=0o555)
    train(folder, save_strategy="epoch")


def recipe(tmp_path, yaml, file="row.yaml"):
    """What the ImageNet recipe reads of a YAML file."""
    from imagenet_wttm import RECIPE

    (tmp_path / "row.yaml").write_text(yaml)
    return RECIPE.parser().read_yaml(tmp_path / file)


def command_line(*options):
    """What it reads of a command line."""
    from imagenet_wttm import RECIPE

    return RECIPE.parser().read_command_line(options)


def cifar_teacher(tmp_path, *options):
    """What the CIFAR-100 recipe finds as the teacher of a row."""
    from cifar100_wttm import RECIPE, find_teacher
    from rows import parse

    (run,) = parse(RECIPE, ["--use_cpu=True", f"--output_dir={tmp_path / 'out'}", *options])
    find_teacher(run.arguments, run.config)


def fetched(tmp_path, sha256=None, **served):
    from fetch import fetch

    with serving({"/file.pth": b"weights"}, **served) as (url, _):
        fetch(f"{url}/file.pth", tmp_path / "file.pth", sha256)


def collected(tmp_path, content):
    """What the table of results makes of a results.json."""
    from reproduce import read

    (tmp_path / "results.json").write_text(content)
    return read(tmp_path / "results.json")


def shared(total, processes, per_device=None, accumulation=None):
    from common import share_batch

    return share_batch(total, processes, per_device, accumulation, total_given=True)


# The faults -------------------------------------------------------------------------------------------------------


PICTURES = [
    BadInput(
        "empty-picture",
        "a picture file of zero bytes",
        ValueError,
        ("Cannot read image", "cat/0a.png", "the file is empty", "Remove it from the data set or replace it"),
        lambda tmp_path: read_folder(tmp_path, "0a.png", b""),
    ),
    BadInput(
        "text-as-picture",
        "a text file named .png",
        ValueError,
        ("Cannot read image", "cat/notes.png", "not an image in a format that PIL knows", "Remove it"),
        lambda tmp_path: read_folder(tmp_path, "notes.png", b"buy milk"),
    ),
    BadInput(
        "error-page-as-picture",
        "a web page saved as .jpg, as a failed download leaves it",
        ValueError,
        ("Cannot read image", "cat/0a.jpg", "not an image in a format that PIL knows", "Remove it"),
        lambda tmp_path: read_folder(tmp_path, "0a.jpg", b"<html>404 not found</html>"),
    ),
    BadInput(
        "truncated-jpeg",
        "a JPEG cut off after 900 bytes",
        ValueError,
        ("Cannot read image", "cat/cut.jpg", "image file is truncated", "Remove it"),
        lambda tmp_path: read_folder(tmp_path, "cut.jpg", JPEG[:900]),
    ),
    BadInput(
        "truncated-jpeg-header",
        "a JPEG cut off within its header",
        ValueError,
        ("Cannot read image", "cat/cut.jpg", "Remove it"),
        lambda tmp_path: read_folder(tmp_path, "cut.jpg", JPEG[:200]),
    ),
    BadInput(
        "truncated-png",
        "a PNG without its second half",
        ValueError,
        ("Cannot read image", "cat/cut.png", "image file is truncated", "Remove it"),
        lambda tmp_path: read_folder(tmp_path, "cut.png", PNG[: len(PNG) // 2]),
    ),
    BadInput(
        "picture-gone",
        "a picture deleted after the folder was listed",
        ValueError,
        ("Cannot read image", "No such file or directory", "Remove it"),
        picture_gone,
    ),
    BadInput(
        "row-without-picture",
        "a row of a table that holds no picture",
        ValueError,
        ("Cannot read image row 2", "the row holds none", "Remove it"),
        lambda tmp_path: HubImageDataset(row_with(bytes=PNG), EVAL)[2],
    ),
    BadInput(
        "row-with-broken-picture",
        "a row of a table whose picture is no picture",
        ValueError,
        ("Cannot read image scan.png (row 1)", "not an image in a format that PIL knows"),
        lambda tmp_path: HubImageDataset(row_with(bytes=b"?", path="scan.png"), EVAL)[1],
    ),
    BadInput(
        "row-with-unreachable-picture",
        "a row that names a picture at an address where there is none",
        ValueError,
        ("Cannot read image file://", "gone.png (row 1)", "No such file or directory", "replace it"),
        lambda tmp_path: HubImageDataset(row_with(path=f"file://{tmp_path}/gone.png"), EVAL)[1],
    ),
    BadInput(
        "broken-picture-in-stream",
        "a stream with a picture that is none",
        ValueError,
        ("Cannot read image scan.png (number 1 of the stream)", "not an image in a format that PIL knows"),
        lambda tmp_path: list(HubImageStream(row_with(bytes=b"?", path="scan.png").to_iterable_dataset(), EVAL)),
    ),
    BadInput(
        "no-picture-readable",
        'on_bad_sample="skip" on a folder none of whose pictures can be read',
        ValueError,
        ("Sample 0 and its 3 replacements could not be read", "data set or its transform is at fault", ".png"),
        no_picture_readable,
    ),
    BadInput(
        "no-picture-of-stream-readable",
        'on_bad_sample="skip" on a stream none of whose pictures can be read',
        ValueError,
        ("Not one of the stream's 3 images could be read", "the row holds none"),
        lambda tmp_path: list(
            HubImageStream(table(cells=[None] * 3).to_iterable_dataset(), EVAL, on_bad_sample="skip")
        ),
    ),
    BadInput(
        "float-picture",
        "a TIFF of floating-point pixels",
        ValueError,
        ("Cannot read image", "cat/depth.tif", "(PIL mode F) have no agreed range", "convert it to 8 or 16 bits"),
        lambda tmp_path: read_folder(tmp_path, "depth.tif", encode(Image.new("F", (4, 4), 0.5), "TIFF")),
    ),
    BadInput(
        "32-bit-picture",
        "a TIFF of 32-bit pixels beyond what 16 bits hold",
        ValueError,
        ("Cannot read image", "cat/scan.tif", "(PIL mode I) have no agreed range", "convert it to 8 or 16 bits"),
        lambda tmp_path: read_folder(tmp_path, "scan.tif", encode(Image.new("I", (4, 4), 70000), "TIFF")),
    ),
    BadInput(
        "pictures-of-several-sizes",
        "a transform that leaves pictures in the sizes they have",
        ValueError,
        (
            "do not make a batch",
            "'pixel_values' has the shape (3, 8, 8) in one and (3, 9, 8)",
            "bring them to one size",
        ),
        lambda tmp_path: collate([{"pixel_values": torch.zeros(3, height, 8), "labels": 0} for height in (8, 9)]),
    ),
    BadInput(
        "no-transform-to-tensor",
        "a data set that gives PIL pictures in place of tensors",
        ValueError,
        ("do not make a batch", "'pixel_values' is of type Image", "give a tensor"),
        lambda tmp_path: collate([{"pixel_values": Image.new("RGB", (8, 8)), "labels": 0}]),
    ),
]

LABELS = [
    BadInput(
        "label-beyond-classes-in-table",
        "a table with the label 7 and five classes",
        ValueError,
        ("Label 7 in row 1 is out of range", "labels must be in 0..4, or -100 where there is none"),
        lambda tmp_path: HubImageDataset(table(labels=(0, 7, 2)), EVAL, num_classes=5),
    ),
    BadInput(
        "negative-label-in-table",
        "a table with the label -1",
        ValueError,
        ("Label -1 in row 2 is out of range", "labels must be in 0..1, or -100 where there is none"),
        lambda tmp_path: HubImageDataset(table(labels=(0, 1, -1)), EVAL),
    ),
    BadInput(
        "label-beyond-classes-in-stream",
        "a stream with the label 7 and five classes",
        ValueError,
        ("Label 7 at number 1 of the stream is out of range", "labels must be in 0..4"),
        lambda tmp_path: list(HubImageStream(table(labels=(0, 7, 2)).to_iterable_dataset(), EVAL, num_classes=5)),
    ),
    BadInput(
        "fraction-as-label-in-stream",
        "a stream of unknown types with the label 1.5",
        ValueError,
        ("Label 1.5 at number 0 of the stream is a float", "must be class numbers", "another `label_column`"),
        lambda tmp_path: list(
            HubImageStream(
                datasets.IterableDataset.from_generator(
                    lambda: iter([{"image": Image.new("RGB", (8, 8)), "label": 1.5}])
                ),
                EVAL,
            )
        ),
    ),
    BadInput(
        "label-beyond-classes-in-batch",
        "a training sample of class 5 for a student of five classes",
        ValueError,
        ("The batch has the label 5, and the student has 5 classes", "labels must be 0 to 4", "-100"),
        train_on(lambda sample, index: {**sample, "labels": 5}),
    ),
    BadInput(
        "negative-label-in-batch",
        "a training sample of class -1",
        ValueError,
        ("The batch has the label -1, and the student has 5 classes", "labels must be 0 to 4", "-100"),
        train_on(lambda sample, index: {**sample, "labels": -1}),
    ),
    BadInput(
        "fraction-as-label",
        "labels such as 1.5",
        ValueError,
        ("Labels are floats of shape (8,) and not whole numbers", "class indices (B,)", "probabilities (B, 5)"),
        train_on(lambda sample, index: {**sample, "labels": 1.5}),
    ),
    BadInput(
        "soft-labels-of-another-width",
        "probabilities over six classes for a student of five",
        ValueError,
        ("Labels are floats of shape (8, 6) and not whole numbers", "probabilities (B, 5)"),
        train_on(lambda sample, index: {**sample, "labels": torch.full((6,), 1 / 6)}),
    ),
    BadInput(
        "one-hot-integers",
        "labels as one-hot rows of integers",
        ValueError,
        ("Labels of shape (8, 5) and type torch.int64", "give integer classes of shape (...) or probabilities"),
        train_on(lambda sample, index: {**sample, "labels": torch.eye(5, dtype=torch.int64)[sample["labels"]]}),
    ),
    BadInput(
        "text-as-label",
        "class names where class numbers belong",
        TypeError,
        ("'labels' is the text 'cat'", "labels must be class numbers"),
        train_on(lambda sample, index: {**sample, "labels": "cat"}),
    ),
    BadInput(
        "some-samples-without-label",
        "samples some of which have no label entry at all",
        ValueError,
        ("do not make a batch", "'labels' is in sample 0 of the batch and not in sample 1", "-100"),
        lambda tmp_path: collate([{"x": torch.zeros(2), "labels": 1}, {"x": torch.zeros(2)}]),
    ),
    BadInput(
        "labels-of-several-types",
        "labels that are tensors in some samples and numbers in others",
        ValueError,
        ("do not make a batch", "'labels' is of several types (tensor, int)", "give the same for all"),
        lambda tmp_path: collate(
            [{"x": torch.zeros(2), "labels": torch.tensor(1)}, {"x": torch.zeros(2), "labels": 1}]
        ),
    ),
    BadInput(
        "no-labels",
        "training data without labels and a weight on the labels",
        ValueError,
        ("The batch has no 'labels' (it has pixel_values, index)", "`ce_weight` is 1.0", "set ce_weight=0"),
        lambda tmp_path: train(tmp_path, Images(labels=False)),
    ),
    BadInput(
        "some-unlabelled-under-mixup",
        "mixup on batches in which some samples have no label",
        ValueError,
        ("Mixup and CutMix need one class index for every sample", "label all of them, or set ce_weight=0"),
        lambda tmp_path: train(tmp_path, Images(unlabelled=(0,)), mixup_alpha=1.0),
    ),
]

COLUMNS_AND_DATA_SETS = [
    BadInput(
        "no-image-column",
        "an image column's name with a mistake in it",
        ValueError,
        ("no column 'images' (did you mean 'image'?)", "it has 'image', 'label'", "set `image_column`"),
        lambda tmp_path: HubImageDataset(table(), EVAL, image_column="images"),
    ),
    BadInput(
        "no-label-column",
        "a label column that does not exist",
        ValueError,
        ("no column 'fine_label'", "it has 'image', 'label'", "set `label_column` to one of them, or None"),
        lambda tmp_path: HubImageDataset(table(), EVAL, label_column="fine_label"),
    ),
    BadInput(
        "image-column-of-numbers",
        "an image column that holds numbers",
        ValueError,
        ("Column 'label' holds Value('int64'), not images", "choose another `image_column`, or cast it"),
        lambda tmp_path: HubImageDataset(table(), EVAL, image_column="label"),
    ),
    BadInput(
        "label-column-of-texts",
        "a label column that holds texts",
        ValueError,
        (
            "Column 'label' holds Value('string'), not integer class labels",
            "convert it first with `class_encode_column`",
        ),
        lambda tmp_path: HubImageDataset(table(labels="abc", feature=datasets.Value("string")), EVAL),
    ),
    BadInput(
        "label-column-of-floats",
        "a label column that holds floats",
        ValueError,
        ("Column 'label' holds Value('float32'), not integer class labels", "convert it first with `cast_column`"),
        lambda tmp_path: HubImageDataset(table(feature=datasets.Value("float32")), EVAL),
    ),
    BadInput(
        "dict-of-splits",
        "all splits of a data set in place of one",
        TypeError,
        ("Got a dict of splits: choose one of 'train', 'test'",),
        lambda tmp_path: HubImageDataset(datasets.DatasetDict({"train": table(), "test": table()}), EVAL),
    ),
    BadInput(
        "empty-table",
        "a Hub data set without rows",
        ValueError,
        ("The data set is empty: it has no row",),
        lambda tmp_path: HubImageDataset(table().select([]), EVAL),
    ),
    BadInput(
        "empty-stream",
        "a stream that ends before its first row",
        ValueError,
        ("The data set is empty: the stream has no row",),
        lambda tmp_path: HubImageStream(datasets.IterableDataset.from_generator(lambda: iter(())), EVAL),
    ),
    BadInput(
        "no-folder",
        "an image folder that does not exist",
        FileNotFoundError,
        ("The image folder", "nowhere does not exist", "expected one folder per class with images inside"),
        lambda tmp_path: ImageFolderDataset(tmp_path / "nowhere", EVAL),
    ),
    BadInput(
        "file-as-folder",
        "a picture where an image folder belongs",
        NotADirectoryError,
        ("0.png is a file, not an image folder", "expected one folder per class"),
        lambda tmp_path: ImageFolderDataset(picture_folder(tmp_path) / "cat" / "0.png", EVAL),
    ),
    BadInput(
        "folder-without-classes",
        "an image folder without class folders",
        ValueError,
        ("pictures/cat holds no class folder", "expected one folder per class"),
        lambda tmp_path: ImageFolderDataset(picture_folder(tmp_path) / "cat", EVAL),
    ),
    BadInput(
        "class-without-picture",
        "a class folder with a text file and no picture",
        ValueError,
        ("Class folders of", "that hold no image (a file in .jpg,", "'emu'", "add images or remove them"),
        class_without_picture,
    ),
    BadInput(
        "unknown-validation-class",
        "a validation folder with a class that the training folder lacks",
        ValueError,
        ("not in `class_names`: 'dogs' (did you mean 'dog'?)", "`class_names` has 'cat', 'dog'"),
        lambda tmp_path: ImageFolderDataset(
            picture_folder(tmp_path, classes=("cat", "dogs")), EVAL, class_names=["cat", "dog"]
        ),
    ),
    BadInput(
        "no-cifar-folder",
        "the path of a CIFAR folder that does not exist",
        FileNotFoundError,
        ("The CIFAR folder", "nowhere does not exist", "give a folder that holds the data, or a data set's id"),
        lambda tmp_path: load_cifar(tmp_path / "nowhere"),
    ),
    BadInput(
        "packed-cifar",
        "CIFAR's archive, as it is downloaded",
        ValueError,
        ("cifar-100-python.tar.gz is an archive", "unpack it (tar -xf cifar-100-python.tar.gz)"),
        cifar_archive,
    ),
    BadInput(
        "cifar-without-a-batch",
        "a CIFAR-10 folder without one of its five training files",
        ValueError,
        ("lacks data_batch_3 (it has batches.meta", "the train split of cifar-10-batches-py needs data_batch_1"),
        cifar(write_python, lambda folder: (folder / "data_batch_3").unlink()),
    ),
    BadInput(
        "cifar-pickle-with-code",
        "a CIFAR file that would run code where it is unpickled",
        ValueError,
        ("Cannot read", "train: it asks for posix.mkdir, which data has no use for", "nothing in it was run"),
        cifar(
            write_python,
            lambda folder: (folder / "train").write_bytes(pickle.dumps(NeedsCode(f"{folder}/train.ran"))),
            classes=100,
        ),
    ),
    BadInput(
        "truncated-cifar-pickle",
        "a CIFAR file of the python version without its second half",
        ValueError,
        ("Cannot read", "train: pickle data was truncated", "must be a whole pickle of plain data"),
        cifar(
            write_python, lambda folder: half_of(lambda path: (folder / "test").rename(path))(folder / "train"), 100
        ),
    ),
    BadInput(
        "truncated-cifar-records",
        "a CIFAR file of the binary version without its last byte",
        ValueError,
        ("data_batch_5.bin is damaged", "6145 bytes are not a whole number of records of 3073 (1 of labels and 3072"),
        cifar(write_binary, lambda folder: os.truncate(folder / "data_batch_5.bin", 6145)),
    ),
    BadInput(
        "cifar-label-out-of-range",
        "a CIFAR file with the label 10 and ten classes",
        ValueError,
        ("Label 10 of image 0 in", "data_batch_1.bin is out of range", "there are 10 classes", "in 0..9"),
        cifar(write_binary, lambda folder: (folder / "data_batch_1.bin").write_bytes(bytes([10] + 3072 * [0]))),
    ),
    BadInput(
        "cifar-picture-of-another-size",
        "a CIFAR folder with a picture of 64 × 48 pixels",
        ValueError,
        ("The image", "big.png is 64 × 48 pixels, and CIFAR's are 32 × 32", "resize the images beforehand"),
        cifar(
            write_image_folder,
            lambda folder: Image.new("RGB", (64, 48)).save(folder / "train" / "kind 0" / "big.png"),
        ),
    ),
    BadInput(
        "cifar-without-a-split",
        "a CIFAR folder of pictures without train",
        ValueError,
        ("has no folder train with one folder of pictures per class", "it has test, training"),
        cifar(write_image_folder, lambda folder: (folder / "train").rename(folder / "training")),
    ),
    BadInput(
        "two-sources",
        "a folder and the name of a data set at once",
        ValueError,
        ("Give either a folder", "or the name of a data set, got both of `split_dir` and `dataset_name`"),
        lambda tmp_path: load_image_dataset(tmp_path, "owner/name", transform=EVAL),
    ),
    BadInput(
        "no-such-data-set",
        "a data set that is neither here nor on the Hub",
        ValueError,
        (
            "Cannot load split 'train' of data set",
            "nothing'",
            "Check the name and the network, or give a local folder",
        ),
        lambda tmp_path: load_image_dataset(dataset_name=str(tmp_path / "nothing"), transform=EVAL),
    ),
    BadInput(
        "no-transform",
        "an image folder without a transform",
        TypeError,
        ("`transform` must be callable (a PIL image in, a tensor out), got None",),
        lambda tmp_path: ImageFolderDataset(picture_folder(tmp_path), None),
    ),
    BadInput(
        "samples-as-pairs",
        "a data set of (image, label) pairs, as torchvision's are",
        TypeError,
        ("A sample must be a dict with 'pixel_values' and 'labels', got a tuple", "give a `data_collator`"),
        lambda tmp_path: train(tmp_path, TensorDataset(torch.zeros(8, 3, 8, 8), torch.zeros(8).long())),
    ),
    BadInput(
        "no-training-data",
        "a trainer without training data",
        ValueError,
        ("training requires a train_dataset",),
        lambda tmp_path: DistillationTrainer(*networks(), config(tmp_path)).train(),
    ),
    BadInput(
        "empty-training-data",
        "a training data set of length 0",
        ValueError,
        ("`train_dataset` is empty (its length is 0)", "give data to train on"),
        lambda tmp_path: train(tmp_path, Images(count=0)),
    ),
    BadInput(
        "unknown-batch-entries",
        "batches whose images have a name that the student does not take",
        ValueError,
        ("The batch has", "picture", "of which the network takes none", "its forward has the parameters x", "Rename"),
        train_on(lambda sample, index: {"picture": sample["pixel_values"], "mask": 1, "labels": 0}),
    ),
    BadInput(
        "mixup-without-images",
        "mixup on batches without pixel_values",
        ValueError,
        ("Mixup and CutMix mix images: the batch must have 'pixel_values', it has", "x"),
        train_on(lambda sample, index: {"x": sample["pixel_values"], "labels": sample["labels"]}, mixup_alpha=1.0),
    ),
    BadInput(
        "fewer-samples-than-a-batch",
        "a training set smaller than a batch, with dataloader_drop_last",
        ValueError,
        ("`train_dataset` has 5 samples, fewer than one batch of 8", "make the batch smaller, or set it to False"),
        lambda tmp_path: train(tmp_path, Images(count=5), dataloader_drop_last=True),
    ),
]

TEACHERS_AND_STUDENTS = [
    BadInput(
        "another-class-count",
        "a teacher of seven classes for a student of five",
        ValueError,
        ("The student has 5 classes and the teacher ConvNet has 7", "give `class_map` (config: teacher_class_map)"),
        lambda tmp_path: trainer(tmp_path, teacher=ConvNet(classes=7)),
    ),
    BadInput(
        "another-class-count-found-late",
        "a function as the teacher that gives seven logits for a student of five classes",
        ValueError,
        ("The teacher gave logits of shape (8, 7) and the student (8, 5)", "give `class_map`"),
        lambda tmp_path: train(tmp_path, teacher=lambda **batch: torch.zeros(8, 7)),
    ),
    BadInput(
        "teacher-without-classifier",
        "a teacher without a classifier (num_classes=0)",
        ValueError,
        ("has no classifier, only features", "give a network trained to classify"),
        checkpoint("features.pth", lambda path: torch.save(state_dict(classes=0), path), classes=0),
    ),
    BadInput(
        "unknown-teacher-normalisation",
        "a teacher that does not say how its images are normalised",
        ValueError,
        ("The teacher ConvNet does not say how its images are normalised", "Preprocessing(mean, std, input_size)"),
        lambda tmp_path: trainer(tmp_path, student=with_preprocessing(ConvNet())),
    ),
    BadInput(
        "unknown-student-normalisation",
        "a student that does not say how its images are normalised",
        ValueError,
        (
            "and the student does not say how its images are",
            "build it with create_student, or set its `pretrained_cfg`",
        ),
        lambda tmp_path: trainer(tmp_path, teacher=with_preprocessing(ConvNet())),
    ),
    BadInput(
        "colour-for-greyscale-teacher",
        "a teacher for greyscale images and a student for colour",
        ValueError,
        ("The student's images have 3 channels and the teacher's 1", "images of the same channels"),
        lambda tmp_path: Teacher(ConvNet(), preprocessing=Preprocessing((0.5,), (0.5,), (1, 8, 8))).match(
            CLASSES, Preprocessing((0.5,) * 3, (0.5,) * 3, (3, 8, 8))
        ),
    ),
    BadInput(
        "class-map-beyond-teacher",
        "a class map that names a class the teacher does not have",
        ValueError,
        ("`class_map` names the teacher's class 9", "ConvNet has the classes 0 to 4"),
        mapped([0, 9]),
    ),
    BadInput(
        "class-map-with-text",
        "a class map with a class's name in place of its number",
        ValueError,
        ("one or more of the teacher's class numbers, got 'cat' for class 1",),
        mapped([0, "cat"]),
    ),
    BadInput(
        "class-map-with-gap",
        "a class map that leaves out one of the student's classes",
        ValueError,
        ("must have the student's classes 0 to 1 as its keys, got [0, 2]",),
        mapped({0: 1, 2: 0}),
    ),
    BadInput(
        "class-map-empty",
        "an empty class map",
        ValueError,
        ("`class_map` is empty", "give the teacher's class, or classes, for each class of the student"),
        mapped([]),
    ),
    BadInput(
        "class-map-too-short",
        "a class map for three of a student's five classes",
        ValueError,
        ("The student has 5 classes and the teacher ConvNet has 3", "for each of the student's"),
        lambda tmp_path: trainer(tmp_path, teacher=ConvNet(classes=7), teacher_class_map=[0, 1, 2]),
    ),
    BadInput(
        "class-map-no-json",
        "a class map on the command line that is no JSON",
        ValueError,
        ("`teacher_class_map` must be JSON, a list or an object, got '[1, 2'",),
        settings(teacher_class_map="[1, 2"),
    ),
    BadInput(
        "unknown-teacher-name",
        "a teacher's timm name with two digits exchanged",
        ValueError,
        ("knows no model 'resnet43'", "Did you mean", "resnet34", "timm.list_models"),
        lambda tmp_path: trainer(tmp_path, teacher="resnet43"),
    ),
    BadInput(
        "unknown-student-name",
        "a student's timm name with two digits exchanged",
        ValueError,
        ("knows no model 'resnet81'", "Did you mean", "resnet18", "timm.list_models"),
        lambda tmp_path: create_student("resnet81", num_classes=CLASSES),
    ),
    BadInput(
        "unknown-teacher-weights",
        "a teacher's timm name with a tag that does not exist",
        ValueError,
        ("timm has no weights 'resnet34.in1k'", "for resnet34 there are", "resnet34.tv_in1k"),
        lambda tmp_path: trainer(tmp_path, teacher="resnet34.in1k"),
    ),
    BadInput(
        "unknown-student-weights",
        "a student's timm name with a tag that does not exist",
        ValueError,
        ("timm has no weights 'resnet18.best'", "for resnet18 there are", "resnet18.a1_in1k"),
        lambda tmp_path: create_student("resnet18.best", num_classes=CLASSES),
    ),
    BadInput(
        "no-teacher",
        "distillation without a teacher",
        ValueError,
        ('loss="wttm" needs a teacher', "pass `teacher_model`", 'loss="ce"'),
        lambda tmp_path: DistillationTrainer(ConvNet(), None, config(tmp_path)),
    ),
    BadInput(
        "teacher-is-student",
        "the same module as teacher and student",
        ValueError,
        ("Teacher and student are the same module", "pass copy.deepcopy(model) as the teacher"),
        teacher_is_student,
    ),
    BadInput(
        "teacher-of-wrong-type",
        "a number as the teacher",
        TypeError,
        ("A teacher must be a torch module or a callable that returns logits, got int", "Teacher.from_pretrained"),
        lambda tmp_path: trainer(tmp_path, teacher=3),
    ),
    BadInput(
        "student-of-wrong-type",
        "a timm name as the student",
        TypeError,
        ("`model` must be a torch module, got str", "hf_kd.create_student(name, num_classes=...)"),
        lambda tmp_path: trainer(tmp_path, student="resnet18"),
    ),
    BadInput(
        "ensemble-of-other-classes",
        "an ensemble of teachers with five and seven classes",
        ValueError,
        ("The teachers of an ensemble must give the same classes, got ConvNet: 5, ConvNet: 7",),
        lambda tmp_path: trainer(tmp_path, teacher=[ConvNet(), ConvNet(classes=7)]),
    ),
    BadInput(
        "student-without-logits",
        "a student that returns a dict without logits",
        TypeError,
        ("The network returned dict, which has no logits", "a ModelOutput or dict with `logits`"),
        lambda tmp_path: train(tmp_path, student=Scores()),
    ),
    BadInput(
        "label-names-of-another-count",
        "three class names for four classes",
        ValueError,
        ("`label_names` has 3 entries, 4 are needed",),
        lambda tmp_path: create_student("test_resnet", num_classes=4, label_names=["a", "b", "c"]),
    ),
    BadInput(
        "student-without-classes",
        "a student of no class",
        ValueError,
        ("`num_classes` must be at least 1, got 0",),
        lambda tmp_path: create_student("test_resnet", num_classes=0),
    ),
    BadInput(
        "teacher-module-without-classifier",
        "a network without a classifier, given as the teacher",
        ValueError,
        ("The teacher test_resnet has no classifier, only features", "give a network trained to classify"),
        lambda tmp_path: trainer(tmp_path, teacher=timm.create_model("test_resnet", num_classes=0)),
    ),
    BadInput(
        "student-module-without-classifier",
        "a network without a classifier, given as the student",
        ValueError,
        (
            "The student ResNet has no classifier, only features (num_classes=0)",
            "build it with the data's class count",
        ),
        lambda tmp_path: trainer(tmp_path, student=timm.create_model("test_resnet", num_classes=0)),
    ),
    BadInput(
        "class-map-of-wrong-type",
        "a number as the class map",
        ValueError,
        ("`teacher_class_map` must be a list or an object, got 3",),
        settings(teacher_class_map=3),
    ),
]

FILES = [
    BadInput(
        "no-teacher-path",
        "the path of a teacher that does not exist",
        ValueError,
        ("The teacher ./nowhere does not exist", "give a folder, a weights file or a model's name"),
        lambda tmp_path: trainer(tmp_path, teacher="./nowhere"),
    ),
    BadInput(
        "no-config",
        "a teacher's folder without config.json",
        ValueError,
        ("holds no config.json", "give a folder saved by timm, transformers or hf_kd, or an architecture with"),
        lambda tmp_path: Teacher.from_pretrained(tmp_path),
    ),
    BadInput(
        "damaged-config",
        "a teacher's config.json cut off in the middle",
        ValueError,
        ("config.json is no JSON", "the folder is damaged"),
        lambda tmp_path: teacher_folder(tmp_path, "config.json", b'{"architecture": "test_res'),
    ),
    BadInput(
        "unknown-architecture-in-config",
        "a teacher's config.json that names an architecture unknown to timm",
        RuntimeError,
        (
            "could not be loaded",
            "Unknown model (test_resnat)",
            "The folder must be as timm, transformers or hf_kd saved it",
        ),
        lambda tmp_path: teacher_folder(tmp_path, "config.json", b'{"architecture": "test_resnat"}'),
    ),
    BadInput(
        "truncated-weights-in-folder",
        "a teacher's folder whose weights are cut off",
        RuntimeError,
        ("could not be loaded", "SafetensorError", "The folder must be as timm, transformers or hf_kd saved it"),
        lambda tmp_path: teacher_folder(tmp_path, "model.safetensors", b"\x10\x00\x00\x00\x00\x00\x00\x00{}"),
    ),
    BadInput(
        "no-checkpoint",
        "a teacher's checkpoint that does not exist",
        ValueError,
        ("The teacher's checkpoint", "gone.pth does not exist"),
        checkpoint("gone.pth", lambda path: None),
    ),
    BadInput(
        "checkpoint-of-another-architecture",
        "a teacher's .pth of another architecture",
        ValueError,
        ("vit.pth does not fit test_resnet", "missing (such as", "unexpected (such as", "another architecture"),
        checkpoint("vit.pth", lambda path: torch.save(state_dict("test_vit"), path)),
    ),
    BadInput(
        "checkpoint-of-another-class-count",
        "a teacher's .pth with seven classes, called one of five",
        ValueError,
        ("2 of another shape (such as fc.bias (7,) for (5,))", "or `num_classes` is wrong"),
        checkpoint("seven.pth", lambda path: torch.save(state_dict(classes=7), path)),
    ),
    BadInput(
        "checkpoint-that-needs-code",
        "a teacher's .pth with an object whose unpickling runs code",
        RuntimeError,
        ("code.pth could not be read as plain weights", "give a safetensors file", "nothing that needs code to run"),
        checkpoint(
            "code.pth", lambda path: torch.save({**state_dict(), "extra": NeedsCode(str(path) + ".ran")}, path)
        ),
    ),
    BadInput(
        "truncated-pth",
        "a teacher's .pth without its second half",
        RuntimeError,
        ("half.pth could not be read as plain weights", "failed finding central directory"),
        checkpoint("half.pth", half_of(lambda path: torch.save(state_dict(), path))),
    ),
    BadInput(
        "truncated-safetensors",
        "a teacher's .safetensors without its second half",
        RuntimeError,
        ("half.safetensors could not be read as plain weights", "file not fully covered"),
        checkpoint("half.safetensors", half_of(lambda path: save_file(state_dict(), path))),
    ),
    BadInput(
        "empty-safetensors",
        "a teacher's .safetensors of zero bytes",
        RuntimeError,
        ("zero.safetensors could not be read as plain weights", "give a safetensors file"),
        checkpoint("zero.safetensors", lambda path: path.touch()),
    ),
    BadInput(
        "resume-with-another-student",
        "resuming a run with a student of another width",
        ValueError,
        ("checkpoint-3 holds another network than this student (ConvNet)", "of another shape (such as conv.bias"),
        resume_with_another_student,
    ),
    BadInput(
        "resume-from-nothing",
        "resuming from a folder that does not exist",
        ValueError,
        ("nowhere is no checkpoint (a folder with trainer_state.json)", "True for the last complete one"),
        lambda tmp_path: trainer(tmp_path).train(resume_from_checkpoint=str(tmp_path / "nowhere")),
    ),
    BadInput(
        "output-folder-under-a-file",
        "an output folder that cannot be made, since its parent is a file",
        ValueError,
        ("`output_dir`", "file/output cannot be written to", "Not a directory"),
        under_a_file,
    ),
    BadInput(
        "read-only-output-folder",
        "an output folder that is read-only",
        ValueError,
        ("`output_dir`", "cannot be written to", "Permission denied", "give a folder that can"),
        read_only,
    ),
    BadInput(
        "unknown-model-type-in-config",
        "a teacher's config.json of a model type that transformers does not know",
        RuntimeError,
        ("could not be loaded", "model type `nope`", "The folder must be as timm, transformers or hf_kd saved it"),
        lambda tmp_path: teacher_folder(tmp_path, "config.json", b'{"model_type": "nope"}'),
    ),
]

SETTINGS = [
    BadInput(
        "gamma-zero",
        "gamma 0",
        ValueError,
        ("`gamma` must be in (0, 1]", "gamma = 1/temperature", "got 0.0"),
        settings(gamma=0.0),
    ),
    BadInput(
        "gamma-above-one", "gamma 1.5", ValueError, ("`gamma` must be in (0, 1]", "got 1.5"), settings(gamma=1.5)
    ),
    BadInput("gamma-nan", "gamma NaN", ValueError, ("`gamma` must be in (0, 1]", "got nan"), settings(gamma=NAN)),
    BadInput(
        "gamma-text",
        "a text as gamma",
        ValueError,
        ("`gamma` must be in (0, 1]", "got 'half'"),
        settings(gamma="half"),
    ),
    BadInput(
        "temperature-zero",
        "temperature 0",
        ValueError,
        ("`temperature` must be a positive number, got 0.0",),
        settings(temperature=0.0),
    ),
    BadInput(
        "temperature-below-one",
        "temperature 0.5, which sharpens the teacher",
        ValueError,
        ("`gamma` must be in (0, 1]", "gamma = 1/temperature", "got 2.0"),
        settings(temperature=0.5),
    ),
    BadInput(
        "temperature-text",
        "a text as temperature",
        ValueError,
        ("`temperature` must be a positive number, got 'high'",),
        settings(temperature="high"),
    ),
    BadInput(
        "gamma-against-temperature",
        "gamma 0.5 and temperature 4 at once",
        ValueError,
        ("`gamma`=0.5 and `temperature`=4.0 contradict each other", "give one of them"),
        settings(gamma=0.5, temperature=4.0),
    ),
    BadInput(
        "beta-negative",
        "beta -1",
        ValueError,
        ("`beta` must be a number of at least 0, got -1.0",),
        settings(beta=-1),
    ),
    BadInput(
        "beta-nan", "beta NaN", ValueError, ("`beta` must be a number of at least 0, got nan",), settings(beta=NAN)
    ),
    BadInput(
        "beta-infinite",
        "an infinite beta",
        ValueError,
        ("`beta` must be a number of at least 0, got inf",),
        settings(beta=float("inf")),
    ),
    BadInput(
        "beta-text",
        'a text other than "auto" as beta',
        ValueError,
        ("`beta` must be a number or \"auto\", got 'automatic'",),
        settings(beta="automatic"),
    ),
    BadInput(
        "beta-auto-for-own-loss",
        'beta="auto" with a loss of one\'s own, for which the paper gives no balance',
        ValueError,
        ('beta="auto" is defined for the losses that the paper balances with KD', "give `beta` as a number"),
        lambda tmp_path: train(
            tmp_path, distillation_loss=lambda student, teacher: (student - teacher).square().mean(-1), beta="auto"
        ),
    ),
    BadInput(
        "ce-weight-negative",
        "a weight of -0.1 for cross-entropy",
        ValueError,
        ("`ce_weight` must be a number of at least 0, got -0.1",),
        settings(ce_weight=-0.1),
    ),
    BadInput(
        "nothing-to-train-on",
        "both weights of the objective 0",
        ValueError,
        ("There is nothing to train on", "`ce_weight` is 0", "Give one of them a positive weight"),
        settings(ce_weight=0, beta=0),
    ),
    BadInput(
        "labels-alone-of-no-weight",
        'loss="ce" with cross-entropy weighed 0',
        ValueError,
        ("There is nothing to train on", "(loss='ce', beta=1.0)", "Give one of them a positive weight"),
        settings(loss="ce", ce_weight=0),
    ),
    BadInput(
        "no-samples-for-beta",
        "an automatic beta measured over no samples",
        ValueError,
        ("`auto_beta_samples` must be at least 1, got 0",),
        settings(auto_beta_samples=0),
    ),
    BadInput(
        "two-label-names",
        "two batch entries named as the labels",
        ValueError,
        ("`label_names` must name the one batch entry that holds the labels", "got ['a', 'b']"),
        settings(label_names=["a", "b"]),
    ),
    BadInput(
        "lambda-one",
        "λ = 1 for the automatic beta, which leaves no labels",
        ValueError,
        ("`balance_lambda` must be in [0, 1), got 1.0",),
        settings(balance_lambda=1.0),
    ),
    BadInput(
        "momentum-one", "momentum 1", ValueError, ("`momentum` must be in [0, 1), got 1.0",), settings(momentum=1.0)
    ),
    BadInput(
        "average-of-decay-one",
        "ema_decay 1",
        ValueError,
        ("`ema_decay` must be in (0, 1), such as 0.9999, or None, got 1.0",),
        settings(ema_decay=1.0),
    ),
    BadInput(
        "average-of-decay-zero",
        "ema_decay 0",
        ValueError,
        ("`ema_decay` must be in (0, 1), such as 0.9999, or None, got 0",),
        settings(ema_decay=0),
    ),
    BadInput(
        "average-of-decay-nan",
        "ema_decay NaN",
        ValueError,
        ("`ema_decay` must be in (0, 1)", "got nan"),
        settings(ema_decay=NAN),
    ),
    BadInput(
        "average-of-decay-text",
        "a text as ema_decay",
        ValueError,
        ("`ema_decay` must be in (0, 1)", "got 'slow'"),
        settings(ema_decay="slow"),
    ),
    BadInput(
        "warmup-of-no-average",
        "ema_warmup without ema_decay",
        ValueError,
        ("`ema_warmup` is for the decay of an average, and there is none", "give `ema_decay`"),
        settings(ema_warmup=True),
    ),
    BadInput(
        "milestones-unordered",
        "learning-rate milestones out of order",
        ValueError,
        ("`lr_milestones` must be increasing epochs above 0, got [60, 30]",),
        settings(lr_milestones=[60, 30]),
    ),
    BadInput(
        "milestones-without-length",
        "learning-rate milestones, in epochs, for a stream without a length",
        ValueError,
        ("`lr_milestones` are epochs, and this data set has no length", "or use lr_scheduler_type"),
        lambda tmp_path: train(tmp_path, Stream(), max_steps=3, lr_milestones=[1]),
    ),
    BadInput(
        "lr-decay-zero", "lr_decay 0", ValueError, ("`lr_decay` must be in (0, 1], got 0.0",), settings(lr_decay=0.0)
    ),
    BadInput(
        "mixup-negative",
        "mixup of strength -1",
        ValueError,
        ("`mixup_alpha` must be a number of at least 0, got -1",),
        settings(mixup_alpha=-1),
    ),
    BadInput(
        "mixup-probability-above-one",
        "a probability of 1.1 for mixing",
        ValueError,
        ("`mixup_prob` must be in [0, 1], got 1.1",),
        settings(mixup_prob=1.1),
    ),
    BadInput(
        "mixup-with-unknown-class-count",
        "mixup for a student that does not say how many classes it has",
        ValueError,
        ("this batch has the label", "must be below the class count", "`num_classes`"),
        lambda tmp_path: train(
            tmp_path, student=nn.Sequential(nn.Flatten(), nn.Linear(192, CLASSES)), mixup_alpha=1.0
        ),
    ),
    BadInput(
        "smoothing-one",
        "label smoothing of 1, which leaves no labels",
        ValueError,
        ("`label_smoothing_factor` must be in [0, 1), got 1.0",),
        settings(label_smoothing_factor=1.0),
    ),
    BadInput(
        "unknown-loss",
        "a loss's name with two letters exchanged",
        ValueError,
        ("Unknown `loss` 'WTMM'", "it must be one of ce, kd, ttm, wttm", "Did you mean 'wttm'?"),
        settings(loss="WTMM"),
    ),
    BadInput(
        "unknown-loss-argument",
        "an argument that the loss does not have",
        ValueError,
        ("The loss 'wttm' takes gamma, not alpha", "correct `loss_kwargs`"),
        lambda tmp_path: trainer(tmp_path, loss_kwargs={"alpha": 1.0}),
    ),
    BadInput(
        "loss-without-gamma",
        "a loss built without its gamma",
        ValueError,
        ("The loss 'kd' needs a value for gamma, and none was given",),
        lambda tmp_path: build_loss("kd"),
    ),
    BadInput(
        "own-loss-returns-nothing",
        "a loss of one's own without a return statement",
        TypeError,
        ("`distillation_loss` returned NoneType", "return a tensor, one value per sample or their mean"),
        lambda tmp_path: train(tmp_path, distillation_loss=lambda student, teacher: None),
    ),
    BadInput(
        "own-loss-without-distill",
        "a loss of one's own that returns a dict without the loss",
        TypeError,
        ("`distillation_loss` returned the dict {'kl': Tensor}", "a dict of tensors with that under 'distill'"),
        lambda tmp_path: train(
            tmp_path, distillation_loss=lambda student, teacher: {"kl": (student - teacher).square().mean(-1)}
        ),
    ),
    BadInput(
        "on-bad-sample-unknown",
        'on_bad_sample="ignore"',
        ValueError,
        ("`on_bad_sample` must be one of 'raise', 'skip', got",),
        settings(on_bad_sample="ignore"),
    ),
    BadInput(
        "plain-training-arguments",
        "transformers' TrainingArguments in place of a DistillationConfig",
        TypeError,
        ("`args` must be a DistillationConfig, got TrainingArguments",),
        lambda tmp_path: DistillationTrainer(*networks(), TrainingArguments(str(tmp_path), use_cpu=True)),
    ),
    BadInput(
        "loss-arguments-no-json",
        "arguments of the loss that are no JSON",
        ValueError,
        ("`loss_kwargs` must be JSON, an object, got '{alpha: 1}'",),
        settings(loss_kwargs="{alpha: 1}"),
    ),
    BadInput(
        "gamma-as-loss-argument",
        "gamma among the loss's further arguments",
        ValueError,
        ("`loss_kwargs` cannot hold gamma", "give it as `gamma`, or as `temperature`"),
        settings(loss_kwargs={"gamma": 0.5}),
    ),
    BadInput(
        "two-temperatures",
        "a temperature, and another one among the loss's further arguments",
        ValueError,
        ("`temperature`=4.0 and the temperature 2 in `loss_kwargs` contradict each other", "give one of them"),
        settings(loss="dkd", temperature=4.0, loss_kwargs={"temperature": 2}),
    ),
    BadInput(
        "labelled-loss-without-labels",
        "a loss that needs labels, and data without any",
        ValueError,
        ("dkd needs the class of each sample, and the batch has no labels", "take a loss without labels"),
        lambda tmp_path: train(tmp_path, data=Images(labels=False), loss="dkd", ce_weight=0),
    ),
    BadInput(
        "one-class-loss-with-mixup",
        "mixup with a loss that takes one class per sample",
        ValueError,
        ("dkd takes one class per sample, and the labels are probabilities", "train without mixup and CutMix"),
        lambda tmp_path: train(tmp_path, loss="dkd", mixup_alpha=0.5),
    ),
    BadInput(
        "text-as-weight",
        "a text as the weight of cross-entropy",
        ValueError,
        ("`ce_weight` must be a number, got 'half'",),
        settings(ce_weight="half"),
    ),
    BadInput(
        "one-milestone-without-list",
        "a number where a list of milestones belongs",
        ValueError,
        ("`lr_milestones` must be a list of epochs, got 30",),
        settings(lr_milestones=30),
    ),
    BadInput(
        "batch-of-none",
        "a batch size of 0",
        ValueError,
        ("`per_device_train_batch_size` must be at least 1, got 0",),
        settings(per_device_train_batch_size=0),
    ),
    BadInput(
        "accumulation-of-none",
        "gradients accumulated over 0 batches",
        ValueError,
        ("`gradient_accumulation_steps` must be at least 1, got 0",),
        settings(gradient_accumulation_steps=0),
    ),
    BadInput(
        "epochs-negative",
        "-1 epochs, which would end without a step and without a word",
        ValueError,
        ("`num_train_epochs` must be above 0, unless `max_steps` is given, got -1",),
        settings(num_train_epochs=-1),
    ),
]

TRAINING = [
    BadInput(
        "nan-images",
        "an image with a pixel that is not a number",
        RuntimeError,
        ("The loss is not finite at step 1", "ce", "logits hold NaN", "the last checkpoint is untouched"),
        train_on(lambda sample, index: {**sample, "pixel_values": sample["pixel_values"] / (index != 3) * 0}),
    ),
    BadInput(
        "average-of-coarse-weights",
        "ema_decay for a student whose weights are bf16",
        ValueError,
        ("`ema_decay` does not go with weights in bfloat16", "keep the student in fp32"),
        lambda tmp_path: train(tmp_path, student=ConvNet().bfloat16(), ema_decay=0.9),
    ),
    BadInput(
        "nan-teacher",
        "a teacher whose logits are not numbers",
        RuntimeError,
        ("The loss is not finite at step 1", "distill", "The teacher logits hold NaN"),
        lambda tmp_path: train(tmp_path, teacher=lambda **batch: torch.full((8, CLASSES), NAN)),
    ),
    BadInput(
        "broken-picture-in-training",
        "a truncated JPEG among the training pictures",
        ValueError,
        ("Cannot read image", "cat/cut.jpg", "image file is truncated", "Remove it"),
        lambda tmp_path: train(
            tmp_path / "output", ImageFolderDataset(picture_folder(tmp_path, {"cut.jpg": JPEG[:900]}), EVAL)
        ),
    ),
]

COMMANDS = [
    BadInput(
        "unknown-yaml-key",
        "a YAML key with two letters exchanged",
        ValueError,
        ("row.yaml has the unknown key 'studnet' (did you mean student?)",),
        lambda tmp_path: recipe(tmp_path, "studnet: resnet18\n"),
    ),
    BadInput(
        "yaml-value-of-wrong-type",
        "a text where the YAML file must have a number",
        ValueError,
        ("row.yaml: argument --learning_rate", "invalid float value: 'fast'"),
        lambda tmp_path: recipe(tmp_path, "learning_rate: fast\n"),
    ),
    BadInput(
        "yaml-value-missing",
        "a YAML key with nothing behind it",
        ValueError,
        ("row.yaml gives 'learning_rate' no value", "give one, or leave the line out"),
        lambda tmp_path: recipe(tmp_path, "learning_rate:\n"),
    ),
    BadInput(
        "yaml-of-wrong-form",
        "a YAML file that holds a list",
        ValueError,
        ("row.yaml must hold `key: value` lines, got a list",),
        lambda tmp_path: recipe(tmp_path, "- a\n- b\n"),
    ),
    BadInput(
        "yaml-with-syntax-error",
        "a YAML file with a bracket that is never closed",
        ValueError,
        ("row.yaml is not a YAML file", "line 2"),
        lambda tmp_path: recipe(tmp_path, "lr_milestones: [30, 60\n"),
    ),
    BadInput(
        "no-yaml",
        "a YAML file that does not exist",
        ValueError,
        ("--config", "none.yaml does not exist", "beside it are row.yaml"),
        lambda tmp_path: recipe(tmp_path, "", file="none.yaml"),
    ),
    BadInput(
        "unknown-option",
        "a command-line option with a letter missing",
        ValueError,
        ("There is no argument --gama (did you mean --gamma?)", "--help lists them"),
        lambda tmp_path: command_line("--gama=0.5"),
    ),
    BadInput(
        "option-of-wrong-type",
        "a text as a number on the command line",
        ValueError,
        ("argument --gamma: invalid float value: 'high'",),
        lambda tmp_path: command_line("--gamma=high"),
    ),
    BadInput(
        "batch-not-shared-equally",
        "a total batch of 256 on three processes",
        ValueError,
        ("`total_batch_size` 256 cannot be shared equally by 3 processes", "make it a multiple of 3 (such as 255)"),
        lambda tmp_path: shared(256, 3),
    ),
    BadInput(
        "batch-that-contradicts-itself",
        "a total batch that is not the product of its parts",
        ValueError,
        ("`total_batch_size` is 256, but 2 processes", "are 128", "leave one of the three out"),
        lambda tmp_path: shared(256, 2, per_device=32, accumulation=2),
    ),
    BadInput(
        "teacher-without-weights",
        "a CIFAR-100 row without its teacher's weights",
        ValueError,
        ("The teacher cifar_wrn_40_2 needs weights", "--fetch_teacher fetches http://", "--teacher_checkpoint FILE"),
        cifar_teacher,
    ),
    BadInput(
        "teacher-not-published",
        "`--fetch_teacher` for a network of which no weights are published",
        ValueError,
        ("The teacher cifar_resnet8 has no published weights", "--teacher_checkpoint FILE"),
        lambda tmp_path: cifar_teacher(tmp_path, "--teacher=cifar_resnet8", "--fetch_teacher"),
    ),
    BadInput(
        "download-breaks-off",
        "a teacher's download that breaks off half way (nothing of it stays)",
        RuntimeError,
        ("/file.pth could not be fetched", "only 3 of 7 bytes came", "try again"),
        lambda tmp_path: fetched(tmp_path, broken=("/file.pth",)),
    ),
    BadInput(
        "download-of-another-file",
        "a teacher's download with another SHA-256 than was asked for (it is not kept)",
        ValueError,
        ("What came from http://127.0.0.1", "has the SHA-256 9a12", "asked for: it was not kept"),
        lambda tmp_path: fetched(tmp_path, "0" * 64),
    ),
    BadInput(
        "no-digest",
        "a SHA-256 of five letters",
        ValueError,
        ("A SHA-256 has 64 hexadecimal digits, got 'abcde'",),
        lambda tmp_path: fetched(tmp_path, "abcde"),
    ),
    BadInput(
        "damaged-result",
        "a results.json that was cut off, among those to collect (the others are)",
        ValueError,
        ("results.json is no JSON", "it was left out"),
        lambda tmp_path: collected(tmp_path, '{"row": "x", "stu'),
    ),
    BadInput(
        "foreign-result",
        "a results.json of another program, among those to collect (the others are)",
        ValueError,
        ("results.json is not of a run of a row", "'student'", "it was left out"),
        lambda tmp_path: collected(tmp_path, '{"accuracy": 0.9}'),
    ),
]

BAD_INPUTS = [
    *PICTURES,
    *LABELS,
    *COLUMNS_AND_DATA_SETS,
    *TEACHERS_AND_STUDENTS,
    *FILES,
    *SETTINGS,
    *TRAINING,
    *COMMANDS,
]


# The tests --------------------------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def recipes_and_quick_streams(monkeypatch):
    monkeypatch.syspath_prepend(str(RECIPES))
    # `datasets` asks a server about each loading to count it.
    monkeypatch.setattr(datasets.config, "HF_UPDATE_DOWNLOAD_COUNTS", False)


@pytest.mark.parametrize("bad", BAD_INPUTS, ids=lambda bad: bad.id)
def test_a_bad_input_gets_one_clear_sentence(bad, tmp_path):
    with pytest.raises(bad.error) as caught:
        bad.build(tmp_path)
    message = str(caught.value)
    assert type(caught.value) is bad.error
    assert [fragment for fragment in bad.says if fragment not in message] == [], message
    assert "\n" not in message
    assert not list(tmp_path.rglob("*.ran")), "code in a file was run"


def test_the_table_is_a_list_of_different_faults():
    assert len(BAD_INPUTS) >= 100
    for name in ("id", "given"):
        values = [getattr(bad, name) for bad in BAD_INPUTS]
        assert [value for value in set(values) if values.count(value) > 1] == []
    assert [bad.id for bad in BAD_INPUTS if not bad.says or "\n" in bad.given] == []


# ---- In the middle of a run --------------------------------------------------------------------------------------


def nan(sample):
    return {**sample, "pixel_values": sample["pixel_values"] * NAN}


def label(sample):
    return {**sample, "labels": torch.tensor(9)}


def picture(sample):
    return {**sample, "pixel_values": load_image(JPEG[:900], "cut.jpg")}


@pytest.mark.parametrize(
    ("change", "error", "message", "kept"),
    [
        (nan, RuntimeError, "not finite at step 3 ", 2),
        (label, ValueError, "The batch has the label 9", 2),
        # Batches are read one ahead of the step that is taken.
        (picture, ValueError, "Cannot read image cut.jpg", 1),
    ],
)
def test_a_bad_sample_leaves_the_last_checkpoint_intact(tmp_path, change, error, message, kept):
    options = {"save_strategy": "steps", "save_steps": 1, "train_sampling_strategy": "sequential"}
    train(tmp_path / "whole", **options)
    # In the third batch of eight.
    data = Changed(lambda sample, index: change(sample) if index == 17 else sample)
    with pytest.raises(error, match=message):
        train(tmp_path / "broken", data, **options)
    last = last_complete(tmp_path / "broken")
    assert last == tmp_path / "broken" / f"checkpoint-{kept}"
    whole, broken = (load_file(run / "model.safetensors") for run in (tmp_path / "whole" / last.name, last))
    assert whole.keys() == broken.keys()
    assert all(torch.equal(whole[key], broken[key]) for key in whole)


# ---- Pictures that look odd and are good -------------------------------------------------------------------------


GREY = np.array([[0, 50, 100], [150, 200, 255]], dtype=np.uint8)
COLOUR = np.stack([GREY, GREY[::-1], 255 - GREY], axis=-1)
ALPHA = np.array([[0, 128, 255], [255, 1, 0]], dtype=np.uint8)


def palette(**info):
    image = Image.fromarray(GREY // 50 % 3).convert("L")
    image = Image.frombytes("P", image.size, image.tobytes())
    image.putpalette([10, 20, 30, 200, 100, 50, 7, 8, 9])
    image.info.update(info)
    return image


PALETTE = np.array([[10, 20, 30], [200, 100, 50], [7, 8, 9]], dtype=np.uint8)[GREY // 50 % 3]
GREY_THRICE = np.stack([GREY] * 3, axis=-1)
CMYK = np.array([[[0, 0, 0, 0], [255, 0, 0, 0], [0, 0, 0, 255]]], dtype=np.uint8)
GOOD = {
    "colour": (Image.fromarray(COLOUR), "PNG", COLOUR),
    "grey": (Image.fromarray(GREY), "PNG", GREY_THRICE),
    "grey-and-alpha": (Image.fromarray(np.stack([GREY, ALPHA], axis=-1)), "PNG", GREY_THRICE),
    "colour-and-alpha": (Image.fromarray(np.concatenate([COLOUR, ALPHA[..., None]], axis=-1)), "PNG", COLOUR),
    "palette": (palette(), "PNG", PALETTE),
    "palette-and-alpha": (palette(transparency=b"\x00\xff\x80"), "PNG", PALETTE),
    "palette-gif": (palette(), "GIF", PALETTE),
    "black-and-white": (Image.fromarray(GREY > 120), "PNG", np.stack([(GREY > 120) * 255] * 3, axis=-1)),
    "16-bit-png": (Image.fromarray(GREY.astype(np.uint16) * 257), "PNG", GREY_THRICE),
    "16-bit-tiff": (Image.fromarray(GREY.astype(np.uint16) * 257), "TIFF", GREY_THRICE),
    "cmyk": (Image.fromarray(CMYK, "CMYK"), "TIFF", [[[255, 255, 255], [0, 255, 255], [0, 0, 0]]]),
    "one-pixel": (Image.new("RGB", (1, 1), (1, 2, 3)), "PNG", [[[1, 2, 3]]]),
    "one-grey-pixel": (Image.new("L", (1, 1), 9), "PNG", [[[9, 9, 9]]]),
    "one-16-bit-pixel": (Image.fromarray(np.array([[65535]], dtype=np.uint16)), "PNG", [[[255, 255, 255]]]),
    "one-row": (Image.fromarray(COLOUR[:1]), "PNG", COLOUR[:1]),
}


@pytest.mark.parametrize("name", GOOD)
def test_odd_pictures_are_read_as_they_are(tmp_path, name):
    image, format, expected = GOOD[name]
    content = encode(image, format)
    folder = picture_folder(tmp_path, {"0a.png": content})  # what it is shows in the bytes, not in the name
    data = ImageFolderDataset(folder, EVAL)
    row = HubImageDataset(row_with(bytes=content), EVAL)
    for picture in (data.image(1), row.image(1), load_image(content), to_rgb(Image.open(io.BytesIO(content)))):
        assert picture.mode == "RGB"
        assert np.array_equal(np.asarray(picture), np.asarray(expected, dtype=np.uint8))
    view = data[1]["pixel_values"]
    assert view.shape == (3, 8, 8) and view.isfinite().all()
