"""The engine reads a non-contiguous input from memory that is already given to its output

Torch-TensorRT 2.2.0.  `core/runtime/execute_engine.cpp` passes `inputs[i].view(shape).contiguous().data_ptr()` to
setTensorAddress.  For a non-contiguous input `.contiguous()` makes a temporary, which dies at the end of that statement.
Its block goes back to PyTorch's caching allocator, and the next allocation of that size, which is often the output, gets it.
The engine then writes its output over the input it is still reading, which is wrong as soon as one of its kernels writes
what another one, or another of its thread blocks, has not read yet.  Where a first kernel reads the whole input into memory of
the engine's own nothing shows: a linear layer with bias and a transpose that adds 1 came out right on an H200, with the
output in the temporary's block.  So the modules below give an engine little reason for such memory.

Steps: compile a swap of the upper and the lower half of the rows (two copies, of which the first destroys what the second
reads), a transpose and a linear layer without bias, from [2048, 2048] to the same size in float32; call each with a
contiguous input and with the same values in a transposed layout.  All memory involved belongs to PyTorch's allocator, so
this is safe to run.

Expected: the same result for both layouts.
(The contiguous tensor is kept alive since 2.5.)

Our way round it: the saved module calls `.contiguous()` itself and holds the result while the engine runs
(clip_ttrt/guard.py).
"""
import sys

import torch
from torch import nn

from experiments.bugs.finding import Finding, show
from experiments.bugs.stock import compile_stock, require_tensorrt, where

SIZE = 2048


class Swapped(nn.Module):
    """[N, N] -> [N, N]."""

    def forward(self, x):
        return torch.cat([x[SIZE // 2:], x[:SIZE // 2]])


class Transposed(nn.Module):
    """[N, N] -> [N, N]."""

    def forward(self, x):
        return x.transpose(0, 1)


def reproduce() -> Finding:
    require_tensorrt()
    torch.manual_seed(0)
    said, seen = [], False
    for name, module in (("swap", Swapped()), ("transpose", Transposed()), ("linear", nn.Linear(SIZE, SIZE, bias=False))):
        module = module.eval().requires_grad_(False).cuda()
        x = torch.randn(SIZE, SIZE, device="cuda")
        try:
            compiled = compile_stock(module, x)
        except Exception as problem:  # the other modules are still worth having
            said.append(f"{name}: {where(problem)}")
            continue
        expected = compiled(x).clone()
        strided = x.t().contiguous().t()  # the same values, another layout
        copy = strided.contiguous()
        address = copy.data_ptr()
        del copy  # so the runtime's temporary gets this block
        actual = compiled(strided)
        shared = actual.data_ptr() == address
        error = (actual - expected).abs().max().item()
        seen |= not error < 1e-2
        said.append(f"{name}: largest difference {error:.2g}, output {'in' if shared else 'not in'} the temporary's block")
        print(said[-1], flush=True)
    return Finding(seen, "no difference between the layouts", "; ".join(said))


if __name__ == "__main__":
    sys.exit(show(__doc__, reproduce))
