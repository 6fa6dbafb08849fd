"""The models: names, dimensions, and dimensions read from a checkpoint's shapes."""
from dataclasses import dataclass

from clip_ttrt.errors import UserError

HEAD_DIM = 64  # every CLIP transformer, image or text, splits its width into heads of 64


@dataclass(frozen=True)
class Dimensions:
    """Sizes of one CLIP model with a vision transformer.

    Source of the numbers: the shapes in OpenAI's checkpoints (https://github.com/openai/CLIP,
    `clip/model.py`, `build_model`).
    """

    embed_dim: int
    image_resolution: int  # pixels, height and width
    patch_size: int  # pixels
    image_width: int
    image_layers: int
    context_length: int  # tokens of a full-length text
    vocab_size: int
    text_width: int
    text_layers: int

    @property
    def image_heads(self) -> int:
        return self.image_width // HEAD_DIM

    @property
    def text_heads(self) -> int:
        return self.text_width // HEAD_DIM

    @property
    def image_tokens(self) -> int:
        """Patches plus the class token."""
        return (self.image_resolution // self.patch_size) ** 2 + 1


MODELS = {
    "demo": Dimensions(256, 112, 16, 192, 6, 77, 49408, 128, 4),
    "ViT-B/32": Dimensions(512, 224, 32, 768, 12, 77, 49408, 512, 12),
    "ViT-B/16": Dimensions(512, 224, 16, 768, 12, 77, 49408, 512, 12),
    "ViT-L/14": Dimensions(768, 224, 14, 1024, 24, 77, 49408, 768, 12),
    "ViT-L/14@336px": Dimensions(768, 336, 14, 1024, 24, 77, 49408, 768, 12),
}

RESNETS = ("RN50", "RN101", "RN50x4", "RN50x16", "RN50x64")


def dimensions_of(name: str) -> Dimensions:
    """The row of the table for a model's name.

    Raises UserError for an unknown name (the message lists the known ones) and for OpenAI's
    ResNet models, which are known and not supported yet.
    """
    if name in MODELS:
        return MODELS[name]
    if name in RESNETS:
        raise UserError(f"{name} is one of OpenAI's ResNet models, which are not supported yet; "
                        f"supported: {', '.join(MODELS)}")
    raise UserError(f"unknown model {name!r}; known: {', '.join([*MODELS, *RESNETS])}")


def dimensions_from(state_dict) -> Dimensions:
    """Dimensions from the shapes of a state dict in OpenAI's naming.

    Raises UserError where the tensors are not those of a CLIP model with a vision transformer.
    """
    if "visual.layer1.0.conv1.weight" in state_dict:
        raise UserError("these weights are a CLIP model with a ResNet, which is not supported yet")
    try:
        patch = state_dict["visual.conv1.weight"]
        image_positions = state_dict["visual.positional_embedding"].shape[0]
        grid = round((image_positions - 1) ** 0.5)
        if grid * grid + 1 != image_positions:
            raise UserError(f"these weights are not a CLIP model: {image_positions} image positions are not a square grid and a class token")
        return Dimensions(
            embed_dim=state_dict["text_projection"].shape[1],
            image_resolution=patch.shape[-1] * grid,
            patch_size=patch.shape[-1],
            image_width=patch.shape[0],
            image_layers=count_blocks(state_dict, "visual.transformer.resblocks."),
            context_length=state_dict["positional_embedding"].shape[0],
            vocab_size=state_dict["token_embedding.weight"].shape[0],
            text_width=state_dict["ln_final.weight"].shape[0],
            text_layers=count_blocks(state_dict, "transformer.resblocks."),
        )
    except (KeyError, IndexError, AttributeError) as missing:
        raise UserError(f"these weights are not a CLIP model in OpenAI's naming: {missing}") from missing


def count_blocks(state_dict, prefix: str) -> int:
    """How many transformer blocks are stored under a prefix."""
    return len({key[len(prefix):].split(".")[0] for key in state_dict if key.startswith(prefix)})
