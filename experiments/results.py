"""Reading what was measured: the CSV files of results/h200/ as data frames, for figures and tables."""
from pathlib import Path
from typing import Iterable

import pandas as pd

MODELS = ("ViT-B/32", "ViT-B/16", "ViT-L/14", "ViT-L/14@336px", "demo")
BATCHES = (1, 8, 32, 128, 512)
SWEEP_KEY = ["model", "encoder", "backend", "precision", "batch", "tokens", "cuda_graph"]
FLOOR_KEY = ["model", "encoder", "precision", "batch", "tokens"]
WRONG = "wrong:"  # begins the error of a row whose times are good and features are not
TEXT = ("torch", "tensorrt", "gpu", "commit", "error")  # columns that are names, even where they look like numbers


class NoData(Exception):
    """There is nothing to show; the message says which file or rows are missing."""


def read_csv(path: Path) -> pd.DataFrame:
    """A CSV in which an empty cell is missing, and a commit of digits alone stays a name."""
    return pd.read_csv(path, keep_default_na=False, na_values=[""], dtype={name: str for name in TEXT})


def read(results: Path, name: str) -> pd.DataFrame:
    """One CSV of results/h200.  Raises NoData where it is missing or empty."""
    path = results / "h200" / name
    if not path.exists():
        raise NoData(f"there is no {path}")
    rows = read_csv(path)
    if rows.empty:
        raise NoData(f"{path} has no rows")
    return rows


def read_sweep(results: Path) -> pd.DataFrame:
    """All rows of results/h200/sweep*.csv with a time, the last of each key, and `wrong` where the features were.

    The original `clip` model is `clip_eager` as it is used, eager, and `clip_graph` where its CUDA graph is replayed.
    `floor_ms` is that of floor.csv, where it stands there.
    """
    paths = sorted((results / "h200").glob("sweep*.csv"))
    if not paths:
        raise NoData(f"there is no {results / 'h200' / 'sweep.csv'}")
    rows = pd.concat([read_csv(path) for path in paths], ignore_index=True)
    rows["error"] = rows["error"].fillna("")
    rows["wrong"] = rows["error"].str.startswith(WRONG)
    rows = rows[rows["median_ms"].notna() & ((rows["error"] == "") | rows["wrong"])]
    if rows.empty:
        raise NoData("sweep.csv has no row with a time")
    rows = rows.drop_duplicates(SWEEP_KEY, keep="last")
    rows.loc[(rows["backend"] == "clip_eager") & (rows["cuda_graph"].astype(str) == "True"), "backend"] = "clip_graph"
    floor = results / "h200" / "floor.csv"
    if floor.exists():
        known = read_csv(floor).drop_duplicates(FLOOR_KEY, keep="last").set_index(FLOOR_KEY)["floor_ms"]
        rows["floor_ms"] = [known.get(key, ms) for key, ms in zip(zip(*(rows[name] for name in FLOOR_KEY)), rows["floor_ms"])]
    return rows


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
