"""The artifact folder: what compile writes, how it is written, and every way in which it can be bad."""
import json
import os
import shutil

import pytest
import torch

import clip_ttrt
from clip_ttrt import artifact, pipeline, verify
from clip_ttrt.artifact import MANIFEST, read_artifact
from clip_ttrt.errors import UserError, VerificationError

SMALL = dict(model="demo", weights="random", batch=2, encoder="text", backend="torchscript", verify=False)


@pytest.fixture
def copy(demo_artifact, tmp_path):
    """A copy of the demo artifact that a test may spoil."""
    return shutil.copytree(demo_artifact.folder, tmp_path / "copy")


def spoil(folder, **changes):
    manifest = json.loads((folder / MANIFEST).read_text())
    manifest.update(changes)
    (folder / MANIFEST).write_text(json.dumps(manifest))


def test_the_folder_and_its_manifest(demo_artifact):
    assert sorted(os.listdir(demo_artifact.folder)) == ["image.ts", "manifest.json", "text.ts"]
    manifest = json.loads((demo_artifact.folder / MANIFEST).read_text())
    assert manifest["model"] == "demo" and manifest["precision"] == "fp16" and manifest["backend"] == "torchscript"
    assert manifest["batch"] == {"minimum": 2, "optimal": 4, "maximum": 8}
    assert manifest["weights"]["kind"] == "demo" and len(manifest["weights"]["sha256"]) == 64
    assert manifest["versions"]["torch"] == torch.__version__.split("+")[0]
    assert manifest["verification"]["passed"] and manifest["verification"]["errors"]["image"]["cos_min"] > 0.9999
    assert manifest["kernels"] is None and manifest["kernels_version"] is None
    for module in manifest["modules"].values():
        assert artifact.sha256_of_file(demo_artifact.folder / module["file"]) == module["sha256"]
    assert read_artifact(demo_artifact.folder).manifest == manifest


def test_modules_load_with_plain_torch(demo_artifact):
    module = torch.jit.load(str(demo_artifact.path("image")))
    assert module(torch.randn(3, 3, 112, 112)).shape == (3, 256)
    with pytest.raises(torch.jit.Error, match="batch 9 is outside the compiled range 2 to 8"):
        module(torch.randn(9, 3, 112, 112))
    with pytest.raises(torch.jit.Error, match="expected floating-point images"):
        module(torch.zeros(2, 3, 112, 112, dtype=torch.int32))


def test_one_encoder_alone(tmp_path):
    written = clip_ttrt.compile(output=tmp_path / "a", **SMALL)
    assert written.encoders == ("text",) and not (tmp_path / "a" / "image.ts").exists()
    with pytest.warns(UserWarning, match="never verified"):
        model, _ = clip_ttrt.load(tmp_path / "a")
    with pytest.raises(ValueError, match="holds no image encoder"):
        model.encode_image(torch.zeros(1, 3, 112, 112))


def test_an_existing_output_needs_force(tmp_path):
    clip_ttrt.compile(output=tmp_path / "a", **SMALL)
    before = (tmp_path / "a" / MANIFEST).read_text()
    with pytest.raises(UserError, match="already exists.*--force"):
        clip_ttrt.compile(output=tmp_path / "a", **SMALL)
    assert (tmp_path / "a" / MANIFEST).read_text() == before
    clip_ttrt.compile(output=tmp_path / "a", force=True, seed=3, **SMALL)
    assert json.loads((tmp_path / "a" / MANIFEST).read_text())["weights"]["seed"] == 3
    assert os.listdir(tmp_path) == ["a"]


def test_force_does_not_replace_what_is_no_artifact(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "thesis.txt").write_text("years of work")
    with pytest.raises(UserError, match="is not an artifact"):
        clip_ttrt.compile(output=tmp_path / "a", force=True, **SMALL)
    assert (tmp_path / "a" / "thesis.txt").read_text() == "years of work"


@pytest.mark.parametrize("interruption", [KeyboardInterrupt, RuntimeError("broken"), torch.cuda.OutOfMemoryError("full")])
@pytest.mark.parametrize("force", [False, True])
def test_an_interrupted_compile_leaves_nothing_new(tmp_path, monkeypatch, interruption, force):
    def interrupted(*arguments):
        raise interruption

    if force:
        clip_ttrt.compile(output=tmp_path / "a", **SMALL)
        before = (tmp_path / "a" / "text.ts").read_bytes()
    monkeypatch.setattr(verify, "compare", interrupted)  # at the very end, when the modules are written
    with pytest.raises(type(interruption) if isinstance(interruption, Exception) else interruption):
        clip_ttrt.compile(output=tmp_path / "a", force=force, **{**SMALL, "verify": True})
    assert os.listdir(tmp_path) == (["a"] if force else [])
    if force:
        assert (tmp_path / "a" / "text.ts").read_bytes() == before


def test_an_output_that_cannot_be_written(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(pipeline, "load_checkpoint", lambda *a: pytest.fail("work was done before the output was tried"))
    with pytest.raises(UserError, match="cannot be written"):
        clip_ttrt.compile(output=tmp_path / "file" / "a", **SMALL)


class Steps:
    """The calls that move folders, of which one is interrupted, before or after it is done."""

    def __init__(self, monkeypatch, exchanges, step, done, failure):
        self.left, self.done, self.failure = step, done, failure
        monkeypatch.setattr(artifact.os, "rename", self.interrupting(os.rename))
        exchange = artifact.exchange if exchanges else lambda one, other: False
        monkeypatch.setattr(artifact, "exchange", self.interrupting(exchange) if exchanges else exchange)

    def interrupting(self, move):
        def call(*folders):
            self.left -= 1
            if self.left == 0 and not self.done:
                raise self.failure
            result = move(*folders)
            if self.left == 0:
                raise self.failure
            return result

        return call


@pytest.mark.parametrize("failure", [KeyboardInterrupt(), OSError("no space")], ids=repr)
@pytest.mark.parametrize("done", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("exchanges, step", [(True, 1), (False, 1), (False, 2)])
def test_nothing_is_lost_whenever_a_replacement_is_interrupted(tmp_path, exchanges, step, done, failure):
    """Where folders change places in one step, and where two renames do it."""
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / MANIFEST).write_text(json.dumps({"format": artifact.FORMAT, "seed": 1}))
    with pytest.MonkeyPatch.context() as patch:
        Steps(patch, exchanges, step, done, failure)
        with pytest.raises(type(failure)), artifact.draft(tmp_path / "a", force=True) as writing:
            writing.publish(writing.write_manifest(seed=2))
    assert json.loads((tmp_path / "a" / MANIFEST).read_text())["seed"] == (2 if done and step == (1 if exchanges else 2) else 1)
    assert os.listdir(tmp_path) == ["a"]


@pytest.mark.parametrize("exchanges", [True, False])
def test_a_replacement_leaves_the_new_artifact_alone(tmp_path, monkeypatch, exchanges):
    Steps(monkeypatch, exchanges, 0, False, None)
    for seed in (1, 2):
        with artifact.draft(tmp_path / "a", force=True) as writing:
            writing.publish(writing.write_manifest(seed=seed))
    assert json.loads((tmp_path / "a" / MANIFEST).read_text())["seed"] == 2 and os.listdir(tmp_path) == ["a"]


def test_two_folders_change_places(tmp_path):
    for name in ("one", "other"):
        (tmp_path / name).mkdir()
        (tmp_path / name / name).touch()
    if artifact.exchange(tmp_path / "one", tmp_path / "other"):
        assert (tmp_path / "one" / "other").exists() and (tmp_path / "other" / "one").exists()
    assert not artifact.exchange(tmp_path / "one", tmp_path / "nowhere") and (tmp_path / "one").is_dir()


def test_a_failed_verification_is_raised_recorded_and_refused(tmp_path, monkeypatch):
    for precision in verify.COSINE_BOUND:
        monkeypatch.setitem(verify.COSINE_BOUND, precision, 1.0000001)  # a bound that nothing can meet
    with pytest.raises(VerificationError, match="smallest cosine"):
        clip_ttrt.compile(output=tmp_path / "a", **{**SMALL, "verify": True})
    assert read_artifact(tmp_path / "a").verified is False
    with pytest.raises(UserError, match="failed its verification"):
        clip_ttrt.load(tmp_path / "a")
    model, _ = clip_ttrt.load(tmp_path / "a", force=True)
    assert model.encode_text(torch.zeros(1, 77, dtype=torch.int32)).shape == (1, 256)


def test_no_artifact(tmp_path):
    with pytest.raises(UserError, match="is not an artifact"):
        clip_ttrt.load(tmp_path)


@pytest.mark.parametrize("version", [0, 1, "2", None])
def test_an_unknown_format_version(copy, version):
    spoil(copy, format=version)
    with pytest.raises(UserError, match="has format"):
        clip_ttrt.load(copy)


@pytest.mark.parametrize("content", ["", "{", "[]", '{"format": 3}', '{"format": 3, "modules": 3}'])
def test_a_damaged_manifest(copy, content):
    (copy / MANIFEST).write_text(content)
    with pytest.raises(UserError, match="is damaged"):
        clip_ttrt.load(copy)


@pytest.mark.parametrize("missing", ["model", "dimensions", "weights", "batch", "device", "logit_scale", "precision", "verification", "modules", "kernels_version"])
def test_a_manifest_that_lacks_something(copy, missing):
    manifest = json.loads((copy / MANIFEST).read_text())
    del manifest[missing]
    (copy / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(UserError, match=f"is damaged: KeyError\\('{missing}'\\)"):
        clip_ttrt.load(copy)


def test_engines_whose_gpu_is_not_recorded(copy):
    engines(copy, gpu={})
    with pytest.raises(UserError, match="is damaged: KeyError"):
        clip_ttrt.load(copy)


def test_a_truncated_module(copy):
    content = (copy / "image.ts").read_bytes()
    (copy / "image.ts").write_bytes(content[:-100])
    with pytest.raises(UserError, match="truncated or altered"):
        clip_ttrt.load(copy)


def test_an_altered_module(copy):
    content = bytearray((copy / "text.ts").read_bytes())
    content[len(content) // 2] ^= 1
    (copy / "text.ts").write_bytes(content)
    with pytest.raises(UserError, match="truncated or altered"):
        clip_ttrt.load(copy)


def test_a_missing_module(copy):
    (copy / "text.ts").unlink()
    with pytest.raises(UserError, match="text.ts is missing"):
        clip_ttrt.load(copy)


def engines(copy, **changes):
    """Make the copy claim to hold engines; its modules are replaced by what must not be touched."""
    gpu = {"name": "NVIDIA H200", "compute_capability": "9.0"}
    versions = {"tensorrt": "10.15.1", "torch-tensorrt": "2.11.0"}
    spoil(copy, **{"backend": "tensorrt", "device": "cuda", "gpu": gpu, "versions": versions, **changes})
    for name in ("image.ts", "text.ts"):
        (copy / name).write_text("touched")


A10 = {"name": "NVIDIA A10", "compute_capability": "8.6"}


@pytest.fixture
def pretend_gpu(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("clip_ttrt.stack.gpu", lambda: A10)
    monkeypatch.setattr("clip_ttrt.stack.versions", lambda: {"tensorrt": "10.15.1", "torch-tensorrt": "2.11.1"})


def test_engines_of_another_architecture(copy, pretend_gpu):
    engines(copy)
    with pytest.raises(UserError, match=r"compute capability 9.0 \(NVIDIA H200\), and this GPU has 8.6; compile it anew: python -m clip_ttrt.compile --model demo "
                                        rf"--weights demo --precision fp16 --batch 2:4:8 --encoder both --output {copy} --force$"):
        clip_ttrt.load(copy)


def test_engines_of_another_tensorrt(copy, pretend_gpu):
    for name, other, mine in (("tensorrt", "10.15.0", "10.15.1"), ("torch-tensorrt", "2.12.1", "2.11.1")):
        engines(copy, gpu=A10, versions={"tensorrt": "10.15.1", "torch-tensorrt": "2.11.0", name: other})
        with pytest.raises(UserError, match=f"compiled with {name} {other}, and {mine} is installed; compile it anew: python -m"):
            clip_ttrt.load(copy)


def test_engines_with_kernels_of_another_version(copy, pretend_gpu, monkeypatch):
    monkeypatch.setattr("clip_ttrt.kernels.version", lambda: "0123456789ab", raising=False)
    engines(copy, gpu=A10, kernels_version="ba9876543210")
    with pytest.raises(UserError, match="with kernels ba9876543210, and these are 0123456789ab; compile it anew: python -m"):
        clip_ttrt.load(copy)


def test_engines_without_the_packages(copy, pretend_gpu, monkeypatch):
    engines(copy)
    monkeypatch.setattr("clip_ttrt.stack.versions", lambda: {"tensorrt": "10.15.1", "torch-tensorrt-rtx": "2.11.0"})
    with pytest.raises(UserError, match="engines of tensorrt, and not installed here: torch-tensorrt; "):
        clip_ttrt.load(copy)


def test_engines_without_a_gpu(copy, monkeypatch):
    engines(copy)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(UserError, match="no CUDA GPU answers here"):
        clip_ttrt.load(copy)


@pytest.mark.parametrize("there, warns", [("13.1.0", True), ("12.1.3", False), (None, False)])
def test_linear_layers_of_another_cublaslt_are_a_warning(copy, monkeypatch, recwarn, there, warns):
    monkeypatch.setattr("clip_ttrt.kernels.load", lambda version: None)
    monkeypatch.setattr("clip_ttrt.linear.version_text", lambda: "12.1.3")
    spoil(copy, kernels_version="3", versions={"cublaslt": there} if there else {})
    clip_ttrt.load(copy)
    assert ["measured with cuBLASLt 13.1.0, and 12.1.3 runs here" in str(warning.message) for warning in recwarn if "cuBLASLt" in str(warning.message)] == [True] * warns


def test_another_device_than_compiled_for(demo_artifact):
    other = "cuda" if demo_artifact.device == "cpu" else "cpu"
    with pytest.raises(UserError, match=f"compiled for {demo_artifact.device}, not {other}"):
        clip_ttrt.load(demo_artifact.folder, device=other)


def test_a_device_that_does_not_exist(demo_artifact):
    with pytest.raises(UserError, match="unknown device 'gpu'"):
        clip_ttrt.load(demo_artifact.folder, device="gpu")
