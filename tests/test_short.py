"""Texts are cut behind the longest pooled position of a batch, and padded to one of few lengths."""
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from random import Random

import pytest
import torch

import clip_ttrt
from clip_ttrt import graph, guard, linear, ops, verify
from clip_ttrt.checkpoint import load_checkpoint, original_with_weights
from clip_ttrt.contexts import Encoder
from clip_ttrt.models import MODELS
from clip_ttrt.options import BatchRange
import small
from lowering import encoder_in

START, END = 49406, 49407


def texts(*lengths, seed=0):
    """Tokens int32 [N, 77] of texts with so many tokens, start and end included."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(1, START, (len(lengths), 77), generator=generator, dtype=torch.int32)
    for row, length in zip(tokens, lengths, strict=True):
        row[0], row[length - 1], row[length:] = START, END, 0
    return tokens


@pytest.fixture(scope="module")
def original():
    return original_with_weights(load_checkpoint("demo"), "cpu")


@pytest.fixture
def model(demo_artifact):
    """On the CPU, for batches of 2 to 8; `shapes` is what its text module has been called with."""
    if demo_artifact.device != "cpu":
        pytest.skip("the artifact is a GPU's")
    found, _ = clip_ttrt.load(demo_artifact.folder)
    encoder = found._encoders["text"]
    module, found.shapes = encoder.module, []
    encoder.module = lambda x: (found.shapes.append(tuple(x.shape)), module(x))[1]
    return found


def close(features, expected):
    """Rows equal to rounding in fp32."""
    error = (features - expected).norm(dim=1) / expected.norm(dim=1)
    return features.shape == expected.shape and error.max() < 1e-5


@pytest.mark.parametrize("lengths, shapes", [
    ((2, 16), [(2, 16)]), ((17, 3, 9), [(3, 32)]), ((32,), [(2, 32)]), ((5, 33), [(2, 48)]),
    ((49, 48), [(2, 77)]), ((77, 2), [(2, 77)]),
    ((*range(2, 10), *range(10, 50, 5), 20, 30, 17), [(8, 16), (8, 48), (3, 32)]),
], ids=str)  # a batch beyond the maximum is split, and each part has a longest text of its own
@torch.no_grad()
def test_a_batch_is_as_long_as_its_longest_text_and_features_are_the_full_length_s(
        model, original, lengths, shapes):
    tokens = texts(*lengths)
    assert close(model.encode_text(tokens), original.encode_text(tokens))
    assert model.shapes == shapes
    assert close(model.encode_text(tokens[:, :max(lengths)].long()), original.encode_text(tokens))
    assert model.shapes == 2 * shapes


@torch.no_grad()
def test_the_pooled_position_is_that_of_the_first_highest_id_whatever_stands_there(model, original):
    """No end: nothing at all, and words; two ends; words behind the end; full of ends."""
    odd = texts(77, 77, 9, 9, 40)
    odd[0], odd[4], odd[1, 0], odd[1, 12], odd[1, 13:] = 0, END, 5, START, 7
    odd[2, 30], odd[3, 9:] = END, 1234
    assert close(model.encode_text(odd), original.encode_text(odd))
    assert model.shapes == [(5, 16)]
    assert close(model.encode_text(odd[:1]), original.encode_text(odd[:1]))  # a batch of 1, padded


@torch.no_grad()
def test_a_layout_or_a_length_that_is_told_changes_nothing_on_the_cpu(model, original):
    tokens = texts(9, 20, 31)
    expected = original.encode_text(tokens)
    for each in (tokens.t().contiguous().t(), tokens.repeat_interleave(2, dim=0)[::2]):
        assert close(model.encode_text(each), expected)
    assert close(model.encode_text(tokens, length=5), expected)  # which is the GPU's
    assert {*model.shapes} == {(3, 32)}
    assert model.encode_text(tokens[:0]).shape == (0, 256)


@pytest.mark.parametrize("length", [0, -3, 78])
def test_a_length_that_no_text_has_is_refused(model, length):
    with pytest.raises(ValueError, match=f"length={length}: a text has 1 to 77 tokens"):
        model.encode_text(texts(9), length=length)


def test_an_id_outside_the_vocabulary_is_seen_behind_the_end_as_well(model):
    tokens = texts(9, 12)
    tokens[1, 60] = END + 1
    with pytest.raises(ValueError, match="outside the vocabulary"):
        model.encode_text(tokens)


@torch.no_grad()
def test_threads_with_texts_of_different_lengths_get_their_own_answers(model, original):
    lengths = (5, 16, 20, 40, 77, 33, 12)
    batches = [texts(length, 4, 1 + length // 2, seed=length) for length in lengths]
    expected = [original.encode_text(batch) for batch in batches]

    def work(seed):
        for i in Random(seed).sample(range(len(batches)), 5):
            assert close(model.encode_text(batches[i]), expected[i])

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(work, range(4)))


def test_tokens_elsewhere_are_cut_at_the_length_that_is_told_and_else_not(monkeypatch):
    """Nobody looks at them: a tensor of no memory has nothing to look at."""
    example = torch.empty(0, 77, dtype=torch.int32, device="meta")
    encoder = Encoder([lambda x: x.float()], BatchRange(2, 4, 8), 1, example, False, (16, 32, 77))
    tokens = texts(*[9] * 11).to("meta")
    for length, padded in ((None, 77), (20, 32), (16, 16), (1, 16), (77, 77), (33, 77)):
        assert encoder(tokens, length).shape == (11, padded)
    assert encoder(tokens[:, :20]).shape == encoder(tokens[:, :20], 40).shape == (11, 32)


def test_the_saved_module_serves_every_length_between_and_names_them(demo_artifact):
    module = torch.jit.load(str(demo_artifact.path("text")))
    tokens = texts(9, 12, 14).to(demo_artifact.device)
    with torch.no_grad():
        expected = module(tokens)
        for length in (16, 17, 50, 76):
            assert torch.allclose(module(tokens[:, :length]), expected, rtol=1e-3, atol=1e-3)
    for wrong in (tokens[:, :15], tokens.repeat(1, 2)[:, :78], tokens[0]):
        with pytest.raises(torch.jit.Error, match=r"\[batch\] \+ \[77\], from 16 on, got \["):
            module(wrong)


def test_what_is_not_causal_and_an_artifact_without_lengths_keep_the_full_length(
        demo_artifact, model, monkeypatch):
    tokens = texts(9, 12)
    modules = {name: {**facts} for name, facts in demo_artifact.manifest["modules"].items()}
    assert [*modules["text"].pop("lengths")] == [16, 32, 48, 77]
    older = replace(demo_artifact, manifest={**demo_artifact.manifest, "modules": modules})
    found = clip_ttrt.CompiledCLIP(older)
    assert found._encoders["text"].lengths == (77,)
    assert close(found.encode_text(tokens), model.encode_text(tokens))
    assert guard.lengths_of("text", replace(MODELS["demo"], image_pooling="probe")) == [77]
    assert guard.lengths_of("image", MODELS["demo"]) == [112]
    [tokens] = graph.capture(*encoder_in("demo", "text", "fp32")[:2], 77).graph.find_nodes(
        op="placeholder")
    assert tokens.meta["val"].shape[1] == 77


def test_linear_layers_are_measured_for_the_rows_of_every_length(monkeypatch):
    monkeypatch.setitem(MODELS, "small", replace(small.VIT, context_length=20))
    asked = set()

    def tune(rows, weight_shape, *_):
        asked.add(tuple(rows))
        return linear.pack(*weight_shape, False)

    monkeypatch.setattr(linear, "tune", tune)
    _, _, module = encoder_in("small", "text", "fp16", *graph.FUSE["text"])
    graph.run(module, [graph.tuning(BatchRange(1, 2, 3), (16, 20))])
    # All tokens, and the one that is pooled
    assert asked == {(16, 20, 32, 40, 48, 60), (1, 2, 3)}


@torch.no_grad()
def test_the_graph_of_plugins_serves_every_length():
    plain, _, module = encoder_in("demo", "text", "fp32", *graph.FUSE["text"])
    assert len(graph.calls(module, ops.positions_of)) == 1
    tokens = texts(9, 16, 12)
    for length in (16, 33, 77):
        assert close(module(tokens[:, :length]), plain(tokens))


def test_texts_to_verify_with_are_cut_where_they_are_longer():
    tokens = texts(2, 9, 40, 77, 16)
    for length in (16, 32, 48):
        found = verify.shortened(tokens, length)
        assert found.shape == tokens.shape
        assert found.argmax(1).tolist() == [min(each, length) - 1 for each in (2, 9, 40, 77, 16)]
        assert torch.equal(found[:, :length - 1], tokens[:, :length - 1])
        assert torch.equal(found[[0, 1, 4]], tokens[[0, 1, 4]]) and not found[:, length:].any()


def test_a_verification_sees_a_length_that_an_engine_gets_wrong(demo_artifact, monkeypatch):
    images, lines, _, _ = verify.inputs_for("demo", 112)
    modules = {"text": demo_artifact.manifest["modules"]["text"]}
    part = replace(demo_artifact, manifest={**demo_artifact.manifest, "modules": modules})
    encode, seen = verify.CompiledCLIP.encode_text, []

    def wrong(self, tokens):
        seen.append(tuple(tokens.shape))
        return encode(self, tokens) + 50 * (tokens.shape == (3, 32))

    monkeypatch.setattr(verify.CompiledCLIP, "encode_text", wrong)
    monkeypatch.setattr(verify, "batches_to_probe", lambda artifact: (1, 3, 20))
    report = verify.compare(part, load_checkpoint("demo"), (images, lines, None, "mine"))
    assert {(n, each) for n in (1, 3, 20) for each in (16, 32, 48, 77)} <= {*seen}
    [failure] = report["failures"]
    assert failure.startswith("text32: ") and failure.count("<") == 1 and "at batch 3" in failure
    assert [*report["errors"]] == ["text", "text16", "text32", "text48"]
