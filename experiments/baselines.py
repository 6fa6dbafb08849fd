"""What is measured beside our artifacts: the plain encoder, eager or compiled, and OpenAI's model.

All have the same weights, in the precision that is asked for, and inputs that lie on the GPU in
that precision: `example`.  `plain` is the encoder as the original lays it out, of PyTorch's layers
and scaled_dot_product_attention, and for other families their own model; `rearranged` is
clip_ttrt's own encoder with no op of ours, which cuts patches for a matrix product and pools before
the last block's output projection.
"""
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path

import torch

from clip_ttrt.checkpoint import load_checkpoint, original_with_weights
from clip_ttrt.encoders import ImageEncoder
from clip_ttrt.engine import DTYPES
from clip_ttrt.errors import UserError
from clip_ttrt.families import find

E4M3_MAX = 448.0


def weights_of(model: str) -> str:
    """The weights with which a model is measured: a time does not depend on them."""
    return "demo" if model == "demo" else "random"


def example(
    model: str, encoder: str, batch: int, dtype: torch.dtype, device: str, length: int = 0
) -> torch.Tensor:
    """Random rows, each another: images [B, 3, R, R], or tokens int32 [B, T] of many lengths, with
    T = length, above 8, or by default the full length."""
    dims, generator = find(model).dimensions, torch.Generator().manual_seed(0)
    if encoder == "image":
        side = dims.image_resolution
        images = torch.randn(batch, 3, side, side, generator=generator)
        return images.to(device, dtype)
    length = length or dims.context_length
    start, end = dims.vocab_size - 2, dims.vocab_size - 1  # as OpenAI has them
    tokens = torch.randint(1, start, (batch, length), generator=generator, dtype=torch.int32)
    ends, place = 8 + 29 * torch.arange(batch) % (length - 8), torch.arange(length)
    tokens[place > ends[:, None]] = 0
    tokens[place == ends[:, None]] = end
    tokens[:, 0] = start
    return tokens.to(device)


def allow_tf32(precision: str) -> None:
    """PyTorch's matrix products in TF32 in this process for tf32, else never."""
    torch.backends.cuda.matmul.allow_tf32 = precision == "tf32"
    torch.backends.cudnn.allow_tf32 = precision == "tf32"


class PlainEncoder(torch.nn.Module):
    """Images [B, 3, R, R], in the weights' dtype, or tokens int [B, T] -> features [B, E]."""

    def __init__(self, encoder: torch.nn.Module):
        super().__init__()
        self.encoder, self.patches = encoder, None
        if isinstance(encoder, ImageEncoder):
            size = encoder.patch_size
            weight = encoder.patches.weight.detach().unflatten(1, (3, size, size))
            self.patches = torch.nn.Conv2d(3, weight.shape[0], size, size, bias=False)
            self.patches.weight = torch.nn.Parameter(weight.contiguous(), requires_grad=False)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        encoder = self.encoder
        if self.patches is None:
            x = encoder.token_embedding(inputs) + encoder.positional_embedding[:inputs.shape[1]]
        else:
            x = self.patches(inputs).flatten(2).transpose(1, 2)
            token = encoder.class_embedding.expand(x.shape[0], 1, -1)
            x = encoder.ln_pre(torch.cat([token, x], dim=1) + encoder.positional_embedding)
        for block in encoder.blocks:
            x = block(x)
        if self.patches is not None:
            return encoder.projection(encoder.ln_post(x[:, 0]))
        rows = torch.arange(x.shape[0], device=x.device)
        return encoder.projection(encoder.ln_post(x)[rows, inputs.argmax(dim=-1)])


class ScaledLinear(torch.nn.Module):
    """A linear layer in E4M3, one static scale for its inputs, of the first one, and one for its
    weight, with bias."""

    def __init__(self, layer: torch.nn.Linear):
        super().__init__()
        self.scale = None  # each of its own memory: cuBLASLt wants 16 bytes
        self.of_weight = layer.weight.detach().abs().max().float() / E4M3_MAX
        self.weight = quantized(layer.weight.detach(), self.of_weight).t()
        self.bias = layer.bias.detach()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.scale is None:
            self.scale = x.abs().max().float() / E4M3_MAX
        rows = quantized(x.flatten(0, -2), self.scale)
        product = scaled_product(rows, self.weight, self.scale, self.of_weight, self.bias)
        return product.unflatten(0, x.shape[:-1])


@torch.library.custom_op("clip_ttrt_peers::scaled_product", mutates_args=())
def scaled_product(
    x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, of_weight: torch.Tensor,
    bias: torch.Tensor,
) -> torch.Tensor:  # fmt: skip
    """torch._scaled_mm of [M, K] and [K, N], which Inductor of torch 2.11 fails to lower."""
    return torch._scaled_mm(
        x, weight, scale, of_weight, bias=bias, out_dtype=bias.dtype, use_fast_accum=True
    )


@scaled_product.register_fake
def _(x, weight, scale, of_weight, bias):
    return bias.new_empty(x.shape[0], weight.shape[1])


def quantized(x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    return (x / scale).clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn)


@torch.no_grad()
def in_fp8(module: torch.nn.Module, x: torch.Tensor) -> None:
    """Make the linear layers of an encoder's blocks ScaledLinear, calibrated on one input."""
    for parent in module.blocks:
        for name, layer in [*parent.named_children()]:
            if isinstance(layer, torch.nn.Linear):
                setattr(parent, name, ScaledLinear(layer))
    module(x)


def rearranged(model: str, encoder: str, precision: str, device: str) -> torch.nn.Module:
    """Our encoder, without an op of ours; fp8: its blocks' linear layers are torch._scaled_mm."""
    allow_tf32(precision)
    checkpoint = load_checkpoint(model, weights_of(model))
    module = checkpoint.model.encoder(encoder, checkpoint.state_dict).differentiable()
    module = module.to(device, DTYPES[precision])
    if precision == "fp8":
        in_fp8(module, example(model, encoder, 64, torch.half, device))
    return module


def plain(model: str, encoder: str, precision: str, device: str) -> Callable:
    """The encoder as the original lays it out; of a ResNet's images and other families the method
    of their own model.  Raises UserError for fp8 of those."""
    dims = find(model).dimensions
    if dims.family != "openai" or encoder == "image" and dims.is_resnet:
        if precision == "fp8":
            raise UserError(f"{model}'s own encoder is not measured in fp8; choose fp16")
        own = original(model, "fp32", device).to(DTYPES[precision])
        return getattr(own, f"encode_{encoder}")
    return PlainEncoder(rearranged(model, encoder, precision, device)).to(device)


def compiled(encoder: Callable) -> Callable:
    """An encoder under torch.compile, one graph for each batch that it is called with."""
    torch._dynamo.reset()
    return torch.compile(encoder, mode="reduce-overhead", fullgraph=True, dynamic=False)


def original(model: str, precision: str, device: str) -> torch.nn.Module:
    """OpenAI's model, as `clip.load` gives it: fp32, or fp16 by its own means; and other families'.

    Raises UserError for bf16, which OpenAI's has not.
    """
    if (openai := find(model).dimensions.family == "openai") and precision == "bf16":
        raise UserError("the original model has no bf16; its precisions are fp32, tf32 and fp16")
    allow_tf32(precision)
    module = original_with_weights(load_checkpoint(model, weights_of(model)), device)
    if openai and precision == "fp16":
        from clip.model import convert_weights

        convert_weights(module)
    return module if openai else module.to(DTYPES[precision])


def onnxruntime(model: str, encoder: str, precision: str, device: str) -> Callable:
    """The plain encoder, exported to ONNX, in a session that reads and writes tensors in place.

    Raises UserError where onnxruntime is not installed, or not for this device or precision.
    """
    try:
        import onnxruntime as ort
        import onnxscript  # noqa: F401 (the exporter needs it)
    except ImportError as problem:
        raise UserError(f"{problem}; pip install onnxruntime-gpu onnxscript") from problem
    provider = "CUDAExecutionProvider" if device == "cuda" else "CPUExecutionProvider"
    if precision == "bf16":
        raise UserError("onnxruntime takes no bf16 tensors; choose fp32, tf32 or fp16")
    module = plain(model, encoder, precision, device)
    x = example(model, encoder, 2, DTYPES[precision], device)
    tf32 = {"use_tf32": str(int(precision == "tf32"))} if device == "cuda" else {}
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # of the exporter, about itself
        path = Path(folder) / "encoder.onnx"
        torch.onnx.export(
            module, (x,), path, input_names=["x"], output_names=["features"],
            dynamic_shapes=({0: torch.export.Dim("batch")},), dynamo=True, verbose=False,
        )  # fmt: skip
        session = ort.InferenceSession(path, providers=[(provider, tf32)])
        width = module(x).shape[1]
    if session.get_providers()[0] != provider:
        raise UserError(f"onnxruntime has no {provider} here; pip install onnxruntime-gpu")

    def run(x: torch.Tensor) -> torch.Tensor:
        features = torch.empty(len(x), width, dtype=DTYPES[precision], device=device)
        binding = session.io_binding()
        tensors = {"x": (x, binding.bind_input), "features": (features, binding.bind_output)}
        for name, (tensor, bind) in tensors.items():
            dtype = str(tensor.dtype).removeprefix("torch.")
            bind(name, device, 0, dtype, tuple(tensor.shape), tensor.data_ptr())
        session.run_with_iobinding(binding)
        return features

    return run


PEERS: dict[str, Callable[[str, str, str, str], Callable]] = {
    "torch.compile": lambda *about: compiled(plain(*about)),
    "torch.compile rearranged": lambda *about: compiled(rearranged(*about)),
    "eager": plain,
    "clip": lambda model, encoder, *about: getattr(original(model, *about), f"encode_{encoder}"),
    "onnxruntime": onnxruntime,
}
# They copy from the CPU or wait for it, or replay graphs of their own.
UNCAPTURED = ("clip", "onnxruntime", "torch.compile", "torch.compile rearranged")
