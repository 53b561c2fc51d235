"""Features and their losses on two processes, against one process with the joined batch."""

import os

import pytest
import torch
import torch.distributed as dist
from processes import run_processes
from tiny import ConvNet, Images
from torch.nn.parallel import DistributedDataParallel

from hf_kd.features import FeatureTaker
from hf_kd.losses import build_feature_loss


SAMPLES, CLASSES, STEPS = 24, 5, 3

LOSSES = {
    "crd": {"feat_dim": 4, "nce_k": 6},
    "crd relax": {"feat_dim": 4, "nce_k": 6, "mode": "relax"},
    "crd all": {"feat_dim": 4, "nce_k": 6, "negatives": "all"},
    "vitkd": {"alpha": 1e-2, "beta": 1e-2, "student_features": ["tokens", "tokens@patches"]},
}


class Tokens(torch.nn.Module):
    """Four tokens and a class."""

    num_classes = CLASSES

    def __init__(self, width):
        super().__init__()
        self.tokens = torch.nn.Linear(48, width)
        self.head = torch.nn.Linear(4 * width, CLASSES)

    def forward(self, x):
        return self.head(self.tokens(x.flatten(1).unflatten(1, (4, 48))).flatten(1))


def gather(tensor):
    parts = [torch.empty_like(tensor) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, tensor.contiguous())
    return torch.cat(parts)


def train(rank, name):
    """Values, weights and the loss's state after some steps, under DistributedDataParallel if there are processes."""
    processes = int(os.environ["WORLD_SIZE"])
    torch.manual_seed(0)
    make = Tokens if name == "vitkd" else lambda width: ConvNet(width=width, norm=False)
    student, teacher = make(6).double(), make(8).double().eval()
    images = Images(count=SAMPLES, dtype=torch.float64)
    settings = dict(LOSSES[name])
    loss = build_feature_loss(name.split()[0], **settings, teacher_features=settings.get("student_features"))
    own = FeatureTaker(student, loss.student_features)
    others = FeatureTaker(teacher, loss.teacher_features, detach=True)
    first = images.pixel_values[:2]
    loss.build(
        own.shapes(lambda: student(first)), others.shapes(lambda: teacher(first)), num_samples=SAMPLES,
        sample_labels=images.labels, seed=1,
    )  # fmt: skip
    loss.double()
    network, criterion = student, loss
    if processes > 1:
        dist.init_process_group("gloo")
        loss.synchronise(gather, rank)
        network = DistributedDataParallel(student, find_unused_parameters=True)
        criterion = DistributedDataParallel(loss, broadcast_buffers=False)
    optimizer = torch.optim.SGD([*student.parameters(), *loss.parameters()], lr=0.05)
    values = []
    for step in range(STEPS):
        # Rank by rank, the samples of a step are those that one process has.
        index = torch.randperm(SAMPLES, generator=torch.Generator().manual_seed(step))[:8].chunk(processes)[rank]
        pixels = images.pixel_values[index]
        with others, torch.inference_mode():
            teacher(pixels)
        with own:
            logits = network(pixels)
        value = criterion(own.take(), others.take(), index=index)["feature"]
        optimizer.zero_grad()
        (value.mean() + torch.nn.functional.cross_entropy(logits, images.labels[index])).backward()
        optimizer.step()
        values.append(value.detach())
    return {
        "processes": dist.get_world_size() if dist.is_initialized() else 1,
        "values": torch.stack(values),
        "weights": {key: value.clone() for key, value in student.state_dict().items()},
        "state": {key: value.clone() for key, value in loss.state_dict().items()},
    }


@pytest.mark.parametrize("name", LOSSES)
def test_two_processes_do_what_one_does(name):
    (alone,) = run_processes(train, 1, name)
    two = run_processes(train, 2, name)
    assert [run["processes"] for run in two] == [2, 2] and alone["processes"] == 1
    values = torch.cat([run["values"] for run in two], dim=1)
    torch.testing.assert_close(values, alone["values"], rtol=1e-10, atol=1e-10)
    for run in two:
        for part in ("weights", "state"):
            for key, value in alone[part].items():
                torch.testing.assert_close(run[part][key], value, rtol=1e-10, atol=1e-12)
    # Bit for bit between processes: a difference in a memory would grow.
    for key, value in two[0]["state"].items():
        assert torch.equal(two[1]["state"][key], value), key
