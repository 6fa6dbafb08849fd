"""Queries of a library: a sum of texts, pictures and items, against all features, exactly.

    query    = [sign] term {sign term}    a sign is + or - with space around it
    term     = [number *] operand
    operand  = "any text" | text          a file, where one is of that name

The features of each operand have length 1, and so has their sum."""
import os
import re
import threading
import time
from pathlib import Path
from typing import Any, Sequence, Union

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import normalize

from clip_ttrt.artifact import MANIFEST
from clip_ttrt.checkpoint import sha256_of_file
from clip_ttrt.errors import UserError
from clip_ttrt.pipeline.sources import PICTURES, library
from clip_ttrt.runtime import load
from clip_ttrt.search.store import SHARD, Store

POOL = 1000  # best items of the scan in float16, which are compared anew in float32
FOLD = 0.97  # cosine from which on two pictures are near-duplicates
BINS, POINTS = 40, 120  # of the histogram; of a video's strip at most
INDEX = "usearch.index"  # an approximate one
SAMPLE = 20_000  # items whose scores stand for all, where that serves
ASKED, BEST = 200, 10  # of its recall: items that are asked for, and how many of the best
SIGN = re.compile(r'(?:^|\s+)([+-])(?=\s|$)(?=(?:[^"]*"[^"]*")*[^"]*$)')  # outside of quotes
TERM = re.compile(r'\s*(?:(\d+(?:\.\d*)?|\.\d+)\s*\*\s*)?("?)([^"\s][^"]*?)\2\s*', re.DOTALL)
Operand = Union[str, Path, bytes, int, Any]  # a text, a picture, an item's id, a PIL image
Terms = Sequence[tuple[float, Operand]]


def parse(query: str, files: bool = True) -> list[tuple[float, Operand]]:
    """The terms of a query.  files: operands may be pictures.  Raises UserError."""
    if files and os.path.isfile(query):
        return [(1.0, Path(query))]
    query, terms = query.strip(), []
    _, *parts = SIGN.split(query if SIGN.match(query) else f"+ {query}")
    for sign, part in zip(parts[::2] or "+", parts[1::2] or [query]):
        match = TERM.fullmatch(part)
        if not match:
            raise UserError(f'{query!r} is no query at {part.strip()!r}; write a text, a file, or '
                            'a sum as: cat + 0.5*"black - white" - dog.jpg')
        factor, quote, operand = match.groups()
        if files and not quote and os.path.isfile(operand):
            operand = Path(operand)
        elif files and not quote and Path(operand).suffix[1:].lower() in PICTURES - {""}:
            raise UserError(f"{operand}: no such file; quotes make it a text")
        terms.append((float(factor or 1) * (-1 if sign == "-" else 1), operand))
    return terms


class Library:
    """A library to ask, by any number of threads; what is indexed meanwhile is found at once.

    artifact: where the library's own is by now.  Raises UserError where there is no library, or
    the artifact is another or cannot run here."""

    def __init__(self, folder: Union[str, Path], artifact: Union[None, str, Path] = None):
        self.store = Store(folder)
        artifact = Path(artifact or self.store.get("artifact") or "")
        self.model, _ = load(artifact)
        self.identity = sha256_of_file(artifact / MANIFEST)
        self.lock, self.version = threading.RLock(), None
        self.refresh()

    def refresh(self) -> None:
        """Take up what index runs have committed."""
        [version] = self.store.db.execute("PRAGMA data_version").fetchone()
        if version == self.version:
            return
        if self.store.get("identity") != self.identity:
            raise UserError(f"{self.store.folder} has features of another artifact than "
                            f"{self.model.artifact.folder}; --artifact names the right one")
        self.version, self.width, self.items = version, self.store.get("width"), self.store.items()
        self.rows = torch.from_numpy(self.items["id"].copy()).to(self.model.device)
        self.last = int(self.items["id"].max(initial=-1)) + 1
        files = [self.store.shard(at, self.width) for at in range(-(-self.last // SHARD))]
        self.shards = [torch.from_numpy(np.load(each, mmap_mode="c")) for each in files]
        if self.rows.is_cuda:  # one there: several would have to be waited for
            whole = self.rows.new_empty(len(files) * SHARD, self.width, dtype=torch.half)
            for part, shard in zip(whole.split(SHARD), self.shards):
                part.copy_(shard)
            self.shards = [whole]
        path, self.approximate = self.store.folder / INDEX, None
        if path.exists():
            usearch = library("usearch.index", "search")
            self.approximate = usearch.Index.restore(str(path), view=True)

    def query(self, query: Union[str, Terms], top: int = 20) -> dict[str, Any]:
        """The files most similar to a query, a video by its best frame.

        query: as `parse` takes it, or (weight, operand) pairs.  Returns a histogram of all scores,
        and at most top `results`: score (cosine), z (standard deviations above the mean of all
        items), below (share of items that are less similar), `similar` (near-duplicates), and of
        videos a strip of z over time, and segments, in seconds: frames above half of the way from
        that mean to the best one.  Raises UserError for a query that cannot be."""
        with self.lock, self.store.db, torch.inference_mode():
            begun = time.perf_counter()
            self.store.db.execute("BEGIN")  # all that follows sees the same commits
            self.refresh()
            if not len(self.items):
                raise UserError(f"{self.store.folder} holds nothing yet that could be found")
            terms = parse(query) if isinstance(query, str) else query
            wanted, size = self.encode(terms), max(POOL, 2 * top)
            while True:
                pool, sample = self.scan(wanted, size)
                pool, scores, groups = self.rank(wanted, pool, top)
                if len(groups) == top or len(pool) < size:
                    break
                size *= 8  # one long video can fill a pool
            mean, deviation = float(sample.mean()), float(sample.std(correction=0)) or 1.0
            results = [self.describe(wanted, pool[group], scores[group], mean, deviation) |
                       {"below": 1 - (int(group[0]) + 1) / len(self.items)} for group in groups]
            about = self.model.artifact
            return {
                "results": results, "items": len(self.items), "exact": self.approximate is None,
                "mean": mean, "deviation": deviation, "artifact": str(about.folder),
                "model": about.manifest["model"], "precision": about.manifest["precision"],
                "histogram": {"counts": torch.histc(sample, BINS).int().tolist(),
                              "low": float(sample.min()), "high": float(sample.max())},
                "ms": (time.perf_counter() - begun) * 1e3}

    def encode(self, terms: Terms) -> Tensor:
        """The sum of the terms: float32 [E] on the device, of length 1."""
        try:
            total = sum(weight * normalize(self.feature(each), dim=0) for weight, each in terms)
        except (RuntimeError, ValueError) as problem:  # too long, no picture, no such encoder
            raise UserError(str(problem)) from problem
        if not total.norm() > 1e-3:
            raise UserError("the terms of the query cancel each other; change a factor")
        return normalize(total, dim=0)

    def feature(self, operand: Operand) -> Tensor:
        """float32 [E] on the device."""
        if isinstance(operand, int):
            self.store.item(operand)
            return self.features(self.rows.new_tensor([operand]))[0]
        if isinstance(operand, str):
            return self.model.encode_text(self.model.tokenize([operand]))[0]
        return self.model.encode_image([operand])[0]

    def features(self, rows: Tensor) -> Tensor:
        """float32 [n, E] on the device."""
        if len(self.shards) == 1:
            return self.shards[0][rows].float()
        found = rows.new_empty(len(rows), self.width, dtype=torch.float32)
        for number in (rows // SHARD).unique().tolist():
            here = rows // SHARD == number
            found[here] = self.shards[number][rows[here] % SHARD].float()
        return found

    def scan(self, wanted: Tensor, size: int, exact: bool = False) -> tuple[Tensor, Tensor]:
        """About the best items, ascending; the scores of all items or, where an approximate index
        serves, of a sample."""
        size = min(size, len(self.items))
        if self.approximate is not None and not exact:
            random = torch.Generator().manual_seed(0)
            sample = torch.randint(len(self.items), (SAMPLE,), generator=random)
            scores = self.features(self.rows[sample.to(wanted.device)]) @ wanted
            found = self.approximate.search(wanted.cpu().numpy(), size).keys.astype(np.int64)
            return torch.from_numpy(np.sort(found)).to(wanted.device), scores
        scores = torch.cat([torch.mv(shard[:self.last - number * SHARD], wanted.half())
                            for number, shard in enumerate(self.shards)])[self.rows].float()
        return scores.topk(size, sorted=False).indices.sort().values, scores

    def index(self) -> float:
        """Write an approximate index; returns its recall against the exact scan."""
        usearch = library("usearch.index", "search")
        self.approximate = usearch.Index(ndim=self.width, metric="ip", dtype="f16")
        for part in torch.arange(len(self.rows), device=self.rows.device).split(1 << 16):
            features = self.features(self.rows[part]).cpu().numpy()
            self.approximate.add(part.cpu().numpy().astype(np.uint64), features)
        self.approximate.save(str(self.store.folder / "draft"))
        os.replace(self.store.folder / "draft", self.store.folder / INDEX)
        asked, hits = torch.randperm(len(self.rows))[:ASKED].to(self.rows.device), []
        for wanted in self.features(self.rows[asked]):
            exact, ours = (self.scan(wanted, BEST, exact)[0] for exact in (True, False))
            hits.append(torch.isin(exact, ours).double().mean())
        return float(torch.stack(hits).mean())

    def rank(self, wanted: Tensor, pool: Tensor, top: int) -> tuple:
        """The pool by its scores, these, and groups of places in them: a result and its like."""
        features = self.features(self.rows[pool])
        scores, order = (features @ wanted).sort(descending=True, stable=True)
        pool, features = pool[order].cpu().numpy(), features[order].cpu()
        best = np.unique(self.items["file"][pool], return_index=True)[1]  # of each file
        left, groups = torch.from_numpy(np.sort(best)), []
        while len(left) and len(groups) < top:
            alike = (features @ features[left[0]])[left] >= FOLD
            alike[0] = True
            groups.append(left[alike].tolist())
            left = left[~alike]
        return pool, scores.cpu().numpy(), groups

    def describe(self, wanted: Tensor, items: np.ndarray, scores: np.ndarray, mean: float,
                 deviation: float) -> dict[str, Any]:
        """A result: the first of some items, the others as `similar`."""
        result, *similar = [
            {"id": id, "file": file, "score": score, "z": (score - mean) / deviation,
             "time": None if moment < 0 else moment, **self.store.file(file)}
            for (id, file, moment), score in zip(self.items[items].tolist(), scores.tolist())]
        result["similar"] = similar
        if result["seconds"]:
            begin, end = np.searchsorted(self.items["file"], result["file"] + np.arange(2))
            every = (self.features(self.rows[begin:end]) @ wanted).cpu().numpy()
            times = [*self.items["time"][begin:end].tolist(), result["seconds"]]
            floor = min(scores[0], (mean + scores[0]) / 2)
            result["segments"] = segments(every, times, floor, result["time"])
            step = -(-len(every) // POINTS)
            result["strip"] = [[times[at], float(every[at:at + step].max() - mean) / deviation]
                               for at in range(0, len(every), step)]
        return result


def segments(scores: np.ndarray, times: Sequence[float], floor: float, best: float) -> list[dict]:
    """Runs of frames above floor.  times: of the frames, and of the end.  best: of the best one."""
    above = np.concatenate([[False], scores >= floor, [False]])
    runs = np.flatnonzero(above[1:] != above[:-1]).reshape(-1, 2).tolist()
    peaks = [max(range(*run), key=lambda at: (times[at] == best, scores[at])) for run in runs]
    return [{"start": times[begin], "end": times[end], "time": times[at],
             "score": float(scores[at])} for (begin, end), at in zip(runs, peaks)]
