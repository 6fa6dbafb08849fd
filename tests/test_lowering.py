"""Export and lowering: one graph of known operations, without sizes, for any batch."""
import pytest
import torch
from torch import nn

from clip_ttrt import lowering, ops, torchscript
from clip_ttrt.backends import Backend
from clip_ttrt.checkpoint import load_checkpoint
from clip_ttrt.encoders import ENCODERS
from clip_ttrt.models import MODELS
from clip_ttrt.pipeline import build_torchscript, example_input
from clip_ttrt.progress import Progress
import needs




@pytest.fixture(scope="module")
def state_dict():
    return load_checkpoint("demo", "random").state_dict


@needs.export
@pytest.mark.parametrize("encoder", ENCODERS)
def test_every_rewrite_is_made_and_nothing_else_is_left(encoder, state_dict):
    plain, example = ENCODERS[encoder](state_dict), example_input(encoder, MODELS["demo"])
    graph = lowering.capture(plain, example)
    counts = lowering.lower(graph)
    blocks = len(plain.blocks)
    assert counts["recompose_linear"] == 4 * blocks + (2 if encoder == "image" else 1)
    assert counts["recompose_layer_norm"] == 2 * blocks + (2 if encoder == "image" else 1)
    targets = {node.target for node in graph.graph.nodes if node.op == "call_function"}
    assert targets <= lowering.OPERATIONS
    assert ops.attention_rows in targets and ops.attention not in targets
    assert not any(isinstance(node.meta.get("val"), torch.SymInt) for node in graph.graph.nodes)


@needs.export
@pytest.mark.parametrize("encoder", ENCODERS)
def test_activations_flow_as_rows(encoder, state_dict):
    """Between tokens that are joined or positioned and the two poolings, nothing sees three dimensions."""
    plain, example = ENCODERS[encoder](state_dict), example_input(encoder, MODELS["demo"])
    graph = lowering.capture(plain, example)
    assert lowering.lower(graph)["flatten_rows"] >= 8 * (len(plain.blocks) - 1)
    views = [node for node in graph.graph.nodes if node.target is torch.ops.aten.view.default]
    assert len(views) == (5 if encoder == "image" else 3)
    shapes = {}

    class Recorder(torch.fx.Interpreter):
        def run_node(self, node):
            shapes[node] = super().run_node(node)
            return shapes[node]

    with torch.no_grad():
        Recorder(graph).run(example)
    assert all(shapes[node].dim() == 2 for node in graph.graph.nodes if node.target is torch.ops.aten.linear.default)


@needs.export
@pytest.mark.parametrize("encoder", ENCODERS)
def test_lowered_and_traced_graphs_serve_other_batches(encoder, state_dict):
    torch.manual_seed(0)
    plain, example = ENCODERS[encoder](state_dict), example_input(encoder, MODELS["demo"])
    graph = lowering.capture(plain, example)
    lowering.lower(graph)
    traced = torchscript.build(graph, example)
    rows = torch.randn(5, *example.shape[1:]) if encoder == "image" else torch.randint(0, 49408, (5, 77), dtype=torch.int32)
    with torch.no_grad():
        expected = plain(rows)
        assert torch.allclose(graph(rows), expected, atol=1e-6)
        assert torch.allclose(traced(rows), expected, atol=1e-6)
        assert torch.allclose(traced(rows[:1]), expected[:1], atol=1e-5)


@needs.export
def test_text_of_another_length_folds_its_positions(state_dict):
    plain = ENCODERS["text"](state_dict)
    graph = lowering.capture(plain, torch.zeros(2, 20, dtype=torch.int32))
    assert lowering.lower(graph)["fold_parameter_slices"] == 1
    rows = torch.randint(0, 49408, (3, 20))
    with torch.no_grad():
        assert torch.allclose(graph(rows), plain(rows), atol=1e-6)


@needs.export
def test_an_operation_without_an_implementation_is_named():
    class Unsupported(nn.Module):
        def forward(self, x):
            return torch.cumsum(x, dim=1)

    with pytest.raises(lowering.LoweringError, match="cumsum"):
        lowering.lower(lowering.capture(Unsupported(), torch.zeros(2, 4)))


@needs.export
def test_a_size_that_stays_is_an_error_and_not_a_graph_break():
    class UsesBatch(nn.Module):
        def forward(self, x):
            return x * x.shape[0]

    with pytest.raises(lowering.LoweringError, match="sym_size"):
        lowering.lower(lowering.capture(UsesBatch(), torch.zeros(2, 4)))


@pytest.mark.parametrize("encoder", ENCODERS)
def test_where_nothing_can_be_exported_the_encoder_is_traced_as_it_is(encoder, monkeypatch):
    checkpoint = load_checkpoint("demo")
    monkeypatch.setattr(lowering, "can_export", lambda: False)
    backend = Backend("torchscript", "cpu", "fp32", "a test")
    example = example_input(encoder, MODELS["demo"])
    module, facts, _ = build_torchscript(encoder, checkpoint, backend, example, Progress(quiet=True))
    rows = torch.randn(5, *example.shape[1:]) if encoder == "image" else torch.randint(0, 49408, (5, 77), dtype=torch.int32)
    with torch.no_grad():
        assert torch.allclose(module(rows), ENCODERS[encoder](checkpoint.state_dict)(rows), atol=1e-5)
    assert facts["rewrites"] == {}
