"""A teacher given by name is known by its files, and built only when a row is missing."""

import shutil

import pytest
import timm
import torch
from cached_runs import Fixed, assert_same_run, make_trainer, run
from safetensors.torch import load_file, save_file
from tiny import Images

import hf_kd.trainer
from hf_kd import Teacher, create_student, save_student
from hf_kd.teacher_cache.deferred import DeferredTeacher


SIZE = 32


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    torch.manual_seed(3)
    folder = tmp_path_factory.mktemp("teacher")
    save_student(create_student("test_resnet", num_classes=5, img_size=SIZE), folder)
    return folder


def options(**changes):
    torch.manual_seed(1)
    student = create_student("test_resnet", num_classes=5, img_size=SIZE, drop_rate=0.3)
    data = Fixed(count=16, size=SIZE)
    return {"student": student, "data": data, "num_train_epochs": 2, "learning_rate": 1e-3, **changes}


@pytest.fixture
def builds(monkeypatch):
    """Which teachers were built."""
    built = []
    build = Teacher.from_pretrained.__func__

    def noting(cls, name, **arguments):
        built.append(str(name))
        # As building a network does.
        torch.rand(1000)
        return build(cls, name, **arguments)

    monkeypatch.setattr(Teacher, "from_pretrained", classmethod(noting))
    return built


@pytest.fixture
def cache(folder, tmp_path):
    run(tmp_path / "first", tmp_path / "cache", teacher=str(folder), teacher_cache_dtype="fp32", **options())
    return tmp_path / "cache"


def test_with_all_rows_it_is_never_built(cache, folder, tmp_path, builds):
    live = run(tmp_path / "live", teacher=str(folder), **options())
    builds.clear()
    trainer = run(tmp_path / "later", cache, teacher=str(folder), **options())
    assert builds == [] and isinstance(trainer.teacher, DeferredTeacher) and not trainer.teacher.is_built
    assert_same_run(trainer, live)
    # What is said of it is the same.
    assert trainer.provenance()["teacher"] == live.provenance()["teacher"]
    assert trainer.teacher.num_parameters == live.teacher.num_parameters > 0
    trainer.save_model()


def test_a_missing_row_builds_it_and_changes_nothing_else(cache, folder, tmp_path, builds):
    whole = run(tmp_path / "whole", cache, teacher=str(folder), **options())
    path = cache / "rows-00000.bin"
    size = whole.replay.cache.storage.codec.record.itemsize
    content = bytearray(path.read_bytes())
    content[3 * size : 5 * size] = bytes(2 * size)
    path.write_bytes(content)
    trainer = run(tmp_path / "later", cache, teacher=str(folder), **options())
    assert builds == [str(folder)] and trainer.teacher.is_built
    torch.testing.assert_close(torch.tensor(trainer.losses), torch.tensor(whole.losses), rtol=1e-4, atol=0)
    assert_same_run(run(tmp_path / "again", cache, teacher=str(folder), **options()), trainer)
    assert len(builds) == 1


def test_a_copy_of_the_folder_is_the_same_teacher_and_a_changed_one_is_not(cache, folder, tmp_path, builds):
    copied = shutil.copytree(folder, tmp_path / "copied")
    assert not make_trainer(tmp_path / "out", cache, teacher=str(copied), **options()).teacher_top1
    assert builds == []
    weights = load_file(copied / "model.safetensors")
    name = next(key for key, value in weights.items() if value.is_floating_point())
    weights[name] = weights[name] + 1e-3
    save_file(weights, copied / "model.safetensors")
    with pytest.raises(ValueError, match="another teacher: .*teacher[0-9].* there, .*copied"):
        make_trainer(tmp_path / "out", cache, teacher=str(copied), **options())


def test_other_files_with_the_same_weights_are_the_same_teacher(cache, folder, tmp_path, builds):
    checkpoint = tmp_path / "weights.safetensors"
    save_file(load_file(folder / "model.safetensors"), checkpoint)
    network = str(folder)
    changes = {"teacher_checkpoint": str(checkpoint), "teacher_num_classes": 5}
    trainer = make_trainer(tmp_path / "1", cache, teacher=network, **changes, **options())
    assert builds == [network] and trainer.replay.cache.written(0) == 16


def test_a_module_and_its_name_are_one_teacher(folder, tmp_path, builds):
    network = Teacher.from_pretrained(folder)
    run(tmp_path / "1", tmp_path / "cache", teacher=network, **options())
    make_trainer(tmp_path / "2", tmp_path / "cache", teacher=str(folder), **options())
    assert len(builds) == 2
    # Its name is known now.
    make_trainer(tmp_path / "3", tmp_path / "cache", teacher=str(folder), **options())
    assert len(builds) == 2


@pytest.mark.parametrize("changes", [{"teacher_class_map": [1, 0, 2, 3, 4]}, {"teacher_input_size": 48}])
def test_other_options_are_told(changes, cache, folder, tmp_path):
    with pytest.raises(ValueError, match="(class map of the teacher|preprocessing of the teacher's images): "):
        make_trainer(tmp_path / "2", cache, teacher=str(folder), **changes, **options())


def test_an_ensemble_is_deferred_too(folder, tmp_path, builds):
    other = shutil.copytree(folder, tmp_path / "other")
    members = [str(folder), str(other)]
    run(tmp_path / "1", tmp_path / "cache", teacher=members, **options())
    assert len(builds) == 2
    trainer = run(tmp_path / "2", tmp_path / "cache", teacher=members, **options())
    assert len(builds) == 2 and trainer.teacher.name == " + ".join(members)


def test_the_class_count_is_checked_without_it(cache, folder, tmp_path, builds):
    student = create_student("test_resnet", num_classes=4, img_size=SIZE)
    with pytest.raises(ValueError, match="The student has 4 classes and the teacher .* has 5"):
        make_trainer(tmp_path / "2", cache, teacher=str(folder), **options(student=student))
    assert builds == []


def test_weights_that_are_others_after_all_are_told_when_it_is_built(cache, folder, tmp_path, monkeypatch):
    trainer = make_trainer(tmp_path / "2", cache, teacher=str(folder), **options())
    network = timm.create_model("test_resnet", num_classes=5)
    monkeypatch.setattr(trainer.teacher, "model", lambda: Teacher(network, name="other"))
    with pytest.raises(ValueError, match="that was loaded is not the one of the cache: its weights are others"):
        trainer.teacher(pixel_values=Images(count=2, size=SIZE).pixel_values)


def test_preflight_and_beta_do_not_build_it(folder, tmp_path, builds):
    def train(place):
        trainer = make_trainer(
            tmp_path / place, tmp_path / "cache", teacher=str(folder), teacher_preflight=True, beta="auto", **options()
        )
        trainer.eval_dataset = Fixed(count=18, size=SIZE, seed=4)
        trainer.train()
        return trainer

    first = train("1")
    builds.clear()
    later = train("2")
    assert builds == [] and (later.beta, later.teacher_top1) == (first.beta, first.teacher_top1)
    assert later.teacher_top1 is not None and hf_kd.trainer.Replay is type(later.replay)


def test_a_teacher_that_is_not_built_is_not_measured_and_runs_as_asked_when_it_is(cache, folder, tmp_path, builds):
    ways = {"teacher_fold_batchnorm": True, "channels_last": "auto"}
    trainer = run(tmp_path / "later", cache, teacher=str(folder), **ways, **options())
    assert builds == [] and trainer.provenance()["teacher_speed"] == []
    whole = trainer.teacher(torch.randn(2, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0)))
    assert builds == [str(folder)] and trainer.teacher._built_teacher.speed.fold_batchnorm
    plain = Teacher.from_pretrained(folder)
    expected = plain(torch.randn(2, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0)))
    torch.testing.assert_close(whole, expected, rtol=1e-4, atol=1e-5)
