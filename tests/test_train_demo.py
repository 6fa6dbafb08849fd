"""The embedded model's training: packed weights, and short runs on the CPU."""
import json
from dataclasses import replace
from pathlib import Path

import clip
import pytest
import torch

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


def test_packed_weights_compute_what_was_trained():
    """Trimmed texts over the rows in use give the features of full texts over the vocabulary."""
    tokens = train_demo.CaptionTokens()
    model = train_demo.DemoClip(TINY, len(tokens.ids)).initialise(torch.Generator().manual_seed(0))
    for parameter in model.eval().parameters():
        parameter.data = parameter.data.half().float()
    state_dict = packing.unpack(model.packed(tokens.ids), TINY.vocab_size)
    combinations = captions.held_out_sample()[:16]
    pictures = scenes.to_input(scenes.picture_set(combinations, 1, 0)[0])
    texts = clip.tokenize([captions.caption(row) for row in combinations.tolist()])
    with torch.no_grad():
        trained = model.text(tokens(combinations, torch.zeros(16, dtype=torch.int64)))
        for name, x, own in (("text", texts, trained), ("image", pictures, model.image(pictures))):
            shipped = encoders.ENCODERS[name](TINY).load(state_dict)(x)
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
    assert 0 <= figures["held_out_top1_of_all"] <= figures["held_out_top1"] <= 1


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
