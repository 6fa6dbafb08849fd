"""The sweep: run whole on the CPU, and nothing that goes wrong in a row ends it."""
import importlib.util
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from clip_ttrt.errors import UserError
from clip_ttrt.models import MODELS
from experiments import baselines, floor, sweep
from experiments.record import PROVENANCE, provenance, read_rows
from experiments.timing import percentile

JOB = sweep.Job("demo", "text", "fp32", "eager", (1, 2), "cpu", repeats=3, hows=("call",))

# Stands in for the interpreter of a job: it ends itself when its first batch is 8.
DIES_AT_8 = """
    for batch in job["batches"]:
        if batch == 8:
            os.abort()
        print("sweep-row " + json.dumps({"batch": batch}), flush=True)
        print(f"sweep-done {batch}", flush=True)
"""


@pytest.fixture
def stand_in(tmp_path, monkeypatch):
    """A function that puts a program in the place of a job's process."""

    def install(body):
        script = tmp_path / "python"
        head = f"#!{sys.executable}\nimport json, os, sys, time\njob = json.loads(sys.argv[-1])\n"
        script.write_text(head + "if True:\n" + body)
        script.chmod(0o755)
        monkeypatch.setattr(sys, "executable", str(script))

    return install


def sweeping(out, *arguments):
    command = [
        sys.executable, "-m", "experiments.sweep", "--models", "demo", "--encoders", "text",
        "--precision", "fp32", "--batches", "1", "4", "--repeats", "5", "--out", str(out),
        *arguments,
    ]  # fmt: skip
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.mark.skipif(torch.cuda.is_available(), reason="its rows are those of a CPU")
def test_the_embedded_model_on_a_cpu(tmp_path):
    out, artifacts = tmp_path / "speed.csv", ("--artifacts", str(tmp_path / "artifacts"))
    options = ("--backends", "clip_ttrt", "eager", "--range", "1:4:4", *artifacts)
    done = sweeping(out, *options, "--backend", "torchscript")
    assert done.returncode == 0, done.stderr
    rows = read_rows(out)
    assert tuple(rows[0]) == (
        "model", "encoder", "batch", "precision", "backend", "kernels", "how", "median_ms",
        "p90_ms", "gpu", "torch", "torch_tensorrt", "tensorrt", "commit", "date",
    )  # fmt: skip
    assert [(row["backend"], row["batch"]) for row in rows] == [
        ("clip_ttrt 1:4:4", "1"), ("clip_ttrt 1:4:4", "4"), ("eager", "1"), ("eager", "4"),
    ]  # fmt: skip
    here = provenance()
    for row in rows:
        assert float(row["median_ms"]) > 0 and row["how"] == "call" and row["kernels"] == ""
        assert float(row["p90_ms"]) >= float(row["median_ms"])
        assert all(row[name] == here[name] for name in PROVENANCE if name != "date")
    if importlib.util.find_spec("matplotlib"):
        assert (tmp_path / "speed.png").stat().st_size > 10_000
    else:
        assert "no plot: " in done.stderr
    again = sweeping(out, "--backends", "eager", "--resume")
    assert again.returncode == 0 and read_rows(out) == rows


def test_a_crash_costs_its_own_batch_alone(stand_in, capfd):
    stand_in(DIES_AT_8)
    rows = list(sweep.run_job(replace(JOB, batches=(1, 8, 32)), 60))
    assert [row["batch"] for row in rows] == [1, 32]
    told = capfd.readouterr().err.splitlines()
    assert len(told) == 1 and told[0].endswith("batch 8: SIGABRT")


def test_a_batch_that_takes_too_long_is_left_out(stand_in, capfd):
    stand_in("    time.sleep(60)")
    assert list(sweep.run_job(replace(JOB, batches=(1,)), 0.5)) == []
    assert "batch 1: SIGKILL" in capfd.readouterr().err


def test_what_holds_for_all_batches_is_said_once(capfd):
    assert list(sweep.run_job(replace(JOB, backend="clip", precision="bf16"), 60)) == []
    assert capfd.readouterr().err.count("the original model has no bf16") == 1


def test_an_exception_costs_its_own_batch_alone(monkeypatch, capsys):
    def encoder(*_):
        def run(x):
            if len(x) == 1:
                raise torch.cuda.OutOfMemoryError("no room")
            return x

        return run

    monkeypatch.setitem(sweep.PEERS, "eager", encoder)
    rows = [row for row in sweep.rows_of(JOB) if row]
    assert [row["batch"] for row in rows] == [2]
    assert "batch 1: OutOfMemoryError: no room" in capsys.readouterr().err


def test_an_artifact_that_is_wrong_is_not_measured(demo_artifact, monkeypatch, capsys):
    options = sweep.parse(["--backends", "clip_ttrt", "--range", "none", "--static", "4"])
    options.artifacts = demo_artifact.folder.parent
    wrong = {**demo_artifact.manifest, "verification": {"passed": False}}
    monkeypatch.setattr(sweep, "compile_in_process", lambda *_, **__: 0)
    monkeypatch.setattr(sweep, "read_artifact", lambda _: replace(demo_artifact, manifest=wrong))
    assert list(sweep.jobs_of(options)) == []
    assert "failed its verification" in capsys.readouterr().err
    monkeypatch.setattr(sweep, "compile_in_process", lambda *_, **__: 1)
    with pytest.raises(UserError, match="demo-.*-4-auto-both was not compiled"):
        sweep.artifact_for(options, "demo", "4", "auto")


def test_an_artifact_s_rows_tell_its_range_and_its_versions(demo_artifact):
    static = {**demo_artifact.manifest, "batch": {"minimum": 4, "optimal": 4, "maximum": 4}}
    assert sweep.label(demo_artifact) == "clip_ttrt 2:4:8"
    assert sweep.label(replace(demo_artifact, manifest=static)) == "clip_ttrt"
    job = replace(JOB, backend="clip_ttrt", artifact=str(demo_artifact.folder))
    calls, columns = sweep.calls_of(job)
    assert list(calls) == ["call"]
    assert columns["torch"] == demo_artifact.manifest["versions"]["torch"]
    x = baselines.example("demo", "text", 2, torch.float32, "cpu")
    plain = baselines.plain("demo", "text", "fp32", "cpu")(x)
    torch.testing.assert_close(calls["call"](x), plain, rtol=1e-4, atol=1e-5)


def test_ratios_are_of_the_same_cell():
    row = {"model": "demo", "encoder": "text", "precision": "fp16", "kernels": ""}
    rows = [
        {**row, "batch": 1, "backend": "torch.compile", "how": "graph", "median_ms": "2.0"},
        {**row, "batch": 1, "backend": "torch.compile", "how": "call", "median_ms": "8.0"},
        {**row, "batch": "1", "backend": "clip_ttrt 1:2:8", "kernels": "fused", "how": "graph",
         "median_ms": "1.0"},
        {**row, "batch": 8, "backend": "clip_ttrt", "how": "graph", "median_ms": "1.0"},
    ]  # fmt: skip
    lines = sweep.ratios(rows).splitlines()
    assert lines[2:] == [
        "| demo text 1 fp16 graph | clip_ttrt 1:2:8 fused | 1.000 | 2.000 | 0.500 |"
    ]


def test_the_floor_is_a_row(monkeypatch):
    parts = {"products": 1.0, "attention": 0.25, "norms": 0.5, "sum": 1.75}
    monkeypatch.setattr(sweep, "floor_ms", lambda *_: parts)
    for device, how in (("cpu", "call"), ("cuda", "graph")):
        rows = list(sweep.rows_of(replace(JOB, backend="floor", device=device)))
        assert [(row["how"], row["median_ms"]) for row in rows if row] == [(how, "1.7500")] * 2


@pytest.mark.parametrize("encoder", ["image", "text"])
def test_the_floor_counts_the_work_of_the_encoder(encoder):
    module = baselines.rearranged("demo", encoder, "fp32", "cpu")
    x = baselines.example("demo", encoder, 3, torch.float32, "cpu")
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        module(x)
    counted, work = counter.get_total_flops(), floor.work_of(MODELS["demo"], encoder, 3)
    products = sum(2 * m * k * n * times for m, k, n, times in work.products)
    assert counted == products  # on the CPU it counts no attention
    heads, tokens = (3, 50) if encoder == "image" else (2, 77)
    attention = 4 * 3 * heads * tokens**2 * 64 * (6 if encoder == "image" else 4 / 2)
    assert work.flops == products + attention


@pytest.mark.parametrize("encoder", ["image", "text"])
def test_rows_of_an_example_are_each_another(encoder):
    x = baselines.example("demo", encoder, 64, torch.float16, "cpu")
    assert len(x.flatten(1).unique(dim=0)) == 64
    if encoder == "text":
        ends = x.argmax(dim=1)
        assert len(ends.unique()) > 32 and (x.gather(1, ends[:, None]) == baselines.END).all()


def test_percentiles_are_those_of_the_nearest_rank():
    values = [float(value) for value in range(100, 0, -1)]
    assert [percentile(values, share) for share in (0.5, 0.9, 0.99)] == [50, 90, 99]
    assert percentile([7.0], 0.99) == 7


@pytest.mark.parametrize("encoder", ["image", "text"])
def test_the_plain_encoder_is_the_original_s_and_the_rearranged_one_gives_the_same(encoder):
    x = baselines.example("demo", encoder, 3, torch.float, "cpu")
    with torch.no_grad():
        expected = baselines.clip("demo", encoder, "fp32", "cpu")(x)
        for peer in (baselines.plain, baselines.rearranged):
            features = peer("demo", encoder, "fp32", "cpu")(x)
            assert torch.allclose(features, expected, atol=1e-4 * expected.abs().max().item())
    layers = [type(module) for module in baselines.plain("demo", encoder, "fp32", "cpu").modules()]
    assert (torch.nn.Conv2d in layers) is (encoder == "image")
