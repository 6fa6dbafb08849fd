"""With a dynamic batch, sizes computed from it split the graph, and expand fails

Torch-TensorRT 2.2.0.  `torch.export` with a dynamic batch turns `x.shape[0]` into `aten.sym_size`, for which there is no
converter, so that it stays in PyTorch and its result becomes an input of the next engine.  A view or an expand to such a size
is then split off or, as the converters cannot take a size that is a tensor, raises.  Vision transformers do both: a class
token is expanded to the batch, heads are split by a view.

Steps: compile for batches 1 to 4 (a) a linear layer, a view that splits heads, another linear layer; (b) an expanded class
token before the rows and a linear layer.  Count engines, compare with PyTorch at batches 1, 2 and 4.

Expected: one engine, right at every batch.

Our way round it: torch.export alone is stock; the pass `forget_batch_size` (clip_ttrt/lowering.py) writes -1 for a batch
size, and ops of our own keep the class token's expand and the head split out of the graph, with converters that take the
batch from the tensors (clip_ttrt/converters.py, convert_prepend_class_token, native_attention).  What would still be left in
PyTorch is an error that names it.
"""
import sys

import torch
from torch import nn

from experiments.bugs.finding import Finding, show
from experiments.bugs.stock import compile_stock, engines, left_in_pytorch, require_tensorrt, where


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
    require_tensorrt()
    torch.manual_seed(0)
    said, seen = [], False
    for name, module in (("head split", Heads()), ("class token", ClassToken())):
        module = module.eval().requires_grad_(False).cuda()
        try:
            compiled = compile_stock(module, torch.randn(2, 16, 64, device="cuda"), batches=(1, 2, 4))
            count, left = engines(compiled), left_in_pytorch(compiled)
            error = 0.0
            for batch in (1, 2, 4):
                x = torch.randn(batch, 16, 64, device="cuda")
                error = max(error, (compiled(x) - module(x)).abs().max().item())
        except Exception as problem:  # whatever the compiler or the runtime raises is what is asked for
            seen = True
            said.append(f"{name}: {where(problem)}")
        else:
            seen |= count != 1 or bool(left) or error > 1e-2
            said.append(f"{name}: {count} engines, in PyTorch {', '.join(left) or 'nothing'}, largest error {error:.1e}")
        print(said[-1], flush=True)
    return Finding(seen, "one engine each, nothing left in PyTorch, errors of rounding", "; ".join(said))


if __name__ == "__main__":
    sys.exit(show(__doc__, reproduce))
