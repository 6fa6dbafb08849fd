"""Converters of our operations: a graph's nodes -> TensorRT layers, registered by the import.

Only ops of our own have one here, so no other model's network changes.  Every converter works with
a dynamic batch, those of the text encoder with a dynamic length, too: a reshape writes 0 ("keep")
or -1 ("what is left") for it.  Networks are strongly typed: a layer computes in the type of its
inputs, and constants take that type, but for layer norm, which is put between casts to fp32, and
the plugins' fp32 constants.
"""
from dataclasses import dataclass
from typing import Any, Callable, Union

import numpy as np
import torch

from clip_ttrt import kernels, linear, ops, trt as seam
from clip_ttrt.models import HEAD_DIM

trt = seam.api()

# Added to a masked score, once or several times.  exp() of it is exactly zero, and unlike -inf it
# cannot make a NaN on the way.
MASKED = -3e4

TORCH_TYPES = {
    trt.float32: torch.float, trt.float16: torch.half, trt.bfloat16: torch.bfloat16,
    trt.int32: torch.int32, trt.int64: torch.int64, trt.fp8: ops.E4M3,
}
TRT_TYPES = {value: key for key, value in TORCH_TYPES.items()}


@dataclass
class Layers:
    """Adds one node's layers to a network, each under the node's name and a suffix of its own.

    Every method returns the layer's first output.
    """

    net: Any
    name: str

    def named(self, layer: Any, suffix: str = "") -> Any:
        layer.name = f"{self.name}_{suffix}" if suffix else self.name
        return layer.get_output(0)

    def constant(self, value: torch.Tensor, suffix: str, dtype: torch.dtype) -> Any:
        value = seam.hold(value.detach().to("cpu", dtype).contiguous())
        weights = trt.Weights(TRT_TYPES[dtype], value.data_ptr(), value.numel())
        return self.named(self.net.add_constant(tuple(value.shape), weights), suffix)

    def beside(self, x: Any, value: Union[torch.Tensor, float], suffix: str) -> Any:
        """A constant of x's type and rank, since TensorRT broadcasts equal ranks only."""
        value = torch.as_tensor(value)
        value = value.reshape((1,) * (len(x.shape) - value.dim()) + tuple(value.shape))
        return self.constant(value, suffix, TORCH_TYPES[x.dtype])

    def shuffle(self, x: Any, suffix: str = "", shape: tuple = (), order: tuple = ()) -> Any:
        """Reshape (0 keeps a dimension), then transpose; either may be left out."""
        layer = self.net.add_shuffle(x)
        if shape:
            layer.reshape_dims = shape
        if order:
            layer.second_transpose = order
        return self.named(layer, suffix)

    def elementwise(self, operation: str, a: Any, b: Any, suffix: str = "") -> Any:
        kind = getattr(trt.ElementWiseOperation, operation)
        return self.named(self.net.add_elementwise(a, b, kind), suffix)

    def product(self, a: Any, b: Any, b_is: str, suffix: str = "") -> Any:
        """a·b, where b is NONE or TRANSPOSE."""
        none, b_is = trt.MatrixOperation.NONE, getattr(trt.MatrixOperation, b_is)
        return self.named(self.net.add_matrix_multiply(a, none, b, b_is), suffix)

    def reduce(self, operation: str, x: Any, suffix: str) -> Any:
        """[B, N, ..] -> [B, 1, ..]."""
        kind = getattr(trt.ReduceOperation, operation)
        return self.named(self.net.add_reduce(x, kind, 1 << 1, True), suffix)

    def cast(self, x: Any, dtype: Any, suffix: str = "") -> Any:
        """x in a type of TensorRT's: a layer where it has another."""
        return x if x.dtype == dtype else self.named(self.net.add_cast(x, dtype), suffix)

    def count(self, x: Any, steps: tuple, suffix: str) -> Any:
        """Numbers of x's type from 0 on, by `steps` along x's axes, of size 1 where a step is 0."""
        shape, ones = self.net.add_shape(x).get_output(0), steps.count(0)  # the first
        own = self.net.add_slice(shape, (ones,), (len(steps) - ones,), (1,)).get_output(0)
        shape = [self.beside(own, torch.ones(ones), f"{suffix}_ones"), own]
        layer = self.net.add_fill((), trt.FillOperation.LINSPACE, x.dtype)
        layer.set_input(0, self.named(self.net.add_concatenation(shape), f"{suffix}_shape"))
        for i, value in enumerate((0, steps), 1):
            value = self.constant(torch.tensor(value), f"{suffix}_{i}", TORCH_TYPES[x.dtype])
            layer.set_input(i, value)
        return self.named(layer, suffix)

    def part(self, x: Any, start: tuple, sizes: tuple, strides: tuple, batch: Any,
             suffix: str) -> Any:
        """A slice [B, *sizes] of x, where B is another tensor's batch."""
        layer = self.net.add_slice(x, start, (max(batch.shape[0], 1), *sizes), strides)
        if batch.shape[0] == -1:
            shape = self.net.add_shape(batch).get_output(0)
            first = self.net.add_slice(shape, (0,), (1,), (1,)).get_output(0)
            rest = self.beside(shape, torch.tensor(sizes), f"{suffix}_sizes")
            shape = self.net.add_concatenation([first, rest])
            layer.set_input(2, self.named(shape, f"{suffix}_shape"))
        return self.named(layer, suffix)


def converter(op: Any):
    """Register a function of `Layers` and the op's arguments as its converter."""
    def register(convert: Callable) -> Callable:
        seam.register(op, lambda net, name, args: convert(Layers(net, name), *args))
        return convert

    return register


@converter(ops.cast)
def convert_cast(to, x, dtype):
    return to.cast(x, TRT_TYPES[dtype])


@converter(ops.linear)
def convert_linear(to, x, weight, bias):
    """The weight is a constant, or what has been made of one."""
    weight = to.beside(x, weight, "weight") if isinstance(weight, torch.Tensor) else weight
    product = to.product(x, weight, "TRANSPOSE")
    if bias is None:
        return product
    return to.elementwise("SUM", product, to.beside(x, bias, "bias"), "biased")


@converter(ops.quantized_linear)
def convert_quantized_linear(to, x, weight, bias, x_scale, weight_scale):
    """A product between layers that quantise and dequantise, which TensorRT makes one in fp8."""
    x_scale, weight_scale = (
        to.constant(torch.tensor(scale), f"{which}_scale", TORCH_TYPES[x.dtype])
        for which, scale in (("x", x_scale), ("weight", weight_scale)))
    shape = (1,) * (len(x.shape) - 2) + tuple(weight.shape)
    weight8 = to.constant(weight.reshape(shape), "weight_e4m3", ops.E4M3)
    x8 = to.named(to.net.add_quantize(x, x_scale, trt.fp8), "x_e4m3")
    x = to.named(to.net.add_dequantize(x8, x_scale, x.dtype), "x")
    weight = to.named(to.net.add_dequantize(weight8, weight_scale, x.dtype), "weight")
    return convert_linear(to, x, weight, bias)


@converter(ops.add)
def convert_add(to, a, b):
    """Either may be a constant."""
    a = to.beside(b, a, "a") if isinstance(a, torch.Tensor) else a
    b = to.beside(a, b, "b") if isinstance(b, torch.Tensor) else b
    return to.elementwise("SUM", a, b)


@converter(ops.layer_norm)
def convert_layer_norm(to, x, scale, shift, epsilon):
    """One normalization layer over the last axis, in fp32."""
    wide = to.cast(x, trt.float32, "fp32")
    scale, shift = to.beside(wide, scale, "scale"), to.beside(wide, shift, "shift")
    add = getattr(to.net, "add_normalization_v2", to.net.add_normalization)
    layer = add(wide, scale, shift, 1 << (len(x.shape) - 1))
    layer.epsilon = epsilon
    return to.cast(to.named(layer), x.dtype, "back")


@converter(ops.gelu)
def convert_gelu(to, x, approximate):
    if approximate != "quick":
        kind = {"none": "GELU_ERF", "tanh": "GELU_TANH"}[approximate]
        return to.named(to.net.add_activation(x, getattr(trt.ActivationType, kind)))
    scaled = to.elementwise("PROD", x, to.beside(x, ops.QUICK_GELU_SLOPE, "slope"), "scaled")
    sigmoid = to.named(to.net.add_activation(scaled, trt.ActivationType.SIGMOID), "sigmoid")
    return to.elementwise("PROD", x, sigmoid)


@converter(ops.embedding)
def convert_embedding(to, weight, tokens):
    weight = to.constant(weight, "weight", weight.dtype)
    return to.named(to.net.add_gather(weight, tokens, 0))


@converter(ops.positions_of)
def convert_positions_of(to, positions, tokens):
    return convert_embedding(to, positions, to.count(tokens, (0, 1), "places"))


@converter(ops.attention)
def convert_attention(to, qkv, heads, causal):
    """TensorRT's own attention where the network has one, else what it fuses."""
    width = qkv.shape[2] // 3
    split = to.shuffle(qkv, "split", (0, 0, 3, heads, width // heads), (2, 0, 3, 1, 4))

    def part(index: int, which: str) -> Any:
        index = to.constant(torch.tensor(index), f"{which}_index", torch.int32)
        return to.named(to.net.add_gather(split, index, 0), which)

    query, key, value = map(part, range(3), ("query", "key", "value"))
    scale = to.beside(query, (width // heads) ** -0.5, "scale")
    query = to.elementwise("PROD", query, scale, "scaled")
    attend = attention_layer if hasattr(to.net, "add_attention") else composed_attention
    attended = attend(to, query, key, value, causal)
    attended = to.shuffle(attended, "heads_last", order=(0, 2, 1, 3))
    return to.shuffle(attended, shape=(0, 0, width))


def attention_layer(to, query, key, value, causal):
    softmax = trt.AttentionNormalizationOp.SOFTMAX
    layer = seam.hold(to.net.add_attention(query, key, value, softmax, causal))
    layer.decomposable = True  # where TensorRT has no kernel for it
    return layer.get_output(0)


def composed_attention(to, query, key, value, causal):
    """Attention as product, softmax and product, in fp32.

    In half TensorRT 10.6 does not always take its one kernel for the three, and what it takes
    instead adds up in half.
    """
    dtype = value.dtype
    query, key, value = (to.cast(x, trt.float32, f"{which}_fp32") for which, x in
                         (("query", query), ("key", key), ("value", value)))
    scores = to.product(query, key, "TRANSPOSE", "scores")
    if causal:
        ahead = to.count(scores, (0, 0, -MASKED, MASKED), "ahead")  # below 0 where a key is
        mask = to.elementwise("MIN", ahead, to.beside(ahead, 0, "seen"), "mask")
        scores = to.elementwise("SUM", scores, mask, "masked")
    softmax = to.net.add_softmax(scores)
    softmax.axes = 1 << 3
    attended = to.product(to.named(softmax, "weights"), value, "NONE", "attended")
    return to.cast(attended, dtype, "attended_back")


@converter(ops.extract_patches)
def convert_extract_patches(to, images, size):
    channels, resolution = images.shape[1:3]
    side = resolution // size
    if resolution % size:
        sizes = channels, side * size, side * size
        images = to.part(images, (0,) * 4, sizes, (1,) * 4, images, "whole")
    shape = (0, channels, side, size, side, size)
    cut = to.shuffle(images, "cut", shape, (0, 2, 4, 1, 3, 5))
    return to.shuffle(cut, shape=(0, side * side, channels * size * size))


@converter(ops.prepend_class_token)
def convert_prepend_class_token(to, patches, class_token):
    """The token is a slice of stride 0, once for each sample."""
    token = to.beside(patches, class_token, "token")
    rows = to.part(token, (0, 0, 0), (1, patches.shape[2]), (0, 1, 1), patches, "rows")
    layer = to.net.add_concatenation([rows, patches])
    layer.axis = 1
    return to.named(layer)


@converter(ops.select_token)
def convert_select_token(to, x, index):
    row = to.part(x, (0, index, 0), (1, x.shape[2]), (1, 1, 1), x, "row")
    return to.shuffle(row, shape=(-1, x.shape[2]))


@converter(ops.pool_end_of_text)
def convert_pool_end_of_text(to, x, tokens):
    """The row of the first highest token id, found in int32.

    The position is the smallest index at which a token equals the row's maximum.  In half, which
    holds no 49407, start and end of text would be equal and the features silently wrong.
    """
    highest = to.reduce("MAX", tokens, "highest")
    is_highest = to.elementwise("EQUAL", tokens, highest, "is_highest")
    index = to.count(tokens, (0, 1), "indices")
    beyond = to.beside(tokens, torch.iinfo(torch.int32).max, "beyond")
    candidates = to.named(to.net.add_select(is_highest, index, beyond), "candidates")
    rows = to.net.add_gather(x, to.reduce("MIN", candidates, "position"), 1)
    rows.num_elementwise_dims = 1
    return to.shuffle(to.named(rows, "rows"), shape=(0, x.shape[2]))


@converter(ops.mean_of_patches)
def convert_mean_of_patches(to, x):
    """A product with one row of weights, summed in fp32."""
    tokens, wide = x.shape[1], to.cast(x, trt.float32, "fp32")
    weights = torch.tensor([[0.0] + [1 / (tokens - 1)] * (tokens - 1)])
    mean = to.product(to.beside(wide, weights, "weights"), wide, "NONE", "mean")
    return to.shuffle(to.cast(mean, x.dtype, "back"), shape=(0, x.shape[2]))


@converter(ops.attention_pool)
def convert_attention_pool(to, x, positions, query_weight, query_bias, key_weight, value_weight):
    """As the reference; heads stand before the batch where each has a weight of its own."""
    channels, side = x.shape[1:3]
    of_heads, swapped = (channels // HEAD_DIM, HEAD_DIM), (1, 0, 2)
    rows = to.cast(x, trt.float32, "fp32")
    rows = to.shuffle(rows, "rows", (0, channels, side * side), (0, 2, 1))
    layer = to.net.add_concatenation([to.reduce("AVG", rows, "mean"), rows])
    layer.axis = 1
    tokens = to.named(layer, "with_mean")
    tokens = to.elementwise("SUM", tokens, to.beside(tokens, positions, "positions"), "tokens")

    query = to.part(tokens, (0, 0, 0), (1, channels), (1, 1, 1), x, "first")
    query = to.cast(query, x.dtype, "first_back")
    query = convert_linear(Layers(to.net, f"{to.name}_query"), query, query_weight, query_bias)
    query = to.elementwise("PROD", query, to.beside(query, HEAD_DIM ** -0.5, "scale"), "scaled")
    query = to.shuffle(query, "of_heads", (0, *of_heads), swapped)
    weight = to.beside(query, key_weight.unflatten(0, of_heads), "key_weight")
    sought = to.shuffle(to.product(query, weight, "NONE", "keys"), "sought", order=swapped)
    scores = to.product(to.cast(sought, trt.float32, "sought_fp32"), tokens, "TRANSPOSE", "scores")
    return attended(to, scores, tokens, value_weight, x.dtype)


@converter(ops.attention_probe)
def convert_attention_probe(to, x, sought, value_weight):
    """Scores as tokens by heads: the other way round TensorRT 10.6 gets them wrong in fp32."""
    tokens = to.cast(x, trt.float32, "fp32")
    found = to.product(tokens, to.beside(tokens, sought, "sought"), "TRANSPOSE", "found")
    scores = to.shuffle(found, "scores", order=(0, 2, 1))
    return attended(to, scores, tokens, value_weight, x.dtype)


def attended(to, scores, tokens, value_weight, dtype):
    """The values of what heads seek, from scores [B, H, T], as the references' `_attend`."""
    heads, swapped = scores.shape[1], (1, 0, 2)
    softmax = to.net.add_softmax(scores)
    softmax.axes = 1 << 2
    pooled = to.product(to.named(softmax, "weights"), tokens, "NONE", "pooled")
    pooled = to.shuffle(to.cast(pooled, dtype, "pooled_back"), "pooled_heads", order=swapped)
    weight = to.beside(pooled, value_weight.unflatten(0, (heads, -1)), "value_weight")
    values = to.product(pooled, weight, "TRANSPOSE", "values")
    return to.shuffle(to.shuffle(values, "heads_last", order=swapped),
                      shape=(0, value_weight.shape[0]))


@converter(ops.clamp_tokens)
def convert_clamp_tokens(to, tokens, vocabulary):
    least, most = to.beside(tokens, 0, "least"), to.beside(tokens, vocabulary - 1, "most")
    return to.elementwise("MIN", to.elementwise("MAX", tokens, least, "from"), most)


@converter(ops.mask_unknown)
def convert_mask_unknown(to, features, tokens, clamped):
    equal = to.elementwise("EQUAL", tokens, clamped, "equal")
    equal = to.cast(equal, trt.int32, "equal_int32")
    known = to.cast(to.reduce("MIN", equal, "known_int32"), trt.bool, "known")
    return to.named(to.net.add_select(known, features, to.beside(features, float("nan"), "nan")))


@converter(ops.split_tokens)
def convert_split_tokens(to, x, tokens):
    return to.shuffle(x, shape=(-1, tokens, x.shape[1]))


def plugin(op: Any, plugin: str, fields: Callable[..., dict[str, Any]],
           constants: torch.dtype = torch.float) -> None:
    """Register the converter of an op that is one plugin, which `kernels.load` has registered.

    Its inputs are the op's tensors in their order, parameters as constants of a dtype.  fields: the
    op's arguments -> the plugin's fields, which are int32, float32 or, of bytes, int8.  E4M3
    travels as half of half the width, which every TensorRT moves, slices and gathers.
    """
    @converter(op)
    def convert(to, *args):
        inputs = [to.constant(value.view(torch.half) if value.dtype == ops.E4M3 else value,
                              f"constant{i}", constants)
                  if isinstance(value, torch.Tensor) else value
                  for i, value in enumerate(args) if hasattr(value, "shape")]
        arrays = {key: np.frombuffer(value, np.int8) if isinstance(value, bytes) else
                  np.array([value], np.float32 if isinstance(value, float) else np.int32)
                  for key, value in fields(*args).items()}
        collection = trt.PluginFieldCollection([
            trt.PluginField(key, value, getattr(trt.PluginFieldType, value.dtype.name.upper()))
            for key, value in arrays.items()])
        creator = trt.get_plugin_registry().get_creator(plugin, kernels.version(), "")
        created = creator and creator.create_plugin(to.name, collection, trt.TensorRTPhase.BUILD)
        if not created:
            raise RuntimeError(f"{plugin} {kernels.version()} cannot be created with {arrays}")
        layer = to.net.add_plugin_v3(inputs, [], created)
        layer.name = to.name
        outputs = tuple(layer.get_output(i) for i in range(layer.num_outputs))
        return outputs if len(outputs) > 1 else outputs[0]


plugin(ops.fused_attention, kernels.ATTENTION,
       lambda qkv, heads, causal, query_bias=None, out_scale=0.0: {
           "tokens": max(qkv.shape[1], 0), "heads": heads, "head_dim": qkv.shape[2] // 3 // heads,
           "causal": causal, "query_bias": query_bias is not None, "out_scale": out_scale})
# A table says what was measured before the network was built, and the sizes.
plugin(ops.fused_linear, kernels.LINEAR, lambda x, weight, bias, table="": {
    "table": bytes.fromhex(table) or linear.pack(*weight.shape, bias is not None)}, torch.half)
plugin(ops.fused_quantized_linear, kernels.LINEAR, lambda x, weight, bias, scale, table="": {
    "table": bytes.fromhex(table) or linear.pack(*weight.shape, bias is not None, scale=scale)},
    torch.half)
plugin(ops.bias_gelu, kernels.BIAS_GELU, lambda x, bias, approximate, out_scale=0.0: {
    "approximate": kernels.GELUS.index(approximate), "out_scale": out_scale})
plugin(ops.fused_layer_norm, kernels.RESIDUAL_LAYER_NORM,
       lambda x, scale, shift, epsilon, out_scale=0.0: {
           "residual": 0, "epsilon": epsilon, "out_scale": out_scale})
plugin(ops.residual_layer_norm, kernels.RESIDUAL_LAYER_NORM,
       lambda x, delta, bias, scale, shift, epsilon, out_scale=0.0: {
           "residual": 1, "epsilon": epsilon, "out_scale": out_scale})
plugin(ops.extract_patch_rows, kernels.EXTRACT_PATCHES, lambda images, size, dtype: {
    "patch_size": size})
plugin(ops.embed_image, kernels.EMBED_IMAGE, lambda patches, token, positions, *norms: {
    "tokens": positions.shape[0], "epsilon_pre": norms[2], "epsilon_1": norms[5],
    "out_scale": (*norms, 0.0)[6]})
