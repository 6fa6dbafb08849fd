"""Networks of whole encoders as they are handed to TensorRT, constructed and not built: what a builder without this GPU's kernels still tells."""
import pytest

import needs
from clip_ttrt import graph, kernels, trt
from clip_ttrt.checkpoint import load_checkpoint
from clip_ttrt.encoders import ENCODERS
from clip_ttrt.models import MODELS
from clip_ttrt.options import BatchRange
from clip_ttrt.pipeline import example_input, in_precision

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("fused", [False, pytest.param(True, marks=needs.fused)], ids=["tensorrt", "fused"])
@pytest.mark.parametrize("encoder", ENCODERS)
@pytest.mark.parametrize("model", ["demo", "ViT-B/32"])
def test_an_encoder_is_one_network_of_the_layers_that_were_planned(model, encoder, fused):
    dims = MODELS[model]
    plain, example = in_precision(ENCODERS[encoder](load_checkpoint(model, "random").state_dict), "fp16"), example_input(encoder, dims)
    lowered = graph.capture(plain, example)
    graph.lower(lowered)
    if fused:
        trt.load_runtime("tensorrt")
        kernels.load(kernels.version())
        graph.fuse(lowered)
    construction = trt.construct(lowered, example, BatchRange(1, 32, 256), "fp16")
    network, api = construction.network, trt.api()
    kinds = [network.get_layer(i).type for i in range(network.num_layers)]
    assert network.num_inputs == network.num_outputs == 1
    assert tuple(network.get_output(0).shape) == (-1, dims.embed_dim) and network.get_output(0).dtype == api.float32
    blocks, is_image = len(plain.blocks), encoder == "image"
    # Attention, four linear layers, an activation and two layer norms a block, and what stands around the blocks.
    plugins = 8 * blocks + (4 if is_image else 2)
    assert kinds.count(api.LayerType.PLUGIN_V3) == (plugins if fused else 0)
    if hasattr(network, "add_attention") and not fused:
        assert sum("ATTENTION" in str(kind) for kind in kinds) >= blocks
