"""The models: names and dimensions."""
from dataclasses import dataclass
from typing import Union

HEAD_DIM = 64  # of OpenAI's transformers, image or text, and of a ResNet's attention pooling
RESNET_STRIDE = 32  # pixels for one token of a ResNet's pooling


@dataclass(frozen=True)
class Dimensions:
    """Sizes of one CLIP model with a vision transformer or a ResNet, and what else its encoders
    are built by.  What has a default is as in OpenAI's models."""

    embed_dim: int
    image_resolution: int  # pixels, height and width
    patch_size: int  # pixels
    image_width: int  # of a ResNet: of its first stage
    image_layers: Union[int, list[int]]  # of a ResNet: blocks of each stage
    context_length: int  # tokens of a full-length text
    vocab_size: int
    text_width: int
    text_layers: int
    image_head_dim: int = HEAD_DIM
    text_head_dim: int = HEAD_DIM
    image_mlp: int = 0  # width inside a block's MLP; 0: four times the encoder's
    text_mlp: int = 0
    gelu: str = "quick"  # of the MLPs, as `ops.gelu` approximates it
    image_pooling: str = "class"  # token; mean: of the patches, behind the last norm; or probe:
    # SigLIP's, whose encoders differ in more
    family: str = "openai"  # of `families.FAMILIES`

    @property
    def is_resnet(self) -> bool:
        return isinstance(self.image_layers, list)

    @property
    def is_siglip(self) -> bool:
        return self.image_pooling == "probe"

    @property
    def image_heads(self) -> int:
        return self.image_width * (RESNET_STRIDE if self.is_resnet else 1) // self.image_head_dim

    @property
    def text_heads(self) -> int:
        return self.text_width // self.text_head_dim

    @property
    def image_tokens(self) -> int:
        """Whole patches, and a class token or mean."""
        return (self.image_resolution // self.patch_size) ** 2 + (not self.is_siglip)


MODELS = {
    "demo": Dimensions(256, 112, 16, 192, 6, 77, 49408, 128, 4),
    "ViT-B/32": Dimensions(512, 224, 32, 768, 12, 77, 49408, 512, 12),
    "ViT-B/16": Dimensions(512, 224, 16, 768, 12, 77, 49408, 512, 12),
    "ViT-L/14": Dimensions(768, 224, 14, 1024, 24, 77, 49408, 768, 12),
    "ViT-L/14@336px": Dimensions(768, 336, 14, 1024, 24, 77, 49408, 768, 12),
    "RN50": Dimensions(1024, 224, RESNET_STRIDE, 64, [3, 4, 6, 3], 77, 49408, 512, 12),
    "RN101": Dimensions(512, 224, RESNET_STRIDE, 64, [3, 4, 23, 3], 77, 49408, 512, 12),
    "RN50x4": Dimensions(640, 288, RESNET_STRIDE, 80, [4, 6, 10, 6], 77, 49408, 640, 12),
    "RN50x16": Dimensions(768, 384, RESNET_STRIDE, 96, [6, 8, 18, 8], 77, 49408, 768, 12),
    "RN50x64": Dimensions(1024, 448, RESNET_STRIDE, 128, [3, 15, 36, 10], 77, 49408, 1024, 12),
}
