"""The elementwise kernels of the library (`kernels/elementwise/`) for PyTorch: what CLIP does between its matrix products."""
import ctypes
import functools
from typing import Optional

import torch

from clip_ttrt import kernels
from clip_ttrt.errors import UserError

# As kernels/elementwise/elementwise.h: widths are multiples of 8 up to these.
WIDTH_STEP, GELU_WIDTHS, LAYER_NORM_WIDTHS, MAX_RESOLUTION = 8, 65536, 8192, 4096


def _pointers(*names: str) -> list[tuple[str, type]]:
    return [(name, ctypes.c_void_p) for name in names]


class GeluParams(ctypes.Structure):
    """`ClipBiasQuickGeluParams` of kernels/elementwise/elementwise.h, field by field; so the next ones."""

    _fields_ = [*_pointers("in", "bias", "out"), ("rows", ctypes.c_int64), ("width", ctypes.c_int32)]


class LayerNormParams(ctypes.Structure):
    """`ClipResidualLayerNormParams`."""

    _fields_ = [*_pointers("x", "delta", "bias", "scale", "shift", "sum_out", "out"), ("rows", ctypes.c_int64), ("width", ctypes.c_int32),
                ("epsilon", ctypes.c_float)]


class PatchesParams(ctypes.Structure):
    """`ClipExtractPatchesParams`."""

    _fields_ = [*_pointers("images", "out"), ("batch", ctypes.c_int64), ("resolution", ctypes.c_int32), ("patch_size", ctypes.c_int32),
                ("half", ctypes.c_int32)]


class EmbedParams(ctypes.Structure):
    """`ClipEmbedImageParams`."""

    _fields_ = [*_pointers("patches", "class_token", "positions", "scale_pre", "shift_pre", "scale_1", "shift_1", "x", "y"),
                ("batch", ctypes.c_int64), ("tokens", ctypes.c_int32), ("width", ctypes.c_int32), ("epsilon_pre", ctypes.c_float),
                ("epsilon_1", ctypes.c_float)]


PARAMS = {"bias_quick_gelu": GeluParams, "residual_layer_norm": LayerNormParams, "extract_patches": PatchesParams, "embed_image": EmbedParams}


@functools.cache
def _library() -> ctypes.CDLL:
    """The library with these kernels' signatures.  Raises UserError where it is not built or another version."""
    loaded = kernels.library()
    try:
        for name, params in PARAMS.items():
            launch, size = getattr(loaded, f"clip_{name}_launch"), getattr(loaded, f"clip_{name}_params_size")
            launch.argtypes, launch.restype = [ctypes.POINTER(params), ctypes.c_void_p], ctypes.c_int
            if size() != ctypes.sizeof(params):
                raise AttributeError(name)
    except AttributeError as problem:
        raise UserError(f"the library of kernels belongs to another version of clip_ttrt; {kernels.BUILD_IT}") from problem
    return loaded


def serves(x: torch.Tensor, most: int = LAYER_NORM_WIDTHS) -> bool:
    """Whether the kernels can take rows like these: built, CUDA, fp16, of a width that is a multiple of 8 and at most `most`, a GPU they run on."""
    if not (x.is_cuda and x.dtype == torch.half and x.dim() >= 1 and 0 < x.shape[-1] <= most and x.shape[-1] % WIDTH_STEP == 0):
        return False
    return kernels.serves_on(x.device)


def _rows(x: torch.Tensor, name: str, like: Optional[torch.Tensor] = None) -> torch.Tensor:
    """x, contiguous and 16-byte aligned.  Raises ValueError for anything but fp16 on a GPU (with `like`: of its shape and device)."""
    if not x.is_cuda or x.dtype != torch.half or x.dim() < 1:
        raise ValueError(f"{name} must be fp16 [.., width] on a GPU, not {x.dtype} {list(x.shape)} on {x.device}")
    if like is not None and (x.shape != like.shape or x.device != like.device):
        raise ValueError(f"{name} must be {list(like.shape)} on {like.device}, not {list(x.shape)} on {x.device}")
    return kernels.aligned(x)


def _constant(value: Optional[torch.Tensor], name: str, x: torch.Tensor, shape: Optional[tuple[int, ...]] = None) -> Optional[torch.Tensor]:
    """A contiguous, aligned fp32 [width], or of a given shape, beside x.  Raises ValueError for anything else."""
    shape = tuple(x.shape[-1:]) if shape is None else shape
    if value is None:
        return None
    if value.dtype != torch.float32 or value.shape != shape or value.device != x.device:
        raise ValueError(f"{name} must be fp32 {list(shape)} on {x.device}, not {value.dtype} {list(value.shape)} on {value.device}")
    return kernels.aligned(value)


def _launch(name: str, like: torch.Tensor, /, **fields) -> None:
    """Enqueue a launch with the fields of its struct, a tensor for a pointer, on the current stream of like's device."""
    params = PARAMS[name](**{field: value.data_ptr() if isinstance(value, torch.Tensor) else value for field, value in fields.items()})
    with torch.cuda.device(like.device):
        status = getattr(_library(), f"clip_{name}_launch")(ctypes.byref(params), torch.cuda.current_stream().cuda_stream)
    if status != 0:
        raise RuntimeError(f"the {name} kernel failed with CUDA error {status} for shape {list(like.shape)}")


def _check_width(x: torch.Tensor, most: int) -> None:
    if not 0 < x.shape[-1] <= most or x.shape[-1] % WIDTH_STEP != 0:
        raise ValueError(f"the width must be a multiple of {WIDTH_STEP} from {WIDTH_STEP} to {most}, not {x.shape[-1]}")


def _check_epsilon(epsilon: float) -> None:
    if not epsilon > 0:
        raise ValueError(f"epsilon must be above 0, not {epsilon}")


def bias_quick_gelu(x: torch.Tensor, bias: Optional[torch.Tensor]) -> torch.Tensor:
    """y·sigmoid(1.702·y) of y = x + bias, in fp32 inside: fp16 [.., W] and fp32 [W] or None, on a GPU -> fp16 [.., W], on the current stream.

    W is a multiple of 8 up to 65536.  Raises ValueError for other tensors, UserError without the library, RuntimeError
    where the launch fails.
    """
    x = _rows(x, "x")
    bias = _constant(bias, "bias", x)
    _check_width(x, GELU_WIDTHS)
    out = torch.empty_like(x)
    _launch("bias_quick_gelu", x, **{"in": x}, bias=bias, out=out, rows=x.numel() // x.shape[-1], width=x.shape[-1])
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
    _check_epsilon(epsilon)
    total = x if delta is None and bias is None else torch.empty_like(x)
    out = torch.empty_like(x)
    _launch("residual_layer_norm", x, x=x, delta=delta, bias=bias, scale=scale, shift=shift, sum_out=None if total is x else total, out=out,
            rows=x.numel() // x.shape[-1], width=x.shape[-1], epsilon=epsilon)
    return total, out


def extract_patches(images: torch.Tensor, size: int) -> torch.Tensor:
    """Cut images into patches, one row each: fp32 or fp16 [B, 3, R, R] on a GPU -> fp16 [B·(R/size)², 3·size²], on the current stream.

    Values in the order of a convolution's weight, as `ops.extract_patches_reference`; R is a multiple of `size`, which is
    even, and at most 4096.  Raises ValueError for other tensors, UserError without the library, RuntimeError where the
    launch fails.
    """
    if not images.is_cuda or images.dtype not in (torch.float32, torch.half) or images.dim() != 4 or images.shape[1] != 3:
        raise ValueError(f"images must be fp32 or fp16 [batch, 3, resolution, resolution] on a GPU, not {images.dtype} {list(images.shape)} on {images.device}")
    batch, _, height, width = images.shape
    if height != width or height > MAX_RESOLUTION or size < 2 or size % 2 or height == 0 or height % size:
        raise ValueError(f"images of {height} x {width} cannot be cut into patches of {size}: the size must be even and divide the resolution")
    images = kernels.aligned(images)
    out = torch.empty((batch * (height // size) ** 2, 3 * size * size), dtype=torch.half, device=images.device)
    _launch("extract_patches", images, images=images, out=out, batch=batch, resolution=height, patch_size=size, half=int(images.dtype == torch.half))
    return out


def embed_image(patches: torch.Tensor, class_token: torch.Tensor, positions: torch.Tensor, scale_pre: torch.Tensor, shift_pre: torch.Tensor,
                scale_1: torch.Tensor, shift_1: torch.Tensor, epsilon_pre: float, epsilon_1: float) -> tuple[torch.Tensor, torch.Tensor]:
    """The first rows of an image encoder, on the current stream, with fp32 inside.

    patches: fp16 [B·(T-1), W] on a GPU; class_token, scales and shifts: fp32 [W]; positions: fp32 [T, W]; W is a multiple
    of 8 up to 8192.  Returns (x, y), fp16 [B·T, W] each: x is the layer norm (epsilon_pre, scale_pre, shift_pre) of the
    class token and an image's patches plus positions, y the layer norm (epsilon_1, scale_1, shift_1) of x as rounded to
    fp16.  Raises ValueError for other tensors, UserError without the library, RuntimeError where the launch fails.
    """
    patches = _rows(patches, "patches")
    tokens = positions.shape[0] if positions.dim() == 2 else 0
    if patches.dim() != 2 or tokens < 2 or patches.shape[0] % (tokens - 1) != 0:
        raise ValueError(f"patches must be [batch * (tokens - 1), width] with positions [tokens, width], not {list(patches.shape)} with {list(positions.shape)}")
    _check_width(patches, LAYER_NORM_WIDTHS)
    _check_epsilon(epsilon_pre)
    _check_epsilon(epsilon_1)
    width = patches.shape[1]
    given = {"class_token": class_token, "scale_pre": scale_pre, "shift_pre": shift_pre, "scale_1": scale_1, "shift_1": shift_1}
    constants = {name: _constant(value, name, patches) for name, value in given.items()}
    constants["positions"] = _constant(positions, "positions", patches, (tokens, width))
    batch = patches.shape[0] // (tokens - 1)
    x = patches.new_empty((batch * tokens, width))
    y = torch.empty_like(x)
    _launch("embed_image", patches, patches=patches, x=x, y=y, batch=batch, tokens=tokens, width=width, epsilon_pre=epsilon_pre, epsilon_1=epsilon_1,
            **constants)
    return x, y
