"""Zero-shot classification: features of pictures times those of labels' texts.

A label's features are the mean over templates, of which each is scaled to length 1 before and the
mean behind, as CLIP's paper has it; they are kept in the user's cache."""
import hashlib
import json
import math
import os
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Callable, Optional, Sequence, Union

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import normalize

from clip_ttrt import deprecations, kernels
from clip_ttrt.artifact import Artifact
from clip_ttrt.errors import UserError
from clip_ttrt.runtime import CompiledCLIP, load

TEMPLATES = ("{}", "a photo of a {}.", "a photo of the {}.", "a picture of a {}.",
             "a close-up of a {}.", "a blurry photo of a {}.", "a drawing of a {}.")
Texts = Union[str, Path, Sequence[str]]


class ZeroShot:
    """Labels behind a model's image encoder: pictures -> a score for each label.

    model: of `clip_ttrt.load`.  labels: texts, or a file of lines.  templates: texts with {} in the
    label's place, or a file of them (default: `TEMPLATES`; the embedded model's labels as they
    are).  Of both `imagenet` is open_clip's.  multi: scores are independent, as `Head.scores` has
    them, and no probabilities of which one label is right.
    On a GPU the labels' features stay there, and the product is in the encoder's CUDA graph.
    Raises UserError for a template without {} and for texts that are too long."""

    def __init__(self, model: CompiledCLIP, labels: Texts, templates: Optional[Texts] = None,
                 multi: bool = False):
        self.model, self.labels, self.multi = model, read_labels(labels), multi
        text = text_features(model.artifact, self.labels,
                             read_templates(templates, model.artifact), model)
        self.head = Head(model.artifact, text.to(model.device))

    def logits(self, images: Union[Tensor, Sequence[Any]]) -> Tensor:
        """Images [B, 3, R, R] or a list of pictures, as `encode_image` has them -> scaled cosine
        similarities float32 [B, labels], with the logit bias of a model that has one."""
        return self.model._encode_image(images, self.head)

    def __call__(self, images: Union[Tensor, Sequence[Any]]) -> Tensor:
        """The same -> probabilities or, with multi, scores float32 [B, labels]."""
        return self.head.scores(self.logits(images), self.multi)

    def top(self, images: Union[Tensor, Sequence[Any]], k: int = 5) -> list:
        """The k best of each picture: a list of pairs of label and score, best first."""
        return best(self(images), self.labels, k)


class Head:
    """Features [B, E] -> logits [B, labels], by one matrix product.  text: [labels, E]."""

    def __init__(self, artifact: Artifact, text: Tensor):
        self.scale = math.exp(artifact.manifest["logit_scale"])
        bias = artifact.manifest.get("logit_bias")
        self.has_bias, self.bias = bias is not None, text.new_tensor([bias or 0.0])
        self.weight = (self.scale * text).T.contiguous()

    def __call__(self, features: Tensor) -> Tensor:
        return torch.addmm(self.bias, normalize(features, dim=-1), self.weight)

    def scores(self, logits: Tensor, multi: bool) -> Tensor:
        """Softmax or, with multi, what a label alone gets: the sigmoid, which is a probability to
        a model that was trained with a logit bias, and else the cosine similarity."""
        if not multi:
            return logits.softmax(-1)
        return logits.sigmoid() if self.has_bias else logits / self.scale


def best(scores: Tensor, labels: Sequence[str], k: int) -> list[list[tuple[str, float]]]:
    """The k best labels of each row and their scores, best first."""
    values, places = scores.topk(min(k, len(labels)))
    return [[(labels[place], value) for place, value in zip(*row)]
            for row in zip(places.tolist(), values.tolist())]


def text_features(artifact: Artifact, texts: list[str], templates: list[str],
                  model: Optional[CompiledCLIP] = None, truncate: bool = False) -> Tensor:
    """`average` of an artifact, from the user's cache or by the model, loaded if not given."""
    modules = [each["sha256"] for each in artifact.manifest["modules"].values()]
    key = json.dumps([modules, texts, templates, truncate]).encode()
    path = kernels.cache().with_name("zeroshot") / f"{hashlib.sha256(key).hexdigest()}.npy"
    with suppress(OSError, ValueError, EOFError):  # there is none, or it is damaged
        found = torch.from_numpy(np.load(path))
        if found.shape == (len(texts), artifact.dimensions.embed_dim):
            return found
    model = model or load(artifact.folder, cuda_graphs=False, force=True)[0]
    found = average(model.encode_text, texts, templates, truncate)
    with suppress(OSError):  # the cache cannot be written
        path.parent.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(dir=path.parent) as folder:
            np.save(Path(folder, path.name), found.numpy())
            os.replace(Path(folder, path.name), path)
    return found


def average(encode: Callable[[Tensor], Tensor], texts: list[str], templates: list[str],
            truncate: bool = False) -> Tensor:
    """A text encoder's features: float32 [texts, E] of length 1 on the CPU, each the mean over
    templates.  Raises UserError for texts that are too long, unless they are to be truncated."""
    lines = [each.replace("{}", text) for text in texts for each in templates]
    try:
        tokens = deprecations.clip().tokenize(lines, truncate=truncate)
    except RuntimeError as problem:  # over 77 tokens
        raise UserError(str(problem)) from problem
    found = normalize(encode(tokens), dim=-1).unflatten(0, (len(texts), len(templates)))
    return normalize(found.mean(1), dim=-1).cpu()


def read_labels(values: Texts) -> list[str]:
    """At least two labels: several as they are, of a file, or open_clip's."""
    labels = read_texts(values, "labels", "IMAGENET_CLASSNAMES")
    if len(labels) < 2:
        raise UserError(f"{values[0]} holds {len(labels)} texts; at least two are needed")
    return labels


def read_templates(values: Optional[Texts], artifact: Artifact) -> list[str]:
    """Texts with {}.  By default the embedded model's labels stay as they are: it knows few words,
    and they bring their own article or number."""
    if values is None:
        return ["{}"] if artifact.origin.kind == "demo" else list(TEMPLATES)
    templates = [each if isinstance(each, str) else each("{}") for each in
                 read_texts(values, "templates", "OPENAI_IMAGENET_TEMPLATES")]
    if wrong := [each for each in templates if "{}" not in each]:
        raise UserError(f"template {wrong[0]!r} has no {{}}, where the label belongs")
    return templates


def read_texts(values: Texts, option: str, imagenet: str) -> list:
    """Several texts, or one with {}, as they are; `imagenet`: open_clip's of this name; else one
    value is a UTF-8 file of lines, of which empty ones drop."""
    values = [str(values)] if isinstance(values, (str, Path)) else list(values)
    if values == ["imagenet"]:
        try:
            from open_clip import zero_shot_metadata
        except ImportError as problem:
            raise UserError(f"--{option} imagenet is open_clip's, which is missing; give a file, "
                            "or pip install open_clip_torch") from problem
        return list(getattr(zero_shot_metadata, imagenet))
    if len(values) != 1 or "{}" in values[0]:
        return values
    try:
        lines = Path(values[0]).read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as problem:
        raise UserError(f"--{option} {values[0]!r} is one text and no file in UTF-8 ({problem}); "
                        "pass at least two texts, or a file with one in each line") from problem
    return [line.strip() for line in lines if line.strip()]
