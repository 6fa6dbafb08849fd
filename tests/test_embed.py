"""The command as a user types it, and what a run of it is: resumed, refused, killed at random."""
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time

import clip
import numpy as np
import pytest
import torch
from PIL import Image
from test_drive import quick  # noqa: F401  processes start at once

import clip_ttrt
from clip_ttrt import cli
from clip_ttrt.demo import scenes
from clip_ttrt.pipeline.embed import Progress, embed
from clip_ttrt.pipeline.output import Output

parquet = pytest.importorskip("pyarrow.parquet", reason="needs the extra embed")


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """30 pictures of the embedded model's world, of several sizes, and 2 that are none."""
    folder = tmp_path_factory.mktemp("pictures")
    drawn = scenes.held_out_set(per_class=1)[0]
    for index in range(30):
        size = [(96, 64), (64, 96), (50, 50)][index % 3]
        scenes.to_image(drawn[index]).resize(size).save(folder / f"{index:02}.png")
    (folder / "07b.jpg").write_bytes(b"<html>not found</html>")
    (folder / "21b.png").write_bytes((folder / "21.png").read_bytes()[:300])
    return folder


def written(output):
    """What must not depend on how often a run was stopped."""
    return {str(path.relative_to(output)): path.read_bytes()
            for folder in ("img_emb", "text_emb", "metadata", "bad")
            for path in sorted((output / folder).glob("*"))}


def test_threads_end_with_a_run(demo_artifact, pictures, tmp_path):
    """A fork after them would else take what they hold into the child, and one can hang there."""
    before, end = {*threading.enumerate()}, time.monotonic() + 10
    embed(demo_artifact.folder, pictures, tmp_path / "o", decode="cpu")
    while left := {each for each in threading.enumerate() if each.name != "tqdm_monitor"} - before:
        assert time.monotonic() < end, left
        time.sleep(0.01)


def test_the_command_embeds_a_folder_and_does_no_more_the_second_time(
        demo_artifact, pictures, tmp_path, capsys):
    arguments = ["embed", str(demo_artifact.folder), str(pictures), "--output", str(tmp_path / "o"),
                 "--shard-rows", "12", "--max-bad", "10%", "--dtype", "float32"]
    assert cli.main(arguments) == 0
    told = capsys.readouterr()
    summary = json.loads(told.out)
    assert summary == json.loads((tmp_path / "o/summary.json").read_text())
    assert [summary[name] for name in ("images", "bad", "shards", "skipped")] == [30, 2, 3, 0]
    assert 0 < summary["images_per_s"] < 1e6 and summary["devices"] == ["cpu"]
    assert told.err.endswith("clip_ttrt: " f"{tmp_path / 'o'} holds 30 features; 2 bad rows\n")

    model, preprocess = clip_ttrt.load(demo_artifact.folder)
    files = sorted(pictures.glob("??.png"))
    with torch.no_grad():
        expected = model.encode_image(torch.stack([preprocess(Image.open(file)) for file in files]))
    expected /= expected.norm(dim=1, keepdim=True)
    found = np.concatenate([np.load(path) for path in sorted((tmp_path / "o/img_emb").iterdir())])
    assert found.dtype == np.float32 and np.abs(found - expected.numpy()).max() < 1e-5
    tables = [parquet.read_table(path) for path in sorted((tmp_path / "o/metadata").iterdir())]
    assert [path for table in tables for path in table["image_path"].to_pylist()] == list(
        map(str, files))

    before = written(tmp_path / "o")
    assert cli.main(arguments[:-4]) == 2 and "another dtype" in capsys.readouterr().err
    assert cli.main(arguments) == 0
    summary = json.loads(capsys.readouterr().out)
    assert [summary[name] for name in ("images", "shards", "skipped", "total_images",
                                       "total_bad")] == [0, 0, 3, 30, 2]
    assert written(tmp_path / "o") == before
    assert cli.main([*arguments, "--max-bad", "1%"]) == 3  # 2 of 32, of the earlier run


def test_bad_rows_are_tried_again(demo_artifact, pictures, tmp_path):
    for file in pictures.glob("0*"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    run = dict(output=tmp_path / "o", shard_rows=4)
    first = embed(demo_artifact.folder, str(tmp_path / "0*"), **run)
    assert (first["images"], first["bad"], first["bad_share"]) == (10, 1, 1 / 11)
    (tmp_path / "07b.jpg").write_bytes((pictures / "07.png").read_bytes())  # no JPEG by its content
    assert embed(demo_artifact.folder, str(tmp_path / "0*"), **run)["shards"] == 0
    again = embed(demo_artifact.folder, str(tmp_path / "0*"), retry_bad=True, **run)
    assert [again[name] for name in ("shards", "images", "total_images", "total_bad")] == [
        1, 3, 11, 0]


def test_texts(demo_artifact, tmp_path):
    texts = scenes.held_out_classes()[:5]
    (tmp_path / "texts.txt").write_text("\n".join(texts))
    summary = embed(demo_artifact.folder, tmp_path / "texts.txt", tmp_path / "o", text=True,
                    normalize=False, dtype="float32")
    model, _ = clip_ttrt.load(demo_artifact.folder)
    with torch.no_grad():
        expected = model.encode_text(clip.tokenize(texts))
    found = np.load(tmp_path / "o/text_emb/text_emb_00000.npy")
    assert summary["images"] == 5 and np.abs(found - expected.numpy()).max() < 1e-5


def test_processes_give_the_same_bytes(demo_artifact, pictures, tmp_path):
    run = dict(shard_rows=8, threads=1)
    two = embed(demo_artifact.folder, pictures, tmp_path / "two", devices=["cpu"] * 2, **run)
    one = embed(demo_artifact.folder, pictures, tmp_path / "one", **run)
    assert [two[name] for name in ("images", "bad", "devices")] == [30, 2, ["cpu", "cpu"]]
    assert two["decode"] == one["decode"] and one["decode"]["pillow"] == 30
    assert written(tmp_path / "two") == written(tmp_path / "one")


@pytest.mark.gpu
def test_a_gpu_is_a_process_of_its_own(demo_engines, pictures, tmp_path):
    summary = embed(demo_engines.folder, pictures, tmp_path / "o", decode="exact", shard_rows=12)
    assert [summary[name] for name in ("images", "bad", "devices")] == [30, 2, ["cuda:0"]]
    model, preprocess = clip_ttrt.load(demo_engines.folder)
    images = [preprocess(Image.open(file)) for file in sorted(pictures.glob("??.png"))]
    with torch.no_grad():
        expected = model.encode_image(torch.stack(images)).cpu().numpy()
    expected /= np.linalg.norm(expected, axis=1, keepdims=True)
    found = [np.load(path) for path in sorted((tmp_path / "o/img_emb").iterdir())]
    assert (np.concatenate(found).astype(np.float32) * expected).sum(1).min() > 0.9999
    with pytest.raises(clip_ttrt.UserError, match="bad --gpus '99': write all, or of 0 to"):
        embed(demo_engines.folder, pictures, tmp_path / "o", gpus="99")


def test_array_jobs_share_a_folder(demo_artifact, pictures, tmp_path):
    whole = embed(demo_artifact.folder, pictures, tmp_path / "whole", shard_rows=8)
    jobs = [embed(demo_artifact.folder, pictures, tmp_path / "o", shard_rows=8, shards=f"{job}/3")
            for job in range(3)]
    assert [job["shards"] for job in jobs] == [2, 1, 1] and whole["shards"] == 4
    assert written(tmp_path / "o") == written(tmp_path / "whole")


@pytest.mark.parametrize("options, sentence", [
    (["--dtype", "int8"], "unknown dtype 'int8'; choices: float16, float32"),
    (["--every", "0"], "bad every 0.0: it must be above 0"),
    (["--shards", "3/3"], "bad --shards '3/3': write I/N, with I from 0 to N-1"),
    (["--shards", "0/3", "--overwrite"], "each job would delete"),
    (["--shard-rows", "0"], "bad shard_rows 0: it must be above 0"),
    (["--batch", "0"], "bad batch 0: it must be above 0"),
])
def test_bad_options_are_one_sentence(options, sentence, demo_artifact, tmp_path, capsys):
    output = tmp_path / "o"
    assert cli.main(["embed", str(demo_artifact.folder), str(tmp_path), "--output", str(output),
                     *options]) == 2
    told = capsys.readouterr().err
    assert told.startswith("clip_ttrt: ") and sentence in told and told.count("\n") == 1
    assert not output.exists()


def test_another_run_is_refused_and_it_is_said_why(demo_artifact, pictures, tmp_path, monkeypatch):
    def refused(sentence, inputs=pictures, artifact=demo_artifact.folder):
        with pytest.raises(clip_ttrt.UserError, match=sentence):
            embed(artifact, inputs, tmp_path / "o", shards="0/2")

    refused("not an artifact", artifact=tmp_path)
    refused("nowhere", inputs="nowhere")
    embed(demo_artifact.folder, pictures, tmp_path / "o", shards="0/2")
    before = written(tmp_path / "o")
    with monkeypatch.context() as patch:
        patch.setattr("PIL.__version__", "10.0")
        refused("another Pillow")
    (tmp_path / "list.txt").write_text("\n".join(map(str, sorted(pictures.iterdir())[1:])))
    refused("another input list", inputs=tmp_path / "list.txt")
    (tmp_path / "a").symlink_to(demo_artifact.folder)
    embed(tmp_path / "a", pictures, tmp_path / "o", shards="0/2")  # the same one
    compiled = clip_ttrt.compile(batch="2:4:8", backend="torchscript", verify=False, seed=1,
                                 output=tmp_path / "other")
    refused("another artifact", artifact=compiled.folder)
    assert written(tmp_path / "o") == before


def test_ctrl_c_and_sigterm_say_how_to_go_on(
        demo_artifact, pictures, tmp_path, monkeypatch, capsys):
    done, stop = 1, signal.SIGTERM

    def start(output, shard):
        if shard == done:
            os.kill(os.getpid(), stop)
            time.sleep(5)  # in which the signal comes

    monkeypatch.setattr(Output, "start", start)
    arguments = ["embed", str(demo_artifact.folder), str(pictures), "--output", str(tmp_path / "o"),
                 "--shard-rows", "8"]
    # A shell ignores SIGINT in what it starts in the background, such as these tests.
    ignored = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        for done, stop in enumerate((signal.SIGTERM, signal.SIGINT), 1):
            before = signal.getsignal(signal.SIGTERM)
            assert cli.main(arguments) == 2 and signal.getsignal(signal.SIGTERM) is before
            assert capsys.readouterr().err.splitlines()[-1] == (
                f"clip_ttrt: interrupted; {done} of 4 shards are done, and the same command goes "
                "on")
    finally:
        signal.signal(signal.SIGINT, ignored)


def be_killed(output, times, *arguments):
    """Embed into a folder in processes forked from this one, that many of which are killed, each
    a moment after it has started or written a shard or two; the next one finishes."""
    out, rng = Output(output, "image", 0), random.Random(0)
    for kill in range(times + 1):
        before, more = len(out.listed("done")), rng.choice((0, 1, 1, 2))
        process = os.fork()
        if not process:
            torch.set_num_threads(1)
            embed(*arguments, output, shard_rows=6, threads=1)
            os._exit(0)
        while kill < times and len(out.listed("done")) < before + more:
            time.sleep(0.001)
        if kill < times:
            time.sleep(rng.uniform(0, 0.05 if more else 0.4))
            os.kill(process, signal.SIGKILL)
        assert os.waitpid(process, 0)[1] == (signal.SIGKILL if kill < times else 0)


SCRIPT = """
import sys, pyarrow, test_embed, clip_ttrt.pipeline.worker
pyarrow.array([1])  # imports pandas, where it is
for times in (0, 30):
    test_embed.be_killed(f"{sys.argv[1]}/{times}", times, sys.argv[2], sys.argv[3:])
"""


@pytest.mark.slow
def test_killed_30_times_at_random_gives_the_same_bytes(demo_artifact, pictures, tmp_path):
    """Forked from a process of its own, which has imported everything and started no thread."""
    subprocess.run([sys.executable, "-c", SCRIPT, tmp_path, demo_artifact.folder,
                    *[pictures] * 12], check=True, timeout=120, stderr=subprocess.DEVNULL,
                   env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)})
    whole = written(tmp_path / "0")
    assert len(whole) == 64 * 2 + 24 and written(tmp_path / "30") == whole
    assert not (tmp_path / "30/crashed").exists()


def test_progress_tells_the_rate_and_what_is_waited_for(capsys):
    progress = Progress(1000)
    progress.bar.mininterval = 0
    progress.bar.update(100)
    for result in ({"images": 300, "bad": 0, "stages": {"read": 0.5},
                    "decode": {"gpu": 200, "cpu": 100, "redecoded": 1, "largest_distance": 1,
                               "lowest_cosine": 0.99, "problem": "no engine"}},
                   {"images": 100, "bad": 2, "stages": {"read": 0.25, "decode": 1},
                    "decode": {"gpu": 100, "cpu": 0, "redecoded": 0, "largest_distance": 0,
                               "lowest_cosine": None, "problem": "no engine"}}):
        progress.count(result)
    progress.bar.refresh()
    told = capsys.readouterr().err
    line = told.split("\r")[-1]
    assert "| 402/1000 [" in line and " images/s, gpu 75%, cpu 25%, waits for decode]" in line
    assert told.count("no JPEG is decoded on the GPU: no engine\n") == 1
    assert progress.stages == {"read": 0.75, "decode": 1}
    assert progress.decode == {"gpu": 300, "cpu": 100, "redecoded": 1, "largest_distance": 1,
                               "lowest_cosine": 0.99, "problem": "no engine"}


def test_seconds_and_shares_of_the_command_line():
    assert [cli.number(text) for text in ("0.5s", "2", "2%", "0.02")] == [0.5, 2, 0.02, 0.02]
