"""Engines of each elementwise plugin alone, for a range of rows: they give the launchers' bits."""

import needs
import one_layer
import pytest
import torch

from clip_ttrt import elementwise, kernels

pytestmark = [pytest.mark.gpu, needs.ampere]

W, TOKENS = 768, 50
CONSTANT = (torch.float32, (W,))


@pytest.fixture(scope="module")
def trt():
    return one_layer.tensorrt()


def engine(trt, name, fields, inputs, outputs=1):
    plan = one_layer.build(trt, one_layer.create(trt, name, fields), inputs, outputs)
    assert plan is not None
    return one_layer.Engine(trt, plan)


def normal(*shape):
    return torch.randn(shape, device="cuda")


def test_bias_quick_gelu(trt):
    inputs = [(torch.half, (-1, W)), CONSTANT]
    one = engine(trt, kernels.BIAS_QUICK_GELU, {}, inputs)
    bias = normal(W)
    for rows in (1, 7, 64):
        x = normal(rows, W).half()
        assert torch.equal(one(x, bias)[0], elementwise.bias_quick_gelu(x, bias))


def test_residual_layer_norm(trt):
    fields = {"residual": 1, "epsilon": 1e-5}
    inputs = [(torch.half, (-1, W))] * 2 + [CONSTANT] * 3
    one = engine(trt, kernels.RESIDUAL_LAYER_NORM, fields, inputs, outputs=2)
    constants = normal(3, W)
    for rows in (1, 7, 64):
        x, delta = normal(rows, W).half(), normal(rows, W).half()
        expected = elementwise.residual_layer_norm(x, delta, *constants, 1e-5)
        for found, right in zip(one(x, delta, *constants), expected):
            assert torch.equal(found, right)


def test_layer_norm(trt):
    fields = {"residual": 0, "epsilon": 1e-5}
    inputs = [(torch.half, (-1, TOKENS, W))] + [CONSTANT] * 2
    one = engine(trt, kernels.RESIDUAL_LAYER_NORM, fields, inputs)
    constants = normal(2, W)
    for batch in (1, 7, 64):
        x = normal(batch, TOKENS, W).half()
        _, expected = elementwise.residual_layer_norm(x, None, None, *constants, 1e-5)
        assert torch.equal(one(x, *constants)[0], expected)


@pytest.mark.parametrize("kind", [torch.float32, torch.half])
def test_extract_patches(trt, kind):
    one = engine(trt, kernels.EXTRACT_PATCHES, {"patch_size": 32}, [(kind, (-1, 3, 224, 224))])
    for batch in (1, 7, 64):
        images = normal(batch, 3, 224, 224).to(kind)
        assert torch.equal(one(images)[0], elementwise.extract_patches(images, 32))


def test_embed_image(trt):
    """The rows of its profile are multiples of an image's patches: 2 tokens are 1 patch."""
    fields = {"tokens": 2, "epsilon_pre": 1e-5, "epsilon_1": 1e-6}
    inputs = [(torch.half, (-1, W)), CONSTANT, (torch.float32, (2, W)), *[CONSTANT] * 4]
    one = engine(trt, kernels.EMBED_IMAGE, fields, inputs, outputs=2)
    token, positions, norms = normal(W), normal(2, W), normal(4, W)
    for batch in (1, 7, 64):
        patches = normal(batch, W).half()
        expected = elementwise.embed_image(patches, token, positions, *norms, 1e-5, 1e-6)
        for found, right in zip(one(patches, token, positions, *norms), expected):
            assert torch.equal(found, right)


@pytest.mark.parametrize(
    "name, fields, inputs",
    [
        (kernels.BIAS_QUICK_GELU, {}, [(torch.half, (2, W)), (torch.float32, (W - 1,))]),
        (kernels.BIAS_QUICK_GELU, {}, [(torch.half, (W,)), CONSTANT]),
        (kernels.EXTRACT_PATCHES, {"patch_size": 32}, [(torch.half, (1, 3, 220, 220))]),
    ],
)
def test_wrong_inputs_make_no_engine(trt, name, fields, inputs, capfd):
    assert one_layer.build(trt, one_layer.create(trt, name, fields), inputs) is None
    assert f"{name} plugin:" in capfd.readouterr().err
