"""The kernels on a GPU against float64, with random tensors.

An output may be off by half a unit of the last place of fp16 or E4M3, which is what rounding costs,
and by what fp32 arithmetic costs on the way: a few 2^-24 of the largest number that went into it.
"""
import ctypes
import itertools
from concurrent.futures import ThreadPoolExecutor

import needs
import pytest
import torch

from clip_ttrt import kernels, linear, ops

DEVICE, EPSILON = "cuda", 1e-5
TOKENS = [1, 2, 15, 16, 17, 49, 50, 64, 65, 77, 128, 196, 197, 257, 320, 577, 1024]
# At which a head has fewer tiles than a block of the kernel has warps for them.
SKIPPING = [1, 7, 16, 17, 32, 33, 48, 60, 64, 70, 80, 81, 100, 128, 150, 190]
HEAD_DIMS = [72, 80, 88, 104]  # beside 64, on GPUs of capability 9.0
WIDTHS = [8, 64, 72, 128, 192, 256, 264, 512, 520, 768, 1000, 1024, 1032, 2048, 3072, 4096, 4104,
          5120, 8192]
# [outputs, inputs] of CLIP's weights: ViT-B/32's image and text encoders; ViT-L/14's patches,
# whose rows are not 16-byte aligned, and blocks.
WEIGHTS = [(768, 3072), (2304, 768), (768, 768), (3072, 768), (512, 768), (1536, 512), (512, 2048),
           (1024, 588), (4096, 1024)]
E4M3, LARGEST = torch.float8_e4m3fn, 448.0
OUT_SCALES = [0.003, 0.1, 30.0]  # of numbers around 1: much beyond 448, normal, much subnormal


def on_gpu(function):
    """A test that runs kernels on a GPU."""
    return needs.built(pytest.mark.gpu(needs.ampere(function)))


def on_fp8_gpu(function):
    """A test of E4M3, which GPUs from capability 8.9 on multiply."""
    older = torch.cuda.is_available() and torch.cuda.get_device_capability() < linear.FP8_CAPABILITY
    return pytest.mark.skipif(older, reason="needs capability 8.9 or newer")(on_gpu(function))


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def check(launcher, outputs, expected, **fields) -> None:
    """Every element within its bound, written over NaN and over numbers with the same bits, and
    nothing written to the two rows before and behind an output.

    outputs: name -> rows and width.  expected: gives (output, exact, allowed error) of each.  With
    a field out_scale the outputs `out` and `y` are E4M3, and `expected` gets them times it.
    """
    runs, out_scale = [], fields.get("out_scale", 0)
    in_e4m3 = {"out", "y"} if out_scale else set()
    for poison in (torch.nan, 80.0):
        whole = {name: torch.full((rows + 4, width), poison, device=DEVICE).to(
                     E4M3 if name in in_e4m3 else torch.half)
                 for name, (rows, width) in outputs.items()}  # fmt: skip
        runs.append({name: one[2:-2] for name, one in whole.items()})
        kernels.launch(launcher, torch.device(DEVICE), **fields, **runs[-1])
    for name, out in whole.items():
        first, second = (run[name].view(torch.uint8) for run in runs)
        assert torch.equal(first, second), f"{name} has other bits"
        beside = torch.cat([out[:2].float(), out[-2:].float()])
        assert (beside == 80).all(), f"written beside {name}"
    results = {name: out.double() * out_scale if name in in_e4m3 else out
               for name, out in runs[0].items()}  # fmt: skip
    for out, exact, allowed in expected(**results):
        error = (out.double() - exact).abs()
        assert (error <= allowed).all(), (launcher, outputs, (error - allowed).max())


def randn(*size, scale=1.0):
    return torch.randn(size, device=DEVICE) * scale


def tensors(rows, outputs, inputs, bias):
    """Of a linear layer whose sums are of order 1."""
    x, weight = randn(rows, inputs), randn(outputs, inputs, scale=inputs**-0.5)
    return x.half(), weight.half(), randn(outputs).half() if bias else None


def half_ulp(exact):
    """Half the distance of the fp16 numbers around each value."""
    return 2.0 ** (exact.abs().clamp(min=2.0**-14).log2().floor() - 11)


def stored(exact, error, out_scale=0.0):
    """What becomes of numbers with an error in fp16 or E4M3, and how far off it may be.

    E4M3 ends at 448; multiplying by the reciprocal of its scale costs two roundings in fp32.
    """
    if out_scale == 0:
        return exact, error + half_ulp(exact)
    limited = exact.clamp(-LARGEST * out_scale, LARGEST * out_scale)
    exponent = (limited / out_scale).abs().clamp(min=2.0**-6).log2().floor()
    return limited, error + limited.abs() * 2.0**-22 + out_scale * 2.0 ** (exponent - 4)


# Attention


def variants():
    found, one, name_of = [], ctypes.c_int32(), kernels.library().clip_attention_variant
    name_of.restype = ctypes.c_char_p
    while name_of(len(found), ctypes.byref(one)):
        found.append(one.value)
    return found


def serves(variant, tokens, head_dim, causal, capability):
    served = kernels.library().clip_attention_variant_serves
    return variant == 0 or served(variant, tokens, head_dim, int(causal), *capability) == 1


@needs.built
def test_every_length_has_a_variant_on_every_supported_gpu():
    choose, batches = kernels.library().clip_attention_choose, map(ctypes.c_int64, (1, 128))
    served = [(64, (9, 0)), (64, (8, 6)), *((each, (9, 0)) for each in HEAD_DIMS)]
    for batch, tokens, causal, (head_dim, capability) in itertools.product(
            batches, range(1, 1025), (0, 1), served):
        chosen = choose(batch, 12, tokens, head_dim, causal, *capability, 132)
        assert chosen and serves(chosen, tokens, head_dim, causal, capability), (tokens, head_dim)
    assert not any(serves(variant, 50, 64, False, (7, 5)) for variant in variants())


def attention(batch, heads, tokens, causal, biased, scale=1.0, variants=(0,), out_scale=0.0,
              head_dim=64):
    """Allowed is twice the largest error of PyTorch's fp16 attention, or twice what rounding the
    largest result may cost, where PyTorch is luckier; and what rounding to E4M3 costs beside."""
    width = heads * head_dim
    qkv = randn(batch, tokens, 3 * width, scale=scale).half()
    bias = randn(width, scale=scale) if biased else None
    reference = ops.fused_attention_reference
    # In parts, to bound the memory, and for PyTorch's attention, which a CUDA grid limits.
    parts = qkv.split(min(2**15, max(1, int(2e8) // (heads * tokens * tokens))))
    exact = torch.cat([reference(part.double(), heads, causal, bias) for part in parts])
    theirs = torch.cat([reference(part, heads, causal, bias) for part in parts])
    allowed = 2 * max((theirs.double() - exact).abs().max(), exact.abs().max() * 2**-11)
    exact = exact.flatten(0, 1)
    if out_scale:
        exact, allowed = stored(exact, allowed, out_scale)
    for variant in variants:
        check("attention", {"out": (batch * tokens, width)},
              lambda out: [(out, exact, allowed)], qkv=qkv, query_bias=bias,
              batch=batch, heads=heads, tokens=tokens, head_dim=head_dim, causal=int(causal),
              variant=variant, out_scale=out_scale)


@on_gpu
@pytest.mark.parametrize("tokens", TOKENS)
def test_attention(tokens):
    sizes = [(1, 3, 33), (1, 2, 8, 12, 16), (False, True), (False, True), (0.1, 1.0, 8.0)]
    for batch, heads, causal, biased, scale in itertools.product(*sizes):
        attention(batch, heads, tokens, causal, biased, scale)


@on_gpu
@pytest.mark.parametrize("tokens", TOKENS)
def test_every_variant_of_attention(tokens):
    """Of a few heads, and of as many as fill the GPU."""
    capability, sizes = torch.cuda.get_device_capability(), [(1, 1), (3, 12), (33, 16)]
    for size, causal, biased in itertools.product(sizes, (False, True), (False, True)):
        serving = [one for one in variants() if serves(one, tokens, 64, causal, capability)]
        attention(*size, tokens, causal, biased, variants=serving)


@on_gpu
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("tokens", TOKENS)
def test_every_variant_of_wider_heads(tokens, head_dim):
    """Also beside infinities in other heads, which padding must not read."""
    capability = torch.cuda.get_device_capability()
    if not kernels.attends(head_dim):
        pytest.skip("needs a GPU of capability 9.0")
    for size, causal, biased in itertools.product(
            [(1, 1), (3, 12), (33, 16)], (False, True), (False, True)):
        serving = [one for one in variants() if serves(one, tokens, head_dim, causal, capability)]
        for out_scale in (0.0, *OUT_SCALES):
            attention(*size, tokens, causal, biased, 1.0, serving, out_scale, head_dim)
    qkv = randn(2, tokens, 3, 4, head_dim).half()
    alone = kernels.attention(qkv[:, :, :, 1].flatten(2).contiguous(), 1, False)
    qkv[:, :, :, [0, 2, 3]] = torch.inf
    beside = kernels.attention(qkv.flatten(2), 4, False).unflatten(2, (4, head_dim))[:, :, 1]
    assert torch.equal(alone, beside)


@on_fp8_gpu
@pytest.mark.parametrize("tokens", TOKENS)
def test_every_variant_of_attention_in_e4m3(tokens):
    capability = torch.cuda.get_device_capability()
    for size, causal in itertools.product([(1, 1), (3, 12), (33, 16)], (False, True)):
        serving = [one for one in variants() if serves(one, tokens, 64, causal, capability)]
        for out_scale in OUT_SCALES:
            attention(*size, tokens, causal, True, variants=serving, out_scale=out_scale)


@on_gpu
@pytest.mark.parametrize("sizes", [
    # Batches beyond what a grid has in y and z.
    [(70000, 1, 2, False), (66000, 2, 17, True)],
    # The ring of copies must not confuse two fillings of a stage where warps skip heads.
    *([(700, 8, tokens, causal) for causal in (False, True)] for tokens in SKIPPING),
])  # fmt: skip
def test_attention_of_large_batches(sizes):
    for size, biased in itertools.product(sizes, (False, True)):
        attention(*size, biased)


# Rows


def gelu(x, bias=None, out_scale=0.0, approximate="quick"):
    y = x.double() if bias is None else x.double() + bias.double()
    exact = ops.gelu_reference(y, approximate)
    if approximate == "none":  # 1 + erf is rounded to fp32, however little is left of it
        allowed = y.abs() * 4 * 2.0**-23
    else:  # the exponent is rounded to fp32 before the power is taken
        exponent = y.abs() if approximate == "quick" else y.abs() * (1 + 0.05 * y.square())
        allowed = exact.abs() * (4 + 4 * exponent) * 2.0**-23
    exact, allowed = stored(exact, allowed, out_scale)
    check("bias_gelu", {"out": x.shape}, lambda out: [(out, exact, allowed)],
          **{"in": x}, bias=bias, rows=x.shape[0], width=x.shape[1],
          approximate=kernels.GELUS.index(approximate), out_scale=out_scale)


def norms(width):
    return 1 + 0.3 * randn(width), 0.3 * randn(width)


def normed(out, x, scale, shift, out_scale=0.0):
    """(out, exact, allowed) of the layer norm of a float64 x."""
    mean = x.mean(1, keepdim=True)
    deviation = (x.var(1, correction=0, keepdim=True) + EPSILON).sqrt()
    normalised = (x - mean) / deviation
    exact = normalised * scale.double() + shift.double()
    before = normalised.abs() * 8 + x.abs().amax(1, keepdim=True) / deviation * 4
    fp32 = before * scale.abs().double() + shift.abs().double()
    return out, *stored(exact, fp32 * 2.0**-22, out_scale)


def layer_norm(x, delta=None, bias=None, out_scale=0.0):
    (rows, width), (scale, shift) = x.shape, norms(x.shape[1])
    parts = [part.double() for part in (x, delta, bias) if part is not None]

    def expected(out, sum_out=None):
        if sum_out is None:
            return [normed(out, parts[0], scale, shift, out_scale)]
        exact = sum(parts)
        allowed = half_ulp(exact) + sum(part.abs() for part in parts) * 2.0**-22
        # The layer norm is that of the rounded sum.
        layer_norm = normed(out, sum_out.double(), scale, shift, out_scale)
        return [(sum_out, exact, allowed), layer_norm]

    names = ["out"] if delta is None else ["sum_out", "out"]
    check("residual_layer_norm", dict.fromkeys(names, x.shape), expected, x=x, delta=delta,
          bias=bias, scale=scale, shift=shift, rows=rows, width=width, epsilon=EPSILON,
          out_scale=out_scale)


def embed_image(batch, tokens, width, scale=1.0, out_scale=0.0):
    projected = randn(batch, tokens - 1, width, scale=scale).half()
    token, positions = randn(width, scale=scale), randn(tokens, width, scale=scale)
    pre, first = norms(width), norms(width)
    rows = ops.prepend_class_token_reference(projected.double(), token) + positions
    check("embed_image", dict.fromkeys("xy", (batch * tokens, width)),
          lambda x, y: [normed(x, rows.flatten(0, 1), *pre),
                        normed(y, x.double(), *first, out_scale)],
          patches=projected, class_token=token, positions=positions, scale_pre=pre[0],
          shift_pre=pre[1], scale_1=first[0], shift_1=first[1], batch=batch, tokens=tokens,
          width=width, epsilon_pre=EPSILON, epsilon_1=EPSILON, out_scale=out_scale)


def patches(images, size):
    """Rounded once, with no error beside that."""
    exact = ops.extract_patch_rows_reference(images, size, torch.half)
    check("extract_patches", {"out": exact.shape}, lambda out: [(out, exact.double(), 0)],
          images=images, batch=images.shape[0], resolution=images.shape[2], patch_size=size,
          half=int(images.dtype == torch.half))


@on_gpu
@pytest.mark.parametrize("width", WIDTHS)
def test_rows_of_every_width(width):
    for rows, scale in itertools.product((1, 2, 3, 5, 7, 33, 50, 1601), (0.1, 1.0, 8.0)):
        x, delta = randn(2, rows, width, scale=scale).half()
        bias = randn(width, scale=scale)
        for approximate in kernels.GELUS:
            gelu(x, bias, approximate=approximate)
        gelu(x)
        layer_norm(x)
        layer_norm(x, delta, bias)
    for batch, tokens, scale in itertools.product((1, 3, 33), (2, 5, 50), (0.1, 1.0, 8.0)):
        embed_image(batch, tokens, width, scale)


@on_fp8_gpu
@pytest.mark.parametrize("width", WIDTHS)
def test_rows_of_every_width_in_e4m3(width):
    for rows, out_scale in itertools.product((1, 5, 50, 1601), OUT_SCALES):
        x, delta = randn(2, rows, width).half()
        for approximate in kernels.GELUS:
            gelu(x, randn(width), out_scale, approximate)
        layer_norm(x, out_scale=out_scale)
        layer_norm(x, delta, randn(width), out_scale)
    for (batch, tokens), out_scale in itertools.product([(3, 5), (33, 50), (160, 50)], OUT_SCALES):
        embed_image(batch, tokens, width, out_scale=out_scale)


@on_gpu
@pytest.mark.parametrize("dtype", [torch.float, torch.half])
@pytest.mark.parametrize("size, resolution", [
    (2, 2), (2, 6), (6, 30), (8, 64), (12, 36), (14, 14), (14, 42), (14, 224), (14, 336),
    (16, 224), (32, 224), (32, 32)])
def test_patches(size, resolution, dtype):
    for batch in (1, 3, 33):
        patches(randn(batch, 3, resolution, resolution).to(dtype), size)


@on_gpu
def test_more_rows_than_a_grid_has_in_y():
    gelu(randn(140_000, 1024).half(), randn(1024))
    layer_norm(randn(300_000, 64).half())
    layer_norm(*randn(2, 66_000, 1032).half(), randn(1032))
    patches(randn(66_000, 3, 16, 16), 8)
    embed_image(132_001, 2, 264)


@on_gpu
@pytest.mark.parametrize("approximate", kernels.GELUS)
def test_gelu_of_every_half(approximate):
    """NaNs as in PyTorch, and infinity."""
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32, device=DEVICE).short()
    x = every.view(torch.half).view(1024, 64)
    gelu(torch.where(x.isfinite(), x, 0), approximate=approximate)
    out, kind = torch.empty_like(x), kernels.GELUS.index(approximate)
    kernels.launch("bias_gelu", x.device, **{"in": x}, out=out, rows=1024, width=64,
                   approximate=kind)
    expected = ops.gelu_reference(x.double(), approximate)
    assert torch.equal(out.isnan(), expected.isnan())
    assert torch.equal(out[x == torch.inf], x[x == torch.inf])


@on_fp8_gpu
@pytest.mark.parametrize("out_scale", OUT_SCALES)
def test_gelu_of_every_half_in_e4m3(out_scale):
    """What is beyond 448 is 448, infinity too, and NaN is NaN."""
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32, device=DEVICE).short()
    x = every.view(torch.half).view(1024, 64)
    gelu(torch.where(x.isfinite(), x, 0), out_scale=out_scale)
    out, sizes = torch.empty_like(x, dtype=E4M3), {"rows": 1024, "width": 64}
    kernels.launch("bias_gelu", x.device, **{"in": x}, out=out, out_scale=out_scale, **sizes)
    exact, out = x.float() * torch.sigmoid(1.702 * x.float()) / out_scale, out.float()
    assert torch.equal(out.isnan(), exact.isnan()) and (out[exact > LARGEST] == LARGEST).all()


@on_fp8_gpu
def test_a_nan_stays_in_its_row_or_head_and_outliers_are_448():
    x, norm = randn(50, 768).half(), {"scale": torch.ones(768, device=DEVICE), "width": 768,
                                      "shift": torch.zeros(768, device=DEVICE), "rows": 50}
    x[7, 3], x[9, 5], x[11, 6] = torch.nan, 6e4, -6e4
    out = torch.empty_like(x, dtype=E4M3)
    kernels.launch("residual_layer_norm", x.device, x=x, out=out, epsilon=EPSILON, out_scale=0.01,
                   **norm)  # fmt: skip
    out = out.float()
    assert out[7].isnan().all() and not out[torch.arange(50) != 7].isnan().any()
    assert (out[9, 5], out[11, 6]) == (LARGEST, -LARGEST)
    for tokens in (50, 77, 257):
        qkv = randn(2, tokens, 3 * 128).half()
        qkv[0, 5, 256 + 64], qkv[1, :, 256 + 3], qkv[1, :, 256 + 9] = torch.nan, 6e4, -6e4
        out = kernels.attention(qkv, 2, False, out_scale=0.01).float()
        where = torch.zeros_like(out, dtype=torch.bool)
        where[0, :, 64] = True
        assert torch.equal(out.isnan(), where)
        assert (out[1, :, 3] == LARGEST).all() and (out[1, :, 9] == -LARGEST).all()


@on_gpu
@pytest.mark.skipif(
    torch.cuda.is_available() and torch.cuda.get_device_capability() >= linear.FP8_CAPABILITY,
    reason="needs a GPU older than capability 8.9")
def test_older_gpus_refuse_e4m3():
    qkv, x = randn(1, 50, 3 * 64).half(), randn(50, 64).half()
    sizes = {"rows": 50, "width": 64, "out_scale": 0.1}
    with pytest.raises(RuntimeError, match="CUDA error 801"):
        kernels.attention(qkv, 1, False, out_scale=0.1)
    with pytest.raises(RuntimeError, match="CUDA error 801"):
        kernels.launch("bias_gelu", x.device, **{"in": x}, out=x.to(E4M3), **sizes)


@on_gpu
def test_layer_norm_far_from_zero_and_of_equal_values():
    """The variance is that of centred values: the mean does not eat its digits."""
    x, delta = randn(2, 33, 768).half()
    layer_norm(x + 500, delta, randn(768))
    layer_norm(torch.full_like(x, 1000))


# Linear layers


def linear_layer(table, x, weight, bias):
    """A result is rounded once; with a bias twice, since some algorithms add it in fp16.

    fp32 sums of K terms err like a random walk of sqrt(K) steps of 2^-23 of their size at most:
    tensor cores cut digits off.
    """
    product, terms = x.double() @ weight.double().T, x.double().abs() @ weight.double().abs().T
    exact = product if bias is None else product + bias.double()
    sums = x.shape[1] ** 0.5 * 2**-23 * terms
    allowed = 2**-11 * (exact.abs() + sums) + 2**-25 + sums
    if bias is not None:
        allowed = allowed + 1.001 * (2**-11 * (product.abs() + sums) + 2**-25)
    workspace = torch.full((linear.WORKSPACE_BYTES,), 255, dtype=torch.uint8, device=DEVICE)
    check("linear", {"out": exact.shape}, lambda out: [(out, exact, allowed)], x=x, weight=weight,
          bias=bias, layer=linear._layer(table).pointer, workspace=workspace, rows=x.shape[0])


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
    for rows in (1, 2, 7, 50, 77, 788, 1600, 8224):
        linear_layer(table, *tensors(rows, outputs, inputs, bias))


def quantized_layer(x, weight, bias, scale, table=None):
    """Of E4M3, against the product of what it holds.

    Products of E4M3 are exact.  sm_90 adds 32 of them at a time to a running sum and keeps what is
    above 2^-13 of the largest, cutting the rest off: a running sum of K random terms, which stays
    below 6 times the root of their squares' sum, loses so much at most in each of K / 32 steps.
    The products' parts that are cut off have either sign, and add up like a random walk.
    """
    product = scale * (x.double() @ weight.double().T)
    root = scale * (x.double() ** 2 @ (weight.double() ** 2).T).sqrt()
    exact = product if bias is None else product + bias.double()
    inputs = x.shape[1]
    sums = 6 * root * 2**-13 * (inputs / 32 + inputs**0.5)
    allowed = 2**-11 * (exact.abs() + sums) + 2**-25 + sums
    if bias is not None:
        allowed = allowed + 1.001 * (2**-11 * (product.abs() + sums) + 2**-25)
    table = table or linear.pack(*weight.shape, bias is not None, scale=1.0)
    workspace = torch.full((linear.WORKSPACE_BYTES,), 255, dtype=torch.uint8, device=DEVICE)
    layer = linear._layer(linear.with_scale(table, scale)).pointer
    check("linear", {"out": exact.shape}, lambda out: [(out, exact, allowed)], x=x, weight=weight,
          bias=bias, layer=layer, workspace=workspace, rows=x.shape[0])


def quantized_tensors(rows, outputs, inputs, bias):
    """x, weight, bias and scale of a layer whose sums are of order 1, from subnormals to 448."""
    x, weight = (randn(size, inputs, scale=100).clamp(-LARGEST, LARGEST).to(E4M3)
                 for size in (rows, outputs))  # fmt: skip
    return x, weight, randn(outputs).half() if bias else None, 1e-4 * inputs**-0.5


@on_fp8_gpu
@pytest.mark.parametrize("measured", [False, True], ids=["suggested", "measured"])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("outputs, inputs", [
    (outputs * width, inputs * width) for width in (512, 768, 1024)
    for outputs, inputs in ((3, 1), (1, 1), (4, 1), (1, 4))])
def test_linear_in_e4m3(outputs, inputs, bias, measured):
    table = linear.tune([1600, 1], (outputs, inputs), bias, True) if measured else None
    for rows in (1, 2, 7, 50, 77, 788, 1600, 8192):
        quantized_layer(*quantized_tensors(rows, outputs, inputs, bias), table)


@on_fp8_gpu
def test_linear_takes_e4m3_with_a_scale():
    x, weight, bias, scale = quantized_tensors(24, 64, 128, True)
    table = linear.tune([24], (64, 128), True, quantized=True)
    out = linear.linear(x.view(2, 12, 128), weight, bias, table, scale)
    assert (out.shape, out.dtype) == ((2, 12, 64), torch.half)
    assert torch.equal(out.view(24, 64), linear.linear(x, weight, bias, table, scale))
    once, twice = (linear.linear(x, weight, scale=times * scale) for times in (1000, 2000))
    assert torch.equal(2 * once, twice)
    fp16 = linear.pack(64, 128, True)
    for arguments, match in (
        ((x.half(), weight, bias, None, scale), "x must be torch.float8_e4m3fn"),
        ((x, weight, bias), "weight must be torch.float16"),
        ((x, weight, bias, fp16, scale), "are no table of this linear layer"),
        ((x.half(), weight.half(), bias, table), "are no table of this linear layer"),
    ):
        with pytest.raises(ValueError, match=match):
            linear.linear(*arguments)


@on_gpu
def test_measured_algorithms_are_of_one_cublaslt():
    x, weight, _ = tensors(50, 768, 768, False)
    entry = linear.Entry(50, (ctypes.c_uint64 * 8)(*[2**64 - 1] * 8))
    nonsense = linear.pack(768, 768, False, [entry], linear.version() + 1)
    assert torch.equal(linear.linear(x, weight, table=nonsense), linear.linear(x, weight))


@on_gpu
def test_linear_of_any_shape_layout_and_alignment():
    x, weight, bias = tensors(24, 64, 128, True)
    expected = linear.linear(x, weight, bias)
    turned = [one.T.contiguous().T for one in (x, weight)]
    misaligned = torch.cat([bias[:1], bias])[1:]
    assert torch.equal(linear.linear(*turned, misaligned), expected)
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
    expected = {rows: linear.linear(x[:rows], weight, bias) for rows in range(1, 320, 20)}
    linear._layer.cache_clear()

    def right(_):
        with torch.cuda.stream(torch.cuda.Stream()):
            return all(torch.equal(linear.linear(x[:rows], weight, bias), expected[rows])
                       for rows in [*expected] * 5)

    torch.cuda.synchronize()
    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(right, range(4)))
