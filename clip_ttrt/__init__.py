"""OpenAI's CLIP, compiled for NVIDIA GPUs with Torch-TensorRT, straight from PyTorch.

    artifact = clip_ttrt.compile(model="demo", precision="fp16", output="artifacts/demo")
    model, preprocess = clip_ttrt.load("artifacts/demo", device="cuda")
    features = model.encode_image(images)

Importing the package also makes plain `torch.jit.load` able to read compiled modules.
"""
import inspect
from typing import Any, Optional

from clip_ttrt import kernels, trt
from clip_ttrt.artifact import Artifact
from clip_ttrt.errors import UserError, VerificationError
from clip_ttrt.options import Options
from clip_ttrt.progress import Progress
from clip_ttrt.runtime import CompiledCLIP, load
from clip_ttrt.zeroshot import ZeroShot

__all__ = ["Artifact", "CompiledCLIP", "Options", "UserError", "VerificationError",
           "ZeroShot", "compile", "load"]


def compile(*, progress: Optional[Progress] = None, **options: Any) -> Artifact:
    """Compile a model's encoders into an artifact folder and verify them against the original.

    The arguments are the fields of `clip_ttrt.Options`, which `clip-ttrt compile --help` explains.
    progress: where stages are reported; silent by default.
    Raises UserError for bad input, with nothing written; VerificationError where the compiled
    encoders lie outside their precision's bounds, with the artifact written and marked.
    """
    from clip_ttrt.engine import compile_with  # the compiler: loading needs none of it

    artifact = compile_with(Options(**options), progress or Progress(quiet=True))
    if artifact.verified is False:
        failures = artifact.manifest["verification"]["failures"]
        raise VerificationError(f"{artifact.folder} is marked unverified: {'; '.join(failures)}")
    return artifact


compile.__signature__ = inspect.Signature(
    [each.replace(kind=each.KEYWORD_ONLY) for function in (Options, compile)
     for each in inspect.signature(function).parameters.values() if each.name != "options"],
    return_annotation=Artifact)

if trt.register_if_possible() == "tensorrt":
    kernels.register()
