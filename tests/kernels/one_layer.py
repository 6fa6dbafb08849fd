"""Networks of one plugin layer in TensorRT, for tests on a GPU."""

import functools

import numpy as np
import pytest
import torch

from clip_ttrt import kernels, stack

ROWS = (1, 16, 64)  # the profile of sizes that are -1


def tensorrt():
    """TensorRT's Python, which knows the plugins; skips where it is not installed or cannot."""
    if stack.tensorrt_major() is None:
        pytest.skip("TensorRT is not installed")
    import tensorrt as trt

    if problem := kernels.obstacle():
        pytest.skip(problem)
    kernels.load(kernels.version())
    return trt


def field(trt, name, value):
    """A field as a converter gives it: an int, a float, or bytes."""
    if isinstance(value, bytes):
        return trt.PluginField(name, np.frombuffer(value, np.int8), trt.PluginFieldType.INT8)
    if isinstance(value, float):
        return trt.PluginField(name, np.float32([value]), trt.PluginFieldType.FLOAT32)
    return trt.PluginField(name, np.int32([value]), trt.PluginFieldType.INT32)


def creator(trt, name):
    return trt.get_plugin_registry().get_creator(name, kernels.version(), "")


def create(trt, name, fields):
    """The plugin with a list of fields, or name -> value; None where it refuses them."""
    if isinstance(fields, dict):
        fields = [field(trt, key, value) for key, value in fields.items()]
    collection = trt.PluginFieldCollection(fields)
    return creator(trt, name).create_plugin(name, collection, trt.TensorRTPhase.BUILD)


@functools.cache
def first_builder(trt):
    """Kept: TensorRT reads its kernels for the first builder, and forgets them with the last."""
    return trt.Builder(trt.Logger(trt.Logger.ERROR))


def build(trt, plugin, inputs, outputs=1):
    """The plan of a strongly typed network x0, .. -> plugin -> y0, ..; None where it is refused.

    inputs: (torch dtype, shape) of each, -1 for a size of ROWS.
    """
    builder = first_builder(trt)
    flags = trt.NetworkDefinitionCreationFlag
    typed = getattr(flags, "STRONGLY_TYPED", None)
    network = builder.create_network(0 if typed is None else 1 << int(typed))
    config = builder.create_builder_config()
    profile = builder.create_optimization_profile()
    kinds = {torch.half: trt.float16, torch.float32: trt.float32}
    tensors = []
    for i, (kind, shape) in enumerate(inputs):
        tensors.append(network.add_input(f"x{i}", kinds[kind], shape))
        if -1 in shape:
            sizes = (tuple(rows if size == -1 else size for size in shape) for rows in ROWS)
            profile.set_shape(f"x{i}", *sizes)
    layer = network.add_plugin_v3(tensors, [], plugin)
    if layer is None:
        return None
    for i in range(outputs):
        layer.get_output(i).name = f"y{i}"
        network.mark_output(layer.get_output(i))
    config.add_optimization_profile(profile)
    return builder.build_serialized_network(network, config)


class Engine:
    """A plan, ready to run."""

    def __init__(self, trt, plan):
        self.trt = trt
        self.runtime = trt.Runtime(trt.Logger(trt.Logger.ERROR))
        self.engine = self.runtime.deserialize_cuda_engine(plan)
        self.context = self.engine.create_execution_context()

    def __call__(self, *inputs):
        """The outputs, which are NaN where nothing is written; in a stream of its own."""
        context = self.context
        for i, x in enumerate(inputs):
            assert context.set_input_shape(f"x{i}", tuple(x.shape))
            context.set_tensor_address(f"x{i}", x.data_ptr())
        outputs = []
        for name in (f"y{i}" for i in range(self.engine.num_io_tensors - len(inputs))):
            assert self.engine.get_tensor_dtype(name) == self.trt.float16
            shape = tuple(context.get_tensor_shape(name))
            outputs.append(torch.full(shape, float("nan"), dtype=torch.half, device="cuda"))
            context.set_tensor_address(name, outputs[-1].data_ptr())
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        assert context.execute_async_v3(stream.cuda_stream)
        stream.synchronize()
        return outputs
