"""Families of models: how each one's files are read, and its tensors' names mapped to OpenAI's.

A row of FAMILIES is what there is to a family.  Files are read without a library of the family's.
"""
import functools
import importlib.util
import json
import re
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Callable, Mapping, Optional

import torch
from torch import Tensor, nn

from clip_ttrt import deprecations
from clip_ttrt.errors import UserError
from clip_ttrt.models import MODELS, Dimensions

HUB, PACKAGE = "hf-hub:", "open_clip:"  # before a name
CONFIGS = "*.json", "*.txt", "*.model"  # of a repository, with what tokenizers need
# Arguments of `resize.Preprocess` that OpenAI's models have.
OPENAI_PREPROCESS = {"filter": "bicubic", "fit": "crop",
                     "mean": [0.48145466, 0.4578275, 0.40821073],
                     "std": [0.26862954, 0.26130258, 0.27577711]}
StateDict = Mapping[str, Tensor]


@dataclass(frozen=True)
class Model:
    """What a name stands for, known before any weights are read, and what an artifact is of."""

    name: str
    dimensions: Dimensions
    preprocess: Mapping[str, Any] = field(default_factory=OPENAI_PREPROCESS.copy)
    folder: Optional[Path] = None  # of the model's files, or of an artifact
    config: Mapping[str, Any] = field(default_factory=dict)  # for the family's own model

    @property
    def family(self) -> "Family":
        return FAMILIES[self.dimensions.family]

    def weights(self) -> list[Path]:
        """The files of its own weights; UserError where there are none."""
        known = self.family.weights if self.folder else ()
        for name in known:
            if self.name.startswith(HUB):
                hub(self.name, (name, name.replace(".safetensors.index.json", "-*.safetensors")))
            if (path := self.folder / name).is_file():
                shards = load_json(path)["weight_map"] if path.suffix == ".json" else {"": name}
                return [self.folder / shard for shard in sorted({*shards.values()})]
        raise UserError(f"{self.name} comes with no {' or '.join(known) or 'weights'}; "
                        "give --weights FILE or random")

    def blank(self) -> nn.Module:
        """A model with the tensors that a checkpoint has, and its package's initialisation."""
        from clip_ttrt.encoders import Blank

        return openai_model(self) if self.family is FAMILIES["openai"] else Blank(self.dimensions)

    def original(self) -> nn.Module:
        """The family's own model, without weights; where its package is not installed, ours."""
        from clip_ttrt.encoders import DIFFERENTIABLE, Blank

        with torch.device("meta"):  # its initialisation takes seconds
            if importlib.util.find_spec(self.family.package) is None:
                return Blank(self.dimensions, DIFFERENTIABLE)
            return self.family.original(self)

    def encoder(self, name: str, state_dict: StateDict, *called: SimpleNamespace) -> nn.Module:
        """Our encoder, image or text, fp32, in evaluation mode."""
        from clip_ttrt.encoders import ENCODERS

        return ENCODERS[name](state_dict, *called, dims=self.dimensions)

    def tokenizer(self) -> Callable[..., Tensor]:
        """A function of texts and `truncate=False` -> tokens int32 [N, context_length], which
        raises RuntimeError for a text that is longer."""
        length = self.dimensions.context_length
        if self.family.tokenizer:
            from clip_ttrt import tokenizers

            return tokenizers.read(self.folder, length)
        return lambda texts, truncate=False: (
            deprecations.clip().tokenize(texts, length, truncate).int())

    def transform(self) -> Callable[[Any], Tensor]:
        """From a PIL image of any mode to float32 [3, R, R], of OpenAI's steps or open_clip's."""
        from torchvision import transforms

        side, facts = self.dimensions.image_resolution, self.preprocess
        filter = transforms.InterpolationMode(facts["filter"])
        sizes = {"crop": [transforms.Resize(side, filter), transforms.CenterCrop(side)],
                 "squash": [transforms.Resize((side, side), filter)],
                 "pad": [functools.partial(shrink, side, filter), transforms.CenterCrop(side)]}
        return transforms.Compose([
            *sizes[facts["fit"]], deprecations.clip()._convert_image_to_rgb,
            transforms.ToTensor(), transforms.Normalize(facts["mean"], facts["std"])])


def shrink(side: int, filter: Any, picture: Any) -> Any:
    """A PIL image whose longer side becomes `side`."""
    from torchvision.transforms.functional import resize

    ratio = max(picture.size) / side
    return resize(picture, [max(1, round(each / ratio)) for each in picture.size[::-1]], filter)


def find(name: str) -> Model:
    """A model by its name in the table, `open_clip:NAME`, `hf-hub:ORG/NAME` or a folder.

    Raises UserError for an unknown name, and for what a model has that is unknown here.
    """
    if name in MODELS:
        return Model(name, MODELS[name])
    folder, family = hub(name, CONFIGS) if name.startswith(HUB) else Path(name), "open_clip"
    if name.startswith(PACKAGE):
        folder, config = None, packaged_config(name.removeprefix(PACKAGE))
    elif not (config := load_json(folder / "open_clip_config.json")):
        config = load_json(folder / "config.json")
        family = config.get("model_type")
    if not config:
        raise UserError(f"unknown model {name!r}; known: {', '.join(MODELS)}, {PACKAGE}NAME, "
                        f"{HUB}ORG/NAME, and folders with open_clip_config.json or config.json")
    if family not in FAMILIES:
        raise unknown(name, "model_type", family)
    try:
        model = FAMILIES[family].read(name, config, folder)
    except (KeyError, TypeError, AttributeError) as problem:
        raise UserError(f"the config of {name} is damaged: {problem!r}") from problem
    model.tokenizer()  # whose files may be missing
    return model


def packaged_config(name: str) -> dict[str, Any]:
    package = importlib.util.find_spec("open_clip")
    path = package and Path(package.origin).with_name("model_configs") / f"{name}.json"
    if config := path and load_json(path):
        return config
    reason = ("is none of open_clip.list_models()" if package else
              "is read from the package open_clip: pip install open_clip_torch, or give a folder")
    raise UserError(f"{PACKAGE}{name} {reason}")


@functools.cache
def hub(name: str, patterns: tuple[str, ...]) -> Path:
    """The folder of a repository's files in the user's cache, downloaded where they are not."""
    try:
        from huggingface_hub import snapshot_download

        return Path(snapshot_download(name.removeprefix(HUB), allow_patterns=list(patterns)))
    except Exception as problem:  # of many libraries
        reason = str(problem).strip().partition("\n")[0]
        raise UserError(f"{name} cannot be downloaded ({reason}); pip install huggingface_hub, or "
                        "download it elsewhere and give its folder") from problem


def renamed(name: str, parts: Mapping[str, str]) -> str:
    """A tensor's name with parts of it, of whole words, in another's naming."""
    words = "|".join(map(re.escape, parts))
    return re.sub(rf"\b({words})\b", lambda part: parts[part[0]], name)


def load_json(path: Path) -> dict[str, Any]:
    """What a file holds, and nothing where there is none; UserError where it is damaged."""
    try:
        return json.loads(path.read_text()) if path.is_file() else {}
    except ValueError as problem:
        raise UserError(f"{path} is damaged: {problem}") from problem


def unknown(name: str, setting: str, value: Any) -> UserError:
    why = REFUSED.get(setting.rpartition(".")[2], "which is unknown here")
    return UserError(f"{name} is not supported: its {setting} is {value!r}, {why}")


def filled(name: str, part: str, given: dict[str, Any], known: dict[str, Any],
           ignored: str = "") -> dict[str, Any]:
    """A part of a config, with what it leaves out.  known: the default of a number, or the values
    served, the default first; ignored: a pattern of other settings, which else must be off.
    Raises UserError for what is neither."""
    for key, value in given.items():
        served = known.get(key)
        if not (value in served if isinstance(served, tuple) else
                isinstance(value, (int, float)) if key in known else
                not value or re.match(ignored, key)):
            raise unknown(name, part + key, value)
    return {key: value[0] if isinstance(value, tuple) else value
            for key, value in known.items()} | given


# OpenCLIP: open_clip_config.json

TOWER = {"layers": 12, "mlp_ratio": 4.0,
         "act_kwargs": (None, {}, {"approximate": "none"}, {"approximate": "tanh"})}
IMAGE = TOWER | {"width": 768, "head_width": 64, "patch_size": 16, "image_size": 224,
                 "pool_type": ("tok", "avg"), "pos_embed_type": ("learnable",)}
TEXT = TOWER | {"context_length": 77, "vocab_size": (49408,), "width": 512, "heads": 8,
                "pool_type": ("argmax",), "proj_type": ("linear",)}
FITS = {"shortest": "crop", None: "crop", "squash": "squash", "longest": "pad"}
PICTURES = {"interpolation": ("bicubic", "bilinear", "random", None), "resize_mode": (*FITS,)}
# Of training, or read elsewhere, or of a part that is not there.
IGNORED = ("(embed_dim|vision_cfg|text_cfg|quick_gelu|custom_text|patch_dropout|pad_id|eos_id|mean"
           "|std|size|mode|(init|output|nonscalar|attn_pooler)_.*|(timm|hf)_(?!.*name).*)$")
REFUSED = {  # which people will meet -> why
    "model_type": "where clip and siglip are known, of fixed sizes",
    "multimodal_cfg": "as of CoCa, whose texts end in a class token with a mask of its own",
    "timm_model_name": "an image tower of timm's, as of NaFlex, MobileCLIP and SigLIP (of which "
                       "transformers' folders are known)",
    "hf_model_name": "a text tower of transformers'",
    "hf_tokenizer_name": "another tokenizer than OpenAI's",
    "layers": "a ResNet's; OpenAI's are known, by their own names",
}


def read_open_clip(name: str, whole: dict[str, Any], folder: Optional[Path] = None) -> Model:
    config = filled(name, "", whole.get("model_cfg", whole), {}, IGNORED)
    image = filled(name, "vision_cfg.", config["vision_cfg"], IMAGE, IGNORED)
    text = filled(name, "text_cfg.", config["text_cfg"], TEXT, IGNORED)
    found = filled(name, "preprocess_cfg.", whole.get("preprocess_cfg", {}), PICTURES, IGNORED)
    quick, bias = config.get("quick_gelu", False), config.get("init_logit_bias")
    gelu, of_text = ("quick" if quick else (part["act_kwargs"] or {}).get("approximate", "none")
                     for part in (image, text))
    if gelu != of_text:
        raise unknown(name, "text_cfg.act_kwargs", text["act_kwargs"])
    dims = Dimensions(
        config["embed_dim"], image["image_size"], image["patch_size"], image["width"],
        image["layers"], text["context_length"], text["vocab_size"], text["width"], text["layers"],
        image_head_dim=image["head_width"], text_head_dim=text["width"] // text["heads"],
        image_mlp=int(image["width"] * image["mlp_ratio"]),
        text_mlp=int(text["width"] * text["mlp_ratio"]), gelu=gelu,
        image_pooling="mean" if image["pool_type"] == "avg" else "class",
        logit_bias=bias is not None, family="open_clip")
    preprocess = {
        "filter": "bilinear" if found["interpolation"] == "bilinear" else "bicubic",
        "fit": FITS[found["resize_mode"]],
        **{key: found.get(key) or OPENAI_PREPROCESS[key] for key in ("mean", "std")}}
    config = {"embed_dim": dims.embed_dim, "vision_cfg": image, "text_cfg": text,
              "quick_gelu": quick, "init_logit_bias": bias}
    return Model(name, dims, preprocess, folder, config)


def open_clip_names(state_dict: StateDict) -> StateDict:
    """OpenAI's, but for prefixes of the text encoder, and of training on many GPUs."""
    return {re.sub(r"^(module\.)?(text\.)?", "", name): value
            for name, value in state_dict.items()}


def open_clip_model(model: Model) -> nn.Module:
    from open_clip.model import CLIP

    return CLIP(**model.config)


# CLIP and SigLIP of transformers: config.json

GELUS = {"quick_gelu": "quick", "gelu": "none", "gelu_new": "tanh", "gelu_pytorch_tanh": "tanh"}
BASE = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12,
        "num_attention_heads": 12, "num_channels": (3,)}
OF_CLIP = BASE | {"hidden_act": (*GELUS,), "layer_norm_eps": (1e-5,)}
OF_SIGLIP = BASE | {"hidden_act": ("gelu_pytorch_tanh",), "layer_norm_eps": (1e-6,)}
CONFIG = {
    "clip": {
        "vision_config": OF_CLIP | {"image_size": 224, "patch_size": 32},
        "text_config": OF_CLIP | {
            "hidden_size": 512, "intermediate_size": 2048, "num_attention_heads": 8,
            "max_position_embeddings": 77, "vocab_size": (49408,), "eos_token_id": (2, 49407)}},
    "siglip": {
        "vision_config": OF_SIGLIP | {"image_size": 224, "patch_size": 16,
                                      "vision_use_head": (True,)},
        "text_config": OF_SIGLIP | {"max_position_embeddings": 64, "vocab_size": 32000}},
}
FILTERS = {3: "bicubic", 2: "bilinear"}  # Pillow's numbers
PROCESSOR = {"resample": (*FILTERS,), "rescale_factor": (1 / 255,),
             **dict.fromkeys(("do_resize", "do_rescale", "do_normalize"), (True,))}
RENAMED = {  # parts of tensors' names -> OpenAI's
    "text_model.head.weight": "text_projection", "text_model.head.bias": "text_projection_bias",
    "vision_model.": "visual.", "text_model.": "", "embeddings.": "",
    "encoder.layers": "transformer.resblocks", "self_attn": "attn", "layer_norm1": "ln_1",
    "layer_norm2": "ln_2", "mlp.fc1": "mlp.c_fc", "mlp.fc2": "mlp.c_proj",
    "patch_embedding": "conv1", "position_embedding.weight": "positional_embedding",
    "pre_layrnorm": "ln_pre", "post_layernorm": "ln_post", "final_layer_norm": "ln_final",
    "visual_projection.weight": "visual.proj", "text_projection.weight": "text_projection",
}
TURNED = "visual.proj", "text_projection"  # multiply from the right


def read_transformers(name: str, config: dict[str, Any], folder: Path) -> Model:
    family = config["model_type"]
    image, text = (
        filled(name, f"{part}.", (config.get(part) or {}) | (config.get(f"{part}_dict") or {}),
               known)  # _dict: of older files, where it counts
        for part, known in CONFIG[family].items())
    is_siglip = family == "siglip"
    embed_dim = image["hidden_size"] if is_siglip else config.get("projection_dim", 512)
    if image["hidden_act"] != text["hidden_act"]:
        raise unknown(name, "text_config.hidden_act", text["hidden_act"])
    if is_siglip and (wide := text.get("projection_size") or text["hidden_size"]) != embed_dim:
        raise unknown(name, "text_config.projection_size", wide)
    dims = Dimensions(
        embed_dim, image["image_size"], image["patch_size"], image["hidden_size"],
        image["num_hidden_layers"], text["max_position_embeddings"], text["vocab_size"],
        text["hidden_size"], text["num_hidden_layers"],
        image_head_dim=image["hidden_size"] // image["num_attention_heads"],
        text_head_dim=text["hidden_size"] // text["num_attention_heads"],
        image_mlp=image["intermediate_size"], text_mlp=text["intermediate_size"],
        gelu=GELUS[image["hidden_act"]], image_pooling="probe" if is_siglip else "class",
        logit_bias=is_siglip, family=family)
    return Model(name, dims, read_processor(name, folder, dims), folder, config)


def read_processor(name: str, folder: Path, dims: Dimensions) -> dict[str, Any]:
    """Arguments of `resize.Preprocess` by an image processor's config, or its class's defaults."""
    given = (load_json(folder / "preprocessor_config.json")
             or load_json(folder / "processor_config.json").get("image_processor", {}))
    found, side = filled(name, "preprocessor's ", given, PROCESSOR), dims.image_resolution
    square, half = {"height": side, "width": side}, [0.5, 0.5, 0.5]
    size, crops, default = ((square, False, {"mean": half, "std": half}) if dims.is_siglip else
                            (side, True, OPENAI_PREPROCESS))
    size, crop = found.get("size") or size, found.get("crop_size")
    cropped = size in (side, {"shortest_edge": side}) and crop in (None, side, square)
    if size != square and not (cropped and found.get("do_center_crop", crops)):
        raise unknown(name, "preprocessor's size", [size, crop])
    return {"filter": FILTERS[found["resample"]], "fit": "squash" if size == square else "crop",
            **{each: found.get(f"image_{each}") or default[each] for each in ("mean", "std")}}


def openai_part(name: str) -> tuple[str, Optional[int]]:
    """OpenAI's name of a tensor of transformers', and which third of that tensor it is."""
    name = renamed(name, RENAMED)
    third = re.search(r"\.([qkv])_proj\.", name)
    return (name.replace(third[0], ".in_proj_"), "qkv".index(third[1])) if third else (name, None)


def transformers_names(state_dict: StateDict) -> StateDict:
    """With query, key and value in one, and projections from the right."""
    found = defaultdict(dict)
    for name, value in state_dict.items():
        name, third = openai_part(name)
        found[name][third] = value.T if name in TURNED else value
    return {name: parts[None] if None in parts else torch.cat([parts[i] for i in sorted(parts)])
            for name, parts in found.items()}


def to_transformers_names(own: nn.Module, state_dict: dict[str, Tensor], *_: Any) -> None:
    """The inverse, in place, for transformers' own model."""
    ours = {**state_dict}
    state_dict.clear()
    for name, like in own.state_dict().items():
        known, third = openai_part(name)
        value = ours[known].T if known in TURNED else ours[known]
        value = value if third is None else value.chunk(3)[third]
        state_dict[name] = value.reshape(like.shape)  # of scalars, some have [1]


def transformers_model(model: Model) -> nn.Module:
    """transformers' own, with an interface as `clip` has it."""
    from transformers import AutoConfig, AutoModel

    def encode(kind: str, x: Tensor) -> Tensor:
        found = getattr(own, f"get_{kind}_features")(x)
        return getattr(found, "pooler_output", found)  # as of transformers 5

    own = AutoModel.from_config(AutoConfig.for_model(**model.config)).float()
    for kind in ("image", "text"):
        setattr(own, f"encode_{kind}", functools.partial(encode, kind))
    own.register_load_state_dict_pre_hook(to_transformers_names)
    return own


# The table


def openai_model(model: Model) -> nn.Module:
    """The original `clip` package's model, with its own initialisation."""
    deprecations.clip()
    from clip.model import CLIP

    dims = model.dimensions
    return CLIP(dims.embed_dim, dims.image_resolution, dims.image_layers, dims.image_width,
                dims.patch_size, dims.context_length, dims.vocab_size, dims.text_width,
                dims.text_heads, dims.text_layers)


@dataclass(frozen=True)
class Family:
    """A row of the table."""

    package: str  # which has `original`, and need not be installed
    original: Callable[[Model], nn.Module]
    read: Optional[Callable[[str, dict, Path], Model]] = None  # a name, its config and folder
    names: Callable[[StateDict], StateDict] = dict  # its names of tensors -> OpenAI's
    weights: tuple[str, ...] = ()  # files in a folder, the best first
    tokenizer: tuple[str, ...] = ()  # files, of which an artifact gets copies; (): OpenAI's


OF_TRANSFORMERS = (
    "transformers", transformers_model, read_transformers, transformers_names,
    ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin"))
FAMILIES = {  # those of transformers under the model_type of their config.json
    "openai": Family("clip", openai_model),
    "open_clip": Family("open_clip", open_clip_model, read_open_clip, open_clip_names, (
        "open_clip_model.safetensors", "open_clip_pytorch_model.safetensors",
        "open_clip_pytorch_model.bin")),
    "clip": Family(*OF_TRANSFORMERS),
    "siglip": Family(*OF_TRANSFORMERS, ("tokenizer_config.json", "spiece.model", "tokenizer.json")),
}
