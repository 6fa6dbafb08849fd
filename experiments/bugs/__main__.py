"""Run the bug scripts, each in a process of its own, and write what they found: python -m experiments.bugs

`seen` in the CSV is yes, no, cannot run, crashed (by a signal or an error of the script) or timed out.  A row of the same
bug is replaced, others stay.
"""
import argparse
import csv
import json
import os
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

from experiments.bugs.finding import CANNOT_RUN, NOT_SEEN, SEEN, environment
from experiments.record import commit, read_rows

BUGS = ("text_encoder_argmax", "dropped_mask", "out_of_range_batch", "non_contiguous_input", "dynamic_batch_splits", "layer_norm_overflow",
        "int8_dropped", "export_python_312", "wrong_block_788_rows")
COLUMNS = ("bug", "seen", "expected", "actual", "seconds", "torch", "torch_tensorrt", "tensorrt", "gpu", "commit")
SAID = {SEEN: "yes", NOT_SEEN: "no", CANNOT_RUN: "cannot run"}


def command(bug: str, python: str) -> list[str]:
    """How a script is started."""
    return [python, "-m", f"experiments.bugs.{bug}"]


def run(bug: str, python: str, seconds: float, log: Path) -> dict[str, str]:
    """One script in an interpreter: its row.  What it prints goes to a file in `log`."""
    started, expected, actual, versions = time.monotonic(), "", "", environment()
    with tempfile.TemporaryDirectory() as folder, open(log / f"{bug}.log", "w") as output:
        told = Path(folder) / "finding.json"
        try:
            code = subprocess.run([*command(bug, python), "--json", str(told)], stdout=output, stderr=subprocess.STDOUT,
                                  timeout=seconds).returncode
            # Python itself ends with 1 where a script cannot even be imported, so only what the script has written counts.
            seen = SAID.get(code, "crashed") if told.exists() else "crashed"
            actual = f"the script ended with {code}"
        except subprocess.TimeoutExpired:
            seen, actual = "timed out", f"no end within {seconds:.0f} s"
        if told.exists():
            finding = json.loads(told.read_text())
            expected, actual, versions = finding["expected"], finding["actual"], finding["environment"]
    return {"bug": bug, "seen": seen, "expected": expected, "actual": actual, "seconds": f"{time.monotonic() - started:.1f}",
            "torch": versions["torch"], "torch_tensorrt": versions.get("torch-tensorrt", ""), "tensorrt": versions.get("tensorrt", ""),
            "gpu": versions["gpu"], "commit": commit()}


def save(path: Path, rows: dict[str, dict[str, str]]) -> None:
    """Write the rows in the order of BUGS, in one step."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_suffix(".partial")
    with open(draft, "w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(rows[bug] for bug in BUGS if bug in rows)
    os.replace(draft, path)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=BUGS, default=BUGS, metavar="BUG", help=f"of {', '.join(BUGS)}")
    parser.add_argument("--out", type=Path, default=Path("results/h200/bugs.csv"))
    parser.add_argument("--log", type=Path, help="folder for what the scripts print; default: nowhere")
    parser.add_argument("--python", default=sys.executable, help="the interpreter that runs the scripts; export_python_312 needs a Python 3.12")
    parser.add_argument("--jobs", type=int, default=1, help="scripts at once")
    parser.add_argument("--seconds", type=float, default=300, help="stop a script after so long")
    options = parser.parse_args()
    rows = {row["bug"]: row for row in read_rows(options.out)}
    with tempfile.TemporaryDirectory() as nowhere, ThreadPoolExecutor(options.jobs) as pool:
        log = options.log or Path(nowhere)
        log.mkdir(parents=True, exist_ok=True)
        for done in as_completed([pool.submit(run, bug, options.python, options.seconds, log) for bug in options.only]):
            row = done.result()
            rows[row["bug"]] = row
            save(options.out, rows)
            print(f"{row['bug']}: {row['seen']} ({row['seconds']} s): {row['actual']}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
