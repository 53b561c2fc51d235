"""How the teacher runs: in its own type, compiled or not, once a batch, without a graph; and what it is read from."""

import pytest
import torch
from tiny import CLASSES, ConvNet, Images, config, networks
from torch import nn

from hf_kd import DistillationTrainer, Teacher


class Watched(ConvNet):
    """A network that remembers how it was called."""

    def __init__(self, **options):
        super().__init__(**options)
        self.calls = []

    def forward(self, x):
        logits = super().forward(x)
        self.calls.append((x.dtype, logits.dtype, torch.is_inference_mode_enabled(), logits.requires_grad, len(x)))
        return logits


def run(folder, teacher=None, **options):
    student, default_teacher = networks()
    trainer = DistillationTrainer(
        student, teacher or default_teacher, config(folder, **options), train_dataset=Images(count=16)
    )
    trainer.train()
    return student, trainer


def test_the_teacher_runs_once_a_batch_in_inference_mode_without_a_graph(tmp_path):
    teacher = Watched(width=8)
    run(tmp_path, teacher, num_train_epochs=2)
    assert teacher.calls == [(torch.float32, torch.float32, True, False, 8)] * 4


@pytest.mark.parametrize(
    ("precision", "dtype", "seen"),
    [
        ({}, "bf16", (torch.bfloat16, torch.bfloat16)),
        ({}, "fp16", (torch.float16, torch.float16)),
        ({"bf16": True}, None, (torch.float32, torch.bfloat16)),
        ({"bf16": True}, "fp32", (torch.float32, torch.float32)),
        ({"bf16": True}, "fp16", (torch.float16, torch.float16)),
    ],
)
def test_the_teachers_type_is_its_own(precision, dtype, seen, tmp_path):
    teacher = Watched(width=8)
    student, trainer = run(tmp_path, teacher, teacher_dtype=dtype, **precision)
    assert {call[:2] for call in teacher.calls} == {seen}
    weights = {None: torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[dtype]
    assert {parameter.dtype for parameter in teacher.parameters()} == {weights}
    assert {parameter.dtype for parameter in student.parameters()} == {torch.float32}
    assert trainer.compute_teacher_logits({"pixel_values": torch.randn(2, 3, 8, 8)}).dtype is torch.float32


def test_a_bf16_teacher_teaches_nearly_as_an_fp32_one(tmp_path):
    exact, _ = run(tmp_path)
    rounded, _ = run(tmp_path, teacher_dtype="bf16")
    differences = [
        (ours - theirs).abs().max().item()
        for ours, theirs in zip(rounded.parameters(), exact.parameters(), strict=True)
    ]
    assert 0 < max(differences) < 0.01


def test_a_compiled_teacher_gives_the_same_student(tmp_path, monkeypatch):
    backends = []

    def compile(self, *args, **kwargs):
        backends.append(type(self).__name__)
        # Without a C++ compiler; what dynamo captures is what inductor would get.
        self._compiled_call_impl = torch.compile(self._call_impl, backend="aot_eager")

    monkeypatch.setattr(nn.Module, "compile", compile)
    plain, _ = run(tmp_path)
    compiled, trainer = run(tmp_path, teacher_compile=True)
    assert backends == ["ConvNet"]
    for ours, theirs in zip(compiled.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)
    assert trainer.teacher.model.training is False


def test_every_member_of_an_ensemble_is_placed(tmp_path):
    members = [Watched(width=8), Watched(width=4)]
    run(tmp_path, members, teacher_dtype="bf16")
    assert [call[0] for member in members for call in member.calls] == [torch.bfloat16] * 4


@pytest.mark.parametrize("option", [{"teacher_dtype": "bf16"}, {"teacher_compile": True}, {"teacher_fsdp": True}])
def test_a_function_cannot_be_placed(option, tmp_path):
    with pytest.raises(ValueError, match="teacher .* is a function, of which neither type nor place can be changed"):
        run(tmp_path, lambda **inputs: torch.zeros(8, CLASSES), **option)


@pytest.mark.parametrize("option", [{"teacher_dtype": "int8"}, {"on_nonfinite": "ignore"}, {"on_bad_sample": "drop"}])
def test_unknown_choices_list_the_known_ones(option, tmp_path):
    ((name, value),) = option.items()
    with pytest.raises(ValueError, match=f"`{name}` must be one of .*got '{value}'"):
        config(tmp_path, **option)


class Trap:
    """Unpickling it leaves a trace."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


def test_code_in_a_checkpoint_runs_only_where_that_is_asked_for(tmp_path):
    import timm

    network = timm.create_model("test_resnet", num_classes=CLASSES)
    trace, path = tmp_path / "trace", tmp_path / "teacher.pth"
    torch.save({"state_dict": network.state_dict(), "trap": Trap(trace)}, path)
    with pytest.raises(RuntimeError, match=r"could not be read as plain weights .* weights_only=False"):
        Teacher.from_pretrained("test_resnet", num_classes=CLASSES, checkpoint=path)
    assert not trace.exists()
    images = torch.randn(2, 3, 160, 160)
    teacher = Teacher.from_pretrained("test_resnet", num_classes=CLASSES, checkpoint=path, weights_only=False)
    assert trace.exists()
    torch.testing.assert_close(teacher(images), network.eval()(images), rtol=0, atol=0)
    args = config(tmp_path, teacher_checkpoint=str(path), teacher_num_classes=CLASSES, teacher_weights_only=False)
    student = timm.create_model("test_resnet", num_classes=CLASSES)
    DistillationTrainer(student, "test_resnet", args)
