"""An encoder's calls, spread over contexts, which replay CUDA graphs.

Work of one context is ordered by events on the GPU; nothing but a capture waits for the GPU.
"""
import bisect
import contextlib
import ctypes
import itertools
import threading
import weakref
from collections import OrderedDict
from typing import Callable, Collection, Iterable, Optional, Sequence

import torch
from torch import Tensor, nn

from clip_ttrt.errors import UserError
from clip_ttrt.options import BatchRange

MOST_GRAPHS = 12  # of an encoder, context and length
PADDED = 32  # the largest batch that padding can make: larger ones hide their launches anyway
_capturing = threading.Lock()  # PyTorch captures one graph at a time in a process


def no_head(features: Tensor) -> Tensor:
    """What an encoder's features go through by default; a head's graphs end with the head."""
    return features


@contextlib.contextmanager
def memory_errors(what: str):
    """An exhausted GPU becomes UserError."""
    try:
        yield
    except RuntimeError as problem:
        if "out of memory" not in str(problem).lower():  # PyTorch, TorchScript and CUDA say so
            raise
        free, total = (each >> 20 for each in torch.cuda.mem_get_info())
        raise UserError(f"out of GPU memory while {what} ({free} of {total} MiB are free); "
                        "use a smaller batch or free the GPU") from problem


def bucket(count: int, captured: Collection[int], batch: BatchRange) -> Optional[int]:
    """The batch size whose graph serves `count` rows, count <= batch.maximum; None: no graph.

    Few graphs: each size gets its own.  Beyond, a size without one is padded to a power of two up
    to 32, and of the larger ones only powers of two and the engine's maximum get one.
    """
    size = max(count, batch.minimum)
    if size in captured or len(captured) < MOST_GRAPHS:
        return size
    power = min(1 << (size - 1).bit_length(), batch.maximum)
    return power if power <= PADDED or power == size else None


class Captured:
    """A CUDA graph of a module and a head at one batch size and length, with input and output."""

    def __init__(self, context: "Context", size: int, length: int, head: Callable):
        encoder, stream = context.encoder, context.side
        pool = context.pool if head is no_head else None  # of a head, which may go, its own
        free, self.columns = torch.cuda.mem_get_info()[0], length
        self.graph = torch.cuda.CUDAGraph()
        # The outer stream is there for a capture that fails, which leaves its own current.
        with torch.inference_mode(False), torch.no_grad(), torch.cuda.stream(stream):
            rows = encoder.zeros(size, length)
            for _ in range(3):  # TorchScript's own optimiser looks at two calls
                head(context.module(rows))
            with torch.cuda.graph(self.graph, pool=pool, stream=stream,
                                  capture_error_mode="thread_local"):
                self.input = torch.empty_like(rows)
                self.output = head(context.module(self.input))
        own = self.input.nbytes + self.output.nbytes
        self.bytes = max(free - torch.cuda.mem_get_info()[0], own)

    def __call__(self, x: Tensor) -> Tensor:
        """x [B, ...], B <= size, texts up to the length -> features of the caller's own [B, E]."""
        count, columns, rows = x.shape[0], x.shape[-1], self.input
        if columns < self.columns:  # of a longer text before
            rows[..., columns:self.columns].zero_()
        self.columns = columns
        if rows.shape != x.shape:
            rows = rows[:count, ..., :columns]
        if x.device.type == "cpu" and not (x.dtype == rows.dtype and x.is_contiguous()):
            x = x.to(rows.device, non_blocking=True)
        if x.dtype == torch.int64:  # an id beyond int32 may not come back into the vocabulary
            x = x.clamp(-1, 2**31 - 1)
        rows.copy_(x, non_blocking=True)
        self.graph.replay()
        return (self.output if count == self.output.shape[0] else self.output[:count]).clone()


class Context:
    """A loaded module on a GPU and its graphs, called by one thread at a time, on any stream."""

    def __init__(self, encoder: "Encoder", module: torch.jit.ScriptModule):
        self.encoder, self.module = encoder, module
        self.lock = threading.Lock()
        self.done = torch.cuda.Event()
        self.stream = torch.cuda.current_stream()  # of the last call
        self.graphs = {length: OrderedDict() for length in encoder.lengths}  # None: no memory
        self.headed = weakref.WeakKeyDictionary()  # such graphs of each head
        self.side = torch.cuda.Stream()
        self.shape = encoder.batch.minimum, encoder.lengths[-1]  # of the module's last run

    def __call__(self, x: Tensor, stream: torch.cuda.Stream, head: Callable) -> Tensor:
        """x [B, ...], B within the range or below -> head(features [B, E]), on the stream."""
        shape = max(x.shape[0], self.encoder.batch.minimum), self.encoder.length_for(x)
        with self.lock:
            if torch.cuda.is_current_stream_capturing():
                self.prepare_for_capture(shape)
                return self.encoder.run(self.module, x, head)
            if stream != self.stream:  # the GPU waits for the call before this one
                stream.wait_event(self.done)
                self.stream = stream
            try:
                graph = self.graph_for(*shape, head) if self.encoder.cuda_graphs else None
                if graph is not None:
                    return graph(x)
                self.shape = shape
                return self.encoder.run(self.module, x, head)
            finally:
                self.done.record(stream)

    def prepare_for_capture(self, shape: tuple[int, int]) -> None:
        """Run the module beside a caller's capture: the first run of a shape cannot be captured."""
        if shape == self.shape:
            return
        self.shape = shape
        # CU_STREAM_CAPTURE_MODE_RELAXED: a thread that captures may allocate on other streams.
        driver, relaxed = ctypes.CDLL("libcuda.so.1"), ctypes.c_int(2)
        driver.cuThreadExchangeStreamCaptureMode(ctypes.byref(relaxed))
        try:
            with torch.cuda.stream(self.side):
                self.side.wait_event(self.done)
                self.module(self.encoder.zeros(*shape))
                self.side.synchronize()
        finally:
            driver.cuThreadExchangeStreamCaptureMode(ctypes.byref(relaxed))

    def graph_for(self, count: int, length: int, head: Callable) -> Optional[Captured]:
        """The graph for a batch size and length, captured if there is none; None: run without."""
        graphs = (self.graphs if head is no_head else self.headed.setdefault(
            head, {each: OrderedDict() for each in self.graphs}))[length]
        size = bucket(count, graphs, self.encoder.batch)
        if size in graphs:
            graphs.move_to_end(size)
            return graphs[size]
        if size is None:
            return None
        with _capturing:
            # Nothing of the context runs any more, nor a caller's graph of it on this stream.
            torch.cuda.current_stream().synchronize()
            if len(graphs) == MOST_GRAPHS:
                graphs.popitem(last=False)  # the one used longest ago
            if not any(any(each.values()) for each in self.graphs.values()):
                self.pool = torch.cuda.graph_pool_handle()  # PyTorch forgets one without graphs
            self.shape = size, length
            try:
                with memory_errors(f"capturing a batch of {size}"):
                    graphs[size] = Captured(self, size, length, head)
            except UserError:
                graphs[size] = None
            return graphs[size]


class Encoder:
    """An encoder's contexts on a GPU, or its module on the CPU: any batch in, features out."""

    def __init__(self, modules: list[torch.jit.ScriptModule], batch: BatchRange, width: int,
                 example: Tensor, cuda_graphs: bool,  # example: of no rows
                 lengths: Sequence[int] = ()):  # of the last axis, ascending to the example's
        self.module, self.batch, self.width = modules[0], batch, width
        self.lengths = tuple(lengths) or (example.shape[-1],)
        self.example, self.device, self.cuda_graphs = example, example.device, cuda_graphs
        self.contexts: list[Context] = []
        self._turns = itertools.count()
        if example.is_cuda:
            self.contexts = [Context(self, module) for module in modules]
            with torch.no_grad():  # two first calls at once race in Torch-TensorRT
                for module in modules:
                    module(self.zeros(batch.minimum, self.lengths[-1]))
            torch.cuda.current_stream().synchronize()

    def __call__(self, x: Tensor, length: Optional[int] = None, head: Callable = no_head) -> Tensor:
        """x [B, ...], B >= 0 -> head(features float32 [B, width]), which a graph holds, too.

        Splits over MAX, pads under MIN, and cuts texts: on the CPU behind the last position that is
        pooled, on a GPU at `length`."""
        if x.shape[0] > self.batch.maximum:
            return torch.cat([self(part, length, head) for part in x.split(self.batch.maximum)])
        if len(self.lengths) > 1 and x.shape[0]:
            longest = int(x.argmax(1).max()) + 1 if x.is_cpu else length or x.shape[1]
            if longest < x.shape[1]:  # cut on the GPU: pinned memory is copied as a whole
                x = x.to(self.device, non_blocking=True)[:, :longest]
        with torch.no_grad():
            if x.shape[0] == 0:
                return head(torch.empty(0, self.width, device=self.device))
            if not self.contexts:
                return self.run(self.module, x, head)
            # The runtime allocates outputs on, and runs on the stream of, the current device.
            index = self.device.index  # which PyTorch would look up twice
            with torch.cuda.device(index):
                stream = torch.cuda.current_stream(index)
                return self._choose(stream)(x, stream, head)

    def warmup(self, batches: Iterable[int]) -> None:
        """Call every context with zeros of every length, over MAX in parts, and wait for it."""
        for context, length, count in itertools.product(self.contexts, self.lengths, batches):
            with torch.no_grad(), torch.cuda.device(self.device):
                for part in self.zeros(count, length).split(self.batch.maximum):
                    context(part, torch.cuda.current_stream(), no_head)
                context.done.synchronize()

    def _choose(self, stream: torch.cuda.Stream) -> Context:
        """The context last used on a stream, else an idle one, else the next in turn."""
        if len(self.contexts) == 1:
            return self.contexts[0]
        for context in self.contexts:
            if context.stream == stream:
                return context
        turn = next(self._turns) % len(self.contexts)
        turns = self.contexts[turn:] + self.contexts[:turn]
        if torch.cuda.is_current_stream_capturing():
            return turns[0]
        idle = (each for each in turns if not each.lock.locked() and each.done.query())
        return next(idle, turns[0])

    def zeros(self, size: int, length: int) -> Tensor:
        return self.example.new_zeros(size, *self.example.shape[1:-1], length)

    def length_for(self, x: Tensor) -> int:
        """The length that x [B, ..., T] is padded to."""
        return self.lengths[bisect.bisect_left(self.lengths, x.shape[-1])]

    def run(self, module: torch.jit.ScriptModule, x: Tensor, head: Callable) -> Tensor:
        """head(features) by a module of x, padded to a length of its own and MIN rows."""
        count, length = x.shape[0], self.length_for(x)
        x = x.to(self.device, non_blocking=True)
        if x.shape[-1] < length:
            x = nn.functional.pad(x, (0, length - x.shape[-1]))
        if count < self.batch.minimum:
            x = torch.cat([x, x[-1:].expand(self.batch.minimum - count, *x.shape[1:])])
        return head(module(x)[:count])
