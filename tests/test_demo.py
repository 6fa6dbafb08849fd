"""The embedded model's world: scenes, captions, what is held out, and the shipped weights."""
import hashlib
from itertools import combinations, product

import clip
import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open

from clip_ttrt import demo, encoders
from clip_ttrt.demo import captions, packing, scenes
from clip_ttrt.demo.captions import ATTRIBUTES, NAMES, SIZES
from clip_ttrt.models import MODELS, dimensions_from


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def row(**values) -> list[int]:
    """Indices of a combination from its values' words; what is not named is the first value."""
    return [ATTRIBUTES[name].index(values.get(name, ATTRIBUTES[name][0])) for name in NAMES]


def components(mask: torch.Tensor, reach: int) -> list[int]:
    """Number of connected regions of bool masks [N, R, R], with diagonals where `reach` is 8."""
    number = torch.arange(1, mask[0].numel() + 1, dtype=torch.float32).view(1, *mask.shape[1:])
    label, spread = None, mask * number
    while label is None or not torch.equal(spread, label):
        label = spread
        if reach == 8:
            spread = F.max_pool2d(label, 3, 1, 1) * mask
        else:
            spread = torch.maximum(F.max_pool2d(label, (3, 1), 1, (1, 0)),
                                   F.max_pool2d(label, (1, 3), 1, (0, 1))) * mask
    return [len(picture[part].unique()) for picture, part in zip(label, mask)]


# Captions

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


def test_number_and_noun_agree_in_every_canonical_caption():
    for codes in captions.all_combinations().tolist():
        words = captions.caption(codes).split()
        noun = ATTRIBUTES["shape"][codes[3]]
        assert (noun in words) == (codes[0] == 0)
        assert (captions.plural(noun) in words) == (codes[0] > 0)


def test_captions_of_different_combinations_differ():
    for template in range(captions.TEMPLATES):
        rows = captions.all_combinations().tolist()
        assert len({captions.caption(codes, template) for codes in rows}) == len(rows) == 15360


def test_tokens_are_the_tokenizers():
    lines = scenes.held_out_classes()
    assert torch.equal(captions.tokenize(lines), clip.tokenize(lines).long())
    words = list(captions.WORD_TOKENS)
    assert torch.equal(captions.tokenize(words), clip.tokenize(words).long())
    assert captions.unknown_words([*words, "A tabby CAT's circles, 3 of them; cat"]) == [
        "tabby", "cat", "'", "s", "3", "them", ";"]


# What is held out

def test_training_never_draws_a_held_out_combination():
    drawn = scenes.training_scenes(200_000, generator()).attributes
    assert not captions.is_held_out(drawn).any()
    assert captions.is_possible(drawn).all()
    held_out = set(captions.code_of(captions.held_out_combinations()).tolist())
    assert held_out.isdisjoint(captions.code_of(drawn).tolist())


def test_training_sees_every_pair_of_values():
    drawn = scenes.training_scenes(50_000, generator()).attributes
    for first, second in combinations(range(len(NAMES)), 2):
        seen = set(zip(drawn[:, first].tolist(), drawn[:, second].tolist()))
        expected = set(product(range(SIZES[first]), range(SIZES[second])))
        if (NAMES[first], NAMES[second]) == ("colour", "background"):
            expected -= {tuple(row(colour=name, background=name)[2::3])
                         for name in ("white", "blue", "green")}
        assert seen == expected, (NAMES[first], NAMES[second])


def test_pairs_of_training_scenes_differ_in_one_attribute():
    drawn = scenes.training_scenes(4_000, generator()).attributes.view(-1, 2, 6)
    differences = (drawn[:, 0] != drawn[:, 1]).sum(1)
    # A changed combination that is held out or impossible is drawn anew: about one in six.
    assert (differences == 1).float().mean() > 0.75


def test_held_out_classes_are_many_distinct_and_never_change():
    classes = scenes.held_out_classes()
    assert len(classes) == len(set(classes)) == 128
    assert captions.is_held_out(captions.held_out_sample()).all()
    assert captions.is_possible(captions.held_out_sample()).all()
    # The figures of the shipped weights are over these captions.
    digest = hashlib.sha256("\n".join(classes).encode()).hexdigest()
    assert digest == "d5e2ba0ee1c223166f4db0b81d485fc38aca5ed37488cf165cb579ca53fe8553"
    for column, size in enumerate(SIZES):
        assert len(captions.held_out_sample()[:, column].unique()) == size


# Pictures

def test_a_seed_gives_the_same_pictures():
    first, second = (scenes.held_out_set(per_class=1, seed=3) for _ in range(2))
    assert torch.equal(first[0], second[0]) and torch.equal(first[1], second[1])
    assert first[0].shape == (128, 3, 112, 112) and first[0].dtype == torch.uint8
    assert first[1].dtype == torch.int64 and first[1].tolist() == list(range(128))
    assert not torch.equal(first[0], scenes.held_out_set(per_class=1, seed=4)[0])


def test_a_picture_does_not_depend_on_its_batch():
    some = scenes.training_scenes(6, generator())
    together = scenes.render(some)
    for index in range(6):
        assert torch.equal(scenes.render(some[index:index + 1])[0], together[index])


def test_input_is_what_clips_preprocess_makes():
    pictures = scenes.render(scenes.training_scenes(4, generator()))
    preprocess = clip.clip._transform(112)
    theirs = torch.stack([preprocess(scenes.to_image(picture)) for picture in pictures])
    assert torch.equal(scenes.to_input(pictures), theirs)


def test_number_of_objects_and_of_holes():
    """Separate regions of the objects are their number; only rings have holes."""
    rows = torch.tensor([[number, size, 0, shape, position, 0] for number, size, shape, position
                         in product(range(4), range(2), range(8), (0,))])
    covered = scenes.coverage(scenes.scenes_of(rows, generator()))
    numbers = (rows[:, 0] + 1).tolist()
    assert components(covered > 0.5, reach=8) == numbers
    ring = ATTRIBUTES["shape"].index("ring")
    holes = [number if shape == ring else 0 for number, shape in zip(numbers, rows[:, 3].tolist())]
    assert [count - 1 for count in components(covered < 0.5, reach=4)] == holes


def test_objects_are_whole():
    covered = scenes.coverage(scenes.training_scenes(400, generator()))
    border = torch.cat([covered[:, 0], covered[:, -1], covered[:, :, 0], covered[:, :, -1]], dim=1)
    assert border.max() == 0


def test_positions_are_where_the_caption_says():
    ticks = torch.arange(112.0) / 111 * 2 - 1
    for position, (x, y) in enumerate(((-1, 0), (1, 0), (0, 1), (0, -1), (0, 0))):
        codes = torch.tensor([[number, size, 0, shape, position, 0]
                              for number, size, shape in product(range(4), range(2), range(8))])
        covered = scenes.coverage(scenes.scenes_of(codes, generator()))
        weight = covered.sum((1, 2))
        right = (covered.sum(1) @ ticks) / weight
        up = -(covered.sum(2) @ ticks) / weight
        # Large groups are moved inwards until they are whole; the centre's jitter is 0.1.
        for value, wanted in ((right, x), (up, y)):
            assert (value.abs() < 0.17).all() if wanted == 0 else (value * wanted > 0.22).all()


def test_sizes_colours_and_backgrounds_differ_as_their_words_do():
    rows = torch.tensor([[0, size, colour, shape, 4, background] for size, colour, shape, background
                         in product(range(2), range(8), range(8), range(6))])
    rows = rows[captions.is_possible(rows)]
    some = scenes.scenes_of(rows, generator())
    covered = scenes.coverage(some)
    pictures = scenes.render(some).float() / 255

    area = covered.sum((1, 2))
    for shape in range(8):
        small, large = (area[(rows[:, 1] == size) & (rows[:, 3] == shape)] for size in range(2))
        assert small.max() < large.min()

    inside = (covered == 1).unsqueeze(1)
    shade = (pictures * inside).sum((2, 3)) / inside.sum((2, 3))
    assert torch.equal(torch.cdist(shade, torch.tensor(scenes.COLOURS)).argmin(1), rows[:, 2])

    outside = (covered == 0).unsqueeze(1)
    mean = (pictures * outside).sum((2, 3), keepdim=True) / outside.sum((2, 3), keepdim=True)
    deviation = (((pictures - mean) * outside) ** 2).sum((1, 2, 3)) / (3 * outside.sum((1, 2, 3)))
    textured = rows[:, 5] >= scenes.STRIPED
    tones = torch.tensor([tones[0] for tones in scenes.BACKDROPS[:4]])
    plain = torch.cdist(mean.flatten(1), tones).argmin(1)
    assert torch.equal(plain[~textured], rows[~textured, 5])
    assert deviation[textured].min() > deviation[~textured].max()


def test_a_resolution_without_noise_is_refused():
    with pytest.raises(ValueError, match="600"):
        scenes.render(scenes.training_scenes(2, generator()), resolution=600)
    with pytest.raises(ValueError, match="odd"):
        scenes.training_scenes(3, generator())


# The weights' file

def test_packing_keeps_fp16_values_and_the_rows_in_use():
    weight = torch.zeros(50, 4)
    ids = torch.tensor([0, 7, 49])
    weight[ids] = torch.randn(3, 4, generator=generator()).half().float()
    original = {"token_embedding.weight": weight, "logit_scale": torch.tensor(2.5),
                "visual.proj": torch.ones(2, 3)}
    packed = packing.pack(original, ids)
    assert packed["token_embedding.rows"].shape == (3, 4)
    assert packed["token_embedding.ids"].dtype == torch.int32
    unpacked = packing.unpack(packed, 50)
    assert unpacked.keys() == original.keys()
    assert all(torch.equal(unpacked[name], original[name]) for name in original)
    with pytest.raises(ValueError, match="visual.proj"):
        packing.pack({**original, "visual.proj": torch.full((2, 3), 1e6)}, ids)


def shipped() -> tuple[dict, dict]:
    with safe_open(str(demo.WEIGHTS), framework="pt") as file:
        return file.metadata(), {name: file.get_tensor(name) for name in file.keys()}


def test_shipped_file_is_small_and_as_documented():
    assert demo.WEIGHTS.stat().st_size <= 8_000_000
    metadata, tensors = shipped()
    assert metadata["format"] == packing.FORMAT and metadata["vocab_size"] == "49408"
    ids = tensors.pop("token_embedding.ids")
    assert ids.dtype == torch.int32 and (ids.diff() > 0).all()
    assert {0, 49406, 49407} <= set(ids.tolist())
    assert all(value.dtype == torch.float16 for value in tensors.values())
    state_dict = packing.unpack({**tensors, "token_embedding.ids": ids}, 49408)
    assert dimensions_from(state_dict) == MODELS["demo"]
    used = clip.tokenize(scenes.held_out_classes()).unique()
    assert set(used.tolist()) <= set(ids.tolist())


def test_shipped_weights_know_scenes_they_never_saw():
    """Top-1 over the 128 held-out captions, of other pictures than the reported figure's."""
    state_dict = packing.unpack(shipped()[1], 49408)
    image, text = encoders.image_encoder(state_dict), encoders.text_encoder(state_dict)
    pictures, labels = scenes.held_out_set(per_class=2, seed=11)
    with torch.no_grad():
        images = F.normalize(image(scenes.to_input(pictures)), dim=-1)
        texts = F.normalize(text(clip.tokenize(scenes.held_out_classes())), dim=-1)
    top_1 = ((images @ texts.T).argmax(1) == labels).float().mean()
    assert top_1 >= 0.90
