"""A constructed network's output, its layers computed by PyTorch: what no GPU is needed for."""
import torch
import torch.nn.functional as F

from clip_ttrt import converters, trt

api = trt.api()
ARITHMETIC = {"SUM": torch.add, "PROD": torch.mul, "MAX": torch.maximum, "MIN": torch.minimum,
              "EQUAL": torch.eq}
TYPES = {**converters.TORCH_TYPES, api.bool: torch.bool}


def name_of(member):
    return str(member).rpartition(".")[2]


def cast(layer, x):
    return x.to(TYPES[layer.to_type])


def constant(layer):
    return torch.as_tensor(layer.weights).reshape(tuple(layer.shape))


def matrix_multiply(layer, a, b):
    assert layer.op0 == api.MatrixOperation.NONE
    return a @ (b.mT if layer.op1 == api.MatrixOperation.TRANSPOSE else b)


def softmax(layer, x):
    return x.softmax(layer.axes.bit_length() - 1)


def shuffle(layer, x):
    shape = layer.reshape_dims
    if shape is not None:
        x = x.reshape([x.shape[i] if size == 0 else size for i, size in enumerate(shape)])
    return x.permute(list(layer.second_transpose)[:x.dim()])


def slice_(layer, x, *shape):
    shape = shape[0].tolist() if shape else layer.shape
    for axis, (start, size, step) in enumerate(zip(layer.start, shape, layer.stride)):
        x = x.index_select(axis, start + step * torch.arange(size))
    return x


def shape(layer, x):
    return torch.tensor(x.shape)


def concatenation(layer, *parts):
    return torch.cat(parts, layer.axis)


def elementwise(layer, a, b):
    return ARITHMETIC[name_of(layer.op)](a, b)


def reduce(layer, x):
    assert layer.axes == 1 << 1 and layer.keep_dims
    operation = {"MAX": x.amax, "MIN": x.amin, "AVG": x.mean}[name_of(layer.op)]
    return operation(1, keepdim=True)


def normalization(layer, x, scale, shift):
    return F.layer_norm(x, x.shape[-1:], scale.flatten(), shift.flatten(), layer.epsilon)


def activation(layer, x):
    if (name := name_of(layer.type)) == "SIGMOID":
        return x.sigmoid()
    return F.gelu(x, approximate={"GELU_TANH": "tanh", "GELU_ERF": "none"}[name])


def gather(layer, x, index):
    if layer.axis == layer.num_elementwise_dims == 0:
        return x[index]
    assert layer.axis == layer.num_elementwise_dims == 1
    return torch.stack([rows[places] for rows, places in zip(x, index, strict=True)])


def fill(layer, sizes, start, steps):
    assert name_of(layer.operation) == "LINSPACE"
    found, axes = torch.full(sizes.tolist(), start.item(), dtype=start.dtype), len(sizes)
    for axis, (size, step) in enumerate(zip(sizes.tolist(), steps, strict=True)):
        along = step * torch.arange(size).view(-1, *[1] * (axes - axis - 1))
        found += along.to(start.dtype)
    return found


def select(layer, condition, a, b):
    return torch.where(condition, a, b)


KINDS = {  # of a layer -> its class and its function
    "CAST": ("ICastLayer", cast), "CONSTANT": ("IConstantLayer", constant),
    "MATRIX_MULTIPLY": ("IMatrixMultiplyLayer", matrix_multiply), "SHAPE": ("IShapeLayer", shape),
    "SOFTMAX": ("ISoftMaxLayer", softmax), "SHUFFLE": ("IShuffleLayer", shuffle),
    "SLICE": ("ISliceLayer", slice_), "CONCATENATION": ("IConcatenationLayer", concatenation),
    "ELEMENTWISE": ("IElementWiseLayer", elementwise), "REDUCE": ("IReduceLayer", reduce),
    "NORMALIZATION": ("INormalizationLayer", normalization), "SELECT": ("ISelectLayer", select),
    "ACTIVATION": ("IActivationLayer", activation), "GATHER": ("IGatherLayer", gather),
    "FILL": ("IFillLayer", fill),
}  # fmt: skip


def evaluate(network, x):
    """The output of a network of one input and one output, for an x of its type."""
    values, layers = {network.get_input(0).name: x}, []
    for i in range(network.num_layers):
        layer = network.get_layer(i)
        kind, function = KINDS[name_of(layer.type)]
        layer.__class__ = getattr(api, kind)
        inputs = [layer.get_input(j) for j in range(layer.num_inputs)]
        layers.append((layer, function, [each.name for each in inputs if each is not None]))
    while layers:  # a slice may come before what its sizes are computed by
        layer, function, names = layers.pop(0)
        if values.keys() >= {*names}:
            output = layer.get_output(0)
            found = function(layer, *(values[name] for name in names))
            assert found.dtype == TYPES[output.dtype], layer.name
            assert all(size in (-1, real) for size, real in zip(output.shape, found.shape))
            values[output.name] = found
        else:
            layers.append((layer, function, names))
    return values[network.get_output(0).name]
