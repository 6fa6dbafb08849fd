"""What a batch range costs: one engine for MIN:OPT:MAX against a static engine of OPT, in the same run.

    python -m experiments.dynamic_batch --model ViT-B/32 --weights random --out results/h200/dynamic_batch.csv

Medians of CUDA-graph replays on random inputs, static and dynamic measured alternately; beside them the
original `clip` model in eager fp16.  Needs a GPU with TensorRT.  With --artifacts FOLDER, artifacts are taken from there
where they are (under the names that experiments.accuracy gives) and left there.

TensorRT chooses kernels by what it times, so that two builds of one engine differ by some percent.  With --builds N there are
N of each, every one built in a process and with a timing cache of its own: `static_ms` and `dynamic_ms` are medians over the
builds, and the columns `..._least_ms` and `..._most_ms` say how far they lie apart.
"""
import argparse
import os
import statistics
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from clip_ttrt.artifact import MANIFEST, Artifact, load_modules, read_artifact
from clip_ttrt.models import dimensions_of
from experiments.accuracy import compile_command, folder_name
from experiments.baselines import Request, clip_eager
from experiments.floor import turn
from experiments.record import append_row, provenance
from experiments.timing import graphed, median_ms

ROUNDS = 5


def artifact_of(options: argparse.Namespace, root: Path, batch: str, number: int) -> Artifact:
    """Build `number` of one kind: the artifact that is there, else compiled now.

    Raises RuntimeError with the compile's last line where that fails.
    """
    name = folder_name(options.model, options.precision, batch, options.attention)
    folder = root / (name if number == 0 else f"{name}-build-{number}")
    if not (folder / MANIFEST).is_file():
        command = compile_command(options.model, options.weights, options.precision, batch, options.attention, "tensorrt", folder)
        with tempfile.TemporaryDirectory() as cache:
            done = subprocess.run([*command, "--encoder", options.encoder], env={**os.environ, "XDG_CACHE_HOME": cache}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        if done.returncode:
            raise RuntimeError(f"{folder.name} was not compiled: {(done.stdout.strip().splitlines() or [''])[-1]}")
        print(f"{folder.name} is compiled", flush=True)
    return read_artifact(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--weights", default=None)
    parser.add_argument("--encoder", choices=("image", "text", "both"), default="both")
    parser.add_argument("--precision", default="fp16")
    parser.add_argument("--range", default="1:32:256")
    parser.add_argument("--attention", choices=("native", "plugin"), default="native")
    parser.add_argument("--builds", type=int, default=1, help="engines of each kind (default 1)")
    parser.add_argument("--jobs", type=int, default=1, help="builds at once (default 1)")
    parser.add_argument("--artifacts", type=Path)
    parser.add_argument("--out", type=Path, default=Path("results/h200/dynamic_batch.csv"))
    options = parser.parse_args()
    if options.builds < 1 or options.jobs < 1:
        parser.error("--builds and --jobs are at least 1")
    batch = int(options.range.split(":")[1])
    weights, dims = options.weights or ("demo" if options.model == "demo" else "openai"), dimensions_of(options.model)
    wanted = [(kind, sizes, number) for number in range(options.builds) for kind, sizes in (("static", str(batch)), ("dynamic", options.range))]
    with tempfile.TemporaryDirectory() as temporary:
        with ThreadPoolExecutor(options.jobs) as pool:
            made = list(pool.map(lambda one: artifact_of(options, options.artifacts or Path(temporary), *one[1:]), wanted))
        encoders = made[0].encoders if options.encoder == "both" else (options.encoder,)
        if lacking := [artifact.folder.name for artifact in made if not set(encoders) <= set(artifact.encoders)]:
            parser.error(f"no {' and '.join(encoders)} encoder in {', '.join(lacking)}")
        modules = {(kind, number): load_modules(artifact) for (kind, _, number), artifact in zip(wanted, made)}
    for encoder in encoders:
        tokens = dims.image_tokens if encoder == "image" else dims.context_length
        original = clip_eager(Request(options.model, weights, encoder, "fp16", batch, tokens, "cuda"))
        example = original.x
        with torch.no_grad():
            calls = {key: graphed(lambda module=loaded[encoder]: module(example)) for key, loaded in modules.items()}
            times = {key: [] for key in calls}
            with turn():
                for _ in range(ROUNDS):
                    for key, call in calls.items():
                        times[key].append(median_ms(call))
                plain = median_ms(lambda: modules["dynamic", 0][encoder](example))
                eager_ms = median_ms(original.call)
        append_row(options.out, {
            "model": options.model, "encoder": encoder, "precision": options.precision, "attention": options.attention, "weights": made[0].origin.kind,
            "batch": batch, "range": options.range, **figures(times),
            "dynamic_without_graph_ms": f"{plain:.4f}", "eager_fp16_ms": f"{eager_ms:.4f}", **provenance()})


def figures(times: dict[tuple[str, int], list[float]]) -> dict[str, object]:
    """The columns of a row from the milliseconds of each round, by kind (static or dynamic) and number of the build.

    `ratio` is of the medians over the builds; `spread` is the most that one static engine's rounds differ by.
    """
    builds = {kind: [statistics.median(rounds) for (kind_, _), rounds in times.items() if kind_ == kind] for kind in ("static", "dynamic")}
    medians = {kind: statistics.median(values) for kind, values in builds.items()}
    spread = max(max(rounds) / min(rounds) for (kind, _), rounds in times.items() if kind == "static") - 1
    return {**{f"{kind}_ms": f"{medians[kind]:.4f}" for kind in medians}, "ratio": f"{medians['dynamic'] / medians['static']:.4f}", "spread": f"{spread:.4f}",
            "builds": len(builds["static"]),
            **{f"{kind}_{end}_ms": f"{pick(builds[kind]):.4f}" for kind in builds for end, pick in (("least", min), ("most", max))}}


if __name__ == "__main__":
    main()
