"""rows[arange(B), positions], CLIP's pooling, through the converter of aten.index with two index tensors: a suspect

Torch-TensorRT 2.2.0, TensorRT 8.6.0.  A whole stock text encoder of ViT-B/32 in float came out with a smallest cosine of 0.11
on an H200, as one engine and without a mask in the model, although `tokens.argmax(-1)` alone is right in float
(experiments/bugs/text_encoder_argmax.py).  This looks at the one piece that is suspected; whether
anything is seen depends on the run.  All rows right from one engine that has the indexing inside would clear it.

Steps: compile an embedding of int32 tokens [32, 77] from which `rows[torch.arange(32), tokens[:, 1]]` is taken, so that positions need
no argmax, with enabled_precisions {float}; compare with PyTorch, and look up which token's row came instead.

Expected: the rows at the positions, exactly, from one engine.

Our way round it: the op `clip_ttrt::pool_end_of_text`, whose converter uses no aten.index (clip_ttrt/converters.py,
convert_pool_end_of_text).
"""
import sys

import torch
from torch import nn

from experiments.bugs.finding import Finding, show
from experiments.bugs.stock import compile_stock, cosine, engines, left_in_pytorch, require_tensorrt, where

TEXTS, TOKENS, WIDTH = 32, 77, 512
EXPECTED = "all rows right, one engine"


class Pool(nn.Module):
    """int32 [B, 77], whose second token is a position -> [B, W]."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding((TEXTS + 1) * TOKENS, WIDTH)

    def forward(self, tokens):
        rows = self.embedding(tokens)
        return rows[torch.arange(rows.shape[0], device=rows.device), tokens[:, 1]]


def positioned() -> torch.Tensor:
    """Tokens int32 [32, 77], no two alike, with the positions 2, 4, 6 and so on in second place."""
    tokens = TOKENS + torch.arange(TEXTS * TOKENS, dtype=torch.int32).view(TEXTS, TOKENS)
    tokens[:, 1] = 2 + 2 * torch.arange(TEXTS)
    return tokens


def origin(row: torch.Tensor, rows: torch.Tensor) -> str:
    """Whose features [W] among [B, T, W] these are."""
    same = (rows == row).all(dim=-1).nonzero().tolist()
    return f"token {same[0][1]} of text {same[0][0]}" if same else "no token"


def reproduce() -> Finding:
    require_tensorrt()
    torch.manual_seed(0)
    pool, tokens = Pool().eval().requires_grad_(False).cuda(), positioned().cuda()
    expected, rows = pool(tokens), pool.embedding(tokens)
    try:
        compiled = compile_stock(pool, tokens)
        actual = compiled(tokens)
        torch.cuda.synchronize()
    except Exception as problem:  # whatever the compiler or the runtime raises is what is asked for
        return Finding(True, EXPECTED, where(problem))
    parts = f"{engines(compiled)} engines, in PyTorch {', '.join(left_in_pytorch(compiled)) or 'nothing'}"
    if actual.shape != expected.shape:
        return Finding(True, EXPECTED, f"shape {list(actual.shape)} instead of {list(expected.shape)}; {parts}")
    wrong = (actual != expected).any(dim=-1).nonzero().flatten().tolist()
    instead = [f"text {text} got {origin(actual[text], rows)} instead of token {tokens[text, 1].item()}" for text in wrong]
    print("\n".join(instead), flush=True)
    return Finding(bool(wrong), EXPECTED, "; ".join([f"{len(wrong)} of {TEXTS} rows wrong, smallest cosine {cosine(actual, expected):.4f}", *instead[:3], parts]))


if __name__ == "__main__":
    sys.exit(show(__doc__, reproduce))
