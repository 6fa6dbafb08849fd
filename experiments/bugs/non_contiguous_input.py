"""The engine reads a non-contiguous input from memory that is already given to its output

Torch-TensorRT 2.2.0.  `core/runtime/execute_engine.cpp` passes `inputs[i].view(shape).contiguous().data_ptr()` to
setTensorAddress.  For a non-contiguous input `.contiguous()` makes a temporary, which dies at the end of that statement.
Its block goes back to PyTorch's caching allocator, and the next allocation of that size, which is often the output, gets it.
The engine then writes its output over the input it is still reading, which is wrong as soon as one of its kernels writes
before another thread block has read.  On an H200 with TensorRT 8.6.0 the output is indeed in the temporary's block, for both
modules below, and their results happen to be right: seen is the cause, not yet a wrong result.

Steps: compile a linear layer from 2048 to 2048 and a transpose of the two, for 2048 rows in float32, so that input and output
have one size; call each with a contiguous input and with the same values in a transposed layout.  All memory involved
belongs to PyTorch's allocator, so this is safe to run.

Expected: the same result for both layouts.
(The contiguous tensor is kept alive since 2.5.)

Our way round it: the saved module calls `.contiguous()` itself and holds the result while the engine runs
(clip_ttrt/guard.py).
"""
import sys

import torch
from torch import nn

from experiments.bugs.finding import Finding, show
from experiments.bugs.stock import compile_stock, require_tensorrt

SIZE = 2048


class Transposed(nn.Module):
    """[N, N] -> [N, N]."""

    def forward(self, x):
        return x.transpose(0, 1) + 1


def reproduce() -> Finding:
    require_tensorrt()
    torch.manual_seed(0)
    said, seen = [], False
    for name, module in (("linear", nn.Linear(SIZE, SIZE)), ("transpose", Transposed())):
        module = module.eval().requires_grad_(False).cuda()
        x = torch.randn(SIZE, SIZE, device="cuda")
        compiled = compile_stock(module, x)
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
