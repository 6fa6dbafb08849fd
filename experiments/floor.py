"""The library floor of an encoder: the sum of the fastest single library kernels for the same work, with no gaps.

    python -m experiments.floor --model ViT-B/32 --encoder image --batches 1 32 --precision fp16 [--out results/h200/floor.csv]

Matrix products with bias (PyTorch's linear, which is cuBLAS on a GPU), attention (the fastest of what
scaled_dot_product_attention offers, on packed and on separate tensors) and layer norms, each timed alone and multiplied by
how often an encoder needs it.  Elementwise work and gathers count as fused into their neighbours.  The libraries are those
of the PyTorch that runs this: the newest gives the lowest floor.  Rows that are in the file already are skipped.
"""
import argparse
import contextlib
import fcntl
import itertools
import os
import statistics
import time
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Callable, Iterator

import torch
import torch.nn.functional as F

from clip_ttrt.models import HEAD_DIM, Dimensions, dimensions_of
from experiments.record import append_row, provenance, read_rows
from experiments.timing import graphed, median_ms

KEY = ("model", "encoder", "precision", "batch", "tokens")
LAUNCHES = 20
LONG_MS = 1.0  # beside which the launch of a CUDA graph, some microseconds, is nothing
IN_ONE_GRAPH = 10


@dataclass(frozen=True)
class Work:
    """What an encoder computes: matrix products (rows, inputs, outputs, times), attention, layer norms (rows, width, times)."""

    products: tuple[tuple[int, int, int, int], ...]
    attention: tuple[int, int, int, bool, int]  # batch, heads, tokens, causal, times
    norms: tuple[tuple[int, int, int], ...]

    @property
    def flops(self) -> float:
        """Floating-point operations of the products and of attention (half of it with the causal mask)."""
        batch, heads, tokens, causal, times = self.attention
        products = sum(2 * rows * inputs * outputs * count for rows, inputs, outputs, count in self.products)
        return products + 4 * batch * heads * tokens**2 * HEAD_DIM * times * (0.5 if causal else 1)


def work_of(dims: Dimensions, encoder: str, batch: int, tokens: int) -> Work:
    """The work of an encoder; the last block's MLP and output projection see one row a sample, as our encoders do."""
    if encoder == "image":
        width, layers, heads, causal = dims.image_width, dims.image_layers, dims.image_heads, False
        patches = [(batch * (tokens - 1), 3 * dims.patch_size**2, width, 1)]
        extra_norms = [(batch * tokens, width, 1)]
    else:
        width, layers, heads, causal, patches, extra_norms = dims.text_width, dims.text_layers, dims.text_heads, True, [], []
    rows = batch * tokens
    block = [(width, width), (width, 4 * width), (4 * width, width)]
    products = [*patches, (rows, width, 3 * width, layers)]
    products += [(rows, inputs, outputs, layers - 1) for inputs, outputs in block] + [(batch, inputs, outputs, 1) for inputs, outputs in block]
    products.append((batch, width, dims.embed_dim, 1))
    norms = [*extra_norms, (rows, width, 2 * layers - 1), (batch, width, 2)]
    return Work(tuple(products), (batch, heads, tokens, causal, layers), tuple(norms))


def shared() -> bool:
    """Whether other processes measure on this GPU as well, in turns."""
    return bool(os.environ.get("CLIP_TTRT_TURN"))


@contextlib.contextmanager
def turn() -> Iterator[None]:
    """Wait until no other process that measures on this GPU holds the file that CLIP_TTRT_TURN names, and hold it; without the variable do nothing."""
    if not shared():
        yield
        return
    with open(os.environ["CLIP_TTRT_TURN"], "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def milliseconds(call: Callable[[], object], device: str, repeats: int = 20) -> float:
    """Median of one call: replays of a CUDA graph on a GPU, of several calls where its own launch would count; wall time on the CPU."""
    def several():
        for _ in range(LAUNCHES):
            call()

    if device == "cuda":
        one = median_ms(graphed(call), 5, warm_up=2)
        return one if one > LONG_MS else median_ms(graphed(several), repeats) / LAUNCHES
    call()
    times = []
    for _ in range(max(3, repeats // 4)):
        start = time.perf_counter()
        call()
        times.append((time.perf_counter() - start) * 1e3)
    return statistics.median(times)


def attention_backends() -> Iterator[Any]:
    """A context for each fused library that scaled_dot_product_attention can be told to use."""
    try:
        from torch.nn.attention import SDPBackend, sdpa_kernel  # PyTorch 2.3
    except ImportError:
        for choice in ("enable_flash", "enable_mem_efficient"):
            yield torch.backends.cuda.sdp_kernel(**{name: name == choice for name in ("enable_flash", "enable_mem_efficient", "enable_math")})
        return
    for name in ("CUDNN_ATTENTION", "FLASH_ATTENTION", "EFFICIENT_ATTENTION"):
        if hasattr(SDPBackend, name):
            yield sdpa_kernel(getattr(SDPBackend, name))


def attention_ms(batch: int, heads: int, tokens: int, causal: bool, device: str, dtype: torch.dtype) -> float:
    """The fastest of scaled_dot_product_attention's libraries that take this input, on views of packed and on separate tensors."""
    packed = torch.randn(batch, tokens, 3, heads, HEAD_DIM, device=device, dtype=dtype).permute(2, 0, 3, 1, 4)
    if device == "cpu":
        return milliseconds(lambda: F.scaled_dot_product_attention(*packed.unbind(0), is_causal=causal), device)
    times = []
    for layout in (packed, packed.contiguous()):
        query, key, value = layout.unbind(0)
        for library in attention_backends():
            with contextlib.suppress(RuntimeError), warnings.catch_warnings(), library:
                warnings.simplefilter("ignore")  # each library says why it does not take an input
                times.append(milliseconds(lambda: F.scaled_dot_product_attention(query, key, value, is_causal=causal), device))
    return min(times)


def floor_ms(dims: Dimensions, encoder: str, batch: int, tokens: int, precision: str, device: str) -> dict[str, float]:
    """Milliseconds of the products, of attention, of the norms, and their sum."""
    dtype = torch.half if precision == "fp16" else torch.float
    work, parts = work_of(dims, encoder, batch, tokens), {"products": 0.0, "attention": 0.0, "norms": 0.0}
    with torch.no_grad():
        for rows, inputs, outputs, times in work.products:
            x, weight, bias = (torch.randn(*shape, device=device, dtype=dtype) for shape in ((rows, inputs), (outputs, inputs), (outputs,)))
            parts["products"] += times * milliseconds(lambda: F.linear(x, weight, bias), device)
        *shape, times = work.attention
        parts["attention"] = times * attention_ms(*shape, device, dtype)
        for rows, width, times in work.norms:
            x, scale = torch.randn(rows, width, device=device, dtype=dtype), torch.ones(width, device=device, dtype=dtype)
            parts["norms"] += times * milliseconds(lambda: F.layer_norm(x, (width,), scale, scale), device)
    return {**parts, "sum": sum(parts.values())}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="ViT-B/32")
    parser.add_argument("--encoder", choices=("image", "text"), default="image")
    parser.add_argument("--batches", type=int, nargs="+", default=[32])
    parser.add_argument("--precision", choices=("fp32", "fp16"), default="fp16")
    parser.add_argument("--tokens", type=int, nargs="+", help="text lengths (default: the model's)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, default=Path("results/floor.csv"))
    options = parser.parse_args()
    dims = dimensions_of(options.model)
    lengths = [dims.image_tokens] if options.encoder == "image" else options.tokens or [dims.context_length]
    done = {tuple(row[name] for name in KEY) for row in read_rows(options.out)}
    for tokens, batch in itertools.product(lengths, options.batches):
        row = {"model": options.model, "encoder": options.encoder, "precision": options.precision, "batch": str(batch), "tokens": str(tokens)}
        if tuple(row.values()) in done:
            continue
        with turn():
            parts = floor_ms(dims, options.encoder, batch, tokens, options.precision if options.device == "cuda" else "fp32", options.device)
        append_row(options.out, {**row, **{f"{'floor' if name == 'sum' else name}_ms": f"{value:.4f}" for name, value in parts.items()}, **provenance()})


if __name__ == "__main__":
    main()
