"""Rows: their provenance, their file, and those of an artifact's errors."""
import shutil

import pytest

from experiments import accuracy, record


def test_a_file_takes_rows_of_its_own_columns_alone(tmp_path):
    path, rows = tmp_path / "new" / "rows.csv", [{"a": "1", "b": ""}, {"a": "2, or so", "b": ""}]
    assert record.read_rows(path) == []
    for row in rows:
        record.append_row(path, row)
    with pytest.raises(ValueError, match=r"\['a', 'b'\], the row has \['b', 'a'\]"):
        record.append_row(path, {"b": "", "a": ""})
    assert record.read_rows(path) == rows


def test_provenance_tells_rtx_from_tensorrt(monkeypatch):
    monkeypatch.setenv("CLIP_TTRT_COMMIT", "abc")
    versions = {"torch": "2.12.0", "torch-tensorrt": "2.12.0", "tensorrt": "10.16.1"}
    row = record.provenance(versions, "H100")
    assert tuple(row) == record.PROVENANCE and len(row["date"]) == 10
    assert list(row.values())[:-1] == ["H100", "2.12.0", "2.12.0", "10.16.1", "abc"]
    rtx = {"torch": "2.12.0", "torch-tensorrt-rtx": "2.12.1", "tensorrt-rtx": "1.6.1"}
    assert list(record.provenance(rtx).values())[2:4] == ["2.12.1", "rtx 1.6.1"]


def test_an_artifact_s_rows_are_its_verification_s_and_failures_are_told(
    demo_artifact, tmp_path, monkeypatch
):
    out, report = tmp_path / "accuracy.csv", demo_artifact.manifest["verification"]
    shutil.copytree(demo_artifact.folder, tmp_path / "demo-demo-fp16-2_4_8-auto-auto")
    options = ["--models", "demo", "--batch", "2:4:8", "--artifacts", str(tmp_path),
               "--out", str(out)]  # fmt: skip
    assert accuracy.main(options) == 0  # reused
    rows = record.read_rows(out)
    for row, encoder in zip(rows, report["errors"], strict=True):
        assert row["encoder"] == encoder and row["weights"] == "demo" and row["batch"] == "2:4:8"
        for name in ("cos_min", "cos_mean", "rel_mean", "abs_max"):
            assert float(row[name]) == pytest.approx(report["errors"][encoder][name], rel=1e-5)
    assert float(rows[-1]["top1_compiled"]) == pytest.approx(report["top1"]["compiled"], abs=1e-4)
    monkeypatch.setattr(accuracy, "compile_in_process", lambda *_, **__: (2, tmp_path / "none"))
    assert accuracy.main([*options, "--precisions", "bf16"]) == 1
    assert record.read_rows(out) == rows
