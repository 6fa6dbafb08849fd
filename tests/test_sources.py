"""Inputs to rows, against files that tarfile, pyarrow, csv and PyAV wrote."""
import csv
import io
import os
import pickle
import random
import struct
import tarfile
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction

import numpy as np
import pytest

from clip_ttrt import kernels
from clip_ttrt.errors import UserError
from clip_ttrt.pipeline import sources

arrow = pytest.importorskip("pyarrow")
parquet = pytest.importorskip("pyarrow.parquet")


def plan(*inputs, text=False, rows=1000, every=None, column=None):
    return sources.plan([str(each) for each in inputs], text, rows, every, column)


def read(*inputs, **options):
    """All records: a shard at a time as a worker that got it by pickle would read it."""
    return [own(record) for rows in plan(*inputs, **options)
            for record in pickle.loads(pickle.dumps(rows)).read(0, len(rows))]


def own(record):
    """With bytes of its own, which compare."""
    data = bytes(record.data) if isinstance(record.data, memoryview) else record.data
    return sources.Record(record.key, data, record.metadata, record.error)


def write(folder, *names):
    """Files, each of which holds its own name."""
    for name in map(os.fsencode, names):
        path = os.path.join(os.fsencode(folder), name)
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with open(path, "wb") as file:
            file.write(name)


def write_tar(path, members, **options):
    with tarfile.open(path, "w", **options) as archive:
        for name, data in members:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))


NAMES = ("b.jpg", "a.jpg", "a/z.png", "a/b/c.jpg", "a-b/x.webp", "Z.jpg", ".hidden.jpg", "no_dot",
         "list.txt", "with space.jpg", "ü.jpg", b"caf\xe9.jpg", "new\nline.jpg", "x.tar",
         "{1..2}.jpg", "[a].jpg", "a::b.jpg")


def test_a_folder_gives_every_regular_file_by_the_bytes_of_its_path(tmp_path):
    folder, other = tmp_path / "in", tmp_path / "other"
    write(folder, *NAMES)
    write(other, "linked.jpg")
    (folder / "link_to_folder").symlink_to(other)
    (folder / "a" / "loop").symlink_to(folder)
    (folder / "link.jpg").symlink_to(other / "linked.jpg")
    (folder / "dangling.jpg").symlink_to(other / "nothing.jpg")
    os.mkfifo(folder / "pipe")
    wanted = sorted([os.fsencode(name) for name in NAMES] + [b"link.jpg"])
    records = read(folder)
    paths = [os.path.join(os.fsencode(folder), name) for name in wanted]
    assert [os.fsencode(record.key) for record in records] == paths
    assert [record.data for record in records] == [
        b"linked.jpg" if name == b"link.jpg" else name for name in wanted]
    assert all(list(record.metadata.items()) == [("image_path", record.key)] for record in records)
    assert not any(record.error for record in records)


def test_files_and_archives_are_one_sequence_cut_into_shards(tmp_path):
    write(tmp_path, *(f"a/{number:02d}.jpg" for number in range(7)), "c.jpg", "b/0.jpg")
    write_tar(tmp_path / "t.tar", [(f"{number}.jpg", b"tar") for number in range(3)])
    shards = plan(tmp_path / "a", tmp_path / "c.jpg", tmp_path / "t.tar", tmp_path / "b", rows=4)
    assert [len(rows) for rows in shards] == [4, 4, 4]
    assert [record.data for record in shards[1].read(1, 4)] == [b"a/05.jpg", b"a/06.jpg", b"c.jpg"]
    assert [record.data for record in shards[2].read(0, 4)] == [b"tar", b"tar", b"tar", b"b/0.jpg"]
    again = plan(tmp_path / "a", tmp_path / "c.jpg", tmp_path / "t.tar", tmp_path / "b", rows=4)
    assert [rows.digest() for rows in again] == [rows.digest() for rows in shards]
    assert len({rows.digest() for rows in shards}) == 3


def test_globs(tmp_path, monkeypatch):
    write(tmp_path, "in/b1.jpg", "in/b2.jpg", "in/b3.png", "in/sub/c.jpg", "in/b10.jpg",
          "{1..2}.jpg")
    monkeypatch.chdir(tmp_path)
    for given, names in (("in/*.jpg", ["b1.jpg", "b10.jpg", "b2.jpg"]),
                         ("in/**/*.jpg", ["b1.jpg", "b10.jpg", "b2.jpg", "sub/c.jpg"]),
                         ("in/s*", ["sub/c.jpg"]), ("in/", ["b1.jpg", "b10.jpg", "b2.jpg", "b3.png",
                                                           "sub/c.jpg"])):
        assert [each.key for each in read(given)] == [str(tmp_path / "in" / name) for name in names]
    assert [each.key for each in read("{1..2}.jpg")] == [str(tmp_path / "{1..2}.jpg")]
    with pytest.raises(UserError, match="in/d.* matches no file"):
        plan("in/d*")


def test_lists_are_relative_to_themselves_and_what_is_missing_is_a_record(tmp_path):
    write(tmp_path, "in/a b.jpg", b"in/\xff.jpg", "far.jpg", "in/ spaces ")
    (tmp_path / "in" / "list.txt").write_bytes(
        b"\xef\xbb\xbfa b.jpg\r\n\n\xff.jpg\nmissing.jpg\n%s\n.\n spaces \n"
        % bytes(tmp_path / "far.jpg"))
    records = read(tmp_path / "in" / "list.txt", rows=2)
    assert [each.data for each in records] == [
        b"in/a b.jpg", b"in/\xff.jpg", None, b"far.jpg", None, b"in/ spaces "]
    assert [each.error for each in records] == [
        None, None, "No such file or directory", None, records[4].error, None]
    assert records[2].key == str(tmp_path / "in" / "missing.jpg") and records[2].metadata == {}


def test_csv_lists(tmp_path):
    names = ["a,1.jpg", 'q"uote.jpg', "new\nline.jpg"]
    write(tmp_path, *names)
    with (tmp_path / "list.csv").open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerows([["id", "path", "caption"], *([f"{n}", name, f"cap, {n}"]
                                                     for n, name in enumerate(names))])
    records = read(tmp_path / "list.csv")
    assert [each.data.decode() for each in records] == names
    assert [each.metadata for each in records] == [
        {"image_path": str(tmp_path / name), "id": f"{n}", "caption": f"cap, {n}"}
        for n, name in enumerate(names)]
    assert [each.data for each in read(tmp_path / "list.csv", text=True)] == [
        "cap, 0", "cap, 1", "cap, 2"]
    texts = read(tmp_path / "list.csv", text=True, column="id")
    assert texts[1].metadata == {"caption": "1", "path": 'q"uote.jpg'}
    (tmp_path / "two.csv").write_text('path,image_path\n"a,1.jpg",b.jpg\n')
    [record] = read(tmp_path / "two.csv", column="path")
    assert record.metadata == {"image_path": str(tmp_path / "a,1.jpg")}
    with pytest.raises(UserError, match="no column picture .* id, path, caption"):
        plan(tmp_path / "list.csv", column="picture")
    (tmp_path / "list.csv").write_text("url,id\nhttp://x,1\n")
    with pytest.raises(UserError, match="no column image_path or path .* one of url, id"):
        plan(tmp_path / "list.csv")


def test_texts(tmp_path):
    (tmp_path / "t.txt").write_bytes("zwei Katzen\n\n  \n a dog\u2028x \r\nbad \udcff\n".encode(
        errors="surrogateescape"))
    records = read(tmp_path / "t.txt", text=True, rows=2)
    assert [each.data for each in records] == ["zwei Katzen", "a dog\u2028x", "bad \ufffd"]
    assert [each.metadata for each in records] == [{"caption": each.data} for each in records]
    assert len({each.key for each in records}) == 3
    with pytest.raises(UserError, match="holds no texts"):
        plan(tmp_path, text=True)


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
def test_tars_are_webdatasets(tmp_path, form):
    long = "d/" + "n" * 60 + "/" + "m" * 60
    path = tmp_path / "a.tar"
    write_tar(path, [
        ("000.jpg", b"p0"), ("000.txt", "Käse\n".encode()),
        ("001.seg.png", b"s1"), ("001.PNG", b"p1"), ("001.json", b"{}"),
        ("d/002.v2.jpg", b"p2"), (f"{long}.jpg", b"p3" * 9000), ("004.npy", b"4"),
        ("004.txt", b"t4"),
        ("._000.jpg", b"mac"), ("e.f/.hidden", b"x"), ("no_dot", b"p5"), ("000.jpg", b"p0 again"),
        ("IMG.1.jpg", b"p6"), ("IMG.2.jpg", b"p7")], format=form)
    with tarfile.open(path, "a", format=form) as archive:
        archive.addfile(folder := tarfile.TarInfo("folder"))
        archive.addfile(tarfile.TarInfo("a directory/"))
        assert folder.isreg()
    records = read(path, rows=4)
    assert [(each.data, each.key.removeprefix(f"{path}/")) for each in records] == [
        (b"p0", "000.jpg"), (b"s1", "001.seg.png"), (b"p1", "001.PNG"), (b"p2", "d/002.v2.jpg"),
        (b"p3" * 9000, f"{long}.jpg"), (b"p5", "no_dot"), (b"p0 again", "000.jpg"),
        (b"p6", "IMG.1.jpg"), (b"p7", "IMG.2.jpg"), (b"", "folder")]
    assert not any(each.error for each in records)
    assert records[0].metadata == {"image_path": f"{path}/000.jpg", "caption": "Käse", "key": "000"}
    assert records[2].metadata == {"image_path": f"{path}/001.PNG", "key": "001"}
    texts = read(path, text=True)
    assert [(each.data, each.metadata) for each in texts] == [
        ("Käse", {"caption": "Käse", "key": "000"}), ("t4", {"caption": "t4", "key": "004"})]


def test_a_damaged_tar_gives_what_is_whole_and_one_record_of_the_rest(tmp_path):
    members = [(f"{number}.jpg", bytes([number]) * 3000) for number in range(5)]
    path = tmp_path / "a.tar"
    write_tar(path, members)
    whole = path.read_bytes()
    at = 3 * 3584
    for data, good, reason in ((whole[:at + 512 + 100], 3, "unexpected end of data"),
                               (whole[:at] + b"x" * 512 + whole[at + 512:], 3, "damaged at byte"),
                               (whole[:at + 100], 3, "damaged at byte")):
        path.write_bytes(data)
        records = read(path)
        assert [each.data for each in records if not each.error] == [
            data for _, data in members[:good]]
        errors = [each.error for each in records if each.error]
        assert errors and reason in errors[0]
    path.write_bytes(b"no tar" * 1000)
    write(tmp_path, "good.jpg")
    records = read(path, tmp_path / "good.jpg")
    assert [each.data for each in records] == [None, b"good.jpg"] and records[0].error


def test_parquets(tmp_path):
    path, rows = tmp_path / "a.parquet", 25
    table = arrow.table({
        "id": range(rows), "image": [b"p%d" % row if row != 7 else None for row in range(rows)],
        "caption": [f"c{row}" for row in range(rows)], "score": [row / 2 for row in range(rows)],
        "good": [row % 2 == 0 for row in range(rows)], "vector": [[1.0]] * rows})
    parquet.write_table(table, path, row_group_size=7)
    for size in (1000, 10, 7, 1):
        records = read(path, rows=size)
        assert [each.data for each in records] == table["image"].to_pylist()
        assert records[7].error and not records[8].error
        assert records[24].metadata == {"image_path": f"{path}:3:3", "id": 24, "caption": "c24",
                                        "score": 12.0, "good": True}
    texts = read(path, text=True, rows=4)
    assert [each.data for each in texts] == table["caption"].to_pylist()
    assert texts[3].metadata == {"caption": "c3", "id": 3, "score": 1.5, "good": False}
    table = {"n": [1, 2], "img": [b"x", b"y"], "image_path": ["x.jpg", ""], "mask": [b"1", b"2"]}
    parquet.write_table(arrow.table(table), path)
    with pytest.raises(UserError, match="no column image_path or path .* one of img, mask"):
        plan(path)
    with pytest.raises(UserError, match="no column n that serves; --column names one of img, mask"):
        plan(path, column="n")
    records = read(path, column="img")
    assert [(each.data, each.metadata) for each in records] == [
        (b"x", {"image_path": "x.jpg", "n": 1}), (b"y", {"image_path": f"{path}:0:1", "n": 2})]


def test_many_threads_read_the_same_rows(tmp_path):
    write_tar(tmp_path / "a.tar", [(f"{n}.jpg", b"%d" % n * 50) for n in range(200)])
    table = arrow.table({"image": [b"%d" % n * 50 for n in range(200)]})
    parquet.write_table(table, tmp_path / "a.parquet", row_group_size=9)
    write(tmp_path, *(f"f/{n:03d}" for n in range(200)))
    for given in ("a.tar", "a.parquet", "f"):
        [rows] = plan(tmp_path / given)
        alone = [each.data for each in rows.read(0, 200)]
        [fresh] = plan(tmp_path / given)
        starts = random.Random(0).sample(range(0, 200, 5), 40)
        with ThreadPoolExecutor(8) as pool:
            parts = pool.map(lambda start: fresh.read(start, start + 5), starts)
        for start, part in zip(starts, parts):
            assert [each.data for each in part] == alone[start:start + 5]


def write_video(av, path, codec, times, options={}, tick=Fraction(1, 1000), gop=12):
    """A frame at each of the times (in ticks), no two of which look alike."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=30, options=options)
        stream.width, stream.height, stream.pix_fmt, stream.gop_size = 64, 48, "yuv420p", gop
        stream.time_base = stream.codec_context.time_base = tick
        for number, pts in enumerate(times):
            picture = np.full((48, 64, 3), number * 5 % 256, np.uint8)
            picture[:, : number % 64] = 255 - number * 3 % 256
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            frame.pts, frame.time_base = pts, tick
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))


def brute_force(av, path, every):
    """(k, pts, pixels) by decoding all frames: for each k the last frame that is not after it."""
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        tick = stream.time_base
        frames = sorted(((frame.pts, frame.to_ndarray(format="rgb24"))
                         for frame in container.decode(stream)), key=lambda each: each[0])
    first, found, k = frames[0][0], [], 0
    while k * Fraction(str(every)) <= (frames[-1][0] - first) * tick:
        now = [each for each in frames if (each[0] - first) * tick <= k * Fraction(str(every))]
        found.append((k, *now[-1]))
        k += 1
    return found


VIDEO = [("mpeg4", "mp4", {"bf": "2"}), ("mpeg4", "mkv", {}), ("mpeg4", "avi", {}),
         ("libx264", "mp4", {"bf": "3"}), ("libx264", "mkv", {"bf": "3",
                                                          "x264-params": "open-gop=1"}),
         ("mpeg2video", "ts", {"bf": "2"})]


@pytest.mark.parametrize("codec, ending, options", VIDEO, ids=lambda value: str(value))
def test_videos_give_the_frame_on_screen_at_each_moment(tmp_path, codec, ending, options):
    """Frame times vary, but for AVI and MPEG-TS, which hold none or only usual rates."""
    av = pytest.importorskip("av")
    if codec not in av.codecs_available:
        pytest.skip(f"PyAV without {codec}")
    path, steps = tmp_path / os.fsdecode(b"\xe9." + ending.encode()), random.Random(3)
    tick = Fraction(1, 25) if ending in ("avi", "ts") else Fraction(1, 1000)
    times = [n if tick > Fraction(1, 100) else 100 * n + steps.randrange(90) for n in range(60)]
    write_video(av, path, codec, times, options, tick)
    for every in (0.1, 0.7, 2.5):
        wanted = brute_force(av, path, every)
        records = read(path, every=every, rows=5)
        records = records[:len(wanted)]  # the last frame stays for its duration
        assert [each.error for each in records] == [None] * len(wanted)
        assert [each.metadata["pts"] for each in records] == [pts for _, pts, _ in wanted]
        for record, (k, _, pixels) in zip(records, wanted):
            assert record.metadata["image_path"] == str(path)
            assert record.metadata["time"] == pytest.approx(k * every)
            assert np.array_equal(record.data, pixels), (every, k)
        [rows] = plan(path, every=every)  # back and forth in one reader
        for index in steps.sample(range(len(wanted)), min(6, len(wanted))):
            assert np.array_equal(rows.read(index, index + 1)[0].data, wanted[index][2])


def test_a_video_is_decoded_on_and_seeks_only_to_a_later_key_frame(tmp_path, monkeypatch):
    av = pytest.importorskip("av")
    path = tmp_path / "a.mp4"
    write_video(av, path, "mpeg4", range(0, 6000, 100), gop=10)
    seeks, opened = [], []

    class Container:
        """A video's, that notes where it seeks."""

        def __init__(self, path):
            self.container = av.open(path)
            opened.append(path)

        def seek(self, pts, **options):
            seeks.append(pts)
            self.container.seek(pts, **options)

        def __getattr__(self, name):
            return getattr(self.container, name)

    with av.open(str(path)) as container:
        packets = list(container.demux(container.streams.video[0]))
    keys = [packet.pts for packet in packets if packet.is_keyframe]
    assert len(keys) > 4
    for every in (0.1, 0.5, 1.5):
        [rows] = plan(path, every=every)
        assert rows.sequential
        seeks.clear(), opened.clear(), sources.Playback.cache_clear()
        monkeypatch.setattr(sources, "open_video", Container)
        wanted = [record.metadata["pts"] for record in rows.read(0, len(rows))]
        nearest = [max(key for key in keys if key <= pts) for pts in wanted]
        monkeypatch.undo()
        assert seeks == [key for before, key in zip(wanted, nearest[1:]) if key > before]
        assert len(opened) == 1 and (seeks or every == 0.1)


def test_a_video_that_a_phone_held_upright_took_is_turned(tmp_path):
    av = pytest.importorskip("av")
    path = tmp_path / "a.mp4"
    write_video(av, path, "mpeg4", range(0, 1000, 100))
    plain, data = read(path, every=0.5)[1], path.read_bytes()
    matrices = [struct.pack(">9i", *(one << 16 for one in matrix), 1 << 30)
                for matrix in ((1, 0, 0, 0, 1, 0, 0, 0), (0, 1, 0, -1, 0, 0, 48, 0))]
    at = data.index(matrices[0], data.index(b"tkhd"))  # of the track's header
    path.write_bytes(data[:at] + matrices[1] + data[at + 36:])
    turned = read(path, every=0.5)[1]
    assert turned.data.shape == (64, 48, 3) and turned.data.flags["C_CONTIGUOUS"]
    assert np.array_equal(turned.data, np.flipud(plain.data).transpose(1, 0, 2))


def test_videos_that_are_broken(tmp_path):
    av = pytest.importorskip("av")
    path = tmp_path / "a.mkv"
    write_video(av, path, "mpeg4", range(0, 3000, 100), gop=5)
    data = path.read_bytes()
    rows = plan(path, every=0.5)[0]
    path.write_bytes(data[:len(data) // 2])
    records = rows.read(0, len(rows))
    cut = [record.error is None for record in records].index(False)
    assert len(records) == len(rows) == 6 and 1 < cut < 5
    assert all(record.error and record.data is None for record in records[cut:])
    path.write_bytes(b"nothing" * 100)
    sources.Playback.cache_clear()
    assert all(each.error and "\n" not in each.error for each in rows.read(0, 6))
    [lost] = read(path, every=1)
    assert lost.error and lost.key == str(path)
    path.unlink()
    assert all(each.error == "No such file or directory" for each in rows.read(0, 2))


def test_remote_inputs_give_what_local_ones_give(tmp_path):
    fsspec, av = pytest.importorskip("fsspec"), pytest.importorskip("av")
    write(tmp_path, "in/b.jpg", "in/a/[1].jpg", "in/a.jpg", "other.jpg")
    (tmp_path / "in.txt").write_text("in/a.jpg\nin/gone.jpg\n")
    write_tar(tmp_path / "0.tar", [(f"{n}.{kind}", b"%d" % n) for n in range(9)
                                   for kind in ("jpg", "txt")])
    parquet.write_table(arrow.table({"image": [b"x", b"y"], "n": [1, 2]}), tmp_path / "1.parquet")
    write_video(av, tmp_path / "v.mp4", "mpeg4", range(0, 2000, 100), {"bf": "2"})
    memory = fsspec.filesystem("memory")
    memory.put(str(tmp_path), "/bucket", recursive=True)
    try:
        for given in (["in"], ["in.txt"], ["0.tar"], ["1.parquet"], ["v.mp4"], ["*.tar"],
                      ["in/b.jpg", "other.jpg"]):
            local = read(*(tmp_path / each for each in given), every=0.3, rows=4)
            remote = read(*(f"memory://bucket/{each}" for each in given), every=0.3, rows=4)
            assert [each.key.replace("memory:///", "memory://") for each in remote] == [
                each.key.replace(str(tmp_path), "memory://bucket") for each in local]
            for one, other in zip(local, remote):
                assert np.array_equal(one.data, other.data) and bool(one.error) == bool(other.error)
                assert list(one.metadata) == list(other.metadata)
        with pytest.raises(UserError, match="memory://bucket/none.jpg matches no file"):
            plan("memory://bucket/none.jpg")
        with pytest.raises(UserError, match="nosuch://x/y cannot be opened"):
            plan("nosuch://x/y")
    finally:
        memory.rm("/bucket", recursive=True)


def test_inputs_that_hold_nothing(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty.txt").write_text("\n\n")
    write_tar(tmp_path / "empty.tar", [])
    for given, words in (("empty", "can be embedded"), ("gone.jpg", "gone.jpg matches no file"),
                         ("*.png", r"\*.png matches no file"), ("empty.txt", "can be embedded"),
                         ("empty.tar", "can be embedded")):
        with pytest.raises(UserError, match=words):
            plan(tmp_path / given)


@pytest.mark.parametrize("library", [True, False])
def test_files_are_read_with_the_library_of_kernels_and_without(tmp_path, monkeypatch, library):
    if library and not kernels.reads_files():
        pytest.skip("the library is not built: python -m clip_ttrt.build_kernels")
    monkeypatch.setattr(kernels, "reads_files", lambda: library)
    names = [f"{number}.jpg" for number in range(100)]
    write(tmp_path, *names)
    write_tar(tmp_path / "a.tar", [(name, name.encode() * 99) for name in names])
    if library:  # Python takes all of it
        os.truncate(tmp_path / "7.jpg", 2**30 + 1)
    (tmp_path / "8.jpg").unlink()
    (tmp_path / "9.jpg").unlink()
    os.mkfifo(tmp_path / "9.jpg")
    os.truncate(tmp_path / "10.jpg", 0)
    (tmp_path / "list.txt").write_text("\n".join(names) + "\n.\n7.jpg/x\nnul\0.jpg\n")
    for last in (103, 102):  # without the NUL, which the library does not take
        [rows] = plan(tmp_path / "list.txt")
        records = list(map(own, rows.read(0, last)))
        wrong = {n: each for n, each in enumerate(records) if each.error}
        large = {7} if library and last == 102 else set()
        assert set(wrong) == {8, 9, *range(100, last)} | large
        assert wrong[8].error == "No such file or directory"
        assert all(each.data is None and each.metadata == {} for each in wrong.values())
        assert [each.data for each in records[:7] + records[10:100]] == [
            b"" if name == "10.jpg" else name.encode() for name in names[:7] + names[10:]]
    [rows] = plan(tmp_path / "a.tar")
    with tarfile.open(tmp_path / "a.tar") as archive:
        os.truncate(archive.name, archive.getmembers()[50].offset_data + 3)
    records = list(map(own, rows.read(0, 100)))
    assert [each.data for each in records[:50]] == [name.encode() * 99 for name in names[:50]]
    assert {each.error for each in records[50:]} == {sources.UNFIT}
