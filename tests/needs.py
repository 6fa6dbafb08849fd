"""What a test needs beside a GPU and may not find: marks that skip it and say why.

Whether a GPU answers decides conftest, for every test marked `gpu`.
"""
import pytest
import torch

from clip_ttrt import kernels

obstacle = kernels.obstacle()
built = pytest.mark.skipif(  # for PyTorch's ops
    not kernels.available(), reason="the library is not built: python -m clip_ttrt.build_kernels")
fused = pytest.mark.skipif(obstacle is not None, reason=f"no fused kernels in engines: {obstacle}")
ampere = pytest.mark.skipif(
    torch.cuda.is_available() and torch.cuda.get_device_capability() < (8, 0),
    reason="needs a GPU of compute capability 8.0 or newer")
