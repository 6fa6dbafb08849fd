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
from clip_ttrt.demo.captions import unknown_words
from clip_ttrt.errors import UserError
from clip_ttrt.pipeline.sources import PICTURES
from clip_ttrt.runtime import load
from clip_ttrt.search import approximate as usearch
from clip_ttrt.search.store import SHARD, Store

POOL = 1000  # best items of the scan in float16, which are compared anew in float32
FOLD = 0.97  # cosine from which on two pictures are near-duplicates
BINS, POINTS = 40, 120  # of the histogram; of a video's strip at most
SAMPLE = 20_000  # items whose scores stand for all, where an approximate index serves
TERM = re.compile(r'\s*(?:([+-])\s+)?(?:(\d+(?:\.\d*)?|\.\d+)\s*\*\s*)?'
                  r'(?:"([^"]+)"|((?!"|[+-](?:\s|$))\S.*?))(?=\s+[+-](?:\s|$)|\s*$)', re.DOTALL)
Operand = Union[str, Path, bytes, tuple[int, int], Any]  # text, picture, (file, number), PIL image
Terms = Sequence[tuple[float, Operand]]


def parse(query: str, files: bool = True) -> list[tuple[float, Operand]]:
    """The terms of a query.  files: operands may be pictures.  Raises UserError."""
    if files and os.path.isfile(query):
        return [(1.0, Path(query))]
    terms, end = [], 0
    while match := TERM.match(query, end):
        sign, factor, quoted, bare = match.groups()
        if terms and not sign:
            break
        operand = bare or quoted
        if files and bare and os.path.isfile(bare):
            operand = Path(bare)
        elif files and bare and Path(bare).suffix[1:].lower() in PICTURES - {""}:
            raise UserError(f"{bare}: no such file; quotes make it a text")
        terms.append(((-1 if sign == "-" else 1) * float(factor or 1), operand))
        end = match.end()
    if query[end:].strip() or not terms:
        raise UserError(f'{query!r} is no query from {query[end:].strip()!r} on; write a text, a '
                        'file, or a sum as: cat + 0.5*"black - white" - dog.jpg')
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
        device, shards = self.model.device, -(-(self.items["row"].max(initial=-1) + 1) // SHARD)
        paths = [self.store.shard(number, self.width) for number in range(shards)]
        self.shards = [torch.from_numpy(np.load(path, mmap_mode="c")).to(device) for path in paths]
        self.rows = torch.from_numpy(self.items["row"].copy()).to(device)
        self.approximate = usearch.find(self.store, self.items)

    def query(self, query: Union[str, Terms], top: int = 20, fold: float = FOLD,
              details: bool = False, exact: bool = False) -> dict[str, Any]:
        """The files most similar to a query, a video by its best frame.

        query: as `parse` takes it, or (weight, operand) pairs.  fold: cosine from which on a file
        is `similar` to one before it; above 1 none is.  exact: leave an approximate index of the
        library aside.  details: strips of videos and a histogram, too.  Returns at most top
        `results`: score (cosine), z (standard deviations above the mean of all items), below (share
        of items that are less similar), and of videos segments, in seconds: frames above half of
        the way from that mean to the best one.  Raises UserError for a query that cannot be."""
        with self.lock, self.store.db, torch.inference_mode():
            begun = time.perf_counter()
            self.store.db.execute("BEGIN")  # all that follows sees the same commits
            self.refresh()
            terms = parse(query) if isinstance(query, str) else query
            wanted, size = self.encode(terms), max(POOL, 2 * top)
            encoded = time.perf_counter()
            use = None if exact else self.approximate
            while True:
                pool, sample = self.scan(wanted, size, use)
                pool, scores, groups = self.rank(wanted, pool, top, fold)
                if len(groups) == top or len(pool) < size:
                    break
                size *= 8  # one long video can fill a pool
            mean = float(sample.mean()) if len(sample) else 0.0
            deviation = float((sample - mean).square().mean().sqrt()) if len(sample) else 0.0
            results = [self.describe(wanted, pool[group], scores[group], mean, deviation or 1,
                                     details) | {"below": 1 - (group[0] + 1) / len(self.items)}
                       for group in groups]
            about, texts = self.model.artifact, [each for _, each in terms if type(each) is str]
            found = {
                "results": results, "items": len(self.items), "exact": not use, "mean": mean,
                "deviation": deviation, "artifact": str(about.folder),
                "model": about.manifest["model"], "precision": about.manifest["precision"],
                "unknown": unknown_words(texts) if about.origin.kind == "demo" else []}
            if details and len(sample):
                found["histogram"] = {"counts": torch.histc(sample, BINS).int().tolist(),
                                      "low": float(sample.min()), "high": float(sample.max())}
            return found | {"ms_encode": (encoded - begun) * 1e3,
                            "ms_search": (time.perf_counter() - encoded) * 1e3}

    def encode(self, terms: Terms) -> Tensor:
        """The sum of the terms: float32 [E] on the device, of length 1."""
        texts = [each for _, each in terms if isinstance(each, str)]
        pictures = [each for _, each in terms if not isinstance(each, (str, tuple))]
        items = [each for _, each in terms if isinstance(each, tuple)]
        try:
            found = {
                str: iter(texts and self.model.encode_text(self.model.tokenize(texts))),
                tuple: iter(self.features(self.rows.new_tensor(
                    [self.store.item(*each)[3] for each in items]))),
                None: iter(pictures and self.model.encode_image(pictures))}
        except (RuntimeError, ValueError) as problem:  # too long, no picture, no such encoder
            raise UserError(str(problem)) from problem
        parts = [(weight, next(found.get(type(each), found[None]))) for weight, each in terms]
        total = sum(weight * normalize(part, dim=0) for weight, part in parts)
        if not total.norm() > 1e-3:
            raise UserError("the terms of the query cancel each other; change a factor")
        return normalize(total, dim=0)

    def features(self, rows: Tensor) -> Tensor:
        """float32 [n, E] on the device."""
        found = rows.new_empty(len(rows), self.width, dtype=torch.float32)
        for number in (rows // SHARD).unique().tolist():
            here = rows // SHARD == number
            found[here] = self.shards[number][rows[here] % SHARD].float()
        return found

    def scan(self, wanted: Tensor, size: int, use=None) -> tuple[Tensor, Tensor]:
        """About the best items, ascending; the scores of all items or, with use, of a sample."""
        size = min(size, len(self.items))
        if use:
            random = torch.Generator().manual_seed(0)
            sample = torch.randint(len(self.items), (SAMPLE,), generator=random)
            scores = self.features(self.rows[sample.to(wanted.device)]) @ wanted
            return use(wanted, size).sort().values, scores
        half, last = wanted.half(), self.items["row"].max(initial=-1) + 1
        scores = [torch.mv(shard[:last - number * SHARD], half)
                  for number, shard in enumerate(self.shards)]
        scores = torch.cat(scores or [half[:0]])[self.rows].float()
        return scores.topk(size, sorted=False).indices.sort().values, scores

    def rank(self, wanted: Tensor, pool: Tensor, top: int, fold: float) -> tuple:
        """The pool by its scores, these, and groups of places in them: a result and its like."""
        features = self.features(self.rows[pool])
        scores, order = (features @ wanted).sort(descending=True, stable=True)
        features, pool = features[order].cpu(), pool[order].cpu().numpy()
        group, groups, seen = np.full(len(pool), -1), [], set()
        for place, file in enumerate(self.items["file"][pool].tolist()):
            if file in seen or group[place] < 0 and len(groups) == top:
                continue
            if group[place] < 0:
                alike = (features @ features[place] >= fold).numpy()
                group[alike & (group < 0)] = group[place] = len(groups)
                groups.append([])
            groups[group[place]].append(place)
            seen.add(file)
        return pool, scores.cpu().numpy(), groups

    def describe(self, wanted: Tensor, items: np.ndarray, scores: np.ndarray, mean: float,
                 deviation: float, details: bool) -> dict[str, Any]:
        """A result: the first of some items, the others as `similar`."""
        each = []
        for (file, number, moment, _), score in zip(self.items[items].tolist(), scores.tolist()):
            [(path, seconds)] = self.store.db.execute(
                "SELECT path, seconds FROM files WHERE id = ?", (file,))
            each.append({"id": f"{file}-{number}", "file": file, "path": os.fsdecode(path),
                         "kind": "video" if seconds else "picture", "score": score,
                         "z": (score - mean) / deviation, "seconds": seconds,
                         "time": moment if seconds else None})
        result = each[0] | {"similar": each[1:]}
        if result["seconds"]:
            begin, end = np.searchsorted(self.items["file"], result["file"] + np.arange(2))
            every = (self.features(self.rows[begin:end]) @ wanted).cpu().numpy()
            times = [*self.items["time"][begin:end].tolist(), result["seconds"]]
            floor = min(scores[0], (mean + scores[0]) / 2)
            result["segments"] = segments(every, times, floor)
            if details:
                step, z = -(-len(every) // POINTS), (every - mean) / deviation
                result["strip"] = [[times[at], float(z[at:at + step].max())]
                                   for at in range(0, len(every), step)]
        return result


def segments(scores: np.ndarray, times: Sequence[float], floor: float) -> list[dict[str, float]]:
    """Runs of frames above floor.  times: of the frames, and of the end."""
    above = np.concatenate([[False], scores >= floor, [False]])
    found = []
    for begin, end in np.flatnonzero(above[1:] != above[:-1]).reshape(-1, 2).tolist():
        best = begin + int(scores[begin:end].argmax())
        found.append({"start": times[begin], "end": times[end], "time": times[best],
                      "score": float(scores[best])})
    return found
