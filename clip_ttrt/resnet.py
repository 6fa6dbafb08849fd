"""The image encoder of OpenAI's ResNets in plain PyTorch, as `encoders.py` has the transformers.

Equal to `ModifiedResNet` in `clip/model.py`, with its names and three exact rearrangements: batch
norms are folded into the convolutions before them, attention pooling projects its one query and no
token, and the bias of its values is in that of the projection behind it.
"""
from types import SimpleNamespace
from typing import Mapping

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

from clip_ttrt.models import Dimensions, dimensions_from


class Bottleneck(nn.Module):
    """A residual block, a stride as average pools: [B, C, S, S] -> [B, 4·width, S/stride, ..]."""

    def __init__(self, channels: int, width: int, stride: int):
        super().__init__()
        self.stride, same = stride, stride == 1 and channels == 4 * width
        self.conv1 = nn.Conv2d(channels, width, 1)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1)
        self.conv3 = nn.Conv2d(width, 4 * width, 1)
        self.downsample = nn.Sequential(*[] if same else [nn.Conv2d(channels, 4 * width, 1)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        inner = F.relu(self.conv2(F.relu(self.conv1(x))))
        if self.stride > 1:
            x, inner = F.avg_pool2d(x, self.stride), F.avg_pool2d(inner, self.stride)
        return F.relu(self.conv3(inner) + self.downsample(x))


class AttentionPool(nn.Module):
    """The op `attention_pool` and the projection to features: [B, C, S, S] -> [B, embed_dim]."""

    def __init__(self, width: int, tokens: int, embed_dim: int, called: SimpleNamespace):
        super().__init__()
        self.called = called
        self.positional_embedding = nn.Parameter(torch.empty(tokens, width))
        self.q_proj, self.c_proj = nn.Linear(width, width), nn.Linear(width, embed_dim)
        self.k_proj, self.v_proj = (nn.Linear(width, width, bias=False) for _ in range(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.c_proj(self.called.attention_pool(
            x, self.positional_embedding, self.q_proj.weight, self.q_proj.bias,
            self.k_proj.weight, self.v_proj.weight))


class ImageEncoder(nn.Module):
    """Images [B, 3, R, R], any float dtype -> features fp32 [B, embed_dim]."""

    def __init__(self, dims: Dimensions, called: SimpleNamespace):
        super().__init__()
        self.called, channels = called, dims.image_width
        self.conv1 = nn.Conv2d(3, channels // 2, 3, stride=2, padding=1)
        self.conv2 = nn.Conv2d(channels // 2, channels // 2, 3, padding=1)
        self.conv3 = nn.Conv2d(channels // 2, channels, 3, padding=1)
        for stage, count in enumerate(dims.image_layers):
            layer, width = nn.Sequential(), dims.image_width << stage
            for i in range(count):
                layer.append(Bottleneck(channels, width, 2 if stage and i == 0 else 1))
                channels = 4 * width
            self.add_module(f"layer{stage + 1}", layer)
        self.attnpool = AttentionPool(channels, dims.image_tokens, dims.embed_dim, called)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        dtype = self.conv1.weight.dtype
        x = images if images.dtype == dtype else self.called.cast(images, dtype)
        for convolution in (self.conv1, self.conv2, self.conv3):
            x = F.relu(convolution(x))
        x = self.layer4(self.layer3(self.layer2(self.layer1(F.avg_pool2d(x, 2)))))
        x, wide = self.attnpool(x), torch.promote_types(dtype, torch.float)
        return x if dtype == wide else self.called.cast(x, wide)


def image_encoder(state_dict: Mapping[str, torch.Tensor], called: SimpleNamespace) -> ImageEncoder:
    """The encoder of a state dict in OpenAI's naming, fp32, in evaluation mode."""
    encoder = ImageEncoder(dimensions_from(state_dict), called)
    theirs = {name.removeprefix("visual."): value for name, value in state_dict.items()}
    values = {name: theirs[name] for name in encoder.state_dict() if name in theirs}
    of_values, weight, bias = (theirs[f"attnpool.{name}"].double() for name in (
        "v_proj.bias", "c_proj.weight", "c_proj.bias"))
    values["attnpool.c_proj.bias"] = bias + weight @ of_values
    for name, module in encoder.named_modules():
        if isinstance(module, nn.Conv2d):
            norm = name.replace("conv", "bn").replace("downsample.0", "downsample.1")
            weight, mean, variance, scale, shift = (theirs[each].double() for each in (
                f"{name}.weight", f"{norm}.running_mean", f"{norm}.running_var", f"{norm}.weight",
                f"{norm}.bias"))
            values[f"{name}.weight"], values[f"{name}.bias"] = fuse_conv_bn_weights(
                weight, None, mean, variance, 1e-5, scale, shift)
    encoder.load_state_dict(values)
    return encoder.eval().requires_grad_(False)
