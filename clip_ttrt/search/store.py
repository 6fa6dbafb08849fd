"""A library on disk: what is in it in SQLite, and features in shards that are memory-mapped.

    library.db           files and their items: a picture, or the frames of a video
    features_00000.npy   float16 [131072, E], of length 1; sparse, the row of an item is its id
    usearch.index        an approximate index, where one was built

A file is `done` once its items and their features are there, which is all of them or none."""
import json
import os
import sqlite3
from pathlib import Path
from typing import Any, Sequence, Union

import numpy as np

from clip_ttrt.errors import UserError

DATABASE = "library.db"
SHARD = 1 << 17  # rows
ITEM = np.dtype([("id", "i8"), ("file", "i8"), ("time", "f8")])
SCHEMA = """
PRAGMA journal_mode = WAL;
CREATE TABLE IF NOT EXISTS facts (name TEXT PRIMARY KEY, value TEXT);
CREATE TABLE IF NOT EXISTS files (
    id INTEGER PRIMARY KEY AUTOINCREMENT, path BLOB UNIQUE, size INTEGER, mtime INTEGER,
    seconds REAL, done INTEGER DEFAULT 0);  -- seconds: a video's length
CREATE TABLE IF NOT EXISTS items (
    id INTEGER PRIMARY KEY AUTOINCREMENT, file INTEGER REFERENCES files ON DELETE CASCADE,
    time REAL, pts INTEGER, start INTEGER,  -- of a frame, as `sources.video_items` has them
    reason TEXT);                           -- why it cannot be read: it is in quarantine
CREATE INDEX IF NOT EXISTS by_file ON items (file);
"""


class Store:
    """A library's folder.  create: make what is missing.  Raises UserError where it is none."""

    def __init__(self, folder: Union[str, Path], create: bool = False):
        self.folder = Path(folder)
        if not create and not (self.folder / DATABASE).is_file():
            raise UserError(f"{folder} is no library; clip-ttrt search index with --artifact makes "
                            "it one")
        self.folder.mkdir(parents=True, exist_ok=True)
        self.db = sqlite3.connect(self.folder / DATABASE, timeout=60, check_same_thread=False)
        self.db.executescript(SCHEMA + "PRAGMA foreign_keys = ON")

    def get(self, name: str) -> Any:
        """A fact, None where it is not known."""
        found = self.db.execute("SELECT value FROM facts WHERE name = ?", (name,)).fetchone()
        return found and json.loads(found[0])

    def put(self, **facts: Any) -> None:
        with self.db:
            self.db.executemany("INSERT OR REPLACE INTO facts VALUES (?, ?)",
                                [(name, json.dumps(value)) for name, value in facts.items()])

    def items(self) -> np.ndarray:
        """[N] of ITEM: all that have features, by file and time; the time of a picture is -1."""
        return np.fromiter(self.db.execute("SELECT id, file, COALESCE(time, -1.0) FROM items "
                                           "WHERE reason IS NULL ORDER BY file, id"), ITEM)

    def one(self, query: str, number: int) -> tuple:
        """A row.  Raises FileNotFoundError."""
        for found in self.db.execute(query, (number,)):
            return found
        raise FileNotFoundError(f"the library has no number {number}")

    def file(self, file: int) -> dict[str, Any]:
        """Its path, kind and, of a video, seconds."""
        path, seconds = self.one("SELECT path, seconds FROM files WHERE id = ?", file)
        return {"path": os.fsdecode(path), "seconds": seconds,
                "kind": "picture" if seconds is None else "video"}

    def item(self, item: int) -> tuple[str, Any, Any]:
        """Its path and, of a frame, pts and start."""
        file, *frame = self.one("SELECT file, pts, start FROM items WHERE id = ? AND reason IS "
                                "NULL", item)
        return self.file(file)["path"], *frame

    def quarantine(self) -> list[dict[str, Any]]:
        """What cannot be read: path, time of a frame in seconds, and reason."""
        return [{"path": os.fsdecode(path), "time": time, "reason": reason}
                for path, time, reason in self.db.execute(
                    "SELECT path, time, reason FROM items JOIN files ON file = files.id "
                    "WHERE reason IS NOT NULL ORDER BY path, time")]

    def add(self, items: Sequence[tuple], features: np.ndarray) -> None:
        """All items (file, time, pts, start, reason) of some files, and features float16 [items, E]
        of length 1, whatever there are reasons for.  After a kill all of it is there or nothing."""
        files = {(file,) for file, *_ in items}
        with self.db:
            self.db.execute("BEGIN IMMEDIATE")
            self.db.executemany("DELETE FROM items WHERE file = ?", files)
            self.db.executemany("INSERT INTO items (file, time, pts, start, reason) VALUES "
                                "(?, ?, ?, ?, ?)", items)
            self.db.executemany("UPDATE files SET done = 1 WHERE id = ?", files)
            [last] = self.db.execute("SELECT MAX(id) FROM items").fetchone()
            self.write(last + 1 - len(items), features)

    def write(self, row: int, features: np.ndarray) -> None:
        """Not through a map: a full disk would kill us."""
        while len(features):
            number, place = divmod(row, SHARD)
            part, features = np.split(features, [SHARD - place])
            with open(self.shard(number, part.shape[1]), "r+b", buffering=0) as file:
                file.seek((place - SHARD) * part.strides[0], os.SEEK_END)
                file.write(part.tobytes())
                os.fsync(file.fileno())
            row += len(part)

    def shard(self, number: int, width: int) -> Path:
        """A shard's file, made where it is missing."""
        path = self.folder / f"features_{number:05d}.npy"
        if not path.exists():
            draft = path.with_suffix(".draft")
            np.lib.format.open_memmap(draft, "w+", np.float16, (SHARD, width))
            os.replace(draft, path)
        return path
