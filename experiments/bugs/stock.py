"""Stock Torch-TensorRT as a bug report uses it: torch.export, then torch_tensorrt.dynamo.compile, nothing of ours registered.

Import of torch_tensorrt 2.2 raises where there is no GPU, so it is imported inside the functions.
"""
import os
import sys
import tempfile
import traceback
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


class Compiled(nn.Module):
    """What Torch-TensorRT gives for a module of one input and one output: `inner` holds engines and what stays in PyTorch."""

    def __init__(self, inner: fx.GraphModule):
        super().__init__()
        self.inner = inner

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        outputs = self.inner(x)
        return outputs if isinstance(outputs, torch.Tensor) else outputs[0]


def compile_stock(module: nn.Module, example: torch.Tensor, precisions: Collection[torch.dtype] = (torch.float,),
                  batches: Optional[tuple[int, int, int]] = None) -> Compiled:
    """A module of one input and one output, as Torch-TensorRT compiles it.

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
    return Compiled(torch_tensorrt.dynamo.compile(exported, inputs=[spec], enabled_precisions=set(precisions), truncate_long_and_double=True,
                                                  min_block_size=1, output_format="graph_module"))


def engines(compiled: Compiled) -> int:
    """How many engines a compiled module holds."""
    from torch_tensorrt.dynamo.runtime import TorchTensorRTModule

    return sum(isinstance(child, TorchTensorRTModule) for child in compiled.inner.children())


def left_in_pytorch(compiled: Compiled) -> list[str]:
    """Names of the operations that no engine took."""
    graphs = [compiled.inner, *(child for child in compiled.inner.children() if isinstance(child, fx.GraphModule))]
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


@contextmanager
def said() -> Iterator[list[str]]:
    """Collects the lines that this process, TensorRT's own loggers included, writes while it is open; then prints them."""
    lines: list[str] = []
    kept = {number: os.dup(number) for number in (1, 2)}
    with tempfile.TemporaryFile("w+") as file:
        sys.stdout.flush()
        sys.stderr.flush()
        for number in kept:
            os.dup2(file.fileno(), number)
        try:
            yield lines
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            for number, original in kept.items():
                os.dup2(original, number)
                os.close(original)
            file.seek(0)
            lines += file.read().splitlines()
            print("\n".join(lines), flush=True)


def where(problem: BaseException) -> str:
    """An exception in one line: its type, its first words, and the innermost function of Torch-TensorRT that it went through."""
    first = next(iter(str(problem).strip().splitlines()), "").rstrip(":")[:120]
    frames = [frame for frame in traceback.extract_tb(problem.__traceback__) if "torch_tensorrt" in frame.filename]
    at = f" in {frames[-1].name} ({frames[-1].filename.split('torch_tensorrt/')[-1]})" if frames else ""
    return f"{type(problem).__name__}{at}: {first}"


def cosine(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Smallest cosine between rows [N, D]."""
    return torch.nn.functional.cosine_similarity(actual.double(), expected.double(), dim=-1).min().item()
