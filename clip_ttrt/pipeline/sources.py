"""Inputs -> rows: pictures, frames of videos and texts, cut into shards that can read themselves.

`plan` looks at names, sizes and indices only.  What it returns is small and picklable; the bytes
are read by whoever holds a shard, a range of rows at a time.
"""
import csv
import glob
import hashlib
import importlib
import io
import json
import math
import os
import re
import stat
import tarfile
import threading
from bisect import bisect_right
from dataclasses import dataclass, field
from fractions import Fraction
from functools import partial
from itertools import accumulate, chain, groupby, islice
from typing import Any, BinaryIO, Iterable, Iterator, Optional, Union

import numpy as np

from clip_ttrt.errors import UserError

PICTURES = set("avif bmp gif heic heif ico j2k jfif jp2 jpe jpeg jpg pbm pgm png pnm ppm tga tif "
               "tiff webp".split())
VIDEOS = set("3gp avi flv m2ts m4v mkv mov mp4 mpeg mpg mts ogv ts webm wmv".split())
PATH_COLUMNS, TEXT_COLUMNS = ["image_path", "path"], ["caption", "text"]
MAX_BYTES = 2**30  # of a picture's file: one that is larger is no picture, and memory is finite


@dataclass
class Record:
    """A row: the bytes of a picture, a frame [H, W, 3] uint8 or a text, and its metadata."""

    key: str
    data: Union[bytes, np.ndarray, str, None]
    metadata: dict[str, Any] = field(default_factory=dict)
    error: Optional[str] = None  # why it cannot be read: it belongs to bad/


def record(key: str, data: Any, ours: dict[str, Any], others: dict[str, Any] = {}) -> Record:
    """A Record of what was read, or of the exception instead; our own fields come first and win."""
    if isinstance(data, Exception):
        return Record(key, None, {}, reason(data))
    return Record(key, data, {**ours, **others, **ours})


class Rows:
    """The rows of one shard, out of one container or a sequence of files.

    items: what to read, one JSON value for each row; held as bytes, for there may be millions.
    path: the container.  options: what else reading it needs, as JSON values.
    """

    sequential = False  # True: ranges are best read in order

    def __init__(self, items: Iterable, path: str = "", **options: Any):
        items = list(items)
        self.__setstate__((len(items), json.dumps(items).encode(), path, options))

    def __getstate__(self) -> tuple:
        return self.count, self.packed, self.path, self.options

    def __setstate__(self, state: tuple) -> None:
        self.count, self.packed, self.path, self.options = state
        self._items, self._opened, self._lock = None, None, threading.Lock()

    def __len__(self) -> int:
        return self.count

    def items(self, start: int, stop: int) -> list:
        if self._items is None:
            self._items = json.loads(self.packed)
        return self._items[start:stop]

    def slice(self, start: int, stop: int) -> "Rows":
        """The rows from start to before stop as a shard of their own."""
        return type(self)(self.items(start, stop), self.path, **self.options)

    def digest(self) -> str:
        """SHA-256 of what is read: paths, and of containers the size and the rows, too."""
        facts = json.dumps([type(self).__name__, self.path, self.options], sort_keys=True)
        return hashlib.sha256(facts.encode() + self.packed).hexdigest()

    def read(self, start: int, stop: int) -> list[Record]:
        """The rows from start to before stop, from any thread.  What cannot be read is a Record
        with an error, never an exception."""
        return [self.record(*item) for item in self.items(start, stop)]


class LostRows(Rows):
    """What cannot be read at all, such as the rest of a damaged archive.  items: [error]."""

    def record(self, error: str) -> Record:
        return Record(self.path, None, {}, error)


class TextRows(Rows):
    """Texts of a .txt or .csv file.  items: [number, text, its other metadata]."""

    def record(self, number: int, text: str, others: dict[str, Any]) -> Record:
        return record(f"{self.path}:{number}", text, {"caption": text}, others)


class FileRows(Rows):
    """Picture files.  items: a path, or [path, its other metadata]."""

    def read(self, start: int, stop: int) -> list[Record]:
        items = [each if isinstance(each, list) else (each, {}) for each in self.items(start, stop)]
        blobs: list[Union[bytes, Exception]] = []
        for remote, group in groupby((path for path, _ in items), lambda path: "://" in path):
            if remote:
                blobs += fetch([(path, None, None) for path in group])
            else:
                blobs += chain.from_iterable(read_local(path, [(0, None)]) for path in group)
        return [record(path, blob, {"image_path": path}, others)
                for (path, others), blob in zip(items, blobs)]


class TarRows(Rows):
    """WebDataset samples.  items: [key, members], a member being [suffix, offset, size]: first what
    is embedded, then .txt and .json; none where the sample holds nothing to embed."""

    def read(self, start: int, stop: int) -> list[Record]:
        items = self.items(start, stop)
        places = [place for _, members in items for _, *place in members]
        blobs = iter(fetch([(self.path, offset, offset + size) for offset, size in places])
                     if "://" in self.path else read_local(self.path, places))
        return [self.record(key, [(suffix, next(blobs)) for suffix, *_ in members])
                for key, members in items]

    def record(self, key: str, members: list[tuple[str, Union[bytes, Exception]]]) -> Record:
        if not members:
            error = "nothing among the sample's members can be embedded"
            return Record(f"{self.path}/{key}", None, {}, error)
        texts = {suffix: blob.decode(errors="replace").strip() for suffix, blob in members
                 if suffix.endswith(("txt", "json")) and isinstance(blob, bytes)}
        suffix, data = members[0]
        path = f"{self.path}/{key}.{suffix}" if suffix else f"{self.path}/{key}"
        ours, caption = {"key": key}, texts.get(suffix, texts.get("txt"))
        if caption is not None:
            ours = {"caption": caption, **ours}
        if self.options["text"]:
            data = texts.get(suffix, data)
        else:
            ours = {"image_path": path, **ours}
        return record(path, data, ours, json_fields(texts.get("json", "")))


class ParquetRows(Rows):
    """Pictures or texts of a column.  items: numbers of the file's rows, one after the other."""

    def read(self, start: int, stop: int) -> list[Record]:
        ends, records = self.options["ends"], []
        for group, rows in groupby(self.items(start, stop), partial(bisect_right, ends)):
            rows, first = list(rows), ends[group - 1] if group else 0
            try:
                table = self.row_group(group).slice(rows[0] - first, len(rows))
                records += map(self.record, rows, table.to_pylist())
            except Exception as problem:  # arrow's and those of file systems share no type
                records += [record(f"{self.path}:{row}", problem, {}) for row in rows]
        return records

    def row_group(self, group: int) -> Any:
        """A row group as a table; the last two stay, for threads that are not quite level."""
        with self._lock:
            self._opened = self._opened or {}
            if group not in self._opened:
                names = [self.options["column"], *self.options["others"]]
                with open_file(self.path) as file:
                    opened = library("pyarrow.parquet").ParquetFile(file)
                    self._opened[group] = opened.read_row_group(group, columns=names)
                if len(self._opened) > 2:
                    del self._opened[next(iter(self._opened))]
            return self._opened[group]

    def record(self, row: int, values: dict[str, Any]) -> Record:
        key, data = f"{self.path}:{row}", values.pop(self.options["column"])
        if isinstance(data, dict):  # as Hugging Face's datasets has it
            values["image_path"], data = data.get("path"), data["bytes"]
        if data is None:
            return Record(key, None, {}, "the row is empty")
        ours = {"caption": data} if self.options["text"] else {
            "image_path": values.get("image_path") or key}
        return record(key, data, ours, values)


class VideoRows(Rows):
    """Frames of a video.  items: [k, pts of the frame that is on screen at k * every]."""

    sequential = True

    def read(self, start: int, stop: int) -> list[Record]:
        with self._lock:
            return super().read(start, stop)

    def record(self, k: int, pts: int) -> Record:
        time = float(k * Fraction(self.options["every"]))
        try:
            self._opened = self._opened or Playback(self.path, self.options["keys"])
            data = self._opened.at(pts)
        except Exception as problem:  # FFmpeg's and those of file systems share no type
            data = problem
        ours = {"image_path": self.path, "time": time, "pts": pts}
        return record(f"{self.path}:{time:.6g}s", data, ours)


class Playback:
    """A video that is decoded on, or from a later key frame where one is nearer."""

    def __init__(self, path: str, keys: list[int]):
        self.path, self.keys = path, keys
        self.start(None)

    def start(self, key: Optional[int]) -> None:
        """Decode from a key frame's pts on, or anew from the first frame."""
        if key is None:
            self.container = open_video(self.path)
            self.stream = self.container.streams.video[0]
            self.stream.thread_type = "AUTO"
        else:
            self.container.seek(key, stream=self.stream)
        self.shown = self.following = self.problem = None
        self.frames = self.decode()

    def decode(self) -> Iterator[Any]:
        for packet in self.container.demux(self.stream):
            try:
                yield from (frame for frame in packet.decode() if frame.pts is not None)
            except library("av").FFmpegError as problem:  # of this packet: the next may be good
                self.problem = problem

    def at(self, wanted: int) -> np.ndarray:
        """The pixels [H, W, 3] of the frame with the largest pts not after the wanted one."""
        key = max(self.keys[:bisect_right(self.keys, wanted)], default=None)
        reached = self.following or self.shown
        later = key is not None and key > (reached.pts if reached else self.keys[0])
        if later or self.shown and self.shown.pts > wanted:
            self.start(key)
        self.advance(wanted)
        if self.shown is None:  # the seek ended behind it
            self.start(None)
            self.advance(wanted)
        ended = self.following is None
        if self.shown is None or self.shown.pts < wanted and (ended or self.problem):
            raise ValueError(f"the frame cannot be decoded ({self.problem or 'the video ends'})")
        pixels, turns = self.shown.to_ndarray(format="rgb24"), round(self.shown.rotation / 90)
        return np.ascontiguousarray(np.rot90(pixels, turns))

    def advance(self, wanted: int) -> None:
        while self.shown is None or self.shown.pts < wanted:
            self.following = self.following or next(self.frames, None)
            if self.following is None or self.following.pts > wanted:
                break
            self.shown, self.following = self.following, None


def plan(inputs: list[str], text: bool, shard_rows: int, every: Optional[float],
         column: Optional[str]) -> list[Rows]:
    """One `Rows` for each shard of at most shard_rows, in the order of the inputs.

    inputs: folders, globs, files and fsspec URLs; {000..099} counts.  text: texts, not pictures.
    every: seconds between the frames of a video.  column: where tables hold paths, bytes or texts.
    Consecutive picture files are one sequence; a container or a file of texts is cut by itself.
    Raises UserError for inputs that are missing, empty or need what is not given.
    """
    shards: list[Rows] = []

    def cut(kind: type[Rows], items: Iterable, path: str = "", **options: Any) -> None:
        items = iter(items)
        while batch := list(islice(items, shard_rows)):
            shards.append(kind(batch, path, **options))

    sources = (source for given in inputs for path, folder in expand(given)
               for source in open_source(path, folder, text, every, column))
    try:
        for files, group in groupby(sources, lambda source: source[0] is FileRows):
            if files:
                cut(FileRows, chain.from_iterable(items for _, items, *_ in group))
            else:
                for kind, items, path, options in group:
                    cut(kind, items, path, **options)
    except (OSError, csv.Error) as problem:
        raise UserError(f"the inputs cannot be listed: {problem}") from problem
    if not shards:
        raise UserError(f"{', '.join(inputs)}: nothing in it can be embedded")
    if all(isinstance(rows, LostRows) for rows in shards):
        raise UserError(f"{shards[0].path} cannot be read ({shards[0].read(0, 1)[0].error})")
    return shards


def open_source(path: str, folder: bool, text: bool, every: Optional[float], column: Optional[str]
                ) -> Iterator[tuple[type[Rows], Iterable, str, dict[str, Any]]]:
    """(kind, items, path, options) of the rows in a folder or a file that was named: its extension
    says what it is."""
    ending = "" if folder else path.rpartition(".")[2].lower()
    if text and ending not in ("txt", "csv", "tar", "parquet"):
        raise UserError(f"{path} holds no texts; name .txt, .csv, .tar or .parquet files")
    if ending in VIDEOS and not every:
        raise UserError(f"{path} is a video; --every 1s embeds a frame of each second")
    try:
        if folder:
            yield FileRows, walk_any(path), "", {}
        elif ending in ("txt", "csv"):
            rows = csv_rows(path, column, text) if ending == "csv" else (
                (line.strip() if text else line.rstrip("\n"), {}) for line in lines(path, text)
                if line.strip())
            if text:
                yield TextRows, ([number, *row] for number, row in enumerate(rows)), path, {}
            else:  # relative paths start at the list
                near = os.path.dirname(path)
                yield FileRows, ([name if "://" in name else os.path.join(near, name), others]
                                 for name, others in rows), "", {}
        elif ending == "tar":
            items, damage = tar_items(path, text)
            yield TarRows, items, path, {"text": text}
            yield LostRows, damage, path, {}
        elif ending == "parquet":
            yield ParquetRows, *parquet_rows(path, text, column)
        elif ending in VIDEOS:
            yield VideoRows, *video_frames(path, every)
        else:
            yield FileRows, [path], "", {}
    except UserError:
        raise
    except (OSError, ValueError, tarfile.TarError) as problem:  # of a container
        yield LostRows, [[reason(problem)]], path, {}


def expand(given: str) -> Iterator[tuple[str, bool]]:
    """(path, whether it is a folder) of all that an input stands for; UserError for nothing."""
    counted = re.search(r"\{(\d+)\.\.(\d+)\}", given)
    if counted and not os.path.exists(given):
        before, after = given[:counted.start()], given[counted.end():]
        for number in range(int(counted[1]), int(counted[2]) + 1):
            yield from expand(f"{before}{number:0{len(counted[1])}}{after}")
        return
    local = "://" not in given
    system, path = (os.path, os.path.abspath(given)) if local else file_system(given)
    paths = [path]
    if not system.exists(path):
        paths = glob.glob(path, recursive=True) if local else system.glob(path)
    if not paths:
        raise UserError(f"{given} matches no file")
    for path in sorted(paths, key=os.fsencode):
        yield path if local else system.unstrip_protocol(path), system.isdir(path)


def walk_any(folder: str) -> Iterator[str]:
    """All files beneath, in the order of their paths' bytes; UserError where there is none."""
    if "://" in folder:
        system, path = file_system(folder)
        paths = map(system.unstrip_protocol, sorted(system.find(path), key=os.fsencode))
    else:
        paths = map(os.fsdecode, walk(os.fsencode(folder)))
    first = next(paths, None)
    if first is None:
        raise UserError(f"{folder} holds no file")
    return chain([first], paths)


def walk(folder: bytes) -> Iterator[bytes]:
    """The regular files beneath; links to files are files, links to folders are not followed."""
    with os.scandir(folder) as entries:
        names = [entry.name + b"/" * entry.is_dir() for entry in entries
                 if entry.is_dir(follow_symlinks=False) or entry.is_file()]
    for name in sorted(names):
        path = os.path.join(folder, name)
        if name.endswith(b"/"):
            yield from walk(path[:-1])
        else:
            yield path


def lines(path: str, text: bool, newline: Optional[str] = None) -> Iterator[str]:
    """Lines of texts, or of paths in any bytes."""
    errors = "replace" if text else "surrogateescape"
    with open_file(path) as file:
        yield from io.TextIOWrapper(file, "utf-8-sig", errors, newline)


def csv_rows(path: str, column: Optional[str], text: bool) -> Iterator[tuple[str, dict]]:
    """(path or text, the other columns) of each row of a .csv file with a header."""
    reader = csv.DictReader(lines(path, text, newline=""), restkey="", restval="")
    names, known = reader.fieldnames or [], TEXT_COLUMNS if text else PATH_COLUMNS
    chosen = next((name for name in ([column] if column else known) if name in names), None)
    if chosen is None:
        raise UserError(f"{path} has no column {column or ' or '.join(known)}; --column names one "
                        f"of {', '.join(names)}")
    for row in reader:
        row.pop("", None)
        yield row.pop(chosen), row


def tar_items(path: str, text: bool) -> tuple[list, list]:
    """`TarRows`' items from the headers alone, and `LostRows`' of the rest of a damaged archive.
    Names that begin with a dot are no samples, as in WebDataset."""
    samples, latest, places, damage = [], {}, {}, []
    with open_file(path) as file, tarfile.open(fileobj=file, mode="r:") as archive:
        try:
            for member in archive:
                place = [member.offset_data, member.size] if member.isreg() else None
                places[member.name] = place = place or places.get(member.linkname)
                key, _, suffix = os.path.basename(member.name).partition(".")
                if place and key:
                    key = os.path.join(os.path.dirname(member.name), key)
                    if suffix in latest.get(key, {suffix}):
                        latest[key] = {}
                        samples.append((key, latest[key]))
                    latest[key][suffix] = place
        except tarfile.TarError as problem:
            damage = [[reason(problem)]]
        file.seek(archive.offset)  # where tarfile stopped, in silence at most damages
        if file.read(tarfile.BLOCKSIZE).strip(b"\0"):
            damage = [[f"the archive is damaged at byte {archive.offset}"]]
    wanted, items = {"txt"} if text else PICTURES | {""}, []
    for key, members in samples:
        first = [suffix for suffix in members if suffix.lower() in wanted][:1] or [
            suffix for suffix in members if suffix.rpartition(".")[2].lower() in wanted]
        rest = [suffix for suffix in ("txt", "json") if suffix in members and suffix not in first]
        items += [[key, [[suffix, *members[suffix]] for suffix in (each, *rest)]]
                  for each in first] or [[key, []]]
    return items, damage


def parquet_rows(path: str, text: bool, column: Optional[str]) -> tuple[range, str, dict]:
    """Items, path and options of `ParquetRows`."""
    types = library("pyarrow").types
    with open_file(path) as file:
        opened = library("pyarrow.parquet").ParquetFile(file)
        schema, facts, size = opened.schema_arrow, opened.metadata, file.seek(0, os.SEEK_END)
    ends = list(accumulate(facts.row_group(each).num_rows for each in range(facts.num_row_groups)))

    texts = [each.name for each in schema
             if types.is_string(each.type) or types.is_large_string(each.type)]
    scalars = texts + [each.name for each in schema if types.is_boolean(each.type)
                       or types.is_integer(each.type) or types.is_floating(each.type)]

    def is_bytes(kind: Any) -> bool:
        if types.is_struct(kind):
            return kind.get_field_index("bytes") >= 0 and is_bytes(kind.field("bytes").type)
        return types.is_binary(kind) or types.is_large_binary(kind)

    names = texts if text else [each.name for each in schema if is_bytes(each.type)]
    usual = [name for name in TEXT_COLUMNS if name in names][:1] if text else []
    chosen = [name for name in names if name == column] if column else usual or names
    if len(chosen) != 1:
        raise UserError(f"{path} has {len(chosen) or 'no'} columns {column or ''} of "
                        f"{'texts' if text else 'bytes'}; --column names one of "
                        f"{', '.join(names or schema.names)}")
    others = [name for name in schema.names if name in scalars and name not in chosen]
    return range(facts.num_rows), path, {"text": text, "column": chosen[0], "others": others,
                                         "ends": ends, "size": size}


def video_frames(path: str, every: float) -> tuple[list, str, dict]:
    """Items, path and options of `VideoRows`, from the packets: nothing is decoded.  Times count
    from the first frame, and the last one is on screen for its duration."""
    with open_video(path) as container:
        if not container.streams.video:
            raise ValueError("it has no video stream")
        stream, size = container.streams.video[0], container.size
        packets = [(packet.pts, packet.duration or 0, packet.is_keyframe)
                   for packet in container.demux(stream)
                   if packet.pts is not None and not packet.is_discard]
        step = Fraction(str(every)) / stream.time_base
    if not packets:
        raise ValueError("its frames have no timestamps")
    shown, keys = sorted(pts for pts, *_ in packets), sorted(pts for pts, _, key in packets if key)
    end = max(pts + max(duration, 1) for pts, duration, _ in packets) - shown[0]
    items = [[k, shown[bisect_right(shown, shown[0] + k * step) - 1]]
             for k in range(math.ceil(end / step))]
    return items, path, {"every": str(every), "keys": keys, "size": size}


def json_fields(text: str) -> dict[str, Any]:
    """The fields of a JSON object, nested ones as JSON; none where it is no such thing."""
    try:
        return {name: json.dumps(value) if isinstance(value, (list, dict)) else value
                for name, value in json.loads(text).items()}
    except (ValueError, AttributeError):
        return {}


def read_local(path: str, places: list) -> list[Union[bytes, Exception]]:
    """What lies at each (offset, size; None: all) of a file, or why it cannot be read."""
    file = None
    try:
        file = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        facts, blobs = os.fstat(file), []
        if not stat.S_ISREG(facts.st_mode):
            raise ValueError("it is not a regular file")
        for offset, size in places:
            size = facts.st_size if size is None else size
            blob = os.pread(file, size, offset) if size <= MAX_BYTES else b""
            blobs.append(blob if len(blob) == size else ValueError(
                f"{size} bytes, which are too many or beyond its end"))
        return blobs
    except (OSError, ValueError) as problem:
        return [problem] * len(places)
    finally:
        if file is not None:
            os.close(file)


def fetch(places: list) -> list[Union[bytes, Exception]]:
    """What lies at each (URL, start, stop; None: all) of one remote file system, all at once."""
    system, _ = file_system(places[0][0])
    urls, starts, stops = map(list, zip(*places))
    blobs = system.cat_ranges([system._strip_protocol(url) for url in urls], starts, stops,
                              on_error="return")
    return [blob if isinstance(blob, Exception) or stop is None or len(blob) == stop - start else
            ValueError(f"it ends at byte {start + len(blob)}, not {stop}")
            for blob, start, stop in zip(blobs, starts, stops)]


def open_file(path: str) -> BinaryIO:
    if "://" not in path:
        return open(path, "rb")
    system, inside = file_system(path)
    return system.open(inside, "rb")


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
