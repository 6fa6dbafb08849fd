"""What bug scripts share: stock Torch-TensorRT, and how a script tells its verdict."""
import inspect
import re
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import nn

from clip_ttrt import stack
from experiments.record import provenance

STILL_WRONG, GONE, CANNOT_RUN = "still wrong", "gone", "cannot run"
VERDICT = re.compile(r"^Expected: (.*)\nActual: (.*)\n(.+)$", re.MULTILINE)
WHEELS = ("torch-tensorrt", "torch-tensorrt-rtx")


class Finding(NamedTuple):
    """Whether the bug showed, and one line each of what should have been and what was."""

    seen: bool
    expected: str
    actual: str


class CannotRun(RuntimeError):
    """The machine lacks what the script needs; the message says what."""


def show(document: str, reproduce: Callable[[], Finding], mended: str | None = None) -> int:
    """Run a script and print its verdict, as VERDICT reads it; returns 0.

    document: its docstring.  mended: the version of Torch-TensorRT that is known to have mended
    it.  Raises what the script raises but CannotRun.
    """
    about = ", ".join(f"{name} {value}" for name, value in provenance().items() if value)
    print(f"{document.strip()}\n\n{about}", flush=True)
    try:
        finding = reproduce()
        verdict = STILL_WRONG if finding.seen else f"mended in {mended}" if mended else GONE
    except CannotRun as reason:
        finding, verdict = Finding(False, "", str(reason)), CANNOT_RUN
    print(f"Expected: {finding.expected}\nActual: {finding.actual}\n{verdict}", flush=True)
    return 0


def require(gpu: bool = True) -> None:
    """Raise CannotRun where no Torch-TensorRT is installed, or no GPU answers."""
    if not set(WHEELS) & set(stack.versions()):
        raise CannotRun("Torch-TensorRT is not installed")
    if gpu and not torch.cuda.is_available():
        raise CannotRun("no CUDA GPU answers")


def settings(**wanted) -> dict:
    """Of the wanted settings those that this version's compile has."""
    import torch_tensorrt

    known = inspect.signature(torch_tensorrt.dynamo.compile).parameters
    return {name: value for name, value in wanted.items() if name in known}


class Apply(nn.Module):
    """A function of one tensor as a module."""

    def __init__(self, function: Callable[[torch.Tensor], torch.Tensor]):
        super().__init__()
        self.function = function

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.function(x)


def compile_stock(
    module: nn.Module, example: torch.Tensor, batches: tuple[int, int, int] | None = None, **more
) -> Callable[[torch.Tensor], torch.Tensor]:
    """A module of one input and output, as Torch-TensorRT compiles it, in the module's types.

    example: a CUDA input.  batches: minimum, optimum and maximum of a dynamic first dimension.
    more: further settings, of which those that this version has are used.
    """
    import tensorrt
    import torch_tensorrt

    module, spec, dynamic = module.eval().requires_grad_(False), example, None
    if batches is not None:
        low, best, high = ((size, *example.shape[1:]) for size in batches)
        shapes = {"min_shape": low, "opt_shape": best, "max_shape": high}
        spec = torch_tensorrt.Input(**shapes, dtype=example.dtype)
        dynamic = ({0: torch.export.Dim("batch", min=batches[0], max=batches[2])},)
    exported = torch.export.export(module, (example,), dynamic_shapes=dynamic)
    has_attention = hasattr(tensorrt.INetworkDefinition, "add_attention")
    options = {"use_explicit_typing": True, "decompose_attention": not has_attention,
               "min_block_size": 1, "truncate_double": True, **more}  # fmt: skip
    compiled = torch_tensorrt.dynamo.compile(exported, inputs=[spec], **settings(**options))

    def run(x: torch.Tensor) -> torch.Tensor:
        outputs = compiled(x)
        return outputs if isinstance(outputs, torch.Tensor) else outputs[0]

    return run
