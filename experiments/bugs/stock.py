"""Stock Torch-TensorRT as a bug report uses it: torch.export, then its dynamo.compile."""
import inspect
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

import torch
from torch import fx, nn

from clip_ttrt import stack
from experiments.bugs.finding import CannotRun

WHEELS = ("torch-tensorrt", "torch-tensorrt-rtx")


def require_torch_tensorrt() -> None:
    """Raise CannotRun where no Torch-TensorRT is installed."""
    if not set(WHEELS) & set(stack.versions()):
        raise CannotRun("Torch-TensorRT is not installed")


def require_gpu() -> None:
    """Raise CannotRun, naming what is missing, where no engine can run."""
    require_torch_tensorrt()
    if not torch.cuda.is_available():
        raise CannotRun("no CUDA GPU answers")


@contextmanager
def importable() -> Iterator[None]:
    """Where no GPU is, answer what Torch-TensorRT asks of one while it is imported."""
    if torch.cuda.is_available():
        yield
        return
    capability = mock.patch("torch.cuda.get_device_capability", lambda *_, **__: (8, 6))
    with capability, mock.patch("torch.cuda.current_device", lambda: 0):
        yield


def settings(**wanted) -> dict:
    """Of the wanted settings those that this version's compile has."""
    import torch_tensorrt

    known = inspect.signature(torch_tensorrt.dynamo.compile).parameters
    return {name: value for name, value in wanted.items() if name in known}


class Compiled(nn.Module):
    """What Torch-TensorRT makes of a module of one input and output: `inner` holds engines."""

    def __init__(self, inner: fx.GraphModule):
        super().__init__()
        self.inner = inner

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        outputs = self.inner(x)
        return outputs if isinstance(outputs, torch.Tensor) else outputs[0]


def compile_stock(
    module: nn.Module,
    example: torch.Tensor,
    batches: tuple[int, int, int] | None = None,
    **more,
) -> Compiled:
    """A module of one input and output, as Torch-TensorRT compiles it, in the module's types.

    example: a CUDA input.  batches: minimum, optimum and maximum of a dynamic first dimension.
    more: further settings, of which those that this version has are used.
    """
    import tensorrt
    import torch_tensorrt

    module = module.eval().requires_grad_(False)
    if batches is None:
        exported, spec = torch.export.export(module, (example,)), example
    else:
        batch = torch.export.Dim("batch", min=batches[0], max=batches[2])
        exported = torch.export.export(module, (example,), dynamic_shapes=({0: batch},))
        names = ("min_shape", "opt_shape", "max_shape")
        sizes = [(size, *example.shape[1:]) for size in batches]
        shapes = dict(zip(names, sizes, strict=True))
        spec = torch_tensorrt.Input(**shapes, dtype=example.dtype)
    has_attention = hasattr(tensorrt.INetworkDefinition, "add_attention")
    options = {"use_explicit_typing": True, "decompose_attention": not has_attention, **more}
    return Compiled(
        torch_tensorrt.dynamo.compile(
            exported, inputs=[spec], min_block_size=1, truncate_double=True, **settings(**options)
        )
    )


def where(problem: BaseException) -> str:
    """An exception in one line, with the innermost function of Torch-TensorRT that it left."""
    first = next(iter(str(problem).strip().splitlines()), "").rstrip(":")[:120]
    frames = traceback.extract_tb(problem.__traceback__)
    frames = [frame for frame in frames if "torch_tensorrt" in frame.filename]
    at = ""
    if frames:
        at = f" in {frames[-1].name} ({frames[-1].filename.split('torch_tensorrt/')[-1]})"
    return f"{type(problem).__name__}{at}: {first}"


def cosine(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Smallest cosine between rows [N, D]."""
    return nn.functional.cosine_similarity(actual.double(), expected.double(), dim=-1).min().item()
