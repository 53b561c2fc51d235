"""Compares the Triton kernel with the eager one in fp64; a program, since the interpreter is chosen at import.

    TRITON_INTERPRET=1 python tests/kernels/triton_cases.py      # or on a GPU, without the variable

It prints one JSON object: by case, the largest difference relative to the largest value.
"""

import itertools
import json
import sys

import torch

from hf_kd.kernels import eager_kernel, matching_objective, triton_kernel


def difference(found, expected):
    """The largest, as a share of the largest value; infinite where one is finite and the other is not."""
    found, expected = found.detach().cpu().double(), expected.detach().cpu().double()
    if not torch.equal(found.isfinite(), expected.isfinite()):
        return float("inf")
    finite = expected.isfinite()
    scale = expected[finite].abs().max().clamp_min(1e-300) if finite.any() else 1.0
    return float(((found - expected)[finite].abs().max() / scale) if finite.any() else 0.0)


def compare(device, student, teacher, labels, **options):
    results = []
    for kernel, cast in ((triton_kernel.triton_kernel, lambda x: x.to(device)), (eager_kernel, torch.Tensor.double)):
        leaf = cast(student).detach().requires_grad_()
        place = leaf.device
        given = {key: value.to(place) if isinstance(value, torch.Tensor) else value for key, value in options.items()}
        objective, totals = matching_objective(leaf, cast(teacher), labels.to(place), kernel=kernel, **given)
        (gradient,) = torch.autograd.grad(objective, leaf)
        results.append((objective, totals, gradient))
    return max(difference(*pair) for pair in zip(*results, strict=True))


def main():
    device = "cuda" if torch.cuda.is_available() else "cpu"
    generator = torch.Generator().manual_seed(0)

    def batch(rows, classes, dtype, scale=3.0):
        student, teacher = ((scale * torch.randn(rows, classes, generator=generator)).to(dtype) for _ in range(2))
        labels = torch.randint(classes, (rows,), generator=generator)
        labels[1] = -100
        return student, teacher, labels

    found = {}
    dtypes = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
    for dtype, weighted in itertools.product(dtypes, (True, False)):
        name = f"{str(dtype).removeprefix('torch.')}, {weighted=}"
        found[name] = compare(device, *batch(3, 37, dtype), gamma=0.2, beta=1.6, weighted=weighted)
    # More than one block, and less than one.
    for classes in (1, 2, 100):
        found[f"float64, {classes} classes"] = compare(device, *batch(2, classes, torch.float64), gamma=0.3)
    limit, triton_kernel._LARGEST_BLOCK = triton_kernel._LARGEST_BLOCK, 64
    for classes in (64, 65, 200):
        found[f"float64, {classes} in blocks"] = compare(device, *batch(2, classes, torch.float64), gamma=0.3)
    student, teacher, labels = batch(6, 160, torch.float64, scale=1.0)
    student[0, 150], student[2], student[3, 3] = 1e4, -1e4, -1e4
    teacher[1, 150], teacher[2, 2], teacher[3] = 1e4, 1e4, -1e4
    found["float64, large"] = compare(device, student, teacher, labels, gamma=0.05)
    teacher[4, :64] = teacher[5, 1:] = -torch.inf
    student[4, 5] = -torch.inf
    labels[4] = 100
    found["float64, impossible classes"] = compare(device, student, teacher, labels, gamma=0.05)
    triton_kernel._LARGEST_BLOCK = limit
    mask, counts = torch.tensor([True, True, False]), torch.tensor([11, 7])
    found["float64, masked"] = compare(device, *batch(3, 9, torch.float64), gamma=0.5, mask=mask, counts=counts)
    student, teacher, labels = batch(4, 18, torch.float64)
    found["float64, strided"] = compare(device, student[:, ::2], teacher[:, 9:], labels.clamp(max=8), gamma=0.5)
    student, teacher, labels = (tensor.to(device) for tensor in batch(4, 9, torch.float32))
    labels[2] = 9
    objective, _ = matching_objective(
        student.requires_grad_(), teacher, labels, gamma=0.5, kernel=triton_kernel.triton_kernel
    )
    found["a label out of range is NaN"] = 0.0 if objective.isnan() else 1.0
    json.dump(found, sys.stdout)


if __name__ == "__main__":
    main()
