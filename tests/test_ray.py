"""The cluster: a local Ray on the CPU, with the driver's worker that embeds nothing."""
import json
import os
import sys

import numpy as np
import pytest
from test_drive import drive_all, features
from test_embed import pictures, written  # noqa: F401  a fixture

from clip_ttrt import cli
from clip_ttrt.errors import UserError
from clip_ttrt.pipeline import ray as cluster

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module", autouse=True)
def local():
    """A local Ray of 2 cores, whose processes find the tests' modules."""
    ray = pytest.importorskip("ray", reason="needs Ray: the extra `ray`")
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR",
             object_store_memory=100 * 2**20,
             runtime_env={"env_vars": {"PYTHONPATH": os.pathsep.join(sys.path)}})
    yield
    ray.shutdown()


def embed_all(folder, words):
    devices, cores = cluster.devices("auto", "cpu", 1)
    assert devices == ["cpu"] * 2 and cores == 2
    out, _, log = drive_all(folder, words, devices, cluster.execute)
    return out, log


def test_actors_share_the_shards_and_one_killed_once_is_started_again(tmp_path):
    out, log = embed_all(tmp_path, [["sleeps"]] * 5 + [["kills once"] * 2, ["sleeps"]])
    assert set(out.done()) == set(range(7))
    assert features(tmp_path) == [[0]] * 5 + [[0, 1], [0]]
    assert len({process for process, _, _ in log}) == 3


def test_rows_that_always_kill_are_found_and_the_rest_embedded(tmp_path):
    out, log = embed_all(tmp_path, [["fine", "kills"]])
    assert features(tmp_path) == [[0]] and out.crashed(0) == {1}
    assert sum(only == "None" for _, _, only in log) == 3  # two died


def test_what_a_worker_raises_stops_the_run_and_loses_nothing(tmp_path):
    with pytest.raises(UserError, match="^an actor failed: row refused$"):
        embed_all(tmp_path, [["fine"], ["refused"]])
    embed_all(tmp_path, [["fine"], ["fine"]])
    assert features(tmp_path) == [[0], [0]]


def test_a_cluster_without_gpus_is_refused(tmp_path):
    with pytest.raises(UserError, match="^the cluster has 2 cores and 0 GPUs, too few"):
        cluster.devices("auto", "cuda", None)


def test_the_command_gives_what_it_gives_without_ray(
        demo_artifact, pictures, tmp_path, capsys):  # noqa: F811
    arguments = ["embed", str(demo_artifact.folder), str(pictures), "--shard-rows", "9",
                 "--threads", "1", "--max-bad", "10%", "--output"]
    assert cli.main([*arguments, str(tmp_path / "here")]) == 0
    capsys.readouterr()
    assert cli.main([*arguments, str(tmp_path / "ray"), "--ray"]) == 0
    told = capsys.readouterr()
    summary = json.loads(told.out)
    assert (summary["images"], summary["bad"], summary["devices"]) == (30, 2, ["cpu", "cpu"])
    assert told.err.count("\n") == 1  # none of Ray's
    here, there = written(tmp_path / "here"), written(tmp_path / "ray")
    assert list(here) == list(there)
    for name in here:
        if name.endswith(".npy"):
            one, other = (np.load(tmp_path / each / name) for each in ("here", "ray"))
            assert np.abs(one.astype(np.float32) - other).max() < 2e-3  # of float16, another CPU's
        else:
            assert here[name] == there[name]
