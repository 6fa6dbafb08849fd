"""Which backend compiles and runs, and whose kernels its engines have.

One rule for both: `auto` takes the first that can be had here and says why not a better one; what
is asked for by name and cannot be had is a UserError.  Nothing is imported to find out.
"""
from dataclasses import dataclass
from typing import Callable, Optional

import torch

from clip_ttrt import kernels, stack
from clip_ttrt.errors import UserError

BACKENDS_BEST_FIRST = ("tensorrt", "rtx", "torchscript")
KERNELS_BEST_FIRST = ("fused", "tensorrt")
TITLES = {"tensorrt": "TensorRT", "rtx": "TensorRT-RTX"}

# Backend -> its distributions: Torch-TensorRT, and the TensorRT under it.
PACKAGES = {
    "tensorrt": ("torch-tensorrt", "tensorrt"),
    "rtx": ("torch-tensorrt-rtx", "tensorrt-rtx"),
}
# What pip has to be told beside a wheel of that minor, which has no upper pin and gets a
# TensorRT-RTX that it cannot import.
ALSO = {("torch-tensorrt-rtx", "2.11"): " tensorrt-rtx==1.4.0.76"}

# What a backend does not compute in.
REFUSED = {("rtx", "bf16"): "Torch-TensorRT-RTX takes no bf16 (use --precision fp16)"}
# What TorchScript computes in on a GPU, by what was asked; on the CPU it is always fp32.  TF32 in
# PyTorch is a switch of the whole process, which a library has no business to turn.
TORCHSCRIPT_ON_A_GPU = {"fp32": "fp32", "tf32": "fp32", "fp16": "fp16", "bf16": "bf16"}
# By backend or precision, why its engines have no fused kernels; others have where the library is.
NOT_FUSED = {
    "rtx": "TensorRT-RTX has no plugin layers (the backend tensorrt has)",
    "fp32": "the fused kernels compute in fp16, not fp32 (use --precision fp16)",
    "tf32": "the fused kernels compute in fp16, not tf32 (use --precision fp16)",
    "bf16": "bf16 has TensorRT's own kernels alone (the fused ones are fp16's)",
}


@dataclass(frozen=True)
class Backend:
    """A chosen backend.  `computes_in` is the arithmetic it really uses, whatever was asked."""

    name: str  # tensorrt, rtx or torchscript
    device: str  # cuda or cpu
    computes_in: str
    reason: str


@dataclass(frozen=True)
class Choice:
    """Whose kernels an engine has: `fused` (ours), `tensorrt` (its own); None without an engine."""

    kernels: Optional[str]
    reason: str


def choose(asked: str, precision: str) -> Backend:
    """The backend for `auto` or a name, at a precision.

    Raises UserError for a name that cannot be had here, and where both Torch-TensorRT wheels are
    installed, unless torchscript is asked for.
    """
    installed = stack.versions()
    if asked != "torchscript":
        refuse_both_wheels(installed)
    no_gpu = stack.no_gpu()

    def obstacle(name: str) -> Optional[str]:
        if name == "torchscript":
            return None
        return no_gpu or not_installed(name, installed) or REFUSED.get((name, precision))

    name, why = first_possible("backend", asked, BACKENDS_BEST_FIRST, obstacle)
    if no_gpu:  # which `why` tells of auto
        place = "the CPU" if asked == "auto" else f"the CPU, since {no_gpu}"
    else:
        place = torch.cuda.get_device_name()
    if name != "torchscript":
        version = installed[PACKAGES[name][1]]
        return Backend(name, "cuda", precision, f"{TITLES[name]} {version} on {place}{why}")
    device, computes_in = ("cpu", "fp32") if no_gpu else ("cuda", TORCHSCRIPT_ON_A_GPU[precision])
    return Backend(name, device, computes_in, f"TorchScript on {place}{why}")


def choose_kernels(asked: str, backend: Backend, precision: str) -> Choice:
    """Whose kernels an engine of this backend and precision has, for `auto` or a name.

    Raises UserError for a name that cannot be had.
    """
    if backend.name == "torchscript":
        if asked != "auto":
            raise UserError(f"--kernels {asked} is for TensorRT's engines, and this is "
                            f"{backend.reason}; leave --kernels away")
        return Choice(None, "TorchScript runs PyTorch's kernels")

    def obstacle(name: str) -> Optional[str]:
        if name == "tensorrt":
            return None
        return NOT_FUSED.get(backend.name) or NOT_FUSED.get(precision) or kernels.obstacle()

    name, why = first_possible("kernels", asked, KERNELS_BEST_FIRST, obstacle)
    whose = {"fused": "the fused kernels", "tensorrt": f"{TITLES[backend.name]}'s own kernels"}
    return Choice(name, whose[name] + why)


def first_possible(option: str, asked: str, best_first: tuple[str, ...],
                   obstacle: Callable[[str], Optional[str]]) -> tuple[str, str]:
    """The best that can be had, and what to say behind it: that it was asked for, or what refuses
    each better one.

    obstacle: a name -> why it cannot be had, with the remedy; None where it can.  The last of
    `best_first` always can.  Raises UserError for a name that cannot.
    """
    if asked != "auto":
        if problem := obstacle(asked):
            raise UserError(f"--{option} {asked} cannot be used here: {problem}; "
                            f"--{option} auto takes what can")
        return asked, ", as asked"
    refused: dict[str, list[str]] = {}  # why -> the names that it refuses
    for name in best_first:
        problem = obstacle(name)
        if problem is None:
            break
        refused.setdefault(problem, []).append(name)
    reasons = "; ".join(f"not {' or '.join(names)}: {why}" for why, names in refused.items())
    return name, f" ({reasons})" if reasons else ""


def refuse_both_wheels(installed: dict[str, str]) -> None:
    """Raises UserError where both Torch-TensorRT wheels are installed: pip does not notice."""
    wheels = [wheel for wheel, _ in PACKAGES.values() if wheel in installed]
    if len(wheels) > 1:
        both = " and ".join(f"{wheel} {installed[wheel]}" for wheel in wheels)
        raise UserError(f"{both} are both installed and overwrite each other's files; run "
                        f"`pip uninstall -y {' '.join(wheels)}` and install one of them again, "
                        f"or use --backend torchscript")


def not_installed(name: str, installed: dict[str, str]) -> Optional[str]:
    """What is missing or does not fit among a backend's packages, and the remedy; None: nothing."""
    wheel, runtime = PACKAGES[name]
    torch_version = installed.get("torch", torch.__version__)
    minor = stack.minor(torch_version)
    remedy = f"`pip install {wheel}~={minor}.0{ALSO.get((wheel, minor), '')}`"
    if wheel not in installed:
        other = next((each for each, _ in PACKAGES.values() if each in installed), None)
        if other is not None:  # both at once would be refused
            remedy = f"`pip uninstall -y {other}`, then {remedy}"
        return f"{wheel} is not installed ({remedy})"
    if stack.minor(installed[wheel]) != minor:
        return f"{wheel} {installed[wheel]} is not torch {torch_version}'s ({remedy})"
    if runtime not in installed:
        return f"{wheel} is installed without {TITLES[name]} itself ({remedy})"
    return None
