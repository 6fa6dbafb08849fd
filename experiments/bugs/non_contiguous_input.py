"""The engine reads a non-contiguous input from memory that is already given to its output

`core/runtime/execute_engine.cpp` passes the address of `inputs[i].contiguous()` to TensorRT.  For
a non-contiguous input that is a temporary, which dies at the end of the statement; its block goes
back to PyTorch's allocator, and the next allocation of that size, often the output, gets it.  The
engine then writes its output over the input it still reads.  Where a first kernel reads the whole
input into memory of the engine's own nothing shows.

Steps: compile a swap of the upper and the lower half of the rows, a transpose and a linear layer
without bias, from [2048, 2048] to the same size; call each with a contiguous input and with the
same values in a transposed layout.  All memory involved belongs to PyTorch's allocator.

Avoided by: the saved module calls `.contiguous()` itself and holds the result while the engine
runs (clip_ttrt/guard.py).
"""
import sys

import torch
from torch import nn

from experiments.bugs.stock import Apply, Finding, compile_stock, require, show

SIZE = 2048


def reproduce() -> Finding:
    require()
    torch.manual_seed(0)
    told, seen, x = [], False, torch.randn(SIZE, SIZE, device="cuda")
    modules = {
        "swap": Apply(lambda x: torch.cat([x[SIZE // 2 :], x[: SIZE // 2]])),
        "transpose": Apply(lambda x: x.transpose(0, 1)),
        "linear": nn.Linear(SIZE, SIZE, bias=False),
    }
    for name, module in modules.items():
        compiled = compile_stock(module.cuda(), x)
        expected = compiled(x).clone()
        strided = x.t().contiguous().t()  # the same values, another layout
        copy = strided.contiguous()
        address = copy.data_ptr()
        del copy  # so that the runtime's temporary gets this block
        actual = compiled(strided)
        shared = "in" if actual.data_ptr() == address else "not in"
        error = (actual - expected).abs().max().item()
        seen |= not error < 1e-2
        told.append(f"{name}: largest difference {error:.2g}, output {shared} the freed block")
    return Finding(seen, "no difference between the layouts", "; ".join(told))


if __name__ == "__main__":
    sys.exit(show(__doc__, reproduce))
