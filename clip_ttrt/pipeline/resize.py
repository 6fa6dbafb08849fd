"""OpenAI's preprocess for batches of pictures of any sizes, bit for bit the installed Pillow's.

Pillow resizes uint8 in two passes, each along one axis, with a byte between them.  A pass follows
a table of integers, which the CPU makes in double precision as Pillow does.  On a GPU the kernel
of `kernels/preprocess` applies them, elsewhere the reference here; both are exact."""
import functools
from typing import Optional, Sequence, Union

import numpy as np
import PIL
import torch
from PIL import Image
from torch import Tensor

from clip_ttrt import kernels
from clip_ttrt.errors import UserError
from clip_ttrt.transform import MEAN, STD, geometry

BITS = 22  # of a weight
MOST_BYTES = 1 << 28  # of pixels and workspace in one launch; larger batches take several
SIZES = 1024  # whose tables are kept: 16 KB each where pictures are shrunk to a half or so
CPU = torch.device("cpu")
NOTHING = (0,) * len(kernels.PICTURE._fields_)  # the descriptor of no picture
Pixels = Union[Tensor, np.ndarray]
# The rows and columns that are taken; the tables of both passes; whether the first is vertical.
Plan = tuple[tuple[slice, slice], tuple[np.ndarray, np.ndarray], bool]


def bicubic(x: np.ndarray) -> np.ndarray:
    x, a = np.abs(x), -0.5
    near = ((a + 2.0) * x - (a + 3.0)) * x * x + 1
    return np.where(x < 1.0, near, np.where(x < 2.0, (((x - 5) * x + 8) * x - 4) * a, 0.0))


FILTERS = {"bicubic": (bicubic, 2.0),  # with the support of each
           "bilinear": (lambda x: np.maximum(1.0 - np.abs(x), 0.0), 1.0)}
FITS = ("crop", "squash", "pad")


@functools.lru_cache(SIZES)
def table(n_in: int, n_out: int, offset: int, resolution: int, filter: str) -> tuple:
    """A pass from n_in pixels to the R positions from offset on, where those outside of n_out are
    a border of zeros: the pixels that it takes, and int32 [2 + taps, R], which are starts among
    those, counts, and weights (0 past them)."""
    position = np.arange(offset, offset + resolution)
    inside = (position >= 0) & (position < n_out)
    position = position.clip(0, n_out - 1)
    if n_in == n_out:  # Pillow leaves the pass out
        start, stop, weights = position, position + 1, np.ones((1, resolution))
    else:
        function, support = FILTERS[filter]
        scale = float(np.float32(n_in)) / n_out  # Pillow's box is of float32
        stretch = max(scale, 1.0)
        center, reach = (position + 0.5) * scale, support * stretch
        start = np.maximum((center - reach + 0.5).astype(np.int64), 0)
        stop = np.minimum((center + reach + 0.5).astype(np.int64), n_in)
        taps = start + np.arange((stop - start).max())[:, None]
        weights = function((taps - center + 0.5) * (1.0 / stretch)) * (taps < stop)
        weights /= np.add.accumulate(weights, axis=0)[-1]  # in the order of Pillow's sum
    weights = weights * inside * (1 << BITS)
    data = start - start[0], (stop - start) * inside, weights + np.copysign(0.5, weights)
    return slice(int(start[0]), int(stop[-1])), np.vstack(data).astype(np.int32)


@functools.lru_cache(SIZES)
def plan(height: int, width: int, resolution: int, filter: str, fit: str, order: str) -> Plan:
    """Both passes for a size of picture.  order: as `pillow_order` gives it."""
    full, before = geometry(height, width, resolution, fit)
    (rows, down), (columns, right) = (
        table(*each, resolution, filter) for each in zip((height, width), full, before))
    vertical = order == "vertical" and height - full[0] > max(0, 2 * (width - full[1]))
    return (rows, columns), (down, right) if vertical else (right, down), vertical


def resample(pixels: Tensor, table: np.ndarray) -> Tensor:
    """One pass along the first axis: uint8 [length of the span, N, C] -> [R, N, C]."""
    starts, _, *weights = torch.from_numpy(table).to(pixels.device)[:, :, None]
    flat, last = pixels.reshape(pixels.shape[0], -1), pixels.shape[0] - 1
    total = flat.new_full((starts.shape[0], flat.shape[1]), 1 << (BITS - 1), dtype=torch.int32)
    for k, weight in enumerate(weights):
        total.addcmul_(flat[(starts[:, 0] + k).clamp(max=last)].int(), weight)
    return (total >> BITS).clamp_(0, 255).to(torch.uint8).unflatten(1, pixels.shape[1:])


def resize(pixels: Tensor, plan: Plan) -> Tensor:
    """Resized and cropped: uint8 [H, W, C] -> [R, R, C]."""
    span, (first, second), vertical = plan
    pixels = pixels[span] if vertical else pixels[span].transpose(0, 1)
    pixels = resample(resample(pixels, first).transpose(0, 1), second)
    return pixels.transpose(0, 1) if vertical else pixels


@functools.cache
def pillow_order() -> str:
    """Which pass the installed Pillow does first where much more of the height goes than of the
    width: "horizontal", as everywhere else, or "vertical".  Raises UserError where it resizes a
    picture in neither order as computed here."""
    pixels = np.random.default_rng(0).integers(0, 256, (500, 240, 3), np.uint8)
    theirs = np.asarray(Image.fromarray(pixels).resize((224, 466), Image.Resampling.BICUBIC))
    for order in ("horizontal", "vertical"):
        ours = resize(torch.from_numpy(pixels), plan(500, 240, 224, "bicubic", "crop", order))
        if np.array_equal(ours, theirs[121:345]):
            return order
    raise UserError(f"Pillow {PIL.__version__} resizes in a way that is not known here; "
                    "install a Pillow from 10.4 to 13.0")


class Preprocess:
    """Resize, crop and normalise a batch: what clip's preprocess gives, `==`, on a device.

    filter: "bicubic" or "bilinear".  fit: "crop" to the centre, "squash" to a square, or "pad"
    with zeros (black) to one.  mean, std: of the three channels, in units of 0 to 1.
    Thread-safe.  Raises UserError for other names."""

    def __init__(self, resolution: int, device, filter: str = "bicubic", fit: str = "crop",
                 mean: Sequence[float] = MEAN, std: Sequence[float] = STD,
                 dtype: torch.dtype = torch.float32):
        for name, value, known in ("filter", filter, FILTERS), ("fit", fit, FITS):
            if value not in known:
                raise UserError(f"unknown {name} {value!r}; choose from {', '.join(known)}")
        self.resolution, self.dtype = resolution, dtype
        self.device = torch.empty(0, device=device).device  # with its index
        self.plan = functools.partial(plan, resolution=resolution, filter=filter, fit=fit,
                                      order=pillow_order())
        # As torchvision's ToTensor and Normalize compute it.
        mean, std = (torch.tensor(three)[:, None] for three in (mean, std))
        self.values = ((torch.arange(256).float() / 255 - mean) / std).to(dtype).to(self.device)
        self.fused = self.device.type == "cuda" and kernels.serves_on(self.device)

    def __call__(self, pictures: Sequence[Optional[Pixels]], out: Optional[Tensor] = None
                 ) -> Tensor:
        """uint8 [H, W, C], C 1 (grey) or 3, of any strides, on the CPU or the device; None leaves
        zeros -> [B, 3, R, R] on the device.  Raises ValueError for another shape, dtype or device,
        or an `out` that is not contiguous.  A GPU works in the order of the current stream (what
        another stream made: `record_stream`); the CPU's may be changed once this returns."""
        shape = len(pictures), 3, self.resolution, self.resolution
        if out is None:
            out = torch.empty(shape, dtype=self.dtype, device=self.device)
        kernels.check("out", out, self.dtype, shape, self.device)
        if not out.is_contiguous():
            raise ValueError("out must be contiguous")
        (self._launch if self.fused and len(pictures) else self._reference)(pictures, out)
        return out

    def _plan(self, i: int, picture: Pixels) -> tuple[Plan, int]:
        """Of the batch's picture i, with its channels, once it is seen to be one."""
        dtype, shape = str(picture.dtype), tuple(picture.shape)
        if dtype not in ("uint8", "torch.uint8") or 0 in shape or shape[2:] not in ((1,), (3,)):
            raise ValueError(f"picture {i} must be uint8 [H, W, 1 or 3] and not empty, "
                             f"not {dtype} {list(shape)}")
        if isinstance(picture, Tensor) and picture.device not in (CPU, self.device):
            raise ValueError(f"picture {i} is on {picture.device}, not {self.device} or the CPU")
        return self.plan(*shape[:2]), shape[2]

    def _reference(self, pictures: Sequence[Optional[Pixels]], out: Tensor) -> None:
        out.zero_()
        for i, picture in enumerate(pictures):
            if picture is not None:
                plan, channels = self._plan(i, picture)
                pixels = picture if isinstance(picture, Tensor) else torch.as_tensor(picture.copy())
                square = resize(pixels.to(self.device), plan).permute(2, 0, 1)
                levels = square.reshape(channels, -1).long().expand(3, -1)
                out[i] = self.values.gather(1, levels).view_as(out[i])

    def _launch(self, pictures: Sequence[Optional[Pixels]], out: Tensor) -> None:
        """Through the kernels, with descriptors, tables and the CPU's pixels in one copy."""
        rows, parts, tables, of_cpu = [NOTHING] * len(pictures), [], {}, []
        end, between, most_lines = 8 * len(NOTHING) * len(pictures), 0, 0

        def place(part: np.ndarray) -> int:  # where it begins in what is copied
            nonlocal end
            start, end = end, (end + part.nbytes + 15) & ~15
            parts.append((start, part))
            return start

        for i, picture in enumerate(pictures):
            if picture is None:
                continue
            (span, (first, second), vertical), channels = self._plan(i, picture)
            for table in (first, second):
                if id(table) not in tables:
                    tables[id(table)] = place(table) // table.itemsize
            if isinstance(picture, Tensor) and picture.is_cuda:
                down, right, channel = picture.stride()
                start = picture.data_ptr() + span[0].start * down + span[1].start * right
            else:
                window = np.asarray(picture)[span]
                planar = window.strides[2] > window.strides[1]  # and copied as such
                down, right, channel = (window.shape[1], 1, window[:, :, 0].size) if planar else (
                    window[0].size, channels, 1)
                start = place(window.transpose(2, 0, 1) if planar else window)
                of_cpu.append(i)
            along, across = (down, right) if vertical else (right, down)
            lines = span[vertical].stop - span[vertical].start  # that the second pass takes
            rows[i] = (start, along, across, channel, tables[id(first)], tables[id(second)],
                       between, lines, channels, vertical)  # kernels.PICTURE
            between += channels * lines * -(-self.resolution // 4) * 4
            most_lines = max(most_lines, lines)
        if end + between > MOST_BYTES and len(rows) > 1:
            for half in (slice(len(rows) // 2), slice(len(rows) // 2, None)):
                self._launch(pictures[half], out[half])
            return
        # Both allocators give memory again only to what comes after this on the stream.
        buffer = torch.empty(end + between, dtype=torch.uint8, device=self.device)
        staging = torch.empty(end, dtype=torch.uint8, pin_memory=True)
        address, host, descriptors = buffer.data_ptr(), staging.numpy(), np.array(rows, np.int64)
        descriptors[of_cpu, 0] += address
        for start, part in ((0, descriptors), *parts):
            np.ndarray(part.shape, part.dtype, host, start)[:] = part
        buffer[:end].copy_(staging, non_blocking=True)
        kernels.launch("preprocess", self.device, pictures=buffer, tables=address,
                       values=self.values, workspace=address + end, out=out.data_ptr(),
                       batch=len(rows), most_lines=most_lines, resolution=self.resolution,
                       value_bytes=self.values.element_size())


@torch.library.custom_op("clip_ttrt::preprocess", mutates_args=())
def preprocess(pictures: Sequence[Tensor], resolution: int, *, filter: str = "bicubic",
               fit: str = "crop", mean: Optional[Sequence[float]] = None,
               std: Optional[Sequence[float]] = None, dtype: torch.dtype = torch.float32) -> Tensor:
    """`Preprocess` as an op, on the device of the first of at least one picture."""
    return cached(resolution, pictures[0].device, filter, fit, tuple(mean or MEAN),
                  tuple(std or STD), dtype)(pictures)


@preprocess.register_fake
def _(pictures, resolution, *, dtype=torch.float32, **others):
    return pictures[0].new_empty((len(pictures), 3, resolution, resolution), dtype=dtype)


cached = functools.lru_cache(16)(Preprocess)
