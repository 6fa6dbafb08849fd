"""Each converter of ours in an engine of its own, against the PyTorch reference, static and dynamic."""
import pytest
import torch
from torch import nn

from clip_ttrt import fusion, lowering, ops, kernels
from clip_ttrt.encoders import Block, FusedOps
from clip_ttrt.options import BatchRange
from clip_ttrt.recipe import Recipe
import needs

pytestmark = pytest.mark.gpu

STATIC, DYNAMIC = BatchRange(4, 4, 4), BatchRange(1, 4, 8)
HALF_ERROR = 4e-3  # a few roundings to half (2^-11 each) of values of order 1


class Attention(nn.Module):
    def __init__(self, heads, causal):
        super().__init__()
        self.heads, self.causal = heads, causal

    def forward(self, x):
        return ops.attention(x, self.heads, self.causal)


class Patches(nn.Module):
    def forward(self, x):
        return ops.extract_patches(x, 4)


class PrependClassToken(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.token = nn.Parameter(torch.randn(width))

    def forward(self, x):
        return ops.prepend_class_token(x, self.token)


class PoolEndOfText(nn.Module):
    """Tokens in, rows out: the row of each position in a fixed table, so that the position chosen shows."""

    def __init__(self, length, width=64):
        super().__init__()
        self.tokens = nn.Embedding(49408, width)
        self.positions = nn.Parameter(torch.randn(length, width))

    def forward(self, x):
        return ops.pool_end_of_text(self.tokens(x) * 0 + self.positions, x)


class LayerNorm(nn.Module):
    def __init__(self, width, rank):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        nn.init.normal_(self.norm.weight, 1, 0.2)
        nn.init.normal_(self.norm.bias)
        self.rank = rank

    def forward(self, x):
        return self.norm(x if self.rank == 3 else x.select(1, 0))


class Blocks(nn.Module):
    """Transformer blocks and a last layer norm, so that every addition has one behind it."""

    def __init__(self, blocks):
        super().__init__()
        self.blocks = blocks
        self.norm = nn.LayerNorm(blocks[0].out.in_features).to(blocks[0].qkv.weight)

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return self.norm(x)


class QuickGelu(nn.Module):
    def forward(self, x):
        return ops.quick_gelu_reference(x)


def run_in_engine(module, example, batch, precision, count, attention="native", how=None):
    """Export, lower, build, by default as `recipe.choose` says, and run; returns what the engine gives for `count` fresh rows, and the rows."""
    from clip_ttrt import engine

    graph = lowering.capture(module.eval().requires_grad_(False), example)
    lowering.lower(graph)
    if attention == "plugin":
        kernels.load(kernels.VERSION)
        assert sum(fusion.fuse(graph).values()) > 0
    built = engine.build_engine(graph, example, batch, precision, attention, how=how)
    rows = fresh_rows(example, count)
    compiled = engine.to_torchscript(built, fresh_rows(example, batch.optimal).cuda(), "test")
    with torch.no_grad():
        return compiled(rows.cuda()).cpu(), rows


def fresh_rows(example, count):
    if example.is_floating_point():
        return torch.randn(count, *example.shape[1:])
    tokens = torch.randint(1, 49405, (count, example.shape[1]), dtype=torch.int32)
    tokens[:, 0] = 49406
    for row in range(count):
        tokens[row, 1 + (row * 13) % (example.shape[1] - 1)] = 49407
    return tokens


@pytest.mark.parametrize("batch", [STATIC, DYNAMIC], ids=str)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("tokens", [50, 77, 197, 257, 577])
def test_attention(tokens, causal, batch):
    torch.manual_seed(0)
    actual, rows = run_in_engine(Attention(3, causal), torch.zeros(2, tokens, 3 * 192), batch, "fp16", 4)
    expected = ops.attention_reference(rows.double(), 3, causal)
    assert (actual - expected).abs().max() < HALF_ERROR


@pytest.mark.parametrize("batch", [STATIC, DYNAMIC], ids=str)
def test_extract_patches(batch):
    actual, rows = run_in_engine(Patches(), torch.zeros(2, 3, 16, 16), batch, "fp32", 4)
    assert torch.equal(actual, ops.extract_patches_reference(rows, 4))


@pytest.mark.parametrize("batch", [STATIC, DYNAMIC], ids=str)
def test_prepend_class_token(batch):
    torch.manual_seed(0)
    module = PrependClassToken(64)
    actual, rows = run_in_engine(module, torch.zeros(2, 49, 64), batch, "fp32", 4)
    assert torch.equal(actual, ops.prepend_class_token_reference(rows, module.token))


@pytest.mark.parametrize("batch", [STATIC, DYNAMIC], ids=str)
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_pool_end_of_text_is_exact(precision, batch):
    torch.manual_seed(0)
    module = PoolEndOfText(77)
    actual, rows = run_in_engine(module, torch.zeros(2, 77, dtype=torch.int32), batch, precision, 4)
    expected = module.positions[rows.argmax(dim=1)].detach()
    assert (actual - expected).abs().max() < HALF_ERROR  # another position's row differs by about 1


@pytest.mark.parametrize("batch", [STATIC, DYNAMIC], ids=str)
@pytest.mark.parametrize("rank", [2, 3])
def test_layer_norm_does_not_overflow_in_half(rank, batch):
    torch.manual_seed(0)
    module = LayerNorm(768, rank)
    actual, rows = run_in_engine(module, torch.zeros(2, 50, 768), batch, "fp16", 4)
    expected = module.double()(rows.double())
    assert (actual - expected).abs().max() < 4 * HALF_ERROR  # values of up to 5


@pytest.mark.parametrize("batch", [STATIC, DYNAMIC], ids=str)
def test_quick_gelu_keeps_its_tails_in_half(batch):
    torch.manual_seed(0)
    actual, rows = run_in_engine(QuickGelu(), torch.zeros(2, 50, 768), batch, "fp16", 4)
    assert (actual - ops.quick_gelu_reference(rows.double())).abs().max() < HALF_ERROR


@pytest.mark.parametrize("width", [128, 768, 1024])
def test_an_mlp_of_a_range_is_right(width):
    """Layer norm by TensorRT's plugin, the product with QuickGELU in its epilogue; large inputs, so that QuickGELU's tails count."""
    torch.manual_seed(0)
    module = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 4 * width), QuickGelu(), nn.Linear(4 * width, width))
    nn.init.normal_(module[0].weight, 0, 4)
    actual, rows = run_in_engine(module, torch.zeros(2, 50, width), DYNAMIC, "fp16", 5, how=Recipe(separate_mlps=True))
    expected = module.double()(rows.double())
    assert ((actual - expected).norm() / expected.norm()) < HALF_ERROR


def test_patches_capped_at_their_rows_maxima_are_themselves():
    actual, rows = run_in_engine(Patches(), torch.zeros(2, 3, 16, 16), DYNAMIC, "fp32", 8, how=Recipe(row_maxima=True))
    assert torch.equal(actual, ops.extract_patches_reference(rows, 4))


@pytest.mark.parametrize("attention", ["native", pytest.param("plugin", marks=needs.built)])
@pytest.mark.parametrize("batch", [STATIC, DYNAMIC], ids=str)
@pytest.mark.parametrize("tokens, causal", [(50, False), (77, True), (197, False), (257, False), (577, False)])
def test_two_blocks(tokens, causal, batch, attention):
    """Everything that blocks are fused to, biases included."""
    torch.manual_seed(0)
    module = nn.ModuleList([Block(128, 2, causal, FusedOps()) for _ in range(2)])
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.05 if parameter.dim() > 1 else 0.5)
    blocks = Blocks(module)
    actual, rows = run_in_engine(blocks, torch.zeros(2, tokens, 128), batch, "fp16", 4, attention)
    expected = Blocks(module.double())(rows.double())
    assert ((actual - expected).norm() / expected.norm()) < HALF_ERROR


@pytest.mark.parametrize("attention, batch", [
    pytest.param("native", STATIC, id="native-static"), pytest.param("native", DYNAMIC, id="native-range"),
    pytest.param("plugin", STATIC, id="plugin-static", marks=needs.built), pytest.param("plugin", DYNAMIC, id="plugin-range", marks=needs.built),
])
@pytest.mark.parametrize("tokens, width", [(197, 768), (257, 1024)])
def test_a_block_optimised_for_a_thousand_rows(tokens, width, attention, batch):
    """What TensorRT 8.6's own matrix products compute wrongly, without a warning; `recipe.choose` is how it comes out right."""
    torch.manual_seed(0)
    module = nn.ModuleList([Block(width, width // 64, False, FusedOps())])
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.03 if parameter.dim() > 1 else 0.5)
    actual, rows = run_in_engine(Blocks(module), torch.zeros(2, tokens, width), batch, "fp16", 4, attention)
    expected = Blocks(module.double())(rows.double())
    assert ((actual - expected).norm() / expected.norm()) < HALF_ERROR


@pytest.mark.parametrize("count", [1, 3, 8])
def test_dynamic_engine_serves_its_whole_range(count):
    torch.manual_seed(0)
    actual, rows = run_in_engine(Attention(2, True), torch.zeros(2, 77, 384), DYNAMIC, "fp16", count)
    assert actual.shape[0] == count
    assert (actual - ops.attention_reference(rows.double(), 2, True)).abs().max() < HALF_ERROR


def test_what_no_converter_serves_is_an_error_that_names_it():
    class Unsupported(nn.Module):
        def forward(self, x):
            return torch.cumsum(x, dim=1)

    graph = lowering.capture(Unsupported(), torch.zeros(2, 4))
    with pytest.raises(lowering.LoweringError, match="cumsum"):
        lowering.lower(graph)
