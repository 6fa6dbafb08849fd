"""The bug scripts: their documents, their driver, and what of them can be seen without a GPU."""
import csv
import importlib
import importlib.util
import json
import os
import re
import sys
from pathlib import Path

import pytest
import torch

from clip_ttrt.models import dimensions_of
from clip_ttrt.options import BatchRange
from experiments.bugs import __main__ as driver
from experiments.bugs import dropped_mask, export_python_312, finding, text_encoder_argmax, wrong_block_788_rows
from experiments.bugs.finding import CANNOT_RUN, FAILED, NOT_SEEN, SEEN, CannotRun, Finding, show
from experiments.bugs.stock import said, where
import needs

ROOT = Path(__file__).parent.parent
HAS_TORCH_TENSORRT = importlib.util.find_spec("torch_tensorrt") is not None


@pytest.mark.parametrize("bug", driver.BUGS)
def test_document_is_an_issue_and_points_at_code_that_exists(bug):
    document = importlib.import_module(f"experiments.bugs.{bug}").__doc__
    for part in ("Steps:", "Expected:", "Our way round it:"):
        assert part in document
    remedy = document.split("Our way round it:")[1]
    pointers = re.findall(r"\((clip_ttrt/\w+\.py)((?:, \w+(?:\.\w+)?)*)", remedy.replace("\n", " ").replace("; ", ")("))
    assert pointers
    for path, names in pointers:
        source = (ROOT / path).read_text()
        for name in filter(None, names.split(", ")):
            assert f"def {name.split('.')[-1]}(" in source, f"{path} has no {name}"


@pytest.mark.parametrize("reproduce, code, said", [
    (lambda: Finding(True, "this", "that"), SEEN, {"seen": True, "expected": "this", "actual": "that"}),
    (lambda: Finding(False, "this", "this"), NOT_SEEN, {"seen": False, "expected": "this", "actual": "this"}),
])
def test_show_reports_a_finding(reproduce, code, said, tmp_path, capsys):
    assert show("A title\n\nmore", reproduce, ["--json", str(tmp_path / "told")]) == code
    told = json.loads((tmp_path / "told").read_text())
    assert told.pop("environment")["torch"] == torch.__version__.split("+")[0]
    assert told == said
    printed = capsys.readouterr().out
    assert printed.startswith("A title") and "Environment: python" in printed and f"Actual: {said['actual']}" in printed


def test_show_tells_a_missing_machine_from_a_failing_script(tmp_path, capsys):
    def lacks():
        raise CannotRun("no CUDA GPU answers")

    def fails():
        raise ValueError("this script is wrong")

    assert show("Title", lacks, ["--json", str(tmp_path / "told")]) == CANNOT_RUN
    assert json.loads((tmp_path / "told").read_text())["actual"] == "no CUDA GPU answers"
    assert show("Title", fails, ["--json", str(tmp_path / "other")]) == FAILED
    assert not (tmp_path / "other").exists() and "this script is wrong" in capsys.readouterr().err


def test_the_mask_is_dropped(capsys):
    code = show(dropped_mask.__doc__, dropped_mask.reproduce, [])
    printed = capsys.readouterr().out
    if not HAS_TORCH_TENSORRT:
        assert code == CANNOT_RUN and "torch_tensorrt is not installed" in printed
        return
    assert code == SEEN
    assert printed.count("3 inputs and options {}") >= 2  # query, key, value: neither mask nor is_causal
    if not torch.cuda.is_available():
        assert not any(name.split(".")[0] == "torch_tensorrt" for name in sys.modules)  # the stand-ins are gone


def test_export_needs_an_older_python(capsys):
    code = show(export_python_312.__doc__, export_python_312.reproduce, [])
    assert code == (CANNOT_RUN if sys.version_info < (3, 12) else SEEN)


def test_texts_end_where_argmax_finds_it_and_half_does_not():
    tokens = text_encoder_argmax.texts()
    assert tokens.argmax(-1).tolist() == [5, 16, 27, 38]
    assert tokens.half().argmax(-1).tolist() == [0, 0, 0, 0]
    assert tokens.float().argmax(-1).tolist() == [5, 16, 27, 38]


@needs.export
def test_the_block_that_is_built_is_the_block():
    torch.manual_seed(0)
    module, x = wrong_block_788_rows.OneBlock(128, 2).eval().requires_grad_(False), torch.randn(3, 17, 128)
    with torch.no_grad():
        assert (wrong_block_788_rows.lowered(module, 17, 128)(x) - module(x)).abs().max() < 1e-5
    optimised_for = {BatchRange.parse(batch).optimal * dimensions_of(model).image_tokens for model, batch, _, _ in wrong_block_788_rows.CASES}
    assert optimised_for == {788, 1028, 1576}


def test_said_collects_what_other_code_writes_and_prints_it_again(capfd):
    with said() as lines:
        os.write(2, b"a warning\n")
        os.write(1, b"a line\n")
    assert lines == ["a warning", "a line"]
    assert capfd.readouterr().out.splitlines() == lines


def test_where_names_the_place_in_torch_tensorrt():
    code = compile("def convert():\n    raise TypeError('(): no:\\nmore')\nconvert()", "/site/torch_tensorrt/dynamo/conversion/shape.py", "exec")
    with pytest.raises(TypeError) as problem:
        exec(code, {})
    assert where(problem.value) == "TypeError in convert (dynamo/conversion/shape.py): (): no"
    assert where(ValueError()) == "ValueError: "


def rows_of(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def test_driver_outlives_crashes_and_replaces_rows(tmp_path, monkeypatch):
    scripts = {"crash": "import os; os.abort()", "unimportable": "raise ImportError('gone')", "slow": "import time; time.sleep(60)",
               "works": "import sys; from experiments.bugs.finding import Finding, show; sys.exit(show('T', lambda: Finding(True, 'a', 'b'), sys.argv[1:]))"}
    monkeypatch.setattr(driver, "command", lambda bug, python: [python, "-c", scripts[bug]])
    monkeypatch.setattr(driver, "BUGS", tuple(scripts))
    out = tmp_path / "bugs.csv"

    def main(*bugs):
        monkeypatch.setattr(sys, "argv", ["bugs", "--only", *bugs, "--out", str(out), "--log", str(tmp_path / "log"), "--jobs", "2", "--seconds", "20"])
        return driver.main()

    assert main("works", "crash", "unimportable") == 0
    found = {row["bug"]: row for row in rows_of(out)}
    assert {bug: row["seen"] for bug, row in found.items()} == {"crash": "crashed", "unimportable": "crashed", "works": "yes"}
    assert list(found["works"]) == list(driver.COLUMNS)
    assert found["works"]["expected"] == "a" and found["works"]["actual"] == "b" and found["works"]["torch"].startswith("2.2")
    assert "gone" in (tmp_path / "log" / "unimportable.log").read_text()

    scripts["crash"] = scripts["works"]
    assert main("crash") == 0
    assert {row["bug"]: row["seen"] for row in rows_of(out)} == {"crash": "yes", "unimportable": "crashed", "works": "yes"}
    assert driver.run("slow", sys.executable, 1, tmp_path / "log")["seen"] == "timed out"


def test_environment_names_what_a_maintainer_asks_for():
    assert {"python", "torch", "gpu"} <= set(finding.environment())
