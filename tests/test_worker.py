"""A shard through the worker, against pictures encoded one by one."""
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import clip_ttrt
from clip_ttrt.pipeline.decode import Picture
from clip_ttrt.pipeline.worker import KILLED, Worker, read
from clip_ttrt.pipeline.sources import plan

OPTIONS = SimpleNamespace(text=False, decode="cpu", batch=4, dtype="float32", normalize=False,
                          force=False, threads=2)


class Output:
    """Keeps what is written."""
    table = list

    def __init__(self, killers=()):
        self.killers, self.started, self.written = set(killers), [], {}

    def start(self, shard):
        self.started.append(shard)

    def crashed(self, shard):
        return self.killers

    def write(self, shard, features, metadata, bad, about):
        self.written[shard] = features, metadata, bad


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Eleven pictures of many sizes, of which two are none."""
    folder = tmp_path_factory.mktemp("pictures")
    for i in range(11):
        noise = np.random.default_rng(i).integers(0, 256, (40 + 9 * i, 100 - 5 * i, 3), np.uint8)
        Image.fromarray(noise).save(folder / f"{i:02}.jpg")
    for i in (2, 8):
        (folder / f"{i:02}.jpg").write_bytes(b"no picture")
    return sorted(folder.iterdir())


@pytest.fixture(scope="module")
def one_by_one(demo_artifact, files):
    model, preprocess = clip_ttrt.load(demo_artifact.folder)
    good = [path for i, path in enumerate(files) if i not in (2, 8)]
    return torch.cat([model.encode_image(preprocess(Image.open(path))[None].repeat(2, 1, 1, 1))[:1]
                      for path in good]).numpy()


def worker(artifact, out, **options):
    return Worker(artifact.folder, out, SimpleNamespace(**{**vars(OPTIONS), **options}), "cpu")


def shard(files):
    [rows] = plan(list(map(str, files)), False, 100, None, None)
    return rows


@pytest.mark.parametrize("options", [{}, {"decode": "auto"}, {"batch": 8}], ids=str)
def test_features_are_those_of_each_picture_alone(options, demo_artifact, files, one_by_one):
    out = Output()
    result = worker(demo_artifact, out, **options).embed(0, shard(files))()
    features, metadata, bad = out.written[0]
    assert np.abs(features - one_by_one).max() < 1e-4 * np.abs(one_by_one).max()
    assert [row["row"] for row in bad] == [2, 8] and "cannot identify" in bad[0]["error"]
    assert [each["image_path"] for each in metadata] == [
        str(path) for i, path in enumerate(files) if i not in (2, 8)]
    assert (metadata[0]["width"], metadata[0]["height"]) == (100, 40)
    decoded = sum(result["decode"][route] for route in ("gpu", "cpu", "pillow"))
    assert (result["images"], result["bad"], decoded, out.started) == (9, 2, 9, [0])


def test_a_row_that_kills_is_left_out_and_the_others_keep_their_bytes(demo_artifact, files):
    whole, without = Output(), Output(killers=[4])
    for out in (whole, without):
        worker(demo_artifact, out).embed(0, shard(files))()
    expected = np.delete(whole.written[0][0], 3, axis=0)  # row 4 is the fourth good one
    assert np.array_equal(without.written[0][0], expected)
    assert [(each["row"], each["error"]) for each in without.written[0][2]][1] == (4, KILLED)
    assert [each.error for each in read(shard(files), range(3, 6), {4})] == [None, KILLED, None]


def test_a_trial_writes_nothing(demo_artifact, files):
    out = Output()
    result = worker(demo_artifact, out).embed(0, shard(files), only=range(1, 4))()
    assert (result["images"], result["bad"], out.started, out.written) == (2, 1, [], {})


def test_pictures_decoded_twice_are_compared(demo_artifact, files):
    """The second one's exact pixels are those of another picture."""
    out = Output()
    one = worker(demo_artifact, out)
    pixels = [torch.full((60, 60, 3), value, dtype=torch.uint8) for value in (0, 40, 255)]
    pictures = [Picture(each, "gpu", 60, 60, exact=each) for each in pixels]
    for exact, largest in ((pixels[1], 1.0), (pixels[2], 0.999)):
        pictures[1] = pictures[1]._replace(exact=exact)
        one.decoder.parts = lambda items: iter([pictures[:2], pictures[2:]])
        lowest = one.embed(0, shard(files[:3]))()["decode"]["lowest_cosine"]
        assert lowest == pytest.approx(1, abs=1e-6) if largest == 1 else lowest < largest
