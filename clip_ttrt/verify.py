"""python -m clip_ttrt.verify: errors of compiled encoders against the original model in fp32."""
import sys
from contextlib import contextmanager
from random import Random
from typing import Any, Callable, Optional, Sequence

import torch
from torch.nn.functional import cosine_similarity, interpolate, normalize

from clip_ttrt import pictures
from clip_ttrt.artifact import Artifact
from clip_ttrt.checkpoint import Checkpoint, original_with_weights
from clip_ttrt.contexts import memory_errors
from clip_ttrt.demo import scenes
from clip_ttrt.families import FAMILIES
from clip_ttrt.runtime import CompiledCLIP

COSINE_BOUND = {"fp32": 0.999999, "tf32": 0.9999, "fp16": 0.9999, "bf16": 0.999, "fp8": 0.99}
MEDIAN_BOUND = {"fp8": 0.998}  # of cosines, where the smallest alone says little
TOP1_BOUND = {"fp32": 0.2, "tf32": 0.2, "fp16": 0.2, "bf16": 0.5, "fp8": 0.5}  # points, demo model
REFERENCE_BATCH = 64
PROBED_BATCHES = (1, 2, 3, 4, 5, 6, 7, 8, 12, 16, 24, 32, 33, 48, 64, 96, 127, 128, 192, 255, 256,
                  384, 511, 512)


def errors(actual: torch.Tensor, reference: torch.Tensor) -> dict[str, float]:
    """Errors of rows [N, D], features or logits, in float64; NaN where a row has no finite norm.

    abs_*: absolute difference, over all elements.  rel_*: norm of a row's difference over the
    norm of the reference row, over all rows.  cos_*: cosine between a row and its reference.
    """
    a, b = actual.detach().double().cpu(), reference.detach().double().cpu()
    found = {"abs": (a - b).abs(), "rel": (a - b).norm(dim=1) / b.norm(dim=1),
             "cos": cosine_similarity(a, b, dim=1)}
    figures = {"rows": len(a)}
    for name, values in found.items():
        wanted = ("min" if name == "cos" else "max", "mean", "median")
        figures |= {f"{name}_{which}": getattr(values, which)().item() for which in wanted}
    return figures


def inputs_for(model: str, resolution: int, preprocess: Optional[Callable] = None
               ) -> tuple[torch.Tensor, list[str], torch.Tensor, str]:
    """Held-out scenes for the demo model, eight photographs for the others: images float32
    [N, 3, R, R], captions, the index of each image's caption [N], and a description."""
    if model == "demo":
        drawn, labels = scenes.held_out_set()
        images, lines = scenes.to_input(drawn), scenes.held_out_classes()
        about = f"{len(images)} scenes of {len(lines)} combinations held out from training"
    else:
        images, lines = pictures.load(resolution, preprocess)
        labels, about = torch.arange(len(images)), f"{len(images)} pictures and their captions"
    return images, lines, labels, about


def more_images(images: torch.Tensor, count: int) -> torch.Tensor:
    """Images [N, 3, R, R] and, up to count, seeded mixes of crops of two of them, some flipped."""
    random, side = Random(0), images.shape[-1]

    def crop(image: torch.Tensor) -> torch.Tensor:
        size = random.randint(side // 2, side)
        top, left = random.randint(0, side - size), random.randint(0, side - size)
        part = image[None, :, top:top + size, left:left + size]
        whole = interpolate(part, (side, side), mode="bilinear")[0]
        return whole.flip(2) if random.random() < 0.5 else whole

    pairs = (random.sample(list(images), 2) for _ in range(count - len(images)))
    mixed = (crop(one).lerp(crop(other), random.uniform(0.2, 0.8)) for one, other in pairs)
    return torch.stack([*images, *mixed])


def more_lines(lines: list[str], count: int) -> list[str]:
    """Captions and, up to count, the beginnings of three of them in one, no two alike."""
    random, different = Random(0), dict.fromkeys(lines)
    while len(different) < count:
        parts = (line.split() for line in random.choices(lines, k=3))
        words = [word for part in parts for word in part[:random.randint(1, len(part))]]
        different[" ".join(words)] = None
    return list(different)


def repeated(rows: Sequence, count: int) -> Any:
    """Rows and, up to count, seeded choices of them: fp8 is not calibrated for mixes."""
    several = [*rows, *Random(0).choices(rows, k=max(0, count - len(rows)))]
    return torch.stack(several) if isinstance(rows, torch.Tensor) else several


def shortened(tokens: torch.Tensor, length: int) -> torch.Tensor:
    """Texts int [N, T] that end within so many tokens: longer ones are cut, and end with them."""
    last = torch.where(tokens.argmax(1) < length, tokens[:, length - 1], tokens.amax(1))
    return torch.cat([tokens[:, :length - 1], last[:, None], 0 * tokens[:, length:]], dim=1)


@contextmanager
def exact_fp32():
    """No TF32 in PyTorch's own kernels, so that the fp32 reference is one."""
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    before = matmul.allow_tf32, cudnn.allow_tf32
    matmul.allow_tf32 = cudnn.allow_tf32 = False
    try:
        yield
    finally:
        matmul.allow_tf32, cudnn.allow_tf32 = before


def reference_features(checkpoint: Checkpoint, rows: dict, device: str) -> dict[str, torch.Tensor]:
    """Features of the original model in fp32, float32 [rows, embed_dim], on the CPU."""
    model = original_with_weights(checkpoint, device)
    with torch.no_grad(), exact_fp32():
        images = {"image": model.encode_image}  # the others are texts
        return {name: torch.cat([images.get(name, model.encode_text)(part.to(device)).cpu()
                                 for part in inputs.split(REFERENCE_BATCH)])
                for name, inputs in rows.items()}


def batches_to_probe(artifact: Artifact) -> tuple[int, ...]:
    """Batch sizes to try, since an engine can be right at one and wrong at another: up to 512 or
    the optimum, and none for TorchScript, which chooses no kernels ahead of time."""
    if artifact.manifest["backend"] == "torchscript":
        return ()
    batch = artifact.batch
    largest = min(batch.maximum, max(batch.optimal, PROBED_BATCHES[-1]))
    inside = (size for size in PROBED_BATCHES if batch.minimum <= size <= largest)
    return tuple(sorted({batch.minimum, batch.optimal, largest, *inside}))


def compare(artifact: Artifact, checkpoint: Checkpoint, inputs: Optional[tuple] = None
            ) -> dict[str, Any]:
    """Compare an artifact with the original model; the report is plain data for JSON.

    inputs: as of `inputs_for`, the default, perhaps without labels.  `passed` is false outside the
    bounds of what the artifact computes in, with the reasons in `failures`.
    Raises UserError where the GPU's memory runs out.
    """
    sizes, side = batches_to_probe(artifact), artifact.dimensions.image_resolution
    images, lines, labels, about = inputs or inputs_for(
        artifact.manifest["model"], side, artifact.model.transform())
    most, counts = max(sizes, default=0), {"image": len(images), "text": len(lines)}
    in_fp8 = artifact.manifest["computes_in"] == "fp8"
    fill_images, fill_lines = (repeated, repeated) if in_fp8 else (more_images, more_lines)
    rows = {"image": fill_images(images, most),
            "text": artifact.model.tokenizer()(fill_lines(lines, most), truncate=True)}
    features, found, batches = {}, {}, {}
    lengths = artifact.manifest["modules"].get("text", {}).get("lengths", [])
    short = {f"text{length}": length for length in lengths[:-1]}
    with memory_errors("verifying"), torch.no_grad():
        rows = {name: rows[name] for name in artifact.encoders}
        for name, length in short.items():
            rows[name] = shortened(rows["text"][:most or REFERENCE_BATCH], length)
        references = reference_features(checkpoint, rows, artifact.device)
        model = CompiledCLIP(artifact)
        for name, reference in references.items():
            encode = model.encode_image if name == "image" else model.encode_text
            count, x = counts.get(name), rows[name][..., :short.get(name)].to(model.device)
            features[name] = encode(x[:count]).cpu(), reference[:count]
            found[name] = errors(*features[name])
            batches[name] = {str(size): errors(encode(x[:size]), reference[:size])["cos_min"]
                             for size in sizes}
    report = {"inputs": about, "weights": checkpoint.origin.describe(), "errors": found,
              "reference": FAMILIES[checkpoint.dimensions.family][0], "batches": batches}
    if len(artifact.encoders) == 2:
        scale = checkpoint.state_dict["logit_scale"].exp().item()
        compiled, reference = (
            scale * normalize(image.double(), dim=-1) @ normalize(text.double(), dim=-1).t()
            for image, text in zip(features["image"], features["text"]))
        found["logits"] = errors(compiled, reference)
        chosen, right = compiled.argmax(dim=1), reference.argmax(dim=1)
        hits = {"reference": right == labels, "compiled": chosen == labels,
                "agreement": chosen == right} if labels is not None else {}
        report["top1"] = {name: hit.double().mean().item() * 100 for name, hit in hits.items()}
    report["failures"] = failures(artifact, checkpoint, report)
    report["passed"] = not report["failures"]
    return report


def failures(artifact: Artifact, checkpoint: Checkpoint, report: dict[str, Any]) -> list[str]:
    """What lies outside the bounds, a sentence each.  A NaN is outside every bound."""
    precision = artifact.manifest["computes_in"]  # whatever was asked
    bound, found = COSINE_BOUND[precision], []
    for name in report["batches"]:
        cosines = {"": report["errors"][name]["cos_min"]}
        cosines |= {f" at batch {size}": each for size, each in report["batches"][name].items()}
        wrong = [f"{each:.7f}{where}" for where, each in cosines.items() if not each >= bound]
        if wrong:
            found.append(f"{name}: smallest cosine {', '.join(wrong)} < {bound} ({precision})")
        least = MEDIAN_BOUND.get(precision)
        if least and not (median := report["errors"][name]["cos_median"]) >= least:
            found.append(f"{name}: median cosine {median:.7f} < {least} ({precision})")
    if checkpoint.origin.kind == "demo" and report.get("top1"):
        change = abs(report["top1"]["compiled"] - report["top1"]["reference"])
        if not change <= TOP1_BOUND[precision]:
            found.append(f"top-1 changed by {change:.2f} points, over {TOP1_BOUND[precision]}")
    return found


if __name__ == "__main__":
    from clip_ttrt.cli import main
    sys.exit(main(["verify", *sys.argv[1:]]))
