"""The elementwise kernels of the library (`kernels/elementwise/`) for PyTorch: bias and QuickGELU, residual and layer norm."""
import ctypes
import functools
from typing import Optional

import torch

from clip_ttrt import plugin
from clip_ttrt.errors import UserError

WIDTH_STEP, GELU_WIDTHS, LAYER_NORM_WIDTHS = 8, 65536, 8192  # as kernels/elementwise/elementwise.h: widths are multiples of 8 up to these


class GeluParams(ctypes.Structure):
    """`ClipBiasQuickGeluParams` of kernels/elementwise/elementwise.h, field by field."""

    _fields_ = [("in", ctypes.c_void_p), ("bias", ctypes.c_void_p), ("out", ctypes.c_void_p), ("rows", ctypes.c_int64),
                ("width", ctypes.c_int32), ("variant", ctypes.c_int32)]


class LayerNormParams(ctypes.Structure):
    """`ClipResidualLayerNormParams` of kernels/elementwise/elementwise.h, field by field."""

    _fields_ = [("x", ctypes.c_void_p), ("delta", ctypes.c_void_p), ("bias", ctypes.c_void_p), ("scale", ctypes.c_void_p),
                ("shift", ctypes.c_void_p), ("sum_out", ctypes.c_void_p), ("out", ctypes.c_void_p), ("rows", ctypes.c_int64),
                ("width", ctypes.c_int32), ("epsilon", ctypes.c_float), ("variant", ctypes.c_int32)]


@functools.cache
def _library() -> ctypes.CDLL:
    """The library with these kernels' signatures.  Raises UserError where it is not built or another version."""
    loaded = plugin.library()
    try:
        for name, params in (("bias_quick_gelu", GeluParams), ("residual_layer_norm", LayerNormParams)):
            launch, size = getattr(loaded, f"clip_{name}_launch"), getattr(loaded, f"clip_{name}_params_size")
            launch.argtypes, launch.restype = [ctypes.POINTER(params), ctypes.c_void_p], ctypes.c_int
            if size() != ctypes.sizeof(params):
                raise AttributeError(name)
    except AttributeError as problem:
        raise UserError(f"{plugin.LIBRARY.name} belongs to another version of clip_ttrt; {plugin.BUILD_IT}") from problem
    return loaded


def serves(x: torch.Tensor, most: int = LAYER_NORM_WIDTHS) -> bool:
    """Whether the kernels can take rows like these: built, CUDA, fp16, of a width that is a multiple of 8 and at most `most`, a GPU they run on."""
    if not (x.is_cuda and x.dtype == torch.half and x.dim() >= 1 and 0 < x.shape[-1] <= most and x.shape[-1] % WIDTH_STEP == 0):
        return False
    return plugin.available() and torch.cuda.get_device_capability(x.device) >= (8, 0)


def _rows(x: torch.Tensor, name: str, like: Optional[torch.Tensor] = None) -> torch.Tensor:
    """x, contiguous and 16-byte aligned.  Raises ValueError for anything but fp16 on a GPU (with `like`: of its shape and device)."""
    if not x.is_cuda or x.dtype != torch.half or x.dim() < 1:
        raise ValueError(f"{name} must be fp16 [.., width] on a GPU, not {x.dtype} {list(x.shape)} on {x.device}")
    if like is not None and (x.shape != like.shape or x.device != like.device):
        raise ValueError(f"{name} must be {list(like.shape)} on {like.device}, not {list(x.shape)} on {x.device}")
    return _aligned(x)


def _constant(value: Optional[torch.Tensor], name: str, x: torch.Tensor) -> Optional[torch.Tensor]:
    """A contiguous, aligned fp32 [width] beside x.  Raises ValueError for anything else."""
    if value is None:
        return None
    if value.dtype != torch.float32 or value.shape != x.shape[-1:] or value.device != x.device:
        raise ValueError(f"{name} must be fp32 [{x.shape[-1]}] on {x.device}, not {value.dtype} {list(value.shape)} on {value.device}")
    return _aligned(value)


def _aligned(x: torch.Tensor) -> torch.Tensor:
    x = x.contiguous()
    return x if x.data_ptr() % 16 == 0 else x.clone()


def _address(x: Optional[torch.Tensor]) -> Optional[int]:
    return None if x is None else x.data_ptr()


def _launch(name: str, params: ctypes.Structure, x: torch.Tensor) -> None:
    with torch.cuda.device(x.device):
        status = getattr(_library(), f"clip_{name}_launch")(ctypes.byref(params), torch.cuda.current_stream().cuda_stream)
    if status != 0:
        raise RuntimeError(f"the {name} kernel failed with CUDA error {status} for shape {list(x.shape)}")


def bias_quick_gelu(x: torch.Tensor, bias: Optional[torch.Tensor]) -> torch.Tensor:
    """y·sigmoid(1.702·y) of y = x + bias, in fp32 inside: fp16 [.., W] and fp32 [W] or None, on a GPU -> fp16 [.., W], on the current stream.

    W is a multiple of 8 up to 65536.  Raises ValueError for other tensors, UserError without the library, RuntimeError
    where the launch fails.
    """
    x = _rows(x, "x")
    bias = _constant(bias, "bias", x)
    _check_width(x, GELU_WIDTHS)
    out = torch.empty_like(x)
    width = x.shape[-1]
    _launch("bias_quick_gelu", GeluParams(x.data_ptr(), _address(bias), out.data_ptr(), x.numel() // width, width, 0), x)
    return out


def residual_layer_norm(x: torch.Tensor, delta: Optional[torch.Tensor], bias: Optional[torch.Tensor], scale: torch.Tensor, shift: torch.Tensor,
                        epsilon: float) -> tuple[torch.Tensor, torch.Tensor]:
    """The sum x + delta + bias and its layer norm over the last axis, in fp32 inside, on the current stream.

    x: fp16 [.., W] on a GPU; delta: the same or None; bias: fp32 [W] or None; scale and shift: fp32 [W]; W is a multiple
    of 8 up to 8192.  Returns (sum, normalised), both fp16 [.., W]; without delta and bias the sum is x itself.  The layer
    norm is that of the sum as rounded to fp16.  Raises ValueError for other tensors, UserError without the library,
    RuntimeError where the launch fails.
    """
    x = _rows(x, "x")
    delta = None if delta is None else _rows(delta, "delta", like=x)
    bias, scale, shift = (_constant(value, name, x) for value, name in ((bias, "bias"), (scale, "scale"), (shift, "shift")))
    _check_width(x, LAYER_NORM_WIDTHS)
    if not epsilon > 0:
        raise ValueError(f"epsilon must be above 0, not {epsilon}")
    total = x if delta is None and bias is None else torch.empty_like(x)
    out = torch.empty_like(x)
    width = x.shape[-1]
    params = LayerNormParams(x.data_ptr(), _address(delta), _address(bias), scale.data_ptr(), shift.data_ptr(), None if total is x else total.data_ptr(),
                             out.data_ptr(), x.numel() // width, width, epsilon, 0)
    _launch("residual_layer_norm", params, x)
    return total, out


def _check_width(x: torch.Tensor, most: int) -> None:
    if not 0 < x.shape[-1] <= most or x.shape[-1] % WIDTH_STEP != 0:
        raise ValueError(f"the width must be a multiple of {WIDTH_STEP} from {WIDTH_STEP} to {most}, not {x.shape[-1]}")
