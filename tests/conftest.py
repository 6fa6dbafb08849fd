"""Fixtures, and the rule for the `gpu` marker: such tests are skipped where no GPU answers, and all but those of the
kernels, which run in any PyTorch, where TensorRT is not installed.  That is the reason that is told, also of those that a library
which is not built would skip: of all reasons pytest tells the first `skipif` that holds."""
from pathlib import Path

import pytest
import torch

import clip_ttrt
from clip_ttrt import backends, kernels


def pytest_collection_modifyitems(items):
    kernels = Path(__file__).parent / "kernels"
    for item in items:
        if "gpu" not in item.keywords:
            continue
        if not torch.cuda.is_available():
            item.add_marker(pytest.mark.skipif(True, reason="needs a GPU: no CUDA GPU answers"), append=False)
        elif backends.missing_packages() and kernels not in item.path.parents:
            item.add_marker(pytest.mark.skipif(True, reason=f"needs TensorRT: not installed: {', '.join(backends.missing_packages())}"), append=False)


@pytest.fixture(scope="session")
def demo_artifact(tmp_path_factory):
    """The embedded model, compiled and verified as `make compile` does, through TorchScript, for batches of 2 to 8."""
    return clip_ttrt.compile(model="demo", precision="fp16", batch="2:4:8", backend="torchscript", output=tmp_path_factory.mktemp("artifacts") / "demo")


@pytest.fixture(scope="session")
def demo_engines(tmp_path_factory):
    """The same, as TensorRT engines in fp16, with the plugins where they are built."""
    return clip_ttrt.compile(model="demo", precision="fp16", batch="2:4:8", backend="tensorrt", attention="plugin" if kernels.available() else "native",
                             output=tmp_path_factory.mktemp("engines") / "demo")
