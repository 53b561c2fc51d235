"""What the WTTM objective costs, forward and backward: the fused kernels beside the formula as it is usually written.

    python tests/benchmarks/loss.py [--sizes 64x100 256x1000 512x21841] [--rounds 15] [--threads 1] [--output FILE]

Each round times every way once, in a new order; a ratio is to the plain formula of the same round. On a CPU it is of
processor time, which other programs disturb less; the spread is between the quartiles, and "plain again" shows what is
noise. "kept" is what autograd holds for the backward pass beside the inputs, and "peak" the most that is allocated on
top of them, both in tensors of the logits' size. The floor reads both logits and writes one gradient, nothing else.
"""

import argparse
import random
import statistics
import time

import torch
from side_by_side import add_output, table, write
from torch.nn import functional as F
from torch.profiler import ProfilerActivity, profile

from hf_kd.kernels import KERNELS, choose_kernel, matching_objective
from hf_kd.losses.logit import WTTM, Outputs, cross_entropy


GAMMA, BETA = 0.8, 1.6
WARMUP = 3
# The shortest thing that is timed, in seconds: clocks have their grain.
SHORTEST = 0.02


def plain(student, teacher, labels):
    p = F.softmax(teacher, dim=-1)
    powers = p.pow(GAMMA)
    power_sum = powers.sum(dim=-1, keepdim=True)
    log_q = F.log_softmax(student, dim=-1)
    divergence = F.kl_div(log_q, powers / power_sum, reduction="none").sum(dim=-1)
    return F.cross_entropy(student, labels) + BETA * (power_sum.squeeze(-1) * divergence).mean()


def composed(student, teacher, labels):
    outputs = Outputs(student)
    ce, labelled = cross_entropy(outputs, labels)
    return ce / labelled + BETA * WTTM(GAMMA)(outputs, Outputs(teacher))["distill"].mean()


def fused(name, device):
    kernel = choose_kernel(name, device)

    def objective(student, teacher, labels):
        return matching_objective(student, teacher, labels, gamma=GAMMA, beta=BETA, kernel=kernel)[0]

    return objective


def backward(objective):
    def step(student, teacher, labels):
        student.grad = None
        objective(student, teacher, labels).backward()

    return step


def floor(student, teacher, labels):
    torch.add(student.detach(), teacher)


def ways(device):
    names = [name for name in KERNELS if (name == "triton") == (device.type == "cuda") or name == "eager"]
    objectives = {"plain": plain, "plain again": plain, "plain, compiled": torch.compile(plain, dynamic=False)}
    objectives |= {"composed": composed, **{f"fused, {name}": fused(name, device) for name in names}}
    return {name: backward(objective) for name, objective in objectives.items()} | {"floor": floor}, objectives


def wait(device):
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds(step, batch, calls):
    """(wall, processor) time of a call."""
    wait(batch[0].device)
    wall, cpu = time.perf_counter(), time.process_time()
    for _ in range(calls):
        step(*batch)
    wait(batch[0].device)
    return (time.perf_counter() - wall) / calls, (time.process_time() - cpu) / calls


def kept_bytes(objective, batch):
    """What autograd keeps beside the inputs."""
    inputs = {tensor.untyped_storage().data_ptr() for tensor in batch}
    kept = {}

    def keep(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        value = objective(*batch)
    del value
    return sum(size for place, size in kept.items() if place not in inputs)


def peak_bytes(step, batch):
    """The most that is allocated at once."""
    batch[0].grad = None
    if batch[0].device.type == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        step(*batch)
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        step(*batch)
    events = [event for event in profiled.profiler.kineto_results.events() if event.name() == "[memory]"]
    now = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    return most


def measure(rows, classes, rounds, device):
    generator = torch.Generator().manual_seed(0)
    student = (3.0 * torch.randn(rows, classes, generator=generator)).to(device).requires_grad_()
    teacher = (5.0 * torch.randn(rows, classes, generator=generator)).to(device)
    labels = torch.randint(classes, (rows,), generator=generator).to(device)
    batch = student, teacher, labels
    steps, objectives = ways(device)
    size = student.nbytes
    found = {}
    for name, step in steps.items():
        for _ in range(WARMUP):
            step(*batch)
        kept = kept_bytes(objectives[name], batch) / size if name in objectives else 0.0
        found[name] = {"kept": kept, "peak": peak_bytes(step, batch) / size}
    expected, gradient = plain(*batch).item(), torch.autograd.grad(plain(*batch), student)[0]
    for name, objective in objectives.items():
        value = objective(*batch)
        torch.testing.assert_close(value.item(), expected, rtol=1e-5, atol=0, msg=name)
        torch.testing.assert_close(torch.autograd.grad(value, student)[0], gradient, rtol=1e-3, atol=1e-7)
    calls = {name: max(1, int(SHORTEST / min(seconds(step, batch, 1)))) for name, step in steps.items()}
    times = {name: [] for name in steps}
    order, shuffle = list(steps), random.Random(0)
    for _ in range(rounds):
        shuffle.shuffle(order)
        for name in order:
            times[name].append(seconds(steps[name], batch, calls[name]))
    clock = 1 if device.type == "cpu" else 0
    for name, pairs in times.items():
        ratios = [pair[clock] / base[clock] for pair, base in zip(pairs, times["plain"], strict=True)]
        quartiles = statistics.quantiles(ratios, n=4)
        wall = [pair[0] / base[0] for pair, base in zip(pairs, times["plain"], strict=True)]
        found[name] |= {
            "milliseconds": 1e3 * statistics.median(pair[clock] for pair in pairs),
            "ratio": statistics.median(ratios),
            "quartiles": [quartiles[0], quartiles[2]],
            "wall_ratio": statistics.median(wall),
        }
    return found


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", nargs="+", default=["64x100", "256x1000", "512x21841"])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add_output(parser)
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    device = torch.device(args.device)
    sizes = {}
    for size in args.sizes:
        rows, classes = map(int, size.split("x"))
        sizes[size] = measure(rows, classes, args.rounds, device)
        rows = [
            (
                name,
                f"{row['milliseconds']:.3f}",
                f"{row['ratio']:.2f}",
                f"{row['quartiles'][0]:.2f} to {row['quartiles'][1]:.2f}",
                *(f"{row[key]:.2f}" for key in ("wall_ratio", "kept", "peak")),
            )
            for name, row in sizes[size].items()
        ]
        print(f"\n{table(rows, (size, 'ms', 'ratio', 'quartiles', 'wall', 'kept', 'peak'))}", flush=True)
    write(args.output, {"rounds": args.rounds, "sizes": sizes})


if __name__ == "__main__":
    main()
