"""examples/cpp: the compiled modules from C++ give Python's features, bad input one sentence."""
import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import clip_ttrt
import needs

EXAMPLE = Path(__file__).parents[1] / "examples" / "cpp"
# A binary built elsewhere, for machines without a compiler or Torch's headers.
BINARY = os.environ.get("CLIP_TTRT_CPP_BINARY")
RANGE = "clip_features: images: batch 9 is outside the compiled range 1 to 8"

spec = importlib.util.spec_from_file_location("compare_cpp", EXAMPLE / "compare.py")
example = importlib.util.module_from_spec(spec)
spec.loader.exec_module(example)


@pytest.fixture(scope="session")
def binary(tmp_path_factory) -> Path:
    """The example, built as its README says."""
    if BINARY:
        return Path(BINARY).resolve()
    compilers = (os.environ.get("CXX", "c++"), "g++", "clang++")
    if not shutil.which("cmake") or not any(map(shutil.which, compilers)):
        pytest.skip("building examples/cpp needs cmake and a C++ compiler")
    build = tmp_path_factory.mktemp("cpp")
    python = f"-DPython3_EXECUTABLE={sys.executable}"
    for command in (["cmake", "-S", EXAMPLE, "-B", build, python], ["cmake", "--build", build]):
        result = subprocess.run(command, text=True, capture_output=True)
        assert result.returncode == 0, result.stdout + result.stderr
    return build / "clip_features"


def compiled(tmp_path_factory, backend: str, kernels: str = "auto"):
    folder = tmp_path_factory.mktemp(backend) / "artifact"
    return clip_ttrt.compile(model="demo", weights="random", batch="1:4:8", backend=backend,
                             kernels=kernels, verify=False, output=folder)


@pytest.fixture(scope="session")
def artifact(tmp_path_factory):
    """Plain TorchScript: on the CPU, or on the GPU where there is one."""
    return compiled(tmp_path_factory, "torchscript")


@pytest.fixture(scope="session", params=["tensorrt", pytest.param("fused", marks=needs.fused)])
def engines(tmp_path_factory, request):
    return compiled(tmp_path_factory, "tensorrt", request.param)


def outcome(binary, artifact, inputs, tmp_path) -> tuple[int, str]:
    """Exit code and the last line on stderr: TensorRT's own warnings may stand before it."""
    path, output = tmp_path / "inputs.pt", tmp_path / "output.pt"
    if inputs is not None:
        torch.save(inputs, path)
    result = example.run_binary(binary, artifact, path, output, artifact.device)
    lines = result.stderr.splitlines()
    assert artifact.device == "cuda" or len(lines) == 1, result.stderr
    assert not output.exists()
    return result.returncode, lines[-1]


@pytest.mark.parametrize("batch", [1, 4, 8])
def test_features_are_pythons_and_printed(binary, artifact, capsys, batch):
    errors = example.compare(artifact, binary, artifact.device, batch)
    assert set(errors) == {"image", "text"} and max(errors.values()) <= example.TOLERANCE
    lines = capsys.readouterr().out.splitlines()
    names = [line.split()[:2] for line in lines if line.split()[-2:-1] == ["norm"]]
    assert names == [[name, f"{i}:"] for name in ("image", "text") for i in range(batch)]


@pytest.mark.parametrize("inputs, says", [
    (None, "inputs.pt: cannot be read"),
    (torch.zeros(2, 77), "inputs.pt: holds no dict of tensors"),
    ({"images": torch.zeros(9, 3, 112, 112)}, RANGE),
    ({"images": torch.zeros(2, 3, 5, 5)},
     "images: expected an input of shape [batch] + [3, 112, 112], got [2, 3, 5, 5]"),
    ({"tokens": torch.zeros(2, 77)}, "tokens: expected integer tokens, got another type"),
], ids=["missing", "no dict", "batch", "shape", "dtype"])
def test_bad_inputs_are_one_sentence(binary, artifact, tmp_path, inputs, says):
    code, line = outcome(binary, artifact, inputs, tmp_path)
    assert code == 2 and line.startswith("clip_features: ") and line.endswith(says)


@pytest.mark.gpu
def test_engines_give_pythons_features(binary, engines, tmp_path):
    for batch in (1, 4, 8):
        assert max(example.compare(engines, binary, "cuda", batch).values()) <= example.TOLERANCE
    assert outcome(binary, engines, example.make_inputs(engines, 9), tmp_path) == (2, RANGE)
