"""python -m clip_ttrt.info: what this machine has, and what a compile would use and why.

It never fails: what cannot be told is a sentence.
"""
import argparse
import json
import platform
import re
import subprocess
import sys
from typing import Any, Callable, Optional

import torch

from clip_ttrt import backends, build_kernels, kernels, stack
from clip_ttrt.errors import UserError

PRECISION = "fp16"


def collect() -> dict[str, Any]:
    """Everything that is shown, as JSON can hold it."""
    nvidia_smi = attempt(stack.driver)
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "nvidia_smi": nvidia_smi,
        "pytorch": {"version": torch.__version__, "cuda": torch.version.cuda,
                    "gpus": attempt(gpus_of_pytorch)},
        "versions": attempt(stack.versions),
        "kernels": attempt(library),
        "nvcc": attempt(nvcc),
        "compile": attempt(what_a_compile_uses),
        "warnings": attempt(lambda: warnings_about(nvidia_smi)),
    }


def attempt(told: Callable[[], Any]) -> Any:
    """What a function tells; where it raises, that, in a sentence."""
    try:
        return told()
    except Exception as problem:  # whatever it is: whoever asks is looking for what is wrong
        return f"cannot be told: {type(problem).__name__}: {first_line(str(problem))}"


def first_line(text: str) -> str:
    return next(iter(text.strip().splitlines()), "")


def gpus_of_pytorch() -> list[dict[str, Any]]:
    """Name, capability and memory of each GPU that PyTorch sees."""
    if not torch.cuda.is_available():
        return []
    found = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    return [{"name": gpu.name, "compute_capability": f"{gpu.major}.{gpu.minor}",
             "memory": f"{gpu.total_memory >> 20} MiB"} for gpu in found]


def library() -> dict[str, Any]:
    """The library of kernels, and why engines cannot have it, where they cannot."""
    found = kernels.find()
    facts: dict[str, Any] = {"expected": kernels.version(), "obstacle": kernels.obstacle()}
    if found is not None:
        facts |= {"path": str(found.path), "version": found.version,
                  "current": found.version == kernels.version(),
                  "architectures": list(found.architectures),
                  "tensorrt_major": found.tensorrt_major}
    return facts


def nvcc() -> Optional[dict[str, str]]:
    """Path and version of the compiler that the kernels would be built with."""
    try:
        path = build_kernels.find_nvcc()
    except build_kernels.CannotBuild:
        return None
    answer = subprocess.run([path, "--version"], capture_output=True, text=True, timeout=60)
    release = re.search(r"release ([\d.]+)", answer.stdout)
    return {"path": str(path), "version": release[1] if release else "unknown"}


def what_a_compile_uses() -> dict[str, Any]:
    """Backend and kernels of a compile in fp16 with every choice left to it, and the reasons."""
    try:
        backend = backends.choose("auto", PRECISION)
    except UserError as problem:
        return {"backend": None, "reason": str(problem)}
    choice = backends.choose_kernels("auto", backend, PRECISION)
    return {"backend": backend.name, "device": backend.device, "computes_in": backend.computes_in,
            "reason": backend.reason, "kernels": choice.kernels, "kernels_reason": choice.reason}


def warnings_about(nvidia_smi: Any) -> list[str]:
    """What a user would want to know before anything else: a GPU that is there and not used."""
    if torch.cuda.is_available():
        if nvidia_smi:
            return []
        return ["PyTorch sees a GPU and nvidia-smi does not answer: `make` goes by nvidia-smi and "
                "takes this machine for one without a GPU (`make compile GPU=1` tells it)"]
    return [f"{stack.no_gpu()}; nothing will run on it"] if nvidia_smi else []


def text(facts: dict[str, Any]) -> str:
    """What was collected, a line for each thing."""
    lines = [f"WARNING: {warning}" for warning in as_list(facts["warnings"])]
    for gpu in as_list(facts["nvidia_smi"]) or ["does not answer, or is not there"]:
        lines.append(line("nvidia-smi", gpu if isinstance(gpu, str) else
                          f"{gpu['name']}, {capability(gpu)}{gpu['memory']}, "
                          f"driver {gpu['driver']}"))
    pytorch = facts["pytorch"]
    lines.append(line("PyTorch", f"{pytorch['version']}, "
                      + (f"CUDA {pytorch['cuda']}" if pytorch["cuda"] else "built without CUDA")))
    for gpu in as_list(pytorch["gpus"]) or ["none that PyTorch sees"]:
        lines.append(line("GPU", gpu if isinstance(gpu, str) else
                          f"{gpu['name']}, {capability(gpu)}{gpu['memory']}"))
    lines.append(line("Python", f"{facts['python']}, {facts['platform']}"))
    versions = facts["versions"]
    if isinstance(versions, str):
        lines.append(line("packages", versions))
    else:
        lines += [line(name, versions.get(name, "not installed"))
                  for name in stack.DISTRIBUTIONS if name != "torch"]
    lines += [line("kernels", told) for told in about_library(facts["kernels"])]
    found = facts["nvcc"]
    lines.append(line("nvcc", found if isinstance(found, str) else
                      f"{found['version']}, {found['path']}" if found else "not found"))
    lines += [""] + about_compile(facts["compile"])
    return "\n".join(lines)


def line(name: str, told: str) -> str:
    return f"{name:18} {told}"


def as_list(told: Any) -> list[Any]:
    """A list as it is; the sentence of something that cannot be told as the only entry of one."""
    return told if isinstance(told, list) else [told]


def capability(gpu: dict[str, Any]) -> str:
    return f"capability {gpu['compute_capability']}, " if "compute_capability" in gpu else ""


def about_library(found: Any) -> list[str]:
    if isinstance(found, str):
        return [found]
    lines = []
    if "path" in found:
        state = "current" if found["current"] else f"stale: the sources are {found['expected']}"
        major = found["tensorrt_major"]  # 0: built without TensorRT's headers
        plugins = f"for TensorRT {major}" if major else "without plugins"
        lines = [found["path"], f"version {found['version']} ({state}), {plugins}, "
                                f"{', '.join(found['architectures'])}"]
    else:
        lines = ["not built"]
    return lines + ([found["obstacle"]] if found["obstacle"] else [])


def about_compile(uses: Any) -> list[str]:
    what = f"A compile at {PRECISION} uses"
    if isinstance(uses, str):
        return [f"{what}: {uses}"]
    if uses["backend"] is None:
        return [f"{what} nothing: {uses['reason']}"]
    note = "" if uses["computes_in"] == PRECISION else f", which computes in {uses['computes_in']}"
    return [f"{what} --backend {uses['backend']}{note}: {uses['reason']}",
            f"  with these kernels: {uses['kernels_reason']}"]


def main(arguments: Optional[list[str]] = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m clip_ttrt.info",
                                     description="Tell what this machine has and what a compile "
                                                 "would use, and why not something better.")
    parser.add_argument("--json", action="store_true", help="for programs")
    options = parser.parse_args(arguments)
    facts = collect()
    print(json.dumps(facts, indent=2) if options.json else text(facts))
    return 0


if __name__ == "__main__":
    sys.exit(main())
