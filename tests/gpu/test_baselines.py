"""What our engines are compared with, on a GPU: right, and captured and timed as they are told."""
import pytest
import torch

from experiments import baselines, load
from experiments.timing import gpu_times_ms, launch_times_us

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("encoder", ["image", "text"])
def test_peers_give_the_plain_encoder_s_features(encoder):
    x = baselines.example("demo", encoder, 4, torch.half, "cuda")
    with torch.no_grad():
        rows = x.float() if encoder == "image" else x
        expected = baselines.plain("demo", encoder, "fp32", "cuda")(rows)
        for name, peer in baselines.PEERS.items():
            if name != "onnxruntime":
                features = peer("demo", encoder, "fp16", "cuda")(x).float()
                assert torch.cosine_similarity(features, expected).min() > 0.999, name


def test_times_are_the_gpu_s():
    wait = 2_000_000  # clock cycles, some milliseconds
    for times in (lambda call: gpu_times_ms(call, 9, 2),
                  lambda call: launch_times_us(call, [()] * 2, "cuda", 0.1)):  # fmt: skip
        short, long = (
            sorted(times(lambda c=cycles: torch.cuda._sleep(c)))[4] for cycles in (wait, 4 * wait)
        )
        assert short > 0.3 and long == pytest.approx(4 * short, rel=0.3)


@pytest.mark.parametrize("on", ["gpu", "host"])
@pytest.mark.parametrize("graph", [False, True])
def test_clients_on_streams_of_their_own_get_their_own_features(graph, on):
    module = baselines.plain("demo", "text", "fp32", "cuda")
    x = baselines.example("demo", "text", 4, torch.float32, "cuda")
    rows = [x.roll(shift, dims=0) for shift in range(3)]
    clients = [load.Client(lambda x: module(x.cuda()), one, "cuda", on, graph) for one in rows]
    wall, latencies = load.drive(clients, 0.3)
    assert wall >= 0.3 and len(latencies) >= 3
    with torch.no_grad():
        for client, one in zip(clients, rows, strict=True):
            assert client.features.is_cuda is (on == "gpu")
            expected = module(one)
            torch.testing.assert_close(client.features.cuda(), expected, atol=1e-5, rtol=1e-4)
