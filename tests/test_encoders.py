"""The plain encoders against OpenAI's own `clip` model, every configuration."""
import clip
import pytest
import torch

from clip_ttrt import pictures
from clip_ttrt.checkpoint import load_checkpoint, original_model
from clip_ttrt.encoders import (
    DIFFERENTIABLE, ImageEncoder, TextEncoder, image_encoder, text_encoder, to_openai)
from clip_ttrt.models import MODELS, dimensions_from

TOLERANCE = 1e-5  # of the features' norm: fp32 sums in another order
TEXTS = ["", "a cat", "a diagram of a dog on a skateboard in front of a shop", "many words " * 60]


def with_original(name):
    checkpoint = load_checkpoint(name, "random" if name != "demo" else "demo")
    original = original_model(checkpoint.dimensions)
    original.load_state_dict(checkpoint.state_dict)
    return checkpoint, original.eval()


def relative_error(actual, expected):
    return ((actual - expected).abs().amax(dim=1) / expected.norm(dim=1)).max().item()


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_features_equal_the_original_model(name):
    checkpoint, original = with_original(name)
    weights, resolution = checkpoint.state_dict, checkpoint.dimensions.image_resolution
    images = torch.cat([pictures.load(resolution)[0][2:3], torch.randn(1, 3, *[resolution] * 2)])
    tokens = clip.tokenize(TEXTS, truncate=True)
    assert tokens[-1, -1] == 49407 and tokens[0, 1] == 49407  # all 77 positions, and none
    expected = original.encode_image(images)
    assert relative_error(image_encoder(weights)(images), expected) <= TOLERANCE
    expected = original.encode_text(tokens)
    assert relative_error(text_encoder(weights)(tokens), expected) <= TOLERANCE


@torch.no_grad()
def test_short_token_rows_give_the_features_of_padded_ones():
    checkpoint, original = with_original("demo")
    tokens = clip.tokenize(["two small red circles", "a star"])
    short = text_encoder(checkpoint.state_dict)(tokens[:, :12])
    assert relative_error(short, original.encode_text(tokens)) <= TOLERANCE


def test_dimensions_are_read_from_shapes():
    for name in ("demo", "ViT-B/32"):
        assert dimensions_from(load_checkpoint(name, "random").state_dict) == MODELS[name]


def test_trained_encoders_have_gradients_and_go_back_to_openai_naming():
    dims, state_dict = MODELS["demo"], load_checkpoint("demo", "random").state_dict
    image, text = ImageEncoder(dims, DIFFERENTIABLE), TextEncoder(dims, DIFFERENTIABLE)
    image.load_state_dict(image_encoder(state_dict).state_dict())
    text.load_state_dict(text_encoder(state_dict).state_dict())
    text(clip.tokenize(["a cat"])).square().sum().backward()
    assert text.blocks[0].qkv.weight.grad.abs().max() > 0
    back = to_openai(image, text, dims, state_dict["logit_scale"])
    assert back.keys() == state_dict.keys()
    assert all(torch.equal(back[name], state_dict[name]) for name in back)
