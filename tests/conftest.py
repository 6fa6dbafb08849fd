"""Fixtures, and the rule for the `gpu` marker.

Such tests are skipped where no GPU answers, and all but those of the kernels, which run in any
PyTorch, where no Torch-TensorRT is installed.  That is the reason that is told, also of those
that a library which is not built would skip: of all reasons pytest tells the first that holds.
"""
from pathlib import Path

import pytest
import torch

import clip_ttrt
from clip_ttrt import kernels, stack

collect_ignore = ["rtx"]  # run by test_rtx.py, in a process of its own


def pytest_collection_modifyitems(items):
    of_kernels = Path(__file__).parent / "kernels"
    missing = [name for name in ("torch-tensorrt", "tensorrt") if name not in stack.versions()]
    for item in items:
        if "gpu" not in item.keywords:
            continue
        if not torch.cuda.is_available():
            reason = "needs a GPU: no CUDA GPU answers"
        elif missing and of_kernels not in item.path.parents:
            reason = f"needs TensorRT: not installed: {', '.join(missing)}"
        else:
            continue
        item.add_marker(pytest.mark.skipif(True, reason=reason), append=False)


@pytest.fixture(scope="session")
def demo_artifact(tmp_path_factory):
    """The embedded model, compiled and verified as `make compile` does, through TorchScript, for batches of 2 to 8."""
    folder = tmp_path_factory.mktemp("artifacts") / "demo"
    return clip_ttrt.compile(model="demo", precision="fp16", batch="2:4:8", backend="torchscript", output=folder)


@pytest.fixture(scope="session")
def demo_engines(tmp_path_factory):
    """The same, as TensorRT engines in fp16, with the fused kernels where they are built."""
    folder = tmp_path_factory.mktemp("engines") / "demo"
    return clip_ttrt.compile(model="demo", precision="fp16", batch="2:4:8", backend="tensorrt", output=folder)
