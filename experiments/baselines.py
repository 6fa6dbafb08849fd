"""What our modules are compared with, each a callable on the same weights: `BACKENDS[name](Request) -> Subject`.

Imports of optional packages stay inside their backend; what is missing raises `Missing`, which a sweep records as a
skipped row with its reason.  Where the `clip` package is not installed, as in a newer PyTorch's environment, our plain
encoders get random weights of their own, which a time does not depend on.  Where CLIP_TTRT_WEIGHTS names a folder, random
weights are drawn once into it, and processes share them.
"""
import fcntl
import functools
import importlib.util
import inspect
import io
import json
import os
import tempfile
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Callable, Optional

import torch

from clip_ttrt import pipeline
from clip_ttrt.accuracy import COSINE_BOUND, exact_fp32
from clip_ttrt.artifact import MANIFEST, Artifact, load_modules, read_artifact
from clip_ttrt.checkpoint import Checkpoint, Origin, load_checkpoint, original_with_weights
from clip_ttrt.encoders import DIFFERENTIABLE, ENCODERS, FusedOps, ImageEncoder, TextEncoder
from clip_ttrt.errors import UserError
from clip_ttrt.models import HEAD_DIM, dimensions_of
from clip_ttrt.options import BatchRange
from experiments.accuracy import folder_name

COMPILE_LIMITS = {"recompile_limit", "cache_size_limit"}  # of modules and shapes that one process compiles, new name and old
CHECKED = 8  # samples of a batch that are compared with the fp32 reference


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
    artifacts: str = ""  # folder from which artifacts are taken where they are, and in which new ones stay
    batches: str = "1:32:512"  # what a backend that ends in _range compiles for
    level: int = 3  # of TensorRT's builder


@dataclass(frozen=True)
class Subject:
    """A callable on one tensor, that tensor, and facts for the row."""

    run: Callable[[torch.Tensor], torch.Tensor]
    x: torch.Tensor
    build_s: float
    attention: str = ""
    engine_mib: str = ""
    brings_graphs: bool = False  # it replays CUDA graphs of its own
    uncapturable: str = ""  # why a CUDA graph of it cannot be captured
    remark: str = ""  # what is wrong with the features, for the row's error
    load_again: Optional[Callable[[], Callable]] = None  # another module for the same, where one serves one call at a time

    def call(self) -> torch.Tensor:
        return self.run(self.x)


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


@functools.lru_cache(maxsize=1)
def weights_of(model: str, weights: str) -> Checkpoint:
    """As `load_checkpoint`; random weights from the folder CLIP_TTRT_WEIGHTS, where it is set, into which the first process draws them."""
    if weights != "random" or not (root := os.environ.get("CLIP_TTRT_WEIGHTS")):
        return load_checkpoint(model, weights)
    kept = Path(root) / f"{model.replace('/', '-')}.pt"
    kept.parent.mkdir(parents=True, exist_ok=True)
    with open(kept.with_suffix(".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not kept.is_file():
            drawn = load_checkpoint(model, weights)
            torch.save({"state_dict": drawn.state_dict, "origin": asdict(drawn.origin)}, kept.with_suffix(".partial"))
            os.replace(kept.with_suffix(".partial"), kept)
    saved = torch.load(str(kept), map_location="cpu", mmap=True, weights_only=True)
    return Checkpoint(model, dimensions_of(model), saved["state_dict"], Origin(**saved["origin"]))


def checkpoint_of(request: Request) -> Checkpoint:
    """The request's weights.  Raises Missing where the `clip` package, which defines them, is not installed."""
    if not has_clip():
        raise Missing("the original `clip` package is not installed")
    return weights_of(request.model, request.weights)


def has_clip() -> bool:
    return importlib.util.find_spec("clip") is not None


class Original(torch.nn.Module):
    """One encoder of the original `clip` model as a module of its own."""

    def __init__(self, request: Request):
        super().__init__()
        self.clip = original_with_weights(checkpoint_of(request), request.device)
        self.image = request.encoder == "image"

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.clip.encode_image(x) if self.image else self.clip.encode_text(x)


def clip_eager(request: Request) -> Subject:
    """The original `clip` model, as `clip.load` gives it: fp32, or fp16 through its own convert_weights."""
    dtype_of(request)
    start = time.perf_counter()
    original = Original(request)
    if request.precision == "fp16":
        from clip.model import convert_weights

        convert_weights(original.clip)
    reason = "" if original.image else "encode_text of the original copies an index from the CPU"
    return Subject(original, example(request), time.perf_counter() - start, "multi-head module", uncapturable=reason)


def plain(request: Request, fused: FusedOps = DIFFERENTIABLE) -> torch.nn.Module:
    """Our plain encoder with PyTorch's scaled_dot_product_attention; without the `clip` package with weights of its own."""
    dtype = dtype_of(request)
    if has_clip():
        state_dict = checkpoint_of(request).state_dict  # which may be drawn now, on the CPU
        with torch.device(request.device):
            module = ENCODERS[request.encoder](state_dict, fused)
    else:
        with torch.device(request.device):
            module = (ImageEncoder if request.encoder == "image" else TextEncoder)(dimensions_of(request.model), fused).eval().requires_grad_(False)
        generator = torch.Generator(request.device).manual_seed(0)
        for parameter in module.parameters():
            parameter.normal_(std=0.02, generator=generator)
    return module.to(request.device, dtype)


def eager_sdpa(request: Request) -> Subject:
    """Our plain encoder, eager."""
    start = time.perf_counter()
    module, x = plain(request), example(request, dtype_of(request))
    return Subject(module, x, time.perf_counter() - start, "sdpa")


def torch_compile(mode: str) -> Callable[[Request], Subject]:
    """Our plain encoder under torch.compile of the PyTorch that runs this."""
    def build(request: Request) -> Subject:
        if request.device == "cuda" and importlib.util.find_spec("triton") is None:
            raise Missing("torch.compile on a GPU needs Triton, which is not installed")
        for limit in COMPILE_LIMITS & set(dir(torch._dynamo.config)):
            setattr(torch._dynamo.config, limit, 64)
        module, x = plain(request), example(request, dtype_of(request))
        start = time.perf_counter()
        module = torch.compile(module, mode=mode, fullgraph=True, dynamic=False)
        with torch.no_grad():
            for _ in range(3):
                module(x)
        return Subject(module, x, time.perf_counter() - start, "sdpa", brings_graphs=request.device == "cuda")

    return build


def onnx_model(module: torch.nn.Module, x: torch.Tensor) -> bytes:
    """A module as ONNX (opset 17) for inputs of just x's shape, through PyTorch's TorchScript exporter; the module moves to the CPU, since
    on a GPU the exporter folds constants of both devices together and fails.

    Raises Missing without the onnx package, RuntimeError where something cannot be exported.
    """
    if importlib.util.find_spec("onnx") is None:
        raise Missing("the onnx package, which PyTorch's ONNX export needs, is not installed")
    module, x = module.cpu(), x.cpu()
    buffer = io.BytesIO()
    exporter = {"dynamo": False} if "dynamo" in inspect.signature(torch.onnx.export).parameters else {}
    try:
        torch.onnx.export(module, (x,), buffer, input_names=["x"], output_names=["features"], opset_version=17, **exporter)
    except torch.onnx.errors.OnnxExporterError as problem:
        raise RuntimeError(f"ONNX export failed: {problem}") from problem
    return buffer.getvalue()


def masked_attention(qkv: torch.Tensor, heads: int, causal: bool) -> torch.Tensor:
    """`ops.attention_reference` with the causal mask written out in qkv's dtype: the exporter writes is_causal as an fp32 mask, which no fp16 model takes."""
    batch, tokens = qkv.shape[:2]
    mask = torch.full((tokens, tokens), float("-inf"), device=qkv.device, dtype=qkv.dtype).triu(1) if causal else None
    query, key, value = qkv.reshape(batch, tokens, 3, heads, HEAD_DIM).permute(2, 0, 3, 1, 4).unbind(0)
    attended = torch.nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=mask)
    return attended.transpose(1, 2).reshape(batch, tokens, heads * HEAD_DIM)


def onnxruntime(request: Request) -> Subject:
    """Our plain encoder through ONNX in ONNX Runtime.

    On the CPU inputs and outputs are NumPy's, as its users have them; on a GPU they are bound where they lie, and a call
    is a replay of its own CUDA graph where it can make one.
    """
    if importlib.util.find_spec("onnxruntime") is None:
        raise Missing("onnxruntime is not installed")
    import onnxruntime as ort

    provider = "CUDAExecutionProvider" if request.device == "cuda" else "CPUExecutionProvider"
    if provider not in ort.get_available_providers():
        raise Missing(f"this onnxruntime has no {provider}")
    start = time.perf_counter()
    x = example(request, dtype_of(request))
    model, name = onnx_model(plain(request, DIFFERENTIABLE._replace(attention=masked_attention)), x), f"onnxruntime {ort.__version__}"
    if request.device == "cpu":
        session = ort.InferenceSession(model, providers=[provider])
        return Subject(lambda rows: session.run(None, {"x": rows.numpy()})[0], x, time.perf_counter() - start, name)
    if hasattr(ort, "preload_dlls"):
        ort.preload_dlls()  # CUDA's libraries, from where PyTorch has them
    try:
        run, own = bound(ort, model, request, x, "1"), True
    except Exception as problem:  # which one, depends on its version
        print(f"no CUDA graph in ONNX Runtime: {str(problem)[:300]}")
        run, own = bound(ort, model, request, x, "0"), False
    return Subject(run, x, time.perf_counter() - start, name, brings_graphs=own, uncapturable="" if own else "ONNX Runtime could not capture its own CUDA graph",
                   remark=wrong(run, x, request))


def bound(ort, model: bytes, request: Request, x: torch.Tensor, graph: str) -> Callable[[torch.Tensor], torch.Tensor]:
    """A session on the GPU with x and the features bound to their memory, warmed up; it serves x alone."""
    options = ort.SessionOptions()
    options.log_severity_level = 3
    session = ort.InferenceSession(model, options, providers=[("CUDAExecutionProvider", {"enable_cuda_graph": graph})])
    if "CUDAExecutionProvider" not in session.get_providers():
        raise Missing("onnxruntime's CUDAExecutionProvider does not load here")
    features = torch.empty(request.batch, dimensions_of(request.model).embed_dim, device="cuda", dtype=dtype_of(request))
    binding = session.io_binding()
    for bind, name, tensor in ((binding.bind_input, "x", x), (binding.bind_output, "features", features)):
        element = {torch.half: "float16", torch.float: "float32", torch.int32: "int32"}[tensor.dtype]
        bind(name, "cuda", 0, element, tuple(tensor.shape), tensor.data_ptr())

    def run(rows: torch.Tensor) -> torch.Tensor:
        session.run_with_iobinding(binding)
        return features

    for _ in range(3):
        run(x)
    return run


def tensorrt_onnx(request: Request) -> Subject:
    """The original `clip` encoder through ONNX and TensorRT's own parser: the road that this project does without."""
    dtype_of(request)
    if request.device == "cpu":
        raise Missing("TensorRT needs a GPU")
    if importlib.util.find_spec("tensorrt") is None:
        raise Missing("tensorrt is not installed")
    import tensorrt as trt

    x, logger, kept = example(request), trt.Logger(trt.Logger.ERROR), plan_file(request)
    if not kept.is_file():
        start = time.perf_counter()
        plan = onnx_plan(onnx_model(Original(request), x), request, logger)
        kept.parent.mkdir(parents=True, exist_ok=True)
        kept.with_suffix(".json").write_text(json.dumps({"build_s": time.perf_counter() - start}))
        kept.write_bytes(plan)
    plan, seconds = kept.read_bytes(), json.loads(kept.with_suffix(".json").read_text())["build_s"]
    runtime = trt.Runtime(logger)
    engine = runtime.deserialize_cuda_engine(plan)
    context = engine.create_execution_context()
    source, target = sorted((engine.get_tensor_name(index) for index in range(engine.num_io_tensors)),
                            key=lambda name: engine.get_tensor_mode(name) == trt.TensorIOMode.OUTPUT)
    features = torch.empty(tuple(engine.get_tensor_shape(target)), device="cuda")
    if (engine.get_tensor_dtype(source), engine.get_tensor_dtype(target)) != (trt.float32 if x.is_floating_point() else trt.int32, trt.float32):
        raise RuntimeError(f"the ONNX engine wants {engine.get_tensor_dtype(source)} and gives {engine.get_tensor_dtype(target)}")

    def run(rows: torch.Tensor) -> torch.Tensor:
        context.set_tensor_address(source, rows.data_ptr())
        context.set_tensor_address(target, features.data_ptr())
        if not context.execute_async_v3(torch.cuda.current_stream().cuda_stream):
            raise RuntimeError("TensorRT could not run the ONNX engine")
        return features

    run.keeps = runtime, engine  # a context needs both alive
    return Subject(run, x, seconds, "onnx" + at_level(request), f"{len(plan) / 2**20:.2f}", remark=wrong(run, x, request))


def plan_file(request: Request) -> Path:
    """Where the engine of an ONNX model is kept."""
    name = folder_name(request.model, request.precision, str(request.batch), "onnx")
    return Path(request.artifacts or temporary_root().name) / f"{name}-{request.encoder}-level_{request.level}-{request.tokens}.plan"


def onnx_plan(model: bytes, request: Request, logger) -> bytes:
    """A TensorRT engine of an ONNX model, serialised.  Raises RuntimeError where TensorRT refuses it."""
    import tensorrt as trt

    builder = trt.Builder(logger)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.EXPLICIT_BATCH))
    parser = trt.OnnxParser(network, logger)
    if not parser.parse(model):
        raise RuntimeError("TensorRT's parser refused the model: " + "; ".join(parser.get_error(index).desc() for index in range(parser.num_errors)))
    config = builder.create_builder_config()
    config.builder_optimization_level = request.level
    config.clear_flag(trt.BuilderFlag.TF32)
    if request.precision == "fp16":
        config.set_flag(trt.BuilderFlag.FP16)
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        raise RuntimeError("TensorRT could not build the engine of the ONNX model")
    return bytes(plan)


def at_level(request: Request) -> str:
    return "" if request.level == 3 else f", builder level {request.level}"


def wrong(run: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor, request: Request) -> str:
    """How the features of the first samples differ from our plain encoder's in fp32, where they do so beyond the precision's bound; else empty."""
    with torch.no_grad(), exact_fp32():
        actual = run(x)[:CHECKED].float()
        expected = plain(replace(request, precision="fp32"))(x[:CHECKED].float() if x.is_floating_point() else x[:CHECKED])
    smallest = torch.nn.functional.cosine_similarity(actual, expected, dim=1).min().item()
    return "" if smallest >= COSINE_BOUND[request.precision] else f"wrong: smallest cosine {smallest:.4f} against fp32"


@functools.cache
def temporary_root() -> tempfile.TemporaryDirectory:
    """Where artifacts are kept for this process alone."""
    return tempfile.TemporaryDirectory()


def existing(request: Request, attention: str, batch: str) -> tuple[Optional[Artifact], Path]:
    """The artifact of one compile in the request's folder, under the names of experiments.accuracy; None and its place where it is not there."""
    root = Path(request.artifacts or temporary_root().name)
    name = folder_name(request.model, request.precision, batch, attention) + ("" if request.level == 3 else f"-level_{request.level}")
    for folder in (root / name, root / f"{name}-{request.encoder}"):
        if (folder / MANIFEST).is_file() and request.encoder in (made := read_artifact(folder)).encoders:
            return made, folder
    return None, folder


def artifact_of(request: Request, attention: str, batch: str) -> Artifact:
    """The artifact of one compile: the one that exists, else made now.  Raises Missing where it cannot be made here."""
    made, folder = existing(request, attention, batch)
    if made is not None:
        return made
    try:
        return pipeline.compile(model=request.model, weights=request.weights, precision=request.precision, batch=batch, encoder=request.encoder,
                                backend="tensorrt" if request.device == "cuda" else "torchscript", attention=attention, verify=False,
                                optimization_level=request.level, output=folder)
    except UserError as problem:
        raise Missing(str(problem)) from problem


def is_built(backend: str, request: Request) -> bool:
    """Whether a backend needs to build nothing that takes minutes: it is none of TensorRT's, or its engine exists."""
    if backend == "tensorrt_onnx":
        return plan_file(request).is_file()
    if not backend.startswith("clip_ttrt"):
        return True
    _, _, attention, *ranged = backend.split("_")
    return existing(request, attention, str(BatchRange.parse(request.batches if ranged else request.batch)))[0] is not None


def load_encoder(made: Artifact, encoder: str) -> torch.jit.ScriptModule:
    """One encoder's module of an artifact, loaded anew."""
    alone = {**made.manifest, "modules": {encoder: made.manifest["modules"][encoder]}}
    return load_modules(replace(made, manifest=alone))[encoder]


@functools.lru_cache(maxsize=1)
def loaded(folder: Path, encoder: str) -> torch.jit.ScriptModule:
    """As `load_encoder`, the last one kept: rows of one batch range share it."""
    return load_encoder(read_artifact(folder), encoder)


def clip_ttrt(attention: str, ranged: bool) -> Callable[[Request], Subject]:
    """Our artifact's module, for one static batch or for a batch range: TensorRT on a GPU, TorchScript on the CPU."""
    def build(request: Request) -> Subject:
        if request.device == "cpu" and (attention == "plugin" or request.precision == "fp16"):
            raise Missing(f"{attention} in {request.precision} needs a GPU")
        batches = BatchRange.parse(request.batches if ranged else request.batch)
        if not batches.minimum <= request.batch <= batches.maximum:
            raise Missing(f"batch {request.batch} is outside the range {batches}")
        made = artifact_of(request, attention, str(batches))
        module, facts = loaded(made.folder, request.encoder), made.manifest["modules"][request.encoder]
        if request.encoder == "text" and request.tokens != dimensions_of(request.model).context_length:
            raise Missing("an artifact takes the full text length, to which it pads; experiments.text_length has the others")
        x = example(request)
        kind = facts.get("attention", made.manifest["attention"]) + (f" {batches}" if ranged else "") + at_level(request)
        remark = {True: "", False: "wrong: failed its verification", None: ""}[made.verified]
        if made.verified is None and request.device == "cuda":
            remark = wrong(module, x, request)
        return Subject(module, x, facts["build_seconds"], kind, str(facts.get("engine_mib", facts["mib"])), remark=remark,
                       load_again=lambda: load_encoder(made, request.encoder))

    return build


BACKENDS: dict[str, Callable[[Request], Subject]] = {
    "clip_eager": clip_eager,
    "eager_sdpa": eager_sdpa,
    "torch_compile_reduce_overhead": torch_compile("reduce-overhead"),
    "torch_compile_max_autotune": torch_compile("max-autotune"),
    "onnxruntime": onnxruntime,
    "tensorrt_onnx": tensorrt_onnx,
    "clip_ttrt_native": clip_ttrt("native", ranged=False),
    "clip_ttrt_plugin": clip_ttrt("plugin", ranged=False),
    "clip_ttrt_native_range": clip_ttrt("native", ranged=True),
    "clip_ttrt_plugin_range": clip_ttrt("plugin", ranged=True),
}
