"""`load`: an artifact as a drop-in for what `clip.load` returns."""
import contextlib
import threading
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Callable, Optional, Union

import torch
from torch import nn

from clip_ttrt import deprecations
from clip_ttrt.artifact import Artifact, check_runs_here, load_modules, read_artifact
from clip_ttrt.errors import UserError
from clip_ttrt.options import BatchRange


def load(folder: Union[str, Path], device: Optional[str] = None, force: bool = False) -> tuple["CompiledCLIP", Callable]:
    """Load an artifact: `model, preprocess = clip_ttrt.load(DIR, device="cuda")`.

    device: `cuda`, `cuda:N` or `cpu`; by default the kind the artifact was compiled for, and no
    other kind is possible.  force: load although verification failed.
    Returns the model and the transform from a PIL image to float32 [3, R, R], which is OpenAI's.

    Raises UserError where the folder is no artifact, was altered, failed its verification, or
    cannot run on this machine.
    """
    artifact = read_artifact(folder)
    if artifact.verified is False and not force:
        raise UserError(f"{folder} failed its verification; compile again, or load it all the same with force=True (--force)")
    if artifact.verified is None:
        warnings.warn(f"{folder} was never verified; python -m clip_ttrt.verify {folder} compares it with the original model", stacklevel=2)
    try:
        with current_device(device):
            check_runs_here(artifact, device)
            model = CompiledCLIP(artifact, load_modules(artifact))
    except torch.cuda.OutOfMemoryError as problem:
        raise out_of_memory(f"loading {folder}") from problem
    return model, preprocess(artifact.dimensions.image_resolution)


def current_device(device: Optional[str]):
    """A context in which `cuda:N` is the current GPU, on which the runtime places an engine."""
    try:
        index = None if device is None else torch.device(device).index
    except RuntimeError as problem:
        raise UserError(f"unknown device {device!r}; write cuda, cuda:N or cpu") from problem
    if index is None or not torch.cuda.is_available():
        return contextlib.nullcontext()
    if index >= torch.cuda.device_count():
        raise UserError(f"there is no {device} here: {torch.cuda.device_count()} GPUs answer")
    return torch.cuda.device(index)


def preprocess(resolution: int) -> Callable:
    """OpenAI's transform: PIL image -> resized, centre-cropped, normalised float32 [3, resolution, resolution]."""
    return deprecations.clip()._transform(resolution)


def out_of_memory(what: str) -> UserError:
    """The sentence for an exhausted GPU."""
    free, total = torch.cuda.mem_get_info()
    return UserError(f"out of GPU memory while {what} ({free >> 20} of {total >> 20} MiB are free); use a smaller batch or free the GPU")


class Encoder:
    """One compiled module behind a lock: any batch in, features out.

    An execution context holds one set of addresses and one scratch memory, so calls are made one
    after the other, and a call on another CUDA stream waits for the one before it.  (While a CUDA
    graph is captured nothing is awaited: replay a captured graph from one stream at a time.)
    """

    def __init__(self, module: torch.jit.ScriptModule, batch: BatchRange, width: int, device: str):
        self.module, self.batch, self.width, self.device = module, batch, width, device
        self._lock = threading.Lock()
        self._done: Optional[torch.cuda.Event] = None
        self._stream: Optional[torch.cuda.Stream] = None

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """x [B, ...], B >= 0 -> features float32 [B, width].  Splits over MAX, pads under MIN."""
        if x.shape[0] == 0:
            return torch.empty(0, self.width, device=x.device)
        parts = [self._run(part) for part in x.split(self.batch.maximum)]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _run(self, x: torch.Tensor) -> torch.Tensor:
        count = x.shape[0]
        if count < self.batch.minimum:
            x = torch.cat([x, x[-1:].expand(self.batch.minimum - count, *x.shape[1:])])
        with self._lock, torch.no_grad():
            features = self._on_stream(x) if self.device == "cuda" else self.module(x)
        return features[:count]

    def _on_stream(self, x: torch.Tensor) -> torch.Tensor:
        # The runtime allocates outputs on, and takes the stream of, the current device.
        with torch.cuda.device(x.device):
            if torch.cuda.is_current_stream_capturing():
                return self.module(x)
            stream = torch.cuda.current_stream()
            if self._stream is not None and self._stream != stream:
                stream.wait_event(self._done)
            features = self.module(x)
            self._done = self._done or torch.cuda.Event()
            self._done.record(stream)
            self._stream = stream
            return features


class CompiledCLIP(nn.Module):
    """Compiled encoders with the interface of OpenAI's `CLIP`.

    Features and logits are float32, whatever the engines compute in.  Thread-safe.
    """

    def __init__(self, artifact: Artifact, modules: dict[str, torch.jit.ScriptModule]):
        super().__init__()
        dims = artifact.dimensions
        self.artifact = artifact
        self.context_length, self.vocab_size = dims.context_length, dims.vocab_size
        self.visual = SimpleNamespace(input_resolution=dims.image_resolution, output_dim=dims.embed_dim)
        self.device = torch.device("cuda", torch.cuda.current_device()) if artifact.device == "cuda" else torch.device("cpu")
        self.logit_scale = nn.Parameter(torch.tensor(artifact.manifest["logit_scale"], device=self.device), requires_grad=False)
        # Not registered as submodules: engines cannot follow .to(), .half() or .float().
        self._encoders = {name: Encoder(module, artifact.batch, dims.embed_dim, artifact.device) for name, module in modules.items()}
        self.eval()

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of features: float32."""
        return torch.float32

    def encode_image(self, images: torch.Tensor) -> torch.Tensor:
        """Images [B, 3, R, R], any floating dtype, on the model's device -> features float32 [B, embed_dim].

        Raises ValueError for another shape, dtype or device; UserError where the GPU's memory runs out.
        """
        self._expect(images, "images", "a floating-point tensor [batch, 3, R, R]")
        shape = (3, self.visual.input_resolution, self.visual.input_resolution)
        if images.ndim != 4 or tuple(images.shape[1:]) != shape:
            raise ValueError(f"images have shape {list(images.shape)}, expected [batch, {shape[0]}, {shape[1]}, {shape[2]}]")
        if not images.is_floating_point():
            raise ValueError(f"images have dtype {images.dtype}, expected a floating-point dtype; apply `preprocess` first")
        return self._encode("image", images)

    def encode_text(self, tokens: torch.Tensor) -> torch.Tensor:
        """Tokens [B, T], int32 or int64, T <= context_length, on the model's device -> features float32 [B, embed_dim].

        Shorter rows are padded with zeros, which changes nothing behind the end-of-text token.
        Raises ValueError for another shape, dtype or device and for CPU tokens outside the
        vocabulary; a row of GPU tokens outside it, which cannot be looked at without waiting for
        the GPU, gets features of NaN.  UserError where the GPU's memory runs out.
        """
        self._expect(tokens, "tokens", "an integer tensor [batch, T]")
        if tokens.ndim != 2 or not 1 <= tokens.shape[1] <= self.context_length:
            raise ValueError(f"tokens have shape {list(tokens.shape)}, expected [batch, T] with 1 <= T <= {self.context_length}")
        if tokens.dtype not in (torch.int32, torch.int64):
            raise ValueError(f"tokens have dtype {tokens.dtype}, expected torch.int32 or torch.int64")
        known = (tokens >= 0) & (tokens < self.vocab_size)
        if not tokens.is_cuda:
            if not bool(known.all()):
                raise ValueError(f"tokens lie outside the vocabulary, 0 to {self.vocab_size - 1}")
            return self._encode("text", self._pad(tokens))
        features = self._encode("text", self._pad(tokens * known))
        return features.masked_fill(~known.all(dim=1, keepdim=True), float("nan"))

    def forward(self, images: torch.Tensor, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits per image float32 [images, texts] and per text [texts, images]: scaled cosine similarities."""
        image = nn.functional.normalize(self.encode_image(images), dim=-1)
        text = nn.functional.normalize(self.encode_text(tokens), dim=-1)
        logits = self.logit_scale.exp() * image @ text.t()
        return logits, logits.t()

    def _pad(self, tokens: torch.Tensor) -> torch.Tensor:
        return nn.functional.pad(tokens, (0, self.context_length - tokens.shape[1]))

    def _expect(self, value, name: str, what: str) -> None:
        if not isinstance(value, torch.Tensor):
            raise ValueError(f"{name}: expected {what}, got {type(value).__name__}")
        if value.device != self.device:
            raise ValueError(f"{name} are on {value.device}, and the model is on {self.device}; move them with .to({str(self.device)!r})")

    def _encode(self, encoder: str, x: torch.Tensor) -> torch.Tensor:
        if encoder not in self._encoders:
            raise ValueError(f"{self.artifact.folder} holds no {encoder} encoder; compile with --encoder {encoder} or both")
        try:
            return self._encoders[encoder](x)
        except torch.cuda.OutOfMemoryError as problem:
            raise out_of_memory(f"encoding a batch of {x.shape[0]}") from problem
