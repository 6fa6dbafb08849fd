"""Folders to a library: what is new or has changed is encoded, by `embed`'s own worker."""
import os
import time
from fractions import Fraction
from itertools import chain, count
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Iterator, Optional, Sequence, Union

import numpy as np
from PIL import Image

from clip_ttrt.artifact import MANIFEST, Artifact, check_runs_here, read_artifact
from clip_ttrt.checkpoint import sha256_of_file
from clip_ttrt.errors import UserError
from clip_ttrt.options import LARGEST_EMBED_BATCH, EmbedOptions
from clip_ttrt.pipeline import sources
from clip_ttrt.search import approximate as usearch
from clip_ttrt.search.library import Library
from clip_ttrt.search.store import DATABASE, Store

PICTURES = sources.PICTURES - {""}  # without an extension there is much in folders
GRID = Fraction(1, 4)  # seconds between the frames of which `scenes` keeps some
CHANGE = 0.08  # of the range of levels: the mean difference of 32 x 32 pixels in a new scene
ON_CPU = 32  # pictures of a batch, beyond which a CPU gains nothing
COMMIT = 2.0  # seconds of work that a kill costs, about
TRIES = 3  # that ended with the process, after which an item is given up


def index(library: Union[str, Path], folders: Sequence[Union[str, Path]] = (),
          artifact: Union[None, str, Path] = None, *, every: Union[None, str, float] = None,
          decode: str = "auto", approximate: bool = False, retry_bad: bool = False,
          reindex: bool = False) -> dict[str, Any]:
    """Bring a library up to date with folders, by default those it has; make it if it is not there.

    artifact: of a new library, which keeps to it.  every: seconds between frames of a video, or
    "scenes"; by default as before, at first 1.  decode: as embed's.  approximate: build such an
    index, too.  retry_bad: take files in quarantine as changed.  reindex: encode all anew, with
    another artifact if it is one.  Returns counts: files, items (pictures and frames), encoded,
    removed (files); quarantine, a list; seconds, encoded_per_s, and recall of an approximate index.
    Raises UserError for bad input; where it is stopped, the same call goes on."""
    begun = time.perf_counter()
    folders, every = list(map(os.path.abspath, folders)), every and rule(every)
    for folder in folders:
        if not os.path.isdir(folder):
            raise UserError(f"{folder} is no folder; name folders of pictures and videos")
    known = Path(library, DATABASE).is_file() and Store(library).get("artifact")
    if not (artifact or known):
        raise UserError(f"{library} is no library yet; --artifact DIR makes it one")
    artifact = read_artifact(artifact or known)
    check_runs_here(artifact)
    if "image" not in artifact.encoders:
        raise UserError(f"{artifact.folder} holds no image encoder; compile with --encoder both")
    store = Store(library, create=True)
    with store.locked():
        adopt(store, artifact, reindex)
        every = every or store.get("every") or "1"
        store.put(artifact=str(artifact.folder.absolute()), every=every)
        removed = scan(store, folders, every, retry_bad)
        done, seconds = encode(store, artifact, decode)
        recall = {"recall": usearch.build(Library(library))} if approximate else {}
    files, items = (store.db.execute(f"SELECT COUNT(*) FROM {table}").fetchone()[0]
                    for table in ("files", "items WHERE row >= 0"))
    return {"files": files, "items": items, "encoded": done, "removed": removed, **recall,
            "quarantine": store.quarantine(), "seconds": time.perf_counter() - begun,
            "encoded_per_s": done / max(seconds, 1e-3)}


def rule(every: Union[str, float]) -> str:
    """How frames are chosen, as a text that is equal for equal rules."""
    try:
        seconds = float(str(every).removesuffix("s")) if every != "scenes" else 1
    except ValueError:
        seconds = 0
    if not 0 < seconds < float("inf"):
        raise UserError(f"bad every {every!r}: write seconds above 0, or scenes")
    return every if every == "scenes" else f"{seconds:.9g}"


def adopt(store: Store, artifact: Artifact, reindex: bool) -> None:
    """A library is one artifact's."""
    identity, before = sha256_of_file(artifact.folder / MANIFEST), store.get("identity")
    if before not in (None, identity) and not reindex:
        raise UserError(f"{store.folder} has features of another artifact, {store.get('model')} in "
                        f"{store.get('artifact')}, which cannot be compared with those of "
                        f"{artifact.folder}; --reindex encodes all anew")
    if reindex:
        with store.db:
            store.db.execute("DELETE FROM files")
        for path in store.folder.glob("features_*.npy"):  # they may be of another width
            path.unlink()
    store.put(identity=identity, model=artifact.manifest["model"],
              width=artifact.dimensions.embed_dim)


def scan(store: Store, given: Sequence[str], every: str, retry_bad: bool) -> int:
    """Note what is new, changed or gone in the folders; returns the number of files that left."""
    db, known = store.db, store.get("folders") or []
    store.put(folders=[*dict.fromkeys([*known, *given])])
    if retry_bad:
        db.execute("UPDATE files SET mtime = NULL WHERE path IN (SELECT path FROM quarantine)")
    folders = list(filter(os.path.isdir, given or known))  # of a lost disk all stays
    beneath = tuple(os.fsencode(os.path.join(folder, "")) for folder in folders)
    known = {path: facts for path, *facts in db.execute(
        "SELECT path, size, mtime, every, id FROM files") if path.startswith(beneath)}
    sources.Playback.cache_clear()  # of what lay at a path before
    for path in dict.fromkeys(chain.from_iterable(map(sources.walk, folders))):
        name, ending = os.fsencode(path), os.path.splitext(path)[1][1:].lower()
        if ending not in PICTURES | sources.VIDEOS:
            continue
        status, is_video = os.stat(path), ending not in PICTURES
        facts = [status.st_size, status.st_mtime_ns, every if is_video else None]
        *before, file = known.pop(name, [None])
        if before != facts:
            items, seconds = frames(path, every) if is_video else ([(None,) * 4], None)
            db.execute("DELETE FROM files WHERE id = ?", (file,))
            file = db.execute("INSERT INTO files (path, size, mtime, every, seconds) VALUES "
                              "(?, ?, ?, ?, ?)", (name, *facts, seconds)).lastrowid
            db.executemany("INSERT INTO items (file, number, time, pts, start, reason) VALUES "
                           "(?, ?, ?, ?, ?, ?)", [(file, n, *each) for n, each in enumerate(items)])
            if is_video:  # it took its time
                db.commit()
    db.executemany("DELETE FROM files WHERE id = ?", [facts[-1:] for facts in known.values()])
    db.commit()
    return len(known)


def frames(path: str, every: str) -> tuple[list[tuple], Optional[float]]:
    """Items of a video, (time, pts, start, reason), and its length in seconds."""
    step = GRID if every == "scenes" else Fraction(every)
    try:
        items = list(sources.video_items(path, step))
        kept = scenes(items) if every == "scenes" else items
        return [(item[2]["time"], *item[6:], None) for item in kept], float(len(items) * step)
    except UserError:
        raise
    except Exception as problem:  # FFmpeg's, which share no type
        return [(None, None, None, sources.reason(problem))], None


def scenes(items: list) -> Iterator[list]:
    """The first frame, and each that differs by CHANGE from the last one that was kept."""
    rows, kept = sources.Rows(items), None
    for number, item in enumerate(items):
        [record] = rows.read(number, number + 1)
        if record.error is None:
            small = Image.fromarray(record.data).resize((32, 32), Image.Resampling.BOX)
            small = np.asarray(small, np.float32) / 255
            if kept is not None and np.abs(small - kept).mean() < CHANGE:
                continue
            kept = small
        yield item


def encode(store: Store, artifact: Artifact, decode: str) -> tuple[int, float]:
    """Give all items that wait a row, some at a time; returns their number, and seconds."""
    if not store.waiting(1):
        return 0, 0.0
    tqdm = sources.library("tqdm").tqdm
    from clip_ttrt.pipeline.worker import KILLED, Worker

    most = LARGEST_EMBED_BATCH if artifact.device == "cuda" else ON_CPU
    batch = max(artifact.batch.minimum, min(most, artifact.batch.maximum))
    taken, size, done, written = set(store.items()["row"].tolist()), batch, 0, []
    free = (row for row in count() if row not in taken)
    out = SimpleNamespace(start=lambda number: None, crashed=lambda number: set(), table=list,
                          write=lambda *shard: written.append(shard))
    worker = Worker(artifact.folder, out, EmbedOptions(batch=batch, decode=decode), artifact.device)
    begun = time.perf_counter()
    with tqdm(unit=" items", dynamic_ncols=True, leave=False) as bar:
        while items := store.waiting(size):
            start, tries = time.perf_counter(), items[0][2]
            if tries == TRIES:
                store.add(items, np.empty((0, 0)), {0: KILLED}, free)
                continue
            store.set("tries", [(tries + 1, *item[:2]) for item in items])
            try:
                worker.embed(0, sources.Rows([place(*item) for item in items]))()
                _, features, _, bad, _ = written.pop()
                store.add(items, features, {each["row"]: each["error"] for each in bad}, free)
            except BaseException:  # but no kill
                store.set("tries", [(tries, *item[:2]) for item in items])
                raise
            done += len(features)
            bar.update(len(items))
            if time.perf_counter() - start < COMMIT / 2:
                size = min(2 * size, 16 * batch)
    return done, time.perf_counter() - begun


def place(file: int, number: int, tries: int, pts: Optional[int], start: int, path: bytes):
    """An item as `sources.Rows` takes it."""
    path = os.fsdecode(path)
    return path if pts is None else [path, None, {}, None, sources.VIDEO, path, pts, start]
