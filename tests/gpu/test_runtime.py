"""The call on a GPU: graphs, inputs, streams and threads, equal to a model without graphs."""
import random
import threading
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest
import torch

import clip_ttrt
import needs
from clip_ttrt import contexts
from clip_ttrt.verify import COSINE_BOUND
from experiments.timing import graphed, percentile, wall_times_ms

pytestmark = pytest.mark.gpu

ENCODERS = pytest.mark.parametrize("encoder", ["image", "text"])
END_OF_TEXT, WORDS = 49407, 49406


def rows(encoder, count, seed=0):
    """Images float32 [count, 3, 112, 112] or tokens int32 [count, 77] on the GPU."""
    generator = torch.Generator().manual_seed(seed)
    if encoder == "image":
        return torch.randn(count, 3, 112, 112, generator=generator).cuda()
    tokens = torch.randint(1, WORDS, (count, 77), generator=generator, dtype=torch.int32)
    for row in range(count):
        end = 3 + (5 * row + seed) % 6
        tokens[row, end], tokens[row, end + 1:] = END_OF_TEXT, 0
    return tokens.cuda()


def encode(model, encoder):
    return model.encode_image if encoder == "image" else model.encode_text


@pytest.fixture
def model(demo_engines):
    """A model with graphs that has captured none yet."""
    return clip_ttrt.load(demo_engines.folder)[0]


@pytest.fixture(scope="module")
def plain(demo_engines):
    return clip_ttrt.load(demo_engines.folder, cuda_graphs=False)[0]


def context_of(model, encoder):
    [context] = model._encoders[encoder].contexts
    return context


def graphs_of(model, encoder):
    """Batch size -> graph, of images or of texts at their full length."""
    return context_of(model, encoder).graphs[112 if encoder == "image" else 77]


def close(features, expected):
    """Within the bound of a cosine in fp16, as batches of another length are."""
    return torch.cosine_similarity(features, expected).min() >= COSINE_BOUND["fp16"]


@ENCODERS
def test_graphs_of_one_context_stay_right(model, plain, encoder):
    call, expected = encode(model, encoder), encode(plain, encoder)
    graphs = graphs_of(model, encoder)
    for size in (8, 4, 2):
        call(rows(encoder, size))
    assert list(graphs) == [8, 4, 2] and not graphs_of(plain, encoder)
    order = random.Random(0)
    for step in range(60):
        x = rows(encoder, order.choice((8, 4, 2)), seed=step)
        assert torch.equal(call(x), expected(x))


@ENCODERS
def test_results_are_the_caller_s_own(model, plain, encoder):
    """Also where the first call, which captures, is in inference mode."""
    call, kept = encode(model, encoder), encode(plain, encoder)(rows(encoder, 4, 1))
    with torch.inference_mode():
        call(rows(encoder, 4, 2))
    first = call(rows(encoder, 4, 1))
    second = call(rows(encoder, 4, 2))
    assert torch.equal(first, kept) and not torch.equal(first, second)
    second.zero_()
    assert torch.equal(call(rows(encoder, 4, 1)), kept)


@ENCODERS
def test_few_graphs_are_kept_and_other_sizes_padded(model, plain, encoder, monkeypatch):
    monkeypatch.setattr(contexts, "MOST_GRAPHS", 3)
    captured = graphs_of(model, encoder)
    seen = ((2, 2, [2]), (3, 3, [2, 3]), (4, 4, [2, 3, 4]), (2, 2, [3, 4, 2]),
            (8, 8, [4, 2, 8]), (5, 8, [4, 2, 8]), (3, 4, [2, 8, 4]))
    for count, size, graphs in seen:
        x = rows(encoder, size, seed=count)
        expected = encode(plain, encoder)(x)[:count]
        assert torch.equal(encode(model, encoder)(x[:count]), expected)
        assert list(captured) == graphs


def forms(encoder, x):
    """The same rows in other types, layouts and places."""
    if encoder == "image":
        for dtype in (torch.half, torch.bfloat16, torch.double):
            yield x.to(dtype)
        yield x.half().cpu().pin_memory()
        yield x.to(memory_format=torch.channels_last)
        yield x.clone().requires_grad_()
    else:
        yield x.long()
        yield x.long().cpu().pin_memory()
        for length in (9, 30, 12, 77, 10):  # all texts end by the ninth token
            yield x[:, :length]
            yield x[:, :length].contiguous().cpu().pin_memory()
    strided = x.repeat_interleave(2, dim=0)[::2]
    yield from (strided, strided.cpu(), x.cpu(), x.cpu().pin_memory())


@ENCODERS
def test_inputs_of_any_type_layout_and_place(model, plain, encoder):
    for x in (x for seed in range(2) for x in forms(encoder, rows(encoder, 3, seed))):
        whole = x.detach().cuda().contiguous()
        if encoder == "image":
            whole = whole.float()
        else:
            whole = torch.nn.functional.pad(whole, (0, 77 - x.shape[1])).int()
        expected = encode(plain, encoder)(whole)
        for each in (model, plain):
            features = encode(each, encoder)(x)
            assert features.is_cuda and not features.requires_grad
            as_long = encoder == "image" or x.is_cuda and x.shape[1] == 77
            assert (torch.equal if as_long else close)(features, expected)
    lengths = {length for length, each in context_of(model, encoder).graphs.items() if each}
    assert lengths == ({112} if encoder == "image" else {16, 32, 77})
    assert list(graphs_of(model, encoder)) == [3]


@ENCODERS
@pytest.mark.parametrize("place", ["gpu", "pinned"])
def test_a_call_does_not_wait(model, encoder, place):
    x = rows(encoder, 4)
    x = x if place == "gpu" else x.cpu().pin_memory()
    expected = encode(model, encoder)(x)
    stream = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(1)
        encode(model, encoder)(x)  # whose memory the next call reuses
    stream.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        with torch.cuda.stream(stream):
            torch.cuda._sleep(int(5e8))  # a quarter of a second
            features = encode(model, encoder)(x)
            waited = stream.query()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    stream.synchronize()
    assert not waited and torch.equal(features, expected)


@ENCODERS
@pytest.mark.parametrize("last", [4, 8])
def test_a_caller_captures_a_graph_of_his_own(model, plain, encoder, last):
    """Also where the module's last run had another batch size."""
    call, x = encode(model, encoder), rows(encoder, 4)
    for size in (4, last):
        call(rows(encoder, size))
    held = {}
    replay = graphed(lambda: held.update(features=call(x)))
    for seed in (1, 2):
        x.copy_(rows(encoder, 4, seed))
        replay()
        assert torch.equal(held["features"], encode(plain, encoder)(x))
    eight = rows(encoder, 8, 3)
    assert torch.equal(call(eight), encode(plain, encoder)(eight))


@pytest.mark.parametrize("at_once", [1, 2])
def test_threads_on_streams_get_their_own_answers(demo_engines, plain, at_once):
    """Eight threads capture and replay, each on its stream, while two others allocate."""
    model, _ = clip_ttrt.load(demo_engines.folder, contexts=at_once)
    cases = [(encoder, rows(encoder, count, count)) for encoder in ("image", "text")
             for count in (1, 2, 3, 5, 8, 11)]
    cases = [(encoder, x, encode(plain, encoder)(x)) for encoder, x in cases]
    torch.cuda.synchronize()
    ended = threading.Event()

    def work(seed):
        order, stream = random.Random(seed), torch.cuda.Stream()
        with torch.cuda.stream(stream):
            for _ in range(12):
                asked = order.sample(cases, 5)
                found = [encode(model, encoder)(x) for encoder, x, _ in asked]
                for features, (_, _, expected) in zip(found, asked, strict=True):
                    assert torch.equal(features, expected)

    def allocate(seed):
        order = random.Random(seed)
        with torch.cuda.stream(torch.cuda.Stream()):
            while not ended.is_set():
                held = [torch.ones(order.randrange(1, 1 << 23), device="cuda") for _ in range(4)]
                assert all(float(each[-1]) == 1 for each in held)

    with ThreadPoolExecutor(10) as pool:
        others = [pool.submit(allocate, seed) for seed in range(2)]
        try:
            list(pool.map(work, range(8)))
        finally:
            ended.set()
        for future in others:
            future.result()


def test_one_context_is_in_order_across_streams(model, plain):
    """Each call waits, on the GPU, for the call before it on a stream that is kept busy."""
    inputs = [rows("image", 4, seed) for seed in range(6)]
    expected = [plain.encode_image(x) for x in inputs]
    model.warmup([4])
    torch.cuda.synchronize()
    found = []
    for x in inputs:
        with torch.cuda.stream(torch.cuda.Stream()):
            torch.cuda._sleep(int(2e7))
            found.append(model.encode_image(x))
    torch.cuda.synchronize()
    for features, right in zip(found, expected, strict=True):
        assert torch.equal(features, right)


def test_two_contexts_serve_two_streams_and_warm_up(demo_engines, plain):
    model, _ = clip_ttrt.load(demo_engines.folder, contexts=2)
    empty, files = model.memory(), demo_engines.manifest["modules"].values()
    assert empty["graphs"] == 0 and empty["contexts"] >= 0
    assert empty["weights"] == pytest.approx(2 * sum(each["mib"] for each in files))
    x, streams, found = rows("image", 4), [torch.cuda.Stream() for _ in range(2)], []
    torch.cuda.synchronize()
    for stream in streams * 3:
        with torch.cuda.stream(stream):
            found.append(model.encode_image(x))
    torch.cuda.synchronize()
    assert [context.stream for context in model._encoders["image"].contexts] == streams
    assert all(torch.equal(features, plain.encode_image(x)) for features in found)
    model.warmup([4])
    one = model.memory()["graphs"]
    model.warmup()  # 2, 4 and 8
    assert 0 < one < model.memory()["graphs"]
    for encoder in model._encoders.values():
        sizes = [sorted(graphs) for context in encoder.contexts
                 for graphs in context.graphs.values()]
        assert sizes == [[2, 4, 8]] * 2 * len(encoder.lengths)


def test_a_failed_capture_is_done_without_and_leaves_all_as_it_was(model, plain):
    """A capture that runs out of memory half way, for real but for the exhaustion itself."""
    x, context, before = rows("image", 4), context_of(model, "image"), torch.cuda.current_stream()
    module, captures = context.module, []

    def exhausted(rows):
        if torch.cuda.is_current_stream_capturing():
            captures.append(len(rows))
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")
        return module(rows)

    context.module = exhausted
    for _ in range(2):
        assert torch.equal(model.encode_image(x), plain.encode_image(x))
    assert captures == [4] and model.memory()["graphs"] == 0
    graphs = graphs_of(model, "image")
    assert graphs == {4: None} and torch.cuda.current_stream() == before
    context.module = module
    two = rows("image", 2)
    assert torch.equal(model.encode_image(two), plain.encode_image(two))
    assert graphs[2] is not None


@pytest.fixture(scope="module", params=["tensorrt", pytest.param("fused", marks=needs.fused)])
def short(request, tmp_path_factory):
    """A model of each kind of kernels, for the batches of the default range's like."""
    artifact = clip_ttrt.compile(batch="1:32:128", backend="tensorrt", kernels=request.param,
                                 encoder="text", output=tmp_path_factory.mktemp("short") / "a")
    return clip_ttrt.load(artifact.folder)[0]


@pytest.mark.parametrize("length", [9, 16, 17, 32, 48, 50])
@pytest.mark.parametrize("count", [1, 5, 32, 200])
def test_texts_at_their_own_length_have_the_full_length_s_features(short, count, length):
    """Tokens on the CPU, on the GPU with the length that is told, and with columns cut."""
    tokens = rows("text", count)
    tokens[:, length - 1:] = 0
    tokens[0, :length - 1] = torch.arange(1, length, device="cuda")
    tokens[0, length - 1] = END_OF_TEXT
    expected, graphs = short.encode_text(tokens), context_of(short, "text").graphs
    served = min(each for each in graphs if each >= length)
    for features in (short.encode_text(tokens.cpu()), short.encode_text(tokens, length=length),
                     short.encode_text(tokens[:, :length].long())):
        assert close(features, expected)
    assert graphs[served] and graphs[77]
    unknown = tokens.clone()
    unknown[0, 3], unknown[0, 70] = 49408, 49408  # the second is behind what is read
    assert short.encode_text(unknown, length=length)[0].isnan().all()
    unknown[0, 3] = 5
    assert not short.encode_text(unknown, length=length).isnan().any()


def test_a_length_that_is_told_costs_no_wait(short):
    tokens = rows("text", 4)
    short.encode_text(tokens, length=16)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        torch.cuda._sleep(int(5e8))  # a quarter of a second
        short.encode_text(tokens, length=16)
        waited = torch.cuda.current_stream().query()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert not waited


def test_a_caller_captures_texts_of_several_lengths(short):
    """The first run of a shape cannot be captured, so it is run beside the capture."""
    tokens, held = rows("text", 4), {}  # which end within 9 tokens
    for length in (16, 48, 77):
        call = partial(short.encode_text, tokens, length=length)
        replay = graphed(lambda: held.update(features=call()))
        tokens.copy_(rows("text", 4, seed=length))
        replay()
        assert close(held["features"], short.encode_text(tokens))


@needs.fused
def test_prompts_of_16_tokens_take_a_third_of_the_full_length_s_time(tmp_path):
    """ViT-B/32 as called, one call at a time, at batch 128."""
    artifact = clip_ttrt.compile(
        model="ViT-B/32", weights="random", batch="1:32:128", backend="tensorrt", kernels="fused",
        encoder="text", output=tmp_path / "a")
    model, _ = clip_ttrt.load(artifact.folder)
    tokens, milliseconds = rows("text", 128), {}
    for length in (77, 16, 77, 16):
        times = wall_times_ms(
            lambda length=length: model.encode_text(tokens, length=length), 200, 40, "cuda")
        milliseconds[length] = percentile(times, 0.5)
    print(f"{milliseconds[16]:.4f} ms of {milliseconds[77]:.4f}")
    assert milliseconds[16] <= 0.34 * milliseconds[77], milliseconds
