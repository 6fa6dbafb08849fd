"""Features -> a folder in clip-retrieval's layout, written a shard at a time, whole or not at all.

    run.json                           what the bytes below follow from
    img_emb/img_emb_00012.npy          [rows, embed_dim]; of texts text_emb/text_emb_00012.npy
    metadata/metadata_00012.parquet    the same rows
    bad/bad_00012.parquet              rows without features, where there are any
    done/00012.json                    written last: rows, bad, SHA-256 and size of each file
    started/00012.*  .*00012.*         attempts that are not done, and what they half wrote
    crashed/00012.7                    a row that kills the process"""
import contextlib
import hashlib
import io
import json
import os
import uuid
from itertools import chain
from typing import Any

import numpy as np

from clip_ttrt.errors import UserError
from clip_ttrt.pipeline.sources import file_system, library


def to_json(value: Any) -> bytes:
    return (json.dumps(value, indent=1) + "\n").encode()


def to_parquet(rows: list[dict[str, Any]]) -> bytes:
    """A table of all keys in the order in which they first occur; what a row lacks is null."""
    names = list(dict.fromkeys(chain.from_iterable(rows)))
    columns, buffer = [column([row.get(name) for row in rows]) for name in names], io.BytesIO()
    table = library("pyarrow").table(columns, column(names).to_pylist())
    library("pyarrow.parquet").write_table(table, buffer, row_group_size=len(rows))
    return buffer.getvalue()


def column(values: list) -> Any:
    """Values as arrow's type of them or, if they are nothing or nothing alike, as strings; of a
    file's name a byte that UTF-8 cannot hold, e9 say, becomes \\udce9."""
    arrow = library("pyarrow")
    try:
        found = arrow.array(values)
    except (ValueError, TypeError, OverflowError):
        found = arrow.array([None if each is None else str(each).encode(
            "utf-8", "backslashreplace").decode() for each in values])
    return found.cast(arrow.string()) if found.type == arrow.null() else found


class Output:
    """A run's folder, local or an fsspec URL.  kind: image or text.  shards: their number."""
    table = staticmethod(to_parquet)  # rows as the bytes of a file

    def __init__(self, root: Any, kind: str, shards: int):
        self.root, self.kind, self.shards = str(root), kind, shards
        self.number = f"{{:0{max(5, len(str(shards)))}d}}".format
        self.system, self.folder = file_system(self.root)
        self.local = "://" not in self.root or self.root.startswith("file://")

    def begin(self, run: dict[str, Any], overwrite: bool = False) -> None:
        """Write run.json.  overwrite: remove what an earlier run wrote; else UserError says in what
        that one differs, and always that the folder holds files of something else."""
        run = {"kind of input": self.kind, "shards": self.shards, **run}
        found, before = self.listed(""), run
        if "run.json" in found:
            before = json.loads(self.system.cat_file(f"{self.folder}/run.json"))
        elif any(name[0] != "." and name != "started" for name in found):
            raise UserError(f"{self.root} holds files of something else; use another --output")
        other = [f"{name} (was {before.get(name)}, is now {run.get(name)})"
                 for name in {**run, **before} if run.get(name) != before.get(name)]
        if overwrite:
            for folder in ("done", "crashed", "started", "img_emb", "text_emb", "metadata", "bad"):
                self.remove(folder)
        elif other:
            raise UserError(f"{self.root} was begun with another {', '.join(other)}; use another "
                            "--output or --overwrite")
        self.put("run.json", to_json(run))

    def write(self, shard: int, features: np.ndarray, metadata: list[dict[str, Any]],
              bad: list[dict[str, Any]], about: dict[str, Any]) -> None:
        """Write a shard: features [rows, embed_dim], float16 or float32; a dict for each row and
        each bad row; what to keep in done/ beside the counts.  Equal rows give equal bytes."""
        number, emb = self.number(shard), {"image": "img_emb", "text": "text_emb"}[self.kind]
        np.save(npy := io.BytesIO(), np.ascontiguousarray(features))
        # Of no rows there is neither: embedding-reader leaves out an empty .npy, not its .parquet.
        files = {f"{emb}/{emb}_{number}.npy": npy.getvalue() if metadata else b"",
                 f"metadata/metadata_{number}.parquet": self.table(metadata) if metadata else b"",
                 f"bad/bad_{number}.parquet": self.table(bad) if bad else b""}
        facts = {}
        for name, data in files.items():
            self.remove(name)  # of an earlier attempt
            if data:
                self.put(name, data)
                facts[name] = {"sha256": hashlib.sha256(data).hexdigest(), "size": len(data)}
        about = {**about, "rows": len(features), "bad": len(bad), "files": facts}
        self.put(f"done/{number}.json", to_json(about))
        for name in self.listed("started"):
            if f"{number}." in name:
                self.remove(f"started/{name}")

    def done(self) -> dict[int, dict[str, Any]]:
        """What done/ holds of the shards whose files are all there, each as large as written."""
        sizes = {f"{folder}/{name}": size for folder in ("img_emb", "text_emb", "metadata", "bad")
                 for name, size in self.listed(folder).items()}
        paths = [f"{self.folder}/done/{name}" for name in self.listed("done")]
        blobs = self.system.cat_ranges(paths, [None] * len(paths), [None] * len(paths))
        found = {int(path.rpartition("/")[2][:-5]): json.loads(blob) for path, blob in
                 zip(paths, blobs) if isinstance(blob, bytes)}  # else another process removed it
        return {number: facts for number, facts in found.items() if all(
            sizes.get(name) == file["size"] for name, file in facts["files"].items())}

    def retry(self) -> None:
        """Let the shards with bad rows run again."""
        for number, facts in self.done().items():
            if facts["bad"]:
                self.remove(f"done/{self.number(number)}.json")

    def crashed(self, shard: int) -> set[int]:
        """The rows of a shard that are known to kill the process."""
        names = (name.partition(".") for name in self.listed("crashed"))
        return {int(row) for number, _, row in names if number == self.number(shard)}

    def mark_crashed(self, shard: int, row: int) -> None:
        self.put(f"crashed/{self.number(shard)}.{row}", b"")

    def start(self, shard: int) -> None:
        self.put(f"started/{self.number(shard)}.{uuid.uuid4().hex}", b"")

    def listed(self, folder: str) -> dict[str, int]:
        self.system.invalidate_cache()
        with contextlib.suppress(FileNotFoundError):
            found = self.system.ls(f"{self.folder}/{folder}".rstrip("/"), detail=True)
            return {each["name"].rstrip("/").rpartition("/")[2]: each["size"] for each in found}
        return {}

    def remove(self, name: str) -> None:
        with contextlib.suppress(FileNotFoundError):
            self.system.rm(f"{self.folder}/{name}", recursive=True)

    def put(self, name: str, data: bytes) -> None:
        """Write a file in one step; on a local disk it comes from started/."""
        path = f"{self.folder}/{name}"
        partial = f"{self.folder}/started/.{name.replace('/', '.')}.{uuid.uuid4().hex}"
        for each in (path, partial):
            self.system.makedirs(each.rpartition("/")[0], exist_ok=True)
        self.system.pipe_file(partial if self.local else path, data)
        if self.local:
            os.replace(partial, path)
