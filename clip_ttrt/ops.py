"""Fused operations of our own: `torch.ops.clip_ttrt.*`, each a schema, a PyTorch reference and a fake.

An op marks a place that a backend implements as one piece: the TensorRT backend through a
converter (`converters.py`) or a plugin, the TorchScript backend through the reference.  They
also keep data-dependent and batch-dependent indexing out of the exported graph, which
Torch-TensorRT 2.2 converts wrongly or not at all.

The references are differentiable PyTorch; the ops themselves are for inference.
"""
from typing import Optional

import torch
import torch.nn.functional as F

from clip_ttrt import kernels
from clip_ttrt.models import HEAD_DIM

QUICK_GELU_SLOPE = 1.702

_library = torch.library.Library("clip_ttrt", "DEF")


def _register(schema: str, reference, fake):
    """Define an op from its schema with one implementation for every device and one for shapes."""
    name = schema.split("(")[0]
    _library.define(schema)
    _library.impl(name, reference, "CompositeExplicitAutograd")
    register_fake = getattr(torch.library, "register_fake", None) or torch.library.impl_abstract
    register_fake(f"clip_ttrt::{name}", fake, lib=_library)
    return getattr(torch.ops.clip_ttrt, name).default


def attention_reference(qkv: torch.Tensor, heads: int, causal: bool) -> torch.Tensor:
    """Multi-head self-attention on packed projections, with head dimension 64.

    qkv: [B, T, 3·W] with W = heads·64, the query, key and value blocks one after the other, as
    one linear layer writes them.  Returns [B, T, W] in qkv's dtype.  Scores are scaled by
    1/sqrt(64); `causal` lets token t see tokens 0..t only.
    """
    batch, tokens = qkv.shape[0], qkv.shape[1]
    query, key, value = qkv.reshape(batch, tokens, 3, heads, HEAD_DIM).permute(2, 0, 3, 1, 4).unbind(0)
    attended = F.scaled_dot_product_attention(query, key, value, is_causal=causal)
    return attended.transpose(1, 2).reshape(batch, tokens, heads * HEAD_DIM)


def _attention_fake(qkv, heads, causal):
    return qkv.new_empty((qkv.shape[0], qkv.shape[1], heads * HEAD_DIM))


def attention_rows_reference(qkv: torch.Tensor, tokens: int, heads: int, causal: bool, query_bias: Optional[torch.Tensor] = None) -> torch.Tensor:
    """`attention` on rows: [B·T, 3·W] -> [B·T, W] with T = tokens, the form a lowered graph holds; query_bias [W] is added to the queries."""
    if query_bias is not None:
        qkv = qkv + F.pad(query_bias, (0, 2 * heads * HEAD_DIM)).to(qkv.dtype)
    return attention_reference(qkv.reshape(-1, tokens, qkv.shape[1]), heads, causal).reshape(-1, heads * HEAD_DIM)


def _attention_rows_fake(qkv, tokens, heads, causal, query_bias=None):
    return qkv.new_empty((qkv.shape[0], heads * HEAD_DIM))


def linear_rows_reference(x: torch.Tensor, weight: torch.Tensor, bias: Optional[torch.Tensor], rows: int) -> torch.Tensor:
    """x·weightᵀ + bias: [..., K] and [N, K] and [N] or None -> [..., N]; `rows`, of x for a batch of one, is what a backend may tune for."""
    return F.linear(x, weight, bias)


def _linear_rows_fake(x, weight, bias, rows):
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


def quick_gelu_reference(x: torch.Tensor) -> torch.Tensor:
    """OpenAI's approximation of GELU, x·sigmoid(1.702·x), elementwise: [..., N] -> [..., N]."""
    return x * torch.sigmoid(QUICK_GELU_SLOPE * x)


def row_capped_reference(x: torch.Tensor) -> torch.Tensor:
    """The minimum of each value and its row's maximum, so x itself: [..., N] -> [..., N]."""
    return x.clone()


def layer_norm_apart_reference(x: torch.Tensor, scale: torch.Tensor, shift: torch.Tensor, epsilon: float) -> torch.Tensor:
    """Layer norm over the last axis, which a backend leaves in a piece of its own: [M, W] and two [W] -> [M, W]."""
    return F.layer_norm(x, x.shape[-1:], scale, shift, epsilon)


def _layer_norm_apart_fake(x, scale, shift, epsilon):
    return torch.empty_like(x)


def bias_quick_gelu_reference(x: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """y·sigmoid(1.702·y) of y = x + bias: [..., N] and [N] -> [..., N]."""
    return quick_gelu_reference(x + bias)


def _bias_quick_gelu_fake(x, bias):
    return torch.empty_like(x)


def residual_layer_norm_reference(x: torch.Tensor, delta: torch.Tensor, bias: torch.Tensor, scale: torch.Tensor, shift: torch.Tensor,
                                  epsilon: float) -> tuple[torch.Tensor, torch.Tensor]:
    """x + delta + bias and its layer norm over the last axis: two [..., W] and three [W] -> two [..., W]."""
    total = x + (delta + bias)
    return total, F.layer_norm(total, total.shape[-1:], scale, shift, epsilon)


def _residual_layer_norm_fake(x, delta, bias, scale, shift, epsilon):
    return torch.empty_like(x), torch.empty_like(x)


def extract_patches_reference(images: torch.Tensor, size: int) -> torch.Tensor:
    """Cut images into patches: [B, C, R, R] -> [B, (R/size)², C·size²], values in the order of a convolution's weight.

    A convolution whose stride is its kernel is then one matrix product with that weight.
    """
    batch, channels, side = images.shape[0], images.shape[1], images.shape[2] // size
    cut = images.reshape(batch, channels, side, size, side, size).permute(0, 2, 4, 1, 3, 5)
    return cut.reshape(batch, side * side, channels * size * size)


def _extract_patches_fake(images, size):
    side = images.shape[2] // size
    return images.new_empty((images.shape[0], side * side, images.shape[1] * size * size))


def extract_patch_rows_reference(images: torch.Tensor, size: int) -> torch.Tensor:
    """`extract_patches` as rows: [B, C, R, R] -> [B·(R/size)², C·size²]."""
    return extract_patches_reference(images, size).flatten(0, 1)


def _extract_patch_rows_fake(images, size):
    return images.new_empty((images.shape[0] * (images.shape[2] // size) ** 2, images.shape[1] * size * size))


def prepend_class_token_reference(patches: torch.Tensor, class_token: torch.Tensor) -> torch.Tensor:
    """Put the class token before the patches: [B, N, W] and [W] -> [B, N + 1, W]."""
    return torch.cat([class_token.to(patches.dtype).expand(patches.shape[0], 1, -1), patches], dim=1)


def _prepend_class_token_fake(patches, class_token):
    return patches.new_empty((patches.shape[0], patches.shape[1] + 1, patches.shape[2]))


def embed_image_reference(patches: torch.Tensor, class_token: torch.Tensor, positions: torch.Tensor, scale_pre: torch.Tensor, shift_pre: torch.Tensor,
                          epsilon_pre: float, scale_1: torch.Tensor, shift_1: torch.Tensor, epsilon_1: float) -> tuple[torch.Tensor, torch.Tensor]:
    """From projected patches to the first block: rows [B·N, W] -> two of rows [B·(N + 1), W].

    The first is the layer norm of class token and patches plus positions [N + 1, W], the second the first block's layer norm
    of that.
    """
    patches = patches.reshape(-1, positions.shape[0] - 1, patches.shape[1])
    x = prepend_class_token_reference(patches, class_token) + positions
    x = F.layer_norm(x, x.shape[-1:], scale_pre, shift_pre, epsilon_pre).flatten(0, 1)
    return x, F.layer_norm(x, x.shape[-1:], scale_1, shift_1, epsilon_1)


def _embed_image_fake(patches, class_token, positions, scale_pre, shift_pre, epsilon_pre, scale_1, shift_1, epsilon_1):
    tokens = positions.shape[0]
    x = patches.new_empty((patches.shape[0] // (tokens - 1) * tokens, patches.shape[1]))
    return x, torch.empty_like(x)


def pool_end_of_text_reference(x: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """Each text's row at its end-of-text token: [B, T, W] and int [B, T] -> [B, W].

    End of text is the first position of the highest token id in the row, as in OpenAI's
    `encode_text` (`text.argmax(dim=-1)`; the end-of-text id is the highest of the vocabulary).
    """
    position = tokens.argmax(dim=-1)
    return x.gather(1, position.view(-1, 1, 1).expand(-1, 1, x.shape[2])).squeeze(1)


def _pool_end_of_text_fake(x, tokens):
    return x.new_empty((x.shape[0], x.shape[2]))


attention = _register("attention(Tensor qkv, int heads, bool causal) -> Tensor", attention_reference, _attention_fake)
attention_rows = _register("attention_rows(Tensor qkv, int tokens, int heads, bool causal, Tensor? query_bias=None) -> Tensor",
                           attention_rows_reference, _attention_rows_fake)
extract_patches = _register("extract_patches(Tensor images, int size) -> Tensor", extract_patches_reference, _extract_patches_fake)
prepend_class_token = _register("prepend_class_token(Tensor patches, Tensor class_token) -> Tensor",
                                prepend_class_token_reference, _prepend_class_token_fake)
pool_end_of_text = _register("pool_end_of_text(Tensor x, Tensor tokens) -> Tensor",
                             pool_end_of_text_reference, _pool_end_of_text_fake)
extract_patch_rows = _register("extract_patch_rows(Tensor images, int size) -> Tensor", extract_patch_rows_reference, _extract_patch_rows_fake)
embed_image = _register("embed_image(Tensor patches, Tensor class_token, Tensor positions, Tensor scale_pre, Tensor shift_pre, float epsilon_pre, "
                        "Tensor scale_1, Tensor shift_1, float epsilon_1) -> (Tensor, Tensor)", embed_image_reference, _embed_image_fake)
linear_rows = _register("linear_rows(Tensor x, Tensor weight, Tensor? bias, int rows) -> Tensor", linear_rows_reference, _linear_rows_fake)
quick_gelu = _register("quick_gelu(Tensor x) -> Tensor", quick_gelu_reference, torch.empty_like)
row_capped = _register("row_capped(Tensor x) -> Tensor", row_capped_reference, torch.empty_like)
layer_norm_apart = _register("layer_norm_apart(Tensor x, Tensor scale, Tensor shift, float epsilon) -> Tensor",
                             layer_norm_apart_reference, _layer_norm_apart_fake)
bias_quick_gelu = _register("bias_quick_gelu(Tensor x, Tensor bias) -> Tensor", bias_quick_gelu_reference, _bias_quick_gelu_fake)
residual_layer_norm = _register("residual_layer_norm(Tensor x, Tensor delta, Tensor bias, Tensor scale, Tensor shift, float epsilon) -> (Tensor, Tensor)",
                                residual_layer_norm_reference, _residual_layer_norm_fake)

def _attention_cuda(qkv, heads, causal):
    """On a GPU the op runs the plugin's kernel where it is built and serves the tensor, so that engine and eager agree."""
    return kernels.attention(qkv, heads, causal) if kernels.serves(qkv, heads) else attention_reference(qkv, heads, causal)


_library.impl("attention", _attention_cuda, "CUDA")

REFERENCES = {
    attention: attention_reference,
    attention_rows: attention_rows_reference,
    extract_patches: extract_patches_reference,
    prepend_class_token: prepend_class_token_reference,
    pool_end_of_text: pool_end_of_text_reference,
    extract_patch_rows: extract_patch_rows_reference,
    embed_image: embed_image_reference,
    linear_rows: linear_rows_reference,
    quick_gelu: quick_gelu_reference,
    row_capped: row_capped_reference,
    layer_norm_apart: layer_norm_apart_reference,
    bias_quick_gelu: bias_quick_gelu_reference,
    residual_layer_norm: residual_layer_norm_reference,
}
