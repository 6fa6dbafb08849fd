"""Fixtures, and the rule for the `gpu` marker.

Such tests are skipped where no GPU answers, and all but those of the kernels, which run in any
PyTorch, where no Torch-TensorRT is installed.  That is the reason that is told, also of those
that a library which is not built would skip: of all reasons pytest tells the first that holds.
"""
from pathlib import Path

import pytest
import torch

import clip_ttrt
from clip_ttrt import stack

WHEELS = {"torch-tensorrt", "torch-tensorrt-rtx"}


def pytest_collection_modifyitems(items):
    of_kernels = Path(__file__).parent / "kernels"
    reason = None if WHEELS & set(stack.versions()) else "needs Torch-TensorRT, not installed"
    for item in items:
        if "gpu" not in item.keywords:
            continue
        if not torch.cuda.is_available():
            mark = pytest.mark.skipif(True, reason="needs a GPU: no CUDA GPU answers")
            item.add_marker(mark, append=False)
        elif reason and of_kernels not in item.path.parents:
            item.add_marker(pytest.mark.skipif(True, reason=reason), append=False)


@pytest.fixture(scope="session")
def demo_artifact(tmp_path_factory):
    """The embedded model through TorchScript, verified, for batches of 2 to 8."""
    folder = tmp_path_factory.mktemp("artifacts") / "demo"
    return clip_ttrt.compile(
        model="demo", precision="fp16", batch="2:4:8", backend="torchscript", output=folder
    )


@pytest.fixture(scope="session")
def demo_engines(tmp_path_factory):
    """The same as engines in fp16, with the fused kernels where they run."""
    folder = tmp_path_factory.mktemp("engines") / "demo"
    return clip_ttrt.compile(model="demo", precision="fp16", batch="2:4:8", output=folder)
