"""Lowered graph -> one TensorRT engine -> TorchScript.  Every TensorRT build call is here.

Torch-TensorRT 2.2's own driver partitions the graph, allows one precision flag, keeps no timing
cache and traces with concrete batches; this driver uses its interpreter, converters and runtime
module, and sets the builder itself.  Needs a CUDA GPU: import it from the TensorRT backend only.
"""
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Optional

import tensorrt as trt
import torch
import torch_tensorrt
from torch import fx
from torch_tensorrt.dynamo._settings import CompilationSettings
from torch_tensorrt.dynamo.conversion._TRTInterpreter import TRTInterpreter
from torch_tensorrt.dynamo.runtime import TorchTensorRTModule

from clip_ttrt import converters, fusion, recipe
from clip_ttrt.errors import UserError
from clip_ttrt.options import BatchRange
from clip_ttrt.recipe import Recipe

# Where a recipe allows cuBLAS's matrix products.
TACTIC_SOURCES = (trt.TacticSource.CUBLAS, trt.TacticSource.CUBLAS_LT, trt.TacticSource.EDGE_MASK_CONVOLUTIONS, trt.TacticSource.JIT_CONVOLUTIONS)

OUT_OF_MEMORY = ("out of memory", "outofmemory", "insufficient memory", "cuda error 2", "cuda failure: 2", "memory allocation")


class EngineError(RuntimeError):
    """TensorRT could not build the engine; the message holds what TensorRT said."""


class Log(trt.ILogger):
    """Keeps TensorRT's warnings and errors instead of printing them."""

    def __init__(self):
        trt.ILogger.__init__(self)
        self.errors: list[str] = []
        self.warnings: list[str] = []

    def log(self, severity, message):
        if severity <= trt.ILogger.ERROR:
            self.errors.append(message)
        elif severity == trt.ILogger.WARNING:
            self.warnings.append(message)


LOG = Log()  # TensorRT keeps the first logger of a process for good


@dataclass(frozen=True)
class Engine:
    """A built engine: its serialised bytes and the names of its one input and output."""

    plan: bytes
    input_name: str
    output_name: str
    layers: int
    warnings: tuple[str, ...]
    recipe: Recipe


class Interpreter(TRTInterpreter):
    """Torch-TensorRT's graph walker with our logger, builder settings and timing cache."""

    def __init__(self, module: fx.GraphModule, spec: torch_tensorrt.Input, attention: str, batch: BatchRange, how: Recipe):
        LOG.errors.clear()
        LOG.warnings.clear()
        builder = trt.Builder(LOG)  # before the base class makes one with a logger of its own
        settings = CompilationSettings(truncate_long_and_double=True)
        super().__init__(module, [spec], output_dtypes=[torch.float32], compilation_settings=settings)
        self.builder = builder
        network = self.builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.EXPLICIT_BATCH))
        self.ctx = converters.Context(network, settings, attention=attention, batch=batch, recipe=how)
        if self.optimization_profiles is not None:
            self.optimization_profiles = [self.builder.create_optimization_profile()]

    def build(self, precision: str, optimization_level: int, timing_cache: Optional[Path]) -> Engine:
        fx.Interpreter.run(self, enable_io_processing=False)
        torch.cuda.empty_cache()  # TensorRT's, now that the linear layers are measured
        config = self.builder.create_builder_config()
        config.builder_optimization_level = optimization_level
        config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
        (config.clear_flag if precision == "fp32" else config.set_flag)(trt.BuilderFlag.TF32)
        if precision == "fp16":
            config.set_flag(trt.BuilderFlag.FP16)
        if self.ctx.recipe.cublas:
            config.set_preview_feature(trt.PreviewFeature.DISABLE_EXTERNAL_TACTIC_SOURCES_FOR_CORE_0805, False)
            config.set_tactic_sources(sum(1 << int(source) for source in TACTIC_SOURCES))
        if self.ctx.recipe.powers:
            config.set_preview_feature(trt.PreviewFeature.FASTER_DYNAMIC_SHAPES_0805, False)
        for profile in self.optimization_profiles or ():
            config.add_optimization_profile(profile)
        cache = config.create_timing_cache(timing_cache.read_bytes() if timing_cache and timing_cache.is_file() else b"")
        config.set_timing_cache(cache, ignore_mismatch=False)
        plan = self.builder.build_serialized_network(self.ctx.net, config)
        if plan is None:
            raise_build_error(LOG.errors)
        if timing_cache is not None:
            if timing_cache.is_file():  # what other builds have found meanwhile
                cache.combine(config.create_timing_cache(timing_cache.read_bytes()), ignore_mismatch=False)
            save_timing_cache(timing_cache, bytes(cache.serialize()))
        return Engine(bytes(plan), self._input_names[0], self._output_names[0], self.ctx.net.num_layers, tuple(LOG.warnings), self.ctx.recipe)


def raise_build_error(errors: list[str]) -> None:
    """Turn what TensorRT said into UserError (out of GPU memory) or EngineError."""
    said = " | ".join(errors[-4:]) or "it gave no reason"
    if any(mark in said.lower() for mark in OUT_OF_MEMORY):
        free, total = torch.cuda.mem_get_info()
        raise UserError(f"out of GPU memory while TensorRT built the engine ({free >> 20} of {total >> 20} MiB are free now); "
                        f"use a smaller batch or free the GPU")
    raise EngineError(f"TensorRT could not build the engine: {said}")


def timing_cache_path() -> Path:
    """Where kernel timings are kept between builds, one file for each TensorRT version and GPU type."""
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "clip_ttrt"
    name = torch.cuda.get_device_name().replace(" ", "-").replace("/", "-")
    return root / f"timing-{trt.__version__}-{name}.cache"


def save_timing_cache(path: Path, content: bytes) -> None:
    """Replace the timing cache in one step; a cache that cannot be written costs only time."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            draft = Path(folder) / path.name
            draft.write_bytes(content)
            os.replace(draft, path)
    except OSError:
        return


def build_engine(module: fx.GraphModule, example: torch.Tensor, batch: BatchRange, precision: str, attention: str = "native",
                 optimization_level: int = 3, how: Optional[Recipe] = None) -> Engine:
    """Build one engine from a lowered graph.

    example: one input of any batch, whose other dimensions and dtype (float32 or int32) the engine
    takes.  batch: static or a range.  precision: fp32, tf32 or fp16.  attention: `native`, or
    `plugin` after `kernels.load`.  optimization_level: of TensorRT's builder, 0 to 5.  how: by default what
    `recipe.choose` says; the graph is changed where it asks for that.
    Raises UserError where the GPU's memory does not suffice or fp16 cannot hold a plugin's weight, EngineError for all else
    that TensorRT refuses.
    """
    shape = tuple(example.shape[1:])
    if batch.static:
        spec = torch_tensorrt.Input((batch.optimal, *shape), dtype=example.dtype)
    else:
        spec = torch_tensorrt.Input(min_shape=(batch.minimum, *shape), opt_shape=(batch.optimal, *shape),
                                    max_shape=(batch.maximum, *shape), dtype=example.dtype)
    how = recipe.choose(module, batch, precision, attention) if how is None else how
    if how.separate_mlps:
        fusion.separate_mlps(module)
    if how.row_maxima:
        fusion.cap_rows(module)
    return Interpreter(module, spec, attention, batch, how).build(precision, optimization_level, timing_cache_path())


def to_torchscript(engine: Engine, example: torch.Tensor, name: str) -> torch.jit.ScriptModule:
    """An engine as a TorchScript module, in which it is embedded; example: a CUDA input within its batch range."""
    runtime = TorchTensorRTModule(engine.plan, name=name, input_binding_names=[engine.input_name], output_binding_names=[engine.output_name],
                                  target_device=torch_tensorrt.Device(gpu_id=torch.cuda.current_device()))
    with torch.no_grad():
        return torch.jit.trace(runtime, (example,), check_trace=False)
