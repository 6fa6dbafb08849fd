"""What a test needs beside a GPU and may not find: marks that skip it and say why.

Whether a GPU answers decides conftest, for every test marked `gpu`.
"""
import pytest
import torch

from clip_ttrt import kernels

NOT_BUILT = "the library is not built: python -m clip_ttrt.build_kernels"
built = pytest.mark.skipif(not kernels.available(), reason=NOT_BUILT)  # for PyTorch's ops
_obstacle = kernels.obstacle()
fused = pytest.mark.skipif(_obstacle is not None, reason=f"no fused kernels in engines: {_obstacle}")
ampere = pytest.mark.skipif(torch.cuda.is_available() and torch.cuda.get_device_capability() < (8, 0), reason="needs a GPU of compute capability 8.0 or newer")
