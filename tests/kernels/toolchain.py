"""Compilers and headers that tests of the C++ sources use, where they are."""

import functools
import os
import shutil
from importlib.util import find_spec
from pathlib import Path

import pytest

from clip_ttrt import build_kernels

ROOT = Path(__file__).parents[2]


def tensorrt_headers() -> list[Path]:
    """Sets of TensorRT's headers: TENSORRT_INCLUDE_DIRS (folders with `:` between them), else
    TENSORRT_INCLUDE_DIR, else what the build has fetched or the system has."""
    named = os.environ.get("TENSORRT_INCLUDE_DIRS") or os.environ.get("TENSORRT_INCLUDE_DIR")
    fetched = build_kernels.scratch_folder().glob("tensorrt-*/include")
    folders = named.split(os.pathsep) if named else [*fetched, *build_kernels.SYSTEM_INCLUDES]
    found = [Path(folder) for folder in folders]
    return [folder for folder in found if build_kernels.major_of_headers(folder) is not None]


def each_headers():
    """A parameter for each set of headers, or one that skips."""
    missing = pytest.mark.skip(reason="no headers of TensorRT: TENSORRT_INCLUDE_DIRS names none")
    found = tensorrt_headers()
    names = [folder.parent.name if folder.name == "include" else folder.name for folder in found]
    sets = [pytest.param(folder, id=name) for folder, name in zip(found, names)]
    return sets or [pytest.param(None, marks=missing)]


@functools.cache
def nvcc() -> Path | None:
    try:
        return build_kernels.find_nvcc()
    except build_kernels.CannotBuild:
        return None


needs_nvcc = pytest.mark.skipif(
    nvcc() is None or shutil.which("g++") is None, reason="needs nvcc and g++"
)


@functools.cache
def cuda() -> tuple[Path, Path] | None:
    """The folder of the CUDA runtime's headers and its library, of wheels or a toolkit."""
    package = find_spec("nvidia")
    roots = [Path(root) for root in (package.submodule_search_locations if package else ())]
    places = [nvcc().resolve().parent.parent] if nvcc() else []
    places += [path for root in roots for path in sorted(root.glob("cu*"))]
    headers = [place / "include" for place in places]
    # PyTorch's wheels bring cuda_runtime_api.h without all that it includes.
    whole = [one for one in headers if (one / "crt" / "host_defines.h").is_file()]
    libraries = [path for place in places for path in sorted(place.glob("lib*/libcudart.so*"))]
    return (whole[0], libraries[0]) if whole and libraries else None
