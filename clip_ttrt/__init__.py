"""OpenAI's CLIP, compiled for NVIDIA GPUs with Torch-TensorRT, straight from PyTorch.

    artifact = clip_ttrt.compile(model="demo", precision="fp16", output="artifacts/demo")
    model, preprocess = clip_ttrt.load("artifacts/demo", device="cuda")
    features = model.encode_image(images)

Importing the package also makes plain `torch.jit.load` able to read compiled modules.
"""
import sys
import types

from clip_ttrt import kernels, trt
from clip_ttrt.artifact import Artifact
from clip_ttrt.errors import UserError, VerificationError
from clip_ttrt.engine import compile
from clip_ttrt.runtime import CompiledCLIP, load

__all__ = ["Artifact", "CompiledCLIP", "UserError", "VerificationError", "compile", "load"]



class _Package(types.ModuleType):
    """This package, whose `compile` stays the function where the program of that name is imported."""

    def __setattr__(self, name, value):
        if name != "compile" or not isinstance(value, types.ModuleType):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package

if trt.register_if_possible() == "tensorrt":
    kernels.register()
