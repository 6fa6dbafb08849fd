"""The plugins' C++, called as TensorRT calls it, by a stand-in: needs g++ and TensorRT's headers,
neither its library nor a GPU."""

import _ctypes
import ctypes
import os
import struct
import subprocess

import pytest
import toolchain

from clip_ttrt import build_kernels, elementwise, kernels, linear

FOLDER = kernels.sources()
HOST_SOURCES = [name for name in build_kernels.compiled_sources() if name.endswith(".cpp")]
VERSION = "0123456789ab"

INT32, FLOAT32, INT8, INT64 = 5, 1, 3, 10  # of PluginFieldType
FLOAT, HALF, BF16 = 0, 1, 7  # of DataType
LINEAR, CHW2 = 0, 1  # of TensorFormat
BUILD, RUNTIME = 0, 1  # of TensorRTPhase
INVALID_VALUE = 1  # cudaErrorInvalidValue
NOWHERE = 8  # an address that nobody may read

TABLE = linear.pack(64, 128, False)
TABLE_WITH_BIAS = linear.pack(64, 128, True, [linear.Entry(1)], 0)
ATTENTION = {"heads": 12, "tokens": 77, "causal": 1, "query_bias": 1}
EMBED = {"tokens": 50, "epsilon_pre": 1e-5, "epsilon_1": 1e-6}
NORM = {"residual": 1, "epsilon": 1e-5}
FIELDS = {
    kernels.ATTENTION: ATTENTION,
    kernels.BIAS_QUICK_GELU: {},
    kernels.RESIDUAL_LAYER_NORM: NORM,
    kernels.EXTRACT_PATCHES: {"patch_size": 14},
    kernels.EMBED_IMAGE: EMBED,
    kernels.LINEAR: {"table": TABLE},
}


class Field(ctypes.Structure):
    """nvinfer1::PluginField."""

    _fields_ = [("name", ctypes.c_char_p), ("data", ctypes.c_void_p)]
    _fields_ += [("type", ctypes.c_int32), ("length", ctypes.c_int32)]


class Collection(ctypes.Structure):
    """nvinfer1::PluginFieldCollection."""

    _fields_ = [("count", ctypes.c_int32), ("fields", ctypes.POINTER(Field))]


def field(name, value):
    """A field as a converter gives it; the buffer lives as long as the field."""
    if isinstance(value, bytes):
        buffer, kind, length = ctypes.create_string_buffer(value, len(value)), INT8, len(value)
    elif isinstance(value, float):
        buffer, kind, length = ctypes.c_float(value), FLOAT32, 1
    else:
        buffer, kind, length = ctypes.c_int32(value), INT32, 1
    made = Field(name.encode(), ctypes.addressof(buffer), kind, length)
    made.buffer = buffer
    return made


def collection(fields):
    """A collection of fields, which keeps them alive."""
    fields = list(fields)
    array = (Field * len(fields))(*fields)
    made = Collection(len(fields), array)
    made.kept = fields
    return made


def values_of(found):
    """(name, type, bytes) of each field of a collection."""
    sizes = {INT32: 4, FLOAT32: 4, INT8: 1}
    fields = [found.contents.fields[i] for i in range(found.contents.count)]
    return [
        (one.name.decode(), one.type, ctypes.string_at(one.data, one.length * sizes[one.type]))
        for one in fields
    ]


class TensorRT:
    """The stand-in, with the library of kernels that it has loaded and its plugins by name."""

    def __init__(self, tensorrt, library):
        self.tensorrt, self.library = tensorrt, library
        for name in ("creator_name", "creator_version", "creator_namespace"):
            getattr(tensorrt, name).restype = ctypes.c_char_p
        for name in ("plugin_name", "plugin_version"):
            getattr(tensorrt, name).restype = ctypes.c_char_p
            getattr(tensorrt, name).argtypes = [ctypes.c_void_p]
        for name in ("fields", "creator_fields"):
            getattr(tensorrt, name).restype = ctypes.POINTER(Collection)
        for name in ("create", "copy", "attach"):
            getattr(tensorrt, name).restype = ctypes.c_void_p
        for name in ("fields", "copy", "attach", "destroy", "outputs", "workspace"):
            getattr(tensorrt, name).argtypes = [ctypes.c_void_p]
        tensorrt.workspace.restype = ctypes.c_size_t
        integers = [ctypes.c_int32] * 5
        tensorrt.create.argtypes = [ctypes.c_int32, ctypes.POINTER(Collection), ctypes.c_int32]
        tensorrt.supports.argtypes = [ctypes.c_void_p, *integers]
        tensorrt.output_types.argtypes = [ctypes.c_void_p, ctypes.c_void_p]
        tensorrt.output_types.argtypes += [ctypes.c_int32, ctypes.c_void_p]
        tensorrt.output_shapes.argtypes = tensorrt.output_types.argtypes
        tensorrt.enqueue.argtypes = [ctypes.c_void_p] * 3 + [ctypes.c_int32]
        self.creators = {tensorrt.creator_name(i).decode(): i for i in range(6)}

    def create(self, name, fields, phase=BUILD):
        """The plugin's address, or None."""
        return self.tensorrt.create(self.creators[name], fields, phase)

    def plugin(self, name, **changed):
        """A plugin with the fields of FIELDS, some of them changed."""
        fields = collection(field(key, one) for key, one in {**FIELDS[name], **changed}.items())
        made = self.create(name, fields)
        assert made is not None
        return made

    def output_shapes(self, plugin, *shapes):
        """The outputs' shapes, None where the plugin refuses; -1 is a size that is not known."""
        out = (ctypes.c_int64 * 18)()
        if self.tensorrt.output_shapes(plugin, dims(shapes), len(shapes), out) != 0:
            return None
        count = self.tensorrt.outputs(plugin)
        return [tuple(out[9 * i + 1 : 9 * i + 1 + out[9 * i]]) for i in range(count)]

    def enqueue(self, plugin, *shapes, types=None):
        types = [HALF] * len(shapes) if types is None else types
        array = (ctypes.c_int32 * len(shapes))(*types)
        return self.tensorrt.enqueue(plugin, dims(shapes), array, len(shapes))

    def launched(self, struct_type):
        """What the last launch was given, as name -> value."""
        raw = (ctypes.c_ubyte * 256).in_dll(self.library, "launched")
        params = struct_type.from_buffer_copy(raw)
        return {name: getattr(params, name) for name, _ in struct_type._fields_}

    def launches(self):
        return ctypes.c_int32.in_dll(self.library, "launches").value


def dims(shapes):
    flat = (ctypes.c_int64 * (9 * len(shapes)))()
    for i, shape in enumerate(shapes):
        flat[9 * i : 9 * i + 1 + len(shape)] = [len(shape), *shape]
    return flat


@pytest.fixture(scope="module", params=toolchain.each_headers())
def trt(request, tmp_path_factory):
    """The stand-in and the library, built with one set of headers, every warning an error."""
    if toolchain.cuda() is None or toolchain.shutil.which("g++") is None:
        pytest.skip("needs g++ and the CUDA runtime's headers")
    folder = tmp_path_factory.mktemp("trt")
    include, cudart = toolchain.cuda()
    fake = toolchain.ROOT / "tests" / "kernels" / "fake_tensorrt.cpp"
    compiler = ["g++", "-std=c++17", "-O1", "-fno-gnu-unique", "-fPIC", "-shared"]
    compiler += ["-Wall", "-Wextra", "-Werror", "-Wno-deprecated"]
    compiler += ["-isystem", str(request.param), "-isystem", str(include)]
    compiler += ["-Wno-deprecated-declarations"]  # TensorRT's own, of what a registry must have
    major = build_kernels.major_of_headers(request.param)
    runtime = folder / f"libnvinfer.so.{major}"
    name = f"-Wl,-soname,{runtime.name}"
    about = ["-DCLIP_TTRT_PLUGINS", f'-DCLIP_TTRT_VERSION="{VERSION}"']
    about += ['-DCLIP_TTRT_ARCHITECTURES="90a"']
    library = folder / "library.so"
    sources = [str(FOLDER / source) for source in HOST_SOURCES]
    runs = [
        subprocess.Popen([*compiler, name, "-o", str(runtime), str(fake)]),
        subprocess.Popen(
            [*compiler, *about, "-Wno-unused-function", "-o", str(library), *sources]
            + ["-x", "c++", "-DLAUNCHERS", str(fake), "-x", "none", str(cudart), "-ldl"]
        ),
    ]
    assert [run.wait() for run in runs] == [0, 0]
    # libnvinfer comes first, as in a process that has imported tensorrt.
    tensorrt = ctypes.CDLL(str(runtime), mode=os.RTLD_LOCAL)
    loaded = ctypes.CDLL(str(library))
    yield TensorRT(tensorrt, loaded)
    for one in (loaded, tensorrt):  # the next set of headers may be of the same soname
        _ctypes.dlclose(one._handle)


# Registration


def test_loading_the_library_registers_all_plugins_once(trt):
    assert set(trt.creators) == set(FIELDS)
    assert trt.library.clip_ttrt_register_plugins() == 1
    assert trt.tensorrt.registrations() == 6 and trt.tensorrt.questions() == 0
    for i in range(6):
        assert trt.tensorrt.creator_version(i).decode() == VERSION
        assert trt.tensorrt.creator_namespace(i) == b""


def test_a_second_copy_of_the_library_finds_them_registered(trt, tmp_path):
    """TensorRT would log an error for a name and version that it has."""
    copy = tmp_path / "copy.so"
    copy.write_bytes(open(trt.library._name, "rb").read())
    loaded = ctypes.CDLL(str(copy))
    assert loaded.clip_ttrt_register_plugins() == 1
    _ctypes.dlclose(loaded._handle)
    assert trt.tensorrt.registrations() == 6 and trt.tensorrt.questions() == 0


def test_the_library_tells_what_it_is(trt):
    trt.library.clip_ttrt_version.restype = ctypes.c_char_p
    trt.library.clip_ttrt_architectures.restype = ctypes.c_char_p
    about = kernels.read(kernels.Path(trt.library._name))
    assert trt.library.clip_ttrt_version().decode() == about.version == VERSION
    assert trt.library.clip_ttrt_architectures().decode() == " ".join(about.architectures) == "90a"
    assert trt.library.clip_ttrt_tensorrt_major() == about.tensorrt_major
    assert about.tensorrt_major == trt.tensorrt.tensorrt_major()


@pytest.mark.parametrize("name", FIELDS)
def test_creators_name_their_fields(trt, name):
    found = trt.tensorrt.creator_fields(trt.creators[name]).contents
    fields = [found.fields[i] for i in range(found.count)]
    assert [one.name.decode() for one in fields] == list(FIELDS[name])
    assert all(one.data is None for one in fields)


# Fields


@pytest.mark.parametrize("phase", [BUILD, RUNTIME])
@pytest.mark.parametrize("name", FIELDS)
def test_fields_are_what_an_engine_holds(trt, name, phase):
    """Also of copies, and of a plugin made from what another would write into an engine."""
    given = collection(field(key, one) for key, one in FIELDS[name].items())
    expected = values_of(ctypes.pointer(given))
    plugin = trt.create(name, given, phase)
    again = trt.create(name, trt.tensorrt.fields(plugin), RUNTIME)
    clones = [trt.tensorrt.copy(plugin), trt.tensorrt.copy(again)]
    for one in (plugin, again, *clones):
        assert values_of(trt.tensorrt.fields(one)) == expected
        assert trt.tensorrt.plugin_name(one).decode() == name
        assert trt.tensorrt.plugin_version(one).decode() == VERSION
        trt.tensorrt.destroy(one)


def wrong_fields():
    """(plugin, what is wrong, a word of the line, a collection or None) for every field."""
    for name, values in FIELDS.items():
        good = [field(key, one) for key, one in values.items()]
        extra = field("other", 1)
        yield name, "unknown", "there is no field other", collection([*good, extra])
        yield name, "no name", "has no name", collection([*good, Field(None, NOWHERE, INT32, 1)])
        yield name, "null fields", "no fields", Collection(1, None)
        yield name, "negative count", "no fields", Collection(-1, None)
        if good:
            yield name, "null collection", "is missing", None
        for i, one in enumerate(good):
            key = one.name.decode()
            others = [*good[:i], *good[i + 1 :]]
            kind = INT64 if one.type == INT32 else INT32
            length = 0 if one.type == INT8 else 2
            is_not = f"the field {key} is not"
            for what, wrong in (
                ("null data", Field(one.name, None, one.type, one.length)),
                ("another type", Field(one.name, NOWHERE, kind, one.length)),
                ("another length", Field(one.name, NOWHERE, one.type, length)),
                ("a length below 0", Field(one.name, NOWHERE, one.type, -1)),
            ):
                yield name, f"{key}: {what}", is_not, collection([*others, wrong])
            yield name, f"{key}: missing", f"the field {key} is missing", collection(others)
            yield name, f"{key}: twice", f"{key} is given twice", collection([*good, one])


@pytest.mark.parametrize(
    "name, word, fields",
    [pytest.param(name, word, one, id=f"{name}-{why}") for name, why, word, one in wrong_fields()],
)
def test_wrong_fields_are_refused_and_not_read(trt, name, word, fields, capfd):
    """At either phase, in one line that names the plugin."""
    for phase in (BUILD, RUNTIME):
        assert trt.create(name, fields, phase) is None
        [line] = capfd.readouterr().err.splitlines()
        assert line.startswith(f"{name} plugin: ") and word in line


def changed_table(at, value):
    return TABLE[:at] + struct.pack("<i", value) + TABLE[at + 4 :]


@pytest.mark.parametrize(
    "name, changed",
    [
        *((kernels.ATTENTION, one) for one in (
            {"heads": 0}, {"heads": 41}, {"tokens": 0}, {"tokens": 1025}, {"causal": 2},
            {"causal": -1}, {"query_bias": 2}, {"query_bias": -1},
        )),
        *((kernels.RESIDUAL_LAYER_NORM, one) for one in (
            {"residual": 2}, {"residual": -1}, {"epsilon": 0.0}, {"epsilon": -1.0},
            {"epsilon": float("nan")}, {"epsilon": float("inf")},
        )),
        *((kernels.EXTRACT_PATCHES, {"patch_size": size}) for size in (0, 15, -2, 4098)),
        *((kernels.EMBED_IMAGE, one) for one in (
            {"tokens": 1}, {"epsilon_pre": 0.0}, {"epsilon_1": float("nan")},
        )),
        *((kernels.LINEAR, {"table": one}) for one in (
            TABLE[:-1], TABLE + b"\0", b"\0", changed_table(0, 6), changed_table(4, 12),
            changed_table(8, 2), changed_table(12, 65), changed_table(12, -1),
        )),
    ],
)  # fmt: skip
def test_wrong_values_are_refused(trt, name, changed, capfd):
    fields = collection(field(key, one) for key, one in {**FIELDS[name], **changed}.items())
    assert trt.create(name, fields) is None
    [line] = capfd.readouterr().err.splitlines()
    assert line.startswith(f"{name} plugin: ")


# Types and formats

ONE_OF_EACH = [  # plugin, changed fields, types of the inputs, number of outputs
    (kernels.ATTENTION, {}, [HALF, FLOAT], 1),
    (kernels.ATTENTION, {"query_bias": 0}, [HALF], 1),
    (kernels.BIAS_QUICK_GELU, {}, [HALF, FLOAT], 1),
    (kernels.RESIDUAL_LAYER_NORM, {}, [HALF, HALF, FLOAT, FLOAT, FLOAT], 2),
    (kernels.RESIDUAL_LAYER_NORM, {"residual": 0}, [HALF, FLOAT, FLOAT], 1),
    (kernels.EXTRACT_PATCHES, {}, [(HALF, FLOAT)], 1),
    (kernels.EMBED_IMAGE, {}, [HALF, *[FLOAT] * 6], 2),
    (kernels.LINEAR, {}, [HALF, HALF], 1),
    (kernels.LINEAR, {"table": TABLE_WITH_BIAS}, [HALF, HALF, HALF], 1),
]


@pytest.mark.parametrize("name, changed, inputs, outputs", ONE_OF_EACH)
def test_each_position_has_its_types(trt, name, changed, inputs, outputs):
    plugin = trt.plugin(name, **changed)
    supports = trt.tensorrt.supports
    assert trt.tensorrt.outputs(plugin) == outputs
    for at, expected in enumerate([*inputs, *[HALF] * outputs]):
        expected = expected if isinstance(expected, tuple) else (expected,)
        sizes = len(inputs), outputs
        taken = [kind for kind in range(8) if supports(plugin, at, kind, LINEAR, *sizes)]
        assert set(taken) == set(expected)
        assert not supports(plugin, at, expected[0], CHW2, *sizes)
    assert not supports(plugin, 0, HALF, LINEAR, len(inputs) + 1, outputs)
    assert not supports(plugin, 0, HALF, LINEAR, len(inputs), outputs + 1)
    for kind in (HALF, FLOAT):
        given, found = (ctypes.c_int32 * 7)(*[kind] * 7), (ctypes.c_int32 * 2)(-1, -1)
        assert trt.tensorrt.output_types(plugin, given, len(inputs), found) == 0
        assert list(found)[:outputs] == [HALF] * outputs


def test_only_linear_layers_need_a_workspace(trt):
    for name in FIELDS:
        expected = linear.WORKSPACE_BYTES if name == kernels.LINEAR else 0
        assert trt.tensorrt.workspace(trt.plugin(name)) == expected


# Shapes

WIDTH = 768
QKV, BIAS = (154, 3 * WIDTH), (WIDTH,)
SHAPES = [  # plugin, changed fields, inputs' shapes, each output's
    (kernels.ATTENTION, {}, [QKV, BIAS], (154, WIDTH)),
    (kernels.ATTENTION, {}, [(-1, 3 * WIDTH), BIAS], (-1, WIDTH)),
    (kernels.ATTENTION, {"query_bias": 0}, [(2, 77, 3 * WIDTH)], (2, 77, WIDTH)),
    (kernels.BIAS_QUICK_GELU, {}, [(-1, 3072), (1, 3072)], (-1, 3072)),
    (kernels.RESIDUAL_LAYER_NORM, {}, [(100, 768)] * 2 + [(768,)] * 3, (100, 768)),
    (kernels.RESIDUAL_LAYER_NORM, {"residual": 0}, [(2, 50, 768), (768,), (1, 768)], (2, 50, 768)),
    (kernels.EXTRACT_PATCHES, {}, [(8, 3, 224, 224)], (8 * 256, 588)),
    (kernels.EXTRACT_PATCHES, {}, [(-1, 3, 224, 224)], (-1, 588)),
    (kernels.EMBED_IMAGE, {}, [(98, 768), (768,), (50, 768)] + [(768,)] * 4, (100, 768)),
    (kernels.EMBED_IMAGE, {}, [(-1, 768), (1, 768), (38400,)] + [(768,)] * 4, (-1, 768)),
    (kernels.LINEAR, {}, [(-1, 128), (64, 128)], (-1, 64)),
    (kernels.LINEAR, {"table": TABLE_WITH_BIAS}, [(2, 5, 128), (64, 128), (64,)], (2, 5, 64)),
]


@pytest.mark.parametrize("name, changed, inputs, output", SHAPES)
def test_output_shapes(trt, name, changed, inputs, output):
    plugin = trt.plugin(name, **changed)
    assert trt.output_shapes(plugin, *inputs) == [output] * trt.tensorrt.outputs(plugin)


WRONG_SHAPES = [
    (kernels.ATTENTION, {}, [(3 * WIDTH,), BIAS]),
    (kernels.ATTENTION, {}, [(2, 77, 1, 3 * WIDTH), BIAS]),
    (kernels.ATTENTION, {}, [(2, 76, 3 * WIDTH), BIAS]),
    (kernels.ATTENTION, {}, [(154, 2 * WIDTH), BIAS]),
    (kernels.ATTENTION, {}, [(155, 3 * WIDTH), BIAS]),
    (kernels.ATTENTION, {}, [QKV, (WIDTH - 1,)]),
    (kernels.ATTENTION, {}, [QKV, (1, WIDTH)]),
    (kernels.BIAS_QUICK_GELU, {}, [(3072,), (3072,)]),
    (kernels.BIAS_QUICK_GELU, {}, [(2, 3072), (3071,)]),
    (kernels.RESIDUAL_LAYER_NORM, {}, [(768,)] * 5),
    (kernels.RESIDUAL_LAYER_NORM, {}, [(100, 768), (50, 768)] + [(768,)] * 3),
    (kernels.RESIDUAL_LAYER_NORM, {}, [(2, 50, 768), (100, 768)] + [(768,)] * 3),
    *((kernels.RESIDUAL_LAYER_NORM, {},
       [(100, 768)] * 2 + [(767 if at == i else 768,) for i in range(3)]) for at in range(3)),
    (kernels.EXTRACT_PATCHES, {}, [(3, 224, 224)]),
    (kernels.EXTRACT_PATCHES, {}, [(8, 4, 224, 224)]),
    (kernels.EXTRACT_PATCHES, {}, [(8, 3, 224, 238)]),
    (kernels.EXTRACT_PATCHES, {}, [(8, 3, 220, 220)]),
    (kernels.EMBED_IMAGE, {}, [(2, 49, 768), (768,), (50, 768)] + [(768,)] * 4),
    (kernels.EMBED_IMAGE, {}, [(99, 768), (768,), (50, 768)] + [(768,)] * 4),
    (kernels.EMBED_IMAGE, {}, [(98, 768), (768,), (49, 768)] + [(768,)] * 4),
    (kernels.EMBED_IMAGE, {}, [(98, 768), (768,), (50, 768)] + [(768,)] * 3 + [(767,)]),
    (kernels.LINEAR, {}, [(128,), (64, 128)]),
    (kernels.LINEAR, {}, [(5, 127), (64, 128)]),
    (kernels.LINEAR, {}, [(5, 128), (64, 127)]),
    (kernels.LINEAR, {"table": TABLE_WITH_BIAS}, [(5, 128), (64, 128), (63,)]),
]  # fmt: skip


@pytest.mark.parametrize("name, changed, inputs", WRONG_SHAPES)
def test_wrong_shapes_are_refused_in_a_network_and_at_a_launch(trt, name, changed, inputs, capfd):
    plugin, before = trt.plugin(name, **changed), trt.launches()
    assert trt.output_shapes(plugin, *inputs) is None
    assert trt.enqueue(plugin, *inputs) == INVALID_VALUE
    assert trt.launches() == before
    lines = capfd.readouterr().err.splitlines()
    assert len(lines) == 2 and all(line.startswith(f"{name} plugin: ") for line in lines)


@pytest.mark.parametrize("name, changed, inputs, output", SHAPES)
def test_another_number_of_inputs_is_refused(trt, name, changed, inputs, output, capfd):
    plugin = trt.plugin(name, **changed)
    assert trt.output_shapes(plugin, *inputs[:-1]) is None
    assert trt.output_shapes(plugin, *inputs, (1,)) is None
    assert capfd.readouterr().err.count("another number of inputs") == 2


# Launches: input i is at 16 (i + 1), output i at 1600 + 16 i.

OUT, SECOND = 1600, 1616
LAUNCHES = [
    (kernels.ATTENTION, {}, [QKV, BIAS], kernels.AttentionParams,
     {"qkv": 16, "out": OUT, "query_bias": 32, "batch": 2, "heads": 12, "tokens": 77, "causal": 1,
      "variant": 0}),
    (kernels.ATTENTION, {"query_bias": 0, "causal": 0}, [(3, 77, 3 * WIDTH)],
     kernels.AttentionParams,
     {"qkv": 16, "out": OUT, "query_bias": None, "batch": 3, "heads": 12, "tokens": 77,
      "causal": 0, "variant": 0}),
    (kernels.BIAS_QUICK_GELU, {}, [(2, 50, 3072), (3072,)], elementwise.GeluParams,
     {"in": 16, "bias": 32, "out": OUT, "rows": 100, "width": 3072}),
    (kernels.RESIDUAL_LAYER_NORM, {}, [(100, 768)] * 2 + [(768,)] * 3, elementwise.LayerNormParams,
     {"x": 16, "delta": 32, "bias": 48, "scale": 64, "shift": 80, "sum_out": OUT, "out": SECOND,
      "rows": 100, "width": 768, "epsilon": pytest.approx(1e-5)}),
    (kernels.RESIDUAL_LAYER_NORM, {"residual": 0}, [(100, 768), (768,), (768,)],
     elementwise.LayerNormParams,
     {"x": 16, "delta": None, "bias": None, "scale": 32, "shift": 48, "sum_out": None, "out": OUT,
      "rows": 100, "width": 768, "epsilon": pytest.approx(1e-5)}),
    (kernels.EXTRACT_PATCHES, {}, [(8, 3, 224, 224)], elementwise.PatchesParams,
     {"images": 16, "out": OUT, "batch": 8, "resolution": 224, "patch_size": 14, "half": 1}),
    (kernels.EMBED_IMAGE, {}, [(98, 768), (768,), (50, 768)] + [(768,)] * 4,
     elementwise.EmbedParams,
     {"patches": 16, "class_token": 32, "positions": 48, "scale_pre": 64, "shift_pre": 80,
      "scale_1": 96, "shift_1": 112, "x": OUT, "y": SECOND, "batch": 2, "tokens": 50, "width": 768,
      "epsilon_pre": pytest.approx(1e-5), "epsilon_1": pytest.approx(1e-6)}),
]  # fmt: skip


@pytest.mark.parametrize("name, changed, inputs, params, expected", LAUNCHES)
def test_launches_are_given_what_the_plugin_has(trt, name, changed, inputs, params, expected):
    plugin, before = trt.plugin(name, **changed), trt.launches()
    attached = trt.tensorrt.attach(plugin)  # an execution context's own
    trt.tensorrt.destroy(plugin)
    assert trt.enqueue(attached, *inputs) == 0
    assert trt.launches() == before + 1
    assert trt.launched(params) == expected


def test_patches_of_either_type(trt):
    plugin = trt.plugin(kernels.EXTRACT_PATCHES)
    for kind, half in ((FLOAT, 0), (HALF, 1)):
        assert trt.enqueue(plugin, (8, 3, 224, 224), types=[kind]) == 0
        assert trt.launched(elementwise.PatchesParams)["half"] == half


def test_no_images_are_no_work(trt):
    plugin, before = trt.plugin(kernels.ATTENTION, query_bias=0), trt.launches()
    assert trt.enqueue(plugin, (0, 3 * WIDTH)) == 0 and trt.launches() == before


def test_sizes_beyond_int32_do_not_wrap(trt):
    """2^32 + 768 would be 768."""
    plugin = trt.plugin(kernels.BIAS_QUICK_GELU)
    assert trt.enqueue(plugin, (2, 2**32 + 768), (2**32 + 768,)) == 0
    assert trt.launched(elementwise.GeluParams)["width"] == 2**31 - 1


def test_what_a_launch_returns_is_returned_and_told(trt, capfd):
    plugin = trt.plugin(kernels.BIAS_QUICK_GELU)
    status = ctypes.c_int32.in_dll(trt.library, "launch_status")
    status.value = 209  # cudaErrorNoKernelImageForDevice
    try:
        assert trt.enqueue(plugin, (2, 8), (8,)) == 209
    finally:
        status.value = 0
    [line] = capfd.readouterr().err.splitlines()
    assert line.startswith(f"{kernels.BIAS_QUICK_GELU} plugin: ") and "kernel image" in line
