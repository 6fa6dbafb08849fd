"""Launches with random tensors, and what may come out of them, from float64.

An output may be off by half a unit of fp16's last place, which is what rounding costs, and by what
fp32 arithmetic costs on the way: a few 2^-24 of the largest number that went into it.
"""
import math
from collections.abc import Callable
from typing import NamedTuple

import torch

from clip_ttrt import kernels, linear, ops

DEVICE, EPSILON, NAN = "cuda", 1e-5, math.nan


class Launch(NamedTuple):
    """expected: from the outputs by name, (output, exact, allowed error) of each."""

    launcher: str
    fields: dict
    outputs: dict  # name -> rows and width
    expected: Callable[[dict], list[tuple]]


def check(launch: Launch) -> None:
    """Every element within its bound, written over NaN and over numbers with the same bits, and
    nothing written to the two rows before and behind an output."""
    runs = []
    for poison in (NAN, 77.0):
        whole = {name: torch.full((rows + 4, width), poison, device=DEVICE).half()
                 for name, (rows, width) in launch.outputs.items()}
        runs.append({name: one[2:-2] for name, one in whole.items()})
        kernels.launch(launch.launcher, torch.device(DEVICE), **launch.fields, **runs[-1])
    for name, out in whole.items():
        assert torch.equal(runs[0][name], runs[1][name]), f"{name} has other bits"
        assert (out[:2] == 77).all() and (out[-2:] == 77).all(), f"written beside {name}"
    for out, exact, allowed in launch.expected(runs[0]):
        error = (out.double() - exact).abs()
        assert (error <= allowed).all(), (launch.launcher, launch.outputs, (error - allowed).max())


def randn(*size, scale=1.0):
    return torch.randn(size, device=DEVICE) * scale


def half_ulp(exact):
    """Half the distance of the fp16 numbers around each value."""
    return 2.0 ** (exact.abs().clamp(min=2.0**-14).log2().floor() - 11)


def attention(batch, heads, tokens, causal, scale=1.0, biased=False, variant=0) -> Launch:
    """Allowed is twice the largest error of PyTorch's fp16 attention, or twice what rounding the
    largest result may cost, where PyTorch is luckier."""
    width = heads * 64
    qkv = randn(batch, tokens, 3 * width, scale=scale).half()
    bias = randn(width, scale=scale) if biased else None
    reference = ops.fused_attention_reference
    # In parts, to bound the memory, and for PyTorch's attention, which a CUDA grid limits.
    parts = qkv.split(min(2**15, max(1, int(2e8) // (heads * tokens * tokens))))
    exact = torch.cat([reference(part.double(), heads, causal, bias) for part in parts])
    theirs = torch.cat([reference(part, heads, causal, bias) for part in parts])
    allowed = 2 * max((theirs.double() - exact).abs().max(), exact.abs().max() * 2**-11)
    fields = {"qkv": qkv, "query_bias": bias, "batch": batch, "heads": heads, "tokens": tokens,
              "causal": int(causal), "variant": variant}
    return Launch("attention", fields, {"out": (batch * tokens, width)},
                  lambda found: [(found["out"], exact.flatten(0, 1), allowed)])


def quick_gelu(x, bias) -> Launch:
    y = x.double() if bias is None else x.double() + bias.double()
    exact = ops.quick_gelu_reference(y)
    # The exponent, up to 1.702 log2(e) |y|, is rounded to fp32 before the power is taken.
    allowed = half_ulp(exact) + exact.abs() * (4 + 4 * y.abs()) * 2.0**-23
    fields = {"in": x, "bias": bias, "rows": x.shape[0], "width": x.shape[1]}
    return Launch("bias_quick_gelu", fields, {"out": x.shape},
                  lambda found: [(found["out"], exact, allowed)])


def norms(width):
    """Scales around 1 and shifts around 0, fp32."""
    return 1 + 0.3 * randn(width), 0.3 * randn(width)


def normed(out, x, scale, shift):
    """(out, exact, allowed) of the layer norm of a float64 x."""
    mean = x.mean(1, keepdim=True)
    deviation = (x.var(1, correction=0, keepdim=True) + EPSILON).sqrt()
    normalised = (x - mean) / deviation
    exact = normalised * scale.double() + shift.double()
    before = normalised.abs() * 8 + x.abs().amax(1, keepdim=True) / deviation * 4
    fp32 = before * scale.abs().double() + shift.abs().double()
    return out, exact, half_ulp(exact) + fp32 * 2.0**-22


def layer_norm(x, delta=None, bias=None) -> Launch:
    (rows, width), (scale, shift) = x.shape, norms(x.shape[1])
    parts = [part.double() for part in (x, delta, bias) if part is not None]

    def expected(found):
        if delta is None:
            return [normed(found["out"], parts[0], scale, shift)]
        total, exact = found["sum_out"], sum(parts)
        allowed = half_ulp(exact) + sum(part.abs() for part in parts) * 2.0**-22
        # The layer norm is that of the rounded sum.
        return [(total, exact, allowed), normed(found["out"], total.double(), scale, shift)]

    fields = {"x": x, "delta": delta, "bias": bias, "scale": scale, "shift": shift, "rows": rows,
              "width": width, "epsilon": EPSILON}
    names = ["out"] if delta is None else ["sum_out", "out"]
    return Launch("residual_layer_norm", fields, dict.fromkeys(names, x.shape), expected)


def patches(images, size) -> Launch:
    """Rounded once, with no error beside that."""
    exact = ops.extract_patch_rows_reference(images, size, torch.half)
    fields = {"images": images, "batch": images.shape[0], "resolution": images.shape[2],
              "patch_size": size, "half": int(images.dtype == torch.half)}
    return Launch("extract_patches", fields, {"out": exact.shape},
                  lambda found: [(found["out"], exact.double(), 0)])


def embed_image(batch, tokens, width, scale=1.0) -> Launch:
    x = randn(batch, tokens - 1, width, scale=scale).half()
    token, positions = randn(width, scale=scale), randn(tokens, width, scale=scale)
    pre, first = norms(width), norms(width)

    def expected(found):
        rows = ops.prepend_class_token_reference(x.double(), token) + positions
        return [normed(found["x"], rows.flatten(0, 1), *pre),
                normed(found["y"], found["x"].double(), *first)]  # of the rounded x

    fields = {"patches": x, "class_token": token, "positions": positions, "scale_pre": pre[0],
              "shift_pre": pre[1], "scale_1": first[0], "shift_1": first[1], "batch": batch,
              "tokens": tokens, "width": width, "epsilon_pre": EPSILON, "epsilon_1": EPSILON}
    shape = batch * tokens, width
    return Launch("embed_image", fields, {"x": shape, "y": shape}, expected)


def linear_layer(table, x, weight, bias) -> Launch:
    """A result is rounded once; with a bias twice, since some algorithms add it in fp16.

    fp32 sums of K terms err like a random walk of sqrt(K) steps of 2^-23 of their size at most:
    tensor cores cut digits off.
    """
    product, terms = x.double() @ weight.double().T, x.double().abs() @ weight.double().abs().T
    exact = product if bias is None else product + bias.double()
    sums = x.shape[1] ** 0.5 * 2**-23 * terms
    allowed = 2**-11 * (exact.abs() + sums) + 2**-25 + sums
    if bias is not None:
        allowed = allowed + 1.001 * (2**-11 * (product.abs() + sums) + 2**-25)
    workspace = torch.full((linear.WORKSPACE_BYTES,), 255, dtype=torch.uint8, device=DEVICE)
    fields = {"layer": linear._layer(table).pointer, "x": x, "weight": weight, "bias": bias,
              "workspace": workspace, "rows": x.shape[0]}
    return Launch("linear", fields, {"out": exact.shape},
                  lambda found: [(found["out"], exact, allowed)])
