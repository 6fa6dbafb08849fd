"""How engines of TensorRT's own kernels are built, by what the graph holds."""
import pytest

from clip_ttrt import lowering, recipe
from clip_ttrt.checkpoint import load_checkpoint
from clip_ttrt.encoders import ENCODERS
from clip_ttrt.models import MODELS
from clip_ttrt.options import BatchRange
from clip_ttrt.pipeline import example_input
from clip_ttrt.recipe import Recipe

pytestmark = pytest.mark.skipif(not lowering.can_export(), reason="torch.export of PyTorch 2.2 needs Python 3.11 or older")

STATIC, RANGE = BatchRange.parse(32), BatchRange.parse("1:32:256")


@pytest.fixture(scope="module")
def graphs():
    """The lowered graph of each encoder of the demo model."""
    state_dict = load_checkpoint("demo", "random").state_dict
    made = {name: lowering.capture(ENCODERS[name](state_dict), example_input(name, MODELS["demo"])) for name in ENCODERS}
    for graph in made.values():
        lowering.lower(graph)
    return made


def test_only_texts_are_causal(graphs):
    assert recipe.is_causal(graphs["text"]) and not recipe.is_causal(graphs["image"])


@pytest.mark.parametrize("encoder", ["image", "text"])
def test_a_static_batch_may_use_cublas(graphs, encoder):
    assert recipe.choose(graphs[encoder], STATIC, "fp16", "native") == Recipe(cublas=True)


@pytest.mark.parametrize("batch", ["1:32:256", "1:1:8", "1:48:256", "4:100:128"])
def test_a_range_is_built_by_whether_attention_is_causal(graphs, batch):
    batch = BatchRange.parse(batch)
    assert recipe.choose(graphs["text"], batch, "fp16", "native") == Recipe(cublas=True, row_maxima=True)
    assert recipe.choose(graphs["image"], batch, "fp16", "native") == Recipe(row_maxima=True, separate_mlps=True)


@pytest.mark.parametrize("precision", ["fp32", "tf32"])
def test_without_half_a_range_has_row_maxima_alone(graphs, precision):
    for graph in graphs.values():
        assert recipe.choose(graph, RANGE, precision, "native") == Recipe(row_maxima=True)
        assert recipe.choose(graph, STATIC, precision, "native") == Recipe()


@pytest.mark.parametrize("batch", [STATIC, RANGE], ids=str)
def test_with_the_plugins_an_engine_is_built_as_tensorrt_comes(graphs, batch):
    assert all(recipe.choose(graph, batch, "fp16", "plugin") == Recipe() for graph in graphs.values())
