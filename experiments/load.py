"""Throughput under load: a closed loop of clients, each with its module and its stream: OUT, a row a setting.

    python -m experiments.load --model ViT-B/32 --backends clip_ttrt_plugin_range clip_eager --artifacts artifacts --out results/h200/load.csv

A client is a thread that has one request in flight: a batch lies in pinned host memory, is copied to the GPU, encoded and
its features are copied back, and then the next one starts.  Clients of clip_ttrt have a module each, loaded anew, since a
TensorRT execution context serves one call at a time; those of the eager models share the weights.  Pictures are float32 on
the host whatever the engine computes in, as the model's interface takes them, and texts int32.  With --graph a client replays a
CUDA graph of its own.  On the CPU nothing is copied.  Run it with nothing else on the machine's cores:
launches and threads wait for them.
"""
import argparse
import itertools
import math
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Callable, Sequence

import torch

from clip_ttrt.models import dimensions_of
from clip_ttrt.options import BatchRange
from clip_ttrt.progress import Progress
from experiments.baselines import BACKENDS, Missing, Request, Subject, example
from experiments.floor import turn
from experiments.record import append_row, provenance, read_rows

COLUMNS = ("model", "encoder", "backend", "attention", "precision", "batch", "threads", "cuda_graph", "input_dtype", "seconds", "requests", "items_per_second",
           "p50_ms", "p95_ms", "p99_ms", "torch", "tensorrt", "gpu", "commit", "error")
KEY = ("model", "encoder", "backend", "precision", "batch", "threads", "cuda_graph")
WARM_UP = 3


class Client:
    """One batch in host memory, and how it is encoded."""

    def __init__(self, run: Callable[[torch.Tensor], torch.Tensor], rows: torch.Tensor, device: str, graph: bool):
        self.run, self.device = run, device
        self.latencies: list[float] = []
        self.began = self.ended = 0.0
        if device == "cpu":
            self.rows = rows.cpu()
            return
        self.stream = torch.cuda.Stream()
        self.rows, self.inside = rows.cpu().pin_memory(), torch.empty_like(rows, device="cuda")
        with torch.no_grad(), torch.cuda.stream(self.stream):
            for _ in range(WARM_UP):
                features = run(self.inside.copy_(self.rows, non_blocking=True))
            self.stream.synchronize()
            self.features = torch.empty_like(features, device="cpu").pin_memory()
            if graph:
                recorded = torch.cuda.CUDAGraph()
                with torch.cuda.graph(recorded, stream=self.stream):
                    result = run(self.inside)

                def replay(_: torch.Tensor) -> torch.Tensor:
                    recorded.replay()
                    return result

                self.run = replay

    def request(self) -> None:
        """Encode the batch once, from host memory to host memory."""
        if self.device == "cpu":
            self.run(self.rows)
            return
        with torch.cuda.stream(self.stream):
            self.inside.copy_(self.rows, non_blocking=True)
            self.features.copy_(self.run(self.inside), non_blocking=True)
            self.stream.synchronize()

    def loop(self, barrier: threading.Barrier, seconds: float) -> None:
        """Requests one after the other, for so many seconds after all clients are ready."""
        with torch.no_grad():  # a switch of each thread
            for _ in range(WARM_UP):
                self.request()
            barrier.wait()
            self.began = self.ended = time.perf_counter()
            while self.ended - self.began < seconds:
                begin = time.perf_counter()
                self.request()
                self.ended = time.perf_counter()
                self.latencies.append(self.ended - begin)


def drive(clients: Sequence[Client], seconds: float) -> tuple[float, list[float]]:
    """Run all clients at once; seconds from the first one's start to the last one's end, and every request's latency in ms.

    Raises what a client raised.
    """
    barrier, problems = threading.Barrier(len(clients)), []

    def guarded(client: Client) -> None:
        try:
            client.loop(barrier, seconds)
        except Exception as problem:
            problems.append(problem)
            barrier.abort()

    threads = [threading.Thread(target=guarded, args=(client,)) for client in clients]
    for client in clients:
        client.latencies.clear()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if real := [problem for problem in problems if not isinstance(problem, threading.BrokenBarrierError)]:
        raise real[0]
    wall = max(client.ended for client in clients) - min(client.began for client in clients)
    return wall, sorted(latency * 1e3 for client in clients for latency in client.latencies)


def percentile(ordered: Sequence[float], share: float) -> float:
    """The smallest of the ordered values that is not exceeded by at least this share of them (nearest rank)."""
    return ordered[max(0, math.ceil(len(ordered) * share) - 1)]


def modules(subject: Subject, count: int) -> list[Callable[[torch.Tensor], torch.Tensor]]:
    """A subject's callable for each client: a module of its own where one serves one call at a time, else the same."""
    return [subject.run, *(subject.load_again() if subject.load_again else subject.run for _ in range(count - 1))]


def serves_any(backend: str) -> bool:
    """Whether one subject of a backend serves other batches as well."""
    return backend.endswith("_range") or backend in ("clip_eager", "eager_sdpa")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--encoders", nargs="+", choices=("image", "text"), default=["image", "text"])
    parser.add_argument("--backends", nargs="+", choices=tuple(BACKENDS), default=["clip_ttrt_native_range"])
    parser.add_argument("--precision", choices=("fp16", "fp32"), help="default: fp16 on a GPU, fp32 on the CPU")
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 8, 32])
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2, 4, 8])
    parser.add_argument("--graph", choices=("with", "without", "both"), default="both", help="CUDA graphs, where the backend can be captured")
    parser.add_argument("--range", default="1:32:256", metavar="MIN:OPT:MAX", help="what the backends that end in _range compile for")
    parser.add_argument("--seconds", type=float, default=2.0, help="of each setting")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--artifacts", type=Path)
    parser.add_argument("--out", type=Path, default=Path("results/load.csv"))
    options = parser.parse_args()
    if min(*options.threads, *options.batches, 1) < 1:
        parser.error("--threads and --batches take positive numbers")
    served_range = BatchRange.parse(options.range)
    if any(name.endswith("_range") for name in options.backends) and not all(served_range.minimum <= batch <= served_range.maximum for batch in options.batches):
        parser.error(f"--batches {' '.join(map(str, options.batches))} do not all lie within --range {served_range}")
    device, progress, dims = options.device, Progress(), dimensions_of(options.model)
    precision = options.precision or ("fp16" if device == "cuda" else "fp32")
    graphs = [graph for graph in (True, False) if options.graph in ("both", "with" if graph else "without")] if device == "cuda" else [False]
    done = {tuple(row[name] for name in KEY) for row in read_rows(options.out)}
    for encoder, backend in itertools.product(options.encoders, options.backends):
        subject, runs, served = None, [], None
        for batch, graph, count in itertools.product(options.batches, graphs, options.threads):
            key = (options.model, encoder, backend, precision, str(batch), str(count), str(graph))
            if key in done:
                continue
            row = {**dict.fromkeys(COLUMNS, ""), **dict(zip(KEY, key)), **provenance()}
            try:
                if served != batch:
                    request = Request(options.model, "demo" if options.model == "demo" else "random", encoder, precision, batch,
                                      dims.image_tokens if encoder == "image" else dims.context_length, device,
                                      artifacts=str(options.artifacts.resolve()) if options.artifacts else "", batches=options.range)
                    if subject is not None and serves_any(backend):
                        subject = replace(subject, x=example(request, subject.x.dtype))
                    else:
                        subject, runs = None, []
                        subject = BACKENDS[backend](request)
                        runs = modules(subject, max(options.threads))
                    served = batch
                if graph and (subject.uncapturable or subject.brings_graphs):
                    raise Missing(f"no CUDA graph: {subject.uncapturable or 'it replays its own'}")
                with turn():
                    clients = [Client(run, subject.x, device, graph) for run in runs[:count]]
                    wall, latencies = drive(clients, options.seconds)
            except Missing as reason:
                append_row(options.out, {**row, "error": f"skipped: {reason}"})
                continue
            progress.say(f"{options.model} {encoder} {backend} batch {batch}, {count} threads{', CUDA graph' if graph else ''}: "
                         f"{len(latencies) * batch / wall:.0f} a second")
            append_row(options.out, {
                **row, "attention": subject.attention, "input_dtype": str(subject.x.dtype).removeprefix("torch."), "seconds": f"{wall:.2f}",
                "requests": str(len(latencies)), "items_per_second": f"{len(latencies) * batch / wall:.1f}", "p50_ms": f"{percentile(latencies, 0.5):.4f}",
                "p95_ms": f"{percentile(latencies, 0.95):.4f}", "p99_ms": f"{percentile(latencies, 0.99):.4f}", "error": subject.remark})
    return 0


if __name__ == "__main__":
    sys.exit(main())
