"""Figures and table of speed.csv and fp8.csv, from rows that a test writes."""
import itertools
from types import SimpleNamespace

import pytest

pytest.importorskip("matplotlib")

from experiments import fp8, report
from experiments.record import PROVENANCE, append_row, read_rows
from experiments.sweep import KEY, PEERS

ENCODERS = ("image", "text")
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
        values = ("ViT-B/32", encoder, batch, "fp16", *key, "", ms, "", gpu, "2.11", "", "10", "c",
                  "d")  # fmt: skip
        return dict(zip((*KEY, "median_ms", "p90_ms", *PROVENANCE), values, strict=True))

    return [row(*each) for each in itertools.product(ENCODERS, ("1", "8"), TIMES)]


def test_a_panel_an_encoder_and_a_line_a_backend_as_called():
    panels = report.plot(rows()).axes
    assert [panel.get_title() for panel in panels] == [f"ViT-B/32 {name} fp16" for name in ENCODERS]
    lines = {line.get_label(): list(line.get_ydata()) for line in panels[0].get_lines()}
    assert lines == {"clip_ttrt 1:32:128 fused": [1, 8], "clip_ttrt fused": [0.8, 6.4],
                     "torch.compile": [2, 16]}  # fmt: skip
    assert set(report.STYLES) == {"clip_ttrt", *PEERS}


def test_the_command_draws_beside_the_file_and_prints_the_table(tmp_path, capsys):
    path = tmp_path / "speed.csv"
    for row in (*rows("another GPU"), *rows(factor=3.0), *rows()):  # the last rows count
        if row["batch"] == "1" or row["backend"] != "torch.compile":
            append_row(path, row)
    capsys.readouterr()
    assert report.main(["--csv", str(path)]) == 0
    assert (tmp_path / "speed.png").stat().st_size > 10_000
    assert capsys.readouterr().out.splitlines()[1:5] == [
        "| encoder, batch | torch.compile | clip_ttrt | its graph | floor | of torch.compile |",
        "|---|---|---|---|---|---|",
        "| ViT-B/32 image, 1 | 2.000 | 1.000 | 0.900 | 0.500 | 0.50 |",
        "| ViT-B/32 image, 8 |  | 8.000 | 7.200 | 4.000 |  |",
    ]
    with pytest.raises(SystemExit):
        report.main(["--csv", str(path), "--gpu", "no GPU"])
    assert "no rows of no GPU" in capsys.readouterr().err


def test_the_run_of_a_commit_that_is_not_the_last():
    earlier, last = rows(factor=3.0), [row | {"commit": "d"} for row in rows()]
    assert report.latest([*earlier, *last], None) == last
    assert report.latest([*earlier, *last], None, "c") == earlier
    with pytest.raises(ValueError, match="no rows of e"):
        report.latest(last, "GPU", "e")


def artifact(precision):
    cosines = {f"blocks.{block}.{layer}.weight": 1 - 1e-4 * (1 + block)
               for block in range(3) for layer in fp8.COLOURS}  # fmt: skip
    kept = {"blocks.2.down.weight": cosines["blocks.2.down.weight"]}
    modules = {"image": {"fp8": {"cos_min_alone": cosines, "kept_fp16": kept}}}
    manifest = {"model": "demo", "kernels": "fused", "precision": precision, "modules": modules}
    return SimpleNamespace(folder="a", manifest={**manifest, "versions": {"torch": "2.11.0"}})


def test_fp8_beside_fp16_and_by_layer(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(fp8, "read_artifact", lambda folder: artifact(folder.name))
    speed, layers = tmp_path / "speed.csv", tmp_path / "fp8.csv"
    told = ["--csv", str(layers)]
    for precision, factor in ("fp16", 1.0), ("fp8", 0.75):
        for row in rows(factor=factor):
            append_row(speed, {**row, "precision": precision})
    append_row(speed, {**rows("another GPU")[1], "precision": "fp8"})  # has no fp16 beside it
    with pytest.raises(SystemExit):
        fp8.main([*told, "fp16"])
    assert "a is in fp16, not in fp8" in capsys.readouterr().err and not layers.exists()
    assert fp8.main([*told, "fp8"]) == 0
    assert (tmp_path / "fp8.png").stat().st_size > 10_000
    found = read_rows(layers)
    assert [row["layer"] for row in found if row["kept_fp16"] == "1"] == ["blocks.2.down"]
    left, right = fp8.plot(read_rows(speed), found).axes
    assert [bar.get_width() for bar in left.patches] == [pytest.approx(0.75)] * 4
    [line] = [line for line in right.get_lines() if line.get_label() == "qkv"]
    assert list(line.get_xdata()) == [0, 1, 2]
    assert list(line.get_ydata()) == pytest.approx([1e-4, 2e-4, 3e-4])
