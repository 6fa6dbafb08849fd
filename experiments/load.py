"""Throughput under load, a closed loop of clients, a row a setting: results/load.csv.

    python -m experiments.load --artifact DIR --batches 8 32 --threads 1 2 4 8

A client is a thread with one request in flight: a batch lies in pinned host memory, is copied to
the GPU, encoded, and its features are copied back; then the next one starts.  The column `how`:
    call    all clients share one `clip_ttrt.load(DIR, contexts=...)` (`--contexts`), warmed up,
            and call `encode_image` or `encode_text`
    module  each client has the saved module loaded for itself, and a stream
    graph   as module, each client replaying a CUDA graph of its own
    eager   the plain PyTorch encoder, its weights shared, a stream for each client
Inputs are float32 images or int32 tokens; eager gets its images in its own precision.  On the CPU
nothing is copied.  Launches and threads wait for the machine's cores: leave it nothing else to do.
"""
import argparse
import itertools
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

import clip_ttrt
from clip_ttrt.artifact import Artifact, load_modules, read_artifact
from clip_ttrt.errors import UserError
from experiments.baselines import DTYPES, example, plain
from experiments.record import append_row, provenance
from experiments.sweep import label
from experiments.timing import graphed, percentile

HOWS = ("call", "module", "graph", "eager")
WARM_UP = 3
Encode = Callable[[torch.Tensor], torch.Tensor]


class Client:
    """One batch in host memory, and how it is encoded."""

    def __init__(self, run: Encode, rows: torch.Tensor, device: str, graph: bool = False):
        self.run, self.device = run, device
        self.latencies: list[float] = []
        self.began = self.ended = 0.0
        if device == "cpu":
            self.rows = rows.cpu()
            return
        self.stream = torch.cuda.Stream()
        self.rows, self.inside = rows.cpu().pin_memory(), torch.empty_like(rows, device="cuda")
        with torch.no_grad(), torch.cuda.stream(self.stream):
            features = run(self.inside.copy_(self.rows, non_blocking=True))
            self.stream.synchronize()
            self.features = torch.empty_like(features, device="cpu").pin_memory()
            if graph:
                results = []

                def encode() -> None:
                    results[:] = [run(self.inside)]

                replay = graphed(encode)
                self.run = lambda _: (replay(), results[0])[1]

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
    """Run all clients at once: seconds from the first start to the last end, latencies in ms.

    Raises what a client raised.
    """
    barrier, problems = threading.Barrier(len(clients)), []

    def guarded(client: Client) -> None:
        try:
            client.loop(barrier, seconds)
        except Exception as problem:  # noqa: BLE001 (raised again below)
            problems.append(problem)
            barrier.abort()

    threads = [threading.Thread(target=guarded, args=(client,)) for client in clients]
    for client in clients:
        client.latencies.clear()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    causes = [one for one in problems if not isinstance(one, threading.BrokenBarrierError)]
    if causes:
        raise causes[0]
    wall = max(client.ended for client in clients) - min(client.began for client in clients)
    return wall, sorted(latency * 1e3 for client in clients for latency in client.latencies)


def encoders_of(
    artifact: Artifact, encoder: str, how: str, count: int, contexts: int, batches: Sequence[int]
) -> list[Encode]:
    """What each of the clients calls."""
    if how == "call":
        model, _ = clip_ttrt.load(artifact.folder, contexts=contexts)
        model.warmup(batches)
        return [model.encode_image if encoder == "image" else model.encode_text] * count
    if how == "eager":
        manifest = artifact.manifest
        run = plain(manifest["model"], encoder, manifest["computes_in"], artifact.device)
        return [run] * count
    return [load_modules(artifact)[encoder] for _ in range(count)]


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
        runs = encoders_of(artifact, encoder, how, most, options.contexts, options.batches)
        dtype = DTYPES[manifest["computes_in"]] if how == "eager" else torch.float32
        for batch, count in itertools.product(options.batches, options.threads):
            x = example(manifest["model"], encoder, batch, dtype, device)
            clients = [Client(run, x, device, how == "graph") for run in runs[:count]]
            wall, latencies = drive(clients, options.seconds)
            append_row(options.out, {
                "model": manifest["model"],
                "encoder": encoder,
                "batch": batch,
                "precision": manifest["precision"],
                "backend": "eager" if how == "eager" else label(artifact),
                "kernels": "" if how == "eager" else manifest["kernels"] or "",
                "how": "call" if how == "eager" else how,
                "threads": count,
                "items_per_second": f"{len(latencies) * batch / wall:.1f}",
                **{f"p{share}_ms": f"{percentile(latencies, share / 100):.4f}"
                   for share in (50, 95, 99)},
                "requests": len(latencies),
                **provenance(manifest["versions"]),
            })  # fmt: skip
    return 0


if __name__ == "__main__":
    sys.exit(main())
