"""CLIP's two encoders in plain PyTorch, batch first: all that is fast is a rewrite of them.

Equal to OpenAI's `clip/model.py`, and OpenCLIP's, with three exact rearrangements: query, key and
value come from one linear layer; the patch convolution, whose stride is its kernel, is a linear
layer on cut-out patches; and the last block, of which one token is read, pools before its output
projection.
"""
from typing import Callable, Mapping, Optional

import torch
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from clip_ttrt import deprecations, ops
from clip_ttrt.families import renamed
from clip_ttrt.models import Dimensions

StateDict = Mapping[str, torch.Tensor]


class Block(ops.Module):
    """A pre-norm transformer block: [B, T, W] -> [B, T, W], or [B, W] where `pool` picks a row."""

    wide: Optional[torch.dtype] = None  # of the MLP, where the block's own overflows

    def __init__(self, width: int, heads: int, mlp: int, gelu: str, causal: bool,
                 epsilon: float = 1e-5):
        super().__init__()
        self.heads, self.gelu, self.causal = heads, gelu, causal
        self.ln_1 = nn.LayerNorm(width, epsilon)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.ln_2 = nn.LayerNorm(width, epsilon)
        self.up = nn.Linear(width, mlp)
        self.down = nn.Linear(mlp, width)

    def forward(self, x: torch.Tensor, pool: Optional[Callable] = None) -> torch.Tensor:
        attended = self.called.attention(self.qkv(self.ln_1(x)), self.heads, self.causal)
        if pool is not None:
            x, attended = pool(x), pool(attended)
        x = x + self.out(attended)
        hidden = self.up(self.cast(self.ln_2(x), self.wide or x.dtype))
        return x + self.cast(self.down(self.called.gelu(hidden, self.gelu)), x.dtype)


class PoolingHead(ops.Module):
    """SigLIP's: attention of one query, a learnt probe, over all tokens: [B, T, W] -> [B, W]."""

    def __init__(self, width: int, heads: int, mlp: int):
        super().__init__()
        self.sought = nn.Parameter(torch.empty(heads, width))
        self.values = nn.Parameter(torch.empty(width, width))
        self.out = nn.Linear(width, width)
        self.layernorm = nn.LayerNorm(width, 1e-6)
        self.up, self.down = nn.Linear(width, mlp), nn.Linear(mlp, width)

    @staticmethod
    def folded(state_dict: StateDict, heads: int) -> StateDict:
        """The query, the same for every picture, goes through the keys, whose bias adds the same to
        all scores, and the values' bias through the projection behind them, summed in fp64."""
        probe, weight, bias, out, out_bias = (
            state_dict[f"visual.head.{name}"].double() for name in (
                "probe", "attention.in_proj_weight", "attention.in_proj_bias",
                "attention.out_proj.weight", "attention.out_proj.bias"))
        query, key, value = weight.chunk(3)
        query_bias, _, value_bias = bias.chunk(3)
        query = (query @ probe.flatten() + query_bias).view(heads, 1, -1)
        sought = query @ key.unflatten(0, (heads, -1)) * query.shape[2] ** -0.5
        found = {"sought": sought.squeeze(1), "values": value, "attn.out_proj.weight": out,
                 "attn.out_proj.bias": out_bias + out @ value_bias}
        return {**state_dict, **{f"visual.head.{name}": each for name, each in found.items()}}

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.out(self.called.attention_probe(x, self.sought, self.values))
        return x + self.down(self.called.gelu(self.up(self.layernorm(x)), "tanh"))


class Encoder(ops.Module):
    """What both encoders have, which compute in the dtype of their weights."""

    def __init__(self, dims: Dimensions, kind: str, tokens: int, causal: bool):
        super().__init__()
        self.mean = kind == "image" and dims.image_pooling == "mean"
        epsilon = 1e-6 if dims.is_siglip else 1e-5
        width, heads, mlp, layers = (
            getattr(dims, f"{kind}_{each}") for each in ("width", "heads", "mlp", "layers"))
        self.positional_embedding = nn.Parameter(torch.empty(tokens, width))
        self.blocks = nn.ModuleList(
            Block(width, heads, mlp or 4 * width, dims.gelu, causal, epsilon)
            for _ in range(layers))
        self.ln_post = nn.LayerNorm(width, epsilon)
        self.projection = nn.Linear(width, dims.embed_dim, bias=dims.is_siglip)

    def in_openai_naming(self) -> dict[str, torch.Tensor]:
        """The tensors, or views of them, that this can be loaded from.

        OpenAI multiplies by its projections from the right, where a linear layer holds the
        transpose, and its patch convolution's weight [W, 3, P, P] is our linear layer's [W, 3·P²].
        """
        values = self.state_dict()
        if "projection.weight" in values:
            values["projection.weight"] = values["projection.weight"].T
        if "patches.weight" in values:
            square = 3, self.patch_size, self.patch_size
            values["patches.weight"] = values["patches.weight"].unflatten(1, square)
        prefix, names = ("visual.", OF_IMAGE) if isinstance(self, ImageEncoder) else ("", OF_TEXT)
        return {prefix + renamed(name, NAMES | names): value for name, value in values.items()}

    @torch.no_grad()
    def load(self, state_dict: StateDict) -> "Encoder":
        """Take over the tensors of a state dict in OpenAI's naming, for inference."""
        if isinstance(self.projection, PoolingHead):
            state_dict = self.projection.folded(state_dict, len(self.projection.sought))
        for name, value in self.in_openai_naming().items():
            value.copy_(state_dict[name])
        return self.eval().requires_grad_(False)

    def features(self, x: torch.Tensor, pool: Optional[Callable]) -> torch.Tensor:
        """Features in fp32, or in fp64 where the encoder computes in it.  pool: picks a row; a mean
        of the patches is taken behind the norm, which no block can do before its end."""
        for block in self.blocks[:-1]:
            x = block(x)
        x = self.ln_post(self.blocks[-1](x, pool))
        x = self.projection(self.called.mean_of_patches(x) if self.mean else x)
        return self.cast(x, torch.promote_types(x.dtype, torch.float))


class ImageEncoder(Encoder):
    """Vision transformer: images [B, 3, R, R], any float dtype -> features fp32 [B, embed_dim]."""

    def __init__(self, dims: Dimensions):
        super().__init__(dims, "image", dims.image_tokens, False)
        width, self.patch_size = dims.image_width, dims.patch_size
        self.pool = (lambda rows: rows.select(1, 0)) if dims.image_pooling == "class" else None
        self.patches = nn.Linear(3 * dims.patch_size ** 2, width, bias=dims.is_siglip)
        self.class_embedding = None if dims.is_siglip else nn.Parameter(torch.empty(width))
        self.ln_pre = nn.Identity() if dims.is_siglip else nn.LayerNorm(width)
        if dims.is_siglip:
            self.projection = PoolingHead(width, dims.image_heads, dims.image_mlp)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        images = self.cast(images, self.patches.weight.dtype)
        x = self.patches(self.called.extract_patches(images, self.patch_size))
        if self.class_embedding is not None:
            x = self.called.prepend_class_token(x, self.class_embedding)
        return self.features(self.ln_pre(x + self.positional_embedding), self.pool)


class TextEncoder(Encoder):
    """Text transformer, causal but for SigLIP's: tokens int [B, T] -> features fp32 [B, embed_dim].

    T <= context_length, and equal to it for SigLIP's.  A row with an id outside the vocabulary gets
    features of NaN: on a GPU nobody can look at ids without waiting for them.
    """

    def __init__(self, dims: Dimensions):
        super().__init__(dims, "text", dims.context_length, not dims.is_siglip)
        self.last = dims.context_length - 1 if dims.is_siglip else None  # the row that is pooled
        self.token_embedding = nn.Embedding(dims.vocab_size, dims.text_width)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        known = self.called.clamp_tokens(tokens, self.token_embedding.num_embeddings)
        places = self.called.positions_of(self.positional_embedding, tokens)
        x = self.token_embedding(known) + places
        features = self.features(x, lambda rows: (
            self.called.pool_end_of_text(rows, known) if self.last is None else
            rows.select(1, self.last)))
        return self.called.mask_unknown(features, tokens, known)


class ResNet(ops.Module):
    """OpenAI's: images [B, 3, R, R], any float dtype -> features fp32 [B, embed_dim].

    It is `ModifiedResNet` of the package `clip` with three exact rearrangements: batch norms are
    folded into the convolutions before them, attention pooling projects its one query and no token,
    and the bias of its values is in that of the projection behind it.
    """

    def __init__(self, dims: Dimensions):
        super().__init__()
        deprecations.clip()
        from clip.model import ModifiedResNet

        self.net = ModifiedResNet(dims.image_layers, dims.embed_dim, dims.image_heads,
                                  dims.image_resolution, dims.image_width)

    @torch.no_grad()
    def load(self, state_dict: StateDict) -> "ResNet":
        """Take over the tensors of a state dict in OpenAI's naming, for inference."""
        self.net.load_state_dict({name.removeprefix("visual."): value for name, value in
                                  state_dict.items() if name.startswith("visual.")})
        self.double().eval()
        for module in [*self.modules()]:
            for name, norm in [*module.named_children()]:
                if isinstance(norm, nn.BatchNorm2d):
                    before = "0" if name == "1" else name.replace("bn", "conv")
                    folded = fuse_conv_bn_eval(module.get_submodule(before), norm)
                    module.add_module(before, folded)
                    module.add_module(name, nn.Identity())
        pool = self.net.attnpool
        pool.c_proj.bias += pool.c_proj.weight @ pool.v_proj.bias
        pool.k_proj.bias = pool.v_proj.bias = None
        return self.float().requires_grad_(False)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        *layers, pool = self.net.children()
        dtype = pool.c_proj.weight.dtype
        x = self.cast(images, dtype)
        for layer in layers:
            x = layer(x)
        x = pool.c_proj(self.called.attention_pool(
            x, pool.positional_embedding, pool.q_proj.weight, pool.q_proj.bias,
            pool.k_proj.weight, pool.v_proj.weight))
        return self.cast(x, torch.promote_types(dtype, torch.float))


NAMES = {  # parts of names that are not OpenAI's -> those
    "blocks": "transformer.resblocks", "qkv.weight": "attn.in_proj_weight",
    "qkv.bias": "attn.in_proj_bias", "out": "attn.out_proj", "up": "mlp.c_fc",
    "down": "mlp.c_proj", "patches": "conv1"}
OF_IMAGE = {"projection.weight": "proj", "projection": "head"}
OF_TEXT = {"ln_post": "ln_final", "projection.weight": "text_projection",
           "projection.bias": "text_projection_bias"}
ENCODERS = {"image": lambda dims: ResNet(dims) if dims.is_resnet else ImageEncoder(dims),
            "text": TextEncoder}  # of dimensions; `load` takes tensors in OpenAI's naming
