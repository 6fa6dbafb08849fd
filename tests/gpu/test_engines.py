"""Whole encoders as TensorRT engines, against the original model, and what a saved module does.

Artifacts are kept in, and taken from, the folder in CLIP_TTRT_ARTIFACTS, where that is set.
"""
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import clip_ttrt
import needs
from clip_ttrt import kernels, ops
from clip_ttrt.artifact import MANIFEST, read_artifact
from clip_ttrt.checkpoint import load_checkpoint
from clip_ttrt.verify import COSINE_BOUND
from outliers import EVERYWHERE, plant

pytestmark = pytest.mark.gpu

STATIC, DYNAMIC = "32", "1:32:256"
FEW = "1:4:8"  # the demo model, where a batch beyond the range is tested
KERNELS = ["tensorrt", pytest.param("fused", marks=needs.fused)]


@pytest.fixture(scope="session")
def artifact_of(tmp_path_factory):
    """(model, precision, batch, kernels) -> an artifact with random weights (demo: trained)."""
    root = Path(os.environ.get("CLIP_TTRT_ARTIFACTS") or tmp_path_factory.mktemp("engines"))

    def find_or_compile(model, precision, batch, kernels):
        folder = root / f"{model}-{precision}-{batch}-{kernels}".translate({47: "-", 58: "-"})
        if (folder / MANIFEST).is_file():
            return read_artifact(folder)
        return clip_ttrt.compile(
            model=model, weights=None if model == "demo" else "random", precision=precision,
            batch=batch, kernels=kernels, backend="tensorrt", output=folder)

    return find_or_compile


def cases():
    """fp16 with both kernels, the other precisions on the smaller models."""
    for model in ("demo", "ViT-B/32", "ViT-L/14"):
        yield pytest.param(model, "fp16", DYNAMIC, "fused", marks=needs.fused)
        yield model, "fp16", DYNAMIC, "tensorrt"
        if model != "ViT-L/14":
            yield pytest.param(model, "fp16", STATIC, "fused", marks=needs.fused)
            for precision in ("fp32", "tf32", "bf16"):
                yield model, precision, DYNAMIC, "tensorrt"
    yield pytest.param("RN50", "fp16", DYNAMIC, "fused", marks=needs.fused)
    yield "RN50", "fp16", DYNAMIC, "tensorrt"
    yield "RN50", "bf16", STATIC, "tensorrt"
    yield pytest.param("demo", "fp8", DYNAMIC, "fused", marks=[needs.fused, needs.fp8])
    yield pytest.param("demo", "fp8", DYNAMIC, "tensorrt", marks=needs.fp8)


@pytest.mark.parametrize("model, precision, batch, kernels_", list(cases()))
def test_each_encoder_is_one_engine_and_right(artifact_of, model, precision, batch, kernels_):
    artifact = artifact_of(model, precision, batch, kernels_)
    manifest = artifact.manifest
    assert manifest["backend"] == "tensorrt" and manifest["computes_in"] == precision
    assert manifest["kernels"] == kernels_
    assert manifest["kernels_version"] == (kernels.version() if kernels_ == "fused" else None)
    for name, module in manifest["modules"].items():
        fused = kernels_ == "fused" and (name, model) != ("image", "RN50")
        assert module["engines"] == 1 and ("tune" in module["rewrites"]) is fused
    assert artifact.verified, manifest["verification"]["failures"]
    bound = COSINE_BOUND[precision]
    for encoder in artifact.encoders:
        assert manifest["verification"]["errors"][encoder]["cos_min"] >= bound
    model_, _ = clip_ttrt.load(artifact.folder, device="cuda")
    images = torch.randn(5, 3, *[artifact.dimensions.image_resolution] * 2, device="cuda")
    features = model_.encode_image(images)
    assert features.shape == (5, artifact.dimensions.embed_dim) and torch.isfinite(features).all()
    fewer = model_.encode_image(images[3:])  # another batch size
    assert torch.cosine_similarity(fewer, features[3:]).min() >= bound


@needs.fp8
@pytest.mark.parametrize("kernels_", KERNELS)
@pytest.mark.parametrize("alpha, layers, kept", [
    (32, EVERYWHERE, set()), (256, EVERYWHERE, set()),
    (1024, [(0, "qkv"), (0, "up")], {"blocks.0.qkv.weight", "blocks.0.up.weight"})])
def test_outliers_in_fp8(kernels_, alpha, layers, kept, tmp_path):
    state_dict = plant(load_checkpoint("demo").state_dict, alpha, layers, both_ways=bool(kept))
    save_file(state_dict, tmp_path / "planted.safetensors")
    artifact = clip_ttrt.compile(
        weights=str(tmp_path / "planted.safetensors"), precision="fp8", kernels=kernels_,
        encoder="image", output=tmp_path / "a")
    assert artifact.verified
    assert set(artifact.manifest["modules"]["image"]["fp8"]["kept_fp16"]) == kept


@needs.fp8
@needs.fused
def test_fp8_is_timed_beside_fp16(tmp_path):
    artifact = clip_ttrt.compile(precision="fp8", encoder="image", batch=32, compare=True,
                                 output=tmp_path / "a")
    times = artifact.manifest["modules"]["image"]["milliseconds"]
    assert times.keys() == {"fp8", "fp16"} and all(0 < each < 100 for each in times.values())


@pytest.mark.parametrize("kernels_", KERNELS)
def test_a_new_process_loads_with_plain_torch(artifact_of, tmp_path, kernels_):
    path = str(artifact_of("demo", "fp16", FEW, kernels_).path("image"))
    images, files = torch.randn(3, 3, 112, 112), [str(tmp_path / name) for name in ("x", "y")]
    torch.save(images, files[0])
    expected = torch.jit.load(path)(images.cuda()).cpu()
    program = ("import sys, torch, clip_ttrt; module = torch.jit.load(sys.argv[1]); "
               "torch.save(module(torch.load(sys.argv[2]).cuda()).cpu(), sys.argv[3]); "
               "print('torch_tensorrt' in sys.modules)")
    done = subprocess.run([sys.executable, "-c", program, path, *files], capture_output=True,
                          text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "False"  # the runtime library alone is loaded
    assert torch.equal(torch.load(files[1]), expected)


def test_a_batch_out_of_range_is_an_error_of_the_module(artifact_of):
    module = torch.jit.load(str(artifact_of("demo", "fp16", FEW, "tensorrt").path("image")))
    with pytest.raises(torch.jit.Error, match="batch 9 is outside the compiled range 1 to 8"):
        module(torch.randn(9, 3, 112, 112, device="cuda"))
    with pytest.raises(torch.jit.Error, match="expected an input on the GPU"):
        module(torch.randn(4, 3, 112, 112))


def test_two_models_on_two_streams_do_not_disturb_each_other(artifact_of):
    folder = artifact_of("demo", "fp16", FEW, "tensorrt").folder
    models = [clip_ttrt.load(folder)[0] for _ in range(2)]
    batches = [torch.randn(8, 3, 112, 112, device="cuda") for _ in range(2)]
    expected = [models[0].encode_image(batch) for batch in batches]
    streams, results = [torch.cuda.Stream() for _ in batches], [[], []]
    torch.cuda.synchronize()
    for _ in range(50):
        for model, batch, stream, found in zip(models, batches, streams, results):
            with torch.cuda.stream(stream):
                found.append(model.encode_image(batch))
    torch.cuda.synchronize()
    for found, right in zip(results, expected):
        assert all(torch.equal(features, right) for features in found)


@needs.built
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("tokens", [50, 77, 197, 257, 577])
def test_the_op_on_a_gpu_runs_the_fused_kernel(tokens, causal):
    torch.manual_seed(0)
    qkv = torch.randn(3, tokens, 3 * 12 * 64, device="cuda", dtype=torch.half)
    actual = ops.attention(qkv, 12, causal)
    assert torch.equal(actual, kernels.attention(qkv, 12, causal))
    exact = ops.attention_reference(qkv.double(), 12, causal)
    library = ops.attention_reference(qkv, 12, causal)
    assert (actual - exact).abs().max() <= 2 * (library - exact).abs().max()
