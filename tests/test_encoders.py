"""The plain encoders against OpenAI's own `clip` model, every configuration of their blocks."""
from dataclasses import replace

import clip
import pytest
import torch

from clip_ttrt import pictures
from clip_ttrt.checkpoint import load_checkpoint, original_with_weights
from clip_ttrt.encoders import ENCODERS
from clip_ttrt.families import find
from clip_ttrt.models import MODELS
from clip_ttrt.verify import COSINE_BOUND
from small import RESNET

TOLERANCE = 1e-5  # of the features' norm: fp32 sums in another order
TEXTS = ["", "a cat", "a diagram of a dog on a skateboard in front of a shop", "many words " * 60]


def relative_error(actual, expected):
    return ((actual - expected).abs().amax(dim=1) / expected.norm(dim=1)).max().item()


CHECKED = ["demo", "ViT-B/32", "ViT-B/16", "ViT-L/14", "ViT-L/14@336px", "RN50"]


@pytest.mark.parametrize("name", CHECKED)
@torch.no_grad()
def test_features_equal_the_original_model(name, monkeypatch):
    if name.startswith("ViT") and name != "ViT-B/32":  # two blocks of many
        few = replace(MODELS[name], image_layers=2, text_layers=2)
        monkeypatch.setitem(MODELS, name, few)
    weights = load_checkpoint(name, "random" if name != "demo" else "demo").state_dict
    dims, original = MODELS[name], find(name).original().eval()
    original.load_state_dict(weights)  # a ResNet's are without its counts of batches
    images = pictures.load(dims.image_resolution)[0][2:3]
    images = torch.cat([images, torch.randn_like(images)])
    tokens = clip.tokenize(TEXTS, truncate=True)
    assert tokens[-1, -1] == 49407 and tokens[0, 1] == 49407  # all 77 positions, and none
    expected = original.encode_image(images)
    image, encoder = (make(dims).load(weights) for make in ENCODERS.values())
    assert relative_error(image(images), expected) <= TOLERANCE
    expected = original.encode_text(tokens)
    assert relative_error(encoder(tokens), expected) <= TOLERANCE
    assert relative_error(encoder(tokens[:-1, :20]), expected[:-1]) <= TOLERANCE  # of padded rows


@pytest.mark.parametrize("layers", [[2, 1, 1, 1], [1, 2, 3, 1]], ids=str)
@torch.no_grad()
def test_a_small_resnet_equals_the_original_model_for_any_batch(layers, monkeypatch):
    """Blocks with and without a convolution beside them, and a width that is no power of two."""
    monkeypatch.setitem(MODELS, "small", replace(RESNET, image_layers=layers, image_width=24))
    checkpoint = load_checkpoint("small", "random")
    images = pictures.load(64)[0]
    expected = original_with_weights(checkpoint, "cpu").encode_image(images)
    encoder = checkpoint.model.encoder("image", checkpoint.state_dict)
    assert all(value.dtype == torch.float for value in encoder.parameters())
    for x in (images, images.double()):
        assert encoder(x).dtype == torch.float
        assert relative_error(encoder(x), expected) <= TOLERANCE
    assert relative_error(encoder(images[5:6]), expected[5:6]) <= TOLERANCE
    in_half = encoder.half()(images)
    assert in_half.dtype == torch.float
    assert torch.cosine_similarity(in_half, expected).min() > COSINE_BOUND["fp16"]
