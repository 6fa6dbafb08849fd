"""The GPU's JPEG engines through nvImageCodec, guarded against what is known of them: pictures
skipped without a word, writes that wait for no stream, memory written before it has been read."""
import ctypes
import importlib.util
import io
import threading
import weakref
from collections import deque
from pathlib import Path
from typing import Optional

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from clip_ttrt import kernels
from clip_ttrt.errors import UserError

NVJPEG, TURBO = "libnvjpeg_ext.so", "libjpeg_turbo_ext.so"  # extensions of nvImageCodec
FILE = np.dtype(kernels.JPEG_FILE)  # kernels/jpeg/jpeg.h says what its fields are


class Lease:
    """Memory of a ring for as long as any tensor lies on it.  The thread that drops the last one
    has the stream that reads it current: the memory is free when that stream has come so far."""

    def __init__(self, ring: deque, memory: Tensor):
        self.ring, self.memory = ring, memory
        words = "__cuda_array_interface__" if memory.is_cuda else "__array_interface__"
        setattr(self, words, {"version": 3, "shape": tuple(memory.shape), "typestr": "|u1",
                              "data": (memory.data_ptr(), False)})

    def tensor(self) -> Tensor:
        """uint8 [N], whose storage, and so every view of it, holds the lease."""
        if self.memory.is_cuda:
            return torch.as_tensor(self, device=self.memory.device)
        return torch.from_numpy(np.asarray(self))

    def __del__(self):
        read = None
        if self.memory.is_cuda:
            read = torch.cuda.current_stream(self.memory.device).record_event()
        self.ring.append((self.memory, read))


class Hardware:
    """The GPU's JPEG engines.  A batch is decoded into memory of a ring of our own, where a
    pattern at the end of each picture shows afterwards which ones were skipped in silence."""

    PATTERN = b"\xa7\x01\xfe\x5c\x13\xe9\x42\xb8\x6d\x94\x07\xdb\x31\xc6\x7a\x8f"
    GAP, STEP = 256, 32 << 20  # bytes: least distance of pictures, steps of a memory's size

    def __init__(self, device: torch.device, threads: int):
        self.device, self.threads, self.lock = device, threads, threading.Lock()
        self.ring: deque = deque()  # memory and the event after which it may be written
        self.idle: list = []  # decoders and their streams; each serves one caller at a time
        self.pattern = torch.tensor(list(self.PATTERN), dtype=torch.uint8, device=device)

    @classmethod
    def find(cls, device: torch.device, threads: int) -> "Hardware":
        """Raises UserError that names what is missing."""
        def missing(what: str, remedy: str) -> UserError:
            return UserError(f"decoding on the GPU needs {what}; {remedy}")

        if device.type != "cuda" or not torch.cuda.is_available():
            raise missing(f"a GPU, and the device is {device}", "use cuda, or decode with cpu")
        if library() is None:
            raise missing("nvImageCodec", "pip install 'clip_ttrt[embed-gpu]'")
        try:
            kernels.library()
        except UserError as problem:
            raise UserError(f"decoding on the GPU needs the fused kernels: {problem}") from None
        hardware = cls(torch.empty(0, device=device).device, threads)
        stream = io.BytesIO()
        Image.effect_noise((64, 64), 50).convert("RGB").save(stream, "JPEG")
        data = np.frombuffer(stream.getvalue(), np.uint8)
        try:
            pixels, _ = hardware(np.array([(data.ctypes.data, 0, data.size, 0, 64, 64, 3, 0, 0)],
                                          FILE))
        except RuntimeError as problem:
            raise missing(f"nvImageCodec, which fails ({problem})", "update it and the driver")
        if pixels[0] is None:
            raise missing("JPEG engines and libnvcuvid.so.1 of the driver", "use an A100, H100 or "
                          "newer, in a container with video in NVIDIA_DRIVER_CAPABILITIES")
        return hardware

    def __call__(self, files: np.ndarray) -> tuple[list[Optional[Tensor]], int]:
        """[n] of FILE, scanned -> pixels uint8 [H, W, C] on the device, complete, None for what
        was refused or skipped; the number skipped."""
        shapes = [files[name].tolist() for name in ("height", "width", "channels")]
        sizes = files["height"] * files["width"] * files["channels"]
        steps = (sizes // self.GAP + 2) * self.GAP
        starts, size = steps.cumsum() - steps + self.GAP, int(steps.sum()) + self.GAP
        with self.lock:
            decoder, stream = self.idle.pop() if self.idle else self.create()
            memory, read = self.ring.popleft() if self.ring else (self.pattern, None)
        try:
            with torch.cuda.stream(stream):  # None: no stream
                if read is not None and not read.query():
                    read.synchronize()
                if memory.numel() < size:
                    memory = self.pattern.new_empty(-(-size // self.STEP) * self.STEP)
                memory = Lease(self.ring, memory).tensor()
                tails = torch.from_numpy(starts + sizes).to(self.device)[:, None]
                tails = tails + torch.arange(-len(self.PATTERN), 0, device=self.device)
                memory[tails] = self.pattern.expand_as(tails)
                files["pixels"] = starts + memory.data_ptr()
                self.decode(decoder, stream, files)
                skipped = (memory[tails] == self.pattern).all(1).cpu().numpy()
        finally:
            self.idle.append((decoder, stream))
        written = files["written"] == 1
        good = (written & ~skipped).tolist()
        pixels = [memory.as_strided((h, w, c), (w * c, c, 1), start) if fine else None
                  for fine, h, w, c, start in zip(good, *shapes, starts.tolist())]
        return pixels, int((written & skipped).sum())

    def create(self):
        """A decoder and the stream that it writes on."""
        on_gpu, error = self.device.type == "cuda", ctypes.create_string_buffer(500)
        make, destroy = kernels.library().clip_jpeg_create, kernels.library().clip_jpeg_destroy
        make.restype = ctypes.c_void_p
        path = library()
        extension = next(path.parent.glob(f"extensions/{NVJPEG if on_gpu else TURBO}*"), path)
        address = make(bytes(path), bytes(extension), self.device.index if on_gpu else -1,
                       self.threads, error, len(error))
        if address is None:
            raise RuntimeError(error.value.decode(errors="replace"))
        weakref.finalize(self, destroy, ctypes.c_void_p(address)).atexit = False
        return ctypes.c_void_p(address), torch.cuda.Stream(self.device) if on_gpu else None

    def decode(self, decoder, stream, files: np.ndarray) -> None:
        """Decode to `pixels`, once the stream is done, and set `written`."""
        on = ctypes.c_void_p(stream and stream.cuda_stream)
        status = kernels.library().clip_jpeg_decode(decoder, files.ctypes, len(files), on)
        kernels.succeed(status, f"decoding {len(files)} JPEGs")


def library() -> Optional[Path]:
    """nvImageCodec's, in NVIDIA's wheel, None where that is not installed."""
    try:
        found = importlib.util.find_spec("nvidia.nvimgcodec")
    except ModuleNotFoundError:  # nor any other of NVIDIA's wheels
        return None
    return found and Path(found.origin).with_name("libnvimgcodec.so.0")
