"""Zero-shot classification: ZeroShot beside the original model, and the command on many files."""
import csv
import gc
import io
import json
import os
import sys
import threading
from collections import OrderedDict
from types import SimpleNamespace

import clip
import numpy as np
import pytest
import torch
from PIL import Image

import clip_ttrt
from clip_ttrt import ZeroShot, cli, contexts, zeroshot
from clip_ttrt.checkpoint import load_checkpoint, original_with_weights
from clip_ttrt.demo import scenes
from clip_ttrt.options import BatchRange

pytest.importorskip("pyarrow.parquet", reason="needs the extra embed")
LABELS = scenes.held_out_classes()[::8]
TEMPLATES = ["{}", "a picture of {}", "{} on a white background"]


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """The user's, empty."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache/clip_ttrt/zeroshot"


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """A scene of each label, two that are no pictures, and a list of some in another folder."""
    folder = tmp_path_factory.mktemp("classify") / "scenes"
    folder.mkdir()
    for index, drawn in enumerate(scenes.held_out_set(per_class=1)[0][::8]):
        scenes.to_image(drawn).save(folder / f"{index:02}.png")
    (folder / "03b.jpg").write_bytes(b"<html>not found</html>")
    (folder / "15b.png").write_bytes((folder / "15.png").read_bytes()[:200])
    (folder.parent / "list.txt").write_text("scenes/05.png\nscenes/nowhere.png\n")
    return folder


@pytest.fixture(scope="module")
def model(demo_artifact):
    return clip_ttrt.load(demo_artifact.folder)


@pytest.fixture(scope="module")
def expected(pictures):
    """By templates, logits float64 [16, 16] of the original model, every step written out."""
    original = original_with_weights(load_checkpoint("demo"), "cpu")
    preprocess = clip.clip._transform(112)
    files = sorted(pictures.glob("??.png"))

    def logits(templates):
        with torch.no_grad():
            images = original.encode_image(torch.stack([preprocess(Image.open(file))
                                                        for file in files])).double().numpy()
            rows = []
            for label in LABELS:
                mean = np.zeros(images.shape[1])
                for template in templates:
                    text = template.format(label)
                    one = original.encode_text(clip.tokenize([text]))[0].double().numpy()
                    mean += one / np.sqrt((one ** 2).sum()) / len(templates)
                rows.append(mean / np.sqrt((mean ** 2).sum()))
            images = images / np.sqrt((images ** 2).sum(1, keepdims=True))
            return original.logit_scale.exp().item() * images @ np.array(rows).T
    return logits


def classified(artifact, *arguments, labels=LABELS, code=0):
    """What the command prints; arguments before labels are inputs."""
    inputs = [str(each) for each in arguments if not str(each).startswith("--")]
    options = [str(each) for each in arguments if str(each).startswith("--")]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.stdout", out := io.StringIO())
        assert cli.main(["classify", str(artifact.folder), *inputs, "--labels", *labels,
                         *options]) == code
    return out.getvalue()


def test_it_is_what_the_original_model_computes(model, pictures, expected):
    files, (model, preprocess) = sorted(pictures.glob("??.png")), model
    images = torch.stack([preprocess(Image.open(file)) for file in files])
    for templates in (None, TEMPLATES):
        zero_shot = ZeroShot(model, LABELS, templates)
        wanted = torch.tensor(expected(templates or ["{}"]))
        assert zero_shot.head.scale == pytest.approx(model.logit_scale.exp().item())
        for given in (images, list(map(str, files))):
            logits, probabilities = zero_shot.logits(given), zero_shot(given)
            assert logits.dtype == probabilities.dtype == torch.float32
            # fp16's features on the CPU are fp32's: what differs are sums' orders, by 1e-6 of 100.
            assert (logits - wanted).abs().max() < 2e-3
            assert (probabilities - wanted.softmax(1)).abs().max() < 2e-3
        assert (probabilities.argmax(1) == torch.arange(16)).float().mean() > 0.9
        assert zero_shot(images[:0]).shape == (0, 16)
    one, three = (expected(each).argsort(1)[:, :-1] for each in (["{}"], TEMPLATES))
    assert (one != three).any()  # the templates make a difference


def test_independent_scores(model, pictures, expected, monkeypatch):
    """Cosine similarities; sigmoids where the model was trained with a logit bias."""
    files, (model, _) = sorted(map(str, pictures.glob("??.png"))), model
    logits, scale = torch.tensor(expected(["{}"])), model.logit_scale.exp().item()
    found = ZeroShot(model, LABELS, multi=True)(files)
    assert (found - logits / scale).abs().max() < 1e-5
    monkeypatch.setitem(model.artifact.manifest, "logit_bias", -12.5)
    biased = ZeroShot(model, LABELS, multi=True)
    assert (biased(files) - (logits - 12.5).sigmoid()).abs().max() < 1e-3
    assert (biased.logits(files) - logits + 12.5).abs().max() < 2e-3


def test_text_features_come_from_the_cache_where_nothing_changed(model, cache, monkeypatch):
    (model, _), calls = model, []
    encode = model.encode_text
    monkeypatch.setattr(model, "encode_text", lambda x: calls.append(len(x)) or encode(x))

    def weight(labels=LABELS, templates=TEMPLATES):
        return ZeroShot(model, labels, templates).head.weight

    first = weight()
    assert torch.equal(weight(), first) and calls == [48] and len(list(cache.iterdir())) == 1
    weight(LABELS[::-1])
    weight(templates=TEMPLATES[:2])
    with monkeypatch.context() as patch:
        patch.setitem(model.artifact.manifest["modules"]["text"], "sha256", "of another")
        weight()
    assert calls == [48, 48, 32, 48] and len(list(cache.iterdir())) == 4
    for damage in (lambda data: data[:200], lambda data: b"", lambda data: b"text" * 100):
        for file in cache.iterdir():
            file.write_bytes(damage(file.read_bytes()))
        assert torch.equal(weight(), first)
    assert calls[4:] == [48] * 3
    file, calls[:] = next(cache.iterdir()).parent, []
    for each in file.iterdir():
        each.unlink()
    file.rmdir()
    file.write_bytes(b"no folder")  # it cannot be written
    assert torch.equal(weight(), first) and calls == [48]


def test_many_pictures_and_bad_ones_among_them(demo_artifact, pictures, expected, capsys):
    rows = [json.loads(line) for line in classified(
        demo_artifact, pictures, pictures.parent / "list.txt", "--json", "--top=3").splitlines()]
    names = [str(path) for path in sorted(pictures.iterdir())]
    names += [f"{pictures.parent}/scenes/{name}.png" for name in ("05", "nowhere")]
    assert [row["image_path"] for row in rows] == names
    inputs = [str(pictures), f"{pictures.parent}/list.txt"]
    for row, other in zip(rows, zeroshot.classify(demo_artifact.folder, inputs, LABELS, top=3,
                                                  shard_rows=4), strict=True):
        both = [[each["label"] for each in one.get("labels", ())] for one in (row, other)]
        assert row["image_path"] == other["image_path"] and both[0] == both[1]
    bad = [row for row in rows if "labels" not in row]
    assert [row["image_path"][-7:] for row in bad] == ["03b.jpg", "15b.png", "ere.png"]
    assert all(row.keys() == {"image_path", "error"} for row in bad)
    assert "cannot identify" in bad[0]["error"] and "No such file" in bad[2]["error"]
    probabilities = torch.tensor(expected(["{}"])).softmax(1)
    good = [row for row in rows if "labels" in row]
    assert good[-1] == {**good[5], "image_path": names[-2]}
    for row, wanted in zip(good, probabilities):
        assert row["width"] == 112 and len(row["labels"]) == 3
        best = wanted.argsort(descending=True)[0]
        assert row["labels"][0]["label"] == LABELS[best]
        assert row["labels"][0]["score"] == pytest.approx(wanted[best].item(), abs=2e-3)

    text = classified(demo_artifact, pictures, "--csv", "--top=2", "--multi")
    table = list(csv.DictReader(io.StringIO(text)))
    assert len(table) == 2 * 16 + 2 and [row["rank"] for row in table[:3]] == ["1", "2", "1"]
    assert [row["image_path"] for row in table if row["error"]] == [names[4], names[17]]
    assert table[0]["label"] == good[0]["labels"][0]["label"] and table[0]["time"] == ""
    assert 0.1 < float(table[1]["score"]) <= float(table[0]["score"]) < 1

    lines = classified(demo_artifact, pictures, "--top=1").splitlines()
    assert lines[:2] == [names[0], f"{good[0]['labels'][0]['score']:7.2%}  {LABELS[0]}"]
    assert lines[8] == names[4] and "cannot identify" in lines[9]
    assert capsys.readouterr().err == ""


def test_all_labels_of_one_picture(demo_artifact, pictures, expected):
    lines = classified(demo_artifact, pictures / "03.png", "--top=16").splitlines()
    shares = torch.tensor(expected(["{}"])[3]).softmax(0)
    assert lines.pop(0) == str(pictures / "03.png")
    assert len(lines) == 16 and lines[0].endswith(f"%  {LABELS[int(shares.argmax())]}")
    assert sum(float(line.split("%")[0]) for line in lines) == pytest.approx(100, abs=0.1)
    assert len(classified(demo_artifact, pictures / "03.png").splitlines()) == 1 + 5
    assert "cannot identify" in classified(demo_artifact, pictures / "03b.jpg")


def test_pictures_take_no_package_of_an_extra_and_any_name(
        demo_artifact, pictures, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    (tmp_path / "in").mkdir()
    name = os.fsencode(tmp_path) + b"/in/\xe9\xf0\x9f\x92\xa9.png"
    with open(name, "wb") as file:
        file.write((pictures / "03.png").read_bytes())
    folder = tmp_path / "in"
    [row] = map(json.loads, classified(demo_artifact, folder, "--json", "--top=1").splitlines())
    assert os.fsencode(row["image_path"]) == name and row["labels"][0]["label"] == LABELS[3]
    for option in ("--csv", "--top=1"):  # in a form that every terminal takes
        table = classified(demo_artifact, folder, folder, option)
        assert f"{folder}/\\udce9\U0001f4a9.png" in table


def test_frames_of_a_video_have_times(demo_artifact, tmp_path):
    av = pytest.importorskip("av", reason="needs the extra embed")
    drawn = scenes.held_out_set(per_class=1)[0][::8]
    with av.open(tmp_path / "a.mkv", "w") as container:
        stream = container.add_stream("ffv1", rate=2)  # lossless
        stream.width = stream.height = 112
        stream.pix_fmt = "bgr0"
        for index in (2, 2, 9, 9, 9, 9):
            frame = av.VideoFrame.from_image(scenes.to_image(drawn[index]))
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    text = classified(demo_artifact, tmp_path / "a.mkv", "--json", "--every=1s", "--top=1")
    rows = [json.loads(line) for line in text.splitlines()]
    assert [row["time"] for row in rows] == [0, 1, 2]
    assert [row["labels"][0]["label"] for row in rows] == [LABELS[2], LABELS[9], LABELS[9]]
    lines = classified(demo_artifact, tmp_path / "a.mkv", "--every=1.5", "--top=1").splitlines()
    assert lines[2] == f"{tmp_path}/a.mkv at 1.5 s" and len(lines) == 4
    table = classified(demo_artifact, tmp_path / "a.mkv", "--every=1.5", "--top=1", "--csv")
    assert [row["time"] for row in csv.DictReader(io.StringIO(table))] == ["0.0", "1.5"]


def test_an_interrupted_run_says_that_nothing_stays(demo_artifact, pictures, monkeypatch, capsys):
    def stopped(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr("clip_ttrt.pipeline.worker.Worker.embed", stopped)
    arguments = ["classify", str(demo_artifact.folder), str(pictures), "--labels", *LABELS]
    assert cli.main(arguments) == 2
    assert capsys.readouterr().err == "clip_ttrt: interrupted; nothing of it is kept\n"


def test_labels_and_templates_of_files(demo_artifact, pictures, tmp_path, model):
    (tmp_path / "labels.txt").write_text("\n\n".join(LABELS), encoding="utf-8-sig")
    (tmp_path / "templates.txt").write_text("\n".join(TEMPLATES))
    zero_shot = ZeroShot(model[0], tmp_path / "labels.txt", str(tmp_path / "templates.txt"))
    assert zero_shot.labels == LABELS
    assert torch.equal(zero_shot.head.weight, ZeroShot(model[0], LABELS, TEMPLATES).head.weight)
    assert classified(demo_artifact, pictures, f"--templates={tmp_path / 'templates.txt'}",
                      labels=[str(tmp_path / "labels.txt")]) != classified(demo_artifact, pictures)
    assert len(zeroshot.TEMPLATES) == 7 and all("{}" in each for each in zeroshot.TEMPLATES)
    other = SimpleNamespace(origin=SimpleNamespace(kind="openai"))
    assert zeroshot.templates_for(other, None) == list(zeroshot.TEMPLATES)
    assert zeroshot.templates_for(demo_artifact, None) == ["{}"]
    assert zeroshot.templates_for(other, "just {}") == ["just {}"]


def test_imagenet_is_open_clip_s(monkeypatch):
    with monkeypatch.context() as patch:
        patch.setitem(__import__("sys").modules, "open_clip.zero_shot_metadata", None)
        with pytest.raises(clip_ttrt.UserError, match="--labels imagenet is open_clip's, which is"):
            zeroshot.read_texts("imagenet", "labels")
    pytest.importorskip("open_clip", reason="needs open_clip")
    labels, templates = (zeroshot.read_texts("imagenet", each) for each in ("labels", "templates"))
    assert len(labels) == 1000 and labels[0] == "tench" and len(templates) == 80
    assert "a bad photo of a {}." in templates


def test_labels_that_are_unknown_or_cannot_be(demo_artifact, pictures, tmp_path, capsys):
    def said(*labels, options=(), code=2):
        assert cli.main(["classify", str(demo_artifact.folder), str(pictures / "00.png"),
                         "--labels", *map(str, labels), *options]) == code
        return capsys.readouterr().err

    one, latin = tmp_path / "one.txt", tmp_path / "latin.txt"
    one.write_text("alone\n\n")
    latin.write_bytes(b"a\n\xff\n")
    assert "never trained on tabby, cat, !: " in said(
        "a photo of two Red circles, on a blue background", "a tabby cat!", code=0)
    for labels, options, sentence in (
            ([one], [], "at least two"), ([latin], [], "no file in UTF-8"),
            (["a cat"], [], "'a cat' is one text and no file"),
            (["two " * 90, "one"], [], "too long"),
            (["one", "two"], ["--templates", "of {}", "of"], "template 'of' has no {}, where the"),
            (["one", "two"], ["--templates", "of"], "--templates 'of' is one text and no file")):
        told = said(*labels, options=options)
        assert sentence in told and told.startswith("clip_ttrt: ") and told.count("\n") == 1


def test_an_artifact_without_texts_is_refused(tmp_path, capsys):
    image = clip_ttrt.compile(encoder="image", backend="torchscript", verify=False, batch=2,
                              output=tmp_path / "image")
    assert cli.main(["classify", str(image.folder), "a.png", "--labels", "one", "two"]) == 2
    assert "holds no text encoder; compile with --encoder both" in capsys.readouterr().err


def test_heads_have_graphs_of_their_own_which_go_with_them(monkeypatch):
    """The bookkeeping, without a GPU: a capture is a tuple."""
    monkeypatch.setattr(contexts, "Captured", lambda context, *about: about)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: 0)
    context = contexts.Context.__new__(contexts.Context)
    context.encoder = SimpleNamespace(batch=BatchRange(1, 4, 8))
    context.done = threading.Barrier(1)
    context.done.synchronize = lambda: None
    context.graphs = {112: OrderedDict()}
    context.headed = contexts.weakref.WeakKeyDictionary()

    class Head:
        pass

    first, second = Head(), Head()
    for head in (first, second, contexts.no_head):
        for count in (4, 2):
            assert context.graph_for(count, 112, head) == (count, 112, head)
    assert list(context.graphs[112]) == [4, 2] and len(context.headed) == 2
    context.headed[first][112].clear()  # a real capture does not keep its head
    del first, head
    gc.collect()
    assert list(context.headed) == [second]


@pytest.mark.gpu
def test_the_product_is_in_the_encoder_s_graph(demo_engines):
    model, _ = clip_ttrt.load(demo_engines.folder)
    [context] = model._encoders["image"].contexts
    zero_shot = ZeroShot(model, LABELS, TEMPLATES)
    images = torch.randn(7, 3, 112, 112, generator=torch.Generator().manual_seed(0)).cuda()
    assert zero_shot.head.weight.is_cuda
    for count in (4, 7, 2, 1, 4):
        features = model.encode_image(images[:count])
        wanted = zero_shot.head(features)
        before = features.clone()
        logits = zero_shot.logits(images[:count])
        # Padded batches may take other kernels: a few units in the last place of 100.
        torch.testing.assert_close(logits, wanted, rtol=1e-4, atol=2e-3)
        assert torch.equal(model.encode_image(images[:count]), before)
        assert torch.equal(zero_shot.logits(images[:count]), logits)  # its own, not the graph's
    headed, own = context.headed[zero_shot.head][112], context.graphs[112]
    assert list(headed) and set(own) == {2, 4, 7}
    assert all(headed.values()) and model.memory()["graphs"] > 0
    both = torch.cat([zero_shot(images), zero_shot(images)])
    assert both.shape == (14, 16) and torch.allclose(both.sum(1), torch.ones(14).cuda())
    assert zero_shot(torch.cat([images] * 3)).shape == (21, 16)  # over the largest batch
    del zero_shot
    gc.collect()
    assert not context.headed and torch.equal(model.encode_image(images[:4]),
                                              model.encode_image(images[:4]))
