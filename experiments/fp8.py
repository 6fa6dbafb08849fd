"""What fp8 buys and what each layer costs: python -m experiments.fp8 [ARTIFACT...]

Appends to results/fp8.csv, for every linear layer of fp8 artifacts, the smallest cosine with that
layer alone in fp8, and whether it stays in fp16.  Draws fp8.png beside it: on the left the time in
fp8 over fp16, of rows of speed.csv there that one run has measured, on the right the cosines.
"""
import argparse
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from clip_ttrt.artifact import Artifact, read_artifact
from clip_ttrt.errors import UserError
from experiments.record import append_row, provenance, read_rows
from experiments.report import groups

COLOURS = {"qkv": "#0072B2", "out": "#E69F00", "up": "#009E73", "down": "#CC79A7"}
RUN = "model", "encoder", "batch", "backend", "kernels", "gpu", "commit", "date", "tokens"


def rows_of(artifact: Artifact) -> Iterator[dict[str, Any]]:
    """The CSV rows of an artifact.  Raises UserError where it is not in fp8."""
    if artifact.manifest["precision"] != "fp8":
        raise UserError(f"{artifact.folder} is in {artifact.manifest['precision']}, not in fp8")
    for encoder, module in artifact.manifest["modules"].items():
        for layer, cosine in module["fp8"]["cos_min_alone"].items():
            yield {
                "model": artifact.manifest["model"], "encoder": encoder,
                "kernels": artifact.manifest["kernels"], "layer": layer.removesuffix(".weight"),
                "cos_min": f"{cosine:.8f}", "kept_fp16": int(layer in module["fp8"]["kept_fp16"]),
                **provenance(artifact.manifest["versions"]),
            }  # fmt: skip


def ratios(rows: Sequence[Mapping[str, str]]) -> dict[tuple[str, ...], float]:
    """Graphs' milliseconds in fp8 over those in fp16 of the same run: columns RUN -> ratio."""
    times = {tuple(row[name] for name in ("precision", *RUN)): float(row["median_ms"])
             for row in rows if row["backend"].startswith("clip_ttrt") and row["how"] == "graph"}
    return {tuple(cell): ms / times[("fp16", *cell)] for (precision, *cell), ms in times.items()
            if precision == "fp8" and ("fp16", *cell) in times}


def plot(speed: Sequence[Mapping[str, str]], layers: Sequence[Mapping[str, str]]) -> Any:
    """The figure.  Raises ValueError without rows in fp8, ImportError without matplotlib."""
    from matplotlib.figure import Figure

    bars = {" ".join(cell[:3]): ratio for cell, ratio in ratios(speed).items()
            if cell[4] == "fused"}
    if not bars or not layers:
        raise ValueError("no rows of fp8; python -m experiments.sweep and an ARTIFACT give some")
    panels = groups(layers, "model", "encoder")
    figure = Figure((4 * (1 + len(panels)), 3.6), layout="constrained")
    left, *others = figure.subplots(1, 1 + len(panels))
    left.barh(list(bars), list(bars.values()), color="#0072B2")
    left.axvline(1, color="#999999", linewidth=0.8)
    left.invert_yaxis()
    left.set_xlabel("milliseconds in fp8 / in fp16, graph", fontsize=8)
    for panel, (place, rows) in zip(others, panels.items(), strict=True):
        for kind, colour in COLOURS.items():
            points = [(int(row["layer"].split(".")[1]), 1 - float(row["cos_min"]))
                      for row in rows if row["layer"].endswith(f".{kind}")]
            panel.plot(*zip(*points), color=colour, marker="o", markersize=3, label=kind)
        panel.set_yscale("log")
        panel.set_title(" ".join(place), fontsize=9)
        panel.set_xlabel("block", fontsize=8)
        panel.set_ylabel("1 - smallest cosine, the layer alone in fp8", fontsize=8)
    others[0].legend(fontsize=7, frameon=False)
    for panel in (left, *others):
        panel.tick_params(labelsize=7)
    return figure


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("artifacts", nargs="*", type=Path, metavar="ARTIFACT")
    parser.add_argument("--csv", type=Path, default=Path("results/fp8.csv"))
    options = parser.parse_args(arguments)
    try:
        for folder in options.artifacts:
            for row in rows_of(read_artifact(folder)):
                append_row(options.csv, row)
        figure = plot(read_rows(options.csv.with_name("speed.csv")), read_rows(options.csv))
        figure.savefig(options.csv.with_suffix(".png"), dpi=150)
    except (UserError, ImportError, ValueError) as problem:
        parser.error(str(problem))
    return 0


if __name__ == "__main__":
    sys.exit(main())
