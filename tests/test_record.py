"""Rows: their provenance, their file, and those of an artifact's errors."""
import shutil
from dataclasses import replace

import pytest

from clip_ttrt.errors import UserError
from experiments import accuracy, record


def test_a_file_takes_rows_of_its_own_columns_alone(tmp_path):
    path = tmp_path / "new" / "rows.csv"
    for value in ("1", "2, and a half"):
        record.append_row(path, {"a": value, "b": ""})
    assert record.read_rows(path) == [{"a": "1", "b": ""}, {"a": "2, and a half", "b": ""}]
    with pytest.raises(ValueError, match=r"\['a', 'b'\], the row has \['b', 'a'\]"):
        record.append_row(path, {"b": "", "a": ""})
    assert len(path.read_text().splitlines()) == 3
    assert record.read_rows(tmp_path / "none.csv") == []


def test_provenance_tells_rtx_from_tensorrt(monkeypatch):
    monkeypatch.setenv("CLIP_TTRT_COMMIT", "abc")
    versions = {"torch": "2.12.0", "torch-tensorrt": "2.12.0", "tensorrt": "10.16.1"}
    row = record.provenance(versions, "H100")
    assert tuple(row) == record.PROVENANCE
    assert (row["gpu"], row["torch_tensorrt"], row["tensorrt"]) == ("H100", "2.12.0", "10.16.1")
    assert row["commit"] == "abc" and len(row["date"]) == 10
    rtx = {"torch": "2.12.0", "torch-tensorrt-rtx": "2.12.1", "tensorrt-rtx": "1.6.1"}
    row = record.provenance(rtx)
    assert (row["torch_tensorrt"], row["tensorrt"]) == ("2.12.1", "rtx 1.6.1")


def test_an_artifact_s_rows_are_its_verification_s(demo_artifact):
    report = demo_artifact.manifest["verification"]
    rows = list(accuracy.rows_of(demo_artifact))
    assert [row["encoder"] for row in rows] == ["image", "text", "logits"]
    for row in rows:
        errors = report["errors"][row["encoder"]]
        for name in accuracy.ERRORS:
            assert float(row[name]) == pytest.approx(errors[name], rel=1e-5)
        assert row["batch"] == "2:4:8" and row["weights"] == "demo" and row["kernels"] == ""
    assert float(rows[2]["top1_compiled"]) == pytest.approx(report["top1"]["compiled"], abs=1e-4)
    assert rows[0]["top1_compiled"] == ""
    unverified = {**demo_artifact.manifest, "verification": None}
    with pytest.raises(UserError, match="never verified"):
        list(accuracy.rows_of(replace(demo_artifact, manifest=unverified)))


def test_artifacts_are_reused_and_failures_told(demo_artifact, tmp_path, monkeypatch):
    folder = tmp_path / accuracy.folder_name("demo", "fp16", "2:4:8", "auto")
    shutil.copytree(demo_artifact.folder, folder)
    options = ["--models", "demo", "--batch", "2:4:8", "--artifacts", str(tmp_path)]
    options += ["--out", str(tmp_path / "accuracy.csv")]
    assert accuracy.main(options) == 0
    rows = record.read_rows(tmp_path / "accuracy.csv")
    assert [row["encoder"] for row in rows] == ["image", "text", "logits"]
    monkeypatch.setattr(accuracy, "compile_in_process", lambda *_, **__: 2)
    assert accuracy.main([*options, "--precisions", "bf16"]) == 1
    assert record.read_rows(tmp_path / "accuracy.csv") == rows
