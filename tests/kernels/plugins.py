"""Every plugin in its forms: what a network gives it, and what it then gives its launcher.

`test_plugins.py` runs them in a stand-in for TensorRT, `test_plugin_engines.py` in TensorRT.
"""
from typing import NamedTuple

import pytest

from clip_ttrt import linear
from clip_ttrt.kernels import (
    ATTENTION, BIAS_QUICK_GELU, EMBED_IMAGE, EXTRACT_PATCHES, LINEAR, RESIDUAL_LAYER_NORM,
)

FLOAT, HALF = 0, 1  # of TensorRT's DataType
W = 768
TABLE = linear.pack(64, 128, False)
TABLE_WITH_BIAS = linear.pack(64, 128, True, [linear.Entry(1)])
FIELDS = {
    ATTENTION: {"heads": 12, "tokens": 77, "causal": 1, "query_bias": 1},
    BIAS_QUICK_GELU: {},
    RESIDUAL_LAYER_NORM: {"residual": 1, "epsilon": 1e-5},
    EXTRACT_PATCHES: {"patch_size": 14},
    EMBED_IMAGE: {"tokens": 50, "epsilon_pre": 1e-5, "epsilon_1": 1e-6},
    LINEAR: {"table": TABLE},
}


class Form(NamedTuple):
    """A plugin with some of FIELDS changed, and tensors that it takes.

    params: of its launcher, "x0", .. and "y0", .. for the addresses of inputs and outputs.
    """

    plugin: str
    changed: dict
    halves: int  # inputs of fp16, the first; the others are fp32
    inputs: list
    output: tuple  # the shape of each output
    launcher: str
    params: dict

    @property
    def fields(self):
        return {**FIELDS[self.plugin], **self.changed}

    @property
    def outputs(self):
        return sum(isinstance(one, str) and one.startswith("y") for one in self.params.values())


def close(x):
    return pytest.approx(x)


ROWS = {"rows": 100, "width": W, "epsilon": close(1e-5)}
_ATTENTION = {"qkv": "x0", "out": "y0", "heads": 12, "tokens": 77, "variant": 0}
FORMS = [
    Form(ATTENTION, {}, 1, [(154, 3 * W), (W,)], (154, W), "attention",
         {**_ATTENTION, "query_bias": "x1", "batch": 2, "causal": 1}),
    Form(ATTENTION, {"query_bias": 0, "causal": 0}, 1, [(3, 77, 3 * W)], (3, 77, W), "attention",
         {**_ATTENTION, "query_bias": None, "batch": 3, "causal": 0}),
    Form(BIAS_QUICK_GELU, {}, 1, [(2, 50, 3072), (1, 3072)], (2, 50, 3072), "bias_quick_gelu",
         {"in": "x0", "bias": "x1", "out": "y0", "rows": 100, "width": 3072}),
    Form(RESIDUAL_LAYER_NORM, {}, 2, [(100, W), (100, W), (W,), (W,), (W,)], (100, W),
         "residual_layer_norm",
         {"x": "x0", "delta": "x1", "bias": "x2", "scale": "x3", "shift": "x4", "sum_out": "y0",
          "out": "y1", **ROWS}),
    Form(RESIDUAL_LAYER_NORM, {"residual": 0}, 1, [(2, 50, W), (W,), (1, W)], (2, 50, W),
         "residual_layer_norm",
         {"x": "x0", "delta": None, "bias": None, "scale": "x1", "shift": "x2", "sum_out": None,
          "out": "y0", **ROWS}),
    Form(EXTRACT_PATCHES, {}, 1, [(8, 3, 224, 224)], (8 * 256, 588), "extract_patches",
         {"images": "x0", "out": "y0", "batch": 8, "resolution": 224, "patch_size": 14, "half": 1}),
    Form(EXTRACT_PATCHES, {}, 0, [(8, 3, 224, 224)], (8 * 256, 588), "extract_patches",
         {"images": "x0", "out": "y0", "batch": 8, "resolution": 224, "patch_size": 14, "half": 0}),
    Form(EMBED_IMAGE, {}, 1, [(98, W), (W,), (50, W), (W,), (W,), (W,), (W,)], (100, W),
         "embed_image",
         {"patches": "x0", "class_token": "x1", "positions": "x2", "scale_pre": "x3",
          "shift_pre": "x4", "scale_1": "x5", "shift_1": "x6", "x": "y0", "y": "y1", "batch": 2,
          "tokens": 50, "width": W, "epsilon_pre": close(1e-5), "epsilon_1": close(1e-6)}),
    Form(LINEAR, {}, 2, [(5, 128), (64, 128)], (5, 64), "linear",
         {"x": "x0", "weight": "x1", "bias": None, "out": "y0", "rows": 5}),
    Form(LINEAR, {"table": TABLE_WITH_BIAS}, 3, [(2, 5, 128), (64, 128), (64,)], (2, 5, 64),
         "linear", {"x": "x0", "weight": "x1", "bias": "x2", "out": "y0", "rows": 10}),
]  # fmt: skip
IDS = [f"{form.plugin}-{i}" for i, form in enumerate(FORMS)]
each_form = pytest.mark.parametrize("form", FORMS, ids=IDS)
each_plugin = pytest.mark.parametrize("name", FIELDS)


def form_of(plugin):
    return next(form for form in FORMS if form.plugin == plugin)


_WRONG = {  # of a plugin's first form: input -> its wrong shape
    ATTENTION: [
        {0: (3 * W,)}, {0: (2, 77, 1, 3 * W)}, {0: (2, 76, 3 * W)}, {0: (154, 2 * W)},
        {0: (155, 3 * W)}, {1: (W - 1,)}, {1: (1, W)},
    ],
    BIAS_QUICK_GELU: [{0: (3072,)}, {1: (3071,)}],
    RESIDUAL_LAYER_NORM: [
        {0: (W,), 1: (W,)}, {1: (50, W)}, {1: (2, 50, W)}, {2: (767,)}, {3: (767,)}, {4: (767,)},
    ],
    EXTRACT_PATCHES: [
        {0: (3, 224, 224)}, {0: (8, 4, 224, 224)}, {0: (8, 3, 224, 238)}, {0: (8, 3, 220, 220)},
    ],
    EMBED_IMAGE: [{0: (2, 49, W)}, {0: (99, W)}, {2: (49, W)}, {6: (767,)}],
    LINEAR: [{0: (128,)}, {0: (5, 127)}, {1: (64, 127)}],
}  # fmt: skip
WRONG_SHAPES = [(form_of(name), changed) for name, some in _WRONG.items() for changed in some]
WRONG_SHAPES.append((FORMS[-1], {2: (63,)}))
each_wrong_shape = pytest.mark.parametrize(
    "form, shapes",
    [(form, [changed.get(i, shape) for i, shape in enumerate(form.inputs)])
     for form, changed in WRONG_SHAPES],
    ids=[f"{form.plugin}-{changed}" for form, changed in WRONG_SHAPES],
)  # fmt: skip
