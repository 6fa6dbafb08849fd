"""Families of models: how each one's files are read, and its tensors' names mapped to OpenAI's.

A row of FAMILIES is its package, which reads configs and has the original model, and what makes a
`Model` of that.  What has been compiled runs without it.
"""
import functools
import json
import re
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Callable, Mapping, Optional

import torch
from torch import Tensor, nn

from clip_ttrt import deprecations, tokenizers
from clip_ttrt.errors import UserError
from clip_ttrt.models import MODELS, Dimensions
from clip_ttrt.transform import MEAN, STD, fitted, transform

HUB, PACKAGE = "hf-hub:", "open_clip:"  # before a name
# Arguments of `resize.Preprocess` that OpenAI's models have.
OPENAI_PREPROCESS = {"filter": "bicubic", "fit": "crop", "mean": [*MEAN], "std": [*STD]}
StateDict = Mapping[str, Tensor]


@dataclass(frozen=True)
class Model:
    """What a name stands for, known before any weights are read, and what an artifact is of."""

    name: str
    dimensions: Dimensions
    preprocess: Mapping[str, Any] = field(default_factory=OPENAI_PREPROCESS.copy)
    folder: Optional[Path] = None  # of the model's files, or of an artifact
    original: Optional[Callable[[], nn.Module]] = None  # its family's, as that initialises it
    files: tuple[str, ...] = ()  # of weights in the folder, the best first
    names: Callable[[StateDict], StateDict] = dict  # of the original's tensors -> OpenAI's

    def weights(self) -> list[Path]:
        """The files of its own weights; UserError where there are none."""
        for pattern in self.files:
            if self.name.startswith(HUB):
                hub(self.name, pattern)
            if paths := sorted(self.folder.glob(pattern)):
                return paths
        raise UserError(f"{self.name} comes with no {' or '.join(self.files) or 'weights'} of its "
                        "own; give --weights FILE or random")

    def encoder(self, name: str, state_dict: StateDict) -> nn.Module:
        """Our encoder, image or text, of the original's tensors: fp32, in evaluation mode."""
        from clip_ttrt.encoders import ENCODERS

        return ENCODERS[name](self.dimensions).load(self.names(state_dict))

    def tokenizer(self) -> Callable[..., Tensor]:
        """Texts, truncate=False -> tokens int32 [N, T]; RuntimeError for a text that is longer."""
        length = self.dimensions.context_length
        if self.dimensions.is_siglip:
            return tokenizers.read(self.folder, length)
        return lambda texts, truncate=False: (
            deprecations.clip().tokenize(texts, length, truncate).int())

    def fitted(self, picture: Any) -> Any:
        """A PIL image of any mode as the model has it: another, RGB, R x R."""
        return fitted(picture, self.dimensions.image_resolution, **self.preprocess)

    def transform(self) -> Callable[[Any], Tensor]:
        """From a PIL image of any mode to float32 [3, R, R], of OpenAI's steps or open_clip's."""
        return functools.partial(
            transform, resolution=self.dimensions.image_resolution, **self.preprocess)


def find(name: str) -> Model:
    """A model by its name in the table, `open_clip:NAME`, `hf-hub:ORG/NAME` or a folder.

    Raises UserError for an unknown name, what is not served of a model, and a missing package.
    """
    if name in MODELS:
        return Model(name, MODELS[name], original=functools.partial(openai_model, MODELS[name]))
    family = "open_clip"
    try:
        folder = hub(name, "*.json", "*.model") if name.startswith(HUB) else Path(name)
        if not (name.startswith(PACKAGE) or (folder / "open_clip_config.json").is_file()):
            family = json.loads((folder / "config.json").read_text()).get("model_type")
            check(name, "", {"model_type": family}, {"model_type": ("clip", "siglip")})
        model = FAMILIES[family][1](name, folder)
    except UserError:
        raise
    except ImportError as problem:
        package = FAMILIES[family][0]
        raise UserError(f"{name} is read by the package {package} ({problem}): pip install "
                        f"'clip_ttrt[{package}]'") from problem
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as problem:
        reason = str(problem).strip().partition("\n")[0]
        raise UserError(f"unknown model {name!r}; known: {', '.join(MODELS)}, {PACKAGE}NAME, {HUB}"
                        "ORG/NAME, and folders with open_clip_config.json or config.json "
                        f"({reason})") from problem
    model.tokenizer()  # whose files may be missing
    return model


@functools.cache
def hub(name: str, *patterns: str) -> Path:
    """The folder of a repository's files in the user's cache, downloaded where they are not."""
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(name.removeprefix(HUB), allow_patterns=[*patterns]))


def check(name: str, part: str, found: Mapping[str, Any], served: Mapping[str, Any]) -> None:
    """UserError for a setting of a config's part that is not served; served: values, or a type."""
    for key, value in found.items():
        known = served.get(key, ())
        if not (isinstance(value, known) if isinstance(known, type) else value in known):
            raise UserError(f"{name} is not supported: its {part}{key} is {value!r}, "
                            f"{REFUSED.get(key, 'which is unknown here')}")


REFUSED = {  # which people will meet -> why
    "multimodal_cfg": "as of CoCa", "hf_model_name": "a text tower of transformers'",
    "timm_model_name": "an image tower of timm's, as of NaFlex; of SigLIP take transformers' files"}


# OpenCLIP: open_clip_config.json

FILTERS = {3: "bicubic", 2: "bilinear"}  # Pillow's numbers
FITS = {"shortest": "crop", "squash": "squash", "longest": "pad"}
OPEN_CLIP = {  # settings that may differ from their defaults
    **dict.fromkeys("embed_dim vision_cfg text_cfg quick_gelu custom_text init_logit_scale "
                    "init_logit_bias nonscalar_logit_scale width heads head_width mlp_ratio "
                    "patch_size context_length patch_dropout size mean std".split(), object),
    "layers": int, "image_size": int,  # no ResNet's, no rectangle's
    "pool_type": ("tok", "avg", "argmax"), "resize_mode": FITS, "interpolation": FILTERS.values(),
}


def read_open_clip(name: str, folder: Path) -> Model:
    import open_clip

    def read(part: str, kind: type, given: Mapping[str, Any]) -> Any:
        defaults = {key: (value,) for key, value in asdict(kind()).items()}
        check(name, f"{part}.", given, defaults | OPEN_CLIP)
        return kind(**given)

    packaged = Path(open_clip.__file__).parent / f"model_configs/{name.removeprefix(PACKAGE)}.json"
    whole = json.loads((packaged if name.startswith(PACKAGE) else
                        folder / "open_clip_config.json").read_text())
    config = whole.get("model_cfg", whole)
    check(name, "", config, OPEN_CLIP)
    image = read("vision_cfg", open_clip.CLIPVisionCfg, config["vision_cfg"])
    text = read("text_cfg", open_clip.CLIPTextCfg, config["text_cfg"])
    pictures = read(
        "preprocess_cfg", open_clip.transform.PreprocessCfg, whole.get("preprocess_cfg", {}))
    dims = Dimensions(
        config["embed_dim"], image.image_size, image.patch_size, image.width, image.layers,
        text.context_length, text.vocab_size, text.width, text.layers,
        image_head_dim=image.head_width, text_head_dim=text.width // text.heads,
        image_mlp=int(image.width * image.mlp_ratio), text_mlp=int(text.width * text.mlp_ratio),
        gelu="quick" if config.get("quick_gelu") else "none",
        image_pooling="mean" if image.pool_type == "avg" else "class", family="open_clip")
    preprocess = {"filter": pictures.interpolation, "fit": FITS[pictures.resize_mode],
                  "mean": [*pictures.mean], "std": [*pictures.std]}
    arguments = {key: value for key, value in config.items() if key != "custom_text"}
    return Model(name, dims, preprocess, folder, lambda: open_clip.CLIP(**arguments), (
        "open_clip_model.safetensors", "open_clip_pytorch_model.safetensors",
        "open_clip_pytorch_model.bin"))


# CLIP and SigLIP of transformers: config.json

GELUS = {"quick_gelu": "quick", "gelu": "none", "gelu_new": "tanh", "gelu_pytorch_tanh": "tanh"}
TOWER = {"clip": {"hidden_act": GELUS, "layer_norm_eps": (1e-5,), "vocab_size": (49408,),
                  "eos_token_id": (2, 49407)},
         "siglip": {"hidden_act": ("gelu_pytorch_tanh",), "layer_norm_eps": (1e-6,),
                    "vision_use_head": (True,)}}
RENAMED = {  # parts of tensors' names -> OpenAI's
    "text_model.head.weight": "text_projection", "text_model.head.bias": "text_projection_bias",
    "vision_model.": "visual.", "text_model.": "", "embeddings.": "",
    "encoder.layers": "transformer.resblocks", "self_attn": "attn", "layer_norm1": "ln_1",
    "layer_norm2": "ln_2", "mlp.fc1": "mlp.c_fc", "mlp.fc2": "mlp.c_proj",
    "patch_embedding": "conv1", "position_embedding.weight": "positional_embedding",
    "pre_layrnorm": "ln_pre", "post_layernorm": "ln_post", "final_layer_norm": "ln_final",
    "visual_projection.weight": "visual.proj", "text_projection.weight": "text_projection",
}


def read_transformers(name: str, folder: Path) -> Model:
    from transformers import AutoConfig, AutoImageProcessor, AutoModel

    config = AutoConfig.from_pretrained(folder)
    family, image, text = config.model_type, config.vision_config, config.text_config
    is_siglip, side = family == "siglip", image.image_size
    of_text = {"hidden_act": (image.hidden_act,), "projection_size": (image.hidden_size,)}
    for part, also in (("vision_config", {}), ("text_config", of_text)):
        served, found = TOWER[family] | also, getattr(config, part).to_dict()
        check(name, f"{part}.", {key: found[key] for key in served if key in found}, served)
    dims = Dimensions(
        image.hidden_size if is_siglip else config.projection_dim, side, image.patch_size,
        image.hidden_size, image.num_hidden_layers, text.max_position_embeddings, text.vocab_size,
        text.hidden_size, text.num_hidden_layers,
        image_head_dim=image.hidden_size // image.num_attention_heads,
        text_head_dim=text.hidden_size // text.num_attention_heads,
        image_mlp=image.intermediate_size, text_mlp=text.intermediate_size,
        gelu=GELUS[image.hidden_act], image_pooling="probe" if is_siglip else "class",
        family=family)
    pictures = AutoImageProcessor.from_pretrained(folder, backend="pil").to_dict()
    square = {"height": side, "width": side}
    fit = "squash" if pictures["size"] == square else "crop"
    served = {"do_resize": (True,), "do_rescale": (True,), "do_normalize": (True,),
              "resample": FILTERS, "rescale_factor": (1 / 255,)}
    if fit == "crop":
        served |= {"size": ({"shortest_edge": side},), "do_center_crop": (True,),
                   "crop_size": (square,)}
    check(name, "preprocessor's ", {key: pictures.get(key) for key in served}, served)
    preprocess = {"filter": FILTERS[pictures["resample"]], "fit": fit,
                  "mean": [*pictures["image_mean"]], "std": [*pictures["image_std"]]}

    def original() -> nn.Module:
        own = AutoModel.from_config(config).float()
        own.encode_image = lambda images: own.get_image_features(images).pooler_output
        own.encode_text = lambda tokens: own.get_text_features(tokens).pooler_output
        return own

    return Model(name, dims, preprocess, folder, original, (
        "model.safetensors", "model-*-of-*.safetensors", "pytorch_model.bin"), transformers_names)


def renamed(name: str, parts: Mapping[str, str]) -> str:
    """A tensor's name with parts of it, of whole words, in another's naming."""
    words = "|".join(map(re.escape, parts))
    return re.sub(rf"\b({words})\b", lambda part: parts[part[0]], name)


def transformers_names(state_dict: StateDict) -> StateDict:
    """OpenAI's, with query, key and value in one, and projections that multiply from the right."""
    found = {renamed(name, RENAMED): value for name, value in state_dict.items()}
    for name in {"visual.proj", "text_projection"} & {*found}:
        found[name] = found[name].T
    for name in [name for name in found if ".q_proj." in name]:
        parts = [found.pop(name.replace(".q_", f".{each}_")) for each in "qkv"]
        found[name.replace(".q_proj.", ".in_proj_")] = torch.cat(parts)
    return found


def openai_model(dims: Dimensions) -> nn.Module:
    """The original `clip` package's model."""
    deprecations.clip()
    from clip.model import CLIP

    return CLIP(dims.embed_dim, dims.image_resolution, dims.image_layers, dims.image_width,
                dims.patch_size, dims.context_length, dims.vocab_size, dims.text_width,
                dims.text_heads, dims.text_layers)


FAMILIES = {  # those of transformers under the model_type of their config.json
    "openai": ("clip", None), "open_clip": ("open_clip", read_open_clip),
    "clip": ("transformers", read_transformers), "siglip": ("transformers", read_transformers),
}
