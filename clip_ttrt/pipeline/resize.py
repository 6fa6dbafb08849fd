"""OpenAI's preprocess for batches of pictures of any sizes, bit for bit the installed Pillow's.

Pillow resizes uint8 in two passes, each along one axis, with a byte between them.  A pass follows
a table of integers, which the CPU makes in double precision as Pillow does.  On a GPU the kernel
of `kernels/preprocess` applies them, elsewhere the reference here; both are exact.
"""
import ctypes
import functools
from dataclasses import dataclass
from typing import Optional, Sequence, Union

import numpy as np
import torch
from torch import Tensor

from clip_ttrt import kernels
from clip_ttrt.errors import UserError

MEAN = (0.48145466, 0.4578275, 0.40821073)  # CLIP's
STD = (0.26862954, 0.26130258, 0.27577711)
BITS = 22  # of a weight
MOST_BYTES = 1 << 28  # of pixels and workspace in one launch; larger batches take several
SIZES = 1024  # whose tables are kept: 16 KB each where pictures are shrunk to a half or so
CPU = torch.device("cpu")
NOTHING = (0,) * len(kernels.PICTURE._fields_)  # the descriptor of no picture
Pixels = Union[Tensor, np.ndarray]


def bicubic(x: np.ndarray) -> np.ndarray:
    x, a = np.abs(x), -0.5
    near = ((a + 2.0) * x - (a + 3.0)) * x * x + 1
    return np.where(x < 1.0, near, np.where(x < 2.0, (((x - 5) * x + 8) * x - 4) * a, 0.0))


FILTERS = {"bicubic": (bicubic, 2.0),  # with the support of each
           "bilinear": (lambda x: np.maximum(1.0 - np.abs(x), 0.0), 1.0)}
FITS = ("crop", "squash", "pad")


@dataclass(frozen=True, eq=False)
class Table:
    """One pass for R positions, which takes the pixels of `span` alone."""

    span: slice
    data: np.ndarray  # int32 [2 + taps, R]: starts in the span; counts; weights, 0 past them


@functools.lru_cache(SIZES)
def table(n_in: int, n_out: int, offset: int, resolution: int, filter: str) -> Table:
    """Of n_in pixels resized to n_out, the positions offset .. offset + resolution - 1, of which
    those outside of the n_out are a border of zeros."""
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
    data = np.empty((2 + len(weights), resolution), np.int32)
    data[0], data[1] = start - start[0], (stop - start) * inside
    data[2:] = weights + np.copysign(0.5, weights)
    return Table(slice(int(start[0]), int(stop[-1])), data)


@dataclass(frozen=True, eq=False)
class Plan:
    """Both passes for a size of picture, and the part of it that they take."""

    rows: slice
    columns: slice
    vertical: bool  # the first pass goes along columns
    first: Table
    second: Table


def fitted(height: int, width: int, resolution: int, fit: str) -> tuple[int, int]:
    """Height and width that a picture is resized to: torchvision's, for "pad" open_clip's."""
    if fit == "squash":
        return resolution, resolution
    if fit == "pad":
        ratio = max(height, width) / resolution
        return max(1, round(height / ratio)), max(1, round(width / ratio))
    longer = int(resolution * max(height, width) / min(height, width))
    return (longer, resolution) if width <= height else (resolution, longer)


@functools.lru_cache(SIZES)
def plan(height: int, width: int, resolution: int, filter: str, fit: str, order: str) -> Plan:
    """order: as `pillow_order` gives it."""
    tables, saved = [], []
    for n_in, n_out in zip((height, width), fitted(height, width, resolution, fit)):
        # As torchvision's center_crop rounds, and open_clip's borders.
        spare = n_out - resolution
        offset = round(spare / 2.0) if spare >= 0 else -(-spare // 2)
        tables.append(table(n_in, n_out, offset, resolution, filter))
        saved.append(n_in - n_out)
    vertical = order == "vertical" and saved[0] > max(0, 2 * saved[1])
    return Plan(tables[0].span, tables[1].span, vertical, *(tables if vertical else tables[::-1]))


def resample(pixels: Tensor, table: Table) -> Tensor:
    """One pass along the first axis: uint8 [length of the span, N, C] -> [R, N, C]."""
    starts, _, *weights = torch.from_numpy(table.data).to(pixels.device)[:, :, None]
    flat, last = pixels.reshape(pixels.shape[0], -1), pixels.shape[0] - 1
    total = flat.new_full((starts.shape[0], flat.shape[1]), 1 << (BITS - 1), dtype=torch.int32)
    for k, weight in enumerate(weights):
        total.addcmul_(flat[(starts[:, 0] + k).clamp(max=last)].int(), weight)
    total = (total >> BITS).clamp_(0, 255)
    return total.to(torch.uint8).unflatten(1, pixels.shape[1:])


def resize(pixels: Tensor, plan: Plan) -> Tensor:
    """Resized and cropped: uint8 [H, W, C] -> [R, R, C]."""
    pixels = pixels[plan.rows, plan.columns]
    if plan.vertical:
        return resample(resample(pixels, plan.first).transpose(0, 1), plan.second).transpose(0, 1)
    return resample(resample(pixels.transpose(0, 1), plan.first).transpose(0, 1), plan.second)


@functools.cache
def pillow_order() -> str:
    """Which pass the installed Pillow does first where much more of the height goes than of the
    width: "horizontal" or "vertical".  All else is horizontal first, in every Pillow.

    Raises UserError where it resizes a picture in neither order as computed here.
    """
    import PIL
    from PIL import Image

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
    Thread-safe.  Raises UserError for other names.
    """

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
        values = (torch.arange(256).float() / 255).expand(3, 256).clone()
        values.sub_(torch.tensor(mean)[:, None]).div_(torch.tensor(std)[:, None])
        self.values = values.to(dtype).to(self.device)  # [3, 256]
        self.fused = self.device.type == "cuda" and kernels.serves_on(self.device)

    def __call__(self, pictures: Sequence[Optional[Pixels]], out: Optional[Tensor] = None
                 ) -> Tensor:
        """Pictures, each uint8 [H, W, C] with C = 1 (grey) or 3 -> [B, 3, R, R] on the device.

        They have any strides (a planar one is `.permute(1, 2, 0)`), and lie in the CPU's memory or
        the device's.  None leaves zeros.  On a GPU all happens in the order of the current stream
        (a tensor that another stream's work made: `record_stream`, as for any op), and pictures of
        the CPU may be changed once this returns.  out: where to, contiguous.
        Raises ValueError for another shape, dtype or device.
        """
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
        for i, (picture, row) in enumerate(zip(pictures, out)):
            if picture is None:
                row.zero_()
                continue
            plan, channels = self._plan(i, picture)
            if not isinstance(picture, Tensor):
                picture = torch.from_numpy(np.array(picture))
            planes = resize(picture.to(self.device), plan).permute(2, 0, 1).reshape(channels, -1)
            row.copy_(self.values.gather(1, planes.long().expand(3, -1)).view_as(row))

    def _launch(self, pictures: Sequence[Optional[Pixels]], out: Tensor) -> None:
        """Through the kernels, with descriptors, tables and the CPU's pixels in one copy."""
        rows, windows, tables = [], [], {}  # a table -> where it begins, in int32s
        most_lines = table_end = pixel_end = between = 0
        for i, picture in enumerate(pictures):
            if picture is None:
                rows.append(NOTHING)
                continue
            plan, channels = self._plan(i, picture)
            for one in (plan.first, plan.second):
                if one not in tables:
                    tables[one] = table_end
                    table_end += one.data.size
            if isinstance(picture, Tensor) and picture.is_cuda:
                down, right, channel = picture.stride()
                start = picture.data_ptr() + plan.rows.start * down + plan.columns.start * right
            else:
                window = np.asarray(picture)[plan.rows, plan.columns]
                if window.strides[2] > window.strides[1]:  # planar, and copied as such
                    down, right, channel = window.shape[1], 1, window[:, :, 0].size
                    window = window.transpose(2, 0, 1)
                else:
                    down, right, channel = window[0].size, channels, 1
                windows.append((i, pixel_end, window))
                start, pixel_end = pixel_end, pixel_end + window.size
            along, across = (down, right) if plan.vertical else (right, down)
            lines = plan.second.span.stop - plan.second.span.start
            rows.append((start, along, across, channel, tables[plan.first], tables[plan.second],
                         between, lines, channels, plan.vertical))  # kernels.PICTURE
            between += channels * lines * -(-self.resolution // 4) * 4
            most_lines = max(most_lines, lines)
        if pixel_end + between > MOST_BYTES and len(rows) > 1:
            for half in (slice(len(rows) // 2), slice(len(rows) // 2, None)):
                self._launch(pictures[half], out[half])
            return
        tables_at = len(rows) * ctypes.sizeof(kernels.PICTURE)
        pixels_at = (tables_at + 4 * table_end + 15) & ~15
        copied = pixels_at + pixel_end
        workspace_at = (copied + 15) & ~15
        # Both allocators give memory again only to what comes after this on the stream.
        buffer = torch.empty(workspace_at + between, dtype=torch.uint8, device=self.device)
        staging = torch.empty(copied, dtype=torch.uint8, pin_memory=True)
        address, host = buffer.data_ptr(), staging.numpy()
        descriptors = host[:tables_at].view(np.int64).reshape(-1, len(NOTHING))
        descriptors[:] = rows
        if tables:
            blob = np.concatenate([one.data.ravel() for one in tables])
            host[tables_at : tables_at + 4 * table_end] = blob.view(np.uint8)
        for i, start, window in windows:
            descriptors[i, 0] += address + pixels_at
            start += pixels_at
            host[start : start + window.size].reshape(window.shape)[:] = window
        buffer[:copied].copy_(staging, non_blocking=True)
        kernels.launch("preprocess", self.device, pictures=buffer, tables=address + tables_at,
                       values=self.values, workspace=address + workspace_at, out=out.data_ptr(),
                       batch=len(rows), most_lines=most_lines, resolution=self.resolution,
                       value_bytes=self.values.element_size())


@torch.library.custom_op("clip_ttrt::preprocess", mutates_args=())
def preprocess(pictures: Sequence[Tensor], resolution: int, filter: str = "bicubic",
               fit: str = "crop", mean: Optional[Sequence[float]] = None,
               std: Optional[Sequence[float]] = None, dtype: torch.dtype = torch.float32) -> Tensor:
    """`Preprocess` as an op, on the device of the first of at least one picture."""
    device, mean, std = pictures[0].device, tuple(mean or MEAN), tuple(std or STD)
    return cached(resolution, device, filter, fit, mean, std, dtype)(pictures)


@preprocess.register_fake
def _(pictures, resolution, filter="bicubic", fit="crop", mean=None, std=None, dtype=torch.float32):
    return pictures[0].new_empty((len(pictures), 3, resolution, resolution), dtype=dtype)


cached = functools.lru_cache(16)(Preprocess)
