"""What a test needs beside a GPU and may not find: marks that skip it and say why.

Whether a GPU answers decides conftest, for every test marked `gpu`.
"""
import ctypes

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
nvimagecodec = pytest.mark.skipif(
    kernels.nvimagecodec() is None, reason="nvImageCodec is not installed: the extra embed-gpu")


def no_engines():
    """Why the GPU here can decode no JPEG, whatever we do; None where it must."""
    if not torch.cuda.is_available():
        return "no CUDA GPU answers"
    if torch.cuda.get_device_capability() not in ((8, 0), (9, 0), (10, 0)):
        return "only A100, H100, H200 and B200 are known to have them"
    try:
        ctypes.CDLL("libnvcuvid.so.1")
    except OSError as problem:
        return str(problem)


engines = pytest.mark.skipif(no_engines() is not None, reason=f"no JPEG engines: {no_engines()}")
fp8 = pytest.mark.skipif(
    torch.cuda.is_available() and torch.cuda.get_device_capability() < (8, 9),
    reason="needs a GPU of compute capability 8.9 or newer")
