"""What the plugins take over: every rewrite made, nothing changed in real arithmetic."""
import operator

import pytest
import torch
from torch import nn

from clip_ttrt import fusion, lowering, ops
from clip_ttrt.checkpoint import load_checkpoint
from clip_ttrt.encoders import ENCODERS
from clip_ttrt.models import MODELS
from clip_ttrt.pipeline import example_input
import needs

pytestmark = needs.export
aten = torch.ops.aten


@pytest.fixture(scope="module", params=["image", "text"])
def fused(request):
    """(plain encoder, example, fused graph, counts) of the demo model with random weights and biases."""
    torch.manual_seed(0)
    plain = ENCODERS[request.param](load_checkpoint("demo", "random").state_dict)
    for name, parameter in plain.named_parameters():
        if "bias" in name:
            nn.init.normal_(parameter)
    example = example_input(request.param, MODELS["demo"])
    graph = lowering.capture(plain, example)
    lowering.lower(graph)
    return plain, example, graph, fusion.fuse(graph)


def test_every_block_is_fused(fused):
    plain, _, graph, counts = fused
    blocks = len(plain.blocks)
    is_image = hasattr(plain, "class_token")
    assert counts == {"fold_projection_biases": blocks, "fuse_bias_quick_gelu": blocks, "fuse_residual_layer_norm": 2 * blocks,
                      "fuse_image_embedding": int(is_image), "fuse_linear": 4 * blocks + 1 + int(is_image)}
    targets = {node.target for node in graph.graph.nodes if node.op == "call_function"}
    fused_ops = {ops.bias_quick_gelu, ops.residual_layer_norm, ops.extract_patch_rows, ops.embed_image, ops.linear_rows}
    assert targets <= lowering.OPERATIONS | fused_ops | {operator.getitem}
    assert aten.linear.default not in targets
    assert (aten.layer_norm.default in targets) is not is_image and ops.extract_patches not in targets and ops.prepend_class_token not in targets
    assert aten.sigmoid.default not in targets and aten.mul.Tensor not in targets
    assert not any(node.args[2] for node in lowering.find_nodes(graph, ops.linear_rows))


def test_linear_layers_know_the_rows_of_a_sample(fused):
    """All tokens, or the patches without the class token, until the last block chooses one row of each sample."""
    plain, _, graph, _ = fused
    tokens = plain.positions.shape[0]
    rows = [node.args[3] for node in lowering.find_nodes(graph, ops.linear_rows)]
    last = [tokens, 1, 1, 1, 1]  # the last block, which chooses before its output projection, and the encoder's projection
    patches = [tokens - 1] if hasattr(plain, "class_token") else []
    assert rows == patches + [tokens] * 4 * (len(plain.blocks) - 1) + last


def test_features_stay_the_same(fused):
    plain, example, graph, _ = fused
    torch.manual_seed(1)
    rows = torch.randn(5, *example.shape[1:]).double() if example.is_floating_point() else torch.randint(0, 49408, (5, 77), dtype=torch.int32)
    with torch.no_grad():
        expected, actual = plain.double()(rows), graph.double()(rows)
    assert (actual - expected).abs().max() < 1e-6 * expected.abs().max()  # the folded biases are rounded to float
    plain.float(), graph.float()


class OneAttention(nn.Module):
    """A projection whose attention something else than a linear layer reads: its value bias has nowhere to go."""

    def __init__(self):
        super().__init__()
        self.qkv, self.out = nn.Linear(64, 192), nn.Linear(64, 64)

    def forward(self, x):
        attended = ops.attention(self.qkv(x), 1, False)
        return self.out(attended) + attended


def test_a_bias_with_nowhere_to_go_stays():
    module = OneAttention().eval().requires_grad_(False)
    graph = lowering.capture(module, torch.zeros(2, 5, 64))
    lowering.lower(graph)
    assert fusion.fuse(graph)["fold_projection_biases"] == 0
    x = torch.randn(3, 5, 64)
    assert torch.allclose(graph(x), module(x), atol=1e-6)


class OtherActivation(nn.Module):
    def __init__(self):
        super().__init__()
        self.up = nn.Linear(8, 8)

    def forward(self, x):
        y = self.up(x)
        return y * torch.sigmoid(1.5 * y)


def test_another_slope_is_another_activation():
    module = OtherActivation().eval().requires_grad_(False)
    graph = lowering.capture(module, torch.zeros(2, 8))
    lowering.lower(graph)
    assert fusion.fuse(graph)["fuse_bias_quick_gelu"] == 0
    x = torch.randn(3, 8)
    assert torch.allclose(graph(x), module(x), atol=1e-6)


class OddSizes(nn.Module):
    """Sizes that the library of kernels has no linear layer for, one that it has, and a bias that nothing takes over."""

    def __init__(self):
        super().__init__()
        self.odd, self.even = nn.Linear(8, 12), nn.Linear(12, 16)

    def forward(self, x):
        return self.even(self.odd(x))


def test_odd_sizes_stay_and_biases_go_along():
    module = OddSizes().eval().requires_grad_(False)
    graph = lowering.capture(module, torch.zeros(2, 3, 8))
    lowering.lower(graph)
    assert fusion.fuse(graph)["fuse_linear"] == 1
    [node], [stays] = lowering.find_nodes(graph, ops.linear_rows), lowering.find_nodes(graph, aten.linear.default)
    assert node.args[0] is stays and node.args[2] is not None and node.args[3] == 3
    x = torch.randn(4, 3, 8)
    assert torch.allclose(graph(x), module(x), atol=1e-6)


@pytest.fixture(params=["image", "text"])
def lowered(request):
    """An encoder of the demo model, its lowered graph, inputs, and what the graph makes of them."""
    torch.manual_seed(0)
    plain, example = ENCODERS[request.param](load_checkpoint("demo", "random").state_dict), example_input(request.param, MODELS["demo"])
    graph = lowering.capture(plain, example)
    lowering.lower(graph)
    rows = torch.randn(3, *example.shape[1:]) if example.is_floating_point() else torch.randint(0, 49408, (3, 77), dtype=torch.int32)
    return plain, graph, rows, graph(rows)


def test_an_mlp_is_separated_by_its_layer_norm_and_its_activation(lowered):
    plain, graph, rows, expected = lowered
    norms = len(lowering.find_nodes(graph, aten.layer_norm.default))
    assert fusion.separate_mlps(graph) == len(plain.blocks)
    apart, products = lowering.find_nodes(graph, ops.layer_norm_apart), lowering.find_nodes(graph, ops.quick_gelu)
    assert len(apart) == len(products) == len(plain.blocks) == norms - len(lowering.find_nodes(graph, aten.layer_norm.default))
    assert all(product.args[0].target is aten.linear.default and product.args[0].args[0] is norm for norm, product in zip(apart, products))
    assert not lowering.find_nodes(graph, aten.sigmoid.default) and not lowering.find_nodes(graph, aten.mul.Tensor)
    assert torch.equal(graph(rows), expected)
    assert fusion.separate_mlps(graph) == 0


def test_a_layer_norm_that_something_else_reads_stays():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.up = nn.LayerNorm(8), nn.Linear(8, 8)

        def forward(self, x):
            normed = self.norm(x)
            return ops.quick_gelu_reference(self.up(normed)) + normed

    graph = lowering.capture(Twice().requires_grad_(False), torch.randn(2, 8))
    lowering.lower(graph)
    assert fusion.separate_mlps(graph) == 0 and lowering.find_nodes(graph, aten.layer_norm.default)


def test_rows_are_capped_where_a_range_is_slow(lowered):
    plain, graph, rows, expected = lowered
    images = len(lowering.find_nodes(graph, ops.extract_patches))
    assert fusion.cap_rows(graph) == len(plain.blocks) + images + 1
    capped = [node.args[0] for node in lowering.find_nodes(graph, ops.row_capped)]
    assert all(set(node.users) == {user for user in node.users if user.target is ops.row_capped} for node in capped)
    assert [node.target for node in capped].count(aten.mul.Tensor) == len(plain.blocks)
    assert [node.target for node in capped].count(ops.extract_patches) == images
    [total] = [node for node in capped if node.target is aten.add.Tensor]
    [cap] = total.users
    assert {user.target for user in cap.users} >= {aten.view.default, aten.layer_norm.default}  # the choice and the last block
    assert torch.equal(graph(rows), expected)


def test_separate_mlps_are_not_capped(lowered):
    plain, graph, rows, expected = lowered
    fusion.separate_mlps(graph)
    assert fusion.cap_rows(graph) == 1 + len(lowering.find_nodes(graph, ops.extract_patches))
    assert torch.equal(graph(rows), expected)


def test_a_product_that_something_else_reads_is_no_quick_gelu():
    class Scaled(nn.Module):
        def forward(self, x):
            scaled = 1.702 * x
            return x * torch.sigmoid(scaled) + scaled

    graph = lowering.capture(Scaled(), torch.randn(2, 4))
    assert not list(fusion.quick_gelus(graph))
