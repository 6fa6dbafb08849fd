"""A name or a file -> weights in OpenAI's naming, with their dimensions and where they came from."""
import hashlib
import http.client
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Mapping, Optional, Union

import torch
from safetensors import SafetensorError, safe_open

from clip_ttrt import demo, deprecations
from clip_ttrt.demo import packing
from clip_ttrt.errors import UserError
from clip_ttrt.models import MODELS, Dimensions, dimensions_from, dimensions_of

NOT_PARAMETERS = ("input_resolution", "context_length", "vocab_size")  # stored beside the weights in OpenAI's archives


@dataclass(frozen=True)
class Origin:
    """Where weights came from, enough to load the same ones again."""

    kind: str  # demo, openai, random or file
    sha256: str  # of the file; for random weights of the tensors
    path: Optional[str] = None
    seed: Optional[int] = None

    def describe(self) -> str:
        if self.kind == "random":
            return f"RANDOM weights (seed {self.seed}): the features mean nothing"
        where = f" {self.path}" if self.path else ""
        return f"{self.kind} weights{where} (SHA-256 {self.sha256[:12]}...)"


@dataclass(frozen=True)
class Checkpoint:
    """Weights of one model: fp32 CPU tensors in OpenAI's naming."""

    model: str
    dimensions: Dimensions
    state_dict: Mapping[str, torch.Tensor]
    origin: Origin


def load_checkpoint(model: str, weights: Optional[str] = None, seed: int = 0, trust: bool = False) -> Checkpoint:
    """Load weights for a model of the table.

    model: a name in `MODELS`.  weights: `demo`, `openai`, `random`, or a file (safetensors in
    OpenAI's naming, or one of OpenAI's archives); by default `demo` for the demo model, else
    `openai`.  seed: for random weights.  trust: read a pickle or archive that is not one of
    OpenAI's, which runs whatever code it holds.

    Raises UserError for an unknown model, weights that are missing, truncated, not CLIP's or
    another model's, and for an untrusted pickle.
    """
    wanted = dimensions_of(model)
    weights = weights or ("demo" if model == "demo" else "openai")
    if weights == "demo":
        state_dict, origin = _demo()
    elif weights == "openai":
        state_dict, origin = _openai(model)
    elif weights == "random":
        state_dict, origin = _random(wanted, seed)
    else:
        state_dict, origin = _file(Path(weights), trust)
    found = dimensions_from(state_dict)
    if found != wanted:
        raise UserError(f"the weights ({origin.kind}{' ' + origin.path if origin.path else ''}) are not {model}: {_difference(found, wanted)}")
    state_dict = {name: tensor.detach().float().cpu() for name, tensor in state_dict.items() if name not in NOT_PARAMETERS}
    _check(state_dict, wanted)
    return Checkpoint(model, wanted, state_dict, origin)


def reload_checkpoint(model: str, origin: Origin, weights: Optional[str] = None, trust: bool = False) -> Checkpoint:
    """Load the weights that an artifact was compiled from, or fail.

    weights: a file to read instead of the recorded path, where it has moved.
    Raises UserError where they cannot be found or are not the same (by SHA-256).
    """
    source = weights or (origin.path if origin.kind == "file" else origin.kind)
    checkpoint = load_checkpoint(model, source, seed=origin.seed or 0, trust=trust)
    if checkpoint.origin.sha256 != origin.sha256:
        raise UserError(f"{source} does not hold the weights that the artifact was compiled from (SHA-256 "
                        f"{checkpoint.origin.sha256[:12]}..., compiled from {origin.sha256[:12]}...)")
    return checkpoint


def original_model(dims: Dimensions) -> torch.nn.Module:
    """The original `clip` package's model of these dimensions, with its own initialisation."""
    deprecations.clip()
    from clip.model import CLIP

    return CLIP(dims.embed_dim, dims.image_resolution, dims.image_layers, dims.image_width, dims.patch_size,
                dims.context_length, dims.vocab_size, dims.text_width, dims.text_heads, dims.text_layers)


def original_with_weights(checkpoint: Checkpoint, device: Union[str, torch.device]) -> torch.nn.Module:
    """The original model with a checkpoint's weights in fp32, for inference on a device; made without the initialisation, which takes seconds."""
    with torch.device("meta"):
        model = original_model(checkpoint.dimensions)
    model.to_empty(device=device).load_state_dict(checkpoint.state_dict)
    mask = model.build_attention_mask()  # no parameter: on the CPU, where the original leaves it
    for block in model.transformer.resblocks:
        block.attn_mask = mask
    return model.eval().requires_grad_(False)


def sha256_of_file(path: Path) -> str:
    """SHA-256 of a file's bytes, as hexadecimal digits."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _demo() -> tuple[dict, Origin]:
    tensors, metadata = _read_safetensors(demo.WEIGHTS)
    if metadata.get("format") != packing.FORMAT:
        raise UserError(f"the embedded weights have format {metadata.get('format')!r}, not {packing.FORMAT!r}; reinstall the package")
    return packing.unpack(tensors, int(metadata["vocab_size"])), Origin("demo", sha256_of_file(demo.WEIGHTS))


def _openai(model: str) -> tuple[dict, Origin]:
    clip = deprecations.clip()
    if model not in clip._MODELS:
        raise UserError(f"OpenAI published no weights for {model!r}; use --weights demo, random or a file")
    url = clip._MODELS[model]
    folder = Path("~/.cache/clip").expanduser()
    target = folder / url.rsplit("/", 1)[1]
    try:
        path = Path(clip._download(url, str(folder)))
    except (OSError, http.client.HTTPException) as problem:
        # A download that broke off is not a file to find next time.
        if target.is_file() and target.stat().st_size == 0:
            target.unlink()
        raise UserError(f"OpenAI's weights for {model} could not be downloaded ({problem}); place the file {target.name} "
                        f"in {folder}, or use --weights random or --weights FILE") from problem
    except RuntimeError as problem:
        raise UserError(f"OpenAI's weights for {model} are damaged: {problem}; delete {target} and try again") from problem
    return _read_archive(path), Origin("openai", sha256_of_file(path))


def _random(dims: Dimensions, seed: int) -> tuple[dict, Origin]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = original_model(dims)
        # Biases start at zero and norms as the identity; without noise a mistake in them would not show.
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.data.add_(torch.randn_like(parameter), alpha=0.02)
    state_dict = model.state_dict()
    digest = hashlib.sha256()
    for name in sorted(state_dict):
        digest.update(name.encode())
        digest.update(state_dict[name].contiguous().numpy())
    return state_dict, Origin("random", digest.hexdigest(), seed=seed)


def _file(path: Path, trust: bool) -> tuple[dict, Origin]:
    if not path.is_file():
        raise UserError(f"{path}: no such file; --weights takes demo, openai, random or a file")
    digest = sha256_of_file(path)
    origin = Origin("file", digest, path=str(path.resolve()))
    if path.suffix == ".safetensors":
        return _read_safetensors(path)[0], origin
    if digest in published_digests():
        return _read_archive(path), origin
    if not trust:
        raise UserError(f"{path} is neither safetensors nor one of OpenAI's archives (by SHA-256); a pickle or TorchScript archive "
                        f"can run code when it is read: convert it to safetensors, or pass --trust-weights if you trust its source")
    return _read_pickle(path), origin


def published_digests() -> dict[str, str]:
    """SHA-256 of each archive that OpenAI published -> the model's name."""
    clip = deprecations.clip()
    return {url.split("/")[-2]: name for name, url in clip._MODELS.items()}


def _read_safetensors(path: Path) -> tuple[dict, dict]:
    try:
        with safe_open(str(path), framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}
    except (SafetensorError, OSError) as problem:
        raise UserError(f"{path} is not a whole safetensors file: {problem}") from problem


def _read_archive(path: Path) -> dict:
    try:
        with deprecations.hidden():
            return torch.jit.load(str(path), map_location="cpu").state_dict()
    except RuntimeError as problem:
        raise UserError(f"{path} is not a whole TorchScript archive: {_first_line(problem)}") from problem


def _read_pickle(path: Path) -> dict:
    try:
        return _read_archive(path)
    except UserError:
        pass
    try:
        content = torch.load(str(path), map_location="cpu", weights_only=False)  # trusted
    except Exception as problem:  # a pickle can raise anything at all
        raise UserError(f"{path} cannot be read: {_first_line(problem)}") from problem
    content = content.state_dict() if isinstance(content, torch.nn.Module) else content
    if not isinstance(content, dict) or not all(isinstance(value, torch.Tensor) for value in content.values()):
        raise UserError(f"{path} holds no state dict of tensors")
    return content


def _first_line(problem: BaseException) -> str:
    return (str(problem).strip().splitlines() or [type(problem).__name__])[0]


def _difference(found: Dimensions, wanted: Dimensions) -> str:
    """Why two models' dimensions differ, and which model it is if the table knows it."""
    for name, row in MODELS.items():
        if row == found:
            return f"they have the dimensions of {name}"
    parts = [f"{field} {value}, not {asdict(wanted)[field]}" for field, value in asdict(found).items() if value != asdict(wanted)[field]]
    return "they have " + ", ".join(parts)


def _check(state_dict: Mapping[str, torch.Tensor], dims: Dimensions) -> None:
    """Every parameter is there, in its shape, and finite."""
    with torch.device("meta"):
        expected = original_model(dims).state_dict()
    missing, unknown = sorted(expected.keys() - state_dict.keys()), sorted(state_dict.keys() - expected.keys())
    if missing or unknown:
        raise UserError(f"these weights are not a whole CLIP model: {len(missing)} missing ({', '.join(missing[:3])}), "
                        f"{len(unknown)} unknown ({', '.join(unknown[:3])})")
    for name, tensor in state_dict.items():
        if tensor.shape != expected[name].shape:
            raise UserError(f"{name} has shape {tuple(tensor.shape)}, not {tuple(expected[name].shape)}")
        if not torch.isfinite(tensor).all():
            raise UserError(f"{name} holds values that are not finite")
