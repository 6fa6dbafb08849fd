"""Families of models against their own libraries: configs, files, features, preprocess."""
import json
import pickle
import subprocess
import sys
from pathlib import Path

import clip
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

import clip_ttrt
from clip_ttrt import backends, engine, families, graph, ops, pictures
from clip_ttrt.checkpoint import load_checkpoint, original_with_weights, reload_checkpoint
from clip_ttrt.cli import main
from clip_ttrt.encoders import ENCODERS, PoolingHead
from clip_ttrt.errors import UserError
from clip_ttrt.pipeline.resize import Preprocess
from clip_ttrt.verify import COSINE_BOUND
from lowering import encoder_in
from noise import SIZES, noise
import small

open_clip = pytest.importorskip("open_clip")
transformers = pytest.importorskip("transformers")
TOLERANCE = 1e-5  # of the features' norm: fp32 sums in another order
TEXTS = ["", "a cat", "a diagram of a dog on a skateboard in front of a shop", "many words " * 60]


def config_of(head, quick=False, pool="tok", ratio=4.0, custom=False, **more):
    """open_clip's config of a small model: two heads an encoder, of this size in the image's."""
    return {
        "embed_dim": 48, "quick_gelu": quick, "custom_text": custom, **more,
        "vision_cfg": {"image_size": 64, "patch_size": 16, "width": 2 * head, "head_width": head,
                       "layers": 2, "mlp_ratio": ratio, "pool_type": pool,
                       "patch_dropout": 0.5},
        "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 2 * (head - 16),
                     "heads": 2, "layers": 3, "mlp_ratio": ratio}}


CONFIGS = {
    "B": config_of(64, quick=True), "H": config_of(80), "g": config_of(88, ratio=4.3637),
    "bigG": config_of(104, ratio=4.9231, custom=True), "mean": config_of(64, pool="avg"),
    "bias": config_of(80, init_logit_bias=-10.0, custom=True, nonscalar_logit_scale=True),
}


def random(model):
    """The model with random weights, of which none is 0 or 1."""
    torch.manual_seed(0)
    with torch.no_grad():
        for value in model.parameters():
            value += torch.randn_like(value) * 0.1
    return model.eval().requires_grad_(False)


def theirs(config):
    """open_clip's own model of a config."""
    config = json.loads(json.dumps(config))
    kind = open_clip.model.CustomTextCLIP if config.pop("custom_text") else open_clip.model.CLIP
    return random(kind(**config))


def save_open_clip(folder, config, **preprocess):
    """A folder as open_clip's push_to_hf_hub writes it, and the model in it."""
    model = theirs(config)
    folder.mkdir()
    save_file(model.state_dict(), folder / "open_clip_model.safetensors")
    content = {"model_cfg": config, "preprocess_cfg": {**preprocess}}
    (folder / "open_clip_config.json").write_text(json.dumps(content))
    return model


def of_transformers(act="quick_gelu", head=64, **more):
    text, image = ({"hidden_size": 2 * size, "num_hidden_layers": 2, "num_attention_heads": 2,
                    "intermediate_size": 200, "hidden_act": act} for size in (64, head))
    image |= {"image_size": 64, "patch_size": 16}
    return transformers.CLIPConfig(
        text_config={**text, **more}, vision_config=image, projection_dim=48)


def save_processor(folder, **changed):
    processor = transformers.CLIPImageProcessor(size={"shortest_edge": 64}, crop_size=64)
    processor.save_pretrained(folder)
    path = folder / "preprocessor_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changed))


def relative_error(actual, expected):
    return ((actual - expected).abs().amax(dim=1) / expected.norm(dim=1)).max().item()


def inputs(side=64):
    return {"image": pictures.load(side)[0][:3], "text": clip.tokenize(TEXTS, truncate=True)}


def assert_equal_features(checkpoint, expected):
    for name, x in inputs().items():
        encoder = checkpoint.model.encoder(name, checkpoint.state_dict)
        assert relative_error(encoder(x), expected[name]) <= TOLERANCE


@pytest.mark.parametrize("name", CONFIGS)
def test_a_folder_of_open_clip_has_the_features_of_its_model(name, tmp_path):
    model = save_open_clip(tmp_path / "model", CONFIGS[name])
    checkpoint = load_checkpoint(str(tmp_path / "model"))
    x = inputs()
    expected = {"image": model.encode_image(x["image"]), "text": model.encode_text(x["text"])}
    assert_equal_features(checkpoint, expected)
    original = original_with_weights(checkpoint, "cpu")
    assert isinstance(original, open_clip.CLIP)
    assert relative_error(original.encode_image(x["image"]), expected["image"]) <= TOLERANCE
    assert relative_error(original.encode_text(x["text"]), expected["text"]) <= TOLERANCE
    assert checkpoint.state_dict["logit_scale"] == model.logit_scale
    assert ("logit_bias" in checkpoint.state_dict) is (name == "bias")


@pytest.mark.parametrize("head, act, shard", [
    (64, "quick_gelu", "50GB"), (80, "gelu", "10MB"), (88, "gelu_pytorch_tanh", "50GB")])
def test_a_folder_of_transformers_has_the_features_of_its_model(head, act, shard, tmp_path):
    model = random(transformers.CLIPModel(of_transformers(act, head)))
    model.save_pretrained(tmp_path, max_shard_size=shard)
    save_processor(tmp_path)
    assert (tmp_path / "model.safetensors.index.json").exists() is (shard == "10MB")
    checkpoint, x = load_checkpoint(str(tmp_path)), inputs()
    expected = {"image": model.get_image_features(x["image"]),
                "text": model.get_text_features(x["text"])}
    expected = {name: found.pooler_output for name, found in expected.items()}
    assert_equal_features(checkpoint, expected)
    assert checkpoint.origin.kind == "own" and len(checkpoint.origin.sha256) == 64
    assert reload_checkpoint(str(tmp_path), checkpoint.origin).origin == checkpoint.origin
    original = original_with_weights(checkpoint, "cpu")
    assert isinstance(original, transformers.CLIPModel)
    assert relative_error(original.encode_image(x["image"]), expected["image"]) <= TOLERANCE
    assert relative_error(original.encode_text(x["text"]), expected["text"]) <= TOLERANCE


@pytest.mark.parametrize("package", ["open_clip", "transformers"])
def test_a_compile_without_the_family_s_package_names_its_extra(package, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    (tmp_path / "config.json").write_text('{"model_type": "siglip"}')
    name = "open_clip:ViT-H-14" if package == "open_clip" else str(tmp_path)
    with pytest.raises(UserError, match=rf"read by the package {package} .*clip_ttrt\[{package}\]"):
        families.find(name)


def test_an_artifact_runs_without_the_families_packages(artifact):
    code = ("import sys; sys.modules.update(dict.fromkeys(('open_clip', 'transformers'))); "
            "import clip_ttrt; model, _ = clip_ttrt.load(sys.argv[1]); "
            "print(model.encode_text(model.tokenize('a cat')).shape)")
    command = [sys.executable, "-c", code, str(artifact.folder)]
    assert "[1, 48]" in subprocess.check_output(command, text=True)


@pytest.mark.parametrize("name", ["bias", "mean"])
@torch.no_grad()
def test_a_mistake_in_any_one_tensor_of_random_weights_shows(name, tmp_path):
    """Beyond fp16's bound: a tensor of the other sign."""
    save_open_clip(tmp_path / "model", CONFIGS[name])
    checkpoint = load_checkpoint(str(tmp_path / "model"), "random")
    assert all(tensor.all() for tensor in checkpoint.state_dict.values())
    model = original_with_weights(checkpoint, "cpu")
    rows = {"encode_image": inputs()["image"], "encode_text": inputs()["text"][1:]}
    rows["encode_text"] = torch.arange(1, 49281, 640).view(1, 77).repeat(2, 1)
    expected = {encode: getattr(model, encode)(x) for encode, x in rows.items()}
    hidden = set()
    for key, value in model.state_dict().items():
        encode = "encode_image" if key.startswith("visual.") else "encode_text"
        value.neg_()
        found = getattr(model, encode)(rows[encode])
        if torch.cosine_similarity(found, expected[encode]).min() > COSINE_BOUND["fp16"]:
            hidden.add(key)
        value.neg_()
    assert hidden == {"logit_scale", "logit_bias"} & {*checkpoint.state_dict}  # of logits alone


PREPROCESS = [{}, {"resize_mode": "squash", "interpolation": "bilinear"},
              {"resize_mode": "longest", "mean": [0.5, 0.4, 0.3], "std": [0.5, 0.6, 0.5]},
              {"resize_mode": "shortest", "mean": [0.5] * 3, "std": [0.5] * 3}]


@pytest.mark.parametrize("given", PREPROCESS, ids=str)
def test_both_forms_of_preprocess_equal_open_clip_s(given, tmp_path):
    content = {"model_cfg": CONFIGS["B"], "preprocess_cfg": given}
    (tmp_path / "open_clip_config.json").write_text(json.dumps(content))
    model = families.find(str(tmp_path))
    theirs = open_clip.transform.image_transform(64, is_train=False, **given)
    ours = pickle.loads(pickle.dumps(model.transform()))  # for workers of a DataLoader
    batch = Preprocess(64, "cpu", **model.preprocess)
    for size in SIZES:
        pixels = noise(*size)
        picture = Image.fromarray(pixels)
        try:
            expected = theirs(picture)
        except ValueError:  # of a side that would get no pixel, where ours gets one
            assert given.get("resize_mode") == "longest" and max(size) > 64 * min(size)
            continue
        assert torch.equal(ours(picture), expected)
        assert torch.equal(batch([pixels])[0], expected)
        for mode in ("L", "P", "RGBA", "LA", "1", "CMYK", "I;16"):
            other = picture.convert("L").convert(mode) if mode == "I;16" else picture.convert(mode)
            assert torch.equal(ours(other), theirs(other)), mode


def test_the_preprocess_of_transformers_is_read(tmp_path):
    of_transformers().save_pretrained(tmp_path)
    with pytest.raises(UserError, match="preprocessor_config.json"):
        families.find(str(tmp_path))
    save_processor(tmp_path)
    found = families.find(str(tmp_path))
    assert found.preprocess == families.OPENAI_PREPROCESS and found.folder == tmp_path
    save_processor(tmp_path, resample=2, image_mean=[0.5] * 3)
    expected = {"filter": "bilinear", "fit": "crop", "mean": [0.5] * 3}
    assert {**families.find(str(tmp_path)).preprocess, **expected} == (
        families.find(str(tmp_path)).preprocess)
    save_processor(tmp_path, size={"height": 64, "width": 64}, do_center_crop=False)
    assert families.find(str(tmp_path)).preprocess["fit"] == "squash"
    for wrong in ({"size": {"shortest_edge": 72}}, {"crop_size": 32}, {"resample": 1}):
        save_processor(tmp_path, **wrong)
        with pytest.raises(UserError, match="not supported: its preprocessor's"):
            families.find(str(tmp_path))


def test_processors_of_transformers_write_what_is_read(tmp_path):
    of_transformers().save_pretrained(tmp_path)
    processor = transformers.CLIPImageProcessor(size={"shortest_edge": 64}, crop_size=64)
    processor.save_pretrained(tmp_path)
    model = families.find(str(tmp_path))
    pixels = noise(90, 64)  # where both crop the same rows
    expected = processor(Image.fromarray(pixels), return_tensors="pt")["pixel_values"][0]
    assert (model.transform()(Image.fromarray(pixels)) - expected).abs().max() < 0.02


@pytest.fixture(scope="module")
def artifact(tmp_path_factory):
    folder = tmp_path_factory.mktemp("small")
    save_open_clip(folder / "model", CONFIGS["bias"], **PREPROCESS[2])
    found = clip_ttrt.compile(model=str(folder / "model"), backend="torchscript", batch="1:2:4",
                              precision="fp32", output=folder / "artifact")
    return found


def test_a_folder_is_compiled_verified_loaded_and_called(artifact, tmp_path, capsys):
    report = artifact.manifest["verification"]
    assert report["passed"] and report["reference"] == "open_clip"
    model, preprocess = clip_ttrt.load(artifact.folder)
    own = load_checkpoint(artifact.manifest["model"])
    original = original_with_weights(own, "cpu")
    transform = open_clip.transform.image_transform(64, is_train=False, **PREPROCESS[2])
    files = sorted(map(str, pictures.FOLDER.glob("*.jpg")))[:3]
    images = torch.stack([transform(Image.open(file)) for file in files])
    assert torch.equal(torch.stack([preprocess(Image.open(file)) for file in files]), images)
    expected = original.encode_image(images)
    assert relative_error(model.encode_image(files), expected) <= TOLERANCE
    tokens = model.tokenize(TEXTS, truncate=True)
    assert tokens.dtype == torch.int32 and torch.equal(tokens, inputs()["text"].int())
    with pytest.raises(RuntimeError, match="too long"):
        model.tokenize(TEXTS)
    scale, bias = original.logit_scale.exp(), original.logit_bias
    image, text = (torch.nn.functional.normalize(x, dim=1)
                   for x in (expected, original.encode_text(tokens)))
    logits = scale * image @ text.T + bias
    assert torch.allclose(model(images, tokens)[0], logits, atol=1e-4) and bias != 0
    assert main(["embed", str(artifact.folder), *files, "--output", str(tmp_path / "out"),
                 "--dtype", "float32"]) == 0
    [path] = (tmp_path / "out").glob("img_emb/*.npy")
    assert np.abs(np.load(path) - image.numpy()).max() < 1e-5
    assert main(["classify", str(artifact.folder), files[0], "--labels", "x", "y"]) == 0
    assert main(["verify", str(artifact.folder)]) == 0
    capsys.readouterr()


def test_a_folder_s_artifact_says_how_to_compile_it_again(artifact):
    from clip_ttrt.artifact import recompile_command

    command = recompile_command(artifact)
    folder = artifact.manifest["model"]
    assert Path(folder).is_absolute() and f"--model {folder} --weights own" in command
    options = clip_ttrt.Options(model=folder, precision="fp32")
    assert options.folder == Path("artifacts/model-fp32")


def test_weights_of_a_name_of_open_clip_come_from_a_file(tmp_path, monkeypatch):
    config = Path(open_clip.__file__).with_name("model_configs") / "ViT-g-14.json"
    found = families.find("open_clip:ViT-g-14").dimensions
    assert json.loads(config.read_text())["vision_cfg"]["width"] == found.image_width == 1408
    assert (found.image_head_dim, found.image_mlp, found.gelu, found.text_heads) == (
        88, 6144, "none", 16)
    with pytest.raises(UserError, match="comes with no open_clip_model.safetensors or .*; give"):
        load_checkpoint("open_clip:ViT-g-14")
    with pytest.raises(UserError, match="unknown model 'open_clip:ViT-X'"):
        families.find("open_clip:ViT-X")
    monkeypatch.setattr(open_clip, "__file__", str(tmp_path / "__init__.py"))
    (tmp_path / "model_configs").mkdir()
    (tmp_path / "model_configs/small.json").write_text(json.dumps(CONFIGS["H"]))
    model = theirs(CONFIGS["H"])
    path = tmp_path / "epoch_1.pt"
    torch.save({"epoch": 1, "state_dict": {
        f"module.{name}": value for name, value in model.state_dict().items()}}, path)
    with pytest.raises(UserError, match="--trust-weights"):
        load_checkpoint("open_clip:small", str(path))
    checkpoint = load_checkpoint("open_clip:small", str(path), trust=True)
    x = inputs()
    assert_equal_features(checkpoint, {"image": model.encode_image(x["image"]),
                                       "text": model.encode_text(x["text"])})
    assert clip_ttrt.Options(model="open_clip:small").folder.name == "open_clip-small-fp16"


def test_every_vit_of_open_clip_with_openai_s_tokenizer_is_known_and_the_others_are_refused():
    known = set()
    for name in open_clip.list_models():
        try:
            found = families.find(f"open_clip:{name}")
        except UserError as problem:
            assert "is not supported: its" in str(problem)
            continue
        known.add(name)
        with torch.device("meta"):
            expected = found.original().state_dict()
            ours = [found.encoder(encoder, expected) for encoder in ENCODERS]
        used = sum(value.numel() for encoder in ours for value in encoder.parameters())
        logits = sum(key.startswith("logit") for key in expected)
        assert used == sum(value.numel() for value in expected.values()) - logits
    assert known >= {"ViT-B-32", "ViT-B-16-quickgelu", "ViT-L-14", "ViT-L-14-336", "ViT-H-14",
                     "ViT-H-14-378-quickgelu", "ViT-g-14", "ViT-bigG-14", "ViT-e-14"}
    assert not any(word in name for name in known for word in (
        "coca", "SigLIP", "Mobile", "roberta", "CLIPA", "worldwide", "RN50", "convnext", "naflex"))


@torch.no_grad()
@pytest.mark.parametrize("dims, unfused", [
    (small.OF_80, ["image"]), (small.OF_104, ["image", "text"]), (small.OF_SIGLIP, ["image"])],
    ids=["80", "104", "siglip"])
@pytest.mark.parametrize("served", [False, True])
def test_the_fused_kernels_do_all_but_attention_of_heads_that_they_have_not(
        served, dims, unfused, monkeypatch):
    small.add(monkeypatch, small=dims)
    monkeypatch.setattr(engine.kernels, "attends", lambda size: served or size == 64)
    monkeypatch.setattr(backends, "choose",
                        lambda *_: backends.Backend("tensorrt", "cuda", "fp16", "asked"))
    monkeypatch.setattr(backends.kernels, "obstacle", lambda: None)
    plan = engine.plan_for(clip_ttrt.Options(model="small", weights="random"))
    assert plan.kernels.kernels == "fused"
    state_dict = load_checkpoint("small", "random").state_dict
    for encoder in ENCODERS:
        wide = encoder in unfused and not served
        told = f"TensorRT's own attention for the {encoder} encoder, whose heads have"
        assert (told in plan.kernels.reason) is wide
        lower, *passes, tune = plan.passes[encoder]
        plain, example, module = encoder_in("small", encoder, "fp32", *passes,
                                            state_dict=state_dict)
        x = inputs()["image"] if encoder == "image" else torch.arange(24).view(3, 8).int()
        expected = plain(x)
        assert relative_error(module(x), expected) <= TOLERANCE
        assert bool(graph.calls(module, ops.attention)) is wide
        assert len(graph.calls(module, ops.bias_gelu)) == len(plain.blocks) + (
            isinstance(plain.projection, PoolingHead))
        names = [*filter(None, map(graph.block_weight, module.graph.nodes))]
        scales = {name: 0.02 for name in names}
        graph.run(module, [graph.quantizing(scales), graph.fuse_quantization])
        left = graph.calls(module, ops.quantized_linear)  # behind TensorRT's attention
        assert len(left) == (len(plain.blocks) if wide else 0)
        assert module(x).isfinite().all()


def of(path, value):
    config = json.loads(json.dumps(CONFIGS["H"]))
    part = config
    for key in path[:-1]:
        part = part[key]
    part[path[-1]] = value
    return config


@pytest.mark.parametrize("path, value, sentence", [
    (["multimodal_cfg"], {"layers": 12}, "of CoCa"),
    (["vision_cfg", "timm_model_name"], "naflexvit_base", "'naflexvit_base', an image tower of"),
    (["vision_cfg", "timm_model_name"], "fastvit_mci2", "timm's, as of NaFlex"),
    (["text_cfg", "hf_model_name"], "roberta-base", "a text tower of transformers'"),
    (["text_cfg", "hf_tokenizer_name"], "bert-base-uncased", "hf_tokenizer_name is 'bert"),
    (["text_cfg", "no_causal_mask"], True, "no_causal_mask is True"),
    (["text_cfg", "embed_cls"], True, "embed_cls is True"),
    (["text_cfg", "pool_type"], "last", "pool_type is 'last'"),
    (["text_cfg", "vocab_size"], 32000, "vocab_size is 32000"),
    (["text_cfg", "act_kwargs"], {"approximate": "tanh"}, "act_kwargs is"),
    (["vision_cfg", "attentional_pool"], True, "attentional_pool is True"),
    (["vision_cfg", "global_average_pool"], True, "global_average_pool is True"),
    (["vision_cfg", "ls_init_value"], 1e-5, "ls_init_value is 1e-05"),
    (["vision_cfg", "no_ln_pre"], True, "no_ln_pre is True"),
    (["vision_cfg", "layers"], [3, 4, 6, 3], r"layers is \[3, 4, 6, 3\]"),
    (["vision_cfg", "image_size"], [64, 32], r"image_size is \[64, 32\]"),
    (["novel"], 3, "novel is 3, which is unknown here"),
])
def test_what_open_clip_has_and_we_do_not_is_refused_by_name(path, value, sentence, tmp_path):
    content = {"model_cfg": of(path, value)}
    (tmp_path / "open_clip_config.json").write_text(json.dumps(content))
    for call in (families.find, load_checkpoint, lambda name: clip_ttrt.Options(model=name)):
        with pytest.raises(UserError, match=f"^{tmp_path} is not supported: its .*{sentence}"):
            call(str(tmp_path))


@pytest.mark.parametrize("change, sentence", [
    ({"model_type": "chinese_clip"}, "model_type is 'chinese_clip'"),
    ({"vision_config": {"hidden_act": "relu"}}, "vision_config.hidden_act is 'relu'"),
    ({"text_config": {"hidden_act": "gelu"}}, "text_config.hidden_act is 'gelu'"),
    ({"text_config": {"eos_token_id": 7}}, "eos_token_id is 7"),
    ({"text_config": {"vocab_size": 50000}}, "vocab_size is 50000"),
    ({"vision_config": {"layer_norm_eps": 1e-6}}, "layer_norm_eps is 1e-06"),
])
def test_what_transformers_has_and_we_do_not_is_refused_by_name(change, sentence, tmp_path):
    save_processor(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "clip", **change}))
    with pytest.raises(UserError, match=f"not supported: its .*{sentence}"):
        families.find(str(tmp_path))


def test_damaged_files_and_missing_weights_are_told(tmp_path):
    with pytest.raises(UserError, match=r"unknown model .*known: demo, .*hf-hub:ORG/NAME"):
        families.find(str(tmp_path))
    path = tmp_path / "open_clip_config.json"
    for content, sentence in ("{", "Expecting"), ('{"embed_dim": 3}', "'vision_cfg'"):
        path.write_text(content)
        with pytest.raises(UserError, match=f"unknown model .*{sentence}"):
            families.find(str(tmp_path))
    path.unlink()
    save_open_clip(tmp_path / "m", CONFIGS["H"])
    weights = tmp_path / "m/open_clip_model.safetensors"
    state_dict = {name: value for name, value in theirs(CONFIGS["H"]).state_dict().items()
                  if name != "ln_final.bias"}
    save_file(state_dict, weights)
    with pytest.raises(UserError, match="not those of .*: Missing key.*: \"ln_final.bias\""):
        load_checkpoint(str(tmp_path / "m"))
    weights.rename(weights.with_name("open_clip_pytorch_model.bin"))
    with pytest.raises(UserError, match="--trust-weights"):
        load_checkpoint(str(tmp_path / "m"))
    (tmp_path / "m/open_clip_pytorch_model.bin").unlink()
    with pytest.raises(UserError, match="comes with no open_clip_model.safetensors or"):
        load_checkpoint(str(tmp_path / "m"))


def test_a_repository_is_what_huggingface_hub_downloads(tmp_path, monkeypatch):
    huggingface_hub = pytest.importorskip("huggingface_hub")
    save_open_clip(tmp_path / "model", CONFIGS["H"])
    asked = []

    def download(name, allow_patterns):
        asked.append((name, *allow_patterns))
        return str(tmp_path / "model")

    families.hub.cache_clear()
    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    options = clip_ttrt.Options(model="hf-hub:org/name")
    assert options.folder == Path("artifacts/org-name-fp16") and options.model == "hf-hub:org/name"
    assert asked == [("org/name", "*.json", "*.model")]
    assert load_checkpoint("hf-hub:org/name").origin.kind == "own"
    assert asked[1:] == [("org/name", "open_clip_model.safetensors")]

    def offline(name, allow_patterns):
        raise ConnectionError("no network\nat all")  # whose kind is OSError, as the library's

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    with pytest.raises(UserError, match=r"'hf-hub:org/other'; .*folders with .* \(no network\)$"):
        families.find("hf-hub:org/other")
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(UserError, match=r"huggingface_hub.*pip install 'clip_ttrt"):
        families.find("hf-hub:org/third")
    families.hub.cache_clear()
