"""What the tests in this folder need beyond those of the `test` extra."""

from importlib.util import find_spec

import numpy as np
import pytest
import torch
from PIL import Image

from hf_kd import create_student, save_student


# DeepSpeed is nobody's dependency here, and a user's choice: `pip install deepspeed` has its tests collected.
collect_ignore = [] if find_spec("deepspeed") else ["test_deepspeed.py"]


@pytest.fixture(scope="session")
def bright_and_dark(tmp_path_factory):
    """Pictures of two classes, bright and dark: 16 to train on, 8 for evaluation."""
    folder = tmp_path_factory.mktemp("images")
    generator = np.random.default_rng(0)
    for split, count in (("train", 8), ("val", 4)):
        for name, low in (("bright", 128), ("dark", 0)):
            (folder / split / name).mkdir(parents=True)
            for number in range(count):
                pixels = generator.integers(low, low + 128, (32, 32, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / split / name / f"{number}.png")
    return folder


@pytest.fixture(scope="session")
def small_teacher(tmp_path_factory):
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("teacher")
    save_student(create_student("test_resnet", num_classes=2, img_size=32), folder)
    return folder
