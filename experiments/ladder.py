"""The optimisation as a ladder: one encoder after each step, in one run: results/h200/ladder.csv.

    python -m experiments.ladder --model ViT-B/32 --encoder image --batch 32

Each row adds one technique to the row before: the original in eager fp16, our encoders, stock Torch-TensorRT, our
converters, activations as rows, the attention plugin, the fused elementwise kernels, cuBLASLt's linear layers, a CUDA graph.  `median_ms` is of plain
calls, as a program makes them, but for the last step; `graph_ms` of CUDA-graph replays, which leave out what the CPU needs
to launch.  `error` that starts with "wrong:" stands beside times of features that are wrong.  Engines are built in processes
of their own (--jobs at once; builds that share a GPU choose kernels by noisier timings), kept in --engines and taken from
there the next time; two steps are what `clip_ttrt.compile` makes and are taken from --artifacts where they are.  With
--build-only nothing is timed.  A step that fails is a row with its error.  All steps are loaded before the first is timed, which
waits for the turn that CLIP_TTRT_TURN names (experiments.floor).  Weights are random; needs a GPU with TensorRT.
"""
import argparse
import json
import statistics
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any, Callable, Optional, Sequence

import torch
from torch import fx

from clip_ttrt import backends, fusion, lowering, ops, pipeline, plugin
from clip_ttrt.artifact import read_artifact
from clip_ttrt.encoders import DIFFERENTIABLE, ENCODERS
from clip_ttrt.errors import UserError
from clip_ttrt.models import dimensions_of
from clip_ttrt.options import BatchRange
from experiments import builds
from experiments.baselines import Request, Subject, checkpoint_of, clip_eager, eager_sdpa, example, existing, load_encoder, wrong
from experiments.bugs.stock import compile_stock, engines
from experiments.floor import turn
from experiments.record import append_row, in_a_line, provenance
from experiments.timing import graphed, times_ms

REPEATS, WARM_UP = 100, 20
REPLAYED = "CUDA graph"


def convert_unflattened_attention() -> None:
    """Register TensorRT's own attention for `ops.attention` on [B, T, 3·W], which the pass flatten_rows otherwise replaces."""
    from clip_ttrt import converters

    @converters.register(ops.attention)
    def convert(ctx, target, args, kwargs, name):
        qkv, heads, causal = args
        tokens, width = qkv.shape[1], qkv.shape[2]
        rows = converters.shuffle(ctx, qkv, f"{name}_flattened", shape=(-1, width))
        attended = converters.native_attention(ctx, rows, tokens, heads, causal, name)
        return converters.shuffle(ctx, attended, f"{name}_unflattened", shape=(-1, tokens, width // 3))


def stock(request: Request) -> tuple[torch.jit.ScriptModule, dict[str, Any]]:
    """The plain encoder through torch_tensorrt.dynamo.compile as it comes."""
    module = ENCODERS[request.encoder](checkpoint_of(request).state_dict, DIFFERENTIABLE).cuda()
    x = example(request)
    compiled = compile_stock(module, x, [torch.half])
    with torch.no_grad():
        return torch.jit.trace(compiled, (x,), check_trace=False), {"engines": engines(compiled)}


def graph_of(request: Request, rows: bool, fusions: Sequence[Callable[[fx.GraphModule], int]] = ()) -> fx.GraphModule:
    """Our lowered graph; without `rows` activations keep their three dimensions.  fusions: of `fusion.PASSES`, what is fused in it."""
    checkpoint = checkpoint_of(request)
    graph = lowering.capture(ENCODERS[request.encoder](checkpoint.state_dict), pipeline.example_input(request.encoder, checkpoint.dimensions))
    if rows:
        lowering.lower(graph)
    else:
        for rewrite in lowering.PASSES:
            if rewrite is not lowering.flatten_rows:
                rewrite(graph)
                graph.graph.eliminate_dead_code()
    for fuse in fusions:
        fuse(graph)
        graph.graph.eliminate_dead_code()
    graph.recompile()
    return graph


def ours(request: Request, rows: bool, attention: str, fusions: Sequence[Callable[[fx.GraphModule], int]] = ()) -> tuple[torch.jit.ScriptModule, dict[str, Any]]:
    """Our pipeline, with steps left out: activations as rows, the plugin's attention, what is fused."""
    from clip_ttrt import engine

    if not rows:
        convert_unflattened_attention()
    plugin.load(plugin.VERSION if attention == "plugin" else None)
    x = example(request)
    built = engine.build_engine(graph_of(request, rows, fusions), x.cpu(), BatchRange(request.batch, request.batch, request.batch), request.precision, attention)
    return engine.to_torchscript(built, x, request.encoder), {"engines": 1}


# In the order of the ladder: name, and what builds its engine; None: nothing to build.
STEPS: dict[str, Optional[Callable[[Request], tuple[torch.jit.ScriptModule, dict[str, Any]]]]] = {
    "the original, eager": None,
    "our encoders, eager": None,
    "stock Torch-TensorRT": stock,
    "our converters, one engine": lambda request: ours(request, rows=False, attention="native"),
    "activations as rows": lambda request: ours(request, rows=True, attention="native"),
    "attention plugin": lambda request: ours(request, rows=True, attention="plugin"),
    "fused elementwise kernels": lambda request: ours(request, rows=True, attention="plugin", fusions=[fuse for fuse in fusion.PASSES if fuse is not fusion.fuse_linear]),
    "linear layers by cuBLASLt": lambda request: ours(request, rows=True, attention="plugin", fusions=fusion.PASSES),
    REPLAYED: None,
}
ARTIFACTS = {"activations as rows": "native", "linear layers by cuBLASLt": "plugin"}  # steps that the package itself makes: their attention
EAGER = {"the original, eager": clip_eager, "our encoders, eager": eager_sdpa}


def build(step: str, request: Request, target: Path) -> None:
    """Build one step's engine and save it as TorchScript, with facts beside it."""
    start = time.perf_counter()
    module, facts = STEPS[step](request)
    torch.jit.save(module, str(target))
    target.with_suffix(".json").write_text(json.dumps({**facts, "build_s": round(time.perf_counter() - start, 1)}))


def artifact_of(step: str, request: Request, root: Optional[Path]) -> Optional[Path]:
    """The folder of a compiled artifact that is this step, under the names of experiments.accuracy or of the sweep; None where there is none."""
    if root is None or step not in ARTIFACTS:
        return None
    try:
        made, folder = existing(replace(request, artifacts=str(root)), ARTIFACTS[step], str(request.batch))
    except UserError as problem:  # damaged, or another version's: the other steps do not end with it
        print(f"{step}: {problem}", flush=True)
        return None
    return folder if made else None


def built_in_process(step: str, options: argparse.Namespace, request: Request, target: Path) -> str:
    """Build one step in a process of its own, unless it is there; returns the error, empty where there is none."""
    if artifact_of(step, request, options.artifacts):
        return ""
    arguments = ["--model", options.model, "--encoder", options.encoder, "--batch", str(options.batch)]
    return builds.built_in_process("experiments.ladder", arguments, step, target, options.existing)


def subject_of(step: str, request: Request, target: Path, artifacts: Optional[Path]) -> tuple[Subject, dict[str, Any]]:
    """What a step runs, and facts about it."""
    if step in EAGER:
        return EAGER[step](request), {"engines": 0}
    plugin.load(plugin.VERSION if plugin.available() else None)
    if folder := artifact_of(step, request, artifacts):
        made = read_artifact(folder)
        module, x = load_encoder(made, request.encoder), example(request)
        return Subject(module, x, made.manifest["modules"][request.encoder]["build_seconds"], remark=wrong(module, x, request)), {"engines": 1}
    backends.register_runtime()
    module, x = torch.jit.load(str(target)), example(request)
    facts = json.loads(target.with_suffix(".json").read_text())
    return Subject(module, x, facts["build_s"], remark=wrong(module, x, request)), facts


def failed(error: str) -> dict[str, Any]:
    """The columns of a step that has no times."""
    return {"median_ms": "", "graph_ms": "", "engines": "", "build_s": "", "error": error}


def prepared(step: str, request: Request, target: Path, artifacts: Optional[Path] = None) -> Callable[[], dict[str, Any]]:
    """What measures the columns of one step, which is loaded now."""
    try:
        subject, facts = subject_of(step, request, target, artifacts)
    except Exception as problem:  # a step that fails is a row, and the others are still worth having
        columns = failed(in_a_line(problem))
        return lambda: columns
    return lambda: measured(step, subject, facts)


def measured(step: str, subject: Subject, facts: dict[str, Any]) -> dict[str, Any]:
    """The columns of one step."""
    with torch.no_grad():
        try:
            plain = statistics.median(times_ms(subject.call, REPEATS, WARM_UP))
        except Exception as problem:
            return failed(in_a_line(problem))
        try:
            replayed = "" if subject.uncapturable else f"{statistics.median(times_ms(graphed(subject.call), REPEATS, WARM_UP)):.4f}"
        except RuntimeError as problem:  # what waits for the CPU cannot be captured
            print(f"{step}: no CUDA graph: {str(problem)[:200]}", flush=True)
            replayed = ""
    return {"median_ms": f"{plain:.4f}", "graph_ms": replayed, "engines": facts["engines"], "build_s": round(subject.build_s, 1), "error": subject.remark}


def main(arguments: Optional[list[str]] = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="ViT-B/32")
    parser.add_argument("--encoder", choices=("image", "text"), default="image")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--artifacts", type=Path, help="folder of artifacts, under the names that experiments.accuracy or experiments.sweep gives")
    parser.add_argument("--out", type=Path, default=Path("results/h200/ladder.csv"))
    builds.add_options(parser, "step")
    options = parser.parse_args(arguments)
    dims = dimensions_of(options.model)
    tokens = dims.image_tokens if options.encoder == "image" else dims.context_length
    request = Request(options.model, "demo" if options.model == "demo" else "random", options.encoder, "fp16", options.batch, tokens, "cuda")
    if options.build:
        return build(options.build[0], request, Path(options.build[1]))
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.engines or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        targets = {step: folder / f"{options.model.replace('/', '-')}-{options.encoder}-{options.batch}-{place}.ts" for place, step in enumerate(STEPS)}
        to_build = [step for step in STEPS if STEPS[step]]
        with ThreadPoolExecutor(options.jobs) as pool:
            errors = dict(zip(to_build, pool.map(lambda step: built_in_process(step, options, request, targets[step]), to_build)))
        if options.build_only:
            return
        ready = {step: prepared(step, request, targets[step], options.artifacts) for step in STEPS if step != REPLAYED and not errors.get(step)}
        with turn():
            row: dict[str, Any] = {}
            for step in STEPS:
                if step == REPLAYED:  # the engine of the step before
                    row = {**row, "median_ms": row["graph_ms"]}
                else:
                    row = ready[step]() if step in ready else failed(errors[step])
                append_row(options.out, {"model": options.model, "encoder": options.encoder, "batch": options.batch, "step": step, **row, **provenance()})


if __name__ == "__main__":
    main()
