"""Stock Torch-TensorRT as a bug report uses it: torch.export, then torch_tensorrt.dynamo.compile, nothing of ours registered.

Import of torch_tensorrt 2.2 raises where there is no GPU, so it is imported inside the functions.
"""
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Collection, Iterator, Optional

import torch
from torch import fx, nn

from clip_ttrt import backends
from experiments.bugs.finding import CannotRun


def require_tensorrt() -> None:
    """Raise CannotRun, naming what is missing, where TensorRT cannot build."""
    if not torch.cuda.is_available():
        raise CannotRun("no CUDA GPU answers, without which torch_tensorrt cannot be imported")
    if missing := backends.missing_packages():
        raise CannotRun(f"not installed: {', '.join(missing)}")


def compile_stock(module: nn.Module, example: torch.Tensor, precisions: Collection[torch.dtype] = (torch.float,),
                  batches: Optional[tuple[int, int, int]] = None) -> fx.GraphModule:
    """A module of one input as Torch-TensorRT compiles it: a graph of engines and of what stays in PyTorch.

    example: a CUDA input.  batches: minimum, optimum and maximum of a dynamic first dimension.
    """
    import torch_tensorrt

    if batches is None:
        exported, spec = torch.export.export(module, (example,)), example
    else:
        batch = torch.export.Dim("batch", min=batches[0], max=batches[2])
        exported = torch.export.export(module, (example,), dynamic_shapes=({0: batch},))
        shapes = dict(zip(("min_shape", "opt_shape", "max_shape"), ((size, *example.shape[1:]) for size in batches)))
        spec = torch_tensorrt.Input(**shapes, dtype=example.dtype)
    return torch_tensorrt.dynamo.compile(exported, inputs=[spec], enabled_precisions=set(precisions), truncate_long_and_double=True, min_block_size=1,
                                         output_format="graph_module")


def engines(compiled: fx.GraphModule) -> int:
    """How many engines a compiled graph holds."""
    from torch_tensorrt.dynamo.runtime import TorchTensorRTModule

    return sum(isinstance(child, TorchTensorRTModule) for child in compiled.children())


def left_in_pytorch(compiled: fx.GraphModule) -> list[str]:
    """Names of the operations that no engine took."""
    graphs = [compiled, *(child for child in compiled.children() if isinstance(child, fx.GraphModule))]
    return sorted({str(node.target) for graph in graphs for node in graph.graph.nodes if node.op == "call_function"})


@dataclass(frozen=True)
class Network:
    """What stock conversion asked TensorRT for: its layers by name, and the one precision that was enabled."""

    layers: tuple[str, ...]
    precision: torch.dtype


@contextmanager
def networks() -> Iterator[list[Network]]:
    """Collects the networks that are built while it is open."""
    from torch_tensorrt.dynamo.conversion._TRTInterpreter import TRTInterpreter

    run, found = TRTInterpreter.run, []

    def watched(self, *args, **kwargs):
        result = run(self, *args, **kwargs)
        network = self.ctx.net
        found.append(Network(tuple(network.get_layer(index).name for index in range(network.num_layers)), self.compilation_settings.precision))
        return result

    TRTInterpreter.run = watched
    try:
        yield found
    finally:
        TRTInterpreter.run = run


def keep_warnings():
    """A logger, the first of this process, whose `messages` collects TensorRT's warnings and errors from here on.

    TensorRT keeps the first logger of a process for good, so call this before anything is built, and keep what it returns.
    """
    import tensorrt as trt

    class Log(trt.ILogger):
        def __init__(self):
            trt.ILogger.__init__(self)
            self.messages: list[str] = []

        def log(self, severity, message):
            if severity <= trt.ILogger.WARNING:
                self.messages.append(message)

    log = Log()
    trt.Builder(log)
    return log


def cosine(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Smallest cosine between rows [N, D]."""
    return torch.nn.functional.cosine_similarity(actual.double(), expected.double(), dim=-1).min().item()
