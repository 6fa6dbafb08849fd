"""The bug scripts: their documents, their driver, and what of them can be seen without a GPU."""
import importlib
import json
import re
import sys
from pathlib import Path

import pytest

from clip_ttrt import stack
from experiments.bugs import __main__ as driver
from experiments.bugs import captured_warnings, text_encoder_argmax
from experiments.bugs.finding import CANNOT_RUN, FAILED, GONE, STILL_WRONG, CannotRun, Finding, show
from experiments.bugs.stock import WHEELS, where
from experiments.record import PROVENANCE, read_rows

ROOT = Path(__file__).parent.parent
WORKS = (
    "import sys; from experiments.bugs.finding import Finding, show; "
    "sys.exit(show('T', lambda: Finding(True, 'a', 'b'), None, sys.argv[1:]))"
)


def test_the_driver_knows_every_script():
    helpers = {"__init__", "__main__", "finding", "stock"}
    scripts = {path.stem for path in Path(driver.__file__).parent.glob("*.py")} - helpers
    assert scripts == set(driver.BUGS)


@pytest.mark.parametrize("bug", driver.BUGS)
def test_a_document_tells_steps_and_remedy_and_the_table_has_it(bug):
    document = importlib.import_module(f"experiments.bugs.{bug}").__doc__
    assert "\n\nSteps: " in document
    paths = re.findall(r"clip_ttrt/\w+\.py", document.split("\n\nAvoided by: ")[1])
    assert paths and all((ROOT / path).is_file() for path in paths)
    assert f"`{bug}`" in (ROOT / "docs" / "tensorrt_bugs.md").read_text()


@pytest.mark.parametrize(
    "seen, mended, verdict",
    [(True, "2.4", STILL_WRONG), (False, "2.4", "mended in 2.4"), (False, None, GONE)],
)
def test_a_verdict(seen, mended, verdict, tmp_path, capsys):
    told = tmp_path / "told"
    finding = Finding(seen, "this", "that")
    assert show("A title\n\nmore", lambda: finding, mended, ["--json", str(told)]) == 0
    assert json.loads(told.read_text()) == {
        "seen": seen, "expected": "this", "actual": "that", "verdict": verdict
    }  # fmt: skip
    printed = capsys.readouterr().out
    assert printed.startswith("A title") and "torch 2." in printed
    assert printed.endswith(f"Expected: this\nActual: that\n{verdict}\n")


def test_a_missing_machine_and_a_failing_script_are_no_verdicts(tmp_path, capsys):
    def lacks():
        raise CannotRun("no CUDA GPU answers")

    def fails():
        raise ValueError("this script is wrong")

    told = tmp_path / "told"
    assert show("Title", lacks, "2.4", ["--json", str(told)]) == 0
    found = json.loads(told.read_text())
    assert (found["verdict"], found["actual"]) == (CANNOT_RUN, "no CUDA GPU answers")
    told.unlink()
    assert show("Title", fails, "2.4", ["--json", str(told)]) == FAILED
    assert not told.exists() and "this script is wrong" in capsys.readouterr().err


@pytest.mark.skipif(
    not set(WHEELS) & set(stack.versions()), reason="Torch-TensorRT is not installed"
)
def test_warnings_are_captured_by_the_import(tmp_path):
    row = driver.run("captured_warnings", 120, tmp_path)
    assert row["verdict"] == STILL_WRONG and row["actual"] == "showwarning is logging._showwarning"
    assert row["expected"] == "showwarning stays warnings.showwarning"


def test_warnings_that_may_have_been_captured_before_tell_nothing(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch_tensorrt", captured_warnings)
    monkeypatch.setattr(captured_warnings, "require_torch_tensorrt", lambda: None)
    with pytest.raises(CannotRun, match="was imported before"):
        captured_warnings.reproduce()


def test_texts_end_where_argmax_finds_it_and_half_does_not():
    tokens = text_encoder_argmax.texts(4)
    assert tokens.argmax(-1).tolist() == [5, 16, 27, 38]
    assert tokens.half().argmax(-1).tolist() == [0, 0, 0, 0]
    assert tokens.float().argmax(-1).tolist() == [5, 16, 27, 38]


def test_where_names_the_place_in_torch_tensorrt():
    path = "/site/torch_tensorrt/dynamo/conversion/shape.py"
    body = "def convert():\n    raise TypeError('(): no:\\nmore')\nconvert()"
    with pytest.raises(TypeError) as problem:
        exec(compile(body, path, "exec"), {})  # noqa: S102
    assert where(problem.value) == "TypeError in convert (dynamo/conversion/shape.py): (): no"
    assert where(ValueError()) == "ValueError: "


def test_the_driver_outlives_crashes_and_replaces_rows(tmp_path, monkeypatch):
    scripts = {
        "crash": "import os; os.abort()",
        "unimportable": "raise ImportError('gone')",
        "slow": "import time; time.sleep(60)",
        "works": WORKS,
    }
    monkeypatch.setattr(driver, "command", lambda bug: [sys.executable, "-c", scripts[bug]])
    monkeypatch.setattr(driver, "BUGS", tuple(scripts))
    out, log = tmp_path / "bugs.csv", tmp_path / "log"

    def verdicts(*bugs):
        told = ["--only", *bugs, "--out", str(out), "--log", str(log), "--jobs", "2"]
        assert driver.main(told) == 0
        return {row["bug"]: row["verdict"] for row in read_rows(out)}

    expected = {"crash": "crashed", "unimportable": "crashed", "works": STILL_WRONG}
    assert verdicts("works", "crash", "unimportable") == expected
    row = next(row for row in read_rows(out) if row["bug"] == "works")
    assert tuple(row) == driver.COLUMNS and tuple(row)[-len(PROVENANCE):] == PROVENANCE
    assert (row["expected"], row["actual"]) == ("a", "b") and row["torch"].startswith("2.")
    assert "gone" in (log / "unimportable.log").read_text()
    scripts["crash"] = WORKS
    assert verdicts("crash") == {**expected, "crash": STILL_WRONG}
    assert driver.run("slow", 1, log)["verdict"] == "timed out"
