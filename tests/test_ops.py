"""The fused ops' references against arithmetic written out in float64, and their shapes."""
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from clip_ttrt import ops


def attention_in_float64(qkv, heads, causal):
    batch, tokens, width = qkv.shape[0], qkv.shape[1], qkv.shape[2] // 3
    query, key, value = qkv.double().split(width, dim=2)
    out = torch.empty(batch, tokens, width, dtype=torch.float64)
    for head in range(heads):
        columns = slice(64 * head, 64 * head + 64)
        scores = query[..., columns] @ key[..., columns].transpose(1, 2) / 8
        if causal:
            scores = scores.masked_fill(torch.ones(tokens, tokens).triu(1).bool(), -torch.inf)
        out[..., columns] = scores.softmax(dim=-1) @ value[..., columns]
    return out


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("tokens", [1, 2, 50, 77])
@pytest.mark.parametrize("heads", [1, 3])
def test_attention(heads, tokens, causal):
    torch.manual_seed(0)
    qkv = torch.randn(2, tokens, 3 * heads * 64)
    actual = ops.attention(qkv, heads, causal)
    assert actual.shape == (2, tokens, heads * 64) and actual.is_contiguous()
    assert (actual - attention_in_float64(qkv, heads, causal)).abs().max() < 1e-5


def test_attention_with_a_bias_of_the_queries_alone():
    qkv, bias = torch.randn(3, 7, 384), torch.randn(128)
    moved = qkv.clone()
    moved[..., :128] += bias
    assert torch.allclose(ops.fused_attention(qkv, 2, True, bias), ops.attention(moved, 2, True), atol=1e-5)
    assert torch.equal(ops.fused_attention(qkv, 2, True), ops.attention(qkv, 2, True))


@pytest.mark.parametrize("size", [2, 4])
def test_patches_times_a_weight_are_a_convolution(size):
    images, convolution = torch.randn(2, 3, 8, 8), torch.nn.Conv2d(3, 5, size, stride=size, bias=False)
    expected = convolution(images).flatten(2).transpose(1, 2)
    actual = ops.extract_patches(images, size) @ convolution.weight.flatten(1).T
    assert torch.allclose(actual, expected, atol=1e-6)


def test_prepend_class_token():
    patches, token = torch.randn(3, 4, 8), torch.randn(8)
    out = ops.prepend_class_token(patches, token)
    assert torch.equal(out[:, 1:], patches)
    assert all(torch.equal(row, token) for row in out[:, 0])


def test_pool_end_of_text_takes_the_first_of_equal_highest_tokens():
    x = torch.randn(3, 5, 8)
    tokens = torch.tensor([[49406, 7, 49407, 0, 0], [49406, 49407, 49407, 49407, 0], [3, 9, 2, 1, 9]], dtype=torch.int32)
    out = ops.pool_end_of_text(x, tokens)
    assert torch.equal(out, torch.stack([x[0, 2], x[1, 1], x[2, 1]]))


def test_a_row_with_an_id_outside_the_vocabulary_is_nan_and_no_other():
    tokens = torch.tensor([[0, 99], [100, 5], [5, -1], [2**31 - 1, 0], [0, -2**31], [98, 1]], dtype=torch.int32)
    clamped = ops.clamp_tokens(tokens, 100)
    assert clamped.dtype == torch.int32 and clamped.tolist() == [[0, 99], [99, 5], [5, 0], [99, 0], [0, 0], [98, 1]]
    features = torch.randn(6, 8)
    masked = ops.mask_unknown(features, tokens, clamped)
    assert masked[1:5].isnan().all() and torch.equal(masked[[0, 5]], features[[0, 5]])


def test_quick_gelu_and_that_with_a_bias():
    x, bias = 4 * torch.randn(3, 7, dtype=torch.float64), torch.randn(7, dtype=torch.float64)
    expected = x / (1 + (-1.702 * x).exp())
    assert torch.allclose(ops.quick_gelu(x), expected, atol=1e-14)
    assert torch.allclose(ops.bias_quick_gelu(x - bias, bias), expected, atol=1e-13)


def test_what_pytorch_has_is_what_it_is_mapped_to():
    x, weight, bias = torch.randn(2, 5, 8), torch.randn(6, 8), torch.randn(6)
    assert torch.equal(ops.linear(x, weight, bias), torch.nn.functional.linear(x, weight, bias))
    assert torch.equal(ops.fused_linear(x, weight, None), torch.nn.functional.linear(x, weight))
    normed = (x - x.mean(-1, keepdim=True)) / (x.var(-1, correction=0, keepdim=True) + 1e-3).sqrt()
    for op in (ops.layer_norm, ops.fused_layer_norm):
        assert torch.allclose(op(x, weight[0], weight[1], 1e-3), normed * weight[0] + weight[1], atol=1e-5)
    tokens = torch.tensor([[5, 0], [2, 2]], dtype=torch.int32)
    assert torch.equal(ops.embedding(weight, tokens)[1, 0], weight[2])
    assert torch.equal(ops.select_token(x, 3), x[:, 3])
    assert torch.equal(ops.split_tokens(x.flatten(0, 1), 5), x)
    assert torch.equal(ops.add(x, weight[0]), x + weight[0])
    for dtype in (torch.half, torch.float):
        cast = ops.cast(x, dtype)
        assert torch.equal(cast, x.to(dtype)) and cast.data_ptr() != x.data_ptr()  # an operation may not return its input


def test_a_sum_and_its_layer_norm():
    x, delta, bias, scale, shift = (torch.randn(*shape) for shape in ((3, 8), (3, 8), (8,), (8,), (8,)))
    total, normed = ops.residual_layer_norm(x, delta, bias, scale, shift, 1e-3)
    assert torch.allclose(total, x + delta + bias, atol=1e-6)
    assert torch.allclose(normed, ops.layer_norm(total, scale, shift, 1e-3), atol=1e-6)


def test_an_image_s_first_rows():
    patches, token, positions = torch.randn(6, 8), torch.randn(8), torch.randn(4, 8)
    scale, shift, scale_1, shift_1 = torch.randn(4, 8)
    x, y = ops.embed_image(patches, token, positions, scale, shift, 1e-3, scale_1, shift_1, 1e-2)
    expected = ops.layer_norm(torch.cat([token[None], patches[3:]]) + positions, scale, shift, 1e-3)
    assert torch.allclose(x[4:], expected, atol=1e-6)
    assert torch.allclose(y[4:], ops.layer_norm(expected, scale_1, shift_1, 1e-2), atol=1e-5)


def test_fakes_give_the_shapes_of_the_references():
    qkv, tokens, images = torch.randn(2, 5, 384), torch.zeros(2, 5, dtype=torch.int32), torch.randn(2, 3, 8, 8)
    wide, weight, positions = torch.randn(384), torch.randn(16, 384), torch.randn(6, 384)
    calls = {
        ops.attention: (qkv, 2, False), ops.fused_attention: (qkv, 2, False, torch.randn(128)), ops.quick_gelu: (qkv,),
        ops.extract_patches: (images, 4), ops.extract_patch_rows: (images, 4, torch.half), ops.prepend_class_token: (qkv, wide),
        ops.pool_end_of_text: (qkv, tokens), ops.cast: (qkv, torch.half), ops.linear: (qkv, weight, None),
        ops.fused_linear: (qkv, weight, torch.randn(16), ""), ops.layer_norm: (qkv, wide, wide, 1e-5),
        ops.fused_layer_norm: (qkv, wide, wide, 1e-5), ops.add: (qkv, positions[:5]), ops.embedding: (weight, tokens),
        ops.select_token: (qkv, 0), ops.bias_quick_gelu: (qkv, wide), ops.residual_layer_norm: (qkv, qkv, wide, wide, wide, 1e-5),
        ops.embed_image: (qkv.flatten(0, 1), wide, positions, wide, wide, 1e-5, wide, wide, 1e-5),
        ops.split_tokens: (qkv.flatten(0, 1), 5), ops.clamp_tokens: (tokens, 9), ops.mask_unknown: (qkv[:, 0], tokens, tokens),
    }
    assert calls.keys() == ops.REFERENCES.keys()
    for op, arguments in calls.items():
        real = op(*arguments)
        with FakeTensorMode() as mode:
            fake = op(*(mode.from_tensor(value) if isinstance(value, torch.Tensor) else value for value in arguments))
        for one, other in zip(*((value,) if isinstance(value, torch.Tensor) else value for value in (real, fake))):
            assert other.shape == one.shape and other.dtype == one.dtype, op
