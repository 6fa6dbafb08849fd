"""Linear layers through cuBLASLt: the interface, tables, the numbers they compute, and the wrapper for PyTorch."""

import ctypes
import gc
import importlib.util
import os
import pathlib
import re
import shutil
import subprocess
import sys
import threading

import pytest
import torch

from clip_ttrt import linear, kernels
from clip_ttrt.errors import UserError
from clip_ttrt.options import BatchRange
import needs

FOLDER = pathlib.Path(__file__).parents[2] / "kernels" / "linear"
HEADER, DECLARED = (FOLDER / "linear.h").read_text(), (FOLDER / "cublaslt.h").read_text()
INVALID_VALUE = 1  # cudaErrorInvalidValue
TYPES = {
    "const void*": ctypes.c_void_p, "void*": ctypes.c_void_p, "ClipLinear*": ctypes.c_void_p, "int64_t": ctypes.c_int64,
    "int32_t": ctypes.c_int32, "uint64_t": ctypes.c_uint64, "float": ctypes.c_float,
}  # fmt: skip
STRUCTS = {"ClipLinearParams": linear.LinearParams, "ClipLinearTuneParams": linear.TuneParams, "ClipLinearTable": linear.Table, "ClipLinearEntry": linear.Entry}

# [outputs, inputs] of CLIP's weights: ViT-B/32's image and text encoders, ViT-L/14's patches, whose rows are not 16-byte aligned, and blocks.
WEIGHTS = [(768, 3072), (2304, 768), (768, 768), (3072, 768), (512, 768), (1536, 512), (512, 2048), (1024, 588), (4096, 1024)]
ROWS = [1, 2, 7, 50, 77, 788, 1600, 8224]



# The interface


@pytest.mark.parametrize("name", STRUCTS)
def test_ctypes_structs_agree_with_the_header(name):
    body = re.search(rf"typedef struct {name} \{{(.*?)\}}", HEADER, re.DOTALL).group(1)
    fields = re.findall(r"^\s*(const void\*|void\*|ClipLinear\*|int64_t|int32_t|uint64_t|float) (\w+)(\[\d+\])?;", body, re.MULTILINE)
    assert [(field, TYPES[kind] * int(many[1:-1]) if many else TYPES[kind]) for kind, field, many in fields] == list(STRUCTS[name]._fields_)


def test_limits_agree_with_the_header():
    limits = {name: int(value) for name, value in re.findall(r"(kClip\w+) = (-?\d+)", HEADER)}
    assert limits == {
        "kClipLinearInputsStep": linear.INPUTS_STEP, "kClipLinearOutputsStep": linear.OUTPUTS_STEP, "kClipLinearMaxWidth": linear.MAX_WIDTH,
        "kClipLinearMaxRows": linear.MAX_ROWS, "kClipLinearMaxEntries": linear.MAX_ENTRIES, "kClipLinearWorkspaceBytes": linear.WORKSPACE_BYTES,
        "kClipLinearNoLibrary": linear.NO_LIBRARY,
    }  # fmt: skip


def headers_of_cublaslt():
    package = importlib.util.find_spec("nvidia")
    return [path for root in (package.submodule_search_locations if package else ()) for path in pathlib.Path(root).glob("*/include/cublasLt.h")]


@pytest.mark.parametrize("header", headers_of_cublaslt() or [None], ids=lambda header: header and header.parts[-3])
def test_what_is_declared_of_cublaslt_is_what_its_header_says(header):
    """With the header of PyTorch's wheel; names, values and the two structs."""
    if header is None:
        pytest.skip("no cublasLt.h is installed")
    theirs = header.read_text() + header.with_name("cublas_api.h").read_text()
    for name, value in re.findall(r"^\s*(CUBLAS\w+) = (\d+)", DECLARED, re.MULTILINE):
        assert re.search(rf"\b{name} = {value}\b", theirs), name
    assert re.search(r"typedef struct \{\s*uint64_t data\[8\];\s*\} cublasLtMatmulAlgo_t;", theirs)
    [result] = [body for body in re.findall(r"typedef struct \{([^{}]*)\} (?:\w+);", theirs) if "wavesCount" in body]
    ours = re.search(r"struct cublasLtMatmulHeuristicResult_t \{(.*?)\};", DECLARED, re.DOTALL).group(1)
    members = re.compile(r"^\s*(\w+ \w+(?:\[4\])?);", re.MULTILINE)
    assert members.findall(result) == members.findall(ours) and len(members.findall(ours)) == 5
    for name in re.findall(r"\(\*(cublasLt\w+)\)", DECLARED):
        assert re.search(rf"\b{name}\(", theirs), name


# Tables, and errors


def test_batches_to_measure():
    assert linear.measured_batches(BatchRange(1, 32, 256)) == [1, 2, 4, 8, 16, 32, 64, 128, 256]
    assert linear.measured_batches(BatchRange(3, 5, 9)) == [3, 4, 5, 8, 9]
    assert linear.measured_batches(BatchRange(4, 4, 4)) == [4]


def entry(rows, fill=0):
    return linear.Entry(rows, (ctypes.c_uint64 * 8)(*[fill] * 8))


def test_table_survives_packing():
    about, entries = linear.unpack(linear.pack(768, 3072, True, [entry(1, 5), entry(50)], 130101))
    assert (about.outputs, about.inputs, about.bias, about.count, about.version) == (768, 3072, 1, 2, 130101)
    assert [(e.rows, list(e.algorithm)) for e in entries] == [(1, [5] * 8), (50, [0] * 8)]
    table = linear.pack(768, 3072, False)
    assert linear.unpack(table)[1] == []
    for wrong in (b"", table[:-1], table + b"\0"):
        with pytest.raises(ValueError, match="are no table"):
            linear.unpack(wrong)
    with pytest.raises(ValueError, match="at most 64 entries"):
        linear.pack(768, 3072, False, [entry(1)] * 65)


@pytest.mark.parametrize("outputs, inputs", [(0, 64), (12, 64), (65544, 64), (64, 0), (64, 6), (64, 65540), (-8, 64)])
def test_sizes_that_no_layer_has(outputs, inputs):
    assert not linear.takes(outputs, inputs)
    with pytest.raises(ValueError, match="is none of a linear layer"):
        linear.pack(outputs, inputs, False)


def test_wrapper_refuses_what_is_not_on_a_gpu():
    x = torch.zeros(2, 64).half()
    with pytest.raises(ValueError, match="weight must be fp16"):
        linear.linear(x, x)
    with pytest.raises(ValueError, match=r"x \[.., K\] and a weight \[N, K\]"):
        linear.linear(x, x[0])


def test_measuring_refuses_other_arguments():
    with pytest.raises(ValueError, match="rows, not 0"):
        linear.measure(0, (64, 64), False)
    with pytest.raises(ValueError, match="is none of a linear layer"):
        linear.tune([1], (64, 63), False)


def test_library_of_another_version_is_a_user_error(monkeypatch):
    monkeypatch.setattr(kernels, "library", lambda: object())
    linear._library.cache_clear()
    with pytest.raises(UserError, match="another version"):
        linear._library()


def test_without_cublaslt_the_error_names_it(monkeypatch):
    class Library:
        def clip_linear_version(self):
            return 0

    monkeypatch.setattr(linear, "_library", Library)
    with pytest.raises(UserError, match="need cuBLASLt"):
        linear.version()
    with pytest.raises(UserError, match="need cuBLASLt"):
        linear._check(linear.NO_LIBRARY, "anything")


def test_version_in_words(monkeypatch):
    monkeypatch.setattr(linear, "version", lambda: 130102)
    assert linear.version_text() == "13.1.2"


# Which cuBLASLt


FUNCTIONS = re.findall(r"\(\*(cublasLt\w+)\)", DECLARED)
# Without PyTorch, which would have loaded its own.
VERSION_HERE = """
import ctypes, sys
library = ctypes.CDLL(sys.argv[1])
library.clip_linear_version.restype = ctypes.c_uint64
print(library.clip_linear_version())
"""


def version_with(folder, version, functions=FUNCTIONS):
    """cuBLASLt's version in a new process that finds one which can only tell its version."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        pytest.skip("a C compiler is needed")
    file = folder / "libcublasLt.so.13"
    source = "\n".join(f"unsigned long {function}() {{ return {version}; }}" for function in functions)
    compile_it = [compiler, "-shared", "-fPIC", f"-Wl,-soname,{file.name}", "-x", "c", "-o", file, "-"]
    subprocess.run(compile_it, input=source, text=True, check=True)
    command = [sys.executable, "-c", VERSION_HERE, kernels.find().path]
    environment = {**os.environ, "LD_LIBRARY_PATH": str(folder)}
    return int(subprocess.run(command, env=environment, text=True, capture_output=True, check=True).stdout)


@needs.built
def test_a_program_without_pytorch_finds_what_the_system_finds(tmp_path):
    assert version_with(tmp_path, 130999) == 130999


@needs.built
@pytest.mark.parametrize("functions", [FUNCTIONS[:-1], ["other"]])
def test_a_library_without_the_functions_is_none(tmp_path, functions):
    assert version_with(tmp_path, 130999, functions) == 0


@needs.built
def test_pytorchs_is_what_the_process_has_loaded():
    """By its soname, wherever the wheels have put it: importing torch has loaded it."""
    if torch.version.cuda is None:
        pytest.skip("PyTorch is built without CUDA")
    loaded = ctypes.CDLL("libcublasLt.so.13", mode=os.RTLD_NOLOAD | os.RTLD_LAZY)
    loaded.cublasLtGetVersion.restype = ctypes.c_size_t
    assert linear.version() == loaded.cublasLtGetVersion() >= 130000


@pytest.fixture
def library():
    linear._library.cache_clear()
    if linear._library().clip_linear_version() == 0:
        pytest.skip("no cuBLASLt is installed")
    return linear._library()


@needs.built
def test_tables_that_the_library_refuses(library):
    def wrong(**fields):
        about = linear.Table.from_buffer_copy(linear.pack(64, 64, False))
        for name, value in fields.items():
            setattr(about, name, value)
        return bytes(about)

    good = linear.pack(64, 64, False, [entry(1)], 130101)
    assert linear._layer(good).pointer
    bad = [b"", good[:-1], good + b"\0", wrong(count=1), wrong(count=-1), wrong(bias=2), wrong(bias=-1), wrong(inputs=0), wrong(inputs=6), wrong(outputs=12),
           wrong(outputs=65544)]  # fmt: skip
    for table in [*bad, *(linear.pack(64, 64, False, [e], 130101) for e in (entry(0), entry(2**31)))]:
        with pytest.raises(ValueError, match="are no table"):
            linear._layer(table)


@needs.built
def test_layers_that_make_room_for_others_are_destroyed_after_their_last_use(library, monkeypatch):
    destroyed = []
    monkeypatch.setattr(linear, "_library", lambda: Counting(library, destroyed))
    linear._layer.cache_clear()
    in_use = linear._layer(linear.pack(64, 64, False))
    address = in_use.pointer.value
    most = linear._layer.cache_info().maxsize
    for i in range(most + 9):
        linear._layer(linear.pack(64, 4 * (i + 20), False))
    gc.collect()
    assert len(destroyed) == 9 and address not in destroyed
    del in_use
    gc.collect()
    assert len(destroyed) == 10 and destroyed[-1] == address
    linear._layer.cache_clear()
    gc.collect()
    assert len(destroyed) == most + 10


class Counting:
    """The library, noting which layers it destroys."""

    def __init__(self, library, destroyed):
        self.library, self.destroyed = library, destroyed

    def __getattr__(self, name):
        return getattr(self.library, name)

    def clip_linear_destroy(self, pointer):
        self.destroyed.append(pointer.value)
        self.library.clip_linear_destroy(pointer)


POINTER, UNALIGNED = 4096, 4104


def outside_the_contract():
    for name in ("x", "weight", "bias", "out", "workspace"):
        yield from ({name: None}, {name: UNALIGNED})
    yield from ({"rows": -1}, {"rows": 2**31}, {"layer": None})


@needs.built
@pytest.mark.parametrize("changed", list(outside_the_contract()))
def test_what_is_outside_the_contract_is_refused(library, changed):
    """Before any call to the driver, so also where there is no GPU."""
    values = {"layer": linear._layer(linear.pack(64, 64, True)).pointer, **dict.fromkeys(("x", "weight", "bias", "out", "workspace"), POINTER), "rows": 3}
    assert library.clip_linear_launch(ctypes.byref(linear.LinearParams(**(values | changed))), None) == INVALID_VALUE


@needs.built
def test_a_bias_that_the_layer_has_not_is_refused_and_no_rows_are_no_work(library):
    values = {"layer": linear._layer(linear.pack(64, 64, False)).pointer, **dict.fromkeys(("x", "weight", "bias", "out", "workspace"), POINTER)}
    assert library.clip_linear_launch(ctypes.byref(linear.LinearParams(**values, rows=3)), None) == INVALID_VALUE
    assert library.clip_linear_launch(ctypes.byref(linear.LinearParams(**values, rows=0)), None) == 0


TUNE = {**dict.fromkeys(("x", "weight", "out", "workspace"), POINTER), "rows": 3, "inputs": 64, "outputs": 64, "weights": 1, "milliseconds": 1.0}


@needs.built
@pytest.mark.parametrize(
    "changed",
    [
        *({name: value} for name in ("x", "weight", "out", "workspace") for value in (None, UNALIGNED)), {"bias": UNALIGNED}, {"rows": 0}, {"rows": 2**31},
        {"inputs": 6}, {"outputs": 12}, {"weights": 0}, {"milliseconds": -1.0}, {"milliseconds": float("nan")},
    ],
)  # fmt: skip
def test_what_cannot_be_measured_is_refused(library, changed):
    assert library.clip_linear_tune(ctypes.byref(linear.TuneParams(**(TUNE | changed))), ctypes.byref(linear.Entry()), None) == INVALID_VALUE


# The numbers


def tensors(rows, outputs, inputs, bias, seed=0):
    """Values of order 1 in the sums: what a layer norm leaves, times a weight that keeps the size."""
    generator = torch.Generator("cuda").manual_seed(seed)
    x, weight, b = (torch.randn(size, generator=generator, device="cuda") for size in ((rows, inputs), (outputs, inputs), (outputs,)))
    return x.half(), (weight * inputs**-0.5).half(), b.half() if bias else None


def poisoned(library, table, x, weight, bias):
    """The launch into an output of NaN with a NaN row before and after it."""
    out = torch.full((x.shape[0] + 2, weight.shape[0]), float("nan"), dtype=torch.half, device="cuda")
    workspace = torch.full((linear.WORKSPACE_BYTES,), 0xFF, dtype=torch.uint8, device="cuda")
    params = linear.LinearParams(linear._layer(table).pointer, x.data_ptr(), weight.data_ptr(), None if bias is None else bias.data_ptr(), out[1:].data_ptr(),
                                 workspace.data_ptr(), x.shape[0])  # fmt: skip
    assert library.clip_linear_launch(ctypes.byref(params), torch.cuda.current_stream().cuda_stream) == 0
    torch.cuda.synchronize()
    assert out[0].isnan().all() and out[-1].isnan().all()
    return out[1:-1]


def check(actual, x, weight, bias):
    """Against float64.

    fp16 rounds by 2^-11 of a value or, where that is more, 2^-25.  A result is rounded once; with a bias twice, since some
    algorithms add it to the product in fp16.  fp32 sums of K terms err like a random walk of sqrt(K) steps of 2^-23 of their
    size at most: tensor cores cut digits off.
    """
    product, terms = x.double() @ weight.double().T, x.double().abs() @ weight.double().abs().T
    exact = product if bias is None else product + bias.double()
    sums = x.shape[1] ** 0.5 * 2**-23 * terms
    rounding = 2**-11 * (exact.abs() + sums) + 2**-25
    if bias is not None:
        rounding += 1.001 * (2**-11 * (product.abs() + sums) + 2**-25)
    error = (actual.double() - exact).abs()
    assert (error <= rounding + sums).all(), (error / (rounding + sums)).max()


def test_the_check_finds_what_loses_digits():
    """Products as they should be pass; parts that are added in fp16, sums in fp16, and results one step too large do not."""
    torch.manual_seed(0)
    x, weight, bias = torch.randn(50, 768).half(), (torch.randn(64, 768) * 768**-0.5).half(), torch.randn(64).half()
    product = x.float() @ weight.float().T
    check(product.half(), x, weight, None)
    check((product + bias.float()).half(), x, weight, bias)
    check(product.half() + bias, x, weight, bias)
    parts = [(x[:, part].float() @ weight[:, part].float().T).half() for part in (slice(0, 384), slice(384, 768))]
    added = torch.zeros_like(parts[0])
    for i in range(0, 768, 16):
        added = (added.float() + x[:, i : i + 16].float() @ weight[:, i : i + 16].float().T).half()
    for wrong in (parts[0] + parts[1], added, product.half() * (1 + 2**-10)):
        with pytest.raises(AssertionError):
            check(wrong, x, weight, None)
    with pytest.raises(AssertionError):
        check(added + bias, x, weight, bias)


@needs.built
@pytest.mark.gpu
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("outputs, inputs", WEIGHTS)
def test_error_is_rounding(library, outputs, inputs, bias):
    """By cuBLASLt's suggestion, for all rows; also: every element written, nothing beside them, the same bits twice."""
    table = linear.pack(outputs, inputs, bias)
    for rows in ROWS:
        x, weight, b = tensors(rows, outputs, inputs, bias)
        actual = poisoned(library, table, x, weight, b)
        check(actual, x, weight, b)
        assert torch.equal(actual, poisoned(library, table, x, weight, b))


@needs.built
@pytest.mark.gpu
@pytest.mark.parametrize("outputs, inputs, bias", [(768, 3072, False), (2304, 768, False), (512, 768, True), (1024, 588, False)])
def test_measured_algorithms_serve_all_rows(library, outputs, inputs, bias):
    """A table for 1 and 1600 rows, for each number of rows: the nearest entry's algorithm, or cuBLASLt's where that cannot."""
    table = linear.tune([1600, 1], (outputs, inputs), bias)
    about, entries = linear.unpack(table)
    assert [e.rows for e in entries] == [1, 1600] and about.version == linear.version()
    for rows in ROWS:
        x, weight, b = tensors(rows, outputs, inputs, bias)
        actual = poisoned(library, table, x, weight, b)
        check(actual, x, weight, b)
        assert torch.equal(actual, poisoned(library, table, x, weight, b))
        assert torch.equal(actual, linear.linear(x, weight, b, table))


@needs.built
@pytest.mark.gpu
def test_table_of_another_cublaslt_is_not_used(library):
    x, weight, _ = tensors(50, 768, 768, False)
    nonsense = linear.pack(768, 768, False, [entry(50, 2**64 - 1)], linear.version() + 1)
    assert torch.equal(linear.linear(x, weight, table=nonsense), linear.linear(x, weight))


@needs.built
@pytest.mark.gpu
def test_measured_time_is_one_of_a_launch(library):
    found, microseconds = linear.measure(50, (768, 768), False)
    assert found.rows == 50 and 1 < microseconds < 1000


# The wrapper


@needs.built
@pytest.mark.gpu
def test_wrapper_takes_any_shape_and_layout():
    x, weight, bias = tensors(24, 64, 128, True)
    expected = linear.linear(x, weight, bias)
    assert torch.equal(linear.linear(x.view(2, 3, 4, 128), weight, bias), expected.view(2, 3, 4, 64))
    assert torch.equal(linear.linear(x.T.contiguous().T, weight.T.contiguous().T, bias), expected)  # not contiguous
    shifted = torch.cat([bias[:1], bias])[1:]  # not aligned
    assert shifted.data_ptr() % 16 and torch.equal(linear.linear(x, weight, shifted), expected)
    assert linear.linear(x[:0], weight, bias).shape == (0, 64)
    assert linear.linear(x[0], weight, bias).shape == (64,)


@needs.built
@pytest.mark.gpu
def test_wrapper_refuses_other_tensors():
    x, weight, bias = tensors(3, 64, 128, True)
    with pytest.raises(ValueError, match="x must be fp16"):
        linear.linear(x.float(), weight)
    with pytest.raises(ValueError, match=r"x must be fp16 \[3, 128\]"):
        linear.linear(x[:, :64], weight)
    with pytest.raises(ValueError, match="bias must be fp16"):
        linear.linear(x, weight, bias.float())
    with pytest.raises(ValueError, match="is none of a linear layer"):
        linear.linear(x, weight[:12])
    with pytest.raises(ValueError, match="without bias, not of this layer"):
        linear.linear(x, weight, bias, linear.pack(64, 128, False))
    with pytest.raises(ValueError, match="are no table"):
        linear.linear(x, weight, bias, b"table")


@needs.built
@pytest.mark.gpu
def test_graph_capture_replays_on_new_inputs():
    x, weight, bias = tensors(50, 768, 768, True)
    kept = x.clone()
    table = linear.tune([50], (768, 768), True)
    expected = linear.linear(x, weight, bias, table)
    x.zero_()
    linear.linear(x, weight, bias, table)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = linear.linear(x, weight, bias, table)
    x.copy_(kept)
    graph.replay()
    assert torch.equal(captured, expected)


@needs.built
@pytest.mark.gpu
def test_threads_share_a_layer():
    x, weight, bias = tensors(320, 768, 768, True)
    table = linear.pack(768, 768, True)
    expected = {rows: linear.linear(x[:rows].clone(), weight, bias, table) for rows in range(1, 320, 20)}
    linear._layer.cache_clear()
    wrong = []

    def work():
        with torch.cuda.stream(torch.cuda.Stream()):
            for rows in [*expected] * 5:
                if not torch.equal(linear.linear(x[:rows], weight, bias, table), expected[rows]):
                    wrong.append(rows)

    torch.cuda.synchronize()
    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
