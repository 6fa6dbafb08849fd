"""The TorchScript backend: a lowered graph with the references of our ops in their place, traced.

For machines without TensorRT, on the CPU or a GPU.
"""
import torch
from torch import fx

from clip_ttrt import deprecations, ops


def inline_references(module: fx.GraphModule) -> int:
    """Replace each op of ours by its PyTorch reference, in place, so that the module needs no library of ours; returns how many."""
    count = 0
    for node in module.graph.nodes:
        if node.op == "call_function" and node.target in ops.REFERENCES:
            node.target = ops.REFERENCES[node.target]
            count += 1
    module.recompile()
    return count


def build(module: fx.GraphModule, example: torch.Tensor) -> torch.jit.ScriptModule:
    """Trace a lowered graph into TorchScript that accepts any batch.

    example: one input, batch >= 2, on the device and in the dtype to run in.
    """
    inline_references(module)
    with torch.no_grad(), deprecations.hidden():
        return torch.jit.trace(module, (example,), check_trace=False)
