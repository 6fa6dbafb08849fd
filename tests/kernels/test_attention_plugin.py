"""The TensorRT plugin's creator: registration, fields, and what an engine file holds. Needs no GPU."""

import ctypes
import struct

import pytest

from kernels import build

trt = pytest.importorskip("tensorrt", reason="TensorRT is not installed")
np = pytest.importorskip("numpy")

HEADS, TOKENS, CAUSAL, LAYOUT = 12, 77, 1, 1


@pytest.fixture(scope="module")
def creator():
    if not build.OUTPUT.is_file():
        pytest.skip("the library is not built: python -m kernels.build")
    library = ctypes.CDLL(str(build.OUTPUT), mode=ctypes.RTLD_GLOBAL)
    if not hasattr(library, "clip_attention_register_plugin"):
        pytest.skip("the library was built without TensorRT's headers")
    assert library.clip_attention_register_plugin() == 1  # a second registration does no harm
    return trt.get_plugin_registry().get_plugin_creator("ClipAttention", "1", "")


def field(name, value, dtype="int32"):
    kind = {"int32": trt.PluginFieldType.INT32, "float32": trt.PluginFieldType.FLOAT32}[dtype]
    return trt.PluginField(name, np.array([value], dtype=dtype), kind)


def test_creator_is_registered_with_its_fields(creator):
    assert creator is not None
    assert [f.name for f in creator.field_names] == ["heads", "tokens", "causal"]


def test_plugin_survives_serialisation(creator):
    fields = [field("heads", HEADS), field("tokens", TOKENS), field("causal", CAUSAL)]
    plugin = creator.create_plugin("a", trt.PluginFieldCollection(fields))
    data = bytes(plugin.serialize())
    assert data == struct.pack("<iiii", LAYOUT, HEADS, TOKENS, CAUSAL)
    again = creator.deserialize_plugin("a", data)
    assert bytes(again.serialize()) == data
    assert again.num_outputs == 1 and again.plugin_type == "ClipAttention" and again.plugin_version == "1"


@pytest.mark.parametrize(
    "fields",
    [
        [("heads", 0), ("tokens", 50), ("causal", 0)],
        [("heads", 41), ("tokens", 50), ("causal", 0)],
        [("heads", 12), ("tokens", 0), ("causal", 0)],
        [("heads", 12), ("tokens", 1025), ("causal", 0)],
        [("heads", 12), ("tokens", 50), ("causal", 2)],
        [("heads", 12), ("tokens", 50)],
        [("heads", 12), ("causal", 0)],
        [("tokens", 50), ("causal", 0)],
        [("heads", 12), ("tokens", 50), ("causal", 0), ("scale", 1)],
        [("heads", 12.0, "float32"), ("tokens", 50), ("causal", 0)],
    ],
)
def test_wrong_fields_make_no_plugin(creator, fields, capfd):
    assert creator.create_plugin("a", trt.PluginFieldCollection([field(*f) for f in fields])) is None
    assert "ClipAttention plugin:" in capfd.readouterr().err


@pytest.mark.parametrize(
    "data",
    [
        b"\0\0",
        struct.pack("<iii", LAYOUT, HEADS, CAUSAL),
        struct.pack("<iiiii", LAYOUT, HEADS, TOKENS, CAUSAL, 0),
        struct.pack("<iiii", LAYOUT + 1, HEADS, TOKENS, CAUSAL),
        struct.pack("<iiii", LAYOUT, 99, TOKENS, CAUSAL),
        struct.pack("<iiii", LAYOUT, HEADS, 0, CAUSAL),
    ],
)
def test_data_of_another_version_is_refused(creator, data, capfd):
    assert creator.deserialize_plugin("a", data) is None
    assert "ClipAttention plugin:" in capfd.readouterr().err
