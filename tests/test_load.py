"""Throughput under load: clients run at once, what they measure adds up, failures are not lost."""
import threading
import time

import pytest
import torch

from experiments import load
from experiments.record import read_rows


def test_a_closed_loop_on_the_embedded_model(demo_artifact, tmp_path):
    out = tmp_path / "load.csv"
    options = ["--encoders", "text", "--batches", "2", "4", "--threads", "1", "2"]
    options += ["--seconds", "0.2", "--artifact", str(demo_artifact.folder), "--out", str(out)]
    assert load.main(options) == 0
    rows = read_rows(out)
    settings = [(how, batch, count) for how in ("call", "module", "eager")
                for batch in ("2", "4") for count in ("1", "2")]  # fmt: skip
    told = [("eager" if row["backend"] == "eager" else row["how"], row["batch"], row["threads"])
            for row in rows]  # fmt: skip
    assert told == settings and rows[0]["backend"] == "clip_ttrt 2:4:8"
    for row in rows:
        items = int(row["requests"]) * int(row["batch"])
        assert 0 < float(row["items_per_second"]) <= items / 0.2
        assert 0 < float(row["p50_ms"]) <= float(row["p95_ms"]) <= float(row["p99_ms"])


@pytest.mark.parametrize("batches", [("1",), ("2", "9")])
def test_a_batch_outside_the_range_is_an_error(demo_artifact, tmp_path, capsys, batches):
    out = tmp_path / "load.csv"
    with pytest.raises(SystemExit) as ended:
        artifact = ["--artifact", str(demo_artifact.folder)]
        load.main([*artifact, "--batches", *batches, "--out", str(out)])
    assert ended.value.code == 2 and not out.exists()
    assert "do not all lie within the artifact's 2:4:8" in capsys.readouterr().err


def test_a_folder_without_an_artifact_is_an_error(tmp_path, capsys):
    with pytest.raises(SystemExit) as ended:
        load.main(["--artifact", str(tmp_path)])
    assert ended.value.code == 2 and str(tmp_path) in capsys.readouterr().err


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

    wall, latencies = load.drive([load.Client(run, torch.zeros(1), "cpu") for _ in range(3)], 0.2)
    assert max(highest) == 3 and wall >= 0.2
    assert len(latencies) == len(highest) - 3 * load.WARM_UP
    assert latencies == sorted(latencies) and latencies[0] >= 10


def test_what_a_client_raises_is_raised():
    def run(rows: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("no such engine")

    clients = [load.Client(each, torch.zeros(1), "cpu") for each in (run, lambda rows: rows)]
    with pytest.raises(RuntimeError, match="no such engine"):
        load.drive(clients, 0.1)
