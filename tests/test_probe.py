"""The linear probe beside scikit-learn's, and the command on the embedded model's pictures."""
import csv
import json
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import clip_ttrt
from clip_ttrt import cli, probe
from clip_ttrt.checkpoint import sha256_of_file
from clip_ttrt.demo import captions, scenes
from clip_ttrt.probe import fit

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
    ours = fit(torch.from_numpy(x), torch.from_numpy(y), c)
    weight, bias = (each.numpy() for each in (ours.weight, ours.bias))
    if classes == 2:
        weight, bias = weight[1:] - weight[:1], bias[1:] - bias[:1]
    # Hundreds, where nothing but C bounds them.
    largest = max(1, np.abs(theirs.coef_).max(), np.abs(theirs.intercept_).max())
    assert np.abs(weight - theirs.coef_).max() < 1e-5 * largest
    assert np.abs(bias - theirs.intercept_).max() < 1e-5 * largest
    best = ours.top(torch.from_numpy(x), 2).numpy()
    assert (best[:, 0] == theirs.predict(x)).all() and ours.converged
    assert (best == theirs.predict_proba(x).argsort(1)[:, :-3:-1]).all()
    assert not separable or c < 1 or (best[:, 0] == y).all()


@pytest.mark.parametrize("classes, apart", [(2, 2), (7, 5)])
def test_float32_and_blocks_of_rows_change_little(classes, apart, monkeypatch):
    x, y = map(torch.from_numpy, made(500, 24, classes, apart))
    exact = fit(x, y, 1)
    monkeypatch.setattr(probe, "ROWS", 30)  # and the last block has fewer
    before = x.float()
    close = fit(features := before.clone(), y, 1)
    assert (features == before).all() and close.weight.dtype == torch.float32 and close.converged
    # The gradient's tolerance, 1e-5, by curvatures above 0.01 of what the coordinates make of 1.
    assert (close.weight - exact.weight).abs().max() < 1e-3 * exact.weight.abs().max()
    assert (close.top(features) == exact.top(x)).double().mean() > 0.99
    again = fit(features, y, 1, close)
    assert again.iterations < close.iterations / 2
    torch.testing.assert_close(again.weight, close.weight, rtol=1e-3, atol=1e-3)


def test_what_does_not_converge():
    x, y = map(torch.from_numpy, made(60, 4, 3, 1))
    fitted = fit(x, y, 10, max_iter=2)
    assert fitted.iterations == 2 and not fitted.converged and fitted.top(x).shape == (60, 1)


def test_the_sweep_halves_around_the_peak_on_the_rows_that_validate():
    """Few rows of much noise: a probe that is bound too little learns the noise."""
    x, y = map(torch.from_numpy, made(400, 30, 4, 2, seed=1))
    held = torch.arange(400) >= 120
    accuracy, last = probe.sweep(x, y, held)
    index = np.round((np.log10(list(accuracy)) + 6) * 8).astype(int)
    assert {*range(0, 97, 16)} <= {*index} and 13 <= len(index) <= 15 and last.c in accuracy
    best = min(c for c in accuracy if accuracy[c] == max(accuracy.values()))
    at = round((np.log10(best) + 6) * 8)
    assert {at - 1, at + 1} <= {*index}
    cold = fit(x[~held], y[~held], best)
    share = (cold.top(x[held])[:, 0] == y[held]).double().mean().item()
    assert share == accuracy[best] > 1.2 * accuracy[1e-6]


def test_of_equal_accuracies_the_search_goes_on_about_the_smallest_c(monkeypatch):
    tried = []

    def known(x, y, c, start):
        tried.append((c, start and start.c))
        right = 0.9e-3 < c < 1e3
        return SimpleNamespace(c=c, top=lambda x: torch.full((len(x), 1), 1 - right))

    monkeypatch.setattr(probe, "fit", known)
    probe.sweep(torch.zeros(4, 1), torch.zeros(4, dtype=torch.long), torch.arange(4) > 1)
    steps = [-6, -4, -2, 0, 2, 4, 6, -3, -1, -3.5, -2.5, -3.25, -2.75, -3.125, -2.875]
    assert np.log10([c for c, _ in tried]) == pytest.approx(steps)
    assert [start for _, start in tried] == [None, *(c for c, _ in tried[:-1])]


def test_a_tenth_of_each_class_validates():
    y = torch.tensor([0] * 100 + [1] * 20 + [2] * 2 + [3])[torch.randperm(123)]
    held = probe.split(y)
    assert y[held].bincount().tolist() == [10, 2, 1] and (held == probe.split(y)).all()


def test_intervals():
    hits = np.arange(100) < 90  # of both the figures as published: Newcombe 1998, R's PropCIs
    assert probe.wilson(hits) == pytest.approx([0.9, 0.8256, 0.9448], abs=1e-4)
    first, second = (np.array([1.0] * 60 + each) for each in ([1] * 12 + [0] * 28,
                                                            [0] * 12 + [1] * 9 + [0] * 19))
    share, low, high = probe.difference(first, second)
    n, gain, loss = 100, 9, 12
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


def test_the_command_compares_artifacts(
        demo_artifact, perturbed, pictures, tmp_path, capsys):
    arguments = ["probe", str(demo_artifact.folder), str(perturbed), "--train",
                 str(pictures / "train"), "--test", str(pictures / "test")]
    assert cli.main([*arguments, "--json"]) == 0
    good, bad = json.loads(capsys.readouterr().out)["artifacts"]
    for each in (good, bad):
        assert each["train"] == {"images": 160, "bad": 1} and each["classes"] == 8
        assert each["test"] == {"images": 80, "bad": 1} and each["converged"]
        share, low, high = each["top-1"]
        assert low < share < high + 1e-9 and share <= each["top-5"][0] and each["c"] == 0.316
    # Its zero-shot top-1 is 100 %: a probe can do no worse but for few pictures of some colours.
    assert good["top-1"][0] >= 0.95 and "difference" not in good
    share, low, high = bad["difference"]
    assert share == pytest.approx(bad["top-1"][0] - good["top-1"][0]) and low < share < high < 0

    model, preprocess = clip_ttrt.load(demo_artifact.folder)
    x, y = {}, {}
    for part in ("train", "test"):
        files = sorted((pictures / part).glob("*/???.png"))
        x[part] = model.encode_image(list(map(str, files)))
        y[part] = np.unique([file.parent.name for file in files], return_inverse=True)[1]
    linear_model = pytest.importorskip("sklearn.linear_model", reason="needs scikit-learn")
    theirs = linear_model.LogisticRegression(C=0.316, max_iter=1000).fit(x["train"], y["train"])
    assert theirs.score(x["test"], y["test"]) == pytest.approx(good["top-1"][0])

    assert cli.main([*arguments, "--c", "1e-3", "--dtype", "float64"]) == 0
    told = capsys.readouterr().out
    assert ": C = 0.001, 8 classes, " in told and "\n  difference  -" in told
    assert "  train: 160 images (1 bad)\n  test: 80 images (1 bad)\n  top-1 " in told


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
    train, test = ([(str(each.relative_to(pictures)), each.parent.name, each.read_bytes())
                    for each in sorted((pictures / part).glob("*/*"))]
                   for part in ("train", "test"))
    by_csv = table(pictures / "train.csv", [row[1::-1] for row in train], ("colour", "file"))
    by_parquet = table(pictures / "test.parquet", test, ("path", "colour", "file"))
    columns = dict(column="file", label="colour")
    tables = probe.probe([demo_artifact.folder], by_csv, by_parquet, **columns)["artifacts"][0]
    folders = probe.probe([demo_artifact.folder], pictures / "train", pictures / "test")
    for name in ("train", "test", "top-1", "iterations"):
        assert tables[name] == folders["artifacts"][0][name]
    assert cli.main(["probe", str(demo_artifact.folder), "--train", by_csv, "--test", by_parquet,
                     "--column", "file", "--label", "colour", "--sweep", "--json"]) == 0
    [found] = json.loads(capsys.readouterr().out)["artifacts"]
    best = max(found["sweep"].values())
    assert 13 <= len(found["sweep"]) <= 15 and found["top-1"][0] > 0.9
    assert found["c"] == min(float(c) for c in found["sweep"] if found["sweep"][c] == best)


@pytest.mark.parametrize("train, test, options, sentence", [
    ("one", "one", [], "train has one class only, red; a probe needs at least two"),
    ("two", "three", [], "test has labels that train has not: blue"),
    ("two", "two", ["--label", "colour"], "train has rows without a 'colour'; --label names"),
    ("two", "two", ["--column", "file"], "has no column file that serves; --column names one of"),
    ("empty", "two", [], "has rows without a 'label'"),
    ("nowhere", "two", [], "nowhere.csv"),
    ("two", "two", ["--c", "0"], "bad c 0.0: it must be above 0"),
    ("two", "two", ["--dtype", "float16"], "unknown dtype 'float16'; choices: float32, float64"),
    ("two", "two", [], "no picture can be read; the first: No such"),
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
                             (tmp_path / "a.png", "a.png holds no picture; a folder has")):
        with pytest.raises(clip_ttrt.UserError, match=sentence):
            probe.probe([demo_artifact.folder], source, source)
