"""What a compile is asked for: one frozen dataclass, which the command line's options follow."""
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Optional, Union

from clip_ttrt.errors import UserError
from clip_ttrt.models import MODELS, dimensions_of

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
        if isinstance(value, BatchRange):
            return value
        parts = str(value).split(":")
        if len(parts) not in (1, 3) or not all(part.isascii() and part.isdigit() for part in parts):
            raise UserError(f"bad batch range {value!r}: write one size, N, or MIN:OPT:MAX")
        return cls(*map(int, parts * 3 if len(parts) == 1 else parts))


def option(default: Any, help: str, **more: Any) -> Any:
    """A field whose metadata are argparse's arguments for its option, `flag` being its name."""
    return field(default=default, metadata={"help": help, **more})


@dataclass(frozen=True)
class Options:
    """Everything that `compile` can be told.  Raises UserError for a value outside its choices."""

    model: str = option("demo", f"{', '.join(MODELS)} (default %(default)s)", metavar="NAME")
    weights: Optional[str] = option(None, "default: demo for the demo model, openai for OpenAI's",
                                    metavar="demo|openai|random|FILE")
    precision: str = option("fp16", "default %(default)s", choices=PRECISIONS)
    batch: Union[int, str, BatchRange] = option(
        "1:32:256", "one size, or a range (default %(default)s)", metavar="N|MIN:OPT:MAX")
    encoder: str = option("both", "default %(default)s", choices=ENCODER_CHOICES)
    backend: str = option("auto", "auto: the best that runs here, and it says why",
                          choices=BACKENDS)
    kernels: str = option("auto", "fused: our plugins; tensorrt: TensorRT's own; "
                                  "auto: fused wherever they can run", choices=KERNELS)
    optimization_level: int = option(
        3, "of TensorRT's builder (default %(default)s): lower builds faster, "
           "the engine may be slower", metavar="0..5", type=int)
    timing_cache: Optional[str] = option(
        None, "where TensorRT's kernel timings are kept "
              "(default: a file per GPU and TensorRT in the user's cache)", metavar="PATH|none")
    output: Union[None, str, Path] = option(
        None, "the artifact's folder (default artifacts/MODEL-PRECISION)", metavar="DIR")
    verify: bool = option(True, "skip the comparison with the original model",
                          flag="--no-verify", action="store_false")
    force: bool = option(False, "replace an existing artifact", action="store_true")
    trust_weights: bool = option(False, "read a pickle that is not OpenAI's; it can run code",
                                 action="store_true")
    seed: int = option(0, "for --weights random (default %(default)s)", metavar="N", type=int)

    def __post_init__(self):
        dimensions_of(self.model)
        object.__setattr__(self, "batch", BatchRange.parse(self.batch))
        for each in fields(self):
            value, choices = getattr(self, each.name), each.metadata.get("choices")
            if choices and value not in choices:
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
