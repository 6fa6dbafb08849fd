"""SigLIP's two encoders, and those of SigLIP 2 at fixed sizes, as `encoders.py` has CLIP's.

Equal to transformers' `SiglipModel` with CLIP's exact rearrangements and one of the pooling head:
its query is the same for every picture, and so is what a head seeks, the query through the keys.
"""
import functools
from types import SimpleNamespace
from typing import Any, Mapping, Optional

import torch
from torch import nn

from clip_ttrt import encoders
from clip_ttrt.encoders import INFERENCE, StateDict, openai_name
from clip_ttrt.errors import UserError
from clip_ttrt.models import Dimensions

EPSILON = 1e-6  # of layer norms
# Of transformers' SiglipConfig, of whose values files leave out those that are as here.
TOWER = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12,
         "num_attention_heads": 12}
IMAGE = TOWER | {"image_size": 224, "patch_size": 16}
TEXT = TOWER | {"max_position_embeddings": 64, "vocab_size": 32000}
SERVED = {"hidden_act": ["gelu_pytorch_tanh"], "layer_norm_eps": [EPSILON], "num_channels": [3],
          "vision_use_head": [True]}
PREPROCESS = {"do_resize": [True], "do_rescale": [True], "do_normalize": [True],
              "rescale_factor": [1 / 255], "resample": [2, 3]}
FILTERS = {2: "bilinear", 3: "bicubic"}  # Pillow's -> ours


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
    check(image, SERVED)
    text["projection_size"] = text.get("projection_size") or text["hidden_size"]
    check(text, SERVED | {"projection_size": [image["hidden_size"]]})
    return Dimensions(
        image["hidden_size"], image["image_size"], image["patch_size"], image["hidden_size"],
        image["num_hidden_layers"], text["max_position_embeddings"], text["vocab_size"],
        text["hidden_size"], text["num_hidden_layers"],
        image_head_dim=image["hidden_size"] // image["num_attention_heads"],
        text_head_dim=text["hidden_size"] // text["num_attention_heads"],
        image_mlp=image["intermediate_size"], text_mlp=text["intermediate_size"],
        gelu="tanh", image_pooling="probe", logit_bias=True, family="siglip")


def preprocess_from(config: Mapping[str, Any], resolution: int) -> dict[str, Any]:
    """Arguments of `resize.Preprocess` by preprocessor_config.json; UserError for other kinds."""
    check(config, PREPROCESS | {"size": [{"height": resolution, "width": resolution}]})
    half = [0.5, 0.5, 0.5]
    return {"fit": "squash", "filter": FILTERS[config.get("resample", 3)],
            "mean": config.get("image_mean", half), "std": config.get("image_std", half)}


class PoolingHead(nn.Module):
    """Attention of one query, learnt as a probe, over all tokens: [B, T, W] -> [B, W]."""

    def __init__(self, width: int, heads: int, mlp: int, called: SimpleNamespace):
        super().__init__()
        self.called = called
        self.sought = nn.Parameter(torch.empty(heads, width))
        self.values = nn.Parameter(torch.empty(width, width))
        self.out, self.layernorm = nn.Linear(width, width), nn.LayerNorm(width)
        self.up, self.down = nn.Linear(width, mlp), nn.Linear(mlp, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.out(self.called.attention_probe(x, self.sought, self.values))
        return x + self.down(self.called.gelu(self.up(self.layernorm(x)), "tanh"))


class Encoder(encoders.Encoder):
    """CLIP's with another projection, no causal mask, and the layer norms of SigLIP."""

    def __init__(self, width: int, heads: int, mlp: int, layers: int, tokens: int,
                 projection: nn.Module, called: SimpleNamespace):
        super().__init__(width, layers, tokens, 1, called, heads=heads, mlp=mlp, gelu="tanh",
                         causal=False)
        self.projection = projection  # in the place of one to a single column
        for module in self.modules():
            if isinstance(module, nn.LayerNorm):
                module.eps = EPSILON


class ImageEncoder(Encoder):
    """Images [B, 3, R, R], any float dtype -> features fp32 [B, embed_dim]."""

    def __init__(self, dims: Dimensions, called: SimpleNamespace = INFERENCE):
        block = dims.image_width, dims.image_heads, dims.image_mlp
        tokens = (dims.image_resolution // dims.patch_size) ** 2  # of whole patches
        super().__init__(*block, dims.image_layers, tokens, PoolingHead(*block, called), called)
        self.patch_size = dims.patch_size
        self.patches = nn.Linear(3 * dims.patch_size ** 2, dims.image_width)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        images = self.cast(images, self.patches.weight.dtype)
        x = self.patches(self.called.extract_patches(images, self.patch_size)) + self.positions
        return self.features(x, lambda rows: rows)  # all of them


class TextEncoder(Encoder):
    """Tokens int [B, context_length] -> features fp32 [B, embed_dim], NaN for an unknown id."""

    def __init__(self, dims: Dimensions, called: SimpleNamespace = INFERENCE):
        super().__init__(dims.text_width, dims.text_heads, dims.text_mlp, dims.text_layers,
                         dims.context_length, nn.Linear(dims.text_width, dims.embed_dim), called)
        self.tokens = nn.Embedding(dims.vocab_size, dims.text_width)

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
    """What is folded: the query goes through the keys, whose bias adds the same to all scores, and
    the values' bias through the projection behind them."""
    theirs = {name.removeprefix("vision_model.head."): value.double()
              for name, value in state_dict.items() if name.startswith("vision_model.head.")}
    query, key, value = theirs["attention.in_proj_weight"].chunk(3)
    query_bias, _, value_bias = theirs["attention.in_proj_bias"].chunk(3)
    query = (query @ theirs["probe"].flatten() + query_bias).view(heads, 1, -1)
    sought = query @ key.unflatten(0, (heads, -1)) * query.shape[2] ** -0.5
    out = theirs["attention.out_proj.bias"] + theirs["attention.out_proj.weight"] @ value_bias
    return {"projection.sought": sought.squeeze(1), "projection.values": value,
            "projection.out.bias": out}


def _load(kind: type, part: str, norm_post: str, state_dict: StateDict,
          called: SimpleNamespace = INFERENCE, dims: Optional[Dimensions] = None) -> Encoder:
    """The encoder of a state dict in transformers' naming, fp32, in evaluation mode; dims: the
    model's, which only its config tells."""
    encoder, names = kind(dims, called), NAMES | {"norm_post": norm_post}
    folded = pooling_head(state_dict, dims.image_heads) if kind is ImageEncoder else {}

    def value(ours: str) -> torch.Tensor:
        if ours in folded:
            return folded[ours]
        if ".qkv." in ours:
            return torch.cat([value(ours.replace("qkv", f"self_attn.{x}_proj")) for x in "qkv"])
        theirs = state_dict[f"{part}.{openai_name(ours, names)}"]
        return theirs.flatten(1) if ours == "patches.weight" else theirs

    encoder.load_state_dict({ours: value(ours) for ours in encoder.state_dict()})
    return encoder.eval().requires_grad_(False)


image_encoder = functools.partial(_load, ImageEncoder, "vision_model", "post_layernorm")
text_encoder = functools.partial(_load, TextEncoder, "text_model", "final_layer_norm")
ENCODERS = {"image": image_encoder, "text": text_encoder}


class Blank(nn.Module):
    """The tensors of a `SiglipModel`, under its names, with PyTorch's initialisation."""

    def __init__(self, dims: Dimensions):
        super().__init__()
        self.logit_scale = nn.Parameter(torch.tensor(4.7))
        self.logit_bias = nn.Parameter(torch.tensor(-16.0))
        image, text, patch = dims.image_width, dims.text_width, dims.patch_size
        head = nn.ModuleDict({"attention": nn.MultiheadAttention(image, dims.image_heads),
                              "layernorm": nn.LayerNorm(image), "mlp": _mlp(image, dims.image_mlp)})
        head.probe = nn.Parameter(torch.randn(1, 1, image))
        self.vision_model = nn.ModuleDict({
            "embeddings": nn.ModuleDict({
                "patch_embedding": nn.Conv2d(3, image, patch, patch),
                "position_embedding": nn.Embedding((dims.image_resolution // patch) ** 2, image)}),
            "encoder": _tower(image, dims.image_layers, dims.image_mlp),
            "post_layernorm": nn.LayerNorm(image), "head": head})
        self.text_model = nn.ModuleDict({
            "embeddings": nn.ModuleDict({
                "token_embedding": nn.Embedding(dims.vocab_size, text),
                "position_embedding": nn.Embedding(dims.context_length, text)}),
            "encoder": _tower(text, dims.text_layers, dims.text_mlp),
            "final_layer_norm": nn.LayerNorm(text), "head": nn.Linear(text, dims.embed_dim)})


def _mlp(width: int, inner: int) -> nn.Module:
    return nn.ModuleDict({"fc1": nn.Linear(width, inner), "fc2": nn.Linear(inner, width)})


def _tower(width: int, layers: int, mlp: int) -> nn.Module:
    return nn.ModuleDict({"layers": nn.ModuleList(nn.ModuleDict({
        "layer_norm1": nn.LayerNorm(width), "layer_norm2": nn.LayerNorm(width),
        "self_attn": nn.ModuleDict({f"{each}_proj": nn.Linear(width, width)
                                    for each in ("q", "k", "v", "out")}),
        "mlp": _mlp(width, mlp)}) for _ in range(layers))})
