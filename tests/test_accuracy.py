"""Verification over batch sizes: an engine that is right at one size and wrong at another does not pass."""
from types import SimpleNamespace

import pytest
import torch

from clip_ttrt import accuracy
from clip_ttrt.artifact import Artifact


def artifact(batch, backend="tensorrt"):
    minimum, optimal, maximum = batch
    return Artifact(None, {"backend": backend, "computes_in": "fp16", "modules": {"image": {}}, "batch": {"minimum": minimum, "optimal": optimal, "maximum": maximum}})


@pytest.mark.parametrize("batch, expected", [((32, 32, 32), (32,)), ((1, 4, 8), (1, 2, 3, 4, 5, 6, 7, 8)), ((10, 20, 30), (10, 12, 16, 20, 24, 30)),
                                             ((3, 1000, 5000), (*accuracy.PROBED_BATCHES[2:], 1000))])
def test_sizes_lie_in_the_range_and_stay_affordable(batch, expected):
    assert accuracy.batches_to_probe(artifact(batch)) == expected
    assert accuracy.batches_to_probe(artifact(batch, "torchscript")) == ()


def test_a_wrong_size_is_found():
    rows = torch.randn(3, 7)
    reference = rows * 2
    cosines = accuracy.cosines_by_batch(lambda x: x * 2 if len(x) != 4 else x.roll(1, 0), rows, reference, (1, 3, 4, 8))
    assert list(cosines) == ["1", "3", "4", "8"]
    assert cosines["4"] < 0.9 and min(cosines["1"], cosines["3"], cosines["8"]) > 0.999999


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
