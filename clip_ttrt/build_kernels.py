"""Builds the fused kernels, with the plugins of the TensorRT that is installed.

    python -m clip_ttrt.build_kernels                  for every supported GPU
    python -m clip_ttrt.build_kernels --arch 90a       for one of them (faster, while developing)
    python -m clip_ttrt.build_kernels --if-possible    what `make compile` does first: for the GPUs
                                                       here, where TensorRT can use the library and
                                                       none that serves is there; never fails

Needs nvcc (on PATH, in CUDA_HOME, or from NVIDIA's wheels) and g++. The plugins need TensorRT's
headers: in TENSORRT_INCLUDE_DIR, in the system's include paths, or from NVIDIA/TensorRT where there
is a network. The library goes to `clip_ttrt/lib/` of this package or, where that cannot be written,
to the user's cache folder.
"""
import argparse
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path
from typing import Optional

import torch

from clip_ttrt import kernels, stack
from clip_ttrt.errors import UserError

ARCHITECTURES = ("80", "86", "89", "90a", "100", "120")

REPOSITORY = "https://github.com/NVIDIA/TensorRT"
TAGS = {(10, 6): "v10.6.0", (10, 15): "v10.15", (11, 1): "v11.1"}  # of headers, by version
SYSTEM_INCLUDES = ("/usr/include/x86_64-linux-gnu", "/usr/include", "/usr/local/include")
TOOLKITS = ("/usr/local/cuda",)

TEXT = {"text": True, "errors": "replace"}
TRY_OUT_SECONDS = 300
TRY_OUT = """
import pathlib, sys
try:
    import torch
    from clip_ttrt import kernels
    kernels.find = lambda: kernels.read(pathlib.Path(sys.argv[1]))
    kernels.library.cache_clear()
    kernels.library()
    from clip_ttrt import trt
    trt.load_runtime("tensorrt")
    kernels.load(kernels.version())
    qkv = torch.zeros(1, 50, 3 * 64, dtype=torch.half, device="cuda")
    kernels.attention(qkv, heads=1, causal=False)
    torch.cuda.synchronize()
except Exception as problem:
    sys.exit(str(problem).strip().split(chr(10))[0])
"""


class CannotBuild(Exception):
    """Why there is no library, in one clause, and the exit code that it stands for."""

    def __init__(self, why: str, code: int = 2):
        super().__init__(why)
        self.code = code


def find_nvcc() -> Path:
    """nvcc on PATH, else in CUDA_HOME, NVIDIA's wheels or the toolkit's folder, or CannotBuild."""
    if on_path := shutil.which("nvcc"):
        return Path(on_path)
    toolkits = [os.environ[name] for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    packages = {Path(sysconfig.get_paths()[kind]) for kind in ("purelib", "platlib")}
    wheels = sorted((one for root in packages for one in root.glob("nvidia/*")), reverse=True)
    for root in (*toolkits, *wheels, *TOOLKITS):
        if (path := Path(root, "bin", "nvcc")).is_file():
            return path
    pin = torch.version.cuda or "13.0"  # all of the CUDA runtime that PyTorch brings
    names = ("cuda-nvcc", "nvvm", "cuda-crt", "cuda-runtime", "cuda-cccl")
    install = " ".join(f"'nvidia-{name}=={pin}.*'" for name in names)
    raise CannotBuild(
        "nvcc is missing; install the CUDA toolkit (nvcc on PATH, or CUDA_HOME) or run "
        f"`pip install {install}`"
    )


# TensorRT's headers


def major_of_headers(folder: Path) -> Optional[int]:
    """The major version of TensorRT's headers in a folder; None where there are none."""
    try:
        text = (folder / "NvInferVersion.h").read_text(errors="replace")
    except OSError:
        return None
    found = re.search(r"^#define (?:NV_TENSORRT_MAJOR|TRT_MAJOR_ENTERPRISE) (\d+)", text, re.M)
    return int(found.group(1)) if found and (folder / "NvInferRuntime.h").is_file() else None


def tag_for(installed: str) -> Optional[str]:
    """The tag whose headers serve a TensorRT: the newest that is not newer, else the oldest of its
    major version; None where there is none of that."""
    version = tuple(map(int, re.findall(r"\d+", installed)[:2]))
    same_major = [key for key in TAGS if key[0] == version[0]]
    not_newer = [key for key in same_major if key <= version]
    return TAGS[max(not_newer or same_major[:1])] if same_major else None


def find_tensorrt(fetch: bool) -> Optional[Path]:
    """The folder of the installed TensorRT's headers, fetched into the cache if need be, or None.

    Where no TensorRT is installed, TENSORRT_INCLUDE_DIR alone counts.  Raises CannotBuild where it
    holds other headers.
    """
    installed, major = stack.versions().get("tensorrt"), stack.tensorrt_major()
    if given := os.environ.get("TENSORRT_INCLUDE_DIR"):
        if (holds := major_of_headers(Path(given))) is None or major not in (None, holds):
            wanted = f"TensorRT {installed}, which is installed" if major else "a TensorRT"
            raise CannotBuild(f"TENSORRT_INCLUDE_DIR is {given}, without the headers of {wanted}")
        return Path(given)
    if installed is None:
        return None
    tag = tag_for(installed)
    fetched = kernels.cache() / f"tensorrt-{tag}" / "include"
    for folder in (*map(Path, SYSTEM_INCLUDES), fetched):
        if major_of_headers(folder) == major:
            return folder
    return fetched if tag and fetch and _fetch(tag, fetched.parent) else None


def _fetch(tag: str, checkout: Path) -> bool:
    """Whether git could check the tag's headers out."""
    shutil.rmtree(checkout, ignore_errors=True)  # what an interrupted fetch left
    clone = ["git", "clone", "--quiet", "--depth", "1", "--filter=blob:none", "--sparse"]
    clone += ["--branch", tag, REPOSITORY, str(checkout)]
    environment = {**os.environ, "GIT_TERMINAL_PROMPT": "0"}
    try:
        for command in (clone, ["git", "-C", str(checkout), "sparse-checkout", "set", "include"]):
            subprocess.run(command, env=environment, capture_output=True, timeout=120, check=True)
    except (OSError, subprocess.SubprocessError):
        return False
    return major_of_headers(checkout / "include") is not None


def no_headers() -> str:
    installed = stack.versions().get("tensorrt")
    tag = installed and tag_for(installed)
    return (
        "TensorRT's headers are missing and cannot be fetched; set TENSORRT_INCLUDE_DIR to the "
        f"folder `include` of a checkout of {REPOSITORY} at {tag or 'the tag of your TensorRT'}"
    )


# The build


def build_commands(
    nvcc: Path, architectures: list[str], tensorrt: Optional[Path], folder: str,
    threads: int = 1, verbose: bool = False,
) -> list[list[str]]:  # fmt: skip
    """The compilations into a folder, then the link, whose output is the last command's `-o`."""
    # A wheel's nvcc keeps its libraries in lib, a toolkit's in lib64.
    root = nvcc.resolve().parent.parent
    libraries = [f"-L{root / name}" for name in ("lib64", "lib") if (root / name).is_dir()]
    flags = ["-O3", "-std=c++17", "-Xcompiler", "-fPIC,-Wall,-Wextra,-Wno-unknown-pragmas"]
    # Machine code for each, and PTX of the newest, for GPUs to come.
    codes = {name: f"sm_{name}" for name in architectures}
    if kernels.PTX in codes:
        codes[kernels.PTX] = f"[sm_{kernels.PTX},compute_{kernels.PTX}]"
    device = [f"-gencode=arch=compute_{name},code={code}" for name, code in codes.items()]
    # 177, "never referenced": the Hopper kernel has no body for other architectures.
    device += ["-lineinfo", "-diag-suppress=177", f"--threads={threads}"]
    device += ["-Xptxas", "-v"] if verbose else []
    host = [f'-DCLIP_TTRT_VERSION="{kernels.version()}"']
    host += [f'-DCLIP_TTRT_ARCHITECTURES="{" ".join(architectures)}"']
    host += [] if tensorrt is None else ["-isystem", str(tensorrt), "-DCLIP_TTRT_PLUGINS"]
    commands, objects = [], []
    for source in kernels.source_files():
        if not source.endswith((".cu", ".cpp")) or tensorrt is None and "_plugin" in source:
            continue
        objects.append(f"{folder}/{source.replace('/', '_')}.o")
        own = device if source.endswith(".cu") else host
        path = str(kernels.sources() / source)
        commands.append([str(nvcc), *flags, *own, "-c", "-o", objects[-1], path])
    # The CUDA runtime is linked statically and kept to ourselves: PyTorch has its own.
    link = ["-cudart", "static", "-Xlinker", "--exclude-libs=ALL", "-Xlinker", "-Bsymbolic"]
    # TensorRT keeps pointers to the plugins' creators: the library must never be unloaded.
    link += ["-Xlinker", "-z,nodelete", *libraries, "-o", f"{folder}/library.so"]
    return [*commands, [str(nvcc), "-shared", *link, *objects, "-ldl"]]


def publish(built: Path, name: str) -> Path:
    """Puts the library where it is found, in one step, and returns its place, or CannotBuild."""
    problem = None
    for folder in kernels.folders():
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=folder) as staged:
                # Who has the old file open keeps it.
                os.replace(shutil.copy(built, Path(staged, name)), folder / name)
            return folder / name
        except OSError as error:
            problem = error
    raise CannotBuild(f"the library cannot be written: {problem}")


def build(
    architectures: list[str], fetch: bool, threads: int, verbose: bool = False,
    for_these_gpus: bool = False,
) -> None:  # fmt: skip
    """Builds the library, puts it where it is found, and says so.

    for_these_gpus: quietly, with the plugins or not at all, and only if its kernels run here.
    Raises CannotBuild, or OSError where no folder can be written.
    """
    names = ", ".join("sm_" + name for name in architectures)
    nvcc = find_nvcc()  # before anything is fetched
    if shutil.which("g++") is None:
        raise CannotBuild("a C++ compiler is missing; install g++ (`apt-get install g++`)")
    tensorrt = find_tensorrt(fetch)
    if for_these_gpus:
        if tensorrt is None:
            raise CannotBuild(no_headers())
        print(f"build_kernels: building the fused kernels for {names}, a minute or so", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        for command in build_commands(nvcc, architectures, tensorrt, folder, threads, verbose):
            if verbose:
                print(" ".join(command), flush=True)
            done = subprocess.run(command, capture_output=for_these_gpus, **TEXT)
            if done.returncode != 0:
                printed = (done.stderr or "") + (done.stdout or "")
                lines = printed.strip().splitlines() or [" ".join(command)]
                errors = (line for line in lines if re.search(r"\berror\b", line, re.IGNORECASE))
                raise CannotBuild(f"failed: {next(errors, lines[-1]).strip()}", 1)
        built = Path(folder, "library.so")
        if for_these_gpus:
            try_out(built)
        major = 0 if tensorrt is None else major_of_headers(tensorrt)
        place = publish(built, kernels.file_name(major))
    kind = f"with the plugins for TensorRT {major}" if major else "without plugins for TensorRT"
    print(f"build_kernels: {place} for {names}, {kind}")
    if tensorrt is None and stack.tensorrt_major() is not None:
        print(f"build_kernels: {no_headers()}", file=sys.stderr)


def try_out(library: Path) -> None:
    """Raises CannotBuild where TensorRT does not take the library or its kernels do not run here,
    as with a driver older than nvcc's CUDA."""
    trial = [sys.executable, "-c", TRY_OUT, str(library)]
    try:
        done = subprocess.run(trial, cwd=kernels.PACKAGE.parent, timeout=TRY_OUT_SECONDS,
                              capture_output=True, **TEXT)
    except subprocess.TimeoutExpired:
        raise CannotBuild(f"the kernels did not run within {TRY_OUT_SECONDS} s", 1) from None
    if done.returncode != 0:
        why = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        raise CannotBuild(f"the kernels do not run here: {why[:300]}", 1)


def build_if_possible(fetch: bool = True) -> None:
    """Builds the library for the GPUs here where TensorRT can use it and none that serves is there.

    What goes wrong is one line on stderr, and no failure.
    """
    packages = {"tensorrt", "torch-tensorrt"} <= stack.versions().keys()
    if not packages or not torch.cuda.is_available():
        return
    gpus = [torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count())]
    # The newest code that runs on each of them.
    running = [[name for name in ARCHITECTURES if kernels.runs_on((name,), gpu)] for gpu in gpus]
    newest = {names[-1] for names in running if names}
    architectures = [name for name in ARCHITECTURES if name in newest]
    try:
        if not architectures:
            raise CannotBuild("no GPU here has compute capability 8.0 or newer")
        found, here = kernels.find(), (kernels.version(), stack.tensorrt_major())
        if (
            found is None
            or (found.version, found.tensorrt_major) != here
            or not all(kernels.runs_on(found.architectures, gpu) for gpu in gpus)
        ):
            build(architectures, fetch, threads=len(architectures), for_these_gpus=True)
    except (CannotBuild, UserError, OSError) as problem:
        slower = "for now TensorRT's own kernels serve, which are slower"
        print(f"build_kernels: {problem}; {slower}", file=sys.stderr)


def main(arguments: Optional[list[str]] = None) -> int:
    """The command; returns its exit code, after one sentence on stderr where that is not 0."""
    parser = argparse.ArgumentParser(
        prog="python -m clip_ttrt.build_kernels", description=__doc__.split("\n")[0]
    )
    add = parser.add_argument
    add("--arch", action="append", choices=ARCHITECTURES, help="for this GPU only; repeatable")
    add("--no-fetch", action="store_true", help="do not fetch TensorRT's headers")
    add("--threads", type=int, default=1, help="architectures compiled at the same time")
    add("--verbose", action="store_true", help="print the commands and the kernels' registers")
    add("--if-possible", action="store_true",
        help="for the GPUs here, where none that serves is there and of use; never fails")
    options = parser.parse_args(arguments)
    fetch = not options.no_fetch
    if options.if_possible:
        build_if_possible(fetch)
        return 0
    try:
        build(options.arch or list(ARCHITECTURES), fetch, options.threads, options.verbose)
    except (CannotBuild, UserError, OSError) as problem:
        print(f"build_kernels: {problem}", file=sys.stderr)
        return getattr(problem, "code", 2)
    return 0


if __name__ == "__main__":
    sys.exit(main())
