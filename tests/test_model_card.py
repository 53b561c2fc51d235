"""The model card: what it says of a run, what it leaves out, and that its code examples run."""

import copy
import re

import pytest
import timm
import torch
from huggingface_hub import EvalResult, ModelCard
from PIL import Image
from tiny import ConvNet, Images, config
from torch.utils.data import IterableDataset
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    ResNetConfig,
    ResNetForImageClassification,
    TrainerCallback,
    ViTImageProcessor,
)

from hf_kd import DistillationTrainer, Teacher, create_student, save_student
from hf_kd.losses import wttm_loss
from hf_kd.model_card import BEGIN, END, StudentCard, describe_machine, describe_training


LABELS = ["cat", "dog", "owl", "newt"]


def tiny_student(**options):
    return create_student("test_resnet", label_names=LABELS, img_size=32, **options)


def tiny_teacher():
    teacher = timm.create_model("test_resnet", num_classes=4)
    teacher.pretrained_cfg["input_size"] = (3, 32, 32)
    return teacher


def train(folder, student=None, teacher=None, trainer_class=DistillationTrainer, train=True, trainer=None, **options):
    """A trainer that has trained for an epoch of two steps, on four classes."""
    options = {"eval_strategy": "epoch", "per_device_train_batch_size": 16, "teacher_preflight": True, **options}
    trainer = trainer_class(
        tiny_student() if student is None else student,
        tiny_teacher() if teacher is None and options.get("loss") != "ce" else teacher,
        config(folder, **options),
        train_dataset=Images(classes=4, size=32),
        eval_dataset=Images(count=20, classes=4, size=32, seed=1),
        **(trainer or {}),
    )
    if train:
        trainer.train()
    return trainer


class StopAfter(TrainerCallback):
    """Stops training after so many steps."""

    def __init__(self, steps):
        self.steps = steps

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step >= self.steps


def read(path):
    card = ModelCard.load(path)
    return card.data, card.text


def section(text, title):
    """The text under a heading."""
    found = re.search(rf"^## {title}\n(.*?)(?=^## |{END})", text, re.MULTILINE | re.DOTALL)
    return found.group(1) if found else None


def table_of(text):
    """Rows of the results, by name, as dicts of cells by column."""
    lines = [line.strip("|").split("|") for line in section(text, "Results").splitlines() if line.startswith("|")]
    header, _, *rows = [[cell.strip() for cell in line] for line in lines]
    return {row[0]: dict(zip(header[1:], row[1:], strict=True)) for row in rows}


def code_of(text):
    return re.findall(r"```python\n(.*?)```", text, re.DOTALL)


# ---- A run ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A finished run, saved with its card."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("secret_machine_path") / "owl-student"
    trainer = train(folder, beta="auto", weight_decay=1e-4, warmup_steps=1, seed=7, lr_milestones=[0.5])
    trainer.args.hub_token = "hf_secret"
    trainer.save_model()
    trainer.create_model_card(
        license="apache-2.0",
        tags="animals",
        finetuned_from="timm/test_resnet.r160_in1k",
        dataset_tags="owner/animals",
        dataset="Four animals",
        dataset_args="small",
        language="en",
    )
    return trainer, folder


def test_metadata_of_a_run(run):
    folder = run[1]
    data, _ = read(folder / "README.md")
    assert data.library_name == "timm"
    assert data.pipeline_tag == "image-classification"
    assert data.tags == ["knowledge-distillation", "wttm", "timm", "hf_kd", "animals"]
    assert data.license == "apache-2.0"
    assert data.datasets == ["owner/animals"]
    assert data.metrics == ["accuracy"]
    assert data.base_model == "timm/test_resnet.r160_in1k"
    assert data.language == "en"
    assert data.model_name == "owl-student"


def test_results_come_back_from_the_model_index(run):
    trainer, folder = run
    data, _ = read(folder / "README.md")
    evaluation = [entry for entry in trainer.state.log_history if "eval_top1" in entry][-1]
    common = {
        "task_type": "image-classification",
        "dataset_type": "owner/animals",
        "dataset_name": "Four animals",
        "dataset_config": "small",
    }
    assert data.eval_results == [
        EvalResult(**common, metric_type=kind, metric_name=name, metric_value=round(evaluation[key], 6))
        for key, kind, name in (
            ("eval_top1", "accuracy", "Top-1"),
            ("eval_nll", "nll", "Negative log-likelihood"),
            ("eval_ece", "ece", "Expected calibration error"),
        )
    ]


def test_text_of_a_run(run):
    trainer, folder = run
    _, text = read(folder / "README.md")
    provenance = trainer.provenance()
    evaluation = [entry for entry in trainer.state.log_history if "eval_top1" in entry][-1]
    assert f"`test_resnet` with {provenance['student']['parameters']:,} parameters and 4 classes" in text
    assert "Classes: cat, dog, owl, newt." in text

    results = table_of(text)
    assert results["these weights"]["Top-1 (%)"] == f"{100 * evaluation['eval_top1']:.2f}"
    assert results["these weights"]["NLL (nats)"] == f"{evaluation['eval_nll']:.4f}"
    assert results["teacher"]["Top-1 (%)"] == f"{100 * trainer.teacher_top1:.2f}"
    # One of five guesses among four classes is always right.
    assert "Top-5 (%)" not in results["teacher"]
    assert "On the evaluation data (20 samples); one run:" in text

    training = section(text, "Training")
    assert f"**Teacher.** `{trainer.teacher.name}`" in training
    assert f"top-1 on the evaluation data {100 * trainer.teacher_top1:.2f} %." in training
    assert f"`CE + {trainer.beta:.4g} · U · D(p_T ‖ q)`" in training
    assert "- γ (gamma): 0.8, which is temperature T = 1.25\n" in training
    assert f'- β (beta): {trainer.beta:.4g}, measured (`beta="auto"`: KD\'s balance at λ = 0.9)\n' in training
    assert "- weight of the labels (ce_weight): 1\n" in training
    linked = "[owner/animals](https://huggingface.co/datasets/owner/animals)"
    assert f"**Data.** Four animals ({linked}): 24 training samples.\n" in training
    for line in (
        "| Length | 1 epoch (2 steps) |",
        "| Batch size | 16 |",
        "| Optimiser | SGD (momentum=0.9) |",
        "| Learning rate | 0.05; × 0.1 at epochs 0.5, warm-up of 1 step |",
        "| Weight decay | 0.0001, not on biases and normalisation layers |",
        "| Precision | fp32 |",
        "| Seed | 7 |",
    ):
        assert line in training
    environment = section(text, "Environment")
    for name, version in provenance["versions"].items():
        assert f"{name} {version}" in environment
    assert describe_machine("cpu") in environment
    assert "`apache-2.0`." in section(text, "Licence")
    assert "2402.11148" in section(text, "Citation") and "Yang, En-Hui" in section(text, "Citation")


def test_nothing_of_the_machine_or_the_account_gets_into_the_card(run):
    folder = run[1]
    card = (folder / "README.md").read_text()
    assert "hf_secret" not in card
    assert "secret_machine_path" not in card
    assert str(folder.parent) not in card


@pytest.mark.parametrize("channels", [3, 1])
def test_the_code_examples_run(tmp_path, monkeypatch, capsys, channels):
    student = tiny_student(in_chans=channels).eval()
    save_student(student, tmp_path / "small student")
    StudentCard.from_folder(tmp_path / "small student").save(tmp_path / "small student")
    picture = Image.effect_noise((48, 40), 80.0)
    picture.save(tmp_path / "picture.png")
    in_timm, in_transformers = code_of((tmp_path / "small student" / "README.md").read_text())
    monkeypatch.chdir(tmp_path)
    for code in (in_timm, in_transformers):
        names = {}
        exec(code, names)
        with torch.inference_mode():
            transform = timm.data.create_transform(**timm.data.resolve_model_data_config(student.timm_model))
            image = picture.convert("L" if channels == 1 else "RGB")
            expected = student(transform(image).unsqueeze(0)).logits.softmax(dim=-1)
        torch.testing.assert_close(names["probabilities"], expected)
        label, confidence = capsys.readouterr().out.split()
        assert label == LABELS[int(expected.argmax())]
        assert float(confidence) == pytest.approx(float(expected.max()), abs=1e-6)


def test_the_code_examples_of_a_published_student_name_its_repository():
    text = StudentCard(repo_id="owner/owl", folder="anything").render()
    in_timm, in_transformers = code_of(text)
    assert 'timm.create_model("hf-hub:owner/owl", pretrained=True)' in in_timm
    assert 'AutoModelForImageClassification.from_pretrained("owner/owl")' in in_transformers
    assert "anything" not in text


# ---- Other students, teachers and losses ---------------------------------------------------------------------------


def test_a_student_on_labels_alone_claims_no_distillation(tmp_path):
    trainer = train(tmp_path / "plain", loss="ce")
    card = StudentCard.from_trainer(trainer)
    text = card.render()
    assert card.metadata.tags == ["timm", "hf_kd"]
    assert "trained on labels, without a teacher, by hf_kd" in text
    assert "Teacher" not in text and "gamma" not in text and "Citation" not in text
    assert list(table_of(text)) == ["these weights"]


def test_a_transformers_student(tmp_path, monkeypatch):
    network = ResNetForImageClassification(
        ResNetConfig(
            embedding_size=4, hidden_sizes=[4], depths=[1], layer_type="basic", id2label=dict(enumerate(LABELS))
        )
    )
    processor = ViTImageProcessor(size={"height": 32, "width": 32})
    trainer = train(tmp_path / "native", network, copy.deepcopy(network), trainer={"processing_class": processor})
    trainer.save_model()
    trainer.create_model_card()
    data, text = read(tmp_path / "native" / "README.md")
    assert data.library_name == "transformers"
    assert data.pipeline_tag == "image-classification"
    assert data.tags == ["knowledge-distillation", "wttm", "hf_kd"]
    assert "base_model" not in data.to_dict()
    assert "Classes: cat, dog, owl, newt." in text
    (code,) = code_of(text)
    picture = Image.effect_noise((48, 40), 80.0).convert("RGB")
    picture.save(tmp_path / "picture.png")
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(code, names)
    with torch.inference_mode():
        expected = network.eval()(**processor(picture, return_tensors="pt")).logits.softmax(dim=-1)
    torch.testing.assert_close(names["probabilities"], expected)

    # Without a processor in the folder there is nothing that would prepare the picture.
    StudentCard.from_folder(tmp_path / "native", has_processor=False).save(tmp_path / "native")
    (code,) = code_of((tmp_path / "native" / "README.md").read_text())
    assert "Processor" not in code
    exec(code, names)
    assert type(names["model"]).__name__ == "ResNetForImageClassification"


def test_a_text_student_has_no_image_task(tmp_path, monkeypatch):
    network = BertForSequenceClassification(
        BertConfig(vocab_size=9, hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8)
    )
    network.save_pretrained(tmp_path / "bert")
    card = StudentCard.from_folder(tmp_path / "bert")
    assert card.metadata.pipeline_tag is None
    assert StudentCard.from_folder(tmp_path / "bert", pipeline_tag=["text-classification"]).metadata.pipeline_tag == (
        "text-classification"
    )
    monkeypatch.chdir(tmp_path)
    (code,) = code_of(card.render())
    names = {}
    exec(code, names)
    assert isinstance(names["model"], BertForSequenceClassification)


def test_a_plain_module_is_weights_alone(tmp_path, monkeypatch):
    network = ConvNet(classes=4)
    trainer = DistillationTrainer(
        network, ConvNet(classes=4), config(tmp_path / "plain"), train_dataset=Images(classes=4)
    )
    trainer.train()
    trainer.save_model()
    trainer.create_model_card()
    data, text = read(tmp_path / "plain" / "README.md")
    assert "library_name" not in data.to_dict() and data.pipeline_tag is None
    assert "timm" not in data.tags
    monkeypatch.chdir(tmp_path)
    (code,) = code_of(text)
    names = {}
    exec(code, names)
    network.load_state_dict(names["weights"])


def test_a_class_that_transformers_does_not_have_gets_no_code_example(tmp_path):
    (tmp_path / "config.json").write_text('{"architectures": ["MineForImageClassification"], "id2label": {"0": "a"}}')
    text = StudentCard.from_folder(tmp_path).render()
    assert "Classes: a." in text
    assert section(text, "Use") is None and not code_of(text)


def test_a_loss_of_ones_own_is_not_called_wttm(tmp_path):
    class Matching(DistillationTrainer):
        _tag_names = [*DistillationTrainer._tag_names, "matching"]

        def compute_distillation_loss(self, student_outputs, teacher_outputs, inputs):
            return (student_outputs.logits - teacher_outputs.logits).pow(2).mean(dim=-1)

    overridden = StudentCard.from_trainer(train(tmp_path / "a", trainer_class=Matching, beta=2.0))
    assert "with the loss of `Matching` by" in overridden.render()
    assert overridden.metadata.tags == ["knowledge-distillation", "timm", "hf_kd", "matching"]
    function = StudentCard.from_trainer(
        train(tmp_path / "b", trainer={"distillation_loss": lambda s, t: wttm_loss(s, t, gamma=0.5)})
    )
    for text in (overridden.render(), function.render()):
        assert "WTTM" not in text and "gamma" not in text and "Citation" not in text
    assert "- β (beta): 2\n" in overridden.render()


def test_kd_cites_its_own_paper():
    provenance = {"teacher": {"id": "t", "top1": None}, "loss": "kd", "gamma": 0.25, "temperature": 4.0,
                  "beta": 0.9, "beta_setting": 0.9, "ce_weight": 0.1}  # fmt: skip
    text = StudentCard(provenance=provenance).render()
    assert "`0.1 · CE + 0.9 · T² · D(p_T ‖ q_T)`" in text
    assert "1503.02531" in text and "2402.11148" not in text
    # Without labels there is no term for them.
    text = StudentCard(provenance={**provenance, "ce_weight": 0.0}).render()
    assert "`0.9 · T² · D(p_T ‖ q_T)`" in text
    assert "0: labels were not used" in text


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("/home/me/runs/teacher-3f", "`teacher-3f`"),
        ("local-dir:/home/me/runs/teacher-3f", "`teacher-3f`"),
        (r"C:\Users\me\teacher", "`teacher`"),
        ("C:/teacher", "`teacher`"),
        ("~/teacher", "`teacher`"),
        ("resnet34.tv_in1k", "`resnet34.tv_in1k`"),
        ("hf-hub:owner/name@abc123", "[owner/name@abc123](https://huggingface.co/owner/name/tree/abc123)"),
        ("owner/name", "[owner/name](https://huggingface.co/owner/name)"),
        ("/a/b/one + owner/two", "`one` + [owner/two](https://huggingface.co/owner/two)"),
    ],
)
def test_teachers_are_named_without_paths(name, shown):
    text = StudentCard(provenance={"teacher": {"id": name, "top1": None}, "loss": "wttm"}).render()
    assert f"**Teacher.** {shown}.\n" in text


def test_local_folders_are_no_hub_ids(tmp_path, monkeypatch):
    (tmp_path / "data" / "animals").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    for path in (str(tmp_path / "data" / "animals"), "data/animals", "./data/animals"):
        card = StudentCard(dataset=path, base_model=path, metrics={"top1": 0.5}, provenance={"loss": "ce"})
        metadata = card.metadata
        assert metadata.datasets is None and metadata.base_model is None
        assert metadata.eval_results[0].dataset_type == "animals"
        assert "**Data.** animals.\n" in card.render()


# ---- Which evaluation ----------------------------------------------------------------------------------------------


def test_the_best_evaluation_is_reported_when_its_weights_were_loaded(tmp_path):
    trainer = train(
        tmp_path / "best",
        num_train_epochs=4,
        save_strategy="epoch",
        load_best_model_at_end=True,
        metric_for_best_model="nll",
        greater_is_better=True,  # the worst: not by chance the last
        learning_rate=1e-3,
    )
    evaluations = [entry for entry in trainer.state.log_history if "eval_nll" in entry]
    chosen = max(evaluations, key=lambda entry: entry["eval_nll"])
    assert chosen is not evaluations[-1]
    card = StudentCard.from_trainer(trainer)
    assert card.metrics["nll"] == chosen["eval_nll"]
    assert f"| Weights | of step {chosen['step']}, the best by nll on the evaluation data |" in card.render()
    assert "chosen on the data that the results are from" in section(card.render(), "Limits")


def test_an_evaluation_after_training_counts_if_there_was_none_at_its_end(tmp_path):
    trainer = train(
        tmp_path / "late",
        eval_strategy="steps",
        eval_steps=3,
        num_train_epochs=3,
        trainer={"callbacks": [StopAfter(4)]},
    )
    stale = StudentCard.from_trainer(trainer)
    assert "measured at step 3, and training went on to step 4" in section(stale.render(), "Limits")
    fresh = trainer.evaluate()
    card = StudentCard.from_trainer(trainer)
    assert card.metrics["nll"] == fresh["eval_nll"] != stale.metrics["nll"]
    assert card.limits == []
    assert "- Whatever picture it is given, it names one of its 4 classes.\n" in section(card.render(), "Limits")


def test_a_field_that_a_card_does_not_have(run, tmp_path):
    with pytest.raises(TypeError, match="has no field 'licence': did you mean 'license'?"):
        StudentCard.from_trainer(run[0], licence="mit")
    with pytest.raises(TypeError, match="has no field 'zzz': it has model_name, license"):
        StudentCard.from_folder(tmp_path, zzz=1)


def test_metrics_given_replace_those_of_the_log(tmp_path):
    trainer = train(tmp_path / "given")
    metrics = trainer.evaluate(Images(count=12, classes=4, size=32, seed=2), metric_key_prefix="test")
    card = StudentCard.from_trainer(trainer, metrics=metrics, evaluated_on="12 test images", dataset_split="test",
                                    dataset_name="noise")  # fmt: skip
    results = table_of(card.render())
    assert results["these weights"]["NLL (nats)"] == f"{metrics['test_nll']:.4f}"
    # The teacher was measured on other data than these.
    assert list(results) == ["these weights"]
    assert "On 12 test images; one run:" in card.render()
    assert {result.dataset_split for result in card.eval_results} == {"test"}


def test_several_evaluation_sets(tmp_path):
    data = {"near": Images(count=20, classes=4, size=32, seed=1), "far": Images(count=8, classes=4, size=32, seed=2)}
    trainer = DistillationTrainer(
        tiny_student(),
        tiny_teacher(),
        config(tmp_path / "sets", eval_strategy="epoch", teacher_preflight=True),
        train_dataset=Images(classes=4, size=32),
        eval_dataset=data,
    )
    trainer.train()
    last = {key: value for entry in trainer.state.log_history for key, value in entry.items()}
    results = table_of(StudentCard.from_trainer(trainer).render())
    assert list(results) == ["these weights", "these weights, on far", "teacher"]
    assert results["these weights"]["NLL (nats)"] == f"{last['eval_near_nll']:.4f}"
    assert results["these weights, on far"]["NLL (nats)"] == f"{last['eval_far_nll']:.4f}"


def test_metrics_of_the_users_own(tmp_path):
    trainer = train(tmp_path / "own", trainer={"compute_metrics": lambda p: {"top1": 91.5, "f1": 0.25}})
    results = table_of(StudentCard.from_trainer(trainer).render())
    # A percentage is not taken for the fraction that is known by that name.
    assert results["these weights"]["eval_top1"] == "91.5"
    assert results["these weights"]["f1"] == "0.25"


# ---- Schedules -----------------------------------------------------------------------------------------------------


def test_the_optimiser_that_was_used_is_named_and_not_the_configured_one(tmp_path):
    student = tiny_student()
    optimizer = torch.optim.Adagrad(student.parameters(), lr=0.125, weight_decay=0.25)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
    text = StudentCard.from_trainer(train(tmp_path / "own", student, trainer={"optimizers": (optimizer, scheduler)}))
    assert text.training["Optimiser"] == "Adagrad"
    assert text.training["Learning rate"] == "0.125; StepLR"
    assert text.training["Weight decay"] == "0.25"


def test_a_run_that_stopped_early_or_never_began(tmp_path):
    stopped = StudentCard.from_trainer(
        train(tmp_path / "a", num_train_epochs=3, eval_strategy="no", trainer={"callbacks": [StopAfter(1)]})
    )
    assert stopped.training["Length"] == "3 epochs planned; stopped after 1 step, in epoch 0.5"
    untrained = StudentCard.from_trainer(train(tmp_path / "b", train=False, beta="auto"))
    assert untrained.training["Length"] == "1 epoch planned, none done yet"
    assert "not measured yet" in untrained.render() and "β · U · D(p_T ‖ q)" in untrained.render()
    assert section(untrained.render(), "Results") is None


def test_schedule_from_the_configuration_alone(tmp_path):
    args = config(
        tmp_path,
        optim="adamw_torch",
        max_steps=330,
        warmup_steps=27,
        lr_scheduler_type="cosine",
        learning_rate=0.02,
        weight_decay=0.05,
        decay_all_parameters=True,
        gradient_accumulation_steps=4,
        max_grad_norm=1.0,
        mixup_alpha=0.2,
        cutmix_alpha=1.0,
        mixup_prob=0.5,
        label_smoothing_factor=0.1,
    )
    assert describe_training(args) == {
        "Length": "330 steps",
        "Batch size": "32 (4 accumulated)",
        "Optimiser": "adamw_torch",
        "Learning rate": "0.02; cosine schedule, warm-up of 27 steps",
        "Weight decay": "0.05 on all parameters",
        "Gradient clipping": "norm 1",
        "Mixing": "mixup α = 0.2, CutMix α = 1, on 50 % of the batches",
        "Label smoothing": "0.1",
        "Precision": "fp32",
    }


# ---- Cards without a trainer ---------------------------------------------------------------------------------------


def test_results_over_seeds():
    card = StudentCard(
        "digits",
        dataset_name="digits",
        metrics={"top1": [0.90, 0.94, 0.95]},
        results={
            "teacher": {"top1": 0.987, "parameters": 701234},
            "CE | labels": {"top1": [0.5, 0.6], "nll": [1.0, 2.0], "note": "few labels"},
        },
        seeds=[0, 1, 2],
        training={"Batch size": "64"},
    )
    text = card.render()
    assert table_of(text.replace(r"CE \| labels", "CE")) == {
        "these weights": {"Top-1 (%)": "93.00 ± 2.65", "NLL (nats)": "", "Parameters": "", "note": ""},
        "teacher": {"Top-1 (%)": "98.70", "NLL (nats)": "", "Parameters": "701,234", "note": ""},
        "CE": {"Top-1 (%)": "55.00 ± 7.07", "NLL (nats)": "1.5000 ± 0.7071", "Parameters": "", "note": "few labels"},
    }
    assert "mean ± sample standard deviation over the runs (seeds 0, 1, 2) where a spread is given:" in text.lower()
    assert "| Seeds | 0, 1, 2 |" in text
    assert StudentCard(dataset_name="digits", metrics={"nll": float("nan")}).eval_results == []
    (result,) = card.eval_results
    assert result.metric_value == 0.93 and result.metric_name == "Top-1 (mean of 3 runs)"


@pytest.mark.parametrize("given", [{"metrics": {"top1": 72.19}}, {"results": {"CE": {"ece": [0.1, 3.0]}}}])
def test_percentages_are_refused(given):
    with pytest.raises(ValueError, match=r"must be a fraction in \[0, 1\], got"):
        StudentCard(**given)


def test_what_is_not_known_is_not_printed():
    text = StudentCard().render()
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    assert headings == ["student", "Use", "Licence"]
    assert ModelCard(text).data.to_dict() == {
        "library_name": "timm",
        "pipeline_tag": "image-classification",
        "tags": ["timm", "hf_kd"],
    }
    for placeholder in ("None", "More Information", "TODO", "{{", "[]", "\n\n\n"):
        assert placeholder not in text
    # The only comments are the marks.
    assert re.findall(r"<!--.*?-->", text, re.DOTALL) == [BEGIN, END]


@pytest.mark.parametrize(
    ("given", "licence", "words"),
    [
        ({}, None, "No licence was given"),
        ({"license": "mit"}, "mit", "`mit`."),
        ({"dataset_license": "cc-by-4.0"}, "cc-by-4.0", "`cc-by-4.0`, inherited from the data set."),
        ({"license": "mit", "dataset_license": "cc-by-4.0"}, "mit", "`mit`."),
    ],
)
def test_the_licence_is_given_or_inherited_and_never_guessed(given, licence, words):
    card = ModelCard(StudentCard(**given).render())
    assert card.data.license == licence
    assert words in section(card.text, "Licence")


@pytest.mark.parametrize(
    ("of_data", "licence"), [("cc-by-4.0", "cc-by-4.0"), ("See the LICENSE file.", None), ("", None)]
)
def test_a_data_set_from_the_hub_brings_its_licence(tmp_path, of_data, licence):
    trainer = train(tmp_path / "run", train=False)
    trainer.train_dataset.info = type("Info", (), {"license": of_data})()
    assert StudentCard.from_trainer(trainer).metadata.license == licence
    assert StudentCard.from_trainer(trainer, license="mit").metadata.license == "mit"


def test_training_data_without_a_length(tmp_path):
    class Stream(IterableDataset):
        def __iter__(self):
            data = Images(classes=4, size=32)
            return iter([data[index] for index in range(16)])

    trainer = DistillationTrainer(
        tiny_student(), tiny_teacher(), config(tmp_path / "s", max_steps=1), train_dataset=Stream()
    )
    trainer.train()
    assert "**Data.** stream.\n" in StudentCard.from_trainer(trainer, dataset_name="stream").render()


def test_a_teacher_whose_outputs_were_stored_can_be_named(tmp_path):
    stored = Teacher(lambda **batch: torch.zeros(len(batch["labels"]), 4), name="StoredLogits")
    trainer = train(tmp_path / "stored", teacher=stored, teacher_preflight=False)
    known = {"id": "resnet18", "top1": 0.984, "parameters": 12345}
    text = StudentCard.from_trainer(trainer, teacher=known, results={"CE": {"top1": 0.5}}).render()
    assert list(table_of(text)) == ["these weights", "CE"]
    assert "**Teacher.** `resnet18`, 12,345 parameters; top-1 on the evaluation data 98.40 %." in text
    assert "StoredLogits" not in text


# ---- A card that is there already ----------------------------------------------------------------------------------


def test_saving_twice_changes_nothing(tmp_path):
    card = StudentCard("owl", dataset="owner/animals", metrics={"top1": 0.5}, tags="animals")
    path = card.save(tmp_path / "owl")
    first = path.read_bytes()
    assert card.save(tmp_path / "owl") == path
    assert path.read_bytes() == first
    assert 'local-dir:owl"' in first.decode()


@pytest.mark.parametrize("newline", ["\n", "\r\n"])
def test_hand_edits_outside_the_marks_are_kept(tmp_path, newline):
    old = StudentCard(
        "owl", metrics={"top1": 0.5}, dataset_name="animals", provenance={"teacher": {"id": "t"}, "loss": "kd"}
    )
    path = old.save(tmp_path)
    edited = path.read_text().replace("tags:\n", "license: mit\nthumbnail: owl.png\ntags:\n- mine\n")
    edited = edited.replace(BEGIN, f"Words before.\n\n{BEGIN}").replace(END, f"{END}\n\nWords after — with care.")
    path.write_bytes(edited.replace("\n", newline).encode())

    new = StudentCard("owl 2", limits="None known.", provenance={"teacher": {"id": "t"}, "loss": "wttm"})
    new.save(tmp_path)
    raw = path.read_bytes().decode()
    assert (raw.count("\r\n") == raw.count("\n")) if newline == "\r\n" else ("\r" not in raw)
    card = ModelCard(raw.replace("\r\n", "\n"))
    before, inside, after = re.split(f"{BEGIN}|{END}", card.text)
    assert before.strip() == "Words before."
    assert after == "\n\nWords after — with care.\n"
    assert "# owl 2" in inside and "# owl\n" not in inside and "None known." in inside
    # The loss of an earlier run, and its results, are not those of this one.
    assert card.data.tags == ["knowledge-distillation", "wttm", "timm", "hf_kd", "mine"]
    assert card.data.eval_results is None and "model-index" not in card.data.to_dict()
    assert card.data.thumbnail == "owl.png"
    # A licence written in by hand was given.
    assert card.data.license == "mit" and "`mit`." in section(card.text, "Licence")


@pytest.mark.parametrize(
    "content",
    [
        "# My own card\n",
        f"# Half of it\n{BEGIN}\n",
        f"{END}\n# The wrong way round\n{BEGIN}\n",
        f"{BEGIN}\n{END}\n{BEGIN}\n{END}\n",
        f"---\ntags: [a\n---\n{BEGIN}\n{END}\n",
    ],
)
def test_a_readme_that_is_not_ours_is_left_alone(tmp_path, content, caplog):
    path = tmp_path / "README.md"
    path.write_text(content)
    StudentCard("owl").save(tmp_path)
    assert path.read_text() == content
    assert "is left as it is" in caplog.text and "Move it away" in caplog.text


def test_only_the_main_process_writes(tmp_path, monkeypatch):
    trainer = train(tmp_path / "run", train=False)
    monkeypatch.setattr(trainer, "is_world_process_zero", lambda: False)
    trainer.create_model_card()
    assert not (tmp_path / "run" / "README.md").exists()
