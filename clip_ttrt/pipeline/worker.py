"""A shard to features, on one device: threads read, decode and resize batches ahead of the encoder.

The batches of a shard and a picture's place in them follow from the plan alone, and a bad picture
leaves zeros at its place: whatever else happens, the same rows give the same features.
"""
import threading
import time
from collections import Counter, deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Callable, Optional

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
    """What the encoder is given, on the device, and what became of each row."""

    inputs: Tensor  # [size, 3, R, R] or tokens [size, T], size a power of two or the largest batch
    exact: Optional[Tensor] = None  # of the rows `checked`, decoded on the CPU as well
    checked: list[int] = field(default_factory=list)
    good: list[int] = field(default_factory=list)  # rows of the batch with features
    metadata: list[dict[str, Any]] = field(default_factory=list)  # one for each of those
    bad: list[dict[str, Any]] = field(default_factory=list)
    routes: Counter = field(default_factory=Counter)
    seconds: Counter = field(default_factory=Counter)
    ready: Optional[torch.cuda.Event] = None


class Worker:
    """Embeds shards for `Output`.  options: `EmbedOptions`.  device: cpu or cuda:N.

    `progress` is called with counts of what is embedded, after each batch.  Raises UserError where
    the artifact cannot be loaded there, or the decoder cannot be had.
    """

    def __init__(self, artifact: Path, out: Output, options: Any, device: str):
        self.model, _ = load(artifact, device, force=options.force)
        self.out, self.options, self.on_gpu = out, options, self.model.device.type == "cuda"
        self.encode = self.model.encode_text if options.text else self.model.encode_image
        if not options.text:
            side = self.model.visual.input_resolution
            # Without a GPU Pillow's own resize is the fastest.
            mode = "pillow" if options.decode == "auto" and not self.on_gpu else options.decode
            self.decoder = Decoder(mode, side, self.model.device, options.threads)
            self.preprocess = Preprocess(side, self.model.device)
            self.reported = self.decoder.report()
        # CUDA forbids other threads some calls while a graph is captured: none is, later.
        sizes = [1 << power for power in range(options.batch.bit_length())]
        self.model.warmup({*(each for each in sizes if each >= self.model.artifact.batch.minimum),
                           options.batch})
        self.threads = threading.local()
        self.pools = {each: ThreadPoolExecutor(1 if each else LOADERS) for each in (False, True)}
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
            if self.on_gpu:
                torch.cuda.current_stream(self.model.device).synchronize()
        result = {"images": len(metadata), "bad": len(bad), "routes": dict(routes),
                  "decode": {} if self.options.text else self.report(lowest)}

        def finish() -> dict[str, Any]:
            with timed(waited, "write"):
                if only is None:
                    rows = [each[good] for each, good in features]
                    seconds = round(time.perf_counter() - begun, 3)
                    self.out.write(number, np.concatenate(rows), metadata, bad,
                                   {"seconds": seconds, "routes": dict(routes)})
            return {**result, "stages": dict(waited)}

        return finish

    def batches(self, rows: Rows, span: range, killers: set[int], waited: Counter):
        """The batches of a shard in order, a few of them being loaded ahead."""
        size, pool, ahead = self.options.batch, self.pools[rows.sequential], deque()
        starts = iter(range(span.start, span.stop, size))
        try:
            while True:
                while len(ahead) <= LOADERS and (start := next(starts, None)) is not None:
                    part = range(start, min(start + size, span.stop))
                    ahead.append(pool.submit(self.load, rows, part, killers))
                if not ahead:
                    return
                begun = time.perf_counter()
                batch = ahead.popleft().result()
                spent = time.perf_counter() - begun
                total = sum(batch.seconds.values()) or 1
                for stage, seconds in batch.seconds.items():
                    waited[stage] += spent * seconds / total
                yield batch
        finally:
            for each in ahead:
                each.cancel()

    def load(self, rows: Rows, span: range, killers: set[int]) -> Batch:
        """Read, decode and resize rows, on a stream of this thread's own."""
        smallest = max(len(span), self.model.artifact.batch.minimum)
        size = max(smallest, min(1 << (smallest - 1).bit_length(), self.options.batch))
        if self.options.text:
            return self.load_texts(rows, span, killers, size)
        if not self.on_gpu:
            return self.load_pictures(rows, span, killers, size)
        if not hasattr(self.threads, "stream"):
            self.threads.stream = torch.cuda.Stream(self.model.device)
        with torch.cuda.stream(self.threads.stream):
            batch = self.load_pictures(rows, span, killers, size)
            batch.ready = torch.cuda.Event()
            batch.ready.record()
        return batch

    def load_pictures(self, rows: Rows, span: range, killers: set[int], size: int) -> Batch:
        side = self.model.visual.input_resolution
        batch = Batch(torch.empty(size, 3, side, side, device=self.model.device))
        done, step, exact = 0, FRAMES if rows.sequential else len(span), []
        for start in range(span.start, span.stop, step):
            with timed(batch.seconds, "read"):
                records = self.read(rows, range(start, min(start + step, span.stop)), killers)
            items = [b"" if record.error else record.data for record in records]
            parts = iter(self.decoder.parts(items))
            while True:
                with timed(batch.seconds, "decode"):
                    pictures = next(parts, None)
                if pictures is None:
                    break
                pixels = []
                for record, picture in zip(records[done - start + span.start:], pictures):
                    error = record.error or (str(picture) if isinstance(picture, Exception) else "")
                    pixels.append(None if error else picture.pixels)
                    batch.routes[None if error else picture.route] += 1
                    if error:
                        batch.bad.append({"row": span.start + done, "image_path": record.key,
                                          "error": error})
                    else:
                        batch.good.append(done)
                        batch.metadata.append({**record.metadata, "width": picture.width,
                                               "height": picture.height})
                        if picture.exact is not None:
                            batch.checked.append(done)
                            exact.append(picture.exact)
                    done += 1
                with timed(batch.seconds, "resize"):
                    self.preprocess(pixels, batch.inputs[done - len(pixels):done])
        del batch.routes[None]
        batch.inputs[done:].zero_()
        if exact:
            count = max(len(exact), self.model.artifact.batch.minimum)
            padded = exact + [None] * ((1 << (count - 1).bit_length()) - len(exact))
            batch.exact = self.preprocess(padded[:max(size, count)])
        return batch

    def load_texts(self, rows: Rows, span: range, killers: set[int], size: int) -> Batch:
        batch = Batch(torch.zeros(size, self.model.context_length, dtype=torch.int32))
        with timed(batch.seconds, "read"):
            records = self.read(rows, span, killers)
        with timed(batch.seconds, "tokenize"):
            for index, record in enumerate(records):
                if record.error:
                    batch.bad.append({"row": span.start + index, "text": record.key,
                                      "error": record.error})
                    continue
                batch.good.append(index)
                batch.metadata.append(record.metadata)
            if batch.good:
                texts = [records[index].data for index in batch.good]
                batch.inputs[batch.good] = deprecations.clip().tokenize(
                    texts, self.model.context_length, truncate=True).int()
        return batch

    @staticmethod
    def read(rows: Rows, span: range, killers: set[int]) -> list[Record]:
        """Rows of a shard; those that kill are not read."""
        records, start = [], span.start
        for killer in [*sorted(killers.intersection(span)), span.stop]:
            records += rows.read(start, killer) if killer > start else ()
            if killer < span.stop:
                records.append(Record(f"row {killer}", None, {}, KILLED))
            start = killer + 1
        return records

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
        """An array of the wanted dtype, which the GPU has filled once its event is there."""
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
        counts = {name: value - before[name] if isinstance(before[name], int) else value
                  for name, value in self.reported.items() if not name.startswith("largest")}
        counts["largest_distance"] = self.reported["largest_distance"]
        return {**counts, "lowest_cosine": min(map(float, lowest), default=None)}


class timed:
    """Adds the seconds of a block to a stage."""

    def __init__(self, stages: Counter, name: str):
        self.stages, self.name = stages, name

    def __enter__(self):
        self.begun = time.perf_counter()

    def __exit__(self, *_):
        self.stages[self.name] += time.perf_counter() - self.begun
