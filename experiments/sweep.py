"""Milliseconds of every backend over models, encoders and batches, a row each: results/speed.csv.

    python -m experiments.sweep                          the embedded model where no GPU is
    python -m experiments.sweep --models ViT-B/32 --encoders image --kernels fused tensorrt

The column `backend`:
    clip_ttrt              a saved module of one engine for just that batch (`--static`)
    clip_ttrt MIN:OPT:MAX  a saved module of one engine for that range of batches (`--range`)
    torch.compile          mode "reduce-overhead" of the plain PyTorch encoder: the original's
                           layout, scaled_dot_product_attention, no op of ours
    torch.compile rearranged    the same of our encoder, whose patches are a matrix product and
                           whose last block pools first
    eager                  the plain encoder as it is
    clip                   OpenAI's model
    floor                  the sum of the fastest single library kernels (experiments.floor)
The column `kernels` is an artifact's: fused, tensorrt, or nothing where it has no engine.

The column `how`, of single calls on random rows that lie on the device: images in fp32 for
clip_ttrt, as `preprocess` gives them, and for its peers in the precision asked for, which spares
them a cast:
    call   by the clock, one call at a time, synchronised after each: `encode_image` or
           `encode_text` of `clip_ttrt.load(...)` at default settings, the compiled function of
           torch.compile, the encoder itself of eager and clip
    graph  between CUDA events around each call, one at a time: the replay of a CUDA graph of the
           saved module, or of the plain encoder; for torch.compile the compiled function, which
           copies its input and replays a graph of its own; for floor the sum of its parts
    queue  as graph, the calls queued back to back (only with --queue)

Each backend of a model and encoder runs in a process of its own.  Rows are written as they come;
what fails is a line on standard error, and the rest goes on.  Artifacts are compiled into
--artifacts, verified, and reused.  With --resume rows that the file has, of this GPU, commit and
stack, are not measured again.  At the end the plot beside the file is drawn.
"""
import argparse
import itertools
import json
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

import clip_ttrt
from clip_ttrt.artifact import load_modules, read_artifact
from clip_ttrt.errors import UserError
from clip_ttrt.models import dimensions_of
from clip_ttrt.options import BACKENDS, KERNELS, PRECISIONS, BatchRange
from experiments.accuracy import compile_in_process, folder_name
from experiments.baselines import DTYPES, PEERS, example, weights_of
from experiments.floor import floor_ms
from experiments.record import PROVENANCE, append_row, in_a_line, provenance, read_rows
from experiments.timing import gpu_times_ms, graphed, percentile, wall_times_ms

KEY = ("model", "encoder", "batch", "precision", "backend", "kernels", "how")
COLUMNS = (*KEY, "median_ms", "p90_ms", *PROVENANCE)
MEASURED = ("clip_ttrt", *PEERS, "floor")
ROOT = Path(__file__).resolve().parent.parent
ROW, DONE = "sweep-row ", "sweep-done "  # begin the lines that a job's process prints
UNCAPTURED = ("clip",)  # its encode_text copies from the CPU


@dataclass(frozen=True)
class Job:
    """What one process measures."""

    model: str
    encoder: str
    precision: str
    backend: str  # of MEASURED
    batches: tuple[int, ...]
    device: str
    artifact: str = ""  # the folder, for clip_ttrt
    repeats: int = 200
    hows: tuple[str, ...] = ("call", "graph")

    def __str__(self) -> str:
        return f"{self.model} {self.encoder} {self.precision} {self.backend} {self.artifact}"


def label(artifact: clip_ttrt.Artifact) -> str:
    """The column `backend` of an artifact."""
    return "clip_ttrt" if artifact.batch.static else f"clip_ttrt {artifact.batch}"


def calls_of(job: Job) -> tuple[dict[str, Callable], dict[str, str]]:
    """What to call for each `how`, and columns for the rows.  Raises UserError where it cannot."""
    if job.backend != "clip_ttrt":
        run = PEERS[job.backend](job.model, job.encoder, job.precision, job.device)
        hows = ("call",) if job.backend in UNCAPTURED else job.hows
        return dict.fromkeys(hows, run), {"backend": job.backend, "kernels": ""}
    artifact = read_artifact(job.artifact)
    manifest = artifact.manifest
    calls = {}
    if "call" in job.hows:
        model, _ = clip_ttrt.load(job.artifact)
        calls["call"] = model.encode_image if job.encoder == "image" else model.encode_text
    if graphs := [how for how in job.hows if how != "call"]:
        calls |= dict.fromkeys(graphs, load_modules(artifact)[job.encoder])
    columns = {"backend": label(artifact), "kernels": manifest["kernels"] or ""}
    return calls, {**columns, **provenance(manifest["versions"])}


def measure(job: Job, batch: int, how: str, run: Callable) -> list[float]:
    """Milliseconds of single calls."""
    dtype = torch.float if job.backend == "clip_ttrt" else DTYPES[job.precision]
    x = example(job.model, job.encoder, batch, dtype, job.device)
    warm_up = max(3, job.repeats // 5)
    with torch.no_grad():
        if how == "call":
            return wall_times_ms(lambda: run(x), job.repeats, warm_up, job.device)
        own = job.backend.startswith("torch.compile")  # it replays graphs of its own
        call = (lambda: run(x)) if own else graphed(lambda: run(x))
        return gpu_times_ms(call, job.repeats, warm_up, queued=how == "queue")


def rows_of(job: Job) -> Iterator[dict[str, Any]]:
    """The CSV rows of a job, and None after each batch; what fails goes to standard error."""
    about = {"model": job.model, "encoder": job.encoder, "precision": job.precision}
    dims = dimensions_of(job.model)
    calls, columns = ({}, {}) if job.backend == "floor" else calls_of(job)
    for batch in job.batches:
        row = {**dict.fromkeys(COLUMNS, ""), **about, "batch": batch, **provenance(), **columns}
        try:
            if job.backend == "floor":
                parts = floor_ms(dims, job.encoder, batch, job.precision, job.device)
                how = "graph" if job.device == "cuda" else "call"
                yield {**row, "backend": "floor", "how": how, "median_ms": f"{parts['sum']:.4f}"}
            if job.backend.startswith("torch.compile"):
                torch._dynamo.reset()  # a graph of this batch alone, with no others to guard
            for how, run in calls.items():
                times = measure(job, batch, how, run)
                median, p90 = percentile(times, 0.5), percentile(times, 0.9)
                yield {**row, "how": how, "median_ms": f"{median:.4f}", "p90_ms": f"{p90:.4f}"}
        except Exception as problem:  # noqa: BLE001 (out of memory, say: the rest goes on)
            print(f"{job}, batch {batch}: {in_a_line(problem)}", file=sys.stderr, flush=True)
        yield {}


def child(specification: str) -> int:
    """Measure one job in this process; a line of output for each row and each batch that ends."""
    fields = json.loads(specification)
    tuples = {name: tuple(fields[name]) for name in ("batches", "hows")}
    job = Job(**{**fields, **tuples})
    batches = iter(job.batches)
    try:
        for row in rows_of(job):
            print(ROW + json.dumps(row) if row else f"{DONE}{next(batches)}", flush=True)
    except UserError as problem:
        print(f"{job}: {problem}", file=sys.stderr, flush=True)
        return 2
    return 0


def run_job(job: Job, seconds: float) -> Iterator[dict[str, Any]]:
    """The rows of a job from a process of its own; a batch that ends it is left out, and said."""
    left = list(job.batches)
    while left:
        told = json.dumps({**asdict(job), "batches": left})
        command = [sys.executable, "-m", "experiments.sweep", "--child", told]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT) as process:
            timer = threading.Timer(seconds, process.kill)
            timer.start()
            for line in process.stdout:
                if line.startswith(ROW):
                    yield json.loads(line.removeprefix(ROW))
                elif line.startswith(DONE):
                    left.remove(int(line.removeprefix(DONE)))
                else:
                    print(line, end="", file=sys.stderr, flush=True)
            code = process.wait()
            timer.cancel()
        if not left:
            return
        if code == 2:  # it has said why, and it holds for all batches
            return
        name = signal.Signals(-code).name if code < 0 else f"exit code {code}"
        print(f"{job}, batch {left.pop(0)}: {name}", file=sys.stderr, flush=True)


def artifact_for(options: argparse.Namespace, model: str, batch: str, kernels: str) -> Path:
    """An artifact's folder, compiled now if it is not there.  Raises UserError where it fails."""
    encoder = "both" if len(options.encoders) == 2 else options.encoders[0]
    name = folder_name(model, options.precision, batch, kernels)
    folder = options.artifacts.resolve() / f"{name}-{encoder}"
    code = compile_in_process(
        folder, *([] if options.verify else ["--no-verify"]), model=model,
        weights=weights_of(model), precision=options.precision, batch=batch, encoder=encoder,
        kernels=kernels, backend=options.backend,
    )  # fmt: skip
    if code or read_artifact(folder).verified is False:
        raise UserError(f"{folder.name} was not compiled, or failed its verification")
    return folder


def jobs_of(options: argparse.Namespace) -> Iterator[Job]:
    """What is to be measured, in order, each artifact compiled before its jobs."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    on_gpu = ("call", "graph", "queue") if options.queue else ("call", "graph")
    hows = on_gpu if device == "cuda" else ("call",)
    ranges = [] if options.range == "none" else [BatchRange.parse(options.range)]
    engines = [*ranges, *(BatchRange.parse(size) for size in options.static)]
    for model, backend in itertools.product(options.models, options.backends):
        facts = {"precision": options.precision, "device": device, "hows": hows}
        facts["repeats"] = options.repeats
        if backend != "clip_ttrt":
            for encoder in options.encoders:
                yield Job(model, encoder, backend=backend, batches=options.batches, **facts)
            continue
        for kernels, engine in itertools.product(options.kernels, engines):
            served = range(engine.minimum, engine.maximum + 1)
            batches = tuple(batch for batch in options.batches if batch in served)
            if engine.static:
                batches = (engine.optimal,)
            try:
                folder = artifact_for(options, model, str(engine), kernels)
            except UserError as problem:
                print(problem, file=sys.stderr, flush=True)
                continue
            for encoder in options.encoders:
                facts["artifact"] = str(folder)
                yield Job(model, encoder, backend=backend, batches=batches, **facts)


def ratios(rows: Sequence[Mapping[str, Any]]) -> str:
    """A table of clip_ttrt's milliseconds and their ratio to torch.compile's in the same cell."""
    cell = ("model", "encoder", "batch", "precision", "how")
    peers = {
        tuple(str(row[name]) for name in cell): float(row["median_ms"])
        for row in rows if row["backend"] == "torch.compile"
    }  # fmt: skip
    lines = ["| cell | backend | ms | torch.compile | ratio |", "|---|---|---|---|---|"]
    for row in rows:
        place = tuple(str(row[name]) for name in cell)
        if row["backend"].startswith("clip_ttrt") and place in peers:
            ours, peer = float(row["median_ms"]), peers[place]
            name = f"{row['backend']} {row['kernels']}".strip()
            cells = (" ".join(place), name, f"{ours:.3f}", f"{peer:.3f}", f"{ours / peer:.3f}")
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--models", nargs="+", default=["ViT-B/32", "ViT-L/14"] if gpu else ["demo"])
    add("--encoders", nargs="+", choices=("image", "text"), default=["image", "text"])
    add("--batches", nargs="+", type=int, default=[1, 8, 32, 128] if gpu else [1, 8])
    add("--precision", choices=PRECISIONS, default="fp16" if gpu else "fp32")
    add("--backends", nargs="+", choices=MEASURED, metavar="NAME", help=", ".join(MEASURED),
        default=list(MEASURED) if gpu else ["clip_ttrt", "eager", "clip"])  # fmt: skip
    add("--kernels", nargs="+", choices=KERNELS, default=["auto"])
    add("--backend", choices=BACKENDS, default="auto", help="what compiles the artifacts")
    add("--range", default="1:32:128" if gpu else "1:8:8", metavar="MIN:OPT:MAX|none")
    add("--static", nargs="*", default=[], metavar="N", help="engines for just one batch")
    add("--queue", action="store_true", help="rows of calls queued back to back, too")
    add("--ratios", action="store_true", help="print clip_ttrt / torch.compile at the end")
    add("--resume", action="store_true", help="leave out what --out has")
    add("--no-verify", dest="verify", action="store_false", help="do not verify artifacts")
    add("--repeats", type=int, default=200 if gpu else 20, help="calls a row")
    add("--seconds", type=float, default=540, help="stop a process after so long")
    add("--artifacts", type=Path, metavar="DIR", help="keep and reuse artifacts there")
    add("--out", type=Path, default=Path("results/speed.csv"))
    add("--child", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    options.batches = tuple(options.batches)
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    if options.child:
        return child(options.child)
    here = provenance()
    same = [name for name in PROVENANCE if name != "date"]
    have = {
        tuple(row[name] for name in KEY)
        for row in (read_rows(options.out) if options.resume else [])
        if all(row[name] == here[name] for name in same)
    }
    measured = []
    with tempfile.TemporaryDirectory() as temporary:
        options.artifacts = options.artifacts or Path(temporary)
        for job in jobs_of(options):
            for row in run_job(without(job, have), options.seconds):
                append_row(options.out, row)
                measured.append(row)
    if options.ratios:
        print(ratios(measured))
    if measured:
        draw(options.out)
    return 0 if measured or have else 1


def without(job: Job, have: set[tuple[str, ...]]) -> Job:
    """The job without the batches of which there are all rows."""
    if not have:
        return job
    backend, kernels = job.backend, ""
    if job.artifact:
        artifact = read_artifact(job.artifact)
        backend, kernels = label(artifact), artifact.manifest["kernels"] or ""
    hows = ("graph",) if backend == "floor" else ("call",) if backend in UNCAPTURED else job.hows

    def missing(batch: int) -> bool:
        place = (job.model, job.encoder, str(batch), job.precision, backend, kernels)
        return any((*place, how) not in have for how in hows)

    return Job(**{**asdict(job), "batches": tuple(filter(missing, job.batches))})


def draw(path: Path) -> None:
    """Draw the plot of a CSV where matplotlib is installed."""
    try:
        from experiments import report
    except ImportError as problem:
        print(f"no plot: {problem}; pip install 'clip_ttrt[experiments]'", file=sys.stderr)
        return
    print(report.draw(path))


if __name__ == "__main__":
    sys.exit(main())
