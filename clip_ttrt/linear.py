"""Linear layers through cuBLASLt (`kernels/linear/`), with algorithms measured for rows to come."""
import ctypes
import functools
import weakref
from typing import Optional, Sequence

import torch

from clip_ttrt import kernels
from clip_ttrt.errors import UserError
from clip_ttrt.options import BatchRange

# As kernels/linear/linear.h.
INPUTS_STEP, OUTPUTS_STEP, MAX_WIDTH, WORKSPACE_BYTES = 4, 8, 65536, 32 << 20
INVALID_VALUE = 1  # cudaErrorInvalidValue

# Weights that launches being measured take in turns: beyond any L2 cache, as a network's are.
WEIGHTS_BYTES = 128 << 20
TUNE_MILLISECONDS = 40.0

TuneParams = kernels.struct(
    "x weight bias out workspace", "rows", "inputs outputs weights", "milliseconds"
)


class Entry(ctypes.Structure):
    """`ClipLinearEntry`: the fastest algorithm for some rows."""

    _fields_ = [("rows", ctypes.c_int64), ("algorithm", ctypes.c_uint64 * 8)]


class Table(ctypes.Structure):
    """`ClipLinearTable`: a layer's sizes and the number of entries behind it."""

    _fields_ = [(name, ctypes.c_int32) for name in ("inputs", "outputs", "bias", "count")]
    _fields_ += [("version", ctypes.c_uint64)]


def version() -> int:
    """cuBLASLt's version, such as 130100.  Raises UserError where it or the library is missing."""
    found = kernels.library().clip_linear_version()
    if found == 0:
        raise UserError(
            "linear layers need cuBLASLt, and libcublasLt.so.13 is not found; "
            "install PyTorch's wheel of CUDA 13, which brings it"
        )
    return found


def version_text() -> str:
    """As `version`, such as "13.1.0"."""
    found = version()
    return f"{found // 10000}.{found // 100 % 100}.{found % 100}"


def takes(outputs: int, inputs: int) -> bool:
    """Whether the library has linear layers with a weight [outputs, inputs]."""
    steps = (outputs, OUTPUTS_STEP), (inputs, INPUTS_STEP)
    return all(0 < size <= MAX_WIDTH and size % step == 0 for size, step in steps)


def measured_batches(batch: BatchRange) -> list[int]:
    """Batch sizes to measure for an engine: the range's own three, and powers of two between."""
    powers = (2**i for i in range(batch.maximum.bit_length()))
    between = (size for size in powers if batch.minimum < size < batch.maximum)
    return sorted({batch.minimum, batch.optimal, batch.maximum, *between})


def pack(
    outputs: int, inputs: int, bias: bool, entries: Sequence[Entry] = (), measured_with: int = 0
) -> bytes:
    """A layer's table: its sizes, and the entries that the cuBLASLt of a version measured.

    Raises ValueError for sizes that no layer has.
    """
    if not takes(outputs, inputs):
        raise ValueError(
            f"no linear layer here has a weight of [{outputs}, {inputs}]: its sizes are multiples "
            f"of {OUTPUTS_STEP} and {INPUTS_STEP}, each at most {MAX_WIDTH}"
        )
    about = Table(inputs, outputs, int(bias), len(entries), measured_with)
    return b"".join(map(bytes, (about, *entries)))


class _Layer:
    """A layer of the library for a table, destroyed with it.  ValueError for other bytes."""

    def __init__(self, table: bytes):
        version()
        library, self.pointer = kernels.library(), ctypes.c_void_p()
        size = ctypes.c_int64(len(table))
        status = library.clip_linear_create(table, size, ctypes.byref(self.pointer))
        if status == INVALID_VALUE:
            raise ValueError(f"these {len(table)} bytes are no table of a linear layer")
        kernels.succeed(status, "creating a linear layer")
        weakref.finalize(self, library.clip_linear_destroy, self.pointer).atexit = False


# What makes room for others lives on until its last launch returns.
_layer = functools.lru_cache(maxsize=256)(_Layer)


def linear(
    x: torch.Tensor, weight: torch.Tensor, bias: Optional[torch.Tensor] = None,
    table: Optional[bytes] = None,
) -> torch.Tensor:  # fmt: skip
    """x·weightᵀ + bias: fp16 [.., K] and [N, K] and [N] or None, on a GPU -> fp16 [.., N].

    Summed in fp32, on the current stream.  table: of `tune`; without one cuBLASLt's own first
    suggestion runs.  Raises ValueError for other tensors or a table of other sizes, UserError
    without the library or cuBLASLt, RuntimeError where the launch fails.
    """
    if weight.dim() != 2 or x.dim() < 1 or not weight.is_cuda:
        raise ValueError(
            f"linear takes x [.., K] and a weight [N, K] on a GPU, not {list(x.shape)} and "
            f"{list(weight.shape)} on {weight.device}"
        )
    (outputs, inputs), device = weight.shape, weight.device
    kernels.check("weight", weight, torch.half, weight.shape, device)
    kernels.check("x", x, torch.half, (*x.shape[:-1], inputs), device)
    if bias is not None:
        kernels.check("bias", bias, torch.half, (outputs,), device)
    sizes = pack(outputs, inputs, bias is not None)
    count = Table.count.offset
    if table is not None and table[:count] != sizes[:count]:
        raise ValueError(f"these {len(table)} bytes are no table of this linear layer")
    out = x.new_empty((*x.shape[:-1], outputs))
    layer = _layer(sizes if table is None else table)
    kernels.launch(
        "linear", device, layer=layer.pointer, x=x, weight=weight, bias=bias,
        out=out, rows=out.numel() // outputs,
        workspace=torch.empty(WORKSPACE_BYTES, dtype=torch.uint8, device=device),
    )  # fmt: skip
    return out


def measure(rows: int, weight_shape: tuple[int, int], bias: bool) -> tuple[Entry, float]:
    """The fastest algorithm for some rows on this GPU, and a launch's microseconds; as `tune`."""
    outputs, inputs = weight_shape
    pack(outputs, inputs, bias)
    version()
    weights = max(1, WEIGHTS_BYTES // (2 * outputs * inputs))
    shapes = (rows, inputs), (weights, outputs, inputs), (outputs,), (rows, outputs)
    try:
        tensors = [torch.randn(shape, dtype=torch.half, device="cuda") for shape in shapes]
        tensors[1] *= inputs**-0.5
        tensors.append(torch.empty(WORKSPACE_BYTES, dtype=torch.uint8, device="cuda"))
    except torch.cuda.OutOfMemoryError as problem:
        raise UserError(
            f"out of GPU memory while a linear layer was measured for {rows} rows; "
            "use a smaller batch or free the GPU"
        ) from problem
    x, weight, bias_, out, workspace = (tensor.data_ptr() for tensor in tensors)
    params = TuneParams(
        x, weight, bias_ if bias else None, out, workspace, rows, inputs, outputs, weights,
        TUNE_MILLISECONDS,
    )  # fmt: skip
    entry, microseconds = Entry(), ctypes.c_float()
    torch.cuda.current_stream().synchronize()
    status = kernels.library().clip_linear_tune(*map(ctypes.byref, (params, entry, microseconds)))
    kernels.succeed(status, f"measuring a linear layer of [{outputs}, {inputs}] for {rows} rows")
    return entry, microseconds.value


def tune(rows: Sequence[int], weight_shape: tuple[int, int], bias: bool) -> bytes:
    """The table of a layer with a weight [N, K], measured on the current GPU for some row counts.

    Raises ValueError for sizes outside the kernels', UserError without library, cuBLASLt or GPU
    memory, RuntimeError where cuBLASLt or CUDA fail.
    """
    entries = [measure(count, weight_shape, bias)[0] for count in sorted(set(rows))]
    return pack(*weight_shape, bias, entries, version())
