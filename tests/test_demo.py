"""The embedded model's world: scenes, captions, what is held out, and the shipped weights."""
import hashlib
from itertools import combinations, product

import clip
import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import load_file

from clip_ttrt import demo, encoders
from clip_ttrt.demo import captions, packing, scenes
from clip_ttrt.demo.captions import ATTRIBUTES, NAMES, SIZES
from clip_ttrt.models import MODELS


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def row(**values) -> list[int]:
    """Indices of a combination from its values' words; what is not named is the first value."""
    return [ATTRIBUTES[name].index(values.get(name, ATTRIBUTES[name][0])) for name in NAMES]


def test_captions_read_as_english():
    circles = row(number="two", background="blue")
    cross = row(size="large", colour="orange", shape="cross", position="centre",
                background="striped")
    for codes, template, line in [
        (circles, 0, "a photo of two small red circles on the left on a blue background"),
        (cross, 3, "there is one large orange cross in the centre on a striped background"),
        ([captions.SINGULAR, 2, *cross[2:4], 5, 6], 1, "an orange cross"),
        ([captions.PLURAL, 2, 8, cross[3], 2, 6], 4, "an image of crosses at the top"),
        ([captions.PLURAL, 2, 8, cross[3], 5, 4], 4, "a striped background with crosses"),
    ]:
        assert captions.caption(codes, template) == line


def test_captions_of_different_combinations_differ():
    rows, words = captions.all_combinations().tolist(), {"an", "image"}  # of one without backdrop
    for template in range(captions.TEMPLATES):
        lines = {captions.caption(codes, template) for codes in rows}
        assert len(lines) == len(rows) == 15360
        words.update(" ".join(lines).replace(",", " ,").split())
    assert words == set(captions.WORD_TOKENS)


def test_tokens_are_the_tokenizers():
    lines = scenes.held_out_classes()
    assert torch.equal(captions.tokenize(lines), clip.tokenize(lines).long())
    words = list(captions.WORD_TOKENS)
    assert torch.equal(captions.tokenize(words), clip.tokenize(words).long())
    assert captions.unknown_words([*words, "A tabby CAT's circles, 3 of them; cat"]) == [
        "tabby", "cat", "'", "s", "3", "them", ";"]


def test_training_sees_every_pair_of_values_and_no_held_out_combination():
    drawn = scenes.training_scenes(200_000, generator()).attributes
    assert not captions.is_held_out(drawn).any() and captions.is_possible(drawn).all()
    for first, second in combinations(range(len(NAMES)), 2):
        seen = set(zip(drawn[:, first].tolist(), drawn[:, second].tolist()))
        expected = set(product(range(SIZES[first]), range(SIZES[second])))
        if (NAMES[first], NAMES[second]) == ("colour", "background"):
            expected -= {tuple(row(colour=name, background=name)[2::3])
                         for name in ("white", "blue", "green")}
        assert seen == expected, (NAMES[first], NAMES[second])


def test_held_out_classes_are_many_distinct_and_never_change():
    classes = scenes.held_out_classes()
    assert len(classes) == len(set(classes)) == 128
    assert captions.is_held_out(captions.held_out_sample()).all()
    assert captions.is_possible(captions.held_out_sample()).all()
    # The figures of the shipped weights are over these captions.
    digest = hashlib.sha256("\n".join(classes).encode()).hexdigest()
    assert digest == "d5e2ba0ee1c223166f4db0b81d485fc38aca5ed37488cf165cb579ca53fe8553"


def test_a_seed_gives_the_same_pictures():
    first, second, other = (scenes.held_out_set(per_class=1, seed=seed)[0] for seed in (3, 3, 4))
    assert first.shape == (128, 3, 112, 112) and first.dtype == torch.uint8
    assert torch.equal(first, second) and not torch.equal(first, other)


def test_input_is_what_clips_preprocess_makes():
    pictures = scenes.render(scenes.training_scenes(4, generator()))
    preprocess = clip.clip._transform(112)
    theirs = torch.stack([preprocess(scenes.to_image(picture)) for picture in pictures])
    assert torch.equal(scenes.to_input(pictures), theirs)


def test_shipped_file_is_small_and_as_documented():
    assert demo.WEIGHTS.stat().st_size <= 8_000_000
    with safe_open(str(demo.WEIGHTS), framework="pt") as file:
        metadata, tensors = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}
    assert metadata["format"] == packing.FORMAT and metadata["vocab_size"] == "49408"
    used = clip.tokenize(list(captions.WORD_TOKENS)).unique()
    assert set(used.tolist()) <= set(tensors["token_embedding.ids"].tolist())


def test_shipped_weights_know_scenes_they_never_saw():
    """Top-1 over the 128 held-out captions, of other pictures than the reported figure's."""
    state_dict = packing.unpack(load_file(demo.WEIGHTS), 49408)
    image, text = (make(MODELS["demo"]).load(state_dict) for make in encoders.ENCODERS.values())
    pictures, labels = scenes.held_out_set(per_class=2, seed=11)
    with torch.no_grad():
        images = F.normalize(image(scenes.to_input(pictures)), dim=-1)
        texts = F.normalize(text(clip.tokenize(scenes.held_out_classes())), dim=-1)
    assert torch.equal((images @ texts.T).argmax(1), labels)
