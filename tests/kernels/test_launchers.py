"""The library's launchers: structs and limits as their headers have them, what they refuse, and
their numbers against float64.

Attention and elementwise kernels go through the checks of their benchmarks, whose bounds are twice
PyTorch's own error, and what rounding and fp32 arithmetic cost; linear layers have theirs here.
"""
import ctypes
import gc
import importlib.util
import itertools
import os
import re
import shutil
import subprocess
import sys
import threading
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import needs
import pytest
import torch

from clip_ttrt import kernels, linear, ops
from clip_ttrt.errors import UserError
from clip_ttrt.options import BatchRange
from experiments import attention_bench
from experiments import elementwise_bench as BENCH

HEADERS = {path.stem: path.read_text() for path in kernels.sources().glob("*/*.h")}
DECLARED = HEADERS["cublaslt"]
INVALID_VALUE = 1  # cudaErrorInvalidValue
HOPPER, AMPERE, TURING = (9, 0), (8, 6), (7, 5)
STRUCTS = {
    f"Clip{name.title().replace('_', '')}Params": kind for name, kind in kernels.PARAMS.items()
} | {"ClipLinearTuneParams": linear.TuneParams, "ClipLinearTable": linear.Table,
     "ClipLinearEntry": linear.Entry}  # fmt: skip


def on_gpu(function):
    """A test that runs kernels on a GPU."""
    return needs.built(pytest.mark.gpu(needs.ampere(function)))


@pytest.fixture
def attention():
    return attention_bench.Library(kernels.find().path)


@pytest.fixture
def elementwise():
    return BENCH.Library(kernels.find().path)


# Structs and limits


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
@pytest.mark.parametrize("name", STRUCTS)
def test_the_library_has_structs_of_these_sizes(name):
    symbol = re.sub(r"(?<!^)(?=[A-Z])", "_", name).lower()
    told = getattr(kernels.library(), f"{symbol}_size")()
    assert told == ctypes.sizeof(STRUCTS[name])


def test_limits_agree_with_the_header():
    limits = dict(re.findall(r"kClipLinear(\w+) = (\d+)", HEADERS["linear"]))
    for name in ("InputsStep", "OutputsStep", "MaxWidth", "WorkspaceBytes"):
        constant = re.sub(r"(?<!^)(?=[A-Z])", "_", name).upper()
        assert int(limits[name]) == getattr(linear, constant)


def test_what_is_declared_of_cublaslt_is_what_its_header_says():
    """With the header of PyTorch's wheel: names, values and the two structs."""
    package = importlib.util.find_spec("nvidia")
    roots = map(Path, package.submodule_search_locations if package else ())
    headers = [path for root in roots for path in root.glob("*/include/cublasLt.h")]
    if not headers:
        pytest.skip("no cublasLt.h is installed")
    theirs = headers[0].read_text() + headers[0].with_name("cublas_api.h").read_text()
    names = re.findall(r"^\s*(CUBLAS\w+ = \d+)", DECLARED, re.M)
    names += [f"{name}(" for name in FUNCTIONS] + ["uint64_t data[8]"]
    assert [name for name in names if name not in theirs] == []
    result = re.search(r"cublasLtMatmulHeuristicResult_t \{(.*?)\};", DECLARED, re.S)[1]
    members = r"\s[^;]*".join(re.escape(one.strip()) + ";" for one in result.split(";")[:-1])
    assert re.search(members, theirs)


def test_references_of_the_benchmarks_are_the_ops():
    """So that what the kernels are checked against is what the encoder computes."""
    images = torch.randn(2, 3, 24, 24)
    expected = ops.extract_patches_reference(images, 8).reshape(-1, 3 * 64)
    assert torch.equal(BENCH.cut(images, 8), expected)
    patches, token, positions = torch.randn(2, 4, 16), torch.randn(16), torch.randn(5, 16)
    rows = BENCH.with_class_token(torch, patches.reshape(-1, 16), token, positions)
    expected = ops.prepend_class_token_reference(patches, token) + positions
    assert torch.equal(rows, expected.reshape(-1, 16))


# What launchers are given, and what they refuse

POINTER, UNALIGNED, NAN = 4096, 4104, float("nan")
VALID = {  # beside the pointers
    "bias_quick_gelu": {"rows": 3, "width": 64},
    "residual_layer_norm": {"rows": 3, "width": 64, "epsilon": 1e-5},
    "extract_patches": {"batch": 1, "resolution": 224, "patch_size": 32, "half": 0},
    "embed_image": {"batch": 1, "tokens": 50, "width": 64, "epsilon_pre": 1e-5, "epsilon_1": 1e-5},
    "linear": {"rows": 3},
    "linear_tune": {"rows": 3, "inputs": 64, "outputs": 64, "weights": 1, "milliseconds": 1.0},
}
NULLABLE = {("bias_quick_gelu", "bias"), ("linear_tune", "bias"), *(
    ("residual_layer_norm", name) for name in ("delta", "bias", "sum_out"))}
WRONG = {  # beside -1 and no number
    "rows": [2**31], "batch": [2**31, 2**62], "width": [0, -8, 4, 100, 65544], "epsilon": [0.0],
    "epsilon_pre": [0.0], "epsilon_1": [0.0], "resolution": [0, -32, 223, 8192], "tokens": [0, 1],
    "patch_size": [0, -2, 7, 30, 448], "half": [2], "inputs": [6], "outputs": [12], "weights": [0],
}  # fmt: skip


def pointers(name):
    params = linear.TuneParams if name == "linear_tune" else kernels.PARAMS[name]
    return params, [key for key, kind in params._fields_ if kind is ctypes.c_void_p]


def outside_the_contract(name):
    """(field, value) of every field that may not have it."""
    for field in pointers(name)[1]:
        yield from [(field, UNALIGNED)] * (field != "layer")
        yield from [(field, None)] * ((name, field) not in NULLABLE)
    for field, valid in VALID[name].items():
        wrong = [*WRONG.get(field, []), -1, *[NAN] * isinstance(valid, float)]
        yield from ((field, type(valid)(one)) for one in wrong)


def status_of(name, **changed):
    """What a launcher returns; no call to the driver, so that no GPU is needed."""
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
def test_what_is_outside_the_contract_is_refused(name):
    for field, value in outside_the_contract(name):
        assert status_of(name, **{field: value}) == INVALID_VALUE, (field, value)


@needs.built
@pytest.mark.parametrize("name", [one for one in VALID if one != "linear_tune"])
def test_no_rows_are_no_work(name):
    nothing = {"rows": 0} if "rows" in VALID[name] else {"batch": 0}
    unused = [] if name == "linear" else pointers(name)[1]
    assert status_of(name, **dict.fromkeys(unused), **nothing) == 0
    if name == "linear":  # a bias that the layer has not
        layer = linear._layer(linear.pack(64, 64, False)).pointer
        assert status_of(name, layer=layer) == INVALID_VALUE


@needs.built
def test_attention_of_other_sizes_is_not_supported():
    supported = kernels.library().clip_attention_supported
    for batch, *sizes, serves in (
        (70000, 40, 1024, 64, 8, 1), (1, 0, 50, 64, 9, 0), (1, 41, 50, 64, 9, 0),
        (1, 12, 0, 64, 9, 0), (1, 12, 1025, 64, 9, 0), (0, 12, 50, 64, 9, 0),
        (1, 12, 50, 80, 9, 0), (1, 12, 50, 64, 7, 0),
    ):  # fmt: skip
        assert supported(ctypes.c_int64(batch), *sizes, 0) == serves


@pytest.fixture
def recorded(monkeypatch):
    """The launches of a library that computes nothing, as (name, the values of its struct)."""
    found, created, destroyed = [], [], []

    def launcher(name):
        def launch(params, stream):
            values = params._obj
            found.append((name, {key: getattr(values, key) for key, _ in values._fields_}))
            return library.status
        return launch

    def create(table, size, pointer):
        pointer._obj.value = 4096 + len(created)
        created.append(pointer._obj.value)
        return 0

    library = SimpleNamespace(
        status=0, clip_linear_version=lambda: 130102, clip_linear_create=create,
        clip_linear_destroy=lambda pointer: destroyed.append(pointer.value), destroyed=destroyed,
        **{f"clip_{name}_launch": launcher(name) for name in kernels.PARAMS},
    )  # fmt: skip
    monkeypatch.setattr(kernels, "library", lambda: library)
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: SimpleNamespace(cuda_stream=7))
    linear._layer.cache_clear()
    yield SimpleNamespace(launches=found, library=library)
    linear._layer.cache_clear()


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


@pytest.mark.parametrize("status, error", [(209, "CUDA error 209"), (-15, "cuBLAS status 15")])
def test_a_launch_that_fails_says_what_and_where(status, error, recorded):
    recorded.library.status = status
    with pytest.raises(RuntimeError, match=f"attention kernel .*{error}|{error} for qkv"):
        kernels.attention(torch.zeros(1, 2, 192).half(), 1, False)


def test_attention_hands_its_sizes_on(recorded):
    qkv, bias = torch.zeros(3, 5, 384).half(), torch.zeros(128)
    assert kernels.attention(qkv, 2, True, bias).shape == (3, 5, 128)
    assert kernels.attention(qkv[:0], 2, True).shape == (0, 5, 128)
    [(_, values)] = recorded.launches
    assert (values["qkv"], values["query_bias"]) == (qkv.data_ptr(), bias.data_ptr())
    sizes = {"batch": 3, "heads": 2, "tokens": 5, "causal": 1, "variant": 0}
    assert sizes.items() <= values.items()
    for kind, size in (("half", 128), ("float", 127), ("float", 256)):
        with pytest.raises(ValueError, match=r"query_bias must be torch.float32 \[128\]"):
            kernels.attention(qkv, 2, False, torch.zeros(size, dtype=getattr(torch, kind)))


# The variants of attention


@needs.built
def test_every_length_has_a_variant_on_every_supported_gpu(attention):
    for capability in (HOPPER, AMPERE):
        for tokens in range(1, 1025):
            for causal, batch in ((False, 1), (False, 128), (True, 1), (True, 128)):
                chosen = attention.choose(batch, 12, tokens, causal, capability, 132)
                assert attention.serves(chosen, tokens, causal, capability), (capability, tokens)
    for variant, name in attention.variants.items():
        on_ampere = any(attention.serves(variant, t, False, AMPERE) for t in (1, 50, 77, 257, 577))
        assert on_ampere == name.startswith("portable"), name
        assert not attention.serves(variant, 50, False, TURING)


@needs.built
def test_every_warpgroup_uses_every_filling_of_the_stages_it_waits_on():
    """A barrier knows its phases by parity alone: waiting for filling n needs the use of n - 1."""
    ring_stages, fitted = kernels.library().clip_attention_ring_stages, 0
    sizes = itertools.product(range(1, 5), range(1, 17), range(1, 12), range(1, 25))
    for groups, tiles, chunks, most in sizes:
        stages = ring_stages(most, chunks, groups, tiles)
        assert 0 <= stages <= most and (stages or tiles < groups)
        fitted += stages > 0
        for group in range(groups if stages else 0):
            # Tile j of a block belongs to warpgroup j % groups and to unit j // tiles.
            units = {j // tiles for j in range(group, 30 * tiles, groups)}
            used = {unit * chunks + chunk for unit in units for chunk in range(chunks)}
            assert all(i < stages or i - stages in used for i in used)
    assert fitted > 1000


# Tables of linear layers


def entry(rows, fill=0):
    return linear.Entry(rows, (ctypes.c_uint64 * 8)(*[fill] * 8))


def test_batches_to_measure():
    powers = [1, 2, 4, 8, 16, 32, 64, 128, 256]
    assert linear.measured_batches(BatchRange(1, 32, 256)) == powers
    assert linear.measured_batches(BatchRange(3, 5, 9)) == [3, 4, 5, 8, 9]
    assert linear.measured_batches(BatchRange(4, 4, 4)) == [4]


@pytest.mark.parametrize("outputs, inputs", [
    (0, 64), (12, 64), (65544, 64), (64, 0), (64, 6), (64, 65540), (-8, 64)])
def test_sizes_that_no_layer_has(outputs, inputs):
    assert not linear.takes(outputs, inputs) and linear.takes(64, 128)
    with pytest.raises(ValueError, match="no linear layer here"):
        linear.tune([1], (outputs, inputs), False)


def test_what_is_missing_or_wrong_is_told(recorded):
    assert linear.version_text() == "13.1.2"
    x = torch.zeros(2, 64).half()
    for wrong in (x, x[0]):
        with pytest.raises(ValueError, match=r"x \[.., K\] and a weight \[N, K\] on a GPU"):
            linear.linear(x, wrong)
    recorded.library.clip_linear_version = lambda: 0
    for call in (linear.version, lambda: linear._layer(linear.pack(64, 64, False))):
        with pytest.raises(UserError, match="need cuBLASLt"):
            call()


def test_layers_that_make_room_for_others_are_destroyed_after_their_last_use(recorded):
    destroyed = recorded.library.destroyed
    in_use = linear._layer(linear.pack(64, 64, False))
    assert linear._layer(linear.pack(64, 64, False)) is in_use
    address, most = in_use.pointer.value, linear._layer.cache_info().maxsize
    for i in range(most + 9):
        linear._layer(linear.pack(64, 4 * (i + 20), False))
    gc.collect()
    assert len(destroyed) == 9 and address not in destroyed
    del in_use
    gc.collect()
    assert len(destroyed) == 10 and destroyed[-1] == address
    linear._layer.cache_clear()
    gc.collect()
    assert len(destroyed) == len(set(destroyed)) == most + 10


# Which cuBLASLt

FUNCTIONS = re.findall(r"\(\*(cublasLt\w+)\)", DECLARED)
VERSION_HERE = "import ctypes, sys; print(ctypes.CDLL(sys.argv[1]).clip_linear_version())"


@needs.built
@pytest.mark.parametrize("functions, version", [
    (FUNCTIONS, 130999), (FUNCTIONS[:-1], 0), (["other"], 0)])
def test_a_program_without_pytorch_finds_what_the_system_finds(functions, version, tmp_path):
    """And takes no library that lacks a function; with PyTorch its own would be loaded."""
    if (compiler := shutil.which("cc") or shutil.which("gcc")) is None:
        pytest.skip("needs a C compiler")
    file = tmp_path / "libcublasLt.so.13"
    source = "\n".join(f"unsigned long {name}() {{ return 130999; }}" for name in functions)
    command = [compiler, "-shared", "-fPIC", f"-Wl,-soname,{file.name}", "-xc", "-o", file, "-"]
    subprocess.run(command, input=source, text=True, check=True)
    command = [sys.executable, "-c", VERSION_HERE, kernels.find().path]
    environment = {**os.environ, "LD_LIBRARY_PATH": str(tmp_path)}
    assert int(subprocess.check_output(command, env=environment)) == version


# The numbers


def table_at(bench, tmp_path):
    return bench.Table(tmp_path / "check.csv", bench.CHECK_COLUMNS)


def check_attention(library, cases, variants, tmp_path):
    table = table_at(attention_bench, tmp_path)
    found = attention_bench.check(torch, library, cases, variants, table, seconds=600)
    assert cases and found == dict.fromkeys(variants, 0)


@on_gpu
@pytest.mark.parametrize("tokens", attention_bench.CHECK_TOKENS)
def test_attention_errs_at_most_twice_as_much_as_pytorch(attention, tokens, tmp_path):
    """With and without a query bias; all elements written, none beside, the same bits twice."""
    cases = [case for case in attention_bench.check_shapes(full=True) if case[0].tokens == tokens]
    check_attention(attention, cases, [0], tmp_path)


@on_gpu
@pytest.mark.parametrize("tokens", [1, 17, 50, 77, 197, 257, 577, 1024])
def test_portable_attention_on_any_gpu(attention, tokens, tmp_path):
    portable = [id for id, name in attention.variants.items() if name.startswith("portable")]
    cases = [case for case in attention_bench.check_shapes(full=False) if case[0].tokens == tokens]
    check_attention(attention, cases, portable, tmp_path)


@on_gpu
@pytest.mark.parametrize("shapes", [
    # Batches beyond what a grid has in y and z.
    [(70000, 1, 2, False), (66000, 2, 17, True)],
    # Many heads with fewer tiles than workers, which then skip heads: the ring of copies must not
    # confuse two fillings of a stage.
    *([(700, 8, tokens, causal) for causal in (False, True)]
      for tokens in attention_bench.SKIPPING_TOKENS),
])  # fmt: skip
def test_attention_of_large_batches(attention, shapes, tmp_path):
    cases = [(attention_bench.Shape(*shape), 1.0) for shape in shapes]
    check_attention(attention, cases, [0], tmp_path)


@on_gpu
@pytest.mark.parametrize("kernel", BENCH.KERNELS)
def test_elementwise_error_is_rounding(elementwise, kernel, tmp_path):
    """Also: every element written, nothing beside them, the same bits twice."""
    cases, table = BENCH.check_cases(kernel), table_at(BENCH, tmp_path)
    assert len(cases) >= 36
    assert BENCH.check(torch, elementwise, cases, table, seconds=600) == 0
    if kernel == "quick_gelu":
        assert BENCH.check_every_half(torch, elementwise, table) == 0


@on_gpu
@pytest.mark.parametrize("shape", [
    BENCH.Shape("quick_gelu", 140_000, 1024), BENCH.Shape("layer_norm", 300_000, 64),
    BENCH.Shape("residual_layer_norm", 66_000, 1032), BENCH.patches_shape(66_000, 8, 16),
    BENCH.embed_shape(132_001, 2, 264),
], ids=lambda shape: shape.kernel)  # fmt: skip
def test_more_rows_than_a_grid_has_in_y(elementwise, shape):
    work = BENCH.work_for(torch, shape, 1.0, 0)
    work.run(elementwise)
    for out, exact, bound in work.errors():
        assert ((out.double() - exact).abs() <= bound).all()


@on_gpu
def test_layer_norm_far_from_zero_and_of_equal_values(elementwise):
    """The variance is that of centred values: the mean does not eat its digits."""
    work = BENCH.work_for(torch, BENCH.Shape("residual_layer_norm", 33, 768), 1.0, 0)
    work.x += 500
    assert BENCH.check_work(torch, elementwise, work)[0]
    work = BENCH.work_for(torch, BENCH.Shape("layer_norm", 33, 768), 1.0, 0)
    work.x.fill_(1000.0)
    work.run(elementwise)
    assert torch.equal(work.outputs["out"], work.constants["shift"].half().expand(33, 768))


# [outputs, inputs] of CLIP's weights: ViT-B/32's image and text encoders; ViT-L/14's patches,
# whose rows are not 16-byte aligned, and blocks.
WEIGHTS = [(768, 3072), (2304, 768), (768, 768), (3072, 768), (512, 768), (1536, 512), (512, 2048),
           (1024, 588), (4096, 1024)]
ROWS = [1, 2, 7, 50, 77, 788, 1600, 8224]


def tensors(rows, outputs, inputs, bias):
    """Values of order 1 in the sums: what a layer norm leaves, times a weight that keeps it."""
    sizes = (rows, inputs), (outputs, inputs), (outputs,)
    generator = torch.Generator("cuda").manual_seed(0)
    x, weight, b = (torch.randn(size, generator=generator, device="cuda") for size in sizes)
    return x.half(), (weight * inputs**-0.5).half(), b.half() if bias else None


def poisoned(table, x, weight, bias):
    """The launch into an output of NaN with a NaN row before and after it."""
    shape = (x.shape[0] + 2, weight.shape[0])
    out = torch.full(shape, NAN, dtype=torch.half, device="cuda")
    workspace = torch.full((linear.WORKSPACE_BYTES,), 0xFF, dtype=torch.uint8, device="cuda")
    layer = linear._layer(table)
    kernels.launch("linear", x.device, layer=layer.pointer, x=x, weight=weight, bias=bias,
                   out=out[1:-1], workspace=workspace, rows=x.shape[0])
    torch.cuda.synchronize()
    assert out[0].isnan().all() and out[-1].isnan().all()
    return out[1:-1]


def check_linear(actual, x, weight, bias):
    """Against float64.

    fp16 rounds by 2^-11 of a value or, where that is more, 2^-25.  A result is rounded once; with
    a bias twice, since some algorithms add it to the product in fp16.  fp32 sums of K terms err
    like a random walk of sqrt(K) steps of 2^-23 of their size at most: tensor cores cut digits off.
    """
    product = x.double() @ weight.double().T
    terms = x.double().abs() @ weight.double().abs().T
    exact = product if bias is None else product + bias.double()
    sums = x.shape[1] ** 0.5 * 2**-23 * terms
    rounding = 2**-11 * (exact.abs() + sums) + 2**-25
    if bias is not None:
        rounding += 1.001 * (2**-11 * (product.abs() + sums) + 2**-25)
    error = (actual.double() - exact).abs()
    assert (error <= rounding + sums).all(), (error / (rounding + sums)).max()


def test_the_check_finds_what_loses_digits():
    """It passes what is rounded once or, with a bias, twice, and no more than that."""
    torch.manual_seed(0)
    x, bias = torch.randn(50, 768).half(), torch.randn(64).half()
    weight = (torch.randn(64, 768) * 768**-0.5).half()
    parts = [x[:, i : i + 16].float() @ weight[:, i : i + 16].float().T for i in range(0, 768, 16)]
    product, added = sum(parts), torch.zeros(50, 64).half()
    for part in parts:
        added = (added.float() + part).half()
    twice = product.half() + bias
    for right, b in ((product, None), (product + bias.float(), bias), (twice, bias)):
        check_linear(right.half(), x, weight, b)
    halves = sum(parts[:24]).half() + sum(parts[24:]).half()
    one_step = product.half() * (1 + 2**-10)
    for wrong, b in ((halves, None), (added, None), (one_step, None), (added + bias, bias)):
        with pytest.raises(AssertionError):
            check_linear(wrong, x, weight, b)


@on_gpu
@pytest.mark.parametrize("measured", [False, True], ids=["suggested", "measured"])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("outputs, inputs", WEIGHTS)
def test_linear_error_is_rounding(outputs, inputs, bias, measured):
    """For all rows; also: every element written, nothing beside them, the same bits twice.

    By cuBLASLt's suggestion, or by a table for 1 and 1600 rows: the nearest entry's algorithm, or
    cuBLASLt's where that cannot.
    """
    table = linear.pack(outputs, inputs, bias)
    if measured:
        table = linear.tune([1600, 1], (outputs, inputs), bias)
        about = linear.Table.from_buffer_copy(table)
        assert (about.count, about.version) == (2, linear.version())
    for rows in ROWS:
        x, weight, b = tensors(rows, outputs, inputs, bias)
        actual = poisoned(table, x, weight, b)
        check_linear(actual, x, weight, b)
        assert torch.equal(actual, poisoned(table, x, weight, b))
        assert torch.equal(actual, linear.linear(x, weight, b, table))


@on_gpu
def test_measured_algorithms_are_of_one_cublaslt():
    found, microseconds = linear.measure(50, (768, 768), False)
    assert found.rows == 50 and 1 < microseconds < 1000
    x, weight, _ = tensors(50, 768, 768, False)
    nonsense = linear.pack(768, 768, False, [entry(50, 2**64 - 1)], linear.version() + 1)
    assert torch.equal(linear.linear(x, weight, table=nonsense), linear.linear(x, weight))


# The wrappers


@on_gpu
def test_linear_of_any_shape_layout_and_alignment():
    x, weight, bias = tensors(24, 64, 128, True)
    expected = linear.linear(x, weight, bias)
    turned = [one.T.contiguous().T for one in (x, weight)]
    assert torch.equal(linear.linear(*turned, misaligned(bias)), expected)
    several = linear.linear(x.view(2, 3, 4, 128), weight, bias)
    assert torch.equal(several, expected.view(2, 3, 4, 64))
    assert linear.linear(x[:0], weight, bias).shape == (0, 64)
    assert linear.linear(x[0], weight, bias).shape == (64,)
    for arguments, match in (
        ((x[:, :64], weight), r"x must be torch.float16 \[24, 128\]"),
        ((x, weight, bias.float()), "bias must be torch.float16"),
        ((x, weight, bias, linear.pack(64, 128, False)), "are no table of this linear layer"),
    ):
        with pytest.raises(ValueError, match=match):
            linear.linear(*arguments)


@on_gpu
def test_threads_share_a_layer():
    x, weight, bias = tensors(320, 768, 768, True)
    counts, right = range(1, 320, 20), []
    expected = {rows: linear.linear(x[:rows].clone(), weight, bias) for rows in counts}
    linear._layer.cache_clear()

    def work():
        with torch.cuda.stream(torch.cuda.Stream()):
            for rows in [*counts] * 5:
                right.append(torch.equal(linear.linear(x[:rows], weight, bias), expected[rows]))

    torch.cuda.synchronize()
    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(right) == 4 * 5 * len(counts) and all(right)
