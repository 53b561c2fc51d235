"""The Triton kernel: in Triton's interpreter here, on a GPU where there is one."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest


pytest.importorskip("triton")


def largest_differences(**environment):
    done = subprocess.run(
        [sys.executable, Path(__file__).with_name("triton_cases.py")],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def check(found):
    # What is stored in half precision is rounded to it.
    tolerances = {"float64": 1e-13, "float32": 1e-5, "bfloat16": 2**-8, "float16": 2**-11, "a label": 0.0}
    assert len(found) == 19
    for case, difference in found.items():
        (tolerance,) = (value for kind, value in tolerances.items() if case.startswith(kind))
        assert difference <= tolerance, case


def test_equals_the_eager_kernel_in_the_interpreter():
    check(largest_differences(TRITON_INTERPRET="1", CUDA_VISIBLE_DEVICES=""))


@pytest.mark.gpu
def test_equals_the_eager_kernel_on_a_gpu():
    check(largest_differences())
