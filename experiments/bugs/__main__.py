"""Run the bug scripts, each in a process of its own: python -m experiments.bugs --out FILE.csv

A row of the same bug is replaced, others stay.  Its verdict is the script's, or `crashed` (by a
signal or an error of the script) or `timed out`.  `--log DIR` keeps what the scripts print.
"""
import argparse
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from experiments.bugs.stock import VERDICT
from experiments.record import ROOT, append_row, provenance, read_rows

BUGS = (
    "out_of_range_batch",
    "non_contiguous_input",
    "text_encoder_argmax",
    "wrong_block_788_rows",
    "captured_warnings",
)


def command(bug: str) -> list[str]:
    """How a script is started."""
    return [sys.executable, "-m", f"experiments.bugs.{bug}"]


def run(bug: str, seconds: float, log: Path) -> dict[str, str]:
    """The row of one script; what it prints goes to a file in `log`."""
    started, path = time.monotonic(), log / f"{bug}.log"
    with open(path, "w") as output:
        try:
            code = subprocess.run(
                command(bug), stdout=output, stderr=subprocess.STDOUT, timeout=seconds, cwd=ROOT
            ).returncode
            verdict, actual = "crashed", f"the script ended with {code}"
        except subprocess.TimeoutExpired:
            code, verdict, actual = None, "timed out", f"no end within {seconds:.0f} s"
    expected = ""
    if code == 0:
        expected, actual, verdict = VERDICT.search(path.read_text()).groups()
    return {
        "bug": bug,
        "verdict": verdict,
        "expected": expected,
        "actual": actual,
        "seconds": f"{time.monotonic() - started:.1f}",
        **provenance(),
    }


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
        for row in pool.map(lambda bug: run(bug, options.seconds, log), options.only):
            rows[row["bug"]] = row
        draft = Path(nowhere) / "rows.csv"
        for row in rows.values():
            append_row(draft, row)
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_bytes(draft.read_bytes())
    return 0


if __name__ == "__main__":
    sys.exit(main())
