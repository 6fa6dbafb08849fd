"""The module that is saved: an encoder behind checks that hold wherever TorchScript runs.

Torch-TensorRT's runtime ignores what TensorRT answers to a wrong shape, and reads its input's
memory through a temporary when that is not contiguous.
"""
from typing import List

import torch
from torch import nn

from clip_ttrt import deprecations
from clip_ttrt.models import Dimensions
from clip_ttrt.options import BatchRange

SHORT = (16, 32, 48)  # lengths of texts below the full one


def lengths_of(encoder: str, dims: Dimensions) -> List[int]:
    """The sizes of an input's last axis that an encoder serves, ascending: below a text's full one
    where attention is causal, so that what stands behind the pooled row is without effect."""
    if encoder == "image":
        return [dims.image_resolution]
    full = dims.context_length
    return [*(each for each in SHORT if each < full and not dims.is_siglip), full]


class Guarded(nn.Module):
    """An encoder that accepts just what it was compiled for.

    forward(x): x [B, *shape] with B in the batch range, texts also shorter, from lengths[0] on, on
    the encoder's device; floating point for images and integers for tokens, of any width.  Returns
    features float32 [B, embed_dim], NaN for a row of tokens with an id outside the vocabulary.
    Raises ValueError (from C++: an exception with the same text) for anything else.
    """

    def __init__(self, encoder: torch.jit.ScriptModule, example: torch.Tensor, batch: BatchRange,
                 lengths: List[int]):
        super().__init__()
        self.encoder = encoder
        self.shape: List[int] = list(example.shape[1:])
        self.shortest: int = lengths[0]
        self.accepts = f"{self.shape}" + (f", from {lengths[0]} on" if len(lengths) > 1 else "")
        self.dtype = example.dtype
        self.floating: bool = example.is_floating_point()
        self.minimum: int = batch.minimum
        self.maximum: int = batch.maximum
        self.on_cuda: bool = example.is_cuda

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if (x.dim() != len(self.shape) + 1 or x.size()[1:-1] != self.shape[:-1]
                or not self.shortest <= x.size(-1) <= self.shape[-1]):
            raise ValueError(f"expected an input of shape [batch] + {self.accepts}, got {x.size()}")
        if x.size(0) < self.minimum or x.size(0) > self.maximum:
            raise ValueError(f"batch {x.size(0)} is outside the compiled range {self.minimum} "
                             f"to {self.maximum}")
        if x.is_floating_point() != self.floating or x.is_complex():
            kind = "floating-point images" if self.floating else "integer tokens"
            raise ValueError(f"expected {kind}, got another type")
        if x.is_cuda != self.on_cuda:
            raise ValueError(f"expected an input on the {'GPU' if self.on_cuda else 'CPU'}")
        if x.dtype == torch.int64:  # an id beyond int32 may not come back into the vocabulary
            x = x.clamp(-1, 2147483647)
        return self.encoder(x.to(self.dtype).contiguous()).float()


def trace(encoder: nn.Module, example: torch.Tensor) -> torch.jit.ScriptModule:
    """An encoder or engine as a TorchScript module; example: an input within its batch range."""
    with torch.no_grad(), deprecations.hidden():
        return torch.jit.trace(encoder, (example,), check_trace=False)
