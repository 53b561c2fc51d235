"""Images that are bytes until they are on the device: the same training as with images that come normalised."""

import copy

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import CLASSES, ConvNet, config
from torch.utils.data import Dataset
from transformers import ViTImageProcessor

from hf_kd import DistillationTrainer
from hf_kd.data import collate, eval_transform, train_transform, view_rng
from hf_kd.data.normalise import PixelNormaliser


MEAN, STD = (0.5, 0.4, 0.3), (0.25, 0.2, 0.3)
STATISTICS = {"mean": MEAN, "std": STD}


class Pictures(Dataset):
    """Noise of 8 × 8 as bytes or, with `normalised`, as floats."""

    def __init__(self, normalised, count=24, seed=0, channels=3):
        generator = torch.Generator().manual_seed(seed)
        self.pixels = torch.randint(0, 256, (count, channels, 8, 8), generator=generator, dtype=torch.uint8)
        self.labels = torch.randint(0, CLASSES, (count,), generator=generator)
        mean, std = (torch.tensor(values).view(3, 1, 1) for values in (MEAN, STD))
        self.images = (self.pixels / 255 - mean) / std if normalised else self.pixels

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, index):
        return {"pixel_values": self.images[index], "labels": self.labels[index], "index": index}


def declared(network, mean=MEAN, std=STD):
    """The network with what timm's say of their images."""
    network.pretrained_cfg = {"input_size": (3, 8, 8), "mean": mean, "std": std, "interpolation": "bilinear"}
    return network


def networks(dtype=torch.float32):
    torch.manual_seed(0)
    teacher = declared(ConvNet(width=8), mean=(0.1, 0.2, 0.3), std=(0.5, 0.6, 0.7))
    return declared(ConvNet()).to(dtype), teacher.to(dtype)


def make(folder, normalised, dtype=torch.float32, **options):
    student, teacher = networks(dtype)
    return DistillationTrainer(
        student, teacher, config(folder, **options), train_dataset=Pictures(normalised),
        eval_dataset=Pictures(normalised, count=16, seed=1),
    )  # fmt: skip


def outcome(trainer):
    trainer.train()
    prediction = trainer.predict(trainer.eval_dataset)
    return {
        "log": [[entry[key] for key in ("loss", "ce", "distill")] for entry in trainer.state.log_history
                if "loss" in entry],
        "beta": trainer.beta,
        "teacher": trainer.teacher_top1,
        "evaluation": trainer.evaluate()["eval_nll"],
        "logits": prediction.predictions,
        "weights": {key: value.clone() for key, value in trainer.model.state_dict().items()},
    }  # fmt: skip


RUNS = {
    "plain": {},
    "mixed": {"mixup_alpha": 0.4, "cutmix_alpha": 1.0},
    "accumulated": {"gradient_accumulation_steps": 3},
    "features": {
        "feature_loss": "itrd",
        "feature_loss_kwargs": {"student_features": "head@input", "teacher_features": "head@input"},
    },
}


@pytest.mark.parametrize("name", RUNS)
def test_a_run_is_that_of_normalised_images(name, tmp_path):
    options = {"beta": "auto", "teacher_preflight": True, "num_train_epochs": 2, **RUNS[name]}
    bytes_, floats = (outcome(make(tmp_path, normalised, **options)) for normalised in (False, True))
    np.testing.assert_allclose(bytes_["log"], floats["log"], rtol=0, atol=1e-6)
    for key in ("beta", "teacher", "evaluation"):
        assert bytes_[key] == pytest.approx(floats[key], abs=1e-6), key
    np.testing.assert_allclose(bytes_["logits"], floats["logits"], rtol=0, atol=1e-6)
    for key, value in floats["weights"].items():
        torch.testing.assert_close(bytes_["weights"][key], value, rtol=0, atol=1e-6)
    assert bytes_["teacher"] is not None and np.std(bytes_["logits"]) > 0.1


def test_the_loader_hands_on_bytes(tmp_path):
    trainer = make(tmp_path, False)
    for loader in (trainer.get_train_dataloader(), trainer.get_eval_dataloader()):
        assert next(iter(loader))["pixel_values"].dtype == torch.uint8


def test_labels_alone_need_no_teacher_for_it(tmp_path):
    losses = []
    for normalised in (False, True):
        student, _ = networks()
        trainer = DistillationTrainer(
            student, None, config(tmp_path, loss="ce"), train_dataset=Pictures(normalised)
        )  # fmt: skip
        trainer.train()
        losses.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
    assert losses[0] == pytest.approx(losses[1], abs=1e-6)


def test_an_fp64_student_gets_fp64_images(tmp_path):
    trainer = make(tmp_path, False, dtype=torch.float64)
    batch = trainer._prepare_inputs(collate([trainer.train_dataset[0]]))
    assert batch["pixel_values"].dtype == torch.float64
    mean, std = (torch.tensor(values, dtype=torch.float64).view(3, 1, 1) for values in (MEAN, STD))
    expected = (trainer.train_dataset.pixels[:1].double() / 255 - mean) / std
    torch.testing.assert_close(batch["pixel_values"], expected, rtol=0, atol=1e-15)
    trainer.train()


def test_transformers_networks_are_asked_by_their_image_processor(tmp_path):
    processor = ViTImageProcessor(image_mean=list(MEAN), image_std=list(STD), size={"height": 8, "width": 8})
    student, reference = ConvNet(), Pictures(True)
    trainer = DistillationTrainer(
        student, None, config(tmp_path, loss="ce"), train_dataset=Pictures(False), processing_class=processor,
        data_collator=collate,
    )  # fmt: skip
    batch = trainer._prepare_inputs(collate([trainer.train_dataset[3]]))
    torch.testing.assert_close(batch["pixel_values"][0], reference[3]["pixel_values"], rtol=0, atol=1e-6)


def test_a_student_that_says_nothing_is_not_guessed_at(tmp_path):
    trainer = DistillationTrainer(ConvNet(), None, config(tmp_path, loss="ce"), train_dataset=Pictures(False))
    message = r"are bytes \(uint8\).* the student ConvNet does not say by which mean and deviation: build it with"
    with pytest.raises(ValueError, match=message):
        trainer.train()


def test_another_number_of_channels_is_refused(tmp_path):
    data = Pictures(False, channels=1)
    trainer = DistillationTrainer(networks()[0], None, config(tmp_path, loss="ce"), train_dataset=data)
    with pytest.raises(ValueError, match=r"the shape \(batch, 3, height, width\).*, got \(8, 1, 8, 8\)"):
        trainer.train()


# ---- Transforms ----------------------------------------------------------------------------------------------------

TRANSFORMS = {
    "training": (train_transform, {}),
    "timm's policy": (train_transform, {"auto_augment": "rand-m9-mstd0.5-inc1"}),
    "evaluation": (eval_transform, {}),
}


@pytest.mark.parametrize("name", TRANSFORMS)
def test_a_transform_without_normalisation(name):
    make_transform, options = TRANSFORMS[name]
    plain = make_transform(32, **STATISTICS, **options)
    as_bytes = make_transform(32, normalize=False, **STATISTICS, **options)
    noise = np.random.default_rng(0).integers(0, 256, (12, 16, 3), dtype=np.uint8)
    picture = Image.fromarray(noise).resize((96, 72), Image.Resampling.BICUBIC)
    normalise = PixelNormaliser(MEAN, STD)
    for seed in range(5):
        with view_rng(0, 0, seed):
            expected = plain(copy.deepcopy(picture))
        with view_rng(0, 0, seed):
            view = as_bytes(copy.deepcopy(picture))
        assert view.dtype == torch.uint8 and view.shape == (3, 32, 32)
        torch.testing.assert_close(normalise(view[None])[0], expected, rtol=0, atol=1e-6)


def test_noise_of_erasing_needs_floats():
    with pytest.raises(ValueError, match=r"`random_erasing` \(0\.25\) puts noise into normalised views"):
        train_transform(32, random_erasing=0.25, normalize=False)
