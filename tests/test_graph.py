"""Export, lowering and fusing: one graph of our operations for any batch, nothing changed, nothing dropped."""
import operator

import pytest
import torch
from torch import nn

from clip_ttrt import graph, linear, ops, torchscript
from clip_ttrt.checkpoint import load_checkpoint
from clip_ttrt.encoders import ENCODERS
from clip_ttrt.models import MODELS
from clip_ttrt.options import BatchRange
from clip_ttrt.pipeline import example_input, in_precision

COMMON = {ops.clamp_tokens, ops.mask_unknown, ops.embedding, ops.select_token, ops.pool_end_of_text, ops.cast, ops.add}
PLAIN = COMMON | {ops.linear, ops.layer_norm, ops.attention, ops.quick_gelu, ops.extract_patches, ops.prepend_class_token}
FUSED = COMMON | {ops.fused_attention, ops.fused_linear, ops.fused_layer_norm, ops.bias_quick_gelu, ops.residual_layer_norm,
                  ops.extract_patch_rows, ops.embed_image, ops.split_tokens, operator.getitem}


@pytest.fixture(scope="module")
def state_dict():
    """The demo model's random weights, with biases of order 1, so that a lost one shows."""
    torch.manual_seed(0)
    weights = dict(load_checkpoint("demo", "random").state_dict)
    return {name: torch.randn_like(value) if name.endswith("bias") else value for name, value in weights.items()}


def rows_for(encoder, count=5):
    return torch.randn(count, 3, 112, 112) if encoder == "image" else torch.randint(0, 49408, (count, 77), dtype=torch.int32)


def captured(encoder, state_dict, precision="fp32"):
    plain = in_precision(ENCODERS[encoder](state_dict), precision)
    return plain, graph.capture(plain, example_input(encoder, MODELS["demo"]))


def targets(module):
    return {node.target for node in module.graph.nodes if node.op == "call_function"}


@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
@pytest.mark.parametrize("encoder", ENCODERS)
def test_lowering_leaves_our_operations_alone_and_no_sizes(encoder, precision, state_dict):
    plain, module = captured(encoder, state_dict, precision)
    counts = graph.lower(module)
    blocks, is_image = len(plain.blocks), encoder == "image"
    # Linear layers, layer norms and additions of every block, and what stands around the blocks.
    assert counts == {"fold_parameter_slices": int(not is_image), "map_operations": 8 * blocks + (7 if is_image else 4)}
    assert targets(module) <= PLAIN
    assert (ops.cast in targets(module)) is (precision != "fp32")
    assert all(node.meta["val"].dtype for node in module.graph.nodes if node.op == "call_function")


@pytest.mark.parametrize("encoder", ENCODERS)
def test_every_block_is_fused(encoder, state_dict):
    plain, module = captured(encoder, state_dict)
    graph.lower(module)
    counts = graph.fuse(module)
    blocks, is_image = len(plain.blocks), encoder == "image"
    assert counts == {"fuse_attention": blocks, "fuse_bias_quick_gelu": blocks, "fuse_residual_layer_norm": 2 * blocks, "fuse_image_embedding": int(is_image),
                      "fuse_layer_norm": int(not is_image), "fuse_linear": 4 * blocks + 1 + int(is_image)}
    assert targets(module) <= FUSED
    assert not any(node.args[2] for node in graph.find_nodes(module, ops.fused_linear))
    assert all(node.args[3] is not None for node in graph.find_nodes(module, ops.fused_attention))


@pytest.mark.parametrize("encoder", ENCODERS)
def test_features_stay_the_same_for_any_batch(encoder, state_dict):
    plain, module = captured(encoder, state_dict)
    rows = rows_for(encoder)
    with torch.no_grad():
        expected = plain(rows)
        graph.lower(module)
        assert torch.allclose(module(rows), expected, atol=1e-6)
        assert torch.allclose(module(rows[:1]), expected[:1], atol=1e-5)
        graph.fuse(module)
        assert (module(rows) - expected).abs().max() < 1e-5 * expected.abs().max()


@pytest.mark.parametrize("encoder", ENCODERS)
def test_a_traced_graph_needs_no_operation_of_ours_and_takes_any_batch(encoder, state_dict):
    plain, module = captured(encoder, state_dict)
    graph.lower(module)
    traced = torchscript.build(module, example_input(encoder, MODELS["demo"]))
    assert "clip_ttrt::" not in str(traced.inlined_graph)
    rows = rows_for(encoder)
    with torch.no_grad():
        assert torch.allclose(traced(rows), plain(rows), atol=1e-6)


@pytest.mark.parametrize("encoder", ENCODERS)
def test_linear_layers_know_the_rows_of_a_sample(encoder, state_dict):
    """All tokens, or the patches without the class token, until the last block chooses one row of each sample."""
    plain, module = captured(encoder, state_dict, "fp16")
    graph.lower(module)
    graph.fuse(module)
    tokens = plain.positions.shape[0]
    last = [tokens, 1, 1, 1, 1]  # the last block, which chooses before its output projection, and the encoder's projection
    patches = [tokens - 1] if encoder == "image" else []
    assert list(graph.linear_rows(module).values()) == patches + [tokens] * 4 * (len(plain.blocks) - 1) + last


def test_layers_of_the_same_sizes_are_measured_once_and_get_their_table(state_dict, monkeypatch):
    asked = []

    def tune(rows, weight_shape, bias):
        asked.append((tuple(rows), weight_shape, bias))
        return linear.pack(*weight_shape, bias)

    monkeypatch.setattr(linear, "tune", tune)
    plain, module = captured("text", state_dict, "fp16")
    graph.lower(module)
    graph.fuse(module)
    assert graph.tune(module, BatchRange(1, 4, 8)) == 4 * len(plain.blocks) + 1
    assert len(asked) == len(set(asked)) == 4 + 4  # four kinds of layer; three of the last block's and the projection see one row a sample
    assert ((77, 154, 308, 616), (384, 128), False) in asked and ((1, 2, 4, 8), (256, 128), False) in asked
    for node in graph.find_nodes(module, ops.fused_linear):
        assert bytes.fromhex(node.args[3]) == linear.pack(*graph.parameter(module, node.args[1]).shape, False)
    rows = rows_for("text")
    assert torch.isfinite(module(rows)).all()


def test_text_of_another_length_folds_its_positions(state_dict):
    plain = ENCODERS["text"](state_dict)
    module = graph.capture(plain, torch.zeros(2, 20, dtype=torch.int32))
    assert graph.lower(module)["fold_parameter_slices"] == 1
    rows = torch.randint(0, 49408, (3, 20))
    with torch.no_grad():
        assert torch.allclose(module(rows), plain(rows), atol=1e-6)


def refused(forward, sentence, example=torch.zeros(2, 4, 8)):
    class Module(nn.Module):
        def __init__(self):
            super().__init__()
            self.table = nn.Parameter(torch.randn(6, 8), requires_grad=False)

    Module.forward = forward
    module = graph.capture(Module(), example)
    with pytest.raises(graph.GraphError, match=sentence):
        graph.lower(module)


def test_what_has_no_form_among_our_operations_is_named():
    refused(lambda self, x: torch.cumsum(x, dim=1) + x, "no backend implements aten.cumsum")
    refused(lambda self, x: (x + x) * x.shape[0], "no backend implements aten.*sym_size")
    refused(lambda self, x: x + self.table[::2][:1], "only a parameter's slice of step 1")
    refused(lambda self, x: x + x[:, :1], "only a parameter's slice of step 1")
    refused(lambda self, x: torch.add(x, x, alpha=2), r"aten.add.Tensor with .*'alpha': 2")
    refused(lambda self, x: x + 1, "aten.add.Tensor with")
    refused(lambda self, x: x.select(2, 0), "aten.select.int with")
    refused(lambda self, x: torch.nn.functional.layer_norm(x, (8,)), "aten.layer_norm.default with")
    refused(lambda self, x: torch.nn.functional.layer_norm(x, (4, 8), torch.ones(4, 8), torch.ones(4, 8)), "aten.layer_norm.default with")


def test_a_pass_that_the_plan_counts_on_and_that_finds_nothing_is_an_error():
    class OnlyLinear(nn.Module):
        def __init__(self):
            super().__init__()
            self.up = nn.Linear(8, 8)

        def forward(self, x):
            return self.up(x)

    module = graph.capture(OnlyLinear().requires_grad_(False), torch.zeros(2, 8))
    graph.lower(module)
    with pytest.raises(graph.GraphError, match="fuse_attention, fuse_bias_quick_gelu, fuse_residual_layer_norm, which found nothing"):
        graph.fuse(module)


def fused_apart(module, example, rewrite):
    """A module's lowered graph after one of the fusing passes, and how often that rewrote."""
    lowered = graph.capture(module.eval().requires_grad_(False), example)
    graph.lower(lowered)
    return lowered, graph.run(lowered, [rewrite])[rewrite.__name__]


class OneAttention(nn.Module):
    """A projection whose attention something else than a linear layer reads: its value bias has nowhere to go."""

    def __init__(self):
        super().__init__()
        self.qkv, self.out = nn.Linear(64, 192), nn.Linear(64, 64)

    def forward(self, x):
        attended = ops.attention(self.qkv(x), 1, False)
        return self.out(attended) + attended


def test_a_bias_with_nowhere_to_go_stays():
    module = OneAttention()
    lowered, count = fused_apart(module, torch.zeros(2, 5, 64), graph.fuse_attention)
    [node] = graph.find_nodes(lowered, ops.fused_attention)
    assert count == 1 and node.args[3] is None and node.args[0].args[2] is not None
    x = torch.randn(3, 5, 64)
    assert torch.allclose(lowered(x), module(x), atol=1e-6)


class ReadTwice(nn.Module):
    """An activation whose input something else reads, too."""

    def __init__(self):
        super().__init__()
        self.up = nn.Linear(8, 8)

    def forward(self, x):
        y = self.up(x)
        return ops.quick_gelu(y) + y


def test_a_bias_that_something_else_needs_stays():
    module = ReadTwice()
    lowered, count = fused_apart(module, torch.zeros(2, 8), graph.fuse_bias_quick_gelu)
    x = torch.randn(3, 8)
    assert count == 0 and torch.allclose(lowered(x), module(x), atol=1e-6)


class OddSizes(nn.Module):
    """Sizes that the library of kernels has no linear layer for, one that it has, and a bias that nothing takes over."""

    def __init__(self):
        super().__init__()
        self.odd, self.even = nn.Linear(8, 12), nn.Linear(12, 16)

    def forward(self, x):
        return self.even(self.odd(x))


def test_odd_sizes_stay_and_biases_go_along():
    module = OddSizes()
    lowered, count = fused_apart(module, torch.zeros(2, 3, 8), graph.fuse_linear)
    [node], [stays] = graph.find_nodes(lowered, ops.fused_linear), graph.find_nodes(lowered, ops.linear)
    assert count == 1 and node.args[0] is stays and node.args[2] is not None
    x = torch.randn(4, 3, 8)
    assert torch.allclose(lowered(x), module(x), atol=1e-6)


def test_a_weight_that_a_precision_cannot_hold_is_named():
    from clip_ttrt.errors import UserError

    layer = nn.Linear(8, 8)
    layer.weight.data[2, 3] = 1e5
    assert in_precision(layer, "bf16").weight.dtype == torch.bfloat16
    with pytest.raises(UserError, match=r"weight has values that fp16 cannot hold, .*65504"):
        in_precision(layer, "fp16")
