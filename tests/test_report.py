"""The figure and the table of speed.csv, from made-up rows."""
import itertools

import pytest

pytest.importorskip("matplotlib")

from experiments import report
from experiments.record import append_row
from experiments.sweep import COLUMNS

BACKENDS = {
    ("clip_ttrt 1:32:128", "fused", "graph"): 1.0,
    ("clip_ttrt", "fused", "graph"): 0.9,
    ("torch.compile", "", "call"): 2.0,
    ("floor", "", "graph"): 0.5,
}


def rows(gpu="made-up GPU", factor=1.0):
    return [
        {
            **dict.fromkeys(COLUMNS, ""), "model": "ViT-B/32", "encoder": encoder, "batch": batch,
            "precision": "fp16", "backend": backend, "kernels": kernels, "how": how,
            "median_ms": f"{factor * ms * int(batch):.4f}", "gpu": gpu, "torch": "2.11.0",
            "tensorrt": "10.6.0", "commit": "0123456789", "date": "2026-01-02",
        }
        for encoder, batch, ((backend, kernels, how), ms) in itertools.product(
            ("image", "text"), ("1", "8"), BACKENDS.items()
        )
    ]  # fmt: skip


def test_the_last_measurement_of_the_last_gpu_counts():
    measured = rows("another GPU") + rows(factor=3.0) + rows()
    assert report.latest(measured, None) == rows()
    assert report.latest(measured, "another GPU") == rows("another GPU")
    other = [{**row, "commit": "another", "median_ms": "0.1"} for row in rows(factor=2.0)]
    assert report.latest(other + rows(), None) == rows()  # of another run nothing stands beside it
    assert report.latest(rows() + other[:1], None) == other[:1]
    for found in ([], measured):
        with pytest.raises(ValueError, match="no rows of"):
            report.latest(found, "no GPU" if found else None)


def test_a_panel_an_encoder_and_a_line_a_backend():
    image, text = report.plot(rows()).axes
    assert image.get_title() == "ViT-B/32 image fp16"
    assert text.get_title() == "ViT-B/32 text fp16"
    lines = {line.get_label(): line for line in image.get_lines()}
    assert len(lines) == len(BACKENDS)
    assert list(lines["clip_ttrt fused graph"].get_ydata()) == [0.9, 7.2]
    ranged = lines["clip_ttrt 1:32:128 fused graph"]
    assert ranged.get_markerfacecolor() == "white" and ranged.get_linestyle() == "-"
    assert lines["torch.compile call"].get_linestyle() == "--"
    assert image.get_yscale() == "log"


def test_the_table_has_a_line_a_batch_and_a_column_a_backend():
    some = [row for row in rows() if row["batch"] == "1" or row["backend"] != "floor"]
    lines = report.table(some).splitlines()
    assert lines[0].startswith("| encoder, batch | clip_ttrt 1:32:128 fused graph |")
    assert lines[2] == "| ViT-B/32 image fp16, 1 | 1 | 0.9 | 2 | 0.5 |"
    assert lines[3] == "| ViT-B/32 image fp16, 8 | 8 | 7.2 | 16 |  |"


def test_the_command_draws_beside_the_file(tmp_path, capsys):
    path = tmp_path / "speed.csv"
    for row in rows():
        append_row(path, row)
    assert report.main(["--csv", str(path)]) == 0
    assert (tmp_path / "speed.png").stat().st_size > 10_000
    assert "| ViT-B/32 text fp16, 8 |" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        report.main(["--csv", str(tmp_path / "none.csv")])
    assert "no rows of any GPU" in capsys.readouterr().err


def test_every_backend_and_way_to_call_has_a_look():
    from clip_ttrt.options import KERNELS
    from experiments.sweep import PEERS

    for how in report.LINES:
        for backend in (*PEERS, "floor", "clip_ttrt", "clip_ttrt 1:2:4"):
            kernels = ("", *set(KERNELS) - {"auto"}) if backend.startswith("clip_ttrt") else ("",)
            assert all(report.style(backend, name, how)["label"] for name in kernels)
