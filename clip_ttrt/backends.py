"""Which backend compiles and runs: TensorRT where a GPU and the packages are, else TorchScript."""
import importlib.util
from dataclasses import dataclass

import torch

from clip_ttrt.errors import UserError

TENSORRT_PACKAGES = ("tensorrt", "torch_tensorrt")


@dataclass(frozen=True)
class Backend:
    """A chosen backend.  `computes_in` is the arithmetic it really uses, whatever was asked."""

    name: str  # tensorrt or torchscript
    device: str  # cuda or cpu
    computes_in: str
    reason: str


def missing_packages() -> list[str]:
    """The TensorRT packages that are not installed."""
    return [name for name in TENSORRT_PACKAGES if importlib.util.find_spec(name) is None]


def choose(asked: str, precision: str) -> Backend:
    """The backend for `auto`, `tensorrt` or `torchscript` at a precision.

    Raises UserError where TensorRT is asked for and absent.
    """
    missing, has_gpu = missing_packages(), torch.cuda.is_available()
    obstacle = "no CUDA GPU answers" if not has_gpu else f"not installed: {', '.join(missing)}" if missing else None
    if asked == "tensorrt" and obstacle:
        raise UserError(f"--backend tensorrt cannot be used here: {obstacle}; the TensorRT packages need Python 3.10 on Linux x86-64 "
                        f"and an NVIDIA GPU, or use --backend torchscript")
    if asked != "torchscript" and not obstacle:
        return Backend("tensorrt", "cuda", precision, f"TensorRT on {torch.cuda.get_device_name()}")
    why = "as asked" if asked == "torchscript" else obstacle
    if has_gpu:
        # TF32 in PyTorch is a switch of the whole process, which a library has no business to turn.
        return Backend("torchscript", "cuda", "fp16" if precision == "fp16" else "fp32", f"TorchScript on {torch.cuda.get_device_name()}: {why}")
    return Backend("torchscript", "cpu", "fp32", f"TorchScript on the CPU: {why}")


def register_runtime() -> bool:
    """Make `torch.jit.load` know TensorRT engines, where this machine can run them; returns whether it can.

    Loads Torch-TensorRT's C++ library alone: importing the Python package takes seconds and is
    needed only to build.  A later `import torch_tensorrt` finds the same library loaded.
    """
    if missing_packages() or not torch.cuda.is_available():
        return False
    import tensorrt  # its import loads libnvinfer, which the runtime links

    try:
        torch.classes.tensorrt.Engine
    except RuntimeError:  # not registered yet
        package = importlib.util.find_spec("torch_tensorrt").submodule_search_locations[0]
        torch.ops.load_library(f"{package}/lib/libtorchtrt.so")
    tensorrt.init_libnvinfer_plugins(None, "")  # an engine for a range of images holds one of these
    return True
