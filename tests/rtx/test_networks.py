"""Every converter with a form in TensorRT's own layers, and whole encoders: a network and plan."""
import functools
import logging
import re
import warnings
from dataclasses import replace

import pytest
import torch
from clip.model import AttentionPool2d
from torch import nn

from clip_ttrt import graph, ops, stack, trt
from clip_ttrt.checkpoint import load_checkpoint
from clip_ttrt.engine import DTYPES
from clip_ttrt.encoders import ENCODERS, PoolingHead
from clip_ttrt.guard import lengths_of
from clip_ttrt.models import MODELS, Dimensions
from clip_ttrt.options import BatchRange
import small
from lowering import DYNAMIC, STATIC, One, Pool, construct, encoder_in, lowered

MOST_LAYERS = {"demo": 240, "ViT-B/32": 480,  # constants not counted; seen: 196, 364,
               "ViT-L/14@336px": 180, "small": 100, "RN50": 190,  # 151, 81, 158
               "small-80": 130, "small-88": 130, "small-104": 130}
SMALL = {"small": small.RESNET, "small-80": small.OF_80, "small-88": small.OF_88,
         "small-104": small.OF_104,
         "ViT-L/14@336px": replace(MODELS["ViT-L/14@336px"], image_layers=4, text_layers=4)}


def of(function):
    return One(lambda x, value: function(x))


def mask_unknown(x, value):
    features = ops.select_token(ops.embedding(value, x), 0)
    return ops.mask_unknown(features, x, ops.clamp_tokens(x, 100))


# Name -> module, and its input after the batch.
NORM = One(lambda x, value: nn.functional.layer_norm(x, (64,), value, value), 64)
CONVERTED = {
    "linear": (nn.Linear(64, 32), (5, 64)),
    "linear_without_bias": (nn.Linear(64, 32, bias=False), (5, 64)),
    "linear_on_rows": (nn.Linear(64, 32), (64,)),
    "layer_norm": (NORM, (5, 64)),
    "layer_norm_on_rows": (NORM, (64,)),
    "quick_gelu": (of(lambda x: ops.gelu(x, "quick")), (5, 64)),
    "gelu": (of(lambda x: ops.gelu(x, "none")), (5, 64)),
    "gelu_by_tanh": (of(lambda x: ops.gelu(x, "tanh")), (5, 64)),
    "add": (of(lambda x: x + ops.gelu(x, "quick")), (5, 64)),
    "add_a_parameter": (One(lambda x, value: x + value, 5, 64), (5, 64)),
    "positions_of": (
        One(lambda x, value: ops.embedding(value, x) + ops.positions_of(value, x), 100, 64), (7,)),
    "embedding": (nn.Embedding(100, 64), (7,)),
    "select_token": (of(lambda x: x.select(1, 2)), (5, 64)),
    "attention": (of(lambda x: ops.attention(x, 2, False)), (5, 384)),
    "causal_attention": (of(lambda x: ops.attention(x, 2, True)), (5, 384)),
    "attention_of_wide_heads": (of(lambda x: ops.attention(x, 2, False)), (5, 480)),
    "composed_attention": (of(lambda x: ops.attention(x, 2, False)), (5, 384)),
    "composed_causal_attention": (of(lambda x: ops.attention(x, 2, True)), (5, 384)),
    "extract_patches": (of(lambda x: ops.extract_patches(x, 4)), (3, 16, 16)),
    "prepend_class_token": (One(ops.prepend_class_token, 64), (5, 64)),
    "pool_end_of_text": (
        One(lambda x, value: ops.pool_end_of_text(ops.embedding(value, x), x), 100, 64), (7,)),
    "clamp_tokens": (of(lambda x: ops.clamp_tokens(x, 100)), (7,)),
    "mask_unknown": (One(mask_unknown, 100, 64), (7,)),
    "cast": (of(lambda x: ops.cast(x, torch.float)), (5, 64)),
    "split_tokens": (of(lambda x: ops.split_tokens(x, 1)), (64,)),
    "convolution": (nn.Conv2d(8, 16, 3, stride=2, padding=1), (8, 9, 9)),
    "convolution_of_points": (nn.Conv2d(8, 16, 1), (8, 6, 6)),
    "relu": (of(nn.functional.relu), (8, 6, 6)),
    "average_pool": (of(lambda x: nn.functional.avg_pool2d(x, 2)), (8, 6, 6)),
    "mean_of_patches": (of(ops.mean_of_patches), (5, 64)),
    "attention_pool": (Pool(AttentionPool2d(2, 128, 2, 32)), (128, 2, 2)),
    "attention_probe": (PoolingHead(144, 2, 200), (5, 144)),
    "extract_whole_patches": (of(lambda x: ops.extract_patches(x, 4)), (3, 18, 18)),
}
PLUGINS = {ops.fused_attention, ops.fused_linear, ops.fused_quantized_linear, ops.fused_layer_norm,
           ops.bias_gelu, ops.residual_layer_norm, ops.extract_patch_rows, ops.embed_image}


def module_and_example(name, precision):
    """One of CONVERTED in a precision; a cast to what it is would be none."""
    module, shape = CONVERTED[name]
    dtype = DTYPES["fp16" if (name, precision) == ("cast", "fp32") else precision]
    example = torch.zeros((2, *shape), dtype=torch.int32 if shape == (7,) else dtype)
    return module.to(dtype), example


def plan(interpreter, gpu="SM86"):
    """The plan that TensorRT-RTX builds of a network for a GPU, by default of capability 8.6."""
    config = interpreter.builder.create_builder_config()
    config.num_compute_capabilities = 1
    config.set_compute_capability(getattr(trt.api().ComputeCapability, gpu), 0)
    for profile in interpreter.optimization_profiles or ():
        config.add_optimization_profile(profile)
    with trt.building() as build:
        found = interpreter.builder.build_serialized_network(interpreter.ctx.net, config)
    if found is None:
        trt.raise_build_error(build.errors)
    return bytes(found)


def layers(interpreter):
    """Type, name and output shapes of every layer."""
    network = interpreter.ctx.net
    found = [network.get_layer(i) for i in range(network.num_layers)]
    return [(str(each.type), each.name, [tuple(each.get_output(j).shape)
                                         for j in range(each.num_outputs)]) for each in found]


class Foreign(nn.Module):
    """Somebody else's model, of operations that ours has too."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.table, self.norm, self.up = nn.Embedding(50, 64), nn.LayerNorm(64), nn.Linear(64, 64)

    def forward(self, x):
        y = self.table(x)
        y = (y + self.up(self.norm(y)))[:, None]
        return nn.functional.scaled_dot_product_attention(y, y, y).select(1, 0)


def test_another_model_s_network_stays_the_same_and_so_does_ours():
    """Another's before and after ours, and ours after another's settings for the process.

    It stands first in this file, since ours registers converters.
    """
    trt.api()  # imports Torch-TensorRT
    from torch_tensorrt import Input
    from torch_tensorrt.dynamo import lowering
    from torch_tensorrt.dynamo._settings import CompilationSettings
    from torch_tensorrt.dynamo.conversion._ConverterRegistry import DYNAMO_CONVERTERS
    from torch_tensorrt.dynamo.conversion._TRTInterpreter import TRTInterpreter

    def foreign():
        settings, x = CompilationSettings(), torch.zeros(2, 7, dtype=torch.int32)
        program = torch.export.export(Foreign().eval(), (x,))
        program = lowering.pre_export_lowering(program, settings)
        program = program.run_decompositions(lowering.get_decompositions(False, False))
        interpreter = TRTInterpreter(
            lowering.post_lowering(program.module(), settings), [Input((2, 7), dtype=x.dtype)],
            output_dtypes=[torch.float], compilation_settings=settings)
        interpreter._construct_trt_network_def()
        return layers(interpreter)

    def ours():
        _, example, module = encoder_in("demo", "text", "fp16")
        return layers(construct(module, example, DYNAMIC, "fp16")[0])

    before, expected = foreign(), ours()
    assert foreign() == before and len(before) > 10
    theirs = CompilationSettings(torch_executed_ops={ops.linear})
    DYNAMO_CONVERTERS.set_compilation_settings(theirs)
    assert ours() == expected
    assert DYNAMO_CONVERTERS.compilation_settings is theirs
    assert DYNAMO_CONVERTERS.disallowed_targets == {ops.linear}


@pytest.mark.parametrize("batch", [STATIC, DYNAMIC], ids=str)
@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
@pytest.mark.parametrize("name", CONVERTED)
def test_a_converter_alone(name, precision, batch, monkeypatch):
    trt.api()
    from clip_ttrt import converters

    if name.startswith("composed"):  # for TensorRT older than 10.14, whose networks have none
        monkeypatch.setattr(converters, "attention_layer", converters.composed_attention)
    module, example = module_and_example(name, precision)
    interpreter, _ = construct(lowered(module, example), example, batch, precision)
    network, expected = interpreter.ctx.net, module(example)
    assert network.num_inputs == network.num_outputs == 1
    output = network.get_output(0)
    assert tuple(output.shape) == (4 if batch.static else -1, *expected.shape[1:])
    assert converters.TORCH_TYPES[output.dtype] == expected.dtype
    as_one = any("ATTENTION" in kind for kind, _, _ in layers(interpreter))
    assert as_one is (name in ("attention", "causal_attention", "attention_of_wide_heads"))
    assert plan(interpreter)


@torch.no_grad()
@pytest.mark.parametrize("batch", [STATIC, DYNAMIC], ids=str)
def test_a_text_encoder_s_one_network_is_right_at_every_length(batch, monkeypatch):
    """Layer by layer in PyTorch, which no engine's kernels are; with the attention of TensorRT
    before 10.14, which is of layers."""
    trt.api()
    from clip_ttrt import converters
    from evaluated import evaluate

    monkeypatch.setattr(converters, "attention_layer", converters.composed_attention)
    plain, example, module = encoder_in("demo", "text", "fp32")
    interpreter, build = construct(module, example, batch, "fp32", 16)
    network, tokens = interpreter.ctx.net, torch.randint(1, 49406, (4, 77), dtype=torch.int32)
    for row, length in zip(tokens, (4, 9, 15, 16), strict=True):
        row[length - 1], row[length:] = 49407, 0
    tokens[1, 2] = 49408
    assert tuple(network.get_input(0).shape) == (4 if batch.static else -1, -1)
    assert plan(interpreter) and build.warnings == []
    expected = plain(tokens)
    for length in (16, 31, 77):
        found = evaluate(network, tokens[:, :length])
        assert torch.allclose(found, expected, rtol=1e-4, atol=1e-4, equal_nan=True)
        assert found.isnan().any(1).tolist() == [False, True, False, False]


def test_every_operation_that_is_no_plugin_is_built_above():
    built = set()
    for name in CONVERTED:
        nodes = lowered(*module_and_example(name, "fp32")).graph.nodes
        built |= {node.target for node in nodes if node.op == "call_function"}
    assert built == {*ops.REFERENCES, *graph.THEIRS, torch.ops.aten.convolution.default} - {
        *PLUGINS, ops.quantized_linear}  # of whole encoders


ENCODERS_BUILT = [(model, encoder) for model in ("demo", "ViT-B/32", "ViT-L/14@336px")
                  for encoder in ENCODERS]  # the others differ from these in patches alone
ENCODERS_BUILT += [("small", "image"), ("RN50", "image"),
                   *((model, encoder) for model in ("small-80", "small-104")
                     for encoder in ENCODERS),
                   pytest.param("small-88", "image", marks=pytest.mark.slow)]


@pytest.mark.parametrize("encoder", ENCODERS)
def test_a_network_with_one_mlp_in_fp32_builds(encoder):
    wide, example, module = encoder_in("demo", encoder, "fp16", wide=["blocks.1"])
    shortest = lengths_of(encoder, MODELS["demo"])[0]
    interpreter, build = construct(module, example, BatchRange(1, 4, 8), "fp16", shortest)
    assert build.warnings == [] and wide.blocks[1].up.weight.dtype == torch.float
    assert len(plan(interpreter)) > 0


@functools.lru_cache(maxsize=1)
def random_weights(model):
    return load_checkpoint(model, "random").state_dict


@pytest.mark.parametrize("model, encoder", ENCODERS_BUILT)
def test_a_whole_encoder_is_one_network_and_its_plan_builds(model, encoder, monkeypatch):
    small.add(monkeypatch, **SMALL)
    plain, example, module = encoder_in(model, encoder, "fp16", state_dict=random_weights(model))
    weights = sum(value.numel() * value.element_size() for value in plain.parameters())
    shortest = lengths_of(encoder, MODELS[model])[0]
    interpreter, build = construct(module, example, BatchRange(1, 32, 256), "fp16", shortest)
    network = interpreter.ctx.net
    assert network.num_inputs == network.num_outputs == 1
    any_size = (-1, -1) if shortest < example.shape[-1] else (-1, *example.shape[1:])
    assert tuple(network.get_input(0).shape) == any_size
    assert tuple(network.get_output(0).shape) == (-1, MODELS[model].embed_dim)
    assert 0 < build.layers <= MOST_LAYERS[model]
    assert build.warnings == []
    assert len(plan(interpreter)) > 0.9 * weights  # they are all in it


@pytest.mark.skipif(stack.minor(stack.versions()["tensorrt-rtx"]) == "1.4",
                    reason="TensorRT-RTX 1.4 builds fp8 with a GPU only")
@pytest.mark.parametrize("encoder", ENCODERS)
def test_an_encoder_in_fp8_is_built_for_gpus_that_have_it(encoder):
    state_dict = load_checkpoint("demo").state_dict
    plain, example, module = encoder_in("demo", encoder, "fp8", state_dict=state_dict)
    names = [*filter(None, map(graph.block_weight, module.graph.nodes))]
    interpreter, build = construct(module, example, DYNAMIC, "fp16")
    of_fp16 = len(plan(interpreter, "SM89"))
    graph.run(module, [graph.quantizing(dict.fromkeys(names[1:], 0.05))])  # one stays in fp16
    interpreter, build = construct(module, example, DYNAMIC, "fp8")
    kinds = [kind.split(".")[-1] for kind, _, _ in layers(interpreter)]
    assert kinds.count("QUANTIZE") == len(names) - 1 == 4 * len(plain.blocks) - 1
    assert kinds.count("DEQUANTIZE") == 2 * (len(names) - 1) and build.warnings == []
    weights = sum(graph.parameter(module, node.args[1]).numel()
                  for node in graph.calls(module, ops.quantized_linear))
    assert len(plan(interpreter, "SM89")) < of_fp16 - 0.7 * weights  # a byte less for each
    with pytest.raises(trt.EngineError, match="sm86"):
        plan(interpreter)


def test_python_s_warnings_stay_warnings():
    trt.api()
    with pytest.warns(UserWarning, match="seen as before"):
        warnings.warn("seen as before")
    assert not logging.getLogger("py.warnings").handlers


def test_what_tensorrt_says_of_one_build_is_not_told_of_another(capfd):
    module = lowered(of(lambda x: ops.add(x, x)), torch.zeros(2, 5))
    log = logging.getLogger(trt.LOGGER)
    with trt.building() as first:
        log.warning("first word")
        log.error("first failure")
    _, build = construct(module, torch.zeros(2, 5), STATIC, "fp32")
    assert (first.warnings, first.errors) == (["first word"], ["first failure"])
    assert build.warnings == build.errors == [] and "first" not in capfd.readouterr().err


def test_a_layer_that_tensorrt_refuses_is_told_in_its_words():
    module = lowered(One(ops.add, 5), torch.zeros(2, 5))
    module.value = nn.Parameter(torch.zeros(4), requires_grad=False)
    with pytest.raises(trt.EngineError, match="not build the engine: .*(?i:broadcast|dimension)"):
        plan(construct(module, torch.zeros(2, 5), STATIC, "fp32")[0])


SIGLIP = Dimensions(144, 60, 14, 144, 2, 16, 100, 128, 2, image_head_dim=72, image_mlp=200,
                    text_mlp=136, gelu="tanh", image_pooling="probe", family="siglip")


@pytest.fixture(params=["image-fp32", "image-fp16", "text-fp32", "text-fp16"])
def of_siglip(request):
    """An encoder with random weights, inputs of it, and a precision."""
    name, _, precision = request.param.partition("-")
    torch.manual_seed(0)
    encoder = ENCODERS[name](SIGLIP).eval().requires_grad_(False)
    inputs = (torch.randn(4, 3, 60, 60) if name == "image" else
              torch.randint(0, 100, (4, 16), dtype=torch.int32))
    for name, value in encoder.named_parameters():
        if value.dim() > 1:
            nn.init.normal_(value, std=1.5 * value.shape[1] ** -0.5)
        else:
            mean = float(bool(re.search(r"(ln_|norm).*weight", name)))
            nn.init.normal_(value, mean=mean, std=0.1)
    return encoder, inputs, precision


def test_siglip_s_encoder_is_one_network_and_its_plan_builds(of_siglip):
    """Heads of 72 and 64, and pixels beyond whole patches."""
    encoder, inputs, precision = of_siglip
    dtype = DTYPES[precision]
    weights = sum(value.numel() for value in encoder.parameters()) * dtype.itemsize
    module = lowered(encoder.to(dtype), inputs[:2])
    interpreter, build = construct(module, inputs[:2], BatchRange(1, 32, 256), precision)
    output = interpreter.ctx.net.get_output(0)
    assert tuple(output.shape) == (-1, 144) and output.dtype == trt.api().float32
    assert 0 < build.layers <= 110 and build.warnings == []
    assert sum("ATTENTION" in type_ for type_, _, _ in layers(interpreter)) >= 2
    assert len(plan(interpreter)) > 0.9 * weights


@pytest.mark.parametrize("batch", [STATIC, DYNAMIC], ids=str)
def test_siglip_s_network_computes_what_its_encoder_does(of_siglip, batch, monkeypatch):
    """Its layers, with attention in plain ones, against the encoder in fp64."""
    trt.api()
    from clip_ttrt import converters
    from evaluated import evaluate

    monkeypatch.setattr(converters, "attention_layer", converters.composed_attention)
    encoder, inputs, precision = of_siglip
    module = lowered(encoder.to(DTYPES[precision]), inputs[:2])
    interpreter, build = construct(module, inputs[:2], batch, precision)  # whose constants it has
    actual, expected = evaluate(interpreter.ctx.net, inputs), encoder.double()(inputs)
    error = (actual - expected).norm(dim=1) / expected.norm(dim=1)
    assert error.max() < (1e-5 if precision == "fp32" else 1e-2)
    assert (expected[0] - expected[1]).norm() > 0.1 * expected[0].norm()
