"""`clip-ttrt info`: what it tells of machines that are made up here, and that it tells something
whatever fails."""
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from clip_ttrt import backends, build_kernels, cli, kernels, stack

GPU = {"name": "NVIDIA H100", "driver": "580.65.06", "memory": "81559 MiB"}
TENSORRT = {"torch": "2.14.1", "torch-tensorrt": "2.14.0", "tensorrt": "11.1.0.106"}
RTX = {"torch": "2.14.1", "torch-tensorrt-rtx": "2.14.0", "tensorrt-rtx": "1.6.1.120"}
NO_LIBRARY = "the library is not built (build it)"


@pytest.fixture
def machine(monkeypatch, tmp_path):
    """A function that makes a machine; by default one with everything: GPU, TensorRT, kernels."""
    def make(pytorch=True, nvidia_smi=(GPU,), installed=TENSORRT, library="1a2b"):
        found = kernels.Library(Path("/opt/kernels.so"), library, ("80", "90a"), 11)
        nvcc = tmp_path / "nvcc"
        nvcc.write_text("#!/bin/sh\necho Cuda compilation tools, release 13.0, V13.0.88\n")
        nvcc.chmod(0o755)
        for where, name, told in [
            (stack, "driver", list(nvidia_smi)), (stack, "versions", installed),
            (torch.cuda, "is_available", pytorch), (torch.cuda, "get_device_name", GPU["name"]),
            (torch.cuda, "get_device_capability", (9, 0)), (kernels, "version", "1a2b"),
            (kernels, "obstacle", None if library == "1a2b" else NO_LIBRARY),
            (kernels, "find", library and found), (build_kernels, "find_nvcc", nvcc),
        ]:
            monkeypatch.setattr(where, name, lambda told=told: told)
    return make


@pytest.fixture
def tell(capsys):
    """What the command prints, as text and as JSON; it never fails."""
    def run():
        printed = []
        for arguments in (["info"], ["info", "--json"]):
            assert cli.main(arguments) == 0
            printed.append(capsys.readouterr().out)
        return printed[0], json.loads(printed[1])
    return run


def test_a_machine_with_everything(machine, tell):
    machine()
    text, facts = tell()
    for told in ("name: NVIDIA H100", "compute_capability: 9.0", "driver: 580.65.06", "81559 MiB",
                 "tensorrt: 11.1.0.106", "version: 1a2b", "architectures: 80, 90a", "release 13.0",
                 "TensorRT 11.1.0.106 on NVIDIA H100", "the fused kernels"):
        assert told in text
    assert facts["nvidia_smi"] == [GPU] and facts["versions"] == TENSORRT
    assert facts["kernels"]["version"] == "1a2b" and facts["kernels"]["obstacle"] is None
    assert facts["compile"]["backend"]["name"] == "tensorrt"
    assert facts["compile"]["kernels"]["kernels"] == "fused"


def test_a_machine_with_nothing(machine, tell):
    machine(pytorch=False, nvidia_smi=(), installed={"torch": "2.14.1"}, library=None)
    text, facts = tell()
    for told in ("nvidia_smi: none", "gpu: none", NO_LIBRARY, "computes_in: fp32",
                 "not tensorrt or rtx: no CUDA GPU answers"):
        assert told in text
    assert facts["compile"]["backend"]["device"] == "cpu" and "path" not in facts["kernels"]
    assert facts["compile"]["kernels"]["kernels"] is None


def test_why_it_is_not_something_better(machine, tell):
    machine(installed=RTX, library="0000")
    text, facts = tell()
    assert "not tensorrt: torch-tensorrt is not installed" in text
    assert "not fused: TensorRT-RTX has no plugin layers" in text and NO_LIBRARY in text
    assert (facts["kernels"]["version"], facts["kernels"]["sources"]) == ("0000", "1a2b")


def test_a_gpu_that_pytorch_lost_is_told_before_all_else(machine, tell, monkeypatch):
    machine(pytorch=False)
    monkeypatch.setattr(torch.version, "cuda", None)
    first = tell()[0].split("nvidia_smi:")[0]
    assert "nvidia-smi sees NVIDIA H100 and PyTorch does not" in first
    assert "built without CUDA" in first


def test_both_wheels_are_told_and_no_failure(machine, tell):
    machine(installed={**TENSORRT, **RTX})
    text, facts = tell()
    assert "torch-tensorrt 2.14.0 and torch-tensorrt-rtx 2.14.0 are both" in text
    assert "pip uninstall" in facts["compile"]


@pytest.mark.parametrize("where, name, sections", [
    (stack, "driver", ["nvidia_smi"]),
    (stack, "versions", ["compile", "versions"]),
    (torch.cuda, "get_device_capability", ["gpu"]),
    (kernels, "find", ["kernels"]),
    (kernels, "obstacle", ["compile", "kernels"]),
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
    untold = "none (OSError: broken)"
    assert sorted(name for name, told in facts.items() if told == untold) == sections
    assert text.count(untold) == len(sections)


def test_the_command_runs_here_in_a_process_of_its_own():
    done = subprocess.run([sys.executable, "-m", "clip_ttrt.info", "--json"], capture_output=True,
                          text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["compile"]["backend"]["reason"]
