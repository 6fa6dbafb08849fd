"""The seam to TensorRT: the only file that imports `torch_tensorrt`, `tensorrt` or `tensorrt_rtx`.

`load_runtime` makes `torch.jit.load` know engines, without the compiler.  `build` makes a graph
one engine on a GPU through Torch-TensorRT's `convert_module`.  `construct` and `Construction.plan`
take the same settings, graph and converters as far as they go without a GPU: a network, and the
plan that TensorRT-RTX builds of it for a named GPU.

Nothing here asks for a version: a setting is passed where Torch-TensorRT's dataclass has it.
"""
import functools
import importlib
import logging
import os
import shutil
import tempfile
import threading
import warnings
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from importlib.metadata import files
from pathlib import Path
from types import ModuleType
from typing import Any, Callable, Iterator, Optional

import torch
from torch import fx

from clip_ttrt import deprecations, stack
from clip_ttrt.errors import UserError
from clip_ttrt.options import BatchRange

# Backend -> the Python package of its TensorRT, and the distribution of its Torch-TensorRT.
PACKAGES = {"tensorrt": ("tensorrt", "torch-tensorrt"), "rtx": ("tensorrt_rtx", "torch-tensorrt-rtx")}
LOGGER = "torch_tensorrt [TensorRT Conversion Context]"  # where Torch-TensorRT says what TensorRT says
OUT_OF_MEMORY = ("out of memory", "outofmemory", "insufficient memory", "cuda error 2",
                 "cuda failure: 2", "memory allocation")
SHOWN_ERRORS = 4


class EngineError(RuntimeError):
    """TensorRT could not build the engine; the message holds what TensorRT said."""


def installed_backend() -> Optional[str]:
    """`tensorrt` or `rtx`, by which Torch-TensorRT is installed; None where none is, or both, which cannot be."""
    found = stack.versions()
    names = [name for name, (_, wheel) in PACKAGES.items() if wheel in found]
    return names[0] if len(names) == 1 else None


@functools.cache
def load_runtime(name: str) -> None:
    """Load the runtime of a backend, `tensorrt` or `rtx`, so that `torch.jit.load` knows its engines.

    That is TensorRT's library and Torch-TensorRT's own: importing the package takes seconds and
    is needed only to build.  A later `import torch_tensorrt` finds the same library loaded.
    Raises UserError where they cannot be loaded.
    """
    package, wheel = PACKAGES[name]
    try:
        importlib.import_module(package)  # loads libnvinfer or its like, which the runtime links
        torch.ops.load_library(str(runtime_library(wheel)))
    except (ImportError, OSError) as problem:
        raise UserError(f"{package} cannot be loaded ({problem}); install it again") from problem


def register_if_possible() -> Optional[str]:
    """`load_runtime` of what is installed, where a GPU answers; what goes wrong is a warning.

    Returns the backend whose engines `torch.jit.load` knows then, if any.
    """
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
    """The library in a distribution that holds Torch-TensorRT's runtime, the one that its own import takes."""
    for name in ("libtorchtrt.so", "libtorchtrt_runtime.so"):
        for file in files(wheel) or ():
            if file.name == name and (path := Path(file.locate())).is_file():
                return path
    raise ImportError(f"{wheel} holds no libtorchtrt.so")


@contextmanager
def python_warnings_kept() -> Iterator[None]:
    """Python's warnings stay warnings: `torch_tensorrt` hands those of the whole process to logging."""
    show = warnings.showwarning
    try:
        yield
    finally:
        logging.captureWarnings(False)
        warnings.showwarning = show


@functools.cache
def _torch_tensorrt() -> ModuleType:
    """Torch-TensorRT, imported, with the parts that are used here."""
    with python_warnings_kept():
        module = importlib.import_module("torch_tensorrt")
        for part in ("_settings", "conversion._conversion", "conversion._TRTInterpreter",
                     "conversion._ConverterRegistry"):
            importlib.import_module(f"torch_tensorrt.dynamo.{part}")
    return module


@functools.cache
def api() -> ModuleType:
    """TensorRT's Python module: `tensorrt`, or `tensorrt_rtx` in its place."""
    _torch_tensorrt()
    return importlib.import_module("tensorrt")


def _dynamo(path: str) -> Any:
    """Something of `torch_tensorrt.dynamo` by its dotted path, such as `_settings.CompilationSettings`."""
    _torch_tensorrt()
    module, name = path.rsplit(".", 1)
    return getattr(importlib.import_module(f"torch_tensorrt.dynamo.{module}"), name)


@dataclass
class Build:
    """What is known of the network that is being made: one at a time in a process."""

    errors: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    layers: int = 0  # constants not counted
    held: list[Any] = field(default_factory=list)  # what the network points to


class _Collector(logging.Handler):
    def __init__(self, build: Build):
        super().__init__(logging.WARNING)
        self.build = build

    def emit(self, record: logging.LogRecord) -> None:
        kept = self.build.errors if record.levelno >= logging.ERROR else self.build.warnings
        kept.append(record.getMessage())


_lock = threading.RLock()
_current: Optional[Build] = None


@contextmanager
def building() -> Iterator[Build]:
    """The one build of this moment: collects what TensorRT logs meanwhile, instead of its being printed."""
    global _current
    with _lock, python_warnings_kept():
        log, build = logging.getLogger(LOGGER), Build()
        collector, propagate, level = _Collector(build), log.propagate, log.level
        log.addHandler(collector)
        log.propagate = False
        log.setLevel(logging.WARNING)
        _current = build
        try:
            yield build
        finally:
            _current = None
            log.removeHandler(collector)
            log.propagate = propagate
            log.setLevel(level)


@contextmanager
def builder_kept() -> Iterator[Any]:
    """A builder of TensorRT's that lasts over several builds.

    The first of a process takes seconds, in which TensorRT reads its kernels, and the last to go
    takes them along.
    """
    logger = importlib.import_module("torch_tensorrt.logging").TRT_LOGGER  # of all builders
    builder = api().Builder(logger)
    yield builder


def hold(value: Any) -> Any:
    """Keep a reference to something until the engine is built; returns it."""
    if _current is not None:
        _current.held.append(value)
    return value


Converter = Callable[[Any, Any, tuple, dict, str], Any]


def converter(target: Any, valid: Callable[[fx.Node], bool] = lambda node: True):
    """Register a converter for one of our ops, for any batch; valid: whether it takes a node."""
    register = _dynamo("conversion._ConverterRegistry.dynamo_tensorrt_converter")

    def decorate(convert: Converter) -> Converter:
        @functools.wraps(convert)
        def counted(ctx, target, args, kwargs, name):
            result = convert(ctx, target, args, kwargs, name)
            if _current is not None:
                _current.layers = count_layers(ctx.net)
            return result

        return register(target, capability_validator=lambda node, settings: valid(node),
                        supports_dynamic_shapes=True)(counted)

    return decorate


def count_layers(network: Any) -> int:
    """How many layers a network has, constants not counted."""
    constant = api().LayerType.CONSTANT
    return sum(network.get_layer(i).type != constant for i in range(network.num_layers))


def _settings(precision: str, optimization_level: int, timing_cache: Optional[Path]) -> Any:
    """Torch-TensorRT's settings of a build, as far as its version knows them."""
    kind = _dynamo("_settings.CompilationSettings")
    known = {each.name for each in fields(kind)}
    wanted = {
        "use_explicit_typing": True,  # types are the graph's
        "disable_tf32": precision != "tf32",
        "optimization_level": optimization_level,
        "immutable_weights": True,
        "require_full_compilation": True,
        "min_block_size": 1,
        "use_python_runtime": False,
        "timing_cache_path": str(timing_cache) if timing_cache else "",
    }
    return kind(**{name: value for name, value in wanted.items() if name in known})


@contextmanager
def _registry_settings(settings: Any) -> Iterator[None]:
    """Our settings for the converters, which are of the whole process, and then what they were."""
    converters = _dynamo("conversion._ConverterRegistry.DYNAMO_CONVERTERS")
    before, disallowed = converters.compilation_settings, converters.disallowed_targets
    converters.set_compilation_settings(settings)
    try:
        yield
    finally:
        converters.compilation_settings, converters.disallowed_targets = before, disallowed


def _input(example: torch.Tensor, batch: BatchRange) -> Any:
    """The specification of an engine's one input."""
    kind, shape = _torch_tensorrt().Input, tuple(example.shape[1:])
    if batch.static:
        return kind(shape=(batch.optimal, *shape), dtype=example.dtype)
    return kind(min_shape=(batch.minimum, *shape), opt_shape=(batch.optimal, *shape),
                max_shape=(batch.maximum, *shape), dtype=example.dtype)


@dataclass(frozen=True)
class Engine:
    """One built engine as a module that runs it, and facts about it."""

    module: torch.nn.Module  # one CUDA tensor -> features
    plan_bytes: int
    layers: int  # of the network, constants not counted
    warnings: tuple[str, ...]
    timing_cache: Optional[str]  # the file that served and was written, if any


def build(graph: fx.GraphModule, example: torch.Tensor, batch: BatchRange, precision: str,
          optimization_level: int = 3, timing_cache: Optional[str] = None, name: str = "") -> Engine:
    """Build one engine of a lowered graph on the current GPU.

    example: one input of any batch, whose other dimensions and dtype (float32 or int32) the engine
    takes.  batch: static or a range.  precision: decides on TF32 only; types are the graph's.
    timing_cache: a file, `none`, or by default one for this GPU and TensorRT in the user's cache.
    Raises UserError where the GPU's memory does not suffice, EngineError for all else that
    TensorRT refuses, in its words.
    """
    from clip_ttrt import converters  # noqa: F401  (registers them)

    path = timing_cache_path(timing_cache)
    with TimingCache(path) as cache, building() as build:
        settings = _settings(precision, optimization_level, cache.draft)
        convert_module = _dynamo("conversion._conversion.convert_module")
        with _registry_settings(settings):
            try:
                module = convert_module(graph, [_input(example, batch)], settings, name)
            except torch.cuda.OutOfMemoryError:
                raise
            except Exception as problem:  # an assertion, where TensorRT gave no engine
                raise_build_error(build.errors, problem)
        cache.publish()
        torch.cuda.empty_cache()
    plan = len(module.serialized_engine)
    return Engine(module, plan, build.layers, tuple(build.warnings), None if path is None else str(path))


def raise_build_error(errors: list[str], problem: Optional[Exception] = None) -> None:
    """Turn what TensorRT said into UserError (out of GPU memory) or EngineError."""
    said = " | ".join(errors[-SHOWN_ERRORS:]) or str(problem or "") or "it gave no reason"
    if any(mark in said.lower() for mark in OUT_OF_MEMORY):
        free, total = torch.cuda.mem_get_info()
        raise UserError(f"out of GPU memory while TensorRT built the engine ({free >> 20} of {total >> 20} MiB are free now); "
                        f"use a smaller batch or free the GPU") from problem
    raise EngineError(f"TensorRT could not build the engine: {said}") from problem


def timing_cache_path(asked: Optional[str]) -> Optional[Path]:
    """Where kernel timings are kept between builds; None for `none`, and for TensorRT-RTX, which times no kernels."""
    if asked == "none" or is_rtx():
        return None
    if asked is not None:
        return Path(asked)
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "clip_ttrt"
    gpu = torch.cuda.get_device_name().replace(" ", "-").replace("/", "-")
    return root / f"timing-{api().__version__}-{gpu}.cache"


def is_rtx() -> bool:
    """Whether it is TensorRT-RTX that stands in for TensorRT in this process."""
    return bool(_torch_tensorrt().ENABLED_FEATURES.tensorrt_rtx)


class TimingCache:
    """A build's own copy of the timing cache, which takes the file's place in one step.

    Whatever is wrong with the file, or with writing it, costs time only.
    """

    def __init__(self, path: Optional[Path]):
        self.path = path

    def __enter__(self) -> "TimingCache":
        self.folder = Path(tempfile.mkdtemp(prefix="clip_ttrt-timing-"))
        self.draft = self.folder / "timing.cache"
        try:
            if self.path is not None and usable_timing_cache(content := self.path.read_bytes()):
                self.draft.write_bytes(content)
        except OSError:
            pass
        return self

    def publish(self) -> None:
        """Put what was measured where the next build finds it."""
        if self.path is None or not self.draft.is_file():
            return
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=self.path.parent, prefix=".timing-") as beside:
                os.replace(shutil.copy(self.draft, beside), self.path)
        except OSError:
            pass

    def __exit__(self, *failure: Any) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)


def usable_timing_cache(content: bytes) -> bool:
    """Whether TensorRT takes these bytes as a timing cache of its own version and this GPU."""
    with building(), builder_kept() as builder:
        config = builder.create_builder_config()
        cache = config.create_timing_cache(content)
        return cache is not None and bool(config.set_timing_cache(cache, False))


def to_torchscript(engine: Engine, example: torch.Tensor) -> torch.jit.ScriptModule:
    """An engine as a TorchScript module, in which it is embedded; example: a CUDA input within its batch range."""
    with torch.no_grad(), deprecations.hidden():
        return torch.jit.trace(engine.module, (example,), check_trace=False)


# Without a GPU


@dataclass
class Construction:
    """A network as `build` would hand it to TensorRT."""

    network: Any
    layers: int  # constants not counted
    warnings: tuple[str, ...]
    interpreter: Any
    build: Build

    def plan(self, capability: str) -> bytes:
        """The plan that TensorRT-RTX builds for a GPU of a compute capability, such as "8.6".

        Raises EngineError with TensorRT's words where it refuses.
        """
        trt, builder = api(), self.interpreter.builder
        config = builder.create_builder_config()
        config.num_compute_capabilities = 1
        named = getattr(trt.ComputeCapability, f"SM{capability.replace('.', '')}")
        config.set_compute_capability(named, 0)
        for profile in self.interpreter.optimization_profiles or ():
            config.add_optimization_profile(profile)
        with building() as build:
            plan = builder.build_serialized_network(self.network, config)
        if plan is None:
            raise_build_error(build.errors)
        return bytes(plan)


def construct(graph: fx.GraphModule, example: torch.Tensor, batch: BatchRange, precision: str) -> Construction:
    """The network of a lowered graph, from the settings and converters of `build`; arguments as there.

    Raises EngineError where an operation has no converter or a layer is refused.
    """
    from clip_ttrt import converters  # noqa: F401  (registers them)

    with building() as build:
        settings = _settings(precision, 3, None)
        output = [node for node in graph.graph.nodes if node.op == "output"][0].args[0]
        interpreter_of = _dynamo("conversion._TRTInterpreter.TRTInterpreter")
        with _registry_settings(settings):
            try:
                interpreter = interpreter_of(graph, [_input(example, batch)],
                                             output_dtypes=[output.meta["val"].dtype],
                                             compilation_settings=settings)
                interpreter._construct_trt_network_def()
            except Exception as problem:
                raise_build_error(build.errors, problem)
    network = interpreter.ctx.net
    return Construction(network, count_layers(network), tuple(build.warnings), interpreter, build)
