"""Networks built for real without a GPU, with TensorRT-RTX: run by tests/test_rtx.py.

`torch_tensorrt` asks for the current GPU when it is imported and when settings are made; this
process answers for one.
"""
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))  # lowering.py
torch.cuda.get_device_capability = lambda *device: (8, 6)
torch.cuda.current_device = lambda: 0
