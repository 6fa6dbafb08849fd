"""Checkpoint -> encoder -> graph -> engine -> TorchScript module, as one plan decides."""
import json
import shutil
from contextlib import ExitStack
from copy import deepcopy
from dataclasses import asdict, replace
from typing import Any, Collection, NamedTuple, Optional

import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_hook

from clip_ttrt import (
    backends, deprecations, families, graph, kernels, linear, pictures, stack, tokenizers, trt,
    verify)
from clip_ttrt.artifact import SCALES, Artifact, draft
from clip_ttrt.backends import Backend, Choice
from clip_ttrt.checkpoint import Checkpoint, load_checkpoint
from clip_ttrt.contexts import Encoder
from clip_ttrt.errors import UserError
from clip_ttrt.guard import Guarded, lengths_of, trace
from clip_ttrt.models import HEAD_DIM, Dimensions
from clip_ttrt.options import BatchRange, Options
from clip_ttrt.progress import Progress
from clip_ttrt.quantize import Quantizer, gain

DTYPES = {"fp32": torch.float, "tf32": torch.float, "fp16": torch.half, "bf16": torch.bfloat16,
          "fp8": torch.half}  # around the layers that are quantised


class Plan(NamedTuple):
    """All that a compile decides before it does anything."""

    backend: Backend
    kernels: Choice
    kernels_version: Optional[str]  # of the library that the engines need, if any
    passes: dict[str, tuple[graph.Pass, ...]]  # of an encoder's graph, each of which must find work
    builder: Optional[dict[str, Any]]  # settings of `trt.build`; None: traced for TorchScript


def plan_for(options: Options) -> Plan:
    """The plan of a compile here.  Raises UserError for what cannot be had."""
    backend = backends.choose(options.backend, options.precision)
    dims = families.find(options.model).dimensions
    fusible = [name for name in options.encoders if name == "text" or not dims.is_resnet]
    choice = backends.choose_kernels(options.kernels, backend, options.precision, bool(fusible))
    if backend.name == "torchscript":
        passes = (graph.lower, graph.inline_references)
        return Plan(backend, choice, None, dict.fromkeys(options.encoders, passes), None)
    fused = choice.kernels == "fused"  # linear layers are tuned before the network is built
    passes = dict.fromkeys(options.encoders, (graph.lower,))
    for name in fusible if fused else ():
        left = {graph.fuse_image_embedding} if dims.is_siglip else set()  # without a class token
        if (size := getattr(dims, f"{name}_head_dim")) != HEAD_DIM and not kernels.attends(size):
            left.add(graph.fuse_attention)
            choice = choice._replace(reason=f"{choice.reason}; TensorRT's own attention for the "
                                            f"{name} encoder, whose heads have {size} columns")
        passes[name] += (*(each for each in graph.FUSE[name] if each not in left),
                         graph.tuning(options.batch, lengths_of(name, dims)))
    builder = {each: getattr(options, each)
               for each in ("batch", "precision", "optimization_level", "timing_cache")}
    return Plan(backend, choice, kernels.version() if fused else None, passes, builder)


def compile_with(options: Options, progress: Progress) -> Artifact:
    """Compile as `clip_ttrt.compile` does; a failed verification is recorded and not raised."""
    plan = plan_for(options)
    backend = plan.backend
    progress.say(f"backend: {backend.reason}")
    if backend.computes_in != options.precision:
        progress.say(f"note: {options.precision} was asked for, and this backend computes in "
                     f"{backend.computes_in}")
    if plan.kernels.kernels is not None:
        progress.say(f"kernels: {plan.kernels.kernels} ({plan.kernels.reason})")
    with ExitStack() as compiler, draft(options.folder, options.force) as writing:
        if plan.builder is not None:
            with progress.stage("load Torch-TensorRT"):
                trt.load_runtime(backend.name)
                compiler.enter_context(trt.builder_kept())
        kernels.load(plan.kernels_version)
        with progress.stage(f"read weights of {options.model}"):
            checkpoint = load_checkpoint(
                options.model, options.weights, options.seed, options.trust_weights)
        title = "WARNING" if checkpoint.origin.kind == "random" else "weights"
        progress.say(f"{title}: {checkpoint.origin.describe()}")
        quantizer = None
        if backend.computes_in == "fp8":
            with progress.stage("read what fp8 is calibrated with"):
                quantizer = Quantizer(options, plan.kernels.kernels, checkpoint, backend.device)
        for encoder in options.encoders:
            module, facts = build_encoder(
                encoder, checkpoint, options.batch, plan, progress, quantizer)
            if quantizer:
                facts["fp8"] = quantizer.found["encoders"][encoder]
                progress.say(f"fp8: all linear layers of the {encoder} encoder's blocks but "
                             f"{', '.join(facts['fp8']['kept_fp16']) or 'none'}")
                (writing.folder / SCALES).write_text(json.dumps(quantizer.found, indent=2) + "\n")
            if options.compare:
                facts["milliseconds"] = beside_fp16(
                    encoder, module, checkpoint, options, quantizer.rows[encoder], progress)
            elif quantizer:
                width = getattr(checkpoint.dimensions, f"{encoder}_width")
                progress.say(gain(encoder, width, options.batch.optimal))
            writing.add(encoder, module, **facts)
            del module
        manifest = {
            "model": options.model,
            "dimensions": asdict(checkpoint.dimensions),
            "preprocess": checkpoint.model.preprocess,
            "weights": asdict(checkpoint.origin),
            "logit_scale": checkpoint.state_dict["logit_scale"].item(),
            "logit_bias": float(checkpoint.state_dict.get("logit_bias", 0)),
            "precision": options.precision,
            "computes_in": backend.computes_in,
            "batch": asdict(options.batch),
            "asked": {"backend": options.backend, "kernels": options.kernels},
            "backend": backend.name,
            "backend_reason": backend.reason,
            "device": backend.device,
            "optimization_level": options.optimization_level,
            "gpu": stack.gpu() if backend.device == "cuda" else {},
            "kernels": plan.kernels.kernels,
            "kernels_reason": plan.kernels.reason,
            "kernels_version": plan.kernels_version,
            "versions": stack.versions(),
        }
        if plan.kernels_version is not None:
            manifest["versions"]["cublaslt"] = linear.version_text()
        for name in tokenizers.FILES if checkpoint.dimensions.is_siglip else ():
            if (path := checkpoint.model.folder / name).is_file():
                shutil.copy(path, writing.folder)
        artifact = writing.write_manifest(**manifest, verification=None)
        if options.verify:
            with progress.stage("verify against the original model in fp32"):
                report = verify.compare(artifact, checkpoint, quantizer and quantizer.inputs)
            artifact = writing.write_manifest(**manifest, verification=report)
        return writing.publish(artifact)


def build_encoder(name: str, checkpoint: Checkpoint, batch: BatchRange, plan: Plan,
                  progress: Progress, quantizer: Optional[Quantizer] = None
                  ) -> tuple[torch.jit.ScriptModule, dict[str, Any]]:
    """The TorchScript module to save of one encoder, and facts about it for the manifest."""
    as_engine = plan.builder is not None
    device = "cpu" if as_engine else plan.backend.device
    encoder = checkpoint.model.encoder(name, checkpoint.state_dict)
    wide = overflowing(name, encoder, checkpoint) if plan.backend.computes_in == "fp16" else {}
    if wide:
        progress.say(f"{name}: the MLPs of {', '.join(wide)} stay in fp32, for values that fp16 "
                     f"cannot hold, up to {max(wide.values()):.0f}")
    encoder = in_precision(encoder, plan.backend.computes_in, wide)
    example = example_input(name, checkpoint.dimensions).to(device)
    lengths = lengths_of(name, checkpoint.dimensions)
    with progress.stage(f"export the {name} encoder"):
        module = graph.capture(encoder.to(device), example, lengths[0])
    work = f"build the {name} engine" if as_engine else f"trace the {name} encoder"
    with progress.stage(work) as time:
        passes = quantizer.passes(name, plan.passes[name]) if quantizer else plan.passes[name]
        facts: dict[str, Any] = {"rewrites": graph.run(module, passes), "lengths": lengths,
                                 "kept_fp32": wide}
        if as_engine:
            module, about = trt.build(
                module, example, name=name, shortest=lengths[0], **plan.builder)
            facts |= {"engines": 1, **about}
            example = example[:1].expand(batch.optimal, *example.shape[1:]).contiguous().cuda()
        module = Guarded(trace(module, example), example, batch, lengths).eval()
        with deprecations.hidden():
            module = torch.jit.script(module)
    return module, {**facts, "build_seconds": round(time["seconds"], 2)}


def beside_fp16(name: str, in_fp8: torch.jit.ScriptModule, checkpoint: Checkpoint,
                options: Options, rows: torch.Tensor, progress: Progress) -> dict[str, float]:
    """Milliseconds of a call at the optimal batch in fp8 and in fp16, which is built here."""
    from torch.utils import benchmark  # whose import may warn that no GPU is there

    options = replace(options, precision="fp16", calibrate=None, scales=None, compare=False)
    in_fp16, _ = build_encoder(name, checkpoint, options.batch, plan_for(options), progress)
    x, found = verify.repeated(rows, size := options.batch.optimal)[:size].cuda(), {}
    for precision, module in ("fp8", in_fp8), ("fp16", in_fp16):
        encoder = Encoder([module], options.batch, checkpoint.dimensions.embed_dim, x[:0], True)
        encoder.warmup([size] * 50)
        timer = benchmark.Timer("call(x)", globals={"call": encoder, "x": x})
        found[precision] = timer.timeit(50).mean * 1e3
    progress.say(f"{name}, batch {size}: {found['fp8']:.3f} ms in fp8, {found['fp16']:.3f} in fp16")
    return found


@torch.no_grad()
def overflowing(name: str, encoder: nn.Module, checkpoint: Checkpoint) -> dict[str, float]:
    """The MLPs of an encoder's blocks that come within 2 of fp16's largest number for the shipped
    pictures and captions: the block's name -> largest magnitude between the two layers."""
    model, found = checkpoint.model, {}
    images, lines = pictures.load(model.dimensions.image_resolution, model.transform())
    names = {block.up: f"blocks.{i}" for i, block in enumerate(getattr(encoder, "blocks", ()))}

    def look(layer: nn.Module, _: tuple, out: torch.Tensor) -> None:
        if layer in names:
            found[names[layer]] = out.abs().max().item()

    with register_module_forward_hook(look):
        encoder(images if name == "image" else model.tokenizer()(lines, truncate=True))
    return {key: size for key, size in found.items() if not size <= torch.finfo(torch.half).max / 2}


def in_precision(encoder: nn.Module, precision: str, wide: Collection[str] = ()) -> nn.Module:
    """An encoder in a precision's type, but for the MLPs of the blocks `wide`; UserError where that
    cannot hold one of its weights."""
    largest = torch.finfo(DTYPES[precision]).max
    for name, value in encoder.named_parameters():
        if (found := value.abs().max().item()) > largest:
            raise UserError(f"{name} has values that {precision} cannot hold, {found:.4g} where "
                            f"{largest:.0f} is the largest; compile in another precision, such as "
                            f"bf16")
    kept = [(block := encoder.get_submodule(name), deepcopy(block)) for name in wide]
    encoder.to(DTYPES[precision])
    for block, before in kept:
        block.up, block.down, block.wide = before.up, before.down, torch.float
    return encoder


def example_input(encoder: str, dims: Dimensions) -> torch.Tensor:
    """A batch of two (torch.export takes 0 and 1 for constants): images float32 or tokens int32."""
    if encoder == "image":
        return torch.zeros(2, 3, dims.image_resolution, dims.image_resolution)
    return torch.zeros(2, dims.context_length, dtype=torch.int32)
