"""Texts to token ids as each family does it, from files that an artifact carries along.

    tokenizer = tokenizers.read(folder, context_length=64)
    tokens = tokenizer(["a diagram"])  # int32 [1, 64]
"""
import json
import string
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, Callable, Mapping, Optional, Sequence, Union

import torch

from clip_ttrt import deprecations
from clip_ttrt.errors import UserError

CONFIG = "tokenizer_config.json"
START_OF_WORD = "\u2581"  # SentencePiece's
PUNCTUATION = str.maketrans("", "", string.punctuation)
Encode = Callable[[Sequence[str]], Sequence[Sequence[int]]]  # texts -> ids of the full length


@dataclass(frozen=True)
class Tokenizer:
    """Texts -> ids int32 [N, context_length]; what is too long is cut before the end token."""

    kind: str
    context_length: int
    files: tuple[Path, ...]  # to copy into one folder, which `read` then takes
    encode: Encode

    def __call__(self, texts: Union[str, Sequence[str]]) -> torch.Tensor:
        texts = [texts] if isinstance(texts, str) else list(texts)
        ids = torch.as_tensor(self.encode(texts), dtype=torch.int32)
        return ids.view(len(texts), self.context_length)

    def describe(self) -> str:
        return f"{self.kind}, {self.context_length} tokens"


def read(folder: Optional[Path], context_length: int) -> Tokenizer:
    """The tokenizer whose files lie in a folder; OpenAI's, of the package `clip`, for None.

    Raises UserError that names the file or the package that is missing, or a file that is damaged.
    """
    if folder is None:
        return Tokenizer("OpenAI's BPE", context_length, (), lambda texts: deprecations.clip(
            ).tokenize(texts, context_length, truncate=True))
    path = Path(folder, CONFIG)
    try:
        config = json.loads(path.read_text())
        name, package, kind, encoder = KINDS[config["tokenizer_class"].removesuffix("Fast")]
    except FileNotFoundError:
        raise UserError(f"{path} is missing: it tells which tokenizer the model has") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as problem:
        raise UserError(f"{path} tells of no tokenizer that is served ({problem!r}), which are "
                        f"{', '.join(KINDS)}") from problem
    vocabulary = Path(folder, name)
    if not vocabulary.is_file():
        raise UserError(f"{vocabulary} is missing: it holds the vocabulary of the model's texts")
    try:
        encode = encoder(import_module(package), vocabulary, config, context_length)
    except ImportError as problem:
        raise UserError(f"{vocabulary} is read by the package {package}, which is not installed: "
                        "pip install 'clip_ttrt[siglip]'") from problem
    except Exception as problem:  # neither package tells which ones it raises
        raise UserError(f"{vocabulary} cannot be read: {problem}") from problem
    return Tokenizer(kind, context_length, (path, vocabulary), encode)


def _name(config: Mapping[str, Any], key: str, default: str) -> str:
    """A special token, which a config may write as an object."""
    token = config.get(key) or default
    return token if isinstance(token, str) else token["content"]


def _sentencepiece(package: Any, path: Path, config: Mapping[str, Any], length: int) -> Encode:
    """SigLIP's: lower case, no punctuation, so that a text cannot spell a special token."""
    model, lower = package.SentencePieceProcessor(model_file=str(path)), config.get("do_lower_case")
    unknown = _name(config, "unk_token", "<unk>")
    end, pad = (model.piece_to_id(_name(config, key, "</s>")) for key in ("eos_token", "pad_token"))
    before = len(model.encode(unknown))  # what keeps SentencePiece from taking the first space

    def row(text: str) -> list[int]:
        text = START_OF_WORD + text.replace(START_OF_WORD, " ")
        text = (text if lower is False else text.lower()).translate(PUNCTUATION)
        ids = model.encode(unknown + " ".join(text.split()))[before:][: length - 1] + [end]
        return ids + [pad] * (length - len(ids))

    return lambda texts: list(map(row, texts))


def _bpe(package: Any, path: Path, config: Mapping[str, Any], length: int) -> Encode:
    """SigLIP 2's: Gemma's, in lower case, as it was trained."""
    model = package.Tokenizer.from_file(str(path))
    end, pad = _name(config, "eos_token", "<eos>"), _name(config, "pad_token", "<pad>")
    steps = package.normalizers.Lowercase(), model.normalizer
    model.normalizer = package.normalizers.Sequence([step for step in steps if step])
    model.post_processor = package.processors.TemplateProcessing(
        single=f"$A {end}", special_tokens=[(end, model.token_to_id(end))])
    model.enable_truncation(length)
    model.enable_padding(direction=config.get("padding_side", "right"), length=length,
                         pad_id=model.token_to_id(pad), pad_token=pad)
    return lambda texts: [each.ids for each in model.encode_batch(texts)]


GEMMA = "tokenizer.json", "tokenizers", "SigLIP 2's BPE", _bpe
KINDS = {"SiglipTokenizer": ("spiece.model", "sentencepiece", "SigLIP's SentencePiece",
                             _sentencepiece), "GemmaTokenizer": GEMMA, "Siglip2Tokenizer": GEMMA}
