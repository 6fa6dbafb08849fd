"""Times CLIP's linear layers: cuBLASLt's with measured algorithms, with its own first suggestion, and PyTorch's.

    python -m experiments.linear_bench --out DIR                  all shapes
    python -m experiments.linear_bench --out DIR --encoder B32-1  those of one encoder and batch (may be repeated)

Needs a GPU, PyTorch and the library that `python -m clip_ttrt.build_kernels` makes; not TensorRT.  Writes DIR/linear.csv row by row, and
at the end of an encoder prints what all of its linear layers take together, by kernel.

A row is a shape and a kernel, `measured` or `suggested`.  The library is torch.nn.functional.linear
of this Python, with PyTorch's own settings.  Times are medians over replays of a CUDA graph of many launches, which take turns
over weights that together exceed the L2 cache, as an encoder's do; the input stays in the cache, where an encoder's previous
kernel leaves it.  Graphs of all kernels take turns, so that clocks are the same for all.  Errors are the largest against float64.
"""
import argparse
import dataclasses
import math
import statistics
import sys
import time
from pathlib import Path
from typing import Callable

import torch

from clip_ttrt import linear
from clip_ttrt.models import MODELS
from experiments import record
from experiments.timing import gpu_times_ms, graphed

COLD_BYTES, MOST_LAUNCHES = 96 << 20, 64
KERNELS = ("measured", "suggested")


@dataclasses.dataclass(frozen=True)
class Shape:
    """A linear layer for some rows, and how many of them an encoder has."""

    rows: int
    inputs: int
    outputs: int
    count: int
    bias: bool = False


def encoder_shapes(batch: int, tokens: int, width: int, layers: int, embed_dim: int, patch_inputs: int = 0) -> list[Shape]:
    """The linear layers of an encoder as the plugins leave them: no biases, and in the last block one row of each sample."""
    rows = batch * tokens
    shapes = [Shape(rows, width, 3 * width, layers), Shape(rows, width, width, layers - 1), Shape(rows, width, 4 * width, layers - 1),
              Shape(rows, 4 * width, width, layers - 1), Shape(batch, width, width, 1), Shape(batch, width, 4 * width, 1),
              Shape(batch, 4 * width, width, 1), Shape(batch, width, embed_dim, 1)]
    return shapes + ([Shape(rows - batch, patch_inputs, width, 1)] if patch_inputs else [])


def image(model: str, batch: int) -> list[Shape]:
    dims = MODELS[model]
    return encoder_shapes(batch, dims.image_tokens, dims.image_width, dims.image_layers, dims.embed_dim, 3 * dims.patch_size**2)


def text(model: str, batch: int) -> list[Shape]:
    dims = MODELS[model]
    return encoder_shapes(batch, dims.context_length, dims.text_width, dims.text_layers, dims.embed_dim)


ENCODERS = {
    "B32-1": image("ViT-B/32", 1), "B32-32": image("ViT-B/32", 32), "B32-128": image("ViT-B/32", 128), "text77-32": text("ViT-B/32", 32),
    "L14-32": image("ViT-L/14", 32), "bias": [Shape(1600, 768, 768, 1, bias=True)],
}


def medians_us(calls: list[Callable[[], object]], launches: int, seconds: float) -> list[float]:
    """Median time of a launch for each call of so many; the calls take turns, at least 10 of them."""
    times: list[list[float]] = [[] for _ in calls]
    started = time.monotonic()
    while len(times[0]) < 10 or (len(times[0]) < 100 and time.monotonic() - started < seconds):
        for call, measured in zip(calls, times):
            measured += gpu_times_ms(call, repeats=1, warm_up=0 if measured else 2)
    return [statistics.median(measured) * 1e3 / launches for measured in times]


def bench(shape: Shape, seconds: float, about: dict[str, str], path: Path) -> list[float]:
    """Writes a row for each kernel; returns their times and PyTorch's in microseconds."""
    sets = min(MOST_LAUNCHES, max(4, math.ceil(COLD_BYTES / (2 * shape.inputs * shape.outputs))))
    generator = torch.Generator("cuda").manual_seed(0)
    x = torch.randn(shape.rows, shape.inputs, generator=generator, device="cuda").half()
    weights = torch.randn(sets, shape.outputs, shape.inputs, generator=generator, device="cuda").mul_(shape.inputs**-0.5).half()
    bias = torch.randn(shape.outputs, generator=generator, device="cuda").half() if shape.bias else None
    size = (shape.outputs, shape.inputs)
    tables = [linear.tune([shape.rows], size, shape.bias), linear.pack(*size, shape.bias)]
    functions = [lambda weight, table=table: linear.linear(x, weight, bias, table) for table in tables]
    functions.append(lambda weight: torch.nn.functional.linear(x, weight, bias))
    exact = torch.nn.functional.linear(x.double(), weights[0].double(), None if bias is None else bias.double())
    errors = [float((function(weights[0]).double() - exact).abs().max()) for function in functions]
    del exact
    calls = [graphed(lambda function=function: [function(weight) for weight in weights]) for function in functions]
    times = medians_us(calls, sets, seconds)
    for kernel, us, error in zip(KERNELS, times, errors):
        record.append_row(path, {
            "kernel": kernel, "rows": shape.rows, "inputs": shape.inputs, "outputs": shape.outputs, "bias": int(shape.bias),
            "us": f"{us:.3f}", "tflops": f"{2e-6 * shape.rows * shape.inputs * shape.outputs / us:.1f}", "library_us": f"{times[-1]:.3f}",
            "ratio": f"{us / times[-1]:.3f}", "max_error": f"{error:.3g}", "library_error": f"{errors[-1]:.3g}", **about,
        })
    return times


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="directory for linear.csv")
    parser.add_argument("--encoder", choices=list(ENCODERS), action="append", help="time this encoder's shapes only (may be repeated)")
    parser.add_argument("--seconds", type=float, default=600, help="begin no shape after this long")
    parser.add_argument("--time-seconds", type=float, default=0.2, help="time spent on each shape's replays")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("linear_bench: no CUDA device")
        return 2
    about = {"cublaslt": str(linear.version()), "gpu": torch.cuda.get_device_name(), "commit": record.commit()}
    started = time.monotonic()
    for encoder in options.encoder or ENCODERS:
        totals = [0.0] * (len(KERNELS) + 1)
        for shape in ENCODERS[encoder]:
            if time.monotonic() - started > options.seconds:
                print(f"linear_bench: stopped in {encoder} after {options.seconds:.0f} s")
                return 1
            for i, us in enumerate(bench(shape, options.time_seconds, about, options.out / "linear.csv")):
                totals[i] += shape.count * us
        print(f"TOTAL {encoder}: " + ", ".join(f"{name} {us:.1f} us" for name, us in zip((*KERNELS, "PyTorch"), totals)), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
