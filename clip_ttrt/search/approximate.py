"""An approximate index of a library's features, usearch's: for some millions of items and more."""
from typing import Callable, Optional

import numpy as np
import torch
from torch import Tensor

from clip_ttrt.errors import UserError
from clip_ttrt.search.store import Store

FILE = "usearch.index"
QUERIES, BEST = 200, 10  # of the recall: items that are asked for, and how many of the best
Search = Callable[[Tensor, int], Tensor]  # a query [E], a number -> about the best items, int64 [n]


def stamp(items: np.ndarray) -> list[int]:
    """What differs for other items: no file has the number of another, ever."""
    return [len(items), int(items["file"].sum()), int(items["row"].sum())]


def find(store: Store, items: np.ndarray) -> Optional[Search]:
    """The search of a library's index, None where it has none of these items, or no usearch."""
    try:
        from usearch.index import Index
    except ImportError:
        return None
    if store.get("approximate") != stamp(items):
        return None
    index = Index.restore(str(store.folder / FILE), view=True)
    places = np.zeros(items["row"].max(initial=-1) + 1, np.int64)
    places[items["row"]] = np.arange(len(items))
    return lambda wanted, count: torch.from_numpy(
        places[index.search(wanted.cpu().numpy(), count).keys.astype(np.int64)]).to(wanted.device)


def build(library) -> float:
    """Write the index of a `Library`; returns its recall against the exact scan."""
    try:
        from usearch.index import Index
    except ImportError as problem:
        raise UserError("usearch is missing; pip install 'clip_ttrt[search]' brings it"
                        ) from problem
    index = Index(ndim=library.width, metric="ip", dtype="f16")
    for rows in library.rows.split(1 << 16):
        index.add(rows.cpu().numpy().astype(np.uint64), library.features(rows).cpu().numpy())
    index.save(str(library.store.folder / FILE))
    library.store.put(approximate=stamp(library.items))
    search, random = find(library.store, library.items), torch.Generator().manual_seed(0)
    asked = torch.randperm(len(library.items), generator=random)[:QUERIES].to(library.rows.device)
    found = [(set(library.scan(wanted, BEST)[0].tolist()), set(search(wanted, BEST).tolist()))
             for wanted in library.features(library.rows[asked])]
    return sum(len(exact & ours) for exact, ours in found) / max(1, sum(len(e) for e, _ in found))
