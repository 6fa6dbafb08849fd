"""The sweep: its quick grid run whole, and that nothing which goes wrong in a row ends it."""
import subprocess
import sys

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from clip_ttrt.encoders import DIFFERENTIABLE, ENCODERS
from clip_ttrt.checkpoint import load_checkpoint
from clip_ttrt.models import MODELS
from clip_ttrt.pipeline import example_input
from experiments import baselines, floor, sweep
from experiments.record import append_row, read_rows

REQUEST = baselines.Request("demo", "demo", "text", "fp32", 1, 77, "cpu")


def quick(out):
    return subprocess.run([sys.executable, "-m", "experiments.sweep", "--grid", "quick", "--device", "cpu", "--out", str(out)], capture_output=True, text=True)


def test_the_quick_grid_gives_sane_rows_and_resumes(tmp_path):
    done = quick(tmp_path)
    assert done.returncode == 0, done.stderr
    rows = read_rows(tmp_path / "sweep.csv")
    assert len(rows) == 16 and tuple(rows[0]) == sweep.COLUMNS
    assert len({tuple(row[name] for name in sweep.KEY) for row in rows}) == len(rows)
    for row in rows:
        if row["backend"] == "onnxruntime" and row["error"]:
            assert row["error"] == "skipped: onnxruntime is not installed" and not row["median_ms"]
            continue
        assert not row["error"], row
        median, p90, p99 = (float(row[name]) for name in ("median_ms", "p90_ms", "p99_ms"))
        assert 0 < median <= p90 <= p99
        assert float(row["per_second"]) == pytest.approx(int(row["batch"]) / median * 1e3, rel=0.01)
        assert float(row["floor_ms"]) > 0 and float(row["tflops"]) >= 0 and row["cuda_graph"] == "False"
    first = quick(tmp_path)
    assert first.returncode == 0 and "[1/" not in first.stderr
    assert read_rows(tmp_path / "sweep.csv") == rows


def test_a_crash_is_a_row():
    row = sweep.in_a_process("/bin/false", "clip_eager", REQUEST, False, 10)
    assert tuple(row) == sweep.COLUMNS and row["error"] == "exit code 1: it said nothing"


def test_an_exception_is_a_row():
    broken = baselines.Request("demo", "nowhere.safetensors", "text", "fp32", 1, 77, "cpu")
    row = sweep.in_a_process(sys.executable, "clip_eager", broken, False, 60)
    assert "exit code 1" in row["error"] and "nowhere.safetensors: no such file" in row["error"]


def test_a_row_that_takes_too_long_is_a_row():
    row = sweep.in_a_process(sys.executable, "clip_eager", REQUEST, False, 0.01)
    assert row["error"].startswith("took over") and not row["median_ms"]


@pytest.mark.parametrize("backend", ["clip_eager", "eager_sdpa", "clip_ttrt_native"])
def test_what_a_backend_cannot_do_is_skipped_with_a_reason(backend):
    half = baselines.Request("demo", "demo", "text", "fp16", 1, 77, "cpu")
    row = sweep.measure(backend, half, False)
    assert row["error"].startswith("skipped: ") and ("fp16" in row["error"])


def test_all_backends_compute_the_same_features():
    request = baselines.Request("demo", "demo", "text", "fp32", 2, 20, "cpu")
    with torch.no_grad():
        expected = baselines.clip_eager(request).call()
        for name in ("eager_sdpa", "clip_ttrt_native"):
            actual = baselines.BACKENDS[name](request).call()
            assert (actual - expected).norm() / expected.norm() < 1e-5, name


@pytest.mark.parametrize("encoder", ENCODERS)
def test_counted_operations_are_those_of_the_encoder(encoder):
    dims, batch = MODELS["demo"], 2
    module = ENCODERS[encoder](load_checkpoint("demo").state_dict, DIFFERENTIABLE)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        module(example_input(encoder, dims))
    counted = counter.get_total_flops()
    work = floor.work_of(dims, encoder, batch, dims.image_tokens if encoder == "image" else dims.context_length)
    products = sum(2 * rows * inputs * outputs * times for rows, inputs, outputs, times in work.products)
    _, heads, tokens, causal, layers = work.attention
    scores = 4 * batch * heads * tokens**2 * 64 * layers
    assert products + scores in (counted, counted + scores)  # PyTorch counts CPU attention in some versions only
    assert work.flops == products + scores * (0.5 if causal else 1)


def test_a_csv_with_other_columns_is_not_mixed_up(tmp_path):
    append_row(tmp_path / "a.csv", {"x": 1, "y": 2})
    with pytest.raises(ValueError, match="has columns"):
        append_row(tmp_path / "a.csv", {"x": 1, "z": 2})
    assert read_rows(tmp_path / "a.csv") == [{"x": "1", "y": "2"}]
