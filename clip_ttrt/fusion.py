"""A lowered graph for the plugins: what the library of fused kernels does in one piece becomes one operation.

Afterwards TensorRT is left with our plugins alone, but for embeddings and choices of rows.  Its compiler's own elementwise
kernels are slower, and much slower where the batch is dynamic; a bias before a plugin it fuses into nothing.  Every rewrite
is exact in real arithmetic, and on the CPU the graph still runs through the references.
"""
import operator
from typing import Callable, Iterator, Optional

import torch
from torch import fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from clip_ttrt import linear, ops
from clip_ttrt.lowering import find_nodes, getattr_nested

aten = torch.ops.aten


def add_parameter(module: fx.GraphModule, name: str, value: torch.Tensor) -> fx.Node:
    """Register a parameter and return its node, at the graph's beginning."""
    module.register_parameter(name, nn.Parameter(value.detach().clone(), requires_grad=False))
    with module.graph.inserting_before(next(iter(module.graph.nodes))):
        return module.graph.get_attr(name)


def is_biased_linear(node: object) -> bool:
    return isinstance(node, fx.Node) and node.target is aten.linear.default and len(node.args) == 3 and node.args[2] is not None


def readers(node: fx.Node) -> Optional[list[fx.Node]]:
    """The linear layers that read a node's rows, directly or after a choice of rows; None where anything else does."""
    found: list[fx.Node] = []
    for user in node.users:
        if is_biased_linear(user) and user.args[0] is node:
            found.append(user)
        elif user.target in (aten.view.default, aten.select.int, ops.pool_end_of_text) and user.args[0] is node:
            below = readers(user)
            if below is None:
                return None
            found += below
        else:
            return None
    return found


def fold_projection_biases(module: fx.GraphModule) -> int:
    """The bias of the query-key-value projection leaves the matrix product.

    A constant added to all keys adds the same to every score of a row, which softmax ignores; one added to all values is
    added to the output, whose projection takes it into its own bias; the queries' goes to the attention kernel.
    """
    count = 0
    for node in find_nodes(module, ops.attention_rows):
        projection, *sizes = node.args
        outputs = readers(node)
        if not is_biased_linear(projection) or len(projection.users) != 1 or len(sizes) != 3 or not outputs:
            continue
        query, _, value = getattr_nested(module, projection.args[2].target).chunk(3)
        for output in outputs:
            weight, bias = (getattr_nested(module, arg.target) for arg in output.args[1:])
            folded = bias.double() + weight.double() @ value.double()
            output.args = (*output.args[:2], add_parameter(module, f"{output.name}_folded_bias", folded.to(bias.dtype)))
        projection.args = projection.args[:2]
        node.args = (*node.args, add_parameter(module, f"{node.name}_query_bias", query))
        count += 1
    return count


def quick_gelus(module: fx.GraphModule) -> Iterator[tuple[fx.Node, fx.Node]]:
    """Each x·sigmoid(1.702·x) whose x nothing else reads: x, and the product."""
    for sigmoid in find_nodes(module, aten.sigmoid.default):
        scaled = sigmoid.args[0]
        if scaled.target is not aten.mul.Tensor or scaled.args[1] != ops.QUICK_GELU_SLOPE or len(scaled.users) != 1 or len(sigmoid.users) != 1:
            continue
        x, [product] = scaled.args[0], sigmoid.users
        if product.target is aten.mul.Tensor and set(product.args) == {x, sigmoid} and set(x.users) == {scaled, product}:
            yield x, product


def separate_mlps(module: fx.GraphModule) -> int:
    """Layer norm, linear with bias, QuickGELU: layer_norm_apart, the same linear, quick_gelu; no part of `fuse`.

    Between the two TensorRT is left with one product and what follows it, as `recipe.Recipe` says.
    """
    count = 0
    for x, product in quick_gelus(module):
        if not is_biased_linear(x):
            continue
        norm = x.args[0]
        if norm.target is not aten.layer_norm.default or only_user(norm, aten.linear.default) is not x:
            continue
        with module.graph.inserting_before(norm):
            norm.replace_all_uses_with(module.graph.call_function(ops.layer_norm_apart, (norm.args[0], *norm.args[2:5])))
        with module.graph.inserting_before(product):
            product.replace_all_uses_with(module.graph.call_function(ops.quick_gelu, (x,)))
        count += 1
    module.graph.eliminate_dead_code()
    module.recompile()
    return count


def is_read_by_a_choice(total: fx.Node) -> bool:
    """Whether rows are chosen from a node, each sample's class token or end of text."""
    return any(view.target is aten.view.default and any(user.target in (aten.select.int, ops.pool_end_of_text) for user in view.users)
               for view in total.users)


def cap_rows(module: fx.GraphModule) -> int:
    """row_capped behind what TensorRT's kernels for a range are slow at, as `recipe.Recipe` says; no part of `fuse`.

    Those are QuickGELU (where it is in pieces), the patches, and a sum from which rows are chosen too.
    """
    slow = [product for _, product in quick_gelus(module)] + find_nodes(module, ops.extract_patches)
    slow += [node for node in find_nodes(module, aten.add.Tensor) if is_biased_linear(node.args[1]) and is_read_by_a_choice(node)]
    for node in slow:
        with module.graph.inserting_after(node):
            capped = module.graph.call_function(ops.row_capped, (node,))
        node.replace_all_uses_with(capped, delete_user_cb=lambda user, capped=capped: user is not capped)
    module.recompile()
    return len(slow)


def fuse_bias_quick_gelu(module: fx.GraphModule) -> int:
    """linear with bias, then x·sigmoid(1.702·x): linear without bias, then bias_quick_gelu."""
    count = 0
    for x, product in quick_gelus(module):
        if not is_biased_linear(x):
            continue
        bias = x.args[2]
        x.args = x.args[:2]
        with module.graph.inserting_before(product):
            new = module.graph.call_function(ops.bias_quick_gelu, (x, bias))
        product.replace_all_uses_with(new)
        count += 1
    return count


def fuse_residual_layer_norm(module: fx.GraphModule) -> int:
    """x + linear with bias, then layer norm: linear without bias, then residual_layer_norm, which also gives the sum."""
    count = 0
    for norm in find_nodes(module, aten.layer_norm.default):
        total = norm.args[0]
        if total.target is not aten.add.Tensor or not is_biased_linear(total.args[1]) or len(total.args[1].users) != 1:
            continue
        x, linear = total.args
        bias = linear.args[2]
        linear.args = linear.args[:2]
        with module.graph.inserting_before(total):
            both = module.graph.call_function(ops.residual_layer_norm, (x, linear, bias, *norm.args[2:5]))
            sum_, normalised = (module.graph.call_function(operator.getitem, (both, index)) for index in range(2))
        total.replace_all_uses_with(sum_)
        norm.replace_all_uses_with(normalised)
        count += 1
    return count


def only_user(node: fx.Node, target) -> Optional[fx.Node]:
    """The one node that reads a node, if it is a call of the target."""
    users = list(node.users)
    return users[0] if len(users) == 1 and users[0].target is target else None


def fuse_image_embedding(module: fx.GraphModule) -> int:
    """Patches, class token, positions, layer norm, and the first block's layer norm: two operations around the projection."""
    count = 0
    for prepend in find_nodes(module, ops.prepend_class_token):
        as_images, class_token = prepend.args
        projection = as_images.args[0] if as_images.target is aten.view.default else as_images
        rows = projection.args[0] if projection.target is aten.linear.default and len(projection.args) == 2 else None
        patches = rows.args[0] if rows is not None and rows.target is aten.view.default else None
        positioned = only_user(prepend, aten.add.Tensor)
        flattened = positioned and only_user(positioned, aten.view.default)
        norm_pre = flattened and only_user(flattened, aten.layer_norm.default)
        if patches is None or patches.target is not ops.extract_patches or not norm_pre:
            continue
        norms = [user for user in norm_pre.users if user.target is aten.layer_norm.default]
        if len(norms) != 1 or len(patches.users) != 1 or len(projection.users) != 1 or len(as_images.users) != 1:
            continue
        with module.graph.inserting_before(rows):
            projection.args = (module.graph.call_function(ops.extract_patch_rows, patches.args), projection.args[1])
        with module.graph.inserting_before(norm_pre):
            arguments = (projection, class_token, positioned.args[1], *norm_pre.args[2:5], *norms[0].args[2:5])
            both = module.graph.call_function(ops.embed_image, arguments)
            x, normalised = (module.graph.call_function(operator.getitem, (both, index)) for index in range(2))
        norm_pre.replace_all_uses_with(x)
        norms[0].replace_all_uses_with(normalised)
        count += 1
    return count


class LinearRows(fx.Interpreter):
    """Runs a graph on shapes alone, for a batch of one, and notes how many rows every linear layer has."""

    def __init__(self, module: fx.GraphModule):
        super().__init__(module)
        self.rows: dict[fx.Node, int] = {}
        [self.example] = [node.meta["val"] for node in module.graph.nodes if node.op == "placeholder"]

    def count(self) -> dict[fx.Node, int]:
        with FakeTensorMode(allow_non_fake_inputs=True):  # the parameters
            self.run(self.example.new_empty((1, *self.example.shape[1:])))
        return self.rows

    def run_node(self, node: fx.Node):
        result = super().run_node(node)
        if node.target is aten.linear.default:
            self.rows[node] = result.numel() // result.shape[-1]
        return result


def fuse_linear(module: fx.GraphModule) -> int:
    """linear of sizes that the library takes: linear_rows, which knows for how many rows of a sample it is."""
    count = 0
    for node, rows in LinearRows(module).count().items():
        x, weight, bias = (*node.args, None)[:3]
        if weight.op != "get_attr" or not linear.takes(*getattr_nested(module, weight.target).shape):
            continue
        with module.graph.inserting_before(node):
            node.replace_all_uses_with(module.graph.call_function(ops.linear_rows, (x, weight, bias, rows)))
        count += 1
    return count


PASSES: tuple[Callable[[fx.GraphModule], int], ...] = (
    fold_projection_biases,
    fuse_bias_quick_gelu,
    fuse_residual_layer_norm,
    fuse_image_embedding,
    fuse_linear,
)


def fuse(module: fx.GraphModule) -> dict[str, int]:
    """Run all passes on a lowered graph, in place; returns how often each one rewrote."""
    counts = {}
    for rewrite in PASSES:
        counts[rewrite.__name__] = rewrite(module)
        module.graph.eliminate_dead_code()
    module.graph.lint()
    module.recompile()
    return counts
