"""The configuration: what it resolves, what it refuses, how it is read from a command line."""

import dataclasses

import pytest
import torch
from tiny import config
from transformers import HfArgumentParser, TrainingArguments

from hf_kd import DistillationConfig


@pytest.mark.parametrize(
    ("options", "gamma"),
    [
        ({"loss": "wttm"}, 0.8),
        ({"loss": "ttm"}, 0.8),
        ({"loss": "kd"}, 0.25),
        ({"loss": "ce"}, None),
        ({"gamma": 0.4}, 0.4),
        ({"temperature": 2.5}, 0.4),
        ({"temperature": 2.5, "gamma": 0.4}, 0.4),
    ],
)
def test_gamma_and_temperature_are_one_thing(tmp_path, options, gamma):
    args = config(tmp_path, **options)
    assert args.gamma == (None if gamma is None else pytest.approx(gamma))
    assert args.temperature == (None if gamma is None else pytest.approx(1 / gamma))
    # Read back from its own dictionary it is the same.
    again = DistillationConfig(**args.to_dict())
    assert (again.gamma, again.beta, again.ce_weight) == (args.gamma, args.beta, args.ce_weight)


def test_command_line(tmp_path):
    (args,) = HfArgumentParser(DistillationConfig).parse_args_into_dataclasses(
        [
            "--output_dir", str(tmp_path), "--beta", "auto", "--gamma", "0.3", "--lr_milestones", "30", "60",
            "--loss_kwargs", '{"a": 1}', "--teacher_class_map", "[3, [1, 2]]", "--decay_all_parameters", "--use_cpu",
        ]
    )  # fmt: skip
    assert (args.beta, args.gamma, args.lr_milestones) == ("auto", 0.3, [30.0, 60.0])
    assert args.loss_kwargs == {"a": 1}
    assert args.teacher_class_map == [3, [1, 2]]
    assert args.decay_all_parameters is True
    (args,) = HfArgumentParser(DistillationConfig).parse_args_into_dataclasses(["--beta", "1.6", "--use_cpu"])
    assert args.beta == 1.6


def test_every_field_has_help_and_is_documented():
    inherited = {field.name: field for field in dataclasses.fields(TrainingArguments)}
    for field in dataclasses.fields(DistillationConfig):
        if field.name not in inherited:
            assert field.metadata["help"], field.name
            assert f"{field.name} (`" in DistillationConfig.__doc__, field.name
    assert HfArgumentParser(DistillationConfig).format_help()


@pytest.mark.parametrize(
    ("device", "options", "expected"),
    [
        ("cuda", {}, True),
        ("cuda", {"accelerator_config": {"split_batches": True}}, True),
        ("cuda", {"accelerator_config": {"non_blocking": False}}, False),
        ("cuda", {"dataloader_pin_memory": False}, False),
        ("cpu", {}, False),
    ],
)
def test_pinned_batches_are_copied_without_waiting(tmp_path, monkeypatch, device, options, expected):
    # As on a machine with such a device.
    monkeypatch.setattr(TrainingArguments, "device", property(lambda self: torch.device(device)))
    args = DistillationConfig(str(tmp_path), **options)
    assert args.accelerator_config.non_blocking is expected
    assert args.accelerator_config.split_batches is ("split_batches" in options.get("accelerator_config", {}))
    assert args.dataloader_pin_memory is (device == "cuda" and options.get("dataloader_pin_memory", True))
