"""What a TensorRT network computes, layer by layer in PyTorch: no GPU runs an engine here.

By TensorRT's documentation of its layers; a layer or an option that no text encoder has fails.
"""
import numpy as np
import torch

from clip_ttrt import trt


def evaluate(network, x):
    """The network's one output for its one input."""
    layers = [network.get_layer(i) for i in range(network.num_layers)]
    found, makers = {network.get_input(0).name: x}, {}
    for layer in layers:
        makers[layer.get_output(0).name] = layer

    def value(name):
        if name not in found:
            layer = makers[name]
            kind = layer.type.name
            names = [layer.get_input(i) for i in range(layer.num_inputs)]
            inputs = [each and value(each.name) for each in names]
            layer.__class__ = getattr(trt.api(), CLASSES[kind])  # or it has nothing of its own
            found[name] = LAYERS[kind](layer, *inputs)
        return found[name]

    return value(network.get_output(0).name)


def constant(layer):
    weights = layer.weights
    array = weights.numpy() if hasattr(weights, "numpy") else np.asarray(weights)
    return torch.from_numpy(array.copy()).reshape(tuple(layer.shape))


def shuffle(layer, x):
    assert tuple(layer.first_transpose)[:x.dim()] == tuple(range(x.dim()))
    if (shape := layer.reshape_dims) is not None:
        x = x.reshape([x.shape[j] if size == 0 else size for j, size in enumerate(shape)])
    return x.permute(tuple(layer.second_transpose)[:x.dim()])


def elementwise(layer, a, b):
    functions = {"SUM": torch.add, "PROD": torch.mul, "MAX": torch.maximum, "MIN": torch.minimum,
                 "EQUAL": torch.eq, "SUB": torch.sub}
    assert a.dtype == b.dtype and a.dim() == b.dim()
    return functions[layer.op.name](a, b)


def reduce(layer, x):
    assert layer.axes == 2 and layer.keep_dims
    return {"MAX": torch.amax, "MIN": torch.amin}[layer.op.name](x, 1, keepdim=True)


def cut(layer, x, start=None, sizes=None):
    assert start is None
    sizes = tuple(layer.shape) if sizes is None else sizes.tolist()
    for axis, (begin, size, step) in enumerate(zip(layer.start, sizes, layer.stride, strict=True)):
        x = x.index_select(axis, begin + step * torch.arange(size))
    return x


def gather(layer, x, index):
    if layer.num_elementwise_dims == 0:
        return x[(slice(None),) * layer.axis + (index.long(),)]
    assert (layer.num_elementwise_dims, layer.axis) == (1, 1)
    return torch.stack([row[places.long()] for row, places in zip(x, index, strict=True)])


def fill(layer, sizes, start, steps):
    assert layer.operation.name == "LINSPACE" and len(steps) == len(sizes)
    found = torch.full(sizes.tolist(), start.item(), dtype=start.dtype)
    for axis, (size, step) in enumerate(zip(sizes.tolist(), steps, strict=True)):
        along = step * torch.arange(size)
        found += along.to(start.dtype).view(-1, *[1] * (len(sizes) - axis - 1))
    return found


def product(layer, a, b):
    def turned(x, how):
        return x.mT if how.name == "TRANSPOSE" else x

    return turned(a, layer.op0) @ turned(b, layer.op1)


def normalization(layer, x, scale, shift):
    assert layer.axes == 1 << (x.dim() - 1)
    norm = torch.nn.functional.layer_norm(x, x.shape[-1:], eps=layer.epsilon)
    return norm * scale + shift


def softmax(layer, x):
    return x.softmax(layer.axes.bit_length() - 1)


def cast(layer, x):
    from clip_ttrt.converters import TORCH_TYPES

    return x.to({**TORCH_TYPES, trt.api().bool: torch.bool}[layer.to_type])


CLASSES = {
    "CONSTANT": "IConstantLayer", "SHUFFLE": "IShuffleLayer", "ELEMENTWISE": "IElementWiseLayer",
    "REDUCE": "IReduceLayer", "SLICE": "ISliceLayer", "GATHER": "IGatherLayer",
    "CAST": "ICastLayer", "FILL": "IFillLayer", "MATRIX_MULTIPLY": "IMatrixMultiplyLayer",
    "SOFTMAX": "ISoftMaxLayer", "NORMALIZATION": "INormalizationLayer",
    "CONCATENATION": "IConcatenationLayer",
    "SHAPE": "IShapeLayer", "SELECT": "ISelectLayer", "ACTIVATION": "IActivationLayer",
}
LAYERS = {
    "CONSTANT": constant, "SHUFFLE": shuffle, "ELEMENTWISE": elementwise, "REDUCE": reduce,
    "SLICE": cut, "GATHER": gather, "CAST": cast, "FILL": fill, "MATRIX_MULTIPLY": product,
    "SOFTMAX": softmax, "NORMALIZATION": normalization,
    "CONCATENATION": lambda layer, *parts: torch.cat(parts, layer.axis),
    "SHAPE": lambda layer, x: torch.tensor(x.shape),
    "SELECT": lambda layer, condition, a, b: torch.where(condition, a, b),
    "ACTIVATION": lambda layer, x: x.sigmoid() if layer.type.name == "SIGMOID" else x / 0,
}
