"""A batch outside the engine's range is accepted, and answers with the rows of another batch

Torch-TensorRT 2.2.0.  `core/runtime/execute_engine.cpp` does not look at what `setInputShape` returns, nor `enqueueV3`.  If
TensorRT refuses a shape, the execution context keeps the one before; the output is allocated with that and returned.  The
caller gets a tensor with too few rows (or, for a batch below the minimum, with too many, computed from memory behind the
input) and no exception.  TensorRT writes an error to its log, which a program does not see.

Steps: compile a linear layer for batches 1 to 4, call it with 4 rows, then with 8; compile another for a batch of just 4
and call it with 8.

Expected: an exception that names the shape and the range.
(2.4 checks what setInputShape returns.)

Our way round it: the saved module checks shape, batch, dtype and device before the engine sees the input, in TorchScript, so
also from C++ (clip_ttrt/guard.py), and `CompiledCLIP` splits and pads batches (clip_ttrt/model.py).
"""
import sys

import torch
from torch import nn

from experiments.bugs.finding import Finding, show
from experiments.bugs.stock import compile_stock, require_tensorrt


def reproduce() -> Finding:
    require_tensorrt()
    torch.manual_seed(0)
    layer = nn.Linear(64, 64).eval().requires_grad_(False).cuda()
    x, said, seen = torch.randn(8, 64, device="cuda"), [], False
    for name, batches in (("range 1 to 4", (1, 2, 4)), ("static batch of 4", None)):
        compiled = compile_stock(layer, x[:4].clone(), batches=batches)
        compiled(x[:4].clone())
        try:
            rows = len(compiled(x))
            torch.cuda.synchronize()
        except RuntimeError as error:
            said.append(f"{name}: {type(error).__name__}: {str(error).splitlines()[0]}")
        else:
            said.append(f"{name}: 8 rows in, {rows} rows out, no exception")
            seen |= rows != 8
        print(said[-1], flush=True)
    return Finding(seen, "an exception for 8 rows", "; ".join(said))


if __name__ == "__main__":
    sys.exit(show(__doc__, reproduce))
