"""native_layer_norm becomes a row of elementwise layers that TensorRT runs in half and warns about

Torch-TensorRT 2.2.0, TensorRT 8.6.0.  `conversion/impl/normalization/ops.py` writes a layer norm out as mean, difference,
square, mean, sum, root, quotient, product and sum.  With FP16 enabled the squares may be kept in half, whose largest number
is 65504: they overflow from a deviation of 256 on.  TensorRT recognises the pattern and warns of it; it also has
INormalizationLayer, which computes in float32 inside.

Steps: compile a layer norm over 768 with FP16; count the layers, read TensorRT's warnings, and compare with PyTorch on rows
of deviation 1 and 400.  (On an H200 the warning comes and the errors stay small.)

Expected: one normalisation layer, no warning, errors of rounding at both scales.
(The converter uses INormalizationLayer from 2.3 on, pull request 2755.)

Our way round it: INormalizationLayer with float32 inside (clip_ttrt/converters.py, convert_layer_norm).
"""
import sys

import torch
from torch import nn

from experiments.bugs.finding import Finding, show
from experiments.bugs.stock import compile_stock, networks, require_tensorrt, said

ROUNDING = 2e-2  # half's, relative to values of order 1, with room


def reproduce() -> Finding:
    require_tensorrt()
    torch.manual_seed(0)
    norm = nn.Sequential(nn.LayerNorm(768), nn.Linear(768, 768)).eval().requires_grad_(False).cuda()
    x = torch.randn(4, 50, 768, device="cuda")
    with said() as lines, networks() as built:
        compiled = compile_stock(norm, x, [torch.half])
    errors = {scale: (compiled(x * scale) - norm(x * scale)).abs().max().item() for scale in (1, 400)}
    overflow = [line.split("[W] ")[-1] for line in lines if "[W]" in line and "overflow" in line.lower()]
    layers = [layer for network in built for layer in network.layers if "norm" in layer]
    print("\n".join(layers), flush=True)
    actual = f"{len(layers)} layers for the norm; largest error {', '.join(f'{error:.1e} at deviation {scale}' for scale, error in errors.items())}; " \
             f"TensorRT: {overflow[0] if overflow else 'no warning'}"
    wrong = any(not error < ROUNDING for error in errors.values())
    return Finding(len(layers) > 2 and (bool(overflow) or wrong), "one normalisation layer, no warning, errors of rounding", actual)


if __name__ == "__main__":
    sys.exit(show(__doc__, reproduce))
