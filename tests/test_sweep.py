"""The sweep and the kernels: run whole on the CPU; what goes wrong in a row does not end them."""
import json
import sys
from dataclasses import asdict, replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from clip_ttrt.models import MODELS
from experiments import baselines, floor, kernels, sweep
from experiments.record import provenance, read_rows

COLUMNS = (
    "model,encoder,batch,precision,backend,kernels,how,tokens,resolution,median_ms,p90_ms,"
    "build_s,memory_mib,gpu,torch,torch_tensorrt,tensorrt,commit,date"
)
ENCODERS = pytest.mark.parametrize("encoder", ["image", "text"])
JOB = sweep.Job("demo", "text", "bf16", "eager", [1, 2], "cpu", ["call"], repeats=3)


@pytest.mark.skipif(torch.cuda.is_available(), reason="its rows are those of a CPU")
def test_the_embedded_model_on_a_cpu(tmp_path, capfd):
    out = tmp_path / "speed.csv"
    options = ["--encoders", "text", "--batches", "1", "4", "--repeats", "5", "--out", str(out),
               "--tokens", "16"]  # fmt: skip
    ours = ["--backends", "clip_ttrt", "eager", "--range", "1:4:4", "--backend", "torchscript"]
    assert sweep.main([*options, *ours, "--artifacts", str(tmp_path / "artifacts")]) == 0
    assert out.read_text().splitlines()[0] == COLUMNS
    rows = read_rows(out)
    expected = [(name, batch) for name in ("clip_ttrt 1:4:4", "eager") for batch in ("1", "4")]
    assert [(row["backend"], row["batch"]) for row in rows] == expected
    here = {name: value for name, value in provenance().items() if name != "date"}
    for row in rows:
        assert 0 < float(row["median_ms"]) <= float(row["p90_ms"])
        assert (row["how"], row["kernels"]) == ("call", "") and here.items() <= row.items()
        assert (row["tokens"], row["resolution"], row["memory_mib"]) == ("16", "", "")
        assert bool(row["build_s"]) is (row["backend"] != "eager")
    plot = tmp_path / "speed.png"
    assert plot.is_file() and plot.stat().st_size > 10_000 or "no plot" in capfd.readouterr().err
    assert sweep.main([*options, "--backends", "eager", "--resume"]) == 0
    assert read_rows(out) == rows


def test_texts_have_a_job_for_each_length_and_images_one():
    options = sweep.parse(["--tokens", "0", "16", "--backends", "eager", "--batches", "3"])
    jobs = list(sweep.jobs_of(options))
    assert [(job.encoder, job.tokens) for job in jobs] == [("image", 0), ("text", 0), ("text", 16)]
    assert [job.key(3, "call")[-1] for job in jobs] == ["", "", "16"]
    tokens = baselines.example("demo", "text", 3, torch.float32, "cpu", 16)
    assert tokens.shape == (3, 16) and (tokens.amax(1) == 49407).all()


@pytest.mark.parametrize("option", [["--range", "8:4:1"], ["--static", "0"], ["--models", "no"]])
def test_what_cannot_be_compiled_is_refused_at_once(option, capsys):
    with pytest.raises(SystemExit) as ended:
        sweep.main(option)
    assert ended.value.code == 2 and option[1] in capsys.readouterr().err


@pytest.mark.parametrize("body, seconds, measured, said", [
    ("if batch == 8: os.abort()", 60, [1, 32], "batch 8: SIGABRT"),
    ("if batch == 32: time.sleep(60)", 2, [1, 8], "batch 32: SIGKILL"),
])  # fmt: skip
def test_what_ends_a_process_costs_its_own_batch(
    body, seconds, measured, said, tmp_path, monkeypatch, capfd
):
    script = tmp_path / "python"  # in the place of the interpreter
    script.write_text(
        f"#!{sys.executable}\nimport json, os, sys, time\n"
        f"for batch in json.loads(sys.argv[-1])['batches']:\n    {body}\n"
        "    print('sweep-rows ' + json.dumps([batch]), flush=True)\n"
    )
    script.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(script))
    assert list(sweep.run_job(replace(JOB, batches=[1, 8, 32]), seconds)) == measured
    assert capfd.readouterr().err.strip().endswith(said)


@pytest.mark.parametrize("backend, code, measured, said", [
    ("clip", 2, [], "the original model has no bf16"),
    ("onnxruntime", 2, [], "pip install onnxruntime-gpu"),
    ("eager", 0, [[], ["2"]], "batch 1: OutOfMemoryError: no room"),
])  # fmt: skip
def test_what_fails_is_one_sentence(backend, code, measured, said, monkeypatch, capsys):
    def run(x):
        if len(x) == 1:
            raise torch.cuda.OutOfMemoryError("no room")

    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    monkeypatch.setitem(sweep.PEERS, "eager", lambda *_: run)
    assert sweep.child(json.dumps(asdict(replace(JOB, backend=backend)))) == code
    told = capsys.readouterr()
    rows = [json.loads(line.removeprefix(sweep.ROWS)) for line in told.out.splitlines()]
    assert [[row["batch"] for row in batch] for batch in rows] == measured
    assert len(told.err.splitlines()) == 1 and said in told.err


def test_an_artifact_that_is_wrong_is_not_measured(demo_artifact, monkeypatch, capsys):
    options = sweep.parse(["--backends", "clip_ttrt", "--range", "2:4:8", "--batches", "1", "2"])
    wrong = {**demo_artifact.manifest, "verification": {"passed": False}}
    for code, manifest in ((1, demo_artifact.manifest), (0, wrong)):
        found = replace(demo_artifact, manifest=manifest)
        ended = code, demo_artifact.folder
        monkeypatch.setattr(sweep, "compile_in_process", lambda *_, ended=ended, **__: ended)
        monkeypatch.setattr(sweep, "read_artifact", lambda _, found=found: found)
        assert list(sweep.jobs_of(options)) == []
        assert "was not compiled, or failed its verification" in capsys.readouterr().err


@ENCODERS
def test_fp8_peers_are_close_and_quantised(encoder):
    x = baselines.example("demo", encoder, 4, torch.float32, "cpu")
    module = baselines.rearranged("demo", encoder, "fp32", "cpu")
    with torch.no_grad():
        expected = module(x)
        baselines.in_fp8(module, x)
        found = torch.cosine_similarity(module(x), expected)
    assert 0.99 < found.min() and found.max() < 1 - 1e-6
    kinds = [type(layer) for block in module.blocks for layer in block.children()]
    assert kinds.count(baselines.ScaledLinear) == 4 * len(module.blocks)


@ENCODERS
def test_the_floor_counts_the_work_of_the_encoder(encoder):
    module = baselines.rearranged("demo", encoder, "fp32", "cpu")
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        module(baselines.example("demo", encoder, 3, torch.float32, "cpu"))
    work = floor.work_of(MODELS["demo"], encoder, 3)
    products = sum(2 * m * k * n * times for m, k, n, times in (*work.products, *work.others))
    assert counter.get_total_flops() == products  # on the CPU it counts no attention
    heads, tokens, times = (3, 50, 6) if encoder == "image" else (2, 77, 4 / 2)
    assert work.flops == products + 4 * 3 * heads * tokens**2 * 64 * times
    assert list(sweep.rows_of(replace(JOB, encoder=encoder, backend="floor", batches=[1])))[0]


def test_kernels_have_rows_on_a_cpu(tmp_path, capsys):
    out = tmp_path / "kernels.csv"
    options = ["--device", "cpu", "--models", "demo", "--out", str(out)]
    assert kernels.main([*options, "--batches", "2"]) == 0
    measured = "op,model,encoder,batch,shape,dtype,backend,median_us,p90_us,gb_per_s,tflop_per_s"
    assert out.read_text().splitlines()[0] == f"{measured},{COLUMNS.partition('memory_mib,')[2]}"
    rows = read_rows(out)
    assert {row["op"].split()[0] for row in rows} == set(kernels.OPS)
    for row in rows:
        assert row["backend"] == "reference" and 0 < float(row["median_us"]) <= float(row["p90_us"])
    assert kernels.main([*options, "--seconds", "0"]) == 1 and read_rows(out) == rows
    assert f"{len(rows)} shapes are left out" in capsys.readouterr().err
