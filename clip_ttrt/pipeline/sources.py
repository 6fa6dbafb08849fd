"""Inputs -> rows: pictures, frames of videos and texts, cut into shards that can read themselves.

`plan` reads names, captions and indices, and a shard its pictures.  Where one lies is its place:
[LOCAL or a URL's scheme, path, offset, size or -1], [TABLE, path, column, row group, row in it] or
[VIDEO, path, pts of the frame, dts of the last key frame not after it]."""
import csv
import glob
import hashlib
import importlib
import io
import json
import math
import os
import re
import tarfile
import threading
from bisect import bisect_right
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache, partial
from itertools import chain, groupby, islice
from typing import Any, Iterator, Optional, Union

import numpy as np

from clip_ttrt import kernels
from clip_ttrt.errors import UserError

PICTURES = set(" avif bmp gif heic heif ico j2k jfif jp2 jpe jpeg jpg pbm pgm png pnm ppm tga tif "
               "tiff webp".split(" "))  # or without an extension
VIDEOS = set("3gp avi flv m2ts m4v mkv mov mp4 mpeg mpg mts ogv ts webm wmv".split())
LOCAL, TABLE, VIDEO = "", "a table", "a video"
SAMPLE = re.compile(r"((?:.*/)?[^./]+)((?:\.[^/]*)?)", re.DOTALL)  # key and suffix, as WebDataset's
UNFIT, EMPTY = "no regular file, cut short or larger than 1 GiB", "the row is empty"
PACKED = 256  # rows that are unpacked at a time
LOCK = threading.Lock()  # of the tables and videos that are open


@dataclass(slots=True)
class Record:
    """A row: a picture's file, a frame [H, W, 3] uint8 or a text, and its metadata."""
    key: str
    data: Union[bytes, memoryview, np.ndarray, str, None]
    metadata: dict[str, Any]
    error: Optional[str]  # why it cannot be read: it belongs to bad/


class Rows:
    """The rows of one shard.  sequential: ranges are best read in order.  items: a picture's path,
    or a Record's fields and, where its data is to be read, its place; bytes keep PACKED of them."""

    def __init__(self, items: list):
        self.count, parts = len(items), range(0, len(items), PACKED)
        self.sequential = any(VIDEO in each[4:5] for each in items if isinstance(each, list))
        self.packed = [json.dumps(items[at:at + PACKED], default=str).encode() for at in parts]

    def __len__(self) -> int:
        return self.count

    def digest(self) -> str:
        """SHA-256 of what is read: paths, places and captions."""
        return hashlib.sha256(b"".join(self.packed)).hexdigest()

    def read(self, start: int, stop: int) -> list[Record]:
        """The rows from start to before stop, from any thread; what cannot be read has an error."""
        first = start // PACKED
        items = chain.from_iterable(map(json.loads, self.packed[first:-(-stop // PACKED)]))
        items = [file_item(each, {}, each) if isinstance(each, str) else each
                 for each in islice(items, start - first * PACKED, stop - first * PACKED)]
        records = [Record(*each[:4]) for each in items]
        unread = [(record, each[4:]) for record, each in zip(records, items) if each[4:]]
        for kind, group in groupby(unread, lambda each: each[1][0]):
            group, places = zip(*group)
            for record, data in zip(group, read_places(kind, places)):
                record.data = data
                if isinstance(data, (str, Exception)):
                    record.data, record.metadata, record.error = None, {}, reason(data)
        return records


def plan(inputs: list, text: bool, shard_rows: int, every: float, column: Optional[str]) -> list:
    """One `Rows` for each shard of at most shard_rows; all inputs, folders, globs, files and fsspec
    URLs, are one sequence.  text: texts, not pictures.  every: seconds between frames of a video.
    column: where tables hold paths, bytes or texts.  Raises UserError for inputs that are missing,
    empty or unfit, OSError for folders."""
    for cache in (row_group, Playback):  # of what lay at a path before
        cache.cache_clear()
    sources, shards = chain.from_iterable(map(expand, inputs)), []
    items = chain.from_iterable(read_items(*each, text, every, column) for each in sources)
    while batch := list(islice(items, shard_rows)):
        shards.append(Rows(batch))
    if not shards:
        raise UserError(f"{', '.join(inputs)}: nothing in it can be embedded")
    return shards


def expand(given: str) -> list[tuple[str, str]]:
    """(path, its extension; / of a folder) of all that an input stands for."""
    local = "://" not in given
    system, path = (os.path, os.path.abspath(given)) if local else file_system(given)
    find = partial(glob.glob, recursive=True) if local else system.glob
    paths = [path] if system.exists(path) else sorted(find(path), key=os.fsencode)
    if not paths:
        raise UserError(f"{given} matches no file")
    return [(path if local else system.unstrip_protocol(path),
             "/" if system.isdir(path) else path.rpartition(".")[2].lower()) for path in paths]


def read_items(path: str, ending: str, text: bool, every: float, column: Optional[str]) -> Iterator:
    """Of a damaged container those that are whole, and one that says what is wrong."""
    readers = {"txt": list_items, "csv": list_items, "tar": tar_items, "parquet": table_items}
    if text and ending not in readers:
        raise UserError(f"{path} holds no texts; name .txt, .csv, .tar or .parquet files")
    try:
        if ending in readers:
            yield from readers[ending](path, text, column)
        elif ending in VIDEOS:
            yield from video_items(path, every)
        else:
            yield from walk(path) if ending == "/" else [path]
    except (OSError, ValueError, csv.Error, tarfile.TarError) as problem:
        if isinstance(problem, UserError) or ending == "/":
            raise
        yield [path, None, {}, reason(problem)]


def walk(folder: str) -> Iterator[str]:
    """The regular files beneath, in the order of their paths' bytes, and not beneath links."""
    if "://" in folder:
        system, path = file_system(folder)
        found = (system.unstrip_protocol(each) for each in system.find(path) if each[-1] != "/")
    else:
        found = (each.path + "/" * each.is_dir(follow_symlinks=False) for each in os.scandir(folder)
                 if each.is_file() or each.is_dir(follow_symlinks=False))
    for path in sorted(found, key=os.fsencode):
        yield from walk(path) if path.endswith("/") else [path]


def list_items(path: str, text: bool, column: Optional[str]) -> Iterator[list]:
    """Of a .txt file, or a .csv file with a header: texts, or paths, which start at the list."""
    table, name = path.lower().endswith(".csv"), "caption" if text else "image_path"
    with open_file(path) as file:
        lines = io.TextIOWrapper(file, "utf-8-sig", "replace" if text else "surrogateescape",
                                 newline="" if table else None)
        if table:
            rows = csv.DictReader(lines, restkey="", restval="")
            name = choose(path, rows.fieldnames or [], text, column)
        else:
            rows = ({name: line.strip() if text else line.rstrip("\n")} for line in lines
                    if not line.isspace())
        for number, row in enumerate(rows):
            value = row.pop(name)
            if text:
                yield [f"{path}:{number}", value, {**row, "caption": value}, None]
            else:
                value = value if "://" in value else os.path.join(os.path.dirname(path), value)
                yield file_item(value, row, value)


def tar_items(path: str, text: bool, _: Optional[str]) -> Iterator[list]:
    """Of an archive in WebDataset's layout, with captions of .txt members."""
    with open_file(path) as file, tarfile.open(fileobj=file, mode="r:") as archive:
        named = ((SAMPLE.fullmatch(each.name), each) for each in archive if each.isreg())
        for key, group in groupby(filter(all, named), lambda each: each[0][1]):
            members, facts = {name[2]: member for name, member in group}, {"key": key}
            if caption := members.get(".txt"):
                caption = str(archive.extractfile(caption).read(), "utf-8", "replace").strip()
                facts["caption"] = caption
                if text:
                    yield [f"{path}/{key}", caption, facts, None]
            for suffix, member in members.items() if not text else ():
                if suffix.lower().rpartition(".")[2] in PICTURES:
                    name = f"{path}/{key}{suffix}"
                    yield file_item(name, facts, path, member.offset_data, member.size)
        file.seek(archive.offset)  # where tarfile stopped, in silence at most damages
        if file.read(tarfile.BLOCKSIZE).strip(b"\0"):
            raise tarfile.ReadError(f"the archive is damaged at byte {archive.offset}")


def table_items(path: str, text: bool, column: Optional[str]) -> Iterator[list]:
    with open_file(path) as file:
        table = library("pyarrow.parquet").ParquetFile(file)
        types = {each.name: str(each.type) for each in table.schema_arrow}
        names = [name for name in types if types[name].endswith("string" if text else "binary")]
        chosen = choose(path, names, text, column)
        others = [name for name, kind in types.items() if "<" not in kind and "binary" not in kind]
        for group in range(table.num_row_groups):
            for index, row in enumerate(table.read_row_group(group, columns=others).to_pylist()):
                key, value = f"{path}:{group}:{index}", row.pop(chosen, None)
                if text:
                    yield [key, value, {**row, "caption": value}, EMPTY if value is None else None]
                else:
                    row["image_path"] = row.get("image_path") or key
                    yield [key, None, row, None, TABLE, path, chosen, group, index]


def choose(path: str, names: list[str], text: bool, column: Optional[str]) -> str:
    """The column that is asked for, else that of a usual name, else the only one."""
    usual = [column] if column else ["caption", "text"] if text else ["image_path", "path"]
    for name in [*usual, *(names if len(names) == 1 and not column else ())]:
        if name in names:
            return name
    raise UserError(f"{path} has no column {' or '.join(usual)} that serves; --column names one of "
                    f"{', '.join(names)}")


def file_item(key: str, facts: dict, path: str, offset: int = 0, size: int = -1) -> list:
    kind = path.rpartition("://")[0]  # LOCAL where there is none
    return [key, None, {**facts, "image_path": key}, None, kind, path, offset, size]


def video_items(path: str, every: float) -> Iterator[list]:
    """Of a video: the frame on screen at each k * every after the first one, by its packets."""
    with open_video(path) as container:
        packets = sorted(
            (packet.pts, packet.pts if packet.dts is None else packet.dts, packet.is_keyframe,
             packet.duration or 1, packet.time_base)
            for stream in container.streams.video[:1] for packet in container.demux(stream)
            if packet.pts is not None and not packet.is_discard)
    if not packets:
        raise ValueError("no frame of it has a time")
    shown, tick = [pts for pts, *_ in packets], packets[0][-1]
    keys = [(pts, dts) for pts, dts, key, *_ in packets if key or pts == shown[0]]
    end = max(pts + duration for pts, _, _, duration, _ in packets) - shown[0]
    step = Fraction(str(every)) / tick
    for k in range(math.ceil(end / step)):
        pts, time = shown[bisect_right(shown, shown[0] + k * step) - 1], float(k * step * tick)
        yield [f"{path}:{time:.6g}s", None, {"image_path": path, "time": time, "pts": pts}, None,
               VIDEO, path, pts, keys[bisect_right(keys, (pts, math.inf)) - 1][1]]


def read_places(kind: str, places: list) -> list:
    """What lies at places of one kind, or why it cannot be read.  Files are read in one call that
    does not hold the GIL, where the library of kernels is built."""
    if kind not in READERS:
        return read_remote(places)
    names = os.fsencode("".join([f"{path}\0" for _, path, *_ in places]))
    if kind != LOCAL or not kernels.reads_files() or names.count(0) != len(places):
        return [read_place(*each) for each in places]
    offsets, sizes = np.array([each[2:] for each in places]).T.copy()
    data, errors = kernels.read_files(names, offsets, sizes, 2**30)
    whole, ends = memoryview(data), sizes.cumsum().tolist()
    return [whole[end - size:end] if not error else os.strerror(error) if error > 0 else UNFIT
            for end, size, error in zip(ends, sizes.tolist(), errors.tolist())]


def read_place(kind: str, *place: Any) -> Any:
    try:
        with LOCK:
            return READERS[kind](*place)
    except Exception as problem:  # of arrow, FFmpeg and file systems, which share no type
        return problem


def read_one(path: str, offset: int, size: int) -> Union[bytes, str]:
    with open(path, "rb", opener=lambda *each: os.open(each[0], each[1] | os.O_NONBLOCK)) as file:
        file.seek(offset)
        data = file.read(size)
    return data if size in (-1, len(data)) else UNFIT


def read_remote(places: list) -> list[Union[bytes, str]]:
    """Of one remote file system, all at once."""
    system, _ = file_system(places[0][1])
    _, urls, starts, sizes = map(list, zip(*places))
    stops = [start + size if size >= 0 else None for start, size in zip(starts, sizes)]
    paths = [system._strip_protocol(url) for url in urls]
    blobs = system.cat_ranges(paths, starts, stops, on_error="return")
    return [UNFIT if isinstance(blob, bytes) and size not in (-1, len(blob)) else blob
            for blob, size in zip(blobs, sizes)]


@lru_cache(2)  # for threads that are not quite level
def row_group(path: str, column: str, group: int) -> Any:
    with open_file(path) as file:
        table = library("pyarrow.parquet").ParquetFile(file)
        return table.read_row_group(group, columns=[column])[column]


@lru_cache(1)
class Playback:
    """A video that is decoded on, or from a later key frame that is not after the wanted frame."""

    def __init__(self, path: str):
        self.container = open_video(path)
        self.container.streams.video[0].thread_type = "AUTO"
        self.frames = self.container.decode(video=0)
        self.shown = next(self.frames)

    def at(self, pts: int, start: int) -> np.ndarray:
        if start > self.shown.pts or pts < self.shown.pts:
            self.container.seek(start, stream=self.container.streams.video[0])
            self.frames = self.container.decode(video=0)
            self.shown = next(self.frames)
        while self.shown.pts < pts:
            self.shown = next(self.frames)
        if self.shown.pts > pts:
            raise ValueError("the frame cannot be decoded")
        turns = round(self.shown.rotation / 90)
        return np.ascontiguousarray(np.rot90(self.shown.to_ndarray(format="rgb24"), turns))


READERS = {LOCAL: read_one, VIDEO: lambda path, *frame: Playback(path).at(*frame),
           TABLE: lambda path, name, *at: row_group(path, name, at[0])[at[1]].as_py() or EMPTY}


def open_file(path: str) -> Any:
    return file_system(path)[0].open(path, "rb") if "://" in path else open(path, "rb")


def open_video(path: str) -> Any:
    return library("av").open(open_file(path) if "://" in path else path)


def file_system(url: str) -> tuple[Any, str]:
    try:
        return library("fsspec.core").url_to_fs(url)
    except (ImportError, ValueError) as problem:
        raise UserError(f"{url} cannot be opened: {problem}") from problem


def library(name: str, extra: str = "embed") -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise UserError(f"{name} is missing; pip install 'clip_ttrt[{extra}]' brings it") from error


def reason(problem: Exception) -> str:
    text = getattr(problem, "strerror", None) or str(problem) or type(problem).__name__
    return " ".join(text.split())
