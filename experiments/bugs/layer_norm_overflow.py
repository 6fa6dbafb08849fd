"""A layer norm in half squares in half, and overflows from a deviation of 256 on

`conversion/impl/normalization/ops.py` of Torch-TensorRT 2.2 writes a layer norm out as
elementwise layers, whose squares TensorRT may keep in half, whose largest number is 65504.
From 2.3 on (pull request 2755) it is INormalizationLayer, in the type of its input.  PyTorch's own
layer norm of half computes in fp32 inside.

Steps: compile a layer norm over 768 in half; compare with PyTorch in fp64 on rows of deviation 1,
400 and 4000, and of deviation 1 around 400.

Avoided by: layer norms are computed in fp32, by a plugin or between casts
(clip_ttrt/converters.py).
"""
import sys

import torch
from torch import nn

from experiments.bugs.finding import Finding, show
from experiments.bugs.stock import compile_stock, require_gpu

# PyTorch's own error in half is the measure: as far off again, and half's last place at 4.
TIMES, ROUNDING = 2, 2**-8


def reproduce() -> Finding:
    require_gpu()
    torch.manual_seed(0)
    norm = nn.LayerNorm(768).half().cuda()
    x = torch.randn(4, 50, 768, device="cuda")
    compiled = compile_stock(norm, x.half())
    cases = {"1": x, "400": x * 400, "4000": x * 4000, "1 around 400": x + 400}
    told, seen = [], False
    for name, rows in cases.items():
        rows = rows.half()
        with torch.no_grad():
            exact = nn.functional.layer_norm(rows.double(), (768,))
            error, own = (
                (run(rows).double() - exact).abs().max().item() for run in (compiled, norm)
            )
        seen |= not error < TIMES * own + ROUNDING
        told.append(f"deviation {name}: largest error {error:.1e}, PyTorch's {own:.1e}")
    return Finding(seen, "errors as PyTorch's", "; ".join(told))


if __name__ == "__main__":
    sys.exit(show(__doc__, reproduce))
