"""SigLIP against transformers' own classes: encoders, config files, preprocess."""
import json
import shutil

import numpy as np
import pytest
import torch
from noise import SIZES, noise
from PIL import Image
from torch import nn

import clip_ttrt
from clip_ttrt import families, graph, ops, pictures, tokenizers, trt
from clip_ttrt.checkpoint import load_checkpoint, original_with_weights
from clip_ttrt.encoders import ENCODERS
from clip_ttrt.engine import in_precision
from clip_ttrt.errors import UserError
from clip_ttrt.guard import trace
from clip_ttrt.pipeline.resize import Preprocess
from clip_ttrt.verify import COSINE_BOUND
from lowering import DYNAMIC, lowered
from test_tokenizers import bpe_folder, sentencepiece_folder  # noqa: F401

transformers = pytest.importorskip("transformers")
TOLERANCE = 1e-5  # of the features' norm: fp32 sums in another order
HEAD_DIMS = [64, 72]  # 72: of SO400M


def config_of(head_dim):
    """Of a small SigLIP whose towers differ in all; pixels are left over beyond whole patches."""
    image = {"hidden_size": 2 * head_dim, "num_attention_heads": 2, "intermediate_size": 200,
             "num_hidden_layers": 3, "image_size": 60, "patch_size": 14}
    text = {"hidden_size": 3 * head_dim, "num_attention_heads": 3, "intermediate_size": 136,
            "num_hidden_layers": 2, "vocab_size": 100, "max_position_embeddings": 16,
            "projection_size": 2 * head_dim}
    return {"model_type": "siglip", "vision_config": image, "text_config": text}


@torch.no_grad()
def draw(model):
    """Parameters in whose features a mistake shows, and that are not what a module starts with."""
    torch.manual_seed(0)
    for module in model.modules():
        for name, value in module.named_parameters(recurse=False):
            if isinstance(module, nn.LayerNorm) and name == "weight":
                value.uniform_(0.5, 1.5)
            elif name.endswith("bias") or name == "logit_scale":
                value.normal_(0, 0.1)
            elif value.dim() > 1:  # scores and sums of a size that attention tells apart
                value.normal_(0, (2 / value[0].numel()) ** 0.5)
    model.vision_model.head.probe.normal_()
    return model


@pytest.fixture(scope="module", params=HEAD_DIMS)
def original(request):
    config = config_of(request.param)
    model = draw(transformers.SiglipModel(transformers.SiglipConfig(**config)).eval())
    assert all(value.abs().min() > 0 for value in model.state_dict().values())
    torch.manual_seed(1)
    inputs = {"image": torch.randn(5, 3, 60, 60), "text": torch.randint(0, 100, (5, 16)).int()}
    with torch.no_grad():
        expected = {"image": model.get_image_features(inputs["image"]).pooler_output,
                    "text": model.get_text_features(inputs["text"]).pooler_output}
    return config, model.state_dict(), inputs, expected


def save(folder, config, **pictures):
    """The config files of a folder that transformers writes."""
    side = config["vision_config"].get("image_size", 224)
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    transformers.SiglipImageProcessorPil(**{
        "size": {"height": side, "width": side}, "image_mean": [0.5] * 3, "image_std": [0.5] * 3,
        **pictures}).save_pretrained(folder)
    return folder


@pytest.fixture
def read(tmp_path):
    """A config as a model."""
    return lambda config: families.read_transformers("m", save(tmp_path / "read", config))


def relative_error(actual, expected):
    return ((actual - expected).abs().amax(dim=1) / expected.norm(dim=1)).max().item()


@pytest.mark.parametrize("encoder", ENCODERS)
def test_features_equal_the_original_model_s(original, encoder, read):
    config, state_dict, inputs, expected = original
    x, expected = inputs[encoder], expected[encoder]
    ours = read(config).encoder(encoder, state_dict)
    assert relative_error(ours(x), expected) < TOLERANCE and ours(x).dtype == torch.float
    assert relative_error(ours(x[2:3]), expected[2:3]) < TOLERANCE
    assert relative_error(expected[:1], expected[1:2]) > 0.1  # inputs are told apart
    assert relative_error(ours.double()(x), expected) < TOLERANCE
    low = ours.half()(x)
    assert low.dtype == torch.float and torch.cosine_similarity(low, expected).min() > 0.9999
    ours = read(config).encoder(encoder, state_dict).differentiable().requires_grad_(True)
    assert relative_error(ours(x), expected) < TOLERANCE
    ours(x).sum().backward()
    assert all(value.grad is not None for value in ours.parameters())


def test_a_text_with_an_unknown_id_is_nan_and_no_other(original, read):
    config, state_dict, inputs, expected = original
    tokens = inputs["text"].clone()
    tokens[1, 3], tokens[2, 0] = 100, -1
    features = read(config).encoder("text", state_dict)(tokens)
    assert features[1:3].isnan().all()
    assert relative_error(features[[0, 3, 4]], expected["text"][[0, 3, 4]]) < TOLERANCE


def test_every_tensor_matters(original, read):
    config, state_dict, inputs, expected = original
    model = read(config)
    torch.manual_seed(2)
    for name, value in state_dict.items():
        if not name.startswith("logit"):
            encoder = "image" if name.startswith("vision_model") else "text"
            changed = {**state_dict, name: value + 0.1 * torch.randn_like(value)}
            features = model.encoder(encoder, changed)(inputs[encoder])
            error = relative_error(features, expected[encoder])
            # A bias of the keys adds the same to all scores, which softmax does not see.
            assert (error > 10 * TOLERANCE) is not name.endswith("k_proj.bias"), (name, error)


@torch.no_grad()
def test_random_weights_are_the_same_in_the_original_model_and_a_mistake_in_any_shows(
        read, monkeypatch):
    """Beyond fp16's bound: a tensor of the other sign."""
    model = read(config_of(72))
    monkeypatch.setattr(families, "find", lambda name: model)
    checkpoint = load_checkpoint("small", "random")
    assert all(tensor.any() for tensor in checkpoint.state_dict.values())
    original = original_with_weights(checkpoint, "cpu")
    assert isinstance(original, transformers.SiglipModel)
    x = {"image": torch.randn(3, 3, 60, 60), "text": torch.randint(0, 100, (3, 16))}
    expected = {name: getattr(original, f"encode_{name}")(rows) for name, rows in x.items()}
    for name, rows in x.items():
        actual = model.encoder(name, checkpoint.state_dict)(rows)
        assert relative_error(actual, expected[name]) < TOLERANCE
    assert original.logit_bias == checkpoint.state_dict["logit_bias"] != 0
    hidden = set()
    for key, value in original.state_dict().items():
        name = "image" if key.startswith("vision_model.") else "text"
        value.neg_()
        found = getattr(original, f"encode_{name}")(x[name])
        if torch.cosine_similarity(found, expected[name]).min() > COSINE_BOUND["fp16"]:
            hidden.add(key)
        value.neg_()
    # Of logits alone, and the same to all scores of a row, which softmax ignores.
    assert {key for key in hidden if not key.endswith("k_proj.bias")} == {
        "logit_scale", "logit_bias"}


SO400M = {"hidden_size": 1152, "intermediate_size": 4304, "num_hidden_layers": 27,
          "num_attention_heads": 16}
PUBLISHED = {  # as their config.json have it
    "base-patch16-224": {"text_config": {"model_type": "siglip_text_model"},
                         "vision_config": {"model_type": "siglip_vision_model"}},
    "so400m-patch14-384": {"text_config": SO400M,
                           "vision_config": SO400M | {"image_size": 384, "patch_size": 14}},
    "so400m-patch14-224": {"text_config": SO400M | {"max_position_embeddings": 16},
                           "vision_config": SO400M | {"patch_size": 14}},
    "2-base-patch16-256": {"text_config": {"vocab_size": 256000},
                           "vision_config": {"image_size": 256}},
    "2-giant-opt-patch16-256": {  # whose towers differ
        "text_config": SO400M | {"vocab_size": 256000, "projection_size": 1536},
        "vision_config": {"hidden_size": 1536, "intermediate_size": 6144, "image_size": 256,
                          "num_attention_heads": 16, "num_hidden_layers": 40}},
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_model_s_config_and_tensors_fit_its_encoders(name, read):
    model = read({"model_type": "siglip", **PUBLISHED[name]})
    whole = transformers.SiglipConfig(**PUBLISHED[name])
    with torch.device("meta"):
        state_dict = transformers.SiglipModel(whole).state_dict()
        image, text = (model.encoder(encoder, state_dict) for encoder in ENCODERS)
    used = sum(value.numel() for one in (image, text) for value in one.parameters())
    head = state_dict["vision_model.head.attention.in_proj_bias"].numel() // 3
    left = 2 * head ** 2 + 4 * head - whole.vision_config.num_attention_heads * head
    assert used == sum(value.numel() for value in state_dict.values()) - 2 - left


@pytest.mark.parametrize("part, setting, words", [
    ("", {"model_type": "siglip2"}, "model_type is .siglip2., which is unknown here"),
    ("", {"model_type": None}, "model_type is None"),
    ("vision_config", {"vision_use_head": False}, "vision_config.vision_use_head is False"),
    ("vision_config", {"hidden_act": "gelu"}, "vision_config.hidden_act is 'gelu'"),
    ("text_config", {"hidden_act": "quick_gelu"}, "text_config.hidden_act is 'quick_gelu'"),
    ("text_config", {"layer_norm_eps": 1e-5}, "text_config.layer_norm_eps is 1e-05"),
    ("text_config", {"projection_size": 512}, "text_config.projection_size is 512"),
    ("text_config", {"projection_size": None}, "text_config.projection_size is 192"),
])
def test_what_is_not_served_is_refused_in_a_sentence(part, setting, words, tmp_path):
    config = config_of(64)
    (config[part] if part else config).update(setting)
    save(tmp_path, config)
    with pytest.raises(UserError, match=f"{tmp_path} is not supported: its {words}") as caught:
        families.find(str(tmp_path))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("encoder", ENCODERS)
def test_an_encoder_becomes_one_graph_for_any_batch(original, encoder, read):
    config, state_dict, inputs, expected = original
    x, expected = inputs[encoder], expected[encoder]
    model = read(config)
    module = graph.capture(model.encoder(encoder, state_dict), x[:2])
    graph.run(module, [graph.lower])
    called = {node.target for node in module.graph.nodes if node.op == "call_function"}
    assert called <= set(ops.REFERENCES) and (ops.attention_probe in called) is (encoder == "image")
    passes = [each for each in graph.FUSE[encoder] if each is not graph.fuse_image_embedding]
    counts, blocks = graph.run(module, passes), getattr(model.dimensions, f"{encoder}_layers")
    assert counts["fuse_attention"] == blocks
    assert counts["fuse_bias_gelu"] == blocks + (encoder == "image")  # and of the head
    assert counts["fuse_residual_layer_norm"] == 2 * blocks
    for rows in (x, x[:1]):
        assert relative_error(module(rows), expected[:len(rows)]) < TOLERANCE
    graph.run(module, [graph.inline_references])
    assert relative_error(trace(module, x[:2])(x), expected) < TOLERANCE


@pytest.mark.gpu
@pytest.mark.parametrize("precision, bound", [("fp32", 1e-4), ("fp16", 1e-2)])
@pytest.mark.parametrize("encoder", ENCODERS)
def test_an_engine_s_features_equal_the_original_model_s(original, encoder, precision, bound, read):
    config, state_dict, inputs, expected = original
    x = inputs[encoder]
    ours = in_precision(read(config).encoder(encoder, state_dict), precision)
    module = lowered(ours, x[:2])
    engine, _ = trt.build(module, x[:2], DYNAMIC, precision, 1)
    compiled = trace(engine, x[:DYNAMIC.optimal].cuda())
    assert relative_error(compiled(x.cuda()).cpu(), expected[encoder]) < bound


@pytest.mark.parametrize("vocabulary, head_dim, resample", [
    ("sentencepiece_folder", 72, 3), ("bpe_folder", 64, 2)])  # SigLIP's, SigLIP 2's
def test_a_folder_is_compiled_verified_and_loaded(vocabulary, head_dim, resample, tmp_path,
                                                  request, monkeypatch):
    config, folder = config_of(head_dim), tmp_path / "model"
    config["text_config"]["vocab_size"] = 1000
    model = draw(transformers.SiglipModel(transformers.SiglipConfig(**config)).eval())
    model.save_pretrained(folder)
    own = transformers.SiglipImageProcessorPil(
        size={"height": 60, "width": 60}, resample=resample, image_mean=[0.5] * 3,
        image_std=[0.5] * 3)
    own.save_pretrained(folder)
    options = {"model": str(folder), "backend": "torchscript", "precision": "fp32",
               "batch": "1:2:4", "output": tmp_path / "artifact"}
    with pytest.raises(UserError, match="tokenizer_config.json"):
        clip_ttrt.compile(**options)
    tokenizer = tokenizers.read(request.getfixturevalue(vocabulary), 16)
    shutil.copytree(request.getfixturevalue(vocabulary), folder, dirs_exist_ok=True)
    artifact = clip_ttrt.compile(**options)
    assert artifact.verified
    assert artifact.manifest["verification"]["reference"] == "transformers"
    shutil.rmtree(folder)
    ours, preprocess = clip_ttrt.load(artifact.folder)
    texts, files = ["A cat!", "two dogs"], [pictures.FOLDER / "chelsea.jpg"]
    tokens, images = tokenizer(texts), own(Image.open(files[0]), return_tensors="pt")
    assert torch.equal(ours.tokenize(texts), tokens)
    with torch.no_grad():
        image = model.get_image_features(**images).pooler_output
        text = model.get_text_features(tokens).pooler_output
        logits = model(input_ids=tokens, **images).logits_per_image
    assert relative_error(ours.encode_image(files), image) < TOLERANCE
    assert relative_error(ours.encode_text(tokens), text) < TOLERANCE
    pixels = preprocess(Image.open(files[0]))[None]
    assert torch.allclose(ours(pixels, tokens)[0], logits, atol=1e-5)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    zero_shot = clip_ttrt.ZeroShot(ours, texts, ["{}"], multi=True)
    assert torch.allclose(zero_shot(files), logits.sigmoid(), rtol=1e-4, atol=1e-9)


@pytest.mark.parametrize("resample, filter", [(3, "bicubic"), (2, "bilinear")])
def test_preprocess_equals_transformers_with_pillow(resample, filter, tmp_path):
    own = transformers.SiglipImageProcessorPil(
        size={"height": 56, "width": 56}, resample=resample, image_mean=[0.5] * 3,
        image_std=[0.5] * 3)
    config = config_of(64)
    config["vision_config"]["image_size"] = 56
    folder = save(tmp_path, config, resample=resample)
    arguments = families.read_transformers("small", folder).preprocess
    assert arguments == {"fit": "squash", "filter": filter, "mean": [0.5] * 3, "std": [0.5] * 3}
    preprocess = Preprocess(56, "cpu", **arguments)
    pictures = [Image.fromarray(noise(*size)) for size in SIZES]
    pictures += [pictures[-1].convert(mode) for mode in ("L", "P", "CMYK", "1", "HSV", "YCbCr")]
    for picture in pictures:
        expected = own(picture, return_tensors="pt")["pixel_values"]
        actual = preprocess([np.asarray(picture.convert("RGB"))])
        assert (actual - expected).abs().max() <= 2 ** -23, picture  # a rounding of 1
        levels = (actual - expected) * 127.5
        assert levels.round().eq(0).all()


@pytest.mark.parametrize("setting, words", [
    ({"resample": 1}, "resample is 1"), ({"do_resize": False}, "do_resize is False"),
    ({"rescale_factor": 1}, "rescale_factor"), ({"size": {"shortest_edge": 60}}, "do_center_crop"),
    ({"size": {"height": 60, "width": 60 - 4}}, "size"),
])
def test_a_preprocess_that_is_not_served_is_refused(setting, words, tmp_path):
    with pytest.raises(UserError, match=f"its preprocessor's {words}"):
        families.find(str(save(tmp_path, config_of(64), **setting)))
