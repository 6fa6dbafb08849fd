"""Times of calls and of single kernels, after a warm-up, on a GPU and by the clock."""
import math
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

COLD_BYTES = 128 << 20  # of tensors that launches take in turns: beyond any L2 cache, with room
MOST_SETS = 64
LAUNCHES = 24  # in a graph at least, beside which its own launch is nothing


def wall_times_ms(
    call: Callable[[], object], repeats: int, warm_up: int, device: str, queued: int = 1
) -> list[float]:
    """Milliseconds of a call by the clock, the GPU's work awaited after so many queued calls."""
    times = []
    for _ in range(warm_up + repeats):
        start = time.perf_counter()
        for _ in range(queued):
            call()
        if device == "cuda":
            torch.cuda.synchronize()
        times.append((time.perf_counter() - start) * 1e3 / queued)
    return times[warm_up:]


def gpu_times_ms(call: Callable[[], object], repeats: int, warm_up: int) -> list[float]:
    """Milliseconds between CUDA events around each call, one at a time.

    From before the CPU launches a call to the end of its work on the GPU.
    """
    times = []
    for _ in range(warm_up + repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return times[warm_up:]


def graphed(call: Callable[[], object]) -> Callable[[], object]:
    """The same work as the replay of a CUDA graph, whose inputs stay where they are.

    It is captured on a stream of its own: graphs of one stream share cuBLAS's workspace, and may
    not be replayed at the same time.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        call()
    return graph.replay


def sets_for(size: int) -> int:
    """How many sets of tensors of so many bytes make a launch find its own outside the cache."""
    return max(1, min(MOST_SETS, math.ceil(COLD_BYTES / size)))


def launch_times_us(
    launch: Callable[..., object], sets: Sequence[Sequence[Any]], device: str, seconds: float
) -> list[float]:
    """Microseconds of launch(*inputs), whose inputs, and outputs, take turns over the sets.

    On a GPU a time is the share of one launch in a replay of a CUDA graph of many.
    """
    kept = [None] * len(sets)  # or every launch would write the same memory, still in the cache
    launches = len(sets) * math.ceil(LAUNCHES / len(sets))

    def turn() -> None:
        for index in range(launches):
            kept[index % len(sets)] = launch(*sets[index % len(sets)])

    if device == "cpu":
        return [ms * 1e3 for ms in wall_times_ms(lambda: launch(*sets[0]), 5, 1, device)]
    replay = graphed(turn)
    [once] = gpu_times_ms(replay, 1, 2)
    repeats = max(5, min(50, int(seconds * 1e3 / once)))
    return [ms * 1e3 / launches for ms in gpu_times_ms(replay, repeats, 0)]


def percentile(values: Sequence[float], share: float) -> float:
    """The smallest of the values that at least this share of them does not exceed."""
    ordered = sorted(values)
    return ordered[max(0, math.ceil(len(ordered) * share - 1e-9) - 1)]
