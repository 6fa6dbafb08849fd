"""Features -> a folder in clip-retrieval's layout, written a shard at a time, whole or not at all.

    run.json                              what the bytes below follow from
    img_emb/img_emb_00012.npy             [rows, embed_dim]; of texts text_emb/text_emb_00012.npy
    metadata/metadata_00012.parquet       the same rows
    bad/bad_00012.parquet                 rows without features, where there are any
    done/00012.json                       written last: rows, bad, SHA-256 and size of each file
    started/00012.*  crashed/00012.json   unfinished attempts; rows that kill the process

A shard whose rows are all bad has only bad/ and done/: embedding-reader leaves out an empty .npy
but not the .parquet beside it, and would give all later rows another row's metadata.
"""
import contextlib
import fcntl
import hashlib
import io
import json
import os
import re
import uuid
from typing import Any, Optional

import numpy as np

from clip_ttrt.errors import UserError
from clip_ttrt.pipeline.sources import file_system, library

OURS = {  # folders, and the names that we write there
    "done": r"\d+\.json", "crashed": r"\d+\.json", "started": r"\d+\.[0-9a-f]{32}",
    "img_emb": r"img_emb_\d+\.npy", "text_emb": r"text_emb_\d+\.npy",
    "metadata": r"metadata_\d+\.parquet", "bad": r"bad_\d+\.parquet", "": r"(run|summary)\.json"}
PARTIAL = r"\..+\.[0-9a-f]{32}\.tmp"  # of a file being written
WORDS = {"inputs": "input list", "pillow": "Pillow", "kind": "kind of input"}


class Output:
    """A run's folder, local or an fsspec URL.  kind: image or text.  shards: their number."""

    def __init__(self, root: Any, kind: str, shards: int):
        self.root, self.kind, self.shards = str(root), kind, shards
        self.digits = max(5, len(str(shards)))
        self.system, self.folder = file_system(self.root)
        self.local = "://" not in self.root or self.root.startswith("file://")

    def begin(self, run: dict[str, Any], overwrite: bool = False) -> None:
        """Write run.json or, where the folder was begun before, compare; what was left half
        written goes.  overwrite: what an earlier run wrote goes, and no other file.

        Raises UserError where the earlier run differs, which says in what, or the folder holds
        files and no run.json.
        """
        run = json.loads(json.dumps({"kind": self.kind, "shards": self.shards, **run}))
        found, before = self.listed(""), None
        if "run.json" in found:
            before = json.loads(self.system.cat_file(f"{self.folder}/run.json"))
        elif any(not re.fullmatch(PARTIAL, name) for name in found):
            raise UserError(f"{self.root} holds files of something else; use another --output")
        if before is not None and not overwrite:
            then, now = plain(before), plain(run)
            other = [name for name in {**now, **then} if now.get(name) != then.get(name)]
            if other:
                values = "; ".join(f"{name} was {then.get(name)}, is now {now.get(name)}"
                                   for name in other)
                raise UserError(f"{self.root} was begun with another {', '.join(other)} ({values});"
                                " use another --output or --overwrite")
        for folder, ours in OURS.items():
            for name in self.listed(folder):
                if overwrite and name != "run.json" and re.fullmatch(ours, name):
                    self.remove(f"{folder}/{name}")
                elif re.fullmatch(PARTIAL, name):
                    self.remove_partial(f"{self.folder}/{folder}/{name}")
        if run != before:
            self.put("run.json", to_json(run))

    def write(self, shard: int, features: np.ndarray, metadata: list[dict[str, Any]],
              bad: list[dict[str, Any]], about: dict[str, Any]) -> None:
        """Write a shard: features [rows, embed_dim], float16 or float32; a dict for each row and
        each bad row; what to keep in done/ beside the counts.  Equal rows give equal bytes."""
        if len(features) != len(metadata):
            raise ValueError(f"{len(features)} features and {len(metadata)} rows of metadata")
        number, files = self.number(shard), {}
        embeddings, rows, quarantine = self.names(shard)
        if len(features):
            files[embeddings], files[rows] = to_npy(features), to_parquet(metadata)
        if bad:
            files[quarantine] = to_parquet(bad)
        for name in {embeddings, rows, quarantine} - set(files):  # of an earlier attempt
            self.remove(name)
        for name, data in files.items():
            self.put(name, data)
        facts = {name: {"sha256": hashlib.sha256(data).hexdigest(), "size": len(data)}
                 for name, data in files.items()}
        self.put(f"done/{number}.json", to_json({**about, "rows": len(features), "bad": len(bad),
                                                 "files": facts}))
        self.clear_starts(shard)

    def done(self) -> set[int]:
        """The shards whose files are all there, each as large as it was written."""
        return set(self.checkpoints())

    def retry(self) -> list[int]:
        """Let the shards with bad rows run again: their numbers, which are no longer done."""
        numbers = sorted(number for number, facts in self.checkpoints().items() if facts["bad"])
        for number in numbers:
            self.remove(f"done/{self.number(number)}.json")
        return numbers

    def crashed(self, shard: int) -> set[int]:
        """The rows of a shard that are known to kill the process."""
        with contextlib.suppress(FileNotFoundError):
            path = f"{self.folder}/crashed/{self.number(shard)}.json"
            return set(json.loads(self.system.cat_file(path)))
        return set()

    def mark_crashed(self, shard: int, row: int) -> None:
        rows = sorted(self.crashed(shard) | {row})
        self.put(f"crashed/{self.number(shard)}.json", to_json(rows))

    def start(self, shard: int) -> str:
        """Note that a shard is begun, until it is written; returns the note's name."""
        token = f"{self.number(shard)}.{uuid.uuid4().hex}"
        self.put(f"started/{token}", b"")
        return token

    def starts(self, shard: int) -> int:
        """How often a shard was begun since it was last written."""
        return len([name for name in self.listed("started")
                    if name.startswith(f"{self.number(shard)}.")])

    def clear_starts(self, shard: int) -> None:
        for name in self.listed("started"):
            if name.startswith(f"{self.number(shard)}."):
                self.remove(f"started/{name}")

    def number(self, shard: int) -> str:
        return f"{shard:0{self.digits}d}"

    def names(self, shard: int) -> tuple[str, str, str]:
        """A shard's files: features, metadata, bad rows."""
        number, kind = self.number(shard), {"image": "img_emb", "text": "text_emb"}[self.kind]
        return (f"{kind}/{kind}_{number}.npy", f"metadata/metadata_{number}.parquet",
                f"bad/bad_{number}.parquet")

    def checkpoints(self) -> dict[int, dict[str, Any]]:
        """What done/ holds of the shards whose files are there."""
        sizes = {f"{folder}/{name}": size for folder in ("img_emb", "text_emb", "metadata", "bad")
                 for name, size in self.listed(folder).items()}
        names = [name for name in self.listed("done") if re.fullmatch(OURS["done"], name)]
        blobs = self.system.cat_ranges([f"{self.folder}/done/{name}" for name in names],
                                       [None] * len(names), [None] * len(names))
        facts = {int(name.split(".")[0]): json.loads(blob) for name, blob in zip(names, blobs)
                 if isinstance(blob, bytes)}  # and no error: another process let it run again
        return {number: each for number, each in facts.items() if all(
            sizes.get(name) == file["size"] for name, file in each["files"].items())}

    def listed(self, folder: str) -> dict[str, Optional[int]]:
        """Names and sizes of what lies in one of our folders."""
        self.system.invalidate_cache()
        with contextlib.suppress(FileNotFoundError):
            found = self.system.ls(f"{self.folder}/{folder}".rstrip("/"), detail=True)
            return {each["name"].rstrip("/").rpartition("/")[2]: each["size"] for each in found}
        return {}

    def remove(self, name: str) -> None:
        with contextlib.suppress(FileNotFoundError):
            self.system.rm_file(f"{self.folder}/{name}")

    def remove_partial(self, path: str) -> None:
        """Remove a file that no living process is writing: that would hold its lock."""
        with contextlib.suppress(OSError), open(path, "rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.unlink(path)

    def put(self, name: str, data: bytes) -> None:
        """Write a file in one step, under a name that no *.npy or *.parquet matches until then."""
        path = f"{self.folder}/{name}"
        folder, _, base = path.rpartition("/")
        self.system.makedirs(folder, exist_ok=True)
        if not self.local:
            self.system.pipe_file(path, data)
            return
        partial = f"{folder}/.{base}.{uuid.uuid4().hex}.tmp"
        try:
            with open(partial, "xb") as file:
                with contextlib.suppress(OSError):  # file systems without locks
                    fcntl.flock(file, fcntl.LOCK_EX)
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
                os.replace(partial, path)
        except BaseException:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(partial)
            raise


def plain(run: dict[str, Any]) -> dict[str, Any]:
    """What run.json holds, nested or not, by the names that a user knows."""
    return {WORDS.get(name, name.replace("_", " ")): value for key, inside in run.items()
            for name, value in (inside if isinstance(inside, dict) else {key: inside}).items()}


def to_json(value: Any) -> bytes:
    return (json.dumps(value, indent=1) + "\n").encode()


def to_npy(features: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, np.ascontiguousarray(features), allow_pickle=False)
    return buffer.getvalue()


def to_parquet(rows: list[dict[str, Any]]) -> bytes:
    """A table of all keys in the order in which they first occur; what a row lacks is null."""
    arrow, buffer = library("pyarrow"), io.BytesIO()
    names = list(dict.fromkeys(name for row in rows for name in row))
    table = arrow.table({utf8(name): column([row.get(name) for row in rows]) for name in names})
    library("pyarrow.parquet").write_table(table, buffer, compression="snappy", version="2.6",
                                           row_group_size=len(rows))
    return buffer.getvalue()


def column(values: list) -> Any:
    """Values as booleans, 64-bit integers, doubles or, if they are nothing alike, as strings."""
    arrow, types = library("pyarrow"), {type(value) for value in values if value is not None}
    for kinds, kind in (({bool}, arrow.bool_()), ({int}, arrow.int64()),
                        ({int, float}, arrow.float64())):
        if types and types <= kinds:
            with contextlib.suppress(OverflowError, arrow.ArrowInvalid):  # of larger integers
                return arrow.array(values, kind)
    return arrow.array([None if value is None else utf8(str(value)) for value in values],
                       arrow.string())


def utf8(text: str) -> str:
    """Text that UTF-8 can hold: a byte of a file's name that it cannot, e9 say, becomes \\udce9."""
    return text.encode("utf-8", "backslashreplace").decode()
