"""argmax over int32 may be done in half when FP16 is enabled: CLIP's text encoder then comes out wrong, with no warning

Torch-TensorRT 2.2.0, TensorRT 8.6.0.  `conversion/impl/topk.py` casts an int32 input of argmax and argmin to float32 before
TopK, and with FP16 enabled TensorRT may run that TopK in half.  Integers above 2048 are not all exact in half.  CLIP's text
encoder picks the end of text by `tokens.argmax(-1)`; start of text (49406) and end of text (49407) both become 49408, and
the first one wins: position 0.  Every text gets the features of its first token, which are the same for all texts.

In which precision TensorRT runs TopK is its own choice, by time: it was half when a whole text encoder was compiled, which is
how this was found, and float for `tokens.argmax(-1)` of 4 texts alone (TensorRT 8.6.0 on an H200).

Steps: compile `tokens.argmax(-1)` for 4, 512 and 8192 texts, then the text encoder of ViT-B/32 with random weights for 32, which
pools as clip/model.py does, and has no attention mask, since that would be dropped (experiments/bugs/dropped_mask.py), with
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

from clip_ttrt import ops
from clip_ttrt.checkpoint import load_checkpoint
from clip_ttrt.encoders import DIFFERENTIABLE, ENCODERS
from experiments.bugs.finding import Finding, show
from experiments.bugs.stock import compile_stock, cosine, engines, require_tensorrt, where

START, END, TOKENS = 49406, 49407, 77
MODEL, TEXTS = "ViT-B/32", 32
COUNTS = (4, 512, 8192)
PRECISIONS = {"half": torch.half, "float": torch.float}


class Position(nn.Module):
    """int32 [B, T] -> [B]."""

    def forward(self, tokens):
        return tokens.argmax(dim=-1)


def unmasked(qkv: torch.Tensor, heads: int, causal: bool) -> torch.Tensor:
    """Attention without a mask, which another bug would drop."""
    return ops.attention_reference(qkv, heads, False)


def pool(rows: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """As OpenAI's encode_text: [B, T, W] and int32 [B, T] -> [B, W]."""
    return rows[torch.arange(rows.shape[0], device=rows.device), tokens.argmax(dim=-1)]


def texts(count: int = 4) -> torch.Tensor:
    """Token rows int32 [count, 77]: start, some words, end, padding with zeros, of many lengths."""
    tokens = torch.randint(1, START, (count, TOKENS), dtype=torch.int32)
    ends, place = 5 + 11 * torch.arange(count) % (TOKENS - 5), torch.arange(TOKENS)
    tokens[place > ends[:, None]] = 0
    tokens[place == ends[:, None]] = END
    tokens[:, 0] = START
    return tokens


def reproduce() -> Finding:
    require_tensorrt()
    torch.manual_seed(0)
    encoder = ENCODERS["text"](load_checkpoint(MODEL, "random").state_dict, DIFFERENTIABLE._replace(attention=unmasked, pool_end_of_text=pool)).cuda()
    wrong, said = dict.fromkeys(PRECISIONS, False), []
    for count in COUNTS:
        tokens = texts(count).cuda()
        for name, precision in PRECISIONS.items():
            missed = (compile_stock(Position().eval(), tokens, [precision])(tokens) != tokens.argmax(dim=-1)).sum().item()
            wrong[name] |= missed > 0
            said.append(f"{name}: {missed} of {count} positions wrong")
            print(said[-1], flush=True)
    tokens = texts(TEXTS).cuda()
    with torch.no_grad():
        expected = encoder(tokens)
    for name, precision in PRECISIONS.items():
        try:
            compiled = compile_stock(encoder, tokens, [precision])
            similarity = cosine(compiled(tokens), expected)
        except Exception as problem:  # the positions are still worth having
            said.append(f"{name}: text encoder: {where(problem)}")
        else:
            wrong[name] |= not similarity > 0.999
            said.append(f"{name}: smallest cosine of {TEXTS} texts' features {similarity:.4f}, {engines(compiled)} engines")
        print(said[-1], flush=True)
    return Finding(wrong["half"] and not wrong["float"], "all positions right and a cosine of 1 in both precisions", "; ".join(said))


if __name__ == "__main__":
    sys.exit(show(__doc__, reproduce))
