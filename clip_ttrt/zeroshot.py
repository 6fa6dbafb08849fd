"""Zero-shot classification: features of pictures times those of texts, one for each label."""
import hashlib
import json
import math
import os
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any, Callable, Iterator, Optional, Sequence, Union

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import normalize

from clip_ttrt import kernels
from clip_ttrt.artifact import Artifact, read_artifact
from clip_ttrt.demo.captions import unknown_words
from clip_ttrt.errors import UserError
from clip_ttrt.labelled import embedded
from clip_ttrt.runtime import CompiledCLIP, load

TEMPLATES = ("{}", "a photo of a {}.", "a photo of the {}.", "a picture of a {}.",
             "a close-up of a {}.", "a blurry photo of a {}.", "a drawing of a {}.")
Texts = Union[str, Path, Sequence[str]]


class ZeroShot:
    """Labels behind a model's image encoder: pictures -> a score for each label.

    model: of `clip_ttrt.load`.  labels: texts, or a file of lines.  templates: texts with {} in the
    label's place, or a file of them (default: `TEMPLATES`; the embedded model's labels as they
    are).  Of both `imagenet` is open_clip's.  multi: independent scores, as of `Head.scores`.
    On a GPU the product with the labels' features, which stay there, is in the encoder's graph.
    Raises UserError for a template without {} and for texts that are too long."""

    def __init__(self, model: CompiledCLIP, labels: Texts, templates: Optional[Texts] = None,
                 multi: bool = False):
        self.model, self.labels, self.multi = model, read_texts(labels, "labels"), multi
        templates = templates_for(model.artifact, templates)
        text = text_features(model.artifact, self.labels, templates, model)
        self.head = Head(model.artifact, text.to(model.device))

    def logits(self, images: Union[Tensor, Sequence[Any]]) -> Tensor:
        """Images as `encode_image` takes them -> scaled similarities float32 [B, labels]."""
        return self.model._encode_image(images, self.head)

    def __call__(self, images: Union[Tensor, Sequence[Any]]) -> Tensor:
        """Images -> probabilities or, with multi, scores float32 [B, labels]."""
        return self.head.scores(self.logits(images), self.multi)


def classify(artifact: Union[str, Path], inputs: Union[str, Sequence[str]], labels: Texts,
             templates: Optional[Texts] = None, multi: bool = False, top: int = 5,
             **options: Any) -> Iterator[dict[str, Any]]:
    """The best labels of pictures and frames, one after the other: what `embed` knows of each and
    `labels`, dicts of label and score, best first; of a bad one its image_path and `error`.

    inputs, options: as `embed` has them.  labels, templates, multi: as `ZeroShot` has them.
    Raises UserError for bad input, and what `embed` raises."""
    model, labels = read_artifact(artifact), read_texts(labels, "labels")
    if model.origin.kind == "demo" and (unknown := unknown_words(labels)):
        print(f"clip_ttrt: the embedded model was never trained on {', '.join(unknown)}: its "
              "answer for labels with these words means nothing", file=sys.stderr)
    text = text_features(model, labels, templates_for(model, templates))
    head = Head(model, text.to(model.device))
    for features, rows, bad in embedded(model.folder, inputs, dtype="float32", **options):
        scores = head.scores(head(features.to(model.device)), multi)
        values, places = (each.tolist() for each in scores.topk(min(top, len(labels))))
        good = ({**row, "labels": [{"label": labels[place], "score": value}
                                   for value, place in zip(*best)]}
                for row, *best in zip(rows, values, places))
        reasons = {each.pop("row"): each for each in bad}
        for row in range(len(rows) + len(bad)):
            yield reasons[row] if row in reasons else next(good)


class Head:
    """Features [B, E] -> logits [B, labels], by one matrix product.  text: [labels, E]."""

    def __init__(self, artifact: Artifact, text: Tensor):
        self.scale = math.exp(artifact.manifest["logit_scale"])
        self.logit_bias = artifact.manifest["logit_bias"]  # 0 where the model has none
        self.bias = text.new_tensor([self.logit_bias])
        self.weight = (self.scale * text).T.contiguous()

    def __call__(self, features: Tensor) -> Tensor:
        return torch.addmm(self.bias, normalize(features, dim=-1), self.weight)

    def scores(self, logits: Tensor, multi: bool) -> Tensor:
        """Softmax or, with multi, the sigmoid of a model trained with a logit bias, to which that
        is a label's probability, and else the cosine similarity."""
        if not multi:
            return logits.softmax(-1)
        return logits.sigmoid() if self.logit_bias else logits / self.scale


def text_features(artifact: Artifact, texts: list[str], templates: list[str],
                  model: Optional[CompiledCLIP] = None, truncate: bool = False) -> Tensor:
    """`average` of an artifact, from the user's cache or by the model, loaded if not given."""
    if "text" not in artifact.encoders:
        raise UserError(f"{artifact.folder} holds no text encoder; compile with --encoder both")
    modules = [each["sha256"] for each in artifact.manifest["modules"].values()]
    key = json.dumps([modules, texts, templates, truncate]).encode()
    path = kernels.cache().with_name("zeroshot") / f"{hashlib.sha256(key).hexdigest()}.npy"
    with suppress(OSError, ValueError, EOFError):  # there is none, or it is damaged
        return torch.from_numpy(np.load(path))
    model = model or load(artifact.folder, cuda_graphs=False, force=True)[0]
    found = average(artifact, model.encode_text, texts, templates, truncate)
    with suppress(OSError):  # the cache cannot be written
        path.parent.mkdir(parents=True, exist_ok=True)
        draft = path.with_suffix(f".{os.getpid()}.npy")
        np.save(draft, found.numpy())
        os.replace(draft, path)
    return found


def average(artifact: Artifact, encode: Callable[[Tensor], Tensor], texts: list[str],
            templates: list[str], truncate: bool) -> Tensor:
    """A text encoder's features, float32 [texts, E] of length 1 on the CPU, each the mean over
    templates.  Raises UserError for texts that are too long, unless they are to be truncated."""
    lines = [each.replace("{}", text) for text in texts for each in templates]
    try:
        tokens = artifact.model.tokenizer()(lines, truncate=truncate)
    except RuntimeError as problem:
        raise UserError(str(problem)) from problem
    found = normalize(encode(tokens), dim=-1).unflatten(0, (len(texts), len(templates)))
    return normalize(found.mean(1), dim=-1).cpu()


def templates_for(artifact: Artifact, values: Optional[Texts]) -> list[str]:
    """The default is ours; labels of the embedded model, which knows few words, are phrases."""
    default = ["{}"] if artifact.origin.kind == "demo" else list(TEMPLATES)
    return read_texts(values, "templates") if values else default


def read_texts(values: Texts, option: str) -> list[str]:
    """Labels or templates: several texts, or one with {}, as they are; `imagenet`: open_clip's; a
    UTF-8 file of lines, of which empty ones drop.  Raises UserError for what does not serve."""
    values = [str(values)] if isinstance(values, (str, Path)) else list(values)
    name = values[0] if len(values) == 1 and "{}" not in values[0] else None
    if name == "imagenet":
        try:
            from open_clip.zero_shot_metadata import (
                IMAGENET_CLASSNAMES as names, OPENAI_IMAGENET_TEMPLATES as templates)
        except ImportError as problem:
            raise UserError(f"--{option} imagenet is open_clip's, which is missing; give a file, "
                            "or pip install open_clip_torch") from problem
        values = list(names) if option == "labels" else [each("{}") for each in templates]
    elif name:
        try:
            lines = Path(name).read_text(encoding="utf-8-sig").splitlines()
        except (OSError, UnicodeDecodeError) as problem:
            raise UserError(f"--{option} {name!r} is one text and no file in UTF-8 ({problem}); "
                            "pass at least two texts, or a file with one in each line") from problem
        values = [line.strip() for line in lines if line.strip()]
    if option == "labels" and len(values) < 2:
        raise UserError(f"{name or 'this data set'} has {len(values)} labels; give at least two")
    if option == "templates" and (wrong := [each for each in values if "{}" not in each]):
        raise UserError(f"template {wrong[0]!r} has no {{}}, where the label belongs")
    return values
