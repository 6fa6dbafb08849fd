"""`embed`: pictures, frames and texts of any number, from files to features."""
import hashlib
import os
import sys
import time
from collections import Counter
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Optional, Sequence, Union

import PIL
import torch
from tqdm import tqdm

from clip_ttrt import stack
from clip_ttrt.artifact import MANIFEST, Artifact, check_runs_here, read_artifact
from clip_ttrt.checkpoint import sha256_of_file
from clip_ttrt.errors import UserError
from clip_ttrt.options import LARGEST_EMBED_BATCH, EmbedOptions
from clip_ttrt.pipeline import drive, ray
from clip_ttrt.pipeline.output import Output, to_json
from clip_ttrt.pipeline.resize import pillow_order
from clip_ttrt.pipeline.sources import Rows, plan
from clip_ttrt.pipeline.worker import Worker


class Progress:
    """A bar with images/s, the share of each decoder and what encoders wait for most."""

    def __init__(self, rows: int):
        self.rows, self.ready_at, self.stages, self.decode = 0, {}, Counter(), {}
        self.bar = tqdm(total=rows, unit=" images", dynamic_ncols=True, leave=False, delay=1,
                        mininterval=0.5 if sys.stderr.isatty() else 10)

    def ready(self, device: str = "") -> None:
        self.ready_at.setdefault(device, time.perf_counter())

    def count(self, result: dict[str, Any]) -> None:
        """Add the result of `Worker.embed` for a shard."""
        self.rows += result["images"] + result["bad"]
        self.stages.update(result["stages"])
        if result["decode"].get("problem") and not self.decode.get("problem"):
            self.say(f"no JPEG is decoded on the GPU: {result['decode']['problem']}")
        for name, value in result["decode"].items():
            whole = {"largest": max, "lowest": min, "problem": max}.get(name.split("_")[0], sum)
            both = [each for each in (self.decode.get(name), value) if each is not None]
            self.decode[name] = whole(both) if both else None
        routes = Counter({name: self.decode.get(name, 0) for name in ("gpu", "cpu", "pillow")})
        parts = [f"{name} {count / routes.total():.0%}" for name, count in (+routes).most_common()]
        parts += [f"waits for {name}" for name, _ in self.stages.most_common(1)]
        self.bar.set_postfix_str(", ".join(parts), refresh=False)
        self.bar.update(self.rows - self.bar.n)

    def say(self, line: str) -> None:
        tqdm.write(f"clip_ttrt: {line}", file=self.bar.fp)


def embed(artifact: Union[str, Path], inputs: Union[str, Sequence], output: Union[str, Path], *,
          devices: Optional[Sequence[str]] = None, worker: Any = Worker, **options: Any) -> dict:
    """Embed pictures, frames of videos or texts into OUTPUT, and go on where a run was stopped.

    inputs: folders, globs, lists, archives, tables or videos, local or URLs that fsspec knows, or
    `Rows`, a shard each.  devices: `cpu` or `cuda:N`, a process each (default: by `gpus`).
    worker: what a process makes of an artifact.  options: of `EmbedOptions`.
    OUTPUT gets img_emb/img_emb_N.npy or text_emb/text_emb_N.npy, [rows, embed_dim] of `dtype`,
    metadata/metadata_N.parquet with a row for each, bad/ with what cannot be read, and why.
    With more than one process, or a GPU, a script needs `if __name__ == "__main__":` around it.
    Returns a summary, also in OUTPUT: counts of this run and of the whole output, seconds, and
    images/s once the devices are ready, on average.  Raises UserError for bad input, an OUTPUT of
    another artifact, inputs or options, and where processes fail: the same call then goes on."""
    begun, options = time.perf_counter(), EmbedOptions(**options)
    model, kind = read_artifact(artifact), "text" if options.text else "image"
    if kind not in model.encoders:
        raise UserError(f"{artifact} holds no {kind} encoder; compile with --encoder both")
    if options.ray:
        devices, cores = ray.devices(options.ray, model.device, options.threads)
    else:
        check_runs_here(model)
        cores, found = len(os.sched_getaffinity(0)), torch.cuda.device_count()
        devices = devices or (["cpu"] if model.device == "cpu" else options.devices(found))
    options = replace(options, threads=options.threads or max(1, cores // len(devices)),
                      batch=min(options.batch or LARGEST_EMBED_BATCH, model.batch.maximum))
    inputs = [inputs] if isinstance(inputs, (str, Path)) else inputs
    shards = inputs if any(isinstance(each, Rows) for each in inputs) else plan(
        list(map(str, inputs)), options.text, options.shard_rows, options.every, options.column)
    out = (output if callable(output) else partial(Output, output))(kind, len(shards))
    out.begin(identity(model, shards, options), options.overwrite)
    if options.retry_bad:
        out.retry()
    todo = sorted(options.of_this_job(len(shards)).difference(out.done()))
    progress = Progress(sum(len(shards[number]) for number in todo))
    execute = partial((ray if options.ray else drive).execute, devices=devices, progress=progress,
                      make_worker=partial(worker, model.folder, out, options))
    try:
        with progress.bar:
            drive.run(shards, todo, execute, out, progress)
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"interrupted; {len(out.done())} of {len(shards)} shards are "
                                "done, and the same command goes on") from None
    written, end = out.done(), time.perf_counter()  # and not what processes have told
    ours = [written[number] for number in todo if number in written]
    images, bad, total_images, total_bad = (
        sum(each[name] for each in some) for some in (ours, written.values())
        for name in ("rows", "bad"))
    ready = sum(progress.ready_at.values()) / len(progress.ready_at) if progress.ready_at else end
    summary = {"images": images, "bad": bad, "shards": len(ours),
               "skipped": len(shards) - len(todo), "total_images": total_images,
               "total_bad": total_bad, "bad_share": total_bad / max(1, total_images + total_bad),
               "seconds": end - begun, "starting": ready - begun,
               "images_per_s": images / max(end - ready, 1e-3), "devices": list(devices),
               "stages": progress.stages, "decode": progress.decode}
    out.put("summary.json", to_json(summary))
    return summary


def identity(model: Artifact, shards: Sequence, options: EmbedOptions) -> dict[str, Any]:
    """What the bytes of the output follow from, which run.json keeps and another run must equal."""
    run = {name: getattr(options, name) for name in ("shard_rows", "batch", "dtype", "normalize")}
    inputs = hashlib.sha256("\n".join(rows.digest() for rows in shards).encode()).hexdigest()
    run |= {"artifact": sha256_of_file(model.folder / MANIFEST), "model": model.manifest["model"],
            "input list": inputs, "rows": sum(map(len, shards)), **stack.versions()}
    if not options.text:
        run |= {"decode": options.decode, "Pillow": PIL.__version__, "order": pillow_order(),
                "preprocess": {**model.model.preprocess, "R": model.dimensions.image_resolution}}
    return run
