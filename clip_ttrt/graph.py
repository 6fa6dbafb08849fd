"""Encoder -> exported graph -> a graph of our own operations (`ops.py`), as a backend reads it.

`capture` exports.  What follows are passes, which rewrite a graph in place and yield every node
rewritten: `lower` for every backend, those of `FUSE`, exact in real arithmetic, and `tuning` for
the plugins, `quantizing` and, for the plugins, `fuse_quantization` in fp8, `inline_references` for
TorchScript.  `run` is their one runner.
"""
import functools
import inspect
import math
import operator
from typing import Any, Callable, Iterable, Iterator, Mapping, Optional, Sequence

import torch
from torch import fx, nn
from torch.export import Dim, export

from clip_ttrt import linear, ops
from clip_ttrt.options import LARGEST_BATCH, BatchRange

aten = torch.ops.aten
Pass = Callable[[fx.GraphModule], Iterator[fx.Node]]
MOVES = (ops.select_token, ops.pool_end_of_text, ops.split_tokens)  # rows, and computes nothing
QUANTIZE = (ops.fused_layer_norm, ops.residual_layer_norm, ops.bias_gelu,
            ops.fused_attention, ops.embed_image)  # with an out_scale
THEIRS = (aten.relu.default, aten.avg_pool2d.default)  # which Torch-TensorRT converts, as they are


class GraphError(RuntimeError):
    """An encoder cannot become one graph of our operations; the message names the obstacle."""


def capture(encoder: nn.Module, example: torch.Tensor, shortest: int = 0) -> fx.GraphModule:
    """Export an encoder with a dynamic batch, and a dynamic length of texts from `shortest` on.

    example: one input with batch >= 2, on the device to export for.  Returns a graph module that
    maps one tensor to one tensor.
    """
    [name] = inspect.signature(encoder.forward).parameters
    sizes, longest = {0: Dim("batch", min=1, max=LARGEST_BATCH)}, example.shape[-1]
    if 0 < shortest < longest:
        sizes[1] = Dim("length", min=shortest, max=longest)
    with torch.no_grad():
        program = export(encoder, (example,), dynamic_shapes={name: sizes})
    exported = program.module(check_guards=False)
    # The exported module wraps its inputs and outputs in trees.
    graph = exported.graph
    graph.set_codegen(fx.graph.CodeGen())
    [output] = graph.find_nodes(op="output")
    output.args = output.args[0]  # ((features,),) -> (features,)
    graph.eliminate_dead_code()
    return fx.GraphModule(exported, graph)


def run(module: fx.GraphModule, passes: Iterable[Pass]) -> dict[str, int]:
    """Run passes on a graph, in place; returns how often each one rewrote.

    Raises GraphError where one rewrote nothing: who asks for a pass counts on it.
    """
    counts = {}
    for rewrite in passes:
        counts[rewrite.__name__] = sum(1 for _ in rewrite(module))
        if counts[rewrite.__name__] == 0:
            raise GraphError(f"{rewrite.__name__} found nothing to rewrite")
        module.graph.eliminate_dead_code()
    module.graph.lint()
    module.recompile()
    return counts


def calls(module: fx.GraphModule, op: Callable) -> list[fx.Node]:
    """The calls of one operation, in graph order."""
    return [node for node in module.graph.nodes if node.target is op]


def parameter(module: nn.Module, node: fx.Node) -> torch.Tensor:
    """The parameter or buffer that a get_attr node names."""
    return operator.attrgetter(node.target)(module)


def add_parameter(module: fx.GraphModule, name: str, value: torch.Tensor) -> fx.Node:
    """Register a parameter and return its node, at the graph's beginning."""
    value = value.detach().clone()
    module.register_parameter(name, nn.Parameter(value, requires_grad=False))
    with module.graph.inserting_before(next(iter(module.graph.nodes))):
        node = module.graph.get_attr(name)
    node.meta["val"] = value
    return node


def insert(module: fx.GraphModule, before: fx.Node, op: Callable, args: tuple, val: Any) -> fx.Node:
    """Insert a call; val: of its result's shape and dtype."""
    with module.graph.inserting_before(before):
        node = module.graph.call_function(op, args)
    node.meta["val"] = val
    return node


def in_ours(node: fx.Node) -> Optional[tuple[Callable, tuple]]:
    """Our operation, or Torch-TensorRT's, for a call of PyTorch's, and its arguments, if any."""
    if node.kwargs:
        return None
    match (node.target, *node.args):
        case (aten.linear.default, x, weight, *bias):
            return ops.linear, (x, weight, bias[0] if bias else None)
        case (aten.layer_norm.default, x, [_], fx.Node() as scale, fx.Node() as shift, *rest):
            return ops.layer_norm, (x, scale, shift, rest[0] if rest else 1e-5)
        case (aten.embedding.default, weight, tokens):
            return ops.embedding, (weight, tokens)
        case (aten.select.int, x, 1, index) if x.meta["val"].dim() == 3:
            return ops.select_token, (x, index)
        case (aten.add.Tensor | aten.add_.Tensor, fx.Node() as a, fx.Node() as b):
            return ops.add, (a, b)
        case (aten.conv2d.default, x, weight, *more):
            more += [None, [1, 1], [0, 0], [1, 1], 1][len(more):]  # the last: groups
            return aten.convolution.default, (x, weight, *more[:4], False, [0, 0], more[4])
        case (aten.relu_.default, x):
            return aten.relu.default, (x,)
    return None


def lower(module: fx.GraphModule) -> Iterator[fx.Node]:
    """PyTorch's operations become ours.

    Raises GraphError, naming it, for an operation that is none of ours.
    """
    for node in list(module.graph.nodes):
        if not node.op.startswith("call_") or node.target in (*ops.REFERENCES, *THEIRS):
            continue
        if found := in_ours(node):
            node.target, node.args = found
        else:
            raise GraphError(f"no backend implements {node.target} with {node.args} and "
                             f"{node.kwargs}; the encoder cannot become one piece")
        yield node


def inline_references(module: fx.GraphModule) -> Iterator[fx.Node]:
    """Our operations become their PyTorch references, so that a module needs no library of ours."""
    for node in module.graph.nodes:
        if node.target in ops.REFERENCES:
            node.target = ops.REFERENCES[node.target]
            yield node


def is_biased_linear(node: fx.Node) -> bool:
    return node.target is ops.linear and node.args[2] is not None


def gives_bias(node: fx.Node) -> bool:
    """Whether a node is a linear layer whose bias its one reader can take over."""
    return is_biased_linear(node) and len(node.users) == 1


def without_bias(layer: fx.Node) -> fx.Node:
    """Take a linear layer's bias away; returns the bias."""
    bias = layer.args[2]
    layer.args = (*layer.args[:2], None)
    return bias


def readers(node: fx.Node) -> Iterator[fx.Node]:
    """What computes with a node's rows, or some."""
    for user in node.users:
        yield from readers(user) if user.target in MOVES and user.args[0] is node else [user]


def fuse_attention(module: fx.GraphModule) -> Iterator[fx.Node]:
    """attention becomes the plugin's, and the bias of its projection leaves the matrix product.

    A constant added to all keys adds the same to every score of a row, which softmax ignores; one
    added to all values is added to the output, whose projection takes it into its own bias; the
    queries' goes to the attention kernel.
    """
    for node in calls(module, ops.attention):
        projection, heads, causal = node.args
        outputs = list(readers(node))
        if not (gives_bias(projection) and all(map(is_biased_linear, outputs))):
            continue
        query, _, value = parameter(module, without_bias(projection)).chunk(3)
        for output in outputs:
            weight, bias = (parameter(module, arg) for arg in output.args[1:])
            folded = (bias.double() + weight.double() @ value.double()).to(bias.dtype)
            folded = add_parameter(module, f"{output.name}_folded_bias", folded)
            output.args = (*output.args[:2], folded)
        query_bias = add_parameter(module, f"{node.name}_query_bias", query)
        node.target, node.args = ops.fused_attention, (projection, heads, causal, query_bias)
        yield node


def fuse_bias_gelu(module: fx.GraphModule) -> Iterator[fx.Node]:
    """linear with bias, then gelu: linear without bias, then bias_gelu."""
    for node in calls(module, ops.gelu):
        x, approximate = node.args
        if gives_bias(x) and not is_wide(x):
            node.target, node.args = ops.bias_gelu, (x, without_bias(x), approximate)
            yield node


def fuse_residual_layer_norm(module: fx.GraphModule) -> Iterator[fx.Node]:
    """x + linear with bias, then layer norm: linear without, then one that gives both results."""
    for norm in calls(module, ops.layer_norm):
        total = norm.args[0]
        if total.target is not ops.add:
            continue
        x, delta = total.args
        if gives_bias(delta):
            args = (x, delta, without_bias(delta), *norm.args[1:])
            values = (total.meta["val"], norm.meta["val"])
            both = insert(module, total, ops.residual_layer_norm, args, values)
            total.target, total.args = operator.getitem, (both, 0)
            norm.target, norm.args = operator.getitem, (both, 1)
            yield norm


def only_user(node: Optional[fx.Node], op: Callable) -> Optional[fx.Node]:
    """The one node that reads a node, if it is a call of the operation."""
    users = list(node.users) if node is not None else []
    return users[0] if len(users) == 1 and users[0].target is op else None


def fuse_image_embedding(module: fx.GraphModule) -> Iterator[fx.Node]:
    """From images to the first block's layer norm: two operations around the projection."""
    for patches in calls(module, ops.extract_patches):
        projection = only_user(patches, ops.linear)
        prepend = only_user(projection, ops.prepend_class_token)
        positioned = only_user(prepend, ops.add)
        norm_pre = only_user(positioned, ops.layer_norm)
        norms = [user for user in (norm_pre.users if norm_pre else ())
                 if user.target is ops.layer_norm]
        if len(norms) != 1 or projection.args[2] is not None:
            continue
        images, size = patches.args
        images = images.args[0] if images.target is ops.cast else images
        patches.target = ops.extract_patch_rows
        patches.args = (images, size, patches.meta["val"].dtype)
        for node in (patches, projection):
            node.meta["val"] = node.meta["val"].flatten(0, 1)
        args = (projection, prepend.args[1], positioned.args[1],
                *norm_pre.args[1:], *norms[0].args[1:])
        rows, tokens = norm_pre.meta["val"].flatten(0, 1), norm_pre.meta["val"].shape[1]
        both = insert(module, norm_pre, ops.embed_image, args, (rows, rows))
        for index, norm in enumerate((norm_pre, *norms)):
            out = insert(module, norm_pre, operator.getitem, (both, index), rows)
            norm.target, norm.args = ops.split_tokens, (out, tokens)
        yield patches


def fuse_rest(module: fx.GraphModule) -> Iterator[fx.Node]:
    """What layer norms are left, and linear of sizes that the library has, become plugins."""
    for node in calls(module, ops.layer_norm):
        node.target = ops.fused_layer_norm
        yield node
    for node in calls(module, ops.linear):
        weight = node.args[1]
        if (weight.op == "get_attr" and linear.takes(*parameter(module, weight).shape)
                and not is_wide(node)):
            node.target = ops.fused_linear
            yield node


# Encoder -> its fusing passes, in order, where it is a transformer.
BLOCKS: tuple[Pass, ...] = (fuse_attention, fuse_bias_gelu, fuse_residual_layer_norm)
FUSE = {"image": (*BLOCKS, fuse_image_embedding, fuse_rest), "text": (*BLOCKS, fuse_rest)}


def block_weight(node: fx.Node) -> Optional[str]:
    """The weight's name where a node is a linear layer of a block, such as blocks.3.qkv.weight."""
    if node.target not in (ops.linear, ops.fused_linear):
        return None
    name = str(node.args[1].target)
    return name if name.startswith("blocks.") else None


def is_wide(layer: fx.Node) -> bool:
    """Whether a linear layer of a block is one of those between casts, in fp32."""
    return bool(block_weight(layer)) and ops.cast in {
        layer.args[0].target, *(user.target for user in layer.users)}


def weight_in_e4m3(weight: torch.Tensor) -> tuple[torch.Tensor, float]:
    """A weight in E4M3, and its scale, by which its largest magnitude becomes 448."""
    scale = weight.abs().max().item() / ops.E4M3_MAX or 1.0
    return ops.to_e4m3(weight, scale), scale


def quantizing(scales: Mapping[str, float]) -> Pass:
    """The pass that quantises linear layers of blocks: weight's name -> scale of the input."""
    def quantize(module: fx.GraphModule) -> Iterator[fx.Node]:
        for node in list(module.graph.nodes):
            if (name := block_weight(node)) in scales:
                x, weight, bias = node.args[:3]
                value, weight_scale = weight_in_e4m3(parameter(module, weight))
                weight = add_parameter(module, f"{node.name}_e4m3", value)
                node.target = ops.quantized_linear
                node.args = (x, weight, bias, scales[name], weight_scale)
                yield node

    return quantize


def fuse_quantization(module: fx.GraphModule) -> Iterator[fx.Node]:
    """What feeds quantized_linear quantises for it, so that no kernel is there only to quantise;
    GraphError where it has no out_scale, or something else reads it, too."""
    for layer in calls(module, ops.quantized_linear):
        x, weight, bias, x_scale, weight_scale = layer.args
        while x.target in MOVES:
            x = x.args[0]
        # Of two results the second is the layer norm, the first a sum that stays fp16.
        source = x.args[0] if (x.target, *x.args[1:]) == (operator.getitem, 1) else x
        if source.target is ops.attention:  # TensorRT's, behind which a layer quantises
            continue
        if source.target not in QUANTIZE or list(readers(x)) != [layer]:
            raise GraphError(f"{source} cannot quantise for {list(readers(x))}")
        source.args += (x_scale,)
        layer.target = ops.fused_quantized_linear
        layer.args = (layer.args[0], weight, bias, x_scale * weight_scale)
        yield layer


def rows_of_a_sample(layer: fx.Node, length: int) -> int:
    """How many rows a linear layer has in a batch of one, of a text so long."""
    rows = math.prod(layer.meta["val"].shape[:-1]).node.expr
    batch = layer.graph.find_nodes(op="placeholder")[0].meta["val"].shape[0].node.expr
    return int(rows.subs(dict.fromkeys(rows.free_symbols, length) | {batch: 1}))


def tuning(batch: BatchRange, lengths: Sequence[int]) -> Pass:
    """The pass that measures the plugin's linear layers on this GPU, for batches and lengths."""
    batches = linear.measured_batches(batch)

    @functools.cache  # one measurement serves all layers of the same sizes
    def table(rows: tuple, weight_shape: tuple[int, int], bias: bool, quantized: bool) -> bytes:
        rows = sorted({one * size for one in rows for size in batches})
        return linear.tune(rows, weight_shape, bias, quantized)

    def tune(module: fx.GraphModule) -> Iterator[fx.Node]:
        for node in calls(module, ops.fused_linear) + calls(module, ops.fused_quantized_linear):
            _, weight, bias, *scale = node.args
            shape = tuple(parameter(module, weight).shape)
            rows = tuple(rows_of_a_sample(node, length) for length in lengths)
            found = table(rows, shape, bias is not None, bool(scale))
            node.args += (linear.with_scale(found, *(scale or [0.0])).hex(),)
            yield node

    return tune
