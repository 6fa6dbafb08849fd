"""The image encoder of OpenAI's ResNets, as `encoders.py` has the transformers.

It is `ModifiedResNet` of the package `clip` with three exact rearrangements: batch norms are folded
into the convolutions before them, attention pooling projects its one query and no token, and the
bias of its values is in that of the projection behind it.
"""
from typing import Any, Mapping

import torch
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from clip_ttrt import deprecations, ops
from clip_ttrt.models import Dimensions


class AttentionPool(nn.Module):
    """The op `attention_pool` and the projection to features: [B, C, S, S] -> [B, embed_dim].

    own: clip's, in fp64."""

    called: Any = ops

    def __init__(self, own: nn.Module):
        super().__init__()
        self.positional_embedding = own.positional_embedding
        self.q_proj, self.k_proj, self.v_proj, self.c_proj = (
            own.q_proj, own.k_proj, own.v_proj, own.c_proj)
        self.c_proj.bias += self.c_proj.weight @ self.v_proj.bias
        self.k_proj.bias = self.v_proj.bias = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.c_proj(self.called.attention_pool(
            x, self.positional_embedding, self.q_proj.weight, self.q_proj.bias,
            self.k_proj.weight, self.v_proj.weight))


class ImageEncoder(nn.Module):
    """Images [B, 3, R, R], any float dtype -> features fp32 [B, embed_dim]."""

    called: Any = ops

    def __init__(self, dims: Dimensions):
        super().__init__()
        deprecations.clip()
        from clip.model import ModifiedResNet

        self.net = ModifiedResNet(dims.image_layers, dims.embed_dim, dims.image_heads,
                                  dims.image_resolution, dims.image_width)

    @torch.no_grad()
    def load(self, state_dict: Mapping[str, torch.Tensor]) -> "ImageEncoder":
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
        self.net.attnpool = AttentionPool(self.net.attnpool)
        return self.float().requires_grad_(False)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        dtype = self.net.conv1.weight.dtype
        x = images if images.dtype == dtype else self.called.cast(images, dtype)
        for layer in self.net.children():
            x = layer(x)
        wide = torch.promote_types(dtype, torch.float)
        return x if dtype == wide else self.called.cast(x, wide)
