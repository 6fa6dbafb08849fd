"""The models: names and dimensions, from one table or from a checkpoint's shapes."""
from dataclasses import dataclass

from clip_ttrt.errors import UserError

HEAD_DIM = 64  # of every CLIP transformer, image or text


@dataclass(frozen=True)
class Dimensions:
    """Sizes of one CLIP model with a vision transformer, as in OpenAI's checkpoints."""

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
        return (self.image_resolution // self.patch_size) ** 2 + 1  # patches and the class token


MODELS = {
    "demo": Dimensions(256, 112, 16, 192, 6, 77, 49408, 128, 4),
    "ViT-B/32": Dimensions(512, 224, 32, 768, 12, 77, 49408, 512, 12),
    "ViT-B/16": Dimensions(512, 224, 16, 768, 12, 77, 49408, 512, 12),
    "ViT-L/14": Dimensions(768, 224, 14, 1024, 24, 77, 49408, 768, 12),
    "ViT-L/14@336px": Dimensions(768, 336, 14, 1024, 24, 77, 49408, 768, 12),
}
RESNETS = ("RN50", "RN101", "RN50x4", "RN50x16", "RN50x64")


def dimensions_of(name: str) -> Dimensions:
    """The dimensions of a model in the table; UserError, which lists the names, for any other."""
    if name in MODELS:
        return MODELS[name]
    if name in RESNETS:
        raise UserError(f"{name} is a ResNet, not supported yet; supported: {', '.join(MODELS)}")
    raise UserError(f"unknown model {name!r}; known: {', '.join([*MODELS, *RESNETS])}")


def dimensions_from(state_dict) -> Dimensions:
    """The dimensions by the shapes of a state dict in OpenAI's naming; UserError for others."""
    def blocks(prefix: str) -> int:
        return len({name.removeprefix(prefix).partition(".")[0] for name in state_dict
                    if name.startswith(prefix)})

    try:
        patch = state_dict["visual.conv1.weight"]
        grid = round((len(state_dict["visual.positional_embedding"]) - 1) ** 0.5)
        return Dimensions(
            embed_dim=state_dict["text_projection"].shape[1],
            image_resolution=patch.shape[-1] * grid,
            patch_size=patch.shape[-1],
            image_width=patch.shape[0],
            image_layers=blocks("visual.transformer.resblocks."),
            context_length=state_dict["positional_embedding"].shape[0],
            vocab_size=state_dict["token_embedding.weight"].shape[0],
            text_width=state_dict["ln_final.weight"].shape[0],
            text_layers=blocks("transformer.resblocks."),
        )
    except (KeyError, IndexError, TypeError, AttributeError) as problem:
        raise UserError("not a CLIP model with a vision transformer, in OpenAI's naming: "
                        f"{problem}") from problem
