"""Converters in engines of their own, against the PyTorch reference in fp64, static and dynamic: what tests/rtx cannot run."""
import sys

import pytest
import torch
from torch import nn

import needs
from clip_ttrt import graph, kernels, ops, trt
from clip_ttrt.encoders import Block, FusedOps
from clip_ttrt.options import BatchRange
from clip_ttrt.pipeline import DTYPES

pytestmark = pytest.mark.gpu

STATIC, DYNAMIC = BatchRange(4, 4, 4), BatchRange(1, 4, 8)
HALF_ERROR = 4e-3  # a few roundings to half (2^-11 each) of values of order 1


class One(nn.Module):
    """A function of one input and a parameter, as a module."""

    def __init__(self, function, *shape):
        super().__init__()
        self.function, self.value = function, nn.Parameter(torch.randn(shape or (1,)))

    def forward(self, x):
        return self.function(x, self.value)


class Blocks(nn.Module):
    """Transformer blocks and a last layer norm, so that every addition has one behind it."""

    def __init__(self, blocks):
        super().__init__()
        self.blocks, self.norm = blocks, nn.LayerNorm(blocks[0].out.in_features).to(blocks[0].qkv.weight)

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return self.norm(x)


def run_in_engine(module, example, precision, passes=(), batch=DYNAMIC, count=5, level=1):
    """Export, lower, rewrite by passes, build and run; returns what the engine gives for `count` fresh rows, and the rows."""
    dtype = DTYPES[precision]
    example = example.to(dtype) if example.is_floating_point() else example
    module = module.to(dtype).eval().requires_grad_(False)
    lowered = graph.capture(module, example)
    graph.run(lowered, graph.LOWER)
    if passes:
        trt.load_runtime("tensorrt")
        kernels.load(kernels.version())
        assert all(graph.run(lowered, passes, needed=passes).values())
    engine = trt.build(lowered, example, batch, precision, level)
    rows = fresh_rows(example, batch.optimal if batch.static else count)
    compiled = trt.to_torchscript(engine, fresh_rows(example, batch.optimal).cuda())
    with torch.no_grad():
        return compiled(rows.cuda()).cpu(), rows


def fresh_rows(example, count):
    if example.is_floating_point():
        return torch.randn(count, *example.shape[1:]).to(example.dtype)
    tokens = torch.randint(1, 49405, (count, example.shape[1]), dtype=torch.int32)
    tokens[:, 0] = 49406
    for row in range(count):
        tokens[row, 1 + (row * 13) % (example.shape[1] - 1)] = 49407
    return tokens


def attention_in_half(qkv, heads, causal):
    """Attention whose scores and weights are rounded to half between its steps, as where no kernel does it in one."""
    query, key, value = qkv.unflatten(-1, (3, heads, 64)).permute(2, 0, 3, 1, 4).float()
    scores = (query / 8 @ key.mT).half().float()
    if causal:
        scores = scores.masked_fill(torch.ones(scores.shape[-2:]).triu(1).bool(), -torch.inf)
    return (scores.softmax(-1).half().float() @ value).half().transpose(1, 2).flatten(2)


@pytest.mark.parametrize("tokens, causal, batch", [(50, False, DYNAMIC), (77, True, STATIC), (77, True, DYNAMIC), (257, False, DYNAMIC), (577, False, DYNAMIC)], ids=str)
def test_attention(tokens, causal, batch):
    """At most twice the error of the same steps in half: with a mask TensorRT 10.6 has no one kernel for a range."""
    torch.manual_seed(0)
    actual, rows = run_in_engine(One(lambda x, _: ops.attention(x, 3, causal)), torch.zeros(2, tokens, 576), "fp16", batch=batch)
    exact = ops.attention_reference(rows.double(), 3, causal)
    error, half_error = ((features - exact).abs().max() for features in (actual, attention_in_half(rows, 3, causal)))
    assert error < 2 * half_error, (error, half_error)
    assert (actual - exact).norm() / exact.norm() < HALF_ERROR / 4


def test_extract_patches():
    actual, rows = run_in_engine(One(lambda x, _: ops.extract_patches(x, 4)), torch.zeros(2, 3, 16, 16), "fp32")
    assert torch.equal(actual, ops.extract_patches_reference(rows, 4))


def test_prepend_class_token_whatever_the_patches_hold(monkeypatch):
    torch.manual_seed(0)
    module = One(ops.prepend_class_token, 64)

    def rows_with_an_infinity(example, count):
        return torch.randn(count, *example.shape[1:]).index_fill(1, torch.tensor([0]), torch.inf)

    monkeypatch.setattr(sys.modules[__name__], "fresh_rows", rows_with_an_infinity)
    actual, rows = run_in_engine(module, torch.zeros(2, 49, 64), "fp32")
    assert torch.equal(actual, ops.prepend_class_token_reference(rows, module.value.detach()))


@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
def test_pool_end_of_text_is_exact(precision):
    """The row of each position in a fixed table, so that the position chosen shows."""
    torch.manual_seed(0)

    class Pool(nn.Module):
        def __init__(self):
            super().__init__()
            self.tokens, self.positions = nn.Embedding(49408, 64), nn.Parameter(torch.randn(77, 64))
            self.tokens.weight.data.zero_()

        def forward(self, x):
            return ops.pool_end_of_text(self.tokens(x) + self.positions, x)

    module = Pool()
    actual, rows = run_in_engine(module, torch.zeros(2, 77, dtype=torch.int32), precision)
    assert torch.equal(actual, module.positions[rows.argmax(dim=1)].detach())


@pytest.mark.parametrize("shape", [(50, 768), (768,)])
def test_layer_norm_does_not_overflow_in_half(shape, monkeypatch):
    """Rows of a deviation of 400: their squares, and sums of 768 of them, are beyond half's range."""
    torch.manual_seed(0)
    module = One(lambda x, value: nn.functional.layer_norm(x, (768,), value, value), 768)

    def scaled_rows(example, count):
        return (400 * torch.randn(count, *example.shape[1:])).to(example.dtype)

    monkeypatch.setattr(sys.modules[__name__], "fresh_rows", scaled_rows)
    actual, rows = run_in_engine(module, torch.zeros(2, *shape), "fp16")
    assert rows.double().square().sum(-1).max() > 1e8
    value = module.value.detach().double()
    expected = nn.functional.layer_norm(rows.double(), (768,), value, value)
    assert (actual - expected).abs().max() < 4 * HALF_ERROR  # values of up to 10


def test_quick_gelu_keeps_its_tails_in_half():
    torch.manual_seed(0)
    actual, rows = run_in_engine(One(lambda x, _: ops.quick_gelu(x)), torch.zeros(2, 50, 768), "fp16")
    assert (actual - ops.quick_gelu_reference(rows.double())).abs().max() < HALF_ERROR


def blocks(count, width, causal, std, bias):
    module = nn.ModuleList([Block(width, width // 64, causal, FusedOps()) for _ in range(count)])
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=std if parameter.dim() > 1 else bias)
    return Blocks(module)


FUSED = [rewrite for rewrite in graph.FUSE if rewrite is not graph.fuse_image_embedding]
KERNELS = pytest.mark.parametrize("passes", [pytest.param((), id="tensorrt"), pytest.param(FUSED, id="fused", marks=needs.fused)])


@KERNELS
@pytest.mark.parametrize("tokens, causal, batch", [(50, False, STATIC), (50, False, DYNAMIC), (77, True, DYNAMIC), (257, False, DYNAMIC)], ids=str)
def test_two_blocks(tokens, causal, batch, passes):
    """Everything that blocks are fused to, biases included."""
    torch.manual_seed(0)
    module = blocks(2, 128, causal, 0.05, 0.5)
    actual, rows = run_in_engine(module, torch.zeros(2, tokens, 128), "fp16", passes, batch)
    expected = module.double().cpu()(rows.double())
    assert ((actual - expected).norm() / expected.norm()) < HALF_ERROR


@KERNELS
@pytest.mark.parametrize("tokens, width", [(197, 768), (257, 1024)])
def test_a_block_optimised_for_a_thousand_rows(tokens, width, passes):
    """What an earlier TensorRT's own matrix products computed wrongly, without a warning."""
    torch.manual_seed(0)
    module = blocks(1, width, False, 0.03, 0.5)
    actual, rows = run_in_engine(module, torch.zeros(2, tokens, width), "fp16", passes, level=3)
    expected = module.double().cpu()(rows.double())
    assert ((actual - expected).norm() / expected.norm()) < HALF_ERROR


@needs.fused
def test_a_weight_in_bf16_has_no_fused_kernels():
    with pytest.raises(trt.EngineError, match="could not build the engine: .*(?i:format|type|attention)"):
        run_in_engine(One(lambda x, _: ops.fused_attention(x, 2, True)), torch.zeros(2, 77, 384), "bf16")


def test_a_refused_network_is_told_in_tensorrt_s_words():
    lowered = graph.capture(One(ops.add, 5).requires_grad_(False), torch.zeros(2, 5))
    lowered.value = nn.Parameter(torch.zeros(4), requires_grad=False)
    with pytest.raises(trt.EngineError, match="(?i)broadcast|dimension"):
        trt.build(lowered, torch.zeros(2, 5), STATIC, "fp32")


def test_a_timing_cache_is_written_reused_and_harmless(tmp_path):
    """Missing, garbage and unwritable cost time only, and nothing is printed for it."""
    module, example = nn.Linear(64, 64), torch.zeros(2, 64)
    for name in ("missing/timing.cache", "garbage.cache", "folder.cache"):
        path = tmp_path / name
        if name.startswith("garbage"):
            path.write_bytes(b"no cache" * 100)
        if name.startswith("folder"):
            path.mkdir()
        lowered = graph.capture(module.eval().requires_grad_(False), example)
        graph.run(lowered, graph.LOWER)
        engine = trt.build(lowered, example, STATIC, "fp32", timing_cache=str(path))
        assert engine.timing_cache == str(path)
        assert path.is_dir() if name.startswith("folder") else trt.usable_timing_cache(path.read_bytes())
    assert trt.build(lowered, example, STATIC, "fp32", timing_cache="none").timing_cache is None
    assert not any(child.name.startswith(".timing") for child in tmp_path.rglob("*"))


def test_ours_is_the_same_after_another_s_compile():
    """Settings of Torch-TensorRT's converters are of the whole process: another's must not leak into ours."""
    import torch_tensorrt

    module, example = nn.Linear(64, 64), torch.zeros(2, 64)

    def layers():
        lowered = graph.capture(module.eval().requires_grad_(False), example)
        graph.run(lowered, graph.LOWER)
        return trt.build(lowered, example, STATIC, "fp32").layers

    before = layers()
    other = torch.export.export(nn.Sequential(nn.Linear(8, 8), nn.ReLU()).cuda(), (torch.zeros(2, 8, device="cuda"),))
    torch_tensorrt.dynamo.compile(other, inputs=[torch.zeros(2, 8, device="cuda")], min_block_size=1, torch_executed_ops={"clip_ttrt::linear", ops.linear})
    assert layers() == before
