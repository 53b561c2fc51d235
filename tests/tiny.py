"""Networks and data small enough that a training run takes a fraction of a second."""

import torch
from torch import nn
from torch.utils.data import Dataset
from transformers import ViTConfig, ViTForImageClassification

from hf_kd import DistillationConfig


CLASSES = 5


class Images(Dataset):
    """Random images with labels; samples whose number is in `unlabelled` have none (-100)."""

    def __init__(self, count=24, classes=CLASSES, size=8, seed=0, labels=True, unlabelled=(), dtype=torch.float32):
        generator = torch.Generator().manual_seed(seed)
        self.labels = torch.randint(0, classes, (count,), generator=generator) if labels else None
        self.pixel_values = torch.randn(count, 3, size, size, generator=generator, dtype=dtype)
        if labels:
            # The class can be read off the image, so that training has something to find.
            self.pixel_values += 2.0 * torch.nn.functional.one_hot(self.labels, size)[:, None, None, :].to(dtype)
            self.labels[list(unlabelled)] = -100

    def __len__(self):
        return len(self.pixel_values)

    def __getitem__(self, index):
        sample = {"pixel_values": self.pixel_values[index], "index": index}
        return sample if self.labels is None else {**sample, "labels": self.labels[index]}


class ConvNet(nn.Module):
    """Convolution, optional BatchNorm and dropout, a head. Its forward takes timm's `x`."""

    def __init__(self, classes=CLASSES, width=6, norm=True, dropout=0.0):
        super().__init__()
        self.num_classes = classes
        self.conv = nn.Conv2d(3, width, 3, stride=2)
        self.norm = nn.BatchNorm2d(width) if norm else nn.Identity()
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(width * 9, classes)

    def forward(self, x):
        return self.head(self.dropout(torch.relu(self.norm(self.conv(x))).flatten(1)))


class Tagger(nn.Module):
    """A class for each token of a sequence."""

    def __init__(self, width):
        super().__init__()
        self.num_classes = 3
        self.embed, self.head = nn.Embedding(11, width), nn.Linear(width, 3)

    def forward(self, input_ids, attention_mask=None):
        return {"logits": self.head(torch.tanh(self.embed(input_ids)))}


def vit(classes=CLASSES, image_size=32, **options):
    """A transformers-native network: a ViT of one layer on four patches."""
    config = ViTConfig(
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        image_size=image_size,
        patch_size=image_size // 2,
        **(options or {"num_labels": classes}),
    )
    return ViTForImageClassification(config)


def networks(seed=0, dtype=torch.float32, **student_options):
    """A student and a teacher, the teacher's statistics and logits large enough to matter."""
    torch.manual_seed(seed)
    student, teacher = ConvNet(**student_options).to(dtype), ConvNet(width=8, dropout=0.5).to(dtype)
    with torch.no_grad():
        teacher.norm.running_mean.normal_()
        teacher.norm.running_var.uniform_(0.5, 2.0)
        teacher.head.weight.mul_(8.0)
    return student, teacher


def config(folder, **options):
    """Arguments for a quiet run of a few steps with plain SGD."""
    defaults = {
        "optim": "sgd",
        "learning_rate": 0.05,
        "lr_scheduler_type": "constant",
        "max_grad_norm": 0.0,
        "per_device_train_batch_size": 8,
        "num_train_epochs": 1,
        "logging_steps": 1,
        "save_strategy": "no",
        "disable_tqdm": True,
        "use_cpu": True,
        "teacher_preflight": False,
    }
    return DistillationConfig(str(folder), **{**defaults, **options})


def without_times(entry):
    """A log entry but for what differs from run to run: how long things took."""
    return {k: v for k, v in entry.items() if k != "data_wait" and "runtime" not in k and "per_second" not in k}
