"""Throughput under load, a closed loop of clients, a row a setting: results/load.csv.

    python -m experiments.load --artifact DIR --batches 32 --threads 1 8 --contexts 4

A client is a thread with one request in flight on a CUDA stream of its own: it encodes a batch,
waits for the features, and starts again.  The column `how`:
    call    all clients share one `clip_ttrt.load(DIR, contexts=...)` (`--contexts`), warmed up,
            and call `encode_image` or `encode_text`
    graph   each client has the saved module loaded for itself and replays a CUDA graph of it
    eager   the plain PyTorch encoder, its weights shared

With `--on gpu` a batch lies in the GPU's memory and the features stay there; call and graph do the
same work: a copy of the batch into the graph's input, the replay, a copy of its output.  With
`--on host` the batch lies in pinned memory and is copied from there (by eager to the GPU, by the
others into the graph's input), and the features are copied to pinned memory.  Inputs are float32
images or int32 tokens; eager gets its images in its own precision.  On the CPU nothing is copied.
Launches and threads wait for the machine's cores: leave it nothing else to do.
"""
import argparse
import itertools
import sys
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

import clip_ttrt
from clip_ttrt.artifact import Artifact, load_modules, read_artifact
from clip_ttrt.errors import UserError
from experiments.baselines import DTYPES, example, plain
from experiments.record import append_row, label, provenance
from experiments.timing import graphed, percentile

HOWS = ("call", "graph", "eager")
WARM_UP = 3
Encode = Callable[[torch.Tensor], torch.Tensor]


def replayed(run: Encode, rows: torch.Tensor) -> Encode:
    """The replay of a CUDA graph for such rows, copied in, with an output of the caller's own."""
    inside, outside = torch.empty_like(rows, device="cuda").copy_(rows), {}
    replay = graphed(lambda: outside.update(features=run(inside)))

    def encode(rows: torch.Tensor) -> torch.Tensor:
        inside.copy_(rows, non_blocking=True)
        replay()
        return outside["features"].clone()

    return encode


class Client:
    """One batch, on the CPU or where `on` says beside a GPU, and how it is encoded."""

    def __init__(
        self, run: Encode, rows: torch.Tensor, device: str, on: str = "gpu", graph: bool = False
    ):
        self.run, self.device, self.on, self.rows = run, device, on, rows
        self.latencies: list[float] = []
        self.began = self.ended = 0.0
        if device == "cuda":
            self.stream = torch.cuda.Stream()
            self.rows = rows.cpu().pin_memory() if on == "host" else rows.cuda()
            with torch.no_grad(), torch.cuda.stream(self.stream):
                self.features = run(rows.cuda())
                self.stream.synchronize()
                if on == "host":
                    self.features = torch.empty_like(self.features, device="cpu").pin_memory()
                if graph:
                    self.run = replayed(run, rows)

    def request(self) -> None:
        """Encode the batch once, and wait for the features."""
        if self.device == "cpu":
            self.features = self.run(self.rows)
            return
        with torch.cuda.stream(self.stream):
            if self.on == "host":
                self.features.copy_(self.run(self.rows), non_blocking=True)
            else:
                self.features = self.run(self.rows)
            self.stream.synchronize()

    def loop(self, barrier: threading.Barrier, seconds: float) -> None:
        """Requests one after the other, for so many seconds after all clients are ready."""
        try:
            with torch.no_grad():  # a switch of each thread
                for _ in range(WARM_UP):
                    self.request()
                barrier.wait()
                self.began = self.ended = time.perf_counter()
                while self.ended - self.began < seconds:
                    begin = time.perf_counter()
                    self.request()
                    self.ended = time.perf_counter()
                    self.latencies.append((self.ended - begin) * 1e3)
        except Exception:
            barrier.abort()
            raise


def drive(clients: Sequence[Client], seconds: float) -> tuple[float, list[float]]:
    """Run all clients at once: seconds from the first start to the last end, latencies in ms.

    Raises what a client raised.
    """
    barrier = threading.Barrier(len(clients))
    with ThreadPoolExecutor(len(clients)) as pool:
        running = [pool.submit(client.loop, barrier, seconds) for client in clients]
    problems = [one.exception() for one in running if one.exception()]
    for problem in problems:
        if not isinstance(problem, threading.BrokenBarrierError):
            raise problem
    wall = max(client.ended for client in clients) - min(client.began for client in clients)
    return wall, [latency for client in clients for latency in client.latencies]


def encoders_of(
    artifact: Artifact, encoder: str, how: str, count: int, contexts: int, batches: Sequence[int]
) -> list[Encode]:
    """What each of the clients calls."""
    if how == "call":
        model, _ = clip_ttrt.load(artifact.folder, contexts=contexts)
        model.warmup(batches)
        return [model.encode_image if encoder == "image" else model.encode_text] * count
    if how == "graph":
        return [load_modules(artifact)[encoder] for _ in range(count)]
    manifest, device = artifact.manifest, artifact.device
    run = plain(manifest["model"], encoder, manifest["computes_in"], device)
    return [lambda rows: run(rows.to(device, non_blocking=True))] * count


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--artifact", type=Path, required=True, metavar="DIR")
    add("--encoders", nargs="+", choices=("image", "text"), help="default: the artifact's")
    add("--hows", nargs="+", choices=HOWS, help="default: all that this device has")
    add("--batches", nargs="+", type=int, default=[1, 8, 32])
    add("--threads", nargs="+", type=int, default=[1, 2, 4, 8])
    add("--contexts", type=int, default=1, help="that calls share, for how=call")
    add("--on", choices=("gpu", "host"), default="gpu", help="where batches and features lie")
    add("--seconds", type=float, default=2.0, help="of each setting")
    add("--out", type=Path, default=Path("results/load.csv"))
    options = parser.parse_args(arguments)
    if min(*options.threads, *options.batches, options.contexts) < 1:
        parser.error("--threads, --batches and --contexts take positive numbers")
    try:
        artifact = read_artifact(options.artifact)
    except UserError as problem:
        parser.error(str(problem))
    engine, device = artifact.batch, artifact.device
    if not all(engine.minimum <= batch <= engine.maximum for batch in options.batches):
        told = " ".join(map(str, options.batches))
        parser.error(f"--batches {told} do not all lie within the artifact's {engine}")
    manifest, most = artifact.manifest, max(options.threads)
    hows = options.hows or [how for how in HOWS if device == "cuda" or how != "graph"]
    for encoder, how in itertools.product(options.encoders or artifact.encoders, hows):
        eager = how == "eager"
        dtype = DTYPES[manifest["computes_in"]] if eager else torch.float32
        runs = encoders_of(artifact, encoder, how, most, options.contexts, options.batches)
        for batch, count in itertools.product(options.batches, options.threads):
            x = example(manifest["model"], encoder, batch, dtype, device)
            clients = [Client(run, x, device, options.on, how == "graph") for run in runs[:count]]
            wall, latencies = drive(clients, options.seconds)
            append_row(options.out, {
                "model": manifest["model"],
                "encoder": encoder,
                "batch": batch,
                "precision": manifest["precision"],
                "backend": "eager" if eager else label(artifact),
                "kernels": "" if eager else manifest["kernels"] or "",
                "how": "call" if eager else how,
                "threads": count,
                "contexts": options.contexts if how == "call" else "",
                "on": options.on if device == "cuda" else "cpu",
                "items_per_second": f"{len(latencies) * batch / wall:.1f}",
                **{f"p{share}_ms": f"{percentile(latencies, share / 100):.4f}"
                   for share in (50, 95, 99)},
                "requests": len(latencies),
                **provenance(manifest["versions"]),
            })  # fmt: skip
    return 0


if __name__ == "__main__":
    sys.exit(main())
