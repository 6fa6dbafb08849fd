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


def test_attention_on_rows_is_attention():
    qkv = torch.randn(3, 7, 384)
    assert torch.equal(ops.attention_rows(qkv.view(21, 384), 7, 2, True), ops.attention(qkv, 2, True).view(21, 128))


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


def test_quick_gelu_and_that_with_a_bias():
    x, bias = 4 * torch.randn(3, 7, dtype=torch.float64), torch.randn(7, dtype=torch.float64)
    expected = x / (1 + (-1.702 * x).exp())
    assert torch.allclose(ops.quick_gelu(x), expected, atol=1e-14)
    assert torch.allclose(ops.bias_quick_gelu(x - bias, bias), expected, atol=1e-13)


def test_what_is_only_a_mark_changes_nothing():
    x, scale, shift = torch.randn(3, 8), torch.randn(8), torch.randn(8)
    capped = ops.row_capped(x)
    assert torch.equal(capped, x) and capped.data_ptr() != x.data_ptr()  # an operation may not return its input
    assert torch.equal(ops.layer_norm_apart(x, scale, shift, 1e-3), torch.nn.functional.layer_norm(x, (8,), scale, shift, 1e-3))


def test_fakes_give_the_shapes_of_the_references():
    qkv, tokens = torch.randn(2, 5, 384), torch.zeros(2, 5, dtype=torch.int32)
    images = torch.randn(2, 3, 8, 8)
    calls = [(ops.attention, (qkv, 2, False)), (ops.attention_rows, (qkv.view(10, 384), 5, 2, False)), (ops.extract_patches, (images, 4)),
             (ops.prepend_class_token, (qkv, torch.randn(384))), (ops.quick_gelu, (qkv,)), (ops.row_capped, (qkv,)),
             (ops.layer_norm_apart, (qkv, torch.randn(384), torch.randn(384), 1e-5)), (ops.pool_end_of_text, (qkv, tokens))]
    for op, arguments in calls:
        real = op(*arguments)
        with FakeTensorMode() as mode:
            fake = op(*(mode.from_tensor(value) if isinstance(value, torch.Tensor) else value for value in arguments))
        assert fake.shape == real.shape and fake.dtype == real.dtype
