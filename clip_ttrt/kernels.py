"""The library of fused kernels (`kernels/`): where it is, its plugins, its attention for PyTorch.

`python -m clip_ttrt.build_kernels` builds it, one file for each major version of TensorRT, into
`clip_ttrt/lib/` or the user's cache folder.  Everything works without it, through TensorRT's own
layers.  Nothing here imports TensorRT.
"""

import ctypes
import functools
import hashlib
import os
import re
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Callable, Optional

import torch

from clip_ttrt import stack
from clip_ttrt.errors import UserError

PACKAGE = Path(__file__).parent
BUILD_IT = "build it with `python -m clip_ttrt.build_kernels`"
# As kernels/*/*_plugin.cpp register them, all under the library's version.
ATTENTION, BIAS_QUICK_GELU, RESIDUAL_LAYER_NORM = (
    "ClipAttention",
    "ClipBiasQuickGelu",
    "ClipResidualLayerNorm",
)
EXTRACT_PATCHES, EMBED_IMAGE, LINEAR = "ClipExtractPatches", "ClipEmbedImage", "ClipLinear"

SOURCES = (".cpp", ".cu", ".cuh", ".h")  # what is compiled or included
ABOUT = re.compile(
    rb"clip_ttrt kernels: version=([0-9a-f]{12}) architectures=([0-9a ]*) tensorrt=(\d+);"
)  # kernels/library.cpp
PTX = "120"  # the architecture that comes as PTX too, which later GPUs compile


class AttentionParams(ctypes.Structure):
    """`ClipAttentionParams` of kernels/attention/attention.h, field by field."""

    _fields_ = [
        ("qkv", ctypes.c_void_p),
        ("out", ctypes.c_void_p),
        ("query_bias", ctypes.c_void_p),
        ("batch", ctypes.c_int64),
        ("heads", ctypes.c_int32),
        ("tokens", ctypes.c_int32),
        ("causal", ctypes.c_int32),
        ("variant", ctypes.c_int32),
    ]


@dataclass(frozen=True)
class Library:
    """A library as its file tells about itself."""

    path: Path
    version: str  # of the sources it is built from; "unknown" where it does not tell
    architectures: tuple[str, ...]  # such as ("80", "90a")
    tensorrt_major: int  # 0: without plugins


def sources() -> Path:
    """The folder of the kernels' sources: in an installed package, or beside it in a checkout."""
    installed = PACKAGE / "kernel_sources"
    return installed if installed.is_dir() else PACKAGE.parent / "kernels"


def source_files() -> list[Path]:
    """What is compiled or included, in the order in which it is hashed.

    Raises UserError where there is none.
    """
    folder = sources()
    found = sorted(
        (path for path in folder.rglob("*") if path.suffix in SOURCES),
        key=lambda path: path.relative_to(folder).as_posix(),
    )
    if not found:
        raise UserError(
            f"the kernels' sources are missing: {folder} holds none; install clip_ttrt again"
        )
    return found


@functools.cache
def version() -> str:
    """Of a library of these sources: 12 digits of a SHA-256 over their names and bytes."""
    digest = hashlib.sha256()
    for path in source_files():
        content = path.read_bytes()
        digest.update(
            f"{path.relative_to(sources()).as_posix()}\0{len(content)}\0".encode() + content
        )
    return digest.hexdigest()[:12]


def cache() -> Path:
    """The folder for libraries where the package's own cannot be written."""
    return Path(
        os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "clip_ttrt", "kernels"
    )


def folders() -> tuple[Path, Path]:
    """Where libraries are, the first before the second."""
    return PACKAGE / "lib", cache()


def file_name(tensorrt_major: int) -> str:
    """The library's for a major version of TensorRT; 0: without plugins."""
    return f"libclip_ttrt_kernels-trt{tensorrt_major}.so"


@functools.lru_cache(maxsize=16)
def _read(path: Path, modified: int, size: int) -> Library:
    try:
        about = ABOUT.search(path.read_bytes())
    except OSError:
        about = None
    if about is None:
        return Library(path, "unknown", (), 0)
    digits, architectures, major = (part.decode() for part in about.groups())
    return Library(path, digits, tuple(architectures.split()), int(major))


def read(path: Path) -> Library:
    """What a library's file tells about itself, without loading it."""
    status = path.stat()
    return _read(path, status.st_mtime_ns, status.st_size)


@functools.cache
def _asked_once(question: Callable[[], Optional[int]]) -> Optional[int]:
    return question()


def tensorrt_major() -> Optional[int]:
    """As `stack` tells it, which takes milliseconds."""
    return _asked_once(stack.tensorrt_major)


def find() -> Optional[Library]:
    """The library that serves here, else one that is stale; None where none is built.

    That of the installed TensorRT's major version comes first, in the package before the cache;
    any other serves for the PyTorch ops.
    """
    paths = (path for folder in folders() for path in sorted(folder.glob(file_name("*"))))
    rank = {}
    for one in map(read, paths):
        rank[one] = (one.tensorrt_major == tensorrt_major(), one.version == version())
    return max(rank, key=rank.get, default=None)


def runs_on(architectures: tuple[str, ...], capability: tuple[int, int]) -> bool:
    """Whether code for these architectures runs on a GPU of a compute capability."""

    def covers(architecture: str) -> bool:
        own = divmod(int(architecture.rstrip("a")), 10)
        if architecture.endswith("a"):
            return own == capability
        return own[0] == capability[0] and own[1] <= capability[1]

    return any(map(covers, architectures)) or PTX in architectures and capability >= (12, 0)


def _not_current(found: Optional[Library]) -> Optional[str]:
    """Why no kernel can run, whatever calls it; None where that is not so."""
    if found is None:
        return f"{file_name(tensorrt_major() or 0)} is not built; {BUILD_IT}"
    if found.version != version():
        return (
            f"{found.path.name} is stale: its version is {found.version}, "
            f"that of the sources {version()}; {BUILD_IT}"
        )
    return None


@functools.cache
def library() -> ctypes.CDLL:
    """The loaded library.  Raises UserError where it is not built, stale, or cannot be loaded."""
    found = find()
    if problem := _not_current(found):
        raise UserError(problem)
    try:
        loaded = ctypes.CDLL(str(found.path))
        loaded.clip_attention_launch.argtypes = [ctypes.POINTER(AttentionParams), ctypes.c_void_p]
        loaded.clip_attention_launch.restype = ctypes.c_int
        for text in (loaded.clip_ttrt_version, loaded.clip_ttrt_architectures):
            text.restype = ctypes.c_char_p
        loaded.clip_linear_version.restype = ctypes.c_uint64
        told = loaded.clip_ttrt_version().decode()
    except (OSError, AttributeError) as problem:
        raise UserError(f"{found.path.name} cannot be loaded ({problem}); {BUILD_IT}") from problem
    if told != version() or loaded.clip_attention_params_size() != ctypes.sizeof(AttentionParams):
        raise UserError(f"{found.path.name} belongs to another version of clip_ttrt; {BUILD_IT}")
    return loaded


def available() -> bool:
    """Whether a library is there and current.

    It may still be for another GPU or another TensorRT, or without plugins: `obstacle` tells.
    """
    if library.cache_info().currsize:
        return True
    return _not_current(find()) is None


def obstacle() -> Optional[str]:
    """Why no TensorRT engine can have the fused kernels here, a clause that ends in the remedy.

    None where one can.
    """
    found = find()
    if problem := _not_current(found):
        return problem
    name, major = found.path.name, tensorrt_major()
    if found.tensorrt_major == 0:
        return f"{name} has no plugins, built without TensorRT's headers; {BUILD_IT}"
    if major is not None and found.tensorrt_major != major:
        theirs = found.tensorrt_major
        return f"{name} is for TensorRT {theirs}, and TensorRT {major} is installed; {BUILD_IT}"
    if torch.cuda.is_available():
        capability = torch.cuda.get_device_capability()
        if not runs_on(found.architectures, capability):
            has = ", ".join(f"sm_{one}" for one in found.architectures)
            here = ".".join(map(str, capability))
            return f"{name} is for {has}, and this GPU's compute capability is {here}; {BUILD_IT}"
    try:
        if library().clip_linear_version() == 0:
            return "libcublasLt.so.13 is not found; install PyTorch's wheel of CUDA 13"
    except UserError as problem:
        return str(problem)
    return None


def register() -> None:
    """Register the plugins, for engines that plain `torch.jit.load` brings in.

    TensorRT's runtime must be loaded by then.  Nothing where the plugins are not built; what
    cannot be registered is a warning.
    """
    if available():
        try:
            load(version())
        except UserError as problem:
            warnings.warn(
                f"engines that need the fused kernels will not load: {problem}", stacklevel=2
            )


def load(needed: Optional[str]) -> None:
    """Load and register the plugins that an engine was built with; None: it needs none.

    TensorRT's runtime must be loaded by then.  Raises UserError where the plugins are missing, of
    another version, or not for this machine, before TensorRT deserialises the engine.
    """
    if needed is None:
        return
    if needed != version():
        raise UserError(
            f"this artifact needs version {needed} of the fused kernels, "
            f"and this is version {version()}; compile again"
        )
    if problem := obstacle():
        raise UserError(f"this artifact needs the fused kernels: {problem}")
    if library().clip_ttrt_register_plugins() != 1:
        raise UserError(
            f"TensorRT does not take the plugins of {find().path.name}, "
            f"or its runtime is not loaded; {BUILD_IT}"
        )


def aligned(x: torch.Tensor) -> torch.Tensor:
    """x, contiguous and 16-byte aligned, which the kernels need: a copy where it is not."""
    x = x.contiguous()
    return x if x.data_ptr() % 16 == 0 else x.clone()


def attention(
    qkv: torch.Tensor, heads: int, causal: bool, query_bias: Optional[torch.Tensor] = None
) -> torch.Tensor:
    """The fused kernel on a CUDA tensor, on the current stream.

    fp16 [B, T, 3·heads·64] -> fp16 [B, T, heads·64].  `query_bias`, fp32 [heads·64] on the same
    device, is added to the queries (rounded to fp16, as in an fp16 linear layer).  Raises
    ValueError for another bias, UserError without the library, RuntimeError where the launch fails.
    """
    qkv = aligned(qkv)
    if query_bias is not None:
        if (
            query_bias.dtype != torch.float32
            or query_bias.shape != (heads * 64,)
            or query_bias.device != qkv.device
        ):
            raise ValueError(
                f"query_bias must be fp32 [{heads * 64}] on {qkv.device}, not {query_bias.dtype} "
                f"{list(query_bias.shape)} on {query_bias.device}"
            )
        query_bias = aligned(query_bias)
    batch, tokens = qkv.shape[:2]
    out = qkv.new_empty((batch, tokens, qkv.shape[2] // 3))
    if batch == 0:
        return out
    bias_pointer = None if query_bias is None else query_bias.data_ptr()
    params = AttentionParams(
        qkv.data_ptr(), out.data_ptr(), bias_pointer, batch, heads, tokens, int(causal), 0
    )
    with torch.cuda.device(qkv.device):
        status = library().clip_attention_launch(
            ctypes.byref(params), torch.cuda.current_stream().cuda_stream
        )
    if status != 0:
        raise RuntimeError(
            f"the fused attention kernel failed with CUDA error {status} "
            f"for shape {list(qkv.shape)}, {heads} heads"
        )
    return out


@functools.cache
def _has_code_for(device: torch.device) -> bool:
    architectures = tuple(library().clip_ttrt_architectures().decode().split())
    return runs_on(architectures, torch.cuda.get_device_capability(device))


def serves_on(device: torch.device) -> bool:
    """Whether the library can run its kernels on a GPU: there, current, and with code for it."""
    return available() and _has_code_for(device)


def serves(qkv: torch.Tensor, heads: int) -> bool:
    """Whether the fused attention takes this tensor: CUDA, fp16, sizes and a GPU that it has."""
    if not (
        qkv.is_cuda
        and qkv.dtype == torch.half
        and qkv.dim() == 3
        and qkv.shape[2] == 3 * heads * 64
        and serves_on(qkv.device)
    ):
        return False
    major, minor = torch.cuda.get_device_capability(qkv.device)
    return bool(
        library().clip_attention_supported(
            ctypes.c_int64(max(1, qkv.shape[0])), heads, qkv.shape[1], 64, major, minor
        )
    )
