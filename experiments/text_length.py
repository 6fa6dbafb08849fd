"""What a text's length costs: one encoder for each length bucket, and that trimming is exact: OUT, a row a bucket.

    python -m experiments.text_length --model ViT-B/32 --backends clip_ttrt_plugin eager_sdpa --out results/h200/text_length.csv

Under the causal mask no token sees a later one, and the features are read at the end-of-text token: what stands behind it
changes nothing, so that texts which end within 16 tokens need an encoder of 16 only.  Each bucket's encoder is compiled (or,
for eager_sdpa, captured) for its length, timed on a batch of that length, and its features for texts that end anywhere in
the bucket compared with those of the same backend at the full length.  Beside it, how long ImageNet-style prompts
(`experiments.prompts`) are.  `python -m clip_ttrt.compile` makes encoders of the full length only.
"""
import argparse
import functools
import statistics
import sys
import time
from pathlib import Path
from typing import Callable, Optional

import torch

from clip_ttrt import pipeline, kernels
from clip_ttrt.accuracy import errors
from clip_ttrt.artifact import MANIFEST, read_artifact
from clip_ttrt.backends import Backend
from clip_ttrt.checkpoint import Checkpoint
from clip_ttrt.encoders import DIFFERENTIABLE, ENCODERS
from clip_ttrt.models import dimensions_of
from clip_ttrt.options import BatchRange, Options
from clip_ttrt.progress import Progress
from experiments.accuracy import folder_name
from experiments.baselines import load_encoder, weights_of
from experiments.prompts import prompts
from experiments.floor import turn
from experiments.record import append_row, provenance, read_rows
from experiments.sweep import latencies
from experiments.timing import graphed

BUCKETS = (16, 32, 48, 77)
BACKENDS = ("clip_ttrt_plugin", "clip_ttrt_native", "eager_sdpa")
START, END = 49406, 49407
# Relative error that another order of summation may cost: rounding in the arithmetic's own precision over a dozen layers.
BOUND = {"fp32": 1e-5, "fp16": 5e-3}


def texts(batch: int, tokens: int, full: int) -> torch.Tensor:
    """Random texts int32 [B, full] that end at positions spread over 2..tokens-1, the longest of them at tokens-1."""
    generator = torch.Generator().manual_seed(tokens)
    rows = torch.randint(1, START, (batch, full), generator=generator, dtype=torch.int32)
    ends = torch.linspace(tokens - 1, 2, batch).long()
    place = torch.arange(full)
    rows[place > ends[:, None]] = 0
    rows[place == ends[:, None]] = END
    rows[:, 0] = START
    return rows


@functools.cache
def prompt_lengths() -> torch.Tensor:
    """Tokens of every prompt, start and end of text counted: int64 [prompts]."""
    from clip import clip

    return clip.tokenize(prompts()).argmax(dim=1) + 1


def encoder_of(backend: str, checkpoint: Checkpoint, precision: str, batch: int, tokens: int, device: str,
               artifacts: Optional[Path] = None) -> tuple[Callable[[torch.Tensor], torch.Tensor], str, float]:
    """A text encoder for int32 [batch, tokens]: the callable, its attention, seconds that building took.

    artifacts: a folder from which an artifact of the full length is taken (under the names of experiments.accuracy), and in
    which engines of other lengths are kept.
    Raises ValueError for what cannot run on the device.
    """
    if device == "cpu" and (precision != "fp32" or backend == "clip_ttrt_plugin"):
        raise ValueError(f"{backend} in {precision} needs a GPU")
    start = time.perf_counter()
    if backend == "eager_sdpa":
        module = ENCODERS["text"](checkpoint.state_dict, DIFFERENTIABLE).to(device, torch.half if precision == "fp16" else torch.float)
        return module, "sdpa", time.perf_counter() - start
    attention, example = backend.removeprefix("clip_ttrt_"), torch.zeros(2, tokens, dtype=torch.int32)
    if device == "cpu":
        module, _, seconds = pipeline.build_torchscript("text", checkpoint, Backend("torchscript", "cpu", "fp32", "as asked"), example, Progress(quiet=True))
        return module, attention, seconds
    kernels.load(kernels.VERSION if attention == "plugin" else None)
    kept = None
    if artifacts is not None:
        folder = artifacts / folder_name(checkpoint.model, precision, str(batch), attention)
        if tokens == checkpoint.dimensions.context_length and (folder / MANIFEST).is_file() and "text" in (made := read_artifact(folder)).encoders:
            return load_encoder(made, "text"), attention, made.manifest["modules"]["text"]["build_seconds"]
        kept = artifacts / f"{folder.name}-text-{tokens}.ts"
        if kept.is_file():
            facts = {"build_s": ""}
            return torch.jit.load(str(kept), map_location="cuda", _extra_files=facts), attention, float(facts["build_s"])
    options = Options(model=checkpoint.model, precision=precision, batch=BatchRange.parse(batch), attention=attention, backend="tensorrt")
    module, _, seconds = pipeline.build_tensorrt("text", checkpoint, options, attention, example, Progress())
    if kept is not None:
        artifacts.mkdir(parents=True, exist_ok=True)
        torch.jit.save(module, str(kept), _extra_files={"build_s": str(seconds)})
    return module, attention, seconds


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--weights", help="default: the embedded ones for demo, else random")
    parser.add_argument("--backends", nargs="+", choices=BACKENDS, default=["clip_ttrt_native"])
    parser.add_argument("--precision", choices=tuple(BOUND), help="default: fp16 on a GPU, fp32 on the CPU")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--buckets", type=int, nargs="+", default=list(BUCKETS), metavar="TOKENS")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--artifacts", type=Path, help="take engines from this folder, and keep new ones there")
    parser.add_argument("--build-only", action="store_true", help="build the engines into --artifacts, and measure nothing")
    parser.add_argument("--out", type=Path, default=Path("results/text_length.csv"))
    options = parser.parse_args()
    full = dimensions_of(options.model).context_length
    if not all(3 <= tokens <= full for tokens in options.buckets):
        parser.error(f"a bucket holds 3 to {full} tokens")
    precision, device = options.precision or ("fp16" if options.device == "cuda" else "fp32"), options.device
    checkpoint = weights_of(options.model, options.weights or ("demo" if options.model == "demo" else "random"))
    lengths, done, failed = prompt_lengths(), {(row["model"], row["backend"], row["precision"], row["batch"], row["tokens"]) for row in read_rows(options.out)}, 0
    for backend in options.backends:
        buckets = [tokens for tokens in options.buckets if (options.model, backend, precision, str(options.batch), str(tokens)) not in done]
        if options.build_only:
            for tokens in buckets:
                _, _, seconds = encoder_of(backend, checkpoint, precision, options.batch, tokens, device, options.artifacts)
                print(f"{options.model} {backend} {precision}, {tokens} tokens: built in {seconds:.1f} s", flush=True)
            continue
        if not buckets:
            continue
        whole, attention, seconds = encoder_of(backend, checkpoint, precision, options.batch, full, device, options.artifacts)
        for tokens in sorted(buckets, key=lambda tokens: (tokens != full, tokens)):
            encode, build_s = whole, seconds
            if tokens != full:
                encode, attention, build_s = encoder_of(backend, checkpoint, precision, options.batch, tokens, device, options.artifacts)
            rows = texts(options.batch, tokens, full).to(device)
            trimmed = rows[:, :tokens].contiguous()
            with torch.no_grad():
                found = errors(encode(trimmed).float(), whole(rows).float())
                call = graphed(lambda: encode(trimmed)) if device == "cuda" else lambda: encode(trimmed)
                with turn():
                    times = latencies(call, device)
            median, cuts = statistics.median(times), statistics.quantiles(times, n=100, method="inclusive")
            failed += not found.rel_max <= BOUND[precision]
            append_row(options.out, {
                "model": options.model, "backend": backend, "attention": attention, "precision": precision, "batch": options.batch, "tokens": tokens,
                "cuda_graph": device == "cuda", "median_ms": f"{median:.4f}", "p90_ms": f"{cuts[89]:.4f}", "p99_ms": f"{cuts[98]:.4f}",
                "per_second": f"{options.batch / median * 1e3:.1f}", "max_abs_error": f"{found.abs_max:.3g}", "max_rel_error": f"{found.rel_max:.3g}",
                "min_cosine": f"{found.cos_min:.8f}", "prompts": len(lengths), "mean_tokens": f"{lengths.double().mean().item():.2f}",
                "median_tokens": int(lengths.median()), "max_tokens": int(lengths.max()), "fit_share": f"{(lengths <= tokens).double().mean().item():.4f}",
                "build_s": f"{build_s:.1f}", **provenance()})
    if failed:
        print(f"{failed} buckets differ from the full length by more than {BOUND[precision]:.0e} of a feature's norm", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
