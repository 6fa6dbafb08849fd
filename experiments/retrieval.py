"""What the embedded trained model loses by compiling: top-1 and recall@1 before and after, a row an artifact.

    python -m experiments.retrieval --precisions fp16 tf32 fp32 --attention plugin --artifacts artifacts --out results/h200/retrieval.csv

Held-out scenes (`clip_ttrt.demo`): 1,024 pictures of 128 combinations that training never saw, and their 128 captions.
Top-1: pictures whose nearest caption is right.  Recall@1: between the 128 captions and the first picture of each, in both
directions.  *original* is the original `clip` model in fp32 on the same weights; all figures in percent.
"""
import argparse
import sys
import tempfile
from pathlib import Path
from typing import Mapping

import torch

from clip_ttrt import pipeline
from clip_ttrt.accuracy import Inputs, inputs_for, reference_features
from clip_ttrt.artifact import MANIFEST, Artifact, load_modules, read_artifact
from clip_ttrt.checkpoint import reload_checkpoint
from clip_ttrt.errors import UserError
from clip_ttrt.model import CompiledCLIP
from clip_ttrt.progress import Progress
from experiments.accuracy import folder_name
from experiments.floor import turn
from experiments.record import append_row, provenance


def figures(features: Mapping[str, torch.Tensor], labels: torch.Tensor) -> dict[str, float]:
    """Percentages from features of pictures [N, D] and of captions [M, D], and the right caption of each picture [N].

    top1: of all pictures; recall_image_to_text, recall_text_to_image: among the captions and the first picture of each.
    """
    image, text = (torch.nn.functional.normalize(features[name].double(), dim=-1) for name in ("image", "text"))
    similarity = image @ text.t()
    first = torch.stack([(labels == caption).nonzero()[0, 0] for caption in range(len(text))])
    square, diagonal = similarity[first], torch.arange(len(text))
    hits = {"top1": similarity.argmax(1) == labels, "recall_image_to_text": square.argmax(1) == diagonal, "recall_text_to_image": square.argmax(0) == diagonal}
    return {name: hit.double().mean().item() * 100 for name, hit in hits.items()}


def nearest(features: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Each picture's nearest caption [N]."""
    return (features["image"].double() @ torch.nn.functional.normalize(features["text"].double(), dim=-1).t()).argmax(1)


def compiled_features(artifact: Artifact, inputs: Inputs) -> dict[str, torch.Tensor]:
    """Features of an artifact on the CPU, float32."""
    model = CompiledCLIP(artifact, load_modules(artifact))
    with torch.no_grad():
        return {"image": model.encode_image(inputs.images.to(model.device)).cpu(), "text": model.encode_text(inputs.tokens.to(model.device)).cpu()}


def row_of(artifact: Artifact, pictures: int = 0) -> dict[str, str]:
    """The CSV row of one artifact of the embedded model.  pictures: only so many of them, a whole number of sets of 128; 0: all."""
    manifest = artifact.manifest
    if manifest["model"] != "demo" or artifact.origin.kind != "demo":
        raise UserError(f"{artifact.folder} does not hold the embedded trained model; others have no held-out pictures")
    inputs = inputs_for("demo", artifact.dimensions.image_resolution)
    if pictures:
        first = [(inputs.labels == caption).nonzero()[:pictures // len(inputs.tokens), 0] for caption in range(len(inputs.tokens))]
        chosen = torch.cat(first).sort().values
        inputs = Inputs(inputs.images[chosen], inputs.tokens, inputs.labels[chosen], inputs.description)
    checkpoint = reload_checkpoint("demo", artifact.origin)
    both = {"original": reference_features(checkpoint, inputs, ("image", "text"), artifact.device), "compiled": compiled_features(artifact, inputs)}
    found = {name: figures(features, inputs.labels) for name, features in both.items()}
    percentages = {f"{name}_{side}": f"{found[side][name]:.3f}" for name in found["original"] for side in found}
    agreement = (nearest(both["original"]) == nearest(both["compiled"])).double().mean().item() * 100
    return {"model": "demo", "weights": artifact.origin.kind, "backend": manifest["backend"], "attention": manifest["attention"], "precision": manifest["precision"],
            "computes_in": manifest["computes_in"], "batch": str(artifact.batch), "images": str(len(inputs.images)), "texts": str(len(inputs.tokens)),
            **percentages, "agreement": f"{agreement:.3f}", **provenance()}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--precisions", nargs="+", default=["fp16", "tf32", "fp32"])
    parser.add_argument("--batch", default="1:32:256")
    parser.add_argument("--attention", default="native", help="native, plugin (fp16) or auto")
    parser.add_argument("--backend", default="auto")
    parser.add_argument("--pictures", type=int, default=0, metavar="N", help="only so many of the 1,024, in sets of 128 (default: all)")
    parser.add_argument("--artifacts", type=Path, help="take artifacts from this folder (under the names of experiments.accuracy), and keep new ones there")
    parser.add_argument("--out", type=Path, default=Path("results/retrieval.csv"))
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        for precision in options.precisions:
            folder = (options.artifacts or Path(temporary)) / folder_name("demo", precision, options.batch, options.attention)
            if not (folder / MANIFEST).is_file():
                pipeline.compile(progress=Progress(), model="demo", precision=precision, batch=options.batch, attention=options.attention, backend=options.backend,
                                 verify=False, output=folder)
            with turn():
                row = row_of(read_artifact(folder), options.pictures)
            append_row(options.out, row)
    return 0


if __name__ == "__main__":
    sys.exit(main())
