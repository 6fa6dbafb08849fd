"""Labelled pictures: where they lie, their features, and intervals of shares of right answers."""
import csv
import json
import math
import os
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Callable, Iterable, Iterator, Optional

import numpy as np
import torch

from clip_ttrt.errors import UserError
from clip_ttrt.options import EmbedOptions

Z = 1.959964  # of 95 %


def with_labels(source: str, rows: list, options: Any) -> tuple[list[str], np.ndarray]:
    """Paths of a table's pictures and their labels; UserError where one has none."""
    if not rows:
        raise UserError(f"{source} holds no picture; a folder has one folder of them for a class")
    if any(row.get(options.label) in (None, "") for _, row in rows):
        raise UserError(f"{source} has rows without a {options.label!r}; --label names the column "
                        "of them")
    return [path for path, _ in rows], np.array([str(row[options.label]) for _, row in rows])


def read_table(source: str, options: Any) -> list[tuple[str, dict[str, Any]]]:
    """Paths of pictures and what is known of each: of a folder with a folder a class `label`, of a
    .csv, .parquet or .json (a list of objects) a row.  Paths start at options.root or the table."""
    from clip_ttrt.pipeline.sources import choose, walk

    path, ending = os.path.abspath(source), source.lower().rpartition(".")[2]
    if os.path.isdir(path):
        names = sorted(each.name for each in os.scandir(path) if each.is_dir())
        return [(file, {options.label: name})
                for name in names for file in walk(os.path.join(path, name))]
    try:
        if ending == "parquet":
            rows = from_parquet(Path(path))
        elif ending in ("csv", "json"):
            with open(path, encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
                rows = list(csv.DictReader(file, restkey="", restval="") if ending == "csv" else
                            json.load(file))
        else:
            raise UserError(f"{source} is no folder, .csv, .parquet or .json")
    except (ValueError, csv.Error) as problem:
        raise UserError(f"{source} cannot be read: {problem}") from problem
    column = choose(source, list(rows[0]), False, options.column) if rows else ""
    home, places = Path(getattr(options, "root", None) or Path(path).parent), [
        (row.get(column) or "", row) for row in rows]
    return [(place if "://" in place else str(home / place), row) for place, row in places]


def shards(items: Iterable, labels: Iterable[int] = (), kind: Optional[type] = None) -> list:
    """What `embed` takes in place of inputs.  items: paths, of which metadata gets the labels that
    there are, or what a kind of `Rows` reads."""
    from clip_ttrt.pipeline.sources import Rows, file_item

    labelled = [file_item(path, {"label": label}, path) for path, label in zip(items, labels)]
    items, step = labelled or list(items), EmbedOptions.shard_rows
    return [(kind or Rows)(items[start:start + step]) for start in range(0, len(items), step)]


def embedded(*inputs: Any, **options: Any) -> Iterator[tuple[torch.Tensor, list, list]]:
    """`embed` inputs, of which nothing stays behind; what `written` tells."""
    from clip_ttrt.pipeline.embed import embed

    with TemporaryDirectory() as out:
        try:
            embed(*inputs, partial(passing, out), **options)
        except KeyboardInterrupt:
            raise KeyboardInterrupt("interrupted; nothing of it is kept") from None
        yield from written(out, lambda table: json.loads(table.read_bytes()))


def passing(*about: Any) -> Any:
    """An output whose tables are JSON, which takes no package to write and read."""
    from clip_ttrt.pipeline.output import Output

    out = Output(*about)
    out.table = as_json
    return out


def as_json(rows: list[dict[str, Any]]) -> bytes:
    """Of a file's name a byte that UTF-8 cannot hold, e9 say, becomes \\udce9, as in Parquet."""
    return json.dumps([{key: value.encode("utf-8", "backslashreplace").decode()
                        if isinstance(value, str) else value for key, value in row.items()}
                       for row in rows], default=str).encode()


def from_parquet(path: Path) -> list[dict[str, Any]]:
    from clip_ttrt.pipeline.sources import library

    return library("pyarrow.parquet").read_table(path).to_pylist()


def written(out: Any, read: Callable[[Path], list] = from_parquet
            ) -> Iterator[tuple[torch.Tensor, list[dict], list[dict]]]:
    """Of each shard that `embed` wrote: features [good, E], or [0] of none, the metadata of their
    rows, and the bad rows."""
    for done in sorted(Path(out).glob("done/*.json")):
        tables = (Path(out, kind, f"{kind}_{done.stem}.parquet") for kind in ("metadata", "bad"))
        metadata, bad = (read(each) if each.exists() else [] for each in tables)
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
