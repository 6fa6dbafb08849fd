"""Labelled pictures: where they lie, their features, and intervals of shares of right answers."""
import csv
import json
import math
import os
from pathlib import Path
from typing import Any, Iterator, Optional, Sequence

import numpy as np
import torch

from clip_ttrt.errors import UserError
from clip_ttrt.options import EmbedOptions

Z = 1.959964  # of 95 %


def with_labels(source: str, rows: list, options: Any) -> tuple[list[str], np.ndarray]:
    """Paths of a table's pictures and their labels; UserError where one has none."""
    if any(row.get(options.label) in (None, "") for _, row in rows):
        raise UserError(f"{source} has rows without a {options.label!r}; --label names the column "
                        "of them")
    return [path for path, _ in rows], np.array([str(row[options.label]) for _, row in rows])


def read_table(source: str, options: Any) -> list[tuple[str, dict[str, Any]]]:
    """Paths of pictures and what is known of each: of a folder the class, by the name of the folder
    in it; of a .csv, .parquet or .json a row, of COCO's captions, too.  Paths start at the table.
    """
    from clip_ttrt.pipeline.sources import choose, library, walk

    path, ending = os.path.abspath(source), source.lower().rpartition(".")[2]
    if os.path.isdir(path):
        names = sorted(each.name for each in os.scandir(path) if each.is_dir())
        rows = [{"image_path": file, options.label: name}
                for name in names for file in walk(os.path.join(path, name))]
    elif ending == "csv":
        with open(path, encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
            rows = list(csv.DictReader(file, restkey="", restval=""))
    elif ending == "parquet":
        rows = library("pyarrow.parquet").read_table(path).to_pylist()
    elif ending == "json":
        rows = read_json(path)
    else:
        raise UserError(f"{source} is no folder, .csv, .parquet or .json")
    if not rows:
        raise UserError(f"{source} holds no picture; a folder has one folder of them for a class")
    column = None if os.path.isdir(path) else options.column
    column, home = choose(source, list(rows[0]), False, column), Path(path).parent
    places = [(row.get(column) or "", row) for row in rows]
    return [(place if "://" in place else str(home / place), row) for place, row in places]


def read_json(path: str) -> list[dict[str, Any]]:
    """A list of objects, or COCO's annotations, whose file names become image_path."""
    try:
        found = json.loads(Path(path).read_text(encoding="utf-8"))
        if isinstance(found, list):
            return [dict(each) for each in found]
        names = {each["id"]: each["file_name"] for each in found["images"]}
        return [{**each, "image_path": names[each["image_id"]]} for each in found["annotations"]]
    except (ValueError, KeyError, TypeError) as problem:
        raise UserError(f"{path} is no list of objects and none of COCO's annotations "
                        f"({problem!r})") from problem


def shards(paths: Sequence[str], labels: Optional[Sequence[int]] = None) -> list:
    """What `embed` takes in place of inputs; the metadata of each row gets its `label`."""
    from clip_ttrt.pipeline.sources import Rows, file_item

    items = list(paths) if labels is None else [
        file_item(path, {"label": int(label)}, path) for path, label in zip(paths, labels)]
    step = EmbedOptions.shard_rows
    return [Rows(items[start:start + step]) for start in range(0, len(items), step)]


def written(out: Any) -> Iterator[tuple[torch.Tensor, list[dict], list[dict]]]:
    """Of each shard that `embed` wrote: features [good, E], or [0] of none, the metadata of their
    rows, and the bad rows."""
    from clip_ttrt.pipeline.sources import library

    for done in sorted(Path(out).glob("done/*.json")):
        tables = (Path(out, kind, f"{kind}_{done.stem}.parquet") for kind in ("metadata", "bad"))
        metadata, bad = (library("pyarrow.parquet").read_table(each).to_pylist()
                         if each.exists() else [] for each in tables)
        features = np.load(Path(out, "img_emb", f"img_emb_{done.stem}.npy"), mmap_mode="c"
                           ) if metadata else np.empty(0, np.float32)
        yield torch.from_numpy(features), metadata, bad


def wilson(hits: np.ndarray) -> list[float]:
    """A share, and the ends of its 95 % interval by Wilson's score."""
    n, share = len(hits), float(hits.mean())
    centre, wide = share + Z * Z / 2 / n, Z * math.sqrt(share * (1 - share) / n + (Z / 2 / n) ** 2)
    return [share, *((centre + sign * wide) / (1 + Z * Z / n) for sign in (-1, 1))]


def difference(first: np.ndarray, second: np.ndarray) -> list[float]:
    """How much higher the second share of right answers is, and its 95 % interval, of the rows that
    both have; from discordant pairs, with one more of each (Bonett and Price 2012)."""
    change = (second - first)[~np.isnan(second - first)]
    n = len(change) + 2
    gain, loss = ((change == 1).sum() + 1) / n, ((change == -1).sum() + 1) / n
    centre, wide = gain - loss, Z * math.sqrt((gain + loss - (gain - loss) ** 2) / n)
    return [float(change.mean()), float(centre - wide), float(centre + wide)]
