"""Whole encoders as TensorRT engines: every ViT, precision and kind of batch, against the original model.

Building takes one to three minutes an engine.  Artifacts are kept in, and taken from, the folder in CLIP_TTRT_ARTIFACTS, under
the names that experiments.accuracy gives, so that tests and measurements can share them.
"""
import functools
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import clip_ttrt
from clip_ttrt import pipeline, kernels
from clip_ttrt.accuracy import COSINE_BOUND
from clip_ttrt.models import MODELS
from experiments.accuracy import compiled
from experiments.timing import graphed
import needs

pytestmark = pytest.mark.gpu

STATIC, DYNAMIC = "32", "1:32:256"
FEW, FEW_DYNAMIC = "4", "1:4:8"  # the demo model, where a batch beyond the range is part of the test
ATTENTIONS = ["native", pytest.param("plugin", marks=needs.built)]
SAME_TEXT = ("ViT-B/16", "ViT-L/14@336px")  # their text encoders are ViT-B/32's and ViT-L/14's, size for size


@pytest.fixture(scope="session")
def artifact_of(tmp_path_factory):
    """A function from (model, precision, batch, attention) to an artifact with random weights (demo: trained)."""
    root = Path(os.environ.get("CLIP_TTRT_ARTIFACTS") or tmp_path_factory.mktemp("engines"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipeline, "load_checkpoint", functools.lru_cache(maxsize=1)(pipeline.load_checkpoint))  # big models take long to draw

        def find_or_compile(model, precision, batch, attention="native"):
            return compiled(root, model, None if model == "demo" else "random", precision, batch, attention, encoder="image" if model in SAME_TEXT else "both")

        yield find_or_compile


def cases():
    """(model, precision, batch, attention): every ViT in fp16 and fp32, static and dynamic; TF32, which shares every layer
    with fp32, on two; the plugin in the precision that it has."""
    for model in MODELS:
        for batch in (STATIC, DYNAMIC):
            yield model, "fp16", batch, "native"
            yield pytest.param(model, "fp16", batch, "plugin", marks=needs.built)
            yield model, "fp32", batch, "native"
            if model in ("demo", "ViT-B/32"):
                yield model, "tf32", batch, "native"


@pytest.mark.parametrize("model, precision, batch, attention", list(cases()))
def test_each_encoder_is_one_engine_and_right(artifact_of, model, precision, batch, attention):
    artifact = artifact_of(model, precision, batch, attention)
    manifest = artifact.manifest
    assert manifest["backend"] == "tensorrt" and manifest["computes_in"] == precision and manifest["attention"] == attention
    assert all(module["engines"] == 1 for module in manifest["modules"].values())
    assert artifact.verified, manifest["verification"]["failures"]
    for encoder in artifact.encoders:
        assert manifest["verification"]["errors"][encoder]["cos_min"] >= COSINE_BOUND[precision]
    model_, _ = clip_ttrt.load(artifact.folder, device="cuda")
    images = torch.randn(5, 3, *[artifact.dimensions.image_resolution] * 2, device="cuda")
    features = model_.encode_image(images)
    assert features.shape == (5, artifact.dimensions.embed_dim) and torch.isfinite(features).all()
    assert torch.cosine_similarity(model_.encode_image(images[3:]), features[3:]).min() >= COSINE_BOUND[precision]  # another batch size


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_a_new_process_loads_with_plain_torch(artifact_of, tmp_path, attention):
    artifact = artifact_of("demo", "fp16", FEW_DYNAMIC, attention)
    torch.manual_seed(0)
    images = torch.randn(3, 3, 112, 112)
    torch.save(images, tmp_path / "images.pt")
    expected = torch.jit.load(str(artifact.path("image")))(images.cuda()).cpu()
    program = ("import sys, torch, clip_ttrt; module = torch.jit.load(sys.argv[1]); "
               "torch.save(module(torch.load(sys.argv[2]).cuda()).cpu(), sys.argv[3]); print('torch_tensorrt' in sys.modules)")
    done = subprocess.run([sys.executable, "-c", program, str(artifact.path("image")), str(tmp_path / "images.pt"), str(tmp_path / "features.pt")],
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "False"  # the runtime library alone is loaded, which takes no seconds
    assert torch.equal(torch.load(tmp_path / "features.pt"), expected)


@pytest.mark.parametrize("batch, count", [(FEW, 3), (FEW, 5), (FEW_DYNAMIC, 9)])
def test_a_batch_out_of_range_is_an_error_of_the_module(artifact_of, batch, count):
    module = torch.jit.load(str(artifact_of("demo", "fp16", batch).path("image")))
    with pytest.raises(torch.jit.Error, match=f"batch {count} is outside the compiled range"):
        module(torch.randn(count, 3, 112, 112, device="cuda"))
    with pytest.raises(torch.jit.Error, match="expected an input on the GPU"):
        module(torch.randn(4, 3, 112, 112))


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_cuda_graph_replays_give_the_same_features(artifact_of, attention):
    model, _ = clip_ttrt.load(artifact_of("demo", "fp16", FEW_DYNAMIC, attention).folder)
    images = torch.randn(4, 3, 112, 112, device="cuda")
    expected = model.encode_image(images).clone()
    held = {}
    replay = graphed(lambda: held.update(features=model.encode_image(images)))
    held["features"].zero_()
    replay()
    torch.cuda.synchronize()
    assert torch.equal(held["features"], expected)


def test_two_models_on_two_streams_do_not_disturb_each_other(artifact_of):
    model, _ = clip_ttrt.load(artifact_of("demo", "fp16", FEW_DYNAMIC).folder)
    batches = [torch.randn(8, 3, 112, 112, device="cuda") for _ in range(2)]
    expected = [model.encode_image(batch).clone() for batch in batches]
    streams = [torch.cuda.Stream() for _ in batches]
    torch.cuda.synchronize()
    results = [[], []]
    for _ in range(50):
        for i, stream in enumerate(streams):
            with torch.cuda.stream(stream):
                results[i].append(model.encode_image(batches[i]))
    torch.cuda.synchronize()
    for found, right in zip(results, expected):
        assert all(torch.equal(features, right) for features in found)


@needs.built
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("tokens", [50, 77, 197, 257, 577])
def test_the_op_on_a_gpu_runs_the_fused_kernel(tokens, causal):
    torch.manual_seed(0)
    qkv = torch.randn(3, tokens, 3 * 12 * 64, device="cuda", dtype=torch.half)
    actual = torch.ops.clip_ttrt.attention(qkv, 12, causal)
    assert torch.equal(actual, kernels.attention(qkv, 12, causal))
    exact = clip_ttrt.ops.attention_reference(qkv.double(), 12, causal)
    library = clip_ttrt.ops.attention_reference(qkv, 12, causal)
    assert (actual - exact).abs().max() <= 2 * (library - exact).abs().max()
