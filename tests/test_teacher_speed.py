"""A teacher that runs faster: the same logits, the network itself untouched, a choice that is told and kept."""

import copy
import itertools
import json

import pytest
import torch
from tiny import CLASSES, ConvNet, Images, config, networks
from torch import nn

from hf_kd import DistillationTrainer, Teacher, teacher_speed, timing
from hf_kd.folding import fold_batchnorm
from hf_kd.side_stream import SideStream
from hf_kd.teacher import Ensemble
from hf_kd.teacher_speed import Batch, Speed, SpeedOptions, fastest, speed_up


CPU = torch.device("cpu")
BOTH = (False, True)
IMAGES = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(5))
BATCH = Batch((IMAGES,), {})


@pytest.fixture
def compiled(monkeypatch):
    """Which networks are compiled, without a C++ compiler."""
    networks = []

    def compile(self, *args, **kwargs):
        networks.append(self)
        self._compiled_call_impl = torch.compile(self._call_impl, backend="eager")

    monkeypatch.setattr(nn.Module, "compile", compile)
    return networks


def teacher_network():
    return networks()[1].eval()


def make(folder, teacher=None, data=None, trainer_class=DistillationTrainer, **options):
    student, own = networks(dropout=0.3)
    teacher = own if teacher is None else teacher
    data = Images(count=24) if data is None else data
    return trainer_class(
        student, teacher, config(folder, **options), train_dataset=data, eval_dataset=Images(count=12, seed=1)
    )


def assert_same_students(one, other, tolerance=0.0):
    for (name, ours), theirs in zip(one.model.state_dict().items(), other.model.state_dict().values(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=tolerance, msg=name)


# ---- One way -------------------------------------------------------------------------------------------------------


WAYS = [Speed(*values) for values in itertools.product(BOTH, BOTH, (None, torch.float64), BOTH)]


@pytest.mark.parametrize("speed", WAYS, ids=str)
def test_every_way_gives_the_same_logits(speed, compiled):
    network = teacher_network()
    expected, before = network(IMAGES).detach(), copy.deepcopy(network.state_dict())
    runs = speed_up(network, speed, BATCH)
    with torch.no_grad():
        logits = BATCH.logits(runs, channels_last=speed.channels_last)
    torch.testing.assert_close(logits.float(), expected, rtol=0, atol=1e-5 * float(expected.abs().max()))
    assert (runs is network) is not speed.fold_batchnorm
    assert compiled == ([runs] if speed.compile else [])
    assert runs.conv.weight.is_contiguous(memory_format=torch.channels_last) is speed.channels_last
    assert {parameter.dtype for parameter in runs.parameters()} == {speed.dtype or torch.float32}
    if speed.fold_batchnorm:
        assert isinstance(runs.norm, nn.Identity)
        assert all(torch.equal(value, before[key]) for key, value in network.state_dict().items())


def test_it_is_folded_in_fp32_and_then_rounded():
    network = teacher_network()
    exact = fold_batchnorm(network, lambda model: model(IMAGES))
    rounded = speed_up(network, Speed(fold_batchnorm=True, dtype=torch.bfloat16), BATCH)
    assert torch.equal(rounded.conv.weight, exact.conv.weight.bfloat16())
    assert torch.equal(rounded.conv.bias, exact.conv.bias.bfloat16())
    assert network.conv.weight.dtype == torch.float32


def test_what_is_written_of_a_way_is_read_again():
    for speed in (*WAYS, Speed(dtype=torch.bfloat16)):
        assert Speed.from_json(json.loads(json.dumps(speed.to_json()))) == speed


def test_few_samples_of_every_input():
    few = Batch(
        (IMAGES.repeat(3, 1, 1, 1),), {"mask": torch.ones(12, 5), "scale": torch.tensor(2.0), "flag": True}
    ).few()
    assert few.args[0].shape == (8, 3, 8, 8) and few.kwargs["mask"].shape == (8, 5)
    assert few.kwargs["scale"] == 2.0 and few.kwargs["flag"] is True


# ---- In a trainer --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [{}, {"channels_last": True}, {"teacher_compile": True}, {"teacher_metrics": True, "bf16": True}],
    ids=str,
)
def test_a_folded_teacher_teaches_the_same_and_stays_itself(options, tmp_path, compiled):
    plain = make(tmp_path / "plain", bf16=options.get("bf16", False))
    plain.train()
    network = teacher_network()
    before = copy.deepcopy(network.state_dict())
    trainer = make(tmp_path / "folded", network, teacher_fold_batchnorm=True, **options)
    trainer.train()
    assert_same_students(trainer, plain, tolerance=0.01 if "bf16" in options else 1e-5)
    assert trainer.teacher.model is network and network.norm.training is False
    for key, value in network.state_dict().items():
        assert torch.equal(value, before[key]), key
    # What runs is a copy, and no part of the teacher: neither counted nor saved with it.
    (runs,) = trainer.teacher._runs
    assert runs is not network and isinstance(runs.norm, nn.Identity)
    assert sum(p.numel() for p in trainer.teacher.parameters()) == sum(p.numel() for p in network.parameters())
    assert trainer.teacher.state_dict().keys() == {f"model.{key}" for key in before}
    assert compiled == ([runs] if "teacher_compile" in options else [])


def test_a_teacher_that_cannot_be_folded_says_so_and_runs_as_it_is(tmp_path, caplog):
    network = ConvNet(width=8, norm=False)
    trainer = make(tmp_path, network, teacher_fold_batchnorm=True)
    trainer.train()
    assert trainer.teacher._runs == (network,)
    assert "The BatchNorm of ConvNet is not folded: it has none. It runs as it is." in caplog.text


def test_a_teacher_alone_is_folded_with_its_first_batch():
    network = teacher_network()
    teacher = Teacher(network)
    expected = teacher(IMAGES)
    teacher.place(CPU, fold_batchnorm=True, channels_last=True)
    for inputs in ({"x": IMAGES}, {"pixel_values": IMAGES[:1]}):
        logits = teacher(**inputs)
        torch.testing.assert_close(logits, expected[: len(logits)], rtol=0, atol=1e-5 * float(expected.abs().max()))
        assert not logits.is_inference()
    (runs,) = teacher._runs
    assert isinstance(runs.norm, nn.Identity) and isinstance(network.norm, nn.BatchNorm2d)
    # What is done to the network as a whole is done to what runs.
    assert teacher.double()(IMAGES.double()).dtype == torch.float64
    assert isinstance(teacher._runs[0].norm, nn.Identity)


# ---- The fastest ---------------------------------------------------------------------------------------------------


@pytest.fixture
def times(monkeypatch):
    """Have each way take the time that a function of the :class:`Speed` says; what was measured, in order."""
    measured = []

    def set_times(time):
        def ratios(ways, device):
            for way in ways.values():
                way()
            measured.extend(ways)
            values = [time(speed) for speed in ways]
            return {speed: value / values[0] for speed, value in zip(ways, values, strict=True)}

        monkeypatch.setattr(teacher_speed, "ratios", ratios)
        return measured

    return set_times


def cost(folding=1.0, channels_last=1.0, half=1.0, compiling=1.0):
    def time(speed):
        return (
            (folding if speed.fold_batchnorm else 1.0)
            * (channels_last if speed.channels_last else 1.0)
            * (half if speed.dtype else 1.0)
            * (compiling if speed.compile else 1.0)
        )

    return time


OPEN = SpeedOptions(BOTH, BOTH, (None, torch.bfloat16), BOTH)


@pytest.mark.parametrize(
    ("time", "chosen"),
    [
        (cost(), Speed()),
        (cost(folding=0.98), Speed()),
        (cost(folding=0.8), Speed(True)),
        (cost(folding=0.8, channels_last=0.9), Speed(True, True)),
        (cost(folding=0.8, channels_last=1.2, half=0.5), Speed(True, False, torch.bfloat16)),
        (cost(folding=0.8, channels_last=0.9, half=2.0, compiling=0.7), Speed(True, True, None, True)),
        (cost(folding=0.8, compiling=0.99), Speed(True)),
    ],
)
def test_the_fastest_is_chosen_and_logged(time, chosen, times, compiled, caplog):
    network = teacher_network()
    before = copy.deepcopy(network.state_dict())
    times(time)
    assert fastest(network, OPEN, BATCH, CPU, "ConvNet") == chosen
    assert (
        f"The teacher ConvNet runs {chosen}, measured in {time(chosen):.2f} of the time (as it is: 1.00; BatchNorm"
        in (caplog.text)
    )
    assert all(torch.equal(value, before[key]) for key, value in network.state_dict().items())
    assert network.conv.weight.is_contiguous() and network.conv.weight.dtype == torch.float32


def test_only_what_may_be_chosen_is_measured(times, compiled):
    measured = times(cost(folding=0.8, channels_last=0.9))
    options = SpeedOptions((True,), BOTH, (torch.bfloat16,), (False,))
    assert fastest(teacher_network(), options, BATCH, CPU, "ConvNet") == Speed(True, True, torch.bfloat16)
    assert measured == [Speed(True, False, torch.bfloat16), Speed(True, True, torch.bfloat16)]
    # Nothing to fold, and no images.
    measured.clear()
    linear = nn.Sequential(nn.Flatten(), nn.Linear(192, CLASSES))
    assert fastest(linear, OPEN, BATCH, CPU, "linear") == Speed()
    assert measured == [Speed(), Speed(dtype=torch.bfloat16), Speed(), Speed(compile=True)]
    assert not SpeedOptions().are_open and OPEN.are_open


def test_what_moves_the_logits_too_far_is_passed_over(times, monkeypatch, caplog):
    monkeypatch.setattr(teacher_speed, "MAX_ERROR", 1e-4)
    times(cost(folding=0.8, half=0.1))
    options = SpeedOptions(BOTH, (False,), (None, torch.bfloat16), (False,))
    assert fastest(teacher_network(), options, BATCH, CPU, "ConvNet") == Speed(True)
    assert "Running the teacher BatchNorm folded, bfloat16 is passed over: its logits move by" in caplog.text


def test_an_fp16_overflow_is_passed_over(times):
    network = teacher_network()
    network.head.weight.data.mul_(1e6)
    times(cost(half=0.1))
    options = SpeedOptions(dtype=(None, torch.float16))
    assert fastest(network, options, BATCH, CPU, "ConvNet") == Speed()


def test_what_cannot_be_done_here_is_passed_over(times, monkeypatch, caplog):
    def compile(self):
        raise RuntimeError("Failed to find C++ compiler. Please specify via CXX environment variable.")

    monkeypatch.setattr(nn.Module, "compile", compile)
    times(cost(compiling=0.1))
    assert fastest(teacher_network(), SpeedOptions(compile=BOTH), BATCH, CPU, "ConvNet") == Speed()
    assert "Running the teacher compiled is not measured, since it cannot be done here (RuntimeError: Failed to" in (
        caplog.text
    )


def test_what_cannot_be_folded_or_copied_runs_as_it_is(times, caplog):
    network = teacher_network()
    network.norm.register_forward_hook(lambda module, args, output: None)
    measured = times(cost(folding=0.1))
    assert fastest(network, SpeedOptions(BOTH), BATCH, CPU, "ConvNet") == Speed()
    assert measured == [Speed()]
    network.lock = (item for item in ())
    assert fastest(network, OPEN, BATCH, CPU, "ConvNet") == Speed()
    assert (
        "The teacher ConvNet runs as it is: a copy to measure cannot be run (TypeError: cannot pickle" in caplog.text
    )


def test_it_is_measured_in_earnest(caplog):
    """No assertion on what is faster: this is a small network on a shared machine."""
    options = SpeedOptions(BOTH, BOTH)
    assert fastest(teacher_network(), options, BATCH, CPU, "ConvNet") in options.candidates(teacher_network())
    assert "(as it is: 1.00; BatchNorm folded: " in caplog.text


# ---- Timing --------------------------------------------------------------------------------------------------------


def test_ratios_are_of_the_least_times_of_ways_that_take_turns(monkeypatch):
    clock, order = [0.0], []
    # Each way's times, over the rounds.
    takes = {"plain": [9.0, 4.0, 5.0, 4.0], "fast": [2.0, 3.0, 3.0, 8.0], "hopeless": [20.0]}

    def way(name):
        def run():
            order.append(name)
            clock[0] += next(times[name])

        return run

    times = {name: iter(values) for name, values in takes.items()}
    monkeypatch.setattr(timing, "_now", lambda device: clock[0])
    monkeypatch.setattr(timing, "_ROUNDS", 4)
    monkeypatch.setattr(timing, "_BUDGET", 1000.0)
    assert timing.ratios({name: way(name) for name in takes}, CPU) == {"plain": 1.0, "fast": 0.5, "hopeless": 5.0}
    assert order == ["plain", "fast", "hopeless", *["plain", "fast"] * 3]
    # Two rounds, however long they take.
    times, order[:] = {name: iter(values) for name, values in takes.items()}, []
    monkeypatch.setattr(timing, "_BUDGET", 1.0)
    assert timing.ratios({name: way(name) for name in takes}, CPU)["fast"] == 0.5
    assert order == ["plain", "fast", "hopeless", "plain", "fast"]


# ---- The choice in a trainer ---------------------------------------------------------------------------------------


def test_auto_is_kept_over_resuming_and_changes_nothing_else(times, tmp_path, caplog):
    options = {"save_strategy": "steps", "save_steps": 1, "num_train_epochs": 2}
    times(cost(folding=0.8))
    trainer = make(tmp_path / "auto", teacher_speed="auto", **options)
    trainer.train()
    assert "The teacher ConvNet runs BatchNorm folded, measured in 0.80 of the time" in caplog.text
    assert trainer.teacher.speed == Speed(fold_batchnorm=True) and not trainer.teacher.speed_is_open
    # Measuring left the random state alone: dropout and the order of the samples are the same.
    explicit = make(tmp_path / "explicit", teacher_fold_batchnorm=True, **options)
    explicit.train()
    assert_same_students(trainer, explicit)
    saved = json.loads((tmp_path / "auto" / "checkpoint-2" / "distillation.json").read_text())
    assert saved["teacher_speed"] == [
        {"fold_batchnorm": True, "channels_last": False, "dtype": None, "compile": False}
    ]

    measured = times(cost(channels_last=0.1))
    measured.clear()
    again = make(tmp_path / "again", teacher_speed="auto", **options)
    again.train(resume_from_checkpoint=str(tmp_path / "auto" / "checkpoint-2"))
    assert again.state.global_step == 6 and again._initial_global_step == 2
    assert measured == [] and again.teacher.speed == trainer.teacher.speed
    assert_same_students(again, trainer)


def test_auto_that_finds_nothing_faster_is_the_plain_run(times, tmp_path):
    times(cost(folding=1.2, channels_last=1.1))
    auto = make(tmp_path / "auto", teacher_speed="auto")
    auto.train()
    plain = make(tmp_path / "plain")
    plain.train()
    assert auto.teacher.speed == Speed()
    assert_same_students(auto, plain)


@pytest.mark.parametrize(
    ("options", "half", "chosen"),
    [
        ({}, 0.1, Speed(True)),
        ({"teacher_dtype": "bf16"}, 0.1, Speed(True, dtype=torch.bfloat16)),
        ({"teacher_dtype": "bf16"}, 3.0, Speed(True)),
        ({"teacher_compile": True}, 1.0, Speed(True, compile=True)),
        ({"channels_last": True}, 1.0, Speed(True, True)),
    ],
    ids=str,
)
def test_auto_takes_another_type_only_where_it_is_given(options, half, chosen, times, compiled, tmp_path):
    times(cost(folding=0.8, half=half, compiling=0.5))
    trainer = make(tmp_path, teacher_speed="auto", **options)
    trainer.train()
    assert trainer.teacher.speed == chosen
    (runs,) = trainer.teacher._runs
    assert {parameter.dtype for parameter in runs.parameters()} == {chosen.dtype or torch.float32}
    assert trainer.teacher.model.conv.weight.dtype == torch.float32


def test_the_layout_alone_can_be_measured(times, tmp_path):
    measured = times(cost(channels_last=0.8))
    trainer = make(tmp_path, channels_last="auto", teacher_dtype="bf16")
    assert trainer.teacher.speed == Speed(dtype=torch.bfloat16) and trainer.teacher.speed_is_open
    trainer.train()
    assert measured == [Speed(dtype=torch.bfloat16), Speed(channels_last=True, dtype=torch.bfloat16)]
    assert trainer.teacher.speed == measured[1]


def test_every_member_of_an_ensemble_has_its_own(times, tmp_path):
    times(cost(folding=0.8))
    members = [teacher_network(), ConvNet(width=4, norm=False), [teacher_network()]]
    trainer = make(tmp_path, members, teacher_speed="auto", save_strategy="epoch")
    assert isinstance(trainer.teacher, Ensemble)
    trainer.train()
    chosen = [Speed(True), Speed(), Speed(True)]
    assert [part.speed for part in trainer.teacher.parts] == chosen
    saved = json.loads((tmp_path / "checkpoint-3" / "distillation.json").read_text())["teacher_speed"]
    assert [Speed.from_json(values) for values in saved] == chosen
    folded = make(tmp_path / "folded", [teacher_network(), teacher_network()], teacher_fold_batchnorm=True)
    folded.train()
    assert all(isinstance(part._runs[0].norm, nn.Identity) for part in folded.teacher.parts)


# ---- A stream of its own -------------------------------------------------------------------------------------------


def test_on_the_cpu_a_stream_is_left_out_and_that_is_said(tmp_path, caplog):
    plain = make(tmp_path / "plain")
    plain.train()
    beside = make(tmp_path / "beside", teacher_stream=True)
    assert "`teacher_stream` needs CUDA: on this cpu the teacher runs in turn." in caplog.text
    beside.train()
    assert_same_students(beside, plain)


def test_the_teacher_alone_is_beside_and_is_joined_before_the_loss(tmp_path):
    events = []

    class Told(SideStream):
        def beside(self):
            events.append("beside")
            return super().beside()

        def join(self):
            events.append("join")

    class Telling(DistillationTrainer):
        def _build_teacher_stream(self):
            return Told(CPU)

        def compute_teacher_logits(self, inputs):
            events.append("teacher")
            return super().compute_teacher_logits(inputs)

        def _student_outputs(self, model, inputs):
            events.append("student")
            return super()._student_outputs(model, inputs)

        def compute_distillation_loss(self, *args):
            events.append("loss")
            return super().compute_distillation_loss(*args)

    make(tmp_path, trainer_class=Telling, data=Images(count=8)).train()
    assert events == ["beside", "teacher", "student", "join", "loss"]


# ---- Refusals ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"teacher_speed": "fast"}, "`teacher_speed` must be one of 'off', 'auto', got 'fast'"),
        (
            {"teacher_speed": "auto", "full_determinism": True},
            '`teacher_speed`="auto" takes what measures faster, and',
        ),
        (
            {"channels_last": "auto", "full_determinism": True},
            '`channels_last`="auto" takes what measures faster, and',
        ),
        ({"teacher_fold_batchnorm": True, "teacher_fsdp": True}, "`teacher_fold_batchnorm` needs the whole of the"),
        ({"teacher_speed": "auto", "teacher_fsdp": True}, "`teacher_speed` needs the whole of the teacher"),
        ({"channels_last": True, "teacher_fsdp": True}, "`channels_last` needs the whole of the teacher"),
        ({"teacher_fold_batchnorm": True, "feature_loss": "crd"}, "`teacher_fold_batchnorm` changes the teacher's"),
        ({"teacher_speed": "auto", "feature_loss": "crd"}, "`teacher_speed` changes the teacher's modules, and"),
    ],
    ids=str,
)
def test_what_contradicts_itself_is_refused(options, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        config(tmp_path, **options)


@pytest.mark.parametrize("option", [{"teacher_fold_batchnorm": True}, {"teacher_speed": "auto"}], ids=str)
def test_a_function_is_no_network_to_speed_up(option, tmp_path):
    with pytest.raises(ValueError, match="is a function, of which neither type nor place can be changed"):
        make(tmp_path, lambda **inputs: torch.zeros(8, CLASSES), **option)
    # Values are the same in any layout.
    make(tmp_path, lambda **inputs: torch.zeros(len(inputs["labels"]), CLASSES), channels_last=True).train()


def test_a_teacher_that_is_spread_stays_as_it_is():
    with pytest.raises(ValueError, match=r"spread over the processes \(teacher_fsdp\), .* leave out teacher_fold"):
        Teacher(teacher_network()).place(CPU, sharded=True, fold_batchnorm=True)
    with pytest.raises(ValueError, match="Folding watches a network run: give it a batch"):
        speed_up(teacher_network(), Speed(fold_batchnorm=True))
