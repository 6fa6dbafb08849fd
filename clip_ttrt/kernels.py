"""The library of fused kernels (`kernels/`): where it is, its TensorRT plugins, and the attention kernel for PyTorch.

`python -m kernels.build` builds the library into `clip_ttrt/lib/`.  Everything works without it,
through TensorRT's own layers.
"""
import ctypes
import functools
import os
import sys
import warnings
from pathlib import Path
from typing import Optional

import torch

from clip_ttrt.errors import UserError

LIBRARY = Path(__file__).parent / "lib" / "libclip_ttrt_kernels.so"
BUILD_IT = "build it with `python -m kernels.build`"
CUBLASLT = "nvidia/cu13/lib/libcublasLt.so.13"  # in the packages of a Python that has the extra `kernels`
# As kernels/*/*_plugin.cpp register them, all under one version, which grows when any of them changes.
ATTENTION, BIAS_QUICK_GELU, RESIDUAL_LAYER_NORM = "ClipAttention", "ClipBiasQuickGelu", "ClipResidualLayerNorm"
EXTRACT_PATCHES, EMBED_IMAGE, LINEAR = "ClipExtractPatches", "ClipEmbedImage", "ClipLinear"
VERSION = "3"
REGISTER = ("clip_attention_register_plugin", "clip_elementwise_register_plugins", "clip_linear_register_plugins")


class AttentionParams(ctypes.Structure):
    """`ClipAttentionParams` of kernels/attention/attention.h, field by field."""

    _fields_ = [("qkv", ctypes.c_void_p), ("out", ctypes.c_void_p), ("query_bias", ctypes.c_void_p), ("batch", ctypes.c_int64),
                ("heads", ctypes.c_int32), ("tokens", ctypes.c_int32), ("causal", ctypes.c_int32), ("variant", ctypes.c_int32)]


def cublaslt() -> Optional[Path]:
    """The file of the extra `kernels`, which linear layers then run with; None where it is not installed."""
    return next((path for path in (Path(root, CUBLASLT).absolute() for root in sys.path) if path.is_file()), None)


@functools.cache
def library() -> ctypes.CDLL:
    """The loaded library, which knows the extra's cuBLASLt.  Raises UserError where it is not built or cannot be loaded."""
    if not LIBRARY.is_file():
        raise UserError(f"{LIBRARY.name} is not built; {BUILD_IT}")
    try:
        loaded = ctypes.CDLL(str(LIBRARY), mode=ctypes.RTLD_GLOBAL)
    except OSError as problem:
        raise UserError(f"{LIBRARY.name} cannot be loaded ({problem}); {BUILD_IT}") from problem
    loaded.clip_attention_launch.argtypes = [ctypes.POINTER(AttentionParams), ctypes.c_void_p]
    loaded.clip_attention_launch.restype = ctypes.c_int
    if loaded.clip_attention_params_size() != ctypes.sizeof(AttentionParams) or not hasattr(loaded, "clip_linear_prefer_library"):
        raise UserError(f"{LIBRARY.name} belongs to another version of clip_ttrt; {BUILD_IT}")
    if path := cublaslt():
        loaded.clip_linear_prefer_library(os.fsencode(path))
    return loaded


def available() -> bool:
    """Whether the library has been built."""
    return LIBRARY.is_file()


def lacking() -> Optional[str]:
    """Why no engine can have the plugins here; None where one can."""
    try:
        loaded = library()
    except UserError as problem:
        return str(problem)
    if not all(hasattr(loaded, name) for name in REGISTER):
        return f"{LIBRARY.name} was built without the TensorRT plugin; {BUILD_IT} where TensorRT's headers are (TENSORRT_INCLUDE_DIR)"
    return None


def register() -> None:
    """Register the plugins, where they are built, for engines that plain `torch.jit.load` brings in; what cannot be loaded is a warning."""
    if available():
        try:
            load(VERSION)
        except UserError as problem:
            warnings.warn(f"engines that need the plugins will not load: {problem}", stacklevel=2)


def load(version: Optional[str]) -> None:
    """Load and register the plugin that an engine was built with; None: the engine needs none.

    Raises UserError where it is missing or another version, before TensorRT deserialises the engine.
    """
    if version is None:
        return
    if problem := lacking():
        raise UserError(f"this artifact needs our plugins, version {version}: {problem}")
    if version != VERSION:
        raise UserError(f"this artifact needs version {version} of our plugins, and this is version {VERSION}; compile again")
    import tensorrt  # noqa: F401  (loads libnvinfer, in which the creator registers)

    if not all(getattr(library(), name)() == 1 for name in REGISTER):
        raise UserError(f"TensorRT does not take the plugins of {LIBRARY.name}; {BUILD_IT}")


def attention(qkv: torch.Tensor, heads: int, causal: bool, query_bias: Optional[torch.Tensor] = None) -> torch.Tensor:
    """The fused kernel on a CUDA tensor: fp16 [B, T, 3·heads·64] -> fp16 [B, T, heads·64], on the current stream.

    `query_bias`, fp32 [heads·64] on the same device, is added to the queries (rounded to fp16, as in an fp16 linear layer).
    Raises ValueError for another bias, UserError without the library, RuntimeError where the launch fails.
    """
    qkv = qkv.contiguous()
    if query_bias is not None:
        if query_bias.dtype != torch.float32 or query_bias.shape != (heads * 64,) or query_bias.device != qkv.device:
            raise ValueError(f"query_bias must be fp32 [{heads * 64}] on {qkv.device}, not {query_bias.dtype} "
                             f"{list(query_bias.shape)} on {query_bias.device}")
        query_bias = query_bias.contiguous()
    batch, tokens = qkv.shape[:2]
    out = qkv.new_empty((batch, tokens, qkv.shape[2] // 3))
    if batch == 0:
        return out
    bias_pointer = None if query_bias is None else query_bias.data_ptr()
    params = AttentionParams(qkv.data_ptr(), out.data_ptr(), bias_pointer, batch, heads, tokens, int(causal), 0)
    with torch.cuda.device(qkv.device):
        status = library().clip_attention_launch(ctypes.byref(params), torch.cuda.current_stream().cuda_stream)
    if status != 0:
        raise RuntimeError(f"the fused attention kernel failed with CUDA error {status} for shape {list(qkv.shape)}, {heads} heads")
    return out


def serves(qkv: torch.Tensor, heads: int) -> bool:
    """Whether the fused kernel can take this tensor: built, CUDA, fp16, sizes and GPU it supports."""
    if not (qkv.is_cuda and qkv.dtype == torch.half and qkv.dim() == 3 and qkv.shape[2] == 3 * heads * 64 and available()):
        return False
    major, minor = torch.cuda.get_device_capability(qkv.device)
    return bool(library().clip_attention_supported(ctypes.c_int64(max(1, qkv.shape[0])), heads, qkv.shape[1], 64, major, minor))
