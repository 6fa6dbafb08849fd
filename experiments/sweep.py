"""Latency of every backend over models, precisions, batches and text lengths: OUT/sweep.csv.

    python -m experiments.sweep --grid quick            the embedded model on two CPU cores, within five minutes
    python -m experiments.sweep --grid h200             the full grid; stops and resumes where it was

Each row runs in a fresh process: a crash, a timeout or an exhausted GPU is a row with its `error`, a missing backend a row
that says why, and neither ends the sweep.  Rows that are there already are skipped.  `--python NAME=PATH` runs one backend
with another interpreter, such as a newer PyTorch for torch.compile.  `floor_ms` is measured in the row's own process.
"""
import argparse
import itertools
import json
import statistics
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any, Callable, Iterator, Sequence

import torch

from clip_ttrt.models import dimensions_of
from clip_ttrt.progress import Progress
from experiments.baselines import BACKENDS, Missing, Request
from experiments.floor import floor_ms, work_of
from experiments.record import append_row, provenance, read_rows
from experiments.timing import graphed, times_ms

COLUMNS = ("model", "encoder", "backend", "attention", "precision", "batch", "tokens", "resolution", "cuda_graph", "median_ms", "p90_ms", "p99_ms",
           "per_second", "tflops", "floor_ms", "engine_mib", "gpu_memory_mib", "build_s", "torch", "tensorrt", "gpu", "commit", "error")
KEY = ("model", "encoder", "backend", "precision", "batch", "tokens", "cuda_graph")
ROW_SECONDS = 900
RESULT = "sweep-row "  # marks the line of a child's output that holds its row

# name: (models, backends, precisions, batches, text lengths, with and without CUDA graph)
GRIDS: dict[str, tuple[Sequence, ...]] = {
    "quick": (("demo",), ("clip_eager", "eager_sdpa", "onnxruntime", "clip_ttrt_native"), ("fp32",), (1, 8), (77,), (False,)),
    "h200": (("ViT-B/32", "ViT-L/14", "ViT-B/16", "ViT-L/14@336px", "demo"), tuple(BACKENDS), ("fp16", "fp32"), (1, 8, 32, 128, 512), (77, 16, 32, 48), (True, False)),
}


def rows_of(grid: str, device: str) -> Iterator[tuple[str, Request, bool]]:
    """(backend, request, CUDA graph) of every row of a grid, the full text length and CUDA graphs first."""
    models, names, precisions, batches, lengths, graphs = GRIDS[grid]
    for length, graph, model, precision, batch, encoder, backend in itertools.product(lengths, graphs, models, precisions, batches, ("image", "text"), names):
        dims = dimensions_of(model)
        if encoder == "image" and length != dims.context_length:
            continue
        tokens = dims.image_tokens if encoder == "image" else length
        yield backend, Request(model, "demo" if model == "demo" else "random", encoder, precision, batch, tokens, device), graph and device == "cuda"


def blank_row(backend: str, request: Request, graph: bool) -> dict[str, Any]:
    """A row with what is known before measuring."""
    dims = dimensions_of(request.model)
    return {**dict.fromkeys(COLUMNS, ""), "model": request.model, "encoder": request.encoder, "backend": backend, "precision": request.precision,
            "batch": str(request.batch), "tokens": str(request.tokens), "resolution": str(dims.image_resolution) if request.encoder == "image" else "",
            "cuda_graph": str(graph), **provenance()}


def latencies(call: Callable[[], object], device: str) -> list[float]:
    """Milliseconds of single calls after warm-up: between CUDA events, or by the clock on the CPU."""
    if device == "cuda":
        return times_ms(call, repeats=200, warm_up=20)
    times = []
    for _ in range(23):
        begin = time.perf_counter()
        call()
        times.append((time.perf_counter() - begin) * 1e3)
    return times[3:]


def measure(backend: str, request: Request, graph: bool) -> dict[str, Any]:
    """One row, in this process."""
    row, dims = blank_row(backend, request, graph), dimensions_of(request.model)
    try:
        with torch.no_grad():
            subject = BACKENDS[backend](request)
            call = subject.call
            if graph and not subject.brings_graphs:
                call = graphed(call)
            times = latencies(call, request.device)
            row["gpu_memory_mib"] = str(torch.cuda.mem_get_info()[1] - torch.cuda.mem_get_info()[0] >> 20) if request.device == "cuda" else ""
            floor = floor_ms(dims, request.encoder, request.batch, request.tokens, request.precision, request.device)["sum"]
    except Missing as reason:
        return {**row, "error": f"skipped: {reason}"}
    median, cuts = statistics.median(times), statistics.quantiles(times, n=100, method="inclusive")
    flops = work_of(dims, request.encoder, request.batch, request.tokens).flops
    return {**row, "attention": subject.attention, "median_ms": f"{median:.4f}", "p90_ms": f"{cuts[89]:.4f}", "p99_ms": f"{cuts[98]:.4f}",
            "per_second": f"{request.batch / median * 1e3:.1f}", "tflops": f"{flops / median / 1e9:.3f}", "floor_ms": f"{floor:.4f}",
            "engine_mib": subject.engine_mib, "build_s": f"{subject.build_s:.1f}"}


def in_a_process(python: str, backend: str, request: Request, graph: bool, seconds: float) -> dict[str, Any]:
    """One row, in a process of its own; whatever goes wrong there is the row's error."""
    specification = json.dumps({"backend": backend, "request": asdict(request), "graph": graph})
    try:
        done = subprocess.run([python, "-m", "experiments.sweep", "--row", specification], capture_output=True, text=True, timeout=seconds)
    except subprocess.TimeoutExpired:
        return {**blank_row(backend, request, graph), "error": f"took over {seconds:.0f} s"}
    for line in done.stdout.splitlines():
        if line.startswith(RESULT):
            return json.loads(line[len(RESULT):])
    said = (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
    return {**blank_row(backend, request, graph), "error": f"exit code {done.returncode}: {said[:200]}"}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--grid", choices=GRIDS, default="quick")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, default=Path("results"))
    parser.add_argument("--python", metavar="BACKEND=PATH", nargs="*", default=[], help="another interpreter for a backend")
    parser.add_argument("--models", nargs="+", help="only these of the grid's models")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="start no row after so many seconds; the next run goes on")
    parser.add_argument("--row", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.row:
        given = json.loads(options.row)
        print(RESULT + json.dumps(measure(given["backend"], Request(**given["request"]), given["graph"])))
        return 0
    interpreters = dict(pair.split("=", 1) for pair in options.python)
    path, progress, start = options.out / "sweep.csv", Progress(), time.perf_counter()
    done = {tuple(row[name] for name in KEY) for row in read_rows(path)}
    wanted = [row for row in rows_of(options.grid, options.device) if not options.models or row[1].model in options.models]
    wanted = [row for row in wanted if tuple(blank_row(*row)[name] for name in KEY) not in done]
    for index, (backend, request, graph) in enumerate(wanted):
        elapsed = time.perf_counter() - start
        if elapsed > options.seconds:
            progress.say(f"stopped after {elapsed:.0f} s with {len(wanted) - index} rows to go")
            break
        left = f", about {elapsed / index * (len(wanted) - index):.0f} s left" if index else ""
        progress.say(f"[{index + 1}/{len(wanted)}{left}] {request.model} {request.encoder} {backend} {request.precision} batch {request.batch}")
        append_row(path, in_a_process(interpreters.get(backend, sys.executable), backend, request, graph, ROW_SECONDS))
    return 0


if __name__ == "__main__":
    sys.exit(main())
