"""The library's launchers: structs and limits as their headers have them, what they refuse, and
their numbers against float64 (checks.py)."""
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

import checks
import needs
import pytest
import torch

from clip_ttrt import kernels, linear
from clip_ttrt.errors import UserError
from clip_ttrt.options import BatchRange

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


# What launchers are given, and what they refuse

POINTER, UNALIGNED, NAN = 4096, 4104, checks.NAN
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


def variants():
    """id -> name."""
    found, one, name_of = {}, ctypes.c_int32(), kernels.library().clip_attention_variant
    name_of.restype = ctypes.c_char_p
    while name := name_of(len(found), ctypes.byref(one)):
        found[one.value] = name.decode()
    return found


def serves(variant, tokens, causal, capability):
    served = kernels.library().clip_attention_variant_serves
    return variant == 0 or served(variant, tokens, int(causal), *capability) == 1


@needs.built
def test_every_length_has_a_variant_on_every_supported_gpu():
    choose, batches = kernels.library().clip_attention_choose, map(ctypes.c_int64, (1, 128))
    sizes = itertools.product(batches, range(1, 1025), (0, 1), (HOPPER, AMPERE))
    for batch, tokens, causal, capability in sizes:
        chosen = choose(batch, 12, tokens, causal, *capability, 132)
        assert chosen and serves(chosen, tokens, causal, capability), (capability, tokens)
    for variant, name in variants().items():
        on_ampere = any(serves(variant, t, False, AMPERE) for t in (1, 50, 77, 257, 577))
        assert on_ampere == name.startswith("portable"), name
        assert not serves(variant, 50, False, TURING)


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


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


TOKENS = [1, 2, 15, 16, 17, 49, 50, 64, 65, 77, 128, 196, 197, 257, 320, 577, 1024]
# At which a head has fewer tiles than a block of the kernel has warps for them.
SKIPPING = [1, 7, 16, 17, 32, 33, 48, 60, 64, 70, 80, 81, 100, 128, 150, 190]


@on_gpu
@pytest.mark.parametrize("tokens", TOKENS)
def test_attention(tokens):
    sizes = [(1, 3, 33), (1, 2, 8, 12, 16), (False, True), (0.1, 1.0, 8.0), (False, True)]
    for batch, heads, causal, scale, biased in itertools.product(*sizes):
        checks.check(checks.attention(batch, heads, tokens, causal, scale, biased))


@on_gpu
@pytest.mark.parametrize("tokens", TOKENS)
def test_every_variant_of_attention(tokens):
    """Of a few heads, and of as many as fill the GPU."""
    capability, sizes = torch.cuda.get_device_capability(), [(1, 1), (3, 12), (33, 16)]
    for (batch, heads), causal, biased in itertools.product(sizes, (False, True), (False, True)):
        launch = checks.attention(batch, heads, tokens, causal, 1.0, biased)
        for variant in variants():
            if serves(variant, tokens, causal, capability):
                checks.check(launch._replace(fields={**launch.fields, "variant": variant}))


@on_gpu
@pytest.mark.parametrize("shapes", [
    # Batches beyond what a grid has in y and z.
    [(70000, 1, 2, False), (66000, 2, 17, True)],
    # The ring of copies must not confuse two fillings of a stage where warps skip heads.
    *([(700, 8, tokens, causal) for causal in (False, True)] for tokens in SKIPPING),
])  # fmt: skip
def test_attention_of_large_batches(shapes):
    for shape in shapes:
        for biased in (False, True):
            checks.check(checks.attention(*shape, biased=biased))


WIDTHS = [8, 64, 72, 128, 192, 256, 264, 512, 520, 768, 1000, 1024, 1032, 2048, 3072, 4096, 4104,
          5120, 8192]


@on_gpu
@pytest.mark.parametrize("width", WIDTHS)
def test_rows_of_every_width(width):
    rows = (1, 2, 3, 5, 7, 33, 50, 1601)
    for count, scale in itertools.product(rows, (0.1, 1.0, 8.0)):
        x, delta = checks.randn(2, count, width, scale=scale).half()
        bias = checks.randn(width, scale=scale)
        for launch in (checks.quick_gelu(x, bias), checks.quick_gelu(x, None),
                       checks.layer_norm(x), checks.layer_norm(x, delta, bias)):
            checks.check(launch)
    for batch, tokens, scale in itertools.product((1, 3, 33), (2, 5, 50), (0.1, 1.0, 8.0)):
        checks.check(checks.embed_image(batch, tokens, width, scale))


@on_gpu
@pytest.mark.parametrize("dtype", [torch.float, torch.half])
@pytest.mark.parametrize("size, resolution", [
    (2, 2), (2, 6), (6, 30), (8, 64), (12, 36), (14, 14), (14, 42), (14, 224), (14, 336),
    (16, 224), (32, 224), (32, 32)])
def test_patches(size, resolution, dtype):
    for batch in (1, 3, 33):
        checks.check(checks.patches(checks.randn(batch, 3, *[resolution] * 2).to(dtype), size))


@on_gpu
@pytest.mark.parametrize("launch", [
    lambda: checks.quick_gelu(checks.randn(140_000, 1024).half(), checks.randn(1024)),
    lambda: checks.layer_norm(checks.randn(300_000, 64).half()),
    lambda: checks.layer_norm(*checks.randn(2, 66_000, 1032).half(), checks.randn(1032)),
    lambda: checks.patches(checks.randn(66_000, 3, 16, 16), 8),
    lambda: checks.embed_image(132_001, 2, 264),
])  # fmt: skip
def test_more_rows_than_a_grid_has_in_y(launch):
    checks.check(launch())


@on_gpu
def test_quick_gelu_of_every_half():
    """Infinities and NaNs as in PyTorch."""
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32, device="cuda").short()
    x = every.view(torch.half).view(1024, 64)
    checks.check(checks.quick_gelu(torch.where(x.isfinite(), x, 0), None))
    out = torch.empty_like(x)
    kernels.launch("bias_quick_gelu", x.device, **{"in": x}, out=out, rows=1024, width=64)
    expected = (x.float() * torch.sigmoid(1.702 * x.float())).half()
    assert torch.equal(out.isnan(), expected.isnan())
    assert torch.equal(out[x == torch.inf], x[x == torch.inf])


@on_gpu
def test_layer_norm_far_from_zero_and_of_equal_values():
    """The variance is that of centred values: the mean does not eat its digits."""
    x, delta = checks.randn(2, 33, 768).half()
    checks.check(checks.layer_norm(x + 500, delta, checks.randn(768)))
    checks.check(checks.layer_norm(torch.full_like(x, 1000)))


# [outputs, inputs] of CLIP's weights: ViT-B/32's image and text encoders; ViT-L/14's patches,
# whose rows are not 16-byte aligned, and blocks.
WEIGHTS = [(768, 3072), (2304, 768), (768, 768), (3072, 768), (512, 768), (1536, 512), (512, 2048),
           (1024, 588), (4096, 1024)]
ROWS = [1, 2, 7, 50, 77, 788, 1600, 8224]


def tensors(rows, outputs, inputs, bias):
    """Values of order 1 in the sums: what a layer norm leaves, times a weight that keeps it."""
    x, weight = checks.randn(rows, inputs), checks.randn(outputs, inputs, scale=inputs**-0.5)
    return x.half(), weight.half(), checks.randn(outputs).half() if bias else None


@pytest.mark.parametrize("bias", [None, torch.randn(64).half()], ids=["", "bias"])
def test_the_check_finds_what_loses_digits(bias, recorded, monkeypatch):
    """It passes what is rounded once or, with a bias, twice, and no more than that."""
    monkeypatch.setattr(checks, "DEVICE", "cpu")
    x, weight = torch.randn(50, 768).half(), (torch.randn(64, 768) * 768**-0.5).half()
    launch = checks.linear_layer(linear.pack(64, 768, bias is not None), x, weight, bias)
    b = torch.zeros(64).half() if bias is None else bias
    parts = [x[:, i : i + 16].float() @ weight[:, i : i + 16].float().T for i in range(0, 768, 16)]
    product, added = sum(parts), torch.zeros(50, 64).half()
    for part in parts:
        added = (added.float() + part).half()
    halves = sum(parts[:24]).half() + sum(parts[24:]).half()
    for result, right in (
        ((product + b.float()).half(), True), (product.half() + b, True), (added + b, False),
        (product.half() * (1 + 2**-9) + b, False), (halves + b, False),
    ):  # fmt: skip
        [(_, exact, allowed)] = launch.expected({"out": result})
        assert bool(((result.double() - exact).abs() <= allowed).all()) == right


@on_gpu
@pytest.mark.parametrize("measured", [False, True], ids=["suggested", "measured"])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("outputs, inputs", WEIGHTS)
def test_linear_error_is_rounding(outputs, inputs, bias, measured):
    """By cuBLASLt's suggestion, or by the nearest entry of a table for 1 and 1600 rows."""
    table = linear.pack(outputs, inputs, bias)
    if measured:
        table = linear.tune([1600, 1], (outputs, inputs), bias)
        about = linear.Table.from_buffer_copy(table)
        assert (about.count, about.version) == (2, linear.version())
    for rows in ROWS:
        checks.check(checks.linear_layer(table, *tensors(rows, outputs, inputs, bias)))


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
