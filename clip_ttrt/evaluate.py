"""Accuracy of an artifact and of the original model in fp32."""
import inspect
import re
from functools import lru_cache, partial
from itertools import chain
from pathlib import Path
from typing import Any, Optional, Union

import numpy as np
import torch
from torch import Tensor, tensor
from torch.nn.functional import normalize
from torchvision import datasets

from clip_ttrt import verify
from clip_ttrt.artifact import read_artifact
from clip_ttrt.checkpoint import original_with_weights, reload_checkpoint
from clip_ttrt.errors import UserError
from clip_ttrt.labelled import (
    difference, features_of, labels_of, numbered, read_rows, shards, wilson)
from clip_ttrt.options import EvaluateOptions
from clip_ttrt.pipeline.sources import Record, Rows, choose, reason
from clip_ttrt.pipeline.worker import Worker
from clip_ttrt.zeroshot import average, read_texts, templates_for, text_features

BLOCK = 1024  # rows whose similarities are in memory at once


class Compared(Worker):
    """Embeds by the artifact and, behind it, by the original model in fp32: [size, 2 E]."""

    def __init__(self, weights: Optional[str], trust: bool, *arguments: Any):
        super().__init__(*arguments)
        facts = self.model.artifact
        checkpoint = reload_checkpoint(facts.manifest["model"], facts.origin, weights, trust)
        self.original = original_with_weights(checkpoint, str(self.model.device))
        self.encode = self.encode_by_both

    def encode_by_both(self, images: Tensor) -> Tensor:
        with verify.exact_fp32():
            original = [self.original.encode_image(part)
                        for part in images.split(verify.REFERENCE_BATCH)]
        return torch.cat([self.model.encode_image(images), torch.cat(original)], 1)


class TorchvisionRows(Rows):
    """Of one of torchvision's data sets.  items: arguments of `torchvision_set` and a row."""

    def read(self, start: int, stop: int) -> list[Record]:
        records = []
        for *which, row in self.items(start, stop):
            picture, label = torchvision_set(*which)[row]
            facts = {"image_path": f"{which[0]}:{row}", "label": int(label)}
            pixels = np.asarray(picture.convert("RGB"))
            records.append(Record(facts["image_path"], pixels, facts, None))
        return records


def evaluate(artifact: Union[str, Path], dataset: Any, **options: Any) -> dict[str, Any]:
    """Zero-shot accuracy, or recall of captions, of an artifact and of the original model in fp32
    on the same pixels, which equal Pillow's.

    dataset: a folder with a folder a class, a table of paths and labels or captions, as
    `read_rows` takes them, or the name of one of torchvision's.  options: of `EvaluateOptions`.
    Returns counts and, of `compiled`, `original` and their `difference`, shares of right answers
    with 95 % intervals.  Raises UserError for bad input, and what `embed` raises."""
    options, artifact = EvaluateOptions(**options), read_artifact(artifact)
    rows, texts, owners = read_dataset(str(dataset), options)
    of_captions, worker = owners is not None, Worker
    templates = ["{}"] if of_captions else templates_for(artifact, options.templates)
    text = {"compiled": text_features(artifact, texts, templates, truncate=of_captions)}
    if options.original:
        how = options.weights, options.trust_weights
        checkpoint = reload_checkpoint(artifact.manifest["model"], artifact.origin, *how)
        text["original"] = average(artifact, lambda tokens: verify.reference_features(
            checkpoint, {"text": tokens}, artifact.device)["text"], texts, templates, of_captions)
        worker = partial(Compared, *how)
    features, labels, _, bad = features_of(artifact, rows, worker=worker, decode="exact",
                                           gpus=options.gpus, force=options.force)
    images = features.split(artifact.dimensions.embed_dim, 1)
    hits = {side: right_answers(normalize(image).to(artifact.device), text[side], labels, owners)
            for side, image in zip(text, images)}
    report = {side: {name: wilson(right) for name, right in found.items()}
              for side, found in hits.items()}
    if options.original:
        report["difference"] = {name: difference(right, hits["compiled"][name])
                                for name, right in hits["original"].items()}
    return {"artifact": str(artifact.folder), "dataset": str(dataset), "images": len(labels),
            "bad": bad, "texts": len(texts), "templates": len(templates), **report}


def right_answers(images: Tensor, texts: Tensor, labels: Tensor, owners: Optional[Tensor]
                  ) -> dict[str, np.ndarray]:
    """Of each measure which answers are right, as float.

    labels: the text of each image or, where captions have owners, the number of each image."""
    texts = texts.to(images.device)
    if owners is None:
        both, counts = {"top-": nearest(images, texts, 5) == labels[:, None]}, (1, 5)
    else:
        there, counts = torch.isin(owners, labels), (1, 5, 10)  # of images that can be read
        texts, owners = texts[there.to(texts.device)], owners[there]
        both = {"image to text R@": owners[nearest(images, texts, 10)] == labels[:, None],
                "text to image R@": labels[nearest(texts, images, 10)] == owners[:, None]}
    return {f"{name}{k}": right[:, :k].any(1).double().numpy() for name, right in both.items()
            for k in counts if k == 1 or k < len(texts)}


def nearest(queries: Tensor, keys: Tensor, count: int) -> Tensor:
    """Places of the `count` keys most similar to each query, best first, on the CPU."""
    return torch.cat([(block @ keys.T).topk(min(count, len(keys))).indices.cpu()
                      for block in queries.split(BLOCK)])


def read_dataset(source: str, options: EvaluateOptions) -> tuple[list, list[str], Optional[Tensor]]:
    """Shards whose metadata has a label, and texts: of classes, to which labels are indices, or
    captions, to whose owners [texts] they are equal."""
    if options.root:
        which = source, options.root, options.split
        data = torchvision_set(*which)
        names = [each if type(each) is str else each[0] for each in getattr(data, "classes", ())]
        rows = [[*which, row] for row in range(len(data))]
        return shards(rows, TorchvisionRows), read_texts(options.labels or names, "labels"), None
    rows, captions = read_rows(source, options), {}
    if options.label in rows[0][2]:
        names = labels_of(source, rows, options)
        classes = sorted({*names.tolist()}, key=lambda each: (each.isdecimal() * len(each), each))
        texts, numbers = match(classes, options)
        return numbered(rows, [numbers[name] for name in names]), texts, None
    column = choose(source, list(rows[0][2]), True, options.caption)
    for row in rows:
        captions.setdefault(row[2]["image_path"], []).append((row, row[2][column]))
    owners = [number for number, found in enumerate(captions.values()) for _ in found]
    images = numbered([found[0][0] for found in captions.values()], range(len(captions)))
    return images, [text for _, text in chain(*captions.values())], tensor(owners)


def match(classes: list[str], options: EvaluateOptions) -> tuple[list[str], dict[str, int]]:
    """Labels, and which of them each class is: the one of its name or, where no label is a class's
    name, that at its place.  By default the classes' names, and of wnids open_clip's 1,000."""
    names = [name.replace("_", " ") for name in classes]
    if all(re.fullmatch(r"n\d{8}", name) for name in classes) and not options.labels:
        labels = read_texts("imagenet", "labels")
        from timm.data import ImageNetInfo  # which open_clip needs

        names, keys = classes, ImageNetInfo().label_names()  # two labels are twice among them
    else:
        keys = labels = read_texts(options.labels or names, "labels")
    missing = [each for each, name in zip(classes, names) if name not in keys]
    if len(missing) == len(names) == len(labels):
        return labels, dict(zip(classes, range(len(classes))))
    if missing:
        raise UserError(f"{', '.join(missing[:3])}: classes that are none of the {len(labels)} "
                        f"labels; --labels takes their names, or {len(names)} in their order")
    return labels, {each: keys.index(name) for each, name in zip(classes, names)}


@lru_cache(1)
def torchvision_set(name: str, root: str, split: str) -> Any:
    """One of torchvision's data sets, of which nothing is downloaded."""
    kind = getattr(datasets, name, None)
    if not inspect.isclass(kind):
        raise UserError(f"{name} is no data set of torchvision's, which --root is for")
    values = {"split": split, "train": split == "train", "download": False}
    known = inspect.signature(kind).parameters
    try:
        return kind(root, **{key: value for key, value in values.items() if key in known})
    except (RuntimeError, ValueError, OSError, ImportError) as problem:
        raise UserError(f"torchvision's {name} ({split}) is not in {root}, and nothing is "
                        f"downloaded: {reason(problem).split('. You can use')[0]}") from problem
