"""Verification: an engine that is wrong at one batch size, or mixes rows up, does not pass."""
import math
from types import SimpleNamespace

import pytest
import torch

from clip_ttrt import verify
from clip_ttrt.checkpoint import load_checkpoint
from clip_ttrt.options import BatchRange


def artifact(minimum, optimal, maximum, backend="tensorrt", precision="fp16"):
    manifest = {"backend": backend, "computes_in": precision}
    batch = BatchRange(minimum, optimal, maximum)
    return SimpleNamespace(manifest=manifest, encoders=("image",), batch=batch)


@pytest.mark.parametrize("batch, expected", [
    ((32, 32, 32), (32,)),
    ((1, 4, 8), (1, 2, 3, 4, 5, 6, 7, 8)),
    ((10, 20, 30), (10, 12, 16, 20, 24, 30)),
    ((3, 1000, 5000), (*verify.PROBED_BATCHES[2:], 1000)),
])
def test_sizes_lie_in_the_range_and_stay_affordable(batch, expected):
    assert verify.batches_to_probe(artifact(*batch)) == expected
    assert verify.batches_to_probe(artifact(*batch, "torchscript")) == ()


def test_errors_are_of_rows():
    reference = torch.tensor([[3.0, 4.0], [0.0, 1.0], [1.0, 0.0]])
    actual = reference + torch.tensor([[0.0, 0.5], [0.0, 1.0], [0.0, 0.0]])
    found = verify.errors(actual, reference)
    assert (found["rows"], found["abs_max"], found["rel_max"]) == (3, 1.0, 1.0)
    assert found["rel_median"] == pytest.approx(0.1) and found["abs_mean"] == pytest.approx(0.25)
    assert found["cos_min"] == pytest.approx(27 / (5 * 29.25 ** 0.5), abs=1e-6)
    for value in (math.nan, math.inf):
        actual[1, 0] = value
        assert math.isnan(verify.errors(actual, reference)["cos_min"])


def test_rows_of_a_batch_are_so_different_that_one_in_another_s_place_shows():
    probes = verify.different_scenes(512, 112)
    assert probes["image"].shape == (512, 3, 112, 112) and probes["text"].shape == (512, 77)
    assert len(probes["text"].unique(dim=0)) == 512
    rows = torch.nn.functional.normalize(probes["image"].flatten(1), dim=1)
    assert (rows @ rows.T).fill_diagonal_(0).max() < verify.COSINE_BOUND["fp16"]
    assert torch.equal(verify.different_scenes(2, 112)["image"], probes["image"][:2])  # seeded


def test_a_verification_sees_rows_that_an_engine_mixes_up(demo_artifact, monkeypatch):
    """Through `compare` itself: sizes are probed as for engines, and some change rows' places."""
    def mixed(self, images):
        features = encode(self, images)
        if len(features) in apart:
            one, other = 0, apart[len(features)]
            features[[one, other]] = features[[other, one]]
        return features

    few = torch.arange(16)
    rows, labels, about = verify.inputs_for("demo", 112)
    rows = {"image": rows["image"][::8][few], "text": rows["text"]}
    monkeypatch.setattr(verify, "inputs_for", lambda *_: (rows, labels[::8][few], about))
    monkeypatch.setattr(verify, "batches_to_probe", lambda artifact: (2, 5, 8, 15))
    checkpoint, encode = load_checkpoint("demo"), verify.CompiledCLIP.encode_image
    monkeypatch.setattr(verify.CompiledCLIP, "encode_image", mixed)
    apart = {}
    assert verify.compare(demo_artifact, checkpoint)["passed"]
    apart = {5: 1, 15: 13}
    report = verify.compare(demo_artifact, checkpoint)
    [failure] = report["failures"]
    assert not report["passed"] and "at batch 5" in failure and "at batch 15" in failure
    assert "at batch 2" not in failure and "at batch 8" not in failure


def failures(report, kind="demo", precision="fp16"):
    checkpoint = SimpleNamespace(origin=SimpleNamespace(kind=kind))
    return verify.failures(artifact(1, 4, 8, precision=precision), checkpoint, report)


def test_a_wrong_size_fails_the_verification():
    report = {"errors": {"image": {"cos_min": 0.99999}},
              "batches": {"image": {"1": 0.99999, "4": 0.47, "8": math.nan}}}
    [failure] = failures(report, "random")
    assert "0.4700000 at batch 4, nan at batch 8" in failure and "at batch 1" not in failure
    report["batches"]["image"] = {"1": 0.99999}
    assert failures(report, "random") == []


@pytest.mark.parametrize("precision, change, fails", [
    ("fp16", 0.3, True), ("bf16", 0.3, False), ("bf16", 0.6, True), ("fp16", math.nan, True)])
def test_each_precision_has_its_bound_of_top1(precision, change, fails):
    report = {"errors": {"image": {"cos_min": 1.0}}, "batches": {"image": {}},
              "top1": {"reference": 90.0, "compiled": 90.0 + change}}
    assert bool(failures(report, precision=precision)) is fails
    assert failures(report, "random", precision) == []
