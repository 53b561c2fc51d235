"""on_bad_sample, from the configuration to the report after each epoch."""

import io

import datasets
import pytest
import torch
from PIL import Image
from tiny import Images, config, networks
from torch.utils.data import IterableDataset

from hf_kd import DistillationTrainer
from hf_kd.data import HubImageStream, eval_transform


class Torn(Images):
    """Images of which some cannot be read."""

    def __init__(self, bad, **options):
        super().__init__(**options)
        self.bad = bad

    def __getitem__(self, index):
        if index in self.bad:
            raise OSError(f"picture{index}.jpg is truncated")
        return super().__getitem__(index)


def run(folder, **options):
    student, teacher = networks()
    args = config(folder, **{"num_train_epochs": 2, "eval_strategy": "epoch", **options})
    trainer = DistillationTrainer(
        student,
        teacher,
        args,
        train_dataset=Torn({3, 11}, count=24),
        eval_dataset=Torn({0, 1, 2}, count=12, seed=1),
    )
    return trainer, trainer.train()


def test_by_default_the_first_one_ends_the_run(tmp_path):
    with pytest.raises(OSError, match=r"picture\d+.jpg is truncated"):
        run(tmp_path)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("persistent", [False, True])
def test_skipping_reports_how_many_and_which(workers, persistent, tmp_path, caplog):
    options = {"dataloader_num_workers": workers, "dataloader_persistent_workers": persistent and workers > 0}
    trainer, _ = run(tmp_path, on_bad_sample="skip", **options)
    expected = "2 of 24 training samples could not be read and were replaced by others: those with index 3, 11."
    assert caplog.text.count(expected) == 1  # nothing new in the second epoch
    assert trainer.state.global_step == 6
    if workers == 0:
        assert "picture3.jpg is truncated" in caplog.text


def test_in_evaluation_a_replacement_does_not_count(tmp_path):
    trainer, _ = run(tmp_path, on_bad_sample="skip", num_train_epochs=1)
    last = next(entry for entry in reversed(trainer.state.log_history) if "eval_nll" in entry)
    readable = torch.utils.data.Subset(Images(count=12, seed=1), range(3, 12))
    expected = trainer.evaluate(readable)
    for key in ("eval_loss", "eval_top1", "eval_nll", "eval_ece"):
        assert last[key] == pytest.approx(expected[key], abs=1e-6), key


class Stream(IterableDataset):
    def __iter__(self):
        return iter(Images(count=8))


def test_a_stream_that_cannot_skip_is_refused(tmp_path):
    args = config(tmp_path, on_bad_sample="skip", max_steps=1)
    trainer = DistillationTrainer(*networks(), args, train_dataset=Stream())
    with pytest.raises(ValueError, match='on_bad_sample="skip" cannot go on with a Stream'):
        trainer.train()


def test_a_stream_says_how_many_it_left_out(tmp_path, caplog):
    pictures = []
    for number in range(6):
        buffer = io.BytesIO()
        Image.new("RGB", (8, 8), (40 * number, 0, 0)).save(buffer, "PNG")
        pictures.append({"bytes": buffer.getvalue() if number not in (2, 3) else b"no picture", "path": None})
    table = datasets.Dataset.from_dict(
        {"image": pictures, "label": [0] * 6},
        features=datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")}),
    )
    stream = HubImageStream(table.to_iterable_dataset(), eval_transform(8))
    args = config(tmp_path, on_bad_sample="skip", max_steps=2, per_device_train_batch_size=4)
    DistillationTrainer(*networks(), args, train_dataset=stream).train()
    assert "2 images of the training stream, over all epochs, could not be read and were left out." in caplog.text
    assert "number 2 of the stream" in caplog.text
