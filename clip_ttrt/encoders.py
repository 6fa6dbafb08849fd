"""CLIP's two encoders in plain PyTorch, batch first: all that is fast is a rewrite of them.

Equal to OpenAI's `clip/model.py`, and OpenCLIP's, with three exact rearrangements: query, key and
value come from one linear layer; the patch convolution, whose stride is its kernel, is a linear
layer on cut-out patches; and the last block, of which one token is read, pools before its output
projection.
The image encoder of a ResNet is in `resnet.py`.
"""
import functools
import re
from types import SimpleNamespace
from typing import Any, Callable, Mapping, Optional

import torch
from torch import nn

from clip_ttrt import ops, resnet
from clip_ttrt.models import Dimensions, dimensions_from

# What an encoder calls: the ops, for inference, or their differentiable references.
CALLED = ("attention", "gelu", "extract_patches", "prepend_class_token", "pool_end_of_text",
          "clamp_tokens", "positions_of", "mask_unknown", "mean_of_patches", "attention_pool",
          "attention_probe", "cast")
INFERENCE = SimpleNamespace(**{name: getattr(ops, name) for name in CALLED})
DIFFERENTIABLE = SimpleNamespace(**{name: ops.REFERENCES[getattr(ops, name)] for name in CALLED})
StateDict = Mapping[str, torch.Tensor]


class Block(nn.Module):
    """A pre-norm transformer block: [B, T, W] -> [B, T, W], or [B, W] where `pool` picks a row."""

    def __init__(self, width: int, heads: int, mlp: int, gelu: str, causal: bool,
                 called: SimpleNamespace):
        super().__init__()
        self.heads, self.gelu, self.causal, self.called = heads, gelu, causal, called
        self.norm_1 = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.norm_2 = nn.LayerNorm(width)
        self.up = nn.Linear(width, mlp)
        self.down = nn.Linear(mlp, width)

    def forward(self, x: torch.Tensor, pool: Optional[Callable] = None) -> torch.Tensor:
        attended = self.called.attention(self.qkv(self.norm_1(x)), self.heads, self.causal)
        if pool is not None:
            x, attended = pool(x), pool(attended)
        x = x + self.out(attended)
        return x + self.down(self.called.gelu(self.up(self.norm_2(x)), self.gelu))


class Encoder(nn.Module):
    """What both encoders have, which compute in the dtype of their weights."""

    def __init__(self, width: int, layers: int, tokens: int, embed_dim: int,
                 called: SimpleNamespace, **of_blocks: Any):
        super().__init__()
        self.called = called
        self.positions = nn.Parameter(torch.empty(tokens, width))
        self.blocks = nn.ModuleList(
            Block(width, called=called, **of_blocks) for _ in range(layers))
        self.norm_post = nn.LayerNorm(width)
        self.projection = nn.Linear(width, embed_dim, bias=False)

    def cast(self, x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        return x if x.dtype == dtype else self.called.cast(x, dtype)

    def in_openai_naming(self) -> dict[str, torch.Tensor]:
        """The tensors, or views of them, that this can be loaded from."""
        names = IMAGE_NAMES if isinstance(self, ImageEncoder) else TEXT_NAMES
        values = {openai_name(ours, names): value for ours, value in self.state_dict().items()}
        values[names["projection.weight"]] = self.projection.weight.T
        if isinstance(self, ImageEncoder):
            square = 3, self.patch_size, self.patch_size
            values["visual.conv1.weight"] = self.patches.weight.unflatten(1, square)
        return values

    def features(self, x: torch.Tensor, pool: Optional[Callable]) -> torch.Tensor:
        """Features in fp32, or in fp64 where the encoder computes in it.  pool: picks a row; None
        is the mean of the patches behind the norm, which no block can do before its end."""
        for block in self.blocks[:-1]:
            x = block(x)
        x = self.norm_post(self.blocks[-1](x, pool))
        x = self.projection(x if pool else self.called.mean_of_patches(x))
        return self.cast(x, torch.promote_types(x.dtype, torch.float))


class ImageEncoder(Encoder):
    """Vision transformer: images [B, 3, R, R], any float dtype -> features fp32 [B, embed_dim]."""

    def __init__(self, dims: Dimensions, called: SimpleNamespace = INFERENCE):
        width = dims.image_width
        super().__init__(width, dims.image_layers, dims.image_tokens, dims.embed_dim, called,
                         heads=dims.image_heads, mlp=dims.image_mlp, gelu=dims.gelu, causal=False)
        self.patch_size = dims.patch_size
        self.pool = None if dims.image_pooling == "mean" else lambda rows: rows.select(1, 0)
        self.patches = nn.Linear(3 * dims.patch_size ** 2, width, bias=False)
        self.class_token = nn.Parameter(torch.empty(width))
        self.norm_pre = nn.LayerNorm(width)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        images = self.cast(images, self.patches.weight.dtype)
        x = self.patches(self.called.extract_patches(images, self.patch_size))
        x = self.called.prepend_class_token(x, self.class_token)
        return self.features(self.norm_pre(x + self.positions), self.pool)


class TextEncoder(Encoder):
    """Causal text transformer: tokens int [B, T] -> features fp32 [B, embed_dim].

    T <= context_length.  A row with an id outside the vocabulary gets features of NaN: on a GPU
    nobody can look at ids without waiting for them.
    """

    def __init__(self, dims: Dimensions, called: SimpleNamespace = INFERENCE):
        super().__init__(dims.text_width, dims.text_layers, dims.context_length, dims.embed_dim,
                         called, heads=dims.text_heads, mlp=dims.text_mlp, gelu=dims.gelu,
                         causal=True)
        self.tokens = nn.Embedding(dims.vocab_size, dims.text_width)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        known = self.called.clamp_tokens(tokens, self.tokens.num_embeddings)
        x = self.tokens(known) + self.called.positions_of(self.positions, tokens)
        features = self.features(x, lambda rows: self.called.pool_end_of_text(rows, known))
        return self.called.mask_unknown(features, tokens, known)


# Parts of parameter names: ours -> OpenAI's.
BLOCK_NAMES = {
    "blocks": "transformer.resblocks", "norm_1": "ln_1", "qkv.weight": "attn.in_proj_weight",
    "qkv.bias": "attn.in_proj_bias", "out": "attn.out_proj", "norm_2": "ln_2",
    "up": "mlp.c_fc", "down": "mlp.c_proj",
}
IMAGE_NAMES = BLOCK_NAMES | {
    "blocks": "visual.transformer.resblocks", "patches": "visual.conv1",
    "class_token": "visual.class_embedding", "positions": "visual.positional_embedding",
    "norm_pre": "visual.ln_pre", "norm_post": "visual.ln_post", "projection.weight": "visual.proj",
}
TEXT_NAMES = BLOCK_NAMES | {
    "tokens": "token_embedding", "positions": "positional_embedding", "norm_post": "ln_final",
    "projection.weight": "text_projection",
}


def openai_name(ours: str, names: Mapping[str, str]) -> str:
    parts = "|".join(map(re.escape, names))
    return re.sub(rf"\b({parts})\b", lambda part: names[part[0]], ours)


def _load(kind: type, names: Mapping[str, str], state_dict: StateDict,
          called: SimpleNamespace = INFERENCE, dims: Optional[Dimensions] = None) -> Encoder:
    """The encoder of a state dict in OpenAI's naming, fp32, in evaluation mode; dims: where they
    are not those of OpenAI's models with tensors of these shapes.

    OpenAI multiplies by its projections from the right, where a linear layer holds the transpose,
    and its patch convolution's weight [W, 3, P, P] is our linear layer's [W, 3·P²].
    """
    encoder = kind(dims or dimensions_from(state_dict), called)
    values = {ours: state_dict[openai_name(ours, names)] for ours in encoder.state_dict()}
    values["projection.weight"] = values["projection.weight"].T
    if "patches.weight" in values:
        values["patches.weight"] = values["patches.weight"].flatten(1)
    encoder.load_state_dict(values)
    return encoder.eval().requires_grad_(False)


def image_encoder(state_dict: StateDict, called: SimpleNamespace = INFERENCE,
                  dims: Optional[Dimensions] = None) -> nn.Module:
    """The encoder of images of a state dict in OpenAI's naming, fp32, in evaluation mode."""
    if (dims or dimensions_from(state_dict)).is_resnet:
        return resnet.image_encoder(state_dict, called)
    return _load(ImageEncoder, IMAGE_NAMES, state_dict, called, dims)


text_encoder = functools.partial(_load, TextEncoder, TEXT_NAMES)
ENCODERS = {"image": image_encoder, "text": text_encoder}
