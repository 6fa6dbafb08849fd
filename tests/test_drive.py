"""The driver: deaths of processes, halving, several processes; its worker embeds nothing."""
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from clip_ttrt.errors import UserError
from clip_ttrt.pipeline import drive
from clip_ttrt.pipeline.embed import Progress
from clip_ttrt.pipeline.output import Output


@pytest.fixture(autouse=True)
def quick(request, monkeypatch):
    """Processes forked from one that has imported torch: the same pipes, and quick.  A forked one
    cannot use a GPU."""
    if request.node.get_closest_marker("gpu") is None:
        processes = multiprocessing.get_context("forkserver")
        processes.set_forkserver_preload(["clip_ttrt.pipeline.embed"])
        monkeypatch.setattr(drive, "PROCESSES", processes)


class Rows(list):
    """Rows that say what becomes of their process: "fine", or what `Worker.embed` looks for."""


class Worker:
    """Writes the indices of a shard's rows; some rows kill it, raise, or are slow."""

    def __init__(self, out, log, device):
        self.out, self.log, self.progress = out, Path(log), lambda images: None
        if device == "broken":
            os._exit(7)

    def embed(self, number, rows, only=None):
        if only is None:
            self.out.start(number)
        crashed = self.out.crashed(number)
        with self.log.open("a") as log:
            log.write(f"{os.getpid()} {number} {only and (only.start, only.stop)}\n")
        for row in only or range(len(rows)):
            if row in crashed:
                continue
            if rows[row] == "kills":
                os.kill(os.getpid(), signal.SIGKILL)
            flag = self.log.with_suffix(f".{number}")
            if rows[row] == "kills once" and not flag.exists():
                flag.touch()
                os.kill(os.getpid(), signal.SIGKILL)
            if rows[row] == "kills with all" and only is None:
                os._exit(1)
            if rows[row] == "sleeps":
                time.sleep(0.2)
            while rows[row] == "waits" and not self.out.done():
                time.sleep(0.01)
            if rows[row] == "refused":
                raise UserError("row refused")
            if rows[row] == "fails":
                raise RuntimeError("CUDA error: an illegal memory access")
        good = [row for row in range(len(rows)) if row not in crashed]
        self.progress(1)
        return partial(self.finish, number, good, sorted(crashed), "slow to write" in rows, only)

    def finish(self, number, good, crashed, slowly, only):
        time.sleep(0.3 * slowly)
        if only is None:
            self.out.write(number, np.array(good, np.float16)[:, None],
                           [{"key": row} for row in good], [{"key": row} for row in crashed], {})
        return {"images": len(good), "bad": len(crashed), "stages": {}, "decode": {}}


def drive_all(folder, shards, devices, execute=drive.execute):
    """Run the fake worker over shards (lists of words); returns the output, progress and log:
    of each attempt the process, the shard and the rows."""
    out = Output(str(folder / "out"), "image", len(shards))
    out.begin({"artifact": "fake"})
    progress, log = Progress(sum(map(len, shards))), folder / "log"
    execute = partial(execute, make_worker=partial(Worker, out, str(log)), devices=devices,
                      progress=progress)
    try:
        drive.run([Rows(each) for each in shards], sorted({*range(len(shards))} - {*out.done()}),
                  execute, out, progress)
    finally:
        progress.bar.close()
    return out, progress, [line.split(" ", 2) for line in log.read_text().splitlines()]


def features(folder):
    return [np.load(path)[:, 0].astype(int).tolist()
            for path in sorted(folder.glob("out/img_emb/*.npy"))]


def test_one_cpu_is_this_process(tmp_path):
    out, progress, log = drive_all(tmp_path, [["fine"] * 3, ["fine"] * 2], ["cpu"])
    assert log == [[str(os.getpid()), "0", "None"], [str(os.getpid()), "1", "None"]]
    assert features(tmp_path) == [[0, 1, 2], [0, 1]] and set(out.done()) == {0, 1}
    assert progress.rows == progress.bar.n == 5


def test_processes_share_the_shards_and_take_over_those_of_the_dead(tmp_path):
    shards = [["kills once"] * 2] + [["sleeps"] * 2] * 7
    out, progress, log = drive_all(tmp_path, shards, ["cpu:0", "cpu:1"])
    assert set(out.done()) == set(range(8)) and progress.rows == 16
    assert set(progress.ready_at) == {"cpu:0", "cpu:1"}  # each once, whoever took over
    processes = [process for process, _, _ in log]
    assert str(os.getpid()) not in processes
    first, second = [process for process, number, _ in log if number == "0"]
    assert first != second and len(log) == 9  # none but the dead one's
    assert len(set(processes[:8])) == 3  # the dead one's device goes on


def test_rows_that_kill_are_found_and_the_rest_embedded(tmp_path, capsys):
    words = ["fine"] * 5
    words[1] = words[4] = "kills"
    out, progress, log = drive_all(tmp_path, [["fine"], words, ["kills"]], ["cpu", "cpu"])
    assert features(tmp_path) == [[0], [0, 2, 3]]
    assert out.crashed(1) == {1, 4} and out.crashed(2) == {0} and not out.crashed(0)
    assert progress.rows == progress.bar.n == 7
    assert re.search(r"process of cpu ended with exit code -9; what", capsys.readouterr().err)


def test_a_shard_that_is_being_written_is_not_blamed_for_the_next_one(tmp_path):
    out, _, log = drive_all(tmp_path, [["slow to write"], ["fine", "kills"]], ["device"])
    assert features(tmp_path) == [[0], [0]] and not out.crashed(0) and out.crashed(1) == {1}


def test_a_search_goes_on_where_a_run_was_stopped(tmp_path):
    """Starts are counted in the output: the first runs here are two that were killed."""
    shards = [["fine"] * 3 + ["kills"]]
    out = Output(str(tmp_path / "out"), "image", 1)
    out.begin({"artifact": "fake"})
    for _ in range(2):
        out.start(0)
    out, _, log = drive_all(tmp_path, shards, ["cpu"])
    assert log[0][2] == "(0, 2)"
    assert [process == str(os.getpid()) for process, _, _ in log] == [only == "None"
                                                                     for _, _, only in log]
    assert features(tmp_path) == [[0, 1, 2]] and out.crashed(0) == {3}


@pytest.mark.parametrize("word, sentence", [
    ("refused", "^the process of cpu failed: row refused$"),
    ("fails", "^the process of cpu failed: RuntimeError: CUDA error: an illegal memory access$"),
    ("kills with all", "^shard 1 ended its process in 3 rounds, and none of its rows does alone")])
def test_what_stops_a_run_is_one_sentence_and_loses_nothing(word, sentence, tmp_path):
    with pytest.raises(UserError, match=sentence):
        drive_all(tmp_path, [["fine"], ["waits", word]], ["cpu", "cpu"])
    assert features(tmp_path) == [[0]]
    drive_all(tmp_path, [["fine"], ["fine", "fine"]], ["cpu"])
    assert features(tmp_path) == [[0], [0, 1]]


def test_a_process_that_never_starts_ends_the_run(tmp_path):
    with pytest.raises(UserError, match="^the process of broken ended with exit code 7 before it"):
        drive_all(tmp_path, [["fine"]], ["broken"])


def test_halves_find_every_row_that_kills_and_only_those():
    for count in range(1, 18):
        for killers in [set(), {0}, {count - 1}, {count // 2, count // 3}, set(range(count))]:
            tried = []

            def execute(tasks):
                [(_, _, only)] = tasks
                tried.append(only)
                return [] if killers & set(only) else [{"images": 1}]

            assert set(drive.killers(0, None, range(count), execute)) == killers
            assert len(tried) <= 2 * max(1, len(killers)) * count.bit_length()


SCRIPT = """import sys, pathlib, test_drive
if __name__ == "__main__":
    shards = [["sleeps"] * 500] * 2
    test_drive.drive_all(pathlib.Path(sys.argv[1]), shards, ["cpu", "cpu"])
"""


@pytest.mark.slow
@pytest.mark.parametrize("stop", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_processes_end_with_their_parent(stop, tmp_path):
    """With processes as they are, spawned by a script of a user's."""
    script, log, deadline = tmp_path / "script.py", tmp_path / "log", time.time() + 60
    script.write_text(SCRIPT)
    parent = subprocess.Popen(["env", "--default-signal=INT", sys.executable, script, tmp_path],
                              env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)})
    while not (log.exists() and log.read_text().count("\n") == 2):
        assert parent.poll() is None and time.time() < deadline
        time.sleep(0.05)
    children = [Path("/proc", line.split()[0]) for line in log.read_text().splitlines()]
    assert all(child.exists() for child in children)
    parent.send_signal(stop)
    parent.wait(10)
    while any(child.exists() for child in children):
        assert time.time() < deadline
        time.sleep(0.05)
