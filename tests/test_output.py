"""The folder that `embed` writes: read by embedding-reader, whole or not at all, the same bytes."""
import hashlib
import json
import os
import pickle
import subprocess
import sys
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pyarrow.parquet as parquet
import pytest

from clip_ttrt.errors import UserError
from clip_ttrt.pipeline.output import Output

RUN = {"artifact": "a1", "input list": "i1", "dtype": "float16", "Pillow": "12.0",
       "order": "vertical", "torch": "2.11"}


def begun(root, kind="image", shards=3, **run):
    output = Output(root, kind, shards)
    output.begin({**RUN, **run})
    return output


def features(rows, seed=0, dtype=np.float16):
    return np.random.default_rng(seed).standard_normal((rows, 8)).astype(dtype)


def about(rows, start=0):
    return [{"image_path": f"{start + row}.jpg", "width": row} for row in range(rows)]


def files(root):
    return {path.relative_to(root).as_posix(): path.read_bytes()
            for path in sorted(root.rglob("*")) if path.is_file()}


def starts(root):
    """How often each of three shards was begun since it was written."""
    names = [path.name for path in (root / "started").iterdir()]
    return [sum(name.startswith(f"0000{shard}.") for name in names) for shard in range(3)]


def test_a_shard_reads_back_and_its_hashes_hold(tmp_path):
    output, wanted = begun(tmp_path, shards=3), features(4)
    assert not output.done()
    output.write(2, wanted, about(4), [{"key": "x", "reason": "no picture"}], {"seconds": 1.5})
    names = sorted(files(tmp_path))
    assert names == ["bad/bad_00002.parquet", "done/00002.json", "img_emb/img_emb_00002.npy",
                     "metadata/metadata_00002.parquet", "run.json"]
    assert np.array_equal(np.load(tmp_path / names[2]), wanted)
    assert parquet.read_table(tmp_path / names[3]).to_pylist() == about(4)
    assert parquet.read_table(tmp_path / names[0]).to_pylist() == [
        {"key": "x", "reason": "no picture"}]
    done = json.loads((tmp_path / names[1]).read_text())
    assert (done["rows"], done["bad"], done["seconds"]) == (4, 1, 1.5)
    for name in (names[0], names[2], names[3]):
        data = (tmp_path / name).read_bytes()
        assert done["files"][name] == {"sha256": hashlib.sha256(data).hexdigest(),
                                       "size": len(data)}
    assert output.done() == pickle.loads(pickle.dumps(output)).done() == {2: done}


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_embedding_reader_reads_it_with_a_shard_that_is_all_bad(tmp_path, dtype):
    """Shard 10 of 12 comes after 9 only by its zeros; the rows of all sit beside their metadata."""
    reader = pytest.importorskip("embedding_reader")
    output, parts = begun(tmp_path, shards=12), []
    for shard in (3, 10, 0, 9, 5):
        rows = 0 if shard == 5 else shard + 1
        parts.append((shard, features(rows, shard, dtype)))
        output.write(shard, parts[-1][1], about(rows, 100 * shard),
                     about(0 if rows else 2), {})
    wanted = np.concatenate([part for _, part in sorted(parts, key=lambda each: each[0])])
    paths = [f"{100 * shard + row}.jpg" for shard, part in sorted(parts, key=lambda each: each[0])
             for row in range(len(part))]
    assert set(output.done()) == {0, 3, 5, 9, 10}
    folder = str(tmp_path / "img_emb")
    plain = reader.EmbeddingReader(folder, file_format="npy")
    both = reader.EmbeddingReader(folder, file_format="parquet_npy", meta_columns=["image_path"],
                                  metadata_folder=str(tmp_path / "metadata"))
    for each in (plain, both):
        batches = list(each(batch_size=7, show_progress=False))
        assert np.array_equal(np.concatenate([batch for batch, _ in batches]), wanted)
    assert [path for _, meta in batches for path in meta["image_path"]] == paths


def test_texts_have_a_folder_of_their_own_and_many_shards_more_digits(tmp_path):
    output = begun(tmp_path, "text", 1_000_000)
    output.write(12, features(1), [{"caption": "a cat"}], [], {})
    assert {"text_emb/text_emb_0000012.npy", "metadata/metadata_0000012.parquet",
            "done/0000012.json"} < set(files(tmp_path))
    assert not (tmp_path / "bad").exists()


def test_columns_are_the_union_of_keys_and_mixed_ones_become_strings(tmp_path):
    rows = [{"image_path": os.fsdecode(b"caf\xe9.jpg"), "n": 1, "mixed": 1, "f": 1,
             "half": True},
            {"image_path": "b.jpg", "caption": "zwei", "mixed": "two", "f": 0.5,
             os.fsdecode(b"\xe9"): True, "half": 0.5},
            {"image_path": "c.jpg", "n": None, "huge": 2**70, "none": None, "mixed": False}]
    begun(tmp_path).write(0, features(3), rows, [], {})
    table = parquet.read_table(tmp_path / "metadata/metadata_00000.parquet")
    assert {name: str(table.schema.field(name).type) for name in table.column_names} == {
        "image_path": "string", "n": "int64", "mixed": "string", "f": "double",
        "half": "string", "caption": "string", r"\udce9": "bool", "huge": "string",
        "none": "string"}
    assert table.column_names == ["image_path", "n", "mixed", "f", "half", "caption", r"\udce9",
                                  "huge", "none"]
    assert table.to_pylist() == [
        {"image_path": r"caf\udce9.jpg", "n": 1, "mixed": "1", "f": 1.0, "half": "True",
         "caption": None, r"\udce9": None, "huge": None, "none": None},
        {"image_path": "b.jpg", "n": None, "mixed": "two", "f": 0.5, "half": "0.5",
         "caption": "zwei", r"\udce9": True, "huge": None, "none": None},
        {"image_path": "c.jpg", "n": None, "mixed": "False", "f": None, "half": None,
         "caption": None, r"\udce9": None, "huge": str(2**70), "none": None}]


def test_equal_rows_give_equal_bytes_in_another_process(tmp_path):
    code = ("import sys, numpy as np; sys.path[:0] = sys.argv[2:]\n"
            "from tests.test_output import begun, features, about\n"
            "begun(sys.argv[1]).write(1, features(500), about(500), about(3), {'seconds': 2})")
    subprocess.run([sys.executable, "-c", code, tmp_path / "a", Path(__file__).parents[1]],
                   check=True, env={**os.environ, "PYTHONHASHSEED": "7"})
    begun(tmp_path / "b").write(1, features(500), about(500), about(3), {"seconds": 1})
    one, other = files(tmp_path / "a"), files(tmp_path / "b")
    assert {name for name in {**one, **other} if one.get(name) != other.get(name)} == {
        "done/00001.json"}


@pytest.mark.parametrize("fails_at", range(4))
def test_a_write_that_fails_leaves_nothing_that_a_glob_sees(tmp_path, monkeypatch, fails_at):
    """Each of the four files' renames in turn; what came before it is no shard without done/."""
    output, replace, calls = begun(tmp_path), os.replace, []

    def failing(source, target):
        calls.append(target)
        if len(calls) > fails_at:
            raise OSError(28, "No space left on device")
        replace(source, target)

    monkeypatch.setattr(os, "replace", failing)
    with pytest.raises(OSError, match="No space"):
        output.write(0, features(4), about(4), about(1), {})
    assert len(list(tmp_path.rglob("*.npy")) + list(tmp_path.rglob("*.parquet"))) == fails_at
    assert not output.done()
    monkeypatch.undo()
    output.write(0, features(4), about(4), [], {})
    assert set(output.done()) == {0} and "bad/bad_00000.parquet" not in files(tmp_path)


def test_what_a_killed_write_left_goes_once_its_shard_is_written(tmp_path, monkeypatch):
    output = begun(tmp_path)
    for shard in (0, 1):
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(os, "replace", Mock(side_effect=KeyboardInterrupt))
            output.write(shard, features(1), about(1), [], {})
    half = sorted((tmp_path / "started").iterdir())
    assert len(half) == 2 and not list(tmp_path.rglob("*.npy"))
    output.write(0, features(1), about(1), [], {})
    assert list((tmp_path / "started").iterdir()) == half[1:]


def test_a_done_shard_counts_only_with_all_its_files(tmp_path):
    output = begun(tmp_path)
    for shard in range(3):
        output.write(shard, features(2), about(2), about(1), {})
    (tmp_path / "img_emb/img_emb_00000.npy").write_bytes(b"short")
    (tmp_path / "bad/bad_00002.parquet").unlink()
    assert set(output.done()) == {1}


@pytest.mark.parametrize("change, words", [
    ({"artifact": "a2"}, "another artifact (was a1, is now a2)"),
    ({"input list": "i2"}, "another input list (was i1, is now i2)"),
    ({"Pillow": "13.0", "dtype": "float32"}, "dtype (was float16, is now float32)"),
    ({"Pillow": "13.0"}, "another Pillow (was 12.0, is now 13.0)"),
    ({"torch": "2.14"}, "another torch (was 2.11, is now 2.14)"),
    ({"more": 1}, "another more (was None, is now 1)")])
def test_begin_refuses_another_run_and_says_in_what(tmp_path, change, words):
    begun(tmp_path).write(0, features(1), about(1), [], {})
    before = files(tmp_path)
    begun(tmp_path)
    with pytest.raises(UserError, match="--overwrite") as refused:
        begun(tmp_path, **change)
    assert words in str(refused.value) and files(tmp_path) == before
    with pytest.raises(UserError, match="another kind of input"):
        begun(tmp_path, "text")


def test_begin_refuses_a_folder_of_something_else_and_overwrites_only_its_own(tmp_path):
    (tmp_path / "thesis.tex").write_text("years")
    for overwrite in (False, True):
        with pytest.raises(UserError, match="files of something else"):
            Output(tmp_path, "image", 3).begin(RUN, overwrite)
    output = begun(tmp_path / "out", shards=3)
    output.write(0, features(1), about(1), about(1), {})
    output.start(1)
    output.mark_crashed(1, 0)
    (tmp_path / "out/notes.txt").write_text("mine")
    output.begin({**RUN, "dtype": "float32"}, overwrite=True)
    assert set(files(tmp_path / "out")) == {"run.json", "notes.txt"}
    assert json.loads((tmp_path / "out/run.json").read_text())["dtype"] == "float32"
    assert not output.crashed(1) and not output.done()


def test_starts_crashes_and_bad_shards_that_run_again(tmp_path):
    output = begun(tmp_path)
    for shard in (1, 1, 2):
        output.start(shard)
    assert starts(tmp_path) == [0, 2, 1]
    output.mark_crashed(1, 7)
    output.mark_crashed(1, 3)
    assert output.crashed(1) == {3, 7} and output.crashed(0) == set()
    output.write(1, features(1), about(1), about(1), {})
    output.write(0, features(1), about(1), [], {})
    assert starts(tmp_path) == [0, 0, 1]
    before = files(tmp_path)
    output.retry()
    assert set(output.done()) == {0}
    output.retry()
    assert set(before) - set(files(tmp_path)) == {"done/00001.json"}


def test_an_object_store_gets_the_same_files(tmp_path):
    fsspec = pytest.importorskip("fsspec")
    remote, local = begun("memory://bucket/out"), begun(tmp_path)
    for output in (remote, local):
        output.start(0)
        output.mark_crashed(2, 1)
        output.write(0, features(3), about(3), about(1), {"seconds": 1})
        assert set(output.done()) == {0} and output.crashed(2) == {1}
    system = fsspec.filesystem("memory")
    stored = {path.removeprefix("/bucket/out/"): system.cat_file(path)
              for path in system.find("/bucket/out")}
    assert stored == files(tmp_path)
    with pytest.raises(UserError, match="another artifact"):
        begun("memory://bucket/out", artifact="a2")
    remote.begin({**RUN, "artifact": "a2"}, overwrite=True)
    assert system.find("/bucket/out") == ["/bucket/out/run.json"]
    system.rm("/bucket", recursive=True)
