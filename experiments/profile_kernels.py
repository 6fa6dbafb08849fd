"""Where an engine's time goes, kernel by kernel: results/h200/profile.csv.

    python -m experiments.profile_kernels --model ViT-L/14 --encoder image --batch 32 --attention native plugin

TensorRT fuses a whole encoder without plugins into one layer, so its own profiler shows one number; the kernels that the
GPU ran (through PyTorch's profiler) show what is inside.  Microseconds are sums over one call, averaged over calls.
"""
import argparse
import re
import tempfile
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from clip_ttrt.artifact import load_modules
from clip_ttrt.models import dimensions_of
from experiments.accuracy import compiled
from experiments.baselines import Request, example
from experiments.record import append_row, provenance

CALLS = 10

# The first that matches names a kernel's kind.
KINDS = (
    ("attention", r"hopper_kernel|portable_kernel|short_kernel|attention|mha\d|fmha"),
    ("softmax", r"[Ss]oftmax|MaxSubExp|_Max.*Exp"),
    ("matrix product", r"gemm|xmma_fprop|cublas|cutlass|nvjet|splitKreduce|gemv"),
    ("layer norm", r"Mea.*Div|Mea.*Sqr|CasMeaSub|LayerNorm|layer_norm_kernel|embed_image_kernel"),
    ("activation", r"NegExp|quick_gelu_kernel"),
    ("bias", r"_Add$"),
    ("copy and transpose", r"Tra|Mov|Reformat|permutation|nhwc|copy|Res|extract_patches_kernel"),
)


def kind_of(kernel: str) -> str:
    """What a kernel does, from its name; TensorRT's compiler writes the operations it fused into it."""
    return next((kind for kind, pattern in KINDS if re.search(pattern, kernel)), "other")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="ViT-L/14")
    parser.add_argument("--encoder", default="image")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--attention", choices=("native", "plugin"), nargs="+", default=["native", "plugin"])
    parser.add_argument("--artifacts", type=Path)
    parser.add_argument("--out", type=Path, default=Path("results/h200/profile.csv"))
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        for attention in options.attention:
            made = compiled(options.artifacts or Path(temporary), options.model, "random", "fp16", str(options.batch), attention)
            module = load_modules(made)[options.encoder]
            x = example(Request(options.model, "random", options.encoder, "fp16", options.batch, dimensions_of(options.model).context_length, "cuda"))
            with torch.no_grad():
                for _ in range(5):
                    module(x)
                torch.cuda.synchronize()
                with profile(activities=[ProfilerActivity.CUDA]) as recorded:
                    for _ in range(CALLS):
                        module(x)
                    torch.cuda.synchronize()
            kernels = [event for event in recorded.key_averages() if event.cuda_time_total > 0]
            for event in sorted(kernels, key=lambda event: -event.cuda_time_total):
                append_row(options.out, {
                    "model": options.model, "encoder": options.encoder, "batch": options.batch, "attention": attention, "kind": kind_of(event.key),
                    "kernel": event.key[:160], "launches": f"{event.count / CALLS:.1f}", "us": f"{event.cuda_time_total / CALLS:.1f}", **provenance()})


if __name__ == "__main__":
    main()
