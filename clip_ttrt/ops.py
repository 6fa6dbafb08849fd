"""Operations of our own: `torch.ops.clip_ttrt.*`, each a schema, a PyTorch reference and a fake.

An op marks a place that a backend implements as one piece: TensorRT through a converter
(`converters.py`), in its own layers or as a plugin, TorchScript through the reference.  Encoders
call the first seven; `graph.py` maps PyTorch's own operations to the next, and puts the last in
the place of several where the plugins serve.

The references are differentiable PyTorch; the ops themselves are for inference.
"""
from typing import Optional

import torch
import torch.nn.functional as F

from clip_ttrt import kernels
from clip_ttrt.models import HEAD_DIM

QUICK_GELU_SLOPE = 1.702

_library = torch.library.Library("clip_ttrt", "DEF")
REFERENCES = {}  # op -> its reference


def _register(schema: str, reference, fake):
    """Define an op from its schema with one implementation for every device and one for shapes."""
    name = schema.split("(")[0]
    _library.define(schema)
    _library.impl(name, reference, "CompositeExplicitAutograd")
    torch.library.register_fake(f"clip_ttrt::{name}", fake, lib=_library)
    op = getattr(torch.ops.clip_ttrt, name).default
    REFERENCES[op] = reference
    return op


def _like(x, *others):
    return torch.empty_like(x)


# What encoders call


def attention_reference(qkv: torch.Tensor, heads: int, causal: bool) -> torch.Tensor:
    """Multi-head self-attention on packed projections, with head dimension 64.

    qkv: [B, T, 3·W] with W = heads·64, the query, key and value blocks one after the other, as
    one linear layer writes them.  Returns [B, T, W] in qkv's dtype.  Scores are scaled by
    1/sqrt(64); `causal` lets token t see tokens 0..t only.
    """
    batch, tokens = qkv.shape[0], qkv.shape[1]
    split = qkv.reshape(batch, tokens, 3, heads, HEAD_DIM).permute(2, 0, 3, 1, 4)
    query, key, value = split.unbind(0)
    attended = F.scaled_dot_product_attention(query, key, value, is_causal=causal)
    return attended.transpose(1, 2).reshape(batch, tokens, heads * HEAD_DIM)


def _attention_fake(qkv, heads, causal, query_bias=None):
    return qkv.new_empty((qkv.shape[0], qkv.shape[1], heads * HEAD_DIM))


def quick_gelu_reference(x: torch.Tensor) -> torch.Tensor:
    """OpenAI's approximation of GELU, x·sigmoid(1.702·x), elementwise: [..., N] -> [..., N]."""
    return x * torch.sigmoid(QUICK_GELU_SLOPE * x)


def extract_patches_reference(images: torch.Tensor, size: int) -> torch.Tensor:
    """Cut images into patches: [B, C, R, R] -> [B, (R/size)², C·size²].

    Values are in the order of a convolution's weight: a convolution whose stride is its kernel is
    then one matrix product with that weight.
    """
    batch, channels, side = images.shape[0], images.shape[1], images.shape[2] // size
    cut = images.reshape(batch, channels, side, size, side, size).permute(0, 2, 4, 1, 3, 5)
    return cut.reshape(batch, side * side, channels * size * size)


def _extract_patches_fake(images, size):
    side = images.shape[2] // size
    return images.new_empty((images.shape[0], side * side, images.shape[1] * size * size))


def prepend_class_token_reference(patches: torch.Tensor, class_token: torch.Tensor) -> torch.Tensor:
    """Put the class token before the patches: [B, N, W] and [W] -> [B, N + 1, W]."""
    return torch.cat([class_token.to(patches.dtype).expand(patches.shape[0], 1, -1), patches], 1)


def _prepend_class_token_fake(patches, class_token):
    return patches.new_empty((patches.shape[0], patches.shape[1] + 1, patches.shape[2]))


def pool_end_of_text_reference(x: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """Each text's row at its end-of-text token: [B, T, W] and int [B, T] -> [B, W].

    End of text is the first position of the highest token id in the row, as in OpenAI's
    `encode_text` (`text.argmax(dim=-1)`; the end-of-text id is the highest of the vocabulary).
    """
    position = tokens.argmax(dim=-1)
    return x.gather(1, position.view(-1, 1, 1).expand(-1, 1, x.shape[2])).squeeze(1)


def _pool_end_of_text_fake(x, tokens):
    return x.new_empty((x.shape[0], x.shape[2]))


def clamp_tokens_reference(tokens: torch.Tensor, vocabulary: int) -> torch.Tensor:
    """Token ids moved into a vocabulary, 0 to vocabulary - 1: int [B, T] -> int [B, T]."""
    return tokens.clamp(0, vocabulary - 1)


def _clamp_tokens_fake(tokens, vocabulary):
    return torch.empty_like(tokens)


def mask_unknown_reference(
    features: torch.Tensor, tokens: torch.Tensor, clamped: torch.Tensor
) -> torch.Tensor:
    """Features whose row is NaN where clamping changed a token: [B, E] and two int [B, T] -> [B, E]."""
    unknown = (tokens != clamped).any(dim=1, keepdim=True)
    return features.masked_fill(unknown, float("nan"))


# What PyTorch's own operations are mapped to


def cast_reference(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """x in another dtype, always a new tensor."""
    return x.to(dtype, copy=True)


def _cast_fake(x, dtype):
    return torch.empty_like(x, dtype=dtype)


def linear_reference(
    x: torch.Tensor, weight: torch.Tensor, bias: Optional[torch.Tensor]
) -> torch.Tensor:
    """x·weightᵀ + bias: [..., K] and [N, K] and [N] or None -> [..., N]."""
    return F.linear(x, weight, bias)


def _linear_fake(x, weight, bias, table=""):
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


def layer_norm_reference(
    x: torch.Tensor, scale: torch.Tensor, shift: torch.Tensor, epsilon: float
) -> torch.Tensor:
    """Layer norm over the last axis, in fp32 inside: [..., W] and two [W] -> [..., W]."""
    return F.layer_norm(x, x.shape[-1:], scale, shift, epsilon)


def add_reference(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """a + b, of shapes that broadcast."""
    return a + b


def _add_fake(a, b):
    return a.new_empty(torch.broadcast_shapes(a.shape, b.shape))


def embedding_reference(weight: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """Rows of a table: [V, W] and int [B, T] -> [B, T, W]."""
    return F.embedding(tokens, weight)


def _embedding_fake(weight, tokens):
    return weight.new_empty((*tokens.shape, weight.shape[1]))


def select_token_reference(x: torch.Tensor, index: int) -> torch.Tensor:
    """One token's row: [B, T, W] -> [B, W]."""
    return x.select(1, index).clone()


def _select_token_fake(x, index):
    return x.new_empty((x.shape[0], x.shape[2]))


# What the plugins do in one piece


def fused_attention_reference(
    qkv: torch.Tensor, heads: int, causal: bool, query_bias: Optional[torch.Tensor] = None
) -> torch.Tensor:
    """`attention` with query_bias [W] added to the queries."""
    if query_bias is not None:
        qkv = qkv + F.pad(query_bias, (0, 2 * heads * HEAD_DIM)).to(qkv.dtype)
    return attention_reference(qkv, heads, causal)


def fused_linear_reference(
    x: torch.Tensor, weight: torch.Tensor, bias: Optional[torch.Tensor], table: str = ""
) -> torch.Tensor:
    """`linear`; table: the hexadecimal digits of what `linear.tune` measured, or nothing."""
    return F.linear(x, weight, bias)


def bias_quick_gelu_reference(x: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """y·sigmoid(1.702·y) of y = x + bias: [..., N] and [N] -> [..., N]."""
    return quick_gelu_reference(x + bias)


def residual_layer_norm_reference(
    x: torch.Tensor, delta: torch.Tensor, bias: torch.Tensor, scale: torch.Tensor,
    shift: torch.Tensor, epsilon: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """x + delta + bias and its layer norm over the last axis: two [..., W], three [W] -> two [..., W]."""
    total = x + (delta + bias)
    return total, F.layer_norm(total, total.shape[-1:], scale, shift, epsilon)


def _residual_layer_norm_fake(x, delta, bias, scale, shift, epsilon):
    return torch.empty_like(x), torch.empty_like(x)


def extract_patch_rows_reference(
    images: torch.Tensor, size: int, dtype: torch.dtype
) -> torch.Tensor:
    """`extract_patches` as rows, in a dtype: [B, C, R, R] -> [B·(R/size)², C·size²]."""
    return extract_patches_reference(images.to(dtype), size).flatten(0, 1)


def _extract_patch_rows_fake(images, size, dtype):
    shape = (images.shape[0] * (images.shape[2] // size) ** 2, images.shape[1] * size * size)
    return images.new_empty(shape, dtype=dtype)


def embed_image_reference(
    patches: torch.Tensor, class_token: torch.Tensor, positions: torch.Tensor,
    scale_pre: torch.Tensor, shift_pre: torch.Tensor, epsilon_pre: float,
    scale_1: torch.Tensor, shift_1: torch.Tensor, epsilon_1: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """From projected patches to the first block: rows [B·N, W] -> two of rows [B·(N + 1), W].

    The first is the layer norm of class token and patches plus positions [N + 1, W], the second
    the first block's layer norm of that.
    """
    patches = patches.reshape(-1, positions.shape[0] - 1, patches.shape[1])
    x = prepend_class_token_reference(patches, class_token) + positions
    x = F.layer_norm(x, x.shape[-1:], scale_pre, shift_pre, epsilon_pre).flatten(0, 1)
    return x, F.layer_norm(x, x.shape[-1:], scale_1, shift_1, epsilon_1)


def _embed_image_fake(
    patches, class_token, positions, scale_pre, shift_pre, epsilon_pre, scale_1, shift_1, epsilon_1
):
    tokens = positions.shape[0]
    x = patches.new_empty((patches.shape[0] // (tokens - 1) * tokens, patches.shape[1]))
    return x, torch.empty_like(x)


def split_tokens_reference(x: torch.Tensor, tokens: int) -> torch.Tensor:
    """Rows as the tokens of samples: [B·T, W] -> [B, T, W] with T = tokens."""
    return x.reshape(-1, tokens, x.shape[1]).clone()


def _split_tokens_fake(x, tokens):
    return x.new_empty((x.shape[0] // tokens, tokens, x.shape[1]))


attention = _register(
    "attention(Tensor qkv, int heads, bool causal) -> Tensor", attention_reference, _attention_fake)
quick_gelu = _register("quick_gelu(Tensor x) -> Tensor", quick_gelu_reference, _like)
extract_patches = _register(
    "extract_patches(Tensor images, int size) -> Tensor",
    extract_patches_reference, _extract_patches_fake)
prepend_class_token = _register(
    "prepend_class_token(Tensor patches, Tensor class_token) -> Tensor",
    prepend_class_token_reference, _prepend_class_token_fake)
pool_end_of_text = _register(
    "pool_end_of_text(Tensor x, Tensor tokens) -> Tensor",
    pool_end_of_text_reference, _pool_end_of_text_fake)
clamp_tokens = _register(
    "clamp_tokens(Tensor tokens, int vocabulary) -> Tensor",
    clamp_tokens_reference, _clamp_tokens_fake)
mask_unknown = _register(
    "mask_unknown(Tensor features, Tensor tokens, Tensor clamped) -> Tensor",
    mask_unknown_reference, _like)

cast = _register("cast(Tensor x, ScalarType dtype) -> Tensor", cast_reference, _cast_fake)
linear = _register(
    "linear(Tensor x, Tensor weight, Tensor? bias) -> Tensor", linear_reference, _linear_fake)
layer_norm = _register(
    "layer_norm(Tensor x, Tensor scale, Tensor shift, float epsilon) -> Tensor",
    layer_norm_reference, _like)
add = _register("add(Tensor a, Tensor b) -> Tensor", add_reference, _add_fake)
embedding = _register(
    "embedding(Tensor weight, Tensor tokens) -> Tensor", embedding_reference, _embedding_fake)
select_token = _register(
    "select_token(Tensor x, int index) -> Tensor", select_token_reference, _select_token_fake)

fused_attention = _register(
    "fused_attention(Tensor qkv, int heads, bool causal, Tensor? query_bias=None) -> Tensor",
    fused_attention_reference, _attention_fake)
fused_linear = _register(
    'fused_linear(Tensor x, Tensor weight, Tensor? bias, str table="") -> Tensor',
    fused_linear_reference, _linear_fake)
fused_layer_norm = _register(
    "fused_layer_norm(Tensor x, Tensor scale, Tensor shift, float epsilon) -> Tensor",
    layer_norm_reference, _like)
bias_quick_gelu = _register(
    "bias_quick_gelu(Tensor x, Tensor bias) -> Tensor", bias_quick_gelu_reference, _like)
residual_layer_norm = _register(
    "residual_layer_norm(Tensor x, Tensor delta, Tensor bias, Tensor scale, Tensor shift, "
    "float epsilon) -> (Tensor, Tensor)", residual_layer_norm_reference, _residual_layer_norm_fake)
extract_patch_rows = _register(
    "extract_patch_rows(Tensor images, int size, ScalarType dtype) -> Tensor",
    extract_patch_rows_reference, _extract_patch_rows_fake)
embed_image = _register(
    "embed_image(Tensor patches, Tensor class_token, Tensor positions, Tensor scale_pre, "
    "Tensor shift_pre, float epsilon_pre, Tensor scale_1, Tensor shift_1, float epsilon_1) "
    "-> (Tensor, Tensor)", embed_image_reference, _embed_image_fake)
split_tokens = _register(
    "split_tokens(Tensor x, int tokens) -> Tensor", split_tokens_reference, _split_tokens_fake)


def _attention_cuda(qkv, heads, causal):
    """On a GPU the op runs the plugin's kernel where it is built and serves the tensor, so that engine and eager agree."""
    serves = kernels.serves(qkv, heads)
    return (kernels.attention if serves else attention_reference)(qkv, heads, causal)


_library.impl("attention", _attention_cuda, "CUDA")
