"""What commands are asked for: frozen dataclasses, which argparse follows."""
import re
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Optional, Sequence, Union

from clip_ttrt import families
from clip_ttrt.errors import UserError
from clip_ttrt.models import MODELS

PRECISIONS = ("fp32", "tf32", "fp16", "bf16", "fp8")
BACKENDS = ("auto", "tensorrt", "rtx", "torchscript")
KERNELS = ("auto", "fused", "tensorrt")
DECODE = ("auto", "exact", "gpu", "cpu", "pillow")
LARGEST_BATCH = 65536
LARGEST_EMBED_BATCH = 512  # beyond it an engine gains little


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


def check_choices(options: Any) -> None:
    """UserError for a field whose value is none of its choices."""
    for each in fields(options):
        value, choices = getattr(options, each.name), each.metadata["values"]
        if isinstance(choices, tuple) and value not in choices:
            raise UserError(f"unknown {each.name} {value!r}; choices: {', '.join(choices)}")


@dataclass(frozen=True)
class Options:
    """Everything that `compile` can be told.  Raises UserError for a value outside its choices."""

    model: str = option("demo", "NAME", f"{', '.join(MODELS)}, open_clip:NAME, hf-hub:ORG/NAME, or "
                                        "a folder of open_clip's or transformers' layout")
    weights: Optional[str] = option(None, "demo|openai|own|random|FILE", "default: demo for the "
                                    "demo model, openai for OpenAI's, own for those with their own")
    precision: str = option("fp16", PRECISIONS)
    calibrate: Union[None, str, Path, Sequence] = option(
        None, "FOLDER|LIST|captions.txt", "of fp8: at least 512 pictures and as many captions")
    scales: Union[None, str, Path] = option(None, "FILE", "of fp8: scales.json of an artifact")
    compare: bool = option(False, help="of fp8: build fp16, too, and say what fp8 brings")
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
        dims = families.find(self.model).dimensions
        if self.model not in MODELS and Path(self.model).is_dir():
            object.__setattr__(self, "model", str(Path(self.model).resolve()))
        object.__setattr__(self, "batch", BatchRange.parse(self.batch))
        check_choices(self)
        if self.optimization_level not in range(6):
            raise UserError(f"bad optimization level {self.optimization_level!r}: "
                            "TensorRT's builder has 0 to 5")
        paths = [self.calibrate] if isinstance(self.calibrate, (str, Path)) else self.calibrate
        object.__setattr__(self, "calibrate", tuple(map(str, paths or ())))
        for name in ("calibrate", "scales", "compare"):
            if getattr(self, name) and self.precision != "fp8":
                raise UserError(f"--{name} is for --precision fp8, not {self.precision}; "
                                "leave it away")
        if self.precision == "fp8" and "image" in self.encoders and dims.is_resnet:
            raise UserError(f"fp8 is for a transformer's linear layers, and {self.model}'s image "
                            "encoder is a ResNet; use --precision fp16, or --encoder text")
        if self.precision == "fp8" and self.model != "demo" and not (self.calibrate or self.scales):
            raise UserError("fp8 is calibrated: give --calibrate a folder or list of pictures and "
                            "a .txt of captions, at least 512 of each, or --scales FILE")

    @property
    def encoders(self) -> tuple[str, ...]:
        return ("image", "text") if self.encoder == "both" else (self.encoder,)

    @property
    def folder(self) -> Path:
        """The artifact's folder."""
        name = Path(self.model).name if Path(self.model).is_absolute() else self.model
        name = f"{re.sub('[/:]', '-', name.removeprefix(families.HUB))}-{self.precision}"
        return Path("artifacts", name) if self.output is None else Path(self.output)


@dataclass(frozen=True)
class EmbedOptions:
    """Everything that `embed` can be told.  Raises UserError for a value outside its choices."""

    text: bool = option(False, help="inputs are texts: a line of a file or a column")
    every: float = option(1.0, "SECONDS", "between the frames of a video: 1s or 1")
    column: Optional[str] = option(None, "NAME", "of a .parquet or .csv (default: found by its "
                                   "type or name)")
    shard_rows: int = option(10_000, "N", "rows of a shard, which is written whole or not at all")
    batch: Optional[int] = option(None, "N", "of the encoder (default: the artifact's largest, up "
                                  f"to {LARGEST_EMBED_BATCH})")
    dtype: str = option("float16", ("float16", "float32"), "of the features")
    normalize: bool = option(True, help="scale features to length 1")
    decode: str = option("auto", DECODE, "auto: by the GPU where that is within one level; "
                         "exact: pixels equal Pillow's")
    gpus: str = option("0", "all|0,1", "one process for each")
    ray: Optional[str] = option(None, "ADDRESS", "run on Ray Data: on the cluster at this address, "
                                "or on a local one")
    shards: Optional[str] = option(None, "I/N", "of array jobs: the shards whose number modulo N "
                                   "is I, from 0 to N-1")
    max_bad: float = option(0.01, "SHARE", "of bad rows, as 1% or 0.01, above which exit code 3 "
                            "says so")
    retry_bad: bool = option(False, help="embed shards with bad rows again")
    overwrite: bool = option(False, help="delete what an earlier run wrote to --output")
    force: bool = option(False, help="use an artifact that failed its verification")
    threads: Optional[int] = option(None, "N", "of each process (default: its share of the cores)")

    def __post_init__(self):
        check_choices(self)
        for name in ("every", "shard_rows", "batch", "threads"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise UserError(f"bad {name} {value}: it must be above 0")
        if self.shards and self.overwrite:
            raise UserError("--shards with --overwrite: each job would delete the others' shards")
        self.of_this_job(0)

    def of_this_job(self, count: int) -> set[int]:
        """Those of so many shards that `shards` asks for."""
        index, _, jobs = (self.shards or "0/1").partition("/")
        if not (index.isdecimal() and jobs.isdecimal() and int(index) < int(jobs)):
            raise UserError(f"bad --shards {self.shards!r}: write I/N, with I from 0 to N-1")
        return set(range(int(index), count, int(jobs)))

    def devices(self, count: int) -> list[str]:
        """Those of so many GPUs that `gpus` asks for."""
        numbers = [*map(str, range(count))]
        wanted = numbers if self.gpus == "all" else self.gpus.split(",")
        if not {*wanted} <= {*numbers}:
            raise UserError(f"bad --gpus {self.gpus!r}: write all, or of 0 to {count - 1} some "
                            "as 0,1")
        return [f"cuda:{number}" for number in dict.fromkeys(wanted)]


@dataclass(frozen=True)
class EvaluateOptions:
    """Everything that `evaluate` can be told."""

    root: Optional[str] = option(None, "DIR", "of torchvision's, which are never downloaded")
    split: str = option("test", "NAME", "of torchvision's: test, val or train")
    labels: Any = option(None, "TEXT|FILE", "the classes' names, by name or in their order, or "
                         "imagenet: open_clip's (default: the data set's; of wnids imagenet)")
    templates: Any = option(None, "TEXT|FILE", "texts with {} for the label, of which features are "
                            "averaged, or a file, or imagenet (default: some of our own)")
    original: bool = option(True, help="compare with the original model")
    weights: Optional[str] = option(None, "FILE", "where the weights are, if their file has moved")
    trust_weights: bool = option(False, help="read even a pickle, which can run code")
    column: Optional[str] = option(None, "NAME", "of paths in tables (default: image_path or path)")
    label: str = option("label", "NAME", "the column of labels in tables")
    caption: Optional[str] = option(None, "NAME", "of captions (default: caption or text)")
    gpus: str = option("0", "all|0,1", "to embed by, one process for each")
    force: bool = option(False, help="use an artifact that failed its verification")


@dataclass(frozen=True)
class ProbeOptions:
    """Everything that `probe` can be told.  Raises UserError for a value outside its choices."""

    c: float = option(0.316, "C", "inverse strength of the L2 penalty, scikit-learn's")
    sweep: bool = option(False, help="search the best C from 1e-6 to 1e6, by a tenth of train")
    column: Optional[str] = option(None, "NAME", "of paths in tables (default: image_path or path)")
    label: str = option("label", "NAME", "the column of labels in tables")
    dtype: str = option("float32", ("float32", "float64"), "of the fit")
    gpus: str = option("0", "all|0,1", "to embed by, one process for each")
    force: bool = option(False, help="use an artifact that failed its verification")

    def __post_init__(self):
        check_choices(self)
        if not 0 < self.c < float("inf"):
            raise UserError(f"bad c {self.c}: it must be above 0")
