"""One builder for all: TensorRT reads its kernels for the first and drops them with the last."""
import pytest
import torch

from clip_ttrt import trt


@pytest.fixture(scope="session", autouse=True)
def builder():
    if torch.cuda.is_available() and trt.installed_backend():
        with trt.builder_kept() as kept:
            yield kept
    else:
        yield None
