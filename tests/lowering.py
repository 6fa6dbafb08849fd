"""What the tests of graphs and networks share: modules, batch ranges, lowered graphs, networks."""
import importlib

import torch
from torch import nn

from clip_ttrt import families, graph, ops, trt
from clip_ttrt.checkpoint import load_checkpoint
from clip_ttrt.engine import example_input, in_precision
from clip_ttrt.guard import lengths_of
from clip_ttrt.models import MODELS
from clip_ttrt.options import BatchRange

STATIC, DYNAMIC = BatchRange(4, 4, 4), BatchRange(1, 4, 8)


class One(nn.Module):
    """A function of one input and a parameter, as a module."""

    def __init__(self, function, *shape):
        super().__init__()
        self.function, self.value = function, nn.Parameter(torch.randn(shape or (1,)))

    def forward(self, x):
        return self.function(x, self.value)


class Pool(nn.Module):
    """The op `attention_pool` and the projection behind it, of the parameters of clip's module."""

    def __init__(self, own):
        super().__init__()
        self.own = own

    def forward(self, x):
        own = self.own
        return own.c_proj(ops.attention_pool(
            x, own.positional_embedding, own.q_proj.weight, own.q_proj.bias, own.k_proj.weight,
            own.v_proj.weight))


def lowered(module, example, *passes, shortest=0):
    """A module's graph after lowering, which need not find anything here, and passes."""
    found = graph.capture(module.eval().requires_grad_(False), example, shortest)
    list(graph.lower(found))
    found.graph.eliminate_dead_code()
    graph.run(found, passes)
    return found


def encoder_in(model, encoder, precision, *passes, state_dict=None, wide=()):
    """An encoder with random weights, its example, and its lowered graph after passes."""
    state_dict = state_dict or load_checkpoint(model, "random").state_dict
    plain = in_precision(families.find(model).encoder(encoder, state_dict), precision, wide)
    example, lengths = example_input(encoder, MODELS[model]), lengths_of(encoder, MODELS[model])
    return plain, example, lowered(plain, example, *passes, shortest=lengths[0])


def construct(module, example, batch, precision, shortest=0):
    """The network that `trt.build` hands to TensorRT, without a GPU: Torch-TensorRT's interpreter,
    which has it in `ctx.net`, and what is known of the build."""
    [output] = module.graph.find_nodes(op="output")
    with trt.converting(precision, 3, "") as (build, settings):
        found = importlib.import_module("torch_tensorrt.dynamo.conversion._TRTInterpreter")
        interpreter = found.TRTInterpreter(
            module, [trt.input_of(example, batch, shortest)], compilation_settings=settings,
            output_dtypes=[output.args[0].meta["val"].dtype])
        interpreter._construct_trt_network_def()
    return interpreter, build
