"""The embedded model's training: tokens, the loss, and a short run on the CPU."""
import json
import random
from dataclasses import replace
from pathlib import Path

import clip
import pytest
import torch
import torch.nn.functional as F

from clip_ttrt import encoders
from clip_ttrt.demo import captions, packing, scenes
from clip_ttrt.models import Dimensions
from experiments import train_demo

TINY = Dimensions(32, 112, 16, 64, 2, 77, 49408, 64, 2)


@pytest.fixture
def options(tmp_path) -> train_demo.Options:
    return train_demo.Options(
        device="cpu", steps=12, batch=32, short=8, learning_rate=2e-3, evaluations=0, per_class=1,
        log_every=1, out=str(tmp_path / "demo.safetensors"), report=str(tmp_path / "demo.json"))


@pytest.fixture(scope="module")
def tokens() -> train_demo.CaptionTokens:
    return train_demo.CaptionTokens()


def test_tokens_are_the_tokenizer_s(tokens):
    """Of any caption, and of the full and short codes of scenes."""
    def padded(table):
        ids = tokens.ids[table.long()]
        return F.pad(ids, (0, 77 - ids.shape[1]))

    lines = list(captions.all_captions())
    chosen = random.Random(0).sample(range(len(lines)), 3000)
    theirs = clip.tokenize([lines[index] for index in chosen]).long()
    assert torch.equal(padded(tokens.table.flatten(0, 1)[chosen]), theirs)
    attributes = scenes.training_scenes(64, torch.Generator().manual_seed(0)).attributes
    template = torch.arange(64) % captions.TEMPLATES
    for codes in (train_demo.full_codes(attributes, torch.arange(64) % 2 == 0),
                  train_demo.short_codes(attributes, (False, True, True, False, False, False)),
                  train_demo.short_codes(attributes, (True, False, False, False, True, False))):
        lines = map(captions.caption, codes.tolist(), template.tolist())
        assert torch.equal(padded(tokens(codes, template)), clip.tokenize([*lines]).long())


def test_short_captions_hold_for_every_scene_with_the_same_key():
    attributes = scenes.training_scenes(512, torch.Generator().manual_seed(0)).attributes
    codes = train_demo.short_codes(attributes, (False, False, True, True, False, False))
    assert len(captions.code_of(codes, captions.CAPTION_SIZES).unique()) <= 2 * 8 * 8
    assert torch.equal(codes[:, 2:4], attributes[:, 2:4])
    assert torch.equal(codes[:, 0] == captions.SINGULAR, attributes[:, 0] == 0)


def test_loss_is_clip_s_but_equal_captions_are_no_negatives():
    images, texts = torch.randn(2, 12, 8, generator=torch.Generator().manual_seed(0))
    logits = 20 * F.normalize(images, dim=-1) @ F.normalize(texts, dim=-1).T
    labels = torch.arange(12)
    expected = (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2
    loss = train_demo.contrastive_loss(images, texts, labels, torch.tensor(20.0))
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)
    features, scale = torch.eye(4).repeat_interleave(3, dim=0), torch.tensor(100.0)
    keys = torch.arange(4).repeat_interleave(3)
    assert train_demo.contrastive_loss(features, features, keys, scale).abs() < 1e-5
    assert train_demo.contrastive_loss(features, features, labels, scale) > 1


def test_packed_weights_compute_what_was_trained(tokens):
    """Trimmed texts over the rows in use give the features of full texts over the vocabulary."""
    model = train_demo.DemoClip(TINY, len(tokens.ids)).initialise(torch.Generator().manual_seed(0))
    for parameter in model.eval().parameters():
        parameter.data = parameter.data.half().float()
    state_dict = packing.unpack(model.packed(tokens.ids), TINY.vocab_size)
    combinations = captions.held_out_sample()[:16]
    pictures = scenes.to_input(scenes.picture_set(combinations, 1, 0)[0])
    texts = clip.tokenize([captions.caption(row) for row in combinations.tolist()])
    with torch.no_grad():
        trained = model.text(tokens(combinations, torch.zeros(16, dtype=torch.int64)))
        for shipped, own in ((encoders.text_encoder(state_dict)(texts), trained),
                             (encoders.image_encoder(state_dict)(pictures), model.image(pictures))):
            torch.testing.assert_close(shipped, own, rtol=1e-5, atol=1e-6)


def test_a_short_run_learns_and_leaves_loadable_files(options):
    report = train_demo.train(options, TINY)
    losses = [entry["loss"] for entry in report["history"]]
    assert sum(losses[-3:]) < sum(losses[:3])
    assert json.loads(Path(options.report).read_text()) == report
    assert report["finished"] and report["steps"] == 12
    state_dict = train_demo.read_weights(options.out)
    assert state_dict["token_embedding.weight"].shape == (49408, 64)
    assert all(torch.equal(value, value.half().float()) for value in state_dict.values())
    figures = report["figures"]
    shares = [value for name, value in figures.items() if "top1" in name or "recall" in name]
    assert len(shares) == 5 and all(0 <= share <= 1 for share in shares)
    assert figures["held_out_top1_of_all"] <= figures["held_out_top1"]
    assert figures["held_out_classes"] >= 100


def test_a_stopped_run_leaves_files_marked_unfinished(options, monkeypatch):
    batch_losses, left = train_demo.batch_losses, iter(range(3))

    def stop_at_fourth(*arguments):
        if next(left, None) is None:
            raise KeyboardInterrupt
        return batch_losses(*arguments)

    monkeypatch.setattr(train_demo, "batch_losses", stop_at_fourth)
    with pytest.raises(KeyboardInterrupt):
        train_demo.train(replace(options, steps=4, evaluations=1), TINY)
    assert json.loads(Path(options.report).read_text())["finished"] is False
    train_demo.read_weights(options.out)


def test_options_are_those_of_the_command_line_and_impossible_ones_are_refused(options):
    asked = train_demo.parse(["--steps", "7", "--seconds", "20.5", "--out", "x"])
    assert asked == train_demo.Options(steps=7, seconds=20.5, out="x")
    for batch, short, word in ((3, 2, "even"), (4, 6, "short")):
        with pytest.raises(ValueError, match=word):
            train_demo.train(replace(options, batch=batch, short=short), TINY)
    shares = [train_demo.learning_rate_share(step / 100, 0.05) for step in range(101)]
    assert shares[0] == 0 and shares[5] == 1 and abs(shares[100]) < 1e-12
    assert shares[5:] == sorted(shares[5:], reverse=True)
