"""Compilers and headers that tests of the C++ sources use, where they are."""
import os
import shutil
from importlib.util import find_spec
from pathlib import Path

import pytest

from clip_ttrt import build_kernels, kernels


def each_headers():
    """A parameter for each set of TensorRT's headers, or one that skips: TENSORRT_INCLUDE_DIRS
    (folders with `:` between them), else TENSORRT_INCLUDE_DIR, what is fetched, the system's."""
    named = os.environ.get("TENSORRT_INCLUDE_DIRS") or os.environ.get("TENSORRT_INCLUDE_DIR")
    fetched = kernels.cache().glob("tensorrt-*/include")
    folders = named.split(os.pathsep) if named else [*fetched, *build_kernels.SYSTEM_INCLUDES]
    found = [one for one in map(Path, folders) if build_kernels.major_of_headers(one) is not None]
    missing = pytest.mark.skip(reason="no headers of TensorRT: TENSORRT_INCLUDE_DIRS names none")
    sets = [pytest.param(folder, id=folder.parent.name) for folder in found]
    return sets or [pytest.param(None, marks=missing)]


try:
    NVCC = build_kernels.find_nvcc()
except build_kernels.CannotBuild:
    NVCC = None
needs_nvcc = pytest.mark.skipif(
    NVCC is None or shutil.which("g++") is None, reason="needs nvcc and g++"
)


def cuda():
    """The folder of the CUDA runtime's headers and its library, of wheels or a toolkit; or None."""
    package = find_spec("nvidia")
    roots = [Path(root) for root in (package.submodule_search_locations if package else ())]
    places = [NVCC.resolve().parent.parent] if NVCC else []
    places += [path for root in roots for path in sorted(root.glob("cu*"))]
    # PyTorch's wheels bring cuda_runtime_api.h without all that it includes.
    whole = [one for one in places if (one / "include" / "crt" / "host_defines.h").is_file()]
    libraries = [path for place in places for path in sorted(place.glob("lib*/libcudart.so*"))]
    return (whole[0] / "include", libraries[0]) if whole and libraries else None
