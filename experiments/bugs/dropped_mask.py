"""Attention masks and is_causal are dropped, with no warning

The lowering pass `lower_scaled_dot_product_attention` of Torch-TensorRT 2.2 matches attention
with its literals ignored and puts one without mask and is_causal in its place: every token sees
the ones after it.  (is_causal is honoured from 2.4 on, pull request 2780; masks since the pass
went, pull request 3296.)

Steps: compile one attention that is causal, one with a mask of -inf, and one with a mask of
booleans; compare with PyTorch.  On a TensorRT without `add_attention` the setting
`decompose_attention` is on.

Avoided by: attention is an op of our own, whose converter has the causal mask
(clip_ttrt/ops.py, clip_ttrt/converters.py).
"""
import sys

import torch
import torch.nn.functional as F
from torch import nn

from experiments.bugs.finding import Finding, show
from experiments.bugs.stock import compile_stock, largest_error, require_gpu

TOKENS = 16


class Attention(nn.Module):
    """Self-attention of one head in which no token sees the ones after it: [B, T, 64] -> same."""

    def __init__(self, kind: str):
        super().__init__()
        self.kind, self.qkv = kind, nn.Linear(64, 192)
        later = torch.ones(TOKENS, TOKENS).triu(1).bool()
        mask = torch.zeros(TOKENS, TOKENS).masked_fill(later, float("-inf"))
        self.register_buffer("mask", ~later if kind == "boolean mask" else mask)

    def forward(self, x):
        query, key, value = (part.unsqueeze(1) for part in self.qkv(x).chunk(3, dim=-1))
        if self.kind == "is_causal":
            return F.scaled_dot_product_attention(query, key, value, is_causal=True).squeeze(1)
        mask = self.mask[None, None]
        return F.scaled_dot_product_attention(query, key, value, attn_mask=mask).squeeze(1)


def reproduce() -> Finding:
    require_gpu()
    torch.manual_seed(0)
    x, told, seen = torch.randn(2, TOKENS, 64, device="cuda"), [], False
    for kind in ("is_causal", "mask", "boolean mask"):
        module = Attention(kind).cuda()
        error = largest_error(compile_stock(module, x), module, x)
        seen |= not error < 1e-2
        told.append(f"{kind}: largest error {error:.1e}")
    return Finding(seen, "errors of rounding", "; ".join(told))


if __name__ == "__main__":
    sys.exit(show(__doc__, reproduce))
