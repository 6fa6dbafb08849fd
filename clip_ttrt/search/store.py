"""A library on disk: what is in it in SQLite, and features in shards that are memory-mapped.

    library.db           files, their items (a picture, or frames of a video), quarantine
    features_00000.npy   float16 [131072, E], of length 1; sparse, a row of at most one item
    usearch.index        an approximate index, where one was built

An item with neither a row nor a reason waits to be encoded: an index run that was killed goes on
with those."""
import fcntl
import json
import os
import sqlite3
from contextlib import contextmanager
from itertools import groupby, islice
from pathlib import Path
from typing import Any, Iterator, Sequence, Union

import numpy as np

from clip_ttrt.errors import UserError

DATABASE = "library.db"
SHARD = 1 << 17  # rows
ITEM = np.dtype([("file", "i8"), ("number", "i8"), ("time", "f8"), ("row", "i8")])
SCHEMA = """
PRAGMA journal_mode = WAL;
CREATE TABLE IF NOT EXISTS facts (name TEXT PRIMARY KEY, value TEXT) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS files (
    id INTEGER PRIMARY KEY AUTOINCREMENT, path BLOB UNIQUE, size INTEGER, mtime INTEGER,
    every TEXT, seconds REAL);  -- of a video: how its frames were chosen, and its length
CREATE TABLE IF NOT EXISTS items (
    file INTEGER REFERENCES files ON DELETE CASCADE, number INTEGER,
    time REAL, pts INTEGER, start INTEGER,  -- of a frame, as `sources.video_items` has them
    reason TEXT, tries INTEGER DEFAULT 0,   -- why it cannot be read; how often that was begun
    row INTEGER, PRIMARY KEY (file, number)) WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS waiting ON items (tries, pts IS NOT NULL, file, number)
    WHERE row IS NULL AND reason IS NULL;
CREATE VIEW IF NOT EXISTS quarantine AS
    SELECT path, time, reason FROM items JOIN files ON file = id WHERE reason IS NOT NULL;
"""


class Store:
    """A library's folder.  create: make what is missing.  Raises UserError where it is none."""

    def __init__(self, folder: Union[str, Path], create: bool = False):
        self.folder = Path(folder)
        if not create and not (self.folder / DATABASE).is_file():
            raise UserError(f"{folder} is no library, which clip-ttrt search index makes")
        self.folder.mkdir(parents=True, exist_ok=True)
        self.db = sqlite3.connect(self.folder / DATABASE, timeout=60, check_same_thread=False)
        try:
            self.db.executescript(SCHEMA if create else "PRAGMA foreign_keys")
            self.db.execute("PRAGMA foreign_keys = ON")
            self.get("")
        except sqlite3.DatabaseError as problem:
            raise UserError(f"{self.folder / DATABASE} is damaged ({problem}); index into another "
                            "folder") from problem

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Raises UserError where another process has the library locked."""
        with open(self.folder / DATABASE, "rb") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise UserError(f"another process indexes {self.folder}; wait for it") from None
            yield

    def get(self, name: str) -> Any:
        """A fact, None where it is not known."""
        found = self.db.execute("SELECT value FROM facts WHERE name = ?", (name,)).fetchone()
        return found and json.loads(found[0])

    def put(self, **facts: Any) -> None:
        with self.db:
            self.db.executemany("INSERT OR REPLACE INTO facts VALUES (?, ?)",
                                [(name, json.dumps(value)) for name, value in facts.items()])

    def item(self, file: int, number: int = 0) -> tuple[str, Any, Any, int]:
        """Its path, pts and start of a frame, and row.  Raises FileNotFoundError."""
        found = self.db.execute("SELECT path, pts, start, row FROM items JOIN files ON file = id "
                                "WHERE file = ? AND number = ? AND row >= 0", (file, number))
        for path, *rest in found.fetchall():
            return os.fsdecode(path), *rest
        raise FileNotFoundError(f"the library has no item {file}-{number}")

    def items(self) -> np.ndarray:
        """[N] of ITEM: all that have a row, by file and time; the time of a picture is -1."""
        return np.fromiter(self.db.execute(
            "SELECT file, number, COALESCE(time, -1.0), row FROM items WHERE row >= 0 "
            "ORDER BY file, number"), ITEM)

    def quarantine(self) -> list[dict[str, Any]]:
        """What cannot be read: path, time of a frame in seconds, and reason."""
        return [{"path": os.fsdecode(path), "time": time, "reason": reason} for path, time, reason
                in self.db.execute("SELECT * FROM quarantine ORDER BY path, time")]

    def waiting(self, count: int) -> list[tuple]:
        """(file, number, tries, pts, start, path) of at most so many items that wait, all pictures
        or all frames; of those that a process has already ended with, one."""
        items = self.db.execute(
            "SELECT file, number, tries, pts, start, path FROM items JOIN files ON file = id WHERE "
            "row IS NULL AND reason IS NULL ORDER BY tries, pts IS NOT NULL, file, number LIMIT ?",
            (count,)).fetchall()
        alike = [each for each in items
                 if not each[2] and (each[3] is None) == (items[0][3] is None)]
        return alike or items[:1]

    def add(self, items: Sequence[tuple], features: np.ndarray, bad: dict[int, str],
            free: Iterator[int]) -> None:
        """Features float16 [good, E] of items (file, number, ...) into free rows; bad: why those at
        some places have none.  After a kill all of it is there or nothing."""
        good = [item[:2] for place, item in enumerate(items) if place not in bad]
        rows = list(islice(free, len(good)))
        for number, part in groupby(zip(rows, features), lambda each: each[0] // SHARD):
            with open(self.shard(number, features.shape[1]), "r+b") as file:
                end = file.seek(0, os.SEEK_END)
                for row, feature in part:  # not through a map: a full disk would kill us
                    file.seek(end + (row % SHARD - SHARD) * feature.nbytes)
                    file.write(feature.tobytes())
                file.flush()
                os.fsync(file.fileno())
        self.set("row", [(row, *item) for row, item in zip(rows, good)],
                 "reason", [(reason, *items[place][:2]) for place, reason in bad.items()])

    def set(self, *changes: Any) -> None:
        """Of items, at once: columns, each followed by (value, file, number) of some."""
        with self.db:
            for column, values in zip(changes[::2], changes[1::2]):
                self.db.executemany(
                    f"UPDATE items SET {column} = ? WHERE file = ? AND number = ?", values)

    def shard(self, number: int, width: int) -> Path:
        """A shard's file, made where it is missing."""
        path = self.folder / f"features_{number:05d}.npy"
        if not path.exists():
            draft = path.with_suffix(".draft")
            np.lib.format.open_memmap(draft, "w+", np.float16, (SHARD, width))
            os.replace(draft, path)
        return path
