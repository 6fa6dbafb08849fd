"""Seconds of a linear probe's fit on made data, ours beside scikit-learn's: results/probe.csv.

    python -m experiments.probe --sizes 10000x512x100 1280000x512x1000

Made data: standard normal centres of classes, 8 long, and standard normal noise, both stretched by
axes from 1 to 1/100 as features are.  `ours` is `clip_ttrt.probe.fit` on the GPU, where there is
one, to its own tolerance; scikit-learn's lbfgs runs on the CPU, at sizes that take minutes, to its
default one, much coarser.
"""
import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from clip_ttrt.probe import fit
from experiments.record import append_row, provenance

LARGEST = 1e9  # rows * width * classes of scikit-learn


def made(rows: int, width: int, classes: int, device: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Features float32 [rows, width] and labels int64 [rows]."""
    more = {"generator": torch.Generator(device).manual_seed(0), "device": device}
    centres = torch.randn(classes, width, **more) * 8 / width**0.5
    labels = torch.arange(rows, device=device) % classes
    features = torch.randn(rows, width, **more).add_(centres[labels])
    return features.mul_(torch.logspace(0, -2, width, device=device)), labels


def theirs(x: torch.Tensor, y: torch.Tensor):
    from sklearn.linear_model import LogisticRegression

    return LogisticRegression(C=0.316, max_iter=1000).fit(x.numpy(), y.numpy())


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--sizes", nargs="+", default=["10000x512x100", "100000x512x1000", "1280000x512x1000"])
    add("--out", type=Path, default=Path("results/probe.csv"))
    options = parser.parse_args(arguments)
    gpu = "cuda" if torch.cuda.is_available() else "cpu"
    for rows, width, classes in (map(int, size.split("x")) for size in options.sizes):
        features, labels = made(rows, width, classes, gpu)
        peers = [("ours", fit, torch.float32, gpu), ("ours", fit, torch.float64, gpu),
                 ("scikit-learn", theirs, torch.float64, "cpu")]
        for how, call, dtype, device in peers[:3 if rows * width * classes <= LARGEST else 2]:
            x, y, begun = features.to(device, dtype), labels.to(device), time.perf_counter()
            model = call(x, y)
            append_row(options.out, {
                "rows": rows, "width": width, "classes": classes, "how": how, "device": device,
                "dtype": str(dtype).removeprefix("torch."),
                "seconds": f"{time.perf_counter() - begun:.3f}", "iterations": getattr(
                    model, "iterations", 0) or max(model.n_iter_), **provenance()})  # fmt: skip
    return 0


if __name__ == "__main__":
    sys.exit(main())
