"""Checks of the fused attention kernel against float64, beside PyTorch's own fp16 attention."""
import ctypes
import math
import time
from dataclasses import dataclass

from clip_ttrt import kernels

HEAD_DIM = 64
LIBRARY_BATCH = 2**15
Params = kernels.AttentionParams
BIAS_SEED = 10**6  # of the first bias; the inputs count from 0
CHECK_TOKENS = [1, 2, 15, 16, 17, 49, 50, 64, 65, 77, 128, 196, 197, 257, 320, 577, 1024]
# Lengths at which a head has fewer tiles than a block of the kernel has warps for them.
SKIPPING_TOKENS = [1, 7, 16, 17, 32, 33, 48, 60, 64, 70, 80, 81, 100, 128, 150, 190]


class Library:
    """The kernels' shared library, called through ctypes."""

    def __init__(self, path):
        self._library = library = ctypes.CDLL(str(path))
        library.clip_attention_launch.argtypes = [ctypes.POINTER(Params), ctypes.c_void_p]
        library.clip_attention_variant.argtypes = [ctypes.c_int32, ctypes.POINTER(ctypes.c_int32)]
        library.clip_attention_variant.restype = ctypes.c_char_p
        library.clip_attention_choose.argtypes = [ctypes.c_int64] + [ctypes.c_int32] * 6
        assert library.clip_attention_params_size() == ctypes.sizeof(Params)
        self.variants: dict[int, str] = {}
        variant = ctypes.c_int32()
        while name := library.clip_attention_variant(len(self.variants), ctypes.byref(variant)):
            self.variants[variant.value] = name.decode()

    def serves(self, variant: int, tokens: int, causal: bool, capability) -> bool:
        served = self._library.clip_attention_variant_serves
        return bool(served(variant, tokens, int(causal), *capability))

    def choose(self, batch, heads, tokens, causal, capability, multiprocessors) -> int:
        return self._library.clip_attention_choose(
            batch, heads, tokens, int(causal), *capability, multiprocessors
        )


@dataclass(frozen=True)
class Shape:
    batch: int
    heads: int
    tokens: int
    causal: bool


def check_shapes(full: bool) -> list[tuple[Shape, float]]:
    """Shapes and scales of inputs: the whole grid, or a part and some that fill the chip."""
    batches, heads = ([1, 3, 33], [1, 2, 8, 12, 16]) if full else ([1, 3], [1, 12])
    cases = [
        (Shape(b, h, t, c), s) for t in CHECK_TOKENS for c in (False, True)
        for b in batches for h in heads for s in (0.1, 1.0, 8.0)
    ]  # fmt: skip
    if not full:
        filling = [(t, c) for t in (50, 77, 197, 257, 577, 1024) for c in (False, True)]
        cases += [(Shape(33, 16, *one), 1.0) for one in filling]
        cases += [(Shape(33, 16, 257, False), 8.0)]
    return cases


def split(qkv, heads: int):
    """q, k, v as strided [B, H, T, 64] views of packed QKV."""
    return qkv.unflatten(2, (3, heads, HEAD_DIM)).permute(2, 0, 3, 1, 4).unbind(0)


def reference(torch, qkv, heads: int, causal: bool, bias=None):
    """Attention in float64, [B, T, W], the bias [W] added to q; in parts, to bound the memory."""
    tokens, width = qkv.shape[1], qkv.shape[2] // 3
    parts = []
    for part in qkv.split(max(1, int(2e8) // (heads * tokens * tokens))):
        q, k, v = split(part.double(), heads)
        if bias is not None:
            q = q + bias.double().view(heads, 1, HEAD_DIM)
        scores = q @ k.transpose(-1, -2) / math.sqrt(HEAD_DIM)
        if causal:
            hidden = torch.ones(tokens, tokens, dtype=torch.bool, device=qkv.device).triu(1)
            scores.masked_fill_(hidden, -math.inf)
        parts.append((scores.softmax(-1) @ v).transpose(1, 2).reshape(-1, tokens, width))
    return torch.cat(parts)


def pytorch_attention(torch, qkv, shape: Shape, bias=None):
    """PyTorch's fp16 attention, [B, T, W]; a bias is added as an fp16 linear layer would."""
    q, k, v = split(qkv, shape.heads)
    if bias is not None:
        q = q + bias.half().view(shape.heads, 1, HEAD_DIM)
    # In parts: PyTorch may not launch a batch beyond a CUDA grid's limit.
    parts = zip(*(tensor.split(LIBRARY_BATCH) for tensor in (q, k, v)))
    attend = torch.nn.functional.scaled_dot_product_attention
    out = torch.cat([attend(*part, is_causal=shape.causal) for part in parts])
    return out.transpose(1, 2).reshape(shape.batch, shape.tokens, -1)


def largest(torch, x) -> float:
    return float(x.abs().max()) if bool(torch.isfinite(x).all()) else math.inf


def run_guarded(torch, library, qkv, shape: Shape, variant: int, bias, exact):
    """(largest error, the same bits twice, nothing written beside the output)."""
    runs = []
    pointer = None if bias is None else bias.data_ptr()
    # Two rows of guard values before and behind the output: nothing may be written there.
    for poison in (math.nan, 77.0):
        size = (shape.batch * shape.tokens + 4, shape.heads * HEAD_DIM)
        whole = torch.full(size, poison, device="cuda").half()
        params = Params(qkv.data_ptr(), whole[2:].data_ptr(), pointer, shape.batch, shape.heads,
                        shape.tokens, int(shape.causal), variant)  # fmt: skip
        stream = torch.cuda.current_stream().cuda_stream
        status = library._library.clip_attention_launch(ctypes.byref(params), stream)
        assert status == 0, f"cudaError {status} for {shape}, variant {variant}"
        runs.append(whole)
    torch.cuda.synchronize()
    error = largest(torch, runs[0][2:-2].view(exact.shape).double() - exact)
    same = torch.equal(runs[0][2:-2], runs[1][2:-2])
    guarded = bool((runs[1][:2] == 77).all()) and bool((runs[1][-2:] == 77).all())
    return error, same, guarded


def check(torch, library, cases, variants, seconds: float) -> dict[int, int]:
    """Run variants on the cases that they serve, with and without a bias; failures by variant.

    A case passes when its largest error is at most twice that of PyTorch's fp16 attention (or
    twice what rounding the exact result to fp16 may cost, where PyTorch is luckier), every element
    was written, none outside the output was, and a second run gives the same bits.
    """
    capability, started = torch.cuda.get_device_capability(), time.monotonic()
    failed = dict.fromkeys(variants, 0)
    for index, (shape, scale) in enumerate(cases):
        assert time.monotonic() - started < seconds, f"{index} of {len(cases)} cases are checked"
        serving = [v for v in variants
                   if v == 0 or library.serves(v, shape.tokens, shape.causal, capability)]
        width = shape.heads * HEAD_DIM

        def randn(*size, seed):
            generator = torch.Generator("cuda").manual_seed(seed)
            return torch.randn(size, generator=generator, device="cuda") * scale

        qkv = randn(shape.batch, shape.tokens, 3 * width, seed=index).half()
        for bias in (None, randn(width, seed=BIAS_SEED + index)):
            exact = reference(torch, qkv, shape.heads, shape.causal, bias)
            theirs = pytorch_attention(torch, qkv, shape, bias).double()
            bound = 2 * max(largest(torch, theirs - exact), largest(torch, exact) * 2**-11)
            for variant in serving:
                error, same, guarded = run_guarded(
                    torch, library, qkv, shape, variant, bias, exact)
                ok = error <= bound and same and guarded
                failed[variant] += not ok
                if not ok:
                    print(f"FAIL variant {variant} {shape} scale {scale} bias {bias is not None}: "
                          f"error {error:.3g}, bound {bound:.3g}, same bits {same}, "
                          f"guards {guarded}")
    return failed
