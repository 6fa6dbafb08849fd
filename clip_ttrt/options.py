"""What a compile is asked for: one frozen dataclass, which the command line's options follow."""
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Optional, Union

from clip_ttrt.errors import UserError
from clip_ttrt.models import MODELS, dimensions_of

PRECISIONS = ("fp32", "tf32", "fp16", "bf16")
BACKENDS = ("auto", "tensorrt", "rtx", "torchscript")
KERNELS = ("auto", "fused", "tensorrt")
LARGEST_BATCH = 65536


@dataclass(frozen=True)
class BatchRange:
    """Batch sizes that one module serves: smallest, the one tuned for, and largest."""

    minimum: int
    optimal: int
    maximum: int

    def __post_init__(self):
        if not 1 <= self.minimum <= self.optimal <= self.maximum <= LARGEST_BATCH:
            raise UserError(f"bad batch range {self}: it needs "
                            f"1 <= MIN <= OPT <= MAX <= {LARGEST_BATCH}")

    def __str__(self) -> str:
        return str(self.optimal) if self.static else f"{self.minimum}:{self.optimal}:{self.maximum}"

    @property
    def static(self) -> bool:
        return self.minimum == self.maximum

    @classmethod
    def parse(cls, value: Union[int, str, "BatchRange"]) -> "BatchRange":
        """From N or MIN:OPT:MAX.  Raises UserError for anything else."""
        parts = str(value).split(":")
        if len(parts) not in (1, 3) or not all(part.isascii() and part.isdigit() for part in parts):
            raise UserError(f"bad batch range {value!r}: write one size, N, or MIN:OPT:MAX")
        return cls(*map(int, parts * 3 if len(parts) == 1 else parts))


def option(default: Any, values: Union[str, tuple[str, ...]] = "", help: str = "") -> Any:
    """A field with what the command line tells of it; values: its choices, or their form."""
    return field(default=default, metadata={"values": values, "help": help})


@dataclass(frozen=True)
class Options:
    """Everything that `compile` can be told.  Raises UserError for a value outside its choices."""

    model: str = option("demo", "NAME", ", ".join(MODELS))
    weights: Optional[str] = option(None, "demo|openai|random|FILE",
                                    "default: demo for the demo model, openai for OpenAI's")
    precision: str = option("fp16", PRECISIONS)
    batch: Union[int, str, BatchRange] = option("1:32:256", "N|MIN:OPT:MAX", "one or a range")
    encoder: str = option("both", ("image", "text", "both"))
    backend: str = option("auto", BACKENDS, "auto: the best that runs here")
    kernels: str = option("auto", KERNELS, "fused: our plugins; tensorrt: TensorRT's own")
    optimization_level: int = option(3, "0..5", "of TensorRT's builder: lower builds faster")
    timing_cache: Optional[str] = option(None, "FILE|none", "of TensorRT's kernels (default: a "
                                         "file per GPU and TensorRT in the user's cache)")
    output: Union[None, str, Path] = option(None, "DIR", "default artifacts/MODEL-PRECISION")
    verify: bool = option(True, help="compare with the original model")
    force: bool = option(False, help="replace an existing artifact")
    trust_weights: bool = option(False, help="read a pickle not from OpenAI; it can run code")
    seed: int = option(0, "N", "for --weights random")

    def __post_init__(self):
        dimensions_of(self.model)
        object.__setattr__(self, "batch", BatchRange.parse(self.batch))
        for each in fields(self):
            value, choices = getattr(self, each.name), each.metadata["values"]
            if isinstance(choices, tuple) and value not in choices:
                raise UserError(f"unknown {each.name} {value!r}; choices: {', '.join(choices)}")
        if self.optimization_level not in range(6):
            raise UserError(f"bad optimization level {self.optimization_level!r}: "
                            "TensorRT's builder has 0 to 5")

    @property
    def encoders(self) -> tuple[str, ...]:
        return ("image", "text") if self.encoder == "both" else (self.encoder,)

    @property
    def folder(self) -> Path:
        """The artifact's folder."""
        name = f"{self.model.replace('/', '-')}-{self.precision}"
        return Path("artifacts", name) if self.output is None else Path(self.output)
