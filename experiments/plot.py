"""Figures from the CSV files alone: python -m experiments.plot [--results results]

results/attention_ratio.png   the attention kernel against the fastest library, over the sequence length
results/profile.png           where ViT-L/14's time goes, with TensorRT's own attention and with the plugin
"""
import argparse
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import pandas as pd

# Okabe and Ito's colours, which colour-blind readers tell apart.
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442", "#999999")


def stamp(figure, rows: pd.DataFrame) -> None:
    """GPU, versions and commit in the corner."""
    row = rows.iloc[0]
    parts = [row["gpu"], f"commit {row['commit']}"] + [f"{name} {row[name]}" for name in ("torch", "tensorrt") if name in rows]
    figure.text(0.995, 0.005, ", ".join(parts), ha="right", va="bottom", fontsize=7, color="#666666")


def attention_ratio(results: Path) -> plt.Figure:
    """Time of the fused kernel over that of the fastest library kernel, by sequence length, one line a batch size."""
    rows = pd.read_csv(results / "h200" / "attention.csv")
    figure, axes = plt.subplots(figsize=(7.5, 4.2))
    for colour, (batch, group) in zip(COLOURS, rows.groupby("batch")):
        group = group.sort_values(["tokens", "heads"])
        axes.plot(group["tokens"], group["ratio"], "o-", color=colour, label=f"batch {batch}", markersize=5, linewidth=1.2)
    axes.axhline(1, color="#444444", linewidth=1, linestyle="--")
    axes.set_xscale("log", base=2)
    axes.set_xticks(sorted(rows["tokens"].unique()), [str(tokens) + ("\ncausal" if tokens == 77 else "") for tokens in sorted(rows["tokens"].unique())])
    axes.minorticks_off()
    axes.set_ylim(0, 1.1)
    axes.set_xlabel("tokens")
    axes.set_ylabel("time / fastest library's time")
    axes.set_title(f"Fused attention takes {rows['ratio'].min():.2f} to {rows['ratio'].max():.2f} of the fastest library's time")
    axes.legend(ncol=3, frameon=False, loc="lower right")
    stamp(figure, rows)
    figure.tight_layout()
    return figure


def kernel_profile(results: Path) -> plt.Figure:
    """Microseconds by kind of kernel in one call, stacked, native attention above the plugin."""
    rows = pd.read_csv(results / "h200" / "profile.csv")
    totals = rows.pivot_table(index="attention", columns="kind", values="us", aggfunc="sum", fill_value=0) / 1e3
    totals = totals[totals.sum().sort_values(ascending=False).index]
    figure, axes = plt.subplots(figsize=(7.5, 3.0))
    left = pd.Series(0.0, index=totals.index)
    for colour, kind in zip(COLOURS, totals):
        axes.barh(totals.index, totals[kind], left=left, color=colour, label=kind)
        for attention in totals.index:
            if totals.loc[attention, kind] > 0.6:
                axes.text(left[attention] + totals.loc[attention, kind] / 2, attention, f"{totals.loc[attention, kind]:.1f}", ha="center", va="center", fontsize=8)
        left += totals[kind]
    row, sums = rows.iloc[0], totals.sum(axis=1)
    axes.set_xlabel("milliseconds of kernels in one call")
    axes.set_title(f"{row['model']} {row['encoder']} at batch {row['batch']}: the plugin takes kernels from {sums['native']:.1f} to {sums['plugin']:.1f} ms")
    axes.legend(ncol=4, frameon=False, fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.28))
    stamp(figure, rows)
    figure.tight_layout()
    return figure


FIGURES = {"attention_ratio.png": attention_ratio, "profile.png": kernel_profile}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=Path("results"))
    results = parser.parse_args().results
    for name, draw in FIGURES.items():
        figure = draw(results)
        figure.savefig(results / name, dpi=130)
        plt.close(figure)


if __name__ == "__main__":
    main()
