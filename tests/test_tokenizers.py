"""Tokenizers against their family's own classes, with small vocabularies that are trained here."""
import json
import random
import shutil
import sys

import clip
import pytest
import torch

from clip_ttrt import families, tokenizers
from clip_ttrt.errors import UserError

pytest.importorskip("sentencepiece")
pytest.importorskip("tokenizers")
LINES = ["a large red star above two small blue circles", "the left one of three green squares",
         "A Photo of a CAT, isn't it?", "3.5% of it: e.g. (this) and \"that\"", "straße café naïve",
         "写真 の 猫", "λέξεις και ΣΟΦΟΣ", "words words words, many of them!"] * 5
TEXTS = ["", " ", "a cat", "A Cat!", "  two  spaces\tand\na line ", "... !!", "! first",
         "a_b-c's “quotes”", "ÄÖÜ ẞ İstanbul ΣΟΦΟΣ", "写真 の猫", "😀 emoji 👩‍👩‍👧",
         "▁under▁score", "\u00a0nbsp\u3000", "ﬁ ① Ａ", "a\u0301", "\x00 null", "<s> a <pad>",
         "x" * 500, "many words " * 60]
CHARACTERS = "abc XYZ  \t\n.,!'_-▁éßİΣ写真😀\u00a0\u3000\u0301ﬁ01\x1c\x85"
SPECIAL = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>"]


def made_up(count):
    draw = random.Random(0)
    return ["".join(draw.choices(CHARACTERS, k=draw.randint(0, 40))) for _ in range(count)]


@pytest.fixture(scope="module")
def sentencepiece_folder(tmp_path_factory):
    """As `SiglipTokenizer.save_pretrained` writes it."""
    import sentencepiece

    folder = tmp_path_factory.mktemp("sentencepiece")
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(LINES), model_prefix=str(folder / "spiece"), vocab_size=150,
        hard_vocab_limit=False, pad_id=0, eos_id=1, unk_id=2, bos_id=-1, minloglevel=2)
    (folder / "tokenizer_config.json").write_text(json.dumps({
        "tokenizer_class": "SiglipTokenizer", "eos_token": "</s>", "do_lower_case": True,
        "pad_token": "</s>", "unk_token": "<unk>"}))
    return folder


@pytest.fixture(scope="module")
def bpe_folder(tmp_path_factory):
    """Of Gemma's kind, with the settings of SigLIP 2's own files."""
    import tokenizers as package
    from tokenizers import normalizers, pre_tokenizers, processors, trainers

    folder = tmp_path_factory.mktemp("bpe")
    model = package.Tokenizer(package.models.BPE(unk_token="<unk>", fuse_unk=True,
                                                 byte_fallback=True))
    model.normalizer = normalizers.Replace(" ", "▁")
    model.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    model.post_processor = processors.TemplateProcessing(
        single="$A <eos>", special_tokens=[("<eos>", 1)])
    tokens = SPECIAL + [f"<0x{byte:02X}>" for byte in range(256)]
    model.train_from_iterator(LINES, trainers.BpeTrainer(
        vocab_size=600, special_tokens=tokens, show_progress=False))
    content = json.loads(model.to_str())
    content["added_tokens"] = content["added_tokens"][:len(SPECIAL)]  # bytes are no text
    (folder / "tokenizer.json").write_text(json.dumps(content))
    (folder / "tokenizer_config.json").write_text(json.dumps({
        "tokenizer_class": "GemmaTokenizer", "add_bos_token": False, "add_eos_token": True,
        **{f"{name[1:-1]}_token": name for name in SPECIAL}}))
    return folder


def own(tokenizer, texts, length):
    return tokenizer(texts, padding="max_length", truncation=True, max_length=length,
                     return_tensors="pt").input_ids.int()


@pytest.mark.parametrize("length", [16, 64])  # SO400M/14 at 224 has texts of 16
@pytest.mark.filterwarnings("ignore")  # of the class, about lengths
def test_siglip_s_ids_equal_those_of_its_class(sentencepiece_folder, length):
    pytest.importorskip("google.protobuf")
    siglip = pytest.importorskip("transformers").SiglipTokenizer
    ours = tokenizers.read(sentencepiece_folder, length)
    theirs = siglip.from_pretrained(sentencepiece_folder)
    for text in TEXTS + made_up(500):
        assert ours(text, truncate=True).tolist() == own(theirs, [text], length).tolist(), text
    assert ours("a cat")[0, -1] == theirs.pad_token_id  # which the encoder reads
    assert torch.equal(ours("a </s>"), ours("a s"))  # a text, and no end
    config = json.loads((sentencepiece_folder / "tokenizer_config.json").read_text())
    cased = shutil.copytree(sentencepiece_folder, sentencepiece_folder.parent / f"cased{length}")
    (cased / "tokenizer_config.json").write_text(json.dumps(config | {"do_lower_case": False}))
    ours, theirs = tokenizers.read(cased, length), siglip.from_pretrained(cased)
    assert torch.equal(ours(TEXTS, truncate=True), own(theirs, TEXTS, length))
    assert not torch.equal(ours("A CAT"), ours("a cat"))


@pytest.mark.parametrize("length", [16, 64])
def test_siglip_2_s_ids_equal_those_of_its_class(bpe_folder, length):
    theirs = pytest.importorskip("transformers").Siglip2Tokenizer.from_pretrained(bpe_folder)
    theirs.padding_side = "right"  # as it was trained
    ours = tokenizers.read(bpe_folder, length)
    texts = TEXTS + made_up(500) + ["a <eos> b", "<bos>"]
    assert torch.equal(ours(texts, truncate=True), own(theirs, texts, length))
    assert ours("A CAT").tolist() == ours("a cat").tolist()
    assert ours("many words " * 60, truncate=True)[0, -1] == theirs.eos_token_id  # and cut before


def test_openai_s_ids_are_clip_s():
    ours = families.find("demo").tokenizer()
    texts = TEXTS + made_up(500)
    assert torch.equal(ours(texts, truncate=True), clip.tokenize(texts, truncate=True))
    assert ours("a cat").dtype == torch.int32
    assert ours("a cat").shape == (1, 77) and ours([]).shape == (0, 77)


@pytest.mark.parametrize("folder", ["sentencepiece_folder", "bpe_folder"])
def test_the_files_are_all_that_a_tokenizer_needs(folder, request, tmp_path):
    ours = tokenizers.read(request.getfixturevalue(folder), 64)
    for name in tokenizers.FILES:
        if (path := request.getfixturevalue(folder) / name).is_file():
            shutil.copy(path, tmp_path)
    copied = tokenizers.read(tmp_path, 64)
    assert torch.equal(copied(TEXTS, truncate=True), ours(TEXTS, truncate=True))
    assert ours([]).shape == (0, 64)
    padded = ours("a b c")[0].tolist()
    pad, end = padded[-1], 1  # of both, and SigLIP pads with it
    length = padded.index(pad) + (pad == end)
    assert tokenizers.read(tmp_path, length)("a b c")[0, -1] == end  # it just fits
    with pytest.raises(RuntimeError, match=f"'a b c' has more than {length - 1} tokens"):
        tokenizers.read(tmp_path, length - 1)(["a", "a b c"])


def test_what_is_missing_or_damaged_is_named(sentencepiece_folder, bpe_folder, tmp_path,
                                             monkeypatch):
    def refused(words):
        with pytest.raises(UserError, match=words) as caught:
            tokenizers.read(tmp_path, 64)
        assert "\n" not in str(caught.value)

    config = tmp_path / "tokenizer_config.json"
    for content in (None, "{", "[]", "{}", '{"tokenizer_class": "T5Tokenizer"}'):
        if content:
            config.write_text(content)
        refused(r"has no tokenizer that can be read, SiglipTokenizer or ")
    for folder, name in ((sentencepiece_folder, "spiece.model"), (bpe_folder, "tokenizer.json")):
        config.write_text((folder / config.name).read_text())
        refused(rf"(?i:no such file).*{name}|{name}.*(?i:no such file)")
        (tmp_path / name).write_text('{"model": 1}')
        refused("has no tokenizer that can be read")
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    refused(r"package tokenizers, .*clip_ttrt\[siglip\]")
