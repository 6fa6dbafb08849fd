"""Checks and times the fused attention kernel against PyTorch's attention.

    python -m experiments.attention_bench --out DIR            checks, then times the automatic choice
    python -m experiments.attention_bench --out DIR --develop  the same for every variant of the kernel

Needs a GPU and the library that `python -m clip_ttrt.build_kernels` makes; not TensorRT.
Writes DIR/attention_check.csv (with and without a query bias), DIR/attention.csv (without) and
DIR/attention_bias.csv (what the bias costs) row by row.

Times are medians over replays of a CUDA graph of many launches that take turns over several input
sets: together they exceed the L2 cache where the batch is large, as in an encoder, where other layers
run in between. The library time is the fastest of PyTorch's cuDNN, Flash and memory-efficient
attention, each on separate contiguous [B, H, T, 64] tensors and on views into the packed tensor.
"""

from __future__ import annotations

import argparse
import csv
import ctypes
import dataclasses
import math
import pathlib
import statistics
import sys
import time

from clip_ttrt import kernels
from experiments.record import commit

HEAD_DIM = 64
# What the floor is computed from: measured on the H200 (copy, bytes read plus written; the largest
# square fp16 matrix product), not data-sheet figures. Another GPU needs its own.
COPY_BYTES_PER_S = 4.3e12
MATMUL_FLOPS_PER_S = 731e12
L2_BYTES = 60 * 2**20
LIBRARY_BATCH = 2**15

COLUMNS = [
    "kernel", "batch", "heads", "tokens", "causal", "us", "tflops", "gbps", "floor_us",
    "best_library", "best_library_us", "ratio", "max_error", "library_error", "gpu", "commit",
]  # fmt: skip
CHECK_COLUMNS = [
    "kernel", "batch", "heads", "tokens", "causal", "bias", "scale", "max_error", "library_error",
    "max_value", "ok",
]  # fmt: skip
BIAS_COLUMNS = ["batch", "heads", "tokens", "causal", "us_without", "us_with", "ratio", "gpu", "commit"]


Params = kernels.PARAMS["attention"]


class Library:
    """The kernels' shared library, called through ctypes."""

    def __init__(self, path: pathlib.Path):
        if not path.is_file():
            raise FileNotFoundError(f"{path} is missing: build it with `python -m clip_ttrt.build_kernels`")
        self._library = library = ctypes.CDLL(str(path))
        library.clip_attention_launch.argtypes = [ctypes.POINTER(Params), ctypes.c_void_p]
        library.clip_attention_launch.restype = ctypes.c_int
        library.clip_attention_variant.argtypes = [ctypes.c_int32, ctypes.POINTER(ctypes.c_int32)]
        library.clip_attention_variant.restype = ctypes.c_char_p
        library.clip_attention_variant_serves.argtypes = [ctypes.c_int32] * 5
        library.clip_attention_variant_serves.restype = ctypes.c_int32
        library.clip_attention_choose.argtypes = [ctypes.c_int64] + [ctypes.c_int32] * 6
        library.clip_attention_choose.restype = ctypes.c_int32
        if library.clip_attention_params_size() != ctypes.sizeof(Params):
            raise ValueError(f"{path} was built from another attention.h: build it again")
        self.variants: dict[int, str] = {}
        variant = ctypes.c_int32()
        while name := library.clip_attention_variant(len(self.variants), ctypes.byref(variant)):
            self.variants[variant.value] = name.decode()

    def serves(self, variant: int, tokens: int, causal: bool, capability: tuple[int, int]) -> bool:
        return bool(self._library.clip_attention_variant_serves(variant, tokens, int(causal), *capability))

    def choose(self, batch, heads, tokens, causal, capability, multiprocessors) -> int:
        return self._library.clip_attention_choose(
            batch, heads, tokens, int(causal), *capability, multiprocessors
        )

    def launch(self, qkv_pointer, out_pointer, bias_pointer, batch, heads, tokens, causal, variant, stream) -> int:
        """Enqueues one launch; returns the cudaError_t. `bias_pointer` None: no query bias."""
        params = Params(qkv_pointer, out_pointer, bias_pointer, batch, heads, tokens, int(causal), variant)
        return self._library.clip_attention_launch(ctypes.byref(params), stream)


@dataclasses.dataclass(frozen=True)
class Shape:
    batch: int
    heads: int
    tokens: int
    causal: bool

    @property
    def bytes(self) -> int:
        return self.batch * self.tokens * self.heads * HEAD_DIM * 4 * 2

    @property
    def flops(self) -> int:
        pairs = self.tokens * (self.tokens + 1) // 2 if self.causal else self.tokens**2
        return 4 * self.batch * self.heads * pairs * HEAD_DIM

    @property
    def floor_us(self) -> float:
        return 1e6 * max(self.bytes / COPY_BYTES_PER_S, self.flops / MATMUL_FLOPS_PER_S)


# The shapes of the table first, then other batches of CLIP's encoders.
TIMED = [
    Shape(128, 12, 50, False), Shape(128, 12, 197, False), Shape(32, 16, 257, False),
    Shape(32, 16, 577, False), Shape(128, 8, 77, True), Shape(1, 16, 257, False), Shape(1, 12, 50, False),
    Shape(1, 12, 197, False), Shape(1, 16, 577, False), Shape(1, 8, 77, True),
    Shape(8, 12, 50, False), Shape(8, 16, 257, False), Shape(8, 8, 77, True),
    Shape(32, 12, 50, False), Shape(32, 12, 197, False), Shape(32, 8, 77, True), Shape(128, 12, 77, True),
    Shape(128, 16, 257, False), Shape(512, 12, 50, False), Shape(128, 16, 577, False),
]  # fmt: skip

# Lengths at which a head has fewer tiles than a block of the kernel has warps or warpgroups for them.
SKIPPING_TOKENS = [1, 7, 16, 17, 32, 33, 48, 60, 64, 70, 80, 81, 100, 128, 150, 190]

BIAS_SEED = 10**6  # of the first bias; the inputs count from 0

CHECK_TOKENS = [1, 2, 15, 16, 17, 49, 50, 64, 65, 77, 128, 196, 197, 257, 320, 577, 1024]


def check_shapes(full: bool) -> list[tuple[Shape, float]]:
    """The grid of the issue; in part (small batches, fewer heads) while developing."""
    batches, heads = ([1, 3, 33], [1, 2, 8, 12, 16]) if full else ([1, 3], [1, 12])
    cases = [
        (Shape(b, h, t, c), s)
        for t in CHECK_TOKENS for c in (False, True) for b in batches for h in heads for s in (0.1, 1.0, 8.0)
    ]  # fmt: skip
    if not full:  # a few that fill the chip, so that blocks take several units
        cases += [(Shape(33, 16, t, c), 1.0) for t in (50, 77, 197, 257, 577, 1024) for c in (False, True)]
        cases += [(Shape(33, 16, 257, False), 8.0)]
    return cases


class Table:
    """A CSV file that is complete up to the last row at any time."""

    def __init__(self, path: pathlib.Path, columns: list[str]):
        self._file = path.open("w", newline="")
        self._writer = csv.DictWriter(self._file, columns)
        self._writer.writeheader()

    def write(self, **row):
        self._writer.writerow(row)
        self._file.flush()


def reference(torch, qkv, heads: int, causal: bool, query_bias=None):
    """Attention in float64 on packed QKV, [B, T, W], the bias [W] added to q; image by image, to bound the memory."""
    batch, tokens, width = qkv.shape[0], qkv.shape[1], qkv.shape[2] // 3
    out = torch.empty(batch, tokens, width, dtype=torch.float64, device=qkv.device)
    step = max(1, int(2e8) // (heads * tokens * tokens))
    for first in range(0, batch, step):
        part = qkv[first : first + step].double().view(-1, tokens, 3, heads, HEAD_DIM)
        q, k, v = (part[:, :, i].transpose(1, 2) for i in range(3))
        if query_bias is not None:
            q = q + query_bias.double().view(heads, 1, HEAD_DIM)
        scores = q @ k.transpose(-1, -2) / math.sqrt(HEAD_DIM)
        if causal:
            hidden = torch.ones(tokens, tokens, dtype=torch.bool, device=qkv.device).triu(1)
            scores.masked_fill_(hidden, -math.inf)
        out[first : first + step] = (scores.softmax(-1) @ v).transpose(1, 2).reshape(-1, tokens, width)
    return out


def split(qkv, heads: int):
    """q, k, v as strided [B, H, T, 64] views of packed QKV."""
    batch, tokens, _ = qkv.shape
    return qkv.view(batch, tokens, 3, heads, HEAD_DIM).permute(2, 0, 3, 1, 4).unbind(0)


def random_qkv(torch, shape: Shape, scale: float, seed: int):
    generator = torch.Generator("cuda").manual_seed(seed)
    size = (shape.batch, shape.tokens, 3 * shape.heads * HEAD_DIM)
    return (torch.randn(size, generator=generator, device="cuda", dtype=torch.float32) * scale).half()


def random_bias(torch, shape: Shape, scale: float, seed: int):
    generator = torch.Generator("cuda").manual_seed(seed)
    return torch.randn(shape.heads * HEAD_DIM, generator=generator, device="cuda", dtype=torch.float32) * scale


def pytorch_attention(torch, qkv, shape: Shape, query_bias=None):
    """PyTorch's own fp16 attention, [B, T, W]; a bias is added as a half-precision linear layer would."""
    q, k, v = split(qkv, shape.heads)
    if query_bias is not None:
        q = q + query_bias.half().view(shape.heads, 1, HEAD_DIM)
    # In parts: PyTorch may not launch a batch beyond a CUDA grid's limit.
    parts = zip(*(tensor.split(LIBRARY_BATCH) for tensor in (q, k, v)))
    out = torch.cat([torch.nn.functional.scaled_dot_product_attention(*part, is_causal=shape.causal) for part in parts])
    return out.transpose(1, 2).reshape(shape.batch, shape.tokens, -1)


def run_kernel(torch, library: Library, qkv, shape: Shape, variant: int, out, query_bias=None) -> None:
    bias_pointer = None if query_bias is None else query_bias.data_ptr()
    status = library.launch(
        qkv.data_ptr(), out.data_ptr(), bias_pointer, shape.batch, shape.heads, shape.tokens, shape.causal, variant,
        torch.cuda.current_stream().cuda_stream,
    )  # fmt: skip
    if status != 0:
        raise RuntimeError(f"clip_attention_launch returned cudaError {status} for {shape}, variant {variant}")


def largest(torch, x) -> float:
    return float(x.abs().max()) if bool(torch.isfinite(x).all()) else math.inf


def check(torch, library: Library, cases, variants: list[int], table: Table, seconds: float) -> dict[int, int]:
    """Runs every variant on every case it serves, without and with a query bias; returns how many failed by variant.

    A case passes when its largest error is at most twice that of PyTorch's fp16 attention (or twice what
    rounding the exact result to fp16 may cost, where PyTorch happens to be luckier), every element was
    written, none outside the output was, and a second run gives the same bits.
    """
    capability = torch.cuda.get_device_capability()
    failed = {variant: 0 for variant in variants}
    ran = {variant: 0 for variant in variants}
    started = time.monotonic()
    for index, (shape, scale) in enumerate(cases):
        if time.monotonic() - started > seconds:
            print(f"check: stopped after {index} of {len(cases)} cases, {seconds:.0f} s")
            break
        serving = [v for v in variants if v == 0 or library.serves(v, shape.tokens, shape.causal, capability)]
        qkv = random_qkv(torch, shape, scale, index)
        for bias in (None, random_bias(torch, shape, scale, BIAS_SEED + index)):
            exact = reference(torch, qkv, shape.heads, shape.causal, bias)
            library_error = largest(torch, pytorch_attention(torch, qkv, shape, bias).double() - exact)
            top = largest(torch, exact)
            bound = 2 * max(library_error, top * 2**-11)
            for variant in serving:
                error, same, guarded = run_guarded(torch, library, qkv, shape, variant, bias, exact)
                ok = error <= bound and same and guarded
                ran[variant] += 1
                if not ok:
                    failed[variant] += 1
                    if failed[variant] <= 5:
                        print(f"FAIL variant {variant} {library.variants.get(variant, 'auto')} {shape} scale {scale}"
                              f"{'' if bias is None else ' with bias'}: error {error:.3g}, bound {bound:.3g}, "
                              f"same bits {same}, guards {guarded}")  # fmt: skip
                table.write(
                    kernel=library.variants.get(variant, "auto"), batch=shape.batch, heads=shape.heads,
                    tokens=shape.tokens, causal=int(shape.causal), bias=int(bias is not None), scale=scale,
                    max_error=f"{error:.4g}", library_error=f"{library_error:.4g}", max_value=f"{top:.4g}", ok=int(ok),
                )  # fmt: skip
    for variant in variants:
        print(f"check: {library.variants.get(variant, 'auto'):28s} {ran[variant]:5d} cases, {failed[variant]} failed")
    return failed


def run_guarded(torch, library: Library, qkv, shape: Shape, variant: int, query_bias, exact) -> tuple[float, bool, bool]:
    """(largest error, the same bits twice, nothing written beside the output)."""
    runs = []
    # Two rows of guard values before and behind the output: nothing may be written there.
    for poison in (math.nan, 77.0):
        whole = torch.full((shape.batch * shape.tokens + 4, shape.heads * HEAD_DIM), poison, device="cuda").half()
        run_kernel(torch, library, qkv, shape, variant, whole[2:], query_bias)
        runs.append(whole)
    torch.cuda.synchronize()
    error = largest(torch, runs[0][2:-2].view(exact.shape).double() - exact)
    same = torch.equal(runs[0][2:-2], runs[1][2:-2])
    guarded = bool((runs[1][:2] == 77).all()) and bool((runs[1][-2:] == 77).all())
    return error, same, guarded


def time_us(torch, launch, sets: int, seconds: float) -> float:
    """Median time of one launch(i), i the input set, from replays of a graph of them."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for i in range(min(sets, 3)):
            launch(i)
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    launches = sets * max(1, math.ceil(24 / sets))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        for i in range(launches):
            launch(i % sets)
    for _ in range(3):
        graph.replay()
    torch.cuda.synchronize()
    times = []
    started = time.monotonic()
    while len(times) < 10 or (len(times) < 100 and time.monotonic() - started < seconds):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) * 1e3 / launches)
    return statistics.median(times)


def time_bias(torch, library: Library, shape: Shape, packed, outs, seconds: float) -> tuple[float, float]:
    """Medians of the automatic choice (without, with) a query bias, measured in turns."""
    bias = random_bias(torch, shape, 1.0, BIAS_SEED)
    rounds = []
    for _ in range(3):
        for query_bias in (None, bias):

            def launch(i, query_bias=query_bias):
                run_kernel(torch, library, packed[i], shape, 0, outs[i], query_bias)

            rounds.append(time_us(torch, launch, len(packed), seconds / 3))
    return statistics.median(rounds[0::2]), statistics.median(rounds[1::2])


def time_library(torch, shape: Shape, packed, seconds: float) -> tuple[str, float]:
    from torch.nn.attention import SDPBackend, sdpa_kernel

    views = [split(qkv, shape.heads) for qkv in packed]
    layouts = {"packed": views, "separate": [tuple(x.contiguous() for x in view) for view in views]}
    backends = {
        "cudnn": SDPBackend.CUDNN_ATTENTION,
        "flash": SDPBackend.FLASH_ATTENTION,
        "efficient": SDPBackend.EFFICIENT_ATTENTION,
    }
    best = ("none", math.inf)
    for backend_name, backend in backends.items():
        for layout_name, inputs in layouts.items():

            def launch(i, inputs=inputs):
                return torch.nn.functional.scaled_dot_product_attention(*inputs[i], is_causal=shape.causal)

            try:
                with sdpa_kernel(backend):
                    us = time_us(torch, launch, len(inputs), seconds)
            except RuntimeError as error:  # this backend does not take these inputs: say so and go on
                print(f"library: {backend_name} {layout_name} {shape}: {str(error).splitlines()[0]}")
                continue
            if us < best[1]:
                best = (f"{backend_name} {layout_name}", us)
    return best


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m experiments.attention_bench", description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=pathlib.Path, required=True, help="directory for the CSV files")
    parser.add_argument("--library", type=pathlib.Path, help="another build")
    parser.add_argument("--develop", action="store_true", help="every variant, on a smaller grid of checks")
    parser.add_argument("--shapes", type=int, default=len(TIMED), help="time the first so many shapes only")
    parser.add_argument("--variants", help="with --develop: comma-separated ids; default: all")
    parser.add_argument("--check-seconds", type=float, default=600, help="stop checking after this long")
    parser.add_argument("--time-seconds", type=float, default=0.1, help="time spent on each measurement")
    parser.add_argument("--skip-check", action="store_true")
    options = parser.parse_args(arguments)

    import torch

    if not torch.cuda.is_available():
        print("attention_bench: no CUDA device; the kernel runs on NVIDIA GPUs of compute capability 8.0 and newer")
        return 2
    library = Library(options.library or pathlib.Path(kernels.library()._name))
    options.out.mkdir(parents=True, exist_ok=True)
    capability = torch.cuda.get_device_capability()
    multiprocessors = torch.cuda.get_device_properties(0).multi_processor_count
    variants = [0]
    if options.develop:
        variants += [int(v) for v in options.variants.split(",")] if options.variants else list(library.variants)

    failed = {variant: 0 for variant in variants}
    if not options.skip_check:
        table = Table(options.out / "attention_check.csv", CHECK_COLUMNS)
        failed = check(torch, library, check_shapes(not options.develop), variants, table, options.check_seconds)

    table = Table(options.out / "attention.csv", COLUMNS)
    bias_table = Table(options.out / "attention_bias.csv", BIAS_COLUMNS)
    about = {"gpu": torch.cuda.get_device_name(), "commit": commit()}
    for shape in TIMED[: options.shapes]:
        # Enough sets that they exceed twice the L2 cache, unless the batch is so small that an encoder
        # would leave its qkv in the cache anyway.
        sets = max(4, min(8, math.ceil(2 * L2_BYTES / shape.bytes)))
        packed = [random_qkv(torch, shape, 1.0, i) for i in range(sets)]
        outs = [torch.empty_like(qkv[:, :, : shape.heads * HEAD_DIM].contiguous()) for qkv in packed]
        exact = reference(torch, packed[0][:2].contiguous(), shape.heads, shape.causal)
        library_error = largest(torch, pytorch_attention(torch, packed[0], shape)[:2].double() - exact)
        best_library, best_us = time_library(torch, shape, packed, options.time_seconds)
        chosen = library.choose(shape.batch, shape.heads, shape.tokens, shape.causal, capability, multiprocessors)
        print(f"{shape.batch}x{shape.heads}x{shape.tokens}{' causal' if shape.causal else ''}: floor "
              f"{shape.floor_us:.1f} us, {best_library} {best_us:.2f} us")  # fmt: skip
        for variant in variants:
            if variant and not library.serves(variant, shape.tokens, shape.causal, capability):
                continue

            def launch(i, variant=variant):
                run_kernel(torch, library, packed[i], shape, variant, outs[i])

            us = time_us(torch, launch, sets, options.time_seconds)
            error = largest(torch, outs[0][:2].double() - exact)
            name = f"{'auto: ' if variant == 0 else ''}{library.variants[variant or chosen]}"
            table.write(
                kernel=name, batch=shape.batch, heads=shape.heads, tokens=shape.tokens,
                causal=int(shape.causal), us=f"{us:.3f}", tflops=f"{shape.flops / us * 1e-6:.1f}",
                gbps=f"{shape.bytes / us * 1e-3:.0f}", floor_us=f"{shape.floor_us:.2f}",
                best_library=best_library, best_library_us=f"{best_us:.3f}", ratio=f"{us / best_us:.3f}",
                max_error=f"{error:.3g}", library_error=f"{library_error:.3g}", **about,
            )  # fmt: skip
            print(f"    {name:36s} {us:8.2f} us  {us / best_us:5.2f}x  {shape.flops / us * 1e-6:6.1f} TFLOP/s "
                  f"{shape.bytes / us * 1e-3:6.0f} GB/s{'  WRONG' if failed[variant] else ''}")  # fmt: skip
        without, with_bias = time_bias(torch, library, shape, packed, outs, options.time_seconds)
        bias_table.write(
            batch=shape.batch, heads=shape.heads, tokens=shape.tokens, causal=int(shape.causal),
            us_without=f"{without:.3f}", us_with=f"{with_bias:.3f}", ratio=f"{with_bias / without:.3f}", **about,
        )  # fmt: skip
        print(f"    query bias: {without:.2f} -> {with_bias:.2f} us, {with_bias / without:.3f}x")
    wrong = {v: n for v, n in failed.items() if n}
    print(f"failed checks by variant: {wrong}" if wrong else "all checks passed")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
