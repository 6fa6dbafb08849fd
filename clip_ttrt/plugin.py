"""The library of fused kernels: where it is, and loading it before an engine that needs it.

Loading registers the TensorRT plugin's creator with the process.  The kernels themselves live
in `kernels/` and are built into `clip_ttrt/lib/`.
"""
import ctypes
from pathlib import Path
from typing import Optional

from clip_ttrt.errors import UserError

LIBRARY = Path(__file__).parent / "lib" / "libclip_ttrt_kernels.so"


def available() -> bool:
    """Whether the library of fused kernels has been built."""
    return LIBRARY.is_file()


def resolve_attention(asked: str, backend: str) -> tuple[str, str]:
    """Which attention to compile and why: (`plugin` or `native`, one clause).

    Raises UserError where the plugin is asked for and cannot be had.
    """
    if backend != "tensorrt":
        if asked == "plugin":
            raise UserError("--attention plugin needs the TensorRT backend; leave it out or use --attention native")
        return "native", "PyTorch's scaled_dot_product_attention"
    if asked == "native":
        return "native", "as asked"
    if asked == "plugin":
        raise UserError(f"--attention plugin: there is no fused-attention plugin in this version (looked for {LIBRARY.name} in "
                        f"{LIBRARY.parent.name}/); use --attention native or auto")
    return "native", "there is no fused-attention plugin in this version"


def load(version: Optional[str]) -> None:
    """Load the plugin library that an engine was built with; None: the engine needs none.

    Raises UserError where it is missing, before TensorRT tries to deserialise the engine.
    """
    if version is None:
        return
    if not available():
        raise UserError(f"this artifact needs the fused-attention plugin, version {version}, and {LIBRARY.name} is not built")
    ctypes.CDLL(str(LIBRARY), mode=ctypes.RTLD_GLOBAL)
