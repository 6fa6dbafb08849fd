"""Engines of an experiment, each built in a process of its own: the experiment's own program with `--build NAME FILE`.

Such a process writes FILE, a TorchScript module, and then facts beside it as .json, by which a whole engine is known.
"""
import argparse
import subprocess
import sys
from pathlib import Path
from typing import Sequence


def add_options(parser: argparse.ArgumentParser, kind: str) -> None:
    """The options of building; kind: what the experiment calls that of which it builds one engine each."""
    parser.add_argument("--jobs", type=int, default=1, help="builds at once")
    parser.add_argument("--engines", type=Path, help="folder in which engines stay; default: a temporary one")
    parser.add_argument("--build-only", action="store_true")
    parser.add_argument("--existing", action="store_true", help=f"build nothing: a {kind} whose engine is not there is a row that says so")
    parser.add_argument("--build", nargs=2, metavar=(kind.upper(), "FILE"), help=argparse.SUPPRESS)


def built_in_process(experiment: str, arguments: Sequence[str], name: str, target: Path, existing: bool) -> str:
    """Build one engine, unless it is there; returns the error, empty where there is none.

    experiment: the module that is run with the arguments.  existing: build nothing.
    """
    if target.with_suffix(".json").exists():
        return ""
    if existing:
        return "its engine is not there"
    with open(target.with_suffix(".log"), "w") as log:
        code = subprocess.run([sys.executable, "-m", experiment, *arguments, "--build", name, str(target)], stdout=log, stderr=subprocess.STDOUT).returncode
    print(f"{name}: {'built' if code == 0 else f'the build ended with {code}'}", flush=True)
    said = target.with_suffix(".log").read_text().strip().splitlines()
    return "" if code == 0 else f"the build ended with {code}: {said[-1][:200] if said else ''}"
