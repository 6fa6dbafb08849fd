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
    assert load.main([*options, "--contexts", "4"]) == 0
    rows = read_rows(out)
    assert [(row["backend"], row["batch"], row["threads"]) for row in rows] == [
        (name, batch, count) for name in ("clip_ttrt 2:4:8", "eager")
        for batch in ("2", "4") for count in ("1", "2")
    ]  # fmt: skip
    for row in rows:
        items = int(row["requests"]) * int(row["batch"])
        assert 0 < float(row["items_per_second"]) <= items / 0.2
        assert 0 < float(row["p50_ms"]) <= float(row["p95_ms"]) <= float(row["p99_ms"])
        assert row["how"] == "call" and row["on"] == "cpu"
        assert row["contexts"] == ("" if row["backend"] == "eager" else "4")


@pytest.mark.parametrize("batches", [("1",), ("2", "9")])
def test_a_batch_outside_the_range_is_an_error(demo_artifact, tmp_path, capsys, batches):
    out = tmp_path / "load.csv"
    artifact = ["--artifact", str(demo_artifact.folder), "--out", str(out)]
    with pytest.raises(SystemExit) as ended:
        load.main([*artifact, "--batches", *batches])
    assert ended.value.code == 2 and not out.exists()
    assert "do not all lie within the artifact's 2:4:8" in capsys.readouterr().err


def test_a_folder_without_an_artifact_is_an_error(tmp_path, capsys):
    with pytest.raises(SystemExit) as ended:
        load.main(["--artifact", str(tmp_path)])
    assert ended.value.code == 2 and str(tmp_path) in capsys.readouterr().err


def test_clients_are_all_in_flight_at_once():
    together = threading.Barrier(3)  # a client alone would wait here

    def run(rows: torch.Tensor) -> torch.Tensor:
        together.wait(30)
        time.sleep(0.01)
        return rows

    def loop(client, barrier, seconds):
        for _ in range(5):
            client.request()
        client.ended = 1.0

    clients = [load.Client(run, torch.zeros(1), "cpu") for _ in range(3)]
    for client in clients:
        client.loop = lambda barrier, seconds, client=client: loop(client, barrier, seconds)
    assert load.drive(clients, 0.2) == (1.0, [])
    wall, latencies = load.drive([load.Client(lambda x: time.sleep(0.01), torch.zeros(1), "cpu")],
                                 0.1)  # fmt: skip
    assert wall >= 0.1 and min(latencies) >= 10 and sum(latencies) <= wall * 1e3


def test_what_a_client_raises_is_raised():
    def run(rows: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("no such engine")

    clients = [load.Client(each, torch.zeros(1), "cpu") for each in (lambda rows: rows, run)]
    with pytest.raises(RuntimeError, match="no such engine"):
        load.drive(clients, 0.1)
