"""argmax over int32 may be done in half when FP16 is enabled: CLIP's text encoder then comes out wrong, with no warning

Torch-TensorRT 2.2.0, TensorRT 8.6.0.  `conversion/impl/topk.py` casts an int32 input of argmax and argmin to float32 before
TopK, and with FP16 enabled TensorRT may run that TopK in half.  Integers above 2048 are not all exact in half.  CLIP's text
encoder picks the end of text by `tokens.argmax(-1)`; start of text (49406) and end of text (49407) both become 49408, and
the first one wins: position 0.  Every text gets the features of its first token, which are the same for all texts.

Where TensorRT runs TopK is its own choice: it was in half when OpenAI's whole text encoder was compiled, which is how this was
found, and in float in the two small modules below (TensorRT 8.6.0 on an H200), so that this script does not show it there.

Steps: compile `tokens.argmax(-1)`, and the pooling of clip/model.py with an embedding and a linear layer before it, with
enabled_precisions {float} and {half}; compare with PyTorch.

Expected: the positions of the end of text in both, since these integers fit float32 and not half.
(The cast is still there in 2.6.0.)  A fix in the converter: TopK takes no int32 in TensorRT 8.6, so subtract the maximum first (the difference of equal integers
is 0 in every precision), or compare in int32.

Our way round it: the op `clip_ttrt::pool_end_of_text`, whose converter finds the position with int32 layers alone
(clip_ttrt/converters.py, convert_pool_end_of_text).
"""
import sys

import torch
from torch import nn

from experiments.bugs.finding import Finding, show
from experiments.bugs.stock import compile_stock, cosine, require_tensorrt

START, END, TOKENS = 49406, 49407, 77


class Position(nn.Module):
    """int32 [B, T] -> [B]."""

    def forward(self, tokens):
        return tokens.argmax(dim=-1)


class Pooled(nn.Module):
    """int32 [B, T] -> [B, 64], the way OpenAI's encode_text ends."""

    def __init__(self):
        super().__init__()
        self.embedding, self.linear = nn.Embedding(END + 1, 64), nn.Linear(64, 64)
        self.positions = nn.Parameter(torch.randn(TOKENS, 64))

    def forward(self, tokens):
        x = self.linear(self.embedding(tokens) + self.positions)
        return x[torch.arange(x.shape[0], device=x.device), tokens.argmax(dim=-1)]


def texts(count: int = 4) -> torch.Tensor:
    """Token rows int32 [count, 77]: start, some words, end, padding with zeros, each of another length."""
    tokens = torch.zeros(count, TOKENS, dtype=torch.int32)
    for row in range(count):
        length = 5 + 11 * row
        tokens[row, 1:length] = torch.randint(1, START, (length - 1,), dtype=torch.int32)
        tokens[row, 0], tokens[row, length] = START, END
    return tokens


def reproduce() -> Finding:
    require_tensorrt()
    torch.manual_seed(0)
    tokens, wrong, said = texts().cuda(), {}, []
    expected = tokens.argmax(dim=-1).tolist()
    pooled = Pooled().eval().requires_grad_(False).cuda()
    for name, precision in (("float", torch.float), ("half", torch.half)):
        positions = compile_stock(Position().eval(), tokens, [precision])(tokens).long().tolist()
        similarity = cosine(compile_stock(pooled, tokens, [precision])(tokens), pooled(tokens))
        wrong[name] = positions != expected or not similarity > 0.999
        said.append(f"{name}: positions {positions}, smallest cosine of pooled features {similarity:.4f}")
        print(said[-1], flush=True)
    return Finding(wrong["half"], f"positions {expected} and a cosine of 1 in both precisions", "; ".join(said))


if __name__ == "__main__":
    sys.exit(show(__doc__, reproduce))
