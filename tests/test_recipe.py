"""How engines of TensorRT's own kernels are built, by what the graph holds."""
import pytest
import torch

from clip_ttrt import lowering, ops, recipe
from clip_ttrt.checkpoint import load_checkpoint
from clip_ttrt.encoders import ENCODERS
from clip_ttrt.models import MODELS
from clip_ttrt.options import BatchRange
from clip_ttrt.pipeline import example_input
from clip_ttrt.recipe import Recipe
import needs

pytestmark = needs.export

STATIC, RANGE = BatchRange.parse(32), BatchRange.parse("1:32:256")


class Attention(torch.nn.Module):
    """Nothing but the op of which a recipe reads the sizes."""

    def __init__(self, heads: int, causal: bool):
        super().__init__()
        self.heads, self.causal = heads, causal

    def forward(self, qkv):
        return ops.attention(qkv, self.heads, self.causal)


@pytest.fixture(scope="module")
def graphs():
    """The lowered graph of each encoder of the demo model."""
    state_dict = load_checkpoint("demo", "random").state_dict
    made = {name: lowering.capture(ENCODERS[name](state_dict), example_input(name, MODELS["demo"])) for name in ENCODERS}
    for graph in made.values():
        lowering.lower(graph)
    return made


@pytest.mark.parametrize("encoder", ["image", "text"])
def test_a_static_batch_may_use_cublas(graphs, encoder):
    assert recipe.choose(graphs[encoder], STATIC, "fp16", "native") == Recipe(cublas=True)


@pytest.mark.parametrize("batch", ["1:32:256", "1:1:8", "1:48:256", "4:100:128"])
def test_a_range_of_images_has_separate_mlps(graphs, batch):
    assert recipe.choose(graphs["image"], BatchRange.parse(batch), "fp16", "native") == Recipe(row_maxima=True, separate_mlps=True)


@pytest.mark.parametrize("batch", ["1:32:256", "1:1:8", "3:64:100"])
def test_a_range_of_texts_is_compiled_for_powers_of_two_where_it_is_tuned_for_one(graphs, batch):
    assert recipe.choose(graphs["text"], BatchRange.parse(batch), "fp16", "native") == Recipe(cublas=True, powers=True)


@pytest.mark.parametrize("batch", ["1:48:256", "4:100:128"])
def test_another_range_of_texts_has_row_maxima(graphs, batch):
    assert recipe.choose(graphs["text"], BatchRange.parse(batch), "fp16", "native") == Recipe(cublas=True, row_maxima=True)


@pytest.mark.parametrize("tokens, width, causal, batch, separate", [
    (257, 1024, False, "1:4:16", True), (257, 1024, False, "1:32:256", False), (577, 1024, False, "1:32:256", False), (197, 768, False, "1:32:256", True),
    (77, 512, True, "1:48:256", False), (77, 768, True, "1:12:256", True)])
def test_mlps_are_separate_by_width_and_rows(tokens, width, causal, batch, separate):
    graph = lowering.capture(Attention(width // 64, causal), torch.zeros(2, tokens, 3 * width))
    lowering.lower(graph)
    assert recipe.choose(graph, BatchRange.parse(batch), "fp16", "native").separate_mlps == separate


def test_a_graph_without_attention_has_a_recipe_too():
    graph = lowering.capture(torch.nn.Linear(64, 64), torch.zeros(2, 64))
    lowering.lower(graph)
    assert recipe.choose(graph, RANGE, "fp16", "native") == Recipe(row_maxima=True, separate_mlps=True)


@pytest.mark.parametrize("precision", ["fp32", "tf32"])
def test_without_half_a_range_has_row_maxima_alone(graphs, precision):
    for graph in graphs.values():
        assert recipe.choose(graph, RANGE, precision, "native") == Recipe(row_maxima=True)
        assert recipe.choose(graph, STATIC, precision, "native") == Recipe()


@pytest.mark.parametrize("batch", [STATIC, RANGE], ids=str)
def test_with_the_plugins_an_engine_is_built_as_tensorrt_comes(graphs, batch):
    assert all(recipe.choose(graph, batch, "fp16", "plugin") == Recipe() for graph in graphs.values())
