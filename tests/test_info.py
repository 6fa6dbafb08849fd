"""`python -m clip_ttrt.info`: what it tells of machines that are made up here, and that it tells
something whatever fails."""
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from clip_ttrt import backends, build_kernels, info, kernels, shell, stack

GPU = {"name": "NVIDIA H100", "driver": "580.65.06", "memory": "81559 MiB",
       "compute_capability": "9.0"}
PROPERTIES = SimpleNamespace(name="NVIDIA H100", major=9, minor=0, total_memory=80 << 30)
TENSORRT = {"torch": "2.14.1", "torch-tensorrt": "2.14.0", "tensorrt": "11.1.0.106"}
RTX = {"torch": "2.14.1", "torch-tensorrt-rtx": "2.14.0", "tensorrt-rtx": "1.6.1.120"}
NO_LIBRARY = "the library is not built (build it)"


@pytest.fixture
def machine(monkeypatch, tmp_path):
    """A function that makes a machine; by default one with everything: GPU, TensorRT, kernels."""
    def make(pytorch=True, nvidia_smi=(GPU,), installed=TENSORRT, library="1a2b"):
        monkeypatch.setattr(stack, "driver", lambda: list(nvidia_smi))
        monkeypatch.setattr(stack, "versions", lambda: installed)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: pytorch)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: int(pytorch))
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda: GPU["name"])
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: PROPERTIES)
        monkeypatch.setattr(kernels, "version", lambda: "1a2b")
        monkeypatch.setattr(kernels, "obstacle", lambda: None if library == "1a2b" else NO_LIBRARY)
        monkeypatch.setattr(kernels, "find", lambda: library and SimpleNamespace(
            path=Path("/opt/kernels.so"), version=library, architectures=("80", "90a"),
            tensorrt_major=11))
        nvcc = tmp_path / "nvcc"
        nvcc.write_text("#!/bin/sh\necho Cuda compilation tools, release 13.0, V13.0.88\n")
        nvcc.chmod(0o755)
        monkeypatch.setattr(build_kernels, "find_nvcc", lambda: nvcc)
    return make


@pytest.fixture
def tell(capsys):
    """What the command prints, as text and as JSON; it never fails."""
    def run():
        assert shell.run(info.main, []) == 0
        text = capsys.readouterr().out
        assert shell.run(info.main, ["--json"]) == 0
        return text, json.loads(capsys.readouterr().out)
    return run


def test_a_machine_with_everything(machine, tell):
    machine()
    text, facts = tell()
    assert "WARNING" not in text and facts["warnings"] == []
    for told in ("NVIDIA H100, capability 9.0, 81559 MiB, driver 580.65.06",
                 f"{torch.__version__}, CUDA", "NVIDIA H100, capability 9.0, 81920 MiB",
                 "11.1.0.106", "version 1a2b (current), for TensorRT 11, 80, 90a", "13.0, ",
                 "uses --backend tensorrt: TensorRT 11.1.0.106 on NVIDIA H100",
                 "the fused kernels"):
        assert told in text
    assert facts["nvidia_smi"] == [GPU] and facts["versions"] == TENSORRT
    assert facts["kernels"]["current"] is True and facts["kernels"]["obstacle"] is None
    assert facts["nvcc"]["version"] == "13.0"
    assert (facts["compile"]["backend"], facts["compile"]["kernels"]) == ("tensorrt", "fused")


def no_nvcc():
    raise build_kernels.CannotBuild("nvcc is missing; install it", 2)


def test_a_machine_with_nothing(machine, tell, monkeypatch):
    machine(pytorch=False, nvidia_smi=(), installed={"torch": "2.14.1"}, library=None)
    monkeypatch.setattr(build_kernels, "find_nvcc", no_nvcc)
    text, facts = tell()
    assert "WARNING" not in text  # there is no GPU to lose
    for told in ("does not answer, or is not there", "none that PyTorch sees", "not installed",
                 "not built", "not found", "computes in fp32", "no CUDA GPU answers"):
        assert told in text
    assert facts["nvcc"] is None and "path" not in facts["kernels"]
    assert facts["compile"]["backend"] == "torchscript" and facts["compile"]["device"] == "cpu"
    assert facts["compile"]["kernels"] is None


def test_why_it_is_not_something_better(machine, tell):
    machine(installed=RTX, library="0000")
    text, facts = tell()
    assert "not tensorrt: torch-tensorrt is not installed" in text
    assert "not fused: TensorRT-RTX has no plugin layers" in text
    assert "stale: the sources are 1a2b" in text and NO_LIBRARY in text
    assert facts["kernels"]["current"] is False


def test_a_gpu_that_pytorch_lost_is_the_first_thing_told(machine, tell, monkeypatch):
    machine(pytorch=False)
    monkeypatch.setattr(torch.version, "cuda", None)
    text, facts = tell()
    first = text.splitlines()[0]
    assert first.startswith("WARNING: nvidia-smi sees NVIDIA H100 and PyTorch does not")
    assert "built without CUDA" in first and "nothing will run on it" in first
    assert "built without CUDA" in facts["compile"]["reason"]


def test_a_gpu_that_nvidia_smi_does_not_see(machine, tell):
    machine(nvidia_smi=())
    text, facts = tell()
    assert text.startswith("WARNING: PyTorch sees a GPU and nvidia-smi does not answer")
    assert facts["compile"]["backend"] == "tensorrt"


def test_both_wheels_are_told_and_no_failure(machine, tell):
    machine(installed={**TENSORRT, **RTX})
    text, facts = tell()
    assert "uses nothing: torch-tensorrt 2.14.0 and torch-tensorrt-rtx 2.14.0 are both" in text
    assert facts["compile"]["backend"] is None and "pip uninstall" in facts["compile"]["reason"]


@pytest.mark.parametrize("where, name, sections", [
    (stack, "driver", ["nvidia_smi"]),
    (stack, "versions", ["versions", "compile"]),
    (torch.cuda, "get_device_properties", ["gpus"]),
    (kernels, "find", ["kernels"]),
    (kernels, "obstacle", ["kernels", "compile"]),
    (build_kernels, "find_nvcc", ["nvcc"]),
    (backends, "choose", ["compile"]),
])
def test_whatever_fails_is_a_sentence_and_the_rest_is_told(where, name, sections, machine, tell,
                                                           monkeypatch):
    def fail(*_):
        raise OSError("broken\nand more")

    machine()
    monkeypatch.setattr(where, name, fail)
    text, facts = tell()
    facts["gpus"] = facts["pytorch"]["gpus"]
    untold = [section for section, told in facts.items()
              if told == "cannot be told: OSError: broken"]
    assert sorted(untold) == sorted(sections)
    assert text.count("cannot be told: OSError: broken") == len(sections)


def test_the_command_runs_here_in_a_process_of_its_own():
    done = subprocess.run([sys.executable, "-m", "clip_ttrt.info", "--json"], capture_output=True,
                          text=True, check=False)
    assert done.returncode == 0, done.stderr
    facts = json.loads(done.stdout)
    assert facts["pytorch"]["version"] == torch.__version__
    assert facts["compile"]["reason"]
