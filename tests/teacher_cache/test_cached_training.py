"""Training from stored teacher logits is training with the teacher."""

import json

import pytest
import torch
from cached_runs import Counting, Fixed, Views, assert_same_run, make_trainer, run
from tiny import ConvNet, Images, Tagger, config, networks
from torch.utils.data import ConcatDataset, IterableDataset, Subset

from hf_kd import DistillationTrainer, TeacherCache
from hf_kd.data import collate


# ---- The same losses -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("accumulation", [1, 2])
def test_fp32_is_the_live_run_to_the_last_bit(accumulation, tmp_path):
    options = {"gradient_accumulation_steps": accumulation, "beta": "auto"}
    live = run(tmp_path / "live", **options)
    first = run(tmp_path / "first", tmp_path / "cache", teacher_cache_dtype="fp32", **options)
    later = run(tmp_path / "later", tmp_path / "cache", **options)
    assert first.beta == live.beta == later.beta
    assert_same_run(first, live)
    assert_same_run(later, live)
    # beta="auto" looks at all samples before the first epoch, which has then nothing left to compute.
    assert (live.teacher.model.seen, first.teacher.model.seen, later.teacher.model.seen) == (4 * 27, 3 * 27, 0)


@pytest.mark.parametrize(("dtype", "tolerance"), [("fp16", 1e-3), ("int8", 2e-2)])
@pytest.mark.parametrize("options", [{"gamma": 0.1}, {"gamma": 1.0}, {"loss": "kd"}])
def test_smaller_types_follow_the_live_run_and_both_cached_runs_are_one(dtype, tolerance, options, tmp_path):
    live = run(tmp_path / "live", **options)
    first = run(tmp_path / "first", tmp_path / "cache", teacher_cache_dtype=dtype, **options)
    later = run(tmp_path / "later", tmp_path / "cache", **options)
    assert_same_run(first, later)
    assert first.losses != live.losses
    torch.testing.assert_close(torch.tensor(first.losses), torch.tensor(live.losses), rtol=tolerance, atol=0)


def test_an_fp64_student_reads_it_too(tmp_path):
    def train(folder, cache):
        torch.manual_seed(1)
        student, teacher = ConvNet(norm=False).double(), networks(dtype=torch.float64)[1]
        data = Fixed(count=20, dtype=torch.float64)
        return run(folder, cache, data=data, teacher=teacher, student=student, teacher_cache_dtype="fp32")

    first, later = train(tmp_path / "1", tmp_path / "cache"), train(tmp_path / "2", tmp_path / "cache")
    assert_same_run(first, later)


def test_another_student_loss_seed_batch_and_order_read_the_same_rows(tmp_path):
    run(tmp_path / "first", tmp_path / "cache")
    torch.manual_seed(7)
    other = {
        "student": ConvNet(width=3),
        "loss": "kd",
        "gamma": 0.25,
        "seed": 9,
        "per_device_train_batch_size": 6,
    }
    assert run(tmp_path / "later", tmp_path / "cache", **other).teacher.model.seen == 0
    ordered = run(tmp_path / "ordered", tmp_path / "cache", train_sampling_strategy="sequential")
    assert ordered.teacher.model.seen == 0


def test_a_part_of_the_data_reads_the_rows_of_the_whole(tmp_path):
    run(tmp_path / "first", tmp_path / "cache")
    live = run(tmp_path / "live", data=Subset(Views(count=27), [3, 20, 5, 9, 26, 11]))
    part = run(tmp_path / "part", tmp_path / "cache", data=Subset(Views(count=27), [3, 20, 5, 9, 26, 11]))
    assert part.teacher.model.seen == 0
    torch.testing.assert_close(torch.tensor(part.losses), torch.tensor(live.losses), rtol=1e-3, atol=0)


class Damaged(Views):
    """Two samples that cannot be read."""

    def __getitem__(self, index):
        if index in (0, 6):
            raise OSError("broken")
        return super().__getitem__(index)


def test_a_sample_that_takes_another_ones_place_has_its_own_row(tmp_path):
    options = {"on_bad_sample": "skip", "teacher_cache_dtype": "fp32"}
    live = run(tmp_path / "live", data=Damaged(count=27), on_bad_sample="skip")
    first = run(tmp_path / "first", tmp_path / "cache", data=Damaged(count=27), **options)
    later = run(tmp_path / "later", tmp_path / "cache", data=Damaged(count=27), **options)
    assert_same_run(first, live)
    assert_same_run(later, live)
    assert later.teacher.model.seen == 0
    assert (~later.replay.cache.storage.written(0)).nonzero()[0].tolist() == [0, 6]
    ahead = make_trainer(tmp_path / "ahead", tmp_path / "other", data=Damaged(count=27), **options)
    ahead.cache_teacher()
    assert ahead.replay.cache.written(1) == 25


def test_provenance_says_that_a_cache_was_used(tmp_path):
    trainer = run(tmp_path / "out", tmp_path / "cache", teacher_cache_views=2, teacher_cache_dtype="int8")
    trainer.save_model()
    saved = json.loads((tmp_path / "out" / "distillation.json").read_text())
    assert saved["teacher_cache"] == {"dtype": "int8", "views": 2}
    assert run(tmp_path / "live").provenance()["teacher_cache"] is None


def test_a_run_without_a_teacher_leaves_the_cache_alone(tmp_path):
    run(tmp_path / "out", tmp_path / "cache", loss="ce")
    assert not (tmp_path / "cache").exists()


# ---- Views ---------------------------------------------------------------------------------------------------------


def test_views_repeat_and_the_order_does_not(tmp_path):
    trainer = make_trainer(tmp_path / "first", tmp_path / "cache", teacher_cache_views=2, num_train_epochs=5)
    asked = []
    get = trainer.train_dataset.__class__.__getitem__
    trainer.train_dataset.__class__ = type(
        "Noting",
        (Views,),
        {"__getitem__": lambda self, index: asked.append((self.epoch, index)) or get(self, index)},
    )
    trainer.train()
    epochs = [asked[27 * n : 27 * (n + 1)] for n in range(5)]
    assert [{epoch for epoch, _ in part} for part in epochs] == [{0}, {1}, {0}, {1}, {0}]
    orders = [tuple(index for _, index in part) for part in epochs]
    assert len(set(orders)) == 5
    assert trainer.teacher.model.seen == 2 * 27
    assert trainer.replay.cache.views == [0, 1]


def test_cycled_views_are_those_of_the_first_epochs(tmp_path):
    data = Views(count=5)
    views = []
    for epoch in range(4):
        data.set_epoch(epoch)
        views.append(data[3]["pixel_values"])
    data.cycle_views(3)
    data.set_epoch(3)
    assert torch.equal(data[3]["pixel_values"], views[0]) and not torch.equal(views[0], views[3])
    data.cycle_views(None)
    data.set_epoch(3)
    assert torch.equal(data[3]["pixel_values"], views[3])
    with pytest.raises(ValueError, match="`period` must be a number of epochs, at least 1, or None, got 0"):
        data.cycle_views(0)


def test_data_without_augmentation_have_one_view(tmp_path):
    trainer = run(tmp_path / "out", tmp_path / "cache", data=Fixed(count=27), num_train_epochs=4)
    assert trainer.teacher.model.seen == 27
    assert trainer.replay.cache.views == [0]


def test_more_views_than_before_are_computed_and_the_others_read(tmp_path):
    run(tmp_path / "1", tmp_path / "cache", teacher_cache_views=2)
    assert run(tmp_path / "2", tmp_path / "cache", teacher_cache_views=3).teacher.model.seen == 27


# ---- Rows that are not there ---------------------------------------------------------------------------------------


def test_damaged_rows_are_computed_again(tmp_path, caplog):
    first = run(tmp_path / "first", tmp_path / "cache")
    path = tmp_path / "cache" / "rows-00000.bin"
    content = bytearray(path.read_bytes())
    size = first.replay.cache.storage.codec.record.itemsize
    content[5 * size + 1] ^= 4
    path.write_bytes(content)
    later = run(tmp_path / "later", tmp_path / "cache")
    assert later.teacher.model.seen == 1 and later.replay.cache.storage.damaged == 1
    assert caplog.text.count("holds damaged rows") == 1
    torch.testing.assert_close(torch.tensor(later.losses), torch.tensor(first.losses), rtol=1e-4, atol=0)
    assert run(tmp_path / "last", tmp_path / "cache").teacher.model.seen == 0


def test_a_teacher_that_gives_nan_is_told_as_without_a_cache(tmp_path):
    teacher = networks()[1]
    with torch.no_grad():
        teacher.head.weight[0, 0] = torch.nan
    messages = []
    for cache in (None, tmp_path / "cache"):
        with pytest.raises((RuntimeError, ValueError)) as error:
            run(tmp_path / "out", cache, teacher=teacher)
        messages.append(str(error.value))
    assert messages[0] == messages[1]


# ---- The teacher's top-1 and computing ahead ------------------------------------------------------------------------


def test_the_teachers_top1_is_measured_once(tmp_path, caplog):
    def train(folder, evaluation):
        torch.manual_seed(1)
        teacher = Counting(networks()[1])
        args = config(folder, teacher_cache_dir=str(tmp_path / "cache"), teacher_preflight=True)
        data = {"train_dataset": Fixed(count=20), "eval_dataset": evaluation}
        trainer = DistillationTrainer(ConvNet(), teacher, args, **data)
        caplog.clear()
        trainer.train()
        lines = [message for message in caplog.messages if "Teacher " in message]
        return trainer.teacher_top1, teacher.seen, lines

    top1, seen, lines = train(tmp_path / "1", Images(count=18, seed=5))
    assert seen == 38 and any("on 18 labelled evaluation samples" in line for line in lines)
    again, seen, same_lines = train(tmp_path / "2", Images(count=18, seed=5))
    assert (again, seen) == (top1, 0) and sorted(same_lines) == sorted(lines)
    other, seen, _ = train(tmp_path / "3", Images(count=18, seed=8))
    assert seen == 18 and other != top1


def test_computing_ahead_gives_the_rows_of_training(tmp_path):
    trainer = make_trainer(tmp_path / "out", tmp_path / "cache", teacher_cache_dtype="fp32", num_train_epochs=2)
    assert trainer.cache_teacher() == 2 * 27
    assert trainer.cache_teacher() == 0
    assert trainer.teacher.model.seen == 54 and trainer.train_dataset.epoch == 0
    ahead = run(tmp_path / "ahead", tmp_path / "cache", num_train_epochs=2)
    assert ahead.teacher.model.seen == 0
    live = run(tmp_path / "live", num_train_epochs=2)
    # Other batches of the teacher round otherwise.
    torch.testing.assert_close(torch.tensor(ahead.losses), torch.tensor(live.losses), rtol=1e-5, atol=1e-6)


def test_computing_ahead_needs_to_know_what(tmp_path):
    with pytest.raises(ValueError, match="There is nothing to cache: give `teacher_cache_dir`"):
        make_trainer(tmp_path).cache_teacher()
    with pytest.raises(ValueError, match="`max_steps` is given: give `teacher_cache_views`, or the epochs"):
        make_trainer(tmp_path, tmp_path / "cache", max_steps=3).cache_teacher()
    assert make_trainer(tmp_path, tmp_path / "cache", max_steps=3, teacher_cache_views=1).cache_teacher() == 27


def test_the_cache_can_be_read_by_itself(tmp_path):
    teacher = networks()[1]
    run(tmp_path / "out", tmp_path / "cache", teacher=teacher, data=Fixed(count=27), teacher_cache_dtype="fp32")
    cache = TeacherCache(tmp_path / "cache")
    assert (cache.samples, cache.num_classes, cache.dtype, cache.written(0)) == (27, 5, "fp32", 27)
    indices = torch.tensor([4, 20])
    logits, present = cache.read(0, indices)
    assert present.all()
    with torch.no_grad():
        torch.testing.assert_close(logits, teacher(Images(count=27).pixel_values[indices]), rtol=1e-5, atol=1e-5)
    logits, present = cache.read(3, indices)
    assert not present.any() and logits.isnan().all()
    with pytest.raises(ValueError, match="There is no teacher cache in .*: give a folder that has one, or"):
        TeacherCache(tmp_path / "none")
    with pytest.raises(ValueError, match="has num_classes 5, and 6 is asked for"):
        TeacherCache(tmp_path / "cache", num_classes=6, samples=27)


# ---- Refusals ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mixup_alpha": 0.2}, "does not go with mixup_alpha or cutmix_alpha: a mixed image is no sample"),
        ({"cutmix_alpha": 1.0}, "does not go with mixup_alpha or cutmix_alpha: a mixed image is no sample"),
        ({"feature_loss": "crd"}, "does not go with feature_loss: features are not stored, so that loss needs a live"),
        ({"teacher_metrics": True}, "does not go with teacher_metrics: it has no rows for the evaluation data"),
        ({"teacher_fsdp": True}, "does not go with teacher_fsdp: such a teacher runs on all processes at once"),
        ({"teacher_speed": "auto"}, 'does not go with teacher_speed="auto": it measures a live teacher'),
        ({"teacher_cache_views": 0}, "`teacher_cache_views` must be a whole number of at least 1, got 0"),
        ({"teacher_cache_views": 1.5}, "`teacher_cache_views` must be a whole number of at least 1, got 1.5"),
        (
            {"teacher_cache_dtype": "fp8"},
            "`teacher_cache_dtype` must be one of None, 'fp16', 'int8', 'fp32', got 'fp8'",
        ),
        (
            {"teacher_cache_dir": None, "teacher_cache_views": 2},
            "`teacher_cache_views` is for a cache .*: give `teacher_",
        ),
        ({"teacher_cache_dir": None, "teacher_cache_dtype": "int8"}, "`teacher_cache_dtype` is for a cache"),
    ],
)
def test_settings_that_do_not_go_with_a_cache(options, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        config(tmp_path, **{"teacher_cache_dir": str(tmp_path / "cache"), **options})


class Stream(IterableDataset):
    def __iter__(self):
        return iter(Images())


class Jittered(Fixed):
    """Says that its views are fixed, and draws them from the process's generator."""

    def __getitem__(self, index):
        sample = super().__getitem__(index)
        return {**sample, "pixel_values": sample["pixel_values"] + torch.randn(())}


class NotFixed(Views):
    fixed_views = True


class Unnumbered(Fixed):
    def __getitem__(self, index):
        return {key: value for key, value in super().__getitem__(index).items() if key != "index"}


class Misnumbered(Fixed):
    def __getitem__(self, index):
        return {**super().__getitem__(index), "index": index + 1}


class OnlyAnEpoch(Images):
    epoch = 0

    def set_epoch(self, epoch):
        self.epoch = epoch


@pytest.mark.parametrize(
    ("data", "options", "message"),
    [
        (
            Images,
            {},
            "rows found by the index alone would be wrong targets under random crops. Subclass hf_kd.data.Epoch",
        ),
        (Stream, {"max_steps": 2}, "a Stream is a stream, whose samples have none"),
        (lambda: ConcatDataset([Fixed(), Fixed()]), {}, "the parts of a ConcatDataset have the same ones"),
        (
            Jittered,
            {},
            "Sample 0 of the Jittered is another one each time, since its transform or the collator draws",
        ),
        (NotFixed, {}, "The NotFixed says fixed_views, and its sample 0 is another one in the second epoch"),
        (Unnumbered, {}, "sample 0 of the Unnumbered has none: have the data set return dicts"),
        (Misnumbered, {}, "sample 0 of the Misnumbered has the index 1: have the data set return dicts"),
        (OnlyAnEpoch, {"teacher_cache_views": 2}, "cycle_views.., which a OnlyAnEpoch does not have"),
    ],
)
def test_data_that_no_cache_can_be_made_of(data, options, message, tmp_path):
    with pytest.raises((ValueError, TypeError), match=message):
        make_trainer(tmp_path / "out", tmp_path / "cache", data=data(), **options)


def test_a_collator_that_draws_is_found_out(tmp_path):
    def jittering(samples):
        batch = collate(samples)
        return {**batch, "pixel_values": batch["pixel_values"] * torch.rand(())}

    with pytest.raises(ValueError, match="since its transform or the collator draws from the process's random"):
        make_trainer(tmp_path, tmp_path / "cache", data_collator=jittering)


def test_a_collator_is_part_of_the_view(tmp_path):
    def darker(samples):
        batch = collate(samples)
        return {**batch, "pixel_values": batch["pixel_values"] * 0.5}

    make_trainer(tmp_path / "1", tmp_path / "cache")
    with pytest.raises(ValueError, match="another view of the samples"):
        make_trainer(tmp_path / "2", tmp_path / "cache", data_collator=darker)


def test_rows_are_looked_up_by_numbers_on_the_host(tmp_path, monkeypatch):
    run(tmp_path / "1", tmp_path / "cache")
    trainer = make_trainer(tmp_path / "2", tmp_path / "cache")
    batches = list(trainer.get_train_dataloader())
    # On a GPU this would wait for all that the device was given before.
    monkeypatch.setattr(torch.Tensor, "cpu", lambda tensor: pytest.fail("a tensor is copied to the host"))
    for batch in batches:
        assert trainer.replay.logits(batch, None).shape == (len(batch["index"]), 5)
    assert sorted(number for batch in batches for number in batch["host_index"].tolist()) == list(range(27))


def test_probing_the_data_leaves_random_state_and_epoch_alone(tmp_path):
    data = Views(count=27)
    data.set_epoch(5)
    make_trainer(tmp_path / "live", data=data)
    expected = torch.rand(3)
    make_trainer(tmp_path / "out", tmp_path / "cache", data=data)
    assert torch.equal(torch.rand(3), expected) and data.epoch == 5


class OwnTeacher(DistillationTrainer):
    def compute_teacher_logits(self, inputs):
        return torch.zeros(len(inputs["index"]), 5)


def test_teachers_that_cannot_be_known_again(tmp_path):
    with pytest.raises(ValueError, match="does not go with OwnTeacher, which computes the teacher's logits itself"):
        make_trainer(tmp_path, tmp_path / "cache", trainer_class=OwnTeacher)
    with pytest.raises(ValueError, match="is a function, which a teacher cache cannot tell from another one"):
        make_trainer(tmp_path, tmp_path / "cache", teacher=lambda **batch: torch.zeros(4, 5))


def test_a_class_for_every_token_is_refused(tmp_path):
    class Sentences(Fixed):
        def __getitem__(self, index):
            return {"input_ids": torch.arange(6) % 11, "labels": torch.arange(6) % 3, "index": index}

    trainer = make_trainer(
        tmp_path / "out", tmp_path / "cache", data=Sentences(count=8), teacher=Tagger(8), student=Tagger(4)
    )
    with pytest.raises(ValueError, match="one row of 3 logits for each sample, and the teacher gave logits of shape"):
        trainer.train()


def test_a_batch_without_index_is_refused(tmp_path):
    trainer = make_trainer(tmp_path / "out", tmp_path / "cache")
    trainer.data_collator = lambda samples: {k: v for k, v in collate(samples).items() if k != "index"}
    with pytest.raises(ValueError, match="finds rows by the batch's 'index', and the batch has"):
        trainer.train()


def test_evaluation_never_reads_rows_of_training_samples(tmp_path):
    # The same indices, other images.
    trainer = make_trainer(tmp_path / "out", tmp_path / "cache", teacher_preflight=True, num_train_epochs=1)
    trainer.eval_dataset = Images(count=27, seed=9)
    trainer.train()
    live = make_trainer(tmp_path / "live", teacher_preflight=True, num_train_epochs=1)
    live.eval_dataset = Images(count=27, seed=9)
    live.train()
    assert trainer.teacher_top1 == live.teacher_top1
    # A loss that is computed outside of training is not of training data either.
    batch = collate([Images(count=27, seed=9)[index] for index in range(4)])
    losses = [float(t.compute_loss(t.model.eval(), batch).detach()) for t in (trainer, live)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)
