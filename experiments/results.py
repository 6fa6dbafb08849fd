"""Reading what was measured: the CSV files of one GPU's folder, results/h200/ or another, as data frames, for figures and tables."""
from pathlib import Path
from typing import Iterable

import pandas as pd

GPU = "h200"  # the folder of results/ that is meant where none is named; those of other GPUs lie beside it
MODELS = ("ViT-B/32", "ViT-B/16", "ViT-L/14", "ViT-L/14@336px", "demo")
BATCHES = (1, 8, 32, 128, 512)
SWEEP_KEY = ["model", "encoder", "backend", "precision", "batch", "tokens", "cuda_graph"]
WRONG = "wrong:"  # begins the error of a row whose times are good and features are not
TEXT = ("torch", "tensorrt", "gpu", "commit", "error")  # columns that are names, even where they look like numbers


class NoData(Exception):
    """There is nothing to show; the message says which file or rows are missing."""


def read_csv(path: Path) -> pd.DataFrame:
    """A CSV in which an empty cell is missing, and a commit of digits alone stays a name."""
    return pd.read_csv(path, keep_default_na=False, na_values=[""], dtype={name: str for name in TEXT})


def gpus(results: Path) -> list[str]:
    """The folders of results/ with measurements: the usual GPU's, there or not, then those of others that hold a CSV."""
    return [GPU, *sorted({path.parent.name for path in results.glob("*/*.csv")} - {GPU})]


def picture(name: str, gpu: str) -> str:
    """The file in results/ of a figure drawn from one GPU's folder: NAME.png for the usual GPU, NAME-GPU.png for another."""
    return f"{name}.png" if gpu == GPU else f"{name}-{gpu}.png"


def read(folder: Path, name: str) -> pd.DataFrame:
    """One CSV of a GPU's folder.  Raises NoData where it is missing or empty."""
    path = folder / name
    if not path.exists():
        raise NoData(f"there is no {path}")
    rows = read_csv(path)
    if rows.empty:
        raise NoData(f"{path} has no rows")
    return rows


def read_accuracy(folder: Path) -> pd.DataFrame:
    """Errors of every compiled encoder and its logits, built at the builder's usual level or at 0.  Raises NoData as `read` does."""
    return pd.concat([read(folder, "accuracy.csv"), *(read(folder, path.name) for path in folder.glob("accuracy_level_0.csv"))], ignore_index=True)


def read_sweep(folder: Path) -> pd.DataFrame:
    """All rows of the folder's sweep*.csv with a time, and `wrong` where the features were; of what was measured more than once the fastest.

    The original `clip` model is `clip_eager` as it is used, eager, and `clip_graph` where its CUDA graph is replayed.
    `floor_ms` is that of the row's own run, and missing where none was measured there.
    """
    paths = sorted(folder.glob("sweep*.csv"))
    if not paths:
        raise NoData(f"there is no {folder / 'sweep.csv'}")
    rows = pd.concat([read_csv(path) for path in paths], ignore_index=True)
    rows["error"] = rows["error"].fillna("")
    rows["wrong"] = rows["error"].str.startswith(WRONG)
    rows = rows[rows["median_ms"].notna() & ((rows["error"] == "") | rows["wrong"])]
    if rows.empty:
        raise NoData("sweep.csv has no row with a time")
    rows = rows.sort_values("median_ms", kind="stable").drop_duplicates(SWEEP_KEY).sort_index()
    rows.loc[(rows["backend"] == "clip_eager") & (rows["cuda_graph"].astype(str) == "True"), "backend"] = "clip_graph"
    return rows


# The ladder as far as a sweep knows it: a step, the backend whose row it is, and whether a CUDA graph replays it.
SWEEP_LADDER = (("the original, eager", "clip_eager", False), ("the original, CUDA graph", "clip_graph", True), ("our encoders in PyTorch, CUDA graph", "eager_sdpa", True),
                ("one engine of ours, TensorRT's kernels", "clip_ttrt_native", True), ("with the plugins", "clip_ttrt_plugin", True))
SWEEP_LADDER_CASES = (("ViT-B/32", "image", 32), ("ViT-B/32", "text", 32), ("ViT-L/14", "image", 32))


def read_ladder(folder: Path) -> pd.DataFrame:
    """The steps of the optimisation in order: ladder.csv; without it the rows of the sweep that are steps, fp16.

    Columns model, encoder, batch, step, median_ms, graph_ms, engines, error and provenance.
    """
    try:
        return read(folder, "ladder.csv")
    except NoData:
        rows = full_length(read_sweep(folder))
    found = []
    for model, encoder, batch in SWEEP_LADDER_CASES:
        for step, backend, graph in SWEEP_LADDER:
            match = rows[(rows["model"] == model) & (rows["encoder"] == encoder) & (rows["batch"] == batch) & (rows["precision"] == "fp16")
                         & (rows["backend"] == backend) & (rows["cuda_graph"].astype(str) == str(graph))]
            found += [{**row, "step": step, "graph_ms": float("nan"), "engines": float("nan"), "error": row["error"] or float("nan")} for row in match.to_dict("records")]
    if not found:
        raise NoData("neither ladder.csv nor the sweep has steps")
    return pd.DataFrame(found)


def percent(value: float) -> str:
    """A share in percent, never rounded to the whole: 100 % is all of it."""
    return f"{value:.0%}" if value in (0, 1) or f"{value:.0%}" not in ("0%", "100%") else f"{value:.1%}"


def full_length(rows: pd.DataFrame) -> pd.DataFrame:
    """Images, and texts at the model's own length."""
    return rows[(rows["encoder"] == "image") | (rows["tokens"] == 77)]


def best(rows: pd.DataFrame, *keys: str) -> pd.DataFrame:
    """The fastest row of each combination of keys: with or without a CUDA graph."""
    return rows.loc[rows.groupby(list(keys))["median_ms"].idxmin()]


def present(rows: pd.DataFrame, names: Iterable[str], column: str) -> list:
    """Those of the names that the column holds, in their order, then what it holds besides."""
    found = list(dict.fromkeys(rows[column]))
    return [name for name in names if name in found] + [name for name in found if name not in names]
