"""Timing on a GPU and by the clock: single calls after warm-up, in milliseconds."""
import math
import statistics
import time
from collections.abc import Callable, Sequence

import torch


def gpu_times_ms(
    call: Callable[[], object], repeats: int, warm_up: int, queued: bool = False
) -> list[float]:
    """Milliseconds of each call between two CUDA events.

    One call at a time: from before the CPU launches it to the end of its work on the GPU.
    queued: back to back, from the end of the one before to its own; the GPU waits for the CPU
    only where a call takes longer to launch than to run.
    """
    for _ in range(warm_up):
        call()
    starts, ends = (
        [torch.cuda.Event(enable_timing=True) for _ in range(repeats)] for _ in range(2)
    )
    if not queued:
        torch.cuda.synchronize()
    for start, end in zip(starts, ends, strict=True):
        start.record()
        call()
        end.record()
        if not queued:
            end.synchronize()
    torch.cuda.synchronize()
    return [start.elapsed_time(end) for start, end in zip(starts, ends, strict=True)]


def wall_times_ms(
    call: Callable[[], object], repeats: int, warm_up: int, device: str
) -> list[float]:
    """Milliseconds of each call by the clock, one at a time, the GPU's work awaited."""
    times = []
    for _ in range(warm_up + repeats):
        start = time.perf_counter()
        call()
        if device == "cuda":
            torch.cuda.synchronize()
        times.append((time.perf_counter() - start) * 1e3)
    return times[warm_up:]


def median_ms(call: Callable[[], object], repeats: int = 50, warm_up: int = 10) -> float:
    """Median milliseconds of one call at a time between CUDA events."""
    return statistics.median(gpu_times_ms(call, repeats, warm_up))


def percentile(values: Sequence[float], share: float) -> float:
    """The smallest of the values that at least this share of them does not exceed."""
    ordered = sorted(values)
    return ordered[max(0, math.ceil(len(ordered) * share - 1e-9) - 1)]


def graphed(call: Callable[[], object]) -> Callable[[], object]:
    """The same work as the replay of a CUDA graph, whose inputs stay where they are."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay
