"""What a compile is asked for: one frozen dataclass, filled by the API or by argparse; each default is written here once."""
from dataclasses import dataclass
from pathlib import Path
from typing import Optional, Union

from clip_ttrt.errors import UserError
from clip_ttrt.models import dimensions_of

PRECISIONS = ("fp32", "tf32", "fp16", "bf16")
ENCODER_CHOICES = ("image", "text", "both")
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
            raise UserError(f"bad batch range {self}: it needs 1 <= MIN <= OPT <= MAX <= {LARGEST_BATCH}")

    def __str__(self) -> str:
        return str(self.optimal) if self.static else f"{self.minimum}:{self.optimal}:{self.maximum}"

    @property
    def static(self) -> bool:
        return self.minimum == self.maximum

    @classmethod
    def parse(cls, value: Union[int, str, "BatchRange"]) -> "BatchRange":
        """From N or MIN:OPT:MAX.  Raises UserError for anything else."""
        if isinstance(value, BatchRange):
            return value
        parts = str(value).split(":")
        if len(parts) not in (1, 3) or not all(part.isascii() and part.isdigit() for part in parts):
            raise UserError(f"bad batch range {value!r}: write one size, N, or MIN:OPT:MAX")
        sizes = [int(part) for part in parts]
        return cls(*(sizes * 3 if len(sizes) == 1 else sizes))


@dataclass(frozen=True)
class Options:
    """Everything that `compile` can be told.  Raises UserError for a value outside its choices."""

    model: str = "demo"
    weights: Optional[str] = None  # demo for the demo model, openai for OpenAI's
    precision: str = "fp16"
    batch: BatchRange = BatchRange(1, 32, 256)
    encoder: str = "both"
    backend: str = "auto"
    kernels: str = "auto"
    optimization_level: int = 3  # of TensorRT's builder, 0 to 5: lower builds faster, the engine may be slower
    timing_cache: Optional[str] = None  # a file, or `none`; by default one per GPU and TensorRT version in the user's cache folder
    output: Optional[Path] = None  # artifacts/MODEL-PRECISION
    verify: bool = True
    force: bool = False
    trust_weights: bool = False
    seed: int = 0

    def __post_init__(self):
        dimensions_of(self.model)
        for value, choices, what in ((self.precision, PRECISIONS, "precision"), (self.encoder, ENCODER_CHOICES, "encoder"),
                                     (self.backend, BACKENDS, "backend"), (self.kernels, KERNELS, "kernels")):
            if value not in choices:
                raise UserError(f"unknown {what} {value!r}; choices: {', '.join(choices)}")
        if self.optimization_level not in range(6):
            raise UserError(f"bad optimization level {self.optimization_level!r}: TensorRT's builder has 0 to 5")

    @property
    def encoders(self) -> tuple[str, ...]:
        return ("image", "text") if self.encoder == "both" else (self.encoder,)

    @property
    def folder(self) -> Path:
        """The artifact's folder."""
        return Path(self.output) if self.output is not None else Path("artifacts") / f"{self.model.replace('/', '-')}-{self.precision}"
