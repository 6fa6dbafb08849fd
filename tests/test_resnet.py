"""A ResNet all the way on a CPU: compiled, verified, loaded, called on files."""
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

import clip_ttrt
from clip_ttrt import pictures, verify
from clip_ttrt.cli import main
from clip_ttrt.checkpoint import load_checkpoint, original_with_weights
from clip_ttrt.models import MODELS
from small import RESNET


@pytest.fixture(scope="module")
def artifact(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(MODELS, "small", replace(RESNET, context_length=77, vocab_size=49408))
        yield clip_ttrt.compile(model="small", weights="random", backend="torchscript",
                                batch="1:2:4", output=tmp_path_factory.mktemp("small") / "a")


def test_a_resnet_is_compiled_verified_and_loaded(artifact):
    assert artifact.verified and artifact.encoders == ("image", "text")
    model, preprocess = clip_ttrt.load(artifact.folder)
    assert model.artifact.dimensions == artifact.dimensions == MODELS["small"]
    picture = Image.open(pictures.FOLDER / "chelsea.jpg")
    images = torch.stack([preprocess(picture)] * 3)
    assert images.shape == (3, 3, 64, 64)
    original = original_with_weights(load_checkpoint("small", "random"), "cpu")
    with torch.no_grad():
        expected = original.encode_image(images)
    for features in (model.encode_image(images), model.encode_image([picture] * 3)):
        assert verify.errors(features, expected)["rel_max"] < 1e-5


def test_a_resnet_classifies_and_embeds(artifact, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    picture = pictures.FOLDER / "coffee.jpg"
    assert main(["classify", str(artifact.folder), str(picture), "--labels", "a cup", "a cat"]) == 0
    assert "a cup" in capsys.readouterr().out
    assert main(["embed", str(artifact.folder), str(picture), "--output", str(tmp_path / "o")]) == 0
    [path] = tmp_path.glob("o/img_emb/*.npy")
    model, _ = clip_ttrt.load(artifact.folder)
    expected = torch.nn.functional.normalize(model.encode_image([picture]))
    assert np.abs(np.load(path) - expected.numpy()).max() < 1e-3


@pytest.mark.parametrize("side", [288, 384, 448])
def test_the_inputs_of_a_verification_have_a_resnet_s_resolution(side):
    images, *_ = verify.inputs_for("RN50", side)
    assert images.shape == (8, 3, side, side)
    assert verify.more_images(images[:2], 3).shape == (3, 3, side, side)
