"""Microseconds of our kernels beside the best that PyTorch has instead: results/kernels.csv

    python -m experiments.kernels                                  at every model's shapes
    python -m experiments.kernels --models ViT-L/14 --batches 1 8 32 128 --ops attention linear
    python -m experiments.kernels --device cpu --models demo       no kernels, just a smoke test

Needs a GPU, PyTorch and the library that `python -m clip_ttrt.build_kernels` builds; not TensorRT.
An op has a row for `ours` (none where it has no kernel of ours) and one for each peer: the op's
reference in PyTorch through torch.compile, compiled for just that shape, or the libraries that do
it as a whole.  Shapes that models share are measured once.  On the CPU the reference stands alone.

Times are those of single launches in a CUDA graph of many, which take turns over sets of random
tensors, together larger than the L2 cache or 64.  An op named e4m3 writes that, or as a linear
layer multiplies it.  GB/s count what is read and written, each once; TFLOP/s are of
matrix products and attention.  What fails is a line on standard error.
"""
import argparse
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F

from clip_ttrt import kernels, linear, ops
from clip_ttrt.errors import UserError
from clip_ttrt.families import find
from clip_ttrt.models import MODELS
from clip_ttrt.pipeline.resize import Preprocess
from experiments.floor import LIBRARIES, attend, attention_flops, split
from experiments.record import append_row, in_a_line, provenance
from experiments.timing import launch_times_us, percentile, sets_for

EPSILON = 1e-5
E4M3 = torch.float8_e4m3fn
OUT_SCALES = {"": None, "e4m3": 0.02}  # behind an op's name -> what an output in E4M3 is divided by
PICTURES = (256, 256), (375, 500), (480, 640)  # heights and widths for preprocess
Launch = Callable[..., object]


class Place:
    """Where an op stands: an encoder of a model at a batch, and what its tensors are."""

    def __init__(self, model: str, encoder: str, batch: int, device: str):
        self.model, self.encoder, self.batch, self.device = model, encoder, batch, device
        self.dims, self.causal = find(model).dimensions, encoder == "text"
        image = (self.dims.image_tokens, self.dims.image_width, self.dims.image_heads)
        text = (self.dims.context_length, self.dims.text_width, self.dims.text_heads)
        self.tokens, self.width, self.heads = text if self.causal else image
        self.rows = batch * self.tokens
        self.dtype = torch.half if device == "cuda" else torch.float

    def randn(self, *shape: int) -> torch.Tensor:
        """Activations, or weights of a linear layer."""
        return torch.randn(shape, device=self.device, dtype=self.dtype)

    def constants(self, *shape: int) -> torch.Tensor:
        """Biases, scales and the like: fp32, as our kernels take them."""
        return torch.randn(shape, device=self.device)

    def bytes_of(self, out_scale: float | None) -> int:
        """Of a number of an output."""
        return 1 if out_scale else self.dtype.itemsize


def empty(x: torch.Tensor, out_scale: float | None) -> torch.Tensor:
    return torch.empty_like(x, dtype=E4M3 if out_scale else x.dtype)


@dataclass(frozen=True)
class Case:
    """An op at one shape, its random inputs, and what can compute it."""

    shape: str
    size: int  # bytes that are read and written
    inputs: Callable[[], Sequence[torch.Tensor]]
    reference: Launch
    ours: Callable[[], Launch] | None = None
    libraries: dict[str, Launch] | None = None  # in the place of the compiled reference
    flops: float = 0
    name: str = ""  # behind the op's

    def backends(self, device: str) -> dict[str, Callable[[], Launch]]:
        """What can compute it on a device, each as a function that prepares the launch."""
        if device == "cpu":
            return {"reference": lambda: self.reference}
        found = {"ours": self.ours} if self.ours else {}
        for name, launch in (self.libraries or {}).items():
            found[name] = lambda launch=launch: launch
        if not self.libraries:
            found["torch.compile"] = partial(
                torch.compile, self.reference, dynamic=False, fullgraph=True
            )
        return found


def attention(at: Place) -> Iterator[Case]:
    def inputs() -> Sequence[torch.Tensor]:
        qkv = at.randn(at.batch, at.tokens, 3 * at.width)
        packed = split(qkv, at.heads)
        return qkv, *packed, *(part.contiguous() for part in packed)

    def library(name: str, first: int, *tensors: torch.Tensor) -> torch.Tensor:
        return attend(name, at.causal)(*tensors[first : first + 3])

    e4m3 = OUT_SCALES["e4m3"]
    shape = f"{at.heads} heads of {at.width // at.heads}, {at.tokens} tokens"
    yield Case(
        shape, at.rows * at.width * (3 * at.dtype.itemsize + 1), inputs,
        lambda qkv, *_: ops.fused_attention_reference(qkv, at.heads, at.causal, None, e4m3),
        lambda: lambda qkv, *_: kernels.attention(qkv, at.heads, at.causal, out_scale=e4m3),
        flops=attention_flops(at.batch, at.width, at.tokens, at.causal), name="e4m3",
    )  # fmt: skip
    yield Case(
        shape, at.rows * at.width * 4 * at.dtype.itemsize, inputs,
        lambda qkv, *_: ops.attention_reference(qkv, at.heads, at.causal),
        lambda: lambda qkv, *_: kernels.attention(qkv, at.heads, at.causal),
        {f"{name} {layout}": partial(library, name, first)
         for name in LIBRARIES for layout, first in (("packed", 1), ("separate", 4))},
        attention_flops(at.batch, at.width, at.tokens, at.causal),
    )  # fmt: skip


def linear_layers(at: Place) -> Iterator[Case]:
    width = at.width
    layers = {"qkv": (width, 3 * width), "out": (width, width),
              "up": (width, 4 * width), "down": (4 * width, width)}  # fmt: skip
    for name, (k, n) in layers.items():
        table = partial(linear.tune, [at.rows], (n, k), False)
        yield Case(
            f"{at.rows} x {k} x {n}", (at.rows * (k + n) + k * n) * at.dtype.itemsize,
            lambda k=k, n=n: (at.randn(at.rows, k), at.randn(n, k)),
            F.linear,
            lambda table=table: partial(linear.linear, bias=None, table=table()),
            {"F.linear": F.linear}, 2 * at.rows * k * n, name,
        )  # fmt: skip
        if at.device == "cuda":
            yield from quantized_layers(at, name, k, n)


def quantized_layers(at: Place, name: str, k: int, n: int) -> Iterator[Case]:
    """With cuBLASLt's fast accumulation, beside PyTorch's with and without it."""
    scale = k**-0.5
    one = torch.ones((), device=at.device)

    def scaled_mm(x: torch.Tensor, weight: torch.Tensor, fast: bool = True) -> torch.Tensor:
        return torch._scaled_mm(x, weight.T, one, one, out_dtype=at.dtype, use_fast_accum=fast)

    def ours() -> Launch:
        table = linear.tune([at.rows], (n, k), False, quantized=True)
        return lambda x, weight: linear.linear(x, weight, None, table, scale)

    yield Case(
        f"{at.rows} x {k} x {n}", at.rows * (k + at.dtype.itemsize * n) + k * n,
        lambda: (at.randn(at.rows, k).to(E4M3), at.randn(n, k).to(E4M3)), scaled_mm, ours,
        {"torch._scaled_mm": scaled_mm, "torch._scaled_mm exact": partial(scaled_mm, fast=False)},
        2 * at.rows * k * n, f"e4m3 {name}",
    )  # fmt: skip


def layer_norm(at: Place) -> Iterator[Case]:
    def reference(x: torch.Tensor, constants: torch.Tensor) -> torch.Tensor:
        return ops.layer_norm_reference(x, *constants.to(x.dtype), EPSILON)

    def ours(x: torch.Tensor, constants: torch.Tensor) -> torch.Tensor:
        out, (scale, shift) = torch.empty_like(x), constants
        kernels.launch(
            "residual_layer_norm", at.device, x=x, delta=None, bias=None, scale=scale, shift=shift,
            sum_out=None, out=out, rows=at.rows, width=at.width, epsilon=EPSILON,
        )  # fmt: skip
        return out

    yield Case(
        f"{at.rows} x {at.width}", at.rows * at.width * 2 * at.dtype.itemsize,
        lambda: (at.randn(at.rows, at.width), at.constants(2, at.width)), reference, lambda: ours,
    )  # fmt: skip


def residual_layer_norm(at: Place) -> Iterator[Case]:
    def reference(out_scale, x: torch.Tensor, delta: torch.Tensor, constants: torch.Tensor):
        constants = constants.to(x.dtype)
        return ops.residual_layer_norm_reference(x, delta, *constants, EPSILON, out_scale)

    def ours(out_scale, x: torch.Tensor, delta: torch.Tensor, constants: torch.Tensor):
        total, out, (bias, scale, shift) = torch.empty_like(x), empty(x, out_scale), constants
        kernels.launch(
            "residual_layer_norm", at.device, x=x, delta=delta, bias=bias, scale=scale,
            shift=shift, sum_out=total, out=out, rows=at.rows, width=at.width, epsilon=EPSILON,
            out_scale=out_scale or 0,
        )  # fmt: skip
        return total, out

    for name, out_scale in OUT_SCALES.items():
        size = 3 * at.dtype.itemsize + at.bytes_of(out_scale)
        yield Case(
            f"{at.rows} x {at.width}", at.rows * at.width * size,
            lambda: (*(at.randn(at.rows, at.width) for _ in range(2)), at.constants(3, at.width)),
            partial(reference, out_scale), lambda s=out_scale: partial(ours, s), name=name,
        )  # fmt: skip


def gelu(at: Place) -> Iterator[Case]:
    width = 4 * at.width

    def ours(out_scale, x: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        out = empty(x, out_scale)
        fields = {"in": x, "bias": bias, "out": out, "rows": at.rows, "width": width}
        kernels.launch("bias_gelu", at.device, **fields, out_scale=out_scale or 0)
        return out

    for name, out_scale in OUT_SCALES.items():
        yield Case(
            f"{at.rows} x {width}", at.rows * width * (at.dtype.itemsize + at.bytes_of(out_scale)),
            lambda: (at.randn(at.rows, width), at.constants(width)),
            lambda x, bias, s=out_scale: ops.bias_gelu_reference(
                x, bias.to(x.dtype), "quick", s),
            lambda s=out_scale: partial(ours, s), name=name,
        )  # fmt: skip


def patches(at: Place) -> Iterator[Case]:
    """Cut from fp32 images; and cut and multiplied, which a convolution does in one."""
    if at.encoder == "text":
        return
    side, size, width = at.dims.image_resolution, at.dims.patch_size, at.width
    rows, k, dtype = at.batch * (at.tokens - 1), 3 * size**2, at.dtype

    def images() -> torch.Tensor:
        return torch.randn(at.batch, 3, side, side, device=at.device)

    def cut(x: torch.Tensor) -> torch.Tensor:
        out = torch.empty(rows, k, dtype=dtype, device=x.device)
        kernels.launch("extract_patches", at.device, images=x, out=out, batch=at.batch,
                       resolution=side, patch_size=size, half=0)  # fmt: skip
        return out

    yield Case(
        f"{rows} x {k}", rows * k * (4 + dtype.itemsize), lambda: (images(),),
        lambda x: ops.extract_patch_rows_reference(x, size, dtype), lambda: cut, name="cut",
    )  # fmt: skip

    def convolution(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        weight = weight.view(width, 3, size, size)
        return F.conv2d(x.to(dtype), weight, stride=size)

    def multiplied() -> Launch:
        table = linear.tune([rows], (width, k), False)
        return lambda x, weight: linear.linear(cut(x), weight, None, table)

    yield Case(
        f"{rows} x {k} x {width}", rows * (4 * k + dtype.itemsize * width),
        lambda: (images(), at.randn(width, k)), convolution, multiplied, {"conv2d": convolution},
        2 * rows * k * width, "embed",
    )  # fmt: skip


def embed_image(at: Place) -> Iterator[Case]:
    """Class token, positions and two layer norms."""
    if at.encoder == "text":
        return
    rows, width = at.batch * (at.tokens - 1), at.width
    names = ("class_token", "scale_pre", "shift_pre", "scale_1", "shift_1")
    epsilons = {"epsilon_pre": EPSILON, "epsilon_1": EPSILON}

    def reference(out_scale, patches: torch.Tensor, constants: torch.Tensor, positions):
        fields = dict(zip(names, constants.to(patches.dtype)), out_scale=out_scale)
        positions = positions.to(patches.dtype)
        return ops.embed_image_reference(patches, positions=positions, **fields, **epsilons)

    def ours(out_scale, patches: torch.Tensor, constants: torch.Tensor, positions: torch.Tensor):
        x = patches.new_empty(at.rows, width)
        y, fields = empty(x, out_scale), dict(zip(names, constants), out_scale=out_scale or 0)
        kernels.launch(
            "embed_image", at.device, patches=patches, positions=positions, x=x, y=y,
            batch=at.batch, tokens=at.tokens, width=width, **fields, **epsilons,
        )  # fmt: skip
        return x, y

    for name, out_scale in OUT_SCALES.items():
        size = (rows + at.rows) * at.dtype.itemsize + at.rows * at.bytes_of(out_scale)
        yield Case(
            f"{at.rows} x {width}", size * width,
            lambda: (at.randn(rows, width), at.constants(5, width), at.constants(at.tokens, width)),
            partial(reference, out_scale), lambda s=out_scale: partial(ours, s), name=name,
        )  # fmt: skip


def embed_text(at: Place) -> Iterator[Case]:
    """Token embedding and positions: no kernel of ours."""
    if at.encoder == "image":
        return
    words, shape = at.dims.vocab_size, (at.batch, at.tokens)
    yield Case(
        f"{at.rows} x {at.width}", at.rows * at.width * 2 * at.dtype.itemsize,
        lambda: (at.randn(words, at.width), at.randn(at.tokens, at.width),
                 torch.randint(words, shape, device=at.device, dtype=torch.int32)),
        lambda weight, positions, tokens: ops.embedding_reference(weight, tokens) + positions,
    )  # fmt: skip


def pool(at: Place) -> Iterator[Case]:
    """The row at the end of each text: no kernel of ours."""
    if at.encoder == "image":
        return
    words, shape = at.dims.vocab_size, (at.batch, at.tokens)
    yield Case(
        f"{at.rows} x {at.width}", at.batch * (4 * at.tokens + 2 * at.width * at.dtype.itemsize),
        lambda: (at.randn(*shape, at.width),
                 torch.randint(words, shape, device=at.device, dtype=torch.int32)),
        ops.pool_end_of_text_reference,
    )  # fmt: skip


def preprocess(at: Place) -> Iterator[Case]:
    """Pictures that lie on the device, resized, cropped and normalised."""
    if at.encoder == "text":
        return
    side = at.dims.image_resolution
    run = Preprocess(side, at.device)

    def pictures(height: int, width: int) -> Sequence[torch.Tensor]:
        shape = (at.batch, height, width, 3)
        return torch.randint(256, shape, dtype=torch.uint8, device=at.device).unbind()

    def reference(*pictures: torch.Tensor) -> torch.Tensor:
        """What a user would write; antialiased, and not equal to Pillow."""
        return torch.cat([
            F.interpolate(each[None].permute(0, 3, 1, 2).float(), (side, side), mode="bicubic",
                          antialias=True) for each in pictures
        ])  # fmt: skip

    for height, width in PICTURES:
        taken = 3 * min(height, width) ** 2  # of the bytes, the centre
        yield Case(
            f"{at.batch} of {height} x {width} to {side}", at.batch * (taken + 12 * side**2),
            partial(pictures, height, width), reference, lambda: lambda *pictures: run(pictures),
            {"F.interpolate": reference}, name=f"{width}x{height}",
        )  # fmt: skip


OPS = {
    "attention": attention,
    "preprocess": preprocess,
    "layer_norm": layer_norm,
    "residual_layer_norm": residual_layer_norm,
    "gelu": gelu,
    "patches": patches,
    "embed_image": embed_image,
    "embed_text": embed_text,
    "pool": pool,
    "linear": linear_layers,
}


def rows_of(op: str, at: Place, case: Case, seconds: float) -> Iterator[dict[str, str]]:
    """The CSV rows of a case, but for provenance; what fails goes to standard error."""
    op = f"{op} {case.name}".strip()
    for backend, prepare in case.backends(at.device).items():
        try:
            torch._dynamo.reset()
            many = sets_for(case.size) if at.device == "cuda" else 1
            sets = [case.inputs() for _ in range(many)]
            times = launch_times_us(prepare(), sets, at.device, seconds)
        except Exception as problem:  # noqa: BLE001 (a library that takes no such input, say)
            about = f"{op} {case.shape} of {at.model} at {at.batch}, {backend}"
            print(f"{about}: {in_a_line(problem)}", file=sys.stderr, flush=True)
            continue
        us = statistics.median(times)
        yield {
            "op": op,
            "model": at.model,
            "encoder": at.encoder,
            "batch": at.batch,
            "shape": case.shape,
            "dtype": str(at.dtype).removeprefix("torch."),
            "backend": backend,
            "median_us": f"{us:.3f}",
            "p90_us": f"{percentile(times, 0.9):.3f}",
            "gb_per_s": f"{case.size / us * 1e-3:.1f}",
            "tflop_per_s": f"{case.flops / us * 1e-6:.1f}" if case.flops else "",
        }


def main(arguments: Sequence[str] | None = None) -> int:
    gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--ops", nargs="+", choices=OPS, default=list(OPS), metavar="OP", help=", ".join(OPS))
    models = [name for name, dims in MODELS.items() if not dims.is_resnet]  # whose kernels they are
    add("--models", nargs="+", default=[name for name in models if name != "demo"])
    add("--encoders", nargs="+", choices=("image", "text"), default=["image", "text"])
    add("--batches", nargs="+", type=int, default=[1, 32] if gpu else [1])
    add("--device", choices=("cuda", "cpu"), default="cuda" if gpu else "cpu")
    add("--row-seconds", type=float, default=0.03, help="of replays, a row")
    add("--seconds", type=float, default=80, help="begin no shape after so long")
    add("--out", type=Path, default=Path("results/kernels.csv"))
    options = parser.parse_args(arguments)
    if options.device == "cuda" and not gpu:
        parser.error("--device cuda: no CUDA GPU answers; --device cpu runs the references")
    try:
        if options.device == "cuda":
            kernels.library()
        places = [Place(model, encoder, batch, options.device) for batch in options.batches
                  for model in options.models for encoder in options.encoders]  # fmt: skip
    except UserError as problem:
        parser.error(str(problem))
    torch.backends.cudnn.benchmark = True  # the fastest convolution
    end, seen, left, here = time.monotonic() + options.seconds, set(), 0, provenance()
    for op in options.ops:
        for at in places:
            for case in OPS[op](at):
                key = (op, case.name, case.shape, at.batch, at.causal)
                if key in seen:
                    continue
                seen.add(key)
                if time.monotonic() > end:
                    left += 1
                    continue
                with torch.no_grad():
                    for row in rows_of(op, at, case, options.row_seconds):
                        append_row(options.out, {**row, **here})
    if left:
        print(f"{left} shapes are left out after {options.seconds:g} s: pass --seconds, --models, "
              "--batches or --ops", file=sys.stderr)  # fmt: skip
    return 1 if left else 0


if __name__ == "__main__":
    sys.exit(main())
