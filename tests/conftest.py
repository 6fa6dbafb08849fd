"""Fixtures, and the rule for the `gpu` marker: such tests are skipped where no GPU or no TensorRT answers."""
import pytest
import torch

import clip_ttrt
from clip_ttrt import backends


def pytest_collection_modifyitems(items):
    missing = "no CUDA GPU answers" if not torch.cuda.is_available() else ", ".join(backends.missing_packages()) and "the TensorRT packages are not installed"
    if not missing:
        return
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(pytest.mark.skip(reason=f"needs a GPU with TensorRT: {missing}"))


@pytest.fixture(scope="session")
def demo_artifact(tmp_path_factory):
    """The embedded model, compiled and verified as `make compile` does, through TorchScript, for batches of 2 to 8."""
    return clip_ttrt.compile(model="demo", precision="fp16", batch="2:4:8", backend="torchscript", output=tmp_path_factory.mktemp("artifacts") / "demo")


@pytest.fixture(scope="session")
def demo_engines(tmp_path_factory):
    """The same, as TensorRT engines in fp16."""
    return clip_ttrt.compile(model="demo", precision="fp16", batch="2:4:8", backend="tensorrt", output=tmp_path_factory.mktemp("engines") / "demo")
