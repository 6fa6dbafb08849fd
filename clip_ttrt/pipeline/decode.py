"""Files to pixels.  The bytes of a file alone decide which of three decoders takes it:

    gpu      baseline JPEGs: the GPU's JPEG engines, through nvImageCodec, a level from Pillow
    cpu      other grey and YCbCr JPEGs: torchvision's libjpeg in threads, equal to Pillow
    pillow   everything else: Pillow and the original transform, in threads

What one refuses the next one tries, and what Pillow refuses is Bad.
"""
import contextlib
import io
import os
import re
import struct
import threading
import warnings
import zlib
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import chain
from typing import Callable, Iterator, NamedTuple, Optional, Union

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.io import ImageReadMode  # which registers the op that decodes as well

from clip_ttrt.errors import UserError
from clip_ttrt.pipeline.hardware import Hardware

MODES = ("auto", "exact", "gpu", "cpu", "pillow")
MAX_PIXELS = 178_956_970  # Pillow's limit: beyond it a file may be a bomb
LARGE = 1 << 24  # pixels: beyond them Pillow resizes a picture, so that a batch fits memory
LARGE_OTHER = 1 << 20  # the same of other files, of which only Pillow knows the size
MOST_BYTES = 1 << 28  # of pixels that are decoded at once
SAMPLED = 1000  # of so many pictures from the GPU's engines one is decoded on the CPU as well
AS_IT_IS = ImageReadMode.UNCHANGED.value

warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)  # not yet an error
warnings.filterwarnings("ignore", "The given buffer is not writable")  # it is only read


class Bad(Exception):
    """A picture that Pillow refuses; str() is the reason, one line."""

    @classmethod
    def because(cls, problem: Exception) -> "Bad":
        """Without addresses of memory, so that the same file has the same reason in every run."""
        text = re.sub(r" ?<[^<>]* at 0x[0-9a-fA-F]+>", "", " ".join(str(problem).split()))
        return cls(f"{type(problem).__name__}: {text}")


@dataclass(frozen=True)
class Picture:
    """A decoded picture, of its full size or already [R, R, 3]."""

    pixels: Union[Tensor, np.ndarray]  # uint8 [H, W, C], C 1 (grey) or 3 (RGB), on the CPU or GPU
    route: str  # gpu, cpu or pillow: what decoded it
    width: int  # of the file, in pixels
    height: int
    exact: Optional[Tensor] = None  # of one in SAMPLED from the GPU's engines: the CPU's pixels


class Header(NamedTuple):
    """What the header of a file tells; sizes are 0 where the route is pillow."""

    route: str
    height: int = 0
    width: int = 0
    channels: int = 0


# A JPEG's markers: tables and comments between SOI and the frame, and the frames of libjpeg.
SEGMENTS = frozenset((0xC4, 0xDB, 0xDD, 0xFE, *range(0xE0, 0xF0)))
BASELINE, FRAMES, SCAN, ADOBE = 0xC0, frozenset((0xC0, 0xC1, 0xC2)), 0xDA, 0xEE
# What the engines take (nvjpeg.h: baseline, a single scan, not 4:1:0 nor 4:1:1): each component's
# horizontal and vertical sampling as hex digits, of grey, 4:4:4, 4:2:2 and 4:2:0.
SAMPLINGS = frozenset(((0x11,), (0x11, 0x11, 0x11), (0x21, 0x11, 0x11), (0x22, 0x11, 0x11)))
SIDES = range(16, 16385)  # pixels: NVIDIA gives no limits; what the engines refuse the CPU gets
_segment, _frame = struct.Struct(">BBH").unpack_from, struct.Struct(">BHHB").unpack_from
_other = Header("pillow")


def scan(data: bytes) -> Header:
    """The header of a file, whatever its name.  Raises Bad for a JPEG over the pixel limit."""
    if data[:3] != b"\xff\xd8\xff":
        return _other
    at, kind, rgb = 2, 0, False
    try:
        while True:
            start, marker, length = _segment(data, at)
            if start != 0xFF:
                return _other
            if marker in SEGMENTS:
                if marker == ADOBE and data[at + 4:at + 9] == b"Adobe":
                    rgb = data[at + 15] != 1  # the transform: YCbCr is 1
            elif marker in FRAMES and not kind:
                kind, (bits, height, width, channels) = marker, _frame(data, at + 4)
                if width * height > MAX_PIXELS:
                    raise Bad(f"DecompressionBombError: Image size ({width * height} pixels) "
                              f"exceeds limit of {MAX_PIXELS} pixels, could be decompression "
                              "bomb DOS attack.")
                components = data[at + 10:at + 10 + 3 * channels]
            elif marker == SCAN and kind:
                break
            else:
                return _other
            at += 2 + length
        ids, samplings, scanned = components[::3], tuple(components[1::3]), data[at + 4]
    except (struct.error, IndexError):  # the file ends before its pixels begin
        return _other
    colour = channels == 3 and ids != b"RGB" and not rgb
    if bits != 8 or not (colour or channels == 1) or not 0 < width * height <= LARGE:
        return _other
    easy = (kind == BASELINE and scanned == channels and samplings in SAMPLINGS
            and (channels == 1 or ids == b"\1\2\3") and width in SIDES and height in SIDES
            and data.rfind(b"\xff\xd9", -1024) > 0)
    return Header("gpu" if easy else "cpu", height, width, channels)


def route_of(data: bytes) -> str:
    """gpu, cpu or pillow: the decoder for a file's bytes.  Raises Bad over the pixel limit."""
    return scan(data).route


def original_transform(resolution: int) -> Callable[[Image.Image], Image.Image]:
    """OpenAI's preprocess up to the tensor: a picture, resized in its own mode -> RGB, R x R."""
    from torchvision.transforms import Compose

    from clip_ttrt import deprecations

    return Compose(deprecations.clip()._transform(resolution).transforms[:-2])


def decode_jpeg(data: bytes) -> Tensor:
    """torchvision's libjpeg: uint8 [H, W, C].  Raises RuntimeError for what it refuses.

    The op itself: `torchvision.io.decode_jpeg` around it holds the GIL for twice as long.
    """
    encoded = torch.frombuffer(data, dtype=torch.uint8)
    return torch.ops.image.decode_jpeg(encoded, AS_IT_IS, False).permute(1, 2, 0)


class Decoder:
    """Batches of files to pixels, by any number of threads at once.

    mode: auto (the GPU's engines where they are, then the CPU), exact and cpu (equal to Pillow's
    pixels), gpu (the engines must be there), pillow (Pillow resizes too).  resolution: R, in
    pixels.  device: where the engines are.  threads: of the CPU, all cores by default.
    transform: what Pillow's pictures go through, PIL image -> RGB image [R, R].
    Raises UserError for an unknown mode, and in mode gpu where something is missing.
    """

    def __init__(self, mode: str, resolution: int, device: Union[str, torch.device] = "cpu",
                 threads: Optional[int] = None,
                 transform: Optional[Callable[[Image.Image], Image.Image]] = None):
        if mode not in MODES:
            raise UserError(f"unknown decode mode {mode!r}; choose one of {', '.join(MODES)}")
        self.mode, self.transform = mode, transform or original_transform(resolution)
        self.threads = threads or len(os.sched_getaffinity(0))
        self._pool = ThreadPoolExecutor(self.threads, "decode")
        self._counts, self._lock, self._largest = Counter(), threading.Lock(), None
        self._hardware: Optional[Hardware] = None
        self._problem: Optional[str] = None
        if mode in ("auto", "gpu"):
            try:
                self._hardware = Hardware.find(torch.device(device), min(self.threads, 8))
            except UserError as missing:
                if mode == "gpu":
                    raise
                self._problem = str(missing)

    def decode(self, items: list) -> list[Union[Picture, Bad]]:
        """Pictures in the order of the items: bytes of files, arrays uint8 [H, W, C] or [H, W],
        PIL images.  What is no picture is Bad at its place; nothing of an item raises.

        Pixels on the GPU are complete.  They lie in memory that is used again after the last
        tensor on it is dropped: by a thread whose current stream is the one that reads them.
        """
        return list(chain.from_iterable(self.parts(items)))

    def parts(self, items: list) -> Iterator[list[Union[Picture, Bad]]]:
        """The same in parts, one after the other, each of about MOST_BYTES of pixels at most."""
        part, size = [], 0
        for item in items:
            try:
                header = scan(item) if isinstance(item, bytes) else _other
                pixels = header.height * header.width * header.channels or 3 * LARGE_OTHER
            except Bad as bad:
                header, pixels = bad, 0
            if part and size + pixels > MOST_BYTES:
                yield self._decode(part)
                part, size = [], 0
            part.append((item, header))
            size += pixels
        if part:
            yield self._decode(part)

    def _decode(self, part: list) -> list[Union[Picture, Bad]]:
        results: list = [header if isinstance(header, Bad) else None for _, header in part]
        rest, easy = [], []
        for index, (item, header) in enumerate(part):
            if results[index] is None:
                on_gpu = header.route == "gpu" and self._hardware is not None
                (easy if on_gpu else rest).append((index, item, header))
        waiting = self._start(rest, results)
        again, exact = self._on_gpu(easy, results), {}
        for each in (*waiting, *self._start(again, exact)):
            each.result()
        for index, picture in exact.items():
            results[index] = self._compared(results[index], picture)
        with self._lock:
            self._counts.update(getattr(each, "route", "bad") for each in results)
        return results

    def report(self) -> dict:
        """Pictures by route and bad ones; fallbacks: refused or skipped by the engines, of them
        silent_skips; redecoded on the CPU, and the largest distance of those, in levels; what
        keeps the engines from working, or None."""
        with self._lock:
            names = ("gpu", "cpu", "pillow", "bad", "fallbacks", "silent_skips", "redecoded")
            return {**{name: self._counts[name] for name in names},
                    "largest_distance": self._largest, "problem": self._problem}

    def _start(self, work: list, results) -> list:
        """Let the threads decode (index, item, header) into results[index]."""
        left = iter(work)  # shared: a thread that is done takes the next one

        def drain():
            for index, item, header in left:
                results[index] = self._on_cpu(item, header)
        return [self._pool.submit(drain) for _ in range(min(self.threads, len(work)))]

    def _on_gpu(self, work: list, results: list) -> list:
        """Decode with the engines; returns those for the CPU: the others, and one in SAMPLED."""
        if not work:
            return []
        try:
            pixels, skipped = self._hardware([item for _, item, _ in work],
                                             [header[1:] for _, _, header in work])
        except (RuntimeError, ValueError) as problem:  # out of memory, say: the CPU decodes all
            pixels, skipped, self._problem = [None] * len(work), 0, str(problem)
        for (index, _, header), each in zip(work, pixels):
            if each is not None:
                results[index] = Picture(each, "gpu", header.width, header.height)
        with self._lock:
            self._counts.update(fallbacks=sum(each is None for each in pixels),
                                silent_skips=skipped)
        return [each for each, decoded in zip(work, pixels)
                if decoded is None or zlib.crc32(each[1][-256:]) % SAMPLED == 0]

    def _compared(self, picture: Optional[Picture], exact: Union[Picture, Bad]):
        """A picture of the engines with the CPU's pixels beside it, or the CPU's result."""
        if picture is None or isinstance(exact, Bad):
            return exact
        gap = (picture.pixels.cpu().int() - exact.pixels.int()).abs().max().item()
        with self._lock:
            self._counts["redecoded"] += 1
            self._largest = max(gap, self._largest or 0)
        return replace(picture, exact=exact.pixels)

    def _on_cpu(self, item, header: Header) -> Union[Picture, Bad]:
        try:
            if isinstance(item, np.ndarray):
                return self._array(item)
            if self.mode != "pillow" and header.route != "pillow":
                with contextlib.suppress(RuntimeError, AttributeError):  # refused, or no such op
                    return Picture(decode_jpeg(item), "cpu", header.width, header.height)
            return self._pillow(item)
        except Exception as problem:
            return Bad.because(problem)

    @staticmethod
    def _array(array: np.ndarray) -> Picture:
        pixels = array[..., None] if array.ndim == 2 else array
        if (pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] not in (1, 3)
                or not pixels.size):
            raise ValueError(f"an array of {array.dtype} {list(array.shape)}; give uint8 "
                             "[H, W, 3], [H, W, 1] or [H, W]")
        return Picture(pixels, "cpu", pixels.shape[1], pixels.shape[0])

    def _pillow(self, item: Union[bytes, Image.Image]) -> Picture:
        picture = item if isinstance(item, Image.Image) else Image.open(io.BytesIO(item))
        width, height = picture.size
        whole = picture.mode in ("L", "RGB") and width * height <= LARGE_OTHER
        if self.mode == "pillow" or not whole:
            picture = self.transform(picture)
        pixels = torch.from_numpy(np.array(picture))
        return Picture(pixels if pixels.ndim == 3 else pixels[..., None], "pillow", width, height)
