"""The TensorRT plugin: registration, fields, what an engine file holds (no GPU needed), and engines of it alone (GPU)."""

import ctypes
import struct

import pytest

from kernels import build
import needs

trt = pytest.importorskip("tensorrt", reason="TensorRT is not installed")
np = pytest.importorskip("numpy")

HEADS, TOKENS, CAUSAL, BIAS, LAYOUT = 12, 77, 1, 1, 2
FIELDS = {"heads": HEADS, "tokens": TOKENS, "causal": CAUSAL, "query_bias": BIAS}


@pytest.fixture(scope="module")
def creator():
    if not build.OUTPUT.is_file():
        pytest.skip(needs.NOT_BUILT)
    library = ctypes.CDLL(str(build.OUTPUT), mode=ctypes.RTLD_GLOBAL)
    if not hasattr(library, "clip_attention_register_plugin"):
        pytest.skip("the library was built without TensorRT's headers")
    assert library.clip_attention_register_plugin() == 1  # a second registration does no harm
    return trt.get_plugin_registry().get_plugin_creator("ClipAttention", "3", "")


def field(name, value, dtype="int32"):
    kind = {"int32": trt.PluginFieldType.INT32, "float32": trt.PluginFieldType.FLOAT32}[dtype]
    return trt.PluginField(name, np.array([value], dtype=dtype), kind)


def create(creator, **changed):
    """The plugin of FIELDS with some of them changed, or left out where None."""
    values = {name: value for name, value in (FIELDS | changed).items() if value is not None}
    return creator.create_plugin("a", trt.PluginFieldCollection([field(name, value) for name, value in values.items()]))


def test_creator_is_registered_with_its_fields(creator):
    assert creator is not None
    assert [f.name for f in creator.field_names] == list(FIELDS)


@pytest.mark.parametrize("bias", [0, 1])
def test_plugin_survives_serialisation(creator, bias):
    plugin = create(creator, query_bias=bias)
    data = bytes(kernels.serialize())
    assert data == struct.pack("<iiiii", LAYOUT, HEADS, TOKENS, CAUSAL, bias)
    again = creator.deserialize_plugin("a", data)
    assert bytes(again.serialize()) == data
    assert again.num_outputs == 1 and again.plugin_type == "ClipAttention" and again.plugin_version == "3"


@pytest.mark.parametrize(
    "changed",
    [
        {"heads": 0}, {"heads": 41}, {"tokens": 0}, {"tokens": 1025}, {"causal": 2}, {"causal": -1}, {"query_bias": 2},
        {"query_bias": -1}, {"heads": None}, {"tokens": None}, {"causal": None}, {"query_bias": None}, {"scale": 1},
    ],
)  # fmt: skip
def test_wrong_fields_make_no_plugin(creator, changed, capfd):
    assert create(creator, **changed) is None
    assert "ClipAttention plugin:" in capfd.readouterr().err


def test_field_of_another_type_makes_no_plugin(creator, capfd):
    fields = [field(name, value, "float32" if name == "heads" else "int32") for name, value in FIELDS.items()]
    assert creator.create_plugin("a", trt.PluginFieldCollection(fields)) is None
    assert "one int32 each" in capfd.readouterr().err


@pytest.mark.parametrize(
    "data",
    [
        b"\0\0",
        struct.pack("<iiii", 1, HEADS, TOKENS, CAUSAL),  # what version 1 wrote
        struct.pack("<iiiiii", LAYOUT, HEADS, TOKENS, CAUSAL, BIAS, 0),
        struct.pack("<iiiii", LAYOUT + 1, HEADS, TOKENS, CAUSAL, BIAS),
        struct.pack("<iiiii", LAYOUT, 99, TOKENS, CAUSAL, BIAS),
        struct.pack("<iiiii", LAYOUT, HEADS, 0, CAUSAL, BIAS),
        struct.pack("<iiiii", LAYOUT, HEADS, TOKENS, CAUSAL, 2),
    ],
)
def test_data_of_another_version_is_refused(creator, data, capfd):
    assert creator.deserialize_plugin("a", data) is None
    assert "ClipAttention plugin:" in capfd.readouterr().err


# Engines of the plugin alone


def build_engine(plugin, inputs):
    """An fp16 engine of one plugin layer on inputs of (name, dtype, shape); None where TensorRT refuses."""
    builder = trt.Builder(trt.Logger(trt.Logger.ERROR))
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.EXPLICIT_BATCH))
    layer = network.add_plugin_v2([network.add_input(*one) for one in inputs], plugin)
    if layer is None:
        return None
    layer.get_output(0).name = "out"
    layer.get_output(0).dtype = trt.float16
    network.mark_output(layer.get_output(0))
    config = builder.create_builder_config()
    config.set_flag(trt.BuilderFlag.FP16)
    return builder.build_serialized_network(network, config)


@pytest.mark.gpu
@needs.ampere
@pytest.mark.parametrize("bias", [0, 1])
@pytest.mark.parametrize("flat", [False, True])
def test_engine_gives_the_bits_of_the_launcher(creator, bias, flat):
    import torch

    from clip_ttrt import kernels

    batch, width = 5, HEADS * 64
    shape = (batch * TOKENS, 3 * width) if flat else (batch, TOKENS, 3 * width)
    inputs = [("qkv", trt.float16, shape)] + [("query_bias", trt.float32, (width,))] * bias
    data = build_engine(create(creator, query_bias=bias), inputs)
    engine = trt.Runtime(trt.Logger(trt.Logger.ERROR)).deserialize_cuda_engine(data)
    torch.manual_seed(0)
    qkv = torch.randn(shape, device="cuda").half()
    query_bias = torch.randn(width, device="cuda") if bias else None
    out = torch.full((*shape[:-1], width), float("nan"), device="cuda").half()
    tensors = {"qkv": qkv, "out": out} | ({"query_bias": query_bias} if bias else {})
    context = engine.create_execution_context()
    for name, tensor in tensors.items():
        context.set_tensor_address(name, tensor.data_ptr())
    assert context.execute_async_v3(torch.cuda.current_stream().cuda_stream)
    torch.cuda.synchronize()
    expected = kernels.attention(qkv.view(batch, TOKENS, 3 * width), HEADS, bool(CAUSAL), query_bias)
    assert torch.equal(out.view_as(expected), expected)


@pytest.mark.gpu
@needs.ampere
@pytest.mark.parametrize(
    "bias, inputs",
    [
        (1, [("qkv", "half", (2 * TOKENS, 3 * HEADS * 64))]),
        (0, [("qkv", "half", (2 * TOKENS, 3 * HEADS * 64)), ("query_bias", "float", (HEADS * 64,))]),
        (1, [("qkv", "half", (2 * TOKENS, 3 * HEADS * 64)), ("query_bias", "float", (HEADS * 64 - 1,))]),
        (1, [("qkv", "half", (2 * TOKENS, 3 * HEADS * 64)), ("query_bias", "float", (1, HEADS * 64))]),
        (0, [("qkv", "half", (2 * TOKENS, 2 * HEADS * 64))]),
        (0, [("qkv", "half", (3 * HEADS * 64,))]),
    ],
)  # fmt: skip
def test_wrong_inputs_make_no_engine(creator, bias, inputs, capfd):
    kinds = {"half": trt.float16, "float": trt.float32}
    inputs = [(name, kinds[kind], shape) for name, kind, shape in inputs]
    assert build_engine(create(creator, query_bias=bias), inputs) is None
    assert "ClipAttention plugin:" in capfd.readouterr().err
