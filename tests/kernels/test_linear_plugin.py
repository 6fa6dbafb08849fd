"""Engines of the linear layers' plugin alone."""

import ctypes

import one_layer
import pytest
import torch

from clip_ttrt import kernels, linear

pytestmark = pytest.mark.gpu

OUTPUTS, INPUTS = 64, 128
WEIGHT, BIAS = (torch.half, (OUTPUTS, INPUTS)), (torch.half, (OUTPUTS,))


@pytest.fixture(scope="module")
def trt():
    return one_layer.tensorrt()


def plugin(trt, table):
    return one_layer.create(trt, kernels.LINEAR, {"table": table})


def tensors(bias):
    weight = torch.randn(OUTPUTS, INPUTS, device="cuda").half()
    return [weight, *[torch.randn(OUTPUTS, device="cuda").half()] * bias]


@pytest.mark.parametrize("bias", [False, True])
def test_engine_runs_what_the_wrapper_runs(trt, bias):
    """Measured for 1 and 64 rows, run for others too: the table is in the engine."""
    torch.manual_seed(0)
    table = linear.tune([1, 64], (OUTPUTS, INPUTS), bias)
    inputs = [(torch.half, (-1, INPUTS)), WEIGHT, *[BIAS] * bias]
    engine = one_layer.Engine(trt, one_layer.build(trt, plugin(trt, table), inputs))
    constants = tensors(bias)
    for rows in (1, 7, 64):
        x = torch.randn(rows, INPUTS, device="cuda").half()
        assert torch.equal(engine(x, *constants)[0], linear.linear(x, *constants, table=table))


def test_graph_capture_replays(trt):
    inputs = [(torch.half, (-1, INPUTS)), WEIGHT]
    plan = one_layer.build(trt, plugin(trt, linear.pack(OUTPUTS, INPUTS, False)), inputs)
    context = one_layer.Engine(trt, plan).context
    [weight], x = tensors(False), torch.randn(5, INPUTS, device="cuda").half()
    expected = linear.linear(x, weight)
    out = torch.full((5, OUTPUTS), float("nan"), device="cuda").half()
    for name, tensor in (("x0", x), ("x1", weight), ("y0", out)):
        context.set_tensor_address(name, tensor.data_ptr())
    assert context.set_input_shape("x0", tuple(x.shape))
    # TensorRT wants one launch at these sizes ahead of a capture.
    assert context.execute_async_v3(torch.cuda.current_stream().cuda_stream)
    torch.cuda.synchronize()
    out.fill_(float("nan"))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        assert context.execute_async_v3(torch.cuda.current_stream().cuda_stream)
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(out, expected)


@pytest.mark.parametrize(
    "inputs",
    [
        [(torch.half, (INPUTS,)), WEIGHT],
        [(torch.half, (5, INPUTS - 1)), WEIGHT],
        [(torch.half, (5, INPUTS)), (torch.half, (OUTPUTS, INPUTS - 1))],
        [(torch.half, (5, INPUTS)), WEIGHT, BIAS],
    ],
)
def test_wrong_inputs_make_no_engine(trt, inputs, capfd):
    made = plugin(trt, linear.pack(OUTPUTS, INPUTS, False))
    assert one_layer.build(trt, made, inputs) is None
    assert f"{kernels.LINEAR} plugin:" in capfd.readouterr().err


def test_a_table_of_another_cublaslt_is_told_once(trt, capfd):
    entry = linear.Entry(1, (ctypes.c_uint64 * 8)())
    table = linear.pack(OUTPUTS, INPUTS, False, [entry], linear.version() + 1)
    for _ in range(2):
        assert plugin(trt, table) is not None
    # Once in a process, which another test may have been.
    assert capfd.readouterr().err.count("another cuBLASLt") <= 1
