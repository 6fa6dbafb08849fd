"""Operations of our own, `torch.ops.clip_ttrt.*`: places that a backend implements as one piece.

TensorRT does it through a converter (`converters.py`), in its own layers or as a plugin,
TorchScript through the reference, which is differentiable PyTorch.  Encoders call the first ones
and `cast`; `graph.py` maps PyTorch's operations to the next ones, and puts the fused ones in the
place of several where the plugins serve.

In fp8 a tensor is E4M3 times a scale.  An `out_scale` makes a result, the last of two, E4M3.
"""
from types import SimpleNamespace
from typing import Any, Optional

import torch
import torch.nn.functional as F
from torch import Tensor

from clip_ttrt import kernels
from clip_ttrt.models import HEAD_DIM

QUICK_GELU_SLOPE = 1.702
E4M3, E4M3_MAX = torch.float8_e4m3fn, 448.0
_library = torch.library.Library("clip_ttrt", "DEF")
REFERENCES = {}  # op -> its reference


def _op(reference, fake=None, name=None):
    """The op of a reference: its name and signature, and its shapes where no `fake` tells them."""
    name = name or reference.__name__.removesuffix("_reference")
    schema = torch.library.infer_schema(reference, mutates_args=(), op_name=name)
    _library.define(schema.replace("SymInt", "int"))
    _library.impl(name, reference, "CompositeExplicitAutograd")
    torch.library.register_fake(f"clip_ttrt::{name}", fake or reference, lib=_library)
    op = getattr(torch.ops.clip_ttrt, name).default
    REFERENCES[op] = reference
    return op


def to_e4m3(x: Tensor, scale: Optional[float]) -> Tensor:
    """x / scale in E4M3, saturated at 448, where NaN stays NaN; x itself without a scale."""
    if scale is None:
        return x
    return (x.float() / scale).clamp(-E4M3_MAX, E4M3_MAX).to(E4M3)


# What encoders call


def attention_reference(qkv: Tensor, heads: int, causal: bool) -> Tensor:
    """Multi-head self-attention on packed projections, with head dimension D.

    qkv: [B, T, 3·W] with W = heads·D, the query, key and value blocks one after the other, as
    one linear layer writes them.  Returns [B, T, W] in qkv's dtype.  Scores are scaled by
    1/sqrt(D); `causal` lets token t see tokens 0..t only.
    """
    query, key, value = qkv.unflatten(2, (3, heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
    attended = F.scaled_dot_product_attention(query, key, value, is_causal=causal)
    return attended.transpose(1, 2).flatten(2)


def gelu_reference(x: Tensor, approximate: str) -> Tensor:
    """GELU, elementwise: [..., N] -> [..., N].

    approximate: `quick`, OpenAI's x·sigmoid(1.702·x), or as of PyTorch's `gelu`, `tanh` or `none`.
    """
    if approximate == "quick":
        return x * torch.sigmoid(QUICK_GELU_SLOPE * x)
    return F.gelu(x, approximate=approximate)


def extract_patches_reference(images: Tensor, size: int) -> Tensor:
    """Cut images into whole patches: [B, C, R, R] -> [B, (R/size)², C·size²].

    Values are in the order of a convolution's weight: a convolution whose stride is its kernel is
    then one matrix product with that weight.
    """
    # In a trace on a GPU the quotient of two sizes would be a tensor there, and waited for.
    cut = images.unfold(2, size, size).unfold(3, size, size)
    return cut.permute(0, 2, 3, 1, 4, 5).flatten(3).flatten(1, 2)


def prepend_class_token_reference(patches: Tensor, class_token: Tensor) -> Tensor:
    """Put the class token before the patches: [B, N, W] and [W] -> [B, N + 1, W]."""
    return torch.cat([class_token.to(patches.dtype).expand(patches.shape[0], 1, -1), patches], 1)


def pool_end_of_text_reference(x: Tensor, tokens: Tensor) -> Tensor:
    """Each text's row at its end-of-text token: [B, T, W] and int [B, T] -> [B, W].

    End of text is the first position of the highest token id in the row, as in OpenAI's
    `encode_text` (`text.argmax(dim=-1)`; the end-of-text id is the highest of the vocabulary).
    """
    if x.dtype == E4M3:  # which PyTorch does not gather
        return pool_end_of_text_reference(x.view(torch.int8), tokens).view(E4M3)
    position = tokens.argmax(dim=-1)
    return x.gather(1, position.view(-1, 1, 1).expand(-1, 1, x.shape[2])).squeeze(1)


def clamp_tokens_reference(tokens: Tensor, vocabulary: int) -> Tensor:
    """Token ids moved into a vocabulary, 0 to vocabulary - 1: int [B, T] -> int [B, T]."""
    return tokens.clamp(0, vocabulary - 1)


def positions_of_reference(positions: Tensor, tokens: Tensor) -> Tensor:
    """The embeddings of texts' places: [L, W] and int [B, T] with T <= L -> [1, T, W]."""
    return positions[None, :tokens.shape[1]].clone()


def mask_unknown_reference(features: Tensor, tokens: Tensor, clamped: Tensor) -> Tensor:
    """Features, NaN in rows where clamping changed a token: [B, E], two int [B, T] -> [B, E]."""
    unknown = (tokens != clamped).any(dim=1, keepdim=True)
    return features.masked_fill(unknown, float("nan"))


def mean_of_patches_reference(x: Tensor) -> Tensor:
    """The mean of all tokens but the first, which is the class token's: [B, T, W] -> [B, W]."""
    return x[:, 1:].mean(1)


def attention_pool_reference(
    x: Tensor, positions: Tensor, query_weight: Tensor, query_bias: Tensor, key_weight: Tensor,
    value_weight: Tensor
) -> Tensor:
    """Attention of the mean token over all, with head dimension 64: [B, C, S, S] -> [B, C].

    The S² tokens follow their mean, and positions [S² + 1, C] are added.  No token is projected:
    a head's query goes back through the keys' weight, the tokens' weighted sum through the values'.
    A bias of keys would add the same to all scores; one of values is the caller's, since scores'
    softmax sums up to 1.  Weights [C, C] are in x's dtype; tokens, scores and sums in fp32.
    """
    wide = torch.promote_types(x.dtype, torch.float)
    tokens = x.to(wide).flatten(2).transpose(1, 2)
    tokens = torch.cat([tokens.mean(1, keepdim=True), tokens], 1) + positions.to(wide)
    query = F.linear(tokens[:, 0].to(x.dtype), query_weight, query_bias) * HEAD_DIM ** -0.5
    of_heads = (-1, HEAD_DIM)
    sought = query.unflatten(1, of_heads).transpose(0, 1) @ key_weight.unflatten(0, of_heads)
    return _attend(sought.transpose(0, 1).to(wide), tokens, value_weight)


def attention_probe_reference(x: Tensor, sought: Tensor, value_weight: Tensor) -> Tensor:
    """Attention of one query, the same for every sample, over all tokens: [B, T, W] -> [B, W].

    sought: [H, W], each head's query times its keys' weight, scaled.  Biases, dtypes and weights
    [W, W] are as of `attention_pool`.
    """
    wide = torch.promote_types(x.dtype, torch.float)
    return _attend(sought.to(wide), x.to(wide), value_weight)


def _attend(sought: Tensor, tokens: Tensor, value_weight: Tensor) -> Tensor:
    """Values of what each head seeks, [.., H, W] in fp32, in tokens [B, T, W]: -> [B, W]."""
    scores = sought @ tokens.transpose(1, 2)
    pooled = (scores.softmax(-1) @ tokens).to(value_weight.dtype).transpose(0, 1)
    values = pooled @ value_weight.unflatten(0, (sought.shape[-2], -1)).transpose(1, 2)
    return values.transpose(0, 1).flatten(1)


# What PyTorch's own operations are mapped to


def cast_reference(x: Tensor, dtype: torch.dtype) -> Tensor:
    """x in another dtype, always a new tensor."""
    return x.to(dtype, copy=True)


def linear_reference(x: Tensor, weight: Tensor, bias: Optional[Tensor]) -> Tensor:
    """x·weightᵀ + bias: [..., K] and [N, K] and [N] or None -> [..., N]."""
    return F.linear(x, weight, bias)


def layer_norm_reference(
    x: Tensor, scale: Tensor, shift: Tensor, epsilon: float, out_scale: Optional[float] = None
) -> Tensor:
    """Layer norm over the last axis, in fp32 inside: [..., W] and two [W] -> [..., W]."""
    return to_e4m3(F.layer_norm(x, x.shape[-1:], scale, shift, epsilon), out_scale)


def quantized_linear_reference(
    x: Tensor, weight: Tensor, bias: Optional[Tensor], x_scale: float, weight_scale: float
) -> Tensor:
    """`linear` with an E4M3 weight, and x quantised on the way: summed in fp32, in x's dtype."""
    product = F.linear(to_e4m3(x, x_scale).float(), weight.float()) * (x_scale * weight_scale)
    return (product if bias is None else product + bias).to(x.dtype)


def add_reference(a: Tensor, b: Tensor) -> Tensor:
    """a + b, of shapes that broadcast."""
    return a + b


def embedding_reference(weight: Tensor, tokens: Tensor) -> Tensor:
    """Rows of a table: [V, W] and int [B, T] -> [B, T, W]."""
    return F.embedding(tokens, weight)


def select_token_reference(x: Tensor, index: int) -> Tensor:
    """One token's row: [B, T, W] -> [B, W]."""
    return x.select(1, index).clone()


# What the plugins do in one piece


def fused_attention_reference(
    qkv: Tensor, heads: int, causal: bool, query_bias: Optional[Tensor] = None,
    out_scale: Optional[float] = None
) -> Tensor:
    """`attention` with query_bias [W] added to the queries."""
    if query_bias is not None:
        qkv = qkv + F.pad(query_bias, (0, 2 * len(query_bias))).to(qkv.dtype)
    return to_e4m3(attention_reference(qkv, heads, causal), out_scale)


def fused_linear_reference(
    x: Tensor, weight: Tensor, bias: Optional[Tensor], table: str = ""
) -> Tensor:
    """`linear`; table: the hexadecimal digits of what `linear.tune` measured, or nothing."""
    return F.linear(x, weight, bias)


def fused_quantized_linear_reference(
    x: Tensor, weight: Tensor, bias: Optional[Tensor], scale: float, table: str = ""
) -> Tensor:
    """`fused_linear` of E4M3 x and weight, whose scales' product is `scale`, to fp16."""
    product = F.linear(x.float(), weight.float()) * scale
    return (product if bias is None else product + bias).half()


def bias_gelu_reference(x: Tensor, bias: Tensor, approximate: str,
                        out_scale: Optional[float] = None) -> Tensor:
    """`gelu` of x + bias: [..., N] and [N] -> [..., N]."""
    return to_e4m3(gelu_reference(x + bias, approximate), out_scale)


def residual_layer_norm_reference(
    x: Tensor, delta: Tensor, bias: Tensor, scale: Tensor, shift: Tensor, epsilon: float,
    out_scale: Optional[float] = None
) -> tuple[Tensor, Tensor]:
    """The sum x + delta + bias and its layer norm: two [..., W], three [W] -> two [..., W]."""
    total = x + (delta + bias)
    return total, layer_norm_reference(total, scale, shift, epsilon, out_scale)


def extract_patch_rows_reference(images: Tensor, size: int, dtype: torch.dtype) -> Tensor:
    """`extract_patches` as rows, in a dtype: [B, C, R, R] -> [B·(R/size)², C·size²]."""
    return extract_patches_reference(images.to(dtype), size).flatten(0, 1)


def embed_image_reference(
    patches: Tensor, class_token: Tensor, positions: Tensor, scale_pre: Tensor, shift_pre: Tensor,
    epsilon_pre: float, scale_1: Tensor, shift_1: Tensor, epsilon_1: float,
    out_scale: Optional[float] = None
) -> tuple[Tensor, Tensor]:
    """From projected patches to the first block: rows [B·N, W] -> two of rows [B·(N + 1), W].

    The first is the layer norm of class token and patches plus positions [N + 1, W], the second
    the first block's layer norm of that.
    """
    patches = patches.reshape(-1, positions.shape[0] - 1, patches.shape[1])
    x = prepend_class_token_reference(patches, class_token) + positions
    x = layer_norm_reference(x, scale_pre, shift_pre, epsilon_pre).flatten(0, 1)
    return x, layer_norm_reference(x, scale_1, shift_1, epsilon_1, out_scale)


def split_tokens_reference(x: Tensor, tokens: int) -> Tensor:
    """Rows as the tokens of samples: [B·T, W] -> [B, T, W] with T = tokens."""
    return x.reshape(-1, tokens, x.shape[1]).clone()


def _attention_fake(qkv, heads, causal, query_bias=None, out_scale=None):
    """Of shapes alone: PyTorch would look at a batch to choose its attention, and so fix it."""
    shape = qkv.shape[0], qkv.shape[1], qkv.shape[2] // 3
    return qkv.new_empty(shape, dtype=E4M3 if out_scale else qkv.dtype)


def _attention_cuda(qkv, heads, causal):
    """The plugin's kernel where it serves the tensor, so that engine and eager agree."""
    serves = kernels.serves(qkv, heads)
    return (kernels.attention if serves else attention_reference)(qkv, heads, causal)


attention = _op(attention_reference, _attention_fake)
_library.impl("attention", _attention_cuda, "CUDA")
gelu = _op(gelu_reference)
extract_patches = _op(extract_patches_reference)
prepend_class_token = _op(prepend_class_token_reference)
pool_end_of_text = _op(pool_end_of_text_reference)
clamp_tokens = _op(clamp_tokens_reference)
positions_of = _op(  # of shapes alone: a slice of T rows is another at T = L
    positions_of_reference, lambda x, tokens: x.new_empty(1, tokens.shape[1], x.shape[1]))
mask_unknown = _op(mask_unknown_reference)
mean_of_patches = _op(mean_of_patches_reference)
attention_pool = _op(attention_pool_reference)
attention_probe = _op(attention_probe_reference)
cast = _op(cast_reference)
linear = _op(linear_reference)
quantized_linear = _op(quantized_linear_reference)
layer_norm = _op(layer_norm_reference)
add = _op(add_reference)
embedding = _op(embedding_reference)
select_token = _op(select_token_reference)
fused_attention = _op(fused_attention_reference, _attention_fake)
fused_linear = _op(fused_linear_reference)
fused_quantized_linear = _op(fused_quantized_linear_reference)
fused_layer_norm = _op(layer_norm_reference, name="fused_layer_norm")
bias_gelu = _op(bias_gelu_reference)
residual_layer_norm = _op(residual_layer_norm_reference)
extract_patch_rows = _op(extract_patch_rows_reference)
embed_image = _op(embed_image_reference)
split_tokens = _op(split_tokens_reference)


class Module(torch.nn.Module):
    """One that calls these operations, or for training their differentiable references."""

    called: Any = SimpleNamespace(**{op.name().split("::")[1]: op for op in REFERENCES})

    def differentiable(self) -> "Module":
        references = {op.name().split("::")[1]: called for op, called in REFERENCES.items()}
        for module in self.modules():
            module.called = SimpleNamespace(**references)
        return self

    def cast(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        return x if x.dtype == dtype else self.called.cast(x, dtype)
