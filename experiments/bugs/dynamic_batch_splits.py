"""With a dynamic batch, sizes computed from it split the graph, and expand fails

`torch.export` with a dynamic batch turns `x.shape[0]` into `aten.sym_size`, for which
Torch-TensorRT 2.2 has no converter: it stays in PyTorch and becomes an input of the next engine,
and a view or an expand to such a size is split off or raises.  Vision transformers do both: a
class token is expanded to the batch, heads are split by a view.

Steps: compile for batches 1 to 4 a linear layer, a view that splits heads and another linear
layer; and an expanded class token before the rows and a linear layer.  Count engines, compare
with PyTorch at batches 1, 2 and 4.

Avoided by: ops of our own, which keep the class token's expand and the split of heads out of the
graph (clip_ttrt/ops.py); what an engine does not take is an error that names it.
"""
import sys

import torch
from torch import nn

from experiments.bugs.finding import Finding, show
from experiments.bugs.stock import (
    compile_stock,
    engines,
    largest_error,
    left_in_pytorch,
    require_gpu,
    where,
)  # fmt: skip


class Heads(nn.Module):
    """[B, 16, 64] -> [B, 2, 16, 32]."""

    def __init__(self):
        super().__init__()
        self.before, self.after = nn.Linear(64, 64), nn.Linear(32, 32)

    def forward(self, x):
        return self.after(self.before(x).view(x.shape[0], 16, 2, 32).transpose(1, 2))


class ClassToken(nn.Module):
    """[B, 16, 64] -> [B, 17, 64]."""

    def __init__(self):
        super().__init__()
        self.token, self.linear = nn.Parameter(torch.randn(64)), nn.Linear(64, 64)

    def forward(self, x):
        return self.linear(torch.cat([self.token.expand(x.shape[0], 1, 64), x], dim=1))


def reproduce() -> Finding:
    require_gpu()
    torch.manual_seed(0)
    x, told, seen = torch.randn(4, 16, 64, device="cuda"), [], False
    for name, module in (("head split", Heads().cuda()), ("class token", ClassToken().cuda())):
        try:
            compiled = compile_stock(module, x[:2].clone(), (1, 2, 4))
            error = max(largest_error(compiled, module, x[:size].clone()) for size in (1, 2, 4))
        except Exception as problem:  # noqa: BLE001 (whatever is raised is what is asked for)
            seen = True
            told.append(f"{name}: {where(problem)}")
            continue
        count, left = engines(compiled), ", ".join(left_in_pytorch(compiled))
        seen |= count != 1 or bool(left) or not error < 1e-2
        told.append(f"{name}: engines {count}, in PyTorch {left or 'nothing'}, error {error:.1e}")
    expected = "one engine each, nothing left in PyTorch, errors of rounding"
    return Finding(seen, expected, "; ".join(told))


if __name__ == "__main__":
    sys.exit(show(__doc__, reproduce))
