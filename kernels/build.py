"""Builds the fused kernels into clip_ttrt/lib/libclip_ttrt_kernels.so.

    python -m kernels.build                 every supported GPU: sm_80, sm_86, sm_89, sm_90a
    python -m kernels.build --arch 90a      one of them (faster, while developing)

Needs nvcc (on PATH, or from `pip install nvidia-cuda-nvcc nvidia-cuda-cccl`) and a C++ compiler. The TensorRT plugin is
part of the library where TensorRT's headers are found: in TENSORRT_INCLUDE_DIR, in the system's include
paths, or in a checkout of NVIDIA/TensorRT v8.6.1 that is fetched into build/ where there is a network.
"""

from __future__ import annotations

import argparse
import os
import pathlib
import shutil
import subprocess
import sys
import sysconfig

KERNELS = pathlib.Path(__file__).resolve().parent
OUTPUT = KERNELS.parent / "clip_ttrt" / "lib" / "libclip_ttrt_kernels.so"
BUILD = KERNELS.parent / "build" / "kernels"

ARCHITECTURES = ("80", "86", "89", "90a")
KERNEL_SOURCES = ("attention/attention.cu", "elementwise/elementwise.cu", "elementwise/embedding.cu", "linear/linear.cpp")
PLUGIN_SOURCES = ("attention/attention_plugin.cpp", "elementwise/elementwise_plugin.cpp", "linear/linear_plugin.cpp")

TENSORRT_HEADER = "NvInferRuntime.h"
TENSORRT_REPOSITORY = "https://github.com/NVIDIA/TensorRT"
TENSORRT_TAG = "v8.6.1"  # of the headers; the plugin built with them runs in 8.6.0, which pip installs
SYSTEM_INCLUDES = ("/usr/include/x86_64-linux-gnu", "/usr/include", "/usr/local/include")

NO_NVCC = "kernels.build: nvcc is missing; install the CUDA toolkit (nvcc on PATH) or run `pip install nvidia-cuda-nvcc nvidia-cuda-cccl`"
NO_COMPILER = "kernels.build: a C++ compiler is missing; install g++ (Debian, Ubuntu: apt-get install g++)"
NO_TENSORRT = (
    "kernels.build: built without the TensorRT plugin, because TensorRT's headers are missing; set "
    f"TENSORRT_INCLUDE_DIR to the directory `include` of a checkout of {TENSORRT_REPOSITORY} at {TENSORRT_TAG}"
)


def find_nvcc() -> pathlib.Path | None:
    """nvcc on PATH, else the newest one that a wheel put into site-packages/nvidia/."""
    on_path = shutil.which("nvcc")
    if on_path:
        return pathlib.Path(on_path)
    site_packages = pathlib.Path(sysconfig.get_paths()["purelib"])
    found = sorted(site_packages.glob("nvidia/*/bin/nvcc"))
    return found[-1] if found else None


def find_tensorrt(fetch: bool) -> pathlib.Path | None:
    """The directory with TensorRT's headers, or None."""
    given = os.environ.get("TENSORRT_INCLUDE_DIR")
    checkout = BUILD / f"tensorrt-{TENSORRT_TAG}"
    for directory in ([given] if given else [*SYSTEM_INCLUDES, checkout / "include"]):
        if (pathlib.Path(directory) / TENSORRT_HEADER).is_file():
            return pathlib.Path(directory)
    if given:
        raise FileNotFoundError(f"kernels.build: TENSORRT_INCLUDE_DIR is {given}, which holds no {TENSORRT_HEADER}")
    if fetch and shutil.which("git") and _fetch_tensorrt(checkout):
        return checkout / "include"
    return None


def _fetch_tensorrt(checkout: pathlib.Path) -> bool:
    shutil.rmtree(checkout, ignore_errors=True)  # what an interrupted fetch left
    checkout.parent.mkdir(parents=True, exist_ok=True)
    clone = [
        "git", "clone", "--quiet", "--depth", "1", "--filter=blob:none", "--sparse",
        "--branch", TENSORRT_TAG, TENSORRT_REPOSITORY, str(checkout),
    ]  # fmt: skip
    environment = {**os.environ, "GIT_TERMINAL_PROMPT": "0"}
    try:
        for command in (clone, ["git", "-C", str(checkout), "sparse-checkout", "set", "include"]):
            answer = subprocess.run(command, env=environment, capture_output=True, timeout=120, check=False)
            if answer.returncode != 0:
                return False
    except subprocess.TimeoutExpired:
        return False
    return (checkout / "include" / TENSORRT_HEADER).is_file()


def architecture_flags(architectures: list[str]) -> list[str]:
    return [f"-gencode=arch=compute_{a},code=sm_{a}" for a in architectures]


def build_commands(
    nvcc: pathlib.Path, architectures: list[str], tensorrt: pathlib.Path | None, threads: int, verbose: bool
) -> list[list[str]]:
    """The compilations, then the link."""
    # A wheel's nvcc keeps its libraries in lib, a toolkit's in lib64.
    root = nvcc.resolve().parent.parent
    libraries = [f"-L{root / name}" for name in ("lib64", "lib") if (root / name).is_dir()]
    compile_flags = ["-O3", "-std=c++17", "-Xcompiler", "-fPIC,-Wall,-Wno-unknown-pragmas"]
    commands, objects = [], []
    for source in KERNEL_SOURCES:
        target = BUILD / (source.replace("/", "_") + ".o")
        # 177, "never referenced": the Hopper kernel has no body for older architectures.
        flags = [*architecture_flags(architectures), "-lineinfo", "-diag-suppress=177", f"--threads={threads}"]
        if verbose:
            flags += ["-Xptxas", "-v"]
        commands.append([str(nvcc), *compile_flags, *flags, "-c", "-o", str(target), str(KERNELS / source)])
        objects.append(str(target))
    if tensorrt is not None:
        for source in PLUGIN_SOURCES:
            target = BUILD / (source.replace("/", "_") + ".o")
            # The plugin interface is deprecated in favour of one that TensorRT 8.6 does not have yet.
            flags = ["-isystem", str(tensorrt), "-Xcompiler", "-Wno-deprecated-declarations"]
            commands.append([str(nvcc), *compile_flags, *flags, "-c", "-o", str(target), str(KERNELS / source)])
            objects.append(str(target))
    link_flags = [
        # The CUDA runtime is linked statically and kept to ourselves: the process has PyTorch's as well.
        "-cudart", "static", "-Xlinker", "--exclude-libs=ALL", "-Xlinker", "-Bsymbolic",
        # TensorRT keeps a pointer to the plugin's creator: the library must never be unloaded.
        "-Xlinker", "-z,nodelete",
    ]  # fmt: skip
    # Under a name of its own until it is complete: a process that has the old library open keeps it.
    commands.append([str(nvcc), "-shared", *link_flags, *libraries, "-o", str(BUILD / OUTPUT.name), *objects, "-ldl"])
    return commands


def build(architectures: list[str], fetch: bool = True, threads: int = 1, verbose: bool = False) -> int:
    """Builds the library; returns the exit code, after one sentence on stderr where something is missing."""
    nvcc = find_nvcc()
    if nvcc is None:
        print(NO_NVCC, file=sys.stderr)
        return 2
    if shutil.which("g++") is None:
        print(NO_COMPILER, file=sys.stderr)
        return 2
    try:
        tensorrt = find_tensorrt(fetch)
    except FileNotFoundError as error:
        print(error, file=sys.stderr)
        return 2
    BUILD.mkdir(parents=True, exist_ok=True)
    OUTPUT.parent.mkdir(parents=True, exist_ok=True)
    for command in build_commands(nvcc, architectures, tensorrt, threads, verbose):
        if verbose:
            print(" ".join(command))
        if subprocess.run(command, check=False).returncode != 0:
            print(f"kernels.build: failed: {' '.join(command)}", file=sys.stderr)
            return 1
    os.replace(BUILD / OUTPUT.name, OUTPUT)
    plugin = "with the TensorRT plugin" if tensorrt is not None else "without the TensorRT plugin"
    print(f"kernels.build: {OUTPUT.relative_to(KERNELS.parent)} for {', '.join('sm_' + a for a in architectures)}, {plugin}")
    if tensorrt is None:
        print(NO_TENSORRT, file=sys.stderr)
    return 0


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m kernels.build", description=__doc__.split("\n")[0])
    parser.add_argument("--arch", action="append", choices=ARCHITECTURES, help="build for this GPU only (may be repeated)")
    parser.add_argument("--no-fetch", action="store_true", help="do not fetch TensorRT's headers")
    parser.add_argument("--threads", type=int, default=1, help="architectures compiled at the same time")
    parser.add_argument("--verbose", action="store_true", help="print the commands and the kernels' registers")
    options = parser.parse_args(arguments)
    return build(options.arch or list(ARCHITECTURES), not options.no_fetch, options.threads, options.verbose)


if __name__ == "__main__":
    sys.exit(main())
