"""The creator of the linear layers' plugin: registration, the field, what an engine file holds (no GPU needed), and engines of it alone (GPU)."""

import ctypes
import struct

import pytest

from clip_ttrt import linear
from kernels import build
import needs

trt = pytest.importorskip("tensorrt", reason="TensorRT is not installed")
np = pytest.importorskip("numpy")
torch = pytest.importorskip("torch")

LAYOUT = struct.pack("<i", 2)
OUTPUTS, INPUTS = 64, 128


@pytest.fixture(scope="module")
def creator():
    if not build.OUTPUT.is_file():
        pytest.skip(needs.NOT_BUILT)
    library = ctypes.CDLL(str(build.OUTPUT), mode=ctypes.RTLD_GLOBAL)
    if not hasattr(library, "clip_linear_register_plugins"):
        pytest.skip("the library was built without TensorRT's headers")
    if library.clip_linear_version() == 0:
        pytest.skip("no cuBLASLt is installed")
    assert library.clip_linear_register_plugins() == 1
    assert library.clip_linear_register_plugins() == 1  # a second registration does no harm
    return trt.get_plugin_registry().get_plugin_creator("ClipLinear", "3", "")


def field(value, name="table", kind=None):
    return trt.PluginField(name, np.frombuffer(value, np.int8), trt.PluginFieldType.INT8 if kind is None else kind)


def create(creator, table):
    return creator.create_plugin("a", trt.PluginFieldCollection([field(table)]))


def entry(rows):
    return linear.Entry(rows, (ctypes.c_uint64 * 8)())


def test_creator_is_registered_with_its_field(creator):
    assert [f.name for f in creator.field_names] == ["table"]


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("entries", [[], [entry(1), entry(50)]])
def test_plugin_survives_serialisation_and_copying(creator, entries, bias):
    table = linear.pack(OUTPUTS, INPUTS, bias, entries, linear.version())
    plugin = create(creator, table)
    data = bytes(kernels.serialize())
    assert data == LAYOUT + table
    for again in (creator.deserialize_plugin("a", data), kernels.clone()):
        assert bytes(again.serialize()) == data
        assert (again.num_outputs, again.plugin_type, again.plugin_version) == (1, "ClipLinear", "3")


def wrong_tables():
    good = linear.pack(OUTPUTS, INPUTS, True, [entry(50)], 120103)
    yield from (good[:-1], good + b"\0", good[: ctypes.sizeof(linear.Table)], b"\0")
    for at, value in ((0, 6), (0, 0), (4, 12), (8, 2), (12, 65), (12, -1)):  # inputs, outputs, bias, count
        yield good[:at] + struct.pack("<i", value) + good[at + 4 :]
    yield linear.pack(OUTPUTS, INPUTS, True, [entry(0)], 120103)


@pytest.mark.parametrize("table", list(wrong_tables()))
def test_wrong_tables_make_no_plugin(creator, table, capfd):
    assert create(creator, table) is None
    assert creator.deserialize_plugin("a", LAYOUT + table) is None
    assert capfd.readouterr().err.count("ClipLinear plugin: the table is not one of this version") == 2


def test_wrong_fields_make_no_plugin(creator, capfd):
    table = linear.pack(OUTPUTS, INPUTS, False)
    wrong = [[], [field(table, "tables")], [field(table, kind=trt.PluginFieldType.CHAR)], [field(table), field(table)]]
    for fields in wrong:
        assert creator.create_plugin("a", trt.PluginFieldCollection(fields)) is None
    assert capfd.readouterr().err.count("ClipLinear plugin: the field is table") == len(wrong)


@pytest.mark.parametrize("data", [b"", b"\1\0", struct.pack("<i", 1) + linear.pack(OUTPUTS, INPUTS, False)])
def test_data_of_another_version_is_refused(creator, data, capfd):
    assert creator.deserialize_plugin("a", data) is None
    assert "ClipLinear plugin:" in capfd.readouterr().err


def test_a_table_of_another_cublaslt_is_told_once(creator, capfd):
    for _ in range(2):
        assert create(creator, linear.pack(OUTPUTS, INPUTS, False, [entry(1)], linear.version() + 1)) is not None
    assert capfd.readouterr().err.count("another cuBLASLt") <= 1  # once in a process, which other tests may have been


# Engines


def build_engine(made, weight, bias, profile):
    """An engine of x fp32 [-1, INPUTS] -> the plugin -> fp32, as a compile makes it; null where TensorRT refuses."""
    builder = trt.Builder(trt.Logger(trt.Logger.ERROR))
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.EXPLICIT_BATCH))
    x = network.add_input("x", trt.float32, (-1, INPUTS))
    constants = [network.add_constant(value.shape, np.ascontiguousarray(value)).get_output(0) for value in (weight, bias) if value is not None]
    out = network.add_plugin_v2([x, *constants], made).get_output(0)
    out.name, out.dtype = "out", trt.float32
    network.mark_output(out)
    config = builder.create_builder_config()
    config.set_flag(trt.BuilderFlag.FP16)
    shapes = builder.create_optimization_profile()
    shapes.set_shape("x", *((rows, INPUTS) for rows in profile))
    config.add_optimization_profile(shapes)
    return builder.build_serialized_network(network, config)


def run_engine(plan, x):
    runtime = trt.Runtime(trt.Logger(trt.Logger.ERROR))
    engine = runtime.deserialize_cuda_engine(plan)
    context = engine.create_execution_context()
    out = torch.full((x.shape[0], OUTPUTS), float("nan"), device="cuda")
    context.set_input_shape("x", tuple(x.shape))
    context.set_tensor_address("x", x.data_ptr())
    context.set_tensor_address("out", out.data_ptr())
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    assert context.execute_async_v3(stream.cuda_stream)
    stream.synchronize()
    return out


@pytest.mark.gpu
@pytest.mark.parametrize("bias", [False, True])
def test_engine_runs_what_the_wrapper_runs(creator, bias):
    """fp32 in and out, as an encoder's projection is; measured for 1 and 64 rows, run for others too."""
    torch.manual_seed(0)
    weight, b = torch.randn(OUTPUTS, INPUTS).half(), torch.randn(OUTPUTS).half() if bias else None
    table = linear.tune([1, 64], (OUTPUTS, INPUTS), bias)
    plan = build_engine(create(creator, table), weight.numpy(), None if b is None else b.numpy(), (1, 16, 64))
    assert plan is not None
    for rows in (1, 7, 64):
        x = torch.randn(rows, INPUTS, device="cuda")
        expected = linear.linear(x.half(), weight.cuda(), None if b is None else b.cuda(), table)
        assert torch.equal(run_engine(plan, x), expected.float())
