"""torch.export of PyTorch 2.2 refuses Python 3.12

PyTorch 2.2.0.  The wheels for Python 3.12 import and run, but `torch.export.export` goes through Dynamo, which refuses this
Python (pytorch/pytorch issue 120233).

Steps: export a linear layer under Python 3.12 with PyTorch 2.2.  Needs that Python, and no GPU.

Expected: an exported program, or no wheel for a Python that is not supported.

Our way round it: where export cannot run (clip_ttrt/lowering.py, can_export) the TorchScript backend traces the plain
encoders as they are (clip_ttrt/pipeline.py, build_torchscript); TensorRT has no packages for Python 3.12 anyway.
"""
import sys

import torch
from torch import nn

from experiments.bugs.finding import CannotRun, Finding, show


def reproduce() -> Finding:
    if sys.version_info < (3, 12):
        raise CannotRun(f"needs Python 3.12, this is {sys.version_info.major}.{sys.version_info.minor}")
    try:
        torch.export.export(nn.Linear(4, 4), (torch.zeros(2, 4),))
    except RuntimeError as error:
        return Finding(True, "an exported program", f"RuntimeError: {str(error).splitlines()[0]}")
    return Finding(False, "an exported program", "an exported program")


if __name__ == "__main__":
    sys.exit(show(__doc__, reproduce))
