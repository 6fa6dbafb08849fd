"""The creators of the elementwise plugins: registration, fields, and what an engine file holds. Needs no GPU."""

import ctypes
import struct

import pytest

from kernels import build

trt = pytest.importorskip("tensorrt", reason="TensorRT is not installed")
np = pytest.importorskip("numpy")

LAYOUT, EPSILON = 1, 1e-5


@pytest.fixture(scope="module")
def creators():
    if not build.OUTPUT.is_file():
        pytest.skip("the library is not built: python -m kernels.build")
    library = ctypes.CDLL(str(build.OUTPUT), mode=ctypes.RTLD_GLOBAL)
    if not hasattr(library, "clip_elementwise_register_plugins"):
        pytest.skip("the library was built without TensorRT's headers")
    assert library.clip_elementwise_register_plugins() == 1
    assert library.clip_elementwise_register_plugins() == 1  # a second registration does no harm
    registry = trt.get_plugin_registry()
    return {name: registry.get_plugin_creator(name, "2", "") for name in ("ClipBiasQuickGelu", "ClipResidualLayerNorm")}


def field(name, value, dtype="int32"):
    kind = {"int32": trt.PluginFieldType.INT32, "float32": trt.PluginFieldType.FLOAT32}[dtype]
    return trt.PluginField(name, np.array(value, dtype=dtype).reshape(-1), kind)


def collection(*fields):
    return trt.PluginFieldCollection([field(*f) for f in fields])


def test_creators_are_registered_with_their_fields(creators):
    assert [f.name for f in creators["ClipBiasQuickGelu"].field_names] == []
    assert [f.name for f in creators["ClipResidualLayerNorm"].field_names] == ["residual", "epsilon"]


def test_gelu_survives_serialisation_and_copying(creators):
    plugin = creators["ClipBiasQuickGelu"].create_plugin("a", collection())
    data = bytes(plugin.serialize())
    assert data == struct.pack("<i", LAYOUT)
    for again in (creators["ClipBiasQuickGelu"].deserialize_plugin("a", data), plugin.clone()):
        assert bytes(again.serialize()) == data
        assert (again.num_outputs, again.plugin_type, again.plugin_version) == (1, "ClipBiasQuickGelu", "2")


@pytest.mark.parametrize("residual, outputs", [(0, 1), (1, 2)])
def test_layer_norm_survives_serialisation_and_copying(creators, residual, outputs):
    creator = creators["ClipResidualLayerNorm"]
    plugin = creator.create_plugin("a", collection(("residual", residual), ("epsilon", EPSILON, "float32")))
    data = bytes(plugin.serialize())
    assert data == struct.pack("<iif", LAYOUT, residual, EPSILON)
    for again in (creator.deserialize_plugin("a", data), plugin.clone()):
        assert bytes(again.serialize()) == data
        assert (again.num_outputs, again.plugin_type, again.plugin_version) == (outputs, "ClipResidualLayerNorm", "2")


@pytest.mark.parametrize(
    "name, fields",
    [
        ("ClipBiasQuickGelu", [("residual", 1)]),
        ("ClipResidualLayerNorm", []),
        ("ClipResidualLayerNorm", [("residual", 1)]),
        ("ClipResidualLayerNorm", [("epsilon", EPSILON, "float32")]),
        ("ClipResidualLayerNorm", [("residual", 2), ("epsilon", EPSILON, "float32")]),
        ("ClipResidualLayerNorm", [("residual", -1), ("epsilon", EPSILON, "float32")]),
        ("ClipResidualLayerNorm", [("residual", 1), ("epsilon", 0.0, "float32")]),
        ("ClipResidualLayerNorm", [("residual", 1), ("epsilon", -1.0, "float32")]),
        ("ClipResidualLayerNorm", [("residual", 1), ("epsilon", float("nan"), "float32")]),
        ("ClipResidualLayerNorm", [("residual", 1), ("epsilon", float("inf"), "float32")]),
        ("ClipResidualLayerNorm", [("residual", 1.0, "float32"), ("epsilon", EPSILON, "float32")]),
        ("ClipResidualLayerNorm", [("residual", 1), ("epsilon", 1)]),
        ("ClipResidualLayerNorm", [("residual", [1, 1]), ("epsilon", EPSILON, "float32")]),
        ("ClipResidualLayerNorm", [("residual", 1), ("epsilon", EPSILON, "float32"), ("width", 768)]),
    ],
)
def test_wrong_fields_make_no_plugin(creators, name, fields, capfd):
    assert creators[name].create_plugin("a", collection(*fields)) is None
    assert f"{name} plugin:" in capfd.readouterr().err


@pytest.mark.parametrize(
    "name, data",
    [
        ("ClipBiasQuickGelu", b"\0\0"),
        ("ClipBiasQuickGelu", struct.pack("<i", LAYOUT + 1)),
        ("ClipBiasQuickGelu", struct.pack("<ii", LAYOUT, 0)),
        ("ClipResidualLayerNorm", struct.pack("<ii", LAYOUT, 1)),
        ("ClipResidualLayerNorm", struct.pack("<iif", LAYOUT + 1, 1, EPSILON)),
        ("ClipResidualLayerNorm", struct.pack("<iif", LAYOUT, 2, EPSILON)),
        ("ClipResidualLayerNorm", struct.pack("<iif", LAYOUT, 1, -EPSILON)),
        ("ClipResidualLayerNorm", struct.pack("<iiff", LAYOUT, 1, EPSILON, EPSILON)),
    ],
)
def test_data_of_another_version_is_refused(creators, name, data, capfd):
    assert creators[name].deserialize_plugin("a", data) is None
    assert f"{name} plugin:" in capfd.readouterr().err
