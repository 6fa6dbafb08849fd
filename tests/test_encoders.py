"""The plain encoders against OpenAI's own `clip` model, every configuration."""
import clip
import pytest
import torch

from clip_ttrt import pictures
from clip_ttrt.checkpoint import load_checkpoint, original_model
from clip_ttrt.encoders import image_encoder, text_encoder
from clip_ttrt.models import MODELS, dimensions_from

TOLERANCE = 1e-5  # of the features' norm: fp32 sums in another order
TEXTS = ["", "a cat", "a diagram of a dog on a skateboard in front of a shop", "many words " * 60]


def relative_error(actual, expected):
    return ((actual - expected).abs().amax(dim=1) / expected.norm(dim=1)).max().item()


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_features_equal_the_original_model(name):
    weights = load_checkpoint(name, "random" if name != "demo" else "demo").state_dict
    dims = dimensions_from(weights)
    assert dims == MODELS[name]
    original = original_model(dims).eval()
    original.load_state_dict(weights)
    images = pictures.load(dims.image_resolution)[0][2:3]
    images = torch.cat([images, torch.randn_like(images)])
    tokens = clip.tokenize(TEXTS, truncate=True)
    assert tokens[-1, -1] == 49407 and tokens[0, 1] == 49407  # all 77 positions, and none
    expected = original.encode_image(images)
    assert relative_error(image_encoder(weights)(images), expected) <= TOLERANCE
    expected, encoder = original.encode_text(tokens), text_encoder(weights)
    assert relative_error(encoder(tokens), expected) <= TOLERANCE
    assert relative_error(encoder(tokens[:-1, :20]), expected[:-1]) <= TOLERANCE  # of padded rows
