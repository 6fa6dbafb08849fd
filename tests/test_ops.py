"""The ops' references against arithmetic written out in float64, and their shapes."""
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.functional import linear

from clip_ttrt import ops


def attention_in_float64(qkv, heads, causal):
    blocks = qkv.double().chunk(3, dim=2)
    query, key, value = (block.unflatten(2, (heads, 64)).transpose(1, 2) for block in blocks)
    scores = query @ key.transpose(2, 3) / 8
    if causal:
        scores = scores.masked_fill(torch.ones(scores.shape[2:]).triu(1).bool(), -torch.inf)
    return (scores.softmax(dim=-1) @ value).transpose(1, 2).flatten(2)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("tokens", [1, 2, 50, 77])
@pytest.mark.parametrize("heads", [1, 3])
def test_attention_and_that_with_a_bias_of_the_queries_alone(heads, tokens, causal):
    torch.manual_seed(0)
    qkv, bias = torch.randn(2, tokens, 3 * heads * 64), torch.randn(heads * 64)
    actual = ops.attention(qkv, heads, causal)
    assert actual.shape == (2, tokens, heads * 64) and actual.is_contiguous()
    assert (actual - attention_in_float64(qkv, heads, causal)).abs().max() < 1e-5
    fused = ops.fused_attention(qkv, heads, causal, bias)
    qkv[..., : heads * 64] += bias
    assert torch.allclose(fused, ops.fused_attention(qkv, heads, causal), atol=1e-5)


@pytest.mark.parametrize("size", [2, 4])
def test_patches_times_a_weight_are_a_convolution(size):
    convolution = torch.nn.Conv2d(3, 5, size, stride=size, bias=False)
    images, weight = torch.randn(2, 3, 8, 8), convolution.weight.flatten(1).T
    expected = convolution(images).flatten(2).transpose(1, 2)
    assert torch.allclose(ops.extract_patches(images, size) @ weight, expected, atol=1e-6)
    rows = ops.extract_patch_rows(images, size, torch.half)
    assert torch.equal(rows, ops.extract_patches(images.half(), size).flatten(0, 1))


def test_pool_end_of_text_takes_the_first_of_equal_highest_tokens():
    x, end = torch.randn(3, 5, 8), 49407
    tokens = [[49406, 7, end, 0, 0], [49406, end, end, end, 0], [3, 9, 2, 1, 9]]
    out = ops.pool_end_of_text(x, torch.tensor(tokens, dtype=torch.int32))
    assert torch.equal(out, torch.stack([x[0, 2], x[1, 1], x[2, 1]]))


def test_a_row_with_an_id_outside_the_vocabulary_is_nan_and_no_other():
    ids = [[0, 99], [100, 5], [5, -1], [2**31 - 1, 0], [0, -(2**31)], [98, 1]]
    tokens, features = torch.tensor(ids, dtype=torch.int32), torch.randn(6, 8)
    clamped = ops.clamp_tokens(tokens, 100)
    assert clamped.dtype == torch.int32
    assert clamped.tolist() == [[0, 99], [99, 5], [5, 0], [99, 0], [0, 0], [98, 1]]
    masked = ops.mask_unknown(features, tokens, clamped)
    assert masked[1:5].isnan().all() and torch.equal(masked[[0, 5]], features[[0, 5]])


@pytest.mark.parametrize("side", [1, 3])
def test_attention_pool_is_attention_of_one_query_over_all_projected_tokens(side):
    torch.manual_seed(0)
    x, positions = torch.randn(4, 128, side, side), torch.randn(side * side + 1, 128)
    query, key, value = (torch.nn.Linear(128, 128).requires_grad_(False) for _ in range(3))
    actual = ops.attention_pool(x, positions, query.weight, query.bias, key.weight, value.weight)
    tokens = x.double().flatten(2).transpose(1, 2)
    tokens = torch.cat([tokens.mean(1, keepdim=True), tokens], 1) + positions
    for layer in (query, key, value):
        layer.double()
    qkv = torch.cat([query(tokens), key(tokens), value(tokens)], 2)  # with the biases, as clip has
    expected = attention_in_float64(qkv, 2, False)[:, 0] - value.bias
    assert actual.shape == (4, 128) and (actual - expected).abs().max() < 1e-5
    low = [each.bfloat16() for each in (positions, query.weight, query.bias, key.weight,
                                        value.weight)]
    assert (ops.attention_pool(x.bfloat16(), *low) - expected).abs().max() < 0.05


def test_gelu_and_that_with_a_bias():
    x, bias = 4 * torch.randn(3, 7, dtype=torch.float64), torch.randn(7, dtype=torch.float64)
    expected = x / (1 + (-1.702 * x).exp())
    assert torch.allclose(ops.gelu(x, "quick"), expected, atol=1e-14)
    assert torch.allclose(ops.bias_gelu(x - bias, bias, "quick"), expected, atol=1e-13)
    exact = x / 2 * (1 + torch.erf(x / 2 ** 0.5))
    assert torch.allclose(ops.gelu(x, "none"), exact, atol=1e-14)
    by_tanh = x / 2 * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (x + 0.044715 * x ** 3)))
    assert torch.allclose(ops.bias_gelu(x - bias, bias, "tanh"), by_tanh, atol=1e-13)
    assert 1e-5 < (by_tanh - exact).abs().max() < 1e-3 < (expected - exact).abs().max()


def test_what_pytorch_s_operations_are_mapped_to():
    x, weight, bias, (scale, shift) = map(torch.randn, ((2, 5, 8), (6, 8), (6,), (2, 8)))
    assert torch.equal(ops.linear(x, weight, bias), linear(x, weight, bias))
    assert torch.equal(ops.fused_linear(x, weight, None), linear(x, weight))
    centred = x - x.mean(-1, keepdim=True)
    normed = centred / (centred.square().mean(-1, keepdim=True) + 1e-3).sqrt() * scale + shift
    for op in (ops.layer_norm, ops.fused_layer_norm):
        assert torch.allclose(op(x, scale, shift, 1e-3), normed, atol=1e-5)
    total, fused = ops.residual_layer_norm(x, x, x[0, 0], scale, shift, 1e-3)
    assert torch.allclose(total, x + x + x[0, 0], atol=1e-6)
    assert torch.allclose(fused, ops.layer_norm(total, scale, shift, 1e-3), atol=1e-6)
    tokens = torch.tensor([[5, 0], [2, 2]], dtype=torch.int32)
    assert torch.equal(ops.embedding(weight, tokens)[1, 0], weight[2])
    assert torch.equal(ops.select_token(x, 3), x[:, 3])
    assert torch.equal(ops.split_tokens(x.flatten(0, 1), 5), x)
    assert torch.equal(ops.add(x, weight[0]), x + weight[0])
    images, kernel = torch.randn(2, 3, 8, 8), torch.randn(6, 3, 2, 2)
    patches = ops.extract_patches(images, 2) @ kernel.flatten(1).T + bias
    convolved = torch.nn.functional.conv2d(images, kernel, bias, 2).flatten(2).transpose(1, 2)
    assert torch.allclose(convolved, patches, atol=1e-5)
    for dtype in (torch.half, torch.float):
        cast = ops.cast(x, dtype)  # an operation may not return its input
        assert torch.equal(cast, x.to(dtype)) and cast.data_ptr() != x.data_ptr()


def test_an_image_s_first_rows():
    patches, token, positions, norms = map(torch.randn, ((6, 8), (8,), (4, 8), (4, 8)))
    x, y = ops.embed_image(patches, token, positions, *norms[:2], 1e-3, *norms[2:], 1e-2)
    rows = torch.cat([token[None], patches[3:]])
    assert torch.equal(ops.prepend_class_token(patches[None, 3:], token)[0], rows)
    expected = ops.layer_norm(rows + positions, *norms[:2], 1e-3)
    assert torch.allclose(x[4:], expected, atol=1e-6)
    assert torch.allclose(y[4:], ops.layer_norm(expected, *norms[2:], 1e-2), atol=1e-5)


def test_attention_s_fake_tensors_have_its_shape_and_type():
    qkv = torch.randn(2, 5, 384)
    with FakeTensorMode() as mode:
        fake = mode.from_tensor(qkv)
        found = ops.attention(fake, 2, False), ops.fused_attention(fake, 2, True)
    assert all((one.shape, one.dtype) == ((2, 5, 128), qkv.dtype) for one in found)
