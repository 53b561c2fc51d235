"""Checkpoints are whole or passed over, and a write that fails costs nothing that was there."""

import json
import logging
import resource
import shutil

import pytest
import torch
from safetensors.torch import load_file
from tiny import ConvNet, Images, config, networks

from hf_kd import DistillationTrainer
from hf_kd.checkpoints import MANIFEST, checkpoints, defect, discard, last_complete, seal
from hf_kd.files import atomic_write


# Which of a checkpoint's files a resumed run needs.
FILES = [
    "model.safetensors",
    "optimizer.pt",
    "scheduler.pt",
    "rng_state.pth",
    "trainer_state.json",
    "training_args.bin",
    "distillation.json",
]


def trainer(folder, student=None, **options):
    default_student, teacher = networks(dropout=0.3)
    defaults = {"save_strategy": "steps", "save_steps": 1, "num_train_epochs": 2}
    args = config(folder, **{**defaults, **options})
    return DistillationTrainer(student or default_student, teacher, args, train_dataset=Images(count=16))


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """An output folder with checkpoints of the steps 1 to 4."""
    folder = tmp_path_factory.mktemp("trained")
    trainer(folder).train()
    return folder


@pytest.fixture
def output(trained, tmp_path):
    return shutil.copytree(trained, tmp_path / "output")


def test_a_complete_checkpoint_lists_what_it_holds(output):
    assert [path.name for path in checkpoints(output)] == [f"checkpoint-{step}" for step in (4, 3, 2, 1)]
    assert [defect(path) for path in checkpoints(output)] == [None] * 4
    listed = json.loads((output / "checkpoint-4" / MANIFEST).read_text())["files"]
    assert set(FILES) <= listed.keys()
    assert listed["model.safetensors"] == (output / "checkpoint-4" / "model.safetensors").stat().st_size


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", ["missing", "cut off", "empty"])
def test_what_lacks_a_file_or_part_of_one_is_passed_over(name, damage, output, caplog):
    path = output / "checkpoint-4" / name
    content = path.read_bytes()
    path.unlink()
    if damage != "missing":
        path.write_bytes(content[: -len(content) // 3] if damage == "cut off" else b"")
    assert last_complete(output) == output / "checkpoint-3"
    reason = f"its {name} is missing" if damage == "missing" else f"its {name} has {len(path.read_bytes())} bytes, not"
    assert f"checkpoint-4 is passed over: {reason}" in caplog.text


@pytest.mark.parametrize(
    ("manifest", "reason"),
    [
        (None, "it has no complete.json, so writing it was not finished"),
        ("", "its complete.json cannot be read (JSONDecodeError)"),
        ("{", "its complete.json cannot be read (JSONDecodeError)"),
        ("[]", "its complete.json cannot be read (TypeError)"),
        ("{}", "its complete.json cannot be read (KeyError)"),
        ('{"files": null}', "its complete.json cannot be read (AttributeError)"),
        ('{"files": {"a": "b"}}', "its complete.json cannot be read (ValueError)"),
    ],
)
def test_what_lacks_its_manifest_is_passed_over(manifest, reason, output):
    path = output / "checkpoint-4" / MANIFEST
    path.unlink()
    if manifest is not None:
        path.write_text(manifest)
    assert defect(path.parent) == reason
    assert last_complete(output) == output / "checkpoint-3"


def test_training_goes_on_from_the_last_complete_one(trained, output, caplog):
    (output / "checkpoint-4" / MANIFEST).unlink()
    (output / "checkpoint-3" / "optimizer.pt").write_bytes(b"torn")
    run = trainer(output)
    run.train(resume_from_checkpoint=True)
    assert "checkpoint-4 is passed over" in caplog.text and "checkpoint-3 is passed over" in caplog.text
    assert run.state.global_step == 4 and run._initial_global_step == 2
    reference = torch.load(trained / "checkpoint-4" / "optimizer.pt", weights_only=True)
    again = torch.load(output / "checkpoint-4" / "optimizer.pt", weights_only=True)
    for ours, theirs in zip(again["state"].values(), reference["state"].values(), strict=True):
        assert torch.equal(ours["momentum_buffer"], theirs["momentum_buffer"])
    assert [defect(path) for path in checkpoints(output)] == [None] * 4


def test_without_a_complete_one_training_begins_and_says_so(tmp_path, caplog):
    run = trainer(tmp_path / "new")
    run.train(resume_from_checkpoint=True)
    assert run._initial_global_step == 0 and run.state.global_step == 4
    assert "no complete checkpoint" in caplog.text and "training starts at the beginning" in caplog.text


def test_a_run_that_was_stopped_by_max_steps_takes_no_step_more(output):
    # In the middle of its second epoch.
    again = trainer(output, max_steps=3)
    again.train(resume_from_checkpoint=str(output / "checkpoint-3"))
    assert again.state.global_step == 3
    saved = load_file(output / "checkpoint-3" / "model.safetensors")
    assert all(torch.equal(saved[name], value) for name, value in again.model.state_dict().items())


def test_a_damaged_checkpoint_that_is_asked_for_is_an_error(output):
    (output / "checkpoint-2" / "scheduler.pt").unlink()
    with pytest.raises(ValueError, match=r"checkpoint-2 is damaged: its scheduler.pt is missing"):
        trainer(output).train(resume_from_checkpoint=str(output / "checkpoint-2"))
    with pytest.raises(ValueError, match=r"checkpoint-9 is no checkpoint \(a folder with trainer_state.json\)"):
        trainer(output).train(resume_from_checkpoint=str(output / "checkpoint-9"))


def test_a_checkpoint_of_plain_transformers_can_be_asked_for(output, caplog):
    (output / "checkpoint-2" / MANIFEST).unlink()
    run = trainer(output)
    run.train(resume_from_checkpoint=str(output / "checkpoint-2"))
    assert run._initial_global_step == 2
    assert "checkpoint-2 may be incomplete" in caplog.text


def test_going_on_with_other_settings_is_said(output, caplog):
    trainer(output, loss="kd", seed=3).train(resume_from_checkpoint=True)
    assert "loss was wttm and is kd; gamma was 0.8 and is 0.25; seed was 42 and is 3" in caplog.text


def test_a_checkpoint_of_another_network_is_an_error_and_stays(output):
    with pytest.raises(ValueError, match="holds another network than this student"):
        trainer(output, student=ConvNet(width=7)).train(resume_from_checkpoint=True)
    assert defect(output / "checkpoint-4") is None


# ---- Writing that fails --------------------------------------------------------------------------------------------


@pytest.fixture
def file_size_limit():
    """Have every write beyond a size fail, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)

    def limit(size):
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))

    yield limit
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


class LimitAt(DistillationTrainer):
    """A run whose disk is full from some step on."""

    def __init__(self, *args, limit, step, **kwargs):
        super().__init__(*args, **kwargs)
        self.limit, self.step = limit, step

    def _save_checkpoint(self, *args, **kwargs):
        if self.state.global_step == self.step:
            self.limit()
        super()._save_checkpoint(*args, **kwargs)


@pytest.mark.parametrize("share", [0.02, 0.3, 0.6, 0.9])
def test_a_full_disk_is_told_and_costs_no_older_checkpoint(share, trained, file_size_limit, tmp_path):
    """Whichever file does not fit."""
    sizes = [path.stat().st_size for path in (trained / "checkpoint-3").iterdir()]
    student, teacher = networks(dropout=0.3)
    args = config(tmp_path, save_strategy="steps", save_steps=1, num_train_epochs=2, save_total_limit=1)
    run = LimitAt(
        student,
        teacher,
        args,
        train_dataset=Images(count=16),
        limit=lambda: file_size_limit(int(share * max(sizes))),
        step=3,
    )
    with pytest.raises(RuntimeError) as caught:
        run.train()
    file_size_limit(resource.RLIM_INFINITY)
    message = str(caught.value)
    assert "checkpoint-3 could not be written" in message
    assert f"the last complete checkpoint is {tmp_path / 'checkpoint-2'}" in message
    assert [path.name for path in checkpoints(tmp_path)] == ["checkpoint-2"]
    assert defect(tmp_path / "checkpoint-2") is None
    resumed = trainer(tmp_path)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 4 and resumed._initial_global_step == 2


def test_older_checkpoints_go_only_when_the_newer_one_is_sealed(tmp_path, monkeypatch):
    import hf_kd.checkpoints

    seen = []

    def watched(folder):
        seen.append(sorted(path.name for path in tmp_path.glob("checkpoint-*")))
        seal(folder)

    monkeypatch.setattr(hf_kd.checkpoints, "seal", watched)
    trainer(tmp_path, save_total_limit=1).train()
    assert seen == [["checkpoint-1"]] + [[f"checkpoint-{n}", f"checkpoint-{n + 1}"] for n in (1, 2, 3)]
    assert [path.name for path in checkpoints(tmp_path)] == ["checkpoint-4"]
    assert torch.load(tmp_path / "checkpoint-4" / "training_args.bin", weights_only=False).save_total_limit == 1


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path):
    path = tmp_path / "file"
    path.write_text("old")

    def write_half():
        with atomic_write(path) as draft:
            draft.write_text("half of")
            raise KeyError

    with pytest.raises(KeyError):
        write_half()
    assert path.read_text() == "old"
    with atomic_write(path) as draft:
        draft.write_text("new")
    assert path.read_text() == "new"
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]


def test_what_is_half_removed_does_not_look_complete(output, monkeypatch):
    monkeypatch.setattr(shutil, "rmtree", lambda *_, **__: None)  # killed before it
    discard(output / "checkpoint-4")
    assert "complete.json" in defect(output / "checkpoint-4")


def test_secrets_are_in_no_file_and_no_log(tmp_path, caplog):
    secret = "hf_ThisIsASecretToken"
    caplog.set_level(logging.DEBUG)
    run = trainer(tmp_path, hub_token=secret, logging_steps=1)
    run.train()
    run.save_model()
    run.create_model_card(license="mit")
    assert run.args.hub_token == secret
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert {"training_args.bin", "README.md", "distillation.json"} <= {path.name for path in files}
    assert [path for path in files if secret.encode() in path.read_bytes()] == []
    assert secret not in caplog.text
