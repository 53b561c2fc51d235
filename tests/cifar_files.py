"""CIFAR in each of its forms, written from a few images: uint8 arrays (N, 3, 32, 32) and class numbers."""

import pickle
import struct
from pathlib import Path

import datasets
import numpy as np
from PIL import Image


ORIGINAL_FOLDERS = {
    (100, "python"): "cifar-100-python",
    (10, "python"): "cifar-10-batches-py",
    (100, "binary"): "cifar-100-binary",
    (10, "binary"): "cifar-10-batches-bin",
}


def random_split(count, classes, seed=0):
    """Noise, and labels that hold every class where `count` allows."""
    rng = np.random.default_rng(seed)
    labels = rng.permutation(np.arange(count) % classes)
    return rng.integers(0, 256, (count, 3, 32, 32), dtype=np.uint8), labels.astype(np.int64)


def _original_folder(folder, classes, version):
    target = Path(folder) / ORIGINAL_FOLDERS[classes, version]
    target.mkdir(parents=True)
    return target


def _files(train, test, classes):
    """What each file holds, by its name without suffix: CIFAR-10's training split is five files."""
    if classes == 100:
        return {"train": train, "test": test}
    batches = zip(*(np.array_split(array, 5) for array in train), strict=True)
    return {**{f"data_batch_{number}": batch for number, batch in enumerate(batches, 1)}, "test_batch": test}


def write_python(folder, train, test, names, *, classes=100, dump=pickle.dumps):
    """The "python" version in `folder/cifar-...`; `dump` makes a pickle of a dict."""
    target = _original_folder(folder, classes, "python")
    for name, (images, labels) in _files(train, test, classes).items():
        entries = {"batch_label": name, "data": images.reshape(len(images), -1)}
        entries["labels" if classes == 10 else "fine_labels"] = labels.tolist()
        if classes == 100:
            entries["coarse_labels"] = [0] * len(labels)
        (target / name).write_bytes(dump(entries))
    key = "label_names" if classes == 10 else "fine_label_names"
    (target / ("batches.meta" if classes == 10 else "meta")).write_bytes(dump({key: list(names)}))
    return target


def write_binary(folder, train, test, names, *, classes=100):
    """The "binary" version in `folder/cifar-...`."""
    target = _original_folder(folder, classes, "binary")
    for name, (images, labels) in _files(train, test, classes).items():
        bytes_of_labels = labels[:, None].astype(np.uint8)
        if classes == 100:
            # The coarse label comes first, and is another number.
            bytes_of_labels = np.concatenate([19 - bytes_of_labels % 20, bytes_of_labels], axis=1)
        (target / f"{name}.bin").write_bytes(
            np.concatenate([bytes_of_labels, images.reshape(len(images), -1)], axis=1).tobytes()
        )
    file = "batches.meta.txt" if classes == 10 else "fine_label_names.txt"
    # The original of CIFAR-10 ends in an empty line.
    (target / file).write_text("\n".join(names) + "\n\n")
    return target


def write_image_folder(folder, train, test, names, *, test_name="test"):
    """Folders `train` and `test_name` of PNGs, numbered in the order of the split within each class."""
    for split, (images, labels) in (("train", train), (test_name, test)):
        for number, (image, label) in enumerate(zip(images, labels, strict=True)):
            target = Path(folder) / split / names[label]
            target.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image.transpose(1, 2, 0)).save(target / f"{number:05}.png")
    return Path(folder)


def write_parquet(folder, train, test, names, *, image_column="img", label_column="fine_label"):
    """Parquet files of both splits, named and typed as on the Hub."""
    features = {image_column: datasets.Image(), label_column: datasets.ClassLabel(names=list(names))}
    if label_column == "fine_label":
        features["coarse_label"] = datasets.Value("int64")
    Path(folder).mkdir(parents=True, exist_ok=True)
    for split, (images, labels) in (("train", train), ("test", test)):
        columns = {image_column: [Image.fromarray(image.transpose(1, 2, 0)) for image in images]}
        columns.update({name: labels for name in features if name != image_column})
        table = datasets.Dataset.from_dict(columns, features=datasets.Features(features))
        table.to_parquet(Path(folder) / f"{split}-00000-of-00001.parquet")
    return Path(folder)


def python2_dumps(entries):
    """The pickle that Python 2, which wrote the originals, makes of a dict of texts, lists and a uint8 matrix."""

    def write(value):
        if isinstance(value, str):
            text = value.encode("latin1")
            return b"T" + struct.pack("<i", len(text)) + text  # a Python 2 string
        if isinstance(value, int):
            return b"J" + struct.pack("<i", value)
        if isinstance(value, list):
            return b"](" + b"".join(map(write, value)) + b"e"
        empty = b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\nK\x00\x85" + write("b") + b"tR"
        dtype = b"cnumpy\ndtype\n(" + write("u1") + b"K\x00K\x01tR(K\x03" + write("|") + b"NNN"
        dtype += write(-1) + write(-1) + b"K\x00tb"
        shape = b"(" + b"".join(map(write, value.shape)) + b"t"
        return empty + b"(K\x01" + shape + dtype + b"\x89" + write(value.tobytes().decode("latin1")) + b"tb"

    return b"\x80\x02}(" + b"".join(write(key) + write(value) for key, value in entries.items()) + b"u."
