"""Every converter that has a form in TensorRT's own layers, and whole encoders: one network each, and its plan builds."""
import logging
import warnings

import pytest
import torch
from torch import nn

from clip_ttrt import graph, ops, trt
from clip_ttrt.checkpoint import load_checkpoint
from clip_ttrt.encoders import ENCODERS
from clip_ttrt.models import MODELS
from clip_ttrt.options import BatchRange
from clip_ttrt.pipeline import DTYPES, example_input, in_precision

CAPABILITY = "8.6"
STATIC, DYNAMIC = BatchRange(4, 4, 4), BatchRange(1, 4, 8)
MOST_LAYERS = {"demo": 240, "ViT-B/32": 480, "ViT-B/16": 480, "ViT-L/14": 840, "ViT-L/14@336px": 840}  # seen: 196, 364, 364, 700, 700


class One(nn.Module):
    """A function of one input and a parameter, as a module."""

    def __init__(self, function, *shape):
        super().__init__()
        self.function, self.value = function, nn.Parameter(torch.randn(shape or (1,)))

    def forward(self, x):
        return self.function(x, self.value)


def layer_norm(x, value):
    return nn.functional.layer_norm(x, (64,), value, value)


# Name -> module, its input after the batch, and whether that is tokens.
CONVERTED = {
    "linear": (nn.Linear(64, 32), (5, 64)),
    "linear_without_bias": (nn.Linear(64, 32, bias=False), (5, 64)),
    "linear_on_rows": (nn.Linear(64, 32), (64,)),
    "layer_norm": (One(layer_norm, 64), (5, 64)),
    "layer_norm_on_rows": (One(layer_norm, 64), (64,)),
    "quick_gelu": (One(lambda x, _: ops.quick_gelu(x)), (5, 64)),
    "add": (One(lambda x, _: x + ops.quick_gelu(x)), (5, 64)),
    "add_a_parameter": (One(lambda x, value: x + value, 5, 64), (5, 64)),
    "embedding": (nn.Embedding(100, 64), (7,)),
    "select_token": (One(lambda x, _: x.select(1, 2)), (5, 64)),
    "attention": (One(lambda x, _: ops.attention(x, 2, False)), (5, 384)),
    "causal_attention": (One(lambda x, _: ops.attention(x, 2, True)), (5, 384)),
    "extract_patches": (One(lambda x, _: ops.extract_patches(x, 4)), (3, 16, 16)),
    "prepend_class_token": (One(ops.prepend_class_token, 64), (5, 64)),
    "pool_end_of_text": (One(lambda x, value: ops.pool_end_of_text(ops.embedding(value, x), x), 100, 64), (7,)),
    "clamp_tokens": (One(lambda x, _: ops.clamp_tokens(x, 100)), (7,)),
    "mask_unknown": (One(lambda x, value: ops.mask_unknown(ops.select_token(ops.embedding(value, x), 0), x, ops.clamp_tokens(x, 100)), 100, 64), (7,)),
    "cast": (One(lambda x, _: ops.cast(x, torch.float)), (5, 64)),
    "split_tokens": (One(lambda x, _: ops.split_tokens(x, 1)), (64,)),
}
TOKENS = {"embedding", "pool_end_of_text", "clamp_tokens", "mask_unknown"}


@pytest.mark.parametrize("batch", [STATIC, DYNAMIC], ids=str)
@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
@pytest.mark.parametrize("name", CONVERTED)
def test_a_converter_alone(name, precision, batch):
    module, shape = CONVERTED[name]
    if name == "cast" and precision == "fp32":
        precision = "fp16"  # a cast to what it is would be none
    dtype = DTYPES[precision]
    example = torch.zeros((2, *shape), dtype=torch.int32) if name in TOKENS else torch.zeros((2, *shape), dtype=dtype)
    lowered = graph.capture(module.to(dtype).eval().requires_grad_(False), example)
    graph.run(lowered, graph.LOWER)
    construction = trt.construct(lowered, example, batch, precision)
    network, expected = construction.network, module(example)
    assert network.num_inputs == network.num_outputs == 1
    output = network.get_output(0)
    assert tuple(output.shape)[1:] == tuple(expected.shape)[1:] and output.shape[0] in (-1, 4)
    converters = trt_types()
    assert converters[output.dtype] == expected.dtype
    assert construction.plan(CAPABILITY)


@pytest.mark.parametrize("batch", [STATIC, DYNAMIC], ids=str)
@pytest.mark.parametrize("name", ["attention", "causal_attention"])
def test_attention_where_a_network_has_none_of_its_own(name, batch, monkeypatch):
    """As product, softmax and product, for TensorRT older than 10.14."""
    trt.api()
    from clip_ttrt import converters

    monkeypatch.setattr(converters, "attention_layer", converters.composed_attention)
    module, shape = CONVERTED[name]
    example = torch.zeros((2, *shape), dtype=torch.half)
    lowered = graph.capture(module.half().eval().requires_grad_(False), example)
    graph.run(lowered, graph.LOWER)
    construction = trt.construct(lowered, example, batch, "fp16")
    kinds = [str(construction.network.get_layer(i).type) for i in range(construction.network.num_layers)]
    assert sum("MATRIX_MULTIPLY" in kind for kind in kinds) == 2 and not any("ATTENTION" in kind for kind in kinds)
    assert trt_types()[construction.network.get_output(0).dtype] == torch.half
    assert construction.plan(CAPABILITY)


def trt_types():
    from clip_ttrt import converters

    return converters.TORCH_TYPES


def test_every_operation_that_is_no_plugin_is_built_above():
    plugins = {ops.fused_attention, ops.fused_linear, ops.fused_layer_norm, ops.bias_quick_gelu, ops.residual_layer_norm, ops.extract_patch_rows, ops.embed_image}
    built = set()
    for name, (module, shape) in CONVERTED.items():
        example = torch.zeros((2, *shape), dtype=torch.int32 if name in TOKENS else torch.float)
        if name == "cast":
            example = example.half()
        lowered = graph.capture(module.float().eval().requires_grad_(False), example)
        graph.run(lowered, graph.LOWER)
        built |= {node.target for node in lowered.graph.nodes if node.op == "call_function"}
    assert built == set(ops.REFERENCES) - plugins


@pytest.mark.parametrize("encoder", ENCODERS)
@pytest.mark.parametrize("model", MODELS)
def test_a_whole_encoder_is_one_network_and_its_plan_builds(model, encoder):
    dims = MODELS[model]
    state_dict = load_checkpoint(model, None if model == "demo" else "random").state_dict
    plain, example = in_precision(ENCODERS[encoder](state_dict), "fp16"), example_input(encoder, dims)
    lowered = graph.capture(plain, example)
    graph.lower(lowered)
    weights = sum(value.numel() * value.element_size() for value in plain.parameters())
    del plain, state_dict
    construction = trt.construct(lowered, example, BatchRange(1, 32, 256), "fp16")
    network = construction.network
    assert network.num_inputs == network.num_outputs == 1
    assert tuple(network.get_input(0).shape) == (-1, *example.shape[1:])
    assert tuple(network.get_output(0).shape) == (-1, dims.embed_dim)
    assert construction.layers <= MOST_LAYERS[model]
    assert construction.warnings == ()
    plan = construction.plan(CAPABILITY)
    assert len(plan) > 0.9 * weights  # they are all in it


def layers(network):
    """Type, name and output shapes of every layer."""
    found = [network.get_layer(i) for i in range(network.num_layers)]
    return [(str(each.type), each.name, [tuple(each.get_output(j).shape) for j in range(each.num_outputs)]) for each in found]


class Foreign(nn.Module):
    """Somebody else's model, of operations that ours has too."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.table, self.norm, self.up = nn.Embedding(50, 64), nn.LayerNorm(64), nn.Linear(64, 64)

    def forward(self, x):
        y = self.table(x)
        y = y + self.up(self.norm(y))
        return nn.functional.scaled_dot_product_attention(y[:, None], y[:, None], y[:, None]).select(1, 0)


def foreign_network(**settings):
    """Somebody else's network, by Torch-TensorRT's own lowering and converters."""
    import torch_tensorrt
    from torch_tensorrt.dynamo._settings import CompilationSettings
    from torch_tensorrt.dynamo.conversion._TRTInterpreter import TRTInterpreter
    from torch_tensorrt.dynamo.lowering import get_decompositions, post_lowering, pre_export_lowering

    settings = CompilationSettings(**settings)
    x = torch.zeros(2, 7, dtype=torch.int32)
    program = pre_export_lowering(torch.export.export(Foreign().eval(), (x,)), settings)
    lowered = post_lowering(program.run_decompositions(get_decompositions(False, False)).module(), settings)
    interpreter = TRTInterpreter(lowered, [torch_tensorrt.Input((2, 7), dtype=torch.int32)], output_dtypes=[torch.float], compilation_settings=settings)
    interpreter._construct_trt_network_def()
    return layers(interpreter.ctx.net)


def our_network():
    encoder = in_precision(ENCODERS["text"](load_checkpoint("demo").state_dict), "fp16")
    example = example_input("text", MODELS["demo"])
    lowered = graph.capture(encoder, example)
    graph.lower(lowered)
    return layers(trt.construct(lowered, example, DYNAMIC, "fp16").network)


def test_another_model_s_network_is_the_same_before_and_after_ours_and_ours_after_another_s():
    trt.api()  # imports Torch-TensorRT
    foreign, ours = foreign_network(), our_network()
    assert foreign_network() == foreign and len(foreign) > 10
    from torch_tensorrt.dynamo.conversion._ConverterRegistry import DYNAMO_CONVERTERS
    from torch_tensorrt.dynamo._settings import CompilationSettings

    theirs = CompilationSettings(torch_executed_ops={ops.linear, ops.layer_norm, torch.ops.aten.add.Tensor})
    DYNAMO_CONVERTERS.set_compilation_settings(theirs)
    try:
        assert our_network() == ours
        assert DYNAMO_CONVERTERS.compilation_settings is theirs and ops.linear in DYNAMO_CONVERTERS.disallowed_targets
    finally:
        DYNAMO_CONVERTERS.set_compilation_settings(CompilationSettings())


def test_python_s_warnings_stay_warnings():
    our_network()
    with pytest.warns(UserWarning, match="seen as before"):
        warnings.warn("seen as before")
    assert not logging.getLogger("py.warnings").handlers


class WrongHeads(nn.Module):
    def forward(self, x):
        return ops.attention(x, 3, False)  # of a width that has no three heads of 64


def test_what_a_validator_refuses_is_an_error_of_the_build():
    lowered = graph.capture(WrongHeads(), torch.zeros(2, 5, 576))
    for node in graph.find_nodes(lowered, ops.attention):
        node.args = (node.args[0], 2, False)
    with pytest.raises(trt.EngineError, match="attention"):
        trt.construct(lowered, torch.zeros(2, 5, 576), STATIC, "fp32")


def test_what_tensorrt_says_of_one_build_is_not_told_of_another():
    lowered = graph.capture(One(lambda x, _: ops.add(x, x), 1), torch.zeros(2, 5))
    log = logging.getLogger(trt.LOGGER)
    with trt.building() as first:
        log.warning("a word about the first")
        log.error("a failure of the first")
    construction = trt.construct(lowered, torch.zeros(2, 5), STATIC, "fp32")
    assert first.warnings == ["a word about the first"] and first.errors == ["a failure of the first"]
    assert construction.warnings == () and construction.build.errors == []
    with pytest.raises(trt.EngineError, match="could not build the engine: a failure of the first"):
        trt.raise_build_error(first.errors)


def test_a_layer_that_tensorrt_refuses_is_told_in_its_words(monkeypatch):
    from clip_ttrt import converters

    def mistyped(ctx, x, value, name):
        return converters.constant(ctx, value.reshape((1,) * (len(x.shape) - value.dim()) + tuple(value.shape)), name, torch.half)

    lowered = graph.capture(One(lambda x, value: ops.add(x, value), 5), torch.zeros(2, 5))
    monkeypatch.setattr(converters, "beside", mistyped)
    with pytest.raises(trt.EngineError, match=r"(?i)type"):
        trt.construct(lowered, torch.zeros(2, 5), STATIC, "fp32").plan(CAPABILITY)
