"""Checks and times the elementwise kernels against PyTorch.

    python -m experiments.elementwise_bench --out DIR            checks, then times
    python -m experiments.elementwise_bench --out DIR --chain    what a kernel costs between two matrix products

Needs a GPU and the library that `python -m clip_ttrt.build_kernels` makes; not TensorRT.
Writes DIR/elementwise_check.csv, DIR/elementwise.csv and DIR/elementwise_chain.csv row by row.

Kernels: quick_gelu (with bias), residual_layer_norm (x + delta + bias and its layer norm), layer_norm, extract_patches
(images in fp32, or fp16 where the kernel is called extract_patches_fp16) and embed_image (class token, positions, two
layer norms). Rows and width are those of the output.

Times are medians over replays of a CUDA graph of many launches that take turns over several sets of tensors: together
they exceed the L2 cache where there are many rows. The library is the same arithmetic through torch.compile; for
layer_norm it is PyTorch's own layer norm.
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
from clip_ttrt.kernels import PARAMS
from experiments.record import commit

# Measured on the H200: copy, bytes read plus written. Another GPU needs its own.
COPY_BYTES_PER_S = 4.3e12
L2_BYTES = 60 * 2**20
EPSILON = 1e-5

COLUMNS = [
    "kernel", "rows", "width", "us", "gbps", "floor_us", "library", "library_us", "ratio", "max_error", "library_error",
    "gpu", "commit",
]  # fmt: skip
CHECK_COLUMNS = ["kernel", "rows", "width", "scale", "worst", "ok"]
CHAIN_COLUMNS = ["kernel", "build", "rows", "width", "us", "without_us", "gpu", "commit"]


class Library:
    """The kernels' shared library, called through ctypes."""

    def __init__(self, path: pathlib.Path):
        if not path.is_file():
            raise FileNotFoundError(f"{path} is missing: build it with `python -m clip_ttrt.build_kernels`")
        self._library = ctypes.CDLL(str(path))
        self.path = path
        for name, params in PARAMS.items():
            launch = getattr(self._library, f"clip_{name}_launch")
            launch.argtypes, launch.restype = [ctypes.POINTER(params), ctypes.c_void_p], ctypes.c_int
            if getattr(self._library, f"clip_{name}_params_size")() != ctypes.sizeof(params):
                raise ValueError(f"{path} was built from another elementwise.h: build it again")

    def launch(self, name: str, stream, **fields) -> int:
        """Enqueues one launch with the struct's fields, a tensor for a pointer; returns the cudaError_t."""
        values = {field: value.data_ptr() if hasattr(value, "data_ptr") else value for field, value in fields.items()}
        params = PARAMS[name](**values)
        return getattr(self._library, f"clip_{name}_launch")(ctypes.byref(params), stream)


@dataclasses.dataclass(frozen=True)
class Shape:
    kernel: str
    rows: int
    width: int
    tokens: int = 0  # of an image, for embed_image
    patch: int = 0  # and the resolution in pixels, for extract_patches
    resolution: int = 0

    @property
    def batch(self) -> int:
        return self.rows // (self.tokens or (self.resolution // self.patch) ** 2)

    @property
    def bytes(self) -> int:
        """What is read and written, each once, without constants of one row."""
        row = self.width * 2
        if self.kernel.startswith("extract_patches"):
            return self.batch * 3 * self.resolution**2 * (2 if self.kernel.endswith("fp16") else 4) + self.rows * row
        if self.kernel == "embed_image":
            return (self.batch * (self.tokens - 1) + 2 * self.rows) * row + self.tokens * self.width * 4
        return self.rows * row * (4 if self.kernel == "residual_layer_norm" else 2)

    @property
    def floor_us(self) -> float:
        return 1e6 * self.bytes / COPY_BYTES_PER_S


def patches_shape(batch: int, patch: int, resolution: int, fp16: bool = False) -> Shape:
    rows = batch * (resolution // patch) ** 2
    return Shape(f"extract_patches{'_fp16' if fp16 else ''}", rows, 3 * patch * patch, patch=patch, resolution=resolution)


def embed_shape(batch: int, tokens: int, width: int) -> Shape:
    return Shape("embed_image", batch * tokens, width, tokens=tokens)


ROWS = (50, 1600, 6400, 8224, 32896)
BATCHES = (1, 32, 128)
TIMED = [
    *(Shape("quick_gelu", rows, width) for width in (2048, 3072, 4096) for rows in ROWS),
    *(Shape("residual_layer_norm", rows, width) for width in (512, 768, 1024) for rows in ROWS),
    *(Shape("layer_norm", rows, width) for width in (768, 1024) for rows in ROWS),
    *(patches_shape(batch, patch, 224) for patch in (32, 16, 14) for batch in BATCHES),
    *(patches_shape(32, patch, 224, fp16=True) for patch in (32, 14)),
    *(embed_shape(batch, tokens, width) for tokens, width in ((50, 768), (197, 768), (257, 1024)) for batch in BATCHES),
]

CHECK_ROWS = (1, 2, 3, 5, 7, 33, 50, 1601)
CHECK_WIDTHS = (8, 64, 72, 128, 192, 256, 264, 512, 520, 768, 1000, 1024, 1032, 2048, 3072, 4096, 4104, 5120, 8192)
CHECK_PATCHES = [(2, 2), (2, 6), (6, 30), (8, 64), (12, 36), (14, 14), (14, 42), (14, 224), (14, 336), (16, 224), (32, 224), (32, 32)]


def check_cases(kernel: str) -> list[tuple[Shape, float]]:
    """Sizes of a kernel and scales of its random inputs."""
    if kernel.startswith("extract_patches"):
        return [(patches_shape(batch, *sizes, kernel.endswith("fp16")), 1.0) for sizes in CHECK_PATCHES for batch in (1, 3, 33)]
    if kernel == "embed_image":
        shapes = [embed_shape(batch, tokens, width) for width in CHECK_WIDTHS for tokens in (2, 5, 50) for batch in (1, 3, 33)]
    else:
        shapes = [Shape(kernel, rows, width) for width in CHECK_WIDTHS for rows in CHECK_ROWS]
    return [(shape, scale) for shape in shapes for scale in (0.1, 1.0, 8.0)]


KERNELS = ("quick_gelu", "residual_layer_norm", "layer_norm", "extract_patches", "extract_patches_fp16", "embed_image")


class Table:
    """A CSV file that is complete up to the last row at any time."""

    def __init__(self, path: pathlib.Path, columns: list[str]):
        self._file = path.open("w", newline="")
        self._writer = csv.DictWriter(self._file, columns)
        self._writer.writeheader()

    def write(self, **row):
        self._writer.writerow(row)
        self._file.flush()


class Work:
    """One launch: random normal inputs, outputs by name, and what the outputs must be."""

    outputs: dict

    def __init__(self, torch, shape: Shape, scale: float, seed: int):
        self.torch, self.shape, self.scale = torch, shape, scale
        self._generator = torch.Generator("cuda").manual_seed(seed)
        self.make()

    def normal(self, *size):
        return self.torch.randn(size, generator=self._generator, device="cuda", dtype=self.torch.float32)

    def half(self, *size):
        return (self.normal(*size) * self.scale).half()

    def row_constants(self, *names: str) -> dict:
        """fp32 [width] each: scales around 1, the others around 0."""
        return {name: (name.startswith("scale")) + 0.3 * self.normal(self.shape.width) for name in names}

    def empty(self):
        return self.torch.empty(self.shape.rows, self.shape.width, dtype=self.torch.half, device="cuda")

    def make(self) -> None:
        raise NotImplementedError

    def status(self, library: Library, stream) -> int:
        raise NotImplementedError

    def errors(self) -> list[tuple]:
        """(output, float64 reference, largest error allowed) for each output.

        An output may be off by half a unit of fp16's last place, which is what rounding costs, and by what fp32
        arithmetic costs on the way: a few 2^-24 of the largest number that went into it.
        """
        raise NotImplementedError

    def run(self, library: Library) -> None:
        status = self.status(library, self.torch.cuda.current_stream().cuda_stream)
        if status != 0:
            raise RuntimeError(f"cudaError {status} for {self.shape}")

    def half_ulp(self, exact):
        """Half the distance of the fp16 numbers around each value of a float64 tensor."""
        return 2.0 ** (exact.abs().clamp(min=2.0**-14).log2().floor() - 11)

    def layer_norm_error(self, out, x, scale, shift, allowed_of_x=0.0) -> tuple:
        """(out, exact, allowed) for the layer norm of a float64 x, itself off by up to allowed_of_x."""
        mean = x.mean(1, keepdim=True)
        deviation = (x.var(1, correction=0, keepdim=True) + EPSILON).sqrt()
        normalised = (x - mean) / deviation
        exact = normalised * scale.double() + shift.double()
        fp32 = (normalised.abs() * 8 + x.abs().amax(1, keepdim=True) / deviation * 4) * scale.abs().double() + shift.abs().double()
        return out, exact, self.half_ulp(exact) + fp32 * 2.0**-22


class Gelu(Work):
    def make(self) -> None:
        self.x, self.bias = self.half(self.shape.rows, self.shape.width), self.normal(self.shape.width) * self.scale
        self.outputs = {"out": self.empty()}

    def status(self, library: Library, stream) -> int:
        rows, width = self.x.shape
        return library.launch("bias_quick_gelu", stream, **{"in": self.x}, bias=self.bias, rows=rows, width=width, **self.outputs)

    def errors(self) -> list[tuple]:
        y = self.x.double() if self.bias is None else self.x.double() + self.bias.double()
        exact = y * self.torch.sigmoid(1.702 * y)
        # The exponent, up to 1.702 log2(e) |y|, is rounded to fp32 before the power is taken.
        return [(self.outputs["out"], exact, self.half_ulp(exact) + exact.abs() * (4 + 4 * y.abs()) * 2.0**-23)]

    def library(self):
        torch = self.torch

        def quick_gelu(x, bias):
            y = x.float() + bias
            return (y * torch.sigmoid(1.702 * y)).half()

        return "torch.compile", torch.compile(quick_gelu, dynamic=False), lambda work: (work.x, work.bias)


class LayerNorm(Work):
    def make(self) -> None:
        rows, width = self.shape.rows, self.shape.width
        self.x, self.delta, self.bias = self.half(rows, width), None, None
        self.outputs = {"out": self.empty()}
        if self.shape.kernel == "residual_layer_norm":
            self.delta, self.bias = self.half(rows, width), self.normal(width) * self.scale
            self.outputs = {"sum_out": self.empty(), "out": self.empty()}
        self.constants = self.row_constants("scale", "shift")

    def status(self, library: Library, stream) -> int:
        rows, width = self.x.shape
        return library.launch("residual_layer_norm", stream, x=self.x, delta=self.delta, bias=self.bias, rows=rows,
                              width=width, epsilon=EPSILON, **self.constants, **self.outputs)  # fmt: skip

    def errors(self) -> list[tuple]:
        checked, x = [], self.x.double()
        if "sum_out" in self.outputs:
            parts = [x] + [part.double() for part in (self.delta, self.bias) if part is not None]
            exact = sum(parts)
            checked.append((self.outputs["sum_out"], exact, self.half_ulp(exact) + sum(part.abs() for part in parts) * 2.0**-22))
            x = self.outputs["sum_out"].double()  # the layer norm is that of the rounded sum
        return checked + [self.layer_norm_error(self.outputs["out"], x, **self.constants)]

    def library(self):
        torch = self.torch

        def residual_layer_norm(x, delta, bias, scale, shift):
            total = (x.float() + delta.float() + bias).half()
            return total, torch.nn.functional.layer_norm(total.float(), total.shape[1:], scale, shift, EPSILON).half()

        def layer_norm(x, scale, shift):
            return torch.nn.functional.layer_norm(x, x.shape[1:], scale, shift, EPSILON)

        if self.delta is None:  # PyTorch's own kernel takes constants of x's type
            return "layer_norm", layer_norm, lambda work: (work.x, *(value.half() for value in work.constants.values()))
        compiled = torch.compile(residual_layer_norm, dynamic=False)
        return "torch.compile", compiled, lambda work: (work.x, work.delta, work.bias, *work.constants.values())


class Patches(Work):
    def make(self) -> None:
        size = (self.shape.batch, 3, self.shape.resolution, self.shape.resolution)
        fp16 = self.shape.kernel == "extract_patches_fp16"
        self.images = self.half(*size) if fp16 else self.normal(*size) * self.scale
        self.outputs = {"out": self.empty()}

    def status(self, library: Library, stream) -> int:
        batch, _, resolution, _ = self.images.shape
        return library.launch("extract_patches", stream, images=self.images, batch=batch, resolution=resolution,
                              patch_size=self.shape.patch, half=int(self.images.dtype == self.torch.half), **self.outputs)  # fmt: skip

    def errors(self) -> list[tuple]:
        exact = cut(self.images, self.shape.patch).half().double()
        return [(self.outputs["out"], exact, self.torch.full_like(exact, 1e-30))]  # rounding is exact: no error at all

    def library(self):
        patch = self.shape.patch
        return "torch.compile", self.torch.compile(lambda images: cut(images.half(), patch), dynamic=False), lambda work: (work.images,)


def cut(images, patch: int):
    """[B, 3, R, R] -> [B * (R / patch)^2, 3 * patch^2], as clip_ttrt.ops.extract_patches_reference on rows."""
    side = images.shape[2] // patch
    pieces = images.reshape(-1, 3, side, patch, side, patch).permute(0, 2, 4, 1, 3, 5)
    return pieces.reshape(-1, 3 * patch * patch).contiguous()


class Embed(Work):
    def make(self) -> None:
        self.patches = self.half(self.shape.batch * (self.shape.tokens - 1), self.shape.width)
        self.constants = {
            "class_token": self.normal(self.shape.width) * self.scale,
            "positions": self.normal(self.shape.tokens, self.shape.width) * self.scale,
            **self.row_constants("scale_pre", "shift_pre", "scale_1", "shift_1"),
        }
        self.outputs = {"x": self.empty(), "y": self.empty()}

    def status(self, library: Library, stream) -> int:
        return library.launch("embed_image", stream, patches=self.patches, batch=self.shape.batch, tokens=self.shape.tokens,
                              width=self.shape.width, epsilon_pre=EPSILON, epsilon_1=EPSILON, **self.constants, **self.outputs)  # fmt: skip

    def errors(self) -> list[tuple]:
        constants = {name: value.double() for name, value in self.constants.items()}
        x, y = self.outputs["x"], self.outputs["y"]
        rows = with_class_token(self.torch, self.patches.double(), constants["class_token"], constants["positions"])
        return [
            self.layer_norm_error(x, rows, constants["scale_pre"], constants["shift_pre"]),
            self.layer_norm_error(y, x.double(), constants["scale_1"], constants["shift_1"]),  # of the rounded x
        ]

    def library(self):
        torch = self.torch

        def embed(patches, class_token, positions, scale_pre, shift_pre, scale_1, shift_1):
            rows = with_class_token(torch, patches.float(), class_token, positions)
            x = torch.nn.functional.layer_norm(rows, rows.shape[1:], scale_pre, shift_pre, EPSILON).half()
            return x, torch.nn.functional.layer_norm(x.float(), rows.shape[1:], scale_1, shift_1, EPSILON).half()

        return "torch.compile", torch.compile(embed, dynamic=False), lambda work: (work.patches, *work.constants.values())


def with_class_token(torch, patches, class_token, positions):
    """[B * (T - 1), W], [W], [T, W] -> [B * T, W]."""
    tokens, width = positions.shape
    patches = patches.reshape(-1, tokens - 1, width)
    rows = torch.cat([class_token.expand(patches.shape[0], 1, width), patches], dim=1) + positions
    return rows.reshape(-1, width)


WORK = {
    "quick_gelu": Gelu, "residual_layer_norm": LayerNorm, "layer_norm": LayerNorm, "extract_patches": Patches,
    "extract_patches_fp16": Patches, "embed_image": Embed,
}  # fmt: skip


def work_for(torch, shape: Shape, scale: float, seed: int) -> Work:
    return WORK[shape.kernel](torch, shape, scale, seed)


def check_work(torch, library: Library, work: Work) -> tuple[bool, float]:
    """Whether a launch is right, and its worst error in units of what is allowed.

    Right: every element within its bound, written both over NaN and over numbers with the same bits, nothing written
    beside the outputs.
    """
    runs = []
    for poison in (math.nan, 77.0):
        wholes = []
        for name, out in work.outputs.items():  # each output amid two rows of guard values before and behind
            wholes.append(torch.full((out.shape[0] + 4, out.shape[1]), poison, device="cuda").half())
            work.outputs[name] = wholes[-1][2:-2]
        work.run(library)
        runs.append(wholes)
    worst = 0.0
    for out, exact, bound in work.errors():
        ratio = ((out.double() - exact).abs() / bound).amax()
        worst = max(worst, float(ratio) if bool(torch.isfinite(ratio)) else math.inf)
    same = all(torch.equal(a[2:-2], b[2:-2]) for a, b in zip(*runs))
    kept = all(bool((whole[:2] == 77).all()) and bool((whole[-2:] == 77).all()) for whole in runs[1])
    return worst <= 1 and same and kept, worst


def check_every_half(torch, library: Library, table: Table) -> int:
    """QuickGELU of every fp16 number, infinities and NaNs as in PyTorch; returns whether it failed."""
    work = work_for(torch, Shape("quick_gelu", 1024, 64), 1.0, 0)
    work.x = x = torch.arange(-(2**15), 2**15, dtype=torch.int32, device="cuda").short().view(torch.float16).view(1024, 64)
    work.bias = None
    work.run(library)
    [(out, exact, bound)] = work.errors()
    finite = torch.isfinite(x)
    worst = float(((out.double() - exact).abs() / bound)[finite].max())
    rest = (x.float() * torch.sigmoid(1.702 * x.float())).half()[~finite]
    ok = worst <= 1 and torch.equal(out[~finite].isnan(), rest.isnan()) and torch.equal(out[x == math.inf], x[x == math.inf])
    table.write(kernel="quick_gelu of every half", rows=1024, width=64, scale="", worst=f"{worst:.4g}", ok=int(ok))
    if not ok:
        print(f"FAIL quick_gelu of every half: {worst:.3g} of the allowed error")
    return int(not ok)


def check(torch, library: Library, cases, table: Table, seconds: float) -> int:
    """Runs the cases; returns how many failed."""
    failed = ran = 0
    started = time.monotonic()
    for index, (shape, scale) in enumerate(cases):
        if time.monotonic() - started > seconds:
            print(f"check: stopped after {index} of {len(cases)} cases, {seconds:.0f} s")
            break
        ok, worst = check_work(torch, library, work_for(torch, shape, scale, index))
        ran += 1
        failed += not ok
        if not ok and failed <= 10:
            print(f"FAIL {shape} scale {scale}: {worst:.3g} of the allowed error")
        table.write(kernel=shape.kernel, rows=shape.rows, width=shape.width, scale=scale, worst=f"{worst:.4g}", ok=int(ok))
    print(f"check: {ran} launches, {failed} failed")
    return failed


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


def time_library(torch, sets: list[Work], seconds: float) -> tuple[str, float, float]:
    """(name, time, largest error of the last output)."""
    name, function, arguments = sets[0].library()
    inputs = [arguments(work) for work in sets]
    kept = [None] * len(sets)  # else the allocator would give every launch the same output, still in the cache

    def launch(i):
        kept[i % len(sets)] = function(*inputs[i % len(sets)])

    us = time_us(torch, launch, len(sets), seconds)
    result = function(*inputs[0])
    sets[0].outputs = dict(zip(sets[0].outputs, result if isinstance(result, tuple) else (result,)))
    return name, us, largest_error(sets[0])


def largest_error(work: Work) -> float:
    out, exact, _ = work.errors()[-1]
    return float((out.double() - exact).abs().max())


def time_kernels(torch, library: Library, shapes, options, table: Table, about: dict) -> None:
    for shape in shapes:
        # Enough sets that they exceed twice the L2 cache, unless there are so few rows that an encoder would leave
        # them in the cache anyway.
        count = max(4, min(8, math.ceil(2 * L2_BYTES / shape.bytes)))
        sets = [work_for(torch, shape, 1.0, i) for i in range(count)]
        us = time_us(torch, lambda i: sets[i].run(library), count, options.time_seconds)
        error = largest_error(sets[0])
        name, library_us, library_error = "", math.nan, math.nan
        if not options.no_library:
            torch._dynamo.reset()  # a static compilation for each shape
            name, library_us, library_error = time_library(torch, sets, options.time_seconds)
        table.write(
            kernel=shape.kernel, rows=shape.rows, width=shape.width, us=f"{us:.3f}", gbps=f"{shape.bytes / us * 1e-3:.0f}",
            floor_us=f"{shape.floor_us:.2f}", library=name, library_us=f"{library_us:.3f}", ratio=f"{us / library_us:.3f}",
            max_error=f"{error:.3g}", library_error=f"{library_error:.3g}", **about,
        )  # fmt: skip
        print(f"{shape.kernel:20s} {shape.rows:6d} x {shape.width:4d}: {us:8.2f} us, floor {shape.floor_us:6.2f}, "
              f"{shape.bytes / us * 1e-3:5.0f} GB/s; {name} {library_us:.2f} us, ratio {us / library_us:.2f}", flush=True)  # fmt: skip


# (rows, width of the residual stream): ViT-B/32 at batches 32 and 1, ViT-L/14 at 32, ViT-B/32 at 128, text at 32.
CHAIN = [(1600, 768), (8224, 1024), (50, 768), (6400, 768), (2464, 512)]
CHAIN_LAYERS = 4


def chain(torch, libraries: list[Library], options, table: Table, about: dict) -> None:
    """What a kernel adds between two matrix products, where its input is fresh in the L2 cache and its output read next.

    Layers of up-projection and down-projection with or without the kernel between; the difference is the kernel's.
    Graphs of all libraries take turns, so that the clocks, which matrix products pull down, are the same for all.
    """
    for rows, width in CHAIN[: options.shapes]:
        for kernel in ("quick_gelu", "residual_layer_norm"):
            inner = 4 * width if kernel == "quick_gelu" else width
            layers = [work_for(torch, Shape(kernel, rows, inner), 1.0, i) for i in range(CHAIN_LAYERS)]
            weights = [(layers[0].normal(width, inner) / math.sqrt(width), layers[0].normal(inner, width) / math.sqrt(inner)) for _ in layers]
            weights = [tuple(weight.half() for weight in pair) for pair in weights]
            between = layers[0].normal(rows, width).half()

            def layer(i, library):
                work, (up, down) = layers[i % CHAIN_LAYERS], weights[i % CHAIN_LAYERS]
                fresh = work.x if kernel == "quick_gelu" else work.delta
                torch.mm(between, up, out=fresh)
                if library is not None:
                    work.run(library)
                # The same numbers with and without the kernel: they too decide how fast a product is.
                torch.mm(work.outputs["out"], down, out=between)

            launches = 2 * CHAIN_LAYERS
            graphs = [captured(torch, lambda i, library=library: layer(i, library), launches) for library in [*libraries, None]]
            times = [[] for _ in graphs]
            for _ in range(options.rounds):
                for graph, measured in zip(graphs, times):
                    measured.append(replay_us(torch, graph, launches, 0.0))
            without = statistics.median(times[-1])
            for library, measured in zip(libraries, times):
                added = statistics.median(measured) - without
                table.write(kernel=kernel, build=library.path.stem, rows=rows, width=inner, us=f"{added:.3f}",
                            without_us=f"{without:.3f}", **about)  # fmt: skip
                print(f"chain {kernel:20s} {rows} x {inner} {library.path.stem:32s} {added:7.2f} us on {without:.2f} us", flush=True)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m experiments.elementwise_bench", description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=pathlib.Path, required=True, help="directory for the CSV files")
    parser.add_argument("--library", type=pathlib.Path, action="append", help="another build; with --chain several to compare")
    parser.add_argument("--chain", action="store_true", help="time between matrix products, and nothing else")
    parser.add_argument("--rounds", type=int, default=10, help="with --chain: turns of every graph")
    parser.add_argument("--kernel", choices=KERNELS, action="append", help="check and time this one only (may be repeated)")
    parser.add_argument("--shapes", type=int, help="time the first so many shapes only")
    parser.add_argument("--check-seconds", type=float, default=600, help="stop checking a kernel after this long")
    parser.add_argument("--time-seconds", type=float, default=0.1, help="time spent on each measurement")
    parser.add_argument("--skip-check", action="store_true")
    parser.add_argument("--skip-time", action="store_true")
    parser.add_argument("--no-library", action="store_true", help="do not time PyTorch")
    options = parser.parse_args(arguments)

    import torch

    if not torch.cuda.is_available():
        print("elementwise_bench: no CUDA device; the kernels run on NVIDIA GPUs of compute capability 8.0 and newer")
        return 2
    own = options.library or [pathlib.Path(kernels.library()._name)]
    libraries = [Library(path) for path in own]
    options.out.mkdir(parents=True, exist_ok=True)
    about = {"gpu": torch.cuda.get_device_name(), "commit": commit()}
    if options.chain:
        chain(torch, libraries, options, Table(options.out / "elementwise_chain.csv", CHAIN_COLUMNS), about)
        return 0
    wanted = options.kernel or KERNELS
    failed = 0
    if not options.skip_check:
        table = Table(options.out / "elementwise_check.csv", CHECK_COLUMNS)
        failed = check_every_half(torch, libraries[0], table)
        for kernel in wanted:
            print(kernel, end=" ")
            failed += check(torch, libraries[0], check_cases(kernel), table, options.check_seconds)
    if not options.skip_time:
        table = Table(options.out / "elementwise.csv", COLUMNS)
        shapes = [shape for shape in TIMED if shape.kernel in wanted]
        time_kernels(torch, libraries[0], shapes[: options.shapes], options, table, about)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
