"""The bug scripts: verdicts, and the driver, which outlives what a script does."""
import sys
from unittest import mock

import pytest

from experiments.bugs import __main__ as driver
from experiments.bugs.stock import CANNOT_RUN, GONE, STILL_WRONG, CannotRun, Finding, show
from experiments.record import PROVENANCE, read_rows

WORKS = (
    "from experiments.bugs.stock import Finding, show; "
    "show('T', lambda: Finding(True, 'a', 'b')); print('a warning at the end')"
)


@pytest.mark.parametrize("result, mended, verdict", [
    ([Finding(True, "this", "that")], "2.4", STILL_WRONG),
    ([Finding(False, "this", "that")], "2.4", "mended in 2.4"),
    ([Finding(False, "this", "that")], None, GONE), (CannotRun("that"), "2.4", CANNOT_RUN),
])  # fmt: skip
def test_a_verdict(result, mended, verdict, capsys):
    assert show("A title\n\nmore", mock.Mock(side_effect=result), mended) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("A title") and "torch 2." in printed
    expected = "" if verdict == CANNOT_RUN else "this"
    assert printed.endswith(f"Expected: {expected}\nActual: that\n{verdict}\n")


def test_the_driver_outlives_crashes_and_replaces_rows(tmp_path, monkeypatch):
    scripts = {"crash": "import os; os.abort()", "unimportable": "raise ImportError('gone')",
               "slow": "import time; time.sleep(60)", "works": WORKS}  # fmt: skip
    monkeypatch.setattr(driver, "command", lambda bug: [sys.executable, "-c", scripts[bug]])
    monkeypatch.setattr(driver, "BUGS", tuple(scripts))
    out = tmp_path / "bugs.csv"

    def verdicts(*bugs):
        told = ["--only", *bugs, "--out", str(out), "--jobs", "2"]
        assert driver.main(told) == 0
        return {row["bug"]: row["verdict"] for row in read_rows(out)}

    expected = {"works": STILL_WRONG, "crash": "crashed", "unimportable": "crashed"}
    assert verdicts(*expected) == expected
    row = read_rows(out)[0]
    assert tuple(row) == ("bug", "verdict", "expected", "actual", "seconds", *PROVENANCE)
    assert (row["expected"], row["actual"]) == ("a", "b") and row["torch"].startswith("2.")
    assert read_rows(out)[2]["actual"] == "the script ended with 1: ImportError: gone"
    scripts["crash"] = WORKS
    assert verdicts("crash") == {**expected, "crash": STILL_WRONG}
    assert driver.run("slow", 1)["verdict"] == "timed out"
