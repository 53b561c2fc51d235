from ..models.cifar import CIFAR100_MEAN, CIFAR100_STD
from .bad_samples import SkippingDataset
from .cifar import CifarDataset, CifarImages, load_cifar
from .collate import collate
from .decoding import load_image, load_image_tensor, to_rgb
from .digits import (
    DIGITS_CLASS_NAMES,
    DIGITS_MEAN,
    DIGITS_SIZE,
    DIGITS_STD,
    DigitsDataset,
    DigitsSplit,
    DigitsSplits,
    load_digits,
)
from .images import HubImageDataset, HubImageStream, ImageFolderDataset, load_image_dataset
from .transforms import eval_transform, is_deterministic, train_transform
from .views import EpochCallback, EpochMixin, set_dataset_epoch, view_rng, view_seed


__all__ = [
    "CIFAR100_MEAN",
    "CIFAR100_STD",
    "DIGITS_CLASS_NAMES",
    "DIGITS_MEAN",
    "DIGITS_SIZE",
    "DIGITS_STD",
    "CifarDataset",
    "CifarImages",
    "DigitsDataset",
    "DigitsSplit",
    "DigitsSplits",
    "EpochCallback",
    "EpochMixin",
    "HubImageDataset",
    "HubImageStream",
    "ImageFolderDataset",
    "SkippingDataset",
    "collate",
    "eval_transform",
    "is_deterministic",
    "load_cifar",
    "load_digits",
    "load_image",
    "load_image_dataset",
    "load_image_tensor",
    "set_dataset_epoch",
    "to_rgb",
    "train_transform",
    "view_rng",
    "view_seed",
]
