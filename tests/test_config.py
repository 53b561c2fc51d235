"""The configuration: what it resolves, what it refuses, how it is read from a command line."""

import dataclasses

import pytest
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


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"gamma": 0.0}, r"`gamma` must be in \(0, 1\].*got 0.0"),
        ({"gamma": 1.5}, r"`gamma` must be in \(0, 1\].*got 1.5"),
        ({"gamma": float("nan")}, r"`gamma` must be in \(0, 1\].*got nan"),
        ({"temperature": 0.0}, "`temperature` must be a positive number, got 0.0"),
        ({"temperature": 0.5}, r"`gamma` must be in \(0, 1\].*got 2.0"),
        ({"temperature": 4.0, "gamma": 0.5}, "contradict each other"),
        ({"beta": -1.0}, "`beta` must be a number of at least 0, got -1.0"),
        ({"beta": float("inf")}, "`beta` must be .*got inf"),
        ({"beta": "automatic"}, "`beta` must be a number or \"auto\", got 'automatic'"),
        ({"ce_weight": -0.1}, "`ce_weight` must be .*got -0.1"),
        ({"ce_weight": 0, "beta": 0}, "nothing to train on"),
        ({"loss": "ce", "ce_weight": 0}, "nothing to train on"),
        ({"loss": "wtmm"}, "Unknown `loss` 'wtmm'.*one of ce, kd, ttm, wttm.*Did you mean 'wttm'"),
        ({"balance_lambda": 1.0}, r"`balance_lambda` must be in \[0, 1\), got 1.0"),
        ({"auto_beta_samples": 0}, "`auto_beta_samples` must be at least 1"),
        ({"label_smoothing_factor": 1.0}, "`label_smoothing_factor` must be"),
        ({"lr_decay": 0.0}, "`lr_decay` must be"),
        ({"lr_milestones": [60, 30]}, "`lr_milestones` must be increasing"),
        ({"momentum": 1.0}, "`momentum` must be"),
        ({"mixup_alpha": -1}, "`mixup_alpha` must be"),
        ({"mixup_prob": 1.1}, "`mixup_prob` must be"),
        ({"label_names": ["a", "b"]}, "`label_names` must name the one batch entry"),
        ({"teacher_class_map": "[1, 2"}, "`teacher_class_map` must be JSON"),
    ],
)
def test_bad_values_get_one_sentence(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        config(tmp_path, **options)


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


def test_unknown_arguments_of_a_loss_are_named(tmp_path):
    from tiny import networks

    from hf_kd import DistillationTrainer

    student, teacher = networks()
    with pytest.raises(ValueError, match="'wttm' takes gamma, not alpha: correct `loss_kwargs`"):
        DistillationTrainer(student, teacher, config(tmp_path, loss_kwargs={"alpha": 1.0}))
