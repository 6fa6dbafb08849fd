"""A name or a file -> weights in their family's naming, with their model and their origin."""
import hashlib
import http.client
import re
import textwrap
import warnings
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Mapping, Optional

import torch
from torch import nn
from safetensors.torch import load_file

from clip_ttrt import demo, deprecations, families
from clip_ttrt.demo import packing
from clip_ttrt.errors import UserError
from clip_ttrt.families import Model
from clip_ttrt.models import MODELS, Dimensions

# In OpenAI's archives; what a ResNet's norms count while they are trained; in transformers' files.
NO_WEIGHTS = ("input_resolution", "context_length", "vocab_size", "num_batches_tracked",
              "position_ids")


@dataclass(frozen=True)
class Origin:
    """Where weights came from, enough to load the same ones again."""

    kind: str  # demo, openai, own (which came with the model), random or file
    sha256: str  # of the file, of several of all their digests; for random weights of the tensors
    path: Optional[str] = None
    seed: Optional[int] = None

    def describe(self) -> str:
        if self.kind == "random":
            return f"RANDOM weights (seed {self.seed}): the features mean nothing"
        return f"{self.path or self.kind} weights (SHA-256 {self.sha256[:12]}...)"


@dataclass(frozen=True)
class Checkpoint:
    """Weights of one model: fp32 CPU tensors in its family's naming."""

    model: Model
    state_dict: Mapping[str, torch.Tensor]
    origin: Origin

    @property
    def dimensions(self) -> Dimensions:
        return self.model.dimensions


def load_checkpoint(model: str, weights: Optional[str] = None, seed: int = 0,
                    trust: bool = False) -> Checkpoint:
    """Load weights for a model, by a name as `families.find` knows it.

    weights: `demo`, `openai`, `own` (the defaults), `random` (by the seed), or a file: safetensors
    in the family's naming or one of OpenAI's archives.  trust: any pickle, whose code runs.
    Raises UserError for weights that are missing, broken, another model's, or not trusted.
    """
    found = families.find(model)
    weights = weights or ("demo" if model == "demo" else "openai" if model in MODELS else "own")
    if weights == "random":
        return _random(found, seed)
    paths = ([demo.WEIGHTS] if weights == "demo" else [_download(model)] if weights == "openai" else
             found.weights() if weights == "own" else [Path(weights)])
    parts, digests = zip(*(_read(path, trust) for path in paths))
    sha256 = digests[0] if len(digests) == 1 else (
        hashlib.sha256("".join(digests).encode()).hexdigest())
    path = None if weights in ("demo", "openai", "own") else str(paths[0].resolve())
    origin = Origin("file" if path else weights, sha256, path)
    # Files of open_clip may have prefixes: of the text encoder, and of training on many GPUs.
    state_dict = {re.sub(r"^(module\.)?(text\.)?", "", name): tensor.detach().float().cpu()
                  for part in parts for name, tensor in part.items()
                  if not name.endswith(NO_WEIGHTS)}
    if weights == "demo":
        state_dict = packing.unpack(state_dict, found.dimensions.vocab_size)
    what = f"these weights ({path or weights})"
    with torch.device("meta"):
        original = found.original()
    try:
        original.load_state_dict(state_dict, assign=True)
    except RuntimeError as problem:
        reasons = (textwrap.shorten(line, 150) for line in str(problem).splitlines()[1:4])
        raise UserError(f"{what} are not those of {model}: {' '.join(reasons)}") from problem
    if broken := [name for name, tensor in state_dict.items() if not tensor.isfinite().all()]:
        raise UserError(f"{what} are not finite: {', '.join(broken[:3])}")
    return Checkpoint(found, state_dict, origin)


def reload_checkpoint(model: str, origin: Origin, weights: Optional[str] = None,
                      trust: bool = False) -> Checkpoint:
    """The weights that an artifact was compiled from, in a file if that has moved, or UserError."""
    source = weights or origin.path or origin.kind
    checkpoint = load_checkpoint(model, source, origin.seed or 0, trust)
    if checkpoint.origin.sha256 != origin.sha256:
        raise UserError(f"{source} does not hold the weights that the artifact was compiled from: "
                        f"its SHA-256 is {checkpoint.origin.sha256}, not {origin.sha256}")
    return checkpoint


def original_with_weights(checkpoint: Checkpoint, device: str) -> torch.nn.Module:
    """The family's own model with a checkpoint's weights in fp32, for inference on a device."""
    with torch.device(device), torch.random.fork_rng(range(torch.cuda.device_count())):
        model = checkpoint.model.original()
    model.load_state_dict(checkpoint.state_dict)
    return model.eval().requires_grad_(False)


def sha256_of_file(path: Path) -> str:
    """SHA-256 of a file's bytes, as hexadecimal digits."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _download(model: str) -> Path:
    clip = deprecations.clip()
    if model not in clip._MODELS:
        raise UserError(f"OpenAI published no {model}; use --weights demo, random or a file")
    url, folder = clip._MODELS[model], Path.home() / ".cache" / "clip"
    try:
        return Path(clip._download(url, str(folder)))
    except (OSError, http.client.HTTPException, RuntimeError) as problem:
        raise UserError(f"OpenAI's weights for {model} could not be downloaded ({problem}); put "
                        f"{url.rsplit('/')[-1]} in {folder}, or use --weights random") from problem


@torch.no_grad()
def _random(found: Model, seed: int) -> Checkpoint:
    """As the family initialises them, but for what would hide a mistake: norms of 0 or 1, what is
    0, and a ResNet in which the picture fades: its convolutions keep the variance behind a ReLU and
    no mean, its branches add as much in all, which fp16 holds, and its pooling tells tokens apart.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model, dims = found.original(), found.dimensions
        for module in model.modules():
            for name, tensor in chain(module.named_parameters(recurse=False),
                                      module.named_buffers(recurse=False)):
                if name == "weight" and isinstance(module, (nn.LayerNorm, nn.BatchNorm2d)):
                    tensor.uniform_(0.5, 1.5)
                elif name == "running_var":
                    tensor.uniform_(0.5, 2)
                elif (name == "running_mean" or name.endswith("bias") and tensor.dim()
                      or tensor.is_floating_point() and not tensor.any()):
                    tensor.normal_(0, 0.1)
        if dims.is_resnet:
            for name, module in model.visual.named_modules():
                if isinstance(module, nn.Conv2d):
                    gain = 3 / sum(dims.image_layers) if name.endswith(".conv3") else 3
                    module.weight.normal_(0, (gain / module.weight[0].numel()) ** 0.5)
                    module.weight -= module.weight.mean((1, 2, 3), keepdim=True)
            model.visual.attnpool.k_proj.weight *= 4
    state_dict = {name: tensor.detach() for name, tensor in model.state_dict().items()
                  if not name.endswith(NO_WEIGHTS)}
    digest = hashlib.sha256()
    for tensor in state_dict.values():
        digest.update(tensor.contiguous().numpy())
    return Checkpoint(found, state_dict, Origin("random", digest.hexdigest(), seed=seed))


def _read(path: Path, trust: bool) -> tuple[dict, str]:
    """A state dict and its file's SHA-256; the code of a pickle that is trusted runs."""
    if not path.is_file():
        raise UserError(f"{path}: no such file; --weights is demo, openai, own, random or a file")
    sha256, safe = sha256_of_file(path), path.suffix == ".safetensors"
    published = [url.split("/")[-2] for url in deprecations.clip()._MODELS.values()]
    if not safe and not trust and sha256 not in published:
        raise UserError(f"{path} is neither safetensors nor one of OpenAI's archives, so reading it"
                        " can run code: convert it to safetensors, or trust it: --trust-weights")
    try:
        with deprecations.hidden():
            warnings.filterwarnings("ignore", "'torch.load' received a zip file", UserWarning)
            content = load_file(path) if safe else torch.load(path, "cpu", weights_only=False)
    except Exception as problem:  # a pickle can raise anything at all
        reason = (str(problem) or repr(problem)).strip().partition("\n")[0]
        raise UserError(f"{path} cannot be read: {reason}") from problem
    if isinstance(content, nn.Module):
        content = content.state_dict()
    if isinstance(content, dict):
        content = content.get("state_dict", content)  # of a training's checkpoint
    if not isinstance(content, dict) or not all(map(torch.is_tensor, content.values())):
        raise UserError(f"{path} holds no state dict of tensors")
    return content, sha256
