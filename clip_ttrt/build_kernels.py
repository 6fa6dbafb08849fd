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

from __future__ import annotations

import argparse
import contextlib
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from importlib import metadata
from pathlib import Path

from clip_ttrt import kernels, stack
from clip_ttrt.errors import UserError

ARCHITECTURES = ("80", "86", "89", "90a", "100", "120")

REPOSITORY = "https://github.com/NVIDIA/TensorRT"
TAGS = {(10, 6): "v10.6.0", (10, 15): "v10.15", (11, 1): "v11.1"}  # of headers, by version
HEADER = "NvInferRuntime.h"
SYSTEM_INCLUDES = ("/usr/include/x86_64-linux-gnu", "/usr/include", "/usr/local/include")
TOOLKITS = ("/usr/local/cuda",)

NO_COMPILER = "a C++ compiler is missing; install g++ (Debian, Ubuntu: apt-get install g++)"
NATIVE_SERVES = "for now TensorRT's own kernels serve, which are slower"

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
    """nvcc on PATH, else in CUDA_HOME, in NVIDIA's wheels, or where the toolkit installs itself.

    Raises CannotBuild where it is nowhere.
    """
    if on_path := shutil.which("nvcc"):
        return Path(on_path)
    toolkits = [os.environ[name] for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    packages = {sysconfig.get_paths()[kind] for kind in ("purelib", "platlib")}
    wheels = [path for root in packages for path in Path(root).glob("nvidia/*/bin/nvcc")]
    found = [Path(root, "bin", "nvcc") for root in toolkits]
    found += sorted(wheels, reverse=True)
    found += [Path(root, "bin", "nvcc") for root in TOOLKITS]
    for path in found:
        if path.is_file():
            return path
    raise CannotBuild(
        "nvcc is missing; install the CUDA toolkit (nvcc on PATH, or CUDA_HOME) or run "
        f"`pip install {' '.join(wheels_of_nvcc())}`"
    )


def wheels_of_nvcc() -> list[str]:
    """The wheels that nvcc comes in, pinned together to the CUDA runtime that PyTorch brought."""
    try:
        pin = stack.minor(metadata.version("nvidia-cuda-runtime"))
    except metadata.PackageNotFoundError:
        pin = "13.0"
    names = ("nvidia-cuda-nvcc", "nvidia-nvvm", "nvidia-cuda-crt")
    return [f"'{name}=={pin}.*'" for name in (*names, "nvidia-cuda-runtime", "nvidia-cuda-cccl")]


def major_of_headers(folder: Path) -> int | None:
    """The major version of TensorRT's headers in a folder; None where there are none."""
    try:
        text = (folder / "NvInferVersion.h").read_text(errors="replace")
    except OSError:
        return None
    found = re.search(r"^#define (?:NV_TENSORRT_MAJOR|TRT_MAJOR_ENTERPRISE) (\d+)", text, re.M)
    return int(found.group(1)) if found and (folder / HEADER).is_file() else None


def tag_for(installed: str) -> str | None:
    """The tag whose headers serve a TensorRT: the newest that is not newer, else the oldest of its
    major version; None where there is none of that."""
    version = tuple(int(part) for part in re.findall(r"\d+", installed)[:2])
    same_major = [key for key in sorted(TAGS) if key[0] == version[0]]
    not_newer = [key for key in same_major if key <= version]
    return TAGS[(not_newer or same_major[:1])[-1]] if same_major else None


def find_tensorrt(scratch: Path, fetch: bool) -> Path | None:
    """The folder of the installed TensorRT's headers, fetched into `scratch` if need be, or None.

    Where no TensorRT is installed, TENSORRT_INCLUDE_DIR alone counts.  Raises CannotBuild where it
    holds other headers.
    """
    installed = stack.versions().get("tensorrt")
    major = None if installed is None else int(installed.split(".")[0])
    if given := os.environ.get("TENSORRT_INCLUDE_DIR"):
        holds = major_of_headers(Path(given))
        if holds is None:
            raise CannotBuild(
                f"TENSORRT_INCLUDE_DIR is {given}, which holds no headers of TensorRT"
            )
        if major not in (None, holds):
            raise CannotBuild(
                f"TENSORRT_INCLUDE_DIR is {given}, which holds the headers of TensorRT {holds}, "
                f"and TensorRT {installed} is installed"
            )
        return Path(given)
    if major is None:
        return None
    for folder in map(Path, SYSTEM_INCLUDES):
        if major_of_headers(folder) == major:
            return folder
    tag = tag_for(installed)
    if tag is None:
        return None
    checkout = scratch / f"tensorrt-{tag}"
    if major_of_headers(checkout / "include") != major and not (fetch and _fetched(tag, checkout)):
        return None
    return checkout / "include"


def _fetched(tag: str, checkout: Path) -> bool:
    if shutil.which("git") is None:
        return False
    shutil.rmtree(checkout, ignore_errors=True)  # what an interrupted fetch left
    checkout.parent.mkdir(parents=True, exist_ok=True)
    clone = ["git", "clone", "--quiet", "--depth", "1", "--filter=blob:none", "--sparse"]
    clone += ["--branch", tag, REPOSITORY, str(checkout)]
    environment = {**os.environ, "GIT_TERMINAL_PROMPT": "0"}
    try:
        for command in (clone, ["git", "-C", str(checkout), "sparse-checkout", "set", "include"]):
            answer = subprocess.run(
                command, env=environment, capture_output=True, timeout=120, check=False
            )
            if answer.returncode != 0:
                return False
    except subprocess.TimeoutExpired:
        return False
    return major_of_headers(checkout / "include") is not None


def no_headers() -> str:
    installed = stack.versions().get("tensorrt")
    tag = installed and tag_for(installed)
    where = f"a checkout of {REPOSITORY} at {tag or 'the tag of your TensorRT'}"
    return (
        "TensorRT's headers are missing and cannot be fetched; "
        f"set TENSORRT_INCLUDE_DIR to the folder `include` of {where}"
    )


def architecture_flags(architectures: list[str]) -> list[str]:
    """nvcc's: machine code for each, and PTX of the newest, for GPUs to come."""
    codes = {name: f"sm_{name}" for name in architectures}
    if kernels.PTX in codes:
        codes[kernels.PTX] = f"[sm_{kernels.PTX},compute_{kernels.PTX}]"
    return [f"-gencode=arch=compute_{name},code={code}" for name, code in codes.items()]


def compiled_sources(plugins: bool = True) -> list[str]:
    """What is compiled, by its name in the sources' folder."""
    names = [path.relative_to(kernels.sources()).as_posix() for path in kernels.source_files()]
    compiled = [name for name in names if name.endswith((".cu", ".cpp"))]
    return [name for name in compiled if plugins or not name.endswith("_plugin.cpp")]


def build_commands(
    nvcc: Path,
    architectures: list[str],
    tensorrt: Path | None,
    folder: Path,
    threads: int = 1,
    verbose: bool = False,
) -> list[list[str]]:
    """The compilations into a folder, then the link, whose output is the last command's `-o`."""
    # A wheel's nvcc keeps its libraries in lib, a toolkit's in lib64.
    root = nvcc.resolve().parent.parent
    libraries = [f"-L{root / name}" for name in ("lib64", "lib") if (root / name).is_dir()]
    flags = ["-O3", "-std=c++17", "-Xcompiler", "-fPIC,-Wall,-Wextra,-Wno-unknown-pragmas"]
    about = [f'-DCLIP_TTRT_VERSION="{kernels.version()}"']
    about += [f'-DCLIP_TTRT_ARCHITECTURES="{" ".join(architectures)}"']
    # 177, "never referenced": the Hopper kernel has no body for other architectures.
    device = [*architecture_flags(architectures), "-lineinfo", "-diag-suppress=177"]
    device += [f"--threads={threads}", *(["-Xptxas", "-v"] if verbose else [])]
    host = [] if tensorrt is None else ["-isystem", str(tensorrt), "-DCLIP_TTRT_PLUGINS"]
    commands, objects = [], []
    for source in compiled_sources(plugins=tensorrt is not None):
        objects.append(str(folder / f"{source.replace('/', '_')}.o"))
        own = device if source.endswith(".cu") else [*host, *about]
        path = str(kernels.sources() / source)
        commands.append([str(nvcc), *flags, *own, "-c", "-o", objects[-1], path])
    link = [
        # The CUDA runtime is linked statically and kept to ourselves: PyTorch has its own.
        *("-cudart", "static", "-Xlinker", "--exclude-libs=ALL", "-Xlinker", "-Bsymbolic"),
        # TensorRT keeps pointers to the plugins' creators: the library must never be unloaded.
        *("-Xlinker", "-z,nodelete"),
    ]
    output = str(folder / "library.so")
    commands.append([str(nvcc), "-shared", *link, *libraries, "-o", output, *objects, "-ldl"])
    return commands


def compile_library(
    architectures: list[str],
    tensorrt: Path | None,
    folder: Path,
    threads: int,
    verbose: bool = False,
    quiet: bool = False,
) -> Path:
    """The library in a folder.

    Raises CannotBuild with the command that fails or, where it is quiet, the first error.
    """
    nvcc = find_nvcc()
    if shutil.which("g++") is None:
        raise CannotBuild(NO_COMPILER)
    commands = build_commands(nvcc, architectures, tensorrt, folder, threads, verbose)
    for command in commands:
        if verbose:
            print(" ".join(command), flush=True)
        answer = subprocess.run(
            command, check=False, capture_output=quiet, text=True, errors="replace"
        )
        if answer.returncode != 0:
            said = first_error(answer.stderr + answer.stdout) if quiet else " ".join(command)
            raise CannotBuild(f"failed: {said}", 1)
    return folder / "library.so"


def first_error(said: str) -> str:
    """Of what a command said, the first line that speaks of an error, else the last."""
    lines = said.strip().splitlines() or ["it said nothing"]
    errors = (line for line in lines if re.search(r"\berror\b", line, re.IGNORECASE))
    return next(errors, lines[-1]).strip()[:200]


def scratch_folder() -> Path:
    """For fetched headers and objects: `build/` of a checkout, else the cache."""
    if (kernels.PACKAGE / "kernel_sources").is_dir():
        return kernels.cache() / "build"
    return kernels.PACKAGE.parent / "build" / "kernels"


def objects_folder(scratch: Path) -> tempfile.TemporaryDirectory:
    """A folder for objects that goes away again: in `scratch`, or where that cannot be written in
    the system's folder for such."""
    try:
        scratch.mkdir(parents=True, exist_ok=True)
        return tempfile.TemporaryDirectory(dir=scratch)
    except OSError:
        return tempfile.TemporaryDirectory()


def publish(built: Path, name: str) -> Path:
    """Puts the library where it is found, in one step, and returns its place.

    Raises CannotBuild where neither of the folders can be written.
    """
    problem = None
    for folder in kernels.folders():
        staged = folder / f".{name}.{os.getpid()}"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(built, staged)
            os.replace(staged, folder / name)  # who has the old file open keeps it
            return folder / name
        except OSError as error:
            problem = error
            with contextlib.suppress(OSError):
                staged.unlink()
    raise CannotBuild(f"the library cannot be written: {problem}")


def sm(architectures: list[str] | tuple[str, ...]) -> str:
    return ", ".join("sm_" + name for name in architectures)


def build(
    architectures: list[str],
    fetch: bool = True,
    threads: int = 1,
    verbose: bool = False,
    for_these_gpus: bool = False,
) -> None:
    """Builds the library, puts it where it is found, and says so.

    for_these_gpus: quietly, with the plugins or not at all, and only if its kernels run here.
    Raises CannotBuild, or OSError where no folder can be written.
    """
    scratch = scratch_folder()
    find_nvcc()  # before anything is fetched
    tensorrt = find_tensorrt(scratch, fetch)
    if tensorrt is None and for_these_gpus:
        raise CannotBuild(no_headers())
    if for_these_gpus:
        names = sm(architectures)
        print(f"build_kernels: building the fused kernels for {names}, a minute or so", flush=True)
    quiet = for_these_gpus
    with objects_folder(scratch) as folder:
        built = compile_library(architectures, tensorrt, Path(folder), threads, verbose, quiet)
        if for_these_gpus:
            try_out(built)
        major = 0 if tensorrt is None else major_of_headers(tensorrt)
        place = publish(built, kernels.file_name(major))
    kind = f"with the plugins for TensorRT {major}" if major else "without plugins for TensorRT"
    print(f"build_kernels: {place} for {sm(architectures)}, {kind}")
    if tensorrt is None and stack.tensorrt_major() is not None:
        print(f"build_kernels: {no_headers()}", file=sys.stderr)


def _nvidia_smi(*arguments: str) -> str:
    command = ["nvidia-smi", *arguments]
    try:
        answer = subprocess.run(
            command, capture_output=True, text=True, errors="replace", timeout=60, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return answer.stdout if answer.returncode == 0 else ""


def capabilities_here() -> list[tuple[int, int]] | None:
    """Of the GPUs here, empty where the driver does not tell them; None where no GPU answers."""
    if not _nvidia_smi("-L").startswith("GPU"):
        return None
    said = _nvidia_smi("--query-gpu=compute_cap", "--format=csv,noheader")
    found = re.findall(r"^(\d+)\.(\d+)$", said, re.MULTILINE)
    return sorted({(int(major), int(minor)) for major, minor in found})


def architectures_for(capabilities: list[tuple[int, int]]) -> list[str]:
    """The newest code that runs on each of these GPUs; all there is where they are not known."""
    if not capabilities:
        return list(ARCHITECTURES)
    wanted = set()
    for capability in capabilities:
        running = [name for name in ARCHITECTURES if kernels.runs_on((name,), capability)]
        wanted.update(running[-1:])
    return [name for name in ARCHITECTURES if name in wanted]


def serves(found: kernels.Library | None, capabilities: list[tuple[int, int]]) -> bool:
    """Whether a library is current, for the installed TensorRT, and runs on these GPUs."""
    return (
        found is not None
        and found.version == kernels.version()
        and found.tensorrt_major == stack.tensorrt_major()
        and all(kernels.runs_on(found.architectures, one) for one in capabilities)
    )


def try_out(library: Path) -> None:
    """Raises CannotBuild where TensorRT does not take the library or its kernels do not run here,
    as with a driver older than nvcc's CUDA."""
    trial = [sys.executable, "-c", TRY_OUT, str(library)]
    home = kernels.PACKAGE.parent
    try:
        answer = subprocess.run(
            trial, cwd=home, capture_output=True, text=True, errors="replace",
            timeout=TRY_OUT_SECONDS, check=False,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        raise CannotBuild(f"the kernels did not run within {TRY_OUT_SECONDS} s", 1) from None
    if answer.returncode != 0:
        said = (answer.stderr.strip().splitlines() or [f"exit code {answer.returncode}"])[-1]
        raise CannotBuild(f"the kernels do not run here: {said[:300]}", 1)


def build_if_possible(fetch: bool = True) -> None:
    """Builds the library for the GPUs here where TensorRT can use it and none that serves is there.

    Silent where that is not so.  What goes wrong is one line on stderr; TensorRT's own kernels
    serve then.
    """
    installed = stack.versions()
    if not {"tensorrt", "torch-tensorrt"} <= installed.keys():
        return
    capabilities = capabilities_here()
    if capabilities is None:
        return
    architectures = architectures_for(capabilities)
    try:
        if not architectures:
            raise CannotBuild(f"no GPU here runs code for {sm(ARCHITECTURES)}")
        if not serves(kernels.find(), capabilities):
            build(architectures, fetch, threads=len(architectures), for_these_gpus=True)
    except (CannotBuild, UserError, OSError) as problem:
        print(f"build_kernels: {problem}; {NATIVE_SERVES}", file=sys.stderr)


def main(arguments: list[str] | None = None) -> int:
    """The command; returns its exit code, after one sentence on stderr where that is not 0."""
    parser = argparse.ArgumentParser(
        prog="python -m clip_ttrt.build_kernels", description=__doc__.split("\n")[0]
    )
    add = parser.add_argument
    add("--arch", action="append", choices=ARCHITECTURES, help="for this GPU only; repeatable")
    add("--no-fetch", action="store_true", help="do not fetch TensorRT's headers")
    add("--threads", type=int, default=1, help="architectures compiled at the same time")
    add("--verbose", action="store_true", help="print the commands and the kernels' registers")
    add(
        "--if-possible", action="store_true",
        help="for the GPUs here, where none that serves is there and of use; never fails",
    )  # fmt: skip
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
