"""The experiment on what a batch range costs, as far as it needs no GPU."""
import argparse
from pathlib import Path
from types import SimpleNamespace

import pytest

from experiments import dynamic_batch, tables
from experiments.record import append_row, read_rows

ROOT = Path(__file__).parent.parent
OPTIONS = argparse.Namespace(model="demo", weights=None, precision="fp16", attention="native", encoder="both")
CASE = {"model": "demo", "encoder": "image", "precision": "fp16", "attention": "native", "weights": "demo", "batch": 32, "range": "1:32:256", "commit": "0123456789"}


def test_a_build_is_its_median_round_and_an_engine_the_median_of_its_builds():
    times = {("static", 0): [1.0, 1.1, 9.0], ("dynamic", 0): [1.2, 1.2, 1.2], ("static", 1): [1.4, 1.4, 1.4], ("dynamic", 1): [1.5, 1.6, 1.4],
             ("static", 2): [1.2, 1.2, 1.2], ("dynamic", 2): [1.3, 1.3, 8.0]}
    assert dynamic_batch.figures(times) == {
        "static_ms": "1.2000", "dynamic_ms": "1.3000", "ratio": "1.0833", "spread": "8.0000", "builds": 3,
        "static_least_ms": "1.1000", "static_most_ms": "1.4000", "dynamic_least_ms": "1.2000", "dynamic_most_ms": "1.5000"}


def test_the_table_names_the_builds_and_how_far_they_lie_apart(tmp_path):
    for builds in (1, 2):
        times = {(kind, number): [ms + number / 10] for kind, ms in (("static", 1.0), ("dynamic", 1.1)) for number in range(builds)}
        append_row(tmp_path / "dynamic_batch.csv", CASE | dynamic_batch.figures(times))
    table = tables.dynamic_batch(tmp_path)
    assert list(table["builds"]) == ["1", "2"] and list(table["ratio"]) == ["1.100", "1.095"]
    assert list(table["static ms"]) == ["1.000", "1.050 (1.000 to 1.100)"] and list(table["dynamic ms"]) == ["1.100", "1.150 (1.100 to 1.200)"]
    assert set(table["commit"]) == {"0123456789"}


def test_each_build_has_a_timing_cache_of_its_own(tmp_path, monkeypatch):
    caches, folders = [], []

    def run(command, env, **_):
        caches.append(env["XDG_CACHE_HOME"])
        folders.append(Path(command[command.index("--output") + 1]).name)
        assert Path(caches[-1]).is_dir() and not list(Path(caches[-1]).iterdir())
        return argparse.Namespace(returncode=0, stdout="")

    monkeypatch.setattr(dynamic_batch.subprocess, "run", run)
    monkeypatch.setattr(dynamic_batch, "read_artifact", lambda folder: folder)
    for batch, number in (("32", 0), ("32", 1), ("1:32:256", 0)):
        dynamic_batch.artifact_of(OPTIONS, tmp_path, batch, number)
    assert folders == ["demo-fp16-32-native", "demo-fp16-32-native-build-1", "demo-fp16-1_32_256-native"] and len(set(caches)) == 3


def test_a_compile_that_fails_is_an_error_with_its_last_words(tmp_path):
    options = argparse.Namespace(**{**vars(OPTIONS), "precision": "fp17"})
    with pytest.raises(RuntimeError, match="demo-fp17-32-native was not compiled: .*fp17"):
        dynamic_batch.artifact_of(options, tmp_path, "32", 0)


def test_no_builds_are_refused(monkeypatch):
    monkeypatch.setattr("sys.argv", ["dynamic_batch", "--builds", "0"])
    with pytest.raises(SystemExit):
        dynamic_batch.main()


@pytest.mark.parametrize("asked, held, said", [("text", (("image",), ("image", "text")), "no text encoder in static"),
                                               ("both", (("image", "text"), ("image",)), "no image and text encoder in dynamic")])
def test_artifacts_without_the_encoder_are_refused(asked, held, said, tmp_path, monkeypatch, capsys):
    made = {number: argparse.Namespace(folder=Path(name), encoders=encoders) for number, (name, encoders) in enumerate(zip(("static", "dynamic"), held))}
    monkeypatch.setattr(dynamic_batch, "artifact_of", lambda options, root, batch, number: made[int(":" in batch)])
    monkeypatch.setattr("sys.argv", ["dynamic_batch", "--encoder", asked, "--artifacts", str(tmp_path)])
    with pytest.raises(SystemExit):
        dynamic_batch.main()
    assert f"{said}\n" in capsys.readouterr().err


def test_rows_go_into_the_files_that_are_there(tmp_path, monkeypatch):
    """All but the GPU: two builds of each kind, and a row an encoder with the columns of the committed files."""
    out = tmp_path / "dynamic_batch.csv"
    out.write_bytes((ROOT / "results" / "h100" / "dynamic_batch.csv").read_bytes())
    before = len(read_rows(out))
    made = SimpleNamespace(folder=tmp_path, encoders=("image", "text"), origin=SimpleNamespace(kind="demo"))
    monkeypatch.setattr(dynamic_batch, "artifact_of", lambda options, root, batch, number: made)
    monkeypatch.setattr(dynamic_batch, "load_modules", lambda artifact: {"image": lambda x: x, "text": lambda x: x})
    monkeypatch.setattr(dynamic_batch, "clip_eager", lambda request: SimpleNamespace(x=request.tokens, call=lambda: None))
    monkeypatch.setattr(dynamic_batch, "graphed", lambda call: call)
    monkeypatch.setattr(dynamic_batch, "median_ms", lambda call: 1.0 if call() is None else 0.5)
    monkeypatch.setattr("sys.argv", ["dynamic_batch", "--builds", "2", "--out", str(out)])
    dynamic_batch.main()
    rows = read_rows(out)[before:]
    assert [(row["encoder"], row["builds"], row["static_ms"], row["ratio"], row["eager_fp16_ms"]) for row in rows] == [
        ("image", "2", "0.5000", "1.0000", "1.0000"), ("text", "2", "0.5000", "1.0000", "1.0000")]
