"""Throughput under load: what clients measure adds up, and their failures are not lost."""
import pytest
import torch

from experiments import load
from experiments.record import read_rows


def test_a_closed_loop_on_the_embedded_model(demo_artifact, tmp_path):
    out = tmp_path / "load.csv"
    options = ["--artifact", str(demo_artifact.folder), "--encoders", "text", "--seconds", "0.2"]
    options += ["--batches", "2", "4", "--threads", "1", "2", "--contexts", "4", "--out", str(out)]
    assert load.main(options) == 0
    rows = read_rows(out)
    assert [(row["backend"], row["contexts"], row["batch"], row["threads"]) for row in rows] == [
        (*what, batch, count) for what in (("clip_ttrt 2:4:8", "4"), ("eager", ""))
        for batch in ("2", "4") for count in ("1", "2")
    ]  # fmt: skip
    for row in rows:
        assert (row["how"], row["on"]) == ("call", "cpu")
        items = int(row["requests"]) * int(row["batch"])
        assert 0 < float(row["items_per_second"]) <= items / 0.2
        assert 0 < float(row["p50_ms"]) <= float(row["p95_ms"]) <= float(row["p99_ms"])


@pytest.mark.parametrize("batches, said", [
    (["2", "9"], "--batches 2 9 do not all lie within the artifact's 2:4:8"),
    (["0"], "take positive numbers"), (None, "no artifact"),
])  # fmt: skip
def test_bad_input_is_an_error(batches, said, demo_artifact, tmp_path, capsys):
    folder, out = demo_artifact.folder if batches else tmp_path / "no artifact", tmp_path / "o.csv"
    with pytest.raises(SystemExit) as ended:
        load.main(["--artifact", str(folder), "--out", str(out), "--batches", *(batches or ["2"])])
    assert ended.value.code == 2 and not out.exists() and said in capsys.readouterr().err


def test_what_a_client_raises_is_raised():
    def run(rows: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("no such engine")

    clients = [load.Client(each, torch.zeros(1), "cpu") for each in (lambda rows: rows, run)]
    with pytest.raises(RuntimeError, match="no such engine"):
        load.drive(clients, 0.1)
