"""Runs with and without a cache, on views that depend on (seed, epoch, index)."""

import torch
from tiny import ConvNet, Images, config, networks

from hf_kd import DistillationTrainer
from hf_kd.data import EpochMixin, view_rng


class Views(EpochMixin, Images):
    """Images with noise that is new in every epoch."""

    def __init__(self, view_seed=0, noise=1.0, **options):
        super().__init__(**options)
        self._init_epoch()
        self.seed, self.noise = view_seed, noise

    def __getitem__(self, index):
        with view_rng(self.seed, self.epoch, int(index)):
            noise = self.noise * torch.randn(3, 8, 8)
        sample = super().__getitem__(index)
        return {**sample, "pixel_values": sample["pixel_values"] + noise}


class Fixed(Images):
    """Images that are the same in every epoch."""

    fixed_views = True


class Counting(torch.nn.Module):
    """A network that counts the images it is given."""

    def __init__(self, network):
        super().__init__()
        self.network, self.num_classes, self.seen = network, network.num_classes, 0

    def forward(self, x):
        self.seen += len(x)
        return self.network(x)


class Recording(DistillationTrainer):
    def compute_loss(self, *args, **kwargs):
        loss = super().compute_loss(*args, **kwargs)
        self.losses.append(float((loss[0] if isinstance(loss, tuple) else loss).detach()))
        return loss


def make_trainer(
    folder, cache=None, data=None, teacher=None, student=None, trainer_class=Recording, data_collator=None, **options
):
    """A trainer of the tiny student; `cache` is the folder of its cache, or None."""
    teacher = Counting(networks()[1]) if teacher is None else teacher
    if student is None:
        torch.manual_seed(1)
        student = ConvNet(dropout=0.3)
    options = {"num_train_epochs": 3, "gamma": 0.5, "per_device_train_batch_size": 4, **options}
    if cache is not None:
        options["teacher_cache_dir"] = str(cache)
    data = Views(count=27) if data is None else data
    args = config(folder, **options)
    trainer = trainer_class(student, teacher, args, train_dataset=data, data_collator=data_collator)
    trainer.losses = []
    return trainer


def run(folder, cache=None, **options):
    """A finished run's trainer."""
    trainer = make_trainer(folder, cache, **options)
    trainer.train()
    return trainer


def weights_of(trainer):
    return {key: value.clone() for key, value in trainer.model.state_dict().items()}


def assert_same_run(one, other):
    assert one.losses == other.losses
    for key, value in one.model.state_dict().items():
        assert torch.equal(value, other.model.state_dict()[key]), key
