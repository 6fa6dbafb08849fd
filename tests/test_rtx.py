"""Real networks without a GPU: tests/rtx with TensorRT-RTX.

In a process of its own, since a GPU is pretended there.
"""
import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from clip_ttrt import stack

HERE = Path(__file__).parent


@pytest.mark.skipif(
    torch.cuda.is_available() or (sys.platform, platform.machine()) != ("linux", "x86_64"),
    reason="TensorRT-RTX builds for the CPU on Linux x86-64; with a GPU its place is TensorRT's")
def test_networks_are_built_without_a_gpu():
    options = ["-q", "-p", "no:cacheprovider", f"--confcutdir={HERE / 'rtx'}", str(HERE / "rtx")]
    done = subprocess.run([sys.executable, "-m", "pytest", *options], cwd=HERE.parent,
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    last = done.stdout.strip().splitlines()[-1]
    of_fp8 = "2 skipped" if stack.minor(stack.versions()["tensorrt-rtx"]) == "1.4" else ""
    assert " passed" in last and ("skipped" in last) is bool(of_fp8) and of_fp8 in last, last
