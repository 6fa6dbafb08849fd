"""Run the bug scripts, each in a process of its own: python -m experiments.bugs --out FILE.csv

A row of the same bug is replaced, others stay.  Its verdict is the script's, or `crashed` (by a
signal or an error of the script) or `timed out`.
"""
import argparse
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from experiments.bugs.stock import VERDICT
from experiments.record import ROOT, append_row, provenance, read_rows

BUGS = ("out_of_range_batch", "non_contiguous_input", "text_encoder_argmax",
        "captured_warnings")


def command(bug: str) -> list[str]:
    """How a script is started."""
    return [sys.executable, "-m", f"experiments.bugs.{bug}"]


def run(bug: str, seconds: float) -> dict[str, str]:
    """The row of one script."""
    started, expected = time.monotonic(), ""
    try:
        done = subprocess.run(command(bug), stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                              text=True, timeout=seconds, cwd=ROOT)  # fmt: skip
        last = (done.stdout.strip().splitlines() or [""])[-1][:200]
        actual, verdict = f"the script ended with {done.returncode}: {last}", "crashed"
        if done.returncode == 0:
            expected, actual, verdict = VERDICT.search(done.stdout).groups()
    except subprocess.TimeoutExpired:
        actual, verdict = f"no end within {seconds:.0f} s", "timed out"
    took = {"seconds": f"{time.monotonic() - started:.1f}"}
    return {"bug": bug, "verdict": verdict, "expected": expected, "actual": actual, **took,
            **provenance()}  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--only", nargs="+", choices=BUGS, default=BUGS, metavar="BUG", help=", ".join(BUGS))
    add("--out", type=Path, default=Path("results/bugs.csv"))
    add("--jobs", type=int, default=4, help="scripts at once")
    add("--seconds", type=float, default=180, help="stop a script after so long")
    options = parser.parse_args(arguments)
    rows = {row["bug"]: row for row in read_rows(options.out)}
    with ThreadPoolExecutor(options.jobs) as pool:
        found = pool.map(lambda bug: run(bug, options.seconds), options.only)
        rows |= {row["bug"]: row for row in found}
    draft = options.out.with_suffix(".partial")
    draft.unlink(missing_ok=True)
    for row in rows.values():
        append_row(draft, row)
    draft.replace(options.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
