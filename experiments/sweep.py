"""Milliseconds of every backend over models, encoders and batches, a row each: results/speed.csv.

    python -m experiments.sweep                          the embedded model where no GPU is
    python -m experiments.sweep --models ViT-B/32 --encoders image --kernels fused tensorrt

The column `backend`:
    clip_ttrt              a saved module of one engine for just that batch (`--static`)
    clip_ttrt MIN:OPT:MAX  a saved module of one engine for that range of batches (`--range`)
    torch.compile          mode "reduce-overhead" of the plain PyTorch encoder: the original's
                           layout, scaled_dot_product_attention, no op of ours; in fp8 the
                           blocks' linear layers are torch._scaled_mm
    torch.compile rearranged    the same of our encoder, whose patches are a matrix product and
                           whose last block pools first
    eager                  the plain encoder as it is
    clip                   OpenAI's model
    onnxruntime            the plain encoder through ONNX, where onnxruntime is installed
    floor                  the sum of the fastest single library kernels (experiments.floor)
The column `kernels` is an artifact's: fused, tensorrt, or nothing where it has no engine.

The column `how`, by the clock, on random rows that lie on the device: images in fp32 for
clip_ttrt, as `preprocess` gives them, and for its peers in the precision asked for, which spares
them a cast:
    call   `encode_image` or `encode_text` of `clip_ttrt.load(...)` at default settings, or the
           peer itself, one call at a time, synchronised after each
    graph  in the same way the replay of a CUDA graph of the saved module, or of eager; for
           torch.compile, whose call replays a graph of its own, there is none; for floor the sum
           of its parts
    call queued, graph queued    the share of one in 20 of them back to back

The column `tokens` is the length of texts, if not the full one; `resolution` an image's side in
pixels; `build_s` an artifact's seconds; `memory_mib` all that is in use on the GPU at the end.

Each backend of a model and encoder runs in a process of its own, started again behind a batch that
ends it.  Rows are written as they come; what fails is a line on standard error, and the rest goes
on.  Artifacts are compiled into --artifacts, verified, and reused.  With --resume rows that the
file has, of this GPU, commit and stack, are not measured again.  At the end the plot beside the
file is drawn.
"""
import argparse
import importlib.util
import itertools
import json
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

import clip_ttrt
from clip_ttrt.artifact import read_artifact
from clip_ttrt.errors import UserError
from clip_ttrt.families import find
from clip_ttrt.options import BACKENDS, KERNELS, PRECISIONS, BatchRange
from clip_ttrt.pictures import CAPTIONS
from clip_ttrt.verify import more_lines
from experiments.accuracy import compile_in_process
from experiments.baselines import DTYPES, PEERS, UNCAPTURED, example, weights_of
from experiments.floor import floor_ms
from experiments.record import (
    PROVENANCE, ROOT, append_row, in_a_line, label, provenance, read_rows,
)  # fmt: skip
from experiments.timing import graphed, percentile, wall_times_ms

KEY = ("model", "encoder", "batch", "precision", "backend", "kernels", "how", "tokens")
MEASURED = ("clip_ttrt", *PEERS, "floor")
HOWS = ("call", "graph", "call queued", "graph queued")
QUEUED = 20
CALIBRATED = 1024  # pictures, and captions
ROWS = "sweep-rows "  # begins a line of a job's process: the rows of its next batch


@dataclass(frozen=True)
class Job:
    """What one process measures."""

    model: str
    encoder: str
    precision: str
    backend: str  # as in the CSV
    batches: Sequence[int]
    device: str
    hows: Sequence[str]
    repeats: int
    kernels: str = ""
    artifact: str = ""  # the folder, for clip_ttrt
    tokens: int = 0  # of texts; 0: the full length

    def __str__(self) -> str:
        return f"{self.model} {self.encoder} {self.precision} {self.backend} {self.kernels}".strip()

    def key(self, batch: int, how: str) -> tuple[str, ...]:
        """The columns KEY of a row."""
        about = (self.model, self.encoder, str(batch), self.precision)
        return (*about, self.backend, self.kernels, how, str(self.tokens or ""))


def calls_of(job: Job) -> dict[str, Callable]:
    """What to call for each `how`.  Raises UserError where it cannot be had."""
    if not job.artifact:
        run = PEERS[job.backend](job.model, job.encoder, job.precision, job.device)
        return dict.fromkeys(job.hows, run)
    model = clip_ttrt.load(job.artifact)[0]
    call, module = getattr(model, f"encode_{job.encoder}"), model._encoders[job.encoder].module
    return {how: call if "call" in how else module for how in job.hows}


def measure(job: Job, batch: int, how: str, run: Callable | None) -> list[float]:
    """Milliseconds of single calls; of the floor its sum alone."""
    if job.backend == "floor":
        dims = find(job.model).dimensions
        dims = replace(dims, context_length=job.tokens or dims.context_length)
        return [floor_ms(dims, job.encoder, batch, job.precision, job.device)["sum"]]
    dtype = torch.float if job.artifact else DTYPES[job.precision]
    x = example(job.model, job.encoder, batch, dtype, job.device, job.tokens)
    call = graphed(lambda: run(x)) if "graph" in how else lambda: run(x)
    queued, repeats = (QUEUED, job.repeats // 10) if "queued" in how else (1, job.repeats)
    return wall_times_ms(call, repeats, max(3, repeats // 5), job.device, queued)


def rows_of(job: Job) -> Iterator[list[dict[str, Any]]]:
    """The CSV rows of each batch of a job; what fails goes to standard error."""
    calls = calls_of(job) if job.backend != "floor" else dict.fromkeys(job.hows)
    manifest = read_artifact(job.artifact).manifest if job.artifact else ""
    side = find(job.model).dimensions.image_resolution if job.encoder == "image" else ""
    for batch in job.batches:
        rows = []
        try:
            if job.backend.startswith("torch.compile"):
                torch._dynamo.reset()  # a graph of this batch alone, with no others to guard
            for how, run in calls.items():
                with torch.no_grad():
                    times = measure(job, batch, how, run)
                free, total = torch.cuda.mem_get_info() if job.device == "cuda" else (0, 0)
                rows.append({
                    **dict(zip(KEY, job.key(batch, how), strict=True)),
                    "resolution": str(side),
                    "median_ms": f"{percentile(times, 0.5):.4f}",
                    "p90_ms": f"{percentile(times, 0.9):.4f}",
                    "build_s": manifest and str(manifest["modules"][job.encoder]["build_seconds"]),
                    "memory_mib": str((total - free) >> 20 or ""),
                    **provenance(manifest["versions"] if manifest else None),
                })  # fmt: skip
        except Exception as problem:  # noqa: BLE001 (out of memory, say: the rest goes on)
            print(f"{job}, batch {batch}: {in_a_line(problem)}", file=sys.stderr, flush=True)
        yield rows


def child(specification: str) -> int:
    """Measure one job in this process; a line of output for the rows of each batch."""
    job = Job(**json.loads(specification))
    try:
        for rows in rows_of(job):
            print(ROWS + json.dumps(rows), flush=True)
    except UserError as problem:
        print(f"{job}: {problem}", file=sys.stderr, flush=True)
        return 2
    return 0


def run_job(job: Job, seconds: float) -> Iterator[dict[str, Any]]:
    """The rows of a job from a process of its own; a batch that ends it is left out, and said."""
    while job.batches:
        command = [sys.executable, "-m", "experiments.sweep", "--child", json.dumps(asdict(job))]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT) as process:
            timer = threading.Timer(seconds, process.kill)
            timer.start()
            for line in process.stdout:
                if line.startswith(ROWS):
                    yield from json.loads(line.removeprefix(ROWS))
                    job = replace(job, batches=job.batches[1:])
                else:
                    print(line, end="", file=sys.stderr, flush=True)
            code = process.wait()
            timer.cancel()
        if not job.batches or code == 2:  # 2: it has said why, and it holds for all batches
            return
        name = signal.Signals(-code).name if code < 0 else f"exit code {code}"
        print(f"{job}, batch {job.batches[0]}: {name}", file=sys.stderr, flush=True)
        job = replace(job, batches=job.batches[1:])


def calibration(folder: Path) -> list[str]:
    """Pictures and captions to calibrate fp8 with, crops of the shipped ones and mixtures."""
    images, captions = folder / "calibration", folder / "captions.txt"
    if not captions.is_file():
        from experiments.embed import jpeg

        images.mkdir(parents=True, exist_ok=True)
        for number in range(CALIBRATED):
            (images / f"{number:04}.jpg").write_bytes(jpeg("256", number))
        captions.write_text("\n".join(more_lines(list(CAPTIONS.values()), CALIBRATED)))
    return [str(images), str(captions)]


def artifact_for(
    options: argparse.Namespace, model: str, batch: str, kernels: str
) -> clip_ttrt.Artifact:
    """An artifact, compiled now if it is not there.  Raises UserError where it fails."""
    encoder = "both" if len(options.encoders) == 2 else options.encoders[0]
    flags = [] if options.verify else ["--no-verify"]
    if options.precision == "fp8" and model != "demo":
        flags += ["--calibrate", *(options.calibrate or calibration(options.artifacts))]
    code, folder = compile_in_process(
        options.artifacts, *flags, model=model,
        weights=weights_of(model), precision=options.precision, batch=batch, kernels=kernels,
        encoder=encoder, backend=options.backend,
    )  # fmt: skip
    if code or read_artifact(folder).verified is False:
        raise UserError(f"{folder.name} was not compiled, or failed its verification")
    return read_artifact(folder)


def jobs_of(options: argparse.Namespace) -> Iterator[Job]:
    """What is to be measured, in order, each artifact compiled before its jobs."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    hows = HOWS if device == "cuda" else ("call",)
    ranges = [] if options.range == "none" else [options.range]
    for model, backend in itertools.product(options.models, options.backends):
        job = Job(model, "", options.precision, backend, options.batches, device, hows,
                  options.repeats)  # fmt: skip
        if backend == "floor":
            job = replace(job, hows=("graph",) if device == "cuda" else hows)
        elif backend in UNCAPTURED:
            job = replace(job, hows=[how for how in hows if "call" in how])
        elif backend == "clip_ttrt":
            for kernels, batch in itertools.product(options.kernels, [*ranges, *options.static]):
                try:
                    artifact = artifact_for(options, model, batch, kernels)
                except UserError as problem:
                    print(problem, file=sys.stderr, flush=True)
                    continue
                engine, sizes = BatchRange.parse(batch), options.batches
                served = [size for size in sizes if engine.minimum <= size <= engine.maximum]
                ours = replace(
                    job, backend=label(artifact), kernels=artifact.manifest["kernels"] or "",
                    artifact=str(artifact.folder),
                    batches=[engine.optimal] if engine.static else served,
                )  # fmt: skip
                yield from (replace(ours, **part) for part in options.parts)
            continue
        yield from (replace(job, **part) for part in options.parts)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    gpu = torch.cuda.is_available()
    peers = [name for name in MEASURED
             if name != "onnxruntime" or importlib.util.find_spec(name)]  # fmt: skip
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--models", nargs="+", default=["ViT-B/32", "ViT-L/14"] if gpu else ["demo"])
    add("--encoders", nargs="+", choices=("image", "text"), default=["image", "text"])
    add("--batches", nargs="+", type=int, default=[1, 8, 32, 128] if gpu else [1, 8])
    add("--tokens", nargs="+", type=int, default=[0], metavar="N",
        help="lengths of texts; 0: the full one")  # fmt: skip
    add("--precision", choices=PRECISIONS, default="fp16" if gpu else "fp32")
    add("--backends", nargs="+", choices=MEASURED, metavar="NAME", help=", ".join(MEASURED),
        default=peers if gpu else ["clip_ttrt", "eager", "clip"])  # fmt: skip
    add("--kernels", nargs="+", choices=KERNELS, default=["auto"])
    add("--backend", choices=BACKENDS, default="auto", help="what compiles the artifacts")
    add("--calibrate", nargs="+", metavar="PATH",
        help="for fp8 (default: crops of the shipped pictures and mixed captions)")  # fmt: skip
    add("--range", default="1:32:128" if gpu else "1:8:8", metavar="MIN:OPT:MAX|none")
    add("--static", nargs="*", default=[], metavar="N", help="engines for just one batch")
    add("--resume", action="store_true", help="leave out what --out has")
    add("--no-verify", dest="verify", action="store_false", help="do not verify artifacts")
    add("--repeats", type=int, default=200 if gpu else 20, help="calls a row")
    add("--seconds", type=float, default=540, help="stop a process after so long")
    add("--artifacts", type=Path, metavar="DIR", help="keep and reuse artifacts there")
    add("--out", type=Path, default=Path("results/speed.csv"))
    add("--child", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    options.parts = [{"encoder": encoder, "tokens": tokens} for encoder in options.encoders
                     for tokens in (options.tokens if encoder == "text" else [0])]  # fmt: skip
    try:
        for batch in [*options.static, *([] if options.range == "none" else [options.range])]:
            BatchRange.parse(batch)
        for model in options.models:
            find(model)
    except UserError as problem:
        parser.error(str(problem))
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    if options.child:
        return child(options.child)
    here, same = provenance(), [name for name in PROVENANCE if name != "date"]
    have = {
        tuple(row[name] for name in KEY)
        for row in (read_rows(options.out) if options.resume else [])
        if all(row[name] == here[name] for name in same)
    }
    measured = 0
    with tempfile.TemporaryDirectory() as temporary:
        options.artifacts = (options.artifacts or Path(temporary)).resolve()
        for job in jobs_of(options):
            left = [batch for batch in job.batches
                    if not all(job.key(batch, how) in have for how in job.hows)]  # fmt: skip
            for row in run_job(replace(job, batches=left), options.seconds):
                append_row(options.out, row)
                measured += 1
    if measured:
        try:
            from experiments import report

            print(report.draw(options.out))
        except (ImportError, ValueError) as problem:
            print(f"no plot: {problem}", file=sys.stderr)
    return 0 if measured or have else 1


if __name__ == "__main__":
    sys.exit(main())
