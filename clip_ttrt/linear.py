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
MAX_WIDTH, WORKSPACE_BYTES = 65536, 32 << 20
STEPS = {False: (8, 4), True: (16, 16)}  # of a weight's [outputs, inputs], fp16 and in E4M3
FP8_CAPABILITY = (8, 9)  # from which on GPUs multiply E4M3
E4M3 = torch.float8_e4m3fn
INVALID_VALUE = 1  # cudaErrorInvalidValue

# Weights that launches being measured take in turns: beyond any L2 cache, as a network's are.
WEIGHTS_BYTES = 128 << 20
TUNE_MILLISECONDS = 40.0

TuneParams = kernels.struct(
    "x weight bias out workspace", "rows",
    "inputs outputs weights quantized fast_accumulation", "milliseconds",
)  # fmt: skip


class Entry(ctypes.Structure):
    """`ClipLinearEntry`: the fastest algorithm for some rows."""

    _fields_ = [("rows", ctypes.c_int64), ("algorithm", ctypes.c_uint64 * 8)]


class Table(ctypes.Structure):
    """`ClipLinearTable`: a layer's sizes and the number of entries behind it."""

    _fields_ = [(name, ctypes.c_int32) for name in ("inputs", "outputs", "bias", "count")]
    _fields_ += [("version", ctypes.c_uint64), ("scale", ctypes.c_float)]


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


def takes(outputs: int, inputs: int, quantized: bool = False) -> bool:
    """Whether the library has linear layers with a weight [outputs, inputs], fp16 or E4M3."""
    sizes = zip((outputs, inputs), STEPS[quantized])
    return all(0 < size <= MAX_WIDTH and size % step == 0 for size, step in sizes)


def measured_batches(batch: BatchRange) -> list[int]:
    """Batch sizes to measure for an engine: the range's own three, and powers of two between."""
    powers = (2**i for i in range(batch.maximum.bit_length()))
    between = (size for size in powers if batch.minimum < size < batch.maximum)
    return sorted({batch.minimum, batch.optimal, batch.maximum, *between})


def pack(
    outputs: int, inputs: int, bias: bool, entries: Sequence[Entry] = (), measured_with: int = 0,
    scale: float = 0.0,
) -> bytes:  # fmt: skip
    """A layer's table: its sizes, and the entries that the cuBLASLt of a version measured.

    scale: 0 where x and weight are fp16; above 0 they are E4M3, and their product is multiplied by
    it.  Raises ValueError for sizes that no layer has.
    """
    if not takes(outputs, inputs, scale > 0):
        of = " and ".join(map(str, STEPS[scale > 0]))
        raise ValueError(
            f"no linear layer here has a weight of [{outputs}, {inputs}]: its sizes are multiples "
            f"of {of}, each at most {MAX_WIDTH}"
        )
    about = Table(inputs, outputs, int(bias), len(entries), measured_with, scale)
    return b"".join(map(bytes, (about, *entries)))


def with_scale(table: bytes, scale: float) -> bytes:
    """The table of a layer in E4M3, such as `tune` measures, for another scale."""
    about = Table.from_buffer_copy(table)
    about.scale = scale
    return bytes(about) + table[ctypes.sizeof(Table) :]


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
    table: Optional[bytes] = None, scale: Optional[float] = None,
) -> torch.Tensor:  # fmt: skip
    """x·weightᵀ + bias: fp16 [.., K] and [N, K] and [N] or None, on a GPU -> fp16 [.., N].

    With a scale x and weight are float8_e4m3fn, and their product is multiplied by it.  Summed in
    fp32 (of E4M3 with cuBLASLt's fast accumulation), on the current stream.  table: of `tune`,
    whatever its own scale; without one cuBLASLt's own first suggestion runs.  Raises ValueError for
    other tensors or a table of another layer, UserError without the library or cuBLASLt,
    RuntimeError where the launch fails.
    """
    if weight.dim() != 2 or x.dim() < 1 or not weight.is_cuda:
        raise ValueError(
            f"linear takes x [.., K] and a weight [N, K] on a GPU, not {list(x.shape)} and "
            f"{list(weight.shape)} on {weight.device}"
        )
    (outputs, inputs), device = weight.shape, weight.device
    dtype = E4M3 if scale else torch.half
    kernels.check("weight", weight, dtype, weight.shape, device)
    kernels.check("x", x, dtype, (*x.shape[:-1], inputs), device)
    if bias is not None:
        kernels.check("bias", bias, torch.half, (outputs,), device)
    own = pack(outputs, inputs, bias is not None, scale=scale or 0.0)
    if table is not None:
        count, scaled = Table.count.offset, Table.from_buffer_copy(table).scale > 0
        if table[:count] != own[:count] or scaled != bool(scale):
            raise ValueError(f"these {len(table)} bytes are no table of this linear layer")
        own = with_scale(table, scale) if scale else table
    out = x.new_empty((*x.shape[:-1], outputs), dtype=torch.half)
    layer = _layer(own)
    kernels.launch(
        "linear", device, layer=layer.pointer, x=x, weight=weight, bias=bias,
        out=out, rows=out.numel() // outputs,
        workspace=torch.empty(WORKSPACE_BYTES, dtype=torch.uint8, device=device),
    )  # fmt: skip
    return out


def measure(
    rows: int, weight_shape: tuple[int, int], bias: bool, quantized: bool = False,
    fast_accumulation: bool = True,
) -> tuple[Entry, float]:  # fmt: skip
    """The fastest algorithm for some rows on this GPU, and a launch's microseconds; as `tune`.
    fast_accumulation: of the sums in E4M3, with which layers run."""
    outputs, inputs = weight_shape
    pack(outputs, inputs, bias, scale=float(quantized))
    version()
    weights = max(1, WEIGHTS_BYTES // ((1 if quantized else 2) * outputs * inputs))
    shapes = (rows, inputs), (weights, outputs, inputs), (outputs,), (rows, outputs)
    try:
        tensors = [torch.randn(shape, dtype=torch.half, device="cuda") for shape in shapes]
        if quantized:
            tensors[:2] = (tensor.to(E4M3) for tensor in tensors[:2])
        else:
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
        int(quantized), int(fast_accumulation), TUNE_MILLISECONDS,
    )  # fmt: skip
    entry, microseconds = Entry(), ctypes.c_float()
    torch.cuda.current_stream().synchronize()
    status = kernels.library().clip_linear_tune(*map(ctypes.byref, (params, entry, microseconds)))
    kernels.succeed(status, f"measuring a linear layer of [{outputs}, {inputs}] for {rows} rows")
    return entry, microseconds.value


def tune(
    rows: Sequence[int], weight_shape: tuple[int, int], bias: bool, quantized: bool = False
) -> bytes:
    """The table of a layer with a weight [N, K], measured on the current GPU for some row counts.

    quantized: x and weight are E4M3, and the table's scale is 1; `with_scale` gives it another.
    Raises ValueError for sizes outside the kernels', UserError without library, cuBLASLt or GPU
    memory, RuntimeError where cuBLASLt or CUDA fail.
    """
    entries = [measure(count, weight_shape, bias, quantized)[0] for count in sorted(set(rows))]
    return pack(*weight_shape, bias, entries, version(), float(quantized))
