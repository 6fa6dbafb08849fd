"""The elementwise kernels: the interface, the numbers they compute, and their wrappers for PyTorch."""

import ctypes
import pathlib
import re

import pytest
import torch

from clip_ttrt import elementwise
from clip_ttrt.errors import UserError
from experiments import elementwise_bench as bench
from kernels import build

ROOT = pathlib.Path(__file__).parents[2]
HEADER = (ROOT / "kernels" / "elementwise" / "elementwise.h").read_text()
INVALID_VALUE = 1  # cudaErrorInvalidValue
TYPES = {
    "const void*": ctypes.c_void_p, "void*": ctypes.c_void_p, "int64_t": ctypes.c_int64, "int32_t": ctypes.c_int32,
    "float": ctypes.c_float,
}  # fmt: skip

built = pytest.mark.skipif(not build.OUTPUT.is_file(), reason="the library is not built: python -m kernels.build")
on_gpu = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() < (8, 0),
    reason="needs a GPU of compute capability 8.0 or newer",
)


@pytest.fixture(scope="module")
def library():
    return bench.Library(build.OUTPUT)


# The interface


@pytest.mark.parametrize(
    "struct, ours, benchs",
    [
        ("ClipBiasQuickGeluParams", elementwise.GeluParams, bench.GeluParams),
        ("ClipResidualLayerNormParams", elementwise.LayerNormParams, bench.LayerNormParams),
    ],
)
def test_ctypes_structs_agree_with_the_header(struct, ours, benchs):
    body = re.search(rf"typedef struct {struct} \{{(.*?)\}}", HEADER, re.DOTALL).group(1)
    fields = re.findall(r"^\s*(const void\*|void\*|int64_t|int32_t|float) (\w+);", body, re.MULTILINE)
    assert [(name, TYPES[kind]) for kind, name in fields] == list(ours._fields_)
    assert ours._fields_ == benchs._fields_  # the bench runs without our package


def test_limits_agree_with_the_header():
    limits = dict(re.findall(r"(kClip\w+) = (\d+)", HEADER))
    assert int(limits["kClipElementwiseWidthStep"]) == elementwise.WIDTH_STEP
    assert int(limits["kClipQuickGeluMaxWidth"]) == elementwise.GELU_WIDTHS
    assert int(limits["kClipLayerNormMaxWidth"]) == elementwise.LAYER_NORM_WIDTHS


def test_floor_counts_each_byte_once():
    assert bench.Shape("quick_gelu", 8224, 4096).bytes == 8224 * 4096 * 2 * 2
    assert bench.Shape("residual_layer_norm", 8224, 1024).bytes == 8224 * 1024 * 2 * 4
    assert bench.Shape("layer_norm", 8224, 1024).bytes == 8224 * 1024 * 2 * 2


def test_every_shape_asked_for_is_timed_once():
    assert len(bench.TIMED) == len(set(bench.TIMED)) == len(set(bench.ALL))
    assert set(bench.COMMON) - set(bench.ALL) == set()


def test_wrappers_refuse_what_is_not_on_a_gpu():
    x, constant = torch.zeros(2, 64).half(), torch.zeros(64)
    assert not elementwise.serves(x)
    with pytest.raises(ValueError, match="x must be fp16"):
        elementwise.bias_quick_gelu(x, constant)
    with pytest.raises(ValueError, match="x must be fp16"):
        elementwise.residual_layer_norm(x, x, constant, constant, constant, 1e-5)


def test_library_of_another_version_is_a_user_error(monkeypatch):
    monkeypatch.setattr(elementwise.plugin, "library", lambda: object())
    elementwise._library.cache_clear()
    with pytest.raises(UserError, match="another version"):
        elementwise._library()


@built
@pytest.mark.parametrize(
    "changed",
    [{"rows": -1}, {"rows": 2**31}, {"width": 0}, {"width": 4}, {"width": 100}, {"width": 65544}, {"in": None}, {"out": None},
     {"in": 4104}, {"out": 4104}, {"bias": 4104}],
)  # fmt: skip
def test_gelu_refuses_what_is_outside_the_contract(library, changed):
    """Before any call to the driver, so also where there is no GPU."""
    values = {"in": 4096, "bias": None, "out": 4096, "rows": 3, "width": 64, "variant": 0} | changed
    params = bench.GeluParams(*(values[name] for name, _ in bench.GeluParams._fields_))
    assert library._library.clip_bias_quick_gelu_launch(ctypes.byref(params), None) == INVALID_VALUE


@built
@pytest.mark.parametrize(
    "changed",
    [{"rows": -1}, {"rows": 2**31}, {"width": 0}, {"width": 4}, {"width": 100}, {"width": 8200}, {"epsilon": 0.0},
     {"epsilon": -1.0}, {"epsilon": float("nan")}, {"x": None}, {"scale": None}, {"shift": None}, {"out": None}, {"x": 4104},
     {"delta": 4104}, {"bias": 4104}, {"scale": 4104}, {"shift": 4104}, {"sum_out": 4104}, {"out": 4104}],
)  # fmt: skip
def test_layer_norm_refuses_what_is_outside_the_contract(library, changed):
    values = {name: 4096 for name in ("x", "scale", "shift", "out")} | {name: None for name in ("delta", "bias", "sum_out")}
    values |= {"rows": 3, "width": 64, "epsilon": 1e-5, "variant": 0} | changed
    params = bench.LayerNormParams(*(values[name] for name, _ in bench.LayerNormParams._fields_))
    assert library._library.clip_residual_layer_norm_launch(ctypes.byref(params), None) == INVALID_VALUE


@built
def test_no_rows_are_no_work(library):
    gelu = bench.GeluParams(None, None, None, 0, 64, 0)
    assert library._library.clip_bias_quick_gelu_launch(ctypes.byref(gelu), None) == 0
    norm = bench.LayerNormParams(None, None, None, None, None, None, None, 0, 64, 1e-5, 0)
    assert library._library.clip_residual_layer_norm_launch(ctypes.byref(norm), None) == 0


# The numbers


@built
@pytest.mark.gpu
@on_gpu
@pytest.mark.parametrize("kernel", ["quick_gelu", "residual_layer_norm", "layer_norm"])
def test_error_is_rounding(library, kernel, tmp_path):
    """Also: every element written, nothing beside them, the same bits twice."""
    cases = [case for case in bench.check_cases(full=True) if case[0].kernel == kernel]
    assert len(cases) == 19 * 8 * 3
    assert bench.check(torch, library, cases, False, bench.Table(tmp_path / "check.csv", bench.CHECK_COLUMNS), seconds=600) == 0


@built
@pytest.mark.gpu
@on_gpu
def test_every_variant(library, tmp_path):
    table = bench.Table(tmp_path / "check.csv", bench.CHECK_COLUMNS)
    assert bench.check(torch, library, bench.check_cases(full=False), True, table, seconds=600) == 0


@built
@pytest.mark.gpu
@on_gpu
def test_quick_gelu_of_every_half(library, tmp_path):
    assert bench.check_every_half(torch, library, bench.Table(tmp_path / "check.csv", bench.CHECK_COLUMNS)) == 0


@built
@pytest.mark.gpu
@on_gpu
@pytest.mark.parametrize("kernel, rows, width", [("quick_gelu", 300_000, 64), ("layer_norm", 300_000, 64), ("residual_layer_norm", 70_000, 1032)])
def test_more_rows_than_a_grid_has_in_y(library, kernel, rows, width):
    shape = bench.Shape(kernel, rows, width)
    inputs = bench.random_inputs(torch, shape, 1.0, 0)
    for variant in bench.variants_of(library, shape, develop=True):
        assert bench.check_case(torch, library, shape, inputs, variant)[0], variant


@built
@pytest.mark.gpu
@on_gpu
def test_layer_norm_far_from_zero_and_of_equal_values(library):
    """The variance is that of centred values: the mean does not eat its digits."""
    shape = bench.Shape("residual_layer_norm", 33, 768)
    inputs = bench.random_inputs(torch, shape, 1.0, 0)
    inputs.x += 500
    assert bench.check_case(torch, library, shape, inputs, 0)[0]
    shape = bench.Shape("layer_norm", 33, 768)
    inputs = bench.random_inputs(torch, shape, 1.0, 0)
    inputs.x.fill_(1000.0)
    bench.run_kernel(torch, library, shape, inputs, 0)
    assert torch.equal(inputs.out, inputs.shift.half().expand_as(inputs.out))


# The wrappers


@built
@pytest.mark.gpu
@on_gpu
def test_wrappers_match_float64_and_torch_layer_norm():
    generator = torch.Generator("cuda").manual_seed(0)

    def normal(*size):
        return torch.randn(size, generator=generator, device="cuda")

    x, delta = normal(4, 50, 768).half(), normal(4, 50, 768).half()
    bias, scale, shift = normal(768), normal(768), normal(768)
    assert elementwise.serves(x) and not elementwise.serves(x[..., :100].contiguous())
    y = x.double() + bias.double()
    torch.testing.assert_close(elementwise.bias_quick_gelu(x, bias).double(), y * torch.sigmoid(1.702 * y), rtol=1e-3, atol=1e-6)
    torch.testing.assert_close(elementwise.bias_quick_gelu(x, None).double(), x.double() * torch.sigmoid(1.702 * x.double()), rtol=1e-3, atol=1e-6)
    total, out = elementwise.residual_layer_norm(x, delta, bias, scale, shift, 1e-5)
    torch.testing.assert_close(total.double(), x.double() + delta.double() + bias.double(), rtol=1e-3, atol=1e-6)
    exact = torch.nn.functional.layer_norm(total.double(), (768,), scale.double(), shift.double(), 1e-5)
    torch.testing.assert_close(out.double(), exact, rtol=1e-3, atol=1e-5)
    same, out = elementwise.residual_layer_norm(total, None, None, scale, shift, 1e-5)
    assert same is total
    torch.testing.assert_close(out.double(), exact, rtol=1e-3, atol=1e-5)
    # A column slice is neither contiguous nor, from column 1 on, aligned.
    torch.testing.assert_close(elementwise.bias_quick_gelu(x[..., 1:65], bias[1:65]), elementwise.bias_quick_gelu(x, bias)[..., 1:65], rtol=0, atol=0)
    assert elementwise.bias_quick_gelu(x[:0], bias).shape == (0, 50, 768)


@built
@pytest.mark.gpu
@on_gpu
def test_wrappers_refuse_other_tensors():
    x, constant = torch.zeros(2, 64, device="cuda").half(), torch.zeros(64, device="cuda")
    with pytest.raises(ValueError, match="bias must be fp32"):
        elementwise.bias_quick_gelu(x, constant.half())
    with pytest.raises(ValueError, match="delta must be"):
        elementwise.residual_layer_norm(x, x[:1], constant, constant, constant, 1e-5)
    with pytest.raises(ValueError, match=r"scale must be fp32 \[64\]"):
        elementwise.residual_layer_norm(x, x, constant, constant[:32], constant, 1e-5)
    with pytest.raises(ValueError, match="multiple of 8"):
        elementwise.bias_quick_gelu(x[:, :12].contiguous(), None)
    with pytest.raises(ValueError, match="epsilon"):
        elementwise.residual_layer_norm(x, x, constant, constant, constant, 0.0)


@built
@pytest.mark.gpu
@on_gpu
def test_graph_capture_replays_on_new_inputs():
    x, constant = torch.zeros(50, 768, device="cuda").half(), torch.ones(768, device="cuda")
    elementwise.residual_layer_norm(x, x, constant, constant, constant, 1e-5)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        total, out = elementwise.residual_layer_norm(elementwise.bias_quick_gelu(x, constant), x, constant, constant, constant, 1e-5)
    x.copy_(torch.randn(50, 768, device="cuda"))
    graph.replay()
    expected = elementwise.residual_layer_norm(elementwise.bias_quick_gelu(x, constant), x, constant, constant, constant, 1e-5)
    assert torch.equal(total, expected[0]) and torch.equal(out, expected[1])
