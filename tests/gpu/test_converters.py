"""Converters in engines of their own against the reference in fp64: what tests/rtx cannot run.

And networks of whole encoders with plugins, constructed and not built.
"""
import pytest
import torch
from clip.model import AttentionPool2d, Bottleneck
from torch import nn

import needs
from clip_ttrt import graph, kernels, ops, trt
from clip_ttrt.encoders import ENCODERS, Block
from clip_ttrt.engine import DTYPES
from clip_ttrt.guard import trace
from clip_ttrt.models import MODELS
from clip_ttrt.options import BatchRange
from lowering import DYNAMIC, STATIC, One, Pool, construct, encoder_in, lowered

pytestmark = pytest.mark.gpu

HALF_ERROR = 4e-3  # a few roundings to half (2^-11 each) of values of order 1


def load_plugins():
    if needs.obstacle is None:
        trt.load_runtime("tensorrt")
        kernels.load(kernels.version())


def run_in_engine(module, example, precision, passes=(), batch=DYNAMIC, level=1, draw=torch.randn):
    """What an engine gives for fresh rows, and the rows."""
    load_plugins()
    dtype = DTYPES[precision] if example.is_floating_point() else example.dtype
    module = lowered(module.to(DTYPES[precision]), example.to(dtype), *passes)
    engine, _ = trt.build(module, example.to(dtype), batch, precision, level)
    traced_with, rows = (draw(count, *example.shape[1:]).to(dtype)
                         for count in (batch.optimal, batch.optimal if batch.static else 5))
    compiled = trace(engine, traced_with.cuda())
    with torch.no_grad():
        return compiled(rows.cuda()).cpu(), rows


def attention_in_half(qkv, heads, causal):
    """Attention rounded to half between its steps, as where no kernel does it in one."""
    query, key, value = qkv.unflatten(-1, (3, heads, 64)).permute(2, 0, 3, 1, 4).float()
    scores = (query / 8 @ key.mT).half().float()
    if causal:
        scores = scores.masked_fill(torch.ones(scores.shape[-2:]).triu(1).bool(), -torch.inf)
    return (scores.softmax(-1).half().float() @ value).half().transpose(1, 2).flatten(2)


@pytest.mark.parametrize("tokens, causal, batch", [
    (50, False, DYNAMIC), (77, True, STATIC), (77, True, DYNAMIC), (257, False, DYNAMIC),
    (577, False, DYNAMIC)], ids=str)
def test_attention(tokens, causal, batch):
    """At most twice the error of the same steps in half."""
    torch.manual_seed(0)
    module = One(lambda x, _: ops.attention(x, 3, causal))
    actual, rows = run_in_engine(module, torch.zeros(2, tokens, 576), "fp16", batch=batch)
    exact = ops.attention_reference(rows.double(), 3, causal)
    in_half = attention_in_half(rows, 3, causal)
    error, half_error = ((features - exact).abs().max() for features in (actual, in_half))
    assert error < 2 * half_error, (error, half_error)
    assert (actual - exact).norm() / exact.norm() < HALF_ERROR / 4


def test_extract_patches():
    module = One(lambda x, _: ops.extract_patches(x, 4))
    actual, rows = run_in_engine(module, torch.zeros(2, 3, 16, 16), "fp32")
    assert torch.equal(actual, ops.extract_patches_reference(rows, 4))


def test_prepend_class_token_whatever_the_patches_hold():
    def with_infinities(*shape):
        return torch.randn(shape).index_fill(1, torch.tensor([0]), torch.inf)

    module = One(ops.prepend_class_token, 64)
    actual, rows = run_in_engine(module, torch.zeros(2, 49, 64), "fp32", draw=with_infinities)
    assert torch.equal(actual, ops.prepend_class_token_reference(rows, module.value.detach()))


@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
def test_pool_end_of_text_is_exact(precision):
    """The row of each position in a fixed table, so that the position chosen shows."""
    class Pool(nn.Module):
        def __init__(self):
            super().__init__()
            self.tokens = nn.Embedding(49408, 64)
            self.positions = nn.Parameter(torch.randn(77, 64))
            self.tokens.weight.data.zero_()

        def forward(self, x):
            return ops.pool_end_of_text(self.tokens(x) + self.positions, x)

    def texts(count, length):
        tokens = torch.randint(1, 49405, (count, length), dtype=torch.int32)
        tokens[:, 0] = 49406
        return tokens.scatter(1, 1 + 13 * torch.arange(count)[:, None] % (length - 1), 49407)

    module, example = Pool(), torch.zeros(2, 77, dtype=torch.int32)
    actual, rows = run_in_engine(module, example, precision, draw=texts)
    assert torch.equal(actual, module.positions[rows.argmax(dim=1)].detach())


@pytest.mark.parametrize("shape", [(50, 768), (768,)])
def test_layer_norm_does_not_overflow_in_half(shape):
    """Rows of deviation 400: their squares, and sums of 768 of them, are beyond half's range."""
    torch.manual_seed(0)
    module = One(lambda x, value: nn.functional.layer_norm(x, (768,), value, value), 768)
    actual, rows = run_in_engine(module, torch.zeros(2, *shape), "fp16",
                                 draw=lambda *shape: 400 * torch.randn(shape))
    assert rows.double().square().sum(-1).max() > 1e8
    value = module.value.detach().double()
    expected = nn.functional.layer_norm(rows.double(), (768,), value, value)
    assert (actual - expected).abs().max() < 4 * HALF_ERROR  # values of up to 10


def test_quick_gelu_keeps_its_tails_in_half():
    torch.manual_seed(0)
    module = One(lambda x, _: ops.gelu(x, "quick"))
    actual, rows = run_in_engine(module, torch.zeros(2, 50, 768), "fp16")
    assert (actual - ops.gelu_reference(rows.double(), "quick")).abs().max() < HALF_ERROR


@pytest.mark.parametrize("side, width, precision", [
    (2, 128, "fp32"), (7, 2048, "fp16"), (9, 2560, "fp16")], ids=str)
def test_attention_pool(side, width, precision):
    """Of what a ReLU leaves, with keys that tell tokens apart."""
    torch.manual_seed(0)
    module = Pool(AttentionPool2d(side, width, width // 64, 64)).requires_grad_(False)
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=width ** -0.5)
    module.own.k_proj.weight *= 4
    actual, rows = run_in_engine(module, torch.zeros(2, width, side, side), precision,
                                 draw=lambda *shape: torch.randn(shape).relu())
    expected = module.double().cpu()(rows.double())
    bound = HALF_ERROR if precision == "fp16" else 1e-5
    assert ((actual - expected).norm() / expected.norm()) < bound


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
@pytest.mark.parametrize("channels, stride", [(64, 1), (256, 1), (256, 2)], ids=str)
def test_a_bottleneck(channels, stride, precision):
    torch.manual_seed(0)
    module = Bottleneck(channels, 64, stride).requires_grad_(False)
    for part in module.modules():  # as where they are folded
        for name in [name for name, one in part.named_children()
                     if isinstance(one, nn.BatchNorm2d)]:
            part.add_module(name, nn.Identity())
    actual, rows = run_in_engine(module, torch.zeros(2, channels, 14, 14), precision)
    expected = module.double().cpu()(rows.double())
    bound = HALF_ERROR if precision == "fp16" else 1e-5
    assert ((actual - expected).norm() / expected.norm()) < bound


# What an earlier TensorRT's own matrix products computed wrongly, without a warning: a block
# optimised for a thousand rows.
@pytest.mark.parametrize("blocks, width, std, level, tokens, causal, batch", [
    (2, 128, 0.05, 1, 50, False, STATIC), (2, 128, 0.05, 1, 50, False, DYNAMIC),
    (2, 128, 0.05, 1, 77, True, DYNAMIC), (2, 128, 0.05, 1, 257, False, DYNAMIC),
    (1, 768, 0.03, 3, 197, False, DYNAMIC), (1, 1024, 0.03, 3, 257, False, DYNAMIC)], ids=str)
@pytest.mark.parametrize("passes", [
    pytest.param((), id="tensorrt"),
    pytest.param(graph.FUSE["text"], id="fused", marks=needs.fused)])
def test_blocks(passes, blocks, width, std, level, tokens, causal, batch):
    """Everything that blocks are fused to, biases included."""
    torch.manual_seed(0)
    block = width, width // 64, 4 * width, "quick", causal
    module = nn.Sequential(*(Block(*block) for _ in range(blocks)))
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=std if parameter.dim() > 1 else 0.5)
    module.append(nn.LayerNorm(width))  # so that every addition has one behind it
    example = torch.zeros(2, tokens, width)
    actual, rows = run_in_engine(module, example, "fp16", passes, batch, level)
    expected = module.double().cpu()(rows.double())
    assert ((actual - expected).norm() / expected.norm()) < HALF_ERROR


@needs.fused
def test_a_weight_in_bf16_has_no_fused_kernels():
    module = One(lambda x, _: ops.fused_attention(x, 2, True))
    with pytest.raises(trt.EngineError, match="not build the engine: .*(?i:format|type|attention)"):
        run_in_engine(module, torch.zeros(2, 77, 384), "bf16")


def test_a_timing_cache_is_written_reused_and_harmless(tmp_path):
    """Missing, garbage and unwritable cost time only, and nothing is printed for it."""
    def used_by_a_build(timing_cache):
        example = torch.zeros(2, 64)
        module = lowered(nn.Linear(64, 64), example)
        return trt.build(module, example, STATIC, "fp32", timing_cache=timing_cache)[1]

    (tmp_path / "garbage.cache").write_bytes(b"no cache" * 100)
    (tmp_path / "folder.cache").mkdir()
    for name in ("missing/timing.cache", "garbage.cache", "folder.cache"):
        path = tmp_path / name
        assert used_by_a_build(str(path))["timing_cache"] == str(path)
        assert path.is_dir() or trt.usable_timing_cache(path.read_bytes())
    assert (tmp_path / "folder.cache").is_dir()
    assert used_by_a_build("none")["timing_cache"] is None
    assert not any(child.name.startswith(".timing") for child in tmp_path.rglob("*"))


@pytest.mark.parametrize("fused", [False, pytest.param(True, marks=needs.fused)],
                         ids=["tensorrt", "fused"])
@pytest.mark.parametrize("encoder", ENCODERS)
@pytest.mark.parametrize("model", ["demo", "ViT-B/32"])
def test_an_encoder_is_one_network_of_the_layers_that_were_planned(model, encoder, fused):
    load_plugins()
    passes = graph.FUSE[encoder] if fused else ()
    plain, example, module = encoder_in(model, encoder, "fp16", *passes)
    network, api = construct(module, example, BatchRange(1, 32, 256), "fp16")[0].ctx.net, trt.api()
    kinds = [network.get_layer(i).type for i in range(network.num_layers)]
    assert network.num_inputs == network.num_outputs == 1
    output = network.get_output(0)
    assert tuple(output.shape) == (-1, MODELS[model].embed_dim) and output.dtype == api.float32
    # Attention, four linear layers, an activation and two layer norms a block, and what stands
    # around the blocks.
    plugins = 8 * len(plain.blocks) + (4 if encoder == "image" else 2)
    assert kinds.count(api.LayerType.PLUGIN_V3) == (plugins if fused else 0)
    if hasattr(network, "add_attention") and not fused:
        assert sum("ATTENTION" in str(kind) for kind in kinds) >= len(plain.blocks)


def test_ours_is_the_same_after_another_s_compile():
    """Settings of Torch-TensorRT's converters are of the process: another's must not leak."""
    import torch_tensorrt

    def layers():
        example = torch.zeros(2, 64)
        module = lowered(nn.Linear(64, 64), example)
        return trt.build(module, example, STATIC, "fp32")[1]["network_layers"]

    before = layers()
    module = nn.Sequential(nn.Linear(8, 8), nn.ReLU()).cuda()
    x = torch.zeros(2, 8, device="cuda")
    torch_tensorrt.dynamo.compile(
        torch.export.export(module, (x,)), inputs=[x], min_block_size=1,
        torch_executed_ops={"clip_ttrt::linear", ops.linear})
    assert layers() == before
