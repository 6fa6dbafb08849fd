"""lower_scaled_dot_product_attention drops attention masks and is_causal, with no warning

Torch-TensorRT 2.2.0.  The lowering pass looks for `_scaled_dot_product_efficient_attention(q, k, v, None, False)` and
`_scaled_dot_product_flash_attention(q, k, v)` with `ignore_literals=True`, and puts `scaled_dot_product_attention(q, k, v)`
in their place.  With literals ignored, a mask in place of `None`, or is_causal=True, matches too, and is lost.  The
converter (`conversion/impl/attention.py`) has no parameter for either.  So a causal transformer, such as CLIP's text encoder
written with scaled_dot_product_attention, compiles without a word and lets every token see the ones after it.

Steps: a graph of one causal attention, and one of an attention with a mask, through the installed pass; run the result and
compare.  This needs no GPU (importing torch_tensorrt does, so there the pass's file is imported without its package).
Where there is a GPU with TensorRT, a causal module also goes through torch_tensorrt.dynamo.compile.

Expected: masks and is_causal are kept, or the pass leaves such a node alone.
(is_causal is honoured from pull request 2780 on, 2.4; masks since the pass was replaced by a decomposition, pull request 3296.)

Our way round it: attention is an op of our own and never becomes scaled_dot_product_attention; its converter builds the
mask itself (clip_ttrt/ops.py; clip_ttrt/converters.py, native_attention).
"""
import importlib
import importlib.util
import operator
import sys
import types
from pathlib import Path
from typing import Callable

import torch
import torch.nn.functional as F
from torch import fx, nn

from clip_ttrt import backends
from experiments.bugs.finding import CannotRun, Finding, show
from experiments.bugs.stock import compile_stock

PASSES = "torch_tensorrt.dynamo.lowering.passes"


def load_pass() -> Callable:
    """The installed pass; without a GPU from its file, between empty stand-ins for the packages around it."""
    package = importlib.util.find_spec("torch_tensorrt")
    if package is None:
        raise CannotRun("torch_tensorrt is not installed")
    name = f"{PASSES}.lower_scaled_dot_product_attention"
    if torch.cuda.is_available():
        return importlib.import_module(name).lower_scaled_dot_product_attention
    parents = [PASSES.rsplit(".", up)[0] if up else PASSES for up in (3, 2, 1, 0)]
    before = set(sys.modules)
    try:
        for parent in parents:
            stand_in = types.ModuleType(parent)
            stand_in.__path__ = [str(Path(package.submodule_search_locations[0], *parent.split(".")[1:]))]
            sys.modules[parent] = stand_in
        return importlib.import_module(name).lower_scaled_dot_product_attention
    finally:
        for module in set(sys.modules) - before:
            if module.split(".")[0] == "torch_tensorrt":
                del sys.modules[module]


def attention_graph(masked: bool) -> fx.GraphModule:
    """What torch.export makes of an attention in float32 on a GPU: causal, or with a mask as fourth input."""
    graph = fx.Graph()
    query, key, value = (graph.placeholder(name) for name in ("query", "key", "value"))
    mask = graph.placeholder("mask") if masked else None
    outputs = graph.call_function(torch.ops.aten._scaled_dot_product_efficient_attention.default, (query, key, value, mask, False, 0.0, not masked))
    graph.output(graph.call_function(operator.getitem, (outputs, 0)))
    return fx.GraphModule(nn.Module(), graph)


class Causal(nn.Module):
    """Causal self-attention of one head: [B, T, 64] -> [B, T, 64]."""

    def __init__(self):
        super().__init__()
        self.qkv = nn.Linear(64, 192)

    def forward(self, x):
        query, key, value = (part.unsqueeze(1) for part in self.qkv(x).chunk(3, dim=-1))
        return F.scaled_dot_product_attention(query, key, value, is_causal=True).squeeze(1)


def reproduce() -> Finding:
    torch.manual_seed(0)
    lower = load_pass()
    x = torch.randn(2, 3, 16, 64)
    mask = torch.zeros(2, 3, 16, 16).masked_fill_(torch.ones(16, 16).triu(1).bool(), float("-inf"))
    expected = F.scaled_dot_product_attention(x, x, x, is_causal=True)
    said, seen = [], False
    for masked, inputs in ((False, (x, x, x)), (True, (x, x, x, mask))):
        lowered = lower(attention_graph(masked), inputs)
        [node] = [node for node in lowered.graph.nodes if node.target is F.scaled_dot_product_attention]
        error = (lowered(*inputs) - expected).abs().max().item()
        seen |= error > 1e-3
        said.append(f"{'mask' if masked else 'is_causal'}: scaled_dot_product_attention with {len(node.args)} inputs and options {dict(node.kwargs)}, largest error {error:.2f}")
        print(said[-1], flush=True)
    if torch.cuda.is_available() and not backends.missing_packages():
        module, rows = Causal().eval().requires_grad_(False).cuda(), torch.randn(2, 16, 64, device="cuda")
        error = (compile_stock(module, rows)(rows) - module(rows)).abs().max().item()
        seen |= not error < 1e-2
        said.append(f"engine of a causal attention in float32: largest error {error:.2f}")
        print(said[-1], flush=True)
    return Finding(seen, "the mask and is_causal are kept, errors below 1e-3", "; ".join(said))


if __name__ == "__main__":
    sys.exit(show(__doc__, reproduce))
