"""Texts to token ids as each family does it, from files that an artifact carries along."""
import json
import string
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, Callable, Mapping, Optional, Sequence, Union

import torch

from clip_ttrt import deprecations
from clip_ttrt.errors import UserError

START_OF_WORD = "\u2581"  # SentencePiece's
PUNCTUATION = str.maketrans("", "", string.punctuation)
Encode = Callable[[Sequence[str]], list[list[int]]]  # texts -> ids without the end token


@dataclass(frozen=True)
class Tokenizer:
    """Texts and `truncate=False` -> ids int32 [N, context_length].

    Raises RuntimeError for a text that is longer, unless it is to be cut before its end token.
    """

    kind: str
    context_length: int
    files: tuple[Path, ...]  # to copy into one folder, which `read` then takes
    encode: Encode
    end: int
    pad: int

    def __call__(self, texts: Union[str, Sequence[str]], truncate: bool = False) -> torch.Tensor:
        texts = [texts] if isinstance(texts, str) else list(texts)
        tokens = torch.full((len(texts), self.context_length), self.pad, dtype=torch.int32)
        for row, text, ids in zip(tokens, texts, self.encode(texts)):
            if len(ids) >= self.context_length and not truncate:
                raise RuntimeError(f"{text!r} has more than {self.context_length} tokens")
            ids = ids[:self.context_length - 1] + [self.end]
            row[:len(ids)] = torch.tensor(ids)
        return tokens

    def describe(self) -> str:
        return f"{self.kind}, {self.context_length} tokens"


def read(folder: Optional[Path], context_length: int) -> Tokenizer:
    """The tokenizer of a folder in Hugging Face's layout; for None OpenAI's, of the package `clip`.

    Raises UserError that names the file or the package that is missing, or a file that is damaged.
    """
    if folder is None:
        own = deprecations.clip()._tokenizer
        start, end = (own.encoder[f"<|{which}oftext|>"] for which in ("start", "end"))
        return Tokenizer("OpenAI's BPE", context_length, (), lambda texts: [
            [start, *own.encode(text)] for text in texts], end, 0)
    path = Path(folder, "tokenizer_config.json")
    try:
        config = json.loads(path.read_text())
        kind, name, package, reader = KINDS[config["tokenizer_class"].removesuffix("Fast")]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as problem:
        raise UserError(f"{path} tells of no tokenizer that is served, {' or '.join(KINDS)}: "
                        f"{problem!r}") from problem
    vocabulary = path.with_name(name)
    try:
        encode = reader(import_module(package), str(vocabulary), config)
    except ImportError as problem:
        raise UserError(f"{vocabulary} is read by the package {package}, which is not installed: "
                        "pip install 'clip_ttrt[siglip]'") from problem
    except Exception as problem:  # neither package tells which ones it raises
        raise UserError(f"the vocabulary {vocabulary} cannot be read: {problem}") from problem
    return Tokenizer(kind, context_length, (path, vocabulary), *encode)


def _special(config: Mapping[str, Any], name: str, default: str) -> str:
    token = config.get(f"{name}_token", default)
    return token["content"] if isinstance(token, dict) else token


def _sentencepiece(package: Any, path: str, config: Mapping[str, Any]) -> tuple[Encode, int, int]:
    """Of lower case and without punctuation, so that no text spells a special token."""
    model = package.SentencePieceProcessor(model_file=path)
    before = _special(config, "unk", "<unk>")  # keeps SentencePiece from taking the first space
    skipped = len(model.encode(before))

    def encode(text: str) -> list[int]:
        text = START_OF_WORD + text.replace(START_OF_WORD, " ")
        text = text.lower() if config.get("do_lower_case", True) else text
        return model.encode(before + " ".join(text.translate(PUNCTUATION).split()))[skipped:]

    ends = (model.piece_to_id(_special(config, name, "</s>")) for name in ("eos", "pad"))
    return lambda texts: list(map(encode, texts)), *ends


def _bpe(package: Any, path: str, config: Mapping[str, Any]) -> tuple[Encode, int, int]:
    """Gemma's, of lower case as SigLIP 2 was trained."""
    model = package.Tokenizer.from_file(path)
    model.no_truncation()
    model.no_padding()
    steps = package.normalizers.Lowercase(), model.normalizer
    model.normalizer = package.normalizers.Sequence([step for step in steps if step])
    ends = (model.get_vocab()[_special(config, name, f"<{name}>")] for name in ("eos", "pad"))
    return lambda texts: [each.ids for each in model.encode_batch(
        texts, add_special_tokens=False)], *ends


GEMMA = "SigLIP 2's BPE", "tokenizer.json", "tokenizers", _bpe
KINDS = {"SiglipTokenizer": ("SigLIP's SentencePiece", "spiece.model", "sentencepiece",
                             _sentencepiece),
         "GemmaTokenizer": GEMMA, "Siglip2Tokenizer": GEMMA}  # by tokenizer_class
