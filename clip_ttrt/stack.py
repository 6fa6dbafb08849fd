"""What is installed and what GPU answers, told without importing any of it.

Versions are read from distribution metadata: both Torch-TensorRT wheels hold a package `torch_tensorrt`, and TensorRT-RTX takes
the place of `tensorrt` when it is imported, so neither an import nor `find_spec` can tell them apart.
"""
from importlib.metadata import PackageNotFoundError, version
from typing import Optional

import torch

# Names in manifests and CSVs -> distributions that tell the version: packages from PyPI come in parts, and not all are always there.
DISTRIBUTIONS = {
    "clip_ttrt": ("clip_ttrt",),
    "torch": ("torch",),
    "torch-tensorrt": ("torch-tensorrt",),
    "torch-tensorrt-rtx": ("torch-tensorrt-rtx",),
    "tensorrt": tuple(f"tensorrt{cuda}{part}" for part in ("-bindings", "-libs", "") for cuda in ("-cu13", "-cu12", "")),
    "tensorrt-rtx": tuple(f"tensorrt-rtx{cuda}{part}" for part in ("-bindings", "-libs", "") for cuda in ("-cu13", "-cu12", "")),
    "clip-anytorch": ("clip-anytorch", "clip"),
    "numpy": ("numpy",),
}


def versions() -> dict[str, str]:
    """Versions of what compiles or runs an artifact, by the names of `DISTRIBUTIONS`; what is not installed is left out."""
    found = {}
    for name, distributions in DISTRIBUTIONS.items():
        for distribution in distributions:
            try:
                found[name] = version(distribution)
                break
            except PackageNotFoundError:
                continue
    return found


def minor(text: str) -> str:
    """The first two numbers of a version: "2.11" of "2.11.0+cu130"."""
    return ".".join(text.split("+")[0].split(".")[:2])


def tensorrt_major() -> Optional[int]:
    """The major version of the TensorRT that is installed; None where none is."""
    found = versions().get("tensorrt")
    return None if found is None else int(found.split(".")[0])


def gpu() -> dict[str, str]:
    """Name and compute capability of the current GPU; empty without one."""
    if not torch.cuda.is_available():
        return {}
    major, minor_ = torch.cuda.get_device_capability()
    return {"name": torch.cuda.get_device_name(), "compute_capability": f"{major}.{minor_}"}
