"""Throughput under load: that clients run at once, that what they measure adds up, and that a client's failure is not lost."""
import subprocess
import sys
import threading
import time

import pytest
import torch

from experiments import load
from experiments.record import read_rows


def test_a_closed_loop_on_the_embedded_model(tmp_path):
    out = tmp_path / "load.csv"
    command = [sys.executable, "-m", "experiments.load", "--device", "cpu", "--encoders", "text", "--backends", "clip_ttrt_native_range", "clip_ttrt_plugin",
               "--batches", "1", "2", "--range", "1:2:2", "--threads", "1", "2", "--seconds", "0.2", "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    rows = read_rows(out)
    assert [(row["backend"], row["batch"], row["threads"]) for row in rows] == [
        (backend, batch, threads) for backend in ("clip_ttrt_native_range", "clip_ttrt_plugin") for batch in ("1", "2") for threads in ("1", "2")]
    for row in rows[:4]:
        assert not row["error"] and row["input_dtype"] == "int32" and row["attention"] == "native 1:2:2"
        assert float(row["seconds"]) >= 0.2
        assert float(row["items_per_second"]) == pytest.approx(int(row["requests"]) * int(row["batch"]) / float(row["seconds"]), rel=0.05)
        assert 0 < float(row["p50_ms"]) <= float(row["p95_ms"]) <= float(row["p99_ms"])
    assert all(row["error"] == "skipped: plugin in fp32 needs a GPU" and not row["requests"] for row in rows[4:])
    assert subprocess.run(command, capture_output=True).returncode == 0 and read_rows(out) == rows


def test_a_batch_outside_the_range_is_an_error_before_anything_is_built(tmp_path):
    done = subprocess.run([sys.executable, "-m", "experiments.load", "--batches", "4", "--range", "1:2:2", "--out", str(tmp_path / "load.csv")],
                          capture_output=True, text=True)
    assert done.returncode == 2 and "--batches 4 do not all lie within --range 1:2:2" in done.stderr


def test_clients_are_all_in_flight_at_once():
    lock, flying, highest = threading.Lock(), [], []

    def run(rows: torch.Tensor) -> torch.Tensor:
        with lock:
            flying.append(rows)
            highest.append(len(flying))
        time.sleep(0.01)
        with lock:
            flying.pop()
        return rows

    wall, latencies = load.drive([load.Client(run, torch.zeros(1), "cpu", False) for _ in range(3)], 0.2)
    assert max(highest) == 3 and wall >= 0.2 and len(latencies) == len(highest) - 3 * load.WARM_UP
    assert latencies == sorted(latencies) and latencies[0] >= 10


def test_what_a_client_raises_is_raised():
    def run(rows: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("no such engine")

    with pytest.raises(RuntimeError, match="no such engine"):
        load.drive([load.Client(run, torch.zeros(1), "cpu", False), load.Client(lambda rows: rows, torch.zeros(1), "cpu", False)], 0.1)


def test_percentiles_are_those_of_the_nearest_rank():
    values = [float(value) for value in range(1, 101)]
    assert [load.percentile(values, share) for share in (0.5, 0.95, 0.99)] == [50, 95, 99]
    assert load.percentile([7.0], 0.99) == 7
