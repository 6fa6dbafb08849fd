"""Which backend compiles and runs, and whose kernels its engines have.

For both `auto` takes the best that can be had here and says why no better one; what is asked for by
name and cannot be had is a UserError.
"""
from itertools import groupby, takewhile
from typing import NamedTuple, Optional

import torch

from clip_ttrt import kernels, stack
from clip_ttrt.errors import UserError
from clip_ttrt.linear import FP8_CAPABILITY
from clip_ttrt.stack import PACKAGES

TITLES = {"tensorrt": "TensorRT", "rtx": "TensorRT-RTX"}
REFUSED = {("rtx", "bf16"): "Torch-TensorRT-RTX takes no bf16 (use --precision fp16)"}


class Backend(NamedTuple):
    """A chosen backend.  `computes_in` is the arithmetic it really uses, whatever was asked."""

    name: str
    device: str
    computes_in: str
    reason: str


class Choice(NamedTuple):
    """Whose kernels an engine has: `fused` (ours), `tensorrt` (its own); None without an engine."""

    kernels: Optional[str]
    reason: str


def choose(asked: str, precision: str) -> Backend:
    """The backend for `auto` or a name, at a precision; UserError where it cannot be had."""
    installed, no_gpu = stack.versions(), stack.no_gpu()
    if precision == "fp8" and (no_gpu or torch.cuda.get_device_capability() < FP8_CAPABILITY):
        lack = no_gpu or "{name} has compute capability {compute_capability}".format(**stack.gpu())
        raise UserError(f"{lack}, and fp8 needs a GPU of 8.9 or more; use --precision fp16")
    wheels = [wheel for wheel, _ in PACKAGES.values() if wheel in installed]
    if len(wheels) > 1 and asked != "torchscript":  # pip does not notice
        both = " and ".join(f"{wheel} {installed[wheel]}" for wheel in wheels)
        raise UserError(f"{both} are both installed and overwrite each other's files; run "
                        f"`pip uninstall -y {' '.join(wheels)}` and install one of them again, "
                        f"or use --backend torchscript")

    obstacles = {name: no_gpu or not_installed(name, installed) or REFUSED.get((name, precision))
                 for name in PACKAGES}
    name, why = first_possible("backend", asked, {**obstacles, "torchscript": None})
    place = "the CPU" if no_gpu else torch.cuda.get_device_name()
    if no_gpu and asked != "auto":  # of auto `why` tells it
        place += f", since {no_gpu}"
    title, computes_in = "TorchScript", precision
    if name == "torchscript" and precision == "fp8":
        raise UserError(f"TorchScript has no fp8{why}; use --precision fp16")
    if name != "torchscript":
        title = f"{TITLES[name]} {installed[PACKAGES[name][1]]}"
    elif no_gpu or precision == "tf32":  # in PyTorch a switch of the whole process
        computes_in = "fp32"
    return Backend(name, "cpu" if no_gpu else "cuda", computes_in, f"{title} on {place}{why}")


def choose_kernels(asked: str, backend: Backend, precision: str, fusible: bool = True) -> Choice:
    """Whose kernels an engine has, for `auto` or a name; UserError where they cannot be had.
    fusible: whether any encoder is a transformer."""
    if backend.name == "torchscript":
        if asked != "auto":
            raise UserError(f"--kernels {asked} is for TensorRT's engines, and this is "
                            f"{backend.reason}; leave --kernels away")
        return Choice(None, "TorchScript runs PyTorch's kernels")

    if backend.name == "rtx":
        problem = "TensorRT-RTX has no plugin layers (the backend tensorrt has)"
    elif not fusible:
        problem = "the fused kernels are a transformer's, and the image encoder is a ResNet"
    elif precision not in ("fp16", "fp8"):
        problem = f"the fused kernels compute in fp16, not {precision} (use --precision fp16)"
    else:
        problem = None if asked == "tensorrt" else kernels.obstacle()
    name, why = first_possible("kernels", asked, {"fused": problem, "tensorrt": None})
    whose = "the fused kernels" if name == "fused" else f"{TITLES[backend.name]}'s own kernels"
    return Choice(name, whose + why)


def first_possible(option: str, asked: str,
                   obstacles: dict[str, Optional[str]]) -> tuple[str, str]:
    """The best name without an obstacle, and what to say behind it: that it was asked for, or why
    no better one.  The best is first, the last never has an obstacle."""
    if asked != "auto":
        if problem := obstacles[asked]:
            raise UserError(f"--{option} {asked} cannot be used here: {problem}; "
                            f"--{option} auto takes what can")
        return asked, ", as asked"
    better = list(takewhile(obstacles.get, obstacles))
    reasons = "; ".join(f"not {' or '.join(names)}: {why}"
                        for why, names in groupby(better, obstacles.get))
    return list(obstacles)[len(better)], f" ({reasons})" if reasons else ""


def not_installed(name: str, installed: dict[str, str]) -> Optional[str]:
    """What is missing or does not fit among a backend's packages, and the remedy; None: nothing."""
    wheel, runtime = PACKAGES[name]
    torch_version = installed.get("torch", torch.__version__)
    minor = stack.minor(torch_version)
    # That wheel has no upper pin, and gets a TensorRT-RTX that it cannot import.
    also = " tensorrt-rtx==1.4.0.76" if (name, minor) == ("rtx", "2.11") else ""
    remedy = f"`pip install {wheel}~={minor}.0{also}`"
    if wheel not in installed:
        others = (other for other, _ in PACKAGES.values() if other in installed)
        remedy = "".join(f"`pip uninstall -y {other}`, then " for other in others) + remedy
        return f"{wheel} is not installed ({remedy})"
    if stack.minor(installed[wheel]) != minor:
        return f"{wheel} {installed[wheel]} is not torch {torch_version}'s ({remedy})"
    if runtime not in installed:
        return f"{wheel} is installed without {TITLES[name]} itself ({remedy})"
    return None
