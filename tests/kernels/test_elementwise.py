"""The elementwise kernels: the interface, the numbers they compute, and their wrappers for PyTorch."""

import copy
import ctypes
import pathlib
import re

import pytest
import torch

from clip_ttrt import elementwise, kernels, ops
from clip_ttrt.errors import UserError
import elementwise_checks as bench
import needs

ROOT = pathlib.Path(__file__).parents[2]
HEADER = (ROOT / "kernels" / "elementwise" / "elementwise.h").read_text()
INVALID_VALUE = 1  # cudaErrorInvalidValue
TYPES = {
    "const void*": ctypes.c_void_p, "void*": ctypes.c_void_p, "int64_t": ctypes.c_int64, "int32_t": ctypes.c_int32,
    "float": ctypes.c_float,
}  # fmt: skip



@pytest.fixture(scope="module")
def library():
    return bench.Library(kernels.find().path)


# The interface


STRUCTS = {
    "bias_quick_gelu": "ClipBiasQuickGeluParams", "residual_layer_norm": "ClipResidualLayerNormParams",
    "extract_patches": "ClipExtractPatchesParams", "embed_image": "ClipEmbedImageParams",
}  # fmt: skip


@pytest.mark.parametrize("name", STRUCTS)
def test_ctypes_structs_agree_with_the_header(name):
    body = re.search(rf"typedef struct {STRUCTS[name]} \{{(.*?)\}}", HEADER, re.DOTALL).group(1)
    fields = re.findall(r"^\s*(const void\*|void\*|int64_t|int32_t|float) (\w+);", body, re.MULTILINE)
    assert [(field, TYPES[kind]) for kind, field in fields] == list(elementwise.PARAMS[name]._fields_)
    assert elementwise.PARAMS[name]._fields_ == bench.PARAMS[name]._fields_  # the bench runs without our package


def test_limits_agree_with_the_header():
    limits = dict(re.findall(r"(kClip\w+) = (\d+)", HEADER))
    assert int(limits["kClipElementwiseWidthStep"]) == elementwise.WIDTH_STEP
    assert int(limits["kClipQuickGeluMaxWidth"]) == elementwise.GELU_WIDTHS
    assert int(limits["kClipLayerNormMaxWidth"]) == elementwise.LAYER_NORM_WIDTHS
    assert int(limits["kClipMaxResolution"]) == elementwise.MAX_RESOLUTION


def test_benchmarks_references_are_the_ops():
    """So that what the kernels are checked against is what the encoder computes."""
    images = torch.randn(2, 3, 24, 24)
    assert torch.equal(bench.cut(images, 8), ops.extract_patches_reference(images, 8).reshape(-1, 3 * 64))
    patches, token, positions = torch.randn(2, 4, 16), torch.randn(16), torch.randn(5, 16)
    rows = bench.with_class_token(torch, patches.reshape(-1, 16), token, positions)
    assert torch.equal(rows, (ops.prepend_class_token_reference(patches, token) + positions).reshape(-1, 16))


def test_wrappers_refuse_what_is_not_on_a_gpu():
    x, constant = torch.zeros(2, 64).half(), torch.zeros(64)
    assert not elementwise.serves(x)
    with pytest.raises(ValueError, match="x must be fp16"):
        elementwise.bias_quick_gelu(x, constant)
    with pytest.raises(ValueError, match="x must be fp16"):
        elementwise.residual_layer_norm(x, x, constant, constant, constant, 1e-5)
    with pytest.raises(ValueError, match="images must be fp32 or fp16"):
        elementwise.extract_patches(torch.zeros(1, 3, 32, 32), 16)
    with pytest.raises(ValueError, match="patches must be fp16"):
        elementwise.embed_image(x, constant, torch.zeros(3, 64), constant, constant, constant, constant, 1e-5, 1e-5)


def test_library_of_another_version_is_a_user_error(monkeypatch):
    monkeypatch.setattr(kernels, "library", lambda: object())
    elementwise._library.cache_clear()
    with pytest.raises(UserError, match="another version"):
        elementwise._library()


POINTER, UNALIGNED = 4096, 4104
VALID = {
    "bias_quick_gelu": {"in": POINTER, "bias": None, "out": POINTER, "rows": 3, "width": 64},
    "residual_layer_norm": {"x": POINTER, "delta": None, "bias": None, "scale": POINTER, "shift": POINTER, "sum_out": None, "out": POINTER,
                            "rows": 3, "width": 64, "epsilon": 1e-5},
    "extract_patches": {"images": POINTER, "out": POINTER, "batch": 1, "resolution": 224, "patch_size": 32, "half": 0},
    "embed_image": {**dict.fromkeys(("patches", "class_token", "positions", "scale_pre", "shift_pre", "scale_1", "shift_1", "x", "y"), POINTER),
                    "batch": 1, "tokens": 50, "width": 64, "epsilon_pre": 1e-5, "epsilon_1": 1e-5},
}  # fmt: skip
SIZES = {
    "bias_quick_gelu": {"rows": (-1, 2**31), "width": (0, -8, 4, 100, 65544)},
    "residual_layer_norm": {"rows": (-1, 2**31), "width": (0, -8, 4, 100, 8200), "epsilon": (0.0, -1.0, float("nan"))},
    "extract_patches": {"batch": (-1, 2**31, 2**62), "resolution": (0, -32, 223, 8192), "patch_size": (0, -2, 7, 30, 448), "half": (-1, 2)},
    "embed_image": {"batch": (-1, 2**31, 2**62), "tokens": (1, 0, -1), "width": (0, 4, 100, 8200), "epsilon_pre": (0.0, float("nan")),
                    "epsilon_1": (0.0, float("nan"))},
}  # fmt: skip
NULLABLE = ("bias", "delta", "sum_out")


def outside_the_contract():
    for name, values in VALID.items():
        for field in values:
            if field in SIZES[name]:
                yield from ((name, {field: value}) for value in SIZES[name][field])
            else:
                yield name, {field: UNALIGNED}
                if field not in NULLABLE:
                    yield name, {field: None}


@needs.built
@pytest.mark.parametrize("name, changed", list(outside_the_contract()))
def test_what_is_outside_the_contract_is_refused(library, name, changed):
    """Before any call to the driver, so also where there is no GPU."""
    assert library.launch(name, None, **(VALID[name] | changed)) == INVALID_VALUE


@needs.built
@pytest.mark.parametrize("name", VALID)
def test_no_rows_are_no_work(library, name):
    nothing = {"rows": 0} if "rows" in VALID[name] else {"batch": 0}
    pointers = {field: None for field in VALID[name] if field not in SIZES[name]}
    assert library.launch(name, None, **(VALID[name] | pointers | nothing)) == 0


# The numbers


@needs.built
@pytest.mark.gpu
@needs.ampere
@pytest.mark.parametrize("kernel", bench.KERNELS)
def test_error_is_rounding(library, kernel):
    """Also: every element written, nothing beside them, the same bits twice."""
    cases = bench.check_cases(kernel)
    assert len(cases) >= 36
    assert bench.check(torch, library, cases, seconds=600) == 0


@needs.built
@pytest.mark.gpu
@needs.ampere
def test_quick_gelu_of_every_half(library):
    assert bench.check_every_half(torch, library) == 0


@needs.built
@pytest.mark.gpu
@needs.ampere
@pytest.mark.parametrize(
    "shape",
    [
        bench.Shape("quick_gelu", 140_000, 1024), bench.Shape("layer_norm", 300_000, 64), bench.Shape("residual_layer_norm", 70_000, 1032),
        bench.patches_shape(70_000, 8, 16), bench.embed_shape(140_001, 2, 264),
    ],
    ids=lambda shape: shape.kernel,
)  # fmt: skip
def test_more_rows_than_a_grid_has_in_y(library, shape):
    """Rows of QuickGELU and images for the first rows, two to a block, and images to cut are what a grid has in y and z."""
    work = bench.work_for(torch, shape, 1.0, 0)
    work.run(library)
    for first in (0, shape.rows // 2, shape.rows - 1000):  # a float64 copy of all of it would not fit everywhere
        part = part_of(work, first - first % (shape.tokens or 4), 1000)
        for out, exact, bound in part.errors():
            assert ((out.double() - exact).abs() <= bound).all()


def part_of(work, first: int, rows: int):
    """The same work seen through some of its rows."""
    part = copy.copy(work)
    part.outputs = {name: out[first : first + rows] for name, out in work.outputs.items()}
    for name in ("x", "delta"):
        if getattr(work, name, None) is not None:
            setattr(part, name, getattr(work, name)[first : first + rows])
    if work.shape.tokens:
        images = slice(first // work.shape.tokens * (work.shape.tokens - 1), (first + rows) // work.shape.tokens * (work.shape.tokens - 1))
        part.patches = work.patches[images]
    if work.shape.patch:
        per_image = (work.shape.resolution // work.shape.patch) ** 2
        part.images = work.images[first // per_image : (first + rows) // per_image]
    return part


@needs.built
@pytest.mark.gpu
@needs.ampere
def test_layer_norm_far_from_zero_and_of_equal_values(library):
    """The variance is that of centred values: the mean does not eat its digits."""
    work = bench.work_for(torch, bench.Shape("residual_layer_norm", 33, 768), 1.0, 0)
    work.x += 500
    assert bench.check_work(torch, library, work)[0]
    work = bench.work_for(torch, bench.Shape("layer_norm", 33, 768), 1.0, 0)
    work.x.fill_(1000.0)
    work.run(library)
    assert torch.equal(work.outputs["out"], work.constants["shift"].half().expand(33, 768))


# The wrappers


@needs.built
@pytest.mark.gpu
@needs.ampere
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


@needs.built
@pytest.mark.gpu
@needs.ampere
@pytest.mark.parametrize("dtype", [torch.float32, torch.half])
@pytest.mark.parametrize("size", [32, 16, 14])
def test_extract_patches_is_its_reference(size, dtype):
    images = torch.randn(3, 3, 224, 224, device="cuda").to(dtype)
    expected = ops.extract_patches_reference(images, size).reshape(-1, 3 * size * size).half()
    assert torch.equal(elementwise.extract_patches(images, size), expected)
    turned = images.transpose(2, 3)  # not contiguous
    assert torch.equal(elementwise.extract_patches(turned, size), elementwise.extract_patches(turned.contiguous(), size))


@needs.built
@pytest.mark.gpu
@needs.ampere
def test_embed_image_is_its_parts():
    patches, token, positions = (torch.randn(size, device="cuda") for size in ((3 * 49, 768), (768,), (50, 768)))
    scale_pre, shift_pre, scale_1, shift_1 = torch.randn(4, 768, device="cuda")
    x, y = elementwise.embed_image(patches.half(), token, positions, scale_pre, shift_pre, scale_1, shift_1, 1e-5, 1e-6)
    rows = ops.prepend_class_token_reference(patches.half().double().view(3, 49, 768), token) + positions
    exact = torch.nn.functional.layer_norm(rows, (768,), scale_pre.double(), shift_pre.double(), 1e-5).view(150, 768)
    torch.testing.assert_close(x.double(), exact, rtol=1e-3, atol=1e-5)
    exact = torch.nn.functional.layer_norm(x.double(), (768,), scale_1.double(), shift_1.double(), 1e-6)
    torch.testing.assert_close(y.double(), exact, rtol=1e-3, atol=1e-5)


@needs.built
@pytest.mark.gpu
@needs.ampere
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
    with pytest.raises(ValueError, match="even and divide the resolution"):
        elementwise.extract_patches(torch.zeros(1, 3, 32, 32, device="cuda"), 12)
    with pytest.raises(ValueError, match=r"batch \* \(tokens - 1\)"):
        elementwise.embed_image(x, constant, torch.zeros(4, 64, device="cuda"), *[constant] * 4, 1e-5, 1e-5)


@needs.built
@pytest.mark.gpu
@needs.ampere
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
