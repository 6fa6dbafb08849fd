"""python -m clip_ttrt.evaluate: accuracy of an artifact and of the original model in fp32."""
import inspect
import json
import os
import re
import sys
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
from clip_ttrt.labelled import difference, embedded, read_table, shards, wilson, with_labels
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
        self.items = self.items or json.loads(self.packed)
        return [torchvision_record(*each) for each in self.items[start:stop]]


def evaluate(artifact: Union[str, Path], dataset: Any, **options: Any) -> dict[str, Any]:
    """Zero-shot accuracy, or recall of captions, of an artifact and of the original model in fp32
    on the same pixels, which equal Pillow's.

    dataset: a folder with a folder a class, a .csv, .parquet or .json of paths and labels or
    captions, or the name of one of torchvision's.  options: of `EvaluateOptions`.
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
    features, metadata, bad = zip(*embedded(
        artifact.folder, rows, worker=worker, normalize=False, dtype="float32", decode="exact",
        gpus=options.gpus, force=options.force))
    labels = tensor([row["label"] for row in chain(*metadata)])
    if not len(labels):
        raise UserError(f"no picture of {dataset} can be read: {bad[0][0]['error']}")
    images = torch.cat([each for each in features if len(each)]).split(
        artifact.dimensions.embed_dim, 1)
    hits = {side: right_answers(normalize(image).to(artifact.device), text[side], labels, owners)
            for side, image in zip(text, images)}
    report = {side: {name: wilson(right) for name, right in found.items()}
              for side, found in hits.items()}
    if options.original:
        report["difference"] = {name: difference(right, hits["compiled"][name])
                                for name, right in hits["original"].items()}
    return {"artifact": str(artifact.folder), "dataset": str(dataset), "images": len(labels),
            "bad": sum(map(len, bad)), "texts": len(texts), "templates": len(templates), **report}


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
    """`Rows` whose metadata has a label, and texts: of classes, to which labels are indices, or
    captions, to whose owners [texts] they are equal."""
    if options.root and inspect.isclass(getattr(datasets, source, None)):
        return read_torchvision((source, options.root, options.split), options)
    if not os.path.exists(source):
        raise UserError(f"{source} is no file or folder, and no data set of torchvision's, which "
                        "--root is for")
    table, captions = read_table(source, options), {}
    if not table or options.label in table[0][1]:
        paths, names = with_labels(source, table, options)
        classes = sorted(set(names.tolist()), key=lambda each: (each.isdecimal() * len(each), each))
        texts, numbers = match(classes, options)
        return shards(paths, [numbers[name] for name in names]), texts, None
    column = choose(source, list(table[0][1]), True, options.caption)
    for path, row in table:
        found = row.get(column) or []
        captions.setdefault(path, []).extend([found] if isinstance(found, str) else found)
    owners = [number for number, found in enumerate(captions.values()) for _ in found]
    texts = list(chain(*captions.values()))
    return shards(captions, range(len(captions))), texts, tensor(owners)


def match(classes: list[str], options: EvaluateOptions) -> tuple[list[str], dict[str, int]]:
    """Labels, and which of them each class is: the one of its name or, where no label is a class's
    name, that at its place.  By default the classes' names, and of wnids open_clip's."""
    names = [name.replace("_", " ") for name in classes]
    of_wnids = "imagenet" if all(re.fullmatch(r"n\d{8}", name) for name in classes) else names
    labels = read_texts(options.labels or of_wnids, "labels")
    missing = [name for name in names if name not in labels]
    if missing == names and len(names) == len(labels):
        return labels, dict(zip(classes, range(len(classes))))
    if missing:
        raise UserError(f"{', '.join(missing[:3])}: classes that are none of the {len(labels)} "
                        f"labels; --labels takes their names, or {len(names)} in their order")
    return labels, {each: labels.index(name) for each, name in zip(classes, names)}


def read_torchvision(where: tuple, options: EvaluateOptions) -> tuple[list, list[str], None]:
    data = torchvision_set(*where)
    names = [each if isinstance(each, str) else each[0] for each in getattr(data, "classes", ())]
    if not (options.labels or names):
        raise UserError(f"torchvision's {where[0]} does not name its classes; give --labels")
    rows = [[*where, row] for row in range(len(data))]
    return shards(rows, kind=TorchvisionRows), read_texts(options.labels or names, "labels"), None


def torchvision_record(name: str, root: str, split: str, row: int) -> Record:
    key = f"{name}:{row}"
    try:
        picture, label = torchvision_set(name, root, split)[row]
        facts = {"image_path": key, "label": int(label)}
        return Record(key, np.asarray(picture.convert("RGB")), facts, None)
    except Exception as problem:  # of Pillow's, which share no type
        return Record(key, None, {}, reason(problem))


@lru_cache(1)
def torchvision_set(name: str, root: str, split: str) -> Any:
    """One of torchvision's data sets, of which nothing is downloaded."""
    kind = getattr(datasets, name)
    known = inspect.signature(kind).parameters
    values = {"split": split, "train": split == "train", "download": False}
    try:
        return kind(root, **{key: value for key, value in values.items() if key in known})
    except (RuntimeError, ValueError, OSError, ImportError) as problem:
        files = [f"{name}/raw/{file.rpartition('/')[2].removesuffix('.gz')}"
                 for file, _ in getattr(kind, "resources", ())]
        raise UserError(f"torchvision's {name} ({split}) is not in {root}: "
                        f"{reason(problem).split('. You can use')[0]}; nothing is downloaded: "
                        f"place {', '.join(files) or 'its files'} there") from problem


if __name__ == "__main__":
    from clip_ttrt.cli import main
    sys.exit(main(["evaluate", *sys.argv[1:]]))
