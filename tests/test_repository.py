"""What leaves the machine when a student is published, and what does not."""

import json

import pytest
from tiny import config

from hf_kd.repository import files_of, public_arguments, replaced_by, without_paths


PUBLISHED = (
    *("model.safetensors", "model-00001-of-00002.safetensors", "model.safetensors.index.json", "config.json"),
    *("README.md", "LICENSE", "LICENSE.txt", ".eval_results/a.yaml", "figures/curves.png", "distillation.json"),
    *("training_args.json", "preprocessor_config.json", "tokenizer.json"),
)
KEPT = (
    *("training_args.bin", "pytorch_model.bin", "optimizer.pt", "optimizer.bin", "scheduler.pt", "rng_state_0.pth"),
    *("teacher.safetensors", "trainer_state.json", "complete.json", "notes.md", ".env", "figures/deep/x.png"),
    *("checkpoint-3/model.safetensors", "teacher/model.safetensors", "cache/model.safetensors", "results.json"),
)


def test_files_of_a_folder(tmp_path):
    for name in (*PUBLISHED, *KEPT):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    files, left_out = files_of(tmp_path)
    assert files.keys() == set(PUBLISHED)
    assert all(path.read_text() == name for name, path in files.items())
    assert set(left_out) == {name if "/" not in name else name.split("/")[0] + "/" for name in KEPT}


def test_what_a_student_replaces():
    present = {*PUBLISHED, *KEPT, "last-checkpoint/model.safetensors"}
    gone = replaced_by({"model.safetensors", "config.json", "README.md", "distillation.json"}, present)
    assert gone == sorted(
        [
            "model-00001-of-00002.safetensors", "model.safetensors.index.json", "optimizer.bin", "optimizer.pt",
            "preprocessor_config.json", "pytorch_model.bin", "rng_state_0.pth", "scheduler.pt", "tokenizer.json",
            "training_args.bin", "training_args.json",
        ]
    )  # fmt: skip


@pytest.mark.parametrize(
    ("value", "public"),
    [
        ("/home/ada/teachers/big", "big"),
        ("~/teachers/big/", "big"),
        ("local-dir:/home/ada/big", "big"),
        (r"C:\Users\ada\big", "big"),
        ("/home/a/one + /home/a/two", "one + two"),
        ("owner/name", "owner/name"),
        ("hf-hub:owner/name@main", "hf-hub:owner/name@main"),
        ("https://huggingface.co/owner/name", "https://huggingface.co/owner/name"),
        ("ViT-S/16 at 1/2", "ViT-S/16 at 1/2"),
        ("β/γ, U · D(p_T ‖ q) / 2", "β/γ, U · D(p_T ‖ q) / 2"),
        ({"a": ["/x/y", 1, None]}, {"a": ["y", 1, None]}),
    ],
)
def test_paths_are_cut_down(value, public):
    assert without_paths(value) == public


def test_arguments_without_secrets_and_places(tmp_path):
    args = config(
        tmp_path / "out", hub_token="hf_secret", teacher_checkpoint=str(tmp_path / "weights.pth"), gamma=0.25,
        resume_from_checkpoint=str(tmp_path), run_name="ada's laptop", deepspeed=None, logging_steps=7,
    )  # fmt: skip
    public = public_arguments(args)
    text = json.dumps(public)
    assert "hf_secret" not in text
    assert str(tmp_path) not in text
    assert "laptop" not in text
    assert public["teacher_checkpoint"] == "weights.pth"
    assert (public["gamma"], public["logging_steps"], public["loss"]) == (0.25, 7, "wttm")
    assert not {"output_dir", "hub_token", "run_name", "local_rank"} & public.keys()
    # The name has "token" in it, and no secret.
    assert "include_num_input_tokens_seen" in public
