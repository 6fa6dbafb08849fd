"""The library floor of an encoder: the sum of the fastest single library kernels, with no gaps.

Matrix products with bias (PyTorch's linear, which is cuBLAS on a GPU), attention (the fastest of
what scaled_dot_product_attention offers, on packed and on separate tensors) and layer norms, each
timed alone and multiplied by how often an encoder needs it.  Elementwise work and gathers count
as fused into their neighbours.  `experiments.sweep` writes it as the backend `floor`.
"""
import contextlib
import statistics
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F

from clip_ttrt.models import HEAD_DIM, Dimensions
from experiments.baselines import DTYPES, allow_tf32
from experiments.timing import graphed, median_ms, wall_times_ms

LAUNCHES = 20
LONG_MS = 1.0  # beside which the launch of a CUDA graph, some microseconds, is nothing


@dataclass(frozen=True)
class Work:
    """What an encoder computes."""

    products: tuple[tuple[int, int, int, int], ...]  # rows, inputs, outputs, times
    attention: tuple[int, int, int, bool, int]  # batch, heads, tokens, causal, times
    norms: tuple[tuple[int, int, int], ...]  # rows, width, times

    @property
    def flops(self) -> float:
        """Operations of the products and of attention (half of it with the causal mask)."""
        batch, heads, tokens, causal, times = self.attention
        products = sum(2 * m * k * n * count for m, k, n, count in self.products)
        attention = 4 * batch * heads * tokens**2 * HEAD_DIM * times
        return products + attention * (0.5 if causal else 1)


def work_of(dims: Dimensions, encoder: str, batch: int) -> Work:
    """The work of an encoder: the last block's MLP and output projection see one row a sample."""
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
    products = [*patches, (rows, width, 3 * width, layers)]
    products += [(rows, inputs, outputs, layers - 1) for inputs, outputs in block]
    products += [(batch, inputs, outputs, 1) for inputs, outputs in block]
    products.append((batch, width, dims.embed_dim, 1))
    norms += [(rows, width, 2 * layers - 1), (batch, width, 2)]
    attention = (batch, heads, tokens, encoder == "text", layers)
    return Work(tuple(products), attention, tuple(norms))


def milliseconds(call: Callable[[], object], device: str) -> float:
    """Median of one call: as a CUDA graph, of several calls where its own launch would count."""
    if device == "cpu":
        return statistics.median(wall_times_ms(call, 5, 1, device))

    def several():
        for _ in range(LAUNCHES):
            call()

    one = median_ms(graphed(call), 5, warm_up=2)
    return one if one > LONG_MS else median_ms(graphed(several), 20) / LAUNCHES


def attention_ms(
    batch: int, heads: int, tokens: int, causal: bool, device: str, dtype: torch.dtype
) -> float:
    """The fastest of scaled_dot_product_attention's libraries that take this input."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    packed = torch.randn(batch, tokens, 3, heads, HEAD_DIM, device=device, dtype=dtype)
    packed = packed.permute(2, 0, 3, 1, 4)

    def attend(layout: torch.Tensor) -> Callable[[], torch.Tensor]:
        return lambda: F.scaled_dot_product_attention(*layout.unbind(0), is_causal=causal)

    if device == "cpu":
        return milliseconds(attend(packed), device)
    times = []
    for layout in (packed, packed.contiguous()):
        for name in ("CUDNN_ATTENTION", "FLASH_ATTENTION", "EFFICIENT_ATTENTION"):
            library = sdpa_kernel(getattr(SDPBackend, name))
            with contextlib.suppress(RuntimeError), warnings.catch_warnings(), library:
                warnings.simplefilter("ignore")  # each library says why it takes no such input
                times.append(milliseconds(attend(layout), device))
    return min(times)


def floor_ms(
    dims: Dimensions, encoder: str, batch: int, precision: str, device: str
) -> dict[str, float]:
    """Milliseconds of the products, of attention, of the norms, and their sum."""
    allow_tf32(precision)
    dtype = DTYPES[precision]

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, device=device, dtype=dtype)

    work = work_of(dims, encoder, batch)
    parts = {"products": 0.0, "attention": 0.0, "norms": 0.0}
    with torch.no_grad():
        for rows, inputs, outputs, times in work.products:
            x, weight, bias = randn(rows, inputs), randn(outputs, inputs), randn(outputs)
            product = milliseconds(partial(F.linear, x, weight, bias), device)
            parts["products"] += times * product
        *shape, times = work.attention
        parts["attention"] = times * attention_ms(*shape, device, dtype)
        for rows, width, times in work.norms:
            x, scale = randn(rows, width), randn(width)
            norm = milliseconds(partial(F.layer_norm, x, (width,), scale, scale), device)
            parts["norms"] += times * norm
    return {**parts, "sum": sum(parts.values())}
