"""`load`: a drop-in for what `clip.load` returns, for any batch and from several threads."""
import contextlib
import threading
from concurrent.futures import ThreadPoolExecutor

import clip
import pytest
import torch

import clip_ttrt
from clip_ttrt.verify import exact_fp32
from clip_ttrt.checkpoint import load_checkpoint, original_model
from clip_ttrt.contexts import MOST_GRAPHS, bucket
from clip_ttrt.demo import scenes
from clip_ttrt.options import BatchRange


@pytest.fixture(scope="module", params=["demo_artifact", pytest.param("demo_engines", marks=pytest.mark.gpu)])
def loaded(request):
    """The same tests for TorchScript (on a GPU in fp16, where there is one) and for TensorRT engines."""
    artifact = request.getfixturevalue(request.param)
    return clip_ttrt.load(artifact.folder, device=artifact.device)


@pytest.fixture(scope="module")
def model(loaded):
    return loaded[0]


@pytest.fixture(scope="module")
def original():
    checkpoint = load_checkpoint("demo")
    model = original_model(checkpoint.dimensions)
    model.load_state_dict(checkpoint.state_dict)
    return model.eval()


@pytest.fixture(scope="module")
def images(model):
    return scenes.to_input(scenes.held_out_set(per_class=1)[0][:20]).to(model.device)


@pytest.fixture(scope="module")
def tokens(model):
    return clip.tokenize(scenes.held_out_classes()[:20]).to(model.device)


def close(actual, expected):
    """Rows equal to rounding: of fp32 on the CPU, of fp16 on a GPU."""
    error = (actual.cpu() - expected.cpu()).norm(dim=1) / expected.cpu().norm(dim=1)
    return actual.shape == expected.shape and error.max() < (1e-5 if actual.device.type == "cpu" else 1e-2)


def test_the_interface_of_clip(loaded, original):
    model, preprocess = loaded
    assert model.visual.input_resolution == original.visual.input_resolution == 112
    assert model.context_length == 77 and model.vocab_size == 49408
    assert torch.isclose(model.logit_scale.cpu(), original.logit_scale)
    assert not model.training and model.eval() is model
    assert preprocess(scenes_picture()).shape == (3, 112, 112)


def scenes_picture():
    from PIL import Image

    return Image.new("RGB", (200, 150), (10, 200, 30))


@pytest.mark.parametrize("count", [0, 1, 2, 3, 8, 9, 16, 17, 20])
def test_any_batch_is_split_and_padded(model, original, images, tokens, count):
    with torch.no_grad():
        for actual, expected in ((model.encode_image(images[:count]), original.encode_image(images[:count].cpu()) if count else None),
                                 (model.encode_text(tokens[:count]), original.encode_text(tokens[:count].cpu()) if count else None)):
            assert actual.shape == (count, 256) and actual.dtype == torch.float32
            assert count == 0 or close(actual, expected)


def test_logits(model, original, images, tokens):
    with torch.no_grad(), exact_fp32():
        expected = original(images.cpu(), tokens[:7].cpu())
        actual = model(images, tokens[:7])
    assert actual[0].shape == (20, 7) and actual[1].shape == (7, 20)
    assert all((a.cpu() - e).abs().max() < (1e-3 if model.device.type == "cpu" else 0.5) for a, e in zip(actual, expected))


@pytest.mark.parametrize("change", [lambda x: x.double(), lambda x: x.half(), lambda x: x.flip(0).flip(0), lambda x: x.permute(0, 1, 3, 2).contiguous().permute(0, 1, 3, 2)])
def test_other_dtypes_and_layouts_of_images(model, images, change):
    expected = model.encode_image(images)
    assert (model.encode_image(change(images)) - expected).norm() / expected.norm() < 5e-3  # half rounds the pixels


def test_a_non_contiguous_batch(model, images):
    stride = images.repeat_interleave(2, dim=0)[::2]
    assert not stride.is_contiguous()
    assert close(model.encode_image(stride), model.encode_image(images))


def test_tokens_of_both_integer_dtypes_and_of_any_length(model, tokens):
    expected = model.encode_text(tokens)
    longest = int((tokens != 0).sum(dim=1).max())
    assert close(model.encode_text(tokens.long()), expected)
    assert close(model.encode_text(tokens[:, :longest]), expected)
    assert close(model.encode_text(tokens.t().contiguous().t()), expected)


@pytest.mark.parametrize("bad, sentence", [
    (torch.zeros(2, 3, 111, 112), "have shape"),
    (torch.zeros(3, 112, 112), "have shape"),
    (torch.zeros(2, 1, 112, 112), "have shape"),
    (torch.zeros(2, 3, 112, 112, dtype=torch.uint8), "have dtype"),
    ("picture.png", "expected a floating-point tensor"),
])
def test_bad_images(model, bad, sentence):
    with pytest.raises(ValueError, match=sentence):
        model.encode_image(bad.to(model.device) if isinstance(bad, torch.Tensor) else bad)


@pytest.mark.parametrize("bad, sentence", [
    (torch.zeros(2, 78, dtype=torch.int32), "have shape"),
    (torch.zeros(2, 0, dtype=torch.int32), "have shape"),
    (torch.zeros(77, dtype=torch.int32), "have shape"),
    (torch.zeros(2, 77), "have dtype"),
    (["a cat"], "expected an integer tensor"),
])
def test_bad_tokens(model, bad, sentence):
    with pytest.raises(ValueError, match=sentence):
        model.encode_text(bad.to(model.device) if isinstance(bad, torch.Tensor) else bad)


@pytest.mark.parametrize("token", [-1, 49408, 2**31 - 1])
def test_tokens_outside_the_vocabulary_never_give_an_answer(model, tokens, token):
    bad = tokens[:3].clone()
    bad[1, 5] = token
    if model.device.type == "cpu":
        with pytest.raises(ValueError, match="outside the vocabulary"):
            model.encode_text(bad)
    else:
        features = model.encode_text(bad)
        assert features[1].isnan().all() and not features[0].isnan().any() and not features[2].isnan().any()


@pytest.mark.parametrize("token", [-1, 49408, 2**31 - 1, -2**31, 2**32 + 5, -2**32 + 5])
def test_a_saved_module_never_answers_tokens_outside_the_vocabulary(loaded, tokens, token):
    """Nor where an id comes back into the vocabulary when cut to 32 bits."""
    artifact = loaded[0].artifact
    module = torch.jit.load(str(artifact.path("text")), map_location=artifact.device)
    with torch.no_grad():
        expected = module(tokens[:3])
        bad = tokens[:3].long()
        bad[1, 40] = token
        features = module(bad)
    assert features[1].isnan().all() and torch.equal(features[[0, 2]], expected[[0, 2]])


def test_a_tensor_on_another_device(model, images):
    with pytest.raises(ValueError, match="and the model is on"):
        model.encode_image(images.to("meta"))


def test_moving_the_model_does_not_touch_the_modules(model, images):
    expected = model.encode_image(images)
    assert torch.equal(model.float().encode_image(images), expected)


def test_threads_get_their_own_answers(model, images):
    """Threads with batches of their own and, on a GPU, streams of their own."""
    expected = [model.encode_image(images[i: i + 1 + i % 9]) for i in range(11)]
    if images.is_cuda:
        torch.cuda.synchronize()

    def work(seed):
        with torch.cuda.stream(torch.cuda.Stream()) if images.is_cuda else contextlib.nullcontext():
            for step in range(12):
                i = (seed * 5 + step) % 11
                assert close(model.encode_image(images[i: i + 1 + i % 9]), expected[i])

    in_threads(work, 6)


def in_threads(work, count):
    """work(0), work(1), ... at once; what one of them raises is raised."""
    with ThreadPoolExecutor(count) as pool:
        for future in [pool.submit(work, seed) for seed in range(count)]:
            future.result()


def test_calls_on_the_cpu_run_at_once(demo_artifact):
    """Two calls meet inside the module: a lock around it would break the barrier."""
    if demo_artifact.device != "cpu":
        pytest.skip("the artifact is a GPU's")
    model, _ = clip_ttrt.load(demo_artifact.folder, contexts=3)
    [encoder] = [each for name, each in model._encoders.items() if name == "text"]
    module, barrier = encoder.module, threading.Barrier(2, timeout=30)

    def meeting(x):
        barrier.wait()
        return module(x)

    encoder.module = meeting
    tokens = torch.ones(2, 77, dtype=torch.int32)
    in_threads(lambda seed: model.encode_text(tokens), 2)


def test_a_size_gets_a_graph_of_its_own_while_there_are_few():
    span = BatchRange(2, 8, 200)
    assert [bucket(count, (), span) for count in (1, 2, 3, 5, 77, 200)] == [2, 2, 3, 5, 77, 200]
    assert bucket(77, range(100, 100 + MOST_GRAPHS - 1), span) == 77


def test_beyond_that_a_size_is_padded_where_padding_is_cheap():
    span, full = BatchRange(2, 8, 200), range(3, 3 + MOST_GRAPHS)
    assert [bucket(count, full, span) for count in (3, 7, 14)] == [3, 7, 14]  # captured
    assert [bucket(count, full, span) for count in (1, 2, 15, 17, 31, 32)] == [2, 2, 16, 32, 32, 32]
    assert [bucket(count, full, span) for count in (33, 100, 129, 199)] == [None] * 4
    assert [bucket(count, full, span) for count in (64, 128, 200)] == [64, 128, 200]
    assert bucket(17, full, BatchRange(1, 4, 24)) == 24  # no graph is larger than the engine serves


def test_no_call_order_needs_more_graphs_than_padded_sizes_and_bounds():
    """Whatever comes, once the graphs are many their sizes are few: none is captured for long."""
    span, graphs, captures = BatchRange(1, 32, 256), {}, 0
    for step in range(3000):
        size = bucket(1 + (step * 97) % 256, graphs, span)
        if size is None:
            continue
        if size not in graphs:
            captures += 1
            if len(graphs) == MOST_GRAPHS:
                graphs.pop(next(iter(graphs)))
        graphs[size] = graphs.pop(size, None)
        assert len(graphs) <= MOST_GRAPHS
    assert captures <= MOST_GRAPHS + 9  # powers of two up to 256


@pytest.mark.parametrize("contexts", [0, -1])
def test_a_model_needs_a_context(demo_artifact, contexts):
    with pytest.raises(clip_ttrt.UserError, match=f"contexts={contexts}: a model needs at least 1"):
        clip_ttrt.load(demo_artifact.folder, contexts=contexts)


def test_warmup_and_memory_on_any_device(model):
    model.warmup([1, 3])
    model.warmup()
    memory = model.memory()
    assert memory.keys() == {"weights", "contexts", "graphs"} and memory["weights"] > 1
    assert (memory["graphs"] > 0) is (model.device.type == "cuda")
    with pytest.raises(ValueError, match="batch 0: a batch to warm up for"):
        model.warmup([4, 0])
