"""Libraries: what is indexed and what is not again, queries against numpy, moments of videos."""
import json
import os
import shutil
import sqlite3
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import searching
import torch
from PIL import Image
from searching import CAPTIONS, PICTURES, VIDEOS, pixels

import clip_ttrt
from clip_ttrt import UserError, cli
from clip_ttrt.artifact import read_artifact
from clip_ttrt.search import Library, index, indexing, library, store
from clip_ttrt.search.library import parse, segments

av = pytest.importorskip("av", reason="needs the extra embed")
pytest.importorskip("pyarrow", reason="needs the extra embed")


@pytest.fixture(scope="module")
def world(demo_artifact, tmp_path_factory):
    files, folder, summary = searching.made_once(tmp_path_factory, demo_artifact.folder)
    return SimpleNamespace(files=files, summary=summary, folder=folder, library=Library(folder))


@pytest.fixture
def encoded(monkeypatch):
    """Appends the size of each batch that an index run encodes."""
    worker = pytest.importorskip("clip_ttrt.pipeline.worker").Worker
    sizes, embed = [], worker.embed
    monkeypatch.setattr(worker, "embed", lambda self, number, rows, *more: (
        sizes.append(len(rows)) or embed(self, number, rows, *more)))
    return sizes


def on_screen(path):
    """The class that is shown at each second, by decoding all frames and looking at each."""
    classes = VIDEOS[path.name][2]
    with av.open(str(path)) as container:
        frames = [(frame.time, frame.to_ndarray(format="rgb24").astype(int))
                  for frame in container.decode(video=0)]
    first, last, found = frames[0][0], frames[-1][0], []
    while len(found) <= last - first:
        shown = [picture for at, picture in frames if at - first <= len(found) + 1e-9][-1]
        found.append(min(classes, key=lambda each: np.abs(shown - pixels()[each]).mean()))
    return found


def test_what_cannot_be_read_is_in_quarantine_and_all_else_is_encoded(world):
    bad = {Path(each["path"]).name: each["reason"] for each in world.summary["quarantine"]}
    assert set(bad) == {"empty.mp4", "broken.webm", "page.jpg"} and all(bad.values())
    assert world.summary["files"] == len(PICTURES) + 1 + len(VIDEOS) + 3
    frames = sum(len(on_screen(world.files / name)) for name in VIDEOS)
    assert world.summary["items"] == world.summary["encoded"] == len(PICTURES) + 1 + frames


@pytest.mark.parametrize("name", VIDEOS)
def test_a_text_finds_the_moments_of_a_video_at_any_frame_rate(world, name):
    shown = on_screen(world.files / name)
    assert len(shown) in (6, 7) and len(set(shown)) == 3
    for number in VIDEOS[name][2]:
        best = world.library.query(CAPTIONS[number])["results"][0]
        assert (Path(best["path"]).name, best["kind"]) == (name, "video")
        moments = [k for k, each in enumerate(shown) if each == number]
        [part] = [each for each in best["segments"] if each["time"] in moments]
        assert best["time"] in moments and part["time"] == best["time"]
        assert (part["start"], part["end"]) == (moments[0], moments[-1] + 1)
        assert best["seconds"] == len(shown)


def brute_force(world, vector):
    """The best cosine of each file that can be read, from pixels, in float64."""
    model, preprocess = clip_ttrt.load(read_artifact(world.library.model.artifact.folder).folder)
    best = {}
    for path in world.files.glob("*.png"):
        feature = model.encode_image(preprocess(Image.open(path))[None])[0].double()
        best[path.name] = float(feature @ vector / feature.norm() / vector.norm())
    return dict(sorted(best.items(), key=lambda each: -each[1]))


@torch.no_grad()
def test_sums_of_texts_and_pictures_are_what_numpy_finds(world, tmp_path, unfolded):
    import clip

    model, preprocess = clip_ttrt.load(world.library.model.artifact.folder)
    picture = tmp_path / "a - b.png"
    shutil.copy(world.files / "27.png", picture)
    one, two = model.encode_text(clip.tokenize(["red circles", "a + b"])).double()
    three = model.encode_image(preprocess(Image.open(picture))[None])[0].double()
    one, two, three = (each / each.norm() for each in (one, two, three))
    copy = world.files / "27.png"
    for query, vector in (("red circles", one), (f'red circles - 0.5*"a + b" + {copy}',
                                                 one - two / 2 + three),
                          (str(picture), three), ("- red circles", -one)):
        found = world.library.query(query, top=100)
        got = {Path(each["path"]).name: each["score"] for each in found["results"]
               if each["kind"] == "picture"}
        expected = brute_force(world, vector)
        assert got == pytest.approx(expected, abs=2e-3) and len(got) == len(PICTURES) + 1
        assert list(got.values()) == sorted(got.values(), reverse=True)
        assert len(found["results"]) == len(PICTURES) + 1 + len(VIDEOS)  # fewer than 100, and all
    assert found["items"] == world.summary["items"]
    item = world.library.query([(1.0, picture.read_bytes())])
    assert item["results"][0]["score"] > 0.999
    found = item["results"][0]["id"]
    assert world.library.query([(2.0, found)])["results"][0]["id"] == found


@pytest.mark.parametrize("query, terms", [
    ("a cat", [(1, "a cat")]), ("a + 0.5*b - c", [(1, "a"), (0.5, "b"), (-1, "c")]),
    ("t-shirt - black-and-white", [(1, "t-shirt"), (-1, "black-and-white")]),
    ('"a + b" - 2 * "c - d"', [(1, "a + b"), (-2, "c - d")]), ("- c", [(-1, "c")]),
    (" C++  +  .5*d ", [(1, "C++"), (0.5, "d")]), ("3 cats", [(1, "3 cats")]),
    ('"x.png" + y', [(1, "x.png"), (1, "y")]), ("a\n+ b", [(1, "a"), (1, "b")]),
    ("", None), ("+", None), ("a +", None), ("a + + b", None), ('"a" b', None), ('"a', None),
    ('""', None), ("a - nowhere.jpg", None), ("nowhere.png", None)])
def test_the_grammar_of_queries(query, terms):
    if terms is None:
        with pytest.raises(UserError):
            parse(query)
    else:
        assert parse(query) == terms


def test_queries_that_cannot_be_are_one_sentence(world, tmp_path, capsys):
    (tmp_path / "a.png").write_bytes(b"no picture")
    for query, words in (("red - red", "cancel"), (" ".join(["red"] * 200), "too long"),
                         (str(tmp_path / "a.png"), "picture 0"), ("a +", "is no query")):
        assert cli.main(["search", "query", str(world.folder), query]) == 2
        told = capsys.readouterr().err
        assert words in told and len(told.splitlines()) == 1
    with pytest.raises(FileNotFoundError, match="no number 999"):
        world.library.query([(1.0, 999)])


def test_the_commands(world, demo_artifact, tmp_path, capsys):
    arguments = ["search", "query", str(world.folder), CAPTIONS[50], "--top", "2"]
    assert cli.main(arguments) == 0
    first, second = capsys.readouterr().out.splitlines()
    assert "ntsc.mp4" in first and first.endswith("3-5 s") and " sd " in second
    assert cli.main([*arguments, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["results"][0]["segments"][0]["start"] == 3

    (tmp_path / "files").mkdir()
    shutil.copy(world.files / "0.png", os.fsencode(tmp_path / "files") + b"/\xe9.png")
    new = ["search", "index", str(tmp_path / "l")]
    for more, words in (([str(tmp_path)], "is no library; clip-ttrt search index with --artifact"),
                        ([str(tmp_path), "--every", "0"], "bad every 0.0")):
        assert cli.main([*new, *more]) == 2 and words in capsys.readouterr().err
        assert not (tmp_path / "l").exists()
    assert cli.main([*new, str(tmp_path), "--artifact", str(demo_artifact.folder)]) == 0
    assert json.loads(capsys.readouterr().out)["encoded"] == 1
    assert cli.main(["search", "query", str(tmp_path / "l"), "a ring"]) == 0
    assert "\\udce9.png" in capsys.readouterr().out
    assert cli.main(["search", "query", str(tmp_path), "a ring"]) == 2
    assert "is no library" in capsys.readouterr().err


def test_only_what_is_new_or_changed_is_encoded(
        world, demo_artifact, tmp_path, encoded, unfolded):
    files, folder = tmp_path / "f", tmp_path / "l"
    (files / "below").mkdir(parents=True)
    for number in PICTURES[:4]:
        shutil.copy(world.files / f"{number}.png", files)
    shutil.copy(world.files / "play.webm", files / "below")
    assert index(folder, [files], demo_artifact.folder)["encoded"] == 4 + 6
    answers, before = Library(folder), index(folder, [files])
    assert before["encoded"] == before["removed"] == 0 and before["items"] == 10
    assert encoded == [4, 6]  # once, and nothing of the second run

    (files / "0.png").unlink()
    (files / "9.png").rename(files / "below" / "nine.png")
    shutil.copy(world.files / "45.png", files / "18.png")
    os.utime(files / "27.png", (1, 1))
    (files / "bad.png").write_bytes(b"not yet")
    after = index(folder, [files])  # 0.png and 9.png left, nine.png came, two have changed
    assert (after["encoded"], after["removed"], after["items"]) == (3, 2, 9)
    assert [Path(each["path"]).name for each in after["quarantine"]] == ["bad.png"]
    found = answers.query(CAPTIONS[45])["results"]  # the open library sees it
    assert [Path(each["path"]).name for each in found][0] == "18.png"
    assert {Path(each["path"]).name for each in found} == {
        "18.png", "27.png", "nine.png", "play.webm"}

    assert index(folder, [files])["quarantine"] == after["quarantine"]
    assert encoded == [4, 6, 4]  # what is in quarantine is not tried again
    shutil.copy(world.files / "54.png", files / "bad.png")
    os.utime(files / "bad.png", ns=(0, 0))
    assert index(folder, [files])["quarantine"] == []
    shutil.copy(world.files / "ntsc.mp4", tmp_path / "f" / "below")
    assert index(folder, [files / "below"], every=0.5)["encoded"] == 12  # the new video alone
    with pytest.raises(FileNotFoundError, match="away"):  # a disk that is not there
        index(folder, [tmp_path / "away"])
    assert len(Library(folder).items) == 10 + 12


KILLED = """
import os, signal, sys
from clip_ttrt.search import index, indexing
from clip_ttrt.search.store import Store
indexing.PICTURES = 8
add, calls = Store.add, []
def killed(*arguments):
    calls.append(1)
    if len(calls) == 3:  # its features are computed, and nothing of it is written
        os.kill(os.getpid(), signal.SIGKILL)
    add(*arguments)
Store.add = killed
index(sys.argv[1], [sys.argv[2]], sys.argv[3])
"""


def test_a_killed_run_goes_on_and_encodes_nothing_twice(
        world, demo_artifact, tmp_path, encoded, monkeypatch):
    arguments = [str(tmp_path / "l"), str(world.files), str(demo_artifact.folder)]
    assert subprocess.run([sys.executable, "-c", KILLED, *arguments]).returncode == -9
    kept = len(store.Store(tmp_path / "l").items())
    assert 8 <= kept < world.summary["items"]
    summary = index(tmp_path / "l", [world.files])
    assert summary["encoded"] == world.summary["items"] - kept and summary["files"] == 19
    whole, parts = (Library(each) for each in (world.folder, tmp_path / "l"))
    for number in (0, 50, 104):
        one, other = (each.query(CAPTIONS[number]) for each in (whole, parts))
        assert [each["score"] for each in one["results"]] == pytest.approx(
            [each["score"] for each in other["results"]], abs=1e-3)


@pytest.mark.slow
def test_processes_share_a_library(world, demo_artifact, tmp_path):
    """Two, as on two GPUs, which write what one does."""
    from clip_ttrt.pipeline.embed import embed

    made = store.Store(tmp_path / "l", create=True)
    indexing.adopt(made, demo_artifact)
    indexing.scan(made, [str(world.files)])
    shards = indexing.plan(made, 1.0, indexing.sources.Rows)
    into = partial(indexing.IntoLibrary, made.folder, shards, tmp_path / "run")
    embed(demo_artifact.folder, shards, into, devices=["cpu", "cpu"])
    assert len(made.quarantine()) == len(world.summary["quarantine"])
    both = world.library, Library(made.folder)
    for query in (CAPTIONS[0], CAPTIONS[50]):
        one, two = (each.query(query)["results"] for each in both)
        assert [each["path"] for each in one] == [each["path"] for each in two]
        assert [each["score"] for each in one] == pytest.approx([each["score"] for each in two],
                                                                abs=1e-3)


def test_a_disk_that_is_full_leaves_the_library_as_it_was(
        world, demo_artifact, tmp_path, monkeypatch):
    for name in ("0.png", "9.png"):
        shutil.copy(world.files / name, tmp_path)
        with monkeypatch.context() as patch:
            patch.setattr(store.Store, "shard", lambda *_: tmp_path / "no" / "space")
            with pytest.raises(OSError):
                index(tmp_path / "l", [tmp_path], demo_artifact.folder)
        summary = index(tmp_path / "l", [tmp_path])
        assert summary["encoded"] == 1 and summary["quarantine"] == []
        assert Library(tmp_path / "l").query(CAPTIONS[int(name[0])])["results"][0]["score"] > 0.2


def test_another_artifact_encodes_all_anew(world, demo_artifact, tmp_path):
    shutil.copy(world.files / "0.png", tmp_path)
    shutil.copytree(demo_artifact.folder, tmp_path / "other")
    manifest = tmp_path / "other" / "manifest.json"
    manifest.write_text(manifest.read_text() + " ")
    index(tmp_path / "l", [tmp_path], demo_artifact.folder)
    with pytest.raises(UserError, match="features of another artifact than"):
        Library(tmp_path / "l", tmp_path / "other")
    asked = Library(tmp_path / "l")
    assert index(tmp_path / "l", [tmp_path], tmp_path / "other")["encoded"] == 1
    assert index(tmp_path / "l", [tmp_path])["encoded"] == 0
    with pytest.raises(UserError, match="features of another artifact than"):
        asked.query("a ring")
    assert Library(tmp_path / "l").query("a ring")["artifact"] == str(tmp_path / "other")


def test_scenes_are_one_frame_each(demo_artifact, tmp_path, monkeypatch):
    from clip_ttrt.pipeline import sources

    path, decoded, at = tmp_path / "f" / "a.mp4", [], sources.Playback.__wrapped__.at
    path.parent.mkdir()
    monkeypatch.setattr(sources.Playback.__wrapped__, "at", lambda self, *frame: decoded.append(
        frame) or at(self, *frame))
    searching.write_video(path, "libx264", 30, (1, 50, 71, 3), turn=1.7)
    assert index(tmp_path / "l", [path.parent], demo_artifact.folder, scenes=True)["encoded"] == 4
    assert len(decoded) == len(set(decoded)) == 14  # frames half a second apart, once
    found = Library(tmp_path / "l")
    for number, cut in zip((1, 50, 71, 3), (0, 1.7, 3.4, 5.1)):
        [best] = found.query(CAPTIONS[number])["results"]
        assert cut <= best["time"] < cut + 0.5 + 1 / 30
        assert best["seconds"] == pytest.approx(6.8, abs=0.5)


class Made(Library):
    """A library of features and no model: a query is a vector."""

    def __init__(self, folder, features, files, times=None):
        """files: of each row its number; times: None for pictures, or of each row its own."""
        self.store = store.Store(folder, create=True)
        self.store.put(width=features.shape[1])
        with self.store.db as db:
            db.executemany("INSERT INTO files (id, path, seconds) VALUES (?, ?, ?)", [
                (each, b"%d" % each, times and float(sum(np.asarray(files) == each)))
                for each in sorted(set(files))])
        if len(files):
            self.store.add([(file, times and times[place], None, None, None)
                            for place, file in enumerate(files)], np.asarray(features, np.float16))
        manifest = {"model": "made", "precision": "fp32"}
        self.model = SimpleNamespace(device=torch.device("cpu"), artifact=SimpleNamespace(
            folder=Path("made"), manifest=manifest, origin=SimpleNamespace(kind="made")))
        self.lock, self.version, self.identity = library.threading.RLock(), None, None

    def encode(self, terms):
        [(_, vector)] = terms
        return torch.from_numpy(vector)


@pytest.fixture
def unfolded(monkeypatch):
    """No pictures are near-duplicates."""
    monkeypatch.setattr(library, "FOLD", 2)


def unit(features):
    return (features / np.linalg.norm(features, axis=-1, keepdims=True)).astype(np.float32)


def test_the_scan_is_exact_over_shards_and_holes(tmp_path, monkeypatch, unfolded):
    for module in (store, library):
        monkeypatch.setattr(module, "SHARD", 1000)
    random = np.random.default_rng(0)
    features, wanted = unit(random.normal(size=(4321, 48))), unit(random.normal(size=48))
    made = Made(tmp_path / "l", features, range(1, 4322))
    with sqlite3.connect(tmp_path / "l" / "library.db") as db:
        db.execute("PRAGMA foreign_keys = ON")
        db.execute("DELETE FROM files WHERE id % 3 = 0")
    scores = features.astype(np.float16).astype(np.float64) @ wanted
    left = [row for row in np.argsort(-scores) if (row + 1) % 3]
    found = made.query([(1.0, wanted)], top=50)
    assert [each["file"] for each in found["results"]] == [row + 1 for row in left[:50]]
    assert [each["score"] for each in found["results"]] == pytest.approx(
        scores[left[:50]], abs=1e-6)
    mean, deviation = scores[left].mean(), scores[left].std()
    for place, each in enumerate(found["results"]):
        assert each["z"] == pytest.approx((scores[left[place]] - mean) / deviation, abs=2e-3)
        assert each["below"] == pytest.approx(1 - (place + 1) / len(left))
    assert sum(found["histogram"]["counts"]) == found["items"] == len(left)


def test_what_counts_as_a_hit_does_not_depend_on_where_a_models_cosines_lie(tmp_path):
    """About 0 of one model, from 0.7 to 0.9 of another: an affine map of the former."""
    random = np.random.default_rng(1)
    features, wanted = unit(random.normal(size=(400, 256))), unit(random.normal(size=256))
    features[120:140] = unit(features[120:140] + 1.2 * wanted)
    features[300:303] = unit(features[300:303] + 0.9 * wanted)
    files, times = np.repeat([1, 2], 200).tolist(), [*map(float, range(200))] * 2
    narrow = np.concatenate([0.4 * features, np.full((400, 1), 0.84 ** 0.5)], 1)
    asked = unit(np.append(0.5 * wanted, 0.75 ** 0.5))
    plain = Made(tmp_path / "a", features, files, times).query([(1.0, wanted)])
    other = Made(tmp_path / "b", unit(narrow), files, times).query([(1.0, asked)])
    assert 0.7 < other["mean"] < 0.9 and abs(plain["mean"]) < 0.1
    [first, second] = plain["results"]
    assert [(each["start"], each["end"]) for each in first["segments"]] == [(120, 140)]
    assert (100, 103) in [(each["start"], each["end"]) for each in second["segments"]]
    for one, two in zip(plain["results"], other["results"]):
        assert one["z"] == pytest.approx(two["z"], rel=0.02) and one["file"] == two["file"]
        assert [(part["start"], part["end"]) for part in one["segments"]] == [
            (part["start"], part["end"]) for part in two["segments"]]
        assert len(one["strip"]) == 100
        assert max(z for _, z in one["strip"]) == pytest.approx(one["z"])


def test_near_duplicates_are_folded_and_a_long_video_hides_nothing(tmp_path, monkeypatch):
    random = np.random.default_rng(2)
    wanted = unit(random.normal(size=32))
    video = unit(wanted + 0.1 * unit(random.normal(size=(3000, 32))))
    apart = unit(wanted + 0.8 * unit(random.normal(size=(3, 32))))
    copies = unit(apart[[1]] + 0.05 * unit(random.normal(size=(2, 32))))
    files = [1] * 3000 + [2, 3, 4, 5, 6]
    made = Made(tmp_path, np.concatenate([video, apart, copies]), files, [*map(float, range(3005))])
    cosine = lambda one, two: float(one @ two)  # noqa: E731
    assert min(cosine(apart[1], each) for each in copies) > 0.98
    found = made.query([(1.0, wanted)], top=4)["results"]
    assert [found[0]["file"], len(found)] == [1, 4]
    groups = {frozenset([each["file"], *(one["file"] for one in each["similar"])])
              for each in found}
    assert groups == {frozenset(each) for each in ({1}, {2}, {3, 5, 6}, {4})}
    monkeypatch.setattr(library, "FOLD", 2)
    assert len(made.query([(1.0, wanted)], top=9)["results"]) == 6


def test_an_empty_library_says_so(tmp_path):
    with pytest.raises(UserError, match="holds nothing yet"):
        Made(tmp_path, np.zeros((0, 8)), []).query([(1.0, np.ones(8, np.float32))])


def test_segments():
    scores, times = np.array([5, 1, 5, 6, 1, 7]), [0, 1, 2.5, 3, 4, 5, 5.5]
    found = segments(scores, times, 5, 5)
    assert [(each["start"], each["end"], each["time"]) for each in found] == [
        (0, 1, 0), (2.5, 4, 3), (5, 5.5, 5)]
    assert segments(scores, times, 5, 2.5)[1]["time"] == 2.5  # whose score was rounded down
    assert segments(scores, times, 8, 5) == []


def test_an_approximate_index_tells_its_recall(tmp_path):
    pytest.importorskip("usearch", reason="needs the extra search")
    random = np.random.default_rng(3)
    features = unit(random.normal(size=(3000, 32)))
    made = Made(tmp_path, features, range(1, 3001))
    wanted = [(1.0, unit(random.normal(size=32)))]
    exact = made.query(wanted)
    recall = made.index()
    assert 0.9 < recall <= 1
    made.version = None
    ours = made.query(wanted)
    assert exact["exact"] and not ours["exact"]
    best = [{each["file"] for each in found["results"]} for found in (exact, ours)]
    assert len(best[0] & best[1]) >= 18 and ours["mean"] == pytest.approx(exact["mean"], abs=0.01)


def test_the_next_run_drops_an_approximate_index(world, demo_artifact, tmp_path):
    pytest.importorskip("usearch", reason="needs the extra search")
    for number in (0, 9, 18):
        shutil.copy(world.files / f"{number}.png", tmp_path)
    first = index(tmp_path / "l", [tmp_path], demo_artifact.folder, approximate=True)
    found = Library(tmp_path / "l")
    assert first["recall"] == 1 and not found.query(CAPTIONS[9])["exact"]
    (tmp_path / "0.png").unlink()
    assert "recall" not in index(tmp_path / "l", [tmp_path])
    best = found.query(CAPTIONS[9])
    assert best["exact"] and Path(best["results"][0]["path"]).name == "9.png"


def million(folder, device, most):
    """1,000,000 x 512, of which rows 5, 500005 ... are the vector of a query: the least ms of ten
    scans, or of more in a minute where something else holds them up."""
    made = Made(folder, np.zeros((0, 512)), [])
    made.model.device = torch.device(device)
    random = torch.Generator().manual_seed(0)
    wanted = torch.randn(512, generator=random)
    wanted /= wanted.norm()
    part = torch.randn(store.SHARD, 512, generator=random)
    part = (part / part.norm(dim=1, keepdim=True)).half()
    for number in range(8):
        part = part[:, torch.randperm(512, generator=random)]
        part[5] = wanted
        shard = np.load(made.store.shard(number, 512), mmap_mode="r+")
        shard[:] = part.numpy()
    with made.store.db as db:
        db.executemany("INSERT INTO files (id, path) VALUES (?, ?)",
                       ((n, str(n)) for n in range(1_000_000)))
        db.executemany("INSERT INTO items (file, id) VALUES (?, ?)",
                       ((n, n) for n in range(1_000_000)))
    made.refresh()
    times, end = [], time.monotonic() + 60
    while len(times) < 10 or min(times) >= most and time.monotonic() < end:
        begun = time.perf_counter()
        pool, scores = made.scan(wanted.to(device), 1000)
        scores[pool[-1]].item()
        times.append((time.perf_counter() - begun) * 1e3)
        time.sleep(0.5 * (len(times) > 10))
    assert set(range(5, 1_000_000, store.SHARD)) <= set(pool.tolist())
    return min(times)


@pytest.mark.slow
def test_a_million_on_the_cpu(tmp_path):
    """On two cores, of which another process may use one."""
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        assert million(tmp_path, "cpu", 150) < 150
    finally:
        torch.set_num_threads(threads)


@pytest.mark.gpu
def test_a_million_on_a_gpu(tmp_path):
    assert million(tmp_path, "cuda", 5) < 5
