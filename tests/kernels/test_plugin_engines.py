"""The plugins in TensorRT itself: their creators, and engines of one plugin layer."""
import subprocess
import sys

import needs
import numpy as np
import pytest
import torch
from plugins import FIELDS, each_form, each_plugin, each_wrong_shape

from clip_ttrt import kernels, linear, stack

pytestmark = [pytest.mark.gpu, needs.ampere]

REGISTER = """
import tensorrt as trt
class Log(trt.ILogger):
    def __init__(self):
        trt.ILogger.__init__(self)
        self.errors = []
    def log(self, severity, text):
        if severity <= trt.ILogger.ERROR:
            self.errors.append(text)
log = Log()
runtime = trt.Runtime(log)
from clip_ttrt import kernels
kernels.load(kernels.version())
kernels.load(kernels.version())
names = [getattr(one, "name", "") for one in trt.get_plugin_registry().all_creators]
print(sorted(one for one in names if one.startswith("Clip") and one != "Clip_TRT"))
print(log.errors)
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


# Creators


def test_registration_logs_no_error(trt):
    """Also a second one; in a process of its own, where TensorRT does not know them yet."""
    command = [sys.executable, "-c", REGISTER]
    done = subprocess.run(command, cwd=kernels.PACKAGE.parent, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-2:] == [str(sorted(FIELDS)), "[]"]
    assert " plugin: " not in done.stderr  # as our lines begin


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
        fields = [field(trt, *one) for one in fields.items()]
    collection = trt.PluginFieldCollection(fields)
    return creator(trt, name).create_plugin(name, collection, trt.TensorRTPhase.BUILD)


@each_plugin
def test_creators_have_the_librarys_version_and_name_their_fields(trt, name):
    found = creator(trt, name)
    assert found.plugin_version == kernels.version()
    assert [one.name for one in found.field_names] == list(FIELDS[name])
    assert create(trt, name, FIELDS[name]) is not None


def wrong_fields(trt, name):
    """(what is wrong, fields), with a null, a wrong and a missing one for each field."""
    good = {key: field(trt, key, value) for key, value in FIELDS[name].items()}
    yield "unknown", [*good.values(), field(trt, "other", 1)]
    for key, one in good.items():
        others = [field for other, field in good.items() if other != key]
        null = trt.PluginField(key)
        null.type, null.size = one.type, one.size
        yield f"null {key}", [*others, null]
        wrong = b"text" if isinstance(FIELDS[name][key], float) else 0.5
        yield f"{key} of another type", [*others, field(trt, key, wrong)]
        yield f"{key} missing", others
        yield f"{key} twice", [*good.values(), one]


@each_plugin
def test_wrong_fields_are_refused_in_one_line(trt, name, capfd):
    for what, fields in wrong_fields(trt, name):
        capfd.readouterr()
        assert create(trt, name, fields) is None, what
        [line] = [one for one in capfd.readouterr().err.splitlines() if "plugin:" in one]
        assert line.startswith(f"{name} plugin: "), what


# Engines


def build(trt, form, shapes, kinds, most=1):
    """The plan of a strongly typed network x0, .. -> plugin -> y0, ..; None where it is refused.

    most: how many times as many rows as its shapes have it takes, in a range; 1: no range.
    """
    builder = trt.first_builder
    typed = getattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
    network = builder.create_network(0 if typed is None else 1 << int(typed))
    config, profile = builder.create_builder_config(), builder.create_optimization_profile()
    types, tensors = {torch.half: trt.float16, torch.float32: trt.float32}, []
    for i, (shape, kind) in enumerate(zip(shapes, kinds)):
        ranges = most > 1 and has_rows(form, i)
        tensors.append(network.add_input(f"x{i}", types[kind], (-1, *shape[1:]) if ranges else shape))
        if ranges:
            profile.set_shape(f"x{i}", shape, shape, (most * shape[0], *shape[1:]))
    layer = network.add_plugin_v3(tensors, [], create(trt, form.plugin, form.fields))
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


def inputs_of(form, times=1):
    shapes = [(times * shape[0], *shape[1:]) if has_rows(form, i) else shape
              for i, shape in enumerate(form.inputs)]
    return [torch.randn(shape, device="cuda").to(kind)
            for shape, kind in zip(shapes, kinds_of(form))]


def set_tensors(trt, engine, context, inputs):
    """Sets the inputs, and outputs that are NaN where nothing is written, which it returns."""
    for i, x in enumerate(inputs):
        assert context.set_input_shape(f"x{i}", tuple(x.shape))
        context.set_tensor_address(f"x{i}", x.data_ptr())
    outputs = []
    for name in (f"y{i}" for i in range(engine.num_io_tensors - len(inputs))):
        assert engine.get_tensor_dtype(name) == trt.float16
        shape = tuple(context.get_tensor_shape(name))
        outputs.append(torch.full(shape, float("nan"), dtype=torch.half, device="cuda"))
        context.set_tensor_address(name, outputs[-1].data_ptr())
    return outputs


def launched(form, inputs, times):
    """The outputs of the launcher."""
    if form.plugin == kernels.LINEAR:
        return [linear.linear(*inputs, table=form.fields["table"])]
    shape = (times * form.output[0], *form.output[1:])
    outputs = torch.full((form.outputs, *shape), float("nan"), dtype=torch.half, device="cuda")
    tensors = {f"x{i}": x for i, x in enumerate(inputs)}
    tensors |= {f"y{i}": y for i, y in enumerate(outputs)}
    fields = {key: tensors[one] if isinstance(one, str) else one
              for key, one in form.params.items()}
    fields |= {key: times * fields[key] for key in ("rows", "batch") if key in fields}
    fields |= {key: value for key, value in form.fields.items() if key.startswith("epsilon")}
    kernels.launch(form.launcher, torch.device("cuda"), **fields)
    return list(outputs)


@each_form
def test_one_engine_gives_the_bits_of_the_launcher_for_every_batch_of_its_range(trt, form):
    """Of a layer's table: what is measured for 1 and 64 rows serves others too."""
    if form.plugin == kernels.LINEAR:
        table = linear.tune([1, 64], (64, 128), len(form.inputs) == 3)
        form = form._replace(changed={"table": table})
    logger = trt.Logger(trt.Logger.ERROR)
    plan = build(trt, form, form.inputs, kinds_of(form), most=32)
    runtime = trt.Runtime(logger)
    engine = runtime.deserialize_cuda_engine(plan)
    context, stream = engine.create_execution_context(), torch.cuda.Stream()
    for times in (1, 3, 32):
        inputs = inputs_of(form, times)
        outputs = set_tensors(trt, engine, context, inputs)
        stream.wait_stream(torch.cuda.current_stream())
        assert context.execute_async_v3(stream.cuda_stream)
        stream.synchronize()
        assert all(map(torch.equal, outputs, launched(form, inputs, times)))


@each_form
def test_graph_capture_replays(trt, form):
    runtime = trt.Runtime(trt.Logger(trt.Logger.ERROR))
    engine = runtime.deserialize_cuda_engine(build(trt, form, form.inputs, kinds_of(form)))
    context, inputs = engine.create_execution_context(), inputs_of(form)
    outputs = set_tensors(trt, engine, context, inputs)
    # TensorRT wants one launch at these sizes ahead of a capture.
    assert context.execute_async_v3(torch.cuda.current_stream().cuda_stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        assert context.execute_async_v3(torch.cuda.current_stream().cuda_stream)
    for output in outputs:
        output.fill_(float("nan"))
    graph.replay()
    torch.cuda.synchronize()
    assert all(map(torch.equal, outputs, launched(form, inputs, 1)))


@each_wrong_shape
def test_wrong_shapes_make_no_engine(trt, form, shapes, capfd):
    assert build(trt, form, shapes, kinds_of(form)) is None
    assert f"{form.plugin} plugin:" in capfd.readouterr().err


@each_form
def test_other_inputs_make_no_engine(trt, form, capfd):
    kinds = kinds_of(form)
    more = [*form.inputs, (64,)], [*kinds, torch.half]
    for shapes, others in (more, (form.inputs[:-1], kinds[:-1])):
        assert not shapes or build(trt, form, shapes, others) is None
    assert f"{form.plugin} plugin:" in capfd.readouterr().err
    for i, kind in enumerate(kinds):
        other = torch.float32 if kind == torch.half else torch.half
        if form.plugin != kernels.EXTRACT_PATCHES:
            assert build(trt, form, form.inputs, [*kinds[:i], other, *kinds[i + 1 :]]) is None


def test_a_table_of_another_cublaslt_is_told_once(trt, capfd):
    table = linear.pack(64, 128, False, [linear.Entry(1)], linear.version() + 1)
    for _ in range(2):
        assert create(trt, kernels.LINEAR, {"table": table}) is not None
    # Once in a process, which another test may have been.
    assert capfd.readouterr().err.count("another cuBLASLt") <= 1
