"""Figure and table of results/speed.csv.

    python -m experiments.report [--csv FILE] [--gpu NAME] [--commit ID]

Draws FILE.png, milliseconds as called over the batch, a panel for each model and encoder, and
prints the README's table in Markdown.  Both are of one run: of the GPU, commit and day of the last
row, or of the last of a named GPU or commit.  Of what was measured more than once the last row
counts.
"""
import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from experiments.record import read_rows
from experiments.sweep import KEY

# Okabe and Ito's colours, which colour-blind readers tell apart; ours is the first.
STYLES = {
    "clip_ttrt": ("#0072B2", "o"),
    "torch.compile": ("#E69F00", "^"),
    "torch.compile rearranged": ("#D55E00", "v"),
    "eager": ("#56B4E9", "P"),
    "clip": ("#999999", "*"),
    "onnxruntime": ("#CC79A7", "D"),
}
PANEL = ("model", "encoder", "precision", "tokens")


def latest(
    rows: Sequence[Mapping[str, str]], gpu: str | None, commit: str | None = None
) -> list[Mapping[str, str]]:
    """The rows of the run to report, as this module's docstring says.

    Raises ValueError where there is none.
    """
    rows = [row for row in rows if row["gpu"] == (gpu or row["gpu"])
            and row["commit"] == (commit or row["commit"])]  # fmt: skip
    if not rows:
        wanted = commit or gpu or "any GPU"
        raise ValueError(f"no rows of {wanted}; python -m experiments.sweep writes some")
    last = {name: rows[-1][name] for name in ("gpu", "commit", "date")}
    together = [row for row in rows if all(row[name] == last[name] for name in last)]
    return list({tuple(row[name] for name in KEY): row for row in together}.values())


def groups(rows: Sequence[Mapping[str, str]], *names: str) -> dict[tuple[str, ...], list]:
    """The rows by the values of some columns, in their order."""
    found: dict[tuple[str, ...], list] = {}
    for row in rows:
        found.setdefault(tuple(row[name] for name in names), []).append(row)
    return found


def plot(rows: Sequence[Mapping[str, str]]) -> Any:
    """A matplotlib figure: a panel a model, encoder and precision, a line a backend as called.

    Raises ValueError where nothing was called, ImportError without matplotlib.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import NullLocator, StrMethodFormatter

    panels = groups([row for row in rows if row["how"] == "call"], *PANEL)
    if not panels:
        raise ValueError("no rows of how=call; python -m experiments.sweep writes some")
    columns = min(3, len(panels))
    lines = -(-len(panels) // columns)
    figure = Figure((max(7.0, 4 * columns), 3.2 * lines + 1.2), layout="constrained")
    axes = figure.subplots(lines, columns, squeeze=False)
    handles = {}
    for panel in axes.flat[len(panels):]:
        panel.set_visible(False)
    for panel, (title, part) in zip(axes.flat, panels.items(), strict=False):
        for (backend, kernels), points in groups(part, "backend", "kernels").items():
            name = backend.split()[0] if backend.startswith("clip_ttrt") else backend
            colour, marker = STYLES[name]
            look = {"color": colour, "marker": marker, "markersize": 5, "linewidth": 1.3}
            if kernels == "tensorrt":
                look["linestyle"] = ":"
            if backend != name:  # an engine for a range
                look["markerfacecolor"] = "white"
            points = sorted((int(row["batch"]), float(row["median_ms"])) for row in points)
            label = f"{backend} {kernels}".strip()
            [handles[label]] = panel.plot(*zip(*points, strict=True), label=label, **look)
        batches = sorted({int(row["batch"]) for row in part})
        panel.set_xscale("log", base=2)
        panel.set_yscale("log")
        panel.set_xticks(batches, [str(batch) for batch in batches])
        panel.xaxis.set_minor_locator(NullLocator())
        panel.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        panel.yaxis.set_minor_formatter(StrMethodFormatter("{x:g}"))
        panel.tick_params(labelsize=7, which="both")
        panel.set_title(" ".join(title).strip(), fontsize=9)
        panel.set_xlabel("batch", fontsize=8)
    for panel in axes[:, 0]:
        panel.set_ylabel("milliseconds, as called", fontsize=8)
    last = rows[-1]
    stack = f"torch {last['torch']}; TensorRT {last['tensorrt'] or 'none'}"
    figure.suptitle(f"{last['gpu'] or 'CPU'}; {stack}; commit {last['commit']}; {last['date']}",
                    fontsize=6, color="#666666")  # fmt: skip
    figure.legend(handles.values(), handles, ncol=min(4, columns + 1), frameon=False, fontsize=7,
                  loc="outside lower center")  # fmt: skip
    return figure


def table(rows: Sequence[Mapping[str, str]]) -> str:
    """Milliseconds in Markdown: a line a model, encoder and batch.

    Of our artifacts the first that the run measured, as called and as a graph's replay; the peers
    as called; and the ratio to torch.compile.
    """
    artifacts = [(row["backend"], row["kernels"]) for row in rows
                 if row["backend"].startswith("clip_ttrt")]  # fmt: skip
    ours = artifacts[0] if artifacts else ("clip_ttrt", "")
    columns = {name: (name, "", "call") for name in reversed(STYLES) if name != "clip_ttrt"}
    columns |= {"clip_ttrt": (*ours, "call"), "its graph": (*ours, "graph")}
    columns["floor"] = ("floor", "", "graph")
    measured = groups(rows, "backend", "kernels", "how")
    columns = {name: key for name, key in columns.items() if key in measured}
    lines = [f"| encoder, batch | {' | '.join(columns)} | of torch.compile |",
             "|---" * (len(columns) + 2) + "|"]  # fmt: skip
    for (model, encoder, _, tokens, batch), part in groups(rows, *PANEL, "batch").items():
        found = {(row["backend"], row["kernels"], row["how"]): row["median_ms"] for row in part}
        ms = {name: float(found[key]) for name, key in columns.items() if key in found}
        cells = [f"{ms[name]:.3f}" if name in ms else "" for name in columns]
        both = "clip_ttrt" in ms and "torch.compile" in ms
        cells.append(f"{ms['clip_ttrt'] / ms['torch.compile']:.2f}" if both else "")
        name = f"{model} {encoder} {tokens}".strip()
        lines.append(f"| {name}, {batch} | {' | '.join(cells)} |")
    return "\n".join(lines)


def draw(path: Path, gpu: str | None = None, commit: str | None = None) -> Path:
    """Draw a CSV into the PNG beside it, and return that.  Raises ValueError without rows."""
    figure = plot(latest(read_rows(path), gpu, commit))
    target = path.with_suffix(".png")
    figure.savefig(target, dpi=150)
    return target


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--csv", type=Path, default=Path("results/speed.csv"))
    parser.add_argument("--gpu", metavar="NAME", help="as in the file; default: the last row's")
    parser.add_argument("--commit", metavar="ID", help="likewise")
    options = parser.parse_args(arguments)
    try:
        print(draw(options.csv, options.gpu, options.commit))
        print(table(latest(read_rows(options.csv), options.gpu, options.commit)))
    except (ImportError, ValueError) as problem:
        parser.error(f"{options.csv}: {problem}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
