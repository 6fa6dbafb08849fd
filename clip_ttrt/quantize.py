"""fp8: calibration, and the gate that decides which linear layers stay in fp16.

Both run the graph that is compiled in PyTorch.  The gate compares features with the original's in
fp32, on inputs that calibration has not seen."""
import hashlib
import json
import math
import os
from pathlib import Path
from typing import Any, Callable, Iterator, Sequence

import torch
from torch import Tensor, fx

from clip_ttrt import graph, ops, verify
from clip_ttrt.checkpoint import Checkpoint
from clip_ttrt.demo import captions, scenes
from clip_ttrt.errors import UserError
from clip_ttrt.families import Model
from clip_ttrt.options import Options

KINDS = {"image": "pictures", "text": "captions"}
LEAST, MOST, BATCH = 512, 2048, 64  # of a kind to be given, to be read, and at once
HELD_BACK = 4  # one of so many is for the gate, by the hash of its content
MEASURED = 64  # of those for a layer alone
SATURATED = 464  # where rounding to E4M3 would go beyond 448
GAINS = {  # encoder, width, batch -> a graph's time over that in fp16, as results/speed.csv has it
    ("image", 768, 32): 0.78, ("image", 768, 128): 0.68, ("image", 1024, 32): 0.63,
    ("image", 1024, 128): 0.62, ("text", 768, 32): 0.77, ("text", 768, 128): 0.66}


def is_captions(path: str) -> bool:
    """Whether a path is that of a .txt file whose first line names no picture's file."""
    if not path.lower().endswith(".txt"):
        return False
    with open(path, errors="replace") as file:
        first = file.readline().strip()
    return "://" not in first and not os.path.isfile(os.path.join(os.path.dirname(path), first))


def read(paths: Sequence[str], encoder: str, model: Model, device: str) -> tuple[list, list]:
    """Images float32 [3, R, R] or captions in files: to calibrate with, and for the gate.

    Raises UserError for fewer than LEAST that differ."""
    from clip_ttrt.pipeline import decode, resize, sources

    text, rows = encoder == "text", {}
    decoder = decode.Decoder("exact", model.fitted, device)
    preprocess = resize.Preprocess(model.dimensions.image_resolution, device, **model.preprocess)
    chosen = [path for path in paths if is_captions(path) is text]
    shards = sources.plan(chosen, text, BATCH, 1.0, None) if chosen else []
    for shard in shards[::-(-len(shards) * BATCH // MOST) or 1]:
        data = [each.data for each in shard.read(0, len(shard)) if not each.error]
        if text:
            rows |= {hashlib.sha256(line.encode()).digest(): line for line in data}
        else:
            pixels = [picture.pixels for picture in decoder.decode(data)]  # None of a bad one
            images = zip(data, pixels, preprocess(pixels).cpu())
            rows |= {hashlib.sha256(file).digest(): image for file, one, image in images
                     if one is not None}
    if len(rows) < LEAST:
        raise UserError(f"{', '.join(paths)}: {len(rows)} different {KINDS[encoder]} can be read, "
                        f"and fp8 is calibrated with at least {LEAST}; give --calibrate more")
    return tuple([row for digest, row in rows.items() if (digest[0] % HELD_BACK == 0) is held]
                 for held in (False, True))


def own(encoder: str) -> list:
    """Images or captions of the embedded model's training, to calibrate with."""
    drawn = scenes.training_scenes(LEAST, torch.Generator().manual_seed(0))
    if encoder == "image":
        return [*scenes.to_input(scenes.render(drawn))]
    codes = enumerate(drawn.attributes.tolist())
    return [captions.caption(row, i % captions.TEMPLATES) for i, row in codes]


def as_input(rows: Sequence, tokenize: Callable) -> Tensor:
    """Images as float32 [N, 3, R, R]; captions as int32 [N, T], cut where they are too long."""
    return torch.stack([*rows]) if isinstance(rows[0], Tensor) else tokenize(rows, truncate=True)


class Simulation(fx.Interpreter):
    """Runs a lowered graph, with some linear layers of its blocks as in fp8.

    Of the last `features`: largest, weight's name -> largest magnitude of its layer's input, and
    saturated, shares of the inputs of layers in fp8, for each batch."""

    def run_node(self, node: fx.Node) -> Any:
        if (name := graph.block_weight(node)) is None:
            return super().run_node(node)
        x, weight, bias = self.fetch_args_kwargs_from_env(node)[0][:3]
        size, scale = x.abs(), self.scales.get(name)
        self.largest[name] = max(self.largest.get(name, 0), size.max().item())
        if scale is None:
            return ops.linear_reference(x, weight, bias)
        self.saturated.append((size > SATURATED * scale).double().mean().item())
        weight, weight_scale = graph.weight_in_e4m3(weight)
        return ops.quantized_linear_reference(x, weight, bias, scale, weight_scale)

    @torch.no_grad()
    def features(self, rows: Tensor, scales: dict[str, float]) -> Tensor:
        """float32 [N, E] on the CPU, with these layers in fp8."""
        self.scales, self.saturated, self.largest = scales, [], {}
        device = next(self.module.parameters()).device
        return torch.cat([self.run(part.to(device)).cpu() for part in rows.split(BATCH)])


class Quantizer:
    """Chooses scales and layers, one encoder after the other.

    inputs: the gate's, as `verify.compare` takes them; rows: the same as the encoders do.
    found: what the file of scales holds, and of each encoder that is done the manifest.
    Raises UserError for too little data, or a file of scales of something else."""

    def __init__(self, options: Options, kernels: str, checkpoint: Checkpoint, device: str):
        self.device, model, names = device, checkpoint.model, options.encoders
        self.tokenize = model.tokenizer()
        self.found = {"kernels": kernels, "weights": checkpoint.origin.sha256, "encoders": {}}
        self.known = known_scales(options, self.found) if options.scales else {}
        images, lines, labels, about = verify.inputs_for(
            options.model, model.dimensions.image_resolution, model.transform())
        if options.calibrate:
            parts = {name: read(options.calibrate, name, model, device) for name in names}
            self.data, held = ({name: part[i] for name, part in parts.items()} for i in (0, 1))
            images, lines, labels = held.get("image", images), held.get("text", lines), None
            about = f"held back: {', '.join(f'{len(held[name])} {KINDS[name]}' for name in names)}"
        else:
            self.data = {name: own(name) for name in names if not self.known}
        self.inputs = torch.stack([*images]), lines, labels, about
        self.rows = {
            name: as_input(self.inputs[name == "text"], self.tokenize) for name in names}
        self.references = verify.reference_features(checkpoint, self.rows, device)

    def passes(self, encoder: str, planned: Sequence[graph.Pass]) -> tuple[graph.Pass, ...]:
        """All passes of an encoder's graph; the plugins' tuning, the last one, stays the last."""
        def quantize(module: fx.GraphModule) -> Iterator[fx.Node]:
            scales = self.choose(encoder, module.to(self.device))
            yield from graph.quantizing(scales)(module.cpu())

        if self.found["kernels"] != "fused":
            return *planned, quantize
        return *planned[:-1], quantize, graph.fuse_quantization, planned[-1]

    def choose(self, encoder: str, module: fx.GraphModule) -> dict[str, float]:
        """Weight's name -> scale of the input, of the layers in fp8: of all, or as long as the gate
        does not hold without the worst alone.  Raises UserError where none is left."""
        rows, reference, run = self.rows[encoder], self.references[encoder], Simulation(module)
        if not (about := self.known.get(encoder)):
            data = as_input(self.data[encoder], self.tokenize)
            run.features(data, {})
            about = {"calibrated_with": len(data), "kept_fp16": {},
                     "sha256": hashlib.sha256(data.numpy()).hexdigest(),
                     "scales": {name: size / ops.E4M3_MAX or 1.0
                                for name, size in run.largest.items()}}
        scales, alone = about["scales"], {}
        for name in scales:
            found = run.features(rows[:MEASURED], {name: scales[name]})
            alone[name] = verify.errors(found, reference[:MEASURED])["cos_min"]
        kept = {name: alone[name] for name in about["kept_fp16"]}
        for name in (None, *sorted(alone, key=lambda name: (alone[name] >= -1, alone[name]))):
            kept |= {name: alone[name]} if name else {}
            chosen = {name: scale for name, scale in scales.items() if name not in kept}
            if holds(run.features(rows, chosen), reference):
                break
        if not chosen:
            raise UserError(f"no linear layer of the {encoder} encoder can compute in fp8 within "
                            "its bounds; use --precision fp16")
        self.found["encoders"][encoder] = {
            **about, "held_back": len(rows), "saturated": sum(run.saturated) / len(run.saturated),
            "kept_fp16": kept, "cos_min_alone": alone}
        return chosen


def holds(features: Tensor, reference: Tensor) -> bool:
    """Whether features [N, E] lie within fp8's bounds of cosines; NaN lies outside."""
    found = verify.errors(features, reference)
    return (found["cos_min"] >= verify.COSINE_BOUND["fp8"]
            and found["cos_median"] >= verify.MEDIAN_BOUND["fp8"])


def gain(encoder: str, width: int, batch: int) -> str:
    """What fp8 buys by the nearest of the sizes that were measured."""
    near = min(GAINS, key=lambda size: (size[0] != encoder, abs(math.log(size[1] / width)),
                                        abs(math.log(size[2] / batch))))
    return (f"fp8 takes about {GAINS[near]:.2f} of fp16's time, as measured on an H100 for "
            f"{near[0]}s at width {near[1]} and batch {near[2]}; --compare measures it here")


def known_scales(options: Options, wanted: dict[str, Any]) -> dict[str, Any]:
    """Encoder -> what a file of scales holds; UserError where that is of something else."""
    try:
        found = json.loads(Path(options.scales).read_text())
        for name in ("kernels", "weights"):
            if found[name] != wanted[name]:
                raise ValueError(f"{name}: {found[name]}, not {wanted[name]}")
        keys = "calibrated_with", "sha256", "scales", "kept_fp16"
        return {name: {key: found["encoders"][name][key] for key in keys}
                for name in options.encoders}
    except (OSError, ValueError, KeyError, TypeError) as problem:
        raise UserError(f"{options.scales} does not serve as --scales ({problem!r}); name the "
                        "scales.json of an artifact like this one, or --calibrate") from problem
