"""Which backend and whose kernels: every rule, on machines that are made up here."""
import re

import pytest
import torch

from clip_ttrt import kernels, stack
from clip_ttrt.backends import Backend, choose, choose_kernels
from clip_ttrt.errors import UserError
from clip_ttrt.options import BACKENDS, KERNELS, PRECISIONS

TORCH = {"torch": "2.14.1+cu130"}
TENSORRT = {**TORCH, "torch-tensorrt": "2.14.0", "tensorrt": "11.1.0.106"}
RTX = {**TORCH, "torch-tensorrt-rtx": "2.14.0", "tensorrt-rtx": "1.6.1.120"}
INSTALLED = {"nothing": TORCH, "tensorrt": TENSORRT, "rtx": RTX, "both": {**TENSORRT, **RTX}}


@pytest.fixture
def machine(monkeypatch):
    """A function that makes a machine: what is installed, and whether a GPU answers."""
    def make(installed, gpu=True):
        monkeypatch.setattr(stack, "versions", lambda: installed)
        monkeypatch.setattr(stack, "driver", list)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H100")
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    return make


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("asked", BACKENDS)
@pytest.mark.parametrize("gpu", [True, False])
@pytest.mark.parametrize("installed", INSTALLED)
def test_the_matrix(installed, gpu, asked, precision, machine):
    machine(INSTALLED[installed], gpu)
    possible = ["torchscript"] if precision != "fp8" else []
    if gpu and (installed == "tensorrt" or installed == "rtx" and precision != "bf16"):
        possible.insert(0, installed)
    wanted = next(iter(possible), None) if asked == "auto" else asked
    if wanted not in possible or installed == "both" and asked != "torchscript":
        with pytest.raises(UserError, match="--backend |--precision fp16"):
            choose(asked, precision)
        return
    backend = choose(asked, precision)
    assert (backend.name, backend.device) == (wanted, "cuda" if gpu else "cpu")
    on_a_gpu = {"tf32": "fp32"} if wanted == "torchscript" else {}
    assert backend.computes_in == (on_a_gpu.get(precision, precision) if gpu else "fp32")
    assert backend.reason.endswith(", as asked") == (asked != "auto")


def test_auto_says_why_it_is_not_a_better_one(machine):
    machine(RTX)
    assert choose("auto", "bf16").reason == (
        "TorchScript on NVIDIA H100 (not tensorrt: torch-tensorrt is not installed (`pip uninstall "
        "-y torch-tensorrt-rtx`, then `pip install torch-tensorrt~=2.14.0`); not rtx: "
        "Torch-TensorRT-RTX takes no bf16 (use --precision fp16))")


@pytest.mark.parametrize("asked, installed, sentence", [
    ("tensorrt", TORCH, "is not installed (`pip install torch-tensorrt~=2.14.0`)"),
    ("rtx", {"torch": "2.11.0"},
     "`pip install torch-tensorrt-rtx~=2.11.0 tensorrt-rtx==1.4.0.76`"),
    ("tensorrt", {**TENSORRT, "torch-tensorrt": "2.13.0"},
     "torch-tensorrt 2.13.0 is not torch 2.14.1+cu130's (`pip install torch-tensorrt~=2.14.0`)"),
    ("tensorrt", {**TORCH, "torch-tensorrt": "2.14.0"},
     "torch-tensorrt is installed without TensorRT itself (`pip install torch-tensorrt~=2.14.0`)"),
])
def test_asked_for_by_name_and_impossible(asked, installed, sentence, machine):
    machine(installed)
    with pytest.raises(UserError) as caught:
        choose(asked, "fp16")
    assert str(caught.value).startswith(f"--backend {asked} cannot be used here: ")
    assert sentence in str(caught.value) and "; --backend auto takes" in str(caught.value)


BACKEND_OF = {name: Backend(name, "cuda", "fp16", f"{name} on a GPU")
              for name in ("tensorrt", "rtx", "torchscript")}
NO_LIBRARY = "the library is not built (build it)"


@pytest.mark.parametrize("obstacle", [None, NO_LIBRARY])
@pytest.mark.parametrize("asked", KERNELS)
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("name", BACKEND_OF)
def test_the_matrix_of_kernels(name, precision, asked, obstacle, monkeypatch):
    monkeypatch.setattr(kernels, "obstacle", lambda: obstacle)
    possible = [] if name == "torchscript" else ["tensorrt"]
    if name == "tensorrt" and precision in ("fp16", "fp8") and obstacle is None:
        possible.insert(0, "fused")
    if asked != "auto" and asked not in possible:
        with pytest.raises(UserError, match=f"^--kernels {asked} "):
            choose_kernels(asked, BACKEND_OF[name], precision)
        return
    choice = choose_kernels(asked, BACKEND_OF[name], precision)
    best = next(iter(possible), None)
    assert choice.kernels == (best if asked == "auto" else asked)
    assert ("not fused: " in choice.reason) == (asked == "auto" and best == "tensorrt")


@pytest.mark.parametrize("name, precision, sentence", [
    ("rtx", "fp16", "TensorRT-RTX has no plugin layers"),
    ("tensorrt", "bf16", "the fused kernels compute in fp16, not bf16"),
    ("tensorrt", "fp16", NO_LIBRARY),
])
def test_why_there_are_no_fused_kernels(name, precision, sentence, monkeypatch):
    monkeypatch.setattr(kernels, "obstacle", lambda: NO_LIBRARY)
    with pytest.raises(UserError, match=re.escape(sentence)):
        choose_kernels("fused", BACKEND_OF[name], precision)
    assert f"not fused: {sentence}" in choose_kernels("auto", BACKEND_OF[name], precision).reason
