"""`make compile` and `make test` with stand-ins for Python, pip and nvidia-smi."""
import os
import shutil
import subprocess
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(shutil.which("make") is None, reason="needs make")

MAKEFILE = Path(__file__).parents[1] / "Makefile"
# The Python of .venv: writes down what it is asked for, and compiles by making the manifest.
PYTHON = """
shift  # -m
case "$1" in
    pip) while [ "$1" != install ] && [ "$1" != uninstall ]; do shift; done; echo "pip $*" >> log
         case "$1 $*" in install*tensorrt*) [ ! -e no_tensorrt ] || { echo stub failed; exit 1; } ;;
         esac; [ ! -e offline ] ;;
    clip_ttrt.compile) echo "compile $*" >> log; mkdir -p artifacts/demo-fp16
                       touch artifacts/demo-fp16/manifest.json ;;
    clip_ttrt.build_kernels) echo "kernels $2" >> log; exit 1 ;;
    pytest) echo pytest >> log ;;
esac
"""
COMPILED = "compile clip_ttrt.compile --precision fp16 --output artifacts/demo-fp16 --force"
KERNELS = "kernels --if-possible"
NO_RTX, NO_TENSORRT = "pip uninstall --yes torch-tensorrt-rtx", "pip uninstall --yes torch-tensorrt"
SMI = "echo 'GPU 0: NVIDIA H100 (UUID: GPU-0)'"


class Clone:
    """A folder with the Makefile, and programs that pretend on a PATH before the real one."""

    def __init__(self, folder, smi="exit 9"):
        self.folder = folder
        shutil.copy(MAKEFILE, folder)
        for path in ("pyproject.toml", "kernels/attention/a.cu"):
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            (folder / path).touch()
            os.utime(folder / path, (1e9, 1e9))
        self.program("nvidia-smi", smi)
        self.program("pip", "exit 1", ".venv/bin")
        self.program("python", PYTHON, ".venv/bin")

    def program(self, name, script, folder="bin"):
        path = self.folder / folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"#!/bin/sh\n{script}\n")
        path.chmod(0o755)

    def make(self, *arguments, code=0):
        """Runs make; returns what the stand-ins wrote down."""
        log, env = self.folder / "log", {**os.environ, "MAKEFLAGS": ""}
        env["PATH"] = f"{self.folder / 'bin'}:{env['PATH']}"
        env.pop("PYTHON", None)  # of a `make test PYTHON=...` that runs this
        log.write_text("")
        self.done = subprocess.run(["make", *arguments], cwd=self.folder, capture_output=True,
                                   text=True, env=env)
        assert self.done.returncode == code, self.done.stderr
        return log.read_text().splitlines()

    def stamps(self):
        return {path.name for path in (self.folder / ".venv").glob("installed*")}


clone = pytest.fixture(lambda tmp_path: Clone(tmp_path))
gpu = pytest.fixture(lambda tmp_path: Clone(tmp_path, SMI))


@pytest.mark.parametrize("smi", ["exit 9", "echo 'No devices found.'", "echo Failed; exit 255"])
def test_without_a_gpu(smi, clone):
    clone.program("nvidia-smi", smi)
    assert clone.make("test") == [NO_TENSORRT, "pip install -e .[test,rtx]", "pytest"]
    assert clone.stamps() == {"installed-test-rtx"}
    assert clone.make("compile") == ["pip install -e .", COMPILED]
    assert clone.stamps() == {"installed-test-rtx", "installed"}
    assert clone.make("compile") == [] and clone.make("test") == ["pytest"]


def test_with_a_gpu_the_kernels_are_built_first_and_their_failure_is_none(gpu):
    assert gpu.make("compile") == [NO_RTX, "pip install -e .[tensorrt]", KERNELS, COMPILED]
    assert gpu.stamps() == {"installed-tensorrt"} and gpu.make("compile") == []
    os.utime(gpu.folder / "kernels/attention/a.cu", (4e9, 4e9))
    assert gpu.make("compile") == [KERNELS, COMPILED]


@pytest.mark.parametrize("target, extras, others, stamp, then", [
    ("compile", "[tensorrt]", "", "installed", [KERNELS, COMPILED]),
    ("test", "[test,tensorrt]", "[test]", "installed-test", ["pytest"]),
])
def test_where_tensorrt_does_not_come_it_goes_on_without(target, extras, others, stamp, then, gpu):
    (gpu.folder / "no_tensorrt").touch()
    failing = [NO_RTX, f"pip install -e .{extras}"]
    for _ in range(2):  # no stamp claims it, so that it is tried again
        assert gpu.make(target) == [*failing, f"pip install -e .{others}", *then]
        assert gpu.stamps() == {stamp}
        assert "TensorRT could not be installed" in gpu.done.stderr
        assert (gpu.folder / ".venv" / "tensorrt.log").read_text() == "stub failed\n"
    (gpu.folder / "no_tensorrt").unlink()
    assert gpu.make(target) == [*failing, *then]
    assert f"{stamp}-tensorrt" in gpu.stamps()


@pytest.mark.parametrize("target", ["compile", "test"])
def test_where_nothing_can_be_installed_make_fails(target, gpu):
    (gpu.folder / "no_tensorrt").touch()
    (gpu.folder / "offline").touch()
    log = gpu.make(target, code=2)
    assert gpu.stamps() == set() and COMPILED not in log and "pytest" not in log


def test_never_both_in_one_environment_and_gpu_can_be_told(clone):
    for gpu, other, name in [("GPU=1", NO_RTX, "tensorrt"), ("GPU=", NO_TENSORRT, "rtx")]:
        assert clone.make("test", gpu)[:2] == [other, f"pip install -e .[test,{name}]"]
        assert clone.stamps() == {f"installed-test-{name}"}


def test_the_first_python_that_answers_makes_the_environment(clone):
    shutil.move(clone.folder / ".venv", clone.folder / "ready")
    for name in ("python3.12", "python3.13", "python3.11", "python3.10", "python3"):
        clone.program(name, "exit 127")  # a shim
    assert clone.make("compile", code=2) == []
    assert "make: no Python answers; install Python 3.10 to 3.13" in clone.done.stderr
    clone.program("python3.13", '[ "$1" = --version ] || { echo "$@" > venv_log; mv ready .venv; }')
    clone.make("compile")
    assert (clone.folder / "venv_log").read_text() == "-m venv .venv\n"
