"""Labelled pictures: where they lie, their features, and intervals of shares of right answers."""
import glob
import math
import os
from functools import partial
from itertools import chain
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from clip_ttrt.artifact import Artifact
from clip_ttrt.errors import UserError
from clip_ttrt.options import EmbedOptions
from clip_ttrt.pipeline.output import Output, to_json
from clip_ttrt.pipeline.sources import Rows, expand, file_item, read_items, walk

Z = 1.959964  # of 95 %


def read_rows(source: str, options: Any) -> list[list]:
    """Items of `Rows` with what is known of each: of a folder that has one for each class the
    class, as `options.label`; of a .csv, .tar or .parquet, as `embed` reads them, a row."""
    rows, folder = [], os.path.isdir(source)
    for path, ending in expand(f"{glob.escape(source)}/*" if folder else source):
        if ending == "/":
            facts = {options.label: os.path.basename(path)}
            rows += [file_item(each, facts, each) for each in walk(path)]
        elif not folder:
            items = read_items(path, ending, False, 1.0, options.column)
            rows += [each for each in items if isinstance(each, list)]
    if not rows:
        raise UserError(f"{source} holds no picture; a folder has one folder of them for a class")
    if problems := [row[3] for row in rows if row[3]]:
        raise UserError(f"{source} cannot be read: {problems[0]}")
    return rows


def labels_of(source: str, rows: list[list], options: Any) -> np.ndarray:
    """Of `read_rows` the labels, as texts; UserError where one has none."""
    names = [row[2].get(options.label) for row in rows]
    if None in names or "" in names:
        raise UserError(f"{source} has rows without a {options.label!r}; --label names its column")
    return np.array(list(map(str, names)))


def shards(rows: Sequence[list], kind: type = Rows) -> list[Rows]:
    step = EmbedOptions.shard_rows
    return [kind(rows[start:start + step]) for start in range(0, len(rows), step)]


def numbered(rows: Sequence[list], numbers: Sequence[int]) -> list[Rows]:
    """Shards of rows of which all that is known is a number, their `label`."""
    return shards([[key, data, {"image_path": key, "label": int(number)}, *others]
                   for (key, data, _, *others), number in zip(rows, numbers)])


class Passing(Output):
    """Shards in files that take no package to write and read."""
    table = staticmethod(list)

    def write(self, shard: int, features: np.ndarray, metadata: list, bad: list, about: dict):
        self.keep(shard, features, metadata, bad)
        about = {**about, "rows": len(metadata), "bad": len(bad), "files": {}}
        self.put(f"done/{self.number(shard)}.json", to_json(about))

    def keep(self, shard: int, features: np.ndarray, *rows: list) -> None:
        torch.save((torch.from_numpy(features), *rows), f"{self.root}/{self.number(shard)}.pt")


def embedded(*inputs: Any, **options: Any) -> Iterator[tuple[Tensor, list, list]]:
    """`embed` inputs, of which nothing stays behind.  Of each shard features [good, E], the
    metadata of their rows, and the bad rows."""
    from clip_ttrt.pipeline.embed import embed  # which brings tqdm

    with TemporaryDirectory() as out:
        try:
            embed(*inputs, partial(Passing, out), **options)
        except KeyboardInterrupt:
            raise KeyboardInterrupt("interrupted; nothing of it is kept") from None
        for path in sorted(Path(out).glob("*.pt")):
            yield torch.load(path, weights_only=False)


def features_of(artifact: Artifact, rows: list[Rows], **options: Any
                ) -> tuple[Tensor, Tensor, list[str], int]:
    """Of the pictures of `numbered` that can be read features float32 [n, E], not normalised,
    labels [n] and paths; and how many are bad."""
    features, metadata, bad = zip(*embedded(artifact.folder, rows, normalize=False,
                                            dtype="float32", **options))
    facts = list(chain(*metadata))
    if not facts:
        raise UserError(f"no picture can be read; the first: {bad[0][0]['error']}")
    return (torch.cat(features), torch.tensor([row["label"] for row in facts]),
            [row["image_path"] for row in facts], sum(map(len, bad)))


def wilson(hits: np.ndarray) -> list[float]:
    """A share, and the ends of its 95 % interval by Wilson's score."""
    n, share = len(hits), float(hits.mean())
    centre, wide = share + Z * Z / 2 / n, Z * math.sqrt(share * (1 - share) / n + (Z / 2 / n) ** 2)
    return [share, *((centre + sign * wide) / (1 + Z * Z / n) for sign in (-1, 1))]


def difference(first: np.ndarray, second: np.ndarray) -> list[float]:
    """How much higher the second share of right answers is, and its 95 % interval, from discordant
    pairs, with one more of each (Bonett and Price 2012)."""
    change, n = second.astype(float) - first, len(first) + 2
    gain, loss = ((change == 1).sum() + 1) / n, ((change == -1).sum() + 1) / n
    centre, wide = gain - loss, Z * math.sqrt((gain + loss - (gain - loss) ** 2) / n)
    return [float(change.mean()), float(centre - wide), float(centre + wide)]
