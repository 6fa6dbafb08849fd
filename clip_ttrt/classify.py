"""python -m clip_ttrt.classify DIR --image FILE --labels "a cat" "a dog": zero-shot classification of one picture."""
import argparse
import sys
from pathlib import Path
from typing import Optional

import torch

from clip_ttrt import deprecations
from clip_ttrt.errors import UserError
from clip_ttrt.runtime import load
from clip_ttrt.shell import run


def classify(folder: Path, image: Path, labels: list[str], force: bool = False) -> torch.Tensor:
    """Probabilities float32 [labels] of texts for a picture.

    Raises UserError for a bad artifact, a file that is no picture, or a label of over 77 tokens.
    """
    from PIL import Image, UnidentifiedImageError

    model, preprocess = load(folder, force=force, cuda_graphs=False)  # one call is not worth two captures
    try:
        with Image.open(image) as picture:
            pixels = preprocess(picture)
    except (OSError, UnidentifiedImageError) as problem:
        raise UserError(f"{image} is not a picture that can be read: {problem}") from problem
    try:
        tokens = deprecations.clip().tokenize(labels)
    except RuntimeError as problem:
        raise UserError(str(problem)) from problem
    logits, _ = model(pixels[None].to(model.device), tokens.to(model.device))
    return logits[0].softmax(dim=-1).cpu()


def main(arguments: Optional[list[str]] = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m clip_ttrt.classify", description="Zero-shot classification of one picture.")
    parser.add_argument("folder", type=Path, metavar="DIR", help="the artifact")
    parser.add_argument("--image", type=Path, required=True, metavar="FILE", help="a picture in any format that Pillow reads")
    parser.add_argument("--labels", nargs="+", required=True, metavar="TEXT", help="the texts to choose from")
    parser.add_argument("--force", action="store_true", help="use an artifact that failed its verification")
    options = parser.parse_args(arguments)
    probabilities = classify(options.folder, options.image, options.labels, options.force)
    for probability, label in sorted(zip(probabilities.tolist(), options.labels), reverse=True):
        print(f"{probability:7.2%}  {label}")
    return 0


if __name__ == "__main__":
    sys.exit(run(main))
