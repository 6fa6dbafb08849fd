"""Texts to token ids as each family does it, from files that an artifact carries along."""
import json
import string
from pathlib import Path
from typing import Any, Callable, Mapping, Sequence, Union

import torch

from clip_ttrt.errors import UserError

FILES = "tokenizer_config.json", "spiece.model", "tokenizer.json"  # what an artifact has copies of
START_OF_WORD = "\u2581"  # SentencePiece's
PUNCTUATION = str.maketrans("", "", string.punctuation)


def read(folder: Path, context_length: int) -> Callable[..., torch.Tensor]:
    """The tokenizer of a folder in Hugging Face's layout: texts and `truncate=False` -> ids int32
    [N, context_length].  It raises RuntimeError for a text that is longer, unless it is to be cut
    before its end token.

    Raises UserError that names the file or the package that is missing, or a folder of damage.
    """
    try:
        config = json.loads(Path(folder, "tokenizer_config.json").read_text())
        reader = KINDS[config["tokenizer_class"].removesuffix("Fast")]
        encode, end, pad = reader(Path(folder), config)  # encode: a text -> ids, without the end
    except ImportError as problem:
        raise UserError(f"the tokenizer in {folder} is read by the package {problem.name}, which "
                        "is not installed: pip install 'clip_ttrt[siglip]'") from problem
    except Exception as problem:  # neither package tells which ones it raises
        raise UserError(f"{folder} has no tokenizer that can be read, {' or '.join(KINDS)}: "
                        f"{problem}") from problem

    def tokenize(texts: Union[str, Sequence[str]], truncate: bool = False) -> torch.Tensor:
        texts = [texts] if isinstance(texts, str) else list(texts)
        tokens = torch.full((len(texts), context_length), pad, dtype=torch.int32)
        for row, text in zip(tokens, texts):
            ids = encode(text)
            if len(ids) >= context_length and not truncate:
                raise RuntimeError(f"{text!r} has more than {context_length} tokens")
            ids = ids[:context_length - 1] + [end]
            row[:len(ids)] = torch.tensor(ids)
        return tokens

    return tokenize


def _sentencepiece(folder: Path, config: Mapping[str, Any]) -> tuple[Callable, int, int]:
    """Of lower case and without punctuation, so that no text spells a special token."""
    from sentencepiece import SentencePieceProcessor

    model = SentencePieceProcessor(model_file=str(folder / "spiece.model"))
    before = config["unk_token"]  # keeps SentencePiece from taking the first space
    skipped = len(model.encode(before))

    def encode(text: str) -> list[int]:
        text = START_OF_WORD + text.replace(START_OF_WORD, " ")
        text = text.lower() if config.get("do_lower_case", True) else text
        return model.encode(before + " ".join(text.translate(PUNCTUATION).split()))[skipped:]

    return encode, *(model.piece_to_id(config[name]) for name in ("eos_token", "pad_token"))


def _bpe(folder: Path, config: Mapping[str, Any]) -> tuple[Callable, int, int]:
    """Gemma's, of lower case as SigLIP 2 was trained."""
    from tokenizers import Tokenizer, normalizers

    model = Tokenizer.from_str((folder / "tokenizer.json").read_text())
    model.no_truncation()
    model.no_padding()
    model.normalizer = normalizers.Sequence([normalizers.Lowercase(), model.normalizer])
    return (lambda text: model.encode(text, add_special_tokens=False).ids,
            *(model.token_to_id(config[name]) for name in ("eos_token", "pad_token")))


KINDS = {"SiglipTokenizer": _sentencepiece,  # by tokenizer_class
         "GemmaTokenizer": _bpe, "Siglip2Tokenizer": _bpe}
