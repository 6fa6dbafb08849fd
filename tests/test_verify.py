"""Verification: an engine that is wrong at one batch size, or mixes rows up, does not pass."""
import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from clip_ttrt import UserError, pictures, runtime, verify
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


@pytest.mark.parametrize("count", [3, 512])
def test_rows_of_a_batch_are_so_different_that_one_in_another_s_place_shows(count):
    images, lines = pictures.load(64)
    many, texts = verify.more_images(images, count), verify.more_lines(lines, count)
    assert len(many) == len(texts) == len(set(texts)) == max(8, count)
    assert torch.equal(many[:8], images) and texts[:8] == lines
    rows = torch.nn.functional.normalize(many.flatten(1), dim=1)
    assert (rows @ rows.T).fill_diagonal_(0).max() < verify.COSINE_BOUND["fp16"]
    assert torch.equal(verify.more_images(images, count), many)  # seeded


@pytest.fixture
def compare(demo_artifact, monkeypatch):
    """`verify.compare` as of engines in fp16; a function changes each batch's features."""
    images, lines, labels, about = verify.inputs_for("demo", 112)
    checkpoint, encode = load_checkpoint("demo"), verify.CompiledCLIP.encode_image
    fp16 = replace(demo_artifact, manifest={**demo_artifact.manifest, "computes_in": "fp16"})
    monkeypatch.setattr(verify, "inputs_for", lambda *_: (images[::64], lines, labels[::64], about))
    monkeypatch.setattr(verify, "batches_to_probe", lambda artifact: (2, 5, 8, 33))

    def run(change):
        monkeypatch.setattr(verify.CompiledCLIP, "encode_image",
                            lambda self, batch: change(encode(self, batch)))
        return verify.compare(fp16, checkpoint)
    return run


def test_a_verification_sees_rows_that_an_engine_mixes_up(compare):
    def mixed(features):
        if len(features) in (5, 33):  # the last of 33 is one of the mixes
            features[[0, -1]] = features[[-1, 0]]
        if len(features) == 8:
            features[3, 0] = math.nan
        return features

    assert compare(lambda features: features)["passed"]
    report = compare(mixed)
    [failure] = report["failures"]
    assert not report["passed"] and "at batch 5" in failure and "at batch 33" in failure
    assert "at batch 2" not in failure and "nan at batch 8" in failure


def test_memory_that_runs_out_is_a_sentence_though_torchscript_says_it(compare, monkeypatch):
    def full(features):
        raise RuntimeError("The following operation failed in TorchScript: CUDA out of memory.")

    monkeypatch.setattr(runtime.torch.cuda, "mem_get_info", lambda: (0, 2**30))
    with pytest.raises(UserError, match="out of GPU memory while verifying"):
        compare(full)


@pytest.mark.parametrize("precision, change, fails", [
    ("fp16", 0.3, True), ("bf16", 0.3, False), ("bf16", 0.6, True), ("fp16", math.nan, True)])
def test_each_precision_has_its_bound_of_top1(precision, change, fails):
    report = {"errors": {"image": {"cos_min": 1.0}}, "batches": {"image": {}},
              "top1": {"reference": 90.0, "compiled": 90.0 + change}}
    for kind in ("demo", "random"):
        checkpoint = SimpleNamespace(origin=SimpleNamespace(kind=kind))
        found = verify.failures(artifact(1, 4, 8, precision=precision), checkpoint, report)
        assert bool(found) is (fails and kind == "demo")


@pytest.mark.parametrize("computes_in, fails", [("fp32", True), ("fp16", False)])
def test_an_artifact_is_held_to_the_bound_of_what_it_computes_in(computes_in, fails):
    """Whatever was asked for."""
    found = artifact(1, 4, 8, precision=computes_in)
    found.manifest["precision"] = "fp16"
    report = {"errors": {"image": {"cos_min": 0.99995}}, "batches": {"image": {}}}
    checkpoint = SimpleNamespace(origin=SimpleNamespace(kind="random"))
    assert bool(verify.failures(found, checkpoint, report)) is fails


@pytest.mark.parametrize("least, median, fails", [
    (0.9901, 0.9981, 0), (0.9899, 0.9981, 1), (0.9901, 0.9979, 1), (math.nan, math.nan, 2)])
def test_fp8_has_a_bound_of_the_median_as_well(least, median, fails):
    report = {"errors": {"image": {"cos_min": least, "cos_median": median}},
              "batches": {"image": {}}}
    checkpoint = SimpleNamespace(origin=SimpleNamespace(kind="random"))
    found = verify.failures(artifact(1, 4, 8, precision="fp8"), checkpoint, report)
    assert len(found) == fails


def test_other_inputs_that_have_no_labels_and_of_one_encoder(demo_artifact):
    """As of an artifact in fp8, whose inputs are those that calibration has not seen."""
    images, lines, _, _ = verify.inputs_for("demo", 112)
    too_long = "a photo of " + 90 * "one small red circle "
    given = images[:8], [*lines[:5], too_long], None, "mine"
    for encoders in (("image", "text"), ("text",)):
        modules = {name: demo_artifact.manifest["modules"][name] for name in encoders}
        part = replace(demo_artifact, manifest={**demo_artifact.manifest, "modules": modules})
        report = verify.compare(part, load_checkpoint("demo"), given)
        assert report["passed"] and report["inputs"] == "mine" and not report.get("top1")
        assert report["errors"]["text"]["rows"] == 6


def test_rows_are_repeated_in_another_order():
    rows = torch.randn(10, 3)
    several = verify.repeated(rows, 40)
    assert torch.equal(several[:10], rows) and torch.equal(several, verify.repeated(rows, 40))
    assert {*map(tuple, several.tolist())} == {*map(tuple, rows.tolist())}
    same = (several[:, None] == several[None]).all(2).float()
    for stride in (1, 8, 10, 16, 20):  # rows that an engine mixes up would show
        assert same.diagonal(stride).mean() < 0.4
    assert verify.repeated(["a", "b"], 1) == ["a", "b"] and len(verify.repeated(["a"], 5)) == 5
