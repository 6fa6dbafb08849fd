"""The seam to TensorRT: the only file that imports `torch_tensorrt`, `tensorrt` or `tensorrt_rtx`.

`load_runtime` makes `torch.jit.load` know engines, without the compiler.  `build` makes a graph
one engine on a GPU.  Nothing here asks for a version: a setting is passed where Torch-TensorRT's
dataclass has it.
"""
import functools
import importlib
import logging
import os
import shutil
import tempfile
import threading
import warnings
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, fields
from importlib.metadata import files
from pathlib import Path
from types import ModuleType
from typing import Any, Callable, Iterator, Optional

import torch
from torch import fx

from clip_ttrt import stack
from clip_ttrt.errors import UserError
from clip_ttrt.options import BatchRange

LOGGER = "torch_tensorrt [TensorRT Conversion Context]"  # says what TensorRT says
OUT_OF_MEMORY = ("out of memory", "outofmemory", "insufficient memory", "cuda error 2",
                 "cuda failure: 2", "memory allocation")
SHOWN_ERRORS = 4


class EngineError(RuntimeError):
    """TensorRT could not build the engine; the message holds what TensorRT said."""


def installed_backend() -> Optional[str]:
    """`tensorrt` or `rtx`, by the Torch-TensorRT that is installed; None where none or both are."""
    found = stack.versions()
    names = [name for name, (wheel, _) in stack.PACKAGES.items() if wheel in found]
    return names[0] if len(names) == 1 else None


@functools.cache
def load_runtime(name: str) -> None:
    """Load a backend's runtime, `tensorrt` or `rtx`, so that `torch.jit.load` knows its engines.

    That takes no seconds, as importing all of Torch-TensorRT does.  Raises UserError where
    TensorRT's library or Torch-TensorRT's own cannot be loaded.
    """
    wheel, runtime = stack.PACKAGES[name]
    package = runtime.replace("-", "_")
    try:
        importlib.import_module(package)  # loads libnvinfer or its like, which the runtime links
        torch.ops.load_library(str(runtime_library(wheel)))
    except (ImportError, OSError) as problem:
        raise UserError(f"{package} cannot be loaded ({problem}); install it again") from problem


def register_if_possible() -> Optional[str]:
    """`load_runtime` where a GPU answers, or a warning; returns the backend that is loaded then."""
    name = installed_backend()
    if name is None or not torch.cuda.is_available():
        return None
    try:
        load_runtime(name)
    except UserError as problem:
        warnings.warn(f"engines will not load: {problem}", stacklevel=3)
        return None
    return name


def runtime_library(wheel: str) -> Path:
    """A distribution's library with Torch-TensorRT's runtime, the one that its own import takes."""
    for name in ("libtorchtrt.so", "libtorchtrt_runtime.so"):
        for file in files(wheel) or ():
            if file.name == name and (path := Path(file.locate())).is_file():
                return path
    raise ImportError(f"{wheel} holds no libtorchtrt.so")


def _torch_tensorrt(path: str) -> Any:
    """Something of the package; Python's warnings, which its import logs, stay warnings."""
    module, _, name = f"torch_tensorrt.{path}".rpartition(".")
    show = warnings.showwarning
    try:
        return getattr(importlib.import_module(module), name)
    finally:
        logging.captureWarnings(False)
        warnings.showwarning = show


@functools.cache
def api() -> ModuleType:
    """TensorRT's Python module: `tensorrt`, or `tensorrt_rtx` in its place."""
    _torch_tensorrt("Input")  # the import that puts it there
    return importlib.import_module("tensorrt")


@dataclass
class Build:
    """What is known of the network that is being built: one at a time in a process."""

    errors: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    layers: int = 0  # constants not counted
    held: list[Any] = field(default_factory=list)  # what the network points to

    def collect(self, record: logging.LogRecord) -> bool:
        """A filter that keeps what TensorRT says and lets nothing through."""
        kept = self.errors if record.levelno >= logging.ERROR else self.warnings
        kept.append(record.getMessage())
        return False


_lock = threading.RLock()
_current = Build()


@contextmanager
def building() -> Iterator[Build]:
    """The one build of this moment, which collects what TensorRT logs; nothing is printed."""
    global _current
    with _lock:
        log, build = logging.getLogger(LOGGER), Build()
        level = log.level
        log.addFilter(build.collect)
        log.setLevel(logging.WARNING)
        _current = build
        try:
            yield build
        finally:
            _current = Build()
            log.removeFilter(build.collect)
            log.setLevel(level)


@contextmanager
def builder_kept() -> Iterator[Any]:
    """A builder over several builds: TensorRT forgets its kernels, slow to read, with the last."""
    builder = api().Builder(_torch_tensorrt("logging.TRT_LOGGER"))  # held by this frame
    yield builder


def hold(value: Any) -> Any:
    """Keep a reference to something until the engine is built; returns it."""
    _current.held.append(value)
    return value


def register(op: Any, convert: Callable[[Any, str, tuple], Any]) -> None:
    """Register the converter of one of our ops: network, name, arguments -> outputs."""
    def converter(ctx, target, args, kwargs, name):
        outputs = convert(ctx.net, name, args)
        kinds = [ctx.net.get_layer(i).type for i in range(ctx.net.num_layers)]
        _current.layers = len(kinds) - kinds.count(api().LayerType.CONSTANT)
        return outputs

    decorator = _torch_tensorrt("dynamo.conversion._ConverterRegistry.dynamo_tensorrt_converter")
    decorator(op, supports_dynamic_shapes=True)(converter)


@contextmanager
def converting(precision: str, optimization_level: int, timing_cache: str
               ) -> Iterator[tuple[Build, Any]]:
    """A build with our converters, and Torch-TensorRT's settings as far as its version knows them.

    What fails in it is raised in TensorRT's words.
    """
    from clip_ttrt import converters  # noqa: F401  (registers them)

    kind = _torch_tensorrt("dynamo._settings.CompilationSettings")
    known = {each.name for each in fields(kind)}
    wanted = {
        "use_explicit_typing": True,  # types are the graph's
        "disable_tf32": precision != "tf32",
        "optimization_level": optimization_level,
        "immutable_weights": True,
        "require_full_compilation": True,
        "min_block_size": 1,
        "use_python_runtime": False,
        "timing_cache_path": timing_cache,
    }
    settings = kind(**{name: value for name, value in wanted.items() if name in known})
    table = _torch_tensorrt("dynamo.conversion._ConverterRegistry.DYNAMO_CONVERTERS")
    with building() as build:
        before, disallowed = table.compilation_settings, table.disallowed_targets
        table.set_compilation_settings(settings)  # of the whole process
        try:
            yield build, settings
        except torch.cuda.OutOfMemoryError:
            raise
        except Exception as problem:  # an assertion, where TensorRT gave no engine
            raise_build_error(build.errors, problem)
        finally:
            table.compilation_settings, table.disallowed_targets = before, disallowed


def input_of(example: torch.Tensor, batch: BatchRange, shortest: int = 0) -> Any:
    """The specification of an engine's one input; as `build`."""
    *others, longest = example.shape[1:]
    shapes = {"min_shape": (batch.minimum, *others, shortest or longest),
              "opt_shape": (batch.optimal, *others, longest),
              "max_shape": (batch.maximum, *others, longest)}
    if shapes["min_shape"] == shapes["max_shape"]:
        shapes = {"shape": shapes["opt_shape"]}
    return _torch_tensorrt("Input")(**shapes, dtype=example.dtype)


def build(graph: fx.GraphModule, example: torch.Tensor, batch: BatchRange, precision: str,
          optimization_level: int = 3, timing_cache: Optional[str] = None, name: str = "",
          shortest: int = 0) -> tuple[torch.nn.Module, dict[str, Any]]:
    """Build one engine of a lowered graph on the current GPU.

    example: one input of any batch, whose other dimensions and dtype (float32 or int32) the engine
    takes.  batch: static or a range.  precision: decides on TF32 only; types are the graph's.
    timing_cache: a file, `none`, or by default one for this GPU and TensorRT in the user's cache.
    shortest: the least last dimension, where that is a range; it is tuned for the example's.
    Returns the module that runs it, one CUDA tensor -> features, and the manifest's facts.
    Raises UserError where the GPU's memory does not suffice, EngineError for all else that
    TensorRT refuses, in its words.
    """
    path = timing_cache_path(timing_cache)
    convert_module = _torch_tensorrt("dynamo.conversion._conversion.convert_module")
    with (timing_cache_draft(path) as draft,
          converting(precision, optimization_level, str(draft)) as (build, settings)):
        module = convert_module(graph, [input_of(example, batch, shortest)], settings, name)
    torch.cuda.empty_cache()
    return module, {
        "engine_mib": round(len(module.serialized_engine) / 2**20, 2),
        "network_layers": build.layers,
        "timing_cache": None if path is None else str(path),
        "warnings": build.warnings,
    }


def raise_build_error(errors: list[str], problem: Optional[Exception] = None) -> None:
    """Turn what TensorRT said into UserError (out of GPU memory) or EngineError."""
    said = " | ".join(errors[-SHOWN_ERRORS:]) or str(problem or "") or "it gave no reason"
    if any(mark in said.lower() for mark in OUT_OF_MEMORY):
        free, total = (size >> 20 for size in torch.cuda.mem_get_info())
        raise UserError(f"out of GPU memory while TensorRT built the engine ({free} of {total} MiB "
                        f"are free now); use a smaller batch or free the GPU") from problem
    raise EngineError(f"TensorRT could not build the engine: {said}") from problem


def timing_cache_path(asked: Optional[str]) -> Optional[Path]:
    """Where kernel timings are kept; None for `none`, and for TensorRT-RTX, which times none."""
    if asked == "none" or installed_backend() == "rtx":
        return None
    if asked is not None:
        return Path(asked)
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "clip_ttrt"
    gpu = torch.cuda.get_device_name().replace(" ", "-").replace("/", "-")
    return root / f"timing-{api().__version__}-{gpu}.cache"


@contextmanager
def timing_cache_draft(path: Optional[Path]) -> Iterator[Path]:
    """A build's copy of the timing cache, which replaces it at the end; trouble costs time only."""
    with tempfile.TemporaryDirectory(prefix="clip_ttrt-", ignore_cleanup_errors=True) as folder:
        draft = Path(folder, "timing.cache")
        with suppress(OSError):
            if path is not None and usable_timing_cache(content := path.read_bytes()):
                draft.write_bytes(content)
        yield draft
        with suppress(OSError):
            if path is not None and draft.is_file():
                path.parent.mkdir(parents=True, exist_ok=True)
                with tempfile.TemporaryDirectory(dir=path.parent, prefix=".timing-") as beside:
                    os.replace(shutil.copy(draft, beside), path)


def usable_timing_cache(content: bytes) -> bool:
    """Whether TensorRT takes these bytes as a timing cache of its own version and this GPU."""
    with building(), builder_kept() as builder:
        config = builder.create_builder_config()
        cache = config.create_timing_cache(content)
        return cache is not None and bool(config.set_timing_cache(cache, False))
