"""Finding and checking the library of kernels: which one serves, and why one does not."""

import ctypes
import shutil
import subprocess

import pytest
import torch

from clip_ttrt import kernels, stack
from clip_ttrt.errors import UserError

# What the loader asks of a library.
SOURCE = """
const char about[] = "clip_ttrt kernels: version=%(version)s architectures=%(architectures)s"
                     " tensorrt=%(major)s;";
const char* clip_ttrt_version(void) { return "%(told)s"; }
const char* clip_ttrt_architectures(void) { return "%(architectures)s"; }
int clip_ttrt_register_plugins(void) { return %(registers)s; }
int clip_attention_params_size(void) { return %(size)s; }
int clip_attention_launch(void) { return 0; }
unsigned long clip_linear_version(void) { return %(cublaslt)s; }
"""
SIZE = ctypes.sizeof(kernels.AttentionParams)


def forget():
    for one in (kernels.version, kernels.library, kernels._has_code_for):
        one.cache_clear()


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A checkout of two sources, an empty cache folder, TensorRT 10, and no GPU."""
    (tmp_path / "clip_ttrt").mkdir()
    (tmp_path / "kernels" / "op").mkdir(parents=True)
    (tmp_path / "kernels" / "plugin.h").write_text("// a header")
    (tmp_path / "kernels" / "op" / "op.cu").write_text("// a kernel")
    (tmp_path / "kernels" / "NOTES.md").write_text("not compiled")
    monkeypatch.setattr(kernels, "PACKAGE", tmp_path / "clip_ttrt")
    monkeypatch.setattr(stack, "tensorrt_major", lambda: 10)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    forget()
    yield tmp_path
    forget()


def put(folder, major=10, version=None, architectures="80 90a"):
    """A file that tells what it is and is no library."""
    version = kernels.version() if version is None else version
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / kernels.file_name(major)
    text = f"clip_ttrt kernels: version={version} architectures={architectures} tensorrt={major};"
    path.write_bytes(b"\x7fELF\0" + text.encode() + b"\0\xff")
    return path


def compiled(folder, major=10, **changed):
    """A library with what the loader asks for."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        pytest.skip("needs a C compiler")
    facts = {"version": kernels.version(), "told": kernels.version(), "architectures": "80"}
    facts |= {"major": major, "registers": 1, "size": SIZE, "cublaslt": 130000, **changed}
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / kernels.file_name(major)
    command = [compiler, "-shared", "-fPIC", "-x", "c", "-o", str(path), "-"]
    subprocess.run(command, input=SOURCE % facts, text=True, check=True)
    return path


# The version


def test_version_is_of_the_names_and_bytes_of_what_is_compiled(place):
    first = kernels.version()
    assert len(first) == 12 and int(first, 16) >= 0

    def changed():
        kernels.version.cache_clear()
        return kernels.version() != first

    notes, header = place / "kernels" / "NOTES.md", place / "kernels" / "plugin.h"
    notes.write_text("other notes")
    assert not changed()
    header.write_text("// another header")
    assert changed()
    header.write_text("// a header")
    assert not changed()
    header.rename(header.with_name("plugins.h"))
    assert changed()


def test_version_is_the_same_in_an_installed_package(place):
    first = kernels.version()
    shutil.copytree(place / "kernels", place / "clip_ttrt" / "kernel_sources")
    shutil.rmtree(place / "kernels")
    forget()
    assert kernels.version() == first


def test_missing_sources_are_a_user_error(place):
    shutil.rmtree(place / "kernels")
    with pytest.raises(UserError, match="sources are missing"):
        kernels.version()


# Which library serves


def test_a_file_tells_what_it_is(place):
    path = put(place / "clip_ttrt" / "lib", 11, "0123456789ab", "80 86 90a 120")
    expected = kernels.Library(path, "0123456789ab", ("80", "86", "90a", "120"), 11)
    assert kernels.read(path) == expected
    path.write_bytes(b"something else")
    assert kernels.read(path) == kernels.Library(path, "unknown", (), 0)


def test_the_best_library_is_found(place):
    """The installed TensorRT's, then a current one, then the package's."""
    own, cache = kernels.folders()
    assert kernels.find() is None
    for folder, major, version in (
        (cache, 11, "0" * 12),
        (own, 0, kernels.version()),
        (cache, 10, "0" * 12),
        (cache, 10, kernels.version()),
        (own, 10, kernels.version()),
    ):
        path = put(folder, major, version)
        assert kernels.find().path == path
    assert put(own, 10, "0" * 12) and kernels.find().path == cache / kernels.file_name(10)


def test_without_tensorrt_any_current_library_will_do(place, monkeypatch):
    monkeypatch.setattr(stack, "tensorrt_major", lambda: None)
    put(kernels.folders()[0], 10, "0" * 12)
    path = put(kernels.folders()[1], 11)
    assert kernels.find().path == path and kernels.available()


@pytest.mark.parametrize("architectures, capability, runs", [
    ("80", (8, 0), True), ("80", (8, 6), True), ("86", (8, 0), False), ("86", (8, 9), True),
    ("90a", (9, 0), True), ("80 86 89", (9, 0), False), ("90a", (8, 9), False),
    ("100", (10, 0), True), ("100", (10, 3), True), ("90a", (10, 0), False),
    ("120", (12, 0), True), ("120", (12, 1), True), ("120", (13, 0), True),
    ("120", (11, 0), False), ("100", (12, 0), False), ("", (8, 0), False),
])  # fmt: skip
def test_which_gpus_code_runs_on(architectures, capability, runs):
    assert kernels.runs_on(tuple(architectures.split()), capability) == runs


# Why one does not serve


def on_a_gpu(monkeypatch, capability):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *device: capability)


@pytest.mark.parametrize("expected, prepare", [
    ("libclip_ttrt_kernels-trt10.so is not built", lambda own, _: None),
    ("is stale: its version is 000000000000", lambda own, _: put(own, version="0" * 12)),
    ("is stale: its version is unknown", lambda own, _: put(own).write_text("no library")),
    ("is for TensorRT 11, and TensorRT 10 is installed", lambda own, _: put(own, 11)),
    ("has no plugins, built without TensorRT's headers", lambda own, _: put(own, 0)),
    ("is for sm_80, sm_90a, and this GPU's compute capability is 12.0",
     lambda own, monkeypatch: (put(own), on_a_gpu(monkeypatch, (12, 0)))),
    ("cannot be loaded", lambda own, _: put(own)),
    ("belongs to another version", lambda own, _: compiled(own, told="0" * 12)),
    ("belongs to another version", lambda own, _: compiled(own, size=SIZE + 8)),
])  # fmt: skip
def test_obstacles_end_in_the_remedy(expected, prepare, place, monkeypatch):
    prepare(kernels.folders()[0], monkeypatch)
    problem = kernels.obstacle()
    assert expected in problem and "\n" not in problem
    assert problem.endswith("; build it with `python -m clip_ttrt.build_kernels`")
    with pytest.raises(UserError) as raised:
        kernels.load(kernels.version())
    assert str(raised.value) == f"this artifact needs the fused kernels: {problem}"


def test_a_library_that_serves_has_none(place, monkeypatch):
    compiled(kernels.folders()[0])
    on_a_gpu(monkeypatch, (8, 6))
    assert kernels.obstacle() is None
    kernels.load(kernels.version())
    kernels.load(None)
    assert kernels.serves_on(torch.device("cuda:0"))


def test_missing_cublaslt_is_an_obstacle(place):
    compiled(kernels.folders()[0], cublaslt=0)
    assert kernels.obstacle().startswith("libcublasLt.so.13 is not found")


def test_an_engine_of_other_kernels_is_refused(place):
    compiled(kernels.folders()[0])
    with pytest.raises(UserError, match="needs version 0123456789ab .* compile again"):
        kernels.load("0123456789ab")


def test_a_tensorrt_that_does_not_take_the_plugins_is_told(place):
    compiled(kernels.folders()[0], registers=0)
    with pytest.raises(UserError, match="TensorRT does not take the plugins"):
        kernels.load(kernels.version())
    with pytest.warns(UserWarning, match="engines that need the fused kernels will not load"):
        kernels.register()


def test_nothing_is_registered_where_nothing_is_built(place, recwarn):
    kernels.register()
    put(kernels.folders()[0], version="0" * 12)
    kernels.register()
    assert not recwarn.list


def test_ops_of_pytorch_run_without_plugins_and_only_where_there_is_code(place, monkeypatch):
    compiled(kernels.folders()[0], 0, architectures="90a")
    on_a_gpu(monkeypatch, (9, 0))
    assert kernels.available() and kernels.serves_on(torch.device("cuda:0"))
    assert "has no plugins" in kernels.obstacle()
    on_a_gpu(monkeypatch, (8, 0))
    assert not kernels.serves_on(torch.device("cuda:1"))


def test_copies_are_made_only_where_they_are_needed():
    x = torch.zeros(64)
    assert kernels.aligned(x) is x
    for other in (x[1:17], x.view(8, 8).T):
        copy = kernels.aligned(other)
        assert copy.is_contiguous() and copy.data_ptr() % 16 == 0 and torch.equal(copy, other)
