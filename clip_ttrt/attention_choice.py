"""`--attention`: which attention each encoder gets, and why; `auto` decides from measurements.

`attention_measured.csv` holds milliseconds of whole encoders with native attention and with the plugins, made from the
results of `experiments.dynamic_batch` and `experiments.sweep` by `python -m experiments.choose_attention`.
"""
import csv
import functools
import math
from pathlib import Path
from typing import NamedTuple, Optional

from clip_ttrt import backends, plugin
from clip_ttrt.errors import UserError
from clip_ttrt.models import Dimensions
from clip_ttrt.options import BatchRange

MEASURED = Path(__file__).parent / "attention_measured.csv"
COLUMNS = ("gpu", "heads", "tokens", "causal", "batch", "native_ms", "plugin_ms", "commit")


class Choice(NamedTuple):
    """`plugin` or `native`, and why in one clause."""

    attention: str
    reason: str


class Shape(NamedTuple):
    """What an encoder's attention depends on beside the batch."""

    heads: int
    tokens: int
    causal: bool


def shape_of(dims: Dimensions, encoder: str) -> Shape:
    """The attention of a model's image or text encoder."""
    return Shape(dims.image_heads, dims.image_tokens, False) if encoder == "image" else Shape(dims.text_heads, dims.context_length, True)


@functools.cache
def measurements(path: Path = MEASURED) -> tuple[dict[str, str], ...]:
    """The rows of the table; none where there is no table."""
    if not path.is_file():
        return ()
    with open(path, newline="") as file:
        return tuple(csv.DictReader(file))


def nearest(shape: Shape, batch: BatchRange, gpu: str) -> Optional[dict[str, str]]:
    """The measurement of this shape on this GPU whose batch is most like this one: static or range alike first, then by size."""
    rows = [row for row in measurements() if row["gpu"] == gpu and Shape(int(row["heads"]), int(row["tokens"]), row["causal"] == "1") == shape]

    def distance(row: dict[str, str]) -> tuple[bool, float]:
        measured = BatchRange.parse(row["batch"])
        return measured.static != batch.static, abs(math.log(measured.optimal / batch.optimal))

    return min(rows, key=distance, default=None)


def choose(asked: str, backend: str, precision: str, dims: Dimensions, encoder: str, batch: BatchRange) -> Choice:
    """Which attention to compile an encoder with.

    asked: `auto`, `plugin` or `native`.  Raises UserError where the plugin is asked for and cannot be had.
    """
    if asked == "native":
        return Choice("native", "as asked")
    if backend != "tensorrt":
        obstacle = "it needs the TensorRT backend"
    elif precision != "fp16":
        obstacle = f"it computes in fp16, and {precision} was asked for"
    else:
        obstacle = plugin.lacking()
    if asked == "plugin" and obstacle:
        raise UserError(f"--attention plugin cannot be used: {obstacle}; or use --attention native or auto")
    if obstacle:
        return Choice("native", f"no plugins: {obstacle}")
    if asked == "plugin":
        return Choice("plugin", "as asked")
    gpu, shape = backends.gpu().get("name", ""), shape_of(dims, encoder)
    row = nearest(shape, batch, gpu)
    if row is None:
        return Choice("plugin", f"the plugin is built; {shape.heads} heads of {shape.tokens} tokens were not measured on {gpu or 'this machine'}")
    native, fused = float(row["native_ms"]), float(row["plugin_ms"])
    return Choice("plugin" if fused <= native else "native", f"measured on {gpu} at batch {row['batch']}: plugin {fused:g} ms, native {native:g} ms")
