"""python -m clip_ttrt.classify: zero-shot classification of one picture."""
import sys
from pathlib import Path

from clip_ttrt.demo import captions
from clip_ttrt.errors import UserError
from clip_ttrt.runtime import load


def read_labels(values: list[str]) -> list[str]:
    """Several texts as they are; one value is a UTF-8 file of lines, of which empty ones drop."""
    if len(values) > 1:
        return values
    try:
        lines = Path(values[0]).read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as problem:
        raise UserError(f"--labels {values[0]!r} is one text and no file in UTF-8 ({problem}); "
                        "pass at least two texts, or a file with one in each line") from problem
    labels = [line.strip() for line in lines if line.strip()]
    if len(labels) < 2:
        raise UserError(f"{values[0]} holds {len(labels)} texts; at least two are needed")
    return labels


def classify(folder: Path, image: Path, labels: list[str], force: bool) -> int:
    """Print each label's probability.  Raises UserError, or OSError where there is no picture."""
    from PIL import Image

    labels = read_labels(labels)
    model, preprocess = load(folder, force=force, cuda_graphs=False)  # no graph for one call
    with Image.open(image) as picture:
        pixels = preprocess(picture)
    try:
        tokens = model.tokenize(labels)
    except RuntimeError as problem:  # over 77 tokens
        raise UserError(str(problem)) from problem
    logits, _ = model(pixels[None], tokens)
    if model.artifact.origin.kind == "demo" and (unknown := captions.unknown_words(labels)):
        print(f"clip_ttrt: the embedded model was never trained on {', '.join(unknown)}: its "
              "answer for labels with these words means nothing", file=sys.stderr)
    for probability, label in sorted(zip(logits[0].softmax(0).tolist(), labels), reverse=True):
        print(f"{probability:7.2%}  {label}")
    return 0


if __name__ == "__main__":
    from clip_ttrt.cli import main
    sys.exit(main(["classify", *sys.argv[1:]]))
