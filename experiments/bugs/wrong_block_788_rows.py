"""A transformer block optimised for some 800 to 1,000 rows comes out wrong in half, with no warning

TensorRT 8.6 built a block of ViT-B/16 for 4 x 197 = 788 rows in half with a cosine of 0.967
against fp32, and one of ViT-L/14 for 1,028 rows; what was wrong was what it chose for that many
rows, and an engine for 1 to 16 images optimised for 4 was wrong at every batch but 1.

Steps: build one block with random weights for 4 images and for a range around them; compare with
fp32 PyTorch.

Avoided by: the fused kernels leave TensorRT no matrix products; `compile` verifies each artifact
at many batch sizes, and `load` refuses one that failed (clip_ttrt/verify.py, failures).
"""
import sys

import torch
from torch import nn

from clip_ttrt.encoders import DIFFERENTIABLE, Block
from clip_ttrt.models import dimensions_of
from experiments.baselines import allow_tf32
from experiments.bugs.stock import Finding, compile_stock, require, show

BOUND = 0.9999
CASES = ("ViT-B/16", None, 4), ("ViT-B/16", (1, 4, 16), 8), ("ViT-L/14", (1, 4, 16), 4)


def reproduce() -> Finding:
    require()
    told, seen = [], False
    for model, batches, batch in CASES:  # compiled for batches, run at batch
        torch.manual_seed(0)
        dims = dimensions_of(model)
        module = Block(dims.image_width, dims.image_heads, False, DIFFERENTIABLE).cuda()
        x = torch.randn(batch, dims.image_tokens, dims.image_width, device="cuda")
        allow_tf32("fp32")
        with torch.no_grad():
            expected = module(x)
            actual = compile_stock(module.half(), x.half(), batches)(x.half())
        pair = (rows.flatten(1).double() for rows in (actual, expected))
        found = nn.functional.cosine_similarity(*pair).min().item()
        seen |= not found >= BOUND
        told.append(f"{model} for {batches or batch} at {batch}: {found:.6f}")
    return Finding(seen, f"a cosine of at least {BOUND} in all", "; ".join(told))


if __name__ == "__main__":
    sys.exit(show(__doc__, reproduce))
