"""python -m clip_ttrt.info: what this machine has, and what a compile would use and why."""
import subprocess
import sys
from dataclasses import asdict
from typing import Any, Callable

from clip_ttrt import backends, build_kernels, kernels, stack
from clip_ttrt.options import Options


def collect() -> dict[str, Any]:
    """Everything that is shown, what matters most first."""
    return {
        "compile": attempt(what_a_compile_uses),
        "nvidia_smi": attempt(stack.driver),
        "gpu": attempt(stack.gpu),
        "versions": attempt(stack.versions),
        "kernels": attempt(library),
        "nvcc": attempt(nvcc),
    }


def attempt(tell: Callable[[], Any]) -> Any:
    """What a function tells; where it raises, that, in a sentence."""
    try:
        return tell()
    except Exception as problem:  # whatever it is: whoever asks is looking for what is wrong
        return "none ({}: {})".format(type(problem).__name__, str(problem).strip().split("\n")[0])


def what_a_compile_uses() -> dict[str, Any]:
    """With every choice left to it; the reasons say why it is not a better one."""
    precision = Options.precision  # the default
    backend = backends.choose("auto", precision)
    choice = backends.choose_kernels("auto", backend, precision)
    return {"precision": precision, "backend": backend._asdict(), "kernels": choice._asdict()}


def library() -> dict[str, Any]:
    found = kernels.find()
    facts = {} if found is None else {**asdict(found), "path": str(found.path)}
    return {**facts, "sources": kernels.version(), "obstacle": kernels.obstacle()}


def nvcc() -> list[str]:
    path = str(build_kernels.find_nvcc())
    answer = subprocess.run([path, "--version"], capture_output=True, text=True, timeout=60)
    return [path, *(line for line in answer.stdout.splitlines() if "release" in line)]


def text(told: Any, indent: str = "") -> str:
    """What was collected, a line for each thing."""
    if isinstance(told, dict):
        return "".join(f"\n{indent}{name}: {text(value, indent + '    ')}"
                       for name, value in told.items()) or "none"
    if isinstance(told, (list, tuple)):
        return ", ".join(text(each, indent + "    ") for each in told) or "none"
    return "none" if told is None else str(told)


if __name__ == "__main__":
    from clip_ttrt.cli import main
    sys.exit(main(["info", *sys.argv[1:]]))
