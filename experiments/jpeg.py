"""From JPEG files to features: pictures a second, and what each stage takes of it: OUT, a row a number of workers.

    python -m experiments.jpeg --model ViT-B/32 --backend clip_ttrt_plugin_range --artifacts artifacts --out results/h200/jpeg.csv

The eight pictures of `clip_ttrt.pictures`, copied to as many files as --images says.  Worker threads decode each file, resize
and crop it, and normalise it to float32 [3, R, R], with the transforms of OpenAI's preprocessing; the main thread gathers
batches in pinned host memory, copies them to the GPU, encodes them and copies the features back, while the workers go on.
The milliseconds a picture are the CPU time of one worker for decode, resize and normalise, and the main thread's wall time,
divided by the batch, for copy and encode: what bounds the rate is workers' time over their number, or the main thread's.  Run it
with nothing else on the machine's cores.
"""
import argparse
import os
import shutil
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Callable, Sequence

import torch

from clip_ttrt import pictures
from clip_ttrt.model import preprocess
from clip_ttrt.models import dimensions_of
from experiments.baselines import BACKENDS, Missing, Request
from experiments.floor import turn
from experiments.record import append_row, provenance

WORKERS = (1, 4, 16)
STAGES = ("decode", "resize", "normalise", "copy", "encode")


class Stages:
    """OpenAI's preprocessing in three timed stages: a file -> float32 [3, R, R]."""

    def __init__(self, resolution: int):
        steps = preprocess(resolution).transforms  # resize, crop, convert to RGB, to tensor, normalise
        self.geometry, self.values = steps[:2], steps[2:]

    def __call__(self, path: Path) -> tuple[torch.Tensor, tuple[float, float, float]]:
        """The picture, and the CPU seconds of decoding, of resizing and cropping, and of the rest."""
        from PIL import Image

        marks = [time.thread_time()]
        with Image.open(path) as picture:
            picture.load()
            marks.append(time.thread_time())
            for step in self.geometry:
                picture = step(picture)
            marks.append(time.thread_time())
            for step in self.values:
                picture = step(picture)
            marks.append(time.thread_time())
        return picture, tuple(end - begin for begin, end in zip(marks, marks[1:]))


def copies(folder: Path, count: int) -> list[Path]:
    """So many JPEG files, the shipped pictures in turn."""
    shipped = [pictures.FOLDER / f"{name}.jpg" for name in pictures.CAPTIONS]
    files = [folder / f"{index:05}.jpg" for index in range(count)]
    for index, target in enumerate(files):
        shutil.copyfile(shipped[index % len(shipped)], target)
    return files


class Encoder:
    """Batches from host memory to features in host memory, copy and encoding timed apart."""

    def __init__(self, run: Callable[[torch.Tensor], torch.Tensor], batch: int, resolution: int, device: str):
        self.run, self.device, shape = run, device, (batch, 3, resolution, resolution)
        self.host = torch.empty(shape, pin_memory=device == "cuda")
        self.inside = torch.empty(shape, device=device) if device == "cuda" else self.host

    def __call__(self, rows: Sequence[torch.Tensor]) -> tuple[torch.Tensor, float, float]:
        """Features [B, D] on the CPU; seconds of gathering and copying, and of encoding."""
        begin = time.perf_counter()
        torch.stack(list(rows), out=self.host)
        if self.device == "cuda":
            self.inside.copy_(self.host, non_blocking=True)
            torch.cuda.synchronize()
        copied = time.perf_counter()
        features = self.run(self.inside)
        if self.device == "cuda":
            torch.cuda.synchronize()
        encoded = time.perf_counter()
        features = features.cpu()
        return features, time.perf_counter() - encoded + copied - begin, encoded - copied


def measure(files: Sequence[Path], stages: Stages, encoder: Encoder, batch: int, workers: int) -> tuple[float, dict[str, float], torch.Tensor]:
    """Wall seconds of all files (a whole number of batches), each stage's milliseconds a picture, and all features [N, D]."""
    totals, pending, features = dict.fromkeys(STAGES, 0.0), [], []
    start = time.perf_counter()
    with ThreadPoolExecutor(workers) as pool, torch.no_grad():
        for rows, seconds in pool.map(stages, files):
            for name, value in zip(STAGES, seconds):
                totals[name] += value
            pending.append(rows)
            if len(pending) == batch:
                result, copy, encode = encoder(pending)
                totals["copy"] += copy
                totals["encode"] += encode
                features.append(result)
                pending.clear()
    wall = time.perf_counter() - start
    return wall, {name: value / len(files) * 1e3 for name, value in totals.items()}, torch.cat(features)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--backend", choices=tuple(BACKENDS), default="clip_ttrt_native_range")
    parser.add_argument("--precision", choices=("fp16", "fp32"), help="default: fp16 on a GPU, fp32 on the CPU")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--range", default="1:32:256", metavar="MIN:OPT:MAX", help="what a backend that ends in _range compiles for")
    parser.add_argument("--workers", type=int, nargs="+", default=list(WORKERS))
    parser.add_argument("--images", type=int, default=1024, help="files; rounded up to whole batches")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--artifacts", type=Path)
    parser.add_argument("--out", type=Path, default=Path("results/jpeg.csv"))
    options = parser.parse_args()
    if options.batch < 1 or options.images < 1 or min(options.workers) < 1:
        parser.error("--batch, --images and --workers take positive numbers")
    if options.device == "cuda":
        torch.set_num_threads(1)  # the workers are the parallelism
    dims, batch, device = dimensions_of(options.model), options.batch, options.device
    precision = options.precision or ("fp16" if device == "cuda" else "fp32")
    request = Request(options.model, "demo" if options.model == "demo" else "random", "image", precision, batch, dims.image_tokens, device,
                      artifacts=str(options.artifacts.resolve()) if options.artifacts else "", batches=options.range)
    try:
        with torch.no_grad():
            subject = BACKENDS[options.backend](request)
            for _ in range(3):
                subject.call()
    except Missing as reason:
        print(f"{options.backend} cannot run here: {reason}", file=sys.stderr)
        return 2
    stages, encoder = Stages(dims.image_resolution), Encoder(subject.run, batch, dims.image_resolution, device)
    with tempfile.TemporaryDirectory() as folder:
        files = copies(Path(folder), -(-options.images // batch) * batch)
        for workers in options.workers:
            with turn():
                measure(files[:batch], stages, encoder, batch, workers)  # warm-up
                wall, each, _ = measure(files, stages, encoder, batch, workers)
            whole = sum(each.values())
            append_row(options.out, {
                "model": options.model, "backend": options.backend, "attention": subject.attention, "precision": precision, "batch": str(batch), "workers": str(workers),
                "images": str(len(files)), "images_per_second": f"{len(files) / wall:.1f}", **{f"{name}_ms": f"{value:.4f}" for name, value in each.items()},
                **{f"{name}_share": f"{value / whole:.4f}" for name, value in each.items()}, "cores": str(len(os.sched_getaffinity(0))), **provenance()})
    return 0


if __name__ == "__main__":
    sys.exit(main())
