"""Files to pixels.  The bytes of a file alone decide which of three decoders takes it:

    gpu      baseline JPEGs: the GPU's JPEG engines, through nvImageCodec, a level from Pillow
    cpu      other grey and YCbCr JPEGs: torchvision's libjpeg in threads, equal to Pillow
    pillow   everything else: Pillow, in threads, which resizes the largest

What one refuses the next one tries, and what Pillow refuses is Bad."""
import contextlib
import functools
import io
import os
import re
import threading
import warnings
from collections import Counter
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import chain, pairwise
from typing import Callable, Iterator, NamedTuple, Optional, Union

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from clip_ttrt import kernels, transform
from clip_ttrt.errors import UserError
from clip_ttrt.options import DECODE

FILE = np.dtype(kernels.JPEG_FILE)  # kernels/jpeg/jpeg.h says what its fields are
GPU, CPU, PILLOW = range(3)  # routes, as kernels/jpeg/jpeg.h has them
LARGE = 1 << 24  # pixels: beyond them Pillow resizes a picture, so that a batch fits memory
LARGE_OTHER = 1 << 20  # the same of other files, of which only Pillow knows the size
MOST_BYTES = 1 << 28  # of pixels that are decoded at once
SAMPLED = 1000  # of so many pictures from the GPU's engines one is decoded on the CPU as well
COUNTS = ("gpu", "cpu", "pillow", "bad", "fallbacks", "silent_skips", "redecoded")
CHUNK = 8  # JPEGs that a thread decodes without asking for the GIL
PATTERN = b"\xa7\x01\xfe\x5c\x13\xe9\x42\xb8\x6d\x94\x07\xdb\x31\xc6\x7a\x8f"
GAP, STEP = 256, 32 << 20  # bytes: least distance of pictures on a GPU, steps of a memory's size

warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)  # not yet an error
warnings.filterwarnings("ignore", "The given buffer is not writable")  # it is only read


class Bad(Exception):
    """A picture that Pillow refuses; str() is the reason, one line, the same in every run."""

    route, pixels, width, height, exact = "bad", None, 0, 0, None  # as of a Picture

    def __init__(self, problem: Exception):
        text = re.sub(r" ?<[^<>]* at 0x[0-9a-fA-F]+>", "", " ".join(str(problem).split()))
        self.error = f"{type(problem).__name__}: {text}"
        super().__init__(self.error)


class Picture(NamedTuple):
    """A decoded picture, of its full size or already [R, R, 3]."""

    pixels: Union[Tensor, np.ndarray]  # uint8 [H, W, C], C 1 (grey) or 3 (RGB), on the CPU or GPU
    route: str  # gpu, cpu or pillow: what decoded it
    width: int  # of the file, in pixels
    height: int
    exact: Optional[Tensor] = None  # of one in SAMPLED from the GPU's engines: the CPU's pixels
    error = None  # as a Bad one has


def scan(items: list) -> np.ndarray:
    """[n] of FILE: routes, and what the headers of JPEGs tell; what is no file goes to Pillow."""
    data = [item if isinstance(item, (bytes, bytearray, memoryview)) else b"" for item in items]
    files = np.zeros(len(data), FILE)
    if not kernels.available():  # then there are no engines either
        files[["route", "height", "width", "channels"]] = list(map(header, data))
        return files
    files["data"] = [np.frombuffer(each, np.uint8).ctypes.data if each else 0 for each in data]
    files["size"] = list(map(len, data))
    kernels.library().clip_jpeg_scan(files.ctypes, len(files), LARGE)
    return files


def header(data: bytes) -> tuple[int, int, int, int]:
    """A file's route, cpu or pillow, and of a JPEG for the CPU its height, width and channels."""
    with contextlib.suppress(Exception):
        opened = Image.open(io.BytesIO(data), formats=["JPEG"])
        names, adobe = bytes(each[0] for each in opened.layer), opened.info.get("adobe_transform")
        ycbcr = opened.mode == "RGB" and names != b"RGB" and adobe in (None, 1)
        ycbcr = ycbcr and opened.layer[0][1] >= opened.layer[0][2]  # as kernels/jpeg has it
        if (ycbcr or opened.mode == "L") and opened.width * opened.height <= LARGE:
            return CPU, opened.height, opened.width, len(names)
    return PILLOW, 0, 0, 0


@functools.cache
def libjpeg() -> Callable[[list[Tensor]], list[Tensor]]:
    """torchvision's for a list, in TorchScript: it asks for the GIL once, not for each file."""
    kernels.load_jpeg_op()
    return torch.jit.CompilationUnit("""
def decode(files: List[Tensor]) -> List[Tensor]:
    return [torch.ops.image.decode_jpeg(each, 0, False).permute(1, 2, 0) for each in files]
""").decode


def decode_jpegs(files: list) -> list[Optional[Tensor]]:
    """uint8 [H, W, C] of each on the CPU, equal to Pillow's; None for what libjpeg refuses."""
    try:
        return libjpeg()([torch.frombuffer(each, dtype=torch.uint8) for each in files])
    except (RuntimeError, OSError):  # of one of them, or there is no such op
        return [None] if len(files) == 1 else [decode_jpegs([each])[0] for each in files]


class Hardware:
    """The GPU's JPEG engines through nvImageCodec, for any number of threads at once, guarded
    against what is known of them: memory written before it has been read, writes that wait for no
    stream, pictures skipped in silence, where a pattern at the end of the memory stays."""

    def __init__(self, device: torch.device, threads: int):
        self.device, self.threads, self.lock = device, threads, threading.Lock()
        self.idle: list = []  # decoders and their streams, each for one caller at a time
        self.pattern = torch.tensor(list(PATTERN), dtype=torch.uint8, device=device)

    @classmethod
    def find(cls, device: torch.device, threads: int) -> "Hardware":
        """Raises UserError or RuntimeError that says why there are none."""
        if device.type != "cuda":
            raise UserError(f"the device is {device}; use cuda")
        hardware = cls(torch.empty(0, device=device).device, threads)
        trial = (kernels.PACKAGE / "pictures/coffee.jpg").read_bytes()  # `scan` has pointers to it
        if hardware(scan([trial]))[0][0] is None:
            raise UserError("no JPEG engines; use an A100, H100 or newer with libnvcuvid.so.1 "
                            "(in a container: video in NVIDIA_DRIVER_CAPABILITIES)")
        return hardware

    def create(self) -> tuple[Callable, Optional[torch.cuda.Stream]]:
        stream = torch.cuda.Stream(self.device) if self.device.type == "cuda" else None
        return kernels.JpegDecoder(self.device.index, self.threads), stream

    def __call__(self, files: np.ndarray) -> tuple[list[Optional[Tensor]], int]:
        """[n] of FILE, scanned -> pixels uint8 [H, W, C] on the device, complete, None for what
        was refused or skipped, for the current stream to read; the number skipped."""
        shapes = files[["height", "width", "channels"]].tolist()
        sizes = files["height"] * files["width"] * files["channels"]
        steps = (sizes // GAP + 2) * GAP
        starts = steps.cumsum() - steps + GAP
        with self.lock:
            decoder, stream = self.idle.pop() if self.idle else self.create()
        try:
            with torch.cuda.stream(stream):  # None: no stream
                memory = self.pattern.new_empty(-(-(GAP + int(steps.sum())) // STEP) * STEP)
                tails = torch.from_numpy(starts + sizes).to(self.device)[:, None]
                tails = tails + torch.arange(-len(PATTERN), 0, device=self.device)
                memory[tails] = self.pattern.expand_as(tails)
                files["pixels"] = starts + memory.data_ptr()
                decoder(files, stream and stream.cuda_stream)  # waits for the stream
                skipped = (memory[tails] == self.pattern).all(1).cpu().numpy()
        finally:
            self.idle.append((decoder, stream))
        if stream is not None:  # the memory is used again when what reads it now is done
            memory.record_stream(torch.cuda.current_stream(self.device))
        written = files["written"] == 1
        pixels = [memory.as_strided((h, w, c), (w * c, c, 1), start) if good else None
                  for good, (h, w, c), start in zip(written & ~skipped, shapes, starts.tolist())]
        return pixels, int((written & skipped).sum())


class Decoder:
    """Batches of files to pixels, by any number of threads at once.

    mode: auto (the GPU's engines where they are, then the CPU), exact and cpu (equal to Pillow's
    pixels), gpu (the engines must be there), pillow (Pillow resizes too).  fitted: makes a PIL
    image RGB, R x R, or is R, of clip's.  device: where the engines are.
    threads: of the CPU, all cores by default.
    Raises UserError for an unknown mode, and in mode gpu where something is missing."""

    def __init__(self, mode: str, fitted: Union[int, Callable],
                 device: Union[str, torch.device] = "cpu", threads: Optional[int] = None):
        if mode not in DECODE:
            raise UserError(f"unknown decode mode {mode!r}; choose one of {', '.join(DECODE)}")
        self.fitted = (fitted if callable(fitted) else
                       functools.partial(transform.fitted, resolution=fitted))
        self.mode, self.threads = mode, threads or len(os.sched_getaffinity(0))
        self._pool = ThreadPoolExecutor(self.threads, "decode")
        self._lock, self._counts, self._gaps = threading.Lock(), Counter(), set()
        self._hardware, self._problem = None, None
        if mode in ("auto", "gpu"):
            try:
                self._hardware = Hardware.find(torch.device(device), min(self.threads, 8))
            except (UserError, RuntimeError, AssertionError) as problem:
                self._problem = f"the GPU cannot decode: {problem}"
                if mode == "gpu":
                    raise UserError(self._problem) from None

    def decode(self, items: list) -> list[Union[Picture, Bad]]:
        """Pictures in the order of the items: the bytes of files, arrays uint8 [H, W, C] or [H, W],
        PIL images.  What is no picture is Bad at its place; nothing of an item raises.  Pixels on
        the GPU are complete; `record_stream` where another stream than the current reads them."""
        return list(chain.from_iterable(self.parts(items)))

    def parts(self, items: list) -> Iterator[list[Union[Picture, Bad]]]:
        """The same in parts, one after the other, each of about MOST_BYTES of pixels at most."""
        files = scan(items)
        sizes = files["height"] * files["width"] * files["channels"]
        sizes[sizes == 0] = 3 * LARGE_OTHER
        cuts = np.flatnonzero(np.diff(sizes.cumsum() // MOST_BYTES)) + 1
        for begin, end in pairwise([0, *cuts.tolist(), len(items)]):
            yield self._decode(items[begin:end], files[begin:end])

    def report(self) -> dict:
        """Since the last call: pictures by route, bad ones; fallbacks (refused or skipped by the
        engines), of them silent_skips; redecoded, their largest distance in levels; a problem."""
        with self._lock:
            (counts, gaps), self._counts, self._gaps = (self._counts, self._gaps), Counter(), set()
        return {**dict.fromkeys(COUNTS, 0), **counts,
                "largest_distance": max(gaps, default=None), "problem": self._problem}

    def _decode(self, items: list, files: np.ndarray) -> list[Union[Picture, Bad]]:
        easy = (files["route"] == GPU) & (self._hardware is not None)
        results, waiting = [None] * len(items), self._start(items, files, ~easy)
        try:
            pixels, skipped = self._hardware(files[easy]) if easy.any() else ([], 0)
        except RuntimeError as problem:  # out of memory, say: the CPU decodes all
            pixels, skipped, self._problem = [], 0, str(problem)
        for index, each in zip(np.flatnonzero(easy).tolist(), pixels):
            if each is not None:
                results[index] = Picture(each, "gpu", *each.shape[1::-1])
        missing = easy & np.array([each is None for each in results], bool)
        again = self._start(items, files, missing | easy & (files["hash"] % SAMPLED == 0))
        for index, picture in chain.from_iterable(each.result() for each in (*waiting, *again)):
            if results[index] is not None and picture.route == "cpu":
                picture = results[index]._replace(exact=picture.pixels)
            results[index] = picture
        gaps = [(each.pixels.cpu().int() - each.exact.int()).abs().max().item()
                for each in results if each.exact is not None]
        with self._lock:
            self._counts.update(each.route for each in results)
            self._counts.update(fallbacks=int(missing.sum()), silent_skips=skipped,
                                redecoded=len(gaps))
            self._gaps.update(gaps)
        return results

    def _start(self, items: list, files: np.ndarray, wanted: np.ndarray) -> list[Future]:
        """Let the threads decode some items, to lists of (index, picture)."""
        indices = np.flatnonzero(wanted).tolist()
        size = min(CHUNK, -(-len(indices) // self.threads)) or 1
        return [self._pool.submit(self._on_cpu, indices[start:start + size], items, files)
                for start in range(0, len(indices), size)]

    def _on_cpu(self, indices: list[int], items: list, files: np.ndarray) -> list:
        jpegs = [i for i in indices if self.mode != "pillow" and files["route"][i] != PILLOW]
        decoded = dict(zip(jpegs, decode_jpegs([items[index] for index in jpegs])))
        return [(index, self._picture(items[index], decoded.get(index))) for index in indices]

    def _picture(self, item, pixels: Optional[Tensor]) -> Union[Picture, Bad]:
        """Of a JPEG's pixels, an array, a PIL image or a file."""
        try:
            if isinstance(item, np.ndarray):
                pixels = np.atleast_3d(item)
                if item.dtype != np.uint8 or pixels.shape[2:] not in ((1,), (3,)) or not item.size:
                    raise ValueError(f"an array of {item.dtype} {list(item.shape)}, not of uint8 "
                                     "[H, W, 3], [H, W, 1] or [H, W]")
            if pixels is not None:
                return Picture(pixels, "cpu", *pixels.shape[1::-1])
            opened = item if isinstance(item, Image.Image) else Image.open(io.BytesIO(item))
            large = np.prod(size := opened.size) > LARGE_OTHER
            if self.mode == "pillow" or large or opened.mode not in ("L", "RGB"):
                opened = self.fitted(opened)
            return Picture(torch.from_numpy(np.atleast_3d(np.array(opened))), "pillow", *size)
        except Exception as problem:
            return Bad(problem)
