"""Engines of the attention plugin alone."""

import needs
import one_layer
import pytest
import torch

from clip_ttrt import kernels

pytestmark = [pytest.mark.gpu, needs.ampere]

HEADS, TOKENS, WIDTH = 12, 77, 12 * 64
QKV, BIAS = (torch.half, (2 * TOKENS, 3 * WIDTH)), (torch.float32, (WIDTH,))


@pytest.fixture(scope="module")
def trt():
    return one_layer.tensorrt()


def plugin(trt, bias, causal=1):
    fields = {"heads": HEADS, "tokens": TOKENS, "causal": causal, "query_bias": bias}
    return one_layer.create(trt, kernels.ATTENTION, fields)


@pytest.mark.parametrize("bias", [0, 1])
@pytest.mark.parametrize("flat", [False, True])
def test_engine_gives_the_bits_of_the_launcher(trt, bias, flat):
    batch = 5
    shape = (batch * TOKENS, 3 * WIDTH) if flat else (batch, TOKENS, 3 * WIDTH)
    inputs = [(torch.half, shape)] + [BIAS] * bias
    engine = one_layer.Engine(trt, one_layer.build(trt, plugin(trt, bias), inputs))
    torch.manual_seed(0)
    qkv = torch.randn(shape, device="cuda").half()
    query_bias = [torch.randn(WIDTH, device="cuda")] * bias
    [out] = engine(qkv, *query_bias)
    expected = kernels.attention(qkv.view(batch, TOKENS, 3 * WIDTH), HEADS, True, *query_bias)
    assert torch.equal(out.view_as(expected), expected)


def test_one_engine_runs_every_batch_of_its_range(trt):
    inputs = [(torch.half, (-1, TOKENS, 3 * WIDTH))]
    engine = one_layer.Engine(trt, one_layer.build(trt, plugin(trt, 0, causal=0), inputs))
    for batch in (1, 7, 64):
        qkv = torch.randn(batch, TOKENS, 3 * WIDTH, device="cuda").half()
        assert torch.equal(engine(qkv)[0], kernels.attention(qkv, HEADS, False))


@pytest.mark.parametrize(
    "bias, inputs",
    [
        (1, [QKV]),
        (0, [QKV, BIAS]),
        (1, [QKV, (torch.float32, (WIDTH - 1,))]),
        (1, [QKV, (torch.float32, (1, WIDTH))]),
        (0, [(torch.half, (2 * TOKENS, 2 * WIDTH))]),
        (0, [(torch.half, (2 * TOKENS + 1, 3 * WIDTH))]),
        (0, [(torch.half, (3 * WIDTH,))]),
    ],
)
def test_wrong_inputs_make_no_engine(trt, bias, inputs, capfd):
    assert one_layer.build(trt, plugin(trt, bias), inputs) is None
    assert f"{kernels.ATTENTION} plugin:" in capfd.readouterr().err


@pytest.mark.parametrize("inputs", [[(torch.float32, QKV[1]), BIAS], [QKV, (torch.half, BIAS[1])]])
def test_other_types_make_no_engine(trt, inputs):
    assert one_layer.build(trt, plugin(trt, 1), inputs) is None
