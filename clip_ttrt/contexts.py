"""An encoder's calls: contexts, and the CUDA graphs that they replay.

A `Context` is one loaded module with the graphs captured from it, one for each batch size that
`bucket` gives it; an `Encoder` spreads calls over its contexts.  Work of one context is ordered by
events on the GPU, and nothing but a capture waits for the GPU.
"""
import contextlib
import ctypes
import itertools
import threading
from collections import OrderedDict
from typing import Collection, Iterable, Optional

import torch
from torch import nn

from clip_ttrt.options import BatchRange

MOST_GRAPHS = 12  # of an encoder and context
PADDED = 32  # the largest batch that padding can make: larger ones hide their launches anyway
_capturing = threading.Lock()  # PyTorch captures one graph at a time in a process


def is_out_of_memory(problem: RuntimeError) -> bool:
    """Whether the GPU's memory ran out, be it PyTorch, TorchScript or CUDA that says it."""
    return "out of memory" in str(problem).lower()


def bucket(count: int, captured: Collection[int], batch: BatchRange) -> Optional[int]:
    """The batch size whose graph serves `count` rows, count <= batch.maximum; None: no graph.

    While there are fewer than 12 graphs each size gets its own; beyond that a size without one is
    padded to the next power of two up to 32, and larger ones run as they are, powers of two and
    the engine's maximum excepted, whose graphs take the place of the one used longest ago.
    """
    size = max(count, batch.minimum)
    if size in captured or len(captured) < MOST_GRAPHS:
        return size
    power = min(1 << (size - 1).bit_length(), batch.maximum)
    return power if power <= PADDED or power == size else None


@contextlib.contextmanager
def relaxed_capture():
    """Inside, a thread that captures may do on other streams what captures forbid: allocate."""
    driver, mode = ctypes.CDLL("libcuda.so.1"), ctypes.c_int(2)  # CU_STREAM_CAPTURE_MODE_RELAXED
    driver.cuThreadExchangeStreamCaptureMode(ctypes.byref(mode))
    try:
        yield
    finally:
        driver.cuThreadExchangeStreamCaptureMode(ctypes.byref(mode))


class Captured:
    """A CUDA graph of a module at one batch size, with its input and output."""

    def __init__(self, module: torch.jit.ScriptModule, size: int, shape: tuple[int, ...],
                 dtype: torch.dtype, stream: torch.cuda.Stream, pool):
        free, self.columns = torch.cuda.mem_get_info()[0], shape[-1]
        self.graph = torch.cuda.CUDAGraph()
        # The outer stream is there for a capture that fails, which leaves its own current.
        with torch.inference_mode(False), torch.no_grad(), torch.cuda.stream(stream):
            rows = torch.zeros(size, *shape, dtype=dtype, device="cuda")
            for _ in range(3):  # TorchScript's own optimiser looks at two calls
                module(rows)
            with torch.cuda.graph(self.graph, pool=pool, stream=stream,
                                  capture_error_mode="thread_local"):
                self.input = torch.empty(size, *shape, dtype=dtype, device="cuda")
                self.output = module(self.input)
        held = self.input.nbytes + self.output.nbytes
        self.bytes = max(free - torch.cuda.mem_get_info()[0], held)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """x [B, ...], B <= size, texts of any length -> features of the caller's own [B, E]."""
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
    """A loaded module on a GPU, called by one thread at a time; its work is done in that order.

    A call on another CUDA stream than the one before it waits for that one, on the GPU.  While a
    caller captures a graph of his own nothing is awaited: his graph may not run at the same time
    as calls of the context on other streams.
    """

    def __init__(self, encoder: "Encoder", module: torch.jit.ScriptModule):
        self.encoder, self.module = encoder, module
        self.lock = threading.Lock()
        self.done = torch.cuda.Event()
        self.stream = torch.cuda.current_stream()  # of the last call
        self.graphs: OrderedDict[int, Optional[Captured]] = OrderedDict()  # None: no memory for it
        self.side = torch.cuda.Stream()
        self.size = encoder.batch.minimum  # of the module's last run

    def __call__(self, x: torch.Tensor, stream: torch.cuda.Stream) -> torch.Tensor:
        """x [B, ...], B within the range or below -> features float32 [B, E], on the stream."""
        with self.lock:
            if torch.cuda.is_current_stream_capturing():
                self.prepare_for_capture(max(x.shape[0], self.encoder.batch.minimum))
                return self.module(self.encoder.whole(x))[:x.shape[0]]
            if stream != self.stream:
                stream.wait_event(self.done)
                self.stream = stream
            try:
                graph = self.graph_for(x.shape[0]) if self.encoder.cuda_graphs else None
                if graph is not None:
                    return graph(x)
                self.size = max(x.shape[0], self.encoder.batch.minimum)
                return self.module(self.encoder.whole(x))[:x.shape[0]]
            finally:
                self.done.record(stream)

    def prepare_for_capture(self, size: int) -> None:
        """Run the module, beside a caller's capture, where its last run had another batch size.

        TensorRT sets itself up for a size in the first run of it, which cannot be captured.
        """
        if size != self.size:
            encoder, self.size = self.encoder, size
            with relaxed_capture(), torch.cuda.stream(self.side):
                self.side.wait_event(self.done)
                shape = (size, *encoder.shape)
                self.module(torch.zeros(shape, dtype=encoder.dtype, device=encoder.device))
                self.side.synchronize()

    def graph_for(self, count: int) -> Optional[Captured]:
        """The graph for a batch size, captured now if there is none; None: run without."""
        size = bucket(count, self.graphs, self.encoder.batch)
        if size is None:
            return None
        if size not in self.graphs:
            with _capturing:
                self.graphs[size] = self.capture(size)
        self.graphs.move_to_end(size)
        return self.graphs[size]

    def capture(self, size: int) -> Optional[Captured]:
        """A graph of a batch size, in place of the one used longest ago; None: no memory for it."""
        self.done.synchronize()  # nothing of the context runs any more
        if len(self.graphs) == MOST_GRAPHS:
            self.graphs.popitem(last=False)
        if not any(self.graphs.values()):
            self.pool = torch.cuda.graph_pool_handle()  # PyTorch forgets one without graphs
        self.size = size
        try:
            return Captured(self.module, size, self.encoder.shape, self.encoder.dtype,
                            self.side, self.pool)
        except RuntimeError as problem:
            if not is_out_of_memory(problem):
                raise
            return None


class Encoder:
    """An encoder's contexts on a GPU, or its module on the CPU: any batch in, features out."""

    def __init__(self, modules: list[torch.jit.ScriptModule], batch: BatchRange, width: int,
                 shape: tuple[int, ...], dtype: torch.dtype, device: torch.device,
                 cuda_graphs: bool):
        self.module, self.batch, self.width, self.device = modules[0], batch, width, device
        self.shape, self.dtype, self.cuda_graphs = shape, dtype, cuda_graphs
        self.contexts: list[Context] = []
        self._turns = itertools.count()
        if device.type == "cuda":
            self.contexts = [Context(self, module) for module in modules]
            with torch.no_grad():  # two first calls at once race in Torch-TensorRT
                for module in modules:
                    module(torch.zeros(batch.minimum, *shape, dtype=dtype, device=device))
            torch.cuda.current_stream().synchronize()

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """x [B, ...], B >= 0 -> features float32 [B, width].  Splits over MAX, pads under MIN."""
        if x.shape[0] > self.batch.maximum:
            return torch.cat([self(part) for part in x.split(self.batch.maximum)])
        if x.shape[0] == 0:
            return torch.empty(0, self.width, device=self.device)
        with torch.no_grad():
            if not self.contexts:
                return self.module(self.whole(x))[:x.shape[0]]
            # The runtime allocates outputs on, and takes the stream of, the current device.
            with torch.cuda.device(self.device):
                stream = torch.cuda.current_stream()
                return self._choose(stream)(x, stream)

    def warmup(self, batches: Iterable[int]) -> None:
        """Call every context with zeros, batches larger than MAX in parts, and wait for it."""
        for context, count in itertools.product(self.contexts, batches):
            with torch.no_grad(), torch.cuda.device(self.device):
                rows = torch.zeros(count, *self.shape, dtype=self.dtype, device=self.device)
                for part in rows.split(self.batch.maximum):
                    context(part, torch.cuda.current_stream())
                context.done.synchronize()

    def _choose(self, stream: torch.cuda.Stream) -> Context:
        """The context last used on a stream, else an idle one, else the next in turn."""
        if len(self.contexts) == 1:
            return self.contexts[0]
        for context in self.contexts:
            if context.stream == stream:
                return context
        turn = next(self._turns) % len(self.contexts)
        if torch.cuda.is_current_stream_capturing():
            return self.contexts[turn]
        turns = self.contexts[turn:] + self.contexts[:turn]
        return next((each for each in turns if not each.lock.locked() and each.done.query()),
                    turns[0])

    def whole(self, x: torch.Tensor) -> torch.Tensor:
        """x as the module takes it: on its device, of its length and of at least MIN rows."""
        x = x.to(self.device, non_blocking=True)
        if x.shape[-1] < self.shape[-1]:
            x = nn.functional.pad(x, (0, self.shape[-1] - x.shape[-1]))
        lacking = self.batch.minimum - x.shape[0]
        return torch.cat([x, x[-1:].expand(lacking, *x.shape[1:])]) if lacking > 0 else x
