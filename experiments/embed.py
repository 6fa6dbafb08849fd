"""Images per second from files to features, a row a setting: results/embed.csv.

    python -m experiments.embed --artifact DIR --pictures 256 500x375 640x480 --decodes auto exact

The pictures are crops of the shipped ones, JPEGs of 4:2:0, some thousand of each size under ten
names each, in a folder (`source` files) or in archives (tar), and in the page cache.  The column
`backend`:
    clip_ttrt       `clip-ttrt embed`, from the moment that its processes are ready, on average
    graph           replays of the encoder's CUDA graph at embed's batch, with nothing to read
    dataloader      a DataLoader with all cores, Pillow and clip's preprocess, and torch.compile
    clip-retrieval  its reader and mapper, where the package lies on the path, and clip in fp16
The peers' second half is timed, when all their workers run.
"""
import argparse
import importlib
import io
import itertools
import json
import os
import random
import sys
import tarfile
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from types import ModuleType

import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset

import clip_ttrt
from clip_ttrt import deprecations
from clip_ttrt.artifact import Artifact, read_artifact
from clip_ttrt.errors import UserError
from clip_ttrt.options import LARGEST_EMBED_BATCH
from clip_ttrt.pipeline.embed import embed
from experiments import baselines
from experiments.record import append_row, provenance
from experiments.timing import wall_times_ms

PICTURES = {"256": (256, 256, 90), "500x375": (500, 375, 95), "640x480": (640, 480, 90)}
NAMES = 10  # of each distinct picture
SOURCES = sorted((Path(clip_ttrt.__file__).parent / "pictures").glob("*.jpg"))


def jpeg(kind: str, seed: int) -> bytes:
    """A crop of a shipped picture, resized."""
    width, height, quality = PICTURES[kind]
    draw = random.Random(seed)
    with Image.open(SOURCES[seed % len(SOURCES)]) as picture:
        side = draw.uniform(0.5, 1) * min(picture.size)
        x, y = (draw.uniform(0, length - side) for length in picture.size)
        crop = picture.resize((width, height), Image.BICUBIC, (x, y, x + side, y + side))
    file = io.BytesIO()
    crop.save(file, "JPEG", quality=quality, subsampling="4:2:0")
    return file.getvalue()


def write_pictures(folder: Path, kind: str, numbers: Sequence[int], names: int = NAMES) -> None:
    for number in numbers:
        data = jpeg(kind, number)
        for copy in range(names):
            path = folder / f"{copy}" / f"{number:06d}.jpg"
            if copy == 0:
                path.write_bytes(data)
            else:
                os.link(folder / "0" / path.name, path)


def corpus(root: Path, kind: str, count: int, cores: int) -> tuple[Path, list[Path]]:
    """A folder of so many pictures, and archives of the same ones, taken as they are if there."""
    folder = root / f"{kind}-{count}"
    archives = [root / f"{kind}-{count}-{copy}.tar" for copy in range(NAMES)]
    if archives[-1].exists():
        return folder, archives
    for copy in range(NAMES):
        (folder / f"{copy}").mkdir(parents=True)
    numbers = range(count // NAMES)
    with ProcessPoolExecutor(cores) as pool:
        parts = [numbers[i::cores] for i in range(cores)]
        list(pool.map(write_pictures, *zip(*((folder, kind, part) for part in parts))))
    with tarfile.open(archives[0], "w") as archive:
        archive.add(folder / "0", "")
    for path in archives[1:]:
        os.link(archives[0], path)
    return folder, archives


class Files(Dataset):
    """Pictures as clip's preprocess gives them."""

    def __init__(self, folder: Path, resolution: int):
        self.paths = sorted(folder.rglob("*.jpg"))
        self.transform = deprecations.clip()._transform(resolution)

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> torch.Tensor:
        with Image.open(self.paths[index]) as picture:
            return self.transform(picture)


def dataloader(artifact: Artifact, folder: Path, batch: int, cores: int) -> Iterator[int]:
    """What a user would write; yields images as they are done."""
    model, precision = artifact.manifest["model"], artifact.manifest["computes_in"]
    encode = baselines.compiled(baselines.plain(model, "image", precision, artifact.device))
    files, dtype = Files(folder, artifact.dimensions.image_resolution), baselines.DTYPES[precision]
    loader = DataLoader(files, batch, num_workers=cores, pin_memory=True, drop_last=True)
    with torch.inference_mode():
        # Compiled before workers read ahead, or the second half would lie ready.
        encode(baselines.example(model, "image", batch, dtype, artifact.device))
        for images in loader:
            images = images.to(artifact.device, dtype, non_blocking=True)
            torch.nn.functional.normalize(encode(images).float(), dim=-1).half().cpu().numpy()
            yield len(images)


def clip_retrieval(artifact: Artifact, folder: Path, batch: int, cores: int) -> Iterator[int]:
    """clip-retrieval's own reader and mapper, without the rest of the package, which needs more."""
    places = [Path(each) / "clip_retrieval" for each in sys.path]
    package = next((each for each in places if each.is_dir()), None)
    if package is None:
        raise UserError("clip-retrieval is not on the path")
    stubs = {"clip_retrieval": package, "clip_retrieval.clip_inference": package / "clip_inference",
             "all_clip": None, "sentence_transformers": None}
    for name, place in stubs.items():
        sys.modules[name] = ModuleType(name)
        if place:
            sys.modules[name].__path__ = [str(place)]
    model = baselines.original(artifact.manifest["model"], "fp16", artifact.device)
    sys.modules["sentence_transformers"].SentenceTransformer = None
    sys.modules["all_clip"].load_clip = lambda **_: (model, None, None)
    reader, mapper = (importlib.import_module(f"clip_retrieval.clip_inference.{name}")
                      for name in ("reader", "mapper"))
    transform = deprecations.clip()._transform(artifact.dimensions.image_resolution)
    run = mapper.ClipMapper(True, False, False, False, artifact.manifest["model"], False, "")
    for rows in reader.FilesReader(lambda keys: keys, transform, None, folder, batch, cores, False):
        yield len(run(rows)["image_embs"])


PEERS = {"dataloader": dataloader, "clip-retrieval": clip_retrieval}


def second_half(counts: Iterator[int], total: int) -> tuple[int, float]:
    """Images of the second half of so many, and seconds."""
    done = timed = begun = 0
    for count in counts:
        done += count
        if begun:
            timed += count
        elif done >= total // 2:
            begun = time.perf_counter()
        if done >= total:
            break
    return timed, time.perf_counter() - begun


def graph_rate(artifact: Artifact, batch: int) -> float:
    """Images per second of the graph's replays alone."""
    model, _ = clip_ttrt.load(artifact.folder)
    images = baselines.example(artifact.manifest["model"], "image", batch, torch.float32, "cuda")
    model.encode_image(images)
    [graphs] = model._encoders["image"].contexts[0].graphs.values()
    [graph] = [each for each in graphs.values() if each]
    times = wall_times_ms(graph.graph.replay, 20, 5, "cuda", queued=10)
    return batch / sorted(times)[len(times) // 2] * 1e3


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--artifact", type=Path, required=True, metavar="DIR")
    add("--pictures", nargs="+", choices=PICTURES, default=list(PICTURES))
    add("--sources", nargs="*", choices=("files", "tar"), default=["files", "tar"])
    add("--decodes", nargs="+", default=["auto", "exact"], help="of clip-ttrt embed")
    add("--gpus", nargs="+", default=["0"], help="of clip-ttrt embed, each a setting: 0 or 0,1")
    add("--peers", nargs="*", choices=PEERS, default=[])
    add("--images", type=int, default=100_000)
    add("--peer-images", type=int, default=20_000)
    add("--folder", type=Path, help="where the pictures are made, a temporary folder by default")
    add("--out", type=Path, default=Path("results/embed.csv"))
    options = parser.parse_args(arguments)
    artifact, cores = read_artifact(options.artifact), len(os.sched_getaffinity(0))
    batch = min(artifact.batch.maximum, LARGEST_EMBED_BATCH)

    def record(backend: str, picture: str, source: str, decode: str, gpus: int, rate: float,
               images: int) -> None:
        append_row(options.out, {
            "backend": backend, "model": artifact.manifest["model"], "picture": picture,
            "source": source, "decode": decode, "gpus": gpus, "cores": cores,
            "images_per_s": f"{rate:.0f}", "images": images,
            **provenance(artifact.manifest["versions"]),
        })  # fmt: skip

    with tempfile.TemporaryDirectory() as temporary:
        root = options.folder or Path(temporary)
        if artifact.device == "cuda":
            record("graph", "", "", "", 1, graph_rate(artifact, batch), 200 * batch)
        for kind in options.pictures:
            folder, archives = corpus(root, kind, options.images, cores)
            inputs = {"files": [folder], "tar": archives}
            for gpus, source, decode in itertools.product(
                options.gpus, options.sources, options.decodes
            ):
                if source == "tar" and decode != options.decodes[0]:
                    continue
                done = embed(artifact.folder, inputs[source], root / "features", gpus=gpus,
                             decode=decode, overwrite=True)
                print(json.dumps(done), flush=True)
                count = len(gpus.split(","))
                record("clip_ttrt", kind, source, decode, count, done["images_per_s"],
                       done["images"])
            for name in options.peers:
                try:
                    counts = PEERS[name](artifact, folder, batch, cores)
                    total = min(options.peer_images, options.images)
                    images, seconds = second_half(counts, total)
                    record(name, kind, "files", "pillow", 1, images / seconds, images)
                except (UserError, ImportError) as problem:
                    print(f"{name}: {problem}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
