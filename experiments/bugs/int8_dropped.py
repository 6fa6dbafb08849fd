"""enabled_precisions {half, int8} silently becomes half

Torch-TensorRT 2.2.0.  `dynamo/_compiler.py` reduces the set of enabled precisions to one: half if it is there, else float;
anything else raises.  So {half, int8} builds an engine without INT8 and says nothing, while {int8} raises; INT8 cannot be
reached at all, although the interpreter has a branch for it.

Steps: compile a linear layer with {half, int8}, then with {int8}; read the precision that the interpreter was given.

Expected: INT8 and FP16 are both enabled, or both calls are refused with the same reason.

Our way round it: an interpreter of our own sets the builder's flags from one named precision, fp32, tf32 or fp16, and other
names are an error (clip_ttrt/engine.py, Interpreter.build; clip_ttrt/options.py).
"""
import sys

import torch
from torch import nn

from experiments.bugs.finding import Finding, show
from experiments.bugs.stock import compile_stock, networks, require_tensorrt


def reproduce() -> Finding:
    require_tensorrt()
    layer, x = nn.Linear(64, 64).eval().requires_grad_(False).cuda(), torch.randn(4, 64, device="cuda")
    with networks() as built:
        compile_stock(layer, x, [torch.half, torch.int8])
    [network] = built
    try:
        compile_stock(layer, x, [torch.int8])
        alone = "compiles"
    except ValueError as error:
        alone = f"raises ValueError: {error}"
    return Finding(network.precision == torch.half, "INT8 and FP16 are enabled, or both sets are refused",
                   f"{{half, int8}} builds with {network.precision} alone and no warning; {{int8}} {alone}")


if __name__ == "__main__":
    sys.exit(show(__doc__, reproduce))
