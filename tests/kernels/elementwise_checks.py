"""Checks of the elementwise kernels against float64.

An output may be off by half a unit of fp16's last place, which is what rounding costs, and by what
fp32 arithmetic costs on the way: a few 2^-24 of the largest number that went into it.
"""
import ctypes
import math
import time
from dataclasses import dataclass

from clip_ttrt.elementwise import PARAMS

EPSILON = 1e-5
CHECK_ROWS = (1, 2, 3, 5, 7, 33, 50, 1601)
CHECK_WIDTHS = (8, 64, 72, 128, 192, 256, 264, 512, 520, 768, 1000, 1024, 1032, 2048, 3072, 4096,
                4104, 5120, 8192)
CHECK_PATCHES = [(2, 2), (2, 6), (6, 30), (8, 64), (12, 36), (14, 14), (14, 42), (14, 224),
                 (14, 336), (16, 224), (32, 224), (32, 32)]
KERNELS = ("quick_gelu", "residual_layer_norm", "layer_norm", "extract_patches",
           "extract_patches_fp16", "embed_image")


class Library:
    """The kernels' shared library, called through ctypes."""

    def __init__(self, path):
        self._library = ctypes.CDLL(str(path))
        for name, params in PARAMS.items():
            launch = getattr(self._library, f"clip_{name}_launch")
            launch.argtypes = [ctypes.POINTER(params), ctypes.c_void_p]
            size = getattr(self._library, f"clip_{name}_params_size")()
            assert size == ctypes.sizeof(params)

    def launch(self, name: str, stream, **fields) -> int:
        """Enqueue a launch with a struct's fields, a tensor for a pointer; the cudaError_t."""
        values = {key: value.data_ptr() if hasattr(value, "data_ptr") else value
                  for key, value in fields.items()}
        launch = getattr(self._library, f"clip_{name}_launch")
        return launch(ctypes.byref(PARAMS[name](**values)), stream)


@dataclass(frozen=True)
class Shape:
    """Rows and width of the output."""

    kernel: str
    rows: int
    width: int
    tokens: int = 0  # of an image, for embed_image
    patch: int = 0  # and the resolution in pixels, for extract_patches
    resolution: int = 0

    @property
    def batch(self) -> int:
        return self.rows // (self.tokens or (self.resolution // self.patch) ** 2)


def patches_shape(batch: int, patch: int, resolution: int, fp16: bool = False) -> Shape:
    rows = batch * (resolution // patch) ** 2
    kernel = "extract_patches_fp16" if fp16 else "extract_patches"
    return Shape(kernel, rows, 3 * patch * patch, patch=patch, resolution=resolution)


def embed_shape(batch: int, tokens: int, width: int) -> Shape:
    return Shape("embed_image", batch * tokens, width, tokens=tokens)


def check_cases(kernel: str) -> list[tuple[Shape, float]]:
    """Sizes of a kernel and scales of its random inputs."""
    if kernel.startswith("extract_patches"):
        fp16 = kernel.endswith("fp16")
        return [(patches_shape(batch, *sizes, fp16), 1.0)
                for sizes in CHECK_PATCHES for batch in (1, 3, 33)]
    if kernel == "embed_image":
        shapes = [embed_shape(batch, tokens, width) for width in CHECK_WIDTHS
                  for tokens in (2, 5, 50) for batch in (1, 3, 33)]
    else:
        shapes = [Shape(kernel, rows, width) for width in CHECK_WIDTHS for rows in CHECK_ROWS]
    return [(shape, scale) for shape in shapes for scale in (0.1, 1.0, 8.0)]


class Work:
    """One launch: random normal inputs, outputs by name, and what the outputs must be."""

    outputs: dict

    def __init__(self, torch, shape: Shape, scale: float, seed: int):
        self.torch, self.shape, self.scale = torch, shape, scale
        self._generator = torch.Generator("cuda").manual_seed(seed)
        self.make()

    def normal(self, *size):
        return self.torch.randn(size, generator=self._generator, device="cuda")

    def half(self, *size):
        return (self.normal(*size) * self.scale).half()

    def row_constants(self, *names: str) -> dict:
        """fp32 [width] each: scales around 1, the others around 0."""
        width = self.shape.width
        return {name: name.startswith("scale") + 0.3 * self.normal(width) for name in names}

    def empty(self):
        size = (self.shape.rows, self.shape.width)
        return self.torch.empty(size, dtype=self.torch.half, device="cuda")

    def run(self, library: Library) -> None:
        status = self.status(library, self.torch.cuda.current_stream().cuda_stream)
        assert status == 0, f"cudaError {status} for {self.shape}"

    def half_ulp(self, exact):
        """Half the distance of the fp16 numbers around each value of a float64 tensor."""
        return 2.0 ** (exact.abs().clamp(min=2.0**-14).log2().floor() - 11)

    def layer_norm_error(self, out, x, scale, shift) -> tuple:
        """(out, exact, allowed) for the layer norm of a float64 x."""
        mean = x.mean(1, keepdim=True)
        deviation = (x.var(1, correction=0, keepdim=True) + EPSILON).sqrt()
        normalised = (x - mean) / deviation
        exact = normalised * scale.double() + shift.double()
        before = normalised.abs() * 8 + x.abs().amax(1, keepdim=True) / deviation * 4
        fp32 = before * scale.abs().double() + shift.abs().double()
        return out, exact, self.half_ulp(exact) + fp32 * 2.0**-22


class Gelu(Work):
    def make(self) -> None:
        self.x = self.half(self.shape.rows, self.shape.width)
        self.bias = self.normal(self.shape.width) * self.scale
        self.outputs = {"out": self.empty()}

    def status(self, library: Library, stream) -> int:
        rows, width = self.x.shape
        return library.launch("bias_quick_gelu", stream, **{"in": self.x}, bias=self.bias,
                              rows=rows, width=width, **self.outputs)

    def errors(self) -> list[tuple]:
        y = self.x.double() if self.bias is None else self.x.double() + self.bias.double()
        exact = y * self.torch.sigmoid(1.702 * y)
        # The exponent, up to 1.702 log2(e) |y|, is rounded to fp32 before the power is taken.
        allowed = self.half_ulp(exact) + exact.abs() * (4 + 4 * y.abs()) * 2.0**-23
        return [(self.outputs["out"], exact, allowed)]


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
        return library.launch("residual_layer_norm", stream, x=self.x, delta=self.delta,
                              bias=self.bias, rows=rows, width=width, epsilon=EPSILON,
                              **self.constants, **self.outputs)

    def errors(self) -> list[tuple]:
        checked, x = [], self.x.double()
        if "sum_out" in self.outputs:
            parts = [x, self.delta.double(), self.bias.double()]
            exact, out = sum(parts), self.outputs["sum_out"]
            allowed = self.half_ulp(exact) + sum(part.abs() for part in parts) * 2.0**-22
            checked.append((out, exact, allowed))
            x = out.double()  # the layer norm is that of the rounded sum
        return checked + [self.layer_norm_error(self.outputs["out"], x, **self.constants)]


class Patches(Work):
    def make(self) -> None:
        size = (self.shape.batch, 3, self.shape.resolution, self.shape.resolution)
        self.images = self.normal(*size) * self.scale
        if self.shape.kernel == "extract_patches_fp16":
            self.images = self.images.half()
        self.outputs = {"out": self.empty()}

    def status(self, library: Library, stream) -> int:
        batch, _, resolution, _ = self.images.shape
        half = int(self.images.dtype == self.torch.half)
        return library.launch("extract_patches", stream, images=self.images, batch=batch,
                              resolution=resolution, patch_size=self.shape.patch, half=half,
                              **self.outputs)

    def errors(self) -> list[tuple]:
        exact = cut(self.images, self.shape.patch).half().double()
        nothing = self.torch.full_like(exact, 1e-30)  # rounding is exact
        return [(self.outputs["out"], exact, nothing)]


def cut(images, patch: int):
    """[B, 3, R, R] -> [B * (R / patch)^2, 3 * patch^2], as extract_patches_reference on rows."""
    side = images.shape[2] // patch
    pieces = images.reshape(-1, 3, side, patch, side, patch).permute(0, 2, 4, 1, 3, 5)
    return pieces.reshape(-1, 3 * patch * patch).contiguous()


class Embed(Work):
    def make(self) -> None:
        shape = self.shape
        self.patches = self.half(shape.batch * (shape.tokens - 1), shape.width)
        self.constants = {
            "class_token": self.normal(shape.width) * self.scale,
            "positions": self.normal(shape.tokens, shape.width) * self.scale,
            **self.row_constants("scale_pre", "shift_pre", "scale_1", "shift_1"),
        }
        self.outputs = {"x": self.empty(), "y": self.empty()}

    def status(self, library: Library, stream) -> int:
        shape = self.shape
        return library.launch("embed_image", stream, patches=self.patches, batch=shape.batch,
                              tokens=shape.tokens, width=shape.width, epsilon_pre=EPSILON,
                              epsilon_1=EPSILON, **self.constants, **self.outputs)

    def errors(self) -> list[tuple]:
        constants = {name: value.double() for name, value in self.constants.items()}
        x, y = self.outputs["x"], self.outputs["y"]
        rows = with_class_token(self.torch, self.patches.double(), constants["class_token"],
                                constants["positions"])
        pre, first = (constants["scale_pre"], constants["shift_pre"]), (
            constants["scale_1"], constants["shift_1"])
        return [self.layer_norm_error(x, rows, *pre),
                self.layer_norm_error(y, x.double(), *first)]  # of the rounded x


def with_class_token(torch, patches, class_token, positions):
    """[B * (T - 1), W], [W], [T, W] -> [B * T, W]."""
    tokens, width = positions.shape
    patches = patches.reshape(-1, tokens - 1, width)
    class_tokens = class_token.expand(patches.shape[0], 1, width)
    return (torch.cat([class_tokens, patches], dim=1) + positions).reshape(-1, width)


def work_for(torch, shape: Shape, scale: float, seed: int) -> Work:
    kinds = (Gelu, LayerNorm, LayerNorm, Patches, Patches, Embed)
    return dict(zip(KERNELS, kinds))[shape.kernel](torch, shape, scale, seed)


def check_work(torch, library: Library, work: Work) -> tuple[bool, float]:
    """Whether a launch is right, and its worst error in units of what is allowed.

    Right: every element within its bound, written both over NaN and over numbers with the same
    bits, nothing written beside the outputs.
    """
    runs = []
    for poison in (math.nan, 77.0):
        wholes = []
        for name, out in work.outputs.items():  # each amid two rows of guard values
            size = (out.shape[0] + 4, out.shape[1])
            wholes.append(torch.full(size, poison, device="cuda").half())
            work.outputs[name] = wholes[-1][2:-2]
        work.run(library)
        runs.append(wholes)
    worst = 0.0
    for out, exact, bound in work.errors():
        ratio = ((out.double() - exact).abs() / bound).amax()
        worst = max(worst, float(ratio) if bool(torch.isfinite(ratio)) else math.inf)
    same = all(torch.equal(a[2:-2], b[2:-2]) for a, b in zip(*runs))
    kept = all(bool((whole[part] == 77).all())
               for whole in runs[1] for part in (slice(2), slice(-2, None)))
    return worst <= 1 and same and kept, worst


def check_every_half(torch, library: Library) -> int:
    """QuickGELU of every fp16 number, infinities and NaNs as in PyTorch; whether it failed."""
    work = work_for(torch, Shape("quick_gelu", 1024, 64), 1.0, 0)
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32, device="cuda").short()
    work.x = x = every.view(torch.float16).view(1024, 64)
    work.bias = None
    work.run(library)
    [(out, exact, bound)] = work.errors()
    finite = torch.isfinite(x)
    worst = float(((out.double() - exact).abs() / bound)[finite].max())
    rest = (x.float() * torch.sigmoid(1.702 * x.float())).half()[~finite]
    ok = worst <= 1 and torch.equal(out[~finite].isnan(), rest.isnan())
    ok = ok and torch.equal(out[x == math.inf], x[x == math.inf])
    return int(not ok)


def check(torch, library: Library, cases, seconds: float) -> int:
    """Run the cases; returns how many failed."""
    failed, started = 0, time.monotonic()
    for index, (shape, scale) in enumerate(cases):
        assert time.monotonic() - started < seconds, f"{index} of {len(cases)} cases are checked"
        ok, worst = check_work(torch, library, work_for(torch, shape, scale, index))
        failed += not ok
        if not ok:
            print(f"FAIL {shape} scale {scale}: {worst:.3g} of the allowed error")
    return failed
