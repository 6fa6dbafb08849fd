"""Figure and table of results/speed.csv: python -m experiments.report [--csv FILE] [--gpu NAME]

Draws FILE.png, milliseconds over the batch for each model, encoder and backend, and prints the
table of the same rows in Markdown.  Of what was measured more than once the last row counts.
"""
import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.ticker import NullLocator, StrMethodFormatter

from experiments.record import read_rows

# Okabe and Ito's colours, which colour-blind readers tell apart; ours is the first.
STYLES = {
    "clip_ttrt fused": ("#0072B2", "o"),
    "clip_ttrt tensorrt": ("#009E73", "s"),
    "clip_ttrt": ("#0072B2", "o"),
    "torch.compile": ("#E69F00", "^"),
    "torch.compile rearranged": ("#D55E00", "v"),
    "eager": ("#56B4E9", "P"),
    "clip": ("#999999", "*"),
    "floor": ("#000000", "_"),
}
LINES = {"call": "--", "graph": "-", "queue": ":"}
KEY = ("model", "encoder", "batch", "precision", "backend", "kernels", "how")


def latest(rows: Sequence[Mapping[str, str]], gpu: str | None) -> list[Mapping[str, str]]:
    """The last row of each key of one run: of the named GPU, else the last row's, and of the commit
    and day of its last row, since only what ran together may be compared.

    Raises ValueError where there is none.
    """
    rows = [row for row in rows if gpu is None or row["gpu"] == gpu]
    if not rows:
        raise ValueError(f"no rows of {gpu or 'any GPU'}; python -m experiments.sweep writes some")
    last = {name: rows[-1][name] for name in ("gpu", "commit", "date")}
    together = [row for row in rows if all(row[name] == last[name] for name in last)]
    return list({tuple(row[name] for name in KEY): row for row in together}.values())


def groups(rows: Sequence[Mapping[str, str]], *names: str) -> dict[tuple[str, ...], list]:
    """The rows by the values of some columns, in their order."""
    found: dict[tuple[str, ...], list] = {}
    for row in rows:
        found.setdefault(tuple(row[name] for name in names), []).append(row)
    return found


def style(backend: str, kernels: str, how: str) -> dict:
    """Colour, marker, line and label of a backend; an engine for a range has hollow markers."""
    ours, _, batches = backend.partition(" ")
    colour, marker = STYLES[f"{ours} {kernels}".strip()]
    label = " ".join(filter(None, (backend, kernels, how)))
    fill = "white" if batches else colour
    return {"color": colour, "marker": marker, "markerfacecolor": fill, "linestyle": LINES[how],
            "label": label, "markersize": 5, "linewidth": 1.3}  # fmt: skip


def plot(rows: Sequence[Mapping[str, str]]) -> plt.Figure:
    """One panel a model, encoder and precision, one line a backend and way to call it."""
    parts = groups(rows, "model", "encoder", "precision")
    columns = min(3, len(parts))
    lines = -(-len(parts) // columns)
    size = (max(7.0, 4 * columns), 3.2 * lines + 1.8)
    figure, panels = plt.subplots(lines, columns, figsize=size, squeeze=False)
    for axes in panels.flat[len(parts):]:
        axes.set_visible(False)
    handles = {}
    for axes, (title, part) in zip(panels.flat, parts.items(), strict=False):
        for look, points in groups(part, "backend", "kernels", "how").items():
            points = sorted((int(row["batch"]), float(row["median_ms"])) for row in points)
            [line] = axes.plot(*zip(*points, strict=True), **style(*look))
            handles.setdefault(line.get_label(), line)
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        batches = sorted({int(row["batch"]) for row in part})
        axes.set_xticks(batches, [str(batch) for batch in batches])
        axes.xaxis.set_minor_locator(NullLocator())
        for which in (axes.yaxis.set_major_formatter, axes.yaxis.set_minor_formatter):
            which(StrMethodFormatter("{x:g}"))
        axes.tick_params(labelsize=7, which="both")
        axes.set_title(" ".join(title), fontsize=9)
        axes.set_xlabel("batch", fontsize=8)
    for axes in panels[:, 0]:
        axes.set_ylabel("milliseconds", fontsize=8)
    share = (0.25 + 0.18 * -(-len(handles) // columns)) / figure.get_figheight()
    figure.tight_layout(rect=(0, share, 1, 1))
    figure.legend(handles.values(), handles, ncol=columns, frameon=False, fontsize=7,
                  loc="lower center", bbox_to_anchor=(0.5, 0.02))  # fmt: skip
    figure.text(0.995, 0.004, stamp(rows), ha="right", va="bottom", fontsize=6, color="#666666")
    return figure


def stamp(rows: Sequence[Mapping[str, str]]) -> str:
    """GPU, versions, commits and dates of rows."""
    def values(name: str) -> str:
        return ", ".join(sorted({row[name] for row in rows} - {""}))

    return "; ".join([
        values("gpu") or "CPU", f"torch {values('torch')}",
        f"TensorRT {values('tensorrt') or 'none'}", f"commit {values('commit')}", values("date"),
    ])  # fmt: skip


def table(rows: Sequence[Mapping[str, str]]) -> str:
    """Milliseconds in Markdown: a line a model, encoder, precision and batch."""
    columns = list(groups(rows, "backend", "kernels", "how"))
    names = [" ".join(filter(None, column)) for column in columns]
    lines = [f"| encoder, batch | {' | '.join(names)} |", "|---" * (len(names) + 1) + "|"]
    places = groups(rows, "model", "encoder", "precision", "batch")
    for (model, encoder, precision, batch), part in places.items():
        times = {(row["backend"], row["kernels"], row["how"]): row["median_ms"] for row in part}
        cells = [f"{float(times[name]):.3g}" if name in times else "" for name in columns]
        lines.append(f"| {model} {encoder} {precision}, {batch} | {' | '.join(cells)} |")
    return "\n".join(lines)


def draw(path: Path, gpu: str | None = None) -> Path:
    """Draw a CSV into the PNG beside it, and return that.  Raises ValueError without rows."""
    figure = plot(latest(read_rows(path), gpu))
    target = path.with_suffix(".png")
    figure.savefig(target, dpi=150)
    plt.close(figure)
    return target


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--csv", type=Path, default=Path("results/speed.csv"))
    parser.add_argument("--gpu", metavar="NAME", help="as in the file; default: the last row's")
    options = parser.parse_args(arguments)
    try:
        print(draw(options.csv, options.gpu))
        print(table(latest(read_rows(options.csv), options.gpu)))
    except ValueError as problem:
        parser.error(f"{options.csv}: {problem}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
