"""The ladder: its graphs compute what the encoder computes, and its rows come in order, failures included."""
import csv
import json
from types import SimpleNamespace

import pytest
import torch

from clip_ttrt import fusion, ops
from clip_ttrt.encoders import DIFFERENTIABLE, ENCODERS
from experiments import builds, ladder
from experiments.baselines import Request, checkpoint_of, example
import needs

TOKENS = {"image": 50, "text": 77}


@needs.export
@pytest.mark.parametrize("encoder", ["image", "text"])
@pytest.mark.parametrize("rows, fusions", [(False, ()), (True, ()), (True, fusion.PASSES)])
def test_every_graph_computes_the_encoder(encoder, rows, fusions):
    request = Request("demo", "demo", encoder, "fp32", 3, TOKENS[encoder], "cpu")
    graph = ladder.graph_of(request, rows, fusions)
    x = example(request)
    with torch.no_grad():
        expected = ENCODERS[encoder](checkpoint_of(request).state_dict, DIFFERENTIABLE)(x)
        assert (graph(x) - expected).abs().max() < 1e-5 * expected.abs().max()
    targets = {node.target for node in graph.graph.nodes}
    assert (ops.attention_rows in targets) == rows and (ops.attention in targets) == (not rows)
    assert (ops.bias_quick_gelu in targets) == (ops.linear_rows in targets) == bool(fusions)


def test_rows_come_in_order_and_a_failed_build_is_one(tmp_path, monkeypatch):
    def built(step, options, request, target):
        return "the build ended with 1: no" if step == "stock Torch-TensorRT" else ""

    times = iter(range(10, 0, -1))
    monkeypatch.setattr(ladder, "built_in_process", built)
    monkeypatch.setattr(ladder, "subject_of", lambda step, request, target, artifacts: (None, {}))
    monkeypatch.setattr(ladder, "measured", lambda step, subject, facts: {"median_ms": f"{next(times)}.0", "graph_ms": "0.5", "engines": 1, "build_s": 0, "error": ""})
    out = tmp_path / "ladder.csv"
    ladder.main(["--model", "demo", "--batch", "2", "--out", str(out)])
    with open(out, newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["step"] for row in rows] == list(ladder.STEPS)
    by_step = {row["step"]: row for row in rows}
    assert by_step["stock Torch-TensorRT"]["median_ms"] == "" and by_step["stock Torch-TensorRT"]["error"] == "the build ended with 1: no"
    assert by_step["the original, eager"]["median_ms"] == "10.0"
    assert by_step["CUDA graph"]["median_ms"] == by_step["linear layers by cuBLASLt"]["graph_ms"] == "0.5"


def test_an_engine_that_is_there_is_not_built_again(tmp_path):
    target = tmp_path / "engine.ts"
    target.with_suffix(".json").write_text(json.dumps({"engines": 1, "build_s": 1}))
    options, request = SimpleNamespace(model="demo", encoder="image", batch=2, artifacts=None, existing=True), Request("demo", "demo", "image", "fp16", 2, 50, "cpu")
    assert ladder.built_in_process("activations as rows", options, request, tmp_path / "other.ts") == "its engine is not there"
    assert ladder.built_in_process("activations as rows", options, request, target) == ""
    assert ladder.artifact_of("activations as rows", request, None) is None and ladder.artifact_of("activations as rows", request, tmp_path) is None


def test_an_artifact_serves_as_the_step_that_it_is(demo_artifact, tmp_path):
    request = Request("demo", "demo", "image", "fp16", 2, 50, "cpu")
    (tmp_path / "demo-fp16-2-native").symlink_to(demo_artifact.folder)
    assert ladder.artifact_of("activations as rows", request, tmp_path) == tmp_path / "demo-fp16-2-native"
    assert ladder.artifact_of("linear layers by cuBLASLt", request, tmp_path) is None and ladder.artifact_of("attention plugin", request, tmp_path) is None
    (tmp_path / "demo-fp16-2-plugin-image").symlink_to(demo_artifact.folder)  # as the sweep names it
    assert ladder.artifact_of("linear layers by cuBLASLt", request, tmp_path) == tmp_path / "demo-fp16-2-plugin-image"


def test_engines_of_a_build_that_was_cut_are_measured_without_those_it_lost(tmp_path, monkeypatch):
    def child(command, **_):
        step, target = command[command.index("--build") + 1:]
        if step == "attention plugin":
            return SimpleNamespace(returncode=-9)
        monkeypatch.setitem(ladder.STEPS, step, lambda request: (torch.jit.trace(torch.nn.ReLU(), torch.zeros(1)), {"engines": 1}))
        ladder.main(command[3:])
        return SimpleNamespace(returncode=0)

    def subject_of(step, request, target, artifacts):
        assert step in ladder.EAGER or ladder.artifact_of(step, request, artifacts) or torch.jit.load(str(target))(torch.ones(1)) == 1
        return None, {}

    monkeypatch.setattr(builds, "subprocess", SimpleNamespace(run=child, STDOUT=None))
    monkeypatch.setattr(ladder, "subject_of", subject_of)
    monkeypatch.setattr(ladder, "measured", lambda step, subject, facts: {"median_ms": "1.0", "graph_ms": "0.5", "engines": 1, "build_s": 0, "error": ""})
    arguments = ["--model", "demo", "--batch", "2", "--engines", str(tmp_path / "engines"), "--out", str(tmp_path / "ladder.csv")]
    ladder.main([*arguments, "--build-only", "--jobs", "3"])
    assert not (tmp_path / "ladder.csv").exists() and len(list((tmp_path / "engines").glob("*.ts"))) == 5
    damaged = tmp_path / "artifacts" / "demo-fp16-2-native" / "manifest.json"
    damaged.parent.mkdir(parents=True)
    damaged.write_text("{")
    monkeypatch.setattr(builds, "subprocess", None)  # nothing is built now
    ladder.main([*arguments, "--existing", "--artifacts", str(tmp_path / "artifacts")])
    with open(tmp_path / "ladder.csv", newline="") as file:
        rows = {row["step"]: row for row in csv.DictReader(file)}
    assert list(rows) == list(ladder.STEPS)
    assert {step: row["error"] for step, row in rows.items() if row["error"]} == {"attention plugin": "its engine is not there"}
    assert all(row["median_ms"] for step, row in rows.items() if step != "attention plugin")


def test_a_step_that_cannot_be_measured_is_a_row_with_its_error(tmp_path):
    request = Request("demo", "demo", "image", "fp16", 2, 50, "cpu")  # no half on the CPU
    row = ladder.prepared("our encoders, eager", request, tmp_path / "none.ts")()
    assert row["median_ms"] == "" and row["error"].startswith("Missing: fp16 on the CPU")
