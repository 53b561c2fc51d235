"""Jobs of a client's process (hub_client.py): what people do with a Hub, by the real clients."""

import contextlib
import dataclasses
import io
import json
import logging
import os
import re
import sys
from pathlib import Path

import datasets
import timm
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny import Images, config, vit
from transformers import (
    AutoImageProcessor,
    AutoModelForImageClassification,
    MobileNetV2Config,
    MobileNetV2ForImageClassification,
    ViTImageProcessor,
    pipeline,
)

import hf_kd.hub
from hf_kd import DistillationTrainer, Teacher, TeacherCache, create_student, publish_student
from hf_kd.cli import main


LABELS = ["ant", "bee", "cat", "dog", "eel"]
SIZE = 32


def publish(folder, repo_id, **options):
    return dataclasses.asdict(publish_student(folder, repo_id, **options))


def command(*, arguments):
    """The hf-kd command: its status and what it said."""
    said, errors = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(errors):
        try:
            status = main(arguments)
        except SystemExit as stop:
            status = stop.code
    return [status, said.getvalue(), errors.getvalue()]


def student_and_processor(kind):
    torch.manual_seed(0)
    mean = {"mean": (0.4, 0.5, 0.6), "std": (0.2, 0.25, 0.3)}
    if kind == "student":
        return create_student("test_resnet", label_names=LABELS, img_size=SIZE, interpolation="bicubic", **mean), None
    if kind == "timm":
        return timm.create_model("test_resnet", num_classes=5), None
    processor = ViTImageProcessor(
        size={"height": SIZE, "width": SIZE}, image_mean=list(mean["mean"]), image_std=list(mean["std"])
    )
    if kind == "vit":
        return vit(), processor
    small = MobileNetV2Config(image_size=SIZE, depth_multiplier=0.25, num_labels=5, finegrained_output=False)
    return MobileNetV2ForImageClassification(small), processor


def train(output_dir, *, kind="student", teacher=None, push=True, card=None, **options):
    """Train a student for two epochs and push it; what was published, the failures, and logits on some images."""
    student, processor = student_and_processor(kind)
    data = Images(size=SIZE)
    data.class_names = LABELS
    settings = {"num_train_epochs": 2, "save_strategy": "no", "eval_strategy": "epoch", "logging_steps": 1, **options}
    trainer = DistillationTrainer(
        student,
        teacher or create_student("test_resnet", num_classes=5, img_size=SIZE),
        config(output_dir, **settings),
        train_dataset=data,
        eval_dataset=data,
        processing_class=processor,
    )
    trainer.train()
    publication = trainer.push_to_hub(**(card or {})) if push else None
    pixels = torch.rand(4, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(1))
    trainer.model.eval()
    with torch.no_grad():
        output = trainer.model(pixels)
    save_file(
        {"pixels": pixels, "logits": getattr(output, "logits", output)}, Path(output_dir) / "expected.safetensors"
    )
    return {
        "publication": None if publication is None else dataclasses.asdict(publication),
        "failures": trainer.pushes.failures,
        "steps": trainer.state.global_step,
        "provenance": trainer.provenance(),
    }


def largest_difference(model, expected):
    with torch.no_grad():
        output = model.eval()(expected["pixels"])
    return float((getattr(output, "logits", output) - expected["logits"]).abs().max())


def open_everywhere(repo_id, expected, *, timm_opens=True, processor=True):
    """Open a published student in every way there is: differences of logits, labels and preprocessing."""
    expected = load_file(expected)
    found = {"labels": {}, "differences": {}, "images": {}}
    native = AutoModelForImageClassification.from_pretrained(repo_id)
    found["differences"]["transformers"] = largest_difference(native, expected)
    found["labels"]["transformers"] = list(native.config.id2label.values())
    teacher = Teacher.from_pretrained(f"hf-hub:{repo_id}" if timm_opens else repo_id)
    found["differences"]["teacher"] = largest_difference(teacher, expected)
    found["revision"], found["hub_id"] = teacher.revision, teacher.hub_id
    picture = Image.effect_mandelbrot((48, 48), (-3, -2.5, 2, 2.5), 100).convert("RGB")
    picture.save("picture.png")
    views = {}
    if timm_opens:
        network = timm.create_model(f"hf-hub:{repo_id}", pretrained=True)
        found["differences"]["timm"] = largest_difference(network, expected)
        found["labels"]["timm"] = network.pretrained_cfg["label_names"]
        views["timm"] = timm.data.create_transform(**timm.data.resolve_model_data_config(network))(picture)[None]
    if processor:
        views["transformers"] = AutoImageProcessor.from_pretrained(repo_id)(picture, return_tensors="pt")[
            "pixel_values"
        ]
        best = {}
        for name, view in views.items():
            with torch.no_grad():
                probabilities = native(view).logits.softmax(-1)[0]
            best[name] = [native.config.id2label[int(probabilities.argmax())], float(probabilities.max())]
        for name, classify in (
            ("pipeline", pipeline("image-classification", model=repo_id)),
            ("pipeline without task", pipeline(model=repo_id)),
        ):
            first = classify(picture)[0]
            best[name] = [first["label"], first["score"]]
        found["images"] = best
        found["views"] = {
            name: [list(view.shape), float(view.mean()), float(view.std())] for name, view in views.items()
        }
    return found


def run_card(repo_id):
    """Execute the code of a published card, as a reader would; what it printed."""
    from huggingface_hub import ModelCard

    printed = []
    for code in re.findall(r"```python\n(.*?)```", ModelCard.load(repo_id).text, re.DOTALL):
        said = io.StringIO()
        with contextlib.redirect_stdout(said):
            exec(code, {})
        printed.append(said.getvalue().split())
    return printed


def run_code(code, names):
    """Lines of code with these names of modules' objects at hand: what each line makes, as a string."""
    space = {}
    exec("\n".join(names), space)
    return [type(eval(line, space)).__name__ for line in code]


def push_cache(folder, repo_id, **options):
    return TeacherCache(folder).push_to_hub(repo_id, **options)


def fetch_cache(repo_id, folder, **options):
    """A published cache as another machine has it, and how many columns `datasets` sees."""
    cache = TeacherCache.from_hub(repo_id, folder, **options)
    table = datasets.load_dataset(repo_id, split="train")
    return {"views": cache.views, "dtype": cache.dtype, "columns": table.column_names, "rows": len(table)}


def train_with_cache(teacher, folder):
    """Two runs with one cache: of each, whether its teacher was built, and the last loss."""
    found = []
    for number in range(2):
        student, _ = student_and_processor("student")
        data = Images(count=8, size=SIZE)
        data.fixed_views = True
        args = config(f"{folder}/{number}", teacher_cache_dir=f"{folder}/cache")
        trainer = DistillationTrainer(student, teacher, args, train_dataset=data)
        trainer.train()
        found.append([getattr(trainer.teacher, "is_built", True), trainer.state.log_history[0]["loss"]])
    return found


def try_load(name):
    return str(Teacher.from_pretrained(name).num_classes)


def differences(folder, repo_id, commit):
    """What reading back finds, of a folder whose files are not those of the commit."""
    from huggingface_hub import HfApi

    files = {path.name: path for path in Path(folder).iterdir()}
    return hf_kd.hub._differences(HfApi(), repo_id, commit, files)


class _Lines(logging.Handler):
    def __init__(self):
        super().__init__(logging.WARNING)
        self.lines = []

    def emit(self, record):
        self.lines.append(record.getMessage())


def serve():
    answers = os.fdopen(os.dup(1), "w")
    # Whatever a job prints is not an answer.
    os.dup2(2, 1)
    torch.set_num_threads(1)
    lines = _Lines()
    logging.getLogger("hf_kd").addHandler(lines)
    for line in sys.stdin:
        job, arguments = json.loads(line)
        lines.lines.clear()
        token, waits = arguments.pop("as_user", None), arguments.pop("waits", [0.01] * 4)
        os.environ.pop("HF_TOKEN", None)
        if token is not None:
            os.environ["HF_TOKEN"] = token
        hf_kd.hub.WAITS = tuple(waits)
        try:
            answer = {"result": globals()[job](**arguments)}
        except Exception as error:
            answer = {"error": [type(error).__name__, str(error)]}
        print(json.dumps({**answer, "log": lines.lines}), file=answers, flush=True)


if __name__ == "__main__":
    serve()
