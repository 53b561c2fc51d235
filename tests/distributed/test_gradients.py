"""Two processes, one process with the batch of both, and accumulation of two batches: the same training, in fp64.

The number of samples is odd and the batch does not divide it, so the last batch of every epoch is uneven.
"""

import copy
from functools import partial

import pytest
import torch
from processes import run_processes
from tiny import ConvNet, Images, config, networks
from torch.utils.data import IterableDataset, get_worker_info

from hf_kd import DistillationTrainer


SAMPLES = 27
BATCH = 4  # of each of two processes; 27 = 3 × 8 + 3


class Stream(IterableDataset):
    """The samples in order; with workers, each has its share."""

    def __init__(self, images, sized):
        super().__init__()
        self.images = images
        if sized:
            self.__class__ = SizedStream

    def __iter__(self):
        worker = get_worker_info()
        first, step = (0, 1) if worker is None else (worker.id, worker.num_workers)
        return (self.images[i] for i in range(first, len(self.images), step))


class SizedStream(Stream):
    def __len__(self):
        return len(self.images)


def images(**options):
    return Images(count=SAMPLES, unlabelled=(0, 3, 4), dtype=torch.float64, **options)


def make(kind):
    return {
        "map": images,
        "stream": lambda: Stream(images(), sized=False),
        "sized stream": lambda: Stream(images(), sized=True),
    }[kind]()


def train(rank, folder, data="map", **options):
    """Weights, beta and log of a run, and how many processes it had."""
    _, teacher = networks(dtype=torch.float64)
    torch.manual_seed(1)
    student = ConvNet(norm=False).double()
    args = config(folder, **{"num_train_epochs": 2, "gamma": 0.4, "auto_beta_samples": 8, **options})
    trainer = DistillationTrainer(
        student, teacher, args, train_dataset=make(data), eval_dataset=images(seed=4), optimizers=(None, None)
    )
    trainer.train()
    metrics = trainer.evaluate()
    return {
        "processes": args.world_size,
        "weights": {key: value.detach().clone() for key, value in student.state_dict().items()},
        "beta": trainer.beta,
        "log": trainer.state.log_history,
        "metrics": {key: metrics[key] for key in ("eval_loss", "eval_top1", "eval_entropy")},
    }


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """Runs of one process, each made once."""
    made = {}

    def run(**options):
        key = repr(sorted(options.items()))
        if key not in made:
            folder = tmp_path_factory.mktemp("alone")
            made[key] = run_processes(partial(train, **options), 1, folder)[0]
        return copy.deepcopy(made[key])

    return run


AVERAGES = {"loss", "ce", "distill", "student_entropy", "power_sum", "divergence", "teacher_entropy"}
AVERAGES |= {"grad_norm_ce", "grad_norm_distill", "grad_cosine"}


def assert_same(run, reference, tolerance=1e-12):
    for key, value in reference["weights"].items():
        torch.testing.assert_close(run["weights"][key], value, rtol=0, atol=tolerance)
    assert run["beta"] == pytest.approx(reference["beta"], rel=1e-12)
    for ours, theirs in zip(run["log"], reference["log"], strict=True):
        assert ours.keys() == theirs.keys()
        for key in theirs.keys() & AVERAGES:
            assert ours[key] == pytest.approx(theirs[key], rel=1e-5), key
    assert run["metrics"] == pytest.approx(reference["metrics"], rel=1e-9)


def test_beta_is_measured_on_every_sample_once(alone, tmp_path):
    options = {"loss": "wttm", "beta": "auto", "auto_beta_samples": 1000, "ce_weight": 0.5}
    reference = alone(per_device_train_batch_size=2 * BATCH, **options)
    for run in run_processes(partial(train, per_device_train_batch_size=BATCH, **options), 2, tmp_path):
        assert_same(run, reference)


LOSSES = {
    "ce": {"loss": "ce"},
    "kd": {"loss": "kd", "beta": 0.9, "ce_weight": 0.1, "log_analysis": True},
    "ttm": {"loss": "ttm", "beta": "auto"},
    "wttm": {"loss": "wttm", "beta": "auto"},
    "wttm without labels": {"loss": "wttm", "ce_weight": 0.0, "beta": 2.0, "log_analysis": True},
    "wttm, smoothed labels": {"loss": "wttm", "label_smoothing_factor": 0.1},
}


@pytest.mark.parametrize("loss", LOSSES)
def test_two_processes_train_as_one(loss, alone, tmp_path):
    options = LOSSES[loss]
    reference = alone(per_device_train_batch_size=2 * BATCH, **options)
    two = run_processes(partial(train, per_device_train_batch_size=BATCH, **options), 2, tmp_path)
    assert [run["processes"] for run in (*two, reference)] == [2, 2, 1]
    for run in two:
        assert_same(run, reference)


@pytest.mark.parametrize("loss", LOSSES)
def test_accumulation_trains_as_one_batch(loss, alone):
    options = LOSSES[loss]
    accumulated = alone(per_device_train_batch_size=BATCH, gradient_accumulation_steps=2, **options)
    assert_same(accumulated, alone(per_device_train_batch_size=2 * BATCH, **options))


def test_two_processes_that_accumulate(alone, tmp_path):
    options = {"loss": "wttm", "beta": "auto", "log_analysis": True}
    small = partial(train, per_device_train_batch_size=2, gradient_accumulation_steps=2, **options)
    for run in run_processes(small, 2, tmp_path):
        assert_same(run, alone(per_device_train_batch_size=2 * BATCH, **options))


WAYS = {
    "each its own": {},
    "dispatched": {"dispatch_batches": True},
    "split": {"split_batches": True, "dispatch_batches": False},
    "split and dispatched": {"split_batches": True, "dispatch_batches": True},
    "not dispatched": {"dispatch_batches": False},
}


@pytest.mark.parametrize("data", ["map", "sized stream", "stream"])
@pytest.mark.parametrize("way", WAYS)
def test_however_the_batches_are_shared_out(way, data, alone, tmp_path):
    options = {"loss": "wttm", "beta": "auto", "data": data, "train_sampling_strategy": "sequential"}
    if data == "stream":
        options |= {"max_steps": 8, "num_train_epochs": 1}  # two epochs, as far as a length says so
    reference = alone(per_device_train_batch_size=2 * BATCH, **options)
    batch = 2 * BATCH if WAYS[way].get("split_batches") else BATCH
    shared = partial(train, per_device_train_batch_size=batch, accelerator_config=WAYS[way], **options)
    for run in run_processes(shared, 2, tmp_path):
        assert run["processes"] == 2
        assert_same(run, reference)


@pytest.mark.parametrize("data", ["sized stream", "stream"])
def test_each_worker_of_a_stream_fills_up_its_own_last_batch(data, alone, tmp_path):
    options = {
        "loss": "wttm",
        "beta": 1.5,
        "data": data,
        "dataloader_num_workers": 2,
        "max_steps": 4,
        "num_train_epochs": 1,
    }
    reference = alone(per_device_train_batch_size=2 * BATCH, **options)
    each = partial(train, per_device_train_batch_size=BATCH, accelerator_config={"dispatch_batches": False}, **options)
    for run in run_processes(each, 2, tmp_path):
        assert_same(run, reference)


def mean_loss(student_logits, teacher_logits):
    return (student_logits - teacher_logits).square().mean()


def train_with_mean_loss(rank, folder, batch):
    _, teacher = networks(dtype=torch.float64)
    torch.manual_seed(1)
    student = ConvNet(norm=False).double()
    args = config(folder, per_device_train_batch_size=batch, mixup_alpha=0.0)
    trainer = DistillationTrainer(
        student, teacher, args, distillation_loss=mean_loss, train_dataset=Images(count=17, dtype=torch.float64)
    )
    trainer.train()
    return student.state_dict()


def test_a_process_without_a_sample_of_its_own_does_not_count(tmp_path):
    # 17 = 2 × 8 + 1: the second process's last batch holds repeats alone, also for a loss that is a mean already.
    reference = run_processes(train_with_mean_loss, 1, tmp_path / "one", 8)[0]
    first, second = run_processes(train_with_mean_loss, 2, tmp_path / "two", 4)
    for key, value in first.items():
        torch.testing.assert_close(second[key], value, rtol=0, atol=0)
    assert reference.keys() == first.keys()


def refuse(rank, folder):
    student, teacher = networks()
    args = config(folder, accelerator_config={"even_batches": False})
    DistillationTrainer(student, teacher, args)


def test_batches_that_would_leave_a_process_waiting_are_refused(tmp_path):
    with pytest.raises(RuntimeError, match="even_batches=False: with several processes some would have no last batch"):
        run_processes(refuse, 2, tmp_path)
