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


def test_a_range_is_built_by_whether_attention_is_causal(graphs):
    assert recipe.choose(graphs["text"], RANGE, "fp16", "native").powers
    image = recipe.choose(graphs["image"], RANGE, "fp16", "native")
    assert image.row_maximum and not image.powers  # with it TensorRT leaves attention in pieces


@pytest.mark.parametrize("batch, powers", [("1:32:256", True), ("1:1:8", True), ("1:256:300", True), ("1:48:256", False), ("1:33:64", False), ("4:100:128", False)])
def test_a_text_range_is_padded_nowhere_at_the_size_that_it_is_tuned_for(graphs, batch, powers):
    assert recipe.choose(graphs["text"], BatchRange.parse(batch), "fp16", "native") == (Recipe(cublas=True, powers=True) if powers else Recipe())
    assert recipe.choose(graphs["image"], BatchRange.parse(batch), "fp16", "native") == Recipe(row_maximum=True)


@pytest.mark.parametrize("precision, attention", [("fp16", "plugin"), ("fp32", "native"), ("tf32", "native")])
@pytest.mark.parametrize("batch", [STATIC, RANGE], ids=str)
def test_all_else_is_built_as_tensorrt_comes(graphs, batch, precision, attention):
    assert all(recipe.choose(graph, batch, precision, attention) == Recipe() for graph in graphs.values())
