"""CLIP's two encoders in plain PyTorch, batch first: the reference that everything fast is a rewrite of.

Built from OpenAI's weights (https://github.com/openai/CLIP, `clip/model.py`), equal to the
original model with three exact rearrangements: query, key and value come from one packed linear
layer; the patch convolution, whose stride is its kernel, is a linear layer on cut-out patches;
and the last block pools before its output projection, since no other token of that block is
read afterwards.
"""
from typing import Callable, Mapping, NamedTuple, Optional

import torch
from torch import nn

from clip_ttrt import ops
from clip_ttrt.models import Dimensions, dimensions_from


class FusedOps(NamedTuple):
    """The implementations an encoder calls: the inference ops, or their differentiable references."""

    attention: Callable = ops.attention
    quick_gelu: Callable = ops.quick_gelu
    extract_patches: Callable = ops.extract_patches
    prepend_class_token: Callable = ops.prepend_class_token
    pool_end_of_text: Callable = ops.pool_end_of_text
    clamp_tokens: Callable = ops.clamp_tokens
    mask_unknown: Callable = ops.mask_unknown
    cast: Callable = ops.cast


DIFFERENTIABLE = FusedOps(*(ops.REFERENCES[op] for op in FusedOps._field_defaults.values()))


def in_dtype(x: torch.Tensor, dtype: torch.dtype, fused: FusedOps) -> torch.Tensor:
    """x in a dtype: a cast where it has another, and nothing where it has not."""
    return x if x.dtype == dtype else fused.cast(x, dtype)


def as_features(x: torch.Tensor, fused: FusedOps) -> torch.Tensor:
    """Features in fp32, or in fp64 where an encoder computes in it."""
    return in_dtype(x, torch.promote_types(x.dtype, torch.float), fused)


class Block(nn.Module):
    """One pre-norm transformer block: [B, T, W] -> [B, T, W], or [B, W] where `pool` picks a row."""

    def __init__(self, width: int, heads: int, causal: bool, fused: FusedOps):
        super().__init__()
        self.heads, self.causal, self.fused = heads, causal, fused
        self.norm_1 = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.norm_2 = nn.LayerNorm(width)
        self.up = nn.Linear(width, 4 * width)
        self.down = nn.Linear(4 * width, width)

    def forward(self, x: torch.Tensor, pool: Optional[Callable] = None) -> torch.Tensor:
        attended = self.fused.attention(self.qkv(self.norm_1(x)), self.heads, self.causal)
        if pool is not None:
            x, attended = pool(x), pool(attended)
        x = x + self.out(attended)
        return x + self.down(self.fused.quick_gelu(self.up(self.norm_2(x))))


class ImageEncoder(nn.Module):
    """Vision transformer: images [B, 3, R, R], any floating dtype -> features fp32 [B, embed_dim].

    It computes in the dtype of its weights.
    """

    def __init__(self, dims: Dimensions, fused: FusedOps = FusedOps()):
        super().__init__()
        self.fused = fused
        width = dims.image_width
        self.patch_size = dims.patch_size
        self.patches = nn.Linear(3 * dims.patch_size ** 2, width, bias=False)
        self.class_token = nn.Parameter(torch.empty(width))
        self.positions = nn.Parameter(torch.empty(dims.image_tokens, width))
        self.norm_pre = nn.LayerNorm(width)
        self.blocks = nn.ModuleList(Block(width, dims.image_heads, False, fused) for _ in range(dims.image_layers))
        self.norm_post = nn.LayerNorm(width)
        self.projection = nn.Linear(width, dims.embed_dim, bias=False)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        images = in_dtype(images, self.patches.weight.dtype, self.fused)
        x = self.patches(self.fused.extract_patches(images, self.patch_size))
        x = self.fused.prepend_class_token(x, self.class_token)
        x = self.norm_pre(x + self.positions)
        for block in self.blocks[:-1]:
            x = block(x)
        x = self.blocks[-1](x, pool=lambda rows: rows.select(1, 0))
        return as_features(self.projection(self.norm_post(x)), self.fused)


class TextEncoder(nn.Module):
    """Causal text transformer: tokens int [B, T], T <= context_length -> features fp32 [B, embed_dim].

    It computes in the dtype of its weights.  A row with an id outside the vocabulary gets features
    of NaN: on a GPU nobody can look at ids without waiting for them.
    """

    def __init__(self, dims: Dimensions, fused: FusedOps = FusedOps()):
        super().__init__()
        self.fused = fused
        width = dims.text_width
        self.tokens = nn.Embedding(dims.vocab_size, width)
        self.positions = nn.Parameter(torch.empty(dims.context_length, width))
        self.blocks = nn.ModuleList(Block(width, dims.text_heads, True, fused) for _ in range(dims.text_layers))
        self.norm_final = nn.LayerNorm(width)
        self.projection = nn.Linear(width, dims.embed_dim, bias=False)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        known = self.fused.clamp_tokens(tokens, self.tokens.num_embeddings)
        x = self.tokens(known) + self.positions[: tokens.shape[1]]
        for block in self.blocks[:-1]:
            x = block(x)
        x = self.blocks[-1](x, pool=lambda rows: self.fused.pool_end_of_text(rows, known))
        features = as_features(self.projection(self.norm_final(x)), self.fused)
        return self.fused.mask_unknown(features, tokens, known)


BLOCK_NAMES = {
    "norm_1": "ln_1",
    "out": "attn.out_proj",
    "norm_2": "ln_2",
    "up": "mlp.c_fc",
    "down": "mlp.c_proj",
}


def _block_names(ours: str, theirs: str, layers: int) -> dict[str, str]:
    """Parameter names of a stack of blocks: ours -> OpenAI's."""
    names = {}
    for layer in range(layers):
        for kind in ("weight", "bias"):
            names[f"{ours}.{layer}.qkv.{kind}"] = f"{theirs}.{layer}.attn.in_proj_{kind}"
            for mine, original in BLOCK_NAMES.items():
                names[f"{ours}.{layer}.{mine}.{kind}"] = f"{theirs}.{layer}.{original}.{kind}"
    return names


def image_names(dims: Dimensions) -> dict[str, str]:
    """Parameter names of the image encoder: ours -> OpenAI's."""
    return {
        "patches.weight": "visual.conv1.weight",
        "class_token": "visual.class_embedding",
        "positions": "visual.positional_embedding",
        "norm_pre.weight": "visual.ln_pre.weight",
        "norm_pre.bias": "visual.ln_pre.bias",
        "norm_post.weight": "visual.ln_post.weight",
        "norm_post.bias": "visual.ln_post.bias",
        "projection.weight": "visual.proj",
        **_block_names("blocks", "visual.transformer.resblocks", dims.image_layers),
    }


def text_names(dims: Dimensions) -> dict[str, str]:
    """Parameter names of the text encoder: ours -> OpenAI's."""
    return {
        "tokens.weight": "token_embedding.weight",
        "positions": "positional_embedding",
        "norm_final.weight": "ln_final.weight",
        "norm_final.bias": "ln_final.bias",
        "projection.weight": "text_projection",
        **_block_names("blocks", "transformer.resblocks", dims.text_layers),
    }


def _load(encoder: nn.Module, names: Mapping[str, str], state_dict: Mapping[str, torch.Tensor]) -> nn.Module:
    encoder.load_state_dict({ours: _converted(ours, state_dict[theirs]) for ours, theirs in names.items()})
    return encoder.eval().requires_grad_(False)


def _converted(ours: str, value: torch.Tensor) -> torch.Tensor:
    """OpenAI's tensor in the shape of ours.

    OpenAI multiplies by its projections from the right, where a linear layer holds the transpose,
    and its patch convolution's weight [W, 3, P, P] is our linear layer's [W, 3·P²].
    """
    return value.T if ours == "projection.weight" else value.flatten(1) if ours == "patches.weight" else value


def image_encoder(state_dict: Mapping[str, torch.Tensor], fused: FusedOps = FusedOps()) -> ImageEncoder:
    """The image encoder of a state dict in OpenAI's naming, fp32, in evaluation mode."""
    dims = dimensions_from(state_dict)
    return _load(ImageEncoder(dims, fused), image_names(dims), state_dict)


def text_encoder(state_dict: Mapping[str, torch.Tensor], fused: FusedOps = FusedOps()) -> TextEncoder:
    """The text encoder of a state dict in OpenAI's naming, fp32, in evaluation mode."""
    dims = dimensions_from(state_dict)
    return _load(TextEncoder(dims, fused), text_names(dims), state_dict)


def to_openai(image: ImageEncoder, text: TextEncoder, dims: Dimensions, logit_scale: torch.Tensor) -> dict[str, torch.Tensor]:
    """A state dict in OpenAI's naming from two trained encoders and log of the logit scale []."""
    out = {"logit_scale": logit_scale.detach().clone()}
    for encoder, names in ((image, image_names(dims)), (text, text_names(dims))):
        ours = encoder.state_dict()
        for mine, theirs in names.items():
            value = ours[mine].detach()
            value = value.unflatten(1, (3, dims.patch_size, dims.patch_size)) if mine == "patches.weight" else _converted(mine, value)
            out[theirs] = value.contiguous().clone()
    return out


ENCODERS = {"image": image_encoder, "text": text_encoder}
