"""The processes that the other tests here rely on are as many as they should be, and find each other."""

import pytest
import torch
from processes import run_processes
from tiny import config


def meet(rank, folder):
    args = config(folder)
    ranks = torch.tensor([rank])
    torch.distributed.all_reduce(ranks)
    return args.world_size, args.process_index, args.device.type, int(ranks)


def fail(rank):
    if rank == 1:
        raise ValueError(f"process {rank} has a reason")
    return rank


def test_processes_form_one_group(tmp_path):
    assert run_processes(meet, 2, tmp_path) == [(2, 0, "cpu", 1), (2, 1, "cpu", 1)]


def test_a_failure_reaches_the_test():
    with pytest.raises(RuntimeError, match="process 1 has a reason"):
        run_processes(fail, 2)
