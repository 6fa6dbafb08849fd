"""The library's launchers and their wrappers: structs and limits as the headers have them, what is
refused, and whose memory is whose.  test_numbers.py has their numbers."""
import ctypes
import functools
import gc
import importlib.util
import itertools
import re
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import needs
import pytest
import torch

from clip_ttrt import kernels, linear
from clip_ttrt.errors import UserError
from clip_ttrt.options import BatchRange

HEADERS = {path.stem: path.read_text() for path in kernels.sources().glob("*/*.h")}
INVALID_VALUE = 1  # cudaErrorInvalidValue
STRUCTS = {
    f"Clip{name.title().replace('_', '')}Params": kind for name, kind in kernels.PARAMS.items()
} | {"ClipLinearTuneParams": linear.TuneParams, "ClipLinearTable": linear.Table,
     "ClipLinearEntry": linear.Entry}  # fmt: skip


# What headers and library declare


@pytest.mark.parametrize("name", STRUCTS)
def test_structs_agree_with_the_headers(name):
    body = re.search(rf"typedef struct {name} \{{(.*?)\}}", "".join(HEADERS.values()), re.S)[1]
    types = {"int64_t": ctypes.c_int64, "int32_t": ctypes.c_int32, "uint64_t": ctypes.c_uint64}
    types["float"] = ctypes.c_float
    declared = re.findall(r"^\s*(?:const )?(\w+)(\*?) (\w+)(?:\[(\d+)\])?;", body, re.M)
    fields = [(field, ctypes.c_void_p if pointer else types[kind] * int(many) if many else
               types[kind]) for kind, pointer, field, many in declared]
    assert len(fields) > 1 and fields == STRUCTS[name]._fields_


@needs.built
def test_the_library_tells_what_it_is():
    found, library = kernels.find(), kernels.library()
    assert library.clip_ttrt_version().decode() == found.version == kernels.version()
    assert library.clip_ttrt_architectures().decode() == " ".join(found.architectures)
    assert library.clip_ttrt_tensorrt_major() == found.tensorrt_major
    for name, struct in STRUCTS.items():
        symbol = re.sub(r"(?<!^)(?=[A-Z])", "_", name).lower()
        assert getattr(library, f"{symbol}_size")() == ctypes.sizeof(struct)


def test_limits_agree_with_the_header():
    found = re.findall(r"kClipLinear(\w+) = (\d+)", HEADERS["linear"])
    limits = {name: int(value) for name, value in found}
    assert linear.STEPS[False] == (limits["OutputsStep"], limits["InputsStep"])
    assert linear.STEPS[True] == (limits["QuantizedStep"],) * 2
    assert linear.MAX_WIDTH == limits["MaxWidth"]
    assert linear.WORKSPACE_BYTES == limits["WorkspaceBytes"]


def test_what_is_declared_of_cublaslt_is_what_its_header_says():
    """With the header of PyTorch's wheel: names, values, attributes' types and the two structs."""
    package, declared = importlib.util.find_spec("nvidia"), HEADERS["cublaslt"]
    roots = map(Path, package.submodule_search_locations if package else ())
    headers = [path for root in roots for path in root.glob("*/include/cublasLt.h")]
    if not headers:
        pytest.skip("no cublasLt.h is installed")
    theirs = headers[0].read_text() + headers[0].with_name("cublas_api.h").read_text()
    names = ["uint64_t data[8]", *re.findall(r"^\s*(CUBLAS\w+ = \d+)", declared, re.M)]
    names += [f"{name}(" for name in re.findall(r"\(\*(cublasLt\w+)\)", declared)]
    assert [name for name in names if name not in theirs] == []
    for name, kind in re.findall(r"^\s*(CUBLASLT_MATMUL_DESC_\w+) = .*// (\w+)$", declared, re.M):
        about = re.search(rf"/\*\*((?:(?!\*/).)*)\*/\s*{name} =", theirs, re.S)[1]
        assert re.search(rf"\*\s+{kind}\b[^*]*default", about), name
    result = re.search(r"cublasLtMatmulHeuristicResult_t \{(.*?)\};", declared, re.S)[1]
    members = r"\s[^;]*".join(re.escape(one.strip()) + ";" for one in result.split(";")[:-1])
    assert re.search(members, theirs)


# What launchers refuse; no call to the driver, so that no GPU is needed

POINTER, UNALIGNED, NAN = 4096, 4104, float("nan")
VALID = {  # beside the pointers
    "bias_gelu": {"rows": 3, "width": 64, "approximate": 1, "out_scale": 0.0},
    "residual_layer_norm": {"rows": 3, "width": 64, "epsilon": 1e-5, "out_scale": 0.0},
    "extract_patches": {"batch": 1, "resolution": 224, "patch_size": 32, "half": 0},
    "embed_image": {"batch": 1, "tokens": 50, "width": 64, "epsilon_pre": 1e-5, "epsilon_1": 1e-5,
                    "out_scale": 0.0},
    "linear": {"rows": 3},
    "linear_tune": {"rows": 3, "inputs": 64, "outputs": 64, "weights": 1, "quantized": 0,
                    "fast_accumulation": 1, "milliseconds": 1.0},
}
NULLABLE = {("bias_gelu", "bias"), ("linear_tune", "bias"), *(
    ("residual_layer_norm", name) for name in ("delta", "bias", "sum_out"))}
WRONG = {  # beside -1, which no field may have
    "rows": [2**31], "batch": [2**31, 2**62], "width": [0, -8, 4, 100, 65544],
    "epsilon": [0.0, NAN], "epsilon_pre": [0.0, NAN], "epsilon_1": [0.0, NAN],
    "resolution": [0, -32, 223, 8192], "tokens": [0, 1], "patch_size": [0, -2, 7, 30, 448],
    "half": [2], "inputs": [6], "outputs": [12], "weights": [0], "milliseconds": [NAN],
    "quantized": [2], "fast_accumulation": [2], "out_scale": [NAN, float("inf"), 1e-40],
    "approximate": [3],
}  # fmt: skip


def pointers(name):
    params = linear.TuneParams if name == "linear_tune" else kernels.PARAMS[name]
    return params, [key for key, kind in params._fields_ if kind is ctypes.c_void_p]


def status_of(name, **changed):
    if kernels.library().clip_linear_version() == 0:
        pytest.skip("no cuBLASLt is installed")
    params, names = pointers(name)
    values = {**dict.fromkeys(names, POINTER), **VALID[name]}
    if name == "linear":
        values["layer"] = linear._layer(linear.pack(64, 64, True)).pointer
    launched = ctypes.byref(params(**values | changed))
    if name == "linear_tune":
        return kernels.library().clip_linear_tune(launched, ctypes.byref(linear.Entry()), None)
    return getattr(kernels.library(), f"clip_{name}_launch")(launched, None)


@needs.built
@pytest.mark.parametrize("name", VALID)
def test_what_is_outside_the_contract_is_refused_and_no_rows_are_no_work(name):
    for field in pointers(name)[1]:
        assert field == "layer" or status_of(name, **{field: UNALIGNED}) == INVALID_VALUE, field
        assert (name, field) in NULLABLE or status_of(name, **{field: None}) == INVALID_VALUE
    for field, valid in VALID[name].items():
        for value in (*WRONG[field], type(valid)(-1)):
            assert status_of(name, **{field: value}) == INVALID_VALUE, (field, value)
    if name != "linear_tune":
        assert status_of(name, **{"rows" if "rows" in VALID[name] else "batch": 0}) == 0
    if name == "linear_tune":  # E4M3 has wider steps
        for field, size in (("inputs", 68), ("outputs", 72)):
            assert status_of(name, **{field: size, "quantized": 1}) == INVALID_VALUE
    if name == "linear":  # a bias that the layer has not
        layer = linear._layer(linear.pack(64, 64, False)).pointer
        assert status_of(name, layer=layer) == INVALID_VALUE


@needs.built
@pytest.mark.parametrize("out_scale", [-1.0, *WRONG["out_scale"]])
def test_attention_refuses_such_an_out_scale(out_scale):
    sizes = {"batch": 1, "heads": 1, "tokens": 50, "head_dim": 64, "out_scale": out_scale}
    params = kernels.PARAMS["attention"](qkv=POINTER, out=POINTER, **sizes)
    status = kernels.library().clip_attention_launch(ctypes.byref(params), None)
    assert status == INVALID_VALUE


@needs.built
def test_a_table_of_e4m3_needs_a_scale_and_sizes_that_cublaslt_takes():
    table = linear.pack(64, 128, False, scale=0.5)
    linear._Layer(table)
    wrong = [linear.with_scale(table, scale) for scale in (-1.0, *WRONG["out_scale"])]
    wrong += [linear.with_scale(linear.pack(64, inputs, False), 0.5) for inputs in (124, 136)]
    wrong += [linear.with_scale(linear.pack(72, 128, False), 0.5)]
    for one in wrong:
        with pytest.raises(ValueError, match="are no table"):
            linear._Layer(one)


@needs.built
def test_attention_of_other_sizes_is_not_supported():
    supported = kernels.library().clip_attention_supported
    for batch, heads, tokens, dim, major in (
        (1, 0, 50, 64, 9), (1, 41, 50, 64, 9), (1, 12, 0, 64, 9), (1, 12, 1025, 64, 9),
        (0, 12, 50, 64, 9), (1, 12, 50, 96, 9), (1, 12, 50, 80, 8), (1, 12, 50, 64, 7),
    ):  # fmt: skip
        assert supported(ctypes.c_int64(batch), heads, tokens, dim, major, 0) == 0
    assert supported(ctypes.c_int64(70000), 40, 1024, 64, 8, 0) == 1
    assert supported(ctypes.c_int64(70000), 40, 1024, 104, 9, 0) == 1


# The wrappers, with a library that computes nothing


@pytest.fixture
def recorded(monkeypatch):
    """Such a library, with its launches as (name, the values of the struct)."""
    launches, destroyed, addresses = [], [], itertools.count(4096)

    def launcher(name):
        def launch(params, stream):
            values = params._obj
            launches.append((name, {key: getattr(values, key) for key, _ in values._fields_}))
            return library.status
        return launch

    def create(table, size, pointer):
        pointer._obj.value = next(addresses)
        return 0

    library = SimpleNamespace(
        status=0, launches=launches, destroyed=destroyed,
        clip_linear_version=lambda: 130102, clip_linear_create=create,
        clip_linear_destroy=lambda pointer: destroyed.append(pointer.value),
        **{f"clip_{name}_launch": launcher(name) for name in kernels.PARAMS},
    )  # fmt: skip
    monkeypatch.setattr(kernels, "library", lambda: library)
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: SimpleNamespace(cuda_stream=7))
    fresh = functools.lru_cache(linear._layer.cache_info().maxsize)(linear._Layer)
    monkeypatch.setattr(linear, "_layer", fresh)
    return library


def misaligned(x):
    shifted = torch.cat([x.flatten()[:1], x.flatten()])[1:].view_as(x)
    assert shifted.is_contiguous() and shifted.data_ptr() % 16
    return shifted


@pytest.mark.parametrize("name", kernels.PARAMS)
def test_every_launcher_gets_aligned_copies_of_tensors_that_are_not(name, recorded, monkeypatch):
    copies = []
    monkeypatch.setattr(kernels, "aligned", lambda x, own=kernels.aligned: (
        copies.append(own(x)) or copies[-1]))
    _, names = pointers(name)
    tensors = {key: misaligned(torch.randn(4, 8)) for key in names if key != "layer"}
    turned, [first, *_] = torch.randn(8, 4).T, tensors
    kernels.launch(name, "cuda", **{**tensors, first: turned})
    [(launched, values)] = recorded.launches
    assert launched == name
    for key, copy in zip(tensors, copies, strict=True):
        assert values[key] == copy.data_ptr() and copy.data_ptr() % 16 == 0
        assert copy.is_contiguous() and torch.equal(copy, turned if key == first else tensors[key])


def test_attention_hands_its_sizes_on(recorded):
    qkv, bias = torch.zeros(3, 5, 384).half(), torch.zeros(128)
    assert kernels.attention(qkv, 2, True, bias).shape == (3, 5, 128)
    assert kernels.attention(qkv[:0], 2, True).shape == (0, 5, 128)
    [(_, values)] = recorded.launches
    assert (values["qkv"], values["query_bias"]) == (qkv.data_ptr(), bias.data_ptr())
    sizes = {"batch": 3, "heads": 2, "tokens": 5, "causal": 1, "out_scale": 0}
    assert sizes.items() <= values.items()
    quantized = kernels.attention(qkv, 2, True, out_scale=0.5)
    assert (quantized.dtype, quantized.shape) == (torch.float8_e4m3fn, (3, 5, 128))
    assert recorded.launches[1][1]["out_scale"] == 0.5
    for wrong in (bias.half(), bias[:-1], torch.zeros(256)):
        with pytest.raises(ValueError, match=r"query_bias must be torch.float32 \[128\]"):
            kernels.attention(qkv, 2, False, wrong)
    for status, error in ((209, "CUDA error 209"), (-15, "cuBLAS status 15")):
        recorded.status = status
        with pytest.raises(RuntimeError, match=rf"attention kernel for qkv \[3, .*{error}"):
            kernels.attention(qkv, 2, False)


def test_a_table_gets_another_scale():
    entries = [linear.Entry(rows) for rows in (1, 50)]
    table = linear.with_scale(linear.pack(64, 128, True, entries, 9, scale=1.0), 0.25)
    assert table == linear.pack(64, 128, True, entries, 9, scale=0.25)
    assert linear.Table.from_buffer_copy(table).scale == 0.25


def test_batches_to_measure():
    assert linear.measured_batches(BatchRange(1, 8, 32)) == [1, 2, 4, 8, 16, 32]
    assert linear.measured_batches(BatchRange(3, 5, 9)) == [3, 4, 5, 8, 9]
    assert linear.measured_batches(BatchRange(4, 4, 4)) == [4]


def test_what_is_missing_or_wrong_is_told(recorded):
    assert linear.takes(64, 128) and linear.version_text() == "13.1.2"
    assert linear.takes(64, 128, quantized=True)
    sizes = [(0, 64), (12, 64), (65544, 64), (64, 0), (64, 6), (64, 65540), (-8, 64)]
    for size, quantized in [*((size, False) for size in sizes), ((72, 64), True), ((64, 68), True)]:
        assert not linear.takes(*size, quantized) and linear.takes(*size) == quantized
        with pytest.raises(ValueError, match="no linear layer here"):
            linear.tune([1], size, False, quantized)
    x = torch.zeros(2, 64).half()
    for wrong in (x, x[0]):
        with pytest.raises(ValueError, match=r"x \[.., K\] and a weight \[N, K\] on a GPU"):
            linear.linear(x, wrong)
    recorded.clip_linear_version = lambda: 0
    with pytest.raises(UserError, match="need cuBLASLt"):
        linear._layer(linear.pack(64, 64, False))


def test_layers_that_make_room_for_others_are_destroyed_after_their_last_use(recorded):
    in_use = linear._layer(linear.pack(64, 64, False))
    assert linear._layer(linear.pack(64, 64, False)) is in_use
    address, most = in_use.pointer.value, linear._layer.cache_info().maxsize
    for i in range(most + 9):
        linear._layer(linear.pack(64, 4 * (i + 20), False))
    gc.collect()
    assert len(recorded.destroyed) == 9 and address not in recorded.destroyed
    del in_use
    gc.collect()
    assert len(recorded.destroyed) == 10 and recorded.destroyed[-1] == address
    linear._layer.cache_clear()
    gc.collect()
    assert len(recorded.destroyed) == len(set(recorded.destroyed)) == most + 10
