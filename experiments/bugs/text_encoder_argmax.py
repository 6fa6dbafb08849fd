"""argmax over int32 may run in half, and then finds the start of CLIP's texts, not their end

`conversion/impl/topk.py` casts an int32 input of argmax to float32 before TopK.  In a weakly
typed network with FP16 enabled TensorRT may run that TopK in half, in which integers above 2048
are not all exact: start of text (49406) and end of text (49407) both become 49408, and the first
one wins, with no warning.  In which precision it runs is TensorRT's choice, by time.

Steps: compile `tokens.argmax(-1)` for 4, 512 and 8192 texts, in a strongly typed network, and
where this version still has it in a weakly typed one with half enabled; compare with PyTorch.

Avoided by: networks are strongly typed, and the op `clip_ttrt::pool_end_of_text` finds the
position with int32 layers alone (clip_ttrt/ops.py, clip_ttrt/converters.py).
"""
import sys

import torch

from experiments.baselines import example
from experiments.bugs.stock import Apply, Finding, compile_stock, require, settings, show

COUNTS = (4, 512, 8192)


def reproduce() -> Finding:
    require()
    torch.manual_seed(0)
    weak = {"use_explicit_typing": False, "enabled_precisions": {torch.half}}
    typings = {"strongly typed": {}}
    if len(settings(**weak)) == len(weak):
        typings["weakly typed"] = weak
    told, seen = [], False
    for name, more in typings.items():
        missed = []
        for count in COUNTS:
            tokens = example("demo", "text", count, torch.int32, "cuda")
            found = compile_stock(Apply(lambda x: x.argmax(dim=-1)), tokens, **more)(tokens)
            missed.append((found != tokens.argmax(dim=-1)).sum().item())
        seen |= any(missed)
        told.append(f"{name}: {missed} of {COUNTS} positions wrong")
    return Finding(seen, "all positions right", "; ".join(told))


if __name__ == "__main__":
    sys.exit(show(__doc__, reproduce))
