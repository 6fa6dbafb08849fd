"""Converters of our operations: a graph's nodes -> TensorRT layers.

Importing this module registers them with Torch-TensorRT: `trt.py` does when it builds.  Only ops of
our own have one here, so no other model's network changes.  Every converter works with a dynamic
batch: a reshape writes 0 ("keep") or -1 ("what is left") for it.

Networks are strongly typed: a layer computes in the type of its inputs, and constants take that
type, but for layer norm, which is put between casts to fp32, and the plugins' fp32 constants.
"""
from typing import Any, Optional, Sequence

import numpy as np
import torch
from torch import fx

from clip_ttrt import kernels, ops, trt as seam
from clip_ttrt.models import HEAD_DIM

trt = seam.api()

# Added to a masked score.  exp() of it is exactly zero in every type, and unlike -inf it cannot
# make a NaN on the way, nor overflow half's range when a score is added.
MASKED = -3e4

# TensorRT's type -> PyTorch's, for constants beside a tensor.
TORCH_TYPES = {
    trt.float32: torch.float, trt.float16: torch.half, trt.bfloat16: torch.bfloat16,
    trt.int32: torch.int32, trt.int64: torch.int64,
}
TRT_TYPES = {value: key for key, value in TORCH_TYPES.items()}


def of_rank(*ranks: int):
    """A validator: the rank of a node's first input."""
    return lambda node: node.args[0].meta["val"].dim() in ranks


def attends(node: fx.Node) -> bool:
    """Whether qkv is [B, T, 3·heads·64], as both kinds of attention take it."""
    qkv, heads = node.args[0].meta["val"], node.args[1]
    return qkv.dim() == 3 and qkv.shape[2] == 3 * heads * HEAD_DIM


def constant(ctx: Any, value: torch.Tensor, name: str, dtype: Optional[torch.dtype] = None) -> Any:
    """A constant layer of a tensor, in a dtype (its own by default)."""
    value = value.detach().to("cpu", dtype or value.dtype).contiguous()
    weights = trt.Weights(TRT_TYPES[value.dtype], seam.hold(value).data_ptr(), value.numel())
    layer = ctx.net.add_constant(tuple(value.shape), weights)
    layer.name = name
    return layer.get_output(0)


def beside(ctx: Any, x: Any, value: torch.Tensor, name: str) -> Any:
    """A constant of x's type, with leading axes of size 1, since TensorRT broadcasts equal ranks only."""
    value = value.reshape((1,) * (len(x.shape) - value.dim()) + tuple(value.shape))
    return constant(ctx, value, name, TORCH_TYPES[x.dtype])


def fp32(ctx: Any, values: dict[str, torch.Tensor], name: str) -> list[Any]:
    """Constants of a plugin, which are fp32."""
    return [constant(ctx, value, f"{name}_{which}", torch.float) for which, value in values.items()]


def named(layer: Any, name: str) -> Any:
    """A layer's first output, the layer under its name."""
    layer.name = name
    return layer.get_output(0)


def shuffle(ctx: Any, x: Any, name: str, shape: Sequence[int] = (), order: Sequence[int] = ()) -> Any:
    """Reshape (0 keeps a dimension), then transpose; either may be left out."""
    layer = ctx.net.add_shuffle(x)
    if shape:
        layer.reshape_dims = tuple(shape)
    if order:
        layer.second_transpose = tuple(order)
    return named(layer, name)


def elementwise(ctx: Any, a: Any, b: Any, operation: str, name: str) -> Any:
    """Two tensors of one type and rank through an operation of TensorRT's, by its name."""
    return named(ctx.net.add_elementwise(a, b, getattr(trt.ElementWiseOperation, operation)), name)


def to_type(ctx: Any, x: Any, dtype: Any, name: str) -> Any:
    """x in a type of TensorRT's: a cast where it has another."""
    return x if x.dtype == dtype else named(ctx.net.add_cast(x, dtype), name)


def plugin_layer(ctx: Any, plugin: str, inputs: Sequence[Any], fields: dict[str, Any], name: str) -> Any:
    """One layer of a plugin that `kernels.load` has registered; a field's type is its value's, int32, float32 or several int8."""
    kinds = {np.dtype(np.int32): trt.PluginFieldType.INT32, np.dtype(np.float32): trt.PluginFieldType.FLOAT32,
             np.dtype(np.int8): trt.PluginFieldType.INT8}
    values = {key: np.atleast_1d(value) for key, value in fields.items()}
    given = trt.PluginFieldCollection([trt.PluginField(key, value, kinds[value.dtype]) for key, value in values.items()])
    creator = trt.get_plugin_registry().get_creator(plugin, kernels.version(), "")
    made = creator and creator.create_plugin(name, given, trt.TensorRTPhase.BUILD)
    if not made:
        raise RuntimeError(f"{plugin} {kernels.version()} cannot be created with {fields}")
    layer = ctx.net.add_plugin_v3(list(inputs), [], made)
    layer.name = name
    return layer


def batch_of(ctx: Any, x: Any, shape: Sequence[int], name: str) -> Any:
    """A shape tensor: x's batch, then the given sizes."""
    size = ctx.net.add_shape(x).get_output(0)
    first = ctx.net.add_slice(size, (0,), (1,), (1,)).get_output(0)
    rest = constant(ctx, torch.tensor(shape), f"{name}_sizes", TORCH_TYPES[size.dtype])
    return named(ctx.net.add_concatenation([first, rest]), f"{name}_shape")


def slice_of(ctx: Any, x: Any, start: Sequence[int], sizes: Sequence[int], strides: Sequence[int],
             batch: Any, name: str) -> Any:
    """A slice of x [.., .., ..] whose first size is the batch of another tensor, and the others given."""
    layer = ctx.net.add_slice(x, tuple(start), (max(batch.shape[0], 1), *sizes), tuple(strides))
    if batch.shape[0] == -1:
        layer.set_input(2, batch_of(ctx, batch, sizes, name))
    return named(layer, name)


# In TensorRT's own layers


@seam.converter(ops.cast)
def convert_cast(ctx, target, args, kwargs, name):
    """x in another type."""
    return to_type(ctx, args[0], TRT_TYPES[args[1]], name)


@seam.converter(ops.linear, of_rank(2, 3))
def convert_linear(ctx, target, args, kwargs, name):
    """[.., K] and [N, K] and [N] or None -> [.., N]: a matrix product and a sum."""
    x, weight, bias = args
    none, transposed = trt.MatrixOperation.NONE, trt.MatrixOperation.TRANSPOSE
    weight = beside(ctx, x, weight, f"{name}_weight")
    product = named(ctx.net.add_matrix_multiply(x, none, weight, transposed), name)
    if bias is None:
        return product
    return elementwise(ctx, product, beside(ctx, x, bias, f"{name}_bias"), "SUM", f"{name}_biased")


@seam.converter(ops.add)
def convert_add(ctx, target, args, kwargs, name):
    """a + b, either of which may be a constant."""
    a, b = args
    a = beside(ctx, b, a, f"{name}_a") if isinstance(a, torch.Tensor) else a
    b = beside(ctx, a, b, f"{name}_b") if isinstance(b, torch.Tensor) else b
    return elementwise(ctx, a, b, "SUM", name)


@seam.converter(ops.layer_norm, of_rank(2, 3))
def convert_layer_norm(ctx, target, args, kwargs, name):
    """Layer norm over the last axis as one normalization layer in fp32."""
    x, scale, shift, epsilon = args
    wide = to_type(ctx, x, trt.float32, f"{name}_fp32")
    scale, shift = (beside(ctx, wide, value, f"{name}_{which}") for which, value in (("scale", scale), ("shift", shift)))
    add = getattr(ctx.net, "add_normalization_v2", ctx.net.add_normalization)
    layer = add(wide, scale, shift, 1 << (len(x.shape) - 1))
    layer.epsilon = epsilon
    return to_type(ctx, named(layer, name), x.dtype, f"{name}_back")


@seam.converter(ops.quick_gelu)
def convert_quick_gelu(ctx, target, args, kwargs, name):
    """x·sigmoid(1.702·x)."""
    x = args[0]
    slope = beside(ctx, x, torch.tensor([ops.QUICK_GELU_SLOPE]), f"{name}_slope")
    scaled = elementwise(ctx, x, slope, "PROD", f"{name}_scaled")
    sigmoid = named(ctx.net.add_activation(scaled, trt.ActivationType.SIGMOID), f"{name}_sigmoid")
    return elementwise(ctx, x, sigmoid, "PROD", name)


@seam.converter(ops.embedding)
def convert_embedding(ctx, target, args, kwargs, name):
    """[V, W] and int32 [B, T] -> [B, T, W]."""
    weight, tokens = args
    return named(ctx.net.add_gather(constant(ctx, weight, f"{name}_weight"), tokens, 0), name)


@seam.converter(ops.attention, attends)
def convert_attention(ctx, target, args, kwargs, name):
    """[B, T, 3·W] -> [B, T, W] in TensorRT's own layers: its attention where the network has one, else what it fuses."""
    qkv, heads, causal = args
    tokens = qkv.shape[1]
    split = shuffle(ctx, qkv, f"{name}_split", (0, tokens, 3, heads, HEAD_DIM), (2, 0, 3, 1, 4))
    query, key, value = (
        named(ctx.net.add_gather(split, constant(ctx, torch.tensor(part, dtype=torch.int32), f"{name}_{which}_index"), 0), f"{name}_{which}")
        for part, which in enumerate(("query", "key", "value")))
    scale = beside(ctx, query, torch.tensor([HEAD_DIM ** -0.5]), f"{name}_scale")
    query = elementwise(ctx, query, scale, "PROD", f"{name}_scaled")
    attended = (attention_layer if hasattr(ctx.net, "add_attention") else composed_attention)(ctx, query, key, value, causal, name)
    return shuffle(ctx, shuffle(ctx, attended, f"{name}_heads_last", order=(0, 2, 1, 3)), name, (0, tokens, heads * HEAD_DIM))


def attention_layer(ctx: Any, query: Any, key: Any, value: Any, causal: bool, name: str) -> Any:
    """Attention as one layer, which TensorRT takes apart where it has no kernel for it."""
    softmax = trt.AttentionNormalizationOp.SOFTMAX
    layer = seam.hold(ctx.net.add_attention(query, key, value, softmax, causal))
    layer.decomposable = True
    return layer.get_output(0)


def composed_attention(ctx: Any, query: Any, key: Any, value: Any, causal: bool, name: str) -> Any:
    """Attention as product, softmax in fp32 and product.

    With a mask TensorRT 10.6 has no one kernel for a range, and what it takes instead adds up in
    half: the products are in fp32 then, too.
    """
    none, transposed = trt.MatrixOperation.NONE, trt.MatrixOperation.TRANSPOSE
    dtype = value.dtype
    if causal:
        query, key, value = (to_type(ctx, x, trt.float32, f"{name}_{which}_fp32")
                             for x, which in ((query, "query"), (key, "key"), (value, "value")))
    scores = named(ctx.net.add_matrix_multiply(query, none, key, transposed), f"{name}_scores")
    scores = to_type(ctx, scores, trt.float32, f"{name}_wide")
    if causal:
        mask = torch.full((scores.shape[2],) * 2, MASKED).triu(1)
        scores = elementwise(ctx, scores, beside(ctx, scores, mask, f"{name}_mask"), "SUM", f"{name}_masked")
    softmax = ctx.net.add_softmax(scores)
    softmax.axes = 1 << 3
    weights = to_type(ctx, named(softmax, f"{name}_weights"), value.dtype, f"{name}_narrow")
    attended = named(ctx.net.add_matrix_multiply(weights, none, value, none), f"{name}_attended")
    return to_type(ctx, attended, dtype, f"{name}_attended_back")


@seam.converter(ops.extract_patches, of_rank(4))
def convert_extract_patches(ctx, target, args, kwargs, name):
    """[B, C, R, R] -> [B, (R/size)², C·size²]."""
    images, size = args
    _, channels, resolution, _ = images.shape
    side = resolution // size
    cut = shuffle(ctx, images, f"{name}_cut", (0, channels, side, size, side, size), (0, 2, 4, 1, 3, 5))
    return shuffle(ctx, cut, name, (0, side * side, channels * size * size))


@seam.converter(ops.prepend_class_token, of_rank(3))
def convert_prepend_class_token(ctx, target, args, kwargs, name):
    """[B, N, W] and [W] -> [B, N + 1, W]: the token is a slice of stride 0, once for each sample."""
    patches, class_token = args
    width = patches.shape[2]
    token = beside(ctx, patches, class_token, f"{name}_token")
    rows = slice_of(ctx, token, (0, 0, 0), (1, width), (0, 1, 1), patches, f"{name}_rows")
    layer = ctx.net.add_concatenation([rows, patches])
    layer.axis = 1
    return named(layer, name)


@seam.converter(ops.select_token, of_rank(3))
def convert_select_token(ctx, target, args, kwargs, name):
    """One token of [B, T, W] -> [B, W], as a slice."""
    x, index = args
    width = x.shape[2]
    row = slice_of(ctx, x, (0, index, 0), (1, width), (1, 1, 1), x, f"{name}_row")
    return shuffle(ctx, row, name, (-1, width))


@seam.converter(ops.pool_end_of_text, of_rank(3))
def convert_pool_end_of_text(ctx, target, args, kwargs, name):
    """[B, T, W] and int32 [B, T] -> [B, W]: the row of the first highest token id, found in int32.

    The position is the smallest index at which a token equals the row's maximum.  In half, which
    holds no 49407, start and end of text would be equal and the features silently wrong.
    """
    x, tokens = args
    length = tokens.shape[1]
    highest = named(ctx.net.add_reduce(tokens, trt.ReduceOperation.MAX, 1 << 1, True), f"{name}_highest")
    is_highest = elementwise(ctx, tokens, highest, "EQUAL", f"{name}_is_highest")
    index = constant(ctx, torch.arange(length, dtype=torch.int32)[None], f"{name}_indices")
    beyond = constant(ctx, torch.full((1, length), length, dtype=torch.int32), f"{name}_beyond")
    candidates = named(ctx.net.add_select(is_highest, index, beyond), f"{name}_candidates")
    position = named(ctx.net.add_reduce(candidates, trt.ReduceOperation.MIN, 1 << 1, True), f"{name}_position")
    rows = ctx.net.add_gather(x, position, 1)
    rows.num_elementwise_dims = 1
    return shuffle(ctx, named(rows, f"{name}_rows"), name, (0, x.shape[2]))


@seam.converter(ops.clamp_tokens, of_rank(2))
def convert_clamp_tokens(ctx, target, args, kwargs, name):
    """int32 [B, T] -> int32 [B, T] between 0 and vocabulary - 1."""
    tokens, vocabulary = args
    least, most = (beside(ctx, tokens, torch.tensor([value]), f"{name}_{which}")
                   for value, which in ((0, "least"), (vocabulary - 1, "most")))
    return elementwise(ctx, elementwise(ctx, tokens, least, "MAX", f"{name}_from"), most, "MIN", name)


@seam.converter(ops.mask_unknown, of_rank(2))
def convert_mask_unknown(ctx, target, args, kwargs, name):
    """[B, E] and two int32 [B, T] -> [B, E]: a row is NaN where not all ids are equal."""
    features, tokens, clamped = args
    equal = elementwise(ctx, tokens, clamped, "EQUAL", f"{name}_equal")
    equal = to_type(ctx, equal, trt.int32, f"{name}_equal_int32")
    known = named(ctx.net.add_reduce(equal, trt.ReduceOperation.MIN, 1 << 1, True), f"{name}_known_int32")
    known = to_type(ctx, known, trt.bool, f"{name}_known")
    nan = beside(ctx, features, torch.tensor([float("nan")]), f"{name}_nan")
    return named(ctx.net.add_select(known, features, nan), name)


@seam.converter(ops.split_tokens, of_rank(2))
def convert_split_tokens(ctx, target, args, kwargs, name):
    """[B·T, W] -> [B, T, W]."""
    x, tokens = args
    return shuffle(ctx, x, name, (-1, tokens, x.shape[1]))


# As plugins


@seam.converter(ops.fused_attention, attends)
def convert_fused_attention(ctx, target, args, kwargs, name):
    """[B, T, 3·W] -> [B, T, W]."""
    qkv, heads, causal, query_bias = (*args, None)[:4]
    inputs = [qkv] if query_bias is None else [qkv, *fp32(ctx, {"query_bias": query_bias}, name)]
    fields = {"tokens": np.int32(qkv.shape[1]), "heads": np.int32(heads), "causal": np.int32(causal), "query_bias": np.int32(len(inputs) - 1)}
    return plugin_layer(ctx, kernels.ATTENTION, inputs, fields, name).get_output(0)


@seam.converter(ops.fused_linear)
def convert_fused_linear(ctx, target, args, kwargs, name):
    """[.., K] -> [.., N]; the table of what was measured before the network was made goes along, and says the sizes too."""
    from clip_ttrt import linear

    x, weight, bias, table = (*args, "")[:4]
    table = bytes.fromhex(table) or linear.pack(*weight.shape, bias is not None)
    constants = [constant(ctx, value, f"{name}_{which}", torch.half) for which, value in (("weight", weight), ("bias", bias)) if value is not None]
    return plugin_layer(ctx, kernels.LINEAR, [x, *constants], {"table": np.frombuffer(table, np.int8)}, name).get_output(0)


@seam.converter(ops.bias_quick_gelu)
def convert_bias_quick_gelu(ctx, target, args, kwargs, name):
    """[.., N] and [N] -> [.., N]."""
    x, bias = args
    return plugin_layer(ctx, kernels.BIAS_QUICK_GELU, [x, *fp32(ctx, {"bias": bias}, name)], {}, name).get_output(0)


@seam.converter(ops.fused_layer_norm)
def convert_fused_layer_norm(ctx, target, args, kwargs, name):
    """[.., W] -> [.., W]."""
    x, scale, shift, epsilon = args
    fields = {"residual": np.int32(0), "epsilon": np.float32(epsilon)}
    return plugin_layer(ctx, kernels.RESIDUAL_LAYER_NORM, [x, *fp32(ctx, {"scale": scale, "shift": shift}, name)], fields, name).get_output(0)


@seam.converter(ops.residual_layer_norm)
def convert_residual_layer_norm(ctx, target, args, kwargs, name):
    """Two [.., W] and three [W] -> two [.., W]."""
    x, delta, bias, scale, shift, epsilon = args
    fields = {"residual": np.int32(1), "epsilon": np.float32(epsilon)}
    constants = fp32(ctx, {"bias": bias, "scale": scale, "shift": shift}, name)
    layer = plugin_layer(ctx, kernels.RESIDUAL_LAYER_NORM, [x, delta, *constants], fields, name)
    return layer.get_output(0), layer.get_output(1)


@seam.converter(ops.extract_patch_rows, of_rank(4))
def convert_extract_patch_rows(ctx, target, args, kwargs, name):
    """[B, 3, R, R], fp32 or fp16 -> fp16 [B·(R/size)², 3·size²]."""
    images, size = args[:2]
    return plugin_layer(ctx, kernels.EXTRACT_PATCHES, [images], {"patch_size": np.int32(size)}, name).get_output(0)


@seam.converter(ops.embed_image, of_rank(2))
def convert_embed_image(ctx, target, args, kwargs, name):
    """[B·N, W] -> two of [B·(N + 1), W]."""
    patches, class_token, positions, scale_pre, shift_pre, epsilon_pre, scale_1, shift_1, epsilon_1 = args
    constants = fp32(ctx, {"class_token": class_token, "positions": positions, "scale_pre": scale_pre,
                           "shift_pre": shift_pre, "scale_1": scale_1, "shift_1": shift_1}, name)
    fields = {"tokens": np.int32(positions.shape[0]), "epsilon_pre": np.float32(epsilon_pre), "epsilon_1": np.float32(epsilon_1)}
    layer = plugin_layer(ctx, kernels.EMBED_IMAGE, [patches, *constants], fields, name)
    return layer.get_output(0), layer.get_output(1)
