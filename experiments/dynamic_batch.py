"""What a batch range costs: one engine for MIN:OPT:MAX against a static engine of OPT, in the same run.

    python -m experiments.dynamic_batch --model ViT-B/32 --weights random --out results/h200/dynamic_batch.csv

Medians of CUDA-graph replays on random inputs, static and dynamic measured alternately; beside them the
original `clip` model in eager fp16.  Needs a GPU with TensorRT.  With --artifacts FOLDER, artifacts are taken from there
where they are (under the names that experiments.accuracy gives) and left there.
"""
import argparse
import statistics
import tempfile
from pathlib import Path

import torch

from clip_ttrt.artifact import load_modules
from clip_ttrt.models import dimensions_of
from experiments.accuracy import compiled
from experiments.baselines import Request, clip_eager
from experiments.floor import turn
from experiments.record import append_row, provenance
from experiments.timing import graphed, median_ms

ROUNDS = 5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--weights", default=None)
    parser.add_argument("--precision", default="fp16")
    parser.add_argument("--range", default="1:32:256")
    parser.add_argument("--attention", choices=("native", "plugin"), default="native")
    parser.add_argument("--artifacts", type=Path)
    parser.add_argument("--out", type=Path, default=Path("results/h200/dynamic_batch.csv"))
    options = parser.parse_args()
    batch = int(options.range.split(":")[1])
    weights, dims = options.weights or ("demo" if options.model == "demo" else "openai"), dimensions_of(options.model)
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.artifacts or Path(temporary)
        made = {name: compiled(folder, options.model, options.weights, options.precision, sizes, options.attention)
                for name, sizes in (("static", str(batch)), ("dynamic", options.range))}
        modules = {name: load_modules(artifact) for name, artifact in made.items()}
    for encoder in made["static"].encoders:
        tokens = dims.image_tokens if encoder == "image" else dims.context_length
        original = clip_eager(Request(options.model, weights, encoder, "fp16", batch, tokens, "cuda"))
        example = original.x
        with torch.no_grad():
            calls = {name: graphed(lambda module=loaded[encoder]: module(example)) for name, loaded in modules.items()}
            times = {name: [] for name in calls}
            with turn():
                for _ in range(ROUNDS):
                    for name, call in calls.items():
                        times[name].append(median_ms(call))
                plain = median_ms(lambda: modules["dynamic"][encoder](example))
                eager_ms = median_ms(original.call)
        medians = {name: statistics.median(rounds) for name, rounds in times.items()}
        append_row(options.out, {
            "model": options.model, "encoder": encoder, "precision": options.precision, "attention": options.attention, "weights": made["static"].origin.kind,
            "batch": batch, "range": options.range, "static_ms": f"{medians['static']:.4f}", "dynamic_ms": f"{medians['dynamic']:.4f}",
            "ratio": f"{medians['dynamic'] / medians['static']:.4f}", "spread": f"{max(times['static']) / min(times['static']) - 1:.4f}",
            "dynamic_without_graph_ms": f"{plain:.4f}", "eager_fp16_ms": f"{eager_ms:.4f}", **provenance()})


if __name__ == "__main__":
    main()
