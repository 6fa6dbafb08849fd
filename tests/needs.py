"""What a test needs beside a GPU and may not find: marks that skip it and say why.  Whether a GPU answers decides conftest, for every test marked `gpu`."""
import pytest
import torch

from clip_ttrt import lowering, kernels

NOT_BUILT = "the library is not built: python -m kernels.build"
built = pytest.mark.skipif(not kernels.available(), reason=NOT_BUILT)
ampere = pytest.mark.skipif(torch.cuda.is_available() and torch.cuda.get_device_capability() < (8, 0), reason="needs a GPU of compute capability 8.0 or newer")
export = pytest.mark.skipif(not lowering.can_export(), reason="torch.export of PyTorch 2.2 needs Python 3.11 or older")
