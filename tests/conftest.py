"""Fixtures, and the rule for the `gpu` marker: skipped where no GPU answers, and all but those of
the kernels where no Torch-TensorRT is installed; pytest tells the first reason that holds."""
from pathlib import Path

import pytest
import torch

import clip_ttrt
from clip_ttrt import stack
from clip_ttrt.demo import scenes

collect_ignore = ["rtx"]  # run by test_rtx.py, in a process of its own
OF_KERNELS = Path(__file__).parent / "kernels"
# The longest are begun first, so that at the end no process waits for another; Ray, which counts
# the processes that start in time, when what they import has been read before.
LONGEST = ["rtx", "quantize", "command_line", "embed", "encoders", "drive", "search", "cpp",
           "families", "sweep", "wheel", "probe", "train_demo", "graph", "evaluate", "siglip",
           "ray"]


def pytest_collection_modifyitems(items):
    order = {f"test_{name}.py": place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: order.get(item.path.name, len(order)))
    missing = [name for name in ("torch-tensorrt", "tensorrt") if name not in stack.versions()]
    for item in items:
        if "gpu" not in item.keywords:
            continue
        if not torch.cuda.is_available():
            reason = "needs a GPU: no CUDA GPU answers"
        elif missing and OF_KERNELS not in item.path.parents:
            reason = f"needs TensorRT: not installed: {', '.join(missing)}"
        else:
            continue
        item.add_marker(pytest.mark.skipif(True, reason=reason), append=False)


def compiled(backend, folder):
    """The embedded model, compiled and verified as `make compile` does, for batches of 2 to 8."""
    return clip_ttrt.compile(batch="2:4:8", backend=backend, output=folder)


@pytest.fixture(scope="session", autouse=True)
def fewer_scenes():
    """On a CPU the embedded model is verified with 256 scenes in this process: 1,024 take 14 s."""
    with pytest.MonkeyPatch.context() as patch:
        if not torch.cuda.is_available():
            (_, *others), function = scenes.held_out_set.__defaults__, scenes.held_out_set
            patch.setattr(function, "__defaults__", (2, *others))
        yield


@pytest.fixture(scope="session")
def demo_artifact(tmp_path_factory):
    return compiled("torchscript", tmp_path_factory.mktemp("artifacts") / "demo")


@pytest.fixture(scope="session")
def demo_engines(tmp_path_factory):
    """TensorRT engines, with the fused kernels where they are built."""
    return compiled("tensorrt", tmp_path_factory.mktemp("engines") / "demo")
