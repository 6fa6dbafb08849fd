"""The figure and the table of speed.csv, from rows that a test writes."""
import itertools

import pytest

pytest.importorskip("matplotlib")

from experiments import report
from experiments.record import PROVENANCE, append_row
from experiments.sweep import KEY, PEERS

TIMES = {
    ("clip_ttrt 1:32:128", "fused", "call"): 1.0,
    ("clip_ttrt 1:32:128", "fused", "graph"): 0.9,
    ("clip_ttrt", "fused", "call"): 0.8,
    ("torch.compile", "", "call"): 2.0,
    ("floor", "", "graph"): 0.5,
}


def rows(gpu="GPU", factor=1.0):
    def row(encoder, batch, key):
        ms = f"{factor * TIMES[key] * int(batch):.4f}"
        values = ("ViT-B/32", encoder, batch, "fp16", *key, ms, "", gpu, "2.11", "", "10", "c", "d")
        return dict(zip((*KEY, "median_ms", "p90_ms", *PROVENANCE), values, strict=True))

    return [row(*each) for each in itertools.product(("image", "text"), ("1", "8"), TIMES)]


def test_the_last_measurement_of_the_last_gpu_counts():
    measured = rows("another GPU") + rows(factor=3.0) + rows()
    assert report.latest(measured, None) == rows()
    assert report.latest(measured, "another GPU") == rows("another GPU")
    other = [{**row, "commit": "another", "median_ms": "0.1"} for row in rows(factor=2.0)]
    assert report.latest(other + rows(), None) == rows()  # of another run nothing stands beside it
    assert report.latest(rows() + other[:1], None) == other[:1]


def test_a_panel_an_encoder_and_a_line_a_backend_as_called():
    image, text = report.plot(rows()).axes
    assert [image.get_title(), text.get_title()] == ["ViT-B/32 image fp16", "ViT-B/32 text fp16"]
    lines = {line.get_label(): line for line in image.get_lines()}
    assert set(lines) == {"clip_ttrt 1:32:128 fused", "clip_ttrt fused", "torch.compile"}
    ranged = lines["clip_ttrt 1:32:128 fused"]
    assert list(ranged.get_ydata()) == [1, 8] and ranged.get_markerfacecolor() == "white"
    assert set(report.STYLES) == {"clip_ttrt", *PEERS}


def test_the_command_draws_beside_the_file_and_prints_the_table(tmp_path, capsys):
    path = tmp_path / "speed.csv"
    for row in rows():
        if row["batch"] == "1" or row["backend"] != "torch.compile":
            append_row(path, row)
    capsys.readouterr()
    assert report.main(["--csv", str(path)]) == 0
    assert (tmp_path / "speed.png").stat().st_size > 10_000
    assert capsys.readouterr().out.splitlines()[1:4:] + [""] == [
        "| encoder, batch | call | graph | torch.compile | floor | call / torch.compile |",
        "|---|---|---|---|---|---|", "| ViT-B/32 image, 1 | 1 | 0.9 | 2 | 0.5 | 0.50 |", "",
    ]  # fmt: skip
    assert report.table(rows()[5:9]).endswith("| ViT-B/32 image, 8 | 8 | 7.2 | 16 | 0.50 |")
    for found in ({"--csv": tmp_path / "none.csv"}, {"--csv": path, "--gpu": "no GPU"}):
        with pytest.raises(SystemExit):
            report.main([str(part) for pair in found.items() for part in pair])
        assert "no rows of" in capsys.readouterr().err
