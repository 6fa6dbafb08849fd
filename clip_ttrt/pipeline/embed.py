"""`embed`: pictures, frames and texts of any number, from files to features."""
import hashlib
import os
import sys
import time
from collections import Counter, deque
from dataclasses import asdict, dataclass, field, fields, replace
from functools import partial
from pathlib import Path
from typing import Any, Optional, Sequence, Union

import torch

from clip_ttrt import stack
from clip_ttrt.artifact import MANIFEST, Artifact, check_runs_here, read_artifact
from clip_ttrt.checkpoint import sha256_of_file
from clip_ttrt.errors import UserError
from clip_ttrt.options import option
from clip_ttrt.pipeline import decode, drive
from clip_ttrt.pipeline.output import Output, to_json
from clip_ttrt.pipeline.sources import plan

LARGEST_BATCH = 512  # beyond it an engine gains little
CLEAR = "\r\x1b[K"  # the line of a terminal


@dataclass(frozen=True)
class EmbedOptions:
    """Everything that `embed` can be told.  Raises UserError for a value outside its choices."""

    text: bool = option(False, help="inputs are texts: a line of a file or a column")
    every: Union[str, float] = option("1s", "SECONDS", "between the frames of a video")
    column: Optional[str] = option(None, "NAME", "of a .parquet or .csv (default: found by its "
                                   "type or name)")
    shard_rows: int = option(10_000, "N", "rows of a shard, which is written whole or not at all")
    batch: Optional[int] = option(None, "N", "of the encoder (default: the artifact's largest, up "
                                  f"to {LARGEST_BATCH})")
    dtype: str = option("float16", ("float16", "float32"), "of the features")
    normalize: bool = option(True, help="scale features to length 1")
    decode: str = option("auto", decode.MODES, "auto: by the GPU where that is within one level; "
                         "exact: pixels equal Pillow's")
    gpus: str = option("0", "all|0,1", "one process for each")
    ray: Optional[str] = option(None, "ADDRESS", "run on Ray Data: on the cluster at this address, "
                                "or on a local one")
    shards: Optional[str] = option(None, "I/N", "of array jobs: the shards whose number modulo N "
                                   "is I, from 0 to N-1")
    max_bad: Union[str, float] = option("1%", "SHARE", "of bad rows, above which exit code 3 says "
                                        "so")
    retry_bad: bool = option(False, help="embed shards with bad rows again")
    overwrite: bool = option(False, help="delete what an earlier run wrote to --output")
    force: bool = option(False, help="use an artifact that failed its verification")
    threads: Optional[int] = option(None, "N", "of each process (default: its share of the cores)")

    def __post_init__(self):
        for each in fields(self):
            value, choices = getattr(self, each.name), each.metadata["values"]
            if isinstance(choices, tuple) and value not in choices:
                raise UserError(f"unknown {each.name} {value!r}; choices: {', '.join(choices)}")
        for name in ("shard_rows", "batch", "threads"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"--{name.replace('_', '-')} {value}: at least 1 is needed")
        object.__setattr__(self, "every", parse("every", self.every, "s", 1))
        object.__setattr__(self, "max_bad", parse("max-bad", self.max_bad, "%", 0.01))
        if not self.every > 0:
            raise UserError(f"--every {self.every}: seconds above 0 are needed")
        if self.shards and self.overwrite:
            raise UserError("--shards with --overwrite: each job would delete the others' shards")
        self.chosen(0)

    def chosen(self, number: int) -> bool:
        """Whether a shard is of those that `shards` asks for."""
        index, _, count = (self.shards or "0/1").partition("/")
        if not (index.isdecimal() and count.isdecimal() and int(index) < int(count)):
            raise UserError(f"bad --shards {self.shards!r}: write I/N, with I from 0 to N-1")
        return number % int(count) == int(index)


def parse(name: str, value: Union[str, float], unit: str, scale: float) -> float:
    """A number, which the unit behind it scales."""
    text = str(value).strip()
    try:
        return float(text.removesuffix(unit)) * (scale if text.endswith(unit) else 1)
    except ValueError:
        raise UserError(f"bad --{name} {value!r}: write a number, as 1{unit}") from None


@dataclass
class Summary:
    """What a run did, and where its time went."""

    images: int = 0  # rows (frames and texts, too) to which this run gave features
    bad: int = 0  # rows that it put into bad/
    seconds: float = 0  # of the whole call
    starting: float = 0  # of these, until the first device was ready
    images_per_s: float = 0  # over the others
    shards: int = 0  # written by this run
    skipped: int = 0  # shards written before, or of other array jobs
    devices: list[str] = field(default_factory=list)
    routes: dict[str, int] = field(default_factory=dict)  # pictures by who decoded them
    stages: dict[str, float] = field(default_factory=dict)  # seconds that encoders waited for each
    decode: dict[str, Any] = field(default_factory=dict)  # what the decoders report
    total_images: int = 0  # of the whole output, earlier runs included
    total_bad: int = 0

    def bad_share(self) -> float:
        """Of all rows of the output."""
        return self.total_bad / max(1, self.total_images + self.total_bad)

    def count(self, result: dict[str, Any]) -> None:
        """Add what `Worker.run` returns for a shard."""
        self.shards += 1
        self.images += result["images"]
        self.bad += result["bad"]
        for name in ("routes", "stages", "decode"):
            total = getattr(self, name)
            for key, value in result.get(name, {}).items():
                both = [each for each in (total.get(key), value) if each is not None]
                whole = {"largest": max, "lowest": min, "problem": max}.get(key.split("_")[0], sum)
                total[key] = whole(both) if both else None


class Meter:
    """Progress on a stream: one line that renews itself on a terminal, else a line every 10 s."""

    def __init__(self, rows: int, stream=None):
        self.rows, self.stream = rows, stream or sys.stderr
        self.live, self.summary = self.stream.isatty(), Summary()
        self.begun = self.shown = time.perf_counter()
        self.partial: Counter = Counter()  # images of shards that are not written yet, by device
        self.recent = deque([(self.begun, 0)], maxlen=20 if self.live else 2)

    def ready(self) -> None:
        """The first call tells that a device is ready."""
        self.summary.starting = self.summary.starting or time.perf_counter() - self.begun

    def running(self, device: str, counts: dict[str, Any]) -> None:
        self.partial[device] += counts["images"]
        self.show()

    def count(self, device: str, result: dict[str, Any]) -> None:
        self.partial[device] = max(0, self.partial[device] - result["images"])
        self.summary.count(result)
        self.show()

    def lost(self, device: str, exit_code: int, task: Optional[drive.Task]) -> None:
        self.partial[device] = 0
        shard = f" in shard {task.number}" if task else ""
        self.say(f"the process of {device} died{shard} (exit code {exit_code}); another starts")

    def say(self, line: str) -> None:
        self.clear()
        print(f"clip_ttrt: {line}", file=self.stream, flush=True)

    def clear(self) -> None:
        print(CLEAR * self.live, end="", file=self.stream, flush=True)

    def show(self) -> None:
        now, done = time.perf_counter(), self.summary
        if now - self.shown < (0.5 if self.live else 10):
            return
        self.shown, images = now, done.images + sum(self.partial.values())
        then, before = self.recent[0]
        self.recent.append((now, images))
        rate, decoded = (images - before) / (now - then), sum(done.routes.values())
        parts = [f"{images:,} of {self.rows:,} images", f"{rate:,.0f} images/s"]
        parts += [f"{name} {count / decoded:.0%}" for name, count in done.routes.items() if count]
        parts += [f"waits for {max(done.stages, key=done.stages.get)}"] if done.stages else []
        parts += [f"{done.bad:,} bad"] if done.bad else []
        parts += [f"{(self.rows - images - done.bad) / rate:,.0f} s left"] if rate > 0 else []
        self.clear()
        print("clip_ttrt: " + ", ".join(parts), end="" if self.live else "\n", file=self.stream,
              flush=True)


def embed(artifact: Union[str, Path], inputs: Union[str, Sequence[str]], output: Union[str, Path],
          *, devices: Optional[Sequence[str]] = None, stream=None, **options: Any) -> Summary:
    """Embed pictures, frames of videos or texts into OUTPUT, and go on where a run was stopped.

    inputs: folders, globs, lists, archives, tables or videos, local or URLs that fsspec knows.
    devices: `cpu` or `cuda:N`, a process each; by default those of the option `gpus`.
    stream: of the progress, by default standard error.  options: fields of `EmbedOptions`.
    OUTPUT gets img_emb/img_emb_N.npy or text_emb/text_emb_N.npy, [rows, embed_dim] of `dtype`,
    metadata/metadata_N.parquet with a row for each, bad/ with what cannot be read, and why.
    With more than one process, or a GPU, a script needs `if __name__ == "__main__":` around it.
    Raises UserError for bad input, for an OUTPUT of another artifact, inputs or options, and
    where processes fail: what is done then stays, and the same call goes on.
    """
    options, started = EmbedOptions(**options), time.perf_counter()
    model, kind = read_artifact(artifact), "text" if options.text else "image"
    if kind not in model.encoders:
        raise UserError(f"{artifact} holds no {kind} encoder; compile with --encoder both")
    if model.verified is False and not options.force:
        raise UserError(f"{artifact} failed its verification; compile anew, or --force")
    if options.ray is None:
        check_runs_here(model)
        devices = list(devices or devices_of(model, options.gpus))
        cores, run = len(os.sched_getaffinity(0)), drive.run
    else:
        from clip_ttrt.pipeline import ray

        devices, cores = ray.devices(options.ray, model.device, options.threads)
        run = ray.run
    options = replace(options, threads=options.threads or max(1, cores // len(devices)),
                      batch=min(options.batch or LARGEST_BATCH, model.batch.maximum))
    inputs = [inputs] if isinstance(inputs, (str, Path)) else inputs
    shards = plan(list(map(str, inputs)), options.text, options.shard_rows, options.every,
                  options.column)
    out = Output(output, kind, len(shards))
    out.begin(identity(model, shards, options), options.overwrite)
    if options.retry_bad:
        out.retry()
    todo = [number for number in sorted(set(range(len(shards))) - out.done())
            if options.chosen(number)]
    meter = Meter(sum(len(shards[number]) for number in todo), stream)
    meter.begun, summary = started, meter.summary
    summary.devices, summary.skipped = devices, len(shards) - len(todo)
    from clip_ttrt.pipeline.worker import Worker  # needs all that a run does

    make_worker = partial(Worker, model.folder, out, options)
    try:
        run(shards, todo, make_worker, devices, out, meter)
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"interrupted; {len(out.done())} of {len(shards)} shards are "
                                "done, and the same command goes on") from None
    finally:
        meter.clear()
    written = out.checkpoints()  # and not the processes, which may have died before they told
    summary.total_images, summary.total_bad = (
        sum(each[name] for each in written.values()) for name in ("rows", "bad"))
    ours = [written[number] for number in todo if number in written]
    summary.shards, summary.images, summary.bad = (
        len(ours), sum(each["rows"] for each in ours), sum(each["bad"] for each in ours))
    summary.seconds = time.perf_counter() - started
    summary.images_per_s = summary.images / (summary.seconds - summary.starting)
    meter.say(f"{output} holds {summary.total_images:,} features; {summary.total_bad:,} bad rows")
    out.put("summary.json", to_json(asdict(summary)))
    return summary


def devices_of(model: Artifact, gpus: str) -> list[str]:
    """The devices that `--gpus` names for an artifact."""
    if model.device == "cpu":
        return ["cpu"]
    count = torch.cuda.device_count()
    numbers = list(map(str, range(count))) if gpus == "all" else gpus.split(",")
    if not all(number.isdecimal() and int(number) < count for number in numbers):
        raise UserError(f"bad --gpus {gpus!r}: write all, or of 0 to {count - 1} some as 0,1")
    return [f"cuda:{int(number)}" for number in dict.fromkeys(numbers)]


def identity(model: Artifact, shards: Sequence, options: EmbedOptions) -> dict[str, Any]:
    """What the bytes of the output follow from, which run.json keeps and another run must equal."""
    inputs = hashlib.sha256("\n".join(rows.digest() for rows in shards).encode())
    run = {"artifact": sha256_of_file(model.folder / MANIFEST), "model": model.manifest["model"],
           "inputs": inputs.hexdigest(), "rows": sum(map(len, shards)),
           "shard_rows": options.shard_rows, "batch": options.batch, "dtype": options.dtype,
           "normalize": options.normalize, "versions": stack.versions()}
    if not options.text:
        import PIL

        from clip_ttrt.pipeline.resize import pillow_order

        side = model.dimensions.image_resolution
        run |= {"decode": options.decode, "pillow": PIL.__version__, "order": pillow_order(),
                "preprocess": f"bicubic, crop, {side}"}
    return run
