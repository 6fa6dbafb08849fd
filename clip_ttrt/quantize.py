"""fp8: what scales are calibrated with, and which linear layers stay in fp16.

Both are found on the graph that is compiled, run on the ops' references: a scale by the largest
magnitude of a layer's input, a layer that stays by the gate, which compares features with the
original's in fp32 on inputs that calibration has not seen.
"""
import functools
import hashlib
import json
import math
import os
from typing import Any, Iterator, Sequence

import torch
from torch import Tensor, fx

from clip_ttrt import deprecations, graph, ops, verify
from clip_ttrt.artifact import SCALES
from clip_ttrt.checkpoint import Checkpoint
from clip_ttrt.demo import captions, scenes
from clip_ttrt.errors import UserError
from clip_ttrt.options import Options

LEAST, MOST = 512, 2048  # pictures or captions that are asked for, and that are read
HELD_BACK = 4  # one of so many is for the gate, by the hash of its content
MEASURED = 64  # of those, that each layer alone is measured on
BATCH = 64
SATURATED = 464.0  # where rounding to the nearest would go beyond 448


def is_captions(path: str) -> bool:
    """Whether a path is that of a .txt file and, by its first line, of no list of pictures."""
    if not (path.lower().endswith(".txt") and os.path.isfile(path)):
        return False
    with open(path, errors="replace") as file:
        first = next((line.strip() for line in file if not line.isspace()), "")
    return "://" not in first and not os.path.isfile(os.path.join(os.path.dirname(path), first))


def read(inputs: Sequence[str], encoder: str, side: int, device: str) -> dict[str, Any]:
    """Up to MOST images float32 [3, side, side] or captions, by the SHA-256 of their content."""
    from clip_ttrt.pipeline import decode, resize, sources  # which bring torchvision

    text, rows = encoder == "text", {}
    chosen = [path for path in inputs if is_captions(path) is text]
    shards = sources.plan(chosen, text, BATCH, 1.0, None) if chosen else []
    decoder = decode.Decoder("exact", side, device)
    preprocess = resize.Preprocess(side, device)
    for shard in shards[::max(1, math.ceil(len(shards) * BATCH / MOST))]:
        data = [each.data for each in shard.read(0, len(shard)) if not each.error]
        if text:
            rows |= {hashlib.sha256(line.encode()).hexdigest(): line for line in data}
            continue
        decoded = decoder.decode(data)
        images = preprocess([picture.pixels for picture in decoded]).cpu()
        rows |= {hashlib.sha256(file).hexdigest(): image
                 for file, image, picture in zip(data, images, decoded) if not picture.error}
    if len(rows) < LEAST:
        kind = "captions, lines of a .txt file," if text else "pictures"
        raise UserError(f"{', '.join(inputs)}: {len(rows)} different {kind} can be read, and fp8 "
                        f"is calibrated with at least {LEAST}; give --calibrate more")
    return rows


def own(encoder: str) -> dict[str, Any]:
    """The embedded model's scenes of training, as `read` has it: none is for the gate."""
    drawn = scenes.training_scenes(LEAST, torch.Generator().manual_seed(0))
    if encoder == "image":
        return dict(enumerate(scenes.to_input(scenes.render(drawn))))
    rows = enumerate(drawn.attributes.tolist())
    return {i: captions.caption(row, i % captions.TEMPLATES) for i, row in rows}


def as_input(rows: Sequence[Any]) -> Tensor:
    """Images float32 [N, 3, R, R], or tokens int32 [N, 77] of captions, cut where they end."""
    if rows and isinstance(rows[0], Tensor):
        return torch.stack(list(rows))
    return deprecations.clip().tokenize(list(rows), truncate=True).int()


class Simulation(fx.Interpreter):
    """Runs a lowered graph on the ops' references, with some linear layers of blocks as in fp8.

    scales: of those layers' inputs.  largest: magnitudes of all layers' inputs so far.
    saturated, values: how many values of the inputs of those in fp8 are beyond 448, and of all.
    """

    def __init__(self, module: fx.GraphModule):
        super().__init__(module)
        self.scales, self.largest, self.saturated, self.values = {}, {}, 0, 0
        self.weight = functools.cache(
            lambda name: graph.weight_in_e4m3(self.module.get_parameter(name)))

    def run_node(self, node: fx.Node) -> Any:
        name = graph.block_weight(node)
        if name is None:
            return super().run_node(node)
        x, weight, bias = self.fetch_args_kwargs_from_env(node)[0][:3]
        size = x.abs().float()
        self.largest[name] = torch.maximum(size.max(), self.largest.get(name, size.new_zeros(())))
        if name not in self.scales:
            return ops.linear_reference(x, weight, bias)
        self.saturated += (size > SATURATED * self.scales[name]).sum()
        self.values += x.numel()
        weight, scale = self.weight(name)
        return ops.quantized_linear_reference(x, weight, bias, self.scales[name], scale)

    def call_function(self, target: Any, args: tuple, kwargs: dict) -> Any:
        return super().call_function(ops.REFERENCES.get(target, target), args, kwargs)

    @torch.no_grad()
    def features(self, rows: Tensor, scales: dict[str, float]) -> Tensor:
        """float32 [N, E] on the CPU, of rows on any device."""
        self.scales, self.saturated, self.values = scales, 0, 0
        device = next(self.module.parameters()).device
        return torch.cat([self.run(part.to(device)).cpu() for part in rows.split(BATCH)])


class Quantizer:
    """Calibrates a model's encoders, one after the other, and holds them to the gate.

    inputs: what the gate uses, as `verify.compare` takes it.  facts: of each encoder that is done,
    for the manifest.  scales: for SCALES, the file that --scales takes.
    Raises UserError for too little data, and for a file of scales of something else.
    """

    def __init__(self, options: Options, kernels: str, checkpoint: Checkpoint, device: str):
        self.kernels, self.device, self.facts = kernels, device, {}
        self.scales = {"kernels": kernels, "weights": checkpoint.origin.sha256, "encoders": {}}
        self.known = known_scales(options, self.scales) if options.scales else {}
        side, self.data, held = checkpoint.dimensions.image_resolution, {}, {}
        for encoder in options.encoders if options.calibrate else ():
            rows = read(options.calibrate, encoder, side, device)
            held[encoder] = [rows.pop(key) for key in [*rows] if int(key, 16) % HELD_BACK == 0]
            self.data[encoder] = rows
        if held:
            images, lines = (held.get(encoder, []) for encoder in ("image", "text"))
            about = f"{len(images)} pictures and {len(lines)} captions held back from calibration"
            self.inputs = as_input(images) if images else None, lines, None, about
        else:
            self.inputs = verify.inputs_for(options.model, side)
            self.data = {} if self.known else {name: own(name) for name in options.encoders}
        rows = dict(zip(("image", "text"), self.inputs))
        self.rows = {name: as_input([*rows[name]]) for name in options.encoders}
        self.references = verify.reference_features(checkpoint, self.rows, device)

    def passes(self, encoder: str, planned: Sequence[graph.Pass]) -> tuple[graph.Pass, ...]:
        """The passes of an encoder's graph; the plugins' tuning, the last one, stays the last."""
        def quantize(module: fx.GraphModule) -> Iterator[fx.Node]:
            scales = self.choose(encoder, module.to(self.device))
            module.cpu()
            yield from graph.quantizing(scales)(module)

        if self.kernels != "fused":
            return *planned, quantize
        return *planned[:-1], quantize, graph.fuse_quantization, planned[-1]

    def choose(self, encoder: str, module: fx.GraphModule) -> dict[str, float]:
        """The scales of the layers for fp8: of all but the worst, until the gate holds.

        Raises UserError where then none is left.
        """
        simulation, rows, reference = (
            Simulation(module), self.rows[encoder], self.references[encoder])
        if self.known:
            known = self.known[encoder]
        else:
            data = self.data[encoder]
            simulation.features(as_input([*data.values()]), {})
            known = {"rows": len(data), "kept_fp16": {}, "sha256": hashlib.sha256(
                "".join(map(str, sorted(data))).encode()).hexdigest(), "scales": {
                name: size.item() / ops.E4M3_MAX or 1.0
                for name, size in simulation.largest.items()}}
        scales, kept, alone = known["scales"], dict(known["kept_fp16"]), {}
        for name in scales:
            found = simulation.features(rows[:MEASURED], {name: scales[name]})
            alone[name] = verify.errors(found, reference[:MEASURED])["cos_min"]
        worst = sorted(scales.keys() - kept, key=lambda name: (alone[name] >= -1, alone[name]))
        while True:
            chosen = {name: scale for name, scale in scales.items() if name not in kept}
            if not chosen:
                raise UserError(f"no linear layer of the {encoder} encoder can compute in fp8 "
                                "within its bounds; use --precision fp16")
            if self.holds(encoder, simulation.features(rows, chosen)):
                break
            name = worst.pop(0)
            kept[name] = alone[name]
        self.scales["encoders"][encoder] = {**known, "kept_fp16": kept}
        self.facts[encoder] = {
            "layers": len(chosen), "calibrated_with": known["rows"], "sha256": known["sha256"],
            "held_back": len(rows), "saturated": float(simulation.saturated / simulation.values),
            "kept_fp16": kept, "cos_min_alone": alone}
        return chosen

    def holds(self, encoder: str, features: Tensor) -> bool:
        """Whether features of the gate's rows lie within fp8's bounds; NaN lies outside."""
        found, labels = verify.errors(features, self.references[encoder]), self.inputs[2]
        if not (found["cos_min"] >= verify.COSINE_BOUND["fp8"]
                and found["cos_median"] >= verify.MEDIAN_BOUND["fp8"]):
            return False
        if labels is None or len(self.references) == 1:
            return True
        both = {**self.references, encoder: features}, self.references
        shares = verify.top1(*map(verify.logits, both), labels)
        return abs(shares["compiled"] - shares["reference"]) <= verify.TOP1_BOUND["fp8"]

    def describe(self, encoder: str) -> str:
        """A line about an encoder that is done."""
        facts = self.facts[encoder]
        kept = (f"{name} (cosine {least:.4f} alone)" for name, least in facts["kept_fp16"].items())
        return (f"fp8: {facts['layers']} layers, {facts['saturated']:.1e} of the values held back "
                f"saturated; in fp16: {', '.join(kept) or 'no layer'}")


def known_scales(options: Options, wanted: dict[str, Any]) -> dict[str, Any]:
    """Encoder -> what a file of scales holds of it; UserError where it is of something else."""
    path = options.scales
    try:
        with open(path) as file:
            found = json.load(file)
        theirs = {name: found[name] for name in ("kernels", "weights")}
        encoders = {name: found["encoders"][name] for name in options.encoders}
    except (OSError, ValueError, KeyError, TypeError) as problem:
        raise UserError(f"{path} holds no scales of these encoders ({problem!r}); give --scales "
                        f"the {SCALES} of an artifact, or --calibrate data") from problem
    for name, value in theirs.items():
        if value != wanted[name]:
            raise UserError(f"{path} is for {name} {value}, not {wanted[name]}; --calibrate anew")
    return encoders
