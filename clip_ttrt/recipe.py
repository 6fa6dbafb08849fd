"""How TensorRT is made to build an engine of its own kernels: what was measured to be fastest and right.

TensorRT 8.6 hands a transformer to a compiler of its own.  For a static batch it does well.  For a range it makes one set of
kernels for all sizes, of which those that treat every element alike are slow; and on Hopper it lets a static engine's kernels
overlap with the product before them, those for a range not.  `experiments/native_range.py` measures every recipe here, and some
that were no gain (native_range.csv of results/h100 and results/h200).
"""
from dataclasses import dataclass

from torch import fx

from clip_ttrt import ops
from clip_ttrt.lowering import find_nodes
from clip_ttrt.models import HEAD_DIM
from clip_ttrt.options import BatchRange

# Widths of a transformer, and rows at the size that a range is tuned for, between which it was measured how MLPs are fastest.  Without
# separate ones TensorRT's products are wrong at some 800 to 1,000 rows, so those of few rows have them in any case.
MEDIUM, WIDE, FEW_ROWS = 768, 1024, 4096


@dataclass(frozen=True)
class Recipe:
    """What an engine is built with beyond its network."""

    cublas: bool = False  # TensorRT may choose cuBLAS's matrix products beside its own
    row_maxima: bool = False  # of a range: what its kernels are slow at with a maximum over each row (`fusion.cap_rows`)
    separate_mlps: bool = False  # of a range: the MLPs' first product with QuickGELU in its epilogue, as a convolution (`fusion.separate_mlps`)
    powers: bool = False  # of a range: compiled like a static engine for every power of two, in which smaller batches are padded


def choose(module: fx.GraphModule, batch: BatchRange, precision: str, attention: str) -> Recipe:
    """The recipe for a lowered graph; precision and attention as for `engine.build_engine`.

    A static batch in fp16 needs cuBLAS's products to be right (experiments/bugs/wrong_block_788_rows.py).  In a range, attention
    with a causal mask is three steps, whose products are faster with cuBLAS, and such an encoder is compiled for powers of two,
    which takes several times as long to build and pads what lies between them: so only where the size that the range is tuned
    for is one.  Without a mask attention is one kernel, which compiling for powers of two would take apart, and cuBLAS's products
    cost time at the size that the range is tuned for.
    """
    if attention != "native":
        return Recipe()
    if batch.static:
        return Recipe(cublas=precision == "fp16")
    if precision != "fp16":
        return Recipe(row_maxima=True)
    attentions = find_nodes(module, ops.attention_rows)
    tokens, heads, causal = attentions[0].args[1:4] if attentions else (0, 0, False)
    width, rows = heads * HEAD_DIM, batch.optimal * tokens
    if not causal:
        return Recipe(row_maxima=True, separate_mlps=width < WIDE or rows <= FEW_ROWS)
    if is_power_of_two(batch.optimal):
        return Recipe(cublas=True, powers=True)
    return Recipe(cublas=True, row_maxima=True, separate_mlps=width >= MEDIUM)


def is_power_of_two(number: int) -> bool:
    return number & (number - 1) == 0
