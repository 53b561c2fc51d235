"""Calling networks of any kind, and turning images made for one into images made for another."""

import numpy as np
import pytest
import timm
import torch
from PIL import Image, ImageFilter
from sklearn.datasets import load_sample_images
from timm.data import create_transform
from torch import nn
from torch.nn import functional as F
from transformers import CLIPImageProcessor, TimmWrapperConfig, TimmWrapperForImageClassification, ViTImageProcessor
from transformers.modeling_outputs import ImageClassifierOutput

from hf_kd.networks import InputConverter, Preprocessing, Signature, logits_of, num_classes_of, unwrap


IMAGES, LABELS, INDEX = torch.rand(2, 3, 32, 32), torch.tensor([0, 1]), torch.tensor([7, 8])
BATCH = {"pixel_values": IMAGES, "labels": LABELS, "index": INDEX}
IMAGENET = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
HALVES = {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}


# ---- Calling -------------------------------------------------------------------------------------------------------


def test_timm_forward_gets_the_image_by_position():
    args, kwargs = Signature.of(timm.create_model("test_resnet")).select(BATCH)
    assert len(args) == 1
    assert args[0] is IMAGES
    assert kwargs == {}


def test_a_single_other_input_is_passed_by_position():
    features = torch.rand(2, 4)
    args, kwargs = Signature.of(nn.Linear(4, 2)).select({"features": features, "labels": LABELS})
    assert len(args) == 1
    assert args[0] is features
    assert kwargs == {}


def test_timm_wrapper_gets_what_it_names_and_nothing_else():
    # Its **kwargs go to timm's forward, which takes the image alone.
    wrapper = TimmWrapperForImageClassification(TimmWrapperConfig(architecture="test_resnet", num_labels=3)).eval()
    args, kwargs = Signature.of(wrapper).select({**BATCH, "image_id": torch.tensor([1, 2])})
    assert args == ()
    assert kwargs.keys() == {"pixel_values"}
    assert wrapper(**kwargs).logits.shape == (2, 3)


def test_text_inputs_go_by_name():
    def forward(input_ids, attention_mask=None, labels=None):
        raise AssertionError

    batch = {"input_ids": LABELS, "attention_mask": LABELS, "token_type_ids": LABELS, "labels": LABELS}
    args, kwargs = Signature.of(forward).select(batch)
    assert args == ()
    assert kwargs.keys() == {"input_ids", "attention_mask"}


def test_kwargs_alone_get_every_input_but_no_bookkeeping():
    class Anything(nn.Module):
        def forward(self, **inputs):
            raise AssertionError

    args, kwargs = Signature.of(Anything()).select({**BATCH, "mask": LABELS})
    assert args == ()
    assert kwargs.keys() == {"pixel_values", "mask"}


def test_names_and_kwargs_together_get_every_input():
    def forward(input_ids, **kwargs):
        raise AssertionError

    _, kwargs = Signature.of(forward).select({"input_ids": LABELS, "attention_mask": LABELS, "labels": LABELS})
    assert kwargs.keys() == {"input_ids", "attention_mask"}


def test_compiled_networks_are_read_through_their_wrapper():
    network = nn.Linear(4, 2)
    compiled = torch.compile(network, backend="eager")
    assert unwrap(compiled) is network
    assert Signature.of(compiled) == Signature.of(network)


def test_a_batch_without_anything_to_take_is_named():
    with pytest.raises(ValueError, match=r"The batch has image, labels, text.*parameters input_ids.*Rename"):
        Signature(frozenset({"input_ids"}), False).select({"image": IMAGES, "text": IMAGES, "labels": LABELS})
    with pytest.raises(ValueError, match="The batch has labels, of which the network takes none"):
        Signature.of(nn.Linear(4, 2)).select({"labels": LABELS})


@pytest.mark.parametrize(
    "wrap",
    [
        lambda logits: logits,
        lambda logits: {"logits": logits, "loss": torch.zeros(())},
        lambda logits: ImageClassifierOutput(loss=torch.zeros(()), logits=logits),
        lambda logits: (logits, torch.zeros(3)),
        lambda logits: [logits],
        lambda logits: type("Output", (), {"logits": logits})(),
    ],
)
def test_logits_are_found(wrap):
    logits = torch.rand(2, 3)
    assert logits_of(wrap(logits)) is logits


@pytest.mark.parametrize("output", [None, {"scores": torch.rand(2)}, (), ("text",), np.zeros(3)])
def test_outputs_without_logits_are_refused(output):
    with pytest.raises(TypeError, match=f"returned {type(output).__name__}, which has no logits"):
        logits_of(output)


def test_class_counts():
    assert num_classes_of(timm.create_model("test_resnet", num_classes=7)) == 7
    wrapper = TimmWrapperForImageClassification(TimmWrapperConfig(architecture="test_resnet", num_labels=4))
    assert num_classes_of(wrapper) == 4
    assert num_classes_of(torch.compile(wrapper, backend="eager")) == 4
    assert num_classes_of(timm.create_model("test_resnet", num_classes=0)) is None
    assert num_classes_of(nn.Linear(3, 2)) is None
    assert num_classes_of(lambda **inputs: None) is None


# ---- Preprocessing -------------------------------------------------------------------------------------------------


def test_preprocessing_of_timm_and_its_wrapper():
    expected = Preprocessing(**HALVES, input_size=(3, 160, 160), interpolation="bilinear", crop_pct=0.95)
    assert Preprocessing.of(timm.create_model("test_resnet")) == expected
    wrapper = TimmWrapperForImageClassification(TimmWrapperConfig(architecture="test_resnet", num_labels=4))
    assert Preprocessing.of(wrapper) == expected
    wrapper.config.pretrained_cfg = {**IMAGENET, "input_size": [3, 48, 40]}
    # What the config lacks has timm's defaults.
    assert Preprocessing.of(wrapper) == Preprocessing(**IMAGENET, input_size=(3, 48, 40), crop_pct=0.875)


def test_preprocessing_is_never_guessed():
    assert Preprocessing.of(nn.Linear(3, 2)) is None
    assert Preprocessing.of(lambda **inputs: None) is None


@pytest.mark.parametrize("name", ["test_efficientnet", "test_vit"])
def test_a_timm_network_for_greyscale_has_greyscale_statistics(name):
    # timm leaves the three published ones in place.
    network = timm.create_model(name, in_chans=1)
    assert len(network.pretrained_cfg["mean"]) == 3
    found = Preprocessing.of(network)
    assert found.input_size == (1, 160, 160)
    assert found.mean == pytest.approx([sum(network.pretrained_cfg["mean"]) / 3])
    assert found.std == pytest.approx([sum(network.pretrained_cfg["std"]) / 3])


def test_a_stem_that_folds_pixels_into_channels_is_still_for_colour():
    with torch.device("meta"):
        network = timm.create_model("tresnet_m")
    assert Preprocessing.of(network).input_size[0] == 3
    assert len(Preprocessing.of(network).mean) == 3


def test_preprocessing_of_image_processors():
    vit = Preprocessing.from_image_processor(
        ViTImageProcessor(size={"height": 40, "width": 48}, image_mean=[0.1, 0.2, 0.3], image_std=[0.4, 0.5, 0.6])
    )
    assert vit == Preprocessing((0.1, 0.2, 0.3), (0.4, 0.5, 0.6), (3, 40, 48), "bilinear")
    clip = CLIPImageProcessor(size={"shortest_edge": 36}, crop_size={"height": 32, "width": 32})
    assert Preprocessing.from_image_processor(clip).input_size == (3, 32, 32)
    assert Preprocessing.from_image_processor(clip).interpolation == "bicubic"
    whole = CLIPImageProcessor(size={"shortest_edge": 36}, do_center_crop=False)
    assert Preprocessing.from_image_processor(whole).input_size == (3, 36, 36)


@pytest.mark.parametrize("options", [{"do_normalize": False}, {"do_rescale": False}, {"rescale_factor": 1 / 127.5}])
def test_an_image_processor_that_does_otherwise_is_not_misread(options):
    assert Preprocessing.from_image_processor(ViTImageProcessor(**options)) is None


def test_something_else_than_an_image_processor():
    assert Preprocessing.from_image_processor(object()) is None


# ---- Converting ----------------------------------------------------------------------------------------------------


def transform(preprocessing):
    """timm's own evaluation transform, from a PIL image."""
    return create_transform(
        preprocessing.input_size,
        is_training=False,
        mean=preprocessing.mean,
        std=preprocessing.std,
        interpolation=preprocessing.interpolation,
        crop_pct=preprocessing.crop_pct,
        crop_mode=preprocessing.crop_mode,
    )


@pytest.fixture(scope="module")
def photos():
    return [Image.fromarray(array) for array in load_sample_images().images]


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_renormalising_equals_the_teachers_own_transform(photos, interpolation):
    source = Preprocessing(**IMAGENET, input_size=(3, 64, 64), interpolation=interpolation, crop_pct=0.875)
    target = Preprocessing(**HALVES, input_size=(3, 64, 64), interpolation=interpolation, crop_pct=0.875)
    for photo in photos:
        wanted = transform(target)(photo)[None]
        images = transform(source)(photo)[None]
        assert (images - wanted).abs().max() > 0.5
        torch.testing.assert_close(InputConverter(source, target)(images), wanted, rtol=0, atol=2e-6)


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize(("source_size", "target_size"), [(64, 96), (96, 64)])
def test_resizing_is_close_to_the_teachers_own_transform(photos, interpolation, source_size, target_size):
    # Normalised pixels span [-1, 1]. Sharp photos, twice resampled: mean 0.042 up and 0.016 down. Smooth ones: 0.012
    # and 0.009, largest 0.19. Nearest-neighbour would be at 0.019 and more.
    source = Preprocessing(**IMAGENET, input_size=(3, source_size, source_size), interpolation=interpolation)
    target = Preprocessing(**HALVES, input_size=(3, target_size, target_size), interpolation=interpolation)
    convert = InputConverter(source, target)
    for photo in photos:
        images = convert(transform(source)(photo)[None])
        difference = (images - transform(target)(photo)[None]).abs()
        assert difference.shape[-2:] == (target_size, target_size)
        assert difference.mean() < (0.042 if target_size > source_size else 0.0165)
        smooth = photo.filter(ImageFilter.GaussianBlur(6))
        difference = (convert(transform(source)(smooth)[None]) - transform(target)(smooth)[None]).abs()
        assert difference.mean() < 0.0125
        assert difference.max() < 0.19


def test_downsizing_is_antialiased():
    source = Preprocessing(**HALVES, input_size=(3, 64, 64), interpolation="bilinear")
    target = Preprocessing(**HALVES, input_size=(3, 16, 16), interpolation="bilinear")
    stripes = torch.zeros(1, 3, 64, 64)
    stripes[..., ::4] = 1.0
    # One column in four is lit, so a quarter is right; without antialiasing it would be 0 here.
    torch.testing.assert_close(InputConverter(source, target)(stripes)[..., 2:-2].mean(), torch.tensor(0.25))
    assert F.interpolate(stripes, (16, 16), mode="bilinear").max() == 0


@pytest.mark.parametrize("grey", [0.3, 0.5])
def test_greyscale_images_become_colour_ones(grey):
    source = Preprocessing((grey,), (grey,), (1, 8, 8))
    target = Preprocessing(**HALVES, input_size=(3, 8, 8))
    pixels = torch.rand(2, 1, 8, 8)
    images = InputConverter(source, target)((pixels - grey) / grey)
    # Also where the statistics agree and only the channels do not.
    torch.testing.assert_close(images, ((pixels - 0.5) / 0.5).expand(2, 3, 8, 8))


def test_the_target_interpolation_is_used():
    source = Preprocessing(**HALVES, input_size=(3, 8, 8), interpolation="bilinear")
    images = torch.rand(1, 3, 8, 8)
    results = [
        InputConverter(source, Preprocessing(**HALVES, input_size=(3, 16, 16), interpolation=interpolation))(images)
        for interpolation in ("bilinear", "bicubic", "random")
    ]
    torch.testing.assert_close(results[0], F.interpolate(images, (16, 16), mode="bilinear"))
    assert (results[0] - results[1]).abs().max() > 1e-2
    assert torch.equal(results[1], results[2])


def test_equal_preprocessing_changes_nothing():
    same = Preprocessing(**IMAGENET, input_size=(3, 32, 32))
    assert InputConverter(same, same)(IMAGES) is IMAGES


def test_colour_to_greyscale_is_refused():
    with pytest.raises(ValueError, match=r"images have 3 channels and the teacher's 1"):
        InputConverter(Preprocessing(**HALVES, input_size=(3, 8, 8)), Preprocessing((0.5,), (0.5,), (1, 8, 8)))


def test_nothing_of_a_converter_needs_fp64_on_the_device():
    # Apple's GPUs have none.
    converter = InputConverter(
        Preprocessing(**IMAGENET, input_size=(3, 8, 8)), Preprocessing(**HALVES, input_size=(3, 8, 8))
    )
    assert {buffer.dtype for buffer in converter.buffers()} == {torch.float32}
    assert converter.state_dict() == {}
