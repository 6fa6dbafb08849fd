"""Encoder -> exported graph -> a graph of our own operations (`ops.py`), as a backend reads it.

`capture` exports; `lower` maps what PyTorch's operations are left to ours, for every backend;
`fuse` puts the plugins' operations in the place of several, and is exact in real arithmetic.  On
the CPU a graph runs through the references at any stage.  One runner makes all passes and counts;
what cannot be rewritten is an error that names it.
"""
import inspect
import operator
from typing import Callable, Iterable, Optional

import torch
from torch import fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.export import Dim, export

from clip_ttrt import linear, ops
from clip_ttrt.options import LARGEST_BATCH, BatchRange

aten = torch.ops.aten

NO_END = torch.iinfo(torch.int64).max  # how an exported slice writes "to the end"


class GraphError(RuntimeError):
    """An encoder cannot become one graph of our operations; the message names what stands in the way."""


def capture(encoder: nn.Module, example: torch.Tensor) -> fx.GraphModule:
    """Export an encoder with a dynamic batch.

    example: one input with batch >= 2, on the device to export for.  Returns a graph module that
    maps one tensor to one tensor.
    """
    [name] = inspect.signature(encoder.forward).parameters
    batch = Dim("batch", min=1, max=LARGEST_BATCH)
    with torch.no_grad():
        program = export(encoder, (example,), dynamic_shapes={name: {0: batch}})
    exported = program.module(check_guards=False)
    # The exported module wraps its inputs and outputs in trees.
    graph = exported.graph
    graph.set_codegen(fx.graph.CodeGen())
    [output] = [node for node in graph.nodes if node.op == "output"]
    output.args = output.args[0]  # ((features,),) -> (features,)
    return fx.GraphModule(exported, graph)


Pass = Callable[[fx.GraphModule], int]


def run(module: fx.GraphModule, passes: Iterable[Pass], needed: Iterable[Pass] = ()) -> dict[str, int]:
    """Run passes on a graph, in place; returns how often each one rewrote.

    Raises GraphError where one of the needed ones rewrote nothing.
    """
    counts = {}
    for rewrite in passes:
        counts[rewrite.__name__] = rewrite(module)
        module.graph.eliminate_dead_code()
    module.graph.lint()
    module.recompile()
    idle = [rewrite.__name__ for rewrite in needed if not counts[rewrite.__name__]]
    if idle:
        raise GraphError(f"the plan counts on {', '.join(idle)}, which found nothing to rewrite")
    return counts


def find_nodes(module: fx.GraphModule, target) -> list[fx.Node]:
    """The call_function nodes of one target, in graph order."""
    return [node for node in module.graph.nodes if node.op == "call_function" and node.target is target]


def parameter(module: nn.Module, node: fx.Node) -> torch.Tensor:
    """The parameter or buffer that a get_attr node names."""
    *path, name = node.target.split(".")
    for part in path:
        module = getattr(module, part)
    return getattr(module, name)


def add_parameter(module: fx.GraphModule, name: str, value: torch.Tensor) -> fx.Node:
    """Register a parameter and return its node, at the graph's beginning."""
    value = value.detach().clone()
    module.register_parameter(name, nn.Parameter(value, requires_grad=False))
    with module.graph.inserting_before(next(iter(module.graph.nodes))):
        node = module.graph.get_attr(name)
    node.meta["val"] = value
    return node


def call(module: fx.GraphModule, before: fx.Node, target, args: tuple, like=None) -> fx.Node:
    """Insert a call; like: the node, or value of `meta`, whose shape and dtype the result has."""
    with module.graph.inserting_before(before):
        node = module.graph.call_function(target, args)
    if isinstance(like, fx.Node):
        node.meta = dict(like.meta)
    elif like is not None:
        node.meta["val"] = like
    return node


def value_of(node: fx.Node) -> torch.Tensor:
    """A node's fake tensor, or a parameter's own."""
    return node.meta["val"]


# Lowering


def fold_parameter_slices(module: fx.GraphModule) -> int:
    """A slice of a parameter (positions of a shorter text) becomes a parameter of that size."""
    count = 0
    for node in find_nodes(module, aten.slice.Tensor):
        given = (*node.args, *(None, 0, None, None, 1)[len(node.args):])
        source, dim, start, end, step = given
        if node.kwargs or step != 1 or source.op != "get_attr":
            raise GraphError(f"{node.target}{node.args} with {node.kwargs}: only a parameter's slice of step 1 can be folded")
        value = parameter(module, source)
        if (start or 0) == 0 and (end is None or end >= value.shape[dim]):
            node.replace_all_uses_with(source)
        else:
            folded = aten.slice.Tensor(value.detach(), dim, start, end)
            node.replace_all_uses_with(add_parameter(module, f"folded_{node.name}", folded))
        count += 1
    return count


def _layer_norm(x, shape, scale=None, shift=None, epsilon=1e-5, cudnn_enable=True):
    if len(shape) != 1 or scale is None or shift is None:
        return None
    return x, scale, shift, epsilon


def _select(x, axis, index):
    return (x, index) if axis == 1 and value_of(x).dim() == 3 else None


def _add(a, b):
    return (a, b) if isinstance(a, fx.Node) and isinstance(b, fx.Node) else None


# PyTorch's operation -> ours, and its arguments as ours takes them (None: not of this form).
MAPPED = {
    aten.linear.default: (ops.linear, lambda x, weight, bias=None: (x, weight, bias)),
    aten.layer_norm.default: (ops.layer_norm, _layer_norm),
    aten.embedding.default: (ops.embedding, lambda weight, tokens: (weight, tokens)),
    aten.select.int: (ops.select_token, _select),
    aten.add.Tensor: (ops.add, _add),
}


def map_operations(module: fx.GraphModule) -> int:
    """PyTorch's operations become ours, which alone have converters."""
    count = 0
    for node in list(module.graph.nodes):
        if node.op != "call_function" or node.target not in MAPPED:
            continue
        target, arrange = MAPPED[node.target]
        try:
            args = arrange(*node.args, **node.kwargs)
        except TypeError:  # an argument that ours does not have
            args = None
        if args is None:
            raise GraphError(f"{node.target} with {node.args} and {node.kwargs} has no form among our operations")
        node.replace_all_uses_with(call(module, node, target, args, like=node))
        count += 1
    return count


LOWER: tuple[Pass, ...] = (fold_parameter_slices, map_operations)


def lower(module: fx.GraphModule) -> dict[str, int]:
    """Run the lowering passes on an exported graph, in place; returns how often each one rewrote.

    Raises GraphError, naming them, where operations remain that no backend implements.
    """
    counts = run(module, LOWER, needed=(map_operations,))
    left = sorted({str(node.target) for node in module.graph.nodes
                   if node.op.startswith("call_") and node.target not in ops.REFERENCES})
    if left:
        raise GraphError(f"no backend implements {', '.join(left)}; the encoder cannot become one piece")
    return counts


# Fusing


def is_biased_linear(node: object) -> bool:
    return isinstance(node, fx.Node) and node.target is ops.linear and node.args[2] is not None


def readers(node: fx.Node) -> Optional[list[fx.Node]]:
    """The linear layers with bias that read a node's rows, directly or after a choice of rows; None where anything else does."""
    found: list[fx.Node] = []
    for user in node.users:
        if is_biased_linear(user) and user.args[0] is node:
            found.append(user)
        elif user.target in (ops.select_token, ops.pool_end_of_text) and user.args[0] is node:
            below = readers(user)
            if below is None:
                return None
            found += below
        else:
            return None
    return found


def without_bias(layer: fx.Node) -> fx.Node:
    """Take a linear layer's bias away; returns the bias."""
    bias = layer.args[2]
    layer.args = (*layer.args[:2], None)
    return bias


def fuse_attention(module: fx.GraphModule) -> int:
    """attention becomes the plugin's, and the bias of its projection leaves the matrix product.

    A constant added to all keys adds the same to every score of a row, which softmax ignores; one
    added to all values is added to the output, whose projection takes it into its own bias; the
    queries' goes to the attention kernel.
    """
    count = 0
    for node in find_nodes(module, ops.attention):
        projection, heads, causal = node.args
        outputs, query_bias = readers(node), None
        if is_biased_linear(projection) and len(projection.users) == 1 and outputs:
            query, _, value = parameter(module, without_bias(projection)).chunk(3)
            for output in outputs:
                weight, bias = (parameter(module, arg) for arg in output.args[1:])
                folded = bias.double() + weight.double() @ value.double()
                name = f"{output.name}_folded_bias"
                output.args = (*output.args[:2], add_parameter(module, name, folded.to(bias.dtype)))
            query_bias = add_parameter(module, f"{node.name}_query_bias", query)
        args = (projection, heads, causal, query_bias)
        node.replace_all_uses_with(call(module, node, ops.fused_attention, args, like=node))
        count += 1
    return count


def fuse_bias_quick_gelu(module: fx.GraphModule) -> int:
    """linear with bias, then quick_gelu: linear without bias, then bias_quick_gelu."""
    count = 0
    for node in find_nodes(module, ops.quick_gelu):
        x = node.args[0]
        if is_biased_linear(x) and len(x.users) == 1:
            args = (x, without_bias(x))
            node.replace_all_uses_with(call(module, node, ops.bias_quick_gelu, args, like=node))
            count += 1
    return count


def fuse_residual_layer_norm(module: fx.GraphModule) -> int:
    """x + linear with bias, then layer norm: linear without bias, then residual_layer_norm, which also gives the sum."""
    count = 0
    for norm in find_nodes(module, ops.layer_norm):
        total = norm.args[0]
        if total.target is not ops.add or not is_biased_linear(total.args[1]) or len(total.args[1].users) != 1:
            continue
        x, delta = total.args
        args = (x, delta, without_bias(delta), *norm.args[1:])
        both = call(module, total, ops.residual_layer_norm, args, like=(value_of(total), value_of(norm)))
        total.replace_all_uses_with(call(module, total, operator.getitem, (both, 0), like=total))
        norm.replace_all_uses_with(call(module, total, operator.getitem, (both, 1), like=norm))
        count += 1
    return count


def only_user(node: Optional[fx.Node], target) -> Optional[fx.Node]:
    """The one node that reads a node, if it is a call of the target."""
    users = list(node.users) if node is not None else []
    return users[0] if len(users) == 1 and users[0].target is target else None


def fuse_image_embedding(module: fx.GraphModule) -> int:
    """Patches, class token, positions, layer norm, and the first block's: two operations around the projection."""
    count = 0
    for patches in find_nodes(module, ops.extract_patches):
        projection = only_user(patches, ops.linear)
        prepend = only_user(projection, ops.prepend_class_token)
        positioned = only_user(prepend, ops.add)
        norm_pre = only_user(positioned, ops.layer_norm)
        norms = [user for user in norm_pre.users if user.target is ops.layer_norm] if norm_pre else []
        if len(norms) != 1 or projection.args[2] is not None:
            continue
        [norm_1] = norms
        images, size = patches.args
        images = images.args[0] if images.target is ops.cast else images
        rows, tokens = value_of(patches), value_of(norm_pre).shape[1]
        rows = call(module, projection, ops.extract_patch_rows, (images, size, rows.dtype),
                    like=rows.flatten(0, 1))
        projected = value_of(projection).flatten(0, 1)
        projection = call(module, projection, ops.linear, (rows, *projection.args[1:]), like=projected)
        args = (projection, prepend.args[1], positioned.args[1], *norm_pre.args[1:], *norm_1.args[1:])
        flat = value_of(norm_pre).flatten(0, 1)
        both = call(module, norm_pre, ops.embed_image, args, like=(flat, flat))
        for index, norm in enumerate((norm_pre, norm_1)):
            out = call(module, norm_pre, operator.getitem, (both, index), like=flat)
            norm.replace_all_uses_with(call(module, norm_pre, ops.split_tokens, (out, tokens), like=norm))
        count += 1
    return count


def fuse_layer_norm(module: fx.GraphModule) -> int:
    """What layer norms are left become the plugin's."""
    norms = find_nodes(module, ops.layer_norm)
    for node in norms:
        node.target = ops.fused_layer_norm
    return len(norms)


def fuse_linear(module: fx.GraphModule) -> int:
    """linear of sizes that the library takes becomes the plugin's."""
    fused = [node for node in find_nodes(module, ops.linear)
             if node.args[1].op == "get_attr" and linear.takes(*parameter(module, node.args[1]).shape)]
    for node in fused:
        node.target = ops.fused_linear
    return len(fused)


FUSE: tuple[Pass, ...] = (
    fuse_attention,
    fuse_bias_quick_gelu,
    fuse_residual_layer_norm,
    fuse_image_embedding,
    fuse_layer_norm,
    fuse_linear,
)


def fuse(module: fx.GraphModule) -> dict[str, int]:
    """Run the fusing passes on a lowered encoder, in place; returns how often each one rewrote.

    Raises GraphError where a block's attention, activation, layer norms or linear layers were not
    found.
    """
    is_image = bool(find_nodes(module, ops.extract_patches))
    needed = [rewrite for rewrite in FUSE if rewrite is not fuse_layer_norm]
    return run(module, FUSE, needed if is_image else [rewrite for rewrite in needed if rewrite is not fuse_image_embedding])


# Tuning


class _RowCounter(fx.Interpreter):
    """Runs a graph on shapes alone, for a batch of one, and notes how many rows every linear layer has."""

    def __init__(self, module: fx.GraphModule):
        super().__init__(module)
        self.rows: dict[fx.Node, int] = {}

    def run_node(self, node: fx.Node):
        result = super().run_node(node)
        if node.target is ops.fused_linear:
            self.rows[node] = result.numel() // result.shape[-1]
        return result


def linear_rows(module: fx.GraphModule) -> dict[fx.Node, int]:
    """How many rows each of the plugin's linear layers has in a batch of one."""
    counter = _RowCounter(module)
    [example] = [value_of(node) for node in module.graph.nodes if node.op == "placeholder"]
    with FakeTensorMode(allow_non_fake_inputs=True):  # the parameters
        counter.run(torch.empty((1, *example.shape[1:]), dtype=example.dtype))
    return counter.rows


def tune(module: fx.GraphModule, batch: BatchRange) -> int:
    """Measure every linear layer of a fused graph on the current GPU for the row counts of a range; returns how many there are.

    One measurement serves all layers of the same sizes.
    """
    tables: dict[tuple, str] = {}
    layers = linear_rows(module)
    for node, rows in layers.items():
        x, weight, bias = node.args[:3]
        sizes = (rows, tuple(parameter(module, weight).shape), bias is not None)
        if sizes not in tables:
            counts = [rows * size for size in linear.measured_batches(batch)]
            tables[sizes] = linear.tune(counts, *sizes[1:]).hex()
        node.args = (x, weight, bias, tables[sizes])
    module.recompile()
    return len(layers)
