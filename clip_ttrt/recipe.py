"""How TensorRT is made to build an engine of its own kernels in fp16: what was measured to be fastest and right.

TensorRT 8.6 hands a transformer to a compiler of its own.  For a static batch it does well.  For a range it makes one set of
kernels for all sizes, of which those that treat every element alike are slow.  `experiments/native_range.py` measures every
recipe here, and some that were no gain (results/h100/native_range.csv).
"""
from dataclasses import dataclass

from torch import fx

from clip_ttrt import ops
from clip_ttrt.lowering import find_nodes
from clip_ttrt.options import BatchRange


@dataclass(frozen=True)
class Recipe:
    """What an engine is built with beyond its network."""

    cublas: bool = False  # TensorRT may choose cuBLAS's matrix products beside its own
    powers: bool = False  # of a range: compiled like a static engine for every power of two, in which smaller batches are padded
    row_maximum: bool = False  # of a range: QuickGELU with a maximum over each row, for which TensorRT has better kernels


def is_causal(module: fx.GraphModule) -> bool:
    """Whether a lowered graph's attention is causal."""
    return any(node.args[3] for node in find_nodes(module, ops.attention_rows))


def choose(module: fx.GraphModule, batch: BatchRange, precision: str, attention: str) -> Recipe:
    """The recipe for a lowered graph; precision and attention as for `engine.build_engine`.

    A static batch needs cuBLAS's products to be right (experiments/bugs/wrong_block_788_rows.py).  A range of an encoder with
    a causal mask is compiled for powers of two, which takes several times as long to build and pads what lies between them; so
    only where the size that it is tuned for is one.  One without a mask is not, since TensorRT then no longer fuses attention.
    """
    if precision != "fp16" or attention != "native":
        return Recipe()
    if batch.static:
        return Recipe(cublas=True)
    if not is_causal(module):
        return Recipe(row_maximum=True)
    return Recipe(cublas=True, powers=True) if is_power_of_two(batch.optimal) else Recipe()


def is_power_of_two(number: int) -> bool:
    return number & (number - 1) == 0
