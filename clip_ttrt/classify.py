"""python -m clip_ttrt.classify: zero-shot classification of one picture."""
import os
import re
import sys
from pathlib import Path

import torch

from clip_ttrt import deprecations
from clip_ttrt.artifact import Artifact
from clip_ttrt.demo import captions
from clip_ttrt.errors import UserError
from clip_ttrt.runtime import load


def read_labels(values: list[str]) -> list[str]:
    """Several texts as they are; a single value is a UTF-8 file with one text in each line.

    Raises UserError where there are not at least two texts.
    """
    if len(values) > 1:
        return values
    [file] = values
    if not os.path.isfile(file):
        raise UserError(f"--labels {file!r} is one text and no file; pass at least two texts, or "
                        "a file with one in each line")
    try:
        lines = Path(file).read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as problem:
        raise UserError(f"{file} is not a text in UTF-8 that can be read: {problem}") from problem
    labels = [line.strip() for line in lines if line.strip()]
    if len(labels) < 2:
        raise UserError(f"{file} holds {len(labels)} texts; classification needs at least two")
    return labels


def unknown_words(artifact: Artifact, labels: list[str]) -> list[str]:
    """Words and marks of the labels that the embedded model, if it is that, was never trained on."""
    if artifact.origin.kind != "demo":
        return []
    words = re.findall(r"\w+|[^\w\s]", " ".join(labels).lower())
    known = captions.vocabulary()
    return [word for word in dict.fromkeys(words) if word not in known]


def classify(folder: Path, image: Path, labels: list[str], force: bool = False) -> torch.Tensor:
    """Probabilities float32 [labels] of texts for a picture.

    Raises UserError for a bad artifact, a file that is no picture, or a label of over 77 tokens.
    """
    from PIL import Image

    model, preprocess = load(folder, force=force, cuda_graphs=False)  # a capture costs two calls
    try:
        with Image.open(image) as picture:
            pixels = preprocess(picture)
    except OSError as problem:  # Pillow's own errors are, too
        raise UserError(f"{image} is not a picture that can be read: {problem}") from problem
    try:
        tokens = deprecations.clip().tokenize(labels)
    except RuntimeError as problem:
        raise UserError(str(problem)) from problem
    logits, _ = model(pixels[None].to(model.device), tokens.to(model.device))
    return logits[0].softmax(dim=-1).cpu()


if __name__ == "__main__":
    from clip_ttrt.cli import main

    sys.exit(main(["classify", *sys.argv[1:]]))
