"""GPU timing: medians after warm-up, of CUDA-graph replays or of plain calls between events."""
import statistics
from typing import Callable

import torch


def times_ms(call: Callable[[], object], repeats: int, warm_up: int) -> list[float]:
    """Milliseconds of single calls after warm-up, between CUDA events."""
    for _ in range(warm_up):
        call()
    torch.cuda.synchronize()
    times = []
    for _ in range(repeats):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        call()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return times


def median_ms(call: Callable[[], object], repeats: int = 50, warm_up: int = 10) -> float:
    """Median milliseconds of one call, between CUDA events."""
    return statistics.median(times_ms(call, repeats, warm_up))


def graphed(call: Callable[[], object]) -> Callable[[], object]:
    """The same work as a CUDA graph's replay, which leaves out what the CPU needs to launch it."""
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
