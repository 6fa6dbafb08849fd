"""`load`: a drop-in for what `clip.load` returns, for any batch and from several threads."""
import io
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import clip
import numpy as np
import pytest
import torch
from PIL import Image

import clip_ttrt
from clip_ttrt.verify import exact_fp32
from clip_ttrt.checkpoint import load_checkpoint, original_with_weights
from clip_ttrt.contexts import MOST_GRAPHS, bucket
from clip_ttrt.demo import scenes
from clip_ttrt.options import BatchRange


@pytest.fixture(scope="module",
                params=["demo_artifact", pytest.param("demo_engines", marks=pytest.mark.gpu)])
def loaded(request):
    """TorchScript (on a GPU in fp16, where there is one) and TensorRT engines."""
    artifact = request.getfixturevalue(request.param)
    return clip_ttrt.load(artifact.folder, device=artifact.device)


@pytest.fixture(scope="module")
def model(loaded):
    return loaded[0]


@pytest.fixture(scope="module")
def original():
    return original_with_weights(load_checkpoint("demo"), "cpu")


@pytest.fixture(scope="module")
def images(model):
    return scenes.to_input(scenes.held_out_set(per_class=1)[0][:20]).to(model.device)


@pytest.fixture(scope="module")
def tokens(model):
    return clip.tokenize(scenes.held_out_classes()[:20]).to(model.device)


def close(actual, expected):
    """Rows equal to rounding: of fp32 on the CPU, of fp16 on a GPU."""
    error = (actual.cpu() - expected.cpu()).norm(dim=1) / expected.cpu().norm(dim=1)
    return actual.shape == expected.shape and (error < (1e-2 if actual.is_cuda else 1e-5)).all()


def test_the_interface_of_clip(loaded, original):
    model, preprocess = loaded
    assert model.visual.input_resolution == original.visual.input_resolution == 112
    assert model.context_length == 77 and model.vocab_size == 49408
    assert model.dtype == torch.float32 and not model.training and model.eval() is model
    assert torch.isclose(model.logit_scale.cpu(), original.logit_scale)
    assert preprocess(Image.new("RGB", (200, 150), (10, 200, 30))).shape == (3, 112, 112)


class PillowDecoder:
    """As pipeline.decode's, for RGB pictures."""

    def __init__(self, mode, fitted, device, threads):
        assert (mode, fitted(Image.new("L", (9, 5))).size, threads) == ("exact", (112, 112), None)

    def decode(self, items):
        return [self.decode_one(one) for one in items]

    def decode_one(self, item):
        try:
            opened = Image.open(io.BytesIO(item)) if isinstance(item, bytes) else item
        except OSError:
            return ValueError("no picture")
        return SimpleNamespace(pixels=np.asarray(opened))


@pytest.fixture
def pictures(model, monkeypatch, tmp_path):
    """The same one as an image, a path, bytes and tensors; another; and a grey tensor."""
    decode = SimpleNamespace(Decoder=PillowDecoder)
    monkeypatch.setitem(sys.modules, "clip_ttrt.pipeline.decode", decode)
    model.__dict__.pop("_decoder", None)
    noise = np.random.default_rng(0).integers(0, 256, (90, 150, 3), np.uint8)
    image, path, tensor = Image.fromarray(noise), tmp_path / "noise.png", torch.from_numpy(noise)
    image.save(path)
    same = [image, path, str(path), path.read_bytes(), tensor, tensor.permute(2, 0, 1)]
    same += [one.to(model.device) for one in same[-2:]]
    yield [*same, image.rotate(90, expand=True), tensor[:, :, :1], tensor[None, :, :, 1]]
    model.__dict__.pop("_decoder", None)


def test_preprocess_and_encode_image_take_lists_of_pictures(loaded, pictures):
    model, preprocess = loaded
    noise = np.asarray(pictures[0])
    images = [preprocess(one) for one in (
        pictures[0], pictures[8], Image.fromarray(noise[:, :, 0]), Image.fromarray(noise[:, :, 1]))]
    expected = torch.stack([images[0]] * 8 + images[1:]).to(model.device)
    assert torch.equal(model.preprocess(pictures), expected)
    assert close(model.encode_image(pictures), model.encode_image(expected))
    assert close(model.encode_image(tuple(pictures[4:6])), model.encode_image(expected[4:6]))
    assert model.preprocess([]).shape == (0, 3, 112, 112)
    assert model.encode_image([]).shape == (0, 256)
    assert pictures[1].name == "noise.png"  # the caller's list is as it was


@pytest.mark.parametrize("bad, sentence", [
    (b"GIF87a", "picture 9: no picture"), ("nowhere.jpg", "picture 9: .*No such file.*nowhere.jpg"),
    (torch.zeros(9, 9, 3), r"picture 9: expected uint8 \[H, W, C\] or .*float32 \[9, 9, 3\]"),
    (torch.zeros(9, 9, 4, dtype=torch.uint8), r"picture 9: expected uint8 .*uint8 \[9, 9, 4\]"),
])
def test_a_bad_picture_of_a_list_is_named(model, pictures, bad, sentence):
    """Also behind the first batch that the engine takes."""
    for call in (model.preprocess, model.encode_image):
        with pytest.raises(ValueError, match=sentence):
            call([*pictures[:9], bad])


@pytest.mark.parametrize("count", [0, 1, 2, 3, 8, 9, 16, 17, 20])
def test_any_batch_is_split_and_padded(model, original, images, tokens, count):
    for name, rows in (("encode_image", images[:count]), ("encode_text", tokens[:count])):
        actual = getattr(model, name)(rows)
        assert actual.shape == (count, 256) and actual.dtype == torch.float32
        assert count == 0 or close(actual, getattr(original, name)(rows.cpu()))


def test_logits(model, original, images, tokens):
    with torch.no_grad(), exact_fp32():
        expected, actual = original(images.cpu(), tokens[:7].cpu()), model(images, tokens[:7])
    assert actual[0].shape == (20, 7) and actual[1].shape == (7, 20)
    for ours, theirs in zip(actual, expected, strict=True):
        assert (ours.cpu() - theirs).abs().max() < (0.5 if ours.is_cuda else 1e-3)


@pytest.mark.parametrize("change", [
    lambda x: x.double(), lambda x: x.half(), lambda x: x.repeat_interleave(2, dim=0)[::2],
    lambda x: x.permute(0, 1, 3, 2).contiguous().permute(0, 1, 3, 2)])
def test_other_dtypes_and_layouts_of_images(model, images, change):
    expected = model.float().encode_image(images)  # which moves and changes no module
    error = (model.encode_image(change(images)) - expected).norm() / expected.norm()
    assert error < 5e-3  # half rounds the pixels


def test_tokens_of_both_integer_dtypes_and_of_any_length(model, tokens):
    longest = int((tokens != 0).sum(dim=1).max())
    for change in (tokens.long(), tokens[:, :longest], tokens.t().contiguous().t()):
        assert close(model.encode_text(change), model.encode_text(tokens))


@pytest.mark.parametrize("name, bad, sentence", [
    ("images", torch.zeros(2, 3, 111, 112), r"expected images .*float32 \[2, 3, 111, 112\]"),
    ("images", torch.zeros(2, 3, 112, 112, dtype=torch.uint8), "expected images .*torch.uint8"),
    ("images", "picture.png", "expected images .*str"),
    ("images", torch.zeros(2, 3, 112, 112, device="meta"), "on meta, and the model is on"),
    ("tokens", torch.zeros(2, 78, dtype=torch.int32), r"expected tokens .*int32 \[2, 78\]"),
    ("tokens", torch.zeros(2, 77), "expected tokens .*torch.float32"),
])
def test_bad_inputs(model, name, bad, sentence):
    with pytest.raises(ValueError, match=sentence):
        (model.encode_image if name == "images" else model.encode_text)(bad)


@pytest.mark.parametrize("token", [-1, 49408, 2**31 - 1, -2**31, 2**32 + 5, -2**32 + 5])
def test_tokens_outside_the_vocabulary_never_give_an_answer(loaded, tokens, token):
    """Nor where an id comes back into the vocabulary when cut to 32 bits."""
    model, artifact = loaded[0], loaded[0].artifact
    module = torch.jit.load(str(artifact.path("text")), map_location=artifact.device)
    calls = [module] if artifact.device == "cpu" else [module, model.encode_text]
    bad = tokens[:3].long() if abs(token) > 2**31 else tokens[:3].clone()
    bad[1, 40] = token
    with torch.no_grad():
        for call in calls:
            features, expected = call(bad), call(tokens[:3])
            assert features[1].isnan().all() and torch.equal(features[[0, 2]], expected[[0, 2]])
    with pytest.raises(ValueError, match="outside the vocabulary"):
        model.encode_text(bad.cpu())


def test_threads_get_their_own_answers(model, images):
    batches = [images[i: i + 1 + i % 9] for i in range(11)]
    expected = [model.encode_image(batch) for batch in batches]

    def work(seed):
        for step in range(12):
            i = (seed * 5 + step) % 11
            assert close(model.encode_image(batches[i]), expected[i])

    with ThreadPoolExecutor(6) as pool:
        list(pool.map(work, range(6)))  # raises what a thread has raised


def test_calls_on_the_cpu_run_at_once(demo_artifact):
    """Two calls meet inside the module: a lock around it breaks the barrier."""
    if demo_artifact.device != "cpu":
        pytest.skip("the artifact is a GPU's")
    model, _ = clip_ttrt.load(demo_artifact.folder)
    encoder, barrier = model._encoders["text"], threading.Barrier(2, timeout=20)
    module = encoder.module
    encoder.module = lambda x: (barrier.wait(), module(x))[1]
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(model.encode_text, torch.ones(2, 3, 77, dtype=torch.int32)))


def test_a_size_has_a_graph_of_its_own_or_is_padded():
    span, full = BatchRange(2, 8, 200), range(3, 3 + MOST_GRAPHS)
    assert [bucket(count, full[1:], span) for count in (1, 3, 77, 200)] == [2, 3, 77, 200]
    assert [bucket(count, full, span) for count in (3, 7, 14)] == [3, 7, 14]  # captured before
    assert [bucket(count, full, span) for count in (1, 2, 15, 17, 32)] == [2, 2, 16, 32, 32]
    assert {bucket(count, full, span) for count in range(33, 201)} == {None, 64, 128, 200}
    assert bucket(17, full, BatchRange(1, 4, 24)) == 24  # no graph is larger than the engine serves


def test_warmup_memory_and_contexts_on_any_device(model):
    with pytest.raises(clip_ttrt.UserError, match="contexts=0: a model needs at least 1"):
        clip_ttrt.load(model.artifact.folder, contexts=0)
    model.warmup([1, 3])
    model.warmup()
    memory = model.memory()
    assert memory.keys() == {"weights", "contexts", "graphs"} and memory["weights"] > 1
    assert (memory["graphs"] > 0) is (model.device.type == "cuda")
    with pytest.raises(ValueError, match="batch 0: a batch to warm up for"):
        model.warmup([4, 0])
