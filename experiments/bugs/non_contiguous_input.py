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

from experiments.bugs.finding import Finding, show
from experiments.bugs.stock import compile_stock, require_gpu, where

SIZE = 2048


class Swapped(nn.Module):
    """[N, N] -> [N, N]."""

    def forward(self, x):
        return torch.cat([x[SIZE // 2 :], x[: SIZE // 2]])


class Transposed(nn.Module):
    """[N, N] -> [N, N]."""

    def forward(self, x):
        return x.transpose(0, 1)


MODULES = {
    "swap": Swapped,
    "transpose": Transposed,
    "linear": lambda: nn.Linear(SIZE, SIZE, bias=False),
}


def reproduce() -> Finding:
    require_gpu()
    torch.manual_seed(0)
    told, seen, compared = [], False, 0
    x = torch.randn(SIZE, SIZE, device="cuda")
    for name, module in MODULES.items():
        try:
            compiled = compile_stock(module().cuda(), x)
        except Exception as problem:  # noqa: BLE001 (the other modules are still worth having)
            told.append(f"{name}: {where(problem)}")
            continue
        expected = compiled(x).clone()
        strided = x.t().contiguous().t()  # the same values, another layout
        copy = strided.contiguous()
        address = copy.data_ptr()
        del copy  # so that the runtime's temporary gets this block
        actual = compiled(strided)
        shared = "in" if actual.data_ptr() == address else "not in"
        error = (actual - expected).abs().max().item()
        compared += 1
        seen |= not error < 1e-2
        told.append(f"{name}: largest difference {error:.2g}, output {shared} the freed block")
    if not compared:
        raise RuntimeError("; ".join(told))
    return Finding(seen, "no difference between the layouts", "; ".join(told))


if __name__ == "__main__":
    sys.exit(show(__doc__, reproduce))
