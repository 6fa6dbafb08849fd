"""Round 3: variants of extract_patches and embed_image, torch.compile beside them. Needs a library that was built with
-DCLIP_ELEMENTWISE_WORKSHOP, and one from before this round.

    python -m kernels.elementwise.rounds.round_3 WORKSHOP_LIBRARY LIBRARY_BEFORE OUTDIR COMMIT

Checks every variant, then times them, graphs taking turns in random order; OUTDIR/check.csv, OUTDIR/round_3.csv,
OUTDIR/round_3_library.csv.
"""

import ctypes
import math
import pathlib
import random
import statistics
import sys
import time

import torch

from experiments import elementwise_bench as bench

COLUMNS = ["build", "kernel", "rows", "width", "us", "floor_us", "ok", "gpu", "commit"]
CHECK_COLUMNS = ["build", *bench.CHECK_COLUMNS]
PATCHES = [w * 10000 + u * 1000 + t for w in (2, 4, 8) for u in (1, 2, 3, 4, 6) for t in (128, 256)]
STAGED = [208256, 216256, 216352]
EMBED = [1000, 2000, 4000, 1010, 2010, 1100, 2100, 4100, 1110, 2110]
EMBED_WARPS = {768: [1001, 2001, 1101, 2101], 1024: [1001, 1101, 1002, 2002, 1102, 2102]}


def variants(shape) -> list[int]:
    if shape.kernel == "embed_image":
        return EMBED + EMBED_WARPS.get(shape.width, [])
    if shape.patch == 14:
        return PATCHES + STAGED
    return PATCHES


patches, embed = bench.patches_shape, bench.embed_shape
MAIN = [
    patches(32, 32, 224), embed(32, 50, 768), patches(32, 14, 224), embed(32, 257, 1024), patches(1, 32, 224),
    embed(1, 50, 768), patches(32, 16, 224), embed(32, 197, 768), patches(1, 14, 224), embed(1, 257, 1024),
    patches(1, 16, 224), patches(128, 32, 224), embed(128, 50, 768), patches(32, 32, 224, True), patches(32, 14, 224, True),
]  # fmt: skip
MORE = [
    patches(8, 32, 224), patches(8, 14, 224), embed(8, 50, 768), embed(4, 257, 1024), patches(128, 14, 224), patches(32, 14, 336),
    embed(128, 257, 1024), patches(1, 32, 224, True),
]  # fmt: skip
NORMS = [bench.Shape(k, r, w) for k in ("layer_norm", "residual_layer_norm") for r, w in ((50, 768), (1600, 768), (8224, 1024))]


class Workshop(bench.Library):
    def choose(self, variant: int) -> "Workshop":
        for name in ("clip_workshop_patches", "clip_workshop_embed"):
            ctypes.c_int32.in_dll(self._library, name).value = variant
        return self


def check(library, table) -> int:
    shapes = [patches(batch, *sizes, half) for sizes in ((14, 28), (14, 56), (14, 224), (16, 48), (16, 224), (32, 96), (32, 224))
              for batch in (1, 3) for half in (False, True)]
    shapes += [embed(batch, tokens, width) for width in (768, 1024) for tokens in (2, 5) for batch in (1, 3, 33)]
    failed = 0
    for shape in shapes:
        work = bench.work_for(torch, shape, 1.0, 0)
        for variant in variants(shape):
            library.choose(variant)
            ok, worst = bench.check_work(torch, library, work)
            failed += not ok
            table.write(build=variant, kernel=shape.kernel, rows=shape.rows, width=shape.width, scale=1.0, worst=f"{worst:.4g}", ok=int(ok))
            if not ok:
                print(f"FAIL {variant} {shape}: {worst:.3g}", flush=True)
    return failed


def timed(shape, builds, rounds: int, table, about) -> None:
    """builds: (name, launch(work))."""
    sets = [bench.work_for(torch, shape, 1.0, i) for i in range(max(4, min(8, math.ceil(2 * bench.L2_BYTES / shape.bytes))))]
    launches = len(sets) * math.ceil(24 / len(sets))
    graphs = {}
    for name, prepare, launch in builds:
        prepare()
        kept = [None] * len(sets)
        for out in sets[0].outputs.values():
            out.fill_(math.nan)

        def go(i, launch=launch, kept=kept):
            kept[i % len(sets)] = launch(sets[i % len(sets)])

        graph = bench.captured(torch, go, launches)
        graph.replay()
        torch.cuda.synchronize()
        ok = ""  # PyTorch makes its own outputs, and rounds elsewhere
        if kept[0] is None:
            ok = int(all(bool(((out.double() - exact).abs() <= bound).all()) for out, exact, bound in sets[0].errors()))
        graphs[name] = (graph, ok, kept)
    times = {name: [] for name in graphs}
    for _ in range(rounds):
        for name in random.sample(list(graphs), len(graphs)):
            times[name].append(bench.replay_us(torch, graphs[name][0], launches, 0.0))
    for name, (_, ok, _) in graphs.items():
        us = statistics.median(times[name])
        table.write(build=name, kernel=shape.kernel, rows=shape.rows, width=shape.width, us=f"{us:.3f}", floor_us=f"{shape.floor_us:.2f}", ok=ok, **about)
    best = sorted((statistics.median(times[name]), str(name)) for name in graphs)
    print(f"{shape.kernel} {shape.rows} x {shape.width}: " + ", ".join(f"{name} {us:.2f}" for us, name in best[:6])
          + "".join(f"; {name} {statistics.median(times[name]):.2f}" for name in ("chosen", "before", "torch.compile") if name in graphs), flush=True)  # fmt: skip


def main() -> int:
    started = time.monotonic()
    workshop, before, out, commit = sys.argv[1:]
    library, before, out = Workshop(pathlib.Path(workshop)), bench.Library(pathlib.Path(before)), pathlib.Path(out)
    out.mkdir(parents=True, exist_ok=True)
    about = {"gpu": torch.cuda.get_device_name(), "commit": commit}
    random.seed(0)
    table = bench.Table(out / "elementwise_check.csv", bench.CHECK_COLUMNS)
    failed = 0
    for kernel in ("extract_patches", "extract_patches_fp16", "embed_image", "layer_norm", "residual_layer_norm"):
        print(kernel, end=" ")
        failed += bench.check(torch, library, bench.check_cases(kernel), table, 5)
    failed += check(library, bench.Table(out / "check.csv", CHECK_COLUMNS))
    print(f"checked at {time.monotonic() - started:.1f} s: {failed} failed", flush=True)

    table = bench.Table(out / "round_3.csv", COLUMNS)
    chosen = [
        ("before", lambda: None, lambda work: work.run(before)),
        ("chosen", lambda: library.choose(0), lambda work: work.run(library)),
    ]
    for shape in [*MAIN, *MORE]:
        tried = [(v, lambda v=v: library.choose(v), lambda work: work.run(library)) for v in variants(shape)]
        timed(shape, [*chosen, *tried], 2 if shape.rows > 20000 else 3, table, about)
    for shape in NORMS:
        timed(shape, chosen, 5, table, about)
    print(f"variants timed at {time.monotonic() - started:.1f} s", flush=True)

    table = bench.Table(out / "round_3_library.csv", COLUMNS)
    for shape in MAIN:
        torch._dynamo.reset()  # a static compilation for each shape
        work = bench.work_for(torch, shape, 1.0, 0)
        _, function, arguments = work.library()
        timed(shape, [*chosen, ("torch.compile", lambda: None, lambda work: function(*arguments(work)))], 5, table, about)
    print(f"done at {time.monotonic() - started:.1f} s", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
