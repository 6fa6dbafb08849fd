"""The experiment on batch ranges with TensorRT's own kernels, as far as it needs no GPU."""
import json

import pytest

from clip_ttrt.recipe import Recipe
from experiments import builds, native_range


def test_what_is_compared_differs():
    assert len(set(native_range.RECIPES.values())) == len(native_range.RECIPES)
    assert native_range.RECIPES["static"] == (True, Recipe(cublas=True)) and native_range.RECIPES["range as it comes"] == (False, Recipe())


def test_existing_builds_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(builds.subprocess, "run", lambda *_, **__: pytest.fail("it started a build"))
    assert native_range.main(["--existing", "--build-only", "--engines", str(tmp_path), "--recipes", "static"]) == 1
    assert list(tmp_path.iterdir()) == []
    place = list(native_range.RECIPES).index("static")
    (tmp_path / f"ViT-B-32-image-1_32_256-{place}.json").write_text(json.dumps({"build_s": 1.0, "engine_mib": 2.0}))
    assert native_range.main(["--existing", "--build-only", "--engines", str(tmp_path), "--recipes", "static"]) == 0


def test_a_build_that_fails_is_an_error_with_its_last_words(tmp_path, capfd, monkeypatch):
    """Without a GPU the build cannot even import TensorRT's side of the package."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    code = native_range.main(["--build-only", "--model", "demo", "--engines", str(tmp_path), "--recipes", "static"])
    assert code == 1 and "static: the build ended with 1" in capfd.readouterr().out
    [log] = tmp_path.glob("*.log")
    assert "Error" in log.read_text() and not list(tmp_path.glob("*.json"))


def test_an_unknown_recipe_is_refused(tmp_path):
    with pytest.raises(SystemExit):
        native_range.main(["--recipes", "magic", "--engines", str(tmp_path)])
