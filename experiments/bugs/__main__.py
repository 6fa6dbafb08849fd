"""Run the bug scripts, each in a process of its own: python -m experiments.bugs --out FILE.csv

A row of the same bug is replaced, others stay.  Its verdict is the script's, or `crashed` (by a
signal or an error of the script) or `timed out`.  `--log DIR` keeps what the scripts print.
"""
import argparse
import csv
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

from experiments.record import PROVENANCE, provenance, read_rows

BUGS = (
    "out_of_range_batch",
    "non_contiguous_input",
    "text_encoder_argmax",
    "wrong_block_788_rows",
    "captured_warnings",
)
COLUMNS = ("bug", "verdict", "expected", "actual", "seconds", *PROVENANCE)
ROOT = Path(__file__).resolve().parents[2]


def command(bug: str) -> list[str]:
    """How a script is started."""
    return [sys.executable, "-m", f"experiments.bugs.{bug}"]


def run(bug: str, seconds: float, log: Path) -> dict[str, str]:
    """The row of one script; what it prints goes to a file in `log`."""
    started = time.monotonic()
    finding = {"expected": "", "verdict": "crashed"}
    with tempfile.TemporaryDirectory() as folder, open(log / f"{bug}.log", "w") as output:
        told = Path(folder) / "finding.json"
        try:
            code = subprocess.run(
                [*command(bug), "--json", str(told)], stdout=output, stderr=subprocess.STDOUT,
                timeout=seconds, cwd=ROOT, check=False,
            ).returncode  # fmt: skip
            finding["actual"] = f"the script ended with {code}"
        except subprocess.TimeoutExpired:
            finding |= {"actual": f"no end within {seconds:.0f} s", "verdict": "timed out"}
        if told.exists():
            finding = json.loads(told.read_text())
    return {
        "bug": bug,
        **{name: finding[name] for name in ("verdict", "expected", "actual")},
        "seconds": f"{time.monotonic() - started:.1f}",
        **provenance(),
    }


def save(path: Path, rows: dict[str, dict[str, str]]) -> None:
    """Write the rows in the order of BUGS, in one step."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_suffix(".partial")
    with open(draft, "w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows[bug] for bug in BUGS if bug in rows)
    os.replace(draft, path)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--only", nargs="+", choices=BUGS, default=BUGS, metavar="BUG", help=", ".join(BUGS))
    add("--out", type=Path, default=Path("results/bugs.csv"))
    add("--log", type=Path, metavar="DIR", help="default: nowhere")
    add("--jobs", type=int, default=4, help="scripts at once")
    add("--seconds", type=float, default=180, help="stop a script after so long")
    options = parser.parse_args(arguments)
    rows = {row["bug"]: row for row in read_rows(options.out)}
    with tempfile.TemporaryDirectory() as nowhere, ThreadPoolExecutor(options.jobs) as pool:
        log = options.log or Path(nowhere)
        log.mkdir(parents=True, exist_ok=True)
        running = [pool.submit(run, bug, options.seconds, log) for bug in options.only]
        for done in as_completed(running):
            row = done.result()
            rows[row["bug"]] = row
            save(options.out, rows)
            print(f"{row['bug']}: {row['verdict']}: {row['actual']}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
