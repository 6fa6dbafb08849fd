"""`load`: an artifact as a drop-in for what `clip.load` returns."""
import contextlib
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Callable, Iterable, Optional, Union

import torch
from torch import nn

from clip_ttrt import deprecations
from clip_ttrt.artifact import Artifact, check_runs_here, load_modules, read_artifact
from clip_ttrt.contexts import Encoder, is_out_of_memory
from clip_ttrt.errors import UserError


def load(folder: Union[str, Path], device: Optional[str] = None, force: bool = False,
         cuda_graphs: bool = True, contexts: int = 1) -> tuple["CompiledCLIP", Callable]:
    """Load an artifact: `model, preprocess = clip_ttrt.load(DIR, device="cuda")`.

    device: `cuda`, `cuda:N` or `cpu`; by default the kind the artifact was compiled for, and no
    other kind is possible.  force: load although verification failed.  cuda_graphs: replay CUDA
    graphs on a GPU, captured at the first use of a batch size or by `model.warmup`.  contexts: how
    many calls may run on a GPU at once, each with weights of its own.
    Returns the model and the transform from a PIL image to float32 [3, R, R], which is OpenAI's.

    Raises UserError where the folder is no artifact, was altered, failed its verification, or
    cannot run on this machine, where the GPU's memory runs out, and for contexts below 1.
    """
    artifact = read_artifact(folder)
    if artifact.verified is False and not force:
        raise UserError(f"{folder} failed its verification; compile again, or load it all the same "
                        "with force=True (--force)")
    if artifact.verified is None:
        warnings.warn(f"{folder} was never verified; python -m clip_ttrt.verify {folder} compares "
                      "it with the original model", stacklevel=2)
    with current_device(device):
        check_runs_here(artifact, device)
        model = CompiledCLIP(artifact, cuda_graphs, contexts)
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
    """OpenAI's transform: PIL image -> resized, cropped, normalised float32 [3, R, R]."""
    return deprecations.clip()._transform(resolution)


def out_of_memory(what: str) -> UserError:
    """The sentence for an exhausted GPU."""
    free, total = torch.cuda.mem_get_info()
    return UserError(f"out of GPU memory while {what} ({free >> 20} of {total >> 20} MiB are free)"
                     "; use a smaller batch or free the GPU")


@contextlib.contextmanager
def memory_errors(what: str):
    """An exhausted GPU becomes UserError."""
    try:
        yield
    except RuntimeError as problem:
        if not is_out_of_memory(problem):
            raise
        raise out_of_memory(what) from problem


class CompiledCLIP(nn.Module):
    """Compiled encoders with the interface of OpenAI's `CLIP`.

    Features and logits are float32, whatever the engines compute in.  Thread-safe; where other
    threads call `torch.cuda.synchronize()`, `warmup` before them: CUDA forbids it in a capture.
    On a GPU inputs may lie in its memory or the CPU's: from pinned memory they are copied without
    waiting, so leave them as they are until the stream has been synchronised.  Results are the
    caller's own, on the model's device, in the order of the caller's stream.
    """

    def __init__(self, artifact: Artifact, cuda_graphs: bool = True, contexts: int = 1):
        super().__init__()
        if contexts < 1:
            raise UserError(f"contexts={contexts}: a model needs at least 1")
        dims, on_gpu = artifact.dimensions, artifact.device == "cuda"
        side = dims.image_resolution
        self.artifact = artifact
        self.context_length, self.vocab_size = dims.context_length, dims.vocab_size
        self.visual = SimpleNamespace(input_resolution=side, output_dim=dims.embed_dim)
        self.device = torch.device("cpu")
        if on_gpu:
            self.device = torch.device("cuda", torch.cuda.current_device())
        scale = torch.tensor(artifact.manifest["logit_scale"], device=self.device)
        self.logit_scale = nn.Parameter(scale, requires_grad=False)
        inputs = {"image": ((3, side, side), torch.float),
                  "text": ((dims.context_length,), torch.int32)}
        with memory_errors(f"loading {artifact.folder}"):
            free = torch.cuda.mem_get_info()[0] if on_gpu else 0
            copies = [load_modules(artifact, checked=bool(copy))
                      for copy in range(contexts if on_gpu else 1)]
            # Not registered as submodules: engines cannot follow .to(), .half() or .float().
            self._encoders = {
                name: Encoder([modules[name] for modules in copies], artifact.batch,
                              dims.embed_dim, *inputs[name], self.device, cuda_graphs)
                for name in artifact.encoders}
        files = artifact.manifest["modules"].values()
        weights = sum(each.get("mib", 0) for each in files) * len(copies)
        taken = (free - torch.cuda.mem_get_info()[0]) / 2**20 if on_gpu else 0
        self._loaded = {"weights": weights, "contexts": max(0, taken - weights)}
        self.eval()

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of features: float32."""
        return torch.float32

    def encode_image(self, images: torch.Tensor) -> torch.Tensor:
        """Images [B, 3, R, R], any floating dtype -> features float32 [B, embed_dim].

        Raises ValueError for another shape, dtype or device; UserError where the GPU's memory
        runs out.
        """
        self._expect(images, "images", "a floating-point tensor [batch, 3, R, R]")
        side = self.visual.input_resolution
        if images.ndim != 4 or images.shape[1:] != (3, side, side):
            raise ValueError(f"images have shape {list(images.shape)}, "
                             f"expected [batch, 3, {side}, {side}]")
        if not images.is_floating_point():
            raise ValueError(f"images have dtype {images.dtype}, expected a floating-point dtype; "
                             "apply `preprocess` first")
        return self._encode("image", images)

    def encode_text(self, tokens: torch.Tensor) -> torch.Tensor:
        """Tokens [B, T], int32 or int64, T <= context_length -> features float32 [B, embed_dim].

        Shorter rows are padded with zeros, which changes nothing behind the end-of-text token.
        Raises ValueError for another shape, dtype or device and for CPU tokens outside the
        vocabulary; a row of GPU tokens outside it, which cannot be looked at without waiting for
        the GPU, gets features of NaN.  UserError where the GPU's memory runs out.
        """
        self._expect(tokens, "tokens", "an integer tensor [batch, T]")
        if tokens.ndim != 2 or not 1 <= tokens.shape[1] <= self.context_length:
            raise ValueError(f"tokens have shape {list(tokens.shape)}, "
                             f"expected [batch, T] with 1 <= T <= {self.context_length}")
        if tokens.dtype not in (torch.int32, torch.int64):
            raise ValueError(f"tokens have dtype {tokens.dtype}, "
                             "expected torch.int32 or torch.int64")
        if not tokens.is_cuda and not ((tokens >= 0) & (tokens < self.vocab_size)).all():
            raise ValueError(f"tokens lie outside the vocabulary, 0 to {self.vocab_size - 1}")
        return self._encode("text", tokens)

    def forward(
        self, images: torch.Tensor, tokens: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Scaled cosine similarities float32: logits [images, texts], and their transpose."""
        image = nn.functional.normalize(self.encode_image(images), dim=-1)
        text = nn.functional.normalize(self.encode_text(tokens), dim=-1)
        logits = self.logit_scale.exp() * image @ text.t()
        return logits, logits.t()

    def warmup(self, batches: Optional[Iterable[int]] = None) -> None:
        """Call every context with batches of these sizes, which captures their graphs, and wait.

        batches: by default the compiled minimum, optimum and maximum.  Raises ValueError for a
        size below 1, UserError where the GPU's memory runs out.
        """
        span = self.artifact.batch
        sizes = list((span.minimum, span.optimal, span.maximum) if batches is None else batches)
        if min(sizes, default=1) < 1:
            raise ValueError(f"batch {min(sizes)}: a batch to warm up for has at least 1 row")
        with memory_errors("warming up"):
            for encoder in self._encoders.values():
                encoder.warmup(sizes)

    def memory(self) -> dict[str, float]:
        """MiB of `weights` (the modules' files, once a context), of `contexts` (what loading took
        of the GPU beyond them) and of `graphs` (what their captures took)."""
        graphs = sum(graph.bytes for encoder in self._encoders.values()
                     for context in encoder.contexts
                     for graph in list(context.graphs.values()) if graph)
        return {**self._loaded, "graphs": graphs / 2**20}

    def _expect(self, value, name: str, what: str) -> None:
        if not isinstance(value, torch.Tensor):
            raise ValueError(f"{name}: expected {what}, got {type(value).__name__}")
        if value.device != self.device and value.device.type != "cpu":
            raise ValueError(f"{name} are on {value.device}, and the model is on {self.device}; "
                             f"move them with .to({str(self.device)!r})")

    def _encode(self, encoder: str, x: torch.Tensor) -> torch.Tensor:
        if encoder not in self._encoders:
            raise ValueError(f"{self.artifact.folder} holds no {encoder} encoder; "
                             f"compile with --encoder {encoder} or both")
        with memory_errors(f"encoding a batch of {x.shape[0]}"):
            return self._encoders[encoder](x)
