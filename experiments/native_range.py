"""What was tried against the cost of a batch range with TensorRT's own kernels in fp16: OUT/native_range.csv.

    python -m experiments.native_range --model ViT-B/32 --encoder image --out results/h100

One engine for each recipe, each built in a process of its own; then all are measured in turns, as CUDA graphs, at several
batches, and compared with our encoders in fp32.  With --engines FOLDER engines stay there and are taken from there, so that
--build-only and a later run can be two steps.  Needs a GPU with TensorRT.
"""
import argparse
import json
import statistics
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Optional

import torch

from clip_ttrt import lowering, pipeline
from clip_ttrt.accuracy import exact_fp32
from clip_ttrt.encoders import ENCODERS
from clip_ttrt.models import dimensions_of
from clip_ttrt.options import BatchRange
from clip_ttrt.recipe import Recipe
from experiments import builds
from experiments.baselines import Request, checkpoint_of, example
from experiments.floor import turn
from experiments.record import append_row, in_a_line, provenance
from experiments.timing import graphed, median_ms

BATCHES, ROUNDS = (1, 5, 8, 32, 33, 64, 100, 128, 129, 256), 3  # 33 and 129: where padding to a power of two costs most

# Each name: whether it is static, and how it is built.  Row maxima are of `fusion.cap_rows`, separate MLPs of `fusion.separate_mlps`.
RECIPES: dict[str, tuple[bool, Recipe]] = {
    "static, TensorRT's products": (True, Recipe()),
    "static": (True, Recipe(cublas=True)),
    "range as it comes": (False, Recipe()),
    "range, cuBLAS": (False, Recipe(cublas=True)),
    "range, row maxima": (False, Recipe(row_maxima=True)),
    "range, row maxima, cuBLAS": (False, Recipe(row_maxima=True, cublas=True)),
    "range, row maxima, separate MLPs": (False, Recipe(row_maxima=True, separate_mlps=True)),
    "range, row maxima, separate MLPs, cuBLAS": (False, Recipe(row_maxima=True, separate_mlps=True, cublas=True)),
    "range, powers of two": (False, Recipe(powers=True)),
    "range, powers of two, cuBLAS": (False, Recipe(powers=True, cublas=True)),
}


def request_of(options: argparse.Namespace, batch: int) -> Request:
    dims = dimensions_of(options.model)
    tokens = dims.image_tokens if options.encoder == "image" else dims.context_length
    return Request(options.model, "demo" if options.model == "demo" else "random", options.encoder, "fp16", batch, tokens, "cuda")


def build(options: argparse.Namespace, name: str, target: Path) -> None:
    """Build one recipe's engine and save it as TorchScript, with facts beside it."""
    from clip_ttrt import engine

    whole = BatchRange.parse(options.range)
    static, how = RECIPES[name]
    batch = BatchRange(whole.optimal, whole.optimal, whole.optimal) if static else whole
    checkpoint = checkpoint_of(request_of(options, batch.optimal))
    start = pipeline.example_input(options.encoder, checkpoint.dimensions)
    graph = lowering.capture(ENCODERS[options.encoder](checkpoint.state_dict), start)
    lowering.lower(graph)
    began = time.perf_counter()
    built = engine.build_engine(graph, start, batch, "fp16", "native", how=how)
    seconds = time.perf_counter() - began
    torch.jit.save(engine.to_torchscript(built, example(request_of(options, batch.optimal)), options.encoder), str(target))
    target.with_suffix(".json").write_text(json.dumps({"build_s": round(seconds, 1), "engine_mib": round(len(built.plan) / 2**20, 1)}))


def measure(options: argparse.Namespace, made: dict[str, Path], errors: dict[str, str]) -> None:
    """Measure all engines in turns and append their rows."""
    whole = BatchRange.parse(options.range)
    modules, facts = {}, {}
    for name, target in made.items():
        try:
            modules[name], facts[name] = torch.jit.load(str(target)), json.loads(target.with_suffix(".json").read_text())
        except (RuntimeError, ValueError, OSError) as problem:
            errors[name] = errors.get(name) or in_a_line(problem)
    largest = example(request_of(options, whole.maximum))
    with exact_fp32():
        plain = ENCODERS[options.encoder](checkpoint_of(request_of(options, 1)).state_dict).cuda()
        reference = torch.cat([plain(part) for part in largest.split(32)])
    batches = [batch for batch in options.batches if whole.minimum <= batch <= whole.maximum]
    for batch in dict.fromkeys([whole.optimal, *batches]):
        x = largest[:batch].contiguous()
        calls = {name: graphed(lambda module=module: module(x)) for name, module in modules.items() if not RECIPES[name][0] or batch == whole.optimal}
        cosines = {name: torch.cosine_similarity(modules[name](x).float(), reference[:batch]).min().item() for name in calls}
        times: dict[str, list[float]] = {name: [] for name in calls}
        with turn():
            for _ in range(ROUNDS):
                for name, call in calls.items():
                    times[name].append(median_ms(call))
        medians = {name: statistics.median(rounds) for name, rounds in times.items()}
        for name in calls:
            append_row(options.out / "native_range.csv", row_of(options, name, batch) | {
                "median_ms": f"{medians[name]:.4f}", "of_static": f"{medians[name] / medians['static']:.4f}" if "static" in medians else "",
                "cos_min": f"{cosines[name]:.7f}", **facts[name], "error": "", **provenance()})
    for name, error in errors.items():
        append_row(options.out / "native_range.csv", row_of(options, name, whole.optimal) | {
            **dict.fromkeys(("median_ms", "of_static", "cos_min", "build_s", "engine_mib"), ""), "error": error, **provenance()})


def row_of(options: argparse.Namespace, name: str, batch: int) -> dict[str, object]:
    """The columns that say what a row is of."""
    return {"model": options.model, "encoder": options.encoder, "range": options.range, "recipe": name, "batch": batch}


def main(arguments: Optional[list[str]] = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="ViT-B/32")
    parser.add_argument("--encoder", choices=("image", "text"), default="image")
    parser.add_argument("--range", default="1:32:256", metavar="MIN:OPT:MAX")
    parser.add_argument("--batches", nargs="+", type=int, default=BATCHES, help="measure at these, and at OPT in any case")
    parser.add_argument("--recipes", nargs="+", choices=RECIPES, default=list(RECIPES))
    parser.add_argument("--out", type=Path, default=Path("results/h100"))
    builds.add_options(parser, "recipe")
    options = parser.parse_args(arguments)
    with torch.no_grad(), tempfile.TemporaryDirectory() as temporary:
        if options.build:
            build(options, options.build[0], Path(options.build[1]))
            return 0
        folder = options.engines or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        arguments = ["--model", options.model, "--encoder", options.encoder, "--range", options.range]
        targets = {name: folder / f"{options.model.replace('/', '-')}-{options.encoder}-{options.range.replace(':', '_')}-{place}.ts"
                   for place, name in enumerate(RECIPES) if name in options.recipes}
        with ThreadPoolExecutor(options.jobs) as pool:
            errors = dict(zip(targets, pool.map(lambda name: builds.built_in_process("experiments.native_range", arguments, name, targets[name], options.existing), targets)))
        errors = {name: error for name, error in errors.items() if error}
        if not options.build_only:
            measure(options, {name: target for name, target in targets.items() if name not in errors}, errors)
        return 1 if errors else 0


if __name__ == "__main__":
    sys.exit(main())
