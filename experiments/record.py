"""Rows of CSV as they are measured, and where they were: the columns `PROVENANCE`.

The column `commit` is git's, with `+` where files differ from it; the environment variable
CLIP_TTRT_COMMIT says it where the code runs outside of its repository.
"""
import csv
import os
import subprocess
from collections.abc import Mapping
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from clip_ttrt import stack
from clip_ttrt.artifact import Artifact

ROOT = Path(__file__).resolve().parents[1]
PROVENANCE = ("gpu", "torch", "torch_tensorrt", "tensorrt", "commit", "date")


def commit() -> str:
    """The commit of the code that runs, as this module's docstring says."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(ROOT), *arguments]
        return subprocess.check_output(command, text=True, stderr=subprocess.DEVNULL).strip()

    if told := os.environ.get("CLIP_TTRT_COMMIT"):
        return told
    try:
        head = git("rev-parse", "--short=10", "HEAD")
        return head + ("+" if git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def provenance(
    versions: Mapping[str, str] | None = None, gpu: str | None = None
) -> dict[str, str]:
    """The columns `PROVENANCE`: of this process, or with an artifact's versions and GPU.

    `tensorrt` is "rtx VERSION" where TensorRT-RTX stands in its place.
    """
    versions = stack.versions() if versions is None else versions
    rtx = versions.get("tensorrt-rtx")
    return {
        "gpu": stack.gpu().get("name", "") if gpu is None else gpu,
        "torch": versions["torch"],
        "torch_tensorrt": versions.get("torch-tensorrt", versions.get("torch-tensorrt-rtx", "")),
        "tensorrt": versions.get("tensorrt") or (f"rtx {rtx}" if rtx else ""),
        "commit": commit(),
        "date": datetime.now(timezone.utc).date().isoformat(),
    }


def label(artifact: Artifact) -> str:
    """The column `backend` of an artifact's times."""
    return "clip_ttrt" if artifact.batch.static else f"clip_ttrt {artifact.batch}"


def append_row(path: Path, row: Mapping[str, Any]) -> None:
    """Append a row to a CSV and print it; a new file starts with the header.

    Raises ValueError where the file's columns are others.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a+", newline="") as file:
        file.seek(0)
        header = next(csv.reader(file), None)
        if header not in (None, list(row)):
            raise ValueError(f"{path} has columns {header}, the row has {list(row)}")
        writer = csv.DictWriter(file, list(row), lineterminator="\n")
        if header is None:
            writer.writeheader()
        writer.writerow(row)
    print(", ".join(f"{name} {value}" for name, value in row.items() if value), flush=True)


def read_rows(path: Path) -> list[dict[str, str]]:
    """The rows of a CSV as strings; none where there is no file yet."""
    if not path.exists():
        return []
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def in_a_line(problem: BaseException) -> str:
    """An exception's type and first words."""
    first = (str(problem).strip().splitlines() or [""])[0]
    return f"{type(problem).__name__}: {first[:200]}"
