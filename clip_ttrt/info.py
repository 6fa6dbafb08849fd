"""python -m clip_ttrt.info: what this machine has, and what a compile would use and why.

It never fails: what cannot be told is a sentence.
"""
import platform
import re
import subprocess
import sys
from typing import Any, Callable

import torch

from clip_ttrt import backends, build_kernels, kernels, stack
from clip_ttrt.errors import UserError

PRECISION = "fp16"


def collect() -> dict[str, Any]:
    """Everything that is shown, as JSON can hold it."""
    return {
        "warnings": attempt(gpus_not_used),
        "python": f"{platform.python_version()}, {platform.platform()}",
        "nvidia_smi": attempt(stack.driver),
        "pytorch": {"version": torch.__version__, "cuda": torch.version.cuda,
                    "gpus": attempt(gpus_of_pytorch)},
        "versions": attempt(stack.versions),
        "kernels": attempt(library),
        "nvcc": attempt(nvcc),
        "compile": attempt(what_a_compile_uses),
    }


def attempt(tell: Callable[[], Any]) -> Any:
    """What a function tells; where it raises, that, in a sentence."""
    try:
        return tell()
    except (UserError, build_kernels.CannotBuild) as problem:
        return str(problem)
    except Exception as problem:  # whatever it is: whoever asks is looking for what is wrong
        first_line = str(problem).strip().split("\n")[0]
        return f"cannot be told: {type(problem).__name__}: {first_line}"


def gpus_not_used() -> list[str]:
    """What a user would want to know before anything else: a GPU that is there and not used."""
    seen = bool(stack.driver())
    if torch.cuda.is_available() and not seen:
        return ["PyTorch sees a GPU and nvidia-smi does not answer: `make` goes by nvidia-smi and "
                "takes this machine for one without a GPU (`make compile GPU=1` tells it)"]
    if seen and not torch.cuda.is_available():
        return [f"{stack.no_gpu()}; nothing will run on it"]
    return []


def gpus_of_pytorch() -> list[dict[str, str]]:
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    return [{"name": gpu.name, "compute_capability": f"{gpu.major}.{gpu.minor}",
             "memory": f"{gpu.total_memory >> 20} MiB"}
            for gpu in map(torch.cuda.get_device_properties, range(count))]


def library() -> dict[str, Any]:
    """The library of kernels, and why engines cannot have it, where they cannot."""
    found, expected = kernels.find(), kernels.version()
    facts = {"expected": expected, "obstacle": kernels.obstacle()}
    if found is None:
        return {"path": None, **facts}
    return {"path": str(found.path), "version": found.version,
            "current": found.version == expected, "architectures": list(found.architectures),
            "tensorrt_major": found.tensorrt_major, **facts}


def nvcc() -> dict[str, str]:
    """The compiler that the kernels would be built with."""
    path = build_kernels.find_nvcc()
    answer = subprocess.run([path, "--version"], capture_output=True, text=True, timeout=60)
    release = re.search(r"release ([\d.]+)", answer.stdout)
    return {"version": release[1] if release else "unknown", "path": str(path)}


def what_a_compile_uses() -> dict[str, Any]:
    """Backend and kernels of a compile with every choice left to it, and the reasons."""
    backend = backends.choose("auto", PRECISION)
    choice = backends.choose_kernels("auto", backend, PRECISION)
    return {"precision": PRECISION, "backend": backend.name, "device": backend.device,
            "computes_in": backend.computes_in, "reason": backend.reason,
            "kernels": choice.kernels, "kernels_reason": choice.reason}


def text(facts: dict[str, Any]) -> str:
    """What was collected, a line for each thing, what to be warned of first."""
    lines = []
    for name, told in facts.items():
        if name == "warnings" and isinstance(told, list):
            lines += [f"WARNING: {warning}" for warning in told]
        elif isinstance(told, dict):
            lines += [f"{name}:", *(f"    {key}: {flat(value)}" for key, value in told.items())]
        else:
            lines.append(f"{name}: {flat(told)}")
    return "\n".join(lines)


def flat(told: Any) -> str:
    if isinstance(told, list):
        return "; ".join(map(flat, told)) or "none"
    if isinstance(told, dict):
        return ", ".join(f"{key} {flat(value)}" for key, value in told.items())
    return "none" if told is None else str(told)


if __name__ == "__main__":
    from clip_ttrt.cli import main

    sys.exit(main(["info", *sys.argv[1:]]))
