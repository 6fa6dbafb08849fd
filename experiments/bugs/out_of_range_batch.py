"""A batch outside the engine's range is accepted, and answered with the rows of another batch

`core/runtime/execute_engine.cpp` of Torch-TensorRT 2.2 looks at nothing that `setInputShape` and
`enqueueV3` return.  If TensorRT refuses a shape, the execution context keeps the one before; the
output is allocated with that and returned: too few rows or too many, and no exception.  (2.4
checks what setInputShape returns.)

Steps: compile a linear layer for batches 1 to 4, call it with 4 rows, then with 8; compile
another for a batch of just 4 and call it with 8.

Avoided by: the saved module, which checks shape, batch and dtype before the engine sees the input,
also from C++ (clip_ttrt/guard.py); `CompiledCLIP` splits and pads batches (clip_ttrt/runtime.py).
"""
import sys

import torch
from torch import nn

from experiments.bugs.stock import Finding, compile_stock, require, show
from experiments.record import in_a_line


def reproduce() -> Finding:
    require()
    torch.manual_seed(0)
    layer, x = nn.Linear(64, 64).cuda(), torch.randn(8, 64, device="cuda")
    told, seen = [], False
    for name, batches in (("range 1 to 4", (1, 2, 4)), ("static batch of 4", None)):
        compiled = compile_stock(layer, x[:4].clone(), batches)
        compiled(x[:4].clone())
        try:
            rows = len(compiled(x))
            torch.cuda.synchronize()
        except (RuntimeError, ValueError, AssertionError) as error:
            told.append(f"{name}: {in_a_line(error)}")
        else:
            told.append(f"{name}: 8 rows in, {rows} rows out, no exception")
            seen |= rows != 8
    return Finding(seen, "an exception for 8 rows", "; ".join(told))


if __name__ == "__main__":
    sys.exit(show(__doc__, reproduce, mended="2.4"))
