"""Figures from the CSV files alone: python -m experiments.plot [--results results] [--only NAME ...]

results/speedup.png           every backend against the original in eager fp16, over the batch
results/floor.png             milliseconds against the sum of the fastest library kernels
results/load.png              throughput and p99 latency over the number of threads
results/text_length.png       milliseconds over the length to which texts are trimmed
results/errors.png            errors of the compiled encoders (builder levels 3 and 0), by precision
results/stages.png            where the time from JPEG files to features goes
results/ladder.png            milliseconds after each step of the optimisation
results/attention_ratio.png   the attention kernel against the fastest library, over the sequence length
results/profile.png           where ViT-L/14's time goes, with TensorRT's own kernels and with the plugins

They are read from results/h200/.  Every other folder of results/ that holds CSVs is another GPU's, and its figures are
results/NAME-GPU.png, such as results/ladder-h100.png.  A figure whose CSV is not there, or holds no row for it, is skipped with a
line that says so.
"""
import argparse
import itertools
import textwrap
from pathlib import Path
from typing import Callable, Iterable, Optional

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.colors import to_rgb
from matplotlib.ticker import NullLocator

from experiments.results import BATCHES, MODELS, NoData, best, full_length, gpus, percent, picture, present, read, read_accuracy, read_ladder, read_sweep

# Okabe and Ito's colours, which colour-blind readers tell apart.
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442", "#999999")
GREY = "#444444"

# One colour, marker and name a backend, in every figure; what is ours comes first.
BACKENDS = {
    "clip_ttrt_plugin": ("#0072B2", "o", "clip_ttrt, plugins"),
    "clip_ttrt_native": ("#009E73", "s", "clip_ttrt, TensorRT's kernels"),
    "clip_ttrt_plugin_range": ("#0072B2", "o", "clip_ttrt, plugins, batch range"),
    "clip_ttrt_native_range": ("#009E73", "s", "clip_ttrt, TensorRT's kernels, batch range"),
    "tensorrt_onnx": ("#000000", "D", "TensorRT through ONNX"),
    "torch_compile_reduce_overhead": ("#E69F00", "^", "torch.compile reduce-overhead"),
    "torch_compile_max_autotune": ("#D55E00", "v", "torch.compile max-autotune"),
    "eager_sdpa": ("#56B4E9", "P", "our encoders in PyTorch"),
    "onnxruntime": ("#CC79A7", "X", "ONNX Runtime"),
    "clip_graph": ("#999999", "h", "the original, CUDA graph"),
    "clip_eager": ("#999999", "*", "the original, eager"),
}


def look(backend: str) -> dict:
    """Colour, marker, line and label of a backend."""
    colour, marker, label = BACKENDS.get(backend, (GREY, ".", backend))
    return {"color": colour, "marker": marker, "label": label, "markersize": 5, "linewidth": 1.3, "linestyle": "--" if backend.endswith("_range") else "-"}


def stamp(figure: plt.Figure, rows: pd.DataFrame) -> None:
    """GPU, versions and commits in the corner."""
    def values(column: str) -> list[str]:
        return sorted({str(value) for value in rows[column].dropna()} - {""}) if column in rows else []

    commits = values("commit")
    parts = values("gpu") + [f"{name} {' and '.join(values(name))}" for name in ("torch", "tensorrt") if values(name)]
    parts.append(f"commit {', '.join(commits)}" if len(commits) <= 3 else f"{len(commits)} commits, see the CSV")
    figure.text(0.995, 0.004, ", ".join(parts), ha="right", va="bottom", fontsize=7, color="#666666")


def headline(figure: plt.Figure, text: str) -> None:
    """The finding above all panels, in as many lines as the width asks for."""
    figure.suptitle(textwrap.fill(text, int(10.5 * figure.get_figwidth())), fontsize=11)


def readable_on(colour: str) -> str:
    """Black or white, whichever is told apart better from a bar of this colour."""
    red, green, blue = to_rgb(colour)
    return "white" if 0.299 * red + 0.587 * green + 0.114 * blue < 0.5 else "black"


def lay_out(figure: plt.Figure, columns: int) -> None:
    """All panels above one legend: each label once, in so many columns as the width has room for."""
    found = {}
    for axes in figure.axes:
        for handle, label in zip(*axes.get_legend_handles_labels()):
            found.setdefault(label, handle)
    columns = max(1, min(columns, int(figure.get_figwidth() / (0.5 + 0.065 * max(map(len, found))))))
    inches = 0.35 + 0.17 * -(-len(found) // columns)
    figure.tight_layout(rect=(0, inches / figure.get_figheight(), 1, 1))
    figure.legend(found.values(), found.keys(), ncol=columns, frameon=False, fontsize=8, loc="lower center", bbox_to_anchor=(0.5, 0.15 / figure.get_figheight()))


def batch_axis(axes: plt.Axes, batches: Iterable[int]) -> None:
    """A logarithmic axis that names the batches."""
    axes.set_xscale("log", base=2)
    axes.set_xticks(sorted(batches), [str(batch) for batch in sorted(batches)])
    axes.minorticks_off()


def one_two_five(low: float, high: float) -> list[float]:
    """1, 2 and 5 times powers of ten from below low to high."""
    ladder = [digit * 10.0**power for power in range(-4, 6) for digit in (1, 2, 5)]
    return [value for value in ladder if low / 2 < value <= high * 1.3]


def draw(axes: plt.Axes, rows: pd.DataFrame, x: str, y: str, backend: str) -> None:
    """One line, a single point above lines; hollow markers where the features were wrong."""
    rows = rows.sort_values(x)
    axes.plot(rows[x], rows[y], **look(backend), zorder=2 if len(rows) > 1 else 3)
    if "wrong" in rows and rows["wrong"].any():
        style = look(backend)
        wrong = rows[rows["wrong"]]
        axes.plot(wrong[x], wrong[y], linestyle="", marker=style["marker"], markersize=7, markerfacecolor="white", markeredgecolor=style["color"])


def speedup(folder: Path) -> plt.Figure:
    """Times as fast as the original in eager fp16, by batch: one panel a model and encoder, one line a backend.

    Where a single batch was measured its backends stand side by side, the slowest first.
    """
    rows = full_length(read_sweep(folder))
    rows = rows[(rows["precision"] == "fp16") & rows["batch"].isin(BATCHES)]
    case = ["model", "encoder", "batch"]
    original = rows[rows["backend"] == "clip_eager"].set_index(case)["median_ms"]
    # The original's own line is the dotted one at 1.
    rows = best(rows[rows["backend"] != "clip_eager"], *case, "backend").copy()
    rows["times"] = [original.get(key, float("nan")) / ms for key, ms in zip(zip(*(rows[name] for name in case)), rows["median_ms"])]
    everything, rows = rows, rows[rows["times"].notna()]
    if rows.empty:
        raise NoData("sweep.csv has no fp16 rows beside clip_eager's")
    parts = [(f"{model} {encoder}", rows[(rows["model"] == model) & (rows["encoder"] == encoder)])
             for model in present(rows, MODELS, "model") for encoder in present(rows[rows["model"] == model], ("image", "text"), "encoder")]
    columns = min(3, len(parts))
    figure, panels = plt.subplots(-(-len(parts) // columns), columns, figsize=(max(7.5, 3.1 * columns), 2.7 * -(-len(parts) // columns) + 1.6), squeeze=False)
    for axes in panels.flat[len(parts):]:
        axes.set_visible(False)
    for axes, (title, part) in zip(panels.flat, parts):
        backends = present(part, BACKENDS, "backend")
        if part["batch"].nunique() > 1:
            for backend in reversed(backends):
                draw(axes, part[part["backend"] == backend], "batch", "times", backend)
            batch_axis(axes, BATCHES)
            axes.set_xlabel("batch", fontsize=8)
        else:
            order = part.sort_values("times", kind="stable")["backend"].tolist()
            for backend in reversed(backends):
                draw(axes, part[part["backend"] == backend].assign(place=order.index(backend)), "place", "times", backend)
            axes.set_xlim(-1, len(order))
            axes.set_xticks([])
            axes.set_xlabel(f"batch {part['batch'].iloc[0]}", fontsize=8)
        axes.axhline(1, color=GREY, linewidth=1, linestyle=":")
        axes.set_title(title, fontsize=9)
        axes.set_ylim(0, 1.08 * max(1, part["times"].max()))
        axes.tick_params(labelsize=8)
    for axes in panels[:, 0]:
        axes.set_ylabel("times as fast as the original", fontsize=8)
    headline(figure, fastest_title(everything, case))
    lay_out(figure, 3)
    stamp(figure, rows)
    return figure


def fastest_title(rows: pd.DataFrame, case: list[str]) -> str:
    """In how many cases, of those that ours and another backend share, ours is the fastest."""
    right = rows[~rows["wrong"]]
    ours = right["backend"].str.startswith("clip_ttrt")
    if right[ours]["times"].isna().all():
        return "Times as fast as the original in eager fp16"
    mine, others = (right[part].groupby(case)["median_ms"].min() for part in (ours, ~ours))
    both = mine.index.intersection(others.index)
    peak = f"up to {right[ours]['times'].max():.1f} times as fast as the original in eager fp16"
    if len(both) == 0:
        return f"clip_ttrt is {peak}"
    return f"clip_ttrt is the fastest in {int((mine[both] <= others[both]).sum())} of {len(both)} cases, {peak}"


def against_floor(folder: Path) -> plt.Figure:
    """Milliseconds over the floor of the same work, both logarithmic; one panel an encoder, one colour a backend."""
    rows = full_length(read_sweep(folder))
    rows = rows[(rows["precision"] == "fp16") & rows["floor_ms"].notna() & rows["batch"].isin(BATCHES) & ~rows["wrong"]]
    chosen = ("clip_ttrt_plugin", "clip_ttrt_native", "clip_ttrt_plugin_range", "tensorrt_onnx", "torch_compile_reduce_overhead", "clip_eager")
    rows = best(rows[rows["backend"].isin(chosen)], "model", "encoder", "batch", "backend") if len(rows) else rows
    if rows.empty:
        raise NoData("sweep.csv has no fp16 rows with floor_ms")
    encoders = present(rows, ("image", "text"), "encoder")
    figure, panels = plt.subplots(1, len(encoders), figsize=(max(6.0, 4.6 * len(encoders)), 4.9), squeeze=False, sharey=True)
    for axes, encoder in zip(panels[0], encoders):
        part = rows[rows["encoder"] == encoder]
        span = [part["floor_ms"].min() / 1.3, part["floor_ms"].max() * 1.3]
        for factor, style in ((1, "-"), (2, "--"), (4, ":")):
            axes.plot(span, [factor * value for value in span], color="#BBBBBB", linewidth=1, linestyle=style, zorder=0)
            axes.annotate(f"{factor}x", (span[1], factor * span[1]), fontsize=7, color="#888888", ha="left", va="center")
        for backend in reversed(present(part, BACKENDS, "backend")):
            points = part[part["backend"] == backend]
            hollow = {"markerfacecolor": "white"} if backend.endswith("_range") else {}
            axes.plot(points["floor_ms"], points["median_ms"], **{**look(backend), **hollow, "linestyle": ""})
        for axis, values in ((axes.xaxis, part["floor_ms"]), (axes.yaxis, rows["median_ms"])):
            axis.axes.set(**{f"{axis.axis_name}scale": "log"})
            axis.set_ticks(ticks := one_two_five(values.min(), values.max()), [f"{tick:g}" for tick in ticks])
            axis.set_minor_locator(NullLocator())
        axes.set_title(f"{encoder} encoders, fp16, batches {min(part['batch'])} to {max(part['batch'])}", fontsize=9)
        axes.set_xlabel("floor: the fastest library kernels, ms")
    panels[0][0].set_ylabel("milliseconds")
    ours = rows[rows["backend"].str.startswith("clip_ttrt")]
    share = best(ours, "model", "encoder", "batch") if len(ours) else rows
    ratio = share["median_ms"] / share["floor_ms"]
    headline(figure, f"{'clip_ttrt takes' if len(ours) else 'Times are'} {ratio.min():.2f} to {ratio.max():.2f} times the floor, {ratio.median():.2f} in the median")
    lay_out(figure, 3)
    stamp(figure, rows)
    return figure


def under_load(folder: Path) -> plt.Figure:
    """Items per second and p99 latency over the number of threads in a closed loop; one column a model, encoder and batch."""
    rows = read(folder, "load.csv")
    if "error" in rows:
        rows = rows[rows["error"].isna()]
    rows = rows[rows["items_per_second"].notna()]
    rows = rows[(rows["model"] != "demo") | (rows["model"] == "demo").all()]
    if rows.empty:
        raise NoData("load.csv has no row with a throughput")
    rows = rows.loc[rows.groupby(["model", "encoder", "batch", "backend", "threads"])["items_per_second"].idxmax()]
    cases = list(dict.fromkeys(zip(rows["model"], rows["encoder"], rows["batch"])))[:4]
    figure, panels = plt.subplots(2, len(cases), figsize=(max(6.0, 3.6 * len(cases)), 5.6), squeeze=False, sharex=True)
    for (upper, lower), (model, encoder, batch) in zip(panels.T, cases):
        part = rows[(rows["model"] == model) & (rows["encoder"] == encoder) & (rows["batch"] == batch)]
        for backend in reversed(present(part, BACKENDS, "backend")):
            draw(upper, part[part["backend"] == backend], "threads", "items_per_second", backend)
            draw(lower, part[part["backend"] == backend], "threads", "p99_ms", backend)
        upper.set_title(f"{model} {encoder}, requests of {batch}", fontsize=9)
        lower.set_xlabel("threads, one request each at a time", fontsize=8)
        lower.set_xticks(sorted(rows["threads"].unique()))
        upper.set_ylim(0, 1.08 * part["items_per_second"].max())
        lower.set_yscale("log")
        lower.set_yticks(ticks := one_two_five(part["p99_ms"].min(), part["p99_ms"].max()), [f"{tick:g}" for tick in ticks])
        lower.yaxis.set_minor_locator(NullLocator())
    panels[0][0].set_ylabel("images or texts a second", fontsize=8)
    panels[1][0].set_ylabel("p99 latency, ms", fontsize=8)
    ours = rows[rows["backend"].str.startswith("clip_ttrt")]
    found = [load_title(part, f"{model} {encoder}, requests of {batch}") for model, encoder, batch in cases
             if len(part := ours[(ours["model"] == model) & (ours["encoder"] == encoder) & (ours["batch"] == batch)])]
    headline(figure, ". ".join(found) or "Throughput and latency under load")
    lay_out(figure, 3)
    stamp(figure, rows)
    return figure


def load_title(ours: pd.DataFrame, case: str) -> str:
    """Where our throughput ends, and what the threads cost in latency."""
    top, one = ours.loc[ours["items_per_second"].idxmax()], ours.loc[ours["threads"].idxmin()]
    return (f"{case}: {one['items_per_second']:,.0f} a second from {one['threads']} thread, {top['items_per_second']:,.0f} from {top['threads']}; "
            f"p99 from {one['p99_ms']:.2g} to {top['p99_ms']:.2g} ms")


def text_length(folder: Path) -> plt.Figure:
    """Milliseconds over the text length, one panel a model and batch, one line a backend."""
    rows = read(folder, "text_length.csv")
    rows = rows[rows["median_ms"].notna()]
    if rows.empty:
        raise NoData("text_length.csv has no row with a time")
    rows = best(rows, "model", "backend", "batch", "tokens")
    rows = rows[rows.groupby(["model", "backend", "batch"])["tokens"].transform("size") > 1]
    if rows.empty:
        raise NoData("text_length.csv has no two lengths of one encoder")
    cases = list(dict.fromkeys(zip(rows["model"], rows["batch"])))[:4]
    figure, panels = plt.subplots(1, len(cases), figsize=(max(6.0, 3.4 * len(cases)), 3.9), squeeze=False)
    for axes, (model, batch) in zip(panels[0], cases):
        part = rows[(rows["model"] == model) & (rows["batch"] == batch)]
        for backend in reversed(present(part, BACKENDS, "backend")):
            draw(axes, part[part["backend"] == backend], "tokens", "median_ms", backend)
        axes.set_title(f"{model} text, batch {batch}", fontsize=9)
        lengths = sorted(part["tokens"].unique())
        shares = part.dropna(subset=["fit_share"]).drop_duplicates("tokens").set_index("tokens")["fit_share"]
        axes.set_xticks(lengths, [f"{tokens}\n{percent(float(shares[tokens]))}" if tokens in shares.index else str(tokens) for tokens in lengths])
        axes.set_xlabel("tokens; share of the prompts that fit", fontsize=8)
        axes.set_ylim(0, 1.08 * part["median_ms"].max())
    panels[0][0].set_ylabel("milliseconds", fontsize=8)
    ours = rows[rows["backend"].str.startswith("clip_ttrt")]
    shares = [group["median_ms"].iloc[0] / group["median_ms"].iloc[-1] for _, group in (ours if len(ours) else rows).sort_values("tokens").groupby(["model", "backend", "batch"])]
    mean = rows["mean_tokens"].dropna()
    span = " to ".join(dict.fromkeys(f"{share:.2f}" for share in (min(shares), max(shares))))
    title = f"Texts of {int(rows['tokens'].min())} tokens take {span} of the time of {int(rows['tokens'].max())}"
    headline(figure, title + (f"; prompts have {mean.iloc[0]:.1f} in the mean" if len(mean) else ""))
    lay_out(figure, 3)
    stamp(figure, rows)
    return figure


def errors(folder: Path) -> plt.Figure:
    """Largest, mean and median relative error of every encoder built at the builder's usual level or at 0, by precision, with trained and random weights told apart."""
    rows = read_accuracy(folder)
    rows = rows[rows["encoder"].isin(("image", "text"))]
    precisions = present(rows, ("fp32", "tf32", "fp16"), "precision")
    figure, axes = plt.subplots(figsize=(7.5, 4.0))
    for place, precision in enumerate(precisions):
        part = rows[rows["precision"] == precision]
        for shift, (colour, column, label) in zip((-0.24, 0, 0.24), ((COLOURS[5], "rel_max", "largest"), (COLOURS[0], "rel_mean", "mean"), (COLOURS[2], "rel_median", "median"))):
            for marker, weights, name in (("o", part["weights"] == "random", "random weights"), ("*", part["weights"] != "random", "trained weights")):
                values = part.loc[weights, column].sort_values()
                spread = [place + shift + (0.05 if marker == "o" else -0.07) + 0.025 * (index % 3 - 1) for index in range(len(values))]
                axes.plot(spread, values, linestyle="", marker=marker, color=colour, markersize=9 if marker == "*" else 5, alpha=0.8, label=f"{label}, {name}")
    axes.set_yscale("log")
    axes.set_xlim(-0.5, len(precisions) - 0.5)
    axes.set_xticks(range(len(precisions)), [f"{precision}\n{sum(rows['precision'] == precision)} encoders" for precision in precisions])
    axes.set_ylabel("relative error of a row of features")
    axes.grid(axis="y", color="#DDDDDD", linewidth=0.6)
    worst = rows.groupby("precision")["rel_max"].max()
    headline(figure, "Largest relative error of any feature row: " + ", ".join(f"{worst[precision]:.1e} in {precision}" for precision in precisions))
    lay_out(figure, 3)
    stamp(figure, rows)
    return figure


STAGES = ("decode", "resize", "normalise", "copy", "encode")


def stages(folder: Path) -> plt.Figure:
    """Shares of the stages from JPEG files to features, one bar a backend and number of workers."""
    rows = read(folder, "jpeg.csv").iloc[::-1].reset_index(drop=True)  # barh draws upwards
    figure, axes = plt.subplots(figsize=(8.5, 1.7 + 0.42 * len(rows)))
    names = [f"{row['model']}, {BACKENDS.get(row['backend'], ('', '', row['backend']))[2]}\nbatch {row['batch']}, workers {row['workers']}: {row['images_per_second']:,.0f} images/s"
             for _, row in rows.iterrows()]
    left = pd.Series(0.0, index=rows.index)
    for colour, stage in zip(COLOURS, STAGES):
        share = rows[f"{stage}_share"].astype(float)
        axes.barh(names, share, left=left, color=colour, label=stage, height=0.62)
        for index in rows.index:
            if share[index] > 0.06:
                axes.text(left[index] + share[index] / 2, names[index], f"{share[index]:.0%}", ha="center", va="center", fontsize=8, color=readable_on(colour))
        left += share
    axes.set_xlim(0, 1)
    axes.set_xlabel("share of the work on an image")
    axes.tick_params(axis="y", labelsize=8)
    first = rows.iloc[-1]
    before = sum(float(first[f"{stage}_share"]) for stage in STAGES[:3])
    headline(figure, f"From JPEG files, decoding, resizing and normalising are {before:.0%} of the work, the encoder {float(first['encode_share']):.0%}")
    lay_out(figure, 5)
    stamp(figure, rows)
    return figure


def ladder(folder: Path) -> plt.Figure:
    """Milliseconds after each step, one column a model, encoder and batch."""
    rows = read_ladder(folder)
    rows = rows[rows["median_ms"].notna()]
    if rows.empty:
        raise NoData("ladder.csv has no row with a time")
    cases = list(dict.fromkeys(zip(rows["model"], rows["encoder"], rows["batch"])))[:3]
    figure, panels = plt.subplots(len(cases), 1, figsize=(8.5, 0.6 + (0.55 + 0.36 * rows.groupby(["model", "encoder", "batch"]).size().max()) * len(cases)), squeeze=False)
    for axes, (model, encoder, batch) in zip(panels[:, 0], cases):
        part = rows[(rows["model"] == model) & (rows["encoder"] == encoder) & (rows["batch"] == batch)].iloc[::-1]
        axes.barh(part["step"], part["median_ms"], height=0.62, color=[COLOURS[0] if good else "white" for good in part["error"].isna()], edgecolor=COLOURS[0])
        for step, ms in zip(part["step"], part["median_ms"]):
            axes.text(ms, step, f" {ms:.2f}", va="center", fontsize=8)
        axes.set_xlim(0, part["median_ms"].max() * 1.12)
        axes.tick_params(axis="y", labelsize=8)
        axes.set_title(f"{model} {encoder}, batch {batch}, fp16: from {part['median_ms'].iloc[-1]:.2f} to {part['median_ms'].iloc[0]:.2f} ms", fontsize=10)
    panels[-1][0].set_xlabel("milliseconds of one call" + ("; hollow: features wrong" if rows["error"].notna().any() else ""))
    figure.tight_layout(rect=(0, 0.03, 1, 1))
    stamp(figure, rows)
    return figure


def attention_ratio(folder: Path) -> plt.Figure:
    """Time of the fused kernel over that of the fastest library kernel, by sequence length: a point for each number of heads, a line through their means for each batch."""
    rows = read(folder, "attention.csv")
    figure, axes = plt.subplots(figsize=(7.5, 4.2))
    for colour, (batch, group) in zip(COLOURS, rows.groupby("batch")):
        means = group.groupby("tokens")["ratio"].mean()
        axes.plot(means.index, means, color=colour, linewidth=1.2)
        axes.plot(group["tokens"], group["ratio"], "o", color=colour, label=f"batch {batch}", markersize=5)
    axes.axhline(1, color=GREY, linewidth=1, linestyle="--")
    axes.set_xscale("log", base=2)
    axes.set_xticks(sorted(rows["tokens"].unique()), [str(tokens) + ("\ncausal" if tokens == 77 else "") for tokens in sorted(rows["tokens"].unique())])
    axes.minorticks_off()
    axes.set_ylim(0, max(1.1, rows["ratio"].max() * 1.05))
    axes.set_xlabel("tokens")
    axes.set_ylabel("time / fastest library's time")
    axes.set_title(f"Fused attention takes {rows['ratio'].min():.2f} to {rows['ratio'].max():.2f} of the fastest library's time")
    axes.legend(ncol=3, frameon=False, loc="lower right")
    stamp(figure, rows)
    figure.tight_layout()
    return figure


def kernel_profile(folder: Path) -> plt.Figure:
    """Microseconds by kind of kernel in one call, stacked, one bar a way of doing attention."""
    rows = read(folder, "profile.csv")
    if not {"native", "plugin"} <= set(rows["attention"]):
        raise NoData("profile.csv has not both TensorRT's own attention and the plugins")
    totals = rows.pivot_table(index="attention", columns="kind", values="us", aggfunc="sum", fill_value=0) / 1e3
    totals = totals.loc[totals.sum(axis=1).sort_values().index, totals.sum().sort_values(ascending=False).index]  # barh draws upwards
    figure, axes = plt.subplots(figsize=(7.5, 2.0 + 0.5 * len(totals)))
    left = pd.Series(0.0, index=totals.index)
    for colour, kind in zip(COLOURS, totals):
        axes.barh(totals.index, totals[kind], left=left, color=colour, label=kind)
        for attention in totals.index:
            if totals.loc[attention, kind] > 0.6:
                axes.text(left[attention] + totals.loc[attention, kind] / 2, attention, f"{totals.loc[attention, kind]:.1f}", ha="center", va="center", fontsize=8, color=readable_on(colour))
        left += totals[kind]
    row, sums = rows.iloc[0], totals.sum(axis=1)
    axes.set_xlabel("milliseconds of kernels in one call")
    axes.set_title(f"{row['model']} {row['encoder']} at batch {row['batch']}: plugins take kernels from {sums['native']:.1f} to {sums['plugin']:.1f} ms")
    axes.legend(ncol=4, frameon=False, fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.28))
    stamp(figure, rows)
    figure.tight_layout()
    return figure


FIGURES: dict[str, Callable[[Path], plt.Figure]] = {
    "speedup.png": speedup, "floor.png": against_floor, "load.png": under_load, "text_length.png": text_length, "errors.png": errors, "stages.png": stages,
    "ladder.png": ladder, "attention_ratio.png": attention_ratio, "profile.png": kernel_profile,
}


def main(arguments: Optional[list[str]] = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=Path("results"))
    parser.add_argument("--only", nargs="+", choices=FIGURES, default=list(FIGURES), metavar="NAME", help=f"of {', '.join(FIGURES)}")
    options = parser.parse_args(arguments)
    for gpu, name in itertools.product(gpus(options.results), options.only):
        path = options.results / picture(Path(name).stem, gpu)
        try:
            figure = FIGURES[name](options.results / gpu)
        except NoData as reason:
            print(f"{path.name} is skipped: {reason}", flush=True)
            continue
        figure.savefig(path, dpi=130)
        plt.close(figure)
        print(path, flush=True)


if __name__ == "__main__":
    main()
