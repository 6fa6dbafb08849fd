"""The artifact folder: what compile writes, and every way in which it can be bad."""
import itertools
import json
import os
import shutil

import pytest
import torch

import clip_ttrt
from clip_ttrt import artifact, verify
from clip_ttrt.artifact import MANIFEST, read_artifact, sha256_of_file
from clip_ttrt.errors import UserError, VerificationError

SMALL = dict(model="demo", weights="random", batch=2, encoder="text", backend="torchscript")


def compile_small(folder, verify=False, **options):
    return clip_ttrt.compile(output=folder, verify=verify, **SMALL, **options)


def manifest_of(folder):
    return json.loads((folder / MANIFEST).read_text())


@pytest.fixture
def copy(demo_artifact, tmp_path):
    """A copy of the demo artifact that a test may spoil."""
    return shutil.copytree(demo_artifact.folder, tmp_path / "copy")


def test_the_folder_and_its_manifest(demo_artifact):
    assert sorted(os.listdir(demo_artifact.folder)) == ["image.ts", "manifest.json", "text.ts"]
    manifest = manifest_of(demo_artifact.folder)
    expected = {"model": "demo", "precision": "fp16", "backend": "torchscript", "kernels": None,
                "kernels_version": None, "batch": {"minimum": 2, "optimal": 4, "maximum": 8}}
    assert manifest == {**manifest, **expected}
    assert manifest["weights"]["kind"] == "demo" and len(manifest["weights"]["sha256"]) == 64
    assert manifest["versions"]["torch"] == torch.__version__.split("+")[0]
    assert manifest["verification"]["passed"]
    for module in manifest["modules"].values():
        assert sha256_of_file(demo_artifact.folder / module["file"]) == module["sha256"]
    assert read_artifact(demo_artifact.folder).manifest == manifest


def test_one_encoder_alone_that_force_replaces(tmp_path):
    folder = tmp_path / "a"
    assert compile_small(folder).encoders == ("text",) and not (folder / "image.ts").exists()
    with pytest.warns(UserWarning, match="never verified"):
        model, _ = clip_ttrt.load(folder)
    with pytest.raises(ValueError, match="holds no image encoder"):
        model.encode_image(torch.zeros(1, 3, 112, 112))
    with pytest.raises(UserError, match="already exists.*--force"):
        compile_small(folder)
    assert manifest_of(folder)["weights"]["seed"] == 0
    compile_small(folder, force=True, seed=3)
    assert manifest_of(folder)["weights"]["seed"] == 3 and os.listdir(tmp_path) == ["a"]
    (folder / MANIFEST).rename(folder / "thesis.txt")
    for taken in (folder, folder / "thesis.txt"):
        with pytest.raises(UserError, match="--force replaces an artifact, and nothing else"):
            compile_small(taken, force=True)
    assert (folder / "thesis.txt").exists() and os.listdir(tmp_path) == ["a"]


@pytest.mark.parametrize("failure", [KeyboardInterrupt(), OSError("no space")], ids=repr)
@pytest.mark.parametrize("done", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("exchanges, step", [(True, 0), (True, 1), (False, 1), (False, 2)])
def test_nothing_is_lost_whenever_force_is_interrupted(
        demo_artifact, tmp_path, exchanges, step, done, failure):
    """While writing (0), and before and after each move: one exchange, or else two renames."""
    def write(seed):
        with artifact.draft(tmp_path / "a", force=True) as writing:
            written = writing.write_manifest(**{**demo_artifact.manifest, "seed": seed})
            if seed == 2 and step == 0:
                raise failure
            writing.publish(written)

    def interrupted(*folders):
        at = next(calls) == step
        moved = move(*folders) if done or not at else None
        if at:
            raise failure
        return moved

    (tmp_path / "a").mkdir()
    write(1)  # over an empty folder
    owner, name = (artifact, "exchange") if exchanges else (os, "rename")
    move, calls = getattr(owner, name), itertools.count(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(artifact, "exchange", lambda *folders: False)
        patch.setattr(owner, name, interrupted)
        with pytest.raises(type(failure)):
            write(2)
        replaced = done and step == (1 if exchanges else 2)
        assert manifest_of(tmp_path / "a")["seed"] == (2 if replaced else 1)
        assert os.listdir(tmp_path) == ["a"]
        write(3)  # without an interruption
        assert manifest_of(tmp_path / "a")["seed"] == 3 and os.listdir(tmp_path) == ["a"]


def test_a_failed_verification_is_raised_recorded_and_refused(tmp_path, monkeypatch):
    for precision in verify.COSINE_BOUND:  # a bound that nothing can meet
        monkeypatch.setitem(verify.COSINE_BOUND, precision, 1.0000001)
    with pytest.raises(VerificationError, match="smallest cosine"):
        compile_small(tmp_path / "a", verify=True)
    assert read_artifact(tmp_path / "a").verified is False
    with pytest.raises(UserError, match="failed its verification"):
        clip_ttrt.load(tmp_path / "a")
    model, _ = clip_ttrt.load(tmp_path / "a", force=True)
    assert model.encode_text(torch.zeros(1, 77, dtype=torch.int32)).shape == (1, 256)


def test_a_manifest_that_is_missing_damaged_or_of_another_format(copy):
    whole = manifest_of(copy)
    less = [{name: value for name, value in whole.items() if name != fact}
            for fact in ("dimensions", "batch", "verification", "modules", "versions", "asked")]
    damaged = map(json.dumps, ([], {**whole, "modules": 3}, {**whole, "format": "3"}, *less))
    for content in ("{", *damaged):
        (copy / MANIFEST).write_text(content)
        with pytest.raises(UserError, match=f"{MANIFEST} is damaged"):
            clip_ttrt.load(copy)
    (copy / MANIFEST).unlink()
    with pytest.raises(UserError, match="is not an artifact"):
        clip_ttrt.load(copy)


def test_a_module_that_is_not_whole(copy):
    path = copy / "text.ts"
    for damage in (lambda: path.write_bytes(path.read_bytes()[:-100]), path.unlink):
        damage()
        with pytest.raises(UserError, match="text.ts is missing, truncated or altered"):
            clip_ttrt.load(copy)


A10 = {"name": "NVIDIA A10", "compute_capability": "8.6"}
VERSIONS = {"tensorrt": "10.15.1", "torch-tensorrt": "2.11.0"}


@pytest.mark.parametrize("changes, sentence", [
    ({"gpu": {**A10, "compute_capability": "9.0"}}, "compute_capability 9.0, not 8.6"),
    ({"versions": {**VERSIONS, "tensorrt": "10.15.0"}}, "tensorrt 10.15.0, not 10.15.1"),
    ({"versions": {**VERSIONS, "torch-tensorrt": "2.12.1"}}, "torch-tensorrt 2.12.1, not 2.11.1"),
    ({"backend": "rtx", "versions": {"torch-tensorrt-rtx": "2.12.0"}},
     "torch-tensorrt-rtx 2.12.0, not none"),
    ({"kernels_version": "ba9876543210"}, "kernels ba9876543210, not 0123456789ab"),
    ({"asked": {"backend": "tensorrt", "kernels": "fused"}}, "a GPU, and no CUDA GPU answers here"),
])
def test_engines_that_cannot_run_here(copy, monkeypatch, changes, sentence):
    """One sentence, before any module is touched, that ends in the command to compile anew."""
    monkeypatch.setattr("torch.cuda.is_available", lambda: "asked" not in changes)
    monkeypatch.setattr("clip_ttrt.stack.gpu", lambda: A10)
    monkeypatch.setattr("clip_ttrt.stack.versions",
                        lambda: {"tensorrt": "10.15.1", "torch-tensorrt": "2.11.1"})
    monkeypatch.setattr("clip_ttrt.kernels.version", lambda: "0123456789ab")
    engines = {"backend": "tensorrt", "device": "cuda", "gpu": A10, "versions": VERSIONS,
               "asked": {"backend": "auto", "kernels": "auto"}, **changes}
    (copy / MANIFEST).write_text(json.dumps({**manifest_of(copy), **engines}))
    asked = "--backend tensorrt --kernels fused " if "asked" in changes else ""
    command = ("python -m clip_ttrt.compile --model demo --weights demo --precision fp16 "
               f"--batch 2:4:8 {asked}--output {copy} --force")
    with pytest.raises(UserError) as caught:
        clip_ttrt.load(copy)
    assert str(caught.value) == f"{copy} was compiled for {sentence}; compile it anew: {command}"


def test_a_device_that_is_another_or_none(demo_artifact):
    other = "cuda" if demo_artifact.device == "cpu" else "cpu"
    for device, sentence in ((other, f"compiled for {demo_artifact.device}, not {other}"),
                             ("gpu", "unknown device 'gpu'"), ("cuda:99", "there is no cuda:99")):
        with pytest.raises(UserError, match=sentence):
            clip_ttrt.load(demo_artifact.folder, device=device)
