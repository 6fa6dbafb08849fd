"""The GPU's JPEG engines through nvImageCodec, guarded against what is known of them: pictures
skipped without a word, writes that wait for no stream, memory written before it has been read."""
import threading
from typing import Callable, Optional

import numpy as np
import torch
from torch import Tensor

from clip_ttrt import kernels
from clip_ttrt.errors import UserError

FILE = np.dtype(kernels.JPEG_FILE)  # kernels/jpeg/jpeg.h says what its fields are
PATTERN = b"\xa7\x01\xfe\x5c\x13\xe9\x42\xb8\x6d\x94\x07\xdb\x31\xc6\x7a\x8f"
GAP, STEP = 256, 32 << 20  # bytes: least distance of pictures, steps of a memory's size


class Hardware:
    """The GPU's JPEG engines, for any number of threads at once.  A pattern at the end of each
    picture's memory shows afterwards which ones were skipped in silence."""

    def __init__(self, device: torch.device, threads: int):
        self.device, self.threads, self.lock = device, threads, threading.Lock()
        self.idle: list = []  # decoders and their streams; each serves one caller at a time
        self.pattern = torch.tensor(list(PATTERN), dtype=torch.uint8, device=device)

    @classmethod
    def find(cls, device: torch.device, threads: int, trial: np.ndarray) -> "Hardware":
        """trial: of FILE, an easy one.  Raises UserError that says why there are none."""
        try:
            if device.type != "cuda":
                raise UserError(f"the device is {device}; use cuda")
            hardware = cls(torch.empty(0, device=device).device, threads)
            (pixels,), _ = hardware(trial)
            if pixels is None:
                raise UserError("no JPEG engines; use an A100, H100 or newer with libnvcuvid.so.1 "
                                "(in a container: video in NVIDIA_DRIVER_CAPABILITIES)")
        except (UserError, RuntimeError, AssertionError) as problem:
            raise UserError(f"the GPU cannot decode: {problem}") from None
        return hardware

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

    def create(self) -> tuple[Callable, Optional[torch.cuda.Stream]]:
        """A decoder and the stream that it writes on."""
        stream = torch.cuda.Stream(self.device) if self.device.type == "cuda" else None
        return kernels.JpegDecoder(self.device.index, self.threads), stream
