"""Torch-TensorRT converters of our own: a lowered graph's operations -> TensorRT layers.

Importing this module registers them; it needs a CUDA GPU, so only `engine.py` imports it.
Registered are our own ops, and the aten ops for which Torch-TensorRT 2.2 has no converter or
one that is wrong or weak (each docstring says which).  Every one works with a dynamic batch: a
reshape writes 0 ("keep") or -1 ("what is left") for it.

Networks are declared in fp32 throughout, but for the weights of the linear layers' plugin; the builder's precision flags
decide what runs in half.
"""
from dataclasses import dataclass, field
from typing import Any, Optional, Sequence

import numpy as np
import tensorrt as trt
import torch
from torch_tensorrt.dynamo.conversion._ConversionContext import ConversionContext
from torch_tensorrt.dynamo.conversion._ConverterRegistry import ConverterPriority, dynamo_tensorrt_converter

from clip_ttrt import linear, ops, kernels
from clip_ttrt.errors import UserError
from clip_ttrt.models import HEAD_DIM
from clip_ttrt.options import BatchRange
from clip_ttrt.recipe import Recipe

# Added to a masked score.  exp() of it is exactly zero in fp16 and fp32, and unlike -inf it cannot
# make a NaN on the way, nor overflow half's range when a score is added.
MASKED = -3e4


@dataclass
class Context(ConversionContext):
    """Torch-TensorRT's conversion context with what our converters are told."""

    attention: str = "native"  # or plugin
    batch: Optional[BatchRange] = None
    recipe: Recipe = Recipe()
    linear_tables: dict[tuple, bytes] = field(default_factory=dict)  # measured in this build, by rows of a sample, weight's shape, bias


def register(target):
    """Register a converter for one target before Torch-TensorRT's own."""
    return dynamo_tensorrt_converter(target, priority=ConverterPriority.HIGH)


def constant(ctx: ConversionContext, value: np.ndarray, name: str) -> trt.ITensor:
    """A constant layer; the array must stay referenced until the engine is built, which the network does."""
    layer = ctx.net.add_constant(value.shape, np.ascontiguousarray(value))
    layer.name = name
    return layer.get_output(0)


def with_rank(value: np.ndarray, rank: int) -> np.ndarray:
    """The same array with leading axes of size 1, since TensorRT broadcasts equal ranks only."""
    return value.reshape((1,) * (rank - value.ndim) + value.shape)


def shuffle(ctx: ConversionContext, x: trt.ITensor, name: str, shape: Sequence[int] = (), order: Sequence[int] = ()) -> trt.ITensor:
    """Reshape (0 keeps a dimension), then transpose; either may be left out."""
    layer = ctx.net.add_shuffle(x)
    layer.name = name
    if shape:
        layer.reshape_dims = tuple(shape)
    if order:
        layer.second_transpose = tuple(order)
    return layer.get_output(0)


def elementwise(ctx: ConversionContext, a: trt.ITensor, b: trt.ITensor, operation: trt.ElementWiseOperation, name: str) -> trt.ITensor:
    layer = ctx.net.add_elementwise(a, b, operation)
    layer.name = name
    return layer.get_output(0)


def gather_index(ctx: ConversionContext, x: trt.ITensor, axis: int, index: int, name: str) -> trt.ITensor:
    """x at one fixed index of an axis, which disappears."""
    layer = ctx.net.add_gather(x, constant(ctx, np.array(index, dtype=np.int32), f"{name}_index"), axis)
    layer.name = name
    return layer.get_output(0)


def plugin_layer(ctx: ConversionContext, plugin_name: str, inputs: Sequence[trt.ITensor], fields: dict[str, Any], name: str,
                 version: str = kernels.VERSION) -> trt.ILayer:
    """One layer of a plugin, of ours, which `kernels.load` has registered, or of another version; a field's type is its value's, int32,
    float32 or several int8."""
    kinds = {np.dtype(np.int32): trt.PluginFieldType.INT32, np.dtype(np.float32): trt.PluginFieldType.FLOAT32, np.dtype(np.int8): trt.PluginFieldType.INT8}
    values = {key: np.atleast_1d(value) for key, value in fields.items()}
    given = [trt.PluginField(key, value, kinds[value.dtype]) for key, value in values.items()]
    creator = trt.get_plugin_registry().get_plugin_creator(plugin_name, version, "")
    made = creator and creator.create_plugin(name, trt.PluginFieldCollection(given))
    if not made:
        raise RuntimeError(f"{plugin_name} {version} cannot be created with {fields}")
    layer = ctx.net.add_plugin_v2(list(inputs), made)
    layer.name = name
    return layer


@register(ops.attention_rows)
def convert_attention_rows(ctx: ConversionContext, target: Any, args: tuple, kwargs: dict, name: str) -> trt.ITensor:
    """[B·T, 3·W] -> [B·T, W], through the plugin or TensorRT's own layers."""
    qkv, tokens, heads, causal, query_bias = (*args, None)[:5]
    if by_plugin(ctx):
        return plugin_attention(ctx, qkv, tokens, heads, causal, query_bias, name)
    if query_bias is not None:
        raise NotImplementedError("a query bias of its own: only the plugin adds it, and fusion.py makes it for the plugin")
    return native_attention(ctx, qkv, tokens, heads, causal, name)


def by_plugin(ctx: ConversionContext) -> bool:
    return getattr(ctx, "attention", "native") == "plugin"


def plugin_attention(ctx: ConversionContext, qkv: trt.ITensor, tokens: int, heads: int, causal: bool, query_bias: Optional[np.ndarray],
                     name: str) -> trt.ITensor:
    """One layer of the fused-attention plugin."""
    inputs = [qkv] if query_bias is None else [qkv, constant(ctx, query_bias, f"{name}_query_bias")]
    fields = {"tokens": np.int32(tokens), "heads": np.int32(heads), "causal": np.int32(causal), "query_bias": np.int32(len(inputs) - 1)}
    return plugin_layer(ctx, kernels.ATTENTION, inputs, fields, name).get_output(0)


@register(ops.linear_rows)
def convert_linear_rows(ctx: Context, target: Any, args: tuple, kwargs: dict, name: str) -> trt.ITensor:
    """[.., K] -> [.., N], a plugin, measured now for the row counts of the batch range; one table serves all layers of the same sizes."""
    x, weight, bias, rows = args
    sizes = (rows, weight.shape, bias is not None)
    if sizes not in ctx.linear_tables:
        ctx.linear_tables[sizes] = linear.tune([rows * batch for batch in linear.measured_batches(ctx.batch)], *sizes[1:])
    constants = [constant(ctx, as_half(value, f"{name}_{which}"), f"{name}_{which}") for value, which in ((weight, "weight"), (bias, "bias")) if value is not None]
    return plugin_layer(ctx, kernels.LINEAR, [x, *constants], {"table": np.frombuffer(ctx.linear_tables[sizes], np.int8)}, name).get_output(0)


def as_half(value: np.ndarray, name: str) -> np.ndarray:
    """The values rounded to fp16.  Raises UserError where one is beyond its range."""
    if not (np.abs(value) <= linear.LARGEST_HALF).all():
        raise UserError(f"{name} has values that fp16 cannot hold, {np.abs(value).max():.4g} where {linear.LARGEST_HALF:.0f} is the largest; "
                        f"compile with --attention native or in another precision")
    return value.astype(np.float16)


@register(ops.bias_quick_gelu)
def convert_bias_quick_gelu(ctx: ConversionContext, target: Any, args: tuple, kwargs: dict, name: str) -> trt.ITensor:
    """[M, N] and [N] -> [M, N], a plugin."""
    x, bias = args
    return plugin_layer(ctx, kernels.BIAS_QUICK_GELU, [x, constant(ctx, bias, f"{name}_bias")], {}, name).get_output(0)


@register(ops.residual_layer_norm)
def convert_residual_layer_norm(ctx: ConversionContext, target: Any, args: tuple, kwargs: dict, name: str) -> tuple[trt.ITensor, trt.ITensor]:
    """Two [M, W] and three [W] -> two [M, W], a plugin."""
    x, delta, bias, scale, shift, epsilon = args
    constants = [constant(ctx, value, f"{name}_{which}") for which, value in (("bias", bias), ("scale", scale), ("shift", shift))]
    layer = plugin_layer(ctx, kernels.RESIDUAL_LAYER_NORM, [x, delta, *constants], {"residual": np.int32(1), "epsilon": np.float32(epsilon)}, name)
    return layer.get_output(0), layer.get_output(1)


def native_attention(ctx: ConversionContext, qkv: trt.ITensor, tokens: int, heads: int, causal: bool, name: str) -> trt.ITensor:
    """Attention in TensorRT's own layers, in the form that its fusion looks for.

    We build the causal mask ourselves: Torch-TensorRT 2.2 drops masks and `is_causal` when it
    lowers scaled_dot_product_attention.
    """
    split = shuffle(ctx, qkv, f"{name}_split", shape=(-1, tokens, 3, heads, HEAD_DIM), order=(2, 0, 3, 1, 4))
    query, key, value = (gather_index(ctx, split, 0, part, f"{name}_{which}") for part, which in enumerate(("query", "key", "value")))
    scale = constant(ctx, np.full((1, 1, 1, 1), HEAD_DIM ** -0.5, dtype=np.float32), f"{name}_scale")
    query = elementwise(ctx, query, scale, trt.ElementWiseOperation.PROD, f"{name}_scaled")
    scores = ctx.net.add_matrix_multiply(query, trt.MatrixOperation.NONE, key, trt.MatrixOperation.TRANSPOSE)
    scores.name = f"{name}_scores"
    scores = scores.get_output(0)
    if causal:
        mask = np.triu(np.full((1, 1, tokens, tokens), MASKED, dtype=np.float32), 1)
        scores = elementwise(ctx, scores, constant(ctx, mask, f"{name}_mask"), trt.ElementWiseOperation.SUM, f"{name}_masked")
    weights = ctx.net.add_softmax(scores)
    weights.name = f"{name}_weights"
    weights.axes = 1 << 3
    attended = ctx.net.add_matrix_multiply(weights.get_output(0), trt.MatrixOperation.NONE, value, trt.MatrixOperation.NONE)
    attended.name = f"{name}_attended"
    heads_last = shuffle(ctx, attended.get_output(0), f"{name}_heads_last", order=(0, 2, 1, 3))
    return shuffle(ctx, heads_last, f"{name}_rows", shape=(-1, heads * HEAD_DIM))


@register(ops.row_capped)
def convert_row_capped(ctx: ConversionContext, target: Any, args: tuple, kwargs: dict, name: str) -> trt.ITensor:
    """x as the minimum of x and its row's maximum.

    Where a size is not known, TensorRT 8.6's kernels for what treats every element alike, a transposition among it, take much
    longer than where it is; those with a reduction over rows take as long as there.
    """
    x, last = args[0], len(args[0].shape) - 1
    highest = ctx.net.add_reduce(x, trt.ReduceOperation.MAX, 1 << last, True)
    highest.name = f"{name}_highest"
    return elementwise(ctx, x, highest.get_output(0), trt.ElementWiseOperation.MIN, name)


@register(ops.quick_gelu)
def convert_quick_gelu(ctx: ConversionContext, target: Any, args: tuple, kwargs: dict, name: str) -> trt.ITensor:
    """x·sigmoid(1.702·x), and an activation that TensorRT 8.6's transformer compiler does not take: y where y > -1, which is all of it.

    With a plugin before the product that gives x, the product is then no part of what is handed to that compiler: it becomes a
    convolution which has all of this in its epilogue.
    """
    x, one = args[0], (1,) * len(args[0].shape)
    slope = constant(ctx, np.full(one, ops.QUICK_GELU_SLOPE, dtype=np.float32), f"{name}_slope")
    sigmoid = ctx.net.add_activation(elementwise(ctx, x, slope, trt.ElementWiseOperation.PROD, f"{name}_scaled"), trt.ActivationType.SIGMOID)
    sigmoid.name = f"{name}_sigmoid"
    barrier = ctx.net.add_activation(elementwise(ctx, x, sigmoid.get_output(0), trt.ElementWiseOperation.PROD, f"{name}_product"),
                                     trt.ActivationType.THRESHOLDED_RELU)
    barrier.name, barrier.alpha = name, -1.0
    return barrier.get_output(0)


@register(ops.layer_norm_apart)
def convert_layer_norm_apart(ctx: ConversionContext, target: Any, args: tuple, kwargs: dict, name: str) -> trt.ITensor:
    """[M, W] -> [M, W] by the layer norm of TensorRT's own plugin library, which its transformer compiler does not take."""
    x, scale, shift, epsilon = args
    inputs = [shuffle(ctx, x, f"{name}_up", shape=(1, -1, x.shape[1])),
              *(constant(ctx, value, f"{name}_{which}") for which, value in (("scale", scale), ("shift", shift)))]
    layer = plugin_layer(ctx, "LayerNorm", inputs, {"epsilon": np.float32(epsilon), "axis": np.int32(-1)}, name, version="1")
    return shuffle(ctx, layer.get_output(0), f"{name}_down", shape=(-1, x.shape[1]))


@register(ops.extract_patch_rows)
def convert_extract_patch_rows(ctx: ConversionContext, target: Any, args: tuple, kwargs: dict, name: str) -> trt.ITensor:
    """[B, C, R, R] -> [B·(R/size)², C·size²], a plugin."""
    images, size = args
    return plugin_layer(ctx, kernels.EXTRACT_PATCHES, [images], {"patch_size": np.int32(size)}, name).get_output(0)


@register(ops.embed_image)
def convert_embed_image(ctx: ConversionContext, target: Any, args: tuple, kwargs: dict, name: str) -> tuple[trt.ITensor, trt.ITensor]:
    """[B·N, W] -> two of [B·(N + 1), W], a plugin."""
    patches, class_token, positions, scale_pre, shift_pre, epsilon_pre, scale_1, shift_1, epsilon_1 = args
    constants = [constant(ctx, value, f"{name}_{which}") for which, value in (
        ("class_token", class_token), ("positions", positions), ("scale_pre", scale_pre), ("shift_pre", shift_pre), ("scale_1", scale_1), ("shift_1", shift_1))]
    fields = {"tokens": np.int32(positions.shape[0]), "epsilon_pre": np.float32(epsilon_pre), "epsilon_1": np.float32(epsilon_1)}
    layer = plugin_layer(ctx, kernels.EMBED_IMAGE, [patches, *constants], fields, name)
    return layer.get_output(0), layer.get_output(1)


@register(ops.extract_patches)
def convert_extract_patches(ctx: ConversionContext, target: Any, args: tuple, kwargs: dict, name: str) -> trt.ITensor:
    """[B, C, R, R] -> [B, (R/size)², C·size²].

    TensorRT 8.6 has no good convolution for three channels and a stride of 32; a matrix product
    with the patches takes its place.
    """
    images, size = args
    channels, side = images.shape[1], images.shape[2] // size
    cut = shuffle(ctx, images, f"{name}_cut", shape=(0, channels, side, size, side, size), order=(0, 2, 4, 1, 3, 5))
    return shuffle(ctx, cut, name, shape=(0, side * side, channels * size * size))


@register(ops.prepend_class_token)
def convert_prepend_class_token(ctx: ConversionContext, target: Any, args: tuple, kwargs: dict, name: str) -> trt.ITensor:
    """[B, N, W] and [W] -> [B, N + 1, W].

    An expand over a dynamic batch breaks in Torch-TensorRT 2.2.  Here the class token's rows are
    the first patch's rows times zero plus the token, so that the batch follows by broadcasting.
    """
    patches, class_token = args
    first = ctx.net.add_gather(patches, constant(ctx, np.zeros((1,), dtype=np.int32), f"{name}_index"), 1)
    first.name = f"{name}_first"
    zero = constant(ctx, np.zeros((1, 1, 1), dtype=np.float32), f"{name}_zero")
    rows = elementwise(ctx, first.get_output(0), zero, trt.ElementWiseOperation.PROD, f"{name}_zeros")
    token = constant(ctx, with_rank(class_token, 3), f"{name}_token")
    rows = elementwise(ctx, rows, token, trt.ElementWiseOperation.SUM, f"{name}_rows")
    layer = ctx.net.add_concatenation([rows, patches])
    layer.name, layer.axis = name, 1
    return layer.get_output(0)


@register(ops.pool_end_of_text)
def convert_pool_end_of_text(ctx: ConversionContext, target: Any, args: tuple, kwargs: dict, name: str) -> trt.ITensor:
    """[B, T, W] and int32 [B, T] -> [B, W]: the row of the first highest token id, found in int32.

    Torch-TensorRT 2.2 casts the tokens to float for argmax, and half holds no 49407: start and end
    of text become equal and the features silently wrong.  Here the position is the smallest
    index at which a token equals the row's maximum, and every step of that is int32.
    """
    x, tokens = args
    length = tokens.shape[1]
    highest = ctx.net.add_reduce(tokens, trt.ReduceOperation.MAX, 1 << 1, True)
    highest.name = f"{name}_highest"
    is_highest = elementwise(ctx, tokens, highest.get_output(0), trt.ElementWiseOperation.EQUAL, f"{name}_is_highest")
    index = constant(ctx, np.arange(length, dtype=np.int32).reshape(1, length), f"{name}_indices")
    beyond = constant(ctx, np.full((1, length), length, dtype=np.int32), f"{name}_beyond")
    candidates = ctx.net.add_select(is_highest, index, beyond)
    candidates.name = f"{name}_candidates"
    position = ctx.net.add_reduce(candidates.get_output(0), trt.ReduceOperation.MIN, 1 << 1, True)
    position.name = f"{name}_position"
    rows = ctx.net.add_gather(x, position.get_output(0), 1)
    rows.name, rows.num_elementwise_dims = f"{name}_rows", 1
    return shuffle(ctx, rows.get_output(0), name, shape=(0, x.shape[2]))


@register(torch.ops.aten.layer_norm.default)
def convert_layer_norm(ctx: ConversionContext, target: Any, args: tuple, kwargs: dict, name: str) -> trt.ITensor:
    """Layer norm over the last axis as one INormalizationLayer, which computes in fp32, or as a plugin.

    Torch-TensorRT 2.2 emits nine elementwise layers that overflow in half.
    """
    x, _, scale, bias, epsilon = args
    if by_plugin(ctx):
        constants = [constant(ctx, value, f"{name}_{which}") for which, value in (("scale", scale), ("shift", bias))]
        fields = {"residual": np.int32(0), "epsilon": np.float32(epsilon)}
        return plugin_layer(ctx, kernels.RESIDUAL_LAYER_NORM, [x, *constants], fields, name).get_output(0)
    rank = len(x.shape)
    layer = ctx.net.add_normalization(x, constant(ctx, with_rank(scale, rank), f"{name}_scale"),
                                      constant(ctx, with_rank(bias, rank), f"{name}_bias"), 1 << (rank - 1))
    layer.name, layer.epsilon, layer.compute_precision = name, epsilon, trt.float32
    return layer.get_output(0)


@register(torch.ops.aten.select.int)
def convert_select(ctx: ConversionContext, target: Any, args: tuple, kwargs: dict, name: str) -> trt.ITensor:
    """One index of the second of three axes, [B, T, W] -> [B, W], as a slice.

    Torch-TensorRT 2.2 makes a gather of it, which TensorRT 8.6 fuses into the addition before it,
    and badly where the batch is dynamic.
    """
    x, axis, index = args
    if len(x.shape) != 3 or axis != 1:
        raise NotImplementedError(f"select on axis {axis} of {len(x.shape)}: only the second of three is converted")
    width = x.shape[2]
    layer = ctx.net.add_slice(x, (0, index, 0), (max(x.shape[0], 1), 1, width), (1, 1, 1))
    layer.name = name
    if x.shape[0] == -1:
        keep, one = (constant(ctx, np.array(value, dtype=np.int32), f"{name}_{which}") for value, which in (((1, 0, 1), "keep"), ((0, 1, 0), "one")))
        size = elementwise(ctx, ctx.net.add_shape(x).get_output(0), keep, trt.ElementWiseOperation.PROD, f"{name}_kept")
        layer.set_input(2, elementwise(ctx, size, one, trt.ElementWiseOperation.SUM, f"{name}_size"))
    return shuffle(ctx, layer.get_output(0), f"{name}_squeezed", shape=(-1, width))
