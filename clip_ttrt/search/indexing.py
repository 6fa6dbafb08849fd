"""Folders to a library: what is new or has changed is encoded, by `embed`."""
import fcntl
import json
import os
from functools import partial
from itertools import chain
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Optional, Sequence, Union

import numpy as np
from PIL import Image

from clip_ttrt.artifact import MANIFEST, Artifact, read_artifact
from clip_ttrt.checkpoint import sha256_of_file
from clip_ttrt.labelled import Passing
from clip_ttrt.options import EmbedOptions
from clip_ttrt.pipeline import sources
from clip_ttrt.search.library import INDEX, Library
from clip_ttrt.search.store import Store

ENDINGS = (sources.PICTURES | sources.VIDEOS) - {""}  # without one there is much in folders
PICTURES = 2048  # of a shard, about what a kill costs; a video is a shard
GRID = 0.5  # seconds between the frames of which `scenes` keeps some
CHANGE = 0.08  # of the range of levels: the mean difference of 32 x 32 pixels in a new scene
SAME = "the scene of the frame before"


class Scenes(sources.Rows):
    """Frames of a video, read in order, of which those like the last one before have an error."""
    kept: Optional[np.ndarray] = None

    def read(self, start: int, stop: int) -> list[sources.Record]:
        records = super().read(start, stop)
        for each in [record for record in records if not record.error]:
            small = Image.fromarray(each.data).resize((32, 32), Image.Resampling.BOX)
            small = np.asarray(small, np.float32) / 255
            if self.kept is None or np.abs(small - self.kept).mean() >= CHANGE:
                self.kept = small
            else:
                each.data, each.error = None, SAME
        return records


class IntoLibrary(Passing):
    """Shards, once they are embedded, to a library."""

    def __init__(self, store: Path, shards: list[sources.Rows], *about: Any):
        super().__init__(*about)
        self.library, self.rows = store, shards

    def keep(self, shard: int, features: np.ndarray, metadata: list, bad: list) -> None:
        reasons, items = {each["row"]: each["error"] for each in bad}, []
        for row, (_, _, facts, _, *place) in enumerate(json.loads(self.rows[shard].packed)):
            pts, start = place[2:] if place[:1] == [sources.VIDEO] else (None, None)
            items.append((facts["file"], facts.get("time"), pts, start, reasons.get(row)))
        every = np.zeros((len(items), features.shape[1]), np.float16)
        every[[row not in reasons for row in range(len(items))]] = features
        kept = [row for row, item in enumerate(items) if item[-1] != SAME]
        Store(self.library).add([items[row] for row in kept], every[kept])


def index(library: Union[str, Path], folders: Sequence[Union[str, Path]],
          artifact: Union[None, str, Path] = None, *, scenes: bool = False,
          approximate: bool = False, **options: Any) -> dict[str, Any]:
    """Bring a library up to date with folders; make it if it is not there.

    artifact: of a new library, or another one for the library, which encodes all anew.  scenes: one
    frame a scene of a video that is new or has changed, not one `every` so often.  approximate:
    build such an index, which the next run drops.  options: `every`, `decode`, `gpus` and more of
    `EmbedOptions`.  Returns counts: files, items (pictures and frames), encoded, removed (files);
    quarantine, a list; and recall of an approximate index.  Raises UserError for bad input, and
    what `embed` raises: the same call then goes on.  On a GPU a script needs
    `if __name__ == "__main__":` around it."""
    from clip_ttrt.pipeline.embed import embed  # which brings tqdm

    every, folders = EmbedOptions(**options).every, [os.path.abspath(each) for each in folders]
    artifact = read_artifact(artifact or Store(library).get("artifact") or "")
    store, done, recall = Store(library, create=True), {}, {}
    with open(store.folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # another run is waited for
        adopt(store, artifact)
        removed = scan(store, folders)
        shards = plan(store, GRID if scenes else every, Scenes if scenes else sources.Rows)
        if shards:
            with TemporaryDirectory() as run:
                into = partial(IntoLibrary, store.folder, shards, run)
                done = embed(artifact.folder, shards, into, **options)
        if approximate:
            recall = {"recall": Library(library, artifact.folder).index()}
    [files] = store.db.execute("SELECT COUNT(*) FROM files").fetchone()
    return {"files": files, "items": len(store.items()), "encoded": done.get("images", 0),
            "removed": removed, **recall, "quarantine": store.quarantine()}


def adopt(store: Store, artifact: Artifact) -> None:
    """A library is one artifact's.  An approximate index is that of the items before."""
    identity = sha256_of_file(artifact.folder / MANIFEST)
    (store.folder / INDEX).unlink(missing_ok=True)
    if store.get("identity") != identity:
        with store.db:
            store.db.execute("DELETE FROM files")
            store.db.execute("DELETE FROM sqlite_sequence")
        for path in store.folder.glob("features_*.npy"):  # they may be of another width
            path.unlink()
    store.put(identity=identity, width=artifact.dimensions.embed_dim,
              artifact=str(artifact.folder.absolute()))


def scan(store: Store, folders: Sequence[str]) -> int:
    """Note what is new, changed or gone in the folders; returns the number of files that left."""
    beneath, found = tuple(os.fsencode(os.path.join(folder, "")) for folder in folders), set()
    for path in chain.from_iterable(map(sources.walk, folders)):
        if Path(path).suffix[1:].lower() in ENDINGS:
            status = os.stat(path)
            found.add((os.fsencode(path), status.st_size, status.st_mtime_ns))
    known = {each for each in store.db.execute("SELECT path, size, mtime FROM files")
             if each[0].startswith(beneath)}
    with store.db:
        store.db.executemany("DELETE FROM files WHERE path = ?",
                             [(path,) for path, *_ in known - found])
        store.db.executemany("INSERT INTO files (path, size, mtime) VALUES (?, ?, ?)",
                             sorted(found - known))
    return len({path for path, *_ in known} - {path for path, *_ in found})


def plan(store: Store, every: float, kind: type) -> list[sources.Rows]:
    """Shards of what is not done, of which items have their `file`.  kind: of those of videos."""
    sources.Playback.cache_clear()  # of what lay at a path before
    pictures, videos = [], []
    for file, path in store.db.execute("SELECT id, path FROM files WHERE NOT done").fetchall():
        path = os.fsdecode(path)
        ending = Path(path).suffix[1:].lower()
        if ending in sources.PICTURES:
            pictures.append(sources.file_item(path, {"file": file}, path))
            continue
        try:
            items = list(sources.read_items(path, ending, False, every, None))
        except sources.library("av").FFmpegError as problem:
            items = [[path, None, {}, sources.reason(problem)]]
        for item in items:
            item[2]["file"] = file
        store.db.execute("UPDATE files SET seconds = ? WHERE id = ?", (len(items) * every, file))
        store.db.commit()
        videos.append(kind(items))
    return [sources.Rows(pictures[begin:begin + PICTURES])
            for begin in range(0, len(pictures), PICTURES)] + videos
