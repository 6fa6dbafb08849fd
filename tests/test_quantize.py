"""fp8: numbers in E4M3, passes over encoders, calibration data, and the gate in simulation."""
import contextlib
import hashlib
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from torch._subclasses.fake_tensor import FakeTensorMode

import clip_ttrt
from clip_ttrt import backends, deprecations, graph, linear, ops, quantize, stack, trt, verify
from clip_ttrt.artifact import read_artifact, recompile_command
from clip_ttrt.checkpoint import load_checkpoint
from clip_ttrt.encoders import ENCODERS
from clip_ttrt.errors import UserError
from clip_ttrt.models import MODELS
from clip_ttrt.options import BatchRange, Options
from lowering import encoder_in
from outliers import EVERYWHERE, plant

each_encoder = pytest.mark.parametrize("encoder", ENCODERS)
each_form = pytest.mark.parametrize("fused", [True, False], ids=["fused", "tensorrt"])
MODEL = load_checkpoint("demo")
SMALL = replace(MODEL.model, dimensions=replace(MODEL.dimensions, image_resolution=32))


def table():
    """The values of E4M3's 256 codes, as defined: sign, 4 bits of exponent, 3 of fraction."""
    codes = torch.arange(256)
    sign, exponent, fraction = 1 - 2 * (codes >> 7), codes >> 3 & 15, (codes & 7).double() / 8
    normal = (1 + fraction) * 2.0 ** (exponent - 7)
    values = sign * torch.where(exponent == 0, fraction * 2.0 ** -6, normal)
    return torch.where(codes & 127 == 127, torch.nan, values)


def nearest(x):
    """By the table in float64: the nearest finite value, of two the one with an even code."""
    positive = table()[:127]
    gaps = (x.double().abs()[..., None] - positive).abs()
    odd = torch.arange(127) % 2 * 1e-12
    return positive[(gaps + odd).argmin(-1)].copysign(x.double())


# Numbers


def test_every_code_of_e4m3_and_rounding_between_them():
    codes = torch.arange(256, dtype=torch.uint8).view(ops.E4M3)
    assert torch.equal(codes.double().nan_to_num(nan=9e9), table().nan_to_num(nan=9e9))
    assert table()[:127].max() == ops.E4M3_MAX
    middles = (table()[:126] + table()[1:127]) / 2
    x = torch.cat([table()[:127], middles, torch.randn(2000) * 8, torch.logspace(-5, 4, 500)])
    x = torch.cat([x, -x]).float()
    assert torch.equal(ops.to_e4m3(x, 1.0).double(), nearest(x))
    assert torch.equal(ops.to_e4m3(x.half(), 0.25).double(), nearest(x.half() * 4))
    beyond = torch.tensor([465.0, -1e9, torch.inf, -torch.inf])
    assert ops.to_e4m3(beyond, 1.0).tolist() == [448, -448, 448, -448]
    assert ops.to_e4m3(torch.tensor([torch.nan]), 1.0).isnan().all()
    assert ops.to_e4m3(x, None) is x


@pytest.mark.parametrize("biased", [False, True])
def test_quantised_layers_are_products_of_the_table_s_values(biased):
    torch.manual_seed(0)
    x, weight, bias = torch.randn(3, 5, 32), torch.randn(16, 32), torch.randn(16) * biased
    weight8, scale = graph.weight_in_e4m3(weight)
    assert scale == weight.abs().max().item() / 448 and weight8.abs().float().max() == 448
    assert graph.weight_in_e4m3(torch.zeros(2, 2))[1] == 1
    expected = nearest(x / 0.01) @ nearest(weight / scale).T * (0.01 * scale) + bias
    bias = bias if biased else None
    plain = ops.quantized_linear(x, weight8, bias, 0.01, scale)
    assert plain.dtype == torch.float and torch.allclose(plain.double(), expected, atol=1e-5)
    fused = ops.fused_quantized_linear(ops.to_e4m3(x, 0.01), weight8, bias, 0.01 * scale, "")
    assert fused.dtype == torch.half and torch.equal(fused, plain.half())


QKV, ROWS, WIDE = torch.randn(2, 5, 384), torch.randn(10, 128), torch.randn(128)
PRODUCERS = {
    "attention": (ops.fused_attention, (QKV, 2, True, WIDE)),
    "bias_gelu": (ops.bias_gelu, (ROWS, WIDE, "tanh")),
    "layer_norm": (ops.fused_layer_norm, (ROWS, WIDE, WIDE, 1e-5)),
    "residual_layer_norm": (ops.residual_layer_norm, (ROWS, ROWS, WIDE, WIDE, WIDE, 1e-5)),
    "embed_image": (ops.embed_image, (ROWS[:8], WIDE, ROWS[:5], *2 * (WIDE, WIDE, 1e-5))),
}


@pytest.mark.parametrize("name", PRODUCERS)
def test_what_feeds_a_layer_quantises_its_last_result(name):
    op, args = PRODUCERS[name]
    plain, quantized = op(*args), op(*args, 0.02)
    if isinstance(plain, tuple):
        assert torch.equal(plain[0], quantized[0])
        plain, quantized = plain[1], quantized[1]
    assert torch.equal(quantized.double(), nearest(plain / 0.02))
    with FakeTensorMode() as mode:
        fakes = (mode.from_tensor(each) if torch.is_tensor(each) else each for each in args)
        fake = op(*fakes, 0.02)
    fake = fake[1] if isinstance(fake, tuple) else fake
    assert (fake.dtype, fake.shape) == (ops.E4M3, plain.shape)


def test_rows_in_e4m3_are_moved_as_they_are():
    x = ops.to_e4m3(torch.randn(3, 5, 16), 0.01)
    tokens = torch.tensor([[1, 9, 2, 0, 0], [9, 1, 1, 1, 9], [0, 0, 0, 0, 3]], dtype=torch.int32)
    assert torch.equal(ops.pool_end_of_text(x, tokens).float(), x.float()[range(3), [1, 0, 4]])
    assert torch.equal(ops.select_token(x, 2).float(), x.float()[:, 2])
    assert torch.equal(ops.split_tokens(x.flatten(0, 1), 5).float(), x.float())


# Passes


def lowered(encoder, precision, fused, state_dict=MODEL.state_dict):
    return encoder_in("demo", encoder, precision, *(graph.FUSE[encoder] if fused else ()),
                      state_dict=state_dict)


def layers_of(module):
    return list(filter(None, map(graph.block_weight, module.graph.nodes)))


def rows_for(encoder):
    torch.manual_seed(0)
    if encoder == "image":
        return torch.randn(3, 3, 112, 112)
    return torch.randint(0, 49408, (3, 77), dtype=torch.int32)


@torch.no_grad()
@each_form
@each_encoder
def test_every_linear_layer_of_a_block_is_quantised_and_no_node_does_only_that(encoder, fused):
    plain, _, module = lowered(encoder, "fp16", fused)
    rows, names = rows_for(encoder), layers_of(module)
    others = ["projection.weight", *["patches.weight"] * (encoder == "image")]
    layers = graph.calls(module, ops.fused_linear if fused else ops.linear)
    assert len(names) == 4 * len(plain.blocks)
    assert sorted(names + others) == sorted(layer.args[1].target for layer in layers)
    before, nodes = module(rows), len(module.graph.nodes)
    counts = graph.run(module, [graph.quantizing(dict.fromkeys(names, 0.05))])
    assert counts == {"quantize": len(names)} and layers_of(module) == []
    after = module(rows)
    assert 1e-4 < 1 - torch.cosine_similarity(after, before).min() < 1e-2
    weights = [graph.parameter(module, node.args[1]) for node in
               graph.calls(module, ops.quantized_linear)]
    assert {weight.dtype for weight in weights} == {ops.E4M3} and len(weights) == len(names)
    if fused:
        graph.run(module, [graph.fuse_quantization])
        assert graph.calls(module, ops.quantized_linear) == []
        assert len(graph.calls(module, ops.fused_quantized_linear)) == len(names)
        assert len(module.graph.nodes) == nodes
        assert torch.equal(module(rows), after)


@torch.no_grad()
@each_encoder
def test_a_layer_that_stays_gets_fp16_from_what_feeds_it(encoder):
    _, _, module = lowered(encoder, "fp16", True)
    names = layers_of(module)
    kept = [name for name in names if "0.qkv" in name or "3.up" in name or "2.down" in name]
    scales = {name: 0.05 for name in names if name not in kept}
    graph.run(module, [graph.quantizing(scales), graph.fuse_quantization])
    assert layers_of(module) == kept
    assert len(graph.calls(module, ops.fused_quantized_linear)) == len(names) - 3
    for node in graph.calls(module, ops.fused_linear):
        source = node.args[0]
        while source.target in graph.MOVES or getattr(source.target, "__name__", "") == "getitem":
            source = source.args[0]
        if graph.block_weight(node):
            assert len(source.args) + 1 == len(source.target._schema.arguments)
    assert module(rows_for(encoder)).isfinite().all()


def test_what_cannot_quantise_is_named():
    _, _, module = lowered("text", "fp16", False)
    graph.run(module, [graph.quantizing({"blocks.1.up.weight": 0.05})])
    with pytest.raises(graph.GraphError, match="layer_norm.* cannot quantise for .*linear"):
        graph.run(module, [graph.fuse_quantization])
    _, _, module = lowered("text", "fp16", True)
    graph.run(module, [graph.quantizing({"blocks.1.up.weight": 0.05})])
    [layer] = graph.calls(module, ops.quantized_linear)
    x = layer.args[0]
    graph.insert(module, layer, ops.add, (x, x), x.meta["val"])  # reads it, too
    with pytest.raises(graph.GraphError, match=r"cannot quantise for \[.*add.*\]"):
        graph.run(module, [graph.fuse_quantization])
    with pytest.raises(graph.GraphError, match="quantize found nothing to rewrite"):
        graph.run(module, [graph.quantizing({"blocks.9.up.weight": 0.05})])


def test_quantised_layers_are_measured_as_such_and_keep_their_scale(monkeypatch):
    asked = set()

    def tune(rows, weight_shape, bias, quantized):
        asked.add((rows[0], weight_shape, quantized))
        return linear.pack(*weight_shape, bias, scale=float(quantized))

    monkeypatch.setattr(linear, "tune", tune)
    _, _, module = lowered("text", "fp16", True)
    graph.run(module, [graph.quantizing(dict.fromkeys(layers_of(module), 0.05)),
                       graph.fuse_quantization, graph.tuning(BatchRange(1, 4, 8), (77,))])
    assert {(77, (384, 128), True), (1, (128, 512), True), (1, (256, 128), False)} <= asked
    assert len(asked) == 4 + 3 + 1
    for node in graph.calls(module, ops.fused_quantized_linear):
        shape = graph.parameter(module, node.args[1]).shape
        assert bytes.fromhex(node.args[4]) == linear.pack(*shape, False, scale=node.args[3])


# What is asked for


@pytest.mark.parametrize("options, sentence", [
    ({"precision": "fp16", "calibrate": "a"}, "--calibrate is for --precision fp8, not fp16"),
    ({"precision": "bf16", "scales": "a"}, "--scales is for --precision fp8, not bf16"),
    ({"compare": True}, "--compare is for --precision fp8, not fp16"),
    ({"precision": "fp8", "model": "ViT-B/32"}, "at least 512 of each, or --scales FILE"),
])
def test_options_that_do_not_fit(options, sentence):
    with pytest.raises(UserError, match=sentence):
        Options(**options)
    assert Options(precision="fp8").calibrate == ()  # the embedded model has its own
    assert Options(precision="fp8", calibrate=["a", "b"]).calibrate == ("a", "b")
    assert Options(precision="fp8", calibrate="a").calibrate == ("a",)


def test_no_gpu_or_an_old_one_or_no_tensorrt(monkeypatch):
    monkeypatch.setattr(stack, "driver", list)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match="^no CUDA GPU answers, and fp8 needs a GPU of 8.9 .*16$"):
        backends.choose("auto", "fp8")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA A10")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 6))
    with pytest.raises(UserError, match="^NVIDIA A10 has compute capability 8.6, and fp8 .* fp16$"):
        backends.choose("auto", "fp8")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 9))
    for asked in ("auto", "torchscript"):
        monkeypatch.setattr(stack, "versions", lambda: {"torch": "2.14.1"})
        with pytest.raises(UserError, match="TorchScript has no fp8.*--precision fp16"):
            backends.choose(asked, "fp8")


# Calibration data


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """60 pictures in a folder, one twice and one damaged, a list of them, and 50 captions."""
    folder = tmp_path_factory.mktemp("data")
    (folder / "pictures").mkdir()
    draw = np.random.default_rng(0)
    for i in range(60):
        size = 32 + int(draw.integers(0, 9)), 32 + int(draw.integers(0, 9)), 3
        Image.fromarray(draw.integers(0, 256, size, np.uint8)).save(folder / f"pictures/{i:02}.png")
    (folder / "pictures/again.png").write_bytes((folder / "pictures/07.png").read_bytes())
    (folder / "pictures/bad.png").write_bytes(b"no picture")
    (folder / "list.txt").write_text("".join(f"pictures/{i:02}.png\n" for i in range(60)))
    (folder / "captions.txt").write_text("\n".join(f"caption {i % 50}" for i in range(80)))
    return folder


def test_one_in_four_is_held_back_by_the_hash_of_its_content(files, monkeypatch):
    monkeypatch.setattr(quantize, "LEAST", 50)
    preprocess = deprecations.clip()._transform(32)
    pictures = sorted((files / "pictures").glob("[0-9]*.png"))
    contents = [path.read_bytes() for path in pictures]
    held = [hashlib.sha256(content).digest()[0] % 4 == 0 for content in contents]
    assert 8 < sum(held) < 25
    for given in (["pictures"], ["list.txt", "captions.txt"]):
        parts = quantize.read([str(files / name) for name in given], "image", SMALL, "cpu")
        for part, wanted in zip(parts, (False, True)):
            expected = [preprocess(Image.open(path)) for path, is_held in zip(pictures, held)
                        if is_held is wanted]
            assert torch.equal(torch.stack(part), torch.stack(expected))
    calibration, gate = quantize.read([str(files / "captions.txt")], "text", SMALL, "cpu")
    assert sorted(calibration + gate) == sorted({f"caption {i}" for i in range(50)})
    assert all(hashlib.sha256(line.encode()).digest()[0] % 4 == 0 for line in gate) and gate


def test_too_few_of_a_kind_is_a_sentence(files, monkeypatch):
    both = [str(files / "pictures"), str(files / "captions.txt")]
    monkeypatch.setattr(quantize, "LEAST", 61)
    with pytest.raises(UserError, match="pictures, .*captions.txt: 60 different pictures can be "
                                        "read, .* at least 61; give --calibrate more"):
        quantize.read(both, "image", SMALL, "cpu")
    with pytest.raises(UserError, match=": 50 different captions"):
        quantize.read(both, "text", SMALL, "cpu")
    with pytest.raises(UserError, match=": 0 different captions"):
        quantize.read(both[:1], "text", SMALL, "cpu")


def test_many_files_are_read_in_parts_spread_over_all(files, monkeypatch):
    for name, value in (("LEAST", 1), ("BATCH", 5), ("MOST", 20)):
        monkeypatch.setattr(quantize, name, value)
    calibration, gate = quantize.read([str(files / "captions.txt")], "text", SMALL, "cpu")
    assert sorted({int(line.split()[1]) // 5 for line in calibration + gate}) == [0, 2, 4, 8]


# The gate


@pytest.fixture(autouse=True)
def few(monkeypatch):
    """Few rows of the embedded model's, so that the simulation takes a second."""
    images, lines, labels, _ = HELD_OUT
    monkeypatch.setattr(quantize, "LEAST", 32)
    monkeypatch.setattr(quantize, "MEASURED", 8)
    monkeypatch.setattr(verify, "inputs_for", lambda *_: (
        images[:256:8], lines[:32], labels[:256:8], "few"))


HELD_OUT = verify.inputs_for("demo", 112)


def quantizer(state_dict=MODEL.state_dict, kernels="fused", **options):
    checkpoint = replace(MODEL, state_dict=state_dict)
    return quantize.Quantizer(Options(precision="fp8", **options), kernels, checkpoint, "cpu")


def passes(found, simulation, scales):
    return quantize.holds(simulation.features(found.rows["image"], scales),
                          found.references["image"])


def all_layers(found, encoder, state_dict):
    """A simulation, and the scales of all layers."""
    simulation = quantize.Simulation(lowered(encoder, "fp32", True, state_dict)[2])
    simulation.features(quantize.as_input(found.data[encoder], found.tokenize), {})
    scales = {name: size / 448 for name, size in simulation.largest.items()}
    return simulation, scales


@each_form
def test_the_embedded_model_passes_and_its_scales_serve_again(fused, tmp_path):
    found = quantizer(kernels="fused" if fused else "tensorrt")
    for encoder in ENCODERS:
        plain, _, module = lowered(encoder, "fp32", fused)
        names, rows = layers_of(module), found.rows[encoder][:3]
        counts = graph.run(module, [each for each in found.passes(encoder, (graph.lower,) * fused)
                                    if each is not graph.lower])
        assert counts["quantize"] == len(names) == 4 * len(plain.blocks)
        about = found.found["encoders"][encoder]
        assert about["kept_fp16"] == {} and list(about["scales"]) == list(about["cos_min_alone"])
        assert (about["calibrated_with"], about["held_back"]) == (32, len(found.rows[encoder]))
        assert 0.99 < min(about["cos_min_alone"].values()) < 0.99999
        assert about["saturated"] < 1e-3
        cosines = torch.cosine_similarity(module(rows).float(), found.references[encoder][:3])
        assert cosines.min() > 0.99
    path = tmp_path / "scales.json"
    path.write_text(json.dumps(found.found))
    again = quantizer(kernels=found.found["kernels"], scales=path)
    assert again.data == {}
    scales = again.choose("text", lowered("text", "fp32", fused)[2])
    assert scales == found.found["encoders"]["text"]["scales"]
    assert again.found["encoders"]["text"] == found.found["encoders"]["text"]
    again.known["text"]["kept_fp16"] = {"blocks.1.up.weight": 0.98}  # as another gate had found it
    chosen = again.choose("text", lowered("text", "fp32", fused)[2])
    assert scales.keys() - chosen.keys() == {"blocks.1.up.weight"}


def test_no_value_of_the_calibration_is_saturated():
    found = quantizer(encoder="text")
    simulation, scales = all_layers(found, "text", MODEL.state_dict)
    rows = quantize.as_input(found.data["text"], found.tokenize)
    for name, scale in scales.items():  # one at a time: what comes before it is as in calibration
        simulation.features(rows, {name: scale})
        assert sum(simulation.saturated) == 0
        simulation.features(rows, {name: scale / 2})
        assert sum(simulation.saturated) > 0


@pytest.mark.parametrize("change, sentence", [
    (lambda found: found.update(kernels="tensorrt"), "kernels: tensorrt, not fused.*; name the"),
    (lambda found: found.update(weights="0" * 64), "does not serve .*weights: 0000"),
    (lambda found: found["encoders"].pop("text"), "does not serve .*'text'"),
    (lambda found: found["encoders"]["text"].pop("scales"), "does not serve .*'scales'"),
    (lambda found: found.clear(), "does not serve as --scales"),
])
def test_scales_of_something_else_are_refused(change, sentence, tmp_path):
    wanted = {"kernels": "fused", "weights": MODEL.origin.sha256}
    of_one = dict.fromkeys(("calibrated_with", "sha256", "scales", "kept_fp16"), {})
    path = tmp_path / "scales.json"
    content = {**wanted, "encoders": {"image": {**of_one, "other": 1}, "text": of_one.copy()}}
    path.write_text(json.dumps(content))
    options = Options(precision="fp8", scales=path)
    assert quantize.known_scales(options, wanted) == {"image": of_one, "text": of_one}
    change(content)
    path.write_text(json.dumps(content))
    with pytest.raises(UserError, match=sentence):
        quantize.known_scales(options, wanted)
    path.write_text("{")
    with pytest.raises(UserError, match="does not serve"):
        quantize.known_scales(options, wanted)


def test_given_data_is_what_the_gate_and_the_verification_use(files, monkeypatch):
    monkeypatch.setattr(quantize, "LEAST", 50)
    found = quantizer(calibrate=[files / "pictures", files / "captions.txt"])
    images, lines, labels, about = found.inputs
    assert labels is None and images.shape[1:] == (3, 112, 112)
    assert about == f"held back: {len(images)} pictures, {len(lines)} captions"
    assert len(images) + len(found.data["image"]) == 60
    assert len(lines) + len(found.data["text"]) == 50


def test_the_gate_has_two_bounds_and_nan_lies_outside_both():
    def turned(*cosines):
        return torch.tensor([[cosine, (1 - cosine ** 2) ** 0.5] for cosine in cosines])

    reference = torch.tensor([[1.0, 0.0]]).expand(3, 2)
    assert quantize.holds(turned(0.9901, 0.9981, 1), reference)
    for worse in ((0.9899, 0.9999, 1), (0.9901, 0.9979, 1), (torch.nan, 1, 1)):
        assert not quantize.holds(turned(*worse), reference)


# What it buys


def test_what_fp8_buys_is_what_the_shipped_rows_say():
    from experiments.fp8 import ratios
    from experiments.record import ROOT, read_rows

    found = {}  # of each size the last run
    for (model, encoder, batch, _, kernels, *_), ratio in ratios(
            read_rows(ROOT / "results" / "speed.csv")).items():
        width = getattr(MODELS[model], f"{encoder}_width")
        if kernels == "fused" and model != "demo":
            found[encoder, width, int(batch)] = round(ratio, 2)
    assert found == quantize.GAINS


@pytest.mark.parametrize("size, near", [
    (("image", 1024, 32), ("image", 1024, 32)), (("image", 1280, 64), ("image", 1024, 32)),
    (("text", 512, 300), ("text", 768, 128)), (("image", 600, 1), ("image", 768, 32))])
def test_a_size_that_was_not_measured_gets_the_nearest_one_s_gain(size, near):
    told = quantize.gain(*size)
    assert told.startswith(f"fp8 takes about {quantize.GAINS[near]:.2f} of fp16's time")
    assert f"{near[0]}s at width {near[1]} and batch {near[2]};" in told


# Outliers


def in_int8(monkeypatch):
    """Per-tensor int8 in the place of E4M3, with scales from the same largest magnitudes."""
    def rounded(x, scale):
        step = scale * 448 / 127
        return (x / step).round().clamp(-127, 127) * step

    def weight_in_int8(weight):
        return rounded(weight, weight.abs().max().item() / 448), 1.0

    monkeypatch.setattr(graph, "weight_in_e4m3", weight_in_int8)
    monkeypatch.setattr(ops, "quantized_linear_reference", lambda x, weight, bias, scale, _: (
        ops.linear_reference(rounded(x, scale), weight, bias)))


@pytest.mark.parametrize("alpha", [32, 256])
def test_outliers_that_fp8_takes_and_int8_does_not(alpha, monkeypatch):
    state_dict = plant(MODEL.state_dict, alpha, EVERYWHERE)
    found = quantizer(state_dict)
    simulation, scales = all_layers(found, "image", state_dict)
    planted = simulation.features(found.rows["image"], {})
    assert (planted - found.references["image"]).abs().max() < 1e-3
    assert passes(found, simulation, scales)
    in_int8(monkeypatch)
    assert not passes(found, simulation, scales)


def test_int8_is_simulated_right_since_it_passes_without_outliers(monkeypatch):
    found = quantizer()
    simulation, scales = all_layers(found, "image", MODEL.state_dict)
    in_int8(monkeypatch)
    assert passes(found, simulation, scales)


def test_layers_that_break_the_gate_are_found_and_stay_in_fp16():
    planted = {"blocks.0.qkv.weight", "blocks.0.up.weight"}
    state_dict = plant(MODEL.state_dict, 1024, [(0, "qkv"), (0, "up")], both_ways=True)
    found = quantizer(state_dict)
    simulation, scales = all_layers(found, "image", state_dict)
    assert not passes(found, simulation, scales)
    module = lowered("image", "fp16", True, state_dict)[2]
    wide = lowered("image", "fp32", True, state_dict)[2]
    chosen = found.choose("image", wide)
    about = found.found["encoders"]["image"]
    assert set(about["kept_fp16"]) == planted == set(scales) - set(chosen)
    assert max(about["kept_fp16"].values()) < 0.99
    graph.run(module, [graph.quantizing(chosen), graph.fuse_quantization])
    assert set(layers_of(module)) == planted


def test_where_no_layer_can_be_in_fp8_that_is_said():
    found = quantizer(encoder="text")
    found.references["text"] = -found.references["text"]
    with pytest.raises(UserError, match="no linear layer of the text .*; use --precision fp16"):
        found.choose("text", lowered("text", "fp32", True)[2])


# A compile


@pytest.fixture
def engines(monkeypatch):
    """A machine that builds "engines": the graph itself on the CPU, through the references."""
    def build(module, example, name, **settings):
        graph.run(module, [graph.inline_references])
        return module, {"engine_mib": 1}

    backend = backends.Backend("tensorrt", "cpu", "fp8", "pretended")
    monkeypatch.setattr(backends, "choose", lambda *_: backend)
    monkeypatch.setattr(trt, "load_runtime", lambda name: None)
    monkeypatch.setattr(trt, "builder_kept", contextlib.nullcontext)
    monkeypatch.setattr(trt, "build", build)
    monkeypatch.setattr(torch.Tensor, "cuda", lambda x: x)


def test_an_artifact_in_fp8_has_its_scales_and_was_held_to_its_bounds(engines, tmp_path):
    options = {"precision": "fp8", "batch": "1:2:4", "kernels": "tensorrt"}
    artifact = clip_ttrt.compile(output=tmp_path / "a", **options)
    report = artifact.manifest["verification"]
    scales = json.loads((tmp_path / "a/scales.json").read_text())
    assert report["passed"] and report["inputs"] == "few"
    assert 0.99 < report["errors"]["image"]["cos_min"] < 0.9999
    for name, module in artifact.manifest["modules"].items():
        assert module["fp8"] == scales["encoders"][name] and module["fp8"]["kept_fp16"] == {}
        assert module["rewrites"]["quantize"] == len(module["fp8"]["scales"])
    command = recompile_command(artifact)
    assert f"--kernels tensorrt --scales {tmp_path}/a/scales.json --output {tmp_path}/a" in command
    again = clip_ttrt.compile(output=tmp_path / "b", scales=tmp_path / "a/scales.json",
                              encoder="text", **options)
    [kept] = json.loads((tmp_path / "b/scales.json").read_text())["encoders"].items()
    assert kept == ("text", scales["encoders"]["text"]) and again.verified


def test_a_verification_outside_the_bounds_marks_the_artifact(
        engines, files, tmp_path, monkeypatch):
    monkeypatch.setattr(verify, "MEDIAN_BOUND", {"fp8": 1.1})
    monkeypatch.setattr(quantize, "holds", lambda *_: True)
    with pytest.raises(clip_ttrt.VerificationError, match="text: median cosine .* < 1.1"):
        clip_ttrt.compile(output=tmp_path / "a", precision="fp8", batch=2, kernels="tensorrt",
                          encoder="text", calibrate=files / "captions.txt")
    manifest = read_artifact(tmp_path / "a").manifest
    about, calibrated = manifest["verification"], manifest["modules"]["text"]["fp8"]
    assert not about["passed"] and calibrated["calibrated_with"] + calibrated["held_back"] == 50
    assert about["inputs"] == f"held back: {calibrated['held_back']} captions"
