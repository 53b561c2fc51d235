"""What storing a row of logits costs in precision, and what must survive it exactly."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_kd.losses import functional
from hf_kd.teacher_cache.codec import RowCodec


GAMMAS = (0.1, 0.25, 0.5, 0.8, 1.0)


def round_trip(dtype, logits):
    codec = RowCodec(dtype, logits.shape[1])
    records, storable = codec.encode(logits)
    assert storable.all()
    return codec.decode(records)


def teacher_like(classes, rows=256, seed=0):
    """Rows as trained networks give them: a noisy tail, some near classes, one that leads by 0 to 20."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(rows, classes, generator=generator) * 2.0
    logits[:, : classes // 10 + 1] += 3.0
    logits[torch.arange(rows), torch.randint(0, classes, (rows,), generator=generator)] += (
        torch.rand(rows, generator=generator) * 20.0
    )
    return logits


@pytest.mark.parametrize(
    ("dtype", "of_sample", "of_batch"), [("fp16", 5e-4, 2e-4), ("int8", 1e-2, 3e-3), ("fp32", 0, 0)]
)
@pytest.mark.parametrize("classes", [10, 100, 1000])
def test_errors_of_log_power_sum_and_loss_are_those_that_are_documented(classes, dtype, of_sample, of_batch):
    logits = teacher_like(classes)
    student = torch.randn(logits.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    stored = round_trip(dtype, logits)
    for gamma in GAMMAS:
        exact, found = (functional.log_power_sum(values.double(), gamma) for values in (logits, stored))
        assert float((exact - found).abs().max()) <= of_sample
        live, cached = (
            float(functional.wttm_loss(student, values.double(), gamma=gamma)) for values in (logits, stored)
        )
        assert abs(live - cached) <= of_batch * live


def test_int8_has_the_error_of_8_bits_and_not_less():
    # A codec that kept more than it says would pass every other test.
    logits = teacher_like(1000)
    assert float((round_trip("int8", logits) - logits).abs().max()) > 1e-2
    assert float((round_trip("fp16", logits) - logits).abs().max()) > 1e-3


rows = st.lists(st.one_of(st.floats(-1e4, 1e4, width=32), st.just(-np.inf)), min_size=1, max_size=40).filter(
    lambda row: max(row) > -np.inf
)


@settings(max_examples=200, deadline=None)
@given(rows)
def test_order_of_magnitude_and_impossible_classes_survive(row):
    logits = torch.tensor([row], dtype=torch.float32)
    top, possible = logits.max(), logits.isfinite()
    distance = top - logits
    for dtype, relative, steps in (("fp32", 0.0, 0.0), ("fp16", 2.0**-11, 0.0), ("int8", 0.0, 0.5 / 254)):
        stored = round_trip(dtype, logits)
        assert torch.equal(stored.isneginf(), ~possible)
        assert float(stored.max()) == float(top)
        if dtype == "fp32":
            assert torch.equal(stored, logits)
            continue
        # Half a step of the root, twice for the square; beside it what fp32 rounds of the sum.
        largest = distance[possible].max()
        allowed = relative * distance + 2 * steps * largest + 1e-6 * top.abs() + 1e-6 * largest + 1e-6
        assert bool(((stored - logits).abs() <= allowed)[possible].all())


def test_distances_beyond_fp16_stay_finite():
    logits = torch.tensor([[0.0, -1e30, -torch.inf, -7e4]])
    stored = round_trip("fp16", logits)
    assert torch.equal(stored, torch.tensor([[0.0, -65504.0, -torch.inf, -65504.0]]))
    assert round_trip("int8", logits)[0, 1] == pytest.approx(-1e30, rel=1e-3)


@pytest.mark.parametrize("dtype", ["fp16", "int8", "fp32"])
def test_rows_that_are_no_logits_cannot_be_stored(dtype):
    nan, inf = float("nan"), float("inf")
    logits = torch.tensor([[0.0, 1.0], [nan, 1.0], [inf, 1.0], [-inf, -inf], [-inf, 2.0]])
    _, storable = RowCodec(dtype, 2).encode(logits)
    assert storable.tolist() == [True, False, False, False, True]


@pytest.mark.parametrize("dtype", ["fp16", "int8", "fp32"])
@pytest.mark.parametrize("classes", [1, 2, 3, 1001])
def test_rows_take_the_room_that_is_documented(dtype, classes):
    codec = RowCodec(dtype, classes)
    size = {"fp16": 2 * classes + 8, "int8": classes + 12, "fp32": 4 * classes + 4}[dtype]
    assert size <= codec.record.itemsize < size + 4
    logits = torch.randn(3, classes)
    assert round_trip(dtype, logits).shape == (3, classes)
    assert round_trip(dtype, logits.double().bfloat16()).dtype == torch.float32


def test_bad_arguments():
    with pytest.raises(ValueError, match="must be one of fp16, int8, fp32, got 'fp8'"):
        RowCodec("fp8", 10)
    with pytest.raises(ValueError, match="must be at least 1, got 0"):
        RowCodec("fp16", 0)
