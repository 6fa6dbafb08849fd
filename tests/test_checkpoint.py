"""Weights: where they come from, and every way in which they can be wrong."""
import urllib.error
from pathlib import Path
from unittest import mock

import clip.clip
import pytest
import torch
from safetensors.torch import save_file

from clip_ttrt import pictures
from clip_ttrt.checkpoint import (
    load_checkpoint, original_with_weights, reload_checkpoint, sha256_of_file)
from clip_ttrt.errors import UserError
from clip_ttrt.families import find
from clip_ttrt.models import MODELS
from clip_ttrt.verify import COSINE_BOUND
from small import RESNET, VIT


@pytest.fixture
def state_dict():
    return dict(load_checkpoint("demo", "random").state_dict)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "w.safetensors"


def test_a_safetensors_file_is_found_again_or_refused(path, state_dict):
    save_file(state_dict, path)
    checkpoint = load_checkpoint("demo", str(path))
    origin = checkpoint.origin
    assert origin.kind == "file" and origin.sha256 == sha256_of_file(path)
    assert all(torch.equal(checkpoint.state_dict[name], state_dict[name]) for name in state_dict)
    assert reload_checkpoint("demo", origin).origin == origin
    state_dict["ln_final.bias"] += 1
    save_file(state_dict, path)
    with pytest.raises(UserError, match="does not hold the weights"):
        reload_checkpoint("demo", origin)


def test_random_weights_depend_on_the_seed_alone():
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    first, again, other = (load_checkpoint("demo", "random", seed=seed) for seed in (1, 1, 2))
    assert first.origin.sha256 == again.origin.sha256 != other.origin.sha256
    assert first.origin.describe().startswith("RANDOM")
    assert torch.equal(torch.rand(3), expected)  # the caller's generator is left alone


@pytest.fixture
def one_thread():
    """Of many small convolutions: two threads wait for each other, long on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@torch.no_grad()
@pytest.mark.parametrize("dims", [RESNET, VIT], ids=["resnet", "vit"])
def test_a_mistake_in_any_one_tensor_of_random_weights_shows(dims, monkeypatch, one_thread):
    """Beyond fp16's bound: a tensor of the other sign, or of variances the reciprocals."""
    monkeypatch.setitem(MODELS, "small", dims)
    checkpoint = load_checkpoint("small", "random")
    assert all(tensor.all() for tensor in checkpoint.state_dict.values())
    model = original_with_weights(checkpoint, "cpu")
    rows = {model.encode_image: pictures.load(dims.image_resolution)[0][:3],
            model.encode_text: torch.arange(24, dtype=torch.int32).view(3, 8)}
    expected, hidden = {encode: encode(x) for encode, x in rows.items()}, set()
    for name, value in model.state_dict().items():
        if name not in checkpoint.state_dict:
            continue
        encode = model.encode_image if name.startswith("visual.") else model.encode_text
        value.copy_(1 / value if name.endswith("running_var") else -value)
        if torch.cosine_similarity(encode(rows[encode]), expected[encode]).min() > (
                COSINE_BOUND["fp16"]):
            hidden.add(name)
        value.copy_(checkpoint.state_dict[name])
    # Of logits alone, and the same to all scores of a row, which softmax ignores.
    assert hidden == {"logit_scale", "visual.attnpool.k_proj.bias"} & {*checkpoint.state_dict}


def test_openai_published_all_models_but_the_embedded_one():
    assert {*MODELS} - {"demo"} == {*clip.clip._MODELS}


@pytest.mark.parametrize("counted", [True, False])
def test_a_resnet_s_file_may_count_the_batches_of_its_training(path, counted, monkeypatch):
    monkeypatch.setitem(MODELS, "small", RESNET)
    state_dict = load_checkpoint("small", "random").state_dict
    extra = {"visual.bn1.num_batches_tracked": torch.tensor(7)} if counted else {}
    save_file({**state_dict, **extra}, path)
    assert load_checkpoint("small", str(path)).state_dict.keys() == state_dict.keys()
    with pytest.raises(UserError, match="are not those of RN50: Missing key.* size mismatch for"):
        load_checkpoint("RN50", str(path))


@pytest.mark.parametrize("damage, sentence", [
    (lambda d: d.pop("ln_final.bias"), "those of demo: Missing key.* \"ln_final.bias\".$"),
    (lambda d: d.update(extra=torch.zeros(1)), "those of demo: Unexpected key.* \"extra\". *$"),
    (lambda d: d["text_projection"].fill_(float("nan")), "not finite: text_projection"),
])
def test_wrong_tensors(path, state_dict, damage, sentence):
    damage(state_dict)
    save_file(state_dict, path)
    with pytest.raises(UserError, match=sentence):
        load_checkpoint("demo", str(path))


def test_files_that_are_another_model_s_truncated_or_missing(path, state_dict):
    save_file(state_dict, path)
    with pytest.raises(UserError, match="are not those of ViT-B/32: Missing key.* size mismatch"):
        load_checkpoint("ViT-B/32", str(path))
    path.write_bytes(path.read_bytes()[:10000])
    with pytest.raises(UserError, match="w.safetensors cannot be read"):
        load_checkpoint("demo", str(path))
    path.unlink()
    with pytest.raises(UserError, match="w.safetensors: no such file"):
        load_checkpoint("demo", str(path))


class Hostile:
    """A pickle of this creates a file when it is read."""

    def __init__(self, witness):
        self.witness = witness

    def __reduce__(self):
        return open, (str(self.witness), "w")


def test_a_pickle_is_read_where_it_is_trusted_and_else_not_even_opened(tmp_path, state_dict):
    witness, path = tmp_path / "ran", tmp_path / "w.pt"
    torch.save(Hostile(witness), path)
    with pytest.raises(UserError, match="--trust-weights"):
        load_checkpoint("demo", str(path))
    assert not witness.exists()
    with pytest.raises(UserError, match="holds no state dict"):
        load_checkpoint("demo", str(path), trust=True)
    assert witness.exists()
    path.write_bytes(b"no pickle")
    with pytest.raises(UserError, match="cannot be read"):
        load_checkpoint("demo", str(path), trust=True)
    torch.save({**state_dict, "context_length": torch.tensor(77)}, path)
    found = load_checkpoint("demo", str(path), trust=True).state_dict
    assert torch.equal(found["ln_final.bias"], state_dict["ln_final.bias"])


@pytest.mark.filterwarnings("error:'torch.load' received")
def test_one_of_openais_archives_is_recognised_by_its_digest(tmp_path, state_dict, monkeypatch):
    archive, model = tmp_path / "ViT-demo.pt", find("demo").original()
    model.load_state_dict(state_dict)
    inputs = torch.zeros(1, 3, 112, 112), torch.zeros(1, 77, dtype=torch.long)
    torch.jit.save(torch.jit.trace(model, inputs, check_trace=False), str(archive))
    with pytest.raises(UserError, match="--trust-weights"):
        load_checkpoint("demo", str(archive))
    digest = sha256_of_file(archive)
    monkeypatch.setitem(clip.clip._MODELS, "demo", f"https://host/{digest}/{archive.name}")
    monkeypatch.setattr(clip.clip, "_download", lambda url, root: str(archive))
    for weights in (str(archive), "openai"):
        found = load_checkpoint("demo", weights).state_dict["ln_final.bias"]
        assert torch.equal(found, state_dict["ln_final.bias"])


@pytest.mark.parametrize("problem", [urllib.error.URLError("no network"), RuntimeError("checksum")])
def test_openais_weights_without_a_network(tmp_path, monkeypatch, problem):
    monkeypatch.setattr(clip.clip, "_download", mock.Mock(side_effect=problem))
    monkeypatch.setattr(Path, "home", lambda: tmp_path)
    with pytest.raises(UserError, match=r"put ViT-B-32.pt in .*\.cache/clip, or use"):
        load_checkpoint("ViT-B/32")
