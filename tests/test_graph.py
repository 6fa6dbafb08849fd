"""Passes over one graph of our operations, for any batch: nothing changed, nothing dropped."""
from dataclasses import replace

import pytest
import torch
from torch import nn

from clip_ttrt import backends, engine, graph, linear, ops, pictures
from clip_ttrt.checkpoint import load_checkpoint
from clip_ttrt.encoders import ENCODERS
from clip_ttrt.engine import in_precision
from clip_ttrt.errors import UserError
from clip_ttrt.guard import trace
from clip_ttrt.options import BatchRange, Options
from clip_ttrt.verify import COSINE_BOUND
from lowering import One, encoder_in, lowered

aten = torch.ops.aten
ONES = torch.ones(4, 8)
each_encoder = pytest.mark.parametrize("encoder", ENCODERS)


@pytest.fixture(scope="module")
def state_dict():
    """The demo model's random weights, with biases of order 1, so that a lost one shows."""
    torch.manual_seed(0)
    return {name: torch.randn_like(value) if name.endswith("bias") else value
            for name, value in load_checkpoint("demo", "random").state_dict.items()}


def rows_for(encoder):
    if encoder == "image":
        return torch.randn(5, 3, 112, 112)
    return torch.randint(0, 49408, (5, 77), dtype=torch.int32)


def targets(module):
    return {node.target for node in module.graph.nodes if node.op == "call_function"}


@torch.no_grad()
@each_encoder
def test_every_block_is_fused_and_features_stay_the_same_for_any_batch(encoder, state_dict):
    plain, example, module = encoder_in("demo", encoder, "fp32", state_dict=state_dict)
    rows, blocks = rows_for(encoder), len(plain.blocks)
    expected = plain(rows)
    assert torch.allclose(module(rows), expected, atol=1e-6)
    assert torch.allclose(module(rows[:1]), expected[:1], atol=1e-5)
    counts = {"fuse_attention": blocks, "fuse_bias_gelu": blocks,
              "fuse_residual_layer_norm": 2 * blocks, "fuse_rest": 4 * blocks + 2}
    counts |= {"fuse_image_embedding": 1} if encoder == "image" else {}
    assert graph.run(module, graph.FUSE[encoder]) == counts
    assert not targets(module) & {ops.linear, ops.layer_norm, ops.attention, ops.gelu}
    assert not any(node.args[2] for node in graph.calls(module, ops.fused_linear))
    assert (module(rows) - expected).abs().max() < 1e-5 * expected.abs().max()
    graph.run(module, [graph.inline_references])
    traced = trace(module, example)
    assert "clip_ttrt::" not in str(traced.inlined_graph)
    assert (traced(rows) - expected).abs().max() < 1e-5 * expected.abs().max()


@each_encoder
def test_layers_of_the_same_sizes_are_measured_once_and_get_their_table(
        encoder, state_dict, monkeypatch):
    asked = []

    def tune(rows, weight_shape, bias, quantized):
        assert not quantized
        asked.append((*rows, weight_shape))
        return linear.pack(*weight_shape, bias)

    monkeypatch.setattr(linear, "tune", tune)
    plain, _, module = encoder_in(
        "demo", encoder, "fp16", *graph.FUSE[encoder], state_dict=state_dict)
    layers = 4 * len(plain.blocks) + (2 if encoder == "image" else 1)
    assert graph.run(module, [graph.tuning(BatchRange(1, 4, 8), (77,))]) == {"tune": layers}
    # All tokens, or the patches without the class token, until the last block chooses one row
    # before its output projection.
    block, tokens = plain.blocks[0], plain.positional_embedding.shape[0]
    of_block = [layer.weight.shape for layer in (block.qkv, block.out, block.up, block.down)]
    expected = [(tokens, shape) for shape in of_block]
    expected += [(1, shape) for shape in (*of_block[1:], plain.projection.weight.shape)]
    expected += [(tokens - 1, plain.patches.weight.shape)] if encoder == "image" else []
    assert sorted(asked) == sorted((rows, 2 * rows, 4 * rows, 8 * rows, tuple(shape))
                                   for rows, shape in expected)
    for node in graph.calls(module, ops.fused_linear):
        shape = graph.parameter(module, node.args[1]).shape
        assert bytes.fromhex(node.args[3]) == linear.pack(*shape, False)
    assert torch.isfinite(module(rows_for(encoder))).all()


@pytest.mark.parametrize("function, sentence", [
    (lambda x: torch.cumsum(x, dim=1) + x, "aten.cumsum"),
    (lambda x: (x + x) * x.shape[0], "aten.*sym_size"),
    (lambda x: x + x[:, :1], "aten.slice.Tensor with"),
    (lambda x: x[:, ::2], r"aten.slice.Tensor with .* 2\)"),
    (lambda x: torch.add(x, x, alpha=2), r"aten.add.Tensor with .*'alpha': 2"),
    (lambda x: x + 1, "aten.add.Tensor with"),
    (lambda x: x.select(2, 0), "aten.select.int with"),
    (lambda x: nn.functional.layer_norm(x, (8,)), "aten.layer_norm.default with"),
    (lambda x: nn.functional.layer_norm(x, (4, 8), ONES, ONES), "aten.layer_norm.default with"),
])
def test_what_has_no_form_among_our_operations_is_named(function, sentence):
    with pytest.raises(graph.GraphError, match=f"no backend implements {sentence}"):
        lowered(One(lambda x, value: function(x)), torch.zeros(2, 4, 8))


@pytest.mark.parametrize("function", [
    lambda x: nn.functional.avg_pool2d(x, 2), nn.functional.relu, nn.ReLU(inplace=True),
    nn.AvgPool2d(2), nn.Conv2d(4, 8, 3), nn.Conv2d(4, 8, 3, bias=False),
    nn.Conv2d(4, 8, 3, padding=2), nn.Conv2d(4, 8, 1, stride=3), nn.Conv2d(4, 8, 3, 2, 1)])
def test_what_a_resnet_has_is_torch_tensorrt_s_to_convert(function):
    x = torch.randn(3, 4, 6, 6)
    module = function if isinstance(function, nn.Module) else One(lambda x, value: function(x))
    found = lowered(module, x[:2])
    assert targets(found) <= {*graph.THEIRS, aten.convolution.default}
    assert torch.allclose(found(x), module(x.clone()), atol=1e-6)


@pytest.mark.parametrize("op, module", [
    (aten.linear.default, nn.Linear(8, 8)), (aten.layer_norm.default, nn.LayerNorm(8)),
    (aten.select.int, One(lambda x, value: x.select(1, 0))),
    (aten.add.Tensor, One(lambda x, value: x + value)),
    (aten.slice.Tensor, One(lambda x, value: x[:, 1:])),
    (aten.embedding.default, One(
        lambda x, value: nn.functional.embedding(ops.cast(x, torch.int32), value), 4, 8)),
])
def test_keyword_arguments_of_every_operation_are_refused_by_name(op, module):
    found = graph.capture(module, torch.zeros(2, 4, 8))
    for node in graph.calls(found, op):
        node.kwargs = {"unused": 7}
    with pytest.raises(graph.GraphError, match=rf"{op} with .*'unused': 7"):
        list(graph.lower(found))


@pytest.mark.parametrize("encoder, kernels", [("image", "tensorrt"), ("both", "fused")])
def test_a_resnet_s_image_encoder_is_tensorrt_s_own(encoder, kernels, monkeypatch):
    found = backends.Backend("tensorrt", "cuda", "fp16", "asked")
    monkeypatch.setattr(backends, "choose", lambda *_: found)
    monkeypatch.setattr(backends.kernels, "obstacle", lambda: None)
    plan = engine.plan_for(Options(model="RN50", encoder=encoder))
    assert plan.kernels.kernels == kernels
    assert (plan.kernels_version is not None) is (kernels == "fused")
    names = {name: [each.__name__ for each in passes] for name, passes in plan.passes.items()}
    assert names["image"] == ["lower"] and names.get("text", ["tune"])[-1] == "tune"
    if encoder == "image":
        with pytest.raises(UserError, match="fused cannot .* the image encoder is a ResNet; --ker"):
            engine.plan_for(Options(model="RN50", encoder=encoder, kernels="fused"))


@pytest.mark.parametrize("backend, kernels, names", [
    ("torchscript", None, ["lower", "inline_references"]),
    ("tensorrt", "tensorrt", ["lower"]),
    ("tensorrt", "fused", ["lower", "fuse_attention", "fuse_image_embedding", "tune"]),
])
def test_one_plan_decides_kernels_passes_and_settings(backend, kernels, names, monkeypatch):
    found = backends.Backend(backend, "cuda", "fp16", "asked")
    monkeypatch.setattr(backends, "choose", lambda *_: found)
    monkeypatch.setattr(backends, "choose_kernels", lambda *_: backends.Choice(kernels, "asked"))
    plan = engine.plan_for(Options(encoder="image", optimization_level=2, batch="1:2:4"))
    passes = [each.__name__ for each in plan.passes["image"]]
    assert [name for name in passes if name in names] == names
    assert (len(passes) > len(names)) is (kernels == "fused") is (plan.kernels_version is not None)
    if kernels is None:
        assert plan.builder is None
    else:
        assert plan.builder["optimization_level"] == 2 and plan.builder["batch"].optimal == 2


def test_a_pass_that_the_plan_counts_on_and_that_finds_nothing_is_an_error():
    module = lowered(nn.Linear(8, 8), torch.zeros(2, 8))
    with pytest.raises(graph.GraphError, match="fuse_attention found nothing to rewrite"):
        graph.run(module, graph.FUSE["text"])


class Apart(nn.Module):
    def __init__(self, first, second, function):
        super().__init__()
        self.first, self.second, self.function = nn.Linear(*first), nn.Linear(*second), function

    def forward(self, x):
        return self.function(self.first(x), self.second)


@pytest.mark.parametrize("module, width, rewrite, count", [
    # Something else than a linear layer reads the attention: its value bias has nowhere to go.
    (Apart((64, 192), (64, 64), lambda x, second: second(y := ops.attention(x, 1, False)) + y),
     64, graph.fuse_attention, 0),
    # Something else reads the activation's input, too.
    (Apart((8, 8), (8, 8), lambda x, second: second(ops.gelu(x, "quick") + x)),
     8, graph.fuse_bias_gelu, 0),
    # Sizes that the library has no linear layer for, and then one that it has, with its bias.
    (Apart((8, 12), (12, 16), lambda x, second: second(x)), 8, graph.fuse_rest, 1),
], ids=["attention", "activation", "sizes"])
def test_what_does_not_fit_stays_with_its_bias(module, width, rewrite, count):
    found, x = lowered(module, torch.zeros(2, 5, width)), torch.randn(3, 5, width)
    assert len(list(rewrite(found))) == count
    assert all(node.args[2] is not None for op in (ops.linear, ops.fused_linear)
               for node in graph.calls(found, op))
    found.recompile()
    assert torch.allclose(found(x), module(x), atol=1e-6)


def test_a_weight_that_a_precision_cannot_hold_is_named():
    layer = nn.Linear(8, 8)
    layer.weight.data[2, 3] = 1e5
    assert in_precision(layer, "bf16").weight.dtype == torch.bfloat16
    with pytest.raises(UserError, match=r"weight has values that fp16 cannot hold, .*65504"):
        in_precision(layer, "fp16")


@pytest.mark.parametrize("fused", [False, True])
@each_encoder
def test_mlps_whose_values_fp16_cannot_hold_are_found_and_stay_in_fp32(encoder, fused):
    """Two units of one block have a first weight near fp16's largest number, and less behind."""
    checkpoint = load_checkpoint("demo", "random")
    prefix = "visual." if encoder == "image" else ""
    part = f"{prefix}transformer.resblocks.2.mlp."
    state_dict = {name: value.clone() for name, value in checkpoint.state_dict.items()}
    factor = 6e4 / state_dict[f"{part}c_fc.weight"][5:7].abs().max()
    state_dict[f"{part}c_fc.weight"][5:7] *= factor
    state_dict[f"{part}c_proj.weight"][:, 5:7] /= factor
    checkpoint = replace(checkpoint, state_dict=state_dict)
    plain = checkpoint.model.encoder(encoder, state_dict)
    [(name, size)] = [*engine.overflowing(encoder, plain, checkpoint).items()]
    assert name == "blocks.2" and size > 65504
    images, lines = pictures.load(112)
    rows = images if encoder == "image" else checkpoint.model.tokenizer()(lines)
    expected, features = plain(rows), {}
    for wide in ([], [name]):
        _, _, module = encoder_in("demo", encoder, "fp16", *(graph.FUSE[encoder] if fused else ()),
                                  state_dict=state_dict, wide=wide)
        left = [node.meta["val"].dtype for node in graph.calls(module, ops.linear)]
        assert left.count(torch.float) == 2 * len(wide)
        features[bool(wide)] = module(rows)
    assert not features[False].isfinite().all()
    assert torch.cosine_similarity(features[True], expected).min() > COSINE_BOUND["fp16"]
