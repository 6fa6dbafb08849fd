"""A shard to features, on one device: threads read, decode and resize batches ahead of the encoder.

The batches of a shard and a picture's place in them follow from the plan alone, and a bad picture
leaves zeros at its place: whatever else happens, the same rows give the same features.
"""
import contextlib
import threading
import time
from collections import Counter, deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Callable, Iterator, Optional

import numpy as np
import torch
from torch import Tensor, nn

from clip_ttrt import deprecations
from clip_ttrt.pipeline.decode import Decoder
from clip_ttrt.pipeline.output import Output
from clip_ttrt.pipeline.resize import Preprocess
from clip_ttrt.pipeline.sources import Record, Rows
from clip_ttrt.runtime import load

LOADERS = 3  # batches that are read and decoded at once
IN_FLIGHT = 2  # batches that the GPU may be behind
FRAMES = 16  # of a video in memory at once
KILLED = "it killed the process that embedded it"


@dataclass
class Batch:
    """What the encoder is given, and what became of each row."""

    inputs: Tensor  # images [size, 3, R, R] on the device, or tokens [size, T]
    exact: Optional[Tensor] = None  # images of the rows `checked`, decoded on the CPU as well
    checked: list[int] = field(default_factory=list)
    good: list[int] = field(default_factory=list)  # rows of the batch with features
    metadata: list[dict[str, Any]] = field(default_factory=list)  # one for each of those
    bad: list[dict[str, Any]] = field(default_factory=list)
    routes: Counter = field(default_factory=Counter)
    seconds: Counter = field(default_factory=Counter)  # of each stage
    ready: Optional[torch.cuda.Event] = None


class Worker:
    """Embeds shards for `Output`.  options: `EmbedOptions`.  device: cpu or cuda:N.

    `progress` is called with the count of images after each batch.  Raises UserError where the
    artifact cannot be loaded there, or the decoder cannot be had.
    """

    def __init__(self, artifact: Path, out: Output, options: Any, device: str):
        self.model, _ = load(artifact, device, force=options.force)
        self.out, self.options, self.on_gpu = out, options, self.model.device.type == "cuda"
        self.encode = self.model.encode_text if options.text else self.model.encode_image
        self.smallest = self.model.artifact.batch.minimum
        # All graphs are captured here: CUDA forbids other threads some calls meanwhile.
        sizes = (1 << power for power in range(options.batch.bit_length()))
        self.model.warmup({options.batch, *(size for size in sizes if size >= self.smallest)})
        if not options.text:
            # Without a GPU Pillow's own resize is the fastest.
            mode = "pillow" if options.decode == "auto" and not self.on_gpu else options.decode
            side = self.model.visual.input_resolution
            self.decoder = Decoder(mode, side, self.model.device, options.threads)
            self.preprocess = Preprocess(side, self.model.device)
            self.reported = self.decoder.report()
        self.threads = threading.local()  # each loader has a stream of its own
        self.pools = {order: ThreadPoolExecutor(1 if order else LOADERS) for order in (False, True)}
        self.progress: Callable[[dict], None] = lambda counts: None

    def run(self, number: int, rows: Rows, only: Optional[range] = None) -> dict[str, Any]:
        """Embed a shard and write it; with `only`, try those rows and write nothing.

        Returns images and bad, counts of rows; routes; stages, seconds waited for each; decode,
        what the decoder reports of these rows.
        """
        return self.embed(number, rows, only)()

    def embed(self, number: int, rows: Rows, only: Optional[range] = None) -> Callable[[], dict]:
        """Embed a shard.  Returns what writes it and gives the result of `run`, for any thread."""
        begun, waited, routes = time.perf_counter(), Counter(), Counter()
        features, metadata, bad, in_flight, lowest = [], [], [], deque(), []
        for batch in self.batches(rows, only or range(len(rows)), self.out.crashed(number), waited):
            if len(in_flight) == IN_FLIGHT:
                with timed(waited, "encode"):
                    in_flight.popleft().synchronize()
            with timed(waited, "encode"):
                found = self.features(batch.inputs, batch.ready)
            if batch.checked:
                exact = self.features(batch.exact, batch.ready)[:len(batch.checked)]
                lowest.append(nn.functional.cosine_similarity(found[batch.checked], exact).min())
            features.append((self.to_host(found, in_flight), batch.good))
            metadata += batch.metadata
            bad += batch.bad
            routes += batch.routes
            self.progress({"images": len(batch.good)})
        with timed(waited, "encode"):
            for event in in_flight:
                event.synchronize()
        result = {"images": len(metadata), "bad": len(bad), "routes": dict(routes),
                  "decode": {} if self.options.text else self.report(lowest)}

        def finish() -> dict[str, Any]:
            with timed(waited, "write"):
                if only is None:
                    about = {"seconds": round(time.perf_counter() - begun, 3), "routes": routes}
                    self.out.write(number, np.concatenate([rows[good] for rows, good in features]),
                                   metadata, bad, about)
            return {**result, "stages": dict(waited)}

        return finish

    def batches(self, rows: Rows, span: range, killers: set[int], waited: Counter
                ) -> Iterator[Batch]:
        """The batches of a shard in order, a few of them being loaded ahead."""
        size, pool, ahead = self.options.batch, self.pools[rows.sequential], deque()
        parts = [range(start, min(start + size, span.stop)) for start in span[::size]]
        try:
            for index in range(len(parts)):
                for part in parts[index + len(ahead):index + LOADERS + 1]:
                    ahead.append(pool.submit(self.load, rows, part, killers))
                begun = time.perf_counter()
                batch = ahead.popleft().result()
                share = (time.perf_counter() - begun) / (sum(batch.seconds.values()) or 1)
                waited.update({stage: spent * share for stage, spent in batch.seconds.items()})
                yield batch
        finally:
            for each in ahead:
                each.cancel()

    def size_for(self, count: int) -> int:
        """A power of two where the artifact has it, so that few graphs serve all batches."""
        count = max(count, self.smallest)
        return max(count, min(1 << (count - 1).bit_length(), self.options.batch))

    def load(self, rows: Rows, span: range, killers: set[int]) -> Batch:
        """Read and prepare rows of a shard, on a GPU on a stream of this thread's own."""
        if self.options.text:
            return self.load_texts(rows, span, killers)
        if not self.on_gpu:
            return self.load_pictures(rows, span, killers)
        if not hasattr(self.threads, "stream"):
            self.threads.stream = torch.cuda.Stream(self.model.device)
        with torch.cuda.stream(self.threads.stream):
            batch = self.load_pictures(rows, span, killers)
            batch.ready = torch.cuda.Event()
            batch.ready.record()
        return batch

    def load_pictures(self, rows: Rows, span: range, killers: set[int]) -> Batch:
        side, done, exact = self.model.visual.input_resolution, 0, []
        batch = Batch(torch.empty(self.size_for(len(span)), 3, side, side,
                                  device=self.model.device))
        step = FRAMES if rows.sequential else len(span)
        for start in range(span.start, span.stop, step):
            with timed(batch.seconds, "read"):
                records = read(rows, range(start, min(start + step, span.stop)), killers)
            parts = self.decoder.parts([b"" if each.error else each.data for each in records])
            left = iter(records)
            while True:
                with timed(batch.seconds, "decode"):
                    pictures = next(parts, None)
                if pictures is None:
                    break
                pixels = []
                for picture, record in zip(pictures, left):
                    row, error = done + len(pixels), record.error
                    if error or isinstance(picture, Exception):
                        batch.bad.append({"row": span.start + row, "image_path": record.key,
                                          "error": error or str(picture)})
                        pixels.append(None)
                        continue
                    pixels.append(picture.pixels)
                    batch.good.append(row)
                    batch.metadata.append({**record.metadata, "width": picture.width,
                                           "height": picture.height})
                    batch.routes[picture.route] += 1
                    if picture.exact is not None:
                        batch.checked.append(row)
                        exact.append(picture.exact)
                with timed(batch.seconds, "resize"):
                    self.preprocess(pixels, batch.inputs[done:done + len(pixels)])
                done += len(pixels)
        batch.inputs[done:].zero_()
        if exact:
            batch.exact = self.preprocess(exact + [None] * (self.size_for(len(exact)) - len(exact)))
        return batch

    def load_texts(self, rows: Rows, span: range, killers: set[int]) -> Batch:
        batch = Batch(torch.zeros(self.size_for(len(span)), self.model.context_length,
                                  dtype=torch.int32))
        with timed(batch.seconds, "read"):
            records = read(rows, span, killers)
        batch.bad = [{"row": span.start + row, "text": record.key, "error": record.error}
                     for row, record in enumerate(records) if record.error]
        batch.good = [row for row, record in enumerate(records) if not record.error]
        batch.metadata = [records[row].metadata for row in batch.good]
        with timed(batch.seconds, "tokenize"):
            if batch.good:
                batch.inputs[batch.good] = deprecations.clip().tokenize(
                    [records[row].data for row in batch.good], self.model.context_length,
                    truncate=True).int()
        return batch

    def features(self, inputs: Tensor, ready: Optional[torch.cuda.Event]) -> Tensor:
        """float32 [size, E] on the device, in the order of the current stream."""
        if ready is not None:
            stream = torch.cuda.current_stream(self.model.device)
            stream.wait_event(ready)
            inputs.record_stream(stream)
        with torch.inference_mode():
            found = self.encode(inputs)
            return nn.functional.normalize(found, dim=-1) if self.options.normalize else found

    def to_host(self, features: Tensor, in_flight: deque) -> np.ndarray:
        """An array of the wanted dtype, which on a GPU is filled once the new event is there."""
        features = features.to(getattr(torch, self.options.dtype))
        host = torch.empty(features.shape, dtype=features.dtype, pin_memory=self.on_gpu)
        host.copy_(features, non_blocking=True)
        if self.on_gpu:
            in_flight.append(torch.cuda.Event(blocking=True))
            in_flight[-1].record()
        return host.numpy()

    def report(self, lowest: list[Tensor]) -> dict[str, Any]:
        """What the decoder has counted since the last report, and the lowest cosine of features
        between pictures of the GPU's engines and the same from the CPU."""
        before, self.reported = self.reported, self.decoder.report()
        counts = {name: value if name == "largest_distance" or isinstance(value, str)
                  or value is None else value - before[name]
                  for name, value in self.reported.items()}
        return {**counts, "lowest_cosine": min(map(float, lowest), default=None)}


def read(rows: Rows, span: range, killers: set[int]) -> list[Record]:
    """Rows of a shard; those that kill are not read."""
    records, start = [], span.start
    for killer in [*sorted(killers.intersection(span)), span.stop]:
        records += rows.read(start, killer) if killer > start else ()
        if killer < span.stop:
            records.append(Record(f"row {killer}", None, {}, KILLED))
        start = killer + 1
    return records


@contextlib.contextmanager
def timed(stages: Counter, name: str) -> Iterator[None]:
    """Adds the seconds of a block to a stage."""
    begun = time.perf_counter()
    yield
    stages[name] += time.perf_counter() - begun
