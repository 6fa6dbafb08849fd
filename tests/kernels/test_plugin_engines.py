"""The plugins in TensorRT itself: their creators, and engines of one plugin layer."""
import subprocess
import sys

import needs
import numpy as np
import pytest
import torch
from plugins import FIELDS, each_form, each_wrong_shape

from clip_ttrt import kernels, linear, stack

pytestmark = [pytest.mark.gpu, needs.ampere]

REGISTER = """
import tensorrt as trt
class Log(trt.ILogger):
    def __init__(self):
        trt.ILogger.__init__(self)
    def log(self, severity, text):
        if severity <= trt.ILogger.ERROR:
            print("error:", text)
log = Log()
runtime = trt.Runtime(log)
from clip_ttrt import kernels
for _ in range(2):
    kernels.load(kernels.version())
names = [getattr(one, "name", "") for one in trt.get_plugin_registry().all_creators]
print(sorted(one for one in names if one.startswith("Clip") and one != "Clip_TRT"))
"""


@pytest.fixture(scope="module")
def trt():
    """TensorRT's Python, which knows the plugins."""
    if stack.tensorrt_major() is None:
        pytest.skip("TensorRT is not installed")
    import tensorrt

    if problem := kernels.obstacle():
        pytest.skip(problem)
    kernels.load(kernels.version())
    # TensorRT reads its kernels for the first builder, and forgets them with the last.
    tensorrt.first_builder = tensorrt.Builder(tensorrt.Logger(tensorrt.Logger.ERROR))
    return tensorrt


def test_registration_logs_no_error(trt):
    """Also a second one; in a process of its own, where TensorRT does not know them yet."""
    command = [sys.executable, "-c", REGISTER]
    done = subprocess.run(command, cwd=kernels.PACKAGE.parent, capture_output=True, text=True)
    assert done.returncode == 0 and " plugin: " not in done.stderr, done.stderr
    assert done.stdout.splitlines()[-1] == str(sorted(FIELDS)) and "error:" not in done.stdout


def create(trt, form):
    """The plugin as a converter creates it: fields are an int, a float, or bytes."""
    fields = []
    for name, value in form.fields.items():
        if isinstance(value, bytes):
            data, kind = np.frombuffer(value, np.int8), trt.PluginFieldType.INT8
        elif isinstance(value, float):
            data, kind = np.float32([value]), trt.PluginFieldType.FLOAT32
        else:
            data, kind = np.int32([value]), trt.PluginFieldType.INT32
        fields.append(trt.PluginField(name, data, kind))
    creator = trt.get_plugin_registry().get_creator(form.plugin, kernels.version(), "")
    assert [one.name for one in creator.field_names] == list(form.fields)
    phase = trt.TensorRTPhase.BUILD
    return creator.create_plugin(form.plugin, trt.PluginFieldCollection(fields), phase)


# Engines


def build(trt, form, shapes=None, most=1):
    """The plan of a strongly typed network x0, .. -> plugin -> y0, ..; None where it is refused.

    most: how many times as many rows as its shapes have it takes, in a range; 1: no range.
    """
    builder = trt.first_builder
    typed = getattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
    network = builder.create_network(0 if typed is None else 1 << int(typed))
    config, profile = builder.create_builder_config(), builder.create_optimization_profile()
    types, tensors = {torch.half: trt.float16, torch.float32: trt.float32}, []
    for i, (shape, kind) in enumerate(zip(shapes or form.inputs, kinds_of(form))):
        ranges = most > 1 and has_rows(form, i)
        size = (-1, *shape[1:]) if ranges else shape
        tensors.append(network.add_input(f"x{i}", types[kind], size))
        if ranges:
            profile.set_shape(f"x{i}", shape, shape, (most * shape[0], *shape[1:]))
    layer = network.add_plugin_v3(tensors, [], create(trt, form))
    if layer is None:
        return None
    for i in range(form.outputs):
        layer.get_output(i).name = f"y{i}"
        network.mark_output(layer.get_output(i))
    config.add_optimization_profile(profile)
    return builder.build_serialized_network(network, config)


def has_rows(form, i):
    """Whether an input's first size is that of a batch."""
    return i == 0 or form.params.get("delta") == f"x{i}"


def kinds_of(form):
    return [torch.half if i < form.halves else torch.float32 for i in range(len(form.inputs))]


class Engine:
    """A plan, ready to run on a stream."""

    def __init__(self, trt, form, plan):
        self.trt, self.form = trt, form
        self.runtime = trt.Runtime(trt.Logger(trt.Logger.ERROR))
        self.engine = self.runtime.deserialize_cuda_engine(plan)
        self.context = self.engine.create_execution_context()

    def bind(self, times):
        """Sets random inputs of times as many rows, and outputs of NaN; returns the outputs and
        what the launcher gives for the inputs."""
        form, tensors, launched = self.form, {}, {}
        for i, (shape, kind) in enumerate(zip(form.inputs, kinds_of(form))):
            shape = (times * shape[0], *shape[1:]) if has_rows(form, i) else shape
            tensors[f"x{i}"] = torch.randn(shape, device="cuda").to(kind)
            assert self.context.set_input_shape(f"x{i}", shape)
        for i in range(form.outputs):
            assert self.engine.get_tensor_dtype(f"y{i}") == self.trt.float16
            shape = tuple(self.context.get_tensor_shape(f"y{i}"))
            assert shape == (times * form.output[0], *form.output[1:])
            for found in (tensors, launched):
                nan = torch.full(shape, float("nan"), dtype=torch.half, device="cuda")
                found[f"y{i}"] = nan
        self.tensors = tensors  # alive until the engine has run
        for name, tensor in tensors.items():
            self.context.set_tensor_address(name, tensor.data_ptr())
        launch(form, {**tensors, **launched}, times)
        return [tensors[name] for name in launched], list(launched.values())

    def run(self, stream):
        assert self.context.execute_async_v3(stream.cuda_stream)


def launch(form, tensors, times):
    """Through the library, without TensorRT."""
    fields = {key: tensors[one] if isinstance(one, str) else one
              for key, one in form.params.items()}
    fields |= {key: times * fields[key] for key in ("rows", "batch") if key in fields}
    fields |= {key: value for key, value in form.fields.items() if key.startswith("epsilon")}
    if form.plugin == kernels.LINEAR:
        fields["layer"] = linear._layer(form.fields["table"]).pointer
        workspace = torch.empty(linear.WORKSPACE_BYTES, dtype=torch.uint8, device="cuda")
        fields["workspace"] = workspace
    kernels.launch(form.launcher, torch.device("cuda"), **fields)
    torch.cuda.synchronize()


@each_form
def test_one_engine_gives_the_bits_of_the_launcher_for_every_batch_of_its_range(trt, form):
    """Of a layer's table: what is measured for 1 and 64 rows serves others too."""
    if form.plugin == kernels.LINEAR:
        table = linear.tune([1, 64], (64, 128), len(form.inputs) == 3)
        form = form._replace(changed={"table": table})
    engine, stream = Engine(trt, form, build(trt, form, most=32)), torch.cuda.Stream()
    for times in (1, 3, 32):
        outputs, expected = engine.bind(times)
        engine.run(stream)
        stream.synchronize()
        assert all(map(torch.equal, outputs, expected))


@each_form
def test_graph_capture_replays(trt, form):
    engine = Engine(trt, form, build(trt, form))
    outputs, expected = engine.bind(1)
    engine.run(torch.cuda.current_stream())  # TensorRT wants one at these sizes ahead of a capture
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        engine.run(torch.cuda.current_stream())
    for output in outputs:
        output.fill_(float("nan"))
    graph.replay()
    torch.cuda.synchronize()
    assert all(map(torch.equal, outputs, expected))


@each_wrong_shape
def test_wrong_shapes_make_no_engine(trt, form, shapes, capfd):
    assert build(trt, form, shapes) is None
    assert f"{form.plugin} plugin:" in capfd.readouterr().err
