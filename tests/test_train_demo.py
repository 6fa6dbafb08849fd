"""The embedded model's training: tokens, the loss, and a short run on the CPU."""
import json
import random

import clip
import pytest
import torch
import torch.nn.functional as F

from clip_ttrt import encoders
from clip_ttrt.demo import captions, packing, scenes
from clip_ttrt.models import Dimensions
from experiments import train_demo

TINY = Dimensions(32, 112, 16, 64, 2, 77, 49408, 64, 2)


@pytest.fixture(scope="module")
def tokens() -> train_demo.CaptionTokens:
    return train_demo.CaptionTokens()


def test_composed_tokens_are_the_tokenizers(tokens):
    lines = list(captions.all_captions())
    chosen = random.Random(0).sample(range(len(lines)), 3000)
    theirs = clip.tokenize([lines[index] for index in chosen])
    ours = tokens.ids[tokens.table.flatten(0, 1)[chosen].long()]
    assert torch.equal(F.pad(ours, (0, 77 - ours.shape[1])), theirs.long())


def test_tokens_of_codes_are_those_of_their_caption(tokens):
    attributes = scenes.training_scenes(64, torch.Generator().manual_seed(0)).attributes
    template = torch.arange(64) % captions.TEMPLATES
    for codes in (train_demo.full_codes(attributes, torch.arange(64) % 2 == 0),
                  train_demo.short_codes(attributes, (False, True, True, False, False, False)),
                  train_demo.short_codes(attributes, (True, False, False, False, True, False))):
        lines = [captions.caption(row, index) for row, index in zip(codes.tolist(), template.tolist())]
        ours = tokens.ids[tokens(codes, template)]
        assert torch.equal(F.pad(ours, (0, 77 - ours.shape[1])), clip.tokenize(lines).long())


def test_short_captions_hold_for_every_scene_with_the_same_key():
    attributes = scenes.training_scenes(512, torch.Generator().manual_seed(0)).attributes
    codes = train_demo.short_codes(attributes, (False, False, True, True, False, False))
    assert len(captions.code_of(codes, captions.CAPTION_SIZES).unique()) <= 2 * 8 * 8
    assert torch.equal(codes[:, 2:4], attributes[:, 2:4])
    assert torch.equal(codes[:, 0] == captions.SINGULAR, attributes[:, 0] == 0)


def test_loss_is_clips_where_all_captions_differ():
    generator = torch.Generator().manual_seed(0)
    images, texts = torch.randn(2, 12, 8, generator=generator).unbind(0)
    logits = 20 * F.normalize(images, dim=-1) @ F.normalize(texts, dim=-1).T
    labels = torch.arange(12)
    expected = (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2
    loss = train_demo.contrastive_loss(images, texts, labels, torch.tensor(20.0))
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)


def test_equal_captions_are_no_negatives():
    features = torch.eye(4).repeat_interleave(3, dim=0)
    keys = torch.arange(4).repeat_interleave(3)
    assert train_demo.contrastive_loss(features, features, keys, torch.tensor(100.0)).abs() < 1e-5
    assert train_demo.contrastive_loss(features, features, torch.arange(12), torch.tensor(100.0)) > 1


def test_learning_rate_warms_up_and_ends_at_zero():
    shares = [train_demo.learning_rate_share(step / 100, 0.05) for step in range(101)]
    assert shares[0] == 0 and shares[5] == 1 and abs(shares[100]) < 1e-12
    assert shares[5:] == sorted(shares[5:], reverse=True)


def test_packed_weights_compute_what_was_trained(tokens):
    """Trimmed texts over the rows in use, as trained, give the features of full texts over the whole vocabulary."""
    model = train_demo.DemoClip(TINY, len(tokens.ids)).initialise(torch.Generator().manual_seed(0)).eval()
    for parameter in model.parameters():
        parameter.data = parameter.data.half().float()
    state_dict = packing.unpack(model.packed(tokens.ids), TINY.vocab_size)
    combinations = captions.held_out_sample()[:16]
    pictures = scenes.to_input(scenes.picture_set(combinations, 1, 0)[0])
    with torch.no_grad():
        trained = model.text(tokens(combinations, torch.zeros(16, dtype=torch.int64)))
        shipped = encoders.text_encoder(state_dict)(clip.tokenize([captions.caption(row) for row in combinations.tolist()]))
        torch.testing.assert_close(shipped, trained, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(encoders.image_encoder(state_dict)(pictures), model.image(pictures), rtol=1e-5, atol=1e-6)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("train")
    options = train_demo.Options(device="cpu", steps=12, batch=32, short=8, learning_rate=2e-3, evaluations=0, per_class=1,
                                 log_every=1, out=str(folder / "demo.safetensors"), report=str(folder / "demo.json"))
    return options, train_demo.train(options, TINY)


def test_a_short_run_learns_and_leaves_loadable_files(run):
    options, report = run
    losses = [entry["loss"] for entry in report["history"]]
    assert sum(losses[-3:]) < sum(losses[:3])
    assert json.loads(open(options.report).read()) == report
    assert report["finished"] and report["steps"] == 12
    state_dict = train_demo.read_weights(options.out)
    assert state_dict["token_embedding.weight"].shape == (49408, 64)
    assert all(torch.equal(value, value.half().float()) for value in state_dict.values())


def test_figures_are_shares_over_enough_captions(run):
    figures = run[1]["figures"]
    assert figures["held_out_classes"] >= 100
    for name in ("held_out_top1", "held_out_top1_of_all", "train_top1", "recall_image_to_text", "recall_text_to_image"):
        assert 0 <= figures[name] <= 1
    assert figures["held_out_top1_of_all"] <= figures["held_out_top1"]


def test_a_stopped_run_leaves_files_marked_unfinished(tmp_path, monkeypatch):
    options = train_demo.Options(device="cpu", steps=4, batch=8, short=4, evaluations=1, per_class=1, log_every=1,
                                 out=str(tmp_path / "demo.safetensors"), report=str(tmp_path / "demo.json"))
    calls = []

    def stop_at_fourth(*arguments):
        calls.append(None)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return batch_losses(*arguments)

    batch_losses = train_demo.batch_losses
    monkeypatch.setattr(train_demo, "batch_losses", stop_at_fourth)
    with pytest.raises(KeyboardInterrupt):
        train_demo.train(options, TINY)
    assert json.loads(open(options.report).read())["finished"] is False
    train_demo.read_weights(options.out)


def test_options_come_from_the_command_line():
    options = train_demo.parse(["--device", "cpu", "--steps", "7", "--seconds", "20.5", "--short", "2", "--out", "x"])
    assert (options.device, options.steps, options.seconds, options.short, options.out) == ("cpu", 7, 20.5, 2, "x")
    assert train_demo.parse([]) == train_demo.Options()


def test_impossible_options_are_refused():
    with pytest.raises(ValueError, match="even"):
        train_demo.train(train_demo.Options(device="cpu", batch=3, short=2), TINY)
    with pytest.raises(ValueError, match="short"):
        train_demo.train(train_demo.Options(device="cpu", batch=4, short=6), TINY)
