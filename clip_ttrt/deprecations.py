"""Deprecations that no user can do anything about: TorchScript's, and pkg_resources' in `clip`."""
import warnings
from contextlib import contextmanager
from types import ModuleType
from typing import Iterator


@contextmanager
def hidden() -> Iterator[None]:
    """Their warnings are not shown; all others are."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", r"`torch\.jit\.", FutureWarning)
        warnings.filterwarnings("ignore", "pkg_resources is deprecated", UserWarning)
        yield


def clip() -> ModuleType:
    """The `clip` package's module of the same name: `tokenize`, `_transform`, `_MODELS`."""
    with hidden():
        from clip import clip as module
    return module
