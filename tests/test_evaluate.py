"""Accuracy and recall on the embedded model's pictures, in every form that data sets have."""
import csv
import json
import shutil
import struct
from pathlib import Path

import clip
import numpy as np
import pytest
import torch
from PIL import Image

import clip_ttrt
from clip_ttrt import cli, evaluate
from clip_ttrt.checkpoint import load_checkpoint, original_with_weights, sha256_of_file
from clip_ttrt.demo import captions, scenes
from clip_ttrt.labelled import difference, wilson

parquet = pytest.importorskip("pyarrow.parquet", reason="needs the extra embed")
CLASSES = scenes.held_out_classes()[::8]  # 16, which differ in more than one attribute
CLOTHES = ["T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker",
           "Bag", "Ankle boot"]


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Four scenes of each class in its folder, one of them no picture, and two in a wrong one."""
    root = tmp_path_factory.mktemp("evaluate") / "scenes"
    drawn, numbers = scenes.held_out_set(per_class=4)
    for index, (picture, number) in enumerate(zip(drawn, numbers.tolist())):
        if number % 8 == 0:
            place = (number // 8 + (index in (33, 70))) % 16
            path = root / CLASSES[place].replace(" ", "_") / f"{index:03}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            scenes.to_image(picture).save(path)
    (root / CLASSES[3].replace(" ", "_") / "bad.jpg").write_bytes(b"<html>not found</html>")
    return root


@pytest.fixture(scope="module")
def plain(folder):
    """Of a list of files and texts features of the original model, of length 1."""
    model, preprocess = original_with_weights(load_checkpoint("demo"), "cpu"), None
    preprocess = clip.clip._transform(112)

    def encode(files, texts):
        with torch.no_grad():
            images = model.encode_image(torch.stack([preprocess(Image.open(f)) for f in files]))
            texts = model.encode_text(clip.tokenize(texts, truncate=True))
        return [each / each.norm(dim=1, keepdim=True) for each in (images, texts)]
    return encode


@pytest.fixture(scope="module")
def worse(demo_artifact, tmp_path_factory):
    """The demo model with noise on its image encoder's weights."""
    folder = tmp_path_factory.mktemp("worse") / "demo"
    shutil.copytree(demo_artifact.folder, folder)
    module, generator = torch.jit.load(folder / "image.ts"), torch.Generator().manual_seed(0)
    for each in module.state_dict().values():
        if each.is_floating_point() and each.numel() > 1:
            each.data += 0.9 * each.std() * torch.randn(each.shape, generator=generator)
    torch.jit.save(module, folder / "image.ts")
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["modules"]["image"]["sha256"] = sha256_of_file(folder / "image.ts")
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder


def run(artifact, capsys, *arguments, code=0):
    assert cli.main(["evaluate", str(artifact), *map(str, arguments)]) == code
    told = capsys.readouterr()
    return told.err if code else told.out


def test_a_folder_of_classes_gives_what_plain_pytorch_does(
        demo_artifact, worse, folder, plain, capsys):
    files = sorted(folder.glob("*/*.png"))
    images, texts = plain(files, CLASSES)
    names = [each.replace(" ", "_") for each in CLASSES]
    labels = np.array([names.index(file.parent.name) for file in files])
    order = (images @ texts.T).argsort(1, descending=True).numpy()
    right = order[:, 0] == labels
    assert 0.9 < right.mean() < 1 and len(files) == 64  # chance is 1 / 16; two are mislabelled
    found = json.loads(run(demo_artifact.folder, capsys, "--dataset", folder, "--json"))
    assert [found[name] for name in ("images", "bad", "texts", "templates")] == [64, 1, 16, 1]
    top5 = (order[:, :5] == labels[:, None]).any(1)
    wanted = {"top-1": wilson(right), "top-5": wilson(top5)}
    assert found["original"] == wanted == found["compiled"]
    assert found["difference"]["top-1"] == difference(right * 1.0, right * 1.0)

    bad = json.loads(run(worse, capsys, "--dataset", folder, "--json"))
    assert bad["original"] == wanted and bad["compiled"]["top-1"][0] < 0.6
    share, low, high = bad["difference"]["top-1"]
    assert share == pytest.approx(bad["compiled"]["top-1"][0] - right.mean()) and low < share < high
    lines = run(worse, capsys, "--dataset", folder).splitlines()
    assert lines[0] == "64 images (1 bad), 16 texts" and len(lines) == 7
    assert lines[3].split()[:3] == ["original", "top-1", f"{right.mean():.2%}"]
    assert lines[5].startswith("difference  top-1") and f"{share:.2%}  ({low:.2%} to " in lines[5]
    alone = json.loads(run(worse, capsys, "--dataset", folder, "--json", "--no-original"))
    assert alone["compiled"] == bad["compiled"] and alone.keys().isdisjoint(
        ("original", "difference"))


def test_labels_by_name_and_by_place(demo_artifact, folder, tmp_path):
    """Names of the classes among others; and texts in the order of the folders, or of numbers."""
    def top1(source, labels=None):
        found = evaluate.evaluate(demo_artifact.folder, source, labels=labels, original=False)
        return found["compiled"]["top-1"][0], found["texts"]

    share, count = top1(folder)
    assert share > 0.9 and count == 16
    among = scenes.held_out_classes()[::-1]
    assert 0.85 < top1(folder, among)[0] <= share and top1(folder, among)[1] == 128
    order = sorted(CLASSES)
    for index, name in enumerate(order):
        (tmp_path / "numbers" / str(index)).parent.mkdir(exist_ok=True)
        (tmp_path / "numbers" / str(index)).symlink_to(folder / name.replace(" ", "_"))
    (tmp_path / "labels.txt").write_text("\n".join(order))
    assert top1(tmp_path / "numbers", tmp_path / "labels.txt") == (share, 16)
    table = tmp_path / "table.csv"
    with open(table, "w", newline="") as file:
        csv.writer(file).writerows([["image_path", "label"], *(
            [path, path.parent.name] for path in sorted(folder.glob("*/*")))])
    assert top1(table) == (share, 16)
    first = CLASSES[0].replace(" ", "_")
    for labels, sentence in ((CLASSES[:5], "classes that are none of the 5 labels; --labels takes"),
                             ([*CLASSES[1:], "a cat"], f"{first}: classes that are none")):
        with pytest.raises(clip_ttrt.UserError, match=sentence):
            top1(folder, labels)


def test_wnids_have_open_clip_s_names():
    """Of all classes, or of a few in another order."""
    pytest.importorskip("open_clip", reason="needs open_clip")
    from clip_ttrt.options import EvaluateOptions

    labels, numbers = evaluate.match(["n02123045", "n01440764"], EvaluateOptions())
    assert len(labels) == 1000 and numbers == {"n02123045": 281, "n01440764": 0}
    assert (labels[0], labels[281]) == ("tench", "tabby cat")
    from timm.data import ImageNetInfo

    wnids = ImageNetInfo().label_names()
    twins = [wnids[place] for place in (657, 744, 837)]
    labels, numbers = evaluate.match(twins, EvaluateOptions())
    assert labels[657] == labels[744] and [*numbers.values()] == [657, 744, 837]
    with pytest.raises(clip_ttrt.UserError, match="n00000000: classes that are none of the 1000"):
        evaluate.match(["n00000000", "n01440764"], EvaluateOptions())


def images_by_caption(folder, count):
    """Files and two captions of each."""
    rows = captions.held_out_sample()[::8].tolist()
    files = [sorted((folder / name.replace(" ", "_")).glob("*.png"))[-1] for name in CLASSES]
    texts = [[captions.caption(row, template) for template in (0, 2)] for row in rows]
    return files[:count], texts[:count]


@pytest.mark.parametrize("ending", ["csv", "parquet"])
def test_captions_are_retrieved_as_plain_pytorch_does(
        ending, demo_artifact, folder, plain, tmp_path, capsys):
    files, texts = images_by_caption(folder, 14)
    texts[4].append(texts[9][0])  # of another, so that not all is right
    texts[5][1] += " and on it goes" * 40  # truncated
    flat, owners = [t for each in texts for t in each], np.repeat(range(14), list(map(len, texts)))
    path = tmp_path / f"captions.{ending}"
    rows = [{"image_path": str(file), "caption": text}
            for file, each in zip(files, texts) for text in each]
    rows += [{"image_path": str(tmp_path / "nowhere.png"), "caption": text}
             for text in ("a photo", "a thing")]
    if ending == "csv":
        with open(path, "w", newline="") as file:
            writer = csv.DictWriter(file, ["image_path", "caption"])
            writer.writeheader()
            writer.writerows(rows)
    else:
        import pyarrow
        for row in rows:
            place = Path(row["image_path"])
            row["jpg"] = place.read_bytes() if place.exists() else b""
        parquet.write_table(pyarrow.Table.from_pylist(rows), path)

    image, text = plain(files, flat)
    likeness = (image @ text.T).numpy()
    wanted = {}
    for name, matrix, wrong in (
            ("image to text", likeness, np.arange(14)[:, None] != owners),
            ("text to image", likeness.T, owners[:, None] != np.arange(14))):
        ranks = [(row > row[~off].max()).sum() for row, off in zip(matrix, wrong)]
        wanted |= {f"{name} R@{k}": wilson(np.array(ranks) < k) for k in (1, 5, 10)}
    found = json.loads(run(demo_artifact.folder, capsys, "--dataset", path, "--json"))
    assert (found["images"], found["bad"], found["texts"]) == (14, 1, len(flat) + 2)
    assert found["original"] == found["compiled"] == wanted
    assert 0.5 < wanted["text to image R@1"][0] < 1 == wanted["image to text R@10"][0]


def fashion(folder, pictures, labels):
    """Files as torchvision unpacks FashionMNIST's: a header of big-endian numbers, and bytes."""
    raw = folder / "FashionMNIST/raw"
    raw.mkdir(parents=True)
    for name, magic, values in (("images-idx3", 2051, pictures), ("labels-idx1", 2049, labels)):
        for part, some in (("train", values[:20]), ("t10k", values)):
            header = struct.pack(f">{1 + values.ndim}i", magic, *some.shape)
            (raw / f"{part}-{name}-ubyte").write_bytes(header + some.tobytes())


def test_a_data_set_of_torchvision_s(demo_artifact, tmp_path, capsys, monkeypatch):
    """Grey pictures of 28 pixels; several shards; and what is missing is said."""
    drawn = [scenes.to_image(each) for each in scenes.held_out_set(per_class=3)[0][:240]]
    small = [drawn[24 * (row % 10) + row // 10].convert("L").resize((28, 28)) for row in range(30)]
    pictures = np.stack([np.asarray(each) for each in small])
    labels, own = np.arange(30) % 10, CLASSES[:10]
    dataset = ("--dataset", "FashionMNIST", "--root", tmp_path)
    said = run(demo_artifact.folder, capsys, *dataset, code=2)
    assert (f"torchvision's FashionMNIST (test) is not in {tmp_path}, and nothing is downloaded: "
            "Dataset not found") in said
    assert said.count("\n") == 1
    fashion(tmp_path, pictures, labels.astype(np.uint8))
    monkeypatch.setattr(clip_ttrt.options.EmbedOptions, "shard_rows", 12)
    found = json.loads(run(demo_artifact.folder, capsys, *dataset, "--json", "--labels", *own))
    assert (found["images"], found["bad"], found["texts"]) == (30, 0, 10)
    model, preprocess = clip_ttrt.load(demo_artifact.folder)
    images = torch.stack([preprocess(Image.fromarray(each)) for each in pictures])
    found_by_hand = clip_ttrt.ZeroShot(model, own)(images).topk(5).indices
    right = found_by_hand == torch.from_numpy(labels)[:, None]
    assert found["compiled"] == {"top-1": wilson(right[:, 0].numpy()),
                                 "top-5": wilson(right.any(1).numpy())}
    assert right[:, 0].double().mean() > 0.2  # chance is 0.1
    assert evaluate.torchvision_set("FashionMNIST", str(tmp_path), "test").classes == CLOTHES
    told = run(demo_artifact.folder, capsys, *dataset, "--split", "train", "--no-original")
    assert told.splitlines()[0] == "20 images (0 bad), 10 texts"


@pytest.mark.parametrize("arguments, sentence", [
    (["--dataset", "nowhere"], "nowhere matches no file"),
    (["--dataset", "Nothing", "--root", "."], "Nothing is no data set of torchvision's"),
    (["--dataset", "a.png"], "a.png holds no picture; a folder has one folder"),
    (["--dataset", "empty.csv"], "empty.csv holds no picture"),
    (["--dataset", "broken.tar"], "broken.tar cannot be read: "),
    (["--dataset", "other.csv"], "other.csv has no column image_path or path that serves"),
    (["--dataset", "plain.csv"], "plain.csv has no column caption or text that serves; --column"),
    (["--dataset", "part.csv"], "part.csv has rows without a 'label'; --label names its column"),
    (["--dataset", "one.csv"], "no picture can be read; the first: No such file"),
    (["--dataset", "one.csv", "--weights", "nowhere.pt"], "nowhere.pt: no such file"),
])
def test_bad_input_is_one_sentence(
        arguments, sentence, demo_artifact, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name, content in (("a.png", ""), ("empty.csv", "image_path,label\n"),
                          ("broken.tar", "no archive" * 99), ("other.csv", "a,b\nc,d\n"),
                          ("plain.csv", "image_path,a\nb,c\n"),
                          ("part.csv", "image_path,label\na.png,\n"),
                          ("one.csv", "image_path,label\nb.png,one\nc.png,two\n")):
        (tmp_path / name).write_text(content)
    said = run(demo_artifact.folder, capsys, *arguments, code=2)
    assert said.startswith("clip_ttrt: ") and sentence in said and said.count("\n") == 1
