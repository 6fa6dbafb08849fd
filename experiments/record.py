"""Writing measurements: rows of CSV as they come, where they were measured, and the environment."""
import csv
import json
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

from clip_ttrt import stack


def commit() -> str:
    """The repository's commit, `+` where files differ from it; CLIP_TTRT_COMMIT where there is no repository."""
    if given := os.environ.get("CLIP_TTRT_COMMIT"):
        return given
    try:
        head = subprocess.check_output(["git", "rev-parse", "--short=10", "HEAD"], text=True, stderr=subprocess.DEVNULL).strip()
        dirty = subprocess.check_output(["git", "status", "--porcelain", "--untracked-files=no"], text=True, stderr=subprocess.DEVNULL).strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return head + ("+" if dirty else "")


def provenance() -> dict[str, str]:
    """The columns torch, tensorrt, gpu and commit of every row."""
    versions = stack.versions()
    return {"torch": versions["torch"], "tensorrt": versions.get("tensorrt", ""), "gpu": stack.gpu().get("name", ""), "commit": commit()}


def append_row(path: Path, row: dict[str, Any]) -> None:
    """Append a row to a CSV and print it; a new file starts with the header.

    Raises ValueError where the file's columns are others.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    new = not path.exists()
    if not new:
        with open(path, newline="") as file:
            header = next(csv.reader(file))
        if header != list(row):
            raise ValueError(f"{path} has columns {header}, the row has {list(row)}")
    with open(path, "a", newline="") as file:
        writer = csv.DictWriter(file, list(row))
        if new:
            writer.writeheader()
        writer.writerow(row)
    print(", ".join(f"{name} {value}" for name, value in row.items()), flush=True)


def read_rows(path: Path) -> list[dict[str, str]]:
    """The rows of a CSV as strings; none where there is no file yet."""
    if not path.exists():
        return []
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def in_a_line(problem: Exception) -> str:
    """An exception's type and first words."""
    return f"{type(problem).__name__}: {(str(problem).strip().splitlines() or [''])[0][:200]}"


def write_environment(path: Path) -> None:
    """Hardware and software of this machine as JSON."""
    def said(*command: str) -> str:
        try:
            return subprocess.check_output(command, text=True, stderr=subprocess.DEVNULL).strip()
        except (OSError, subprocess.CalledProcessError):
            return ""

    processor = [line.split(":", 1)[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({
        "gpu": stack.gpu(),
        "driver": said("nvidia-smi", "--query-gpu=driver_version,memory.total,clocks.max.sm", "--format=csv,noheader"),
        "processor": processor[0] if processor else "",
        "cores": os.cpu_count(),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "versions": stack.versions(),
        "commit": commit(),
    }, indent=2) + "\n")
