"""Every row of the paper's tables has its YAML file, with the paper's figures as they are written out here again."""

import shutil
from pathlib import Path

import timm
import yaml

import hf_kd.models.cifar  # noqa: F401 - registers the networks


ROOT = Path(__file__).parents[2]
CIFAR = ROOT / "recipes" / "configs" / "cifar100"

# What the paper prints, transcribed by tables and columns (the repository's table is by pairs). gamma, beta of TTM,
# WTTM, WTTM + CRD, WTTM + ITRD; gamma of WTTM without labels.
HYPERPARAMETERS = """
wrn_40_2   wrn_16_2     | .1 101 | .1 4    | .1 4   | .3 6    | .2
wrn_40_2   wrn_40_1     | .1 76  | .1 3    | .1 2   | .4 .08  | .5
resnet56   resnet20     | .3 7   | .3 1.5  | .3 .6  | .5 5    | .6
resnet110  resnet20     | .2 8   | .2 2    | .2 1.4 | .3 1.5  | .4
resnet110  resnet32     | .1 33  | .1 1.5  | .2 1   | .3 .015 | .4
resnet32x4 resnet8x4    | .1 100 | .1 3    | .2 4   | .1 1.5  | .5
vgg13      vgg8         | .1 45  | .1 2.25 | .2 4   | .1 .5   | .2
vgg13      mobilenetv2  | .2 16  | .2 3    | .3 4.2 | .3 .03  |
resnet50   mobilenetv2  | .2 20  | .2 5    | .3 3   | .2 .02  |
resnet50   vgg8         | .1 70  | .1 2    | .1 3   | .1 1    |
resnet32x4 shufflenetv1 | .2 12  | .2 1.4  | .2 .4  | .3 .6   |
resnet32x4 shufflenetv2 | .4 40  | .4 16   | .4 12  | .4 .8   |
wrn_40_2   shufflenetv1 | .3 8   | .3 3    | .2 .16 | .1 .2   |
"""
# Top-1 in the order of those lines: the 7 pairs of one architecture, then the 6 of different ones.
TOP1 = """
teacher        75.61 75.61 72.34 74.31 74.31 79.42 74.64  74.64 79.34 79.34 79.42 79.42 75.61
ce             73.26 71.98 69.06 69.06 71.14 72.50 70.36  64.6  64.6  70.36 70.5  71.82 70.5
kd             74.92 73.54 70.66 70.67 73.08 73.33 72.98  67.37 67.35 73.81 74.07 74.45 74.83
dist           75.51 74.73 71.75 71.65 73.69 76.31 73.89  68.50 68.66 74.11 76.34 77.35 76.40
dkd            76.24 74.81 71.97 n/a   74.11 76.32 74.68  69.71 70.35 n/a   76.45 77.07 76.70
crd            75.48 74.14 71.16 71.46 73.48 75.51 73.94  69.73 69.11 74.30 75.11 75.65 76.05
itrd           76.12 75.18 71.47 71.99 74.26 76.19 74.93  70.39 71.41 75.71 76.91 77.40 77.35
ttm            76.23 74.32 71.83 71.46 73.97 76.17 74.33  68.98 69.24 74.87 74.18 76.57 75.39
wttm           76.37 74.58 71.92 71.67 74.13 76.06 74.44  69.16 69.59 74.82 74.37 76.55 75.42
wttm_crd       76.61 74.94 72.20 72.13 74.52 76.65 74.71  70.30 70.84 75.30 75.82 77.04 76.86
wttm_itrd      76.65 75.34 72.16 72.20 74.36 77.36 75.13  70.70 71.56 76.00 77.03 77.68 77.44
wttm_no_labels 75.11 73.16 70.95 70.71 73.21 72.94 74.04  n/a   n/a   n/a   n/a   n/a   n/a
"""
STD = """
ttm            .15 .31 .16 .16 .23 .28 .07  .85 .28 .18 .26 .26 .33
wttm           .10 .26 .40 .28 .37 .27 .19  .20 .58 .28 .39 .08 .34
wttm_crd       .24 .35 .15 .12 .29 .14 .07  .68 .56 .42 .16 .19 .37
wttm_itrd      .33 .22 .28 .27 .31 .13 .16  .45 .15 .17 .26 .26 .27
"""
# DKD's weight of the other classes, from its authors' configurations (megvii-research/mdistiller, 8 where they are
# silent), and ITRD's order of the correlation and weight of the mutual term.
DKD = "6 6 2 - 2 8 6  6 8 - 8 8 8"
ALPHA_IT = "1.01 1.01 1.01 1.01 1.01 1.01 1.01  1.5 1.5 1.5 1.5 1.5 1.5"
BETA_MI = "1 1 1 1 1 1 1  1 0 0 1 1 0"


def columns(text):
    """{"ttm": ["76.23", ...], ...}"""
    return {line.split()[0]: line.split()[1:] for line in text.strip().splitlines()}


def cells():
    """(pair's name, its number, method) for each figure that the paper prints of a student."""
    lines = HYPERPARAMETERS.strip().splitlines()
    pairs = ["_".join(line.split("|")[0].split()) for line in lines]
    for method, figures in columns(TOP1).items():
        assert len(figures) == len(pairs) == 13
        for number, (pair, figure) in enumerate(zip(pairs, figures, strict=True)):
            if method != "teacher" and figure != "n/a":
                yield pair, number, method


def expected(number, method):
    """The fields that the row's YAML file should have, and no others."""
    line = HYPERPARAMETERS.strip().splitlines()[number]
    teacher, student = line.split("|")[0].split()
    fields = {"student": f"cifar_{student}", "paper_top1": float(columns(TOP1)[method][number])}
    if method != "ce":
        fields["teacher"] = f"cifar_{teacher}"
    if method in columns(STD):
        fields["paper_top1_std"] = float(columns(STD)[method][number])
    if student in ("mobilenetv2", "shufflenetv1", "shufflenetv2"):
        fields["learning_rate"] = 0.01
    order = ["ttm", "wttm", "wttm_crd", "wttm_itrd", "wttm_no_labels"]
    if method in order:
        values = [float(value) for value in line.split("|")[1:][order.index(method)].split()]
        fields |= {"loss": method.partition("_")[0], "gamma": values[0], "beta": values[1] if values[1:] else 1}
    if method == "wttm_no_labels":
        fields["ce_weight"] = 0
    if method == "kd":
        fields |= {"loss": "kd", "temperature": 4, "beta": 0.9, "ce_weight": 0.1}
    if method == "dist":
        fields |= {"loss": "dist", "temperature": 4, "beta": 1, "loss_kwargs": {"beta": 1, "gamma": 1}}
    if method == "dkd":
        kwargs = {"alpha": 1, "beta": float(DKD.split()[number]), "warmup_epochs": 20}
        fields |= {"loss": "dkd", "temperature": 4, "beta": 1, "loss_kwargs": kwargs}
    if method in ("ce", "crd", "itrd"):
        fields["loss"] = "ce"
    if method.endswith("crd"):
        kwargs = {"feat_dim": 128, "nce_k": 16384, "nce_t": 0.07, "nce_m": 0.5}
        fields |= {"feature_loss": "crd", "feature_weight": 0.8, "feature_loss_kwargs": kwargs}
    if method.endswith("itrd"):
        alpha_it, beta_mi = (float(text.split()[number]) for text in (ALPHA_IT, BETA_MI))
        kwargs = {"alpha_it": alpha_it, "beta_corr": 2, "beta_mi": beta_mi}
        fields |= {"feature_loss": "itrd", "feature_weight": 1, "feature_loss_kwargs": kwargs}
    return fields


DEIT = {
    "kd": "76.01", "vitkd": "76.06", "nkd": "76.68", "wttm": "77.03", "nkd_vitkd": "77.78", "wttm_vitkd": "78.04",
}  # fmt: skip


def test_every_cell_has_a_file_and_every_file_a_cell():
    files = {path.relative_to(CIFAR).with_suffix("").as_posix() for path in CIFAR.rglob("*.yaml")}
    assert files == {f"{pair}/{method}" for pair, _, method in cells()}
    assert len(files) == 13 * 10 + 7 - 2 == 135


def test_every_file_says_what_the_paper_prints():
    for pair, number, method in cells():
        assert yaml.safe_load((CIFAR / pair / f"{method}.yaml").read_text()) == expected(number, method), (
            pair,
            method,
        )


def test_every_file_says_in_words_whose_figures_it_quotes():
    for pair, number, method in cells():
        head = (CIFAR / pair / f"{method}.yaml").read_text().splitlines()
        top1, std = (columns(text).get(method) for text in (TOP1, STD))
        figure = f"{float(top1[number]):.2f}" + (f" ± {float(std[number]):.2f}" if std else "")
        assert head[0].startswith("# CIFAR-100: ") and head[1].startswith(
            f"# The paper's figures (arXiv 2402.11148), not measured with this code: {figure} % top-1"
        )
        assert f"teacher {float(columns(TOP1)['teacher'][number]):.2f} %" in head[1]
        assert f"student alone {float(columns(TOP1)['ce'][number]):.2f} %" in head[1]
        assert head[2].startswith("# Settings: ")
        assert ("assumed" in head[2]) == (method in ("dist", "itrd"))


def test_every_file_is_a_configuration_of_networks_that_there_are():
    from cifar100_wttm import PUBLISHED, RECIPE, CifarArguments
    from common import merge

    from hf_kd import DistillationConfig

    parser = RECIPE.parser()
    for pair, number, method in cells():
        values = merge(parser.own_defaults, parser.read_yaml(CIFAR / pair / f"{method}.yaml"))
        arguments = parser.build(CifarArguments, values)
        config = parser.build(DistillationConfig, {**values, "use_cpu": True})
        wanted = expected(number, method)
        assert timm.is_model(arguments.student) and arguments.total_batch_size == 64
        assert config.uses_teacher == (method != "ce")
        if config.uses_teacher:
            assert arguments.teacher in PUBLISHED
        if method != "ce":
            assert config.uses_logits == (method not in ("crd", "itrd"))
        assert config.gamma == wanted.get("gamma", 0.25 if config.uses_logits else config.gamma)
        assert config.beta == wanted.get("beta", 1)
        assert config.ce_weight == wanted.get("ce_weight", 1)
        assert config.learning_rate == wanted.get("learning_rate", 0.05)
        assert (config.momentum, config.weight_decay, config.decay_all_parameters) == (0.9, 5e-4, True)
        assert (config.num_train_epochs, config.lr_milestones, config.lr_decay) == (240, [150, 180, 210], 0.1)
        assert config.max_grad_norm == 0 and config.nesterov is False


def test_what_is_written_is_up_to_date():
    from make_configs import differing, texts

    assert differing(texts()) == {}


def test_check_lists_what_differs_and_writing_mends_it(tmp_path, monkeypatch, capsys):
    import make_configs
    import table

    folder = tmp_path / "recipes"
    shutil.copytree(ROOT / "recipes" / "configs", folder / "configs")
    shutil.copy(ROOT / "recipes" / "README.md", folder)
    monkeypatch.setattr(table, "CONFIGS", folder / "configs")
    monkeypatch.setattr(make_configs, "HERE", folder)
    monkeypatch.setattr(make_configs, "README", folder / "README.md")

    def run(*options):
        try:
            make_configs.main(options)
        except SystemExit as stopped:
            return stopped.code, capsys.readouterr().out.splitlines()
        return 0, capsys.readouterr().out.splitlines()

    assert run("--check") == (0, [])
    row = folder / "configs" / "cifar100" / "vgg13_vgg8" / "wttm.yaml"
    text = row.read_text()
    row.write_text(text.replace("beta: 2.25", "beta: 2.5"))
    row.with_name("ce.yaml").unlink()
    own = folder / "configs" / "imagenet" / "own.yaml"
    own.write_text("student: resnet18\n")
    assert run("--check") == (1, [
        "recipes/configs/cifar100/vgg13_vgg8/ce.yaml: missing",
        "recipes/configs/cifar100/vgg13_vgg8/wttm.yaml: differs",
        "recipes/configs/imagenet/own.yaml: no row",
    ])  # fmt: skip
    assert row.read_text() != text
    assert run()[0] == 0 and row.read_text() == text
    # What somebody wrote is theirs to remove.
    assert own.exists()
    own.unlink()
    assert run("--check") == (0, [])


def test_the_page_lists_every_row_with_what_was_measured(monkeypatch, tmp_path):
    import make_configs
    import table

    page = (ROOT / "recipes" / "README.md").read_text()
    for pair, number, method in cells():
        (line,) = [line for line in page.splitlines() if f"](configs/cifar100/{pair}/{method}.yaml)" in line]
        assert line.split("|")[3].strip().split(" ± ")[0] == f"{float(columns(TOP1)[method][number]):.2f}"
    assert {path.stem for path in (ROOT / "recipes" / "configs" / "deit").glob("*.yaml")} == DEIT.keys()
    for name, top1 in DEIT.items():
        (line,) = [line for line in page.splitlines() if f"](configs/deit/{name}.yaml)" in line]
        assert line.split("|")[3].strip() == top1
    (tmp_path / "measured.yaml").write_text("deit/wttm: {top1: 77.1, runs: 1}\n")
    monkeypatch.setattr(table, "MEASURED", tmp_path / "measured.yaml")
    assert "| [WTTM](configs/deit/wttm.yaml) | γ = 0.8, β = 1.6 | 77.03 | 77.10 (n = 1) |" in make_configs.page(
        table.read_table()
    )
