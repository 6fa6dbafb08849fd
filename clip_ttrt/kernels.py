"""The library of fused kernels (`kernels/`): where it is, its plugins, its launchers for PyTorch.

`python -m clip_ttrt.build_kernels` builds it, one file for each major version of TensorRT, into
`clip_ttrt/lib/` or the user's cache folder.  Everything works without it, through TensorRT's own
layers.  Nothing here imports TensorRT.
"""
import ctypes
import errno
import functools
import hashlib
import importlib.util
import os
import re
import warnings
import weakref
from dataclasses import dataclass
from pathlib import Path
from typing import Optional

import numpy as np
import torch

from clip_ttrt import stack
from clip_ttrt.errors import UserError

PACKAGE = Path(__file__).parent
BUILD_IT = "build it with `python -m clip_ttrt.build_kernels`"
# As kernels/*/*_plugin.cpp register them, all under the library's version.
ATTENTION, LINEAR, BIAS_GELU = "ClipAttention", "ClipLinear", "ClipBiasGelu"
RESIDUAL_LAYER_NORM, EXTRACT_PATCHES = "ClipResidualLayerNorm", "ClipExtractPatches"
EMBED_IMAGE = "ClipEmbedImage"
GELUS = "quick", "tanh", "none"  # elementwise.h numbers them

ABOUT = re.compile(  # kernels/library.cpp
    rb"clip_ttrt kernels: version=([0-9a-f]{12}) architectures=([0-9a ]*) tensorrt=(\d+);"
)
tensorrt_major = functools.cache(stack.tensorrt_major)  # which takes milliseconds
PTX = "120"  # the architecture that comes as PTX too, which later GPUs compile


def struct(pointers: str, int64: str, int32: str = "", float32: str = "") -> type:
    """A struct of the kernels' headers, which have their fields in this order."""
    types = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32, ctypes.c_float
    names = pointers, int64, int32, float32
    fields = [(name, kind) for kind, some in zip(types, names) for name in some.split()]
    return type("Params", (ctypes.Structure,), {"_fields_": fields})


PARAMS = {  # launcher clip_*_launch -> its struct
    "attention": struct("qkv out query_bias", "batch", "heads tokens head_dim causal variant",
                        "out_scale"),
    "bias_gelu": struct("in bias out", "rows", "width approximate", "out_scale"),
    "residual_layer_norm": struct(
        "x delta bias scale shift sum_out out", "rows", "width", "epsilon out_scale"
    ),
    "extract_patches": struct("images out", "batch", "resolution patch_size half"),
    "embed_image": struct(
        "patches class_token positions scale_pre shift_pre scale_1 shift_1 x y",
        "batch", "tokens width", "epsilon_pre epsilon_1 out_scale",
    ),
    "linear": struct("layer x weight bias out workspace", "rows"),
    "preprocess": struct(
        "pictures tables values workspace out", "batch most_lines", "resolution value_bytes"
    ),
}  # fmt: skip
PICTURE = struct(  # ClipPreprocessPicture, of which preprocess takes an array
    "pixels", "along across channel first second between lines channels vertical"
)
FILES = struct(  # ClipFilesParams
    "paths offsets sizes errors buffer", "count most capacity", "threads"
)
NOT_REGULAR, BEYOND_END = -1, -2  # among its errors, where errno has no word
FILE_THREADS = 4  # that read a batch
KEPT = 1 << 28  # bytes: smaller buffers are used again, for fresh pages cost more than reading
_idle: list[np.ndarray] = []
JPEG_FILE = struct(  # ClipJpegFile, of which the calls of jpeg.h take an array
    "data pixels", "size route height width channels hash written"
)


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


def source_files() -> list[str]:
    """What is compiled or included, by its name in `sources()`."""
    folder, endings = sources(), (".cpp", ".cu", ".cuh", ".h")
    found = (path for path in folder.rglob("*") if path.suffix in endings)
    return sorted(path.relative_to(folder).as_posix() for path in found)


@functools.cache
def version() -> str:
    """Of a library of these sources: 12 digits of a SHA-256 over their names and bytes."""
    digest = hashlib.sha256()
    for name in source_files():
        content = (sources() / name).read_bytes()
        digest.update(f"{name}\0{len(content)}\0".encode() + content)
    return digest.hexdigest()[:12]


def cache() -> Path:
    """The folder for libraries where the package's own cannot be written."""
    root = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(root, "clip_ttrt", "kernels")


def folders() -> tuple[Path, Path]:
    """Where libraries are, the first before the second."""
    return PACKAGE / "lib", cache()


def file_name(tensorrt_major: int) -> str:
    """The library's for a major version of TensorRT; 0: without plugins."""
    return f"libclip_ttrt_kernels-trt{tensorrt_major}.so"


def read(path: Path) -> Library:
    """What a library's file tells about itself, without loading it."""
    about = ABOUT.search(path.read_bytes())
    if about is None:
        return Library(path, "unknown", (), 0)
    digits, architectures, major = (part.decode() for part in about.groups())
    return Library(path, digits, tuple(architectures.split()), int(major))


def find() -> Optional[Library]:
    """The library that serves here, else one that is stale; None where none is built.

    That of the installed TensorRT's major version comes first, in the package before the cache;
    any other serves for the PyTorch ops.
    """
    found = [read(path) for one in folders() for path in sorted(one.glob(file_name("*")))]
    here = tensorrt_major(), version()
    fit = {one: (one.tensorrt_major == here[0], one.version == here[1]) for one in found}
    return max(fit, key=fit.get, default=None)


def runs_on(architectures: tuple[str, ...], capability: tuple[int, int]) -> bool:
    """Whether code for these architectures runs on a GPU of a compute capability."""

    def covers(architecture: str) -> bool:
        own, only = divmod(int(architecture.rstrip("a")), 10), architecture.endswith("a")
        return own == capability or not only and own[0] == capability[0] and own <= capability

    return any(map(covers, architectures)) or PTX in architectures and capability >= (12, 0)


def _not_current(found: Optional[Library]) -> Optional[str]:
    """Why no kernel can run, whatever calls it; None where that is not so."""
    if found is None:
        return f"{file_name(tensorrt_major() or 0)} is not built; {BUILD_IT}"
    if found.version == version():
        return None
    differ = f"its version is {found.version}, that of the sources {version()}"
    return f"{found.path.name} is stale: {differ}; {BUILD_IT}"


@functools.cache
def library() -> ctypes.CDLL:
    """The loaded library.  Raises UserError where it is not built, stale, or cannot be loaded."""
    found = find()
    if problem := _not_current(found):
        raise UserError(problem)
    try:
        loaded = ctypes.CDLL(str(found.path))
        for text in (loaded.clip_ttrt_version, loaded.clip_ttrt_architectures):
            text.restype = ctypes.c_char_p
        loaded.clip_linear_version.restype = ctypes.c_uint64
        told = loaded.clip_ttrt_version().decode()
    except (OSError, AttributeError) as problem:
        raise UserError(f"{found.path.name} cannot be loaded ({problem}); {BUILD_IT}") from problem
    if told != version():
        raise UserError(f"{found.path.name} belongs to another version of clip_ttrt; {BUILD_IT}")
    return loaded


def available() -> bool:
    """Whether a library is there and current, if perhaps for another GPU or TensorRT."""
    return bool(library.cache_info().currsize) or _not_current(find()) is None


def obstacle() -> Optional[str]:
    """Why no engine can have the fused kernels here, with the remedy; None where one can."""
    found = find()
    if problem := _not_current(found):
        return problem
    name, theirs, major = found.path.name, found.tensorrt_major, tensorrt_major()
    if theirs == 0:
        return f"{name} has no plugins, built without TensorRT's headers; {BUILD_IT}"
    if major not in (None, theirs):
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
    """Register the plugins that are built, for engines that plain `torch.jit.load` brings in.

    TensorRT's runtime must be loaded by then.  What cannot be registered is a warning.
    """
    if available():
        try:
            load(version())
        except UserError as problem:
            told = f"engines that need the fused kernels will not load: {problem}"
            warnings.warn(told, stacklevel=2)


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


# Files


@functools.cache
def reads_files() -> bool:
    """Whether `read_files` can be called here, for which no GPU is needed."""
    try:
        return library() is not None
    except UserError:
        return False


def read_files(
    names: bytes, offsets: np.ndarray, sizes: np.ndarray, most: int
) -> tuple[np.ndarray, np.ndarray]:
    """Regular files, or parts of them, read by a few threads that do not hold the GIL.

    names: one for each part, all with a NUL at the end.  offsets, sizes: int64 [N], in bytes; a
    size of -1 stands for those up to the end, and is replaced; above `most` it is an error.
    Returns uint8 [sum of sizes], all parts in order, and int32 [N], errors: 0, of errno,
    NOT_REGULAR or BEYOND_END.
    """
    paths, errors, asked = np.frombuffer(names, np.uint8), np.empty(len(sizes), np.int32), sizes * 1
    addresses = [each.ctypes.data for each in (paths, offsets, sizes, errors)]
    whole, status = _idle.pop() if _idle else np.empty(0, np.uint8), errno.ENOBUFS
    while status == errno.ENOBUFS:
        sizes[:] = asked
        params = FILES(*addresses, whole.ctypes.data, len(sizes), most, whole.size, FILE_THREADS)
        status = library().clip_files_read(ctypes.byref(params))
        if status == errno.ENOBUFS:
            whole = np.empty(int(sizes.sum() * 1.2), np.uint8)
    if status != 0:
        raise OSError(status, os.strerror(status))
    data = whole[: sizes.sum()]
    if whole.size <= KEPT:
        weakref.finalize(data, _idle.append, whole)  # once nothing refers to the data
    return data, errors


# In PyTorch


def aligned(x: torch.Tensor) -> torch.Tensor:
    """x, contiguous and 16-byte aligned, which the kernels need: a copy where it is not."""
    x = x.contiguous()
    return x if x.data_ptr() % 16 == 0 else x.clone()


def check(name: str, x: torch.Tensor, dtype: torch.dtype, shape, device: torch.device) -> None:
    """Raises ValueError for a tensor of another dtype, shape or device."""
    if (x.dtype, tuple(x.shape), x.device) != (dtype, tuple(shape), device):
        raise ValueError(
            f"{name} must be {dtype} {list(shape)} on {device}, "
            f"not {x.dtype} {list(x.shape)} on {x.device}"
        )


def succeed(status: int, what: str) -> None:
    """Raises RuntimeError for a status that is not 0: a CUDA error, or minus one of cuBLAS."""
    if status != 0:
        error = f"CUDA error {status}" if status > 0 else f"cuBLAS status {-status}"
        raise RuntimeError(f"{what} failed with {error}")


def launch(name: str, device: torch.device, **fields) -> None:
    """Enqueue a launcher of PARAMS on the current stream of a GPU.

    fields: of its struct; a tensor stands for its address, or for that of an aligned copy where
    its own does not serve, which an output's must.  Raises UserError without the library,
    RuntimeError where the launch fails.
    """
    tensors = {key: aligned(x) for key, x in fields.items() if isinstance(x, torch.Tensor)}
    sizes = {key: value for key, value in fields.items() if key not in tensors}
    params = PARAMS[name](**sizes, **{key: x.data_ptr() for key, x in tensors.items()})
    with torch.cuda.device(device):
        stream = ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)
        status = getattr(library(), f"clip_{name}_launch")(ctypes.byref(params), stream)
    shapes = ", ".join(f"{key} {list(x.shape)}" for key, x in tensors.items())
    succeed(status, f"the fused {name} kernel for {shapes}")


def attention(
    qkv: torch.Tensor, heads: int, causal: bool, query_bias: Optional[torch.Tensor] = None,
    out_scale: Optional[float] = None,
) -> torch.Tensor:  # fmt: skip
    """The fused kernel on a CUDA tensor, on the current stream.

    fp16 [B, T, 3·W] -> fp16 [B, T, W], W = heads · head dimension.  `query_bias`, fp32 [W] on the
    same device, is added to the queries (rounded to fp16, as in an fp16 linear layer).  With
    `out_scale` the result is float8_e4m3fn, divided by it and at most 448.  Raises ValueError for
    another bias, UserError without the library, RuntimeError where the launch fails.
    """
    batch, tokens, width = qkv.shape
    if query_bias is not None:
        check("query_bias", query_bias, torch.float32, (width // 3,), qkv.device)
    dtype = torch.float8_e4m3fn if out_scale else qkv.dtype
    out = qkv.new_empty((batch, tokens, width // 3), dtype=dtype)
    if batch > 0:
        launch("attention", qkv.device, qkv=qkv, out=out, query_bias=query_bias, batch=batch,
               heads=heads, tokens=tokens, head_dim=width // 3 // heads, causal=int(causal),
               out_scale=out_scale or 0)  # fmt: skip
    return out


def serves_on(device: torch.device) -> bool:
    """Whether the library can run its kernels on a GPU: there, current, and with code for it."""
    if not available():
        return False
    architectures = library().clip_ttrt_architectures().decode().split()
    return runs_on(tuple(architectures), torch.cuda.get_device_capability(device))


def serves(qkv: torch.Tensor, heads: int) -> bool:
    """Whether the fused attention takes this tensor: CUDA, fp16, sizes and a GPU that it has."""
    if not (qkv.is_cuda and qkv.dtype == torch.half and qkv.dim() == 3):
        return False
    if qkv.shape[2] % (3 * heads) or not serves_on(qkv.device):
        return False
    batch, tokens, width = max(1, qkv.shape[0]), *qkv.shape[1:]
    return attends(width // 3 // heads, batch, heads, tokens, qkv.device)


def attends(head_dim: int, batch: int = 1, heads: int = 1, tokens: int = 1, device=None) -> bool:
    """Whether the fused attention has heads of so many columns, and sizes, on a GPU."""
    supported, capability = library().clip_attention_supported, torch.cuda.get_device_capability
    return bool(supported(ctypes.c_int64(batch), heads, tokens, head_dim, *capability(device)))


# JPEG files


def nvimagecodec() -> Optional[Path]:
    """nvImageCodec's library in NVIDIA's wheel; None where that is not installed."""
    try:
        found = importlib.util.find_spec("nvidia.nvimgcodec")
    except ModuleNotFoundError:  # nor any other of NVIDIA's wheels
        return None
    return found and Path(found.origin).with_name("libnvimgcodec.so.0")


def load_jpeg_op() -> None:
    """torchvision's `decode_jpeg`, of its library alone: the package takes seconds to import."""
    for path in Path(importlib.util.find_spec("torchvision").origin).parent.glob("image*.so"):
        torch.ops.load_library(str(path))


class JpegDecoder:
    """nvImageCodec's decoder on the engines of a GPU, given by its number, or None: on the CPU.

    It serves one call at a time.  threads: of the CPU, that parse.  Raises UserError without the
    library or nvImageCodec, RuntimeError where that fails.
    """

    def __init__(self, device: Optional[int], threads: int):
        path, name = nvimagecodec(), "libjpeg_turbo_ext" if device is None else "libnvjpeg_ext"
        if path is None:
            raise UserError("nvImageCodec is missing; pip install 'clip_ttrt[embed-gpu]'")
        extension = next(path.parent.glob(f"extensions/{name}.so*"), path)
        create, error = library().clip_jpeg_create, ctypes.create_string_buffer(500)
        create.restype = ctypes.c_void_p
        self.handle = ctypes.c_void_p(create(
            os.fsencode(path), os.fsencode(extension), -1 if device is None else device, threads,
            error, len(error),
        ))  # fmt: skip
        if not self.handle:
            raise RuntimeError(f"nvImageCodec fails: {error.value.decode(errors='replace')}")
        weakref.finalize(self, library().clip_jpeg_destroy, self.handle).atexit = False

    def __call__(self, files, stream: Optional[int]) -> None:
        """Decode a NumPy array of JPEG_FILE, scanned, to its `pixels`, and set `written`.

        What the CUDA stream has been given before is waited for.  Raises RuntimeError.
        """
        decode, on = library().clip_jpeg_decode, ctypes.c_void_p(stream)
        status = decode(self.handle, files.ctypes, len(files), on)
        if status != 0:
            raise RuntimeError(f"decoding {len(files)} JPEGs failed with status {status}")
