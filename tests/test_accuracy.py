"""Verification over batch sizes: an engine that is right at one size and wrong at another does not pass."""
from types import SimpleNamespace

import clip
import pytest
import torch

from clip_ttrt import accuracy, pictures
from clip_ttrt.artifact import Artifact
from clip_ttrt.checkpoint import load_checkpoint


def artifact(batch, backend="tensorrt"):
    minimum, optimal, maximum = batch
    return Artifact(None, {"backend": backend, "computes_in": "fp16", "modules": {"image": {}}, "batch": {"minimum": minimum, "optimal": optimal, "maximum": maximum}})


@pytest.mark.parametrize("batch, expected", [((32, 32, 32), (32,)), ((1, 4, 8), (1, 2, 3, 4, 5, 6, 7, 8)), ((10, 20, 30), (10, 12, 16, 20, 24, 30)),
                                             ((3, 1000, 5000), (*accuracy.PROBED_BATCHES[2:], 1000))])
def test_sizes_lie_in_the_range_and_stay_affordable(batch, expected):
    assert accuracy.batches_to_probe(artifact(batch)) == expected
    assert accuracy.batches_to_probe(artifact(batch, "torchscript")) == ()


def test_a_wrong_size_is_found():
    rows = torch.randn(20, 7)
    cosines = accuracy.cosines_by_batch(lambda x: x * 2 if len(x) != 4 else x.roll(1, 0), rows, rows * 2, (1, 3, 4, 8))
    assert list(cosines) == ["1", "3", "4", "8"]
    assert cosines["4"] < 0.9 and min(cosines["1"], cosines["3"], cosines["8"]) > 0.999999


@pytest.mark.parametrize("apart", [1, 8, 13])
def test_rows_in_one_another_s_place_are_found_however_far_apart(apart):
    def mixed(x):
        order = torch.arange(len(x))
        if len(x) > apart:
            order[0], order[apart] = apart, 0
        return x[order]

    images = accuracy.distinct_images(torch.randn(8, 3, 16, 16), 16)
    rows = images.flatten(1)
    cosines = accuracy.cosines_by_batch(mixed, rows, rows, (1, 16))
    assert cosines["1"] > 0.999999 and cosines["16"] < 0.99


@pytest.mark.parametrize("count", [3, 8, 512])
def test_rows_are_each_another_and_the_given_ones_come_first(count):
    images, captions = pictures.load(224)
    tokens = clip.tokenize(captions)
    many, texts = accuracy.distinct_images(images, count), accuracy.distinct_tokens(tokens, count)
    assert len(many) == len(texts) == max(8, count)
    assert torch.equal(many[:8], images) and torch.equal(texts[:8], tokens) and texts.dtype == tokens.dtype
    assert len(many.flatten(1).unique(dim=0)) == len(texts.unique(dim=0)) == len(many)
    assert ((texts == 49407).sum(1) == 1).all() and (texts[:, 0] == 49406).all()
    similarity = torch.nn.functional.normalize(many.flatten(1), dim=1)
    assert (similarity @ similarity.T).fill_diagonal_(0).max() < accuracy.COSINE_BOUND["fp16"]
    assert torch.equal(accuracy.distinct_images(images, count), many)  # seeded


def test_too_few_texts_are_named():
    with pytest.raises(ValueError, match="1 texts do not suffice for 50"):
        accuracy.distinct_tokens(torch.tensor([[49406, 5, 49407, 0, 0]]), 50)


def test_a_verification_sees_rows_that_an_engine_mixes_up(demo_artifact, monkeypatch):
    """Through `compare` itself: sizes are probed as for engines, and one of them changes two rows' places."""
    monkeypatch.setattr(accuracy, "batches_to_probe", lambda artifact: (2, 5, 8))
    checkpoint, encode = load_checkpoint("demo"), accuracy.CompiledCLIP.encode_image
    assert accuracy.compare(demo_artifact, checkpoint)["passed"]

    def mixed(self, images):
        features = encode(self, images)
        return features[[1, 0, *range(2, 5)]] if len(images) == 5 else features

    monkeypatch.setattr(accuracy.CompiledCLIP, "encode_image", mixed)
    report = accuracy.compare(demo_artifact, checkpoint)
    assert not report["passed"] and any("at batch 5" in failure for failure in report["failures"])


def test_a_wrong_size_fails_the_verification():
    report = {"errors": {"image": {"cos_min": 0.99999}}, "batches": {"image": {"1": 0.99999, "4": 0.47, "8": float("nan")}}}
    [failure] = accuracy.failures(artifact((1, 4, 8)), SimpleNamespace(origin=SimpleNamespace(kind="random")), report)
    assert "0.4700000 at batch 4" in failure and "nan at batch 8" in failure and "at batch 1" not in failure
    report["batches"]["image"] = {"1": 0.99999}
    assert accuracy.failures(artifact((1, 4, 8)), SimpleNamespace(origin=SimpleNamespace(kind="random")), report) == []


@pytest.mark.parametrize("precision, change, fails", [("fp16", 0.3, True), ("bf16", 0.3, False), ("bf16", 0.6, True), ("fp16", float("nan"), True)])
def test_each_precision_has_its_bound_of_top1(precision, change, fails):
    made = artifact((1, 4, 8))
    made.manifest["computes_in"] = precision
    report = {"errors": {"image": {"cos_min": 1.0}}, "batches": {"image": {}}, "top1": {"reference": 90.0, "compiled": 90.0 + change}}
    assert bool(accuracy.failures(made, SimpleNamespace(origin=SimpleNamespace(kind="demo")), report)) is fails
