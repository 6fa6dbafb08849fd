"""Weights: where they come from, and every way in which they can be wrong."""
import pickle
import urllib.error

import clip.clip
import pytest
import torch
from safetensors.torch import save_file

from clip_ttrt.checkpoint import load_checkpoint, original_model, original_with_weights, published_digests, reload_checkpoint, sha256_of_file
from clip_ttrt.errors import UserError


@pytest.fixture(scope="module")
def state_dict():
    return {name: tensor.clone() for name, tensor in load_checkpoint("demo", "random").state_dict.items()}


def test_safetensors_file(tmp_path, state_dict):
    save_file(state_dict, tmp_path / "w.safetensors")
    checkpoint = load_checkpoint("demo", str(tmp_path / "w.safetensors"))
    assert checkpoint.origin.kind == "file" and checkpoint.origin.sha256 == sha256_of_file(tmp_path / "w.safetensors")
    assert all(torch.equal(checkpoint.state_dict[name], state_dict[name]) for name in state_dict)


def test_random_weights_depend_on_the_seed_alone():
    first, again, other = (load_checkpoint("demo", "random", seed=seed) for seed in (1, 1, 2))
    assert first.origin.sha256 == again.origin.sha256 != other.origin.sha256
    assert first.origin.describe().startswith("RANDOM")


def test_random_weights_leave_the_callers_generator_alone():
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    load_checkpoint("demo", "random")
    assert torch.equal(torch.rand(3), expected)


def test_demo_weights_embed_unknown_tokens_as_zero():
    table = load_checkpoint("demo").state_dict["token_embedding.weight"]
    known = table.abs().amax(dim=1) > 0
    assert table.shape[0] == 49408 and 20 < known.sum() < 2000
    assert known[49406] and known[49407]


@pytest.mark.parametrize("damage, sentence", [
    (lambda d: d.pop("ln_final.weight"), "not a CLIP model"),
    (lambda d: d.pop("ln_final.bias"), "1 missing"),
    (lambda d: d.update(extra=torch.zeros(1)), "1 unknown"),
    (lambda d: d["text_projection"].fill_(float("nan")), "not finite"),
    (lambda d: d.update({"ln_final.bias": torch.zeros(3)}), "shape"),
    (lambda d: d.update({"visual.positional_embedding": torch.zeros(12, 192)}), "not a square grid"),
    (lambda d: [d.pop(key) for key in list(d)[1:]], "not a CLIP model"),
])
def test_wrong_tensors(tmp_path, state_dict, damage, sentence):
    tensors = {name: tensor.clone() for name, tensor in state_dict.items()}
    damage(tensors)
    save_file(tensors, tmp_path / "w.safetensors")
    with pytest.raises(UserError, match=sentence):
        load_checkpoint("demo", str(tmp_path / "w.safetensors"))


def test_a_resnet_is_known_and_not_supported(tmp_path, state_dict):
    save_file({**state_dict, "visual.layer1.0.conv1.weight": torch.zeros(1)}, tmp_path / "w.safetensors")
    with pytest.raises(UserError, match="ResNet, which is not supported yet"):
        load_checkpoint("demo", str(tmp_path / "w.safetensors"))


def test_weights_of_another_model(tmp_path, state_dict):
    save_file(state_dict, tmp_path / "w.safetensors")
    with pytest.raises(UserError, match="are not ViT-B/32: they have the dimensions of demo"):
        load_checkpoint("ViT-B/32", str(tmp_path / "w.safetensors"))


def test_truncated_safetensors(tmp_path, state_dict):
    save_file(state_dict, tmp_path / "w.safetensors")
    content = (tmp_path / "w.safetensors").read_bytes()
    (tmp_path / "w.safetensors").write_bytes(content[: len(content) // 2])
    with pytest.raises(UserError, match="not a whole safetensors file"):
        load_checkpoint("demo", str(tmp_path / "w.safetensors"))


def test_missing_file():
    with pytest.raises(UserError, match="nowhere.safetensors: no such file"):
        load_checkpoint("demo", "nowhere.safetensors")


class Hostile:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def test_an_unknown_pickle_is_not_even_read(tmp_path):
    witness = tmp_path / "ran"
    (tmp_path / "w.pt").write_bytes(pickle.dumps(Hostile(witness)))
    with pytest.raises(UserError, match="--trust-weights"):
        load_checkpoint("demo", str(tmp_path / "w.pt"))
    assert not witness.exists()


def test_a_trusted_pickle_is_read(tmp_path, state_dict):
    torch.save({**state_dict, "context_length": torch.tensor(77)}, tmp_path / "w.pt")
    checkpoint = load_checkpoint("demo", str(tmp_path / "w.pt"), trust=True)
    assert torch.equal(checkpoint.state_dict["ln_final.bias"], state_dict["ln_final.bias"])


def test_a_trusted_file_that_holds_no_tensors(tmp_path):
    torch.save(["nothing"], tmp_path / "w.pt")
    with pytest.raises(UserError, match="no state dict"):
        load_checkpoint("demo", str(tmp_path / "w.pt"), trust=True)


def test_one_of_openais_archives_is_recognised_by_its_digest(tmp_path, state_dict, monkeypatch):
    class Holder(torch.nn.Module):
        def forward(self, x):
            return x

    holder = Holder()
    for name, tensor in state_dict.items():
        module = holder
        *path, leaf = name.split(".")
        for part in path:
            if not hasattr(module, part):
                module.add_module(part, torch.nn.Module())
            module = getattr(module, part)
        module.register_parameter(leaf, torch.nn.Parameter(tensor.half(), requires_grad=False))
    archive = tmp_path / "ViT-demo.pt"
    torch.jit.save(torch.jit.script(holder), str(archive))
    monkeypatch.setitem(clip.clip._MODELS, "demo", f"https://host/{sha256_of_file(archive)}/{archive.name}")
    assert published_digests()[sha256_of_file(archive)] == "demo"
    checkpoint = load_checkpoint("demo", str(archive))
    assert checkpoint.state_dict["ln_final.bias"].dtype == torch.float32
    assert torch.equal(checkpoint.state_dict["ln_final.bias"], state_dict["ln_final.bias"].half().float())


def test_openais_weights_without_a_network(tmp_path, monkeypatch):
    def refused(url, root):
        raise urllib.error.URLError("no network")

    monkeypatch.setattr(clip.clip, "_download", refused)
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(UserError, match=r"place the file ViT-B-32.pt in .*\.cache/clip, or use --weights random"):
        load_checkpoint("ViT-B/32")


def test_reload_finds_the_same_weights_or_fails(tmp_path, state_dict):
    path = tmp_path / "w.safetensors"
    save_file(state_dict, path)
    origin = load_checkpoint("demo", str(path)).origin
    assert reload_checkpoint("demo", origin).origin.sha256 == origin.sha256
    state_dict = {**state_dict, "ln_final.bias": state_dict["ln_final.bias"] + 1}
    save_file(state_dict, path)
    with pytest.raises(UserError, match="does not hold the weights"):
        reload_checkpoint("demo", origin)


def test_the_original_without_initialisation_is_the_original():
    saved = load_checkpoint("demo")
    model, plain = original_with_weights(saved, "cpu"), original_model(saved.dimensions)
    plain.load_state_dict(saved.state_dict)
    tokens, images = torch.randint(1, 100, (2, 77), generator=torch.Generator().manual_seed(0)), torch.randn(2, 3, *[saved.dimensions.image_resolution] * 2)
    with torch.no_grad():
        assert torch.equal(model.encode_text(tokens), plain.eval().encode_text(tokens)) and torch.equal(model.encode_image(images), plain.encode_image(images))
    assert not model.training and not any(parameter.requires_grad or parameter.is_meta for parameter in model.parameters())
