"""`compile`: weights -> encoders -> exported graph -> our operations -> backend -> artifact -> verification."""
import inspect
from contextlib import ExitStack
from dataclasses import asdict
from typing import Any, NamedTuple, Optional

import torch
from torch import fx, nn

from clip_ttrt import backends, graph, guard, kernels, linear, stack, torchscript, trt, verify
from clip_ttrt.artifact import Artifact, draft
from clip_ttrt.backends import Backend
from clip_ttrt.checkpoint import Checkpoint, load_checkpoint
from clip_ttrt.encoders import ENCODERS
from clip_ttrt.errors import UserError, VerificationError
from clip_ttrt.models import Dimensions
from clip_ttrt.options import BatchRange, Options
from clip_ttrt.progress import Progress

DTYPES = {"fp32": torch.float, "tf32": torch.float, "fp16": torch.half, "bf16": torch.bfloat16}


class Built(NamedTuple):
    """An encoder as its backend made it: the module, facts for the manifest, seconds."""

    module: torch.jit.ScriptModule
    facts: dict[str, Any]
    seconds: float


def compile(*, progress: Optional[Progress] = None, **options: Any) -> Artifact:
    """Compile a model's encoders into an artifact folder and verify them against the original.

    options: the fields of `Options`, whose defaults apply; `batch` may be N or "MIN:OPT:MAX".
    progress: where stages are reported; silent by default.

    Raises UserError for bad input, with nothing written; VerificationError where the compiled
    encoders lie outside their precision's bounds, with the artifact written and marked.
    """
    if "batch" in options:
        options["batch"] = BatchRange.parse(options["batch"])
    artifact = compile_with(Options(**options), progress or Progress(quiet=True))
    if artifact.verified is False:
        failures = artifact.manifest["verification"]["failures"]
        raise VerificationError(f"{artifact.folder} is marked unverified: {'; '.join(failures)}")
    return artifact


def _signature() -> inspect.Signature:
    """What `compile` takes, as `help` shows it: the fields of `Options` with their defaults."""
    options = inspect.signature(Options).parameters.values()
    keyword = inspect.Parameter.KEYWORD_ONLY
    first = inspect.signature(compile).parameters["progress"]
    parameters = [each.replace(kind=keyword) for each in options]
    return inspect.Signature([*parameters, first], return_annotation=Artifact)


compile.__signature__ = _signature()


def compile_with(options: Options, progress: Progress) -> Artifact:
    """Compile as `compile` does; a failed verification is recorded in the artifact and not raised."""
    backend = backends.choose(options.backend, options.precision)
    choice = backends.choose_kernels(options.kernels, backend, options.precision)
    progress.say(f"backend: {backend.reason}")
    if backend.computes_in != options.precision:
        progress.say(f"note: {options.precision} was asked for, and this backend computes in {backend.computes_in}")
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
            checkpoint = load_checkpoint(options.model, options.weights, options.seed, options.trust_weights)
        progress.say(f"{'WARNING' if checkpoint.origin.kind == 'random' else 'weights'}: {checkpoint.origin.describe()}")
        for encoder in options.encoders:
            module, facts = build_encoder(encoder, checkpoint, options, backend, choice.kernels, progress)
            writing.add(encoder, module, **facts)
            del module
        manifest = {
            **describe(options, backend, checkpoint),
            "kernels": choice.kernels,
            "kernels_reason": choice.reason,
            "kernels_version": kernels_version,
            "versions": stack.versions() if kernels_version is None else {**stack.versions(), "cublaslt": linear.version_text()},
        }
        artifact = writing.write_manifest(**manifest, verification=None)
        if options.verify:
            with progress.stage("verify against the original model in fp32"):
                report = verify.compare(artifact, checkpoint)
            artifact = writing.write_manifest(**manifest, verification=report)
        return writing.publish(artifact)


def build_encoder(encoder: str, checkpoint: Checkpoint, options: Options, backend: Backend, chosen: Optional[str],
                  progress: Progress) -> tuple[torch.jit.ScriptModule, dict[str, Any]]:
    """One encoder as the TorchScript module to save, and facts about it for the manifest; chosen: the kernels."""
    example = example_input(encoder, checkpoint.dimensions)
    plain = ENCODERS[encoder](checkpoint.state_dict)
    plain = in_precision(plain, backend.computes_in)
    if backend.name == "torchscript":
        built = build_torchscript(encoder, plain.to(backend.device), example.to(backend.device), progress)
    else:
        built = build_tensorrt(encoder, plain, options, chosen, example, progress)
    module = guard.guard(built.module, example.to(backend.device), options.batch)
    return module, {**built.facts, "build_seconds": round(built.seconds, 2)}


def in_precision(encoder: nn.Module, precision: str) -> nn.Module:
    """An encoder whose weights are of a precision's type.  Raises UserError where fp16 cannot hold one."""
    dtype = DTYPES[precision]
    for name, value in encoder.named_parameters():
        largest = value.abs().max().item()
        if largest > torch.finfo(dtype).max:
            raise UserError(f"{name} has values that {precision} cannot hold, {largest:.4g} where {torch.finfo(dtype).max:.0f} is the largest; "
                            f"compile in another precision, such as bf16")
    return encoder.to(dtype)


def build_torchscript(encoder: str, plain: nn.Module, example: torch.Tensor, progress: Progress) -> Built:
    """One encoder through TorchScript, on the device that it and the example are on."""
    lowered, rewrites = export(encoder, plain, example, False, progress)
    with progress.stage(f"trace the {encoder} encoder") as time:
        module = torchscript.build(lowered, example)
    return Built(module, {"rewrites": rewrites}, time["seconds"])


def build_tensorrt(encoder: str, plain: nn.Module, options: Options, chosen: str, example: torch.Tensor, progress: Progress) -> Built:
    """One encoder as one engine of TensorRT or TensorRT-RTX."""
    fused = chosen == "fused"
    lowered, rewrites = export(encoder, plain, example, fused, progress)
    with progress.stage(f"build the {encoder} engine") as time:
        if fused:
            rewrites["tune"] = graph.tune(lowered, options.batch)
        engine = trt.build(lowered, example, options.batch, options.precision, options.optimization_level, options.timing_cache, encoder)
    whole_batch = example[:1].expand(options.batch.optimal, *example.shape[1:]).contiguous().cuda()
    module = trt.to_torchscript(engine, whole_batch)
    facts = {
        "rewrites": rewrites,
        "engines": 1,
        "engine_mib": round(engine.plan_bytes / 2**20, 2),
        "network_layers": engine.layers,
        "timing_cache": engine.timing_cache,
        "warnings": list(engine.warnings),
    }
    return Built(module, facts, time["seconds"])


def export(encoder: str, plain: nn.Module, example: torch.Tensor, fused: bool, progress: Progress) -> tuple[fx.GraphModule, dict[str, int]]:
    """An encoder as a graph of our operations, the plugins' where it is fused, and how often each pass rewrote."""
    with progress.stage(f"export the {encoder} encoder"):
        module = graph.capture(plain, example)
        rewrites = graph.lower(module)
        if fused:
            rewrites |= graph.fuse(module)
    return module, rewrites


def example_input(encoder: str, dims: Dimensions) -> torch.Tensor:
    """A batch of two (torch.export takes 0 and 1 for constants): images float32 or tokens int32."""
    if encoder == "image":
        return torch.zeros(2, 3, dims.image_resolution, dims.image_resolution)
    return torch.zeros(2, dims.context_length, dtype=torch.int32)


def describe(options: Options, backend: Backend, checkpoint: Checkpoint) -> dict[str, Any]:
    """The manifest's facts about what was compiled and for what."""
    return {
        "model": options.model,
        "dimensions": asdict(checkpoint.dimensions),
        "weights": asdict(checkpoint.origin),
        "logit_scale": checkpoint.state_dict["logit_scale"].item(),
        "precision": options.precision,
        "computes_in": backend.computes_in,
        "batch": asdict(options.batch),
        "backend": backend.name,
        "backend_reason": backend.reason,
        "device": backend.device,
        "optimization_level": options.optimization_level,
        "gpu": stack.gpu() if backend.device == "cuda" else {},
    }
