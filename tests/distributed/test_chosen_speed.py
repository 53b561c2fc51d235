"""What one process measures, both take: the teacher's way to run and the layout, and they train as without."""

import torch
from processes import run_processes
from tiny import ConvNet, Images, config, networks

from hf_kd import DistillationTrainer, memory_format, teacher_speed


def train(rank, folder, batch=4, **options):
    """The number of processes, what was chosen, how often this process measured, and the student's weights."""
    measured = []

    def ratios(ways, device):
        """Each process finds something else to be fastest."""
        measured.append(list(ways))
        fastest = list(ways)[-1 - rank]
        return {way: 0.5 if way == fastest else 1.0 for way in ways}

    memory_format.ratios = teacher_speed.ratios = ratios
    _, teacher = networks(dtype=torch.float64)
    torch.manual_seed(1)
    student = ConvNet().double()
    args = config(folder, per_device_train_batch_size=batch, **options)
    trainer = DistillationTrainer(student, teacher, args, train_dataset=Images(count=20, dtype=torch.float64))
    trainer.train()
    weights = torch.cat([parameter.detach().flatten() for parameter in student.parameters()])
    return args.world_size, (trainer.teacher.speed, trainer._channels_last), len(measured), weights


def test_both_take_what_the_first_one_measured(tmp_path):
    (two, chosen, times, weights), (_, other_chosen, other_times, other_weights) = run_processes(
        train_auto, 2, tmp_path / "auto"
    )
    assert two == 2 and (times, other_times) == (2, 0)
    assert chosen == other_chosen == (teacher_speed.Speed(fold_batchnorm=True, channels_last=True), True)
    assert torch.equal(weights, other_weights)
    # The student has BatchNorm, whose statistics are each process's own: compared with two processes without.
    ((_, plain, times, expected), _) = run_processes(train, 2, tmp_path / "plain")
    assert plain == (teacher_speed.Speed(), False) and times == 0
    torch.testing.assert_close(weights, expected, rtol=0, atol=1e-12)


def train_auto(rank, folder):
    return train(rank, folder, teacher_speed="auto", channels_last="auto")
