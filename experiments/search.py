"""Searching beside what a user has now, a row a measurement: results/search.csv.

    python -m experiments.search --artifact DIR --sizes 100000 1000000 --minutes 60

query     of so many made features of width 512.  ours: the scan and the ranking of `Library`;
          numpy: a product with them in float32 and argsort, as clifs has it
pictures  of 500 x 375.  ours: `search index`, from its start; one by one: Pillow, preprocess and
          encode, as clifs does it, of 2000 at most
video     1080p, H.264, 30 frames a second of which one is encoded, a minute under many names;
          per_s counts all.  ours, and of 5 minutes one by one and decode: PyAV in threads alone
"""
import argparse
import os
import sys
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path

import av
import numpy as np
import torch
from PIL import Image

import clip_ttrt
from clip_ttrt.search import Library, index
from clip_ttrt.search.store import ITEM, SHARD
from experiments.embed import write_pictures
from experiments.record import append_row, provenance
from experiments.timing import percentile, wall_times_ms


def decoded(*paths: str, **how: str) -> Iterable[av.VideoFrame]:
    for path in paths:
        with av.open(path, **how) as container:
            container.streams.video[0].thread_type = "AUTO"
            yield from container.decode(video=0)


def write_video(path: Path) -> None:
    """A minute of FFmpeg's test picture, which moves."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=30, options={"preset": "veryfast"})
        stream.width, stream.height, stream.pix_fmt = 1920, 1080, "yuv420p"
        for frame in decoded("testsrc2=s=hd1080:r=30:d=60", format="lavfi"):
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))


def made(rows: int, device: torch.device) -> Library:
    """A library of random features, in memory."""
    library = object.__new__(Library)
    library.width, library.approximate, library.rows = 512, None, torch.arange(rows, device=device)
    whole, library.last = torch.nn.functional.normalize(torch.randn(rows, 512)).half(), rows
    library.shards = [whole.to(device)] if device.type == "cuda" else [*whole.split(SHARD)]
    library.items = np.zeros(rows, ITEM)
    library.items["file"] = library.items["id"] = np.arange(rows)
    return library


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--artifact", type=Path, required=True, metavar="DIR")
    add("--sizes", type=int, nargs="*", default=[10_000, 100_000, 1_000_000])
    add("--pictures", type=int, default=2000)
    add("--minutes", type=int, default=60)
    add("--out", type=Path, default=Path("results/search.csv"))
    options = parser.parse_args(arguments)
    model, preprocess = clip_ttrt.load(options.artifact)
    about = model.artifact.manifest

    def measure(task: str, how: str, size: int, call, repeats: int = 1, warm_up: int = 0) -> None:
        ms = percentile(wall_times_ms(call, repeats, warm_up, about["device"]), 0.5)
        append_row(options.out, {
            "task": task, "how": how, "model": "" if task == "query" else about["model"],
            "size": size, "cores": len(os.sched_getaffinity(0)), "ms": f"{ms:.4g}",
            "device": "cpu" if how in ("numpy", "decode") else about["device"],
            "per_s": f"{size / ms * 1e3:.4g}", **provenance(about["versions"])})  # fmt: skip

    def one_by_one(pictures: Iterable[Image.Image]) -> None:
        for picture in pictures:
            model.encode_image(preprocess(picture)[None]).cpu()

    for size in options.sizes:
        library = made(size, model.device)
        features = library.features(library.rows).cpu().numpy()
        wanted = library.features(library.rows[:1])[0]
        measure("query", "numpy", size, lambda: np.argsort(-(features @ features[0]))[:20], 20, 3)
        measure("query", "ours", size, lambda: library.rank(
            wanted, library.scan(wanted, 1000)[0], 20), 20, 3)
    with tempfile.TemporaryDirectory() as folder:
        pictures, video = Path(folder, "pictures"), Path(folder, "videos/0.mp4")
        (pictures / "0").mkdir(parents=True), video.parent.mkdir(), write_video(video)
        write_pictures(pictures, "500x375", range(options.pictures), 1)
        for number in range(1, options.minutes):
            os.link(video, video.with_name(f"{number}.mp4"))
        videos, count = [*map(str, video.parent.iterdir())][:5], 1800 * options.minutes
        tasks = ("pictures", options.pictures, pictures), ("video", count, video.parent)
        for task, size, path in tasks:
            measure(task, "ours", size, lambda: index(Path(folder, task), [path], options.artifact))
        some, frames = sorted(pictures.rglob("*.jpg"))[:2000], 1800 * len(videos)
        measure("pictures", "one by one", len(some), lambda: one_by_one(map(Image.open, some)))
        measure("video", "decode", frames, lambda: sum(1 for _ in decoded(*videos)))
        measure("video", "one by one", frames, lambda: one_by_one(
            frame.to_image() for n, frame in enumerate(decoded(*videos)) if n % 30 == 0))
    return 0


if __name__ == "__main__":
    sys.exit(main())
