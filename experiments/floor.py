"""The library floor of an encoder: the sum of the fastest single library kernels, with no gaps.

Matrix products with bias (PyTorch's linear, which is cuBLAS on a GPU; in fp8 those of the blocks
are torch._scaled_mm), attention (the fastest of
what scaled_dot_product_attention offers, on packed and on separate tensors) and layer norms, each
timed alone, in cache, and multiplied by how often an encoder needs it.  Elementwise work and
gathers count as fused into their neighbours.  `experiments.sweep` writes it as the backend `floor`.
"""
import contextlib
import statistics
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from clip_ttrt.errors import UserError
from clip_ttrt.models import Dimensions
from experiments.baselines import DTYPES, allow_tf32
from experiments.timing import launch_times_us

LIBRARIES = {
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
}  # of scaled_dot_product_attention


@dataclass(frozen=True)
class Work:
    """What an encoder computes."""

    products: tuple[tuple[int, int, int, int], ...]  # of blocks: rows, inputs, outputs, times
    others: tuple[tuple[int, int, int, int], ...]  # patches and the projection to features
    attention: tuple[int, int, int, bool, int, int]  # batch, width, tokens, causal, heads, times
    norms: tuple[tuple[int, int, int], ...]  # rows, width, times

    @property
    def flops(self) -> float:
        """Operations of the products and of attention."""
        *shape, _, times = self.attention
        products = sum(2 * m * k * n * count for m, k, n, count in (*self.products, *self.others))
        return products + attention_flops(*shape) * times


def attention_flops(batch: int, width: int, tokens: int, causal: bool) -> float:
    """Operations of one attention, half of them with the causal mask."""
    return 4 * batch * width * tokens**2 * (0.5 if causal else 1)


def work_of(dims: Dimensions, encoder: str, batch: int) -> Work:
    """The work of an encoder: the last block's MLP and output projection see one row a sample."""
    if encoder == "image" and dims.is_resnet:
        raise UserError("the floor is a transformer's; of a ResNet measure --encoders text")
    if encoder == "image":
        width, layers, heads = dims.image_width, dims.image_layers, dims.image_heads
        tokens = dims.image_tokens
        patches = [(batch * (tokens - 1), 3 * dims.patch_size**2, width, 1)]
        norms = [(batch * tokens, width, 1)]
    else:
        width, layers, heads = dims.text_width, dims.text_layers, dims.text_heads
        tokens, patches, norms = dims.context_length, [], []
    rows = batch * tokens
    block = [(width, width), (width, 4 * width), (4 * width, width)]
    products = [(rows, width, 3 * width, layers)]
    products += [(rows, inputs, outputs, layers - 1) for inputs, outputs in block]
    products += [(batch, inputs, outputs, 1) for inputs, outputs in block]
    others = [*patches, (batch, width, dims.embed_dim, 1)]
    norms += [(rows, width, 2 * layers - 1), (batch, width, 2)]
    attention = (batch, width, tokens, encoder == "text", heads, layers)
    return Work(tuple(products), tuple(others), attention, tuple(norms))


def split(qkv: torch.Tensor, heads: int) -> tuple[torch.Tensor, ...]:
    """Packed projections [B, T, 3·heads·D] as three views [B, heads, T, D]."""
    return qkv.unflatten(2, (3, heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)


def attend(library: str, causal: bool) -> Callable[..., torch.Tensor]:
    """scaled_dot_product_attention with one of LIBRARIES."""

    def run(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        with sdpa_kernel(LIBRARIES[library]):
            return F.scaled_dot_product_attention(q, k, v, is_causal=causal)

    return run


def scaled(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, one: torch.Tensor
           ) -> torch.Tensor:  # fmt: skip
    """A linear layer of E4M3 tensors; `one` stands for both scales."""
    return torch._scaled_mm(
        x, weight.t(), one, one, bias=bias, out_dtype=bias.dtype, use_fast_accum=True
    )


def floor_ms(dims: Dimensions, encoder: str, batch: int, precision: str, device: str
             ) -> dict[str, float]:  # fmt: skip
    """Milliseconds of the products, of attention, of the norms, and their sum."""
    allow_tf32(precision)

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, device=device, dtype=DTYPES[precision])

    def median_ms(launch: Callable[..., object], *inputs) -> float:
        return statistics.median(launch_times_us(launch, [inputs], device, seconds=0.05)) / 1e3

    work = work_of(dims, encoder, batch)
    parts = {"products": 0.0, "norms": 0.0}
    one = torch.ones((), device=device)
    for rows, inputs, outputs, times in (*work.products, *work.others):
        x, weight, bias = randn(rows, inputs), randn(outputs, inputs), randn(outputs)
        launch = F.linear
        if precision == "fp8" and (rows, inputs, outputs, times) in work.products:
            x, weight = x.to(torch.float8_e4m3fn), weight.to(torch.float8_e4m3fn)
            launch = partial(scaled, one=one)
        parts["products"] += times * median_ms(launch, x, weight, bias)
    for rows, width, times in work.norms:
        tensors = randn(rows, width), (width,), randn(width), randn(width)
        parts["norms"] += times * median_ms(F.layer_norm, *tensors)
    _, width, tokens, causal, heads, times = work.attention
    packed, found = split(randn(batch, tokens, 3 * width), heads), []
    for layout in (packed, [part.contiguous() for part in packed]):
        for library in LIBRARIES:
            with contextlib.suppress(RuntimeError), warnings.catch_warnings():
                warnings.simplefilter("ignore")  # each library says why it takes no such input
                found.append(median_ms(attend(library, causal), *layout))
    parts["attention"] = times * min(found)
    return {**parts, "sum": sum(parts.values())}
