"""An approximate index of a library's features, usearch's: for some millions of items and more."""
import os
from typing import Callable, Optional

import numpy as np
import torch
from torch import Tensor

from clip_ttrt.errors import UserError
from clip_ttrt.search.store import Store

FILE = "usearch.index"
QUERIES, BEST = 200, 10  # of the recall: items that are asked for, and how many of the best


def usearch():
    try:
        import usearch.index
    except ImportError as problem:
        raise UserError("usearch is missing; pip install 'clip_ttrt[search]' brings it"
                        ) from problem
    return usearch.index


def find(store: Store) -> Optional[Callable[[Tensor, int], Tensor]]:
    """The library's index, None where it has none: a query [E], a number -> items, int64 [n]."""
    if not (store.folder / FILE).exists():
        return None
    found = usearch().Index.restore(str(store.folder / FILE), view=True)
    return lambda wanted, count: torch.from_numpy(
        found.search(wanted.cpu().numpy(), count).keys.astype(np.int64)).to(wanted.device)


def build(library) -> float:
    """Write the index of a `Library`; returns its recall against the exact scan."""
    index, draft = usearch().Index(ndim=library.width, metric="ip", dtype="f16"), (
        library.store.folder / "usearch.draft")
    for start in range(0, len(library.rows), 1 << 16):
        features = library.features(library.rows[start:start + (1 << 16)]).cpu().numpy()
        index.add(np.arange(start, start + len(features), dtype=np.uint64), features)
    index.save(str(draft))
    os.replace(draft, library.store.folder / FILE)
    asked = torch.randperm(len(library.rows), generator=torch.Generator().manual_seed(0))[:QUERIES]
    search, hits = find(library.store), []
    for wanted in library.features(library.rows[asked.to(library.rows.device)]):
        exact = library.scan(wanted, BEST)[0]
        hits.append(torch.isin(exact, search(wanted, BEST)).double().mean())
    return float(torch.stack(hits).mean())
