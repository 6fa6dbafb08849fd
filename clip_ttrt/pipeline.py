"""`compile`: weights -> encoders -> exported graph -> fused ops -> backend -> artifact -> verification."""
from dataclasses import asdict
from typing import Any, Mapping, Optional

import torch
from torch import fx, nn

from clip_ttrt import accuracy, attention_choice, backends, fusion, guard, linear, lowering, kernels, torchscript, stack
from clip_ttrt.artifact import Artifact, draft
from clip_ttrt.attention_choice import Choice
from clip_ttrt.backends import Backend
from clip_ttrt.checkpoint import Checkpoint, load_checkpoint
from clip_ttrt.encoders import DIFFERENTIABLE, ENCODERS, FusedOps
from clip_ttrt.errors import VerificationError
from clip_ttrt.models import Dimensions, dimensions_of
from clip_ttrt.options import BatchRange, Options
from clip_ttrt.progress import Progress


def compile(progress: Optional[Progress] = None, **options: Any) -> Artifact:
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
        raise VerificationError(f"{artifact.folder} is marked unverified: {'; '.join(artifact.manifest['verification']['failures'])}")
    return artifact


def compile_with(options: Options, progress: Progress) -> Artifact:
    """Compile as `compile` does; a failed verification is recorded in the artifact and not raised."""
    backend = backends.choose(options.backend, options.precision)
    dims = dimensions_of(options.model)
    choices = {encoder: attention_choice.choose(options.attention, backend.name, options.precision, dims, encoder, options.batch) for encoder in options.encoders}
    progress.say(f"backend: {backend.reason}")
    if backend.computes_in != options.precision:
        progress.say(f"note: {options.precision} was asked for, and this backend computes in {backend.computes_in}")
    for encoder, choice in choices.items():
        progress.say(f"attention of the {encoder} encoder: {choice.attention} ({choice.reason})")
    kernels.load(needed_plugin(choices))
    with draft(options.folder, options.force) as writing:
        with progress.stage(f"read weights of {options.model}"):
            checkpoint = load_checkpoint(options.model, options.weights, options.seed, options.trust_weights)
        progress.say(f"{'WARNING' if checkpoint.origin.kind == 'random' else 'weights'}: {checkpoint.origin.describe()}")
        for encoder in options.encoders:
            module, facts = build_encoder(encoder, checkpoint, options, backend, choices[encoder].attention, progress)
            writing.add(encoder, module, **facts, attention=choices[encoder].attention, attention_reason=choices[encoder].reason)
            del module
        manifest = describe(options, backend, choices, checkpoint)
        artifact = writing.write_manifest(**manifest, verification=None)
        if options.verify:
            with progress.stage("verify against the original model in fp32"):
                report = accuracy.compare(artifact, checkpoint)
            artifact = writing.write_manifest(**manifest, verification=report)
        return writing.publish(artifact)


def build_encoder(encoder: str, checkpoint: Checkpoint, options: Options, backend: Backend, attention: str,
                  progress: Progress) -> tuple[torch.jit.ScriptModule, dict[str, Any]]:
    """One encoder as the TorchScript module to save, and facts about it for the manifest."""
    example = example_input(encoder, checkpoint.dimensions)
    if backend.name == "torchscript":
        if backend.computes_in == "fp16" and example.is_floating_point():
            example = example.half()
        module, facts, seconds = build_torchscript(encoder, checkpoint, backend, example.to(backend.device), progress)
    else:
        module, facts, seconds = build_tensorrt(encoder, checkpoint, options, attention, example, progress)
    return guard.guard(module, example.to(backend.device), options.batch), {**facts, "build_seconds": round(seconds, 2)}


def build_torchscript(encoder: str, checkpoint: Checkpoint, backend: Backend, example: torch.Tensor,
                      progress: Progress) -> tuple[torch.jit.ScriptModule, dict[str, Any], float]:
    """One encoder through TorchScript: the module, facts for the manifest, seconds."""
    exported = lowering.can_export()
    plain = ENCODERS[encoder](checkpoint.state_dict, FusedOps() if exported else DIFFERENTIABLE)
    plain = plain.to(backend.device, torch.half if backend.computes_in == "fp16" else torch.float)
    if not exported:
        with progress.stage(f"trace the {encoder} encoder as it is (torch.export of PyTorch 2.2 needs Python 3.11 or older)") as time:
            module = torchscript.trace(plain, example)
        return module, {"rewrites": {}}, time["seconds"]
    graph, rewrites = lowered(plain, example, encoder, progress)
    with progress.stage(f"trace the {encoder} encoder") as time:
        module = torchscript.build(graph, example)
    return module, {"rewrites": rewrites}, time["seconds"]


def build_tensorrt(encoder: str, checkpoint: Checkpoint, options: Options, attention: str, example: torch.Tensor,
                   progress: Progress) -> tuple[torch.jit.ScriptModule, dict[str, Any], float]:
    """One encoder as one TensorRT engine: the module, facts for the manifest, seconds."""
    from clip_ttrt import engine  # TensorRT's packages import only where there is a GPU

    graph, rewrites = lowered(ENCODERS[encoder](checkpoint.state_dict), example, encoder, progress)
    if attention == "plugin":
        rewrites = {**rewrites, **fusion.fuse(graph)}
    with progress.stage(f"build the {encoder} engine with TensorRT") as time:
        built = engine.build_engine(graph, example, options.batch, options.precision, attention, options.optimization_level)
    whole_batch = example[:1].expand(options.batch.optimal, *example.shape[1:]).contiguous().cuda()
    module = engine.to_torchscript(built, whole_batch, encoder)
    facts = {"rewrites": rewrites, "engines": 1, "engine_mib": round(len(built.plan) / 2**20, 2), "network_layers": built.layers, "recipe": asdict(built.recipe), "warnings": list(built.warnings)}
    return module, facts, time["seconds"]


def lowered(plain: nn.Module, example: torch.Tensor, encoder: str, progress: Progress) -> tuple[fx.GraphModule, dict[str, int]]:
    """The exported and lowered graph of an encoder, and how often each pass rewrote."""
    with progress.stage(f"export the {encoder} encoder"):
        graph = lowering.capture(plain, example)
        return graph, lowering.lower(graph)


def example_input(encoder: str, dims: Dimensions) -> torch.Tensor:
    """A batch of two (torch.export takes 0 and 1 for constants): images float32 or tokens int32."""
    if encoder == "image":
        return torch.zeros(2, 3, dims.image_resolution, dims.image_resolution)
    return torch.zeros(2, dims.context_length, dtype=torch.int32)


def needed_plugin(choices: Mapping[str, Choice]) -> Optional[str]:
    """The version of the plugins that the encoders need; None where none does."""
    return kernels.VERSION if any(choice.attention == "plugin" for choice in choices.values()) else None


def describe(options: Options, backend: Backend, choices: Mapping[str, Choice], checkpoint: Checkpoint) -> dict[str, Any]:
    """The manifest's facts about a compile."""
    plugin_version = needed_plugin(choices)
    versions = stack.versions() if plugin_version is None else {**stack.versions(), "cublaslt": linear.version_text()}
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
        "attention": "/".join(sorted({choice.attention for choice in choices.values()})),  # each encoder's own: modules
        "optimization_level": options.optimization_level,
        "plugin_version": plugin_version,
        "versions": versions,
        "gpu": stack.gpu() if backend.device == "cuda" else {},
    }
