"""Builds the fused kernels into clip_ttrt/lib/libclip_ttrt_kernels.so.

    python -m kernels.build                 every supported GPU: sm_80, sm_86, sm_89, sm_90a
    python -m kernels.build --arch 90a      one of them (faster, while developing)
    python -m kernels.build --if-possible   what `make compile` does first: for the GPUs here, where TensorRT can use the library
                                            and it is missing; what goes wrong is one line and no failure

Needs nvcc (on PATH, or from `pip install nvidia-cuda-nvcc nvidia-cuda-cccl`) and a C++ compiler. The TensorRT plugin is
part of the library where TensorRT's headers are found: in TENSORRT_INCLUDE_DIR, in the system's include
paths, or in a checkout of NVIDIA/TensorRT v8.6.1 that is fetched into build/ where there is a network.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import pathlib
import re
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
SET_HEADERS = f"set TENSORRT_INCLUDE_DIR to the directory `include` of a checkout of {TENSORRT_REPOSITORY} at {TENSORRT_TAG}"
NO_TENSORRT = f"kernels.build: built without the TensorRT plugin, because TensorRT's headers are missing; {SET_HEADERS}"
NO_HEADERS = f"kernels.build: TensorRT's headers are missing and cannot be fetched; {SET_HEADERS}"
NATIVE_SERVES = "for now TensorRT's own kernels serve, which are slower"

TENSORRT_PACKAGES = ("tensorrt", "torch_tensorrt")  # as clip_ttrt.backends has them, whose import takes seconds
TRY_OUT_SECONDS = 300
TRY_OUT = """
import pathlib, sys
try:
    import torch
    from clip_ttrt import kernels
    kernels.LIBRARY = pathlib.Path(sys.argv[1])
    kernels.load(kernels.VERSION)
    kernels.attention(torch.zeros(1, 50, 3 * 64, dtype=torch.half, device="cuda"), heads=1, causal=False)
    torch.cuda.synchronize()
except Exception as problem:
    sys.exit(str(problem).strip().split(chr(10))[0])
"""


class CannotBuild(Exception):
    """Why there is no library, in one line, and the exit code that it stands for."""

    def __init__(self, why: str, code: int):
        super().__init__(why)
        self.code = code


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


def find_tools(fetch: bool) -> tuple[pathlib.Path, pathlib.Path | None]:
    """nvcc and the directory with TensorRT's headers, or None for these. Raises CannotBuild where something else is missing."""
    nvcc = find_nvcc()
    if nvcc is None:
        raise CannotBuild(NO_NVCC, 2)
    if shutil.which("g++") is None:
        raise CannotBuild(NO_COMPILER, 2)
    try:
        return nvcc, find_tensorrt(fetch)
    except FileNotFoundError as error:
        raise CannotBuild(str(error), 2) from error


def compile_library(
    nvcc: pathlib.Path, architectures: list[str], tensorrt: pathlib.Path | None, threads: int, verbose: bool = False, quiet: bool = False
) -> pathlib.Path:
    """The library as it lies in build/. Raises CannotBuild with the command that fails or, where it is quiet, the first error."""
    BUILD.mkdir(parents=True, exist_ok=True)
    for command in build_commands(nvcc, architectures, tensorrt, threads, verbose):
        if verbose:
            print(" ".join(command))
        answer = subprocess.run(command, check=False, capture_output=quiet, text=True, errors="replace")
        if answer.returncode != 0:
            raise CannotBuild(f"kernels.build: failed: {first_error(answer.stderr + answer.stdout) if quiet else ' '.join(command)}", 1)
    return BUILD / OUTPUT.name


def first_error(said: str) -> str:
    """Of what a command said, the first line that speaks of an error, else the last."""
    lines = said.strip().splitlines() or ["it said nothing"]
    return next((line for line in lines if re.search(r"\berror\b", line, re.IGNORECASE)), lines[-1]).strip()[:200]


def publish(library: pathlib.Path, architectures: list[str], plugin: bool) -> None:
    """Move the library to where it is used, and say so."""
    OUTPUT.parent.mkdir(parents=True, exist_ok=True)
    os.replace(library, OUTPUT)
    kind = "with the TensorRT plugin" if plugin else "without the TensorRT plugin"
    print(f"kernels.build: {OUTPUT.relative_to(KERNELS.parent)} for {names(architectures)}, {kind}")


def names(architectures: list[str]) -> str:
    return ", ".join("sm_" + a for a in architectures)


def build(architectures: list[str], fetch: bool = True, threads: int = 1, verbose: bool = False) -> int:
    """Builds the library; returns the exit code, after one sentence on stderr where something is missing."""
    try:
        nvcc, tensorrt = find_tools(fetch)
        library = compile_library(nvcc, architectures, tensorrt, threads, verbose)
    except CannotBuild as problem:
        print(problem, file=sys.stderr)
        return problem.code
    publish(library, architectures, tensorrt is not None)
    if tensorrt is None:
        print(NO_TENSORRT, file=sys.stderr)
    return 0


def architectures_here() -> list[str] | None:
    """Those of the GPUs here for which there are kernels, all where the driver does not tell them; None where no GPU answers."""
    def said(*arguments: str) -> str:
        try:
            answer = subprocess.run(["nvidia-smi", *arguments], capture_output=True, text=True, errors="replace", timeout=60, check=False)
        except (OSError, subprocess.TimeoutExpired):
            return ""
        return answer.stdout if answer.returncode == 0 else ""

    if not said("-L").startswith("GPU"):
        return None
    capabilities = re.findall(r"^(\d+)\.(\d+)$", said("--query-gpu=compute_cap", "--format=csv,noheader"), re.MULTILINE)
    here = {major + minor for major, minor in capabilities}
    return [a for a in ARCHITECTURES if not here or a.rstrip("a") in here]


def try_out(library: pathlib.Path) -> None:
    """Raises CannotBuild where TensorRT does not take the library or its kernels do not run here, as with a driver older than nvcc's CUDA."""
    trial = [sys.executable, "-c", TRY_OUT, str(library)]
    try:
        answer = subprocess.run(trial, cwd=KERNELS.parent, capture_output=True, text=True, errors="replace", timeout=TRY_OUT_SECONDS, check=False)
    except subprocess.TimeoutExpired:
        raise CannotBuild(f"kernels.build: the kernels did not run within {TRY_OUT_SECONDS} s", 1) from None
    if answer.returncode != 0:
        said = (answer.stderr.strip().splitlines() or [f"exit code {answer.returncode}"])[-1]
        raise CannotBuild(f"kernels.build: the kernels do not run here: {said[:300]}", 1)


def build_if_possible(fetch: bool = True) -> None:
    """Builds the library for the GPUs here, with the plugin, where TensorRT can use it and there is none yet.

    Silent where that is not so. What goes wrong is one line, and then there is no library, so that TensorRT's own kernels serve.
    """
    if OUTPUT.is_file() or any(importlib.util.find_spec(name) is None for name in TENSORRT_PACKAGES):
        return
    architectures = architectures_here()
    if architectures is None:
        return
    try:
        if not architectures:
            raise CannotBuild(f"kernels.build: no GPU here is one of {names(list(ARCHITECTURES))}", 2)
        nvcc, tensorrt = find_tools(fetch)
        if tensorrt is None:
            raise CannotBuild(NO_HEADERS, 2)
        print(f"kernels.build: building the fused kernels for {names(architectures)}, a minute or less", flush=True)
        library = compile_library(nvcc, architectures, tensorrt, threads=len(architectures), quiet=True)
        try_out(library)
        publish(library, architectures, plugin=True)
    except CannotBuild as problem:
        print(f"{problem}; {NATIVE_SERVES}", file=sys.stderr)
    except OSError as problem:  # such as a folder that cannot be written to
        print(f"kernels.build: {problem}; {NATIVE_SERVES}", file=sys.stderr)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m kernels.build", description=__doc__.split("\n")[0])
    parser.add_argument("--arch", action="append", choices=ARCHITECTURES, help="build for this GPU only (may be repeated)")
    parser.add_argument("--no-fetch", action="store_true", help="do not fetch TensorRT's headers")
    parser.add_argument("--threads", type=int, default=1, help="architectures compiled at the same time")
    parser.add_argument("--verbose", action="store_true", help="print the commands and the kernels' registers")
    parser.add_argument("--if-possible", action="store_true", help="for the GPUs here, where the library is missing and of use; never fails")
    options = parser.parse_args(arguments)
    if options.if_possible:
        build_if_possible(not options.no_fetch)
        return 0
    return build(options.arch or list(ARCHITECTURES), not options.no_fetch, options.threads, options.verbose)


if __name__ == "__main__":
    sys.exit(main())
