"""Feature losses: the official code's values, formulas written out, draws, memories, an exact resume."""

import copy
import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from hf_kd.losses import CRD, ITRD, FeatureLoss, ViTKD, build_feature_loss, register_feature_loss
from hf_kd.losses.crd import _last_rows, _scores
from hf_kd.losses.feature import FEATURE_LOSSES, check_feature_loss_name


DATA = Path(__file__).parents[1] / "data_files"
CASES = {case["id"]: case for case in json.loads((DATA / "feature_losses.json").read_text())["cases"]}
ARRAYS = np.load(DATA / "feature_losses.npz")

# Where the official modules' parameters are in ours.
RENAMED = {"embed_s.linear": "student_embedding", "embed_t.linear": "teacher_embedding", "embed.linear": "embedding"}


def arrays_of(case):
    return {name: torch.from_numpy(ARRAYS[entry["key"]]) for name, entry in case["arrays"].items()}


def cases(name):
    return [key for key, case in CASES.items() if case["name"] == name]


def ours(name):
    for old, new in RENAMED.items():
        name = name.replace(old, new)
    return name


def load_parameters(loss, arrays):
    given = {ours(name.removeprefix("param.")): value for name, value in arrays.items() if name.startswith("param.")}
    own = dict(loss.named_parameters())
    assert given.keys() == own.keys()
    with torch.no_grad():
        for name, value in given.items():
            own[name].copy_(value)


def check_gradients(loss, arrays, prefix):
    """Every recorded gradient of a parameter, and none that is not recorded."""
    recorded = {ours(name.removeprefix(prefix)): value for name, value in arrays.items() if name.startswith(prefix)}
    assert recorded
    for name, parameter in loss.named_parameters():
        if name in recorded:
            torch.testing.assert_close(parameter.grad, recorded[name], rtol=1e-8, atol=1e-10)
        else:
            assert parameter.grad is None or not parameter.grad.any(), name
    assert recorded.keys() <= dict(loss.named_parameters()).keys()


def shapes(names, *values):
    return {name: value.shape for name, value in zip(names, values, strict=True)}


def built(loss, student, teacher, **options):
    """A loss sized for features, in fp64."""
    student = student if isinstance(student, list) else [student]
    teacher = teacher if isinstance(teacher, list) else [teacher]
    loss.build(shapes(loss.student_features, *student), shapes(loss.teacher_features, *teacher), **options)
    return loss.double()


def features(names, *values):
    return dict(zip(names, values, strict=True))


def call(loss, student, teacher, *args, **given):
    student = student if isinstance(student, list) else [student]
    teacher = teacher if isinstance(teacher, list) else [teacher]
    own, theirs = features(loss.student_features, *student), features(loss.teacher_features, *teacher)
    return loss(own, theirs, *args, **given)


def random(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


# ---- The official code ---------------------------------------------------------------------------------------------


def official_crd(case):
    arrays, settings = arrays_of(case), case["hyperparameters"]
    loss = CRD(settings["feat_dim"], settings["nce_k"], settings["nce_t"], settings["nce_m"], settings["mode"])
    built(
        loss, arrays["step1.f_s"], arrays["step1.f_t"], num_samples=settings["n_data"],
        sample_labels=torch.arange(settings["n_data"]) % 3,
    )  # fmt: skip
    load_parameters(loss, arrays)
    loss.student_memory.copy_(arrays["memory_v1_before"])
    loss.teacher_memory.copy_(arrays["memory_v2_before"])
    return loss, arrays


@pytest.mark.parametrize("chosen", [True, False])
@pytest.mark.parametrize("key", cases("crd"))
def test_crd_equals_the_official_code(key, chosen, monkeypatch):
    """Both steps: loss, Z, gradients and memories, however the scores are computed."""
    case = CASES[key]
    loss, arrays = official_crd(case)
    assert loss.nce_t == case["hyperparameters"]["nce_t_effective"]
    if chosen:
        # Small cases have all products computed, since that is less; these have only those that are needed.
        scores = lambda v, memory, index: torch.einsum("bkd,bd->bk", memory[index], v)  # noqa: E731
        monkeypatch.setattr("hf_kd.losses.crd._scores", scores)
    for step, expected in enumerate(case["expected"], start=1):
        given = {name.removeprefix(f"step{step}."): v for name, v in arrays.items() if name.startswith(f"step{step}.")}
        student = given["f_s"].clone().requires_grad_()
        loss.zero_grad()
        parts = call(loss, student, given["f_t"], index=given["idx"], contrast_index=given["contrast_idx"])
        parts["feature"].mean().backward()
        assert parts["feature"].shape == given["idx"].shape
        assert parts["feature"].mean().item() == pytest.approx(expected["loss"], rel=1e-8)
        torch.testing.assert_close(parts["crd_student"] + parts["crd_teacher"], parts["feature"].detach())
        assert loss.normalisers.tolist() == pytest.approx([expected["Z_v1"], expected["Z_v2"]], rel=1e-8)
        torch.testing.assert_close(student.grad, given["grad_f_s"], rtol=1e-8, atol=1e-10)
        check_gradients(loss, given, "grad.")
        torch.testing.assert_close(loss.student_memory, given["memory_v1_after"], rtol=1e-8, atol=1e-12)
        torch.testing.assert_close(loss.teacher_memory, given["memory_v2_after"], rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("alpha", [1.01, 1.5, 2.0])
@pytest.mark.parametrize("key", cases("itrd"))
def test_itrd_correlation_equals_the_official_code(key, alpha):
    case = CASES[key]
    arrays, entry = arrays_of(case), f"corr_alpha_{alpha}"
    loss = built(ITRD(alpha_it=alpha, beta_corr=1.0, beta_mi=0.0), arrays["z_s"], arrays["z_t"])
    load_parameters(loss, arrays)
    student = arrays["z_s"].clone().requires_grad_()
    parts = call(loss, student, arrays["z_t"])
    parts["feature"].backward()
    assert set(parts) == {"feature", "itrd_correlation"}
    assert parts["feature"].item() == pytest.approx(case["expected"][entry], rel=1e-8)
    torch.testing.assert_close(student.grad, arrays[f"{entry}.grad_z_s"], rtol=1e-8, atol=1e-10)
    check_gradients(loss, arrays, f"{entry}.grad.")


@pytest.mark.parametrize("key", cases("itrd"))
def test_itrd_mutual_and_the_sum_equal_the_official_code(key):
    case = CASES[key]
    arrays, expected = arrays_of(case), case["expected"]
    loss = built(ITRD(alpha_it=1.5, beta_corr=0.0, beta_mi=1.0), arrays["z_s"], arrays["z_t"])
    load_parameters(loss, arrays)
    student = arrays["z_s"].clone().requires_grad_()
    parts = call(loss, student, arrays["z_t"])
    parts["feature"].backward()
    assert parts["feature"].item() == pytest.approx(expected["mutual"], rel=1e-8)
    assert parts["itrd_mutual"].item() == pytest.approx(expected["mutual"], rel=1e-8)
    torch.testing.assert_close(student.grad, arrays["mutual.grad_z_s"], rtol=1e-8, atol=1e-10)
    if arrays["z_s"].shape == arrays["z_t"].shape:
        assert not loss.embedding.weight.grad.any()  # the mutual term does without the linear layer
    else:
        check_gradients(loss, arrays, "mutual.grad.")
    loss.beta_corr = 2.0
    combined = expected["combined_alpha_1.5_lambda_corr_2_lambda_mutual_1"]
    assert call(loss, student, arrays["z_t"])["feature"].item() == pytest.approx(combined, rel=1e-8)


@pytest.mark.parametrize("key", cases("vitkd"))
def test_vitkd_equals_the_official_code(key):
    case = CASES[key]
    arrays, settings = arrays_of(case), case["hyperparameters"]
    own = [*arrays["student_low"].unbind(1), arrays["student_high"]]
    theirs = [*arrays["teacher_low"].unbind(1), arrays["teacher_high"]]
    loss = ViTKD(settings["alpha_vitkd"], settings["beta_vitkd"], settings["lambda_vitkd"])
    built(loss, own, theirs)
    load_parameters(loss, arrays)
    own = [feature.clone().requires_grad_() for feature in own]
    parts = call(loss, own, theirs, noise=arrays["noise"])
    parts["feature"].mean().backward()
    mask = loss.mask(arrays["noise"])
    assert torch.equal(mask.float(), arrays["mask"]) and (~mask).sum(1).tolist() == [settings["tokens_kept"]] * len(
        mask
    )
    for name, entry in (("feature", "total"), ("vitkd_mimicking", "mimicking"), ("vitkd_generation", "generation")):
        assert parts[name].shape == (len(mask),)
        assert parts[name].mean().item() == pytest.approx(case["expected"][entry], rel=1e-8)
    low = torch.stack([feature.grad for feature in own[:-1]], dim=1)
    torch.testing.assert_close(low, arrays["grad_student_low"], rtol=1e-8, atol=1e-12)
    torch.testing.assert_close(own[-1].grad, arrays["grad_student_high"], rtol=1e-8, atol=1e-12)
    check_gradients(loss, arrays, "grad.")


def test_every_case_is_used():
    assert {key for name in ("crd", "itrd", "vitkd") for key in cases(name)} == CASES.keys() and len(CASES) == 7


@pytest.mark.parametrize("key", cases("crd"))
def test_crd_in_float32(key):
    case = CASES[key]
    loss, arrays = official_crd(case)
    loss.float()
    parts = call(
        loss, arrays["step1.f_s"].float(), arrays["step1.f_t"].float(), index=arrays["step1.idx"],
        contrast_index=arrays["step1.contrast_idx"],
    )  # fmt: skip
    assert parts["feature"].dtype == torch.float32
    assert parts["feature"].mean().item() == pytest.approx(case["expected"][0]["loss"], rel=1e-5)


# ---- The paper's forms ---------------------------------------------------------------------------------------------


def test_crd_as_in_the_paper():
    """Its critic e^(st/T) / (e^(st/T) + N/M): no Z, no eps."""
    student, teacher = random(3, 4), random(3, 6, seed=1)
    loss = built(CRD(5, 7, 0.2, negatives="all", form="paper"), student, teacher, num_samples=11)
    memories = loss.student_memory.clone(), loss.teacher_memory.clone()
    chosen = torch.randint(11, (3, 8))
    value = call(loss, student, teacher, index=torch.tensor([0, 4, 9]), contrast_index=chosen)["feature"]
    for row in range(3):
        expected = 0.0
        for layer, feature, memory in (
            (loss.student_embedding, student, memories[1]),
            (loss.teacher_embedding, teacher, memories[0]),
        ):
            v = layer(feature[row])
            v = v / v.norm()
            critic = [
                (e := math.exp((v @ memory[i]).item() / loss.nce_t)) / (e + 7 / 11) for i in chosen[row].tolist()
            ]
            expected -= math.log(critic[0]) + sum(math.log(1 - h) for h in critic[1:])
        assert value[row].item() == pytest.approx(expected, rel=1e-12)
    assert not loss.normalisers.any()


def test_itrd_as_in_the_paper():
    """Rényi entropies of order 2, from eigenvalues: S(joint) - S(student)."""
    student, teacher = random(6, 4), random(6, 4, seed=1)
    loss = built(ITRD(beta_corr=0.0, form="paper"), student, teacher)

    def entropy(matrix):
        eigenvalues = torch.linalg.eigvalsh(matrix / matrix.trace())
        return -torch.log2(eigenvalues.square().sum()).item()

    rows = [z / z.norm(dim=1, keepdim=True) for z in (student, teacher)]
    own, theirs = (z @ z.T for z in rows)
    assert call(loss, student, teacher)["feature"].item() == pytest.approx(
        entropy(own * theirs) - entropy(own), rel=1e-12
    )


# ---- CRD: drawing --------------------------------------------------------------------------------------------------


def drawing(num_samples=40, classes=4, **settings):
    labels = torch.arange(num_samples) % classes
    loss = built(CRD(3, **settings), random(1, 4), random(1, 4), num_samples=num_samples, sample_labels=labels)
    return loss, labels


def test_negatives_are_of_other_classes_each_once_and_uniform():
    loss, labels = drawing(nce_k=12)
    index = torch.arange(40)
    counts = torch.zeros(40, 40)
    for _ in range(150):
        drawn = loss.draw(index)
        assert drawn.shape == (40, 13) and torch.equal(drawn[:, 0], index)
        assert (labels[drawn[:, 1:]] != labels[:, None]).all()
        assert (drawn[:, 1:].sort(1).values.diff(dim=1) > 0).all()
        counts.scatter_add_(1, drawn[:, 1:], torch.ones(40, 12))
        loss.calls += 1
    # Each of 30 others is in 12 of 30 draws: 60 of 150, with a deviation of 6.
    frequencies = counts[labels[:, None] != labels[None]]
    assert frequencies.mean() == 60 and abs(frequencies.std().item() - 6) < 0.6
    assert not torch.equal(loss.draw(index[:1]), loss.draw(torch.tensor([4])))  # of one class, another place or sample


def test_negatives_repeat_where_there_are_too_few():
    loss, labels = drawing(nce_k=31)
    drawn = loss.draw(torch.arange(40))[:, 1:]
    assert (labels[drawn] != labels[:, None]).all()
    assert all(len(row.unique()) < 31 for row in drawn)


def test_negatives_of_all_samples_need_no_labels():
    loss = built(CRD(3, 500, negatives="all"), random(1, 4), random(1, 4), num_samples=20)
    assert not loss.needs_sample_labels
    drawn = loss.draw(torch.arange(20))
    counts = drawn[:, 1:].flatten().bincount(minlength=20)
    assert len(counts) == 20 and torch.equal(drawn[:, 0], torch.arange(20))
    assert (counts - 500).abs().max() < 5 * 500**0.5  # the sample itself among them


def test_relaxed_positives_are_of_the_class_and_uniform():
    loss, labels = drawing(nce_k=1, mode="relax")
    counts = torch.zeros(40, 40)
    for _ in range(300):
        positive = loss.draw(torch.arange(40))[:, :1]
        assert torch.equal(labels[positive[:, 0]], labels)
        counts.scatter_add_(1, positive, torch.ones(40, 1))
        loss.calls += 1
    same = counts[labels[:, None] == labels[None]]
    assert same.mean() == 30 and same.min() > 5 and same.max() < 60


def test_samples_without_a_label_are_of_no_class():
    labels = torch.tensor([-100, -100, 0, 0, 0])
    loss = built(CRD(3, 4, mode="relax"), random(1, 4), random(1, 4), num_samples=5, sample_labels=labels)
    drawn = loss.draw(torch.arange(5))
    assert drawn[:2, 0].tolist() == [0, 1]  # their only positive is themselves
    assert {0, 1} >= set(drawn[2:, 1:].flatten().tolist())


def test_draws_in_chunks_are_the_same(monkeypatch):
    loss, _ = drawing(nce_k=5)
    whole = loss.draw(torch.arange(12))
    monkeypatch.setattr("hf_kd.losses.crd._CHUNK", 5 * 40)
    assert torch.equal(loss.draw(torch.arange(12)), whole)


def test_scores_choose_the_cheaper_way_and_agree():
    """In both the memory may change before the backward pass."""
    for entries, length in ((50, 6), (2, 5000)):
        memory, index = random(length, 3), torch.randint(length, (4, entries))
        v = random(4, 3, seed=1).requires_grad_()
        scores = _scores(v, memory, index)
        expected = torch.einsum("bkd,bd->bk", memory[index], v)
        weights = random(4, entries, seed=2)
        wanted = torch.autograd.grad((expected * weights).sum(), v)[0]
        memory.zero_()
        torch.testing.assert_close(scores, expected, rtol=1e-12, atol=1e-14)
        torch.testing.assert_close(torch.autograd.grad((scores * weights).sum(), v)[0], wanted, rtol=1e-12, atol=1e-14)


# ---- CRD: memory ---------------------------------------------------------------------------------------------------


def crd(num_samples=12, **settings):
    labels = torch.arange(num_samples) % 3
    loss = CRD(**{"feat_dim": 4, "nce_k": 5, **settings})
    return built(loss, random(1, 6), random(1, 7), num_samples=num_samples, sample_labels=labels, seed=3)


def test_memories_begin_as_published_and_differ():
    loss = built(CRD(48, 5, negatives="all"), random(1, 6), random(1, 7), num_samples=500)
    for memory in (loss.student_memory, loss.teacher_memory):
        assert memory.abs().max() <= 0.25 and memory.std().item() == pytest.approx(0.25 / 3**0.5, rel=0.02)
    assert not torch.equal(loss.student_memory, loss.teacher_memory)


def test_of_a_sample_that_is_there_twice_the_last_counts():
    student, teacher = random(3, 6), random(3, 7, seed=1)
    assert _last_rows(torch.tensor([5, 2, 5, 0, 2])).tolist() == [2, 4, 2, 3, 4]
    twice, once = crd(), crd()
    call(twice, student, teacher, index=torch.tensor([5, 2, 5]))
    call(once, student[1:], teacher[1:], index=torch.tensor([2, 5]))
    torch.testing.assert_close(twice.student_memory, once.student_memory, rtol=0, atol=1e-15)
    assert not torch.equal(once.student_memory, crd().student_memory)


def test_features_that_are_not_finite_leave_no_trace():
    loss = crd()
    before = loss.student_memory.clone()
    student = random(2, 6)
    student[0, 0] = torch.nan
    value = call(loss, student, random(2, 7, seed=1), index=torch.tensor([1, 2]))["feature"]
    assert value[0].isnan() and loss.student_memory.isfinite().all()
    assert torch.equal(loss.student_memory[1], before[1]) and not torch.equal(loss.student_memory[2], before[2])
    assert loss.normalisers[0] == 0 and loss.normalisers[1] > 0  # the student's direction is to be found yet
    call(loss, random(2, 6), random(2, 7, seed=1), index=torch.tensor([1, 2]))
    assert (loss.normalisers > 0).all()


def test_evaluation_changes_nothing():
    loss = crd()
    arguments = random(2, 6), random(2, 7, seed=1)
    state = copy.deepcopy(loss.eval().state_dict())
    first = call(loss, *arguments, index=torch.tensor([1, 2]))["feature"]
    assert first.isfinite().all()
    for key, value in loss.state_dict().items():
        assert torch.equal(value, state[key]), key
    torch.testing.assert_close(call(loss.train(), *arguments, index=torch.tensor([1, 2]))["feature"], first)


# ---- ITRD and ViTKD ------------------------------------------------------------------------------------------------


def test_itrd_of_a_dead_channel_and_of_a_batch_of_one():
    student, teacher = random(8, 3).requires_grad_(), random(8, 5, seed=1)
    teacher[:, 2] = 0.0  # 0/0 in the official code
    loss = built(ITRD(alpha_it=1.5), student, teacher)
    value = call(loss, student, teacher)["feature"]
    assert value.isfinite() and torch.autograd.grad(value, student)[0].isfinite().all()
    own = loss.embedding(student)
    own, theirs = ((z - z.mean(0)) / z.std(0) for z in (own, teacher))
    distances = ((own * theirs).mean(0) - 1).abs() ** 3
    distances[2] = 1.0
    assert call(loss, student, teacher)["itrd_correlation"].item() == pytest.approx(
        math.log2(distances.sum().item()), rel=1e-12
    )
    with torch.no_grad():
        loss.embedding.weight.zero_()  # and so does a dead channel of the student's
    value = call(loss, student, teacher)["itrd_correlation"]
    assert value.item() == pytest.approx(math.log2(5), rel=1e-12)
    one = call(loss, student[:1], teacher[:1])["feature"]
    assert one.isfinite()
    assert torch.autograd.grad(one, loss.embedding.weight)[0].isfinite().all()


def test_itrd_flattens_maps():
    student, teacher = random(4, 3, 2, 2), random(4, 6, seed=1)
    loss = built(ITRD(), student, teacher)
    assert loss.embedding.weight.shape == (6, 12)
    torch.testing.assert_close(
        call(loss, student, teacher)["feature"], call(loss, student.flatten(1), teacher)["feature"]
    )


def tokens(batch=3, count=9, seed=0):
    own = [random(batch, count, 4, seed=seed + i) for i in range(3)]
    return own, [random(batch, count, 6, seed=seed + 5 + i) for i in range(3)]


def test_vitkd_masks_as_many_tokens_as_it_should_each_time_others():
    own, theirs = tokens()
    loss = built(ViTKD(mask_ratio=0.3), own, theirs)
    masks = []
    for _ in range(40):
        masks.append(loss.mask(loss.draw_noise(own[-1])))
        call(loss, own, theirs)
    masks = torch.stack(masks)
    assert (masks.sum(-1) == 3).all()  # 9 less int(6.3)
    frequencies = masks.flatten(0, 1).float().mean(0)
    assert (frequencies - 1 / 3).abs().max() < 0.16  # 120 draws: a deviation of .043
    assert not torch.equal(masks[0, 0], masks[0, 1]) or not torch.equal(masks[0, 0], masks[0, 2])


def test_vitkd_parameters_begin_as_published():
    own, theirs = tokens()
    loss = built(ViTKD(), own, theirs)
    assert not loss.mask_token.any() and loss.mask_token.shape == (1, 1, 6)
    assert isinstance(loss.align, nn.Linear) and len(loss.align2) == 2
    same = built(ViTKD(), own, own)
    assert {name.split(".")[0] for name, _ in same.named_parameters()} == {"mask_token", "generation"}


# ---- Common to all -------------------------------------------------------------------------------------------------

LOSSES = {
    "crd": lambda: crd(),
    "crd relax": lambda: crd(mode="relax"),
    "crd all": lambda: crd(negatives="all"),
    "itrd": lambda: built(ITRD(), random(1, 6), random(1, 7), seed=3),
    "vitkd": lambda: built(ViTKD(1.0, 1.0), *tokens(), seed=3),
}


def batch(name, step):
    if name == "vitkd":
        return tokens(seed=100 * step)
    return random(3, 6, seed=step), random(3, 7, seed=50 + step)


def run(name, loss, steps):
    """Losses of some training steps with an optimiser, starting from where the loss is."""
    optimizer = torch.optim.SGD(loss.parameters(), lr=0.01)
    values = []
    for step in steps:
        value = call(loss, *batch(name, step), index=torch.tensor([step, step + 3, step + 6]))["feature"].mean()
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        values.append(value.item())
    return values


@pytest.mark.parametrize("name", LOSSES)
def test_a_resumed_run_goes_on_exactly(name, tmp_path):
    whole, first = LOSSES[name](), LOSSES[name]()
    values = run(name, whole, range(5))
    assert run(name, first, range(2)) == values[:2]
    torch.save(first.state_dict(), tmp_path / "loss.pt")
    second = LOSSES[name]()
    torch.manual_seed(99)  # the global random state is of no account
    second.load_state_dict(torch.load(tmp_path / "loss.pt", weights_only=True))
    assert second.calls == 2
    assert run(name, second, range(2, 5)) == values[2:]
    for key, value in whole.state_dict().items():
        assert torch.equal(second.state_dict()[key], value), key


@pytest.mark.parametrize("name", ["crd", "crd relax", "crd all", "vitkd"])
def test_what_is_drawn_depends_on_call_and_seed(name):
    """Without the counter, and with another seed, the resumed run would not be the same."""
    reference, other, late = LOSSES[name](), LOSSES[name](), LOSSES[name]()
    other.seed, late.calls = 4, 1
    values = [
        call(loss.eval(), *batch(name, 0), index=torch.tensor([0, 3, 6]))["feature"].tolist()
        for loss in (reference, other, late)
    ]
    assert values[0] != values[1] and values[0] != values[2]


@pytest.mark.parametrize("name", LOSSES)
def test_building_is_a_matter_of_the_seed_alone(name):
    torch.manual_seed(1)
    first = LOSSES[name]()
    state = torch.get_rng_state()
    torch.manual_seed(2)
    second = LOSSES[name]()
    for key, value in first.state_dict().items():
        assert torch.equal(second.state_dict()[key], value), key
    assert not torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(1)
    assert torch.equal(torch.get_rng_state(), state)  # building drew nothing from it


@pytest.mark.parametrize("name", LOSSES)
def test_the_teacher_gets_no_gradient_and_half_precision_is_computed_in_full(name):
    loss = LOSSES[name]().float()
    own, theirs = batch(name, 0)
    own = [feature.bfloat16().requires_grad_() for feature in (own if isinstance(own, list) else [own])]
    theirs = [feature.bfloat16().requires_grad_() for feature in (theirs if isinstance(theirs, list) else [theirs])]
    reference = copy.deepcopy(loss)
    index = torch.tensor([0, 3, 6])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value = call(loss, own, theirs, index=index)["feature"]
    value.mean().backward()
    assert value.dtype == torch.float32
    assert all(feature.grad.abs().sum() > 0 for feature in own) and all(feature.grad is None for feature in theirs)
    full = call(reference, [f.float() for f in own], [f.float() for f in theirs], index=index)["feature"]
    assert torch.equal(value, full)


@pytest.mark.parametrize("name", LOSSES)
def test_the_gradient_is_that_of_finite_differences(name):
    loss = LOSSES[name]()
    own, theirs = batch(name, 0)
    call(loss, own, theirs, index=torch.tensor([0, 3, 6]))  # CRD's Z is a constant from its first batch on
    loss.eval()
    own = [feature.requires_grad_() for feature in (own if isinstance(own, list) else [own])]
    assert torch.autograd.gradcheck(
        lambda *student: call(loss, list(student), theirs, index=torch.tensor([0, 3, 6]))["feature"], own
    )


# ---- Names and refusals --------------------------------------------------------------------------------------------


@pytest.fixture
def registry():
    """The registry, put back as it was."""
    before = dict(FEATURE_LOSSES)
    yield FEATURE_LOSSES
    FEATURE_LOSSES.clear()
    FEATURE_LOSSES.update(before)


def test_losses_are_built_by_name():
    loss = build_feature_loss("itrd", alpha_it=1.5, beta_mi=0.0, student_features="layer3")
    assert isinstance(loss, ITRD) and (loss.alpha_it, loss.beta_mi) == (1.5, 0.0)
    assert (loss.student_features, loss.teacher_features) == (("layer3",), ("pre_logits",))
    assert "alpha_it=1.5" in repr(loss) and not loss.needs_index
    crd = build_feature_loss("crd")
    assert crd.needs_index and crd.needs_sample_labels and not crd.needs_labels
    assert (crd.feat_dim, crd.nce_k, crd.nce_m, crd.mode) == (128, 16384, 0.5, "exact")
    vitkd = build_feature_loss("vitkd", student_features=["layers.0@patches", "layernorm@patches"],
                               teacher_features=["blocks.0@patches", "norm@patches"])  # fmt: skip
    assert (vitkd.alpha, vitkd.beta, vitkd.mask_ratio) == (3e-5, 3e-6, 0.5)
    assert build_feature_loss("vitkd").teacher_features == ("blocks.0@patches", "blocks.1@patches", "norm@patches")


def test_an_own_loss_is_found_by_name(registry):
    @register_feature_loss("distance")
    class Distance(FeatureLoss):
        def create(self, student_shapes, teacher_shapes, *, num_samples, sample_labels):
            self.scale = nn.Parameter(torch.ones(()))

        def compute(self, student, teacher, labels, index, **given):
            return {"feature": self.scale * (student[0] - teacher[0]).square().mean(dim=1)}

    loss = built(build_feature_loss("distance"), random(2, 3), random(2, 3))
    assert call(loss, torch.ones(2, 3), torch.zeros(2, 3))["feature"].tolist() == [1.0, 1.0]
    with pytest.raises(ValueError, match="named 'distance' is registered already"):
        register_feature_loss("distance")(Distance)
    assert check_feature_loss_name("distance") == "distance"


REFUSED = {
    "Unknown `feature_loss` 'crdd'; it must be one of crd, itrd, vitkd. Did you mean 'crd'?": ("crdd", {}),
    "The feature loss 'crd' takes feat_dim, nce_k, nce_t, nce_m, mode, negatives, form, student_features, "
    "teacher_features, not nce: correct `feature_loss_kwargs`.": ("crd", {"nce": 1}),
    "`nce_k` must be a whole number of at least 1, got 0.": ("crd", {"nce_k": 0}),
    "`feat_dim` must be a whole number of at least 1, got 2.5.": ("crd", {"feat_dim": 2.5}),
    "`nce_t` must be a positive number, got -1.": ("crd", {"nce_t": -1}),
    "`nce_m` must be in [0, 1), got 1.0: at 1 the memory would never change.": ("crd", {"nce_m": 1.0}),
    "`mode` must be one of 'exact', 'relax', got 'x'.": ("crd", {"mode": "x"}),
    "`negatives` must be one of 'other_classes', 'all', got 'x'.": ("crd", {"negatives": "x"}),
    "`form` must be one of 'code', 'paper', got 'x'.": ("itrd", {"form": "x"}),
    "`alpha_it` must be a positive number, got 0.": ("itrd", {"alpha_it": 0}),
    "`beta_mi` must be a positive number, got -1.": ("itrd", {"beta_mi": -1}),
    "`mask_ratio` must be in (0, 1), got 1.0: some tokens stay, and some do not.": ("vitkd", {"mask_ratio": 1.0}),
    "ITRD compares one feature of each network, got the student's a, b and the teacher's pre_logits.": (
        "itrd", {"student_features": ["a", "b"]}
    ),
    "ViTKD compares features in pairs, 2 or more of each network, got the student's a and the teacher's a.": (
        "vitkd", {"student_features": ["a"], "teacher_features": "a"}
    ),
    "ViTKD compares features in pairs, 2 or more of each network, got the student's a, b and the teacher's "
    "blocks.0@patches, blocks.1@patches, norm@patches.": ("vitkd", {"student_features": ["a", "b"]}),
}  # fmt: skip


@pytest.mark.parametrize("sentence", REFUSED)
def test_what_cannot_be_built_is_refused(sentence):
    name, arguments = REFUSED[sentence]
    with pytest.raises(ValueError, match=f"^{re.escape(sentence)}$"):
        build_feature_loss(name, **arguments)


def test_sizes_that_do_not_fit_are_refused():
    own, _ = tokens()
    with pytest.raises(ValueError, match="as many of both networks, got the shapes \\(3, 9, 4\\) .* \\(3, 16, 6\\)"):
        built(ViTKD(), own, tokens(count=16)[1])
    with pytest.raises(ValueError, match="ViTKD compares tokens"):
        built(ViTKD(), [random(2, 3)] * 3, [random(2, 3)] * 3)
    with pytest.raises(ValueError, match="a square image, and there are 8: leave out"):
        built(ViTKD(), *tokens(count=8))
    with pytest.raises(ValueError, match="needs their number, `num_samples`, got None"):
        built(CRD(), random(1, 3), random(1, 3))
    with pytest.raises(ValueError, match='needs the class of every training sample .* negatives="all"'):
        built(CRD(), random(1, 3), random(1, 3), num_samples=4)
    with pytest.raises(ValueError, match='all 4 training samples are of one class: set negatives="all"'):
        built(CRD(), random(1, 3), random(1, 3), num_samples=4, sample_labels=[1, 1, 1, 1])
    with pytest.raises(ValueError, match="one class for each of the 4 training samples, got the shape \\(3,\\)"):
        built(CRD(), random(1, 3), random(1, 3), num_samples=4, sample_labels=[1, 1, 1])
    loss = LOSSES["itrd"]()
    with pytest.raises(RuntimeError, match="ITRD is built already"):
        built(loss, random(1, 6), random(1, 7))


def test_batches_that_lack_something_are_refused():
    with pytest.raises(RuntimeError, match="ITRD has no parameters yet: call build"):
        call(ITRD(), random(2, 3), random(2, 3))
    loss = crd()
    with pytest.raises(ValueError, match="CRD needs the `index` of each sample, its number in the training set, and"):
        call(loss, random(2, 6), random(2, 7))
    with pytest.raises(ValueError, match="from 0 to 11, the last of the training samples .*, got 3 to 12"):
        call(loss, random(2, 6), random(2, 7), index=torch.tensor([3, 12]))
    with pytest.raises(ValueError, match="one whole number for each of the 2 samples, got torch.int64 of shape \\(3,"):
        call(loss, random(2, 6), random(2, 7), index=torch.tensor([1, 2, 3]))
    with pytest.raises(ValueError, match="The student's features must include pre_logits, got layer3"):
        loss({"layer3": random(2, 6)}, {"pre_logits": random(2, 7)}, index=torch.tensor([1, 2]))
    loss.needs_labels = True
    with pytest.raises(ValueError, match="CRD needs the labels of each batch, and this one has none"):
        call(loss, random(2, 6), random(2, 7), index=torch.tensor([1, 2]))
