"""What a bug script reports, and how: environment, steps, expected, actual, and an exit code."""
import argparse
import json
import platform
import traceback
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Callable

from clip_ttrt import stack

SEEN, NOT_SEEN, CANNOT_RUN, FAILED = range(4)  # exit codes


@dataclass(frozen=True)
class Finding:
    """Whether the bug showed, and one line each of what should have been and what was."""

    seen: bool
    expected: str
    actual: str


class CannotRun(RuntimeError):
    """The machine lacks what the script needs; the message says what."""


def environment() -> dict[str, str]:
    """What a bug report names: Python, the packages' versions, the GPU."""
    return {"python": platform.python_version(), **stack.versions(), "gpu": stack.gpu().get("name", "")}


def show(document: str, reproduce: Callable[[], Finding], arguments=None) -> int:
    """Print the issue, run it, print what was found; returns the exit code.

    document: the script's docstring.  With `--json FILE` the finding goes there too.
    """
    parser = argparse.ArgumentParser(description=document, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write expected and actual to this file")
    target = parser.parse_args(arguments).json
    print(f"{document.strip()}\n\nEnvironment: {', '.join(f'{name} {value}' for name, value in environment().items() if value)}", flush=True)
    try:
        finding = reproduce()
    except CannotRun as reason:
        print(f"Cannot run here: {reason}", flush=True)
        if target:
            target.write_text(json.dumps({"expected": "", "actual": str(reason), "environment": environment()}))
        return CANNOT_RUN
    except Exception:
        traceback.print_exc()
        return FAILED
    print(f"Expected: {finding.expected}\nActual: {finding.actual}\nThe bug is {'seen' if finding.seen else 'not seen'}.", flush=True)
    if target:
        target.write_text(json.dumps({**asdict(finding), "environment": environment()}))
    return SEEN if finding.seen else NOT_SEEN
