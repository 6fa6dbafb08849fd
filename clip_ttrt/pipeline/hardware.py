"""The GPU's JPEG engines through nvImageCodec, guarded against what is known of them: pictures
skipped without a word, writes that wait for no stream, memory written before it has been read."""
import contextlib
import ctypes
import io
import threading
from collections import deque
from typing import Optional

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from clip_ttrt.errors import UserError


class Place:
    """A tensor's memory in NumPy's and CUDA's words: cheaper than the tensor's own."""

    def __init__(self, tensor: Tensor):
        words = "__cuda_array_interface__" if tensor.is_cuda else "__array_interface__"
        setattr(self, words, {"version": 3, "shape": tuple(tensor.shape), "typestr": "|u1",
                              "data": (tensor.data_ptr(), False)})


class Lease(Place):
    """Memory of a ring for as long as any tensor lies on it.  The thread that drops the last one
    has the stream that reads it current: the memory is free when that stream has come so far."""

    def __init__(self, ring: deque, memory: Tensor):
        super().__init__(memory)
        self.ring, self.memory = ring, memory

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
    GAP, CHUNK = 256, 32 << 20  # bytes: least distance of pictures, steps of a memory's size

    def __init__(self, device: torch.device, threads: int):
        self.device, self.threads, self.lock = device, threads, threading.Lock()
        self.ring: deque = deque()  # memory and the event after which it may be written
        self.idle: list = []  # decoders and their streams; each serves one caller at a time
        self.pattern = torch.tensor(list(self.PATTERN), dtype=torch.uint8, device=device)

    @classmethod
    def find(cls, device: torch.device, threads: int) -> "Hardware":
        """Raises UserError that names what is missing."""
        needs, instead = "decoding on the GPU needs", "or decode with auto or cpu"
        if device.type != "cuda" or not torch.cuda.is_available():
            raise UserError(f"{needs} a GPU, and the device is {device}; use cuda {instead}")
        try:
            from nvidia import nvimgcodec  # noqa: F401
        except ImportError:
            raise UserError(f"{needs} nvImageCodec: pip install 'clip_ttrt[embed-gpu]', {instead}")
        try:
            ctypes.CDLL("libnvcuvid.so.1")
        except OSError:
            raise UserError(f"{needs} the driver's libnvcuvid.so.1: in a container add video to "
                            f"NVIDIA_DRIVER_CAPABILITIES, {instead}")
        if device.index is None:
            device = torch.device("cuda", torch.cuda.current_device())
        file, hardware = io.BytesIO(), cls(device, threads)
        Image.effect_noise((64, 64), 50).convert("RGB").save(file, "JPEG")
        try:
            pixels, _ = hardware([file.getvalue()], [(64, 64, 3)])
        except (RuntimeError, ValueError) as problem:
            raise UserError(f"{needs} nvImageCodec to work, and it fails: {problem}; update it "
                            f"and the driver, {instead}")
        if pixels[0] is None:
            raise UserError(f"{needs} JPEG engines, which {torch.cuda.get_device_name(device)} "
                            f"does not offer; use another GPU {instead}")
        return hardware

    def __call__(self, files: list[bytes], shapes: list[tuple[int, int, int]]
                 ) -> tuple[list[Optional[Tensor]], int]:
        """Files and their [H, W, C] -> pixels uint8 on the device, complete, None for what was
        refused or skipped; the number skipped."""
        starts, ends, at = [], [], self.GAP
        for height, width, channels in shapes:
            starts.append(at)
            ends.append(at + height * width * channels)
            at = (ends[-1] // self.GAP + 2) * self.GAP
        with self.lock:
            decoder, stream = self.idle.pop() if self.idle else self.create()
            memory, read = self.ring.popleft() if self.ring else (self.pattern, None)
        try:
            with torch.cuda.stream(stream):  # None: no stream
                if read is not None:
                    read.synchronize()
                if memory.numel() < at:
                    memory = self.pattern.new_empty(-(-at // self.CHUNK) * self.CHUNK)
                memory = Lease(self.ring, memory).tensor()
                views = [memory.as_strided(shape, (shape[1] * shape[2], shape[2], 1), start)
                         for shape, start in zip(shapes, starts)]
                tails = torch.tensor(ends, device=self.device)[:, None]
                tails = tails + torch.arange(-len(self.PATTERN), 0, device=self.device)
                memory[tails] = self.pattern.expand_as(tails)
                if stream is not None:
                    stream.synchronize()  # the engines write without waiting for it
                written = self.decode(decoder, stream, files, views)
                skipped = (memory[tails] == self.pattern).all(1).tolist()  # waits for the pixels
        finally:
            self.idle.append((decoder, stream))
        pixels = [view if ok and not skip else None
                  for view, ok, skip in zip(views, written, skipped)]
        return pixels, sum(ok and skip for ok, skip in zip(written, skipped))

    def create(self):
        """A decoder and the stream that it writes on."""
        from nvidia import nvimgcodec as nv

        decoder = nv.Decoder(device_id=self.device.index, max_num_cpu_threads=self.threads,
                             backends=[nv.Backend(nv.BackendKind.HW_GPU_ONLY)],
                             options=":fancy_upsampling=1 :force_batch_single=1")
        return decoder, torch.cuda.Stream(self.device)

    def decode(self, decoder, stream, files: list[bytes], views: list[Tensor]) -> list[bool]:
        """Decode into the views; which were written, as nvImageCodec has it."""
        from nvidia import nvimgcodec as nv

        on = stream.cuda_stream if stream is not None else 0
        codes = {}
        for index, data in enumerate(files):
            with contextlib.suppress(RuntimeError):  # it cannot read the header
                codes[index] = nv.CodeStream(data)
        images = [nv.as_image(Place(views[index]), on) for index in codes]
        parameters = nv.DecodeParams(apply_exif_orientation=False,
                                     color_spec=nv.ColorSpec.UNCHANGED)
        decoded = decoder.decode(list(codes.values()), images=images, params=parameters,
                                 cuda_stream=on)
        written = {index for index, image in zip(codes, decoded) if image is not None}
        return [index in written for index in range(len(files))]
