"""Linear layers of the library (`kernels/linear/`) for PyTorch and for the compiler: cuBLASLt, with algorithms measured for the rows to come."""
import ctypes
import functools
import weakref
from typing import Optional, Sequence

import torch

from clip_ttrt import kernels
from clip_ttrt.errors import UserError
from clip_ttrt.options import BatchRange

# As kernels/linear/linear.h.
INPUTS_STEP, OUTPUTS_STEP, MAX_WIDTH, MAX_ROWS, MAX_ENTRIES, WORKSPACE_BYTES, NO_LIBRARY = 4, 8, 65536, 2**31 - 1, 64, 32 << 20, -1000
INVALID_VALUE = 1  # cudaErrorInvalidValue
LARGEST_HALF = torch.finfo(torch.half).max

# Weights that launches being measured take in turns: beyond any L2 cache, as the layers of a network together are.
WEIGHTS_BYTES = 128 << 20
TUNE_MILLISECONDS = 40.0


class LinearParams(ctypes.Structure):
    """`ClipLinearParams` of kernels/linear/linear.h, field by field; so the next ones."""

    _fields_ = [*((name, ctypes.c_void_p) for name in ("layer", "x", "weight", "bias", "out", "workspace")), ("rows", ctypes.c_int64)]


class TuneParams(ctypes.Structure):
    """`ClipLinearTuneParams`."""

    _fields_ = [*((name, ctypes.c_void_p) for name in ("x", "weight", "bias", "out", "workspace")), ("rows", ctypes.c_int64),
                *((name, ctypes.c_int32) for name in ("inputs", "outputs", "weights")), ("milliseconds", ctypes.c_float)]


class Entry(ctypes.Structure):
    """`ClipLinearEntry`."""

    _fields_ = [("rows", ctypes.c_int64), ("algorithm", ctypes.c_uint64 * 8)]


class Table(ctypes.Structure):
    """`ClipLinearTable`."""

    _fields_ = [*((name, ctypes.c_int32) for name in ("inputs", "outputs", "bias", "count")), ("version", ctypes.c_uint64)]


STRUCTS = {"params": LinearParams, "tune_params": TuneParams, "table": Table, "entry": Entry}


@functools.cache
def _library() -> ctypes.CDLL:
    """The library with these functions' signatures.  Raises UserError where it is not built or another version."""
    loaded = kernels.library()
    try:
        for name, kind in STRUCTS.items():
            if getattr(loaded, f"clip_linear_{name}_size")() != ctypes.sizeof(kind):
                raise AttributeError(name)
        loaded.clip_linear_create.argtypes = [ctypes.c_char_p, ctypes.c_int64, ctypes.POINTER(ctypes.c_void_p)]
        loaded.clip_linear_destroy.argtypes, loaded.clip_linear_destroy.restype = [ctypes.c_void_p], None
        loaded.clip_linear_launch.argtypes = [ctypes.POINTER(LinearParams), ctypes.c_void_p]
        loaded.clip_linear_tune.argtypes = [ctypes.POINTER(TuneParams), ctypes.POINTER(Entry), ctypes.POINTER(ctypes.c_float)]
    except AttributeError as problem:
        raise UserError(f"the library of kernels belongs to another version of clip_ttrt; {kernels.BUILD_IT}") from problem
    return loaded


def version() -> int:
    """cuBLASLt's version, such as 130100.  Raises UserError where there is none, or no library of kernels."""
    found = _library().clip_linear_version()
    if found == 0:
        raise UserError("linear layers need cuBLASLt, and libcublasLt.so.13 is not found; install PyTorch's wheel of CUDA 13, which brings it")
    return found


def version_text() -> str:
    """As `version`, such as "13.1.0"."""
    found = version()
    return f"{found // 10000}.{found // 100 % 100}.{found % 100}"


def _check(status: int, what: str) -> None:
    """Raises what a status of linear.h means, if it is not 0."""
    if status == NO_LIBRARY:
        version()
    if status != 0:
        raise RuntimeError(f"{what} failed with {f'CUDA error {status}' if status > 0 else f'cuBLAS status {-status}'}")


def takes(outputs: int, inputs: int) -> bool:
    """Whether the library has linear layers with a weight [outputs, inputs]."""
    return 0 < inputs <= MAX_WIDTH and inputs % INPUTS_STEP == 0 and 0 < outputs <= MAX_WIDTH and outputs % OUTPUTS_STEP == 0


def measured_batches(batch: BatchRange) -> list[int]:
    """The batch sizes that an engine's linear layers are measured for: the range's own three, and the powers of two between."""
    powers = (2**i for i in range(batch.maximum.bit_length()))
    return sorted({batch.minimum, batch.optimal, batch.maximum, *(size for size in powers if batch.minimum < size < batch.maximum)})


def pack(outputs: int, inputs: int, bias: bool, entries: Sequence[Entry] = (), measured_with: int = 0) -> bytes:
    """A layer's table of bytes: its sizes, and entries that the cuBLASLt of a version measured.  Raises ValueError for sizes no layer has."""
    if not takes(outputs, inputs):
        raise ValueError(f"a weight of [{outputs}, {inputs}] is none of a linear layer here: it is [multiple of {OUTPUTS_STEP}, multiple of {INPUTS_STEP}], "
                         f"each at most {MAX_WIDTH}")
    if len(entries) > MAX_ENTRIES:
        raise ValueError(f"a table holds at most {MAX_ENTRIES} entries, not {len(entries)}")
    return bytes(Table(inputs, outputs, int(bias), len(entries), measured_with)) + b"".join(bytes(entry) for entry in entries)


def unpack(table: bytes) -> tuple[Table, list[Entry]]:
    """A table's sizes and entries.  Raises ValueError for bytes that are no table."""
    about = Table.from_buffer_copy(table) if len(table) >= ctypes.sizeof(Table) else Table(count=-1)
    if about.count < 0 or len(table) != ctypes.sizeof(Table) + about.count * ctypes.sizeof(Entry):
        raise ValueError(f"{len(table)} bytes are no table of a linear layer")
    return about, [Entry.from_buffer_copy(table, ctypes.sizeof(Table) + i * ctypes.sizeof(Entry)) for i in range(about.count)]


class _Layer:
    """A layer of the library for a table, destroyed with this object.  Raises ValueError for bytes that are no table."""

    def __init__(self, table: bytes):
        self.pointer = ctypes.c_void_p()
        status = _library().clip_linear_create(table, len(table), ctypes.byref(self.pointer))
        if status == INVALID_VALUE:
            raise ValueError(f"these {len(table)} bytes are no table of a linear layer")
        _check(status, "making a linear layer")
        weakref.finalize(self, _library().clip_linear_destroy, self.pointer).atexit = False


@functools.lru_cache(maxsize=256)
def _layer(table: bytes) -> _Layer:
    """The layer of a table, with the algorithms that it remembers.  One that makes room for others lives on until its last launch returns."""
    return _Layer(table)


def _half(x: torch.Tensor, name: str, shape: tuple[int, ...], device: torch.device) -> torch.Tensor:
    """A contiguous, aligned tensor.  Raises ValueError for anything but fp16 of this shape on this device, a GPU."""
    if device.type != "cuda" or x.device != device or x.dtype != torch.half or tuple(x.shape) != shape:
        raise ValueError(f"{name} must be fp16 {list(shape)} on a GPU beside the weight, not {x.dtype} {list(x.shape)} on {x.device}")
    return kernels.aligned(x)


def linear(x: torch.Tensor, weight: torch.Tensor, bias: Optional[torch.Tensor] = None, table: Optional[bytes] = None) -> torch.Tensor:
    """x·weightᵀ + bias: fp16 [.., K] and [N, K] and [N] or None, on a GPU -> fp16 [.., N], summed in fp32, on the current stream.

    table: of `tune`; without one cuBLASLt's own first suggestion runs.  Raises ValueError for other tensors or a table of
    other sizes, UserError without the library or cuBLASLt, RuntimeError where the launch fails.
    """
    if weight.dim() != 2 or x.dim() < 1:
        raise ValueError(f"linear takes x [.., K] and a weight [N, K], not {list(x.shape)} and {list(weight.shape)}")
    outputs, inputs = weight.shape
    weight = _half(weight, "weight", (outputs, inputs), weight.device)
    x = _half(x, "x", (*x.shape[:-1], inputs), weight.device)
    bias = None if bias is None else _half(bias, "bias", (outputs,), weight.device)
    sizes = pack(outputs, inputs, bias is not None)
    if table is None:
        table = sizes
    else:
        about, _ = unpack(table)
        if (about.outputs, about.inputs, about.bias) != (outputs, inputs, int(bias is not None)):
            raise ValueError(f"the table is of a weight [{about.outputs}, {about.inputs}] {'with' if about.bias else 'without'} bias, not of this layer")
    out = x.new_empty((*x.shape[:-1], outputs))
    workspace = torch.empty(WORKSPACE_BYTES, dtype=torch.uint8, device=x.device)
    layer = _layer(table)
    params = LinearParams(layer.pointer, x.data_ptr(), weight.data_ptr(), None if bias is None else bias.data_ptr(), out.data_ptr(),
                          workspace.data_ptr(), out.numel() // outputs)
    with torch.cuda.device(x.device):
        status = _library().clip_linear_launch(ctypes.byref(params), torch.cuda.current_stream().cuda_stream)
    _check(status, f"the linear layer for x {list(x.shape)} and weight {list(weight.shape)}")
    return out


def measure(rows: int, weight_shape: tuple[int, int], bias: bool) -> tuple[Entry, float]:
    """The fastest algorithm for one number of rows on the current GPU, and the microseconds of a launch; as `tune` otherwise."""
    outputs, inputs = weight_shape
    pack(outputs, inputs, bias)
    if not 1 <= rows <= MAX_ROWS:
        raise ValueError(f"a linear layer is measured for 1 to {MAX_ROWS} rows, not {rows}")
    version()
    weights = max(1, WEIGHTS_BYTES // (2 * outputs * inputs))
    try:
        x, weight, given_bias = (torch.randn(size, dtype=torch.half, device="cuda") for size in ((rows, inputs), (weights, outputs, inputs), (outputs,)))
        weight *= inputs ** -0.5
        out = torch.empty((rows, outputs), dtype=torch.half, device="cuda")
        workspace = torch.empty(WORKSPACE_BYTES, dtype=torch.uint8, device="cuda")
    except torch.cuda.OutOfMemoryError as problem:
        raise UserError(f"out of GPU memory while a linear layer was measured for {rows} rows; use a smaller batch or free the GPU") from problem
    params = TuneParams(x.data_ptr(), weight.data_ptr(), given_bias.data_ptr() if bias else None, out.data_ptr(), workspace.data_ptr(), rows, inputs, outputs,
                        weights, TUNE_MILLISECONDS)
    entry, microseconds = Entry(), ctypes.c_float()
    torch.cuda.current_stream().synchronize()
    _check(_library().clip_linear_tune(ctypes.byref(params), ctypes.byref(entry), ctypes.byref(microseconds)),
           f"measuring a linear layer for {rows} rows and a weight [{outputs}, {inputs}]")
    return entry, microseconds.value


def tune(rows: Sequence[int], weight_shape: tuple[int, int], bias: bool) -> bytes:
    """The table of a layer with a weight [N, K], measured on the current GPU, with random data, for each number of rows.

    Raises ValueError for sizes outside the kernels', UserError without library, cuBLASLt or GPU memory, RuntimeError where
    cuBLASLt or CUDA fail.
    """
    entries = [measure(count, weight_shape, bias)[0] for count in sorted(set(rows))]
    return pack(*weight_shape, bias, entries, version())
