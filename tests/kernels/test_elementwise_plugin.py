"""The creators of the elementwise plugins: registration, fields, and what an engine file holds. Needs no GPU."""

import ctypes
import struct

import pytest

from kernels import build
import needs

trt = pytest.importorskip("tensorrt", reason="TensorRT is not installed")
np = pytest.importorskip("numpy")

LAYOUT, EPSILON = 1, 1e-5
FIELDS = {
    "ClipBiasQuickGelu": [],
    "ClipResidualLayerNorm": ["residual", "epsilon"],
    "ClipExtractPatches": ["patch_size"],
    "ClipEmbedImage": ["tokens", "epsilon_pre", "epsilon_1"],
}


@pytest.fixture(scope="module")
def creators():
    if not build.OUTPUT.is_file():
        pytest.skip(needs.NOT_BUILT)
    library = ctypes.CDLL(str(build.OUTPUT), mode=ctypes.RTLD_GLOBAL)
    if not hasattr(library, "clip_elementwise_register_plugins"):
        pytest.skip("the library was built without TensorRT's headers")
    assert library.clip_elementwise_register_plugins() == 1
    assert library.clip_elementwise_register_plugins() == 1  # a second registration does no harm
    creators = trt.get_plugin_registry()
    return {name: creators.get_plugin_creator(name, "3", "") for name in FIELDS}


def field(name, value, dtype="int32"):
    kind = {"int32": trt.PluginFieldType.INT32, "float32": trt.PluginFieldType.FLOAT32}[dtype]
    return trt.PluginField(name, np.array(value, dtype=dtype).reshape(-1), kind)


def collection(*fields):
    return trt.PluginFieldCollection([field(*f) for f in fields])


@pytest.mark.parametrize("name", FIELDS)
def test_creator_is_registered_with_its_fields(creators, name):
    assert [f.name for f in creators[name].field_names] == FIELDS[name]


@pytest.mark.parametrize(
    "name, fields, expected, outputs",
    [
        ("ClipBiasQuickGelu", [], struct.pack("<i", LAYOUT), 1),
        ("ClipResidualLayerNorm", [("residual", 0), ("epsilon", EPSILON, "float32")], struct.pack("<iif", LAYOUT, 0, EPSILON), 1),
        ("ClipResidualLayerNorm", [("epsilon", EPSILON, "float32"), ("residual", 1)], struct.pack("<iif", LAYOUT, 1, EPSILON), 2),
        ("ClipExtractPatches", [("patch_size", 14)], struct.pack("<ii", LAYOUT, 14), 1),
        ("ClipEmbedImage", [("tokens", 50), ("epsilon_pre", EPSILON, "float32"), ("epsilon_1", 1e-6, "float32")],
         struct.pack("<iiff", LAYOUT, 50, EPSILON, 1e-6), 2),
    ],
)  # fmt: skip
def test_plugin_survives_serialisation_and_copying(creators, name, fields, expected, outputs):
    plugin = creators[name].create_plugin("a", collection(*fields))
    data = bytes(kernels.serialize())
    assert data == expected
    for again in (creators[name].deserialize_plugin("a", data), kernels.clone()):
        assert bytes(again.serialize()) == data
        assert (again.num_outputs, again.plugin_type, again.plugin_version) == (outputs, name, "3")


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
        ("ClipExtractPatches", []),
        ("ClipExtractPatches", [("patch_size", 0)]),
        ("ClipExtractPatches", [("patch_size", 15)]),
        ("ClipExtractPatches", [("patch_size", -2)]),
        ("ClipExtractPatches", [("patch_size", 4098)]),
        ("ClipExtractPatches", [("patch_size", 32.0, "float32")]),
        ("ClipEmbedImage", [("tokens", 50), ("epsilon_pre", EPSILON, "float32")]),
        ("ClipEmbedImage", [("tokens", 1), ("epsilon_pre", EPSILON, "float32"), ("epsilon_1", EPSILON, "float32")]),
        ("ClipEmbedImage", [("tokens", 50), ("epsilon_pre", 0.0, "float32"), ("epsilon_1", EPSILON, "float32")]),
        ("ClipEmbedImage", [("tokens", 50), ("epsilon_pre", EPSILON, "float32"), ("epsilon_1", float("nan"), "float32")]),
        ("ClipEmbedImage", [("tokens", 50), ("epsilon_pre", 1), ("epsilon_1", EPSILON, "float32")]),
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
        ("ClipExtractPatches", struct.pack("<i", LAYOUT)),
        ("ClipExtractPatches", struct.pack("<ii", LAYOUT + 1, 32)),
        ("ClipExtractPatches", struct.pack("<ii", LAYOUT, 31)),
        ("ClipEmbedImage", struct.pack("<iif", LAYOUT, 50, EPSILON)),
        ("ClipEmbedImage", struct.pack("<iiff", LAYOUT + 1, 50, EPSILON, EPSILON)),
        ("ClipEmbedImage", struct.pack("<iiff", LAYOUT, 0, EPSILON, EPSILON)),
    ],
)
def test_data_of_another_version_is_refused(creators, name, data, capfd):
    assert creators[name].deserialize_plugin("a", data) is None
    assert f"{name} plugin:" in capfd.readouterr().err
