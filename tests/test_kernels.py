"""Finding and checking the library of kernels: which one serves, and why one does not."""
import ctypes
import functools
from types import SimpleNamespace

import pytest
import torch

from clip_ttrt import kernels
from clip_ttrt.errors import UserError


@pytest.fixture
def own(tmp_path, monkeypatch):
    """The package's folder for libraries, beside two sources, with TensorRT 10 and no GPU."""
    (tmp_path / "kernels" / "op").mkdir(parents=True)
    for name in ("plugin.h", "op/op.cu", "NOTES.md"):
        (tmp_path / "kernels" / name).write_text(name)
    monkeypatch.setattr(kernels, "PACKAGE", tmp_path / "clip_ttrt")
    monkeypatch.setattr(kernels, "tensorrt_major", lambda: 10)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(kernels, "version", kernels.version.__wrapped__)  # without its cache
    monkeypatch.setattr(kernels, "library", functools.cache(kernels.library.__wrapped__))
    return kernels.folders()[0]


def put(folder, major=10, version=None, architectures="80 90a"):
    """A file that tells what it is and is no library."""
    folder.mkdir(parents=True, exist_ok=True)
    path, version = folder / kernels.file_name(major), version or kernels.version()
    text = f"clip_ttrt kernels: version={version} architectures={architectures} tensorrt={major};"
    path.write_bytes(b"\x7fELF\0" + text.encode() + b"\0\xff")
    return path


def on_a_gpu(monkeypatch, capability):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *device: capability)


@pytest.fixture
def loads(own, monkeypatch):
    """Puts a library that loads: what the loader asks of it, without its kernels."""

    def put_it(major=10, told=None, architectures="80", registers=1, cublaslt=130000):
        put(own, major, architectures=architectures)
        loaded = SimpleNamespace(
            clip_ttrt_version=lambda: (told or kernels.version()).encode(),
            clip_ttrt_architectures=lambda: architectures.encode(),
            clip_ttrt_register_plugins=lambda: registers, clip_linear_version=lambda: cublaslt,
        )  # fmt: skip
        monkeypatch.setattr(ctypes, "CDLL", lambda path: loaded)

    return put_it


def test_version_is_of_the_names_and_bytes_of_what_is_compiled(own):
    folder, found = kernels.sources(), []
    for change in (
        lambda: None, lambda: (folder / "NOTES.md").write_text("other notes"),
        lambda: (folder / "plugin.h").write_text("another header"),
        lambda: (folder / "plugin.h").rename(folder / "plugins.h"),
        lambda: folder.rename(own.parent / "kernel_sources"),  # an installed package's
    ):  # fmt: skip
        own.parent.mkdir(exist_ok=True)
        change()
        found.append(kernels.version())
    first, notes, header, renamed, installed = found
    assert first == notes and renamed == installed and len({first, header, renamed}) == 3


def test_the_best_library_is_found(own, monkeypatch):
    """The installed TensorRT's, then a current one, then the package's."""
    cache = kernels.folders()[1]
    assert kernels.find() is None
    current, stale = kernels.version(), "0" * 12
    for folder, major, version in (
        (cache, 11, stale), (own, 0, current), (cache, 10, stale), (cache, 10, current),
        (own, 10, current),
    ):  # fmt: skip
        path = put(folder, major, version)
        assert kernels.find().path == path
    assert put(own, 10, stale) and kernels.find().path == cache / kernels.file_name(10)
    monkeypatch.setattr(kernels, "tensorrt_major", lambda: None)  # any current one will do then
    assert kernels.find().version == current and kernels.available()


@pytest.mark.parametrize("architectures, capability, runs", [
    ("80", (8, 0), True), ("80", (8, 6), True), ("86", (8, 0), False), ("86", (8, 9), True),
    ("90a", (9, 0), True), ("80 86 89", (9, 0), False), ("90a", (8, 9), False),
    ("100", (10, 3), True), ("90a", (10, 0), False), ("120", (12, 1), True),
    ("120", (13, 0), True), ("120", (11, 0), False), ("100", (12, 0), False), ("", (8, 0), False),
])  # fmt: skip
def test_which_gpus_code_runs_on(architectures, capability, runs):
    assert kernels.runs_on(tuple(architectures.split()), capability) == runs


@pytest.mark.parametrize("expected, prepare", [
    ("libclip_ttrt_kernels-trt10.so is not built", lambda own, _: None),
    ("is stale: its version is 000000000000", lambda own, _: put(own, version="0" * 12)),
    ("is stale: its version is unknown", lambda own, _: put(own).write_text("no library")),
    ("is for TensorRT 11, and TensorRT 10 is installed", lambda own, _: put(own, 11)),
    ("has no plugins, built without TensorRT's headers", lambda own, _: put(own, 0)),
    ("is for sm_80, sm_90a, and this GPU's compute capability is 12.0",
     lambda own, monkeypatch: (put(own), on_a_gpu(monkeypatch, (12, 0)))),
    ("cannot be loaded", lambda own, _: put(own)),
])  # fmt: skip
def test_obstacles_end_in_the_remedy(expected, prepare, own, monkeypatch):
    prepare(own, monkeypatch)
    problem = kernels.obstacle()
    assert expected in problem and "\n" not in problem
    assert problem.endswith("; build it with `python -m clip_ttrt.build_kernels`")
    with pytest.raises(UserError) as raised:
        kernels.load(kernels.version())
    assert str(raised.value) == f"this artifact needs the fused kernels: {problem}"


def test_a_library_that_serves_has_none(own, loads, monkeypatch, recwarn):
    kernels.register()  # where nothing is built
    loads()
    on_a_gpu(monkeypatch, (8, 6))
    assert kernels.obstacle() is None and kernels.serves_on(torch.device("cuda:0"))
    kernels.load(kernels.version())
    kernels.load(None)
    kernels.register()
    assert not recwarn.list
    on_a_gpu(monkeypatch, (7, 5))
    assert kernels.available() and not kernels.serves_on(torch.device("cuda:0"))
    with pytest.raises(UserError, match="needs version 0123456789ab .* compile again"):
        kernels.load("0123456789ab")


@pytest.mark.parametrize("facts, expected", [
    ({"told": "0" * 12}, "belongs to another version of clip_ttrt; build it"),
    ({"cublaslt": 0}, "libcublasLt.so.13 is not found; install PyTorch's wheel"),
    ({"registers": 0}, "TensorRT does not take the plugins"),
])  # fmt: skip
def test_a_library_that_does_not_serve_is_an_error_or_a_warning(loads, facts, expected):
    loads(**facts)
    with pytest.raises(UserError, match=expected):
        kernels.load(kernels.version())
    with pytest.warns(UserWarning, match="engines that need the fused kernels will not load"):
        kernels.register()
