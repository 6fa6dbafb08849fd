"""python -m clip_ttrt.verify: errors of compiled encoders against the original model.

The reference is the `clip` package's model in fp32, on the same weights and inputs.
"""
import statistics
import sys
import time
from contextlib import contextmanager
from typing import Any, Callable

import torch
from torch.nn.functional import cosine_similarity, interpolate, normalize

from clip_ttrt import deprecations, pictures
from clip_ttrt.artifact import Artifact
from clip_ttrt.checkpoint import Checkpoint, original_with_weights
from clip_ttrt.demo import scenes
from clip_ttrt.runtime import CompiledCLIP, out_of_memory

COSINE_BOUND = {"fp32": 0.999999, "tf32": 0.9999, "fp16": 0.9999, "bf16": 0.999}
# percentage points that the trained demo model may gain or lose
TOP1_BOUND = {"fp32": 0.2, "tf32": 0.2, "fp16": 0.2, "bf16": 0.5}
REFERENCE_BATCH = 64
PROBED_BATCHES = (1, 2, 3, 4, 5, 6, 7, 8, 12, 16, 24, 32, 33, 48, 64, 96, 127, 128, 192, 255, 256,
                  384, 511, 512)


def errors(actual: torch.Tensor, reference: torch.Tensor) -> dict[str, float]:
    """Errors of rows [N, D], features or logits, in float64.

    abs_*: absolute difference, over all elements.  rel_*: norm of a row's difference over the
    norm of the reference row, over all rows.  cos_*: cosine between a row and its reference.
    A NaN or infinity anywhere makes every figure NaN.
    """
    a, b = actual.detach().double().cpu(), reference.detach().double().cpu()
    found = {"abs": (a - b).abs(), "rel": (a - b).norm(dim=1) / b.norm(dim=1),
             "cos": cosine_similarity(a, b, dim=1)}
    if not torch.isfinite(found["abs"]).all():
        found = {name: torch.full_like(values, float("nan")) for name, values in found.items()}
    figures = {"rows": len(a)}
    for name, values in found.items():
        wanted = ("min", "mean") if name == "cos" else ("max", "mean", "median")
        figures |= {f"{name}_{which}": getattr(values, which)().item() for which in wanted}
    return figures


def inputs_for(model: str, resolution: int) -> tuple[dict[str, torch.Tensor], torch.Tensor, str]:
    """Meaningful inputs: held-out scenes for the demo model, eight photographs for the others.

    Images float32 [N, 3, R, R] and tokens int32 [M, 77] by encoder; the right text of each image
    [N]; and what they are.
    """
    if model == "demo":
        drawn, labels = scenes.held_out_set()
        images, captions = scenes.to_input(drawn), scenes.held_out_classes()
        about = f"{len(images)} scenes of {len(captions)} combinations held out from training"
    else:
        images, captions = pictures.load(resolution)
        labels, about = torch.arange(len(images)), f"{len(images)} pictures and their captions"
    return {"image": images, "text": deprecations.clip().tokenize(captions)}, labels, about


def distinct_images(images: torch.Tensor, count: int, seed: int = 0) -> torch.Tensor:
    """At least count images [N, 3, R, R], no two alike: after these ones seeded mixes of crops of
    two of them, flipped or not."""
    generator, side, mixes = torch.Generator().manual_seed(seed), images.shape[-1], []

    def below(limit: int) -> int:
        return int(torch.randint(limit, (), generator=generator))

    def crop(image: torch.Tensor) -> torch.Tensor:
        size = side // 2 + below(side // 2 + 1)
        top, left = below(side - size + 1), below(side - size + 1)
        part = image[None, :, top:top + size, left:left + size]
        whole = interpolate(part, (side, side), mode="bilinear", align_corners=False)[0]
        return whole.flip(2) if below(2) else whole

    while len(images) + len(mixes) < count:
        one, other = (crop(images[below(len(images))]) for _ in range(2))
        mixes.append(torch.lerp(one, other, torch.rand((), generator=generator)))
    return torch.cat([images, *(mix[None] for mix in mixes)])


def distinct_tokens(tokens: torch.Tensor, count: int, seed: int = 0) -> torch.Tensor:
    """At least count texts int [N, T], no two alike: after these ones the beginnings of two of
    them in one.

    Raises ValueError where they do not suffice for so many.
    """
    generator, length = torch.Generator().manual_seed(seed), tokens.shape[1]
    words = [row[1:int(row.argmax())].tolist() for row in tokens]
    start, end = int(tokens[0, 0]), int(tokens.max())
    rows = dict.fromkeys(map(tuple, tokens.tolist()))  # a set in order
    attempts = 0
    while len(rows) < count:
        attempts += 1
        if attempts > 100 * count:
            raise ValueError(f"{len(tokens)} texts do not suffice for {count} that are distinct")
        text = [start]
        for chosen in torch.randint(len(words), (2,), generator=generator):
            most = int(torch.randint(len(words[chosen]), (), generator=generator))
            text += words[chosen][:1 + most]
        text = [*text[:length - 1], end]
        rows[(*text, *[0] * (length - len(text)))] = None
    return torch.tensor(list(rows), dtype=tokens.dtype)


@contextmanager
def exact_fp32():
    """No TF32 in PyTorch's own kernels, so that the fp32 reference is one."""
    switches = (torch.backends.cuda.matmul, torch.backends.cudnn)
    before = [switch.allow_tf32 for switch in switches]
    try:
        for switch in switches:
            switch.allow_tf32 = False
        yield
    finally:
        for switch, value in zip(switches, before):
            switch.allow_tf32 = value


def reference_features(
    checkpoint: Checkpoint, rows: dict[str, torch.Tensor], device: str
) -> dict[str, torch.Tensor]:
    """Features of the original model in fp32, float32 [rows, embed_dim], on the CPU."""
    model = original_with_weights(checkpoint, device)
    encode = {"image": model.encode_image, "text": model.encode_text}
    with torch.no_grad(), exact_fp32():
        return {name: torch.cat([encode[name](part.to(device)).cpu()
                                 for part in inputs.split(REFERENCE_BATCH)])
                for name, inputs in rows.items()}


def milliseconds(call: Callable[[torch.Tensor], torch.Tensor], example: torch.Tensor) -> float:
    """Median wall time of a call, after warm-up, the GPU's work awaited."""
    warm_up, repeats = (5, 20) if example.is_cuda else (1, 3)
    times = []
    for _ in range(warm_up + repeats):
        start = time.perf_counter()
        call(example)
        if example.is_cuda:
            torch.cuda.synchronize()
        times.append((time.perf_counter() - start) * 1e3)
    return statistics.median(times[warm_up:])


def batches_to_probe(artifact: Artifact) -> tuple[int, ...]:
    """Batch sizes at which an artifact's engines are run: one engine is right at one size and
    wrong at another (experiments/bugs).

    Every size of `PROBED_BATCHES` in the compiled range, its minimum and optimum, and its maximum
    where that is no larger than the larger of 512 and the optimum.  None for TorchScript, which
    chooses no kernels ahead of time.
    """
    if artifact.manifest["backend"] == "torchscript":
        return ()
    batch = artifact.batch
    largest = min(batch.maximum, max(batch.optimal, PROBED_BATCHES[-1]))
    inside = (size for size in PROBED_BATCHES if batch.minimum <= size <= largest)
    return tuple(sorted({batch.minimum, batch.optimal, largest, *inside}))


def cosines_by_batch(encode: Callable[[torch.Tensor], torch.Tensor], rows: torch.Tensor,
                     reference: torch.Tensor, sizes: tuple[int, ...]) -> dict[str, float]:
    """Smallest cosine with the reference for each batch size, of rows of which no two are alike,
    so that one in another's place shows."""
    return {str(size): errors(encode(rows[:size]), reference[:size])["cos_min"] for size in sizes}


def compare(artifact: Artifact, checkpoint: Checkpoint) -> dict[str, Any]:
    """Compare an artifact with the original model; the report is plain data for JSON.

    The features of both run through the same logits in float64.  `passed` is false outside the
    bounds of the artifact's precision, with the reasons in `failures`.
    Raises UserError where the GPU's memory runs out.
    """
    device, optimal = artifact.device, artifact.batch.optimal
    inputs, labels, about = inputs_for(artifact.manifest["model"],
                                       artifact.dimensions.image_resolution)
    sizes, more = batches_to_probe(artifact), {"image": distinct_images, "text": distinct_tokens}
    # The inputs come first: they are what the errors are of.
    rows = {name: more[name](inputs[name], max(sizes, default=0)) for name in artifact.encoders}
    report = {"inputs": about, "weights": checkpoint.origin.describe(), "errors": {},
              "batches": {}, "speed": {}}
    batch = min(optimal, 32) if device == "cpu" else optimal
    features = {}
    try:
        references = reference_features(checkpoint, rows, device)
        model = CompiledCLIP(artifact)
        for name in artifact.encoders:
            encode = {"image": model.encode_image, "text": model.encode_text}[name]
            x, count = rows[name].to(model.device), len(inputs[name])
            with torch.no_grad():
                features[name] = encode(x[:count]).cpu(), references[name][:count]
                report["batches"][name] = cosines_by_batch(encode, x, references[name], sizes)
                example = x[torch.arange(batch) % len(x)]
                report["speed"][name] = {"batch": batch, "ms": milliseconds(encode, example)}
            report["errors"][name] = errors(*features[name])
    except torch.cuda.OutOfMemoryError as problem:
        raise out_of_memory("verifying") from problem
    if len(features) == 2:
        scale = checkpoint.state_dict["logit_scale"].exp().item()
        compiled, reference = (
            scale * normalize(image.double(), dim=-1) @ normalize(text.double(), dim=-1).t()
            for image, text in zip(features["image"], features["text"]))
        report["errors"]["logits"] = errors(compiled, reference)
        chosen, right = compiled.argmax(dim=1), reference.argmax(dim=1)
        share = {"reference": right == labels, "compiled": chosen == labels,
                 "agreement": chosen == right}
        report["top1"] = {name: hits.double().mean().item() * 100 for name, hits in share.items()}
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
        wrong = [f"{cosine:.7f} at batch {size}"
                 for size, cosine in report["batches"][name].items() if not cosine >= bound]
        if wrong:
            found.append(f"{name}: wrong at some batch sizes: smallest cosine {', '.join(wrong)}; "
                         f"{bound} is the bound")
    if checkpoint.origin.kind == "demo" and "top1" in report:
        change = abs(report["top1"]["compiled"] - report["top1"]["reference"])
        allowed = TOP1_BOUND[precision]
        if not change <= allowed:
            found.append(f"zero-shot top-1 changed by {change:.2f} points, more than {allowed}")
    return found


if __name__ == "__main__":
    from clip_ttrt.cli import main

    sys.exit(main(["verify", *sys.argv[1:]]))
