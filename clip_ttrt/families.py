"""Families of models: how each one's files are read, and its tensors' names mapped to OpenAI's.

A row of FAMILIES is what there is to a family.  Files are read without a library of the family's.
"""
import functools
import importlib.util
import json
import re
from dataclasses import dataclass, field, replace
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

    def original(self) -> Optional[nn.Module]:
        """The family's own model, without weights; None where its package is not installed."""
        with torch.device("meta"):  # its initialisation takes seconds
            return self.family.original(self)

    def encoder(self, name: str, state_dict: StateDict, *called: SimpleNamespace) -> nn.Module:
        """Our encoder, image or text, fp32, in evaluation mode."""
        return self.family.encoder(self, name, state_dict, *called)

    def tokenizer(self) -> Callable[..., Tensor]:
        """A function of texts and `truncate=False` -> tokens int32 [N, context_length], which
        raises RuntimeError for a text that is longer."""
        return self.family.tokenizer(self)

    def transform(self) -> Callable[[Any], Tensor]:
        """From a PIL image of any mode to float32 [3, R, R]: OpenAI's own, or as open_clip's."""
        side, facts = self.dimensions.image_resolution, self.preprocess
        if facts == OPENAI_PREPROCESS:
            return deprecations.clip()._transform(side)
        from torchvision import transforms

        filter = transforms.InterpolationMode(facts["filter"])
        sizes = {"crop": [transforms.Resize(side, filter), transforms.CenterCrop(side)],
                 "squash": [transforms.Resize((side, side), filter)],
                 "pad": [functools.partial(shrink, side, filter), transforms.CenterCrop(side)]}
        return transforms.Compose([*sizes[facts["fit"]], to_rgb, transforms.ToTensor(),
                                   transforms.Normalize(facts["mean"], facts["std"])])


def shrink(side: int, filter: Any, picture: Any) -> Any:
    """A PIL image whose longer side becomes `side`."""
    from torchvision.transforms.functional import resize

    ratio = max(picture.size) / side
    return resize(picture, [max(1, round(each / ratio)) for each in picture.size[::-1]], filter)


def to_rgb(picture: Any) -> Any:
    return picture.convert("RGB")


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
        return FAMILIES[family].read(name, config, folder)
    except (KeyError, TypeError, AttributeError) as problem:
        raise UserError(f"the config of {name} is damaged: {problem!r}") from problem


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
        remedy = ("pip install huggingface_hub, or" if isinstance(problem, ImportError) else
                  "download it elsewhere, and")
        reason = str(problem).strip().partition("\n")[0]
        raise UserError(f"{name} cannot be downloaded ({reason}); {remedy} give its folder"
                        ) from problem


def load_json(path: Path) -> dict[str, Any]:
    """What a file holds, and nothing where there is none; UserError where it is damaged."""
    try:
        return json.loads(path.read_text()) if path.is_file() else {}
    except ValueError as problem:
        raise UserError(f"{path} is damaged: {problem}") from problem


def unknown(name: str, setting: str, value: Any) -> UserError:
    why = REFUSED.get(setting.rpartition(".")[2], "which is unknown here")
    return UserError(f"{name} is not supported: its {setting} is {value!r}, {why}")


# OpenCLIP: open_clip_config.json

IMAGE = {"layers": 12, "width": 768, "head_width": 64, "mlp_ratio": 4.0, "patch_size": 16,
         "image_size": 224}  # where a config leaves them out
TEXT = {"context_length": 77, "vocab_size": 49408, "width": 512, "heads": 8, "layers": 12,
        "mlp_ratio": 4.0}
KNOWN = {"vision_cfg.pool_type": ("tok", "avg"), "text_cfg.pool_type": ("argmax",),
         "vocab_size": (49408,), "pos_embed_type": ("learnable",), "proj_type": ("linear",),
         "act_kwargs": (None, {}, {"approximate": "none"}, {"approximate": "tanh"})}
# Of training, or read elsewhere, or of a part that is not there.  All others must be false.
IGNORED = re.compile(
    "(embed_dim|vision_cfg|text_cfg|quick_gelu|custom_text|patch_dropout|pad_id|eos_id|mean|std|size"
    "|mode|interpolation|resize_mode|(init|output|nonscalar|attn_pooler|timm|hf)_.*)$")
REFUSED = {  # which people will meet -> why
    "multimodal_cfg": "as of CoCa, whose texts end in a class token with a mask of its own",
    "timm_model_name": "an image tower of timm's, as of NaFlex, MobileCLIP and SigLIP (of which "
                       "transformers' folders are known)",
    "hf_model_name": "a text tower of transformers'",
    "hf_tokenizer_name": "another tokenizer than OpenAI's",
    "layers": "a ResNet's; OpenAI's are known, by their own names",
}
FITS = {"shortest": "crop", "squash": "squash", "longest": "pad"}  # open_clip's -> ours


def read_open_clip(name: str, whole: dict[str, Any], folder: Optional[Path] = None) -> Model:
    config, pictures = whole.get("model_cfg", whole), whole.get("preprocess_cfg", {})
    image, text = {**IMAGE, **config["vision_cfg"]}, {**TEXT, **config["text_cfg"]}
    parts = {"": config, "vision_cfg.": image, "text_cfg.": text, "preprocess_cfg.": pictures}
    for part, key, value in [(part, *each) for part in parts for each in parts[part].items()]:
        known = KNOWN.get(part + key) or KNOWN.get(key)
        if not (value in known if known else
                isinstance(value, (int, float)) if key in {**IMAGE, **TEXT} else
                not value or key not in REFUSED and IGNORED.match(key)):
            raise unknown(name, part + key, value)
    quick, bias = config.get("quick_gelu", False), config.get("init_logit_bias")
    gelus = {"quick" if quick else (part.get("act_kwargs") or {}).get("approximate", "none")
             for part in (image, text)}
    if len(gelus) > 1:
        raise unknown(name, "text_cfg.act_kwargs", text.get("act_kwargs"))
    dims = Dimensions(
        config["embed_dim"], image["image_size"], image["patch_size"], image["width"],
        image["layers"], text["context_length"], text["vocab_size"], text["width"], text["layers"],
        image_head_dim=image["head_width"], text_head_dim=text["width"] // text["heads"],
        image_mlp=int(image["width"] * image["mlp_ratio"]),
        text_mlp=int(text["width"] * text["mlp_ratio"]), gelu=gelus.pop(),
        image_pooling="mean" if image.get("pool_type") == "avg" else "class",
        logit_bias=bias is not None, family="open_clip")
    preprocess = {
        "filter": "bilinear" if pictures.get("interpolation") == "bilinear" else "bicubic",
        "fit": FITS[pictures.get("resize_mode") or "shortest"],
        **{key: list(pictures.get(key) or OPENAI_PREPROCESS[key]) for key in ("mean", "std")}}
    config = {"embed_dim": dims.embed_dim, "vision_cfg": image, "text_cfg": text,
              "quick_gelu": quick, "init_logit_bias": bias}
    return Model(name, dims, preprocess, folder, config)


def open_clip_names(state_dict: StateDict) -> StateDict:
    """OpenAI's, but for prefixes of the text encoder, and of training on many GPUs."""
    return {re.sub(r"^(module\.)?(text\.)?", "", name): value
            for name, value in state_dict.items()}


def open_clip_model(model: Model) -> Optional[nn.Module]:
    if importlib.util.find_spec("open_clip") is None:
        return None
    from open_clip.model import CLIP

    return CLIP(**model.config)


# CLIP of transformers: config.json

OF_IMAGE = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12,
            "num_attention_heads": 12, "image_size": 224, "patch_size": 32}  # where left out
OF_TEXT = {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 12,
           "num_attention_heads": 8, "max_position_embeddings": 77, "vocab_size": 49408}
TO_OPEN_CLIP = {"hidden_size": "width", "num_hidden_layers": "layers",
                "num_attention_heads": "heads", "max_position_embeddings": "context_length"}
ACTIVATIONS = {"quick_gelu": None, "gelu": None, "gelu_new": {"approximate": "tanh"},
               "gelu_pytorch_tanh": {"approximate": "tanh"}}
UNDERSTOOD = {"hidden_act": (*ACTIVATIONS,), "layer_norm_eps": (1e-5,), "num_channels": (3,),
              "eos_token_id": (2, 49407)}
FILTERS = {2: "bilinear", 3: "bicubic"}  # Pillow's numbers
RENAMED = {  # parts of tensors' names -> OpenAI's
    "vision_model.": "visual.", "text_model.": "", "embeddings.": "",
    "encoder.layers": "transformer.resblocks", "self_attn": "attn", "layer_norm1": "ln_1",
    "layer_norm2": "ln_2", "mlp.fc1": "mlp.c_fc", "mlp.fc2": "mlp.c_proj",
    "patch_embedding": "conv1", "position_embedding.weight": "positional_embedding",
    "pre_layrnorm": "ln_pre", "post_layernorm": "ln_post", "final_layer_norm": "ln_final",
    "visual_projection.weight": "visual.proj", "text_projection.weight": "text_projection",
}


def read_clip(name: str, config: dict[str, Any], folder: Path) -> Model:
    """As open_clip's config of the same model."""
    towers, acts = [], []
    for part, defaults in ("vision_config", OF_IMAGE), ("text_config", OF_TEXT):
        theirs = {"hidden_act": "quick_gelu", **defaults, **config.get(part, {}),
                  **(config.get(f"{part}_dict") or {})}  # of older files, where it counts
        acts.append(theirs["hidden_act"])
        for key, known in UNDERSTOOD.items():
            if theirs.get(key, known[0]) not in known or acts[-1] != acts[0]:
                raise unknown(name, f"{part}.{key}", theirs[key])
        towers.append({TO_OPEN_CLIP.get(key, key): theirs[key] for key in defaults})
        inner = towers[-1].pop("intermediate_size") + 0.5  # of what is rounded down
        towers[-1] |= {"mlp_ratio": inner / theirs["hidden_size"],
                       "act_kwargs": ACTIVATIONS[acts[0]]}
    image, text = towers
    image["head_width"] = image["width"] // image.pop("heads")
    ours = {"embed_dim": config.get("projection_dim", 512), "vision_cfg": image, "text_cfg": text,
            "quick_gelu": acts[0] == "quick_gelu"}
    pictures = transformers_preprocess(name, folder, image["image_size"])
    model = read_open_clip(name, {"model_cfg": ours, "preprocess_cfg": pictures}, folder)
    return replace(model, dimensions=replace(model.dimensions, family="clip"))


def transformers_preprocess(name: str, folder: Path, side: int) -> dict[str, Any]:
    """As open_clip has it, of an image processor's config; OpenAI's where there is none."""
    found = (load_json(folder / "preprocessor_config.json")
             or load_json(folder / "processor_config.json").get("image_processor", {}))
    square, size, crop = {"height": side, "width": side}, found.get("size"), found.get("crop_size")
    cropped = size in (None, side, {"shortest_edge": side}) and crop in (None, side, square)
    if size != square and not (cropped and found.get("do_center_crop", True)):
        raise unknown(name, "preprocessor's size", [size, crop])
    if (resample := found.get("resample", 3)) not in FILTERS:
        raise unknown(name, "preprocessor's resample", resample)
    return {"mean": found.get("image_mean"), "std": found.get("image_std"),
            "interpolation": FILTERS[resample],
            "resize_mode": "squash" if size == square else "shortest"}


def clip_names(state_dict: StateDict) -> StateDict:
    """With query, key and value in one, and projections from the right."""
    from clip_ttrt.encoders import openai_name

    found = {openai_name(name, RENAMED): value for name, value in state_dict.items()}
    for name in [name for name in found if ".q_proj." in name]:
        parts = [name.replace(".q_proj.", f".{part}_proj.") for part in "qkv"]
        if found.keys() >= {*parts}:
            joined = torch.cat([found.pop(part) for part in parts])
            found[name.replace(".q_proj.", ".in_proj_")] = joined
    return {name: value.T if name in ("visual.proj", "text_projection") else value
            for name, value in found.items()}


# SigLIP of transformers: config.json


def read_siglip(name: str, config: dict[str, Any], folder: Path) -> Model:
    from clip_ttrt import siglip

    dims = siglip.dimensions_from(config)
    found = (load_json(folder / "preprocessor_config.json")
             or load_json(folder / "processor_config.json").get("image_processor", {}))
    model = Model(name, dims, siglip.preprocess_from(found, dims.image_resolution), folder, config)
    model.tokenizer()  # whose files may be missing
    return model


def siglip_encoder(model: Model, name: str, state_dict: StateDict, *called: SimpleNamespace
                   ) -> nn.Module:
    from clip_ttrt import siglip

    return siglip.ENCODERS[name](state_dict, *called, dims=model.dimensions)


def siglip_blank(model: Model) -> nn.Module:
    from clip_ttrt import siglip

    return siglip.Blank(model.dimensions)


def siglip_model(model: Model) -> Optional[nn.Module]:
    """transformers' own, with an interface as `clip` has it."""
    if importlib.util.find_spec("transformers") is None:
        return None
    from transformers import SiglipConfig, SiglipModel

    own = SiglipModel(SiglipConfig(**model.config))
    for name in ("logit_scale", "logit_bias"):
        setattr(own, name, nn.Parameter(torch.empty(())))
    own.encode_image = lambda images: own.get_image_features(images).pooler_output
    own.encode_text = lambda tokens: own.get_text_features(tokens).pooler_output

    def number(module: nn.Module, _: Any) -> None:  # positions, which no state dict has
        for part in (module.vision_model.embeddings, module.text_model.embeddings):
            count = len(part.position_embedding.weight)
            part.position_ids = torch.arange(count, device=part.position_ids.device)[None]

    own.register_load_state_dict_post_hook(number)
    return own


def siglip_tokenizer(model: Model) -> Callable[..., Tensor]:
    from clip_ttrt import tokenizers

    return tokenizers.read(model.folder, model.dimensions.context_length)


# The table


class Blank(nn.Module):
    """Our own encoders as one model, with PyTorch's initialisation; state_dict: OpenAI's naming."""

    def __init__(self, model: Model):
        from clip_ttrt import encoders

        super().__init__()
        dims = model.dimensions
        self.image, self.text = encoders.ImageEncoder(dims), encoders.TextEncoder(dims)
        scalars = {"logit_scale": torch.tensor(2.6593), "logit_bias": torch.tensor(-10.0)}
        self.scalars = nn.ParameterDict([*scalars.items()][:1 + dims.logit_bias])

    def state_dict(self) -> dict[str, Tensor]:
        return {**self.image.in_openai_naming(), **self.text.in_openai_naming(),
                **self.scalars.state_dict()}


def openai_model(model: Model) -> nn.Module:
    """The original `clip` package's model, with its own initialisation."""
    deprecations.clip()
    from clip.model import CLIP

    dims = model.dimensions
    return CLIP(dims.embed_dim, dims.image_resolution, dims.image_layers, dims.image_width,
                dims.patch_size, dims.context_length, dims.vocab_size, dims.text_width,
                dims.text_heads, dims.text_layers)


def openai_encoder(model: Model, name: str, state_dict: StateDict, *called: SimpleNamespace
                   ) -> nn.Module:
    from clip_ttrt.encoders import ENCODERS

    return ENCODERS[name](state_dict, *called, dims=model.dimensions)


def openai_tokenizer(model: Model) -> Callable[..., Tensor]:
    length = model.dimensions.context_length
    return lambda texts, truncate=False: deprecations.clip().tokenize(texts, length, truncate).int()


@dataclass(frozen=True)
class Family:
    """A row of the table, where what is left out is OpenCLIP's."""

    read: Optional[Callable[[str, dict, Path], Model]]  # a name, its config and folder
    names: Callable[[StateDict], StateDict] = dict  # its names of tensors -> those of `blank`
    weights: tuple[str, ...] = ()  # files in a folder, the best first
    blank: Callable[[Model], nn.Module] = Blank  # with the tensors that a checkpoint has
    original: Callable[[Model], Optional[nn.Module]] = open_clip_model  # None: not installed
    encoder: Callable[..., nn.Module] = openai_encoder
    tokenizer: Callable[[Model], Callable[..., Tensor]] = openai_tokenizer
    files: tuple[str, ...] = ()  # of the tokenizer, of which an artifact gets copies


OF_TRANSFORMERS = "model.safetensors", "model.safetensors.index.json", "pytorch_model.bin"
FAMILIES = {  # those of transformers under the model_type of their config.json
    "openai": Family(None, blank=openai_model, original=openai_model),
    "open_clip": Family(read_open_clip, open_clip_names, (
        "open_clip_model.safetensors", "open_clip_pytorch_model.safetensors",
        "open_clip_pytorch_model.bin")),
    "clip": Family(read_clip, clip_names, OF_TRANSFORMERS),
    "siglip": Family(read_siglip, dict, OF_TRANSFORMERS, siglip_blank, siglip_model, siglip_encoder,
                     siglip_tokenizer, ("tokenizer_config.json", "spiece.model", "tokenizer.json")),
}
