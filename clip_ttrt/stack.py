"""What is installed, by metadata, since both Torch-TensorRT wheels hold `torch_tensorrt` and
TensorRT-RTX takes the place of `tensorrt` when it is imported; and what GPU answers."""
import os
import subprocess
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from typing import Optional

import torch

# Backend -> its distributions: Torch-TensorRT, and the TensorRT under it.
PACKAGES = {"tensorrt": ("torch-tensorrt", "tensorrt"),
            "rtx": ("torch-tensorrt-rtx", "tensorrt-rtx")}
# TensorRT's packages come in parts, of which not all are always there; the first tells the version.
PARTS = [cuda + part for part in ("-bindings", "-libs", "") for cuda in ("-cu13", "-cu12", "")]
# Names in manifests and CSVs -> distributions that tell the version.
DISTRIBUTIONS = {
    **{name: [name] for name in ("clip_ttrt", "torch", "torch-tensorrt", "torch-tensorrt-rtx")},
    **{name: [name + part for part in PARTS] for name in ("tensorrt", "tensorrt-rtx")},
    "clip-anytorch": ["clip-anytorch", "clip"], "numpy": ["numpy"],
}


def versions() -> dict[str, str]:
    """Version of each of `DISTRIBUTIONS` that is installed."""
    found = {}
    for name, distributions in DISTRIBUTIONS.items():
        for distribution in distributions:
            with suppress(PackageNotFoundError):
                found[name] = version(distribution)
                break
    return found


def minor(text: str) -> str:
    """The first two numbers of a version: "2.11" of "2.11.0+cu130"."""
    return ".".join(text.split("+")[0].split(".")[:2])


def tensorrt_major() -> Optional[int]:
    """The major version of the TensorRT that is installed; None where none is."""
    return int(versions().get("tensorrt", "0").split(".")[0]) or None


def gpu() -> dict[str, str]:
    """Name and compute capability of the current GPU; empty without one."""
    if not torch.cuda.is_available():
        return {}
    capability = ".".join(map(str, torch.cuda.get_device_capability()))
    return {"name": torch.cuda.get_device_name(), "compute_capability": capability}


def driver() -> list[dict[str, str]]:
    """What nvidia-smi tells of each GPU; empty where it does not answer."""
    query = "nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader".split()
    try:
        answer = subprocess.run(query, capture_output=True, errors="replace", timeout=60)
    except (OSError, subprocess.SubprocessError):
        return []
    rows = (line.split(", ") for line in answer.stdout.splitlines())
    return [dict(zip(("name", "driver", "memory"), row)) for row in rows if len(row) == 3]


def no_gpu() -> Optional[str]:
    """Why nothing can run on a GPU here, and the remedy; None where PyTorch has one."""
    if torch.cuda.is_available():
        return None
    if not (gpus := driver()):
        return "no CUDA GPU answers"
    lost = f"nvidia-smi sees {gpus[0]['name']} and PyTorch does not: "
    if torch.version.cuda is None:
        return (f"{lost}torch {torch.__version__} is built without CUDA (install one that is: "
                f"`pip install --force-reinstall torch=={torch.__version__.split('+')[0]}`)")
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES")
    if hidden is not None and not hidden.split(",")[0].strip().startswith(tuple("0123456789GM")):
        return f"{lost}CUDA_VISIBLE_DEVICES is {hidden!r} (unset it)"
    try:  # of a driver that is too old PyTorch says it
        torch.cuda.init()
    except (RuntimeError, AssertionError) as problem:
        return lost + str(problem).strip().splitlines()[0].rstrip(".")
    return f"{lost}for no reason that it tells"
