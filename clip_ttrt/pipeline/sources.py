"""Inputs -> rows: pictures, frames of videos and texts, cut into shards that can read themselves.

`plan` reads names, captions and indices.  What it returns is small and picklable; pictures are read
by whoever holds a shard, a range of rows at a time.  Where a picture lies is its place, a list:

    LOCAL or a URL's scheme, path, offset, size     a file, or a member of an archive; -1: all of it
    TABLE, path, size, column, row group, row in it
    VIDEO, path, size, pts of the first frame, of this, of the last key frame not after it
"""
import contextlib
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
from dataclasses import dataclass, field
from fractions import Fraction
from functools import lru_cache, partial
from itertools import chain, groupby, islice
from operator import itemgetter
from typing import Any, Callable, Iterator, Optional, Union

import numpy as np

from clip_ttrt import kernels
from clip_ttrt.errors import UserError

PICTURES = set(" avif bmp gif heic heif ico j2k jfif jp2 jpe jpeg jpg pbm pgm png pnm ppm tga tif "
               "tiff webp".split(" "))  # or without an extension
VIDEOS = set("3gp avi flv m2ts m4v mkv mov mp4 mpeg mpg mts ogv ts webm wmv".split())
LOCAL, TABLE, VIDEO = "a file", "a table", "a video"
SAMPLE = re.compile(r"((?:.*/)?[^./]+)(?:\.([^/]*))?", re.DOTALL)  # key and suffix, as WebDataset's
# Arrow's types of columns.
BINARY = re.compile(r"(large_)?binary|struct<.*\bbytes: (large_)?binary.*>")
STRING, OTHER = re.compile(r"(large_)?string"), re.compile(r"bool|u?int\d+|float|double|date|time")
MAX_BYTES = 2**30  # of a picture's file: one that is larger is no picture, and memory is finite
BEYOND = f"more than {MAX_BYTES} bytes, or beyond its end"
PROBLEMS = {kernels.NOT_REGULAR: "it is not a regular file", kernels.BEYOND_END: BEYOND}
LOCK = threading.Lock()  # of the tables and videos that are open


@dataclass(slots=True)
class Record:
    """A row: a picture's file, a frame [H, W, 3] uint8 or a text, and its metadata."""

    key: str
    data: Union[bytes, memoryview, np.ndarray, str, None]
    metadata: dict[str, Any] = field(default_factory=dict)
    error: Optional[str] = None  # why it cannot be read: it belongs to bad/


class Rows:
    """The rows of one shard.

    items: the path of a picture, or the fields of a Record and, where its data is to be read, its
    place; held as bytes, for there may be millions.  sequential: ranges are best read in order.
    """

    def __init__(self, items: list, sequential: bool = False):
        self.count, self.sequential, self.items = len(items), sequential, None
        self.packed = json.dumps(items, default=str).encode()

    def __len__(self) -> int:
        return self.count

    def digest(self) -> str:
        """SHA-256 of what is read: paths, places and captions."""
        return hashlib.sha256(self.packed).hexdigest()

    def read(self, start: int, stop: int) -> list[Record]:
        """The rows from start to before stop, from any thread.  What cannot be read is a Record
        with an error, never an exception."""
        self.items = self.items or json.loads(self.packed)
        items = [[each, None, {"image_path": each}, None, *place(each)]
                 if isinstance(each, str) else each for each in self.items[start:stop]]
        records = [Record(*each[:4]) for each in items]
        for kind, group in groupby(zip(items, records), lambda each: "".join(each[0][4:5])):
            places, unread = zip(*((item[4:], record) for item, record in group))
            for record, data in zip(unread, READERS.get(kind, read_remote)(places) if kind else ()):
                record.data = data
                if isinstance(data, str):
                    record.data, record.metadata, record.error = None, {}, data
        return records


def plan(inputs: list[str], text: bool, shard_rows: int, every: float, column: Optional[str]
         ) -> list[Rows]:
    """One `Rows` for each shard of at most shard_rows, in the order of the inputs.

    inputs: folders, globs, files and fsspec URLs.  text: texts, not pictures.
    every: seconds between the frames of a video.  column: where tables hold paths, bytes or texts.
    Consecutive inputs are one sequence, but for videos, which are cut by themselves.
    Raises UserError for inputs that are missing, empty or need what is not given.
    """
    for cache in (row_group, playback):  # of what lay at a path before
        cache.cache_clear()
    shards: list[Rows] = []
    sources = chain.from_iterable(map(expand, inputs))
    try:
        for video, group in groupby(sources, lambda source: source[0] * (source[1] in VIDEOS)):
            items = chain.from_iterable(read_items(*each, text, every, column) for each in group)
            while batch := list(islice(items, shard_rows)):
                shards.append(Rows(batch, sequential=bool(video)))
    except (OSError, csv.Error) as problem:
        raise UserError(f"the inputs cannot be listed: {problem}") from problem
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
    except (OSError, ValueError, tarfile.TarError) as problem:
        if isinstance(problem, UserError) or ending in ("txt", "csv", "/"):
            raise
        yield [path, None, {}, reason(problem)]


def walk(folder: str) -> Iterator[str]:
    """The regular files beneath, in the order of their paths' bytes, and not beneath links."""
    if "://" in folder:
        system, path = file_system(folder)
        yield from map(system.unstrip_protocol, sorted(system.find(path), key=os.fsencode))
        return
    entries = {entry.name + "/" * entry.is_dir(follow_symlinks=False): entry
               for entry in os.scandir(folder)}
    for name in sorted(entries, key=os.fsencode):
        if name.endswith("/"):
            yield from walk(entries[name].path)
        elif entries[name].is_file():
            yield entries[name].path


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
            stripped = (line.strip() if text else line.rstrip("\n") for line in lines)
            rows = ({name: line} for line in stripped if line and not line.isspace())
        for number, row in enumerate(rows):
            value, _ = row.pop(name), row.pop("", None)  # more fields than the header has
            if text:
                yield item(f"{path}:{number}", {"caption": value}, row, value)
            else:
                value = value if "://" in value else os.path.join(os.path.dirname(path), value)
                yield item(value, {"image_path": value}, row, None, *place(value))


def tar_items(path: str, text: bool, _: Optional[str]) -> Iterator[list]:
    """Of an archive in WebDataset's layout, with captions and fields of .txt and .json members."""
    with open_file(path) as file, tarfile.open(fileobj=file, mode="r:") as archive:
        members = ((SAMPLE.fullmatch(each.name), each) for each in archive if each.isreg())
        named = ((*match.groups(""), each) for match, each in members if match)
        for key, group in groupby(named, itemgetter(0)):
            sample, texts, fields = [each[1:] for each in group], {}, {}
            for suffix, member in sample:
                if suffix in ("txt", "json"):
                    file.seek(member.offset_data)
                    texts[suffix] = str(file.read(member.size), "utf-8", "replace").strip()
            with contextlib.suppress(ValueError, TypeError):
                fields = dict(json.loads(texts.get("json", "{}")))
            ours = {"caption": texts["txt"], "key": key} if "txt" in texts else {"key": key}
            pictures = [each for each in sample if each[0].lower().split(".")[-1] in PICTURES]
            if text and "txt" in texts:
                yield item(f"{path}/{key}.txt", ours, fields, texts["txt"])
            elif text or not pictures:
                yield [f"{path}/{key}", None, {}, "nothing in it can be embedded"]
            for suffix, member in pictures if not text else ():
                name = f"{path}/{key}.{suffix}".rstrip(".")
                yield item(name, {"image_path": name, **ours}, fields, None,
                           *place(path, member.offset_data, member.size))
        file.seek(archive.offset)  # where tarfile stopped, in silence at most damages
        if file.read(tarfile.BLOCKSIZE).strip(b"\0"):
            raise tarfile.ReadError(f"the archive is damaged at byte {archive.offset}")


def table_items(path: str, text: bool, column: Optional[str]) -> Iterator[list]:
    """Of a .parquet file: all but the pictures."""
    with open_file(path) as file:
        table = library("pyarrow.parquet").ParquetFile(file)
        size, types = file.seek(0, os.SEEK_END), {each.name: str(each.type)
                                                  for each in table.schema_arrow}
        names = [name for name in types if (STRING if text else BINARY).fullmatch(types[name])]
        chosen = choose(path, names, text, column)
        others = [name for name, kind in types.items() if STRING.match(kind) or OTHER.match(kind)]
        others += [f"{chosen}.path"] if "path: " in types[chosen] else []  # as in Hugging Face's
        groups = (table.read_row_group(group, columns=others).to_pylist()
                  for group in range(table.num_row_groups))
        rows = ((group, *each) for group, rows in enumerate(groups) for each in enumerate(rows))
        for number, (group, index, row) in enumerate(rows):
            key, value = f"{path}:{number}", row.pop(chosen, None)
            if not text:
                name = (value or {}).get("path") or row.get("image_path") or key
                yield item(key, {"image_path": name}, row, None, TABLE, path, size, chosen, group,
                           index)
            elif value is not None:
                yield item(key, {"caption": value}, row, value)
            else:
                yield [key, None, {}, "the row is empty"]


def choose(path: str, names: list[str], text: bool, column: Optional[str]) -> str:
    """The column that is asked for, else that of a usual name, else the only one."""
    usual = ["caption", "text"] if text else ["image_path", "path"]
    found = [column] if column else [each for each in usual if each in names][:1] or names
    if len(found) != 1 or found[0] not in names:
        raise UserError(f"{path} has no column {column or ' or '.join(usual)} that serves; "
                        f"--column names one of {', '.join(names)}")
    return found[0]


def video_items(path: str, every: float) -> Iterator[list]:
    """Of a video: the frame that is on screen at each k * every, from the packets alone.  Times
    count from the first frame, and the last one is on screen for its duration."""
    with open_video(path) as container:
        if not container.streams.video:
            raise ValueError("it has no video stream")
        packets = [(packet.pts, packet.duration or 1, packet.is_keyframe)
                   for packet in container.demux(container.streams.video[0])
                   if packet.pts is not None and not packet.is_discard]
        tick, size = container.streams.video[0].time_base, container.size
    if not packets:
        raise ValueError("its frames have no timestamps")
    shown, step = sorted(pts for pts, *_ in packets), Fraction(str(every)) / tick
    keys = sorted({shown[0], *(pts for pts, _, key in packets if key)})
    end = max(pts + duration for pts, duration, _ in packets) - shown[0]
    for k in range(math.ceil(end / step)):
        pts, time = shown[bisect_right(shown, shown[0] + k * step) - 1], float(k * step * tick)
        key = keys[bisect_right(keys, pts) - 1]
        yield item(f"{path}:{time:.6g}s", {"image_path": path, "time": time, "pts": pts}, {}, None,
                   VIDEO, path, size, keys[0], pts, key)


def item(key: str, ours: dict, others: dict, text: Optional[str], *where: Any) -> list:
    """Of `Rows`; our own fields come first and win."""
    return [key, text, {**ours, **others, **ours}, None, *where]


def place(path: str, offset: int = 0, size: int = -1) -> list:
    scheme, remote, _ = path.partition("://")
    return [scheme if remote else LOCAL, path, offset, size]


# Readers: what lies at each place of a kind, or in a word why it cannot be read.


def attempt(function: Callable, *arguments: Any) -> Any:
    try:
        return function(*arguments)
    except Exception as problem:  # of arrow, FFmpeg and file systems, which share no type
        return reason(problem)


def read_local(places: list) -> list[Union[bytes, memoryview, str]]:
    """In one call that does not hold the GIL, where the library of kernels is built."""
    names = os.fsencode("".join([f"{path}\0" for _, path, *_ in places]))
    if not kernels.reads_files() or names.count(0) != len(places):
        return [attempt(read_one, *each[1:]) for each in places]
    offsets, sizes = np.array([each[2:] for each in places]).T.copy()
    data, errors = kernels.read_files(names, offsets, sizes, MAX_BYTES)
    whole, ends = memoryview(data), sizes.cumsum().tolist()
    return [whole[end - size:end] if error == 0 else PROBLEMS.get(error) or os.strerror(error)
            for end, size, error in zip(ends, sizes.tolist(), errors.tolist())]


def read_one(path: str, offset: int, size: int) -> Union[bytes, str]:
    if os.path.exists(path) and not os.path.isfile(path):
        return PROBLEMS[kernels.NOT_REGULAR]
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size - offset if size < 0 else size
        blob = os.pread(file.fileno(), size, offset) if size <= MAX_BYTES else b""
    return blob if len(blob) == size else BEYOND


def read_remote(places: list) -> list[Union[bytes, str]]:
    """Of one remote file system, all at once."""
    system, _ = file_system(places[0][1])
    _, urls, starts, sizes = map(list, zip(*places))
    stops = [start + size if size >= 0 else None for start, size in zip(starts, sizes)]
    blobs = system.cat_ranges(list(map(system._strip_protocol, urls)), starts, stops,
                              on_error="return")
    return [reason(blob) if isinstance(blob, Exception) else
            blob if size in (-1, len(blob)) else BEYOND for blob, size in zip(blobs, sizes)]


def read_table(places: list) -> list[Union[bytes, str]]:
    blobs = []
    for where, group in groupby(places, lambda each: each[1:5]):
        rows = [row for *_, row in group]
        with LOCK:
            column = attempt(row_group, *where)
        values = [column] * len(rows) if isinstance(column, str) else column.take(rows).to_pylist()
        values = (each["bytes"] if isinstance(each, dict) else each for each in values)
        blobs += ["the row is empty" if each is None else each for each in values]
    return blobs


@lru_cache(2)  # for threads that are not quite level
def row_group(path: str, size: int, column: str, group: int) -> Any:
    with open_file(path) as file:
        table = library("pyarrow.parquet").ParquetFile(file)
        return table.read_row_group(group, columns=[column])[column]


def read_frames(places: list) -> list[Union[np.ndarray, str]]:
    with LOCK:
        return [attempt(lambda: playback(*each[1:4]).at(*each[4:])) for each in places]


class Playback:
    """A video that is decoded on, or from a later key frame that is not after the wanted frame."""

    def __init__(self, path: str, size: int, first: int):
        self.container, self.first = open_video(path), first
        self.stream = self.container.streams.video[0]
        self.stream.thread_type = "AUTO"
        self.frames = self.container.decode(self.stream)
        self.shown, self.reached = next(self.frames, None), first

    def at(self, wanted: int, key: int) -> np.ndarray:
        """Pixels [H, W, 3] of the frame whose pts is wanted."""
        seek, self.reached = key > self.reached or wanted < self.reached, math.inf
        for start in (key, self.first) if seek else ():  # a seek may end behind the frame
            self.container.seek(start, stream=self.stream)
            self.frames = self.container.decode(self.stream)
            self.shown = next(self.frames, None)
            if self.shown and self.shown.pts <= wanted:
                break
        while self.shown and self.shown.pts < wanted:
            self.shown = next(self.frames, None)
        if not self.shown or self.shown.pts > wanted:
            raise ValueError("the frame cannot be decoded")
        self.reached, turns = wanted, round(self.shown.rotation / 90)
        return np.ascontiguousarray(np.rot90(self.shown.to_ndarray(format="rgb24"), turns))


playback = lru_cache(1)(Playback)
READERS = {LOCAL: read_local, TABLE: read_table, VIDEO: read_frames}


def open_file(path: str) -> Any:
    return file_system(path)[0].open(path, "rb") if "://" in path else open(path, "rb")


def open_video(path: str) -> Any:
    return library("av").open(open_file(path) if "://" in path else path)


def file_system(url: str) -> tuple[Any, str]:
    """fsspec's file system of a path or a URL, and the path in it."""
    try:
        return library("fsspec.core").url_to_fs(url)
    except (ImportError, ValueError) as problem:
        raise UserError(f"{url} cannot be opened: {problem}") from problem


def library(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as problem:
        raise UserError(f"{name.partition('.')[0]} is missing; pip install 'clip_ttrt[embed]' "
                        "brings it") from problem


def reason(problem: Exception) -> str:
    """An exception in one line."""
    text = getattr(problem, "strerror", None) or str(problem) or type(problem).__name__
    return " ".join(text.split())
