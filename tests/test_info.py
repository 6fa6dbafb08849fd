"""`clip-ttrt info` on machines that are made up here; it tells something whatever fails."""
import json
from pathlib import Path

import pytest
import torch

from clip_ttrt import backends, build_kernels, cli, kernels, stack

GPU = {"name": "NVIDIA H100", "driver": "580.65.06", "memory": "81559 MiB"}
TENSORRT = {"torch": "2.14.1", "torch-tensorrt": "2.14.0", "tensorrt": "11.1.0.106"}
RTX = {"torch": "2.14.1", "torch-tensorrt-rtx": "2.14.0", "tensorrt-rtx": "1.6.1.120"}
NO_LIBRARY = "the library is not built (build it)"


@pytest.fixture
def tell(monkeypatch, tmp_path, capsys):
    """What the command prints, as text and as JSON, on a machine: by default one with a GPU,
    TensorRT and kernels."""
    def run(pytorch=True, nvidia_smi=(GPU,), installed=TENSORRT, library="1a2b", broken=None):
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
        if broken:
            monkeypatch.setattr(*broken)
        printed = []
        for arguments in (["info"], ["info", "--json"]):
            assert cli.main(arguments) == 0
            printed.append(capsys.readouterr().out)
        return printed[0], json.loads(printed[1])
    return run


@pytest.mark.parametrize("machine, sentences", [
    ({}, ["name: NVIDIA H100", "compute_capability: 9.0", "driver: 580.65.06", "81559 MiB",
          "tensorrt: 11.1.0.106", "version: 1a2b", "architectures: 80, 90a", "release 13.0",
          "TensorRT 11.1.0.106 on NVIDIA H100", "the fused kernels"]),
    ({"pytorch": False, "nvidia_smi": (), "installed": {"torch": "2.14.1"}, "library": None},
     ["nvidia_smi: none", "gpu: none", NO_LIBRARY, "computes_in: fp32",
      "not tensorrt or rtx: no CUDA GPU answers"]),
    ({"installed": RTX, "library": "0000"},
     ["not tensorrt: torch-tensorrt is not installed", "version: 0000", "sources: 1a2b",
      "not fused: TensorRT-RTX has no plugin layers", NO_LIBRARY]),
    ({"pytorch": False}, ["nvidia-smi sees NVIDIA H100 and PyTorch does not"]),
    ({"installed": {**TENSORRT, **RTX}},
     ["torch-tensorrt 2.14.0 and torch-tensorrt-rtx 2.14.0 are both",
      "`pip uninstall -y torch-tensorrt torch-tensorrt-rtx`"]),
])
def test_what_there_is_and_why_it_is_not_something_better(machine, sentences, tell):
    text, facts = tell(**machine)
    assert facts["versions"] == machine.get("installed", TENSORRT)
    assert not [sentence for sentence in sentences if sentence not in text]


@pytest.mark.parametrize("where, name, sections", [
    (stack, "versions", ["compile", "versions"]),
    (kernels, "obstacle", ["compile", "kernels"]),
    (build_kernels, "find_nvcc", ["nvcc"]),
    (backends, "choose", ["compile"]),
])
def test_whatever_fails_is_a_sentence_and_the_rest_is_told(where, name, sections, tell):
    def fail(*_):
        raise OSError("broken\nand more")

    _, facts = tell(broken=(where, name, fail))
    untold = "none (OSError: broken)"
    assert sorted(name for name, told in facts.items() if told == untold) == sections
