"""The plugins' C++, called as TensorRT calls it, by a stand-in: needs g++ and TensorRT's headers,
neither its library nor a GPU."""
import _ctypes
import ctypes
import os
import shutil
import struct
import subprocess
from pathlib import Path

import pytest
import toolchain
from plugins import (
    FIELDS, FLOAT, FORMS, HALF, TABLE, each_form, each_plugin, each_wrong_shape, form_of,
)

from clip_ttrt import build_kernels, kernels, linear

VERSION = "0123456789ab"
INT32, FLOAT32, INT8, INT64 = 5, 1, 3, 10  # of PluginFieldType
LINEAR, CHW2 = 0, 1  # of TensorFormat
BUILD, RUNTIME = 0, 1  # of TensorRTPhase
INVALID_VALUE = 1  # cudaErrorInvalidValue
NOWHERE = 8  # an address that nobody may read


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
    one = Field(name.encode(), ctypes.addressof(buffer), kind, length)
    one.buffer = buffer
    return one


def collection(fields):
    """A collection of fields, or of name -> value, which keeps them alive."""
    fields = [field(*one) for one in fields.items()] if isinstance(fields, dict) else fields
    found = Collection(len(fields), (Field * len(fields))(*fields))
    found.kept = fields
    return found


def values_of(found):
    """(name, type, bytes) of each field of a collection."""
    sizes = {INT32: 4, FLOAT32: 4, INT8: 1}
    fields = found.fields[: found.count]
    return [(one.name.decode(), one.type, ctypes.string_at(one.data, one.length * sizes[one.type]))
            for one in fields]


class TensorRT:
    """The stand-in, with the library of kernels that it has loaded and its plugins by name."""

    def __init__(self, tensorrt, library):
        self.tensorrt, self.library = tensorrt, library
        plugin, text, fields = ctypes.c_void_p, ctypes.c_char_p, ctypes.POINTER(Collection)
        number = ctypes.c_int32
        for name, result, *arguments in (
            ("creator_name", text, number), ("creator_version", text, number),
            ("creator_namespace", text, number), ("creator_fields", fields, number),
            ("create", plugin, number, fields, number), ("plugin_name", text, plugin),
            ("plugin_version", text, plugin), ("fields", fields, plugin),
            ("copy", plugin, plugin), ("attach", plugin, plugin), ("destroy", None, plugin),
            ("outputs", number, plugin), ("workspace", ctypes.c_size_t, plugin),
            ("supports", number, plugin, *[number] * 5),
            ("output_types", number, plugin, plugin, number, plugin),
            ("output_shapes", number, plugin, plugin, number, plugin),
            ("enqueue", number, plugin, plugin, plugin, number),
        ):  # fmt: skip
            function = getattr(tensorrt, name)
            function.restype, function.argtypes = result, arguments
        self.creators = {tensorrt.creator_name(i).decode(): i for i in range(6)}

    def create(self, name, fields, phase=BUILD):
        """The plugin's address, or None."""
        return self.tensorrt.create(self.creators[name], fields, phase)

    def plugin(self, form):
        plugin = self.create(form.plugin, collection(form.fields))
        assert plugin is not None
        return plugin

    def output_shapes(self, plugin, shapes):
        """The outputs' shapes, None where the plugin refuses; -1 is a size that is not known."""
        out = (ctypes.c_int64 * 18)()
        if self.tensorrt.output_shapes(plugin, dims(shapes), len(shapes), out) != 0:
            return None
        count = self.tensorrt.outputs(plugin)
        return [tuple(out[9 * i + 1 : 9 * i + 1 + out[9 * i]]) for i in range(count)]

    def enqueue(self, plugin, shapes, type=HALF):
        types = (ctypes.c_int32 * len(shapes))(*[type] * len(shapes))
        return self.tensorrt.enqueue(plugin, dims(shapes), types, len(shapes))

    def launched(self, launcher):
        """What the last launch was given, as name -> value."""
        raw = (ctypes.c_ubyte * 256).in_dll(self.library, "launched")
        params = kernels.PARAMS[launcher].from_buffer_copy(raw)
        return {name: getattr(params, name) for name, _ in params._fields_}

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
    if toolchain.cuda() is None or shutil.which("g++") is None:
        pytest.skip("needs g++ and the CUDA runtime's headers")
    folder, (include, cudart) = tmp_path_factory.mktemp("trt"), toolchain.cuda()
    fake = str(Path(__file__).with_name("fake_tensorrt.cpp"))
    runtime = folder / f"libnvinfer.so.{build_kernels.major_of_headers(request.param)}"
    library = folder / "library.so"
    # What is deprecated is TensorRT's own, of what a registry must have.
    compiler = ["g++", "-std=c++17", "-O1", "-fno-gnu-unique", "-fPIC", "-shared", "-Wall"]
    compiler += ["-Wextra", "-Werror", "-Wno-deprecated", "-Wno-deprecated-declarations"]
    compiler += ["-isystem", str(request.param), "-isystem", str(include)]
    about = ["-DCLIP_TTRT_PLUGINS", f'-DCLIP_TTRT_VERSION="{VERSION}"']
    about += ['-DCLIP_TTRT_ARCHITECTURES="90a"', "-Wno-unused-function"]
    names = [name for name in build_kernels.compiled_sources() if name.endswith(".cpp")]
    sources = [str(kernels.sources() / name) for name in names]
    sources += ["-x", "c++", "-DLAUNCHERS", fake, "-x", "none", str(cudart), "-ldl"]
    runs = [
        subprocess.Popen([*compiler, f"-Wl,-soname,{runtime.name}", "-o", str(runtime), fake]),
        subprocess.Popen([*compiler, *about, "-o", str(library), *sources]),
    ]
    assert [run.wait() for run in runs] == [0, 0]
    # libnvinfer comes first, as in a process that has imported tensorrt.
    tensorrt = ctypes.CDLL(str(runtime), mode=os.RTLD_LOCAL)
    loaded = ctypes.CDLL(str(library))
    yield TensorRT(tensorrt, loaded)
    for one in (loaded, tensorrt):  # the next set of headers may be of the same soname
        _ctypes.dlclose(one._handle)


# Registration


def test_every_copy_of_the_library_finds_all_plugins_registered_once(trt, tmp_path):
    """TensorRT would log an error for a name and version that it has, and for a question."""
    copy = ctypes.CDLL(shutil.copy(trt.library._name, tmp_path / "copy.so"))
    for library in (trt.library, copy):
        assert library.clip_ttrt_register_plugins() == 1
    _ctypes.dlclose(copy._handle)
    assert set(trt.creators) == set(FIELDS)
    assert trt.tensorrt.registrations() == 6 and trt.tensorrt.questions() == 0


def test_the_library_tells_what_it_is(trt):
    trt.library.clip_ttrt_version.restype = ctypes.c_char_p
    trt.library.clip_ttrt_architectures.restype = ctypes.c_char_p
    about = kernels.read(Path(trt.library._name))
    assert trt.library.clip_ttrt_version().decode() == about.version == VERSION
    assert trt.library.clip_ttrt_architectures().decode() == " ".join(about.architectures) == "90a"
    assert trt.library.clip_ttrt_tensorrt_major() == about.tensorrt_major
    assert about.tensorrt_major == trt.tensorrt.tensorrt_major()


@each_plugin
def test_creators_name_their_fields(trt, name):
    number = trt.creators[name]
    found = trt.tensorrt.creator_fields(number).contents
    fields = found.fields[: found.count]
    assert [one.name.decode() for one in fields] == list(FIELDS[name])
    assert all(one.data is None for one in fields)
    assert trt.tensorrt.creator_version(number).decode() == VERSION
    assert trt.tensorrt.creator_namespace(number) == b""


# Fields


@pytest.mark.parametrize("phase", [BUILD, RUNTIME])
@each_plugin
def test_fields_are_what_an_engine_holds(trt, name, phase):
    """Also of copies, and of a plugin made from what another would write into an engine."""
    fields = collection(FIELDS[name])
    plugin = trt.create(name, fields, phase)
    again = trt.create(name, trt.tensorrt.fields(plugin), RUNTIME)
    for one in (plugin, again, trt.tensorrt.copy(plugin), trt.tensorrt.copy(again)):
        assert values_of(trt.tensorrt.fields(one).contents) == values_of(fields)
        assert trt.tensorrt.plugin_name(one).decode() == name
        assert trt.tensorrt.plugin_version(one).decode() == VERSION
        trt.tensorrt.destroy(one)


def wrong_fields():
    """(plugin, what is wrong, a word of the line, a collection or None) for every field."""
    for name, values in FIELDS.items():
        good = collection(values).kept
        yield name, "unknown", "there is no field other", collection([*good, field("other", 1)])
        yield name, "no name", "has no name", collection([*good, Field(None, NOWHERE, INT32, 1)])
        yield name, "null fields", "no fields", Collection(1, None)
        yield name, "negative count", "no fields", Collection(-1, None)
        if good:
            yield name, "null collection", "is missing", None
        for i, one in enumerate(good):
            key, others = one.name.decode(), [*good[:i], *good[i + 1 :]]
            yield name, f"{key}: missing", f"the field {key} is missing", collection(others)
            yield name, f"{key}: twice", f"{key} is given twice", collection([*good, one])
            kind = INT64 if one.type == INT32 else INT32
            for what, *wrong in (
                ("null data", None, one.type, one.length),
                ("another type", NOWHERE, kind, one.length),
                ("another length", NOWHERE, one.type, 0 if one.type == INT8 else 2),
                ("a length below 0", NOWHERE, one.type, -1),
            ):
                fields = collection([*others, Field(one.name, *wrong)])
                yield name, f"{key}: {what}", f"the field {key} is not", fields


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


def wrong_values():
    nan, infinite = float("nan"), float("inf")
    wrong = {
        "heads": (0, 41), "tokens": (0, 1025), "causal": (2, -1), "query_bias": (2, -1),
        "residual": (2, -1), "epsilon": (0.0, -1.0, nan, infinite), "epsilon_pre": (0.0,),
        "epsilon_1": (nan,), "patch_size": (0, 15, -2, 4098),
        "table": [TABLE[:-1], TABLE + b"\0", b"\0"] + [
            TABLE[:at] + struct.pack("<i", value) + TABLE[at + 4 :]
            for at, value in (
                (0, 0), (0, 6), (4, 12), (4, 65544), (8, 2), (8, -1), (12, 1), (12, -1))
        ] + [linear.pack(64, 128, False, entries) for entries in (
            [linear.Entry(0)], [linear.Entry(2**31)], [linear.Entry(1)] * 65)],
    }  # fmt: skip
    for name, fields in FIELDS.items():
        yield from ((name, key, value) for key in fields for value in wrong[key]
                    if (name, value) != (kernels.EMBED_IMAGE, 1025))


@pytest.mark.parametrize("name, key, value", list(wrong_values()))
def test_wrong_values_are_refused(trt, name, key, value, capfd):
    assert trt.create(name, collection({**FIELDS[name], key: value})) is None
    [line] = capfd.readouterr().err.splitlines()
    assert line.startswith(f"{name} plugin: ")


# Types, formats, shapes


@each_form
def test_each_position_has_its_types(trt, form):
    plugin, supports = trt.plugin(form), trt.tensorrt.supports
    outputs, count = form.outputs, len(form.inputs)
    assert trt.tensorrt.outputs(plugin) == outputs
    kinds = [{HALF}] * form.halves + [{FLOAT}] * (count - form.halves) + [{HALF}] * outputs
    if form.plugin == kernels.EXTRACT_PATCHES:
        kinds[0] = {HALF, FLOAT}
    for at, expected in enumerate(kinds):
        taken = {kind for kind in range(8) if supports(plugin, at, kind, LINEAR, count, outputs)}
        assert taken == expected
        assert not supports(plugin, at, HALF, CHW2, count, outputs)
    assert not supports(plugin, 0, HALF, LINEAR, count + 1, outputs)
    assert not supports(plugin, 0, HALF, LINEAR, count, outputs + 1)
    for kind in (HALF, FLOAT):
        given, found = (ctypes.c_int32 * 7)(*[kind] * 7), (ctypes.c_int32 * 2)(-1, -1)
        assert trt.tensorrt.output_types(plugin, given, count, found) == 0
        assert found[:outputs] == [HALF] * outputs
    workspace = linear.WORKSPACE_BYTES if form.plugin == kernels.LINEAR else 0
    assert trt.tensorrt.workspace(plugin) == workspace


@each_form
def test_output_shapes(trt, form, capfd):
    """Also with a first size that is not known yet."""
    plugin = trt.plugin(form)
    assert trt.output_shapes(plugin, form.inputs) == [form.output] * form.outputs
    first, *others = form.inputs
    output = (-1, *form.output[1:])
    assert trt.output_shapes(plugin, [(-1, *first[1:]), *others]) == [output] * form.outputs
    for wrong in (form.inputs[:-1], [*form.inputs, (1,)]):
        assert trt.output_shapes(plugin, wrong) is None
    assert capfd.readouterr().err.count("another number of inputs") == 2


@each_wrong_shape
def test_wrong_shapes_are_refused_in_a_network_and_at_a_launch(trt, form, shapes, capfd):
    plugin, before = trt.plugin(form), trt.launches()
    assert trt.output_shapes(plugin, shapes) is None
    assert trt.enqueue(plugin, shapes) == INVALID_VALUE
    assert trt.launches() == before
    lines = capfd.readouterr().err.splitlines()
    assert len(lines) == 2 and all(line.startswith(f"{form.plugin} plugin: ") for line in lines)


# Launches: input i is at 16 (i + 1), output i at 1600 + 16 i.


@pytest.mark.parametrize("form", [one for one in FORMS if one.plugin != kernels.LINEAR])
def test_launches_are_given_what_the_plugin_has(trt, form):
    plugin, before = trt.plugin(form), trt.launches()
    attached = trt.tensorrt.attach(plugin)  # an execution context's own
    trt.tensorrt.destroy(plugin)
    assert trt.enqueue(attached, form.inputs, HALF if form.halves else FLOAT) == 0
    assert trt.launches() == before + 1
    addresses = {f"x{i}": 16 * (i + 1) for i in range(8)} | {"y0": 1600, "y1": 1616}
    expected = {key: addresses[one] if isinstance(one, str) else one
                for key, one in form.params.items()}
    assert trt.launched(form.launcher) == expected


def test_no_images_are_no_work(trt):
    form, before = form_of(kernels.ATTENTION), trt.launches()
    assert trt.enqueue(trt.plugin(form), [(0, *form.inputs[0][1:]), *form.inputs[1:]]) == 0
    assert trt.launches() == before


def test_sizes_beyond_int32_do_not_wrap(trt):
    """2^32 + 768 would be 768."""
    plugin = trt.plugin(form_of(kernels.BIAS_QUICK_GELU))
    assert trt.enqueue(plugin, [(2, 2**32 + 768), (2**32 + 768,)]) == 0
    assert trt.launched("bias_quick_gelu")["width"] == 2**31 - 1


def test_what_a_launch_returns_is_returned_and_told(trt, capfd):
    plugin = trt.plugin(form_of(kernels.BIAS_QUICK_GELU))
    status = ctypes.c_int32.in_dll(trt.library, "launch_status")
    status.value = 209  # cudaErrorNoKernelImageForDevice
    try:
        assert trt.enqueue(plugin, [(2, 8), (8,)]) == 209
    finally:
        status.value = 0
    [line] = capfd.readouterr().err.splitlines()
    assert line.startswith(f"{kernels.BIAS_QUICK_GELU} plugin: ") and "kernel image" in line
