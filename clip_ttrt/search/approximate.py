"""An approximate index of a library's features, usearch's: for some millions of items and more."""
import os
from pathlib import Path
from typing import Callable, Optional

import numpy as np
import torch
from torch import Tensor

from clip_ttrt.errors import UserError
from clip_ttrt.search.store import Store

QUERIES, BEST = 200, 10  # of the recall: items that are asked for, and how many of the best


def path(store: Store) -> Path:
    return store.folder / "usearch.index"


def find(store: Store) -> Optional[Callable[[Tensor, int], Tensor]]:
    """The library's index, None where it has none: a query [E], a number -> items, int64 [n]."""
    if not path(store).exists():
        return None
    found = library().Index.restore(str(path(store)), view=True)
    return lambda wanted, count: torch.from_numpy(found.search(
        wanted.cpu().numpy(), count).keys.astype(np.int64)).to(wanted.device)


def build(ours) -> float:
    """Write the index of a `Library`; returns its recall against the exact scan."""
    index = library().Index(ndim=ours.width, metric="ip", dtype="f16")
    for items in torch.arange(len(ours.items), device=ours.rows.device).split(1 << 16):
        index.add(items.cpu().numpy().astype(np.uint64),
                  ours.features(ours.rows[items]).cpu().numpy())
    draft = path(ours.store).with_suffix(".draft")
    index.save(str(draft))
    os.replace(draft, path(ours.store))
    asked = torch.randperm(len(ours.items), generator=torch.Generator().manual_seed(0))[:QUERIES]
    search, hits = find(ours.store), []
    for wanted in ours.features(ours.rows[asked.to(ours.rows.device)]):
        hits.append(torch.isin(ours.scan(wanted, BEST)[0], search(wanted, BEST)).double().mean())
    return float(torch.stack(hits).mean())


def library():
    try:
        import usearch.index
    except ImportError as problem:
        raise UserError("usearch is missing; pip install 'clip_ttrt[search]' brings it"
                        ) from problem
    return usearch.index
