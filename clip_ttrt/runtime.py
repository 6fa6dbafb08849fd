"""`load`: an artifact as a drop-in for what `clip.load` returns."""
import re
import warnings
from functools import cached_property
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Callable, Iterable, Optional, Sequence, Union

import torch
from torch import Tensor, nn

from clip_ttrt.artifact import Artifact, check_runs_here, load_modules, read_artifact
from clip_ttrt.contexts import Encoder, memory_errors, no_head
from clip_ttrt.errors import UserError


def load(folder: Union[str, Path], device: Optional[str] = None, force: bool = False,
         cuda_graphs: bool = True, contexts: int = 1) -> tuple["CompiledCLIP", Callable]:
    """Load an artifact: `model, preprocess = clip_ttrt.load(DIR, device="cuda")`.

    device: `cuda`, `cuda:N` or `cpu`, of the kind compiled for, which is the default.
    force: load although verification failed.  cuda_graphs: replay CUDA graphs on a GPU, captured
    at the first use of a batch size or by `model.warmup`.  contexts: the number of calls that may
    run on a GPU at once, each with weights of its own.
    Returns the model and its transform from a PIL image to float32 [3, R, R].
    Raises UserError where the folder is no artifact, was altered, failed its verification or
    cannot run here, where the GPU's memory runs out, and for contexts below 1.
    """
    artifact = read_artifact(folder)
    if artifact.verified is False and not force:
        raise UserError(f"{folder} failed its verification; compile anew, or force=True (--force)")
    if artifact.verified is None:
        warnings.warn(f"{folder} was never verified; run python -m clip_ttrt.verify", stacklevel=2)
    device = str(device or artifact.device)
    if not re.fullmatch(r"cpu|cuda(:\d+)?", device):
        raise UserError(f"unknown device {device!r}; write cuda, cuda:N or cpu")
    index = int(device.partition(":")[2] or -1)
    if index >= torch.cuda.device_count():
        raise UserError(f"there is no {device} here: {torch.cuda.device_count()} GPUs answer")
    with torch.cuda.device(index):  # on which the runtime places an engine; -1: the current one
        check_runs_here(artifact, device)
        return CompiledCLIP(artifact, cuda_graphs, contexts), artifact.model.transform()


class CompiledCLIP(nn.Module):
    """Compiled encoders with the interface of OpenAI's `CLIP`.

    Features and logits are float32, whatever the engines compute in.  Thread-safe; where other
    threads call `torch.cuda.synchronize()`, `warmup` before them: CUDA forbids it in a capture.
    On a GPU inputs may lie in its memory or the CPU's: from pinned memory they are copied without
    waiting, so leave them as they are until the stream has been synchronised.  Results are the
    caller's own, on the model's device, in the order of the caller's stream.
    """

    dtype = torch.float32  # of features

    def __init__(self, artifact: Artifact, cuda_graphs: bool = True, contexts: int = 1):
        super().__init__()
        if contexts < 1:
            raise UserError(f"contexts={contexts}: a model needs at least 1")
        dims, on_gpu = artifact.dimensions, artifact.device == "cuda"
        self.artifact, side = artifact, dims.image_resolution
        self.context_length, self.vocab_size = dims.context_length, dims.vocab_size
        self.visual = SimpleNamespace(input_resolution=side, output_dim=dims.embed_dim)
        scale = torch.tensor(artifact.manifest["logit_scale"], device=artifact.device)
        self.logit_scale, self.device = nn.Parameter(scale, requires_grad=False), scale.device
        self.logit_bias = artifact.manifest["logit_bias"]  # 0 where the model has none
        examples = {"image": scale.new_empty(0, 3, side, side),
                    "text": scale.new_empty(0, dims.context_length, dtype=torch.int32)}
        with memory_errors(f"loading {artifact.folder}"):
            free = torch.cuda.mem_get_info()[0] if on_gpu else 0
            copies = [load_modules(artifact) for _ in range(contexts if on_gpu else 1)]
            # Not registered as submodules: engines cannot follow .to(), .half() or .float().
            self._encoders = {
                name: Encoder([modules[name] for modules in copies], artifact.batch,
                              dims.embed_dim, examples[name], cuda_graphs,
                              artifact.manifest["modules"][name].get("lengths", ()))
                for name in artifact.encoders}
            taken = (free - torch.cuda.mem_get_info()[0]) / 2**20 if on_gpu else 0
        weights = sum(each["mib"] for each in artifact.manifest["modules"].values()) * len(copies)
        self._loaded = {"weights": weights, "contexts": max(0, taken - weights)}
        self.eval()

    def decoder(self, mode: str, threads: Optional[int] = None):
        """A decoder of pictures in a mode for what `resize` does with them."""
        from clip_ttrt.pipeline.decode import Decoder

        return Decoder(mode, self.artifact.model.fitted, self.device, threads)

    _decoder = cached_property(lambda self: self.decoder("exact"))

    @cached_property
    def resize(self):
        """Preprocess pixels, uint8 [H, W, C] each, as the model has it."""
        from clip_ttrt.pipeline.resize import Preprocess

        facts = self.artifact.model.preprocess
        return Preprocess(self.visual.input_resolution, self.device, **facts)

    @cached_property
    def tokenize(self) -> Callable[..., Tensor]:
        """The model's tokenizer: texts and `truncate=False` -> int32 [N, context_length].  Raises
        RuntimeError for a text that is longer, unless it is to be cut."""
        return self.artifact.model.tokenizer()

    def preprocess(self, pictures: Sequence[Any]) -> Tensor:
        """The batch form of the model's transform, and equal to it: pictures of any sizes
        -> float32 [B, 3, R, R] on the model's device.

        pictures: paths, bytes of files, PIL images of any mode, and uint8 tensors in any memory:
        [H, W, C], or [C, H, W] as torchvision has them, with C = 1 (grey) or 3; the last axis is
        the channels wherever its length is 1 or 3.
        Raises ValueError that names the picture and the reason where one cannot be taken.
        """
        return self._preprocess(list(pictures), 0)

    def _preprocess(self, pictures: list, start: int) -> Tensor:
        """start: the number of the first picture, for what is raised."""
        files = {}
        for i, one in enumerate(pictures):
            try:
                if isinstance(one, Tensor):
                    pictures[i] = _channels_last(one)
                else:
                    is_path = isinstance(one, (str, Path))
                    files[i] = Path(one).read_bytes() if is_path else one
            except (OSError, ValueError) as problem:
                raise ValueError(f"picture {start + i}: {problem}") from problem
        for i, decoded in zip(files, self._decoder.decode(list(files.values())) if files else ()):
            if isinstance(decoded, Exception):
                raise ValueError(f"picture {start + i}: {decoded}") from decoded
            pictures[i] = decoded.pixels
        return self.resize(pictures)

    def encode_image(self, images: Union[Tensor, Sequence[Any]]) -> Tensor:
        """Images [B, 3, R, R], any floating dtype -> features float32 [B, embed_dim].

        images: or a list of pictures, as `preprocess` takes them.
        Raises ValueError for other inputs, UserError where the GPU's memory runs out.
        """
        return self._encode_image(images, no_head)

    def _encode_image(self, images: Union[Tensor, Sequence[Any]], head: Callable) -> Tensor:
        side = self.visual.input_resolution
        if isinstance(images, (list, tuple)):
            most = self.artifact.batch.maximum  # no more pictures are decoded at once
            return torch.cat([
                self._encode("image", self._preprocess(list(images[i:i + most]), i), head=head)
                for i in range(0, max(len(images), 1), most)])
        if not (isinstance(images, Tensor) and images.is_floating_point()
                and images.shape[1:] == (3, side, side)):
            raise _unexpected(images, f"images [batch, 3, {side}, {side}] of a floating-point dtype"
                                      ", as `preprocess` returns them")
        return self._encode("image", images, head=head)

    def encode_text(self, tokens: Tensor, length: Optional[int] = None) -> Tensor:
        """Tokens [B, T], int32 or int64, T <= context_length -> features float32 [B, embed_dim].

        A batch takes the time of its longest text.  length: of GPU tokens, at which nobody can look
        without waiting, those of the longest with start and end (default T); the rest is not read.
        Raises ValueError for other inputs and for CPU tokens outside the vocabulary; a row of GPU
        tokens outside it gets features of NaN.  UserError where the GPU's memory runs out.
        """
        if not (isinstance(tokens, Tensor) and tokens.dtype in (torch.int32, torch.int64)
                and tokens.ndim == 2 and 1 <= tokens.shape[1] <= self.context_length):
            raise _unexpected(tokens, "tokens [batch, T] of int32 or int64, with "
                                      f"1 <= T <= {self.context_length}")
        if length is not None and not 1 <= length <= self.context_length:
            raise ValueError(f"length={length}: a text has 1 to {self.context_length} tokens")
        if tokens.is_cpu and not ((tokens >= 0) & (tokens < self.vocab_size)).all():
            raise ValueError(f"tokens lie outside the vocabulary, 0 to {self.vocab_size - 1}")
        return self._encode("text", tokens, length)

    def forward(self, images: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Scaled cosine similarities float32: logits [images, texts], and their transpose."""
        image = nn.functional.normalize(self.encode_image(images), dim=-1)
        text = nn.functional.normalize(self.encode_text(tokens), dim=-1)
        logits = self.logit_scale.exp() * image @ text.t() + self.logit_bias
        return logits, logits.t()

    def warmup(self, batches: Optional[Iterable[int]] = None) -> None:
        """Call every context with these batches, texts at each length, to capture graphs, and wait.

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
                     for lengths in (context.graphs, *context.headed.values())
                     for graphs in lengths.values()
                     for graph in list(graphs.values()) if graph)
        return {**self._loaded, "graphs": graphs / 2**20}

    def _encode(self, encoder: str, x: Tensor, length: Optional[int] = None,
                head: Callable = no_head) -> Tensor:
        if encoder not in self._encoders:
            raise ValueError(f"{self.artifact.folder} holds no {encoder} encoder; "
                             f"compile with --encoder {encoder} or both")
        if x.device != self.device and not x.is_cpu:
            raise ValueError(f"the batch is on {x.device}, and the model is on {self.device}; "
                             f"move it with .to({str(self.device)!r})")
        with memory_errors(f"encoding a batch of {x.shape[0]}"):
            return self._encoders[encoder](x, length, head)


def _channels_last(pixels: Tensor) -> Tensor:
    """uint8 [H, W, C] or [C, H, W] -> [H, W, C]."""
    if pixels.dtype == torch.uint8 and pixels.ndim == 3:
        if pixels.shape[2] in (1, 3):
            return pixels
        if pixels.shape[0] in (1, 3):
            return pixels.permute(1, 2, 0)
    raise _unexpected(pixels, "uint8 [H, W, C] or [C, H, W] with C = 1 or 3")


def _unexpected(value, expected: str) -> ValueError:
    is_tensor = isinstance(value, Tensor)
    found = f"{value.dtype} {list(value.shape)}" if is_tensor else type(value).__name__
    return ValueError(f"expected {expected}, got {found}")
