"""SigLIP's two encoders, and those of SigLIP 2 at fixed sizes, as `encoders.py` has CLIP's.

Equal to transformers' `SiglipModel` with CLIP's exact rearrangements and one of the pooling head:
its query is the same for every picture, and so is what a head seeks, the query through the keys.
"""
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, Callable, Mapping, Optional

import torch
from torch import nn

from clip_ttrt import encoders
from clip_ttrt.encoders import INFERENCE, StateDict, openai_name
from clip_ttrt.errors import UserError

EPSILON = 1e-6  # of layer norms
# Of transformers' SiglipConfig, of whose values files leave out those that are as here.
TOWER = {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12,
         "intermediate_size": 3072}
IMAGE = TOWER | {"image_size": 224, "patch_size": 16}
TEXT = TOWER | {"max_position_embeddings": 64, "vocab_size": 32000}
SERVED = {"hidden_act": ["gelu_pytorch_tanh"], "layer_norm_eps": [EPSILON], "num_channels": [3],
          "vision_use_head": [True]}
PREPROCESS = {"do_resize": [True], "do_rescale": [True], "do_normalize": [True],
              "rescale_factor": [1 / 255], "resample": [2, 3]}
FILTERS = {2: "bilinear", 3: "bicubic"}  # Pillow's -> ours


@dataclass(frozen=True)
class Tower:
    """Sizes of one transformer."""

    width: int
    layers: int
    heads: int
    mlp: int  # width inside a block's


@dataclass(frozen=True)
class Dimensions:
    """Sizes of one SigLIP, whose features are as wide as its images' tower."""

    image: Tower
    image_resolution: int  # pixels; those beyond whole patches are not looked at
    patch_size: int  # pixels
    text: Tower
    context_length: int  # tokens of every text
    vocab_size: int


def check(config: Mapping[str, Any], served: Mapping[str, list]) -> None:
    """UserError for a setting that is there and has another value than those served."""
    for name in served:
        if name in config and config[name] not in served[name]:
            raise UserError(f"a SigLIP with {name} {config[name]!r} is not supported, but with "
                            f"{' or '.join(map(repr, served[name]))}")


def dimensions_from(config: Mapping[str, Any]) -> Dimensions:
    """By the config.json of a `SiglipModel`; UserError for others, such as NaFlex's."""
    check({"model_type": None, **config}, {"model_type": ["siglip"]})
    image, text = (default | (config.get(part) or {})
                   for part, default in (("vision_config", IMAGE), ("text_config", TEXT)))
    features = text.get("projection_size") or text["hidden_size"]
    for part in (image, text, {"projection_size": features}):
        check(part, SERVED | {"projection_size": [image["hidden_size"], None]})
    image, text = ([values[name] for name in names] for values, names in (
        (image, IMAGE), (text, TEXT)))
    return Dimensions(Tower(*image[:4]), *image[4:], Tower(*text[:4]), *text[4:])


def preprocess_from(config: Mapping[str, Any], resolution: int) -> dict[str, Any]:
    """Arguments of `resize.Preprocess` by preprocessor_config.json; UserError for other kinds."""
    check(config, PREPROCESS | {"size": [{"height": resolution, "width": resolution}]})
    half = [0.5, 0.5, 0.5]
    return {"resolution": resolution, "fit": "squash", "filter": FILTERS[config.get("resample", 3)],
            "mean": config.get("image_mean", half), "std": config.get("image_std", half)}


class Block(encoders.Block):
    """CLIP's with SigLIP's layer norms and MLP."""

    def __init__(self, tower: Tower, called: SimpleNamespace):
        nn.Module.__init__(self)
        self.heads, self.called, width = tower.heads, called, tower.width
        self.norm_1, self.norm_2 = (nn.LayerNorm(width, EPSILON) for _ in range(2))
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, tower.mlp), nn.Linear(tower.mlp, width)

    def forward(self, x: torch.Tensor, pool: Optional[Callable] = None) -> torch.Tensor:
        attended = self.called.attention(self.qkv(self.norm_1(x)), self.heads, False)
        if pool is not None:
            x, attended = pool(x), pool(attended)
        x = x + self.out(attended)
        return x + self.down(self.called.gelu(self.up(self.norm_2(x)), "tanh"))


class PoolingHead(nn.Module):
    """Attention of one query, learnt as a probe, over all tokens: [B, T, W] -> [B, W]."""

    def __init__(self, tower: Tower, called: SimpleNamespace):
        super().__init__()
        self.called, width = called, tower.width
        self.sought = nn.Parameter(torch.empty(tower.heads, width))
        self.values = nn.Parameter(torch.empty(width, width))
        self.out, self.layernorm = nn.Linear(width, width), nn.LayerNorm(width, EPSILON)
        self.up, self.down = nn.Linear(width, tower.mlp), nn.Linear(tower.mlp, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.out(self.called.attention_probe(x, self.sought, self.values))
        return x + self.down(self.called.gelu(self.up(self.layernorm(x)), "tanh"))


class Encoder(encoders.Encoder):
    """What both have; `projection` goes from the normed tokens, or the one, to features."""

    def __init__(self, tower: Tower, tokens: int, projection: nn.Module, called: SimpleNamespace):
        nn.Module.__init__(self)
        self.called, self.projection = called, projection
        self.positions = nn.Parameter(torch.empty(tokens, tower.width))
        self.blocks = nn.ModuleList(Block(tower, called) for _ in range(tower.layers))
        self.norm_post = nn.LayerNorm(tower.width, EPSILON)


class ImageEncoder(Encoder):
    """Images [B, 3, R, R], any float dtype -> features fp32 [B, W]."""

    def __init__(self, dims: Dimensions, called: SimpleNamespace):
        side = dims.image_resolution // dims.patch_size
        super().__init__(dims.image, side ** 2, PoolingHead(dims.image, called), called)
        self.patch_size = dims.patch_size
        self.patches = nn.Linear(3 * dims.patch_size ** 2, dims.image.width)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        images = self.cast(images, self.patches.weight.dtype)
        patches = self.patches(self.called.extract_patches(images, self.patch_size))
        return self.features(patches + self.positions, None)


class TextEncoder(Encoder):
    """Tokens int [B, T] of the full length -> features fp32 [B, W], NaN for an unknown id."""

    def __init__(self, dims: Dimensions, called: SimpleNamespace):
        projection = nn.Linear(dims.text.width, dims.image.width)
        super().__init__(dims.text, dims.context_length, projection, called)
        self.tokens = nn.Embedding(dims.vocab_size, dims.text.width)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        known = self.called.clamp_tokens(tokens, self.tokens.num_embeddings)
        last = len(self.positions) - 1
        features = self.features(self.tokens(known) + self.positions, lambda x: x.select(1, last))
        return self.called.mask_unknown(features, tokens, known)


# Parts of parameter names: ours -> transformers', behind vision_model or text_model.
NAMES = {
    "projection.out": "head.attention.out_proj", "projection": "head",
    "tokens": "embeddings.token_embedding", "patches": "embeddings.patch_embedding",
    "positions": "embeddings.position_embedding.weight", "blocks": "encoder.layers",
    "norm_1": "layer_norm1", "norm_2": "layer_norm2", "out": "self_attn.out_proj",
    "up": "mlp.fc1", "down": "mlp.fc2",
}


def pooling_head(state_dict: StateDict, heads: int) -> dict[str, torch.Tensor]:
    """What the head's own tensors are by transformers': the query goes through the keys, whose
    bias adds the same to all scores, and the bias of values through the projection behind them."""
    theirs = {name.removeprefix("vision_model.head."): value.double()
              for name, value in state_dict.items() if name.startswith("vision_model.head.")}
    query, key, value = theirs["attention.in_proj_weight"].chunk(3)
    query_bias, _, value_bias = theirs["attention.in_proj_bias"].chunk(3)
    query = (query @ theirs["probe"].flatten() + query_bias).view(heads, 1, -1)
    sought = query @ key.unflatten(0, (heads, -1)) * query.shape[2] ** -0.5
    out = theirs["attention.out_proj.bias"] + theirs["attention.out_proj.weight"] @ value_bias
    return {"projection.sought": sought.squeeze(1), "projection.values": value,
            "projection.out.bias": out}


def _load(encoder: Encoder, part: str, norm_post: str, state_dict: StateDict,
          known: StateDict) -> Encoder:
    """With a state dict's tensors but for those known, fp32, in evaluation mode."""
    names = NAMES | {"norm_post": norm_post}

    def theirs(ours: str) -> torch.Tensor:
        if ".qkv." in ours:
            return torch.cat([theirs(ours.replace("qkv", f"self_attn.{x}_proj")) for x in "qkv"])
        value = state_dict[f"{part}.{openai_name(ours, names)}"]
        return value.flatten(1) if ours == "patches.weight" else value

    encoder.load_state_dict({name: known[name] if name in known else theirs(name)
                             for name in encoder.state_dict()})
    return encoder.eval().requires_grad_(False)


def image_encoder(config: Mapping[str, Any], state_dict: StateDict,
                  called: SimpleNamespace = INFERENCE) -> ImageEncoder:
    """The encoder of images by a `SiglipModel`'s config.json and tensors."""
    dims = dimensions_from(config)
    return _load(ImageEncoder(dims, called), "vision_model", "post_layernorm", state_dict,
                 pooling_head(state_dict, dims.image.heads))


def text_encoder(config: Mapping[str, Any], state_dict: StateDict,
                 called: SimpleNamespace = INFERENCE) -> TextEncoder:
    """The encoder of texts by a `SiglipModel`'s config.json and tensors."""
    return _load(TextEncoder(dimensions_from(config), called), "text_model", "final_layer_norm",
                 state_dict, {})
