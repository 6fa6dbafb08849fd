"""Checkpoint -> encoder -> graph -> engine -> TorchScript module, for each of an artifact's."""
from contextlib import ExitStack
from dataclasses import asdict
from typing import Any, Optional

import torch
from torch import nn

from clip_ttrt import backends, deprecations, graph, kernels, linear, stack, trt, verify
from clip_ttrt.artifact import Artifact, draft
from clip_ttrt.backends import Backend
from clip_ttrt.checkpoint import Checkpoint, load_checkpoint
from clip_ttrt.encoders import ENCODERS
from clip_ttrt.errors import UserError
from clip_ttrt.guard import Guarded, trace
from clip_ttrt.models import Dimensions
from clip_ttrt.options import Options
from clip_ttrt.progress import Progress

DTYPES = {"fp32": torch.float, "tf32": torch.float, "fp16": torch.half, "bf16": torch.bfloat16}


def compile_with(options: Options, progress: Progress) -> Artifact:
    """Compile as `clip_ttrt.compile` does; a failed verification is recorded and not raised."""
    backend = backends.choose(options.backend, options.precision)
    choice = backends.choose_kernels(options.kernels, backend, options.precision)
    progress.say(f"backend: {backend.reason}")
    if backend.computes_in != options.precision:
        progress.say(f"note: {options.precision} was asked for, and this backend computes in "
                     f"{backend.computes_in}")
    if choice.kernels is not None:
        progress.say(f"kernels: {choice.kernels} ({choice.reason})")
    kernels_version = kernels.version() if choice.kernels == "fused" else None
    with ExitStack() as compiler, draft(options.folder, options.force) as writing:
        if backend.name != "torchscript":
            with progress.stage("load Torch-TensorRT"):
                trt.load_runtime(backend.name)
                compiler.enter_context(trt.builder_kept())
        kernels.load(kernels_version)
        with progress.stage(f"read weights of {options.model}"):
            checkpoint = load_checkpoint(
                options.model, options.weights, options.seed, options.trust_weights)
        title = "WARNING" if checkpoint.origin.kind == "random" else "weights"
        progress.say(f"{title}: {checkpoint.origin.describe()}")
        for encoder in options.encoders:
            module, facts = build_encoder(
                encoder, checkpoint, options, backend, choice.kernels, progress)
            writing.add(encoder, module, **facts)
            del module
        manifest = {
            "model": options.model,
            "dimensions": asdict(checkpoint.dimensions),
            "weights": asdict(checkpoint.origin),
            "logit_scale": checkpoint.state_dict["logit_scale"].item(),
            "precision": options.precision,
            "computes_in": backend.computes_in,
            "batch": asdict(options.batch),
            "asked": {"backend": options.backend, "kernels": options.kernels},
            "backend": backend.name,
            "backend_reason": backend.reason,
            "device": backend.device,
            "optimization_level": options.optimization_level,
            "gpu": stack.gpu() if backend.device == "cuda" else {},
            "kernels": choice.kernels,
            "kernels_reason": choice.reason,
            "kernels_version": kernels_version,
            "versions": stack.versions(),
        }
        if kernels_version is not None:
            manifest["versions"]["cublaslt"] = linear.version_text()
        artifact = writing.write_manifest(**manifest, verification=None)
        if options.verify:
            with progress.stage("verify against the original model in fp32"):
                report = verify.compare(artifact, checkpoint)
            artifact = writing.write_manifest(**manifest, verification=report)
        return writing.publish(artifact)


def build_encoder(name: str, checkpoint: Checkpoint, options: Options, backend: Backend,
                  chosen: Optional[str], progress: Progress
                  ) -> tuple[torch.jit.ScriptModule, dict[str, Any]]:
    """The TorchScript module to save of one encoder, and facts about it for the manifest.

    chosen: whose kernels an engine has, `fused` or `tensorrt`; None for TorchScript.
    """
    as_engine, batch = chosen is not None, options.batch
    device = "cpu" if as_engine else backend.device
    encoder = in_precision(ENCODERS[name](checkpoint.state_dict), backend.computes_in).to(device)
    example = example_input(name, checkpoint.dimensions).to(device)
    with progress.stage(f"export the {name} encoder"):
        module = graph.capture(encoder, example)
    passes = [graph.lower]
    if chosen == "fused":  # linear layers are tuned here, before the network is built
        passes += [*graph.FUSE[name], graph.tuning(batch)]
    elif not as_engine:
        passes.append(graph.inline_references)
    work = f"build the {name} engine" if as_engine else f"trace the {name} encoder"
    with progress.stage(work) as time:
        facts: dict[str, Any] = {"rewrites": graph.run(module, passes)}
        if as_engine:
            module, about = trt.build(module, example, batch, options.precision,
                                      options.optimization_level, options.timing_cache, name)
            facts |= {"engines": 1, **about}
            example = example[:1].expand(batch.optimal, *example.shape[1:]).contiguous().cuda()
        module = Guarded(trace(module, example), example, batch).eval()
        with deprecations.hidden():
            module = torch.jit.script(module)
    return module, {**facts, "build_seconds": round(time["seconds"], 2)}


def in_precision(encoder: nn.Module, precision: str) -> nn.Module:
    """An encoder in a precision's type; UserError where that cannot hold one of its weights."""
    largest = torch.finfo(DTYPES[precision]).max
    for name, value in encoder.named_parameters():
        if (found := value.abs().max().item()) > largest:
            raise UserError(f"{name} has values that {precision} cannot hold, {found:.4g} where "
                            f"{largest:.0f} is the largest; compile in another precision, such as "
                            f"bf16")
    return encoder.to(DTYPES[precision])


def example_input(encoder: str, dims: Dimensions) -> torch.Tensor:
    """A batch of two (torch.export takes 0 and 1 for constants): images float32 or tokens int32."""
    if encoder == "image":
        return torch.zeros(2, 3, dims.image_resolution, dims.image_resolution)
    return torch.zeros(2, dims.context_length, dtype=torch.int32)
