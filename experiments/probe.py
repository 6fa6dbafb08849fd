"""Seconds of a linear probe's fit on made data, ours beside scikit-learn's: results/probe.csv.

    python -m experiments.probe --sizes 10000x512x100 1280000x512x1000 --dtypes float32

Made data: standard normal centres of classes times --apart, and standard normal noise, both
stretched by axes from 1 to 1/100 as features are, from a seed; a tenth as many rows are the test.
`ours` is `clip_ttrt.probe.fit` on the GPU, where there is one, to its own tolerance; scikit-learn's
lbfgs runs on the CPU in float64 to its default one, much coarser, where --limit allows the size.
Features lie where the fit is before its time begins.
"""
import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from clip_ttrt.probe import fit
from experiments.record import append_row, provenance


def made(rows: int, width: int, classes: int, apart: float, device) -> tuple:
    """Features float32 [rows, width] and labels int64 [rows], on the device."""
    more = {"generator": torch.Generator(device).manual_seed(0), "device": device}
    centres = torch.randn(classes, width, **more) * apart / width**0.5
    labels = torch.arange(rows, device=device) % classes
    features = torch.randn(rows, width, **more).add_(centres[labels])
    return features.mul_(torch.logspace(0, -2, width, device=device)), labels


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--sizes", nargs="+", default=["10000x512x100", "100000x512x1000", "1280000x512x1000"])
    add("--dtypes", nargs="+", choices=("float32", "float64"), default=["float32", "float64"])
    add("--c", type=float, default=0.316)
    add("--apart", type=float, default=8.0, help="norm of a class's centre, of noise 1 an axis")
    add("--limit", type=float, default=1e9, help="largest rows * width * classes of scikit-learn")
    add("--out", type=Path, default=Path("results/probe.csv"))
    options = parser.parse_args(arguments)
    device = "cuda" if torch.cuda.is_available() else "cpu"

    def record(how: str, dtype: str, on: str, seconds: float, iterations: int, norm: str, hits):
        append_row(options.out, {
            "rows": rows, "width": width, "classes": classes, "c": options.c, "dtype": dtype,
            "how": how, "device": on, "seconds": f"{seconds:.3f}", "iterations": iterations,
            "gradient_norm": norm, "top1": f"{hits.mean():.4f}", **provenance()})  # fmt: skip

    for rows, width, classes in (map(int, size.split("x")) for size in options.sizes):
        features, y = made(rows + rows // 10, width, classes, options.apart, device)
        for dtype in options.dtypes:
            x, begun = features.to(getattr(torch, dtype)), time.perf_counter()
            model = fit(x[:rows], y[:rows], options.c)
            seconds, hits = time.perf_counter() - begun, model.top(x[rows:])[:, 0] == y[rows:]
            record("ours", dtype, device, seconds, model.iterations, f"{model.gradient_norm:.1e}",
                   hits.double())
        if rows * width * classes <= options.limit:
            from sklearn.linear_model import LogisticRegression

            x, y = features.double().cpu().numpy(), y.cpu().numpy()
            begun = time.perf_counter()
            theirs = LogisticRegression(C=options.c, max_iter=1000).fit(x[:rows], y[:rows])
            record("scikit-learn", "float64", "cpu", time.perf_counter() - begun,
                   max(theirs.n_iter_), "", theirs.predict(x[rows:]) == y[rows:])
    return 0


if __name__ == "__main__":
    sys.exit(main())
