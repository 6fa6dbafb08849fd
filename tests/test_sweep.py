"""The sweep and the kernels: run whole on the CPU; what goes wrong in a row does not end them."""
import sys
from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from clip_ttrt.models import MODELS
from experiments import baselines, floor, kernels, sweep
from experiments.record import provenance, read_rows
from experiments.timing import percentile, sets_for

ENCODERS = pytest.mark.parametrize("encoder", ["image", "text"])
COLUMNS = [
    "model", "encoder", "batch", "precision", "backend", "kernels", "how", "median_ms", "p90_ms",
    "gpu", "torch", "torch_tensorrt", "tensorrt", "commit", "date",
]  # fmt: skip
ON_CPU = pytest.mark.skipif(torch.cuda.is_available(), reason="its rows are those of a CPU")
JOB = sweep.Job("demo", "text", "fp32", "eager", [1, 2], "cpu", ["call"], repeats=3)


@ON_CPU
def test_the_embedded_model_on_a_cpu(tmp_path, capfd):
    out = tmp_path / "speed.csv"
    options = ["--models", "demo", "--encoders", "text", "--precision", "fp32", "--batches", "1",
               "4", "--repeats", "5", "--out", str(out)]  # fmt: skip
    ours = ["--backends", "clip_ttrt", "eager", "--range", "1:4:4", "--backend", "torchscript"]
    assert sweep.main([*options, *ours, "--artifacts", str(tmp_path / "artifacts")]) == 0
    assert out.read_text().splitlines()[0].split(",") == COLUMNS
    rows = read_rows(out)
    expected = [(name, batch) for name in ("clip_ttrt 1:4:4", "eager") for batch in ("1", "4")]
    assert [(row["backend"], row["batch"]) for row in rows] == expected
    here = {name: value for name, value in provenance().items() if name != "date"}
    for row in rows:
        assert 0 < float(row["median_ms"]) <= float(row["p90_ms"])
        assert (row["how"], row["kernels"]) == ("call", "") and here.items() <= row.items()
    plot = tmp_path / "speed.png"
    assert plot.is_file() and plot.stat().st_size > 10_000 or "no plot" in capfd.readouterr().err
    assert sweep.main([*options, "--backends", "eager", "--resume"]) == 0
    assert read_rows(out) == rows


@pytest.mark.parametrize("option", [["--range", "8:4:1"], ["--static", "0"], ["--models", "no"]])
def test_what_cannot_be_compiled_is_refused_at_once(option, capsys):
    with pytest.raises(SystemExit) as ended:
        sweep.main(option)
    assert ended.value.code == 2 and option[1] in capsys.readouterr().err


@pytest.mark.parametrize("body, seconds, measured, said", [
    ("os.abort() if batch == 8 else None", 60, [1, 32], "batch 8: SIGABRT"),
    ("time.sleep(60 * (batch == 32))", 2, [1, 8], "batch 32: SIGKILL"),
    ("sys.exit(2) if batch == 8 else None", 60, [1], ""),
])  # fmt: skip
def test_what_ends_a_process_costs_its_own_batch(
    body, seconds, measured, said, tmp_path, monkeypatch, capfd
):
    script = tmp_path / "python"  # in the place of the interpreter
    script.write_text(f"""#!{sys.executable}
import json, os, sys, time
for batch in json.loads(sys.argv[-1])["batches"]:
    {body}
    print("sweep-rows " + json.dumps([{{"batch": batch}}]), flush=True)
""")
    script.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(script))
    rows = list(sweep.run_job(replace(JOB, batches=[1, 8, 32]), seconds))
    assert [row["batch"] for row in rows] == measured
    assert capfd.readouterr().err.strip().endswith(said)


@pytest.mark.parametrize("backend, said", [
    ("clip", "the original model has no bf16"),
    ("onnxruntime", "pip install onnxruntime-gpu"),
])  # fmt: skip
def test_a_peer_that_cannot_be_had_is_one_sentence(backend, said, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    job = sweep.asdict(replace(JOB, backend=backend, precision="bf16"))
    assert sweep.child(sweep.json.dumps(job)) == 2
    told = capsys.readouterr()
    assert told.out == "" and len(told.err.splitlines()) == 1 and said in told.err


def test_an_exception_costs_its_own_batch_alone(monkeypatch, capsys):
    def run(x):
        if len(x) == 1:
            raise torch.cuda.OutOfMemoryError("no room")
        return x

    monkeypatch.setitem(sweep.PEERS, "eager", lambda *_: run)
    assert [[row["batch"] for row in rows] for rows in sweep.rows_of(JOB)] == [[], ["2"]]
    assert "batch 1: OutOfMemoryError: no room" in capsys.readouterr().err


def test_an_artifact_is_measured_as_what_it_is_and_not_where_it_is_wrong(
    demo_artifact, tmp_path, monkeypatch, capsys
):
    options = sweep.parse(["--backends", "clip_ttrt", "--range", "2:4:8", "--batches", "1", "2"])
    found = {"code": 0, "artifact": demo_artifact}
    monkeypatch.setattr(
        sweep, "compile_in_process", lambda *_, **__: (found["code"], demo_artifact.folder))
    monkeypatch.setattr(sweep, "read_artifact", lambda _: found["artifact"])
    _, job = sweep.jobs_of(options)
    assert (job.backend, job.kernels, list(job.batches)) == ("clip_ttrt 2:4:8", "", [2])
    [[row]] = sweep.rows_of(replace(job, device="cpu", hows=["call"], repeats=1))
    assert row["torch"] == demo_artifact.manifest["versions"]["torch"]
    wrong = {**demo_artifact.manifest, "verification": {"passed": False}}
    for change in ({"code": 1}, {"code": 0, "artifact": replace(demo_artifact, manifest=wrong)}):
        found.update(change)
        assert list(sweep.jobs_of(options)) == []
        assert "was not compiled, or failed its verification" in capsys.readouterr().err


def test_ratios_are_of_the_same_cell():
    def row(backend, how, median_ms, batch="1", kernels=""):
        return {"model": "demo", "encoder": "text", "precision": "fp16", "kernels": kernels,
                "batch": batch, "backend": backend, "how": how, "median_ms": median_ms}

    rows = [row("torch.compile", "graph", "2.0"), row("torch.compile", "call", "8.0"),
            row("clip_ttrt 1:2:8", "graph", "1.0", kernels="fused"),
            row("clip_ttrt", "graph", "1.0", batch="8")]  # fmt: skip
    expected = "| demo text 1 fp16 graph | clip_ttrt 1:2:8 fused | 1.000 | 2.000 | 0.500 |"
    assert sweep.ratios(rows).splitlines()[2:] == [expected]


@ENCODERS
def test_the_floor_counts_the_work_of_the_encoder(encoder):
    module = baselines.rearranged("demo", encoder, "fp32", "cpu")
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        module(baselines.example("demo", encoder, 3, torch.float32, "cpu"))
    work = floor.work_of(MODELS["demo"], encoder, 3)
    products = sum(2 * m * k * n * times for m, k, n, times in work.products)
    assert counter.get_total_flops() == products  # on the CPU it counts no attention
    heads, tokens = (3, 50) if encoder == "image" else (2, 77)
    attention = 4 * 3 * heads * tokens**2 * 64 * (6 if encoder == "image" else 4 / 2)
    assert work.flops == products + attention
    [[row]] = sweep.rows_of(replace(JOB, encoder=encoder, backend="floor", batches=[1]))
    assert float(row["median_ms"]) > 0


@ENCODERS
def test_rows_of_an_example_are_each_another(encoder):
    x = baselines.example("demo", encoder, 64, torch.float16, "cpu")
    assert len(x.flatten(1).unique(dim=0)) == 64
    if encoder == "text":
        ends = x.argmax(dim=1)
        assert len(ends.unique()) > 32 and (x.gather(1, ends[:, None]) == baselines.END).all()


@ENCODERS
def test_the_plain_encoder_is_the_original_s_and_the_rearranged_one_gives_the_same(encoder):
    x = baselines.example("demo", encoder, 3, torch.float, "cpu")
    with torch.no_grad():
        expected = baselines.clip("demo", encoder, "fp32", "cpu")(x)
        for peer in (baselines.plain, baselines.rearranged):
            features = peer("demo", encoder, "fp32", "cpu")(x)
            assert torch.allclose(features, expected, atol=1e-4 * expected.abs().max().item())
    layers = [type(module) for module in baselines.plain("demo", encoder, "fp32", "cpu").modules()]
    assert (torch.nn.Conv2d in layers) is (encoder == "image")


def test_percentiles_are_those_of_the_nearest_rank_and_sets_exceed_a_cache():
    values = [float(value) for value in range(100, 0, -1)]
    assert [percentile(values, share) for share in (0.5, 0.9, 0.99)] == [50, 90, 99]
    assert percentile([7.0], 0.99) == 7
    assert [sets_for(size) for size in (1, 100 << 20, 1 << 30)] == [64, 2, 1]


def test_kernels_have_rows_on_a_cpu(tmp_path, capsys):
    out = tmp_path / "kernels.csv"
    options = ["--device", "cpu", "--models", "demo", "--out", str(out)]
    assert kernels.main([*options, "--batches", "2"]) == 0
    rows = read_rows(out)
    measured = {"op", "model", "encoder", "batch", "shape", "dtype", "backend", "median_us",
                "p90_us", "gb_per_s", "tflop_per_s"}  # fmt: skip
    assert set(rows[0]) == measured | set(COLUMNS[-6:])
    assert {row["op"].split()[0] for row in rows} == set(kernels.OPS)
    for row in rows:
        assert row["backend"] == "reference" and 0 < float(row["median_us"]) <= float(row["p90_us"])
        assert bool(row["tflop_per_s"]) is row["op"].startswith(("attention", "linear", "patches e"))
    assert kernels.main([*options, "--seconds", "0"]) == 1 and read_rows(out) == rows
    assert f"{len(rows)} shapes are left out" in capsys.readouterr().err


@pytest.mark.parametrize("op", kernels.OPS)
def test_what_is_compiled_beside_a_kernel_is_one_graph_of_the_same_numbers(op):
    at = [kernels.Place("demo", encoder, 2, "cpu") for encoder in ("image", "text")]
    for case in [case for place in at for case in kernels.OPS[op](place)]:
        peers = set(case.backends("cuda")) - {"ours"}
        assert peers == set(case.libraries or ["torch.compile"])
        torch._dynamo.reset()
        inputs, compiled = case.inputs(), torch.compile(case.reference, backend="eager",
                                                        fullgraph=True)  # fmt: skip
        torch.testing.assert_close(compiled(*inputs), case.reference(*inputs))
