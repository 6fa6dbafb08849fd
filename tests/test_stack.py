"""What is installed, read from folders of metadata that are made up here, and GPUs that answer
nvidia-smi and PyTorch, or one of the two."""
import sys

import pytest
import torch

from clip_ttrt import stack

H100 = "NVIDIA H100 80GB HBM3, 580.65.06, 81559 MiB"


@pytest.fixture
def installed(tmp_path, monkeypatch):
    """A function that makes distributions of that name and version the only ones that there are."""
    def make(**distributions):
        for name, version in distributions.items():
            folder = tmp_path / f"{name}-{version}.dist-info"
            folder.mkdir()
            (folder / "METADATA").write_text(
                f"Metadata-Version: 2.1\nName: {name.replace('_', '-')}\nVersion: {version}\n")
        for package in ("torch_tensorrt", "tensorrt_rtx", "tensorrt"):  # nothing imports them
            (tmp_path / f"{package}.py").write_text("raise SystemExit('imported')\n")
        monkeypatch.setattr(sys, "path", [str(tmp_path)])
    return make


@pytest.fixture
def nvidia_smi(tmp_path, monkeypatch):
    """A function that puts a script in nvidia-smi's place, or nothing; PyTorch has no GPU."""
    def make(script):
        (tmp_path / "bin").mkdir()
        monkeypatch.setenv("PATH", str(tmp_path / "bin"))
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        if script is not None:
            (tmp_path / "bin" / "nvidia-smi").write_text(f"#!/bin/sh\n{script}\n")
            (tmp_path / "bin" / "nvidia-smi").chmod(0o755)
    return make


@pytest.mark.parametrize("distributions, versions", [
    # As pip installs it.
    ({"torch_tensorrt": "2.14.0", "tensorrt": "11.1.0.106", "tensorrt_cu13": "11.1.0.106",
      "tensorrt_cu13_libs": "11.1.0.106", "tensorrt_cu13_bindings": "11.1.0.106"},
     {"torch-tensorrt": "2.14.0", "tensorrt": "11.1.0.106"}),
    # A part of it, as where the libraries come from elsewhere.
    ({"torch_tensorrt": "2.11.0", "tensorrt_cu12_bindings": "10.6.0"},
     {"torch-tensorrt": "2.11.0", "tensorrt": "10.6.0"}),
    ({"torch_tensorrt_rtx": "2.14.0", "tensorrt_rtx": "1.6.1.120"},  # not taken for TensorRT
     {"torch-tensorrt-rtx": "2.14.0", "tensorrt-rtx": "1.6.1.120"}),
])
def test_versions_are_those_of_the_metadata(distributions, versions, installed):
    installed(**distributions)
    assert stack.versions() == versions
    assert str(stack.tensorrt_major() or "") == versions.get("tensorrt", "").split(".")[0]


def test_what_nvidia_smi_tells(nvidia_smi):
    nvidia_smi(f"echo '{H100}'; echo 'NVIDIA A10, 580.65.06, 23028 MiB'")
    assert stack.driver() == [dict(zip(("name", "driver", "memory"), row.split(", "))) for row in
                              (H100, "NVIDIA A10, 580.65.06, 23028 MiB")]


@pytest.mark.parametrize("script", [None, "exit 9", "echo NVIDIA-SMI has failed", "exit 0"])
def test_a_machine_without_a_gpu(script, nvidia_smi):
    nvidia_smi(script)
    assert stack.driver() == []
    assert stack.no_gpu() == "no CUDA GPU answers"


@pytest.mark.parametrize("cuda, hidden, reason", [
    (None, None, "is built without CUDA (install one that is: `pip install --force-reinstall"),
    ("13.0", "", "CUDA_VISIBLE_DEVICES is '' (unset it)"),
    ("13.0", "-1", "CUDA_VISIBLE_DEVICES is '-1' (unset it)"),
    ("13.0", None, "CUDA said so"),
])
def test_a_gpu_that_pytorch_lost(cuda, hidden, reason, nvidia_smi, monkeypatch):
    def init():
        raise RuntimeError("CUDA said so.\nAnd more.")

    nvidia_smi(f"echo '{H100}'")
    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.setattr(torch.cuda, "init", init)
    if hidden is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", hidden)
    told = stack.no_gpu()
    assert told.startswith("nvidia-smi sees NVIDIA H100 80GB HBM3 and PyTorch does not: ")
    assert reason in told and "\n" not in told and "And more" not in told
