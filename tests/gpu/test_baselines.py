"""What our engines are compared with, on a GPU: the ONNX road's engine, and that each can be captured."""
import pytest
import torch

from experiments import baselines, load
from experiments.timing import graphed

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module")
def request_fp32(tmp_path_factory):
    return baselines.Request("demo", "demo", "text", "fp32", 4, 77, "cuda", artifacts=str(tmp_path_factory.mktemp("artifacts")), level=0)


def test_tensorrt_through_onnx_gives_the_features_and_is_kept(request_fp32):
    pytest.importorskip("onnx", reason="PyTorch's ONNX export needs the onnx package, which is not installed")
    subject = baselines.tensorrt_onnx(request_fp32)
    with torch.no_grad():
        expected = baselines.plain(request_fp32)(subject.x)
        assert not subject.remark and (subject.call() - expected).norm() / expected.norm() < 1e-4
        features = subject.call()
        replay = graphed(subject.call)
        features.zero_()
        replay()
        torch.cuda.synchronize()
        assert (features - expected).norm() / expected.norm() < 1e-4
    again = baselines.tensorrt_onnx(request_fp32)
    assert again.build_s == subject.build_s and torch.equal(again.call(), subject.call())


@pytest.mark.parametrize("graph", [False, True])
def test_clients_on_streams_of_their_own_get_their_own_features(graph, request_fp32):
    module = baselines.plain(request_fp32)
    rows = [baselines.example(request_fp32).roll(shift, dims=0) for shift in range(3)]
    clients = [load.Client(module, one, "cuda", graph) for one in rows]
    wall, latencies = load.drive(clients, 0.3)
    assert wall >= 0.3 and len(latencies) >= 3
    with torch.no_grad():
        for client, one in zip(clients, rows):
            assert torch.allclose(client.features, module(one).cpu(), atol=1e-5)
