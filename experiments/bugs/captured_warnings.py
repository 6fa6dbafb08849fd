"""Importing torch_tensorrt sends the whole process's Python warnings to a logger

`torch_tensorrt/logging.py` calls `logging.captureWarnings(True)` when it is imported.  From then
on what any library warns of is written by the logger `py.warnings`, past the program's
`warnings.showwarning` and past `warnings.catch_warnings` that wants it shown.

Steps: import torch_tensorrt and look at `warnings.showwarning`.  Needs no GPU.

Avoided by: the package's one file that imports torch_tensorrt undoes it (clip_ttrt/trt.py).
"""
import contextlib
import sys
import warnings
from unittest import mock

import torch

from experiments.bugs.stock import CannotRun, Finding, require, show


def reproduce() -> Finding:
    require(gpu=False)
    if "torch_tensorrt" in sys.modules:
        raise CannotRun("torch_tensorrt was imported before this script could look")
    before = warnings.showwarning
    with contextlib.ExitStack() as answers:
        if not torch.cuda.is_available():  # what the import asks of a GPU
            for name, value in {"get_device_capability": (8, 6), "current_device": 0}.items():
                answers.enter_context(mock.patch(f"torch.cuda.{name}", return_value=value))
        import torch_tensorrt  # noqa: F401
    after = warnings.showwarning
    actual = f"showwarning is {after.__module__}.{after.__name__}"
    expected = f"showwarning stays {before.__module__}.{before.__name__}"
    return Finding(after is not before, expected, actual)


if __name__ == "__main__":
    sys.exit(show(__doc__, reproduce))
