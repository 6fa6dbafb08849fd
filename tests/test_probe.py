"""The linear probe beside scikit-learn's, and the command on the embedded model's pictures."""
import csv
import json
import shutil
import warnings

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

import clip_ttrt
from clip_ttrt import cli, probe
from clip_ttrt.artifact import MANIFEST
from clip_ttrt.checkpoint import sha256_of_file
from clip_ttrt.demo import captions, scenes
from clip_ttrt.probe import LinearProbe

parquet = pytest.importorskip("pyarrow.parquet", reason="needs the extra embed")


@pytest.fixture(autouse=True)
def one_thread():
    """Threads that share so little work would mostly wait for each other on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def made(rows, width, classes, apart, seed=0):
    """Correlated features around a centre for each class, far from zero as CLIP's are: float64."""
    rng = np.random.default_rng(seed)
    axes = np.linalg.qr(rng.normal(size=(width, width)))[0] * np.logspace(0, -2, width)
    labels = np.arange(rows) % classes
    centres = rng.normal(size=(classes, width)) * apart / width**0.5
    return (centres[labels] + rng.normal(size=(rows, width))) @ axes.T + 2, labels


@pytest.mark.parametrize("rows, width, classes, apart, separable", [
    (300, 8, 2, 2, False), (300, 10, 2, 30, True), (400, 12, 5, 3, False), (300, 16, 12, 20, True)])
@pytest.mark.parametrize("c", [1e-4, 0.316, 1e4])
def test_it_is_the_logistic_regression_of_scikit_learn(rows, width, classes, apart, separable, c):
    # newton-cholesky: lbfgs stops, at any tol, where its values are too coarse, and warns.
    linear_model = pytest.importorskip("sklearn.linear_model", reason="needs scikit-learn")
    x, y = made(rows, width, classes, apart)
    theirs = linear_model.LogisticRegression(C=c, tol=1e-10, max_iter=1000,
                                             solver="newton-cholesky").fit(x, y)
    ours = LinearProbe(c, "float64", "cpu").fit(x, y)
    weight, bias = (each.numpy() for each in (ours.weight, ours.bias))
    if classes == 2:
        weight, bias = weight[1:] - weight[:1], bias[1:] - bias[:1]
    largest = max(1, np.abs(theirs.coef_).max())  # hundreds, where nothing but C bounds them
    assert np.abs(weight - theirs.coef_).max() < 1e-5 * largest
    assert np.abs(bias - theirs.intercept_).max() < 1e-5 * max(1, np.abs(theirs.intercept_).max())
    assert (ours.predict(x) == theirs.predict(x)).all() and ours.converged
    assert np.abs(ours.predict_proba(x).numpy() - theirs.predict_proba(x)).max() < 1e-6
    assert ours.score(x, y) == theirs.score(x, y) and (not separable or c < 1 or
                                                       ours.score(x, y) == 1)


@pytest.mark.parametrize("classes, apart", [(2, 2), (7, 5)])
def test_float32_and_blocks_of_rows_change_little(classes, apart, monkeypatch):
    x, y = made(500, 24, classes, apart)
    names = np.array([f"class {label}" for label in y])
    exact = LinearProbe(1, "float64", "cpu").fit(x, names)
    monkeypatch.setitem(probe.NUMBERS, "cpu", 720)  # 30 rows, and the last block has fewer
    before = torch.tensor(x, dtype=torch.float32)
    features = before.clone()
    close = LinearProbe(1, device="cpu").fit(features, torch.tensor(y))
    assert (features == before).all() and close.weight.dtype == torch.float32 and close.converged
    # The gradient's tolerance, 1e-5, by curvatures above 0.01 of what the coordinates make of 1.
    assert (close.weight - exact.weight).abs().max() < 1e-3 * exact.weight.abs().max()
    assert (names[close.predict(x)] == exact.predict(x)).mean() > 0.99
    again = LinearProbe(1, device="cpu").fit(features, y, close)
    assert again.iterations < close.iterations / 2
    torch.testing.assert_close(again.weight, close.weight, rtol=1e-3, atol=1e-3)


def test_what_cannot_be_fit_and_what_does_not_converge():
    x, y = made(60, 4, 3, 1)
    with pytest.raises(clip_ttrt.UserError, match="there is one class only, 0; a"):
        LinearProbe().fit(x, y * 0)
    with pytest.raises(clip_ttrt.UserError, match="60 features have 59 labels; give one for each"):
        LinearProbe().fit(x, y[1:])
    with pytest.warns(RuntimeWarning, match=r"C = 10 has not .* after 2 iter.* norm is \d.\de-"):
        fitted = LinearProbe(10, max_iter=2, device="cpu").fit(x, y)
    assert fitted.predict(x).shape == (60,) and not fitted.converged


def test_the_sweep_halves_around_the_peak_on_the_rows_that_validate():
    """Few rows of much noise: a probe that is bound too little learns the noise."""
    x, y = made(400, 30, 4, 2, seed=1)
    order, training = probe.split(y[:120], seed=0)
    assert sorted(order) == list(range(120)) and training == 108
    assert (np.bincount(y[order[training:]]) == 3).all()
    assert [probe.split(y[:120], seed)[0].tolist() == order.tolist() for seed in (0, 1)] == [1, 0]

    def make(c):
        return LinearProbe(c, "float64", "cpu", max_iter=150)  # enough for all but large C

    with warnings.catch_warnings(record=True):
        best, accuracy = probe.sweep(make, torch.tensor(x), y, 120)
    index = np.round((np.log10(list(accuracy)) + 6) * 8).astype(int)
    assert {*range(0, 97, 16)} <= {*index} and 13 <= len(index) <= 15
    at = round((np.log10(best.c) + 6) * 8)
    assert {at - 1, at + 1} <= {*index}
    assert best.c == min(c for c in accuracy if accuracy[c] == max(accuracy.values()))
    cold = make(best.c).fit(x[:120], y[:120])
    assert (cold.weight - best.weight).abs().max() < 1e-6
    assert cold.score(x[120:], y[120:]) == accuracy[best.c] > 1.2 * accuracy[1e-6]


def test_of_equal_accuracies_the_smallest_c_is_best_and_fits_start_from_the_nearest():
    class Known:
        def __init__(self, c):
            self.c = c

        def fit(self, x, y, start):
            starts[self.c] = start and start.c
            return self

        def score(self, x, y):
            return 0.5 if 0.9e-3 < self.c < 1e3 else 0.25

    starts = {}
    best, accuracy = probe.sweep(Known, torch.zeros(2, 1), np.zeros(2), 1)
    tried = [-6, -4, -3.5, -3.25, -3.125, -3, -2.875, -2.75, -2.5, -2, -1, 0, 2, 4, 6]
    assert np.log10(list(accuracy)) == pytest.approx(tried) and best.c == pytest.approx(1e-3)
    assert starts[1e-6] is None and starts[1e-4] == 1e-6 and starts[0.1] == starts[1e-3] == 1e-2


def test_intervals():
    hits = np.arange(100) < 90  # of both the figures as published: Newcombe 1998, R's PropCIs
    assert probe.wilson(hits) == pytest.approx([0.9, 0.8256, 0.9448], abs=1e-4)
    first, second = (np.array([1.0] * 60 + each) for each in ([1] * 12 + [0] * 28,
                                                            [0] * 12 + [1] * 9 + [0] * 19))
    first[0] = second[5] = np.nan  # bad pictures of one of them
    share, low, high = probe.difference(first, second)
    n, gain, loss = 98, 9, 12
    centre = (gain - loss) / (n + 2)
    wide = 1.96 * (((gain + loss + 2) / (n + 2) - centre**2) / (n + 2)) ** 0.5
    assert [share, low, high] == pytest.approx([-3 / n, centre - wide, centre + wide], abs=1e-4)


def draw(folder, attribute, count, seed):
    """Scenes of the embedded model's world, in a folder for each value of an attribute."""
    generator = torch.Generator().manual_seed(seed)
    rows = captions.all_combinations()
    rows = rows[captions.is_possible(rows)]
    rows = rows[torch.randperm(len(rows), generator=generator)[:count]]
    pictures = scenes.render(scenes.scenes_of(rows, generator))
    for index, (row, picture) in enumerate(zip(rows[:, captions.NAMES.index(attribute)], pictures)):
        path = folder / captions.ATTRIBUTES[attribute][row] / f"{index:03}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        scenes.to_image(picture).save(path)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Colours of 160 and 80 scenes, and a file that is no picture in each."""
    root = tmp_path_factory.mktemp("scenes")
    for part, count, seed in (("train", 160, 1), ("test", 80, 2)):
        draw(root / part, "colour", count, seed)
        (root / part / "green" / "000.jpg").write_bytes(b"<html>not found</html>")
    return root


@pytest.fixture(scope="module")
def perturbed(demo_artifact, tmp_path_factory):
    """The demo model with noise on a weight, which loses some of what it knows."""
    folder = tmp_path_factory.mktemp("perturbed") / "demo"
    shutil.copytree(demo_artifact.folder, folder)
    module = torch.jit.load(folder / "image.ts")
    with torch.no_grad():
        for each in module.state_dict().values():
            if each.is_floating_point():
                noise = torch.randn(each.shape, generator=torch.Generator().manual_seed(0))
                each += 0.9 * noise * (each.std() if each.numel() > 1 else 0)
    torch.jit.save(module, folder / "image.ts")
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["modules"]["image"]["sha256"] = sha256_of_file(folder / "image.ts")
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder


def test_the_command_compares_artifacts_and_goes_on(
        demo_artifact, perturbed, pictures, tmp_path, capsys):
    arguments = ["probe", str(demo_artifact.folder), str(perturbed), "--train",
                 str(pictures / "train"), "--test", str(pictures / "test"), "--output",
                 str(tmp_path / "o")]
    assert cli.main([*arguments, "--json"]) == 0
    good, bad = json.loads(capsys.readouterr().out)["artifacts"]
    for each in (good, bad):
        assert each["train"] == {"images": 160, "bad": 1} and each["classes"] == 8
        assert each["test"] == {"images": 80, "bad": 1} and each["warning"] is None
        share, low, high = each["top1"]
        assert low < share < high + 1e-9 and share <= each["top5"][0] and each["c"] == 0.316
    # Its zero-shot top-1 is 100 %: a probe can do no worse but for few pictures of some colours.
    assert good["top1"][0] >= 0.95 and good["per_class"] > 0.9 and "difference" not in good
    share, low, high = bad["difference"]
    assert share == pytest.approx(bad["top1"][0] - good["top1"][0]) and low < share < high < 0

    name = f"demo-{sha256_of_file(demo_artifact.folder / MANIFEST)[:8]}"  # and another's hash
    folder = tmp_path / "o" / name
    with safe_open(folder / "probe.safetensors", "pt") as file:
        classes = json.loads(file.metadata()["classes"])
    weights = load_file(folder / "probe.safetensors")
    assert classes == sorted(captions.ATTRIBUTES["colour"]) and weights["bias"].shape == (8,)
    model, preprocess = clip_ttrt.load(demo_artifact.folder)
    files = sorted((pictures / "test").glob("*/???.png"))
    with torch.no_grad():
        found = model.encode_image(list(map(str, files))) @ weights["weight"].T + weights["bias"]
    right = [classes[row] == file.parent.name for row, file in zip(found.argmax(1), files)]
    assert np.mean(right) == pytest.approx(good["top1"][0])

    written = {path: path.stat().st_mtime_ns for path in folder.glob("*/img_emb/*")}
    assert cli.main([*arguments, "--c", "1e-3", "--dtype", "float64"]) == 0
    told = capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in folder.glob("*/img_emb/*")} == written
    assert "C = 0.001\n  top-1 " in told and "  to the first -" in told
    assert "8 classes, 160 of train (1 bad), 80 of test (1 bad)" in told


def table(path, rows, columns=("image_path", "label")):
    if path.suffix == ".parquet":
        import pyarrow
        columns = {name: [row[index] for row in rows] for index, name in enumerate(columns)}
        parquet.write_table(pyarrow.table(columns), path)
    else:
        with open(path, "w", newline="") as file:
            csv.writer(file).writerows([columns, *rows])
    return str(path)


def test_tables_give_what_folders_do_and_a_sweep_validates(
        demo_artifact, pictures, tmp_path, capsys):
    train, test = ([(str(file.relative_to(pictures)), file.parent.name) for file in sorted(
        (pictures / part).glob("*/*"))] for part in ("train", "test"))
    by_csv = table(pictures / "train.csv", [row[::-1] for row in train], ("colour", "file"))
    by_parquet = table(pictures / "test.parquet", test, ("file", "colour"))
    columns = dict(column="file", label="colour", output=tmp_path / "o")
    tables = probe.probe([demo_artifact.folder], by_csv, by_parquet, **columns)["artifacts"][0]
    folders = probe.probe([demo_artifact.folder], pictures / "train", pictures / "test")
    for name in ("train", "test", "top1", "per_class", "iterations"):
        assert tables[name] == folders["artifacts"][0][name]
    # 2 iterations are too few for the largest C of the search, and that is not said.
    found = probe.probe([demo_artifact.folder], by_csv, by_parquet, sweep=True, val=by_parquet,
                        max_iter=2, **columns)["artifacts"][0]
    assert found["val"] == found["test"] and 13 <= len(found["sweep"]) <= 15
    assert found["c"] in found["sweep"] and found["warning"].startswith("C = ")
    capsys.readouterr()
    assert cli.main(["probe", str(demo_artifact.folder), "--train", by_csv, "--test", by_parquet,
                     "--column", "file", "--label", "colour", "--sweep", "--max-iter", "2"]) == 0
    told = capsys.readouterr()
    assert "has not converged after 2 iterations" in told.err and " of val" not in told.out


@pytest.mark.parametrize("train, test, options, sentence", [
    ("one", "one", [], "train has one class only, red; a probe needs at least two"),
    ("two", "three", [], "test has labels that train has not: blue"),
    ("few", "two", ["--sweep"], "green has fewer than two pictures, and one of them is to valid"),
    ("two", "two", ["--sweep", "--val", "three"], "val has labels that train has not: blue"),
    ("two", "two", ["--label", "colour"], "two.csv has rows without a 'colour'; --label names"),
    ("two", "two", ["--column", "file"], "has no column file that serves; --column names one of"),
    ("empty", "two", [], "has rows without a 'label'"),
    ("nowhere", "two", [], "nowhere.csv"),
    ("two", "two", ["--c", "1", "--sweep"], "give --c, or --sweep with or without --val"),
    ("two", "two", ["--val", "two"], "give --c, or --sweep with or without --val"),
    ("two", "two", ["--c", "0"], "bad c 0.0 or max_iter 1000: they must be above 0"),
    ("two", "two", ["--dtype", "float16"], "unknown dtype 'float16'; choices: float32, float64"),
    ("two", "two", [], "no picture of train can be read"),
])
def test_bad_input_is_one_sentence(
        train, test, options, sentence, demo_artifact, tmp_path, monkeypatch, capsys):
    rows = {"one": ["red"] * 3, "two": ["red", "green"] * 2, "three": ["red", "green", "blue"],
            "few": ["red", "red", "green"], "empty": ["red", ""]}
    for name, labels in rows.items():
        table(tmp_path / f"{name}.csv", [(f"{n}.png", label) for n, label in enumerate(labels)])
    monkeypatch.chdir(tmp_path)
    options = [f"{each}.csv" if each in rows and options[0] != "--c" else each for each in options]
    assert cli.main(["probe", str(demo_artifact.folder), "--train", f"{train}.csv", "--test",
                     f"{test}.csv", *options]) == 2
    told = capsys.readouterr().err.splitlines()
    assert told[-1].startswith("clip_ttrt: ") and sentence in told[-1]
    assert len(told) == 1 or "can be read" in sentence  # after embed's own


def test_folders_without_classes_are_refused(demo_artifact, tmp_path):
    (tmp_path / "a.png").touch()
    for source, sentence in ((tmp_path, "holds no picture; a folder has one folder of them"),
                             (tmp_path / "a.png", "a.png is no folder, .csv, .parquet or .json")):
        with pytest.raises(clip_ttrt.UserError, match=sentence):
            probe.probe([demo_artifact.folder], source, source)
