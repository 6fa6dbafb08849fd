"""Dimensions of models small enough to try many things on: a ResNet, and vision transformers."""
from clip_ttrt import families
from clip_ttrt.models import MODELS, Dimensions

RESNET = Dimensions(64, 64, 32, 16, [2, 1, 1, 1], 8, 100, 64, 2)
VIT = Dimensions(64, 64, 16, 64, 2, 8, 100, 64, 2)
# OpenCLIP's: heads, inner widths and GELU as of H/14, g/14 and bigG/14, and other poolings.
OF_80 = Dimensions(64, 64, 16, 160, 3, 8, 100, 128, 2, 80, gelu="none", family="open_clip")
OF_88 = Dimensions(64, 64, 16, 176, 2, 8, 100, 128, 2, 88, image_mlp=768, text_mlp=558,
                   gelu="none", image_pooling="mean", family="open_clip")
OF_104 = Dimensions(64, 64, 16, 208, 2, 8, 100, 160, 2, 104, 80, image_mlp=1024, text_mlp=640,
                    gelu="tanh", image_pooling="mean", family="open_clip")
# SigLIP's, with heads as of SO400M.
OF_SIGLIP = Dimensions(144, 64, 14, 144, 2, 8, 100, 128, 2, 72, image_mlp=576, text_mlp=512,
                       gelu="tanh", image_pooling="probe", family="siglip")


def add(monkeypatch, **models):
    """Names with dimensions in the table of models, each of its family's own kind."""
    openai = families.openai_model
    monkeypatch.setattr(families, "openai_model", lambda dims: {
        "open_clip": of_open_clip, "siglip": of_siglip}.get(dims.family, openai)(dims))
    for name, dims in models.items():
        monkeypatch.setitem(MODELS, name, dims)


def of_open_clip(dims):
    import open_clip

    text = {"width": dims.text_width, "heads": dims.text_heads, "layers": dims.text_layers,
            "context_length": dims.context_length, "vocab_size": dims.vocab_size,
            "mlp_ratio": dims.text_mlp / dims.text_width or 4.0}
    image = {"width": dims.image_width, "head_width": dims.image_head_dim,
             "layers": dims.image_layers, "image_size": dims.image_resolution,
             "patch_size": dims.patch_size, "mlp_ratio": dims.image_mlp / dims.image_width or 4.0,
             "pool_type": "avg" if dims.image_pooling == "mean" else "tok"}
    return open_clip.CLIP(dims.embed_dim, image, text)


def of_siglip(dims):
    import transformers

    image, text = ({
        "hidden_size": getattr(dims, f"{part}_width"),
        "intermediate_size": getattr(dims, f"{part}_mlp"),
        "num_hidden_layers": getattr(dims, f"{part}_layers"),
        "num_attention_heads": getattr(dims, f"{part}_heads")} for part in ("image", "text"))
    image |= {"image_size": dims.image_resolution, "patch_size": dims.patch_size}
    text |= {"vocab_size": dims.vocab_size, "max_position_embeddings": dims.context_length,
             "projection_size": dims.embed_dim}
    own = transformers.SiglipModel(transformers.SiglipConfig(
        text_config=text, vision_config=image))
    in_own_naming = own.state_dict
    own.state_dict = lambda: families.transformers_names(in_own_naming())  # the table's
    return own
