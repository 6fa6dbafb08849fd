"""`python -m clip_ttrt.build_kernels`: with a GPU, nvcc, g++ and git that are pretended, with none
of them, and with the compilers where they are."""
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from clip_ttrt import build_kernels, kernels, stack

INSTALLED = {"tensorrt": "10.15.1", "torch-tensorrt": "2.11.0"}
LIBRARY = "libclip_ttrt_kernels-trt10.so"


class Machine:
    """A checkout's folders, an H100, TensorRT 10.15 with its headers, and commands that pretend."""

    def __init__(self, root, monkeypatch):
        self.root, self.monkeypatch, self.log, self.about = root, monkeypatch, [], ""
        self.tools, self.network, self.error = {"nvcc", "g++"}, True, None
        self.library = root / "checkout" / "clip_ttrt" / "lib" / LIBRARY
        self.library.parents[1].mkdir(parents=True)
        shutil.copytree(kernels.sources(), root / "checkout" / "kernels")
        for name, folder in (("XDG_CACHE_HOME", "cache"), ("TENSORRT_INCLUDE_DIR", "include"),
                             ("CUDA_HOME", "cuda"), ("CUDA_PATH", "cuda")):
            monkeypatch.setenv(name, str(root / folder))
        packages = {"purelib": root / "packages", "platlib": root / "packages"}
        for module, name, value in (
            (build_kernels, "TOOLKITS", (root / "system",)), (build_kernels, "SYSTEM_INCLUDES", ()),
            (build_kernels, "try_out", lambda library: None),
            (build_kernels.sysconfig, "get_paths", packages.copy),
            (kernels, "PACKAGE", self.library.parents[1]), (stack, "versions", INSTALLED.copy),
            (kernels, "version", kernels.version.__wrapped__),  # without its cache
            (kernels, "tensorrt_major", stack.tensorrt_major),
            (shutil, "which", lambda name: name if name in self.tools else None),
            (subprocess, "run", self.run),
        ):  # fmt: skip
            monkeypatch.setattr(module, name, value)
        self.gpus((9, 0))
        self.headers(10)

    def run(self, command, **options):
        """Writes the command down and makes what it would: headers, or a file behind -o that
        tells what a library does."""
        line = " ".join(command)
        self.log.append(line)
        if command[0] == "git":
            if not self.network:
                raise subprocess.CalledProcessError(128, command)
            if "clone" in command:
                self.headers(stack.tensorrt_major(), Path(command[-1], "include"))
        elif self.error is None:
            if told := dict(re.findall(r'-DCLIP_TTRT_(\w+)="(.*?)"', line)):
                major = 10 if "-DCLIP_TTRT_PLUGINS" in command else 0
                self.about = (f"clip_ttrt kernels: version={told['VERSION']} "
                              f"architectures={told['ARCHITECTURES']} tensorrt={major};")
            Path(command[command.index("-o") + 1]).write_text(self.about)
        return subprocess.CompletedProcess(command, 2 if self.error else 0, "", self.error)

    def gpus(self, *capabilities):
        for name, function in (("is_available", lambda: bool(capabilities)),
                               ("device_count", lambda: len(capabilities)),
                               ("get_device_capability", capabilities.__getitem__)):
            self.monkeypatch.setattr(torch.cuda, name, function)

    def headers(self, major, folder=None):
        folder = folder or self.root / "include"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "NvInferRuntime.h").touch()
        (folder / "NvInferVersion.h").write_text(f"#define TRT_MAJOR_ENTERPRISE {major}")

    def without_headers(self):
        self.network = False
        self.monkeypatch.delenv("TENSORRT_INCLUDE_DIR")


@pytest.fixture
def machine(tmp_path, monkeypatch):
    return Machine(tmp_path, monkeypatch)


# --if-possible


def test_it_builds_once_with_the_plugins_and_for_the_gpu_that_is_there(machine, capsys):
    assert build_kernels.main(["--if-possible"]) == 0
    first = [*machine.log]
    assert len(first) == 12 and "code=sm_90a" in first[0] and "sm_80" not in "".join(first)
    expected = kernels.Library(machine.library, kernels.version(), ("90a",), 10)
    assert kernels.find() == expected
    assert capsys.readouterr().out.endswith(
        f"{LIBRARY} for sm_90a, with the plugins for TensorRT 10\n")
    assert build_kernels.main(["--if-possible"]) == 0
    assert machine.log == first and capsys.readouterr() == ("", "")


@pytest.mark.parametrize("change", [
    lambda machine: (machine.root / "checkout/kernels/plugin.h").write_text("// another source"),
    lambda machine: machine.gpus((9, 0), (8, 6)),
    lambda machine: machine.library.write_text(machine.about.replace("=10", "=11")),
    lambda machine: machine.library.write_text("no library"),
])  # fmt: skip
def test_a_library_that_does_not_serve_is_built_anew(machine, change):
    build_kernels.main(["--if-possible"])
    change(machine)
    build_kernels.main(["--if-possible"])
    assert len(machine.log) == 24
    found = kernels.find()
    assert (found.version, found.tensorrt_major) == (kernels.version(), 10)


def test_a_library_for_more_gpus_than_these_is_kept(machine):
    assert build_kernels.main(["--arch", "80", "--arch", "90a"]) == 0
    before = [*machine.log]
    for capability in ((9, 0), (8, 0), (8, 6)):  # code for sm_80 runs on 8.6
        machine.gpus(capability)
        build_kernels.main(["--if-possible"])
    assert machine.log == before


@pytest.mark.parametrize("missing", ["a GPU", "tensorrt", "torch-tensorrt"])
def test_where_the_kernels_are_of_no_use_it_is_silent(missing, machine, capsys):
    machine.gpus(*[(9, 0)] * (missing != "a GPU"))
    others = {name: one for name, one in INSTALLED.items() if name != missing}
    machine.monkeypatch.setattr(stack, "versions", others.copy)
    assert build_kernels.main(["--if-possible"]) == 0
    assert capsys.readouterr() == ("", "") and not machine.log and kernels.find() is None


def no_folder(machine):
    for folder in kernels.folders():
        folder.parent.mkdir(parents=True, exist_ok=True)
        folder.touch()


@pytest.mark.parametrize("code, expected, change", [
    (2, "nvcc is missing; install the CUDA toolkit", lambda machine: machine.tools.remove("nvcc")),
    (2, "a C++ compiler is missing", lambda machine: machine.tools.remove("g++")),
    (2, "without the headers of TensorRT 10.15.1", lambda machine: machine.headers(11)),
    (2, "without the headers of TensorRT 10.15.1", lambda machine: machine.headers("none")),
    (1, "failed: a.cu(3): error: none", lambda machine: setattr(
        machine, "error", "a warning\na.cu(3): error: none\nend")),
    (0, "no GPU here has", lambda machine: machine.gpus((7, 5))),
    (0, "set TENSORRT_INCLUDE_DIR", Machine.without_headers),
    (2, "the library cannot be written: [Errno", no_folder),
])  # fmt: skip
def test_what_goes_wrong_is_one_line(code, expected, change, machine, capsys):
    change(machine)
    assert build_kernels.main(["--if-possible"]) == 0
    [line] = capsys.readouterr().err.splitlines()
    assert expected in line and line.startswith("build_kernels: ")
    assert line.endswith("; for now TensorRT's own kernels serve, which are slower")
    assert not machine.library.exists() and build_kernels.main([]) == code
    if code:
        assert capsys.readouterr().err == line.split("; for now")[0] + "\n"


@pytest.mark.parametrize("gpus, expected", [
    ([(9, 0), (8, 9), (9, 0)], "89 90a"), ([(7, 5), (8, 6)], "86"), ([(8, 7)], "86"),
    ([(10, 3)], "100"), ([(12, 1)], "120"), ([(13, 0)], "120"),
])  # fmt: skip
def test_it_builds_for_the_gpus_that_are_there(gpus, expected, machine):
    machine.gpus(*gpus)
    build_kernels.main(["--if-possible"])
    assert kernels.find().architectures == tuple(expected.split())


def test_a_library_that_does_not_run_is_found_out(tmp_path):
    (tmp_path / "library.so").write_text("no library")
    with pytest.raises(build_kernels.CannotBuild, match="do not run here: library.so is stale"):
        build_kernels.try_out(tmp_path / "library.so")


# A build that was asked for


def test_without_headers_it_builds_for_pytorch_and_says_so(machine, capsys):
    machine.without_headers()
    assert build_kernels.main([]) == 0
    out, err = capsys.readouterr()
    assert "without plugins" in out and "set TENSORRT_INCLUDE_DIR" in err
    assert not any("plugin" in command for command in machine.log)
    found = kernels.find()
    assert (found.path.name, found.tensorrt_major) == ("libclip_ttrt_kernels-trt0.so", 0)


def test_it_compiles_for_every_architecture(machine):
    machine.library.parent.touch()  # so that the cache has to serve
    assert build_kernels.main([]) == 0
    [attention] = [one for one in machine.log if "attention.cu.o" in one and " -c " in one]
    # wgmma needs the target with the "a"; the newest comes as PTX too.
    for flag in ("compute_90a,code=sm_90a", "compute_120,code=[sm_120,compute_120]"):
        assert f"-gencode=arch={flag}" in attention
    architectures = ("80", "86", "89", "90a", "100", "120")
    library = kernels.Library(kernels.cache() / LIBRARY, kernels.version(), architectures, 10)
    assert kernels.find() == library and attention.count("-gencode") == 6


def test_nvcc_is_found_without_path(machine):
    machine.tools.remove("nvcc")
    places = ("cuda", "packages/nvidia/cu13", "packages/nvidia/cu12", "system")
    found = [machine.root / place / "bin" / "nvcc" for place in places]
    for path in found:
        path.parent.mkdir(parents=True)
        path.touch()
    for path in found:
        assert build_kernels.find_nvcc() == path
        path.unlink()


@pytest.mark.parametrize("installed, tag", [
    ("10.6.0", "v10.6.0"), ("10.14.1.48", "v10.6.0"), ("10.16.1", "v10.15"), ("10.3.0", "v10.6.0"),
    ("11.0.0", "v11.1"), ("11.1.2.3", "v11.1")])
def test_headers_of_the_installed_version_or_the_next_older_are_fetched_once(
    installed, tag, machine
):
    machine.monkeypatch.delenv("TENSORRT_INCLUDE_DIR")
    machine.monkeypatch.setattr(stack, "versions", lambda: {"tensorrt": installed})
    assert build_kernels.find_tensorrt(fetch=False) is None
    for fetch in (True, True, False):
        found = build_kernels.find_tensorrt(fetch)
        assert found == kernels.cache() / f"tensorrt-{tag}" / "include"
    [clone] = [one for one in machine.log if one.startswith("git clone")]
    assert f"--branch {tag} " in clone
    for others in ({}, {"tensorrt": "12.0"}):
        machine.monkeypatch.setattr(stack, "versions", others.copy)
        assert build_kernels.find_tensorrt(fetch=True) is None


# The compilers, where they are

try:
    TOOL = build_kernels.find_nvcc()
except build_kernels.CannotBuild:
    TOOL = None
NAMED = [one for one in os.environ.get("TENSORRT_INCLUDE_DIRS", "").split(":") if one]
HEADERS = NAMED or list(kernels.cache().glob("tensorrt-*/include")) or [
    pytest.param(None, marks=pytest.mark.skip("needs TensorRT's headers: TENSORRT_INCLUDE_DIRS"))]
needs_nvcc = pytest.mark.skipif(
    TOOL is None or shutil.which("g++") is None, reason="needs nvcc and g++")


def compile_all(commands):
    """With every warning an error."""
    for command in commands:
        done = subprocess.run([*command, "-Xcompiler", "-Werror"], capture_output=True, text=True)
        assert done.returncode == 0 and done.stderr == "", done.stderr


@needs_nvcc
@pytest.mark.parametrize("folder", HEADERS, ids=str)
def test_plugins_compile_without_a_warning(folder, tmp_path):
    every = build_kernels.build_commands(TOOL, ["90a"], folder, tmp_path)
    compile_all(one for one in every if one[-1].endswith(".cpp"))


@pytest.mark.slow
@needs_nvcc
@pytest.mark.parametrize(
    "source", [name for name in kernels.source_files() if name.endswith(".cu")])
def test_kernels_compile_for_every_architecture(source, tmp_path):
    every = build_kernels.build_commands(TOOL, build_kernels.ARCHITECTURES, None, tmp_path, 2)
    compile_all(one for one in every if one[-1].endswith(f"/{source}"))
