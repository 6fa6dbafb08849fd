"""What our modules are compared with, each as a callable on the same weights: `BACKENDS[name](Request) -> Subject`.

Imports of optional packages stay inside their backend; what is missing raises `Missing`, which a sweep records as a
skipped row with its reason.
"""
import importlib.util
import io
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Callable

import torch

from clip_ttrt import backends, pipeline
from clip_ttrt.artifact import load_modules
from clip_ttrt.checkpoint import Checkpoint, load_checkpoint, original_model
from clip_ttrt.encoders import DIFFERENTIABLE, ENCODERS
from clip_ttrt.errors import UserError
from clip_ttrt.models import dimensions_of


class Missing(Exception):
    """A backend that cannot run here, and why."""


@dataclass(frozen=True)
class Request:
    """One thing to measure.  `tokens` counts a text's tokens, or an image's patches and class token."""

    model: str
    weights: str
    encoder: str  # image or text
    precision: str  # fp32 or fp16
    batch: int
    tokens: int
    device: str  # cuda or cpu


@dataclass(frozen=True)
class Subject:
    """A callable on one tensor, that tensor, and facts for the row."""

    call: Callable[[], Any]
    build_s: float
    attention: str = ""
    engine_mib: str = ""
    brings_graphs: bool = False  # torch.compile's reduce-overhead captures by itself


def example(request: Request, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """A random batch: images [B, 3, R, R] of a dtype, or tokens int32 [B, T] with the end of text last."""
    generator = torch.Generator().manual_seed(0)
    if request.encoder == "image":
        side = dimensions_of(request.model).image_resolution
        return torch.randn(request.batch, 3, side, side, generator=generator).to(request.device, dtype)
    tokens = torch.randint(1, 49405, (request.batch, request.tokens), generator=generator, dtype=torch.int32)
    tokens[:, 0], tokens[:, -1] = 49406, 49407
    return tokens.to(request.device)


def dtype_of(request: Request) -> torch.dtype:
    if request.precision == "fp16" and request.device == "cpu":
        raise Missing("fp16 on the CPU: PyTorch 2.2 has no half kernels there")
    return torch.half if request.precision == "fp16" else torch.float


def checkpoint_of(request: Request) -> Checkpoint:
    return load_checkpoint(request.model, request.weights)


def clip_eager(request: Request) -> Subject:
    """The original `clip` model, as `clip.load` gives it: fp32, or fp16 through its own convert_weights."""
    from clip.model import convert_weights

    dtype_of(request)
    start, checkpoint = time.perf_counter(), checkpoint_of(request)
    model = original_model(checkpoint.dimensions)
    model.load_state_dict(checkpoint.state_dict)
    model = model.eval().requires_grad_(False).to(request.device)
    if request.precision == "fp16":
        convert_weights(model)
    x, encode = example(request), model.encode_image if request.encoder == "image" else model.encode_text
    return Subject(lambda: encode(x), time.perf_counter() - start, "multi-head module")


def plain(request: Request) -> torch.nn.Module:
    """Our plain encoder with PyTorch's scaled_dot_product_attention."""
    return ENCODERS[request.encoder](checkpoint_of(request).state_dict, DIFFERENTIABLE).to(request.device, dtype_of(request))


def eager_sdpa(request: Request) -> Subject:
    """Our plain encoder, eager."""
    start = time.perf_counter()
    module, x = plain(request), example(request, dtype_of(request))
    return Subject(lambda: module(x), time.perf_counter() - start, "sdpa")


def torch_compile(mode: str) -> Callable[[Request], Subject]:
    """Our plain encoder under torch.compile of the PyTorch that runs this."""
    def build(request: Request) -> Subject:
        start = time.perf_counter()
        if request.device == "cuda" and importlib.util.find_spec("triton") is None:
            raise Missing("torch.compile on a GPU needs Triton, which is not installed")
        module, x = torch.compile(plain(request), mode=mode, fullgraph=True), example(request, dtype_of(request))
        with torch.no_grad():
            for _ in range(3):
                module(x)
        return Subject(lambda: module(x), time.perf_counter() - start, "sdpa", brings_graphs=request.device == "cuda")

    return build


def onnxruntime(request: Request) -> Subject:
    """Our plain encoder through ONNX in ONNX Runtime, inputs and outputs in host memory as its users have them."""
    if importlib.util.find_spec("onnxruntime") is None:
        raise Missing("onnxruntime is not installed")
    import onnxruntime as ort

    provider = "CUDAExecutionProvider" if request.device == "cuda" else "CPUExecutionProvider"
    if provider not in ort.get_available_providers():
        raise Missing(f"this onnxruntime has no {provider}")
    start = time.perf_counter()
    module, x, buffer = plain(request), example(request, dtype_of(request)), io.BytesIO()
    try:
        torch.onnx.export(module, (x,), buffer, input_names=["x"], output_names=["features"], opset_version=17)
    except torch.onnx.errors.OnnxExporterError as problem:
        raise Missing(f"ONNX export failed: {problem}") from problem
    session = ort.InferenceSession(buffer.getvalue(), providers=[provider])
    feed = {"x": x.cpu().numpy()}
    return Subject(lambda: session.run(None, feed), time.perf_counter() - start, "onnx")


def clip_ttrt(attention: str) -> Callable[[Request], Subject]:
    """Our artifact's module, static batch: TensorRT on a GPU, TorchScript on the CPU."""
    def build(request: Request) -> Subject:
        asked = "tensorrt" if request.device == "cuda" else "torchscript"
        if request.device == "cpu" and (attention == "plugin" or request.precision == "fp16"):
            raise Missing(f"{attention} in {request.precision} needs a GPU")
        start = time.perf_counter()
        with tempfile.TemporaryDirectory() as folder:
            try:
                made = pipeline.compile(model=request.model, weights=request.weights, precision=request.precision, batch=request.batch, encoder=request.encoder,
                                        backend=asked, attention=attention, verify=False, output=Path(folder) / "artifact")
            except UserError as problem:
                raise Missing(str(problem)) from problem
            module, facts = load_modules(made)[request.encoder], made.manifest["modules"][request.encoder]
        context = dimensions_of(request.model).context_length
        x = example(request)
        if request.encoder == "text":
            x = torch.nn.functional.pad(x, (0, context - x.shape[1]))  # as `model.encode_text` does
        return Subject(lambda: module(x), time.perf_counter() - start, made.manifest["attention"], str(facts.get("engine_mib", facts["mib"])))

    return build


BACKENDS: dict[str, Callable[[Request], Subject]] = {
    "clip_eager": clip_eager,
    "eager_sdpa": eager_sdpa,
    "torch_compile_reduce_overhead": torch_compile("reduce-overhead"),
    "torch_compile_max_autotune": torch_compile("max-autotune"),
    "onnxruntime": onnxruntime,
    "clip_ttrt_native": clip_ttrt("native"),
    "clip_ttrt_plugin": clip_ttrt("plugin"),
}


def gpu_name() -> str:
    """The GPU's name; on the CPU the processor's kind."""
    return backends.gpu().get("name", "cpu")
