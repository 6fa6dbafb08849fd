"""Merging the parts of a sweep: every key once, the fastest, and nothing mixed up."""
import pytest

from experiments import merge
from experiments.record import append_row, read_rows
from experiments.sweep import COLUMNS


def row(**values):
    defaults = {"model": "ViT-B/32", "encoder": "image", "backend": "clip_eager", "precision": "fp16", "batch": "32", "tokens": "50", "cuda_graph": "True", "gpu": "NVIDIA H200"}
    return {**dict.fromkeys(COLUMNS, ""), **defaults, **values}


def test_the_fastest_of_each_key_is_kept_in_order(tmp_path, monkeypatch, capsys):
    out, first, second = (tmp_path / name for name in ("sweep.csv", "first.csv", "second.csv"))
    for one in (row(batch="128", median_ms="9.5"), row(median_ms="2.0", commit="a"), row(backend="onnxruntime", error="exit code 1: it said nothing")):
        append_row(first, one)
    for one in (row(median_ms="3.0", commit="b"), row(backend="onnxruntime", median_ms="10.0"), row(backend="eager_sdpa", error="skipped: why")):
        append_row(second, one)
    monkeypatch.setattr("sys.argv", ["merge", str(out), str(first), str(second)])
    assert merge.main() == 0
    rows = read_rows(out)
    assert [(one["backend"], one["batch"], one["median_ms"]) for one in rows] == [
        ("clip_eager", "32", "2.0"), ("eager_sdpa", "32", ""), ("onnxruntime", "32", "10.0"), ("clip_eager", "128", "9.5")]
    assert rows[0]["commit"] == "a"
    assert merge.main() == 0 and read_rows(out) == rows


def test_other_processors_and_other_files_are_refused():
    with pytest.raises(ValueError, match="NVIDIA A10, NVIDIA H200"):
        merge.merged([row(median_ms="1"), row(batch="1", median_ms="1", gpu="NVIDIA A10")])
    with pytest.raises(ValueError, match="a sweep's rows have the columns"):
        merge.merged([{"model": "demo"}])


def test_instead_puts_one_run_in_place_of_another(tmp_path, monkeypatch):
    out, part = tmp_path / "sweep.csv", tmp_path / "part.csv"
    for one in (row(median_ms="1.0"), row(batch="128", median_ms="4.0"), row(batch="512", median_ms="9.0")):
        append_row(out, one)
    for one in (row(median_ms="2.0"), row(batch="128", error="took over 60 s")):
        append_row(part, one)
    monkeypatch.setattr("sys.argv", ["merge", str(out), str(part), "--instead"])
    assert merge.main() == 0
    assert [(one["batch"], one["median_ms"]) for one in read_rows(out)] == [("32", "2.0"), ("128", "4.0"), ("512", "9.0")]


def test_rows_get_the_floor_of_their_own_run(tmp_path, monkeypatch, capsys):
    out, floors = tmp_path / "sweep.csv", tmp_path / "floor.csv"
    for one in (row(median_ms="1.0", commit="a"), row(batch="128", median_ms="4.0", commit="b"), row(batch="512", median_ms="9.0", commit="a", floor_ms="8.5"), row(batch="8", commit="a")):
        append_row(out, one)
    for batch in ("8", "32", "128", "512"):
        append_row(floors, {"model": "ViT-B/32", "encoder": "image", "precision": "fp16", "batch": batch, "tokens": "50", "floor_ms": "0.5", "gpu": "NVIDIA H200", "commit": "a"})
    monkeypatch.setattr("sys.argv", ["merge", str(out), "--floor", str(floors)])
    assert merge.main() == 0
    assert {one["batch"]: one["floor_ms"] for one in read_rows(out)} == {"8": "", "32": "0.5", "128": "", "512": "8.5"}
    monkeypatch.setattr("sys.argv", ["merge", str(out), "--floor", str(tmp_path / "none.csv")])
    with pytest.raises(SystemExit):
        merge.main()
    assert "no such file" in capsys.readouterr().err
