"""What a bug script finds, and how it tells: a verdict, what should have been and what was."""
import argparse
import json
import traceback
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from experiments.record import provenance

STILL_WRONG, GONE, CANNOT_RUN = "still wrong", "gone", "cannot run"
FAILED = 3  # the exit code of a script that does not come to a verdict


@dataclass(frozen=True)
class Finding:
    """Whether the bug showed, and one line each of what should have been and what was."""

    seen: bool
    expected: str
    actual: str


class CannotRun(RuntimeError):
    """The machine lacks what the script needs; the message says what."""


def show(
    document: str,
    reproduce: Callable[[], Finding],
    mended: str | None = None,
    arguments: Sequence[str] | None = None,
) -> int:
    """Run a script and print its verdict; returns 0, or 3 where it has none.

    document: its docstring.  mended: the version of Torch-TensorRT that is known to have mended
    it.  With `--json FILE` verdict, expected and actual go there too.
    """
    parser = argparse.ArgumentParser(
        description=document, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the finding there")
    target = parser.parse_args(arguments).json
    about = ", ".join(f"{name} {value}" for name, value in provenance().items() if value)
    print(f"{document.strip()}\n\n{about}", flush=True)
    try:
        finding = reproduce()
    except CannotRun as reason:
        finding, verdict = Finding(False, "", str(reason)), CANNOT_RUN
    except Exception:  # noqa: BLE001 (of the script's own: no finding)
        traceback.print_exc()
        return FAILED
    else:
        verdict = STILL_WRONG if finding.seen else f"mended in {mended}" if mended else GONE
    print(f"Expected: {finding.expected}\nActual: {finding.actual}\n{verdict}", flush=True)
    if target:
        target.write_text(json.dumps({**asdict(finding), "verdict": verdict}))
    return 0
