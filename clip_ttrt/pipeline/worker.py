"""A shard to features, on one device: threads load batches ahead of the encoder.

A row's batch and place follow from the plan alone, and a bad picture leaves zeros there: whatever
else happens, the same rows give the same features."""
import time
from collections import Counter, deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, Callable, Iterator, Optional

import torch
from torch import Tensor, nn

from clip_ttrt import kernels
from clip_ttrt.pipeline.output import Output
from clip_ttrt.pipeline.sources import Record, Rows
from clip_ttrt.runtime import load

LOADERS = 3  # batches that are read and decoded at once
IN_FLIGHT = 2  # batches that the GPU may be behind
FRAMES = 16  # of a video in memory at once
KILLED = "it killed the process that embedded it"


@dataclass
class Batch:
    """What the encoder is given, and the rows that it is of."""
    inputs: Tensor  # images [size, 3, R, R] on the device, or tokens [size, T]
    records: list[Record] = field(default_factory=list)  # those with an error get no features
    exact: Optional[Tensor] = None  # images of the rows `checked`, decoded on the CPU as well
    checked: list[int] = field(default_factory=list)
    seconds: Counter = field(default_factory=Counter)  # of each stage
    ready: Optional[torch.cuda.Event] = None


class Worker:
    """Embeds shards for `Output`, on cpu or cuda:N; UserError where artifact or decoder fail."""

    def __init__(self, artifact: Path, out: Output, options: Any, device: str):
        self.model, _ = load(artifact, device, force=options.force)
        self.out, self.options, self.on_gpu = out, options, self.model.device.type == "cuda"
        self.encode = self.model.encode_text if options.text else self.model.encode_image
        # All graphs are captured here: CUDA forbids other threads some calls meanwhile.
        self.model.warmup({self.size_for(count) for count in range(1, options.batch + 1)})
        if not options.text:
            own = options.decode == "auto" and not self.on_gpu  # Pillow's resize is faster there
            self.decoder = self.model.decoder("pillow" if own else options.decode, options.threads)
            self.preprocess = self.model.resize
        out.table([{"": ""}])  # arrow's imports take their time, and not that of the first shard
        # Threads that know nothing of this worker, and so end with it, each on a stream of its own.
        own = (lambda: torch.cuda.set_stream(torch.cuda.Stream(device))) if self.on_gpu else None
        self.pools = [ThreadPoolExecutor(n, initializer=own) for n in (LOADERS, 1)]
        self.progress: Callable[[int], Any] = lambda images: None
        if self.on_gpu and not options.text:  # what a process does for the first time takes longer
            files = [*map(str, kernels.PACKAGE.glob("pictures/*.jpg"))] * options.batch
            self.embed(0, Rows(files), range((LOADERS + 1) * options.batch))()

    def embed(self, number: int, rows: Rows, only: Optional[range] = None) -> Callable[[], dict]:
        """Embed a shard or, with `only`, try those rows.  Returns what writes the shard, in any
        thread, and returns images and bad (rows), stages (seconds waited), decode (a report)."""
        if only is None:
            self.out.start(number)
        waited, span = Counter(), only or range(len(rows))
        features, records, lowest, in_flight = [], [], [], deque()
        for batch in self.batches(rows, span, self.out.crashed(number), waited):
            if len(in_flight) == IN_FLIGHT:
                timed(waited, "encode", in_flight.popleft().synchronize)
            found = timed(waited, "encode", self.features, batch.inputs, batch.ready)
            if batch.checked:
                exact = self.features(batch.exact, batch.ready)[:len(batch.checked)]
                approximate = torch.stack([found[row] for row in batch.checked])  # needs no wait
                lowest.append(nn.functional.cosine_similarity(approximate, exact).min())
            found = found[:len(batch.records)].to(getattr(torch, self.options.dtype))
            features.append(torch.empty(found.shape, dtype=found.dtype, pin_memory=self.on_gpu))
            features[-1].copy_(found, non_blocking=True)
            if self.on_gpu:
                in_flight.append(torch.cuda.Event(blocking=True))
                in_flight[-1].record()
            records += batch.records
            self.progress(sum(not each.error for each in batch.records))
        metadata = [each.metadata for each in records if not each.error]
        bad = [{"row": row, "text" if self.options.text else "image_path": each.key,
                "error": each.error} for row, each in zip(span, records) if each.error]
        report = {} if self.options.text else self.decoder.report()

        def finish() -> dict[str, Any]:
            for event in in_flight:
                timed(waited, "encode", event.synchronize)
            if report:  # of pictures that were decoded twice
                report["lowest_cosine"] = min(map(float, lowest), default=None)
            if only is None:
                found = torch.cat(features).numpy()[[not each.error for each in records]]
                timed(waited, "write", self.out.write, number, found, metadata, bad, report)
            return {"images": len(metadata), "bad": len(bad), "decode": report, "stages": waited}
        return finish

    def batches(self, rows: Rows, span: range, killers: set, waited: Counter) -> Iterator[Batch]:
        """The batches of a shard in order, a few of them being loaded ahead."""
        size, pool = self.options.batch, self.pools[rows.sequential]
        load = self.load_texts if self.options.text else self.load_pictures
        loads = (pool.submit(load, rows, span[start:start + size], killers)
                 for start in range(0, len(span), size))
        ahead = deque(islice(loads, LOADERS + 1))
        while ahead:
            begun = time.perf_counter()
            batch = ahead.popleft().result()
            share = (time.perf_counter() - begun) / (sum(batch.seconds.values()) or 1)
            waited.update({stage: spent * share for stage, spent in batch.seconds.items()})
            yield batch
            ahead.extend(islice(loads, 1))

    def size_for(self, count: int) -> int:
        """A power of two where the artifact has it, so that few graphs serve all batches."""
        smallest = self.model.artifact.batch.minimum
        return max(count, smallest, min(1 << (count - 1).bit_length(), self.options.batch))

    def load_pictures(self, rows: Rows, span: range, killers: set[int]) -> Batch:
        """Read and prepare rows of a shard, on a GPU on the stream of this thread."""
        side, exact, device = self.model.visual.input_resolution, {}, self.model.device
        batch = Batch(torch.empty(self.size_for(len(span)), 3, side, side, device=device))
        step = FRAMES if rows.sequential else len(span)
        for start in range(0, len(span), step):
            records = timed(batch.seconds, "read", read, rows, span[start:start + step], killers)
            parts = self.decoder.parts([b"" if each.error else each.data for each in records])
            left, done = iter(records), start
            while pictures := timed(batch.seconds, "decode", next, parts, None):
                for row, (one, record) in enumerate(zip(pictures, left), done):
                    record.error, record.data = record.error or one.error, None
                    record.metadata = {**record.metadata, "width": one.width, "height": one.height}
                    if one.exact is not None:
                        exact[row] = one.exact
                begin, done = done, done + len(pictures)
                timed(batch.seconds, "resize", self.preprocess,
                      [each.pixels for each in pictures], batch.inputs[begin:done])
            batch.records += records
        batch.inputs[len(span):].zero_()
        if exact:
            padding = [None] * (self.size_for(len(exact)) - len(exact))
            batch.checked, batch.exact = [*exact], self.preprocess([*exact.values(), *padding])
        batch.ready = torch.cuda.current_stream(device).record_event() if self.on_gpu else None
        return batch

    def load_texts(self, rows: Rows, span: range, killers: set[int]) -> Batch:
        seconds = Counter()
        records = timed(seconds, "read", read, rows, span, killers)
        texts = ["" if each.error else each.data for each in records]
        texts += [""] * (self.size_for(len(span)) - len(span))
        tokens = timed(seconds, "tokenize", self.model.tokenize, texts, True)
        return Batch(tokens, records, seconds=seconds)

    def features(self, inputs: Tensor, ready: Optional[torch.cuda.Event]) -> Tensor:
        """float32 [size, E] on the device, in the order of the current stream."""
        if ready is not None:
            stream = torch.cuda.current_stream(self.model.device)
            stream.wait_event(ready)
            inputs.record_stream(stream)
        with torch.inference_mode():
            found = self.encode(inputs)
            return nn.functional.normalize(found, dim=-1) if self.options.normalize else found


def read(rows: Rows, span: range, killers: set[int]) -> list[Record]:
    """Rows of a shard; those that kill are not read."""
    if killers.isdisjoint(span):
        return rows.read(span.start, span.stop)
    return [Record(f"row {row}", None, {}, KILLED) if row in killers
            else rows.read(row, row + 1)[0] for row in span]


def timed(stages: Counter, name: str, call: Callable, *arguments: Any) -> Any:
    """What a call returns; its seconds are added to a stage."""
    begun = time.perf_counter()
    result = call(*arguments)
    stages[name] += time.perf_counter() - begun
    return result
