"""Compiled encoders against the original `clip` model in fp32 on the same weights and inputs."""
import statistics
import time
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from typing import Any, Callable

import torch

from clip_ttrt import deprecations, pictures
from clip_ttrt.artifact import Artifact
from clip_ttrt.checkpoint import Checkpoint, original_with_weights
from clip_ttrt.demo import scenes
from clip_ttrt.runtime import CompiledCLIP, out_of_memory

COSINE_BOUND = {"fp32": 0.999999, "tf32": 0.9999, "fp16": 0.9999, "bf16": 0.999}
# percentage points that the trained demo model may gain or lose
TOP1_BOUND = {"fp32": 0.2, "tf32": 0.2, "fp16": 0.2, "bf16": 0.5}
REFERENCE_BATCH = 64
PROBED_BATCHES = (1, 2, 3, 4, 5, 6, 7, 8, 12, 16, 24, 32, 33, 48, 64, 96, 127, 128, 192, 255, 256, 384, 511, 512)


@dataclass(frozen=True)
class Inputs:
    """What both models see: images float32 [N, 3, R, R], tokens int32 [M, 77], the right text of each image [N]."""

    images: torch.Tensor
    tokens: torch.Tensor
    labels: torch.Tensor
    description: str


@dataclass(frozen=True)
class Errors:
    """Errors of one set of rows (features or logits) against the reference.

    abs_*: absolute difference, over all elements.  rel_*: norm of a row's difference over the
    norm of the reference row, over all rows.  cos_*: cosine between a row and its reference.
    """

    rows: int
    abs_max: float
    abs_mean: float
    abs_median: float
    rel_max: float
    rel_mean: float
    rel_median: float
    cos_min: float
    cos_mean: float


def errors(actual: torch.Tensor, reference: torch.Tensor) -> Errors:
    """Compare rows [N, D] in float64; a NaN or infinity anywhere makes every figure NaN."""
    a, b = actual.detach().double().cpu(), reference.detach().double().cpu()
    difference = (a - b).abs()
    relative = (a - b).norm(dim=1) / b.norm(dim=1)
    cosine = torch.nn.functional.cosine_similarity(a, b, dim=1)
    if not torch.isfinite(difference).all():
        difference, relative, cosine = (torch.full_like(t, float("nan")) for t in (difference, relative, cosine))
    return Errors(len(a), difference.max().item(), difference.mean().item(), difference.median().item(),
                  relative.max().item(), relative.mean().item(), relative.median().item(), cosine.min().item(), cosine.mean().item())


def inputs_for(model: str, resolution: int) -> Inputs:
    """Meaningful inputs: held-out scenes for the demo model, eight photographs for the others."""
    if model == "demo":
        images, labels = scenes.held_out_set()
        captions = scenes.held_out_classes()
        return Inputs(scenes.to_input(images), deprecations.clip().tokenize(captions), labels,
                      f"{len(images)} scenes of {len(captions)} combinations held out from training")
    images, captions = pictures.load(resolution)
    return Inputs(images, deprecations.clip().tokenize(captions), torch.arange(len(images)), f"{len(images)} pictures and their captions")


def distinct_images(images: torch.Tensor, count: int, seed: int = 0) -> torch.Tensor:
    """At least count images [N, 3, R, R], every one another: the given ones, then seeded mixes of crops of two of them, flipped or not."""
    generator, side, made = torch.Generator().manual_seed(seed), images.shape[-1], []

    def below(limit: int) -> int:
        return int(torch.randint(limit, (), generator=generator))

    def crop(image: torch.Tensor) -> torch.Tensor:
        size = side // 2 + below(side // 2 + 1)
        top, left = below(side - size + 1), below(side - size + 1)
        part = image[None, :, top:top + size, left:left + size]
        whole = torch.nn.functional.interpolate(part, (side, side), mode="bilinear", align_corners=False)[0]
        return whole.flip(2) if below(2) else whole

    while len(images) + len(made) < count:
        one, other = (crop(images[below(len(images))]) for _ in range(2))
        made.append(torch.lerp(one, other, torch.rand((), generator=generator)))
    return torch.cat([images, torch.stack(made)]) if made else images


def distinct_tokens(tokens: torch.Tensor, count: int, seed: int = 0) -> torch.Tensor:
    """At least count texts int [N, T], every one another: the given ones, then the beginnings of two of them in one.

    Raises ValueError where the given ones do not suffice for so many.
    """
    generator, length = torch.Generator().manual_seed(seed), tokens.shape[1]
    words = [row[1:int(row.argmax())].tolist() for row in tokens]
    start, end = int(tokens[0, 0]), int(tokens.max())
    seen, made = set(map(tuple, tokens.tolist())), []
    for _ in range(100 * count + 1):
        if len(tokens) + len(made) >= count:
            break
        text = [start]
        for chosen in torch.randint(len(words), (2,), generator=generator):
            text += words[chosen][:1 + int(torch.randint(len(words[chosen]), (), generator=generator))]
        text = [*text[:length - 1], end]
        row = (*text, *[0] * (length - len(text)))
        if row not in seen:
            seen.add(row)
            made.append(row)
    else:
        raise ValueError(f"{len(tokens)} texts do not suffice for {count} that are each another")
    return torch.cat([tokens, torch.tensor(made, dtype=tokens.dtype)]) if made else tokens


@contextmanager
def exact_fp32():
    """No TF32 in PyTorch's own kernels, so that the fp32 reference is one."""
    matmul, convolution = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = matmul, convolution


def reference_features(checkpoint: Checkpoint, inputs: Inputs, encoders: tuple[str, ...], device: str) -> dict[str, torch.Tensor]:
    """Features of the original model in fp32, float32 [rows, embed_dim], on the CPU."""
    model = original_with_weights(checkpoint, device)
    calls = {"image": (model.encode_image, inputs.images), "text": (model.encode_text, inputs.tokens)}
    with torch.no_grad(), exact_fp32():
        return {name: torch.cat([encode(part.to(device)).cpu() for part in rows.split(REFERENCE_BATCH)])
                for name, (encode, rows) in calls.items() if name in encoders}


def logits(image: torch.Tensor, text: torch.Tensor, scale: float) -> torch.Tensor:
    """Scaled cosine similarities [images, texts] of features, in float64."""
    normalised = [torch.nn.functional.normalize(features.double(), dim=-1) for features in (image, text)]
    return scale * normalised[0] @ normalised[1].t()


def milliseconds(call: Callable[[torch.Tensor], torch.Tensor], example: torch.Tensor, repeats: int = 20, warm_up: int = 5) -> float:
    """Median wall time of a call, after warm-up, the GPU's work awaited."""
    def once() -> float:
        start = time.perf_counter()
        call(example)
        if example.is_cuda:
            torch.cuda.synchronize()
        return (time.perf_counter() - start) * 1e3

    for _ in range(warm_up):
        once()
    return statistics.median(once() for _ in range(repeats))


def batches_to_probe(artifact: Artifact) -> tuple[int, ...]:
    """Batch sizes at which an artifact's engines are run: one engine is right at one size and wrong at another (experiments/bugs).

    Every size of `PROBED_BATCHES` in the compiled range, its minimum and optimum, and its maximum where that is no larger
    than the larger of 512 and the optimum.  None for TorchScript, which chooses no kernels ahead of time.
    """
    if artifact.manifest["backend"] == "torchscript":
        return ()
    batch = artifact.batch
    largest = min(batch.maximum, max(batch.optimal, PROBED_BATCHES[-1]))
    return tuple(sorted({batch.minimum, batch.optimal, largest, *(size for size in PROBED_BATCHES if batch.minimum <= size <= largest)}))


def cosines_by_batch(encode: Callable[[torch.Tensor], torch.Tensor], rows: torch.Tensor, reference: torch.Tensor, sizes: tuple[int, ...]) -> dict[str, float]:
    """Smallest cosine with the reference for each batch size; of as many rows, each another, so that one in another's place shows."""
    return {str(size): errors(encode(rows[:size]), reference[:size]).cos_min for size in sizes}


def compare(artifact: Artifact, checkpoint: Checkpoint) -> dict[str, Any]:
    """Compare an artifact with the original model; the report is plain data for JSON.

    The features of both run through the same logits in float64.  `passed` is false outside the
    bounds of the artifact's precision, with the reasons in `failures`.
    Raises UserError where the GPU's memory runs out.
    """
    dims, device = artifact.dimensions, artifact.device
    inputs, sizes = inputs_for(artifact.manifest["model"], dims.image_resolution), batches_to_probe(artifact)
    most = max(sizes, default=0)
    probe = replace(inputs, images=distinct_images(inputs.images, most), tokens=distinct_tokens(inputs.tokens, most))
    try:
        probed = reference_features(checkpoint, probe, artifact.encoders, device)
        reference = {name: rows[:len(inputs.images if name == "image" else inputs.tokens)] for name, rows in probed.items()}
        model = CompiledCLIP(artifact)
        calls = {"image": (model.encode_image, inputs.images), "text": (model.encode_text, inputs.tokens)}
        with torch.no_grad():
            compiled = {name: calls[name][0](calls[name][1].to(model.device)).cpu() for name in artifact.encoders}
            batch = min(artifact.batch.optimal, 32) if device == "cpu" else artifact.batch.optimal
            speed, by_batch = {}, {}
            for name in artifact.encoders:
                encode, rows = calls[name]
                all_rows = (probe.images if name == "image" else probe.tokens).to(model.device)
                by_batch[name] = cosines_by_batch(encode, all_rows, probed[name], sizes)
                example = rows.repeat(-(-batch // len(rows)), *[1] * (rows.ndim - 1))[:batch].to(model.device)
                speed[name] = {"batch": batch, "ms": milliseconds(encode, example, repeats=3 if device == "cpu" else 20, warm_up=1 if device == "cpu" else 5)}
    except torch.cuda.OutOfMemoryError as problem:
        raise out_of_memory("verifying") from problem
    report: dict[str, Any] = {
        "inputs": inputs.description,
        "weights": checkpoint.origin.describe(),
        "errors": {name: asdict(errors(compiled[name], reference[name])) for name in artifact.encoders},
        "batches": by_batch,
        "speed": speed,
    }
    if len(artifact.encoders) == 2:
        scale = checkpoint.state_dict["logit_scale"].exp().item()
        both = [logits(features["image"], features["text"], scale) for features in (reference, compiled)]
        report["errors"]["logits"] = asdict(errors(both[1], both[0]))
        chosen = [rows.argmax(dim=1) for rows in both]
        report["top1"] = {
            "reference": (chosen[0] == inputs.labels).double().mean().item() * 100,
            "compiled": (chosen[1] == inputs.labels).double().mean().item() * 100,
            "agreement": (chosen[0] == chosen[1]).double().mean().item() * 100,
        }
    report["failures"] = failures(artifact, checkpoint, report)
    report["passed"] = not report["failures"]
    return report


def failures(artifact: Artifact, checkpoint: Checkpoint, report: dict[str, Any]) -> list[str]:
    """What lies outside the bounds, a sentence each.  A NaN is outside every bound."""
    precision = artifact.manifest["computes_in"]  # whatever was asked
    bound, found = COSINE_BOUND[precision], []
    for name in artifact.encoders:
        cosine = report["errors"][name]["cos_min"]
        if not cosine >= bound:
            found.append(f"{name}: smallest cosine {cosine:.7f} is below {bound} ({precision})")
        wrong = {size: cosine for size, cosine in report["batches"][name].items() if not cosine >= bound}
        if wrong:
            listed = ", ".join(f"{cosine:.7f} at batch {size}" for size, cosine in wrong.items())
            found.append(f"{name}: wrong at some batch sizes: smallest cosine {listed}; {bound} is the bound")
    if checkpoint.origin.kind == "demo" and "top1" in report:
        change = abs(report["top1"]["compiled"] - report["top1"]["reference"])
        allowed = TOP1_BOUND[precision]
        if not change <= allowed:
            found.append(f"zero-shot top-1 changed by {change:.2f} points, more than {allowed}")
    return found
