"""Encoder -> exported graph -> a graph of few, batch-free operations that every backend reads.

`torch.export` decomposes linear layers and layer norms and computes views from the batch size.
Torch-TensorRT 2.2 has no converter for a symbolic size, so one such view splits the engine.
The passes below put the layers back together, leave -1 where a batch size was, and let
activations flow as rows [B·T, W], after which the graph holds the operations in `OPERATIONS` and
no sizes at all; anything else is an error that names it.
"""
import inspect
import operator
import sys
from typing import Callable

import torch
from torch import fx, nn
from torch.export import Dim, export

from clip_ttrt import ops
from clip_ttrt.options import LARGEST_BATCH

aten = torch.ops.aten

# What a lowered graph may hold: what both backends implement.
OPERATIONS = frozenset({
    aten.view.default, aten.select.int, aten.embedding.default, aten.linear.default, aten.layer_norm.default,
    aten.add.Tensor, aten.mul.Tensor, aten.sigmoid.default,
    ops.attention_rows, ops.extract_patches, ops.prepend_class_token, ops.pool_end_of_text,
})

# What treats every row of [B, T, W] alike, or as `attention` has a form of its own for rows.
ROWWISE = frozenset({aten.linear.default, aten.layer_norm.default, aten.add.Tensor, aten.mul.Tensor, aten.sigmoid.default, ops.attention})

NO_END = torch.iinfo(torch.int64).max  # how an exported slice writes "to the end"


def find_nodes(module: fx.GraphModule, target) -> list[fx.Node]:
    """The call_function nodes of one target, in graph order."""
    return [node for node in module.graph.nodes if node.op == "call_function" and node.target is target]


class LoweringError(RuntimeError):
    """The exported graph holds operations that no backend implements; the message names them."""


def can_export() -> bool:
    """Whether torch.export runs on this Python: that of PyTorch 2.2 needs one older than 3.12."""
    return sys.version_info < (3, 12) or not torch.__version__.startswith("2.2.")


def capture(encoder: nn.Module, example: torch.Tensor) -> fx.GraphModule:
    """Export an encoder with a dynamic batch.

    example: one input with batch >= 2, on the device to export for.  Returns a graph module that
    maps one tensor to one tensor.
    """
    [name] = inspect.signature(encoder.forward).parameters
    batch = Dim("batch", min=1, max=LARGEST_BATCH)
    with torch.no_grad():
        exported = export(encoder, (example,), dynamic_shapes={name: {0: batch}}).module()
    # The exported module checks its inputs in a hook that cannot be traced, and wraps them in trees.
    graph = exported.graph
    graph.set_codegen(fx.graph.CodeGen())
    [output] = [node for node in graph.nodes if node.op == "output"]
    output.args = output.args[0]  # ((features,),) -> (features,)
    return fx.GraphModule(exported, graph)


def recompose_layer_norm(module: fx.GraphModule) -> int:
    """native_layer_norm, whose statistics inference never reads, becomes layer_norm."""
    count = 0
    for node in find_nodes(module, aten.native_layer_norm.default):
        normalised = [user for user in node.users if user.target is operator.getitem and user.args[1] == 0]
        if len(normalised) != len(node.users):
            continue
        with module.graph.inserting_before(node):
            new = module.graph.call_function(aten.layer_norm.default, node.args)
        for user in normalised:
            new.meta = dict(user.meta)
            user.replace_all_uses_with(new)
        count += 1
    return count


def recompose_linear(module: fx.GraphModule) -> int:
    """view, addmm or mm with a transposed weight, view: becomes linear on the unflattened input."""
    count = 0
    for node in [*find_nodes(module, aten.addmm.default), *find_nodes(module, aten.mm.default)]:
        *bias, rows, transposed = node.args
        if transposed.target is not aten.t.default:
            continue
        source, results = rows, [node]
        if rows.target is aten.view.default:
            source = rows.args[0]
            leading = source.meta["val"].shape[:-1]
            if any(user.target is not aten.view.default or user.meta["val"].shape[:-1] != leading for user in node.users):
                continue
            results = list(node.users)
        with module.graph.inserting_before(results[0]):
            new = module.graph.call_function(aten.linear.default, (source, transposed.args[0], *bias))
        new.meta = dict(results[0].meta)
        for result in results:
            result.replace_all_uses_with(new)
        count += 1
    return count


def remove_whole_slices(module: fx.GraphModule) -> int:
    """A slice that takes everything is its input."""
    count = 0
    for node in find_nodes(module, aten.slice.Tensor):
        source, dim, start, end = node.args[:4]
        size = getattr_nested(module, source.target).shape[dim] if source.op == "get_attr" else source.meta["val"].shape[dim]
        if start == 0 and (end == NO_END or (isinstance(size, int) and end >= size)):
            node.replace_all_uses_with(source)
            count += 1
    return count


def fold_parameter_slices(module: fx.GraphModule) -> int:
    """A slice of a parameter (positions of a shorter text) becomes a parameter of that size."""
    count = 0
    for node in find_nodes(module, aten.slice.Tensor):
        if node.args[0].op != "get_attr":
            continue
        name = f"folded_{node.name}"
        value = aten.slice.Tensor(getattr_nested(module, node.args[0].target).detach(), *node.args[1:]).clone()
        module.register_parameter(name, nn.Parameter(value, requires_grad=False))
        with module.graph.inserting_before(node):
            new = module.graph.get_attr(name)
        new.meta = dict(node.meta)
        node.replace_all_uses_with(new)
        count += 1
    return count


def forget_batch_size(module: fx.GraphModule) -> int:
    """A view to [batch, ...] becomes a view to [-1, ...], so that no size is computed."""
    count = 0
    for node in find_nodes(module, aten.view.default):
        source, shape = node.args
        symbolic = [size for size in shape if isinstance(size, fx.Node)]
        if len(symbolic) == 1:
            node.args = (source, [-1 if isinstance(size, fx.Node) else size for size in shape])
            count += 1
    return count


def rank(node: fx.Node) -> int:
    """How many dimensions a tensor-valued node has."""
    return node.meta["val"].dim()


def flatten_rows(module: fx.GraphModule) -> int:
    """Let row-wise operations on [B, T, W] work on rows [B·T, W].

    TensorRT flattens three dimensions for every matrix product and unfolds them after it: copies
    before and after a plugin, and slow index arithmetic in its fused elementwise kernels where
    the batch is dynamic.
    """
    flat: dict[fx.Node, fx.Node] = {}

    def rows(node: fx.Node) -> fx.Node:
        if node not in flat:
            with module.graph.inserting_after(node):
                flat[node] = module.graph.call_function(aten.view.default, (node, [-1, node.meta["val"].shape[-1]]))
        return flat[node]

    rewritten = []
    for node in list(module.graph.nodes):
        if node.op != "call_function" or node.target not in ROWWISE or rank(node) != 3:
            continue
        elementwise = node.target in (aten.add.Tensor, aten.mul.Tensor)
        activations = [arg for arg in (node.args if elementwise else node.args[:1]) if isinstance(arg, fx.Node)]
        if any(arg.op == "get_attr" or rank(arg) != 3 for arg in activations):
            continue  # such as positions, which differ from row to row
        inputs = {arg: rows(arg) for arg in activations}
        args = tuple(inputs.get(arg, arg) if isinstance(arg, fx.Node) else arg for arg in node.args)
        with module.graph.inserting_before(node):
            if node.target is ops.attention:
                flat[node] = module.graph.call_function(ops.attention_rows, (args[0], node.meta["val"].shape[1], *args[1:]))
            else:
                flat[node] = module.graph.call_function(node.target, args)
        rewritten.append(node)
    for node in rewritten:
        # For what still wants three dimensions; unused where all users work on rows.
        with module.graph.inserting_after(flat[node]):
            view = module.graph.call_function(aten.view.default, (flat[node], [-1, *node.meta["val"].shape[1:]]))
        view.meta = dict(node.meta)
        node.replace_all_uses_with(view)
    return len(rewritten)


PASSES: tuple[Callable[[fx.GraphModule], int], ...] = (
    recompose_layer_norm,
    recompose_linear,
    remove_whole_slices,
    fold_parameter_slices,
    forget_batch_size,
    flatten_rows,
)


def getattr_nested(module: nn.Module, target: str) -> torch.Tensor:
    """The parameter or buffer that a get_attr node names."""
    *path, name = target.split(".")
    for part in path:
        module = getattr(module, part)
    return getattr(module, name)


def lower(module: fx.GraphModule) -> dict[str, int]:
    """Run all passes on an exported graph, in place; returns how often each one rewrote.

    Raises LoweringError, naming them, where operations remain that no backend implements.
    """
    counts = {}
    for rewrite in PASSES:
        counts[rewrite.__name__] = rewrite(module)
        module.graph.eliminate_dead_code()
    left = sorted({str(node.target) for node in module.graph.nodes
                   if node.op in ("call_function", "call_method", "call_module") and node.target not in OPERATIONS})
    if left:
        raise LoweringError(f"no backend implements {', '.join(left)}; the encoder cannot become one piece")
    module.graph.lint()
    module.recompile()
    return counts
