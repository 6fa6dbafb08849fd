"""Checks and times the elementwise kernels against PyTorch: bias + QuickGELU, and residual + layer norm.

    python -m experiments.elementwise_bench --out DIR            checks, then times the automatic choice
    python -m experiments.elementwise_bench --out DIR --develop  the same for every variant of the kernels
    python -m experiments.elementwise_bench --out DIR --chain    what a kernel costs between two matrix products

Needs a GPU, PyTorch and the library that `python -m kernels.build` makes; nothing else of this repository (not even
TensorRT). Writes DIR/elementwise_check.csv, DIR/elementwise.csv and DIR/elementwise_chain.csv row by row.

Times are medians over replays of a CUDA graph of many launches that take turns over several sets of tensors: together
they exceed the L2 cache where there are many rows. The library is the same arithmetic through torch.compile; where the
kernel is called "layer norm" there is no residual and it is PyTorch's own layer norm.
"""

from __future__ import annotations

import argparse
import csv
import ctypes
import dataclasses
import math
import pathlib
import statistics
import subprocess
import sys
import time

DEFAULT_LIBRARY = pathlib.Path(__file__).parents[1] / "clip_ttrt" / "lib" / "libclip_ttrt_kernels.so"

# Measured on the H200: copy, bytes read plus written. Another GPU needs its own.
COPY_BYTES_PER_S = 4.3e12
L2_BYTES = 60 * 2**20
EPSILON = 1e-5

COLUMNS = [
    "kernel", "rows", "width", "us", "gbps", "floor_us", "library", "library_us", "ratio", "max_error", "library_error",
    "gpu", "commit",
]  # fmt: skip
CHECK_COLUMNS = ["kernel", "variant", "rows", "width", "scale", "worst", "ok"]
CHAIN_COLUMNS = ["kernel", "variant", "rows", "width", "us", "without_us", "gpu", "commit"]


class GeluParams(ctypes.Structure):
    """ClipBiasQuickGeluParams of kernels/elementwise/elementwise.h, field for field."""

    _fields_ = [
        ("in", ctypes.c_void_p),
        ("bias", ctypes.c_void_p),
        ("out", ctypes.c_void_p),
        ("rows", ctypes.c_int64),
        ("width", ctypes.c_int32),
        ("variant", ctypes.c_int32),
    ]


class LayerNormParams(ctypes.Structure):
    """ClipResidualLayerNormParams of kernels/elementwise/elementwise.h, field for field."""

    _fields_ = [
        ("x", ctypes.c_void_p),
        ("delta", ctypes.c_void_p),
        ("bias", ctypes.c_void_p),
        ("scale", ctypes.c_void_p),
        ("shift", ctypes.c_void_p),
        ("sum_out", ctypes.c_void_p),
        ("out", ctypes.c_void_p),
        ("rows", ctypes.c_int64),
        ("width", ctypes.c_int32),
        ("epsilon", ctypes.c_float),
        ("variant", ctypes.c_int32),
    ]


class Library:
    """The kernels' shared library, called through ctypes with CUDA tensors."""

    def __init__(self, path: pathlib.Path):
        if not path.is_file():
            raise FileNotFoundError(f"{path} is missing: build it with `python -m kernels.build`")
        self._library = library = ctypes.CDLL(str(path))
        for name, params in (("bias_quick_gelu", GeluParams), ("residual_layer_norm", LayerNormParams)):
            launch = getattr(library, f"clip_{name}_launch")
            launch.argtypes, launch.restype = [ctypes.POINTER(params), ctypes.c_void_p], ctypes.c_int
            if getattr(library, f"clip_{name}_params_size")() != ctypes.sizeof(params):
                raise ValueError(f"{path} was built from another elementwise.h: build it again")
        self.gelu_variants = self._variants(library.clip_bias_quick_gelu_variant)
        self.layer_norm_variants = self._variants(library.clip_residual_layer_norm_variant)

    @staticmethod
    def _variants(at) -> dict[int, str]:
        at.argtypes, at.restype = [ctypes.c_int32, ctypes.POINTER(ctypes.c_int32)], ctypes.c_char_p
        found: dict[int, str] = {}
        variant = ctypes.c_int32()
        while name := at(len(found), ctypes.byref(variant)):
            found[variant.value] = name.decode()
        return found

    def gelu(self, stream, x, bias, out, variant=0) -> int:
        """Enqueues one launch; returns the cudaError_t."""
        params = GeluParams(x.data_ptr(), address(bias), out.data_ptr(), x.shape[0], x.shape[1], variant)
        return self._library.clip_bias_quick_gelu_launch(ctypes.byref(params), stream)

    def layer_norm(self, stream, x, delta, bias, scale, shift, sum_out, out, variant=0, epsilon=EPSILON) -> int:
        """Enqueues one launch; returns the cudaError_t."""
        params = LayerNormParams(
            x.data_ptr(), address(delta), address(bias), scale.data_ptr(), shift.data_ptr(), address(sum_out),
            out.data_ptr(), x.shape[0], x.shape[1], epsilon, variant,
        )  # fmt: skip
        return self._library.clip_residual_layer_norm_launch(ctypes.byref(params), stream)


def address(tensor):
    return None if tensor is None else tensor.data_ptr()


def serves(kernel: str, variant: int, width: int) -> bool:
    """Whether a variant of the layer norm takes a width: a row must fit into its warps' registers."""
    if kernel == "quick_gelu" or variant == 0:
        return True
    warps = {1: 1, 2: 4, 3: 8}.get(variant, 1)
    return width <= warps * 32 * 8 * 4


@dataclasses.dataclass(frozen=True)
class Shape:
    kernel: str  # quick_gelu, residual_layer_norm or layer_norm
    rows: int
    width: int

    @property
    def tensors(self) -> int:
        """How many [rows, width] tensors are read or written."""
        return 4 if self.kernel == "residual_layer_norm" else 2

    @property
    def bytes(self) -> int:
        return self.rows * self.width * 2 * self.tensors

    @property
    def floor_us(self) -> float:
        return 1e6 * self.bytes / COPY_BYTES_PER_S


# What CLIP's encoders run first (ViT-B/32 at batches 1, 32, 128, ViT-L/14 at 32 and 128, text at 32), then the others.
ROWS = (50, 1600, 6400, 8224, 32896)
COMMON = [
    Shape(kernel, rows, width * (4 if kernel == "quick_gelu" else 1))
    for kernel, rows, width in (
        *((kernel, rows, width) for kernel in ("quick_gelu", "residual_layer_norm")
          for rows, width in ((8224, 1024), (1600, 768), (50, 768), (6400, 768), (32896, 1024), (1600, 512))),
        ("layer_norm", 8224, 1024), ("layer_norm", 1600, 768),
    )
]  # fmt: skip
ALL = [
    *(Shape("quick_gelu", rows, width) for width in (2048, 3072, 4096) for rows in ROWS),
    *(Shape("residual_layer_norm", rows, width) for width in (512, 768, 1024) for rows in ROWS),
    *(Shape("layer_norm", rows, width) for width in (768, 1024) for rows in ROWS),
]
TIMED = COMMON + [shape for shape in ALL if shape not in COMMON]

CHECK_ROWS = (1, 2, 3, 5, 7, 33, 50, 1601)
CHECK_WIDTHS = (8, 64, 72, 128, 192, 256, 264, 512, 520, 768, 1000, 1024, 1032, 2048, 3072, 4096, 4104, 5120, 8192)


def check_cases(full: bool) -> list[tuple[Shape, float]]:
    """Sizes and scales of the random inputs; in part while developing."""
    cases = []
    for kernel in ("quick_gelu", "residual_layer_norm", "layer_norm"):
        for width in CHECK_WIDTHS if full else CHECK_WIDTHS[1::3]:
            for rows in CHECK_ROWS if full else (3, 1601):
                cases += [(Shape(kernel, rows, width), scale) for scale in ((0.1, 1.0, 8.0) if full else (1.0,))]
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


@dataclasses.dataclass
class Inputs:
    """Tensors of one launch, random normal; a delta and a sum only where there is a residual."""

    x: object
    delta: object
    bias: object
    scale: object
    shift: object
    sum_out: object
    out: object


def random_inputs(torch, shape: Shape, scale: float, seed: int) -> Inputs:
    generator = torch.Generator("cuda").manual_seed(seed)

    def normal(*size):
        return torch.randn(size, generator=generator, device="cuda", dtype=torch.float32)

    def half():
        return (normal(shape.rows, shape.width) * scale).half()

    residual = shape.kernel == "residual_layer_norm"
    x = half()
    return Inputs(
        x, half() if residual else None, None if shape.kernel == "layer_norm" else normal(shape.width) * scale,
        1 + 0.3 * normal(shape.width), 0.3 * normal(shape.width), torch.empty_like(x) if residual else None,
        torch.empty_like(x),
    )  # fmt: skip


def run_kernel(torch, library: Library, shape: Shape, inputs: Inputs, variant: int) -> None:
    stream = torch.cuda.current_stream().cuda_stream
    if shape.kernel == "quick_gelu":
        status = library.gelu(stream, inputs.x, inputs.bias, inputs.out, variant)
    else:
        status = library.layer_norm(
            stream, inputs.x, inputs.delta, inputs.bias, inputs.scale, inputs.shift, inputs.sum_out, inputs.out, variant
        )
    if status != 0:
        raise RuntimeError(f"{shape.kernel} returned cudaError {status} for {shape}, variant {variant}")


def ulp_half(torch, exact):
    """The distance of fp16 numbers around each value of a float64 tensor."""
    return 2.0 ** (exact.abs().clamp(min=2.0**-14).log2().floor() - 10)


def errors(torch, shape: Shape, inputs: Inputs) -> list[tuple[object, object, object]]:
    """(output, float64 reference, largest error allowed) for each output.

    An output may be off by half a unit of fp16's last place, which is what rounding costs, and by what fp32 arithmetic
    costs on the way: a few 2^-24 of the largest number that went into it.
    """
    x = inputs.x.double()
    if shape.kernel == "quick_gelu":
        y = x if inputs.bias is None else x + inputs.bias.double()
        exact = y * torch.sigmoid(1.702 * y)
        # The exponent, up to 1.702 log2(e) |y|, is rounded to fp32 before the power is taken.
        return [(inputs.out, exact, ulp_half(torch, exact) / 2 + exact.abs() * (4 + 4 * y.abs()) * 2.0**-23)]
    checked = []
    if inputs.sum_out is not None:
        parts = [x] + [part.double() for part in (inputs.delta, inputs.bias) if part is not None]
        exact = sum(parts)
        checked.append((inputs.sum_out, exact, ulp_half(torch, exact) / 2 + sum(part.abs() for part in parts) * 2.0**-22))
        x = inputs.sum_out.double()  # the layer norm is that of the rounded sum
    mean = x.mean(1, keepdim=True)
    deviation = (x.var(1, correction=0, keepdim=True) + EPSILON).sqrt()
    normalised = (x - mean) / deviation
    exact = normalised * inputs.scale.double() + inputs.shift.double()
    fp32 = (normalised.abs() * 8 + x.abs().amax(1, keepdim=True) / deviation * 4) * inputs.scale.abs().double() + inputs.shift.abs().double()
    checked.append((inputs.out, exact, ulp_half(torch, exact) / 2 + fp32 * 2.0**-22))
    return checked


def guarded(torch, like, value: float):
    """A tensor like `like` amid two rows of a value before and behind, and the whole."""
    whole = torch.full((like.shape[0] + 4, like.shape[1]), value, device="cuda").half()
    return whole[2:-2], whole


def check_case(torch, library: Library, shape: Shape, inputs: Inputs, variant: int) -> tuple[bool, float]:
    """Whether a launch is right, and its worst error in units of what is allowed.

    Right: every element within its bound, written both over NaN and over numbers with the same bits, nothing written
    beside the outputs.
    """
    runs = []
    for poison in (math.nan, 77.0):
        inputs.out, whole = guarded(torch, inputs.x, poison)
        wholes = [whole]
        if inputs.sum_out is not None:
            inputs.sum_out, whole = guarded(torch, inputs.x, poison)
            wholes.append(whole)
        run_kernel(torch, library, shape, inputs, variant)
        runs.append(wholes)
    worst = 0.0
    for out, exact, bound in errors(torch, shape, inputs):
        ratio = ((out.double() - exact).abs() / bound).amax()
        worst = max(worst, float(ratio) if bool(torch.isfinite(ratio)) else math.inf)
    same = all(torch.equal(a[2:-2], b[2:-2]) for a, b in zip(*runs))
    kept = all(bool((whole[:2] == 77).all()) and bool((whole[-2:] == 77).all()) for whole in runs[1])
    return worst <= 1 and same and kept, worst


def check_every_half(torch, library: Library, table: Table) -> int:
    """QuickGELU of every fp16 number, infinities and NaNs as in PyTorch; returns how many variants failed."""
    x = torch.arange(-(2**15), 2**15, dtype=torch.int32, device="cuda").short().view(torch.float16).view(1024, 64)
    shape = Shape("quick_gelu", *x.shape)
    failed = 0
    for variant in (0, *library.gelu_variants):
        inputs = Inputs(x, None, None, None, None, None, torch.zeros_like(x))
        run_kernel(torch, library, shape, inputs, variant)
        [(out, exact, bound)] = errors(torch, shape, inputs)
        finite = torch.isfinite(x)
        worst = float(((out.double() - exact).abs() / bound)[finite].max())
        rest = (x.float() * torch.sigmoid(1.702 * x.float())).half()[~finite]
        ok = worst <= 1 and torch.equal(out[~finite].isnan(), rest.isnan()) and torch.equal(out[x == math.inf], x[x == math.inf])
        failed += not ok
        table.write(kernel="quick_gelu of every half", variant=variant, rows=shape.rows, width=shape.width, scale="",
                    worst=f"{worst:.4g}", ok=int(ok))  # fmt: skip
        if not ok:
            print(f"FAIL quick_gelu of every half, variant {variant}: {worst:.3g} of the allowed error")
    return failed


def check(torch, library: Library, cases, develop: bool, table: Table, seconds: float) -> int:
    """Runs the kernels (while developing every variant) on every case; returns how many failed."""
    failed = ran = 0
    started = time.monotonic()
    for index, (shape, scale) in enumerate(cases):
        if time.monotonic() - started > seconds:
            print(f"check: stopped after {index} of {len(cases)} cases, {seconds:.0f} s")
            break
        for variant in variants_of(library, shape, develop):
            inputs = random_inputs(torch, shape, scale, index)
            ok, worst = check_case(torch, library, shape, inputs, variant)
            ran += 1
            failed += not ok
            if not ok and failed <= 10:
                print(f"FAIL {shape} scale {scale} variant {variant}: {worst:.3g} of the allowed error")
            table.write(kernel=shape.kernel, variant=variant, rows=shape.rows, width=shape.width, scale=scale,
                        worst=f"{worst:.4g}", ok=int(ok))  # fmt: skip
    print(f"check: {ran} launches, {failed} failed")
    return failed


def variants_of(library: Library, shape: Shape, develop: bool) -> list[int]:
    if not develop:
        return [0]
    all_variants = library.gelu_variants if shape.kernel == "quick_gelu" else library.layer_norm_variants
    return [0, *(variant for variant in all_variants if serves(shape.kernel, variant, shape.width))]


def variant_name(library: Library, shape: Shape, variant: int) -> str:
    names = library.gelu_variants if shape.kernel == "quick_gelu" else library.layer_norm_variants
    return names[variant] if variant else "auto"


def captured(torch, launch, launches: int):
    """A graph of launch(0), launch(1), .. after a warm-up."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for i in range(3):
            launch(i)
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        for i in range(launches):
            launch(i)
    return graph


def replay_us(torch, graph, launches: int, seconds: float) -> float:
    """Median time of a launch over replays of the graph."""
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


def time_us(torch, launch, sets: int, seconds: float) -> float:
    """Median time of one launch(i), i the set of tensors, from replays of a graph of them."""
    launches = sets * max(1, math.ceil(24 / sets))
    return replay_us(torch, captured(torch, lambda i: launch(i % sets), launches), launches, seconds)


def library_function(torch, kernel: str):
    """The same arithmetic in PyTorch, fp32 inside, fp16 outside: (its name, a function of Inputs)."""

    def quick_gelu(x, bias):
        y = x.float() + bias
        return (y * torch.sigmoid(1.702 * y)).half()

    def residual_layer_norm(x, delta, bias, scale, shift):
        total = (x.float() + delta.float() + bias).half()
        return total, torch.nn.functional.layer_norm(total.float(), total.shape[1:], scale, shift, EPSILON).half()

    if kernel == "quick_gelu":
        compiled = torch.compile(quick_gelu, dynamic=False)
        return "torch.compile", lambda inputs: compiled(inputs.x, inputs.bias)
    if kernel == "residual_layer_norm":
        compiled = torch.compile(residual_layer_norm, dynamic=False)
        return "torch.compile", lambda i: compiled(i.x, i.delta, i.bias, i.scale, i.shift)

    def layer_norm(i):
        # PyTorch's kernel takes constants of x's type.
        return torch.nn.functional.layer_norm(i.x, i.x.shape[1:], i.scale.half(), i.shift.half(), EPSILON)

    return "layer_norm", layer_norm


def time_library(torch, shape: Shape, sets: list[Inputs], seconds: float) -> tuple[str, float, float]:
    """(name, time, largest error of the last output)."""
    name, function = library_function(torch, shape.kernel)
    if shape.kernel == "layer_norm":  # the casts of the constants are not part of the work
        for inputs in sets:
            inputs.scale, inputs.shift = inputs.scale.half(), inputs.shift.half()
    kept = [None] * len(sets)  # else the allocator would give every launch the same output, still in the cache

    def launch(i):
        kept[i % len(sets)] = function(sets[i % len(sets)])

    us = time_us(torch, launch, len(sets), seconds)
    inputs = sets[0]
    result = function(inputs)
    out = result[-1] if isinstance(result, tuple) else result
    held = dataclasses.replace(inputs, out=out, sum_out=result[0] if isinstance(result, tuple) else None)
    checked, exact, _ = errors(torch, shape, held)[-1]
    return name, us, float((checked.double() - exact).abs().max())


def time_kernels(torch, library: Library, shapes, options, table: Table, about: dict) -> None:
    for shape in shapes:
        # Enough sets that they exceed twice the L2 cache, unless there are so few rows that an encoder would leave
        # them in the cache anyway.
        count = max(4, min(8, math.ceil(2 * L2_BYTES / shape.bytes)))
        sets = [random_inputs(torch, shape, 1.0, i) for i in range(count)]
        measured = []
        for variant in variants_of(library, shape, options.develop):
            us = time_us(torch, lambda i, v=variant: run_kernel(torch, library, shape, sets[i], v), count, options.time_seconds)
            out, exact, _ = errors(torch, shape, sets[0])[-1]
            measured.append((variant, us, float((out.double() - exact).abs().max())))
        name, library_us, library_error = "", math.nan, math.nan
        if not options.no_library:
            torch._dynamo.reset()  # a static compilation for each shape
            name, library_us, library_error = time_library(torch, shape, sets, options.time_seconds)
        print(f"{shape.kernel} {shape.rows} x {shape.width}: floor {shape.floor_us:.1f} us, {name} {library_us:.2f} us")
        for variant, us, error in measured:
            label = f"{shape.kernel}: {variant_name(library, shape, variant)}" if options.develop else shape.kernel
            table.write(
                kernel=label, rows=shape.rows, width=shape.width, us=f"{us:.3f}", gbps=f"{shape.bytes / us * 1e-3:.0f}",
                floor_us=f"{shape.floor_us:.2f}", library=name, library_us=f"{library_us:.3f}",
                ratio=f"{us / library_us:.3f}", max_error=f"{error:.3g}", library_error=f"{library_error:.3g}", **about,
            )  # fmt: skip
            print(f"    {label:56s} {us:8.2f} us  {us / library_us:5.2f}x  {shape.bytes / us * 1e-3:6.0f} GB/s")
        del sets


# (rows, width of the residual stream): ViT-B/32 at batches 1, 32, 128, ViT-L/14 at 1, 32, 128, text at 32.
CHAIN = [(1600, 768), (8224, 1024), (6400, 768), (2464, 512), (50, 768), (257, 1024), (32896, 1024)]
CHAIN_LAYERS = 4


def chain(torch, library: Library, options, table: Table, about: dict) -> None:
    """What a kernel adds between two matrix products, where its input is fresh in the L2 cache and its output read next.

    Layers of up-projection and down-projection with or without the kernel between; the difference is the kernel's.
    """
    for rows, width in CHAIN[: options.shapes]:
        for kernel in ("quick_gelu", "residual_layer_norm"):
            inner = 4 * width if kernel == "quick_gelu" else width
            shape = Shape(kernel, rows, inner)
            layers = [random_inputs(torch, shape, 1.0, i) for i in range(CHAIN_LAYERS)]
            generator = torch.Generator("cuda").manual_seed(0)
            weights = [
                [(torch.randn(size, generator=generator, device="cuda") / math.sqrt(size[0])).half() for size in ((width, inner), (inner, width))]
                for _ in layers
            ]
            start = torch.randn(rows, width, generator=generator, device="cuda").half()
            between = torch.empty_like(start)

            def layer(i, variant):
                inputs, (up, down) = layers[i % CHAIN_LAYERS], weights[i % CHAIN_LAYERS]
                fresh = inputs.x if kernel == "quick_gelu" else inputs.delta
                torch.mm(start if i % CHAIN_LAYERS == 0 else between, up, out=fresh)
                if variant is not None:
                    run_kernel(torch, library, shape, inputs, variant)
                torch.mm(fresh if variant is None else inputs.out, down, out=between)

            def layer_us(variant):
                launches = 2 * CHAIN_LAYERS
                return replay_us(torch, captured(torch, lambda i: layer(i, variant), launches), launches, options.time_seconds)

            without = layer_us(None)
            for variant in variants_of(library, shape, options.develop):
                added = layer_us(variant) - without
                table.write(kernel=kernel, variant=variant_name(library, shape, variant), rows=rows, width=inner,
                            us=f"{added:.3f}", without_us=f"{without:.3f}", **about)  # fmt: skip
                print(f"chain {kernel} {rows} x {inner} {variant_name(library, shape, variant):40s} {added:7.2f} us on {without:.2f} us")


def commit(given: str | None) -> str:
    if given:
        return given
    answer = subprocess.run(
        ["git", "rev-parse", "--short=10", "HEAD"],
        cwd=pathlib.Path(__file__).parent, capture_output=True, text=True, check=False,
    )  # fmt: skip
    return answer.stdout.strip() or "unknown"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m experiments.elementwise_bench", description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=pathlib.Path, required=True, help="directory for the CSV files")
    parser.add_argument("--library", type=pathlib.Path, default=DEFAULT_LIBRARY)
    parser.add_argument("--develop", action="store_true", help="every variant, on a smaller grid of checks")
    parser.add_argument("--chain", action="store_true", help="time between matrix products, and nothing else")
    parser.add_argument("--shapes", type=int, help="time the first so many shapes only")
    parser.add_argument("--check-seconds", type=float, default=600, help="stop checking after this long")
    parser.add_argument("--time-seconds", type=float, default=0.1, help="time spent on each measurement")
    parser.add_argument("--skip-check", action="store_true")
    parser.add_argument("--skip-time", action="store_true")
    parser.add_argument("--no-library", action="store_true", help="do not time PyTorch")
    parser.add_argument("--commit", help="what the column `commit` says; default: git's")
    options = parser.parse_args(arguments)

    import torch

    if not torch.cuda.is_available():
        print("elementwise_bench: no CUDA device; the kernels run on NVIDIA GPUs of compute capability 8.0 and newer")
        return 2
    library = Library(options.library)
    options.out.mkdir(parents=True, exist_ok=True)
    about = {"gpu": torch.cuda.get_device_name(), "commit": commit(options.commit)}
    if options.chain:
        chain(torch, library, options, Table(options.out / "elementwise_chain.csv", CHAIN_COLUMNS), about)
        return 0
    failed = 0
    if not options.skip_check:
        table = Table(options.out / "elementwise_check.csv", CHECK_COLUMNS)
        failed = check_every_half(torch, library, table)
        failed += check(torch, library, check_cases(not options.develop), options.develop, table, options.check_seconds)
    if not options.skip_time:
        table = Table(options.out / "elementwise.csv", COLUMNS)
        time_kernels(torch, library, TIMED[: options.shapes], options, table, about)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
