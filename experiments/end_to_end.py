"""Milliseconds of whole encoders in fp16, a row a measurement: results/h200/end_to_end.csv.

    python -m experiments.end_to_end --backend clip_ttrt --attention plugin --models ViT-L/14 --encoders image --batches 32
    python -m experiments.end_to_end --backend torch_compile ...      (with any newer PyTorch: it needs no TensorRT)
    python -m experiments.end_to_end --backend eager ...

Backends: `clip_ttrt`, engines of one static batch; `torch_compile`, our plain encoders with PyTorch's
scaled_dot_product_attention under torch.compile(mode="reduce-overhead"), the strongest free alternative; `eager`, the
same without compiling.  Random weights and inputs; medians of CUDA-graph replays after warm-up (torch.compile brings
its own graphs; eager runs without).  Compare rows of one run only.
"""
import argparse
import itertools
import tempfile
import time
from pathlib import Path

import torch

from clip_ttrt.artifact import load_modules
from clip_ttrt.encoders import DIFFERENTIABLE, ImageEncoder, TextEncoder
from clip_ttrt.models import Dimensions, dimensions_of
from experiments.accuracy import compiled
from experiments.record import append_row, provenance
from experiments.timing import graphed, median_ms

ROUNDS = 3


def plain_encoder(encoder: str, dims: Dimensions) -> torch.nn.Module:
    """Our encoder with random weights, half, on the GPU, its attention PyTorch's own."""
    module = (ImageEncoder if encoder == "image" else TextEncoder)(dims, DIFFERENTIABLE)
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    return module.eval().requires_grad_(False).cuda().half()


def random_input(encoder: str, dims: Dimensions, batch: int, dtype: torch.dtype) -> torch.Tensor:
    """Images [B, 3, R, R] or tokens int32 [B, 77], random, on the GPU."""
    if encoder == "image":
        return torch.randn(batch, 3, dims.image_resolution, dims.image_resolution, device="cuda", dtype=dtype)
    return torch.randint(1, 49407, (batch, dims.context_length), device="cuda", dtype=torch.int32)


def measure(backend: str, attention: str, model: str, encoder: str, batch: int, artifacts: Path) -> tuple[float, float]:
    """Milliseconds of one call and seconds that building took (of an artifact: when it was built)."""
    dims = dimensions_of(model)
    start = time.perf_counter()
    with torch.no_grad():
        if backend == "clip_ttrt":
            made = compiled(artifacts, model, "random", "fp16", str(batch), attention)
            module = load_modules(made)[encoder]
            x = random_input(encoder, dims, batch, torch.float32)
            call, built = graphed(lambda: module(x)), made.manifest["modules"][encoder]["build_seconds"]
        else:
            module = plain_encoder(encoder, dims)
            x = random_input(encoder, dims, batch, torch.half)
            if backend == "torch_compile":
                module = torch.compile(module, mode="reduce-overhead", fullgraph=True)
                for _ in range(3):
                    module(x)
                torch.cuda.synchronize()

            built = time.perf_counter() - start

            def call():
                return module(x)

        return sorted(median_ms(call) for _ in range(ROUNDS))[ROUNDS // 2], built


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backend", choices=("clip_ttrt", "torch_compile", "eager"), default="clip_ttrt")
    parser.add_argument("--attention", choices=("native", "plugin"), nargs="+", default=["native"], help="for clip_ttrt")
    parser.add_argument("--models", nargs="+", default=["ViT-B/32"])
    parser.add_argument("--encoders", nargs="+", default=["image", "text"])
    parser.add_argument("--batches", nargs="+", type=int, default=[32])
    parser.add_argument("--artifacts", type=Path, help="folder from which artifacts are taken, and in which new ones stay")
    parser.add_argument("--out", type=Path, default=Path("results/h200/end_to_end.csv"))
    options = parser.parse_args()
    attentions = options.attention if options.backend == "clip_ttrt" else ["sdpa"]
    with tempfile.TemporaryDirectory() as temporary:
        for model, encoder, batch, attention in itertools.product(options.models, options.encoders, options.batches, attentions):
            milliseconds, built = measure(options.backend, attention, model, encoder, batch, options.artifacts or Path(temporary))
            append_row(options.out, {"model": model, "encoder": encoder, "backend": options.backend, "attention": attention, "precision": "fp16", "batch": batch,
                                     "median_ms": f"{milliseconds:.4f}", "per_second": f"{batch / milliseconds * 1e3:.0f}", "build_s": f"{built:.1f}", **provenance()})


if __name__ == "__main__":
    main()
